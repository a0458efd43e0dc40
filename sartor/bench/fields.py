"""What the entries of a report and of results from elsewhere hold, and the checks of both.

A number has bounds far outside of what is measured, so that what is computed from two of them is still a number.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sartor.backends.protocol import PRECISIONS
from sartor.errors import UsageError

LEAST, MOST = 1e-15, 1e15
_METRICS = {
    "latency": {
        "mean_s": "positive",
        "runs": "count",
        "warm_up_runs": "count0",
        "batch_samples": "count",
        "median_s": "positive?",
        "p10_s": "positive?",
        "p90_s": "positive?",
    },
    "throughput": {
        "samples_per_s": "positive",
        "batch_samples": "count",
        "runs": "count",
        "warm_up_runs": "count0",
    },
    "accuracy": {"score_fraction": "fraction", "samples": "count"},
    "power": {"highest_w": "positive", "sensor": "text"},
}
METRICS: Mapping[str, Mapping[str, str]] = _METRICS
"""Keys of each metric, and what their values are, of `_KINDS`; a question mark: may be missing."""


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and low <= v <= high


def _integer(low: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= MOST


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "positive": (_number(LEAST, MOST), f"a finite number greater than 0, from {LEAST:g} to {MOST:g}"),
    "number": (_number(0, MOST), f"a number from 0 to {MOST:g}"),
    "fraction": (_number(0, 1), "a number from 0 to 1"),
    "count": (_integer(1), f"an integer of at least 1, and at most {MOST:g}"),
    "count0": (_integer(0), f"an integer of at least 0, and at most {MOST:g}"),
    "text": (lambda v: isinstance(v, str) and bool(v.strip()), "a text that is not empty"),
    "string": (lambda v: isinstance(v, str), "a text"),
    "truth": (lambda v: isinstance(v, bool), "true or false"),
    "precision": (lambda v: v in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "object": (lambda v: isinstance(v, dict), "an object"),
    "texts": (
        lambda v: isinstance(v, dict) and all(isinstance(text, str) for text in v.values()),
        "an object of texts",
    ),
    "list": (lambda v: isinstance(v, list), "a list"),
    "sentences": (
        lambda v: isinstance(v, list) and all(isinstance(text, str) for text in v),
        "a list of texts",
    ),
}
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


def require_entry(
    place: str, value: Any, kinds: Mapping[str, str], hint: str, *, more: bool = False
) -> dict[str, Any]:
    """An object that has these keys, with values of these kinds.

    Args:
        place: named in messages.
        value: of a file.
        kinds: by key; a question mark: may be missing.
        hint: what to do where a key is missing.
        more: other keys are let through.

    Raises:
        UsageError: it is no object, or lacks a key, or has one of the wrong kind or, without `more`, another one.
    """
    if not isinstance(value, dict):
        raise UsageError(f"{place} is {shown(value)}; expected an object.")
    missing = [key for key, kind in kinds.items() if not kind.endswith("?") and key not in value]
    if missing:
        raise UsageError(f"{place} lacks {quoted(missing)}; {hint}.")
    unknown = [] if more else [key for key in value if key not in kinds]
    if unknown:
        raise UsageError(
            f"{place} has the key {shown(unknown[0])}, which is not one of {quoted(kinds)}; units are part of the "
            "keys."
        )
    for key, kind in kinds.items():
        if key in value:
            require_value(f"{place}: '{key}'", value[key], kind.removesuffix("?"))
    return value


def require_value(place: str, value: Any, kind: str) -> None:
    """Refuse a value that is not of a kind.

    Raises:
        UsageError: names the place, what is there, and what belongs there.
    """
    holds, expected = _KINDS[kind]
    if not holds(value):
        raise UsageError(f"{place} is {shown(value)}; expected {expected}.")


def require_metrics(place: str, row: Mapping[str, Any], hint: str, *, more: bool = False) -> None:
    """Check every metric that a row or result has.

    Raises:
        UsageError: see `require_entry`; or the quantiles of its latency do not rise.
    """
    for name, kinds in METRICS.items():
        if name in row:
            require_entry(f"{place}: '{name}'", row[name], kinds, hint, more=more)
    latency = row.get("latency", {})
    order = [latency[key] for key in ("p10_s", "median_s", "p90_s") if key in latency]
    if order != sorted(order):
        raise UsageError(f"{place}: latency quantiles {order} do not rise from p10 to p90; correct them.")


def quoted(names: Iterable[str] | Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(f"'{name}'" for name in names)


def shown(value: Any) -> str:
    """Any value of a file for a message, shortened."""
    return _SHOWN.repr(value)
