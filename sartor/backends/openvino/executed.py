"""Which nodes of a program every layer of OpenVINO's execution graph computes.

A layer lists the names of the layers that were merged into it, but not those of what was folded into its weights
(BatchNormalization, biases), nor the original's where a transformation has replaced an operator (LayerNormalization
becomes MVN or RMS). What a layer lists is therefore completed: with what lies in front of it and belongs to nobody, and
where it lists nothing, with the next node of its type whose inputs come from the layers in front.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence, Set

from sartor.backends.origin import Origin

_IDLE = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Size", "Constant"})
_NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization")
_STANDS_FOR: Mapping[str, tuple[str, ...]] = {
    "Convolution": ("Conv",),
    "GroupConvolution": ("Conv",),
    "Deconvolution": ("ConvTranspose",),
    "FullyConnected": ("Gemm", "MatMul"),
    "MatMul": ("Gemm", "MatMul"),
    "MVN": _NORMS,
    "RMS": _NORMS,
    "Pooling": ("MaxPool", "AveragePool", "GlobalAveragePool"),
    "Split": ("Slice", "Gather", "Split"),
    "Transpose": ("Transpose",),
    "ShuffleChannels": ("Transpose",),
    "DepthToSpace": ("DepthToSpace", "Transpose"),
    "SpaceToDepth": ("SpaceToDepth", "Transpose"),
    "Concatenation": ("Concat",),
    "Softmax": ("Softmax",),
    "Reorder": ("Transpose",),
}
"""ONNX types of a layer that was rewritten, by its type."""
_PARTS = frozenset({"MVN", "RMS", "Reduce", "ReduceMean", "Subgraph", "Reorder", "Eltwise", "Math"})
"""Types of layers that a normalization is taken apart into."""
_MADE_UP = {"Multiply": "Mul", "Add": "Add", "Subtract": "Sub", "Divide": "Div", "Power": "Pow"}
"""ONNX types behind the names that a transformation makes up, such as `Multiply_6147`."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of the execution graph.

    Attributes:
        name: its name.
        kind: its type, `Convolution`.
        original: names of the layers in it.
        sources: names of the layers whose results it reads.
        written: shape of its first output; empty where it is not fixed.
    """

    name: str
    kind: str
    original: tuple[str, ...]
    sources: tuple[str, ...]
    written: tuple[int, ...] = ()


def executed_nodes(origin: Origin, layers: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    """Nodes of the program per layer, in the program's order.

    Args:
        layers: the execution graph in any order; the answer does not depend on it.
    """
    return _Attribution(origin, layers).run()


class _Attribution:
    def __init__(self, origin: Origin, layers: Sequence[Layer]):
        self._types, self._inputs = origin.types, origin.inputs
        self._users: dict[str, list[str]] = {}
        self._idle: set[str] = set()
        fixed: set[str] = set()  # computed when the model is compiled
        for name in self._types:
            sources = self._inputs.get(name, [])
            for source in dict.fromkeys(sources):
                self._users.setdefault(source, []).append(name)
            if all(source in fixed for source in sources) or self._types[name] in ("Shape", "Size"):
                fixed.add(name)
            if name in fixed or self._types[name] in _IDLE:
                self._idle.add(name)
        self._listed = {
            layer.name: [n for n in map(origin.named, map(_original, layer.original)) if n]
            for layer in layers
        }
        order = {name: i for i, name in enumerate(self._types)}
        places = {
            name: min(map(order.__getitem__, names), default=len(order))
            for name, names in self._listed.items()
        }
        self._layers = _in_order(layers, places)
        self._taken = {n for names in self._listed.values() for n in names if n not in self._idle}
        self._found: dict[str, set[str]] = {}
        self._values: dict[str, set[str]] = {}  # nodes whose results a layer hands on

    def run(self) -> dict[str, tuple[str, ...]]:
        for layer in self._layers:
            before = set().union(*(self._values.get(source, set()) for source in layer.sources))
            names = set(self._listed[layer.name])
            busy = names - self._idle
            if busy:
                busy |= self._between(busy)
            else:
                busy = self._rewritten(layer, before)
            self._taken |= busy
            busy |= self._folded(busy)
            self._taken |= busy
            self._found[layer.name] = names | busy
            self._values[layer.name] = busy or before
        self._helpers()
        order = {name: i for i, name in enumerate(self._types)}
        return {name: tuple(sorted(nodes, key=order.__getitem__)) for name, nodes in self._found.items()}

    def _helpers(self) -> None:
        """Give layers that compute no node to the normalization that reads from them: they are parts of it.

        Of its parts (means, differences, MVN, RMS), only the last one, perhaps merged with others, has its name.
        """
        norms = {name for name, kind in self._types.items() if kind in _NORMS}
        for layer in reversed(self._layers):
            if layer.kind not in _PARTS or self._found[layer.name] - self._idle:
                continue
            for reader in self._layers:
                parts = self._found[reader.name] & norms
                if layer.name in reader.sources and parts:
                    self._found[layer.name] |= parts

    def _between(self, names: Set[str]) -> set[str]:
        """What `names` depend on and no layer has."""
        return {n for n in self._back(names, stop=self._taken) if n not in self._idle}

    def _back(self, names: Iterable[str], stop: Set[str]) -> set[str]:
        found: set[str] = set()
        left = [source for name in names for source in self._inputs.get(name, [])]
        while left:
            name = left.pop()
            if name and name not in found and name not in stop:
                found.add(name)
                left.extend(self._inputs.get(name, []))
        return found

    def _rewritten(self, layer: Layer, before: Set[str]) -> set[str]:
        """The next nodes that a layer without a known name computes."""
        kinds = _STANDS_FOR.get(layer.kind, ())
        made_up = layer.kind in ("Subgraph", "Eltwise", "Math")
        if made_up:
            kinds = tuple(kind for name, kind in _MADE_UP.items() if layer.name.startswith(f"{name}_"))
        free = [n for n, kind in self._types.items() if kind in kinds and n not in self._taken | self._idle]
        ready = [n for n in free if self._roots(n) <= before] or (free[:1] if made_up else [])
        if not ready:
            return set()
        chosen = ready[min(self._rank(layer), len(ready) - 1)]
        kind = self._types[chosen]
        if layer.kind != "Split" or kind == "Split":
            return {chosen}
        return {n for n in self._users[self._inputs[chosen][0]] if self._types[n] == kind} - self._taken

    def _rank(self, layer: Layer) -> int:
        """How many layers beside this one have a smaller number: numbers follow the program's order."""
        beside = [
            one
            for one in self._layers
            if one.kind == layer.kind and one.sources[:1] == layer.sources[:1] and one.name not in self._found
        ]
        return sum(_number(one.name) < _number(layer.name) for one in beside)

    def _roots(self, name: str) -> set[str]:
        """Nodes that compute what `name` reads, looked for through metadata."""
        roots: set[str] = set()
        left = list(self._inputs.get(name, []))
        while left:
            source = left.pop()
            if source in self._idle:
                left.extend(self._inputs.get(source, []))
            elif source:
                roots.add(source)
        return roots

    def _folded(self, names: Set[str]) -> set[str]:
        """Biases and BatchNormalizations behind `names` that no layer lists: they are in the weights."""
        added: set[str] = set()
        left = list(names)
        while left:
            users = self._users.get(left.pop(), [])
            if len(users) != 1 or users[0] in added | names | self._taken:
                continue
            kind, changing = self._types[users[0]], [s for s in self._inputs[users[0]] if s not in self._idle]
            if kind == "BatchNormalization" or (kind == "Add" and len(changing) == 1):
                added.add(users[0])
                left.append(users[0])
        return added


def _in_order(layers: Sequence[Layer], places: Mapping[str, int]) -> list[Layer]:
    """Every layer behind those that it reads from; of several that could come next, the first in the program.

    What belongs to several layers goes to the first of them, and the vendor's order changes from run to run.
    """
    waiting = {layer.name: {s for s in layer.sources if s in places} for layer in layers}
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        for source in waiting[layer.name]:
            readers.setdefault(source, []).append(layer)
    by_name = {layer.name: layer for layer in layers}
    ready = [(places[name], _number(name), name) for name, sources in waiting.items() if not sources]
    heapq.heapify(ready)
    found = []
    while ready:
        name = heapq.heappop(ready)[2]
        found.append(by_name[name])
        for reader in readers.get(name, ()):
            waiting[reader.name].discard(name)
            if not waiting[reader.name]:
                heapq.heappush(ready, (places[reader.name], _number(reader.name), reader.name))
    return found


def _original(name: str) -> str:
    """A convolution with a bias becomes two layers; the first gets a suffix."""
    return name.removesuffix("/WithoutBiases")


def _number(name: str) -> int:
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else 0
