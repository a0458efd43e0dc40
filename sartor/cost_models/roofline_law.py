"""The law of the roofline: what a kernel cannot be faster than, from constants of the device.

    t = launch + max(macs / (rate · utilisation), Σ bytes of level l / bandwidth of level l)

MACs are those of the channels rounded up to the device's grid. Utilisation is what is left when the tiles of a
kernel are dealt out to units in whole waves, `tiles / (units · ⌈tiles / units⌉)`. Activations are served by the
innermost level that holds them; of the weights, each level serves the share of the whole network's weights that
fits it. Nothing here is ever cheaper with more channels.

Reference: S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for
multicore architectures", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sartor.cost_models.descriptions import TargetDescription
from sartor.cost_models.work import Work, item_bytes
from sartor.errors import UsageError
from sartor.ir.operands import RECURRENT

UNFITTED_LOG_SD = 1.0
"""Of a time from published constants: devices stay below their peaks. Over the rebuilt networks of the thesis' tables,
measured over predicted time has a median of 2.4 and a standard deviation of its logarithm of 0.51
(`benchmarks/thesis_ranking.py`), 1.0 about the prediction."""
PRECISION_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "int8": 1.0}
_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})


@dataclasses.dataclass(frozen=True)
class Level:
    """Memory between arithmetic and main memory.

    Attributes:
        bytes: capacity; infinite where nothing is too large for it.
        bytes_per_s: bandwidth.
        holds: `all`, `weights` or `activations`.
    """

    bytes: float
    bytes_per_s: float
    holds: str = "all"


@dataclasses.dataclass(frozen=True)
class RooflineConstants:
    """Numbers of one device at one precision.

    Attributes:
        macs_per_s: multiply-accumulates per second of the whole device.
        bytes_per_s: bandwidth of main memory.
        launch_s: seconds that every kernel costs before it computes.
        depthwise_macs_per_s: rate of depthwise convolutions; None: as all others.
        call_s: seconds that every inference costs once.
        units: that compute independently.
        tile_rows: output positions that one unit computes at a time.
        tile_columns: output channels likewise.
        grid_out: step of output channels.
        grid_in: step of input channels.
        levels: innermost first; each larger than the one before.
        log_sd: standard deviation of the logarithm of a kernel's time.
        samples: timed kernels that the constants rest on; 0: none.
    """

    macs_per_s: float
    bytes_per_s: float
    launch_s: float = 0.0
    depthwise_macs_per_s: float | None = None
    call_s: float = 0.0
    units: int = 1
    tile_rows: int = 1
    tile_columns: int = 1
    grid_out: int = 1
    grid_in: int = 1
    levels: tuple[Level, ...] = ()
    log_sd: float = UNFITTED_LOG_SD
    samples: int = 0

    def __post_init__(self) -> None:
        positive = ("macs_per_s", "bytes_per_s", "units", "tile_rows", "tile_columns", "grid_out", "grid_in")
        for name in positive:
            if not getattr(self, name) > 0:
                raise UsageError(f"Roofline constant '{name}' is {getattr(self, name)}; it must be positive.")

    @staticmethod
    def of(description: TargetDescription, precision: str) -> RooflineConstants:
        """Constants of a published device.

        Raises:
            UsageError: the description has no constants, or not for this precision.
        """
        known = description.constants
        if known is None:
            raise UsageError(
                f"Target '{description.name}' has no published constants: its kernels are measured. "
                "Build a profile of it with 'sartor profile', or name a device of 'sartor targets --devices'."
            )
        if precision not in known.macs_per_s:
            raise UsageError(
                f"Device '{description.name}' has no rate for precision '{precision}'; "
                f"it computes in {list(description.precisions)}."
            )

        def whole(number: Any) -> int:
            return 1 if number is None else round(number.value)

        depthwise = known.depthwise_macs_per_s.get(precision)
        return RooflineConstants(
            macs_per_s=known.macs_per_s[precision].value,
            bytes_per_s=known.bandwidth_bytes_per_s.value,
            launch_s=known.launch_s.value,
            depthwise_macs_per_s=None if depthwise is None else depthwise.value,
            units=whole(known.units),
            tile_rows=whole(known.tile_rows),
            tile_columns=whole(known.tile_columns),
            grid_out=whole(known.grid_out.get(precision)),
            grid_in=whole(known.grid_in.get(precision)),
            levels=tuple(Level(c.bytes.value, c.bandwidth_bytes_per_s.value, c.holds) for c in known.caches),
        )


@dataclasses.dataclass(frozen=True)
class Terms:
    """Where the time of kernels goes: arrays of seconds."""

    compute_s: np.ndarray
    bandwidth_s: np.ndarray
    launch_s: float

    @property
    def seconds(self) -> np.ndarray:
        """Launch, and the slower of computing and moving."""
        return self.launch_s + np.maximum(self.compute_s, self.bandwidth_s)

    def bound(self) -> str:
        """The largest term of a single kernel."""
        terms = {
            "compute": float(self.compute_s),
            "bandwidth": float(self.bandwidth_s),
            "launch": self.launch_s,
        }
        return max(terms, key=terms.__getitem__)


def narrowing(spec: Mapping[str, Any], precision: str | None) -> float:
    """Bytes of a float at a precision, in units of those that the program has; None: as it has them."""
    types = [spec["dtype"]] if "dtype" in spec else [i["dtype"] for i in spec["inputs"] if i is not None]
    floats = [t for t in types if t in _FLOATS]
    if precision is None or not floats:
        return 1.0
    return PRECISION_BYTES[precision] / item_bytes(floats[0])


def terms(
    constants: RooflineConstants,
    spec: Mapping[str, Any],
    found: Work,
    precision: str | None = None,
    network_weight_bytes: Any = None,
) -> Terms:
    """Where the time of a kernel goes.

    Args:
        constants: of the device.
        spec: of the kernel's signature.
        found: its work.
        precision: that it runs in; None: as the program has it.
        network_weight_bytes: of the network that it runs in, at this precision; None: the kernel runs alone.
    """
    narrow = narrowing(spec, precision)
    weights = found.weight_bytes * narrow
    network = weights if network_weight_bytes is None else network_weight_bytes
    moving = _weight_seconds(constants, weights, network)
    moving = moving + _activation_seconds(constants, (found.read + found.written) * narrow)
    return Terms(_compute_seconds(constants, spec, found), moving, constants.launch_s)


def _compute_seconds(c: RooflineConstants, spec: Mapping[str, Any], found: Work) -> np.ndarray:
    depth: Any
    groups: Any
    if "multiplier" in spec:  # depthwise: channels are independent, and side by side in registers
        columns = _up(found.groups, c.grid_out) * found.columns
        rate = c.depthwise_macs_per_s or c.macs_per_s
        depth, groups = found.taps, 1.0
    else:
        columns, rate = _up(found.columns, c.grid_out), c.macs_per_s
        depth, groups = _up(found.channels, c.grid_in) * found.taps, found.groups
    tiles = np.ceil(found.rows / c.tile_rows) * np.ceil(columns / c.tile_columns)
    in_turn = groups if spec["op"] in RECURRENT else 1.0  # steps of a sequence wait for each other
    waves = in_turn * np.ceil(groups / in_turn * tiles / c.units)
    macs = waves * c.units * c.tile_rows * c.tile_columns * depth
    return np.where(found.macs > 0, macs / rate, 0.0)


def _activation_seconds(c: RooflineConstants, count: np.ndarray) -> np.ndarray:
    rate = np.full(np.shape(count), c.bytes_per_s)
    for level in reversed(c.levels):
        if level.holds != "weights":
            rate = np.where(count <= level.bytes, level.bytes_per_s, rate)
    return count / rate


def _weight_seconds(c: RooflineConstants, count: np.ndarray, network: Any) -> np.ndarray:
    seconds_per_byte: Any = 0.0
    served: Any = 0.0
    whole = np.maximum(network, 1.0)
    for level in c.levels:
        if level.holds == "activations":
            continue
        share = (
            np.minimum(1.0, level.bytes / whole) if math.isfinite(level.bytes) else 1.0 * (whole < math.inf)
        )
        seconds_per_byte = seconds_per_byte + np.maximum(share - served, 0.0) / level.bytes_per_s
        served = np.maximum(served, share)
    return np.asarray(count * (seconds_per_byte + (1.0 - served) / c.bytes_per_s))


def _up(count: np.ndarray, step: int) -> np.ndarray:
    """Rounded up to a multiple of `step`."""
    return np.ceil(count / step - 1e-9) * step
