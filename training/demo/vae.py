"""Training of the VAE: plain areas and sharp edges, with latents that tolerate some noise."""

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
    from training.demo.trainer import TrainingRun

BATCH = {"cuda": 24, "cpu": 4}
LATENT_NOISE = 0.05
"""Deviation of the noise added to latents in training, because the DiT's latents are never exact."""
MEASURED = 16
"""Number of batches of four pictures that determine the latents' mean and deviation."""


def train(run: TrainingRun) -> None:
    """Trains the VAE. Writes it with the mean and the deviation of its latents."""
    torch.manual_seed(run.seed)
    net = model.vae().to(run.device, memory_format=torch.channels_last)

    def loss_of(batch: tuple[list[Scene], Frame]) -> torch.Tensor:
        pictures = draw(*batch, run.device)
        with run.autocast():
            mean = net.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()
            decoded = net.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample.float()
        error = decoded - pictures
        about_unit = (mean.square().mean() - 1).relu()
        loss: torch.Tensor = error.abs().mean() + 2 * error.square().mean() + 1e-3 * about_unit
        return loss

    trained = train_part(run, "vae", net, partial(_batch, BATCH[run.device.type]), loss_of, rate=2e-3)
    _write(run, trained)


def _batch(size: int, rng: random.Random, number: int) -> tuple[list[Scene], Frame]:
    side, count = (512, max(1, size // 4)) if number % 4 == 0 else (256, size)
    return [random_scene(rng) for _ in range(count)], Frame(side, side)


@torch.no_grad()
def _write(run: TrainingRun, vae: AutoencoderKL) -> None:
    rng = random.Random("latents")
    latents, errors = [], []
    for _ in range(MEASURED):
        pictures = draw([random_scene(rng) for _ in range(4)], Frame(512, 512), run.device)
        latents.append(vae.encode(pictures).latent_dist.mean)
        errors.append((vae.decode(latents[-1]).sample.clamp(-1, 1) - pictures).square().mean())
    all_ = torch.cat(latents)
    mean, std = all_.mean((0, 2, 3)), all_.std((0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.half().save_pretrained(run.checkpoint / "vae")
    psnr = 10 * torch.log10(4 / torch.stack(errors)).mean()
    run.log("vae", f"PSNR {psnr:.1f} dB")
