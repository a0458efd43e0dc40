"""A report while it is being made: what an interrupt leaves, and who else writes it."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from bench_fixtures import QUICK, filled, named, report_fixture, rows_of, stored, vendor_fixture  # noqa: F401
from builders import node, program_from_nodes
from onnx import TensorProto, helper

from sartor.bench import read_report, run_bench, target, write_report
from sartor.bench.store import PREVIOUS, Store, change, is_finished
from sartor.bench.vendor import merge, read_results
from sartor.cli import main
from sartor.errors import EXIT_INTERNAL, UsageError
from sartor.report.bench_page import render
from sartor.report.bench_table import summary

LIMITS = ["--time-limit", "1", "--batch-limit", "1", "--roofline-limit", "0"]


@pytest.fixture
def models(tmp_path):
    return [str(named(width=width).save(tmp_path / f"net{width}.onnx")) for width in (8, 16)]


def states(document):
    return {(row["model"], row["target"]): row["state"] for row in document["rows"]}


def test_the_report_is_there_from_the_beginning_and_after_each_step(vendor, tmp_path):
    kept = []

    def keep(document):
        write_report(document, tmp_path)
        kept.append(read_report(tmp_path))

    programs = [named("small", width=8), named("large", width=16)]
    report = run_bench(programs, ["planted", "picky"], QUICK, keep=keep)
    assert set(states(kept[0]).values()) == {"unfinished"} and len(states(kept[0])) == 4
    finished = [sum(state != "unfinished" for state in states(document).values()) for document in kept]
    assert finished == sorted(finished) and set(finished) == {0, 1, 2, 3, 4}
    converted = next(d for d in kept if "conversion_s" in d["rows"][0])
    assert states(converted)["small", "planted"] == "unfinished"
    assert "the benchmark ended before" in summary(converted) and "the benchmark ended before" in render(
        converted
    )
    assert "planted (unfinished)" in summary(converted)
    timed = next(d for d in kept if "latency" in d["rows"][0])
    assert "latency" in timed["rows"][1] and "throughput" not in timed["rows"][0]
    assert kept[-1]["rows"] == report["rows"] and is_finished(report)


def test_an_error_leaves_what_was_measured_before(vendor, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")
    measure = target.Target.throughput

    def fails(self, subject):
        if subject.row["model"] == "net16.onnx":
            raise RuntimeError("planted")
        measure(self, subject)

    monkeypatch.setattr(target.Target, "throughput", fails)
    out = tmp_path / "out"
    given = ["--models", ",".join(models), "--targets", "planted,picky", "--out", str(out), *LIMITS]
    assert main(["bench", *given]) == EXIT_INTERNAL
    assert f"What was measured until then is in '{out}'." in capsys.readouterr().err
    report = read_report(out)
    assert states(report) == {
        ("net8.onnx", "planted"): "measured",
        ("net16.onnx", "planted"): "unfinished",
        ("net8.onnx", "picky"): "unfinished",
        ("net16.onnx", "picky"): "unfinished",
    }
    assert "throughput" in report["rows"][0] and "latency" in report["rows"][1]
    assert (out / "bench.html").read_text() == render(report)


def test_a_finished_report_is_kept_until_another_one_is(report, tmp_path):
    write_report(report, tmp_path)
    before = (tmp_path / "bench.json").read_bytes()
    begun = copy.deepcopy(report)
    for row in begun["rows"]:
        row |= {"state": "unfinished", "reason": "planted"}
    Store(tmp_path).write(begun)
    assert (tmp_path / PREVIOUS).read_bytes() == before
    Store(tmp_path).write(begun)  # another one that does not come to its end
    assert (tmp_path / PREVIOUS).read_bytes() == before
    Store(tmp_path).write(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.html", "bench.json"]


def test_imported_results_stay_when_a_benchmark_is_repeated(report, tmp_path):
    out = tmp_path / "out"
    results = read_results(stored(tmp_path, filled(report)))
    write_report(merge(report, results), out)
    store = Store(out)
    store.write(copy.deepcopy(report))
    later = read_results(stored(tmp_path, filled(report, target="late")))
    change(out, lambda document: merge(document, later))  # while the benchmark runs
    store.write(copy.deepcopy(report))
    found = read_report(out)
    assert {entry["target"] for entry in found["imports"]} == {"npu", "late"}
    assert rows_of(found, "npu")[0] == rows_of(merge(report, results), "npu")[0]
    assert rows_of(found, "late")[0]["state"] == "imported"


def test_imported_results_that_do_not_fit_stop_a_benchmark_before_it_begins(report, tmp_path):
    write_report(merge(report, read_results(stored(tmp_path, filled(report)))), tmp_path / "out")
    before = (tmp_path / "out/bench.json").read_bytes()
    other = copy.deepcopy(report)
    other["models"][0]["sha256"] = "0" * 64
    same = copy.deepcopy(report)
    same["rows"].append({**same["rows"][0], "target": "npu", "state": "unfinished"})
    for document, message in ((other, "is another file"), (same, "that target is measured now")):
        with pytest.raises(UsageError, match=message):
            Store(tmp_path / "out").write(document)
    assert (tmp_path / "out/bench.json").read_bytes() == before
    assert not (tmp_path / "out" / PREVIOUS).exists()


def test_results_of_unknown_models_are_refused_before_anything_is_measured(
    vendor, report, models, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("CI", "1")
    monkeypatch.setattr(target.Target, "convert", lambda *_: pytest.fail("it was measured"))
    path, out = stored(tmp_path, filled(report)), tmp_path / "out"
    given = ["--models", models[0], "--targets", "planted", "--import", str(path), "--out", str(out)]
    assert main(["bench", *given]) == 2
    assert "which the report does not have" in capsys.readouterr().err and not out.exists()


def test_two_imports_at_once_are_both_there(report, tmp_path):
    write_report(report, tmp_path / "out")
    results = [read_results(stored(tmp_path, filled(report, target=name))) for name in ("one", "two")]

    def slowly(given):
        def made(document):
            time.sleep(0.1)
            return merge(document, given)

        change(tmp_path / "out", made)

    threads = [threading.Thread(target=slowly, args=(given,)) for given in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry["target"] for entry in read_report(tmp_path / "out")["imports"]} == {"one", "two"}
    with pytest.raises(UsageError, match="cannot be read"):
        change(tmp_path / "missing", lambda document: document)
    assert not (tmp_path / "missing").exists()


def test_a_model_whose_costs_depend_on_data_is_a_row_and_not_an_end(vendor, tmp_path):
    report = run_bench([uncountable(), named("small", width=8)], ["planted"], QUICK)
    refused, measured = report["rows"]
    assert refused["state"] == "not-taken" and "costs cannot be counted" in refused["reason"]
    assert measured["state"] == "measured" and "throughput" in measured
    assert "macs" not in report["models"][0] and "uncountable" in summary(report)
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report


def uncountable():
    """A model with a branch whose values have as many elements as the image has pixels that are not zero."""
    places = [node("NonZero", ["x"], ["n"], "places"), node("Cast", ["n"], ["f"], "cast", to=1)]
    then = helper.make_graph(
        [*places, node("ReduceSum", ["f"], ["a"], "sum0", keepdims=0)], "then", [], [scalar("a")]
    )
    other = helper.make_graph(
        [node("ReduceSum", ["x"], ["b"], "sum1", keepdims=0)], "other", [], [scalar("b")]
    )
    nodes = [
        node("ReduceSum", ["x"], ["s"], "sum", keepdims=0),
        node("Greater", ["s", "zero"], ["c"], "greater"),
        node("If", ["c"], ["y"], "choice", then_branch=then, else_branch=other),
    ]
    program = program_from_nodes(nodes, {"x": (1, 3, 8, 8)}, ["y"], {"zero": np.float32(0.0)})
    program.source = dataclasses.replace(program.source, name="uncountable")
    return program


def scalar(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_a_signal_leaves(vendor, models, tmp_path, number):
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "sartor", "bench", "--models", models[0], "--targets", "picky,planted"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "CI": "",
        "TMPDIR": str(scratch),
    }
    with subprocess.Popen(
        [*command, "--roofline-limit", "0", "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's `&`
    ) as process:
        for line in process.stderr:
            if "latency, visit" in line:
                assert len(processes_in(scratch)) >= 2  # the benchmark and its device
                process.send_signal(number)
                break
        else:
            pytest.fail("it ended before it measured")
        said = process.stderr.read()
    report = read_report(out)
    assert states(report) == {("net8.onnx", "picky"): "not-taken", ("net8.onnx", "planted"): "unfinished"}
    assert report["rows"][1]["conversion_s"] > 0
    assert sorted(path.name for path in out.iterdir()) == ["bench.html", "bench.json"]
    assert (out / "bench.html").read_text() == render(report)
    end = time.monotonic() + 10
    while processes_in(scratch) and time.monotonic() < end:
        time.sleep(0.05)
    assert not processes_in(scratch)
    if number == signal.SIGKILL:  # it has no time to remove its scratch folder
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number and f"is in '{out}'" in said
        assert not list(scratch.iterdir())


def processes_in(scratch):
    """Processes whose temporary folder this is."""
    wanted = f"TMPDIR={scratch}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found
