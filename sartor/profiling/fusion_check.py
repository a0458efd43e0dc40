"""Whether a workload's kernels are those that a runtime really executes.

A backend's profile says which nodes every executed kernel computes (`KernelTime.nodes`). Left out of the comparison is
what costs nothing: metadata, what depends on no input, and BatchNormalization that is folded into weights.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.ir.fusion import constant_nodes
from sartor.ir.kernels import FREE
from sartor.ir.workload import Workload

if TYPE_CHECKING:
    from sartor.backends.protocol import KernelTime, TargetOptions
    from sartor.ir.program import Program


@dataclasses.dataclass(frozen=True)
class Difference:
    """A kernel of ours that is not one that the runtime executes.

    Attributes:
        kernel: its name.
        ours: its nodes, as `name (type)`.
        executed: the nodes of every executed kernel that computes any of them.
    """

    kernel: str
    ours: tuple[str, ...]
    executed: tuple[tuple[str, ...], ...]

    @property
    def apart(self) -> bool:
        """The runtime executes it in more than one kernel."""
        return len(self.executed) > 1

    def __str__(self) -> str:
        theirs = " | ".join(", ".join(nodes) for nodes in self.executed) or "nothing"
        return f"Kernel '{self.kernel}' is [{', '.join(self.ours)}]; executed is [{theirs}]."


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """Agreement of a workload with one run.

    Attributes:
        kernels: kernels of ours that cost something.
        agreed: those whose nodes are exactly those of one executed kernel.
        differences: the others.
        inserted: executed kernels that compute no node of the program, by type: changes of layout, padding.
        in_parts: of those that agree, how many are executed as several kernels with the same nodes: a runtime
            without the operator. A sample model of the kernel is executed so, too.
        layout: changes of layout that the workload expects, by type; compare `inserted`.
    """

    kernels: int
    agreed: int
    differences: tuple[Difference, ...]
    inserted: Mapping[str, int]
    in_parts: int = 0
    layout: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def agreement(self) -> float:
        """Share of our kernels that are executed as they are."""
        return self.agreed / self.kernels if self.kernels else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "agreement": self.agreement,
            "kernels": self.kernels,
            "agreed": self.agreed,
            "apart": sum(d.apart for d in self.differences),
            "differences": [str(d) for d in self.differences],
            "inserted": dict(sorted(self.inserted.items())),
            "in_parts": self.in_parts,
            "layout": dict(sorted(self.layout.items())),
        }


def check_fusion(program: Program, workload: Workload, executed: Sequence[KernelTime]) -> FusionReport:
    """Compare a workload's kernels with what a backend's `profile` returned.

    Args:
        program: what the workload was built from.
        workload: with the backend's rules.
        executed: all kernels of one run.
    """
    own = {node.name or "": node for node in program.nodes()}
    free = {name for name, node in own.items() if node.op_type in FREE}
    free |= {node.name or "" for node in constant_nodes(program)}
    inserted: Counter[str] = Counter()
    sets: list[frozenset[str]] = []
    for kernel in executed:
        mine = frozenset(n for n in kernel.nodes if n in own)
        if mine - free:
            sets.append(_without_folded(mine - free, own))
        elif not mine:
            inserted[kernel.op_type] += 1
    sets = _distinct(sets)
    parts = Counter(sets)
    differences, agreed = [], []
    for ours in workload.kernels:
        nodes = _without_folded(frozenset(ours.nodes) - free, own)
        if not nodes or ours.instead_of:
            continue
        if nodes in parts:
            agreed.append(parts[nodes])
            continue
        theirs = [_described(names, own) for names in parts if names & nodes]
        differences.append(Difference(ours.name, _described(nodes, own), tuple(theirs)))
    return FusionReport(
        kernels=len(agreed) + len(differences),
        agreed=len(agreed),
        differences=tuple(differences),
        inserted=inserted,
        in_parts=sum(number > 1 for number in agreed),
        layout=Counter(kernel.op_type for kernel in workload.layout),
    )


def _distinct(sets: Sequence[frozenset[str]]) -> list[frozenset[str]]:
    """A node that some kernel has for itself is taken from the others that name it, too."""
    distinct = []
    for names in sets:
        smaller = [other for other in set(sets) if other < names]
        distinct.append(names.difference(*smaller) or names)
    return distinct


def profile_fusion(
    target: str, program: Program, folder: Path, options: TargetOptions | None = None
) -> FusionReport:
    """Lower `program` for `target` into `folder`, profile it here, and compare.

    Raises:
        BackendError: the target does not take the program, or cannot run it here.
    """
    from sartor import backends
    from sartor.backends.protocol import TargetOptions
    from sartor.ir.fusion_rules import FusionRules
    from sartor.ir.workload import build_workload

    backend = backends.get(target)
    chosen = options or TargetOptions()
    if not chosen.shapes:
        chosen = dataclasses.replace(chosen, shapes=dict(program.input_shapes))
    artifact = backend.lower(program, folder, chosen)
    workload = build_workload(program, rules=FusionRules.of(backend.capabilities().fuses))
    return check_fusion(program, workload, backend.profile(artifact, chosen, 2))


def _without_folded(names: frozenset[str], own: Mapping[str, Any]) -> frozenset[str]:
    kept = frozenset(n for n in names if own[n].op_type != "BatchNormalization")
    return kept or names


def _described(names: Iterable[str], own: Mapping[str, Any]) -> tuple[str, ...]:
    order = {name: i for i, name in enumerate(own)}
    return tuple(f"{n} ({own[n].op_type})" for n in sorted(names, key=order.__getitem__))
