"""Rates of the models' operators at the released shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, scaled_dot_product_attention

from tests.gpu import measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.rows import Run

ROWS = 8
PRIOR_PRODUCTS = {
    "query and output": (4096, 4096),
    "key and value": (256, 4096),
    "query, key and value": (4608, 4096),
    "gate and up": (27_392, 4096),
    "down": (4096, 13_696),
    "head": (16_512, 4096),
}
"""Output and input features of the prior's products."""
BEYOND_CACHE = 600 * 2**20
"""Bytes of weights that are multiplied in turn: more than a GPU's cache holds."""
DIT_TOKENS = (1025, 4096, 4097, 4224, 8194)
"""Tokens of 512×512 and 1024×1024 with one text token, values near the latter, and a batch of two."""
DIT_PRODUCTS = ((4096, 4096), (16_384, 4096), (4096, 16_384))
ATTENTION_TOKENS = (1025, 4097, 16_385)
FP8_PRODUCTS = ((8, 27_392, 4096), (16, 27_392, 4096), (4096, 16_384, 4096), (4096, 4096, 16_384))


def ceilings(run: Run) -> None:
    """Writes the rates of products, attention, GELU within a product, and 8-bit products."""
    device = measure.prepare(run)
    with torch.inference_mode():
        for name, features in PRIOR_PRODUCTS.items():
            skinny_product(run, device, name, *_shape(run, features))
        for tokens in DIT_TOKENS:
            for features in DIT_PRODUCTS:
                large_product(run, device, *_shape(run, (tokens, *features)))
        for tokens in ATTENTION_TOKENS:
            attention(run, device, *_shape(run, (tokens,)))
        for place in ("after", "inside"):
            product_with_gelu(run, device, place, *_shape(run, (4097, 16_384, 4096)))
        if not run.needs_gpu("8-bit product"):
            for shape in FP8_PRODUCTS:
                for scale in ("a row", "a tensor"):
                    fp8_product(run, device, scale, *shape)


def _shape(run: Run, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a shape, reduced in tiny runs."""
    return tuple(max(16, size // 64) for size in shape) if run.tiny else shape


def _random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def skinny_product(run: Run, device: torch.device, name: str, outputs: int, inputs: int) -> None:
    """Writes the rate at which a product of eight rows reads weights that are not in the GPU's cache."""
    with run.figure("product of eight rows", of=name, outputs=outputs, inputs=inputs) as values:
        count = run.count(min(64, max(2, BEYOND_CACHE // (2 * outputs * inputs))), 2)
        weights = [_random(device, outputs, inputs) for _ in range(count)]
        rows, bias = _random(device, ROWS, inputs), _random(device, outputs)

        def products() -> None:
            for weight in weights:
                torch.addmm(bias, rows, weight.t())

        ms = measure.milliseconds(_captured(products, device), device) / count
        values |= {"us": 1e3 * ms, "tb_s": 2 * outputs * inputs / ms / 1e9}


def _captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Returns a call as a CUDA graph, to exclude the host's launches. On a CPU, returns the call."""
    call()
    if device.type != "cuda":
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def large_product(run: Run, device: torch.device, tokens: int, outputs: int, inputs: int) -> None:
    """Writes the rate of a product of the DiT."""
    with run.figure("product", tokens=tokens, outputs=outputs, inputs=inputs) as values:
        rows, weight = _random(device, tokens, inputs), _random(device, outputs, inputs)
        bias = _random(device, outputs)
        ms = measure.milliseconds(lambda: torch.addmm(bias, rows, weight.t()), device)
        values |= {"ms": ms, "tflops": 2 * tokens * outputs * inputs / ms / 1e9}


def product_with_gelu(
    run: Run, device: torch.device, place: str, tokens: int, outputs: int, inputs: int
) -> None:
    """Writes the time and the error of a product with GELU after it or inside."""
    with run.figure("product with GELU", place=place, tokens=tokens) as values:
        rows, weight = _random(device, tokens, inputs), _random(device, outputs, inputs) / inputs**0.5
        bias = _random(device, outputs)

        def product() -> torch.Tensor:
            if place == "inside":
                fused: torch.Tensor = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)
                return fused
            return gelu(torch.addmm(bias, rows, weight.t()), approximate="tanh")

        values["ms"] = measure.milliseconds(product, device)
        some = slice(None, 256)
        exact = torch.addmm(bias[some].double(), rows[some].double(), weight[some].double().t())
        exact = gelu(exact, approximate="tanh")
        values["relative_error"] = ((product()[some, some] - exact).norm() / exact.norm()).item()


def attention(run: Run, device: torch.device, tokens: int) -> None:
    """Writes the rate of attention with PyTorch's default and with each fused backend."""
    heads, channels = run.count(32, 2), run.count(128, 16)
    query, key, value = (_random(device, 1, tokens, heads, channels).transpose(1, 2) for _ in range(3))

    def attend() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value)

    backends: dict[str, SDPBackend | None] = {"default": None}
    if run.on_gpu:
        backends |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    else:
        backends |= {"math": SDPBackend.MATH}
    for name, backend in backends.items():
        with run.figure("attention", tokens=tokens, backend=name) as values:
            if backend is None:
                ms = measure.milliseconds(attend, device)
            else:
                with sdpa_kernel(backend):
                    ms = measure.milliseconds(attend, device)
            values |= {"ms": ms, "tflops": 4 * tokens**2 * heads * channels / ms / 1e9}


def fp8_product(run: Run, device: torch.device, scale: str, tokens: int, outputs: int, inputs: int) -> None:
    """Writes the rate of an 8-bit product with one scale per row or per tensor."""
    with run.figure("8-bit product", scale=scale, tokens=tokens, outputs=outputs, inputs=inputs) as values:
        rows = _random(device, tokens, inputs).to(torch.float8_e4m3fn)
        weight = _random(device, outputs, inputs).to(torch.float8_e4m3fn)
        of_rows, of_weight = ((tokens, 1), (1, outputs)) if scale == "a row" else ((), ())
        scale_a, scale_b = (torch.ones(shape, device=device) for shape in (of_rows, of_weight))

        def product() -> torch.Tensor:
            return torch._scaled_mm(
                rows, weight.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        ms = measure.milliseconds(product, device)
        values |= {
            "ms": ms,
            "tflops": 2 * tokens * outputs * inputs / ms / 1e9,
            "weights_tb_s": outputs * inputs / ms / 1e9,
        }
