"""`remove-blocks`: replace residual blocks by their shortcut."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from sartor.errors import PlanError
from sartor.ir.blocks import Block, residual_blocks
from sartor.ir.bodies import read_values
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.base import LAYER_CRITERIA, Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.candidates import kept_by, matching, scores_of
from sartor.passes.rewriter import Rewriter

_MAKES_NONNEGATIVE = frozenset(
    {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Softplus", "Sqrt", "ReduceL1", "ReduceL2"}
    | {"ReduceSumSquare"}
)
_KEEPS_NONNEGATIVE = frozenset(
    {"Identity", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Reshape", "Transpose"}
    | {"Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand", "Tile", "DepthToSpace"}
    | {"SpaceToDepth", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"}
)
_COMBINES_NONNEGATIVE = frozenset({"Add", "Mul", "Concat", "Max", "Min"})


@dataclasses.dataclass(frozen=True)
class RemoveBlocks(Pass):
    """Remove residual blocks: those that globs name, or the least important ones.

    Becomes: y = Add(x, f(x))                 →   y = x
             y = Relu(Add(x, f(x))), x ≥ 0    →   y = x

    With `blocks` alone every block that matches goes. With `count` the least important go, among those
    that match if `blocks` is given. Criteria other than random are scored by `context.importance`.

    Ensures: equal to MASKED, the original with the last affine parameters of the branch zeroed; see
    `sartor.ir.blocks`. Nodes and initializers that only the branch read are gone.

    Refuses when: the shortcut passes through layers or is broadcast; the branch is used elsewhere; the
    block's result or a value of the branch is a graph output; no affine parameters make the branch 0; a node
    or parameter of it is kept; fewer blocks are removable than `count`.
    """

    name: ClassVar[str] = "remove-blocks"
    semantics: ClassVar[Semantics] = Semantics.NEEDS_TRAINING

    blocks: tuple[str, ...] = option((), help="globs of block names, see `sartor inspect`")
    count: int = option(0, help="how many blocks to remove; 0: every block that `blocks` names", minimum=0)
    criterion: str = option("random", help=f"what ranks blocks: {LAYER_CRITERIA}")
    seed: int = option(0, help="of criterion random", minimum=0)

    def plan(self, program: Program, context: Context) -> Any:
        """Choose blocks. See `Pass.plan`.

        Raises:
            UsageError: a glob matches no block, or nothing provides the criterion.
        """
        if not self.blocks and not self.count:
            return None
        found = residual_blocks(program)
        wanted = matching(found, self.blocks, "residual block")
        refusals: list[Refusal] = []
        candidates: list[Block] = []
        for block in wanted:
            kept = None if not block.removable else kept_by(program, block, context)
            if block.removable and kept is None:
                candidates.append(block)
            elif self.blocks or kept is not None:
                refusals.append(Refusal(block.name, block.reason or f"'{kept}' of the branch is kept"))
        if self.count:
            if len(candidates) < self.count:
                asked = f"{self.count} blocks are to be removed, but only {len(candidates)} can be"
                refusals.append(Refusal(", ".join(self.blocks) or "*", asked))
            scores = scores_of(program, candidates, self.criterion, self.seed, context)
            ranked = sorted(range(len(candidates)), key=lambda i: (scores[candidates[i].name], i))
            candidates = [candidates[i] for i in sorted(ranked[: self.count])]
        names = tuple(block.name for block in candidates)
        return Planned(Plan(program.source.sha256, blocks=names, notes={"pass": str(self)}), tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Remove the plan's blocks. See `Pass.apply`."""
        remove_blocks(program, plan.blocks, rewriter)


def remove_blocks(program: Program, names: Iterable[str], rewriter: Rewriter) -> None:
    """Remove residual blocks of `program` in place, in graph order whatever the order of `names`.

    Blocks may follow each other (the shortcut of one is the result of another) and contain each other.

    Raises:
        PlanError: a name is no block of this program, or the block is not removable.
    """
    wanted = dict.fromkeys(names)
    if not wanted:
        return
    found = {block.name: block for block in residual_blocks(program)}
    for name in wanted:
        if name not in found:
            raise PlanError(
                f"The plan removes block '{name}', which this program does not have. Make the plan from the "
                "program it is applied to."
            )
        if not found[name].removable:
            raise PlanError(
                f"The plan removes block '{name}', which is not removable: {found[name].reason}. "
                "Leave it out of the plan."
            )
    chosen = [block for block in found.values() if block.name in wanted]
    doomed = {rewriter.node(name) for block in chosen for name in block.nodes}
    relus: dict[ir.Node, None] = {}
    for block in chosen:
        add = rewriter.node(block.add)
        # By index: an earlier block may have replaced the value. The branch is never another block's result.
        kept = add.inputs[1 if add.inputs[0] is not None and add.inputs[0].name == block.branch else 0]
        assert kept is not None
        relus.update((user, None) for user, _ in add.outputs[0].uses() if user.op_type == "Relu")
        rewriter.replace_value(add.outputs[0], kept)
        rewriter.count("blocks_removed")
    _bypass_relus(program, relus, doomed, rewriter)
    _remove(program, doomed, rewriter)
    program.invalidate()


def _bypass_relus(
    program: Program, relus: Iterable[ir.Node], doomed: set[ir.Node], rewriter: Rewriter
) -> None:
    """Let readers of Relu(x) read x where x ≥ 0 is proven; such a Relu is then doomed, too."""
    nonnegative = nonnegative_values(program)
    for relu in relus:
        source = relu.inputs[0]
        if relu in doomed or source not in nonnegative or relu.outputs[0].is_graph_output():
            continue
        assert source is not None
        rewriter.replace_value(relu.outputs[0], source)
        rewriter.count("relus_removed")
        doomed.add(relu)


def _remove(program: Program, doomed: set[ir.Node], rewriter: Rewriter) -> None:
    """Remove nodes, then what only they read: weights, and nodes that several of them shared."""
    main = program.graph
    inside = doomed
    while inside:
        read = {value for node in inside for value in read_values(node)}
        rewriter.remove_nodes(sorted(inside, key=lambda node: node.name or ""))
        inside = set()
        for value in sorted(read, key=lambda value: value.name or ""):
            if value.uses() or value.is_graph_output() or value.is_graph_input() or value.graph is not main:
                continue
            producer = value.producer()
            if value.is_initializer():
                rewriter.remove_initializer(value)
            elif producer is not None and not any(
                output.uses() or output.is_graph_output() for output in producer.outputs
            ):
                inside.add(producer)


def nonnegative_values(program: Program) -> set[ir.Value]:
    """Values of the main graph that are ≥ 0 for every input, as far as the operators prove it."""
    known: set[ir.Value] = set()

    def holds(value: ir.Value | None) -> bool:
        if value is None or value in known:
            return value is not None
        if value.const_value is None or not value.is_initializer() or value.is_graph_input():
            return False
        array = value.const_value.numpy()
        if array.dtype.kind == "f" and bool((array >= 0).all()):
            known.add(value)
        return value in known

    for node in program.nodes():
        if node.domain not in ("", "ai.onnx"):
            continue
        op, inputs = node.op_type, list(node.inputs)
        if (
            op in _MAKES_NONNEGATIVE
            or (op in _KEEPS_NONNEGATIVE and holds(inputs[0]))
            or (op in _COMBINES_NONNEGATIVE and all(holds(value) for value in inputs))
            or (op == "Mul" and inputs[0] is inputs[1])
            or (
                op == "Clip"
                and (holds(inputs[0]) or (len(inputs) > 1 and holds(inputs[1])))
                and _sane(inputs)
            )
        ):
            known.update(node.outputs)
    return known


def _sane(clip: Sequence[ir.Value | None]) -> bool:
    """Whether the upper bound of a Clip is absent or a constant ≥ 0."""
    if len(clip) < 3 or clip[2] is None:
        return True
    bound = clip[2].const_value
    return bound is not None and bool((bound.numpy() >= 0).all())
