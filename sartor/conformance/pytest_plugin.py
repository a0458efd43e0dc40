"""`pytest --sartor-backend=NAME`: every check of the conformance kit as a test, beside a vendor's own tests.

Installed with Sartor as an entry point of pytest, so it must be cheap to import: nothing happens without the
option. `-k`, `-x`, `--junitxml` and the like work as for any test; the kit alone is `-m sartor_conformance`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sartor.conformance.check import Check, Outcome
    from sartor.conformance.run import Runner

_MARK = "sartor_conformance"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the kit."""
    group = parser.getgroup("sartor", "conformance of Sartor backends")
    group.addoption(
        "--sartor-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="run Sartor's conformance kit on this registered backend; repeatable",
    )
    group.addoption(
        "--sartor-only",
        action="append",
        default=[],
        metavar="ID",
        help="only the checks with this id, area or glob; repeatable",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark."""
    config.addinivalue_line("markers", f"{_MARK}: a check of Sartor's conformance kit")


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add one test per check and backend."""
    names = config.getoption("--sartor-backend")
    if not names:
        return
    from sartor.conformance.suite import select
    from sartor.errors import UsageError

    try:
        checks = select(config.getoption("--sartor-only"))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    for name in dict.fromkeys(names):
        kit = Kit.from_parent(session, name=f"sartor-conformance-{name}", backend=name)
        items.extend(Conformance.from_parent(kit, name=check.id, check=check) for check in checks)


class Kit(pytest.Collector):
    """The checks of one backend; they share a subprocess and what was lowered in it."""

    def __init__(self, *, backend: str, **keywords: Any):
        super().__init__(**keywords)
        self.backend = backend
        self.runner: Runner | None = None

    def collect(self) -> Iterator[pytest.Item]:
        """Nothing: the items are made at once."""
        return iter(())

    def setup(self) -> None:
        """Start; a backend that is not there is an error of every check."""
        from sartor.conformance.run import Runner

        self.runner = Runner(self.backend)
        self.addfinalizer(self.runner.close)
        self.runner.require_installed()


class Conformance(pytest.Item):
    """One check as a test."""

    def __init__(self, *, check: Check, **keywords: Any):
        super().__init__(**keywords)
        self.check = check
        self.add_marker(_MARK)

    def runtest(self) -> None:
        """Fail or skip as the check does."""
        assert isinstance(self.parent, Kit) and self.parent.runner is not None
        outcome = self.parent.runner.perform(self.check)
        self.user_properties.append(("observed", outcome.observed))
        if outcome.result == "skipped":
            pytest.skip(outcome.observed)
        if outcome.result == "failed":
            raise DoesNotConform(outcome)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The sentence and what was observed, without a traceback through this file."""
        if isinstance(excinfo.value, DoesNotConform):
            outcome = excinfo.value.outcome
            lines = [outcome.sentence, f"observed: {outcome.observed}", outcome.details]
            return "\n".join(line for line in lines if line)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        """Where pytest says that the test is."""
        return self.parent.name if self.parent else _MARK, None, self.name


class DoesNotConform(Exception):
    """A check failed."""

    def __init__(self, outcome: Outcome):
        super().__init__(outcome.observed)
        self.outcome = outcome
