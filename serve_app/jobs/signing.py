"""The key by which webhooks are signed, and how others check that."""

from __future__ import annotations

import base64
import secrets
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Column, Double, LargeBinary, MetaData, String, Table, insert, select

from serve_app.jobs.database import now

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from serve_app.jobs.database import Database

_keys = Table(
    "signing_keys",
    MetaData(),
    Column("id", String, primary_key=True),
    Column("secret", LargeBinary),
    Column("created_at", Double),
)
"""As the migrations make it. The newest key signs; all of them are published."""


class Signer:
    """Signs by ED25519, with a key that is made once and kept in the database: RFC 8032."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._keys: list[tuple[str, Ed25519PrivateKey]] = []

    async def sign(self, message: bytes) -> bytes:
        """The message's signature, of 64 bytes."""
        return (await self._load())[0][1].sign(message)

    async def jwks(self) -> dict[str, Any]:
        """The public keys, as https://www.rfc-editor.org/rfc/rfc8037 writes them."""
        return {
            "keys": [
                {
                    "kty": "OKP",
                    "crv": "Ed25519",
                    "alg": "EdDSA",
                    "use": "sig",
                    "kid": key_id,
                    "x": base64.urlsafe_b64encode(key.public_key().public_bytes_raw()).rstrip(b"=").decode(),
                }
                for key_id, key in await self._load()
            ]
        }

    async def _load(self) -> list[tuple[str, Ed25519PrivateKey]]:
        def call(connection: Connection) -> list[tuple[str, Ed25519PrivateKey]]:
            self._database.one_at_a_time(connection)
            every = select(_keys).order_by(_keys.c.created_at.desc())
            if connection.execute(every).first() is None:
                secret = Ed25519PrivateKey.generate().private_bytes_raw()
                values = {"id": secrets.token_hex(8), "secret": secret, "created_at": now()}
                connection.execute(insert(_keys).values(values))
            return [
                (row.id, Ed25519PrivateKey.from_private_bytes(row.secret))
                for row in connection.execute(every)
            ]

        if not self._keys:
            self._keys = await self._database.write(call)
        return self._keys
