"""Decoders: what they have in common, whatever pipeline they run. No Ray in here."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import interpolate

from deployments.engines.memory import cleared, wait_for
from deployments.errors import Cancelled, EngineFault, NotANumber, OutOfMemoryError, release
from deployments.stages.calls import Call
from deployments.types import Preview, Progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from deployments.types import ImageRequest, Pixels

PREVIEW_SIDE = 512
"""The longer side of a preview, in pixels, is this or less, and at most half the image's."""


class PipelineDecoder(ABC):
    """Paints one unit at a time by a pipeline of diffusers.

    The pixels are those of the pipeline called whole, with a generator of the same seed on the same device,
    unless it was accelerated by something that changes them.

    Args:
        pipeline: of a DiT that is trained by flow matching, with a `scheduler` and a `vae`.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline: Any = pipeline
        self._call = Call()
        self.fault: EngineFault | None = None
        self.done = 0
        self.unit = "steps"
        # The VAE runs on source images, after the last step and for previews: long, and without a callback.
        encoder, decoder = self._pipeline.vae.encoder, self._pipeline.vae.decoder
        for block in (*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks):
            block.register_forward_pre_hook(lambda *_: self._stop_if_cancelled())

    @abstractmethod
    def _run(self, request: ImageRequest, **arguments: Any) -> torch.Tensor:
        """Call the pipeline: what is the family's own, and these arguments, which every pipeline takes.

        Returns:
            The images, shape (1, 3, height, width), values 0 to 1.
        """

    @abstractmethod
    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE takes them."""

    @torch.inference_mode()
    def decode(self, request: ImageRequest, call: Call) -> Pixels:
        """See `deployments.families.Decoder`."""
        if self.fault:
            raise self.fault
        self._call = call
        try:
            return self._paint(request)
        except torch.OutOfMemoryError as error:
            self._clean_up(error)
            raise OutOfMemoryError(
                f"the decoder stage has too little memory for {request.width}x{request.height} with "
                f"{len(request.sources)} source images; ask for a smaller size or fewer source images"
            ) from error
        except Exception as error:
            self._clean_up(error)
            raise

    def _paint(self, request: ImageRequest) -> Pixels:
        self._stop_if_cancelled()
        began = time.monotonic()

        def after_step(pipeline: Any, step: int, _: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            wait_for(self._device)
            self.done += 1
            self._stop_if_cancelled()
            done, total = step + 1, pipeline.num_timesteps  # an edit may begin in the middle
            self._call.report(Progress(done=done, total=total, seconds=time.monotonic() - began))
            preview_steps = _preview_steps(total, request.previews)
            if done in preview_steps:
                # Flow matching: from here a straight line along the velocity leads to the clean image.
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
        """Where the pipeline computes, wherever its weights wait."""
        device: torch.device = self._pipeline._execution_device
        return device

    def _stop_if_cancelled(self) -> None:
        if self._call.cancelled.is_set():
            raise Cancelled

    def _clean_up(self, error: Exception) -> None:
        """Make ready for the next unit, if the device still works."""
        release(error, request_id=self._call.request_id)
        if lost := cleared(self._device):
            self.fault = EngineFault(f"the decoder stopped: {lost}")
            return
        self._pipeline.maybe_free_model_hooks()  # upstream's own last step

    def _preview(self, latents: torch.Tensor) -> Pixels:
        """A small image of latents of shape (1, channels, height / 8, width / 8)."""
        vae = self._pipeline.vae
        height, width = latents.shape[-2:]
        factor = max(2, -(-max(height, width) * self._pipeline.vae_scale_factor // PREVIEW_SIDE))
        small = interpolate(latents, (height // factor, width // factor), mode="area").to(vae.dtype)
        images = vae.decode(self._unscaled(small), return_dict=False)[0]
        return _pixels(self._pipeline.image_processor.postprocess(images, output_type="pt")[0])


def _preview_steps(steps: int, previews: int) -> list[int]:
    """After which steps there are previews: spread over the run, none after the last step."""
    spread = {round(steps * (i + 1) / (previews + 1)) for i in range(previews)}
    return sorted(spread - {0, steps})


def _pixels(image: torch.Tensor) -> Pixels:
    """From values of 0 to 1, shape (3, height, width), on the device: what upstream rounds on the CPU.

    Raises:
        NotANumber: there is something else in it.
    """
    if not torch.isfinite(image).all():
        raise NotANumber("the decoder's pixels are not numbers")
    pixels: Pixels = (image.float() * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return pixels
