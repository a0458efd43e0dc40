"""`Plan`: what is to be done to a program, as pure data that can be read, diffed, priced and replayed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sartor.errors import PlanError

SCHEMA = "sartor.plan/1"
RESERVED = ("exits", "gates", "tiles", "precision")
"""Sections that later passes fill; present and empty in every plan of this schema."""


KINDS = {"svd": 1, "spatial": 1, "tucker": 2}
"""Factorizations, and how many ranks each has."""


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
class Factorization:
    """How one layer becomes several.

    Attributes:
        kind: `svd`, `spatial` or `tucker`; see `sartor.passes.factorize`.
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
    """Channel groups to narrow, blocks to remove, layers to factorize, and the size of the inputs.

    Attributes:
        source_sha256: SHA-256 of the model the plan belongs to (`Program.source.sha256`).
        groups: by group name; groups that are not named stay whole.
        blocks: names of removed residual blocks, in graph order.
        notes: free text for people, e.g. the criterion and seed; no influence on the result.
        approximate: the groups are those of the analysis with approximate groups, which have no MASKED form.
        factors: by node name. They are of the weights that groups and blocks leave.
        sizes: new reference shape per input, its batch included; inputs that are not named keep theirs.
    """

    source_sha256: str
    groups: Mapping[str, GroupPlan] = dataclasses.field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    approximate: bool = False
    factors: Mapping[str, Factorization] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Deterministic JSON text."""
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "source": {"sha256": self.source_sha256},
            "groups": {k: {"size": g.size, "keep": list(g.keep)} for k, g in sorted(self.groups.items())},
            "blocks": list(self.blocks),
            "notes": dict(self.notes),
            "scale": {"inputs": {k: list(v) for k, v in sorted(self.sizes.items())}} if self.sizes else {},
        }
        document.update({name: {} for name in RESERVED})
        if self.factors:
            document["factors"] = {
                name: {"kind": found.kind, "rank": list(found.rank)}
                for name, found in sorted(self.factors.items())
            }
        if self.approximate:
            document["approximate"] = True
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

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
        known = {
            "schema",
            "source",
            "groups",
            "blocks",
            "notes",
            "approximate",
            "factors",
            "scale",
            *RESERVED,
        }
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
                sizes=_sizes(document.get("scale", {})),
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


def _sizes(scale: Any) -> dict[str, tuple[int, ...]]:
    """The section `scale`: `{"inputs": {name: shape}}`, or nothing."""
    unknown = sorted(set(scale) - {"inputs"})
    if unknown:
        raise ValueError(f"its section 'scale' has {unknown}, expected only 'inputs'")
    sizes = {str(name): tuple(map(_integer, shape)) for name, shape in scale.get("inputs", {}).items()}
    if any(length < 1 for shape in sizes.values() for length in shape):
        raise ValueError("a length of an input is below 1")
    return sizes


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"expected true or false, found {value!r}")
    return value


def _integer(value: Any) -> int:
    """`value` itself: rounding 0.5 to 0 would cut something else than the file says."""
    if type(value) is not int:
        raise ValueError(f"expected an integer, found {value!r}")
    return value
