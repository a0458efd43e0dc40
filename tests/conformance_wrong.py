"""Backends that are wrong in one way each, made from the example in examples/backend_plugin."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import os
import time

import numpy as np
import sartor_tape
from sartor_tape import kernels, legality, run, tape

from sartor.backends.artifact import concrete_shapes, write_artifact
from sartor.backends.legality import ModelRule, NodeRule, Rules, check_rules
from sartor.backends.protocol import KernelTime


class Wrong(sartor_tape.TapeBackend):
    """The example under another name, with `answer` between its runtime and the caller."""

    precisions = ("f32",)

    @property
    def name(self):
        return next(name for name, found in ENTRIES.items() if found is type(self))

    def capabilities(self):
        return dataclasses.replace(legality.capabilities(), name=self.name, precisions=self.precisions)

    def lower(self, program, folder, options):
        artifact = super().lower(program, folder, options)
        manifest = json.loads((folder / "artifact.json").read_text())
        (folder / "artifact.json").write_text(json.dumps({**manifest, "target": self.name}))
        return dataclasses.replace(artifact, target=self.name)

    def load(self, artifact, options):
        return self.wrapped(super().load(artifact, options))

    def compile(self, model, options):
        return self.wrapped(super().compile(model, options))

    def wrapped(self, session):
        right = session.run
        session.run = lambda inputs: self.answer(session, right, inputs)
        return session

    def answer(self, session, right, inputs):
        return right(inputs)


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


class InName(AnyPrecision):
    """Claims bfloat16 and computes in float32."""

    precisions = ("f32", "bf16")


class DropsQuantization(AnyPrecision):
    """Claims int8, and runs the float model that is inside the quantized one."""

    precisions = ("f32", "int8")

    def legality(self, program, options):
        return super().legality(self.legalize(program), options)

    def legalize(self, program):
        return super().legalize(_without_quantization(program))


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


def _without_quantization(program):
    """Activations past QuantizeLinear and DequantizeLinear; stored integers as the floats they stand for."""
    import onnx_ir as ir

    stored = program.initializers
    if not any(node.op_type == "DequantizeLinear" for node in program.nodes()):
        return program
    clone = program.clone()
    stored = clone.initializers
    for node in list(clone.nodes()):
        if node.op_type != "DequantizeLinear":
            continue
        source, output = node.inputs[0], node.outputs[0]
        if source.name in stored:
            scale = np.asarray(stored[node.inputs[1].name].const_value.numpy())
            integers = source.const_value.numpy().astype(np.float32)
            axis = node.attributes.get_int("axis", 1)
            along = [-1 if a == axis else 1 for a in range(integers.ndim)]
            tensor = ir.Tensor((integers * scale.reshape(along)).astype(np.float32), name=f"{output.name}_w")
            value = ir.Value(name=tensor.name, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
            value.shape = ir.Shape(tensor.shape)
            clone.graph.register_initializer(value)
        else:
            value = source.producer().inputs[0]
        ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
        clone.graph.remove(node, safe=True)
    for node in [n for n in clone.nodes() if n.op_type == "QuantizeLinear"]:
        clone.graph.remove(node, safe=True)
    for name in [n for n, v in clone.initializers.items() if not v.uses()]:
        del clone.graph.initializers[name]
    for value, before in zip(clone.graph.outputs, program.graph.outputs, strict=True):
        value.name, value.type, value.shape = before.name, before.type, before.shape
    clone.invalidate()
    return clone


ENTRIES = {
    f"wrong-{found.__name__.lower()}": found
    for found in list(globals().values())
    if isinstance(found, type) and issubclass(found, Wrong)
}
assert kernels.KERNELS
