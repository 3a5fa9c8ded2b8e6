"""Authentication by API keys.

A key is read from `Authorization: Bearer K`, `Authorization: Key K` and `Ocp-Apim-Subscription-Key: K`. It is
never read from the query, since URLs end up in logs. A key of the form `id.secret` may also sign tokens, as
the clients of Z.ai do. A token is accepted in place of the key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import jwt
import yaml
from fastapi import Request  # noqa: TC002 - FastAPI reads the annotation
from pydantic import TypeAdapter, ValidationError

from serve_app.config import APIKey
from serve_app.errors import Refused, RequestError
from serve_app.http.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starlette.types import ASGIApp, Receive, Scope, Send

    from serve_app.config import AuthConfig

OPEN_PATHS = re.compile(
    r"/(|operator|playground/[^/]*|docs|docs/[^/]*|health|version|livez|readyz|openapi\.json|openapi\.yaml"
    r"|\.well-known/jwks\.json|files/[^/]*|storage/upload/[^/]*\.upload)"
)
"""Paths that need no key. The pages ask for the key themselves. Names of files cannot be guessed, and may be
shared. An upload needs a signature."""
SCHEMES = (b"bearer", b"key")
SIGNING_KEY = re.compile(r"([^.]+)\.([^.]+)")
"""A key that may sign tokens: the id that the tokens name, and the secret that signs them."""
RELOAD_S = 5.0
"""Seconds between two readings of the file of keys."""
MAX_TOKEN_BYTES = 4096
NO_TIMES: jwt.types.Options = {"verify_exp": False, "verify_iat": False, "verify_nbf": False}
"""The times are milliseconds, and the library would read seconds."""


class Keys:
    """The valid keys.

    Raises:
        OSError: their file cannot be read.
        ValueError: the environment variable of a key is not set, or the file has no list of keys.
    """

    def __init__(self, config: AuthConfig) -> None:
        self._config = config
        self._digests: dict[str, bytes] = {}
        self._signers: dict[str, list[tuple[str, str]]] = {}
        self._operators: frozenset[str] = frozenset()
        self._read()

    async def reload(self) -> None:
        """Reads the file of keys again. If it cannot be used, the keys stay as they are.

        Raises:
            OSError: it cannot be read.
            ValueError: it has no list of keys.
        """
        await asyncio.to_thread(self._read)

    def _read(self) -> None:
        digests: dict[str, bytes] = {}
        signers: dict[str, list[tuple[str, str]]] = {}
        keys = (*self._config.api_keys, *keys_in(self._config.keys_file))
        for key in keys:
            if key.id in digests:
                raise ValueError(f"two API keys have the id {key.id}")
            if key.secret_env is None:
                digests[key.id] = bytes.fromhex(key.sha256 or "")
            elif secret := os.environ.get(key.secret_env):
                digests[key.id] = hashlib.sha256(secret.encode()).digest()
                if match := SIGNING_KEY.fullmatch(secret):
                    signers.setdefault(match[1], []).append((key.id, match[2]))
            else:
                raise ValueError(f"API key {key.id}: the environment variable {key.secret_env} is not set")
        operators = frozenset(key.id for key in keys if key.role == "operator")
        self._digests, self._signers, self._operators = digests, signers, operators

    def is_operator(self, key_id: str) -> bool:
        """Returns whether the key of this id has the role `operator`."""
        return key_id in self._operators

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Returns the id of a request's key.

        Raises:
            ProtocolError: 401, it has no valid key.
        """
        presented, expired = presented_keys(headers), None
        for key in presented:
            try:
                if key_id := self._by_digest(key) or self._by_token(key):
                    return key_id
            except ProtocolError as error:
                expired = error
        if expired:
            raise expired
        if presented:
            raise _unauthorized("The API key is not known here.", code="invalid_api_key")
        raise _unauthorized("Send your API key as `Authorization: Bearer KEY`.", code="missing_api_key")

    def _by_digest(self, key: bytes) -> str | None:
        """Returns the id of a key. All keys are compared, so that the time reveals nothing."""
        digest = hashlib.sha256(key).digest()
        found = [key_id for key_id, known in self._digests.items() if hmac.compare_digest(digest, known)]
        return found[0] if found else None

    def _by_token(self, token: bytes) -> str | None:
        """Returns the id of the key that signed a token: a JWT with times in milliseconds, as Z.ai's are.

        https://docs.z.ai/guides/develop/http/introduction

        Raises:
            ProtocolError: 401, it has expired.
        """
        if len(token) > MAX_TOKEN_BYTES:
            return None
        invalid = (jwt.PyJWTError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
        signers: list[tuple[str, str]] = []
        with suppress(*invalid):
            signers = self._signers[jwt.decode(token, options={"verify_signature": False})["api_key"]]
        for key_id, secret in signers:
            with suppress(*invalid):
                claims = jwt.decode(token, secret, algorithms=["HS256"], options=NO_TIMES)
                if not float(claims["exp"]) > time.time() * 1000:
                    raise _unauthorized("The token has expired; sign a new one.", code="expired_token")
                return key_id
        return None


class Authentication:
    """Middleware that rejects requests without a valid key before their body is read, except to `OPEN_PATHS`.

    The key's id is in `request.state.key_id`. It is empty without a valid key. `request.state.is_operator`
    says whether the request is an operator's. Without a key, it is one if requests need none.

    Args:
        app: the application behind it.
        keys: the valid keys.
        open_to_all: whether requests without a key pass too.
        respond: makes the answer to a rejected request.
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
        """Passes the request on, or rejects it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state, key_id = scope.setdefault("state", {}), ""
        state |= {"key_id": "", "is_operator": False}
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            key_id = self._keys.identify(scope["headers"])
        except RequestError as refusal:
            if not (self._open_to_all or OPEN_PATHS.fullmatch(path)):
                await self._respond(scope, refusal)(scope, receive, send)
                return
        is_operator = self._keys.is_operator(key_id) if key_id else self._open_to_all
        state |= {"key_id": key_id, "is_operator": is_operator}
        await self._app(scope, receive, send)


def require_operator(request: Request) -> None:
    """Rejects a request that is not an operator's.

    Raises:
        Refused: it is a user's.
    """
    if not request.state.is_operator:
        raise Refused(
            "This needs a key with the role `operator`, and the role of this key is `user`. Roles are set in "
            "the server's configuration: `auth.api_keys[].role`.",
            code="operator_required",
        )


def keys_in(file: str | None) -> tuple[APIKey, ...]:
    """Returns the keys in a file; none without a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has no list of keys.
    """
    if file is None:
        return ()
    try:
        keys = TypeAdapter(tuple[APIKey, ...]).validate_python(yaml.safe_load(Path(file).read_text()))
    except (ValidationError, yaml.YAMLError):  # their messages hold what stands in the file
        keys = ()
    if not keys:
        raise ValueError(f"{file} is not a list of keys such as `- {{id: alice, sha256: …}}`")
    return keys


def presented_keys(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Returns the keys and tokens in a request's headers."""
    keys = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() in SCHEMES:
                keys.append(key.strip(b" "))
        elif name == b"ocp-apim-subscription-key":
            keys.append(value)
    return keys


def _unauthorized(message: str, *, code: str) -> ProtocolError:
    return ProtocolError(message, code=code, status=401, headers={"WWW-Authenticate": "Bearer"})
