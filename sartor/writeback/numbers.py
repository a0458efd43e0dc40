"""Numbers that the author's modules keep beside their tensors, such as `self.num_heads`.

A forward method that reads its widths from attributes needs these attributes to follow. Which ones they
are cannot be known, but it can be tried: where every number `n` that a module writes into its reshapes and
splits became `m`, its attributes that hold `n` are set to `m`; where only some did, those that have
"head" in their name. Only the proof decides whether that was
right, and it is tried only where the module without it was refused.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import nn

from sartor.ir.program import Program
from sartor.writeback.layers import knows

Numbers = dict[int, set[int]]
"""What each number became at the places where it was written."""
_WIDTHS = (
    "Reshape",
    "Expand",
    "Split",
)  # bounds of a Slice are positions: equal numbers mean other things there


def repeat(module: nn.Module, program: Program, narrowed: Program) -> bool:
    """Set attributes of `module` that repeat a number which the plan changed; whether there were any.

    Args:
        module: a private copy with cut tensors.
        program: the program before.
        narrowed: the program after.
    """
    changed = False
    for path, numbers in _by_module(program, narrowed).items():
        child = module.get_submodule(path)
        if knows(child):
            continue
        for name, value in list(child.__dict__.items()):
            if name.startswith("_") or name == "training":
                continue
            new = _renewed(value, numbers, "head" in name)
            if type(new) is type(value) and new != value:
                setattr(child, name, new)
                changed = True
    return changed


def _renewed(value: Any, numbers: Numbers, named: bool) -> Any:
    """`value`, an int or a list or tuple of them, with changed numbers replaced."""

    def new(number: int) -> int:
        became = numbers.get(number, set())
        # Of the two 3 in (n, t, 3, 3, 64) one is the query, key and value, the other the heads.
        candidates = became - {number} if named else became
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
