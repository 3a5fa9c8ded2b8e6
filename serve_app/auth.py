"""Who may use the server: keys, in the headers that clients know. `python -m serve_app.auth new` makes one.

A key is looked for in `Authorization: Bearer K`, `Authorization: Key K` and `Ocp-Apim-Subscription-Key: K`,
never in the query, where it would end up in logs.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import os
import re
import secrets
from typing import TYPE_CHECKING

from serve_app.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send

    from serve_app.config import AuthConfig

OPEN_PATHS = re.compile(
    r"/(health|livez|readyz|openapi\.json|openapi\.yaml|\.well-known/jwks\.json|files/[^/]*)"
)
"""What anybody may ask. The names of files cannot be guessed, and whoever was given one may hand it on."""
SCHEMES = (b"bearer", b"key")


def read_keys(config: AuthConfig) -> dict[str, bytes]:
    """The SHA-256 of each key, by the key's id.

    Raises:
        ValueError: a variable of the environment that is to hold a key is not set.
    """
    digests = {}
    for key in config.api_keys:
        if key.secret_env is None:
            digests[key.id] = bytes.fromhex(key.sha256 or "")
        elif secret := os.environ.get(key.secret_env):
            digests[key.id] = hashlib.sha256(secret.encode()).digest()
        else:
            raise ValueError(
                f"auth.api_keys: {key.id}: the environment has no {key.secret_env}, which is to hold the key"
            )
    return digests


class Authentication:
    """Lets requests with a key pass, before their body is read; refuses all others but for `OPEN_PATHS`.

    The key's id is in `request.state.key_id`; it is empty where no key was asked for and none was known.

    Args:
        app: what is guarded.
        keys: see `read_keys`.
        open_to_all: whether whoever has no key may pass too.
        respond: makes the answer to a refused request.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Mapping[str, bytes],
        *,
        open_to_all: bool,
        respond: Callable[[RequestError], ASGIApp],
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
        presented = _presented(scope["headers"])
        key_id = next((found for key in presented if (found := self._find(key))), "")
        scope.setdefault("state", {})["key_id"] = key_id
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if key_id or self._open_to_all or OPEN_PATHS.fullmatch(path):
            await self._app(scope, receive, send)
        else:
            await self._respond(_refusal(presented))(scope, receive, send)

    def _find(self, key: bytes) -> str | None:
        """The id of a key. All are compared, so that the time taken tells nothing."""
        digest = hashlib.sha256(key).digest()
        found = [key_id for key_id, known in self._keys.items() if hmac.compare_digest(digest, known)]
        return found[0] if found else None


def _presented(headers: list[tuple[bytes, bytes]]) -> list[bytes]:
    keys = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() in SCHEMES:
                keys.append(key.strip(b" "))
        elif name == b"ocp-apim-subscription-key":
            keys.append(value)
    return keys


def _refusal(presented: list[bytes]) -> RequestError:
    return RequestError(
        "The API key is not known here."
        if presented
        else "Send your API key as `Authorization: Bearer KEY`.",
        code="invalid_api_key" if presented else "missing_api_key",
        status=401,
        headers={"WWW-Authenticate": "Bearer"},
    )


def main() -> None:
    """Read the command line, make a key."""
    parser = argparse.ArgumentParser(prog="python -m serve_app.auth", description="Make API keys.")
    commands = parser.add_subparsers(required=True)
    new = commands.add_parser("new", help="make a key, print it once, and the line for the configuration")
    new.add_argument("name", help="the key's id in the configuration and the log")
    name = parser.parse_args().name

    from serve_app.config import APIKey  # here, so that --help need not wait for it

    secret = secrets.token_urlsafe(32)
    try:
        key = APIKey(id=name, sha256=hashlib.sha256(secret.encode()).hexdigest())
    except ValueError:
        parser.error("a name has 1 to 64 letters, digits, dots, underscores and hyphens")
    print(f"The key, which is not shown again:\n\n  {secret}\n\nUnder auth.api_keys of the configuration:\n")
    print(f"  - {{id: {key.id}, sha256: {key.sha256}}}")


if __name__ == "__main__":
    main()
