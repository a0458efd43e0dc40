"""Every branch of every `If` in turn: random inputs take one branch, and an error in the other would be missed.

A *case* says for each `If` whose condition depends on data which branch to take. In a program forced into a
case, conditions are constants, and the numbers that they were computed from can be outputs instead, so that
what leads to a condition is compared, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sartor.ir.bodies import captured_values
from sartor.ir.branches import BRANCHES, branch, is_choice
from sartor.ir.channels import ChannelAnalysis
from sartor.ir.program import Program
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


def force(program: Program, case: Case, shown: Sequence[str] = ()) -> Program:
    """The program with the conditions of `case`, and the values named in `shown` as further outputs."""
    clone = program.clone()
    rewriter = Rewriter(clone, "force-conditions")
    constants = {
        taken: rewriter.add_initializer(f"condition_{taken}".lower(), np.array(taken))
        for taken in (True, False)
    }
    for node in clone.graph.all_nodes():
        if is_choice(node) and node.name in case:
            rewriter.set_input(node, 0, constants[case[node.name or ""]])
    shapes, types = program.shapes(), program.types()
    for value in [output for node in clone.nodes() for output in node.outputs if output.name in shown]:
        if not value.is_graph_output():
            name = value.name or ""
            value.shape, value.type = ir.Shape(shapes[name]), ir.TensorType(types[name])
            clone.graph.outputs.append(value)
    clone.invalidate()
    return clone


def decisive(program: Program) -> list[str]:
    """Names of the numbers that conditions are computed from, by comparisons, logic and casts.

    Those of conditions in the main graph only: inside a branch they cannot become outputs.
    """
    types = program.types()
    found: dict[str, None] = {}
    stack = [node.inputs[0] for node in program.nodes() if is_choice(node)]
    seen = set(stack)
    while stack:
        value = stack.pop()
        producer = value.producer() if value is not None else None
        if value is None or producer is None:
            continue
        if types[value.name or ""].is_floating_point():
            found[value.name or ""] = None
            continue
        reads = [v for v in producer.inputs if v not in seen]
        seen.update(reads)
        stack += reads
    return list(found)


def gates(analysis: ChannelAnalysis) -> dict[str, set[str]]:
    """Names of the nodes that read what MASKED zeroes, by group."""
    readers = {
        name: {node.name or "" for node, _ in value.uses()}
        for name, value in analysis.program.initializers.items()
    }
    return {
        group.name: {name for m in analysis.masked_members(group) for name in readers[m.initializer]}
        for group in analysis.groups
    }


def groups_in(readers: Mapping[str, set[str]], program: Program, case: Case) -> set[str]:
    """Groups of which something that MASKED zeroes is read on the way to an output in this case.

    Args:
        readers: as `gates` gives them.
        program: whose groups these are, or its MASKED form, forced or not.
        case: which branches are taken.
    """
    needed = _needed(program, case)
    return {name for name, nodes in readers.items() if nodes & needed}


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
