"""`sartor inspect` for a terminal: groups with their members, blocked axes by reason, blocks, layers.

Every name is shown by `sartor.report.text.visible` and never shortened, so that it can be searched for; lines
that would be too long continue below, indented.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sartor.report.members import (
    HEADINGS,
    LEFT,
    SAVING,
    UNEVEN,
    Document,
    Fate,
    axes_text,
    by_role,
    by_saving,
    fates,
    figures,
    found_at,
    kind,
    number,
    operators,
    refusals,
    target_line,
    target_title,
)
from sartor.report.text import columns, count, percent, visible

_ALL = 1 << 30
_MORE = "(--all shows them)"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is shown.

    Attributes:
        width: columns of a line.
        trees: groups with their members.
        lines: groups below those, one line each, and residual blocks.
        members: layers of one role of a group.
        values: values of one reason.
    """

    width: int = 100
    trees: int = 8
    lines: int = 20
    members: int = 3
    values: int = 6


def describe(document: Document, width: int = 100, everything: bool = False) -> str:
    """The document `sartor.inspect/1` as text.

    Args:
        document: of `sartor.inspection.inspect_program`.
        width: columns of a line.
        everything: nothing is left out; the default leaves out what a long list ends with, and says so.
    """
    selected = "selected" in document
    size = Size(width, _ALL, _ALL, _ALL, _ALL) if everything or selected else Size(width)
    sections = [
        _head(document, size),
        _left(document, size),
        _target(document, size),
        _layers(document, size) if everything or selected else [],
        _groups(document, size),
        _blocked(document, size),
        _approximate(document, size),
        _blocks(document, size),
    ]
    if not everything and not selected:
        hint = "--layer NAME: which groups narrow one layer, or why it stays. --all: nothing left out."
        sections.append(_wrapped(hint, width))
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


# ---- sections ------------------------------------------------------------------------------------
def _head(document: Document, size: Size) -> list[str]:
    lines = _wrapped(
        f"{count(document['macs'])} MACs, {count(document['parameters'])} parameters, "
        f"{count(document['weight_bytes'], 'B')} of weights, "
        f"{count(document['peak_activation_bytes'], 'B')} peak activations",
        size.width,
    )
    lines += _wrapped(f"operators: {operators(document['ops'])}", size.width)
    if "memory" in document:  # absent from documents of earlier versions
        lines += _wrapped(_memory(document["memory"]), size.width)
    prunable = document["prunable"]
    if prunable["macs_share"] > 0.0:
        left = prunable["halved"]
        text = (
            f"prunable: {percent(prunable['macs_share'])} of the MACs scale with a channel group; half of every "
            f"group gone leaves {count(left['macs'])} MACs ({percent(left['macs'] / (document['macs'] or 1))}) "
            f"and {count(left['parameters'])} parameters"
        )
        lines += _wrapped(text, size.width)
    return lines


def _memory(memory: Document) -> str:
    highest, best = memory["peak"], memory.get("best_order")
    text = f"memory: {count(highest['bytes'], 'B')} at its peak"
    text += f", at '{visible(highest['at'])}'" if highest["at"] else ""
    if best is not None and best["peak_bytes"] < highest["bytes"]:
        text += f"; in another order of the nodes {count(best['peak_bytes'], 'B')}"
    elif best is not None and best["optimal"]:
        text += ", and no order of the nodes needs less"
    return (
        f"{text}; {count(memory['arena_bytes'], 'B')} in one arena, {count(memory['traffic_bytes'], 'B')} of traffic "
        f"an inference ({memory['rules']})"
    )


def _left(document: Document, size: Size) -> list[str]:
    left = document.get("left")
    if not left:
        return []
    lines = _wrapped(f"{LEFT.format(number(left['nodes'], 'node'))}: {operators(left['ops'])}", size.width)
    branches = [f"{visible(r['node'])}: {visible(r['reason'])}" for r in left["reasons"][: size.values]]
    if len(left["reasons"]) > size.values:
        branches.append(f"… and {len(left['reasons']) - size.values} more {_MORE}")
    return lines + _tree(branches, size)


def _target(document: Document, size: Size) -> list[str]:
    target = document.get("target")
    if not target:
        return []
    lines = _wrapped(f"{visible(target_title(target))}; {target_line(target)}", size.width)
    found = refusals(target)
    branches = []
    for what, place, why in found[: size.lines]:
        at = f" at {visible(place)}" if place else ""
        branches.append(f"{visible(what)}{at}\n  {visible(why)}")
    if len(found) > size.lines:
        branches.append(f"… and {len(found) - size.lines} more {_MORE}")
    return lines + _tree(branches, size)


def _layers(document: Document, size: Size) -> list[str]:
    layers = document["layers"]
    lines = [number(len(layers), "layer")] if layers else []
    for layer in layers:
        share = f", {percent(layer['macs_share'])} of the MACs" if layer["macs_share"] else ""
        lines += ["", *_wrapped(_place(layer) + share, size.width)]
        lines += _tree([_fate(fate) for fate in fates(layer)], size)
    return lines


def _groups(document: Document, size: Size) -> list[str]:
    groups = by_saving(document["groups"])
    if not groups:
        return ["no channel group" + (" here" if "selected" in document else " can be pruned")]
    return _wrapped(f"{number(len(groups), 'channel group')}. {SAVING}", size.width) + _listed(groups, size)


def _approximate(document: Document, size: Size) -> list[str]:
    groups = by_saving(document["approximate"])
    if not groups:
        return []
    text = (
        f"{number(len(groups), 'approximate group')}, off by default: the features are also mixed without "
        "weights, so what stays changes. prune-channels{approximate=true} takes them, unproven."
    )
    return _wrapped(text, size.width) + _listed(groups, size)


def _blocked(document: Document, size: Size) -> list[str]:
    reasons = document["reasons"]
    if not reasons:
        return []
    values = sum(len(reason["values"]) for reason in reasons)
    lines = [f"{number(values, 'blocked value')}, {number(len(reasons), 'reason')}"]
    for reason in reasons:
        mine = reason["values"]
        text = f"{number(len(mine), 'value')}: {visible(reason['reason'])}"
        lines += ["", *_wrapped(text, size.width)]
        branches = [f"found at {visible(found_at(reason))}"] if reason["op"] else []
        if reason["approximate"]:
            names = ", ".join(visible(name) for name in reason["approximate"])
            branches.append(f"approximate group that narrows it when asked to: {names}")
        branches += [
            f"{visible(value['value'])} axis {value['axis']}, {number(value['channels'], 'channel')}"
            for value in mine[: size.values]
        ]
        if len(mine) > size.values:
            branches.append(f"… and {len(mine) - size.values} more {_MORE}")
        lines += _tree(branches, size)
    return lines


def _blocks(document: Document, size: Size) -> list[str]:
    blocks = sorted(document["blocks"], key=lambda b: (not b["removable"], -b["macs_share"]))
    if not blocks:
        return []
    removable = sum(block["removable"] for block in blocks)
    text = f"{number(len(blocks), 'residual block')}, {removable} removable, with their share of the MACs"
    branches = [
        f"{percent(block['macs_share']):>7}  {visible(block['name'])}"
        + ("" if block["removable"] else f" stays: {visible(block['reason'])}")
        for block in blocks[: size.lines]
    ]
    if len(blocks) > size.lines:
        branches.append(f"… and {len(blocks) - size.lines} more {_MORE}")
    return [text, *_tree(branches, size)]


# ---- pieces --------------------------------------------------------------------------------------
def _listed(groups: Sequence[Document], size: Size) -> list[str]:
    """Figures first and the name last, so that all of them line up however long the names are."""
    shown = groups[: size.trees + size.lines]
    rows = [HEADINGS[:-1], *(figures(group) for group in shown)]
    widths = [max(columns(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: Sequence[str], name: str) -> str:
        return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) + f"  {name}"

    lines = [line(HEADINGS[:-1], HEADINGS[-1])]
    if not all(group["saving"]["even"] for group in shown):
        lines.insert(0, UNEVEN)
    for position, group in enumerate(shown):
        lines.append(line(figures(group), visible(group["name"])))
        if position < size.trees:
            lines += _tree(_members(group, size), size)
            lines += [""] if position + 1 < len(shown) else []
    if len(groups) > len(shown):
        lines.append(f"… and {len(groups) - len(shown)} more {_MORE}")
    return lines


def _members(group: Document, size: Size) -> list[str]:
    """One branch per role; a branch of several layers has one line for each."""
    branches = [f"not exact: {visible(group['reason'])}"] if "reason" in group else []
    for role, layers in by_role(group):
        texts = [
            f"{_place(layer)}: {visible(axes_text(layer['parameters'], layer['name']))}"
            for layer in layers[: size.members]
        ]
        if len(layers) > size.members:
            texts.append(f"… and {len(layers) - size.members} more")
        branches.append(f"\n{'':11}".join([f"{role:10} {texts[0]}", *texts[1:]]))
    return branches


def _fate(fate: Fate) -> str:
    parts = "; ".join(words + ", ".join(names) for words, names in fate.parts())
    return visible(f"{fate.axes}: {parts}")


def _place(layer: Document) -> str:
    location = f" {visible(layer['location'])}" if layer["location"] else ""
    return f"{visible(layer['name'])} ({visible(kind(layer))}){location}"


def _tree(branches: Sequence[str], size: Size) -> list[str]:
    lines: list[str] = []
    for position, text in enumerate(branches):
        last = position == len(branches) - 1
        room = size.width - 3
        first, *more = [line for part in text.split("\n") for line in _wrapped(part, room, _under(part))]
        lines.append(("└─ " if last else "├─ ") + first)
        lines += [("   " if last else "│  ") + line for line in more]
    return lines


def _under(text: str) -> str:
    """How far what does not fit on a line goes in: further than the line itself."""
    return " " * (13 if text.startswith(("made", "carried", "read", " " * 11)) else 2)


def _wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    """Lines of at most `width` columns, broken at spaces only: a name stays in one piece."""
    lines: list[str] = []
    line = ""
    for position, word in enumerate(text.split(" ")):
        joined = f"{line} {word}" if position else word
        if line.strip() and columns(joined) > width:
            lines.append(line.rstrip())
            line = indent + word
        else:
            line = joined
    return [*lines, line.rstrip()]
