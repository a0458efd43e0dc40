"""Target descriptions: what is known about a target without running it (`targets/*.toml`).

Two kinds of file: targets that a backend lowers to, and published devices (`kind = "device"`), whose constants
(`sartor.cost_models.constants`) feed the roofline. A device can be predicted, never lowered to or measured here.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from sartor.cost_models.constants import PRECISIONS, DeviceConstants, parse_constants
from sartor.errors import UsageError

DEVICE = "device"
_TEXTS = ("name", "title", "kind", "source")
_TARGET_TEXTS = ("artifact", "channel_grid", "cost_model")
_LISTS = ("precisions", "notes")
_OPTIONAL_LISTS = ("unmodelled",)


@dataclasses.dataclass(frozen=True)
class TargetDescription:
    """What people should know about a target.

    Attributes:
        name: as in `--target`.
        title: vendor's name.
        kind: `cpu` for a backend of this machine, `device` for a published device.
        precisions: what it computes in.
        notes: facts that change how numbers are read.
        source: where the facts come from.
        artifact: files that lowering writes; empty for a device.
        channel_grid: where the step of channel counts comes from; empty for a device.
        cost_model: what prices plans for it.
        unmodelled: what the roofline of a device leaves out.
        constants: of a device; None for a backend, whose constants are measured.
    """

    name: str
    title: str
    kind: str
    precisions: tuple[str, ...]
    notes: tuple[str, ...]
    source: str
    artifact: str = ""
    channel_grid: str = ""
    cost_model: str = "roofline"
    unmodelled: tuple[str, ...] = ()
    constants: DeviceConstants | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; each constant with its source, date and certainty."""
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "constants"}
        document = {key: list(value) if isinstance(value, tuple) else value for key, value in shown.items()}
        if self.constants is not None:
            numbers = self.constants.numbers().items()
            document["constants"] = {place: dataclasses.asdict(number) for place, number in numbers}
        return document


def described_targets() -> tuple[str, ...]:
    """Names of the backends that have a description, sorted."""
    return tuple(name for name in _names() if describe_target(name).kind != DEVICE)


def described_devices() -> tuple[str, ...]:
    """Names of the published devices, sorted."""
    return tuple(name for name in _names() if describe_target(name).kind == DEVICE)


def describe_target(name: str) -> TargetDescription:
    """The description of a target or of a device.

    Args:
        name: one that is shipped, or the path of a description of your own, which ends in `.toml`.

    Raises:
        UsageError: there is none; targets of plugins need not have one. Or your own breaks a rule of the form.
    """
    if name.endswith(".toml"):
        return load_description(name)
    if name not in _names():
        raise UsageError(
            f"No description of target '{name}'; described targets are {list(_names())}. Give a file of your own as a "
            "path that ends in '.toml'."
        )
    return _shipped(name)


def load_description(path: str | Path) -> TargetDescription:
    """A description of your own, in the form of `targets/*.toml`.

    Raises:
        UsageError: the file cannot be read, or breaks a rule of the form.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The target description '{path}' cannot be read: {error}.") from error
    return parse_description(text, str(path))


def parse_description(text: str, name: str) -> TargetDescription:
    """A description from TOML text; `name` of the file is for errors.

    Raises:
        UsageError: not TOML, or it breaks a rule of the form.
    """
    try:
        entry = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"The target description '{name}' is not TOML: {error}.") from error
    device = entry.get("kind") == DEVICE
    wanted = (*_TEXTS, *(() if device else _TARGET_TEXTS))
    texts: dict[str, Any] = {key: entry.pop(key, None) for key in wanted}
    lists: dict[str, Any] = {key: entry.pop(key, None) for key in _LISTS}
    lists |= {key: entry.pop(key, []) for key in _OPTIONAL_LISTS}
    for key, value in texts.items():
        if not isinstance(value, str) or not value:
            raise UsageError(f"The target description '{name}': '{key}' is {value!r}; write it as text.")
    for key, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"The target description '{name}': '{key}' is {value!r}; write a list of texts.")
    values: dict[str, Any] = {key: tuple(value) for key, value in lists.items()}
    if not device:
        if entry:
            raise UsageError(
                f"The target description '{name}': {sorted(entry)} are not known for kind '{texts['kind']}'; "
                f"remove them, or write kind = '{DEVICE}'."
            )
        return TargetDescription(**texts, **values)
    constants = parse_constants(entry, name)
    if set(constants.macs_per_s) != set(lists["precisions"]):
        raise UsageError(
            f"The target description '{name}': 'precisions' are {lists['precisions']}, but 'compute.macs_per_s' has "
            f"{sorted(constants.macs_per_s)}; name the same ones, of {list(PRECISIONS)}."
        )
    return TargetDescription(**texts, **values, constants=constants)


@functools.cache
def _names() -> tuple[str, ...]:
    folder = resources.files("sartor.cost_models") / "targets"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


@functools.cache
def _shipped(name: str) -> TargetDescription:
    file = resources.files("sartor.cost_models") / "targets" / f"{name}.toml"
    return parse_description(file.read_text(encoding="utf-8"), f"{name}.toml")
