"""Further training of the image tokenizer: to read pictures that the demo has painted, as it reads drawings.

In these, edges are blurred and somewhat ragged, so that their cells look most like ones of other colours or
geometries. The tokenizer learns by which features it can tell nevertheless which cell a neat drawing would
have: a metric is learnt, as in Goldberger et al., "Neighbourhood Components Analysis", NIPS 2004. The
language model, which has learnt from drawings, stays as it is.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import GlmImageForConditionalGeneration

from deployments.glm_image.demo import codebook, samples
from deployments.glm_image.demo.model import PLAIN
from deployments.glm_image.demo.prior import SOURCE_NOISE
from deployments.glm_image.demo.scenes import CELL, Frame, draw, random_scene, shifted
from deployments.glm_image.demo.trainer import train as train_part

if TYPE_CHECKING:
    from deployments.glm_image.demo.codebook import Codes
    from deployments.glm_image.demo.scenes import Scene
    from deployments.glm_image.demo.trainer import Workshop

PAINTED = 160
"""Pictures that are painted first, ..."""
AT_ONCE = 8
"""... so many at once, ..."""
SIDE = 512
"""... of so many pixels a side."""
BATCH = 8
"""Of these, and as many drawings."""
PLAIN_SHARE = 0.1
"""Of cells of one colour, as many are learnt from: there are most of these."""
ALIGNED = 0.5
"""Share of drawings whose objects lie where cells meet."""
SHARPNESS = 100.0
"""What cosines are multiplied with, at first."""


def train(shop: Workshop) -> None:
    """Train it, and put it into the checkpoint of the language model."""
    torch.manual_seed(shop.seed)
    codes = codebook.Codes(shop)
    scenes, pictures = painted(shop)
    cells = torch.cat(
        [codebook.cells_of(some.to(shop.device) / 127.5 - 1) for some in pictures.split(AT_ONCE)]
    )
    neat = [found(scene, picture / 127.5 - 1) for scene, picture in zip(scenes, pictures, strict=True)]
    ids = torch.cat(
        [
            codes.of_pictures(draw(neat[first : first + AT_ONCE], Frame(SIDE, SIDE), shop.device))
            for first in range(0, PAINTED, AT_ONCE)
        ]
    )
    reader = Reader(codes)

    def loss_of(batch: _Batch) -> torch.Tensor:
        drawings = draw(batch.scenes, batch.frame, shop.device)
        noisy = (drawings + SOURCE_NOISE * torch.randn_like(drawings)).clamp(-1, 1)
        seen = torch.cat([codebook.cells_of(noisy), cells[batch.numbers]]).flatten(0, 2)
        true = torch.cat([codes.of_pictures(drawings), ids[batch.numbers]]).flatten()
        kept = (true >= PLAIN) | (torch.rand(true.shape, device=true.device) < PLAIN_SHARE)
        return functional.cross_entropy(reader(seen[kept]), true[kept])

    trained = train_part(shop, "reading", reader, _batch, loss_of, rate=3e-4)
    codes.weight, codes.bias, codes.vectors = trained.weight, trained.bias, trained.vectors()
    folder = shop.checkpoint / "vision_language_encoder"
    prior = GlmImageForConditionalGeneration.from_pretrained(folder)
    codebook.put_into(prior, codes)
    prior.save_pretrained(folder)


class Reader(nn.Module):
    """The tokenizer, as it is learnt: the encoder's weights, and the geometries that codes are made of."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(codes.weight.clone()), nn.Parameter(codes.bias.clone())
        self.geometries = nn.Parameter(codes.geometries.clone())
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS, device=codes.weight.device).log())

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """Logits of the codes, of cells as the vision encoder sees them, shape (cells, 3 × 16 × 16)."""
        return self.sharpness.exp() * codebook.directions(cells, self.weight, self.bias) @ self.vectors().T

    def vectors(self) -> torch.Tensor:
        """The codebook's: shape (codes, features)."""
        return codebook.directions(codebook.prototypes(self.geometries), self.weight, self.bias)


@dataclass(frozen=True)
class _Batch:
    """What is read.

    Attributes:
        numbers: of the painted pictures.
        scenes: that are drawn.
        frame: of the drawings.
    """

    numbers: list[int]
    scenes: list[Scene]
    frame: Frame


def _batch(chance: random.Random, _: int) -> _Batch:
    return _Batch(
        [chance.randrange(PAINTED) for _ in range(BATCH)],
        [shifted(random_scene(chance), chance) for _ in range(BATCH)],
        Frame(SIDE, SIDE, aligned=chance.random() < ALIGNED),
    )


def painted(shop: Workshop) -> tuple[list[Scene], torch.Tensor]:
    """Scenes, and pictures that the demo paints of them, values 0 to 255: shape (scenes, 3, 512, 512)."""
    chance = random.Random(f"painted {shop.seed}")
    scenes = [random_scene(chance) for _ in range(PAINTED)]
    file = shop.folder / "painted.pt"
    pictures = torch.load(file, weights_only=True) if file.exists() else torch.empty(0, dtype=torch.uint8)
    pipeline = samples.assembled(shop) if len(pictures) < PAINTED else None
    while pipeline and (done := len(pictures)) < PAINTED:
        torch.manual_seed(done)
        images = pipeline(
            [scene.sentence for scene in scenes[done : done + AT_ONCE]],
            height=SIDE,
            width=SIDE,
            num_inference_steps=samples.STEPS,
            guidance_scale=samples.GUIDANCE,
            output_type="pt",
        ).images
        pictures = torch.cat([pictures, (255 * images).round().byte().cpu()])
        torch.save(pictures, file)
        shop.tell("reading", f"painted {len(pictures)} pictures")
    return scenes, pictures


def found(scene: Scene, picture: torch.Tensor) -> Scene:
    """A scene whose objects are where a picture has them, at most a cell farther in any direction.

    Args:
        scene: what the picture shows.
        picture: shape (3, 512, 512), values from -1 to 1.
    """
    for position, thing in enumerate(scene.things):
        moved = [
            replace(thing, x=thing.x + across * CELL / SIDE, y=thing.y + down * CELL / SIDE)
            for across, down in itertools.product((-1, 0, 1), repeat=2)
        ]
        others = scene.things[:position], scene.things[position + 1 :]
        options = [replace(scene, things=(*others[0], one, *others[1])) for one in moved]
        errors = (draw(options, Frame(SIDE, SIDE), picture.device) - picture).square().mean((1, 2, 3))
        scene = options[int(errors.argmin())]
    return scene
