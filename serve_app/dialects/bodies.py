"""JSON bodies: read within bounds, validated strictly, rejected with the parameter's name."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from serve_app.errors import Invalid
from serve_app.generation.request import MAX_ID_CHARS
from serve_app.http.errors import CLIENT_CLOSED, too_large

if TYPE_CHECKING:
    from fastapi import Request

MAX_FIELDS = 64
PROMPT = "Text that describes the image. Put text that should appear in the image in quotation marks."
HINT = "Accepted for compatibility; has no effect."
"""Description of a field that is a hint only."""
NOT_BLANK = r"[^\s\x1c-\x1f\x85]"
"""Pattern of a text that is not blank. Python has more white space than JSON Schema's regular expressions."""


class Fields(BaseModel):
    """Fields of a body. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    UNSUPPORTED: ClassVar[Mapping[str, str]] = {}
    """Known fields that are not supported, with the reasons."""

    @classmethod
    def may_be_unset(cls, name: str) -> bool:
        """Returns whether a client may leave the field unset, for example with null."""
        field = cls.model_fields.get(name)
        return name in cls.UNSUPPORTED or (field is not None and not field.is_required())


class JSONFields(Fields):
    """Fields of a JSON body, or of an object in it."""

    UNSET: ClassVar[tuple[bool | str | None, ...]] = (None,)
    """Values that leave a field out."""

    @model_validator(mode="before")
    @classmethod
    def _without_unset(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        if len(fields) > MAX_FIELDS:  # each unknown one would be an error of its own
            raise PydanticCustomError("too_many", f"Input should have at most {MAX_FIELDS} fields")
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value  # JSON's 1.0 is 1
            for name, value in fields.items()
            if not (cls.may_be_unset(name) and any(_are_same(value, unset) for unset in cls.UNSET))
        }


def _are_same(value: object, other: object) -> bool:
    return type(value) is type(other) and value == other  # 0 is not False


Body = TypeVar("Body", bound=Fields)


def media_type(request: Request) -> str:
    """Returns the media type of a request's body, by its header."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, fields: type[Body], max_bytes: int) -> Body:
    """Returns the fields of a JSON body.

    Raises:
        Invalid: it is not a JSON body, or not valid.
        TooLarge: it has too many bytes.
    """
    if (given := media_type(request)) != "application/json":
        raise Invalid(
            f"The Content-Type must be application/json, not {given!r:.100}.", code="invalid_content_type"
        )
    return await parse_json(await read(request, max_bytes), fields)


async def read(request: Request, max_bytes: int) -> bytearray:
    """Returns the body.

    Raises:
        TooLarge: it has too many bytes.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large(max_bytes)
    return body


async def parse_json(body: bytearray, fields: type[Body]) -> Body:
    """Returns the fields of a JSON body that was read.

    Raises:
        Invalid: it is not valid.
    """
    try:
        return await asyncio.to_thread(fields.model_validate_json, body)
    except ValidationError as error:
        raise first_error(error, fields) from None


def first_error(error: ValidationError, fields: type[Fields]) -> Invalid:
    """Returns the first error of pydantic. It does not contain the value."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return unknown(str(param), fields)
    if first["type"] == "missing":
        return Invalid(f"{param} is required.", param=param, code="missing_required_parameter")
    return Invalid(f"{param or 'The JSON body'}: {first['msg']}.", param=param)


def unknown(param: str, fields: type[Fields]) -> Invalid:
    """Returns the error for an unknown field."""
    name = param.partition("[")[0]  # a form's svg[model]
    reason = f": {fields.UNSUPPORTED[name]}" if name in fields.UNSUPPORTED else ""
    return Invalid(
        f"The parameter {param!r:.100} is not supported{reason or '; remove it'}.",
        param=param[:100],
        code="unsupported_parameter" if reason else "unknown_parameter",
    )


def request_id(request: Request) -> str:
    """Returns the client's request id, or else the one that Serve has made. Serve sends it back.

    Raises:
        Invalid: it is too long.
    """
    given = request.headers.get("x-request-id", "")
    if len(given) > MAX_ID_CHARS:
        problem = f"X-Request-ID has {len(given)} characters; at most {MAX_ID_CHARS} are allowed."
        raise Invalid(problem, param="X-Request-ID")
    return given


def parsed_size(size: str, otherwise: str = "") -> tuple[int, int]:
    """Returns width and height in pixels, from WIDTHxHEIGHT.

    Args:
        size: the size as sent.
        otherwise: an alternative, for the message.

    Raises:
        Invalid: it has another form.
    """
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    if match is None:
        problem = f"size must be WIDTHxHEIGHT, such as 1024x1024{otherwise}, not {size!r:.50}."
        raise Invalid(problem, param="size")
    return int(match[1]), int(match[2])


def document_body(fields: type[Fields], *, required: bool = True) -> dict[str, Any]:
    """Returns a JSON body for the OpenAPI document: the routes parse it themselves."""
    schema = fields.model_json_schema()
    inlined = _without_refs(schema, schema.get("$defs", {}))
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": inlined}}}}


def _without_refs(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Returns the schema with its definitions in place, since pointers to them are invalid in a document."""
    if isinstance(schema, list):
        return [_without_refs(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _without_refs(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _without_refs(value, definitions) for name, value in schema.items() if name != "$defs"}


def document_errors(envelope: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns an answer in an API's envelope for each status, for the OpenAPI document."""
    return {status: {"model": envelope, "description": _phrase(status)} for status in statuses}


def _phrase(status: int) -> str:
    return "Client Closed Request" if status == CLIENT_CLOSED else HTTPStatus(status).phrase
