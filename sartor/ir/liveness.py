"""Peak activation memory of a program in its own node order.

Definition of `peak_activation_bytes`:

* a value occupies memory from the node that produces it until the last node that reads it;
* nothing is done in place: while a node runs, all its inputs and all its outputs exist side by side.
  Reshape, Flatten, Squeeze and the like allocate as well, though most runtimes only rename a buffer;
* graph inputs belong to the caller and exist throughout; graph outputs exist until the end;
* what a body (If, Loop, Scan) reads from outside exists while the control-flow node runs, and the
  peak of the body's own values is added at that node. The outputs of an If's branch are the If's own
  outputs, not counted twice;
* initializers are excluded.

Planners of runtimes reach other numbers (in place, other orders, arena fragmentation); those are
separate metrics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sartor.ir.bodies import body_graphs, read_values
from sartor.ir.extents import Extent
from sartor.ir.operands import Tensors
from sartor.ir.program import Program
from sartor.ir.quantities import Quantity, largest, whole


@dataclasses.dataclass(frozen=True)
class Peak:
    """Where memory is highest.

    Attributes:
        bytes: activation bytes alive at that moment.
        at_node: name of the node that runs then (the first one of several); empty without nodes.
        live: names of the main-graph values alive then, graph inputs first, in order of production.
    """

    bytes: int
    at_node: str
    live: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Step:
    node: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    body_bytes: Quantity


@dataclasses.dataclass(frozen=True)
class _Bypass:
    """A removable block: its nodes, and which value takes the place of each of its outputs."""

    name: str
    nodes: frozenset[str]
    replaced: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Liveness:
    """Lifetimes of a program's activations, with sizes as functions of a plan."""

    steps: tuple[_Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: Mapping[str, Quantity]
    bypasses: tuple[_Bypass, ...] = ()

    def at(self, size: int, batch: int) -> Liveness:
        """The same with the input's size and the batch fixed."""
        steps = tuple(dataclasses.replace(s, body_bytes=s.body_bytes.at(size, batch)) for s in self.steps)
        sizes = {name: quantity.at(size, batch) for name, quantity in self.sizes.items()}
        return dataclasses.replace(self, steps=steps, sizes=sizes)

    def peak(self) -> Peak:
        """The peak before any pruning."""
        steps, live = self._live(frozenset())
        full = {name: size.full for name, size in self.sizes.items()}
        totals = [sum(full[v] for v in row) + s.body_bytes.full for s, row in zip(steps, live, strict=True)]
        if not totals:
            return Peak(round(sum(full[v] for v in self.inputs)), "", self.inputs)
        worst = max(range(len(totals)), key=totals.__getitem__)
        return Peak(round(totals[worst]), steps[worst].node, live[worst])

    def evaluate(
        self, fractions: Mapping[str, Any], removed: Mapping[str, Any], above: float | None = None
    ) -> np.ndarray:
        """Peak bytes of a population of plans, an array `[plans]` (0-d for a single plan).

        Args:
            fractions: kept fraction per group; scalars or arrays of one common length.
            removed: removed blocks; scalars or bool arrays of the same length.
            above: instead of the peak, the bytes above this limit, summed over all steps. It falls with
                every value that is narrowed at a step over the limit, where the peak may stay.
        """
        kept = {name: np.asarray(value, float) for name, value in fractions.items()}
        gone = {name: np.asarray(value, bool) for name, value in removed.items()}
        shape = np.broadcast_shapes(*(v.shape for v in kept.values()), *(v.shape for v in gone.values()))
        names = [b.name for b in self.bypasses if b.name in gone]
        result = np.zeros(shape)
        if not names:
            result[...] = self._peaks(frozenset(), kept, above)
            return result
        flags = np.stack([np.broadcast_to(gone[name], shape) for name in names], axis=-1)
        flat = flags.reshape(-1, len(names))
        for row in np.unique(flat, axis=0):  # lifetimes depend only on which blocks are gone
            where = (flags == row).all(-1)
            part = {k: np.broadcast_to(v, shape)[where] for k, v in kept.items()}
            result[where] = self._peaks(
                frozenset(n for n, f in zip(names, row, strict=True) if f), part, above
            )
        return result

    def _peaks(self, gone: frozenset[str], fractions: Mapping[str, np.ndarray], above: float | None) -> Any:
        steps, live = self._live(gone)
        cache: dict[str, Any] = {}
        highest: Any = sum(self.sizes[v].evaluate(fractions) for v in self.inputs)
        excess: Any = 0.0
        for step, row in zip(steps, live, strict=True):
            total: Any = step.body_bytes.evaluate(fractions)
            for value in row:
                if value not in cache:
                    cache[value] = self.sizes[value].evaluate(fractions)
                total = total + cache[value]
            highest = np.maximum(highest, total)
            if above is not None:
                excess = excess + np.maximum(total - above, 0.0)
        return whole(highest) if above is None else excess

    def _live(self, gone: frozenset[str]) -> tuple[list[_Step], list[tuple[str, ...]]]:
        """Steps that stay, and the values alive during each, in order of production."""
        renamed: dict[str, str] = {}
        dead: set[str] = set()
        for bypass in self.bypasses:
            if bypass.name in gone:
                dead |= bypass.nodes
                renamed.update(bypass.replaced)

        def resolve(value: str) -> str:
            while value in renamed:
                value = renamed[value]
            return value

        steps = [s for s in self.steps if s.node not in dead]
        last = dict.fromkeys(self.inputs, len(steps))
        born = dict.fromkeys(self.inputs, -1)
        for index, step in enumerate(steps):
            for value in step.writes:
                born[value] = index
                last[value] = index
        for index, step in enumerate(steps):
            for value in map(resolve, step.reads):
                if value in last:
                    last[value] = max(last[value], index)
        for value in map(resolve, self.outputs):
            if value in last:
                last[value] = len(steps)
        rows: list[list[str]] = [[] for _ in steps]
        for value, start in born.items():
            for index in range(max(start, 0), min(last[value], len(steps) - 1) + 1):
                rows[index].append(value)
        return steps, [tuple(row) for row in rows]


def peak_activation(program: Program) -> Peak:
    """Peak activation bytes of `program` at its reference shapes; definition in the module docstring."""
    return build_liveness(program).peak()


def build_liveness(
    program: Program,
    extents: Mapping[str, tuple[Extent, ...]] | None = None,
    blocks: Sequence[Any] = (),
) -> Liveness:
    """Lifetimes of the main graph's values.

    Args:
        extents: dimensions per value name; values that are absent keep their reference shape.
        blocks: removable blocks with `name` and `nodes`; with `inputs` and `outputs`, what reads an
            output of a removed block reads its input instead.
    """
    tensors = Tensors(program, extents)
    stored = set(program.initializers)
    steps: list[_Step] = []
    sizes: dict[str, Quantity] = {}
    inputs = tuple(v.name or "" for v in program.graph.inputs if v.name not in stored)
    for value in program.graph.inputs:
        sizes[value.name or ""] = tensors[value].bytes
    for node in program.nodes():
        writes = [v for v in node.outputs if v.name]
        for value in writes:
            sizes[value.name or ""] = tensors[value].bytes
        steps.append(
            _Step(
                node.name or "",
                tuple(v.name or "" for v in read_values(node) if v.name not in stored),
                tuple(v.name or "" for v in writes),
                largest([body_peak(body, node.op_type, tensors) for body in body_graphs(node)]),
            )
        )
    return Liveness(
        steps=tuple(steps),
        inputs=inputs,
        outputs=tuple(v.name or "" for v in program.graph.outputs),
        sizes=sizes,
        bypasses=tuple(_bypass(block) for block in blocks),
    )


def _bypass(block: Any) -> _Bypass:
    sources = [_name(v) for v in getattr(block, "inputs", ())]
    outputs = [_name(v) for v in getattr(block, "outputs", ())]
    replaced = dict.fromkeys(outputs, sources[0]) if sources else {}
    return _Bypass(block.name, frozenset(block.nodes), replaced)


def _name(value: Any) -> str:
    return value if isinstance(value, str) else value.name


def body_peak(body: ir.Graph, owner: str, tensors: Tensors) -> Quantity:
    """Highest bytes of values that belong to `body` itself, nested bodies included."""
    nodes = list(body)
    # An If's node already owns its branch outputs; a Loop's carried values exist twice, as read and as made.
    outside = set(body.outputs) if owner == "If" else set()
    outside |= set(body.initializers.values())
    born = {v: -1 for v in body.inputs if v not in outside}
    last: dict[ir.Value, int] = {v: len(nodes) for v in born}
    for index, node in enumerate(nodes):
        for value in node.outputs:
            if value.name and value not in outside:
                born[value], last[value] = index, index
    for index, node in enumerate(nodes):
        for read in read_values(node):
            if read in last:
                last[read] = max(last[read], index)
    for value in body.outputs:
        if value in last:
            last[value] = len(nodes)
    moments = [sum((tensors.inner(v).bytes for v in born if born[v] < 0), Quantity())]
    for index, node in enumerate(nodes):
        live = [tensors.inner(v).bytes for v in born if born[v] <= index <= last[v]]
        nested = largest([body_peak(g, node.op_type, tensors) for g in body_graphs(node)])
        moments.append(sum(live, nested))
    return largest(moments)
