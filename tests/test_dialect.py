"""ChannelGate: a function of domain `sartor` that survives every step until it is inlined on purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import captured
from onnx_files import random, run

from sartor.errors import UsageError, VerificationError
from sartor.ir.batch import check_batch, relative_error
from sartor.ir.canonicalize import canonicalize
from sartor.ir.dialect import inline_dialect, insert_channel_gate, is_channel_gate
from sartor.ir.load import load
from sartor.ir.program import DIALECT_DOMAIN, Program
from sartor.ir.text import to_text
from sartor.ir.verify import verify_program

X = random(3, 3, 16, 16)


def gated(value: str = "relu_1", family: str = "resnet") -> tuple[Program, str]:
    program = captured(family).clone()
    return program, insert_channel_gate(program, value)


def close(program: Program, gate: str, array: np.ndarray) -> None:
    program.initializers[gate].const_value = ir.Tensor(array.astype(np.float32), name=gate)


def test_gates_of_ones_change_nothing() -> None:
    program, gate = gated()
    verify_program(program)
    assert gate == "relu_1.gate" and program.initializer_array(gate).shape == (8,)
    np.testing.assert_array_equal(
        run(program.to_bytes(), {"x": X})[0], run(captured("resnet").to_bytes(), {"x": X})[0]
    )
    assert check_batch(program) == ""


def test_a_closed_gate_is_a_zeroed_channel() -> None:
    program, gate = gated("relu_1")
    close(program, gate, np.arange(8) != 3)
    masked = captured("resnet").clone()
    for name, axis in (("layer1.0.conv2.weight", 1),):  # the only reader of relu_1
        array = masked.initializer_array(name).copy()
        np.moveaxis(array, axis, 0)[3] = 0
        masked.initializers[name].const_value = ir.Tensor(array, name=name)
    found, expected = (run(p.to_bytes(), {"x": X})[0] for p in (program, masked))
    assert relative_error(expected, found) < 1e-6
    original = run(captured("resnet").to_bytes(), {"x": X})[0]
    assert relative_error(original, found) > 1e-3


def test_the_call_survives_save_and_load(tmp_path: Path) -> None:
    program, gate = gated()
    close(program, gate, np.linspace(0, 1, 8))
    again = load(program.save(tmp_path / "m.onnx"))
    assert again.to_bytes() == program.to_bytes()
    assert to_text(again).splitlines()[-8:] == to_text(program).splitlines()[-8:]
    assert sum(is_channel_gate(n) for n in again.nodes()) == 1
    assert again.batch.symbolic
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)


def test_canonicalize_leaves_the_call_alone() -> None:
    program, _ = gated()
    canonicalize(program.model, program.input_shapes, parameters=set(program.initializers))
    assert sum(is_channel_gate(n) for n in program.nodes()) == 1
    assert [f.domain for f in program.model.functions.values()] == [DIALECT_DOMAIN]


@pytest.mark.parametrize(("family", "value"), [("resnet", "relu_1"), ("vit", "gelu"), ("vgg", "relu_2")])
def test_inlining_gives_plain_onnx(family: str, value: str) -> None:
    """Ranks 4, 3 and 2 share one function; axis 1 is gated."""
    program, gate = gated(value, family)
    size = program.initializer_array(gate).shape[0]
    close(program, gate, np.random.default_rng(0).uniform(size=size))
    plain = inline_dialect(program)
    verify_program(plain)
    assert dict(plain.model.opset_imports) == {"": 21} and not plain.model.functions
    assert not [n for n in plain.nodes() if n.domain]
    assert gate in plain.initializers
    a, b = (run(p.to_bytes(), {"x": X})[0] for p in (program, plain))
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert is_channel_gate(next(n for n in program.nodes() if n.domain))  # the argument is not modified
    assert inline_dialect(captured(family)).to_bytes() == captured(family).to_bytes()


def test_several_gates_share_one_function() -> None:
    program, _ = gated("relu_1")
    insert_channel_gate(program, "relu_3")
    assert len(program.model.functions) == 1
    verify_program(program)


@pytest.mark.parametrize(
    ("value", "message"),
    [("x", "not computed by a node"), ("nothing", "not computed"), ("linear", "graph output")],
)
def test_values_that_cannot_be_gated(value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gated(value)


def test_the_verifier_knows_the_gate() -> None:
    program, gate = gated()
    close(program, gate, np.ones(1))
    program.initializers[gate].shape = ir.Shape([1])
    with pytest.raises(VerificationError, match=r"its gate 'relu_1.gate' has shape \[1\].*8 channels"):
        verify_program(program)
