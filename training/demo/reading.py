"""Further training of the image tokenizer: to read pictures that the demo has painted, as it reads drawings.

In these, edges are blurred and somewhat ragged, so that their cells look most like ones of other colours or
geometries. Which cell a neat drawing would have there is told by what lies around: this the vision encoder's
layers learn, which the other parts' training leaves without effect. As there are few painted pictures, they
are shown in other colours, too. The language model, which has learnt from drawings, stays as it is.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import GlmImageForConditionalGeneration

from training.demo import codebook, samples
from training.demo.prior import SOURCE_NOISE, closeness
from training.demo.scenes import CELL, COLOURS, Frame, backgrounds, draw, random_scene, shifted
from training.demo.trainer import pick_size
from training.demo.trainer import train as train_part

if TYPE_CHECKING:
    from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel

    from training.demo.codebook import Codes
    from training.demo.scenes import Scene
    from training.demo.trainer import Workshop

PAINTED = 160
"""Pictures that are painted first, ..."""
AT_ONCE = 8
"""... so many at once, ..."""
SIDE = 512
"""... of so many pixels a side."""
BATCH = 8
"""Of these."""
DRAWN = 5
"""And as much as so many of the same size is drawn."""
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
    folder = shop.checkpoint / "vision_language_encoder"
    prior = GlmImageForConditionalGeneration.from_pretrained(folder)
    codebook.put_into(prior, codes)
    reader = Reader(prior.model.visual.float().to(shop.device), codes)

    def error(seen: torch.Tensor, true: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
        ids = codes.likeness(true).argmax(-1)
        kept = torch.rand(ids.shape, device=ids.device) < closeness(ids, backgrounds(scenes, ids.device))
        return functional.cross_entropy(reader(seen, kept), ids[kept])

    def loss_of(batch: _Batch) -> torch.Tensor:
        seen = [
            in_colours(cells[number], neat[number], scene)
            for number, scene in zip(batch.numbers, batch.painted, strict=True)
        ]
        neatly = codebook.cells_of(draw(batch.painted, Frame(SIDE, SIDE), shop.device))
        drawn = codebook.cells_of(draw(batch.drawn, batch.frame, shop.device))
        noisy = drawn + SOURCE_NOISE * torch.randn_like(drawn)
        of_painted = error(torch.stack(seen), neatly, batch.painted)
        return of_painted + error(noisy, drawn, batch.drawn)

    trained = train_part(shop, "reading", reader, partial(_batch, neat), loss_of, rate=1.5e-3)
    prior.model.visual.load_state_dict(trained.visual.state_dict())
    prior.model.vqmodel.quantize.embedding.weight.data.copy_(trained.vectors())
    prior.half().save_pretrained(folder)


class Reader(nn.Module):
    """The tokenizer, as it is learnt: the vision encoder, and the geometries that codes are made of."""

    def __init__(self, visual: GlmImageVisionModel, codes: Codes) -> None:
        super().__init__()
        self.visual = visual.requires_grad_()
        self.geometries = nn.Parameter(codes.geometries.clone())
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS, device=codes.weight.device).log())

    def forward(self, cells: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Logits of the codes.

        Args:
            cells: as the vision encoder sees them, shape (pictures, rows, columns, 3 × 16 × 16).
            kept: whether logits are wanted of a cell, shape (pictures, rows, columns).

        Returns:
            Of the kept ones, shape (kept, codes).
        """
        grids = torch.tensor([[1, *cells.shape[1:3]]] * len(cells), device=cells.device)
        features = self.visual(cells.flatten(0, 2), grids).last_hidden_state[kept.flatten()]
        return self.sharpness.exp() * functional.normalize(features, dim=-1) @ self.vectors().T

    def vectors(self) -> torch.Tensor:
        """The codebook's: shape (codes, features)."""
        embed = self.visual.patch_embed.proj
        return codebook.directions(codebook.prototypes(self.geometries), embed.weight.flatten(1), embed.bias)


@dataclass(frozen=True)
class _Batch:
    """What is read.

    Attributes:
        numbers: of the painted pictures.
        painted: what they show, in the colours that they are shown in.
        drawn: other scenes, that are drawn.
        frame: of these.
    """

    numbers: list[int]
    painted: list[Scene]
    drawn: list[Scene]
    frame: Frame


def _batch(neat: list[Scene], chance: random.Random, _: int) -> _Batch:
    numbers = [chance.randrange(len(neat)) for _ in range(BATCH)]
    height, width = pick_size(chance)
    count = max(1, DRAWN * SIDE**2 // (height * width))
    return _Batch(
        numbers,
        [recoloured(neat[number], chance) for number in numbers],
        [shifted(random_scene(chance), chance) for _ in range(count)],
        Frame(height, width, aligned=chance.random() < ALIGNED),
    )


def recoloured(scene: Scene, chance: random.Random) -> Scene:
    """A scene in other colours."""
    old = {scene.background, *(thing.colour for thing in scene.things)}
    new = dict(zip(sorted(old), chance.sample(list(COLOURS), len(old)), strict=True))
    things = tuple(replace(thing, colour=new[thing.colour]) for thing in scene.things)
    return replace(scene, background=new[scene.background], things=things)


def in_colours(cells: torch.Tensor, before: Scene, after: Scene) -> torch.Tensor:
    """A picture in other colours: what is a mixture of old ones becomes the same mixture of new ones.

    Args:
        cells: as the vision encoder sees them, shape (rows, columns, 3 × 16 × 16).
        before: the scene that the picture shows.
        after: that scene in the new colours.
    """
    old, new = (_palette(scene, cells.device) for scene in (before, after))
    turned: torch.Tensor = torch.linalg.pinv(old[1:] - old[0]) @ (new[1:] - new[0] - old[1:] + old[0])
    mixing = torch.eye(3, device=cells.device) + turned
    channels = cells.view(*cells.shape[:-1], 3, -1)
    return (mixing.T @ (channels - old[0, :, None]) + new[0, :, None]).flatten(-2)


def _palette(scene: Scene, device: torch.device) -> torch.Tensor:
    """Its colours, the background's first, as the vision encoder sees them: shape (colours, 3)."""
    names = [scene.background, *(thing.colour for thing in scene.things)]
    return codebook.normalized(torch.tensor([COLOURS[name] for name in names], device=device))


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
