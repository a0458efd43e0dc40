"""More units of channel groups, and the same function.

Chen et al., "Net2Net: accelerating learning via knowledge transfer", ICLR 2016, section 2.3: units are copied with
everything that makes them, and what reads them is divided among the copies. Unequal shares (copy `i` of `m` has
`2 i / (m (m + 1))`) keep copies from learning the same, without noise that would change the function.
"""

from __future__ import annotations

import numpy as np

from sartor.errors import PlanError
from sartor.ir.channels import ChannelAnalysis, ChannelGroup
from sartor.ir.channels.labels import Factor
from sartor.ir.channels.masking import UnmaskableError, Zero
from sartor.ir.program import Program
from sartor.passes.rewriter import Rewriter
from sartor.passes.scaled_reads import ScaledRead, scale_reads
from sartor.passes.widths import Widened, Widths


def obstacle(analysis: ChannelAnalysis, group: ChannelGroup) -> str:
    """Why a group cannot be widened; empty if it can."""
    if group.mixed:
        return f"its features are mixed without weights: {group.mixed}"
    if group.size == 1:
        return "it has one unit, of whose copies it cannot be told which way they lie"
    try:
        places = analysis.zeros_of(group, linear=True)
    except UnmaskableError as error:
        return error.reason
    for zero in places:
        kind = analysis.program.initializers[zero.initializer].dtype
        if kind is None or not kind.is_floating_point():
            return f"'{zero.initializer}', which reads it, holds no floats to be divided"
    return ""


def share_out(program: Program, analysis: ChannelAnalysis, widths: Widths, rewriter: Rewriter) -> None:
    """Divide what reads copied units of `program` among the copies, which are there already.

    Raises:
        PlanError: a group cannot be widened.
    """
    reads = []
    for one in widths.widened:
        group = analysis.group(one.name)
        if reason := obstacle(analysis, group):
            raise PlanError(f"The plan widens group '{one.name}', which cannot be: {reason}. Leave it out.")
        reads += [
            read
            for zero in analysis.zeros_of(group, linear=True)
            if (read := _share(analysis, widths, zero, one)) is not None
        ]
    scale_reads(program, reads, rewriter)


def _share(analysis: ChannelAnalysis, widths: Widths, zero: Zero, one: Widened) -> ScaledRead | None:
    atoms = analysis.propagation.parameter_atoms[zero.initializer, zero.axis]
    order = widths.order(Factor((zero.axis,), atoms), 0)
    if order is None or one.name not in order.copy:
        return None
    often = one.times[one.unit_of[atoms[order.old]]]
    shares = 2 * (order.copy[one.name] + 1) / (often * (often + 1))
    factors = np.where(zero.mask[order.old], shares, 1.0)
    return ScaledRead(zero.initializer, zero.axis, factors, zero.node, zero.input)
