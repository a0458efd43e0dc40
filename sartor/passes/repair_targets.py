"""What layers made before a network was cut, at some places of some samples: what repair aims at."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sartor.ir.program import Program

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What a layer makes of one batch.

    Attributes:
        places: where in the map, the same in all samples: rows and columns of a convolution, else positions.
        made: there, `[samples * places, outputs]`, float32.
    """

    places: tuple[np.ndarray, ...]
    made: np.ndarray


class Targets:
    """Targets of layers, in one run of a program that goes no further than it is asked.

    Which places of a layer depends on its name, the batch and the seed alone, so that those of one repair serve
    another.

    Args:
        program: before it was cut.
        batches: arrays by input name.
        layers: names of nodes, in execution order.
        convolutions: which of these have their channels on the second axis.
        positions: most places of a sample.
        seed: of the choice of places.
        keep: what was asked for, and everything before it, for another time; else a layer is asked for once.
    """

    def __init__(
        self,
        program: Program,
        batches: Iterable[Mapping[str, np.ndarray]],
        layers: Sequence[str],
        convolutions: Iterable[str],
        positions: int,
        seed: int,
        *,
        keep: bool = False,
    ):
        from sartor.ir.fx_lockstep import Lockstep

        self._run = Lockstep(program, batches, layers)
        self._left = list(reversed(layers))
        self._convolutions = frozenset(convolutions)
        self._positions, self._seed, self._keep = positions, seed, keep
        self._known: dict[str, list[Target]] = {}

    def of(self, name: str) -> list[Target]:
        """Of a layer, batch by batch."""
        while name not in self._known:
            layer = self._left.pop()
            made = self._run.result(layer)
            self._known[layer] = [self._target(layer, index, y) for index, y in enumerate(made)]
        return self._known[name] if self._keep else self._known.pop(name)

    def _target(self, name: str, index: int, y: Tensor) -> Target:
        generator = np.random.default_rng([self._seed, zlib.crc32(name.encode()), index])
        if name not in self._convolutions:
            y = y.reshape(len(y), -1, y.shape[-1])
            places: tuple[np.ndarray, ...] = (self._chosen(y.shape[1], generator),)
            made = y[:, places[0]]
        else:
            y = y.unsqueeze(2) if y.dim() == 3 else y
            row, column = np.divmod(self._chosen(y.shape[2] * y.shape[3], generator), y.shape[3])
            places = (row, column)
            made = y[:, :, row, column].movedim(1, 2)
        return Target(places, np.ascontiguousarray(made.reshape(-1, made.shape[-1]).numpy()))

    def _chosen(self, count: int, generator: np.random.Generator) -> np.ndarray:
        if count <= self._positions:
            return np.arange(count)
        return np.sort(generator.choice(count, self._positions, replace=False))
