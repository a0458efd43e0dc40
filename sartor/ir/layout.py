"""Kernels that exist under some plans only, where a runtime has a layout of its own.

Which values are in the layout is a matter of widths. A plan that leaves the channel grid makes copies into and out of
it necessary, which no node of the program names; and sums and activations that ran inside a convolution become
kernels of their own. They are therefore found for every population of plans anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.ir.extents import Extent
from sartor.ir.fusion_choices import Choice, apart, choices
from sartor.ir.fusion_layout import Step, copied, states, steps_of
from sartor.ir.fusion_rules import ACTIVATIONS, FusionRules
from sartor.ir.kernels import Kernel, kernel_alone
from sartor.ir.operands import Operand, Tensors, channels_per_group
from sartor.ir.population import Population, Presence
from sartor.ir.program import Program
from sartor.ir.quantities import Quantity

FAMILY = "layout"
"""Of copies."""
COPIES = ("ReorderInput", "ReorderOutput", "Reorder")
"""What runtimes put between kernels."""
_WINDOWS = frozenset({"Conv", "MaxPool", "AveragePool"})
_ON_THE_WAY = ACTIVATIONS | {"Add", "Sub", "Mul", "Div", "BatchNormalization"}


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
    """What decides about these kernels. Empty for runtimes without a layout of their own.

    Attributes:
        steps: nodes, in execution order.
        values: by name.
        groups: per convolution, by the name of its output: its groups, and input and output channels of one.
        outputs: names of the program's outputs.
        choices: sums and activations that may run inside a kernel, with what they are otherwise; execution order.
        images: names of the program's inputs and outputs that are copied whatever the plan.
    """

    steps: tuple[Step, ...] = ()
    values: Mapping[str, Moved] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, tuple[Extent, Extent, Extent]] = dataclasses.field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    choices: tuple[tuple[Choice, Kernel], ...] = ()
    images: tuple[str, ...] = ()
    _copies: dict[tuple[str, str], Kernel] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def varying(self) -> frozenset[str]:
        """Names of the channel groups that these kernels depend on."""
        extents = [e for moved in self.values.values() for e in moved.operand.dims]
        extents += [e for three in self.groups.values() for e in three]
        found = frozenset(name for extent in extents for name in extent.groups)
        moved = (part for _, kernel in self.choices for part in (kernel.bytes_read, kernel.bytes_written))
        return found.union(*(part.groups for part in moved))

    @functools.cached_property
    def usual(self) -> Counter[str]:
        """By operator: copies that the whole network needs; sums and activations that may be kernels."""
        found = Counter(choice.op_type for choice, _ in self.choices)
        for kernel, count in self.kernels(Population({}, {})):
            found[kernel.op_type] += round(float(count))
        return found

    def at(self, size: int, batch: int) -> Layout:
        """The same with the input's size and the batch fixed."""
        values = {n: Moved(m.operand.at(size, batch), m.blocks) for n, m in self.values.items()}
        groups = {
            n: (g.at(size, batch), a.at(size, batch), b.at(size, batch))
            for n, (g, a, b) in self.groups.items()
        }
        own = tuple((choice, kernel.at(size, batch)) for choice, kernel in self.choices)
        return Layout(self.steps, values, groups, self.outputs, own, self.images)

    def kernels(self, plans: Population) -> Iterator[tuple[Kernel, Any]]:
        """What differs from the workload's kernels under any of the plans: a kernel, and how many there are of it.

        One more where it exists and the workload does not list it, one less where it runs inside another kernel and
        the workload lists it; scalars or arrays `[plans]`.
        """
        for name in self.images:
            yield self._copy("Reorder", name), 1.0
        if not self.steps:
            return
        blocked = states(self.steps, _Planned(self, plans))
        found = copied(self.steps, self.outputs, _Planned(self, plans), blocked)
        for op_type, names in zip(("ReorderInput", "ReorderOutput"), found, strict=True):
            for name, needed in names.items():
                if needed.any():
                    kernel = self._copy(op_type, name)
                    yield kernel, needed * plans.present(Presence(kernel.blocks))
        now = apart(tuple(choice for choice, _ in self.choices), blocked)
        for choice, kernel in self.choices:
            more = now[choice.output].astype(float) - self._apart_at_first[choice.output]
            if more.any():
                yield kernel, more * plans.present(Presence(kernel.blocks))

    @functools.cached_property
    def _apart_at_first(self) -> dict[str, np.ndarray]:
        blocked = states(self.steps, _Planned(self, Population({}, {})))
        return apart(tuple(choice for choice, _ in self.choices), blocked)

    def _copy(self, op_type: str, name: str) -> Kernel:
        if (op_type, name) not in self._copies:
            value = self.values[name]
            self._copies[op_type, name] = copy_kernel(op_type, value.operand, value.blocks)
        return self._copies[op_type, name]


def copy_kernel(op_type: str, operand: Operand, blocks: tuple[str, ...] = ()) -> Kernel:
    """A copy of a value into another layout.

    Args:
        op_type: one of `COPIES`.
        operand: the value.
        blocks: removable blocks with which it disappears.
    """
    return Kernel(
        name=f"{op_type} {operand.name}",
        op_type=op_type,
        family=FAMILY,
        nodes=(),
        attributes={},
        inputs=(operand,),
        outputs=(operand,),
        epilogue=(),
        macs=Quantity(),
        bytes_read=operand.bytes,
        bytes_written=operand.bytes,
        blocks=blocks,
    )


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
    rules: FusionRules,
) -> Layout:
    """What ONNX Runtime copies and takes in, what OpenVINO copies.

    Arguments as of `sartor.ir.kernels.build_kernels`.
    """
    tensors = Tensors(program, extents)
    if not rules.has_layout:
        images = _images(program, tensors) if rules.copies_images else {}
        return Layout(values=images, images=tuple(images))
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
        choices=_choices(program, tensors, blocks_of, rules),
    )


def _images(program: Program, tensors: Tensors) -> dict[str, Moved]:
    """Inputs that a convolution or pooling reads, and outputs that it makes, also through elementwise operators."""
    found = {}
    ends = [(v, True) for v in program.graph.inputs] + [(v, False) for v in program.graph.outputs]
    for value, forward in ends:
        operand = tensors[value]
        if operand.dtype != "FLOAT" or len(operand.dims) != 4 or operand.dims[1].full < 2:
            continue  # the layouts of one channel are the same
        reached, seen = [value], set[Any]()
        while reached:
            here = reached.pop()
            nodes = {node for node, _ in here.uses()} if forward else {here.producer()} - {None}
            for node in nodes - seen:
                seen.add(node)
                if node.op_type in _ON_THE_WAY:
                    reached.extend(node.outputs if forward else filter(None, node.inputs))
        if any(node.op_type in _WINDOWS for node in seen):
            found[operand.name] = Moved(operand, ())
    return found


def _choices(
    program: Program, tensors: Tensors, blocks_of: Mapping[str, tuple[str, ...]], rules: FusionRules
) -> tuple[tuple[Choice, Kernel], ...]:
    """Each disappears with the kernel that may take it: what a removed block leaves is in the workload."""
    own: Mapping[str, Sequence[str]] = {
        node.outputs[0].name or "": blocks_of.get(node.name or "", ()) for node in program.nodes()
    }
    return tuple(
        (choice, kernel_alone(program, tensors, node, tuple(own[choice.kernels[0][1]])))
        for node, choice in choices(program, blocks_of, rules)
    )


def _groups(program: Program, tensors: Tensors) -> dict[str, tuple[Extent, Extent, Extent]]:
    found = {}
    for node in program.nodes():
        if node.op_type == "Conv":
            x, weight = (tensors[value] for value in node.inputs[:2] if value is not None)
            own = channels_per_group("Conv", (x, weight), tensors[node.outputs[0]])
            found[node.outputs[0].name or ""] = (own["groups"], own["in_per_group"], own["out_per_group"])
    return found
