"""Source images: by URL, sent along in it, kept here already, or fetched; and decoding them."""

from __future__ import annotations

import asyncio
import base64
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from serve_app.errors import InvalidParameter, image_too_large
from serve_app.generation import images
from serve_app.outbound import OutboundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.families import Family
    from serve_app.config import Limits
    from serve_app.files.store import FileStore
    from serve_app.generation.generator import Prepare
    from serve_app.generation.request import Generation
    from serve_app.outbound import Outbound

DATA_URL = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)
"""https://www.rfc-editor.org/rfc/rfc2397; what kind of image it is shows in the image."""
OUR_FILE = re.compile(r"https?://[^/?#]+(?:/[^?#]*)?/files/([^/?#]+)", re.IGNORECASE)


class SourceReader:
    """Reads source images, of no more than `limits.max_image_bytes` each, and decodes them."""

    def __init__(self, outbound: Outbound, files: FileStore, limits: Limits) -> None:
        self._outbound = outbound
        self._files = files
        self._max_bytes = limits.max_image_bytes
        self._max_pixels = limits.max_source_pixels
        # One image at a time: a hostile one takes hundreds of megabytes; and nothing else waits for it.
        self._decoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    async def read(self, url: str) -> bytes:
        """The file behind a URL; what it holds is not looked at.

        Raises:
            InvalidParameter: it cannot be had.
            RequestError: 413, it is too large.
        """
        if match := DATA_URL.match(url):
            if (len(url) - match.end()) * 3 / 4 > self._max_bytes + 2:  # up to two bytes of padding
                raise image_too_large(self._max_bytes)
            return await asyncio.to_thread(_decoded, url, match.end())
        # Whoever knows the name of a file may have it, whatever the host is called from where the client is.
        if (match := OUR_FILE.fullmatch(url)) and (size := await self._files.size(match[1])) is not None:
            file = await self._files.read(match[1], 0, size)
            if file is not None:
                return file
        try:
            return await self._outbound.fetch(url, max_bytes=self._max_bytes)
        except OutboundError as error:
            raise InvalidParameter("sources", error.problem, code="invalid_image_url") from error

    def fetching(self, urls: Sequence[str], family: Family) -> Prepare:
        """What adds the images behind these URLs to a generation; see `read` and `add`."""

        async def prepare(generation: Generation) -> Generation:
            return await self.add(generation, [await self.read(url) for url in urls], family)

        return prepare

    async def add(self, generation: Generation, files: list[bytes], family: Family) -> Generation:
        """The generation with its source images and, if it had no size, the first one's.

        Args:
            generation: without them.
            files: as they were sent; emptied, since they are not to be held while the images are made.
            family: of the model that is to take them.

        Raises:
            InvalidParameter: an image was rejected; see `serve_app.generation.images.decode_source`.
        """
        loop = asyncio.get_running_loop()
        decode = partial(images.decode_source, family=family, max_pixels=self._max_pixels)
        sources = tuple([await loop.run_in_executor(self._decoding, decode, data) for data in files])
        files.clear()
        height, width, _ = sources[0].shape
        return replace(generation, sources=sources, size=generation.size or (width, height))


def _decoded(url: str, start: int) -> bytes:
    try:
        return base64.b64decode(url[start:], validate=True)
    except ValueError as error:
        problem = "has a data URL that is not base64"
        raise InvalidParameter("sources", problem, code="invalid_image_url") from error
