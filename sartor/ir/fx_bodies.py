"""`If` in the FX twin: both bodies become modules, and the condition chooses between them as the twin runs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from sartor.ir import torch_ops
from sartor.ir.bodies import body_graphs, captured_values, with_inner_nodes
from sartor.ir.branches import BRANCHES
from sartor.ir.fx_build import Builder, install
from sartor.ir.twin_names import RESERVED


class Branches(nn.Module):
    """Runs one of two bodies on the values that they capture from outside.

    The choice is made in Python, so that `torch.export` can follow it only where the condition is constant.

    Attributes:
        then_branch: used where the condition holds.
        else_branch: used elsewhere.
    """

    def __init__(self, then_branch: nn.Module, else_branch: nn.Module):
        super().__init__()
        self.then_branch = then_branch
        self.else_branch = else_branch

    def forward(self, condition: torch.Tensor, *captured: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs of the chosen body; both take all captured values in the same order."""
        chosen = self.then_branch if bool(condition) else self.else_branch
        result: tuple[torch.Tensor, ...] = chosen(*captured)
        return result


def branches(parent: Builder, node: ir.Node) -> tuple[Branches, list[ir.Value]]:
    """The module of an `If`, and the outer values that it takes after the condition."""
    captured = _captured(node)
    modules = [_Body(parent, captured).module(node.attributes[name].as_graph()) for name in BRANCHES]
    return Branches(*modules), captured


class _Body(Builder):
    """A builder whose graph inputs are captured values of an outer builder."""

    def __init__(self, parent: Builder, captured: list[ir.Value]):
        super().__init__(parent.program, parent.dtype, parent.model)
        self.parent = parent
        self.outer = captured

    def module(self, body: ir.Graph) -> fx.GraphModule:
        """The body as a module that returns a tuple."""
        for index, value in enumerate(self.outer):
            self.values[value] = self.graph.placeholder(f"captured_{index}")
        self.walk(body)
        self.graph.output(tuple(self.tensor(value) for value in body.outputs))
        module = fx.GraphModule(self.root, self.graph, class_name="Body")
        module.graph.eliminate_dead_code()
        return fx.GraphModule(module, module.graph, class_name="Body").eval()

    def constant(self, value: ir.Value) -> np.ndarray | None:
        """Also of captured values: shapes and axes inside a body are often constants of the main graph."""
        return self.parent.constant(value) if value in self.outer else super().constant(value)

    def key_of(self, value: ir.Value) -> str:
        """Constants of a body have no name of their own in the state."""
        return f"{RESERVED}.constant_{self.next_number()}"


def _captured(node: ir.Node) -> list[ir.Value]:
    """Values that the bodies of `node` read as tensors and do not define, bodies inside them included."""
    as_tensors: set[ir.Value | None] = set()
    for inner in with_inner_nodes(node):
        spec = torch_ops.OPERATORS.get(inner.op_type)
        static = spec.static if spec is not None else frozenset()
        as_tensors.update(v for i, v in enumerate(inner.inputs) if i not in static)
        as_tensors.update(v for body in body_graphs(inner) for v in body.outputs)
    return [v for v in captured_values(node) if not v.is_initializer() or v in as_tensors]


__all__ = ["Branches", "branches", "install"]
