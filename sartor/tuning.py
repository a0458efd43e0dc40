"""Weights that a cut network was trained to, put back where they came from in the network that it was cut out of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sartor.ir.channels import ChannelAnalysis
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.rewriter import Rewriter

if TYPE_CHECKING:
    from collections.abc import Mapping


def put_back(program: Program, plan: Plan, analysis: ChannelAnalysis, trained: Program) -> Program:
    """`program` with the weights of a network that its plan led to; what the plan took away stays as it was.

    The same plan makes the trained network of it again, and a plan that takes more away cuts that one. Tables that the
    plan gave another size, such as of positions, stay as they were.

    Args:
        program: that the plan is for; it is not changed.
        plan: widths and blocks that go, and input sizes.
        analysis: channel groups of `program`.
        trained: what `apply_plan` made, trained since.
    """
    from sartor.writeback.tensors import kept_indices

    clone = program.clone()
    rewriter = Rewriter(clone, "put-back")
    kept = kept_indices(program, plan, analysis)
    for name in trained.initializers:
        if name not in clone.initializers:
            continue
        whole, part = program.initializer_array(name), trained.initializer_array(name)
        at = _places(whole.shape, kept.get(name, {}))
        if whole.dtype != part.dtype or whole.dtype.kind != "f" or part.shape != tuple(map(len, at)):
            continue
        if not np.array_equal(whole[np.ix_(*at)], part):
            whole = whole.copy()
            whole[np.ix_(*at)] = part
            rewriter.set_initializer(clone.initializers[name], whole)
    clone.invalidate()
    return clone


def _places(shape: tuple[int, ...], kept: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    return [kept.get(axis, np.arange(length)) for axis, length in enumerate(shape)]
