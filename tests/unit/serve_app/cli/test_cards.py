"""GPUs by name, as a user may write them."""

import argparse

import pytest

from serve_app.cli import cards
from serve_app.cli.gpus import GPU
from tests.gpu.table import FIGURES, Figures


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("H100", "H100 80 GB"),
        ("a100-80gb", "A100 80 GB"),
        ("A100 40 GB", "A100 40 GB"),
        ("RTX 6000 Ada", "RTX 6000 Ada"),
        ("RTX PRO 6000", "RTX PRO 6000 Blackwell"),
        ("80", "80 GB"),
        ("80gb", "80 GB"),
        ("47.5 GB", "47.5 GB"),
    ],
)
def test_a_card_has_its_usual_names(text: str, name: str) -> None:
    assert cards.named(text).name == name


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("h1000", "unknown GPU 'h1000'; did you mean h100? Known: 3090, 4090"),
        ("L40", "did you mean l40s?"),
        ("radeon", "unknown GPU 'radeon'; Known: 3090, 4090"),
        ("4080", "unknown GPU '4080'; did you mean"),
        ("", "unknown GPU ''; Known"),
        ("0", "unknown GPU '0'"),
    ],
)
def test_an_unknown_card_gets_a_suggestion(text: str, hint: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        cards.named(text)
    assert hint in str(error.value)
    assert str(error.value).endswith("h200, b200, or a number of GB such as 48")


def test_the_usable_memory_of_an_h200_is_what_pytorch_reports() -> None:
    measured = Figures(FIGURES).find("card", name="NVIDIA H200")["memory_gb"]
    assert cards.named("h200").room / 1e9 == pytest.approx(measured, abs=0.1)


def test_a_number_of_gb_is_that_of_a_whole_card() -> None:
    assert cards.named("24").room == 24 * 10**9 - cards.DRIVER_BYTES


@pytest.mark.parametrize(("free", "in_use"), [(0, 0), (80 * 10**9, 0), (50 * 10**9, 29_300_000_000)])
def test_a_gpu_of_this_machine_is_planned_whole(free: int, in_use: int) -> None:
    gpu = GPU("0", "GPU-1a", "NVIDIA H100", 80 * 10**9, free, "580.65")
    card = cards.of_this_machine(gpu)
    assert card == cards.Card(name="NVIDIA H100", room=80 * 10**9 - cards.DRIVER_BYTES, in_use=in_use)
