"""Settings of the compiler: deterministic, cached, and with the container's number of CPUs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from deployments.engines import compilation

THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
CACHE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def compiler_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(THREADS, raising=False)
    monkeypatch.delenv(CACHE, raising=False)
    with (
        torch._inductor.config.patch(compile_threads=8),
        torch._dynamo.config.patch(recompile_limit=8),
    ):
        yield
        os.environ.pop(CACHE, None)


def test_compiled_code_is_kept_in_the_configured_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache_dir()  # the compiler calls this when it is imported
    compilation.prepare("~/compiled")
    assert Path(cache_dir()) == tmp_path / "compiled"


def test_the_environment_takes_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setenv(THREADS, "5")
    monkeypatch.setattr(compilation, "cpu_limit", lambda: 3)
    compilation.prepare("elsewhere")
    assert os.environ[CACHE] == str(tmp_path)
    assert torch._inductor.config.compile_threads == 8  # torch read the environment when it was imported


@pytest.mark.parametrize(("cpus", "threads"), [(3, 3), (64, 8)])
def test_there_are_no_more_compile_threads_than_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpus: int, threads: int
) -> None:
    monkeypatch.setattr(compilation, "cpu_limit", lambda: cpus)
    compilation.prepare(str(tmp_path))
    assert torch._inductor.config.compile_threads == threads


@pytest.mark.parametrize(("capability", "launches_early"), [((8, 0), False), ((9, 0), True), ((12, 0), True)])
def test_every_compilation_is_deterministic(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, launches_early: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    options = compilation.options(torch.device("cuda"))
    assert options["deterministic"] is True
    assert options.get("triton.enable_pdl", False) is launches_early
    assert "triton.enable_pdl" not in compilation.options(torch.device("cpu"))


def test_torch_knows_every_option() -> None:
    names = torch._inductor.list_options()
    assert {*compilation.options(torch.device("cpu")), "triton.enable_pdl"} <= set(names)
