"""What makes two kernels take the same time.

A signature is a kernel without its name and without its channel counts: those are the variables, named by
`variable_names`. Two kinds exist. A *contraction* (convolution, matrix product, recurrent) has channel counts
as variables: `(c_in, c_out)`, `(groups, in_per_group, out_per_group)` where it is grouped, one for depthwise,
`(k, n)` for products with a weight. Everything else moves data: its one variable is the number of bytes it
reads and writes, and a dimension that a plan changes stands in its spec as a multiple of one unit, `*` or
`3*`; the bytes say how long the unit is. So a spec and its sizes are a whole kernel: `sartor.cost_models.samples`
makes the model of it, whatever network it came from.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sartor.ir.extents import Extent
from sartor.ir.kernels import Kernel
from sartor.ir.layout import FAMILY as LAYOUT
from sartor.ir.operands import RECURRENT, Operand
from sartor.ir.quantities import Quantity

Spec = dict[str, Any]

_VALUE_DRIVEN = frozenset({"Split", "Slice", "Expand", "Tile", "Gather", "GatherND", "ScatterND", "OneHot"})
"""Their constants fix sizes: they are sampled as they are and scaled by bytes."""
NORMALIZATIONS = frozenset({"LayerNormalization"})
"""Of which it matters whether a Transpose makes what they read: OpenVINO takes them apart, and puts the map in order in
between (0.4 to 0.6 ns per element without that, 1 to 4 with it)."""
_OPAQUE = frozenset({"If", "Loop", "Scan", "SequenceMap"})


@dataclasses.dataclass(frozen=True)
class Signature:
    """Identity of a kernel for timing.

    Attributes:
        key: canonical JSON text of `spec`; equal keys mean equal time at equal variables.
        family: as in `Kernel`.
        kind: `contraction` or `movement`.
        spec: everything that a sample model is made from, variables excepted.
        variables: what the time depends on, as functions of a plan.
        scalable: sample models exist at other sizes than the full one.
    """

    key: str
    family: str
    kind: str
    spec: Spec
    variables: tuple[Quantity, ...]
    scalable: bool = True


def signature_of(kernel: Kernel) -> Signature | None:
    """The signature of `kernel`; None when no sample model can stand for it (control flow, functions)."""
    if kernel.family == LAYOUT:
        return _copy(kernel)
    if kernel.op_type in ("Conv", "ConvTranspose"):
        described = _convolution(kernel)
    elif kernel.op_type in ("Gemm", "MatMul"):
        described = _product(kernel)
    elif kernel.op_type in RECURRENT:
        described = _recurrent(kernel)
    else:
        return _movement(kernel)
    spec, variables = described
    spec = {
        "op": kernel.op_type,
        "dtype": _dtype(kernel),
        **spec,
        "epilogue": _epilogue(kernel),
        **_prologue(kernel),
    }
    return Signature(key_of(spec), kernel.family, "contraction", spec, variables)


def _copy(kernel: Kernel) -> Signature:
    """Of a kernel that a runtime puts between two others, to change the layout of a value."""
    (value,) = kernel.outputs
    dims = ["*" if axis == 1 else length for axis, length in enumerate(_sizes(value.dims))]
    moved = Quantity.product(2.0 * value.item_bytes, value.dims)
    spec: Spec = {
        "op": kernel.op_type,
        "attributes": {},
        "inputs": [{"slot": 0, "dims": dims, "dtype": "FLOAT", "stored": False}],
        "outputs": [dims],
        "output_dtypes": ["FLOAT"],
        "output_count": 1,
        "epilogue": [],
    }
    return Signature(key_of(spec), LAYOUT, "movement", spec, (moved,), scalable=False)


def key_of(spec: Mapping[str, Any]) -> str:
    """Canonical JSON text of a spec."""
    return json.dumps(spec, sort_keys=True, separators=(",", ":"))


def variable_names(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """What the sizes of a kernel of this spec are, in their order."""
    if "inputs" in spec:
        return ("bytes",)
    if spec["op"] in RECURRENT:
        return ("input", "hidden")
    if spec["op"] in ("Conv", "ConvTranspose"):
        if "multiplier" in spec:
            return ("channels",)
        return ("c_in", "c_out") if spec["group"] == 1 else ("groups", "in_per_group", "out_per_group")
    if "rows" in spec:
        return ("k", "n")
    return tuple(role for role in ("batch", "m", "k", "n") if spec[role] == "*")


def _epilogue(kernel: Kernel) -> list[list[Any]]:
    return [[f.op_type, dict(f.attributes)] for f in kernel.epilogue if f.op_type != "Bias"]


def _prologue(kernel: Kernel) -> Spec:
    """What is fused in front, by name; no entry where nothing is."""
    return {"prologue": [entry.op_type for entry in kernel.prologue]} if kernel.prologue else {}


def _dtype(kernel: Kernel) -> str:
    return next(o.dtype for o in kernel.inputs if o is not None)


def _sizes(dims: Sequence[Extent]) -> list[int]:
    return [round(e.full) for e in dims]


def _operands(kernel: Kernel, count: int) -> list[Operand]:
    return [o for o in kernel.inputs[:count] if o is not None]


def _one(extent: Extent) -> Quantity:
    return Quantity.product(1, (extent,))


def _convolution(kernel: Kernel) -> tuple[Spec, tuple[Quantity, ...]]:
    x, w = _operands(kernel, 2)
    transposed = kernel.op_type == "ConvTranspose"
    c_in, c_out = x.dims[1], kernel.outputs[0].dims[1]
    group = int(kernel.attributes["group"])
    spec: Spec = {
        "batch": _sizes(x.dims[:1])[0],
        "spatial": _sizes(x.dims[2:]),
        "out": _sizes(kernel.outputs[0].dims[2:]),
        "attributes": {k: v for k, v in kernel.attributes.items() if k != "group"},
    }
    if group > 1 and (w.dims[1].full == 1 if not transposed else group == round(c_in.full)):
        spec["multiplier"] = round(c_out.full / c_in.full)
        return spec, (_one(c_in),)
    if group == 1:
        return {**spec, "group": 1}, (_one(c_in), _one(c_out))
    per_group = (kernel.groups, kernel.in_per_group, kernel.out_per_group)
    return {**spec, "group": "*"}, tuple(_one(extent) for extent in per_group if extent is not None)


def _product(kernel: Kernel) -> tuple[Spec, tuple[Quantity, ...]]:
    a, b = _operands(kernel, 2)
    m, k = list(a.dims[:-1]), a.dims[-1]
    n = b.dims[-1]
    if kernel.op_type == "Gemm":
        if kernel.attributes.get("transA"):
            m, k = [a.dims[1]], a.dims[0]
        n = b.dims[0] if kernel.attributes.get("transB") else n
    if b.stored and len(b.dims) == 2:
        return {"rows": _sizes(m)}, (_one(k), _one(n))
    rows = m[-1:] if m else [Extent.constant(1)]
    shared = math.prod(_sizes(b.dims[:-2])) == 1
    roles = {
        "batch": Quantity.product(1, _broadcast(a.dims[:-2], b.dims[:-2])),
        "m": Quantity.product(1, rows),
        "k": _one(k),
        "n": _one(n) if len(b.dims) > 1 else Quantity.product(1, ()),
    }
    varying = {name: q for name, q in roles.items() if any(factors for _, factors in q.terms)}
    spec: Spec = {name: "*" if name in varying else round(q.full) for name, q in roles.items()}
    return {**spec, "shared": shared, "stored": [a.stored, b.stored]}, tuple(varying.values())


def _broadcast(one: Sequence[Extent], other: Sequence[Extent]) -> list[Extent]:
    """Of two shapes; what a kernel writes says nothing of it where a Transpose runs inside."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    found = list(longer)
    for place, extent in enumerate(shorter, len(longer) - len(shorter)):
        if round(found[place].full) == 1:
            found[place] = extent
    return found


def _recurrent(kernel: Kernel) -> tuple[Spec, tuple[Quantity, ...]]:
    x, w, r = _operands(kernel, 3)
    steps, batch = _sizes(x.dims[:2])
    if kernel.attributes.get("layout"):
        steps, batch = batch, steps
    keep = {k: v for k, v in kernel.attributes.items() if k not in ("hidden_size", "layout")}
    return {
        "steps": steps,
        "batch": batch,
        "directions": _sizes(w.dims)[0],
        "gates": round(w.dims[1].full / r.dims[2].full),
        "attributes": keep,
    }, (_one(x.dims[2]), _one(r.dims[2]))


def _movement(kernel: Kernel) -> Signature | None:
    from onnx import defs

    if kernel.op_type in _OPAQUE or not defs.has(kernel.op_type):
        return None
    names = list(dict.fromkeys(o.name for o in kernel.inputs if o is not None))
    scalable = kernel.op_type not in _VALUE_DRIVEN
    operands = [*(o for o in kernel.inputs if o is not None), *kernel.outputs]
    varying = [round(e.full) for o in operands for e in o.dims if e.groups]
    unit = math.gcd(*varying) if scalable and varying else 0
    spec: Spec = {
        "op": kernel.op_type,
        "attributes": {k: v for k, v in kernel.attributes.items() if v != []},
        "inputs": [
            None
            if o is None
            else {
                "slot": names.index(o.name),
                "dims": _in_units(o.dims, unit),
                "dtype": o.dtype,
                "stored": o.stored,
                **({} if o.value is None else {"value": o.value}),
            }
            for o in kernel.inputs
        ],
        "outputs": [_in_units(o.dims, unit) for o in kernel.outputs],
        "output_dtypes": [o.dtype for o in kernel.outputs],
        "output_count": len(kernel.outputs),
        "epilogue": _epilogue(kernel),
        **_prologue(kernel),
        **({"turned": True} if kernel.op_type in NORMALIZATIONS and operands[0].turned else {}),
    }
    moved = kernel.bytes_read + kernel.bytes_written
    return Signature(key_of(spec), kernel.family, "movement", spec, (moved,), scalable)


def _in_units(dims: Sequence[Extent], unit: int) -> list[int | str]:
    """Dimensions that a plan changes as multiples of `unit` channels; all in numbers where it is 0."""
    found: list[int | str] = []
    for extent in dims:
        length = round(extent.full)
        if not unit or not extent.groups:
            found.append(length)
        else:
            found.append("*" if length == unit else f"{length // unit}*")
    return found
