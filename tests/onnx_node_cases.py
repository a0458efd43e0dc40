"""ONNX's own node test cases, collected in memory: single-operator models with expected outputs.

Knows nothing of Sartor. A runner takes a case and returns the outputs; `compare` is the judge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import warnings
from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import numpy_helper


@dataclasses.dataclass(frozen=True)
class NodeCase:
    """One model of one node with one data set.

    Attributes:
        name: ONNX's own name of the case.
        op_type: operator under test.
        model: the single-node model; every operand is a graph input.
        inputs: operand arrays by name.
        outputs: expected arrays in graph output order.
        rtol: relative tolerance that ONNX asks for.
        atol: absolute tolerance that ONNX asks for.
    """

    name: str
    op_type: str
    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]
    outputs: Sequence[np.ndarray]
    rtol: float
    atol: float


@functools.lru_cache(maxsize=1)
def _all_cases() -> tuple:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return tuple(collect_testcases(""))


def node_cases(op_types: Collection[str]) -> list[NodeCase]:
    """Cases whose only node is one of `op_types` (function expansions are left out)."""
    found = []
    for case in _all_cases():
        nodes = case.model.graph.node if case.model is not None else []
        if len(nodes) != 1 or nodes[0].op_type not in op_types or nodes[0].domain not in ("", "ai.onnx"):
            continue
        if case.name.endswith("_expanded") or not case.data_sets:
            continue
        names = [value.name for value in case.model.graph.input]
        for inputs, outputs in case.data_sets:
            if any(array is None or isinstance(array, list | dict) for array in [*inputs, *outputs]):
                continue  # sequences and optionals
            arrays = {name: _array(data) for name, data in zip(names, inputs, strict=True)}
            expected = [_array(data) for data in outputs]
            found.append(
                NodeCase(case.name, nodes[0].op_type, case.model, arrays, expected, case.rtol, case.atol)
            )
    return found


def _array(data: np.ndarray | np.generic | onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(data) if isinstance(data, onnx.TensorProto) else np.asarray(data)


def bake(case: NodeCase, names: Collection[str]) -> onnx.ModelProto:
    """The model with the named operands as initializers, as a real model has its shapes and axes."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    kept = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(case.inputs[name], name) for name in names)
    return model


def compare(case: NodeCase, results: Sequence[np.ndarray]) -> None:
    """Raise AssertionError unless shapes, element types and values are as expected."""
    assert len(results) == len(case.outputs), f"{len(results)} outputs, expected {len(case.outputs)}"
    for got, expected in zip(results, case.outputs, strict=True):
        assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
        assert got.dtype == expected.dtype, f"type {got.dtype}, expected {expected.dtype}"
        if expected.dtype.kind in "biu" and expected.dtype.name != "bfloat16":
            np.testing.assert_array_equal(got, expected)
        else:
            np.testing.assert_allclose(
                got.astype(np.float64), expected.astype(np.float64), rtol=case.rtol, atol=case.atol
            )
