"""The address, the certificate, the keys and the environment variables of a configuration."""

import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli.config_file import HTTPOptions
from serve_app.cli.doctor import configuration
from serve_app.cli.doctor.findings import Finding
from serve_app.config import AppConfig
from serve_app.http import tls

STAGE = {"device": "cpu"}
MODEL = {"name": "m", "family": "glm_image", "checkpoint": "tiny", "prior": STAGE, "decoder": STAGE}
SHA256 = "a" * 64


def keys(auth: dict[str, Any], *, host: str = "127.0.0.1", **more: Any) -> list[Finding]:
    config = AppConfig.model_validate({"models": [MODEL], "auth": auth} | more)
    return list(configuration.keys(config, host))


def certificate(folder: Path, **paths: str) -> Finding:
    made = {"ssl_certfile": str(folder / "certificate.pem"), "ssl_keyfile": str(folder / "key.pem")}
    (finding,) = configuration.certificate(HTTPOptions(**(made | paths)))
    return finding


def test_a_taken_port_is_a_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        http = HTTPOptions(port=server.getsockname()[1])
        (finding,) = configuration.address(http)
    assert not finding.ok
    assert "Address already in use" in finding.text
    (finding,) = configuration.address(http)
    assert finding.ok


def test_without_a_certificate_there_is_nothing_to_find() -> None:
    assert not list(configuration.certificate(HTTPOptions()))


def test_a_valid_certificate(tmp_path: Path) -> None:
    tls.self_signed(tmp_path, "host")
    assert certificate(tmp_path).ok


def test_an_expired_certificate_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "VALID", timedelta(minutes=-1))
    tls.self_signed(tmp_path, "host")
    finding = certificate(tmp_path)
    assert not finding.ok
    assert finding.text.endswith("not now")


def test_an_unusable_certificate_is_a_fault(tmp_path: Path) -> None:
    tls.self_signed(tmp_path, "host")
    _, other_key = tls.self_signed(tmp_path / "other", "host")
    assert "KEY_VALUES_MISMATCH" in certificate(tmp_path, ssl_keyfile=str(other_key)).text
    assert "No such file" in certificate(tmp_path, ssl_keyfile=str(tmp_path / "nowhere")).text
    assert not certificate(tmp_path, ssl_certfile=str(other_key)).ok


def test_environment_variables_of_keys_are_set_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALICE_KEY", "alices-secret")
    monkeypatch.delenv("BOB_KEY", raising=False)
    monkeypatch.setenv("LLM_KEY", "")
    listed = [
        {"id": "alice", "secret_env": "ALICE_KEY"},
        {"id": "bob", "secret_env": "BOB_KEY"},
        {"id": "carol", "sha256": SHA256},
    ]
    endpoint = {"base_url": "https://llm.example.com/v1", "model": "x", "key_env": "LLM_KEY"}
    alice, bob, llm = keys({"api_keys": listed}, prompt_expander={"endpoint": endpoint})
    assert str(alice) == "ok  API key alice: the environment variable ALICE_KEY is set"
    assert str(bob).startswith(
        "!!  API key bob: the environment variable BOB_KEY is not set: export BOB_KEY="
    )
    assert not llm.ok


def test_the_file_of_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BOB_KEY", raising=False)
    file = tmp_path / "keys.yaml"
    auth = {"keys_file": str(file)}
    (missing,) = keys(auth)
    assert "No such file" in missing.text
    file.write_text("- {id: alice, sha256: my-secret}")
    (invalid,) = keys(auth)
    assert not invalid.ok
    assert "my-secret" not in str(invalid)
    file.write_bytes(b"\xff")
    assert not keys(auth)[0].ok
    file.write_text(f"- {{id: alice, sha256: {SHA256}}}\n- {{id: bob, secret_env: BOB_KEY}}")
    valid, bob = keys(auth)
    assert valid.text == f"auth.keys_file {file} has 2 keys"
    assert "BOB_KEY is not set" in bob.text
    *_, twice = keys(auth | {"api_keys": [{"id": "alice", "sha256": SHA256}]})
    assert "the same id" in twice.text


@pytest.mark.parametrize(("host", "faults"), [("127.0.0.1", 0), ("gpu-box", 1)])
def test_other_machines_need_keys(host: str, faults: int) -> None:
    assert len(keys({"open": True}, host=host)) == faults
    assert not keys({"open": True, "api_keys": [{"id": "alice", "sha256": SHA256}]}, host=host)
