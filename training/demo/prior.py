"""Training of the autoregressive language model, from sentences to image tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import nn
from torch.nn.utils import parametrize

from training.demo import codebook, model
from training.demo.scenes import CELL, Frame, backgrounds, draw, random_edit, random_scene, shifted
from training.demo.trainer import pick_size
from training.demo.trainer import train as train_part

if TYPE_CHECKING:
    import random

    from transformers import GlmImageForConditionalGeneration

    from training.demo.scenes import Scene
    from training.demo.trainer import TrainingRun

TOKENS = {"cuda": 36_000, "cpu": 3_000}
"""Number of tokens of a batch."""
EDITS = 0.2
"""Share of batches of edits."""
PREVIEWS = 0.3
"""Share of other batches that end with the preview grid, because the preview teaches a sentence's meaning."""
FAR_WEIGHT = 0.1
"""Weight of a cell that is more than two cells away from the next object. Most cells are."""
ALIGNED = 0.6
"""Share of edits with an aligned source."""
SOURCE_NOISE = 0.03
PROMPT_MULTIPLE = 16
"""Number of tokens to whose multiples prompts are padded, so that a compiled model sees few lengths."""


@dataclass(frozen=True)
class Batch:
    """Right-aligned requests of one size. Image tokens are omitted and computed on the device.

    Attributes:
        height: height of the pictures in pixels.
        width: width of the pictures in pixels.
        scenes: requested scenes.
        sources: source scenes of edits.
        grids: rows and columns of the drawn grids, in drawing order.
        prompts: token ids, shape (requests, prompt).
        valid: mask of the tokens that are not padding, shape (requests, prompt + drawn - 1).
        positions: rotary positions, shape (3, requests, prompt + drawn - 1).
        aligned: whether objects are on the grid of cells. Only sources of edits may be unaligned.
    """

    height: int
    width: int
    scenes: list[Scene]
    sources: list[Scene]
    grids: list[tuple[int, int]]
    prompts: torch.Tensor
    valid: torch.Tensor
    positions: torch.Tensor
    aligned: bool


def preview_grid(rows: int, columns: int) -> tuple[int, int]:
    """Returns rows and columns of the preview grid, like the processor."""
    ratio = rows / columns
    return int(math.sqrt(ratio) * 16), int(math.sqrt(1 / ratio) * 16)


def make_scenes(rng: random.Random, count: int, *, editing: bool) -> tuple[list[Scene], list[Scene]]:
    """Returns the source scenes of edits, and the requested scenes."""
    if not editing:
        return [], [shifted(random_scene(rng), rng) for _ in range(count)]
    sources, scenes = [], []
    for _ in range(count):
        before, after = random_edit(rng)
        source = shifted(before, rng)
        moved = zip(after.things, source.things, strict=True)
        sources.append(source)
        scenes.append(
            replace(after, things=tuple(replace(thing, x=there.x, y=there.y) for thing, there in moved))
        )
    return sources, scenes


def make_batch(tokenizer: Any, tokens: int, rng: random.Random, _: int = 0) -> Batch:
    """Returns a batch with about the given number of tokens."""
    height, width = pick_size(rng)
    rows, columns = height // CELL, width // CELL
    editing = rng.random() < EDITS
    preview = preview_grid(rows, columns)
    tail = f"<sop>{rows} {columns}<eop>"
    hole: list[int] = []
    if editing:
        grids = [(rows, columns)]
        placeholder = tokenizer.convert_tokens_to_ids("<|image|>")
        hole = [tokenizer.bos_token_id, *[placeholder] * (rows * columns), tokenizer.eos_token_id]
    else:
        grids = [preview] if rng.random() < PREVIEWS else [preview, (rows, columns)]
        tail += f"<sop>{preview[0]} {preview[1]}<eop>"
    drawn = sum(r * c for r, c in grids)
    count = max(1, tokens // (drawn + len(hole) + 40))
    sources, scenes = make_scenes(rng, count, editing=editing)
    texts = [scene.sentence + tail + tokenizer.bos_token for scene in scenes]
    lines = [hole + text for text in tokenizer(texts, add_special_tokens=False).input_ids]
    longest = -(-max(map(len, lines)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    prompts = torch.full((count, longest), tokenizer.pad_token_id)
    valid = torch.zeros(count, longest + drawn - 1, dtype=torch.bool)
    positions = torch.zeros(3, count, longest + drawn - 1, dtype=torch.long)
    for line, ids in enumerate(lines):
        prompts[line, longest - len(ids) :] = torch.tensor(ids)
        valid[line, longest - len(ids) :] = True
        source = (rows, columns) if editing else None
        positions[:, line, longest - len(ids) :] = _positions(len(ids), source, grids)[:, :-1]
    aligned = rng.random() < ALIGNED
    return Batch(height, width, scenes, sources, grids, prompts, valid, positions, aligned)


def _positions(prompt: int, source: tuple[int, int] | None, grids: list[tuple[int, int]]) -> torch.Tensor:
    """Returns the positions of all tokens, like upstream's `get_rope_index`: shape (3, tokens)."""
    parts, start, text = [], 0, prompt
    if source:  # the source grid is between its start and end tokens
        parts = [torch.zeros(3, 1, dtype=torch.long), _grid(1, *source)]
        start, text = 1 + max(source), prompt - 1 - source[0] * source[1]
    parts.append(torch.arange(start, start + text).expand(3, -1))
    start += text
    for grid in grids:
        parts.append(_grid(start, *grid))
        start += max(grid)
    return torch.cat(parts, 1)


def _grid(start: int, rows: int, columns: int) -> torch.Tensor:
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.full_like(row, start), row + start, column + start]).flatten(1)


def train(run: TrainingRun) -> None:
    """Trains the language model. Writes it with the vision encoder."""
    torch.manual_seed(run.seed)
    processor = model.processor()
    codes = codebook.Codes(run)
    net = model.prior(processor).to(run.device)
    codebook.install(net, codes)
    for table in (net.get_input_embeddings(), net.lm_head):
        parametrize.register_parametrization(table, "weight", codebook.SumsOfParts(), unsafe=True)
        nn.init.normal_(table.parametrizations.weight.original, std=net.config.text_config.initializer_range)
    if run.device.type == "cuda":
        for layer in net.model.language_model.layers:
            layer.compile(dynamic=True)
    make = partial(make_batch, processor.tokenizer, TOKENS[run.device.type])
    trained = train_part(
        run,
        "prior",
        net,
        make,
        lambda batch: _loss(run, net, codes, batch, processor.image_token_id),
        rate=2e-3,
    )
    for table in (trained.get_input_embeddings(), trained.lm_head):
        parametrize.remove_parametrizations(table, "weight")
    trained.half().save_pretrained(run.checkpoint / "vision_language_encoder")


def _loss(
    run: TrainingRun,
    net: GlmImageForConditionalGeneration,
    codes: codebook.Codes,
    batch: Batch,
    placeholder: int,
) -> torch.Tensor:
    prompts = batch.prompts.to(run.device)
    if batch.sources:
        pictures = draw(batch.sources, Frame(batch.height, batch.width, batch.aligned), run.device)
        pictures = (pictures + SOURCE_NOISE * torch.randn_like(pictures)).clamp(-1, 1)
        prompts = prompts.masked_scatter(prompts == placeholder, codes.encode_pictures(pictures).flatten())
    aligned = batch.aligned or not batch.sources
    drawn, weights = [], []
    for rows, columns in batch.grids:
        ids = codes.encode_scenes(batch.scenes, Frame(CELL * rows, CELL * columns, aligned))
        weights.append(cell_weights(ids, backgrounds(batch.scenes, run.device)).flatten(1))
        drawn.append(ids.flatten(1))
    target, weight = torch.cat(drawn, 1), torch.cat(weights, 1)
    with run.autocast():
        hidden = net.model.language_model(
            input_ids=torch.cat([prompts, target[:, :-1]], 1),
            attention_mask=_mask(batch.valid.to(run.device)),
            position_ids=batch.positions.to(run.device),
            use_cache=False,
        ).last_hidden_state[:, -target.shape[1] :]
        logits = net.lm_head(hidden)
    error = functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    return (error * weight.flatten()).sum() / weight.sum()


def cell_weights(ids: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Returns the weights of cells, shape (pictures, rows, columns). Cells far from any object weigh little.

    Args:
        ids: codes of the cells, of the same shape.
        background: numbers of the backgrounds' colours, shape (pictures).
    """
    plain = (ids == background[:, None, None]).float()
    far = -functional.max_pool2d(-plain[:, None], 5, 1, 2) > 0
    return torch.where(far, FAR_WEIGHT, 1.0)[:, 0]


def _mask(valid: torch.Tensor) -> torch.Tensor:
    """Returns the attention mask, shape (requests, 1, tokens, tokens). A padding token attends to itself."""
    causal = torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool, device=valid.device).tril()
    return (causal & valid[:, None, None, :]) | torch.eye(len(causal), dtype=torch.bool, device=valid.device)
