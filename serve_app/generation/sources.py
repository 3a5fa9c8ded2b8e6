"""Source images: read from a data URL, from the file store or from another server, and decoded."""

from __future__ import annotations

import asyncio
import base64
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from serve_app.errors import InvalidParameter, image_too_large
from serve_app.generation.decoding import DecodingProcess
from serve_app.observability import telemetry
from serve_app.outbound import OutboundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.families import Family
    from deployments.types import Pixels
    from serve_app.config import Limits
    from serve_app.files.store import FileStore
    from serve_app.generation.request import Source
    from serve_app.outbound import Outbound

DATA_URL = re.compile(r"data:[^,]{0,100}?(; *base64)?,", re.IGNORECASE)
"""https://fetch.spec.whatwg.org/#data-urls. The media type is ignored: the file itself shows its format."""
DECODING = DecodingProcess()
"""The one process in which this process has images decoded."""
FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
OUR_FILE = re.compile(r"https?://[^/?#]+(?:/[^?#]*)?/files/([^/?#]+)", re.IGNORECASE)


class SourceReader:
    """Reads source images by their URLs, and decodes them.

    Both are bounded: by `limits.max_image_bytes` and `limits.max_source_pixels`. Files in the request itself
    were bounded when they were received.
    """

    def __init__(self, outbound: Outbound, files: FileStore, limits: Limits) -> None:
        self._outbound = outbound
        self._files = files
        self._max_bytes = limits.max_image_bytes
        self._max_pixels = limits.max_source_pixels
        self._max_side = limits.max_source_side
        # One image at a time, since a hostile one takes hundreds of megabytes.
        self._waiting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    async def read(self, url: str) -> bytes:
        """Returns the file of a URL, whatever it contains.

        Raises:
            InvalidParameter: it cannot be fetched.
            TooLarge: it has too many bytes.
        """
        if match := DATA_URL.match(url):
            return await asyncio.to_thread(self._decoded, url[match.end() :], is_base64=bool(match[1]))
        # The host may have another name for the client. Knowing a file's name is permission to read it.
        if (match := OUR_FILE.fullmatch(url)) and (file := await self._files.read_all(match[1])) is not None:
            if len(file) > self._max_bytes:
                raise image_too_large(self._max_bytes)
            return file
        try:
            return await self._outbound.fetch(url, max_bytes=self._max_bytes)
        except OutboundError as error:
            raise InvalidParameter("sources", error.problem, code="invalid_image_url") from error

    def _decoded(self, text: str, *, is_base64: bool) -> bytes:
        """Returns the file in a data URL.

        Clients write base64 in lines, percent-encoded, without padding, or in the alphabet for URLs.
        """
        data = unquote_to_bytes(text)
        if is_base64:
            data = data.translate(FROM_URL_SAFE, delete=b"\t\n\f\r ").rstrip(b"=")
            if len(data) * 3 // 4 > self._max_bytes:
                raise image_too_large(self._max_bytes)
            try:
                data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
            except ValueError as error:
                problem = "has a data URL that is not base64"
                raise InvalidParameter("sources", problem, code="invalid_image_url") from error
        if len(data) > self._max_bytes:
            raise image_too_large(self._max_bytes)
        return data

    async def decode(self, sources: Sequence[Source], family: Family) -> tuple[Pixels, ...]:
        """Returns source images as pixels that both stages take. The answer's header has notes on them.

        Args:
            sources: files, or URLs of files; see `read`.
            family: the family of the model.

        Raises:
            InvalidParameter: an image cannot be fetched, or was rejected; see
                `serve_app.generation.codec.decode_source`.
            TooLarge: an image has too many bytes.
        """
        files = [await self.read(source) if isinstance(source, str) else source for source in sources]
        loop = asyncio.get_running_loop()
        decode = partial(DECODING.decode, family=family, max_pixels=self._max_pixels, max_side=self._max_side)
        decoded = [await loop.run_in_executor(self._waiting, decode, file) for file in files]
        for number, one in enumerate(decoded):
            for note in one.notes:
                telemetry.note_for_client(f"Source image {number + 1} {note}.")
        return tuple(one.pixels for one in decoded)
