"""A twin that takes samples as the original does, and gives what is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sartor.errors import UsageError
from sartor.ir.fx import to_fx, twin_info
from sartor.ir.program import Program
from sartor.recovery.features import attention_map
from sartor.recovery.sizes import Sizes


class View:
    """A twin, for samples at the original's size.

    Args:
        program: of the twin.
        original: whose samples they are.
        points: channel axis by value whose attention map is given, too.

    Attributes:
        gm: in float32.
        names: of its inputs, in order.
        sizes: how samples and outputs are resized.
        points: as given.

    Raises:
        UsageError: samples for the original cannot be resized for the program.
    """

    def __init__(self, program: Program, original: Program, points: Mapping[str, int] | None = None):
        self.sizes = Sizes.between(program, original)
        self.points = dict(points or {})
        self.gm = to_fx(program, dtype=torch.float32, taps=tuple(self.points))
        info = twin_info(self.gm)
        self.names, self._results = info.inputs, info.outputs

    def given(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Inputs for `gm` of inputs for the original."""
        return self.sizes.given(self.names, inputs)

    def __call__(self, inputs: Sequence[Tensor], *, mixed: bool = False) -> dict[str, Tensor]:
        """Outputs by name, maps at the original's size; then the attention map of each point.

        Args:
            inputs: as the original takes them.
            mixed: compute in bfloat16 what torch deems safe in it; weights, sizes and results stay float32.
        """
        given = self.given(inputs)
        device = given[0].device.type if given else "cpu"
        with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
            results = dict(zip(self._results, self.gm(*given), strict=True))
        if mixed:
            results = {name: _as_float32(value) for name, value in results.items()}
        results = self.sizes.taken(results)
        for name, axis in self.points.items():
            results[name] = attention_map(results[name], axis)
        return results


def _as_float32(value: Tensor) -> Tensor:
    return value.float() if value.dtype is torch.bfloat16 else value


def share_weights(source: fx.GraphModule, twin: fx.GraphModule) -> None:
    """Make `twin` compute with the very parameters and running statistics of `source`.

    Args:
        source: whose tensors they are.
        twin: of the same program, or of it at another input size. Constants of its own size, unequal, stay its own.

    Raises:
        UsageError: a parameter has another shape.
    """
    keys = {name: key for key, name in twin_info(source).names.items()}
    for key, name in twin_info(twin).names.items():
        path, _, leaf = key.rpartition(".")
        owner = twin.get_submodule(path)
        store: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers  # type: ignore[assignment]
        here = keys.get(name)
        theirs = None if here is None else _tensor(source, here)
        own: Tensor = store[leaf]
        learned = leaf in owner._parameters
        if theirs is not None and theirs.shape == own.shape and (learned or torch.equal(theirs, own)):
            store[leaf] = theirs
        elif learned:
            raise UsageError(
                f"Parameter '{name}' has shape {list(own.shape)} at one input size and "
                f"{'none' if theirs is None else list(theirs.shape)} at another; they cannot be trained as one."
            )


def _tensor(gm: fx.GraphModule, key: str) -> Tensor:
    path, _, leaf = key.rpartition(".")
    found: Tensor = getattr(gm.get_submodule(path), leaf)
    return found
