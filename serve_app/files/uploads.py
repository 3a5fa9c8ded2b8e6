"""Source images that clients send ahead, to an address that they are given for it."""

from __future__ import annotations

import hmac
import time
from typing import TYPE_CHECKING

from serve_app.errors import InvalidParameter, RequestError, image_too_large
from serve_app.generation import images

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from serve_app.files.store import FileStore
    from serve_app.jobs.signing import Signer

VALID_S = 3600


class Uploads:
    """Gives out names under which one image each may be stored, without a key, within the hour.

    What makes such a name good is a signature, so that any ingress takes what another one has let in.

    Args:
        files: where the images go.
        signer: of the names.
        max_bytes: of one image.
    """

    def __init__(self, files: FileStore, signer: Signer, max_bytes: int) -> None:
        self._files = files
        self._signer = signer
        self._max_bytes = max_bytes

    async def name(self) -> tuple[str, int, str]:
        """A name, when it expires in seconds since 1970, and the signature of both."""
        name, expires = self._files.new_name("upload"), int(time.time()) + VALID_S
        return name, expires, await self._signature(name, expires)

    async def take(self, name: str, expires: int, signature: str, body: AsyncIterable[bytes]) -> None:
        """Store an image under its name.

        Raises:
            InvalidParameter: it is no PNG, JPEG or WebP.
            RequestError: 403, the name was not given out so, or long ago; 409, it has its image already; 413,
                the image is too large; 507, there is no room.
        """
        expected = await self._signature(name, expires)
        if not hmac.compare_digest(signature.encode(), expected.encode()) or expires < time.time():
            raise RequestError(
                "This address is not valid, or not any more; ask for a new one.", code="forbidden", status=403
            )
        if await self._files.size(name) is not None:
            raise RequestError("The file was uploaded already.", code="already_uploaded", status=409)
        await self._files.check_room()
        data = bytearray()
        async for chunk in body:
            data += chunk
            if len(data) > self._max_bytes:
                raise image_too_large(self._max_bytes)
        if not images.is_image(data):
            raise InvalidParameter("sources", "must be PNG, JPEG or WebP", code="invalid_image")
        await self._files.save_as(name, bytes(data))

    async def _signature(self, name: str, expires: int) -> str:
        return (await self._signer.sign(f"upload {name} {expires}".encode())).hex()
