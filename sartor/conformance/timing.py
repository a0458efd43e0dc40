"""Checks of times: of whole models, by ratio and twice; and of their kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sartor.backends.measure import measure, profile
from sartor.backends.protocol import Artifact
from sartor.conformance.chains import chains
from sartor.conformance.check import Check, Failed, Skipped, require
from sartor.conformance.subject import Subject

_REPEATABLE = 1.3
_AGAIN = 2.5  # between two processes; another program on the machine doubles a median
_LONGER = 1.2  # at least; on a device that starts kernels slowly, sixteen layers still start sixteen kernels
_KERNELS = (0.2, 5.0)  # of the latency: profiling slows down, and between kernels there is work as well
_HEAVY = ("Conv", "Gemm", "MatMul")


def checks() -> Iterator[Check]:
    """Those of this module."""
    yield Check(
        "measurement.more-work-takes-longer",
        "A network with sixteen times the work takes longer; the interval of the ratio says so.",
        _more_work,
    )
    yield Check(
        "measurement.repeatable",
        f"The interval of an artifact's ratio to itself lies between {1 / _REPEATABLE:.2f} and {_REPEATABLE}, and its "
        f"medians in two processes within a factor of {_AGAIN}, at the second attempt at the latest.",
        lambda subject: _twice_at_most(_repeatable, subject),
    )
    yield Check(
        "profile.names-known-nodes",
        "Kernels of a profile name nodes of the program, those with most of the work among them.",
        _profile,
    )
    yield Check(
        "profile.adds-up",
        f"Times of all kernels add up to between {_KERNELS[0]} and {_KERNELS[1]} times the latency, at the second "
        "attempt at the latest.",
        lambda subject: _twice_at_most(_adds_up, subject),
    )


def _twice_at_most(observe: Callable[[Subject], str], subject: Subject) -> str:
    """What is observed; where that fails, what is observed then: others use the machine, too."""
    try:
        return observe(subject)
    except Failed:
        return observe(subject)


def _timed(subject: Subject, *counts: int) -> tuple[str, list[Artifact]]:
    """Networks of these many layers, of the first operator that is legal, lowered."""
    programs = [chains(count) for count in counts]
    for op_type in programs[0]:
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
    require(low >= 1 / _REPEATABLE and high <= _REPEATABLE, text)
    first, second = found.baseline.median, _latency_s(subject, artifacts[0])
    text += f"; in two processes {first * 1e3:.3g} and {second * 1e3:.3g} ms"
    require(1 / _AGAIN <= first / second <= _AGAIN, text)
    return text


def _latency_s(subject: Subject, artifact: Artifact) -> float:
    found = measure(subject.name, [artifact], min_rounds=6, max_rounds=8, time_limit_s=5.0, visit_s=0.02)
    return found.baseline.median


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


def _adds_up(subject: Subject) -> str:
    op_type, (artifact,) = _timed(subject, 4)
    kernels = profile(subject.name, artifact, runs=20)
    together, latency = sum(kernel.median_s for kernel in kernels), _latency_s(subject, artifact)
    text = (
        f"4 {op_type} layers: {len(kernels)} kernels take {together * 1e3:.3g} ms together, a run takes "
        f"{latency * 1e3:.3g} ms"
    )
    require(_KERNELS[0] <= together / latency <= _KERNELS[1], text)
    return text
