"""The common code of all parts' training: the loop, the folder, the log."""

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

SAVE_INTERVAL_S = 60
LOG_INTERVAL_S = 10
WARM_UP_STEPS = 200
AHEAD = 4
"""Number of batches that each process prepares in advance."""
AVERAGE = 0.999
"""Decay of the weights' moving average. It spans about a thousand steps, and begins at half of the time."""

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
"""Relative frequencies of the pictures' heights and widths."""

Net = TypeVar("Net", bound=nn.Module)
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class TrainingRun:
    """Settings of a training run.

    Attributes:
        folder: folder for the checkpoint, a log of each part, samples, and the state to resume from.
        device: device of the computation.
        minutes: training time of a part, including the time before an interruption.
        workers: number of processes that create batches.
        seed: random seed of weights and scenes.
    """

    folder: Path
    device: torch.device
    minutes: float
    workers: int
    seed: int = 0

    @property
    def checkpoint(self) -> Path:
        """Folder of the components."""
        return self.folder / "checkpoint"

    def log(self, part: str, line: str) -> None:
        """Prints a line and appends it to the part's log."""
        print(f"{part}: {line}", flush=True)
        with (self.folder / f"{part}.log").open("a") as file:
            file.write(f"{line}\n")

    def autocast(self) -> torch.autocast:
        """Returns a context for bfloat16 on a GPU. It has no effect on a CPU."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")


def pick_size(rng: random.Random) -> tuple[int, int]:
    """Returns a random height and width."""
    return rng.choices(list(SIZES), list(SIZES.values()))[0]


class _Batches(IterableDataset[Batch]):
    """Batches in the order of their numbers, for any number of worker processes."""

    def __init__(self, make: Callable[[random.Random, int], Batch], seed: str, start: int) -> None:
        self._make, self._seed, self._start = make, seed, start

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in itertools.count(self._start + first, every):
            yield self._make(random.Random(f"{self._seed} {number}"), number)


@dataclass(frozen=True)
class _Snapshot:
    """State of a part's training on disk, from which an interrupted run resumes."""

    file: Path
    net: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer

    def load(self, device: torch.device) -> tuple[int, float]:
        """Restores the state and returns the number of steps and seconds so far."""
        state = torch.load(self.file, map_location=device, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["spent"]

    def save(self, step: int, spent_s: float) -> None:
        """Writes the state, and replaces the file only when it is complete."""
        state = {
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": step,
            "spent": spent_s,
        }
        torch.save(state, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").rename(self.file)


def _loader(
    run: TrainingRun, part: str, make: Callable[[random.Random, int], Batch], start: int
) -> Iterator[Batch]:
    """Returns the batches from a number on, created in the run's worker processes."""
    loader = DataLoader(
        _Batches(make, f"{part} {run.seed}", start),
        batch_size=None,
        num_workers=run.workers,
        prefetch_factor=AHEAD if run.workers else None,
    )
    return iter(loader)


def train(
    run: TrainingRun,
    part: str,
    net: Net,
    make: Callable[[random.Random, int], Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    *,
    rate: float,
) -> Net:
    """Trains a part until its training time is over. Time from before an interruption counts.

    Args:
        run: settings of the training run.
        part: name of the part.
        net: network to train.
        make: creates a batch from a random generator and the batch's number, in a process without a GPU.
        loss_of: computes the loss of a batch.
        rate: largest learning rate. The rate rises at first and falls to almost 0 at the end.

    Returns:
        The network with the average of the last weights.
    """
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=run.device.type == "cuda"
    )
    snapshot = _Snapshot(run.folder / f"{part}.pt", net, average, optimizer)
    step, spent_s = 0, 0.0
    if snapshot.file.exists():
        step, spent_s = snapshot.load(run.device)
        run.log(part, f"resumes at step {step}, after {spent_s:.0f} s")
    batches = _loader(run, part, make, step)
    logged_at = saved_at = time.monotonic()
    started_at = logged_at - spent_s
    losses: list[torch.Tensor] = []
    while (share := spent_s / (60 * run.minutes)) < 1:
        for group in optimizer.param_groups:
            decay = 0.02 + 0.49 * (1 + math.cos(math.pi * share))
            group["lr"] = rate * decay * min(1, (step + 1) / WARM_UP_STEPS)
        loss = loss_of(next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.detach())
        now = time.monotonic()
        spent_s = now - started_at
        if spent_s > 30 * run.minutes:
            average.update_parameters(net)
        if now - logged_at > LOG_INTERVAL_S:
            run.log(part, f"step {step}, {spent_s:.0f} s, loss {torch.stack(losses).mean():.4f}")
            losses, logged_at = [], time.monotonic()
        if now - saved_at > SAVE_INTERVAL_S:
            snapshot.save(step, spent_s)
            saved_at = time.monotonic()
    snapshot.save(step, spent_s)
    run.log(part, f"done after {step} steps, {spent_s:.0f} s")
    return cast("Net", average.module.eval().requires_grad_(requires_grad=False))
