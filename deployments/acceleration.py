"""What makes a loaded pipeline faster or smaller: a function for each option of the configuration."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from deployments.calls import Call
from deployments.errors import OutOfMemoryError, UnsupportedOption
from deployments.memory import free_bytes, working_bytes
from deployments.types import DecodeRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import DecoderConfig
    from deployments.types import Prior

logger = logging.getLogger("ray.serve")


class Pipeline(Protocol):
    """A family's pipeline: diffusers' `DiffusionPipeline` with a DiT and a VAE, and two things more."""

    transformer: Any
    vae: Any
    vae_scale_factor: int
    components: Any
    to: Any
    enable_model_cpu_offload: Any
    enable_group_offload: Any

    def try_step(self, side: int) -> object:
        """The DiT's part in a step with guidance, of a square image: its shapes count, not its contents."""

    def cache_steps(self, threshold: float) -> None:
        """Leave out the DiT's blocks but the first where that one's change is close to the last step's.

        Raises:
            UnsupportedOption: diffusers cannot do so with this DiT.
        """


def apply(pipeline: Pipeline, config: DecoderConfig, *, max_side: int) -> None:
    """Apply the options to a pipeline whose components are on the CPU, and put it on its device.

    Args:
        pipeline: is changed.
        config: of the stage.
        max_side: of the largest image that will be asked for, in pixels.

    Raises:
        UnsupportedOption: this machine, or a version of something on it, cannot do what is asked.
        OutOfMemoryError: the largest image does not fit.
    """
    chosen = config.acceleration
    if chosen.vae_tiling:
        tile_vae(pipeline)
    working = _working_bytes(pipeline, max_side)
    for name, option, is_wanted in (
        ("quantization", quantize, chosen.quantization != "none"),
        ("step_cache", lambda pipeline: pipeline.cache_steps(chosen.step_cache), chosen.step_cache > 0),
        ("attention", partial(choose_attention, backend=chosen.attention), chosen.attention != "native"),
        ("compile", compile_blocks, chosen.compile),
    ):
        if is_wanted:
            try:
                option(pipeline)
            except Exception as error:
                raise UnsupportedOption(f"decoder.acceleration.{name} cannot be had here: {error}") from error
    place(pipeline, torch.device(config.device), chosen.offload, working)
    logger.info("images of up to %dx%d", max_side, max_side)


def try_out(config: DecoderConfig, decode: Callable[[DecodeRequest, Call], Any], prior: Prior) -> None:
    """Make an image of 512×512 with this prior when there are options that may fail only when used.

    Raises:
        UnsupportedOption: it could not be made.
    """
    used = config.acceleration.model_dump(exclude_defaults=True)
    if not used:
        return
    request = DecodeRequest(
        prompt="", width=512, height=512, seed=0, steps=2, guidance_scale=1.5, prior=prior
    )
    try:
        decode(request, Call())
    except Exception as error:
        raise UnsupportedOption(
            f"no image could be made with decoder.acceleration = {used}: {error}"
        ) from error


def quantize(pipeline: Pipeline) -> None:
    """Keep the DiT's weights in 8 bits (float8_e4m3fn), and compute in the type they had."""
    pipeline.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=pipeline.transformer.dtype
    )


def tile_vae(pipeline: Pipeline) -> None:
    """Decode large images in overlapping tiles, whose seams are blended."""
    pipeline.vae.enable_tiling()


def choose_attention(pipeline: Pipeline, backend: str) -> None:
    """Use one of diffusers' attention backends."""
    pipeline.transformer.set_attention_backend(backend)


def compile_blocks(pipeline: Pipeline) -> None:
    """Compile the DiT's block, for all of them together.

    It is compiled anew for each kind of call: with or without text, sizes, reading or writing a source.
    """
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, recompile_limit=64)


def place(pipeline: Pipeline, device: torch.device, offload: str, working: dict[str, int]) -> None:
    """Put the pipeline on its device, whole or in turns, and say how much memory that takes.

    Args:
        pipeline: its components are on the CPU.
        device: where it computes.
        offload: `none`, `model`, `group`, or `auto`: `none` if it fits, else `model`.
        working: bytes that a component takes beside its weights.
    """
    weights = {
        name: sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    on_cpu = device.type == "cpu"
    needs = {
        "none": (0 if on_cpu else sum(weights.values())) + max(working.values()),
        # The VAE stays where it is while the DiT follows it: after a preview or a source image.
        "model": weights["vae"] + max(weights["transformer"] + working["transformer"], working["vae"]),
        "group": weights["vae"] + max(working.values()),
    }
    free = free_bytes(device)
    if offload == "auto":
        offload = "none" if on_cpu or needs["none"] <= free else "model"
    plan = (
        f"the decoder stage takes {needs[offload] / 1e9:.1f} GB with offload {offload!r}, "
        f"{max(working.values()) / 1e9:.1f} GB of it beside the weights; "
        f"{free / 1e9:.1f} GB are free on {device}"
    )
    if needs[offload] > free:
        raise OutOfMemoryError(
            f"{plan}: set decoder.acceleration.vae_tiling, quantization: fp8 or offload: group"
        )
    logger.info("%s", plan)
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "group":
        # diffusers would look for the end of the VAE's run in its `forward`, which is never called.
        pipeline.enable_group_offload(
            device, offload_type="leaf_level", use_stream=True, exclude_modules="vae"
        )
        pipeline.vae.to(device)
    else:
        pipeline.to(device)


def _working_bytes(pipeline: Pipeline, side: int) -> dict[str, int]:
    """What the two large parts take beside their weights for a square image."""
    vae = pipeline.vae
    latent_side = side // pipeline.vae_scale_factor
    latents = (1, vae.config.latent_channels, latent_side, latent_side)
    return {
        "transformer": working_bytes(lambda: pipeline.try_step(side)),
        "vae": working_bytes(lambda: vae.decode(torch.empty(latents, dtype=vae.dtype))),
    }
