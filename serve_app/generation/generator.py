"""The one path of a request: admitted, then for each of its images the prior stage and the decoder stage."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from deployments.observability import tracing
from serve_app.errors import NO_RETRY, InvalidParameter, RequestError, stopping
from serve_app.generation import prompt_expansion, safety
from serve_app.generation import validation as checks
from serve_app.generation.admission import Admission
from serve_app.generation.image import TOO_LONG, Unit, is_flagged
from serve_app.generation.prompt_expansion import Expansion
from serve_app.generation.request import GeneratedImage, Generation, Resolved, RunningUnit
from serve_app.observability import metrics

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from deployments.config import ModelConfig
    from deployments.types import Pixels
    from serve_app.config import Limits
    from serve_app.generation.image import Model
    from serve_app.generation.prompt_expansion import PromptExpansion
    from serve_app.generation.request import Report
    from serve_app.generation.safety import SafetyCheck

MAX_DRAWN_SEED = 2**52
"""JavaScript holds integers below 2**53: the seeds of the images that follow are to be among them too."""
PACE_S = 0.002
"""Between the beginnings of two units: each keeps the event loop for about so long."""

Prepare = Callable[["Generation"], Awaitable["Generation"]]


@dataclass(eq=False, kw_only=True)
class _Running:
    """A request that was taken on; its work begins when its images are decoded and it is paid for."""

    model: str
    helpers: frozenset[str]
    units: int
    timeout: asyncio.Timeout
    has_begun: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    called_off: bool = False


class Generator:
    """Runs generations on the served models.

    Args:
        models: by name; the first one is the default.
        limits: what a request may ask for.
        on_change: called when a request is taken on, and when it ends.
        safety: looks at images; None if nobody does.
        expansion: rewrites prompts; likewise.

    Attributes:
        draining: whether no more requests are taken on.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        limits: Limits,
        on_change: Callable[[], None] = lambda: None,
        *,
        safety: SafetyCheck | None = None,
        expansion: PromptExpansion | None = None,
    ) -> None:
        self._models = models
        self._limits = limits
        self._safety = safety
        self._expansion = expansion
        self._admission = Admission(limits)
        self._on_change = on_change
        self._running: list[_Running] = []
        self._units: list[RunningUnit] = []
        self.draining = False
        self._starting = asyncio.Lock()

    @property
    def checks_images(self) -> bool:
        """Whether there is a safety checker."""
        return self._safety is not None

    @property
    def expands_prompts(self) -> bool:
        """Whether there is a prompt expander."""
        return self._expansion is not None

    def models(self) -> list[ModelConfig]:
        """The configurations of all models, the default one first."""
        return [model.config for model in self._models.values()]

    def model(self, name: str | None) -> ModelConfig:
        """The configuration of a model.

        Args:
            name: the model's, or its family's, spelt `glm-image`, which stands for the first one of that
                family; None for the default model.

        Raises:
            RequestError: 404, there is no such model.
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
        raise RequestError(
            f"There is no model {name!r:.100}; there are: {', '.join(self._models)}.",
            param="model",
            code="model_not_found",
            status=404,
        )

    def resolved(self, generation: Generation) -> Resolved:
        """The generation with what it leaves out filled in: the model's defaults, and a seed that is drawn.

        Raises:
            RequestError: 404, there is no such model.
        """
        config = self.model(generation.model)
        defaults, given = config.defaults, vars(generation)
        left_out = {
            "size": (defaults.width, defaults.height),
            "steps": defaults.steps,
            "guidance_scale": config.guidance_scale(editing=bool(generation.sources)),
            "negative_prompt": "",
            "cfg_normalization": False,
            "strength": defaults.strength,
            "seed": secrets.randbelow(MAX_DRAWN_SEED),
        }
        filled_in = {name: value for name, value in left_out.items() if given[name] is None}
        return Resolved(**given | filled_in | {"model": config.name})

    @property
    def units(self) -> list[RunningUnit]:
        """What is being made, the oldest first."""
        return list(self._units)

    @property
    def pending(self) -> int:
        """Images that are not finished, those included that wait for a stage."""
        return sum(running.units for running in self._running)

    def needed(self) -> list[str]:
        """The models that have work, and the helpers that have."""
        begun = [running for running in self._running if running.has_begun]
        return sorted({name for running in begun for name in (running.model, *running.helpers)})

    def _helpers(self, generation: Generation) -> frozenset[str]:
        """What else than its model a request needs."""
        helpers = set()
        if self._safety and self._safety.looks(generation.moderation):
            helpers.add(safety.NAME)
        if generation.expand_prompt:
            helpers.add(prompt_expansion.NAME)
        return frozenset(helpers)

    def count(self, models: Collection[str]) -> int:
        """How many requests of these models are running."""
        return sum(running.model in models for running in self._running)

    def call_off(self, models: Collection[str]) -> None:
        """Stop these models' requests; they get a 503."""
        for running in self._running:
            if running.model in models and not running.timeout.expired():
                running.called_off = True
                running.timeout.reschedule(asyncio.get_running_loop().time())

    async def until_idle(self, models: Collection[str]) -> None:
        """Return when no request of these models is running."""
        while ours := [running for running in self._running if running.model in models]:
            await ours[0].ended.wait()

    async def drain(self) -> None:
        """Take on no more requests, and return when those that were taken on have ended."""
        self.draining = True
        await self.until_idle(self._models)

    @asynccontextmanager
    async def admitted(
        self, generation: Generation, *, sources: int = 0, prepare: Prepare | None = None
    ) -> AsyncIterator[Resolved]:
        """Check a request and hold a place for it; within the block it is run and delivered.

        Args:
            generation: its source images may be missing still.
            sources: how many there will be.
            prepare: adds them, which is not begun without a place.

        Yields:
            The request, prepared and resolved.

        Raises:
            RequestError: 404, there is no such model; 429, there is no place, or the key's work is used up;
                503, the server is stopping or the request was called off; 504, its time is over.
            InvalidParameter: a parameter is out of its range.
        """
        self.check(generation, sources=sources)
        with self._admission.permit(generation.n, generation.key_id):
            async with self._taken_on(generation, self._limits.deadline_s) as running:
                size_is_known = prepare is None or generation.size is not None
                if size_is_known:
                    await self.charge(generation)
                if prepare:
                    generation = await prepare(generation)
                if not size_is_known:
                    await self.charge(generation)
                self._begin(running)
                yield self.resolved(generation)

    @asynccontextmanager
    async def resumed(self, generation: Generation) -> AsyncIterator[None]:
        """Within the block a job is run, for which no place is held: it was taken on when it was submitted.

        Raises:
            RequestError: 404, its model is gone; 503, the server is stopping or the job was called off; 504,
                its time is over.
        """
        async with self._taken_on(generation, self._limits.job_deadline_s) as running:
            self._begin(running)
            yield

    async def charge(self, generation: Generation) -> None:
        """Count a request's work, which is about to be taken on.

        Raises:
            RequestError: 429, it is too much for one minute.
            InvalidParameter: it is more than one request may ask for.
        """
        work = checks.work(self.resolved(generation), self._limits)
        await self._admission.charge(work, generation.key_id)

    @asynccontextmanager
    async def _taken_on(self, generation: Generation, deadline_s: float) -> AsyncIterator[_Running]:
        if self.draining:
            raise stopping()
        timeout = asyncio.timeout(deadline_s)
        model = self.model(generation.model).name
        running = _Running(
            model=model, helpers=self._helpers(generation), units=generation.n, timeout=timeout
        )
        try:
            async with timeout:
                self._running.append(running)
                yield running
        except TimeoutError:
            if not timeout.expired():
                raise
            raise _stopped(running, deadline_s) from None
        finally:
            self._running.remove(running)
            self._on_change()
            running.ended.set()

    def _begin(self, running: _Running) -> None:
        running.has_begun = True
        self._on_change()

    async def run(self, generation: Generation, report: Report = lambda _: None) -> list[GeneratedImage]:
        """Make the images of an admitted request, side by side. Cancelling stops all of them.

        Args:
            generation: the request.
            report: is told of every image's progress, and given previews and the images as they come.

        Raises:
            RequestError: what was asked for takes too much memory, a stage cannot be loaded, the stages keep
                dying over it, or an image was flagged or cannot be checked.
            InvalidParameter: the request is too long for the model, or a source image was flagged.
        """
        resolved = self.resolved(generation)
        await self._check_sources(resolved)
        expansion = Expansion(resolved.prompt)
        if resolved.expand_prompt and self._expansion:
            with tracing.span("expansion"):
                expansion = await self._expansion.expand(
                    resolved.prompt, editing=bool(resolved.sources), request_id=resolved.request_id
                )
            metrics.note_part(resolved.model, "expansion", expansion.seconds)
        try:
            return await self._units_of(resolved, expansion, report)
        except InvalidParameter as error:
            if error.code != TOO_LONG or expansion.prompt == resolved.prompt:
                raise
            problem = f"the new prompt is too long for {resolved.model}"
            expansion = Expansion(resolved.prompt, expansion.seconds, problem)
            return await self._units_of(resolved, expansion, report)

    async def _units_of(
        self, generation: Resolved, expansion: Expansion, report: Report
    ) -> list[GeneratedImage]:
        """All images of a request, side by side."""
        painted = replace(generation, prompt=expansion.prompt)
        try:
            async with asyncio.TaskGroup() as group:
                units = [
                    group.create_task(self._counted_unit(painted, expansion, image, report))
                    for image in range(painted.n)
                ]
        except BaseExceptionGroup as failures:  # one unit failed, and the group has stopped the others
            raise failures.exceptions[0] from None
        return [unit.result() for unit in units]

    async def _risk(self, pixels: Pixels, generation: Generation) -> float | None:
        """See `SafetyCheck.risk`."""
        if not self._safety or not self._safety.looks(generation.moderation):
            return None
        with tracing.span("safety"):
            return await self._safety.risk(pixels, generation.moderation, generation.request_id)

    async def _check_sources(self, generation: Generation) -> None:
        """Have the source images looked at.

        Raises:
            InvalidParameter: one was flagged.
            RequestError: one could not be checked.
        """
        for source in generation.sources:
            if is_flagged(await self._risk(source, generation)):
                raise InvalidParameter(
                    "sources", "was flagged by the safety checker; send another image", code=safety.VIOLATION
                )

    async def _counted_unit(
        self, generation: Resolved, expansion: Expansion, image: int, report: Report
    ) -> GeneratedImage:
        outcome = "failed"
        try:
            with tracing.span("image", index=image):
                made = await self._unit(generation, expansion, image, report)
            outcome = "flagged" if is_flagged(made.risk) else "made"
            width, height = generation.size
            metrics.MEGAPIXELS.add(width * height / 1e6, api=generation.api, model=generation.model)
            parts = {"waiting": made.waiting_s, "prior": made.prior_s, "decoder": made.decoder_s}
            if self._safety and self._safety.looks(generation.moderation):
                parts["safety"] = made.safety_s
            for part, seconds in parts.items():
                metrics.note_part(generation.model, part, seconds)
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
            metrics.IMAGES.add(api=generation.api, model=generation.model, outcome=outcome)
        return made

    async def _unit(
        self, generation: Resolved, expansion: Expansion, image: int, report: Report
    ) -> GeneratedImage:
        unit = Unit(self._models[generation.model], generation, image, report, self._risk)
        self._units.append(unit.running)
        try:
            await self._turn()
            return await unit.make(expansion)
        finally:
            self._units.remove(unit.running)

    async def _turn(self) -> None:
        """Wait, so that the beginning of a burst's units leaves room for refusing those beyond the bound."""
        await self._starting.acquire()
        asyncio.get_running_loop().call_later(PACE_S, self._starting.release)

    def check(self, generation: Generation, *, sources: int) -> None:
        """Look whether a request may be taken on.

        Args:
            generation: its source images may be missing still.
            sources: how many there will be.

        Raises:
            RequestError: 404, there is no such model; 503, the server is stopping.
            InvalidParameter: a parameter is out of its range.
        """
        if self.draining:
            raise stopping()
        model = self.model(generation.model)
        checks.check(generation, model, self._limits, sources=sources, expands=self.expands_prompts)
        if generation.size or not sources:
            checks.work(self.resolved(generation), self._limits)


def _stopped(running: _Running, deadline_s: float) -> RequestError:
    """Why a request was stopped before its end."""
    if running.called_off:
        return RequestError(
            f"The request was stopped: {running.model} was unloaded by hand.",
            code="unloaded",
            status=503,
            headers=NO_RETRY,
        )
    return RequestError(
        f"The request took longer than the {deadline_s:g} s allowed and was stopped. If "
        "the model was still loading, try again later; else ask for fewer images or steps, or for a "
        "smaller size.",
        code="deadline_exceeded",
        status=504,
        headers=NO_RETRY,
    )
