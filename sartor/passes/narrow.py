"""Takes the kept indices out of every parameter and rewrites every number that depends on a width.

Purely mechanical: label arrays say which atom sits at each position of an axis, a plan says which atoms
stay, and everything follows by counting. Attention scales and other data constants are kept.
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


def narrow(program: Program, analysis: ChannelAnalysis, alive: np.ndarray, rewriter: Rewriter) -> None:
    """Remove dead atoms from `program`, which has the nodes and names that `analysis` was made for.

    Args:
        program: rewritten in place, through `rewriter`.
        analysis: its channel analysis.
        alive: boolean per atom, as `analysis.alive_atoms(plan)` gives.
        rewriter: of `program`.
    """
    if alive.all():
        return
    _Narrowing(program, analysis, alive, rewriter).run()


def _take(axes: Sequence[tuple[int, np.ndarray]], array: np.ndarray) -> np.ndarray:
    for axis, indices in axes:
        array = np.take(array, indices, axis=axis)
    return array


class _Narrowing:
    def __init__(self, program: Program, analysis: ChannelAnalysis, alive: np.ndarray, rewriter: Rewriter):
        self.program, self.analysis, self.alive, self.rewriter = program, analysis, alive, rewriter
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
            kept = self.alive[atoms]
            if not kept.all():
                keeps.setdefault(name, []).append((axis, np.flatnonzero(kept)))
        for name, axes in keeps.items():
            tensor = self.program.initializers[name].const_value
            assert tensor is not None  # it is labelled
            shape = list(tensor.shape.numpy())
            for axis, indices in axes:
                shape[axis] = len(indices)
            self.rewriter.derive_initializer(name, functools.partial(_take, axes), shape)
            self.rewriter.count("parameters_narrowed")

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

    def _kept(self, value: ir.Value | None, axis: int) -> np.ndarray | None:
        """Boolean per position of an axis, or None when nothing of it is removed.

        Raises:
            InternalError: a joint factor would become ragged.
        """
        factor = self._factor(value, axis)
        if factor is None:
            return None
        alive = self.alive[factor.atoms]
        if alive.all():
            return None
        lines = [alive.any(axis=tuple(j for j in range(alive.ndim) if j != i)) for i in range(alive.ndim)]
        whole = np.ones((), dtype=bool)
        for line in lines:
            whole = np.multiply.outer(whole, line)
        if (whole != alive).any():
            name = value.name if value is not None else ""
            raise InternalError(f"The plan leaves value '{name}' ragged along axis {axis}.")
        return lines[factor.axes.index(axis)]

    def _length(self, value: ir.Value, axis: int) -> int:
        kept = self._kept(value, axis)
        return self.propagation.shapes[value.name or ""][axis] if kept is None else int(kept.sum())

    def _changed(self, value: ir.Value | None) -> bool:
        rank = len(self.propagation.shapes[value.name or ""]) if value is not None else 0
        return any(self._kept(value, axis) is not None for axis in range(rank))

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
        if self._kept(node.inputs[0], axis) is None:
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
            kept = self._kept(node.inputs[0], axis)
            changed |= kept is not None
            starts.append(start if kept is None else int(kept[:start].sum()))
            ends.append(end if kept is None else int(kept[:end].sum()))
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
        kept = self._kept(data, axis)
        if kept is None:
            return
        old = np.where(indices < 0, indices + len(kept), indices)
        position = np.cumsum(kept) - 1
        self._replace(node, 1, position[old[kept[old]]] if old.ndim else position[old])

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
            kept = self._kept(output, axis)
            if kept is not None:
                before, after = new[i], new[i + len(order)]
                new[i] = int(kept[:before].sum())
                new[i + len(order)] = int(kept[len(kept) - after :].sum())
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
        classes = self.analysis.classes
        alive = self._rows_alive(rows, classes.of_atom)
        name = "num_groups" if node.op_type == "GroupNormalization" else "group"
        if int(alive.sum()) != len(rows):
            self.rewriter.set_attribute(node, name, int(alive.sum()))

    def _rows_alive(self, rows: np.ndarray, of_atom: np.ndarray) -> np.ndarray:
        """Whether each group of a grouped operator stays; derived rows die when all their atoms do."""
        for projection in self.propagation.space.projections:
            if projection.slices.shape == rows.shape and (projection.slices == rows).all():
                return self.alive[projection.children].any(axis=-1)
        return self.alive[rows]
