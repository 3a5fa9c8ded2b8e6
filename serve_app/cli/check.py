"""The command `check FILE`: checks a config file, and plans the memory of its GPUs.

It downloads and loads nothing, and needs neither a GPU nor the checkpoints.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.errors import CheckpointError
from deployments.memory_plan import CUDA_BYTES, DecoderPlan, PriorPlan, WeightsPlan
from serve_app.cli import cards, config_file, gpus, placement

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from deployments.memory_plan import Need
    from serve_app.cli.cards import Card
    from serve_app.cli.placement import Placed, Stage
    from serve_app.config import AppConfig

HELP = "check a configuration, and whether it fits the GPUs"
SIDES = (2048, 1024)
"""Sides of source images for which the output counts how many an edit may have."""
NOTABLE_BYTES = 10**9
"""Memory in use from which the output shows it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fills the command's parser."""
    parser.description = (
        "Check a configuration and plan the memory of its GPUs, before anything is downloaded or loaded. The "
        "exit status is 0 if it fits and 1 if it is not valid or does not fit."
    )
    parser.add_argument("config", type=Path, help="a Serve config file, such as configs/one-gpu.yaml")
    parser.add_argument(
        "--gpu",
        action="append",
        type=cards.named,
        metavar="CARD",
        help="a GPU to plan for instead of those of this machine; repeat it for several. A name "
        f"({', '.join(cards.CARDS)}) or a number of GB",
    )
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> str | None:
    """Checks a file; returns the problem, if there is one."""
    path = arguments.config
    try:
        file, warnings = config_file.read(path)
        config = file.application.args
        stages = placement.stages_of(config)
    except config_file.ConfigFileError as error:
        return f"{path}: not valid:\n{error}"
    except CheckpointError as error:
        return f"{path}: {error}"
    print(f"{path}: valid.")
    for warning in warnings:
        print(f"WARNING {path}: {warning}", file=sys.stderr)
    if on_cpu := [stage.name for stage in stages if stage.config.device == "cpu"]:
        print(f"On the CPU: {', '.join(on_cpu)}.")
    if len(on_cpu) == len(stages):
        return None
    return _plan(config, stages, arguments.gpu)


def _plan(config: AppConfig, stages: list[Stage], named: list[Card] | None) -> str | None:
    """Prints the plan of the GPUs; returns the problem, if there is one."""
    present = named or _present()
    if not present:
        missing = "has no NVIDIA GPU" if present == [] else "does not say which GPUs it has"
        print(f"This machine {missing}. Name cards with --gpu. A replica needs:")
        for stage in stages:
            if stage.config.device == "cuda":
                print(f"  {_replica(stage, stage.name, stage.plan.need())}")
        return None if present is None else config.lacks_gpus(0)
    placed, homeless = placement.place(stages, present, on_demand=config.cluster.autoscaling)
    numbers: Counter[Stage] = Counter()
    printed: set[tuple[str, ...]] = set()
    for index, one in enumerate(placed):
        print(f"GPU {index} ({_card(one.card)}): {_verdict(one)}")
        for stage, need in zip(one.stages, one.needs, strict=True):
            numbers[stage] += 1
            several = stage.config.max_replicas > 1
            print(f"  {_replica(stage, f'{stage.name} {numbers[stage]}' if several else stage.name, need)}")
        notes = tuple(_notes(one))
        if notes not in printed:  # further replicas have the same ones
            printed.add(notes)
            print(*(f"  {note}\n" for note in notes), sep="", end="")
    if len({one.card.name for one in placed}) > 1:
        print("Ray may choose other GPUs than this plan. CUDA_VISIBLE_DEVICES limits its choice.")
    print("GB are 10^9 bytes. The work is that of the largest image.")
    if homeless:
        names = ", ".join(dict.fromkeys(stage.name for stage in homeless))
        return (
            config.lacks_gpus(len(present)) or f"No GPU has a share left for: {names}. Name more with --gpu."
        )
    return "The configuration does not fit." if any(one.left < 0 for one in placed) else None


def _present() -> list[Card] | None:
    """Returns the GPUs of this machine; None if they, or their memory, are not known."""
    present = gpus.visible()
    if present is None or not all(gpu.total for gpu in present):
        return None
    return [cards.of_this_machine(gpu) for gpu in present]


def _card(card: Card) -> str:
    in_use = f", {_gb(card.in_use)} GB of it in use now" if card.in_use >= NOTABLE_BYTES else ""
    return f"{card.name}, {_gb(card.room)} GB usable{in_use}"


def _verdict(placed: Placed) -> str:
    if not placed.stages:
        return "not used." if placed.share else "reserved, but not used: a replica computes on one GPU."
    if placed.left < 0:
        return f"does not fit, {_gb(-placed.left)} GB too little."
    unknown = [stage.name for stage in dict.fromkeys(placed.stages) if isinstance(stage.plan, WeightsPlan)]
    return f"fits, {_gb(placed.left)} GB left{' for ' if unknown else ''}{' and '.join(unknown)}."


def _replica(stage: Stage, name: str, need: Need | None) -> str:
    """Returns the line of a replica: its memory, and what takes it."""
    plan = stage.plan
    if need is None:
        return f"{name}: {plan.weights_from}"
    parts = [f"{_gb(need.weights)} weights {plan.weights_from}"]
    if need.cache and isinstance(plan, PriorPlan):
        model = plan.model
        shape = f"{model.prior.max_batch_size} x {model.max_sequence_length} tokens"
        parts.append(f"{_gb(need.cache)} cache of {shape}")
    if isinstance(plan, DecoderPlan):
        side = plan.model.traits.max_side
        parts.append(f"{_gb(need.work)} work for {side}x{side}")
    elif need.work:
        parts.append(f"{_gb(need.work)} work")
    offload = f", offload: {need.offload}" if need.offload != "none" else ""
    return f"{name}: {_gb(need.total)} GB ({' + '.join([*parts, f'{_gb(CUDA_BYTES)} CUDA'])}{offload})"


def _notes(placed: Placed) -> Iterator[str]:
    """Yields what the operator should know about the replicas of a GPU, and what to do if they do not fit."""
    if placed.left < 0:
        yield "One of these helps:"
        yield from (f"- {remedy}" for remedy in placement.remedies(placed))
        return
    room = placed.card.room
    for stage, need in zip(placed.stages, placed.needs, strict=True):
        plan = stage.plan
        if not isinstance(plan, DecoderPlan) or need is None:
            continue
        chosen = plan.model.decoder.acceleration
        if chosen.offload == "auto" and need.offload == "model":
            tiled = plan.need_of(chosen.model_copy(update={"vae_tiling": True}))
            remedy = " decoder.acceleration.vae_tiling: true avoids it." if tiled.total <= room else ""
            yield f"The weights are copied for each image, which takes seconds.{remedy}"
        own = placed.left + need.total
        most = {side: plan.sources(own, need.offload, side) for side in SIDES}
        if most[SIDES[0]] < plan.model.traits.max_sources:
            counts = " or ".join(f"{count} of {side}x{side}" for side, count in most.items())
            yield f"An edit has memory for these source images: {counts}."


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"
