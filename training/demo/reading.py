"""Further training of the image tokenizer, so that it reads the demo's own pictures like drawings.

In pictures painted by the demo, edges are blurred and somewhat ragged. Their cells often resemble cells of
other colours or geometries. The surrounding cells reveal which cell a neat drawing would have. The vision
encoder's layers learn this from their context; the other parts' training leaves these layers without effect.
There are few painted pictures, so they are shown in other colours, too. The language model, trained on
drawings, is unchanged.
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
from training.demo.prior import SOURCE_NOISE, cell_weights
from training.demo.scenes import CELL, COLOURS, Frame, backgrounds, draw, random_scene, shifted
from training.demo.trainer import pick_size
from training.demo.trainer import train as train_part

if TYPE_CHECKING:
    from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel

    from training.demo.codebook import Codes
    from training.demo.scenes import Scene
    from training.demo.trainer import TrainingRun

PAINTED = 160
"""Number of pictures that the demo paints before the training."""
PAINT_BATCH = 8
"""Number of pictures painted at once."""
SIDE = 512
"""Side of the painted pictures in pixels."""
BATCH = 8
"""Number of painted pictures in a batch."""
DRAWN = 5
"""Area of the drawings in a batch, in multiples of a painted picture's area."""
ALIGNED = 0.5
"""Share of drawings whose objects are centred on cell corners."""
SHARPNESS = 100.0
"""Initial factor of the cosines."""


def train(run: TrainingRun) -> None:
    """Trains the tokenizer and writes it to the checkpoint of the language model."""
    torch.manual_seed(run.seed)
    codes = codebook.Codes(run)
    scenes, pictures = paint_pictures(run)
    cells = torch.cat(
        [codebook.extract_cells(some.to(run.device) / 127.5 - 1) for some in pictures.split(PAINT_BATCH)]
    )
    neat = [
        locate_objects(scene, picture / 127.5 - 1) for scene, picture in zip(scenes, pictures, strict=True)
    ]
    folder = run.checkpoint / "vision_language_encoder"
    prior = GlmImageForConditionalGeneration.from_pretrained(folder)
    codebook.install(prior, codes)
    reader = Reader(prior.model.visual.float().to(run.device), codes)

    def error(seen: torch.Tensor, true: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
        ids = codes.similarities(true).argmax(-1)
        kept = torch.rand(ids.shape, device=ids.device) < cell_weights(ids, backgrounds(scenes, ids.device))
        return functional.cross_entropy(reader(seen, kept), ids[kept])

    def loss_of(batch: _Batch) -> torch.Tensor:
        seen = [
            recolour_cells(cells[number], neat[number], scene)
            for number, scene in zip(batch.numbers, batch.painted, strict=True)
        ]
        neatly = codebook.extract_cells(draw(batch.painted, Frame(SIDE, SIDE), run.device))
        drawn = codebook.extract_cells(draw(batch.drawn, batch.frame, run.device))
        noisy = drawn + SOURCE_NOISE * torch.randn_like(drawn)
        of_painted = error(torch.stack(seen), neatly, batch.painted)
        return of_painted + error(noisy, drawn, batch.drawn)

    trained = train_part(run, "reading", reader, partial(_batch, neat), loss_of, rate=1.5e-3)
    prior.model.visual.load_state_dict(trained.visual.state_dict())
    prior.model.vqmodel.quantize.embedding.weight.data.copy_(trained.vectors())
    prior.half().save_pretrained(folder)


class Reader(nn.Module):
    """The trainable tokenizer: the vision encoder and the geometries of the codes."""

    def __init__(self, visual: GlmImageVisionModel, codes: Codes) -> None:
        super().__init__()
        self.visual = visual.requires_grad_()
        self.geometries = nn.Parameter(codes.geometries.clone())
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS, device=codes.weight.device).log())

    def forward(self, cells: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Computes the logits of the codes.

        Args:
            cells: input of the vision encoder, shape (pictures, rows, columns, 3 × 16 × 16).
            kept: mask of the cells that need logits, shape (pictures, rows, columns).

        Returns:
            The logits of these cells, shape (kept, codes).
        """
        grids = torch.tensor([[1, *cells.shape[1:3]]] * len(cells), device=cells.device)
        features = self.visual(cells.flatten(0, 2), grids).last_hidden_state[kept.flatten()]
        return self.sharpness.exp() * functional.normalize(features, dim=-1) @ self.vectors().T

    def vectors(self) -> torch.Tensor:
        """Returns the vectors of the codebook, shape (codes, features)."""
        embed = self.visual.patch_embed.proj
        return codebook.directions(codebook.prototypes(self.geometries), embed.weight.flatten(1), embed.bias)


@dataclass(frozen=True)
class _Batch:
    """Pictures to read.

    Attributes:
        numbers: indices of the painted pictures.
        painted: scenes of these pictures, in the new colours.
        drawn: scenes of the drawings.
        frame: frame of the drawings.
    """

    numbers: list[int]
    painted: list[Scene]
    drawn: list[Scene]
    frame: Frame


def _batch(neat: list[Scene], rng: random.Random, _: int) -> _Batch:
    numbers = [rng.randrange(len(neat)) for _ in range(BATCH)]
    height, width = pick_size(rng)
    count = max(1, DRAWN * SIDE**2 // (height * width))
    return _Batch(
        numbers,
        [recolour_scene(neat[number], rng) for number in numbers],
        [shifted(random_scene(rng), rng) for _ in range(count)],
        Frame(height, width, aligned=rng.random() < ALIGNED),
    )


def recolour_scene(scene: Scene, rng: random.Random) -> Scene:
    """Returns the scene in other colours."""
    old = {scene.background, *(thing.colour for thing in scene.things)}
    new = dict(zip(sorted(old), rng.sample(list(COLOURS), len(old)), strict=True))
    things = tuple(replace(thing, colour=new[thing.colour]) for thing in scene.things)
    return replace(scene, background=new[scene.background], things=things)


def recolour_cells(cells: torch.Tensor, before: Scene, after: Scene) -> torch.Tensor:
    """Returns a picture in other colours. A mixture of old colours becomes the same mixture of new colours.

    Args:
        cells: input of the vision encoder, shape (rows, columns, 3 × 16 × 16).
        before: the scene that the picture shows.
        after: that scene in the new colours.
    """
    old, new = (_palette(scene, cells.device) for scene in (before, after))
    turned: torch.Tensor = torch.linalg.pinv(old[1:] - old[0]) @ (new[1:] - new[0] - old[1:] + old[0])
    mixing = torch.eye(3, device=cells.device) + turned
    channels = cells.view(*cells.shape[:-1], 3, -1)
    return (mixing.T @ (channels - old[0, :, None]) + new[0, :, None]).flatten(-2)


def _palette(scene: Scene, device: torch.device) -> torch.Tensor:
    """Returns a scene's colours as in the vision encoder's input, background first: shape (colours, 3)."""
    names = [scene.background, *(thing.colour for thing in scene.things)]
    return codebook.normalized(torch.tensor([COLOURS[name] for name in names], device=device))


def paint_pictures(run: TrainingRun) -> tuple[list[Scene], torch.Tensor]:
    """Returns scenes, and the demo's pictures of them: shape (scenes, 3, 512, 512), values 0 to 255."""
    rng = random.Random(f"painted {run.seed}")
    scenes = [random_scene(rng) for _ in range(PAINTED)]
    file = run.folder / "painted.pt"
    pictures = torch.load(file, weights_only=True) if file.exists() else torch.empty(0, dtype=torch.uint8)
    pipeline = samples.assemble(run) if len(pictures) < PAINTED else None
    while pipeline and (done := len(pictures)) < PAINTED:
        torch.manual_seed(done)
        images = pipeline(
            [scene.sentence for scene in scenes[done : done + PAINT_BATCH]],
            height=SIDE,
            width=SIDE,
            num_inference_steps=samples.STEPS,
            guidance_scale=samples.GUIDANCE,
            output_type="pt",
        ).images
        pictures = torch.cat([pictures, (255 * images).round().byte().cpu()])
        torch.save(pictures, file)
        run.log("reading", f"painted {len(pictures)} pictures")
    return scenes, pictures


def locate_objects(scene: Scene, picture: torch.Tensor) -> Scene:
    """Returns the scene with its objects moved to where a picture shows them.

    Objects move by at most one cell in each direction.

    Args:
        scene: the scene of the picture.
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
