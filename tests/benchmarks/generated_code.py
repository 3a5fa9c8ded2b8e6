"""Records the code that torch's compiler generates, and lists its launches. Nothing is executed.

A recorder receives every graph that the code under test passes to `torch.compile`, with its options. It also
receives the operators that run outside of these graphs.
"""

from __future__ import annotations

import ast
import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._inductor import compile_fx, config, ir
from torch._inductor.codecache import PyCodeCache
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import HeuristicType
from torch._inductor.scheduler import (
    BaseSchedulerNode,
    ExternKernelSchedulerNode,
    NopKernelSchedulerNode,
)
from torch._inductor.virtualized import V
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import fx

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "_scaled_mm", "convolution")
KINDS = {
    HeuristicType.POINTWISE: "pointwise",
    HeuristicType.REDUCTION: "reduction",
    HeuristicType.PERSISTENT_REDUCTION: "reduction",
    HeuristicType.SPLIT_SCAN: "reduction",
    HeuristicType.TEMPLATE: "template",
}
"""Kinds of Triton kernels. A template is the compiler's kernel for attention or a product."""
LOOKUPS = ("embedding", "index", "index_select", "gather")
"""Operators that read as much of their first argument as they return."""
NOT_LAUNCHED = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "_reshape_alias", "detach", "detach_", "alias", "lift_fresh"),
)
"""Operators that launch nothing, in addition to those that torch declares as views."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        name: name of the kernel or operator.
        kind: `pointwise`, `reduction`, `handwritten`, `attention`, `product` or `operator`. The first three
            are Triton kernels, and attention may be one.
        moved: minimum of bytes that it reads and writes. None if unknown.
        configurations: number of configurations of a Triton kernel. Its first run chooses one by timing. None
            for other kinds.
    """

    name: str
    kind: str
    moved: int | None
    configurations: int | None = None


@dataclass
class Code:
    """Code that runs in a pass: a compiled graph, or all operators outside of the graphs.

    Attributes:
        name: the compiled function or module, or `uncompiled`.
        launches: launches of one call, in order.
        calls: number of calls in the pass.
    """

    name: str
    launches: list[Launch]
    calls: int = 0


class Recorder:
    """Replaces torch's compiler in this process. Until a pass is recorded, graphs run uncompiled.

    Args:
        without: names of compiler options to remove from those that the code passes.
        assembles: whether Triton kernels are compiled to machine code, in all configurations. A failure
            raises Triton's exception.
    """

    def __init__(self, *, without: frozenset[str] = frozenset(), assembles: bool = False) -> None:
        self._without = without
        self._assembles = assembles
        self._pass: _Pass | None = None
        self._compile_original = compile_fx.compile_fx
        setattr(compile_fx, "compile_fx", self._compile)  # noqa: B010 - its type is Inductor's

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Code]]:
        """Records one pass, and compiles its graphs again. Fills the list at the end of the block."""
        codes: list[Code] = []
        torch._dynamo.reset()
        recorded = _Pass()
        with mock.patch.object(self, "_pass", recorded), recorded:
            yield codes
        codes += [*recorded.graphs, Code("uncompiled", recorded.launches, calls=1)]

    def _compile(
        self, module: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any], **_: Any
    ) -> Callable[..., Any]:
        """Records a graph in place of Inductor, and returns a function that runs it uncompiled."""
        recorded = self._pass
        if recorded is None:
            return module.forward
        options = {name: value for name, value in config_patches.items() if name not in self._without}
        launches = self._generate(module, inputs, options)
        code = Code(_name(), launches)
        recorded.graphs.append(code)

        def run(*args: Any) -> Any:
            code.calls += 1
            with recorded.paused():
                return module.forward(*args)

        return run

    def _generate(
        self, module: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]
    ) -> list[Launch]:
        """Compiles a graph up to the point where the generated code would be loaded."""
        launches: list[Launch] = []

        def stop(graph: GraphLowering) -> None:
            code: Any = graph.codegen()[0]
            launches.extend(_describe(code.value, graph.scheduler.nodes, assembles=self._assembles))
            raise _Generated

        with (
            mock.patch.object(compile_fx, "compile_fx", self._compile_original),  # `compile_fx` is recursive
            mock.patch.object(GraphLowering, "compile_to_module", stop),
            config.patch(compile_threads=1),
            contextlib.suppress(_Generated),
        ):
            self._compile_original(module, inputs, config_patches=options)
        return launches


def _name() -> str:
    """Returns the name of the function that is being compiled."""
    return InstructionTranslator.current_tx().f_code.co_qualname.removesuffix(".forward")


class _Generated(BaseException):
    """Raised to leave the compiler after code generation. The compiler itself catches `Exception`."""


def _describe(source: str, nodes: Iterable[BaseSchedulerNode], *, assembles: bool) -> list[Launch]:
    """Lists the launches of generated code.

    Args:
        source: source of the generated module.
        nodes: nodes of the scheduler. Each becomes one launch, in this order.
        assembles: whether the kernels are compiled to machine code.
    """
    reader = _Reader()
    reader.visit(ast.parse(source))
    launching = [node for node in nodes if _is_launched(node)]
    if len(launching) != len(reader.launches):
        raise RuntimeError(f"{len(launching)} nodes of the scheduler became the launches {reader.launches}.")
    kernels = {name: getattr(PyCodeCache.load(kernel), name) for name, kernel in reader.kernels.items()}
    for kernel in kernels.values() if assembles else ():
        for configuration in kernel.configs:
            kernel._precompile_config(configuration)
    launches = []
    for name, node in zip(reader.launches, launching, strict=True):
        if kernel := kernels.get(name):
            launches.append(Launch(name, _kind_of_kernel(name, kernel), _moved(node), len(kernel.configs)))
        else:
            launches.append(Launch(name, _kind(name), _moved(node)))
    return launches


class _Reader(ast.NodeVisitor):
    """Reads a generated module.

    Attributes:
        kernels: source of each Triton kernel, by name.
        launches: names of launched kernels and operators, in order.
    """

    def __init__(self) -> None:
        self.kernels: dict[str, str] = {}
        self.launches: list[str] = []

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        kernel = called.removesuffix(".run")
        if called == "async_compile.triton":
            name, source = (
                argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)
            )
            self.kernels[str(name)] = str(source)
        elif kernel in self.kernels:
            self.launches.append(kernel)
        elif called.startswith(("extern_kernels.", "torch.ops.")):
            self.launches.append(called)
        elif called.endswith(".copy_"):  # between the host and the device
            self.launches.append("copy_")
        self.generic_visit(node)


def _kind(name: str) -> str:
    """Returns the kind for a name, such as `extern_kernels.mm` or `torch.ops.aten.add.Tensor`."""
    if "attention" in name:
        return "attention"
    return "product" if any(part in PRODUCTS for part in name.split(".")) else "operator"


def _kind_of_kernel(name: str, kernel: Any) -> str:
    kind = KINDS.get(kernel.heuristic_type, "handwritten")
    if kind == "template":
        return "attention" if "attention" in name else "product"
    return kind


def _is_launched(node: BaseSchedulerNode) -> bool:
    # An operator with several results has a node, and each result has one too.
    return not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, ir.MultiOutput)


def _moved(node: BaseSchedulerNode) -> int | None:
    """Counts the minimum of bytes that a node reads and writes: every element once.

    Returns None for attention over a cache, which skips parts of it, and for handwritten kernels.
    """
    if node.is_template() or isinstance(node.node, ir.UserDefinedTritonKernel):
        return None
    if isinstance(node, ExternKernelSchedulerNode):
        return _moved_by_operator(node.node)
    moved = 0
    for accesses in (node.read_writes.reads, node.read_writes.writes):
        by_buffer: dict[str, int] = {}
        for access in accesses:
            # Other kinds of dependencies only order kernels.
            if isinstance(access, MemoryDep) and access.name not in V.graph.removed_buffers:
                by_buffer[access.name] = by_buffer.get(access.name, 0) + _accessed(access)
        # Parts of a buffer may overlap.
        moved += sum(min(count, _whole(name)) for name, count in by_buffer.items())
    return moved


def _moved_by_operator(operator: Any) -> int:
    results = operator.outputs if isinstance(operator, ir.FallbackKernel) else [operator]
    tensors = [value for value in (*operator.inputs, *results) if isinstance(value, ir.IRNode)]
    return sum(_size(tensor.get_size(), tensor.get_dtype()) for tensor in tensors)


def _accessed(access: MemoryDep) -> int:
    """Counts the bytes of an access. If the position depends on data, every index counts."""
    used = access.index.free_symbols
    sizes = [
        size
        for variable, size in zip(access.var_names, access.size, strict=True)
        if access.is_indirect() or variable in used
    ]
    return _size(sizes, V.graph.get_dtype(access.name))


def _whole(buffer: str) -> int:
    # A buffer has another name after a kernel has modified it.
    found = V.graph.try_get_buffer(V.graph.scheduler.mutation_real_name.get(buffer, buffer))
    return 0 if found is None else _size(found.get_size(), found.get_dtype())


def _size(shape: Iterable[Any], dtype: torch.dtype) -> int:
    """Counts the bytes of a tensor. Dynamic lengths have their values of the recorded pass."""
    return math.prod(V.graph.sizevars.optimization_hint(length) for length in shape) * dtype.itemsize


class _Pass(TorchDispatchMode):
    """A pass that is being recorded.

    Attributes:
        graphs: graphs that the pass compiled.
        launches: operators on the device outside of the graphs.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graphs: list[Code] = []
        self.launches: list[Launch] = []
        self._is_paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(
        self, operator: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        results = operator(*args, **kwargs)
        if self._is_paused:
            return results
        name = operator.overloadpacket.__name__
        inputs, outputs = _on_device((args, kwargs)), _on_device(results)
        if outputs and not operator.is_view and name not in NOT_LAUNCHED:
            if name in LOOKUPS:
                inputs = [*inputs[1:], *outputs]
            moved = sum(_distinct_bytes(tensor) for tensor in (*inputs, *outputs))
            self.launches.append(Launch(str(operator), _kind(str(operator)), moved))
        return results


def _on_device(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.is_cuda]


def _distinct_bytes(tensor: torch.Tensor) -> int:
    """Counts the bytes of a tensor. The same element repeated along an expanded dimension counts once."""
    lengths = [length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(lengths) * tensor.element_size()
