"""The last part: the components become a checkpoint, and paint sentences that one can look at."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, GlmImagePipeline, GlmImageTransformer2DModel
from PIL import Image
from transformers import ByT5Tokenizer, GlmImageForConditionalGeneration, GlmImageProcessor, T5EncoderModel

from deployments.families.glm_image.tiny import scheduler
from training.demo.scenes import random_scene

if TYPE_CHECKING:
    from training.demo.trainer import Workshop

STEPS = 8
GUIDANCE = 1.5
COLUMNS = 4
SIDE = 256


def assembled(shop: Workshop) -> GlmImagePipeline:
    """Upstream's pipeline of the components, with what it wants besides; this is written, too."""
    folder = shop.checkpoint
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    scheduler().save_pretrained(folder / "scheduler")
    pipeline = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=GlmImageProcessor.from_pretrained(folder / "processor"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder"),
        vision_language_encoder=GlmImageForConditionalGeneration.from_pretrained(
            folder / "vision_language_encoder"
        ),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        transformer=GlmImageTransformer2DModel.from_pretrained(folder / "transformer"),
        scheduler=scheduler(),
    )
    return pipeline.to(shop.device, torch.float32)


def paint(shop: Workshop) -> None:
    """Write the index of the components, and `samples.png`, with its sentences."""
    pipeline = assembled(shop)
    pipeline.save_config(shop.checkpoint)  # model_index.json
    chance = random.Random("samples")
    sentences = [random_scene(chance).sentence for _ in range(COLUMNS**2)]
    images = pipeline(
        sentences,
        height=512,
        width=512,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator(shop.device).manual_seed(shop.seed),
    ).images
    sheet = Image.new("RGB", (COLUMNS * SIDE, COLUMNS * SIDE))
    for place, image in enumerate(images):
        image.thumbnail((SIDE, SIDE))
        sheet.paste(image, (place % COLUMNS * SIDE, place // COLUMNS * SIDE))
    sheet.save(shop.folder / "samples.png")
    (shop.folder / "samples.txt").write_text("\n".join(sentences))
