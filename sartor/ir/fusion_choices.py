"""What runs inside a kernel under some plans only: ONNX Runtime's blocked layout decides, and widths decide on that."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sartor.ir.fusion import Partition
from sartor.ir.fusion_layout import takes_activation
from sartor.ir.fusion_rules import FusionRules
from sartor.ir.program import Program


@dataclasses.dataclass(frozen=True)
class Choice:
    """A sum or an activation that runs inside a kernel under some plans, and is a kernel of its own under others.

    Attributes:
        op_type: operator.
        output: name of its output.
        kernels: per kernel that may take it, in execution order: operator and output of the leading node and, of a
            sum, the other operand.
        behind: output of the sum that an activation follows, if that is itself a choice: whatever takes the sum may
            take the activation.
        first: of a sum, number of the kernel that makes its first operand; None where that cannot take it.
    """

    op_type: str
    output: str
    kernels: tuple[tuple[str, str, str], ...]
    behind: str = ""
    first: int | None = None


def apart(choices: Sequence[Choice], blocked: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Which of them are kernels of their own, by output: bools or bool arrays `[plans]`.

    Args:
        choices: of one program, in execution order.
        blocked: as `states` says.
    """
    never = np.False_
    found: dict[str, np.ndarray] = {}
    owners: dict[str, np.ndarray] = {}  # whether what takes a sum runs in the blocked layout
    for choice in choices:
        if choice.op_type == "Add":
            inside: Any = never
            owner: Any = never
            for _, lead, other in choice.kernels:  # of two the later one, but see below
                mine = blocked.get(lead, never)
                takes = ~mine | blocked.get(other, never)
                inside, owner = inside | takes, np.where(takes, mine, owner)
            if choice.first is not None:
                _, lead, other = choice.kernels[choice.first]
                owner = owner | (blocked.get(lead, never) & blocked.get(other, never))
            owners[choice.output] = owner
        elif choice.behind:
            taken = takes_activation(choice.op_type, "Conv", blocked=owners[choice.behind], after_sum=True)
            inside = ~found[choice.behind] & taken
        else:
            ((operator, lead, _),) = choice.kernels
            inside = takes_activation(
                choice.op_type, operator, blocked=blocked.get(lead, never), after_sum=False
            )
        found[choice.output] = ~np.asarray(inside, bool)
    return found


def choices(
    program: Program, blocks_of: Mapping[str, tuple[str, ...]], rules: FusionRules
) -> list[tuple[ir.Node, Choice]]:
    """Nodes of which the layout decides whether they run inside another kernel, in execution order."""
    if not rules.has_layout:
        return []
    asked: dict[ir.Node, dict[ir.Node, None]] = {}
    every = frozenset(v.name or "" for node in program.nodes() for v in node.outputs)
    for blocked in (every, frozenset[str]()):  # what takes a sum decides which activations are asked for
        one = Partition(program, blocks_of, rules, blocked)
        one.groups()
        for node, leads in one.asked.items():
            asked.setdefault(node, {}).update(leads)
    asked = {node: leads for node, leads in asked.items() if _depends(node, leads, asked)}
    order = {node: i for i, node in enumerate(program.nodes())}
    return [
        (node, _choice(node, sorted(asked[node], key=order.__getitem__), asked))
        for node in sorted(asked, key=order.__getitem__)
    ]


def _choice(node: ir.Node, leads: Sequence[ir.Node], asked: Mapping[ir.Node, Any]) -> Choice:
    name = _output(node)
    if node.op_type != "Add":
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        kernels = tuple((lead.op_type, _output(lead), "") for lead in leads)
        return Choice(node.op_type, name, kernels, _output(before) if before in asked else "")
    first, second = node.inputs
    makes_first = [_makes(lead, first) for lead in leads]
    others = [second if makes else first for makes in makes_first]
    kernels = tuple(
        (lead.op_type, _output(lead), (other.name or "") if other is not None else "")
        for lead, other in zip(leads, others, strict=True)
    )
    return Choice("Add", name, kernels, first=makes_first.index(True) if True in makes_first else None)


def _depends(node: ir.Node, leads: Collection[ir.Node], asked: Collection[ir.Node]) -> bool:
    """Whether the answer can be no."""
    if node.op_type == "Add" or (node.inputs[0] is not None and node.inputs[0].producer() in asked):
        return True
    return not all(takes_activation(node.op_type, n.op_type, blocked=False, after_sum=False) for n in leads)


def _output(node: ir.Node | None) -> str:
    return (node.outputs[0].name or "") if node is not None else ""


def _makes(lead: ir.Node, value: ir.Value | None) -> bool:
    """Whether `lead` makes `value`, or what is normalised to it."""
    while value is not None and (producer := value.producer()) is not None:
        if producer is lead:
            return True
        made = [v for v in producer.inputs if v is not None and not v.is_initializer()]
        if producer.op_type not in ("BatchNormalization", "Add") or len(made) != 1:  # a bias is added, too
            return False
        (value,) = made
    return False
