"""Each application has its own place for jobs and files, and one goes on with that of version 0.1.0."""

import errno
import os
from pathlib import Path

import pytest

from serve_app import home
from serve_app.config import AppConfig
from serve_app.home import at_home

STAGE = {"device": "cpu"}
MODEL = {"name": "m", "family": "glm_image", "checkpoint": "tiny", "prior": STAGE, "decoder": STAGE}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(home, "ROOT", tmp_path)
    monkeypatch.setattr("serve_app.config.ROOT", tmp_path)
    return tmp_path


def places(application: str, **config: object) -> tuple[str, str]:
    made = at_home(
        AppConfig.model_validate({"models": [MODEL], "auth": {"open": True}} | config), application
    )
    return made.database.url, made.storage.url


def test_two_applications_do_not_share_their_jobs_and_files(root: Path) -> None:
    assert places("demo") == (f"sqlite:///{root}/demo/jobs.db", f"{root}/demo/files")
    assert places("tiny") == (f"sqlite:///{root}/tiny/jobs.db", f"{root}/tiny/files")


def test_a_place_may_name_the_application(root: Path) -> None:
    given = {"database": {"url": "postgresql://u@h/{name}"}, "storage": {"url": "s3://bucket/{name}"}}
    assert places("demo", **given) == ("postgresql://u@h/demo", "s3://bucket/demo")
    assert places("demo", database={"url": "sqlite:////jobs.db"}) == (
        "sqlite:////jobs.db",
        f"{root}/demo/files",
    )


def test_an_application_with_places_of_its_own_does_not_take_the_home_of_version_0_1_0(root: Path) -> None:
    (root / "jobs.db").write_bytes(b"")
    places("elsewhere", database={"url": "sqlite:////jobs.db"}, storage={"url": "/files"})
    assert places("demo") == (f"sqlite:///{root}/jobs.db", f"{root}/files")


def test_the_first_application_goes_on_with_the_home_of_version_0_1_0(root: Path) -> None:
    (root / "jobs.db").write_bytes(b"")
    inherited = (f"sqlite:///{root}/jobs.db", f"{root}/files")
    assert places("demo") == inherited
    assert places("tiny") == (f"sqlite:///{root}/tiny/jobs.db", f"{root}/tiny/files")
    assert places("demo") == inherited


def test_who_only_asks_claims_nothing(root: Path) -> None:
    (root / "jobs.db").write_bytes(b"")
    config = AppConfig.model_validate({"models": [MODEL], "auth": {"open": True}})
    inherited = f"sqlite:///{root}/jobs.db"
    assert at_home(config, "demo", claims=False).database.url == inherited
    assert {path.name for path in root.iterdir()} == {"jobs.db"}
    places("tiny")
    assert at_home(config, "demo", claims=False).database.url == f"sqlite:///{root}/demo/jobs.db"
    assert at_home(config, "tiny", claims=False).database.url == inherited


def test_a_claim_that_could_not_be_written_is_made_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (root / "jobs.db").write_bytes(b"")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            places("demo")
    assert {path.name for path in root.iterdir()} == {"jobs.db"}
    assert places("demo") == (f"sqlite:///{root}/jobs.db", f"{root}/files")
