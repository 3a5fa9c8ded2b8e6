"""The card, the versions, and the two reference rates for all other figures."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import diffusers
import torch
import transformers

from tests.gpu import measure

if TYPE_CHECKING:
    from tests.gpu.rows import Run

SUSTAINED_S = 2.0


def probe(run: Run) -> None:
    """Writes the machine's properties, its copy rate and its rate of bfloat16 products."""
    device = measure.prepare(run)
    with run.figure("versions") as values:
        values |= {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    if not run.needs_gpu("card"):
        with run.figure("card") as values:
            card = torch.cuda.get_device_properties(0)
            values |= {
                "name": card.name,
                "processors": card.multi_processor_count,
                "memory_gb": card.total_memory / 1e9,
                "compute_capability": f"{card.major}.{card.minor}",
            }
    if not run.needs_gpu("clocks, idle"):
        with run.figure("clocks, idle") as values:
            values |= measure.clocks(device)
    copy_rates(run, device)
    product_rate(run, device)


def copy_rates(run: Run, device: torch.device) -> None:
    """Writes the rates of copying memory, counting bytes read and written, and of reading it."""
    source = torch.empty(run.count(2 * 2**30, 2**20), dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    with run.figure("copy") as values:
        ms = measure.milliseconds(lambda: target.copy_(source), device)
        values["tb_s"] = 2 * source.nbytes / ms / 1e9
    with run.figure("read") as values:
        ms = measure.milliseconds(lambda: source.view(torch.int32).amax(), device)
        values["tb_s"] = source.nbytes / ms / 1e9


def product_rate(run: Run, device: torch.device) -> None:
    """Writes the rate of a large product of random numbers, at first and after seconds of full load."""
    side = run.count(8192, 256)
    one, other = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    with run.figure("bfloat16 product", side=side) as values:
        values["ms"] = ms = measure.milliseconds(lambda: one @ other, device, runs=10)
        values["tflops"] = 2 * side**3 / ms / 1e9
    with run.figure("bfloat16 product, sustained", side=side) as values:
        runs = run.count(max(10, int(1e3 * SUSTAINED_S / ms)), 3)

        def many() -> dict[str, str]:
            for _ in range(runs):
                torch.matmul(one, other)
            return measure.clocks(device)  # while the products run

        load, seconds = measure.seconds(many, device)
        values["tflops"] = 2 * side**3 * runs / seconds / 1e12
        values |= load or {"clocks": "unknown: no nvidia-smi"}
