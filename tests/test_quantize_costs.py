"""What layers cost when quantized, and which ones `max-drop` keeps in float; precision in lower and on the digits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from builders import node, program_from_nodes

from sartor.cli import main
from sartor.errors import UsageError
from sartor.ir.fx import run_twin
from sartor.passes.base import Context
from sartor.passes.quantize import Quantize
from sartor.quantization.calibration import find_ranges, pieces
from sartor.quantization.costs import _error, costs, predictor
from sartor.quantization.integer_only import integer_only
from sartor.quantization.placement import place
from sartor.quantization.supply import layer_costs
from sartor.scoring import score

CLASSES = 10
BN = ("weight", "bias", "running_mean", "running_var")


def draw(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="module")
def program():
    """Three layers; what the second one gets has one channel a thousand times larger than those that matter."""
    wide = draw(16, 16, seed=1, scale=0.3)
    wide[:, 0] *= 3000.0
    narrow = draw(16, CLASSES, seed=2, scale=0.3)
    second = draw(16, 16, seed=3, scale=0.3)
    second[0] = 0.0  # nothing of the large channel is used, it only takes the range
    nodes = [
        node("MatMul", ["x", "w1"], ["h1"], "first"),
        node("Relu", ["h1"], ["r1"], "relu1"),
        node("MatMul", ["r1", "w2"], ["h2"], "second"),
        node("Relu", ["h2"], ["r2"], "relu2"),
        node("MatMul", ["r2", "w3"], ["y"], "third"),
    ]
    return program_from_nodes(nodes, {"x": ("N", 16)}, ["y"], {"w1": wide, "w2": second, "w3": narrow})


@pytest.fixture(scope="module")
def context(program):
    """Labels are what the float program says, so that its score is 1."""

    def split(seed):
        x = draw(200, 16, seed=seed)
        return [({"x": x}, run_twin(program, {"x": x})["y"].argmax(1))]

    return Context(data={"calibration": split(5), "evaluate": split(6)})


def quantized_score(program, context, scheme):
    predict = predictor(Quantize().replay(program, scheme).program)
    return score(predict, context.data["evaluate"])[0]


def test_costs_name_the_layer_that_spoils_it(program, context):
    data = list(pieces(context.data["calibration"], 200, program))
    ranges = find_ranges(program, data, "minmax")
    found = costs(program, data, place(program, ranges), lambda more: place(program, ranges, exclude=more))
    assert {cost.node for cost in found.layers} == {"first", "second", "third"}
    assert found.error > 0.01 and found.samples == 200
    assert [c.share for c in found.layers] == sorted((c.share for c in found.layers), reverse=True)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["schema"] == "sartor.quantization-costs/1" and len(document["layers"]) == 3
    assert found.layers[0].node == "second" and found.layers[0].share > 0.8
    assert max(abs(c.share) for c in found.layers[1:]) < 0.2


def test_infinite_outputs_are_not_counted():
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "linear"),
        node("Add", ["h", "mask"], ["y"], "mask"),
    ]
    constants = {"w": draw(4, 6), "mask": np.float32([0, 0, 0, 0, -np.inf, -1e9])}
    program = program_from_nodes(nodes, {"x": ("N", 4)}, ["y"], constants)
    found = layer_costs(program, Context(data={"calibration": [({"x": draw(32, 4)}, None)]}))
    json.dumps(found.to_dict(), allow_nan=False)
    assert 0.0 < found.error < 0.01 and [c.node for c in found.layers] == ["linear"]
    assert found.layers[0].error == 0.0 and found.layers[0].share == 1.0


def test_a_number_that_becomes_infinite_is_an_error():
    exact, broken = np.float32([1.0, 2.0]), np.float32([1.0, np.nan])
    assert (
        np.isfinite(_error([{"y": exact}], [{"y": broken}])) and _error([{"y": exact}], [{"y": broken}]) > 1.0
    )


def test_max_drop_keeps_what_costs_most(program, context):
    everything = Quantize().run(program, context)
    lost = 1.0 - quantized_score(program, context, everything.plan)
    assert lost > 0.04
    result = Quantize(max_drop=2.0).run(program, context)
    kept = {refusal.node for refusal in result.refusals}
    assert kept == {"second"}
    assert all("of the error of the outputs is its own" in refusal.reason for refusal in result.refusals)
    assert 1.0 - quantized_score(program, context, result.plan) <= 0.02 + 1e-9
    assert {f.node for f in integer_only(result.program)} >= kept
    assert Quantize(max_drop=100.0).run(program, context).plan == everything.plan


def test_max_drop_asks_the_metric_of_the_data(program, context):
    seen = []

    def metric(outputs, labels):
        seen.append(outputs["y"].shape)
        return 1.0

    given = Context(data=context.data, metric=metric)
    assert not Quantize(max_drop=0.0).run(program, given).refusals and seen


def test_max_drop_without_a_split_to_score(program, context):
    with pytest.raises(UsageError, match="no split 'evaluate'"):
        Quantize(max_drop=1.0).run(program, Context(data={"calibration": context.data["calibration"]}))


def test_a_metric_that_nothing_satisfies_leaves_everything_in_float(program, context):
    def metric(outputs, labels):
        return float(np.array_equal(outputs["y"], exact))

    exact = predictor(program)(context.data["evaluate"][0][0])["y"]
    result = Quantize(max_drop=0.5).run(program, Context(data=context.data, metric=metric))
    assert not result.modified and {r.node for r in result.refusals} >= {"first", "second", "third"}


# ---- commands --------------------------------------------------------------------------------------
DATA = """
import numpy as np
def digits():
    from sklearn.datasets import load_digits
    found = load_digits()
    x = ((found.images - 4.88) / 6.02)[:, None].astype(np.float32)
    parts = np.split(np.random.default_rng(7).permutation(len(x)), [1100, 1350])
    labels = found.target.astype(np.int64)
    return {k: [({"x": x[p]}, labels[p])] for k, p in zip(("train", "evaluate", "test"), parts)}
def empty():
    return {**digits(), "calibration": []}
def square():
    return {**digits(), "calibration": [({"x": np.zeros((4, 1, 9, 9), np.float32)}, None)]}
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A network that reads digits, trained for some seconds, and the file of its data."""
    import importlib.util

    import torch

    folder = tmp_path_factory.mktemp("digits")
    (folder / "data.py").write_text(DATA)
    spec = importlib.util.spec_from_file_location("digits_of_the_test", folder / "data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    splits = module.digits()
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 24, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(24),
        torch.nn.ReLU(),
        torch.nn.Conv2d(24, 32, 3, padding=1, stride=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(512, 10),
    )
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    images, labels = (torch.from_numpy(a) for a in (splits["train"][0][0]["x"], splits["train"][0][1]))
    for _ in range(12):
        for rows in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    weights = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    nodes = [
        node("Conv", ["x", "0.weight"], ["c0"], "conv0", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c0", *(f"1.{n}" for n in BN)], ["n0"], "norm"),
        node("Relu", ["n0"], ["r0"], "relu0"),
        node("Conv", ["r0", "3.weight", "3.bias"], ["c1"], "conv1", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["c1"], ["r1"], "relu1"),
        node("Flatten", ["r1"], ["f"], "flatten"),
        node("Gemm", ["f", "6.weight", "6.bias"], ["y"], "linear", transB=1),
    ]
    used = {name: array for name, array in weights.items() if not name.endswith("tracked")}
    program = program_from_nodes(nodes, {"x": ("N", 1, 8, 8)}, ["y"], used)
    program.save(folder / "model.onnx")
    return folder


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def recovered(digits):
    """The network with half of its channels, trained again for some seconds, and what it scores before and after."""
    from sartor.data import load_data
    from sartor.ir.load import load
    from sartor.passes.pipeline import Pipeline
    from sartor.recovery.distillation import RecoveryOptions, distill

    original = load(digits / "model.onnx")
    data = load_data(f"{digits / 'data.py'}:digits", list(original.input_shapes), program=original)
    context = Context(data={"calibration": data.calibration, "train": data.train})
    cut = Pipeline.parse("prune-channels{ratio=0.5,criterion=l2}").run(original, context).program
    found = distill(cut, original, data.train, minutes=0.5, seed=0, options=RecoveryOptions(max_steps=60))
    found.program.save(digits / "recovered.onnx")
    return tuple(score(predictor(p), data.test)[0] for p in (original, cut, found.program))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tflite"])
def test_pruned_and_recovered_and_quantized_keeps_its_accuracy(digits, recovered, target, tmp_path, capsys):
    from sartor import backends
    from sartor.backends.artifact import open_artifact
    from sartor.backends.protocol import TargetOptions
    from sartor.data import load_data
    from sartor.ir.load import load

    data, small = f"{digits / 'data.py'}:digits", digits / "recovered.onnx"
    program = load(small)
    splits = load_data(data, list(program.input_shapes), program=program)
    # a flatbuffer has one shape: that of the whole split; comparing takes further conversions
    shape = ("--shape", "x=447,1,8,8", "--no-verify") if target == "tflite" else ()
    code, out, err = run(
        capsys,
        *("lower", small, "--target", target, "--precision", "int8", "--data", data, "-o", tmp_path / "out"),
        *shape,
    )
    assert code == 0 and (shape or "verified: relative error" in out), err
    options = TargetOptions(precision="int8")
    session = backends.get(target).load(open_artifact(tmp_path / "out"), options)
    before, cut, after = recovered
    assert before > 0.9 and cut < before - 0.02 and after > max(cut, before - 0.02)
    assert score(session.run, splits.test)[0] >= after - 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int8"], "There is no calibration data"),
        (
            ["--precision", "int8", "--data", "data.py:empty"],
            "split 'calibration' of 'data.py:empty' is empty",
        ),
        (
            ["--precision", "int8", "--data", "data.py:square"],
            r"has shape [4, 1, 9, 9], but the model takes [N, 1, 8, 8]",
        ),
        (["--max-drop", "1"], "--max-drop says what quantization may cost"),
    ],
)
def test_lower_refuses(digits, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(digits)
    code, _, err = run(
        capsys, "lower", "model.onnx", "--target", "onnxruntime", *arguments, "-o", tmp_path / "out"
    )
    assert code == 2 and message.lower() in err.lower() and not (tmp_path / "out").exists()


def test_lower_tells_what_stays_in_float(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(digits)
    common = ("--target", "onnxruntime", "--data", "data.py:digits", "--json")
    code, out, _ = run(
        capsys,
        *("lower", "model.onnx", "--precision", "int8", "--keep", "*linear*", *common, "-o", tmp_path / "a"),
    )
    document = json.loads(out)
    assert code == 0 and document["precision"] == "int8" and document["verification"]["verified"]
    assert document["in_float32"][0]["reason"].startswith("'keep' names")
    code, out, _ = run(capsys, "lower", "model.onnx", "--precision", "f16", *common, "-o", tmp_path / "b")
    assert code == 0 and json.loads(out)["precision"] == "f16"


def test_a_pipeline_quantizes_with_data(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(digits)
    passes = "fold-batch-norm,quantize{calibration=percentile,max-drop=0.5}"
    code, out, err = run(
        capsys,
        *("run", "model.onnx", "--passes", passes, "--data", "data.py:digits", "-o", tmp_path / "q.onnx"),
    )
    assert code == 0 and "activations_quantized" in out, err


def test_layers_are_listed_by_what_they_cost(digits, capsys, monkeypatch):
    monkeypatch.chdir(digits)
    code, out, err = run(capsys, "layers", "model.onnx", "--data", "data.py:digits", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["schema"] == "sartor.quantization-costs/1" and document["samples"] == 64
    assert {entry["node"] for entry in document["layers"]} == {"conv0", "conv1", "linear"}
    code, out, _ = run(capsys, "layers", "model.onnx", "--data", "data.py:digits", "--keep", "conv1")
    assert code == 0 and "conv0" in out and "conv1" not in out
    assert run(capsys, "layers", "model.onnx")[0] == 2


def test_artifacts_of_two_precisions_are_measured_against_each_other(digits, tmp_path):
    from sartor import backends
    from sartor.backends.measure import measure
    from sartor.backends.protocol import TargetOptions
    from sartor.data import load_data
    from sartor.ir.load import load
    from sartor.precision import in_precision

    program = load(digits / "model.onnx")
    data = load_data(f"{digits / 'data.py'}:digits", list(program.input_shapes), program=program)
    artifacts = []
    for precision in ("f32", "int8"):
        written, _ = in_precision(program, precision, data)
        options = TargetOptions(precision=precision)
        artifacts.append(backends.get("onnxruntime").lower(written, tmp_path / precision, options))
    found = measure("onnxruntime", artifacts, TargetOptions(), min_rounds=2, max_rounds=2, time_limit_s=2.0)
    assert len(found.latencies) == 2 and found.ratio.latency > 0


def test_a_fit_in_int8_compares_scores_with_the_original_in_float(digits, tmp_path):
    from sartor.budget import parse_budget
    from sartor.data import load_data
    from sartor.ir.load import load
    from sartor.passes.quantize import is_quantized
    from sartor.workbench import FitOptions, Workbench

    program = load(digits / "model.onnx")
    data = load_data(f"{digits / 'data.py'}:digits", list(program.input_shapes), program=program)
    options = FitOptions("onnxruntime", parse_budget("latency=0.5x"), precision="int8", keep=("linear",))
    bench = Workbench(program, options, data, tmp_path)
    try:
        assert (bench.baseline.precision, bench.exact.precision) == ("int8", "f32")
        inputs = data.test.first()[0]
        np.testing.assert_allclose(bench.original(inputs)["y"], predictor(program)(inputs)["y"], atol=1e-4)
        assert bench.score(bench.exact, "test")[0] == score(predictor(program), data.test)[0]
        written = bench.written(program)
        assert is_quantized(written) and bench.written(written) is written
        # what is kept from pruning is quantized all the same
        assert not any(node.name == "linear" and node.inputs[1].is_initializer() for node in written.nodes())
        artifact = bench.lower(written, tmp_path / "candidate")
        assert artifact.precision == "int8" and bench.verify(written, artifact).passed
    finally:
        bench.close()
    without = FitOptions("onnxruntime", parse_budget("latency=0.5x"), precision="int8")
    with pytest.raises(UsageError, match="There is no calibration data"):
        Workbench(program, without, None, tmp_path / "none")
