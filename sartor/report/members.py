"""What the terminal and the page of `sartor inspect` say in the same words: groups, their layers, axes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sartor.report.text import count, percent, visible

Document = Mapping[str, Any]

SAVING = (
    "Saved: what the whole model loses when half of a group's units (rounded down) go and nothing else does. "
    "Share: how much of all MACs is in work that scales with the group."
)
"""The definition that stands over every list of savings."""
LEFT = "left as it is: {}, whose work counts in no figure; what they read has to stay"
"""What is said of the part of a model that is not understood."""
TARGET = {
    "taken": "taken as they are",
    "rewritten": "rewritten",
    "stops": "stopping it",
    "unknown": "left as they are, which its rules do not see",
}
"""What becomes of nodes on a target, after their number."""
UNEVEN = "* Units differ in size: the figures are those of the half with the smallest units."
ROLES = {"producer": "made by", "affine": "carried by", "consumer": "read by"}
HEADINGS = ("saved", "MACs", "params", "share", "units", "group")

_VERBS = {"producer": "makes", "affine": "carries", "consumer": "reads"}


def by_saving(groups: Iterable[Document]) -> list[Document]:
    """Groups, the one whose half saves most first."""
    return sorted(groups, key=lambda g: (-g["saving"]["macs"], -g["saving"]["parameters"]))


def figures(group: Document) -> tuple[str, ...]:
    """Saved share of MACs, saved MACs, saved parameters, share that scales, units: the first `HEADINGS`."""
    saving = group["saving"]
    size = str(group["size"])
    return (
        ("" if saving["even"] else "*") + percent(saving["macs_share"]),
        count(saving["macs"]),
        count(saving["parameters"]),
        percent(group["macs_share"]),
        size if group["granularity"] == 1 else f"{size}×{group['granularity']}",
    )


def operators(ops: Mapping[str, int]) -> str:
    """`4 Conv, 2 Relu`."""
    return ", ".join(f"{n} {visible(op)}" for op, n in ops.items())


def by_role(group: Document) -> list[tuple[str, list[Document]]]:
    """The layers of a group by the words for their role: those that make its channels come first."""
    found: dict[str, list[Document]] = {}
    for layer in group["layers"]:
        found.setdefault(ROLES[layer["role"]], []).append(layer)
    return list(found.items())


def axes_text(parameters: Sequence[Document], layer: str) -> str:
    """`axis 0 of weight, bias`, from `[{initializer, axis}]`."""
    found: dict[int, list[str]] = collections.defaultdict(list)
    for parameter in parameters:
        found[parameter["axis"]].append(short(parameter["initializer"], layer))
    return "; ".join(f"axis {axis} of {', '.join(names)}" for axis, names in found.items())


@dataclasses.dataclass(frozen=True)
class Fate:
    """What becomes of an axis that some parameters of a layer have in common.

    Attributes:
        axes: `axis 0 of weight, bias`.
        verb: `makes`, `carries` or `reads`, what the layer does with the channels of `groups`.
        groups: names of the groups that narrow it.
        stays: why all of it stays, or what no group narrows; empty where nothing does.
        approximate: names of the approximate groups that would narrow it.
    """

    axes: str
    verb: str
    groups: tuple[str, ...]
    stays: str
    approximate: tuple[str, ...]

    def parts(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The sentence in parts: words, and the names of groups that follow them."""
        if self.groups:
            yield f"{self.verb} {'group' if len(self.groups) == 1 else 'groups'} ", self.groups
        if self.stays:
            yield f"{'the rest stays' if self.groups else 'stays'}: {self.stays}", ()
        if self.approximate:
            yield "approximate group ", self.approximate


def fates(layer: Document) -> list[Fate]:
    """Every axis of a layer; parameters of one axis number and one fate (weight and bias) share an entry."""
    found: dict[Fate, list[Document]] = {}
    for axis in layer["axes"]:
        source = f", found at {axis['source']}" if axis["source"] else ""
        stays = axis["reason"] + source
        fate = Fate(str(axis["axis"]), "", tuple(axis["groups"]), stays, tuple(axis["approximate"]))
        found.setdefault(fate, []).append(axis)
    result = []
    for fate, axes in found.items():
        roles = {axis["role"] for axis in axes}
        verb = next((_VERBS[role] for role in ("producer", "consumer", "affine") if role in roles), "")
        names = ", ".join(short(axis["parameter"], layer["name"]) for axis in axes)
        result.append(dataclasses.replace(fate, verb=verb, axes=f"axis {fate.axes} of {names}"))
    names = ", ".join(short(name, layer["name"]) for name in layer["parameters"])
    return result or [Fate(names, "", (), "no axis of it is a channel that weights make and read", ())]


def short(parameter: str, layer: str) -> str:
    """The name of a parameter without the path of its layer, where it begins with that."""
    return parameter.removeprefix(f"{layer}.") or parameter


def kind(item: Document) -> str:
    """The class of the module where it is known, else the operator."""
    return str(item["module_class"] or item["op"])


def found_at(reason: Document) -> str:
    """Operator, place and source line at which a reason was found; empty where that is nowhere."""
    if not reason["op"]:
        return ""
    text = f"{reason['nodes'][0]} ({reason['op']})"
    if reason["module"]:
        text += f", {reason['module']} ({reason['module_class']})"
    if reason["location"]:
        text += f", {reason['location']}"
    more = len(reason["nodes"]) - 1
    return text + (f", and {number(more, 'more node')}" if more > 0 else "")


def number(n: int, noun: str) -> str:
    """`1 group`, `2 groups`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def target_line(target: Document) -> str:
    """How many nodes a target takes, rewrites and refuses."""
    counts = target["counts"]
    parts = [f"{n} {TARGET[status]}" for status, n in counts.items() if n]
    return f"{number(sum(counts.values()), 'node')}: {', '.join(parts)}"


def target_title(target: Document) -> str:
    """Target, precision, and whether anything stops the program there."""
    fate = "can be lowered" if target["ok"] else "cannot be lowered"
    return f"{fate} to {target['name']} in {target['precision']}"


def refusals(target: Document) -> list[tuple[str, str, str]]:
    """`(what, where, why)`: the whole model first, then nodes that stop it, then the others."""
    found = [("the model", "", _rule(rule)) for rule in target["model"]]
    # Those that are left as they are have a section of their own.
    known = [node for node in target["nodes"] if node["status"] != "unknown"]
    for node in sorted(known, key=lambda node: node["status"] != "stops"):
        why = " ".join(_rule(rule) for rule in node["findings"]) or node["reason"]
        place = " ".join(part for part in (node["module"], node["location"]) if part)
        found.append((f"{node['status']}: {node['node']} ({node['op_type']})", place, why))
    return found


def _rule(rule: Document) -> str:
    return f"{rule['text']} Observed: {rule['observed']}. [{rule['rule']}]"
