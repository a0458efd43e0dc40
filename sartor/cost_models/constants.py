"""Constants of a device as its description file gives them: every number with its source, date and certainty.

A number is written `{ value = 25.6e9, source = "module", certainty = "datasheet" }`; `source` names an entry of
the file's `[sources]`, which holds the document and its date. What is not known is left out, and a model that
needs it says so. 1 MAC = 2 FLOP; published peaks with sparsity are halved before they are written down.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from sartor.errors import UsageError

CERTAINTIES = ("datasheet", "derived", "fitted", "uncertain")
PRECISIONS = ("f32", "f16", "bf16", "int8")
HOLDS = ("all", "weights", "activations")
_LIMITS = ("sram_bytes", "flash_bytes")


@dataclasses.dataclass(frozen=True)
class Number:
    """One constant.

    Attributes:
        value: in the unit that its key names.
        source: where it was read, or what it was computed or fitted from.
        date: of the source, `YYYY` or `YYYY-MM`.
        certainty: `datasheet` (the maker says so), `derived` (arithmetic on such numbers), `fitted` (to measurements
            that `source` names) or `uncertain` (a third party's number, or an estimate).
    """

    value: float
    source: str
    date: str
    certainty: str


@dataclasses.dataclass(frozen=True)
class CacheLevel:
    """Memory between the arithmetic and main memory.

    Attributes:
        name: for people.
        bytes: capacity.
        bandwidth_bytes_per_s: of reads from it.
        holds: `all`, `weights` or `activations`.
    """

    name: str
    bytes: Number
    bandwidth_bytes_per_s: Number
    holds: str = "all"


@dataclasses.dataclass(frozen=True)
class EnergyConstants:
    """What computing, moving and waiting cost.

    Attributes:
        static_w: watts while a network runs, whatever it computes.
        pj_per_mac: picojoules per multiply-accumulate, by precision.
        pj_per_byte: picojoules per byte that a kernel reads or writes.
    """

    static_w: Number
    pj_per_mac: Mapping[str, Number]
    pj_per_byte: Number


@dataclasses.dataclass(frozen=True)
class DeviceConstants:
    """What a roofline needs, and limits; see the module docstring.

    Attributes:
        macs_per_s: peak dense multiply-accumulates per second of the whole device, by precision.
        depthwise_macs_per_s: the same where one input channel feeds one output: matrix units do not help there.
        bandwidth_bytes_per_s: of main memory (or of the link to it).
        launch_s: seconds per kernel before it computes anything.
        units: independent units (cores, multiprocessors) among which a kernel's tiles are dealt out.
        tile_rows: output positions of one tile.
        tile_columns: output channels of one tile.
        grid_out: output channels are computed in steps of it, by precision.
        grid_in: input channels likewise.
        caches: innermost first.
        limits: `sram_bytes` for activations and `flash_bytes` for weights, where there is nothing behind them.
        energy: None where it is not known.
    """

    macs_per_s: Mapping[str, Number]
    bandwidth_bytes_per_s: Number
    launch_s: Number
    depthwise_macs_per_s: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    units: Number | None = None
    tile_rows: Number | None = None
    tile_columns: Number | None = None
    grid_out: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    grid_in: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    caches: tuple[CacheLevel, ...] = ()
    limits: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    energy: EnergyConstants | None = None

    def numbers(self) -> dict[str, Number]:
        """Every number by its place, e.g. `macs_per_s.f16` or `caches[0].bytes`."""
        found: dict[str, Number] = {}
        _collect("", dataclasses.asdict(self), found)
        return found


def _collect(path: str, entry: Any, found: dict[str, Number]) -> None:
    if isinstance(entry, Mapping) and set(entry) == {f.name for f in dataclasses.fields(Number)}:
        found[path] = Number(**entry)
    elif isinstance(entry, Mapping):
        for key, item in entry.items():
            _collect(f"{path}.{key}" if path else key, item, found)
    elif isinstance(entry, (list, tuple)):
        for index, item in enumerate(entry):
            _collect(f"{path}[{index}]", item, found)


def parse_constants(entry: Mapping[str, Any], name: str) -> DeviceConstants:
    """Constants of a description's tables.

    Args:
        entry: the tables `sources`, `compute`, `grid`, `memory`, `cache`, `launch`, `limits`, `energy`.
        name: of the file, for errors.

    Raises:
        UsageError: a number that is missing, unknown, not positive, or without source, date or certainty.
    """
    reader = _Reader(name, entry.get("sources", {}))
    take = reader.table
    top = take(entry, "", {"sources": None, **dict.fromkeys(_TABLES)}, needed=("compute", "memory", "launch"))
    compute = take(top["compute"], "compute", _COMPUTE, needed=("macs_per_s",))
    grid = take(top.get("grid", {}), "grid", dict.fromkeys(("out", "in")))
    memory = take(
        top["memory"], "memory", {"bandwidth_bytes_per_s": reader.number}, needed=("bandwidth_bytes_per_s",)
    )
    launch = take(
        top["launch"], "launch", {"seconds_per_kernel": reader.number}, needed=("seconds_per_kernel",)
    )
    caches = [reader.cache(item, f"cache[{i}]") for i, item in enumerate(top.get("cache", []))]
    return DeviceConstants(
        macs_per_s=reader.by_precision(compute["macs_per_s"], "compute.macs_per_s"),
        depthwise_macs_per_s=reader.by_precision(
            compute.get("depthwise_macs_per_s", {}), "compute.depthwise_macs_per_s"
        ),
        bandwidth_bytes_per_s=memory["bandwidth_bytes_per_s"],
        launch_s=launch["seconds_per_kernel"],
        **{key: reader.number(compute[key], f"compute.{key}") for key in _COUNTS if key in compute},
        grid_out=reader.by_precision(grid.get("out", {}), "grid.out"),
        grid_in=reader.by_precision(grid.get("in", {}), "grid.in"),
        caches=tuple(caches),
        limits=take(top.get("limits", {}), "limits", dict.fromkeys(_LIMITS, reader.number)),
        energy=reader.energy(top["energy"]) if "energy" in top else None,
    )


_COUNTS = ("units", "tile_rows", "tile_columns")
_COMPUTE = dict.fromkeys(("macs_per_s", "depthwise_macs_per_s", *_COUNTS))
_TABLES = ("compute", "grid", "memory", "cache", "launch", "limits", "energy")


class _Reader:
    """Reads tables of one file; every complaint names the file and the place in it."""

    def __init__(self, name: str, sources: Any):
        self._name = name
        self._sources: dict[str, tuple[str, str]] = {}
        for key, source in self._mapping(sources, "sources").items():
            given = self.table(
                source, f"sources.{key}", dict.fromkeys(("text", "date")), needed=("text", "date")
            )
            self._sources[key] = (self._text(given, "text", key), self._text(given, "date", key))

    def fail(self, place: str, problem: str, remedy: str) -> UsageError:
        return UsageError(f"The target description '{self._name}': '{place}' {problem}; {remedy}.")

    def _text(self, given: Mapping[str, Any], key: str, of: str) -> str:
        if not isinstance(given[key], str) or not given[key]:
            raise self.fail(f"sources.{of}.{key}", f"is {given[key]!r}", "write it as text")
        return str(given[key])

    def _mapping(self, entry: Any, place: str) -> Mapping[str, Any]:
        if not isinstance(entry, Mapping):
            raise self.fail(place, f"is {type(entry).__name__}, not a table", f"write '[{place}]'")
        return entry

    def table(
        self,
        entry: Any,
        place: str,
        known: Mapping[str, Callable[[Any, str], Any] | None],
        needed: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        mapping = self._mapping(entry, place)
        prefix = f"{place}." if place else ""
        for key in mapping:
            if key not in known:
                raise self.fail(f"{prefix}{key}", "is not known", f"use one of {sorted(known)}")
        for key in needed:
            if key not in mapping:
                raise self.fail(f"{prefix}{key}", "is missing", "add it, with its source, date and certainty")
        result = {}
        for key, item in mapping.items():
            read = known[key]
            result[key] = item if read is None else read(item, f"{prefix}{key}")
        return result

    def number(self, entry: Any, place: str) -> Number:
        given = self.table(
            entry,
            place,
            dict.fromkeys(("value", "source", "certainty")),
            needed=("value", "source", "certainty"),
        )
        value = given["value"]
        usable = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not usable or not math.isfinite(value) or value <= 0:
            raise self.fail(place, f"has the value {value!r}", "write a positive number")
        if given["certainty"] not in CERTAINTIES:
            raise self.fail(
                place, f"has the certainty {given['certainty']!r}", f"use one of {list(CERTAINTIES)}"
            )
        if given["source"] not in self._sources:
            raise self.fail(
                place,
                f"cites the source {given['source']!r}",
                f"use one of [sources], {sorted(self._sources)}",
            )
        text, date = self._sources[given["source"]]
        return Number(float(value), text, date, given["certainty"])

    def by_precision(self, entry: Any, place: str) -> dict[str, Number]:
        return self.table(entry, place, dict.fromkeys(PRECISIONS, self.number))

    def cache(self, entry: Any, place: str) -> CacheLevel:
        known = {"name": None, "holds": None, "bytes": self.number, "bandwidth_bytes_per_s": self.number}
        given = self.table(entry, place, known, needed=("name", "bytes", "bandwidth_bytes_per_s"))
        if given.get("holds", "all") not in HOLDS:
            raise self.fail(f"{place}.holds", f"is {given['holds']!r}", f"use one of {list(HOLDS)}")
        return CacheLevel(**given)

    def energy(self, entry: Any) -> EnergyConstants:
        known = {"static_w": self.number, "pj_per_byte": self.number, "pj_per_mac": self.by_precision}
        return EnergyConstants(**self.table(entry, "energy", known, needed=tuple(known)))
