"""Keys, and the tokens that they sign as Z.ai's clients do."""

import hashlib
import time
from typing import Any

import jwt
import pytest

from serve_app.config import AuthConfig
from serve_app.errors import RequestError
from serve_app.http.auth import Keys

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


def test_a_key_and_what_it_signs_are_its_own(keys: Keys) -> None:
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
    ],
    ids=lambda text: f"{text:.20}",
)
def test_what_is_not_signed_so_is_no_token(keys: Keys, wrong: str) -> None:
    with pytest.raises(RequestError) as caught:
        identify(keys, wrong)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


@pytest.mark.parametrize("age_ms", [0, 1000, 10**9, float("nan")])
def test_an_old_token_says_so(keys: Keys, age_ms: float) -> None:
    with pytest.raises(RequestError) as caught:
        identify(keys, token(exp=time.time() * 1000 - age_ms))
    assert (caught.value.status, caught.value.code) == (401, "expired_token")


def test_seconds_are_not_taken_for_milliseconds(keys: Keys) -> None:
    with pytest.raises(RequestError) as caught:
        identify(keys, token(exp=int(time.time()) + 10**6))
    assert caught.value.code == "expired_token"


def test_a_key_that_is_known_by_its_digest_signs_nothing() -> None:
    digest = hashlib.sha256(f"{ID}.{SECRET}".encode()).hexdigest()
    keys = Keys(AuthConfig.model_validate({"api_keys": [{"id": "hash", "sha256": digest}]}))
    assert identify(keys, f"{ID}.{SECRET}") == "hash"
    with pytest.raises(RequestError):
        identify(keys, token())


def test_no_key_at_all_is_another_matter(keys: Keys) -> None:
    with pytest.raises(RequestError) as caught:
        keys.identify([(b"authorization", b"Basic abc")])
    assert caught.value.code == "missing_api_key"


def test_a_variable_that_is_not_set_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MISSING", raising=False)
    with pytest.raises(ValueError, match="the environment has no MISSING"):
        Keys(AuthConfig.model_validate({"api_keys": [{"id": "a", "secret_env": "MISSING"}]}))
