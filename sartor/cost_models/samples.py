"""One-kernel ONNX models that stand for a kernel when it is timed, made from its spec and its sizes alone.

A sample does not know the network that it came from: what `sartor.cost_models.signatures` writes into a spec
is everything. `kernels_of` is the other direction: which specs, at which sizes and how often, a network needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sartor.cost_models.model_builder import TWO_OPERANDS, ModelBuilder
from sartor.cost_models.signatures import Signature, signature_of
from sartor.errors import InternalError
from sartor.ir.layout import FAMILY as LAYOUT
from sartor.ir.operands import RECURRENT
from sartor.ir.population import Fractions, Population, Removed
from sartor.ir.workload import Workload

GATED = {"Sigmoid": "Silu", "HardSigmoid": "HardSwish"}
_SIBLINGS = frozenset({"Slice", "Gather"})
Spec = Mapping[str, Any]
Sizes = tuple[float, ...]


def sample_model(spec: Spec, sizes: Sequence[float]) -> bytes:
    """A serialized ONNX model of the one kernel that `spec` describes.

    BatchNormalization is folded into the bias, as runtimes do; a residual Add reads an input of its own.

    Args:
        spec: `Signature.spec`.
        sizes: one number per variable, in the order of `variable_names`. Those of a kernel that moves data
            are bytes; the model has the nearest whole number of channels, see `nearest_sizes`.

    Raises:
        InternalError: not one size per variable.
    """
    model = ModelBuilder(str(spec.get("dtype", "FLOAT")))
    whole = [max(1, round(size)) for size in sizes]
    try:
        if "inputs" in spec:
            shape = _movement(model, spec, _unit_length(spec, sizes))
        elif spec["op"] in RECURRENT:
            return _recurrent(model, spec, whole)
        elif spec["op"] in ("Conv", "ConvTranspose"):
            shape = _convolution(model, spec, whole)
        elif "rows" in spec:
            shape = _product_with_weight(model, spec, whole)
        else:
            shape = _product(model, spec, whole)
    except (ValueError, StopIteration) as error:
        raise InternalError(
            f"A kernel '{spec.get('op')}' is given {len(sizes)} sizes ({error}); pass one per variable."
        ) from error
    epilogue = spec.get("epilogue", ())
    if spec["op"] in GATED and [op_type for op_type, _ in epilogue] == [GATED[spec["op"]]]:
        model.node("Mul", ["i0", model.value], {})
    elif any(op_type == "Softmax" for op_type, _ in epilogue):
        _attention(model, epilogue, shape, spec, whole)
    else:
        for op_type, attributes in epilogue:
            model.fuse(op_type, attributes, shape)
    return model.finish()


def nearest_sizes(spec: Spec, sizes: Sequence[float]) -> Sizes:
    """The sizes that `sample_model(spec, sizes)` really has: whole channels, and the bytes of those."""
    if "inputs" in spec:
        return (moved_bytes(spec, _unit_length(spec, sizes)),)
    return tuple(float(max(1, round(size))) for size in sizes)


def kernels_of(
    workload: Workload,
    fractions: Fractions | None = None,
    removed: Removed | None = None,
    *,
    layout: bool = False,
) -> tuple[list[tuple[Signature, Sizes, int]], tuple[str, ...]]:
    """What a network needs of a profile, under one plan.

    Args:
        workload: the network.
        fractions: kept fraction per group, scalars.
        removed: removed blocks.
        layout: with the copies between layouts, which no sample model can be made of.

    Returns:
        `(signature, sizes, how often)`, equal kernels merged; and the names of kernels that no sample can
        stand for.
    """
    plans = Population(fractions or {}, removed or {})
    found: dict[tuple[str, Sizes], tuple[Signature, int]] = {}
    without: list[str] = []
    for kernel in workload.existing(plans):
        signature = signature_of(kernel)
        if signature is None:
            without.append(kernel.name)
        elif layout or kernel.family != LAYOUT:
            sizes = tuple(float(plans.quantity(v)) for v in signature.variables)
            known = found.get((signature.key, sizes))
            found[signature.key, sizes] = (signature, (known[1] if known else 0) + 1)
    return [(signature, sizes, count) for (_, sizes), (signature, count) in found.items()], tuple(without)


def weight_bytes(spec: Spec, sizes: Sequence[float]) -> float:
    """Bytes of the initializers that are weights, biases included."""
    whole = [max(1, round(size)) for size in sizes]
    if "inputs" in spec:
        unit = _unit_length(spec, sizes)
        stored = [entry for entry in _operands(spec) if entry["stored"] and "value" not in entry]
        return sum(math.prod(_at(e["dims"], unit)) * item_bytes(e["dtype"]) for e in stored)
    item = item_bytes(spec["dtype"])
    if spec["op"] in RECURRENT:
        inner, hidden = whole
        return item * spec["directions"] * spec["gates"] * hidden * (inner + hidden + 2)
    if spec["op"] in ("Conv", "ConvTranspose"):
        groups, inner, outer = per_group(spec, whole)
        taps = math.prod(spec["attributes"]["kernel_shape"])
        return item * groups * outer * (inner * taps + 1)
    if "rows" in spec:
        k, n = whole
        return item * (k + 1) * n
    batch, m, k, n = _roles(spec, whole)
    left, right = batch * m * k, (1 if spec["shared"] else batch) * k * n
    return item * (left * bool(spec["stored"][0]) + right * bool(spec["stored"][1]))


def channels_of(spec: Spec, sizes: Sequence[float]) -> tuple[int, int]:
    """Channels that a convolution reads and makes."""
    groups, inner, outer = per_group(spec, sizes)
    return groups * inner, groups * outer


def item_bytes(dtype: str) -> float:
    """Bytes per element of an ONNX type name."""
    return float(ir.DataType[dtype].itemsize)


# ---- contractions --------------------------------------------------------------------------------
def per_group(spec: Spec, sizes: Sequence[float]) -> tuple[int, int, int]:
    """Groups of a convolution, and the channels of one on either side."""
    whole = [max(1, round(size)) for size in sizes]
    if "multiplier" in spec:
        (channels,) = whole
        return channels, 1, spec["multiplier"]
    if spec["group"] == 1:
        c_in, c_out = whole
        return 1, c_in, c_out
    groups, inner, outer = whole
    return groups, inner, outer


def _convolution(model: ModelBuilder, spec: Spec, sizes: Sequence[int]) -> tuple[int, ...]:
    groups, inner, outer = per_group(spec, sizes)
    c_in, c_out = groups * inner, groups * outer
    kernel = spec["attributes"]["kernel_shape"]
    w = (c_in, outer, *kernel) if spec["op"] == "ConvTranspose" else (c_out, inner, *kernel)
    inputs = [
        model.input("x", (spec["batch"], c_in, *spec["spatial"])),
        model.weight("w", w, inner * math.prod(kernel)),
        model.weight("b", (c_out,), 1),
    ]
    model.node(spec["op"], inputs, {**spec["attributes"], "group": groups})
    return (spec["batch"], c_out, *spec["out"])


def _product_with_weight(model: ModelBuilder, spec: Spec, sizes: Sequence[int]) -> tuple[int, ...]:
    k, n = sizes
    a = model.input("x", (*spec["rows"], k))
    if spec["op"] == "Gemm":
        model.node("Gemm", [a, model.weight("w", (n, k), k), model.weight("b", (n,), 1)], {"transB": 1})
    else:
        model.node("MatMul", [a, model.weight("w", (k, n), k)], {})
        model.node("Add", [model.value, model.weight("b", (n,), 1)], {})
    return (*spec["rows"], n)


def _roles(spec: Spec, sizes: Sequence[int]) -> tuple[int, ...]:
    variables: Iterator[int] = iter(sizes)
    return tuple(next(variables) if spec[role] == "*" else spec[role] for role in ("batch", "m", "k", "n"))


def _product(model: ModelBuilder, spec: Spec, sizes: Sequence[int]) -> tuple[int, ...]:
    batch, m, k, n = _roles(spec, sizes)
    left, right = (batch, m, k), (1 if spec["shared"] else batch, k, n)
    before = spec.get("prologue", ())
    turned = "Transpose" in before and not spec["stored"][1]
    if turned:
        right = (right[0], n, k)
    names = [
        model.weight(name, dims, k) if stored else model.input(name, dims)
        for name, dims, stored in zip("ab", (left, right), spec["stored"], strict=True)
    ]
    if turned:
        names[1] = model.node("Transpose", [names[1]], {"perm": [0, 2, 1]})
    if "Scale" in before:
        names[0] = model.scale(names[0])
    model.node("MatMul", names, {})
    return (batch, m, n)


def _attention(
    model: ModelBuilder, epilogue: Sequence[Any], shape: tuple[int, ...], spec: Spec, sizes: Sequence[int]
) -> None:
    """Scale, mask, softmax and the second product, which are one kernel in some runtimes."""
    batch, _, k, n = _roles(spec, sizes)
    for op_type, attributes in epilogue:
        if op_type in ("Mul", "Div"):
            model.scale(model.value)
        elif op_type == "MatMul":
            model.node("MatMul", [model.value, model.input("values", (batch, n, k))], {})
        elif op_type == "Transpose":
            model.node("Transpose", [model.value], {"perm": [1, 0, 2]})  # heads behind the rows
        else:
            model.fuse(op_type, attributes, shape)


def _recurrent(model: ModelBuilder, spec: Spec, sizes: Sequence[int]) -> bytes:
    inner, hidden = sizes
    d, rows = spec["directions"], spec["gates"] * hidden
    inputs = [
        model.input("x", (spec["steps"], spec["batch"], inner)),
        model.weight("w", (d, rows, inner), inner),
        model.weight("r", (d, rows, hidden), hidden),
        model.weight("b", (d, 2 * rows), 1),
    ]
    model.node(spec["op"], inputs, {**spec["attributes"], "hidden_size": hidden})
    return model.finish()


# ---- kernels that move data ----------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Shapes:
    """Operands of a kernel that moves data: `(dims, ONNX type)` of each, an input that is used twice once."""

    inputs: tuple[tuple[tuple[int, ...], str], ...]
    outputs: tuple[tuple[tuple[int, ...], str], ...]


def shapes_at(spec: Spec, sizes: Sequence[float]) -> Shapes:
    """The concrete shapes of a kernel that moves `sizes` bytes."""
    unit = _unit_length(spec, sizes)
    return Shapes(
        tuple((_at(entry["dims"], unit), entry["dtype"]) for entry in _operands(spec)),
        tuple((_at(dims, unit), dtype) for dims, dtype in _outputs(spec)),
    )


def moved_bytes(spec: Spec, unit: int) -> float:
    """Bytes that a kernel reads and writes where `*` in its spec stands for `unit` channels."""
    read = [math.prod(_at(e["dims"], unit)) * item_bytes(e["dtype"]) for e in _operands(spec)]
    written = [math.prod(_at(dims, unit)) * item_bytes(dtype) for dims, dtype in _outputs(spec)]
    others = sum(op_type in TWO_OPERANDS for op_type, _ in spec.get("epilogue", ()))
    addends = sum(name == "Add" for name in spec.get("prologue", ()))
    return sum(read) + sum(written) + others * sum(written[:1]) + addends * sum(read[:1])


def _operands(spec: Spec) -> list[Mapping[str, Any]]:
    """Inputs, those that are one tensor once."""
    return list({entry["slot"]: entry for entry in spec["inputs"] if entry is not None}.values())


def _outputs(spec: Spec) -> Iterator[tuple[Sequence[int | str], str]]:
    return zip(spec["outputs"], spec["output_dtypes"], strict=True)


def _at(dims: Sequence[int | str], unit: int) -> tuple[int, ...]:
    return tuple(int(d[:-1] or 1) * unit if isinstance(d, str) else d for d in dims)


def _unit_length(spec: Spec, sizes: Sequence[float]) -> int:
    """The length of `*` at which the kernel moves nearest to `sizes` bytes; 1 where nothing varies."""
    (wanted,) = sizes
    shapes = [e["dims"] for e in _operands(spec)] + list(spec["outputs"])
    if not any(isinstance(d, str) for dims in shapes for d in dims):
        return 1
    low, high = 1, 2
    while moved_bytes(spec, high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if moved_bytes(spec, middle) <= wanted else (low, middle)
    return min((low, high), key=lambda unit: abs(moved_bytes(spec, unit) - wanted))


def _movement(model: ModelBuilder, spec: Spec, unit: int) -> tuple[int, ...]:
    if spec["op"] in _SIBLINGS and len(spec["outputs"]) > 1:
        return _siblings(model, spec, unit)
    names: list[str] = []
    for index, entry in enumerate(spec["inputs"]):
        if entry is None:
            names.append("")
            continue
        name, dims = f"i{entry['slot']}", _at(entry["dims"], unit)
        if name in names:
            pass
        elif spec["op"] == "Resize" and index == 3:  # target sizes follow the channels
            model.constant(name, list(_at(spec["outputs"][0], unit)), entry["dtype"])
        elif "value" in entry:
            model.constant(name, entry["value"], entry["dtype"], dims)
        elif entry["stored"]:
            model.weight(name, dims, 1, entry["dtype"])
        else:
            model.input(name, dims, entry["dtype"])
        names.append(name)
    outputs = spec["output_count"]
    if "Add" in spec.get("prologue", ()):
        first = spec["inputs"][0]
        names[0] = model.node(
            "Add", [names[0], model.input("addend", _at(first["dims"], unit), first["dtype"])], {}
        )
        if outputs > 1:  # the sum, too, is read by others
            model.also(names[0])
            outputs -= 1
    model.node(spec["op"], names, spec["attributes"], outputs)
    return _at(spec["outputs"][0], unit)


def _siblings(model: ModelBuilder, spec: Spec, unit: int) -> tuple[int, ...]:
    """Slices or Gathers that together take all of one axis: a Split, which is what they are."""
    first = spec["inputs"][0]
    dims = _at(first["dims"], unit)
    axis = spec["attributes"].get("axis", 0)
    if spec["op"] == "Slice":
        given = spec["inputs"][3] if len(spec["inputs"]) > 3 else None
        axis = given["value"][0] if given is not None else 0
    source = model.input("i0", dims, first["dtype"])
    model.node("Split", [source], {"axis": axis, "num_outputs": len(spec["outputs"])}, len(spec["outputs"]))
    return _at(spec["outputs"][0], unit)


# ---- what surrounds a kernel ---------------------------------------------------------------------
def identity_model(shape: Sequence[int], repeats: int) -> bytes:
    """`repeats` depthwise convolutions of size 1, one after the other, on a tensor `[N, C, …]`.

    They compute almost nothing but run in a runtime's own blocked layout, so that one alone shows
    what it costs to call the runtime and to enter and leave that layout.
    """
    model = ModelBuilder("FLOAT")
    model.input("x", shape)
    model.value = "x"
    channels, rank = shape[1], len(shape) - 2
    for index in range(repeats):
        weights = [
            model.weight(f"w{index}", (channels, 1, *[1] * rank), 1),
            model.weight(f"b{index}", (channels,), 1),
        ]
        model.node("Conv", [model.value, *weights], {"group": channels})
    return model.finish()


def empty_model() -> bytes:
    """`Relu` of one number: what a call of the runtime costs."""
    model = ModelBuilder("FLOAT")
    model.node("Relu", [model.input("x", (1, 1))], {})
    return model.finish()
