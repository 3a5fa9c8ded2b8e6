"""A simulated H100: torch's compiler generates code for it, and nothing is executed.

`install` makes torch report the device in this process. `tensors` creates tensors on it without contents.
Torch remains patched, so use this only in a separate process.

The CPU build of torch suffices, with triton installed. A CUDA build works too, without a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = torch.device("cuda", 0)
CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=81_559 * 2**20,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2_048,
    max_threads_per_block=1_024,
    warp_size=32,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5_120,
    is_integrated=False,
    is_multi_gpu_board=False,
    gcnArchName="",
    uuid="0",
)
"""Device properties that torch and triton query."""

GUARD_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
"""The symbol of `c10::impl::device_guard_impl_registry`, an array with an entry for each kind of device."""


def install() -> None:
    """Makes torch and triton report the device as present.

    Raises:
        RuntimeError: triton is missing, or this build of torch is not supported.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "Generating code for a GPU needs triton, which is not installed: `pip install triton`."
        )
    _register_device_guard()
    _patch_torch()
    _patch_dynamo()
    _patch_inductor()
    _patch_triton()


def tensors() -> fake_tensor.FakeTensorMode:
    """Returns a context in which new tensors have a shape and a device, but no contents."""
    return fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)


def _register_device_guard() -> None:
    """Registers a device guard for CUDA that does nothing.

    Indexing a tensor in Python, for example, switches to its device. A CPU build cannot switch to CUDA
    devices, so it uses the guard of the meta device.
    """
    torch._C._ensureCUDADeviceGuardSet()  # for a CUDA build without a GPU
    if torch.version.cuda is not None:
        return
    kinds = torch._C._autograd.DeviceType
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * len(kinds.__members__)).in_dll(library, GUARD_REGISTRY)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"The CPU build of torch {torch.__version__} cannot generate code for a GPU ({error}). "
            "Install the CUDA build. It needs no GPU for this."
        ) from error
    guards[kinds.CUDA.value] = guards[kinds.Meta.value]


def _patch_torch() -> None:
    import torch._dynamo  # before patching, because it builds tables of torch's functions

    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": DEVICE.index,
        "get_device_properties": PROPERTIES,
        "get_device_capability": CAPABILITY,
        "get_device_name": PROPERTIES.name,
        "mem_get_info": (PROPERTIES.total_memory, PROPERTIES.total_memory),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "synchronize": None,
        "empty_cache": None,
        "_lazy_init": None,
        "_exchange_device": DEVICE.index,
        "_maybe_exchange_device": DEVICE.index,
    }
    _replace(torch.cuda, **{name: _returns(answer) for name, answer in answers.items()})
    for name in ("Stream", "Event", "CUDAGraph", "graph", "graph_pool_handle", "stream", "current_stream"):
        _replace(torch.cuda, **{name: mock.MagicMock(name=name)})
    _replace(
        torch._C,
        _cuda_getCurrentRawStream=_returns(0),
        _cuda_getDevice=_returns(DEVICE.index),
        _cuda_setDevice=_returns(None),
    )
    _replace(torch.Tensor, pin_memory=lambda self, *_: self)
    _replace(torch.nn.functional, scaled_dot_product_attention=_attention)
    _replace(fake_tensor, init_gpu_context=_returns(None))
    # Torch must not copy the contents of small constants to the device.
    _replace(fake_tensor.FakeTensorMode, avoid_device_init=True)


def _patch_dynamo() -> None:
    from torch._dynamo.device_interface import CudaInterface

    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": DEVICE.index,
        "get_compute_capability": 10 * CAPABILITY[0] + CAPABILITY[1],
        "get_device_properties": PROPERTIES,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    functions = {name: staticmethod(_returns(answer)) for name, answer in answers.items()}
    _replace(CudaInterface, **functions)
    of_worker = ("current_device", "get_device_properties")
    _replace(CudaInterface.Worker, **{name: functions[name] for name in of_worker})


def _patch_inductor() -> None:
    from torch._inductor import scheduler
    from torch._inductor.fx_passes import fuse_attention, joint_graph, pad_mm
    from torch._inductor.runtime import triton_helpers
    from torch.utils import _triton

    _replace(_triton, has_triton=_returns(True), has_triton_stable_tma_api=_returns(True))
    _replace(scheduler, has_triton=_returns(True))
    _replace(triton_helpers, set_driver_to_gpu=_returns(None))
    # Both run examples on the device: one searches for attention patterns, and one times padded products.
    _replace(fuse_attention, _sfdp_init=_returns(None))
    _replace(pad_mm, _pad_mm_init=_returns(None))
    folder = joint_graph.UniformValueConstantFolder
    deduce_value = folder._deduce_value

    def deduce_on_cpu(self: Any, node: Any) -> Any:
        with _OnCPU():  # type: ignore[no-untyped-call]
            return deduce_value(self, node)

    _replace(folder, _deduce_value=deduce_on_cpu)


def _patch_triton() -> None:
    triton: Any = importlib.import_module("triton")
    compiler: Any = importlib.import_module("triton.backends.compiler")
    target = compiler.GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], PROPERTIES.warp_size)
    driver = SimpleNamespace(
        get_current_target=_returns(target),
        get_current_device=_returns(DEVICE.index),
        get_current_stream=_returns(0),
        get_active_torch_device=_returns(DEVICE),
        get_device_interface=_returns(torch.cuda),
        is_active=_returns(True),
    )
    triton.runtime.driver.set_active(driver)


class _OnCPU(TorchDispatchMode):
    """Runs operators on the CPU when the compiler folds constants."""

    def __torch_dispatch__(
        self, operator: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs or {}))
        return operator(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Replaces `scaled_dot_product_attention` with one kernel. Without a GPU, torch would decompose it."""
    if attn_mask is not None or enable_gqa:
        raise NotImplementedError("Attention with a mask or with grouped queries is not supported here.")
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    attended: torch.Tensor = attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return attended


def _replace(owner: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


def _returns(answer: Any) -> Callable[..., Any]:
    """Returns a new function with a constant result. Dynamo would confuse a shared function."""
    return lambda *_, **__: answer
