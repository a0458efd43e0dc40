"""Power from the sensors that a board has: RAPL of x86 processors, INA3221 monitors of Jetson boards.

Without a readable sensor there is no power: it is never derived from anything else.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

INTERVAL_S = 0.1
"""Between two readings. RAPL counts every millisecond; over less than this its steps show."""
_TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0", "SYS_VIN_HV")
"""Rails of NVIDIA's boards that feed all the others; adding up rails would count some twice."""


class Sensor(Protocol):
    """Something that gives watts."""

    name: str

    def read(self) -> float | None:
        """Watts now, or since the last reading; None at a first reading that has nothing to go from."""
        ...


@dataclasses.dataclass
class Rapl:
    """Sum over the processor packages, mean since the last reading.

    Attributes:
        zones: folders with `energy_uj` (microjoules, wrapping at `max_energy_range_uj`).
        name: shown beside the number.
    """

    zones: Sequence[Path]
    name: str = "RAPL, processor packages: everything that runs on them"
    _last: tuple[float, list[int]] | None = None

    def read(self) -> float | None:
        """Mean watts since the last reading."""
        now, energies = time.monotonic(), [_integer(zone / "energy_uj") for zone in self.zones]
        last, self._last = self._last, (now, energies)
        if last is None or now <= last[0]:
            return None
        used = 0
        for zone, before, after in zip(self.zones, last[1], energies, strict=True):
            used += (
                after - before if after >= before else after - before + _integer(zone / "max_energy_range_uj")
            )
        return used * 1e-6 / (now - last[0])


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
    """Reads a sensor while the block runs.

    Attributes:
        watts: readings so far.
    """

    def __init__(self, sensor: Sensor, interval_s: float = INTERVAL_S):
        self.watts: list[float] = []
        self._sensor, self._interval_s = sensor, interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sampler:
        self._read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if not self.watts:  # a block shorter than the interval still has its own mean
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
