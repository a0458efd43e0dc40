"""The command line: parsing, exit codes, purity of stdout, and each command on a tiny model."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from processes import children, ends

from sartor.budget import Limit, parse_budget
from sartor.cli import main
from sartor.cli.fit import parse_recovery
from sartor.cli.main import COMMANDS
from sartor.cli.progress import Progress
from sartor.errors import UsageError

RNG = np.random.default_rng(0)


def weights(name, *shape, scale=0.3):
    return numpy_helper.from_array((scale * RNG.standard_normal(shape)).astype(np.float32), name)


def tiny(path, softmax=True, change=None, batch="N", opset=18):
    """conv 3→8, batch norm, relu, conv 8→6, flatten, gemm → 4, softmax."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state
    tensors = [
        weights("conv1.weight", 8, 3, 3, 3),
        weights("bn.scale", 8), weights("bn.bias", 8), weights("bn.mean", 8),
        numpy_helper.from_array(RNG.uniform(0.5, 1.5, 8).astype(np.float32), "bn.var"),
        weights("conv2.weight", 6, 8, 3, 3), weights("conv2.bias", 6),
        weights("fc.weight", 4, 6 * 4 * 4), weights("fc.bias", 4),
    ]  # fmt: skip
    for tensor in tensors:
        if change is not None and tensor.name == change[0]:
            moved = numpy_helper.to_array(tensor) + np.float32(change[1])
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    logits = "logits" if softmax else "y"
    nodes = [
        helper.make_node("Conv", ["x", "conv1.weight"], ["c1"], "conv1"),
        helper.make_node(
            "BatchNormalization", ["c1", "bn.scale", "bn.bias", "bn.mean", "bn.var"], ["b1"], "bn"
        ),
        helper.make_node("Relu", ["b1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "conv2.weight", "conv2.bias"], ["c2"], "conv2"),
        helper.make_node("Flatten", ["c2"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "fc.weight", "fc.bias"], [logits], "fc", transB=1),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["logits"], ["y"], "softmax"))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, str(path))
    return str(path)


@pytest.fixture
def model(tmp_path):
    return tiny(tmp_path / "tiny.onnx")


@pytest.fixture
def sartor(capsys, monkeypatch):
    """Runs a command in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("CI", "1")

    def run(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def document(sartor, *arguments, code=0):
    observed, out, err = sartor(*arguments, "--json")
    assert observed == code, err
    return json.loads(out)


# ---- errors ----------------------------------------------------------------------------------------
BAD = {
    "no command": [],
    "unknown command": ["prune"],
    "unknown option": ["capture", "MODEL", "-o", "OUT", "--fast"],
    "missing option": ["capture", "MODEL"],
    "missing model": ["capture", "DIR/none.onnx", "-o", "OUT"],
    "not ONNX": ["capture", "DIR/text.onnx", "-o", "OUT"],
    "empty file": ["capture", "DIR/empty.onnx", "-o", "OUT"],
    "truncated": ["capture", "DIR/truncated.onnx", "-o", "OUT"],
    "module file without function": ["capture", "DIR/source.py", "-o", "OUT"],
    "missing function": ["capture", "DIR/source.py:nothing", "-o", "OUT"],
    "malformed shape": ["capture", "MODEL", "-o", "OUT", "--shape", "x:1,3,8,8"],
    "shape of no input": ["capture", "MODEL", "-o", "OUT", "--shape", "z=1,3,8,8"],
    "shape of another rank": ["capture", "MODEL", "-o", "OUT", "--shape", "x=1,3,8"],
    "output is a folder": ["capture", "MODEL", "-o", "DIR"],
    "unknown pass": ["run", "MODEL", "--passes", "fold-batchnorm", "-o", "OUT"],
    "pipeline syntax": ["run", "MODEL", "--passes", "fold-batch-norm{", "-o", "OUT"],
    "plan for a pipeline without one": [
        "run", "MODEL", "--passes", "fold-batch-norm", "-o", "OUT", "--plan-out", "OUT2",
    ],
    "missing plan": ["apply", "MODEL", "DIR/none.json", "-o", "OUT"],
    "unknown target": ["lower", "MODEL", "--target", "abacus", "-o", "OUT"],
    "bad thread count": ["measure", "MODEL", "--target", "onnxruntime", "--threads", "0"],
    "unknown precision": ["measure", "MODEL", "--target", "onnxruntime", "--precision", "f33"],
    "unsupported precision": [
        "lower", "MODEL", "--target", "onnxruntime", "--precision", "int8", "-o", "OUT",
    ],
    "verify without a file": ["verify", "MODEL", "DIR/none.onnx"],
    "verify other inputs": ["verify", "MODEL", "DIR/other.onnx"],
    "no report": ["report", "DIR"],
    "fit: unknown target": ["fit", "MODEL", "--target", "abacus", "--budget", "latency=0.5x", "--out", "OUT"],
    "fit: unknown budget key": [
        "fit", "MODEL", "--target", "onnxruntime", "--budget", "watts=0.5x", "--recovery", "none",
        "--out", "OUT",
    ],
    "fit: no data and no word about it": [
        "fit", "MODEL", "--target", "onnxruntime", "--budget", "latency=0.5x", "--out", "OUT",
    ],
    "fit: missing data": [
        "fit", "MODEL", "--target", "onnxruntime", "--budget", "latency=0.5x", "--data", "DIR/none.npz",
        "--out", "OUT",
    ],
    "fit: wrong element type": [
        "fit", "MODEL", "--target", "onnxruntime", "--budget", "latency=0.5x", "--data", "DIR/wide.npz",
        "--out", "OUT",
    ],
    "fit: recovery": [
        "fit", "MODEL", "--target", "onnxruntime", "--budget", "latency=0.5x", "--recovery", "hours=1",
        "--data", "DIR/wide.npz", "--out", "OUT",
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(case, tmp_path, sartor):
    folder = tmp_path / "in"
    folder.mkdir()
    path = tiny(folder / "tiny.onnx")
    (folder / "text.onnx").write_text("this is not a model\n" * 20)
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "truncated.onnx").write_bytes((folder / "tiny.onnx").read_bytes()[:900])
    (folder / "source.py").write_text("def make(): pass\n")
    np.savez(folder / "wide.npz", x=np.zeros((20, 3, 8, 8)))
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])
    graph = helper.make_graph([helper.make_node("Relu", ["z"], ["y"])], "g", [value], [out])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        str(folder / "other.onnx"),
    )
    outputs = tmp_path / "out"
    outputs.mkdir()
    places = {"MODEL": path, "OUT": str(outputs / "result"), "OUT2": str(outputs / "plan.json")}
    before = sorted(p.name for p in folder.iterdir())
    arguments = [places.get(a, a.replace("DIR", str(folder))) for a in BAD[case]]
    for as_json in ([], ["--json"]):
        code, out_text, err = sartor(*arguments, *as_json)
        assert code == 2, err
        assert err.startswith("sartor: error: ") and err.count("\n") == 1 and err.endswith("\n")
        if as_json:
            assert json.loads(out_text) == {
                "schema": "sartor.error/1",
                "error": err.removeprefix("sartor: error: ").rstrip("\n"),
                "exit_code": 2,
            }
        else:
            assert out_text == ""
    assert list(outputs.iterdir()) == []
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == before


def test_a_bug_of_ours_is_exit_70_with_a_traceback_only_on_request(sartor, model, monkeypatch):
    import sartor.cli.targets as command

    def broken(options):
        raise KeyError("lost")

    monkeypatch.setattr(command, "run", broken)
    code, out, err = sartor("targets")
    assert code == 70 and out == "" and "KeyError" in err and "report it" in err and "Traceback" not in err
    code, out, err = sartor("targets", "--debug", "--json")
    assert code == 70 and "Traceback" in err and json.loads(out)["exit_code"] == 70

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    code, _, err = sartor("targets")
    assert code == 130 and err == "sartor: error: Interrupted.\n"


def test_leaving_on_purpose_is_not_possible(sartor, monkeypatch):
    import sartor.cli.targets as command

    for value in (0, 3, None):
        monkeypatch.setattr(command, "run", lambda options, value=value: sys.exit(value))
        code, out, err = sartor("targets")
        assert code == 2 and out == "" and f"called sys.exit({value})" in err


def test_sigterm_cleans_up_and_ends_the_worker(model, tmp_path):
    """The same way out as Ctrl-C, also for `timeout`, service managers and `kill`."""
    (tmp_path / "tmp").mkdir()
    command = [
        sys.executable,
        "-m",
        "sartor",
        "measure",
        model,
        "--target",
        "onnxruntime",
        "--time-limit",
        "60",
    ]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen([*command, "--json"], env=environment, stdout=-1, stderr=-1, text=True)
    deadline = time.monotonic() + 20
    while not list((tmp_path / "tmp").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)  # the first child may be a look at the machine
    workers = children(process.pid)
    assert list((tmp_path / "tmp").iterdir()) and workers
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 143 and "sartor: error: Terminated.\n" in err
    assert json.loads(out)["exit_code"] == 143
    assert list((tmp_path / "tmp").iterdir()) == []
    assert all(ends(worker) for worker in workers)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(command, sartor):
    code, out, _ = sartor(command, "--help")
    assert code == 0 and f"sartor {command}" in out.split("example:")[1] and "--json" in out
    code, out, _ = sartor("--help")
    assert code == 0 and command in out


def test_examples_in_help_parse():
    import importlib
    import shlex

    from sartor.cli.main import build_parser

    for command in COMMANDS:
        example = shlex.split(importlib.import_module(f"sartor.cli.{command}").EXAMPLE)
        assert example[0] == "sartor"
        assert build_parser(command).parse_args(example[1:]).command == command


def test_stdout_is_pure_whatever_writes_to_the_descriptor(tmp_path, model):
    code = (
        "import os, sys\n"
        "from sartor.cli import main\n"
        "import sartor.cli.targets as targets\n"
        "from sartor.cli.output import Result\n"
        "def run(options):\n"
        "    print('python noise'); os.write(1, b'native noise\\n'); os.system('echo child noise')\n"
        "    return Result({'schema': 'x'}, 'text', 3)\n"
        "targets.run = run\n"
        "code = main(['targets', '--json'])\n"
        "print('after')\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    parsed, end = json.JSONDecoder().raw_decode(done.stdout)
    assert parsed == {"schema": "x"} and done.stdout[end:].split() == ["after"]
    assert all(f"{kind} noise" in done.stderr for kind in ("python", "native", "child"))


def test_closed_pipe_is_quiet():
    command = f"{sys.executable} -m sartor targets --json | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


# ---- budget, recovery, shapes, progress --------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("latency=0.5x", {"latency": Limit(0.5, True)}),
        ("latency=12ms", {"latency": Limit(0.012, False)}),
        ("latency=1.2s,macs=0.3X", {"latency": Limit(1.2, False), "macs": Limit(0.3, True)}),
        ("macs=1200000", {"macs": Limit(1.2e6, False)}),
        ("macs=1.2G", {"macs": Limit(1.2e9, False)}),
        ("weight_bytes=4MB", {"weight_bytes": Limit(4e6, False)}),
        ("weight_bytes=4MiB", {"weight_bytes": Limit(4 * 2**20, False)}),
        ("peak_activation_bytes=1e5", {"peak_activation_bytes": Limit(1e5, False)}),
    ],
)
def test_budgets(text, expected):
    parsed = parse_budget(text)
    assert parsed.keys() == expected.keys()
    for key, limit in expected.items():
        assert parsed[key].relative == limit.relative and parsed[key].value == pytest.approx(limit.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "malformed"), ("latency", "malformed"), ("latency=", "malformed"), ("latency=fast", "malformed"),
        ("latency=-1ms", "malformed"), ("latency=0x", "not a positive"), ("latency=12", "no unit"),
        ("latency=12MB", "unknown unit"), ("macs=3ms", "unknown unit"), ("energy=1J", "Unknown budget key"),
        ("latency=1ms,latency=2ms", "twice"), ("latency=1ms,", "malformed"), ("latency=nanx", "malformed"),
        ("latency=1e999x", "not a positive"),
    ],
)  # fmt: skip
def test_bad_budgets(text, message):
    with pytest.raises(UsageError, match=message):
        parse_budget(text)


def test_budget_limit_scales_the_baseline():
    assert parse_budget("latency=0.5x")["latency"].absolute(0.004) == pytest.approx(0.002)
    assert parse_budget("latency=3ms")["latency"].absolute(0.004) == pytest.approx(0.003)


def test_recovery():
    assert parse_recovery("minutes=1.5", True) == (90.0, {}) and parse_recovery("none", False) == (0.0, {})
    assert parse_recovery(None, True) == (300.0, {})
    text = "minutes=2,teacher=wrong,temperature=4,features=0.5,rat=0.75,precision=bf16"
    found = {"teacher": "wrong", "temperature": 4.0, "features": 0.5, "rat": 0.75, "precision": "bf16"}
    assert parse_recovery(text, True) == (120.0, found)
    assert parse_recovery("teacher=never,minutes=1", True) == (60.0, {"teacher": "never"})
    for text, has_data in ((None, False), ("minutes=1", False)):
        with pytest.raises(UsageError, match="--data"):
            parse_recovery(text, has_data)
    with pytest.raises(UsageError, match="does not say how long; add minutes=M"):
        parse_recovery("teacher=never", True)


@pytest.mark.parametrize(
    "text",
    [
        "minutes=0",
        "later",
        "minutes=1,",
        "minutes=1,minutes=2",
        "minutes=nan",
        "minutes=1;teacher=never",
        "none,minutes=1",
    ]
    + [
        f"minutes=1,{part}"
        for part in ("teacher=maybe", "temperature=0", "features=-1", "rat=0", "rat=1.5", "rat")
    ]
    + [
        f"minutes=1,{part}"
        for part in ("precision=f16", "steps=3", "learning_rate=1", "Teacher=never", " rat=0.5")
    ],
)
def test_malformed_recovery(text):
    with pytest.raises(UsageError, match=r"is malformed at .*; expected none, or minutes=M"):
        parse_recovery(text, True)


def test_progress_draws_bars_lines_or_nothing(monkeypatch):
    import io

    def drawn(mode):
        stream = io.StringIO()
        with Progress(stream, mode) as progress:
            progress.stage("measuring", total=2)
            progress.advance(2)
            progress("pruning")
        return stream.getvalue()

    assert drawn("silent") == ""
    assert drawn("lines") == "measuring\npruning\n"
    assert "[########################] 2/2" in drawn("bar") and "\r" in drawn("bar")
    monkeypatch.setenv("CI", "true")
    assert Progress.on_stderr()._mode == "silent"
    monkeypatch.delenv("CI")
    assert Progress.on_stderr()._mode == "lines"


# ---- verify ----------------------------------------------------------------------------------------
def test_verify_passes_on_equal_models(sartor, model, tmp_path):
    other = tiny(tmp_path / "copy.onnx", batch=1)
    result = document(sartor, "verify", model, other)
    assert result["passed"] and result["max_rel_error"] == 0.0 and result["first_divergent_node"] is None
    assert set(result["compared"]) == {"y", "logits"}, "also before the final Softmax"


def test_verify_names_the_first_node_that_differs(sartor, model, tmp_path):
    other = tiny(tmp_path / "changed.onnx", change=("conv2.bias", 0.5))
    result = document(sartor, "verify", model, other, code=5)
    assert not result["passed"] and result["first_divergent_node"] == "conv2"
    code, out, _ = sartor("verify", model, other)
    assert code == 5 and "DIFFERENT" in out and "'conv2'" in out


def test_verify_looks_before_the_softmax(sartor, tmp_path):
    """A shift of all logits is invisible behind a Softmax; it must be seen all the same."""
    a = tiny(tmp_path / "a.onnx")
    b = tiny(tmp_path / "b.onnx", change=("fc.bias", 100.0))
    result = document(sartor, "verify", a, b, code=5)
    assert result["worst"] == "logits" and result["first_divergent_node"] == "fc"


def test_verify_tolerance_shape_and_nan(sartor, tmp_path):
    a = tiny(tmp_path / "a.onnx", softmax=False)
    b = tiny(tmp_path / "b.onnx", softmax=False, change=("fc.bias", 1e-3))
    assert document(sartor, "verify", a, b, "--tolerance", "0.1", "--shape", "x=5,3,8,8")["passed"]
    assert not document(sartor, "verify", a, b, "--tolerance", "1e-6", code=5)["passed"]
    c = tiny(tmp_path / "c.onnx", softmax=False, change=("fc.bias", np.nan))
    result = document(sartor, "verify", a, c, code=5)
    assert result["max_rel_error"] is None and not result["passed"] and result["first_divergent_node"] == "fc"
    assert not document(sartor, "verify", c, c, code=5)["passed"], "NaN equals nothing"


# ---- commands on a tiny model ------------------------------------------------------------------------
def run_onnx(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_capture_keeps_the_function_and_names_no_folder(sartor, model, tmp_path):
    out = tmp_path / "canon.onnx"
    result = document(sartor, "capture", model, "-o", out, "--keep-source")
    assert result["batch"] == {"symbolic": True, "reason": ""} and result["inputs"] == {"x": [1, 3, 8, 8]}
    assert [f["file"] for f in result["files"]] == ["canon.onnx", "canon.onnx.provenance.json"]
    x = np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run_onnx(out, x), run_onnx(model, x), rtol=1e-5, atol=1e-6)
    for path in (out, tmp_path / "canon.onnx.provenance.json"):
        content = path.read_bytes()
        assert (
            str(tmp_path).encode() not in content and os.path.expanduser("~").encode() + b"/" not in content
        )


def test_run_applies_passes_and_reports_them(sartor, model, tmp_path):
    out = tmp_path / "folded.onnx"
    result = document(sartor, "run", model, "--passes", "fold-batch-norm,remove-dead", "-o", out)
    assert [s["modified"] for s in result["steps"]] == [True, False]
    assert "BatchNormalization" not in [n.op_type for n in onnx.load(str(out)).graph.node]
    assert document(sartor, "verify", model, out)["passed"]


def test_inspect_counts_and_groups(sartor, model):
    result = document(sartor, "inspect", model)
    assert result["ops"]["Conv"] == 2 and result["macs"] == 8 * 27 * 36 + 6 * 72 * 16 + 96 * 4
    assert result["parameters"] == 8 * 27 + 16 + 6 * 72 + 6 + 384 + 4
    group = next(g for g in result["groups"] if g["size"] == 8)
    roles = {(m["initializer"], m["axis"]): m["role"] for m in group["members"]}
    assert roles["conv1.weight", 0] == "producer" and roles["conv2.weight", 1] == "consumer"
    assert roles["bn.mean", 0] == "affine" and 0 < group["macs_share"] < 1
    flat = next(g for g in result["groups"] if g["size"] == 6)
    last = next(m for m in flat["members"] if m["initializer"] == "fc.weight")
    assert last["index_map"] == [unit for unit in range(6) for _ in range(16)]
    code, out, _ = sartor("inspect", model, "--keep", "conv1*")
    assert code == 0 and "blocked value" in out and "--keep 'conv1*'" in out


def test_prune_replay_and_mask(sartor, model, tmp_path):
    plan, out, again, masked = (tmp_path / n for n in ("plan.json", "a.onnx", "b.onnx", "masked.onnx"))
    passes = "prune-channels{ratio=0.5,criterion=random,seed=3}"
    document(sartor, "run", model, "--passes", passes, "-o", out, "--plan-out", plan)
    result = document(sartor, "apply", model, plan, "-o", again, "--masked", masked)
    assert out.read_bytes() == again.read_bytes(), "a plan is replayed byte-identically"
    assert result["zeroed"] and {"initializer", "axis", "indices"} == set(result["zeroed"][0])
    assert document(sartor, "verify", masked, again)["passed"]
    assert not document(sartor, "verify", model, again, code=5)["passed"]
    other = tiny(tmp_path / "other.onnx", change=("fc.bias", 1.0))
    code, _, err = sartor("apply", other, plan, "-o", tmp_path / "no.onnx")
    assert code == 2 and not (tmp_path / "no.onnx").exists(), err


def test_lower_measure_and_targets(sartor, model, tmp_path):
    names = {t["name"] for t in document(sartor, "targets")["targets"]}
    assert {"onnxruntime", "openvino"} <= names
    assert document(sartor, "targets", "onnxruntime")["targets"][0]["available"]
    folder = tmp_path / "artifact"
    assert document(sartor, "lower", model, "--target", "onnxruntime", "-o", folder)["precision"] == "f32"
    assert (folder / "artifact.json").is_file()
    small = tiny(tmp_path / "other.onnx", softmax=False)
    result = document(
        sartor, "measure", small, "--against", model, "--target", "onnxruntime", "--time-limit", "0.2"
    )
    assert result["schema"] == "sartor.measure/1" and len(result["rounds"]) >= 6
    assert result["model"]["name"] == "other.onnx" and result["against"]["name"] == "tiny.onnx"
    low, high = result["ratio"]["latency_ci95"]
    assert low <= result["ratio"]["latency"] <= high


def test_report_is_written_again(sartor, tmp_path):
    from test_report import report

    (tmp_path / "report.json").write_text(json.dumps(report()))
    code, out, _ = sartor("report", tmp_path)
    assert code == 0 and "Budget met" in out and (tmp_path / "report.html").is_file()
    assert document(sartor, "report", tmp_path)["schema"] == "sartor.report/1"
