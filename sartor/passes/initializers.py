"""The part of the `Rewriter` that changes initializers."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from sartor.errors import InternalError
from sartor.ir.deferred import deferred, is_deferred
from sartor.ir.program import Program
from sartor.passes.structure import UniqueNames, same_bits


class InitializerRewriter:
    """Sets, derives, adds and removes initializers; tensors are never written in place."""

    program: Program
    pass_name: str
    counts: collections.Counter[str]
    _names: UniqueNames

    def initializer(self, name: str) -> ir.Value:
        """The initializer of the main graph with this name.

        Raises:
            InternalError: there is none.
        """
        value = self.program.graph.initializers.get(name)
        if value is None:
            raise InternalError(
                f"Pass '{self.pass_name}' looks for initializer '{name}', which the program does not have. "
                "Make the plan from the program it is applied to."
            )
        return value

    def set_initializer(self, target: str | ir.Value, array: np.ndarray, *, retype: bool = False) -> ir.Value:
        """Replace the contents of an initializer; every reader sees the new ones.

        The array is frozen, and copied when it is a view. Element type must stay, unless `retype` says that every
        reader takes the new one; shape may change.

        Raises:
            InternalError: no such initializer, another element type, or it is also a graph input.
        """
        value = self.initializer(target) if isinstance(target, str) else target
        old = self._contents(value)
        if old.dtype != array.dtype and not retype:
            raise InternalError(
                f"Pass '{self.pass_name}' sets initializer '{value.name}' of type {old.dtype} to an array of "
                f"type {array.dtype}. Cast the array first."
            )
        if not same_bits(old, array):
            self._store(value, _frozen(array, value.name))
            self.counts["initializers_changed"] += 1
        return value

    def derive_initializer(
        self,
        target: str | ir.Value,
        compute: Callable[[np.ndarray], np.ndarray],
        shape: Sequence[int] | None = None,
    ) -> ir.Value:
        """Replace the contents of an initializer by what `compute` makes of them.

        Contents that are read when needed stay so: `compute` runs at every reading, and must give the same
        array, of the same element type, each time.

        Args:
            target: the initializer or its name.
            compute: new contents from the old ones.
            shape: of the new contents; the old one if absent.

        Raises:
            InternalError: as `set_initializer`.
        """
        value = self.initializer(target) if isinstance(target, str) else target
        tensor = value.const_value
        if tensor is None or not is_deferred(tensor) or value.is_graph_input():
            return self.set_initializer(value, compute(self._contents(value)))
        dims = tensor.shape.numpy() if shape is None else shape
        derived = deferred(value.name, dims, tensor.dtype.numpy(), lambda: compute(tensor.numpy()))
        self._store(value, derived)
        self.counts["initializers_changed"] += 1
        return value

    def add_initializer(self, hint: str, array: np.ndarray, graph: ir.Graph | None = None) -> ir.Value:
        """A new initializer named `hint`, made unique, in the main graph or in `graph`."""
        value = self._constant(self._names.value(hint), array)
        (graph if graph is not None else self.program.graph).initializers.add(value)
        self.counts["initializers_added"] += 1
        return value

    def remove_initializer(self, value: ir.Value) -> None:
        """Remove an initializer that nothing reads.

        Raises:
            InternalError: it is still read, or is a graph output.
        """
        users = sorted({f"node '{user.name}'" for user, _ in value.uses()})
        if value.is_graph_output():
            users.append("the graph's outputs")
        if users or value.graph is None or not value.is_initializer():
            raise InternalError(
                f"Pass '{self.pass_name}' removes initializer '{value.name}' while it is used by "
                f"{', '.join(users) or 'no graph at all'}."
            )
        value.graph.initializers.pop(value.name or "")
        self.counts["initializers_removed"] += 1

    def _constant(self, name: str | None, array: np.ndarray) -> ir.Value:
        """A value with these contents, in no graph yet."""
        value = ir.Value(name=name)
        self._store(value, _frozen(array, name))
        return value

    def _contents(self, value: ir.Value) -> np.ndarray:
        """The array of a constant initializer.

        Raises:
            InternalError: it is none.
        """
        tensor = value.const_value
        if not value.is_initializer() or tensor is None or value.is_graph_input():
            raise InternalError(
                f"Pass '{self.pass_name}' sets value '{value.name}', which is not a constant initializer."
            )
        array: np.ndarray = tensor.numpy()
        return array

    def _store(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        value.const_value = tensor
        # fresh objects: clones of a program share TensorType objects
        value.type = ir.TensorType(tensor.dtype)
        value.shape = ir.Shape(list(tensor.shape.numpy()))


def _frozen(array: np.ndarray, name: str | None) -> ir.Tensor:
    """A tensor that nobody can change; `array` is frozen, or copied when it is a view."""
    # np.ascontiguousarray would turn a scalar into a vector
    owned = np.array(array, order="C", copy=True if array.base is not None else None)
    owned.setflags(write=False)
    return ir.Tensor(owned, name=name)
