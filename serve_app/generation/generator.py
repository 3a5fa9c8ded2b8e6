"""The path of a request: accepted, checked and expanded, then each image through both stages.

Work ends with its client. Ray cancels the task of a request whose client has hung up. A deadline, an unload
and the cancellation of a job do the same. This closes the iterators from the outside to the inside: `run`,
`merged`, `Unit.make`, and the call of the stage in `serve_app.app`. That one cancels the call in the replica,
where `deployments.stages.calls.stream` tells the engine.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deployments.observability import tracing
from serve_app.errors import InvalidParameter, NotFound, RequestError, stopping
from serve_app.generation import prompt_expansion, safety
from serve_app.generation.admission import Admission
from serve_app.generation.events import Event, GeneratedImage, StageProgress, is_flagged
from serve_app.generation.prompt_expansion import Expansion
from serve_app.generation.request import resolve
from serve_app.generation.running import RunningRequests, merged
from serve_app.generation.unit import TOO_LONG, Unit
from serve_app.generation.validation import bounded_work, validate
from serve_app.observability import metrics, telemetry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from deployments.config import ModelConfig
    from deployments.types import Pixels
    from serve_app.config import Limits
    from serve_app.generation.fleet import FleetLimits
    from serve_app.generation.gate import Turn
    from serve_app.generation.prompt_expansion import PromptExpansion
    from serve_app.generation.request import GenerationRequest, ResolvedRequest, Source
    from serve_app.generation.running import RunningRequest
    from serve_app.generation.safety import SafetyCheck
    from serve_app.generation.sources import SourceReader
    from serve_app.generation.unit import Model


class Generator:
    """Runs requests on the served models.

    Args:
        models: models by name; the first one is the default.
        limits: limits of requests.
        sources: reads and decodes source images.
        on_change: called when a request is ready for its model, and when it ends.
        share: keeps a request's source images where its stages find them; returns a reference to them.
        safety: the safety checker; None without one.
        expansion: the prompt expander; None without one.
        fleet: the limits of all ingress replicas together; None for a replica alone.

    Attributes:
        draining: whether new requests are rejected.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        limits: Limits,
        sources: SourceReader,
        on_change: Callable[[], None] = lambda: None,
        *,
        share: Callable[[tuple[Pixels, ...]], Any] = lambda pixels: pixels,
        safety: SafetyCheck | None = None,
        expansion: PromptExpansion | None = None,
        fleet: FleetLimits | None = None,
    ) -> None:
        self._models = models
        self._limits = limits
        self._sources = sources
        self._share = share
        self._safety = safety
        self._expansion = expansion
        self._admission = Admission(limits, fleet)
        self._running = RunningRequests(on_change)
        self._units: list[Unit] = []
        self.draining = False

    @property
    def checks_images(self) -> bool:
        """Whether there is a safety checker."""
        return self._safety is not None

    @property
    def expands_prompts(self) -> bool:
        """Whether there is a prompt expander."""
        return self._expansion is not None

    def models(self) -> list[ModelConfig]:
        """Returns the configurations of all models, the default one first."""
        return [model.config for model in self._models.values()]

    def model(self, name: str | None) -> ModelConfig:
        """Returns the configuration of a model.

        Args:
            name: the model's name, or its family's spelt `glm-image`, which stands for the first model of
                that family; None for the default model.

        Raises:
            NotFound: there is no such model.
        """
        configs = self.models()
        if name is None:
            return configs[0]
        for config in configs:
            if config.name == name:
                return config
        for config in configs:
            if config.family.replace("_", "-") == name:
                return config
        raise NotFound(
            f"There is no model {name!r:.100}; there are: {', '.join(self._models)}.",
            param="model",
            code="model_not_found",
        )

    @property
    def units(self) -> list[Unit]:
        """The images in the making, the oldest first."""
        return list(self._units)

    @property
    def pending(self) -> int:
        """Number of unfinished images of requests, without those of jobs."""
        return self._admission.pending

    @property
    def running(self) -> RunningRequests:
        """The requests that run."""
        return self._running

    def takes_jobs(self, model: str) -> bool:
        """Returns whether the requests to a model leave a place for jobs."""
        return self._models[model].gates["prior"].takes_jobs

    async def drain(self) -> None:
        """Rejects new requests; returns when the running ones have ended."""
        self.draining = True
        await self._running.until_idle(self._models)

    def check(self, request: GenerationRequest) -> None:
        """Checks whether a request may run.

        Raises:
            NotFound: there is no such model.
            Unavailable: the server is stopping.
            InvalidParameter: a parameter is out of its range, or has no effect.
        """
        if self.draining:
            raise stopping()
        model = self.model(request.model)
        validate(request, model, self._limits, expands=self.expands_prompts)
        if request.size_is_known:
            bounded_work(request, model, self._limits)

    async def decode_sources(self, sources: Sequence[Source], model: str | None) -> tuple[Pixels, ...]:
        """Returns source images as pixels for a model; see `SourceReader.decode`."""
        return await self._sources.decode(sources, self.model(model).traits)

    def resolve(self, request: GenerationRequest, pixels: tuple[Pixels, ...] = ()) -> ResolvedRequest:
        """Returns the request with all its parameters; see `serve_app.generation.request.resolve`."""
        return resolve(request, self.model(request.model), pixels)

    async def charge(self, request: GenerationRequest) -> None:
        """Counts the work of a request against its key's rate.

        Raises:
            Busy: the key's rate is used up.
            InvalidParameter: it is more work than one request may ask for.
        """
        work = bounded_work(request, self.model(request.model), self._limits)
        await self._admission.charge(work, request.key_id)

    @asynccontextmanager
    async def admit(self, request: GenerationRequest) -> AsyncIterator[RunningRequest]:
        """Accepts a request. Within the block it holds a place, and runs until its deadline.

        Yields:
            The running request, ready for `run`.

        Raises:
            NotFound: there is no such model.
            Busy: there is no place, or the key's rate is used up.
            Unavailable: the server is stopping, or the request was aborted.
            TimedOut: its deadline has passed, or no stage began in time.
            InvalidParameter: a parameter is out of its range, or a source image cannot be used.
            TooLarge: a source image has too many bytes.
        """
        telemetry.note(model=self.model(request.model).name)
        self.check(request)
        async with (
            self._admission.permit(request.n, request.key_id),
            self._run_within(request, self._limits.deadline_s) as running,
        ):
            if request.size_is_known:
                await self.charge(request)
            resolved = self.resolve(request, await self.decode_sources(request.sources, request.model))
            if not request.size_is_known:
                await self.charge(resolved)
            telemetry.note_request(resolved)
            self._running.make_ready(running, resolved)
            yield running

    @asynccontextmanager
    async def resume(self, request: ResolvedRequest, turn: Turn) -> AsyncIterator[RunningRequest]:
        """Runs a job's request, which was accepted when the job was submitted.

        Args:
            request: the request.
            turn: the turn of the job's first image.

        Yields:
            The running request, ready for `run`.

        Raises:
            Unavailable: the request was aborted.
            TimedOut: its deadline has passed.
        """
        async with self._run_within(request, self._limits.job_deadline_s) as running:
            running.turn = turn
            self._running.make_ready(running, request)
            yield running

    def _run_within(
        self, request: GenerationRequest, deadline_s: float
    ) -> AbstractAsyncContextManager[RunningRequest]:
        model, helpers = self.model(request.model).name, self._helpers(request)
        return self._running.add(model, helpers, request.n, deadline_s, request.start_within_s)

    def _helpers(self, request: GenerationRequest) -> frozenset[str]:
        """Returns the names of the helpers that a request needs."""
        helpers = set()
        if self._safety and self._safety.enabled_for(request.moderation):
            helpers.add(safety.NAME)
        if request.expand_prompt and self._expansion:
            helpers.add(prompt_expansion.NAME)
        return frozenset(helpers)

    async def run(self, running: RunningRequest) -> AsyncGenerator[Event, None]:
        """Makes the images of a running request side by side; yields events as they come.

        Closing the iterator stops all images.

        Raises:
            Failed: a stage cannot be loaded, has too little memory, or keeps dying; or an image cannot be
                checked.
            Busy: Ray Serve's queue of a stage is full.
            Unavailable: Ray Serve cannot reach a stage.
            Invalid: an image was flagged.
            InvalidParameter: the request is too long for the model, or a source image was flagged.
        """
        request = running.request
        await self._check_sources(request)
        expansion = Expansion(request.prompt)
        if request.expand_prompt and self._expansion:
            with tracing.span("expansion"):
                expansion = await self._expansion.expand(
                    request.prompt, editing=bool(request.pixels), request_id=request.request_id
                )
            metrics.note_part(request.model, "expansion", expansion.seconds)
        # They may have tens of megabytes: a thread serialises them, once for all images and both stages.
        sources = await asyncio.to_thread(self._share, request.pixels) if request.pixels else ()
        attempts = [expansion]
        if expansion.prompt != request.prompt:
            problem = f"the new prompt is too long for {request.model}"
            attempts.append(Expansion(request.prompt, expansion.seconds, problem))
        for attempt in attempts:
            painted = replace(request, prompt=attempt.prompt)
            outcomes: list[str] = []
            images = [
                self._image(painted, attempt, image, sources, outcomes, running.turn_of(image))
                for image in range(request.n)
            ]
            try:
                async with aclosing(merged(images)) as events:
                    async for event in events:
                        if isinstance(event, StageProgress):
                            running.note_start()
                        yield event
            except InvalidParameter as error:
                if error.code != TOO_LONG or attempt is attempts[-1]:
                    raise
                outcomes.clear()  # the next attempt makes the same images
            else:
                return
            finally:
                for outcome in outcomes:
                    metrics.IMAGES.add(api=request.api, model=request.model, outcome=outcome)

    async def _image(
        self,
        request: ResolvedRequest,
        expansion: Expansion,
        image: int,
        sources: Any,
        outcomes: list[str],
        turn: Turn | None,
    ) -> AsyncGenerator[Event, None]:
        """Makes one image; adds its outcome to the list."""
        unit = Unit(self._models[request.model], request, image, sources, self._risk, turn)
        outcome = "failed"
        self._units.append(unit)
        try:
            with tracing.span("image", index=image):
                async with aclosing(unit.make(expansion)) as events:
                    async for event in events:
                        if isinstance(event, GeneratedImage):
                            outcome = "flagged" if event.facts.is_flagged else "made"
                            self._count(request, event)
                        yield event
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except InvalidParameter:
            outcome = "refused"
            raise
        except RequestError as error:
            if error.code == safety.VIOLATION:
                outcome = "flagged"
            raise
        finally:
            self._units.remove(unit)
            outcomes.append(outcome)

    def _count(self, request: ResolvedRequest, image: GeneratedImage) -> None:
        """Counts an image's pixels and where its time went."""
        width, height = request.size
        metrics.MEGAPIXELS.add(width * height / 1e6, api=request.api, model=request.model)
        facts = image.facts
        parts = {"waiting": facts.waiting_s, "prior": facts.prior_s, "decoder": facts.decoder_s}
        if self._safety and self._safety.enabled_for(request.moderation):
            parts["safety"] = facts.safety_s
        for part, seconds in parts.items():
            metrics.note_part(request.model, part, seconds)

    async def _risk(self, pixels: Pixels, request: ResolvedRequest) -> float | None:
        """Returns the risk of an image; see `SafetyCheck.risk`."""
        if not self._safety or not self._safety.enabled_for(request.moderation):
            return None
        with tracing.span("safety"):
            return await self._safety.risk(pixels, request.moderation, request.request_id)

    async def _check_sources(self, request: ResolvedRequest) -> None:
        """Checks the source images.

        Raises:
            InvalidParameter: one was flagged.
            Failed: one could not be checked.
        """
        for source in request.pixels:
            if is_flagged(await self._risk(source, request)):
                raise InvalidParameter(
                    "sources",
                    "contains an image that the safety checker flagged; send another one",
                    code=safety.VIOLATION,
                )
