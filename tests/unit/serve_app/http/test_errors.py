"""The status and the headers of each kind of error."""

import pytest

from serve_app import errors
from serve_app.errors import Busy, Invalid, InvalidParameter, RequestError, TooLarge, image_too_large
from serve_app.http.errors import (
    RETRIED_BY_CLIENTS,
    ProtocolError,
    headers_of,
    status_of,
    too_large,
    too_many_bytes,
    too_slow,
)

EXPECTED = {
    "Invalid": 400,
    "InvalidParameter": 400,
    "TooLarge": 413,
    "Refused": 403,
    "NotFound": 404,
    "Gone": 410,
    "Conflict": 409,
    "Busy": 429,
    "Unavailable": 503,
    "Full": 507,
    "Failed": 500,
    "TimedOut": 504,
    "Cancelled": 499,
}
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, RequestError) and kind is not RequestError
]


def make(kind: type[RequestError], *, retryable: bool) -> RequestError:
    error = InvalidParameter("n", "must be 1") if issubclass(kind, InvalidParameter) else kind("broken")
    error.retryable = retryable
    return error


def test_every_kind_has_a_status() -> None:
    assert {kind.__name__: status_of(make(kind, retryable=False)) for kind in KINDS} == EXPECTED


def test_a_kind_of_a_kind_has_the_status_of_its_base() -> None:
    class StillTooLarge(TooLarge):
        pass

    assert status_of(StillTooLarge("broken")) == 413


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("retryable", [False, True])
def test_clients_are_asked_not_to_retry_only_if_they_would(kind: type[RequestError], retryable: bool) -> None:
    error = make(kind, retryable=retryable)
    retried = EXPECTED[kind.__name__] in RETRIED_BY_CLIENTS
    assert headers_of(error) == ({"x-should-retry": "false"} if retried and not retryable else {})


def test_clients_retry_what_openais_clients_retry() -> None:
    """See `_should_retry` in openai/_base_client.py."""
    retried = {status for status in range(400, 600) if status in RETRIED_BY_CLIENTS}
    assert retried == {408, 409, 429, *range(500, 600)}


def test_the_time_of_a_retry_is_a_header() -> None:
    assert headers_of(Busy("busy", retry_after_s=7)) == {"Retry-After": "7"}
    assert headers_of(Busy("busy", retry_after_s=0)) == {"Retry-After": "0"}
    busy = Busy("busy", retry_after_s=7, retryable=False)
    assert headers_of(busy) == {"Retry-After": "7", "x-should-retry": "false"}


def test_an_error_of_http_has_its_own_status_and_headers() -> None:
    error = ProtocolError("No.", status=405, headers={"Allow": "GET"})
    assert (status_of(error), headers_of(error)) == (405, {"Allow": "GET"})
    assert error.code == "method_not_allowed"
    slow = too_slow(60)
    assert (status_of(slow), headers_of(slow), slow.code) == (408, {"Connection": "close"}, "request_timeout")


def test_an_error_of_a_body_has_its_own_status_and_headers() -> None:
    assert (status_of(too_large(1024)), headers_of(too_large(1024))) == (413, {})
    assert status_of(too_many_bytes()) == 429
    assert "Retry-After" in headers_of(too_many_bytes())


def test_an_api_names_the_parameter_in_its_own_words() -> None:
    error = InvalidParameter("n", "must be 1 to 10, not 11", code="too_many")
    worded = error.for_api({"n": "num_images"})
    assert type(worded) is Invalid
    assert (worded.message, worded.param) == ("num_images must be 1 to 10, not 11.", "num_images")
    assert (worded.code, status_of(worded)) == ("too_many", 400)
    assert error.for_api({}).message == error.message == "n must be 1 to 10, not 11."
    large = image_too_large(1024).for_api({"sources": "image_urls"})
    assert (large.param, status_of(large), large.code) == ("image_urls", 413, "request_too_large")
    assert too_large(1024).for_api({"sources": "image_urls"}).param is None
    busy = Busy("The server is busy.")
    assert busy.for_api({"n": "num_images"}) is busy
