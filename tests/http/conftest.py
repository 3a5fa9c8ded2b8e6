"""Servers without Ray: `create_app` over stand-ins for the stages, in a thread, at a real address.

So HTTP itself is tested, and the vendors' own clients, in a fraction of a real server's time.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import AppConfig
from serve_app.files.store import FileStore
from serve_app.generation.generator import Generator
from serve_app.generation.sources import SourceReader
from serve_app.http.application import create_app
from serve_app.http.services import Services
from serve_app.http.tls import self_signed
from serve_app.jobs.database import Database
from serve_app.outbound import Outbound
from tests.http.stages import BROKEN, Stages, lifecycle
from tests.polling import until
from tests.receiver import Receiver

ROOT = Path(__file__).parents[2]
KEY, OTHER_KEY = "key-1b7a90", "0123456789abcdef.a-secret-of-thirty-two-bytes-or-more"


@dataclass(frozen=True)
class Endpoint:
    """Address and keys of a server, for its clients.

    Attributes:
        url: base URL.
        key: an API key; the second one has the form `id.secret`.
        other_key: another one.
        certificate: certificate to trust, for a server by https.
        webhooks: receiver of webhooks; None if the server can reach none.
        request_ids: IDs of the requests that the server has received.
    """

    url: str
    key: str
    other_key: str
    certificate: Path | None
    webhooks: Receiver | None = None
    request_ids: list[str] = field(default_factory=list)

    @property
    def receiver(self) -> Receiver:
        """Receiver of webhooks, for a server that can reach one."""
        assert self.webhooks
        return self.webhooks

    @property
    def place(self) -> str:
        """Host and port."""
        return self.url.partition("://")[2]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of a socket."""
        host, port = self.place.split(":")
        return host, int(port)

    @property
    def trust(self) -> dict[str, str]:
        """Environment of clients that trust the certificate."""
        return dict.fromkeys(("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"), str(self.certificate))

    @property
    def environment(self) -> dict[str, str]:
        """Environment of fal's clients that call this server."""
        return self.trust | {"FAL_RUN_HOST": self.place, "FAL_QUEUE_RUN_HOST": f"{self.place}/queue"}

    def client(self, **headers: str) -> httpx.Client:
        """Returns a client that sends these headers. No key is sent unless one is among them."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        trust = ssl.create_default_context(cafile=self.certificate) if self.certificate else True
        return httpx.Client(base_url=self.url, headers=named, verify=trust, timeout=60)


class RequestIDs:
    """Gives each request an ID and returns it, as Ray Serve's proxy does."""

    def __init__(self, app: ASGIApp, received: list[str]) -> None:
        self._app = app
        self._received = received

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = MutableHeaders(scope=scope).setdefault("x-request-id", str(uuid.uuid4()))
        self._received.append(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def services(config: AppConfig) -> Services:
    """Returns the services of a server over stand-ins."""
    changed, outbound, files = asyncio.Event(), Outbound(config.outbound), FileStore(config.storage)
    models = {model.name: Stages(model).model for model in config.models}
    sources = SourceReader(outbound, files, config.limits)
    generator = Generator(models, config.limits, sources, changed.set)
    database = Database(config.database.url)
    return Services.of(config, generator, lifecycle(generator, changed), files, database, outbound)


@contextmanager
def served(
    folder: Path,
    *models: str,
    defaults: dict[str, int] | None = None,
    by_tls: bool = False,
    receiver: Receiver | None = None,
    **settings: Any,
) -> Iterator[Endpoint]:
    """Serves `configs/tiny.yaml` with other models and settings until the block ends.

    Args:
        folder: folder of the files, the database and the certificate.
        models: names of the models; `stages.BROKEN` cannot be loaded.
        defaults: defaults of each model.
        by_tls: whether to serve by https.
        receiver: receiver of webhooks, which the server may reach.
        settings: settings that replace those of the file.
    """
    args = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text())["applications"][0]["args"]
    (model,) = args["models"]
    kept = {
        "storage": {"url": str(folder / "files")},
        "database": {"url": f"sqlite:///{folder}/jobs.db"},
    }
    given: dict[str, Any] = {
        "models": [model | {"name": name, "defaults": defaults or {}} for name in models]
    }
    if receiver:
        given["outbound"] = {"allow": [receiver.place]}
    config = AppConfig.model_validate(args | kept | given | settings)
    certificate, private = self_signed(folder / "tls", "localhost") if by_tls else (None, None)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTHER_KEY", OTHER_KEY)
        app = create_app(services(config))
    request_ids: list[str] = []
    with_ids = RequestIDs(app, request_ids)
    server = uvicorn.Server(
        uvicorn.Config(
            with_ids, port=0, http="h11", log_config=None, ssl_certfile=certificate, ssl_keyfile=private
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        ((host, port),) = (socket.getsockname() for one in server.servers for socket in one.sockets)
        scheme = "https" if by_tls else "http"
        yield Endpoint(f"{scheme}://{host}:{port}", KEY, OTHER_KEY, certificate, receiver, request_ids)
    finally:
        server.should_exit = True
        thread.join()


def keys() -> dict[str, Any]:
    """Returns the setting `auth` for both keys: an operator's by its hash, a user's by a variable."""
    by_hash = {"id": "by-hash", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "role": "operator"}
    return {"api_keys": [by_hash, {"id": "by-variable", "secret_env": "OTHER_KEY"}]}


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A server that is open to all."""
    with served(tmp_path_factory.mktemp("open"), "glm-image", "other") as server:
        yield server


BODY_TIMEOUT_S = 2
MEGAPIXEL_STEPS_PER_MINUTE = 60


@pytest.fixture(scope="package")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A server that wants a key and has tight limits."""
    limits = {
        "max_megapixel_steps": MEGAPIXEL_STEPS_PER_MINUTE,
        "megapixel_steps_per_minute": MEGAPIXEL_STEPS_PER_MINUTE,
        "body_timeout_s": BODY_TIMEOUT_S,
    }
    folder = tmp_path_factory.mktemp("guarded")
    with served(folder, "guarded", BROKEN, auth=keys(), limits=limits) as server:
        yield server


def use_up_other_key(server: Endpoint) -> None:
    """Uses nearly all megapixel-steps of `server.other_key`; at least 30 s of that minute remain."""
    body = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 100, "n": 2, "stream": True}

    def is_used_up() -> bool:
        with (
            server.client(authorization=f"Bearer {server.other_key}") as client,
            client.stream("POST", "/v1/images/generations", json=body) as answer,
        ):
            return answer.status_code == 200 or int(answer.headers["retry-after"]) > 30

    until(is_used_up)


@pytest.fixture(scope="package")
def vendors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A server for the vendors' clients: by https, with keys, and with a receiver of webhooks."""
    limits = {"max_json_bytes": 2**18, "max_body_bytes": 2**23, "max_image_bytes": 2**22}
    folder, receiver = tmp_path_factory.mktemp("vendors"), Receiver()
    with (
        receiver.receiving(),
        served(
            folder, "glm-image", BROKEN, by_tls=True, receiver=receiver, auth=keys(), limits=limits
        ) as server,
    ):
        yield server


@pytest.fixture
def client(server: Endpoint) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
