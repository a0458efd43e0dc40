"""The cache of conversions: what a kill leaves in it, and how to do without."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from sartor.backends.tflite import cache


def test_what_a_killed_writer_left_goes_after_an_hour(tmp_path, monkeypatch):
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path))
    place = cache.folder()
    place.mkdir()
    old, new = place / f".{'0' * 64}.tflite-entry.abc", place / f".{'1' * 64}.tflite-entry.def"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 3700,) * 2)
    cache.kept("k", lambda: (b"abc", {}))
    assert sorted(p.name for p in place.iterdir()) == [new.name, "k.tflite-entry"]


def test_a_killed_writer_leaves_something_of_that_kind(tmp_path, monkeypatch):
    code = (
        "import os\nfrom sartor.backends.tflite import cache\nfrom sartor.ir import files\n"
        "files.os.replace = lambda *_: os._exit(9)\ncache.kept('k', lambda: (b'abc', {}))\n"
    )
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    (left,) = cache.folder().iterdir()
    os.utime(left, (time.time() - 3700,) * 2)
    cache.kept("other", lambda: (b"abc", {}))
    assert [p.name for p in cache.folder().iterdir()] == ["other.tflite-entry"]


def test_off_means_that_every_conversion_is_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SARTOR_CACHE", "off")
    done = []
    for number in range(2):
        assert cache.kept("k", lambda n=number: (done.append(n) or b"abc", {})) == (b"abc", {})
    assert done == [0, 1] and list(tmp_path.iterdir()) == []
