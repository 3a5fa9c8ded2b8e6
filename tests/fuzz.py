"""Hostile bytes for every decoder: a picture, a data URL, JSON, a form, headers.

CI runs each target on its seeds and on mutations of them: see tests/unit/serve_app/test_hostile_bytes.py. By
hand, guided by the coverage of the code, after `pip install atheris`:

    python -m tests.fuzz picture -max_total_time=600
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import random
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import yaml
from PIL import Image, ImageCms

from deployments.families import FAMILIES
from serve_app.config import AppConfig
from serve_app.errors import RequestError
from serve_app.files.store import FileStore
from serve_app.generation import codec, containers
from serve_app.generation.sources import SourceReader
from serve_app.http.application import create_app
from serve_app.outbound import Outbound
from tests.http.conftest import ROOT, services

MAX_PIXELS = 2**18
BODY = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 1, "seed": 3, "n": 1}
HEADERS = ("last-event-id", "idempotency-key", "prefer", "range", "if-none-match", "accept", "content-type")
PARTS = [b'prompt"\r\n\r\na boat', b'num_inference_steps"\r\n\r\n1', b'image"; filename="a"\r\n\r\n']


def picture(data: bytes) -> None:
    """Decodes a source image."""
    with suppress(RequestError):
        codec.decode_source(data, FAMILIES["glm_image"], MAX_PIXELS, 4096)


def sealed_picture(data: bytes) -> None:
    """Decodes a PNG of which every chunk has its checksum, so that mutations reach what is behind it."""
    if not data.startswith(containers.PNG_SIGNATURE):
        return
    sealed, at = containers.PNG_SIGNATURE, len(containers.PNG_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        sealed += data[at:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4)
        at = end + 4
    picture(sealed)


def data_url(data: bytes) -> None:
    """Reads a source image's data URL."""
    with suppress(RequestError):
        asyncio.run(_server().reader.read("data:image/png" + data.decode("latin-1")))


def json_body(data: bytes) -> None:
    """Sends a body of JSON to each API."""
    for path in (
        "/v1/images/generations",
        "/v1/images/jobs",
        "/fal-ai/glm-image",
        "/api/paas/v4/images/generations",
    ):
        _server().ask("POST", path, content=data, headers={"content-type": "application/json"})


def form(data: bytes) -> None:
    """Sends a form."""
    headers = {"content-type": "multipart/form-data; boundary=b"}
    _server().ask("POST", "/v1/images/edits", content=data, headers=headers)


def headers(data: bytes) -> None:
    """Sends headers that are parsed."""
    value = data.translate(None, b"\0\r\n").strip()
    for path in ("/v1/images/jobs/a/events", "/files/" + "0" * 32 + ".png", "/v1/images/jobs"):
        for name in HEADERS:
            _server().ask("GET", path, headers=[(name.encode(), value)])


class _Server:
    """The application over stand-ins of the stages, and its reader of sources."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        args = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text())["applications"][0]["args"]
        kept = {
            "storage": {"url": f"{self._folder.name}/files"},
            "database": {"url": f"sqlite:///{self._folder.name}/jobs.db"},
        }
        config = AppConfig.model_validate(args | kept)
        self.reader = SourceReader(Outbound(config.outbound), FileStore(config.storage), config.limits)
        self._runner = asyncio.Runner()
        self._app = create_app(services(config))

    def ask(self, method: str, path: str, **options: Any) -> None:
        """Sends a request. A fault of the application is raised here."""

        async def send() -> int:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return (await client.request(method, path, **options)).status_code

        status = self._runner.run(send())
        assert status < 500 or status == 507, f"{method} {path}: {status}"


_server = functools.cache(_Server)


def _pictures() -> Iterator[bytes]:
    noise = Image.effect_noise((64, 48), 80)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, kind, options in (
        (noise.convert("RGB"), "PNG", {"icc_profile": profile, "exif": exif}),
        (noise.convert("RGB").quantize(16), "PNG", {"transparency": 3}),
        (noise.convert("I;16"), "PNG", {}),
        (noise.convert("RGB"), "JPEG", {"icc_profile": profile, "exif": exif}),
        (noise.convert("RGB"), "JPEG", {"progressive": True}),
        (noise.convert("CMYK"), "JPEG", {}),
        (noise.convert("RGB"), "WEBP", {"icc_profile": profile}),
        (noise.convert("RGBA"), "WEBP", {"lossless": True, "exif": exif}),
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)
        yield file.getvalue()


def _seeds(name: str) -> list[bytes]:
    if name in ("picture", "sealed_picture"):
        return list(_pictures())
    if name == "data_url":
        return [b";base64,iVBORw0KGgo=", b",%89PNG", b";charset=x;base64,aGk-_w", b";base64,aG\nk="]
    if name == "json_body":
        image = {"images": [{"image_url": "data:image/png;base64,iVBORw0KGgo="}]}
        bodies: tuple[Any, ...] = (BODY, BODY | image, BODY | {"stream": True}, [], None)
        return [json.dumps(body).encode() for body in bodies]
    if name == "form":
        parts = [*PARTS[:2], PARTS[2] + next(_pictures())]
        return [
            b"".join(
                b"--b\r\nContent-Disposition: form-data; name=" + b'"' + part + b"\r\n" for part in parts
            )
            + b"--b--\r\n"
        ]
    return [b"respond-async, wait=3", b"bytes=0-10", b'W/"a", *', b"1.5", b"application/json; charset=utf-8"]


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (picture, sealed_picture, data_url, json_body, form, headers)
}


def corpus(name: str, mutations: int) -> Iterator[bytes]:
    """Yields a target's seeds, and always the same mutations of them."""
    seeds, chance = _seeds(name), random.Random(0)
    yield from seeds
    for _ in range(mutations):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(data) + 1)
            kind = chance.randrange(4)
            if kind == 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            elif kind == 1:
                data[at:at] = chance.randbytes(chance.randrange(1, 9))
            elif kind == 2:
                del data[at : at + chance.randrange(1, 9)]
            else:
                data[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff"))
        yield bytes(data)


def main() -> None:
    """Runs a target for as long as the options of libFuzzer say."""
    atheris = import_module("atheris")  # not locked, since only this needs it
    for module in [name for name in sys.modules if name.startswith(("serve_app", "tests"))]:
        del sys.modules[module]
    with atheris.instrument_imports(include=["serve_app"]):
        fuzz = import_module("tests.fuzz")
        stages = import_module("tests.http.stages")
    for seconds in ("PRIOR_SECONDS", "DECODER_SECONDS"):
        setattr(stages, seconds, 0)
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(_seeds(name)):
            (Path(folder) / str(number)).write_bytes(data)
        atheris.Setup([*sys.argv, folder], fuzz.TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
