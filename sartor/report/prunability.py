"""The page of `sartor inspect --html`: one file without scripts, fonts or requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sartor.report import markup
from sartor.report.markup import code, escape, marked_table, section
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
    number,
    operators,
    refusals,
    target_line,
    target_title,
)
from sartor.report.text import count, percent

Anchors = Mapping[str, Mapping[str, str]]

_OPEN = 12  # members that are shown when the page opens: the first groups, as long as they are small
_SHORT = 12  # lists of at most this many entries are open


def render(document: Document) -> str:
    """The page of a document of schema `sartor.inspect/1`."""
    from sartor import __version__

    # A number, not the name: names repeat between both lists, and what they hold is not ours to trust.
    anchors = {
        kind: {group["name"]: f"{kind}-{position}" for position, group in enumerate(document[kind])}
        for kind in ("groups", "approximate")
    }
    sections = [
        _summary(document),
        _left(document),
        _target(document),
        _groups(document, anchors),
        _blocked(document, anchors),
        _approximate(document, anchors),
        _blocks(document),
        _layers(document, anchors),
    ]
    name = document["source"]["name"]
    subtitle = name
    if "selected" in document:
        subtitle += f" · only {', '.join(document['selected'])}"
    footer = f"Written by Sartor {__version__}. The same content for machines: sartor inspect --json."
    return markup.page("What can be cut from this model", name, subtitle, sections, footer)


# ---- sections ------------------------------------------------------------------------------------
def _summary(document: Document) -> str:
    prunable = document["prunable"]
    left, total = prunable["halved"], document["macs"] or 1
    values = sum(len(reason["values"]) for reason in document["reasons"])
    facts = [
        ("MACs", count(document["macs"]), "at the reference shapes"),
        ("Parameters", count(document["parameters"]), f"{count(document['weight_bytes'], 'B')} of weights"),
        ("Peak activations", count(document["peak_activation_bytes"], "B"), "in graph order, not in place"),
        ("Prunable", percent(prunable["macs_share"]), "of the MACs scale with a channel group"),
        (
            "Half of every group gone",
            percent(left["macs"] / total),
            f"of the MACs and {count(left['parameters'])} parameters are left",
        ),
        ("Blocked values", str(values), f"for {number(len(document['reasons']), 'reason')}"),
    ]
    ops = operators(document["ops"])
    large = markup.facts(facts, "wide")
    return f'<section>{large}<p class="note ops">{escape(ops)}</p></section>'


def _left(document: Document) -> str:
    left = document.get("left")
    if not left:
        return ""
    note = f"{LEFT.format(number(left['nodes'], 'node'))}: {operators(left['ops'])}"
    items = "".join(f"<li>{code(r['node'])}: {escape(r['reason'])}</li>" for r in left["reasons"])
    return section("Left as it is", note, f"<ul>{items}</ul>")


def _target(document: Document) -> str:
    target = document.get("target")
    if not target:
        return ""
    title = target_title(target)
    rows = [tuple(escape(text) for text in row) for row in refusals(target)]
    body = marked_table(rows, ("", "In your code", "Why"), "<<<", "stack") if rows else ""
    title = title[:1].upper() + title[1:]
    return section(title, f"{target_line(target)}.", _folded(body, len(rows), "node") if rows else "")


def _groups(document: Document, anchors: Anchors) -> str:
    groups = by_saving(document["groups"])
    if not groups:
        return section("Channel groups", "No channel group can be pruned; the next section says why.", "")
    return section(number(len(groups), "channel group"), SAVING, _listed(groups, anchors["groups"]))


def _approximate(document: Document, anchors: Anchors) -> str:
    groups = by_saving(document["approximate"])
    if not groups:
        return ""
    note = (
        "Off by default: the features are also mixed without weights, so that what stays changes when some go. "
        "prune-channels{approximate=true} takes them, without a proof."
    )
    return section(number(len(groups), "approximate group"), note, _listed(groups, anchors["approximate"]))


def _blocked(document: Document, anchors: Anchors) -> str:
    parts = []
    for reason in document["reasons"]:
        values = reason["values"]
        place = found_at(reason)
        body = f'<p class="at">found at {code(place)}</p>' if place else ""
        if reason["approximate"]:
            links = ", ".join(_link(name, anchors["approximate"]) for name in reason["approximate"])
            body += f'<p class="at">narrowed, when asked for, by the approximate group {links}</p>'
        items = "".join(
            f"<li>{code(value['value'])} axis {value['axis']}, {number(value['channels'], 'channel')}</li>"
            for value in values
        )
        opened = " open" if len(values) <= _SHORT else ""
        body += (
            f"<details{opened}><summary>{number(len(values), 'value')}</summary><ul>{items}</ul></details>"
        )
        parts.append(f'<div class="reason"><h3>{escape(reason["reason"])}</h3>{body}</div>')
    if not parts:
        return ""
    note = "Axes of parameters that make features and have to stay, by the rule that forbids it."
    return section("Blocked", note, "".join(parts))


def _blocks(document: Document) -> str:
    blocks = document["blocks"]
    if not blocks:
        return ""
    rows = [
        (
            code(block["name"]),
            percent(block["macs_share"]),
            str(len(block["nodes"])),
            "removable" if block["removable"] else escape(f"stays: {block['reason']}"),
        )
        for block in sorted(blocks, key=lambda b: (not b["removable"], -b["macs_share"]))
    ]
    removable = sum(block["removable"] for block in blocks)
    note = "A removable block goes as a whole: its output becomes its shortcut."
    heads = ("Block", "MACs", "Nodes", "")
    title = f"{number(len(blocks), 'residual block')}, {removable} removable"
    return section(title, note, _folded(marked_table(rows, heads, "<>><"), len(blocks), "block"))


def _layers(document: Document, anchors: Anchors) -> str:
    rows = []
    for layer in document["layers"]:
        share = f"{percent(layer['macs_share'])} of the MACs" if layer["macs_share"] else ""
        known = (layer["module_class"], layer["op"], layer["location"], share)
        what = " · ".join(part for part in known if part)
        lines = "".join(_fate(fate, anchors) for fate in fates(layer))
        rows.append((f"{code(layer['name'])}<small>{escape(what)}</small>", lines))
    if not rows:
        return ""
    note = "Look a layer up by its name: which groups narrow each axis of its parameters, or why it stays."
    return section("Layers", note, marked_table(rows, ("Layer", "Axes of its parameters"), "<<", "stack"))


# ---- pieces --------------------------------------------------------------------------------------
def _listed(groups: Sequence[Document], anchors: Mapping[str, str]) -> str:
    largest = max((group["saving"]["macs_share"] for group in groups), default=0.0) or 1.0
    heads = "".join(f"<span>{escape(head)}</span>" for head in ("", *HEADINGS[:-1]))
    parts = [f'<div class="row heads">{heads}</div>']
    shown = 0
    for group in groups:
        share, macs, parameters, scale, units = figures(group)
        length = 100.0 * group["saving"]["macs_share"] / largest
        bar = (
            f'<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="bar after" width="{length:.1f}" height="8"/></svg>'
        )
        cells = "".join(f"<span>{escape(cell)}</span>" for cell in (share, macs, parameters, scale, units))
        shown += len(group["layers"])
        opened = " open" if shown <= _OPEN else ""
        parts.append(
            f'<details class="group" id="{anchors[group["name"]]}"{opened}><summary class="row">'
            f"<span>{code(group['name'])}{bar}</span>{cells}</summary>{_members(group)}</details>"
        )
    if not all(group["saving"]["even"] for group in groups):
        parts.append(f'<p class="note">{escape(UNEVEN)}</p>')
    return "".join(parts)


def _members(group: Document) -> str:
    rows = []
    for role, layers in by_role(group):
        for position, layer in enumerate(layers):
            axes = axes_text(layer["parameters"], layer["name"])
            what = " · ".join(
                part for part in (layer["module_class"], layer["op"], layer["location"]) if part
            )
            name = f"{code(layer['name'])} <small>{escape(what)}</small>"
            rows.append(("" if position else escape(role), name, escape(axes)))
    why = f'<p class="at">not exact: {escape(group["reason"])}</p>' if "reason" in group else ""
    return why + marked_table(rows, ("", "Layer", "Narrowed"), "<<<", "stack")


def _folded(body: str, length: int, noun: str) -> str:
    if length <= _SHORT:
        return body
    return f"<details><summary>all {number(length, noun)}</summary>{body}</details>"


def _fate(fate: Fate, anchors: Anchors) -> str:
    parts = []
    for words, names in fate.parts():
        of = anchors["approximate" if names == fate.approximate else "groups"]
        parts.append(escape(words) + ", ".join(_link(name, of) for name in names))
    return f"<div><b>{escape(fate.axes)}</b>: {'; '.join(parts)}</div>"


def _link(name: str, anchors: Mapping[str, str]) -> str:
    return f'<a href="#{anchors[name]}">{code(name)}</a>' if name in anchors else code(name)
