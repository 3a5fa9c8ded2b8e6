"""Measures over HTTP how often the demo checkpoint paints a sentence correctly, and how long it takes.

    python -m tests.demo.accuracy [--count 200] [--size 512x512 1024x1024] [--no-edits] [--url URL]
    python -m tests.demo.accuracy --by-hand [--no-rewriting]

Serves a configuration, or uses a running server. Sentences are generated like those of the training, from
other seeds, or are those of `sentences.txt` and `unseen.txt`, written by hand. A geometric judge checks the
pictures. The column `count` is about the number of objects. A picture passes `all` if it passes all marks.
What a sentence written by hand leaves open is not judged.
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
from tests.demo import by_hand
from tests.demo.conftest import CONFIG, demo_config, without_rewriting
from tests.demo.judge import drawn, wrong
from tests.serve.conftest import served
from tests.serve.test_exactness import edit, generate
from training.demo.scenes import Scene, random_edit, random_scene

USUAL_SIZE = "512x512"
EDITS, OWN_EDITS = "edits", "edits of its own"
"""Kinds of edits. The sources are drawn by code, or painted by the demo."""
BY_HAND = {"by hand": by_hand.FILE, "by hand, unseen": by_hand.UNSEEN}
"""Files of the sentences written by hand, by kind."""
SIZES = (USUAL_SIZE, "768x512", "512x768", "1024x1024")
REDUCTION = 8
"""Divisor of the number of pictures for other sizes and for edits."""
STEPS = 8
MAX_CONCURRENCY = 8
"""Number of concurrent requests. A batch ends before the next: on few cores, concurrent stages are slower."""
TIMED = 5
"""Number of pictures that are requested first, one at a time, and timed."""
MARKS = ("background", "count", "colour", "shape", "place", "size")
SHEET = 4
"""Number of rows and columns of a sheet."""
TILE = 256
"""Side of a picture on a sheet in pixels."""
FRAME = 4
"""Width of the frame around a picture in pixels."""


@dataclass(frozen=True)
class Task:
    """Scene or wish that a picture is to show, and for an edit its source scene."""

    scene: Scene | by_hand.Wish
    source: Scene | None = None

    def wrong(self, picture: Pixels) -> set[str]:
        if isinstance(self.scene, Scene):
            return wrong(self.scene, picture)
        return by_hand.wrong(self.scene, picture)


@contextmanager
def server(config: Path, url: str | None, *, rewriting: bool) -> Iterator[str]:
    """Yields the given URL, or the URL of a server that serves the configuration."""
    if url:
        yield url
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        served_config = demo_config(folder, config if rewriting else without_rewriting(folder, config))
        with served(served_config) as running:
            yield running.url


def make_tasks(kind: str, count: int) -> list[Task]:
    if kind in BY_HAND:
        return [Task(wish) for wish in by_hand.wishes(BY_HAND[kind])]
    rng = random.Random(f"held out: {kind}")
    if kind not in (EDITS, OWN_EDITS):
        return [Task(random_scene(rng)) for _ in range(count)]
    return [Task(after, before) for before, after in (random_edit(rng) for _ in range(count))]


def paint(client: httpx.Client, sentence: str, size: str, seed: int, source: Pixels | None = None) -> Pixels:
    fields = {"prompt": sentence, "size": size, "seed": seed, "num_inference_steps": STEPS}
    (pixels,) = edit(client, (source,), **fields) if source is not None else generate(client, **fields)
    return pixels


def measure(client: httpx.Client, kind: str, count: int, sheets: Path | None) -> str:
    """Requests pictures of one kind and judges them.

    Returns:
        The kind's row of the table. For sentences written by hand, the failed ones follow.
    """
    size = USUAL_SIZE if kind in (EDITS, OWN_EDITS, *BY_HAND) else kind
    width, height = map(int, size.split("x"))
    tasks = make_tasks(kind, count)
    count = len(tasks)
    times = []

    def one(seed: int) -> Pixels:
        scene, before = tasks[seed].scene, tasks[seed].source
        source = None
        if before:
            own = kind == OWN_EDITS
            source = paint(client, before.sentence, size, seed) if own else drawn(before, width, height)
        began = time.perf_counter()
        painted = paint(client, scene.sentence, size, seed, source)
        times.append(time.perf_counter() - began)
        return painted

    pictures = [one(seed) for seed in range(min(TIMED, count))]
    seconds = statistics.median(times)
    with ThreadPoolExecutor(MAX_CONCURRENCY) as pool:
        for first in range(TIMED, count, MAX_CONCURRENCY):
            pictures += pool.map(one, range(first, min(first + MAX_CONCURRENCY, count)))
    faults = [one.wrong(picture) for one, picture in zip(tasks, pictures, strict=True)]
    if sheets:
        write_sheet(sheets, kind, tasks, pictures, faults)
    missed = Counter(fault for some in faults for fault in some)
    right = [count - missed[mark] for mark in MARKS] + [faults.count(set())]
    shares = " | ".join(f"{100 * number / count:.1f} %" for number in right)
    row = f"| {kind} | {count} | {shares} | {seconds:.1f} |"
    if kind not in BY_HAND:
        return row
    failed = [
        f"{', '.join(sorted(wrongs))}: {one.scene.sentence}"
        for one, wrongs in zip(tasks, faults, strict=True)
        if wrongs
    ]
    return "\n".join([row, "", *failed])


def write_sheet(
    folder: Path, kind: str, tasks: list[Task], pictures: list[Pixels], faults: list[set[str]]
) -> None:
    """Writes a sheet of the first pictures, with red frames around faulty ones, and a list of faults."""
    side = TILE + 2 * FRAME
    sheet = Image.new("RGB", (SHEET * side, SHEET * side), "gray")
    lines = []
    for place, (one, pixels, wrongs) in enumerate(zip(tasks[: SHEET**2], pictures, faults, strict=False)):
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
    parser.add_argument("--count", type=int, default=200, help=f"number of prompts of {USUAL_SIZE}")
    parser.add_argument("--size", nargs="*", default=SIZES, help="sizes as WIDTHxHEIGHT; none for edits only")
    parser.add_argument("--edits", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--url", help="URL of a running server, instead of a configuration")
    parser.add_argument("--sheets", type=Path, help="folder for sheets of the first pictures")
    parser.add_argument("--by-hand", action="store_true", help="paint only the sentences written by hand")
    parser.add_argument(
        "--rewriting",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the served tokenizer rewrites prompts",
    )
    options = parser.parse_args()
    if options.url and not options.rewriting:
        parser.error("--no-rewriting changes the served checkpoint; remove --url")
    kinds = [*options.size, *([EDITS, OWN_EDITS] if options.edits else [])]
    if options.by_hand:
        kinds = [*BY_HAND]
    with (
        server(options.config, options.url, rewriting=options.rewriting) as url,
        httpx.Client(base_url=url, timeout=600) as client,
    ):
        generate(client, size=USUAL_SIZE)  # loads the model
        print(f"{STEPS} steps, {MAX_CONCURRENCY} requests at once; seconds: median of {TIMED}, one at a time")
        print(f"| | prompts | {' | '.join(MARKS)} | all | s |")
        print(f"|---|{'---:|' * (len(MARKS) + 3)}")
        for kind in kinds:
            count = options.count if kind == USUAL_SIZE else max(1, options.count // REDUCTION)
            print(measure(client, kind, count, options.sheets), flush=True)


if __name__ == "__main__":
    main()
