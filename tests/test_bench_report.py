"""Reports of `sartor bench`: files, the command, and results from elsewhere."""

from __future__ import annotations

import copy
import hashlib
import json

import numpy as np
import pytest
from bench_fixtures import filled, named, report_fixture, rows_of, stored, vendor_fixture  # noqa: F401
from builders import node, program_from_nodes

from sartor import backends
from sartor.backends.protocol import TargetOptions
from sartor.bench import read_report, write_report
from sartor.bench.preparation import describe
from sartor.bench.protocol import Settings
from sartor.bench.vendor import CONDITIONS, emit_config, merge, read_results
from sartor.cli import main
from sartor.errors import InternalError, UsageError
from sartor.report.bench_page import render
from sartor.report.bench_table import cells, summary


def test_results_from_elsewhere_are_merged_and_marked(report, tmp_path):
    merged = merge(report, read_results(stored(tmp_path, filled(report))))
    (row,) = rows_of(merged, "npu")
    flop = report["models"][0]["operations_flop"]
    assert row["state"] == "imported" and row["achieved_flop_per_s"] == pytest.approx(900 * flop)
    assert row["efficiency_samples_per_s_per_w"] == pytest.approx(300) and "departures" not in row
    assert len(merged["rows"]) == 5 and merged["imports"][0]["conditions"]["device"] == "said"
    assert "npu (imported)" in summary(merged) and "npu (imported)" in render(merged)
    quick = {"latency": {"mean_s": 1e-3, "runs": 5, "warm_up_runs": 10, "batch_samples": 1}}
    again = merge(merged, read_results(stored(tmp_path, filled(report, result=quick))))
    (row,) = rows_of(again, "npu")  # in place of the first
    assert row["departures"] == ["latency: 5 runs instead of 50"] and len(again["imports"]) == 1
    assert "5 runs instead of 50" in render(again)


LATENCY = {"mean_s": 2e-3, "runs": 50, "warm_up_runs": 10, "batch_samples": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "other/1"}, "schema 'other/1'"),
        ({"conditions": {"device": "x"}}, "lacks 'toolchain'"),
        ({"results": []}, "at least one result"),
        ({"extra": 1}, "'extra'"),
        ({"result": {"latency": {"mean_ms": 2.0, "runs": 50, "batch_samples": 1}}}, "lacks 'mean_s'"),
        ({"result": {"latency": LATENCY | {"mean_ms": 2.0}}}, "units are part of the keys"),
        ({"result": {"latency": LATENCY | {"mean_s": -1}}}, "greater than 0"),
        ({"result": {"latency": LATENCY | {"runs": 0}}}, "at least 1"),
        ({"result": {"latency": LATENCY | {"mean_s": "2 ms"}}}, "a finite number"),
        ({"result": {"latency": LATENCY | {"p10_s": 3.0, "p90_s": 1.0}}}, "do not rise"),
        ({"result": {"accuracy": {"score_fraction": 93.5, "samples": 10}}}, "from 0 to 1"),
        ({"result": {"precision": "int4"}}, "'precision' is 'int4'; expected one of f32"),
        ({"result": {"precision": ["f32"]}}, "'precision' is ['f32']"),
        ({"result": {"conversion_s": True}}, "greater than 0"),
        ({"result": {"conversion_s": 10**400}}, "greater than 0"),
        ({"result": {"latency": LATENCY | {"mean_s": 5e-324}}}, "greater than 0"),
        ({"result": {"latency": LATENCY | {"batch_samples": 10**400}}}, "and at most 1e+15"),
        ({"result": {"latency": [1]}}, "'latency' is [1]; expected an object"),
        ({"results": ["x" * 1000]}, "expected an object"),
        ({"result": {"sha256": "0" * 64}}, "with SHA-256 0000"),
        ({"result": {"model": "other"}}, "'other', which the report does not have"),
        ({"target": "planted"}, "was measured here"),
    ],
)  # fmt: skip
def test_wrong_results_are_refused_in_one_sentence(report, tmp_path, changes, message):
    write_report(report, tmp_path)
    before = (tmp_path / "bench.json").read_bytes()
    with pytest.raises(UsageError) as caught:
        merge(read_report(tmp_path), read_results(stored(tmp_path, filled(report, **changes))))
    assert message in str(caught.value) and len(str(caught.value)) < 500
    assert (tmp_path / "bench.json").read_bytes() == before


DAMAGES = (None, "x", "", -1, 10**400, 1e-320, True, [], {}, ["x"], {"x": {}})


def places(value, at=()):
    """Every place in a document, from the root downwards."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*at, key)
        yield from places(item, (*at, key))


def damaged(document, place, damage):
    """The document with the value at a place replaced, or gone."""
    changed = copy.deepcopy(document)
    *way, last = place
    holder = changed
    for key in way:
        holder = holder[key]
    if damage == "gone":
        del holder[last]
    else:
        holder[last] = damage
    return changed


@pytest.fixture(scope="module", name="rich")
def rich_fixture(report, tmp_path_factory):
    """A report with everything that one can have."""
    rich = copy.deepcopy(report)
    points = [(10**k, 1e-5 + 10**k / 1e10) for k in range(5, 9)]
    rich["rooflines"] = [
        {
            "target": "planted",
            "precision": "f32",
            "points": [
                {"name": f"p{flop}", "operations_flop": flop, "latency": {"median_s": s}}
                for flop, s in points
            ],
        }
    ]
    row = rows_of(rich, "planted")[0]
    row["accuracy"] = {"score_fraction": 0.5, "samples": 9, "split": "test", "compared_with": "labels"}
    row |= {"calibration": "data", "preparation_s": 1.0, "power": {"highest_w": 2.0, "sensor": "s"}}
    rich["protocol"] = dict(list(rich["protocol"].items())[:2])
    results = read_results(stored(tmp_path_factory.mktemp("results"), filled(report)))
    merged = merge(rich, results)
    assert "roofline" in rows_of(merged, "planted")[0]
    return merged


def test_a_damaged_report_is_refused_or_shown_and_never_a_bug(rich, report, tmp_path):
    more = read_results(stored(tmp_path, filled(report, target="other")))
    refused = shown = 0
    path = tmp_path / "bench.json"
    for index, place in enumerate(places(rich)):
        for damage in ("gone", DAMAGES[index % len(DAMAGES)], DAMAGES[(5 * index + 3) % len(DAMAGES)]):
            path.write_text(json.dumps(damaged(rich, place, damage)))
            try:
                merged = merge(read_report(tmp_path), more)
            except UsageError as error:
                assert len(str(error)) < 600, (place, damage)
                refused += 1
            else:
                assert summary(merged) and render(merged) and json.dumps(merged, allow_nan=False)
                shown += 1
    assert refused > 100 and shown > 100


def test_what_is_damaged_is_named(rich, tmp_path):
    path = tmp_path / "bench.json"
    for place, damage, message in (
        (("rows", 0, "model"), "other", "rows[0] is of model 'other', which is not in 'models'"),
        (("rows", 0, "latency", "batch_samples"), "gone", "rows[0]: 'latency' lacks 'batch_samples'"),
        (("rows", 0, "conversion_s"), 10**400, "rows[0]: 'conversion_s' is 1000000"),
        (("rooflines", 0, "points", 1, "latency"), {}, "points[1]: 'latency' lacks 'median_s'"),
    ):
        path.write_text(json.dumps(damaged(rich, place, damage)))
        with pytest.raises(UsageError) as caught:
            read_report(tmp_path)
        assert message in str(caught.value)


def test_what_departs_from_the_method_is_said(report):
    for text in (summary(report), render(report)):
        assert "the other two ends are departures" in text
    row = rows_of(report, "planted")[0]
    assert row["throughput"]["reason"] in cells(row)["throughput"][1]  # the note beside the number


def test_not_a_number_and_not_json_are_refused(tmp_path):
    path = tmp_path / "results.json"
    for text, message in (("{", "not valid JSON"), ('{"schema": NaN}', "NaN is not a number")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_results(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_results(tmp_path / "missing.json")


def test_a_configuration_has_what_a_measurement_elsewhere_needs(report, tmp_path):
    program = named("small", width=8)
    np.savez(tmp_path / "data.npz", x=np.zeros((20, 3, 16, 16), np.float32), labels=np.zeros(20, np.int64))
    settings = Settings(precisions=("f32", "int8"))
    emit_config([program], "npu", settings, tmp_path / "npu", data=str(tmp_path / "data.npz"))
    config = json.loads((tmp_path / "npu/config.json").read_text())
    (model,) = config["models"]
    content = (tmp_path / "npu" / model["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == model["sha256"] == describe(program)["sha256"]
    assert model["sha256"] == report["models"][0]["sha256"]  # so that results are taken
    calibration, test = (np.load(tmp_path / "npu" / model[f"{k}_file"]) for k in ("calibration", "test"))
    assert set(test.files) == {"x", "labels"} and set(calibration.files) == {"x"}
    assert config["measure"]["latency"] == {
        "batch_samples": 1, "warm_up_runs": 10, "runs": 50, "statistic": "mean_s"
    }  # fmt: skip
    readme = (tmp_path / "npu/README.md").read_text()
    assert "results.template.json" in readme and all(name in readme for name in CONDITIONS)
    template = tmp_path / "npu/results.template.json"
    assert len(json.loads(template.read_text())["results"]) == 2
    with pytest.raises(UsageError, match="conditions 'device' is ''"):
        read_results(template)  # it is to be filled in first
    with pytest.raises(UsageError, match="no name for a target"):
        emit_config([program], "../up", settings, tmp_path)


SCALED_DATA = """
import numpy as np

def splits(step={step}):
    return {{"evaluate": [
        ({{"x": np.ones((3, 2), "f"), "s": np.full((1, 2), 1 + i * step, "f")}}, None) for i in range(2)
    ]}}
"""


def test_an_input_without_samples_goes_out_once(tmp_path):
    inputs = {"x": ["N", 2], "s": [1, 2]}
    program = program_from_nodes([node("Mul", ["x", "s"], ["y"])], inputs, ["y"])
    (tmp_path / "same.py").write_text(SCALED_DATA.format(step=0))
    (tmp_path / "changes.py").write_text(SCALED_DATA.format(step=1))
    emit_config([program], "npu", Settings(), tmp_path / "npu", data=f"{tmp_path}/same.py:splits")
    (model,) = json.loads((tmp_path / "npu/config.json").read_text())["models"]
    test = np.load(tmp_path / "npu" / model["test_file"])
    assert test["x"].shape == (6, 2) and test["s"].shape == (1, 2)
    with pytest.raises(UsageError, match=r"Input 's' .* differs between batches"):
        emit_config([program], "npu", Settings(), tmp_path / "two", data=f"{tmp_path}/changes.py:splits")
    assert not (tmp_path / "two").exists()


def test_the_page_is_one_file_and_escapes_everything(report, tmp_path):
    evil = copy.deepcopy(report)
    evil["models"][0]["name"] = "<script>alert(1)</script>"
    for row in evil["rows"]:
        row["model"] = row["model"].replace("small", "<script>alert(1)</script>")
        row["reason"] = "<img src=x>"
    page = render(evil)
    assert "<script" not in page and "<img" not in page and "http" not in page.replace("http-equiv", "")
    assert "<svg" in page and "Content-Security-Policy" in page
    with pytest.raises(InternalError, match="cannot be written as JSON"):
        write_report(evil | {"number": float("nan")}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_have_their_units_in_their_names(report):
    units = (
        "_s", "_flop", "_flop_per_s", "_samples_per_s", "_w", "_bytes", "_samples", "_fraction", "_layers",
        "_channels", "_pixels", "macs", "parameters", "runs", "samples", "readings", "cores", "threads", "seed",
        "samples_per_s_per_w", "vertices", "cores_allowed",
    )  # fmt: skip

    def walk(value, key):
        if isinstance(value, dict):
            for name, item in value.items():
                walk(item, name)
        elif isinstance(value, list):
            for item in value:
                walk(item, key)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            seen.append(key)

    seen: list[str] = []
    for section in ("rows", "models", "parameters", "rooflines"):
        walk(
            [{**m, "input_shapes": {}} for m in report[section]] if section == "models" else report[section],
            "",
        )
    assert seen and not [key for key in seen if not key.endswith(units)]


@pytest.fixture
def model(tmp_path):
    return str(named(width=8).save(tmp_path / "net.onnx"))


def test_the_command_writes_a_report_and_imports_into_it(vendor, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")
    out = tmp_path / "out"
    limits = ["--time-limit", "1", "--batch-limit", "1", "--roofline-limit", "0"]
    assert main(["bench", "--models", model, "--targets", "planted,picky", *limits, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "10 runs to warm up, then 50 runs" in text and "bench.html" in text
    assert sorted(p.name for p in out.iterdir()) == ["bench.html", "bench.json"]
    report = read_report(out)
    results = filled({"models": [report["models"][0] | {"name": "small"}]}, result={"model": "net.onnx"})
    path = stored(tmp_path, results)
    assert main(["bench", "--import", str(path), "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "sartor.bench-report/1" and document == read_report(out)
    assert rows_of(document, "npu")[0]["state"] == "imported"
    results["results"][0]["latency"]["mean_s"] = 0
    assert main(["bench", "--import", str(stored(tmp_path, results)), "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and document == read_report(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--models", "m.onnx"], "needs --models and --targets"),
        (["--models", "m.onnx", "--targets", "nope"], "does not exist"),
        (["--emit-config", "npu", "--models", "m.onnx"], "needs --models and --out"),
        (["--emit-config", "npu", "--targets", "onnxruntime"], "leave --targets"),
        (["--models", "m.onnx", "--targets", "planted", "--precisions", "f33"], "Precisions are ['f33']"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_options_travel_to_the_subprocess(vendor, tmp_path):
    from sartor.bench.device import Device

    artifact = backends.get("planted").lower(named(), tmp_path / "a", TargetOptions())
    with Device("planted", TargetOptions()) as device:
        assert device.load("k", artifact) == {"law": "planted"}
        done = device.runs("k", warm_up_runs=2, runs=5, limit_s=1.0)
        assert len(done.samples_s) == 5 and done.warm_up_runs == 2
        slow = device.runs("k", warm_up_runs=10**6, runs=10**6, limit_s=0.05)
        assert slow.warm_up_runs < 10**6 and 3 <= len(slow.samples_s) < 10**6
