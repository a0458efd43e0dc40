"""Why each layer can or cannot be narrowed: layers with the fate of every axis, and blocked axes by reason.

A *layer* here is what an author would call one: a module that reads parameters, or, where the file does not
say which module a node came from, a node that does. Parameters are followed through nodes that read nothing
but parameters (a transposed weight still belongs to its MatMul).
"""

from __future__ import annotations

import collections
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from sartor.errors import UsageError
from sartor.ir.bodies import read_values
from sartor.ir.program import NodeProvenance, Program

if TYPE_CHECKING:
    from sartor.ir.channels import ChannelAnalysis, ChannelGroup
    from sartor.ir.workload import Workload

ROLES = ("producer", "affine", "consumer")
_LEADING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN")


# ---- layers --------------------------------------------------------------------------------------
class Layers:
    """The layers of a program and the parameters that each of them reads.

    Attributes:
        nodes: nodes by layer key, in execution order.
        parameters: names by layer key, in the order in which they are read.
        of_parameter: keys of the layers that read a parameter.
    """

    def __init__(self, program: Program, parameters: Iterable[str]):
        self.program = program
        self.nodes: dict[str, list[ir.Node]] = {}
        self.parameters: dict[str, dict[str, None]] = {}
        self.of_parameter: dict[str, dict[str, None]] = {}
        wanted = set(parameters)
        sources: dict[str, tuple[str, ...]] = {}
        for name in program.initializers:
            sources[name] = (name,) if name in wanted else ()
        for node in program.nodes():
            read = [value.name or "" for value in read_values(node)]
            found = tuple(dict.fromkeys(p for name in read for p in sources.get(name, ())))
            if read and all(name in sources for name in read):
                sources.update((output.name or "", found) for output in node.outputs)
            elif found:
                key = self._key(node)
                self.nodes.setdefault(key, []).append(node)
                self.parameters.setdefault(key, {}).update(dict.fromkeys(found))
                for name in found:
                    self.of_parameter.setdefault(name, {})[key] = None

    def _key(self, node: ir.Node) -> str:
        """A module's path may be a node's name elsewhere, so the two kinds of keys differ."""
        module = self.provenance(node).module
        return f"module:{module}" if module else f"node:{node.name}"

    def provenance(self, node: ir.Node) -> NodeProvenance:
        """Where a node comes from; empty where that is not recorded."""
        return self.program.provenance.get(node.name or "", NodeProvenance())

    def describe(self, key: str) -> dict[str, Any]:
        """`name`, `module`, `module_class`, `op`, `location` and `nodes` of a layer."""
        nodes = self.nodes[key]
        lead = next((node for node in nodes if node.op_type in _LEADING), nodes[0])
        return {**place(self.program, lead), "nodes": [node.name or "" for node in nodes]}

    def of_group(self, group: ChannelGroup) -> list[dict[str, Any]]:
        """The layers that take part in a group, with their roles: its coupled members as an author sees them.

        Producers first, then what carries the channels (norms, depthwise convolutions), then consumers, each
        in execution order. What a producer or consumer carries beside its weight, a bias, is part of it.
        `parameters` are `{initializer, axis}`.
        """
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for member in group.members:
            axis = {"initializer": member.initializer, "axis": member.axis}
            for key in self.of_parameter.get(member.initializer, {}):
                found.setdefault(key, {}).setdefault(member.role, []).append(axis)
        result: list[dict[str, Any]] = []
        for key in sorted(found, key=lambda key: self._order[key]):
            roles = found[key]
            carried = roles.pop("affine", []) if len(roles) > 1 else []
            for role in roles:
                result.append({"role": role, **self.describe(key), "parameters": roles[role] + carried})
                carried = []
        return sorted(result, key=lambda layer: ROLES.index(layer["role"]))

    @cached_property
    def _order(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.nodes)}


def place(program: Program, node: ir.Node) -> dict[str, str]:
    """`name`, `op`, `module`, `module_class` and `location` (`file.py:line`) of a node, for people."""
    known = program.provenance.get(node.name or "", NodeProvenance())
    return {
        "name": known.module or node.name or "",
        "op": node.op_type,
        "module": known.module,
        "module_class": known.module_class,
        "location": known.location,
    }


def layer_documents(
    layers: Layers,
    analysis: ChannelAnalysis,
    approximate: Sequence[ChannelGroup],
    workload: Workload,
) -> list[dict[str, Any]]:
    """Every layer with the fate of each labelled axis of each parameter it reads.

    Per axis: `groups` that narrow it and its `role` there, the groups of the approximate analysis that would,
    and the `reason` with its `source` where a part of it or all of it has to stay.
    """
    exact, wide = _by_axis(analysis.groups), _by_axis(approximate)
    reasons = dict(_reasons(analysis))
    reported = {(blocked.value, blocked.axis) for blocked in analysis.blocked}
    for key, found in wide.items():
        if found[0][1] == "consumer" and key not in reported and key not in exact:
            reasons[key] = ("what it reads can be narrowed approximately only", "")
    total = sum(kernel.macs.full for kernel in workload.kernels) or 1.0
    macs = {kernel.name: kernel.macs.full for kernel in workload.kernels}
    axes_of: dict[str, list[int]] = collections.defaultdict(list)
    for name, axis in sorted({*exact, *wide, *reasons}):
        axes_of[name].append(axis)
    result = []
    for layer, names in layers.parameters.items():
        document = layers.describe(layer)
        document["macs_share"] = round(sum(macs.get(node, 0.0) for node in document["nodes"]) / total, 6)
        document["parameters"] = list(names)
        document["axes"] = [
            {
                "parameter": name,
                "axis": axis,
                "role": (exact.get((name, axis)) or wide.get((name, axis)) or [("", "")])[0][1],
                "groups": [group for group, _ in exact.get((name, axis), [])],
                "approximate": [group for group, _ in wide.get((name, axis), [])],
                **dict(zip(("reason", "source"), reasons.get((name, axis), ("", "")), strict=True)),
            }
            for name in names
            for axis in axes_of[name]
        ]
        result.append(document)
    return result


def _by_axis(groups: Iterable[ChannelGroup]) -> dict[tuple[str, int], list[tuple[str, str]]]:
    result: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for group in groups:
        for member in group.members:
            result.setdefault((member.initializer, member.axis), []).append((group.name, member.role))
    return result


def _reasons(analysis: ChannelAnalysis) -> Iterator[tuple[tuple[str, int], tuple[str, str]]]:
    """The reason of every axis that cannot be narrowed in whole, axes that make no features included."""
    program = analysis.program
    where = {node.name or "": node for node in program.nodes()}
    classes = analysis.classes
    grouped = {(m.initializer, m.axis) for group in analysis.groups for m in group.members}
    for key, atoms in analysis.propagation.parameter_atoms.items():
        if key in grouped:
            continue
        known = classes.reason_of[classes.of_atom[atoms]]
        known = known[known >= 0]
        if known.size:
            reason = classes.reasons[int(known[0])]
            node = where.get(reason.node)
            yield key, (reason.text, program.where(node) if node is not None else "")
    for blocked in analysis.blocked:  # what the analysis itself reports is more precise: it comes last
        yield (blocked.value, blocked.axis), (blocked.reason, blocked.source)


# ---- blocked axes --------------------------------------------------------------------------------
def blocked_reasons(analysis: ChannelAnalysis, approximate: Sequence[ChannelGroup]) -> list[dict[str, Any]]:
    """Blocked axes grouped by reason, operator and source line, most values first.

    Where no source line is known the operator alone decides, and `nodes` names all places.
    """
    program = analysis.program
    where = {program.where(node): node for node in program.nodes()}
    wide = _by_axis(approximate)
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for blocked in analysis.blocked:
        node = where.get(blocked.source)
        at = place(program, node) if node is not None else dict.fromkeys(_PLACE, "")
        entry = found.setdefault(
            (blocked.reason, at["op"], at["location"]),
            {"reason": blocked.reason, **at, "nodes": {}, "values": [], "approximate": {}},
        )
        if node is not None:
            entry["nodes"][node.name or ""] = None
        entry["values"].append({"value": blocked.value, "axis": blocked.axis, "channels": blocked.channels})
        entry["approximate"].update(wide.get((blocked.value, blocked.axis), []))
    for entry in found.values():
        entry["nodes"], entry["approximate"] = list(entry["nodes"]), list(entry["approximate"])
    return sorted(found.values(), key=lambda entry: -len(entry["values"]))


_PLACE = ("name", "op", "module", "module_class", "location")


# ---- one layer -----------------------------------------------------------------------------------
def select(document: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """The parts of an inspection that concern some layers; figures of the whole program stay.

    Args:
        document: of `sartor.inspection.inspect_program`.
        patterns: each a glob, a name, or the beginning of a dotted name (`layer3.0` finds `layer3.0.conv1`),
            compared with modules, nodes, parameters, groups and blocks.

    Raises:
        UsageError: a pattern finds nothing.
    """
    layers, blocks = document["layers"], document["blocks"]
    named_groups = [*document["groups"], *document["approximate"]]
    for pattern in patterns:
        named = [name for layer in layers for name in _names(layer)]
        named += [item["name"] for item in (*named_groups, *blocks)]
        if not any(_matches(name, pattern) for name in named):
            raise UsageError(
                f"--layer '{pattern}' matches no layer, node, parameter, group or block; "
                "list them with `sartor inspect --all`."
            )

    def hit(names: Iterable[str]) -> bool:
        return any(_matches(name, pattern) for name in names for pattern in patterns)

    chosen = [layer for layer in layers if hit(_names(layer))]
    parameters = {name for layer in chosen for name in layer["parameters"]}
    parameters = {name for name in parameters if hit([name])} or parameters
    nodes = {name for layer in chosen for name in layer["nodes"]}

    def narrows(group: Mapping[str, Any]) -> bool:
        return hit([group["name"]]) or any(m.get("initializer") in parameters for m in group["members"])

    reasons = []
    for reason in document["reasons"]:
        values = [value for value in reason["values"] if value["value"] in parameters]
        if values:
            reasons.append({**reason, "values": values})
    return {
        **document,
        "groups": [group for group in document["groups"] if narrows(group)],
        "approximate": [group for group in document["approximate"] if narrows(group)],
        "blocked": [b for b in document["blocked"] if b["value"] in parameters],
        "reasons": reasons,
        "blocks": [b for b in blocks if hit([b["name"]]) or nodes.intersection(b["nodes"])],
        "layers": chosen,
        "selected": list(patterns),
    }


def _names(layer: Mapping[str, Any]) -> list[str]:
    return [layer["name"], *layer["nodes"], *layer["parameters"]]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)
