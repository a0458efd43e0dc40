"""Which nodes of a model every kernel of ONNX Runtime computes, from the graph that the runtime executes.

The runtime names a kernel after one of its nodes or after a value, and rewrites what lies between. What a kernel
computes is therefore read from the values: going back from what it writes to what other kernels wrote before. In the
blocked layout a value's name is gone, but the kernel is named after the value that the convolution itself writes;
whether a sum and an activation run inside is in its inputs and attributes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

INSERTED = re.compile(r"(_bn)?_nchwc$|_token_\d+$")
"""What a layout transformation adds to the name of the value or node that a kernel is named after."""
_COPIES = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Constant", "ReorderInput"}
    | {"ReorderOutput"}
)
_STANDS_FOR = {"Split": ("Slice", "Gather"), "Gemm": ("MatMul",), "MatMul": ("MatMul",), "Conv": ("Conv",)}
_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"})
_SUM_INPUTS = {"Conv": 4, "FusedConv": 4}


def executed_nodes(original: onnx.GraphProto, optimised: onnx.GraphProto) -> dict[str, tuple[str, ...]]:
    """Names of the original nodes per name of an executed node, in the order of the original.

    Nodes that are computed when the model is loaded are in none. Executed nodes that only move data for the runtime's
    own purposes have none.
    """
    return _Attribution(original, optimised).run()


def names_of(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """A name for every executed node; those without one are numbered per type."""
    counts: Counter[str] = Counter()
    names = []
    for node in nodes:
        counts[node.op_type] += not node.name
        names.append(node.name or unnamed(node.op_type, counts[node.op_type]))
    return names


def unnamed(op_type: str, number: int) -> str:
    """The name of the `number`-th executed node of a type that has none; the first has number 1."""
    return f"{op_type} {number}"


class _Attribution:
    def __init__(self, original: onnx.GraphProto, optimised: onnx.GraphProto):
        self._nodes = {node.name: node for node in original.node}
        self._order = {node.name: i for i, node in enumerate(original.node)}
        self._maker = {output: node for node in original.node for output in node.output if output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in original.node:
            for value in dict.fromkeys(node.input):
                self._readers.setdefault(value, []).append(node)
        self._constant = _constant_values(original)
        self._executed = list(optimised.node)
        self._claimed: set[str] = set()
        self._found: dict[int, list[str]] = {i: [] for i in range(len(self._executed))}

    def run(self) -> dict[str, tuple[str, ...]]:
        waiting: dict[str, list[int]] = {}  # kernels upstream whose results have no name of the original
        for index, node in enumerate(self._executed):
            cluster = [index, *(i for value in node.input for i in waiting.get(value, ()))]
            ends = self._ends(node)
            if not ends:
                waiting.update((output, cluster) for output in node.output)
                continue
            self._share(self._behind(ends), sorted(set(cluster)))
        by_name: dict[str, set[str]] = {}  # parts of one function may share a name
        for index, name in enumerate(names_of(self._executed)):
            by_name.setdefault(name, set()).update(self._found[index])
        return {name: tuple(sorted(found, key=self._order.__getitem__)) for name, found in by_name.items()}

    def _ends(self, node: onnx.NodeProto) -> list[str]:
        """Values of the original that `node` writes."""
        ends = [v if v in self._maker else INSERTED.sub("", v) for v in node.output]
        ends = [v for v in ends if v in self._maker]
        named = INSERTED.sub("", node.name)
        if not ends and named in self._maker:
            ends = [named]
        blocked = all(v.startswith("reorder") for v in node.output)
        if not ends and blocked and named.split("/")[0] in self._nodes:  # NODE/QuickGeluFusion/
            ends = [v for v in self._nodes[named.split("/")[0]].output if v]
        return [self._extended(node, value) for value in ends]

    def _extended(self, node: onnx.NodeProto, value: str) -> str:
        """Follow a convolution's own result through the sum and the activation that run inside it."""
        maker = self._maker.get(value)
        if node.op_type not in _SUM_INPUTS or maker is None or maker.op_type in _ACTIVATIONS:
            return value
        inside = ["BatchNormalization"]
        if len(node.input) >= _SUM_INPUTS[node.op_type] and node.input[3]:
            inside.append("Add")
        inside += [a.s.decode() for a in node.attribute if a.name == "activation"]
        for kind in inside:
            readers = self._readers.get(value, [])
            if len(readers) == 1 and readers[0].op_type == kind:
                value = readers[0].output[0]
        return value

    def _behind(self, ends: Sequence[str]) -> list[str]:
        """Nodes that `ends` depend on and nobody has computed yet."""
        found: list[str] = []
        left = list(ends)
        while left:
            value = left.pop()
            node = self._maker.get(value)
            if node is None or value in self._constant or node.name in self._claimed:
                continue
            self._claimed.add(node.name)
            found.append(node.name)
            left.extend(v for v in node.input if v)
        return sorted(found, key=self._order.__getitem__)

    def _share(self, names: Sequence[str], cluster: Sequence[int]) -> None:
        """Give nodes to those of `cluster` that compute them: by type, the rest to the first that computes anything."""
        working = [i for i in cluster if self._executed[i].op_type not in _COPIES]
        for name in names:
            kind = self._nodes[name].op_type
            same = [i for i in working if kind in _kinds(self._executed[i].op_type)]
            if kind == "Transpose":  # entering and leaving the blocked layout moves the axes, too
                same = same or [i for i in cluster if self._executed[i].op_type.startswith("Reorder")]
            self._found[(same or working or [cluster[-1]])[0]].append(name)


def _kinds(op_type: str) -> tuple[str, ...]:
    plain = op_type.removeprefix("Fused")
    return (plain, *_STANDS_FOR.get(plain, ()))


def _constant_values(graph: onnx.GraphProto) -> set[str]:
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Shape" or all(not v or v in constant for v in node.input):
            constant.update(node.output)
    return constant
