"""From the kernels that a runtime executed inside a model to samples: which kernel of ours each of them is."""

from __future__ import annotations

import dataclasses
import glob
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends.protocol import KernelTime
from sartor.cost_models.samples import kernels_of, sample_model
from sartor.cost_models.signatures import Signature, signature_of
from sartor.cost_models.work import item_bytes
from sartor.ir.extents import Extent
from sartor.ir.fusion_rules import FusionRules
from sartor.ir.layout import COPIES, copy_kernel
from sartor.ir.operands import Operand
from sartor.profiling.design import Point
from sartor.profiling.fusion_check import NAMELESS_PARTS, Executed

if TYPE_CHECKING:
    from sartor.ir.program import Program
    from sartor.ir.workload import Workload


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
    """One kernel that was executed inside a model.

    Attributes:
        signature: what it is.
        sizes: of its variables.
        ratio: its time in units of the reference, the profiler's own part included.
        rows: executed kernels that it took, more than one where the runtime lacks the operator.
    """

    signature: Signature
    sizes: tuple[float, ...]
    ratio: float
    rows: int


@dataclasses.dataclass(frozen=True, eq=False)
class Described:
    """A generated network as the cost models see it, and what was executed of it.

    Attributes:
        kernels: `(signature, sizes, how often)`, equal ones merged; copies between layouts that are expected, too.
        observed: kernels that ran as they are, and copies.
        rows: executed kernels in all, those that only change a shape excepted.
        ratio: of these together.
    """

    kernels: Sequence[tuple[Signature, tuple[float, ...], int]]
    observed: tuple[Observed, ...]
    rows: int
    ratio: float


def describe(
    model: bytes, executed: Sequence[KernelTime], rules: FusionRules, keep: Sequence[str] = ()
) -> Described:
    """What a model consists of, and what of it was executed.

    Args:
        model: serialized ONNX.
        executed: all kernels, their times in units of the reference.
        rules: what the target runs as one kernel.
        keep: names of parameters that no plan narrows, beside those that none can.
    """
    program, workload = workload_of(model, rules, keep)
    found = Executed.of(program, executed)
    observed = []
    for kernel in workload.kernels:
        rows = found.kernels.get(found.nodes_of(kernel), ())
        signature = signature_of(kernel)
        if rows and signature is not None:
            sizes = tuple(float(v.full) for v in signature.variables)
            observed.append(Observed(signature, sizes, sum(r.median_s for r in rows), len(rows)))
    kernels, _ = kernels_of(workload, layout=True)
    count, total = whole(executed)
    return Described(
        kernels=kernels,
        observed=(*observed, *copies_of(found.inserted)),
        rows=count,
        ratio=total,
    )


def workload_of(model: bytes, rules: FusionRules, keep: Sequence[str] = ()) -> tuple[Program, Workload]:
    """A serialized ONNX model, and the kernels that a target with these rules makes of it."""
    from sartor.ir.channels import channel_groups
    from sartor.ir.load import load
    from sartor.ir.workload import build_workload

    with tempfile.TemporaryDirectory(prefix="sartor-network-") as folder:
        path = Path(folder) / "network.onnx"
        path.write_bytes(model)
        program = load(path)
    known = [glob.escape(name) for name in keep if name in program.initializers]
    return program, build_workload(program, channel_groups(program, known).extents, rules=rules)


def whole(executed: Sequence[KernelTime]) -> tuple[int, float]:
    """How many kernels were executed, and their time together.

    A Reshape moves nothing: nearly all of what is told of it is the profiler's own time (5 us, really 0.5).
    """
    moving = [kernel.median_s for kernel in executed if kernel.op_type != "Reshape"]
    return len(moving), sum(moving)


def copies_of(inserted: Sequence[KernelTime]) -> list[Observed]:
    """Copies between layouts, of which the shape is known."""
    found = []
    for kernel in inserted:
        if kernel.op_type in COPIES and len(kernel.written) > 1:
            dims = tuple(map(Extent.constant, kernel.written))
            copy = copy_kernel(kernel.op_type, Operand("", dims, item_bytes("FLOAT"), "FLOAT"))
            signature = signature_of(copy)
            assert signature is not None
            sizes = tuple(v.full for v in signature.variables)
            found.append(Observed(signature, sizes, kernel.median_s, 1))
    return found


class UnmadeError(Exception):
    """No model can be made of a kernel. Caught where carriers are made: the kernel is then a failure by itself."""


# ---- carriers ------------------------------------------------------------------------------------
def carrier_model(points: Sequence[Point]) -> bytes:
    """One model in which these kernels stand side by side.

    As inside a network, what a kernel reads has just been made, and the memory that it writes to has just been used:
    its inputs are expanded from one number right before it, and of its outputs only the largest element is kept.

    Raises:
        UnmadeError: no model can be made of one of them.
    """
    import onnx
    from onnx import compose

    merged: Any = None
    for number, point in enumerate(points):
        try:
            model = onnx.load_from_string(sample_model(point.spec, point.at))
        except Exception as error:
            raise UnmadeError(f"no sample model: {type(error).__name__}: {str(error)[:200]}") from error
        _between_neighbours(compose.add_prefix_graph(model.graph, f"k{number}/", inplace=True), number)
        if merged is None:
            merged = model
            continue
        for field in ("node", "input", "output", "initializer", "value_info"):
            getattr(merged.graph, field).extend(getattr(model.graph, field))
    return bytes(merged.SerializeToString(deterministic=True))


def alike_among(points: Sequence[Point]) -> Counter[tuple[str, str]]:
    """How many kernels of each family and operator one carrier has: `Sample.alike` of its samples."""
    return Counter((point.family, point.spec["op"]) for point in points)


def _between_neighbours(graph: Any, number: int) -> None:
    """Put a producer in front of a kernel and a consumer behind it, named `before…` and `behind…`."""
    from onnx import TensorProto, helper

    inputs, outputs = list(graph.input), list(graph.output)
    made, kept = [], []
    for index, value in enumerate(inputs):
        kind = value.type.tensor_type
        if kind.elem_type != TensorProto.FLOAT:
            kept.append(value)
            continue
        dims, name = [d.dim_value for d in kind.shape.dim], f"before{number}/{index}"
        graph.initializer.append(helper.make_tensor(f"{name}/shape", TensorProto.INT64, [len(dims)], dims))
        # A number of its own: of equal expansions of one number, runtimes make one.
        kept.append(helper.make_tensor_value_info(f"{name}/number", TensorProto.FLOAT, [1]))
        made.append(helper.make_node("Expand", [f"{name}/number", f"{name}/shape"], [value.name], name=name))
    read, after = [], []
    for index, value in enumerate(outputs):
        # A Transpose is merged into what is behind it.
        if value.type.tensor_type.elem_type != TensorProto.FLOAT or graph.node[-1].op_type == "Transpose":
            read.append(value)
            continue
        name = f"behind{number}/{index}"
        after.append(helper.make_node("ReduceMax", [value.name], [f"{name}/most"], name=name, keepdims=0))
        read.append(helper.make_tensor_value_info(f"{name}/most", TensorProto.FLOAT, []))
    nodes = [*made, *graph.node, *after]
    for field, values in (("node", nodes), ("input", kept), ("output", read)):
        del getattr(graph, field)[:]
        getattr(graph, field).extend(values)


def of_carrier(points: Sequence[Point], executed: Sequence[KernelTime]) -> list[tuple[float, int] | None]:
    """`(time, executed kernels)` per point; None where the runtime does not say."""
    found: dict[int, tuple[float, int]] = {}
    last = -1
    for kernel in executed:
        owners = {node.partition("/")[0] for node in kernel.nodes}
        part = not owners and kernel.op_type in NAMELESS_PARTS
        if not part:
            owner = owners.pop() if len(owners) == 1 else ""
            last = int(owner[1:]) if owner[:1] == "k" else -1
        if last >= 0:
            number = last
            time, rows = found.get(number, (0.0, 0))
            found[number] = (time + kernel.median_s, rows + 1)
    return [found.get(number) for number in range(len(points))]
