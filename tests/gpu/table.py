"""Prints the table of GPU figures in `docs/explained/performance.md` from the rows of a window.

python -m tests.gpu.table [FILE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent / "figures/nvidia-h200.jsonl"


class Figures:
    """The rows of a window.

    Args:
        file: its `figures.jsonl`.
    """

    def __init__(self, file: Path) -> None:
        self._rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]

    def find(self, figure: str, **values: Any) -> Any:
        """Returns the last row of a figure that has these values, and no error.

        Raises:
            LookupError: there is none. Run its step again.
        """
        wanted = {"figure": figure, **values}.items()
        for row in reversed(self._rows):
            if wanted <= row.items() and "error" not in row:
                return row
        raise LookupError(f"no row with {dict(wanted)}")


def table(figures: Figures) -> str:
    """Returns a table with the seconds of each kind of work."""
    alone, together = figures.find("prior, alone"), figures.find("prior, eight together")
    small, upstream = figures.find("prior, tokens of seed 0", step="prior"), figures.find("upstream, alone")
    whole = figures.find("image, both stages")
    rows = [
        ("prior stage, one request", alone["seconds"], f"{alone['tokens_s']:.0f} tokens/s"),
        (
            "prior stage, eight requests together",
            together["seconds"],
            f"{together['tokens_s']:,.0f} tokens/s, {together['images_min']:.0f} images/min",
        ),
        *(decoder(figures, side, kind) for side in (1024, 512, 2048) for kind in ("compiled", "plain")),
        *(edit(figures, sources) for sources in (1, 4)),
        (
            "both stages on one GPU, one request",
            whole["seconds"],
            f"prior {whole['prior_s']:.1f} s, decoder {whole['decoder_s']:.1f} s",
        ),
        (
            "prior stage, 512×512",
            small["seconds"],
            f"{upstream['seconds'] / small['seconds']:.1f} times upstream's speed",
        ),
        ("upstream's `generate`, 512×512", upstream["seconds"], f"{upstream['tokens_s']:.0f} tokens/s"),
    ]
    return "\n".join(
        ["| | seconds | |", "|---|---:|---|"]
        + [f"| {name} | {seconds:.1f} | {rate} |" for name, seconds, rate in rows]
    )


def decoder(figures: Figures, side: int, kind: str) -> tuple[str, float, str]:
    """Returns the row of a square image without sources."""
    row = figures.find("decoder, image", kind=kind, side=side)
    name = f"decoder stage, {side}×{side}" + (", `compile: false`" if kind == "plain" else "")
    return name, row["seconds_50_steps"], f"{row['ms_a_pass']:.0f} ms a pass"


def edit(figures: Figures, sources: int) -> tuple[str, float, str]:
    """Returns the row of an edit."""
    row = figures.find("edits, an image", sources=sources)
    name = f"decoder stage, edit with {sources} source image{'s' if sources > 1 else ''} of 1024×1024"
    return name, row["seconds_50_steps"], f"{1e3 * row['step_s']:.0f} ms a step"


if __name__ == "__main__":
    sys.stdout.write(table(Figures(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES)) + "\n")
