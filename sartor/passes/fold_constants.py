"""`fold-constants`: compute once what does not depend on any input. A deploy-time pass."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from sartor.errors import ModelError
from sartor.ir.bodies import body_graphs, read_values
from sartor.ir.program import Program
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.rewriter import Rewriter

_RANDOM = frozenset({"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"})
_RANDOM_LIKE = frozenset({"RandomUniformLike", "Dropout"})
# Folding these would turn int8 weights back into float weights, four times the size.
_QUANTIZED = frozenset({"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"})


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace nodes that read only initializers by their results.

    Becomes:
        t = Transpose(weight); y = MatMul(x, t)   →   y = MatMul(x, t) with initializer t

    Results that derive from parameters are folded too, so parameters may lose their names: run it for
    deployment, after recovery. Initializers that nothing reads afterwards are removed.

    Refuses when: the result is larger than `max-bytes`; it is a graph output; the node is random,
    quantizing, or has bodies; the reference evaluator cannot compute it or disagrees with the inferred
    type or shape. Nodes inside bodies are left alone.
    """

    name: ClassVar[str] = "fold-constants"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    max_bytes: int = option(
        64 * 1024 * 1024, help="Largest result of one node that is folded.", unit="bytes", minimum=0
    )

    def plan(self, program: Program, context: Context) -> Any:
        """Names of foldable nodes in execution order."""
        shapes, types = _shapes_and_types(program)
        constant = {v for v in program.initializers.values() if not v.is_graph_input()}
        foldable: list[str] = []
        refusals: list[Refusal] = []
        for node in program.nodes():
            if any(value not in constant for value in read_values(node)):
                continue
            reason = self._obstacle(node, program, shapes, types)
            if reason:
                refusals.append(Refusal(node.name or "", reason))
                continue
            foldable.append(node.name or "")
            constant.update(node.outputs)
        return Planned({"nodes": foldable} if foldable else None, tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Evaluate and replace each node; one that turns out not to be computable is refused."""
        shapes, types = _shapes_and_types(program)
        for name in plan["nodes"]:
            node = rewriter.node(name)
            inputs = [v for v in node.inputs if v is not None]
            if not all(v.is_initializer() for v in inputs):
                rewriter.refuse(name, "an input could not be folded")
                continue
            try:
                arrays = _evaluate(node, program)
                _check(node, arrays, shapes, types)
            except Exception as error:  # the evaluator raises many types; each means "not computable here"
                rewriter.refuse(name, f"not evaluated: {type(error).__name__}: {str(error)[:200]}")
                continue
            used = [a if o.uses() else None for o, a in zip(node.outputs, arrays, strict=True)]
            rewriter.replace_by_constants(node, used)
            rewriter.count("nodes_folded")
            for value in dict.fromkeys(inputs):
                if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                    rewriter.remove_initializer(value)

    def _obstacle(
        self,
        node: ir.Node,
        program: Program,
        shapes: dict[str, tuple[int, ...]],
        types: dict[str, ir.DataType],
    ) -> str:
        """Why this node must not be folded; empty if it may."""
        if node.domain not in ("", "ai.onnx"):
            return f"operator of domain '{node.domain}'"
        if node.op_type in _RANDOM | _RANDOM_LIKE:
            return f"{node.op_type} is random"
        if node.op_type in _QUANTIZED:
            return f"{node.op_type} carries the quantization of its input"
        if body_graphs(node):
            return f"{node.op_type} has bodies"
        for output in node.outputs:
            name = output.name or ""
            if output.is_graph_output():
                return f"its output '{name}' is a graph output"
            if not name or (not output.uses() and len(node.outputs) > 1):
                continue
            if name not in shapes or name not in types:
                return f"the shape of '{name}' is not known before it runs"
            size_bytes = int(np.prod(shapes[name], dtype=np.int64) * types[name].itemsize)
            if size_bytes > self.max_bytes:
                return f"its result '{name}' has {size_bytes} bytes, more than max-bytes={self.max_bytes}"
        return ""


def _shapes_and_types(program: Program) -> tuple[dict[str, tuple[int, ...]], dict[str, ir.DataType]]:
    try:
        return dict(program.shapes()), dict(program.types())
    except ModelError:
        from sartor.ir.program import infer_shapes

        # one shape that depends on data must not keep all others from being folded
        return infer_shapes(program.model, program.input_shapes)


def _evaluate(node: ir.Node, program: Program) -> list[np.ndarray | None]:
    """Results of one node from the ONNX reference evaluator; inputs are fed, never serialised."""
    from onnx.reference import ReferenceEvaluator

    feeds: dict[str, np.ndarray] = {}
    infos: list[onnx.ValueInfoProto] = []
    for value in dict.fromkeys(v for v in node.inputs if v is not None):
        tensor = value.const_value
        if tensor is None:
            raise ValueError(f"input '{value.name}' has no data")
        feeds[value.name or ""] = tensor.numpy()
        shape = list(feeds[value.name or ""].shape)
        infos.append(onnx.helper.make_tensor_value_info(value.name or "", int(tensor.dtype), shape))
    names = [output.name or "" for output in node.outputs]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in names if name]
    graph = onnx.helper.make_graph([ir.to_proto(node)], "one_node", infos, outputs)
    model = onnx.helper.make_model(
        graph,
        ir_version=program.model.ir_version,
        opset_imports=[onnx.helper.make_opsetid("", program.model.opset_imports[""])],
    )
    results = dict(zip([n for n in names if n], ReferenceEvaluator(model).run(None, feeds), strict=True))
    return [results.get(name) for name in names]


def _check(
    node: ir.Node,
    arrays: list[np.ndarray | None],
    shapes: dict[str, tuple[int, ...]],
    types: dict[str, ir.DataType],
) -> None:
    for output, array in zip(node.outputs, arrays, strict=True):
        name = output.name or ""
        if not output.uses():
            continue
        if not isinstance(array, (np.ndarray, np.generic)):
            raise ValueError(f"'{name}' is not a tensor")
        if tuple(array.shape) != shapes[name] or array.dtype != types[name].numpy():
            raise ValueError(
                f"'{name}' was computed as {array.dtype} {list(array.shape)}, inferred as "
                f"{types[name].numpy()} {list(shapes[name])}"
            )
