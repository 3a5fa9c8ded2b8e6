"""Acceleration of a loaded pipeline: one function for each option of the configuration."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.models.resnet import ResnetBlock2D

from deployments.engines import compilation
from deployments.engines.memory import free_bytes, working_bytes
from deployments.errors import OutOfMemoryError, UnsupportedOption
from deployments.memory_plan import GPU_OVERHEAD, peaks
from deployments.stages.calls import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.config import DecoderConfig, ModelConfig
    from deployments.types import ImageRequest

logger = logging.getLogger("ray.serve")


class Pipeline(Protocol):
    """A family's pipeline: diffusers' `DiffusionPipeline` with a DiT, a VAE and methods of our own."""

    transformer: Any
    vae: Any
    vae_scale_factor: int
    components: Any
    to: Any
    enable_model_cpu_offload: Any
    enable_group_offload: Any

    def try_step(self, side: int) -> object:
        """Runs the DiT as in one pass of a square image, to measure its memory.

        Args:
            side: side of the image in pixels.
        """

    def compile(self, options: dict[str, Any]) -> None:
        """Compiles the DiT's blocks for all image sizes; see `deployments.engines.compilation.options`."""

    def cache_steps(self, threshold: float) -> None:
        """Makes steps skip the DiT's blocks after the first, if that one's output has hardly changed.

        Args:
            threshold: relative change since the last step below which the other blocks are skipped.

        Raises:
            UnsupportedOption: diffusers has no step cache for this DiT.
        """


def loading_device(config: DecoderConfig, size: int) -> str:
    """Returns where to load the weights: the stage's device if they fit and stay there, else the CPU.

    Args:
        config: configuration of the stage.
        size: size of the files of the weights in bytes. In float32, weights may be twice as large.
    """
    chosen = config.acceleration
    stays = chosen.quantization == "none" and chosen.offload in ("auto", "none")
    largest = size * (2 if config.dtype == "float32" else 1)
    fits = largest <= free_bytes(torch.device(config.device))
    return config.device if stays and fits else "cpu"


def apply(pipeline: Pipeline, config: DecoderConfig, *, max_side: int) -> None:
    """Applies the options to a pipeline and puts it on its device.

    Args:
        pipeline: pipeline to change. Its components are on the CPU or already on the device.
        config: configuration of the stage.
        max_side: longer side of the largest possible image, in pixels.

    Raises:
        UnsupportedOption: this machine, or an installed version, does not support an option.
        OutOfMemoryError: the device has too little memory for the largest image.
    """
    chosen = config.acceleration
    if chosen.vae_tiling:
        tile_vae(pipeline)
    device = torch.device(config.device)
    working = component_bytes(pipeline, max_side, device)
    for name, option, is_wanted in (
        ("quantization", quantize, chosen.quantization != "none"),
        ("step_cache", lambda pipeline: pipeline.cache_steps(chosen.step_cache), chosen.step_cache > 0),
        ("attention", partial(choose_attention, backend=chosen.attention), chosen.attention != "native"),
        ("compile", partial(compile_parts, device=device), config.compiles),
    ):
        if is_wanted:
            try:
                option(pipeline)
            except Exception as error:
                # Compilation is on by default on a GPU.
                remedy = "set it to false" if name == "compile" else "remove it"
                raise UnsupportedOption(
                    f"decoder.acceleration.{name} is not available here; {remedy}: {error}"
                ) from error
    place(pipeline, device, chosen.offload, working)
    logger.info("images of up to %dx%d", max_side, max_side)


Size = tuple[int, int]


def warm_up_sizes(model: ModelConfig) -> tuple[Size, Size]:
    """Returns the sizes of the first image to warm up with, and of the others: width and height in pixels.

    The others have the default size. The first size is slightly different and not a square, and source
    images have another size than their image. Otherwise the compiler would assume that lengths which are
    equal in its first example are always equal. A stage that does not compile makes the smallest image.

    Args:
        model: configuration of the model.
    """
    if not model.decoder.compiles:
        smallest = (model.traits.min_side, model.traits.min_side)
        return smallest, smallest
    width, height = model.defaults.width, model.defaults.height
    step = model.traits.side_multiple
    near = (height - step, height + step, height - 2 * step, height + 2 * step)
    first = next(one for one in near if one != width and model.traits.is_legal_size(width, one))
    return (width, first), (width, height)


def warm_up(
    config: DecoderConfig,
    decode: Callable[[ImageRequest, Call], Any],
    units: Sequence[ImageRequest],
    report: Callable[[float], None],
) -> None:
    """Makes one image of each kind if an option is in use with which the first one is slow, or may fail.

    The compiler runs when code is first needed. Here that happens before a client waits for it. An option
    that fails only in use fails here.

    Args:
        config: configuration of the stage.
        decode: makes an image.
        units: one image of each kind. A stage that does not compile makes only the first one.
        report: takes the share of the images that are made, 0 to 1.

    Raises:
        UnsupportedOption: an image could not be made.
    """
    used = config.acceleration.model_dump(exclude_defaults=True) | {"compile": config.compiles}
    if not any(used.values()):
        return
    units = units if config.compiles else units[:1]
    for done, unit in enumerate(units, start=1):
        try:
            decode(unit, Call())
        except Exception as error:
            raise UnsupportedOption(
                f"no image could be made with decoder.acceleration = {used}; remove an option, or set "
                f"compile to false: {error}"
            ) from error
        report(done / len(units))


def quantize(pipeline: Pipeline) -> None:
    """Stores the DiT's weights in 8 bits (float8_e4m3fn). The arithmetic keeps its type."""
    pipeline.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=pipeline.transformer.dtype
    )


def tile_vae(pipeline: Pipeline) -> None:
    """Makes the VAE decode large images in overlapping tiles and blend their seams."""
    pipeline.vae.enable_tiling()


def choose_attention(pipeline: Pipeline, backend: str) -> None:
    """Selects one of diffusers' attention backends."""
    pipeline.transformer.set_attention_backend(backend)


def compile_parts(pipeline: Pipeline, device: torch.device) -> None:
    """Compiles the DiT's blocks and the VAE decoder's residual blocks, for images of all sizes.

    Args:
        pipeline: pipeline to change.
        device: device on which the pipeline will compute.
    """
    options = compilation.options(device)
    pipeline.compile(options)
    compile_vae(pipeline.vae, options)


def compile_vae(vae: Any, options: dict[str, Any]) -> None:
    """Compiles the residual blocks of a VAE's decoder; see `deployments.engines.compilation.options`."""
    for module in vae.decoder.modules():
        if isinstance(module, ResnetBlock2D):
            module.compile(fullgraph=True, dynamic=True, options=options)


def place(pipeline: Pipeline, device: torch.device, offload: str, working: dict[str, int]) -> None:
    """Puts the pipeline on its device, at once or part by part, and logs how much memory that takes.

    Args:
        pipeline: pipeline to place. Its components are on the CPU or on the device.
        device: device on which the pipeline computes.
        offload: `none`, `model`, `group` or `auto`, which is `none` if everything fits, else `model`.
        working: bytes that each large component needs in addition to its weights.

    Raises:
        OutOfMemoryError: the device has too little free memory.
    """
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    weights = {name: _weight_bytes(part) for name, part in parts.items()}
    on_cpu = device.type == "cpu"
    needs = {way: sum(peak) for way, peak in peaks(weights, working).items()}
    if on_cpu:  # the weights are there already
        needs["none"] = max(working.values())
    free = free_bytes(device) + sum(_weight_bytes(part, on=device) for part in parts.values() if not on_cpu)
    if offload == "auto":
        offload = "none" if on_cpu or needs["none"] <= free else "model"
    plan = (
        f"the decoder stage takes {needs[offload] / 1e9:.1f} GB with offload {offload!r}, "
        f"{max(working.values()) / 1e9:.1f} GB of it in addition to the weights; "
        f"{free / 1e9:.1f} GB are free on {device}"
    )
    if needs[offload] > free:
        remedies = "vae_tiling" if on_cpu else "vae_tiling, quantization: fp8 or offload: group"
        raise OutOfMemoryError(f"{plan}: set decoder.acceleration.{remedies}")
    logger.info("%s", plan)
    if not on_cpu:
        # cuDNN's convolutions use this memory format. With the other one they allocate copies, 1.6 GB for an
        # image of 1024×1024. On an H200 the copies are faster nevertheless: by 0.08 s without compiled code.
        pipeline.vae.to(memory_format=torch.channels_last)
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "group":
        # diffusers detects the end of a part's run in its `forward`, which is never called for the VAE.
        pipeline.enable_group_offload(
            device, offload_type="leaf_level", use_stream=True, exclude_modules="vae"
        )
        pipeline.vae.to(device)
    else:
        pipeline.to(device)


def _weight_bytes(part: torch.nn.Module, *, on: torch.device | None = None) -> int:
    """Returns the size of a component's weights in bytes, or of those on one type of device."""
    tensors = (*part.parameters(), *part.buffers())
    return sum(tensor.nbytes for tensor in tensors if on is None or tensor.device.type == on.type)


def component_bytes(pipeline: Pipeline, side: int, device: torch.device) -> dict[str, int]:
    """Returns the bytes that the two large components need for a square image, without their weights.

    On a GPU they include a margin, see `deployments.memory_plan.GPU_OVERHEAD`.

    Args:
        pipeline: pipeline on any device.
        side: side of the image in pixels.
        device: device on which the pipeline will compute.
    """
    vae = pipeline.vae
    latent_side = side // pipeline.vae_scale_factor
    latents = (1, vae.config.latent_channels, latent_side, latent_side)
    computed = {
        "transformer": working_bytes(lambda: pipeline.try_step(side)),
        "vae": working_bytes(lambda: vae.decode(torch.empty(latents, dtype=vae.dtype, device=vae.device))),
    }
    factor = 1 if device.type == "cpu" else GPU_OVERHEAD
    return {part: round(factor * size) for part, size in computed.items()}
