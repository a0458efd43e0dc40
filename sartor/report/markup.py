"""What every page of ours is made of: one file with its style inside, no scripts, fonts or requests.

Names come from model files and are whatever their authors chose, so that every string is escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources

from sartor.report.text import visible

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, name: str, subtitle: str, sections: Iterable[str], footer: str) -> str:
    """A whole document.

    Args:
        title: heading of the page.
        name: of the model, for the title of the window.
        subtitle: one line below the heading.
        sections: markup, already escaped; empty ones are left out.
        footer: one line of text.
    """
    style = resources.files("sartor.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(f"Sartor: {name}")}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The page needs nothing from anywhere; the browser is told to refuse if a string slips through.
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<style>\n{style}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n"
        + "\n".join(part for part in sections if part)
        + f"\n<footer>{escape(footer)}</footer>\n</main></body></html>\n"
    )


def section(title: str, note: str, body: str) -> str:
    """A card with a heading, a sentence below it unless `note` is empty, and markup."""
    text = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{text}{body}</section>"


def facts(entries: Iterable[tuple[str, str, str]], kind: str = "") -> str:
    """Large figures: `(name, value, note)`; `wide` ones have room for a longer note."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in entries
    )
    return f'<dl class="{escape(f"facts {kind}".strip())}">{cells}</dl>'


def table(rows: Iterable[Sequence[str]], header: Sequence[str], align: str) -> str:
    """A table of texts; `align` has one of `<` and `>` per column."""
    return marked_table((tuple(escape(cell) for cell in row) for row in rows), header, align)


def marked_table(rows: Iterable[Sequence[str]], header: Sequence[str], align: str, kind: str = "") -> str:
    """A table whose cells are markup, already escaped; the headings are text. A `stack` suits small windows."""
    kinds = ["" if side == "<" else ' class="number"' for side in align]

    def line(tag: str, cells: Sequence[str]) -> str:
        texts = (f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(texts)}</tr>"

    head = line("th", [escape(cell) for cell in header])
    body = "".join(line("td", row) for row in rows)
    opening = f'<table class="{escape(kind)}">' if kind else "<table>"
    return f'<div class="scroll">{opening}<thead>{head}</thead><tbody>{body}</tbody></table></div>'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    cells = "".join(
        f'<tr><th>{escape(name)}</th><td class="mono">{escape(value)}</td></tr>' for name, value in rows
    )
    return f'<div class="scroll"><table class="pairs"><tbody>{cells}</tbody></table></div>'


def code(text: str) -> str:
    """A name in a fixed-width font."""
    return f"<code>{escape(text)}</code>"


def escape(text: str) -> str:
    """Text as markup: nothing in it is a tag, ends an attribute, or changes the direction of the line."""
    return html.escape(visible(str(text)), quote=True)
