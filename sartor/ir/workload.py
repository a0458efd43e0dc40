"""`Workload`: a program as fused kernels whose costs are functions of a plan.

Building one reads the graph and the shapes; evaluating one is arithmetic on arrays, so that a whole
population of plans is priced in a single call, without touching weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from sartor.errors import PlanError
from sartor.ir.bodies import read_values
from sartor.ir.extents import BATCH, SIZE, Extent
from sartor.ir.fusion_rules import GENERIC, FusionRules
from sartor.ir.kernels import Kernel, build_kernels
from sartor.ir.layout import Layout, build_layout
from sartor.ir.liveness import Liveness, build_liveness
from sartor.ir.operands import Operand, Tensors
from sartor.ir.population import Fractions, Population, Presence, Removed
from sartor.ir.program import Program
from sartor.ir.quantities import Quantity
from sartor.ir.sizes import Sweep, sized_extents, sweep

_SETTINGS = {"Clip": (1, 2), "Resize": (1, 2), "Pad": (2,)}
"""Float inputs that are no parameters: bounds, scales, fill values."""
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow"})


class RemovableBlock(Protocol):
    """What pricing needs to know of a residual block."""

    @property
    def name(self) -> str:
        """Name in plans."""
        ...

    @property
    def nodes(self) -> Sequence[str]:
        """Names of the nodes that go when the block is removed."""
        ...


@dataclasses.dataclass(frozen=True)
class Priced:
    """Costs of a population of plans, each an array `[plans]` (0-d for a single plan).

    Attributes:
        macs: multiply-accumulates (1 MAC = 2 FLOP).
        parameters: float weights, without running statistics and settings.
        weight_bytes: bytes of all initializers that stay.
        bytes_read: activations and weights read by all kernels.
        bytes_written: activations written by all kernels.
    """

    macs: np.ndarray
    parameters: np.ndarray
    weight_bytes: np.ndarray
    bytes_read: np.ndarray
    bytes_written: np.ndarray


@dataclasses.dataclass(frozen=True)
class Stored:
    """One initializer: it stays as long as any of the nodes that read it stays.

    Attributes:
        readers: for every reading node, the blocks that contain it. Empty: nothing reads it, it stays.
        parameter: a weight in the sense of `parameters`.
    """

    operand: Operand
    readers: tuple[tuple[str, ...], ...]
    parameter: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """Fused kernels, initializers and lifetimes of one program. Compared by identity.

    Attributes:
        kernels: in execution order.
        stored: initializers of the main graph.
        blocks: names of the removable blocks, in the order given.
        liveness: lifetimes of activations.
        layout: kernels that only some plans have, where the rules tell of a layout of the runtime's own: copies, and
            what then runs inside no other kernel. Not part of `kernels` and of what `evaluate` sums.
        sweep: declared input sizes, and whether the batch is free; None: both are those of the program.
    """

    kernels: tuple[Kernel, ...]
    stored: tuple[Stored, ...]
    blocks: tuple[str, ...]
    liveness: Liveness
    sweep: Sweep | None = None
    layout: Layout = dataclasses.field(default_factory=Layout)
    _compiled: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    _at: dict[tuple[int, int], Workload] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def groups(self) -> frozenset[str]:
        """Names of all groups that change anything."""
        operands = [o for k in self.kernels for o in (*k.inputs, *k.outputs) if o is not None]
        operands += [s.operand for s in self.stored]
        return frozenset(g for o in operands for e in o.dims for g in e.groups)

    def evaluate(
        self,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
        *,
        size: Any = None,
        batch: Any = None,
    ) -> Priced:
        """Price a population of plans.

        Args:
            fractions: kept fraction per group; scalars or arrays of one common length `[plans]`.
            removed: removed blocks; scalars or bool arrays of the same length.
            size: which of the declared input sizes, an index or an array of them; default the first.
            batch: samples, a number or an array; default that of the declared size.

        Raises:
            PlanError: a removed block is not in this workload; a size or batch that it does not have.
        """
        removed = removed or {}
        self.check_removed(removed)
        plans = Population(self.lengths(fractions or {}, size, batch), removed)
        return Priced(**{name: plans.total(parts) for name, parts in self._parts().items()})

    def peak_activation_bytes(
        self,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
        above: float | None = None,
        *,
        size: Any = None,
        batch: Any = None,
    ) -> np.ndarray:
        """Peak activation bytes of a population of plans; definition and `above` in `sartor.ir.liveness`."""
        self.check_removed(removed or {})
        return self.liveness.evaluate(self.lengths(fractions or {}, size, batch), removed or {}, above)

    def at(self, size: int | None = None, batch: int | None = None) -> Workload:
        """The workload of the program at one declared size and one batch.

        The same object each time, because cost models keep what they know of a workload by that very object.

        Raises:
            PlanError: as `evaluate`.
        """
        given = self.lengths({}, size, batch)
        if SIZE not in given:
            return self
        key = one, samples = int(given[SIZE]), int(given[BATCH])
        if key not in self._at:
            self._at[key] = Workload(
                tuple(kernel.at(one, samples) for kernel in self.kernels),
                tuple(dataclasses.replace(s, operand=s.operand.at(one, samples)) for s in self.stored),
                self.blocks,
                self.liveness.at(one, samples),
                layout=self.layout.at(one, samples),
            )
        return self._at[key]

    def lengths(self, fractions: Fractions, size: Any = None, batch: Any = None) -> Fractions:
        """What extents are evaluated with: fractions and, where sizes are declared, size and batch.

        Raises:
            PlanError: a size or batch that this workload does not have.
        """
        if self.sweep is None:
            if size is not None or batch is not None:
                raise PlanError(
                    "This workload was built for one input size; declare sizes with build_workload(..., sizes=[...])."
                )
            return fractions
        index = np.asarray(0 if size is None else size)
        count = len(self.sweep.shapes)
        if index.dtype.kind not in "iu" or (index.size and not 0 <= index.min() <= index.max() < count):
            raise PlanError(f"Input size {size} is not declared; there are {count}, numbered from 0.")
        usual = np.asarray(self.sweep.batches)[index]
        samples = usual if batch is None else np.asarray(batch)
        if samples.dtype.kind not in "iu" or (samples.size and samples.min() < 1):
            raise PlanError(f"The batch is {batch}; it must be a whole number, at least 1.")
        if self.sweep.fixed_batch and batch is not None and (samples != usual).any():
            raise PlanError(f"The batch of this program is fixed: {self.sweep.fixed_batch}.")
        return {**fractions, SIZE: index, BATCH: samples}

    def existing(self, plans: Population) -> list[Kernel]:
        """Every kernel that a runtime executes under one plan, those of the layout last."""
        more, gone = [], set()
        for kernel, count in self.layout.kernels(plans):
            if count > 0:
                more.append(kernel)
            elif count < 0:
                gone.add(kernel.name)
        return [k for k in self.kernels if k.name not in gone and plans.present(presence(k))] + more

    def macs_of_nodes(self, nodes: Iterable[str]) -> float:
        """MACs, before any pruning, of the kernels whose leading node is in `nodes`."""
        wanted = set(nodes)
        return sum(k.macs.full for k in self.kernels if k.name in wanted and not k.instead_of)

    def check_removed(self, removed: Removed) -> None:
        """Refuse names of blocks that this workload does not know: they would be priced as no change."""
        unknown = sorted(set(removed) - set(self.blocks))
        if unknown:
            raise PlanError(
                f"The plan removes blocks {unknown}, which this program does not have; "
                f"removable blocks are {list(self.blocks)}."
            )

    def _parts(self) -> dict[str, list[tuple[Presence | tuple[Presence, ...], Quantity]]]:
        if not self._compiled:
            parts: dict[str, list[tuple[Presence | tuple[Presence, ...], Quantity]]] = {
                "macs": [(presence(k), k.macs) for k in self.kernels],
                "bytes_read": [(presence(k), k.bytes_read) for k in self.kernels],
                "bytes_written": [(presence(k), k.bytes_written) for k in self.kernels],
                "weight_bytes": [(_any_reader(s), s.operand.bytes) for s in self.stored],
                "parameters": [
                    (_any_reader(s), Quantity.product(1, s.operand.dims)) for s in self.stored if s.parameter
                ],
            }
            self._compiled.update({name: _merge(part) for name, part in parts.items()})
        return self._compiled


def presence(kernel: Kernel) -> Presence:
    """When `kernel` exists."""
    return Presence(kernel.blocks, kernel.instead_of)


def _any_reader(stored: Stored) -> tuple[Presence, ...]:
    if not stored.readers or () in stored.readers:
        return (Presence(),)
    return tuple(sorted({Presence(blocks) for blocks in stored.readers}, key=lambda p: p.blocks))


def _merge(
    parts: Sequence[tuple[Presence | tuple[Presence, ...], Quantity]],
) -> list[tuple[Presence | tuple[Presence, ...], Quantity]]:
    """Add up equal products under equal presence: a network has far fewer of them than kernels."""
    sums: dict[Any, dict[tuple[Extent, ...], float]] = {}
    for when, quantity in parts:
        mine = sums.setdefault(when, {})
        for coefficient, factors in quantity.terms:
            key = tuple(sorted(factors, key=lambda e: e.terms))
            mine[key] = mine.get(key, 0.0) + coefficient
    return [
        (when, Quantity(tuple((c, factors) for factors, c in mine.items() if c)))
        for when, mine in sums.items()
    ]


def build_workload(
    program: Program,
    extents: Mapping[str, tuple[Extent, ...]] | None = None,
    blocks: Sequence[RemovableBlock] = (),
    rules: FusionRules = GENERIC,
    sizes: Sequence[Mapping[str, tuple[int, ...]]] | None = None,
) -> Workload:
    """Describe the cost of `program` as a function of channel groups and removed blocks.

    Args:
        program: canonical; analysed at its reference shapes.
        extents: dimensions per value name (activations and initializers) from the channel analysis.
            None: every dimension is constant.
        blocks: removable residual blocks; removing one removes the kernels of its nodes.
        rules: what the runtime executes as one kernel: `FusionRules.of(backend.capabilities().fuses)`.
        sizes: input shapes that plans may choose from, besides any batch where the program's is free. None: those
            of the program alone.

    Raises:
        InternalError: `extents` do not belong to this program.
        ModelError: a shape depends on data; the program is not valid at one of `sizes`.
        PlanError: one of `sizes` does not fit the program's inputs.
    """
    declared = None if sizes is None else sweep(program, sizes)
    if declared is not None:
        extents = sized_extents(program, extents, declared)
    contains: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        for node in block.nodes:
            contains[node] = (*contains.get(node, ()), block.name)
    return Workload(
        kernels=build_kernels(program, extents, contains, rules),
        stored=_stored(program, extents, contains),
        blocks=tuple(block.name for block in blocks),
        liveness=build_liveness(program, extents, blocks),
        sweep=declared,
        layout=build_layout(program, extents, contains, rules),
    )


def _stored(
    program: Program,
    extents: Mapping[str, tuple[Extent, ...]] | None,
    contains: Mapping[str, tuple[str, ...]],
) -> tuple[Stored, ...]:
    tensors = Tensors(program, extents)
    readers: dict[str, list[tuple[str, ...]]] = {name: [] for name in program.initializers}
    for node in program.nodes():
        for value in read_values(node):
            if value.name in readers:
                readers[value.name].append(contains.get(node.name or "", ()))
    for output in program.graph.outputs:
        if output.name in readers:
            readers[output.name].append(())
    stored = [
        Stored(tensors[value], tuple(readers[name]), is_parameter(value))
        for name, value in program.initializers.items()
    ]
    for name, tensor in program.tail.weights.items() if program.tail is not None else ():
        dims = tuple(Extent.constant(d) for d in tensor.shape.numpy())
        operand = Operand(name, dims, tensor.dtype.itemsize, tensor.dtype.name, stored=True)
        stored.append(Stored(operand, (), tensor.dtype.is_floating_point() and bool(dims)))
    return tuple(stored)


def is_parameter(value: ir.Value) -> bool:
    """Whether an initializer counts as a parameter.

    Floating point, and neither a BatchNormalization's running statistics, nor an operator's setting
    (Clip bounds, Resize scales, Pad fill), nor a single number: rank-0 constants, and one-element ones
    that arithmetic reads, such as the attention scales that exporters write as tensors of shape `[1]`.
    """
    tensor = value.const_value
    if tensor is None or not tensor.dtype.is_floating_point() or len(tensor.shape) == 0:
        return False
    uses = list(value.uses())
    if any(u.node.op_type == "BatchNormalization" and u.idx in (3, 4) for u in uses):
        return False
    if tensor.size == 1 and uses and all(u.node.op_type in _ARITHMETIC for u in uses):
        return False
    settings = [u for u in uses if u.idx in _SETTINGS.get(u.node.op_type, ())]
    return not uses or len(settings) < len(uses)
