"""A backup that is made while the server runs is restored elsewhere, by the commands of the page."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.jobs.restoring import MARGIN_S
from tests.http.conftest import ROOT, served
from tests.job_client import PATH, ended, submit
from tests.pictures import picture
from tests.polling import until

PAGE = (ROOT / "docs/operate/backup.md").read_text()
BACK_UP, RESTORE = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(commands: str, home: Path, backup: Path) -> None:
    commands = commands.replace("HOME_OF_SERVER", str(home)).replace("BACKUP", str(backup))
    subprocess.run(
        ["bash", "-ec", commands.replace(".venv/bin/python", sys.executable)], check=True, cwd=home.parent
    )


def submitted(http: httpx.Client, seed: int, steps: int) -> Any:
    return submit(http, seed=seed, num_inference_steps=steps)


def image_of(http: httpx.Client, job: Any) -> bytes:
    """Waits for a job, and returns its image."""
    name = ended(http, job)["result"]["data"][0]["url"].rpartition("/")[2]
    return http.get(f"/files/{name}").raise_for_status().content


def test_jobs_and_files_are_as_at_the_backup(tmp_path: Path) -> None:
    first, second, backup = tmp_path / "first", tmp_path / "second", tmp_path / "backup"
    with served(first, "glm-image") as server, server.client() as http:
        done = [submitted(http, seed, 1) for seed in range(3)]
        images = [image_of(http, job) for job in done]
        waiting = [submitted(http, seed, 100) for seed in range(3, 6)]
        run(BACK_UP, first, backup)
        after = submitted(http, 6, 1)
        images += [image_of(http, job) for job in waiting]
    with served(second, "glm-image") as server, server.client() as http:
        lost = submitted(http, 7, 1)
    run(RESTORE, second, backup)
    with served(second, "glm-image") as server, server.client() as http:
        states = [http.get(f"{PATH}/{job['id']}").json()["status"] for job in done]
        assert states == ["succeeded"] * 3
        assert [image_of(http, job) for job in [*done, *waiting]] == images
        for job in (after, lost):
            assert http.get(f"{PATH}/{job['id']}").status_code == 404


def age(file: Path, seconds: float) -> None:
    """Makes a file look as if it had been written that long ago."""
    written = file.stat().st_mtime - seconds
    os.utime(file, (written, written))


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
    age(files[0], 2 * MARGIN_S)  # the store deletes the oldest files first, so younger ones are lost
    for file in files[1:]:
        file.unlink()
    with served(tmp_path, "glm-image") as server, server.client() as http:
        until(lambda: all(file.exists() for file in files[1:-1]), 30)
        assert [file.read_bytes() for file in files[:-1]] == images[:-1]
        assert ended(http, lost[0])["result"]["data"][0]["url"].endswith(files[1].name)
        assert not files[-1].exists(), "its source image is gone"
    assert "lacks results of 4 jobs; 3 of them are made again, the others cannot be" in caplog.text


def test_results_that_the_store_deleted_for_their_age_are_not_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tmp_path, "glm-image") as server, server.client() as http:
        old, new = (submitted(http, seed, 1) for seed in range(2))
        names = [ended(http, job)["result"]["data"][0]["url"].rpartition("/")[2] for job in (old, new)]
    (tmp_path / "files" / names[0]).unlink()
    with served(tmp_path, "glm-image") as server, server.client() as http:
        assert image_of(http, submitted(http, 2, 1))
        assert http.get(f"/files/{names[0]}").status_code == 404
    assert "lacks results" not in caplog.text
