"""What a task is: a kind, a JSON payload and files by content. It names no object, closure or path of this process.

A task is therefore the same wherever it runs, can be written down, and needs no pickle. What it answers is plain
data as well; an error travels as its class, message and notes, and is raised here as one of `sartor.errors`.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import sartor.errors
from sartor.errors import BackendError, InternalError, SartorError

KINDS = ("measure", "score", "time-models", "time-inside")
"""Artifacts interleaved; outputs of an artifact on batches; many small models; models and the kernels inside them."""
ALONE = ("measure", "time-models", "time-inside")
"""Kinds that nothing may run beside: they take time."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes:
        kind: one of `KINDS`.
        payload: JSON; refers to files by folder label.
        files: per folder label, SHA-256 by file name.
        roots: where each labelled folder lies on this machine; not part of `to_dict`.
    """

    kind: str
    payload: Mapping[str, Any]
    files: Mapping[str, Mapping[str, str]]
    roots: Mapping[str, Path]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InternalError(f"Unknown kind of task '{self.kind}'; the kinds are {', '.join(KINDS)}.")
        plain = json.loads(json.dumps(self.payload, allow_nan=False))
        object.__setattr__(self, "payload", plain)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the same for the same work, wherever its files lie."""
        files = {label: dict(sorted(names.items())) for label, names in sorted(self.files.items())}
        return {"kind": self.kind, "payload": dict(self.payload), "files": files}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a task answers.

    Attributes:
        value: JSON.
        files: content by name.
    """

    value: Mapping[str, Any]
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


class Runner(Protocol):
    """Runs tasks.

    Attributes:
        device: name of what they run on; empty for this machine.
        chunk_bytes: how much input one `score` task should hold.
    """

    device: str
    chunk_bytes: int

    def run_all(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of `tasks`, which are taken as they can be begun.

        Raises:
            SartorError: what a task raised, when its turn comes; later tasks are given up.
        """
        ...

    def run(self, task: Task) -> Result:
        """The result of one task."""
        ...

    def close(self) -> None:
        """Give up what is held; running tasks are ended."""
        ...


def error_to_dict(error: BaseException) -> dict[str, Any]:
    """An error as plain data."""
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    if isinstance(error, SartorError):
        return {"kind": type(error).__name__, "message": str(error), "notes": notes}
    return {
        "kind": "BackendError",
        "message": f"The task failed: {type(error).__name__}: {error}.",
        "notes": ["".join(traceback.format_exception(error))],
    }


def error_from_dict(data: Mapping[str, Any]) -> SartorError:
    """The error that `error_to_dict` wrote, as its class of `sartor.errors`."""
    kind = getattr(sartor.errors, str(data["kind"]), BackendError)
    if not (isinstance(kind, type) and issubclass(kind, SartorError)):
        kind = BackendError
    error = kind(str(data["message"]))
    for note in data["notes"]:
        error.add_note(str(note))
    return error
