"""The text dump: deterministic, complete, and usable on broken programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from models import captured, tiny_vgg
from onnx_files import if_model

from sartor.ir.capture import capture
from sartor.ir.load import load
from sartor.ir.text import excerpt, to_text


def test_equal_programs_give_equal_text() -> None:
    assert to_text(capture(*tiny_vgg())) == to_text(captured("vgg")) == to_text(captured("vgg").clone())


def test_the_whole_program() -> None:
    lines = to_text(captured("vgg")).splitlines()
    assert lines[0] == "program opset ai.onnx=21 ir 10 batch symbolic"
    assert lines[1] == "input  %x:float[N,3,16,16] at [1,3,16,16]"
    assert "const  %node_view.shape:int64[2] = [0, 192]" in lines
    assert any(line.startswith("const  %features.0.weight:float[8,3,3,3] sha256:") for line in lines)
    assert (
        "%conv2d:float[1,8,16,16] = Conv(%x, %features.0.weight, %features.0.bias) {dilations=[1,1], "
        "group=1, kernel_shape=[3,3], pads=[1,1,1,1], strides=[1,1]} # node_conv2d"
    ) in lines
    assert lines[-1] == "output %linear_1:float[N,10]"


def test_a_changed_weight_changes_the_text() -> None:
    program = captured("vgg").clone()
    value = program.initializers["features.0.bias"]
    array = value.const_value.numpy().copy()
    array[0] = np.nextafter(array[0], 2)
    value.const_value = ir.Tensor(array, name=value.name)
    before, after = to_text(captured("vgg")).splitlines(), to_text(program).splitlines()
    assert [a.split()[1] for a, b in zip(before, after, strict=True) if a != b] == [
        "%features.0.bias:float[8]"
    ]


def test_bodies_are_indented(tmp_path: Path) -> None:
    text = to_text(load(if_model(tmp_path / "m.onnx")))
    assert "  then_branch -> %then_out\n    %then_out = Add(%x, %w) # then" in text


def test_excerpt_marks_the_node_even_in_a_broken_program() -> None:
    program = captured("resnet").clone()
    node = list(program.nodes())[8]
    node.replace_input_with(0, ir.Value(name="nowhere"))
    program.invalidate()
    lines = excerpt(program, node).splitlines()
    assert len(lines) == 11 and lines[5].startswith("> ") and "%nowhere" in lines[5]
