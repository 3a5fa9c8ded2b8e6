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
    from training.demo.trainer import Workshop

BATCH = {"cuda": 20, "cpu": 2}
"""Of 512×512; larger pictures are fewer."""
EDIT_EVERY = 5
"""Steps with source images."""
LOOK_EVERY = 6
"""Steps whose tokens are the image tokenizer's."""
TEXT_EVERY = 8
"""Steps with text to be painted."""
END = 1
"""The glyph encoder's id of a text's end."""
CROP = 256
CROPPED = 0.8
"""Share of steps that see squares of this side, around objects: edges need most of the learning."""
DROPPED = 0.1
"""Share of pictures whose prior tokens are left out, so that there is something to guide away from."""
SOURCE_NOISE = 0.05
BUSY_WEIGHT = 4.0
"""Places where something changes count that much more: most of a picture is plain."""


def train(shop: Workshop) -> None:
    """Train it and write it, with the glyph encoder, whose random weights it has seen."""
    torch.manual_seed(shop.seed)
    glyphs = model.glyph_encoder().to(shop.device).eval().requires_grad_(requires_grad=False)
    net = model.dit().to(shop.device)
    table = net.prior_token_embedding
    parametrize.register_parametrization(table, "weight", SumsOfParts(), unsafe=True)
    torch.nn.init.normal_(table.parametrizations.weight.original, std=0.5)
    make = partial(_batch, BATCH[shop.device.type])
    trained = train_part(shop, "decoder", net, make, _Loss(shop, net, glyphs), rate=1.5e-3)
    parametrize.remove_parametrizations(trained.prior_token_embedding, "weight")
    trained.half().save_pretrained(shop.checkpoint / "transformer")
    glyphs.half().save_pretrained(shop.checkpoint / "text_encoder")


def _corner(chance: random.Random, scene: Scene, frame: Frame) -> tuple[int, int]:
    """Top and left of a crop with some of an object, where cells meet."""
    thing = chance.choice(scene.things)
    corner = []
    for center, side in ((thing.y, frame.height), (thing.x, frame.width)):
        start = center * side - CROP / 2 + chance.uniform(-CROP, CROP) / 3
        corner.append(CELL * round(min(max(start, 0), side - CROP) / CELL))
    return corner[0], corner[1]


@dataclass(frozen=True)
class _Batch:
    """Scenes of one frame.

    Attributes:
        scenes: that are painted.
        sources: of edits, what they begin with.
        frame: of both.
        by_look: whether the tokens are the image tokenizer's, to which an edge's inside may be its outside.
        letters: that are to be painted as text, and are not.
    """

    scenes: list[Scene]
    sources: list[Scene]
    frame: Frame
    by_look: bool
    letters: list[int]


def _batch(size: int, chance: random.Random, number: int) -> _Batch:
    height, width = pick_size(chance)
    cropped = chance.random() < CROPPED
    editing = number % EDIT_EVERY == 0
    count = size * 512 * 512 // (CROP * CROP if cropped else height * width)
    sources, scenes = make_scenes(chance, max(1, count // 2 if editing else count), editing=editing)
    frame = Frame(height, width, aligned=not editing or chance.random() < ALIGNED)
    if cropped:
        corners = tuple(_corner(chance, scene, frame) for scene in scenes)
        frame = replace(frame, crop=CROP, corners=corners)
    letters = []
    if number % TEXT_EVERY == 0:
        letters = [chance.randrange(3, 259) for _ in range(chance.choice((3, 5, 7)))]
    return _Batch(scenes, sources, frame, number % LOOK_EVERY == 0, letters)


class _Loss:
    def __init__(self, shop: Workshop, net: GlmImageTransformer2DModel, glyphs: torch.nn.Module) -> None:
        self._shop, self._net, self._glyphs = shop, net, glyphs
        vae = AutoencoderKL.from_pretrained(shop.checkpoint / "vae", torch_dtype=torch.float32)
        vae = vae.to(shop.device, memory_format=torch.channels_last)
        self._vae = vae.eval().requires_grad_(requires_grad=False)
        self._mean, self._std = (
            torch.tensor(values, device=shop.device)[None, :, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        self._codes = Codes(shop)
        self._scheduler = scheduler()
        # Upstream makes these on the CPU for every pass.
        self._rotary = lru_cache(
            lambda *side: tuple(table.to(shop.device) for table in net.rope(torch.empty(1, 1, *side)))
        )

    def __call__(self, batch: _Batch) -> torch.Tensor:
        frame, count = batch.frame, len(batch.scenes)
        clean, ids = self._prepared(batch.scenes, frame, by_look=batch.by_look)
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
        with self._shop.autocast():
            if caches:
                caches.set_mode("write")
                self._read(batch.sources, frame, text, shared)
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
        self, scenes: list[Scene], frame: Frame, *, by_look: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents, and prior tokens brought to the DiT's grid: shape (scenes, tokens)."""
        pictures = draw(scenes, frame, self._shop.device)
        ids = self._codes.of_pictures(pictures) if by_look else self._codes.of_scenes(scenes, frame)
        ids = ids.repeat_interleave(2, 1).repeat_interleave(2, 2)
        with self._shop.autocast():
            latents = torch.cat(
                [
                    self._vae.encode(some).latent_dist.mean.float()
                    for some in pictures.contiguous(memory_format=torch.channels_last).split(16)
                ]
            )
        return (latents - self._mean) / self._std, ids.flatten(1)

    def _sigmas(self, count: int, frame: Frame) -> torch.Tensor:
        """Shares of noise, shifted for the whole picture's size as the scheduler shifts them."""
        uniform = torch.rand(count, device=self._shop.device)
        shift = calculate_shift(frame.height * frame.width // 16**2)
        shifted: torch.Tensor = self._scheduler.time_shift(shift, 1.0, uniform)
        return shifted

    @torch.no_grad()
    def _text(self, letters: list[int]) -> torch.Tensor:
        """What the glyph encoder makes of letters and an end."""
        ids = torch.tensor([[*letters, END]]).to(self._shop.device, non_blocking=True)
        hidden: torch.Tensor = self._glyphs(ids)[0]
        return hidden

    def _read(
        self, sources: list[Scene], frame: Frame, text: torch.Tensor, shared: dict[str, object]
    ) -> None:
        """Have the DiT write down what an edit may look at, as upstream's pipeline does."""
        latents, ids = self._prepared(sources, frame, by_look=True)
        latents = latents + SOURCE_NOISE * torch.randn_like(latents)
        nothing = torch.zeros_like(ids, dtype=torch.bool)
        self._net(latents, text[:, :0], ids, nothing, torch.zeros(len(ids), device=ids.device), **shared)
