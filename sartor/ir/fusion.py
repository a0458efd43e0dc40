"""Which nodes runtimes execute as one kernel.

The kernel of a Conv, ConvTranspose, Gemm or MatMul takes in what follows it: BatchNormalization (it folds into the
weights), a bias, a residual Add, one activation. What exactly is a table of the runtime, `FusionRules`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sartor.ir.bodies import body_graphs
from sartor.ir.fusion_layout import blocked_values, takes_activation
from sartor.ir.fusion_patterns import attention, is_view, operands_before, siblings
from sartor.ir.fusion_rules import ACTIVATIONS, CONTRACTIONS, ELEMENTWISE, GATED, GENERIC, FusionRules
from sartor.ir.program import Program

_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"})
_SUMS = ("Add", "BlockedAdd", "InPlaceAdd")


@dataclasses.dataclass(frozen=True)
class Fused:
    """One operation that runs inside a kernel: `Relu`, `Clip`, `Add` (residual), `Bias`, `Silu`…"""

    op_type: str
    attributes: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Nodes that run as one kernel.

    Attributes:
        lead: the node that the kernel is named after.
        nodes: all of them, in execution order.
        after: what runs inside, behind the lead; BatchNormalization folds away and is not listed.
        before: what runs inside, in front of the lead: `Transpose`, `Scale`, `Add`.
    """

    lead: ir.Node
    nodes: tuple[ir.Node, ...]
    after: tuple[Fused, ...] = ()
    before: tuple[Fused, ...] = ()


def partition(
    program: Program,
    blocks_of: Mapping[str, tuple[str, ...]] | None = None,
    rules: FusionRules = GENERIC,
) -> list[Group]:
    """Nodes of the main graph grouped as a runtime fuses them, in execution order of their leads.

    Each node is in exactly one group, but those that depend on no input are in none if the rules fold constants, and
    those that the rules call views.
    A node that belongs to a removable block which does not contain the lead is not fused.
    """
    blocked = blocked_values(program) if rules.has_layout else frozenset()
    return Partition(program, blocks_of or {}, rules, blocked).groups()


class Partition:
    """Groups the nodes of one program, with given values in the blocked layout."""

    def __init__(
        self,
        program: Program,
        blocks_of: Mapping[str, tuple[str, ...]],
        rules: FusionRules,
        blocked: Collection[str],
    ):
        self.asked: dict[ir.Node, dict[ir.Node, None]] = {}
        """Nodes of which the layout decided whether a kernel takes them, and the leads of those kernels."""
        self._order = {node: i for i, node in enumerate(program.nodes())}
        self._shapes = program.shapes()
        self._blocks_of, self._rules = blocks_of, rules
        self._taken: set[ir.Node] = set()
        self._found: dict[int, Group] = {}
        self._constant = constant_nodes(program) if rules.folds_constants else frozenset()
        self._blocked = blocked

    def groups(self) -> list[Group]:
        """All groups."""
        self._taken.update(self._constant)
        self._taken.update(n for n in self._order if self._is_view(n))
        nodes = sorted(self._order, key=self._order.__getitem__)
        if any(self._rules.takes(op, "Attention") for op in CONTRACTIONS):
            for node in nodes:
                self._attention(node)
        # From the back: a residual Add goes to whichever of its two convolutions runs last.
        for node in reversed(nodes):
            if node.op_type in CONTRACTIONS and node not in self._taken:
                self._grow(node)
        for node in nodes:
            if node not in self._taken and node.op_type in self._rules.fuses:
                self._grow(node)
        for node in nodes:
            if node not in self._taken:
                self._elementwise(node)
        return [self._found[i] for i in sorted(self._found)]

    def _is_view(self, node: ir.Node) -> bool:
        return self._rules.takes(node.op_type, "Views") and is_view(node, self._shapes)

    def _add(self, group: Group) -> None:
        self._taken.update(group.nodes)
        self._found[self._order[group.lead]] = group

    def _may_join(self, lead: ir.Node, nodes: Sequence[ir.Node]) -> bool:
        allowed = set(self._blocks_of.get(lead.name or "", ()))
        inside = all(allowed.issuperset(self._blocks_of.get(n.name or "", ())) for n in nodes)
        return inside and all(n in self._order and n not in self._taken for n in nodes)

    def _ask(self, lead: ir.Node, node: ir.Node) -> None:
        allowed = set(self._blocks_of.get(lead.name or "", ()))
        if allowed.issuperset(self._blocks_of.get(node.name or "", ())) and node not in self._constant:
            self.asked.setdefault(node, {})[lead] = None

    def _attention(self, lead: ir.Node) -> None:
        if not self._rules.takes(lead.op_type, "Attention") or lead in self._taken:
            return
        front, behind = attention(lead, self._shapes)
        if behind and self._may_join(lead, [*front, *behind]):
            nodes = sorted([*front, *behind], key=self._order.__getitem__)
            before = tuple(Fused("Scale" if node.op_type == "Mul" else node.op_type) for node in front)
            self._add(Group(lead, tuple(nodes), tuple(Fused(node.op_type) for node in behind[1:]), before))

    def _elementwise(self, lead: ir.Node) -> None:
        """A chain of elementwise operators, or the node alone."""
        row = self._rules.fuses.get(ELEMENTWISE, frozenset())
        nodes: list[ir.Node] = [lead]
        fused: list[Fused] = []
        while lead.op_type in row and (step := self._next_elementwise(nodes, row)):
            nodes.extend(step)
            fused.extend(Fused(n.op_type, _attributes(n)) for n in step)
        self._add(Group(lead, tuple(nodes), tuple(fused)))

    def _next_elementwise(self, nodes: Sequence[ir.Node], row: frozenset[str]) -> list[ir.Node]:
        value = nodes[-1].outputs[0]
        if value.is_graph_output():
            return []
        gated = self._gate(value)
        if gated is not None and {n.op_type for n in gated} <= row and self._may_join(nodes[0], gated):
            return list(gated)
        users = [use.node for use in value.uses()]
        if len(users) != 1 or users[0].op_type not in row or not self._may_join(nodes[0], users):
            return []
        others = [v for v in users[0].inputs if v is not None and v is not value]
        return users if all(self._ready(v, nodes[0]) for v in others) else []

    def _ready(self, value: ir.Value, lead: ir.Node) -> bool:
        producer = value.producer()
        return producer is None or producer in self._constant or self._order[producer] < self._order[lead]

    def _grow(self, lead: ir.Node) -> None:
        rules = self._rules
        if rules.takes(lead.op_type, "Siblings"):
            together = [n for n in siblings(lead, self._shapes) if n in self._order]
            if together and self._may_join(lead, together):
                ordered = sorted(together, key=self._order.__getitem__)
                self._add(Group(ordered[0], tuple(ordered)))
                return
        names = rules.fuses.get(lead.op_type, frozenset())
        front = [
            (kind, nodes)
            for kind, nodes in operands_before(lead, self._shapes, names)
            if self._may_join(lead, nodes)
        ]
        ahead = [node for _, nodes in front for node in nodes]
        nodes: list[ir.Node] = [*sorted(dict.fromkeys(ahead), key=self._order.__getitem__), lead]
        fused: list[Fused] = []
        seen: set[str] = set()
        value = lead.outputs[0]
        while not value.is_graph_output():
            step = self._next(lead, value, seen)
            if step is None or not self._may_join(lead, step[1]):
                break
            stage, added, entry = step
            seen.add(stage)
            nodes.extend(added)
            fused.extend(entry)
            value = added[-1].outputs[0]
            if stage == "activation" and not rules.takes(lead.op_type, "Chain"):
                break
        if len(nodes) > 1 or lead.op_type in CONTRACTIONS:
            self._add(Group(lead, tuple(nodes), tuple(fused), tuple(Fused(kind) for kind, _ in front)))

    def _gate(self, value: ir.Value) -> tuple[ir.Node, ir.Node] | None:
        """The two nodes of x * gate(x) behind `value`, if nothing else reads it."""
        users = list(dict.fromkeys(use.node for use in value.uses()))
        if len(users) != 2 or any(user not in self._order for user in users):
            return None
        gate, product = sorted(users, key=self._order.__getitem__)
        ends = gate.op_type in GATED and product.op_type == "Mul" and gate.outputs[0] in product.inputs
        if ends and len(list(gate.outputs[0].uses())) == 1 and not gate.outputs[0].is_graph_output():
            return gate, product
        return None

    def _next(
        self, lead: ir.Node, value: ir.Value, seen: set[str]
    ) -> tuple[str, list[ir.Node], list[Fused]] | None:
        """The operation behind `value` that runs inside `lead`'s kernel: (stage, nodes, what it adds)."""
        if lead.op_type in GATED and self._rules.takes(lead.op_type, GATED[lead.op_type]):
            return self._product_of_gate(lead, value)
        users = list(dict.fromkeys(use.node for use in value.uses()))
        if any(user not in self._order for user in users):  # used inside a subgraph
            return None
        gated = self._gate(value)
        if gated is not None and self._rules.takes(lead.op_type, GATED[gated[0].op_type]):
            return "activation", list(gated), [Fused(GATED[gated[0].op_type], _attributes(gated[0]))]
        if len(users) != 1 or len(list(value.uses())) != 1:
            return None
        (node,) = users
        if node.op_type == "Add":
            return self._addition(lead, node, value, seen)
        if node.op_type == "Mul" and self._rules.takes(lead.op_type, "Scale"):
            factor = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
            return ("scale", [node], [Fused("Scale")]) if self._per_channel(factor, value, lead) else None
        if node.op_type == "Mul" and self._rules.takes(lead.op_type, "Scale behind"):
            factor = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
            one = factor is not None and math.prod(self._shapes[factor.name or ""]) == 1
            return (
                ("scale", [node], [Fused("Scale")])
                if one and self._per_channel(factor, value, lead)
                else None
            )
        if not self._rules.takes(lead.op_type, node.op_type):
            return None
        if node.op_type == "BatchNormalization":
            return ("norm", [node], []) if not seen & {"norm", "residual"} else None
        if node.op_type in ACTIVATIONS and node.inputs[0] is value:
            if self._rules.has_layout and lead.op_type in ("Conv", "BatchNormalization"):
                blocked, behind = (lead.outputs[0].name or "") in self._blocked, "residual" in seen
                self._ask(lead, node)
                if not takes_activation(node.op_type, lead.op_type, blocked=blocked, after_sum=behind):
                    return None
            bounds = {}
            for key, operand in zip(("min", "max"), node.inputs[1:], strict=False):
                if operand is not None and operand.const_value is None:
                    return None
                if operand is not None:
                    bounds[key] = float(operand.const_value.numpy().item())  # of no axis, or of one
            entry = Fused(node.op_type, tuple(sorted({**json_attributes(node), **bounds}.items())))
            return "activation", [node], [entry]
        return None

    def _product_of_gate(
        self, lead: ir.Node, value: ir.Value
    ) -> tuple[str, list[ir.Node], list[Fused]] | None:
        users = [use.node for use in value.uses()]
        if len(users) == 1 and users[0].op_type == "Mul" and lead.inputs[0] in users[0].inputs:
            return "activation", users, [Fused(GATED[lead.op_type])]
        return None

    def _addition(
        self, lead: ir.Node, node: ir.Node, value: ir.Value, seen: set[str]
    ) -> tuple[str, list[ir.Node], list[Fused]] | None:
        """A bias or a residual sum."""
        shape = self._shapes[value.name or ""]
        other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
        if other is None or self._shapes[node.outputs[0].name or ""] != shape:
            return None
        if other.is_initializer():
            first = not seen or self._rules.takes(lead.op_type, "Chain")
            usable = (
                first and self._per_channel(other, value, lead) and self._rules.takes(lead.op_type, "Bias")
            )
            return ("bias", [node], [Fused("Bias")]) if usable else None
        if self._shapes[other.name or ""] != shape or "residual" in seen:
            return None
        how = next((name for name in _SUMS if self._rules.takes(lead.op_type, name)), None)
        if how is None or not self._summable(how, lead, node, other):
            return None
        return "residual", [node], [Fused("Add")]

    def _per_channel(self, constant: ir.Value | None, value: ir.Value, lead: ir.Node) -> bool:
        """Whether `constant` is stored, and is one number or one per channel of `value`."""
        if constant is None or not constant.is_initializer():
            return False
        dims, shape = self._shapes[constant.name or ""], self._shapes[value.name or ""]
        count = math.prod(dims)
        if lead.op_type in ("Gemm", "MatMul"):
            return count in (1, shape[-1]) and len(dims) <= len(shape)
        padded = (1,) * (len(shape) - len(dims)) + dims
        return count == 1 or (len(padded) == len(shape) and padded[1] == shape[1] == count)

    def _summable(self, how: str, lead: ir.Node, node: ir.Node, other: ir.Value) -> bool:
        if how == "BlockedAdd":
            self._ask(lead, node)
        if not self._rules.first_operand:
            producer = other.producer()
            return producer is None or self._order.get(producer, len(self._order)) < self._order[lead]
        if other is node.inputs[0] and self._could_take(other, how, node):
            return False
        if how == "BlockedAdd":
            if (lead.outputs[0].name or "") in self._blocked:
                return (other.name or "") in self._blocked
            return lead.op_type == "Conv"
        if how == "InPlaceAdd":
            later = [use.node for use in other.uses() if use.node is not node]
            return all(self._order.get(n, len(self._order)) < self._order[node] for n in later)
        return True

    def _could_take(self, value: ir.Value, how: str, node: ir.Node) -> bool:
        """Whether the kernel that makes `value` is one that takes a sum in, so that this Add is its own."""
        if len(list(value.uses())) != 1 or value.is_graph_output():
            return False
        producer = value.producer()
        if producer is not None and producer.op_type == "BatchNormalization":
            value = producer.inputs[0]  # type: ignore[assignment]
            if len(list(value.uses())) != 1:
                return False
            producer = value.producer()
        if producer is None or producer.op_type not in CONTRACTIONS:
            return False
        both = all(
            (v.name or "") in self._blocked for v in (producer.outputs[0], node.inputs[1]) if v is not None
        )
        return self._rules.takes(producer.op_type, how) and (how != "BlockedAdd" or both)


def constant_nodes(program: Program) -> frozenset[ir.Node]:
    """Nodes of the main graph that depend on no input but for its shape, which is known when a model is loaded."""
    constant: set[ir.Node] = set()
    for node in program.nodes():
        if body_graphs(node) or node.op_type in _RANDOM:
            continue
        known = all(
            v is None or v.is_initializer() or (v.producer() is not None and v.producer() in constant)
            for v in node.inputs
        )
        if known or node.op_type in ("Shape", "Size"):
            constant.add(node)
    return frozenset(constant)


def _attributes(node: ir.Node) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(json_attributes(node).items()))


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
