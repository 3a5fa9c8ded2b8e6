"""A backup that is made while the server runs is restored elsewhere, by the commands of the page."""

import base64
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.jobs import store
from tests.http.conftest import ROOT, served
from tests.job_client import PATH, ended, submit
from tests.pictures import picture
from tests.polling import until
from tests.postgresql import program

PAGE = (ROOT / "docs/operate/backup.md").read_text()
BACK_UP, RESTORE, BACK_UP_REMOTE, RESTORE_REMOTE = re.findall(
    r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
)


def run(commands: str, folder: Path, **places: str) -> None:
    """Runs commands of the page in a folder, with their placeholders filled in."""
    for placeholder, place in (places | {"BACKUP": str(folder / "backup")}).items():
        commands = commands.replace(placeholder, place)
    subprocess.run(
        ["bash", "-ec", commands.replace(".venv/bin/python", sys.executable)], check=True, cwd=folder
    )


def submitted(http: httpx.Client, seed: int, steps: int) -> Any:
    return submit(http, seed=seed, num_inference_steps=steps)


def image_of(http: httpx.Client, job: Any) -> bytes:
    """Waits for a job, and returns its image."""
    name = ended(http, job)["result"]["data"][0]["url"].rpartition("/")[2]
    return http.get(f"/files/{name}").raise_for_status().content


@pytest.fixture
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The restored server waits for the end of the leases of the first one."""
    monkeypatch.setattr(store, "LEASE_S", 3)


@pytest.mark.usefixtures("_short_leases")
def test_jobs_and_files_are_as_at_the_backup(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with served(first, "glm-image") as server, server.client() as http:
        done = [submitted(http, seed, 1) for seed in range(3)]
        images = [image_of(http, job) for job in done]
        waiting = [submitted(http, seed, 100) for seed in range(3, 6)]
        run(BACK_UP, tmp_path, HOME_OF_SERVER=str(first))
        after = submitted(http, 6, 1)
        images += [image_of(http, job) for job in waiting]
    with served(second, "glm-image") as server, server.client() as http:
        lost = submitted(http, 7, 1)
    run(RESTORE, tmp_path, HOME_OF_SERVER=str(second))
    with served(second, "glm-image") as server, server.client() as http:
        states = [http.get(f"{PATH}/{job['id']}").json()["status"] for job in done]
        assert states == ["succeeded"] * 3
        assert [image_of(http, job) for job in [*done, *waiting]] == images
        for job in (after, lost):
            assert http.get(f"{PATH}/{job['id']}").status_code == 404


@pytest.mark.usefixtures("_short_leases")
def test_postgresql_and_s3_are_as_at_the_backup(
    tmp_path: Path,
    postgresql: Callable[[], str],
    s3: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3["endpoint_url"])
    monkeypatch.setenv("PATH", str(Path(program("pg_dump")).parent), prepend=os.pathsep)

    def place(name: str) -> dict[str, str]:
        return {"DATABASE": postgresql(), "STORAGE": f"s3://files/backup-{name}"}

    def kept(places: dict[str, str]) -> dict[str, Any]:
        return {"database": {"url": places["DATABASE"]}, "storage": {"url": places["STORAGE"]}}

    first, second = place("first"), place("second")
    with served(tmp_path, "glm-image", **kept(first)) as server, server.client() as http:
        done = [submitted(http, seed, 1) for seed in range(3)]
        images = [image_of(http, job) for job in done]
        waiting = submitted(http, 3, 100)
        run(BACK_UP_REMOTE, tmp_path, **first)
        images.append(image_of(http, waiting))
    run(RESTORE_REMOTE, tmp_path, **second)
    with served(tmp_path, "glm-image", **kept(second)) as server, server.client() as http:
        assert [image_of(http, job) for job in [*done, waiting]] == images


def test_results_that_the_file_store_lacks_are_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = f"data:image/png;base64,{base64.b64encode(picture((90, 90, 90))).decode()}"
    with served(tmp_path, "glm-image") as server, server.client() as http:
        kept, *lost = [submitted(http, seed, 1) for seed in range(4)]
        edited = submit(http, seed=4, images=[{"image_url": source}])
        images = [image_of(http, job) for job in (kept, *lost, edited)]
        urls = [ended(http, job)["result"]["data"][0]["url"] for job in (kept, *lost, edited)]
    files = [tmp_path / "files" / url.rpartition("/")[2] for url in urls]
    for file in files[1:]:
        file.unlink()
    with served(tmp_path, "glm-image") as server, server.client() as http:
        until(lambda: all(file.exists() for file in files[1:-1]), 30)
        assert [file.read_bytes() for file in files[:-1]] == images[:-1]
        assert ended(http, lost[0])["result"]["data"][0]["url"].endswith(files[1].name)
        assert not files[-1].exists(), "its source image is gone"
    assert "lacks results of 4 jobs; 3 of them are made again, the others cannot be" in caplog.text


def test_results_that_the_store_has_no_room_for_are_not_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tmp_path, "glm-image") as server, server.client() as http:
        jobs = [submitted(http, seed, 1) for seed in range(4)]
        names = [ended(http, job)["result"]["data"][0]["url"].rpartition("/")[2] for job in jobs]
    files = [tmp_path / "files" / name for name in names]
    room = sum(file.stat().st_size for file in files[1:])
    for file in files[:3]:
        file.unlink()
    storage = {"url": str(tmp_path / "files"), "max_bytes": room}
    with served(tmp_path, "glm-image", storage=storage) as server:
        until(lambda: "the results of 2 jobs are restored" in caplog.text, 30)
        assert [file.exists() for file in files] == [False, True, True, True]
        assert server.url
