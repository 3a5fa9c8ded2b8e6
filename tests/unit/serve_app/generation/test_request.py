"""A parameter is in every record on its way from a route to the stages and into the database."""

from dataclasses import fields

import numpy as np
import pytest

from deployments.families import PARAMETERS
from deployments.types import ImageRequest
from serve_app.dialects.openai.schemas import EditInput, GenerationInput
from serve_app.generation.request import Encoding, GenerationRequest, ResolvedRequest
from serve_app.jobs.records import REQUEST_FIELDS
from serve_app.jobs.submission import FINGERPRINTED

ELSEWHERE = {"encoding", "sources", "start_within_s", "api", "request_id", "key_id"}
"""Attributes of a request that jobs have in columns of their own."""
SOURCES = (np.zeros((512, 512, 3), dtype=np.uint8),)


def names(record: type[GenerationRequest | ImageRequest]) -> set[str]:
    return {field.name for field in fields(record)}


def test_jobs_keep_and_compare_all_parameters() -> None:
    parameters = names(GenerationRequest) - ELSEWHERE
    assert set(REQUEST_FIELDS) == parameters
    assert set(FINGERPRINTED) == parameters


@pytest.mark.parametrize("param", PARAMETERS)
def test_a_familys_parameter_is_on_the_whole_way(param: str) -> None:
    assert param in names(GenerationRequest)
    assert param in names(ImageRequest)
    assert param in GenerationInput.model_fields
    assert param in EditInput.model_fields


def test_the_stages_get_what_was_resolved() -> None:
    request = ResolvedRequest(
        prompt="a boat",
        model="m",
        size=(640, 512),
        n=3,
        steps=7,
        guidance_scale=2.5,
        negative_prompt="blurry",
        cfg_normalization=True,
        strength=0.3,
        seed=40,
        partial_images=2,
        request_id="r",
        encoding=Encoding("jpeg"),
    )
    made = request.image_request(2, sources=SOURCES)
    for name in names(ImageRequest) & names(ResolvedRequest) - {"seed", "sources"}:
        assert getattr(made, name) == getattr(request, name)
    assert (made.width, made.height, made.seed, made.previews) == (640, 512, 42, 2)
    assert made.sources is SOURCES
    unset = ImageRequest(prompt="", width=0, height=0, seed=0)
    same = {field.name for field in fields(made) if getattr(made, field.name) == getattr(unset, field.name)}
    assert same == {"prior", "traceparent"}  # those come on the way
