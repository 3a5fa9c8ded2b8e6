"""The image tokenizer: a vision encoder whose layers have no effect yet, and its codebook.

A code is a cell of one colour, or of two: one inside and one outside of one of a few dozen geometries. So the
models can learn colours and geometries separately. The encoder's features are a cell's principal components,
until `reading` trains the features and the layers further. Codes are compared by angle, as in the model.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from training.demo.model import CODEBOOK, GEOMETRIES, PAIRS, PATCH, PLAIN, VISION_WIDTH
from training.demo.scenes import CELL, COLOURS, Frame, backgrounds, objects, random_scene, shifted

if TYPE_CHECKING:
    from transformers import GlmImageForConditionalGeneration

    from training.demo.scenes import Scene
    from training.demo.trainer import TrainingRun

COMPONENTS = VISION_WIDTH // 3
"""Number of principal components of each colour channel. The rest of the width is a constant."""

BATCHES = 60
BATCH = 32
SIDES = (11, 13, 16, 18, 24, 32)
"""Numbers of cells per side of the pictures that provide the geometries."""
UNALIGNED_EVERY = 4
PLAIN_THRESHOLD = 0.06
"""Largest coverage of a second colour, at any point of a cell, for which the cell counts as plain."""
ROUNDS = 30


@torch.no_grad()
def train(run: TrainingRun) -> None:
    """Computes the components and the geometries. Takes seconds on a GPU, minutes on two cores."""
    torch.manual_seed(run.seed)
    rng = random.Random(f"codebook {run.seed}")
    kept = []
    for number in range(BATCHES):
        side = CELL * rng.choice(SIDES)
        scenes = [shifted(random_scene(rng), rng) for _ in range(BATCH)]
        masks, _ = _masks(scenes, Frame(side, side, number % UNALIGNED_EVERY > 0), run.device)
        kept.append(masks[~_is_plain(masks)])
    masks = torch.cat(kept)
    geometries = _k_means(masks)
    flat = torch.full((1, PATCH * PATCH), 1 / PATCH, device=masks.device)
    uneven = masks - masks.mean(1, keepdim=True)
    _, directions = torch.linalg.eigh(uneven.T.double() @ uneven.double())
    components = torch.cat([flat, directions.float().T.flip(0)[: COMPONENTS - 1]])
    error = (masks - geometries[torch.cdist(masks, geometries).argmin(1)]).square().mean().sqrt()
    run.log("codebook", f"{len(masks)} cells, {GEOMETRIES} geometries, error {error:.4f}")
    torch.save({"components": components.cpu(), "geometries": geometries.cpu()}, run.folder / "codebook.pt")


def _k_means(masks: torch.Tensor) -> torch.Tensor:
    centers = masks[torch.randperm(len(masks), device=masks.device)[:GEOMETRIES]]
    for done in range(ROUNDS):
        distances, nearest = torch.cdist(masks, centers).min(1)
        counts = torch.bincount(nearest, minlength=GEOMETRIES)
        sums = torch.zeros_like(centers).index_add_(0, nearest, masks)
        centers = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(1), centers)
        if done < ROUNDS // 2:  # rarely used centers move to cells that are far from any center
            rare = (counts < len(masks) / GEOMETRIES / 20).nonzero().flatten()
            centers[rare] = masks[torch.multinomial(distances.square(), max(1, len(rare)))[: len(rare)]]
    return centers


def _is_plain(masks: torch.Tensor) -> torch.Tensor:
    return (masks.amax(-1) < PLAIN_THRESHOLD) | (masks.amin(-1) > 1 - PLAIN_THRESHOLD)


def _masks(scenes: list[Scene], frame: Frame, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each cell's object coverage, shape (scenes, rows, columns, 16 × 16), and object colour."""
    covered = torch.zeros(len(scenes), *frame.shape, device=device)
    rows, columns = (side // CELL for side in frame.shape)
    colours = backgrounds(scenes, device)[:, None, None].repeat(1, rows, columns)
    for drawn in objects(scenes, frame, device):
        covered[drawn.scenes] = torch.maximum(covered[drawn.scenes], drawn.coverage)
        most = functional.max_pool2d(drawn.coverage[:, None], CELL)[:, 0]
        colours[drawn.scenes] = torch.where(
            most > PLAIN_THRESHOLD / 2, drawn.colours[:, None, None], colours[drawn.scenes]
        )
    half = functional.avg_pool2d(covered[:, None], 2)[:, 0]
    return half.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3), colours


class Codes:
    """The codebook, which encodes scenes and pictures."""

    def __init__(self, run: TrainingRun) -> None:
        state = torch.load(run.folder / "codebook.pt", map_location=run.device, weights_only=True)
        self.geometries = state["geometries"]
        self.weight = torch.zeros(VISION_WIDTH, 3, PATCH * PATCH, device=run.device)
        for channel in range(3):
            self.weight[channel * COMPONENTS : (channel + 1) * COMPONENTS, channel] = state["components"]
        self.weight = self.weight.flatten(1).half().float()  # the precision of the checkpoint
        cells = prototypes(self.geometries)
        constant = (cells @ self.weight.T).norm(dim=1).mean()
        self.bias = functional.pad(constant[None], (VISION_WIDTH - 1, 0))
        self.vectors = directions(cells, self.weight, self.bias).half().float()

    @torch.no_grad()
    def encode_scenes(self, scenes: list[Scene], frame: Frame) -> torch.Tensor:
        """Returns the ids of scenes, always with the object inside: shape (scenes, rows, columns)."""
        masks, inside = _masks(scenes, frame, self.weight.device)
        outside = backgrounds(scenes, self.weight.device)[:, None, None]
        geometry = torch.cdist(masks.flatten(0, 2), self.geometries).argmin(1).view(inside.shape)
        pair = inside * (len(COLOURS) - 1) + outside - (outside > inside).long()
        mixed = PLAIN + pair * GEOMETRIES + geometry
        plain = torch.where(masks.mean(-1) > 0.5, inside, outside.expand_as(inside))
        return torch.where(_is_plain(masks), plain, mixed)

    @torch.no_grad()
    def similarities(self, cells: torch.Tensor) -> torch.Tensor:
        """Returns the cosines between the features of cells and of codes, shape (..., codes).

        Args:
            cells: shape (..., 3 × 16 × 16).
        """
        features = directions(cells, self.weight, self.bias)
        return features @ functional.normalize(self.vectors, dim=1).T

    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Returns the ids from the vision encoder and the codebook, shape (pictures, rows, columns)."""
        return self.similarities(extract_cells(pictures)).argmax(-1)


def extract_cells(pictures: torch.Tensor) -> torch.Tensor:
    """Returns pictures as the vision encoder's input, shape (pictures, rows, columns, 3 × 16 × 16)."""
    half = functional.interpolate(pictures, scale_factor=0.5, mode="bicubic", antialias=True).clamp(-1, 1)
    half = normalized(((half + 1) * 127.5).round().movedim(1, -1)).movedim(-1, 1)
    cut = half.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3)


def directions(cells: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns the features of cells by the vision encoder's weights, normalized to length 1.

    Args:
        cells: shape (..., 3 × 16 × 16).
        weight: weights of the vision encoder's patch embedding.
        bias: biases of the patch embedding.
    """
    return functional.normalize(cells @ weight.T + bias, dim=-1)


def prototypes(geometries: torch.Tensor) -> torch.Tensor:
    """Returns the cell of each code as the vision encoder's input, shape (codes, 3 × 16 × 16)."""
    palette = normalized(torch.tensor(list(COLOURS.values()), device=geometries.device))
    inside, outside = (palette[numbers.to(geometries.device), None, :, None] for numbers in PAIRS.T)
    mixed = torch.lerp(outside, inside, geometries[:, None]).flatten(0, 1)
    return torch.cat([palette[:, :, None].expand(-1, -1, PATCH * PATCH), mixed]).flatten(1)


def normalized(colours: torch.Tensor) -> torch.Tensor:
    """Returns colours normalized as in the processor. The last dimension is red, green, blue, 0 to 255."""
    mean, std = (
        torch.tensor(values, device=colours.device) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return (colours / 255 - mean) / std


class SumsOfParts(nn.Module):
    """A parametrisation of a table with a row for each code: sums of rows for colours and geometries.

    So a model applies its knowledge of a red circle's edge to a blue circle's edge. Rows after the codes are
    independent.
    """

    def forward(self, parts: torch.Tensor) -> torch.Tensor:
        """Returns the table of the given parts."""
        plain, inside, outside, geometries, rest = parts.split(
            [*[PLAIN] * 3, GEOMETRIES, len(parts) - 3 * PLAIN - GEOMETRIES]
        )
        first, second = PAIRS.to(parts.device).T
        mixed = (inside[first] + outside[second])[:, None] + geometries
        return torch.cat([plain, mixed.flatten(0, 1), rest])

    def right_inverse(self, table: torch.Tensor) -> torch.Tensor:
        """Returns the parts whose sums are nearest to a table."""
        parts = 2 * PLAIN + GEOMETRIES
        ones = torch.eye(3 * PLAIN + GEOMETRIES, device=table.device)
        sums = self.forward(ones)[PLAIN:, -parts:]
        nearest = torch.linalg.pinv(sums) @ table[PLAIN:CODEBOOK]
        return torch.cat([table[:PLAIN], nearest, table[CODEBOOK:]])


@torch.no_grad()
def install(prior: GlmImageForConditionalGeneration, codes: Codes) -> None:
    """Copies the tokenizer's weights and codes into the autoregressive model."""
    visual, vq = prior.model.visual, prior.model.vqmodel
    visual.patch_embed.proj.weight.copy_(codes.weight.view(-1, 3, PATCH, PATCH))
    visual.patch_embed.proj.bias.copy_(codes.bias)
    visual.embeddings.position_embedding.weight.zero_()
    for block in visual.blocks:
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight.zero_()
            last.bias.zero_()
    vq.quantize.embedding.weight.copy_(codes.vectors)
    for convolution in (vq.quant_conv, vq.post_quant_conv):
        convolution.weight.copy_(torch.eye(VISION_WIDTH)[:, :, None, None])
        convolution.bias.zero_()
    for part in (visual, vq):
        part.requires_grad_(requires_grad=False)
