"""Outputs that are decided: an index, a comparison, a rounded number.

Where two numbers are nearly equal, the last bit of a sum decides, so the size of what came out says nothing about
the error behind it. The error of a decision is how far the reference's numbers would have to move, relative to the
largest of them, to be decided as the target did: zero where both agree, small at a near tie, and in the unit of
every other error. For x whose largest magnitude is m (0 for a constant), decided as y:

    ArgMax, TopK     (max x − x_y) / 2m
    a > b, …         |a − b| / (m_a + m_b)
    Round, Floor, …  distance of x from the numbers that are rounded to y, / m
    Where(c, a, b)   the error of c, where y is the operand that the reference did not take

Errors that decide nothing otherwise are not seen so; `before_decisions` makes what is decided on the output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sartor.comparison import relative_error
from sartor.ir.batch import as_fixed
from sartor.ir.cleanup import cast_to
from sartor.ir.program import Program

_BY_INDEX = {"ArgMax": 0, "ArgMin": 0, "TopK": 1}
"""Operators that decide on an index, and which of their results it is."""
_COMPARISONS: dict[str, Callable[..., np.ndarray]] = {
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
}
_ROUNDING = ("Round", "Floor", "Ceil", "Sign", "Cast")
_IN_ORDER = ("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
"""Operators behind which a decision is the same, element by element."""

Types = Mapping[str, ir.DataType]
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Decision:
    """An output that is decided, possibly in another shape or type than where it was.

    Attributes:
        node: that decides.
        result: name of its result.
        operands: names of the floats that it reads.
        computed: those of `operands` that are no constants.
        condition: of a `Where`, the decision on it.
    """

    node: ir.Node
    result: str
    operands: tuple[str, ...]
    computed: frozenset[str]
    condition: Decision | None = None

    def reads(self) -> tuple[str, ...]:
        """Names of the reference's values that `error` needs."""
        if self.condition is None:
            return (self.result, *self.operands)
        holds = self.node.inputs[0]
        assert holds is not None
        return (self.result, *self.operands, holds.name or "", *self.condition.reads())

    def decided_on(self) -> tuple[str, ...]:
        """Names of the computed numbers that decide."""
        inner = self.condition.decided_on() if self.condition is not None else ()
        return tuple(dict.fromkeys([*(n for n in self.operands if n in self.computed), *inner]))

    def error(self, reference: Arrays, found: np.ndarray) -> tuple[float, float]:
        """The error of the target's decisions, and the share of them that differs.

        Args:
            reference: values by name, those of `reads` among them.
            found: the target's output, shaped as the reference's.
        """
        given = np.asarray(reference[self.result], np.float64)
        if not given.size:
            return 0.0, 0.0
        chosen = found.astype(np.float64).reshape(given.shape)
        if not np.isfinite(chosen).all():
            return math.inf, 1.0
        far = np.nan_to_num(self._far(chosen, reference), nan=np.inf, posinf=np.inf)
        differs = chosen != given
        if self.condition is not None:  # floats: the other operand explains them better
            differs = _ratio(np.abs(chosen - given), self._size(reference)) > far
        return float(far.max()), float(differs.mean())

    def _far(self, chosen: np.ndarray, reference: Arrays) -> np.ndarray:
        """The error of each element of `chosen`, shaped as the result of the node."""
        if self.condition is not None:
            return self._far_of_where(self.condition, chosen, reference)
        operands = [np.asarray(reference[name], np.float64) for name in self.operands]
        sizes = [
            _largest(a) for name, a in zip(self.operands, operands, strict=True) if name in self.computed
        ]
        if self.node.op_type in _BY_INDEX:
            return _ratio(_behind_the_best(self.node, operands[0], chosen), 2 * sum(sizes))
        if self.node.op_type in _COMPARISONS:
            left, right = np.broadcast_arrays(*operands)
            differs = _COMPARISONS[self.node.op_type](left, right) != chosen.astype(bool)
            return _ratio(np.where(differs, np.abs(left - right), 0.0), sum(sizes))
        return _ratio(_from_rounding(self.node, operands[0], chosen), sum(sizes))

    def _size(self, reference: Arrays) -> float:
        return max(_largest(np.asarray(reference[name], np.float64)) for name in self.operands)

    def _far_of_where(self, condition: Decision, chosen: np.ndarray, reference: Arrays) -> np.ndarray:
        a, b = (np.asarray(reference[name], np.float64) for name in self.operands)
        holds = np.asarray(reference[self.node.inputs[0].name or ""]).astype(bool)  # type: ignore[union-attr]
        inner = np.asarray(reference[condition.result], np.float64)
        turned = condition._far(1.0 - inner, reference).reshape(holds.shape)
        size = self._size(reference)
        as_given = _ratio(np.abs(chosen - np.where(holds, a, b)), size)
        otherwise = _ratio(np.abs(chosen - np.where(holds, b, a)), size)
        return np.minimum(as_given, np.maximum(otherwise, turned))


def decisions(program: Program) -> dict[str, Decision]:
    """Outputs of the main graph that are decided on floats, by name."""
    graph = program.graph
    if not any(_may_decide(value) for value in graph.outputs):
        return {}
    types = program.types()
    found = {value.name or "": _decision(value, types) for value in graph.outputs}
    return {name: decision for name, decision in found.items() if decision is not None}


def error_of(
    decision: Decision | None, name: str, reference: Arrays, found: Arrays
) -> tuple[float, float | None]:
    """The error of output `name`; and the share of decisions that differ, if it is `decision`."""
    array = found.get(name)
    if decision is None or array is None or array.shape != reference[name].shape:
        return relative_error({name: reference[name]}, found), None
    return decision.error(reference, array)


def before_decisions(program: Program) -> Program:
    """The program with the numbers that are decided on as outputs, in float32, in place of the decisions.

    Its batch is fixed then. It is `program` itself where nothing is decided, or on nothing that is computed.
    """
    clone = program.clone()
    decided = decisions(clone)
    if not decided:
        return program
    graph, single = clone.graph, _Single(clone)
    changed = False
    for name, decision in decided.items():
        wanted = [
            v for v in _inputs(decision) if v.name in decision.decided_on() and v.producer() is not None
        ]
        if wanted:
            changed = True
            graph.outputs.remove(next(v for v in graph.outputs if v.name == name))
            for value in map(single, wanted):
                if not value.is_graph_output():
                    value.type = value.type or ir.TensorType(single.types[value.name or ""])
                    graph.outputs.append(value)
    if not changed:
        return program
    clone.invalidate()
    return as_fixed(clone, "numbers behind a decision are outputs, in a shape of their own")


class _Single:
    """Values in float32: no target is asked for outputs in 16 bits."""

    def __init__(self, program: Program):
        self.types = program.types()
        self.made: dict[ir.Value, ir.Value] = {}

    def __call__(self, value: ir.Value) -> ir.Value:
        if self.types[value.name or ""] not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return value
        if value not in self.made:
            self.made[value] = cast_to(value, ir.DataType.FLOAT)
        return self.made[value]


# ---- parts -----------------------------------------------------------------------------------
def _chain(value: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Nodes from the one that makes `value` backwards, as long as they leave its elements in order."""
    node = value.producer()
    while node is not None and node.domain in ("", "ai.onnx"):
        yield node, value
        source = node.inputs[0] if node.op_type in _IN_ORDER else None
        if source is None:
            return
        value, node = source, source.producer()


def _may_decide(value: ir.Value) -> bool:
    kinds = {*_BY_INDEX, *_COMPARISONS, *_ROUNDING, "Where"}
    return any(node.op_type in kinds for node, _ in _chain(value))


def _decision(value: ir.Value, types: Types) -> Decision | None:
    """The earliest decision on the way to `value`: of what is rounded, a Cast to integers decides nothing more."""
    found = None
    for node, made in _chain(value):
        condition = None
        read: Sequence[ir.Value | None] = ()
        if node.op_type in _BY_INDEX and node.outputs[_BY_INDEX[node.op_type]] is made:
            read = node.inputs[:1]
        elif node.op_type in _COMPARISONS:
            read = node.inputs
        elif node.op_type in _ROUNDING and not (node.op_type == "Cast" and _is_float(made, types)):
            read = node.inputs[:1]
        elif node.op_type == "Where" and node.inputs[0] is not None and _is_float(made, types):
            condition = _decision(node.inputs[0], types)
            read = node.inputs[1:] if condition is not None else ()
        if read and all(_is_float(v, types) for v in read):
            names = tuple(v.name or "" for v in read if v is not None)
            constant = {v.name for v in read if v is not None and v.is_initializer()}
            found = Decision(node, made.name or "", names, frozenset(names) - constant, condition)
    return found


def _is_float(value: ir.Value | None, types: Types) -> bool:
    name = value.name if value is not None else None
    return name is not None and name in types and types[name].is_floating_point()


def _inputs(decision: Decision) -> Iterator[ir.Value]:
    """What the nodes of a decision read."""
    yield from (v for v in decision.node.inputs if v is not None)
    if decision.condition is not None:
        yield from _inputs(decision.condition)


def _largest(array: np.ndarray) -> float:
    finite = np.abs(array[np.isfinite(array)])
    return float(finite.max()) if finite.size else 0.0


def _ratio(gap: np.ndarray, size: float) -> np.ndarray:
    """`gap` in units of `size`; what differs at all from zeros is infinitely far."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap == 0, 0.0, gap / size)


def _behind_the_best(node: ir.Node, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """How much smaller (ArgMin: larger) than the best number the chosen one is; infinite without such a number."""
    axis = node.attributes.get_int("axis", -1 if node.op_type == "TopK" else 0) % max(x.ndim, 1)
    smallest = node.op_type == "ArgMin" or not node.attributes.get_int("largest", 1)
    best_first = np.sort(x if smallest else -x, axis=axis)
    squeezed = node.op_type != "TopK" and not node.attributes.get_int("keepdims", 1)
    index = np.expand_dims(chosen, axis) if squeezed else chosen
    valid = (index >= 0) & (index < x.shape[axis]) & (index == np.floor(index))
    taken = np.take_along_axis(x, np.where(valid, index, 0).astype(np.int64), axis)
    best = np.take(best_first, range(index.shape[axis]), axis=axis)
    gap = np.where(valid, np.abs((taken if smallest else -taken) - best), np.inf)
    if index.shape[axis] > 1 and (np.diff(np.sort(index, axis=axis), axis=axis) == 0).any():
        gap = np.full_like(gap, np.inf)  # one place twice
    return gap.reshape(chosen.shape)


def _from_rounding(node: ir.Node, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of x from the numbers that the node rounds to y."""
    if node.op_type == "Sign":
        return np.where(np.sign(x) == y, 0.0, np.where(np.isin(y, (-1, 0, 1)), np.abs(x), np.inf))
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(ir.DataType.BOOL):
        return np.where((x != 0) == (y != 0), 0.0, np.abs(x))
    whole = np.where(y == np.rint(y), 0.0, np.inf)
    if node.op_type == "Round":
        low, high = y - 0.5, y + 0.5
    elif node.op_type == "Floor":
        low, high = y, y + 1
    elif node.op_type == "Ceil":
        low, high = y - 1, y
    else:  # Cast, towards zero
        low, high = np.where(y > 0, y, y - 1), np.where(y < 0, y, y + 1)
    return whole + np.maximum(np.maximum(low - x, x - high), 0.0)
