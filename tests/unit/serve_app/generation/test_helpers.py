"""The path of a request past the safety checker and the prompt expander, over stand-ins of all of them."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest

from deployments.config import ModelConfig
from deployments.errors import RequestTooLong
from deployments.types import (
    CheckRequest,
    Event,
    ImageRequest,
    Pixels,
    Preview,
    PriorTokens,
    Progress,
)
from serve_app.config import Limits, PromptExpanderConfig, SafetyCheckerConfig
from serve_app.errors import InvalidParameter, RequestError
from serve_app.generation.generator import Generator
from serve_app.generation.image import Model
from serve_app.generation.prompt_expansion import PromptExpansion
from serve_app.generation.request import GeneratedImage, Generation, PartialImage
from serve_app.generation.safety import SafetyCheck
from serve_app.observability import metrics

TOKENS = PriorTokens(target=np.zeros((32, 32), dtype=np.int64))


def image(value: int) -> Pixels:
    return np.full((512, 512, 3), value, dtype=np.uint8)


@dataclass
class Stages:
    """Stand-ins for the deployments. An image has its seed as its colour; from 100 on it is unsafe."""

    config: ModelConfig
    painted: list[str] = field(default_factory=list)
    expanded: list[str] = field(default_factory=list)
    new_prompt: str = "a red boat"
    longest: int = 1000
    checks: bool = True

    async def prior(self, request: ImageRequest) -> AsyncGenerator[Event | PriorTokens, None]:
        if len(request.prompt) > self.longest:
            raise RequestTooLong(len(request.prompt), self.longest, alone=True)
        self.painted.append(request.prompt)
        yield TOKENS

    async def decode(self, request: ImageRequest) -> AsyncGenerator[Event | Pixels, None]:
        yield Progress(done=1, total=2, seconds=0.1)
        for index in range(request.previews):
            yield Preview(index=index, pixels=image(60 * (index + 1)))
        yield image(request.seed)

    async def check(self, request: CheckRequest) -> AsyncGenerator[Event | float, None]:
        if not self.checks:
            raise RuntimeError("broken")
        yield int(request.pixels.max()) / 200

    async def ask(self, request: Any) -> str:
        self.expanded.append(request.prompt)
        return self.new_prompt

    def generator(self, *, safety: dict[str, Any] | None = None, expander: bool = True) -> Generator:
        model = Model(config=self.config, prior=self.prior, decode=self.decode)
        endpoint = {"endpoint": {"base_url": "http://127.0.0.1:1", "model": "m"}}
        expansion = PromptExpansion(PromptExpanderConfig.model_validate(endpoint), self.ask, 1000)
        return Generator(
            {"m": model},
            Limits(),
            safety=None if safety is None else SafetyCheck(SafetyCheckerConfig(**safety), self.check),
            expansion=expansion if expander else None,
        )


@pytest.fixture
def stages(model_config: Callable[..., ModelConfig]) -> Stages:
    return Stages(model_config())


def run(generator: Generator, told: list[Any] | None = None, **fields: Any) -> list[GeneratedImage]:
    asked: dict[str, Any] = {"prompt": "a boat", "size": (512, 512), "seed": 50} | fields
    generation = Generation(**asked)
    return asyncio.run(generator.run(generation, (told if told is not None else []).append))


def refusal(generator: Generator, **fields: Any) -> RequestError | InvalidParameter:
    try:
        run(generator, **fields)
    except (RequestError, InvalidParameter) as error:
        return error
    raise AssertionError("it was not refused")


def test_without_a_checker_nothing_is_found(stages: Stages) -> None:
    (made,) = run(stages.generator(), seed=255)
    assert made.risk is None
    assert made.pixels.max() == 255


def test_an_image_below_the_threshold_is_as_it_is(stages: Stages) -> None:
    (made,) = run(stages.generator(safety={}), seed=50)
    assert made.risk == 0.5
    assert (made.pixels == 50).all()


def test_one_that_is_flagged_fails_the_request_or_is_black(stages: Stages) -> None:
    generator = partial(stages.generator, safety={})
    error = refusal(generator(), seed=99, n=2)
    assert isinstance(error, RequestError)
    assert (error.status, error.code) == (400, "content_policy_violation")
    fine, black = run(generator(), seed=99, n=2, blacken=True)
    assert (fine.pixels == 99).all()
    assert not black.pixels.any()
    assert black.risk == 1
    assert black.pixels.shape == (512, 512, 3)


def test_whoever_asks_for_less_gets_more(stages: Stages) -> None:
    (made,) = run(stages.generator(safety={"low_threshold": 1}), seed=150, moderation="low")
    assert made.risk == 0.75
    (made,) = run(stages.generator(safety={}), seed=150, moderation="low")
    assert made.risk is None
    assert (made.pixels == 150).all()


def test_a_preview_that_is_flagged_is_not_shown(stages: Stages) -> None:
    told: list[Any] = []
    run(stages.generator(safety={}), told, partial_images=3)
    assert [one.index for one in told if isinstance(one, PartialImage)] == [0]
    told.clear()
    run(stages.generator(), told, partial_images=3)
    assert [one.index for one in told if isinstance(one, PartialImage)] == [0, 1, 2]


def test_a_source_image_that_is_flagged_is_refused_before_any_work(stages: Stages) -> None:
    generator = partial(stages.generator, safety={})
    error = refusal(generator(), sources=(image(50), image(200)))
    assert isinstance(error, InvalidParameter)
    assert (error.param, error.code) == ("sources", "content_policy_violation")
    assert stages.painted == []
    assert run(generator(), sources=(image(50),))


def test_what_cannot_be_checked_is_held_back_or_handed_out_as_configured(stages: Stages) -> None:
    stages.checks = False
    told: list[Any] = []
    with pytest.raises(RequestError, match="could not be checked"):
        run(stages.generator(safety={}), told, partial_images=1)
    assert not any(isinstance(one, PartialImage | GeneratedImage) for one in told)
    (made,) = run(stages.generator(safety={"on_failure": "open"}), seed=255)
    assert made.risk is None
    assert made.pixels.max() == 255


def test_only_what_is_asked_for_is_expanded_and_once_for_all_images(stages: Stages) -> None:
    generator = stages.generator
    (made,) = run(generator())
    assert (made.prompt, made.not_expanded, stages.expanded) == ("a boat", "", [])
    images = run(generator(), expand_prompt=True, n=2)
    assert [one.prompt for one in images] == ["a red boat"] * 2
    assert stages.expanded == ["a boat"]
    assert stages.painted == ["a boat", "a red boat", "a red boat"]


def test_an_expansion_that_fails_paints_the_prompt_and_says_so(stages: Stages) -> None:
    stages.new_prompt = 'a boat called "Aurora"'
    (made,) = run(stages.generator(), expand_prompt=True)
    assert made.prompt == "a boat"
    assert "quotation marks" in made.not_expanded


def test_a_new_prompt_that_is_too_long_for_the_model_is_not_taken(stages: Stages) -> None:
    stages.longest = 8
    (made,) = run(stages.generator(), expand_prompt=True)
    assert made.prompt == "a boat"
    assert made.not_expanded == "the new prompt is too long for m"
    error = refusal(stages.generator(), expand_prompt=True, prompt="a very long boat")
    assert isinstance(error, InvalidParameter)
    assert error.param == "prompt"


def test_expansion_is_refused_where_there_is_none(stages: Stages) -> None:
    generator = partial(stages.generator, expander=False)
    with pytest.raises(InvalidParameter, match="expand_prompt is not supported"):
        generator().check(Generation(prompt="a boat", expand_prompt=True), sources=0)


def test_what_a_request_needs_is_woken_with_its_model(stages: Stages) -> None:
    async def needed(generator: Generator, **fields: Any) -> list[str]:
        async with generator.admitted(Generation(prompt="a boat", **fields)):
            return generator.needed()

    generator = partial(stages.generator, safety={})
    assert asyncio.run(needed(generator())) == ["m", "safety checker"]
    assert asyncio.run(needed(generator(), moderation="low")) == ["m"]
    assert asyncio.run(needed(generator(), expand_prompt=True)) == ["m", "prompt expander", "safety checker"]
    assert asyncio.run(needed(stages.generator())) == ["m"]


def test_what_becomes_of_every_image_is_counted(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(metrics.IMAGES, "add", lambda **labels: counted.append(labels["outcome"]))
    generator = partial(stages.generator, safety={})
    run(generator(), n=2)
    run(generator(), seed=100, blacken=True)
    refusal(generator(), seed=100)
    stages.longest = 2
    refusal(generator())
    stages.longest, stages.checks = 1000, False
    refusal(generator())
    assert counted == ["made", "made", "flagged", "flagged", "refused", "failed"]
