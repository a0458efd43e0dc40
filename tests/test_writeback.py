"""Plans applied to the author's own modules, compared with the narrowed program in float64."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import sartor
from sartor.errors import PlanError, UsageError
from sartor.ir.batch import random_inputs
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.fx import run_twin, to_tensor
from sartor.ir.plan import GroupPlan, Plan
from sartor.oracle import relative_error
from sartor.passes.prune_channels import PruneChannels
from sartor.writeback import NarrowMultiheadAttention, Nothing, Shortcut, culprit, layers, tensors
from sartor.writeback.attention import narrow_attention

IMAGE = (1, 3, 16, 16)
ATTENTION = 1e-6  # a program holds the scale of attention in float32


def halved(program, ratio=0.5, seed=1):
    return PruneChannels(ratio=ratio, seed=seed).run(program).plan


def difference(module, program, plan, seed=5):
    """Largest relative difference to the narrowed program, on the real weights in float64."""
    narrowed = sartor.apply_plan(program, plan)
    inputs = random_inputs(program, seed=seed, size=3 if program.batch.symbolic else None)
    given = [to_tensor(inputs[v.name], torch.float64) for v in program.graph.inputs]
    with torch.no_grad():
        result = copy.deepcopy(module).double().eval()(*given)
    result = result if isinstance(result, tuple) else (result,)
    reference = run_twin(narrowed, inputs)
    return relative_error(reference, dict(zip(reference, [r.numpy() for r in result], strict=True)))


def written_back(module, example):
    program = sartor.capture(module, example)
    plan = halved(program)
    return sartor.apply_to_module(module, plan, program=program), program, plan


def state(module):
    flags = [
        (n, m.training, type(m), {k: v for k, v in m.__dict__.items() if isinstance(v, (int, tuple))})
        for n, m in module.named_modules()
    ]
    values = {n: t.clone() for n, t in tensors.by_name(module).items()}
    return flags, values, [p.requires_grad for p in module.parameters()]


def assert_same_state(one, other):
    assert one[0] == other[0] and one[2] == other[2] and one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][n], other[1][n]) for n in one[1])


class TestFamilies:
    @pytest.mark.parametrize("name", ["resnet", "mobilenet", "se", "densenet", "unet", "vgg"])
    def test_equals_the_narrowed_program(self, name):
        module, _ = models.ALL[name]()
        program = models.captured(name)
        before = state(module)
        plan = halved(program)
        result = sartor.apply_to_module(module, plan, program=program)
        assert_same_state(before, state(module))
        assert difference(result, program, plan) < 1e-12
        assert sum(p.numel() for p in result.parameters()) < 0.6 * sum(p.numel() for p in module.parameters())

    def test_attributes_follow(self):
        module, example = models.tiny_mobilenet()
        plan = halved(models.captured("mobilenet"))
        result = sartor.apply_to_module(module, plan, example)
        seen = 0
        for child in result.modules():
            if isinstance(child, nn.Conv2d):
                expected = (child.out_channels, child.in_channels // child.groups)
                assert child.weight.shape[:2] == expected
                seen += child.groups > 1
            if isinstance(child, nn.BatchNorm2d):
                assert child.num_features == len(child.weight) == len(child.running_var)
            if isinstance(child, nn.Linear):
                assert child.weight.shape == (child.out_features, child.in_features)
        assert seen == 3
        narrowed = sartor.apply_plan(models.captured("mobilenet"), plan)
        again = sartor.capture(result, example)
        assert {n: v.shape for n, v in again.initializers.items()} == {
            n: v.shape for n, v in narrowed.initializers.items()
        }

    def test_other_layers(self):
        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(11, 12)
                self.up = nn.ConvTranspose1d(12, 10, 3, groups=2)
                self.inst = nn.InstanceNorm1d(10, affine=True)
                self.act = nn.PReLU(10)
                self.conv = nn.Conv1d(10, 8, 1)
                self.norm = nn.GroupNorm(4, 8)
                self.gain = nn.Parameter(torch.zeros(8, 1))
                self.register_buffer("shift", torch.zeros(8, 1), persistent=False)
                self.conv3 = nn.Conv3d(8, 6, 1)
                self.last = nn.Conv3d(6, 3, 1)

            def forward(self, x):
                x = self.act(self.inst(self.up(self.embed(x).transpose(1, 2))))
                x = self.norm(self.conv(x)) * self.gain + self.shift
                return self.last(functional.relu(self.conv3(x[..., None, None])))

        module = models.seeded(Mixed())
        result, program, plan = written_back(module, (torch.zeros(1, 7, dtype=torch.int64),))
        assert difference(result, program, plan) < 1e-12
        assert result.up.out_channels == len(result.act.weight) == result.act.num_parameters < 10
        assert result.inst.num_features == result.conv.in_channels == result.up.out_channels
        assert result.embed.embedding_dim == result.up.in_channels < 12
        assert result.norm.num_channels == 4 and result.norm.num_groups == 2
        assert result.gain.shape[0] == result.shift.shape[0] == result.conv.out_channels == 4
        assert result.conv3.out_channels == result.last.in_channels == 3
        assert "shift" not in result.state_dict()

    def test_flags_dtype_and_sharing_stay(self):
        module, example = models.tiny_resnet()
        module.train()
        module.layer1[0].bn1.eval()
        module.stem[0].weight.requires_grad_(False)
        module.stem[0].weight.no_weight_decay = True
        module.to(memory_format=torch.channels_last)
        result, _, _ = written_back(module, example)
        assert result.training and not result.layer1[0].bn1.training and not module.layer1[0].bn1.training
        assert not result.stem[0].weight.requires_grad and result.fc.weight.requires_grad
        assert result.stem[0].weight.no_weight_decay
        assert result.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(result.parameters(), 0.1)
        result(torch.randn(4, *IMAGE[1:])).square().mean().backward()
        optimizer.step()


class Shared(nn.Module):
    """One weight under two names, as tied embeddings are."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.wide = nn.Linear(12, 20)
        self.twice = nn.PReLU(20)
        self.last = nn.Linear(20, 5)

    def forward(self, x):
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(self.twice(torch.tanh(self.twice(self.wide(x)))))


def test_shared_parameters_stay_shared():
    module = models.seeded(Shared())
    result, program, plan = written_back(module, (torch.randn(2, 12),))
    assert result.second.weight is result.first.weight
    assert result.twice.num_parameters < 20
    assert difference(result, program, plan) < 1e-12


def test_a_shared_parameter_that_is_cut_stays_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 12), nn.Linear(8, 12)
            self.b.weight = self.a.weight
            self.c = nn.Linear(12, 5)

        def forward(self, x):
            return self.c(torch.tanh(self.a(x)) + torch.tanh(self.b(x * 2)))

    result, program, plan = written_back(models.seeded(Tied()), (torch.randn(2, 8),))
    assert result.a.weight is result.b.weight and result.a.out_features == result.b.out_features == 6
    assert difference(result, program, plan) < 1e-12


class Block(nn.Module):
    def __init__(self, dim=24, heads=3, hidden=40):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A ViT with torch's attention, followed by torch's own encoder layer."""

    def __init__(self, dim=24):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.encoder = nn.TransformerEncoderLayer(dim, 3, 40, batch_first=True)
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(self.blocks(x)).mean(1))


@pytest.fixture(scope="module")
def vit():
    module = models.seeded(Vit())
    return module, sartor.capture(module, torch.randn(IMAGE))


def test_vit_with_torch_attention(vit):
    module, program = vit
    plan = halved(program)
    result = sartor.apply_to_module(module, plan, program=program)
    assert difference(result, program, plan) < ATTENTION
    attention = result.blocks[0].attn
    assert (
        isinstance(attention, NarrowMultiheadAttention)
        and type(module.blocks[0].attn) is nn.MultiheadAttention
    )
    width = attention.num_heads * attention.v_head_dim
    assert attention.out_proj.in_features == width < 24 and attention.embed_dim == 24
    assert "v_head_dim" in repr(attention)
    result.train()(torch.randn(IMAGE)).sum().backward()
    assert attention.in_proj_weight.grad is not None
    program_again = sartor.capture(result.eval(), torch.randn(IMAGE))  # and can be cut again
    plan = halved(program_again)
    again = sartor.apply_to_module(result, plan, program=program_again)
    assert difference(again, program_again, plan) < ATTENTION


def test_an_approximate_plan(vit):
    """The embedding narrows, too: norms, attention and residual stream together."""
    module, program = vit
    plan = PruneChannels(ratio=0.5, approximate=True).run(program).plan
    result = sartor.apply_to_module(module, plan, program=program)
    assert difference(result, program, plan) < ATTENTION
    block = result.blocks[0]
    assert (
        block.norm1.normalized_shape == (12,)
        and block.attn.embed_dim == 12
        and block.mlp[2].out_features == 12
    )


class TestAttention:
    """Against torch's own module with the lost heads silenced, whatever the analysis offers as groups."""

    @staticmethod
    def build(**options):
        torch.manual_seed(0)
        module = nn.MultiheadAttention(24, 3, **options)
        return models.randomise(module, 1).double().eval()

    @staticmethod
    def without_head(module, head, width=8):
        """Head `head` removed, and the original with that head silenced."""
        kept = np.array([i for i in range(24) if i // width != head])
        cut, silent = copy.deepcopy(module), copy.deepcopy(module)
        with torch.no_grad():
            silent.out_proj.weight[:, head * width : (head + 1) * width] = 0
        rows = np.concatenate([kept, kept + 24, kept + 48])
        keep = {"in_proj_bias": {0: rows}, "out_proj.weight": {1: kept}}
        if module.in_proj_weight is not None:
            keep["in_proj_weight"] = {0: rows}
        else:
            keep.update({f"{letter}_proj_weight": {0: kept} for letter in "qkv"})
        keep = {name: axes for name, axes in keep.items() if name in tensors.by_name(cut)}
        program = models.captured("vgg")  # holds none of these names: no shapes to compare with
        old = tensors.narrow(cut, keep, program)
        layers.update(cut, keep, old, program, program)
        return cut, silent

    @pytest.mark.parametrize(
        "options", [{"batch_first": True}, {}, {"bias": False}, {"kdim": 10, "vdim": 14, "batch_first": True}]
    )
    def test_a_head_less(self, options):
        module = self.build(**options)
        cut, silent = self.without_head(module, 1)
        assert isinstance(cut, NarrowMultiheadAttention) and cut.num_heads == 2
        assert cut.out_proj.in_features == 16
        generator = torch.Generator().manual_seed(2)
        q, k, v = (
            torch.randn(2, n, d, generator=generator, dtype=torch.float64)
            for n, d in ((5, 24), (7, module.kdim), (7, module.vdim))
        )
        if not module.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        padding = torch.zeros(2, 7, dtype=torch.bool)
        padding[1, 3:] = True
        mask = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        for more in ({}, {"key_padding_mask": padding}, {"attn_mask": mask}, {"attn_mask": mask > 0.9}):
            for need in (True, False):
                mine, weights = cut(q, k, v, need_weights=need, **more)
                theirs, _ = silent(q, k, v, need_weights=need, **more)
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
                assert (weights is not None) == need
        both, _ = silent(q, k, v, attn_mask=mask > 0.9, key_padding_mask=padding)
        torch.testing.assert_close(cut(q, k, v, attn_mask=mask > 0.9, key_padding_mask=padding)[0], both)
        _, weights = cut(q, k, v, average_attn_weights=False)
        _, reference = silent(q, k, v, average_attn_weights=False)
        torch.testing.assert_close(weights, reference[:, [0, 2]])

    def test_unbatched_and_mask_per_head(self):
        cut, silent = self.without_head(self.build(), 0)
        x = torch.randn(5, 24, dtype=torch.float64)
        torch.testing.assert_close(cut(x, x, x)[0], silent(x, x, x)[0])
        masks = torch.randn(3, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(cut(x, x, x, attn_mask=masks[1:])[0], silent(x, x, x, attn_mask=masks)[0])
        with pytest.raises(ValueError, match="the 2 heads that are left"):
            cut(x, x, x, attn_mask=masks)

    def test_whole_heads_that_still_add_up_keep_the_class(self):
        module = self.build()
        old = {"in_proj_weight": (72, 24)}
        narrow_attention("", module, {}, old)
        assert type(module) is nn.MultiheadAttention and module.num_heads == 3

    def test_ragged_heads_are_refused(self):
        rows = np.delete(np.arange(72), [0, 24, 48])
        with pytest.raises(PlanError, match="different widths"):
            narrow_attention(
                "a", self.build(), {"a.in_proj_weight": {0: rows}}, {"a.in_proj_weight": (72, 24)}
            )

    def test_own_keys_are_refused(self):
        rows = np.delete(np.arange(72), [8 * h + 24 * i for h in range(3) for i in range(3)])
        with pytest.raises(PlanError, match="add_bias_kv"):
            narrow_attention(
                "",
                self.build(add_zero_attn=True),
                {"in_proj_weight": {0: rows}},
                {"in_proj_weight": (72, 24)},
            )


class HardCoded(nn.Module):
    """Every kind of number that a forward method can have written into it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.left, self.right = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 1)
        self.linear = nn.Linear(12 * 16, 5)
        self.small = nn.Conv2d(4, 6, 1)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        if self.kind == "view":
            return self.linear(x.view(x.shape[0], 12 * 16))  # here: view
        if self.kind == "slice":
            y = self.left(x)
            a = y[:, :4]  # here: slice
            return self.small(a) + self.small(y[:, 4:])
        if self.kind == "split":
            a, b = torch.split(self.left(x), 4, 1)  # here: split
            return torch.cat([self.small(a), b], 1)
        if self.kind == "silent":
            return self.last(torch.relu(self.left(x) * x.shape[1]))
        if self.kind == "ones":
            return self.last(torch.relu(self.left(x)) * torch.ones(8, 1, 1))  # here: ones
        raise AssertionError


def line_of(kind):
    lines, first = inspect.getsourcelines(HardCoded)
    return first + next(i for i, line in enumerate(lines) if f"# here: {kind}" in line)


class TestHardCodedWidths:
    def refused(self, kind):
        module = models.seeded(HardCoded(kind))
        before = state(module)
        with pytest.raises(PlanError) as caught:
            written_back(module, (torch.randn(1, 3, 4, 4),))
        assert_same_state(before, state(module))
        message = str(caught.value)
        assert "sartor.to_fx(sartor.apply_plan(program, plan))" in message
        return message

    @pytest.mark.parametrize("kind", ["view", "split", "ones"])
    def test_names_the_line(self, kind):
        message = self.refused(kind)
        assert f"test_writeback.py:{line_of(kind)}" in message and f"# here: {kind}" in message

    def test_names_the_slice_and_where_it_fails(self):
        message = self.refused("slice")
        assert f"the line test_writeback.py:{line_of('slice')}" in message
        assert f"fails at test_writeback.py:{line_of('slice') + 1}" in message

    def test_a_silent_difference_is_seen(self):
        assert "the result differs by" in self.refused("silent")

    def test_the_way_out_works(self):
        module = models.seeded(HardCoded("view"))
        program = sartor.capture(module, torch.randn(1, 3, 4, 4))
        plan = halved(program)
        twin = sartor.to_fx(sartor.apply_plan(program, plan))
        assert twin(torch.randn(2, 3, 4, 4))[0].shape == (2, 5)


class OwnAttention(nn.Module):
    """Heads and widths in attributes, as most libraries write it; three heads, like query, key and value."""

    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.num_heads, self.head_dim, self.all_head_dim = heads, dim // heads, dim
        self.patch = 3  # a number of the same size that means something else
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)  # here: scale
        return self.proj(y.transpose(1, 2).reshape(n, t, self.all_head_dim))


class TestNumbersInAttributes:
    @pytest.fixture(scope="class")
    @staticmethod
    def attention():
        module = models.seeded(nn.Sequential(nn.Linear(5, 24), OwnAttention()))
        program = sartor.capture(module, torch.randn(1, 7, 5))
        return module, program, {g.size: g.name for g in channel_groups(program).groups}

    def test_heads_follow(self, attention):
        module, program, groups = attention
        plan = Plan(program.source.sha256, {groups[3]: GroupPlan(3, (0, 2))})
        result = sartor.apply_to_module(module, plan, program=program)
        own = result[1]
        assert (own.num_heads, own.head_dim, own.all_head_dim, own.patch) == (2, 8, 16, 3)
        assert module[1].num_heads == 3 and own.qkv.out_features == 48
        assert difference(result, program, plan) < ATTENTION

    def test_a_derived_scale_is_named(self, attention):
        module, program, groups = attention
        plan = Plan(program.source.sha256, {groups[8]: GroupPlan(8, (0, 1, 4, 6))})
        with pytest.raises(PlanError, match="derives the scale of attention") as caught:
            sartor.apply_to_module(module, plan, program=program)
        assert "# here: scale" in str(caught.value) and module[1].head_dim == 8

    def test_what_is_computed_from_them_is_not_guessed(self):
        module, _ = models.tiny_vit()
        program = models.captured("vit")
        with pytest.raises(PlanError, match=r"models\.py:\d+ \(`q, k, v = self\.qkv\(x\)\.reshape"):
            sartor.apply_to_module(module, halved(program), program=program)


class TestBlocks:
    def test_a_whole_module(self):
        module, _ = models.tiny_resnet()
        program = models.captured("resnet")
        names = [b.name for b in residual_blocks(program) if b.removable]
        plan = Plan(program.source.sha256, blocks=("layer1.1",), groups=halved(program).groups)
        assert "layer1.1" in names
        result = sartor.apply_to_module(module, plan, program=program)
        assert isinstance(result.layer1[1], Shortcut) and isinstance(module.layer1[1], models.BasicBlock)
        assert difference(result, program, plan) < ATTENTION

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_branch(self, vit, which):
        module, program = vit
        block = [b for b in residual_blocks(program) if b.removable][which]
        plan = Plan(program.source.sha256, blocks=(block.name,))
        result = sartor.apply_to_module(module, plan, program=program)
        assert difference(result, program, plan) < ATTENTION
        gone = (
            (result.blocks[0].attn, result.blocks[0].norm1)
            if which == 0
            else (result.blocks[0].mlp, result.blocks[0].norm2)
        )
        assert isinstance(gone[0], Nothing) and isinstance(gone[1], Shortcut)

    def test_both_branches(self, vit):
        module, program = vit
        names = tuple(b.name for b in residual_blocks(program) if b.removable)[:2]
        plan = Plan(program.source.sha256, blocks=names)
        result = sartor.apply_to_module(module, plan, program=program)
        assert isinstance(result.blocks[0], Shortcut)
        assert difference(result, program, plan) < ATTENTION

    def test_a_branch_without_a_module_is_refused(self):
        class Bare(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(6, 6)
                self.weight = nn.Parameter(torch.zeros(6, 6))
                self.last = nn.Linear(6, 3)

            def forward(self, x):
                x = self.first(x)
                return self.last(x + functional.linear(torch.tanh(x), self.weight))

        module = models.seeded(Bare())
        program = sartor.capture(module, torch.randn(2, 6))
        block = next(b for b in residual_blocks(program) if b.removable)
        with pytest.raises(PlanError, match=r"no module of its own.*Add.*test_writeback\.py.*sartor\.to_fx"):
            sartor.apply_to_module(module, Plan(program.source.sha256, blocks=(block.name,)), program=program)


class TestRefusals:
    def test_neither_examples_nor_program(self):
        module, _ = models.tiny_vgg()
        with pytest.raises(UsageError, match="give example_inputs, or program="):
            sartor.apply_to_module(module, halved(models.captured("vgg")))

    def test_a_plan_of_another_model(self):
        module, example = models.tiny_vgg()
        with pytest.raises(PlanError, match="made for a model with SHA-256"):
            sartor.apply_to_module(module, halved(models.captured("resnet")), example)

    def test_a_program_of_another_module(self):
        program = models.captured("vgg")
        with pytest.raises(UsageError, match="no parameter of this module"):
            sartor.apply_to_module(nn.Bilinear(3, 3, 3), halved(program), program=program)
        module = models.TinyVgg(classes=11)
        with pytest.raises(UsageError, match=r"'classifier.3.bias' has shape \[11\].*\[10\]"):
            sartor.apply_to_module(module, halved(program), program=program)

    def test_no_module_no_plan(self):
        module, example = models.tiny_vgg()
        with pytest.raises(UsageError, match=r"Expected a torch.nn.Module, got 'function'"):
            sartor.apply_to_module(print_nothing, halved(models.captured("vgg")), example)
        with pytest.raises(UsageError, match=r"Expected a sartor.Plan, got 'dict'"):
            sartor.apply_to_module(module, {}, example)

    def test_parametrized(self):
        module, example = models.tiny_vgg()
        plan = halved(models.captured("vgg"))
        parametrizations.weight_norm(module.features[0])
        with pytest.raises(
            UsageError, match=r"'features.0'.*computes 'weight' from other tensors.*remove_param"
        ):
            sartor.apply_to_module(module, plan, example)

    def test_pruning_masks(self):
        module, example = models.tiny_vgg()
        plan = halved(models.captured("vgg"))
        prune.random_unstructured(module.features[0], "weight", 0.5)
        with pytest.raises(UsageError, match=r"'features.0'.*before every call \(RandomUnstructured\)"):
            sartor.apply_to_module(module, plan, example)

    def test_a_module_that_cannot_be_copied(self):
        module, _ = models.tiny_vgg()
        module.last_features = torch.randn(3, requires_grad=True) * 2
        with pytest.raises(UsageError, match="cannot be copied"):
            sartor.apply_to_module(module, halved(models.captured("vgg")), program=models.captured("vgg"))

    def test_a_module_that_is_random(self):
        class Noisy(models.TinyVgg):
            def forward(self, x):
                return super().forward(x + torch.randn(()) * self.training + self.noise())

            def noise(self):
                Noisy.count = getattr(Noisy, "count", 0) + 1
                return float(Noisy.count)

        module = models.seeded(Noisy())
        program = models.captured("vgg")
        with pytest.raises(
            UsageError, match="itself does not compute what its program computes: it differs by"
        ):
            sartor.apply_to_module(module, halved(program), program=program)

    def test_a_module_in_float32(self):
        class Single(models.TinyVgg):
            def forward(self, x):
                dtype = x.dtype
                return super().forward(x.float().to(dtype))

        result, _, _ = written_back(models.seeded(Single()), models.example(*IMAGE))
        assert result.features[0].out_channels == 4

    def test_parts_that_only_training_uses(self):
        class Auxiliary(models.TinyVgg):
            def __init__(self):
                super().__init__()
                self.aux = nn.Conv2d(8, 10, 1)

            def forward(self, x):
                y = self.features[1](self.features[0](x))
                result = self.classifier(torch.flatten(self.features[2:](y), 1))
                return (result, self.aux(y)) if self.training else result

        with pytest.raises(PlanError, match=r"'aux.weight' is not read at inference.*test_writeback\.py"):
            written_back(models.seeded(Auxiliary()), models.example(*IMAGE))


def print_nothing(x):
    return x


class TestPlanted:
    """Each bug of the write-back itself is caught by its own proof."""

    def caught(self, name="mobilenet"):
        module, _ = models.ALL[name]()
        program = models.captured(name)
        with pytest.raises((PlanError, UsageError)) as caught:
            sartor.apply_to_module(module, halved(program), program=program)
        return str(caught.value)

    def test_groups_not_updated(self, monkeypatch):
        monkeypatch.setattr(layers._Layer, "numbers", lambda *_: set())
        assert "RuntimeError" in self.caught()

    def test_num_groups_not_updated(self, monkeypatch):
        module = models.seeded(nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.Conv2d(12, 3, 1)))
        program = sartor.capture(module, torch.randn(IMAGE))
        monkeypatch.setattr(layers, "_group_norm", lambda layer: None)
        updates = tuple(
            (kinds, (lambda layer: None) if kinds == (nn.GroupNorm,) else f) for kinds, f in layers._UPDATES
        )
        monkeypatch.setattr(layers, "_UPDATES", updates)
        plan = Plan(
            program.source.sha256,
            groups={g.name: GroupPlan(g.size, (0, 1)) for g in channel_groups(program).groups},
        )
        with pytest.raises(PlanError, match=r"'1' \(GroupNorm\)|differs"):
            sartor.apply_to_module(module, plan, program=program)

    def test_a_stale_module_is_noticed(self, monkeypatch):
        """The proof compares what the forward method computes, not only shapes."""
        real = models.TinyVgg.forward
        monkeypatch.setattr(
            models.TinyVgg,
            "forward",
            lambda self, x: real(self, x) * (1 + 1e-6 * (self.features[0].out_channels != 8)),
        )
        assert "differs by 1e-06" in self.caught("vgg")

    def test_wrong_indices(self, monkeypatch):
        real = tensors._cut

        def shifted(tensor, axes):
            return real(
                tensor, {axis: np.roll(kept, 1) if axis == 1 else kept for axis, kept in axes.items()}
            )

        monkeypatch.setattr(tensors, "_cut", shifted)
        module = models.seeded(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
        program = sartor.capture(module, torch.randn(1, 6))
        with pytest.raises(PlanError, match="differs by"):
            sartor.apply_to_module(module, halved(program), program=program)

    def test_a_lost_attention_scale(self, vit, monkeypatch):
        module, program = vit
        lost = property(lambda attention: attention.qk_head_dim**-0.5, lambda *_: None)
        monkeypatch.setattr(NarrowMultiheadAttention, "scale", lost, raising=False)
        with pytest.raises(PlanError, match="differs by"):
            sartor.apply_to_module(module, halved(program), program=program)

    def test_the_recorder_sees_only_the_authors_calls(self):
        module, example = models.tiny_vit()
        calls, _ = culprit._trace(module, list(example))
        assert {Path(call.path).name for call in calls} == {"models.py"}
        assert {call.function for call in calls} >= {"reshape", "scaled_dot_product_attention", "gelu", "cat"}
        counts = [count for _, count in culprit._counted(calls)]
        assert max(counts) == 1 and len(calls) == len(
            {(c.path, c.line, c.function, n) for c, n in culprit._counted(calls)}
        )


torchvision_missing = importlib.util.find_spec("torchvision") is None


@pytest.mark.skipif(torchvision_missing, reason="torchvision is not installed")
class TestTorchvision:
    @pytest.fixture(scope="class")
    @staticmethod
    def library():
        import zoo_models

        return zoo_models.import_torchvision()

    @pytest.mark.parametrize(("name", "options"), [("resnet18", {}), ("mobilenet_v2", {}), ("vgg11", {})])
    def test_networks(self, library, name, options):
        torch.manual_seed(0)
        module = library.models.get_model(name, weights=None, num_classes=7)
        if name == "vgg11":  # its classifier has 120 million parameters
            module.classifier = nn.Sequential(nn.Linear(512 * 49, 16), nn.ReLU(), nn.Linear(16, 7))
        module = module.eval()
        program = sartor.capture(module, torch.randn(1, 3, 64, 64))
        plan = halved(program)
        result = sartor.apply_to_module(module, plan, program=program)
        assert sum(p.numel() for p in result.parameters()) < 0.4 * sum(p.numel() for p in module.parameters())
        assert difference(result, program, plan) < 1e-9


def test_a_module_captured_before_needs_no_examples():
    module, example = models.tiny_vgg()
    program = sartor.capture(module, example)
    group = channel_groups(program).groups[0]
    plan = Plan(program.source.sha256, groups={group.name: GroupPlan(group.size, (0, 2))})
    small = sartor.apply_to_module(module, plan)
    assert dict(small.named_parameters())[f"{group.name}.weight"].shape[0] == 2
    with pytest.raises(UsageError, match="give example_inputs"):
        sartor.apply_to_module(models.tiny_vgg()[0], plan)
