"""Every branch of every `If` in turn: random inputs take one branch, and an error in the other would be missed.

A *case* says for each `If` whose condition depends on data which branch to take. In a program forced into a
case, conditions are constants, and the numbers that the conditions were computed from are outputs instead,
so that what leads to a condition is compared, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sartor.ir.branches import BRANCHES, branch, is_choice
from sartor.ir.channels import ChannelAnalysis
from sartor.ir.program import Program
from sartor.ir.subgraphs import captured_values
from sartor.passes.rewriter import Rewriter

Case = Mapping[str, bool]

_ALL_COMBINATIONS = 8


def cases(program: Program) -> list[Case]:
    """Cases in which every branch is taken at least once; none where no condition depends on data.

    All combinations of few independent conditions, of many those in which every two meet in every way.
    """
    return [case for case in _cases(program.graph) if case]


def _cases(graph: ir.Graph) -> list[dict[str, bool]]:
    parts: list[list[dict[str, bool]]] = []
    for node in graph:
        if is_choice(node):
            fixed = _fixed(node)
            parts.append([])
            for taken, key in zip((True, False), BRANCHES, strict=True):
                if fixed in (None, taken):
                    own = {} if fixed is not None else {node.name or "": taken}
                    parts[-1] += [own | inner for inner in _cases(branch(node, key))]
    if math.prod(map(len, parts)) <= _ALL_COMBINATIONS:
        rows: Sequence[Sequence[dict[str, bool]]] = list(itertools.product(*parts))
    else:
        patterns = [0] + [1 << bit for bit in range((len(parts) - 1).bit_length())]
        rows = [
            [part[(row + bool(number & pattern)) % len(part)] for number, part in enumerate(parts)]
            for pattern in patterns
            for row in range(max(map(len, parts)))
        ]
    return [{name: taken for part in row for name, taken in part.items()} for row in rows]


def _fixed(node: ir.Node) -> bool | None:
    """The value of a constant condition."""
    condition = node.inputs[0]
    if condition is None or condition.const_value is None:
        return None
    return bool(np.asarray(condition.const_value.numpy()).reshape(()))


def force(program: Program, case: Case) -> Program:
    """The program with the conditions of `case`; what they were computed from are further outputs."""
    clone = program.clone()
    rewriter = Rewriter(clone, "force-conditions")
    constants = {
        taken: rewriter.add_initializer(f"condition_{taken}".lower(), np.array(taken))
        for taken in (True, False)
    }
    shown: dict[ir.Value, None] = {}
    for node in list(clone.graph.all_nodes()):
        if is_choice(node) and node.name in case:
            if node.inputs[0] is not None and node.graph is clone.graph:
                shown.update(dict.fromkeys(_numbers(program, node.inputs[0])))
            rewriter.set_input(node, 0, constants[case[node.name or ""]])
    shapes, types = program.shapes(), program.types()
    for value in shown:
        if not value.is_graph_output() and not value.is_graph_input():
            name = value.name or ""
            value.shape, value.type = ir.Shape(shapes[name]), ir.TensorType(types[name])
            clone.graph.outputs.append(value)
    clone.invalidate()
    return clone


def _numbers(program: Program, condition: ir.Value) -> list[ir.Value]:
    """The floating-point values that a condition is computed from, by comparisons, logic and casts."""
    types = program.types()
    found: dict[ir.Value, None] = {}
    seen = {condition}
    stack = [condition]
    while stack:
        value = stack.pop()
        dtype = types.get(value.name or "")
        producer = value.producer()
        if producer is None or dtype is None:
            continue
        if dtype.is_floating_point():
            found[value] = None
            continue
        reads = [v for v in producer.inputs if v is not None and v not in seen]
        seen.update(reads)
        stack += reads
    return list(found)


def groups_in(analysis: ChannelAnalysis, program: Program, case: Case) -> set[str]:
    """Groups of which something that MASKED zeroes is read on the way to an output in this case.

    Args:
        analysis: whose groups are asked for.
        program: the one that `analysis` was made for, or its MASKED form, forced or not.
        case: which branches are taken.
    """
    needed = _needed(program, case)
    readers = {
        name: {node.name or "" for node, _ in value.uses()}
        for name, value in analysis.program.initializers.items()
    }
    return {
        group.name
        for group in analysis.groups
        if any(readers[m.initializer] & needed for m in analysis.masked_members(group))
    }


def _needed(program: Program, case: Case) -> set[str]:
    """Names of the nodes that some output depends on."""
    needed: set[str] = set()
    seen: set[ir.Value] = set()
    stack = list(program.graph.outputs)
    while stack:
        value = stack.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        needed.add(node.name or "")
        stack += [v for v in node.inputs if v is not None]
        taken = case.get(node.name or "", _fixed(node)) if is_choice(node) else None
        if taken is None:
            stack += captured_values(node)
        else:
            body = branch(node, BRANCHES[0 if taken else 1])
            stack.append(body.outputs[node.outputs.index(value)])
    return needed
