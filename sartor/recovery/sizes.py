"""Samples at the original's size for a program at another one, and its outputs as the original gives them.

Inputs are resized by antialiased linear interpolation (`sartor.images`). Output maps of another size are brought back
to the original's by the same interpolation, so that the original's outputs and labels compare with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from sartor.errors import UsageError
from sartor.images import resized
from sartor.ir.program import Program

_IMAGE_AXES = 4  # of fewer it is not told whether they are positions: tokens of a grid lie in rows, too

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What changes between the original's size and a program's; nothing where both dicts are empty.

    Attributes:
        inputs: shapes by input that changes, of the original and of the program.
        outputs: the original's shape by output map that changes.
    """

    inputs: Mapping[str, tuple[Shape, Shape]] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, Shape] = dataclasses.field(default_factory=dict)

    @staticmethod
    def between(program: Program, original: Program) -> Sizes:
        """How samples for `original` are made samples for `program`.

        Raises:
            UsageError: an input has another rank or batch, holds numbers that cannot be interpolated, or an output
                has another shape and is no map.
        """
        inputs = {
            name: (theirs, program.input_shapes[name])
            for name, theirs in original.input_shapes.items()
            if theirs != program.input_shapes[name]
        }
        carriers = original.batch.inputs
        inputs = {
            name: (theirs, ours)
            for name, (theirs, ours) in inputs.items()
            if len(theirs) != len(ours) or theirs[1:] != ours[1:] or name not in carriers
        }
        if not inputs:
            return Sizes()
        types = original.types()
        for name, (theirs, ours) in inputs.items():
            images = len(theirs) == len(ours) and name in carriers and len(theirs) > 2
            if not images or (types[name].is_integer() and len(theirs) < _IMAGE_AXES):
                raise UsageError(
                    f"Input '{name}' has shape {list(ours)} in the program and {list(theirs)} in the original; only "
                    "images of the same rank can be resized. Give both programs the same shape."
                )
        outputs = {}
        after, before = program.shapes(), original.shapes()
        for value in original.graph.outputs:
            name = value.name or ""
            if before[name][1:] == after[name][1:] or not types[name].is_floating_point():
                continue
            if len(before[name]) < _IMAGE_AXES or len(before[name]) != len(after[name]):
                raise UsageError(
                    f"Output '{name}' has shape {list(after[name])} in the program and {list(before[name])} in the "
                    "original; only maps [N, C, H, W] can be brought to the original's size. Keep the input size of "
                    "this network."
                )
            outputs[name] = before[name]
        return Sizes(inputs, outputs)

    def given(self, names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Samples at the program's size of samples at the original's, in the order of `names`.

        Raises:
            UsageError: a sample does not have the original's shape.
        """
        return [self._given(name, tensor) for name, tensor in zip(names, tensors, strict=True)]

    def taken(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of the program by name, maps at the original's size."""
        return {
            name: resized(output, self.outputs[name]) if name in self.outputs else output
            for name, output in outputs.items()
        }

    def _given(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.inputs:
            return tensor
        theirs, ours = self.inputs[name]
        if tuple(tensor.shape[1:]) != theirs[1:]:
            raise UsageError(
                f"Input '{name}' of the data has shape {list(tensor.shape)}, but the original takes "
                f"{['N', *theirs[1:]]}; give data at the original's size, they are resized for the program."
            )
        found: Tensor = resized(tensor, ours)
        return found
