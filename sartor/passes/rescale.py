"""`rescale`: another input size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from sartor.errors import PlanError
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.prune import rewrite
from sartor.passes.resolution import resize_inputs
from sartor.passes.rewriter import Rewriter

_GRIDS, _OFF = (32, 16, 8, 4, 2), 0.05


@dataclasses.dataclass(frozen=True)
class Rescale(Pass):
    """Give the network another input size.

    Becomes: the same layers on smaller or larger maps. Shapes, crops, sizes of Resize and pools over the whole map
    follow; tables of positions (position embeddings) are interpolated, class tokens stay.

    Ensures: the program that capturing the model at the new size gives, where the model has no tables of positions.

    Refuses when: weights fix the size (a Linear behind a flattened map), positions are picked by number, windows do
    not fit the new map, or an operator has no rule.
    """

    name: ClassVar[str] = "rescale"
    semantics: ClassVar[Semantics] = Semantics.NEEDS_TRAINING
    resizes_inputs: ClassVar[bool] = True

    resolution: float = option(
        1.0, help="new over old height and width of images; see `grid`", minimum=0.01, maximum=16.0
    )
    grid: int = option(
        0,
        help="round heights and widths to multiples of this; 0: the largest of 32 to 1 that is 5 % off at most",
        minimum=0,
    )

    def plan(self, program: Program, context: Context) -> Any:
        """The new shape of every image input, tried out. See `Pass.plan`."""
        sizes = {
            value.name or "": shape
            for value in program.graph.inputs
            if (shape := self._size(program, value)) != program.input_shapes[value.name or ""]
        }
        if not sizes:
            return None
        plan = Plan(program.source.sha256, sizes=sizes, notes={"pass": str(self)})
        clone = program.clone()
        try:
            resize_inputs(clone, sizes, Rewriter(clone, self.name))
        except PlanError as error:
            return Planned(None, (Refusal(next(iter(sizes)), str(error)),))
        return plan

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Resize mechanically. See `Pass.apply`."""
        rewrite(program, plan, rewriter)

    def _size(self, program: Program, value: ir.Value) -> tuple[int, ...]:
        shape = list(program.input_shapes[value.name or ""])
        for axis in spatial_axes(program, value):
            shape[axis] = self._rounded(shape[axis])
        return tuple(shape)

    def _rounded(self, length: int) -> int:
        wanted = length * self.resolution
        grids = (self.grid,) if self.grid else tuple(g for g in _GRIDS if length % g == 0)
        for grid in grids:
            found = max(round(wanted / grid), 1) * grid
            if self.grid or abs(found / wanted - 1) <= _OFF:
                return found
        return max(round(wanted), 1)


def spatial_axes(program: Program, value: ir.Value) -> Sequence[int]:
    """Height and width (and depth) of an image input: behind batch and channels, or between them.

    Between them where its first readers move the last axis to the front, as files of TensorFlow do.
    """
    shape = program.input_shapes[value.name or ""]
    if len(shape) < 4:
        return ()
    last = (0, len(shape) - 1, *range(1, len(shape) - 1))
    readers = [node for node, _ in value.uses()]
    if readers and all(
        node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == last for node in readers
    ):
        return range(1, len(shape) - 1)
    return range(2, len(shape))
