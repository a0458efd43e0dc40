"""What makes two kernels take the same time, and tiny models that stand for a kernel when it is timed.

A signature is a kernel without its name and without its channel counts: those are the variables. Two
kinds exist. A *contraction* (convolution, matrix product, recurrent) has channel counts as variables:
`(c_in, c_out)`, one for depthwise, `(K, N)` for products with a weight. Everything else moves data: its
one variable is the number of bytes it reads and writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sartor.ir.extents import Extent
from sartor.ir.fusion import CONTRACTIONS
from sartor.ir.kernels import RECURRENT, Kernel, Operand
from sartor.ir.quantities import Quantity

Spec = dict[str, Any]

_VALUE_DRIVEN = frozenset({"Split", "Slice", "Expand", "Tile", "Gather", "GatherND", "ScatterND", "OneHot"})
"""Their constants fix sizes: they are sampled as they are and scaled by bytes."""
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
    if kernel.op_type in ("Conv", "ConvTranspose"):
        described = _convolution(kernel)
    elif kernel.op_type in ("Gemm", "MatMul"):
        described = _product(kernel)
    elif kernel.op_type in RECURRENT:
        described = _recurrent(kernel)
    else:
        return _movement(kernel)
    spec, variables = described
    epilogue = [[f.op_type, dict(f.attributes)] for f in kernel.epilogue if f.op_type != "Bias"]
    spec = {"op": kernel.op_type, "dtype": _dtype(kernel), **spec, "epilogue": epilogue}
    return Signature(_key(spec), kernel.family, "contraction", spec, variables)


def _key(spec: Spec) -> str:
    return json.dumps(spec, sort_keys=True, separators=(",", ":"))


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
    c_in, per_group = x.dims[1], w.dims[1]
    c_out = kernel.outputs[0].dims[1]
    group = int(kernel.attributes["group"])
    spec: Spec = {
        "batch": _sizes(x.dims[:1])[0],
        "spatial": _sizes(x.dims[2:]),
        "out": _sizes(kernel.outputs[0].dims[2:]),
        "attributes": {k: v for k, v in kernel.attributes.items() if k != "group"},
    }
    if group > 1 and (per_group.full == 1 if not transposed else group == round(c_in.full)):
        spec["multiplier"] = round(c_out.full / c_in.full)
        return spec, (_one(c_in),)
    spec["group"] = group
    return spec, (_one(c_in), _one(c_out))


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
        "batch": Quantity.product(1, kernel.outputs[0].dims[: -2 if len(b.dims) > 1 else -1]),
        "m": Quantity.product(1, rows),
        "k": _one(k),
        "n": _one(n) if len(b.dims) > 1 else Quantity.product(1, ()),
    }
    varying = {name: q for name, q in roles.items() if any(factors for _, factors in q.terms)}
    spec: Spec = {name: "*" if name in varying else round(q.full) for name, q in roles.items()}
    return {**spec, "shared": shared, "stored": [a.stored, b.stored]}, tuple(varying.values())


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
    spec: Spec = {
        "op": kernel.op_type,
        "attributes": {k: v for k, v in kernel.attributes.items() if v != []},
        "inputs": [
            None
            if o is None
            else {
                "slot": names.index(o.name),
                "dims": ["*" if e.groups else round(e.full) for e in o.dims],
                "dtype": o.dtype,
                "stored": o.stored,
                **({} if o.value is None else {"value": o.value}),
            }
            for o in kernel.inputs
        ],
        "outputs": [["*" if e.groups else round(e.full) for e in o.dims] for o in kernel.outputs],
        "output_count": len(kernel.outputs),
    }
    moved = kernel.bytes_read + kernel.bytes_written
    return Signature(
        _key(spec), kernel.family, "movement", spec, (moved,), kernel.op_type not in _VALUE_DRIVEN
    )


# ---- sample models -------------------------------------------------------------------------------
def contraction_model(spec: Spec, sizes: Sequence[int]) -> bytes:
    """A one-kernel ONNX model of a contraction with the given channel counts.

    BatchNormalization is folded into the bias, as runtimes do; a residual Add reads a second input.

    Args:
        spec: `Signature.spec`.
        sizes: one integer per variable, in the order of `Signature.variables`.
    """
    model = _Model(spec["dtype"])
    op = spec["op"]
    assert op in CONTRACTIONS | RECURRENT
    if op in RECURRENT:
        return _recurrent_model(model, spec, sizes)
    if op in ("Conv", "ConvTranspose"):
        c_in, c_out = (sizes[0], sizes[0] * spec["multiplier"]) if len(sizes) == 1 else sizes
        group = c_in if len(sizes) == 1 else spec["group"]
        kernel = spec["attributes"]["kernel_shape"]
        swap = op == "ConvTranspose"
        w = (c_in, c_out // group, *kernel) if swap else (c_out, c_in // group, *kernel)
        fan_in = c_in // group * math.prod(kernel)
        inputs = [model.input("x", (spec["batch"], c_in, *spec["spatial"])), model.weight("w", w, fan_in)]
        inputs.append(model.weight("b", (c_out,), 1))
        model.node(op, inputs, {**spec["attributes"], "group": group})
        shape: tuple[int, ...] = (spec["batch"], c_out, *spec["out"])
    elif "rows" in spec:
        k, n = sizes
        a = model.input("x", (*spec["rows"], k))
        shape = (*spec["rows"], n)
        if op == "Gemm":
            w_name, bias = model.weight("w", (n, k), k), model.weight("b", (n,), 1)
            model.node("Gemm", [a, w_name, bias], {"transB": 1})
        else:
            model.node("MatMul", [a, model.weight("w", (k, n), k)], {})
            model.node("Add", [model.value, model.weight("b", (n,), 1)], {})
    else:
        variables = iter(sizes)
        batch, m, k, n = (
            next(variables) if spec[role] == "*" else spec[role] for role in ("batch", "m", "k", "n")
        )
        left, right = (batch, m, k), (1 if spec["shared"] else batch, k, n)
        names = [
            model.weight(name, dims, k) if stored else model.input(name, dims)
            for name, dims, stored in zip("ab", (left, right), spec["stored"], strict=True)
        ]
        model.node("MatMul", names, {})
        shape = (batch, m, n)
    for op_type, attributes in spec["epilogue"]:
        model.fuse(op_type, attributes, shape)
    return model.finish()


def _recurrent_model(model: _Model, spec: Spec, sizes: Sequence[int]) -> bytes:
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


def movement_model(kernel: Kernel, spec: Spec, fraction: float) -> tuple[bytes, float]:
    """A one-node ONNX model of `kernel` with every group at `fraction`, and the bytes that it moves."""

    def shape(operand: Operand) -> tuple[int, ...]:
        kept = {g: fraction for e in operand.dims for g in e.groups}
        return tuple(max(1, round(float(e.evaluate(kept)))) for e in operand.dims)

    first = next((o for o in kernel.inputs if o is not None), None)
    model = _Model(first.dtype if first else "FLOAT")
    names: list[str] = []
    moved = 0.0
    seen: set[str] = set()
    for index, operand in enumerate(kernel.inputs):
        if operand is None:
            names.append("")
            continue
        name, dims = f"i{spec['inputs'][index]['slot']}", shape(operand)
        names.append(name)
        if name in seen:
            continue
        seen.add(name)
        moved += math.prod(dims) * operand.item_bytes
        if kernel.op_type == "Resize" and index == 3:  # target sizes follow the channels
            model.constant(name, list(shape(kernel.outputs[0])), operand.dtype)
        elif operand.value is not None:
            model.constant(name, operand.value, operand.dtype, dims)
        elif operand.stored:
            model.weight(name, dims, 1, operand.dtype)
        else:
            model.input(name, dims, operand.dtype)
    model.node(kernel.op_type, names, spec["attributes"], spec["output_count"])
    moved += sum(math.prod(shape(o)) * o.item_bytes for o in kernel.outputs)
    return model.finish(), moved


def identity_model(shape: Sequence[int], repeats: int) -> bytes:
    """`repeats` depthwise convolutions of size 1, one after the other, on a tensor `[N, C, …]`.

    They compute almost nothing but run in a runtime's own blocked layout, so that one alone shows
    what it costs to call the runtime and to enter and leave that layout.
    """
    model = _Model("FLOAT")
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
    model = _Model("FLOAT")
    model.node("Relu", [model.input("x", (1, 1))], {})
    return model.finish()


class _Model:
    """A small ONNX model under construction; `value` is the output of the last node."""

    def __init__(self, dtype: str):
        self._dtype = dtype
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._weights: list[Any] = []
        self.value = ""

    def input(self, name: str, dims: Sequence[int], dtype: str | None = None) -> str:
        from onnx import TensorProto, helper

        code = TensorProto.DataType.Value(dtype or self._dtype)
        self._inputs.append(helper.make_tensor_value_info(name, code, list(dims)))
        return name

    def weight(self, name: str, dims: Sequence[int], fan_in: int, dtype: str | None = None) -> str:
        """Random numbers that keep the variance; subnormal values would be slow, zeros could be skipped."""
        import numpy as np

        rng = np.random.default_rng(math.prod(dims))
        values = rng.standard_normal(tuple(dims), np.float32) * math.sqrt(2.0 / max(fan_in, 1))
        return self._store(name, np.abs(values) if fan_in == 1 else values, dtype or self._dtype)

    def constant(self, name: str, value: Any, dtype: str, dims: Sequence[int] | None = None) -> str:
        import numpy as np

        array = np.asarray(value)
        return self._store(name, array if dims is None else array.reshape(tuple(dims)), dtype)

    def _store(self, name: str, array: Any, dtype: str) -> str:
        from onnx import TensorProto, helper, numpy_helper

        kind = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(dtype))
        self._weights.append(numpy_helper.from_array(array.astype(kind), name))
        return name

    def node(
        self, op_type: str, inputs: Sequence[str], attributes: Mapping[str, Any], outputs: int = 1
    ) -> None:
        from onnx import helper

        names = [f"v{len(self._nodes)}_{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(op_type, list(inputs), names, **attributes))
        self.value = names[0]
        self._last = names

    def fuse(self, op_type: str, attributes: Mapping[str, Any], shape: Sequence[int]) -> None:
        """Append one epilogue operation."""
        source = self.value
        if op_type == "Add":
            self.node("Add", [source, self.input("residual", shape)], {})
        elif op_type == "Clip":
            bounds = [
                self.constant(f"clip_{key}", attributes[key], self._dtype) if key in attributes else ""
                for key in ("min", "max")
            ]
            self.node("Clip", [source, *bounds], {})
        elif op_type in ("Silu", "HardSwish") and (op_type == "Silu" or attributes):
            self.node("Sigmoid" if op_type == "Silu" else "HardSigmoid", [source], attributes)
            self.node("Mul", [source, self.value], {})
        else:
            self.node(op_type, [source], attributes)

    def finish(self) -> bytes:
        from onnx import TensorProto, helper

        outputs = [helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in self._last]
        graph = helper.make_graph(self._nodes, "sample", self._inputs, outputs, self._weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        from onnx.shape_inference import infer_shapes

        return infer_shapes(model, data_prop=True).SerializeToString(deterministic=True)
