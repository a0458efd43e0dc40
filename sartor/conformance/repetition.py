"""Checks that the same question has the same answer: runs, sessions, artifacts, output buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from sartor.backends import isolation
from sartor.conformance.check import Check, Skipped, require
from sartor.conformance.compare import compare
from sartor.conformance.subject import Subject

REPRODUCIBLE = "reproducible"
"""Key of an artifact's metadata; False says that lowering again need not give the same bytes."""

_SIMPLE = ("residual-block", "conv", "gemm")
_RUNS = 10
_ATTENTION = ("attention-block", "vit", "matmul")  # products of activations are summed by other kernels
_MOVEMENT = ("reshape", "flatten", "transpose-alone", "squeeze")


def checks() -> Iterator[Check]:
    """Those of this module."""
    yield Check(
        "determinism.runs",
        f"The same inputs give the same bits in {_RUNS} runs, in every precision, and with attention.",
        _runs,
    )
    yield Check("determinism.sessions", "Two sessions on one artifact give the same bits.", _sessions)
    yield Check(
        "determinism.threads",
        "A process with two threads, in all of its pools, computes what one thread computes, within the tolerance.",
        _threads,
    )
    yield Check(
        "determinism.own-inputs",
        "Every run answers its own inputs: A, B, A gives the answers to A, B and A.",
        _own_inputs,
    )
    yield Check(
        "determinism.outputs-are-owned",
        "An output that was returned does not change when the session runs again.",
        _outputs_are_owned,
    )
    yield Check(
        "determinism.outputs-are-no-inputs",
        "An output does not share memory with an input, also where a model only moves or renames axes.",
        _outputs_are_no_inputs,
    )
    yield Check(
        "determinism.inputs-are-left-alone", "A run does not write into its inputs.", _inputs_are_left_alone
    )
    yield Check(
        "determinism.artifact",
        "Lowering twice gives the same bytes, or the artifact says that it does not "
        f"('{REPRODUCIBLE}: false' in its metadata).",
        _artifact,
    )


def _runs(subject: Subject) -> str:
    chosen = {
        (subject.any_program(*_SIMPLE, precision=p)[0].name, p): None for p in subject.capabilities.precisions
    }
    if "f32" in subject.capabilities.precisions:
        chosen[subject.any_program(*_ATTENTION)[0].name, "f32"] = None
    for name, precision in chosen:
        session, inputs = subject.session(name, precision), subject.inputs(name, precision)
        first = _copied(session.run(inputs))
        for index in range(1, _RUNS):
            what = f"run {index + 1} of '{name}' in {precision} differs from the first"
            _require_same(first, session.run(inputs), what)
    told = ", ".join(f"'{name}' in {precision}" for name, precision in chosen)
    return f"{told}: {_RUNS} runs are equal bit by bit"


def _sessions(subject: Subject) -> str:
    model, program = subject.any_program(*_SIMPLE)
    session, inputs = subject.session(model.name), subject.inputs(model.name)
    other = subject.backend.load(subject.artifact(model.name), subject.options(program))
    first = _copied(session.run(inputs))
    _require_same(first, other.run(inputs), f"a second session on '{model.name}' differs from the first")
    _require_same(first, session.run(inputs), "the first session differs after the second has run")
    return f"'{model.name}': two sessions, used in turn, are equal bit by bit"


def _threads(subject: Subject) -> str:
    model, program = subject.any_program("resnet", *_SIMPLE)
    artifact = subject.artifact(model.name)
    subject.require_runs_here()
    options = dataclasses.replace(subject.options(program), threads=2)
    # A process of its own: in this one, every pool that the environment sizes was made with one thread.
    with isolation.Session(artifact, options) as session:
        for seed in (0, 1):
            outputs = session.run(subject.inputs(model.name, seed=seed))
            observed = compare(subject.reference(model.name, seed=seed), outputs, "f32")
    return f"'{model.name}': {observed}"


def _own_inputs(subject: Subject) -> str:
    model, _ = subject.any_program(*_SIMPLE)
    session = subject.session(model.name)
    for seed in (0, 1, 0):
        outputs = session.run(subject.inputs(model.name, seed=seed))
        observed = compare(subject.reference(model.name, seed=seed), outputs, "f32")
    return f"'{model.name}': {observed}"


def _outputs_are_owned(subject: Subject) -> str:
    model, _ = subject.any_program(*_SIMPLE)
    session = subject.session(model.name)
    kept = session.run(subject.inputs(model.name, seed=0))
    copies = _copied(kept)
    for seed in (1, 2):
        session.run(subject.inputs(model.name, seed=seed))
        _require_same(copies, kept, f"an output of '{model.name}' was overwritten by a later run")
    return f"'{model.name}': outputs kept their values over two further runs"


def _outputs_are_no_inputs(subject: Subject) -> str:
    subject.require_runs_here()
    checked = []
    for name in _MOVEMENT:
        try:
            session = subject.session(name)
        except Skipped:
            continue
        inputs = subject.inputs(name)
        for output, array in session.run(inputs).items():
            for given, source in inputs.items():
                shared = np.shares_memory(array, source)
                require(not shared, f"'{name}': output '{output}' is memory of input '{given}'")
        checked.append(name)
    if not checked:
        raise Skipped(f"None of the models {', '.join(_MOVEMENT)} is legal.")
    return f"models {', '.join(checked)}"


def _inputs_are_left_alone(subject: Subject) -> str:
    model, _ = subject.any_program(*_SIMPLE)
    inputs = subject.inputs(model.name)
    before = _copied(inputs)
    subject.session(model.name).run(inputs)
    _require_same(before, inputs, f"an input of '{model.name}' was overwritten")
    return f"'{model.name}': inputs are as they were"


def _artifact(subject: Subject) -> str:
    seen = []
    for precision in subject.capabilities.precisions:
        model, program = subject.any_program(*_SIMPLE, precision=precision)
        first = subject.artifact(model.name, precision)
        again = subject.backend.lower(program, subject.folder(), subject.options(program, precision))
        differ = [f for f in first.files if first.sha256[f] != again.sha256.get(f)]
        stated = dataclasses.replace(first, folder=again.folder).metadata.get(REPRODUCIBLE) is False
        require(
            not differ or stated,
            f"'{model.name}' in {precision}: {', '.join(differ)} differ between two lowerings, and the metadata "
            f"does not say '{REPRODUCIBLE}: false'",
        )
        seen.append(f"{precision}: {'files differ, as stated' if differ else 'same bytes'}")
    return "; ".join(seen)


def _copied(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in arrays.items()}


def _require_same(expected: dict[str, np.ndarray], actual: dict[str, np.ndarray], what: str) -> None:
    for name, array in expected.items():
        other = np.asarray(actual.get(name))
        if array.shape != other.shape or not np.array_equal(array, other, equal_nan=array.dtype.kind == "f"):
            same = array.shape == other.shape
            most = f" by up to {np.abs(array - other).max():.3g}" if same and array.dtype.kind == "f" else ""
            require(False, f"{what}: output '{name}'{most}")
