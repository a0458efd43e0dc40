"""The suite: every check, in the order in which it is run and reported."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence

from sartor.conformance.check import Check
from sartor.errors import UsageError

VERSION = 2
"""Grows when a check is added or changes its meaning; a report names it."""


@functools.cache
def suite() -> tuple[Check, ...]:
    """All checks; nothing of a backend is imported."""
    from sartor.conformance import contract, faults, leaks, limits, numerics, repetition, timing

    parts = (contract, numerics, faults, repetition, leaks, limits, timing)
    return tuple(check for part in parts for check in part.checks())


def select(patterns: Sequence[str] = ()) -> tuple[Check, ...]:
    """Checks whose id fits one of the patterns (`fnmatch`, or the beginning up to a dot); all without any.

    Raises:
        UsageError: a pattern fits none.
    """
    if not patterns:
        return suite()
    for pattern in patterns:
        if not any(_fits(check, pattern) for check in suite()):
            areas = ", ".join(dict.fromkeys(f"'{check.area}'" for check in suite()))
            raise UsageError(
                f"No check of the kit fits '{pattern}'; areas are {areas}. List the ids with --list."
            )
    return tuple(check for check in suite() if any(_fits(check, pattern) for pattern in patterns))


def _fits(check: Check, pattern: str) -> bool:
    return fnmatch.fnmatchcase(check.id, pattern) or check.id.startswith(pattern + ".")
