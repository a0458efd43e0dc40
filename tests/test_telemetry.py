"""Nothing phones out and nothing is written to HOME, in Python or below it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sartor import backends
from sartor.backends import process

TESTS = Path(__file__).parent

DENY = """
import json, os, socket, sys
attempts = []
def deny(name):
    def denied(*arguments, **keywords):
        attempts.append(name)
        raise OSError('network denied by the test: ' + name)
    return denied
for name in ('getaddrinfo', 'gethostbyname', 'create_connection'):
    setattr(socket, name, deny(name))
class Denied(socket.socket):
    __init__ = deny('socket')
socket.socket = Denied
"""

# A kernel filter: `socket(AF_INET or AF_INET6, ...)` by any thread, in any language, kills the process.
FILTER = """
import ctypes, struct
def seccomp():
    code = [
        (0x20, 0, 0, 0),            # load the system call number
        (0x15, 0, 4, 41),           # socket on x86-64, else allow
        (0x20, 0, 0, 16),           # load argument 0, the family
        (0x15, 1, 0, 2),            # AF_INET
        (0x15, 0, 1, 10),           # AF_INET6
        (0x06, 0, 0, 0x80000000),   # kill the process
        (0x06, 0, 0, 0x7FFF0000),   # allow
    ]
    program = b''.join(struct.pack('HBBI', *line) for line in code)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack('HxxxxxxQ', len(code), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0):
        raise SystemExit(77)
    return buffer
kept = seccomp()
"""

WORK = """
import os, pathlib
sys.path.insert(0, sys.argv[1])
from backend_programs import small_cnn
from builders import random_inputs
from sartor import backends
from sartor.backends.protocol import TargetOptions
program = small_cnn(16)
os.environ['SARTOR_CACHE'] = sys.argv[2] + '/cache'
for name in ('onnxruntime', 'openvino', 'reference', 'tflite', 'tflite-channel-last', 'tflite-micro'):
    backend = backends.get(name)
    artifact = backend.lower(program, pathlib.Path(sys.argv[2]) / name, TargetOptions())
    options = TargetOptions(shapes=program.input_shapes)
    backend.load(artifact, options).run(random_inputs(program))
    backend.compile(program.to_bytes(), options)
    backend.profile(artifact, options, 2)
backends.get('tensorrt').lower(program, pathlib.Path(sys.argv[2]) / 'tensorrt', TargetOptions())
"""

PLUGIN = """
import pathlib
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import null_backend, wrong_lowerings
from backend_programs import small_cnn
from sartor.backends import isolation
from sartor.backends.protocol import TargetOptions
null_backend.install(pathlib.Path(sys.argv[2]), wrong_lowerings.ENTRIES)
isolation.lower('vendors', small_cnn(4), pathlib.Path(sys.argv[2]) / 'a', TargetOptions())
"""

REPORT = "\nprint('REPORT' + json.dumps(attempts))\n"


def execute(code: str, tmp_path: Path) -> tuple[int, list[str], list[str]]:
    """Exit code, network attempts seen by Python, and what was written to HOME."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }  # without CI variables, which silence vendors
    environment["PYTHONPATH"] = str(TESTS.parent)
    done = subprocess.run(
        [sys.executable, "-c", code, str(TESTS), str(tmp_path / "out")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    reports = [line for line in done.stdout.splitlines() if line.startswith("REPORT")]
    attempts = json.loads(reports[-1].removeprefix("REPORT")) if reports else []
    if done.returncode == 77:
        pytest.skip("the kernel refuses a seccomp filter here")
    assert done.returncode < 0 or reports, done.stderr[-2000:]
    return done.returncode, attempts, sorted(str(p.relative_to(home)) for p in home.rglob("*"))


def test_the_built_in_backends_are_these():
    owners = {plugin.name for plugin in backends.REGISTRY.plugins() if plugin.owner.split()[0] == "sartor"}
    # A new one must join WORK.
    tflite = {"tflite", "tflite-channel-last", "tflite-micro"}
    assert owners == {"onnxruntime", "openvino", "reference", "tensorrt"} | tflite


NATIVE = sys.platform == "linux" and platform.machine() == "x86_64"
native = pytest.mark.skipif(not NATIVE, reason="the filter is for Linux on x86-64")


def test_backends_neither_connect_nor_write_to_home(tmp_path):
    """Neither in Python nor, where the filter exists, below it."""
    assert execute(DENY + (FILTER if NATIVE else "") + WORK + REPORT, tmp_path) == (0, [], [])


@native
@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="nncf is not installed")
def test_a_plugin_that_imports_vendors_itself_cannot_count_either(tmp_path):
    """In the subprocess the opt-out comes before the plugin does."""
    assert execute("import sys, json\nattempts = []\n" + FILTER + PLUGIN + REPORT, tmp_path) == (0, [], [])


def test_a_planted_call_and_file_are_seen(tmp_path):
    planted = (
        "\ntry:\n    socket.create_connection(('example.invalid', 80))\nexcept OSError:\n    pass\n"
        "try:\n    socket.socket()\nexcept OSError:\n    pass\n"
        "open(os.path.expanduser('~/planted'), 'w').close()\n"
    )
    code, attempts, files = execute(DENY + (FILTER if NATIVE else "") + planted + REPORT, tmp_path)
    assert (code, attempts, files) == (0, ["create_connection", "socket"], ["planted"])


@native
def test_a_planted_native_socket_is_killed(tmp_path):
    planted = "\nctypes.CDLL(None).socket(2, 1, 0)\n"
    code, _, _ = execute("import sys, json\nattempts = []\n" + FILTER + planted + REPORT, tmp_path)
    assert code == -31  # SIGSYS


@pytest.mark.parametrize("vendor", ["onnxruntime", "openvino"])
def test_the_vendor_alone_would_have_done_it(vendor, tmp_path):
    """Imported without our opt-out, both leave traces: what the tests above look for is real."""
    code, attempts, files = execute(DENY + f"import {vendor}\n" + REPORT, tmp_path)
    if code == 0 and not (attempts or files):
        pytest.skip(f"this release of {vendor} has no telemetry to see at import")


def test_the_opt_out_reaches_the_children():
    environment = process._environment(1)
    assert environment["ORT_DISABLE_TELEMETRY"] == "1" and environment["RAY_USAGE_STATS_ENABLED"] == "0"
