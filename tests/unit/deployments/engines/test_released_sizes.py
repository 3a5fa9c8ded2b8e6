"""One layer of each stage at the released sizes, on the CPU. A tiny model could hide errors of size."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from deployments.families.glm_image import language_model_gpu
from deployments.families.glm_image.language_model_gpu import GPULanguageModel
from deployments.families.glm_image.pipeline import DecoderPipeline
from deployments.families.glm_image.sequence import Sequencer
from deployments.families.glm_image.versions import image_tokens
from deployments.types import ImageRequest
from tests.gpu import models

CPU = torch.device("cpu")
SLICE_TOKENS = 32
"""Tokens of a slice. Fewer than on a GPU, to save seconds."""


@torch.inference_mode()
def test_the_prior_reads_a_prompt_as_upstream_does_and_draws_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model_gpu, "SLICE_TOKENS", SLICE_TOKENS)
    model, processor = models.prior(CPU, layers=1, vision_layers=1)
    sequence = Sequencer(model, processor).sequence(ImageRequest(prompt="A", width=512, height=512, seed=0))
    prompt = sequence.prompt
    positions = sequence.positions[:, : len(prompt)]
    read = model.model.language_model(input_ids=prompt[None], position_ids=positions[:, None])
    expected = model.lm_head(read.last_hidden_state[:, -1]).float()

    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        language_model = GPULanguageModel(model, rows=2, max_sequence_length=sequence.length)
        language_model.begin(1, sequence, seed=0)
        logits = language_model.prefill(1, 0, prompt)
        assert (logits - expected).norm() < 0.02 * expected.norm()
        while not (settled := language_model.decode()):
            pass
        tokens = language_model.drawn(1)
    assert settled == {1: len(tokens)}
    assert len(tokens) > 1
    assert all(0 <= token < models.CODEBOOK for token in tokens.tolist())

    grid = torch.tensor([[1, 4, 4]])
    tokens = image_tokens(model, torch.rand(16, 3 * 16 * 16), grid)
    assert tokens.shape == (16,)
    assert tokens.max() < models.CODEBOOK


def test_the_decoder_makes_a_step_of_an_image_and_of_an_edit() -> None:
    pipeline = DecoderPipeline(**models.decoder(CPU, layers=1, glyph_layers=1))
    grid = torch.arange(4)
    edit = {
        "image": [Image.fromarray(np.zeros((32, 32, 3), np.uint8))],
        "prior_token_image_ids": [grid],
        "source_image_grid_thw": [torch.tensor([[1, 2, 2]])],
    }
    made = [
        pipeline(
            prompt='a sign with "A"',
            width=32,
            height=32,
            prior_token_ids=grid[None],
            num_inference_steps=1,
            guidance_scale=1.5,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **sources,
        ).images
        for sources in ({}, edit)
    ]
    assert made[0].shape == made[1].shape == (1, 16, 4, 4)
    assert torch.isfinite(torch.cat(made)).all()
    assert not torch.equal(*made)
