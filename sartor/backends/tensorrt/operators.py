"""What the parser of TensorRT does not take of the canonical operators, one small function per constraint.

Found by running ONNX's own node tests (onnx 1.23.2; every dense case, with operands as inputs and as constants)
through `tensorrt_rtx` 1.7.1, 1,222 programs: a legal one is parsed and built for compute capability 8.6, an illegal
one is not, but for types (float64, int8 arithmetic), which the parser takes for something else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sartor.backends.legality import Check, NodeRule
from sartor.errors import ModelError
from sartor.ir.branches import flattened
from sartor.ir.program import infer_shapes

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

UNSUPPORTED = (
    *("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Col2Im", "ConvInteger"),
    *("MatMulInteger", "MaxUnpool", "QLinearConv", "QLinearMatMul"),
)
"""Operators without an importer."""
PLUGINS = ("DFT", "DeformConv", "RoiAlign")
"""Operators whose importer asks for a plugin that does not come with `tensorrt_rtx`."""

_RESIZE_COORDINATES = ("align_corners", "asymmetric", "half_pixel", "pytorch_half_pixel")
_RESIZED_AXES = {"linear": 3, "cubic": 2}


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, text as `str`."""
    found = node.attributes.get(name)
    return default if found is None or found.value is None else found.value


def inferred(program: Program) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, ir.DataType]]:
    """Shapes and types by value name; those that ONNX cannot infer, results of plugins among them, are absent."""

    def compute(program: Program) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, ir.DataType]]:
        with contextlib.suppress(ModelError):
            return program.shapes(), program.types()
        with contextlib.suppress(ModelError):
            return infer_shapes(flattened(program.model), program.input_shapes)
        return {}, {}

    return program.analysis("tensorrt.inferred", compute)


def constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer."""
    return value is not None and value.const_value is not None


def _unsupported(program: Program, node: ir.Node) -> Check:
    return False, node.op_type


def _pool_dilations(program: Program, node: ir.Node) -> Check:
    dilations = list(attribute(node, "dilations", ()))
    return all(d == 1 for d in dilations), f"dilations {dilations}"


def _lp_norm(program: Program, node: ir.Node) -> Check:
    p = attribute(node, "p", 2)
    return p in (1, 2), f"p = {p}"


def _single_output(program: Program, node: ir.Node) -> Check:
    used = [value for value in node.outputs if value.name]
    return len(used) == 1, f"{len(used)} outputs"


def _matmul_vector(program: Program, node: ir.Node) -> Check:
    shapes, _ = inferred(program)
    ranks = [len(shapes.get(value.name or "", (0, 0))) for value in node.inputs if value is not None]
    return not (ranks[0] == 1 and ranks[1] > 2), f"ranks {ranks[0]} and {ranks[1]}"


def _integer_mod(program: Program, node: ir.Node) -> Check:
    _, types = inferred(program)
    dtype = types.get(node.outputs[0].name or "")
    floating = dtype is not None and dtype.is_floating_point()
    return bool(attribute(node, "fmod", 0)) or not floating, f"fmod = 0 on {dtype}"


def _no_reduction(program: Program, node: ir.Node) -> Check:
    reduction = attribute(node, "reduction", "none")
    return reduction == "none", f"reduction '{reduction}'"


def _boolean_reduction(program: Program, node: ir.Node) -> Check:
    _, types = inferred(program)
    dtype = types.get(node.outputs[0].name or "")
    return dtype is None or dtype.name != "BOOL", f"type {dtype}"


def _constant_input(position: int) -> Callable[[Program, ir.Node], Check]:
    def check(program: Program, node: ir.Node) -> Check:
        value = node.inputs[position] if position < len(node.inputs) else None
        return value is None or constant(value), f"'{value.name}' is computed" if value else "absent"

    return check


def _rnn_activations(program: Program, node: ir.Node) -> Check:
    directions = 2 if attribute(node, "direction", "forward") == "bidirectional" else 1
    found = len(attribute(node, "activations", ("Tanh",) * directions))
    return found == directions, f"{found} activations for {directions} directions"


def _resize_coordinates(program: Program, node: ir.Node) -> Check:
    mode = attribute(node, "coordinate_transformation_mode", "half_pixel")
    return mode in _RESIZE_COORDINATES, f"'{mode}'"


def _resize_antialias(program: Program, node: ir.Node) -> Check:
    value = attribute(node, "antialias", 0)
    return not value, f"antialias = {value}"


def _resize_policy(program: Program, node: ir.Node) -> Check:
    policy = attribute(node, "keep_aspect_ratio_policy", "stretch")
    return policy == "stretch", f"'{policy}'"


def _resize_axes(program: Program, node: ir.Node) -> Check:
    mode = attribute(node, "mode", "nearest")
    shapes, _ = inferred(program)
    before, after = (shapes.get(v.name or "", ()) for v in (node.inputs[0], node.outputs[0]) if v is not None)
    changed = [axis for axis, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    first = len(before) - _RESIZED_AXES.get(mode, len(before))
    return all(axis >= first for axis in changed), f"mode '{mode}' changes axes {changed} of {len(before)}"


def _zero_point_is_zero(program: Program, node: ir.Node) -> Check:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return True, "none"
    if value.const_value is None:
        return False, f"'{value.name}' is computed"
    numbers = value.const_value.numpy()
    return (
        not numbers.any(),
        f"zero point {numbers.flat[numbers.astype(bool).argmax()] if numbers.size else 0}",
    )


def _quantized_type(program: Program, node: ir.Node) -> Check:
    _, types = inferred(program)
    value = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    dtype = types.get(value.name or "") if value is not None else None
    return dtype is not None and dtype.name == "INT8", f"{dtype.name if dtype else 'unknown'}"


_REFUSED = NodeRule(
    "unsupported-operator", "The parser does not take the operator; surgery may replace it.", _unsupported
)
_PLUGIN = NodeRule(
    "plugin-missing",
    "The operator is a plugin that the vendor's package lacks; surgery may replace it.",
    _unsupported,
)
_POOL = NodeRule("pool-dilations", "Pools are not dilated.", _pool_dilations)
_SINGLE = NodeRule("single-output", "Only the first output is there.", _single_output)
_NORM = NodeRule("lp-norm", "p is 1 or 2.", _lp_norm)
_SCATTER = NodeRule(
    "scatter-reduction", "Scattered values replace others and are not combined.", _no_reduction
)
_BOOLEAN = NodeRule("reduced-type", "What is reduced is not of type BOOL.", _boolean_reduction)
_ZERO = NodeRule("zero-point", "Quantization is symmetric: every zero point is 0.", _zero_point_is_zero)
_QTYPE = NodeRule("quantized-type", "The quantized side is of type INT8.", _quantized_type)
_QSCALE = NodeRule("constant-scale", "The scale is a constant.", _constant_input(1))

BY_OPERATOR: Mapping[str, tuple[NodeRule, ...]] = {
    **dict.fromkeys(UNSUPPORTED, (_REFUSED,)),
    **dict.fromkeys(PLUGINS, (_PLUGIN,)),
    "AveragePool": (_POOL,),
    "DequantizeLinear": (_QTYPE, _ZERO, _QSCALE),
    "LayerNormalization": (_SINGLE,),
    "LpPool": (_POOL, _NORM),
    "LpNormalization": (_NORM,),
    "MatMul": (
        NodeRule("matmul-vector", "A vector is multiplied with a vector or matrix only.", _matmul_vector),
    ),
    "MaxPool": (_POOL, _SINGLE),
    "Mod": (NodeRule("integer-mod", "Mod with fmod = 0 is on integers.", _integer_mod),),
    "QuantizeLinear": (_QTYPE, _ZERO, _QSCALE),
    "RNN": (NodeRule("rnn-activations", "There is one activation per direction.", _rnn_activations),),
    "ReduceMax": (_BOOLEAN,),
    "ReduceMin": (_BOOLEAN,),
    "Resize": (
        NodeRule(
            "resize-coordinates",
            f"coordinate_transformation_mode is one of {', '.join(_RESIZE_COORDINATES)}.",
            _resize_coordinates,
        ),
        NodeRule("resize-antialias", "antialias is 0.", _resize_antialias),
        NodeRule("resize-policy", "keep_aspect_ratio_policy is stretch.", _resize_policy),
        NodeRule(
            "resize-axes", "Of the last axes, linear changes at most 3 and cubic at most 2.", _resize_axes
        ),
    ),
    "STFT": (NodeRule("constant-window", "The window is a constant.", _constant_input(2)),),
    "ScatterElements": (_SCATTER,),
    "ScatterND": (_SCATTER,),
}
