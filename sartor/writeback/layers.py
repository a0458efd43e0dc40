"""Attributes of torch's layers that repeat the shape of a tensor, brought up to date after a cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sartor.errors import InternalError, PlanError
from sartor.ir.program import Program
from sartor.writeback.attention import narrow_attention
from sartor.writeback.tensors import Kept

_Shapes = Mapping[str, tuple[int, ...]]


class _Layer:
    """One module of the copy, with what is known about it in both programs."""

    def __init__(self, path: str, module: Any, old: _Shapes, program: Program, narrowed: Program):
        self.path, self.module, self.old = path, module, old
        self.program, self.narrowed = program, narrowed

    def name(self, attribute: str) -> str:
        return f"{self.path}.{attribute}" if self.path else attribute

    def was(self, attribute: str) -> tuple[int, ...]:
        """Shape before the cut."""
        return self.old.get(self.name(attribute)) or tuple(getattr(self.module, attribute).shape)

    def numbers(self, operators: tuple[str, ...], attribute: str) -> set[int]:
        """Values of an attribute of the nodes that this module became, in the narrowed program."""
        nodes = [n for n in self.narrowed.nodes() if n.op_type in operators]
        weight = self.name("weight")
        own = [
            n for n in nodes if len(n.inputs) > 1 and n.inputs[1] is not None and n.inputs[1].name == weight
        ]
        if not own:  # the weight is shared or standardised: found by where the node comes from
            records = self.narrowed.provenance
            own = [n for n in nodes if n.name in records and records[n.name or ""].module == self.path]
        return {int(n.attributes[attribute].as_int()) if attribute in n.attributes else 1 for n in own}


def _convolution(layer: _Layer) -> None:
    module = layer.module
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    groups = layer.numbers(("ConvTranspose",) if transposed else ("Conv",), "group")
    if len(groups) > 1:
        raise PlanError(
            f"Module '{layer.path}' ({type(module).__name__}) would need {sorted(groups)} groups at different calls; "
            "a module has one. Give each call a module of its own."
        )
    if groups:
        module.groups = groups.pop()
    first, second = module.weight.shape[:2]
    if transposed:
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.in_channels, module.out_channels = second * module.groups, first


def _linear(layer: _Layer) -> None:
    layer.module.out_features, layer.module.in_features = layer.module.weight.shape


def _bilinear(layer: _Layer) -> None:
    module = layer.module
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _features(layer: _Layer) -> None:
    for attribute in ("weight", "running_mean"):
        tensor = getattr(layer.module, attribute, None)
        if tensor is not None:
            layer.module.num_features = len(tensor)
            return


def _group_norm(layer: _Layer) -> None:
    """A group of channels stays or goes as a whole, because the norm mixes its channels."""
    module = layer.module
    before, after = layer.was("weight")[0], module.weight.shape[0]
    if module.num_groups * after % before:
        raise InternalError(f"GroupNorm '{layer.path}' has {after} of {before} channels left; report this.")
    module.num_groups, module.num_channels = module.num_groups * after // before, after


def _normalized_shape(layer: _Layer) -> None:
    layer.module.normalized_shape = tuple(layer.module.weight.shape)


def _embedding(layer: _Layer) -> None:
    layer.module.num_embeddings, layer.module.embedding_dim = layer.module.weight.shape


def _prelu(layer: _Layer) -> None:
    layer.module.num_parameters = layer.module.weight.numel()


def _recurrent(layer: _Layer) -> None:
    """Layers of different hidden sizes have no place in one module of torch; running it then says so."""
    module = layer.module
    module.input_size, module.hidden_size = module.weight_ih_l0.shape[1], module.weight_hh_l0.shape[1]
    module._init_flat_weights()


_UPDATES: tuple[tuple[tuple[type[nn.Module], ...], Callable[[_Layer], None]], ...] = (
    ((nn.modules.conv._ConvNd,), _convolution),
    ((nn.Linear,), _linear),
    ((nn.Bilinear,), _bilinear),
    ((nn.modules.batchnorm._NormBase,), _features),  # InstanceNorm, too
    ((nn.GroupNorm,), _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _normalized_shape),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    ((nn.PReLU,), _prelu),
    ((nn.RNNBase,), _recurrent),
)


def knows(module: nn.Module) -> bool:
    """Whether the attributes of a module are brought up to date here."""
    return isinstance(module, (nn.MultiheadAttention, *(kind for kinds, _ in _UPDATES for kind in kinds)))


def update(module: nn.Module, kept: Kept, old: _Shapes, program: Program, narrowed: Program) -> None:
    """Update every layer of `module` that a cut tensor belongs to.

    Args:
        module: a private copy whose tensors are cut.
        kept: kept positions by tensor name and axis.
        old: shapes before the cut, by tensor name.
        program: the program before.
        narrowed: and after; grouped convolutions are looked up in it.

    Raises:
        PlanError: a layer cannot be narrowed in place.
    """
    for path, child in module.named_modules():
        own = [n for n in (*child._parameters, *child._buffers) if (f"{path}.{n}" if path else n) in old]
        layer = _Layer(path, child, old, program, narrowed)
        if isinstance(child, nn.MultiheadAttention):
            narrow_attention(path, child, kept, old)
        elif own:
            for kinds, change in _UPDATES:
                if isinstance(child, kinds):
                    change(layer)
                    break
            else:
                _by_attribute(layer, own)


def _by_attribute(layer: _Layer, own: list[str]) -> None:
    """Norms that libraries write themselves keep `normalized_shape` like torch's."""
    shape = getattr(layer.module, "normalized_shape", None)
    if "weight" in own and shape is not None and tuple(shape) == layer.was("weight"):
        _normalized_shape(layer)
