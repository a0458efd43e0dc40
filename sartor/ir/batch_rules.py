"""One rule per operator: how the batch label moves, and which constants must be rewritten for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sartor.ir import canonicalize as table
from sartor.ir import folding
from sartor.ir.cleanup import array_of
from sartor.ir.normalise import free_name, set_operand
from sartor.ir.program import Program

INT64_MAX = 2**63 - 1


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
            raise _refuse(node, f"its input {index} would have to be repeated along a merged batch axis")
        value = node.inputs[index]
        assert value is not None
        prefix = f"{node.name}.{index}"
        parts = [
            folding.constant(
                self.graph, free_name(self.graph, f"{prefix}.before"), np.ones(label.axis, np.int64)
            ),
            self.batch_size(),
            folding.constant(
                self.graph, free_name(self.graph, f"{prefix}.after"), np.ones(rank - label.axis - 1, np.int64)
            ),
        ]
        parts = [p for p in parts if p.const_value is None or p.const_value.size]
        for name in (f"{prefix}.before", f"{prefix}.after"):
            if name in self.graph.initializers and not self.graph.initializers[name].const_value.size:  # type: ignore[union-attr]
                del self.graph.initializers[name]
        target = self.batch_size()
        if len(parts) > 1:
            concat = ir.node("Concat", parts, {"axis": 0}, num_outputs=1, name=f"{prefix}.shape")
            concat.outputs[0].name = f"{prefix}.shape"
            self.graph.insert_before(node, concat)
            target = concat.outputs[0]
        expand = ir.node("Expand", [value, target], num_outputs=1, name=f"{prefix}.expand")
        expand.outputs[0].name = f"{prefix}.expand"
        self.graph.insert_before(node, expand)
        shape = list(self.shape(value))
        shape[label.axis] = self.size
        self.learn(prefix + ".expand", tuple(shape))
        node.replace_input_with(index, expand.outputs[0])
        self.labels[expand.outputs[0]] = label

    def learn(self, name: str, shape: tuple[int, ...]) -> None:
        """Record the static shape of a value made here."""
        self.shapes[name] = shape

    def _free(self, name: str) -> str:
        taken = {n.name for n in self.graph} | set(self.shapes)
        while name in taken:
            name += "_"
        return name


def _refuse(node: ir.Node, why: str) -> Refusal:
    return Refusal(f"node '{node.name}' ({node.op_type}): {why}")


def apply(state: State, node: ir.Node) -> None:
    """Label the outputs of `node` and rewrite its constants.

    Raises:
        Refusal: the node mixes samples, or has no rule.
    """
    labelled = [i for i in node.inputs if i is not None and i in state.labels]
    if not labelled and state.unmistakable and _expand_constants(state, node):
        labelled = [i for i in node.inputs if i is not None and i in state.labels]
    if not labelled and node.op_type != "If":
        if node.op_type in ("Expand", "Tile"):
            _expand_independent(state, node)
        return
    rule = RULES.get(node.op_type) if node.domain == "" else None
    if node.domain != "" and (node.op_identifier() in state.program.model.functions):
        rule = _dialect
    if rule is None:
        captured = node.op_type == "If" and not labelled
        raise _refuse(node, "captures values that may depend on the batch" if captured else "no batch rule")
    try:
        rule(state, node)
    except Refusal as refusal:
        where = state.program.provenance.get(node.name or "")
        raise Refusal(f"{refusal}{f' at {where}' if where else ''}") from None


def _expand_constants(state: State, node: ir.Node) -> bool:
    """Repeat by the idiom a folded constant that held one slice per sample, such as an initial state."""
    found = False
    for index, value in enumerate(node.inputs):
        array = array_of(node, index)
        if value is None or array is None or state.size not in array.shape:
            continue
        if array.ndim < 2 and array.dtype.kind not in "fb":
            continue  # a shape, or a list of positions
        label = Label(array.shape.index(state.size))
        _shrink(state, node, index, label.axis, label)
        state.expand(node, index, label, array.ndim)
        found = True
    return found


def _label(state: State, node: ir.Node, index: int = 0) -> Label | None:
    if index >= len(node.inputs) or node.inputs[index] is None:
        return None
    return state.labels.get(node.inputs[index])  # type: ignore[arg-type]


def _only(state: State, node: ir.Node, data: int = 0) -> Label:
    """The label of input `data`; no other input may carry the batch."""
    for index, value in enumerate(node.inputs):
        if index != data and value is not None and value in state.labels:
            raise _refuse(node, f"its input {index} depends on the batch")
    label = _label(state, node, data)
    assert label is not None
    return label


def _set(state: State, node: ir.Node, label: Label) -> None:
    for output in node.outputs:
        state.labels[output] = label


def _same(state: State, node: ir.Node) -> None:
    _set(state, node, _only(state, node))


def _broadcast(state: State, node: ir.Node) -> None:
    """Align all inputs by broadcasting; the batch must lie on one common axis."""
    rank = len(state.shape(node.outputs[0]))
    found: Label | None = None
    for value in node.inputs:
        label = state.labels.get(value) if value is not None else None
        if label is None:
            continue
        aligned = label.at(label.axis + rank - len(state.shape(value)))
        if found is not None and aligned != found:
            raise _refuse(node, f"its inputs carry the batch differently ({found} and {aligned})")
        found = aligned
    assert found is not None
    for index, value in enumerate(node.inputs):
        if value is None or value in state.labels:
            continue
        shape = state.shape(value)
        axis = found.axis - (rank - len(shape))
        if axis >= 0 and shape[axis] != 1:
            _shrink(state, node, index, axis, found)
    _set(state, node, found)


def _shrink(state: State, node: ir.Node, index: int, axis: int, label: Label) -> None:
    """Replace a constant that repeats one slice for every sample by that slice."""
    array = array_of(node, index)
    if array is None or not label.pure or array.shape[axis] != state.size:
        raise _refuse(
            node, f"its input {index} has {state.shape(node.inputs[index])[axis]} fixed batch positions"
        )
    first = np.take(array, [0], axis=axis)
    if not np.array_equal(np.broadcast_to(first, array.shape), array, equal_nan=array.dtype.kind == "f"):
        raise _refuse(node, f"its input {index} is a constant that differs between samples")
    name = free_name(state.graph, f"{node.name}.{index}")
    value = folding.constant(state.graph, name, first)
    node.replace_input_with(index, value)
    state.learn(name, first.shape)


def _axis_of(state: State, node: ir.Node, default: int) -> int:
    rank = len(state.shape(node.inputs[0]))
    return node.attributes.get_int("axis", default) % max(rank, 1)


def _along_axis(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    if node.op_type == "CumSum":
        axes = array_of(node, 1)
        axis = (
            int(np.asarray(axes).reshape(-1)[0]) % len(state.shape(node.inputs[0]))
            if axes is not None
            else -1
        )
    else:
        axis = _axis_of(state, node, 0 if node.op_type in ("ArgMax", "ArgMin") else -1)
    if axis in (label.axis, -1):
        raise _refuse(node, "works along the batch axis")
    if (
        node.op_type in ("ArgMax", "ArgMin")
        and not node.attributes.get_int("keepdims", 1)
        and axis < label.axis
    ):
        label = label.at(label.axis - 1)
    _set(state, node, label)


def _reduce(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    rank = len(state.shape(node.inputs[0]))
    axes = array_of(node, 1)
    if axes is None:
        raise _refuse(node, "reduces over all axes, the batch included")
    reduced = {int(a) % rank for a in axes}
    if label.axis in reduced:
        raise _refuse(node, "reduces over the batch axis")
    if not node.attributes.get_int("keepdims", 1):
        label = label.at(label.axis - sum(1 for a in reduced if a < label.axis))
    _set(state, node, label)


def _leading(state: State, node: ir.Node) -> None:
    """Operators whose axis 0 is the batch by definition: convolution, pooling, normalisation."""
    label = _only(state, node)
    if label.axis != 0:
        raise _refuse(
            node, f"the batch is on axis {label.axis}, and this operator is independent only along axis 0"
        )
    _set(state, node, label)


def _batch_norm(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    if label.axis == 1:
        raise _refuse(node, "the batch lies on the channel axis")
    _set(state, node, label)


def _layer_norm(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    if label.axis >= _axis_of(state, node, -1):
        raise _refuse(node, "normalises over the batch axis")
    _set(state, node, label)


def _reshape_candidates(
    source: tuple[int, ...], label: Label, target: tuple[int, ...], size: int
) -> list[Label]:
    """Where the batch can be after a row-major reshape, the most plausible reading first."""
    before = math.prod(source[: label.axis]) * label.outer
    found = []
    prefix = 1
    for axis, length in enumerate(target):
        if before % prefix == 0:
            outer = before // prefix
            if outer * size <= length and length % (outer * size) == 0:
                found.append(Label(axis, outer, length // (outer * size)))
        prefix *= length
    unchanged = [f for f in found if f == label and source[label.axis] == target[f.axis]]
    pure = [f for f in found if f.pure]
    merged_less = sorted(found, key=lambda f: (f.axis != label.axis, f.outer * f.inner))
    return list(dict.fromkeys([*unchanged, *pure, *merged_less]))


def _reshape(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    source, target = state.shape(node.inputs[0]), state.shape(node.outputs[0])
    if 0 in target:
        raise _refuse(node, "an empty tensor")
    candidates = _reshape_candidates(source, label, target, state.size)
    if not candidates:
        raise _refuse(node, f"reshapes {list(source)} to {list(target)} across the batch")
    result = state.choose(candidates)
    if node.op_type == "Reshape":
        spelled = list(target)
        same = result == label and source[label.axis] == target[result.axis]
        spelled[result.axis] = 0 if same and label.pure else -1
        set_operand(state.graph, node, 1, np.asarray(spelled, np.int64))
    elif node.op_type == "Flatten":
        cut = node.attributes.get_int("axis", 1) % (len(source) + 1)
        if result.axis != (0 if label.axis < cut else 1):
            raise _refuse(node, "flattens across the batch")
    elif target[result.axis] != source[label.axis]:
        raise _refuse(node, "changes the batch axis")
    _set(state, node, result)


def _transpose(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    permutation = node.attributes["perm"].as_ints()
    _set(state, node, label.at(list(permutation).index(label.axis)))


def _squeeze(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    axes = array_of(node, 1)
    rank = len(state.shape(node.inputs[0]))
    if axes is None or label.axis in (squeezed := {int(a) % rank for a in axes}):
        raise _refuse(node, "removes the batch axis")
    _set(state, node, label.at(label.axis - sum(1 for a in squeezed if a < label.axis)))


def _unsqueeze(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    axes = array_of(node, 1)
    rank = len(state.shape(node.outputs[0]))
    if axes is None:
        raise _refuse(node, "its axes are computed")
    new = {int(a) % rank for a in axes}
    kept = [axis for axis in range(rank) if axis not in new]
    _set(state, node, label.at(kept[label.axis]))


def _expand(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    source, target = state.shape(node.inputs[0]), list(state.shape(node.outputs[0]))
    axis = label.axis + len(target) - len(source)
    if target[axis] != source[label.axis]:
        raise _refuse(node, "repeats the batch axis")
    target[axis] = 1
    set_operand(state.graph, node, 1, np.asarray(target, np.int64))
    _set(state, node, label.at(axis))


def _expand_independent(state: State, node: ir.Node) -> None:
    """An Expand or Tile of a batch-independent value to the static batch becomes the idiom."""
    if state.size == 1:
        return
    source, target = state.shape(node.inputs[0]), list(state.shape(node.outputs[0]))
    padded = (1,) * (len(target) - len(source)) + tuple(source)
    axis = next(
        (a for a, (s, t) in enumerate(zip(padded, target, strict=True)) if s == 1 and t == state.size), None
    )
    if axis is None:
        return
    if node.op_type == "Tile":
        raise _refuse(node, "repeats a batch-independent value along the batch")
    label = Label(axis)
    target[axis] = 1
    parts = [
        folding.constant(
            state.graph, free_name(state.graph, f"{node.name}.{end}"), np.asarray(dims, np.int64)
        )
        for end, dims in (("before", target[:axis]), ("after", target[axis + 1 :]))
        if dims
    ]
    ordered = [*parts[: 1 if axis else 0], state.batch_size(), *parts[1 if axis else 0 :]]
    concat = ir.node("Concat", ordered, {"axis": 0}, num_outputs=1, name=f"{node.name}.shape.concat")
    concat.outputs[0].name = concat.name
    state.graph.insert_before(node, concat)
    node.replace_input_with(1, concat.outputs[0])
    _set(state, node, label)


def _concat(state: State, node: ir.Node) -> None:
    labels = {label for value in node.inputs if value is not None and (label := state.labels.get(value))}
    if len(labels) != 1:
        raise _refuse(node, f"its inputs carry the batch differently ({sorted(labels, key=str)})")
    label = labels.pop()
    rank = len(state.shape(node.outputs[0]))
    if node.attributes["axis"].as_int() % rank == label.axis:
        raise _refuse(node, "concatenates along the batch axis")
    for index, value in enumerate(node.inputs):
        if value is None or value in state.labels:
            continue
        if state.shape(value)[label.axis] != 1:
            _shrink(state, node, index, label.axis, label)
        state.expand(node, index, label, rank)
    _set(state, node, label)


def _split(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    if _axis_of(state, node, 0) == label.axis:
        raise _refuse(node, "splits the batch axis")
    _set(state, node, label)


def _slice(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    starts, ends, axes, steps = (array_of(node, i) for i in (1, 2, 3, 4))
    if starts is None or ends is None or axes is None or steps is None:
        raise _refuse(node, "its bounds are computed")
    shape = state.shape(node.inputs[0])
    for position, axis in enumerate(int(a) % len(shape) for a in axes):
        if axis != label.axis:
            continue
        whole = state.shape(node.outputs[0])[axis] == shape[axis] and steps[position] == 1
        if not whole:
            raise _refuse(node, "slices the batch axis")
        ends = ends.copy().astype(np.int64)
        ends[position] = INT64_MAX
        starts = starts.copy().astype(np.int64)
        starts[position] = 0
        set_operand(state.graph, node, 1, starts)
        set_operand(state.graph, node, 2, ends)
    _set(state, node, label)


def _gather(state: State, node: ir.Node) -> None:
    data, indices = _label(state, node, 0), _label(state, node, 1)
    axis = _axis_of(state, node, 0)
    if data is not None and indices is not None:
        raise _refuse(node, "both its data and its indices carry the batch")
    if indices is not None:
        _set(state, node, indices.at(indices.axis + axis))
        return
    assert data is not None
    if data.axis == axis:
        raise _refuse(node, "gathers along the batch axis")
    rank = len(state.shape(node.inputs[1]))
    _set(state, node, data if data.axis < axis else data.at(data.axis + rank - 1))


def _pad(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    pads = array_of(node, 1)
    rank = len(state.shape(node.inputs[0]))
    if pads is None or pads[label.axis] or pads[rank + label.axis]:
        raise _refuse(node, "pads the batch axis")
    _set(state, node, label)


def _tile(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    repeats = array_of(node, 1)
    if repeats is None or repeats[label.axis] != 1:
        raise _refuse(node, "repeats the batch axis")
    _set(state, node, label)


def _trilu(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    if label.axis >= len(state.shape(node.inputs[0])) - 2:
        raise _refuse(node, "masks along the batch axis")
    _set(state, node, label)


def _resize(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    sizes = array_of(node, 3)
    shape = state.shape(node.inputs[0])
    axes = list(node.attributes.get_ints("axes", range(len(shape))))
    axes = [a % len(shape) for a in axes]
    if state.shape(node.outputs[0])[label.axis] != shape[label.axis]:
        raise _refuse(node, "resizes the batch axis")
    if sizes is not None and label.axis in axes:
        kept = [i for i, a in enumerate(axes) if state.shape(node.outputs[0])[a] != shape[a]]
        if not kept:
            kept = [i for i, a in enumerate(axes) if a != label.axis]
        node.attributes.add(ir.AttrInt64s("axes", [axes[i] for i in kept]))
        set_operand(state.graph, node, 3, np.asarray([sizes[i] for i in kept], np.int64))
    _set(state, node, label)


def _matmul(state: State, node: ir.Node) -> None:
    left, right = _label(state, node, 0), _label(state, node, 1)
    a, b, out = state.shape(node.inputs[0]), state.shape(node.inputs[1]), state.shape(node.outputs[0])
    if len(a) < 2 or len(b) < 2:
        if len(a) >= 2 and right is None and left is not None and left.axis < len(a) - 1:
            _set(state, node, left)
            return
        raise _refuse(node, "contracts the batch axis")
    if (left is not None and left.axis == len(a) - 1) or (right is not None and right.axis == len(b) - 2):
        raise _refuse(node, "contracts the batch axis")
    found: Label | None = None
    for label, shape in ((left, a), (right, b)):
        if label is None:
            continue
        aligned = label.at(label.axis + len(out) - len(shape))
        if found is not None and found != aligned:
            raise _refuse(node, f"its inputs carry the batch differently ({found} and {aligned})")
        found = aligned
    assert found is not None
    if left is not None and right is not None and found.axis >= len(out) - 2:
        raise _refuse(node, "multiplies the batch with itself")
    if found.axis < len(out) - 2:
        for index, (label, shape) in enumerate(((left, a), (right, b))):
            axis = found.axis - (len(out) - len(shape))
            if label is None and axis >= 0 and shape[axis] != 1:
                _shrink(state, node, index, axis, found)
    _set(state, node, found)


def _gemm(state: State, node: ir.Node) -> None:
    label = _only(state, node)
    if label.axis != (1 if node.attributes.get_int("transA", 0) else 0):
        raise _refuse(node, "contracts the batch axis")
    result = label.at(0)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        shape = state.shape(node.inputs[2])
        if len(shape) == 2 and shape[0] != 1:
            _shrink(state, node, 2, 0, result)
    _set(state, node, result)


def _einsum(state: State, node: ir.Node) -> None:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow or "." in equation:
        raise _refuse(node, f"the equation '{equation}' has an ellipsis or no explicit output")
    terms = left.split(",")
    found: tuple[str, Label] | None = None
    for term, value in zip(terms, node.inputs, strict=True):
        label = state.labels.get(value) if value is not None else None
        if label is None:
            continue
        letter = term[label.axis]
        if found is not None and (letter != found[0] or label.at(0) != found[1]):
            raise _refuse(node, "its inputs carry the batch differently")
        found = (letter, label.at(0))
    assert found is not None
    letter, label = found
    if right.count(letter) != 1 or any(t.count(letter) > 1 for t in terms):
        raise _refuse(node, "contracts the batch axis")
    for term, value in zip(terms, node.inputs, strict=True):
        if letter in term and value not in state.labels:
            raise _refuse(node, "a batch-independent input is indexed by the batch")
    _set(state, node, label.at(right.index(letter)))


def _dialect(state: State, node: ir.Node) -> None:
    """Functions of domain `sartor` keep the first input's batch axis: see `sartor.ir.dialect`."""
    _leading(state, node)


def _forbidden(state: State, node: ir.Node) -> None:
    raise _refuse(node, "no batch rule")


Rule = Callable[[State, ir.Node], None]
RULES: dict[str, Rule] = {
    **dict.fromkeys(table.ELEMENTWISE_UNARY, _same),
    **dict.fromkeys(table.ELEMENTWISE_BROADCAST, _broadcast),
    **dict.fromkeys(table.REDUCTIONS, _reduce),
    **dict.fromkeys(table.POOLS, _leading),
    **dict.fromkeys(
        ("Conv", "ConvTranspose", "GroupNormalization", "InstanceNormalization", "LRN"), _leading
    ),
    **dict.fromkeys(("ArgMax", "ArgMin", "CumSum", "Hardmax", "LogSoftmax", "Softmax", "TopK"), _along_axis),
    **dict.fromkeys(("Flatten", "Reshape"), _reshape),
    "LpNormalization": _along_axis,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Concat": _concat,
    "Einsum": _einsum,
    "Expand": _expand,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
