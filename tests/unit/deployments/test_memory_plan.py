"""The memory plan: compared with peaks on an H200, with options, and for checkpoints on this machine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deployments.config import (
    Acceleration,
    ChatModelConfig,
    ClassifierConfig,
    DecoderConfig,
    ModelConfig,
    PriorConfig,
)
from deployments.errors import CheckpointError
from deployments.memory_plan import (
    AS_RELEASED,
    CUDA_BYTES,
    DecoderPlan,
    Need,
    PriorPlan,
    decoder_plan,
    helper_plan,
    prior_plan,
)
from tests.gpu.table import FIGURES, Figures

GPU: dict[str, Any] = {"ray_actor_options": {"num_gpus": 1}}
H200 = Figures(FIGURES)


def model(
    family: str = "glm_image", checkpoint: str = "/nowhere", dtype: Any = "bfloat16", **prior: Any
) -> ModelConfig:
    return ModelConfig(
        name="m",
        family=family,
        checkpoint=checkpoint,
        prior=PriorConfig(deployment=GPU, dtype=dtype, **prior),
        decoder=DecoderConfig(deployment=GPU, dtype=dtype),
    )


def prior(**options: Any) -> PriorPlan:
    plan = prior_plan(model(**options))
    assert isinstance(plan, PriorPlan)
    return plan


def decoder(config: ModelConfig | None = None, **options: Any) -> DecoderPlan:
    config = config or model()
    stage = config.decoder.model_copy(update={"acceleration": Acceleration(**options)})
    plan = decoder_plan(config.model_copy(update={"decoder": stage}))
    assert isinstance(plan, DecoderPlan)
    return plan


def gigabytes(need: Need) -> float:
    """Returns what PyTorch allocates of it."""
    return (need.total - CUDA_BYTES) / 1e9


# Peaks on an H200. The plan has a margin of a fifth of the work, which is a small part of a stage.


def agrees(planned: float, measured: float, *, most: float = 1.085) -> bool:
    return 0.99 * measured <= planned <= most * measured


def test_the_prior_stage_takes_as_much_as_on_an_h200() -> None:
    row = H200.find("prior, compiled and captured", rows=8, max_sequence_length=24_576)
    assert agrees(gigabytes(prior().need()), row["peak_gb"])


def test_cuda_takes_as_much_as_on_an_h200() -> None:
    rows = H200.find("prior, memory"), H200.find("memory, offload: model")
    for row in rows:
        assert agrees(CUDA_BYTES / 1e9, row["in_use_on_device_gb"] - row["reserved_gb"], most=1.15)


@pytest.mark.parametrize("kind", ["plain", "compiled"])
@pytest.mark.parametrize("side", [1024, 2048])
def test_an_image_takes_as_much_as_on_an_h200(kind: str, side: int) -> None:
    row = H200.find("decoder, image", kind=kind, side=side)
    plan = decoder()
    assert agrees(gigabytes(plan.need_of(Acceleration(), side)), row["weights_gb"] + row["beside_gb"])


@pytest.mark.parametrize(("side", "tiled"), [(1024, False), (2048, False), (2048, True)])
def test_each_part_takes_as_much_as_on_an_h200(side: int, tiled: bool) -> None:
    row = H200.find("memory, an image", side=side, vae_tiling=tiled)
    for part, size in decoder().work(side, tiled=tiled).items():
        assert agrees(size / 1e9, row["measured_gb"][part], most=1.15)


def test_both_stages_take_as_much_as_on_an_h200() -> None:
    row = H200.find("image, memory of both stages")
    both = gigabytes(prior().need()) + gigabytes(decoder().need_of(Acceleration(), 1024))
    assert agrees(both, row["peak_gb"])


def test_weights_in_8_bits_take_as_much_as_on_an_h200() -> None:
    row = H200.find("options, another decoder", quantization="fp8")
    assert agrees(sum(decoder().weights("fp8").values()) / 1e9, row["before_gb"])
    assert agrees(gigabytes(decoder().need_of(Acceleration(quantization="fp8"), 1024)), row["peak_gb"])


def test_moving_a_component_at_a_time_takes_as_much_as_on_an_h200() -> None:
    row = H200.find("memory, offload: model", side=1024)
    assert agrees(gigabytes(decoder().need_of(Acceleration(offload="model"), 1024)), row["peak_gb"])


def test_moving_a_layer_at_a_time_takes_as_much_as_on_an_h200() -> None:
    row = H200.find("memory, offload: group", side=1024)
    # The VAE had the other memory format then.
    other, ours = (
        H200.find("vae, an image", kind="plain", side=1024, layout=layout)["beside_gb"]
        for layout in ("NCHW", "channels_last")
    )
    planned = gigabytes(decoder().need_of(Acceleration(offload="group"), 1024))
    assert agrees(planned, row["peak_gb"] - (other - ours))


@pytest.mark.parametrize("side", [1024, 2048])
def test_a_source_image_takes_as_much_as_on_an_h200(side: int) -> None:
    taken = max(H200.find("memory, a source image", side=side)["measured_gb"].values())
    plan = decoder()
    rest = CUDA_BYTES + sum(plan.weights().values())
    assert plan.sources(rest + int((taken + 2.5) * 1e9), "none", side) >= 1
    assert plan.sources(rest + int(0.8 * taken * 1e9), "none", side) == 0


def test_offloading_leaves_memory_for_source_images() -> None:
    counts = {way: decoder().sources(20 * 10**9, way, 1024) for way in ("none", "model", "group")}
    assert counts == {"none": 0, "model": 1, "group": 4}
    # The DiT's weights are on the GPU, although the VAE's work takes more at the peak.
    assert decoder(quantization="fp8").sources(12 * 10**9, "model", 1024) == 0
    assert decoder(quantization="fp8").sources(14 * 10**9, "model", 1024) == 1


# Options


def test_the_cache_is_that_of_all_requests() -> None:
    assert prior(max_batch_size=4, max_sequence_length=8192).need().cache == 4 * 8192 * 40_960
    assert prior(family="z_image").need().cache == 0


def test_float32_takes_twice_as_much() -> None:
    half, whole = model(), model(dtype="float32")
    for plan_of in (prior_plan, decoder_plan):
        one, other = (plan_of(config).need() for config in (half, whole))
        assert one
        assert other
        assert other.total - CUDA_BYTES == pytest.approx(2 * (one.total - CUDA_BYTES), rel=1e-6)


def test_auto_offloads_only_if_the_stage_does_not_fit_otherwise() -> None:
    plan = decoder()
    whole = plan.need().total
    assert plan.need(whole).offload == "none"
    assert plan.need(whole - 1).offload == "model"
    assert decoder(offload="none").need(0).offload == "none"


def test_the_prior_stage_fits_with_fewer_requests_or_shorter_ones() -> None:
    plan = prior()
    assert [saving.settings for saving in plan.savings(25 * 10**9)] == [
        {"prior.max_batch_size": 3},
        {"prior.max_sequence_length": 8192},
    ]
    assert [saving.settings for saving in plan.savings(23 * 10**9)] == [
        {"prior.max_batch_size": 1},
        {"prior.max_batch_size": 4, "prior.max_sequence_length": 8192},
    ]
    (only,) = plan.savings(22 * 10**9)
    assert only.settings == {"prior.max_batch_size": 1, "prior.max_sequence_length": 8192}
    assert plan.savings(21 * 10**9) == []


def test_the_decoder_stage_fits_with_the_mildest_options() -> None:
    tiling, model_offload = "decoder.acceleration.vae_tiling", "decoder.acceleration.offload"
    assert [saving.settings for saving in decoder().savings(20 * 10**9)] == [
        {tiling: True},
        {model_offload: "model"},
    ]
    assert [saving.settings for saving in decoder().savings(14 * 10**9)] == [
        {tiling: True, "decoder.acceleration.quantization": "fp8"},
        {tiling: True, model_offload: "group"},
    ]
    assert decoder().savings(5 * 10**9) == []
    assert [saving.settings for saving in decoder(vae_tiling=True).savings(18.7e9)] == [
        {model_offload: "model"},
        {"decoder.acceleration.quantization": "fp8"},
    ]


def test_options_that_exclude_each_other_are_not_advised() -> None:
    assert decoder(compile=True).savings(14 * 10**9) == []


@pytest.mark.parametrize("plan", [prior(), decoder(), decoder(model("z_image"))])
def test_a_saving_fits(plan: PriorPlan | DecoderPlan) -> None:
    for room in range(5 * 10**9, 35 * 10**9, 10**9):
        assert all(saving.need.total <= room for saving in plan.savings(room))


def test_z_image_keeps_nothing_of_a_source_image() -> None:
    assert decoder(model("z_image")).sources(0, "none", 2048) == 1


# Checkpoints


def save(folder: Path, **sizes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        save_file({"weight": torch.zeros(size, 2)}, folder / f"{name}.safetensors")


def test_a_missing_folder_counts_as_released() -> None:
    assert prior().weights_from == AS_RELEASED


def test_a_folder_is_counted_whatever_the_type_of_its_files(tmp_path: Path) -> None:
    save(tmp_path / "vision_language_encoder", one=3, two=4)
    for name in ("text_encoder", "transformer", "vae"):
        save(tmp_path / name, model=5)
    config = model(checkpoint=str(tmp_path))
    assert prior_plan(config) == PriorPlan(
        model=config, parameters={"vision_language_encoder": 14}, weights_from=f"in {tmp_path}"
    )
    plan = decoder_plan(config)
    assert isinstance(plan, DecoderPlan)
    assert plan.weights() == {"text_encoder": 20, "transformer": 20, "vae": 20}


def test_a_folder_without_a_component_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vision_language_encoder has no .*safetensors; download"):
        prior_plan(model(checkpoint=str(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"\2\0\0\0\0\0\0\0[]", b'\7\0\0\0\0\0\0\0{"a":1}', b"\xff" * 40])
def test_a_broken_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "vision_language_encoder", one=1)
    (tmp_path / "vision_language_encoder" / "one.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"one\.safetensors is broken"):
        prior_plan(model(checkpoint=str(tmp_path)))


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_a_checkpoint_of_the_server_is_small(name: str) -> None:
    config = model(checkpoint=name)
    for plan in (prior_plan(config), decoder_plan(config)):
        assert plan.need() is None
        assert plan.savings(1) == []
        assert "is small" in plan.weights_from


def test_only_a_folder_shows_the_weights_of_a_helper(tmp_path: Path) -> None:
    save(tmp_path, model=50)
    need = helper_plan(ChatModelConfig(checkpoint=str(tmp_path), deployment=GPU)).need()
    assert need == Need(weights=200)
    unknown = helper_plan(ClassifierConfig(device="cuda", deployment=GPU))
    assert unknown.need() is None
    assert "Falconsai/nsfw_image_detection is not known" in unknown.weights_from
    assert helper_plan(ChatModelConfig(checkpoint="tiny", deployment=GPU)).need() is None
