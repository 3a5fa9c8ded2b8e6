"""Acceleration options: compared with the plain path, and rejected where they are not available."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from pydantic import ValidationError

from deployments.config import Acceleration, DecoderConfig, Defaults, ModelConfig
from deployments.engines import acceleration
from deployments.errors import Cancelled, OutOfMemoryError, UnsupportedOption
from deployments.families.glm_image import checkpoint
from deployments.families.glm_image.decoder import Decoder
from deployments.stages.calls import Call
from deployments.types import Pixels, PriorTokens
from tests.conftest import needs_compiler
from tests.unit.deployments.families.glm_image.test_decoder import EDIT, REQUEST, tokens

LONG = replace(REQUEST, steps=8)


def accelerated(config: ModelConfig, **options: Any) -> ModelConfig:
    """Returns the configuration with these options, and with small images for the warm-up."""
    stage = DecoderConfig(device="cpu", dtype="float32", acceleration=Acceleration(**options))
    return config.model_copy(update={"decoder": stage, "defaults": Defaults(width=512, height=512)})


@pytest.fixture
def load(model_config: Callable[..., ModelConfig]) -> Callable[..., Decoder]:
    def load(**options: Any) -> Decoder:
        return Decoder.load(accelerated(model_config(), **options))

    return load


@pytest.fixture(autouse=True)
def attention_is_native_again() -> Iterator[None]:
    yield
    _AttentionBackendRegistry.set_active_backend(_AttentionBackendRegistry.get_active_backend()[0].NATIVE)


@pytest.fixture
def plain(load: Callable[..., Decoder]) -> Pixels:
    return load().decode(LONG, Call())


def difference(one: Pixels, other: Pixels) -> tuple[float, int]:
    """Returns the mean and the largest difference, in steps of 8 bits."""
    apart = np.abs(one.astype(int) - other.astype(int))
    return float(apart.mean()), int(apart.max())


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        ({"attention": "_native_flash"}, 0.01),
        ({"quantization": "fp8"}, 3.0),
        ({"step_cache": 0.2}, 8.0),
        ({"offload": "none"}, 0.0),
    ],
)
def test_an_option_stays_close_to_the_plain_path(
    load: Callable[..., Decoder], plain: Pixels, options: dict[str, Any], mean: float
) -> None:
    decoder = load(**options)
    accelerated = decoder.decode(LONG, Call())
    assert difference(accelerated, plain)[0] <= mean
    assert np.array_equal(decoder.decode(LONG, Call()), accelerated)  # the same seed, the same pixels


QUOTED = replace(REQUEST, prompt='"another text"')
PLAIN = replace(REQUEST, prompt="no text")
WIDE = replace(QUOTED, width=1024, prior=PriorTokens(target=tokens(16, 32)))
UNITS = (
    REQUEST,
    QUOTED,
    PLAIN,
    WIDE,
    replace(PLAIN, guidance_scale=1),
    EDIT,
    replace(EDIT, prompt="no text"),
)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method`:DeprecationWarning"
)  # raised by inductor itself
def test_compiled_parts_change_pixels_by_rounding(load: Callable[..., Decoder]) -> None:
    plain, compiled = load(), load(compile=True)
    for unit in UNITS:
        assert difference(compiled.decode(unit, Call()), plain.decode(unit, Call()))[1] <= 2


@pytest.mark.slow
def test_after_loading_no_unit_waits_for_the_compiler(
    load: Callable[..., Decoder], graphs: list[object]
) -> None:
    decoder, plain = load(compile=True), load()
    compiled = len(graphs)
    assert compiled
    for unit in (replace(unit, steps=2) for unit in UNITS):
        assert difference(decoder.decode(unit, Call()), plain.decode(unit, Call()))[1] <= 2
    assert len(graphs) == compiled


def test_progress_is_reported_while_the_stage_compiles(
    model_config: Callable[..., ModelConfig], graphs: list[object]
) -> None:
    compiled_at: dict[float, int] = {}

    def report(share: float) -> None:
        compiled_at[share] = len(graphs)

    Decoder.load(accelerated(model_config(), compile=True), report)
    shares = list(compiled_at)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert compiled_at[0.5] == 0  # the weights are read
    first_image = next(share for share in shares if share > 0.5)
    assert 0 < compiled_at[first_image] < compiled_at[1]


def test_eight_bits_halve_the_memory_of_the_weights(load: Callable[..., Decoder]) -> None:
    def size(decoder: Decoder) -> int:
        blocks = decoder.pipeline.transformer.transformer_blocks
        return sum(weight.nbytes for block in blocks for weight in block.ff.parameters())

    assert size(load(quantization="fp8")) == size(load()) / 4  # of 32 bits


@pytest.mark.slow
def test_tiles_of_the_vae_take_less_memory(
    model_config: Callable[..., ModelConfig], load: Callable[..., Decoder], plain: Pixels
) -> None:
    pipeline = checkpoint.load_decoder(model_config())
    whole = acceleration.component_bytes(pipeline, 2048, CPU)["vae"]
    acceleration.tile_vae(pipeline)
    assert acceleration.component_bytes(pipeline, 2048, CPU)["vae"] < whole / 2
    # Tiles have sides of 1024 pixels here, so smaller images are decoded whole.
    assert np.array_equal(load(vae_tiling=True).decode(LONG, Call()), plain)


def test_memory_of_a_gpu_includes_that_of_its_libraries(model_config: Callable[..., ModelConfig]) -> None:
    pipeline = checkpoint.load_decoder(model_config())
    computed = acceleration.component_bytes(pipeline, 256, CPU)
    on_gpu = acceleration.component_bytes(pipeline, 256, torch.device("cuda"))
    assert all(on_gpu[part] == round(1.2 * size) > 0 for part, size in computed.items())


def test_a_step_cache_skips_blocks_but_never_for_a_source_image(load: Callable[..., Decoder]) -> None:
    decoder = load(step_cache=0.9)
    marks: list[object] = []
    last = decoder.pipeline.transformer.transformer_blocks[-1]
    last.attn1.register_forward_hook(lambda *_: marks.append(0))
    decoder.decode(LONG, Call())
    assert 2 <= len(marks) < 2 * LONG.steps
    marks.clear()
    decoder.decode(replace(EDIT, steps=1), Call())
    assert len(marks) == len(EDIT.sources) + 2


def test_a_step_cache_forgets_a_cancelled_unit(load: Callable[..., Decoder]) -> None:
    decoder = load(step_cache=0.9)
    expected = decoder.decode(LONG, Call())
    call = Call(report=lambda _: call.cancelled.set())
    with pytest.raises(Cancelled):
        decoder.decode(replace(LONG, seed=5), call)
    assert np.array_equal(decoder.decode(LONG, Call()), expected)


@pytest.mark.parametrize("backend", ["sage", "xformers", "flash"])
def test_an_option_that_this_machine_lacks_is_rejected_at_the_start(
    load: Callable[..., Decoder], backend: str
) -> None:
    with pytest.raises(
        UnsupportedOption, match=r"decoder\.acceleration\.attention is not available here; remove it: .+"
    ):
        load(attention=backend)


def test_an_option_that_fails_only_in_use_is_rejected_at_the_start_too(
    load: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(pipeline: Any, device: torch.device) -> None:
        pipeline.transformer.register_forward_pre_hook(lambda *_: 1 / 0)

    monkeypatch.setattr(acceleration, "compile_parts", breaks)
    with pytest.raises(UnsupportedOption, match=r"no image could be made with .*'compile': True.*division"):
        load(compile=True)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_on_a_cpu_there_is_nothing_to_offload(offload: Any) -> None:
    with pytest.raises(ValidationError, match=f"offload: {offload} needs device: cuda"):
        DecoderConfig(device="cpu", acceleration=Acceleration(offload=offload))


@pytest.mark.parametrize("other", [{"step_cache": 0.1}, {"quantization": "fp8"}, {"offload": "group"}])
def test_options_that_cannot_be_compiled_are_named(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="compile: true cannot be combined with"):
        Acceleration(compile=True, **other)


CPU = torch.device("cpu")
ON_GPU = {"device": "cuda", "deployment": {"ray_actor_options": {"num_gpus": 1}}}


@pytest.mark.parametrize(
    ("stage", "options", "compiles"),
    [
        (ON_GPU, {}, True),
        (ON_GPU, {"offload": "model", "attention": "sage", "vae_tiling": True}, True),
        (ON_GPU, {"compile": False}, False),
        (ON_GPU, {"step_cache": 0.1}, False),
        (ON_GPU, {"quantization": "fp8"}, False),
        (ON_GPU, {"offload": "group"}, False),
        ({"device": "cpu"}, {}, False),
        ({"device": "cpu"}, {"compile": True}, True),
    ],
)
def test_a_gpu_compiles_unless_something_forbids_it(
    stage: dict[str, Any], options: dict[str, Any], *, compiles: bool
) -> None:
    assert DecoderConfig(**stage, acceleration=Acceleration(**options)).compiles is compiles


@pytest.mark.parametrize(
    ("stage", "options", "lossy"),
    [
        ({"device": "cpu"}, {"offload": "none", "compile": False}, []),
        ({"device": "cpu"}, {"vae_tiling": True, "step_cache": 0.1}, ["step_cache", "vae_tiling"]),
        ({"device": "cpu"}, {"compile": True, "attention": "flash"}, ["attention", "compile"]),
        (ON_GPU, {"compile": True, "vae_tiling": True}, ["vae_tiling"]),
        (ON_GPU, {"compile": False}, []),
    ],
)
def test_options_that_change_pixels_are_listed(
    stage: dict[str, Any], options: dict[str, Any], lossy: list[str]
) -> None:
    assert DecoderConfig(**stage, acceleration=Acceleration(**options)).lossy == lossy


@pytest.mark.parametrize(
    ("options", "free", "device"),
    [
        ({}, 10, "cuda"),
        ({"offload": "none"}, 10, "cuda"),
        ({}, 4, "cpu"),  # they do not fit, so they are moved one component at a time
        ({"offload": "none"}, 4, "cpu"),  # rejected with advice afterwards
        ({"offload": "model"}, 10, "cpu"),
        ({"offload": "group"}, 10, "cpu"),
        ({"quantization": "fp8"}, 10, "cpu"),  # made smaller before they are moved to the device
    ],
)
def test_weights_are_loaded_to_the_device_where_they_stay(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], free: int, device: str
) -> None:
    monkeypatch.setattr(acceleration, "free_bytes", lambda _: free * 10**9)
    config = DecoderConfig.model_validate(ON_GPU | {"acceleration": options})
    assert acceleration.loading_device(config, 6 * 10**9) == device


class Part(torch.nn.Module):
    layout: object = None

    def to(self, *_: Any, **kwargs: Any) -> Any:
        self.layout = kwargs.get("memory_format", self.layout)
        return self


class Placed:
    """A fake pipeline with 6 GB of weights, on a fake GPU."""

    def __init__(self) -> None:
        self.vae = self._part(1)
        self.components = {"transformer": self._part(5), "vae": self.vae}
        self.placed = ""

    def _part(self, gigabytes: int) -> torch.nn.Module:
        part = Part()
        part.weight = torch.nn.Parameter(torch.empty(gigabytes * 10**9 // 4, device="meta"))
        return part

    def to(self, device: torch.device) -> None:
        self.placed = "whole"

    def enable_model_cpu_offload(self, device: torch.device) -> None:
        self.placed = "a component at a time"

    def enable_group_offload(self, device: torch.device, **_: Any) -> None:
        self.placed = "a layer at a time"


@pytest.mark.parametrize(
    ("offload", "free", "placed"),
    [
        ("auto", 10, "whole"),  # 6 GB of weights, 3 GB for the VAE's work
        ("auto", 8, "a component at a time"),  # 5 GB for the DiT, 1 GB for its work, 1 GB for the VAE
        ("none", 10, "whole"),
        ("model", 10, "a component at a time"),
        ("group", 4, "a layer at a time"),  # except the VAE
    ],
)
def test_weights_go_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, offload: str, free: int, placed: str
) -> None:
    monkeypatch.setattr(acceleration, "free_bytes", lambda _: free * 10**9)
    pipeline: Any = Placed()
    acceleration.place(pipeline, torch.device("cuda"), offload, {"transformer": 10**9, "vae": 3 * 10**9})
    assert pipeline.placed == placed
    assert pipeline.vae.layout is torch.channels_last


def test_weights_already_on_the_device_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "free_bytes", lambda _: 4 * 10**9)
    pipeline: Any = Placed()
    # The fake's weights are on the device "meta", which has 4 GB left.
    acceleration.place(pipeline, torch.device("meta"), "auto", {"transformer": 10**9, "vae": 3 * 10**9})
    assert pipeline.placed == "whole"


@pytest.mark.parametrize(("offload", "free"), [("auto", 6), ("none", 8), ("model", 6), ("group", 3)])
def test_a_pipeline_that_does_not_fit_is_rejected_with_advice(
    monkeypatch: pytest.MonkeyPatch, offload: str, free: int
) -> None:
    monkeypatch.setattr(acceleration, "free_bytes", lambda _: free * 10**9)
    pipeline: Any = Placed()
    with pytest.raises(
        OutOfMemoryError, match=rf"takes .* GB with offload .*; {free}\.0 GB are free.*vae_tiling"
    ):
        acceleration.place(pipeline, torch.device("cuda"), offload, {"transformer": 10**9, "vae": 3 * 10**9})


@pytest.mark.parametrize("size", [(512, 512), (544, 512), (512, 544), (1024, 1024), (992, 1024)])
def test_every_default_size_has_another_one_to_warm_up_with(size: tuple[int, int]) -> None:
    width, height = size
    stage = {"deployment": {"ray_actor_options": {"num_gpus": 1}}}
    config = ModelConfig.model_validate(
        {
            "name": "m",
            "family": "glm_image",
            "checkpoint": "tiny",
            "defaults": {"width": width, "height": height},
            "prior": stage,
            "decoder": stage,
        }
    )
    first, others = acceleration.warm_up_sizes(config)
    assert others == size
    assert first != size
    assert first[0] != first[1]
    assert config.traits.is_legal_size(*first)
