"""Reads `--budget latency=0.5x,macs=1200000`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from sartor.errors import UsageError

UNITS: Mapping[str, Mapping[str, float]] = {
    "latency": {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0},
    "macs": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "weight_bytes": {
        "": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
    },
    "peak_activation_bytes": {
        "": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
    },
}  # fmt: skip
"""Per budget key, the accepted units of an absolute limit (in lower case) and their value in base units."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """An upper limit of one quantity.

    Attributes:
        value: fraction of the baseline when `relative`, otherwise seconds, MACs or bytes.
        relative: whether the baseline scales it.
    """

    value: float
    relative: bool

    def absolute(self, baseline: float) -> float:
        """The limit in base units, given the baseline's value."""
        return self.value * baseline if self.relative else self.value


def parse_budget(text: str) -> dict[str, Limit]:
    """`latency=0.5x,macs=1.2G` as limits by key, in the order given.

    Raises:
        UsageError: unknown or repeated key, malformed value, unknown unit, or a limit that is not positive.
    """
    limits: dict[str, Limit] = {}
    for part in text.split(","):
        key, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator or not key or not value:
            raise UsageError(
                f"Budget '{text}' is malformed at '{part}'; expected KEY=VALUE such as latency=0.5x."
            )
        if key not in UNITS:
            raise UsageError(f"Unknown budget key '{key}'; known: {', '.join(UNITS)}.")
        if key in limits:
            raise UsageError(f"Budget key '{key}' is given twice; give it once.")
        limits[key] = _limit(key, value)
    return limits


def _limit(key: str, text: str) -> Limit:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Zµ]*)", text)
    units = UNITS[key]
    spelled = ", ".join(repr(unit) for unit in units if unit)
    if match is None:
        raise UsageError(
            f"Budget '{key}={text}' is malformed; expected a fraction of the baseline such as 0.5x, or a "
            f"number with a unit of {spelled}."
        )
    value, unit = float(match[1]), match[2].lower()
    if unit != "x" and unit not in units:
        if not unit:
            raise UsageError(f"Budget '{key}={text}' has no unit; write 0.5x, or add one of {spelled}.")
        raise UsageError(
            f"Budget '{key}={text}' has the unknown unit '{match[2]}'; use 'x' or one of {spelled}."
        )
    if not math.isfinite(value) or value <= 0.0:
        raise UsageError(f"Budget '{key}={text}' is not a positive number.")
    return Limit(value, relative=True) if unit == "x" else Limit(value * units[unit], relative=False)
