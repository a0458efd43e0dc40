"""Features that a recurrent layer reads are cut; its hidden sizes stay, with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sartor
from sartor import oracle
from sartor.cost_models.static import static_cost
from sartor.ir.channels import channel_groups
from sartor.ir.workload import build_workload


class Reader(nn.Module):
    """Twelve features per step, read by a recurrent layer."""

    def __init__(self, kind: str, directions: int, layers: int):
        super().__init__()
        self.make = nn.Linear(6, 12)
        options = {"batch_first": True, "bidirectional": directions == 2, "num_layers": layers}
        self.read = getattr(nn, kind)(12, 8, **options)
        self.end = nn.Linear(8 * directions, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps, _ = self.read(torch.relu(self.make(x)))
        return self.end(steps[:, -1])


@pytest.mark.parametrize(
    ("kind", "directions", "layers"), [("GRU", 1, 2), ("GRU", 2, 1), ("LSTM", 1, 1), ("LSTM", 2, 2)]
)
def test_the_input_size_is_cut(kind: str, directions: int, layers: int) -> None:
    module, x = Reader(kind, directions, layers).eval(), torch.zeros(1, 5, 6)
    program = sartor.capture(module, (x,))
    analysis = channel_groups(program)
    assert [(group.name, group.size) for group in analysis.groups] == [("make", 12)]
    reasons = {b.reason for b in analysis.blocked if b.value.startswith("read.")}
    assert reasons == {f"the hidden size of {kind} is not cut: every step reads what the one before made"}
    result = sartor.Pipeline.parse("prune-channels{ratio=0.5,criterion=random}", instruments=()).run(program)
    plan = result.results[0].result.plan
    verdict = oracle.check(program, plan, analysis=analysis)
    assert verdict.verdict == "passed" and verdict.max_rel_error < 1e-12
    predicted = build_workload(program, analysis.extents).evaluate({"make": 0.5})
    cost = static_cost(result.program)
    assert (predicted.macs, predicted.parameters) == (cost.macs, cost.parameters)
    small = sartor.apply_to_module(module, plan, (x,))
    assert small.read.input_size == 6 and small.read.hidden_size == 8
    assert small(torch.randn(3, 5, 6)).shape == (3, 4)


def test_a_sequence_axis_with_labels_is_blocked() -> None:
    """Channels that become steps are mixed by the recurrence."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Conv1d(3, 8, 1), nn.GRU(5, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.read(self.make(x))[0]

    program = sartor.capture(Steps().eval(), (torch.zeros(1, 3, 5),))
    analysis = channel_groups(program)
    assert not analysis.groups
    assert any("hidden size of GRU" in b.reason for b in analysis.blocked if b.value.startswith("make"))
