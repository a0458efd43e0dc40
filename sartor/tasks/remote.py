"""The side of a task that runs on a node of a cluster: files by content in, plain data out."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sartor
from sartor.errors import BackendError, UsageError
from sartor.tasks.task import ALONE, error_to_dict


def versions(target: str) -> dict[str, str]:
    """What must be equal here and on a node, so that it runs what was lowered here, by the same rules."""
    from sartor import backends

    return {
        "sartor": sartor.__version__,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        target: backends.get(target).capabilities().version,
    }


def require_versions(expected: Mapping[str, str], found: Mapping[str, str], node: str) -> None:
    """Compare a node with the process that sends tasks.

    Raises:
        UsageError: something is of another version.
    """
    for name, version in expected.items():
        if found.get(name) != version:
            raise UsageError(
                f"The node '{node}' has {name} {found.get(name, 'not at all')} and this process has {version}; "
                "measurements of different versions cannot be compared. Install the same version on both."
            )


def describe(target: str) -> dict[str, Any]:
    """Versions and machine of the node that runs this, or the error that kept it from saying."""
    from sartor.backends import host

    node = os.uname().nodename
    try:
        return {"versions": versions(target), "machine": host.conditions(), "node": node}
    except Exception as error:
        return {"error": error_to_dict(error), "node": node}


def run_task(request: str, *contents: bytes) -> dict[str, Any]:
    """Do one task.

    Args:
        request: JSON: the task (`Task.to_dict`), `versions`, `device`, and `contents`, SHA-256 of each of
        contents: of the files.

    Returns:
        `{"value", "files"}`, or `{"error"}` with what was raised: nothing but plain data leaves a node.
    """
    from sartor.tasks.perform import perform

    try:
        given = json.loads(request)
        task = given["task"]
        require_versions(given["versions"], versions(task["payload"]["target"]), os.uname().nodename)
        with tempfile.TemporaryDirectory(prefix="sartor-task-") as folder:
            by_hash = dict(zip(given["contents"], contents, strict=True))
            roots = _write(Path(folder), task["files"], by_hash)
            with alone() if task["kind"] in ALONE else contextlib.nullcontext():
                result = perform(task["kind"], task["payload"], roots)
        return {
            "value": {**result.value, **_where(task, result.value, given["device"])},
            "files": result.files,
        }
    except Exception as error:
        error.add_note(f"That was on the node '{os.uname().nodename}'.")
        return {"error": error_to_dict(error)}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until nothing else of ours is timed on this machine, whichever cluster or device it is for.

    The lock goes with the process, so that one which was killed leaves nothing behind.
    """
    path = Path(tempfile.gettempdir()) / f"sartor-timing-{os.getuid()}.lock"
    with open(path, "w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _where(task: Mapping[str, Any], value: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Conditions with the device's name, of what has any."""
    if task["kind"] not in ALONE:
        return {}
    return {"conditions": {**value["conditions"], "device": device}}


def _write(
    folder: Path, files: Mapping[str, Mapping[str, str]], contents: Mapping[str, bytes]
) -> dict[str, Path]:
    roots = {}
    for label, names in files.items():
        roots[label] = folder / label
        for name, sha256 in names.items():
            content = contents[sha256]
            observed = hashlib.sha256(content).hexdigest()
            if observed != sha256:
                raise BackendError(
                    f"The file '{name}' of a task arrived with SHA-256 {observed}, expected {sha256}: it was changed "
                    "after its artifact was lowered, or on its way. Run the command again."
                )
            path = roots[label] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return roots
