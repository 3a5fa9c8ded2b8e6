"""One image of a request: the prior stage, the decoder stage, and retries after a replica's death."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deployments.errors import LoadingFailed, NotANumber, OtherWeights, OutOfMemoryError, RequestTooLong
from deployments.observability import log, tracing
from deployments.types import Event as StageEvent
from deployments.types import ImageRequest, Pixels, Preview, Prior, Progress
from serve_app.errors import Failed, Invalid, InvalidParameter, ReplicaDied, RequestError
from serve_app.generation import safety
from serve_app.generation.codec import cropped
from serve_app.generation.events import (
    Event,
    GeneratedImage,
    ImageFacts,
    PartialImage,
    Stage,
    StageProgress,
    is_flagged,
)
from serve_app.generation.gate import Gate
from serve_app.generation.request import ResolvedRequest
from serve_app.observability import metrics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.config import ModelConfig
    from serve_app.generation.fleet import FleetLimits
    from serve_app.generation.gate import Turn
    from serve_app.generation.prompt_expansion import Expansion

TOO_LONG = "context_length_exceeded"
"""Code of the error for texts with more tokens than the model takes."""
UPDATE_RETRY_S = 1.0
"""Seconds between two tries while an update replaces the stages one after the other."""

StageCall = Callable[[ImageRequest], AsyncGenerator[StageEvent | Prior | Pixels, None]]
"""A stage's method: yields events, then its result, a `Prior` or pixels."""
Risk = Callable[[Pixels, ResolvedRequest], Awaitable[float | None]]
"""Checks an image; see `SafetyCheck.risk`."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A served model: its configuration, and its two stages with their gates.

    Attributes:
        config: its configuration.
        prior: calls the prior stage.
        decode: calls the decoder stage.
        fleet: the limits of all ingress replicas together; None for a replica alone.
        gates: the gates of the stages.
    """

    config: ModelConfig
    prior: StageCall
    decode: StageCall
    fleet: FleetLimits | None = None
    gates: Mapping[Stage, Gate] = field(init=False)

    def __post_init__(self) -> None:
        """Makes the gates."""
        batch, priors = self.config.prior.max_batch_size, self.config.prior.max_replicas
        decoders = self.config.decoder.max_replicas
        # One row of a batch is reserved for requests, since it costs little. A replica would cost too much.
        gates = {
            stage: Gate(f"{self.config.name}-{stage}", places, places_for_jobs, self.fleet)
            for stage, places, places_for_jobs in (
                ("prior", batch * priors, batch * priors - (batch > 1)),
                ("decoder", decoders, decoders),
            )
        }
        object.__setattr__(self, "gates", gates)


class Unit:
    """One image in the making.

    Args:
        model: the model.
        request: the request.
        image: index of the image, from 0.
        sources: its source images, or a reference to them.
        risk: checks images.
        turn: see `Gate.enter`.

    Attributes:
        model: name of the model.
        request_id: id of the request.
        began: time of its start, by `time.monotonic`.
        progress: progress of the stage that works on it; None while it waits for one.
    """

    def __init__(
        self,
        model: Model,
        request: ResolvedRequest,
        image: int,
        sources: Any,
        risk: Risk,
        turn: Turn | None = None,
    ) -> None:
        self.model = request.model
        self.request_id = request.request_id
        self.began = time.monotonic()
        self.progress: StageProgress | None = None
        self._stages = model
        self._request = request
        self._image = image
        self._risk = risk
        self._turn = turn
        self._unit = request.image_request(image, sources)
        self._prior = Prior()
        self._previews = 0
        self._working_since = 0.0
        self._seconds: dict[Stage, float] = {"prior": 0, "decoder": 0}

    async def make(self, expansion: Expansion) -> AsyncGenerator[Event, None]:
        """Makes the image; yields its events, the finished image last.

        Args:
            expansion: the outcome of the prompt expansion.

        Raises:
            RequestError: see `Generator.run`.
        """
        request = self._request
        pixels = None
        with self._worded():
            async with aclosing(self._both_stages()) as events:
                async for event in events:
                    if isinstance(event, np.ndarray):
                        pixels = event
                    else:
                        yield event
        if pixels is None:
            raise RuntimeError("the decoder stage gave no pixels")
        if request.crop:
            pixels = cropped(pixels, *request.crop)
        check_began = time.monotonic()
        risk = await self._risk(pixels, request)
        safety_s = time.monotonic() - check_began
        if is_flagged(risk):
            if not request.blacken:
                raise Invalid(
                    "The image was flagged by the safety checker; change the prompt, or the source images.",
                    code=safety.VIOLATION,
                )
            pixels = np.zeros_like(pixels)
        worked_s = sum(self._seconds.values()) + safety_s
        facts = ImageFacts(
            seed=self._unit.seed,
            prompt=request.prompt,
            not_expanded=expansion.problem,
            expansion_s=expansion.seconds,
            risk=risk,
            safety_s=safety_s,
            text_tokens=self._prior.text_tokens,
            source_tokens=self._prior.source_tokens,
            generated_tokens=self._prior.generated_tokens,
            waiting_s=time.monotonic() - self.began - worked_s,
            prior_s=self._seconds["prior"],
            decoder_s=self._seconds["decoder"],
        )
        yield GeneratedImage(image=self._image, pixels=pixels, facts=facts)

    async def _both_stages(self) -> AsyncGenerator[Event | Pixels, None]:
        """Yields the events of both stages, then the pixels. Both stages have the same weights."""
        while True:
            async with aclosing(self._call("prior", self._stages.prior, self._unit)) as events:
                async for event in events:
                    if isinstance(event, Prior):
                        self._prior = event
                    else:
                        yield event
            request = replace(self._unit, prior=self._prior)
            try:
                async with aclosing(self._call("decoder", self._stages.decode, request)) as events:
                    async for event in events:
                        if not isinstance(event, Prior):
                            yield event
            except OtherWeights:
                self._log_retry("decoder", "has other weights than the prior's: an update is under way")
                await asyncio.sleep(UPDATE_RETRY_S)
            else:
                return

    async def _call(
        self, stage: Stage, call: StageCall, request: ImageRequest
    ) -> AsyncGenerator[Event | Prior | Pixels, None]:
        """Calls a stage; yields its events in the request's terms, then its result.

        If the replica dies, the stage is called once more: the result is the same.
        """
        for is_retry in (False, True):
            if is_retry:
                metrics.RETRIES.add(model=self.model, stage=stage)
                self._log_retry(stage, "lost the replica that had the image")
            self.progress, called, result = None, time.time(), None
            try:
                with tracing.span(stage, kind="client"):
                    sent = replace(request, traceparent=tracing.traceparent())
                    async with self._stages.gates[stage].enter(self._turn), aclosing(call(sent)) as events:
                        async for event in events:
                            if isinstance(event, Progress | Preview):
                                if shown := await self._event(stage, event):
                                    yield shown
                            else:
                                result = event
                    if self.progress:
                        self._seconds[stage] = time.monotonic() - self._working_since
                        tracing.record("waiting", called, time.time() - self._seconds[stage])
            except ReplicaDied:
                continue
            assert result is not None  # noqa: S101 - it is the last item of every call
            yield result
            return
        raise ReplicaDied

    async def _event(self, stage: Stage, event: Progress | Preview) -> StageProgress | PartialImage | None:
        """Returns a stage's event in the request's terms; None for a preview that is not to be shown."""
        if isinstance(event, Preview):
            # A stage that is called again repeats its previews.
            if event.index < self._previews or not await self._may_be_shown(event.pixels):
                return None
            self._previews = event.index + 1
            return PartialImage(image=self._image, index=event.index, pixels=event.pixels)
        if self.progress is None:
            self._working_since = time.monotonic() - event.seconds
        self.progress = StageProgress(image=self._image, stage=stage, progress=event)
        return self.progress

    async def _may_be_shown(self, preview: Pixels) -> bool:
        """Returns whether the safety checker lets a preview pass. If it fails, the preview is left out."""
        with suppress(RequestError):
            return not is_flagged(await self._risk(preview, self._request))
        return False

    def _log_retry(self, stage: Stage, why: str) -> None:
        log.about(
            self.request_id,
            logging.WARNING,
            f"{self.model}'s {stage} stage {why}; retrying the image",
            event="retry",
            model=self.model,
            stage=stage,
        )

    @contextmanager
    def _worded(self) -> Iterator[None]:
        """Turns the errors of the stages into errors for clients."""
        try:
            yield
        except RequestTooLong as error:
            others = " together with source images and image"
            remedy = ", or choose a smaller size or fewer source images"
            if error.alone:
                others = remedy = ""
            raise InvalidParameter(
                error.param,
                f"makes {error.tokens} tokens{others}, and {self.model} takes at most {error.limit}; shorten "
                f"it{remedy}",
                code=TOO_LONG,
            ) from error
        except LoadingFailed as error:
            raise Failed(f"Model loading failed: {error.reason}", code="model_loading_failed") from error
        except OutOfMemoryError as error:
            width, height = self._request.size
            raise Failed(
                f"The device has too little memory for {width}x{height} with {len(self._request.pixels)} "
                "source images. Choose a smaller size or fewer source images.",
                code="out_of_memory",
            ) from error
        except NotANumber as error:
            raise Failed(
                "The model computed values that are not finite; use another seed, or other parameters.",
                code="not_finite",
            ) from error
        except ReplicaDied as error:
            raise Failed(
                "The model's process died twice while making this image; the server's log says why.",
                code="replica_died",
            ) from error
