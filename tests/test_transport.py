"""A program that another process reads is the program that was written, whatever is in it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from models import ALL, captured
from onnx import helper
from onnx_files import save, weights

from sartor.ir import transport
from sartor.ir.load import load


def roundtrip(program, folder):
    folder.mkdir()
    transport.write(program, folder)
    return transport.read(folder)


def assert_same(program, other):
    assert other.sha256() == program.sha256()
    assert other.to_bytes() == program.to_bytes()
    for attribute in ("source", "input_shapes", "batch", "applied", "provenance"):
        assert getattr(other, attribute) == getattr(program, attribute), attribute
    assert other.shapes() == program.shapes()


@pytest.mark.parametrize("name", sorted(ALL)[:4])
def test_captured_models(name, tmp_path):
    program = captured(name)
    assert program.provenance
    assert_same(program, roundtrip(program, tmp_path / "t"))


def test_what_is_not_understood_travels_too(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Magic", ["h", "v"], ["m"], name="magic", domain="com.acme"),
        helper.make_node("Relu", ["h"], ["z"]),
        helper.make_node("Neg", ["m"], ["y"]),
    ]
    path = save(
        tmp_path / "m.onnx",
        nodes,
        {"x": [1, 4]},
        {"y": None, "z": None},
        [weights("w", 4, 8), weights("v", 1, 512)],
        domains=["com.acme"],
        check=False,
    )
    program = load(path)
    assert program.tail is not None
    other = roundtrip(program, tmp_path / "t")
    assert_same(program, other)
    assert other.tail.reason() == program.tail.reason()
    assert dict(other.tail.readers) == dict(program.tail.readers)
    for name, tensor in program.tail.weights.items():
        assert np.array_equal(other.tail.weights[name].numpy(), tensor.numpy())
    assert onnx.ModelProto.FromString(other.to_bytes()).graph.node[-1].op_type == "Neg"
