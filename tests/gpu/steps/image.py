"""A whole image on one GPU: both stages in turn, with compiled code from the cache."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.gpu import engines, measure
from tests.gpu.steps import decoder as decoder_step

if TYPE_CHECKING:
    from tests.gpu.rows import Run


def image(run: Run) -> None:
    """Writes the seconds from a prompt to pixels, and the memory of both stages."""
    device = measure.prepare(run)
    memory = measure.Memory(device)
    prior = engines.load_prior(run, device)
    side, steps = run.size(1024), run.count(decoder_step.STEPS, 2)
    with run.figure("decoder, loaded") as values:
        loaded, values["seconds"] = measure.seconds(
            lambda: engines.load_decoder(run, device, side=side), device
        )
        values["predicted"] = loaded.predicted
    decoder_step.first_image(run, loaded, device)
    engines.generate(prior, [engines.prior_request(run.size(512))])
    with run.figure("image, both stages", side=side, steps=steps) as values:
        began = time.perf_counter()
        (tokens,), values["prior_s"] = engines.generate(prior, [engines.prior_request(side)])
        painted = engines.paint(loaded.engine, engines.unit(run, side, steps, prior=tokens), device)
        values["seconds"] = time.perf_counter() - began
        values["decoder_s"] = painted.seconds
        values["tokens_digest"] = measure.digest(tokens.target)
        values["digest"] = measure.digest(painted.pixels)
    run.emit("image, memory of both stages", **memory.values())
