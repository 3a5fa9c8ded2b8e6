"""The stages of a configuration on the GPUs: which go where, and what helps where they do not fit."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING

from deployments import memory_plan
from serve_app.cli.cards import DRIVER_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from deployments.config import StageConfig
    from deployments.memory_plan import Need, Saving, StagePlan
    from serve_app.cli.cards import Card
    from serve_app.config import AppConfig


@dataclass(frozen=True, eq=False, kw_only=True)
class Stage:
    """A stage of a model, or a helper.

    Attributes:
        name: its name, for the output.
        model: name of its model if there are several, else "".
        config: where and how it runs.
        plan: its memory plan.
    """

    name: str
    model: str = ""
    config: StageConfig
    plan: StagePlan

    def words(self, saving: Saving) -> str:
        """Returns the settings of a saving as they stand in the file."""
        settings = " and ".join(f"{key}: {str(value).lower()}" for key, value in saving.settings.items())
        return f"{settings} of {self.model}" if self.model else settings


@dataclass(kw_only=True)
class Placed:
    """A GPU with the replicas that Ray places on it.

    Attributes:
        card: the GPU.
        share: share of it that is not reserved yet.
        stages: the stage of each replica on it.
    """

    card: Card
    share: float = 1
    stages: list[Stage] = field(default_factory=list)

    @property
    def needs(self) -> list[Need | None]:
        """Memory of each replica. None if it is not known."""
        room = self.card.room if len(self.stages) == 1 else None
        return [stage.plan.need(room) for stage in self.stages]

    @property
    def left(self) -> int:
        """Bytes that are left. Negative if the replicas do not fit."""
        return self.card.room - sum(need.total for need in self.needs if need)


def stages_of(config: AppConfig) -> list[Stage]:
    """Returns all stages of a configuration, helpers last.

    Raises:
        CheckpointError: a checkpoint is a folder on this machine, and lacks files.
    """
    several = len(config.models) > 1
    found = []
    for model in config.models:
        name = model.name if several else ""
        prior, decoder = memory_plan.prior_plan(model), memory_plan.decoder_plan(model)
        found += [
            Stage(name=f"{model.name} prior", model=name, config=model.prior, plan=prior),
            Stage(name=f"{model.name} decoder", model=name, config=model.decoder, plan=decoder),
        ]
    if config.safety_checker:
        classifier = config.safety_checker.classifier
        plan = memory_plan.helper_plan(classifier)
        found.append(Stage(name="safety checker", config=classifier, plan=plan))
    if config.prompt_expander and config.prompt_expander.chat_model:
        chat_model = config.prompt_expander.chat_model
        plan = memory_plan.helper_plan(chat_model)
        found.append(Stage(name="prompt expander", config=chat_model, plan=plan))
    return found


def place(
    stages: Iterable[Stage], cards: Sequence[Card], *, on_demand: bool
) -> tuple[list[Placed], list[Stage]]:
    """Places the largest number of replicas on GPUs, as Ray does.

    A replica with a share of a GPU goes to the fullest one with enough left. Others get whole GPUs, and
    compute on the first.

    Args:
        stages: the stages. Those on the CPU are left out.
        cards: the GPUs.
        on_demand: whether more GPUs like the last one come on demand.

    Returns:
        the GPUs, and the stage of every replica for which there is none.
    """
    placed = [Placed(card=card) for card in cards]
    homeless = []
    for stage in _replicas(stages):
        wanted = stage.config.num_gpus
        share, count = (wanted, 1) if wanted < 1 else (1, math.ceil(wanted))
        fitting = sorted((one for one in placed if one.share >= share), key=lambda one: one.share)
        if len(fitting) < count and on_demand:
            more = [Placed(card=cards[-1]) for _ in range(count - len(fitting))]
            placed += more
            fitting += more
        if len(fitting) < count:
            homeless.append(stage)
            continue
        fitting[0].stages.append(stage)
        for one in fitting[:count]:
            one.share = round(one.share - share, 4)  # Ray counts ten-thousandths
    return placed, homeless


def _replicas(stages: Iterable[Stage]) -> list[Stage]:
    """Returns the stage of each replica on a GPU: one of each stage, then the second ones, and so on."""
    on_gpu = [stage for stage in stages if stage.config.device == "cuda"]
    most = max((stage.config.max_replicas for stage in on_gpu), default=0)
    return [stage for index in range(most) for stage in on_gpu if index < stage.config.max_replicas]


def remedies(placed: Placed) -> list[str]:
    """Returns what helps where the replicas of a GPU do not fit: changes of the file, or other GPUs."""
    counts = Counter(placed.stages)
    needs = {stage: need.total for stage, need in zip(placed.stages, placed.needs, strict=True) if need}
    room = placed.card.room

    def room_for(stage: Stage) -> int:
        """Returns the memory for each replica of a stage, beside those of the other stages."""
        others = sum(count * needs.get(one, 0) for one, count in counts.items() if one is not stage)
        return (room - others) // counts[stage]

    found = [stage.words(saving) for stage in counts for saving in stage.plan.savings(room_for(stage))]
    if not found:
        found = _pair(counts, needs, room)
    if len(placed.stages) > 1 and (alone := _alone(counts, room)) is not None:
        found.append(" with ".join(["a GPU for each replica (num_gpus: 1)", *alone]))
    gigabytes = math.ceil((room - placed.left + DRIVER_BYTES) / 1e9)
    return [*found, f"a GPU of {gigabytes} GB or more"]


def _pair(counts: Counter[Stage], needs: dict[Stage, int], room: int) -> list[str]:
    """Returns a change of two stages with which all fit; empty if there is none."""
    for one, other in permutations(counts, 2):
        rest = sum(
            count * needs.get(stage, 0) for stage, count in counts.items() if stage not in (one, other)
        )
        for saving in one.plan.savings(math.inf):
            left = room - rest - counts[one] * saving.need.total
            for second in other.plan.savings(left // counts[other]):
                return [f"{one.words(saving)} and {other.words(second)}"]
    return []


def _alone(stages: Iterable[Stage], room: int) -> list[str] | None:
    """Returns the changes with which each stage fits on a GPU of its own. None if one does not."""
    changes = []
    for stage in stages:
        need = stage.plan.need(room)
        if need is None or need.total <= room:
            continue
        savings = stage.plan.savings(room)
        if not savings:
            return None
        changes.append(stage.words(savings[0]))
    return [" and ".join(changes)] if changes else []
