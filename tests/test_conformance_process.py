"""The kit from outside: the sample package, a crash, the command line, and the pytest plugin."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conformance_site import environment, installed

from sartor.cli import main
from sartor.conformance.run import run_suite
from sartor.conformance.suite import suite

UNTIMED = ("contract", "numerics", "coverage", "precision", "batch", "errors", "legality", "determinism")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("conformance")) as folder:
        yield folder


def test_the_example_conforms(site):
    only = [argument for area in (*UNTIMED, "leaks", "isolation", "profile") for argument in ("--only", area)]
    done = subprocess.run(
        [sys.executable, "-m", "sartor", "conformance", "tape", *only, "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment(site),
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


@pytest.mark.slow
def test_a_crash_and_a_hang_fail_their_check_and_the_suite_goes_on(site):
    only = ("contract.capabilities", "contract.settings", "errors.foreign-folder")
    for name, limit_s, says in (("crashes", 60.0, "SIGSEGV"), ("hangs", 6.0, "did not finish within 6 s")):
        report = run_suite(f"wrong-{name}", only, time_limit_s=limit_s)
        assert [o.result for o in report.outcomes] == ["passed", "failed", "passed"]
        assert says in report.outcomes[1].observed and not report.conforms
    assert "in load" in report.outcomes[1].details  # where it hung


def test_the_command_line(site, capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")
    assert main(["conformance", "tape", "--only", "errors", "--all"]) == 0
    text = capsys.readouterr().out
    assert "'tape' conforms to the selected checks: 12 passed, 0 failed, 0 skipped" in text
    assert "passed errors.input-type: Running with float64" in text
    assert main(["conformance", "wrong-trustsfiles", "--only", "errors.damaged-file"]) == 5
    text = capsys.readouterr().out
    assert "failed errors.damaged-file: A file of the artifact that was changed by one bit" in text
    assert "'wrong-trustsfiles' does not conform to the selected checks" in text
    assert main(["conformance", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [c["id"] for c in listed["checks"]] == [check.id for check in suite()]
    assert main(["conformance"]) == 2


class TestPytestPlugin:
    def run(self, site, tmp_path, *arguments):
        (tmp_path / "test_own.py").write_text("def test_of_the_vendor(): pass\n")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=tmp_path,
            env=environment(site),
        )

    def test_checks_are_tests_beside_the_vendors_own(self, site, tmp_path):
        done = self.run(
            site, tmp_path, "--sartor-backend=tape", "--sartor-only=errors", "--sartor-only=coverage"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"14 passed, 3 skipped", done.stdout), done.stdout
        assert "test_own.py::test_of_the_vendor" in done.stdout
        assert "sartor-conformance-tape::errors.damaged-file" in done.stdout

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
