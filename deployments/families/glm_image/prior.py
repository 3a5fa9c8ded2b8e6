"""The prior engine of GLM-Image: continuous batching with a seed for each request. It does not use Ray."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from deployments.engines import compilation
from deployments.engines.checkpoint import WEIGHTS_SHARE, part_of
from deployments.errors import Cancelled, EngineFault, NotANumber, OutOfMemoryError, RequestTooLong, release
from deployments.families.glm_image import checkpoint
from deployments.families.glm_image.language_model import SLICE_TOKENS, Line
from deployments.families.glm_image.language_model_cpu import CPULanguageModel
from deployments.families.glm_image.language_model_gpu import GPULanguageModel
from deployments.families.glm_image.sampling import UNSOUND
from deployments.families.glm_image.sequence import Sequencer
from deployments.types import PriorTokens, Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import GlmImageForConditionalGeneration, GlmImageProcessor

    from deployments.config import ModelConfig
    from deployments.families.glm_image.language_model import LanguageModel
    from deployments.families.glm_image.sequence import Sequence
    from deployments.stages.calls import Call
    from deployments.types import ImageRequest

PROGRESS_S = 0.25
"""Seconds between two reports of a request's progress, at least."""


@dataclass(eq=False, kw_only=True)
class _Job:
    """A request on its way through the engine, with its row and its tokens so far."""

    sequence: Sequence
    seed: int
    call: Call
    future: Future[PriorTokens]
    row: int = -1
    began: float = 0
    reported: float = 0
    prompt: torch.Tensor = field(init=False)
    image_tokens: list[torch.Tensor] = field(default_factory=list)
    read: int = 0
    drawn: list[torch.Tensor] = field(default_factory=list)
    generator: torch.Generator = field(init=False)

    @property
    def written(self) -> int:
        """Number of positions of its row that are in use. Its next token is written there."""
        return self.read + max(0, len(self.drawn) - 1)

    @property
    def in_target(self) -> bool:
        """Whether its next token belongs to the target grid, which comes last."""
        rows, columns = self.sequence.target
        return self.sequence.drawn - len(self.drawn) <= rows * columns

    @property
    def line(self) -> Line:
        """The request's part in the next decoding pass."""
        return Line(
            row=self.row,
            start=self.written,
            position=self.sequence.positions[:, self.written],
            generator=self.generator if self.drawn else None,
            in_target=self.in_target,
        )

    def report(self, now: float) -> None:
        """Reports its progress, at most every `PROGRESS_S` seconds and at the end."""
        if now - self.reported >= PROGRESS_S or len(self.drawn) == self.sequence.drawn:
            self.reported = now
            self.call.report(
                Progress(done=len(self.drawn), total=self.sequence.drawn, seconds=now - self.began)
            )


def on_its_device(
    model: GlmImageForConditionalGeneration, rows: int, max_sequence_length: int
) -> LanguageModel:
    """Returns the language model for the device that the weights are on."""
    runner = CPULanguageModel if model.device.type == "cpu" else GPULanguageModel
    return runner(model, rows=rows, max_sequence_length=max_sequence_length)


class PriorEngine:
    """Samples prior tokens for several requests at once, which come and go at any token.

    The tokens of a seed do not depend on which other requests run. On a CPU they are identical to those of
    `GlmImagePipeline.generate_prior_tokens` (diffusers 0.42), except for rare seeds (one in several hundred
    with the tiny checkpoint) where floating-point rounding changes the top-p cutoff. On a GPU all sums are
    rounded differently.

    Upstream fails if it draws a special token inside the target grid, or an end token before it. An image
    token is drawn here instead. The end token after the grid is not needed and not drawn.

    `submit` may be called from any thread, `step` from one.
    """

    def __init__(
        self,
        model: GlmImageForConditionalGeneration,
        processor: GlmImageProcessor,
        language_model: LanguageModel,
    ) -> None:
        self._model = model
        self._language_model = language_model
        self._sequencer = Sequencer(model, processor)
        self._preparing = _single_threaded_executor()
        self._waiting: deque[_Job] = deque()
        self._active: list[_Job] = []
        self._free = list(reversed(range(language_model.rows)))
        self._work = threading.Event()
        self.fault: EngineFault | None = None
        self.done = 0
        self.unit = "tokens"

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> PriorEngine:
        """See `deployments.families.PriorEngine`."""
        compiles = model.prior.device == "cuda"
        if compiles:
            compilation.prepare(model.compile_cache)
        weights, processor = checkpoint.load_prior(
            model, part_of(report, 0, WEIGHTS_SHARE if compiles else 1)
        )
        engine = cls(
            weights, processor, on_its_device(weights, model.prior.max_batch_size, model.max_sequence_length)
        )
        report(1)
        return engine

    def submit(self, request: ImageRequest, call: Call) -> Future[PriorTokens]:
        """See `deployments.families.PriorEngine`. Requests get their rows in the order of submission."""
        future: Future[PriorTokens] = Future()
        if self.fault:
            raise self.fault
        self._preparing.submit(self._prepare, request, call, future)
        return future

    def _prepare(self, request: ImageRequest, call: Call, future: Future[PriorTokens]) -> None:
        """Tokenizes the prompt and cuts patches while the device works."""
        try:
            sequence = self._sequencer.sequence(request)
            if sequence.length > self._language_model.max_sequence_length:
                raise RequestTooLong(sequence.length, self._language_model.max_sequence_length)  # noqa: TRY301 - caught with all else
        except Exception as error:  # noqa: BLE001 - the caller gets it
            future.set_exception(error)
            return
        job = _Job(sequence=sequence, seed=request.seed, call=call, future=future)
        self._waiting.append(job)
        if self.fault:  # meanwhile; the queue is not read any more
            future.set_exception(self.fault)
        self._work.set()

    def run(self) -> None:
        """Works until a fault, and sleeps while there is nothing to do."""
        while not self.fault:
            self._work.wait()
            self._work.clear()
            try:
                while self.step():
                    pass
            except Exception as error:  # noqa: BLE001 - all requests get it
                release(error, "the prior engine stopped")
                self.fault = EngineFault(f"the prior engine stopped: {error}")
                for job in (*self._active, *self._waiting):
                    with suppress(InvalidStateError):  # cancelled while it waited
                        job.future.set_exception(self.fault)

    @torch.inference_mode()
    def step(self) -> bool:
        """Reads a slice of one new prompt and draws a token for every running request.

        Returns:
            Whether there is more to do.
        """
        self._drop_cancelled()
        self._admit()
        reading = next((job for job in self._active if job.read < len(job.sequence.prompt)), None)
        if reading:
            try:
                self._read_slice(reading)
            except Exception as error:  # noqa: BLE001 - this request alone gets it
                release(error, request_id=reading.call.request_id)
                self._language_model.recover()  # unless the device is lost, which raises here
                self._leave(reading, _in_our_words(error))
        if any(job.drawn for job in self._active):
            self._draw_next()
        return bool(self._active or self._waiting)

    def _admit(self) -> None:
        while self._free and self._waiting:
            job = self._waiting.popleft()
            if job.future.set_running_or_notify_cancel():
                job.row = self._free.pop()
                job.generator = torch.Generator(self._model.device).manual_seed(job.seed)
                job.prompt = job.sequence.prompt.clone()
                job.began = time.monotonic()
                job.report(job.began)
                self._active.append(job)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._active if job.call.cancelled.is_set()]:
            self._leave(job, Cancelled())

    def _leave(self, job: _Job, outcome: PriorTokens | Exception) -> None:
        self._active.remove(job)
        self._free.append(job.row)
        if isinstance(outcome, Exception):
            self._language_model.clear(job.row)  # it may hold NaN
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)

    def _read_slice(self, job: _Job) -> None:
        """Encodes one more source image, or reads one more slice of the prompt after the last one."""
        sequence = job.sequence
        if len(job.image_tokens) < len(sequence.sources):
            self._encode_source(job)
            return
        end = min(job.read + SLICE_TOKENS, len(job.prompt))
        logits = self._language_model.prefill(
            job.row, job.read, job.prompt[job.read : end], sequence.positions[:, job.read : end]
        )
        job.read = end
        if job.read == len(job.prompt):
            token = self._language_model.draw_first(job.row, logits, job.generator, in_target=job.in_target)
            self._take([job], [token])

    def _encode_source(self, job: _Job) -> None:
        sequence, done = job.sequence, len(job.image_tokens)
        assert sequence.pixel_values is not None  # noqa: S101 - there are sources
        sizes = [rows * columns for rows, columns in sequence.sources]
        pixel_values = sequence.pixel_values.split(sizes)[done].to(self._model.device)
        grid = torch.tensor([[1, *sequence.sources[done]]], device=self._model.device)
        (features,) = self._model.get_image_features(pixel_values, grid).pooler_output
        job.image_tokens.append(self._model.get_image_tokens(features, grid).view(-1).cpu())
        if len(job.image_tokens) == len(sequence.sources):
            placeholders = job.prompt == self._model.config.image_token_id
            job.prompt[placeholders] = torch.cat(job.image_tokens)

    def _draw_next(self) -> None:
        """Draws a token for every request whose prompt is read."""
        drawing = [job for job in self._active if job.drawn]
        self._take(drawing, self._language_model.decode([job.line for job in self._active]))

    def _take(self, jobs: list[_Job], tokens: list[torch.Tensor]) -> None:
        """Gives each request its token. Those that have all of theirs leave."""
        now = time.monotonic()
        for job, token in zip(jobs, tokens, strict=True):
            job.drawn.append(token)
            self.done += 1
            job.report(now)
            if len(job.drawn) == job.sequence.drawn:
                self._leave(job, _result(job))


def _in_our_words(error: Exception) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemoryError(f"the prior stage has too little memory to read this request: {error}")
    return error


def _single_threaded_executor() -> ThreadPoolExecutor:
    """Returns an executor of one thread, in which torch starts no threads of its own.

    With more OpenMP threads than cores, GNU's OpenMP puts them to sleep between two operators. A decoding
    step of the benchmark checkpoint took 18 ms instead of 10 on two cores.
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
    executor.submit(torch.set_num_threads, 1).result()
    executor.submit(torch.get_num_threads).result()  # only now does the number hold for that thread
    torch.set_num_threads(threads)  # setting it there has set it for all threads to come
    return executor


def _result(job: _Job) -> PriorTokens | NotANumber:
    drawn = torch.stack(job.drawn).cpu()
    if (drawn == UNSOUND).any():
        return NotANumber("the prior stage's logits are not numbers")
    rows, columns = job.sequence.target
    sources = zip(job.image_tokens, job.sequence.sources, strict=True)
    return PriorTokens(
        target=drawn[-rows * columns :].view(rows, columns).numpy(),
        sources=tuple(tokens.view(grid).numpy() for tokens, grid in sources),
        text_tokens=len(job.sequence.prompt) - sum(rows * columns for rows, columns in job.sequence.sources),
        source_tokens=sum(rows * columns for rows, columns in job.sequence.sources),
        generated_tokens=len(drawn),
    )
