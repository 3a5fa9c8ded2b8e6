"""Counts the kernels that torch's compiler generates for the released model on an H100. No GPU is needed.

    python -m tests.benchmarks.kernels [--part NAME] [--without OPTION] [--launches] [--assemble] [--json]

Counts the launches and the bytes of both stages' passes, as an estimate until a GPU measures them. The
stages' own code runs on tensors without contents, with its own compiler options. Generated code is read but
not executed. `make benchmark` runs this.

A pass of the DiT is the first of a step and of a unit, so it includes work that later passes reuse.
"Uncompiled" lists operators outside of the compiled code, one launch each.

Bytes are the minimum that a kernel must read and write: every element once. They are not counted for
attention over the cache, where they depend on the requests' lengths.

If a kernel has several configurations, its first run chooses one by timing. Configurations of a sum add in
different orders, so replicas could round differently. Sums must therefore have one configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from diffusers import GlmImageTransformer2DModel
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch._subclasses import fake_impls
from transformers import ByT5Tokenizer

from deployments.engines import acceleration, compilation
from deployments.families.glm_image.cuda_graphs import CUDAGraphs
from deployments.families.glm_image.language_model_gpu import GPULanguageModel
from deployments.families.glm_image.pipeline import DecoderPipeline
from tests.benchmarks import fake_cuda
from tests.benchmarks.generated_code import Code, Launch, Recorder
from tests.gpu import models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deployments.config import Speculation

    Pass = Callable[[], object]

ROWS = 8
MAX_SEQUENCE_LENGTH = 24_576
SIDE = 1024
"""Side of the image and of the source image, in pixels."""
LATENT_SIDE = SIDE // 8
QUOTED_TOKENS = 32
"""Number of glyph tokens of a text in quotation marks."""


@contextmanager
def without_weights() -> Iterator[None]:
    """Skips filling models with random weights within the block."""

    def ready(model: torch.nn.Module, _: torch.device) -> torch.nn.Module:
        return model.eval().requires_grad_(requires_grad=False)

    with mock.patch.object(models, "_ready", ready):
        yield


@cache
def prior(speculation: Speculation = "auto") -> GPULanguageModel:
    """Returns the prior's language model. Its passes run directly instead of in a CUDA graph."""
    with without_weights():
        model, _ = models.prior(fake_cuda.DEVICE, vision_layers=1)
    # transformers' `generate` reads whether its attention mask is all ones, which it is.
    ones = {torch.ops.aten._local_scalar_dense.default: lambda *_, **__: 1}
    with (
        mock.patch.object(CUDAGraphs, "capture", lambda _, run: run),
        mock.patch.dict(fake_impls.op_implementations_dict, ones),
    ):
        return GPULanguageModel(
            model, rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH, speculation=speculation
        )


@cache
def decoder() -> DecoderPipeline:
    with without_weights():
        dit, vae = models.dit(fake_cuda.DEVICE), models.vae(fake_cuda.DEVICE)
    pipeline = DecoderPipeline(ByT5Tokenizer(), None, None, None, vae, dit, None)
    acceleration.compile_parts(pipeline, fake_cuda.DEVICE)
    return pipeline


def upstream_dit(*, compiled: bool) -> GlmImageTransformer2DModel:
    with without_weights(), mock.patch.object(models, "Transformer", GlmImageTransformer2DModel):
        dit = models.dit(fake_cuda.DEVICE)
    if compiled:
        dit.compile_repeated_blocks(fullgraph=True)
    return dit


def dit_pass(dit: GlmImageTransformer2DModel, *, text: int = 1, mode: str | None = None) -> Pass:
    """Returns a pass of the DiT over one image.

    Args:
        dit: our DiT or upstream's.
        text: number of glyph tokens. A prompt without text in quotation marks has one.
        mode: `write` for the pass over a source image, `read` for a pass that attends to it.
    """
    config = dit.config
    tokens = (LATENT_SIDE // config.patch_size) ** 2
    tensor = partial(torch.empty, dtype=dit.dtype, device=dit.device)
    caches = None
    if mode:
        caches = GlmImageKVCache(config.num_layers)
        caches.set_mode(mode)
    if caches and mode == "read":
        for cache_of_layer in caches.caches:
            cache_of_layer.store(*tensor(2, 1, tokens, config.num_attention_heads, config.attention_head_dim))
    arguments: dict[str, Any] = {
        "hidden_states": tensor(1, config.in_channels, LATENT_SIDE, LATENT_SIDE),
        "encoder_hidden_states": tensor(1, text, config.text_embed_dim),
        "prior_token_id": tensor(1, tokens, dtype=torch.long),
        "prior_token_drop": tensor(0, dtype=torch.long),
        "timestep": tensor(1, dtype=torch.float32),
        "target_size": tensor(1, 2),
        "crop_coords": tensor(1, 2),
        "kv_caches": caches,
    }
    return lambda: dit(**arguments, return_dict=False)


def vae_pass() -> Pass:
    vae = decoder().vae
    shape = (1, vae.config.latent_channels, LATENT_SIDE, LATENT_SIDE)
    latents = torch.empty(shape, dtype=vae.dtype, device=vae.device)
    return lambda: vae.decode(latents, return_dict=False)


PARTS: dict[str, Callable[[], Pass]] = {
    "prior-prefill": lambda: prior().run_slice,
    "prior-decode": lambda: prior().run_decoding,
    "prior-decode-one": lambda: prior("off").run_decoding,
    "dit-image": lambda: dit_pass(decoder().transformer),
    "dit-text": lambda: dit_pass(decoder().transformer, text=QUOTED_TOKENS),
    "dit-source": lambda: dit_pass(decoder().transformer, mode="write"),
    "dit-edit": lambda: dit_pass(decoder().transformer, mode="read"),
    "vae": vae_pass,
    "upstream-dit": lambda: dit_pass(upstream_dit(compiled=False)),
    "upstream-dit-compiled": lambda: dit_pass(upstream_dit(compiled=True)),
}
"""Functions that create the pass of each part."""


def record(part: str, recorder: Recorder) -> list[Code]:
    run = PARTS[part]()
    with torch.inference_mode(), recorder.recording() as codes:
        run()
    return codes


HEADER = (
    f"{'part':22} {'code':25}{'calls':>6}{'Triton':>8}{'attention':>10}{'products':>9}{'others':>7}"
    f"{'MB Triton':>11}{'MB others':>11}{'configurations':>16}"
)


def show(part: str, name: str, calls: int, launches: list[Launch]) -> None:
    """Prints a line of the table."""
    counts, moved = Counter[str](), Counter[bool]()
    for launch in launches:
        counts[launch.kind if launch.kind in ("attention", "product", "operator") else "triton"] += 1
        moved[launch.configurations is not None] += launch.moved or 0
    sums = max((one.configurations or 0 for one in launches if one.kind != "pointwise"), default=0)
    pointwise = max((one.configurations or 0 for one in launches if one.kind == "pointwise"), default=0)
    configurations = ", ".join(
        f"{name} {most}" for name, most in (("sums", sums), ("pointwise", pointwise)) if most
    )
    print(
        f"{part:22} {name:25}{calls:6}{counts['triton']:8}{counts['attention']:10}{counts['product']:9}"
        f"{counts['operator']:7}{moved[True] / 1e6:11.2f}{moved[False] / 1e6:11.2f}  {configurations}"
    )


def describe(part: str, codes: list[Code], *, lists_launches: bool) -> None:
    """Prints a line for each code, and one for the whole pass."""
    whole: list[Launch] = []
    for code in codes:
        whole += code.launches * code.calls
        show(part, code.name, code.calls, code.launches)
        for launch in code.launches if lists_launches else ():
            moved = "" if launch.moved is None else f"{launch.moved / 1e6:.2f} MB"
            print(f"    {launch.kind:11} {moved:>11} {launch.configurations or '':>2} {launch.name}")
    show(part, "whole pass", 1, whole)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="part to record; may be repeated (default: all)"
    )
    parser.add_argument("--without", action="append", default=[], help="compiler option to leave out")
    parser.add_argument("--launches", action="store_true", help="list every launch")
    parser.add_argument("--assemble", action="store_true", help="compile the Triton kernels to machine code")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each code")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fake_cuda.tensors():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = folder
        try:
            fake_cuda.install()
        except RuntimeError as error:
            parser.error(str(error))
        compilation.prepare(folder)
        recorder = Recorder(without=frozenset(options.without), assembles=options.assemble)
        if not options.json:
            print(f"{fake_cuda.PROPERTIES.name}, torch {torch.__version__}\n{HEADER}")
        for part in options.part or PARTS:
            codes = record(part, recorder)
            if options.json:
                for code in codes:
                    print(json.dumps({"part": part} | asdict(code)), flush=True)
            else:
                describe(part, codes, lists_launches=options.launches)


if __name__ == "__main__":
    main()
