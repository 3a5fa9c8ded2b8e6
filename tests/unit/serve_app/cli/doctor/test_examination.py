"""The command `doctor`: its lines, its exit status, and what it does not show."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from serve_app import cli
from serve_app.cli.doctor import machine
from serve_app.cli.doctor.findings import fine
from tests.unit.serve_app.cli.files import ARGS, changed

SECRETS = ("database-secret", "store-secret", "key-secret", "expander-secret")


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with enough memory and disks."""
    for name in ("memory", "disks"):
        monkeypatch.setattr(machine, name, lambda name=name: [fine(name)])


def config(folder: Path, **changes: Any) -> Path:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    places = {
        f"{ARGS}.database.url": f"sqlite:///{folder}/jobs.db",
        f"{ARGS}.storage.url": f"{folder}/files",
        "http_options.port": port,
    }
    return changed(folder, places | changes)


def doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, list[str]]:
    """Runs the command; returns its exit status and its lines."""
    monkeypatch.setattr(sys, "argv", ["glm-image-server", "doctor", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out.splitlines()


def test_a_configuration_that_can_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = doctor(monkeypatch, capsys, config(tmp_path), "--hashes")
    assert all(line.startswith("ok  ") for line in lines), lines
    assert status == 0
    text = "\n".join(lines)
    for item in ("Python", "ray 2", "memory", "disks", "is valid", "GPU", "torch is", "address", "database"):
        assert item in text
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}


def test_without_a_file_only_the_machine_is_examined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines = doctor(monkeypatch, capsys)
    assert "ok  memory" in lines
    assert not any("database" in line or "address" in line for line in lines)


def test_a_file_with_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, **{f"{ARGS}.limits.max_image": 1, "http_options.port": "high"})
    status, lines = doctor(monkeypatch, capsys, file)
    assert status == 1
    problems = [line for line in lines if line.startswith("!!  ")]
    assert len(problems) == 2
    assert all(line.endswith(": correct the file") for line in problems)
    assert not any("database" in line for line in lines)


def test_an_old_key_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, **{f"{ARGS}.models.0.prior.rows": 2})
    status, lines = doctor(monkeypatch, capsys, file)
    assert f"ok  {file}: prior.rows is now prior.max_batch_size; rename it" in lines
    assert status == 0


def test_everything_is_broken_and_nothing_secret_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALICE_KEY", "key-secret")
    monkeypatch.delenv("LLM_KEY", raising=False)
    file = config(
        tmp_path,
        **{
            f"{ARGS}.database.url": "postgresql://alice:database-secret@127.0.0.1:1/jobs",
            f"{ARGS}.storage.url": "s3://bucket/files",
            f"{ARGS}.storage.options": {
                "key": "store",
                "secret": "store-secret",
                "endpoint_url": "http://alice:store-secret@127.0.0.1:1",
            },
            f"{ARGS}.auth.api_keys": [{"id": "alice", "secret_env": "ALICE_KEY"}],
            f"{ARGS}.models.0.checkpoint": "/models/nowhere",
            f"{ARGS}.prompt_expander.endpoint": {
                "base_url": "https://alice:expander-secret@llm.example.com/v1",
                "model": "x",
                "key_env": "LLM_KEY",
            },
            "http_options.ssl_certfile": str(tmp_path / "nowhere"),
            "http_options.ssl_keyfile": str(tmp_path / "nowhere"),
        },
    )
    status, lines = doctor(monkeypatch, capsys, file)
    assert status == 1
    problems = [line for line in lines if line.startswith("!!  ")]
    for item in ("database", "files", "certificate", "LLM_KEY", "/models/nowhere"):
        assert any(item in line for line in problems), item
    assert not [secret for secret in SECRETS if secret in "\n".join(lines)]


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = doctor(monkeypatch, capsys, "--help")
    assert status == 0
    assert "[FILE]" in lines[0]
    assert any("--hashes" in line for line in lines)
