"""What state a plugin is in: working, its package missing, or broken, and then why."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import traceback
from collections.abc import Mapping
from typing import Any

from sartor import backends
from sartor.errors import SartorError
from sartor.plugins import Registry

_PIP = re.compile(r"pip install ('[^']+'|[^\s.]+)")
_OWN = ("sartor.importance", "sartor.quantizers")  # read as well; how passes find parts of Sartor itself
_ASKED = re.compile(r"The package '([^'.]+)")  # as `telemetry.import_vendor` begins


def registries() -> Mapping[str, Registry]:
    """The groups of plugins that other packages extend, by name."""
    from sartor.backends.tensorrt.settings import SURGERY
    from sartor.passes.registry import REGISTRY as PASSES

    return {found.group: found for found in (backends.REGISTRY, PASSES, SURGERY)}


def unread_groups() -> dict[str, list[str]]:
    """Entry-point groups of our name that nothing reads, most likely misspelt, with who declares them."""
    read = {*registries(), *_OWN}
    found: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        for entry in distribution.entry_points:
            if entry.group.startswith("sartor.") and entry.group not in read:
                found.setdefault(entry.group, []).append(f"{entry.name} ({distribution.name})")
    return found


def diagnose(group: str, name: str) -> dict[str, Any]:
    """The state of one registered name, in this process: to be called in one that may crash.

    Returns:
        `name`, `state` (`ok`, `missing` or `broken`); what it can do when it is `ok`; else `problem`, and
        `install` (the line that repairs it) or `traceback`.
    """
    entry: dict[str, Any] = {"name": name}
    try:
        able = _able(group, name)
    except Exception as error:
        line = _PIP.search(str(error))
        if line is not None and _lacks_its_package(error):
            return {**entry, "state": "missing", "problem": str(error), "install": line.group()}
        text = "".join(traceback.format_exception(error))
        return {**entry, "state": "broken", "problem": f"{type(error).__name__}: {error}", "traceback": text}
    return {**entry, "state": "ok", **able}


def _able(group: str, name: str) -> dict[str, Any]:
    if group == backends.REGISTRY.group:
        return backends.get(name).capabilities().to_dict()
    if group == "sartor.passes":
        return _pass(name)
    found = registries()[group].load(name)
    return {"object": f"{found.__module__}.{found.__qualname__}"}


def _pass(name: str) -> dict[str, Any]:
    from sartor.passes.registry import pass_class

    found = pass_class(name)
    options = {f.name: str(f.type) for f in dataclasses.fields(found)}
    return {"semantics": found.semantics.value, "options": options}


def _lacks_its_package(error: Exception) -> bool:
    """The vendor's package is not there, as opposed to: it is there and cannot be imported."""
    cause = error.__cause__
    if not (isinstance(error, SartorError) and isinstance(cause, ModuleNotFoundError)):
        return False
    asked = _ASKED.search(str(error))
    return asked is None or asked.group(1) == (cause.name or "").partition(".")[0]
