"""The keys that sign webhooks and upload URLs, and their public form."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm
from sqlalchemy import select

from serve_app.jobs.tables import SigningKey

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from serve_app.jobs.database import Database


class Signer:
    """Signs by Ed25519 (RFC 8032), with a key that is made once and kept in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._keys: list[tuple[str, Ed25519PrivateKey]] = []

    async def sign(self, message: bytes) -> bytes:
        """Returns the message's signature of 64 bytes."""
        return (await self._load())[0][1].sign(message)

    async def jwks(self) -> dict[str, Any]:
        """Returns the public keys in the form of https://www.rfc-editor.org/rfc/rfc8037."""
        return {
            "keys": [
                OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
                | {"alg": "EdDSA", "use": "sig", "kid": key_id}
                for key_id, key in await self._load()
            ]
        }

    async def _load(self) -> list[tuple[str, Ed25519PrivateKey]]:
        def call(session: Session) -> list[tuple[str, Ed25519PrivateKey]]:
            self._database.one_at_a_time(session)
            newest_first = select(SigningKey).order_by(SigningKey.created_at.desc())
            if session.scalars(newest_first).first() is None:
                secret = Ed25519PrivateKey.generate().private_bytes_raw()
                session.add(SigningKey(id=secrets.token_hex(8), secret=secret))
                session.flush()
            return [
                (key.id, Ed25519PrivateKey.from_private_bytes(key.secret))
                for key in session.scalars(newest_first)
            ]

        if not self._keys:
            self._keys = await self._database.write(call)
        return self._keys
