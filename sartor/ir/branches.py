"""`If` in two forms: *nested*, as programs are stored and run, and *flat*, as they are analysed.

In the flat form all nodes and initializers of the branches stand in the main graph, before the If, which
only selects: each branch is one Identity per output. Names stay, so what is found out about a value of the
flat form holds for the value of that name in the nested form, and every analysis and clean-up of the main
graph covers branches without knowing of them. A flat program is never run: it would compute both branches.

`flatten` and `nest` are inverse to each other, except that initializers stay in the main graph.
"""

from __future__ import annotations

import itertools

import onnx_ir as ir

from sartor.errors import ModelError

BRANCHES = ("then_branch", "else_branch")
_PATH = "sartor.branch"  # key of metadata_props: where a node of the flat form belongs, the main graph: ""
_NUMBER = "sartor.if"  # the same: number of an If in these paths

Path = tuple[str, ...]


def is_choice(node: ir.Node) -> bool:
    """Whether the node is an `If`."""
    return node.op_type == "If" and node.domain in ("", "ai.onnx")


def has_choices(graph: ir.Graph) -> bool:
    """Whether an `If` stands in the graph itself."""
    return any(is_choice(node) for node in graph)


def branch(node: ir.Node, key: str) -> ir.Graph:
    """The body of an `If`.

    Raises:
        ModelError: it is missing, has inputs, or does not give one value per output.
    """
    attribute = node.attributes.get(key)
    if attribute is None or attribute.type != ir.AttributeType.GRAPH:
        raise ModelError(f"Node '{node.name}' (If) has no {key}; export the model again.")
    body = attribute.as_graph()
    if len(body.outputs) != len(node.outputs) or body.inputs:
        raise ModelError(
            f"The {key} of node '{node.name}' (If) has {len(body.inputs)} inputs and {len(body.outputs)} outputs; "
            f"expected none and {len(node.outputs)}. Export the model again."
        )
    return body


def selectors(node: ir.Node, index: int) -> tuple[ir.Node, ir.Node]:
    """The Identities that give output `index` of an `If` of a flat graph, when the condition holds and when not."""
    first, second = (branch(node, key).outputs[index].producer() for key in BRANCHES)
    if first is None or second is None:
        raise ModelError(f"Node '{node.name}' (If) is not in the flat form.")
    return first, second


def is_flat(node: ir.Node) -> bool:
    """Whether the branches of an `If` hold nothing but one Identity of a value from outside per output."""
    for key in BRANCHES:
        body = branch(node, key)
        makers = [value.producer() for value in body.outputs]
        if body.initializers or len(body) != len(set(makers)) or len(makers) != len(set(makers)):
            return False
        if any(n is None or n.graph is not body or n.op_type != "Identity" or n.domain for n in makers):
            return False
    return True


def flattened(model: ir.Model) -> ir.Model:
    """`model` itself where it has no `If`, otherwise a flat copy that shares its tensors."""
    if not has_choices(model.graph):
        return model
    copy = model.clone()
    flatten(copy.graph)
    return copy


def forget_lost_uses(graph: ir.Graph) -> bool:
    """Drop the uses that nodes of bodies make whose control-flow node is gone; whether there were any."""
    alive = {graph, *graph.subgraphs()}
    values = itertools.chain(graph.inputs, graph.initializers.values(), *(node.outputs for node in graph))
    lost = [use for value in values for use in value.uses() if use.node.graph not in alive]
    for node, index in lost:
        node.replace_input_with(index, None)
    return bool(lost)


# ---- nested to flat ---------------------------------------------------------------------------
def flatten(graph: ir.Graph) -> list[ir.Value]:
    """Move everything in the branches of every `If` in front of it; returns the initializers that moved.

    Names that two branches share, or a branch and the main graph, are made unique.

    Raises:
        ModelError: an `If` has no two branches with its number of outputs.
    """
    if not has_choices(graph):
        return []
    return _Flattening(graph).run()


class _Flattening:
    def __init__(self, graph: ir.Graph):
        self.graph = graph
        self.numbers = itertools.count()
        self.moved: list[ir.Value] = []
        self.values = {v.name for v in [*graph.inputs, *graph.initializers.values()]}
        self.values.update(v.name for node in graph for v in node.outputs)
        self.nodes = {node.name for node in graph}

    def run(self) -> list[ir.Value]:
        for node in self.graph:
            node.metadata_props[_PATH] = ""
        for node in list(filter(is_choice, self.graph)):
            self._lift(node, "")
        return self.moved

    def _lift(self, node: ir.Node, path: str) -> None:
        number = next(self.numbers)
        node.metadata_props[_NUMBER] = str(number)
        for key in BRANCHES:
            body = branch(node, key)
            inside = f"{path}/{number}.{key}"
            for name, value in list(body.initializers.items()):
                body.initializers.pop(name)
                self._name(value)
                self.graph.register_initializer(value)
                self.moved.append(value)
            kept = {self._selector(node, key, body, i) for i in range(len(body.outputs))}
            inner = [n for n in body if n not in kept]
            body.remove(inner)
            for n in inner:
                n.name = _free(n.name or f"{n.op_type}_{n.outputs[0].name}", self.nodes)
                n.metadata_props[_PATH] = inside
                for output in n.outputs:
                    if output.name:
                        self._name(output)
            self.graph.insert_before(node, inner)
            for n in inner:
                if is_choice(n):
                    self._lift(n, inside)

    def _selector(self, node: ir.Node, key: str, body: ir.Graph, index: int) -> ir.Node:
        """The Identity that gives output `index` of a branch; nothing else reads its result."""
        value = body.outputs[index]
        maker = value.producer()
        alone = sum(v is value for v in body.outputs) == 1 and not value.uses()
        if maker is None or maker.graph is not body or maker.op_type != "Identity" or not alone:
            maker = ir.node("Identity", [value], num_outputs=1, name=f"{node.name}.{key}.{index}")
            maker.outputs[0].name = f"{node.outputs[index].name}.{key}"
            maker.outputs[0].type = value.type
            body.append(maker)
            body.outputs[index] = maker.outputs[0]
        maker.name = _free(maker.name or f"{node.name}.{key}.{index}", self.nodes)
        self._name(maker.outputs[0])
        maker.outputs[0].shape = None  # widths may change, and nothing reads what a body declares
        return maker

    def _name(self, value: ir.Value) -> None:
        value.name = _free(value.name or "value", self.values)


def _free(name: str, taken: set[str | None]) -> str:
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}.{number}"
    taken.add(candidate)
    return candidate


# ---- flat to nested ---------------------------------------------------------------------------
def nest(graph: ir.Graph) -> None:
    """Move every node back into the branch it came from, or as far out as something reads its result.

    A node that came into being since, and that serves one branch only, goes into that branch.

    Args:
        graph: flat, in execution order, names unique.
    """
    choices = {n.metadata_props[_NUMBER]: n for n in graph if is_choice(n) and _NUMBER in n.metadata_props}
    if not choices:
        return
    bodies = {f"{number}.{key}": branch(n, key) for number, n in choices.items() for key in BRANCHES}
    owner = {body: (choices[place.partition(".")[0]], place) for place, body in bodies.items()}
    paths: dict[ir.Node, Path] = {}
    for node in reversed(list(graph)):
        places: list[Path] = [() for output in node.outputs if output.is_graph_output()]
        places += [
            paths[user] if user.graph is graph else _inside(owner, paths, user.graph)
            for output in node.outputs
            for user, _ in output.uses()
        ]
        known = node.metadata_props.get(_PATH)
        if known is not None:
            places.append(tuple(filter(None, known.split("/"))))
        paths[node] = _common(places)
    identities = {body: list(body) for body in bodies.values()}
    for body in bodies.values():
        body.remove(identities[body])
    for node, path in reversed(list(paths.items())):
        if path:
            graph.remove(node)
            bodies[path[-1]].append(node)
    for body in bodies.values():
        _select(body, identities[body])


def _inside(owner: dict[ir.Graph, tuple[ir.Node, str]], paths: dict[ir.Node, Path], body: object) -> Path:
    node, place = owner[body]  # type: ignore[index]
    return (*paths[node], place)


def _common(places: list[Path]) -> Path:
    """The innermost place that holds all of them."""
    if not places:
        return ()
    equal = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*places, strict=False))
    return tuple(names[0] for names in equal)


def _select(body: ir.Graph, identities: list[ir.Node]) -> None:
    """Let the outputs of a branch be what it computes; what comes from outside needs its Identity."""
    for index, value in enumerate(list(body.outputs)):
        identity = value.producer()
        assert identity is not None and identity in identities
        source = identity.inputs[0]
        maker = source.producer() if source is not None else None
        if source is None or maker is None or maker.graph is not body or source.is_graph_output():
            body.append(identity)
            continue
        body.outputs[index] = source
        source.shape, source.type = None, source.type or value.type
        identity.replace_input_with(0, None)
