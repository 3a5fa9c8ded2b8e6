"""Errors in the words of the OpenAI API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers

from serve_app.dialects.openai.schemas import Error, error_type
from serve_app.http.errors import headers_of, status_of

if TYPE_CHECKING:
    from starlette.types import Scope

    from serve_app.errors import RequestError

NAMES = {
    "steps": "num_inference_steps",
    "sources": "image",
    "expand_prompt": "enable_prompt_expansion",
}
"""This API's names of parameters that have other names here."""


def error_response(error: RequestError, scope: Scope) -> JSONResponse:
    """Returns the answer to a request that fails. JSON bodies call source images `images`, forms `image`."""
    content_type = Headers(scope=scope).get("content-type", "").lower()
    names = NAMES | {"sources": "images"} if content_type.startswith("application/json") else NAMES
    worded = error.for_api(names)
    return JSONResponse({"error": vars(error_body(worded))}, status_of(worded), headers_of(worded))


def error_body(error: RequestError) -> Error:
    """Returns an error in this API's form."""
    worded = error.for_api(NAMES)
    return Error(
        message=worded.message, type=error_type(status_of(worded)), param=worded.param, code=worded.code
    )
