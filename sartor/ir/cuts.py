"""Values through which everything goes: where a network can be cut into one part and the rest."""

from __future__ import annotations

import dataclasses

from sartor.ir.bodies import read_values
from sartor.ir.program import Program


@dataclasses.dataclass(frozen=True)
class Cut:
    """A value without which nothing that comes later can be computed, and which is enough for all of it.

    Attributes:
        value: its name.
        nodes: names of the nodes before it.
    """

    value: str
    nodes: tuple[str, ...]


def cuts(program: Program) -> list[Cut]:
    """Every such value that a node makes, in execution order, outputs of the program excepted."""
    nodes = list(program.nodes())
    last = {value.name or "": i for i, node in enumerate(nodes) for value in read_values(node)}
    outputs = {value.name or "" for value in program.graph.outputs}
    live = {value.name or "" for value in program.graph.inputs} & set(last)
    found = []
    for i, node in enumerate(nodes):
        made = {value.name or "" for value in node.outputs}
        live |= {name for name in made if name in last or name in outputs}
        live = {name for name in live if name in outputs or last[name] > i}
        if len(live) == 1 and live <= made and not live & outputs:
            (name,) = live
            found.append(Cut(name, tuple(one.name or "" for one in nodes[: i + 1])))
    return found
