"""Training of the DiT: flow matching from true prior tokens, and for edits from the source image too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.pipelines.glm_image.pipeline_glm_image import calculate_shift
from torch.nn.utils import parametrize

from deployments.families.glm_image.tiny import scheduler
from training.demo import model
from training.demo.codebook import Codes, SumsOfParts
from training.demo.prior import ALIGNED, make_scenes
from training.demo.scenes import CELL, Frame, draw
from training.demo.trainer import pick_size
from training.demo.trainer import train as train_part

if TYPE_CHECKING:
    import random

    from training.demo.scenes import Scene
    from training.demo.trainer import TrainingRun

BATCH = {"cuda": 20, "cpu": 2}
"""Number of pictures of 512×512 in a batch. Batches of larger pictures hold fewer."""
EDIT_EVERY = 5
"""Interval between steps with source images."""
TOKENIZER_EVERY = 6
"""Interval between steps with prior tokens from the image tokenizer."""
TEXT_EVERY = 8
"""Interval between steps with text to be painted."""
END_OF_TEXT = 1
"""Id of the end of a text in the glyph encoder."""
CROP = 256
"""Side of square crops in pixels."""
CROPPED = 0.8
"""Share of steps with crops around objects, because edges need most of the training."""
DROPPED = 0.1
"""Share of pictures whose prior tokens are dropped, so that guidance has an unconditional prediction."""
SOURCE_NOISE = 0.05
BUSY_WEIGHT = 4.0
"""Additional weight of places near edges, because most of a picture is plain."""


def train(run: TrainingRun) -> None:
    """Trains and writes the DiT. Also writes the glyph encoder, whose random weights the DiT has seen."""
    torch.manual_seed(run.seed)
    glyphs = model.glyph_encoder().to(run.device).eval().requires_grad_(requires_grad=False)
    net = model.dit().to(run.device)
    table = net.prior_token_embedding
    parametrize.register_parametrization(table, "weight", SumsOfParts(), unsafe=True)
    torch.nn.init.normal_(table.parametrizations.weight.original, std=0.5)
    make = partial(_batch, BATCH[run.device.type])
    trained = train_part(run, "decoder", net, make, _Loss(run, net, glyphs), rate=1.5e-3)
    parametrize.remove_parametrizations(trained.prior_token_embedding, "weight")
    trained.half().save_pretrained(run.checkpoint / "transformer")
    glyphs.half().save_pretrained(run.checkpoint / "text_encoder")


def _corner(rng: random.Random, scene: Scene, frame: Frame) -> tuple[int, int]:
    """Returns top and left of a crop that shows a part of an object. Both are on cell boundaries."""
    thing = rng.choice(scene.things)
    corner = []
    for center, side in ((thing.y, frame.height), (thing.x, frame.width)):
        start = center * side - CROP / 2 + rng.uniform(-CROP, CROP) / 3
        corner.append(CELL * round(min(max(start, 0), side - CROP) / CELL))
    return corner[0], corner[1]


@dataclass(frozen=True)
class _Batch:
    """Scenes in one frame.

    Attributes:
        scenes: scenes to paint.
        sources: source scenes of edits.
        frame: frame of both.
        from_tokenizer: whether the prior tokens are from the image tokenizer. It may take an edge's inside
            for its outside.
        letters: text that the prompt requests, and that no picture shows.
    """

    scenes: list[Scene]
    sources: list[Scene]
    frame: Frame
    from_tokenizer: bool
    letters: list[int]


def _batch(size: int, rng: random.Random, number: int) -> _Batch:
    height, width = pick_size(rng)
    cropped = rng.random() < CROPPED
    editing = number % EDIT_EVERY == 0
    count = size * 512 * 512 // (CROP * CROP if cropped else height * width)
    sources, scenes = make_scenes(rng, max(1, count // 2 if editing else count), editing=editing)
    frame = Frame(height, width, aligned=not editing or rng.random() < ALIGNED)
    if cropped:
        corners = tuple(_corner(rng, scene, frame) for scene in scenes)
        frame = replace(frame, crop=CROP, corners=corners)
    letters = []
    if number % TEXT_EVERY == 0:
        letters = [rng.randrange(3, 259) for _ in range(rng.choice((3, 5, 7)))]
    return _Batch(scenes, sources, frame, number % TOKENIZER_EVERY == 0, letters)


class _Loss:
    def __init__(self, run: TrainingRun, net: GlmImageTransformer2DModel, glyphs: torch.nn.Module) -> None:
        self._run, self._net, self._glyphs = run, net, glyphs
        vae = AutoencoderKL.from_pretrained(run.checkpoint / "vae", torch_dtype=torch.float32)
        vae = vae.to(run.device, memory_format=torch.channels_last)
        self._vae = vae.eval().requires_grad_(requires_grad=False)
        self._mean, self._std = (
            torch.tensor(values, device=run.device)[None, :, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        self._codes = Codes(run)
        self._scheduler = scheduler()
        # Upstream computes these tables on the CPU in every pass.
        self._rotary = lru_cache(
            lambda *side: tuple(table.to(run.device) for table in net.rope(torch.empty(1, 1, *side)))
        )

    def __call__(self, batch: _Batch) -> torch.Tensor:
        frame, count = batch.frame, len(batch.scenes)
        clean, ids = self._prepared(batch.scenes, frame, from_tokenizer=batch.from_tokenizer)
        text = self._text(batch.letters).expand(count, -1, -1)
        noise = torch.randn_like(clean)
        sigma = self._sigmas(count, frame)
        at = sigma[:, None, None, None]
        sides = [
            torch.full((count,), float(side), device=clean.device) for side in (frame.height, frame.width)
        ]
        size = torch.stack(sides, 1)
        caches = GlmImageKVCache(self._net.config.num_layers) if batch.sources else None
        shared = {
            "target_size": size,
            "crop_coords": torch.zeros_like(size),
            "image_rotary_emb": self._rotary(*clean.shape[2:]),
            "kv_caches": caches,
        }
        drop = (torch.rand(count, 1, device=clean.device) < DROPPED).expand(ids.shape)
        with self._run.autocast():
            if caches:
                caches.set_mode("write")
                self._cache_sources(batch.sources, frame, text, shared)
                caches.set_mode("read")
            predicted = self._net(
                at * noise + (1 - at) * clean, text, ids, drop, sigma * 1000 - 1, **shared
            ).sample.float()
        error = (predicted - (noise - clean)).square()
        changes = (clean - functional.avg_pool2d(clean, 5, 1, 2)).abs().amax(1, keepdim=True)
        weight = 1 + BUSY_WEIGHT * (functional.max_pool2d(changes, 3, 1, 1) > 0.15)
        mean: torch.Tensor = (error * weight).sum() / weight.expand_as(error).sum()
        return mean

    @torch.no_grad()
    def _prepared(
        self, scenes: list[Scene], frame: Frame, *, from_tokenizer: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns latents, and prior tokens on the DiT's grid: shape (scenes, tokens)."""
        pictures = draw(scenes, frame, self._run.device)
        ids = (
            self._codes.encode_pictures(pictures)
            if from_tokenizer
            else self._codes.encode_scenes(scenes, frame)
        )
        ids = ids.repeat_interleave(2, 1).repeat_interleave(2, 2)
        with self._run.autocast():
            latents = torch.cat(
                [
                    self._vae.encode(some).latent_dist.mean.float()
                    for some in pictures.contiguous(memory_format=torch.channels_last).split(16)
                ]
            )
        return (latents - self._mean) / self._std, ids.flatten(1)

    def _sigmas(self, count: int, frame: Frame) -> torch.Tensor:
        """Returns shares of noise, shifted for the uncropped picture's size as in the scheduler."""
        uniform = torch.rand(count, device=self._run.device)
        shift = calculate_shift(frame.height * frame.width // 16**2)
        shifted: torch.Tensor = self._scheduler.time_shift(shift, 1.0, uniform)
        return shifted

    @torch.no_grad()
    def _text(self, letters: list[int]) -> torch.Tensor:
        """Returns the glyph encoder's embeddings of letters and an end token."""
        ids = torch.tensor([[*letters, END_OF_TEXT]]).to(self._run.device, non_blocking=True)
        hidden: torch.Tensor = self._glyphs(ids)[0]
        return hidden

    def _cache_sources(
        self, sources: list[Scene], frame: Frame, text: torch.Tensor, shared: dict[str, object]
    ) -> None:
        """Caches the DiT's keys and values of source images, like upstream's pipeline."""
        latents, ids = self._prepared(sources, frame, from_tokenizer=True)
        latents = latents + SOURCE_NOISE * torch.randn_like(latents)
        nothing = torch.zeros_like(ids, dtype=torch.bool)
        self._net(latents, text[:, :0], ids, nothing, torch.zeros(len(ids), device=ids.device), **shared)
