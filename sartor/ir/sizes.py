"""Lengths of all axes as functions of the input's size and the batch.

A finite set of input sizes is declared; shapes are inferred at each of them, for any operator, without a rule of its
own. Within one size every axis is `fixed + per_sample · batch`, which is checked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sartor.errors import ModelError, PlanError
from sartor.ir.bodies import body_graphs
from sartor.ir.extents import Extent, Sized
from sartor.ir.program import Program
from sartor.ir.subgraphs import body_shapes

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The declared input sizes of a workload, and whether its batch is free.

    Attributes:
        shapes: shape of every input per size, at its own batch.
        batches: batch of each of them; 1 where inputs have no batch axis.
        fixed_batch: why the batch is fixed; empty where it is free.
    """

    shapes: tuple[Shapes, ...]
    batches: tuple[int, ...]
    fixed_batch: str = ""


def sweep(program: Program, sizes: Sequence[Shapes]) -> Sweep:
    """The declared sizes with what they leave out filled in.

    Args:
        sizes: shape per input; inputs that are not named keep their reference shape.

    Raises:
        PlanError: there are none, an input is unknown, or a shape has another rank or batch than the program takes.
    """
    if not sizes:
        raise PlanError("No input size is given; declare at least one, such as {'x': (1, 3, 224, 224)}.")
    complete = []
    for size in sizes:
        unknown = sorted(set(size) - set(program.input_shapes))
        if unknown:
            raise PlanError(
                f"Input size {_text(size)} names {unknown}, which are no inputs of '{program.source.name}'; "
                f"it has {sorted(program.input_shapes)}."
            )
        for name, dims in size.items():
            if len(dims) != len(program.input_shapes[name]) or any(int(d) < 1 for d in dims):
                raise PlanError(
                    f"Input '{name}' cannot have size {list(dims)}; its reference shape is "
                    f"{list(program.input_shapes[name])}. Give as many positive lengths."
                )
        complete.append({k: tuple(map(int, size.get(k, v))) for k, v in program.input_shapes.items()})
    fixed = "" if program.batch.symbolic else program.batch.reason or "the program was made for one batch"
    batched = program.batch.inputs if program.batch.symbolic else ()
    batches = []
    for shapes in complete:
        found = {shapes[name][0] for name in batched}
        if len(found) > 1:
            raise PlanError(f"Input size {_text(shapes)} has several batches, {sorted(found)}; give one.")
        batches.append(found.pop() if found else 1)
    return Sweep(tuple(complete), tuple(batches), fixed)


def sized_extents(
    program: Program, extents: Mapping[str, tuple[Extent, ...]] | None, declared: Sweep
) -> dict[str, tuple[Extent, ...]]:
    """Extents of every value, with those that depend on size or batch as `Sized`.

    Raises:
        ModelError: the program is not valid at a size, with the reason; or an axis does not grow linearly with the
            batch.
    """
    reference = _all_shapes(program, program.input_shapes)
    per_size = [_linear(program, declared, index) for index in range(len(declared.shapes))]
    result = dict(extents or {})
    for name, shape in reference.items():
        dims = result.get(name) or tuple(Extent.constant(d) for d in shape)
        lengths = [tuple(size[name][axis] for size in per_size) for axis in range(len(shape))]
        result[name] = tuple(_sized(e, found) for e, found in zip(dims, lengths, strict=True))
    return result


def _sized(extent: Extent, lengths: tuple[tuple[float, float], ...]) -> Extent:
    if all(pair == (extent.full, 0.0) for pair in lengths) or not extent.full:
        return extent
    return Sized(extent.terms, lengths)


def _linear(program: Program, declared: Sweep, index: int) -> dict[str, list[tuple[float, float]]]:
    """`(fixed, per_sample)` of every axis of every value at one size."""
    size, batch = declared.shapes[index], declared.batches[index]
    here = _all_shapes(program, size)
    if declared.fixed_batch:
        return {name: [(float(d), 0.0) for d in shape] for name, shape in here.items()}
    others = [(n, _all_shapes(program, _at_batch(program, size, n))) for n in (batch + 1, batch + 3)]
    result: dict[str, list[tuple[float, float]]] = {}
    for name, shape in here.items():
        result[name] = []
        for axis, length in enumerate(shape):
            step = others[0][1][name][axis] - length
            if any(found[name][axis] != length + step * (n - batch) for n, found in others):
                raise ModelError(
                    f"Axis {axis} of value '{name}' does not grow linearly with the batch: it has "
                    f"{[length, *(found[name][axis] for _, found in others)]} positions at batches "
                    f"{[batch, *(n for n, _ in others)]}. Describe the cost at one batch, without sizes."
                )
            result[name].append((float(length - step * batch), float(step)))
    return result


def _at_batch(program: Program, size: Shapes, batch: int) -> dict[str, tuple[int, ...]]:
    return {k: (batch, *v[1:]) if k in program.batch.inputs else tuple(v) for k, v in size.items()}


def _all_shapes(program: Program, inputs: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of the main graph's values and of those in bodies, at given input shapes."""
    copy = program
    if {k: tuple(v) for k, v in inputs.items()} != dict(program.input_shapes):
        copy = program.clone()
        copy.input_shapes = {k: tuple(v) for k, v in inputs.items()}
        copy.invalidate()
    try:
        shapes = dict(copy.shapes())
        _check(copy, shapes)
        if any(body_graphs(node) for node in copy.nodes()):
            shapes = {name: shape for name, (shape, _) in body_shapes(copy).items()} | shapes
    except ModelError as error:
        raise ModelError(
            f"'{program.source.name}' is not valid at input size {_text(inputs)}: {str(error).rstrip('.')}. "
            "Leave this size out, or capture the model so that it takes it."
        ) from error
    return shapes


def _check(program: Program, shapes: Shapes) -> None:
    """What shape inference lets pass: a Reshape to another number of elements."""
    for node in program.nodes():
        if node.op_type == "Reshape":
            source, target = (
                shapes[v.name or ""] for v in (node.inputs[0], node.outputs[0]) if v is not None
            )
            if math.prod(source) != math.prod(target):
                raise ModelError(
                    f"{program.where(node)} makes {list(target)} of {list(source)}: the numbers of elements differ."
                )


def _text(size: Shapes) -> str:
    return ", ".join(f"'{name}' {list(dims)}" for name, dims in size.items())
