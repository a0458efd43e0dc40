"""The public contract, checked from outside: the command line, the files it writes, and ONNX Runtime alone.

The network is one that nobody would draw: names with slashes, colons and digits, a grouped convolution, a
concatenation, squeeze-and-excitation, a fixed batch of 1 and a final Softmax. Its weights are random.
"""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sartor.cli import main
from sartor.errors import UsageError
from sartor.scoring import score

FINAL = "lg"  # what the Softmax hides
RANDOM = "prune-channels{{ratio={ratio},criterion=random,seed={seed}}}"


def write_model(path, seed=5, widths=(12, 16, 7)):
    """conv → batch norm → tanh → grouped conv, concatenated → gate per channel → flatten → gemm → softmax."""
    rng = np.random.default_rng(seed)
    first, second, squeezed = widths
    both = first + second

    def normal(name, *shape):
        gain = 1.0 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.3
        return numpy_helper.from_array((gain * rng.standard_normal(shape)).astype(np.float32), name)

    def positive(name, size):
        return numpy_helper.from_array(rng.uniform(0.5, 1.5, size).astype(np.float32), name)

    tensors = [
        normal("w/0:0", first, 3, 3, 3), positive("s", first), normal("b", first), normal("m", first),
        positive("v", first), normal("gw", second, first // 4, 3, 3), normal("gb", second),
        normal("se1", squeezed, both, 1, 1), normal("se2", both, squeezed, 1, 1), normal("se2b", both),
        normal("fc", 5, both * 64), normal("fcb", 5),
    ]  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Conv", ["1::img/0", "w/0:0"], ["/conv/1"], "", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["/conv/1", "s", "b", "m", "v"], ["2"], "3"),
        node("Tanh", ["2"], ["::t"], "n::x"),
        node("Conv", ["::t", "gw", "gb"], ["g/out"], "g c", group=4, pads=[1, 1, 1, 1]),
        node("Concat", ["::t", "g/out"], ["cat 1"], "", axis=1),
        node("GlobalAveragePool", ["cat 1"], ["gap"]),
        node("Conv", ["gap", "se1"], ["q"]),
        node("Relu", ["q"], ["q2"]),
        node("Conv", ["q2", "se2", "se2b"], ["q3"]),
        node("Sigmoid", ["q3"], ["q4"]),
        node("Mul", ["cat 1", "q4"], ["se:out"]),
        node("Flatten", ["se:out"], ["flat"]),
        node("Gemm", ["flat", "fc", "fcb"], [FINAL], transB=1),
        node("Softmax", [FINAL], ["prob/0"], "sm", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "mixed",
        [helper.make_tensor_value_info("1::img/0", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("prob/0", TensorProto.FLOAT, [1, 5])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(scope="module")
def model(folder):
    return write_model(folder / "mixed.onnx")


@pytest.fixture
def sartor(capsys, monkeypatch):
    """Runs a command with --json; checks the exit code and that stdout is one document."""
    monkeypatch.setenv("CI", "1")

    def run(*arguments, code=0):
        observed = main([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        assert observed == code, captured.err
        assert captured.out.count("\n") == 1
        return json.loads(captured.out)

    return run


@pytest.fixture(scope="module")
def canon(folder, model):
    path = folder / "canon.onnx"
    assert main(["capture", str(model), "-o", str(path)]) == 0
    return path


def infer(model, batch, outputs=(FINAL,), seed=0):
    """Values before the Softmax, by ONNX Runtime without its optimizer."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    declared = {value.name for value in model.graph.output}
    for name in outputs:
        if name not in declared:
            model.graph.output.append(helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    x = np.random.default_rng(seed).standard_normal((batch, 3, 8, 8)).astype(np.float32)
    return session.run(list(outputs), {"1::img/0": x})


def tensors(model):
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def relative(a, b):
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(a).max())


def without_weights(model):
    model = onnx.ModelProto.FromString(model.SerializeToString())
    del model.graph.initializer[:]
    return model.SerializeToString(deterministic=True)


# ---- capture ---------------------------------------------------------------------------------------
def test_canon_equals_model_at_every_batch_and_is_the_same_bytes_twice(sartor, model, canon, tmp_path):
    sartor("capture", model, "-o", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == canon.read_bytes()
    original, captured = onnx.load(model), onnx.load(canon)
    assert relative(infer(original, 1)[0], infer(captured, 1)[0]) < 1e-5
    whole = infer(captured, 3)[0]
    assert whole.shape == (3, 5)
    document = sartor("verify", model, canon)
    assert document["passed"] and document["first_divergent_node"] is None


# ---- apply: anyone can check a plan with ONNX Runtime alone ------------------------------------------
@pytest.mark.parametrize(("ratio", "seed"), [(0.5, 3), (0.3, 1), (0.9, 2)])
def test_pruned_equals_masked_and_masked_differs_from_canon_by_the_listed_zeros(
    sartor, model, canon, tmp_path, ratio, seed
):
    out, again, mask, plan = (tmp_path / n for n in ("out.onnx", "again.onnx", "mask.onnx", "plan.json"))
    sartor("run", model, "--passes", RANDOM.format(ratio=ratio, seed=seed), "-o", out, "--plan-out", plan)
    applied = sartor("apply", model, plan, "-o", again, "--masked", mask)
    assert out.read_bytes() == again.read_bytes()
    first = (again.read_bytes(), mask.read_bytes())
    sartor("apply", model, plan, "-o", again, "--masked", mask)
    assert first == (again.read_bytes(), mask.read_bytes())

    small, masked, original = onnx.load(out), onnx.load(mask), onnx.load(canon)
    for batch in (1, 5):
        assert relative(infer(masked, batch)[0], infer(small, batch)[0]) < 1e-5
    assert without_weights(masked) == without_weights(original)
    expected = tensors(original)
    for zeros in applied["zeroed"]:
        assert set(zeros) == {"initializer", "axis", "indices"}
        place = [slice(None)] * expected[zeros["initializer"]].ndim
        place[zeros["axis"]] = zeros["indices"]
        expected[zeros["initializer"]] = expected[zeros["initializer"]].copy()
        expected[zeros["initializer"]][tuple(place)] = 0
    observed = tensors(masked)
    assert set(observed) == set(expected)
    assert all(np.array_equal(observed[name], expected[name]) for name in expected)
    # The comparison above can fail: MASKED is not the original, and not nearly.
    assert relative(infer(original, 5)[0], infer(masked, 5)[0]) > 1e-2

    kept = {name: len(group["keep"]) for name, group in json.loads(plan.read_text())["groups"].items()}
    for group in sartor("inspect", model)["groups"]:
        removed = min(int(group["size"] * ratio + 1e-9), group["size"] - 1)
        assert kept.get(group["name"], group["size"]) == group["size"] - removed


def test_plans_for_another_source_or_with_rounded_indices_are_refused(sartor, model, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "out" / "out.onnx"
    sartor(
        "run",
        model,
        "--passes",
        RANDOM.format(ratio=0.5, seed=0),
        "-o",
        tmp_path / "a.onnx",
        "--plan-out",
        plan,
    )
    other = write_model(tmp_path / "other.onnx", seed=6)
    assert "SHA-256" in sartor("apply", other, plan, "-o", out, code=2)["error"]
    document = json.loads(plan.read_text())
    name, group = next(iter(document["groups"].items()))
    for keep in ([0.5], [False], ["0"], "0", [-1], [group["size"]], [1, 0], [0, 0], []):
        document["groups"][name] = {"size": group["size"], "keep": keep}
        plan.write_text(json.dumps(document))
        sartor("apply", model, plan, "-o", out, code=2)
    plan.write_text("[" * 100_000)
    sartor("apply", model, plan, "-o", out, code=2)
    assert not out.parent.exists()


# ---- inspect ---------------------------------------------------------------------------------------
def test_inspect_agrees_with_counting_by_hand(sartor, model, canon):
    document = sartor("inspect", model)
    assert (
        document["schema"] == "sartor.inspect/1" and document["ops"]["Conv"] == 4 and document["blocks"] == []
    )
    first, grouped, gates, dense = 12 * 27 * 64, 16 * 27 * 64, 2 * 7 * 28, 5 * 28 * 64
    assert document["macs"] == first + grouped + gates + dense
    weights = tensors(onnx.load(canon))
    assert document["weight_bytes"] == sum(w.nbytes for w in weights.values())
    assert document["parameters"] == sum(w.size for w in weights.values() if w.dtype == np.float32) - 24
    assert document["peak_activation_bytes"] == peak(onnx.load(canon))
    for group in document["groups"]:
        assert 0 < group["macs_share"] <= 1 and group["granularity"] >= 1
        for member in group["members"]:
            if "initializer" in member:
                assert len(member["index_map"]) == weights[member["initializer"]].shape[member["axis"]]
            assert max(member["index_map"]) < group["size"] and min(member["index_map"]) >= -1
    assert all(set(b) == {"value", "axis", "reason", "source"} and b["reason"] for b in document["blocked"])


def peak(model):
    """Largest sum of live activations in node order: inputs and outputs throughout, nothing in place."""
    nodes, constants = model.graph.node, {t.name for t in model.graph.initializer}
    names = [o for n in nodes for o in n.output]
    sizes = {n: v.nbytes for n, v in zip(names, infer(model, 1, names), strict=True)}
    kept = {value.name for value in model.graph.output}
    last = {name: i for i, node in enumerate(nodes) for name in node.input if name not in constants}
    live, most = {"1::img/0": 4 * 3 * 64}, 0
    for i, node in enumerate(nodes):
        live |= {name: sizes[name] for name in node.output}
        most = max(most, sum(live.values()))
        live = {k: v for k, v in live.items() if k in kept or k == "1::img/0" or last.get(k, -1) > i}
    return most


# ---- refusals --------------------------------------------------------------------------------------
FIT = ["fit", "MODEL", "--target", "onnxruntime", "--recovery", "none", "--out", "OUT", "--budget"]
REFUSED = {
    "more threads than processors": [*FIT, "macs=0.6x", "--threads", "100000"],
    "seed below 0": [*FIT, "macs=0.6x", "--seed", "-1"],
    "one file for two outputs": ["apply", "MODEL", "PLAN", "-o", "OUT/a", "--masked", "OUT/./a"],
    "a file system that refuses": ["capture", "MODEL", "-o", "/proc/x.onnx"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, sartor, model, tmp_path):
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    if "PLAN" in REFUSED[case]:
        sartor(
            "run",
            model,
            "--passes",
            RANDOM.format(ratio=0.5, seed=0),
            "-o",
            tmp_path / "a",
            "--plan-out",
            plan,
        )
    names = {"MODEL": str(model), "OUT": str(out), "PLAN": str(plan)}
    arguments = [names.get(a, a.replace("OUT", str(out))) for a in REFUSED[case]]
    document = sartor(*arguments, code=2)
    assert document["exit_code"] == 2 and "\n" not in document["error"]
    assert not out.exists()


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(UsageError, match="up to 5, but output 'y' has 5 classes"):
        score(lambda inputs: {"y": np.zeros((2, 5))}, [({"x": np.zeros((2, 1))}, np.array([0, 5]))])
    with pytest.raises(UsageError, match="down to -1, but output 'y' has 5 classes"):
        score(lambda inputs: {"y": np.eye(2, 5)}, [({"x": np.zeros((2, 1))}, np.array([0, -1]))])


# ---- fit -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def wide(folder):
    return write_model(folder / "wide.onnx", widths=(48, 64, 16))


@pytest.fixture
def fit(capsys, wide, folder, tmp_path, monkeypatch):
    """Runs a fit of `wide` in a folder of its own, measuring for seconds; returns (exit code, report, bundle)."""
    limits = {"_TABLE_S": 1.5, "_SELECT_S": 1.0, "_BASELINE_S": 0.5, "_FINAL_S": 2.0}
    for name, seconds in limits.items():
        module = importlib.import_module(
            "sartor.selection" if name in ("_TABLE_S", "_SELECT_S") else "sartor.fit"
        )
        monkeypatch.setattr(module, name, seconds)
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(budget, *options):
        out = folder / budget.partition("=")[0]
        arguments = [
            "fit",
            wide,
            "--target",
            "onnxruntime",
            "--budget",
            budget,
            *options,
            "--out",
            out,
            "--json",
        ]
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert captured.out.count("\n") == 1, captured.err
        return code, json.loads(captured.out), out

    return run


def check_bundle(sartor, wide, bundle, report, tmp_path):
    """What every bundle promises, whatever the status."""
    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    expected = {
        "model.onnx",
        "plan.json",
        "report.json",
        "report.html",
        "manifest.json",
        "pruned.onnx",
        "masked.onnx",
    }
    assert names >= expected and any(name.startswith("artifact/") for name in names)
    assert json.loads((bundle / "report.json").read_text()) == report
    out, mask = tmp_path / "pruned.onnx", tmp_path / "masked.onnx"
    sartor("apply", wide, bundle / "plan.json", "-o", out, "--masked", mask)
    assert out.read_bytes() == (bundle / "pruned.onnx").read_bytes()
    assert mask.read_bytes() == (bundle / "masked.onnx").read_bytes()
    pruned, final = onnx.load(out), onnx.load(bundle / "model.onnx")
    assert without_weights(pruned) == without_weights(final)
    assert {n: w.shape for n, w in tensors(pruned).items()} == {n: w.shape for n, w in tensors(final).items()}
    for side in ("baseline", "result"):
        assert set(report[side]["latency_s"]) == {"median", "p10", "p90"}
        counts = ("macs", "parameters", "weight_bytes", "peak_activation_bytes")
        assert all(isinstance(report[side][key], int) for key in counts)
    oracle = report["oracle"]
    assert oracle["verdict"] == "passed" and oracle["max_rel_error"] <= oracle["tolerance"]
    for step in report["history"]:
        assert {"step", "change", "predicted_latency_s"} <= set(step)
    for path in bundle.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for private in (
                str(wide.parent),
                str(tmp_path),
                str(Path(__file__).parent),
                os.path.expanduser("~"),
            ):
                assert private.encode() not in content, (path.name, private)


def test_fit_to_macs_with_labels_and_recovery(sartor, fit, wide, tmp_path):
    x = np.random.default_rng(0).normal(0.0, 3.0, (320, 3, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(wide))
    labels = np.array([session.run(None, {"1::img/0": one[None]})[0].argmax() for one in x])
    assert np.bincount(labels).max() < 0.7 * len(labels)  # no constant answer is right
    np.savez(tmp_path / "data.npz", **{"1::img/0": x, "labels": labels})
    options = ("--data", tmp_path / "data.npz", "--recovery", "minutes=0.03", "--max-drop", "0")
    code, report, bundle = fit("macs=0.6x", *options)
    check_bundle(sartor, wide, bundle, report, tmp_path)
    assert report["result"]["macs"] <= 0.6 * report["baseline"]["macs"]
    assert report["result"]["macs"] == sartor("inspect", bundle / "model.onnx")["macs"]
    assert report["baseline"]["score"] == 1.0 and report["baseline"]["score_n"] == 48
    lost = report["result"]["score"] < 1.0
    assert (code, report["status"]) == ((4, "quality-missed") if lost else (0, "met"))
    assert report["quality"] == ("missed" if lost else "kept")


def test_fit_to_latency_without_data(sartor, fit, wide, tmp_path):
    code, report, bundle = fit("latency=0.7x", "--recovery", "none")
    check_bundle(sartor, wide, bundle, report, tmp_path)
    low, high = report["ratio"]["latency_ci95"]
    assert low <= report["ratio"]["latency"] <= high
    assert (code, report["status"]) == ((0, "met") if high <= 0.7 else (3, "budget-missed"))
    assert report["ratio"]["latency"] < 0.9  # a timing, but far from the limit
    assert report["quality"] == "unmeasured" and "score" not in report["result"]
    assert (bundle / "pruned.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()


def test_a_budget_below_the_floor_writes_nothing(fit, monkeypatch):
    monkeypatch.setattr(
        "sartor.backends.measure.measure", None
    )  # the graph alone says so: nothing is measured
    code, document, out = fit("weight_bytes=100", "--recovery", "none")
    assert code == 2 and "floor" in document["error"]
    assert not out.exists()


def test_apply_writes_all_or_nothing(sartor, canon, tmp_path):
    plan = tmp_path / "plan.json"
    sartor("run", canon, "--passes", "prune-channels{ratio=1}", "-o", tmp_path / "o.onnx", "--plan-out", plan)
    groups = json.loads(plan.read_text())["groups"]
    assert groups and all(len(entry["keep"]) >= 1 for entry in groups.values())  # a unit stays at ratio 1
    (tmp_path / "folder.onnx").mkdir()
    out = tmp_path / "second.onnx"
    sartor("apply", canon, plan, "-o", out, "--masked", tmp_path / "folder.onnx", code=2)
    assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
