"""Every exception that Sartor raises on purpose, each with the exit code of the command line.

A message states subject, violated rule, observed against expected, and one thing to do. Interpolated
names are quoted. A bug of ours is an `InternalError`; everything else is about the caller's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

EXIT_MET = 0
EXIT_USAGE = 2
EXIT_BUDGET_MISSED = 3
EXIT_QUALITY_MISSED = 4
EXIT_VERIFICATION_FAILED = 5
EXIT_INTERNAL = 70


class SartorError(Exception):
    """Root of every error that Sartor raises. Its message is one line, whatever names a file put into it."""

    exit_code: ClassVar[int] = EXIT_INTERNAL

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else " " for c in super().__str__())


class UsageError(SartorError):
    """The caller's input (model, data, option, budget) cannot be used; nothing was written."""

    exit_code = EXIT_USAGE


class ModelError(UsageError):
    """A model file or module cannot be loaded, captured or canonicalized.

    Attributes:
        nodes: nodes without which it could be, reason by name; empty when there are none.
    """

    def __init__(self, message: str = "", nodes: Mapping[str, str] | None = None):
        super().__init__(message)
        self.nodes = dict(nodes or {})


class UnsupportedOperatorError(ModelError):
    """The model uses an operator that is outside the canonical table; names the node and its source."""


class PlanError(UsageError):
    """A plan does not belong to this model, or is not legal for it."""


class PassError(SartorError):
    """A pass could not be applied to this program."""

    exit_code = EXIT_USAGE


class BackendError(SartorError):
    """A backend refused, failed or crashed; carries the vendor's last log lines as notes."""

    exit_code = EXIT_USAGE


class VerificationError(SartorError):
    """A program is malformed after a pass, or an oracle found it not equivalent."""

    exit_code = EXIT_VERIFICATION_FAILED


class MetricUnavailableError(SartorError):
    """A metric was read that no model or measurement provided; it is never guessed."""

    exit_code = EXIT_INTERNAL


class InternalError(SartorError):
    """Our own bug; the message asks for a report."""

    exit_code = EXIT_INTERNAL
