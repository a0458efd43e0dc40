"""MASKED: the original with listed zeros and nothing else, equal to the pruned program on its own weights."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
import pytest
import torch
from builders import node, program_from_nodes, random_inputs, relative_error
from models import ALL, captured, example, seeded
from torch import nn

from sartor.errors import PassError, PlanError
from sartor.ir.capture import capture
from sartor.ir.channels import channel_groups
from sartor.ir.fx import run_twin
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.verify import verify_program
from sartor.passes.masked import Zeroed, masked
from sartor.passes.prune import apply_plan
from sartor.passes.prune_channels import PruneChannels


def run_onnxruntime(program, feeds):
    """Outputs by name from ONNX Runtime alone, in float32, without its graph optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(program.to_bytes(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def batch_of(program, size, seed=0):
    samples = [random_inputs(program, seed + i) for i in range(size)]
    return {name: np.concatenate([s[name] for s in samples]) for name in samples[0]}


def differing(before, after):
    """Positions at which initializers differ, by name; every node and name must be alike."""
    assert [(n.name, n.op_type, [i.name if i else None for i in n.inputs]) for n in before.nodes()] == [
        (n.name, n.op_type, [i.name if i else None for i in n.inputs]) for n in after.nodes()
    ]
    assert list(before.initializers) == list(after.initializers)
    assert [v.name for v in before.graph.inputs] == [v.name for v in after.graph.inputs]
    assert [v.name for v in before.graph.outputs] == [v.name for v in after.graph.outputs]
    result = {}
    for name in before.initializers:
        old, new = before.initializer_array(name), after.initializer_array(name)
        assert old.shape == new.shape and old.dtype == new.dtype
        if not np.array_equal(old, new):
            result[name] = old != new
    return result


def listed(program, zeroed):
    """The positions that a `zeroed` list names."""
    result = {}
    for entry in zeroed:
        mask = result.setdefault(
            entry.initializer, np.zeros(program.initializer_array(entry.initializer).shape, dtype=bool)
        )
        mask[(slice(None),) * entry.axis + (list(entry.indices),)] = True
    return result


def assert_masked(program, plan, analysis=None):
    """MASKED differs from the original exactly where it says, by zeros."""
    untouched = program.sha256()
    mask, zeroed = masked(program, plan, analysis)
    assert program.sha256() == untouched
    verify_program(mask)
    changed = differing(program, mask)
    named = listed(program, zeroed)
    assert set(changed) == set(named)
    for name, positions in named.items():
        assert np.array_equal(changed[name], positions & (program.initializer_array(name) != 0)), name
        assert (mask.initializer_array(name)[positions] == 0).all()
    assert all(e.indices and list(e.indices) == sorted(set(e.indices)) for e in zeroed)
    return mask, zeroed


# ---- every family ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_pruned_equals_masked_in_onnxruntime(family):
    """Anyone can check this with ONNX Runtime: float32, the weights of the export, batches 1 and 3."""
    program = captured(family)
    plan = PruneChannels(ratio=0.5, seed=7).run(program).plan
    assert len(plan.groups) == len(channel_groups(program).groups)
    pruned = apply_plan(program, plan)
    mask, _ = assert_masked(program, plan)
    for size in (1, 3):
        feeds = batch_of(program, size)
        reference = run_onnxruntime(mask, feeds)
        assert relative_error(reference, run_onnxruntime(pruned, feeds)) < 1e-4
        assert relative_error(reference, run_onnxruntime(program, feeds)) > 1e-2  # the cut is felt
        assert all(len(v) == size for v in reference.values())
    feeds = batch_of(program, 3)
    assert relative_error(run_twin(mask, feeds), run_twin(pruned, feeds)) < 1e-12


@pytest.mark.parametrize("family", ["resnet", "densenet", "unet", "vit"])
def test_a_forgotten_zero_is_seen(family):
    """Every entry of the list is needed: MASKED without it differs from the pruned program."""
    program = captured(family)
    plan = PruneChannels(ratio=0.5, seed=7).run(program).plan
    mask, zeroed = masked(program, plan)
    feeds = batch_of(program, 2)
    pruned = run_twin(apply_plan(program, plan), feeds)
    for entry in zeroed[:: max(1, len(zeroed) // 6)]:
        without = mask.clone()
        value = without.initializers[entry.initializer]
        value.const_value = program.initializers[entry.initializer].const_value
        assert relative_error(pruned, run_twin(without, feeds)) > 1e-6, entry


def test_zeroed_is_exact_on_a_small_program():
    program = flat_program()
    plan = Plan(program.source.sha256, {"conv": GroupPlan(3, (1,))})
    mask, zeroed = assert_masked(program, plan)
    # channels 0 and 2, four positions each, after the flatten
    assert zeroed == (Zeroed("fc.weight", 1, (0, 1, 2, 3, 8, 9, 10, 11)),)
    assert np.array_equal(
        mask.initializer_array("fc.weight")[:, 4:8], program.initializer_array("fc.weight")[:, 4:8]
    )


def flat_program():
    draw = np.random.default_rng(0).standard_normal
    return program_from_nodes(
        [
            node("Conv", ["x", "conv.weight", "conv.bias"], ["c"]),
            node("Sigmoid", ["c"], ["s"]),
            node("Flatten", ["s"], ["f"]),
            node("Gemm", ["f", "fc.weight"], ["y"], transB=1),
        ],
        {"x": ["N", 2, 2, 2]},
        ["y"],
        {
            "conv.weight": draw((3, 2, 1, 1)).astype(np.float32),
            "conv.bias": draw(3).astype(np.float32),
            "fc.weight": draw((4, 12)).astype(np.float32),
        },
    )  # fmt: skip


def test_a_removed_feature_need_not_be_zero_itself():
    """Sigmoid(0) is 0.5: zeros belong into the consumer, not into the producer."""
    program = flat_program()
    plan = Plan(program.source.sha256, {"conv": GroupPlan(3, (1,))})
    mask, _ = masked(program, plan)
    feeds = batch_of(program, 2)
    assert relative_error(run_twin(mask, feeds), run_twin(apply_plan(program, plan), feeds)) < 1e-12
    wrong = program.clone()
    import onnx_ir as ir

    for name in ("conv.weight", "conv.bias"):
        array = program.initializer_array(name).copy()
        array[[0, 2]] = 0
        wrong.initializers[name].const_value = ir.tensor(array, name=name)
    assert relative_error(run_twin(wrong, feeds), run_twin(apply_plan(program, plan), feeds)) > 1e-2


# ---- shared parameters -----------------------------------------------------------------------


def shared_program(*, both):
    """`w` reads two groups (both of its uses are cut), or one group and the graph's input."""
    draw = np.random.default_rng(0).standard_normal
    second = "x" if not both else "h2"
    return program_from_nodes(
        [
            node("MatMul", ["x", "a1"], ["h1"]),
            *([node("MatMul", ["x", "a2"], ["h2"])] if both else []),
            node("Tanh", ["h1"], ["t1"]),
            node("MatMul", ["t1", "w"], ["y1"]),
            node("MatMul", [second, "w"], ["y2"]),
            node("Add", ["y1", "y2"], ["y"]),
        ],
        {"x": ["N", 4]},
        ["y"],
        {
            "a1": draw((4, 4)).astype(np.float32),
            **({"a2": draw((4, 4)).astype(np.float32)} if both else {}),
            "w": draw((4, 3)).astype(np.float32),
        },
    )


def test_weight_shared_by_two_cut_uses_is_zeroed_in_place():
    program = shared_program(both=True)
    (group,) = channel_groups(program).groups
    plan = Plan(program.source.sha256, {group.name: GroupPlan(4, (0, 3))})
    mask, zeroed = assert_masked(program, plan)
    assert zeroed == (Zeroed("w", 0, (1, 2)),)
    feeds = batch_of(program, 2)
    assert relative_error(run_twin(mask, feeds), run_twin(apply_plan(program, plan), feeds)) < 1e-12


def test_weight_shared_with_an_uncut_use_blocks_the_group():
    """The other reader needs every row, so nothing of it may go."""
    assert channel_groups(shared_program(both=False)).groups == ()


class Recurrence(nn.Module):
    """Two layers that run twice, first on a learned start and then on what came of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, 6))
        self.enter, self.wide, self.narrow = nn.Linear(6, 5), nn.Linear(6, 8), nn.Linear(8, 5)
        self.leave, self.head = nn.Linear(5, 6), nn.Linear(5, 3)

    def step(self, state: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.tanh(self.wide(state)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x) + self.step(self.start)
        return self.head(torch.tanh(x + self.step(self.leave(x))))


def test_layer_that_also_runs_on_a_learned_start_is_zeroed_at_both_uses():
    program = capture(seeded(Recurrence()), example(1, 6))
    plan = Plan(program.source.sha256, {"wide": GroupPlan(8, (0, 2, 5)), "enter": GroupPlan(5, (1, 2))})
    mask, _ = masked(program, plan)
    feeds = batch_of(program, 2)
    assert relative_error(run_twin(mask, feeds), run_twin(apply_plan(program, plan), feeds)) < 1e-12


class LearnedQueries(nn.Module):
    """Self-attention between learned queries, whose layer then runs again on what they became."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, 3, 12))
        self.embed = nn.Linear(7, 12)
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 5)

    def attend(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(t).unflatten(-1, (3, 4)).transpose(1, 2)
            for layer, t in ((self.q, x), (self.k, y), (self.v, y))
        )
        weights = torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries = self.queries + self.attend(self.queries, self.queries)
        return self.head(self.attend(queries, self.embed(x)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_attention_between_learned_queries(seed):
    program = capture(seeded(LearnedQueries()), example(1, 4, 7))
    plan = PruneChannels(ratio=0.5, criterion="random", seed=seed).run(program).plan
    touched = {m.initializer.split(".")[0] for g in channel_groups(program).groups for m in g.members}
    assert {"q", "k", "v", "out"} <= touched
    mask, _ = masked(program, plan)
    feeds = batch_of(program, 2)
    assert relative_error(run_twin(mask, feeds), run_twin(apply_plan(program, plan), feeds)) < 1e-12


class SharedBlocks(nn.Module):
    """Two residual blocks whose branches end in one Linear; only the first branch may go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.last(torch.tanh(self.first(x)))
        x = x + self.last(torch.tanh(self.second(x)))
        return self.head(x)


def test_weight_shared_with_a_kept_block_is_zeroed_in_a_private_copy():
    program = capture(seeded(SharedBlocks()), example(1, 6))
    from sartor.ir.blocks import residual_blocks

    block = next(b for b in residual_blocks(program) if b.removable)
    plan = Plan(program.source.sha256, blocks=(block.name,))
    mask, zeroed = masked(program, plan)
    verify_program(mask)
    assert [(n.name, n.op_type) for n in mask.nodes()] == [(n.name, n.op_type) for n in program.nodes()]
    for name in program.initializers:  # the original parameters stay whole
        assert np.array_equal(program.initializer_array(name), mask.initializer_array(name)), name
    copies = [e.initializer for e in zeroed]
    assert len(copies) == 2 and not set(copies) & set(program.initializers)
    assert all((mask.initializer_array(name) == 0).all() for name in copies)
    feeds = batch_of(program, 3)
    reference = run_onnxruntime(mask, feeds)
    assert relative_error(reference, run_onnxruntime(apply_plan(program, plan), feeds)) < 1e-5
    assert relative_error(reference, run_onnxruntime(program, feeds)) > 1e-2


# ---- attention -------------------------------------------------------------------------------


class Attention(nn.Module):
    """One attention layer with separate q, k, v, or with one Linear that `chunk` splits."""

    def __init__(self, fused: bool, bias: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.embed = nn.Linear(7, 12)
        if fused:
            self.qkv = nn.Linear(12, 36, bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(12, 12, bias=bias) for _ in range(3))
        self.out = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.embed(x))
        n, t, c = x.shape
        parts = self.qkv(x).chunk(3, dim=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.reshape(n, t, 2, 6).transpose(1, 2) for part in parts)
        y = torch.softmax(q @ k.transpose(-2, -1) * 6**-0.5, -1) @ v
        return self.out(y.transpose(1, 2).reshape(n, t, c))


@functools.cache
def attention(fused, bias):
    return capture(seeded(Attention(fused, bias)), example(1, 5, 7))


def qk_group(program):
    """The group of query and key features: the one whose removal zeroes no consumer."""
    analysis = channel_groups(program)
    return next(g for g in analysis.groups if not g.members_with("consumer"))


@pytest.mark.parametrize("bias", [True, False])
def test_qk_dims_of_separate_linears_zero_the_query_only(bias):
    program = attention(False, bias)
    group = qk_group(program)
    assert group.size == 6
    assert {m.initializer for m in group.members} == (
        {"q.weight", "k.weight", "q.bias", "k.bias"} if bias else {m.initializer for m in group.members}
    )
    plan = Plan(program.source.sha256, {group.name: GroupPlan(6, (1, 4, 5))})
    mask, zeroed = assert_masked(program, plan)
    rows = tuple(6 * head + unit for head in range(2) for unit in (0, 2, 3))
    assert sum(len(e.indices) for e in zeroed) == len(rows) * (2 if bias else 1)
    if bias:
        assert zeroed == (Zeroed("q.bias", 0, rows), Zeroed("q.weight", 0, rows))
    check_attention(program, plan, mask)


def test_qk_dims_of_a_chunked_linear_zero_the_query_rows_only():
    program = attention(True, True)
    group = qk_group(program)
    assert {m.initializer for m in group.members} == {"qkv.weight", "qkv.bias"}
    plan = Plan(program.source.sha256, {group.name: GroupPlan(6, (1, 4, 5))})
    mask, zeroed = assert_masked(program, plan)
    rows = tuple(6 * head + unit for head in range(2) for unit in (0, 2, 3))
    assert max(rows) < 12  # neither key (12 to 23) nor value (24 to 35)
    assert zeroed == (Zeroed("qkv.bias", 0, rows), Zeroed("qkv.weight", 0, rows))
    check_attention(program, plan, mask)
    assert apply_plan(program, plan).initializer_array("qkv.weight").shape == (6 + 6 + 12, 12)


def check_attention(program, plan, mask):
    pruned = apply_plan(program, plan)
    verify_program(pruned)
    for size in (1, 3):
        feeds = batch_of(program, size)
        assert relative_error(run_onnxruntime(mask, feeds), run_onnxruntime(pruned, feeds)) < 1e-5
        assert relative_error(run_twin(mask, feeds), run_twin(pruned, feeds)) < 1e-12
        assert relative_error(run_twin(mask, feeds), run_twin(program, feeds)) > 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_a_query_bias_left_behind_is_seen(fused):
    program = attention(fused, True)
    plan = Plan(program.source.sha256, {qk_group(program).name: GroupPlan(6, (1, 4, 5))})
    mask, _ = masked(program, plan)
    name = "qkv.bias" if fused else "q.bias"
    mask.initializers[name].const_value = program.initializers[name].const_value
    feeds = batch_of(program, 2)
    assert relative_error(run_twin(mask, feeds), run_twin(apply_plan(program, plan), feeds)) > 1e-4


@pytest.mark.parametrize("fused", [False, True])
def test_every_direction_of_attention_at_once(fused):
    """Heads, query and key dims, value dims and embedding together, by random plans."""
    program = attention(fused, True)
    sizes = sorted(g.size for g in channel_groups(program).groups)
    assert sizes == [2, 6, 6, 12]
    for seed in range(4):
        plan = PruneChannels(ratio=0.5, seed=seed).run(program).plan
        mask, _ = assert_masked(program, plan)
        check_attention(program, plan, mask)


@pytest.mark.parametrize("family", ["vit", "vit_manual"])
def test_heads_of_a_vit(family):
    """Removed heads are zeroed where the projection reads them, and nowhere else."""
    program = captured(family)
    name = "blocks.1.attn.qkv[3x24]"
    plan = Plan(program.source.sha256, {name: GroupPlan(3, (0, 2))})
    mask, zeroed = assert_masked(program, plan)
    assert zeroed == (Zeroed("blocks.1.attn.proj.weight", 1, tuple(range(8, 16))),)
    analysis = channel_groups(program)
    gates = {m.initializer for m in analysis.masked_members(analysis.group(name))}
    assert gates == {"blocks.1.attn.proj.weight"}  # scaling a head is not scaling its query
    pruned = apply_plan(program, plan)
    assert pruned.initializer_array("blocks.1.attn.qkv.weight").shape == (3 * 2 * 8, 24)
    kept = [24 * part + 8 * head + i for part in range(3) for head in (0, 2) for i in range(8)]
    whole = program.initializer_array("blocks.1.attn.qkv.weight")
    assert np.array_equal(pruned.initializer_array("blocks.1.attn.qkv.weight"), whole[kept])
    feeds = batch_of(program, 3)
    assert relative_error(run_onnxruntime(mask, feeds), run_onnxruntime(pruned, feeds)) < 1e-5


# ---- refusals --------------------------------------------------------------------------------


def test_unknown_block_is_refused():
    program = captured("resnet")
    plan = Plan(program.source.sha256, blocks=("layer9",))
    with pytest.raises(PlanError, match="has no removable block 'layer9'"):
        masked(program, plan)


def test_empty_plan_changes_nothing():
    program = captured("vgg")
    mask, zeroed = masked(program, Plan(program.source.sha256))
    assert zeroed == () and mask.to_bytes() == program.to_bytes()


def test_no_family_has_a_group_without_a_masked_form():
    """Every group that the analysis offers can be masked alone, so no plan fails half-way."""
    for family in ("se", "unet", "vit"):
        program = captured(family)
        for group in channel_groups(program).groups:
            plan = Plan(program.source.sha256, {group.name: GroupPlan(group.size, (0,))})
            try:
                _, zeroed = masked(program, plan)
            except PassError as error:
                pytest.fail(f"{family}, {group.name}: {error}")
            assert zeroed
