"""The prior engine of Z-Image: its text encoder, for several requests at once. No Ray in here."""

from __future__ import annotations

import queue
import time
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from deployments.engines.memory import cleared
from deployments.engines.prompts import plain_text
from deployments.errors import EngineFault, NotANumber, OutOfMemoryError, RequestTooLong, release
from deployments.families.z_image import checkpoint
from deployments.types import Progress, TextEmbeddings

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Qwen2Tokenizer, Qwen3Model

    from deployments.config import ModelConfig
    from deployments.stages.calls import Call
    from deployments.types import Embedding, ImageRequest

CACHE_BYTES = 256 * 2**20
"""Of embeddings, in the CPU's memory; the longest text takes 5 MB."""
GPU_LINES = 2
"""Texts of one batch on a GPU: a prompt and its negative prompt. Each is padded to `max_sequence_length`, so the
batch is bound by arithmetic already, and a larger one would not be faster."""

Tokens = tuple[int, ...]


class _Asked(NamedTuple):
    request: ImageRequest
    call: Call
    future: Future[TextEmbeddings]


class PriorEngine:
    """Encodes prompts and negative prompts, as many at once as there are; what it has made it keeps.

    For a text the embedding is the same whatever company it has. On a CPU it is that of
    `ZImagePipeline.encode_prompt` (diffusers 0.42); a GPU rounds by the shape of what it is given, so that
    there all batches are of one shape. A text that upstream would cut is refused.

    Args:
        text_encoder: the checkpoint's; its last layer, whose output nobody reads, is taken away.
        tokenizer: the checkpoint's.
        rows: texts of one batch, on a CPU, and requests that are answered together.
        max_sequence_length: of each, chat template included; shorter ones are padded.
    """

    def __init__(
        self, text_encoder: Qwen3Model, tokenizer: Qwen2Tokenizer, *, rows: int, max_sequence_length: int
    ) -> None:
        # Upstream reads what goes into the last layer: `hidden_states[-2]`, before the norm.
        text_encoder.layers = text_encoder.layers[:-1]
        text_encoder.norm = nn.Identity()
        self._text_encoder = text_encoder
        self._tokenizer = tokenizer
        self._rows = rows
        self._row_tokens = max_sequence_length
        self._fixed_shape = text_encoder.device.type != "cpu"
        self._lines = GPU_LINES if self._fixed_shape else rows
        self._asked: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        self._embeddings: OrderedDict[Tokens, Embedding] = OrderedDict()
        self.fault: EngineFault | None = None
        self.done = 0
        self.unit = "tokens"

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> PriorEngine:
        """See `deployments.families.PriorEngine`."""
        text_encoder, tokenizer = checkpoint.load_prior(model, report)
        return cls(
            text_encoder,
            tokenizer,
            rows=model.prior.max_batch_size,
            max_sequence_length=model.max_sequence_length,
        )

    def submit(self, request: ImageRequest, call: Call) -> Future[TextEmbeddings]:
        """See `deployments.families.PriorEngine`."""
        future: Future[TextEmbeddings] = Future()
        self._asked.put(_Asked(request, call, future))
        if self.fault:  # perhaps only now, and nobody will look at what waits any more
            raise self.fault
        return future

    def run(self) -> None:
        """Work until a fault, sleeping while there is nothing to do."""
        while not self.fault:
            asked = [self._asked.get()]
            with suppress(queue.Empty):
                while len(asked) < self._rows:
                    asked.append(self._asked.get_nowait())
            self._answer([one for one in asked if one.future.set_running_or_notify_cancel()])
        with suppress(queue.Empty):
            while True:
                self._asked.get_nowait().future.set_exception(self.fault)

    def _answer(self, asked: list[_Asked]) -> None:
        """Answer these requests together; each fails for its own reasons, and all for the device's."""
        began = time.monotonic()
        readable: list[tuple[_Asked, list[Tokens]]] = []
        for one in asked:
            try:
                texts = self._texts(one.request)
            except Exception as error:  # noqa: BLE001 - it is this request's alone
                one.future.set_exception(error)
                continue
            one.call.report(Progress(done=0, total=sum(map(len, texts)), seconds=0))
            readable.append((one, texts))
        try:
            self._encode({text for _, texts in readable for text in texts})
            for one, texts in readable:
                read = sum(map(len, texts))
                one.call.report(Progress(done=read, total=read, seconds=time.monotonic() - began))
                prompt, *negative = (self._embeddings[text] for text in texts)
                one.future.set_result(
                    TextEmbeddings(
                        prompt=prompt, negative_prompt=negative[0] if negative else None, text_tokens=read
                    )
                )
        except Exception as error:  # noqa: BLE001 - the device's, or the numbers'
            self._fail([one for one, _ in readable if not one.future.done()], error)
        self._forget()

    def _texts(self, request: ImageRequest) -> list[Tokens]:
        """The prompt and, if there is guidance, the negative prompt.

        Raises:
            RequestTooLong: one of them has more tokens than a row.
        """
        texts = {"prompt": request.prompt}
        if request.guidance_scale > 0:
            texts["negative_prompt"] = request.negative_prompt
        tokens: list[Tokens] = []
        for name, text in texts.items():
            message = {"role": "user", "content": plain_text(self._tokenizer, text)}
            ids = self._tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, enable_thinking=True, return_dict=True
            )["input_ids"]
            if len(ids) > self._row_tokens:
                raise RequestTooLong(len(ids), self._row_tokens, param=name, alone=True)
            tokens.append(tuple(ids))
        return tokens

    @torch.inference_mode()
    def _encode(self, texts: set[Tokens]) -> None:
        """Make the embeddings that are not there yet; all of them are the youngest then."""
        for text in texts & self._embeddings.keys():
            self._embeddings.move_to_end(text)
        missing = sorted(texts - self._embeddings.keys())
        for begin in range(0, len(missing), self._lines):
            batch = missing[begin : begin + self._lines]
            lines = self._lines if self._fixed_shape else len(batch)
            ids = torch.full((lines, self._row_tokens), self._tokenizer.pad_token_id)
            mask = torch.zeros((lines, self._row_tokens), dtype=torch.bool)
            mask[:, 0] = True  # of lines that stay empty
            for line, text in enumerate(batch):
                ids[line, : len(text)] = torch.tensor(text)
                mask[line, : len(text)] = True
            device = self._text_encoder.device
            hidden = self._text_encoder(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).last_hidden_state
            if not torch.isfinite(hidden[: len(batch)][mask[: len(batch)].to(device)]).all():
                raise NotANumber("the text encoder's embeddings are not numbers")
            for text, line in zip(batch, hidden, strict=False):
                # A copy: a part of the batch would keep the whole of it.
                self._embeddings[text] = line[: len(text)].float().cpu().numpy().copy()
                self.done += len(text)

    def _fail(self, asked: list[_Asked], error: Exception) -> None:
        release(error, request_id=" ".join(one.call.request_id for one in asked))
        if isinstance(error, torch.OutOfMemoryError):
            error = OutOfMemoryError(f"the text encoder has too little memory for this request: {error}")
        if lost := cleared(self._text_encoder.device):
            error = self.fault = EngineFault(f"the text encoder stopped: {lost}")
        for one in asked:
            one.future.set_exception(error)

    def _forget(self) -> None:
        size = sum(embedding.nbytes for embedding in self._embeddings.values())
        while size > CACHE_BYTES:
            size -= self._embeddings.popitem(last=False)[1].nbytes
