"""Backends that are wrong in narrow arithmetic, most of them made from the one for ONNX Runtime."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
from conformance_disguise import Disguise
from conformance_wrong import AnyPrecision

from sartor.backends.artifact import open_artifact
from sartor.backends.onnxruntime import OnnxRuntimeBackend
from sartor.conformance.models import output_steps


class InName(AnyPrecision):
    """Claims bfloat16 and computes in float32."""

    precisions = ("f32", "bf16")


class DropsQuantization(AnyPrecision):
    """Claims int8, and runs the float model that is inside the quantized one."""

    precisions = ("f32", "int8")

    def legality(self, program, options):
        return super().legality(_without_quantization(program), options)

    def lower(self, program, folder, options):
        return super().lower(_without_quantization(program), folder, options)


class WrongRuntime(Disguise, OnnxRuntimeBackend):
    """Wrong in what the example cannot do."""

    precisions = ("f32", "f16", "int8")


class OffByOneZero(WrongRuntime):
    """The zero point of quantized outputs is one less than stored."""

    def load(self, artifact, options):
        session = super().load(artifact, options)
        session.steps = artifact.metadata["steps"]
        return session

    def lower(self, program, folder, options):
        artifact = super().lower(program, folder, options)
        manifest = artifact.to_dict()
        manifest["metadata"]["steps"] = output_steps(program)
        (folder / "artifact.json").write_text(json.dumps(manifest))
        return open_artifact(folder)

    def answer(self, session, right, inputs):
        return {k: v + np.float32(session.steps.get(k, 0)) for k, v in right(inputs).items()}


class RoundsDown(WrongRuntime):
    """Outputs are truncated where they should be rounded: half a step is taken off before."""

    def lower(self, program, folder, options):
        clone = program.clone()
        for value in clone.graph.outputs:
            node = value.producer()
            while node.op_type in ("Identity", "DequantizeLinear"):
                node = node.inputs[0].producer()
            if node.op_type == "QuantizeLinear":
                half = np.asarray(-0.5 * node.inputs[1].const_value.numpy(), np.float32)
                shift = _initializer(clone, half, f"{value.name}_half")
                added = ir.node("Add", [node.inputs[0], shift], name=f"{value.name}_down")
                added.outputs[0].name = f"{value.name}_down_out"
                clone.graph.insert_before(node, added)
                node.replace_input_with(0, added.outputs[0])
        clone.invalidate()
        return super().lower(clone, folder, options)


class MixesQuantizedSamples(WrongRuntime):
    def answer(self, session, right, inputs):
        return {k: v[::-1].copy() if session.quantized else v for k, v in right(inputs).items()}

    def load(self, artifact, options):
        session = super().load(artifact, options)
        session.quantized = artifact.precision == "int8"
        return session


class CoarseHalf(WrongRuntime):
    """Claims float16 and computes with the 8 bits of bfloat16."""

    def load(self, artifact, options):
        session = super().load(artifact, options)
        session.coarse = artifact.precision == "f16"
        return session

    def answer(self, session, right, inputs):
        return {k: _coarse(v) if session.coarse else v for k, v in right(inputs).items()}


def _coarse(array):
    return (array.view(np.uint32) & 0xFFFF0000).view(np.float32)


class WideWeights(WrongRuntime):
    """Claims float16, and stores what it computes with in float32."""

    def lower(self, program, folder, options):
        clone = program.clone()
        for name, value in list(clone.initializers.items()):
            if value.dtype == ir.DataType.FLOAT16:
                wide = _initializer(clone, value.const_value.numpy().astype(np.float32), f"{name}_wide")
                cast = ir.node("Cast", [wide], {"to": ir.DataType.FLOAT16.value}, name=f"{name}_cast")
                cast.outputs[0].name = f"{name}_cast_out"
                clone.graph.insert_before(clone.graph[0], cast)
                ir.convenience.replace_all_uses_with(value, cast.outputs[0])
                del clone.graph.initializers[name]
        clone.invalidate()
        return super().lower(clone, folder, options)


def _initializer(program, array, name):
    value = ir.Value(
        name=name, type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.Tensor(array, name=name)
    )
    value.shape = ir.Shape(array.shape)
    program.graph.register_initializer(value)
    return value


def _without_quantization(program):
    """Activations past QuantizeLinear and DequantizeLinear; stored integers as the floats they stand for."""
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
            value = _initializer(
                clone, (integers * scale.reshape(along)).astype(np.float32), f"{output.name}_w"
            )
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
