"""Energy of an inference: what its arithmetic, its traffic and its duration cost.

    E = P_static · t + e_mac · MACs + e_byte · bytes

Every byte that a kernel reads or writes costs the same here, wherever it comes from: published devices do not say
more. A device whose description has no `[energy]` has no energy model, and its estimates no `energy_j`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sartor.cost_models.descriptions import TargetDescription

_PICO = 1e-12


@dataclasses.dataclass(frozen=True)
class EnergyModel:
    """Constants of one device at one precision.

    Attributes:
        static_w: watts while a network runs.
        pj_per_mac: picojoules per multiply-accumulate.
        pj_per_byte: picojoules per byte read or written.
    """

    static_w: float
    pj_per_mac: float
    pj_per_byte: float

    @staticmethod
    def of(description: TargetDescription, precision: str) -> EnergyModel | None:
        """The model of a device; None where its description does not say enough."""
        known = description.constants.energy if description.constants else None
        if known is None or precision not in known.pj_per_mac:
            return None
        return EnergyModel(known.static_w.value, known.pj_per_mac[precision].value, known.pj_per_byte.value)

    def energy_j(self, macs: Any, traffic_bytes: Any, latency_s: Any) -> Any:
        """Joules of one inference; numbers or arrays of one shape.

        Args:
            macs: multiply-accumulates.
            traffic_bytes: read and written by all kernels.
            latency_s: how long it takes.
        """
        moving = _PICO * (self.pj_per_mac * macs + self.pj_per_byte * traffic_bytes)
        return self.static_w * latency_s + moving
