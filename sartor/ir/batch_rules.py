"""One rule per operator: how the batch label moves, and which constants must be rewritten for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sartor.ir import batch_movement as movement
from sartor.ir import canonicalize as table
from sartor.ir.batch_state import Label, Refusal, State, axis_of, label_of, mark, only, refuse, shrink
from sartor.ir.cleanup import array_of


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
            movement.expand_independent(state, node)
        return
    rule = RULES.get(node.op_type) if node.domain == "" else None
    if node.domain != "" and (node.op_identifier() in state.program.model.functions):
        rule = _dialect
    if rule is None:
        captured = node.op_type == "If" and not labelled
        raise refuse(node, "captures values that may depend on the batch" if captured else "no batch rule")
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
        shrink(state, node, index, label.axis, label)
        state.expand(node, index, label, array.ndim)
        found = True
    return found


def _same(state: State, node: ir.Node) -> None:
    mark(state, node, only(state, node))


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
            raise refuse(node, f"its inputs carry the batch differently ({found} and {aligned})")
        found = aligned
    assert found is not None
    for index, value in enumerate(node.inputs):
        if value is None or value in state.labels:
            continue
        shape = state.shape(value)
        axis = found.axis - (rank - len(shape))
        if axis >= 0 and shape[axis] != 1:
            shrink(state, node, index, axis, found)
    mark(state, node, found)


def _along_axis(state: State, node: ir.Node) -> None:
    label = only(state, node)
    if node.op_type == "CumSum":
        axes = array_of(node, 1)
        axis = (
            int(np.asarray(axes).reshape(-1)[0]) % len(state.shape(node.inputs[0]))
            if axes is not None
            else -1
        )
    else:
        axis = axis_of(state, node, 0 if node.op_type in ("ArgMax", "ArgMin") else -1)
    if axis in (label.axis, -1):
        raise refuse(node, "works along the batch axis")
    if (
        node.op_type in ("ArgMax", "ArgMin")
        and not node.attributes.get_int("keepdims", 1)
        and axis < label.axis
    ):
        label = label.at(label.axis - 1)
    mark(state, node, label)


def _reduce(state: State, node: ir.Node) -> None:
    label = only(state, node)
    rank = len(state.shape(node.inputs[0]))
    axes = array_of(node, 1)
    if axes is None:
        raise refuse(node, "reduces over all axes, the batch included")
    reduced = {int(a) % rank for a in axes}
    if label.axis in reduced:
        raise refuse(node, "reduces over the batch axis")
    if not node.attributes.get_int("keepdims", 1):
        label = label.at(label.axis - sum(1 for a in reduced if a < label.axis))
    mark(state, node, label)


def _leading(state: State, node: ir.Node) -> None:
    """Operators whose axis 0 is the batch by definition: convolution, pooling, normalisation."""
    label = only(state, node)
    if label.axis != 0:
        raise refuse(
            node, f"the batch is on axis {label.axis}, and this operator is independent only along axis 0"
        )
    mark(state, node, label)


def _batch_norm(state: State, node: ir.Node) -> None:
    label = only(state, node)
    if label.axis == 1:
        raise refuse(node, "the batch lies on the channel axis")
    mark(state, node, label)


def _quantize(state: State, node: ir.Node) -> None:
    """QuantizeLinear and DequantizeLinear: a scale for all, or one per index of an axis."""
    label = only(state, node)
    scale = node.inputs[1]
    if scale is None or scale in state.labels:
        raise refuse(node, "its scale depends on the batch")
    shape = state.shape(scale)
    if np.prod(shape, dtype=np.int64) != 1 and axis_of(state, node, 1) == label.axis:
        raise refuse(node, "has a scale per sample")
    mark(state, node, label)


def _layer_norm(state: State, node: ir.Node) -> None:
    label = only(state, node)
    if label.axis >= axis_of(state, node, -1):
        raise refuse(node, "normalises over the batch axis")
    mark(state, node, label)


def _matmul(state: State, node: ir.Node) -> None:
    left, right = label_of(state, node, 0), label_of(state, node, 1)
    a, b, out = state.shape(node.inputs[0]), state.shape(node.inputs[1]), state.shape(node.outputs[0])
    if len(a) < 2 or len(b) < 2:
        if len(a) >= 2 and right is None and left is not None and left.axis < len(a) - 1:
            mark(state, node, left)
            return
        raise refuse(node, "contracts the batch axis")
    if (left is not None and left.axis == len(a) - 1) or (right is not None and right.axis == len(b) - 2):
        raise refuse(node, "contracts the batch axis")
    found: Label | None = None
    for label, shape in ((left, a), (right, b)):
        if label is None:
            continue
        aligned = label.at(label.axis + len(out) - len(shape))
        if found is not None and found != aligned:
            raise refuse(node, f"its inputs carry the batch differently ({found} and {aligned})")
        found = aligned
    assert found is not None
    if left is not None and right is not None and found.axis >= len(out) - 2:
        raise refuse(node, "multiplies the batch with itself")
    if found.axis < len(out) - 2:
        for index, (label, shape) in enumerate(((left, a), (right, b))):
            axis = found.axis - (len(out) - len(shape))
            if label is None and axis >= 0 and shape[axis] != 1:
                shrink(state, node, index, axis, found)
    mark(state, node, found)


def _gemm(state: State, node: ir.Node) -> None:
    label = only(state, node)
    if label.axis != (1 if node.attributes.get_int("transA", 0) else 0):
        raise refuse(node, "contracts the batch axis")
    result = label.at(0)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        shape = state.shape(node.inputs[2])
        if len(shape) == 2 and shape[0] != 1:
            shrink(state, node, 2, 0, result)
    mark(state, node, result)


def _einsum(state: State, node: ir.Node) -> None:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow or "." in equation:
        raise refuse(node, f"the equation '{equation}' has an ellipsis or no explicit output")
    terms = left.split(",")
    found: tuple[str, Label] | None = None
    for term, value in zip(terms, node.inputs, strict=True):
        label = state.labels.get(value) if value is not None else None
        if label is None:
            continue
        letter = term[label.axis]
        if found is not None and (letter != found[0] or label.at(0) != found[1]):
            raise refuse(node, "its inputs carry the batch differently")
        found = (letter, label.at(0))
    assert found is not None
    letter, label = found
    if right.count(letter) != 1 or any(t.count(letter) > 1 for t in terms):
        raise refuse(node, "contracts the batch axis")
    for term, value in zip(terms, node.inputs, strict=True):
        if letter in term and value not in state.labels:
            raise refuse(node, "a batch-independent input is indexed by the batch")
    mark(state, node, label.at(right.index(letter)))


def _dialect(state: State, node: ir.Node) -> None:
    """Functions of domain `sartor` keep the first input's batch axis: see `sartor.ir.dialect`."""
    _leading(state, node)


Rule = Callable[[State, ir.Node], None]
RULES: dict[str, Rule] = {
    **dict.fromkeys(table.ELEMENTWISE_UNARY, _same),
    **dict.fromkeys(table.ELEMENTWISE_BROADCAST, _broadcast),
    **dict.fromkeys(table.REDUCTIONS, _reduce),
    **dict.fromkeys(table.POOLS, _leading),
    **dict.fromkeys(
        ("Col2Im", "Conv", "ConvTranspose", "GroupNormalization", "InstanceNormalization", "LRN"), _leading
    ),
    **dict.fromkeys(("ArgMax", "ArgMin", "CumSum", "Hardmax", "LogSoftmax", "Softmax", "TopK"), _along_axis),
    **dict.fromkeys(("Flatten", "Reshape"), movement.reshape),
    "LpNormalization": _along_axis,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Concat": movement.concat,
    "Einsum": _einsum,
    "Expand": movement.expand,
    "Gather": movement.gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "DequantizeLinear": _quantize,
    "Pad": movement.pad,
    "QuantizeLinear": _quantize,
    "Resize": movement.resize,
    "Slice": movement.slice_,
    "Split": movement.split,
    "Squeeze": movement.squeeze,
    "Tile": movement.tile,
    "Transpose": movement.transpose,
    "Trilu": movement.trilu,
    "Unsqueeze": movement.unsqueeze,
}
