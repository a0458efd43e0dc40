"""Whether an artifact computes what its program says, on its own target; and if not, from which node on.

The reference is the FX twin in float64, the error `max|a - b| / max|a|` per output, the tolerance that of the
precision. What a final Softmax hides is compared at its input, on an artifact of the same program that ends there.
Where they differ, the program is lowered once more with every intermediate value as an output, and the first node
in execution order whose value differs is named. A vendor fuses less around an output, so an error of a fusion can
disappear there; then no node is named, and that is said.

A quantized program is a chain of roundings: where a number lies on the edge between two integers, the last bit of
a sum decides, and the difference of one step grows on its way through the network. So there the program is lowered
with every quantized value as an output, and each of them must be within `MOST_STEPS` steps of what the reference
makes of *the target's own* values before it. How far the outputs of that run are from the reference is what honest
rounding costs this network; the artifact may be `NOISE` times as far away, and is never held to less than the
tolerance.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from sartor.comparison import relative_error
from sartor.errors import BackendError, UsageError, VerificationError
from sartor.ir.batch import as_fixed, random_inputs
from sartor.ir.program import Program
from sartor.oracle import before_softmax, lowered_tolerance

if TYPE_CHECKING:
    from sartor.backends.protocol import Artifact, TargetOptions
    from sartor.data import Data

Inputs = Mapping[str, np.ndarray]
SAMPLES = 4
"""Samples that are compared unless told otherwise."""
MOST_STEPS = 2
"""Of a quantized value, from the reference on the target's own inputs."""
NOISE = 4.0
"""Times the error that rounding alone shows, up to which the artifact of a quantized program may differ."""
_MOST_NOISE = 0.5  # beyond it, an error would not be seen
_MOST_TAPS = 2000


@dataclasses.dataclass(frozen=True)
class Lowered:
    """Outcome of comparing an artifact with its program.

    Attributes:
        target: backend.
        precision: that the artifact was lowered for.
        max_rel_error: largest error over outputs and samples; None where it is not finite.
        tolerance: that it was held against.
        passed: it is within the tolerance.
        samples: number of samples compared.
        inputs: `calibration` (real data) or `random`.
        worst: the output with the largest error.
        compared: names of the values compared.
        first_divergent_node: first node whose value differs, as `Program.where` names it; None when all agree.
        note: what a reader should know of that node.
        quantized_steps: for a quantized program, the largest difference of a quantized value from the reference on
            the target's own values, in steps of its scale; None where it could not be taken.
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
        if self.first_divergent_node:
            text += f"; first node that differs: {self.first_divergent_node}"
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

    The outputs of what is not understood cannot be compared; what enters it is compared on an artifact of the rest.

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
    probe = before_softmax(program.understood())
    differences = _Differences(given)
    with tempfile.TemporaryDirectory(prefix="sartor-verify-") as folder:
        if program.tail is None:
            differences.compare(program, artifact, options)
        if probe is not program:
            differences.compare(probe, _lower(probe, artifact, Path(folder) / "probe", options), options)
        steps = _quantized_steps(program, artifact, options, given[0], Path(folder))
        worst = max(differences.errors, key=lambda name: differences.errors[name])
        error = differences.errors[worst]
        if steps is not None:
            limit = max(limit, min(NOISE * steps.noise, _MOST_NOISE))
        found = Lowered(
            target=artifact.target,
            precision=artifact.precision,
            max_rel_error=error if np.isfinite(error) else None,
            tolerance=limit,
            passed=error <= limit and (steps is None or steps.worst <= MOST_STEPS),
            samples=len(given),
            inputs="random" if data is None else "calibration",
            worst=worst,
            compared=tuple(differences.errors),
            quantized_steps=None if steps is None else steps.worst,
        )
        if found.passed:
            return found
        if steps is not None:
            node = steps.first
            note = "" if node else "each quantized value is right by itself: it is an error of a fusion"
        else:
            node, note = _first_divergent(program, artifact, options, given, limit, Path(folder))
    return dataclasses.replace(found, first_divergent_node=node, note=note)


def require(result: Lowered) -> None:
    """Stop unless the artifact agrees with its program.

    Raises:
        VerificationError: it does not.
    """
    if not result.passed:
        raise VerificationError(
            f"The artifact for '{result.target}' differs from its program: {result.summary()}."
        )


class _Differences:
    """Largest error per output over all samples."""

    def __init__(self, samples: list[dict[str, np.ndarray]]):
        self.samples = samples
        self.errors: dict[str, float] = {}

    def compare(self, program: Program, artifact: Artifact, options: TargetOptions) -> None:
        from sartor.backends import isolation
        from sartor.ir.fx import run_twin

        with isolation.Session(artifact, options) as session:
            for inputs in self.samples:
                expected = run_twin(program, inputs)
                found = session.run(inputs)
                for name, array in expected.items():
                    error = relative_error({name: array}, found)
                    self.errors[name] = max(self.errors.get(name, 0.0), error)


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


def _lower(program: Program, like: Artifact, folder: Path, options: TargetOptions) -> Artifact:
    from sartor.backends import isolation

    return isolation.lower(
        like.target, program, folder, dataclasses.replace(options, precision=like.precision)
    )


def _first_divergent(
    program: Program,
    artifact: Artifact,
    options: TargetOptions,
    samples: list[dict[str, np.ndarray]],
    limit: float,
    folder: Path,
) -> tuple[str | None, str]:
    """The first node whose value differs, and what to know about it."""
    tapped, makers = with_taps(program.understood())
    try:
        lowered = _lower(tapped, artifact, folder / "tapped", options)
        differences = _Differences(samples[:1])
        differences.compare(tapped, lowered, options)
    except BackendError as error:
        return None, f"the place is not known: with all values as outputs it cannot be lowered: {error}"
    for value, node in makers.items():
        if not differences.errors[value] <= limit:
            return node, f"error {differences.errors[value]:.3g} there, with every value as an output"
    return (
        None,
        "with every value as an output no node differs: it is an error of a fusion, or of other samples",
    )


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Quantized values of a target, each against the reference on the target's own values before it."""

    worst: int
    first: str | None  # the first node with more than MOST_STEPS
    noise: float  # error of the outputs of that run


def _quantized_steps(
    program: Program, artifact: Artifact, options: TargetOptions, inputs: Inputs, folder: Path
) -> _Steps | None:
    """None for a program that is not quantized, or that the target does not take with these outputs."""
    from sartor.backends import isolation
    from sartor.ir.fx import run_twin, to_tensor
    from sartor.ir.fx_run import Runner

    program = program.understood()
    tapped, makers = with_taps(program, quantized=True)
    if not makers:
        return None
    try:
        lowered = _lower(tapped, artifact, folder / "quantized", options)
        with isolation.Session(lowered, options) as session:
            found = session.run(inputs)
    except BackendError:
        return None
    by_node = {node.name: value.name or "" for node in program.graph for value in node.outputs[:1]}
    steps: dict[str, int] = {}

    class OnTheTargetsOwnValues(Runner):
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            value = by_node.get(n.meta.get("onnx_node", ""), "")
            if value not in makers or n.op == "get_attr":
                return result
            given = to_tensor(found[value])
            gap = (result.to(int_type) - given.to(int_type)).abs()
            steps[value] = max(steps.get(value, 0), int(gap.max()) if gap.numel() else 0)
            return given.to(result.dtype)

    import torch

    int_type = torch.int64
    runner = OnTheTargetsOwnValues(program, torch.float64)
    with torch.no_grad():
        runner([to_tensor(inputs[name], runner.info.dtype) for name in runner.info.inputs])
    wrong = (makers[value] for value in makers if steps.get(value, 0) > MOST_STEPS)
    noise = relative_error(run_twin(program, inputs), found)
    return _Steps(max(steps.values(), default=0), next(wrong, None), noise)


def with_taps(program: Program, *, quantized: bool = False) -> tuple[Program, dict[str, str]]:
    """The program with every floating-point value, or every quantized one, as an output.

    Returns:
        That program, and by value, in execution order, the place of the node that makes it.
    """
    shapes, types = program.shapes(), program.types()
    clone = as_fixed(program.clone(), "every value is an output, each with a shape of its own")
    present = {value.name for value in clone.graph.outputs}
    makers: dict[str, str] = {}
    for node in clone.graph:
        for value in node.outputs:
            name = value.name or ""
            if quantized:
                wanted = node.op_type == "QuantizeLinear" and name in shapes
            else:
                wanted = name in shapes and types[name].is_floating_point()
            if wanted and len(makers) < _MOST_TAPS:
                makers[name] = program.where(node)
                if name not in present:
                    value.shape, value.type = ir.Shape(shapes[name]), ir.TensorType(types[name])
                    clone.graph.outputs.append(value)
    clone.invalidate()
    return clone, makers
