"""The conformance kit finds what each wrong backend does wrong, and nothing in a right one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import null_backend
import numpy as np
import pytest

from sartor import backends
from sartor.cli import main
from sartor.conformance import docs
from sartor.conformance.check import Check, Failed, Skipped, perform, require_error
from sartor.conformance.compare import TOLERANCES, compare
from sartor.conformance.models import models, sample_inputs
from sartor.conformance.run import run_suite
from sartor.conformance.subject import Subject
from sartor.conformance.suite import select, suite
from sartor.errors import BackendError, UsageError

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "backend_plugin"
UNTIMED = ("contract", "numerics", "coverage", "precision", "batch", "errors", "legality", "determinism")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The example package, installed by pip into a folder of its own, with the wrong backends beside it."""
    root = tmp_path_factory.mktemp("conformance")
    source = shutil.copytree(EXAMPLE, root / "source")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", root / "site", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    sys.path.insert(0, str(root / "site"))
    import conformance_wrong

    entries = {
        name: f"conformance_wrong:{found.__name__}" for name, found in conformance_wrong.ENTRIES.items()
    }
    null_backend.install(root / "site", entries, "wrongvendor")
    backends.REGISTRY.refresh()
    yield root / "site"
    sys.path.remove(str(root / "site"))
    backends.REGISTRY.refresh()


def outcomes(name, tmp_path, *patterns):
    """Result and observation by check id, in this process."""
    subject = Subject(name, tmp_path)
    return {check.id: perform(check, subject) for check in select(patterns)}


def test_the_example_conforms(site):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "CI": "1"}
    only = [argument for area in (*UNTIMED, "isolation", "profile") for argument in ("--only", area)]
    done = subprocess.run(
        [sys.executable, "-m", "sartor", "conformance", "tape", *only, "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["conforms"], [
        c for c in report["checks"] if c["result"] == "failed"
    ]
    assert report["schema"] == "sartor.conformance/1" and report["backend"] == "tape"
    results = {check["id"]: check["result"] for check in report["checks"]}
    for expected in (
        "numerics.resnet.f32",
        "numerics.mobilenet.f32",
        "isolation.time-limit",
        "errors.damaged-file",
    ):
        assert results[expected] == "passed"
    assert results["numerics.vit.f32"] == "skipped"  # not among its operators, as its legality says
    assert report["counts"]["passed"] >= 50


WRONG = {
    "swappedchannels": ("numerics.conv.f32", "order along axis 1 is not"),
    "stalebuffer": ("determinism.outputs-are-owned", "was overwritten by a later run"),
    "onerunlate": ("determinism.own-inputs", "is off by"),
    "nondeterministic": ("determinism.runs", "differs from the first: output 'y' by up to"),
    "sessionsdiffer": ("determinism.sessions", "a second session on"),
    "wrongshapes": ("contract.outputs", "has shape [5, 9, 7]; the program has [1, 5, 9, 7]"),
    "wrongtype": ("contract.outputs", "is float64; declared float32"),
    "writesintoinputs": ("determinism.inputs-are-left-alone", "was overwritten"),
    "acceptsanyinput": ("errors.input-missing", "was accepted"),
    "trustsfiles": ("errors.damaged-file", "with one bit changed"),
    "anyprecision": ("errors.precision-not-claimed", "legality with 'bf16' was accepted"),
    "inname": ("precision.arithmetic.bf16", "errors are those of float32"),
    "dropsquantization": ("numerics.conv.int8", "is off by"),
    "refuseseverything": ("coverage.f32", "none of"),
    "acceptseverything": ("legality.agrees-with-lower", "Legality accepts model"),
    "silentrules": ("contract.rules", "rules without a sentence: ['quiet']"),
    "legalizesinplace": ("contract.legalize", "changed the program"),
    "randombytes": ("determinism.artifact", "stamp differ between two lowerings"),
    "litters": ("contract.lower", "beside the artifact lies"),
    "firstsampleonly": ("batch.any-size", "is off by"),
    "foreignnodes": ("profile.names-known-nodes", "node_of_another_model"),
    "constanttime": ("measurement.more-work-takes-longer", "layers 1, 4, 16"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_fails_the_right_check(name, site, tmp_path):
    check, says = WRONG[name]
    outcome = outcomes(f"wrong-{name}", tmp_path, check)[check]
    assert outcome.result == "failed" and says in outcome.observed, outcome


def test_nothing_else_is_found_in_a_backend_that_only_hands_out_its_buffer(site, tmp_path):
    found = outcomes("wrong-stalebuffer", tmp_path, *UNTIMED)
    assert [o.id for o in found.values() if o.result == "failed"] == ["determinism.outputs-are-owned"]


def test_a_crash_and_a_hang_fail_their_check_and_the_suite_goes_on(site):
    only = ("contract.capabilities", "contract.settings", "errors.foreign-folder")
    for name, says in (("crashes", "SIGSEGV"), ("hangs", "did not finish within 2 s")):
        report = run_suite(f"wrong-{name}", only, time_limit_s=2.0)
        assert [o.result for o in report.outcomes] == ["passed", "failed", "passed"]
        assert says in report.outcomes[1].observed and not report.conforms
    assert "in load" in report.outcomes[1].details  # where it hung


def test_unknown_backends_and_checks_are_refused():
    with pytest.raises(UsageError, match="Unknown backend 'abacus'"):
        run_suite("abacus", ("contract",))
    with pytest.raises(UsageError, match="No check of the kit fits 'colour'; areas are 'contract'"):
        run_suite("onnxruntime", ("colour",))


def test_ids_are_unique_and_every_sentence_is_one():
    ids = [check.id for check in suite()]
    assert len(set(ids)) == len(ids) > 150
    for check in suite():
        assert re.fullmatch(r"[a-z]+(\.[a-z0-9-]+)+", check.id), check.id
        assert not check.sentence[0].islower() and check.sentence.endswith("."), check.sentence


def test_the_published_list_does_not_drift():
    assert (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8") == docs.markdown(), (
        "docs/conformance.md differs from the suite; run: python -m sartor.conformance.docs docs/conformance.md"
    )


def test_every_family_that_is_promised_has_a_model():
    families = {model.family for model in models().values()}
    assert families >= {
        *("convolution", "depthwise", "transposed convolution", "matrix product", "normalization", "pooling"),
        *("activation", "elementwise", "movement", "resize", "block", "control flow", "network", "interface"),
    }


def test_models_are_the_same_every_time_and_their_inputs_have_no_symmetry():
    program = models()["conv"].program("f32")
    assert program.sha256() == models()["conv"].program("f32").sha256()
    array = sample_inputs(program, 0)["x"]
    assert not np.array_equal(array, sample_inputs(program, 1)["x"])
    for axis in range(1, array.ndim):
        assert np.abs(array - np.flip(array, axis)).mean() > 0.3


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_tolerance_fails_on_a_known_wrong_pair(precision):
    expected = {"y": np.random.default_rng(0).standard_normal((2, 5, 7))}
    assert "largest error 0" in compare(expected, expected, precision)
    wrong = {
        "off by": {"y": expected["y"] + 0.3},
        "order along axis 1": {"y": expected["y"][:, ::-1]},
        "has shape": {"y": expected["y"][0]},
        "not finite": {"y": np.where(expected["y"] > 1, np.nan, expected["y"])},
        "Outputs are": {"z": expected["y"]},
    }
    for says, outputs in wrong.items():
        with pytest.raises(Failed, match=says):
            compare(expected, outputs, precision)


def test_an_error_of_the_wrong_class_is_not_good_enough():
    def wrong():
        raise ValueError("planted")

    with pytest.raises(Failed, match="ended with ValueError: planted where a UsageError"):
        require_error(UsageError, "It", wrong)
    with pytest.raises(Failed, match="was accepted"):
        require_error(UsageError, "It", lambda: 1)
    with pytest.raises(Failed, match="does not name 'x'"):
        require_error(BackendError, "It", lambda: (_ for _ in ()).throw(BackendError("planted")), names="x")


def test_whatever_a_backend_raises_is_an_outcome(tmp_path):
    def observe(subject):
        raise KeyError("planted")

    outcome = perform(Check("a.b", "It holds.", observe), Subject("none", tmp_path))
    assert outcome.result == "failed" and "KeyError" in outcome.observed and "Traceback" in outcome.details

    def skip(subject):
        raise Skipped("planted reason")

    outcome = perform(Check("a.b", "It holds.", skip), Subject("none", tmp_path))
    assert (outcome.result, outcome.observed) == ("skipped", "planted reason")


def test_a_built_in_backend_through_the_command_line(capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")
    only = ["--only", "contract", "--only", "numerics.conv.f32", "--only", "errors", "--only", "determinism"]
    assert main(["conformance", "onnxruntime", *only]) == 0
    text = capsys.readouterr().out
    assert "'onnxruntime' conforms to the selected checks:" in text and " 0 failed" in text
    assert main(["conformance", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [c["id"] for c in listed["checks"]] == [check.id for check in suite()]
    assert main(["conformance"]) == 2


def test_a_failure_is_exit_5_and_says_what_was_seen(site, capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")
    assert main(["conformance", "wrong-swappedchannels", "--only", "numerics.conv.f32"]) == 5
    text = capsys.readouterr().out
    assert "failed numerics.conv.f32: 3x3 convolution and ReLU." in text and "order along axis 1" in text
    assert "'wrong-swappedchannels' does not conform" in text


class TestPytestPlugin:
    def run(self, site, tmp_path, *arguments):
        (tmp_path / "test_own.py").write_text("def test_of_the_vendor(): pass\n")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), str(ROOT / "tests")]),
        }
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, env=environment
        )

    def test_checks_are_tests_beside_the_vendors_own(self, site, tmp_path):
        done = self.run(
            site, tmp_path, "--sartor-backend=tape", "--sartor-only=contract", "--sartor-only=coverage"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"13 passed, 4 skipped", done.stdout), done.stdout
        assert "test_own.py::test_of_the_vendor" in done.stdout
        assert "sartor-conformance-tape::contract.capabilities" in done.stdout

    def test_the_kit_alone_and_a_failure(self, site, tmp_path):
        done = self.run(
            site,
            tmp_path,
            "-m",
            "sartor_conformance",
            "--sartor-backend=wrong-wrongtype",
            "--sartor-only=contract.outputs",
        )
        assert done.returncode == 1 and "1 failed, 1 deselected" in done.stdout, done.stdout + done.stderr
        assert "observed: 'conv': output 'y' is float64; declared float32" in done.stdout
        assert "def runtest" not in done.stdout and "Traceback" not in done.stdout

    def test_an_unknown_check_is_a_usage_error(self, site, tmp_path):
        done = self.run(site, tmp_path, "--sartor-backend=tape", "--sartor-only=colour")
        assert done.returncode == 4 and "No check of the kit fits 'colour'" in done.stderr
