"""The place of replicas on GPUs, and advice that makes them fit."""

from typing import Any

import pytest

from deployments.config import StageConfig
from deployments.memory_plan import Need, Saving
from serve_app.cli.cards import Card
from serve_app.cli.placement import Placed, Stage, place, remedies, stages_of
from serve_app.config import AppConfig

GB = 10**9


class Plan:
    """A plan of so many GB, which become fewer with a setting of each number."""

    weights_from = "somewhere"

    def __init__(self, gigabytes: float, **savings: float) -> None:
        self.gigabytes = gigabytes
        self._savings = savings

    def need(self, room: int | None = None) -> Need | None:
        return need(self.gigabytes)

    def savings(self, room: float) -> list[Saving]:
        return [
            Saving({f"part.{key}": True}, need(gigabytes))
            for key, gigabytes in self._savings.items()
            if gigabytes * GB <= room
        ]


def need(gigabytes: float) -> Need:
    whole = Need(weights=round(gigabytes * GB))
    return Need(weights=2 * whole.weights - whole.total)


def stage(name: str, num_gpus: float, replicas: int = 1, plan: Plan | None = None, **options: Any) -> Stage:
    options = {"deployment": {"ray_actor_options": {"num_gpus": num_gpus}}} | options
    config = StageConfig(max_replicas=replicas, **options)
    return Stage(name=name, config=config, plan=plan or Plan(1))


def card(gigabytes: int = 80) -> Card:
    return Card(name="card", room=gigabytes * GB)


@pytest.mark.parametrize(
    ("stages", "cards", "expected"),
    [
        ([("a", 1, 1), ("b", 1, 1)], 2, ["a", "b"]),
        ([("a", 0.5, 1), ("b", 0.5, 1)], 2, ["ab", ""]),
        ([("a", 0.5, 1), ("b", 1, 1), ("c", 0.5, 1)], 2, ["ac", "b"]),
        ([("a", 0.4, 1), ("b", 0.7, 1), ("c", 0.3, 1)], 2, ["a", "bc"]),  # to the fullest
        ([("a", 0.1, 3), ("b", 0.7, 1)], 1, ["abaa"]),
        ([("a", 1, 1), ("b", 1, 3)], 4, ["a", "b", "b", "b"]),
        ([("a", 2, 1), ("b", 1, 1)], 3, ["a", "", "b"]),
    ],
)
def test_replicas_are_placed_as_ray_does(
    stages: list[tuple[str, float, int]], cards: int, expected: list[str]
) -> None:
    placed, homeless = place([stage(*one) for one in stages], [card() for _ in range(cards)], on_demand=False)
    assert ["".join(stage.name for stage in one.stages) for one in placed] == expected
    assert not homeless


def test_a_stage_on_the_cpu_takes_no_gpu() -> None:
    placed, homeless = place([stage("a", 1, device="cpu")], [card()], on_demand=False)
    assert (placed[0].stages, homeless) == ([], [])


def test_a_replica_without_a_gpu_is_returned() -> None:
    _, homeless = place([stage("a", 0.6, 3)], [card(), card()], on_demand=False)
    assert [one.name for one in homeless] == ["a"]


def test_gpus_like_the_last_one_come_on_demand() -> None:
    placed, homeless = place([stage("a", 1), stage("b", 1, 3)], [card(80), card(40)], on_demand=True)
    assert [one.card.room // GB for one in placed] == [80, 40, 40, 40]
    assert not homeless


def placed(gigabytes: int, *stages: Stage) -> Placed:
    return Placed(card=card(gigabytes), stages=list(stages))


@pytest.mark.parametrize(
    ("one", "advice"),
    [
        (placed(20, stage("a", 1, plan=Plan(30))), ["a GPU of 31 GB or more"]),
        (placed(20, stage("a", 1, plan=Plan(30, x=20, y=25))), ["part.x: true", "a GPU of 31 GB or more"]),
        (
            placed(40, stage("a", 0.5, plan=Plan(30, x=20)), stage("b", 0.5, plan=Plan(20))),
            ["part.x: true", "a GPU for each replica (num_gpus: 1)", "a GPU of 51 GB or more"],
        ),
        (  # both must change
            placed(40, stage("a", 0.5, plan=Plan(30, x=25)), stage("b", 0.5, plan=Plan(20, y=15))),
            [
                "part.x: true and part.y: true",
                "a GPU for each replica (num_gpus: 1)",
                "a GPU of 51 GB or more",
            ],
        ),
        (
            placed(20, stage("a", 0.5, plan=Plan(30, x=18)), stage("b", 0.5, plan=Plan(19))),
            ["a GPU for each replica (num_gpus: 1) with part.x: true", "a GPU of 50 GB or more"],
        ),
        (  # one fits on no GPU of this size
            placed(20, stage("a", 0.5, plan=Plan(30)), stage("b", 0.5, plan=Plan(19))),
            ["a GPU of 50 GB or more"],
        ),
    ],
)
def test_advice_makes_the_replicas_fit(one: Placed, advice: list[str]) -> None:
    assert one.left < 0
    assert remedies(one) == advice


def test_advice_is_for_all_replicas_of_a_stage() -> None:
    twice = stage("a", 0.3, 2, plan=Plan(20, x=18, y=10))
    assert remedies(placed(35, twice, twice, stage("b", 0.3, plan=Plan(10))))[0] == "part.y: true"


def test_advice_names_the_model_if_there_are_several() -> None:
    models = [
        {
            "name": name,
            "family": "glm_image",
            "checkpoint": "/nowhere",
            "prior": {"device": "cpu"},
            "decoder": {"deployment": {"ray_actor_options": {"num_gpus": 1}}},
        }
        for name in ("one", "two")
    ]
    config = AppConfig.model_validate({"auth": {"open": True}, "models": models})
    stages = stages_of(config)
    assert [stage.name for stage in stages] == ["one prior", "one decoder", "two prior", "two decoder"]
    assert remedies(placed(45, stages[3], stages[3]))[0] == "decoder.acceleration.vae_tiling: true of two"
