"""One image of a request: the prior stage, the decoder stage, and again after a death or amid an update."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from deployments.errors import LoadingFailed, OtherWeights, OutOfMemoryError, RequestTooLong
from deployments.observability import log, tracing
from deployments.types import Event, ImageRequest, Pixels, Preview, Progress, StageRequest
from serve_app.errors import NO_RETRY, InvalidParameter, ReplicaDied, RequestError
from serve_app.generation import safety
from serve_app.generation.images import cropped
from serve_app.generation.request import (
    MAX_SEED,
    GeneratedImage,
    PartialImage,
    Resolved,
    RunningUnit,
    StageProgress,
)
from serve_app.observability import metrics

if TYPE_CHECKING:
    from deployments.config import ModelConfig
    from deployments.types import Prior
    from serve_app.generation.prompt_expansion import Expansion
    from serve_app.generation.request import Report, Stage

TOO_LONG = "context_length_exceeded"
"""The code of errors over texts that have more tokens than the model takes."""
UPDATE_S = 1.0
"""Between two tries while an update replaces the stages, one of which is ahead."""

Asked = TypeVar("Asked", bound=StageRequest)
Result = TypeVar("Result")
StageCall = Callable[[Asked], AsyncGenerator[Event | Result, None]]
Risk = Callable[[Pixels, Resolved], Awaitable[float | None]]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A served model and its two stages, each of which tells how it gets on before its result."""

    config: ModelConfig
    prior: StageCall[ImageRequest, Prior]
    decode: StageCall[ImageRequest, Pixels]


def is_flagged(risk: float | None) -> bool:
    """Whether an image is not to be shown, see `SafetyCheck.risk`."""
    return risk is not None and risk >= 1


class Unit:
    """An image that is made.

    Args:
        model: makes it.
        generation: the request.
        image: which of its images it is, from 0.
        report: see `Generator.run`.
        risk: see `SafetyCheck.risk`.

    Attributes:
        running: how it gets on.
    """

    def __init__(self, model: Model, generation: Resolved, image: int, report: Report, risk: Risk) -> None:
        self._model = model
        self._generation = generation
        self._image = image
        self._seed = (generation.seed + image) % (MAX_SEED + 1)
        self._report = report
        self._risk = risk
        self._asked_at = time.time()
        self._seconds: dict[Stage, float] = {"prior": 0, "decoder": 0}
        self.running = RunningUnit(
            model=generation.model, request_id=generation.request_id, began=time.monotonic()
        )

    async def make(self, expansion: Expansion) -> GeneratedImage:
        """Make it, once.

        Args:
            expansion: what was done with the prompt.

        Raises:
            RequestError: see `Generator.run`.
            InvalidParameter: the request is too long for the model.
        """
        generation = self._generation
        with self._worded():
            prior, pixels = await self._by_both_stages()
        if generation.crop:
            pixels = cropped(pixels, *generation.crop)
        check_began = time.monotonic()
        risk = await self._risk(pixels, generation)
        safety_s = time.monotonic() - check_began
        if is_flagged(risk):
            if not generation.blacken:
                raise RequestError(
                    "The image was flagged by the safety checker; change the prompt, or the source images.",
                    code=safety.VIOLATION,
                    headers=NO_RETRY,
                )
            pixels = np.zeros_like(pixels)
        worked_s = sum(self._seconds.values()) + safety_s
        made = GeneratedImage(
            pixels=pixels,
            seed=self._seed,
            prompt=generation.prompt,
            not_expanded=expansion.problem,
            expansion_s=expansion.seconds,
            risk=risk,
            safety_s=safety_s,
            text_tokens=prior.text_tokens,
            source_tokens=prior.source_tokens,
            generated_tokens=prior.generated_tokens,
            waiting_s=time.monotonic() - self.running.began - worked_s,
            prior_s=self._seconds["prior"],
            decoder_s=self._seconds["decoder"],
        )
        self._report(made)
        return made

    async def _by_both_stages(self) -> tuple[Prior, Pixels]:
        """The prior, and the pixels that the same model makes of it."""
        generation = self._generation
        width, height = generation.size
        prior_request = ImageRequest(
            prompt=generation.prompt,
            width=width,
            height=height,
            seed=self._seed,
            negative_prompt=generation.negative_prompt,
            guidance_scale=generation.guidance_scale,
            sources=generation.sources,
            submitted_at=self._asked_at,
            request_id=generation.request_id,
        )
        while True:
            prior = await self._by_stage("prior", self._model.prior, prior_request)
            decode_request = ImageRequest(
                prompt=generation.prompt,
                width=width,
                height=height,
                seed=self._seed,
                steps=generation.steps,
                guidance_scale=generation.guidance_scale,
                cfg_normalization=generation.cfg_normalization,
                strength=generation.strength,
                previews=generation.partial_images,
                prior=prior,
                sources=generation.sources,
                submitted_at=self._asked_at,
                request_id=generation.request_id,
            )
            try:
                return prior, await self._by_stage("decoder", self._model.decode, decode_request)
            except OtherWeights:
                self._note_retry("decoder", "has other weights than the prior was made with: an update")
            await asyncio.sleep(UPDATE_S)

    async def _by_stage(self, stage: Stage, call: StageCall[Asked, Result], request: Asked) -> Result:
        """A stage's result; it is asked once more if its replica dies, and makes the same."""
        try:
            return await self._ask(stage, call, request)
        except ReplicaDied:
            metrics.RETRIES.add(model=self._generation.model, stage=stage)
            self._note_retry(stage, "has lost the replica that was asked")
            return await self._ask(stage, call, request)

    async def _ask(self, stage: Stage, call: StageCall[Asked, Result], request: Asked) -> Result:
        self.running.progress, began = None, time.time()
        with tracing.span(stage, kind="client"):
            events = call(replace(request, traceparent=tracing.traceparent()))
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Progress | Preview):
                        await self._tell(stage, event)
                    else:
                        result = event
            if self.running.progress:
                self._seconds[stage] = time.monotonic() - self.running.working_since
                tracing.record("waiting", began, time.time() - self._seconds[stage])
        return result

    async def _tell(self, stage: Stage, event: Event) -> None:
        if isinstance(event, Preview):
            # What cannot be checked is not shown; the image is looked at, too.
            with suppress(RequestError):
                if not is_flagged(await self._risk(event.pixels, self._generation)):
                    self._report(PartialImage(image=self._image, index=event.index, pixels=event.pixels))
            return
        if self.running.progress is None:
            self.running.working_since = time.monotonic() - event.seconds
        self.running.progress = StageProgress(image=self._image, stage=stage, progress=event)
        self._report(self.running.progress)

    def _note_retry(self, stage: Stage, why: str) -> None:
        name = self._generation.model
        log.about(
            self._generation.request_id,
            logging.WARNING,
            f"{name}'s {stage} stage {why}; the image is tried again",
            event="retry",
            model=name,
            stage=stage,
        )

    @contextmanager
    def _worded(self) -> Iterator[None]:
        """What stages raise in the block is put into words for clients."""
        try:
            yield
        except RequestTooLong as error:
            others = " together with source images and image"
            remedy = ", or choose a smaller size or fewer source images"
            if error.alone:
                others = remedy = ""
            raise InvalidParameter(
                error.param,
                f"makes {error.tokens} tokens{others}, and {self._generation.model} takes at most "
                f"{error.limit}; shorten it{remedy}",
                code=TOO_LONG,
            ) from error
        except LoadingFailed as error:
            raise RequestError(
                f"Model loading failed: {error.reason}",
                code="model_loading_failed",
                status=500,
                headers=NO_RETRY,
            ) from error
        except OutOfMemoryError as error:
            width, height = self._generation.size
            sources = len(self._generation.sources)
            raise RequestError(
                f"The device has too little memory for {width}x{height} with {sources} source images. Choose "
                "a smaller size or fewer source images.",
                code="out_of_memory",
                status=500,
                headers=NO_RETRY,
            ) from error
        except ReplicaDied as error:
            raise RequestError(
                "The model's process died twice over this request; the server's log says why.",
                code="replica_died",
                status=500,
                headers=NO_RETRY,
            ) from error
