"""`quantize`: QuantizeLinear and DequantizeLinear around what a target may compute in integers.

Affine quantization of a real x with scale s and zero point z, to `n` bits, signed:

    q(x) = clamp(round(x / s) + z, −2ⁿ⁻¹, 2ⁿ⁻¹ − 1)        x ≈ s · (q − z)

Weights are symmetric (z = 0), with one scale per output channel c; activations have one s and z per tensor. Then
a layer y = W ∗ x + b needs integers alone, if its bias has the scale of the product:

    y_c ≈ s_x s_w,c · ( Σ q_w (q_x − z_x)  +  b_c / (s_x s_w,c) )       with b_c / (s_x s_w,c) rounded to int32

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018, equations 1 to 7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from sartor.errors import UsageError
from sartor.ir.program import Program
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.rewriter import Rewriter
from sartor.plugins import Registry

# Found by name, because passes do not know who calibrates: see `Context.importance`.
_QUANTIZERS = Registry(
    "sartor.quantizers", "quantizer", {"onnxruntime": "sartor.quantization.supply:quantization"}
)
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")
"""Operators whose input 2 is a bias that is added to the products."""
_INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Quantize weights and activations to signed 8-bit integers, as QuantizeLinear and DequantizeLinear.

    Becomes:
        y = Conv(x, w, b)   →   y' = Conv(DQ(Q(x)), DQ(w_int8), DQ(b_int32));  y = DQ(Q(y'))

    Every Q and DQ pair has a scale and a zero point as initializers; a target computes what lies between pairs in
    integers. An activation function that follows a layer stays between the layer and the pair. A bias becomes
    int32 with the scale of input times weight. A layer that stays in float reads its operands as they are. Ranges
    come from the data's split `calibration`, by ONNX Runtime's own calibrators, which also choose what is quantized.

    With `max-drop`, layers stay in float as long as the score of the split `evaluate` is further below that of the
    float program; those that cost most come first.

    Requires: canonical program in float32 with BatchNormalization folded (`fold-batch-norm`); data.
    Ensures: inputs and outputs keep their names and types; everything that is read is still float32.

    Refuses when: the program is quantized already; it has no layer that can be quantized. A node is left in float,
    with the reason, when it lies in a body of `If`, when `keep` names it or its weights, when it scales its bias
    (Gemm's alpha and beta), or when a range is not finite or beyond what a scale can hold.

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018.
    """

    name: ClassVar[str] = "quantize"
    semantics: ClassVar[Semantics] = Semantics.APPROXIMATE

    bits: int = option(8, help="Bits of weights and activations.", choices=(8,), bare="int{}")
    per_channel: bool = option(True, help="One scale per output channel of a weight, instead of one for all.")
    calibration: str = option(
        "minmax", help="How ranges are found.", choices=("minmax", "entropy", "percentile")
    )
    samples: int = option(256, help="Most samples of `calibration` that are looked at.", minimum=1)
    max_drop: float | None = option(
        None,
        help="Largest loss of score; costly layers stay in float until it is kept.",
        unit="points, 1 point = 0.01",
        minimum=0.0,
    )

    def plan(self, program: Program, context: Context) -> Any:
        """The scheme: scales and zero points by value and initializer, and the nodes between them."""
        if is_quantized(program):
            return Planned(None, (Refusal(program.source.name, "it is quantized already"),))
        _require_float32(program)
        _require_folded(program)
        scheme, left = _QUANTIZERS.load("onnxruntime")(
            program,
            context,
            per_channel=self.per_channel,
            calibration=self.calibration,
            samples=self.samples,
            max_drop=self.max_drop,
        )
        refusals = tuple(Refusal(node, reason) for node, reason in left)
        return Planned(scheme if scheme["nodes"] else None, refusals)

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Insert the pairs, and store weights and biases as integers."""
        quantized = [rewriter.node(name) for name in plan["nodes"]]
        for node, name, scales in _biases(program, plan, quantized, rewriter):
            _quantize_constant(node, 2, name, scales, rewriter)
        _quantize_weights(plan["weights"], quantized, rewriter)
        kept = {rewriter.node(name) for name in plan["kept"]}
        _quantize_activations(program, plan["activations"], kept, rewriter)


def is_quantized(program: Program) -> bool:
    """Whether any node, bodies included, quantizes or dequantizes."""
    return any(node.op_type in (_QUANTIZE, _DEQUANTIZE) for node in program.graph.all_nodes())


def _require_float32(program: Program) -> None:
    other = next((n for n, t in program.types().items() if t.is_floating_point() and t.name != "FLOAT"), None)
    if other is not None:
        raise UsageError(
            f"Value '{other}' is {program.types()[other].name}, but 'quantize' takes float32 programs. Quantize "
            "before casting, or leave 'cast' away."
        )


def _require_folded(program: Program) -> None:
    from sartor.passes.fold_batch_norm import FoldBatchNorm

    planned = FoldBatchNorm().plan(program, Context())
    if planned.data is not None:
        first = planned.data["folds"][0]["batch_norm"]
        raise UsageError(
            f"BatchNormalization '{first}' follows a layer, and would stand between it and its quantization. Fold "
            "it first: fold-batch-norm,quantize."
        )


# ---- weights -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Scales:
    """Scales of a constant; `axis` None: one for all. A symmetric constant leaves the lowest integer out."""

    values: np.ndarray
    zero_point: int
    axis: int | None
    bits: int
    symmetric: bool = True

    def along(self, rank: int) -> np.ndarray:
        """Shaped to broadcast against a constant of this rank."""
        shape = [-1 if i == self.axis else 1 for i in range(rank)]
        return self.values.reshape(shape if self.axis is not None else ())

    def integers(self, array: np.ndarray) -> np.ndarray:
        """The constant in units of its scales."""
        high = 2 ** (self.bits - 1) - 1
        low = -high if self.symmetric else -high - 1
        wide = np.rint(array.astype(np.float64) / self.along(array.ndim).astype(np.float64))
        kind = np.int8 if self.bits == 8 else np.int32
        return np.clip(wide + self.zero_point, low, high).astype(kind)


def _scales(entry: Mapping[str, Any]) -> _Scales:
    values = np.asarray(entry["scales"], np.float32)
    return _Scales(values, int(entry["zero_point"]), entry["axis"], 8, entry["symmetric"])


def _quantize_weights(
    weights: Mapping[str, Mapping[str, Any]], quantized: list[ir.Node], rewriter: Rewriter
) -> None:
    for name, entry in weights.items():
        scales = _scales(entry)
        made: ir.Value | None = None
        value = rewriter.initializer(name)
        for node in quantized:
            for index, operand in enumerate(node.inputs):
                if operand is value and made is None:
                    made = _quantize_constant(node, index, name, scales, rewriter)
                elif operand is value:
                    rewriter.set_input(node, index, made)
        _remove_unread(value, rewriter)


def _quantize_constant(node: ir.Node, index: int, name: str, scales: _Scales, rewriter: Rewriter) -> ir.Value:
    """Let one input of a node read a dequantized constant; the float one goes once nothing reads it."""
    old = node.inputs[index]
    assert old is not None and old.const_value is not None
    array = old.const_value.numpy()
    stored = scales.integers(array)
    integers = rewriter.add_initializer(f"{name}/quantized", stored)
    scale = scales.values if scales.axis is not None else scales.values.reshape(())
    parameters = [
        rewriter.add_initializer(f"{name}/scale", np.array(scale)),
        rewriter.add_initializer(f"{name}/zero_point", np.full(scale.shape, scales.zero_point, stored.dtype)),
    ]
    dequantize = rewriter.insert_before(
        node,
        _DEQUANTIZE,
        [integers, *parameters],
        {"axis": scales.axis} if scales.axis is not None else None,
        output_names=[f"{name}/dequantized"],
        name=f"{name}/{_DEQUANTIZE}",
    )
    rewriter.set_input(node, index, dequantize.outputs[0])
    _remove_unread(old, rewriter)
    rewriter.count("biases_quantized" if scales.bits == 32 else "weights_quantized")
    return dequantize.outputs[0]


def _remove_unread(value: ir.Value, rewriter: Rewriter) -> None:
    present = value.is_initializer() and not value.is_graph_output() and not value.is_graph_input()
    if present and not value.uses():
        rewriter.remove_initializer(value)


# ---- biases --------------------------------------------------------------------------------------
def _biases(
    program: Program, plan: Mapping[str, Any], quantized: list[ir.Node], rewriter: Rewriter
) -> Iterator[tuple[ir.Node, str, _Scales]]:
    """Biases with integer form, of layers whose input and weight both have one."""
    for node in quantized:
        if node.op_type not in WITH_BIAS or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        data, weight, bias = (value.name or "" for value in node.inputs[:3] if value is not None)
        array = _constant(node.inputs[2])
        activation, entry = plan["activations"].get(data), plan["weights"].get(weight)
        if array is None or activation is None or entry is None:
            continue
        scales = _bias_scales(node, array, activation, _scales(entry))
        if isinstance(scales, str):
            rewriter.refuse(node.name or "", f"its bias stays in float: {scales}")
        else:
            yield node, bias, scales


def _bias_scales(
    node: ir.Node, bias: np.ndarray, activation: Mapping[str, Any], weight: _Scales
) -> _Scales | str:
    """The scales of a bias, or why it cannot have them."""
    product = (np.float64(np.float32(activation["scale"])) * weight.values.astype(np.float64)).reshape(-1)
    channels = bias.shape[-1] if bias.ndim else 1
    if weight.axis is not None:
        if node.op_type == "ConvTranspose" and channels % product.size == 0:
            product = np.tile(product, channels // product.size)  # a weight has the channels of one group
        if not bias.size == channels == product.size:
            return f"its shape is {list(bias.shape)}, expected one number per channel ({product.size})"
    values = product.astype(np.float32)
    axis = bias.ndim - 1 if weight.axis is not None else None
    scales = _Scales(values if axis is not None else values[:1], 0, axis, bits=32)
    if not (values > 0).all():
        return "the scale of input times weight is below what a float32 can hold"
    if (np.abs(bias / scales.along(bias.ndim).astype(np.float64)) > _INT32).any():
        return "it is beyond 32 bits in units of input times weight"
    return scales


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value.numpy()


# ---- activations ---------------------------------------------------------------------------------
def _quantize_activations(
    program: Program, activations: Mapping[str, Mapping[str, Any]], kept: set[ir.Node], rewriter: Rewriter
) -> None:
    values = [*program.graph.inputs, *(output for node in program.nodes() for output in node.outputs)]
    for value in values:
        entry = activations.get(value.name or "")
        if entry is not None:
            _quantize_activation(program, value, entry, kept, rewriter)


def _quantize_activation(
    program: Program, value: ir.Value, entry: Mapping[str, Any], kept: set[ir.Node], rewriter: Rewriter
) -> None:
    """Let what reads `value`, the graph's outputs included, read it quantized and dequantized, but for `kept`."""
    name = value.name or ""
    parameters = [
        rewriter.add_initializer(f"{name}/scale", np.array(entry["scale"], np.float32)),
        rewriter.add_initializer(f"{name}/zero_point", np.array(entry["zero_point"], np.int8)),
    ]
    as_it_is = [(user, index) for user, index in value.uses() if user in kept]
    producer = value.producer()
    insert = rewriter.insert_after if producer is not None else rewriter.insert_before
    anchor = producer if producer is not None else program.graph[0]
    quantize = insert(
        anchor,
        _QUANTIZE,
        [value, *parameters],
        output_names=[f"{name}/quantized"],
        name=f"{name}/{_QUANTIZE}",
    )
    dequantize = rewriter.insert_after(
        quantize,
        _DEQUANTIZE,
        [quantize.outputs[0], *parameters],
        output_names=[f"{name}/dequantized"],
        name=f"{name}/{_DEQUANTIZE}",
    )
    rewriter.replace_value(value, dequantize.outputs[0])
    for user, index in [(quantize, 0), *as_it_is]:
        rewriter.set_input(user, index, value)
    rewriter.count("activations_quantized")
