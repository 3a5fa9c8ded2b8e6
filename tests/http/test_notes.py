"""Notes on source images in the header of an answer, in every API."""

import base64
import io
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image

from tests.apis import EDITING, Asked, By
from tests.http.conftest import Endpoint
from tests.pictures import picture

NOTE = "Source image 1 has a colour profile that cannot be used, and is taken as sRGB."


@pytest.fixture
def noted(vendors: Endpoint) -> Iterator[tuple[httpx.Client, list[str | None]]]:
    """A client, and the notes of the successful answers to its POSTs."""
    notes: list[str | None] = []

    def keep(answer: httpx.Response) -> None:
        if answer.request.method == "POST" and answer.status_code in (200, 202):
            notes.append(answer.headers.get("x-image-notes"))

    with vendors.client(authorization=f"Key {vendors.key}") as client:
        client.event_hooks = {"response": [keep]}
        yield client, notes


def edit(profile: bytes | None) -> Asked:
    file = io.BytesIO()
    Image.open(io.BytesIO(picture())).save(file, "PNG", icc_profile=profile)
    return Asked("a boat", 1, 10, f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")


@pytest.mark.parametrize("by", EDITING)
@pytest.mark.parametrize(
    "profile", [b"not a profile", b"x" * (2**22 + 1), None], ids=["broken", "large", "none"]
)
def test_a_profile_that_cannot_be_used_is_noted(
    noted: tuple[httpx.Client, list[str | None]], by: By, profile: bytes | None
) -> None:
    client, notes = noted
    by(client, edit(profile))
    assert notes == [NOTE if profile else None]


def test_a_stream_has_the_note_too(noted: tuple[httpx.Client, list[str | None]]) -> None:
    client, notes = noted
    asked = edit(b"not a profile")
    body = asked.fields | {"images": [{"image_url": asked.source}], "stream": True}
    with client.stream("POST", "/v1/images/edits", json=body) as answer:
        assert answer.status_code == 200
        answer.read()
    assert notes == [NOTE]
