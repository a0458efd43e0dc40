"""An operator that no unit can pass blocks what it reads and writes, with a reason, and nothing else.

Every model has three parts: a pair of convolutions of its own, a convolution whose features the operator mixes
or selects, and a pair of convolutions after the operator. The first and the last stay prunable, and prove it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fit_fakes import without_timing
from onnx import TensorProto, helper
from onnx_files import run, save, tensor, weights
from torch import nn

import sartor
from sartor import oracle
from sartor.cli.main import main
from sartor.cost_models.static import static_cost
from sartor.errors import SartorError, UnsupportedOperatorError, UsageError, VerificationError
from sartor.inspection import inspect_program
from sartor.interop import graphsurgeon
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.load import load
from sartor.ir.program import Program
from sartor.ir.verify import verify_program
from sartor.passes.instruments import ReproducerOnFailure, read_reproducer, replay
from sartor.passes.masked import masked
from sartor.report.prunability import render
from sartor.report.tree import describe
from sartor.scoring import score

node = helper.make_node
APART = [
    node("Conv", ["x", "w1"], ["a1"], name="apart"),
    node("Relu", ["a1"], ["r1"]),
    node("Conv", ["r1", "w2"], ["y"]),
]
BEFORE = [node("Conv", ["x", "touched"], ["t"], name="before")]
AFTER = [
    node("Conv", ["m", "w3"], ["a2"], name="after"),
    node("Relu", ["a2"], ["r2"]),
    node("Conv", ["r2", "w4"], ["z"]),
]
WEIGHTS = [
    weights("w1", 8, 3, 1, 1),
    weights("w2", 4, 8, 1, 1),
    weights("touched", 8, 3, 1, 1),
    weights("w4", 4, 8, 1, 1),
]


def i64(name: str, *values: int) -> TensorProto:
    return tensor(name, np.array(values, np.int64))


def scalar(name: str, value: object, dtype: type = np.int64) -> TensorProto:
    return tensor(name, np.array(value, dtype))


def branch(op: str, *inputs: str, **attributes: object) -> onnx.GraphProto:
    name = f"{op}_out"
    made = helper.make_empty_tensor_value_info(name)
    return helper.make_graph([node(op, list(inputs), [name], **attributes)], op, [], [made])


# What the operator is, the nodes from `t` of shape [1, 8, 4, 4] to `m`, their constants, how many channels `m` has,
# and inputs beside `x`.
MIXING: dict[str, tuple[list, list, int, dict]] = {
    "Hardmax": ([node("Hardmax", ["t"], ["m"], axis=1)], [], 8, {}),
    "Softmax": ([node("Softmax", ["t"], ["m"], axis=1)], [], 8, {}),
    "LRN": ([node("LRN", ["t"], ["m"], size=3)], [], 8, {}),
    "MeanVarianceNormalization": (
        [node("MeanVarianceNormalization", ["t"], ["m"], axes=[1, 2, 3])],
        [],
        8,
        {},
    ),
    "CumSum": ([node("CumSum", ["t", "k"], ["m"])], [scalar("k", 1)], 8, {}),
    "TopK": ([node("TopK", ["t", "k"], ["m", "i"], axis=1)], [i64("k", 3)], 3, {}),
    "ArgMax": (
        [node("ArgMax", ["t"], ["i"], axis=1), node("Cast", ["i"], ["m"], to=TensorProto.FLOAT)],
        [],
        1,
        {},
    ),
    "ReduceMax": ([node("ReduceMax", ["t", "k"], ["m"])], [i64("k", 1)], 1, {}),
    "Gather by data": ([node("Gather", ["t", "which"], ["m"], axis=1)], [], 5, {"which": [5]}),
    "GatherElements by data": (
        [node("GatherElements", ["t", "which"], ["m"], axis=1)],
        [],
        2,
        {"which": [1, 2, 4, 4]},
    ),
    "ScatterElements by data": (
        [node("ScatterElements", ["t", "which", "u"], ["m"], axis=1)],
        [weights("u", 1, 2, 4, 4)],
        8,
        {"which": [1, 2, 4, 4]},
    ),
    "ReverseSequence": (
        [node("ReverseSequence", ["t", "k"], ["m"], time_axis=1, batch_axis=0)],
        [i64("k", 5)],
        8,
        {},
    ),
    "LSTM": (
        [
            node("Reshape", ["t", "k"], ["s"]),
            node("LSTM", ["s", "lw", "lr"], ["l"], hidden_size=6),
            node("Reshape", ["l", "k2"], ["m"]),
        ],
        [i64("k", 16, 1, 8), i64("k2", 1, 6, 4, 4), weights("lw", 1, 24, 8), weights("lr", 1, 24, 6)],
        6,
        {},
    ),
    "If by data": (
        [
            node("ReduceMax", ["x"], ["top"], keepdims=0),
            node("Greater", ["top", "zero"], ["c"]),
            node(
                "If",
                ["c"],
                ["m"],
                then_branch=branch("Softmax", "t", axis=1),
                else_branch=branch("CumSum", "t", "k"),
            ),
        ],
        [scalar("zero", 0, np.float32), scalar("k", 1)],
        8,
        {},
    ),
}


def pruned_and_proven(program: Program, analysis: ChannelAnalysis, names: set[str]) -> str:
    """The oracle's verdict on half of every group; `names` must be in groups, and `touched` stay whole."""
    assert names <= {m.initializer for g in analysis.groups for m in g.members}
    spec = "prune-channels{ratio=0.5,criterion=random,seed=1}"
    result = sartor.Pipeline.parse(spec, instruments=()).run(program)
    whole = {"touched"} & set(program.initializers)
    widths = {n: result.program.initializer_shape(n)[0] for n in (*names, *whole)}
    assert widths == dict.fromkeys(names, 4) | dict.fromkeys(whole, 8)
    return oracle.check(program, result.results[0].result.plan, analysis=analysis).verdict


@pytest.mark.parametrize("kind", MIXING)
def test_the_rest_stays_prunable(tmp_path: Path, kind: str) -> None:
    nodes, constants, channels, inputs = MIXING[kind]
    path = save(
        tmp_path / "m.onnx",
        [*APART, *BEFORE, *nodes, *AFTER],
        {"x": [1, 3, 4, 4], **inputs},
        {"y": None, "z": None},
        [*WEIGHTS, *constants, weights("w3", 8, channels, 1, 1)],
        types=dict.fromkeys(inputs, TensorProto.INT64),
        check=False,
    )
    program = load(path)
    analysis = channel_groups(program)
    reasons = [b.reason for b in analysis.blocked if b.value == "touched"]
    named = "Softmax" if kind == "If by data" else kind.split()[0]
    assert len(reasons) == 1 and named in reasons[0], reasons
    assert pruned_and_proven(program, analysis, {"w1", "w3"}) == "passed"


# Nodes from `t` to the output `z`, and inputs beside `x`.
UNKNOWN: dict[str, tuple[list, list, dict]] = {
    "NonZero": ([node("NonZero", ["t"], ["z"], name="op")], [], {}),
    "NonZero of the input": ([node("NonZero", ["x"], ["z"], name="op")], [], {}),
    "standard, not in the table": ([node("Det", ["t"], ["z"], name="op")], [], {}),
    "another domain": ([node("Relu", ["t"], ["z"], name="op", domain="com.acme")], [], {}),
    "Reshape by data": ([node("Reshape", ["t", "by"], ["z"], name="op")], [], {"by": [2]}),
    "Slice by data": (
        [node("Slice", ["t", "by", "by2", "axis"], ["z"], name="op")],
        [i64("axis", 3)],
        {"by": [1], "by2": [1]},
    ),
    "rank by data": (
        [
            node("ReduceMax", ["x"], ["top"], keepdims=0),
            node("Greater", ["top", "zero"], ["c"]),
            node(
                "If",
                ["c"],
                ["z"],
                name="op",
                then_branch=branch("Relu", "t"),
                else_branch=branch("ReduceMax", "t", keepdims=0),
            ),
        ],
        [scalar("zero", 0, np.float32)],
        {},
    ),
}


def left_open(tmp_path: Path, kind: str) -> Path:
    """A model whose output `z` is made by something that is not understood."""
    nodes, constants, inputs = UNKNOWN[kind]
    path = save(
        tmp_path / "m.onnx",
        [*APART, *BEFORE, *nodes],
        {"x": [1, 3, 4, 4], **inputs},
        {"y": None, "z": None},
        [*WEIGHTS[:3], *constants],
        types=dict.fromkeys(inputs, TensorProto.INT64),
        domains=["com.acme"],
        check=False,
    )
    if kind.startswith("NonZero"):
        model = onnx.load(path)
        model.graph.output[1].CopyFrom(helper.make_tensor_value_info("z", TensorProto.INT64, [4, "places"]))
        onnx.save(model, path)
    return path


@pytest.mark.parametrize("kind", UNKNOWN)
def test_the_rest_of_a_model_with_a_part_that_is_not_understood(tmp_path: Path, kind: str) -> None:
    path = left_open(tmp_path, kind)
    program = load(path)
    analysis = channel_groups(program)
    assert pruned_and_proven(program, analysis, {"w1"}) == "passed"
    assert program.tail is not None and [n.name for n in program.tail.nodes][-1] == "op"
    assert [v.name for v in program.outputs] == ["y", "z"]
    reasons = [b.reason for b in analysis.blocked if b.value == "touched"]
    if kind != "NonZero of the input":
        assert len(reasons) == 1 and "is read by node" in reasons[0] and "is left as it is" in reasons[0]


@pytest.mark.parametrize("kind", sorted(set(UNKNOWN) - {"another domain"}))
def test_what_is_not_understood_is_saved_untouched(tmp_path: Path, kind: str) -> None:
    """Pruned with zeros in place of what is cut, the whole file computes what MASKED does, `z` included."""
    path = left_open(tmp_path, kind)
    program = load(path)
    inputs = {"x": np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)}
    extra = {"by": np.array([8, 16]), "by2": np.array([3])}
    if kind == "Slice by data":
        extra["by"] = np.array([1])
    inputs |= {name: extra[name].astype(np.int64) for name in UNKNOWN[kind][2]}
    for x, y in zip(run(path, inputs), run(program.to_bytes(), inputs), strict=True):
        np.testing.assert_array_equal(x, y)
    spec = "prune-channels{ratio=0.5,criterion=random,seed=1}"
    result = sartor.Pipeline.parse(spec, instruments=()).run(program)
    plan = result.results[0].result.plan
    saved = result.program.save(tmp_path / "pruned.onnx")
    mask, _ = masked(program, plan)
    for x, y in zip(run(mask.to_bytes(), inputs), run(saved, inputs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    again = load(saved)
    assert again.sha256() == result.program.sha256() and again.tail is not None


def test_a_loop_and_what_follows_it_are_left_alone(tmp_path: Path) -> None:
    """The body reads a value from outside, and a node after the loop has a weight that both parts read."""
    flag, info = helper.make_tensor_value_info, TensorProto
    body = helper.make_graph(
        [
            node("Identity", ["cond"], ["again"]),
            node("Add", ["state", "t"], ["next"], name="inner"),
        ],
        "body",
        [
            flag("i", info.INT64, []),
            flag("cond", info.BOOL, []),
            flag("state", info.FLOAT, [1, 8, 4, 4]),
        ],
        [flag("again", info.BOOL, []), flag("next", info.FLOAT, [1, 8, 4, 4])],
    )
    path = save(
        tmp_path / "m.onnx",
        [
            *APART,
            *BEFORE,
            node("Loop", ["times", "", "t"], ["looped"], name="loop", body=body),
            node("Conv", ["looped", "w2"], ["z"], name="after"),
        ],
        {"x": [1, 3, 4, 4]},
        {"y": None, "z": [1, 4, 4, 4]},
        [*WEIGHTS[:3], scalar("times", 3)],
        check=False,
    )
    program = load(path)
    assert program.tail is not None and [n.name for n in program.tail.nodes] == ["loop", "after"]
    x = {"x": np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)}
    for left, right in zip(run(path, x), run(program.to_bytes(), x), strict=True):
        np.testing.assert_array_equal(left, right)
    assert pruned_and_proven(program, channel_groups(program), {"w1"}) == "passed"
    spec = "prune-channels{ratio=0.5,criterion=random,seed=1}"
    pruned = sartor.Pipeline.parse(spec, instruments=()).run(program).program
    assert pruned.initializer_shape("w2") == (4, 4, 1, 1)
    z = run(pruned.to_bytes(), x)[1]  # the loop's reader keeps its own, whole weight
    np.testing.assert_array_equal(z, run(path, x)[1])


def test_a_model_of_which_nothing_is_understood_is_refused(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("Fold", ["x"], ["t"], name="op", domain="com.acme"), node("Relu", ["t"], ["y"])],
        {"x": [1, 3]},
        {"y": [1, 3]},
        [],
        domains=["com.acme"],
        check=False,
    )
    with pytest.raises(
        UnsupportedOperatorError, match=r"'op' \(Fold\) uses operator 'Fold' of domain 'com.acme'"
    ):
        load(path)


class Detector(nn.Module):
    """A network whose last output lists the places where a feature is large."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.body(x)
        return y, torch.nonzero(y > 1.0)


def test_a_module_with_a_result_of_unknown_size() -> None:
    program = sartor.capture(Detector().eval(), (torch.zeros(1, 3, 8, 8),))
    assert program.tail is not None and not program.batch.symbolic and "NonZero" in program.batch.reason
    analysis = channel_groups(program)
    assert [g.size for g in analysis.groups] == [8]
    result = sartor.Pipeline.parse("prune-channels{ratio=0.5}", instruments=()).run(program)
    assert oracle.check(program, result.results[0].result.plan, analysis=analysis).verdict == "passed"
    x = {
        program.graph.inputs[0].name or "": np.random.default_rng(0)
        .standard_normal((1, 3, 8, 8))
        .astype("f4")
    }
    y, places = run(result.program.to_bytes(), x)
    np.testing.assert_array_equal(places, np.argwhere(y > 1.0))


def test_foreign_passes_see_what_is_understood_and_keep_the_rest(tmp_path: Path) -> None:
    program = load(left_open(tmp_path, "NonZero"))

    def rename(graph):  # type: ignore[no-untyped-def]
        assert {n.op for n in graph.nodes} == {"Conv", "Relu"}
        for one in graph.nodes:
            one.name = f"{one.name}_again"
        return graph

    result = graphsurgeon(rename, name="rename").run(program).program
    assert [v.name for v in result.outputs] == ["y", "z"] and load(result.save(tmp_path / "n.onnx")).tail

    def take(graph):  # type: ignore[no-untyped-def]
        graph.nodes[0].outputs[0].name = "z"  # a name of what is left as it is
        return graph

    with pytest.raises(VerificationError, match="'z' is also a value of the nodes that are left as they are"):
        verify_program(graphsurgeon(take, name="take").run(program).program)


def test_write_back_is_refused() -> None:
    module, x = Detector().eval(), (torch.zeros(1, 3, 8, 8),)
    plan = (
        sartor.Pipeline.parse("prune-channels{ratio=0.5}")
        .run(sartor.capture(module, x))
        .results[0]
        .result.plan
    )
    with pytest.raises(UsageError, match=r"'Detector' cannot be written back.*NonZero"):
        sartor.apply_to_module(module, plan, x)


def test_inspect_says_what_is_left(tmp_path: Path) -> None:
    program = load(left_open(tmp_path, "another domain"))
    document = inspect_program(program)
    assert document["left"]["nodes"] == 1 and document["left"]["ops"] == {"Relu": 1}
    assert document["left"]["reasons"][0]["node"] == "op"
    assert "operator 'Relu' of domain 'com.acme'" in describe(document).replace("\n", " ")
    assert "1 node are left" not in describe(document)
    assert "com.acme" in render(document)


def test_fit_of_a_model_with_a_part_that_is_not_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_timing(monkeypatch)
    path = left_open(tmp_path, "NonZero")
    out = tmp_path / "out"
    command = ["fit", str(path), "--target", "onnxruntime", "--budget", "macs=0.9x", "--recovery", "none"]
    assert main([*command, "--out", str(out)]) == 0
    names = {f.name for f in out.iterdir()}
    assert {"model.onnx", "pruned.onnx", "masked.onnx", "report.html"} <= names
    assert [v.name for v in onnx.load(out / "model.onnx").graph.output] == ["y", "z"]


# ---- what a reviewer found ----------------------------------------------------------------------
def looped(reads: str, weight_name: str = "own") -> tuple[list, list]:
    """A loop whose body holds an `If` that reads `reads`, two graphs further out."""
    info = helper.make_tensor_value_info
    inner = [
        helper.make_graph(
            [node(op, [reads], [f"{op}_y"])], op, [], [helper.make_empty_tensor_value_info(f"{op}_y")]
        )
        for op in ("Neg", "Abs")
    ]
    body = helper.make_graph(
        [
            node("Identity", ["cond"], ["again"]),
            node("If", ["cond"], ["chosen"], then_branch=inner[0], else_branch=inner[1]),
            node("ReduceMean", ["chosen"], ["small"], keepdims=0),
            node("Add", ["state", "small"], ["next"]),
        ],
        "body",
        [info("i", 7, []), info("cond", TensorProto.BOOL, []), info("state", 1, [])],
        [info("again", TensorProto.BOOL, []), info("next", 1, [])],
    )
    nodes = [node("Loop", ["times", "", "start"], ["z"], name="loop", body=body)]
    return nodes, [scalar("times", 3), scalar("start", 0.5, np.float32)]


@pytest.mark.parametrize("reads", ["r1", "w2", "x"])
def test_a_body_two_graphs_down_keeps_what_it_reads(tmp_path: Path, reads: str) -> None:
    nodes, constants = looped(reads)
    path = save(
        tmp_path / "m.onnx",
        [*APART, *nodes],
        {"x": [1, 3, 4, 4]},
        {"y": None, "z": []},
        [*WEIGHTS[:2], *constants],
        check=False,
    )
    program = load(path)
    x = {"x": np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)}
    for left, right in zip(run(path, x), run(program.to_bytes(), x), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)
    result = sartor.Pipeline.parse("prune-channels{ratio=0.5,criterion=random,seed=1}", instruments=()).run(
        program
    )
    mask, _ = masked(program, result.results[0].result.plan)
    for left, right in zip(run(mask.to_bytes(), x), run(result.program.to_bytes(), x), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    again = load(result.program.save(tmp_path / "s.onnx"))
    assert again.sha256() == result.program.sha256()  # and it stays so, however often


def test_names_of_the_weights_of_both_parts(tmp_path: Path) -> None:
    """Both parts read `w2`; each part has a weight that is called like the copy would be."""
    for extra in ("core", "tail"):
        fold = ["t", "w2"] + (["w2.tail"] if extra == "tail" else [])
        nodes = [
            node("Conv", ["x", "w2.tail" if extra == "core" else "touched"], ["t"]),
            node("Fold", fold, ["z"], name="op", domain="com.acme"),
        ]
        named = weights("w2.tail", 8, 3, 1, 1, seed=7)
        path = save(
            tmp_path / f"{extra}.onnx",
            [*APART, *nodes],
            {"x": [1, 3, 4, 4]},
            {"y": None, "z": [1]},
            [*WEIGHTS[:3], named],
            domains=["com.acme"],
            check=False,
        )
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        model = onnx.load_from_string(load(path).to_bytes())
        after = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        reads = next(n for n in model.graph.node if n.op_type == "Fold").input
        assert len(set(reads)) == len(fold)
        for before, now in zip(fold[1:], list(reads)[1:], strict=True):
            np.testing.assert_array_equal(after[now], stored[before])


def test_weights_that_are_left_have_a_size(tmp_path: Path) -> None:
    nodes = [node("Fold", ["t", "kept"], ["z"], name="op", domain="com.acme")]
    path = save(
        tmp_path / "m.onnx",
        [*APART, *BEFORE, *nodes],
        {"x": [1, 3, 4, 4]},
        {"y": None, "z": [1]},
        [*WEIGHTS[:3], weights("kept", 1000)],
        domains=["com.acme"],
        check=False,
    )
    cost = static_cost(load(path))
    assert cost.weight_bytes == 4 * (24 + 32 + 24 + 1000) and cost.parameters == cost.weight_bytes / 4


def test_a_function_that_only_what_is_left_calls_stays(tmp_path: Path) -> None:
    double = helper.make_function(
        "sartor", "Double", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    nodes = [
        node("NonZero", ["t"], ["n"], name="op"),
        node("Cast", ["n"], ["f"], to=1),
        node("Double", ["f"], ["z"], domain="sartor"),
    ]
    path = save(
        tmp_path / "m.onnx",
        [*APART, *BEFORE, *nodes],
        {"x": [1, 3, 4, 4]},
        {"y": None, "z": [4, "k"]},
        WEIGHTS[:3],
        functions=[double],
        domains=["sartor"],
        check=False,
    )
    program = sartor.Pipeline.parse("remove-dead", instruments=()).run(load(path)).program
    x = {"x": np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)}
    np.testing.assert_array_equal(run(program.to_bytes(), x)[1], run(path, x)[1])


def test_a_reproducer_has_the_tail(tmp_path: Path) -> None:
    program = load(left_open(tmp_path, "NonZero"))
    writer = ReproducerOnFailure(tmp_path / "r")
    pipeline = sartor.Pipeline.parse("prune-channels{ratio=0.5,criterion=taylor}", instruments=(writer,))
    with pytest.raises(SartorError) as first:
        pipeline.run(program)
    back, _, _ = read_reproducer(writer.written[0])
    assert back.tail is not None and back.sha256() == program.sha256()
    with pytest.raises(type(first.value)) as second:
        replay(writer.written[0])
    assert str(second.value) == str(first.value)


def splits() -> dict:
    rng = np.random.default_rng(0)
    batches = [({"x": rng.standard_normal((1, 3, 4, 4)).astype(np.float32)}, None) for _ in range(6)]
    return {"evaluate": batches, "test": batches, "calibration": batches}


def test_fit_with_data_scores_what_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_timing(monkeypatch)
    path = left_open(tmp_path, "NonZero")
    (tmp_path / "data.py").write_text("from test_blocks_only_what_it_touches import splits\n")
    command = ["fit", str(path), "--target", "onnxruntime", "--budget", "macs=0.9x"]
    command += [
        "--data",
        f"{tmp_path / 'data.py'}:splits",
        "--max-drop",
        "100",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--recovery", "minutes=1"]) == 2  # it needs batches, and the batch is fixed
    assert main([*command, "--recovery", "none"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quality"] == "kept" and 0.0 < report["result"]["score"] < 1.0


def test_constants_of_what_is_left_stay_constants(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["c"], name="c", value=tensor("c", np.ones(3, np.float32)))
    path = save(
        tmp_path / "m.onnx",
        [*APART, *BEFORE, constant, node("Fold", ["t", "c"], ["z"], name="op", domain="com.acme")],
        {"x": [1, 3, 4, 4]},
        {"y": None, "z": [1]},
        WEIGHTS[:3],
        domains=["com.acme"],
        check=False,
    )
    program = load(path)
    assert [v.name for v in program.graph.outputs] == ["y", "t"]
    saved = onnx.load_from_string(program.to_bytes())
    assert "c" in {t.name for t in saved.graph.initializer} and "Identity" not in {
        n.op_type for n in saved.graph.node
    }


def test_results_of_another_size_do_not_agree() -> None:
    outputs = iter([{"n": np.zeros((4, 2))}, {"n": np.ones((3,))}, {"n": np.ones((3,))}])
    split = [({"x": np.zeros((1, 2))}, None)] * 3
    reference = {"n": np.ones((3,))}
    found, count = score(lambda x: next(outputs), split, None, lambda x: reference)
    assert count == 3 and found == pytest.approx(2 / 3)


def test_an_unused_output_in_front_of_a_used_one(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [
            node("LayerNormalization", ["x", "s"], ["a", "mean", "deviation"], name="norm"),
            node("Mul", ["a", "deviation"], ["y"]),
        ],
        {"x": ["N", 4, 8]},
        {"y": ["N", 4, 8]},
        [tensor("s", np.ones(8, np.float32))],
    )
    program = load(path)
    assert program.batch.symbolic
    x = {"x": np.random.default_rng(0).standard_normal((3, 4, 8)).astype(np.float32)}
    np.testing.assert_allclose(run(program.to_bytes(), x)[0], run(path, x)[0], rtol=1e-5)
