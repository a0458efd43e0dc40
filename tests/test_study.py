"""A study keeps what was measured through kills, for several writers, and for nobody whom it does not concern."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
from fit_fakes import without_timing
from test_cli import tiny

from sartor.cli import main
from sartor.errors import BackendError, UsageError
from sartor.ir.plan import GroupPlan, Plan
from sartor.study import Storage, plan_digest

optuna = pytest.importorskip("optuna", reason="the extra sartor[study] is not installed")

KEY = {"source": "s", "device": "d"}
GROUPS = {"g": 64, "h": 40_000}


def plan(kept=3, blocks=()):
    return Plan("a" * 64, {"g": GroupPlan(64, tuple(range(kept)))}, blocks)


def fields(ratio=0.5, **more):
    return {"ratio": ratio, "ci95": [ratio - 0.01, ratio + 0.01], "static": {"macs": 7}, "score": 0.9} | more


def opened(file, key=KEY, scored=True):
    return Storage(str(file)).study("net", key, GROUPS, ["block"], scored)


# ---- what is kept ----------------------------------------------------------------------------------
def test_a_trial_comes_back_as_it_was_recorded(tmp_path):
    given = plan(5, ("block",)), fields(plan="p"), {"latency <= 0.5": 0.02, "macs <= 9": -0.1}
    opened(tmp_path / "s.db").record(*given)
    (trial,) = opened(tmp_path / "s.db").trials()
    assert (trial.plan, trial.fields, trial.constraints) == given and trial.number == 0


def test_a_plan_is_found_by_its_digest_and_the_latest_measurement_counts(tmp_path):
    study = opened(tmp_path / "s.db")
    study.record(plan(3), fields(0.5), {})
    study.record(plan(4), fields(0.6), {})
    study.record(plan(3), fields(0.4), {})
    assert study.find(plan_digest(plan(3)))["ratio"] == 0.4
    assert study.find(plan_digest(plan(9))) is None


def test_a_long_plan_fits_columns_of_64_kilobytes(tmp_path):
    long = Plan("a" * 64, {"h": GroupPlan(40_000, tuple(range(0, 40_000, 2)))})
    assert len(long.to_json()) > 100_000
    study = opened(tmp_path / "s.db")
    study.record(long, fields(), {})
    assert study.trials()[0].plan == long
    (raw,) = study._study.trials
    assert max(len(json.dumps(value)) for value in raw.user_attrs.values()) < 65_536


def test_optuna_reads_it_as_its_own(tmp_path):
    study = opened(tmp_path / "s.db")
    study.record(plan(3, ("block",)), fields(0.4, score=0.8), {"macs <= 9": 0.5})
    study.record(plan(8), fields(0.5, score=0.9), {"macs <= 9": -0.5})
    found = optuna.load_study(study_name=study.name, storage=f"sqlite:///{tmp_path}/s.db")
    assert [t.values for t in found.trials] == [[0.4, 0.8], [0.5, 0.9]]
    assert found.trials[0].params == {"g": 3, "h": 40_000, "keep block": 0}
    assert found.trials[1].params == {"g": 8, "h": 40_000, "keep block": 1}
    assert [d.name for d in found.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert found.metric_names == ["latency_ratio", "score"] and found.user_attrs["key"] == KEY
    assert [t.number for t in found.best_trials] == [1]  # the only one that meets its constraint


def test_without_data_there_is_one_value(tmp_path):
    study = opened(tmp_path / "s.db", scored=False)
    without = {k: v for k, v in fields().items() if k != "score"}
    study.record(plan(), without, {})
    assert study._study.trials[0].values == [0.5] and study.trials()[0].fields == without


@pytest.mark.parametrize("key", [{"source": "other", "device": "d"}, {"source": "s", "device": "e"}])
def test_another_model_or_device_never_sees_it(tmp_path, key):
    opened(tmp_path / "s.db").record(plan(), fields(), {})
    other = opened(tmp_path / "s.db", key)
    assert other.trials() == () and other.find(plan_digest(plan())) is None


def test_trials_of_other_programs_are_left_alone(tmp_path):
    study = opened(tmp_path / "s.db")
    study._study.add_trial(optuna.trial.create_trial(values=[1.0, 1.0]))
    study._study.ask()
    study.record(plan(), fields(), {})
    assert len(study.trials()) == 1


# ---- storage ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("", "neither a database URL nor a file"),
        ("missing/s.db", "neither a database URL nor a file"),
        (".", "neither a database URL nor a file"),
        ("nope://u:secret@h/d", r"'nope://u:\*\*\*@h/d' cannot be used"),
        ("sqlite:////missing/s.db", "unable to open database file"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused_and_keeps_its_password(location, message):
    with pytest.raises(UsageError, match=message) as caught:
        Storage(location)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "s.db").write_text("no database, but long enough to be read as one " * 50)
    with pytest.raises(UsageError, match="file is not a database"):
        Storage(str(tmp_path / "s.db"))


def test_nothing_is_made_before_the_first_study(tmp_path):
    Storage(str(tmp_path / "s.db"))
    assert not (tmp_path / "s.db").exists()


def test_a_database_that_goes_away_is_an_error_that_names_the_journal(tmp_path):
    study = opened(tmp_path / "s.db")
    (tmp_path / "s.db").write_bytes(b"")
    with pytest.raises(BackendError, match=r"could not be written .*journal"):
        study.record(plan(), fields(), {})


def test_the_extra_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'sartor\[study\]'"):
        Storage("s.db")


def test_optuna_says_nothing_and_keeps_its_settings(tmp_path, capfd):
    before = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(tmp_path / "s.db").record(plan(), fields(), {})
        opened(tmp_path / "s.db").trials()
    assert capfd.readouterr() == ("", "") and optuna.logging.get_verbosity() == before == logging.INFO


# ---- several writers, and kills --------------------------------------------------------------------
WRITER = """
import sys
from test_study import fields, opened, plan
study = opened(sys.argv[1])
for index in range(int(sys.argv[2])):
    study.record(plan(1 + index), fields(0.5, writer=sys.argv[3]), {})
    print(index, flush=True)
"""


def writer(file, count, name):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file), str(count), name],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_several_processes_write_one_study_from_its_first_moment_on(tmp_path):
    writers = [writer(tmp_path / "s.db", 12, name) for name in "ab"]
    assert [w.wait(60) for w in writers] == [0, 0]
    for w in writers:
        w.stdout.close()
    found = opened(tmp_path / "s.db").trials()
    assert sorted(t.number for t in found) == list(range(24))
    for name in "ab":
        own = [len(t.plan.groups["g"].keep) for t in found if t.fields["writer"] == name]
        assert own == list(range(1, 13))


@pytest.mark.parametrize(
    "said", ["table studies already exists", "UNIQUE constraint failed: alembic_version.version_num"]
)
def test_tables_that_another_process_makes_meanwhile_are_taken(said, tmp_path, monkeypatch):
    calls = []

    class FailsOnce(optuna.storages.RDBStorage):
        def __init__(self, *arguments, **keywords):
            calls.append(arguments)
            if len(calls) == 1:
                raise RuntimeError(said)
            super().__init__(*arguments, **keywords)

    monkeypatch.setattr(optuna.storages, "RDBStorage", FailsOnce)
    assert opened(tmp_path / "s.db").trials() == () and len(calls) == 2


def test_a_killed_writer_leaves_whole_trials_and_the_next_goes_on(tmp_path):
    process = writer(tmp_path / "s.db", 60, "killed")
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    written = process.stdout.read().split()
    process.wait(30)
    process.stdout.close()
    study = opened(tmp_path / "s.db")
    assert len(study.trials()) - (3 + len(written)) in (0, 1)  # the last was killed before it could say so
    assert all(t.state.name == "COMPLETE" for t in study._study.trials)
    study.record(plan(), fields(), {})
    assert study.trials()[-1].number == len(study.trials()) - 1


# ---- a fit -----------------------------------------------------------------------------------------
@pytest.fixture
def fit(tmp_path, monkeypatch, capsys):
    """Fits a tiny network by MACs; returns (exit code, document, measurements that it made)."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.chdir(tmp_path)
    model = tiny("tiny.onnx")
    measured = without_timing(monkeypatch)

    def run(*more, source=model):
        measured.clear()
        options = ["--budget", "macs=0.7x", "--recovery", "none", "--max-drop", "100", "--json", *more]
        code = main(["fit", source, "--target", "onnxruntime", *options])
        return code, json.loads(capsys.readouterr().out), measured.count(2)

    return run


def test_another_run_takes_from_the_study_what_was_measured(fit, tmp_path):
    code, first, measured = fit("--study", "s.db", "--out", "a")
    assert code == 0 and measured >= 2  # the candidates, and the final measurement
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{tmp_path}/s.db")
    assert study.study_name.startswith("tiny-") and study.n_trials == measured - 1
    _constraints_are_those_of_the_budget(study.study_name, f"sqlite:///{tmp_path}/s.db")
    code, second, measured = fit("--study", "s.db", "--out", "b")
    assert code == 0 and measured == 1  # only what decides the status is always measured
    assert second["history"] == first["history"]


def _constraints_are_those_of_the_budget(name, url):
    for trial in optuna.load_study(study_name=name, storage=url).trials:
        ((limited, over),) = trial.constraints.items()
        limit = float(limited.removeprefix("macs <= "))
        macs = json.loads(trial.user_attrs["fields"])["static"]["macs"]
        np.testing.assert_allclose(over, macs / limit - 1, rtol=1e-4, atol=1e-5)


def test_a_killed_run_resumes_from_the_study_without_its_journal(fit, tmp_path, monkeypatch):
    landed = importlib.import_module("sartor.fit")._Fit._deliver

    def killed(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("sartor.fit")._Fit, "_deliver", killed)
    assert fit("--study", "s.db", "--out", "a")[0] == 130
    (tmp_path / ".a.journal.jsonl").unlink()
    monkeypatch.setattr(importlib.import_module("sartor.fit")._Fit, "_deliver", landed)
    code, _, measured = fit("--study", "s.db", "--out", "a")
    assert code == 0 and measured == 1


def test_a_study_that_cannot_be_used_is_said_before_the_model_is_opened(fit, tmp_path):
    code, document, _ = fit("--study", "missing/s.db", "--out", "a", source="no.onnx")
    assert code == 2 and "neither a database URL nor a file" in document["error"]


def test_a_refused_command_leaves_no_study_behind(fit, tmp_path):
    assert fit("--study", "s.db", "--out", "a", source="no.onnx")[0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.onnx"]
