"""Bad input gets a quick answer in the envelope, and the server goes on."""

import io
import socket
import time
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.serve.conftest import Server

GOOD = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 1, "seed": 3}
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def png(width: int = 512, height: int = 512) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 80).save(file, "PNG")
    return file.getvalue()


def body(**fields: Any) -> dict[str, Any]:
    return {"url": GENERATIONS, "json": GOOD | fields}


def raw(content: bytes) -> dict[str, Any]:
    return {"url": GENERATIONS, "content": content, "headers": {"content-type": "application/json"}}


def form(*files: bytes, name: str = "image[]", **fields: str) -> dict[str, Any]:
    fields = {"prompt": "a boat", "num_inference_steps": "1"} | fields
    return {"url": EDITS, "data": fields, "files": [(name, ("f", file)) for file in files]}


CASES: list[tuple[dict[str, Any], int, str | None]] = [
    (body(size="500x512"), 400, "size"),
    (body(size="512x500"), 400, "size"),
    (body(size="256x256"), 400, "size"),
    (body(size="4096x4096"), 400, "size"),
    (body(size="99999x99999"), 400, "size"),
    (body(size="-512x512"), 400, "size"),
    (body(size="512"), 400, "size"),
    (body(size="٥١٢x512"), 400, "size"),
    (body(size=512), 400, "size"),
    (body(size="0x512"), 400, "size"),
    (body(size="0x0"), 400, "size"),
    (body(n=0), 400, "n"),
    (body(n=11), 400, "n"),
    (body(n=True), 400, "n"),
    (body(n=1.5), 400, "n"),
    (body(n="2"), 400, "n"),
    (body(num_inference_steps=0), 400, "num_inference_steps"),
    (body(num_inference_steps=101), 400, "num_inference_steps"),
    (body(num_inference_steps=-(10**30)), 400, "num_inference_steps"),
    (body(guidance_scale=-1), 400, "guidance_scale"),
    (body(guidance_scale=21), 400, "guidance_scale"),
    (body(seed=-1), 400, "seed"),
    (body(seed=2**63), 400, "seed"),
    (body(prompt=""), 400, "prompt"),
    (body(prompt=" \n"), 400, "prompt"),
    (body(prompt=["a"]), 400, "prompt"),
    (body(prompt="x" * 32_001), 400, "prompt"),
    (body(model="gpt-image-9"), 404, "model"),
    (body(response_format="file"), 400, "response_format"),
    (body(output_format="gif"), 400, "output_format"),
    (body(output_format="jpeg", output_compression=101), 400, "output_compression"),
    (body(output_compression=50), 400, "output_compression"),
    (body(negative_prompt="ugly"), 400, "negative_prompt"),
    (body(cfg_normalization=True), 400, "cfg_normalization"),
    (body(stream="yes"), 400, "stream"),
    (body(stream=True, partial_images=4), 400, "partial_images"),
    (body(stream=True, partial_images=-1), 400, "partial_images"),
    (body(stream=True, size="500x500"), 400, "size"),
    (body(partial_images=1), 400, "partial_images"),
    (body(quality="best"), 400, "quality"),
    (body(quality=1), 400, "quality"),
    (body(background="transparent"), 400, "background"),
    (body(style="bold"), 400, "style"),
    (body(moderation="high"), 400, "moderation"),
    (body(input_fidelity="high"), 400, "input_fidelity"),
    (body(user="x" * 513), 400, "user"),
    (body(user=1), 400, "user"),
    (body(steps=5), 400, "steps"),
    ({"url": GENERATIONS, "json": {"size": "512x512"}}, 400, "prompt"),
    (raw(b""), 400, None),
    (raw(b"{"), 400, None),
    (raw(b"[]"), 400, None),
    (raw(b"null"), 400, None),
    (raw(b"[" * 100_000), 400, None),
    (raw(b'{"prompt": "\\ud800"}'), 400, None),
    (raw(b'{"prompt": "\xff"}'), 400, None),
    (raw(b'{"prompt": "a", "guidance_scale": NaN}'), 400, "guidance_scale"),
    (raw(b'{"prompt": "a", "guidance_scale": 1e400}'), 400, "guidance_scale"),
    (raw(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"), 400, None),
    (raw(b'{"prompt": "' + b"x" * (65 * 2**20) + b'"}'), 413, None),
    ({"url": EDITS, "files": {"prompt": (None, "a boat")}}, 400, "image"),
    (form(b""), 400, "image"),
    (form(b"not an image"), 400, "image"),
    (form(png()[:1000]), 400, "image"),
    (form(png(600, 600)[:-2000]), 400, "image"),
    (form(png(15, 15)), 400, "image"),
    (form(png(8200, 16)), 400, "image"),
    (form(*[png()] * 5), 400, "image"),
    (form(png(), name="picture"), 400, "picture"),
    (form(png(), prompt=""), 400, "prompt"),
    (form(png(), n="many"), 400, "n"),
    (form(png(), n="true"), 400, "n"),
    (form(png(), stream="maybe"), 400, "stream"),
    (form(b"not an image", stream="true"), 400, "image"),
    (form(png(), input_fidelity="medium"), 400, "input_fidelity"),
    (form(png(), moderation="low"), 400, "moderation"),
    (form(png(), n="1.5"), 400, "n"),
    (form(png(), num_inference_steps="nan"), 400, "num_inference_steps"),
    (form(png(), guidance_scale="inf"), 400, "guidance_scale"),
    (form(png(), model="gpt-image-9"), 404, "model"),
    (form(png(), image="https://example.com/a.png"), 400, "image"),
    ({"url": EDITS, "json": GOOD}, 400, None),
    ({"url": GENERATIONS, "data": GOOD}, 400, None),
    ({"url": GENERATIONS, "content": b"{}", "headers": {"content-type": "text/plain"}}, 400, None),
    (raw(b"{" + b",".join(b'"k%d": 1' % i for i in range(100_000)) + b"}"), 413, None),
    (raw(b"{" + b",".join(b'"k%d": 1' % i for i in range(50_000)) + b"}"), 400, "prompt"),
    ({"url": EDITS, "content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, None),
    (
        {
            "url": EDITS,
            "content": b"--b\r\nx",
            "headers": {"content-type": "multipart/form-data; boundary=b"},
        },
        400,
        "prompt",
    ),
    ({"url": "/v1/images/variations", "json": GOOD}, 404, None),
]


@pytest.fixture(scope="module", autouse=True)
def a_good_request_works_afterwards(server: Any) -> Any:
    yield
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post(GENERATIONS, json=GOOD).status_code == 200


@pytest.mark.parametrize(("request_", "status", "param"), CASES)
def test_bad_input_is_refused_at_once(
    client: httpx.Client, request_: dict[str, Any], status: int, param: str | None
) -> None:
    began = time.monotonic()
    answer = client.post(**request_)
    took = time.monotonic() - began
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert error["message"]
    assert error["code"]
    if len(request_.get("content", b"")) < 2**20 and took >= 1:  # once more: the machine may have been busy
        began = time.monotonic()
        client.post(**request_)
        assert time.monotonic() - began < 1


@pytest.mark.parametrize("charset", ["undefined", "punycode", "nonsense"])
def test_an_unexpected_charset_is_refused(client: httpx.Client, charset: str) -> None:
    answer = client.post(
        EDITS,
        content=b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\xff\r\n--b--\r\n',
        headers={"content-type": f"Multipart/Form-Data; boundary=b; charset={charset}"},
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("url", [GENERATIONS, EDITS])
def test_a_body_that_is_announced_too_large_is_not_waited_for(server: Server, url: str) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = [
            f"POST {url} HTTP/1.1",
            "Host: x",
            "Content-Type: application/json",
            "Content-Length: 10000000000",
        ]
        connection.sendall("\r\n".join([*head, "", "{"]).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    "path",
    ["/files/none.png", "/files/" + "0" * 32 + ".png", "/files/..%2f..%2fetc%2fpasswd", "/v1/models/x", "/x"],
)
def test_what_is_not_there_is_404_in_the_envelope(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


def test_the_wrong_method_is_405_in_the_envelope(client: httpx.Client) -> None:
    answer = client.get(GENERATIONS)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["error"]["code"] == "method_not_allowed"
