"""API keys, and the tokens that Z.ai's clients sign with them."""

import asyncio
import base64
import hashlib
import time
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from serve_app.config import AuthConfig
from serve_app.errors import RequestError
from serve_app.http.auth import Authentication, Keys
from serve_app.http.errors import ProtocolError, headers_of, status_of

ID, SECRET = "0123456789abcdef", "a-secret-of-thirty-two-bytes-or-more"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Keys:
    monkeypatch.setenv("SIGNING", f"{ID}.{SECRET}")
    monkeypatch.setenv("PLAIN", "plain")
    config = [{"id": "signs", "secret_env": "SIGNING"}, {"id": "does-not", "secret_env": "PLAIN"}]
    return Keys(AuthConfig.model_validate({"api_keys": config}))


def token(secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    now_ms = int(time.time() * 1000)
    given = {"api_key": ID, "exp": now_ms + 3_600_000, "timestamp": now_ms} | claims
    return jwt.encode(given, secret, algorithm, headers={"sign_type": "SIGN"})


def identify(keys: Keys, key: str) -> str:
    return keys.identify([(b"authorization", f"Bearer {key}".encode())])


def test_a_key_is_known_by_itself_and_by_its_tokens(keys: Keys) -> None:
    assert identify(keys, f"{ID}.{SECRET}") == "signs"
    assert identify(keys, token()) == "signs"
    assert identify(keys, "plain") == "does-not"


@pytest.mark.parametrize(
    "wrong",
    [
        token(secret="another-secret-of-thirty-two-bytes"),  # noqa: S106
        token(algorithm="HS512", secret=SECRET * 2),
        token(algorithm="none", secret=""),
        token(api_key="another"),
        token(api_key=None),
        token(api_key=["a"]),
        token(exp=None),
        token(exp="soon"),
        token(padding="x" * 5000),
        jwt.encode({"api_key": ID}, SECRET),
        jwt.encode({"exp": time.time() * 1000 + 1000}, SECRET),
        f"{ID}.{ID}.{ID}",
        "..",
        "\xff.\xff.\xff",
        f"{ID}.",
        SECRET,
        ".".join(base64.urlsafe_b64encode(part).decode() for part in (b'{"alg":"HS256"}', b"[" * 2000, b"")),
        token(exp=10**400),
    ],
    ids=lambda text: f"{text:.20}",
)
def test_a_token_that_is_not_signed_by_a_key_is_rejected(keys: Keys, wrong: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        identify(keys, wrong)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


@pytest.mark.parametrize("age_ms", [0, 1000, 10**9, float("nan")])
def test_an_expired_token_has_an_error_of_its_own(keys: Keys, age_ms: float) -> None:
    with pytest.raises(ProtocolError) as caught:
        identify(keys, token(exp=time.time() * 1000 - age_ms))
    assert (caught.value.status, caught.value.code) == (401, "expired_token")


def test_the_times_of_a_token_are_milliseconds(keys: Keys) -> None:
    with pytest.raises(ProtocolError) as caught:
        identify(keys, token(exp=int(time.time()) + 10**6))
    assert caught.value.code == "expired_token"


def test_a_key_known_by_its_digest_signs_no_tokens() -> None:
    digest = hashlib.sha256(f"{ID}.{SECRET}".encode()).hexdigest()
    keys = Keys(AuthConfig.model_validate({"api_keys": [{"id": "hash", "sha256": digest}]}))
    assert identify(keys, f"{ID}.{SECRET}") == "hash"
    with pytest.raises(ProtocolError):
        identify(keys, token())


def test_a_missing_key_has_an_error_of_its_own(keys: Keys) -> None:
    with pytest.raises(ProtocolError) as caught:
        keys.identify([(b"authorization", b"Basic abc")])
    assert caught.value.code == "missing_api_key"


def test_a_variable_that_is_not_set_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MISSING", raising=False)
    with pytest.raises(ValueError, match="MISSING is not set"):
        Keys(AuthConfig.model_validate({"api_keys": [{"id": "a", "secret_env": "MISSING"}]}))


@pytest.mark.parametrize("header", ["authorization", "ocp-apim-subscription-key"])
def test_a_key_is_read_from_each_of_its_headers(keys: Keys, header: str) -> None:
    values = ["Bearer plain", "bearer  plain", "Key plain"] if header == "authorization" else ["plain"]
    for value in values:
        assert keys.identify([(b"host", b"here"), (header.encode(), value.encode())]) == "does-not"


def test_one_valid_key_of_several_is_enough(keys: Keys) -> None:
    headers = [(b"authorization", b"Bearer wrong"), (b"ocp-apim-subscription-key", b"plain")]
    assert keys.identify(headers) == "does-not"


def test_a_valid_key_beside_an_expired_token_is_enough(keys: Keys) -> None:
    expired = token(exp=time.time() * 1000 - 1).encode()
    headers = [(b"authorization", b"Bearer " + expired), (b"ocp-apim-subscription-key", b"plain")]
    assert keys.identify(headers) == "does-not"


def test_keys_with_the_same_id_sign_tokens_while_they_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    other = "another-secret-of-thirty-two-bytes"
    monkeypatch.setenv("OLD", f"{ID}.{SECRET}")
    monkeypatch.setenv("NEW", f"{ID}.{other}")
    config = [{"id": "old", "secret_env": "OLD"}, {"id": "new", "secret_env": "NEW"}]
    keys = Keys(AuthConfig.model_validate({"api_keys": config}))
    assert (identify(keys, token()), identify(keys, token(other))) == ("old", "new")


def rejecting(scope: Scope, error: RequestError) -> JSONResponse:
    return JSONResponse({"code": error.code}, status_of(error), headers_of(error))


@pytest.mark.parametrize(
    ("path", "headers", "open_to_all", "answer"),
    [
        ("/v1/models", {}, False, (401, {"code": "missing_api_key"})),
        ("/v1/models", {"Authorization": "Bearer wrong"}, False, (401, {"code": "invalid_api_key"})),
        ("/v1/models", {"Authorization": "Bearer plain"}, False, (200, {"key_id": "does-not"})),
        ("/v1/models", {}, True, (200, {"key_id": ""})),
        ("/v1/models", {"Authorization": "Bearer wrong"}, True, (200, {"key_id": ""})),
        ("/v1/models", {"Authorization": "Bearer plain"}, True, (200, {"key_id": "does-not"})),
        ("/health", {}, False, (200, {"key_id": ""})),
        ("/health/more", {}, False, (401, {"code": "missing_api_key"})),
        ("/files/a.png", {}, False, (200, {"key_id": ""})),
        ("/v1/files/a.png", {}, False, (401, {"code": "missing_api_key"})),
    ],
)
def test_a_request_without_a_key_reaches_only_the_open_paths(
    keys: Keys,
    path: str,
    headers: dict[str, str],
    open_to_all: bool,
    answer: tuple[int, dict[str, str]],
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({"key_id": scope["state"]["key_id"]})(scope, receive, send)

    async def main() -> httpx.Response:
        guarded = Authentication(app, keys, open_to_all=open_to_all, respond=rejecting)
        transport = httpx.ASGITransport(guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path, headers=headers)

    answered = asyncio.run(main())
    assert (answered.status_code, answered.json()) == answer
    assert ("www-authenticate" in answered.headers) == (answered.status_code == 401)


def listed(**secrets: str) -> str:
    """A file of keys, by their ids."""
    hashes = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in secrets.items()}
    return "\n".join(f"- {{id: {name}, sha256: {one}}}" for name, one in hashes.items())


def test_keys_change_with_their_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(listed(old="first"))
    fixed = {"id": "fixed", "sha256": hashlib.sha256(b"fixed").hexdigest()}
    keys = Keys(AuthConfig.model_validate({"api_keys": [fixed], "keys_file": str(file)}))
    assert identify(keys, "first") == "old"
    file.write_text(listed(old="first", new="second"))
    asyncio.run(keys.reload())
    assert [identify(keys, key) for key in ("first", "second", "fixed")] == ["old", "new", "fixed"]
    file.write_text(listed(new="second"))
    asyncio.run(keys.reload())
    with pytest.raises(ProtocolError):
        identify(keys, "first")


def test_roles_change_with_the_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(listed(a="first"))
    keys = Keys(AuthConfig.model_validate({"keys_file": str(file)}))
    assert not keys.is_operator("a")
    file.write_text(listed(a="first").replace("}", ", role: operator}"))
    asyncio.run(keys.reload())
    assert keys.is_operator("a")
    file.write_text(listed(a="first").replace("}", ", role: root}"))
    with pytest.raises(ValueError, match="is not a list of keys"):
        asyncio.run(keys.reload())
    assert keys.is_operator("a")
    file.write_text(listed(a="first"))
    asyncio.run(keys.reload())
    assert not keys.is_operator("a")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "keys",
        "- {id: a, sha256: a-secret}",
        listed(fixed="x"),
        "- {id: a, secret_env: NOT_SET}",
    ],
)
def test_a_file_that_is_no_list_of_keys_changes_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(listed(a="first"))
    fixed = {"id": "fixed", "sha256": hashlib.sha256(b"fixed").hexdigest()}
    config = AuthConfig.model_validate({"api_keys": [fixed], "keys_file": str(file)})
    keys = Keys(config)
    file.write_text(text)
    with pytest.raises(ValueError, match=r"keys|NOT_SET") as caught:
        asyncio.run(keys.reload())
    assert "a-secret" not in str(caught.value)
    assert identify(keys, "first") == "a"
    with pytest.raises(ValueError, match=r"keys|NOT_SET"):
        Keys(config)
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        asyncio.run(keys.reload())
    assert identify(keys, "first") == "a"
