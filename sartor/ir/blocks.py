"""Residual blocks: `x + f(x)` where `f` reads only `x` and parameters and feeds only the Add.

An Add is a residual block when one operand, the *shortcut*, dominates the other, the *branch*: every path
from a graph input to the branch then leads through the shortcut, so the nodes in between form a region with
one entry. It also needs one exit, the Add. Replacing the Add's output by the shortcut removes the block.

The MASKED form of a removed block keeps all nodes and zeroes the *last affine* parameters of the branch, so
that the branch yields exactly 0. They are found by walking back from the branch through operators that map
0 to 0. Values that depend on no data (computed from initializers and shapes alone) are called *free*; they
are no paths into a region.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from sartor.ir.block_zeros import Site, ZeroSearch
from sartor.ir.bodies import read_values, with_inner_nodes
from sartor.ir.program import Program

_WEIGHTED = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "LayerNormalization"}
    | {"InstanceNormalization", "GroupNormalization", "Einsum", "LSTM", "GRU", "RNN"}
)
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ROOT = ""  # no value has an empty name


@dataclasses.dataclass(frozen=True)
class Block:
    """One residual block; all fields are names of the main graph.

    Attributes:
        name: common module path of the branch, else the name of the Add; unique.
        inputs: the one value that enters: the shortcut, or what shortcut and branch have in common.
        outputs: the one value that leaves, the Add's output.
        nodes: nodes that go with the block, in graph order: the branch, what only it reads, and the Add.
        removable: whether the Add's output can be replaced by the shortcut.
        reason: why not, naming the node; empty when removable.
        add: the Add.
        shortcut: the Add's operand that stays.
        branch: the Add's operand that goes.
        last_affine: initializers that make the branch exactly 0 when they are; empty unless removable.
        last_affine_sites: where each of them is read on the way to the branch, as (node, input index).
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    removable: bool
    reason: str
    add: str
    shortcut: str
    branch: str
    last_affine: tuple[str, ...] = ()
    last_affine_sites: tuple[tuple[str, int], ...] = ()


def residual_blocks(program: Program) -> tuple[Block, ...]:
    """All residual blocks of the main graph, in graph order.

    An Add whose shortcut passes through layers is listed, too, as not removable. An Add of a constant, or
    one whose branch has no layer with parameters (as in a Gelu written out), is no block.

    Raises:
        ModelError: shapes cannot be inferred.
    """
    return _Finder(program).blocks()


def masked_block_initializers(program: Program, block: Block) -> tuple[str, ...]:
    """Initializers that MASKED zeroes for a removed block; see `Block.last_affine`.

    Where one is also read elsewhere than at `Block.last_affine_sites`, MASKED needs a private copy.
    """
    return block.last_affine


@dataclasses.dataclass(frozen=True)
class _Region:
    """Nodes between an entry value and an exit value: those that depend on data, and their private others."""

    nodes: frozenset[ir.Node]
    private: frozenset[ir.Node]


class _Finder:
    def __init__(self, program: Program):
        self.program = program
        self.order = {node: i for i, node in enumerate(program.nodes())}
        self.owner = {inner: node for node in self.order for inner in with_inner_nodes(node)}
        self.inputs = {node: read_values(node) for node in self.order}
        self.outputs = set(program.graph.outputs)
        self.free: set[ir.Value] = set(program.graph.initializers.values())
        self.free.difference_update(program.graph.inputs)
        for node in self.order:
            if node.op_type == "Shape" or all(value in self.free for value in self.inputs[node]):
                self.free.update(node.outputs)
        self._dominators()

    # ---- dominators ------------------------------------------------------------------------
    def _dominators(self) -> None:
        """Immediate dominator and depth in the dominator tree of every value that depends on data."""
        import networkx

        graph = networkx.DiGraph()
        graph.add_node(_ROOT)
        graph.add_edges_from((_ROOT, value) for value in self.program.graph.inputs)
        for node in self.order:
            if node.outputs and node.outputs[0] in self.free:
                continue
            sources = [value for value in self.inputs[node] if value not in self.free]
            graph.add_edges_from((source, output) for output in node.outputs for source in sources)
        self.dominator = networkx.immediate_dominators(graph, _ROOT)
        self.depth = {_ROOT: 0}
        for value in self.program.graph.inputs:
            self.depth[value] = 1
        for node in self.order:
            for output in node.outputs:
                if output in self.dominator:
                    self.depth[output] = self.depth[self.dominator[output]] + 1

    def _common(self, a: ir.Value, b: ir.Value) -> ir.Value | str:
        """The nearest value through which every path to `a` and every path to `b` leads."""
        x: ir.Value | str = a
        y: ir.Value | str = b
        while x is not y:
            if self.depth[x] >= self.depth[y]:
                x = self.dominator[x]
            else:
                y = self.dominator[y]
        return x

    # ---- blocks ----------------------------------------------------------------------------
    def blocks(self) -> tuple[Block, ...]:
        found = [entry for node in self.order for entry in self._block(node)]
        names = _unique_names(self.program, [(block, modules) for block, modules in found])
        return tuple(
            dataclasses.replace(block, name=name) for (block, _), name in zip(found, names, strict=True)
        )

    def _block(self, add: ir.Node) -> Iterator[tuple[Block, list[str]]]:
        """The block that ends in `add`, if it is one, with the modules of its branch in graph order."""
        if add.op_type != "Add" or add.domain not in ("", "ai.onnx"):
            return
        a, b = add.inputs
        if a is None or b is None or a is b or a not in self.depth or b not in self.depth:
            return
        entry = self._common(a, b)
        if not isinstance(entry, ir.Value):
            return
        first, second = self._region(a, entry, add), self._region(b, entry, add)
        shortcut, branch, detour, region = a, b, first, second
        if (len(first.nodes), b is entry) > (len(second.nodes), False):
            shortcut, branch, detour, region = b, a, second, first
        if not any(self._weighted(node) for node in region.nodes):
            return
        sites: tuple[Site, ...] = ()
        reason = self._obstacle(add, shortcut, branch, detour, region)
        if not reason:
            search = ZeroSearch(self.program, region.nodes, self.free)
            reason, sites = search.reason(branch), search.sites(branch)
        ordered = sorted(region.nodes, key=self.order.__getitem__)
        everything = sorted({*region.nodes, *region.private, add}, key=self.order.__getitem__)
        yield (
            Block(
                name=add.name or "",
                inputs=(entry.name or "",),
                outputs=(add.outputs[0].name or "",),
                nodes=tuple(node.name or "" for node in everything),
                removable=not reason,
                reason=reason,
                add=add.name or "",
                shortcut=shortcut.name or "",
                branch=branch.name or "",
                last_affine=tuple(site.initializer for site in sites),
                last_affine_sites=tuple((site.node, site.index) for site in sites),
            ),
            [self._module(node) for node in ordered],
        )

    def _obstacle(
        self, add: ir.Node, shortcut: ir.Value, branch: ir.Value, detour: _Region, region: _Region
    ) -> str:
        """Why the Add cannot be replaced by its shortcut; empty if it can."""
        if detour.nodes:
            ordered = sorted(detour.nodes, key=self.order.__getitem__)
            layer = next((node for node in ordered if node.op_type in _LAYERS), ordered[0])
            return f"the shortcut passes through '{layer.name}' ({layer.op_type})"
        inside = {*region.nodes, *region.private, add}
        for node in sorted(region.nodes | region.private, key=self.order.__getitem__):
            for value in node.outputs:
                if value in self.outputs:
                    return f"'{value.name}' of the branch, made by '{node.name}', is a graph output"
                for user in self._users(value):
                    if user not in inside:
                        return (
                            f"'{value.name}' of the branch is also used by '{user.name}' ({user.op_type}) "
                            "outside the block"
                        )
        output = add.outputs[0]
        if output in self.outputs:
            return f"the result of '{add.name}' (Add) is a graph output"
        shapes, types = self.program.shapes(), self.program.types()
        before, after = shapes[shortcut.name or ""], shapes[output.name or ""]
        if before != after or types.get(shortcut.name or "") != types.get(output.name or ""):
            return f"'{add.name}' (Add) broadcasts its shortcut from shape {list(before)} to {list(after)}"
        return ""

    def _region(self, exit_value: ir.Value, entry: ir.Value, add: ir.Node) -> _Region:
        """What computes `exit_value` from `entry`, and free nodes that nothing else reads."""
        nodes: set[ir.Node] = set()
        stack = [exit_value]
        while stack:
            value = stack.pop()
            producer = value.producer()
            if value is entry or value in self.free or producer is None or producer in nodes:
                continue
            nodes.add(producer)
            stack.extend(self.inputs[producer])
        private: set[ir.Node] = set()
        # Last in the graph first: all readers of a node are judged before the node itself.
        waiting = {p for node in nodes for p in self._free_producers(node)}
        while waiting:
            node = max(waiting, key=self.order.__getitem__)
            waiting.remove(node)
            users = {user for value in node.outputs for user in self._users(value)}
            if users <= nodes | private and self.outputs.isdisjoint(node.outputs):
                private.add(node)
                waiting |= self._free_producers(node)
        return _Region(frozenset(nodes), frozenset(private))

    def _free_producers(self, node: ir.Node) -> set[ir.Node]:
        producers = {value.producer() for value in self.inputs[node] if value in self.free}
        return {producer for producer in producers if producer is not None}

    def _users(self, value: ir.Value) -> Iterator[ir.Node]:
        """Nodes of the main graph that read `value`, themselves or in a body."""
        for user, _ in value.uses():
            yield self.owner.get(user, user)

    def _weighted(self, node: ir.Node) -> bool:
        return node.op_type in _WEIGHTED and any(value in self.free for value in self.inputs[node])

    def _module(self, node: ir.Node) -> str:
        provenance = self.program.provenance.get(node.name or "")
        return provenance.module if provenance is not None else ""


# ---- parts ---------------------------------------------------------------------------------
def _unique_names(program: Program, found: list[tuple[Block, list[str]]]) -> list[str]:
    """Module path per block; two blocks of one module also name the submodule that ends their branch."""
    stems = [_prefix(modules) for _, modules in found]
    counts = collections.Counter(stems)
    names: list[str] = []
    for (block, modules), stem in zip(found, stems, strict=True):
        name = stem or block.add
        if stem and counts[stem] > 1:
            ends = [module.split(".") for module in modules if module.startswith(f"{stem}.")]
            name = f"{stem}.{ends[-1][stem.count('.') + 1]}" if ends else stem
        names.append(name)
    taken: set[str] = set()
    for index, name in enumerate(names):
        candidate, number = name, 0
        while candidate in taken:
            number += 1
            candidate = f"{name}_{number}"
        taken.add(candidate)
        names[index] = candidate
    return names


def _prefix(modules: list[str]) -> str:
    """Longest common dotted path of the modules that are known; empty if there is none."""
    paths = [module.split(".") for module in modules if module]
    if not paths:
        return ""
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
