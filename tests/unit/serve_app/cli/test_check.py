"""The command `check`: its plans of the shipped configurations, its advice, and its exit status."""

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli import gpus, main
from serve_app.cli.gpus import GPU
from tests.unit.serve_app.cli.files import ARGS, ROOT, changed

README = (ROOT / "README.md").read_text()
WORKSTATION = (ROOT / "docs/operate/workstation.md").read_text()

Command = Callable[..., tuple[object, str, str]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command; returns its exit status, with standard output and standard error."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpus, "visible", list[GPU])

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["glm-image-server", "check", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        if isinstance(ended.value.code, str):  # Python prints it and exits with 1
            return 1, out, f"{err}{ended.value.code}\n"
        return ended.value.code or 0, out, err

    return run


def on(*names: str) -> list[str]:
    return [argument for name in names for argument in ("--gpu", name)]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """Writes configs/one-gpu.yaml with other values, by dotted path below `args`; returns its path."""

    def write_it(changes: dict[str, Any]) -> str:
        return str(changed(tmp_path, {f"{ARGS}.{k}": v for k, v in changes.items()}, "one-gpu"))

    return write_it


# The shipped configurations

CARDS = {
    "cluster": ["a100-40"],  # more come on demand
    "cluster-tiny": [],
    "demo": [],
    "eight-gpus": ["a100-40"] * 8,
    "one-gpu": ["a100-80"],
    "tiny": [],
    "tiny-both": [],
    "tiny-helpers": [],
    "two-gpus": ["a100-40"] * 2,
    "two-small-gpus": ["3090", "l4"],
    "workstation": ["a100-40"] * 2,
    "z-image-turbo": ["a100-40"],
}
"""The GPUs for which each configuration is, by its comments and the README."""


def test_every_configuration_is_checked() -> None:
    assert set(CARDS) == {file.stem for file in (ROOT / "configs").glob("*.yaml")} - {"kustomization"}


@pytest.mark.parametrize("name", CARDS)
def test_a_shipped_configuration_fits_its_gpus(check: Command, name: str) -> None:
    status, out, err = check(f"configs/{name}.yaml", *on(*CARDS[name]))
    assert (status, err) == (0, "")
    assert out.startswith(f"configs/{name}.yaml: valid.\n")
    assert ("On the CPU: " in out) == (not CARDS[name])
    assert out.count(": fits, ") == {"cluster": 9}.get(name, len(CARDS[name]))
    assert "copied for each image" not in out


@pytest.mark.parametrize(
    ("name", "cards"),
    [
        ("one-gpu", ["l40s"]),
        ("two-gpus", ["4090", "4090"]),
        ("two-small-gpus", ["16", "16"]),
        ("z-image-turbo", ["24"]),
        ("two-gpus", ["h200"]),
        ("eight-gpus", ["h100"] * 7),
    ],
)
def test_smaller_or_fewer_gpus_are_too_small(check: Command, name: str, cards: list[str]) -> None:
    status, _, err = check(f"configs/{name}.yaml", *on(*cards))
    assert status == 1
    assert "does not fit" in err or "asks for" in err


@pytest.mark.parametrize("row", re.findall(r"^\| .* \| `(configs/\S+)` \| (.* GB) \|", README, re.MULTILINE))
def test_the_readmes_table_has_the_planned_memory(check: Command, row: tuple[str, str]) -> None:
    file, shown = row
    _, out, _ = check(file, *on(*CARDS[Path(file).stem]))
    gpus = [
        sum(
            float(size) for size in re.findall(r"^  \S+ (?:prior|decoder).*?: ([\d.]+) GB", gpu, re.MULTILINE)
        )
        for gpu in out.split("\nGPU ")[1:]
    ]
    runs = [(f"{size:.1f} GB", len(list(same))) for size, same in itertools.groupby(gpus)]
    assert shown == ", ".join(f"{number} × {size}" if number > 1 else size for size, number in runs)


def test_the_readmes_table_lists_the_configurations_for_gpus() -> None:
    listed = re.findall(r"^\| .* \| `configs/(\S+)\.yaml` \|", README, re.MULTILINE)
    assert set(listed) == {name for name, cards in CARDS.items() if cards} - {"cluster", "workstation"} | {
        "demo"
    }


def test_the_example_of_the_manual_is_real(check: Command) -> None:
    (block,) = re.findall(
        r"^```console\n\$ \S*glm-image-server check (.*?)\n(.*?)^```$", WORKSTATION, re.M | re.S
    )
    arguments, shown = block
    _, out, err = check(*arguments.split())
    assert out + err == shown


# Advice


def apply(advice: str) -> dict[str, Any]:
    """Returns the settings of a line of advice, by their path below `args`."""
    settings = re.findall(r"(prior|decoder)\.([\w.]+): (\w+)", advice)
    return {f"models.0.{part}.{key}": yaml.safe_load(value) for part, key, value in settings}


@pytest.mark.parametrize(
    ("share", "cards"),
    [(1, ["4090", "4090"]), (0.5, ["l40s"]), (0.5, ["40"]), (1, ["24", "14"])],
)
def test_the_advice_helps(
    check: Command, written: Callable[..., str], share: float, cards: list[str]
) -> None:
    base = {
        f"models.0.{part}.deployment": {"ray_actor_options": {"num_gpus": share}}
        for part in ("prior", "decoder")
    }
    status, out, _ = check(written(base), *on(*cards))
    assert status == 1
    too_small = out.count("does not fit")
    advice = re.findall(r"^  - (.*: .*)$", out, re.MULTILINE)
    assert advice
    for line in advice:
        if "num_gpus" not in line:
            _, out, _ = check(written(base | apply(line)), *on(*cards))
            assert out.count("does not fit") == too_small - 1, line


def test_a_larger_gpu_helps(check: Command) -> None:
    _, out, _ = check("configs/one-gpu.yaml", *on("l40s"))
    (gigabytes,) = re.findall(r"- a GPU of (\d+) GB or more", out)
    assert check("configs/one-gpu.yaml", *on(gigabytes))[0] == 0
    assert check("configs/one-gpu.yaml", *on(str(int(gigabytes) - 1)))[0] == 1


def test_slow_offloading_is_said_with_its_remedy(check: Command, written: Callable[..., str]) -> None:
    status, out, _ = check("configs/two-gpus.yaml", *on("h100", "4090"))
    assert status == 0
    assert "offload: model)" in out
    assert "which takes seconds. decoder.acceleration.vae_tiling: true avoids it." in out
    config = written({"models.0.decoder.deployment": {"ray_actor_options": {"num_gpus": 1}}})
    _, out, _ = check(config, *on("h100", "19"))
    assert "which takes seconds.\n" in out  # tiles would not be enough


def test_automatic_offloading_does_not_count_on_a_shared_gpu(check: Command) -> None:
    _, out, _ = check("configs/one-gpu.yaml", *on("24"))
    assert (
        "  glm-image decoder: 31.4 GB (15.1 weights as released + 15.5 work for 2048x2048 + 0.8 CUDA)\n"
        in out
    )


def test_the_number_of_source_images_is_said(check: Command) -> None:
    _, out, _ = check("configs/two-small-gpus.yaml", *on("4090", "4090"))
    assert "An edit has memory for these source images: 0 of 2048x2048 or 3 of 1024x1024." in out
    _, out, _ = check("configs/eight-gpus.yaml", *on(*["a100-40"] * 8))
    assert out.count("2 of 2048x2048 or 4 of 1024x1024") == 1  # not once for each decoder
    _, out, _ = check("configs/two-gpus.yaml", *on("h100", "h100"))
    assert "source images" not in out


def test_gpus_of_several_kinds_get_a_warning(check: Command) -> None:
    assert "Ray may choose other GPUs" in check("configs/one-gpu.yaml", *on("h100", "4090"))[1]
    assert "Ray may choose other GPUs" not in check("configs/two-gpus.yaml", *on("h100", "h100"))[1]


def test_unknown_sizes_are_said_to_be_unknown(check: Command, written: Callable[..., str]) -> None:
    gpu = {"ray_actor_options": {"num_gpus": 0.2}}
    changes = {
        "models.0.prior.deployment": {"ray_actor_options": {"num_gpus": 0.4}},
        "models.0.decoder.deployment": {"ray_actor_options": {"num_gpus": 0.4}},
        "prompt_expander": {"chat_model": {"checkpoint": "some/model", "deployment": gpu}},
        "safety_checker": {},
    }
    status, out, _ = check(written(changes), *on("h100"))
    assert status == 0
    assert "On the CPU: safety checker.\n" in out
    assert "fits, 23.8 GB left for prompt expander.\n" in out
    assert "  prompt expander: the size of some/model is not known here\n" in out


def test_the_replicas_of_a_stage_are_listed(check: Command, written: Callable[..., str]) -> None:
    _, out, _ = check(written({"models.0.decoder.max_replicas": 3}), *on("h100", "h100"))
    assert re.findall(r"^  (.*?): ", out, re.MULTILINE) == [
        "glm-image prior",
        "glm-image decoder 1",
        "glm-image decoder 2",
        "glm-image decoder 3",
    ]


# This machine


def test_a_machine_without_gpus_gets_the_needs_of_each_stage(check: Command) -> None:
    status, out, err = check("configs/two-gpus.yaml")
    assert status == 1
    assert "This machine has no NVIDIA GPU. Name cards with --gpu. A replica needs:\n" in out
    assert "  glm-image prior: 29.7 GB (" in out
    assert "  glm-image decoder: 31.4 GB (" in out
    assert err.startswith("The configuration asks for 2 GPUs, and there are 0.")
    assert check("configs/cluster.yaml")[0] == 0  # its nodes come on demand


def test_the_gpus_of_this_machine_are_planned(check: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = GPU("0", "GPU-1a", "NVIDIA H100 80GB HBM3", 85_520_809_984, 60 * 10**9, "580.65")
    monkeypatch.setattr(gpus, "visible", lambda: [mine])
    status, out, _ = check("configs/one-gpu.yaml")
    assert status == 0
    assert (
        "GPU 0 (NVIDIA H100 80GB HBM3, 84.8 GB usable, 24.8 GB of it in use now): fits, 23.8 GB left." in out
    )


@pytest.mark.parametrize("present", [None, [GPU("0", "GPU-1a", "NVIDIA GB10", 0, 0, "580.65")]])
def test_unknown_gpus_are_no_error(
    check: Command, monkeypatch: pytest.MonkeyPatch, present: list[GPU] | None
) -> None:
    monkeypatch.setattr(gpus, "visible", lambda: present)
    status, out, _ = check("configs/one-gpu.yaml")
    assert status == 0
    assert "This machine does not say which GPUs it has." in out


# Problems


def test_an_invalid_file_is_a_problem(check: Command, written: Callable[..., str]) -> None:
    path = written({"limits.max_image": 2, "limits.max_steps": 0})
    status, out, err = check(path)
    assert (status, out) == (1, "")
    assert err.startswith(f"{path}: not valid:\n")
    assert "did you mean `max_images`?" in err
    assert len(err.splitlines()) == 3
    assert check("nowhere.yaml")[0] == 1


def test_an_old_key_gets_a_warning(check: Command, written: Callable[..., str]) -> None:
    path = written({"models.0.prior.rows": 2})
    status, _, err = check(path, *on("h100"))
    assert status == 0
    assert err == f"WARNING {path}: prior.rows is now prior.max_batch_size; rename it\n"


def test_an_incomplete_checkpoint_is_a_problem(
    check: Command, written: Callable[..., str], tmp_path: Path
) -> None:
    path = written({"models.0.checkpoint": str(tmp_path)})
    status, _, err = check(path, *on("h100"))
    assert status == 1
    assert (
        err
        == f"{path}: {tmp_path}/vision_language_encoder has no *.safetensors; download the checkpoint again\n"
    )


def test_a_gpu_whose_shares_are_reserved_is_a_problem(check: Command, written: Callable[..., str]) -> None:
    options = {"deployment": {"ray_actor_options": {"num_gpus": 0.6}}}
    changes = {"models.0.prior": options, "models.0.decoder": {**options, "max_replicas": 2}}
    status, _, err = check(written(changes), *on("h100", "h100"))
    assert (status, err) == (1, "No GPU has a share left for: glm-image decoder. Name more with --gpu.\n")


def test_a_replica_computes_on_one_gpu(check: Command, written: Callable[..., str]) -> None:
    path = written({"models.0.prior.deployment": {"ray_actor_options": {"num_gpus": 2}}})
    _, out, _ = check(path, *on("h100", "h100", "h100"))
    assert (
        "GPU 1 (H100 80 GB, 84.8 GB usable): reserved, but not used: a replica computes on one GPU.\n" in out
    )


def test_an_unknown_card_is_an_error_of_the_command_line(check: Command) -> None:
    status, _, err = check("configs/one-gpu.yaml", *on("h1000"))
    assert status == 2
    assert "unknown GPU 'h1000'; did you mean h100?" in err


def test_the_help_lists_the_cards(check: Command) -> None:
    status, out, _ = check("--help")
    assert status == 0
    words = " ".join(out.split())
    assert "The exit status is 0 if it fits and 1 if it is not valid or does not fit." in words
    assert "(3090, 4090, 5090, a6000, 6000-ada, pro-6000, l4," in words


def test_neither_torch_nor_ray_is_loaded() -> None:
    program = (
        "import sys; from serve_app import cli\n"
        "sys.argv = ['', 'check', 'configs/one-gpu.yaml', '--gpu', 'h100']\n"
        "try: cli.main()\n"
        "finally: print({'torch', 'ray', 'transformers', 'diffusers'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert "fits" in done.stdout
    assert done.stdout.endswith("set()\n")
