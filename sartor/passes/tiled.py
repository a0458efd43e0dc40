"""Puts the tiles of a region in its place: their parts of the entry, the region's nodes on each, the whole again.

What is cut out of a dequantized value, or put together of such, is quantized again as that was. This changes nothing,
because quantizing undoes dequantizing, and lets targets that compute in integers cut integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sartor.ir.program import Program
from sartor.ir.tiles.place import Place
from sartor.ir.tiles.region import Region, Tile, grid, tile_of
from sartor.ir.tiles.rules import pad_widths, slice_bounds
from sartor.ir.tiles.spans import Reading, Span
from sartor.passes.rewriter import Rewriter

Spans = tuple[Span, ...]
_END = np.iinfo(np.int64).max


def split(program: Program, region: Region, counts: Sequence[int], rewriter: Rewriter) -> None:
    """Compute a region tile by tile, row by row, each tile to its end before the next begins.

    Args:
        program: rewritten in place, through `rewriter`; the region is one of it.
        region: what is split.
        counts: tiles along each axis of the map.
        rewriter: of `program`.

    Raises:
        Untileable: a tile has nothing to read.
    """
    _Splitting(program, region, counts, rewriter).run()


class _Splitting:
    def __init__(self, program: Program, region: Region, counts: Sequence[int], rewriter: Rewriter):
        self.program, self.region, self.counts, self.rewriter = program, region, counts, rewriter
        self.shapes = program.shapes()
        self.nodes = [rewriter.node(name) for name in region.nodes]
        self.anchor = self.nodes[-1]
        self.constants: dict[tuple[int, ...], ir.Value] = {}

    def run(self) -> None:
        region = self.region
        exit_value = next(v for v in self.anchor.outputs if v.name == region.exit)
        axes = region.axes[region.exit]
        wanted = list(grid(self.shapes[region.exit], axes, self.counts))
        tiles = [tile_of(self.program, region, one) for one in wanted]  # before anything is changed
        per_row = self.counts[-1]
        rows, row = [], []
        for number, tile in enumerate(tiles):
            row.append(self._tile(tile, f"tile{number}"))
            if len(row) == per_row:
                rows.append(self._joined(row, axes[-1]))
                row = []
        whole = self._joined(rows, axes[0])
        self.rewriter.replace_value(exit_value, whole)
        self.rewriter.remove_nodes(self.nodes)
        self.rewriter.count("tiles", len(tiles))

    def _joined(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        if len(parts) == 1:
            return parts[0]
        whole = self._new("Concat", parts, {"axis": axis}, f"{self.region.exit}/rows").outputs[0]
        return self._requantized(whole, parts[0])

    def _requantized(self, moved: ir.Value, source: ir.Value) -> ir.Value:
        """Positions of `source`, with its scale where it has one."""
        dequantize = source.producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return moved
        integers, *scale = dequantize.inputs
        quantize = integers.producer() if integers is not None else None
        attributes = dict(quantize.attributes) if quantize is not None else dict(dequantize.attributes)
        name = f"{moved.name}/integers"
        found = self._new("QuantizeLinear", [moved, *scale], attributes, name).outputs[0]
        back = self._new("DequantizeLinear", [found, *scale], dict(dequantize.attributes), f"{name}/floats")
        return back.outputs[0]

    def _new(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], name: str
    ) -> ir.Node:
        return self.rewriter.insert_before(self.anchor, op_type, inputs, attributes, name=name)

    def _constant(self, numbers: Sequence[int]) -> ir.Value:
        key = tuple(numbers)
        if key not in self.constants:
            self.constants[key] = self.rewriter.add_initializer(
                "tiles/" + "_".join(map(str, key)), np.asarray(key, np.int64)
            )
        return self.constants[key]

    # ---- one tile --------------------------------------------------------------------------
    def _tile(self, tile: Tile, label: str) -> ir.Value:
        made: dict[str, ir.Value] = {}
        for node in self.nodes:
            if not any(output.name in tile.spans for output in node.outputs):
                continue
            rule = self.region.locals[node.name or ""]
            inputs = list(node.inputs)
            readings: tuple[Reading, ...] = ()
            for index, operand in rule.operands.items():
                value = node.inputs[index]
                assert value is not None
                readings = tile.readings[node.name or "", index]
                read = {
                    axis: one.read
                    for axis, one in zip(operand.axes, readings, strict=True)
                    if axis is not None
                }
                inputs[index] = self._part(value, made, tile, read, f"{value.name}/{label}")
            attributes, inputs = self._resized(node, inputs, rule.axes, operand.axes, readings)
            new = self.rewriter.insert_before(
                self.anchor,
                node.op_type,
                inputs,
                attributes,
                outputs=len(node.outputs),
                output_names=[f"{output.name}/{label}" for output in node.outputs],
                name=f"{node.name}/{label}",
            )
            if node.name in self.program.provenance:
                self.program.provenance[new.name or ""] = self.program.provenance[node.name]
            for old, output in zip(node.outputs, new.outputs, strict=True):
                if old.name in tile.spans:
                    spans = tile.spans[old.name or ""]
                    cut = {
                        axis: Span(span.low - one.made.low, span.high - one.made.low)
                        for axis, span, one in zip(rule.axes, spans, readings, strict=True)
                        if span != one.made
                    }
                    made[old.name or ""] = self._cut(output, cut, f"{old.name}/{label}/inner")
        return made[self.region.exit]

    def _part(
        self,
        value: ir.Value,
        made: Mapping[str, ir.Value],
        tile: Tile,
        read: Mapping[int, Span],
        name: str,
    ) -> ir.Value:
        """What an operand reads of a value: of this tile's where the region makes it, else of the whole."""
        inside = made.get(value.name or "")
        if inside is None:
            shape = self.shapes.get(value.name or "") or value.const_value.shape.numpy()  # type: ignore[union-attr]
            there = {axis: Span(0, shape[axis]) for axis in read}
            cut = {axis: span for axis, span in read.items() if span != there[axis]}
            return self._cut(value, cut, name)
        spans = dict(zip(self.region.axes[value.name or ""], tile.spans[value.name or ""], strict=True))
        cut = {
            axis: Span(span.low - spans[axis].low, span.high - spans[axis].low)
            for axis, span in read.items()
            if span != spans[axis]
        }
        return self._cut(inside, cut, name)

    def _cut(self, value: ir.Value, spans: Mapping[int, Span], name: str) -> ir.Value:
        if not spans:
            return value
        axes = sorted(spans)
        bounds = [[spans[a].low for a in axes], [spans[a].high for a in axes], axes]
        moved = self._new("Slice", [value, *map(self._constant, bounds)], {}, name).outputs[0]
        return self._requantized(moved, value)

    def _resized(
        self,
        node: ir.Node,
        inputs: list[ir.Value | None],
        axes: Sequence[int],
        read_axes: Sequence[int | None],
        readings: Sequence[Reading],
    ) -> tuple[dict[str, Any], list[ir.Value | None]]:
        """Attributes and inputs of a node that say how large its map is."""
        attributes: dict[str, Any] = dict(node.attributes)
        if node.op_type in ("Conv", "ConvTranspose", "AveragePool", "LpPool", "MaxPool"):
            count = len(self.shapes[node.inputs[0].name or ""]) - 2  # type: ignore[union-attr]
            pads = list(node.attributes.get_ints("pads", ()) or [0] * (2 * count))
            extra = list(node.attributes.get_ints("output_padding", ()) or [0] * count)
            for axis, one in zip(axes, readings, strict=True):
                pads[axis - 2], pads[axis - 2 + count] = one.before, one.after
                extra[axis - 2] = one.extra
            attributes["pads"] = pads
            attributes.pop("ceil_mode", None)
            attributes.pop("auto_pad", None)
            if node.op_type == "ConvTranspose":
                attributes["output_padding"] = extra
        elif node.op_type == "Resize" and len(inputs) > 3 and inputs[3] is not None:
            place = Place(node, self.shapes, self.region.axes)
            sizes = place.constant(3) or []
            rank = len(self.shapes[node.inputs[0].name or ""])  # type: ignore[union-attr]
            along = [a % rank for a in node.attributes.get_ints("axes", ()) or range(rank)]
            for axis, one in zip(axes, readings, strict=True):
                if axis in along:
                    sizes[along.index(axis)] = one.made.length
            inputs[3] = self._constant(sizes)
        elif node.op_type == "Slice":
            bounds = slice_bounds(Place(node, self.shapes, self.region.axes))
            for axis, one in zip(axes, readings, strict=True):
                if axis in bounds:
                    bounds[axis] = (0, one.read.length, bounds[axis][2])
            columns = [
                [b[0] for b in bounds.values()],
                [b[1] if b[1] >= 0 else -_END for b in bounds.values()],
                list(bounds),
                [b[2] for b in bounds.values()],
            ]
            inputs = [inputs[0], *map(self._constant, columns)]
        elif node.op_type == "Pad":
            widths = pad_widths(Place(node, self.shapes, self.region.axes))
            for axis, one in zip(axes, readings, strict=True):
                widths[axis] = (one.before, one.after)
            pads = [width[side] for side in (0, 1) for width in widths.values()]
            value = node.inputs[2] if len(node.inputs) > 2 else None
            inputs = [inputs[0], self._constant(pads), value, self._constant(list(widths))]
        return attributes, inputs
