"""The self-signed certificate: kept, renewed in time, and trusted only for its names."""

import socket
import ssl
import stat
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from serve_app.http import tls


def shake_hands(certificate: Path, key: Path, name: str, trusted: Path) -> None:
    """Connects a client that trusts one certificate to a server by a name."""
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_context.load_cert_chain(certificate, key)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server_context.wrap_socket(theirs, server_side=True).close()
        except OSError:  # the client disconnected
            theirs.close()

    serving = threading.Thread(target=serve)
    serving.start()
    context = ssl.create_default_context(cafile=trusted)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        with ours, context.wrap_socket(ours, server_hostname=name):
            pass
    finally:
        serving.join()


def test_it_is_made_once_and_trusted_by_its_names(tmp_path: Path) -> None:
    certificate, key = tls.self_signed(tmp_path / "new", "gpu-box")
    first = certificate.read_bytes()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for name in ("gpu-box", "localhost", "127.0.0.1", "::1"):
        shake_hands(certificate, key, name, certificate)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(certificate, key, "elsewhere", certificate)
    tls.self_signed(tmp_path / "new", "127.0.0.1")
    assert certificate.read_bytes() == first


def test_another_certificate_is_not_trusted(tmp_path: Path) -> None:
    certificate, key = tls.self_signed(tmp_path / "a", "localhost")
    other, _ = tls.self_signed(tmp_path / "b", "localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(certificate, key, "localhost", other)


@pytest.mark.parametrize(
    "why", ["another host", "nearly expired", "broken", "no key", "another key", "broken key"]
)
def test_a_certificate_of_no_more_use_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "nearly expired":
        monkeypatch.setattr(tls, "VALID", tls.RENEW_BEFORE - timedelta(days=1))
    certificate, key = tls.self_signed(tmp_path, "localhost")
    first = certificate.read_bytes()
    monkeypatch.undo()
    if why == "broken":
        certificate.write_text("nothing")
    if why == "no key":
        key.unlink()
    if why == "another key":
        _, other = tls.self_signed(tmp_path / "other", "localhost")
        key.write_bytes(other.read_bytes())
    if why == "broken key":
        key.write_bytes(b"")
    tls.self_signed(tmp_path, "gpu-box" if why == "another host" else "localhost")
    assert certificate.read_bytes() != first
    shake_hands(certificate, key, "localhost", certificate)
