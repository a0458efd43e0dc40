"""What the conversion needs rewritten: functions of the `sartor` domain, uint8, symbolic sizes, and constant parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sartor.ir.program import Program


def legalize(program: Program) -> Program:
    """Inline the dialect's functions and quantize to int8; the program itself where nothing is to be done."""
    from sartor.backends.signed import to_int8
    from sartor.ir.dialect import inline_dialect

    return to_int8(inline_dialect(program))


def at_shapes(program: Program, shapes: Mapping[str, tuple[int, ...]]) -> Program:
    """A clone whose inputs and outputs have concrete shapes: a flatbuffer's kernels are planned for them.

    What is constant at these shapes is an initializer, in the integers that the program writes it in.

    Raises:
        UsageError: a shape does not fit its input.
    """
    import onnx_ir as ir

    from sartor.backends.artifact import concrete_shapes
    from sartor.backends.protocol import TensorSpec

    specs = [TensorSpec(v.name or "", "", _dims(v)) for v in program.graph.inputs]
    concrete_shapes(specs, shapes)
    fixed = program.clone()
    fixed.input_shapes = {name: tuple(shape) for name, shape in shapes.items()}
    fixed.invalidate()
    for value in fixed.graph.inputs:
        value.shape = ir.Shape(shapes[value.name or ""])
    known = fixed.shapes()
    for value in fixed.graph.outputs:
        value.shape = ir.Shape(known[value.name or ""])
    fixed.invalidate()
    _fold(fixed, known)
    return fixed


def _fold(program: Program, shapes: Mapping[str, tuple[int, ...]]) -> None:
    from sartor.ir.cleanup import remove_dead
    from sartor.ir.folding import evaluate, fold, replace_by_constant

    changed = fold(program.graph, shapes, program.types(), frozenset(), set())
    for node in list(program.graph):
        if node.op_type == "QuantizeLinear" and all(
            v is not None and v.is_initializer() for v in node.inputs
        ):
            array = evaluate(node)
            if array is not None:
                replace_by_constant(program.graph, node, array)
                changed += 1
    if changed:
        remove_dead(program.graph)
        program.invalidate()


def _dims(value: object) -> tuple[int | str, ...]:
    shape = getattr(value, "shape", None) or ()
    return tuple(dim if isinstance(dim, int) else (dim.value or "") for dim in shape)
