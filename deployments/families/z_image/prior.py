"""The prior engine of Z-Image: its text encoder, for several requests at once. It does not use Ray."""

from __future__ import annotations

import queue
import time
from collections import OrderedDict
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from deployments.engines.guard import guarded
from deployments.engines.prompts import plain_text
from deployments.errors import NotANumber, RequestTooLong
from deployments.families.z_image import checkpoint
from deployments.types import Progress, TextEmbeddings

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Qwen2Tokenizer, Qwen3Model

    from deployments.config import ModelConfig
    from deployments.errors import EngineFault
    from deployments.stages.calls import Call
    from deployments.types import Embedding, ImageRequest

CACHE_BYTES = 256 * 2**20
"""Bytes of CPU memory for cached embeddings. The longest text takes 5 MB."""
GPU_BATCH_SIZE = 2
"""Number of texts in a batch on a GPU: a prompt and its negative prompt.

Each is padded to `max_sequence_length`. So the batch is bound by arithmetic already, and a larger one would
not be faster.
"""

Tokens = tuple[int, ...]


class _PendingRequest(NamedTuple):
    request: ImageRequest
    call: Call
    future: Future[TextEmbeddings]


class PriorEngine:
    """Encodes prompts and negative prompts in batches, and caches the embeddings.

    A text's embedding does not depend on the other texts of its batch. On a CPU it is identical to that of
    `ZImagePipeline.encode_prompt` (diffusers 0.42). On a GPU, rounding depends on the input's shape, so that
    all batches have the same shape. A text that upstream would truncate is rejected.

    Args:
        text_encoder: text encoder of the checkpoint. Its last layer, whose output is unused, is removed.
        tokenizer: tokenizer of the checkpoint.
        max_batch_size: largest number of requests in a batch, and on a CPU also of texts in one pass.
        max_sequence_length: number of tokens of each text, chat template included. Shorter texts are padded.

    Attributes:
        text_encoder: the text encoder.
        texts_a_pass: number of texts of every pass, some of them empty. None if it varies.
    """

    def __init__(
        self,
        text_encoder: Qwen3Model,
        tokenizer: Qwen2Tokenizer,
        *,
        max_batch_size: int,
        max_sequence_length: int,
    ) -> None:
        # Upstream reads the input of the last layer: `hidden_states[-2]`, before the norm.
        text_encoder.layers = text_encoder.layers[:-1]
        text_encoder.norm = nn.Identity()
        self.text_encoder = text_encoder
        self._tokenizer = tokenizer
        self._max_batch_size = max_batch_size
        self._max_sequence_length = max_sequence_length
        self.texts_a_pass = None if text_encoder.device.type == "cpu" else GPU_BATCH_SIZE
        self._queue: queue.SimpleQueue[_PendingRequest] = queue.SimpleQueue()
        self._embeddings: OrderedDict[Tokens, Embedding] = OrderedDict()
        self.fault: EngineFault | None = None
        self.work = {"tokens": 0}

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> PriorEngine:
        """Implements `deployments.families.FamilyEngine.load`."""
        text_encoder, tokenizer = checkpoint.load_prior(model, report)
        return cls(
            text_encoder,
            tokenizer,
            max_batch_size=model.prior.max_batch_size,
            max_sequence_length=model.max_sequence_length,
        )

    def submit(self, request: ImageRequest, call: Call) -> Future[TextEmbeddings]:
        """Implements `deployments.families.PriorEngine.submit`."""
        future: Future[TextEmbeddings] = Future()
        self._queue.put(_PendingRequest(request, call, future))
        if self.fault:  # it may have come after `put`, when the queue is no longer read
            raise self.fault
        return future

    def run(self) -> None:
        """Processes requests until a fault, and sleeps while there are none."""
        while not self.fault:
            batch = [self._queue.get()]
            with suppress(queue.Empty):
                while len(batch) < self._max_batch_size:
                    batch.append(self._queue.get_nowait())
            self._process_batch(
                [pending for pending in batch if pending.future.set_running_or_notify_cancel()]
            )
        with suppress(queue.Empty):
            while True:
                future = self._queue.get_nowait().future
                with suppress(InvalidStateError):  # the request was cancelled while it waited
                    future.set_exception(self.fault)

    def _process_batch(self, batch: list[_PendingRequest]) -> None:
        """Processes a batch of requests. A tokenizer error fails one request, a device error all of them."""
        started_at = time.monotonic()
        readable: list[tuple[_PendingRequest, list[Tokens]]] = []
        for pending in batch:
            try:
                texts = self._tokenize(pending.request)
            except Exception as error:  # noqa: BLE001 - only this request fails with it
                pending.future.set_exception(error)
                continue
            pending.call.report(Progress(done=0, total=sum(map(len, texts)), seconds=0))
            readable.append((pending, texts))
        request_ids = " ".join(pending.call.request_id for pending, _ in readable)
        try:
            with guarded(self, self.text_encoder.device, "the text encoder", request_id=request_ids):
                self._encode({text for _, texts in readable for text in texts})
                for pending, texts in readable:
                    read = sum(map(len, texts))
                    pending.call.report(
                        Progress(done=read, total=read, seconds=time.monotonic() - started_at)
                    )
                    prompt, *negative = (self._embeddings[text] for text in texts)
                    pending.future.set_result(
                        TextEmbeddings(
                            prompt=prompt, negative_prompt=negative[0] if negative else None, text_tokens=read
                        )
                    )
        except Exception as error:  # noqa: BLE001 - the device or the numbers are at fault
            # A traceback would hold this frame, and the frame the futures that hold the error.
            failure = (self.fault or error).with_traceback(None)
            for pending, _ in readable:
                if not pending.future.done():
                    pending.future.set_exception(failure)
        self._evict()

    def _tokenize(self, request: ImageRequest) -> list[Tokens]:
        """Returns the tokens of the prompt and, with guidance, of the negative prompt.

        Raises:
            RequestTooLong: a text has more than `max_sequence_length` tokens.
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
            if len(ids) > self._max_sequence_length:
                raise RequestTooLong(len(ids), self._max_sequence_length, param=name, alone=True)
            tokens.append(tuple(ids))
        return tokens

    @torch.inference_mode()
    def _encode(self, texts: set[Tokens]) -> None:
        """Computes the embeddings that are not cached, and marks all of the texts as most recently used."""
        for text in texts & self._embeddings.keys():
            self._embeddings.move_to_end(text)
        missing = sorted(texts - self._embeddings.keys())
        most = self.texts_a_pass or self._max_batch_size
        for begin in range(0, len(missing), most):
            batch = missing[begin : begin + most]
            lines = self.texts_a_pass or len(batch)
            ids = torch.full((lines, self._max_sequence_length), self._tokenizer.pad_token_id)
            mask = torch.zeros((lines, self._max_sequence_length), dtype=torch.bool)
            mask[:, 0] = True  # for lines that stay empty
            for line, text in enumerate(batch):
                ids[line, : len(text)] = torch.tensor(text)
                mask[line, : len(text)] = True
            device = self.text_encoder.device
            hidden = self.text_encoder(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).last_hidden_state
            if not torch.isfinite(hidden[: len(batch)][mask[: len(batch)].to(device)]).all():
                raise NotANumber("the text encoder's embeddings are not finite")
            for text, line in zip(batch, hidden, strict=False):
                # The embedding is copied, because a view would keep the whole batch in memory.
                self._embeddings[text] = line[: len(text)].float().cpu().numpy().copy()
                self.work["tokens"] += len(text)

    def _evict(self) -> None:
        size = sum(embedding.nbytes for embedding in self._embeddings.values())
        while size > CACHE_BYTES:
            size -= self._embeddings.popitem(last=False)[1].nbytes
