"""Compares a seed's bytes between two processes with separate caches of compiled code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.gpu import engines, measure
from tests.gpu.steps import decoder as decoder_step
from tests.gpu.steps import prior as prior_step

if TYPE_CHECKING:
    from tests.gpu.rows import Run


def exact_prior(run: Run) -> None:
    """Generates one seed's tokens again, and compares them with those of the step `prior`."""
    device = measure.prepare(run)
    prior_step.first_tokens(run, engines.load_prior(run, device))
    compare(run, "prior, tokens of seed 0", with_step="prior")


def exact_decoder(run: Run) -> None:
    """Decodes one seed's image again, and compares it with the one of the step `decoder`."""
    device = measure.prepare(run)
    loaded = engines.load_decoder(run, device, side=run.size(1024))
    decoder_step.first_image(run, loaded, device)
    decoder_step.exact_image(run, loaded, device)
    compare(run, "decoder, pixels of seed 0", with_step="decoder")


def compare(run: Run, figure: str, *, with_step: str) -> None:
    """Writes whether a figure's digest equals the one of another step."""
    with run.figure(f"{figure}, in two processes with caches of their own") as values:
        digests = {row["step"]: row["digest"] for row in run.rows.read() if row.get("figure") == figure}
        if with_step in digests:
            values["same"] = digests[run.step] == digests[with_step]
        else:
            values["skipped"] = f"the step {with_step} has written no digest"
