"""`Plan`: what is to be done to a program, as pure data that can be read, diffed, priced and replayed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sartor.errors import PlanError

SCHEMA = "sartor.plan/1"
RESERVED = ("exits", "gates", "tiles")
"""Sections that later passes fill; present and empty in every plan of this schema."""


KINDS = {"svd": 1, "spatial": 1, "tucker": 2, "cp": 1}
"""Factorizations, and how many ranks each has."""
WAYS = frozenset({"drop", "connect"})
"""How a layer goes."""
PRECISIONS = frozenset({"f32", "f16", "bf16", "int8"})
"""What a network can be lowered in."""
REPLACEMENTS = {
    "factors": "factorizes layers, whose weights are others then",
    "layers": "removes layers that no shortcut crosses",
    "fused": "fuses pairs of layers into one",
    "grouped": "cuts layers into groups, without most of their weights",
}
"""Sections by which layers go or become others, which no zeros in the original can say."""


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Kept units of one channel group.

    Attributes:
        size: number of units before pruning; a plan for another model is caught by it.
        keep: kept unit indices, strictly ascending, never empty.
    """

    size: int
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.keep:
            raise PlanError("A group plan keeps no unit; at least one must stay.")
        if list(self.keep) != sorted(set(self.keep)) or self.keep[0] < 0 or self.keep[-1] >= self.size:
            raise PlanError(
                f"Keep indices must be strictly ascending within [0, {self.size}), got {list(self.keep)[:8]}…"
            )


@dataclasses.dataclass(frozen=True)
class Widening:
    """Units of one channel group that there will be more of.

    Attributes:
        size: number of units before.
        copies: units of which there is one more, each as often as it is here; ascending, never empty.
    """

    size: int
    copies: tuple[int, ...]

    def __post_init__(self) -> None:
        copies = self.copies
        if not copies or list(copies) != sorted(copies) or copies[0] < 0 or copies[-1] >= self.size:
            raise PlanError(
                f"Copied units must be ascending within [0, {self.size}), at least one, got {list(copies)[:8]}…"
            )


@dataclasses.dataclass(frozen=True)
class Factorization:
    """How one layer becomes several.

    Attributes:
        kind: `svd`, `spatial`, `tucker` or `cp`; see `sartor.passes.factorize`.
        rank: of the product; two for `tucker`, of input and output channels.
    """

    kind: str
    rank: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"A layer is factorized by '{self.kind}', expected one of {', '.join(KINDS)}.")
        if len(self.rank) != KINDS[self.kind] or any(rank < 1 for rank in self.rank):
            raise PlanError(
                f"Factorization '{self.kind}' has {KINDS[self.kind]} positive ranks, got {list(self.rank)}."
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Channel groups to narrow or widen, blocks to remove or repeat, layers to replace, and the size of the inputs.

    Attributes:
        source_sha256: SHA-256 of the model the plan belongs to (`Program.source.sha256`).
        groups: by group name; groups that are not named stay whole.
        blocks: names of removed residual blocks, in graph order.
        notes: free text for people, e.g. the criterion and seed; no influence on the result.
        approximate: the groups are those of the analysis with approximate groups, which have no MASKED form.
        factors: by node name. They are of the weights that groups and blocks leave.
        sizes: new reference shape per input, its batch included; inputs that are not named keep theirs.
        fused: names of depthwise convolutions that take the 1 x 1 convolution before them in.
        grouped: by name of a convolution, into how many groups it is cut.
        layers: by name of a layer in no block, `drop` it or `connect` across it by a 1 x 1 convolution.
        widened: by group name; such a group is not also in `groups`.
        deepened: by name of a residual block, how many more of its kind follow it; such a block is not also removed.
        precision: that the result is to be lowered in; empty where the plan does not say. No part of what is applied.
    """

    source_sha256: str
    groups: Mapping[str, GroupPlan] = dataclasses.field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    approximate: bool = False
    factors: Mapping[str, Factorization] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    widened: Mapping[str, Widening] = dataclasses.field(default_factory=dict)
    deepened: Mapping[str, int] = dataclasses.field(default_factory=dict)
    precision: str = ""
    fused: tuple[str, ...] = ()
    grouped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        both = sorted({*self.groups} & {*self.widened}) + sorted({*self.blocks} & {*self.deepened})
        if both:
            raise PlanError(f"The plan both shrinks and grows {both}; it can do one of them.")
        unknown = sorted({*self.layers.values()} - WAYS)
        if unknown:
            raise PlanError(f"A layer goes by 'drop' or 'connect', not by {unknown}.")
        if self.precision and self.precision not in PRECISIONS:
            raise PlanError(
                f"A network is lowered in one of {', '.join(sorted(PRECISIONS))}, not in '{self.precision}'."
            )
        if any(count < 1 for count in self.deepened.values()):
            raise PlanError("A block that is repeated is repeated once or more; leave the others out.")
        if any(count < 2 for count in self.grouped.values()):
            raise PlanError("A layer is cut into two groups or more; leave the others out.")

    @property
    def replacements(self) -> tuple[str, ...]:
        """Sections that are not empty of those in `REPLACEMENTS`."""
        return tuple(name for name in REPLACEMENTS if getattr(self, name))

    @property
    def replaces_layers(self) -> bool:
        """Whether layers go or become others."""
        return bool(self.replacements)

    def without_replacements(self) -> Plan:
        """The rest of the plan, which zeros can say."""
        return dataclasses.replace(self, factors={}, layers={}, fused=(), grouped={})

    @property
    def only_removes(self) -> bool:
        """Whether it names groups and blocks alone, which are variables of a workload."""
        return not (self.replaces_layers or self.sizes or self.widened or self.deepened)

    def to_json(self) -> str:
        """Deterministic JSON text."""
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "source": {"sha256": self.source_sha256},
            "groups": {k: {"size": g.size, "keep": list(g.keep)} for k, g in sorted(self.groups.items())},
            "blocks": list(self.blocks),
            "notes": dict(self.notes),
            "scale": self._scale(),
        }
        document.update({name: {} for name in RESERVED})
        document["precision"] = {"network": self.precision} if self.precision else {}
        if self.factors:
            document["factors"] = {
                name: {"kind": found.kind, "rank": list(found.rank)}
                for name, found in sorted(self.factors.items())
            }
        if self.layers:
            document["layers"] = dict(sorted(self.layers.items()))
        if self.fused:
            document["fused"] = list(self.fused)
        if self.grouped:
            document["grouped"] = dict(sorted(self.grouped.items()))
        if self.approximate:
            document["approximate"] = True
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    def _scale(self) -> dict[str, Any]:
        """The section `scale`, without what is empty."""
        entries: dict[str, Any] = {
            "inputs": {name: list(shape) for name, shape in sorted(self.sizes.items())},
            "groups": {
                name: {"size": w.size, "copies": list(w.copies)} for name, w in sorted(self.widened.items())
            },
            "blocks": dict(sorted(self.deepened.items())),
        }
        return {key: entry for key, entry in entries.items() if entry}

    @staticmethod
    def from_json(text: str) -> Plan:
        """Parse and validate.

        Raises:
            PlanError: not JSON, another schema, unknown or non-empty reserved sections, bad indices.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"The plan is not valid JSON: {error}.") from error
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            found = document.get("schema") if isinstance(document, dict) else type(document).__name__
            raise PlanError(f"Expected a plan of schema '{SCHEMA}', found '{found}'.")
        known = {"schema", "source", "groups", "blocks", "notes", "approximate", "scale", "precision"}
        known |= {*REPLACEMENTS, *RESERVED}
        unknown = sorted(set(document) - known)
        if unknown:
            raise PlanError(f"The plan has unknown sections {unknown}; expected only {sorted(known)}.")
        filled = [name for name in RESERVED if document.get(name)]
        if filled:
            raise PlanError(f"The plan uses sections {filled}, which this version does not apply.")
        try:
            groups = {
                str(name): GroupPlan(_integer(entry["size"]), tuple(map(_integer, entry["keep"])))
                for name, entry in document.get("groups", {}).items()
            }
            scale = _known(document.get("scale", {}))
            return Plan(
                source_sha256=str(document["source"]["sha256"]),
                groups=groups,
                blocks=tuple(str(b) for b in document.get("blocks", [])),
                notes=document.get("notes", {}),
                approximate=_boolean(document.get("approximate", False)),
                factors={
                    str(name): Factorization(str(entry["kind"]), tuple(map(_integer, entry["rank"])))
                    for name, entry in document.get("factors", {}).items()
                },
                layers={str(name): str(way) for name, way in document.get("layers", {}).items()},
                sizes=_sizes(scale.get("inputs", {})),
                widened={
                    str(name): Widening(_integer(entry["size"]), tuple(map(_integer, entry["copies"])))
                    for name, entry in scale.get("groups", {}).items()
                },
                deepened={str(name): _integer(count) for name, count in scale.get("blocks", {}).items()},
                precision=_precision(document.get("precision", {})),
                fused=_names(document.get("fused", [])),
                grouped={str(name): _integer(count) for name, count in document.get("grouped", {}).items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(f"The plan is malformed: {type(error).__name__}: {error}.") from error

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: the file does not exist or is not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"The plan file '{path}' cannot be read: {error}.") from error
        return Plan.from_json(text)

    def fractions(self) -> dict[str, float]:
        """Kept fraction per group, for pricing."""
        return {name: len(g.keep) / g.size for name, g in self.groups.items()}


def _known(scale: Any) -> Mapping[str, Any]:
    """The section `scale`, without unknown entries."""
    unknown = sorted(set(scale) - {"inputs", "groups", "blocks"})
    if unknown:
        raise ValueError(f"its section 'scale' has {unknown}, expected only inputs, groups and blocks")
    found: Mapping[str, Any] = scale
    return found


def _sizes(inputs: Any) -> dict[str, tuple[int, ...]]:
    """`{name: shape}`."""
    sizes = {str(name): tuple(map(_integer, shape)) for name, shape in inputs.items()}
    if any(length < 1 for shape in sizes.values() for length in shape):
        raise ValueError("a length of an input is below 1")
    return sizes


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"expected a list of names, found {value!r}")
    return tuple(value)


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"expected true or false, found {value!r}")
    return value


def _integer(value: Any) -> int:
    """`value` itself: rounding 0.5 to 0 would cut something else than the file says."""
    if type(value) is not int:
        raise ValueError(f"expected an integer, found {value!r}")
    return value


def _precision(section: Any) -> str:
    if not isinstance(section, dict) or set(section) - {"network"}:
        raise PlanError(
            f"Section 'precision' is {section}; expected {{'network': one of {sorted(PRECISIONS)}}}."
        )
    return str(section.get("network", ""))
