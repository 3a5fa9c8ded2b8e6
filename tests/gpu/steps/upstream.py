"""Upstream's `generate`, for comparison with the prior stage."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from diffusers import GlmImagePipeline

from tests.gpu import engines, measure, models

if TYPE_CHECKING:
    from tests.gpu.rows import Run


class Enough(Exception):  # noqa: N818 - not an error
    """Raised to stop upstream after a number of tokens."""


def upstream(run: Run) -> None:
    """Writes upstream's time for one request's prior tokens."""
    device = measure.prepare(run)
    # cuDNN's attention plans each new length, which takes tens of milliseconds per token as lengths grow.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model, processor = models.prior(device, tiny_size=run.tiny)
    pipeline = GlmImagePipeline(None, processor, None, model, None, None, None)
    generate, side = model.generate, run.size(512)

    def tokens(limit: int | None) -> int:
        """Generates tokens up to a limit, and returns their number."""
        drawn = 0

        def limited(**arguments: torch.Tensor | int) -> torch.Tensor:
            nonlocal drawn
            if limit:
                arguments["max_new_tokens"] = limit
            output: torch.Tensor = generate(**arguments)
            prompt = arguments["input_ids"]
            assert isinstance(prompt, torch.Tensor)
            drawn = output.shape[1] - prompt.shape[1]
            if limit:
                raise Enough
            return output

        model.generate = limited
        with suppress(Enough):
            pipeline.generate_prior_tokens(
                engines.PROMPT, side, side, device=device, generator=torch.Generator(device).manual_seed(0)
            )
        return drawn

    with run.figure("upstream, alone", side=side) as values:
        tokens(8)  # a warm-up of the libraries
        _, few = measure.seconds(lambda: tokens(16), device)
        values["ms_a_token_at_first"] = 1e3 * few / 16
        drawn, seconds = measure.seconds(lambda: tokens(None), device)
        values |= {
            "seconds": seconds,
            "tokens_s": drawn / seconds,
            "ms_a_token": 1e3 * seconds / drawn,
            "images_min": 60 / seconds,
        }
