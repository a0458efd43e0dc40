"""Groups of nodes around a node that some runtimes execute as one kernel: see `sartor.ir.fusion_rules`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Shapes = Mapping[str, tuple[int, ...]]

_RENAMES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})


def operands_before(
    lead: ir.Node, shapes: Shapes, names: Collection[str]
) -> Iterator[tuple[str, list[ir.Node]]]:
    """What runs in front of `lead` inside its kernel: `Scale`, `Transpose` or `Add`, and the nodes of it."""
    if "Add before" in names and (added := _sum_before(lead, shapes)) is not None:
        yield "Add", [added]
    if not {"Transpose before", "Scale before"} & set(names):
        return
    for operand in lead.inputs[:2]:
        yield from _scaled_or_transposed(operand, shapes, names)


def _scaled_or_transposed(
    value: ir.Value | None, shapes: Shapes, names: Collection[str]
) -> Iterator[tuple[str, list[ir.Node]]]:
    passed: list[ir.Node] = []  # renamings on the way belong to what is found behind them
    while value is not None and (node := value.producer()) is not None:
        if len(list(value.uses())) != 1 or value.is_graph_output():
            return
        if "Scale before" in names and (source := _scaled(node, shapes)) is not None:
            yield "Scale", [*passed, node]
            passed, value = [], source
        elif "Transpose before" in names and node.op_type == "Transpose" and _swaps_last_two(node, shapes):
            yield "Transpose", [*passed, node]
            return
        elif node.op_type == "Reshape" and _keeps_last_two(node, shapes):
            passed.append(node)
            value = node.inputs[0]
        else:
            return


def _scaled(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    for index in (1,) if node.op_type == "Div" else (0, 1):
        factor, other = node.inputs[index], node.inputs[1 - index]
        if factor is not None and factor.is_initializer() and int(np.prod(shapes[factor.name or ""])) == 1:
            return other
    return None


def _swaps_last_two(node: ir.Node, shapes: Shapes) -> bool:
    rank = len(shapes[node.outputs[0].name or ""])
    perm = list(node.attributes.get_ints("perm", list(reversed(range(rank)))))
    return rank >= 2 and perm == [*range(rank - 2), rank - 1, rank - 2]


def _keeps_last_two(node: ir.Node, shapes: Shapes) -> bool:
    source = node.inputs[0]
    return source is not None and shapes[source.name or ""][-2:] == shapes[node.outputs[0].name or ""][-2:]


def _sum_before(lead: ir.Node, shapes: Shapes) -> ir.Node | None:
    value = lead.inputs[0]
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "Add" or len(list(value.uses())) != 1:
        return None
    named = [v.name or "" for v in node.inputs if v is not None and not v.is_initializer()]
    same = len(named) == 2 and shapes[named[0]] == shapes[named[1]]
    return node if same and len(shapes[named[0]]) == 3 and not value.is_graph_output() else None


def siblings(lead: ir.Node, shapes: Shapes) -> list[ir.Node]:
    """Slices or Gathers of one value, `lead` among them, that together take all of one axis; else none."""
    value = lead.inputs[0]
    if value is None:
        return []
    users = [use.node for use in value.uses() if use.node.op_type == lead.op_type and use.idx == 0]
    whole = shapes[value.name or ""]
    taken = [_part(node, whole) for node in users]
    known = [part for part in taken if part is not None]
    if len(users) < 2 or len(known) != len(users) or len({axis for axis, _, _ in known}) != 1:
        return []
    at = 0
    for _, start, end in sorted(known):
        if start != at:
            return []
        at = end
    return users if at == whole[known[0][0]] else []


def is_view(node: ir.Node, shapes: Shapes) -> bool:
    """Whether a node moves no data in a runtime that keeps images channel-last and cuts values in place."""
    if node.op_type == "Transpose":
        return list(node.attributes.get_ints("perm", [])) == [0, 3, 1, 2]
    value = node.inputs[0]
    if value is None or not siblings(node, shapes):
        return False
    whole = shapes[value.name or ""]
    part = _part(node, whole)
    return part is not None and all(length == 1 for length in whole[: part[0]])


def _part(node: ir.Node, whole: Sequence[int]) -> tuple[int, int, int] | None:
    """Axis, start and end of what a Slice or Gather takes; None if that is not one stretch of one axis."""
    values = [_constant(v) for v in node.inputs[1:]]
    if any(v is None or v.size != 1 for v in values):
        return None
    numbers = [int(v.reshape(-1)[0]) for v in values if v is not None]
    if node.op_type == "Gather":
        axis = node.attributes.get_int("axis", 0) % len(whole)
        index = numbers[0] % whole[axis]
        return axis, index, index + 1
    if node.op_type != "Slice" or (len(numbers) > 3 and numbers[3] != 1):
        return None
    axis = (numbers[2] if len(numbers) > 2 else 0) % len(whole)
    start, end, _ = slice(numbers[0], numbers[1]).indices(whole[axis])
    return axis, start, end


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def attention(lead: ir.Node, shapes: Shapes) -> tuple[list[ir.Node], list[ir.Node]]:
    """An attention whose first product is `lead`: what is in front of it, and `lead` with what is behind.

    Behind are an optional scale and mask, Softmax, the second product and its Transpose. In front are a scale and the
    Transposes that separate heads; none, if a Reshape lies between. Both are empty if `lead` is no such product.
    """
    if lead.op_type != "MatMul" or any(v is None or v.is_initializer() for v in lead.inputs):
        return [], []
    behind, value = [lead], lead.outputs[0]
    while (use := _only_use(value)) is not None:
        node, masked = use.node, any(n.op_type == "Add" for n in behind)
        if node.op_type == "MatMul" and behind[-1].op_type == "Softmax" and use.idx == 0:
            operands = (*lead.inputs, node.inputs[1])
            front = [one for operand in operands for one in _heads(operand, shapes)]
            last = _only_use(node.outputs[0])
            merged = [last.node] if last is not None and last.node.op_type == "Transpose" else []
            return front, [*behind, node, *merged]
        scale = behind == [lead] and _scaled(node, shapes) is value
        if not scale and node.op_type not in _RENAMES | {"Softmax"} and (node.op_type != "Add" or masked):
            break
        behind.append(node)
        value = node.outputs[0]
    return [], []


def _only_use(value: ir.Value) -> Any:
    uses = list(value.uses())
    return uses[0] if len(uses) == 1 and not value.is_graph_output() else None


def _heads(value: ir.Value | None, shapes: Shapes) -> list[ir.Node]:
    """A scale and a Transpose in front of a product's operand."""
    found: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and _only_use(value) is not None:
        scaled = _scaled(node, shapes)
        if scaled is not None:
            found.append(node)
            value = scaled
            continue
        if node.op_type == "Transpose" and (_swaps_last_two(node, shapes) or _swaps_heads(node)):
            return [*found, node]
        break
    return []


def _swaps_heads(node: ir.Node) -> bool:
    return list(node.attributes.get_ints("perm", [])) == [0, 2, 1, 3]
