"""A device profile: what was timed on one machine, the models fitted to it, and how far off they are.

The file is JSON of schema `sartor.device-profile/6`, written by `sartor profile` and read by everything that predicts.
It holds plain numbers only: samples, whole networks, and fitted coefficients.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sartor.errors import UsageError
from sartor.ir.files import write_atomic

SCHEMA = "sartor.device-profile/6"
ROLES = ("fit", "heldout")


@dataclasses.dataclass(frozen=True)
class Company:
    """What else there is in the network that a kernel runs in; of several kernels, arrays.

    Attributes:
        alike: as `Sample.alike`.
        twins: as `Sample.twins`.
    """

    alike: Any = 1
    twins: Any = 1


ALONE = Company()


@dataclasses.dataclass(frozen=True)
class Sample:
    """One kernel that was timed, alone or inside a model.

    Attributes:
        spec: as in `sartor.cost_models.signatures.Signature`: everything but the sizes.
        at: one size per variable of the signature (channels; for a kernel that moves data, its bytes).
        family: of kernels, as in `sartor.ir.kernels.Kernel`.
        seconds: of the kernel itself.
        half_width: of the 95 % interval of `seconds`, as a share of it.
        role: `fit`, or `heldout`: never seen by a model.
        period_s: seconds from one run of it to the next, in which others used the caches: one inference of the model
            that it ran in. 0: it ran alone.
        alike: kernels of its family and operator in that model, itself included: each finds code that the one before
            has left in the caches.
        twins: those of them that are the same kernel, in spec and sizes. Copies between layouts are not counted.
        network: name of that model, if it is a network.
        carried: whether it ran in a carrier, in which drawn kernels stand side by side. Not so of kernels to be priced.
    """

    spec: Mapping[str, Any]
    at: tuple[float, ...]
    family: str
    seconds: float
    half_width: float = 0.0
    role: str = "fit"
    period_s: float = 0.0
    alike: int = 1
    twins: int = 1
    network: str = ""
    carried: bool = False

    @property
    def company(self) -> Company:
        """What else ran in that model."""
        return Company(self.alike, self.twins)


@dataclasses.dataclass(frozen=True)
class NetworkTime:
    """One whole network that was timed.

    Attributes:
        name: how it was made; equal names, equal networks.
        kernels: `(spec, sizes, how often)`, merged; enough to price it again.
        latency_s: median seconds of one inference, on the scale of the profile's reference.
        ci95: 95 % interval of it.
        role: as of a sample. Its kernels have the same role.
        sha256: of the model; empty where it is not known.
    """

    name: str
    kernels: tuple[tuple[Mapping[str, Any], tuple[float, ...], int], ...]
    latency_s: float
    ci95: tuple[float, float]
    role: str = "fit"
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class DeviceProfile:
    """See the module docstring.

    Attributes:
        target: backend `name`, `version`, `threads`, `precision` and its `settings`.
        device: `cpu`, `cores`, `isa`, `caches` (bytes by name), `memory_bytes`, `clocks`, `platform`.
        protocol: how it was timed: reference kernel and its seconds, statistic, minutes, why it ended, `versions`.
        call_s: seconds of an empty call of the runtime.
        samples: kernels.
        failures: `{spec, reason}` of kernels that could not be timed.
        networks: whole networks.
        models: saved kernel models by tier and family.
        law: coefficients from kernel times to whole networks.
        interval: coefficients of the prediction interval.
        errors: held-out errors of `kernels` and of `networks`.
    """

    target: Mapping[str, Any]
    device: Mapping[str, Any]
    protocol: Mapping[str, Any]
    call_s: float
    samples: tuple[Sample, ...] = ()
    failures: tuple[Mapping[str, Any], ...] = ()
    networks: tuple[NetworkTime, ...] = ()
    models: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    law: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    interval: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    errors: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Deterministic JSON text."""
        specs = _Specs()
        document = {
            "schema": SCHEMA,
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "samples": [{**vars(s), "spec": specs.number(s.spec)} for s in self.samples],
            "networks": [
                {**vars(n), "kernels": [[specs.number(s), at, count] for s, at, count in n.kernels]}
                for n in self.networks
            ],
            "specs": specs.known,
        }
        return json.dumps(document, sort_keys=True, allow_nan=False, separators=(",", ":")) + "\n"

    def sha256(self) -> str:
        """Digest of `to_json()`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write `to_json()` atomically."""
        return write_atomic(path, self.to_json().encode())

    @staticmethod
    def from_json(text: str, name: str = "the profile") -> DeviceProfile:
        """Inverse of `to_json`.

        Raises:
            UsageError: not a device profile of this schema.
        """
        try:
            document = json.loads(text, parse_constant=_refuse)
            found = document.pop("schema", None) if isinstance(document, dict) else type(document).__name__
            if found != SCHEMA:
                raise UsageError(f"Expected a device profile of schema '{SCHEMA}', found '{found}'.")
            specs = [dict(spec) for spec in document.pop("specs")]
            samples = tuple(_sample(entry, specs) for entry in document.pop("samples"))
            networks = tuple(_network(entry, specs) for entry in document.pop("networks"))
            failures = tuple(dict(entry) for entry in document.pop("failures"))
            call_s = _positive(document.pop("call_s"), zero=True)
            rest = {key: dict(value) for key, value in document.items()}
            return DeviceProfile(call_s=call_s, samples=samples, networks=networks, failures=failures, **rest)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{name} is malformed ({type(error).__name__}: {str(error)[:200]}); build it again with "
                "'sartor profile'."
            ) from error

    @staticmethod
    def load(path: str | Path) -> DeviceProfile:
        """Read a file written by `save`.

        Raises:
            UsageError: the file does not exist or is no device profile.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The device profile '{path}' cannot be read: {error}.") from error
        return DeviceProfile.from_json(text, f"The device profile '{path}'")


_Entry = TypeVar("_Entry", Sample, NetworkTime)


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not a number")


class _Specs:
    """Every spec once: most of them belong to many samples."""

    def __init__(self) -> None:
        self.known: list[Mapping[str, Any]] = []
        self._numbers: dict[str, int] = {}

    def number(self, spec: Mapping[str, Any]) -> int:
        key = json.dumps(spec, sort_keys=True)
        if key not in self._numbers:
            self._numbers[key] = len(self.known)
            self.known.append(spec)
        return self._numbers[key]


def _spec(number: Any, specs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"{number!r} is no number of a spec")
    return specs[number]


def _sample(entry: Mapping[str, Any], specs: Sequence[dict[str, Any]]) -> Sample:
    known = {**entry, "at": tuple(map(float, entry["at"])), "seconds": _positive(entry["seconds"])}
    known["spec"] = _spec(entry["spec"], specs)
    known["period_s"] = _positive(entry["period_s"], zero=True)
    known |= {name: max(int(entry[name]), 1) for name in ("alike", "twins")}
    known["network"] = str(entry["network"])
    known["carried"] = bool(entry["carried"])
    return _with_role(Sample(**known))


def _network(entry: Mapping[str, Any], specs: Sequence[dict[str, Any]]) -> NetworkTime:
    kernels = tuple((_spec(s, specs), tuple(map(float, at)), int(n)) for s, at, n in entry["kernels"])
    low, high = map(float, entry["ci95"])
    latency_s = _positive(entry["latency_s"])
    return _with_role(
        NetworkTime(**{**entry, "kernels": kernels, "ci95": (low, high), "latency_s": latency_s})
    )


def _with_role(entry: _Entry) -> _Entry:
    if entry.role not in ROLES:
        raise ValueError(f"role '{entry.role}' is none of {list(ROLES)}")
    return entry


def _positive(value: Any, *, zero: bool = False) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{value!r} is no number of seconds")
    return number


def of_role(entries: Sequence[_Entry], role: str) -> tuple[_Entry, ...]:
    """Those of one role."""
    return tuple(entry for entry in entries if entry.role == role)
