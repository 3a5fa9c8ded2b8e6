"""The tiny checkpoint: deterministic, small, and written once even by several processes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import GlmImagePipeline

from deployments.config import ModelConfig
from deployments.families.glm_image import checkpoint, tiny

COMMAND = [sys.executable, "-m", "serve_app", "checkpoint", "tiny", "glm_image"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_it_is_small_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        tiny.write(tmp_path / name)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    assert sum(map(len, one.values())) < 10e6


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    tiny.write(tmp_path / "one")
    tiny.write(tmp_path / "two", tiny.Sizes(seed=1))
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert contents(tmp_path / "one")[name] != contents(tmp_path / "two")[name]


@pytest.mark.slow
def test_two_processes_may_write_it_at_once(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from deployments.families.glm_image import tiny; "
        "tiny.write(pathlib.Path(sys.argv[1]))"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path / "x"], stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    tiny.write(tmp_path / "alone")
    assert contents(tmp_path / "x") == contents(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "x"]


def test_a_folder_that_is_not_a_checkpoint_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(FileExistsError, match="not a checkpoint"):
        tiny.write(tmp_path / "x")
    assert contents(tmp_path / "x") == {"thesis.txt": b"irreplaceable"}


def test_the_command_writes_the_requested_sizes(
    tmp_path: Path, model_config: Callable[..., ModelConfig]
) -> None:
    folder = tmp_path / "x"
    options = ["--preset", "benchmark", "--prior-layers", "2", "--decoder-layers", "1", "--codebook", "128"]
    run = subprocess.run([*COMMAND, folder, *options], check=True, capture_output=True, text=True)
    assert str(folder) in run.stdout
    config = model_config(folder)
    prior, _ = checkpoint.load_prior(config)
    assert prior.config.text_config.num_hidden_layers == 2
    assert prior.config.text_config.hidden_size == tiny.BENCHMARK.prior_width
    assert checkpoint.load_decoder(config).transformer.config.num_layers == 1


@pytest.fixture
def rejection(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Function that runs the command in this process and returns the error with which it ends."""

    def rejection(*arguments: str | Path) -> str:
        with pytest.raises(SystemExit, match="2"):
            tiny.CHECKPOINT.main("tiny", list(map(str, arguments)))
        return capsys.readouterr().err

    return rejection


def test_the_command_overwrites_nothing(tmp_path: Path, rejection: Callable[..., str]) -> None:
    assert "exists already" in rejection(tmp_path)


@pytest.mark.parametrize("options", [["--prior-width", "65"], ["--codebook", "0"]])
def test_the_command_rejects_impossible_sizes(
    tmp_path: Path, rejection: Callable[..., str], options: list[str]
) -> None:
    assert "must be" in rejection(tmp_path / "x", *options)
    assert not (tmp_path / "x").exists()


def test_the_benchmark_preset_has_the_size_that_timings_need() -> None:
    pipeline = tiny.pipeline(tiny.BENCHMARK)
    parameters = sum(
        weight.numel()
        for part in (pipeline.vision_language_encoder, pipeline.transformer)
        for weight in part.parameters()
    )
    assert 30e6 <= parameters <= 60e6


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_half(_: object, folder: Path, **__: object) -> None:
        (folder / "model_index.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(GlmImagePipeline, "save_pretrained", save_half)
    with pytest.raises(OSError, match="disk full"):
        tiny.write(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
