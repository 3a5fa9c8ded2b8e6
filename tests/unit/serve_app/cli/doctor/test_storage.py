"""The places of jobs and files: whether they can be used, without changing anything there."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli.config_file import ServeApplication
from serve_app.cli.doctor import storage
from serve_app.cli.doctor.findings import Finding
from serve_app.jobs.database import Database

STAGE = {"device": "cpu"}
MODEL = {"name": "m", "family": "glm_image", "checkpoint": "tiny", "prior": STAGE, "decoder": STAGE}
NOBODY = 65534


def application(**places: Any) -> ServeApplication:
    # No place is in the home folder, which another user may not read.
    elsewhere = {"database": {"url": "sqlite:////x/jobs.db"}, "storage": {"url": "/x/files"}}
    args = {"models": [MODEL], "auth": {"open": True}} | elsewhere | places
    return ServeApplication.model_validate(
        {"name": "m", "import_path": "serve_app.app:build_app", "args": args}
    )


def database(url: str) -> list[Finding]:
    return list(storage.database(application(database={"url": url})))


def files(url: str, **options: Any) -> Finding:
    (finding,) = storage.files(application(storage={"url": url} | options))
    return finding


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A folder that this process may not write to. Root may write to any, so it becomes another user."""
    folder = Path(tempfile.mkdtemp())  # not in pytest's folder, which other users cannot enter
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    yield folder
    os.seteuid(user)
    shutil.rmtree(folder)


def test_places_that_do_not_exist_can_be_made_and_are_not(tmp_path: Path) -> None:
    (finding,) = database(f"sqlite:///{tmp_path}/new/jobs.db")
    assert finding.ok
    assert "does not exist yet, and can be made" in finding.text
    assert files(f"{tmp_path}/new/files").ok
    assert not list(tmp_path.iterdir())


def test_places_that_exist_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    Database(f"sqlite:///{tmp_path}/jobs.db").close()
    before = sorted(tmp_path.rglob("*"))
    (finding,) = database(f"sqlite:///{tmp_path}/jobs.db")
    assert finding.ok
    assert files(f"{tmp_path}/files").ok
    assert sorted(tmp_path.rglob("*")) == before


def test_a_database_of_a_running_server_is_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    running = Database(url, "demo, in the Ray cluster at 1.2.3.4:5")
    try:
        finding = database(url)[-1]
        assert not finding.ok
        assert "is in use by the server demo, in the Ray cluster at 1.2.3.4:5" in finding.text
    finally:
        running.close()
    assert all(finding.ok for finding in database(url))
    Database(url, "another").close()  # which the examination has left free


def test_a_file_that_is_no_database_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "jobs.db").write_bytes(b"something else entirely")
    (finding,) = database(f"sqlite:///{tmp_path}/jobs.db")
    assert "is no SQLite file" in finding.text


def test_an_unwritable_folder_is_a_fault(unwritable: Path) -> None:
    for finding in (
        *database(f"sqlite:///{unwritable}/jobs.db"),
        *database(f"sqlite:///{unwritable}/new/jobs.db"),
        files(str(unwritable)),
        files(f"{unwritable}/new"),
    ):
        assert not finding.ok, finding
        assert str(unwritable) in finding.text


def test_a_database_of_another_user_is_a_fault(unwritable: Path) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())
    unwritable.chmod(0o777)
    (unwritable / "jobs.db-wal").touch(0o444)
    os.seteuid(user)
    (finding,) = database(f"sqlite:///{unwritable}/jobs.db")
    assert finding.text == f"database {unwritable}/jobs.db-wal is not writable"


def test_a_folder_below_a_file_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert files(f"{tmp_path}/file/files").text.endswith(f"{tmp_path}/file is no folder")


def test_a_full_disk_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "min_free_bytes" in files(str(tmp_path), min_free_bytes=10**18).text
    monkeypatch.setattr(storage, "free", lambda _: 1000)
    (finding,) = database(f"sqlite:///{tmp_path}/jobs.db")
    assert "1.0 KB free" in finding.text
    assert not finding.ok


def test_a_postgresql_that_cannot_be_reached_is_a_fault() -> None:
    began = time.monotonic()
    (finding,) = database("postgresql://alice:my-secret@127.0.0.1:1/jobs?application_name=my-secret")
    assert time.monotonic() - began < 10
    assert not finding.ok
    assert finding.text.startswith("database postgresql://127.0.0.1:1/jobs: connection")
    assert "my-secret" not in str(finding)


def test_a_url_that_cannot_be_read_is_not_shown() -> None:
    with pytest.raises(ValueError, match="not a URL") as error:
        database("postgresql://alice:my-secret@h:port/jobs")
    assert "my-secret" not in str(error.value)


def test_a_postgresql_answers(postgresql: Callable[[], str]) -> None:
    (finding,) = database(postgresql())
    assert finding.ok, finding
    assert "PostgreSQL" in finding.text


def test_an_object_store_answers_or_not(s3: dict[str, Any]) -> None:
    for url in ("s3://files", "s3://files/no-files-yet"):
        assert files(url, options=s3).ok, url
    finding = files("s3://no-bucket/files", options=s3)
    assert not finding.ok
    assert "bucket does not exist" in finding.text


def test_an_unknown_store_is_a_fault() -> None:
    with pytest.raises(ValueError, match="Protocol not known"):
        files("nothing://bucket")
