"""Every quantized value of a target against the reference on *the target's own* values before it.

A quantized program is a chain of roundings: where a number lies on the edge between two integers, the last bit of a
sum decides, and the difference of one step grows on its way through the network. So the program is lowered with
its quantized values as outputs, and the reference computes from each of them what follows, up to the next. There it
may be off by `MOST_STEPS` steps; and what no rounding follows, the float part at the end, is as exact as floats are.
How far that run of the reference is from one of its own is what honest rounding costs this network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.comparison import relative_error
from sartor.errors import BackendError
from sartor.ir.program import Program
from sartor.lowered.decisions import decisions, error_of
from sartor.lowered.probes import Inputs, Reference, lower_like, on_twin, with_taps

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.backends.protocol import Artifact, TargetOptions

MOST_STEPS = 2
"""Of a quantized value, from the reference on the target's own inputs."""
_OF_ANOTHER_SHAPE = 1 << 16  # steps
_ELSEWHERE = "onnxruntime"


@dataclasses.dataclass(frozen=True)
class Steps:
    """What was seen of the quantized values.

    Attributes:
        worst: most steps of any value; None where no artifact with these outputs could be had. Then `noise` is that
            of another runtime, whose kernels round on their own.
        allowed: steps.
        first: place of the first node with more than that.
        noise: by value, what rounding as the target does costs, as a relative error.
        behind: by value, `(error, sample)` of the floats that follow the last quantized value.
        note: what was not looked at, and why.
    """

    worst: int | None
    allowed: int = MOST_STEPS
    first: str | None = None
    noise: Mapping[str, float] = dataclasses.field(default_factory=dict)
    behind: Mapping[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    note: str = ""


def check(
    reference: Reference,
    beside: Collection[str],
    artifact: Artifact,
    options: TargetOptions,
    folder: Path,
) -> Steps | None:
    """Compare on all samples; None where nothing is quantized.

    Args:
        reference: of the program, on its samples.
        beside: values among its taps that are compared like outputs.
        artifact: says target and precision.
        options: of the target.
        folder: for artifacts with further outputs.
    """
    values = _quantized(reference.program)
    if not values:
        return None
    compared = [*(value.name or "" for value in reference.program.graph.outputs), *beside]
    reason = ""
    for every in (1, 2):
        taps = _some(reference.program, values, every, compared)
        try:
            found = _compare(
                reference, taps, every, compared, artifact, options, folder / f"quantized-{every}"
            )
        except BackendError as error:
            reason = reason or str(error)
            continue
        if every == 1:
            return found
        note = f"{len(taps)} of {len(values)} quantized values were compared; with all as outputs: {reason}"
        return dataclasses.replace(found, note=note)
    noise = _noise_elsewhere(reference, compared, artifact, options, folder / "elsewhere")
    note = f"quantized values were not compared; with them as outputs: {reason}"
    if noise:
        note += f"; outputs are held to what rounding costs on '{_ELSEWHERE}'"
    return Steps(None, noise=noise, note=note)


def first_float(
    reference: Reference, index: int, limit: float, artifact: Artifact, options: TargetOptions, folder: Path
) -> tuple[str | None, str]:
    """The first node behind all quantized values that is off on sample `index`, and what to know of it."""
    from sartor.backends import isolation

    program = reference.program
    floats = _behind(program)
    tapped, makers = with_taps(program, {*_quantized(program), *floats})
    try:
        lowered = lower_like(tapped, artifact, folder / "floats", options)
        with isolation.Session(lowered, options) as session:
            found = session.run(reference.samples[index])
    except BackendError as error:
        return None, f"the place is not known: with all values as outputs it cannot be lowered: {error}"
    outputs = {value.name for value in program.graph.outputs}
    own, _ = _on_own_values(program, [n for n in floats if n not in outputs])(reference.samples[index], found)
    for name in makers:
        far = relative_error({name: own[name]}, found) if name in floats else 0.0
        if not far <= limit:
            return makers[name], f"error {far:.3g} there, on the target's own quantized values"
    return (
        None,
        "with every value behind the quantized ones as an output no node differs: an error of a fusion",
    )


def _compare(
    reference: Reference,
    taps: Sequence[str],
    every: int,
    compared: Collection[str],
    artifact: Artifact,
    options: TargetOptions,
    folder: Path,
) -> Steps:
    from sartor.backends import isolation

    program = reference.program
    decided = decisions(program)
    tapped, makers = with_taps(program, {*taps, *compared})
    steps: dict[str, int] = {}
    noise: dict[str, float] = {}
    behind: dict[str, tuple[float, int]] = {}
    run = _on_own_values(program, reference.taps)
    with isolation.Session(lower_like(tapped, artifact, folder, options), options) as session:
        for index, inputs in enumerate(reference.samples):
            found = session.run(inputs)
            missing = [name for name in taps if name not in found]
            if missing:
                raise BackendError(
                    f"the target gives no output '{missing[0]}'; expected every quantized value"
                )
            own, off = run(inputs, found)
            own |= reference.constants
            free = reference.on(index)
            steps = {name: max(count, steps.get(name, 0)) for name, count in off.items()}
            for name in compared:
                error, _ = error_of(decided.get(name), name, own, found)
                if error >= behind.get(name, (0.0, 0))[0]:
                    behind[name] = error, index
                cost, _ = error_of(decided.get(name), name, free, own)
                noise[name] = max(noise.get(name, 0.0), cost)
    allowed = MOST_STEPS * every
    first = next((makers[name] for name in makers if steps.get(name, 0) > allowed), None)
    return Steps(max(steps.values(), default=0), allowed, first, noise, behind)


def _noise_elsewhere(
    reference: Reference, compared: Collection[str], artifact: Artifact, options: TargetOptions, folder: Path
) -> dict[str, float]:
    """How far another integer runtime is from the reference, by value: an independent honest rounding.

    Empty where it does not take the program, or is the one that is to be judged.
    """
    from sartor.backends import isolation

    if artifact.target == _ELSEWHERE:
        return {}
    program = reference.program
    tapped, _ = with_taps(program, set(compared))
    there = dataclasses.replace(options, precision="int8", shapes={})
    noise: dict[str, float] = {}
    try:
        lowered = isolation.lower(_ELSEWHERE, tapped, folder, there)
        with isolation.Session(lowered, there) as session:
            decided = decisions(program)
            for index, inputs in enumerate(reference.samples):
                found = session.run(inputs)
                for name in compared:
                    cost, _ = error_of(decided.get(name), name, reference.on(index), found)
                    noise[name] = max(noise.get(name, 0.0), cost)
    except BackendError:
        return {}
    return {name: cost for name, cost in noise.items() if np.isfinite(cost)}


def _on_own_values(program: Program, taps: Collection[str]) -> Any:
    """A function of inputs and a target's values: the reference's outputs and taps on these, and steps by value."""
    import torch

    from sartor.ir.fx import to_array, to_tensor
    from sartor.ir.fx_run import Runner

    by_node = {node.name: node.outputs[0].name for node in program.graph if node.op_type == "QuantizeLinear"}
    given: dict[str, np.ndarray] = {}
    steps: dict[str, int] = {}

    class OnOwnValues(Runner):
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            name = by_node.get(n.meta.get("onnx_node", ""))
            if name not in given or n.op == "get_attr":
                return result
            found = to_tensor(given[name])
            if found.shape != result.shape:
                steps[name] = _OF_ANOTHER_SHAPE
                return result
            wide = torch.int16 if result.itemsize == found.itemsize == 1 else torch.int64
            gap = (result.to(wide) - found.to(wide)).abs()
            steps[name] = int(gap.max()) if gap.numel() else 0
            return found.to(result.dtype)

    runner = OnOwnValues(program, torch.float64, taps=tuple(taps))

    def run(inputs: Inputs, found: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        given.clear()
        given.update(found)
        steps.clear()
        own = on_twin(runner, inputs)
        return {name: to_array(tensor) for name, tensor in own.items()}, dict(steps)

    return run


# ---- which values ----------------------------------------------------------------------------
def _quantized(program: Program) -> list[str]:
    """Results of QuantizeLinear in the main graph, in execution order."""
    return [node.outputs[0].name or "" for node in program.graph if node.op_type == "QuantizeLinear"]


def _before_a_rounding(program: Program) -> set[ir.Node]:
    """Nodes of the main graph that a QuantizeLinear follows, and those themselves."""
    found: set[ir.Node] = set()
    for node in reversed(list(program.graph)):
        follows = any(user in found for value in node.outputs for user, _ in value.uses())
        if follows or node.op_type == "QuantizeLinear":
            found.add(node)
    return found


def _some(program: Program, values: Sequence[str], every: int, compared: Collection[str]) -> list[str]:
    """One in `every` value, and all from which a compared one follows without another rounding."""
    makers = {value.name: node for node in program.graph for value in node.outputs}
    last: set[str] = set()
    seen: set[ir.Node] = set()
    left = [makers[name] for name in compared if name in makers]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op_type == "QuantizeLinear":
            last.add(node.outputs[0].name or "")
        else:
            left += [makers[v.name] for v in node.inputs if v is not None and v.name in makers]
    return [name for place, name in enumerate(values) if place % every == 0 or name in last]


def _behind(program: Program) -> list[str]:
    """Floats of the main graph that no QuantizeLinear follows, in execution order; weights are left out."""
    before, types = _before_a_rounding(program), program.types()
    nodes = [
        n
        for n in program.graph
        if n not in before and not all(v is None or v.is_initializer() for v in n.inputs)
    ]
    names = [value.name or "" for node in nodes for value in node.outputs]
    return [name for name in names if name in types and types[name].is_floating_point()]
