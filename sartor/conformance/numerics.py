"""Checks of what a backend computes, against the FX twin in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from sartor.backends.protocol import PRECISIONS, Session, TargetOptions
from sartor.conformance.chains import chains
from sartor.conformance.check import Check, Failed, Skipped, require
from sartor.conformance.compare import TOLERANCES, Arrays, compare, compare_steps, relative_error
from sartor.conformance.models import Model, models, output_steps
from sartor.conformance.subject import Subject
from sartor.errors import BackendError

_BATCHES = (3, 5, 1)  # it grows, and it shrinks: rows of a larger batch may be left over
_OF_A_FIXED_BATCH = ("attention-block", "concat", "residual-block")
_NARROWER = 0.7
"""Most bytes of a narrow artifact, as a share of those in f32: half and more for float16, a quarter for int8."""


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
            f"If {precision} is claimed, the artifact names it as its precision.",
            functools.partial(_says_its_precision, precision),
        )
    for precision in ("f16", "int8"):
        yield Check(
            f"precision.bytes.{precision}",
            f"If {precision} and f32 are claimed, an artifact with weights is clearly smaller in {precision}.",
            functools.partial(_weights_are_narrow, precision),
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
    yield Check(
        "batch.fixed",
        "Where artifacts have a fixed batch, one that was lowered at 3 computes sample by sample.",
        _fixed_batch,
    )


def _equals_the_reference(model: Model, precision: str, subject: Subject) -> str:
    runs: list[tuple[Arrays, Arrays]] = []

    def observe(session: Session, seed: int, batch: int | None = None) -> str:
        expected = subject.reference(model.name, precision, seed, batch)
        outputs = session.run(subject.inputs(model.name, precision, seed, batch))
        try:
            observed = compare(expected, outputs, precision, shallow=model.shallow)
        except Failed as failure:
            raise Failed(f"{failure}{f' At a batch of {batch}.' if batch else ''}") from failure
        runs.append((expected, {name: np.array(array) for name, array in outputs.items()}))
        return observed

    fixed = subject.session(model.name, precision)
    seen = [
        observe(fixed, seed) for seed in (0, 1)
    ]  # the second meets what the first has left in the buffers
    if subject.takes_any_batch(model.name, precision):
        free = subject.backend.load(
            subject.artifact(model.name, precision), TargetOptions(precision=precision)
        )
        seen += [observe(free, seed=2, batch=3), observe(free, seed=0, batch=1)]
    steps = output_steps(models()[model.name].program(precision))
    if model.shallow and steps:
        seen.append(compare_steps(runs, steps))
    return seen[-1]


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


def _weights_are_narrow(precision: str, subject: Subject) -> str:
    for claimed in (precision, "f32"):
        subject.require_precision(claimed)
    wide, narrow = chains(1, "f32", channels=192, size=6), chains(1, precision, channels=192, size=6)
    for op_type in wide:
        sizes = []
        for program, asked in ((wide[op_type], "f32"), (narrow[op_type], precision)):
            options = subject.options(program, asked)
            if subject.backend.legality(program, options).ok:
                artifact = subject.backend.lower(program, subject.folder(), options)
                sizes.append(artifact.size_bytes)
        if len(sizes) == 2:
            text = (
                f"{op_type} with {192 * 192 * 9} weights: {sizes[1]} bytes in {precision}, {sizes[0]} in f32"
            )
            require(sizes[1] <= _NARROWER * sizes[0], f"{text}; allowed: {_NARROWER:g} of them")
            return text
    raise Skipped(f"Neither a convolution nor a linear layer is legal in both {precision} and f32.")


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
    model, _ = subject.any_program("resnet", "gemm", "conv")
    artifact = subject.artifact(model.name)
    subject.require_runs_here()
    if not subject.takes_any_batch(model.name):
        raise Skipped(f"The artifact of '{model.name}' has a fixed batch: {artifact.inputs[0].shape}.")
    free = subject.backend.load(artifact, TargetOptions())
    for batch in _BATCHES:
        inputs = subject.inputs(model.name, seed=batch, batch=batch)
        shapes = {name: array.shape for name, array in inputs.items()}
        fixed = subject.backend.load(artifact, TargetOptions(shapes=shapes))
        for session in (free, fixed):
            expected = subject.reference(model.name, seed=batch, batch=batch)
            observed = compare(expected, session.run(inputs), "f32")
    return f"batches {_BATCHES}, one session for all and one for each: {observed}"


def _fixed_batch(subject: Subject) -> str:
    subject.require_runs_here()
    seen = []
    for precision in subject.capabilities.precisions:
        for name in _OF_A_FIXED_BATCH:
            program = models()[name].program(precision) if precision in models()[name].precisions else None
            if (
                program is None
                or not subject.backend.legality(program, subject.options(program, precision)).ok
            ):
                continue
            if subject.takes_any_batch(name, precision):
                continue
            inputs = subject.inputs(name, precision, seed=3, batch=3)
            shapes = {key: array.shape for key, array in inputs.items()}
            options = TargetOptions(precision=precision, shapes=shapes)
            if not subject.backend.legality(program, options).ok:
                continue
            artifact = subject.backend.lower(program, subject.folder(), options)
            outputs = subject.backend.load(artifact, options).run(inputs)
            try:
                compare(subject.reference(name, precision, seed=3, batch=3), outputs, precision)
            except Failed as failure:
                raise Failed(f"'{name}' in {precision}, lowered at a batch of 3: {failure}") from failure
            seen.append(f"'{name}' in {precision}")
    if not seen:
        raise Skipped("No model whose artifact has a fixed batch is legal at a batch of 3.")
    return ", ".join(seen)
