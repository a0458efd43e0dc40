"""More residual blocks, and the same function.

After Chen et al., "Net2Net", ICLR 2016, section 2.4: what is inserted is the identity until it is trained. A block that
is repeated has the weights of the one before it and zeros in the last affine layer of its branch, as in Goyal et al.,
"Accurate, large minibatch SGD", 2017, section 5.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sartor.errors import PlanError
from sartor.ir.blocks import Block, residual_blocks
from sartor.ir.bodies import body_graphs
from sartor.ir.layers import activated
from sartor.ir.program import Program
from sartor.passes.rewriter import Rewriter


def obstacle(program: Program, block: Block) -> str:
    """Why a block cannot be repeated; empty if it can."""
    if not block.removable:
        return block.reason
    nodes = {node.name: node for node in program.nodes()}
    inside = [nodes[name] for name in block.nodes]
    bodies = [node.name for node in inside if body_graphs(node)]
    if bodies:
        return f"'{bodies[0]}' has a body of nodes"
    if activated(nodes[block.add].outputs[0]).is_graph_output():
        return "its result is a graph output"
    return ""


def repeat_blocks(program: Program, repeats: Mapping[str, int], rewriter: Rewriter) -> None:
    """Insert copies of residual blocks behind them, in place.

    Args:
        program: rewritten.
        repeats: by block name, how many more.
        rewriter: of `program`.

    Raises:
        PlanError: a name is no block of this program, or the block cannot be repeated.
    """
    if not repeats:
        return
    blocks = {block.name: block for block in residual_blocks(program)}
    for name in repeats:
        reason = (
            "the program has none of this name" if name not in blocks else obstacle(program, blocks[name])
        )
        if reason:
            raise PlanError(f"The plan repeats block '{name}', which cannot be: {reason}. Leave it out.")
    for name, block in blocks.items():
        end = activated(rewriter.node(block.add).outputs[0])
        for number in range(1, repeats.get(name, 0) + 1):
            end = _Copy(program, block, number, rewriter).behind(end)
            rewriter.count("blocks_added")
    program.invalidate()


class _Copy:
    """One copy of a block; values and parameters of the block by what they are in the copy."""

    def __init__(self, program: Program, block: Block, number: int, rewriter: Rewriter):
        self.program, self.block, self.rewriter = program, block, rewriter
        self.suffix = f"+{number}"
        self.values: dict[ir.Value, ir.Value] = {}

    def behind(self, end: ir.Value) -> ir.Value:
        """Insert it behind `end`, and let everything that read `end` read its result."""
        readers = list(end.uses())
        nodes = [self.rewriter.node(name) for name in self.block.nodes]
        add = self.rewriter.node(self.block.add)
        shortcut = next(v for v in add.inputs if v is not None and v.name != self.block.branch)
        self.values[shortcut] = end
        last = activated(add.outputs[0]).producer()
        if last is not add and last is not None:
            nodes.append(last)
        anchor = end.producer()
        for node in nodes:
            assert anchor is not None
            anchor = self._node(node, anchor)
        result = anchor.outputs[0]  # type: ignore[union-attr]
        for user, index in readers:
            self.rewriter.set_input(user, index, result)
        return result

    def _node(self, node: ir.Node, anchor: ir.Node) -> ir.Node:
        inputs = [self._operand(node, index) for index in range(len(node.inputs))]
        copy = self.rewriter.insert_after(
            anchor,
            node.op_type,
            inputs,
            outputs=len(node.outputs),
            output_names=[self._named(value.name or "") for value in node.outputs],
            name=self._named(node.name or ""),
            domain=node.domain,
        )
        copy.attributes.update(node.attributes)
        origin = self.program.provenance.get(node.name or "")
        if origin is not None:
            named = dataclasses.replace(origin, module=self._named(origin.module))
            self.program.provenance[copy.name or ""] = named
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
            self.values[old] = new
        return copy

    def _operand(self, node: ir.Node, index: int) -> ir.Value | None:
        value = node.inputs[index]
        if value is None:
            return None
        if (node.name or "", index) in self.block.last_affine_sites:
            assert value.const_value is not None
            return self._parameter(value, np.zeros_like(value.const_value.numpy()))
        if value not in self.values and value.is_initializer() and value.const_value is not None:
            kind = value.const_value.dtype
            if kind.is_floating_point() and value.const_value.size > 1:
                self.values[value] = self._parameter(value, value.const_value.numpy().copy())
        return self.values.get(value, value)

    def _parameter(self, value: ir.Value, array: np.ndarray) -> ir.Value:
        return self.rewriter.add_initializer(self._named(value.name or ""), array)

    def _named(self, name: str) -> str:
        """`a.0.conv.weight` as `a.0+1.conv.weight` where the block is `a.0`, elsewhere as `a.0.conv+1.weight`."""
        stem = self.block.name
        if name == stem or name.startswith((f"{stem}.", f"{stem}/")):
            return stem + self.suffix + name[len(stem) :]
        head, dot, leaf = name.rpartition(".")
        return head + self.suffix + dot + leaf if dot else name and name + self.suffix
