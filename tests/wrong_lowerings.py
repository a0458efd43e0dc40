"""Backends that do something wrong in a subprocess, one way each; installed by `null_backend.install`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from null_backend import LowerBadly, NullBackend, NullSession

from sartor.backends.artifact import write_artifact
from sartor.backends.protocol import Capabilities, KernelTime


class Fork(LowerBadly):
    """Dies while a child of it lives, which holds every pipe that it had."""

    name = "lower-fork"

    def end(self, folder):
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSEGV)


class Daemon(LowerBadly):
    """As `Fork`, with a child that has left the group."""

    name = "lower-daemon"

    def end(self, folder):
        if os.fork() == 0:
            os.setsid()
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSEGV)


class Exit(LowerBadly):
    name = "lower-exit"

    def end(self, folder):
        sys.exit(3)


class OfItsOwnName(NullBackend):
    """Its one file is called as folders of ours have been."""

    name = "of-its-own-name"

    def lower(self, program, folder, options):
        def write(temporary: Path):
            (temporary / "artifact").write_text(json.dumps({"nodes": 1}))
            return ("artifact",), {}

        return write_artifact(program, folder, options, target=self.name, write=write)


class Nothing(NullBackend):
    name = "lower-nothing"

    def lower(self, program, folder, options):
        return None


class NoManifest(NullBackend):
    name = "lower-no-manifest"

    def lower(self, program, folder, options):
        folder.mkdir()
        (folder / "model").write_text("x")


class OtherTarget(NullBackend):
    name = "lower-other-target"

    def lower(self, program, folder, options):
        def write(temporary: Path):
            (temporary / "model").write_text("x")
            return ("model",), {}

        return write_artifact(program, folder, options, target="null", write=write)


class LaterChange(NullBackend):
    name = "lower-later-change"

    def lower(self, program, folder, options):
        artifact = super().lower(program, folder, options)
        artifact.main_file.write_text("something else")
        return artifact


class NotANumber(NullBackend):
    name = "not-a-number"

    def profile(self, artifact, options, runs=20):
        return [KernelTime("first", "Null", (), 1e-3, runs), KernelTime("second", "Null", (), np.nan, runs)]


class OddSettings(NullBackend):
    name = "odd-settings"

    def load(self, artifact, options):
        session = NullSession(artifact.inputs, 1e-4)
        session.settings = {"streams": 1, "device": object()}
        return session


class Wide(NullBackend):
    """Reserves much more address space than there is memory, as a driver of a GPU does."""

    name = "wide"
    reserves_address_space = True

    def capabilities(self):
        return Capabilities(self.name, "1.0", ("f32",), {}, control_flow=False, max_rank=4)

    def load(self, artifact, options):
        import mmap

        mmap.mmap(-1, 1 << 42, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)  # of no use, and free
        return super().load(artifact, options)


class Narrow(Wide):
    name = "narrow"
    reserves_address_space = False


class Facts(NullBackend):
    """Says what its process is like."""

    name = "facts"

    def profile(self, artifact, options, runs=20):
        facts = {"cache": os.environ.get("SARTOR_CACHE", ""), "offered": "", "telemetry": "imported"}
        with contextlib.suppress(OSError):
            facts["offered"] = Path("/proc/self/oom_score_adj").read_text().strip()
        try:
            import openvino_telemetry  # noqa: F401
        except ImportError:
            facts["telemetry"] = "refused"
        return [KernelTime(f"{name}={value}", "Fact", (), 1e-3, runs) for name, value in facts.items()]


class Cached(NullBackend):
    """Writes what its cache of conversions would be."""

    name = "cached"

    def lower(self, program, folder, options):
        def write(temporary: Path):
            (temporary / "null.json").write_text(os.environ.get("SARTOR_CACHE", "unset"))
            return ("null.json",), {}

        return write_artifact(program, folder, options, target=self.name, write=write)


class Vendors(NullBackend):
    """Imports vendors' packages without asking anybody, and uses what they count with."""

    name = "vendors"

    def lower(self, program, folder, options):
        import openvino  # noqa: F401
        from nncf.telemetry.wrapper import telemetry

        telemetry.start_session("planted")
        telemetry.send_event("planted", "action", "label")
        telemetry.end_session("planted")
        return super().lower(program, folder, options)


_ALL = [Fork, Daemon, Exit, OfItsOwnName, Nothing, NoManifest, OtherTarget, LaterChange, NotANumber]
_ALL += [OddSettings, Wide, Narrow, Facts, Cached, Vendors]
ENTRIES = {c.name: f"wrong_lowerings:{c.__name__}" for c in _ALL}
