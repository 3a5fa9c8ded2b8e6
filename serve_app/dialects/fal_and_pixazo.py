"""The fields that fal's and Pixazo's APIs for GLM-Image share, and their parser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from serve_app.dialects.bodies import NOT_BLANK, PROMPT, JSONFields, document_body, read_json, request_id
from serve_app.errors import Invalid
from serve_app.generation.request import MAX_SEED, Encoding, GenerationRequest

if TYPE_CHECKING:
    from fastapi import Request

    from deployments.config import ModelConfig
    from serve_app.config import Limits
    from serve_app.generation.generator import Generator

PRESETS = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
    # The APIs list these without their sizes.
    "portrait_3_2": (832, 1248),
    "landscape_3_2": (1248, 832),
    "portrait_hd": (1152, 1536),
    "landscape_hd": (1536, 1152),
}
"""Width and height in pixels, from https://docs.fal.ai where it has them."""
MAX_IMAGES = 4
MAX_SOURCES = 4
NAMES = {
    "n": "num_images",
    "size": "image_size",
    "steps": "num_inference_steps",
    "sources": "image_urls",
    "expand_prompt": "enable_prompt_expansion",
}
"""These APIs' names of parameters that have other names here."""


class ImageSize(JSONFields):
    """A size in pixels. The image is made at the next size that the model accepts, and cropped."""

    # These are the documented bounds. `serve_app.generation.validation` checks those of the model.
    width: int = Field(ge=512, le=2048)
    height: int = Field(ge=512, le=2048)


def _of_preset(size: object) -> object:
    if not isinstance(size, str):
        return size
    if size not in PRESETS:
        raise Invalid(
            f"Invalid image_size value: {size:.50}. Send width and height in pixels, or one of "
            f"{', '.join(PRESETS)}.",
            param="image_size",
        )
    width, height = PRESETS[size]
    return ImageSize.model_construct(width=width, height=height)


def _listed(urls: object) -> object:
    return [urls] if isinstance(urls, str) else urls


_SIZE_SCHEMA = {"anyOf": [{"enum": list(PRESETS)}, ImageSize.model_json_schema(), {"type": "null"}]}
_URL_SCHEMA = {"type": "string", "format": "uri"}


class ImageInput(JSONFields):
    """Fields of an image. Null means that a field is unset."""

    prompt: str = Field(
        min_length=1,
        description=PROMPT,
        json_schema_extra={"pattern": NOT_BLANK},
    )
    image_size: Annotated[ImageSize | None, BeforeValidator(_of_preset), WithJsonSchema(_SIZE_SCHEMA)] = (
        Field(default=None, description="A preset, or width and height. Defaults to `square_hd`.")
    )
    num_inference_steps: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Denoising steps. Defaults to 30 for GLM-Image, and to the model's steps for other "
        "models.",
    )
    guidance_scale: float | None = Field(
        default=None,
        ge=1,
        le=10,
        allow_inf_nan=False,
        description="Classifier-free guidance. Defaults to the model's.",
    )
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="Drawn if unset.")
    num_images: int | None = Field(
        default=None,
        ge=1,
        le=MAX_IMAGES,
        description="Number of images; image i has the seed `seed` + i. Defaults to 1.",
    )
    enable_safety_checker: bool | None = Field(
        default=None,
        description="Whether to check images, if the server has a safety checker (see `/v1/models`). "
        "Defaults to true.",
    )
    output_format: Literal["jpeg", "png"] | None = Field(default=None, description="Defaults to `jpeg`.")
    sync_mode: bool | None = Field(
        default=None, description="Whether the answer contains the images, as data URLs."
    )
    enable_prompt_expansion: bool | None = Field(
        default=None,
        description="Whether to rewrite the prompt first. A server without a prompt expander rejects true.",
    )


class EditInput(ImageInput):
    """Fields of an edit."""

    image_urls: Annotated[
        list[str],
        BeforeValidator(_listed),
        Field(min_length=1, max_length=MAX_SOURCES),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "array", "minItems": 1, "maxItems": MAX_SOURCES, "items": _URL_SCHEMA},
                    _URL_SCHEMA,
                ]
            }
        ),
    ] = Field(description="URLs of 1 to 4 PNG, JPEG or WebP images: http, https, or data with base64.")


class InputReader:
    """Parses requests.

    Args:
        generator: has the models.
        limits: limits of bodies.
        api: name of the dialect.
        blacken: whether flagged images become black ones.
    """

    def __init__(self, generator: Generator, limits: Limits, api: str, *, blacken: bool = False) -> None:
        self._generator = generator
        self._limits = limits
        self._api = api
        self._blacken = blacken

    def document(self, fields_type: type[ImageInput]) -> dict[str, Any]:
        """Returns the body for the OpenAPI document. It promises only what this server has."""
        document = document_body(fields_type)
        if not self._generator.expands_prompts:
            schema = document["requestBody"]["content"]["application/json"]["schema"]
            schema["properties"]["enable_prompt_expansion"]["not"] = {"const": True}
        return document

    async def read(
        self, request: Request, fields_type: type[ImageInput], model: str
    ) -> tuple[ImageInput, GenerationRequest]:
        """Returns the fields of a body, and the request that they make for a model.

        Raises:
            Invalid: it is not valid.
            TooLarge: it has too many bytes.
            NotFound: there is no such model.
        """
        limits = self._limits
        most = limits.max_body_bytes if issubclass(fields_type, EditInput) else limits.max_json_bytes
        fields = await read_json(request, fields_type, most)
        return fields, self._request(fields, self._generator.model(model), request)

    def _request(self, fields: ImageInput, model: ModelConfig, request: Request) -> GenerationRequest:
        family = model.traits
        size = fields.image_size or ImageSize.model_construct(width=1024, height=1024)
        wanted = (size.width, size.height)
        # Above the limit, the model's own default takes its place.
        documented = family.hosted_steps if (family.hosted_steps or 0) <= self._limits.max_steps else None
        width, height = (
            -(-side // family.side_multiple) * family.side_multiple for side in wanted
        )  # rounded up
        return GenerationRequest(
            model=model.name,
            prompt=fields.prompt,
            size=(width, height),
            crop=None if wanted == (width, height) else wanted,
            n=fields.num_images or 1,
            steps=fields.num_inference_steps or documented,
            guidance_scale=fields.guidance_scale,
            seed=fields.seed,
            sources=tuple(fields.image_urls) if isinstance(fields, EditInput) else (),
            encoding=Encoding(fields.output_format or "jpeg"),
            expand_prompt=fields.enable_prompt_expansion or False,
            moderation="low" if fields.enable_safety_checker is False else "auto",
            blacken=self._blacken,
            api=self._api,
            request_id=request_id(request),
            key_id=request.state.key_id,
        )
