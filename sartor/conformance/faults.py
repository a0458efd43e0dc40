"""Checks of what happens with input that cannot be used: one error of the right class, nothing written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sartor.backends.protocol import PRECISIONS, Artifact, TargetOptions
from sartor.conformance.check import Check, Failed, Skipped, describe, require, require_error
from sartor.conformance.draft import Draft
from sartor.conformance.models import models, sample_inputs
from sartor.conformance.subject import Subject
from sartor.errors import BackendError, SartorError, UsageError

_SIMPLE = ("conv", "gemm", "activation-relu")


def checks() -> Iterator[Check]:
    """Those of this module."""
    for change in _WRONG_INPUTS:
        yield Check(
            f"errors.input-{change}",
            f"Running with {_WRONG_INPUTS[change][0]} is a UsageError that names the input.",
            lambda subject, change=change: _wrong_input(subject, change),  # type: ignore[misc]
        )
    yield Check(
        "errors.damaged-file",
        "A file of the artifact that was changed by one bit, or cut short, is a BackendError at loading.",
        _damaged,
    )
    yield Check(
        "errors.missing-file", "A missing file of the artifact is a BackendError at loading.", _missing
    )
    yield Check(
        "errors.precision-not-claimed",
        "A precision that the backend does not claim is a UsageError in legality, lower, load and compile.",
        _precision,
    )
    yield Check("errors.shape", "Loading at shapes that the model cannot have is a UsageError.", _shape)
    yield Check(
        "errors.not-a-model",
        "Bytes that are no model end in an error of Sartor, not in a crash.",
        _not_a_model,
    )
    yield Check(
        "errors.foreign-folder", "A folder that holds something else is never overwritten.", _foreign_folder
    )
    yield Check(
        "legality.unknown-operator",
        "Legality finds an operator that no runtime knows, by node; lower then refuses and writes nothing.",
        _unknown_operator,
    )
    yield Check(
        "legality.agrees-with-lower",
        "Every model of the kit that legality accepts can be lowered, and no other.",
        _agrees,
    )
    yield Check(
        "legality.computed-operands",
        "Legality answers, and lower does as it says, where weights, bounds and statistics come in as inputs.",
        _computed_operands,
    )


Change = Callable[[dict[str, np.ndarray], str], dict[str, np.ndarray]]
_WRONG_INPUTS: dict[str, tuple[str, Change]] = {
    "missing": ("an input left out", lambda inputs, name: {k: v for k, v in inputs.items() if k != name}),
    "unknown": ("an input too many", lambda inputs, name: {**inputs, f"{name}_not": inputs[name]}),
    "type": (
        "float64 instead of float32",
        lambda inputs, name: {**inputs, name: inputs[name].astype(np.float64)},
    ),
    "byte-order": (
        "numbers in foreign byte order",
        lambda inputs, name: {**inputs, name: inputs[name].astype(inputs[name].dtype.newbyteorder())},
    ),
    "shape": (
        "one axis too long",
        lambda inputs, name: {**inputs, name: np.repeat(inputs[name], 2, axis=-1)},
    ),
    "rank": ("an axis left out", lambda inputs, name: {**inputs, name: inputs[name][0]}),
}


def _wrong_input(subject: Subject, change: str) -> str:
    model, program = subject.any_program(*_SIMPLE)
    session = subject.session(model.name)
    inputs = sample_inputs(program, 0)
    name = next(iter(inputs))
    text, changed = _WRONG_INPUTS[change]
    error = require_error(
        UsageError, f"A run with {text}", lambda: session.run(changed(inputs, name)), names=name
    )
    session.run(inputs)  # the session is still good
    return describe(error)


def _fresh(subject: Subject) -> tuple[Artifact, TargetOptions]:
    _, program = subject.any_program(*_SIMPLE)
    options = subject.options(program)
    return subject.backend.lower(program, subject.folder(), options), options


def _damaged(subject: Subject) -> str:
    artifact, options = _fresh(subject)
    subject.require_runs_here()
    seen = []
    for file in artifact.files:
        path = artifact.folder / file
        original = path.read_bytes()
        flipped = bytearray(original)
        flipped[len(flipped) // 2] ^= 1
        for what, data in (
            ("one bit changed", bytes(flipped)),
            ("half of it", original[: len(original) // 2]),
        ):
            path.write_bytes(data)
            error = require_error(
                BackendError, f"Loading '{file}' with {what}", lambda: subject.backend.load(artifact, options)
            )
            seen.append(f"'{file}', {what}: {describe(error)[:120]}")
        path.write_bytes(original)
    subject.backend.load(artifact, options)
    return "; ".join(seen)


def _missing(subject: Subject) -> str:
    artifact, options = _fresh(subject)
    subject.require_runs_here()
    for file in artifact.files:
        path = artifact.folder / file
        original = path.read_bytes()
        path.unlink()
        error = require_error(
            BackendError, f"Loading without '{file}'", lambda: subject.backend.load(artifact, options)
        )
        path.write_bytes(original)
    return describe(error)


def _precision(subject: Subject) -> str:
    model, program = subject.any_program(*_SIMPLE)
    artifact = subject.artifact(model.name)
    unclaimed = [p for p in PRECISIONS if p not in subject.capabilities.precisions]
    if not unclaimed:
        raise Skipped("The backend claims every precision that there is.")
    require_error(UsageError, "A precision called 'f33'", lambda: TargetOptions(precision="f33"), names="f33")
    for precision in unclaimed:
        options = dataclasses.replace(subject.options(program), precision=precision)
        folder = subject.folder()
        calls: dict[str, Callable[[], object]] = {
            "legality": lambda options=options: subject.backend.legality(program, options),  # type: ignore[misc]
            "lower": lambda o=options, folder=folder: subject.backend.lower(program, folder, o),  # type: ignore[misc]
            "load": lambda options=options: subject.backend.load(artifact, options),  # type: ignore[misc]
            "compile": lambda options=options: subject.backend.compile(program.to_bytes(), options),  # type: ignore[misc]
        }
        for method, call in calls.items():
            error = require_error(UsageError, f"{method} with '{precision}'", call, names=precision)
        require(not folder.exists(), f"lower with '{precision}' left a folder")
    return f"{', '.join(unclaimed)}: {describe(error)}"


def _shape(subject: Subject) -> str:
    model, program = subject.any_program(*_SIMPLE)
    artifact = subject.artifact(model.name)
    subject.require_runs_here()
    name, shape = next(iter(program.input_shapes.items()))
    wrong = {
        "another rank": {name: shape[1:]},
        "another size of a fixed axis": {name: (*shape[:-1], shape[-1] + 1)},
        "a name that is no input": {f"{name}_not": shape},
    }
    for what, shapes in wrong.items():
        error = require_error(
            UsageError,
            f"Loading at {what}",
            lambda shapes=shapes: subject.backend.load(artifact, TargetOptions(shapes=shapes)),  # type: ignore[misc]
        )
    return describe(error)


def _not_a_model(subject: Subject) -> str:
    return describe(
        require_error(
            SartorError,
            "Compiling bytes that are no model",
            lambda: subject.backend.compile(b"these bytes are no model", TargetOptions()),
        )
    )


def _foreign_folder(subject: Subject) -> str:
    _, program = subject.any_program(*_SIMPLE)
    folder = subject.folder()
    folder.mkdir(parents=True)
    mine = folder / "mine.txt"
    mine.write_text("keep", encoding="utf-8")
    error = require_error(
        UsageError,
        "Lowering to a folder with a file of the user",
        lambda: subject.backend.lower(program, folder, subject.options(program)),
    )
    require([p.name for p in folder.iterdir()] == ["mine.txt"], "the folder was changed")
    return describe(error)


def _unknown_operator(subject: Subject) -> str:
    model, program = subject.any_program(*_SIMPLE)
    options = subject.options(program)
    node = next(iter(program.nodes()))
    node.domain = "com.example.nobody"
    program.model.opset_imports[node.domain] = 1  # still valid ONNX
    program.invalidate()
    try:
        report = subject.backend.legality(program, options)
    except SartorError as error:
        raise Failed(f"legality ended with {describe(error)}; it reports what it finds") from error
    require(not report.ok, f"legality accepts '{model.name}' with an operator of domain '{node.domain}'")
    found = [v for v in report.violations if v.node == node.name]
    require(bool(found), f"no violation names node '{node.name}': {[str(v) for v in report.violations][:3]}")
    folder = subject.folder()
    refused = require_error(
        BackendError, "Lowering the illegal program", lambda: subject.backend.lower(program, folder, options)
    )
    require(_empty(folder), "lower left something behind")
    return describe(refused)


def _agrees(subject: Subject) -> str:
    lowered, refused = [], []
    for name, model in models().items():
        program = model.program("f32")
        options = subject.options(program)
        if subject.backend.legality(program, options).ok:
            subject.artifact(name)  # fails the check if it cannot be lowered
            lowered.append(name)
            continue
        folder = subject.folder()
        require_error(
            BackendError,
            f"Lowering '{name}', which legality refuses,",
            lambda p=program, f=folder, o=options: subject.backend.lower(p, f, o),  # type: ignore[misc]
        )
        require(_empty(folder), f"lowering '{name}' left something behind")
        refused.append(name)
    return f"{len(lowered)} lowered; refused: {', '.join(refused) or 'none'}"


_COMPUTED: dict[str, tuple[tuple[int | str, ...], ...]] = {
    "Conv": (("N", 3, 6, 5), (4, 3, 3, 3), (4,)),
    "Gemm": (("N", 5), (5, 4)),
    "Clip": (("N", 5), (), ()),
    "BatchNormalization": (("N", 3, 6, 5), (3,), (3,), (3,), (3,)),
    "PRelu": (("N", 3, 6, 5), (3, 1, 1)),
}
"""Shapes of the operands of operators that usually hold them as weights."""


def _computed_operands(subject: Subject) -> str:
    seen = []
    for op_type, shapes in _COMPUTED.items():
        draft = Draft("f32", 1)
        operands = [draft.input(f"operand_{index}", *shape) for index, shape in enumerate(shapes)]
        draft.output(draft.node("Relu", draft.node(op_type, *operands)), "y")
        program = draft.program()
        options = subject.options(program)
        report = subject.backend.legality(program, options)
        lower = functools.partial(subject.backend.lower, program, subject.folder(), options)
        if report.ok:
            lower()
        else:
            require_error(BackendError, f"Lowering {op_type} of inputs, which legality refuses,", lower)
        seen.append(f"{op_type} {'lowered' if report.ok else f'refused [{report.violations[0].rule}]'}")
    return ", ".join(seen)


def _empty(folder: Path) -> bool:
    return not folder.parent.exists() or not list(folder.parent.iterdir())
