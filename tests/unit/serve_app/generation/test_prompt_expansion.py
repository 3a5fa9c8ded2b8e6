"""Prompt expansion: quoted texts stay as they are, and any failure keeps the prompt."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engines.prompts import quoted_texts
from deployments.errors import LoadingFailed
from deployments.types import ExpansionRequest
from serve_app.config import EndpointConfig, OutboundConfig, PromptExpanderConfig
from serve_app.errors import Busy, ReplicaDied
from serve_app.generation.prompt_expansion import Ask, Expansion, ExpansionError, PromptExpansion, by_endpoint
from serve_app.outbound import Outbound

ENDPOINT = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}


def expand(
    prompt: str, ask: Ask, *, editing: bool = False, max_chars: int = 1000, **config: Any
) -> Expansion:
    settings = PromptExpanderConfig.model_validate({"endpoint": ENDPOINT} | config)
    return asyncio.run(PromptExpansion(settings, ask, max_chars).expand(prompt, editing=editing))


def answering(answer: str | Exception) -> Ask:
    async def ask(_: ExpansionRequest) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


TEXT = st.text(alphabet="ab '\"“”「」", max_size=16)


@given(TEXT, TEXT)
def test_a_new_prompt_has_the_same_quoted_texts_or_is_rejected(prompt: str, answer: str) -> None:
    expansion = expand(prompt, answering(answer))
    if expansion.problem:
        assert expansion.prompt == prompt
    else:
        assert expansion.prompt == answer.strip() != ""
    assert quoted_texts(expansion.prompt) == quoted_texts(prompt)


@pytest.mark.parametrize(
    ("prompt", "answer", "taken"),
    [
        ("a boat", " A red boat.\n", "A red boat."),
        ('a boat called "Aurora"', 'A red boat, "Aurora" on its bow', 'A red boat, "Aurora" on its bow'),
        ('a boat called "Aurora"', 'A red boat, "aurora" on its bow', None),
        ('a boat called "Aurora"', "A red boat", None),
        ('a boat called "Aurora"', "A red boat, “Aurora” on its bow", "A red boat, “Aurora” on its bow"),
        ("a boat", 'A boat called "Aurora"', None),
        ("a boat", "The boat's bow and the boat's stern", None),
        ("a boat", "<think>Hm: a boat.</think>\nA red boat", "A red boat"),
        ("a boat", "<think>Hm: a boat", None),
        ("a boat", " \n", None),
        ("a boat", "A red boat" * 10, None),
    ],
)
def test_an_answer_is_a_new_prompt_or_is_rejected(prompt: str, answer: str, taken: str | None) -> None:
    expansion = expand(prompt, answering(answer), max_chars=60)
    assert expansion.prompt == (taken or prompt)
    assert bool(expansion.problem) == (taken is None)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ExpansionError("it is down"), "it is down"),
        (LoadingFailed("/secret/folder is missing"), "could not be loaded: …/folder is missing"),
        (Busy("The server is busy; try again later."), "busy"),
        (ReplicaDied(), "the language model failed"),
        (RuntimeError("a boat"), "the language model failed; the server's log says why"),
    ],
)
def test_a_failure_is_reported_and_the_prompt_stays(error: Exception, problem: str) -> None:
    expansion = expand("a boat", answering(error))
    assert expansion.prompt == "a boat"
    assert problem in expansion.problem
    assert "a boat" not in expansion.problem


def test_expansion_is_bounded_in_time() -> None:
    async def never(_: ExpansionRequest) -> str:
        await asyncio.Event().wait()
        return ""

    expansion = expand("a boat", never, timeout_s=0.05)
    assert expansion.prompt == "a boat"
    assert expansion.problem == "the language model took longer than 0.05 s"
    assert expansion.seconds >= 0.05


def test_the_model_gets_an_instruction_and_a_bound_on_its_answer() -> None:
    asked: list[ExpansionRequest] = []

    async def ask(request: ExpansionRequest) -> str:
        asked.append(request)
        return "a red boat"

    expand("a boat", ask, max_tokens=7)
    expand("a boat", ask, editing=True)
    assert [request.prompt for request in asked] == ["a boat", "a boat"]
    assert asked[0].max_tokens == 7
    assert "quotation marks" in asked[0].instruction
    assert asked[1].instruction.startswith(asked[0].instruction)
    assert "changed" in asked[1].instruction.removeprefix(asked[0].instruction)


class Endpoint(ThreadingHTTPServer):
    """An HTTP server that need not be a language model."""

    daemon_threads = True

    def __init__(self) -> None:
        self.status, self.body = 200, b""
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.holds = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            server: Endpoint

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.server.asked.append((self.path, dict(self.headers), json.loads(body)))
                self.send_response(self.server.status)
                for name, value in self.server.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(self.server.body)
                self.wfile.flush()
                self.server.holds.wait(30 if self.server.headers.get("X-Slow") else 0)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def answer(self, content: object) -> None:
        self.body = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.holds.set()
        server.shutdown()
        thread.join()


def asking(endpoint: Endpoint, *, allowed: bool = True, **config: str) -> Ask:
    outbound = Outbound(OutboundConfig(allow=(endpoint.place,) if allowed else ()))
    fields = {"base_url": f"http://{endpoint.place}/v1", "model": "some-model"}
    return by_endpoint(EndpointConfig.model_validate(fields | config), outbound)


def test_an_endpoint_is_called_by_openais_api(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPANDER_KEY", "key-40fe21")
    endpoint.answer("A red boat")
    assert expand("a boat", asking(endpoint, key_env="EXPANDER_KEY"), max_tokens=9).prompt == "A red boat"
    ((path, headers, body),) = endpoint.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer key-40fe21"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("some-model", 9, 0)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == "a boat"


def test_no_key_is_sent_without_one_and_a_variable_that_is_not_set_is_an_error(endpoint: Endpoint) -> None:
    endpoint.answer("A red boat")
    expand("a boat", asking(endpoint))
    assert "Authorization" not in endpoint.asked[0][1]
    with pytest.raises(ValueError, match="NO_SUCH_KEY is not set"):
        asking(endpoint, key_env="NO_SUCH_KEY")


def test_an_address_that_is_not_public_is_called_only_if_it_is_allowed(endpoint: Endpoint) -> None:
    endpoint.answer("A red boat")
    expansion = expand("a boat", asking(endpoint, allowed=False))
    assert expansion.problem == "the language model's endpoint does not lead to a public address"
    assert not endpoint.asked


def set_status(status: int, **headers: str) -> Callable[[Endpoint], None]:
    def change(endpoint: Endpoint) -> None:
        endpoint.answer("A red boat")
        endpoint.status, endpoint.headers = status, headers

    return change


def set_body(body: bytes) -> Callable[[Endpoint], None]:
    def change(endpoint: Endpoint) -> None:
        endpoint.body = body

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_status(500), "answered with status 500"),
        (set_status(401), "answered with status 401"),
        (set_status(302, Location="/v1/chat/completions"), "answered with status 302"),
        (set_status(200, **{"X-Slow": "1"}), "took longer than 1 s"),
        (set_body(b""), "gave no valid answer"),
        (set_body(b"not json"), "gave no valid answer"),
        (set_body(b'{"choices": []}'), "gave no valid answer"),
        (set_body(b'{"choices": [{"message": {"content": null}}]}'), "gave no valid answer"),
        (set_body(b"[" * 100_000), "gave no valid answer"),
        (set_body(b" " * (2**20 + 1)), "has more than the 1048576 bytes allowed"),
    ],
)
def test_a_failing_endpoint_keeps_the_prompt(
    endpoint: Endpoint, change: Callable[[Endpoint], None], problem: str
) -> None:
    change(endpoint)
    expansion = expand("a boat", asking(endpoint), timeout_s=1)
    assert expansion.prompt == "a boat"
    assert problem in expansion.problem
    assert len(endpoint.asked) == 1


def test_an_unreachable_endpoint_keeps_the_prompt(endpoint: Endpoint) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    outbound = Outbound(OutboundConfig(allow=(f"127.0.0.1:{port}",)))
    config = EndpointConfig.model_validate({"base_url": f"http://127.0.0.1:{port}/v1", "model": "m"})
    assert "could not be reached" in expand("a boat", by_endpoint(config, outbound)).problem


def test_exactly_one_of_the_two_ways_is_configured() -> None:
    chat_model = {"checkpoint": "tiny", "device": "cpu"}
    for fields in ({}, {"endpoint": ENDPOINT, "chat_model": chat_model}):
        with pytest.raises(ValueError, match="give either chat_model or endpoint"):
            PromptExpanderConfig.model_validate(fields)
