"""A check of the kit: one sentence about a backend that holds or does not, and what was seen."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from sartor.errors import SartorError

if TYPE_CHECKING:
    from sartor.conformance.subject import Subject

Result = Literal["passed", "failed", "skipped"]


class Failed(Exception):
    """Ends a check that does not hold; its text is what was observed."""


class Skipped(Exception):
    """Ends a check that does not apply; its text is the reason."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        id: `area.subject`, and `.precision` where it is about one; never reused for another meaning.
        sentence: what holds for a backend that conforms.
        observe: returns what was observed; raises `Failed` or `Skipped`.
    """

    id: str
    sentence: str
    observe: Callable[[Subject], str]

    @property
    def area(self) -> str:
        """The first part of the id."""
        return self.id.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one check.

    Attributes:
        id: of the check.
        sentence: of the check.
        result: `passed`, `failed` or `skipped`.
        observed: what was seen, or the reason for skipping.
        seconds: wall time.
        details: traceback or log lines of a failure; empty otherwise.
    """

    id: str
    sentence: str
    result: Result
    observed: str
    seconds: float
    details: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dataclasses.asdict(self)


def perform(check: Check, subject: Subject) -> Outcome:
    """Run one check; whatever the backend raises is an outcome."""
    started = time.monotonic()
    details = ""
    result: Result = "passed"
    try:
        observed = check.observe(subject)
    except Skipped as reason:
        result, observed = "skipped", str(reason)
    except Failed as failure:
        result, observed = "failed", str(failure)
    except Exception as error:
        result, observed = "failed", describe(error)
        details = "".join(traceback.format_exception(error))
    return Outcome(
        check.id, check.sentence, result, observed, round(time.monotonic() - started, 3), details[-8000:]
    )


def describe(error: BaseException) -> str:
    """Class and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def require(holds: bool, observed: str) -> None:
    """Fail the check with `observed` unless `holds`."""
    if not holds:
        raise Failed(observed)


def require_error(
    kind: type[SartorError], what: str, call: Callable[[], object], *, names: str = ""
) -> SartorError:
    """The error of `kind` that `call` must end with.

    Args:
        kind: expected class; a subclass will do.
        what: what was done, for the observation.
        call: does it.
        names: text that the message must contain.

    Raises:
        Failed: it ended without an error, with one of another class, or with one that does not say `names`.
    """
    try:
        result = call()
    except kind as error:
        require(
            names in str(error), f"{what}: the {kind.__name__} does not name '{names}': {describe(error)}"
        )
        return error
    except Exception as error:
        raise Failed(f"{what} ended with {describe(error)} where a {kind.__name__} was expected.") from error
    _accepted(what, kind, result)


def _accepted(what: str, kind: type[SartorError], result: object) -> NoReturn:
    raise Failed(
        f"{what} was accepted ({type(result).__name__} returned) where a {kind.__name__} was expected."
    )
