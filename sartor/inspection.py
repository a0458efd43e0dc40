"""What a program consists of, as the document `sartor.inspect/1`."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sartor.ir.program import Program

SCHEMA = "sartor.inspect/1"


def inspect_program(program: Program, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Operators, cost, channel groups, blocked axes and residual blocks.

    `macs_share` of a group is the share of all MACs in work that scales with the group's width; groups
    overlap (a convolution scales with its input and its output), so shares do not add up to one.

    Args:
        program: canonical program; costs are taken at its reference shapes.
        keep: globs of parameters and nodes that are not pruned.

    Raises:
        UsageError: a glob matches nothing.
    """
    from sartor.cost_models.static import static_cost
    from sartor.ir.blocks import residual_blocks
    from sartor.ir.channels import channel_groups
    from sartor.ir.workload import build_workload

    analysis = channel_groups(program, keep)
    blocks = residual_blocks(program)
    cost = static_cost(program)
    kernels = build_workload(program, analysis.extents).kernels
    total = sum(kernel.macs.full for kernel in kernels) or 1.0

    shares: dict[str, float] = collections.defaultdict(float)
    for kernel in kernels:
        for group in kernel.macs.groups:
            shares[group] += (kernel.macs.full - float(kernel.macs.evaluate({group: 0.0}))) / total
    kernel_of = {node: kernel for kernel in kernels for node in kernel.nodes}

    def within(nodes: Iterable[str]) -> float:
        inside = set(nodes)
        found = {kernel_of[node].name: kernel_of[node] for node in inside if node in kernel_of}
        return sum(k.macs.full for k in found.values() if inside.issuperset(k.nodes)) / total

    ops = collections.Counter(node.op_type for node in program.nodes())
    return {
        "schema": SCHEMA,
        "ops": dict(sorted(ops.items(), key=lambda item: (-item[1], item[0]))),
        "macs": int(cost.macs),
        "parameters": int(cost.parameters),
        "weight_bytes": int(cost.weight_bytes),
        "peak_activation_bytes": int(cost.peak_activation_bytes),
        "groups": [
            {
                "name": group.name,
                "size": group.size,
                "granularity": group.granularity,
                "macs_share": _rounded(shares[group.name]),
                "members": [_member(member) for member in group.members],
            }
            for group in analysis.groups
        ],
        "approximate": [
            {"name": g.name, "size": g.size, "granularity": g.granularity, "reason": g.mixed}
            for g in channel_groups(program, keep, approximate=True).groups
            if g.mixed
        ],
        "blocked": [
            {"value": b.value, "axis": b.axis, "reason": b.reason, "source": b.source}
            for b in analysis.blocked
        ],
        "blocks": [
            {
                "name": block.name,
                "inputs": list(block.inputs),
                "outputs": list(block.outputs),
                "nodes": list(block.nodes),
                "macs_share": _rounded(within(block.nodes)),
                "removable": block.removable,
                "reason": block.reason,
            }
            for block in blocks
        ],
    }


def _member(member: Any) -> dict[str, Any]:
    kind = "initializer" if getattr(member, "initializer", None) is not None else "value"
    return {
        kind: getattr(member, kind),
        "axis": int(member.axis),
        "role": member.role,
        "index_map": np.asarray(member.index_map).tolist(),
    }


def _rounded(share: float) -> float:
    return round(share, 6)
