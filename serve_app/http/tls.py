"""A self-signed certificate, for clients that speak https only."""

from __future__ import annotations

import ipaddress
import os
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

VALID = timedelta(days=365)
RENEW_BEFORE = timedelta(days=30)
"""Remaining validity below which a certificate is made again."""


def self_signed(folder: Path, host: str) -> tuple[Path, Path]:
    """Returns the files of a certificate for this machine and of its key; makes them if there are none.

    Clients trust the certificate itself: it signs nothing else.

    Args:
        folder: folder of the files.
        host: a name or an address of the server, beside localhost.

    Raises:
        OSError: they cannot be written.
    """
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    names = [_name(one) for one in dict.fromkeys((host, "localhost", "127.0.0.1", "::1"))]
    with suppress(OSError, ValueError, x509.ExtensionNotFound):
        kept = x509.load_pem_x509_certificate(certificate.read_bytes())
        known = kept.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if (
            set(names) <= set(known)
            and kept.not_valid_after_utc - datetime.now(UTC) > RENEW_BEFORE
            and _public(serialization.load_pem_private_key(key.read_bytes(), None)) == _public(kept)
        ):
            return certificate, key
    private = ec.generate_private_key(ec.SECP256R1())
    folder.mkdir(parents=True, exist_ok=True)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with open(key, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(pem)
    certificate.write_bytes(_certificate(private, names).public_bytes(serialization.Encoding.PEM))
    return certificate, key


def _certificate(private: ec.EllipticCurvePrivateKey, names: list[x509.GeneralName]) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "GLM-Image server")])
    now, public = datetime.now(UTC), private.public_key()
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return (
        x509.CertificateBuilder(subject, subject, public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(private, hashes.SHA256())
    )


def _public(pair: x509.Certificate | PrivateKeyTypes) -> bytes:
    """Returns the public key: a certificate and a private key of one pair have the same."""
    return pair.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _name(host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)
