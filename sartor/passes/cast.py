"""`cast`: weights and activations in float16, between inputs and outputs in float32.

A float16 has 11 significant bits, normal magnitudes from 2⁻¹⁴ to 65504, and subnormal ones down to 2⁻²⁴. What does
not fit stays in float32, with a Cast on either side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from sartor.errors import UsageError
from sartor.ir.batch import random_inputs
from sartor.ir.folding import names
from sartor.ir.program import CANONICAL_OPSET, Program
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.quantize import is_quantized
from sartor.passes.rewriter import Rewriter

_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_MARGIN = 2.0
"""Other data than those at hand reach somewhat further."""
_ROOTS = names("GlobalLpPool LpPool ReduceL2")
"""Their results are roots of the sums."""
_SQUARING = _ROOTS | names(
    """GroupNormalization InstanceNormalization LayerNormalization LpNormalization LRN MeanVarianceNormalization
    ReduceSumSquare"""
)
"""They add up squares, or powers, which a kernel may do in the element type."""
_BATCH = 16
"""Samples of one run, which holds every activation."""


@dataclasses.dataclass(frozen=True)
class Cast(Pass):
    """Store weights in float16, and compute in it wherever the numbers fit.

    Becomes:
        y = Conv(x, w)   →   y = Cast(Conv(Cast(x, float16), w as float16), float32)

    Casts stand only where the element type changes. A weight that nodes of both kinds read exists twice.

    Requires: canonical program in float32. Ensures: inputs and outputs keep their names and types; parameters keep
    their names.

    Refuses when: the program is quantized. A node stays in float32, with the reason, when its operator has no
    float16 form; it is an `If` or calls a function; twice what it reads, computes or adds up is beyond 65504 on
    calibration data (on random inputs without data); a constant is beyond 65504, or all of it below 2⁻²⁴; `keep`
    names it or its weights.
    """

    name: ClassVar[str] = "cast"
    semantics: ClassVar[Semantics] = Semantics.APPROXIMATE

    to: str = option("fp16", help="Element type of weights and activations.", choices=("fp16",))
    samples: int = option(256, help="Most samples of `calibration` that are looked at.", minimum=1)

    def plan(self, program: Program, context: Context) -> Any:
        """The nodes that are cast; all others stay in float32."""
        if is_quantized(program):
            raise UsageError(
                f"'{program.source.name}' is quantized; its scales stay in float32. Cast a program that is not."
            )
        types = program.types()
        floating = [node for node in program.nodes() if _floats(node, types)]
        largest = _largest(program, context, self.samples)
        refusals, half = [], []
        for node in floating:
            reason = _form_obstacle(node, types) or _kept(node, context) or _range_obstacle(node, largest)
            if reason:
                refusals.append(Refusal(node.name or "", reason))
            else:
                half.append(node.name or "")
        return Planned({"to": self.to, "nodes": half} if half else None, tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Give weights their type, and let every node read its own."""
        _Casting(program, {rewriter.node(name) for name in plan["nodes"]}, rewriter).run()


# ---- what may be cast ----------------------------------------------------------------------------
def everywhere(program: Program) -> dict[str, Any]:
    """A plan that casts every node with a float16 form, whatever its numbers: a form to ask rules about."""
    types = program.types()
    nodes = [n.name or "" for n in program.nodes() if _floats(n, types) and not _form_obstacle(n, types)]
    return {"to": "fp16", "nodes": nodes}


def _floats(node: ir.Node, types: Mapping[str, ir.DataType]) -> bool:
    return any(types.get(v.name or "") == _SINGLE for v in (*node.inputs, *node.outputs) if v is not None)


def _takes(node: ir.Node, index: int, *, output: bool) -> frozenset[str]:
    """Element types that the operator's definition allows for one operand or result."""
    schema = onnx.defs.get_schema(node.op_type, CANONICAL_OPSET, "")
    formal = (schema.outputs if output else schema.inputs)[
        min(index, len(schema.outputs if output else schema.inputs) - 1)
    ]
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}
    return allowed.get(formal.type_str, frozenset({formal.type_str}))


def _stays(node: ir.Node, index: int) -> bool:
    """Whether an operand is float32 whatever the others are, such as the scales of Resize."""
    return "tensor(float16)" not in _takes(node, index, output=False)


def _form_obstacle(node: ir.Node, types: Mapping[str, ir.DataType]) -> str:
    if node.domain:
        return "it calls a function"
    if node.op_type == "If":
        return "its branches are left as they are"
    for index, value in enumerate(node.outputs):
        single = types.get(value.name or "") == _SINGLE
        if single and "tensor(float16)" not in _takes(node, index, output=True):
            return f"{node.op_type} has no float16 form"
    if any(name in node.attributes for name in ("dtype", "stash_type", "output_dtype")):
        for name in ("dtype", "output_dtype"):
            if node.attributes.get_int(name, 0) == int(_SINGLE):
                return f"its attribute '{name}' says float32"
    return ""


def _kept(node: ir.Node, context: Context) -> str:
    for name in (node.name, *(value.name for value in node.inputs if value is not None)):
        if name and context.is_kept(name):
            return f"'keep' names '{name}'"
    return ""


def _largest(program: Program, context: Context, samples: int) -> dict[str, float]:
    """The largest magnitude of every value that is computed or given."""
    from sartor.ir.fx_magnitudes import largest_magnitudes

    found: dict[str, float] = {}

    def noted() -> Iterator[Mapping[str, np.ndarray]]:
        for inputs in _batches(program, context, samples):
            for name, array in inputs.items():
                if array.dtype.kind == "f" and array.size:
                    found[name] = max(found.get(name, 0.0), float(np.abs(array).max()))
            yield inputs

    by_node = largest_magnitudes(program, noted())
    for node in program.nodes():
        if node.name in by_node:
            found.update((output.name or "", by_node[node.name]) for output in node.outputs)
    return found


def _batches(program: Program, context: Context, samples: int) -> Iterator[Mapping[str, np.ndarray]]:
    """The first `samples` samples, a few at a time where the batch axis is free; random ones without data."""
    carriers = program.batch.inputs
    free = carriers if program.batch.symbolic else ()
    split = next((context.data[k] for k in ("calibration", "train", "evaluate") if context.data.get(k)), None)
    if split is None:
        yield random_inputs(program, size=_BATCH if free else None, seed=context.seed)
        return
    left = samples
    for inputs, _ in split:
        length = len(inputs[carriers[0]]) if carriers else 1
        most = min(length, left)
        for start in range(0, most if free else 1, _BATCH):
            part = slice(start, min(start + _BATCH, most))
            yield {name: array[part] if name in free else array for name, array in inputs.items()}
        left -= length
        if left <= 0:
            return


def _range_obstacle(node: ir.Node, largest: Mapping[str, float]) -> str:
    for value in (*node.inputs, *node.outputs):
        if value is None:
            continue
        found = largest.get(value.name or "", 0.0)
        if _MARGIN * found > _LARGEST:
            margin = f"float16 holds {_LARGEST:g}, and a margin of {_MARGIN:g} is kept"
            return f"'{value.name}' reaches {found:.3g}; {margin}"
    for value in node.inputs:
        reason = _constant_obstacle(value)
        if reason:
            return reason
    if node.op_type in _SQUARING:
        power = node.attributes.get_int("p", 2)
        for value in (node.inputs[0], *(node.outputs if node.op_type in _ROOTS else ())):
            found = largest.get(value.name or "", 0.0) if value is not None else 0.0
            if value is not None and found > (_LARGEST / _MARGIN) ** (1.0 / power):
                what = "squares" if power == 2 else f"takes power {power} of"
                return f"it {what} '{value.name}', which reaches {found:.3g}; float16 holds {_LARGEST:g}"
    return ""


def _constant_obstacle(value: ir.Value | None) -> str:
    if value is None or value.const_value is None or value.const_value.dtype != _SINGLE:
        return ""
    array = value.const_value.numpy()
    finite = np.abs(array[np.isfinite(array)])
    if finite.size and finite.max() > _LARGEST:
        return f"constant '{value.name}' holds {finite.max():.3g}, more than float16 does ({_LARGEST:g})"
    if finite.size and 0.0 < finite.max() < _SMALLEST:
        return f"constant '{value.name}' reaches {finite.max():.3g}, which float16 rounds to 0"
    return ""


# ---- casting -------------------------------------------------------------------------------------
class _Casting:
    """One application: who computes in float16, and which values exist in both types."""

    def __init__(self, program: Program, half: set[ir.Node], rewriter: Rewriter):
        self.program, self.half, self.rewriter = program, half, rewriter
        self.types = dict(program.types())
        self.twins: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        outputs = [v for v in self.program.graph.outputs if v.producer() in self.half and self._single(v)]
        for node in list(self.program.graph.all_nodes()):
            for index, value in enumerate(node.inputs):
                if value is not None and self._single(value):
                    wants_half = node in self.half and not _stays(node, index)
                    self._connect(node, index, value, wants_half)
            if node in self.half:
                self._retype(node)
        for value in outputs:
            self._restore_output(value)

    def _single(self, value: ir.Value) -> bool:
        """Whether the value was float32 before."""
        known = self.types.get(value.name or "", value.dtype)
        return known == _SINGLE

    def _connect(self, node: ir.Node, index: int, value: ir.Value, wants_half: bool) -> None:
        if value.is_initializer():
            if wants_half:
                self.rewriter.set_input(node, index, self._half_constant(value))
        elif (value.producer() in self.half) != wants_half:
            self.rewriter.set_input(node, index, self._cast(value, _HALF if wants_half else _SINGLE))

    def _half_constant(self, value: ir.Value) -> ir.Value:
        if value not in self.twins:
            assert value.const_value is not None
            array = value.const_value.numpy().astype(np.float16)
            only = all(user in self.half and not _stays(user, index) for user, index in value.uses())
            if only and not value.is_graph_output() and value.graph is self.program.graph:
                self.twins[value] = self.rewriter.set_initializer(value, array, retype=True)
            else:
                self.twins[value] = self.rewriter.add_initializer(f"{value.name}/float16", array)
            self.rewriter.count("initializers_cast")
        return self.twins[value]

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """The value in the other type, once however often it is read."""
        if value not in self.twins:
            producer = value.producer()
            insert = self.rewriter.insert_after if producer is not None else self.rewriter.insert_before
            suffix = to.name.lower()
            made = insert(
                producer if producer is not None else self.program.graph[0],
                "Cast",
                [value],
                {"to": int(to)},
                output_names=[f"{value.name}/{suffix}"],
                name=f"{value.name}/Cast_{suffix}",
            )
            self.twins[value] = made.outputs[0]
        return self.twins[value]

    def _retype(self, node: ir.Node) -> None:
        """Attributes that name an element type, and what was known of the results."""
        if node.op_type == "Cast" and self._single(node.outputs[0]):
            self.rewriter.set_attribute(node, "to", int(_HALF))
        if node.op_type == "ConstantOfShape":
            attribute = node.attributes.get("value")
            number = attribute.as_tensor().numpy() if attribute is not None else np.zeros(1, np.float32)
            if number.dtype == np.float32:
                self.rewriter.set_attribute(node, "value", ir.Tensor(number.astype(np.float16)))
        for output in node.outputs:
            if self._single(output) and not output.is_graph_output():
                output.type = ir.TensorType(_HALF)
        self.rewriter.count("nodes_cast")

    def _restore_output(self, value: ir.Value) -> None:
        """Let the graph's output be float32 under its name; who else reads the value keeps its own."""
        readers = list(value.uses())
        single = self._cast(value, _SINGLE)
        self.rewriter.replace_value(value, single)
        value.type = ir.TensorType(_HALF)
        for user, index in [*readers, (single.producer(), 0)]:
            if user is not None and user is not single.producer():
                self.rewriter.set_input(user, index, value)
        producer = single.producer()
        assert producer is not None
        self.rewriter.set_input(producer, 0, value)
