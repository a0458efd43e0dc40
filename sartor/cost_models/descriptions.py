"""Target descriptions: what is known about a target without running it (`targets/*.toml`)."""

from __future__ import annotations

import dataclasses
import tomllib
from importlib import resources

from sartor.errors import UsageError


@dataclasses.dataclass(frozen=True)
class TargetDescription:
    """What people should know about a target.

    Attributes:
        name: as in `--target`.
        title: vendor's name.
        kind: `cpu`.
        artifact: files that lowering writes.
        precisions: what it computes in.
        channel_grid: where the step of channel counts comes from.
        cost_model: what prices plans for it.
        notes: facts that change how numbers are read.
        source: where the facts come from.
    """

    name: str
    title: str
    kind: str
    artifact: str
    precisions: tuple[str, ...]
    channel_grid: str
    cost_model: str
    notes: tuple[str, ...]
    source: str


def described_targets() -> tuple[str, ...]:
    """Names of the targets that have a description, sorted."""
    folder = resources.files("sartor.cost_models") / "targets"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def describe_target(name: str) -> TargetDescription:
    """The description of target `name`.

    Raises:
        UsageError: there is none; targets of plugins need not have one.
    """
    if name not in described_targets():
        raise UsageError(
            f"No description of target '{name}'; described targets are {list(described_targets())}."
        )
    text = (resources.files("sartor.cost_models") / "targets" / f"{name}.toml").read_text(encoding="utf-8")
    entry = tomllib.loads(text)
    lists = {key: tuple(entry[key]) for key in ("precisions", "notes")}
    return TargetDescription(**{**entry, **lists})
