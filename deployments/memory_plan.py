"""The GPU memory that stages need, computed before anything is downloaded or loaded.

The plan repeats what stages compute when they load, with the released checkpoints' sizes instead of loaded
weights. So it needs neither torch nor a GPU. All sizes are in bytes, and GB are 10⁹ bytes.

`tests/gpu/figures/nvidia-h200.jsonl` has measured peaks. A test compares the plan with them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from deployments.errors import CheckpointError
from deployments.identity import MAX_HEADER_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.config import Acceleration, ChatModelConfig, ClassifierConfig, ModelConfig

GPU_OVERHEAD = 1.2
"""Factor of the computed working memory on a GPU: workspaces of its libraries, and what an image keeps.

GLM-Image at the released size took 1.02 to 1.17 times the computed memory on an H200; see `tests/gpu`.
"""
CUDA_BYTES = 800_000_000
"""Memory of a process on a GPU beside PyTorch's: CUDA's context and kernels.

On an H200 it was 0.80 GB in the prior stage and 0.73 GB in the decoder stage: the difference of
`in_use_on_device_gb` and `reserved_gb`.
"""
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
RGB_BYTES = 6
"""Bytes of a pixel in bfloat16. The VAE puts its tiles together in an image."""
BUILT_IN = ("tiny", "demo")
"""Names of the checkpoints that come with the server or are made by it. They are small."""
AS_RELEASED = "as released"


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Sizes of a family's released checkpoint. Work is in bfloat16, in bytes, without `GPU_OVERHEAD`.

    Attributes:
        prior: number of parameters of the prior stage's components, by name.
        decoder: number of parameters of the decoder stage's components, by name.
        prior_work: memory of the prior stage in addition to weights and cache.
        cached_numbers: numbers that the prior stage's cache keeps for a token. 0 without a cache.
        short_sequence_length: token limit that saves memory and is enough for most requests. 0 without a
            cache.
        dit_work: memory of the DiT's work that does not depend on the image.
        dit_work_a_pixel: memory of the DiT's work for each pixel.
        vae_work_a_pixel: memory of the VAE decoder's work for each pixel.
        tile_side: side of the VAE's tiles in pixels.
        source_numbers_a_pixel: numbers that the DiT keeps for each pixel of a source image during an edit.
        quantized_share: share of the DiT's parameters that `quantization: fp8` stores in 8 bits.
    """

    prior: Mapping[str, int]
    decoder: Mapping[str, int]
    prior_work: int
    cached_numbers: int = 0
    short_sequence_length: int = 0
    dit_work: int
    dit_work_a_pixel: float
    vae_work_a_pixel: float
    tile_side: int
    source_numbers_a_pixel: float = 0
    quantized_share: float


@dataclass(frozen=True, kw_only=True)
class Need:
    """GPU memory of one replica at its peak.

    Attributes:
        weights: weights that are on the GPU at that time.
        cache: the prior stage's cache.
        work: memory in addition to both.
        offload: how the decoder stage keeps weights in the CPU's memory: `none`, `model` or `group`.
    """

    weights: int
    cache: int = 0
    work: int = 0
    offload: str = "none"

    @property
    def total(self) -> int:
        """All of it, with CUDA's own memory."""
        return self.weights + self.cache + self.work + CUDA_BYTES


@dataclass(frozen=True)
class Saving:
    """A change of the configuration that makes a replica smaller.

    Attributes:
        settings: the changed keys and their values.
        need: memory of the replica with these settings.
    """

    settings: Mapping[str, object]
    need: Need


class StagePlan(Protocol):
    """The memory plan of one stage, the same for all its replicas."""

    @property
    def weights_from(self) -> str:
        """Source of the weights' sizes, in words."""

    def need(self, room: int | None = None) -> Need | None:
        """Returns the memory of one replica. None if it is not known.

        Args:
            room: memory of a GPU that the replica has to itself. None if it shares a GPU.
        """

    def savings(self, room: float) -> list[Saving]:
        """Returns changes with which one replica fits into this memory, the mildest first."""


@dataclass(frozen=True, kw_only=True)
class PriorPlan:
    """The `StagePlan` of a prior stage.

    Attributes:
        model: configuration of the model.
        parameters: number of parameters of each component.
        weights_from: source of these numbers, in words.
    """

    model: ModelConfig
    parameters: Mapping[str, int]
    weights_from: str

    def need(self, room: int | None = None) -> Need:
        """Implements `StagePlan.need`."""
        return self.need_of(self.model.prior.max_batch_size, self.model.max_sequence_length)

    def need_of(self, requests: int, tokens: int) -> Need:
        """Returns the memory of one replica.

        Args:
            requests: number of requests at the same time.
            tokens: number of tokens that a request may have.
        """
        footprint, size = self.model.traits.footprint(), ITEM_BYTES[self.model.prior.dtype]
        return Need(
            weights=size * sum(self.parameters.values()),
            cache=size * footprint.cached_numbers * requests * tokens,
            work=footprint.prior_work * size // 2,
        )

    def savings(self, room: float) -> list[Saving]:
        """Implements `StagePlan.savings`."""
        most, limit = self.model.prior.max_batch_size, self.model.max_sequence_length
        found = []
        for tokens in (limit, self.model.traits.footprint().short_sequence_length):
            fitting = (count for count in range(most, 0, -1) if self.need_of(count, tokens).total <= room)
            requests = next(fitting, 0)
            settings: dict[str, object] = {}
            if requests < most:
                settings["prior.max_batch_size"] = requests
            if tokens < limit:
                settings["prior.max_sequence_length"] = tokens
            if requests and tokens and settings:
                found.append(Saving(settings, self.need_of(requests, tokens)))
        return found


@dataclass(frozen=True, kw_only=True)
class DecoderPlan:
    """The `StagePlan` of a decoder stage.

    Attributes:
        model: configuration of the model.
        parameters: number of parameters of each component.
        weights_from: source of these numbers, in words.
    """

    model: ModelConfig
    parameters: Mapping[str, int]
    weights_from: str

    def need(self, room: int | None = None) -> Need:
        """Implements `StagePlan.need`.

        With `offload: auto` the stage uses the memory that is free when it loads. On a shared GPU that
        depends on the other stages, so `auto` counts as `none` there.
        """
        chosen = self.model.decoder.acceleration
        need = self.need_of(chosen)
        if chosen.offload == "auto" and room is not None and need.total > room:
            return self.need_of(chosen.model_copy(update={"offload": "model"}))
        return need

    def need_of(self, chosen: Acceleration, side: int | None = None) -> Need:
        """Returns the memory of one replica.

        Args:
            chosen: its options. `offload: auto` counts as `none`.
            side: side of a square image in pixels. Defaults to that of the largest image.
        """
        offload = "none" if chosen.offload == "auto" else chosen.offload
        work = self.work(side or self.model.traits.max_side, tiled=chosen.vae_tiling)
        on_gpu, needed = peaks(self.weights(chosen.quantization), work)[offload]
        return Need(weights=on_gpu, work=needed, offload=offload)

    def weights(self, quantization: str = "none") -> dict[str, int]:
        """Returns the bytes of each component's weights."""
        size = ITEM_BYTES[self.model.decoder.dtype]
        weights = {name: size * number for name, number in self.parameters.items()}
        if quantization == "fp8":
            in_8_bits = self.model.traits.footprint().quantized_share * self.parameters["transformer"]
            weights["transformer"] -= round(in_8_bits * (size - 1))
        return weights

    def work(self, side: int, *, tiled: bool = False) -> dict[str, int]:
        """Returns the bytes that the two large components need for a square image, with a margin.

        Args:
            side: side of the image in pixels.
            tiled: whether the VAE works in tiles.
        """
        footprint, pixels = self.model.traits.footprint(), side**2
        vae = footprint.vae_work_a_pixel * pixels
        if tiled and side > footprint.tile_side:
            vae = footprint.vae_work_a_pixel * footprint.tile_side**2 + RGB_BYTES * pixels
        factor = GPU_OVERHEAD * ITEM_BYTES[self.model.decoder.dtype] / 2
        return {
            "transformer": round(factor * (footprint.dit_work + footprint.dit_work_a_pixel * pixels)),
            "vae": round(factor * vae),
        }

    def savings(self, room: float) -> list[Saving]:
        """Implements `StagePlan.savings`. Returns two at most, and none of which a part is enough."""
        now, found = self.model.decoder.acceleration, list[Saving]()
        changes: tuple[dict[str, object], ...] = (
            {"vae_tiling": True},
            {"offload": "model"},
            {"vae_tiling": True, "offload": "model"},
            {"vae_tiling": True, "quantization": "fp8"},
            {"vae_tiling": True, "offload": "group"},
        )
        for change in changes:
            chosen = now.model_copy(update=change)
            settings = {f"decoder.acceleration.{k}": v for k, v in change.items() if v != getattr(now, k)}
            need = self.need_of(chosen)
            is_enough = bool(settings) and need.total <= room and (chosen.allows_compile or not now.compile)
            if is_enough and not any(other.settings.items() <= settings.items() for other in found):
                found.append(Saving(settings, need))
        return found[:2]

    def sources(self, room: int, offload: str, side: int) -> int:
        """Returns the number of square source images for which an edit has memory, at most `max_sources`.

        Args:
            room: memory for the replica.
            offload: its way to offload, see `Need`.
            side: side of a source image in pixels.
        """
        traits = self.model.traits
        size = ITEM_BYTES[self.model.decoder.dtype] * traits.footprint().source_numbers_a_pixel * side**2
        weights = self.weights(self.model.decoder.acceleration.quantization)
        vae, dit = weights["vae"], weights["transformer"]
        on_gpu = {"none": sum(weights.values()), "model": vae + dit, "group": vae}[offload]
        left = room - CUDA_BYTES - on_gpu - self.work(traits.max_side)["transformer"]
        return max(0, min(traits.max_sources, math.floor(left / size))) if size else traits.max_sources


@dataclass(frozen=True, kw_only=True)
class WeightsPlan:
    """The `StagePlan` of a stage of which at most the weights are known.

    Attributes:
        weights_from: source of the weights' size, or the reason why it is not known.
        weights: bytes of the weights. None if not known.
    """

    weights_from: str
    weights: int | None = None

    def need(self, room: int | None = None) -> Need | None:
        """Implements `StagePlan.need`. The work is missing."""
        return None if self.weights is None else Need(weights=self.weights)

    def savings(self, room: float) -> list[Saving]:
        """Implements `StagePlan.savings`. None are known."""
        return []


def prior_plan(model: ModelConfig) -> StagePlan:
    """Returns the memory plan of a model's prior stage.

    Raises:
        CheckpointError: the checkpoint is a folder on this machine, and a component is missing.
    """
    if model.checkpoint in BUILT_IN:
        return _small(model.checkpoint)
    parameters, weights_from = _parameters(model.checkpoint, model.traits.footprint().prior)
    return PriorPlan(model=model, parameters=parameters, weights_from=weights_from)


def decoder_plan(model: ModelConfig) -> StagePlan:
    """Returns the memory plan of a model's decoder stage.

    Raises:
        CheckpointError: the checkpoint is a folder on this machine, and a component is missing.
    """
    if model.checkpoint in BUILT_IN:
        return _small(model.checkpoint)
    parameters, weights_from = _parameters(model.checkpoint, model.traits.footprint().decoder)
    return DecoderPlan(model=model, parameters=parameters, weights_from=weights_from)


def helper_plan(config: ChatModelConfig | ClassifierConfig) -> StagePlan:
    """Returns the memory plan of a helper. Only a folder on this machine shows the size of its weights.

    Raises:
        CheckpointError: the folder has no weights.
    """
    if config.checkpoint in BUILT_IN:
        return _small(config.checkpoint)
    folder = Path(config.checkpoint).expanduser()
    if not folder.is_dir():
        return WeightsPlan(weights_from=f"the size of {config.checkpoint} is not known here")
    size = ITEM_BYTES[config.dtype] * count_parameters(folder)
    return WeightsPlan(weights_from=f"in {folder}, without its work", weights=size)


def peaks(weights: Mapping[str, int], work: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Returns the weights and the work on the decoder stage's GPU at the peak, by the way to offload.

    Args:
        weights: bytes of each component.
        work: bytes that each large component needs in addition to its weights.
    """
    vae, dit = weights["vae"], weights["transformer"]
    return {
        "none": (sum(weights.values()), max(work.values())),
        # After a preview or a source image, the VAE is still on the device while the DiT comes back.
        "model": max((vae + dit, work["transformer"]), (vae, work["vae"]), key=sum),
        "group": (vae, max(work.values())),
    }


def count_parameters(folder: Path) -> int:
    """Returns the number of parameters in a folder's files. It reads only their headers.

    Raises:
        CheckpointError: there are none, or a file is broken.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors; download the checkpoint again")
    return sum(_parameters_in(file) for file in files)


def _parameters_in(file: Path) -> int:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            tensors = json.loads(opened.read(min(length, MAX_HEADER_BYTES)))
        shapes = [tensor["shape"] for name, tensor in tensors.items() if name != "__metadata__"]
        return sum(map(math.prod, shapes))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is broken; download the checkpoint again: {error}") from error


def _parameters(checkpoint: str, released: Mapping[str, int]) -> tuple[Mapping[str, int], str]:
    """Returns the number of parameters of each component, and their source in words."""
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        return released, AS_RELEASED
    return {name: count_parameters(folder / name) for name in released}, f"in {folder}"


def _small(checkpoint: str) -> WeightsPlan:
    return WeightsPlan(weights_from=f"the checkpoint {checkpoint!r} is small, and its size is not computed")
