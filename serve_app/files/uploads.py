"""Uploads of source images, each to a signed URL that the client requested before."""

from __future__ import annotations

import hmac
import time
from typing import TYPE_CHECKING

from serve_app.errors import Conflict, InvalidParameter, Refused, image_too_large
from serve_app.generation import containers

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from serve_app.files.store import FileStore
    from serve_app.jobs.signing import Signer

VALID_S = 3600


class Uploads:
    """Issues names under which one image each may be stored, without an API key, within an hour.

    A name is valid by its signature, so that any ingress replica accepts the names of the others.

    Args:
        files: keeps the images.
        signer: signs the names.
        max_bytes: largest image.
    """

    def __init__(self, files: FileStore, signer: Signer, max_bytes: int) -> None:
        self._files = files
        self._signer = signer
        self._max_bytes = max_bytes

    async def name(self) -> tuple[str, int, str]:
        """Returns a name, its expiry in seconds since 1970, and the signature of both."""
        name, expires = self._files.new_name("upload"), int(time.time()) + VALID_S
        return name, expires, await self._signature(name, expires)

    async def take(self, name: str, expires: int, signature: str, body: AsyncIterable[bytes]) -> None:
        """Stores an image under its name.

        Raises:
            InvalidParameter: it is not a PNG, JPEG or WebP.
            Refused: the signature is wrong, or the name has expired.
            Conflict: the name has its image already.
            TooLarge: the image has too many bytes.
            Full: there is no room.
        """
        expected = await self._signature(name, expires)
        if not hmac.compare_digest(signature.encode(), expected.encode()) or expires < time.time():
            raise Refused("This upload URL is invalid or has expired; request a new one.")
        taken = Conflict(
            "The file was uploaded already; request another URL for another file.",
            code="already_uploaded",
            retryable=True,
        )
        if await self._files.size(name) is not None:
            raise taken
        await self._files.check_room()
        data = bytearray()
        async for chunk in body:
            data += chunk
            if len(data) > self._max_bytes:
                raise image_too_large(self._max_bytes)
        if not containers.is_image(data):
            raise InvalidParameter("sources", "must be PNG, JPEG or WebP", code="invalid_image")
        try:
            await self._files.save_as(name, bytes(data), replace=False)
        except FileExistsError:  # by another upload at the same time
            raise taken from None

    async def _signature(self, name: str, expires: int) -> str:
        return (await self._signer.sign(f"upload {name} {expires}".encode())).hex()
