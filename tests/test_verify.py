"""The verifier: every invariant has a program that breaks it, and a message that says how."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from models import captured

from sartor.errors import VerificationError
from sartor.ir.program import NodeProvenance, Program
from sartor.ir.verify import signature, verify_program


def node(program: Program, op_type: str, number: int = 0) -> ir.Node:
    return [n for n in program.nodes() if n.op_type == op_type][number]


def put(program: Program, name: str, array: np.ndarray) -> None:
    value = program.initializers[name]
    value.const_value = ir.Tensor(array, name=name)
    value.shape = ir.Shape(array.shape)
    value.type = ir.TensorType(value.const_value.dtype)


def cut(program: Program, name: str, axis: int = 0) -> None:
    array = program.initializer_array(name)
    put(program, name, np.delete(array, 0, axis=axis))


def operand(program: Program, op_type: str, index: int = 1) -> str:
    return node(program, op_type).inputs[index].name


def change_operand(
    program: Program, op_type: str, change: Callable[[np.ndarray], np.ndarray], index: int = 1
) -> None:
    name = operand(program, op_type, index)
    put(program, name, change(program.initializer_array(name)))


def swap(program: Program) -> None:
    first, second, *_ = list(program.graph)
    program.graph.remove(first)
    program.graph.insert_after(second, first)


def alias_input(program: Program) -> None:
    program.graph.outputs[0] = program.graph.inputs[0]


def append(program: Program, made: ir.Node, name: str = "extra") -> None:
    made.name = made.name or name
    for output in made.outputs:
        output.name = output.name or f"{name}.out"
    program.graph.append(made)


def duplicate_name(program: Program) -> None:
    list(program.graph)[1].name = next(iter(program.graph)).name


def duplicate_value(program: Program) -> None:
    list(program.graph)[2].outputs[0].name = list(program.graph)[1].outputs[0].name


def dangling(program: Program) -> None:
    node(program, "Relu").replace_input_with(0, ir.Value(name="nowhere"))


def two_types(program: Program) -> None:
    array = program.initializer_array("fc.bias").astype(np.float64)
    put(program, "fc.bias", array)


# family, mutation, message
BROKEN: dict[str, tuple[str, Callable[[Program], object], str]] = {
    "conv channels": (
        "resnet",
        lambda p: cut(p, "layer1.0.conv1.weight", 1),
        r"Conv.*(8 channels.*expects 7 per group|Inference)",
    ),
    "conv output against norm": (
        "resnet",
        lambda p: cut(p, "layer1.0.conv1.weight"),
        r"BatchNormalization.*'layer1.0.bn1.weight' has shape \[8\], but its data .* has 7 channels",
    ),
    "norm parameter": (
        "resnet",
        lambda p: cut(p, "layer1.0.bn1.running_var"),
        r"'layer1.0.bn1.running_var' has shape \[7\].*8 channels",
    ),
    "residual add": (
        "resnet",
        lambda p: [
            cut(p, f"layer1.0.{n}")
            for n in ("conv2.weight", "bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var")
        ],
        r"Add|Inference|Incompatible",
    ),
    "depthwise": (
        "mobilenet",
        lambda p: cut(p, "features.2.conv.2.0.weight"),
        r"15 channels are not divisible into 16 groups",
    ),
    "linear": ("resnet", lambda p: cut(p, "fc.weight", 1), r"Gemm"),
    "linear bias": (
        "resnet",
        lambda p: cut(p, "fc.bias"),
        r"Gemm.*'fc.bias' has shape \[9\]|Inference|Incompatible",
    ),
    "transposed conv": ("unet", lambda p: cut(p, "up.weight"), r"ConvTranspose"),
    "transposed conv bias": (
        "unet",
        lambda p: cut(p, "up.bias"),
        r"ConvTranspose.*'up.bias' has shape \[11\]; expected \[12\]",
    ),
    "concat into conv": (
        "densenet",
        lambda p: cut(p, "layers.0.conv2.weight"),
        r"BatchNormalization.*has 11 channels",
    ),
    "norm scale": ("vit", lambda p: cut(p, "blocks.0.norm1.weight"), r"LayerNormalization"),
    "hidden units": (
        "vit",
        lambda p: [cut(p, "blocks.0.fc1.weight"), cut(p, "blocks.0.fc1.bias")],
        r"MatMul",
    ),
    "stale reshape": (
        "vgg",
        lambda p: change_operand(p, "Reshape", lambda a: np.array([0, 180])),
        r"Reshape.*192|Inference",
    ),
    "stale slice": ("vit", lambda p: change_operand(p, "Slice", lambda a: a + 5), r"Slice"),
    "stale gather": (
        "vit",
        lambda p: change_operand(p, "Gather", lambda a: a + 17),
        r"Gather.*17.*17 positions|Inference",
    ),
    "swapped order": ("resnet", swap, r"is value 'conv2d', which is computed later"),
    "dangling": ("resnet", dangling, r"'nowhere', which is neither an input nor an initializer"),
    "node name twice": ("resnet", duplicate_name, r"Node name 'node_conv2d' is used twice"),
    "value name twice": ("resnet", duplicate_value, r"is both a node output and a node output"),
    "aliased output": ("resnet", alias_input, r"Graph output 'x' is a graph input too"),
    "unknown operator": (
        "resnet",
        lambda p: append(p, ir.node("NonZero", [p.graph.outputs[0]])),
        r"'NonZero'.*outside the canonical",
    ),
    "unknown attribute": (
        "resnet",
        lambda p: node(p, "Relu").attributes.add(ir.AttrInt64("slope", 1)),
        r"attributes \['slope'\], unknown",
    ),
    "missing attribute": (
        "densenet",
        lambda p: node(p, "Concat").attributes.pop("axis"),
        r"lacks the required attributes \['axis'\]",
    ),
    "too many inputs": (
        "resnet",
        lambda p: append(p, ir.node("Relu", [p.graph.outputs[0]] * 2)),
        r"has 2 inputs; expected 1 to 1",
    ),
    "element types": ("resnet", two_types, r"FLOAT on input 0 and DOUBLE on input 2|Inference"),
    "no data": ("resnet", lambda p: setattr(p.initializers["fc.bias"], "const_value", None), r"'fc.bias'"),
    "declared shape": (
        "resnet",
        lambda p: setattr(p.initializers["fc.bias"], "shape", ir.Shape([11])),
        r"Initializer 'fc.bias' declares shape \[11\]|Inference",
    ),
    "opset": ("resnet", lambda p: p.model.opset_imports.update({"": 20}), r"imports opsets \{'': 20\}"),
    "foreign opset": ("resnet", lambda p: p.model.opset_imports.update({"vendor": 1}), r"imports opsets"),
    "ir version": ("resnet", lambda p: setattr(p.model, "ir_version", 9), r"IR version 9; expected 10"),
    "input shape": (
        "resnet",
        lambda p: p.input_shapes.update(x=(1, 3, 16, 17)),
        r"'x' is declared .*'16'\], but has shape \[1, 3, 16, 17\]",
    ),
    "input names": ("resnet", lambda p: p.input_shapes.update(z=(1,)), r"reference shapes name \['x', 'z'\]"),
    "batch symbol": (
        "resnet",
        lambda p: setattr(p.graph.inputs[0], "shape", ir.Shape([1, 3, 16, 16])),
        r"Batch input 'x' starts with '1'",
    ),
    "output type": (
        "resnet",
        lambda p: setattr(p.graph.outputs[0], "type", ir.TensorType(ir.DataType.INT64)),
        r"",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_programs_are_refused(case: str) -> None:
    family, mutate, message = BROKEN[case]
    program = captured(family).clone()
    verify_program(program)
    mutate(program)
    with pytest.raises(VerificationError) as caught:
        verify_program(program)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_program_passes_and_stays_as_it_was() -> None:
    program = captured("vit").clone()
    before = program.to_bytes()
    verify_program(program, signature(captured("vit")))
    assert program.to_bytes() == before


def test_stale_shapes_are_not_trusted() -> None:
    program = captured("resnet").clone()
    program.shapes()
    cut(program, "fc.weight", 1)  # without invalidate()
    with pytest.raises(VerificationError):
        verify_program(program)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: setattr(p.graph.outputs[0], "name", "renamed"), "signature changed"),
        (
            lambda p: [
                cut(p, "fc.weight"),
                cut(p, "fc.bias"),
                setattr(p.graph.outputs[0], "shape", ir.Shape(["N", 9])),
            ],
            "signature changed",
        ),
        (
            lambda p: p.graph.outputs.append(node(p, "Relu").outputs[0]),
            "had 2 inputs and outputs, now 3|without type or shape",
        ),
    ],
)
def test_signature(change: Callable[[Program], object], message: str) -> None:
    program = captured("resnet").clone()
    reference = signature(program)
    change(program)
    with pytest.raises(VerificationError, match=message):
        verify_program(program, reference)


def test_messages_locate_the_node_and_quote_the_dump() -> None:
    program = captured("resnet").clone()
    cut(program, "layer2.0.bn1.bias")
    with pytest.raises(VerificationError) as caught:
        verify_program(program)
    assert "at layer2.0.bn1 (BatchNorm2d) models.py:" in str(caught.value)
    (note,) = caught.value.__notes__
    lines = note.splitlines()
    assert len(lines) == 11 and sum(line.startswith(">") for line in lines) == 1
    assert "%layer2.0.bn1.bias" in next(line for line in lines if line.startswith(">"))


def test_provenance_is_optional() -> None:
    program = captured("resnet").clone()
    program.provenance = {"node_conv2d": NodeProvenance()}
    verify_program(program)
