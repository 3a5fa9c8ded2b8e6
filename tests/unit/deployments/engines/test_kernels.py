"""Code that torch's compiler generates for an H100. If no kernel has a choice, all replicas round alike."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is missing"),
]
PERFORMANCE = (Path(__file__).parents[4] / "docs/explained/performance.md").read_text()
OURS = (
    "prior-decode",
    "prior-decode-one",
    "prior-prefill",
    "dit-image",
    "dit-text",
    "dit-source",
    "dit-edit",
    "vae",
)
UPSTREAMS = "upstream-dit-compiled"

Codes = dict[str, list[dict[str, Any]]]


def generate(*parts: str, without: str = "") -> Codes:
    """Returns the generated code of each part. It runs in its own process, which keeps torch patched."""
    command = [sys.executable, "-m", "tests.benchmarks.kernels", "--json"]
    command += [f"--part={part}" for part in parts]
    command += [f"--without={without}"] if without else []
    folder = Path(__file__).parents[4]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    codes: Codes = {part: [] for part in parts}
    for line in done.stdout.splitlines():
        code = json.loads(line)
        codes[code["part"]].append(code)
    return codes


def chosen_by_timing(codes: Codes) -> list[str]:
    """Returns the kernels with several configurations."""
    return [
        f"{part}, {code['name']}: {launch['name']}"
        for part in codes
        for code in codes[part]
        for launch in code["launches"]
        if (launch["configurations"] or 1) > 1
    ]


def counts(codes: list[dict[str, Any]]) -> tuple[int, int, int, str]:
    """Counts the kernels of a pass.

    Returns:
        The numbers of generated kernels, attentions and products, and the gigabytes that generated ones move.
    """
    launched, moved = Counter[str](), 0
    for code in codes:
        for launch in code["launches"]:
            is_generated = launch["configurations"] is not None and launch["kind"] != "attention"
            launched["generated" if is_generated else launch["kind"]] += code["calls"]
            moved += code["calls"] * launch["moved"] if is_generated and launch["moved"] else 0
    return launched["generated"], launched["attention"], launched["product"], f"{moved / 1e9:.3g}"


@pytest.fixture(scope="module")
def codes() -> Codes:
    return generate(*OURS, UPSTREAMS)


def test_replicas_run_the_same_kernels(codes: Codes) -> None:
    ours = {part: codes[part] for part in OURS}
    assert all(ours.values())
    assert chosen_by_timing(ours) == []
    kinds = {launch["kind"] for part in ours.values() for code in part for launch in code["launches"]}
    assert kinds >= {"pointwise", "reduction", "attention", "product"}


def test_replicas_of_upstreams_model_might_not(codes: Codes) -> None:
    assert chosen_by_timing({UPSTREAMS: codes[UPSTREAMS]})


@pytest.mark.parametrize("option", ["deterministic", "triton.autotune_pointwise"])
def test_without_an_option_replicas_might_not(option: str) -> None:
    assert chosen_by_timing(generate("dit-image", without=option))


def test_layers_share_their_code(codes: Codes) -> None:
    for part in OURS:
        most = max(code["calls"] for code in codes[part])
        assert most == {"prior": 40, "dit": 30, "vae": 8}[part.partition("-")[0]]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("prior stage, 8 tokens of each of 8 requests, drawing included", "prior-decode"),
        ("prior stage, one token of each of 8 requests, drawing included", "prior-decode-one"),
        ("prior stage, a slice of 128 tokens of a prompt", "prior-prefill"),
        ("DiT, upstream's blocks compiled", UPSTREAMS),
        ("DiT, here", "dit-image"),
        ("DiT, here, with a source image", "dit-edit"),
    ],
)
def test_the_readme_has_these_figures(codes: Codes, row: str, part: str) -> None:
    generated, attentions, products, gigabytes = counts(codes[part])
    (line,) = [line for line in PERFORMANCE.splitlines() if line.startswith(f"| {row} |")]
    said = [cell.strip() for cell in line.strip("|").split("|")[1:]]
    assert said[:3] == [str(generated), str(attentions), str(products)]
    assert float(said[3]) == pytest.approx(float(gigabytes), rel=0.05)
