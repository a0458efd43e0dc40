"""What a one-kernel model costs beyond its kernel: the call, and converting to a blocked layout and back.

Inside a network values stay in the runtime's own layout; a sample enters and leaves it, which can take
longer than a 1x1 convolution. The cost is measured with depthwise convolutions of size 1: with one of
them a model takes `gap + k`, with three `gap + 3k`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.samples import channels_of, empty_model, identity_model, per_group
from sartor.cost_models.signatures import Signature
from sartor.ir.fusion_layout import BLOCK, convolves_blocked

LAYOUT_FAMILIES = ("conv", "depthwise")
_MOST_PROBES = 40
_MOST_SHARE = 0.9  # of a sample that is explained by its boundary, at most

Map = tuple[int, ...]
"""Batch and spatial sizes of a feature map: `(N, H, W)`."""


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Measured boundary costs of one target.

    Attributes:
        call_s: an empty call.
        gaps: per feature map, ascending channel counts and the seconds beyond the kernel (call included)
            of a model that reads and writes such a map.
        aligned_only: convolutions of other widths than `enters` says do not use the layout, and pay nothing.
    """

    call_s: float
    gaps: Mapping[Map, tuple[tuple[int, ...], tuple[float, ...]]]
    aligned_only: bool = False

    def own_s(self, signature: Signature, sizes: Sequence[float], total_s: float) -> float:
        """The kernel's own share of a sample that took `total_s`."""
        beyond = self.call_s
        if signature.family in LAYOUT_FAMILIES:
            crossed = ends_of(signature, sizes)
            if self.aligned_only:
                reads, makes = enters(signature.spec, sizes)
                crossed = crossed[:1] * reads + crossed[1:] * makes
            ends = [self._gap(where, channels) for where, channels in crossed]
            if all(math.isfinite(gap) for gap in ends):
                beyond += sum(gap - self.call_s for gap in ends) / 2
        return total_s - min(max(beyond, 0.0), _MOST_SHARE * total_s)

    def _gap(self, where: Map, channels: int) -> float:
        if where in self.gaps:
            axis, seconds = self.gaps[where]
            within = float(np.interp(channels, axis, seconds))
            return self.call_s + (within - self.call_s) * max(1.0, channels / axis[-1])
        return self._between(where, channels)

    def _between(self, where: Map, channels: int) -> float:
        """The gap of a map that was not probed: from the probed ones of nearest size, per element."""
        rows = [math.prod(other) for other in self.gaps]
        if not rows:
            return math.nan
        wanted = math.prod(where)
        below = max((r for r in rows if r <= wanted), default=min(rows))
        above = min((r for r in rows if r >= wanted), default=max(rows))
        found = [
            (self._gap(other, channels) - self.call_s) / size
            for other, size in zip(self.gaps, rows, strict=True)
            if size in (below, above)
        ]
        return self.call_s + wanted * sum(found) / len(found)


def ends_of(signature: Signature, sizes: Sequence[float]) -> list[tuple[Map, int]]:
    """Feature maps, with channels, that a convolution's sample model reads and writes."""
    spec: dict[str, Any] = signature.spec
    c_in, c_out = channels_of(spec, sizes)
    inner, outer = (spec["batch"], *spec["spatial"]), (spec["batch"], *spec["out"])
    residuals = sum(op_type == "Add" for op_type, _ in spec["epilogue"])
    return [(inner, c_in), *[(outer, c_out)] * (1 + residuals)]


def enters(spec: Mapping[str, Any], sizes: Sequence[float]) -> tuple[bool, bool]:
    """Whether ONNX Runtime converts what a convolution reads, and what it makes, to and from its blocked layout.

    Reference: `onnxruntime/core/optimizer/nchwc_transformer.cc`.
    """
    if spec["op"] != "Conv" or len(spec["spatial"]) != 2:
        return False, False
    groups, inner, outer = per_group(spec, sizes)
    blocked = bool(convolves_blocked(groups, inner, outer))
    image = groups == 1 and inner < BLOCK  # read as it is
    return blocked and not image, blocked


def probes(wanted: Iterable[tuple[Map, int]]) -> list[tuple[Map, int]]:
    """Which (map, channels) to measure: all that occur, or a spread of channels per map if too many."""
    channels: dict[Map, set[int]] = {}
    for where, count in wanted:
        channels.setdefault(where, set()).add(max(count, 8))
    if not channels:
        return []
    most = max(2, _MOST_PROBES // len(channels))
    chosen = []
    for where in sorted(channels):
        ordered = sorted(channels[where])
        keep = np.unique(np.linspace(0, len(ordered) - 1, min(most, len(ordered))).round().astype(int))
        chosen += [(where, ordered[i]) for i in keep]
    return chosen


def probe_models(chosen: Sequence[tuple[Map, int]]) -> list[bytes]:
    """An empty call, then one and three identities per probe."""
    models = [empty_model()]
    for (batch, *spatial), channels in chosen:
        models += [identity_model((batch, channels, *spatial), repeats) for repeats in (1, 3)]
    return models


def boundary_from(
    chosen: Sequence[tuple[Map, int]], seconds: Sequence[float], *, aligned_only: bool = False
) -> Boundary:
    """Boundary from the times of `probe_models(chosen)`; NaN where a model could not be timed."""
    call = seconds[0] if math.isfinite(seconds[0]) else 0.0
    found: dict[Map, list[tuple[int, float]]] = {}
    for (where, channels), one, three in zip(chosen, seconds[1::2], seconds[2::2], strict=True):
        if math.isfinite(one) and math.isfinite(three):
            found.setdefault(where, []).append((channels, max(call, one - (three - one) / 2)))
    gaps = {
        where: (tuple(c for c, _ in points), tuple(g for _, g in points)) for where, points in found.items()
    }
    return Boundary(call, gaps, aligned_only)
