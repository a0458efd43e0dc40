"""The FX twin as the converter should see it: a module per node, and QDQ pairs as torch's own operators.

The converter names tensors after the modules that computed them. With one module per ONNX node, a kernel
can be traced back to the nodes that it computes, whatever was fused, split or transposed in between.

QuantizeLinear and DequantizeLinear become `quantized_decomposed` operators, which the converter turns into
quantized tensors with exactly these scales and zero points.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import Tensor, fx, nn
from torch.nn import functional

from sartor.errors import BackendError
from sartor.ir.fx import to_fx
from sartor.ir.program import Program
from sartor.ir.torch_ops import OPERATORS
from sartor.ir.torch_ops.contraction import torch_pads
from sartor.ir.torch_ops.resize import axis_taps

_QUANTIZE = OPERATORS["QuantizeLinear"].function
_DEQUANTIZE = OPERATORS["DequantizeLinear"].function
_RESIZE = OPERATORS["Resize"].function
_CONV_TRANSPOSE = OPERATORS["ConvTranspose"].function
_AVERAGE_POOL = OPERATORS["AveragePool"].function
_PAD = OPERATORS["Pad"].function
_INT8 = (-128, 127, torch.int8)
_STEP = re.compile(r"\.modules\.\w+?_n(\d+)\b")


@dataclasses.dataclass(frozen=True)
class Traceable:
    """A module to convert.

    Attributes:
        module: takes and returns tensors in the program's order, and has been in eval mode throughout.
        nodes: names of the program's nodes, in the order of the modules that compute them.
        first: number of the first of these modules.
    """

    module: nn.Module
    nodes: tuple[str, ...]
    first: int = 0

    def nodes_of(self, tensor_name: str) -> tuple[str, ...]:
        """Nodes that the converter's name of a tensor tells of, the one that gave the value first."""
        found = dict.fromkeys(int(number) for number in _STEP.findall(tensor_name))
        return tuple(self.nodes[number - self.first] for number in found)


def traceable(program: Program, *, channel_last: tuple[tuple[int, ...], tuple[int, ...]]) -> Traceable:
    """The twin of a program, in float32 or its own integers.

    Args:
        program: legalized.
        channel_last: positions of the inputs and of the outputs that are channel-last in the module.

    Raises:
        UnsupportedOperatorError: as `to_fx`.
        BackendError: quantization parameters that are computed, not stored.
    """
    twin = to_fx(program, dtype="float32")
    nodes: list[str] = []
    first = _free_number(twin)
    for item in list(twin.graph.nodes):
        name = item.meta.get("onnx_node")
        if not name:
            continue
        _replace(twin, item, f"n{first + len(nodes)}")
        nodes.append(name)
    twin.graph.eliminate_dead_code()
    twin.recompile()
    module = _ChannelLast(twin, *channel_last) if any(channel_last) else twin
    return Traceable(module, tuple(nodes), first)


def _free_number(twin: fx.GraphModule) -> int:
    """From which number on no module is called as a weight's is: `n3.gamma` needs its `n3`."""
    taken = [re.fullmatch(r"n(\d+)", name) for name in (*dict(twin.named_children()), *vars(twin))]
    return max((int(match[1]) + 1 for match in taken if match), default=0)


class Step(nn.Module):
    """One node: a function or module of the twin with its attributes."""

    def __init__(self, function: Callable[..., Any], attributes: dict[str, Any]):
        super().__init__()
        self.function = function
        self.attributes = attributes

    def forward(self, *operands: Any) -> Any:
        """The node's results."""
        return self.function(*operands, **self.attributes)


class _ChannelLast(nn.Module):
    """A module whose images are channel-last at the border; the permutations cancel with the converter's own."""

    def __init__(self, inner: nn.Module, inputs: tuple[int, ...], outputs: tuple[int, ...]):
        super().__init__()
        self.inner = inner
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Outputs of `inner`."""
        given = [t.movedim(-1, 1) if i in self.inputs else t for i, t in enumerate(tensors)]
        results = self.inner(*given)
        return tuple(t.movedim(1, -1) if i in self.outputs else t for i, t in enumerate(results))


def _replace(twin: fx.GraphModule, item: fx.Node, key: str) -> None:
    """Turn the call of one node into a call of a module of its own."""
    step: nn.Module
    if item.target is _QUANTIZE:
        scale, zero_point = _parameters(twin, item)
        step = Step(_to_int8, {"scale": float(scale), "zero_point": int(zero_point)})
        item.args = item.args[:1]
    elif item.target is _DEQUANTIZE:
        scale, zero_point = _parameters(twin, item)
        stored = _stored(twin, item.args[0])
        axis = int(item.kwargs.get("axis", 1))  # type: ignore[arg-type]
        if stored is None:
            step = Step(_from_int8, {"scale": float(scale), "zero_point": int(zero_point)})
            item.args = item.args[:1]
        elif stored.dtype is torch.int32:
            # Biases get the product of both scales in the flatbuffer, which is what the program's are.
            step = _Constant(_dequantized(stored, scale, zero_point, axis))
            item.args = ()
        else:
            step = _Int8Weight(stored, scale, zero_point, axis)
            item.args = ()
    elif item.target is _CONV_TRANSPOSE:
        step = Step(_conv_transpose, dict(item.kwargs))
    elif item.target is _AVERAGE_POOL:
        step = Step(_average_pool, dict(item.kwargs))
    elif item.target is _PAD:
        step = Step(_pad, dict(item.kwargs))
    elif item.target is _RESIZE:
        step = Step(_resize, dict(item.kwargs))
    elif item.op == "call_module":
        step = Step(twin.get_submodule(str(item.target)), {})
    else:
        step = Step(item.target, dict(item.kwargs))  # type: ignore[arg-type]
    twin.add_module(key, step)
    item.op, item.target, item.kwargs = "call_module", key, {}


def _to_int8(x: Tensor, *, scale: float, zero_point: int) -> Tensor:
    return torch.ops.quantized_decomposed.quantize_per_tensor.default(x, scale, zero_point, *_INT8)


def _from_int8(x: Tensor, *, scale: float, zero_point: int) -> Tensor:
    return torch.ops.quantized_decomposed.dequantize_per_tensor.default(x, scale, zero_point, *_INT8)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pads: Any = (),
    output_padding: Any = (),
    **rest: Any,
) -> Tensor:
    """The twin's ConvTranspose; where pads differ or positions are appended, an unpadded one, cropped.

    The converter appends zeros for output padding, which are right only where no weight reaches, and it has no
    negative padding, by which the twin crops.
    """
    rank = x.dim() - 2
    extra = list(output_padding) or [0] * rank
    sides = list(pads) or [0] * (2 * rank)
    begins, ends = sides[:rank], sides[rank:]
    if begins == ends and not any(extra):
        result: Tensor = _CONV_TRANSPOSE(x, weight, bias, pads=pads, **rest)
        return result
    appended = [max(more - end, 0) for more, end in zip(extra, ends, strict=True)]
    # A bias goes with the convolution, into one kernel, unless positions are appended that it is to reach, too.
    inside = None if any(appended) else bias
    y: Tensor = _CONV_TRANSPOSE(x, weight, inside, pads=None, **rest)
    for axis, (begin, end, more) in enumerate(zip(begins, ends, extra, strict=True), start=2):
        y = y.narrow(axis, begin, y.shape[axis] - begin - max(end - more, 0))
    if not any(appended):
        return y
    y = functional.pad(y, [size for more in reversed(appended) for size in (0, more)])
    return y if bias is None else y + bias.reshape(1, -1, *[1] * rank)


def _average_pool(
    x: Tensor, *, pads: Any = (), count_include_pad: int = 0, ceil_mode: int = 0, **rest: Any
) -> Tensor:
    """The twin's AveragePool; padding that does not count is averaged, too, and taken out by a factor.

    The flatbuffer's average has no such padding, and the converter writes a sum over windows that no runtime is
    fast at and that microcontrollers lack.
    """
    if not any(pads or ()) or count_include_pad or ceil_mode:
        given: dict[str, Any] = {"count_include_pad": count_include_pad, "ceil_mode": ceil_mode}
        if pads:
            given["pads"] = pads
        result: Tensor = _AVERAGE_POOL(x, **given, **rest)
        return result
    rank = x.dim() - 2
    around = torch_pads(pads[:rank], pads[rank:])
    ones = np.pad(np.ones(tuple(x.shape[2:])), [(pads[axis], pads[rank + axis]) for axis in range(rank)])
    shares: Tensor = _AVERAGE_POOL(torch.tensor(ones[None, None].tolist()), **rest)
    y: Tensor = _AVERAGE_POOL(functional.pad(x, around), **rest)
    return y / shares


def _pad(x: Tensor, pads: Any, value: Any = None, axes: Any = None, *, mode: str = "constant") -> Tensor:
    """The twin's Pad; which positions are repeated is a constant here, and in the twin's trace it is computed."""
    if mode == "constant" or min(pads) < 0:
        result: Tensor = _PAD(x, pads, value, axes, mode=mode)
        return result
    chosen = list(axes) if axes is not None else list(range(x.dim()))
    modes: Any = mode  # numpy has the same names
    for begin, end, axis in zip(pads, pads[len(chosen) :], chosen, strict=False):
        if begin or end:
            positions = np.pad(np.arange(x.shape[axis]), (begin, end), mode=modes)
            x = torch.index_select(x, axis, torch.tensor(positions.tolist()))
    return x


def _resize(x: Tensor, *operands: Any, mode: str = "nearest", **attributes: Any) -> Tensor:
    """The twin's Resize; images whose pixels are repeated by whole factors take the operator that says so.

    The twin gathers pixels axis by axis, which the converter keeps as GATHER_ND between TRANSPOSE operators.
    """
    roi, scales, sizes = (*operands, None, None, None)[:3]
    size = _repeated(x, roi, scales, sizes, attributes) if mode == "nearest" else None
    if size is not None:
        return functional.interpolate(x, size=size, mode="nearest")
    result: Tensor = _RESIZE(x, *operands, mode=mode, **attributes)
    return result


def _repeated(x: Tensor, roi: Any, scales: Any, sizes: Any, attributes: dict[str, Any]) -> list[int] | None:
    """Height and width, if an image's pixels are repeated by whole factors."""
    if (
        x.dim() != 4
        or not x.is_floating_point()
        or roi
        or attributes.get("antialias")
        or not (scales or sizes)
    ):
        return None
    lengths = [int(n) for n in x.shape]
    axes = [a % 4 for a in attributes.get("axes") or range(4)]
    wanted = sizes or [s * lengths[a] for s, a in zip(scales, axes, strict=True)]
    targets = dict(enumerate(lengths)) | dict(zip(axes, wanted, strict=True))
    if any(targets[a] % lengths[a] for a in (2, 3)) or any(targets[a] != lengths[a] for a in (0, 1)):
        return None
    size = [int(targets[a]) for a in (2, 3)]
    return size if all(_repeats(n, m, attributes) for n, m in zip(lengths[2:], size, strict=True)) else None


def _repeats(length: int, target: int, attributes: dict[str, Any]) -> bool:
    """Whether every pixel of an axis is repeated, and in place."""
    indices, _, _ = axis_taps(
        length,
        target,
        target / length,
        mode="nearest",
        antialias=False,
        coordinates=attributes.get("coordinate_transformation_mode", "half_pixel"),
        cubic=-0.75,
        exclude_outside=False,
        nearest=attributes.get("nearest_mode", "round_prefer_floor"),
        region=None,
    )
    return bool((indices[:, 0] == np.repeat(np.arange(length), target // length)).all())


class _Constant(nn.Module):
    """A tensor that no operand changes."""

    value: Tensor

    def __init__(self, value: Tensor):
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        """The tensor."""
        return self.value


class _Int8Weight(nn.Module):
    """A weight that is stored in int8.

    The converter reads parameters off a quantize operator only, so the stored integers are brought to
    float and quantized again: `round(q * s / s) = q` for 8 bits.
    """

    def __init__(self, stored: Tensor, scale: Tensor, zero_point: Tensor, axis: int):
        super().__init__()
        self.register_buffer("value", _dequantized(stored, scale, zero_point, axis))
        self.single = (float(scale), int(zero_point), *_INT8) if scale.numel() == 1 else ()
        self.axis = axis % max(stored.dim(), 1)
        self.register_buffer("scale", scale.reshape(-1))
        self.register_buffer("zero_point", zero_point.reshape(-1).to(torch.int64))

    def forward(self) -> Tensor:
        """The dequantized weight."""
        operators = torch.ops.quantized_decomposed
        if self.single:
            narrow = operators.quantize_per_tensor.default(self.value, *self.single)
            return operators.dequantize_per_tensor.default(narrow, *self.single)
        several = (self.scale, self.zero_point, self.axis, *_INT8)
        narrow = operators.quantize_per_channel.default(self.value, *several)
        return operators.dequantize_per_channel.default(narrow, *several)


def _dequantized(stored: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    along = [-1 if i == axis % stored.dim() else 1 for i in range(stored.dim())]
    wide_scale = scale.to(torch.float64).reshape(along if scale.numel() > 1 else ())
    shift = zero_point.to(torch.float64).reshape(along if zero_point.numel() > 1 else ())
    return ((stored.to(torch.float64) - shift) * wide_scale).to(torch.float32)


def _parameters(twin: fx.GraphModule, item: fx.Node) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear."""
    scale = _stored(twin, item.args[1])
    given = item.args[2] if len(item.args) > 2 else None
    zero_point = _stored(twin, given) if given is not None else torch.zeros((), dtype=torch.int8)
    if scale is None or zero_point is None:
        raise BackendError(
            f"Scale or zero point of node '{item.meta.get('onnx_node')}' is computed; a flatbuffer holds constants. "
            "Quantize the model statically."
        )
    return scale.detach(), zero_point


def _stored(twin: fx.GraphModule, operand: Any) -> Tensor | None:
    """The tensor behind an operand, if it is one that the module holds."""
    if not (isinstance(operand, fx.Node) and operand.op == "get_attr"):
        return None
    *path, name = str(operand.target).split(".")
    tensor: Tensor = getattr(twin.get_submodule(".".join(path)), name)
    return tensor
