"""Copies into and out of a runtime's own layout, as kernels: no node of the program names them, and they take time."""

from __future__ import annotations

from collections.abc import Mapping

from sartor.ir.extents import Extent
from sartor.ir.fusion_layout import layout_changes
from sartor.ir.kernels import Kernel, Tensors
from sartor.ir.program import Program
from sartor.ir.quantities import Quantity

FAMILY = "layout"


def build_layout_kernels(
    program: Program,
    extents: Mapping[str, tuple[Extent, ...]] | None,
    blocks_of: Mapping[str, tuple[str, ...]],
) -> tuple[Kernel, ...]:
    """`ReorderInput` and `ReorderOutput` kernels of ONNX Runtime, each reads and writes one value.

    Where they are is a matter of widths, too: these are those of the program before any pruning. One disappears with
    the block of the node that makes its value.
    """
    tensors = Tensors(program, extents)
    values = {v.name or "": v for node in program.nodes() for v in node.outputs if v.name}
    values |= {v.name or "": v for v in program.graph.inputs}
    kernels = []
    for op_type, names in zip(("ReorderInput", "ReorderOutput"), layout_changes(program), strict=True):
        for name in names:
            moved = tensors[values[name]]
            maker = values[name].producer()
            kernels.append(
                Kernel(
                    name=f"{op_type} {name}",
                    op_type=op_type,
                    family=FAMILY,
                    nodes=(),
                    attributes={},
                    inputs=(moved,),
                    outputs=(moved,),
                    epilogue=(),
                    macs=Quantity(),
                    bytes_read=moved.bytes,
                    bytes_written=moved.bytes,
                    blocks=() if maker is None else blocks_of.get(maker.name or "", ()),
                )
            )
    return tuple(kernels)
