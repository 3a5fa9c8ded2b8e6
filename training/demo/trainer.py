"""What the parts' training has in common: the loop, the folder, the log."""

from __future__ import annotations

import itertools
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KEEP_EVERY_S = 60
TELL_EVERY_S = 10
WARM_UP_STEPS = 200
AHEAD = 4
"""Batches that each process has ready."""
AVERAGE = 0.999
"""Of weights, in the second half: what is written is their average over about the last thousand steps."""

SIZES = {
    (512, 512): 40,
    (1024, 1024): 12,
    (768, 768): 8,
    (512, 768): 10,
    (768, 512): 10,
    (768, 1024): 8,
    (1024, 768): 8,
    (512, 1024): 2,
    (1024, 512): 2,
}
"""Heights and widths of pictures, and how often each."""

Net = TypeVar("Net", bound=nn.Module)
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Workshop:
    """Where and with what is trained.

    Attributes:
        folder: gets the checkpoint, a log for each part, samples, and what training goes on from.
        device: that does the arithmetic.
        minutes: that a part may take, those before an interruption included.
        workers: processes that make the batches.
        seed: of weights and scenes.
    """

    folder: Path
    device: torch.device
    minutes: float
    workers: int
    seed: int = 0

    @property
    def checkpoint(self) -> Path:
        """The folder of the components."""
        return self.folder / "checkpoint"

    def tell(self, part: str, line: str) -> None:
        """Print a line and add it to the part's log."""
        print(f"{part}: {line}", flush=True)
        with (self.folder / f"{part}.log").open("a") as file:
            file.write(f"{line}\n")

    def autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; as it is on a CPU."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")


def pick_size(chance: random.Random) -> tuple[int, int]:
    """Height and width."""
    return chance.choices(list(SIZES), list(SIZES.values()))[0]


class _Batches(IterableDataset[Batch]):
    """Batches in the order of their numbers, whatever number of processes makes them."""

    def __init__(self, make: Callable[[random.Random, int], Batch], seed: str, start: int) -> None:
        self._make, self._seed, self._start = make, seed, start

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in itertools.count(self._start + first, every):
            yield self._make(random.Random(f"{self._seed} {number}"), number)


def train(
    shop: Workshop,
    part: str,
    net: Net,
    make: Callable[[random.Random, int], Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    *,
    rate: float,
) -> Net:
    """Train a part until its minutes are over, less those of which its state is in the folder.

    Args:
        shop: where.
        part: its name.
        net: its weights.
        make: makes a batch, given chance and its number, in a process that has no GPU.
        loss_of: the loss of a batch.
        rate: of learning, at most; it rises at first and falls to nothing at the end.

    Returns:
        The average of the last weights.
    """
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=shop.device.type == "cuda"
    )
    file = shop.folder / f"{part}.pt"
    step, spent_s = 0, 0.0
    if file.exists():
        state = torch.load(file, map_location=shop.device, weights_only=True)
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent_s = state["step"], state["spent"]
        shop.tell(part, f"goes on at step {step}, after {spent_s:.0f} s")

    def keep() -> None:
        state = {
            "net": net.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "spent": spent_s,
        }
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)

    batches = iter(
        DataLoader(
            _Batches(make, f"{part} {shop.seed}", step),
            batch_size=None,
            num_workers=shop.workers,
            prefetch_factor=AHEAD if shop.workers else None,
        )
    )
    told = kept = time.monotonic()
    began = told - spent_s
    losses: list[torch.Tensor] = []
    while (share := spent_s / (60 * shop.minutes)) < 1:
        for group in optimizer.param_groups:
            falling = 0.02 + 0.49 * (1 + math.cos(math.pi * share))
            group["lr"] = rate * falling * min(1, (step + 1) / WARM_UP_STEPS)
        loss = loss_of(next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.detach())
        now = time.monotonic()
        spent_s = now - began
        if spent_s > 30 * shop.minutes:
            average.update_parameters(net)
        if now - told > TELL_EVERY_S:
            shop.tell(part, f"step {step}, {spent_s:.0f} s, loss {torch.stack(losses).mean():.4f}")
            losses, told = [], time.monotonic()
        if now - kept > KEEP_EVERY_S:
            keep()
            kept = time.monotonic()
    keep()
    shop.tell(part, f"done after {step} steps, {spent_s:.0f} s")
    return cast("Net", average.module.eval().requires_grad_(requires_grad=False))
