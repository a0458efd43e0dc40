"""Runs an FX twin node by node, with large weights in memory only while a node reads them.

`to_fx` gives a module that owns all of its weights, for training and export. A twin that is only run, in
float64 above all, does not need them at once: here a large weight is read from the program for each node
that uses it, and for gradients the twin is cut into segments that are computed again in the backward pass.

Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016 (recomputation by segments).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from sartor.errors import ModelError, SartorError
from sartor.ir.fx_build import INFO, Builder, TwinInfo
from sartor.ir.fx_tensors import to_tensor
from sartor.ir.program import Program
from sartor.ir.torch_ops import OPERATORS

SEGMENT_BYTES = 1 << 26
"""Large weights of one segment, in the element type of the run."""
WHOLE_BYTES = 1 << 30
"""A twin that reads fewer large weights for its gradients is not cut: computing it twice costs a third more time."""


def _conv(rank: int, attributes: Mapping[str, Any]) -> tuple[int, int]:
    return (1, 1) if attributes.get("group", 1) == 1 else (-1, 1)


def _mat_mul(rank: int, attributes: Mapping[str, Any]) -> tuple[int, int]:
    return (0, -1) if rank == 2 else (-1, -1)


def _gemm(rank: int, attributes: Mapping[str, Any]) -> tuple[int, int]:
    return int(bool(attributes.get("transB", 0))), 0 if attributes.get("transA", 0) else 1


_SUMMED: dict[Any, Callable[[int, Mapping[str, Any]], tuple[int, int]]] = {
    OPERATORS["Conv"].function: _conv,
    OPERATORS["MatMul"].function: _mat_mul,
    OPERATORS["Gemm"].function: _gemm,
}
"""By operator: the axis of the weight that is summed over (-1 for none), and that of the other operand."""


class Gates:
    """Multipliers of 1 on slices of initializers, which gradients are taken of.

    Args:
        sizes: number of units by gate.
        members: what each gate multiplies: initializer, axis, and the unit of every position there, or -1.
        dtype: of the gates.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        members: Mapping[str, Iterable[tuple[str, int, np.ndarray]]],
        dtype: torch.dtype,
    ):
        self.vectors = {k: torch.ones(size, dtype=dtype, requires_grad=True) for k, size in sizes.items()}
        self._by_initializer: dict[str, list[tuple[str, int, torch.Tensor]]] = {}
        for key, axes in members.items():
            for initializer, axis, units in axes:
                index = torch.from_numpy(np.array(units, dtype=np.int64))
                index = torch.where(index < 0, sizes[key], index)
                self._by_initializer.setdefault(initializer, []).append((key, axis, index))

    def __contains__(self, initializer: str) -> bool:
        return initializer in self._by_initializer

    def axes(self, initializer: str) -> set[int]:
        """Axes of an initializer that gates multiply."""
        return {axis for _, axis, _ in self._by_initializer.get(initializer, ())}

    def applied(self, initializer: str, tensor: torch.Tensor, at: int | None = None) -> torch.Tensor:
        """The tensor of an initializer times its gates; or what that is contracted with, along axis `at`."""
        for key, axis, index in self._by_initializer.get(initializer, ()):
            vector = self.vectors[key]
            along = torch.cat([vector, vector.new_ones(1)])[index].to(tensor.dtype)
            axis = (axis if at is None else at) % max(tensor.ndim, 1)
            tensor = tensor * along.reshape([-1 if a == axis else 1 for a in range(tensor.ndim)])
        return tensor


class Runner(fx.Interpreter):
    """Executes the twin of a program.

    Args:
        program: canonical.
        dtype: replaces every float type; None keeps the stored ones.
        taps: names of further values to return after the graph outputs.
        gates: multipliers to differentiate by.

    Raises:
        UnsupportedOperatorError: as `to_fx`.
    """

    def __init__(
        self,
        program: Program,
        dtype: torch.dtype | None,
        *,
        taps: Sequence[str] = (),
        gates: Gates | None = None,
    ):
        gm = Builder(program, dtype, streamed=True).build(tuple(taps))
        super().__init__(gm)
        self.extra_traceback = False
        self.program = program
        self.info: TwinInfo = gm.meta[INFO]
        self.current: fx.Node | None = None
        self._gates = gates
        self._weights: dict[fx.Node, str] = {}
        self._last_uses = self.user_to_last_uses
        for tensor in gm.state_dict(keep_vars=True).values():
            tensor.requires_grad_(False)
        for node in gm.graph.nodes:
            name = self.info.names.get(str(node.target)) if node.op == "get_attr" else None
            if name and (self.fetch_attr(str(node.target)).is_meta or (gates is not None and name in gates)):
                self._weights[node] = name
        self._gated_inputs = {n: found for n in gm.graph.nodes if (found := self._gated_input(n)) is not None}

    def __call__(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs and taps by name.

        Args:
            tensors: one per graph input, in the order of `info.inputs`.

        Raises:
            ModelError: a node fails; names it.
        """
        try:
            cut = self._gates is not None and sum(map(self._bytes, self._weights)) > WHOLE_BYTES
            results = self._run_segments(self._segments(), tensors) if cut else self.run(*tensors)
        except SartorError:
            raise
        except Exception as error:
            raise self.located(error) from error
        finally:
            self.env = {}
        return dict(zip(self.info.outputs, results, strict=True))

    def run_node(self, n: fx.Node) -> Any:
        """One node; a weight that is read by others when they run is nothing by itself."""
        self.current = n
        return None if n in self._weights else super().run_node(n)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """Operands of `n`, with its weights read from the program."""

        def value(operand: fx.Node) -> Any:
            return self._weight(operand, n) if operand in self._weights else self.env[operand]

        return fx.node.map_arg(args, value)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Operands of `n`; those that stand for its weight carry the weight's gates."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n in self._gated_inputs and self._gates is not None:
            name, axis = self._gated_inputs[n]
            args = (self._gates.applied(name, args[0], axis), *args[1:])
        return args, kwargs

    def _weight(self, node: fx.Node, reader: fx.Node) -> torch.Tensor:
        name = self._weights[node]
        tensor: torch.Tensor = self.fetch_attr(str(node.target))
        if tensor.is_meta:
            tensor = to_tensor(self.program.initializer_array(name), self.info.dtype)
        if self._gates is None or reader in self._gated_inputs:
            return tensor
        return self._gates.applied(name, tensor)

    def _gated_input(self, node: fx.Node) -> tuple[str, int] | None:
        """The weight whose gates the first operand can carry instead, and along which axis.

        A gate on what a contraction sums over is the same on either side of it, and then no gradient of the weight
        is needed: half of the backward pass.
        """
        axes = _SUMMED.get(node.target) if node.op == "call_function" else None
        weight = node.args[1] if axes is not None and len(node.args) > 1 else None
        name = self._weights.get(weight, "") if isinstance(weight, fx.Node) else ""
        if axes is None or self._gates is None or name not in self._gates:
            return None
        rank = len(self.program.initializer_shape(name))
        of_weight, of_input = axes(rank, node.kwargs)
        same = isinstance(node.args[0], fx.Node) and self._weights.get(node.args[0]) == name
        return (name, of_input) if self._gates.axes(name) == {of_weight} and not same else None

    # ---- segments --------------------------------------------------------------------------
    def _segments(self) -> list[list[fx.Node]]:
        """The nodes after the placeholders, cut so that no segment reads more than `SEGMENT_BYTES`."""
        segments: list[list[fx.Node]] = [[]]
        size = 0
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            if node.op == "placeholder" or node in self._weights:
                continue
            read = sum(self._bytes(operand) for operand in node.all_input_nodes)
            if size + read > SEGMENT_BYTES and segments[-1]:
                segments.append([])
                size = 0
            segments[-1].append(node)
            size += read
        return segments

    def _bytes(self, node: fx.Node) -> int:
        if node not in self._weights:
            return 0
        tensor: torch.Tensor = self.fetch_attr(str(node.target))
        return tensor.numel() * tensor.element_size() if tensor.is_meta else 0

    def _run_segments(self, segments: list[list[fx.Node]], tensors: Sequence[torch.Tensor]) -> Any:
        owner = {node: i for i, nodes in enumerate(segments) for node in nodes}
        last = {node: max((owner[u] for u in node.users), default=-1) for node in self.module.graph.nodes}  # type: ignore[union-attr]
        placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
        live: dict[fx.Node, Any] = dict(zip(placeholders, tensors, strict=True))
        result: Any = None
        for i, nodes in enumerate(segments):
            inputs = [n for n in live if any(owner[u] == i for u in n.users)]
            outputs = [n for n in nodes if last[n] > i or n.op == "output"]

            def frame(
                *values: Any,
                nodes: list[fx.Node] = nodes,
                inputs: list[fx.Node] = inputs,
                outputs: list[fx.Node] = outputs,
            ) -> tuple[Any, ...]:
                _return_free_memory()
                self.env = dict(zip(inputs, values, strict=True))
                for node in nodes:
                    self.env[node] = self.run_node(node)
                    for done in self._last_uses.get(node, ()):
                        self.env.pop(done, None)
                return tuple(self.env[n] for n in outputs)

            arguments = [live[n] for n in inputs]
            found = checkpoint(frame, *arguments, use_reentrant=False, preserve_rng_state=False)
            self.env = {}
            live.update(zip(outputs, found, strict=True))
            result = next((live[n] for n in outputs if n.op == "output"), result)
            live = {n: v for n, v in live.items() if last[n] > i}
        return result

    def located(self, error: Exception) -> ModelError:
        """What failed at the node that runs, as an error that names it."""
        name = self.current.meta.get("onnx_node", "") if self.current is not None else ""
        node = next((n for n in self.program.nodes() if n.name == name), None)
        where = self.program.where(node) if node is not None else f"'{name}'"
        return ModelError(
            f"Node {where} failed in the FX twin: {error}. Check the shapes of the given inputs."
        )


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
    """glibc's `malloc_trim`, or nothing where the C library is another one."""
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return int
    return function


def _return_free_memory() -> None:
    """Give freed weights back to the system.

    glibc keeps what small long-lived tensors have scattered over; over hundreds of segments that is as much as
    the model itself.
    """
    _malloc_trim()(0)
