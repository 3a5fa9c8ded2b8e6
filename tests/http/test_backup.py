"""A backup that is made while the server runs is restored elsewhere, by the commands of the page."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.http.conftest import ROOT, served
from tests.job_client import PATH, ended, submit

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
