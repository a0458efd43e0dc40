"""The two commands of the README on a fresh folder; interpreter and installer only record."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

FAKE_PYTHON = """#!/bin/sh
# Records its arguments; `-m venv FOLDER` makes a venv of itself, `-m pip` may be told to fail.
echo "$*" >> "$LOG"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/pip" ;;
  "-c "*) exit "${OLD:-0}" ;;
  *"-m pip install"*) exit "${FAIL:-0}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", folder / ".ci/run")
    python = tmp_path / "fakepython"
    python.write_text(FAKE_PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)

    def make(*arguments, command="make", cwd=folder, **variables):
        log = tmp_path / "log"
        log.write_text("")
        environment = {"PATH": os.environ["PATH"], "LOG": str(log), "PYTHON": str(python), **variables}
        done = subprocess.run(
            [command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        return done, log.read_text().splitlines()

    make.folder = folder
    return make


def installs(calls):
    return [call for call in calls if "-m pip install" in call]


def test_make_test_sets_everything_up_once(checkout):
    done, calls = checkout("test")
    assert done.returncode == 0, done.stderr
    assert "-m venv .venv" in calls
    assert "-c constraints.txt -e .[test]" in installs(calls)[0]
    assert calls[-1].startswith("-m pytest")
    done, calls = checkout("test")
    assert done.returncode == 0 and installs(calls) == [] and calls[-1].startswith("-m pytest")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_install_again(checkout, name):
    checkout("test")
    path = checkout.folder / name
    later = (checkout.folder / ".venv/.installed-test").stat().st_mtime + 10
    os.utime(path, (later, later))
    _, calls = checkout("test")
    assert len(installs(calls)) == 1


def test_a_failed_install_is_repeated(checkout):
    done, _ = checkout("demo", FAIL="1")
    assert done.returncode != 0
    done, calls = checkout("demo")
    assert done.returncode == 0 and len(installs(calls)) == 1
    assert "-e .[demo]" in installs(calls)[0] and calls[-1].startswith("examples/digits/demo.py")


def test_an_old_python_is_refused_in_one_sentence(checkout):
    done, calls = checkout("test", OLD="1")
    assert done.returncode != 0 and "needs Python 3.11 or newer" in done.stderr
    assert not (checkout.folder / ".venv").exists() and len(calls) == 1


def test_ci_runs_make_test_from_anywhere_and_passes_its_failure_on(checkout, tmp_path):
    script = checkout.folder / ".ci/run"
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert "set -euo pipefail" in lines and "make test" in lines
    done, calls = checkout(command=str(script), cwd=tmp_path)
    assert done.returncode == 0 and calls[-1].startswith("-m pytest")
    os.utime(checkout.folder / "pyproject.toml")
    (checkout.folder / ".venv/.installed-test").unlink()
    done, _ = checkout(command=str(script), cwd=tmp_path, FAIL="1")
    assert done.returncode != 0
