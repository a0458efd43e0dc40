"""What a program consists of and what can be cut from it, as the document `sartor.inspect/1`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.ir.program import Program

if TYPE_CHECKING:
    from sartor.ir.channels import ChannelAnalysis, ChannelGroup, Member
    from sartor.ir.workload import Workload

SCHEMA = "sartor.inspect/1"


def inspect_program(program: Program, keep: Sequence[str] = (), layers: Sequence[str] = ()) -> dict[str, Any]:
    """Operators, cost, channel groups, blocked axes, layers and residual blocks.

    Keys of the document:

    - `source` `{kind, name, sha256}`; `ops`, number of nodes by operator; `macs`, `parameters`,
      `weight_bytes`, `peak_activation_bytes` as in `sartor.cost_models.static`.
    - `memory`: `sartor.cost_models.memory.memory_report`: what a runtime needs that fuses kernels and writes in place.
    - `groups` `[{name, size, granularity, macs_share, members, saving, layers}]`, in execution order. `macs_share` is
      the share of all MACs in work that scales with the group's width; groups overlap (a convolution scales
      with its input and its output), so shares do not add up to one. `members`
      `[{initializer, axis, role, index_map}]`. `saving`
      `{units, macs, macs_share, parameters, parameters_share, weight_bytes, even}` is what the whole program
      loses when `units`, half of the group's units (rounded down, fewer where the graph demands it), are
      removed and nothing else is; exactly that, as `sartor apply` would show. Unless they are `even`, the
      smallest units go. `layers`
      `[{role, name, op, module, module_class, location, nodes, parameters}]` are the members by the layer
      that reads them, with `parameters` `[{initializer, axis}]`.
    - `prunable` `{macs_share, halved: {macs, parameters}}`: the share of MACs in work that scales with any
      group, and what is left of the program when half of every group goes at once.
    - `approximate`, the same as `groups` with the `reason` why they are not exact; off by default.
    - `blocked` `[{value, axis, reason, source}]`, parameter axes that make features and have to stay.
    - `reasons`, the same by reason:
      `[{reason, name, op, module, module_class, location, nodes, approximate, values}]` with the operator
      and `file.py:line` at which it was found, all `nodes` of that kind, the approximate groups that would
      narrow some of it, and `values` `[{value, axis, channels}]`; most values first.
    - `layers` `[{name, op, module, module_class, location, nodes, macs_share, parameters, axes}]` with
      `axes` `[{parameter, axis, role, groups, approximate, reason, source}]`: where to look up one layer.
    - `left`, only where a part of the model is not understood and left as it is: `{nodes, ops, reasons}` with the
      number of nodes, the same by operator, and `reasons` `[{node, reason}]`. It counts in nothing above.
    - `blocks` `[{name, inputs, outputs, nodes, macs_share, removable, reason}]`, residual blocks.
    - `selected`, only with `layers`: the patterns.
    - `target`, which `sartor inspect --target` adds: see `sartor.backends.coverage.Coverage.to_dict`.

    Args:
        program: canonical program; costs are taken at its reference shapes.
        keep: globs of parameters and nodes that are not pruned.
        layers: only what concerns these layers; see `sartor.prunability.select`.

    Raises:
        UsageError: a glob or a layer matches nothing.
    """
    from sartor.cost_models.memory import memory_report
    from sartor.cost_models.static import static_cost
    from sartor.ir.blocks import residual_blocks
    from sartor.ir.channels import channel_groups
    from sartor.ir.workload import build_workload, is_parameter
    from sartor.prunability import Layers, blocked_reasons, layer_documents, select
    from sartor.savings import halved, savings

    analysis = channel_groups(program, keep)
    wide = channel_groups(program, keep, approximate=True)
    mixed = [group for group in wide.groups if group.mixed]
    cost = static_cost(program)
    workload = build_workload(program, analysis.extents)
    total = sum(kernel.macs.full for kernel in workload.kernels) or 1.0
    left = halved(analysis) if analysis.groups else workload.evaluate()
    prunable = sum(kernel.macs.full for kernel in workload.kernels if kernel.macs.groups)

    parameters = {m.initializer for g in (*analysis.groups, *mixed) for m in g.members}
    parameters |= {name for name, value in program.initializers.items() if is_parameter(value)}
    readers = Layers(program, parameters)

    def groups(of: ChannelAnalysis, found: Sequence[ChannelGroup], priced: Workload) -> list[dict[str, Any]]:
        shares, saved = _shares(priced), savings(of, priced, found)
        return [
            {
                "name": group.name,
                "size": group.size,
                "granularity": group.granularity,
                "macs_share": _rounded(shares[group.name] / total),
                "members": [_member(member) for member in group.members],
                "saving": saved[group.name].to_dict(cost.macs, cost.parameters),
                "layers": readers.of_group(group),
            }
            for group in found
        ]

    approximate = groups(wide, mixed, build_workload(program, wide.extents)) if mixed else []
    document = {
        "schema": SCHEMA,
        "source": dataclasses.asdict(program.source),
        "ops": _by_number(node.op_type for node in program.nodes()),
        "macs": int(cost.macs),
        "parameters": int(cost.parameters),
        "weight_bytes": int(cost.weight_bytes),
        "peak_activation_bytes": int(cost.peak_activation_bytes),
        "memory": memory_report(program),
        "prunable": {
            "macs_share": _rounded(prunable / total),
            "halved": {"macs": round(float(left.macs)), "parameters": round(float(left.parameters))},
        },
        "groups": groups(analysis, analysis.groups, workload),
        "approximate": [
            {**entry, "reason": group.mixed} for entry, group in zip(approximate, mixed, strict=True)
        ],
        "blocked": [
            {"value": b.value, "axis": b.axis, "reason": b.reason, "source": b.source}
            for b in analysis.blocked
        ],
        "reasons": blocked_reasons(analysis, mixed),
        "layers": layer_documents(readers, analysis, mixed, workload),
        "blocks": _blocks(residual_blocks(program), workload, total),
    }
    if program.tail is not None:
        document["left"] = {
            "nodes": len(program.tail.nodes),
            "ops": _by_number(node.op_type for node in program.tail.nodes),
            "reasons": [{"node": node, "reason": reason} for node, reason in program.tail.reasons.items()],
        }
    return select(document, layers) if layers else document


def _by_number(operators: Iterable[str]) -> dict[str, int]:
    return dict(sorted(collections.Counter(operators).items(), key=lambda item: (-item[1], item[0])))


def _shares(workload: Workload) -> Mapping[str, float]:
    """MACs in work that scales with each group."""
    result: dict[str, float] = collections.defaultdict(float)
    for kernel in workload.kernels:
        for group in kernel.macs.groups:
            result[group] += kernel.macs.full - float(kernel.macs.evaluate({group: 0.0}))
    return result


def _blocks(blocks: Iterable[Any], workload: Workload, total: float) -> list[dict[str, Any]]:
    kernel_of = {node: kernel for kernel in workload.kernels for node in kernel.nodes}

    def within(nodes: Iterable[str]) -> float:
        inside = set(nodes)
        found = {kernel_of[node].name: kernel_of[node] for node in inside if node in kernel_of}
        return sum(k.macs.full for k in found.values() if inside.issuperset(k.nodes)) / total

    return [
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
    ]


def _member(member: Member) -> dict[str, Any]:
    return {
        "initializer": member.initializer,
        "axis": int(member.axis),
        "role": member.role,
        "index_map": np.asarray(member.index_map).tolist(),
    }


def _rounded(share: float) -> float:
    return round(share, 6)
