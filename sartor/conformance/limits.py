"""Checks of a backend behind limits: lowering in a subprocess."""

from __future__ import annotations

import time
from collections.abc import Iterator

from sartor.backends import isolation
from sartor.backends.artifact import open_artifact, verify_files
from sartor.conformance.check import Check, describe, require, require_error
from sartor.conformance.subject import Subject
from sartor.errors import SartorError

_SIMPLE = ("conv", "gemm", "activation-relu")
_TOO_SHORT_S = 0.001
_TOO_SMALL_BYTES = 64 << 20
_SHARES = (0.5, 0.8)  # of the time that lowering takes: the import of the vendor, and the compiler itself


def checks() -> Iterator[Check]:
    """Those of this module."""
    yield Check(
        "isolation.lower",
        "Lowering in a subprocess gives the artifact that lowering here gives.",
        _lower_elsewhere,
    )
    yield Check(
        "isolation.time-limit",
        f"Lowering that may take {_TOO_SHORT_S} s ends as an error and leaves nothing; an earlier artifact stays.",
        _time_limit,
    )
    yield Check(
        "isolation.interrupted",
        "Lowering that is stopped half way leaves a whole artifact or none.",
        _interrupted,
    )
    yield Check(
        "isolation.memory-limit",
        f"Lowering in {_TOO_SMALL_BYTES >> 20} MiB ends as an error and leaves nothing; an earlier artifact stays.",
        _memory_limit,
    )


def _lower_elsewhere(subject: Subject) -> str:
    model, program = subject.any_program(*_SIMPLE)
    here = subject.artifact(model.name)
    there = isolation.lower(subject.name, program, subject.folder(), subject.options(program))
    require(open_artifact(there.folder) == there, "the manifest does not describe what was returned")
    require(there.files == here.files, f"files are {there.files} there and {here.files} here")
    same = there.sha256 == here.sha256
    stated = here.metadata.get("reproducible") is False
    require(same or stated, "the bytes differ from those of lowering in this process")
    return "same bytes" if same else "same files; bytes differ, as the artifact states"


def _limited(subject: Subject, **limits: float | int) -> str:
    model, program = subject.any_program(*_SIMPLE)
    options = subject.options(program)
    new, old = subject.folder(), subject.folder()
    kept = subject.backend.lower(program, old, options)
    for folder in (new, old):
        error = require_error(
            SartorError,
            f"Lowering '{model.name}' within {limits}",
            lambda folder=folder: isolation.lower(subject.name, program, folder, options, **limits),  # type: ignore[arg-type,misc]
        )
    left = sorted(p.name for p in new.parent.iterdir()) if new.parent.exists() else []
    require(not left, f"it left {left}")
    require(open_artifact(old) == kept, "the earlier artifact was changed")
    beside = sorted(p.name for p in old.parent.iterdir())
    require(beside == [old.name], f"beside the earlier artifact lies {beside}")
    return describe(error)[:200]


def _time_limit(subject: Subject) -> str:
    return _limited(subject, time_limit_s=_TOO_SHORT_S)


def _interrupted(subject: Subject) -> str:
    model, program = subject.any_program(*_SIMPLE)
    options = subject.options(program)
    started = time.monotonic()
    isolation.lower(subject.name, program, subject.folder(), options)
    whole_s = time.monotonic() - started
    seen = []
    for share in _SHARES:
        folder = subject.folder()
        try:
            isolation.lower(subject.name, program, folder, options, time_limit_s=share * whole_s)
        except SartorError as error:
            left = sorted(p.name for p in folder.parent.iterdir())
            require(
                not left,
                f"stopped after {share:.0%} of {whole_s:.1f} s ({describe(error)[:120]}), it left {left}",
            )
            seen.append(f"stopped after {share:.0%}")
        else:
            verify_files(open_artifact(folder))
            seen.append(f"done within {share:.0%}")
    return f"'{model.name}' takes {whole_s:.1f} s: {', '.join(seen)}"


def _memory_limit(subject: Subject) -> str:
    return _limited(subject, memory_limit_bytes=_TOO_SMALL_BYTES)
