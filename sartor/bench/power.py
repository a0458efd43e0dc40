"""Power from the sensors that a board has: RAPL of x86 processors, INA3221 monitors of Jetson boards.

Without a readable sensor there is no power: it is never derived from anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

INTERVAL_S = 0.1
"""Between two readings."""
_SHORTEST_S = 0.02
"""Of a mean. RAPL counts every millisecond; over much less than this its steps would show as power."""
_TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0", "SYS_VIN_HV")
"""Rails of NVIDIA's boards that feed all the others; adding up rails would count some twice."""


class Sensor(Protocol):
    """Something that gives watts."""

    name: str

    def start(self) -> None:
        """Begin anew: what was drawn before is in no later reading."""
        ...

    def read(self) -> float | None:
        """Watts now, or the mean since the last reading or the start; None where that is too short ago."""
        ...


@dataclasses.dataclass
class Rapl:
    """Sum over the processor packages, mean since the last reading or the start.

    Attributes:
        zones: folders with `energy_uj` (microjoules, wrapping at `max_energy_range_uj`).
        name: shown beside the number.
    """

    zones: Sequence[Path]
    name: str = "RAPL, processor packages: everything that runs on them"
    _last: tuple[float, list[int]] | None = None

    def start(self) -> None:
        """Count from now on."""
        self._last = None  # also where the counters cannot be read now
        self._last = self._counters()

    def read(self) -> float | None:
        """Mean watts since the last reading or the start."""
        last, counters = self._last, self._counters()
        if last is not None and counters[0] - last[0] < _SHORTEST_S:
            return None
        self._last = counters
        if last is None:
            return None
        used = 0
        for zone, before, after in zip(self.zones, last[1], counters[1], strict=True):
            used += after - before
            if after < before:
                used += _integer(zone / "max_energy_range_uj")
        return used * 1e-6 / (counters[0] - last[0])

    def _counters(self) -> tuple[float, list[int]]:
        return time.monotonic(), [_integer(zone / "energy_uj") for zone in self.zones]


@dataclasses.dataclass
class Jetson:
    """The input rail of a Jetson board.

    Attributes:
        voltage: file in millivolts.
        current: file in milliamperes.
        name: shown beside the number.
    """

    voltage: Path
    current: Path
    name: str

    def start(self) -> None:
        """Nothing to do: a reading is of its moment."""

    def read(self) -> float | None:
        """Watts now."""
        return _integer(self.voltage) * 1e-3 * _integer(self.current) * 1e-3


def find_sensor(root: Path = Path("/sys")) -> tuple[Sensor | None, str]:
    """A sensor of this machine, or why there is none.

    Args:
        root: where sysfs is mounted.
    """
    reasons = []
    for find in (_jetson, _rapl):
        sensor, reason = find(root)
        if sensor is not None:
            return sensor, ""
        reasons.append(reason)
    return None, "; ".join(reasons)


def _rapl(root: Path) -> tuple[Sensor | None, str]:
    folder = root / "class" / "powercap"
    zones = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:  # a part of a package
            continue
        try:
            if not (zone / "name").read_text(encoding="utf-8").startswith("package"):
                continue
            _integer(zone / "energy_uj")
            _integer(zone / "max_energy_range_uj")
        except (OSError, ValueError) as error:
            return None, f"RAPL cannot be read: {_why(error)}"
        zones.append(zone)
    return (Rapl(zones), "") if zones else (None, "no RAPL package below class/powercap")


def _jetson(root: Path) -> tuple[Sensor | None, str]:
    rails = []
    for label in sorted((root / "bus" / "i2c" / "drivers" / "ina3221").glob("*/hwmon/hwmon*/in*_label")):
        try:
            rail = label.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        rails.append(rail)
        number = label.name.removeprefix("in").removesuffix("_label")
        files = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
        if rail in _TOTAL_RAILS:
            try:
                for file in files:
                    _integer(file)
            except (OSError, ValueError) as error:
                return None, f"rail '{rail}' of INA3221 cannot be read: {_why(error)}"
            return Jetson(*files, name=f"INA3221, rail {rail}: the whole board"), ""
    if rails:
        return None, f"none of the INA3221 rails {', '.join(rails)} feeds the whole board"
    return None, "no INA3221 monitor"


class Sampler:
    """Reads a sensor while the block runs, and once more at its end; what was before is in no reading.

    Attributes:
        watts: readings so far.
    """

    def __init__(self, sensor: Sensor, interval_s: float = INTERVAL_S):
        self.watts: list[float] = []
        self._sensor, self._interval_s = sensor, interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sampler:
        with contextlib.suppress(OSError, ValueError):
            self._sensor.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._read()

    @property
    def highest_w(self) -> float | None:
        """The highest reading, or None if the sensor gave none."""
        return max(self.watts, default=None)

    def _sample(self) -> None:
        while not self._done.wait(self._interval_s):
            self._read()

    def _read(self) -> None:
        try:
            watts = self._sensor.read()
        except (OSError, ValueError):  # it went away: what is missing is not made up
            return
        if watts is not None:
            self.watts.append(watts)


def _integer(path: Path) -> int:
    return int(path.read_text(encoding="ascii").strip())


def _why(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "not a number"
