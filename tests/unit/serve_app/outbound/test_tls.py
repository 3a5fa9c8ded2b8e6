"""TLS: the name and the signature of a certificate are checked, and redirects do not leave TLS."""

import asyncio
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import aiohttp.connector
import pytest

from serve_app.outbound import OutboundError
from tests.unit.serve_app.outbound.server import DATA, GOOD, UNREACHABLE, Names, Server, outbound, redirect


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of right.test, with its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl (Debian: apt-get install openssl)")
    file = tmp_path_factory.mktemp("tls") / "right.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=right.test"
    )
    extension = ["-addext", "subjectAltName=DNS:right.test"]
    subprocess.run(
        [*command.split(), *extension, "-keyout", file, "-out", f"{file}.crt"],
        check=True,
        capture_output=True,
    )
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


@dataclass
class Secure:
    """A server with the certificate, under right.test and wrong.test."""

    server: Server
    tls: ssl.SSLContext
    names: list[str | None]

    def fetch(self, host: str, path: str = "/") -> bytes:
        async def main() -> bytes:
            async with self.server.running(self.tls):
                port = self.server.port
                door = outbound(f"right.test:{port}", f"wrong.test:{port}", "right.test:80")
                return await door.fetch(f"https://{host}:{port}{path}", max_bytes=10**6)

        return asyncio.run(main())


@pytest.fixture
def secure(certificate: Path, names: Names) -> Secure:
    names.addresses = {
        name: [["127.0.0.1"], ["127.0.0.1"]] for name in ("right.test", "wrong.test", "right.test.")
    }
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    secure = Secure(Server({"/": GOOD}), tls, [])
    tls.sni_callback = lambda _, name, __: secure.names.append(name)
    return secure


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trusts the certificate as if it came with the system."""
    context = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", context)


@pytest.mark.usefixtures("trusted")
def test_tls_gets_the_name_and_checks_it(secure: Secure) -> None:
    assert secure.fetch("right.test") == DATA
    with pytest.raises(OutboundError, match=UNREACHABLE):
        secure.fetch("wrong.test")
    assert secure.names == ["right.test", "wrong.test"]
    assert len(secure.server.heads) == 1


def test_tls_rejects_an_unknown_signer(secure: Secure) -> None:
    with pytest.raises(OutboundError, match=UNREACHABLE):
        secure.fetch("right.test")
    assert secure.server.heads == []


@pytest.mark.usefixtures("trusted")
def test_a_redirect_does_not_leave_tls(secure: Secure, names: Names) -> None:
    secure.server.answers |= {"/a": redirect("/"), "/b": redirect("http://right.test/")}
    assert secure.fetch("right.test", "/a") == DATA
    names.addresses["right.test"] = [["127.0.0.1"]]
    with pytest.raises(OutboundError, match="redirects from https to http"):
        secure.fetch("right.test", "/b")
