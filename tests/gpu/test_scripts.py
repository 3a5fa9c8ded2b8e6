"""The scripts for a GPU run: tried on the CPU, at tiny sizes."""

import re
import subprocess
import sys

import pytest

from tests.conftest import needs_compiler

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize(
    ("script", "options"), [("prior", []), pytest.param("decoder", ["--steps", "2"], marks=needs_compiler)]
)
def test_it_runs(script: str, options: list[str]) -> None:
    command = [sys.executable, "-m", f"tests.gpu.{script}", "--device", "cpu", "--tiny", "--runs", "1"]
    done = subprocess.run([*command, "--side", "512", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "alone and in company: yes" in done.stdout


def test_the_whole_server() -> None:
    command = [sys.executable, "-m", "tests.gpu.server", "--device", "cpu", "--preset", "tiny"]
    done = subprocess.run(
        [*command, "--side", "512", "--steps", "60"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, warm, again = re.findall(
        r"^(?:first image|the same, (?:warm|cold again)).* (\w{12})$", done.stdout, re.M
    )
    killed, undisturbed = re.findall(
        r"^(?:a decoder killed|the same, undisturbed).* (\w{12})$", done.stdout, re.M
    )
    assert first == warm == again != killed == undisturbed
    assert "unloaded: nothing in use" in done.stdout
