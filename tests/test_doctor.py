"""`sartor doctor` and `sartor targets`: working, missing and broken plugins, each told apart and none hidden."""

from __future__ import annotations

import json

import null_backend
import pytest

from sartor import backends
from sartor.cli import main, targets
from sartor.conformance import doctor
from sartor.conformance import run as conformance_run
from sartor.conformance.diagnosis import diagnose, registries
from sartor.conformance.run import diagnose_apart
from sartor.passes import registry as passes

PLUGIN = '''
import os
from null_backend import NullBackend
from sartor.backends.telemetry import import_vendor
from sartor.errors import UsageError


class Missing(NullBackend):
    def capabilities(self):
        import_vendor("a_package_that_nobody_has", "theirs[extra]")


class HalfInstalled(NullBackend):
    """Its package is there; what that imports is not."""

    def capabilities(self):
        import_vendor("half_installed", "theirs[extra]")


class Raises(NullBackend):
    def capabilities(self):
        raise RuntimeError("planted: no device")


class Aborts(NullBackend):
    def capabilities(self):
        os.write(2, b"planted last words\\n")
        os.abort()


class WithoutDevice(NullBackend):
    def capabilities(self):
        raise UsageError("planted: the driver is too old")
'''
STATES = {
    "null": "ok",
    "missing": "missing",
    "half": "broken",
    "raises": "broken",
    "aborts": "broken",
    "device": "broken",
    "absent": "broken",
    "incomplete": "broken",
}


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """One plugin per state; only these and the passes are examined, to save the vendors' import times."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "planted_plugins.py").write_text(PLUGIN)
    (site / "half_installed.py").write_text("import a_dependency_that_nobody_has\n")
    classes = {
        "missing": "Missing",
        "half": "HalfInstalled",
        "raises": "Raises",
        "aborts": "Aborts",
        "device": "WithoutDevice",
    }
    entries = {name: f"planted_plugins:{found}" for name, found in classes.items()}
    entries |= {
        "null": "null_backend:NullBackend",
        "absent": "no_such_module:Thing",
        "incomplete": "null_backend:Incomplete",
    }
    null_backend.install(site, entries)
    monkeypatch.syspath_prepend(str(site))
    backends.REGISTRY.refresh()
    yield site
    monkeypatch.undo()
    backends.REGISTRY.refresh()


def test_each_state_is_told_apart(plugins):
    found = {name: diagnose("sartor.backends", name) for name in STATES if name != "aborts"}
    assert {name: entry["state"] for name, entry in found.items()} == {
        name: state for name, state in STATES.items() if name != "aborts"
    }
    assert found["null"]["precisions"] == ["f32"] and found["null"]["version"] == "1.0"
    assert found["missing"]["install"] == "pip install 'theirs[extra]'"
    assert "a_dependency_that_nobody_has" in found["half"]["problem"]
    assert (
        "planted: no device" in found["raises"]["traceback"] and "Traceback" in found["raises"]["traceback"]
    )
    assert "the driver is too old" in found["device"]["problem"]
    assert (
        "no_such_module" in found["absent"]["problem"]
        and "lacks capabilities()" in found["incomplete"]["problem"]
    )


def test_a_plugin_that_ends_the_process_is_broken_and_harms_no_other(plugins):
    found = diagnose_apart("sartor.backends", "aborts")
    assert found["state"] == "broken" and "SIGABRT" in found["problem"]
    assert "planted last words" in found["traceback"]


def test_passes_are_examined_too():
    found = diagnose("sartor.passes", "fold-constants")
    assert found["state"] == "ok" and found["semantics"] == "exact" and "max_bytes" in found["options"]
    assert diagnose("sartor.passes", "no-such-pass")["state"] == "broken"


def test_surgeries_for_tensorrt_are_plugins_too(plugins):
    info = next(plugins.glob("*.dist-info"))
    with (info / "entry_points.txt").open("a") as stream:
        stream.write(
            "\n[sartor.tensorrt_surgery]\ntheirs = null_backend:install\nlost = null_backend:nothing\n"
        )
    registries()["sartor.tensorrt_surgery"].refresh()
    found = {name: diagnose("sartor.tensorrt_surgery", name) for name in ("theirs", "lost")}
    registries()["sartor.tensorrt_surgery"].refresh()
    assert found["theirs"] == {"name": "theirs", "state": "ok", "object": "null_backend.install"}
    assert found["lost"]["state"] == "broken" and "AttributeError" in found["lost"]["problem"]


@pytest.fixture
def few(plugins, monkeypatch):
    """The plugins of the test alone, examined in this process."""
    monkeypatch.setattr(
        backends.REGISTRY, "_found", {n: f for n, f in backends.REGISTRY._scan().items() if n in STATES}
    )
    monkeypatch.setattr(passes.REGISTRY, "_found", {"remove-dead": passes.REGISTRY._scan()["remove-dead"]})
    monkeypatch.setenv("CI", "1")

    def here(group, name, **limits):
        ended = {"name": name, "state": "broken", "problem": "it ended", "traceback": "log"}
        return ended if name == "aborts" else diagnose(group, name)

    monkeypatch.setattr(doctor, "diagnose_apart", here)
    monkeypatch.setattr(conformance_run, "diagnose_apart", here)


def test_doctor_is_exit_5_with_the_traceback_of_what_is_broken(few, capsys):
    assert main(["doctor", "--json"]) == 5
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "sartor.doctor/1"
    assert {e["name"]: e["state"] for e in document["plugins"]["sartor.backends"]} == STATES
    assert all(e["owner"].startswith("nullvendor 0.1 (") for e in document["plugins"]["sartor.backends"])
    assert sorted(document["broken"]) == sorted(n for n, s in STATES.items() if s == "broken")
    assert document["missing"] == ["missing"]
    environment = document["environment"]
    assert environment["cores"] >= 1 and environment["memory_bytes"] > 0
    assert {"torch", "onnx", "numpy"} <= {p["name"] for p in environment["packages"] if p["required"]}
    assert main(["doctor"]) == 5
    text = capsys.readouterr().out
    assert "pip install 'theirs[extra]'" in text and "planted: no device" in text and "remove-dead" in text
    assert "not installed: missing" in text


def test_doctor_is_exit_0_when_something_is_merely_missing(few, monkeypatch, capsys):
    kept = {n: f for n, f in backends.REGISTRY._scan().items() if STATES[n] != "broken"}
    monkeypatch.setattr(backends.REGISTRY, "_found", kept)
    assert main(["doctor"]) == 0
    assert "broken: nothing; not installed: missing" in capsys.readouterr().out


def test_a_group_that_nothing_reads_is_pointed_at(few, plugins, monkeypatch, capsys):
    info = next(plugins.glob("*.dist-info"))
    with (info / "entry_points.txt").open("a") as stream:
        stream.write("\n[sartor.backend]\nmisspelt = null_backend:NullBackend\n")
    assert main(["doctor"]) == 5
    assert "'sartor.backend' of misspelt (nullvendor)" in capsys.readouterr().out


def test_packages_that_do_not_fit_are_a_problem(monkeypatch):
    import importlib.metadata

    asked = [
        "numpy>=99",
        "a-package-that-nobody-has>=1",
        "networkx>=1",
        "openvino>=9999; extra == 'openvino'",
        "nope; extra == 'x'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    found = {p["name"]: p["problem"] for p in doctor._packages()}
    assert "asks for 'numpy>=99'" in found["numpy"] and found["networkx"] == ""
    assert "not installed" in found["a-package-that-nobody-has"]
    assert "asks for 'openvino>=9999'" in found["openvino"] and "nope" not in found


def test_extras_say_what_they_bring_and_what_of_it_is_not_there(few, monkeypatch, capsys):
    import importlib.metadata
    from email.message import Message

    metadata = Message()
    for name, requirements in {
        "theirs": ("numpy", "a-package-that-nobody-has>=2"),
        "whole": ("networkx>=1",),
        "all": ("sartor[theirs]",),
        "test": ("pytest",),
    }.items():
        metadata["Provides-Extra"] = name
        for requirement in requirements:
            metadata["Requires-Dist"] = f"{requirement}; extra == '{name}'"
    metadata["Requires-Dist"] = "torch"
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: metadata)
    found = {e["name"]: (e["packages"], e["missing"]) for e in doctor._extras()}
    assert found == {
        "theirs": (["a-package-that-nobody-has", "numpy"], ["a-package-that-nobody-has"]),
        "whole": (["networkx"], []),
    }
    assert main(["doctor"]) == 5
    text = capsys.readouterr().out
    assert "pip install 'sartor[theirs]'" in text and "pip install 'sartor[whole]'" not in text


def test_targets_hides_nothing_because_of_one(few, capsys):
    assert main(["targets", "--json"]) == 0
    entries = {e["name"]: e for e in json.loads(capsys.readouterr().out)["targets"]}
    assert {n: e["available"] for n, e in entries.items()} == {n: s == "ok" for n, s in STATES.items()}
    assert {n for n, e in entries.items() if "traceback" in e} == {
        n for n, s in STATES.items() if s == "broken"
    }
    assert entries["raises"]["reason"] == "RuntimeError: planted: no device"
    assert main(["targets"]) == 0
    text = capsys.readouterr().out
    assert "pip install 'theirs[extra]'" in text and "  | Traceback (most recent call last):" in text
    assert [line.split() for line in text.splitlines() if line.startswith("null ")] == [
        ["null", "yes", "1.0", "f32"]
    ]


def test_one_target_that_cannot_be_described_says_why(few, capsys):
    assert main(["targets", "null", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["targets"][0]["version"] == "1.0"
    for name, says in (
        ("missing", "pip install 'theirs[extra]'"),
        ("raises", "planted: no device"),
        ("nul", "Did you mean 'null'"),
    ):
        assert main(["targets", name]) == 2
        assert says in capsys.readouterr().err


ENDS = """
import sys, time
from null_backend import NullBackend


class Exits(NullBackend):
    def capabilities(self):
        sys.exit(3)


class Hangs(NullBackend):
    def capabilities(self):
        time.sleep(600)
"""


def test_targets_outlives_a_crash_an_exit_and_a_hang(plugins, monkeypatch, capsys):
    (plugins / "planted_ends.py").write_text(ENDS)
    null_backend.install(plugins, {"exits": "planted_ends:Exits", "hangs": "planted_ends:Hangs"}, "endvendor")
    backends.REGISTRY.refresh()
    names = ("aborts", "exits", "hangs", "null")
    found = {n: f for n, f in backends.REGISTRY._scan().items() if n in names}
    monkeypatch.setattr(backends.REGISTRY, "_found", found)
    monkeypatch.setattr(targets, "_LIMIT_S", 3.0)
    monkeypatch.setenv("CI", "1")
    assert main(["targets", "--json"]) == 0
    entries = {e["name"]: e for e in json.loads(capsys.readouterr().out)["targets"]}
    assert tuple(entries) == names and entries["null"]["available"]
    for name, says in (
        ("aborts", "SIGABRT"),
        ("exits", "SystemExit: 3"),
        ("hangs", "not finish within 3 s"),
    ):
        assert not entries[name]["available"] and says in entries[name]["reason"]
    assert "in capabilities" in entries["hangs"]["traceback"]  # where it hung
