"""The registry: lazy, tolerant of one bad plugin, exact about names."""

from __future__ import annotations

import subprocess
import sys

import null_backend
import pytest

import sartor.plugins
from sartor import backends
from sartor.errors import UsageError
from sartor.plugins import Registry


def registry() -> Registry:
    return Registry("sartor.backends", "backend", {"builtin": "null_backend:NullBackend"})


@pytest.fixture
def install(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda entries, distribution="nullvendor": null_backend.install(tmp_path, entries, distribution)


def test_listing_imports_neither_plugins_nor_vendors():
    code = (
        "import sys\nfrom sartor import backends\n"
        "assert {'onnxruntime', 'openvino'} <= set(backends.available())\n"
        "heavy = {'onnxruntime', 'openvino', 'torch', 'onnx', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "backends.get('openvino')\n"
        "heavy = {'onnxruntime', 'openvino', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_broken_plugin_names_its_owner_and_hides_no_other(install):
    install({"broken": "no_such_module_here:Thing", "fine": "null_backend:NullBackend"})
    found = registry()
    assert {"broken", "fine", "builtin"} <= set(found.names())
    assert found.load("fine") is null_backend.NullBackend
    with pytest.raises(UsageError, match=r"'broken'.*'nullvendor 0.1'.*ModuleNotFoundError") as raised:
        found.load("broken")
    assert any("Traceback" in note for note in raised.value.__notes__)


def test_two_owners_of_one_name_are_an_error_for_that_name_only(install):
    install({"twice": "null_backend:NullBackend"}, "first")
    install({"twice": "null_backend:Crash", "once": "null_backend:Crash"}, "second")
    found = registry()
    assert found.load("once") is null_backend.Crash
    with pytest.raises(UsageError, match=r"'twice'.*first 0.1.*second 0.1|'twice'.*second 0.1.*first 0.1"):
        found.load("twice")


def test_a_plugin_cannot_take_a_built_in_name(install):
    install({"builtin": "null_backend:Crash"})
    with pytest.raises(UsageError, match=r"'sartor'.*'nullvendor 0.1'"):
        registry().load("builtin")


def test_the_same_registration_seen_twice_is_one(install):
    install({"builtin": "null_backend:NullBackend"})
    assert registry().load("builtin") is null_backend.NullBackend


def test_built_ins_work_without_metadata(monkeypatch):
    monkeypatch.setattr(sartor.plugins.importlib.metadata, "entry_points", lambda group: ())
    found = registry()
    assert found.names() == ("builtin",)
    assert found.load("builtin") is null_backend.NullBackend


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(UsageError, match=r"Unknown backend 'onnxruntine'; known: .*'openvino'.*Did you mean"):
        backends.get("onnxruntine")
    with pytest.raises(UsageError) as raised:
        backends.get("zzz")
    assert "Did you mean" not in str(raised.value)


def test_refresh_sees_new_plugins(install):
    found = registry()
    assert "late" not in found.names()
    install({"late": "null_backend:NullBackend"})
    assert "late" not in found.names()
    found.refresh()
    assert "late" in found.names()
