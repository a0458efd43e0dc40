"""Backends that are wrong in one way each, made from the example in examples/backend_plugin."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import sartor_tape
from conformance_disguise import Disguise
from sartor_tape import legality, run, tape

from sartor.backends.artifact import concrete_shapes, open_artifact, write_artifact
from sartor.backends.legality import ModelRule, NodeRule, Rules, check_rules
from sartor.backends.protocol import KernelTime


class Wrong(Disguise, sartor_tape.TapeBackend):
    """Wrong in what the example does."""

    precisions = ("f32",)


class SwappedChannels(Wrong):
    """The last axis but two of every output is reversed: channels of an image."""

    def answer(self, session, right, inputs):
        return {k: v[:, ::-1].copy() if v.ndim == 4 else v for k, v in right(inputs).items()}


class StaleBuffer(Wrong):
    """One output buffer per session, handed out at every run."""

    def answer(self, session, right, inputs):
        outputs = right(inputs)
        buffers = session.__dict__.setdefault("buffers", {})
        for name, array in outputs.items():
            if name not in buffers or buffers[name].shape != array.shape:
                buffers[name] = np.empty_like(array)
            buffers[name][...] = array
        return dict(buffers)


class OneRunLate(Wrong):
    """Answers with what the run before computed."""

    def answer(self, session, right, inputs):
        outputs = right(inputs)
        before = session.__dict__.get("before", outputs)
        session.before = outputs
        return before


class Nondeterministic(Wrong):
    """Noise far below every tolerance."""

    def answer(self, session, right, inputs):
        noise = np.random.default_rng(time.perf_counter_ns())
        return {
            k: (v * (1 + 1e-6 * noise.standard_normal(v.shape))).astype(v.dtype)
            for k, v in right(inputs).items()
        }


class SessionsDiffer(Wrong):
    """Every session rounds differently."""

    count = itertools.count()

    def wrapped(self, session):
        session.factor = np.float32(1 + 1e-6 * (next(self.count) % 7))
        return super().wrapped(session)

    def answer(self, session, right, inputs):
        return {k: v * session.factor for k, v in right(inputs).items()}


class WrongShapes(Wrong):
    """Outputs without the batch axis."""

    def answer(self, session, right, inputs):
        return {k: v[0] if len(v) == 1 else v for k, v in right(inputs).items()}


class WrongType(Wrong):
    def answer(self, session, right, inputs):
        return {k: v.astype(np.float64) for k, v in right(inputs).items()}


class WritesIntoInputs(Wrong):
    def answer(self, session, right, inputs):
        outputs = right(inputs)
        for array in inputs.values():
            array *= 2
        return outputs


class AcceptsAnyInput(Wrong):
    """Runs whatever it is given, as far as it comes."""

    def answer(self, session, right, inputs):
        try:
            return right(inputs)
        except Exception:
            return {name: np.zeros(1, np.float32) for name in session._tape["outputs"]}


class TrustsFiles(Wrong):
    """Loads without looking at the hashes."""

    def load(self, artifact, options):
        fixed = concrete_shapes(artifact.inputs, options.shapes)
        instructions = json.loads((artifact.folder / "model.tape").read_text(errors="replace"))
        block = (artifact.folder / "weights.bin").read_bytes()
        return run.TapeSession(instructions, tape.read_weights(instructions, block), artifact.inputs, fixed)


class AnyPrecision(Wrong):
    """Takes every precision for float32."""

    def legality(self, program, options):
        return super().legality(program, dataclasses.replace(options, precision="f32"))

    def lower(self, program, folder, options):
        return super().lower(program, folder, dataclasses.replace(options, precision="f32"))

    def load(self, artifact, options):
        return super().load(artifact, dataclasses.replace(options, precision="f32"))

    def compile(self, model, options):
        return super().compile(model, dataclasses.replace(options, precision="f32"))


class RefusesEverything(Wrong):
    def rules(self):
        return Rules(model=(ModelRule("never", "Nothing is legal.", lambda program, options: (False, "it")),))

    def legality(self, program, options):
        return check_rules(program, options, self.rules())


class AcceptsEverything(Wrong):
    def rules(self):
        return Rules()

    def legality(self, program, options):
        legality.require_precision(self.name, self.precisions, options)
        return check_rules(program, options, self.rules())


class SilentRules(Wrong):
    def rules(self):
        return Rules(nodes=(NodeRule("quiet", "", lambda program, node: (True, "")),))


class LegalizesInPlace(Wrong):
    def legalize(self, program):
        for node in list(program.nodes()):
            node.name = f"{node.name}_"
        return super().legalize(program)


class RandomBytes(Wrong):
    """A time stamp in the artifact."""

    def lower(self, program, folder, options):
        def write(temporary):
            super(RandomBytes, self).lower(program, temporary / "in", options)
            for file in ("model.tape", "weights.bin"):
                (temporary / "in" / file).rename(temporary / file)
            (temporary / "in" / "artifact.json").unlink()
            (temporary / "in").rmdir()
            (temporary / "stamp").write_text(str(time.time_ns()))
            return ("model.tape", "weights.bin", "stamp"), {}

        return write_artifact(program, folder, options, target=self.name, write=write)


class Litters(Wrong):
    def lower(self, program, folder, options):
        artifact = super().lower(program, folder, options)
        (folder.parent / "compiler.log").write_text("done")
        return artifact


class FirstSampleOnly(Wrong):
    def answer(self, session, right, inputs):
        return {k: np.repeat(v[:1], len(v), axis=0) for k, v in right(inputs).items()}


class MixesSamples(Wrong):
    """A matrix product that takes the samples of a batch in another order."""

    def answer(self, session, right, inputs):
        mixed = any(i["kernel"] == "matmul" for i in session._tape["instructions"])
        return {k: v[::-1].copy() if mixed else v for k, v in right(inputs).items()}


class StaleRows(Wrong):
    """A buffer for the largest batch so far; of a smaller one, the rows are taken from its other end."""

    def answer(self, session, right, inputs):
        outputs = right(inputs)
        buffers = session.__dict__.setdefault("buffers", {})
        for name, array in outputs.items():
            if name not in buffers or len(buffers[name]) < len(array):
                buffers[name] = array.copy()
            buffers[name][: len(array)] = array
        return {k: buffers[k][len(buffers[k]) - len(v) :].copy() for k, v in outputs.items()}


class FixedBatch(MixesSamples):
    """The same with artifacts of one batch size, so that it shows only where one of several samples is made."""

    def lower(self, program, folder, options):
        artifact = super().lower(program, folder, options)
        shapes = {**program.input_shapes, **options.shapes}
        manifest = artifact.to_dict()
        for spec in manifest["inputs"]:
            spec["shape"] = list(shapes[spec["name"]])
        (folder / "artifact.json").write_text(json.dumps(manifest))
        return open_artifact(folder)

    def answer(self, session, right, inputs):
        return {k: v[::-1].copy() for k, v in right(inputs).items()}


class IgnoresStrides(Wrong):
    """Reads every input as it lies in memory."""

    def answer(self, session, right, inputs):
        return right({k: v.ravel(order="K").reshape(v.shape) for k, v in inputs.items()})


class IdlePrepare(Wrong):
    """What is timed does nothing."""

    def wrapped(self, session):
        session.prepare = lambda inputs: lambda: None
        return super().wrapped(session)


class TakesByteOrder(Wrong):
    """Takes the bytes of an input for numbers of this machine."""

    def answer(self, session, right, inputs):
        return right({k: v.view(v.dtype.newbyteorder("=")) for k, v in inputs.items()})


class DiffersLater(Wrong):
    """Changes its kernels once it has run often enough to be worth it."""

    def answer(self, session, right, inputs):
        session.count = session.__dict__.get("count", 0) + 1
        return {k: v * np.float32(1 + 1e-6 * (session.count > 6)) for k, v in right(inputs).items()}


class ReturnsViews(Wrong):
    """Flattens without copying."""

    def answer(self, session, right, inputs):
        outputs = right(inputs)
        first, *others = session._tape["instructions"]
        if first["kernel"] == "flatten" and not others:
            return {k: inputs[first["reads"][0]].reshape(v.shape) for k, v in outputs.items()}
        return outputs


class SplitsByEnvironment(Wrong):
    """A pool as large as the environment says, of which only the first thread does its share."""

    def answer(self, session, right, inputs):
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        outputs = right(inputs)
        for array in outputs.values():
            array[..., array.shape[-1] // threads :] = 0
        return outputs


class LeavesThreads(Wrong):
    def wrapped(self, session):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return super().wrapped(session)


class LeavesFilesOpen(Wrong):
    def wrapped(self, session):
        os.open(os.devnull, os.O_RDONLY)
        return super().wrapped(session)


class WritesHome(Wrong):
    """A log file of the compiler's."""

    def lower(self, program, folder, options):
        (Path.home() / ".mydevice").mkdir(exist_ok=True)
        (Path.home() / ".mydevice" / "compiler.log").write_text("done")
        return super().lower(program, folder, options)


class ErraticSpeed(Wrong):
    """Every second process finds the device at a fifth of its clock."""

    delay_s = 0.0

    def load(self, artifact, options):
        if not self.delay_s:
            visits = artifact.folder.parent / "visits"
            count = len(visits.read_bytes()) if visits.exists() else 0
            visits.write_bytes(bytes(count + 1))
            type(self).delay_s = 5e-3 if count % 2 else 1e-3
        return super().load(artifact, options)

    def answer(self, session, right, inputs):
        end = time.perf_counter() + self.delay_s
        while time.perf_counter() < end:
            pass
        return {k: np.zeros(1, np.float32) for k in session._tape["outputs"]}


class ZeroProfile(Wrong):
    def profile(self, artifact, options, runs=20):
        return [dataclasses.replace(k, median_s=0.0) for k in super().profile(artifact, options, runs)]


class RaisingRule(Wrong):
    """Takes the second operand of a convolution for a weight, always."""

    def rules(self):
        rule = NodeRule("kernel-size", "Kernels have at most 7 by 7 weights.", _small_kernel)
        right = super().rules()
        operators = {**right.operators, "Conv": (*right.operators["Conv"], rule)}
        return dataclasses.replace(right, operators=operators)

    def legality(self, program, options):
        return check_rules(self.legalize(program), options, self.rules())


def _small_kernel(program, node):
    sizes = node.inputs[1].const_value.shape[2:]
    return max(sizes) <= 7, f"a {'x'.join(map(str, sizes))} kernel"


class ConstantTime(Wrong):
    """Whatever the work, a run takes a millisecond."""

    def answer(self, session, right, inputs):
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
        return {k: np.zeros(1, np.float32) for k in session._tape["outputs"]}


class ForeignNodes(Wrong):
    def profile(self, artifact, options, runs=20):
        return [KernelTime("kernel", "conv", ("node_of_another_model",), 1e-4, runs)]


class Crashes(Wrong):
    def load(self, artifact, options):
        os.write(2, b"planted last words\n")
        ctypes.string_at(0)


class Hangs(Wrong):
    def load(self, artifact, options):
        time.sleep(600)
