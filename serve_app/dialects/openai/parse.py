"""Requests of the OpenAI image API, parsed into this server's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import ValidationError
from starlette.datastructures import UploadFile

from serve_app.dialects.bodies import MAX_FIELDS, first_error, parsed_size, read_json, request_id, unknown
from serve_app.dialects.openai.schemas import MAX_FILES, QUALITIES, ImageInput, JobFields, Quality
from serve_app.errors import Invalid, image_too_large
from serve_app.generation import containers
from serve_app.generation.request import Encoding, GenerationRequest

if TYPE_CHECKING:
    from fastapi import Request

    from serve_app.config import Limits
    from serve_app.generation.request import Source

Input = TypeVar("Input", bound=ImageInput)


@dataclass(frozen=True, kw_only=True)
class Parsed(Generic[Input]):
    """A parsed body.

    Attributes:
        fields: its fields.
        request: the request.
        quality: the word that determined the steps; None if none did.
    """

    fields: Input
    request: GenerationRequest
    quality: Quality | None


async def parse_json(
    request: Request, fields_type: type[Input], limits: Limits, max_bytes: int
) -> Parsed[Input]:
    """Parses a JSON body: of an edit, if it has `images`.

    Raises:
        Invalid: it is not valid.
        TooLarge: it has more than `max_bytes` bytes.
    """
    fields = await read_json(request, fields_type, max_bytes)
    urls = tuple(image.image_url for image in getattr(fields, "images", None) or ())
    return _parsed(request, fields, urls, limits)


async def parse_form(request: Request, fields_type: type[Input], limits: Limits) -> Parsed[Input]:
    """Parses the form of an edit, with its files.

    Raises:
        Invalid: it is not valid.
        TooLarge: it, or a file, has too many bytes.
    """
    fields, files = await _read_form(request, fields_type, limits)
    if not files:
        raise Invalid("Send at least one file as `image` or `image[]`.", param="image")
    return _parsed(request, fields, tuple(files), limits)


def _parsed(request: Request, fields: Input, sources: tuple[Source, ...], limits: Limits) -> Parsed[Input]:
    compression = 100 if fields.output_compression is None else fields.output_compression
    encoding = Encoding(fields.output_format or "png", compression)
    if encoding.format == "png" and compression < 100:
        raise Invalid(
            f"output_compression is {compression}, but PNG is lossless; set output_format to jpeg or webp.",
            param="output_compression",
        )
    steps, quality = fields.num_inference_steps, None
    if steps is None and fields.quality:
        quality, steps = QUALITIES[fields.quality]
        if steps > limits.max_steps:
            raise Invalid(
                f"{fields.quality} takes {steps} denoising steps, and {limits.max_steps} are allowed; choose "
                "a lower quality.",
                param="quality",
            )
    generation = GenerationRequest(
        model=fields.model,
        prompt=fields.prompt,
        size=None if fields.size in (None, "auto") else parsed_size(fields.size, ", or auto"),
        n=1 if fields.n is None else fields.n,
        steps=steps,
        guidance_scale=fields.guidance_scale,
        negative_prompt=fields.negative_prompt,
        cfg_normalization=fields.cfg_normalization,
        strength=fields.strength,
        seed=fields.seed,
        partial_images=fields.partial_images or 0,
        sources=sources,
        encoding=encoding,
        expand_prompt=fields.enable_prompt_expansion or False,
        moderation=getattr(fields, "moderation", None) or "auto",
        start_within_s=fields.start_within_s if isinstance(fields, JobFields) else None,
        api="openai",
        request_id=request_id(request),
        key_id=request.state.key_id,
    )
    return Parsed(fields=fields, request=generation, quality=quality)


async def _read_form(request: Request, fields: type[Input], limits: Limits) -> tuple[Input, list[bytes]]:
    """Returns the fields and the files of a multipart body."""
    texts: dict[str, str] = {}
    files: list[bytes] = []
    try:
        # The texts are bounded by the body's limit, and then by the limits of their parameters.
        most = limits.max_body_bytes
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=most) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in ("image", "image[]"):
                        raise unknown(name, fields)
                    if (value.size or 0) > limits.max_image_bytes:
                        raise image_too_large(limits.max_image_bytes)
                    files.append(await value.read())
                elif name in ("image", "image[]"):
                    files.append(_nameless_file(value, limits))
                elif name in texts:
                    raise Invalid(f"{name:.100} is given twice; send it once.", param=name[:100])
                elif not (fields.may_be_unset(name) and value in ("", "false")):
                    texts[name] = value.replace("\r\n", "\n")  # browsers end the lines of forms so
    except (ValueError, LookupError) as error:  # a charset that Starlette does not expect
        raise Invalid("The form cannot be decoded; send it as UTF-8.") from error
    try:
        return fields.model_validate_strings(texts), files
    except ValidationError as error:
        raise first_error(error, fields) from None


def _nameless_file(text: str, limits: Limits) -> bytes:
    """Returns the file of a part without a file name, which RFC 7578 (4.2) leaves optional.

    Starlette takes the part for a text. It decodes what is not UTF-8 as Latin-1.
    """
    try:
        data = text.encode("latin-1")
    except UnicodeEncodeError:
        data = b""
    if not containers.is_image(data):
        raise Invalid("image must be a file (with curl: -F image=@FILE).", param="image")
    if len(data) > limits.max_image_bytes:
        raise image_too_large(limits.max_image_bytes)
    return data
