"""A chat model of transformers that rewrites prompts. It does not use Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments.engines.checkpoint import load_flat
from deployments.engines.guard import guarded
from deployments.engines.prompts import plain_text
from deployments.errors import Cancelled
from deployments.helpers.chat_model import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from deployments.config import ChatModelConfig
    from deployments.errors import EngineFault
    from deployments.stages.calls import Call
    from deployments.types import ExpansionRequest


class ChatModel:
    """Answers one request at a time with the most probable tokens. Equal requests get equal answers.

    One thread at a time may use it.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model, with a chat template.

    Attributes:
        model: the language model.
        tokenizer: its tokenizer.
        fault: fault that has stopped the model for good, or None while it works.
        work: number of `tokens` generated so far.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        # A checkpoint's sampling settings have no effect on the most probable tokens, but cause warnings.
        settings = model.generation_config
        settings.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None)
        if model.device.type == "cuda":
            # On Hopper, cuDNN would plan its attention again for each cache length, about 30 ms a token.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.fault: EngineFault | None = None
        self.work = {"tokens": 0}

    @classmethod
    def load(cls, config: ChatModelConfig, report: Callable[[float], None] = lambda _: None) -> ChatModel:
        """Loads the chat model.

        Args:
            config: configuration of the model.
            report: takes the share of the weights that is loaded, 0 to 1.

        Raises:
            CheckpointError: the checkpoint is missing or unusable.
        """
        model, tokenizer = load_flat(
            config,
            AutoModelForCausalLM,
            AutoTokenizer,
            report,
            built_in={"tiny": tiny.cached},
            device=config.device,
            dtype=config.dtype,
        )
        return cls(model, tokenizer)

    def expand(self, request: ExpansionRequest, call: Call) -> str:
        """Returns the model's answer to the prompt.

        Raises:
            Cancelled: the call was cancelled. Raised within a token.
            OutOfMemoryError: the device has too little memory.
            EngineFault: the model has stopped for good.
        """
        with guarded(self, self.model.device, "the chat model", request_id=call.request_id):
            return self._expand(request, call)

    @torch.inference_mode()
    def _expand(self, request: ExpansionRequest, call: Call) -> str:
        read = self.tokenizer.apply_chat_template(
            [
                {"role": "system", "content": request.instruction},
                {"role": "user", "content": plain_text(self.tokenizer, request.prompt)},
            ],
            add_generation_prompt=True,
            enable_thinking=False,  # for models that can think; other templates ignore it
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)

        def after_token(*_: object, **__: object) -> bool:
            self.work["tokens"] += 1
            if call.cancelled.is_set():
                raise Cancelled
            return False

        answer = self.model.generate(
            **read, max_new_tokens=request.max_tokens, stopping_criteria=[after_token]
        )
        text = self.tokenizer.decode(answer[0, read["input_ids"].shape[1] :], skip_special_tokens=True)
        return str(text)
