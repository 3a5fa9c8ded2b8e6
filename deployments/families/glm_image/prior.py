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
from deployments.families.glm_image.language_model import SLICE_TOKENS
from deployments.families.glm_image.language_model_cpu import CPULanguageModel
from deployments.families.glm_image.language_model_gpu import GPULanguageModel
from deployments.families.glm_image.sampling import UNSOUND
from deployments.families.glm_image.sequence import Sequencer
from deployments.families.glm_image.versions import image_tokens
from deployments.types import PriorTokens, Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import GlmImageForConditionalGeneration, GlmImageProcessor

    from deployments.config import ModelConfig, Speculation
    from deployments.families.glm_image.language_model import LanguageModel
    from deployments.families.glm_image.sequence import Sequence
    from deployments.stages.calls import Call
    from deployments.types import ImageRequest

MIN_REPORT_INTERVAL_S = 0.25
"""Minimum number of seconds between two reports of a request's progress."""


@dataclass(eq=False, kw_only=True)
class _RequestState:
    """State of a request in the engine: its row of the cache, and how far it has come."""

    sequence: Sequence
    seed: int
    call: Call
    future: Future[PriorTokens]
    row: int = -1
    started_at: float = 0
    reported_at: float = 0
    prompt: torch.Tensor = field(init=False)
    image_tokens: list[torch.Tensor] = field(default_factory=list)
    read: int = 0
    drawn: int = 0
    passes: int = 0

    def report(self, now: float) -> None:
        """Reports the progress at the end, and otherwise at most every `MIN_REPORT_INTERVAL_S` seconds."""
        if now - self.reported_at >= MIN_REPORT_INTERVAL_S or self.drawn == self.sequence.drawn:
            self.reported_at = now
            self.call.report(
                Progress(done=self.drawn, total=self.sequence.drawn, seconds=now - self.started_at)
            )


def on_its_device(
    model: GlmImageForConditionalGeneration,
    rows: int,
    max_sequence_length: int,
    speculation: Speculation = "auto",
) -> LanguageModel:
    """Returns the language model for the device that holds the weights."""
    runner = CPULanguageModel if model.device.type == "cpu" else GPULanguageModel
    return runner(model, rows=rows, max_sequence_length=max_sequence_length, speculation=speculation)


class PriorEngine:
    """Samples prior tokens for several requests at once. They join and leave the batch between two passes.

    The tokens of a seed do not depend on other running requests. On a CPU they are identical to those of
    `GlmImagePipeline.generate_prior_tokens` (diffusers 0.42), with rare exceptions. For one seed in several
    hundred (with the tiny checkpoint), floating-point rounding changes the top-p cutoff. On a GPU all sums
    are rounded differently.

    Upstream fails if it draws a special token inside the target grid, or an end token before it. An image
    token is drawn here instead. The end token after the grid is not needed and not drawn.

    `submit` may be called from any thread, `step` from one.

    Args:
        model: upstream's model, which encodes source images.
        processor: upstream's processor.
        language_model: language model of the same weights.

    Attributes:
        model: upstream's model.
        language_model: the language model.
    """

    def __init__(
        self,
        model: GlmImageForConditionalGeneration,
        processor: GlmImageProcessor,
        language_model: LanguageModel,
    ) -> None:
        self.model = model
        self.language_model = language_model
        self._sequencer = Sequencer(model, processor)
        self._preparing = _single_threaded_executor()
        self._waiting: deque[_RequestState] = deque()
        self._active: list[_RequestState] = []
        self._free = list(reversed(range(language_model.rows)))
        self._arrived = threading.Event()
        self.fault: EngineFault | None = None
        self.work = {"tokens": 0, "passes": 0}

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> PriorEngine:
        """Implements `deployments.families.FamilyEngine.load`."""
        compiles = model.prior.device == "cuda"
        if compiles:
            compilation.prepare(model.compile_cache)
        weights, processor = checkpoint.load_prior(
            model, part_of(report, 0, WEIGHTS_SHARE if compiles else 1)
        )
        language_model = on_its_device(
            weights, model.prior.max_batch_size, model.max_sequence_length, model.prior.speculation
        )
        engine = cls(weights, processor, language_model)
        report(1)
        return engine

    def submit(self, request: ImageRequest, call: Call) -> Future[PriorTokens]:
        """Implements `deployments.families.PriorEngine.submit`. Rows are assigned in order of submission."""
        future: Future[PriorTokens] = Future()
        if self.fault:
            raise self.fault
        self._preparing.submit(self._prepare, request, call, future)
        return future

    def _prepare(self, request: ImageRequest, call: Call, future: Future[PriorTokens]) -> None:
        """Tokenizes the prompt and cuts the source images into patches, while the device works."""
        try:
            sequence = self._sequencer.sequence(request)
            if sequence.length > self.language_model.max_sequence_length:
                raise RequestTooLong(sequence.length, self.language_model.max_sequence_length)  # noqa: TRY301 - all errors are caught in one place
        except Exception as error:  # noqa: BLE001 - the future passes it to the caller
            future.set_exception(error)
            return
        state = _RequestState(sequence=sequence, seed=request.seed, call=call, future=future)
        self._waiting.append(state)
        if self.fault:  # the fault is newer than `submit`, and the queue is no longer read
            future.set_exception(self.fault)
        self._arrived.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for a prepared request that no earlier call has waited for. Returns whether there is one."""
        is_set = self._arrived.wait(timeout_s)
        if is_set:  # otherwise it may be set just now, and must stay so
            self._arrived.clear()
        return is_set

    def run(self) -> None:
        """Processes requests until a fault, and sleeps while there are none."""
        while not self.fault:
            self.wait()
            try:
                while self.step():
                    pass
            except Exception as error:  # noqa: BLE001 - all requests fail with it
                release(error, "the prior engine stopped")
                self.fault = EngineFault(f"the prior engine stopped: {error}")
                for state in (*self._active, *self._waiting):
                    with suppress(InvalidStateError):  # the request was cancelled while it waited
                        state.future.set_exception(self.fault)

    @torch.inference_mode()
    def step(self) -> bool:
        """Reads a slice of one new prompt and runs a pass that draws tokens for every other request.

        Returns:
            Whether any request is unfinished.
        """
        self._drop_cancelled()
        self._admit()
        reading = next((state for state in self._active if state.read < len(state.sequence.prompt)), None)
        if reading:
            try:
                self._read_slice(reading)
            except Exception as error:  # noqa: BLE001 - only this request fails with it
                release(error, request_id=reading.call.request_id)
                self.language_model.recover()  # raises an error if the device is lost
                self._finish(reading, _as_model_error(error))
        if any(state.drawn for state in self._active):
            self._draw_next()
        return bool(self._active or self._waiting)

    def _admit(self) -> None:
        while self._free and self._waiting:
            state = self._waiting.popleft()
            if state.future.set_running_or_notify_cancel():
                state.row = self._free.pop()
                state.prompt = state.sequence.prompt.clone()
                state.started_at = time.monotonic()
                state.report(state.started_at)
                self._active.append(state)

    def _drop_cancelled(self) -> None:
        for state in [state for state in self._active if state.call.cancelled.is_set()]:
            self._finish(state, Cancelled())

    def _finish(self, state: _RequestState, outcome: PriorTokens | Exception) -> None:
        self._active.remove(state)
        self.language_model.end(state.row)
        self._free.append(state.row)
        if isinstance(outcome, Exception):
            self.language_model.clear(state.row)  # it may hold NaN
            state.future.set_exception(outcome)
        else:
            state.future.set_result(outcome)

    def _read_slice(self, state: _RequestState) -> None:
        """Encodes the next source image. After the last one, reads the next slice of the prompt."""
        sequence = state.sequence
        if len(state.image_tokens) < len(sequence.sources):
            self._encode_source(state)
            return
        if state.read == 0:
            source = state.image_tokens[0].view(sequence.sources[0]) if sequence.sources else None
            self.language_model.begin(state.row, sequence, state.seed, source)
        end = min(state.read + SLICE_TOKENS, len(state.prompt))
        self.language_model.prefill(state.row, state.read, state.prompt[state.read : end])
        state.read = end
        if state.read == len(state.prompt):
            self._settle(state, 1)

    def _encode_source(self, state: _RequestState) -> None:
        sequence, done = state.sequence, len(state.image_tokens)
        assert sequence.pixel_values is not None  # noqa: S101 - there are sources
        sizes = [rows * columns for rows, columns in sequence.sources]
        pixel_values = sequence.pixel_values.split(sizes)[done].to(self.model.device)
        grid = torch.tensor([[1, *sequence.sources[done]]], device=self.model.device)
        state.image_tokens.append(image_tokens(self.model, pixel_values, grid).cpu())
        if len(state.image_tokens) == len(sequence.sources):
            placeholders = state.prompt == self.model.config.image_token_id
            state.prompt[placeholders] = torch.cat(state.image_tokens)

    def _draw_next(self) -> None:
        """Draws tokens for every request whose prompt has been read."""
        by_row = {state.row: state for state in self._active}
        for row, settled in self.language_model.decode().items():
            self.work["passes"] += 1
            by_row[row].passes += 1
            self._settle(by_row[row], settled)

    def _settle(self, state: _RequestState, settled: int) -> None:
        """Takes the number of a request's settled tokens, and finishes a request that has all its tokens."""
        self.work["tokens"] += settled - state.drawn
        state.drawn = settled
        state.report(time.monotonic())
        if state.drawn == state.sequence.drawn:
            self._finish(state, _result(state, self.language_model.drawn(state.row)))


def _as_model_error(error: Exception) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemoryError(f"the prior stage has too little memory for this request: {error}")
    return error


def _single_threaded_executor() -> ThreadPoolExecutor:
    """Returns an executor with one thread, in which torch starts no further threads.

    With more OpenMP threads than cores, GNU's OpenMP puts them to sleep between two operators. A decoding
    step of the benchmark checkpoint took 18 ms instead of 10 on two cores.
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
    executor.submit(torch.set_num_threads, 1).result()
    executor.submit(torch.get_num_threads).result()  # only now does the number apply to that thread
    torch.set_num_threads(threads)  # setting it there has set it for all future threads
    return executor


def _result(state: _RequestState, drawn: torch.Tensor) -> PriorTokens | NotANumber:
    if (drawn == UNSOUND).any():
        return NotANumber("the prior stage's logits are not finite")
    rows, columns = state.sequence.target
    sources = zip(state.image_tokens, state.sequence.sources, strict=True)
    return PriorTokens(
        target=drawn[-rows * columns :].view(rows, columns).numpy(),
        sources=tuple(tokens.view(grid).numpy() for tokens, grid in sources),
        text_tokens=len(state.sequence.prompt)
        - sum(rows * columns for rows, columns in state.sequence.sources),
        source_tokens=sum(rows * columns for rows, columns in state.sequence.sources),
        generated_tokens=len(drawn),
        passes=state.passes,
    )
