"""The prior engine of GLM-Image: continuous batching with a seed a request. No Ray in here."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deployments.errors import Cancelled, CheckpointError, EngineFault, RequestTooLong
from deployments.glm_image import checkpoint
from deployments.glm_image.language_model import LanguageModel
from deployments.glm_image.sequence import Sequencer
from deployments.types import PriorTokens

if TYPE_CHECKING:
    from transformers import GlmImageForConditionalGeneration, GlmImageProcessor, LogitsProcessorList

    from deployments.config import ModelConfig
    from deployments.glm_image.sequence import Sequence
    from deployments.types import PriorRequest

SLICE_TOKENS = 128
"""Tokens of a prompt read at a time; the running requests wait for no more than that between two tokens."""

ROW_INDEPENDENT = (
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
"""The logits processors that look at a row's scores and at nothing else, so that rows can share a call."""


@dataclass(eq=False, kw_only=True)
class _Job:
    """A request on its way through the engine; once it has a row, with what it has got there."""

    sequence: Sequence
    seed: int
    cancelled: threading.Event
    future: Future[PriorTokens]
    row: int = -1
    prompt: torch.Tensor = field(init=False)
    image_tokens: list[torch.Tensor] = field(default_factory=list)
    read: int = 0
    drawn: list[torch.Tensor] = field(default_factory=list)
    generator: torch.Generator = field(init=False)


class PriorEngine:
    """Samples prior tokens for several requests at once, which come and go at any token.

    For one seed the tokens are those of `GlmImagePipeline.generate_prior_tokens` (diffusers 0.42) for the
    request alone, whatever company it has here; and where upstream would fail, having drawn a special token
    inside the target grid or an end token before it, an image token is drawn in its place. The end token
    after the grid is nobody's need: not drawn.

    `submit` may be called from any thread; `step` from one.
    """

    def __init__(
        self,
        model: GlmImageForConditionalGeneration,
        processor: GlmImageProcessor,
        *,
        rows: int,
        row_tokens: int,
    ) -> None:
        self._model = model
        self._row_tokens = row_tokens
        self._logits_processor = _logits_processor(model)
        self._language_model = LanguageModel(model, rows=rows, row_tokens=row_tokens)
        ids = torch.arange(model.config.text_config.vision_vocab_size, device=model.device)
        self._special = ids >= model.config.vq_config.num_embeddings
        end = torch.tensor(model.generation_config.eos_token_id or [], device=model.device)
        self._end = torch.isin(ids, end)
        self._sequencer = Sequencer(model, processor)
        self._preparing = _single_threaded_executor()
        self._waiting: deque[_Job] = deque()
        self._active: list[_Job] = []
        self._free = list(reversed(range(rows)))
        self._work = threading.Event()
        self.fault: EngineFault | None = None

    @classmethod
    def load(cls, model: ModelConfig) -> PriorEngine:
        """See `deployments.families.PriorEngine`."""
        return cls(*checkpoint.load_prior(model), rows=model.prior.rows, row_tokens=model.prior.row_tokens)

    def submit(self, request: PriorRequest, cancelled: threading.Event) -> Future[PriorTokens]:
        """See `deployments.families.PriorEngine`. Requests get their rows in the order of submission."""
        future: Future[PriorTokens] = Future()
        if self.fault:
            raise self.fault
        self._preparing.submit(self._prepare, request, cancelled, future)
        return future

    def _prepare(
        self, request: PriorRequest, cancelled: threading.Event, future: Future[PriorTokens]
    ) -> None:
        """Tokenize and cut patches beside the device's work."""
        try:
            sequence = self._sequencer.sequence(request)
            if sequence.length > self._row_tokens:
                raise RequestTooLong(sequence.length, self._row_tokens)  # noqa: TRY301 - caught with all else
        except Exception as error:  # noqa: BLE001 - it is the caller's, whatever it is
            future.set_exception(error)
            return
        job = _Job(sequence=sequence, seed=request.seed, cancelled=cancelled, future=future)
        self._waiting.append(job)
        if self.fault:  # meanwhile, and nobody will look at what waits any more
            future.set_exception(self.fault)
        self._work.set()

    def run(self) -> None:
        """Work until a fault, sleeping while there is nothing to do."""
        while not self.fault:
            self._work.wait()
            self._work.clear()
            try:
                while self.step():
                    pass
            except Exception as error:  # noqa: BLE001 - the device's, and of all that it was working on
                self.fault = EngineFault(f"the prior engine stopped: {error}")
                for job in (*self._active, *self._waiting):
                    with suppress(InvalidStateError):  # cancelled while it waited
                        job.future.set_exception(self.fault)

    @torch.inference_mode()
    def step(self) -> bool:
        """Read a slice of one new prompt and draw a token for every running request.

        Returns:
            Whether there is more to do.
        """
        self._drop_cancelled()
        self._admit()
        reading = next((job for job in self._active if job.read < len(job.sequence.prompt)), None)
        running = [job for job in self._active if job.drawn]
        if reading:
            try:
                self._read_slice(reading)
            except Exception as error:  # noqa: BLE001 - it is this request's alone
                self._leave(reading, error)
        if running:
            self._draw_next(running)
        return bool(self._active or self._waiting)

    def _admit(self) -> None:
        while self._free and self._waiting:
            job = self._waiting.popleft()
            if job.future.set_running_or_notify_cancel():
                job.row = self._free.pop()
                job.generator = torch.Generator(self._model.device).manual_seed(job.seed)
                job.prompt = job.sequence.prompt.clone()
                self._active.append(job)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._active if job.cancelled.is_set()]:
            self._leave(job, Cancelled())

    def _leave(self, job: _Job, outcome: PriorTokens | Exception) -> None:
        self._active.remove(job)
        self._free.append(job.row)
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)

    def _read_slice(self, job: _Job) -> None:
        """Encode one more source image or, when all are, read one more slice of the prompt."""
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
            self._draw([job], logits)

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

    def _draw_next(self, running: list[_Job]) -> None:
        positions = [len(job.prompt) + len(job.drawn) - 1 for job in running]
        logits = self._language_model.decode(
            [job.row for job in running],
            positions,
            torch.cat([job.drawn[-1] for job in running]),
            torch.stack(
                [job.sequence.positions[:, at] for job, at in zip(running, positions, strict=True)], dim=1
            ),
        )
        self._draw(running, logits)

    def _draw(self, jobs: list[_Job], logits: torch.Tensor) -> None:
        """Draw a token for each job from its row of logits: shape (jobs, vocabulary)."""
        forbidden = torch.stack(
            [
                self._special
                if job.sequence.drawn - len(job.drawn) <= _size(job.sequence.target)
                else self._end
                for job in jobs
            ]
        )
        # After the processors and not before them: a draw that is allowed is the same with the mask and
        # without. Where they leave nothing that is, the model's own preference decides.
        scores = self._logits_processor(None, logits.clone()).masked_fill(forbidden, -torch.inf)
        nothing = torch.isneginf(scores).all(dim=-1, keepdim=True)
        scores = torch.where(nothing, logits.masked_fill(forbidden, -torch.inf), scores)
        for job, probabilities in zip(jobs, scores.softmax(dim=-1), strict=True):
            try:
                job.drawn.append(torch.multinomial(probabilities, num_samples=1, generator=job.generator))
            except RuntimeError as error:  # not a number: this row's alone
                self._leave(job, error)
                continue
            if len(job.drawn) == job.sequence.drawn:
                self._leave(job, _result(job))


def _single_threaded_executor() -> ThreadPoolExecutor:
    """One thread, and none of torch's own beside it.

    Where there are more OpenMP threads than cores, GNU's OpenMP puts them to sleep between two operators: a
    decoding step of the benchmark checkpoint took 18 ms instead of 10 on two cores.
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
    executor.submit(torch.set_num_threads, 1).result()
    executor.submit(torch.get_num_threads).result()  # only now does the number hold for that thread
    torch.set_num_threads(threads)  # setting it there has set it for all threads to come
    return executor


def _size(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def _result(job: _Job) -> PriorTokens:
    target = torch.cat(job.drawn[-_size(job.sequence.target) :]).view(job.sequence.target)
    sources = zip(job.image_tokens, job.sequence.sources, strict=True)
    return PriorTokens(
        target=target.cpu().numpy(), sources=tuple(tokens.view(grid).numpy() for tokens, grid in sources)
    )


def _logits_processor(model: GlmImageForConditionalGeneration) -> LogitsProcessorList:
    """What the checkpoint's `generation_config` asks for, as transformers' own `generate` prepares it."""

    def prepared(_: Any, __: torch.Tensor, *, logits_processor: LogitsProcessorList, **___: Any) -> Any:
        return logits_processor

    prompt = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    processors: LogitsProcessorList = model.generate(
        prompt, attention_mask=prompt + 1, do_sample=True, max_new_tokens=1, custom_generate=prepared
    )
    if unknown := [type(one).__name__ for one in processors if not isinstance(one, ROW_INDEPENDENT)]:
        raise CheckpointError(f"generation_config asks for {', '.join(unknown)}, which is not supported")
    return processors
