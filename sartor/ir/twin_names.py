"""Attribute paths for initializers: their own names where torch allows it, a reversible map elsewhere."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

RESERVED = "_sartor"
"""Root attribute of the twin that holds what has no legal name of its own."""

_UNPRINTABLE = re.compile(r'["\\\x00-\x1f\x7f]')


def state_keys(names: Iterable[str], taken: frozenset[str]) -> dict[str, str]:
    """Choose one dotted attribute path per initializer.

    A name stays as it is unless a segment is empty, is a Python keyword, cannot be written in generated
    code, or hides an attribute of `torch.nn.Module`; or unless it names both a tensor and a module (`a`
    beside `a.b`: the shorter one gives way).

    Args:
        names: initializer names, unique.
        taken: attribute names that a segment must not hide.

    Returns:
        Attribute path by initializer name; paths are unique.
    """
    ordered = list(dict.fromkeys(names))
    prefixes = {name[:i] for name in ordered for i, char in enumerate(name) if char == "."}
    result: dict[str, str] = {}
    for name in ordered:
        segments = name.split(".")
        legal = name not in prefixes and segments[0] != RESERVED
        legal = legal and all(_is_legal(segment, taken) for segment in segments)
        result[name] = name if legal else f"{RESERVED}.renamed_{len(result)}"
    return result


def _is_legal(segment: str, taken: frozenset[str]) -> bool:
    plain = bool(segment) and not keyword.iskeyword(segment) and not _UNPRINTABLE.search(segment)
    return plain and segment not in taken


def identifiers(names: Iterable[str]) -> list[str]:
    """A distinct Python identifier for each name, as close to it as possible."""
    chosen: list[str] = []
    for name in names:
        text = re.sub(r"\W", "_", name, flags=re.ASCII) or "input"
        if text[0].isdigit() or keyword.iskeyword(text) or text in ("self", "torch", "device", "inf", "nan"):
            text = f"input_{text}"
        unique, count = text, 1
        while unique in chosen:
            unique, count = f"{text}_{count}", count + 1
        chosen.append(unique)
    return chosen
