"""How often the demo checkpoint paints what a sentence says, and how long it takes, over HTTP.

    python -m tests.demo.accuracy [--count 200] [--size 512x512 1024x1024] [--no-edits] [--url URL]

Serves a configuration, or asks a server that runs already. Sentences are drawn as those of the training are,
by other seeds; a judge that knows geometry looks at the pictures. `count` is the number of objects, and `all`
all of it at once.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from PIL import Image

from deployments.types import Pixels
from tests.demo.conftest import CONFIG, demo_config
from tests.demo.judge import drawn, wrong
from tests.serve.conftest import served
from tests.serve.test_exactness import edit, generate
from training.demo.scenes import Scene, random_edit, random_scene

USUAL_SIZE = "512x512"
EDITS, OWN_EDITS = "edits", "edits of its own"
"""The sources are drawn by code, or painted by the demo."""
SIZES = (USUAL_SIZE, "768x512", "512x768", "1024x1024")
LESS = 8
"""So many times fewer are asked for of other sizes and of edits."""
STEPS = 8
AT_ONCE = 8
"""The next ones wait for all of these: on few cores stages that work at once hinder each other."""
ALONE = 5
"""So many are asked for one after the other first, and timed."""
MARKS = ("background", "count", "colour", "shape", "place", "size")
SHEET = 4
"""A sheet has so many rows and columns, ..."""
TILE = 256
"""... each of so many pixels, ..."""
FRAME = 4
"""... and around each a frame."""


@dataclass(frozen=True)
class Asked:
    """What a picture is to show, and for an edit what it is made of."""

    scene: Scene
    source: Scene | None = None


@contextmanager
def server(config: Path, url: str | None) -> Iterator[str]:
    """The address of a server: the one given, or of one that serves the configuration meanwhile."""
    if url:
        yield url
        return
    with tempfile.TemporaryDirectory() as folder, served(demo_config(Path(folder), config)) as running:
        yield running.url


def asked(kind: str, count: int) -> list[Asked]:
    chance = random.Random(f"held out: {kind}")
    if kind not in (EDITS, OWN_EDITS):
        return [Asked(random_scene(chance)) for _ in range(count)]
    return [Asked(after, before) for before, after in (random_edit(chance) for _ in range(count))]


def paint(client: httpx.Client, scene: Scene, size: str, seed: int, source: Pixels | None = None) -> Pixels:
    fields = {"prompt": scene.sentence, "size": size, "seed": seed, "num_inference_steps": STEPS}
    (pixels,) = edit(client, (source,), **fields) if source is not None else generate(client, **fields)
    return pixels


def measure(client: httpx.Client, kind: str, count: int, sheets: Path | None) -> str:
    """Ask for pictures of one kind.

    Returns:
        Its row of the table.
    """
    size = USUAL_SIZE if kind in (EDITS, OWN_EDITS) else kind
    width, height = map(int, size.split("x"))
    everything = asked(kind, count)
    times = []

    def one(seed: int) -> Pixels:
        scene, before = everything[seed].scene, everything[seed].source
        source = None
        if before:
            own = kind == OWN_EDITS
            source = paint(client, before, size, seed) if own else drawn(before, width, height)
        began = time.perf_counter()
        painted = paint(client, scene, size, seed, source)
        times.append(time.perf_counter() - began)
        return painted

    pictures = [one(seed) for seed in range(min(ALONE, count))]
    seconds = statistics.median(times)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(ALONE, count, AT_ONCE):
            pictures += pool.map(one, range(first, min(first + AT_ONCE, count)))
    faults = [wrong(one.scene, picture) for one, picture in zip(everything, pictures, strict=True)]
    if sheets:
        write_sheet(sheets, kind, everything, pictures, faults)
    missed = Counter(fault for some in faults for fault in some)
    right = [count - missed[mark] for mark in MARKS] + [faults.count(set())]
    shares = " | ".join(f"{100 * number / count:.1f} %" for number in right)
    return f"| {kind} | {count} | {shares} | {seconds:.1f} |"


def write_sheet(
    folder: Path, kind: str, everything: list[Asked], pictures: list[Pixels], faults: list[set[str]]
) -> None:
    """The first pictures, in a red frame if there is a fault, and what was asked for and is wrong."""
    side = TILE + 2 * FRAME
    sheet = Image.new("RGB", (SHEET * side, SHEET * side), "gray")
    lines = []
    for place, (one, pixels, wrongs) in enumerate(
        zip(everything[: SHEET**2], pictures, faults, strict=False)
    ):
        row, column = divmod(place, SHEET)
        picture = Image.fromarray(pixels)
        picture.thumbnail((TILE, TILE))
        if wrongs:
            sheet.paste("red", (column * side, row * side, (column + 1) * side, (row + 1) * side))
        sheet.paste(picture, (column * side + FRAME, row * side + FRAME))
        lines.append(f"{one.scene.sentence}  {', '.join(sorted(wrongs)) or 'right'}\n")
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / f"{kind}.png")
    (folder / f"{kind}.txt").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help=f"prompts of {USUAL_SIZE}")
    parser.add_argument("--size", nargs="*", default=SIZES, help="each as WIDTHxHEIGHT; none for edits alone")
    parser.add_argument("--edits", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--url", help="of a server that runs already, instead of a configuration")
    parser.add_argument("--sheets", type=Path, help="a folder for sheets of the first pictures")
    options = parser.parse_args()
    kinds = [*options.size, *([EDITS, OWN_EDITS] if options.edits else [])]
    with (
        server(options.config, options.url) as url,
        httpx.Client(base_url=url, timeout=600) as client,
    ):
        generate(client, size=USUAL_SIZE)  # loads the model
        print(f"{STEPS} steps, {AT_ONCE} at a time; seconds are of one alone, the median of {ALONE}")
        print(f"| | prompts | {' | '.join(MARKS)} | all | s |")
        print(f"|---|{'---:|' * (len(MARKS) + 3)}")
        for kind in kinds:
            count = options.count if kind == USUAL_SIZE else max(1, options.count // LESS)
            print(measure(client, kind, count, options.sheets), flush=True)


if __name__ == "__main__":
    main()
