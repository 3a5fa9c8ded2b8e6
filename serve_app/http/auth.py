"""Authentication by API keys.

A key is read from `Authorization: Bearer K`, `Authorization: Key K` and `Ocp-Apim-Subscription-Key: K`. It is
never read from the query, since URLs end up in logs. A key of the form `id.secret` may also sign tokens, as
the clients of Z.ai do. A token is accepted in place of the key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from typing import TYPE_CHECKING

import jwt

from serve_app.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starlette.types import ASGIApp, Receive, Scope, Send

    from serve_app.config import AuthConfig

OPEN_PATHS = re.compile(
    r"/(|playground/[^/]*|health|livez|readyz|openapi\.json|openapi\.yaml|\.well-known/jwks\.json|files/[^/]*"
    r"|storage/upload/[^/]*\.upload)"
)
"""What anybody may ask. The playground asks for the key itself; the names of files cannot be guessed, and
whoever was given one may hand it on; to upload takes a signature."""
SCHEMES = (b"bearer", b"key")
SIGNING_KEY = re.compile(r"([^.]+)\.([^.]+)")
"""A key by which tokens may be signed: the id that they name, and the secret that signs them."""
MAX_TOKEN_BYTES = 4096
NO_TIMES: jwt.types.Options = {"verify_exp": False, "verify_iat": False, "verify_nbf": False}
"""A library would take milliseconds for seconds."""


class Keys:
    """The keys that are let in.

    Raises:
        ValueError: a variable of the environment that is to hold a key is not set.
    """

    def __init__(self, config: AuthConfig) -> None:
        self._digests: dict[str, bytes] = {}
        self._signers: dict[str, tuple[str, str]] = {}
        for key in config.api_keys:
            if key.secret_env is None:
                self._digests[key.id] = bytes.fromhex(key.sha256 or "")
            elif secret := os.environ.get(key.secret_env):
                self._digests[key.id] = hashlib.sha256(secret.encode()).digest()
                if match := SIGNING_KEY.fullmatch(secret):
                    self._signers[match[1]] = (key.id, match[2])
            else:
                raise ValueError(
                    f"auth.api_keys: {key.id}: the environment has no {key.secret_env}, which is to hold the "
                    "key"
                )

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The id of the key that a request shows.

        Raises:
            RequestError: 401, it shows none that is known.
        """
        presented = _presented(headers)
        for key in presented:
            if key_id := self._by_digest(key) or self._by_token(key):
                return key_id
        if presented:
            raise _refusal("The API key is not known here.", "invalid_api_key")
        raise _refusal("Send your API key as `Authorization: Bearer KEY`.", "missing_api_key")

    def _by_digest(self, key: bytes) -> str | None:
        """All are compared, so that the time taken tells nothing."""
        digest = hashlib.sha256(key).digest()
        found = [key_id for key_id, known in self._digests.items() if hmac.compare_digest(digest, known)]
        return found[0] if found else None

    def _by_token(self, token: bytes) -> str | None:
        """The key that has signed a token as Z.ai's clients do: a JWT whose times are milliseconds.

        https://docs.z.ai/guides/develop/http/introduction

        Raises:
            RequestError: 401, it is too old.
        """
        if len(token) > MAX_TOKEN_BYTES:
            return None
        try:
            unverified = jwt.decode(token, options={"verify_signature": False})
            key_id, secret = self._signers[unverified["api_key"]]
            claims = jwt.decode(token, secret, algorithms=["HS256"], options=NO_TIMES)
            expires_ms = float(claims["exp"])
        except (jwt.PyJWTError, KeyError, TypeError, ValueError):
            return None
        if not expires_ms > time.time() * 1000:
            raise _refusal("The token has expired; sign a new one.", "expired_token")
        return key_id


class Authentication:
    """Lets requests with a key pass, before their body is read; refuses all others but for `OPEN_PATHS`.

    The key's id is in `request.state.key_id`; it is empty where no key was asked for and none was known.

    Args:
        app: what is guarded.
        keys: that are let in.
        open_to_all: whether whoever has no key may pass too.
        respond: makes the answer to a refused request.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        *,
        open_to_all: bool,
        respond: Callable[[Scope, RequestError], ASGIApp],
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_to_all = open_to_all
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state, key_id = scope.setdefault("state", {}), ""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            key_id = self._keys.identify(scope["headers"])
        except RequestError as refusal:
            if not (self._open_to_all or OPEN_PATHS.fullmatch(path)):
                state["key_id"] = ""
                await self._respond(scope, refusal)(scope, receive, send)
                return
        state["key_id"] = key_id
        await self._app(scope, receive, send)


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    keys = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() in SCHEMES:
                keys.append(key.strip(b" "))
        elif name == b"ocp-apim-subscription-key":
            keys.append(value)
    return keys


def _refusal(message: str, code: str) -> RequestError:
    return RequestError(message, code=code, status=401, headers={"WWW-Authenticate": "Bearer"})
