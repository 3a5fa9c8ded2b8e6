"""The footprints of the families, compared with models of the released sizes that take no memory."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model
from transformers.initialization import no_init_weights

from deployments.engines import acceleration
from deployments.engines.memory import working_bytes
from deployments.families import FAMILIES
from deployments.families.glm_image import checkpoint as glm_image_checkpoint
from deployments.families.glm_image.pipeline import DecoderPipeline as GLMImagePipeline
from deployments.families.z_image import checkpoint as z_image_checkpoint
from deployments.families.z_image.pipeline import DecoderPipeline as ZImagePipeline
from deployments.memory_plan import BUILT_IN, Footprint
from tests.gpu import models

META, CPU = torch.device("meta"), torch.device("cpu")
GLM_IMAGE, Z_IMAGE = FAMILIES["glm_image"].footprint(), FAMILIES["z_image"].footprint()


@pytest.fixture(autouse=True)
def models_without_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_ready", lambda model, device: model.to(device).eval())


def empty(make: Callable[[], Any]) -> Any:
    """Returns a model in bfloat16 whose weights have shapes and no contents."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with META, no_init_weights():
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def qwen() -> Any:
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    return empty(lambda: Qwen3Model(config))


def flux_vae() -> Any:
    return empty(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            sample_size=1024,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )


def glm_image_pipeline(**options: Any) -> Any:
    return GLMImagePipeline(**models.decoder(META, **options))


def z_image_pipeline(**options: int) -> Any:
    dit = empty(lambda: ZImageTransformer2DModel(**options))
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(), flux_vae(), None, None, dit)


def parameters(part: Any) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def test_the_prior_stages_have_as_many_parameters() -> None:
    glm, _ = models.prior(META)
    assert GLM_IMAGE.prior == {"vision_language_encoder": parameters(glm)}
    assert Z_IMAGE.prior == {"text_encoder": parameters(qwen())}


@pytest.mark.parametrize(
    ("footprint", "make"), [(GLM_IMAGE, glm_image_pipeline), (Z_IMAGE, z_image_pipeline)]
)
def test_the_decoder_stages_have_as_many_parameters(footprint: Footprint, make: Callable[[], Any]) -> None:
    parts = {name: part for name, part in make().components.items() if isinstance(part, torch.nn.Module)}
    assert footprint.decoder == {name: parameters(part) for name, part in parts.items()}


@pytest.mark.parametrize(
    ("footprint", "make"), [(GLM_IMAGE, glm_image_pipeline), (Z_IMAGE, z_image_pipeline)]
)
def test_as_many_parameters_are_stored_in_8_bits(footprint: Footprint, make: Callable[[], Any]) -> None:
    dit = make().transformer
    acceleration.quantize(SimpleNamespace(transformer=dit))
    quantized = sum(one.numel() for one in dit.parameters() if one.dtype == torch.float8_e4m3fn)
    assert footprint.quantized_share == pytest.approx(quantized / parameters(dit), abs=0.001)


@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize(
    ("footprint", "make"),
    [
        # The layers run one after the other. The second one meets what the first one leaves.
        (GLM_IMAGE, lambda: glm_image_pipeline(layers=2)),
        (Z_IMAGE, lambda: z_image_pipeline(n_layers=2)),
    ],
)
def test_the_work_of_an_image_is_what_the_stage_computes(
    footprint: Footprint, make: Callable[[], Any], side: int
) -> None:
    computed = acceleration.component_bytes(make(), side, CPU)
    dit = footprint.dit_work + footprint.dit_work_a_pixel * side**2
    assert computed["transformer"] == pytest.approx(dit, rel=0.01)
    assert computed["vae"] == pytest.approx(footprint.vae_work_a_pixel * side**2, rel=0.01)


def test_tiles_are_as_large() -> None:
    for pipeline in (glm_image_pipeline(layers=1), z_image_pipeline(n_layers=1)):
        assert {pipeline.vae.tile_sample_min_size} == {GLM_IMAGE.tile_side, Z_IMAGE.tile_side}


def test_the_cache_and_a_source_image_are_those_of_the_released_configuration() -> None:
    glm, _ = models.prior(META, layers=1, vision_layers=1)
    config = glm.config.text_config
    channels = config.hidden_size // config.num_attention_heads
    assert GLM_IMAGE.cached_numbers == 2 * config.num_key_value_heads * channels * 40
    pipeline = glm_image_pipeline()
    assert pipeline.source_bytes(1024) == 2 * GLM_IMAGE.source_numbers_a_pixel * 1024**2


def test_a_pass_of_z_images_prior_stage_takes_no_more_memory() -> None:
    encoder = qwen()
    encoder.layers = encoder.layers[:1]
    ids = torch.zeros(2, 512, dtype=torch.long, device=META)
    mask = torch.ones(2, 512, dtype=torch.bool, device=META)
    computed = working_bytes(lambda: encoder(input_ids=ids, attention_mask=mask, use_cache=False))
    assert 0.5 * Z_IMAGE.prior_work < computed < Z_IMAGE.prior_work


@pytest.mark.parametrize(
    ("footprint", "checkpoint"), [(GLM_IMAGE, glm_image_checkpoint), (Z_IMAGE, z_image_checkpoint)]
)
def test_components_are_those_that_the_stages_load(footprint: Footprint, checkpoint: Any) -> None:
    for sizes, components in (
        (footprint.prior, checkpoint.PRIOR_COMPONENTS),
        (footprint.decoder, checkpoint.DECODER_COMPONENTS),
    ):
        assert set(sizes) == {name for name, cls in components.items() if issubclass(cls, torch.nn.Module)}
    assert set(checkpoint.BUILT_IN) <= set(BUILT_IN)
