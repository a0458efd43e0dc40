"""Which widths cost nothing: for every channel group, where its latency steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from sartor.cost_models.ladder import Ladder
from sartor.cost_models.profile import Sample
from sartor.ir.population import Fractions, Population, Removed
from sartor.ir.workload import Workload

Price = Callable[[Fractions, Removed], np.ndarray]
"""Latency of a population, as `CostModel.estimate_batch` gives it for one workload."""
_EQUAL = 0.01
"""Of the time of the kernels that a group is part of: less is within the noise of any profile."""


@dataclasses.dataclass(frozen=True)
class Step:
    """Where one group stands on its staircase.

    Attributes:
        group: its name.
        kept: units that the plan keeps.
        size: units before pruning.
        widest: the most units that cost no more than `kept`.
        narrower: the most units that cost less; None where nothing narrower does.
        saved_s: what `narrower` saves.
        dearer: the most units that cost more although they are fewer; None where there are none.
        rounded: the width that `size` channels are rounded up to, where the kernels cost no more at that one: the
            model could be that wide. None where it costs more, or where `size` is on the grid.
    """

    group: str
    kept: int
    size: int
    widest: int
    narrower: int | None
    saved_s: float
    dearer: int | None = None
    rounded: int | None = None

    @property
    def is_free(self) -> bool:
        """Whether some units more would cost nothing."""
        return self.widest > self.kept


def steps(
    workload: Workload,
    price: Price,
    sizes: Mapping[str, int],
    fractions: Mapping[str, float] | None = None,
    removed: Mapping[str, bool] | None = None,
) -> tuple[Step, ...]:
    """The step of every group that changes the latency, what it saves first.

    Args:
        workload: of the program.
        price: latency of a population of its plans.
        sizes: units before pruning by group.
        fractions: of the plan to stand on.
        removed: of that plan.
    """
    fractions, gone = dict(fractions or {}), dict(removed or {})
    found = []
    for name in sorted(workload.groups & set(sizes)):
        size = sizes[name]
        kept = max(1, round(fractions.get(name, 1.0) * size))
        plans = {**fractions, name: np.arange(1, size + 1) / size}
        curve = np.broadcast_to(price(plans, gone), size)
        found.append(_step(name, kept, size, np.asarray(curve)))
    return tuple(sorted(found, key=lambda s: (-s.saved_s, s.group)))


def rounded_up(ladder: Ladder, workload: Workload, name: str, size: int) -> int | None:
    """The next width on the grid above a whole group, if the kernels that it is part of cost no more there.

    Args:
        ladder: asked for widths beyond those of the network.
        workload: of the program.
        name: of the group.
        size: its units; groups whose units are several channels each are left out.
    """
    step = max(ladder.tiers.grid.values(), default=1)
    wanted = -(-size // step) * step
    if wanted == size:
        return None
    now = then = 0.0
    period_s = float(ladder.estimate_batch(workload))
    for item in ladder.items(workload):
        signature = item.signature
        if signature is None or name not in {g for v in signature.variables for g in v.groups}:
            continue
        for fraction in (1.0, wanted / size):
            plans = Population({name: np.asarray(fraction)}, {})
            sizes = [float(plans.quantity(v)) for v in signature.variables]
            kernel = Sample(
                signature.spec,
                tuple(sizes),
                signature.family,
                1.0,
                period_s=period_s,
                alike=item.company.alike,
            )
            own = float(ladder.tiers.many([kernel]).seconds[0])
            if fraction == 1.0:
                now += own * len(item.kernels)
            else:
                then += own * len(item.kernels)
    return wanted if 0 < then <= now * (1 + _EQUAL) else None


def _step(name: str, kept: int, size: int, curve: np.ndarray) -> Step:
    now = float(curve[kept - 1])
    least = max(_EQUAL * (now - float(curve.min())), 1e-3 * _EQUAL * now)
    units = np.arange(1, size + 1)
    equal = units[(units >= kept) & (curve <= now + least)]
    faster = units[(units < kept) & (curve < now - least)]
    dearer = units[(units < kept) & (curve > now + least)]
    narrower = int(faster.max()) if len(faster) else None
    saved = now - float(curve[narrower - 1]) if narrower is not None else 0.0
    return Step(
        name, kept, size, int(equal.max()), narrower, saved, int(dearer.max()) if len(dearer) else None
    )
