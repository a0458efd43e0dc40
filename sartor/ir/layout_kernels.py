"""Copies into and out of a runtime's own layout, as kernels: no node of the program names them, and they take time."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from sartor.ir.extents import Extent
from sartor.ir.fusion_layout import layout_changes
from sartor.ir.kernels import Kernel, Operand, Tensors
from sartor.ir.program import Program
from sartor.ir.quantities import Quantity

FAMILY = "layout"
COPIES = ("ReorderInput", "ReorderOutput", "Reorder", "Reshape")
"""What runtimes put between kernels; a Reshape moves nothing and is a kernel all the same."""
_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})


def build_layout_kernels(
    program: Program,
    extents: Mapping[str, tuple[Extent, ...]] | None,
    blocks_of: Mapping[str, tuple[str, ...]],
) -> tuple[Kernel, ...]:
    """`ReorderInput` and `ReorderOutput` kernels of ONNX Runtime, each reads and writes one value.

    Where they are is a matter of widths, too: these are those of the program before any pruning. One disappears with
    the block of the node that makes its value. A Reshape is a kernel of its own there, one that moves nothing; a MatMul
    with a bias on more than two axes is computed as a Gemm between two of them.
    """
    tensors = Tensors(program, extents)
    values = {v.name or "": v for node in program.nodes() for v in node.outputs if v.name}
    values |= {v.name or "": v for v in program.graph.inputs}
    kernels = [
        _kernel("Reshape", node.name or "", None, blocks_of.get(node.name or "", ()))
        for node in program.nodes()
        for _ in range(_reshapes(node, program))
    ]
    for op_type, names in zip(("ReorderInput", "ReorderOutput"), layout_changes(program), strict=True):
        for name in names:
            moved = tensors[values[name]]
            maker = values[name].producer()
            of_maker = () if maker is None else blocks_of.get(maker.name or "", ())
            kernels.append(_kernel(op_type, name, moved, of_maker))
    return tuple(kernels)


def _reshapes(node: ir.Node, program: Program) -> int:
    """How many Reshape kernels the runtime has for a node."""
    if node.op_type in _RESHAPES:
        source = node.inputs[0]
        return int(source is not None and not source.is_initializer())
    if node.op_type != "MatMul" or node.inputs[1] is None or not node.inputs[1].is_initializer():
        return 0
    users = [use.node for use in node.outputs[0].uses()]
    biased = (
        len(users) == 1
        and users[0].op_type == "Add"
        and any(v is not None and v.is_initializer() for v in users[0].inputs)
    )
    return 2 if biased and len(program.shapes()[node.inputs[0].name or ""]) > 2 else 0


def _kernel(op_type: str, name: str, moved: Operand | None, blocks: tuple[str, ...]) -> Kernel:
    size = Quantity() if moved is None else moved.bytes
    operands = () if moved is None else (moved,)
    return Kernel(
        name=f"{op_type} {name}",
        op_type=op_type,
        family=FAMILY,
        nodes=(),
        attributes={},
        inputs=operands,
        outputs=operands,
        epilogue=(),
        macs=Quantity(),
        bytes_read=size,
        bytes_written=size,
        blocks=blocks,
    )
