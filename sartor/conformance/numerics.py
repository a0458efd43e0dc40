"""Checks of what a backend computes, against the FX twin in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from sartor.backends.protocol import PRECISIONS, TargetOptions
from sartor.conformance.check import Check, Failed, Skipped, require
from sartor.conformance.compare import TOLERANCES, compare, relative_error
from sartor.conformance.models import Model, models, sample_inputs
from sartor.conformance.subject import Subject
from sartor.errors import BackendError

_BATCHES = (3, 5)


def checks() -> Iterator[Check]:
    """One per model and precision, then those about all of them."""
    for model in models().values():
        for precision in model.precisions:
            yield Check(
                f"numerics.{model.name}.{precision}",
                f"{model.text} Outputs in {precision} equal the reference within the tolerance.",
                functools.partial(_equals_the_reference, model, precision),
            )
    for precision in PRECISIONS:
        yield Check(
            f"coverage.{precision}",
            f"If {precision} is claimed, at least one model of the kit is legal in it.",
            functools.partial(_something_is_legal, precision),
        )
        yield Check(
            f"precision.artifact.{precision}",
            f"If {precision} is claimed, the artifact says that it computes in it.",
            functools.partial(_says_its_precision, precision),
        )
    yield Check(
        "precision.arithmetic.bf16",
        "What is called bf16 is computed in bfloat16, and not in float32 under that name.",
        _bf16_is_not_f32,
    )
    yield Check(
        "precision.form.int8-of-float",
        "A float32 program is not accepted as int8: precision is a property of the program.",
        functools.partial(_form_is_refused, "f32", "int8"),
    )
    yield Check(
        "precision.form.f32-of-quantized",
        "A quantized program is not accepted as f32: it would be run as something else than it is.",
        functools.partial(_form_is_refused, "int8", "f32"),
    )
    yield Check(
        "batch.any-size",
        "An artifact with a symbolic batch computes any batch sample by sample.",
        _any_batch,
    )


def _equals_the_reference(model: Model, precision: str, subject: Subject) -> str:
    session = subject.session(model.name, precision)
    observed = []
    for seed in (0, 1):  # the second run meets what the first has left in the buffers
        outputs = session.run(subject.inputs(model.name, precision, seed))
        observed.append(compare(subject.reference(model.name, precision, seed), outputs, precision))
    return observed[-1]


def _something_is_legal(precision: str, subject: Subject) -> str:
    subject.require_precision(precision)
    legal = []
    of_precision = [m for m in models().values() if precision in m.precisions]
    for model in of_precision:
        try:
            subject.program(model.name, precision)
        except Skipped:
            continue
        legal.append(model.name)
    require(bool(legal), f"none of {len(of_precision)} models is legal")
    return f"{len(legal)} of {len(of_precision)} models are legal"


def _says_its_precision(precision: str, subject: Subject) -> str:
    model, _ = subject.any_program("conv", precision=precision)
    artifact = subject.artifact(model.name, precision)
    require(artifact.precision == precision, f"the artifact says '{artifact.precision}'")
    return f"artifact.precision is '{artifact.precision}'"


def _bf16_is_not_f32(subject: Subject) -> str:
    subject.require_precision("bf16")
    wide, narrow = TOLERANCES["f32"], TOLERANCES["bf16"]
    errors = {}
    for name in ("gemm", "conv", "matmul", "resnet"):
        try:
            session = subject.session(name, "bf16")
        except Skipped:
            continue
        outputs = session.run(subject.inputs(name, "bf16"))
        expected = subject.reference(name, "bf16")
        errors[name] = max(
            relative_error(v, np.asarray(outputs[k], np.float64)).largest for k, v in expected.items()
        )
    if not errors:
        raise Skipped("No model that multiplies is legal in bf16.")
    largest = max(errors.values())
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    require(
        largest > wide.largest,
        f"errors are those of float32: {text}; bfloat16 has about {narrow.largest / 10:g}",
    )
    return f"errors {text}"


def _form_is_refused(form: str, asked: str, subject: Subject) -> str:
    subject.require_precision(asked)
    for name in ("conv", "gemm"):
        program = models()[name].program(form)
        options = subject.options(program, asked)
        report = subject.backend.legality(program, options)
        if report.ok:
            raise Failed(f"Model '{name}' of form {form} is legal with precision '{asked}'.")
        folder = subject.folder()
        try:
            subject.backend.lower(program, folder, options)
        except BackendError:
            require(not folder.exists(), "lower refused it and left a folder")
            continue
        raise Failed(f"Legality refuses model '{name}' of form {form} as '{asked}'; lower takes it.")
    return f"refused: {report.violations[0].rule}"


def _any_batch(subject: Subject) -> str:
    from sartor.ir.fx import run_twin

    model, program = subject.any_program("resnet", "gemm", "conv")
    artifact = subject.artifact(model.name)
    subject.require_runs_here()
    symbols = [spec.name for spec in artifact.inputs if spec.shape and isinstance(spec.shape[0], str)]
    if not program.batch.symbolic or not symbols:
        raise Skipped(f"The artifact of '{model.name}' has a fixed batch: {artifact.inputs[0].shape}.")
    free = subject.backend.load(artifact, TargetOptions())
    for batch in _BATCHES:
        inputs = sample_inputs(program, seed=batch, batch=batch)
        expected = run_twin(program, inputs)
        shapes = {name: array.shape for name, array in inputs.items()}
        fixed = subject.backend.load(artifact, TargetOptions(shapes=shapes))
        for session in (free, fixed):
            observed = compare(expected, session.run(inputs), "f32")
    return f"batches {_BATCHES}, one session for all and one for each: {observed}"
