"""The last part of the training: it completes the checkpoint and paints sample sentences."""

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
    from training.demo.trainer import TrainingRun

STEPS = 8
GUIDANCE = 1.5
COLUMNS = 4
SIDE = 256


def assemble(run: TrainingRun) -> GlmImagePipeline:
    """Returns upstream's pipeline of the components. Writes its tokenizer and scheduler to the checkpoint."""
    folder = run.checkpoint
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
    return pipeline.to(run.device, torch.float32)


def paint(run: TrainingRun) -> None:
    """Writes the index of the components, `samples.png`, and its sentences."""
    pipeline = assemble(run)
    pipeline.save_config(run.checkpoint)  # model_index.json
    rng = random.Random("samples")
    sentences = [random_scene(rng).sentence for _ in range(COLUMNS**2)]
    images = pipeline(
        sentences,
        height=512,
        width=512,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator(run.device).manual_seed(run.seed),
    ).images
    sheet = Image.new("RGB", (COLUMNS * SIDE, COLUMNS * SIDE))
    for place, image in enumerate(images):
        image.thumbnail((SIDE, SIDE))
        sheet.paste(image, (place % COLUMNS * SIDE, place // COLUMNS * SIDE))
    sheet.save(run.folder / "samples.png")
    (run.folder / "samples.txt").write_text("\n".join(sentences))
