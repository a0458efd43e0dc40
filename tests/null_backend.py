"""An out-of-tree backend, and misbehaving ones, installed by a metadata folder alone."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sartor.backends.artifact import check_inputs, verify_files, write_artifact
from sartor.backends.legality import Rules, check_rules, fixed_shapes, require_legal
from sartor.backends.protocol import Capabilities, KernelTime, Session, TensorSpec
from sartor.errors import UsageError

SECONDS_PER_NODE = 2e-4


class NullSession(Session):
    """Spins for a time proportional to the nodes; outputs zeros."""

    def __init__(self, inputs: tuple[TensorSpec, ...], seconds: float):
        self.inputs = inputs
        self.settings = {"seconds": seconds}
        self._seconds = seconds

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        check_inputs(self.inputs, {}, inputs)
        end = time.perf_counter() + self._seconds
        while time.perf_counter() < end:
            pass
        return {"y": np.zeros(1, np.float32)}


class NullBackend:
    name = "null"

    def capabilities(self):
        return Capabilities("null", "1.0", ("f32",), {}, control_flow=False, max_rank=4)

    def channel_grid(self, op_type, precision="f32", attributes=None):
        return 1

    def rules(self):
        return Rules(model=(fixed_shapes(),))

    def legality(self, program, options):
        return check_rules(program, options, self.rules())

    def legalize(self, program):
        return program

    def lower(self, program, folder, options):
        require_legal(self.name, self.legality(program, options))

        def write(temporary: Path):
            (temporary / "null.json").write_text(json.dumps({"nodes": len(list(program.nodes()))}))
            return ("null.json",), {}

        return write_artifact(program, folder, options, target=self.name, write=write)

    def load(self, artifact, options):
        verify_files(artifact)
        nodes = json.loads(artifact.main_file.read_text())["nodes"]
        return NullSession(artifact.inputs, nodes * SECONDS_PER_NODE)

    def compile(self, model, options):
        if model == b"crash":
            os.abort()
        if model == b"fail":
            raise ValueError("planted failure")
        return NullSession((TensorSpec("x", "float32", (1,)),), len(model) * SECONDS_PER_NODE)

    def profile(self, artifact, options, runs=20):
        return [KernelTime("all", "Null", (), SECONDS_PER_NODE, runs)]


class LowerBadly(NullBackend):
    """Begins to write its artifact, and then does not end well."""

    def lower(self, program, folder, options):
        def write(temporary: Path):
            (temporary / "half").write_text("half an artifact")
            os.write(2, b"planted last words\n")
            self.end(temporary)
            return ("half",), {}

        return write_artifact(program, folder, options, target=self.name, write=write)


class LowerCrash(LowerBadly):
    name = "lower-crash"

    def end(self, folder):
        os.kill(os.getpid(), signal.SIGSEGV)


class LowerHang(LowerBadly):
    name = "lower-hang"

    def end(self, folder):
        time.sleep(600)


class LowerHog(LowerBadly):
    name = "lower-hog"

    def end(self, folder):
        np.empty(3 << 30, np.uint8)  # never touched: address space only


class LowerKilled(LowerBadly):
    """As the kernel ends a process when memory runs out."""

    name = "lower-killed"

    def end(self, folder):
        os.kill(os.getpid(), signal.SIGKILL)


class LowerRaise(LowerBadly):
    name = "lower-raise"

    def end(self, folder):
        raise ValueError("planted failure")


class Crash(NullBackend):
    name = "crash"

    def load(self, artifact, options):
        os.write(2, b"planted last words\n")
        os.abort()


class Hang(NullBackend):
    name = "hang"

    def load(self, artifact, options):
        time.sleep(600)


class Stubborn(NullBackend):
    """Hangs with a child of its own, and without the worker's own alarm."""

    name = "stubborn"

    def load(self, artifact, options):
        faulthandler.cancel_dump_traceback_later()
        child = subprocess.Popen(["sleep", "600"])
        (artifact.folder / "child").write_text(str(child.pid))
        time.sleep(600)


class Hog(NullBackend):
    name = "hog"

    def load(self, artifact, options):
        np.empty(3 << 30, np.uint8)  # never touched: address space only
        return super().load(artifact, options)


class Chatty(NullBackend):
    name = "chatty"

    def load(self, artifact, options):
        os.write(1, b'{"event": "round", "order": [0], "visits_s": [123.0]}\nnot json\n')
        print("vendor banner")
        return super().load(artifact, options)


class Refuse(NullBackend):
    name = "refuse"

    def load(self, artifact, options):
        error = UsageError("planted refusal")
        error.add_note("planted note")
        raise error


class Fragile(NullBackend):
    """A program with a Tanh ends the process, one with a Neg is an error; every node is a kernel."""

    name = "fragile"

    def load(self, artifact, options):
        verify_files(artifact)
        types = json.loads(artifact.main_file.read_text())["types"]
        if "Tanh" in types:
            os.abort()
        if "Neg" in types:
            raise ValueError("planted failure")
        return NullSession(artifact.inputs, len(types) * SECONDS_PER_NODE)

    def lower(self, program, folder, options):
        def write(temporary: Path):
            (temporary / "null.json").write_text(json.dumps({"types": [n.op_type for n in program.nodes()]}))
            return ("null.json",), {}

        return write_artifact(program, folder, options, target=self.name, write=write)

    def profile(self, artifact, options, runs=20):
        types = json.loads(artifact.main_file.read_text())["types"]
        return [KernelTime(f"{i}", t, (), 2 * SECONDS_PER_NODE, runs) for i, t in enumerate(types)]


class Incomplete:
    """Lacks every method."""


def install(folder: Path, entries: Mapping[str, str], distribution: str = "nullvendor") -> None:
    """Write the metadata folder of a distribution that registers `entries` as backends."""
    info = folder / f"{distribution}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1\n")
    lines = [f"{name} = {target}" for name, target in entries.items()]
    (info / "entry_points.txt").write_text("[sartor.backends]\n" + "\n".join(lines) + "\n")


_BACKENDS = [NullBackend, Crash, Hang, Stubborn, Hog, Chatty, Refuse, Fragile]
_BACKENDS += [LowerCrash, LowerHang, LowerHog, LowerKilled, LowerRaise]
ENTRIES = {
    **{c.name: f"null_backend:{c.__name__}" for c in _BACKENDS},
    "incomplete": "null_backend:Incomplete",
}
