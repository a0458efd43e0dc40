"""The memory that is there, from made-up control groups."""

from __future__ import annotations

import os

import pytest

from sartor.backends import memory, process

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def groups(root, lines, limits):
    """A file system with the groups of a process, and limits by file."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text("\n".join(lines) + "\n")
    for name, limit in limits.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")


@pytest.mark.parametrize(
    ("lines", "limits", "expected"),
    [
        (["0::/"], {"memory.max": 1 << 20}, 1 << 20),
        (["0::/a/b"], {"a/memory.max": 3 << 20, "a/b/memory.max": "max"}, 3 << 20),
        (["0::/a/b"], {"a/memory.max": 3 << 20, "a/b/memory.max": 2 << 20}, 2 << 20),
        (["0::/outside/of/it"], {"memory.max": 5 << 20}, 5 << 20),
        (["1:cpu:/", "0::/a"], {"unified/a/memory.max": 1 << 20}, 1 << 20),
        (["4:memory:/box"], {"memory/box/memory.limit_in_bytes": 1 << 20}, 1 << 20),
        (["4:cpu,memory:/box"], {"memory/memory.limit_in_bytes": 1 << 20}, 1 << 20),
        (["4:memory:/"], {"memory/memory.limit_in_bytes": 9223372036854771712}, PHYSICAL),
        (["3:cpu:/box"], {"memory/box/memory.limit_in_bytes": 1 << 20}, PHYSICAL),
        (["0::/"], {}, PHYSICAL),
    ],
)
def test_the_smallest_limit_counts(tmp_path, monkeypatch, lines, limits, expected):
    groups(tmp_path, lines, limits)
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert memory.available_bytes() == expected
    assert process.default_memory_limit(2) == expected + (8 << 30) + 2 * (256 << 20)


def test_without_groups_it_is_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert memory.available_bytes() == PHYSICAL


def test_this_machine_has_some():
    assert 1 << 26 < memory.available_bytes() <= PHYSICAL
