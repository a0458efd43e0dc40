"""`their-ir-pass`: a pass on `onnx_ir.Model`, which Sartor verifies and compares."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sartor.interop import OnnxIrPass


@dataclasses.dataclass(frozen=True)
class TheirIrPass(OnnxIrPass):
    """Write Relu as Max(x, 0)."""

    name: ClassVar[str] = "their-ir-pass"

    def transform(self, model: ir.Model) -> None:
        """Change the type of every Relu, and give it a second operand."""
        graph = model.graph
        for node in [n for n in graph if n.op_type == "Relu"]:
            zero = ir.Value(name=f"{node.name}.zero", const_value=ir.tensor([0.0], name=f"{node.name}.zero"))
            graph.initializers.add(zero)
            new = ir.node("Max", [node.inputs[0], zero], name=node.name)
            new.outputs[0].name = node.outputs[0].name
            ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)
