"""The common part of all decoders, for any pipeline of diffusers. It does not use Ray."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import interpolate

from deployments.engines.guard import guarded
from deployments.engines.memory import wait_for
from deployments.errors import Cancelled, NotANumber
from deployments.stages.calls import Call
from deployments.types import Preview, Progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from deployments.errors import EngineFault
    from deployments.types import ImageRequest, Pixels

PREVIEW_SIDE = 512
"""Maximum length of a preview's longer side, in pixels. It is also at most half of the image's."""


class PipelineDecoder(ABC):
    """Makes one unit at a time with a pipeline of diffusers.

    The pixels equal those of one call of the pipeline, with a generator of the same seed on the same device.
    The exceptions are acceleration options that change pixels.

    Args:
        pipeline: pipeline with a `scheduler`, a `vae` and a DiT that was trained by flow matching.

    Attributes:
        pipeline: the pipeline.
        fault: fault that has stopped the decoder for good, or None while it works.
        work: number of denoising `steps` made so far.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline: Any = pipeline
        self._call = Call()
        self.fault: EngineFault | None = None
        self.work = {"steps": 0}
        # The VAE runs on source images, for previews and after the last step. It takes long and has no
        # callback, so hooks check for a cancelled call.
        encoder, decoder = self.pipeline.vae.encoder, self.pipeline.vae.decoder
        for block in (*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks):
            block.register_forward_pre_hook(lambda *_: self._stop_if_cancelled())

    @abstractmethod
    def _run(self, request: ImageRequest, **arguments: Any) -> torch.Tensor:
        """Calls the pipeline with the family's own arguments and with these, which every pipeline takes.

        Returns:
            The images: shape (1, 3, height, width), values 0 to 1.
        """

    @abstractmethod
    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns latents in the scale of the VAE's input."""

    @torch.inference_mode()
    def decode(self, request: ImageRequest, call: Call) -> Pixels:
        """Implements `deployments.families.Decoder.decode`."""
        self._call = call
        too_large = (
            f"the decoder stage has too little memory for {request.width}x{request.height} with "
            f"{len(request.sources)} source images; ask for a smaller size or fewer source images"
        )
        with guarded(
            self,
            self._device,
            "the decoder",
            request_id=call.request_id,
            too_large=too_large,
            recover=self.pipeline.maybe_free_model_hooks,  # upstream's own last step
        ):
            return self._paint(request)

    def _paint(self, request: ImageRequest) -> Pixels:
        self._stop_if_cancelled()
        began = time.monotonic()

        def after_step(pipeline: Any, step: int, _: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            wait_for(self._device)
            self.work["steps"] += 1
            self._stop_if_cancelled()
            done, total = step + 1, pipeline.num_timesteps  # an edit may skip the first steps
            self._call.report(Progress(done=done, total=total, seconds=time.monotonic() - began))
            preview_steps = _preview_steps(total, request.previews)
            if done in preview_steps:
                # Flow matching: the clean image is on the straight line along the velocity.
                scheduler = pipeline.scheduler
                clean = tensors["latents"] - scheduler.sigmas[scheduler.step_index] * tensors["noise_pred"]
                pixels = self._preview(clean)
                self._call.report(Preview(index=preview_steps.index(done), pixels=pixels))
            return {}

        images = self._run(
            request,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator(self._device).manual_seed(request.seed),
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents", "noise_pred"],
            output_type="pt",
        )
        return _pixels(images[0])

    @property
    def _device(self) -> torch.device:
        """Device on which the pipeline computes; its weights may be elsewhere."""
        device: torch.device = self.pipeline._execution_device
        return device

    def _stop_if_cancelled(self) -> None:
        if self._call.cancelled.is_set():
            raise Cancelled

    def _preview(self, latents: torch.Tensor) -> Pixels:
        """Returns a small image of latents: shape (1, channels, height / 8, width / 8)."""
        vae = self.pipeline.vae
        height, width = latents.shape[-2:]
        factor = max(2, -(-max(height, width) * self.pipeline.vae_scale_factor // PREVIEW_SIDE))
        small = interpolate(latents, (height // factor, width // factor), mode="area").to(vae.dtype)
        images = vae.decode(self._unscaled(small), return_dict=False)[0]
        return _pixels(self.pipeline.image_processor.postprocess(images, output_type="pt")[0])


def _preview_steps(steps: int, previews: int) -> list[int]:
    """Returns the steps that a preview follows, spread over the run. The last step is none of them."""
    spread = {round(steps * (i + 1) / (previews + 1)) for i in range(previews)}
    return sorted(spread - {0, steps})


def _pixels(image: torch.Tensor) -> Pixels:
    """Returns the pixels of an image, rounded on the device as upstream rounds on the CPU.

    Args:
        image: shape (3, height, width), values 0 to 1.

    Raises:
        NotANumber: the image has NaN or infinite values.
    """
    if not torch.isfinite(image).all():
        raise NotANumber("the decoder's pixels are not finite numbers")
    pixels: Pixels = (image.float() * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return pixels
