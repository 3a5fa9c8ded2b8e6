"""Bodies in JSON: read within bounds, checked strictly, refused with the parameter's name."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from serve_app.errors import RequestError, too_large
from serve_app.generation.request import MAX_ID_CHARS

if TYPE_CHECKING:
    from fastapi import Request

MAX_FIELDS = 64
CLIENT_CLOSED = 499
"""Nginx's status, which HTTP has not."""
NOT_BLANK = r"[^\s\x1c-\x1f\x85]"
"""What Python takes for white space is more than what JSON Schema's regular expressions do."""


class Fields(BaseModel):
    """A body's fields, of which none is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    UNSUPPORTED: ClassVar[Mapping[str, str]] = {}
    """What clients may send and is refused, and why."""

    @classmethod
    def may_be_unset(cls, name: str) -> bool:
        """Whether null and the like are no values of a field, but leave it out."""
        field = cls.model_fields.get(name)
        return name in cls.UNSUPPORTED or (field is not None and not field.is_required())


class JSONFields(Fields):
    """The fields of a JSON body. Forms have texts only."""

    UNSET: ClassVar[tuple[bool | str | None, ...]] = (None,)
    """What leaves a field out."""

    @model_validator(mode="before")
    @classmethod
    def _without_unset(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        if len(fields) > MAX_FIELDS:  # each unknown one would be an error of its own
            raise PydanticCustomError("too_many", "Input should have at most 64 fields")
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value  # JSON's 1.0 is 1
            for name, value in fields.items()
            if not (cls.may_be_unset(name) and any(_are_same(value, unset) for unset in cls.UNSET))
        }


def _are_same(value: object, other: object) -> bool:
    return type(value) is type(other) and value == other  # 0 is not False


Body = TypeVar("Body", bound=Fields)


def media_type(request: Request) -> str:
    """What the body is, by its header."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, fields: type[Body], max_bytes: int) -> Body:
    """The fields of a JSON body.

    Raises:
        RequestError: it is no such body; 413, it is too large.
    """
    if media_type(request) != "application/json":
        raise RequestError("Send this request as application/json.", code="invalid_content_type")
    return await parse_json(await read(request, max_bytes), fields)


async def read(request: Request, max_bytes: int) -> bytearray:
    """The body.

    Raises:
        RequestError: 413, it is too large.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large(max_bytes)
    return body


async def parse_json(body: bytearray, fields: type[Body]) -> Body:
    """The fields of a body that was read.

    Raises:
        RequestError: it is not what it should be.
    """
    try:
        return await asyncio.to_thread(fields.model_validate_json, body)
    except ValidationError as error:
        raise first_error(error, fields) from None


def first_error(error: ValidationError, fields: type[Fields]) -> RequestError:
    """What pydantic found first; its messages never repeat the value."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return unknown(str(param), fields)
    if first["type"] == "missing":
        return RequestError(f"{param} is required.", param=param, code="missing_required_parameter")
    return RequestError(f"{param or 'The JSON body'}: {first['msg']}.", param=param)


def unknown(param: str, fields: type[Fields]) -> RequestError:
    """A field that there is not."""
    name = param.partition("[")[0]  # a form's svg[model]
    reason = f": {fields.UNSUPPORTED[name]}" if name in fields.UNSUPPORTED else ""
    return RequestError(
        f"The parameter {param!r:.100} is not supported{reason}.",
        param=param[:100],
        code="unsupported_parameter" if reason else "unknown_parameter",
    )


def request_id(request: Request) -> str:
    """The client's, or else the one that Serve has made; Serve sends it back.

    Raises:
        RequestError: it is too long.
    """
    given = request.headers.get("x-request-id", "")
    if len(given) > MAX_ID_CHARS:
        raise RequestError(f"X-Request-ID may have {MAX_ID_CHARS} characters.", param="X-Request-ID")
    return given


def parsed_size(size: str, otherwise: str = "") -> tuple[int, int]:
    """Width and height in pixels, from WIDTHxHEIGHT.

    Args:
        size: as it was sent.
        otherwise: in the message, what else it may be.

    Raises:
        RequestError: it is something else.
    """
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    if match is None:
        advice = " ".join(filter(None, ("Give the size as WIDTHxHEIGHT, 1024x1024 say,", otherwise))).rstrip(
            ","
        )
        raise RequestError(f"{advice}.", param="size")
    return int(match[1]), int(match[2])


def document_body(fields: type[Fields], *, required: bool = True) -> dict[str, Any]:
    """For the OpenAPI document: a JSON body, which the routes parse themselves."""
    schema = fields.model_json_schema()
    inlined = _without_refs(schema, schema.get("$defs", {}))
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": inlined}}}}


def _without_refs(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema with its definitions where they are meant: pointers to them lead nowhere in a document."""
    if isinstance(schema, list):
        return [_without_refs(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _without_refs(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _without_refs(value, definitions) for name, value in schema.items() if name != "$defs"}


def document_errors(envelope: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: an answer in an API's envelope for each status."""
    return {status: {"model": envelope, "description": _phrase(status)} for status in statuses}


def _phrase(status: int) -> str:
    return "Client Closed Request" if status == CLIENT_CLOSED else HTTPStatus(status).phrase
