"""A 1 × 1 convolution and the depthwise convolution behind it, as one convolution.

With E the 1 × 1 weights, s and t what the norm between multiplies by and adds (and E's bias, which goes through it), D
the depthwise kernel, and no activation between,

    D[c] ∗ (s[c] Σ_i E[c, i] x[i] + t[c])   =   Σ_i W[c, i] ∗ x[i] + t[c] Σ D[c]        W[c, i] = D[c] s[c] E[c, i]

but where the depthwise convolution pads: it pads with 0 what the norm made, where a padded x would give t[c].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from sartor.errors import PlanError
from sartor.ir.cleanup import array_of
from sartor.ir.layers import activation_before, read_by
from sartor.ir.program import Program
from sartor.passes.fold_batch_norm import bias_name, scale_and_shift
from sartor.passes.rewriter import Rewriter


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """An expansion and its depthwise convolution.

    Attributes:
        depthwise: it stays, and becomes the one convolution.
        expansion: the 1 × 1 convolution.
        norm: the BatchNormalization between, if there is one.
        activation: nodes of the activation function between, last first.
    """

    depthwise: ir.Node
    expansion: ir.Node
    norm: ir.Node | None
    activation: tuple[ir.Node, ...]

    @property
    def gone(self) -> list[ir.Node]:
        """Nodes that go, last first."""
        return [*self.activation, *([self.norm] if self.norm is not None else []), self.expansion]

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight `[C_out, C_in, ...]` and bias `[C_out]` of the one convolution, in float64."""
        expand, kernel = (_wide(array_of(node, 1)) for node in (self.expansion, self.depthwise))
        expand = expand.reshape(expand.shape[:2])
        shift = _wide(array_of(self.expansion, 2), len(expand))
        if self.norm is not None:
            scale, offset = scale_and_shift(self.norm)
            expand, shift = scale[:, None] * expand, scale * shift + offset
        channel = np.arange(len(kernel)) // (len(kernel) // len(expand))
        taps = kernel.ndim - 2
        weight = kernel * expand[channel].reshape(len(kernel), -1, *[1] * taps)
        bias = _wide(array_of(self.depthwise, 2), len(kernel))
        return weight, bias + shift[channel] * kernel.sum(axis=tuple(range(1, kernel.ndim)))


def is_depthwise(node: ir.Node) -> bool:
    """Whether a node is a convolution of every channel by itself, with a constant kernel."""
    if node.op_type != "Conv" or node.domain or not constants(node, (1,)):
        return False
    weight, groups = array_of(node, 1), node.attributes.get_int("group", 1)
    return weight is not None and groups > 1 and weight.shape[1] == 1 and weight.shape[0] % groups == 0


def constants(node: ir.Node, indices: Iterable[int]) -> bool:
    """Whether these operands of a node are initializers, as far as they are there."""
    for index in indices:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and (
            not value.is_initializer() or value.const_value is None or value.is_graph_input()
        ):
            return False
    return True


def pair_of(node: ir.Node) -> Pair | str:
    """A depthwise convolution with its expansion, or why it has none that could be taken in."""
    activation: tuple[ir.Node, ...] = ()
    readers: tuple[ir.Node, ...] = (node,)
    norm: ir.Node | None = None
    value = node.inputs[0]
    assert value is not None
    if not constants(node, (2,)):
        return "its bias is computed"
    found = activation_before(value)
    if found is not None:
        if not read_by(value, readers):
            return f"'{value.name}' before it is read elsewhere"
        value, activation = found
        readers = activation
    maker = value.producer()
    if maker is not None and maker.op_type == "BatchNormalization" and not maker.domain:
        if not read_by(value, readers):
            return f"'{value.name}' before it is read elsewhere"
        norm, value, readers = maker, maker.inputs[0], (maker,)
        assert value is not None
        maker = value.producer()
    if maker is None or maker.op_type != "Conv" or maker.domain:
        return (
            f"it follows {maker.op_type if maker is not None else 'an input'}, expected a 1 x 1 convolution"
        )
    if not read_by(value, readers):
        return f"'{value.name}' before it is read elsewhere"
    return _obstacle(maker, norm) or Pair(node, maker, norm, activation)


def _obstacle(expansion: ir.Node, norm: ir.Node | None) -> str:
    """Why a convolution is no expansion that could be taken in; empty where it is one."""
    weight = array_of(expansion, 1)
    if weight is None or not constants(expansion, (1, 2)):
        return f"the weight or bias of '{expansion.name}' before it is computed"
    attributes = expansion.attributes
    if max(weight.shape[2:]) > 1:
        kernel = " x ".join(map(str, weight.shape[2:]))
        return f"the kernel of '{expansion.name}' before it is {kernel}, expected 1 x 1"
    moves = max(attributes.get_ints("strides", ()) or (1,)) > 1 or any(attributes.get_ints("pads", ()))
    if moves or attributes.get_int("group", 1) != 1:
        return f"'{expansion.name}' before it has strides, pads or groups"
    if norm is not None and (
        norm.attributes.get_int("training_mode", 0) == 1 or not constants(norm, range(1, 5))
    ):
        return f"the parameters of '{norm.name}' before it are computed"
    return ""


def fuse(program: Program, names: Sequence[str], rewriter: Rewriter) -> None:
    """Let depthwise convolutions of `program` take their expansions in, in place. Their names and what follows stay.

    Raises:
        PlanError: a name is no depthwise convolution, or it has no expansion that could be taken in.
    """
    nodes = {node.name: node for node in program.nodes()}
    for name in names:
        node = nodes.get(name)
        if node is None or not is_depthwise(node):
            raise PlanError(f"The plan fuses '{name}', which is no depthwise convolution of this program.")
        found = pair_of(node)
        if isinstance(found, str):
            raise PlanError(
                f"The plan fuses '{name}' with the layer before it, which is not possible: {found}."
            )
        _merge(found, rewriter)
        rewriter.count("pairs_fused")
    if names:
        program.invalidate()


def _merge(pair: Pair, rewriter: Rewriter) -> None:
    node = pair.depthwise
    weight, bias = pair.merged()
    stored = array_of(node, 1)
    assert stored is not None and node.inputs[1] is not None
    kernel = rewriter.private_initializer(node, 1)
    rewriter.set_initializer(kernel, weight.astype(stored.dtype))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        rewriter.set_initializer(rewriter.private_initializer(node, 2), bias.astype(stored.dtype))
    elif bias.any():
        made = rewriter.add_initializer(bias_name(kernel.name or ""), bias.astype(stored.dtype))
        rewriter.set_input(node, 2, made)
    rewriter.set_attribute(node, "group", None)
    rewriter.set_input(node, 0, pair.expansion.inputs[0])
    read = [value for gone in pair.gone for value in gone.inputs if value is not None]
    rewriter.remove_nodes(pair.gone)
    for value in dict.fromkeys(read):
        if (
            value.is_initializer()
            and not value.uses()
            and not value.is_graph_output()
            and not value.is_graph_input()
        ):
            rewriter.remove_initializer(value)


def _wide(array: np.ndarray | None, length: int = 0) -> np.ndarray:
    """An array in float64; zeros of a length where there is none."""
    return np.zeros(length) if array is None else array.astype(np.float64)
