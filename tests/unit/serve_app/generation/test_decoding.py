"""Images are decoded in a process whose death, silence or nonsense harms nothing else."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from deployments.families import FAMILIES
from serve_app.errors import InvalidParameter
from serve_app.generation import codec, decoding
from serve_app.generation.decoding import DecodingProcess
from tests.pictures import picture

FAMILY = FAMILIES["glm_image"]
LIMITS = (FAMILY, 2**20, 4096)


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def started(before: set[psutil.Process]) -> psutil.Process:
    """Returns the only process that was started since."""
    (found,) = children() - before
    return found


@pytest.fixture
def process() -> Iterator[DecodingProcess]:
    process = DecodingProcess()
    yield process
    process.close()


def test_an_image_is_the_same_as_without_the_process(process: DecodingProcess) -> None:
    for color in ("red", "blue"):
        data = picture(color, (600, 500))
        decoded = process.decode(data, *LIMITS)
        assert np.array_equal(decoded.pixels, codec.decode_source(data, *LIMITS))
        assert decoded.notes == []
    with pytest.raises(InvalidParameter, match="is not a PNG, JPEG or WebP image") as caught:
        process.decode(b"nothing", *LIMITS)
    assert (caught.value.param, caught.value.code) == ("sources", "invalid_image")


@pytest.mark.parametrize("sign", [signal.SIGSEGV, signal.SIGKILL])
def test_the_next_image_is_decoded_after_a_crash(process: DecodingProcess, sign: signal.Signals) -> None:
    before = children()
    assert process.decode(picture(), *LIMITS).pixels.shape == (512, 512, 3)
    crashed = started(before)
    crashed.send_signal(sign)
    crashed.wait(10)
    assert process.decode(picture(), *LIMITS).pixels.shape == (512, 512, 3)
    assert started(before) != crashed


READ = "import sys, time; sys.stdin.buffer.read(1); "
SHAPE = '{"shape": [512, 512], "notes": []}'


@pytest.mark.parametrize(
    "code",
    [
        READ + "import os; os.abort()",
        READ + "print('nonsense')",
        READ + "print('{}')",
        READ + "print('[]')",
        READ + 'print(\'{"shape": [9999, 512], "notes": []}\')',
        READ + f"print('{SHAPE}', 'too little')",
        READ + f"print('{SHAPE}')",
        READ + "print('x' * 10**6)",
        READ + "time.sleep(60)",
    ],
)
def test_an_image_that_breaks_the_process_is_rejected(
    process: DecodingProcess,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: str,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "COMMAND", [sys.executable, "-c", code])
        patched.setattr(decoding, "TIMEOUT_S", 1.0)
        with pytest.raises(InvalidParameter, match="cannot be decoded; save it anew"):
            process.decode(picture(), *LIMITS)
    assert "the process that decodes images has failed" in caplog.text
    assert process.decode(picture(), *LIMITS).pixels.shape == (512, 512, 3)


def test_the_process_has_no_secrets(process: DecodingProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    before = children()
    process.decode(picture(), *LIMITS)
    child = started(before)
    assert set(child.environ()) <= {"PYTHONPATH", "OPENBLAS_NUM_THREADS", "LC_CTYPE"}
    open_files = [str(one.readlink()) for one in Path(f"/proc/{child.pid}/fd").iterdir()]
    assert not [one for one in open_files if one.startswith("socket:")]
