"""State of the batch analysis: labels so far, choices taken, and the edits that several rules share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sartor.ir import folding
from sartor.ir.cleanup import array_of
from sartor.ir.normalise import free_name
from sartor.ir.program import Program


class Refusal(Exception):
    """The batch cannot be symbolic; the message names the node."""


@dataclasses.dataclass(frozen=True)
class Label:
    """The batch lies on `axis`, which has `outer * batch * inner` positions in row-major order."""

    axis: int
    outer: int = 1
    inner: int = 1

    @property
    def pure(self) -> bool:
        """True if the axis holds nothing but the batch."""
        return self.outer == 1 and self.inner == 1

    def at(self, axis: int) -> Label:
        """The same label on another axis."""
        return dataclasses.replace(self, axis=axis)


class State:
    """Labels so far, static shapes, and the alternatives taken where size 1 is ambiguous."""

    def __init__(
        self,
        program: Program,
        batch_inputs: tuple[str, ...],
        size: int,
        choices: list[int],
        unmistakable: bool = False,
    ):
        self.program = program
        self.graph = program.graph
        self.batch_inputs = batch_inputs
        self.size = size
        self.unmistakable = unmistakable
        self.shapes: dict[str, tuple[int, ...]] = dict(program.shapes())
        self.types = program.types()
        self.labels: dict[ir.Value, Label] = {}
        self._choices = choices
        self._taken: list[tuple[int, int]] = []
        self._batch_size: ir.Value | None = None

    def shape(self, value: ir.Value | None) -> tuple[int, ...]:
        """Static shape of `value`."""
        return self.shapes[value.name or ""] if value is not None else ()

    def choose(self, candidates: list[Label]) -> Label:
        """Take one of several readings; earlier refusals select a later one."""
        if len(candidates) == 1:
            return candidates[0]
        position = len(self._taken)
        index = self._choices[position] if position < len(self._choices) else 0
        self._taken.append((index, len(candidates)))
        return candidates[index]

    def next_choices(self) -> list[int] | None:
        """The next combination of readings to try, latest decision first; None when exhausted."""
        taken = list(self._taken)
        while taken and taken[-1][0] + 1 >= taken[-1][1]:
            taken.pop()
        if not taken:
            return None
        return [index for index, _ in taken[:-1]] + [taken[-1][0] + 1]

    def batch_size(self) -> ir.Value:
        """The value `Shape(x, start=0, end=1)` of the first batch input, made on first use."""
        if self._batch_size is None:
            source = next(v for v in self.graph.inputs if v.name == self.batch_inputs[0])
            node = ir.node(
                "Shape", [source], {"end": 1, "start": 0}, num_outputs=1, name=self._free("batch_size")
            )
            node.outputs[0].name = node.name
            self.graph.insert_before(self.graph[0], node)
            self._batch_size = node.outputs[0]
        return self._batch_size

    def expand(self, node: ir.Node, index: int, label: Label, rank: int) -> None:
        """Give the batch-independent input `index` of `node` the batch axis, by the idiom."""
        if not label.pure:
            raise refuse(node, f"its input {index} would have to be repeated along a merged batch axis")
        value = node.inputs[index]
        assert value is not None
        dims = [1] * rank
        name = f"{node.name}.{index}.expand"
        target = self.batch_shape(name, dims[: label.axis], dims[label.axis + 1 :], node)
        expand = ir.node("Expand", [value, target], num_outputs=1, name=name)
        expand.outputs[0].name = name
        self.graph.insert_before(node, expand)
        shape = list(self.shape(value))
        shape[label.axis] = self.size
        self.learn(name, tuple(shape))
        node.replace_input_with(index, expand.outputs[0])
        self.labels[expand.outputs[0]] = label

    def batch_shape(
        self, prefix: str, before: Sequence[int], after: Sequence[int], reader: ir.Node
    ) -> ir.Value:
        """The vector `before + [batch] + after`, computed in front of `reader`; names start with `prefix`."""

        def part(name: str, dims: Sequence[int]) -> list[ir.Value]:
            array = np.asarray(dims, np.int64)
            return (
                [folding.constant(self.graph, free_name(self.graph, f"{prefix}.{name}"), array)]
                if dims
                else []
            )

        parts = [*part("before", before), self.batch_size(), *part("after", after)]
        if len(parts) == 1:
            return parts[0]
        concat = ir.node("Concat", parts, {"axis": 0}, num_outputs=1, name=f"{prefix}.shape")
        concat.outputs[0].name = concat.name
        self.graph.insert_before(reader, concat)
        return concat.outputs[0]

    def learn(self, name: str, shape: tuple[int, ...]) -> None:
        """Record the static shape of a value made here."""
        self.shapes[name] = shape

    def _free(self, name: str) -> str:
        taken = {n.name for n in self.graph} | set(self.shapes)
        while name in taken:
            name += "_"
        return name


def refuse(node: ir.Node, why: str) -> Refusal:
    """A refusal that names the node."""
    return Refusal(f"node '{node.name}' ({node.op_type}): {why}")


def label_of(state: State, node: ir.Node, index: int = 0) -> Label | None:
    """The label of input `index`, None if it does not carry the batch."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return None
    return state.labels.get(node.inputs[index])  # type: ignore[arg-type]


def only(state: State, node: ir.Node, data: int = 0) -> Label:
    """The label of input `data`; no other input may carry the batch."""
    for index, value in enumerate(node.inputs):
        if index != data and value is not None and value in state.labels:
            raise refuse(node, f"its input {index} depends on the batch")
    label = label_of(state, node, data)
    assert label is not None
    return label


def mark(state: State, node: ir.Node, label: Label) -> None:
    """Give every output of `node` the label."""
    for output in node.outputs:
        state.labels[output] = label


def axis_of(state: State, node: ir.Node, default: int) -> int:
    """The attribute `axis` of `node`, counted from the front of its first input."""
    rank = len(state.shape(node.inputs[0]))
    return node.attributes.get_int("axis", default) % max(rank, 1)


def shrink(state: State, node: ir.Node, index: int, axis: int, label: Label) -> None:
    """Replace a constant that repeats one slice for every sample by that slice."""
    array = array_of(node, index)
    if array is None or not label.pure or array.shape[axis] != state.size:
        raise refuse(
            node, f"its input {index} has {state.shape(node.inputs[index])[axis]} fixed batch positions"
        )
    first = np.take(array, [0], axis=axis)
    if not np.array_equal(np.broadcast_to(first, array.shape), array, equal_nan=array.dtype.kind == "f"):
        raise refuse(node, f"its input {index} is a constant that differs between samples")
    name = free_name(state.graph, f"{node.name}.{index}")
    value = folding.constant(state.graph, name, first)
    node.replace_input_with(index, value)
    state.learn(name, first.shape)
