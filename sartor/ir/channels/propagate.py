"""Runs the operator rules over a program, in execution order, and records what they found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sartor.ir.bodies import read_values
from sartor.ir.channels.labels import Factor, Labels, LabelSpace, Operand, Reason
from sartor.ir.program import Program
from sartor.ir.subgraphs import flat


@dataclasses.dataclass(frozen=True, eq=False)
class Sink:
    """A contraction over labelled axes: the place where removed features stop mattering.

    Zeroing `atoms` in `value` makes every removed feature contribute nothing (the MASKED form).

    Attributes:
        node: name of the contracting node.
        value: the operand to be zeroed: the weight when one is constant, otherwise the left operand.
        atoms: the operand's own atoms on the summed axes.
        weight: True when `value` is computed from parameters alone.
        summed: dimensions of `atoms` that are summed over; the others survive in the result.
    """

    node: str
    value: ir.Value
    atoms: np.ndarray
    weight: bool
    summed: tuple[int, ...]


Rule = Callable[["Propagation", ir.Node], None]
RULES: dict[str, Rule] = {}
EFFECTS: dict[str, str] = {}


def rule(*operators: str, effect: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators; `effect` is the sentence the generated table shows."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
            EFFECTS[operator] = effect
        return function

    return register


class Propagation:
    """Labels of every value of a program, those in branches of `If` included.

    Attributes:
        program: the flat form of the program, where branches stand in the main graph.
        space: atoms, ties, blocks and projections.
        parameter_atoms: leaf atoms by `(initializer, axis)`.
        produced: raw atoms of weight axes that create features.
        sinks: contractions over labelled axes.
    """

    def __init__(self, program: Program, approximate: bool = False):
        self.program = program = flat(program)
        self.shapes = program.shapes()
        self.nodes = {node.name or "": node for node in program.nodes()}
        self.space = LabelSpace(approximate)
        self.value_labels: dict[str, Labels] = {}
        self.parameter_atoms: dict[tuple[str, int], np.ndarray] = {}
        self.produced: list[np.ndarray] = []
        self.sinks: list[Sink] = []
        self.group_rows: dict[str, np.ndarray] = {}
        self._constant: set[str] = set(program.initializers)
        self._leaves: dict[tuple[str, int], Factor] = {}
        self._entries: dict[str, list[int | None]] = {}

    def run(self) -> None:
        """Apply every rule once, in execution order, then block what reaches an output."""
        for node in self.program.nodes():
            operator = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
            function = RULES.get(operator)
            if all(v.name in self._constant for v in read_values(node)):
                self._constant.update(v.name for v in node.outputs if v.name)
            if function is None:
                self.refuse(node, f"operator '{operator}' has no channel rule")
            else:
                function(self, node)
        for output in self.program.graph.outputs:
            if output.name in self.value_labels:
                reason = Reason(self._end(output.name), self._producer(output))
                self.space.block_labels(self.value_labels[output.name], reason)

    def _end(self, output: str) -> str:
        tail = self.program.tail
        if tail is None or output not in tail.added:
            return f"reaches the graph output '{output}'"
        return f"is read by node '{tail.readers[output]}', and {tail.reason()}"

    def _producer(self, value: ir.Value) -> str:
        node = value.producer()
        return (node.name or "") if node is not None else ""

    # ---- what rules read -------------------------------------------------------------------
    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """Concrete shape at the reference shapes."""
        return self.shapes[value.name or ""]

    def is_parameter(self, value: ir.Value) -> bool:
        """Whether the value is an initializer."""
        return value.name in self.program.initializers

    def is_constant(self, value: ir.Value) -> bool:
        """Whether the value is computed from initializers alone."""
        return value.name in self._constant

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """Contents of an initializer, or None for anything computed."""
        if value is None or not self.is_parameter(value):
            return None
        return self.program.initializer_array(value.name or "")

    def entries(self, value: ir.Value | None) -> list[int | None] | None:
        """Elements of a shape-like integer vector; None marks an element computed from the batch."""
        if value is None:
            return None
        array = self.constant(value)
        if array is not None:
            return [int(e) for e in array.ravel()]
        return self._entries.get(value.name or "")

    def set_entries(self, value: ir.Value, entries: list[int | None]) -> None:
        """Record the elements of a computed shape-like vector."""
        self._entries[value.name or ""] = entries

    def labels(self, value: ir.Value, axes: Sequence[int] | None = None) -> Labels:
        """Labels of a value; parameters get leaf atoms on first use (only on `axes`, where given)."""
        name = value.name or ""
        if not self.is_parameter(value):
            return self.value_labels.get(name, ())
        shape = self.shape(value)
        result = []
        for axis in range(len(shape)) if axes is None else sorted(axes):
            if shape[axis] <= 1:
                continue
            if (name, axis) not in self.parameter_atoms:
                self.parameter_atoms[name, axis] = self.space.fresh(shape[axis])
            result.append(self._leaf(name, axis))
        return tuple(result)

    def _leaf(self, name: str, axis: int) -> Factor:
        if (name, axis) not in self._leaves:
            self._leaves[name, axis] = Factor((axis,), self.parameter_atoms[name, axis])
        return self._leaves[name, axis]

    def set(self, value: ir.Value, labels: Labels) -> None:
        """Set the labels of an output."""
        if labels:
            self.value_labels[value.name or ""] = labels

    def reason(self, node: ir.Node, text: str) -> Reason:
        """A reason found at `node`."""
        return Reason(text, node.name or "")

    def attribute(self, node: ir.Node, name: str, default: Any = None) -> Any:
        """Attribute value, or the default."""
        attribute = node.attributes.get(name)
        return default if attribute is None else attribute.value

    # ---- what rules do ---------------------------------------------------------------------
    def refuse(self, node: ir.Node, text: str) -> None:
        """Block everything the node reads; its outputs are free."""
        reason = self.reason(node, text)
        for value in read_values(node):
            self.space.block_labels(self.labels(value), reason)

    def product(
        self,
        node: ir.Node,
        operands: Sequence[tuple[ir.Value, tuple[int, ...]] | Operand],
        output: tuple[int, ...],
        summed: frozenset[int] = frozenset(),
        *,
        text: str = "meets values that no weight makes, such as a graph input",
    ) -> Labels:
        """Broadcast product over letters, summed over `summed`; returns labels in output axis order.

        Contractions are recorded as sinks, and weight axes that survive them as producers.
        """
        values = [o[0] if isinstance(o, tuple) else None for o in operands]
        full = [
            o if isinstance(o, Operand) else Operand(self.labels(o[0]), o[1], self.shape(o[0]))
            for o in operands
        ]
        reason = self.reason(node, text)
        remaining, parts = self.space.combine(full, summed, reason)
        if summed:
            self.record(node, values, [o.letters for o in full], parts, summed)
        position = {letter: axis for axis, letter in enumerate(output)}
        factors = []
        for letters, atoms in remaining.items():
            axes = [position[letter] for letter in letters]
            order = sorted(range(len(axes)), key=axes.__getitem__)
            factors.append(Factor(tuple(axes[i] for i in order), np.transpose(atoms, order)))
        return tuple(sorted(factors, key=lambda f: f.axes))

    def record(
        self,
        node: ir.Node,
        values: Sequence[ir.Value | None],
        letters: Sequence[tuple[int, ...]],
        parts: Sequence[list[Factor]],
        summed: frozenset[int],
    ) -> None:
        """Note the sink of a contraction and the weight axes that create features in it."""
        constant = [v is not None and self.is_constant(v) for v in values]
        if all(constant):  # a layer on a learned input: its weight may serve on computed values as well
            constant[0] = False
        open_letters = set(summed)
        for i, value in enumerate(values):
            if value is None or not constant[i]:
                continue
            elsewhere = {letter for j, other in enumerate(letters) if j != i for letter in other}
            for factor in parts[i]:
                if set(factor.axes) & summed:
                    self._sink(node, value, factor, summed, weight=True)
                    open_letters -= set(factor.axes)
                if set(factor.axes) - summed - elsewhere:
                    self.produced.append(factor.atoms)
        for i, value in enumerate(values):  # what no weight contracts, the leftmost operand must zero
            if value is None or constant[i]:
                continue
            closed = [f for f in parts[i] if set(f.axes) & open_letters]
            for factor in closed:
                self._sink(node, value, factor, summed, weight=False)
            open_letters.difference_update(*(f.axes for f in closed))

    def _sink(
        self, node: ir.Node, value: ir.Value, factor: Factor, summed: frozenset[int], weight: bool
    ) -> None:
        dimensions = tuple(i for i, letter in enumerate(factor.axes) if letter in summed)
        self.sinks.append(Sink(node.name or "", value, factor.atoms, weight, dimensions))
