"""`fold-batch-norm`: move an inference-mode BatchNormalization into the linear operator before it.

Algebra, per output channel c, with ε the node's epsilon:

    BN(y)_c = scale_c · y_c + shift_c      scale = γ / √(σ² + ε)      shift = β − scale · μ
    y = W ∗ x + b          ⇒   BN(y) = (scale · W) ∗ x + (scale · b + shift)
    y = α·A·B + β_g·C      ⇒   BN(y) = α·A·(B · scale) + 1·(scale · β_g·C + shift)         (Gemm)

Channel axes of the weight: Conv `[C_out, C_in/g, …]` axis 0; ConvTranspose `[C_in, C_out/g, …]` axis 1
within each group of axis 0; Gemm `[K, N]` axis 1, or axis 0 with transB; MatMul `[K, N]` axis 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from sartor.ir.program import Program
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics
from sartor.passes.rewriter import Rewriter

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_EPSILON = 1e-5  # default of the operator's definition


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul (+ Add) that it follows.

    Becomes:
        y = Conv(x, w, b); z = BatchNormalization(y, γ, β, μ, σ²)   →   z = Conv(x, w', b')
        y = MatMul(x, w); z = BatchNormalization(y, …)              →   z = Add(MatMul(x, w'), b')

    The arithmetic is in float64, rounded once to the weight's type.

    Requires: canonical program. Ensures: no folded BatchNormalization or its private parameters remain.

    Refuses when: BatchNormalization is in training mode, or its parameters are not constant; it does
    not follow a linear operator; what lies between is used elsewhere or is a graph output; the weight
    or bias is not constant or is shared; a bias does not run along the channels; the folded weights
    would not be finite.
    """

    name: ClassVar[str] = "fold-batch-norm"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def plan(self, program: Program, context: Context) -> Any:
        """Triples of node names: the BatchNormalization, the linear node, and the Add between, if any."""
        folds: list[dict[str, str | None]] = []
        refusals: list[Refusal] = []
        for node in ir.traversal.RecursiveGraphIterator(program.graph):
            if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
                continue
            site = _find(node, program)
            if isinstance(site, str):
                refusals.append(Refusal(node.name or "", site))
            else:
                folds.append(site.names())
        return Planned({"folds": folds} if folds else None, tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Scale the weights, write the bias, and let the users of BatchNormalization read the linear node."""
        for fold in plan["folds"]:
            add = rewriter.node(fold["add"]) if fold["add"] else None
            _fold(_Site(rewriter.node(fold["batch_norm"]), rewriter.node(fold["linear"]), add), rewriter)
            rewriter.count("batch_norms_folded")


@dataclasses.dataclass(frozen=True)
class _Site:
    """One foldable place. `add` is the bias of a MatMul."""

    batch_norm: ir.Node
    linear: ir.Node
    add: ir.Node | None

    def names(self) -> dict[str, str | None]:
        return {
            "batch_norm": self.batch_norm.name,
            "linear": self.linear.name,
            "add": self.add.name if self.add is not None else None,
        }

    @property
    def weight(self) -> ir.Value | None:
        return self.linear.inputs[1]

    @property
    def bias_input(self) -> tuple[ir.Node, int]:
        """The node and input index that hold the bias, present or not."""
        if self.add is not None:
            return self.add, 1 if self.add.inputs[0] is self.linear.outputs[0] else 0
        return self.linear, 2

    @property
    def bias(self) -> ir.Value | None:
        node, index = self.bias_input
        if self.linear.op_type == "MatMul" and self.add is None:
            return None
        return node.inputs[index] if index < len(node.inputs) else None


def _find(batch_norm: ir.Node, program: Program) -> _Site | str:
    """The place around one BatchNormalization, or why it cannot be folded."""
    if _integer(batch_norm, "training_mode", 0):
        return "training mode: it normalises by the statistics of each batch"
    if any(output.uses() or output.is_graph_output() for output in batch_norm.outputs[1:]):
        return "its statistics outputs are used"
    for value in batch_norm.inputs[1:5]:
        if _constant(value) is None:
            return f"its parameter '{value.name if value else ''}' is not a constant initializer"
    value = batch_norm.inputs[0]
    producer = value.producer() if value is not None else None
    if value is None or producer is None:
        return "it follows no node of the graph"
    add = None
    if producer.op_type == "Add" and producer.domain == "":
        add, sources = producer, [v for v in producer.inputs if v is not None and v.producer() is not None]
        if len(sources) != 1 or _op_type(sources[0]) != "MatMul":
            return "it follows Add of something else than a MatMul and a constant"
        reason = _private(value, batch_norm)
        if reason:
            return reason
        value, producer = sources[0], sources[0].producer()
    if producer is None or producer.op_type not in _LINEAR or producer.domain != "":
        found = producer.op_type if producer is not None else "an input"
        return f"it follows {found}, expected one of {', '.join(_LINEAR)}"
    if producer.graph is not batch_norm.graph:
        return "the linear node is outside the body that holds the BatchNormalization"
    reason = _private(value, add if add is not None else batch_norm)
    if reason:
        return reason
    site = _Site(batch_norm, producer, add)
    return _tensor_obstacle(site, program) or site


def _private(value: ir.Value, user: ir.Node) -> str:
    """Why `value` cannot change although `user` is replaced; empty if it can."""
    if value.is_graph_output():
        return f"'{value.name}' before it is a graph output"
    others = sorted({str(node.name) for node, _ in value.uses() if node is not user})
    return f"'{value.name}' before it is also used by node '{others[0]}'" if others else ""


def _tensor_obstacle(site: _Site, program: Program) -> str:
    """Why the weight or bias cannot take the fold; empty if they can."""
    owners = {"weight": (site.weight, site.linear)}
    if site.bias is not None:
        owners["bias"] = (site.bias, site.bias_input[0])
    for role, (value, owner) in owners.items():
        if _constant(value) is None:
            return (
                f"the {role} '{value.name if value else ''}' of '{owner.name}' is not a constant initializer"
            )
        assert value is not None
        others = sorted({str(node.name) for node, _ in value.uses() if node is not owner})
        if others or len(value.uses()) > 1 or value.is_graph_output():
            return f"the {role} '{value.name}' is shared with node '{others[0] if others else owner.name}'"
    scale, shift = scale_and_shift(site.batch_norm)
    weight = _constant(site.weight)
    assert weight is not None
    channels = _channels(site.linear, weight)
    if scale.shape != (channels,):
        return f"it has {scale.size} channels, its input has {channels}"
    if weight.ndim != 2 and site.linear.op_type == "MatMul":
        return f"the weight of MatMul has {weight.ndim} axes, expected 2"
    if site.linear.op_type == "MatMul":
        # A MatMul on more than 2 axes has its features last, and BatchNormalization normalises axis 1.
        shape = program.shapes().get(site.linear.outputs[0].name or "")
        if shape is None or len(shape) != 2:
            return "the result of MatMul is not known to have 2 axes, so axis 1 may not be its features"
    bias = _constant(site.bias)
    if bias is not None and not _along_channels(bias, channels, site):
        return f"the bias of '{site.bias_input[0].name}' has shape {list(bias.shape)}, expected [{channels}]"
    new_weight, new_bias = _folded(site, scale, shift)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return f"the folded weights are not finite in {weight.dtype}"
    return ""


def _along_channels(bias: np.ndarray, channels: int, site: _Site) -> bool:
    if site.linear.op_type in ("Conv", "ConvTranspose"):
        return bias.shape == (channels,)
    # Gemm's C and the constant of an Add broadcast to [M, N]; only rows of one are independent of M
    return bias.ndim <= 2 and bias.size in (1, channels) and (bias.ndim == 0 or bias.shape[-1] == bias.size)


def scale_and_shift(batch_norm: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """What a BatchNormalization of constant parameters multiplies by and adds, `[C]` each, in float64."""
    gamma, beta, mean, variance = (
        np.asarray(_constant(value), dtype=np.float64) for value in batch_norm.inputs[1:5]
    )
    attribute = batch_norm.attributes.get("epsilon")
    epsilon = attribute.as_float() if attribute is not None else _EPSILON
    with np.errstate(all="ignore"):  # a bad variance is refused by the finiteness check
        scale = gamma / np.sqrt(variance + epsilon)
        return scale, beta - scale * mean


def _folded(site: _Site, scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """New weight and bias in the weight's type."""
    weight, bias, linear = _constant(site.weight), _constant(site.bias), site.linear
    assert weight is not None
    wide = weight.astype(np.float64)
    with np.errstate(all="ignore"):
        if linear.op_type == "Conv":
            wide = wide * scale.reshape(-1, *[1] * (wide.ndim - 1))
        elif linear.op_type == "ConvTranspose":
            group = _integer(linear, "group", 1)
            grouped = wide.reshape(group, wide.shape[0] // group, *wide.shape[1:])
            factors = scale.reshape(group, 1, wide.shape[1], *[1] * (wide.ndim - 2))
            wide = (grouped * factors).reshape(wide.shape)
        elif linear.op_type == "Gemm" and _integer(linear, "transB", 0):
            wide = wide * scale[:, None]
        else:
            wide = wide * scale
        old = np.zeros(()) if bias is None else bias.astype(np.float64).reshape(-1)
        if linear.op_type == "Gemm":
            factor = linear.attributes.get("beta")
            old = old * (factor.as_float() if factor is not None else 1.0)
        return wide.astype(weight.dtype), (scale * old + shift).astype(weight.dtype)


def _fold(site: _Site, rewriter: Rewriter) -> None:
    weight, bias = _folded(site, *scale_and_shift(site.batch_norm))
    assert site.weight is not None
    rewriter.set_initializer(site.weight, weight)
    result = site.add.outputs[0] if site.add is not None else site.linear.outputs[0]
    if site.bias is not None:
        rewriter.set_initializer(site.bias, bias)
    else:
        graph = site.weight.graph
        created = rewriter.add_initializer(bias_name(site.weight.name or ""), bias, graph)
        if site.linear.op_type == "MatMul":
            result = rewriter.insert_after(site.linear, "Add", [result, created]).outputs[0]
        else:
            rewriter.set_input(site.linear, 2, created)
    if site.linear.op_type == "Gemm":
        rewriter.set_attribute(site.linear, "beta", None)
    rewriter.replace_value(site.batch_norm.outputs[0], result)
    parameters = [value for value in site.batch_norm.inputs[1:] if value is not None]
    rewriter.remove_node(site.batch_norm)
    for value in dict.fromkeys(parameters):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            rewriter.remove_initializer(value)


def bias_name(weight: str) -> str:
    """The name for a bias of the layer with this weight."""
    return weight.removesuffix("weight") + "bias" if weight.endswith("weight") else f"{weight}_bias"


def _channels(linear: ir.Node, weight: np.ndarray) -> int:
    if linear.op_type == "Conv":
        return weight.shape[0]
    if linear.op_type == "ConvTranspose":
        return weight.shape[1] * _integer(linear, "group", 1)
    if linear.op_type == "Gemm" and _integer(linear, "transB", 0):
        return weight.shape[0]
    return weight.shape[-1]


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value.numpy()


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def _op_type(value: ir.Value) -> str:
    producer = value.producer()
    return producer.op_type if producer is not None and producer.domain == "" else ""
