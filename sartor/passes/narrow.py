"""Takes the positions that a plan leaves and copies those it widens, and rewrites every number that depends on them.

Purely mechanical: label arrays say which atom sits at each position of an axis, a plan says which atoms
stay and which come again, and everything follows by counting. Attention scales and other data constants are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sartor.errors import InternalError
from sartor.ir.channels import ChannelAnalysis
from sartor.ir.channels.labels import Factor
from sartor.ir.channels.rules_movement import slice_bounds
from sartor.ir.program import Program
from sartor.passes.rewriter import Rewriter
from sartor.passes.widths import Order, Widths


def narrow(program: Program, analysis: ChannelAnalysis, widths: Widths, rewriter: Rewriter) -> None:
    """Give the channels of `program` other widths; it has the nodes and names that `analysis` was made for.

    Args:
        program: rewritten in place, through `rewriter`.
        analysis: its channel analysis.
        widths: what stays and what comes again.
        rewriter: of `program`.
    """
    if not widths.unchanged:
        _Narrowing(program, analysis, widths, rewriter).run()


def _take(axes: Sequence[tuple[int, np.ndarray]], array: np.ndarray) -> np.ndarray:
    for axis, indices in axes:
        array = np.take(array, indices, axis=axis)
    return array


class _Narrowing:
    def __init__(self, program: Program, analysis: ChannelAnalysis, widths: Widths, rewriter: Rewriter):
        self.program, self.widths, self.rewriter = program, widths, rewriter
        self.propagation = analysis.propagation

    def run(self) -> None:
        for node in list(self.program.graph.all_nodes()):  # branches of `If`, too
            method = getattr(self, f"_{node.op_type.lower()}", None)
            if method is not None and not node.domain:
                method(node)
            if node.op_type in ("Conv", "ConvTranspose", "GroupNormalization"):
                self._groups(node)
        self._parameters()

    def _parameters(self) -> None:
        keeps: dict[str, list[tuple[int, np.ndarray]]] = {}
        for (name, axis), atoms in self.propagation.parameter_atoms.items():
            order = self.widths.order(Factor((axis,), atoms), 0)
            if order is not None:
                keeps.setdefault(name, []).append((axis, order.old))
        for name, axes in keeps.items():
            tensor = self.program.initializers[name].const_value
            assert tensor is not None  # it is labelled
            shape = list(tensor.shape.numpy())
            for axis, indices in axes:
                shape[axis] = len(indices)
            self.rewriter.derive_initializer(name, functools.partial(_take, axes), shape)
            self.rewriter.count("parameters_resized")

    # ---- counting --------------------------------------------------------------------------
    def _factor(self, value: ir.Value | None, axis: int) -> Factor | None:
        """The label factor of one axis of an activation or parameter, None when it is free."""
        name = value.name or "" if value is not None else ""
        atoms = self.propagation.parameter_atoms.get((name, axis))
        if atoms is not None:
            return Factor((axis,), atoms)
        for factor in self.propagation.value_labels.get(name, ()):
            if axis in factor.axes:
                return factor
        return None

    def _order(self, value: ir.Value | None, axis: int) -> Order | None:
        """Positions along an axis, or None when they stay as they are.

        Raises:
            InternalError: a joint factor would become ragged.
        """
        factor = self._factor(value, axis)
        if factor is None:
            return None
        try:
            return self.widths.order(factor, factor.axes.index(axis))
        except InternalError as error:
            error.add_note(f"Along axis {axis} of value '{value.name if value is not None else ''}'.")
            raise

    def _length(self, value: ir.Value, axis: int) -> int:
        order = self._order(value, axis)
        return self.propagation.shapes[value.name or ""][axis] if order is None else len(order.old)

    def _changed(self, value: ir.Value | None) -> bool:
        rank = len(self.propagation.shapes[value.name or ""]) if value is not None else 0
        return any(self._order(value, axis) is not None for axis in range(rank))

    def _replace(self, node: ir.Node, index: int, array: np.ndarray) -> None:
        value = self.rewriter.private_initializer(node, index)
        tensor = value.const_value
        assert tensor is not None
        old = tensor.numpy()
        self.rewriter.set_initializer(
            value, array.astype(old.dtype).reshape(old.shape if array.size == old.size else -1)
        )
        self.rewriter.count("constants_rewritten")

    # ---- one method per operator with numbers that depend on widths --------------------------
    def _reshape(self, node: ir.Node) -> None:
        output, target = node.outputs[0], node.inputs[1]
        if target is None or not self._changed(output):
            return
        entries = self.propagation.entries(target)
        if not target.is_initializer() or entries is None:
            raise InternalError(f"Reshape {self.program.where(node)} has a computed target.")
        new = [e if e in (0, -1) else self._length(output, axis) for axis, e in enumerate(entries)]
        self._replace(node, 1, np.asarray(new))

    def _expand(self, node: ir.Node) -> None:
        output, target = node.outputs[0], node.inputs[1]
        if target is None or not self._changed(output):
            return
        producer = target.producer()
        parts = [(node, 1, target)]
        if producer is not None and producer.op_type == "Concat":
            parts = [(producer, i, v) for i, v in enumerate(producer.inputs) if v is not None]
        total = len(self.propagation.entries(target) or ())
        axis = len(self.propagation.shapes[output.name or ""]) - total
        for owner, index, value in parts:
            entries = self.propagation.entries(value) or []
            if value.is_initializer():
                new = [1 if e == 1 else self._length(output, axis + i) for i, e in enumerate(entries)]
                self._replace(owner, index, np.asarray(new))
            axis += len(entries)

    def _split(self, node: ir.Node) -> None:
        rank = len(self.propagation.shapes[node.outputs[0].name or ""])
        axis = self.propagation.attribute(node, "axis", 0) % rank
        if self._order(node.inputs[0], axis) is None:
            return
        sizes = np.asarray([self._length(output, axis) for output in node.outputs], dtype=np.int64)
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            self._replace(node, 1, sizes)
        else:
            self.rewriter.set_input(node, 1, self.rewriter.add_initializer(f"{node.name}.split", sizes))
            self.rewriter.set_attribute(node, "num_outputs", None)

    def _slice(self, node: ir.Node) -> None:
        bounds = slice_bounds(self.propagation, node)
        if bounds is None or not self._changed(node.inputs[0]):
            return
        starts, ends, changed = [], [], False
        for axis, (start, end, _) in bounds.items():
            order = self._order(node.inputs[0], axis)
            changed |= order is not None
            starts.append(start if order is None else _before(order, start))
            ends.append(end if order is None else _before(order, end))
        if not changed:
            return
        backwards = [a for a, (_, _, step) in bounds.items() if step < 0]
        if backwards:
            raise InternalError(f"Slice {self.program.where(node)} runs backwards along axis {backwards[0]}.")
        for index, array in ((1, starts), (2, ends)):
            self._replace(node, index, np.asarray(array))
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            self._replace(node, 3, np.asarray(list(bounds)))

    def _gather(self, node: ir.Node) -> None:
        data, indices = node.inputs[0], self.propagation.constant(node.inputs[1])
        if data is None or indices is None:
            return
        rank = len(self.propagation.shapes[data.name or ""])
        axis = self.propagation.attribute(node, "axis", 0) % rank
        order = self._order(data, axis)
        if order is None:
            return
        chosen = np.where(indices < 0, indices + self.propagation.shapes[data.name or ""][axis], indices)
        taken = self._order(node.outputs[0], axis) if chosen.ndim else None
        places = _Places(order)
        self._replace(node, 1, np.asarray(places.of(chosen.ravel() if taken is None else chosen[taken.old])))

    def _pad(self, node: ir.Node) -> None:
        output = node.outputs[0]
        shape = self.propagation.shapes[node.inputs[0].name or ""]  # type: ignore[union-attr]
        pads, axes = self.propagation.entries(node.inputs[1]), None
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            axes = self.propagation.entries(node.inputs[3])
        order = [int(a or 0) % len(shape) for a in axes] if axes else list(range(len(shape)))
        if pads is None or not self._changed(output):
            return
        new = [int(p or 0) for p in pads]
        for i, axis in enumerate(order):
            found = self._order(output, axis)
            if found is not None:
                length = self.propagation.shapes[output.name or ""][axis]
                before, after = new[i], new[i + len(order)]
                new[i] = _before(found, before)
                new[i + len(order)] = len(found.old) - _before(found, length - after)
        self._replace(node, 1, np.asarray(new))

    def _resize(self, node: ir.Node) -> None:
        sizes = node.inputs[3] if len(node.inputs) > 3 else None
        if sizes is None or not sizes.is_initializer() or not self._changed(node.outputs[0]):
            return
        rank = len(self.propagation.shapes[node.outputs[0].name or ""])
        axes = self.propagation.attribute(node, "axes", None) or range(rank)
        self._replace(node, 3, np.asarray([self._length(node.outputs[0], a % rank) for a in axes]))

    def _groups(self, node: ir.Node) -> None:
        rows = self.propagation.group_rows.get(node.name or "")
        if rows is None:
            return
        children = None
        for projection in self.propagation.space.projections:
            if projection.slices.shape == rows.shape and (projection.slices == rows).all():
                children = projection.children
                break
        count = self.widths.rows(rows, children)
        if count != len(rows):
            name = "num_groups" if node.op_type == "GroupNormalization" else "group"
            self.rewriter.set_attribute(node, name, count)


def _before(order: Order, position: int) -> int:
    """How many new positions come before what was `position`.

    Raises:
        InternalError: copies were moved across it.
    """
    ahead = order.old < position
    count = int(ahead.sum())
    if not ahead[:count].all():
        raise InternalError("Copies of units lie on both sides of where a value is cut.")
    return count


class _Places:
    """Where the copies of old positions are now, each handed out once in a turn."""

    def __init__(self, order: Order):
        self.places: dict[int, list[int]] = {}
        for new, old in enumerate(order.old.tolist()):
            self.places.setdefault(old, []).append(new)

    def of(self, chosen: np.ndarray) -> list[int]:
        """New positions of old ones; of one that is asked for again the next copy, in turn."""
        asked: dict[int, int] = {}
        found = []
        for old in chosen.tolist():
            places = self.places.get(old, [])
            if places:
                found.append(places[asked.get(old, 0) % len(places)])
                asked[old] = asked.get(old, 0) + 1
        return found
