"""Checks of a backend behind limits: lowering in a subprocess, timing and profiling there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sartor.backends import isolation
from sartor.backends.artifact import open_artifact, verify_files
from sartor.backends.measure import measure, profile
from sartor.backends.protocol import Artifact
from sartor.conformance.check import Check, Skipped, describe, require, require_error
from sartor.conformance.draft import Draft
from sartor.conformance.subject import Subject
from sartor.errors import SartorError

if TYPE_CHECKING:
    from sartor.ir.program import Program

_SIMPLE = ("conv", "gemm", "activation-relu")
_TOO_SHORT_S = 0.05
_TOO_SMALL_BYTES = 64 << 20
_SHARES = (0.5, 0.8)  # of the time that lowering takes: the import of the vendor, and the compiler itself
_REPEATABLE = 1.3
_LONGER = 1.2  # at least; on a device that starts kernels slowly, sixteen layers still start sixteen kernels
_HEAVY = ("Conv", "Gemm", "MatMul")


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
    yield Check(
        "measurement.more-work-takes-longer",
        "A network with sixteen times the work takes longer; the interval of the ratio says so.",
        _more_work,
    )
    yield Check(
        "measurement.repeatable",
        f"An artifact measured against itself has a ratio between {1 / _REPEATABLE:.2f} and {_REPEATABLE}.",
        _repeatable,
    )
    yield Check(
        "profile.names-known-nodes",
        "Kernels of a profile name nodes of the program, those with most of the work among them.",
        _profile,
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


def _layers(count: int) -> dict[str, Program]:
    """Networks of `count` equal layers, by the operator that they consist of."""
    of_conv, of_gemm = Draft("f32", 1), Draft("f32", 1)
    x = of_conv.input("x", "N", 16, 20, 20)
    y = of_gemm.input("x", "N", 256)
    for _ in range(count):
        x = of_conv.node("Relu", of_conv.conv(x, 16, 16, pads=[1, 1, 1, 1]))
        y = of_gemm.node("Relu", of_gemm.gemm(y, 256, 256))
    of_conv.output(x, "y")
    of_gemm.output(y, "y")
    return {"Conv": of_conv.program(), "Gemm": of_gemm.program()}


def _timed(subject: Subject, *counts: int) -> tuple[str, list[Artifact]]:
    """Networks of these many layers, of the first operator that is legal, lowered."""
    programs = [_layers(count) for count in counts]
    for op_type in ("Conv", "Gemm"):
        chosen = [p[op_type] for p in programs]
        if all(subject.backend.legality(p, subject.options(p)).ok for p in chosen):
            lowered = [subject.backend.lower(p, subject.folder(), subject.options(p)) for p in chosen]
            subject.require_runs_here()
            return op_type, lowered
    raise Skipped("Neither a chain of convolutions nor one of linear layers is legal.")


def _more_work(subject: Subject) -> str:
    op_type, artifacts = _timed(subject, 1, 4, 16)
    found = measure(subject.name, artifacts, min_rounds=6, max_rounds=12, time_limit_s=10.0, visit_s=0.02)
    ratios = [(r.latency, r.latency_ci95) for r in found.ratios]
    text = f"{op_type} layers 1, 4, 16: {found.baseline.median * 1e3:.3g} ms, " + ", ".join(
        f"{ratio:.2f} times [{low:.2f}, {high:.2f}]" for ratio, (low, high) in ratios
    )
    require(ratios[1][1][0] > _LONGER and ratios[1][0] > ratios[0][0], text)
    return text


def _repeatable(subject: Subject) -> str:
    op_type, artifacts = _timed(subject, 4)
    found = measure(
        subject.name, [artifacts[0]] * 2, min_rounds=8, max_rounds=24, time_limit_s=10.0, visit_s=0.02
    )
    ratio, (low, high) = found.ratio.latency, found.ratio.latency_ci95
    text = f"4 {op_type} layers against themselves: {ratio:.3f} [{low:.3f}, {high:.3f}]"
    require(1 / _REPEATABLE <= ratio <= _REPEATABLE, text)
    return text


def _profile(subject: Subject) -> str:
    model, program = subject.any_program("resnet", "conv", "gemm")
    artifact = subject.artifact(model.name)
    subject.require_runs_here()
    kernels = profile(subject.name, artifact, subject.options(program), runs=5)
    require(bool(kernels), f"the profile of '{model.name}' has no kernel")
    nodes = {node.name: node.op_type for node in program.nodes()}
    named = {name for kernel in kernels for name in kernel.nodes}
    unknown = sorted(named - set(nodes))
    require(not unknown, f"kernels name nodes that '{model.name}' does not have: {unknown[:5]}")
    slow = [k for k in kernels if not (k.median_s >= 0 and k.runs >= 1)]
    require(not slow, f"kernels without a time: {[k.name for k in slow][:5]}")
    heavy = [name for name, op_type in nodes.items() if op_type in _HEAVY]
    if not named:
        raise Skipped(f"The backend maps none of its {len(kernels)} kernels to a node.")
    covered = [name for name in heavy if name in named]
    require(
        2 * len(covered) >= len(heavy),
        f"of {len(heavy)} convolutions and matrix products, kernels name {len(covered)}",
    )
    return (
        f"'{model.name}': {len(kernels)} kernels name {len(named)} of {len(nodes)} nodes, {len(covered)} of the "
        f"{len(heavy)} convolutions and matrix products"
    )
