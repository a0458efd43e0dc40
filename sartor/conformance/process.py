"""The subprocess that checks run in: `python -m sartor.conformance.process`.

A backend under test may crash or hang at any check; that check has failed then, and the next one gets a fresh
process. Diagnoses of plugins run here for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sartor.backends.worker import Send, serve
from sartor.conformance.check import perform
from sartor.conformance.diagnosis import diagnose
from sartor.conformance.subject import Subject
from sartor.conformance.suite import suite

_subjects: dict[str, Subject] = {}
"""By scratch folder: what one check has lowered, the next one need not."""


def check(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """One check of one backend; the answer is its outcome."""
    found = next(c for c in suite() if c.id == request["id"])
    scratch = request["scratch"]
    if scratch not in _subjects:
        _subjects[scratch] = Subject(request["backend"], Path(scratch))
    return perform(found, _subjects[scratch]).to_dict()


def diagnosis(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """The state of one plugin."""
    return diagnose(request["group"], request["name"])


if __name__ == "__main__":
    serve({"check": check, "diagnosis": diagnosis})
