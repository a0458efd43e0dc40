"""The state of an installation: machine, packages, and every plugin, examined where it can crash."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sartor
from sartor.backends import host
from sartor.conformance.diagnosis import registries, unread_groups
from sartor.conformance.run import diagnose_apart

_DISTRIBUTION = "sartor"
_FOR_DEVELOPERS = ("bench", "demo", "dev", "test")
_INSTRUCTIONS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
"""Extensions that decide how fast narrow arithmetic is, as Linux names them."""


def number_of_plugins() -> int:
    """How many will be examined."""
    return sum(len(registry.names()) for registry in registries().values())


def examine(on_plugin: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Everything that `sartor doctor` says, schema `sartor.doctor/1`.

    Args:
        on_plugin: called after each plugin, for progress.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for group, registry in registries().items():
        entries = found.setdefault(group, [])
        owners: dict[str, list[str]] = {}
        for plugin in registry.plugins():
            owners.setdefault(plugin.name, []).append(f"{plugin.owner} ({plugin.target})")
        for name, registered in owners.items():
            entries.append({**diagnose_apart(group, name), "owner": " and ".join(registered)})
            on_plugin()
    packages = _packages()
    everything = [entry for entries in found.values() for entry in entries]
    broken = [e["name"] for e in everything if e["state"] == "broken"]
    broken += [p["name"] for p in packages if p["problem"]]
    return {
        "schema": "sartor.doctor/1",
        "environment": {**_machine(), "packages": packages, "extras": _extras()},
        "plugins": found,
        "unread_groups": unread_groups(),
        "broken": broken,
        "missing": [e["name"] for e in everything if e["state"] == "missing"],
    }


def _machine() -> dict[str, Any]:
    conditions = host.conditions()
    return {
        "sartor": sartor.__version__,
        **conditions,
        "cores_allowed": conditions.get("cores_allowed", conditions["cores"]),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "instructions": _instructions(),
    }


def _instructions() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return []
    lines = (line.partition(":") for line in text.splitlines())
    flags = next((value.split() for key, _, value in lines if key.strip() in ("flags", "Features")), [])
    return [name for name in _INSTRUCTIONS if name in flags]


def _extras() -> list[dict[str, Any]]:
    """What can be installed beside what is required, and which of its packages are not."""
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or ()]
    entries = []
    for extra in metadata.get_all("Provides-Extra") or ():
        if extra in _FOR_DEVELOPERS:
            continue
        own = {
            r.name
            for r in requirements
            if r.marker is not None
            and r.marker.evaluate({"extra": extra})
            and not r.marker.evaluate({"extra": ""})
        } - {_DISTRIBUTION}
        if own:  # else it names other extras only
            missing = sorted(name for name in own if not _is_installed(name))
            install = f"pip install '{_DISTRIBUTION}[{extra}]'"
            entries.append({"name": extra, "packages": sorted(own), "missing": missing, "install": install})
    return sorted(entries, key=lambda entry: str(entry["name"]))


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _packages() -> list[dict[str, Any]]:
    """What Sartor requires and what its extras would bring, with what is installed of it."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        texts = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        return []
    entries: dict[str, dict[str, Any]] = {}
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == _DISTRIBUTION or requirement.name in entries:
            continue
        entry: dict[str, Any] = {"name": requirement.name, "required": needed, "problem": ""}
        try:
            entry["version"] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not needed:
                continue
            entry["problem"] = (
                f"not installed; {_DISTRIBUTION} requires '{requirement.name}{requirement.specifier}'"
            )
        else:
            if not requirement.specifier.contains(entry["version"], prereleases=True):
                entry["problem"] = f"{_DISTRIBUTION} asks for '{requirement.name}{requirement.specifier}'"
        entries[requirement.name] = entry
    return list(entries.values())
