"""Feature maps of units and blocks: where they are, and what they are on data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sartor.errors import UsageError
from sartor.ir.channels import ChannelAnalysis
from sartor.ir.program import Program
from sartor.strategies.importance import AnalysisLike, Batches, BlockLike, GroupLike


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureMap:
    """A value of the graph whose channels are units.

    Attributes:
        value: its name.
        axes: axes along which channels lie.
        units: unit per channel, row-major over `axes`; −1 for none. Empty for a block: every channel counts.
    """

    value: str
    axes: tuple[int, ...]
    units: np.ndarray

    def rows(self, array: np.ndarray) -> np.ndarray:
        """The value as `[samples, channels, rest...]`."""
        rest = [axis for axis in range(1, array.ndim) if axis not in self.axes]
        moved = array.transpose(0, *self.axes, *rest)
        return moved.reshape(array.shape[0], -1, *(array.shape[axis] for axis in rest))

    def positions(self, shapes: Mapping[str, tuple[int, ...]], size: int) -> float:
        """Numbers per unit and sample, of `size` units."""
        channels = math.prod(shapes[self.value][1:]) / math.prod(
            shapes[self.value][axis] for axis in self.axes
        )
        often = len(self.units[self.units >= 0]) / size if self.units.size else 1.0
        return channels * often


def map_of_group(
    program: Program, analysis: AnalysisLike, group: GroupLike, *, spatial: bool = False
) -> FeatureMap:
    """The features of a group as the first layer reads them that sums over them.

    Args:
        program: the program.
        analysis: its channel groups.
        group: one of them.
        spatial: the last value with height and width instead, where that layer reads none.

    Raises:
        UsageError: the analysis knows no such place.
    """
    if isinstance(analysis, ChannelAnalysis):
        propagation = analysis.propagation
        nodes = [propagation.nodes[sink.node] for sink in propagation.sinks]
        read = [value for node in nodes for value in node.inputs]
        made = [value for node in reversed(list(program.nodes())) for value in node.outputs]
        found = _map_among(analysis, group, read)
        if found is not None and spatial and len(program.shapes()[found.value]) != 4:
            maps = [value for value in made if len(program.shapes().get(value.name or "", ())) == 4]
            found = _map_among(analysis, group, maps) or found
        if found is not None:
            return found
    raise UsageError(
        f"No layer reads the features of group '{group.name}' as they are. Use criterion l1, l2 or taylor, or --keep "
        "this group."
    )


def _map_among(
    analysis: ChannelAnalysis, group: GroupLike, values: Sequence[ir.Value | None]
) -> FeatureMap | None:
    """The first of some values that has all units of a group along its channels."""
    unit_of = analysis.units_of_atoms(analysis.group(group.name))
    for value in values:
        if value is None or analysis.propagation.is_constant(value):
            continue
        for factor in analysis.propagation.labels(value):
            units = unit_of[factor.atoms].ravel()
            if 0 not in factor.axes and len(np.unique(units[units >= 0])) == group.size:
                return FeatureMap(value.name or "", factor.axes, units)
    return None


def map_of_block(program: Program, block: BlockLike) -> FeatureMap:
    """What the branch of a block adds; of a layer, its result.

    Raises:
        UsageError: its axes have no channels.
    """
    value = getattr(block, "branch", "") or getattr(block, "output", "")
    rank = len(program.shapes().get(value, ()))
    if rank < 2:
        raise UsageError(f"Block '{block.name}' has no feature map. Use criterion l1, l2 or taylor.")
    return FeatureMap(value, (rank - 1 if rank == 3 else 1,), np.zeros(0, dtype=np.int64))


def feature_maps(
    program: Program, values: Sequence[str], data: Batches
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Samples and arrays of `values` per batch of data, by the FX twin in float32."""
    import torch

    from sartor.ir.fx import to_tensor
    from sartor.ir.fx_run import Runner
    from sartor.ir.fx_tensors import to_array

    runner = Runner(program, torch.float32, taps=tuple(values))
    for inputs, _ in data:
        arrays = [to_tensor(inputs[name], runner.info.dtype) for name in runner.info.inputs]
        samples = next((len(a) for a in arrays if a.dim()), 1)
        with torch.no_grad():
            found = runner(arrays)
        yield samples, {name: to_array(found[name]) for name in values}
