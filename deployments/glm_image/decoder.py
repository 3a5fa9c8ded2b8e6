"""The decoder of GLM-Image: prior tokens to pixels, by upstream's own pipeline. No Ray in here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.nn.functional import interpolate

from deployments.calls import Call
from deployments.errors import Cancelled, EngineFault, NotANumber, OutOfMemoryError, release
from deployments.glm_image import acceleration, checkpoint
from deployments.types import Preview, Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import ModelConfig
    from deployments.glm_image.pipeline import DecoderPipeline
    from deployments.types import DecodeRequest, Pixels, TokenGrid

PREVIEW_SIDE = 512
"""The longer side of a preview, in pixels, is this or less, and at most half the image's."""


class Decoder:
    """Paints prior tokens, one unit at a time.

    The pixels are those of `GlmImagePipeline` (diffusers 0.42) called whole, with a generator of the
    same seed on the same device, unless the pipeline was accelerated by something that changes them.
    """

    def __init__(self, pipeline: DecoderPipeline) -> None:
        self._pipeline = pipeline
        self._call = Call()
        self.fault: EngineFault | None = None
        self.done = 0
        # The VAE runs after the last step and for previews; it is the only long run without a callback.
        vae = pipeline.vae.decoder
        for block in (vae.mid_block, *vae.up_blocks):
            block.register_forward_pre_hook(lambda *_: self._stop_if_cancelled())

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> Decoder:
        """See `deployments.families.Decoder`."""
        pipeline = checkpoint.load_decoder(model, report)
        acceleration.apply(pipeline, model.decoder, max_side=model.traits.max_side)
        decoder = cls(pipeline)
        acceleration.try_out(model.decoder, decoder.decode)
        return decoder

    def decode(self, request: DecodeRequest, call: Call) -> Pixels:
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

    def _paint(self, request: DecodeRequest) -> Pixels:
        self._stop_if_cancelled()
        began = time.monotonic()
        preview_steps = _preview_steps(request.steps, request.previews)

        def after_step(_: Any, step: int, __: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            self.done += 1
            self._stop_if_cancelled()
            done = step + 1
            self._call.report(Progress(done=done, total=request.steps, seconds=time.monotonic() - began))
            if done in preview_steps:
                # Flow matching: from here a straight line along the velocity leads to the clean image.
                clean = tensors["latents"] - self._pipeline.scheduler.sigmas[done] * tensors["noise_pred"]
                pixels = self._preview(clean)
                self._call.report(Preview(index=preview_steps.index(done), pixels=pixels))
            return {}

        images: torch.Tensor = self._pipeline(
            prompt=request.prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator(self._pipeline._execution_device).manual_seed(request.seed),
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents", "noise_pred"],
            output_type="pt",
            **self._conditions(request),
        ).images
        return _pixels(images[0])

    def _stop_if_cancelled(self) -> None:
        if self._call.cancelled.is_set():
            raise Cancelled

    def _clean_up(self, error: Exception) -> None:
        """Make ready for the next unit, if the device still works."""
        release(error)
        device = self._pipeline._execution_device
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)  # a device that is lost raises the same error for ever
            except RuntimeError as error:
                self.fault = EngineFault(f"the decoder stopped: {error}")
                return
            torch.cuda.empty_cache()
        self._pipeline.maybe_free_model_hooks()  # upstream's own last step

    def _preview(self, latents: torch.Tensor) -> Pixels:
        """A small image of latents of shape (1, channels, height / 8, width / 8)."""
        vae = self._pipeline.vae
        height, width = latents.shape[-2:]
        factor = max(2, -(-max(height, width) * self._pipeline.vae_scale_factor // PREVIEW_SIDE))
        small = interpolate(latents, (height // factor, width // factor), mode="area").to(vae.dtype)
        mean, std = (
            torch.tensor(numbers, device=small.device, dtype=small.dtype).view(1, -1, 1, 1)
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        images = vae.decode(small * std + mean, return_dict=False)[0]
        return _pixels(self._pipeline.image_processor.postprocess(images, output_type="pt")[0])

    def _conditions(self, request: DecodeRequest) -> dict[str, Any]:
        """The prior tokens and source images, as the pipeline takes them."""
        conditions: dict[str, Any] = {"prior_token_ids": self._upsample(request.tokens.target)[None]}
        if request.sources:
            grids = request.tokens.sources
            conditions |= {
                "image": [Image.fromarray(source) for source in request.sources],
                "prior_token_image_ids": [torch.cat([self._upsample(grid) for grid in grids])],
                "source_image_grid_thw": [torch.tensor([[1, 2 * g.shape[0], 2 * g.shape[1]] for g in grids])],
            }
        return conditions

    def _upsample(self, grid: TokenGrid) -> torch.Tensor:
        """From a token for 32×32 pixels to one for 16×16, the DiT's grid: shape (4 × tokens,)."""
        upsampled = torch.from_numpy(grid.repeat(2, 0).repeat(2, 1).reshape(-1))
        return upsampled.to(self._pipeline._execution_device)


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
