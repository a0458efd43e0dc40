"""What a target takes, rewrites and refuses: coverage of a program, and how `sartor inspect --target` shows it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from backend_programs import small_cnn
from builders import node, program_from_nodes

import sartor
from sartor import backends
from sartor.backends.coverage import STATUSES, coverage
from sartor.backends.legality import NodeRule, Rules, check_rules, no_control_flow
from sartor.backends.protocol import TargetOptions
from sartor.cli import main
from sartor.errors import BackendError
from sartor.inspection import inspect_program
from sartor.ir.dialect import inline_dialect, insert_channel_gate
from sartor.report.prunability import render
from sartor.report.tree import describe


def statuses(found):
    return {n.node: n.status for n in found.nodes}


class Picky:
    """A backend that takes no Tanh, and writes Relu as a Clip."""

    name = "picky"

    def rules(self):
        def never(program, node):
            return False, f"{len(node.inputs)} inputs"

        return Rules(operators={"Tanh": (NodeRule("no-tanh", "There is no Tanh.", never),)})

    def legalize(self, program):
        legal = program.clone()
        for n in legal.nodes():
            if n.op_type == "Relu":
                n.op_type = "Clip"
        legal.invalidate()
        return legal


def simple(*operators):
    names = ["x", *(f"v{i}" for i in range(len(operators)))]
    nodes = [node(op, [names[i]], [names[i + 1]], f"n{i}") for i, op in enumerate(operators)]
    return program_from_nodes(nodes, {"x": ["N", 4]}, [names[-1]])


# ---- coverage ------------------------------------------------------------------------------------
def test_taken_rewritten_and_stopping():
    found = coverage(simple("Relu", "Sigmoid", "Tanh"), Picky())
    assert statuses(found) == {"n0": "rewritten", "n1": "taken", "n2": "stops"}
    assert found.counts == {"taken": 1, "rewritten": 1, "stops": 1, "unknown": 0} and not found.ok
    stop = found.nodes[2]
    assert [f.rule for f in stop.findings] == ["no-tanh"]
    assert stop.reason == "There is no Tanh. Observed: 1 inputs."
    document = json.loads(json.dumps(found.to_dict()))
    assert [n["node"] for n in document["nodes"]] == ["n0", "n2"]
    assert coverage(simple("Relu", "Sigmoid"), Picky()).ok


def test_a_gate_is_rewritten_where_functions_are_unknown():
    program = small_cnn()
    insert_channel_gate(program, "r1")
    on = {name: coverage(program, backends.get(name)) for name in ("onnxruntime", "openvino")}
    assert all(found.ok for found in on.values())
    assert set(statuses(on["onnxruntime"]).values()) == {"taken"}
    gate = next(n for n in on["openvino"].nodes if n.op_type == "sartor::ChannelGate")
    assert gate.status == "rewritten" and [f.rule for f in gate.findings] == ["no-functions"]
    assert [n.node for n in on["openvino"].nodes if n.status != "taken"] == [gate.node]


def test_what_a_legalisation_makes_can_stop_it(monkeypatch):
    program = small_cnn()
    insert_channel_gate(program, "r1")
    picky = Picky()
    rule = NodeRule("no-mul", "There is no Mul.", lambda program, node: (False, "a Mul"))
    monkeypatch.setattr(picky, "rules", lambda: Rules(operators={"Mul": (rule,)}))
    monkeypatch.setattr(picky, "legalize", inline_dialect)
    found = coverage(program, picky)
    assert statuses(found)["r1.ChannelGate"] == "rewritten"
    (stop,) = [n for n in found.nodes if n.status == "stops"]
    assert stop.op_type == "Mul" and stop.reason.startswith("Made by the legalisation. There is no Mul.")


def test_a_legalisation_that_refuses_stops_the_model(monkeypatch):
    picky = Picky()

    def refuse(program):
        raise BackendError("planted refusal")

    monkeypatch.setattr(picky, "legalize", refuse)
    found = coverage(simple("Sigmoid"), picky)
    assert not found.ok and [(f.rule, f.observed) for f in found.model] == [
        ("legalisation", "planted refusal")
    ]


def test_rules_about_the_model_are_no_nodes():
    program = small_cnn()
    program.model.opset_imports[""] = 99
    found = coverage(program, backends.get("onnxruntime"))
    assert not found.ok and found.counts["stops"] == 0
    assert "opset-version" in {f.rule for f in found.model}


def branching():
    then, other = (
        onnx.helper.make_graph(
            [onnx.helper.make_node(op, ["x"], [op], name=op)],
            op,
            [],
            [onnx.helper.make_tensor_value_info(op, onnx.TensorProto.FLOAT, ["N", 4])],
        )
        for op in ("Tanh", "Sigmoid")
    )
    return program_from_nodes(
        [onnx.helper.make_node("If", ["c"], ["y"], name="choice", then_branch=then, else_branch=other)],
        {"x": ["N", 4]},
        ["y"],
        {"c": np.asarray(True)},
    )


def test_branches_count():
    found = statuses(coverage(branching(), Picky()))
    assert found == {"choice": "taken", "Tanh": "stops", "Sigmoid": "taken"}


def test_control_flow_can_be_refused():
    program, rules = branching(), Rules(nodes=(no_control_flow(),))
    (found,) = check_rules(program, TargetOptions(), rules).violations
    assert (found.node, found.observed) == ("choice", "If with else_branch, then_branch")
    assert check_rules(simple("Tanh"), TargetOptions(), rules).ok


def test_coverage_agrees_with_legality():
    """What `lower` would say first is among what is listed, and a program without stops is legal."""
    for program in (small_cnn(), simple("Relu", "Tanh")):
        for name in ("onnxruntime", "reference"):
            backend = backends.get(name)
            assert coverage(program, backend).ok == backend.legality(program, TargetOptions()).ok
    picky = Picky()
    report = check_rules(picky.legalize(simple("Tanh")), TargetOptions(), picky.rules())
    assert [f.node for f in report.violations] == ["n0"]


# ---- sartor inspect --target ---------------------------------------------------------------------
@pytest.fixture
def untaken(tmp_path):
    """A model with a node that OpenVINO does not convert, and one that nobody understands."""
    infos = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4, 4, 4])]
    outs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)]
    nodes = [
        node("MaxPool", ["x"], ["p", "i"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("MaxUnpool", ["p", "i"], ["u"], "unpool", kernel_shape=[2, 2], strides=[2, 2]),
        node("NonZero", ["u"], ["y"], "where"),
    ]
    graph = onnx.helper.make_graph(nodes, "main", infos, outs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_nodes_that_are_left_are_unknown(untaken):
    program = sartor.load(untaken)
    found = coverage(program, backends.get("onnxruntime"))
    (left,) = [n for n in found.nodes if n.status == "unknown"]
    assert left.node == "where" and "depends on data" in left.reason and found.ok


def test_inspect_says_what_the_target_makes_of_it(untaken, tmp_path, capsys):
    page = tmp_path / "page.html"
    command = ["inspect", str(untaken), "--target", "openvino", "--html", str(page)]
    assert main(command) == 0
    text = " ".join(capsys.readouterr().out.split())  # lines are as long as the terminal is wide
    assert "cannot be lowered to openvino in f32; 3 nodes: 1 taken as they are, 1 stopping it, 1 left" in text
    assert "stops: unpool (MaxUnpool)" in text and "[not-converted]" in text
    assert "stops: unpool (MaxUnpool)" in page.read_text() and "[not-converted]" in page.read_text()
    assert main([*command, "--json"]) == 0
    target = json.loads(capsys.readouterr().out)["target"]
    assert target["name"] == "openvino" and target["precision"] == "f32" and not target["ok"]
    assert list(target["counts"]) == list(STATUSES)
    stops = [n for n in target["nodes"] if n["status"] == "stops"]
    assert [(n["node"], n["findings"][0]["rule"]) for n in stops] == [("unpool", "not-converted")]


def test_inspect_without_a_target_says_nothing_of_one(untaken, capsys):
    assert main(["inspect", str(untaken), "--json"]) == 0
    assert "target" not in json.loads(capsys.readouterr().out)


def test_inspect_refuses_an_unknown_target(untaken, capsys):
    assert main(["inspect", str(untaken), "--target", "openvimo"]) == 2
    assert "Did you mean 'openvino'?" in capsys.readouterr().err


class Author(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(torch.relu(x))


def test_the_line_of_the_author_is_named():
    program = sartor.capture(Author().eval(), (torch.zeros(1, 4),))
    found = coverage(program, Picky())
    (stop,) = [n for n in found.nodes if n.status == "stops"]
    assert stop.location.startswith("test_legality.py:") and stop.location in stop.where
    document = inspect_program(program) | {"target": found.to_dict()}
    assert stop.location in describe(document) and stop.location in render(document)


def test_names_are_made_harmless():
    program = simple("Tanh")
    evil = "<script>\x1b[31m"
    next(iter(program.nodes())).name = evil
    found = dataclasses.replace(coverage(program, Picky()), target="<b>")
    document = inspect_program(simple("Tanh")) | {"target": found.to_dict()}
    page = render(document)
    assert "<script>" not in page and "<b>p" not in page and "to <b>" not in page
    assert "\x1b" not in describe(document)
