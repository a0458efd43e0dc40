"""How fast this machine trains a twin right now: the number of threads, and how much work fits into a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from sartor.recovery.losses import output_energy

PROBE_SAMPLES = 16
_MOST_REPEATS = 3


def warm_up() -> None:
    """Have torch import what its first optimizer needs: seconds, which are not a recovery's."""
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])


def choose_threads(gm: fx.GraphModule, inputs: Sequence[Tensor], most: int, limit_s: float) -> float:
    """Set torch to one thread or to `most`, whichever trains faster; beside other work, threads wait for each other.

    Args:
        gm: the twin that is trained; it is left in eval mode and without gradients.
        inputs: a few samples.
        most: threads that may be used.
        limit_s: after it no further repetition is begun, for each number of threads.

    Returns:
        Seconds of a forward and a backward pass over `inputs`.
    """

    def step() -> None:
        loss = output_energy({str(i): output for i, output in enumerate(gm(*inputs))})
        if loss.requires_grad:
            loss.backward()

    gm.eval()
    seconds = {}
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        seconds[threads] = _fastest(step, limit_s)
    gm.zero_grad(set_to_none=True)
    chosen = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(chosen)
    return seconds[chosen]


def forward_seconds(gm: fx.GraphModule, inputs: Sequence[Tensor], limit_s: float) -> float:
    """Seconds of a forward pass; no further repetition is begun after `limit_s`."""
    with torch.no_grad():
        return _fastest(lambda: gm(*inputs), limit_s)


def _fastest(work: Callable[[], object], limit_s: float) -> float:
    started, fastest = time.perf_counter(), math.inf
    for _ in range(_MOST_REPEATS):
        begin = time.perf_counter()
        work()
        now = time.perf_counter()
        fastest = min(fastest, now - begin)
        if now - started > limit_s:
            break
    return fastest
