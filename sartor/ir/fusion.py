"""Which nodes runtimes execute as one kernel.

Conv, ConvTranspose, Gemm and MatMul take in what follows them: BatchNormalization (it folds into the
weights), a bias, a residual Add, one activation. ONNX Runtime and OpenVINO both do this on CPUs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sartor.ir.program import Program

CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ACTIVATIONS = frozenset(
    {"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "Celu"}
    | {"Gelu", "Softplus", "Softsign", "Mish", "ThresholdedRelu"}
)
_GATED = {"Sigmoid": "Silu", "HardSigmoid": "HardSwish"}


@dataclasses.dataclass(frozen=True)
class Fused:
    """One operation that runs inside a contraction: `Relu`, `Clip`, `Add` (residual), `Bias`, `Silu`…"""

    op_type: str
    attributes: tuple[tuple[str, Any], ...] = ()


def partition(
    program: Program, blocks_of: Mapping[str, tuple[str, ...]] | None = None
) -> list[tuple[list[ir.Node], tuple[Fused, ...]]]:
    """Nodes of the main graph grouped as runtimes fuse them; each node is in exactly one group.

    A node that belongs to a removable block which does not contain the leading node is not fused.
    """
    blocks_of = blocks_of or {}
    order = {node: i for i, node in enumerate(program.nodes())}
    shapes = program.shapes()
    taken: set[ir.Node] = set()
    groups: dict[int, tuple[list[ir.Node], tuple[Fused, ...]]] = {}
    # From the back: a residual Add goes to whichever of its two convolutions runs last.
    for node in sorted(order, key=order.__getitem__, reverse=True):
        if node.op_type in CONTRACTIONS:
            groups[order[node]] = _grow(node, order, shapes, taken, blocks_of)
    for node, index in order.items():
        if node not in taken:
            groups[index] = ([node], ())
    return [groups[i] for i in sorted(groups)]


def _grow(
    lead: ir.Node,
    order: Mapping[ir.Node, int],
    shapes: Mapping[str, tuple[int, ...]],
    taken: set[ir.Node],
    blocks_of: Mapping[str, tuple[str, ...]],
) -> tuple[list[ir.Node], tuple[Fused, ...]]:
    allowed = set(blocks_of.get(lead.name or "", ()))
    nodes: list[ir.Node] = [lead]
    fused: list[Fused] = []
    seen: set[str] = set()
    value = lead.outputs[0]
    while not value.is_graph_output():
        step = _next(lead, value, order, shapes, seen)
        if step is None:
            break
        stage, added, entry = step
        if any(n in taken or not allowed.issuperset(blocks_of.get(n.name or "", ())) for n in added):
            break
        seen.add(stage)
        nodes.extend(added)
        fused.extend(entry)
        value = added[-1].outputs[0]
        if stage == "activation":
            break
    taken.update(nodes)
    return nodes, tuple(fused)


def _next(
    lead: ir.Node,
    value: ir.Value,
    order: Mapping[ir.Node, int],
    shapes: Mapping[str, tuple[int, ...]],
    seen: set[str],
) -> tuple[str, list[ir.Node], list[Fused]] | None:
    """The operation behind `value` that runs inside `lead`'s kernel: (stage, nodes, what it adds)."""
    users = list(dict.fromkeys(use.node for use in value.uses()))
    if any(user not in order for user in users):  # used inside a subgraph
        return None
    if len(users) == 2:
        gate, product = sorted(users, key=order.__getitem__)
        ends = gate.op_type in _GATED and product.op_type == "Mul" and gate.outputs[0] in product.inputs
        if ends and len(list(gate.outputs[0].uses())) == 1 and not gate.outputs[0].is_graph_output():
            entry = Fused(_GATED[gate.op_type], tuple(sorted(json_attributes(gate).items())))
            return "activation", [gate, product], [entry]
    if len(users) != 1 or len(list(value.uses())) != 1:
        return None
    (node,) = users
    if node.op_type == "BatchNormalization" and "norm" not in seen and not seen & {"residual"}:
        return ("norm", [node], []) if lead.op_type != "MatMul" else None
    if node.op_type in ACTIVATIONS and node.inputs[0] is value:
        bounds = {}
        for key, operand in zip(("min", "max"), node.inputs[1:], strict=False):
            if operand is not None and operand.const_value is None:
                return None
            if operand is not None:
                bounds[key] = float(operand.const_value.numpy())
        entry = Fused(node.op_type, tuple(sorted({**json_attributes(node), **bounds}.items())))
        return "activation", [node], [entry]
    if node.op_type == "Add":
        other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
        if other is None or shapes[node.outputs[0].name or ""] != shapes[value.name or ""]:
            return None
        if other.is_initializer():
            row = math.prod(shapes[other.name or ""]) == shapes[value.name or ""][-1]
            usable = lead.op_type in ("Gemm", "MatMul") and row and not seen
            return ("bias", [node], [Fused("Bias")]) if usable else None
        producer = other.producer()
        ready = producer is None or order.get(producer, len(order)) < order[lead]
        same = shapes[other.name or ""] == shapes[value.name or ""]
        if ready and same and "residual" not in seen:
            return "residual", [node], [Fused("Add")]
    return None


def json_attributes(node: ir.Node) -> dict[str, Any]:
    """Attributes of a node as JSON values; graphs are left out, tensors become nested lists."""
    result: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attribute.value is None:
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            result[name] = attribute.as_tensor().numpy().tolist()
        elif isinstance(attribute.value, (int, float, str)):
            result[name] = attribute.value
        elif isinstance(attribute.value, Sequence):
            result[name] = [v for v in attribute.value if isinstance(v, (int, float, str))]
    return result
