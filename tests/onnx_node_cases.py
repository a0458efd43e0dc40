"""ONNX's own node test cases, collected in memory: small models with inputs and expected outputs.

Knows nothing of Sartor. A runner takes a case and returns the outputs; `compare` is the judge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_EXPANDED = re.compile(r"_expanded.*$")
_ROUNDING_NOISE = frozenset({"test_dft_inverse", "test_dft_inverse_opset19"})
"""Cases whose expected values hold the rounding of a float32 transform: 1.9e-7 where the exact value is 0,
above the suite's own 1e-7. They are replaced by the same numpy transform in float64."""


@dataclasses.dataclass(frozen=True)
class NodeCase:
    """One model with one data set.

    Attributes:
        name: ONNX's own name of the case.
        op_type: operator under test; of a function expansion the operator that was expanded.
        model: every operand is a graph input.
        inputs: operand arrays by name; sequences and optionals stay as Python objects.
        outputs: expected values in graph output order.
        rtol: relative tolerance that ONNX asks for.
        atol: absolute tolerance that ONNX asks for.
    """

    name: str
    op_type: str
    model: onnx.ModelProto
    inputs: dict[str, Any]
    outputs: Sequence[Any]
    rtol: float
    atol: float

    @property
    def expanded(self) -> bool:
        """Whether the model is the ONNX function body of the operator."""
        return _EXPANDED.search(self.name) is not None

    @property
    def dense(self) -> bool:
        """Whether every input and output is a tensor."""
        return all(isinstance(array, np.ndarray) for array in [*self.inputs.values(), *self.outputs])


@functools.lru_cache(maxsize=1)
def all_cases() -> tuple[NodeCase, ...]:
    """Every case of the suite, function expansions and multi-node cases included."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        collected = collect_testcases("")
    originals = {case.name: case.model.graph.node[0].op_type for case in collected}
    found = []
    for case in collected:
        op_type = originals.get(_EXPANDED.sub("", case.name), case.model.graph.node[0].op_type)
        names = [value.name for value in case.model.graph.input]
        for inputs, outputs in case.data_sets:
            arrays = {name: _array(data) for name, data in zip(names, inputs, strict=False)}
            expected = [_array(data) for data in outputs]
            if case.name in _ROUNDING_NOISE:
                expected = [_inverse_transform(arrays["x"])]
            found.append(NodeCase(case.name, op_type, case.model, arrays, expected, case.rtol, case.atol))
    return tuple(found)


def _inverse_transform(x: np.ndarray) -> np.ndarray:
    """Along axis 1; complex numbers are a last axis of length 2."""
    exact = np.fft.ifft(x[..., 0].astype(np.float64) + 1j * x[..., 1], axis=1)
    return np.stack([exact.real, exact.imag], -1).astype(x.dtype)


def node_cases(op_types: Collection[str]) -> list[NodeCase]:
    """Cases whose only node is one of `op_types` (function expansions are left out)."""
    return [
        case
        for case in all_cases()
        if case.dense
        and not case.expanded
        and len(case.model.graph.node) == 1
        and case.model.graph.node[0].op_type in op_types
        and case.model.graph.node[0].domain in ("", "ai.onnx")
    ]


def _array(data: Any) -> Any:
    if isinstance(data, onnx.TensorProto):
        return numpy_helper.to_array(data)
    return data if data is None or isinstance(data, list | dict) else np.asarray(data)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph, bodies of control flow included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from nodes_of(body)


def static_operands(case: NodeCase, positions: dict[str, Collection[int]]) -> list[str]:
    """Graph inputs that stand where an operator needs a constant.

    Args:
        case: the case. A function expansion has the operands of its original, in the original's order.
        positions: input numbers by operator type.
    """
    original = _EXPANDED.sub("", case.name)
    model = next((c.model for c in all_cases() if c.name == original), case.model)
    operands = {
        name
        for node in nodes_of(model.graph)
        for index, name in enumerate(node.input)
        if index in positions.get(node.op_type, ())
    }
    return [name for name in case.inputs if name in operands]


def bake(case: NodeCase, names: Collection[str]) -> onnx.ModelProto:
    """The model with the named operands as initializers, as a real model has its shapes and axes."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    kept = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(case.inputs[name], name) for name in names)
    return model


def value_types(case: NodeCase) -> set[str]:
    """Names of all element types that the case's model mentions; `sequence` and `optional` too."""
    found = set()
    for value in [*case.model.graph.input, *case.model.graph.output, *case.model.graph.value_info]:
        kind = value.type.WhichOneof("value")
        if kind == "tensor_type":
            found.add(TensorProto.DataType.Name(value.type.tensor_type.elem_type))
        elif kind is not None:
            found.add(kind.removesuffix("_type"))
    for node in nodes_of(case.model.graph):
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.type == attribute.INT:
                found.add(TensorProto.DataType.Name(attribute.i))
            if attribute.HasField("t"):
                found.add(TensorProto.DataType.Name(attribute.t.data_type))
    return found - {"UNDEFINED"}


def compare(case: NodeCase, results: Sequence[np.ndarray]) -> None:
    """Raise AssertionError unless shapes, element types and values are as expected.

    Integers and booleans must be equal; bfloat16 may differ by two units in the last place, which is what
    the suite's own runner grants it.
    """
    assert len(results) == len(case.outputs), f"{len(results)} outputs, expected {len(case.outputs)}"
    for got, expected in zip(results, case.outputs, strict=True):
        assert isinstance(expected, np.ndarray), f"a tensor, expected {type(expected).__name__}"
        assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
        assert got.dtype == expected.dtype, f"type {got.dtype}, expected {expected.dtype}"
        if expected.dtype.kind in "biu" and expected.dtype.name != "bfloat16":
            np.testing.assert_array_equal(got, expected)
        else:
            rtol = max(case.rtol, 2**-6) if expected.dtype.name == "bfloat16" else case.rtol
            np.testing.assert_allclose(
                got.astype(np.float64), expected.astype(np.float64), rtol=rtol, atol=case.atol
            )
