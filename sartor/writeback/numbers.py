"""Numbers that the author's modules keep beside their tensors, such as `self.num_heads`.

A forward method that reads its widths from attributes needs these attributes to follow. Which ones they
are cannot be known, but it can be tried: where every number `n` that a module writes into its reshapes and
splits became `m`, its attributes that hold `n` are set to `m`. Where only some did (of the two 3 in
`reshape(n, t, 3, 3, 64)` one counts query, key and value, the other the heads), names have to help. Only
the proof decides whether that was right, and it is tried only where the module without it was refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
from torch import nn

from sartor.ir.program import Program
from sartor.writeback.layers import knows

Changes = Mapping[tuple[str, str], Any]
"""New value by module path and attribute."""
Numbers = dict[int, set[int]]
"""What each number became at the places where it was written."""
_WIDTHS = (
    "Reshape",
    "Expand",
    "Split",
)  # bounds of a Slice are positions: equal numbers mean other things there
_HINTS = ("heads", "dim")


def proposals(module: nn.Module, program: Program, narrowed: Program) -> Iterator[Changes]:
    """What to try, in order: nothing, what is certain, what names make likely.

    Args:
        module: the original.
        program: its program.
        narrowed: the program after.
    """
    yield {}
    found = _by_module(program, narrowed)
    yield _changes(module, found, "")
    for hint in _HINTS:
        yield _changes(module, found, hint)


def follow(module: nn.Module, changes: Changes) -> None:
    """Set the attributes of `module`, a private copy."""
    for (path, name), value in changes.items():
        setattr(module.get_submodule(path), name, value)


def _changes(module: nn.Module, found: Mapping[str, Numbers], hint: str) -> Changes:
    changes: dict[tuple[str, str], Any] = {}
    for path, numbers in found.items():
        child = module.get_submodule(path)
        if knows(child):
            continue
        for name, value in child.__dict__.items():
            if name.startswith("_") or name == "training":
                continue
            new = _renewed(value, numbers, bool(hint) and hint in name)
            if new != value:
                changes[path, name] = new
    return changes


def _renewed(value: Any, numbers: Numbers, likely: bool) -> Any:
    """`value`, an int or a list or tuple of them, with changed numbers replaced."""

    def new(number: int) -> int:
        became = numbers.get(number, set())
        candidates = became - {number} if likely else became
        return next(iter(candidates)) if number > 1 and len(candidates) == 1 else number

    if type(value) is int:
        return new(value)
    if type(value) in (list, tuple) and all(type(item) is int for item in value):
        return type(value)(new(item) for item in value)
    return value


def _by_module(program: Program, narrowed: Program) -> dict[str, Numbers]:
    """By module path, what the numbers in its data movement became, of modules where one changed."""
    after = {node.name: node for node in narrowed.nodes()}
    seen: dict[str, Numbers] = {}
    for node in program.nodes():
        record, other = program.provenance.get(node.name or ""), after.get(node.name)
        if record is None or other is None or node.op_type not in _WIDTHS:
            continue
        old, new = (_widths(p, n) for p, n in ((program, node), (narrowed, other)))
        if len(old) == len(new):
            numbers = seen.setdefault(record.module, {})
            for a, b in zip(old, new, strict=True):
                numbers.setdefault(a, set()).add(b)
    return {path: numbers for path, numbers in seen.items() if any(b != {a} for a, b in numbers.items())}


def _widths(program: Program, node: ir.Node) -> list[int]:
    """The target of a Reshape or Expand, or the sizes of a Split; empty when computed."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or not value.is_initializer():
        return []
    return [int(n) for n in program.initializer_array(value.name or "").ravel()]
