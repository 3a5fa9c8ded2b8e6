"""The path of a request with the safety checker and the prompt expander, over stand-ins for all of them."""

import asyncio
import io
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployments.config import ModelConfig
from deployments.errors import RequestTooLong
from deployments.types import (
    CheckRequest,
    ExpansionRequest,
    ImageRequest,
    Pixels,
    Preview,
    PriorTokens,
    Progress,
)
from deployments.types import Event as StageEvent
from serve_app.config import Limits, PromptExpanderConfig, SafetyCheckerConfig
from serve_app.errors import Failed, Invalid, InvalidParameter, RequestError
from serve_app.generation.events import Event, GeneratedImage, PartialImage
from serve_app.generation.generator import Generator
from serve_app.generation.prompt_expansion import PromptExpansion
from serve_app.generation.safety import SafetyCheck
from serve_app.generation.sources import SourceReader
from serve_app.generation.unit import Model
from serve_app.observability import metrics
from tests.unit.serve_app.generation.making import collect, images_of, request

TOKENS = PriorTokens(target=np.zeros((32, 32), dtype=np.int64))


def image(value: int) -> Pixels:
    return np.full((512, 512, 3), value, dtype=np.uint8)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image(value)).save(file, "PNG")
    return file.getvalue()


@dataclass
class Stages:
    """Stand-ins for the deployments. An image has its seed as its colour; from 100 on it is unsafe."""

    config: ModelConfig
    sources: SourceReader
    painted: list[str] = field(default_factory=list)
    expanded: list[str] = field(default_factory=list)
    new_prompt: str = "a red boat"
    longest: int = 1000
    checks: bool = True

    async def prior(self, request: ImageRequest) -> AsyncGenerator[StageEvent | PriorTokens, None]:
        if len(request.prompt) > self.longest:
            raise RequestTooLong(len(request.prompt), self.longest, alone=True)
        self.painted.append(request.prompt)
        yield TOKENS

    async def decode(self, request: ImageRequest) -> AsyncGenerator[StageEvent | Pixels, None]:
        yield Progress(done=1, total=2, seconds=0.1)
        for index in range(request.previews):
            yield Preview(index=index, pixels=image(60 * (index + 1)))
        yield image(request.seed)

    async def check(self, request: CheckRequest) -> AsyncGenerator[StageEvent | float, None]:
        if not self.checks:
            raise RuntimeError("broken")
        yield int(request.pixels.max()) / 200

    async def ask(self, request: ExpansionRequest) -> str:
        self.expanded.append(request.prompt)
        return self.new_prompt

    def generator(self, *, safety: dict[str, Any] | None = None, expander: bool = True) -> Generator:
        model = Model(config=self.config, prior=self.prior, decode=self.decode)
        endpoint = {"endpoint": {"base_url": "http://127.0.0.1:1", "model": "m"}}
        expansion = PromptExpansion(PromptExpanderConfig.model_validate(endpoint), self.ask, 1000)
        return Generator(
            {"m": model},
            Limits(),
            self.sources,
            safety=None if safety is None else SafetyCheck(SafetyCheckerConfig(**safety), self.check),
            expansion=expansion if expander else None,
        )


@pytest.fixture
def stages(model_config: Callable[..., ModelConfig], sources: SourceReader) -> Stages:
    return Stages(model_config(), sources)


def run(generator: Generator, events: list[Event] | None = None, **fields: Any) -> list[GeneratedImage]:
    wanted: dict[str, Any] = {"size": (512, 512), "seed": 50} | fields
    if events is None:
        return asyncio.run(images_of(generator, **wanted))
    asyncio.run(collect(generator, events, **wanted))
    return [event for event in events if isinstance(event, GeneratedImage)]


def error_of(generator: Generator, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        run(generator, **fields)
    return caught.value


def test_without_a_checker_no_image_has_a_risk(stages: Stages) -> None:
    (made,) = run(stages.generator(), seed=255)
    assert made.facts.risk is None
    assert made.pixels.max() == 255


def test_an_image_below_the_threshold_is_delivered_unchanged(stages: Stages) -> None:
    (made,) = run(stages.generator(safety={}), seed=50)
    assert made.facts.risk == 0.5
    assert not made.facts.is_flagged
    assert (made.pixels == 50).all()


def test_a_flagged_image_fails_the_request_or_becomes_black(stages: Stages) -> None:
    generator = partial(stages.generator, safety={})
    error = error_of(generator(), seed=99, n=2)
    assert type(error) is Invalid
    assert error.code == "content_policy_violation"
    fine, black = run(generator(), seed=99, n=2, blacken=True)
    assert (fine.pixels == 99).all()
    assert not black.pixels.any()
    assert black.facts.risk == 1
    assert black.facts.is_flagged
    assert black.pixels.shape == (512, 512, 3)


def test_the_low_strictness_flags_less_or_nothing(stages: Stages) -> None:
    (made,) = run(stages.generator(safety={"low_threshold": 1}), seed=150, moderation="low")
    assert made.facts.risk == 0.75
    (made,) = run(stages.generator(safety={}), seed=150, moderation="low")
    assert made.facts.risk is None
    assert (made.pixels == 150).all()


def test_a_flagged_preview_is_not_shown(stages: Stages) -> None:
    events: list[Event] = []
    run(stages.generator(safety={}), events, partial_images=3)
    assert [event.index for event in events if isinstance(event, PartialImage)] == [0]
    events.clear()
    run(stages.generator(), events, partial_images=3)
    assert [event.index for event in events if isinstance(event, PartialImage)] == [0, 1, 2]


def test_a_flagged_source_image_is_rejected_before_any_work(stages: Stages) -> None:
    generator = partial(stages.generator, safety={})
    error = error_of(generator(), sources=(png(50), png(200)))
    assert isinstance(error, InvalidParameter)
    assert (error.param, error.code) == ("sources", "content_policy_violation")
    assert stages.painted == []
    assert run(generator(), sources=(png(50),))


def test_an_unchecked_image_fails_the_request_or_is_delivered_as_configured(stages: Stages) -> None:
    stages.checks = False
    events: list[Event] = []
    with pytest.raises(Failed, match="could not check"):
        run(stages.generator(safety={}), events, partial_images=1)
    assert events
    assert not any(isinstance(event, PartialImage | GeneratedImage) for event in events)
    (made,) = run(stages.generator(safety={"on_failure": "open"}), seed=255)
    assert made.facts.risk is None
    assert made.pixels.max() == 255


def test_a_prompt_is_expanded_only_on_request_and_once_for_all_images(stages: Stages) -> None:
    generator = stages.generator
    (made,) = run(generator())
    assert (made.facts.prompt, made.facts.not_expanded, stages.expanded) == ("a boat", "", [])
    images = run(generator(), expand_prompt=True, n=2)
    assert [one.facts.prompt for one in images] == ["a red boat"] * 2
    assert stages.expanded == ["a boat"]
    assert stages.painted == ["a boat", "a red boat", "a red boat"]


def test_a_failed_expansion_paints_the_prompt_and_reports_the_reason(stages: Stages) -> None:
    stages.new_prompt = 'a boat called "Aurora"'
    (made,) = run(stages.generator(), expand_prompt=True)
    assert made.facts.prompt == "a boat"
    assert "quotation marks" in made.facts.not_expanded


def test_a_new_prompt_too_long_for_the_model_is_dropped(stages: Stages) -> None:
    stages.longest = 8
    (made,) = run(stages.generator(), expand_prompt=True)
    assert made.facts.prompt == "a boat"
    assert made.facts.not_expanded == "the new prompt is too long for m"
    error = error_of(stages.generator(), expand_prompt=True, prompt="a very long boat")
    assert isinstance(error, InvalidParameter)
    assert error.param == "prompt"


def test_expansion_is_rejected_by_a_server_without_an_expander(stages: Stages) -> None:
    with pytest.raises(InvalidParameter, match="expand_prompt is not supported"):
        stages.generator(expander=False).check(request(expand_prompt=True))


def test_the_helpers_of_a_request_are_needed_with_its_model(stages: Stages) -> None:
    async def needed(generator: Generator, **fields: Any) -> list[str]:
        async with generator.admit(request(**fields)):
            return generator.running.needed()

    generator = partial(stages.generator, safety={})
    assert asyncio.run(needed(generator())) == ["m", "safety checker"]
    assert asyncio.run(needed(generator(), moderation="low")) == ["m"]
    assert asyncio.run(needed(generator(), expand_prompt=True)) == ["m", "prompt expander", "safety checker"]
    assert asyncio.run(needed(stages.generator())) == ["m"]


def test_every_image_is_counted_by_its_outcome(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(metrics.IMAGES, "add", lambda **labels: counted.append(labels["outcome"]))
    generator = partial(stages.generator, safety={})
    run(generator(), n=2)
    stages.longest = len("a boat")
    stages.new_prompt = "a boat by night"  # it is too long, so the images are made of the first prompt
    run(generator(), n=2, prompt="a boat", expand_prompt=True)
    assert counted == ["made"] * 4
    counted.clear()
    stages.longest = 1000
    run(generator(), seed=100, blacken=True)
    error_of(generator(), seed=100)
    stages.longest = 2
    error_of(generator())
    stages.longest, stages.checks = 1000, False
    error_of(generator())
    assert counted == ["flagged", "flagged", "refused", "failed"]
