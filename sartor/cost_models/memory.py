"""Memory of one inference: what plans need, in the program's order of nodes and in the best one.

Metrics, all in bytes; what a runtime shares and writes in place is said by `sartor.ir.memory.Rules`:

    peak_activation_bytes      highest sum of the buffers that exist at once, in the program's own order
    min_peak_activation_bytes  the same in the order that needs least; in the best one found, where that is not proven
    arena_bytes                one block that holds all buffers at fixed offsets, own order: peak and fragmentation
    flash_bytes                weights and other constants
    traffic_bytes              what all steps read and write, weights included: no peak, and no schedule changes it

With `sartor.ir.memory.PLAIN` the first one is the `peak_activation_bytes` of `sartor.cost_models.static`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.cost_models.protocol import CostEstimate
from sartor.ir.memory import DEFAULT, ProgramBuffers, Rules, peak, plan_arena, program_buffers, schedule
from sartor.ir.population import Fractions, Removed

if TYPE_CHECKING:
    from sartor.ir.extents import Extent
    from sartor.ir.memory import BufferGraph
    from sartor.ir.program import Program

LARGEST_SEARCHED = 2_000
"""Steps; beyond them a report looks for no better order."""
_REPORT_STATES = 5_000  # a second or two; what is small enough to be proven needs fewer


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryModel:
    """Prices plans in bytes. Made by `memory_model`.

    Attributes:
        buffers: of the program.
        alignment: of offsets in the arena, bytes.
    """

    buffers: ProgramBuffers
    alignment: int = 16

    @property
    def method(self) -> str:
        """One line for people."""
        return f"buffers of the program, {_told(self.buffers.parts.rules)}"

    def estimate(self, fractions: Fractions | None = None, removed: Removed | None = None) -> CostEstimate:
        """All metrics of one plan. Exact under the rules: no intervals."""
        graph = self.buffers.at(fractions, removed)
        best = schedule(graph)
        metrics = {
            "peak_activation_bytes": float(peak(graph).bytes),
            "min_peak_activation_bytes": float(best.peak_bytes),
            "arena_bytes": float(plan_arena(graph, self.alignment).bytes),
            "flash_bytes": float(graph.constant_bytes()),
            "traffic_bytes": float(graph.traffic_bytes()),
        }
        unknown = () if best.optimal else ("whether another order of the nodes needs less memory",)
        return CostEstimate(self.method, metrics, unmodelled=unknown)

    def estimate_batch(
        self,
        fractions: Fractions | None = None,
        removed: Removed | None = None,
        order: Sequence[int] | None = None,
    ) -> Mapping[str, np.ndarray]:
        """`peak_activation_bytes`, `flash_bytes` and `traffic_bytes` of a population of plans, arrays `[plans]`.

        Args:
            fractions: kept fraction per group; scalars or arrays of one common length.
            removed: removed blocks; scalars or bool arrays of the same length.
            order: of the steps of `buffers.graph()`, such as `schedule(...)` finds it; default: the program's.
        """
        return {
            "peak_activation_bytes": self.buffers.peaks(fractions, removed, order),
            "flash_bytes": self.buffers.constant_bytes(fractions, removed),
            "traffic_bytes": self.buffers.traffic_bytes(fractions, removed),
        }


def memory_model(
    program: Program,
    rules: Rules = DEFAULT,
    extents: Mapping[str, tuple[Extent, ...]] | None = None,
    blocks: Sequence[Any] = (),
) -> MemoryModel:
    """The model of one program; arguments as of `sartor.ir.memory.program_buffers`.

    Raises:
        ModelError: a shape depends on data.
    """
    return MemoryModel(program_buffers(program, rules, extents, blocks))


def memory_report(program: Program, rules: Rules = DEFAULT) -> dict[str, Any]:
    """Memory of a program at its reference shapes, for `sartor inspect`; JSON-ready.

    Keys: `rules`, in words; `peak` `{bytes, at, live}` with the step where it is and `live`
    `[{value, bytes}]`, largest first; `best_order` `{peak_bytes, lower_bound_bytes, optimal, moved}` with the number of
    steps that stand elsewhere in it (absent for more than `LARGEST_SEARCHED` steps); `arena_bytes`, `flash_bytes`,
    `traffic_bytes`.

    Raises:
        ModelError: a shape depends on data.
    """
    graph = program_buffers(program, rules).graph()
    highest = peak(graph)
    live = sorted(((name, graph.sizes[name]) for name in highest.live), key=lambda pair: -pair[1])
    document: dict[str, Any] = {
        "rules": _told(rules),
        "peak": {
            "bytes": highest.bytes,
            "at": highest.at_node,
            "live": [{"value": name, "bytes": size} for name, size in live if size],
        },
        "arena_bytes": plan_arena(graph).bytes,
        "flash_bytes": graph.constant_bytes(),
        "traffic_bytes": graph.traffic_bytes(),
    }
    if len(graph.steps) <= LARGEST_SEARCHED:
        document["best_order"] = _best_order(graph)
    return document


def _best_order(graph: BufferGraph) -> dict[str, Any]:
    found = schedule(graph, max_states=_REPORT_STATES)
    return {
        "peak_bytes": found.peak_bytes,
        "lower_bound_bytes": found.lower_bound_bytes,
        "optimal": found.optimal,
        "moved": sum(step != index for index, step in enumerate(found.order)),
    }


def _told(rules: Rules) -> str:
    parts = [
        "kernels fused" if rules.fusion is not None else "every node allocates",
        "elementwise in place" if rules.in_place else "nothing in place",
    ]
    if rules.depthwise:
        parts.append("depthwise in place")
    parts.append("inputs held by the caller" if rules.inputs_held else "inputs freed after their last reader")
    return ", ".join(parts)
