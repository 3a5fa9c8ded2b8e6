"""Prompt expansion by a language model. A prompt whose expansion fails stays as it is."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from deployments.engines.prompts import quoted_texts
from deployments.errors import LoadingFailed
from deployments.observability import tracing
from deployments.observability.log import FAULT
from deployments.types import ExpansionRequest
from serve_app.errors import RequestError
from serve_app.outbound import OutboundError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from deployments.types import Event
    from serve_app.config import EndpointConfig, PromptExpanderConfig
    from serve_app.outbound import Outbound

logger = logging.getLogger("ray.serve")

NAME = "prompt expander"
"""Name for loading and unloading. It contains a space, so no model can have it."""
INSTRUCTION = (
    "You rewrite prompts for a text-to-image model. Describe the same picture in more detail: subject, "
    "setting, composition, light, colours, style. Keep everything that the prompt says, and its "
    "language. Text in quotation marks is painted into the picture: copy it, quotation marks included, "
    "exactly as it is and as often as it is there, and use quotation marks and apostrophes for nothing "
    "else. Answer with the new prompt alone, in one paragraph, without an introduction."
)
EDITING = (
    " This prompt says how a given picture, which you cannot see, is to be changed: say more exactly "
    "what is to change, and leave everything else as it is."
)
THINKING = re.compile(r"\A\s*<think>.*</think>", re.DOTALL)
MAX_ANSWER_BYTES = 2**20

Ask = Callable[[ExpansionRequest], Awaitable[str]]


class ExpansionError(Exception):
    """The reason why a prompt was not expanded, for the client. It holds nothing of the prompt."""


class Expansion(NamedTuple):
    """The outcome of an expansion.

    Attributes:
        prompt: the new prompt, or the old one after a problem.
        seconds: seconds that it took.
        problem: why it is the old prompt; empty if it is not.
    """

    prompt: str
    seconds: float = 0
    problem: str = ""


class PromptExpansion:
    """Expands prompts within bounds.

    An expansion depends on the prompt alone, not on a seed. So each image of a request is the one that its
    seed gives alone.

    Args:
        config: the bounds.
        ask: calls the language model.
        max_chars: longest prompt, in characters.
    """

    def __init__(self, config: PromptExpanderConfig, ask: Ask, max_chars: int) -> None:
        self._config = config
        self._ask = ask
        self._max_chars = max_chars

    async def expand(self, prompt: str, *, editing: bool, request_id: str = "") -> Expansion:
        """Returns the expansion of a prompt. Never raises: after a problem it holds the old prompt.

        Args:
            prompt: the prompt as sent.
            editing: whether there are source images.
            request_id: id of the request.
        """
        began = time.monotonic()
        request = ExpansionRequest(
            instruction=INSTRUCTION + (EDITING if editing else ""),
            prompt=prompt,
            max_tokens=self._config.max_tokens,
            request_id=request_id,
            traceparent=tracing.traceparent(),
        )
        problem = ""
        try:
            async with asyncio.timeout(self._config.timeout_s):
                expanded = self._checked(prompt, await self._ask(request))
        except ExpansionError as error:
            problem = str(error)
        except TimeoutError:
            problem = f"the language model took longer than {self._config.timeout_s:g} s"
        except LoadingFailed as error:
            problem = f"the language model could not be loaded: {error.reason}"
        except RequestError as error:
            problem = error.message
        except Exception:
            logger.exception("a prompt could not be expanded", extra=FAULT)
            problem = "the language model failed; the server's log says why"
        return Expansion(prompt if problem else expanded, time.monotonic() - began, problem)

    def _checked(self, prompt: str, answer: str) -> str:
        """Returns the new prompt.

        Raises:
            ExpansionError: the answer is not usable as a prompt.
        """
        expanded = THINKING.sub("", answer).strip()
        if not expanded or "<think>" in expanded:
            raise ExpansionError("the language model came to no answer")
        if len(expanded) > self._max_chars:
            raise ExpansionError(f"the language model's answer has more than {self._max_chars} characters")
        if quoted_texts(expanded) != quoted_texts(prompt):
            raise ExpansionError("the language model changed what stands in quotation marks")
        return expanded


def by_deployment(expand: Callable[[ExpansionRequest], AsyncGenerator[Event | str, None]]) -> Ask:
    """Returns a function that calls our own chat model, by its deployment's method."""

    async def ask(request: ExpansionRequest) -> str:
        answer = ""
        async with aclosing(expand(request)) as events:
            async for event in events:
                if isinstance(event, str):
                    answer = event
        return answer

    return ask


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    """The part of an answer that is read: https://platform.openai.com/docs/api-reference/chat/object."""

    choices: list[_Choice] = Field(min_length=1)


def by_endpoint(config: EndpointConfig, outbound: Outbound) -> Ask:
    """Returns a function that calls a model behind OpenAI's API.

    https://platform.openai.com/docs/api-reference/chat/create

    Raises:
        ValueError: the environment variable of the key is not set.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if config.key_env:
        if not (key := os.environ.get(config.key_env)):
            raise ValueError(f"prompt_expander.endpoint: the variable {config.key_env} is not set")
        headers["Authorization"] = f"Bearer {key}"
    url = f"{str(config.base_url).rstrip('/')}/chat/completions"

    async def ask(request: ExpansionRequest) -> str:
        body = {
            "model": config.model,
            "messages": [
                {"role": "system", "content": request.instruction},
                {"role": "user", "content": request.prompt},
            ],
            "max_tokens": request.max_tokens,
            # The most probable answer, and always the same one, as far as the endpoint can.
            "temperature": 0,
            "seed": 0,
        }
        try:
            status, answer = await outbound.ask(
                url, json.dumps(body).encode(), headers, max_bytes=MAX_ANSWER_BYTES
            )
        except OutboundError as error:
            raise ExpansionError(f"the language model's endpoint {error.problem}") from error
        if status != 200:
            raise ExpansionError(f"the language model's endpoint answered with status {status}")
        try:
            return _Completion.model_validate_json(answer).choices[0].message.content
        except ValidationError:
            raise ExpansionError("the language model's endpoint gave no valid answer") from None

    return ask
