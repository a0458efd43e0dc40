"""Whether an artifact computes what its program says, on its own target; and if not, from which node on.

The reference is the FX twin in float64, the error `max|a - b| / max|a|` per output, the tolerance that of the
precision. What a final Softmax or decision hides is compared before it, on an artifact of the same program that ends
there; decisions themselves by how close they were (`decisions`). Where they differ, the program is lowered
once more with every intermediate value as an output, and the first node in execution order whose value differs is
named. A vendor fuses less around an output, so an error of a fusion can disappear there; then no node is named, and
that is said.

In a quantized program rounding alone moves the outputs. Its quantized values are compared one by one, with what
follows them (`quantized_steps`); the artifact's outputs may be `NOISE` times as far from the reference as
rounding was seen to move them (on another runtime, where the target does not give these values), and are never held
to less than the tolerance. Outputs of nodes that are not
understood are compared with ONNX Runtime (`tail_outputs`), by the same rule.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.comparison import relative_error
from sartor.errors import BackendError, UsageError, VerificationError
from sartor.ir.batch import random_inputs
from sartor.ir.program import Program
from sartor.lowered import quantized_steps
from sartor.lowered.decisions import before_decisions, decisions, error_of
from sartor.lowered.probes import Inputs, Reference, computed, lower_like, with_entering_values, with_taps
from sartor.lowered.tail_outputs import TailReference, distance
from sartor.oracle import before_softmax, lowered_tolerance

if TYPE_CHECKING:
    from sartor.backends.protocol import Artifact, TargetOptions
    from sartor.data import Data

SAMPLES = 4
"""Samples that are compared unless told otherwise."""
NOISE = 4.0
"""Times the error that rounding alone shows, up to which the artifact of a quantized program may differ."""
_MOST_NOISE = 0.5  # beyond it, an error would not be seen


@dataclasses.dataclass(frozen=True)
class Lowered:
    """Outcome of comparing an artifact with its program.

    Attributes:
        target: backend.
        precision: that the artifact was lowered for.
        max_rel_error: the error that is largest in units of its tolerance, over outputs and samples; None where it
            is not finite.
        tolerance: that it was held against.
        passed: all errors are within their tolerances, and everything that could be compared was.
        samples: number of samples compared.
        inputs: `calibration` (real data) or `random`.
        worst: the output with that error.
        compared: names of the values compared.
        first_divergent_node: first node whose value differs, as `Program.where` names it; None when all agree.
        note: what a reader should know of that node, and what was not looked at.
        quantized_steps: for a quantized program, the largest difference of a quantized value from the reference on
            the target's own values, in steps of its scale; None where it could not be taken.
        decided: by output that is an index, a comparison or a rounded number, the share of its elements that differ.
        not_compared: by output, why of the artifact's own numbers only shape and finiteness were checked.
    """

    target: str
    precision: str
    max_rel_error: float | None
    tolerance: float
    passed: bool
    samples: int
    inputs: str
    worst: str
    compared: tuple[str, ...]
    first_divergent_node: str | None = None
    note: str = ""
    quantized_steps: int | None = None
    decided: Mapping[str, float] = dataclasses.field(default_factory=dict)
    not_compared: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, schema `sartor.lowered/1`."""
        return {"schema": "sartor.lowered/1", **dataclasses.asdict(self), "compared": list(self.compared)}

    def summary(self) -> str:
        """One sentence."""
        error = "not finite" if self.max_rel_error is None else f"{self.max_rel_error:.3g}"
        text = (
            f"relative error {error} at '{self.worst}' against float64, tolerance {self.tolerance:g} for "
            f"{self.precision}, {self.samples} {self.inputs} sample{'s' if self.samples != 1 else ''}"
        )
        if self.quantized_steps is not None:
            text += f"; quantized values within {self.quantized_steps} steps"
        for name, share in self.decided.items():
            if share:
                text += f"; {100 * share:.3g} % of '{name}' decided otherwise"
        if self.first_divergent_node:
            text += f"; first node that differs: {self.first_divergent_node}"
        for name, reason in self.not_compared.items():
            text += f"; NOT compared: '{name}', {reason}"
        return text + (f" ({self.note})" if self.note else "")


def verify(
    program: Program,
    artifact: Artifact,
    options: TargetOptions,
    *,
    data: Data | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    tolerance: float | None = None,
) -> Lowered:
    """Compare `artifact`, as its target runs it, with `program` in float64.

    Args:
        program: what `artifact` was lowered from.
        artifact: lowered by the backend that it names; it runs in a subprocess.
        options: threads, precision, shapes.
        data: its split `calibration` gives the samples; random ones without it.
        samples: how many.
        seed: of random samples.
        tolerance: in place of that of the precision.

    Raises:
        UsageError: the data have no sample of the right shape.
        BackendError: lowering a probe, loading or running failed.
    """
    limit = lowered_tolerance(program, artifact.precision) if tolerance is None else tolerance
    given = list(_samples(program, data, samples, seed))
    with tempfile.TemporaryDirectory(prefix="sartor-verify-") as folder:
        comparison = _Comparison(program, artifact, options, given, limit, Path(folder))
        comparison.run()
        worst, steps = comparison.worst(), comparison.steps
        passed = worst.error <= worst.limit and (steps is None or (steps.worst or 0) <= steps.allowed)
        node, note = (None, "") if passed else comparison.first_divergent(worst)
    return Lowered(
        target=artifact.target,
        precision=artifact.precision,
        max_rel_error=worst.error if np.isfinite(worst.error) else None,
        tolerance=worst.limit,
        passed=passed,
        samples=len(given),
        inputs="random" if data is None else "calibration",
        worst=worst.name,
        compared=tuple(dict.fromkeys(seen.name for seen in comparison.seen)),
        first_divergent_node=node,
        note="; ".join(filter(None, [note, "" if steps is None else steps.note])),
        quantized_steps=None if steps is None else steps.worst,
        decided=comparison.decided,
        not_compared=comparison.not_compared,
    )


def require(result: Lowered) -> None:
    """Stop unless the artifact agrees with its program.

    Raises:
        VerificationError: it does not.
    """
    if not result.passed:
        raise VerificationError(
            f"The artifact for '{result.target}' differs from its program: {result.summary()}."
        )


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The error of one value on one sample, and what it may be."""

    name: str
    error: float
    limit: float
    sample: int

    def share(self) -> float:
        """Of the limit."""
        return self.error / self.limit if self.limit > 0 else math.inf if self.error > 0 else 0.0


class _Comparison:
    """One artifact and its program on the same samples; what `run` finds is in the attributes."""

    def __init__(
        self,
        program: Program,
        artifact: Artifact,
        options: TargetOptions,
        samples: Sequence[Inputs],
        limit: float,
        folder: Path,
    ):
        self.program, self.artifact, self.options = program, artifact, options
        self.samples, self.limit, self.folder = samples, limit, folder
        self.core = program.understood()
        self.probe = before_decisions(before_softmax(self.core))
        own = [value.name or "" for value in self.core.graph.outputs]
        self.hidden = [
            value.name or ""
            for value in self.probe.graph.outputs
            if value.name in computed(self.core) and value.name not in own
        ]
        reads = (name for decision in decisions(self.core).values() for name in decision.reads())
        self.reference = Reference(self.core, samples, [*self.hidden, *reads])
        self.steps: quantized_steps.Steps | None = None
        self.seen: list[_Seen] = []
        self.decided: dict[str, float] = {}
        self.not_compared: dict[str, str] = {}
        self._errors: list[tuple[str, float, int]] = []

    def run(self) -> None:
        """Compare everything that can be."""
        if self.program.tail is None:
            self._compare(self.core, self.reference, self.artifact)
        else:
            self._compare_with_tail()
        if self.probe is not self.core:
            known = {v.name for v in self.probe.graph.outputs} <= self.reference.names()
            reference = self.reference if known else Reference(self.probe, self.samples)
            lowered = lower_like(self.probe, self.artifact, self.folder / "probe", self.options)
            self._compare(self.probe, reference, lowered)
        self.steps = quantized_steps.check(
            self.reference, self.hidden, self.artifact, self.options, self.folder
        )
        noise: Mapping[str, float] = {} if self.steps is None else self.steps.noise
        self.seen += [_Seen(n, error, self._limit(noise.get(n, 0.0)), i) for n, error, i in self._errors]
        if self.steps is not None:
            exact = lowered_tolerance(self.core)
            self.seen += [_Seen(n, error, exact, i) for n, (error, i) in self.steps.behind.items()]

    def worst(self) -> _Seen:
        """The error that is largest in units of its limit."""
        return max(self.seen, key=_Seen.share, default=_Seen("", math.inf, self.limit, 0))

    def _limit(self, noise: float) -> float:
        return max(self.limit, min(NOISE * noise, _MOST_NOISE))

    def _compare(self, program: Program, reference: Reference, artifact: Artifact) -> None:
        from sartor.backends import isolation

        with isolation.Session(artifact, self.options) as session:
            for index, inputs in enumerate(self.samples):
                found = session.run(inputs)
                self._add(program, reference, found, index)

    def _add(self, program: Program, reference: Reference, found: Inputs, index: int) -> None:
        """The outputs of `program` among what a target found."""
        decided = decisions(program)
        for name in (value.name or "" for value in program.graph.outputs):
            error, share = error_of(decided.get(name), name, reference.on(index), found)
            self._errors.append((name, error, index))
            if share is not None:
                self.decided[name] = max(share, self.decided.get(name, 0.0))

    # ---- what is not understood ----------------------------------------------------------------
    def _compare_with_tail(self) -> None:
        from sartor.backends import isolation

        assert self.program.tail is not None
        inside = self.program.tail.added
        tail = TailReference(self.program)
        open_program = with_entering_values(self.program)
        opened = lower_like(open_program, self.artifact, self.folder / "entering", self.options)
        with (
            isolation.Session(self.artifact, self.options) as shipped,
            isolation.Session(opened, self.options) as probe,
        ):
            for index, inputs in enumerate(self.samples):
                found, entering = shipped.run(inputs), probe.run(inputs)
                self._add(self.core, self.reference, entering, index)
                inner = {name: array for name, array in entering.items() if name in inside}
                self._add(self.core, self.reference, {**inner, **found}, index)
                self._compare_tail(tail, {**inputs, **entering}, found, index)

    def _compare_tail(self, tail: TailReference, entering: Inputs, found: Inputs, index: int) -> None:
        """Outputs of the tail: on the target's own values, and those of the artifact."""
        own = tail.run(entering)
        free = tail.run({**entering, **self.reference.on(index)})
        for name in tail.outputs:
            if name not in found or not _fits(self.artifact, name, found[name]):
                self.seen.append(_Seen(name, math.inf, self.limit, index))
            elif own is None or free is None:
                self.not_compared[name] = tail.problem
            else:
                error = distance(own[name], entering.get(name))
                exact = own[name].dtype.kind != "f"
                self.seen.append(_Seen(name, error, 0.0 if exact else self.limit, index))
                noise = distance(free[name], own[name])
                if NOISE * noise <= _MOST_NOISE:
                    self.seen.append(
                        _Seen(name, distance(free[name], found[name]), self._limit(noise), index)
                    )
                else:
                    self.not_compared[name] = (
                        "which rounding in this precision moves more than an error would"
                    )

    # ---- where ---------------------------------------------------------------------------------
    def first_divergent(self, worst: _Seen) -> tuple[str | None, str]:
        """The first node whose value differs, and what to know about it."""
        steps = self.steps
        if steps is None or steps.worst is None:
            return self._first_value(worst)
        if steps.first is not None:
            return steps.first, ""
        exact = lowered_tolerance(self.core)
        off = [i for error, i in steps.behind.values() if not error <= exact]
        if off:
            return quantized_steps.first_float(
                self.reference, off[0], exact, self.artifact, self.options, self.folder
            )
        return None, "each quantized value is right by itself: it is an error of a fusion"

    def _first_value(self, worst: _Seen) -> tuple[str | None, str]:
        tapped, makers = with_taps(self.core)
        inputs = self.samples[worst.sample]
        try:
            from sartor.backends import isolation

            lowered = lower_like(tapped, self.artifact, self.folder / "tapped", self.options)
            with isolation.Session(lowered, self.options) as session:
                found = session.run(inputs)
        except BackendError as error:
            return None, f"the place is not known: with all values as outputs it cannot be lowered: {error}"
        expected = Reference(tapped, [inputs]).on(0)
        for name, node in makers.items():
            far = relative_error({name: expected[name]}, found)
            if not far <= self.limit:
                return node, f"error {far:.3g} there, with every value as an output"
        return None, "with every value as an output no node differs: it is an error of a fusion"


def _fits(artifact: Artifact, name: str, found: np.ndarray) -> bool:
    """Whether an output has the declared shape, and numbers alone."""
    spec = next((spec for spec in artifact.outputs if spec.name == name), None)
    if spec is None:
        return False
    shape = [d if isinstance(d, int) else size for d, size in zip(spec.shape, found.shape, strict=False)]
    finite = found.dtype.kind != "f" or bool(np.isfinite(found).all())
    return len(spec.shape) == found.ndim and shape == list(found.shape) and finite


def _samples(program: Program, data: Data | None, count: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of the reference shapes, one batch of them each."""
    if data is None:
        for index in range(count):
            yield random_inputs(program, seed=seed + index)
        return
    found = 0
    for inputs, _ in data.calibration:
        for chunk in _chunks(program, inputs):
            yield chunk
            found += 1
            if found == count:
                return
    if not found:
        raise UsageError(
            f"The split 'calibration' has no batch of the reference shapes {_shapes(program)}; give at least so many "
            "samples at once, or capture the model with a smaller batch."
        )


def _chunks(program: Program, inputs: Inputs) -> Iterable[dict[str, np.ndarray]]:
    carriers = program.batch.inputs if program.batch.symbolic else ()
    if not carriers:
        return [dict(inputs)]
    size = program.input_shapes[carriers[0]][0]
    whole = len(inputs[carriers[0]]) // size
    return [
        {k: v[i * size : (i + 1) * size] if k in carriers else v for k, v in inputs.items()}
        for i in range(whole)
    ]


def _shapes(program: Program) -> str:
    return ", ".join(f"'{name}' {list(shape)}" for name, shape in program.input_shapes.items())
