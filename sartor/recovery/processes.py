"""Several processes that train one program: each has its share of every batch, and all of them the same weights.

    torchrun --nproc-per-node 2 -m sartor recover ...

starts them; the same code runs in one process without. Gradients are summed over processes, each weighed by its share
of the samples, so that a batch in parts gives the gradient of the whole. Normalisation by batch statistics sees the
share only; running statistics are averaged whenever the program is judged. The first process judges, reports and
writes, and its clock is everybody's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sartor.errors import UsageError

_T = TypeVar("_T")
_PATIENCE = datetime.timedelta(days=1)
"""How long processes wait for the first one, which may judge on a large split."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of this recovery.

    Attributes:
        rank: of this one.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @staticmethod
    def current() -> Processes:
        """Those that `together` joined, or this one alone."""
        if not dist.is_available() or not dist.is_initialized():
            return Processes()
        return Processes(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process judges, reports and writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    def share(self, samples: int) -> slice:
        """Which of the samples of a batch are this process's.

        Raises:
            UsageError: there are fewer samples than processes.
        """
        if samples < self.count:
            raise UsageError(
                f"A batch of {samples} samples cannot be shared among {self.count} processes; give larger batches, or "
                "start fewer processes."
            )
        return slice(self.rank, None, self.count)

    def wait(self) -> None:
        """Until all processes are here."""
        if not self.alone:
            dist.barrier()

    def decided(self, value: _T) -> _T:
        """What the first process says."""
        if self.alone:
            return value
        said: list[Any] = [value if self.first else None]
        dist.broadcast_object_list(said, src=0)
        result: _T = said[0]
        return result

    def gathered(self, value: _T) -> list[_T]:
        """What each process says, in order."""
        if self.alone:
            return [value]
        said: list[Any] = [None] * self.count
        dist.all_gather_object(said, value)
        return said

    def numbers(self, values: Sequence[float]) -> list[float]:
        """Numbers of the first process; cheaper than `decided`, for every step."""
        if self.alone:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(tensor, src=0)
        return [float(value) for value in tensor]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        if not self.alone:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over processes in place; where one has none, it counts as zeros."""
        if self.alone:
            return
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        summed = self.total(torch.cat([part.reshape(-1) for part in parts]))
        for parameter, part in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over processes, in place."""
        if self.alone:
            return
        for tensor in tensors:
            tensor.copy_(self.total(tensor) / self.count)


@contextlib.contextmanager
def together() -> Iterator[Processes]:
    """Join the processes that torchrun started, on processors (gloo); this process alone where it started none."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield Processes.current()
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes.current()
    finally:
        dist.destroy_process_group()
