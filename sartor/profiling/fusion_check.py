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
from sartor.ir.population import Population
from sartor.ir.workload import Workload

if TYPE_CHECKING:
    from sartor.backends.protocol import KernelTime, TargetOptions
    from sartor.ir.kernels import Kernel
    from sartor.ir.program import Program


NAMELESS_PARTS = frozenset({"Mul"})
"""What follows a kernel without a name is the rest of its operator, which the runtime computes in parts (HardSwish)."""


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


@dataclasses.dataclass(frozen=True)
class Executed:
    """What a runtime executed, by the nodes of the program.

    Attributes:
        kernels: by the nodes that they compute together.
        inserted: those that compute none.
    """

    kernels: Mapping[frozenset[str], tuple[KernelTime, ...]]
    inserted: tuple[KernelTime, ...]
    _own: Mapping[str, Any] = dataclasses.field(repr=False)
    _free: frozenset[str] = dataclasses.field(repr=False)

    @staticmethod
    def of(program: Program, executed: Sequence[KernelTime]) -> Executed:
        """Of one run; a node that some kernel has for itself is taken from the others that name it, too.

        Args:
            program: what was lowered.
            executed: all kernels.
        """
        own = {node.name or "": node for node in program.nodes()}
        free = {name for name, node in own.items() if node.op_type in FREE}
        free |= {node.name or "" for node in constant_nodes(program)}
        inserted: list[KernelTime] = []
        rows: list[tuple[frozenset[str], KernelTime]] = []
        for kernel in executed:
            mine = frozenset(n for n in kernel.nodes if n in own)
            if mine - free:
                rows.append((_without_folded(mine - free, own), kernel))
            elif not mine and rows and kernel.op_type in NAMELESS_PARTS:
                rows.append((rows[-1][0], kernel))
            elif not mine:
                inserted.append(kernel)
        found: dict[frozenset[str], list[KernelTime]] = {}
        every = {names for names, _ in rows}
        for names, kernel in rows:
            smaller = [other for other in every if other < names]
            found.setdefault(names.difference(*smaller) or names, []).append(kernel)
        kernels = {names: tuple(those) for names, those in found.items()}
        return Executed(kernels, tuple(inserted), own, frozenset(free))

    def nodes_of(self, kernel: Kernel) -> frozenset[str]:
        """What of a workload's kernel is executed at all; a key of `kernels` if it runs as it is."""
        return _without_folded(frozenset(kernel.nodes) - self._free, self._own)


def _without_folded(names: frozenset[str], own: Mapping[str, Any]) -> frozenset[str]:
    kept = frozenset(n for n in names if own[n].op_type != "BatchNormalization")
    return kept or names


def check_fusion(program: Program, workload: Workload, executed: Sequence[KernelTime]) -> FusionReport:
    """Compare a workload's kernels with what a backend's `profile` returned.

    Args:
        program: what the workload was built from.
        workload: with the backend's rules.
        executed: all kernels of one run.
    """
    own = {node.name or "": node for node in program.nodes()}
    found = Executed.of(program, executed)
    parts = {nodes: len(kernels) for nodes, kernels in found.kernels.items()}
    inserted = Counter(kernel.op_type for kernel in found.inserted)
    differences, agreed = [], []
    for ours in workload.kernels:
        nodes = found.nodes_of(ours)
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
        layout=Counter(k.op_type for k, count in workload.layout.kernels(Population({}, {})) if count),
    )


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


def _described(names: Iterable[str], own: Mapping[str, Any]) -> tuple[str, ...]:
    order = {name: i for i, name in enumerate(own)}
    return tuple(f"{n} ({own[n].op_type})" for n in sorted(names, key=order.__getitem__))
