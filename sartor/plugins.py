"""Lazy registry of plugins: built-in tables and entry points, listed without importing anything.

One plugin that cannot be loaded, or two that claim one name, is an error for that name only; every
other plugin keeps working.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import traceback
from collections.abc import Mapping
from typing import Any

from sartor.errors import UsageError

_BUILTIN_OWNER = "sartor"


@dataclasses.dataclass(frozen=True)
class Plugin:
    """One registered name.

    Attributes:
        name: what users write.
        target: `module:attribute`, imported only by `Registry.load`.
        owner: distribution and version that registered it, `sartor` for built-ins.
    """

    name: str
    target: str
    owner: str


class Registry:
    """Plugins of one entry-point group.

    Args:
        group: entry-point group, such as `sartor.backends`.
        noun: how messages call one plugin, such as `backend`.
        builtin: built-in plugins as `{name: "module:attribute"}`; they also work when the package
            metadata is missing, as in a source tree that is not installed.
    """

    def __init__(self, group: str, noun: str, builtin: Mapping[str, str]):
        self.group = group
        self.noun = noun
        self._builtin = dict(builtin)
        self._found: dict[str, tuple[Plugin, ...]] | None = None
        self._loaded: dict[str, Any] = {}

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted; nothing is imported."""
        return tuple(sorted(self._scan()))

    def plugins(self) -> tuple[Plugin, ...]:
        """Every registration by name, duplicates included; nothing is imported."""
        found = self._scan()
        return tuple(plugin for name in sorted(found) for plugin in found[name])

    def load(self, name: str) -> Any:
        """Import the object that is registered as `name`.

        Raises:
            UsageError: the name is unknown (known names and the nearest one are listed), claimed by
                two owners (both are named), or its import fails (the traceback is a note).
        """
        if name in self._loaded:
            return self._loaded[name]
        found = self._scan().get(name, ())
        if not found:
            raise UsageError(self._unknown(name))
        if len(found) > 1:
            owners = " and ".join(f"'{p.owner}' ({p.target})" for p in found)
            raise UsageError(
                f"The {self.noun} name '{name}' is registered by {owners}; a name has exactly one owner. "
                "Uninstall one of them."
            )
        self._loaded[name] = self._import(found[0])
        return self._loaded[name]

    def refresh(self) -> None:
        """Forget what was found and loaded, so that newly installed plugins are seen."""
        self._found = None
        self._loaded.clear()

    def _scan(self) -> dict[str, tuple[Plugin, ...]]:
        if self._found is None:
            found: dict[str, dict[str, Plugin]] = {}
            for name, target in self._builtin.items():
                found.setdefault(name, {})[target] = Plugin(name, target, _BUILTIN_OWNER)
            for entry in importlib.metadata.entry_points(group=self.group):
                # The same registration appears once per metadata folder on the path (an editable install
                # beside its source tree, for one); only a different target is a second owner.
                owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown distribution"
                found.setdefault(entry.name, {}).setdefault(
                    entry.value, Plugin(entry.name, entry.value, owner)
                )
            self._found = {name: tuple(targets.values()) for name, targets in found.items()}
        return self._found

    def _import(self, plugin: Plugin) -> Any:
        module_name, _, attribute = plugin.target.partition(":")
        try:
            loaded: Any = importlib.import_module(module_name)
            for part in attribute.split(".") if attribute else ():
                loaded = getattr(loaded, part)
        except (Exception, SystemExit) as error:  # a plugin that exits on import must not end us in silence
            failure = UsageError(
                f"The {self.noun} '{plugin.name}' ({plugin.target}, from '{plugin.owner}') could not be "
                f"loaded: {type(error).__name__}: {error}. Repair or uninstall '{plugin.owner}'."
            )
            failure.add_note("".join(traceback.format_exception(error)))
            raise failure from error
        return loaded

    def _unknown(self, name: str) -> str:
        names = self.names()
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        known = ", ".join(f"'{n}'" for n in names) or "none"
        return f"Unknown {self.noun} '{name}'; known: {known}.{hint}"
