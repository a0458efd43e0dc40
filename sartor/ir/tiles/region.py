"""Regions of a program that can be computed tile by tile, and what each tile of one reads and makes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from sartor.ir.bodies import body_graphs
from sartor.ir.program import Program
from sartor.ir.tiles.place import Axes, Local, Place
from sartor.ir.tiles.rules import local
from sartor.ir.tiles.spans import Reading, Span, Untileable, partition


@dataclasses.dataclass(frozen=True)
class Region:
    """Everything between two values: what depends on the first and is needed for the last, and nothing else reads.

    Attributes:
        entry: value that tiles are cut out of.
        exit: value that they are put together to.
        nodes: names, in an order in which they can run.
        locals: how each can be computed tile by tile, by name.
        axes: of the map, by value of the region.
    """

    entry: str
    exit: str
    nodes: tuple[str, ...]
    locals: Mapping[str, Local]
    axes: Mapping[str, Axes]


@dataclasses.dataclass(frozen=True)
class Stop:
    """Where regions from an entry end, and why.

    Attributes:
        node: the first that cannot be computed tile by tile; empty at the end of the program.
        reason: in words.
    """

    node: str
    reason: str


def map_axes(shape: Sequence[int]) -> Axes:
    """Where the map lies in a value of this shape, channels first.

    Raises:
        Untileable: it has none.
    """
    if len(shape) < 3:
        raise Untileable(f"has the shape {list(shape)}, without a map")
    return (2,) if len(shape) == 3 else (len(shape) - 2, len(shape) - 1)


def regions(program: Program, entry: ir.Value, axes: Axes) -> tuple[list[Region], Stop]:
    """Regions from a value on, each larger than the one before, up to what is not local.

    Args:
        program: canonical.
        entry: where they begin.
        axes: of its map.

    Returns:
        One region for every value through which everything from `entry` on goes, and where that ends.
    """
    shapes = program.shapes()
    known: dict[str, Axes] = {entry.name or "": axes}
    locals_: dict[str, Local] = {}
    waiting: dict[str, int] = {}  # uses that are to come, by value that the region made
    nodes: list[str] = []
    found: list[Region] = []
    outputs = {value.name for value in program.outputs}
    for node in program.nodes():
        names = [value.name or "" for value in node.inputs if value is not None]
        if not any(name in known for name in names) and not _inside(node, known):
            continue
        try:
            if _inside(node, known):
                raise Untileable("has branches that read the map")
            rule = local(Place(node, shapes, known))
        except Untileable as error:
            return found, Stop(node.name or "", str(error))
        locals_[node.name or ""] = rule
        nodes.append(node.name or "")
        for name in names:
            if name in waiting:
                waiting[name] -= 1
                if not waiting[name]:
                    del waiting[name]
        for output in node.outputs:
            if output.uses() or output.name in outputs:
                known[output.name or ""] = rule.axes
                waiting[output.name or ""] = len(output.uses())
        left = list(waiting)
        if len(left) == 1 and left[0] in {output.name for output in node.outputs}:
            kept = {name: locals_[name] for name in nodes}
            found.append(Region(entry.name or "", left[0], tuple(nodes), kept, dict(known)))
        if any(output.name in outputs for output in node.outputs):
            return found, Stop("", "the program ends")
    return found, Stop("", "the program ends")


def _inside(node: ir.Node, known: Mapping[str, Axes]) -> bool:
    """Whether a body of the node reads the map."""
    return any(
        value is not None and value.name in known
        for body in body_graphs(node)
        for inner in body.all_nodes()
        for value in inner.inputs
    )


@dataclasses.dataclass(frozen=True)
class Tile:
    """What is computed for one tile of the exit.

    Attributes:
        spans: positions of every value of the region that the tile needs, by value.
        readings: what every operand is read at, by node and input.
    """

    spans: Mapping[str, tuple[Span, ...]]
    readings: Mapping[tuple[str, int], tuple[Reading, ...]]

    def made(self, node: str) -> tuple[Span, ...] | None:
        """What a node makes before anything of it is cut away; None where it is what is needed."""
        for (name, _), readings in self.readings.items():
            if name == node:
                return tuple(one.made for one in readings)
        return None


def tile_of(program: Program, region: Region, wanted: tuple[Span, ...]) -> Tile:
    """What has to be known for some positions of the exit, backwards through the region.

    Raises:
        Untileable: there is nothing to read for it; behind the name of the node.
    """
    shapes = program.shapes()
    by_name = {node.name: node for node in program.nodes()}
    spans: dict[str, tuple[Span, ...]] = {region.exit: wanted}
    readings: dict[tuple[str, int], tuple[Reading, ...]] = {}
    for name in reversed(region.nodes):
        node, rule = by_name[name], region.locals[name]
        asked = [spans[v.name or ""] for v in node.outputs if v.name in spans]
        if not asked:
            continue
        out = tuple(_hull(parts) for parts in zip(*asked, strict=True))
        for output in node.outputs:
            if output.name in region.axes:
                spans[output.name or ""] = out
        for index, operand in rule.operands.items():
            value = node.inputs[index]
            assert value is not None
            shape = shapes.get(value.name or "") or tuple(value.const_value.shape.numpy())  # type: ignore[union-attr]
            try:
                found = tuple(
                    relation.reading(span, shape[axis] if axis is not None else 1)
                    for relation, span, axis in zip(operand.relations, out, operand.axes, strict=True)
                )
            except Untileable as error:
                raise Untileable(f"'{name}' {error}") from error
            readings[name, index] = found
            if value.name in region.axes:
                needed = tuple(
                    one.read if axis is not None else Span(0, 1)
                    for one, axis in zip(found, operand.axes, strict=True)
                )
                before = spans.get(value.name or "")
                spans[value.name or ""] = (
                    needed
                    if before is None
                    else tuple(a.hull(b) for a, b in zip(needed, before, strict=True))
                )
    return Tile(spans, readings)


def _hull(parts: Sequence[Span]) -> Span:
    found = parts[0]
    for part in parts[1:]:
        found = found.hull(part)
    return found


def grid(shape: Sequence[int], axes: Axes, counts: Sequence[int]) -> Iterator[tuple[Span, ...]]:
    """Tiles of a map, row by row.

    Args:
        shape: of the exit.
        axes: of its map.
        counts: tiles along each.
    """
    yield from itertools.product(
        *(partition(shape[axis], count) for axis, count in zip(axes, counts, strict=True))
    )
