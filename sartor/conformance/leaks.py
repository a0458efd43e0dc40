"""Checks of what a backend leaves behind: threads, open files, and files beside the artifact."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from sartor.backends import isolation
from sartor.backends.protocol import Artifact, TargetOptions
from sartor.conformance.check import Check, Skipped, require
from sartor.conformance.subject import Subject

_SIMPLE = ("conv", "gemm", "activation-relu")
_LOADS = 20
_WARM_UP = 3  # loads, in which pools and caches of the process are made
_PROCESS = Path("/proc/self")
_COUNTED = {"task": "threads", "fd": "open files"}
_MOVED = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR")
_CACHE = "SARTOR_CACHE"


def checks() -> Iterator[Check]:
    """Those of this module."""
    yield Check(
        "leaks.handles",
        f"Sessions that are no longer used leave no threads and no open files: {_LOADS} loads and runs.",
        _handles,
    )
    yield Check(
        "leaks.files",
        "Lowering, loading and running write nothing but the artifact: not to the working folder, to HOME or TMPDIR.",
        _files,
    )


def _handles(subject: Subject) -> str:
    if not (_PROCESS / "task").is_dir():
        raise Skipped("This system does not tell the threads of a process (/proc/self/task).")
    model, program = subject.any_program(*_SIMPLE)
    artifact = subject.artifact(model.name)
    subject.require_runs_here()
    options = dataclasses.replace(subject.options(program), threads=2)  # one has no pool to leave behind
    inputs = subject.inputs(model.name)
    _use(subject, artifact, options, inputs, _WARM_UP)
    before = _counts()
    _use(subject, artifact, options, inputs, _LOADS)
    after = _counts()
    if any(after[kind] > before[kind] for kind in after):
        time.sleep(0.3)  # threads that were told to end
        after = _counts()
    text = ", ".join(f"{before[kind]} {noun} before, {after[kind]} after" for kind, noun in _COUNTED.items())
    text += f" {_LOADS} loads of '{model.name}'"
    require(all(after[kind] - before[kind] < _LOADS / 2 for kind in _COUNTED), text)
    return text


def _use(
    subject: Subject, artifact: Artifact, options: TargetOptions, inputs: Mapping[str, np.ndarray], times: int
) -> None:
    for _ in range(times):
        subject.backend.load(artifact, options).run(inputs)
    gc.collect()


def _counts() -> dict[str, int]:
    return {kind: len(os.listdir(_PROCESS / kind)) for kind in _COUNTED}


def _files(subject: Subject) -> str:
    model, program = subject.any_program(*_SIMPLE)
    options = subject.options(program)
    places = {name: subject.folder().parent / name for name in ("HOME", "TMPDIR", "working folder")}
    with _elsewhere(places):
        artifact = isolation.lower(subject.name, program, subject.folder(), options)
        if not subject.capabilities.not_run_here:
            with isolation.Session(artifact, options) as session:
                session.run(subject.inputs(model.name))
    left = [
        f"{name}: {path.relative_to(place)}"
        for name, place in places.items()
        for path in sorted(place.rglob("*"))
        if not (path.is_dir() and any(path.iterdir()))
    ]
    require(not left, f"'{model.name}' left {len(left)} files behind: {', '.join(left[:5])}")
    done = "lowered" if subject.capabilities.not_run_here else "lowered and run"
    return f"'{model.name}' {done}; nothing in {', '.join(places)}"


@contextlib.contextmanager
def _elsewhere(places: Mapping[str, Path]) -> Iterator[None]:
    """Subprocesses that start meanwhile have these folders; Sartor's own cache, and this process, have their own."""
    for place in places.values():
        place.mkdir(parents=True)
    tempfile.gettempdir()  # is decided once
    before, folder = dict(os.environ), Path.cwd()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault(_CACHE, str(Path(base) / "sartor"))
    for name in _MOVED:
        os.environ.pop(name, None)
    os.environ.update(HOME=str(places["HOME"]), TMPDIR=str(places["TMPDIR"]))
    os.chdir(places["working folder"])
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(before)
