"""ONNX's nine light real models: weights that are ConstantOfShape nodes become parameters that can be pruned."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from sartor.errors import UnsupportedOperatorError
from sartor.ir import folding
from sartor.ir.channels import channel_groups
from sartor.ir.load import Limits, load
from sartor.ir.workload import is_parameter

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import light_models as light

NARROWED = {
    "bvlc_alexnet": 4,
    "densenet121": 4,
    "inception_v2": 4,
    "resnet50": 4,
    "vgg19": 8,
    "zfnet512": 4,
}
"""Their full width takes minutes and gigabytes in float64; benchmarks/light_models.py does that."""
WITH_LRN = {"bvlc_alexnet": 2, "inception_v1": 2, "zfnet512": 2}
WITHOUT_GROUPS = {"shufflenet"}
"""Its shuffles cross groups of 17 channels by 4: no regular subset survives both partitions."""


def model_of(name: str) -> onnx.ModelProto:
    model = light.light_model(name)
    return light.narrow(model, NARROWED[name]) if name in NARROWED else model


@pytest.mark.parametrize("name", light.NAMES)
def test_round_trip_groups_and_pruning(name: str, tmp_path: Path) -> None:
    result = light.examine(name, model_of(name), tmp_path)
    assert result.roundtrip_error <= light.EQUAL
    assert result.roundtrip_error_random <= light.EQUAL
    assert result.verdict == "passed"
    assert (result.groups == 0) == (name in WITHOUT_GROUPS)
    lrn = {reason: n for reason, n in result.blocked.items() if "LRN" in reason}
    assert lrn == (
        {"LRN mixes values along this axis without weights": WITH_LRN[name]} if name in WITH_LRN else {}
    )


def test_there_are_nine() -> None:
    assert len(light.NAMES) == 9


@pytest.mark.parametrize("name", ["bvlc_alexnet", "inception_v2", "densenet121"])
def test_generators_become_parameters(name: str, tmp_path: Path) -> None:
    """Under their own names and shapes, and nothing that reads one is folded into it."""
    model = model_of(name)
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path))
    program = load(path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    generated = [n for n in model.graph.node if n.op_type == "ConstantOfShape"]
    assert generated
    statistics = {
        name
        for node in model.graph.node
        if node.op_type == "BatchNormalization"
        for name in (node.input[3], node.input[4])
    }
    for node in generated:
        value = program.initializers[node.output[0]]
        array = program.initializer_array(node.output[0])
        assert array.shape == tuple(stored[node.input[0]])
        assert array.dtype == np.float32 and np.ptp(array) == 0
        assert is_parameter(value) or node.output[0] in statistics


def test_lrn_blocks_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model_of("bvlc_alexnet"), str(path))
    analysis = channel_groups(load(path))
    blocked = [b for b in analysis.blocked if "LRN" in b.reason]
    assert [b.source for b in blocked] == ["'n2' (LRN)", "'n6' (LRN)"]
    members = {m.initializer for g in analysis.groups for m in g.members}
    assert "conv1_w_0" not in members and "conv3_w_0" in members


def test_size_cap(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(light.light_model("resnet50"), str(path))
    with pytest.raises(UnsupportedOperatorError, match=r"ConstantOfShape\) generates.*limit is 1048576"):
        load(path, limits=Limits(generated_elements=1 << 20))


def test_a_planted_error_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = light.light_model("squeezenet")
    assert light.roundtrip_error(*light.loaded(light.before_softmax(model), tmp_path)) <= light.EQUAL
    original = folding.replace_by_constant

    def planted(graph, node, array):  # type: ignore[no-untyped-def]
        return original(graph, node, array * np.float32(1.001) if array.dtype == np.float32 else array)

    monkeypatch.setattr(folding, "replace_by_constant", planted)
    assert light.roundtrip_error(*light.loaded(light.before_softmax(model), tmp_path)) > light.EQUAL
