"""How much memory a subprocess can get here: the machine's, or less where a container or a service has a limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def available_bytes() -> int:
    """Physical memory, or the smallest limit of the control groups that this process is in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_group_limits(_ROOT)])


def _group_limits(root: Path) -> Iterator[int]:
    """Limits of the groups and of those above them, of both versions; nothing where the system has no groups.

    Reference: Linux `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`, proc(5).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    base = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            places, name = [base, base / "unified"], "memory.max"
        elif "memory" in controllers.split(","):
            places, name = [base / "memory"], "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the one outside of it; its own limit is at the root then.
        group = PurePosixPath("/", path)
        for place in places:
            for part in (group, *group.parents):
                try:
                    yield int((place / str(part).lstrip("/") / name).read_text(encoding="utf-8"))
                except (OSError, ValueError):  # no such group here, or `max`
                    continue
