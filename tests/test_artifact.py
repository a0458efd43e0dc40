"""Artifact folders: damaged manifests, and replacing one atomically, whoever else does."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from sartor.backends.artifact import MANIFEST, mismatch, open_artifact, replacing
from sartor.backends.protocol import Artifact, TensorSpec
from sartor.errors import UsageError
from sartor.ir.files import file_sha256, write_atomic


def write(folder, content="model", target="null"):
    """A whole artifact, by hand."""
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "model").write_text(content)
    artifact = Artifact(
        target=target,
        folder=folder,
        files=("sub/model",),
        sha256={"sub/model": file_sha256(folder / "sub" / "model")},
        precision="f32",
        inputs=(TensorSpec("x", "float32", ("N", 3)),),
        outputs=(TensorSpec("y", "float32", ("N", "")),),
        shapes={"x": (1, 3)},
        metadata={"runtime": "1.0"},
    )
    (folder / MANIFEST).write_text(json.dumps(artifact.to_dict()))
    return artifact


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- manifests -------------------------------------------------------------------------------
def test_a_whole_artifact_is_read_back(tmp_path):
    artifact = write(tmp_path / "a")
    assert open_artifact(tmp_path / "a") == artifact and mismatch(artifact) == ""
    assert open_artifact(os.path.relpath(tmp_path / "a")).to_dict() == artifact.to_dict()


def put(key, value):
    return lambda d: d.__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: d.pop("schema"), "its schema is None"),
        (put("schema", "sartor.artifact/2"), "reads 'sartor.artifact/1'"),
        (lambda d: d.pop("files"), "'files' is not a list"),
        (put("target", 3), "'target' is not text"),
        (put("precision", None), "'precision' is not text"),
        (put("metadata", []), "'metadata' is not an object"),
        (put("shapes", []), "'shapes' is not an object"),
        (put("shapes", {"x": [1, "3"]}), "not the shape of an input"),
        (put("shapes", {"x": [1, True]}), "not the shape of an input"),
        (put("shapes", {"x": 3}), "not the shape of an input"),
        (put("shapes", {"z": [1]}), "'z', which is not the shape of an input"),
        (put("files", []), "'files' names no file"),
        (put("files", [3]), "3 is no file inside"),
        (put("files", ["../../x"]), r"'\.\./\.\./x' is no file inside"),
        (put("files", ["/etc/passwd"]), "is no file inside"),
        (put("files", ["."]), "is no file inside"),
        (put("files", [""]), "is no file inside"),
        (put("files", ["sub/model\0"]), "is no file inside"),
        (put("files", ["out"]), "'out' is no file inside"),
        (put("files", ["sub/model", "sub/model"]), "twice"),
        (put("files", ["sub/model", "other"]), "nothing for the file 'other'"),
        (put("sha256", []), "'sha256' is not an object"),
        (put("sha256", {"sub/model": 1}), "nothing for the file 'sub/model'"),
        (put("inputs", [{"name": "x"}]), "'inputs' holds"),
        (put("inputs", ["x"]), "'inputs' holds"),
        (put("outputs", [{"name": "y", "dtype": "float32", "shape": [-1]}]), "'outputs' holds"),
        (put("outputs", [{"name": "y", "dtype": "float32", "shape": [1.5]}]), "'outputs' holds"),
        (put("outputs", [{"name": "y", "dtype": "f", "shape": []}] * 2), "one tensor twice"),
    ],
)
def test_damaged_manifests_are_refused_with_the_reason(tmp_path, damage, says):
    write(tmp_path / "a")
    (tmp_path / "elsewhere").write_text("x")
    (tmp_path / "a" / "out").symlink_to(tmp_path / "elsewhere")
    data = json.loads((tmp_path / "a" / MANIFEST).read_text())
    data["sha256"]["out"] = "0"
    damage(data)
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(UsageError, match=f"is not an artifact folder: .*{says}.*Write one with"):
        open_artifact(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "\ud800"])
def test_what_is_no_manifest_at_all(tmp_path, text):
    (tmp_path / MANIFEST).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UsageError, match="is not an artifact folder"):
        open_artifact(tmp_path)


# ---- replacing -------------------------------------------------------------------------------
def replace(folder, content):
    with replacing(folder) as new:
        write(new, content)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    replace(tmp_path / "deep" / "a", "one")
    replace(tmp_path / "deep" / "a", "two")
    with pytest.raises(ValueError, match="planted"), replacing(tmp_path / "deep" / "a") as new:
        write(new, "three")
        raise ValueError("planted")
    assert (tmp_path / "deep" / "a" / "sub" / "model").read_text() == "two"
    assert names(tmp_path / "deep") == ["a"]


def test_the_old_folder_is_back_when_the_new_one_cannot_take_its_place(tmp_path):
    replace(tmp_path / "a", "one")
    with (
        pytest.raises(UsageError, match=r"'.*/a' cannot be written: No such file"),
        replacing(tmp_path / "a"),
    ):
        pass  # and creates nothing
    assert (tmp_path / "a" / "sub" / "model").read_text() == "one" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_somebody_puts_there_meanwhile_is_kept(tmp_path, kind):
    with pytest.raises(UsageError, match=r"is a file|holds no artifact"), replacing(tmp_path / "a") as new:
        write(new)
        if kind == "folder":
            (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine" if kind == "folder" else tmp_path / "a").write_text("keep")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "mine" if kind == "folder" else tmp_path / "a").read_text() == "keep"


def test_several_writers_of_one_folder(tmp_path, monkeypatch):
    failures = []
    rename = os.rename

    def slowly(*paths):
        rename(*paths)
        time.sleep(0.001)

    monkeypatch.setattr(os, "rename", slowly)

    def often(content):
        try:
            for _ in range(30):
                replace(tmp_path / "a", content)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=often, args=(content,)) for content in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and names(tmp_path) == ["a"]
    assert mismatch(open_artifact(tmp_path / "a")) == ""


def test_what_a_link_points_to_is_replaced(tmp_path):
    replace(tmp_path / "disk" / "a", "one")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "a")
    replace(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and names(tmp_path) == ["disk", "link"]
    assert (tmp_path / "disk" / "a" / "sub" / "model").read_text() == "two"
    (tmp_path / "new").symlink_to(tmp_path / "disk" / "b")  # nothing there yet
    replace(tmp_path / "new", "three")
    assert names(tmp_path / "disk") == ["a", "b"]


@pytest.mark.parametrize("name", ["a" * 250, "ü" * 120])
def test_names_may_be_as_long_as_the_file_system_takes(tmp_path, name):
    replace(tmp_path / name, "one")
    write_atomic(tmp_path / name / "sub" / name, b"x")
    assert names(tmp_path) == [name] and names(tmp_path / name / "sub") == sorted([name, "model"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a" * 256, "name too long"),
        ("file", "is a file"),
        ("file/a", "Not a directory"),
        ("loop", "cannot be"),
    ],
)
def test_what_the_file_system_refuses_is_said_before_the_work(tmp_path, name, says):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    entered = []
    with pytest.raises(UsageError, match=says), replacing(tmp_path / name) as new:
        entered.append(new)
        write(new)
    assert entered == [] or name == "loop"
    assert names(tmp_path) == ["file", "loop"]


def test_the_new_folder_is_readable_by_others(tmp_path):
    old = os.umask(0o022)
    try:
        replace(tmp_path / "a", "one")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o755
