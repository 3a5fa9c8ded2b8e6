"""Training of the VAE: plain areas and sharp edges, with latents that bear some noise."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

import torch

from training.demo import model
from training.demo.scenes import Frame, draw, random_scene
from training.demo.trainer import train as train_part

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from training.demo.scenes import Scene
    from training.demo.trainer import Workshop

BATCH = {"cuda": 24, "cpu": 4}
LATENT_NOISE = 0.05
"""Added in training: the DiT's latents are never exact."""
MEASURED = 16
"""Batches of four pictures from which the latents' mean and deviation are."""


def train(shop: Workshop) -> None:
    """Train it and write it, with the mean and the deviation of its latents."""
    torch.manual_seed(shop.seed)
    net = model.vae().to(shop.device, memory_format=torch.channels_last)

    def loss_of(batch: tuple[list[Scene], Frame]) -> torch.Tensor:
        pictures = draw(*batch, shop.device)
        with shop.autocast():
            mean = net.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()
            decoded = net.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample.float()
        error = decoded - pictures
        about_unit = (mean.square().mean() - 1).relu()
        loss: torch.Tensor = error.abs().mean() + 2 * error.square().mean() + 1e-3 * about_unit
        return loss

    trained = train_part(shop, "vae", net, partial(_batch, BATCH[shop.device.type]), loss_of, rate=2e-3)
    _write(shop, trained)


def _batch(size: int, chance: random.Random, number: int) -> tuple[list[Scene], Frame]:
    side, count = (512, max(1, size // 4)) if number % 4 == 0 else (256, size)
    return [random_scene(chance) for _ in range(count)], Frame(side, side)


@torch.no_grad()
def _write(shop: Workshop, vae: AutoencoderKL) -> None:
    chance = random.Random("latents")
    latents, errors = [], []
    for _ in range(MEASURED):
        pictures = draw([random_scene(chance) for _ in range(4)], Frame(512, 512), shop.device)
        latents.append(vae.encode(pictures).latent_dist.mean)
        errors.append((vae.decode(latents[-1]).sample.clamp(-1, 1) - pictures).square().mean())
    all_ = torch.cat(latents)
    mean, std = all_.mean((0, 2, 3)), all_.std((0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.half().save_pretrained(shop.checkpoint / "vae")
    psnr = 10 * torch.log10(4 / torch.stack(errors)).mean()
    shop.tell("vae", f"PSNR {psnr:.1f} dB")
