"""Approximate groups: features that a norm mixes without weights. Off by default, narrowed when asked for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from builders import node, program_from_nodes
from models import captured

import sartor
from sartor import oracle
from sartor.comparison import relative_error
from sartor.errors import PlanError
from sartor.ir.channels import channel_groups
from sartor.ir.fx import run_twin
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.verify import verify_program
from sartor.passes.masked import masked
from sartor.passes.prune import apply_plan
from sartor.random_weights import randomise


def rms_norm():
    """Two layers with x / sqrt(mean(x²)) between them, as exporters spell it."""
    draw = np.random.default_rng(0).standard_normal
    return program_from_nodes(
        [
            node("MatMul", ["x", "w1"], ["h"]),
            node("Mul", ["h", "h"], ["squares"]),
            node("ReduceMean", ["squares", "axes"], ["mean"], keepdims=1),
            node("Sqrt", ["mean"], ["size"]),
            node("Div", ["h", "size"], ["n"]),
            node("MatMul", ["n", "w2"], ["y"]),
        ],
        {"x": ["N", 4]},
        ["y"],
        {
            "w1": draw((4, 6)).astype(np.float32),
            "w2": draw((6, 3)).astype(np.float32),
            "axes": np.array([-1], dtype=np.int64),
        },
    )


def test_off_by_default_and_flagged_when_asked_for() -> None:
    program = captured("vit")
    exact = channel_groups(program)
    assert not any(g.mixed for g in exact.groups)
    both = channel_groups(program, approximate=True)
    mixed = [g for g in both.groups if g.mixed]
    (stream,) = mixed  # the residual stream: embedding, every norm, every projection onto it
    assert "LayerNormalization mixes values" in stream.mixed
    assert {g.name for g in both.groups} - {stream.name} == {g.name for g in exact.groups}
    roles = {m.role for m in stream.members}
    assert roles == {"producer", "affine", "consumer"}


@pytest.mark.parametrize("family", ["vit", "vit_manual"])
def test_the_residual_stream_is_narrowed_everywhere(family: str) -> None:
    program = captured(family)
    pipeline = sartor.Pipeline.parse("prune-channels{ratio=0.5,criterion=random,approximate=true}")
    result = pipeline.run(program)
    plan = result.results[0].result.plan
    assert plan.approximate and plan.notes["approximate"]
    verify_program(result.program)
    again = apply_plan(program, Plan.from_json(plan.to_json()))
    assert again.to_bytes() == result.program.to_bytes()
    (stream,) = [g for g in channel_groups(program, approximate=True).groups if g.mixed]
    for member in stream.members:
        before = program.initializer_array(member.initializer).shape[member.axis]
        assert again.initializer_array(member.initializer).shape[member.axis] < before


def test_what_is_not_mixed_is_exact_in_the_wider_analysis() -> None:
    program = captured("vit")
    wide = channel_groups(program, approximate=True)
    pipeline = sartor.Pipeline.parse("prune-channels{ratio=0.5,criterion=random,seed=2,approximate=true}")
    plan = pipeline.run(program).results[0].result.plan
    groups = {name: entry for name, entry in plan.groups.items() if not wide.group(name).mixed}
    assert groups
    assert oracle.check(program, Plan(program.source.sha256, groups)).verdict == "passed"


def test_a_spelt_out_norm_is_found_and_is_not_exact() -> None:
    program = rms_norm()
    assert not channel_groups(program).groups
    (group,) = channel_groups(program, approximate=True).groups
    assert "ReduceMean mixes" in group.mixed and group.size == 6
    plan = Plan(program.source.sha256, {group.name: GroupPlan(6, (0, 2, 3, 5))}, approximate=True)
    small = apply_plan(program, plan)
    x = np.random.default_rng(1).standard_normal((5, 4))
    kept = [0, 2, 3, 5]
    h = x @ program.initializer_array("w1").astype(float)[:, kept]
    want = h / np.sqrt((h**2).mean(-1, keepdims=True)) @ program.initializer_array("w2").astype(float)[kept]
    np.testing.assert_allclose(run_twin(small, {"x": x})["y"], want, rtol=1e-12)
    # With zeros in the consumer instead, the norm still sees all six features.
    zeroed = program.clone()
    w2 = program.initializer_array("w2").copy()
    w2[[1, 4]] = 0
    zeroed.initializers["w2"].const_value = ir.Tensor(w2, name="w2")
    assert relative_error(run_twin(zeroed, {"x": x}), {"y": want}) > 1e-3


def test_there_is_no_masked_form() -> None:
    program = rms_norm()
    plan = Plan(program.source.sha256, {"w1": GroupPlan(6, (0, 1))}, approximate=True)
    with pytest.raises(PlanError, match="no MASKED form"):
        masked(program, plan)
    with pytest.raises(PlanError, match="no channel group"):
        apply_plan(program, Plan(program.source.sha256, plan.groups))


def test_heads_stay_exact_beside_a_norm_over_their_dims() -> None:
    """qk-norm mixes the dims of each head: dims become approximate, heads do not."""

    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(12, 12) for _ in range(4))
            self.nq, self.nk = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def split(y: torch.Tensor) -> torch.Tensor:
                return y.reshape(*y.shape[:2], 3, 4).transpose(1, 2)

            q, k, v = self.nq(split(self.q(x))), self.nk(split(self.k(x))), split(self.v(x))
            y = torch.softmax(q @ k.transpose(2, 3) / 2, -1) @ v
            return self.o(y.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    program = sartor.capture(Normed().eval(), (torch.randn(1, 5, 12),))
    groups = channel_groups(program, approximate=True).groups
    heads = [g for g in groups if g.size == 3]
    assert len(heads) == 1 and not heads[0].mixed
    assert [g.size for g in groups if g.mixed] == [4]
    pipeline = sartor.Pipeline.parse("prune-channels{ratio=0.4,criterion=random,approximate=true}")
    plan = pipeline.run(program).results[0].result.plan
    small = apply_plan(randomise(program, channel_groups(program), 0), plan)
    verify_program(small)
    assert small.initializer_array("nq.weight").shape == (3,)
