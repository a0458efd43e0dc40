"""Copies into and out of a runtime's own layout: kernels that no node of the program names.

Which values are copied is a matter of widths: a plan that leaves the channel grid makes copies necessary, and one that
comes back to it saves them. They are therefore found for every population of plans anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from sartor.ir.extents import Extent
from sartor.ir.fusion_layout import Step, copied, steps_of
from sartor.ir.operands import Operand, Tensors, channels_per_group
from sartor.ir.population import Population, Presence
from sartor.ir.program import Program
from sartor.ir.quantities import Quantity

FAMILY = "layout"
COPIES = ("ReorderInput", "ReorderOutput", "Reorder")
"""What runtimes put between kernels."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """One value that is copied under some plans.

    Attributes:
        op_type: `ReorderInput` or `ReorderOutput`.
        value: its name.
        dims: its shape, `*` for the channels.
        moved: bytes read and written.
        count: 1.0 where the copy exists, else 0.0.
    """

    op_type: str
    value: str
    dims: tuple[int | str, ...]
    moved: Quantity
    count: Any


@dataclasses.dataclass(frozen=True)
class Moved:
    """A value that may be copied.

    Attributes:
        operand: the value.
        blocks: removable blocks that contain the node which makes it.
    """

    operand: Operand
    blocks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """What decides about copies. Empty for runtimes without a layout of their own.

    Attributes:
        steps: nodes, in execution order.
        values: by name.
        groups: per convolution, by the name of its output: its groups, and input and output channels of one.
        outputs: names of the program's outputs.
    """

    steps: tuple[Step, ...] = ()
    values: Mapping[str, Moved] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, tuple[Extent, Extent, Extent]] = dataclasses.field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    @property
    def varying(self) -> frozenset[str]:
        """Names of the channel groups that copies depend on."""
        extents = [e for moved in self.values.values() for e in moved.operand.dims]
        extents += [e for three in self.groups.values() for e in three]
        return frozenset(name for extent in extents for name in extent.groups)

    @functools.cached_property
    def usual(self) -> Counter[str]:
        """How many copies of each operator the whole network needs."""
        found: Counter[str] = Counter()
        for copy in self.copies(Population({}, {})):
            found[copy.op_type] += round(float(copy.count))
        return found

    def at(self, size: int, batch: int) -> Layout:
        """The same with the input's size and the batch fixed."""
        values = {n: Moved(m.operand.at(size, batch), m.blocks) for n, m in self.values.items()}
        groups = {
            n: (g.at(size, batch), a.at(size, batch), b.at(size, batch))
            for n, (g, a, b) in self.groups.items()
        }
        return dataclasses.replace(self, values=values, groups=groups)

    def copies(self, plans: Population) -> Iterator[Copy]:
        """Every copy that exists under any of the plans."""
        if not self.steps:
            return
        found = copied(self.steps, self.outputs, _Planned(self, plans))
        for op_type, names in zip(("ReorderInput", "ReorderOutput"), found, strict=True):
            for name, needed in names.items():
                if needed.any():
                    value = self.values[name]
                    count = needed * plans.present(Presence(value.blocks))
                    yield Copy(op_type, name, *_moved(value.operand), count)


def _moved(operand: Operand) -> tuple[tuple[int | str, ...], Quantity]:
    """Shape of a copied value, `*` for its channels; bytes read and written."""
    lengths = (round(dim.full) for dim in operand.dims)
    dims = tuple("*" if axis == 1 else length for axis, length in enumerate(lengths))
    return dims, Quantity.product(2.0 * operand.item_bytes, operand.dims)


class _Planned:
    """Widths under a population of plans."""

    def __init__(self, layout: Layout, plans: Population):
        self._layout, self._plans = layout, plans

    def channels(self, value: str) -> Any:
        return self._plans.extent(self._layout.values[value].operand.dims[1])

    def per_group(self, step: Step) -> tuple[Any, Any, Any]:
        groups, inner, outer = self._layout.groups[step.output]
        return self._plans.extent(groups), self._plans.extent(inner), self._plans.extent(outer)


def build_layout(
    program: Program,
    extents: Mapping[str, tuple[Extent, ...]] | None,
    blocks_of: Mapping[str, tuple[str, ...]],
) -> Layout:
    """What ONNX Runtime copies; arguments as of `sartor.ir.kernels.build_kernels`."""
    tensors = Tensors(program, extents)
    steps = steps_of(program)
    inside = {step.output for step in steps if step.shares}
    near = {
        name
        for step in steps
        for name in (*step.inputs, step.output)
        if step.output in inside or inside.intersection(step.inputs)
    }
    made = {v.name or "": (v, node) for node in program.nodes() for v in node.outputs if v.name in near}
    values = {
        name: Moved(tensors[value], tuple(blocks_of.get(node.name or "", ())))
        for name, (value, node) in made.items()
    }
    values |= {v.name or "": Moved(tensors[v], ()) for v in program.graph.inputs if v.name in near}
    return Layout(
        steps=tuple(s for s in steps if s.output in inside or inside.intersection(s.inputs)),
        values=values,
        groups=_groups(program, tensors),
        outputs=tuple(v.name or "" for v in program.graph.outputs),
    )


def _groups(program: Program, tensors: Tensors) -> dict[str, tuple[Extent, Extent, Extent]]:
    found = {}
    for node in program.nodes():
        if node.op_type == "Conv":
            x, weight = (tensors[value] for value in node.inputs[:2] if value is not None)
            own = channels_per_group("Conv", (x, weight), tensors[node.outputs[0]])
            found[node.outputs[0].name or ""] = (own["groups"], own["in_per_group"], own["out_per_group"])
    return found
