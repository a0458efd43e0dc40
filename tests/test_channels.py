"""Channel groups of whole networks and of small graphs that each need one rule to be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import random_inputs, relative_error
from onnx import TensorProto, helper
from random_graphs import Net, build

from sartor.errors import PlanError, UsageError
from sartor.ir.channels import ChannelAnalysis, channel_groups, docs
from sartor.ir.fx import run_twin
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.program import Program
from sartor.ir.verify import verify_program
from sartor.passes.masked import masked
from sartor.passes.prune import apply_plan

DOCUMENT = Path(__file__).parents[1] / "docs" / "channels.md"


def summary(analysis: ChannelAnalysis) -> list[tuple[str, int, int]]:
    return [(g.name, g.size, g.granularity) for g in analysis.groups]


def members(analysis: ChannelAnalysis, name: str) -> dict[tuple[str, int], tuple[str, list[int]]]:
    return {(m.initializer, m.axis): (m.role, m.index_map.tolist()) for m in analysis.group(name).members}


def shapes_after(program: Program, analysis: ChannelAnalysis, **keep: list[int]) -> dict[str, tuple]:
    """Parameter shapes after a plan, which is first shown to compute what the masked original does."""
    groups = {n: GroupPlan(analysis.group(n).size, tuple(k)) for n, k in keep.items()}
    plan = Plan(program.source.sha256, groups)
    pruned = apply_plan(program, plan, analysis)
    verify_program(pruned)
    reference, zeroed = masked(program, plan, analysis)
    assert zeroed
    feeds = random_inputs(program, seed=3)
    expected, whole = run_twin(reference, feeds), run_twin(program, feeds)
    assert relative_error(expected, run_twin(pruned, feeds)) < 1e-9
    assert relative_error(expected, whole) > 1e-3, "the plan changes nothing: the comparison is vacuous"
    return {name: pruned.initializer_array(name).shape for name in pruned.initializers}


# ---- whole networks --------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.ALL)
def test_every_producing_axis_is_grouped_or_blocked_with_a_reason(name):
    program = models.captured(name)
    analysis = channel_groups(program)
    grouped = {(m.initializer, m.axis) for g in analysis.groups for m in g.members}
    blocked = {(b.value, b.axis) for b in analysis.blocked}
    for node in program.nodes():
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            weight = node.inputs[1].name
            if weight not in program.initializers:
                continue
            rank = len(program.initializer_array(weight).shape)
            depthwise = node.attributes.get("group")
            if depthwise is not None and depthwise.value > 1:
                continue
            if node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes["transB"].value):
                axis = 0
            else:
                axis = 1 if node.op_type == "ConvTranspose" else rank - 1
            assert (weight, axis) in grouped | blocked, f"{weight} axis {axis} is unaccounted for"
    for entry in analysis.blocked:
        assert entry.reason and entry.source and entry.channels > 0
        assert entry.channels <= program.initializer_array(entry.value).shape[entry.axis]


@pytest.mark.parametrize("name", models.ALL)
def test_index_maps_cover_their_axes_and_units(name):
    program = models.captured(name)
    for group in channel_groups(program).groups:
        assert group.size >= 2
        assert group.members[0].role == "producer"
        producers = group.members_with("producer")
        units = np.concatenate([m.index_map for m in producers])
        assert set(units.tolist()) - {-1} == set(range(group.size))
        for member in group.members:
            assert member.index_map.shape == (
                program.initializer_array(member.initializer).shape[member.axis],
            )
            assert member.index_map.min() >= -1 and member.index_map.max() < group.size
        counts = np.bincount(producers[0].index_map[producers[0].index_map >= 0], minlength=group.size)
        assert counts.max() == group.granularity


@pytest.mark.parametrize("name", models.ALL)
def test_a_parameter_index_has_one_unit_per_direction(name):
    """Groups of one kind never share an index; two directions of a joint factor may cross."""
    seen: dict[tuple[str, int], np.ndarray] = {}
    for group in channel_groups(models.captured(name)).groups:
        if group.kind == "channels":
            for member in group.members:
                taken = seen.setdefault(
                    (member.initializer, member.axis), np.zeros(member.index_map.shape, int)
                )
                taken += member.index_map >= 0
    assert all((taken <= 1).all() for taken in seen.values())


@pytest.mark.parametrize("name", models.ALL)
def test_extents_at_full_width_are_the_shapes(name):
    program = models.captured(name)
    analysis = channel_groups(program)
    assert set(analysis.extents) == set(program.shapes())
    for value, shape in program.shapes().items():
        assert tuple(float(e.evaluate({})) for e in analysis.extents[value]) == shape


@pytest.mark.parametrize("name", models.ALL)
def test_extents_follow_a_plan_exactly_where_units_weigh_the_same(name):
    """Half of every group: the extents predict the inferred shapes of the pruned program."""
    program = models.captured(name)
    analysis = channel_groups(program)
    groups = {g.name: GroupPlan(g.size, tuple(range(0, g.size, 2))) for g in analysis.groups}
    plan = Plan(program.source.sha256, groups)
    shapes = apply_plan(program, plan, analysis).shapes()
    fractions = plan.fractions()
    for value, extents in analysis.extents.items():
        if value in shapes and value not in program.initializers:
            predicted = [float(e.evaluate(fractions)) for e in extents]
            assert predicted == pytest.approx(shapes[value], abs=1e-6), value


def test_groups_of_resnet():
    analysis = channel_groups(models.captured("resnet"))
    assert summary(analysis) == [
        ("stem.0", 8, 1),
        ("layer1.0.conv1", 8, 1),
        ("layer1.1.conv1", 8, 1),
        ("layer2.0.conv1", 16, 1),
        ("layer2.0.conv2", 16, 1),
        ("layer2.1.conv1", 16, 1),
    ]
    stem = analysis.group("stem.0")
    assert [(m.initializer, m.axis) for m in stem.members_with("producer")] == [
        ("stem.0.weight", 0),
        ("layer1.0.conv2.weight", 0),
        ("layer1.1.conv2.weight", 0),
    ]
    assert {(m.initializer, m.axis) for m in stem.members_with("consumer")} == {
        ("layer1.0.conv1.weight", 1),
        ("layer1.1.conv1.weight", 1),
        ("layer2.0.conv1.weight", 1),
        ("layer2.0.downsample.0.weight", 1),
    }
    assert len(stem.members_with("affine")) == 3 * 4
    (head,) = analysis.blocked
    assert (head.value, head.axis, head.channels) == ("fc.weight", 0, 10)
    assert "reaches the graph output" in head.reason and "(Gemm) at fc (Linear) models.py:" in head.source


def test_groups_of_densenet_see_their_segment_of_every_concatenation():
    analysis = channel_groups(models.captured("densenet"))
    assert [s for s in summary(analysis) if "conv2" in s[0] or s[0] == "conv0.0"] == [
        ("conv0.0", 8, 1),
        ("layers.0.conv2", 4, 1),
        ("layers.1.conv2", 4, 1),
        ("layers.2.conv2", 4, 1),
        ("last.conv2", 6, 1),
    ]
    second = members(analysis, "layers.1.conv2")
    assert second["transition.2.weight", 1] == ("consumer", [-1] * 12 + [0, 1, 2, 3] + [-1] * 4)
    assert second["layers.2.norm1.running_var", 0] == ("affine", [-1] * 12 + [0, 1, 2, 3])
    assert ("layers.1.norm1.weight", 0) not in second


@pytest.mark.parametrize("name", ["vit", "vit_manual"])
def test_groups_of_vit(name):
    analysis = channel_groups(models.captured(name))
    assert summary(analysis) == [
        ("blocks.0.attn.qkv[3x24]", 3, 24),
        ("blocks.0.attn.qkv[8x9]", 8, 9),
        ("blocks.0.fc1", 40, 1),
        ("blocks.1.attn.qkv[3x24]", 3, 24),
        ("blocks.1.attn.qkv[8x9]", 8, 9),
        ("blocks.1.fc1", 40, 1),
    ]
    heads = members(analysis, "blocks.0.attn.qkv[3x24]")
    assert heads["blocks.0.attn.qkv.weight", 0] == ("producer", np.tile(np.repeat([0, 1, 2], 8), 3).tolist())
    assert heads["blocks.0.attn.proj.weight", 1] == ("consumer", np.repeat([0, 1, 2], 8).tolist())
    dims = members(analysis, "blocks.0.attn.qkv[8x9]")
    assert dims["blocks.0.attn.qkv.bias", 0] == ("affine", np.tile(np.arange(8), 9).tolist())
    reasons = {b.value: (b.reason, b.source) for b in analysis.blocked}
    assert set(reasons) == {
        "patch_embed.weight",
        *(f"blocks.{i}.{p}.weight" for i in (0, 1) for p in ("attn.proj", "fc2")),
        "head.weight",
    }
    reason, source = reasons["blocks.1.fc2.weight"]
    assert reason.startswith("LayerNormalization mixes") and "(LayerNorm) models.py:" in source


def test_flatten_repeats_each_channel_once_per_pixel():
    analysis = channel_groups(models.captured("vgg"))
    assert summary(analysis) == [("features.0", 8, 1), ("features.3", 12, 1), ("classifier.0", 20, 1)]
    role, index_map = members(analysis, "features.3")["classifier.0.weight", 1]
    assert role == "consumer" and index_map == np.repeat(np.arange(12), 16).tolist()


# ---- names and order -------------------------------------------------------------------------


def shape_of_groups(analysis: ChannelAnalysis, rename: Callable[[str], str] = str) -> set:
    """Groups as sets of index maps, with units in the order of their first appearance by sorted member."""
    result = set()
    for group in analysis.groups:
        ordered = sorted((rename(m.initializer), m.axis, m.role, m.index_map.tolist()) for m in group.members)
        order: dict[int, int] = {-1: -1}
        canonical = tuple(
            (n, a, r, tuple(order.setdefault(u, len(order) - 1) for u in maps)) for n, a, r, maps in ordered
        )
        result.add(
            (group.size, group.granularity if len(group.members_with("producer")) == 1 else 0, canonical)
        )
    return result


@pytest.mark.parametrize("name", models.ALL)
def test_renamed_nodes_and_values_give_the_same_groups(name):
    program = models.captured(name)
    renamed = program.clone()
    for number, node in enumerate(renamed.nodes()):
        node.name = f"n{1000 - number}"
        for output in node.outputs:
            if not output.is_graph_output():
                output.name = f"v{number}_{output.index()}"
    renamed.invalidate()
    assert shape_of_groups(channel_groups(renamed)) == shape_of_groups(channel_groups(program))


def reordered(program: Program, seed: int) -> Program:
    """The same nodes in another valid order."""
    generator = np.random.default_rng(seed)
    clone = program.clone()
    waiting = list(clone.nodes())
    made = {v.name for v in clone.graph.inputs} | set(clone.initializers)
    order: list[ir.Node] = []
    while waiting:
        ready = [n for n in waiting if all(v is None or v.name in made for v in n.inputs)]
        chosen = ready[int(generator.integers(len(ready)))]
        waiting.remove(chosen)
        order.append(chosen)
        made |= {v.name for v in chosen.outputs}
    clone.graph.remove(order)
    clone.graph.extend(order)
    clone.invalidate()
    return clone


@pytest.mark.parametrize("name", models.ALL)
def test_another_topological_order_gives_the_same_groups(name):
    program = models.captured(name)
    expected = shape_of_groups(channel_groups(program))
    for seed in range(3):
        assert shape_of_groups(channel_groups(reordered(program, seed))) == expected


def test_analysis_does_not_depend_on_the_run():
    program = models.captured("densenet")
    one, two = channel_groups(program), channel_groups(program.clone())
    assert [g.name for g in one.groups] == [g.name for g in two.groups]
    for a, b in zip(one.groups, two.groups, strict=True):
        assert all((m.index_map == n.index_map).all() for m, n in zip(a.members, b.members, strict=True))


# ---- small graphs ----------------------------------------------------------------------------


def test_grouped_convolution_can_lose_groups_or_the_same_channels_of_every_group():
    net = Net(3, 4, 4)
    y = net.relu(net.conv("x", 8, 3))
    y = net.conv(net.relu(net.conv(y, 12, 3, groups=4, bias=True)), 2)
    program = net.program(y)
    analysis = channel_groups(program)
    assert summary(analysis) == [("w[4x2]", 4, 2), ("w[2x4]", 2, 4), ("w2[3x4]", 3, 4)]
    rows = members(analysis, "w[4x2]")
    assert rows["w", 0] == ("producer", np.repeat(np.arange(4), 2).tolist())
    assert rows["w2", 0] == ("producer", np.repeat(np.arange(4), 3).tolist())
    assert ("w2", 1) not in rows
    assert members(analysis, "w[2x4]")["w2", 1] == ("consumer", [0, 1])
    shapes = shapes_after(program, analysis, **{"w[4x2]": [0, 3], "w[2x4]": [1], "w2[3x4]": [0, 2]})
    assert shapes["w"][0] == 2 and shapes["w2"][:2] == (4, 1) and shapes["w3"][1] == 4


def test_grouped_convolution_of_an_input_without_labels_keeps_its_groups():
    net = Net(4, 4, 4)
    program = net.program(net.conv(net.relu(net.conv("x", 8, 3, groups=2)), 2))
    assert summary(channel_groups(program)) == [("w[4x2]", 4, 2)]


def test_depthwise_multiplier_two():
    net = Net(3, 4, 4)
    program = net.program(net.conv(net.relu(net.conv(net.conv("x", 4, 3), 8, 3, groups=4)), 2))
    analysis = channel_groups(program)
    assert [(g.size, g.granularity) for g in analysis.groups] == [(4, 1), (2, 4)]
    first, second = analysis.groups
    assert members(analysis, first.name)["w2", 0][1] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert members(analysis, second.name)["w2", 0][1] == [0, 1] * 4
    shapes = shapes_after(program, analysis, **{first.name: [0, 2, 3]})
    assert shapes["w2"][0] == 6


def test_depthwise_weights_only_follow():
    net = Net(3, 4, 4)
    program = net.program(net.conv(net.relu(net.conv(net.conv("x", 4, 3), 4, 3, groups=4)), 2))
    analysis = channel_groups(program)
    assert summary(analysis) == [("w", 4, 1)]
    assert members(analysis, "w")["w2", 0] == ("affine", [0, 1, 2, 3])


def test_channel_shuffle_between_grouped_convolutions():
    net = Net(3, 4, 4)
    y = net.shuffle(net.conv(net.conv("x", 8, 1), 8, 3, groups=2), 2)
    program = net.program(net.conv(net.relu(net.conv(y, 8, 1, groups=2)), 2))
    analysis = channel_groups(program)
    assert summary(analysis) == [("w[2x4]", 2, 4), ("w[4x2]", 4, 2), ("w2[2x4]", 2, 4), ("w3[4x2]", 4, 2)]
    assert members(analysis, "w[2x4]")["w3", 1] == ("consumer", [0, 1, 0, 1])
    assert members(analysis, "w2[2x4]")["w2", 0] == ("producer", [0, 0, 1, 1, 0, 0, 1, 1])
    shapes = shapes_after(program, analysis, **{"w[4x2]": [0, 2, 3], "w2[2x4]": [1]})
    assert shapes["w2"][:2] == (4, 3) and shapes["w3"][0] == 4


def test_squeeze_excite_ties_the_gate_to_its_input():
    net = Net(3, 4, 4)
    program = net.program(net.conv(net.relu(net.squeeze_excite(net.conv("x", 6, 1), 3)), 2))
    analysis = channel_groups(program)
    assert summary(analysis) == [("w", 6, 1), ("w2", 3, 1)]
    assert set(members(analysis, "w")) == {("w", 0), ("w3", 0), ("b2", 0), ("w2", 1), ("w4", 1)}
    shapes_after(program, analysis, w=[0, 2, 5], w2=[1])


def test_concat_of_two_producers():
    net = Net(3, 4, 4)
    y = net.op("Concat", net.conv("x", 3), net.conv("x", 5), axis=1)
    program = net.program(net.conv(net.relu(y), 2))
    analysis = channel_groups(program)
    assert summary(analysis) == [("w", 3, 1), ("w2", 5, 1)]
    assert members(analysis, "w2")["w3", 1] == ("consumer", [-1, -1, -1, 0, 1, 2, 3, 4])
    shapes = shapes_after(program, analysis, w=[2], w2=[0, 4])
    assert shapes["w3"][1] == 3


def test_concat_with_the_input_image():
    net = Net(3, 4, 4)
    program = net.program(net.conv(net.relu(net.op("Concat", "x", net.conv("x", 5), axis=1)), 2))
    analysis = channel_groups(program)
    assert members(analysis, "w")["w2", 1] == ("consumer", [-1, -1, -1, 0, 1, 2, 3, 4])
    assert shapes_after(program, analysis, w=[1, 3])["w2"][1] == 5


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_pixel_shuffle_removes_multiples_of_its_square(mode):
    net = Net(3, 4, 4)
    y = net.op("DepthToSpace", net.conv("x", 12, 1), blocksize=2, mode=mode)
    program = net.program(net.conv(net.relu(y), 2))
    analysis = channel_groups(program)
    assert summary(analysis) == [("w[3x4]", 3, 4)]
    inner = np.repeat([0, 1, 2], 4) if mode == "CRD" else np.tile([0, 1, 2], 4)
    assert members(analysis, "w[3x4]")["w", 0] == ("producer", inner.tolist())
    assert shapes_after(program, analysis, **{"w[3x4]": [0, 2]})["w"][0] == 8


def attention(kind: str, heads: int = 3, dims: int = 4) -> Program:
    net = Net(5, 6)
    tokens = 5
    if kind == "split":
        parts = net.split(net.linear("x", 3 * heads * dims), [heads * dims] * 3, 2)
        q, k, v = (net.heads(p, heads, dims) for p in parts)
    elif kind == "gather":
        y = net.reshape(net.linear("x", 3 * heads * dims), 0, tokens, 3, heads, dims)
        y = net.op("Transpose", y, perm=[2, 0, 3, 1, 4])
        index = [net._add(np.array(i, np.int64), "index") for i in range(3)]
        q, k, v = (net.op("Gather", y, i, axis=0) for i in index)
    else:
        q = net.heads(net.linear("x", 2 * heads * dims), 2 * heads, dims)
        pair = []
        for _ in range(2):
            y = net.op("Unsqueeze", net.heads(net.linear("x", heads * dims), heads, dims), net.constant([2]))
            y = net.op("Expand", y, net.constant([1, heads, 2, tokens, dims]))
            pair.append(net.reshape(y, 0, 2 * heads, tokens, dims))
        k, v = pair
    return net.program(net.linear(net.attend(q, k, v), 3))


def test_fused_qkv_cut_by_split_has_its_own_directions_for_keys_and_values():
    program = attention("split")
    analysis = channel_groups(program)
    assert [(g.size, g.granularity) for g in analysis.groups] == [(3, 12), (4, 6), (4, 3)]
    heads, keys, values = analysis.groups
    role, index_map = members(analysis, heads.name)["w", 1]
    assert role == "producer" and index_map == np.tile(np.repeat([0, 1, 2], 4), 3).tolist()
    assert members(analysis, keys.name)["w", 1][1] == [*([0, 1, 2, 3] * 6), *([-1] * 12)]
    assert members(analysis, values.name)["w", 1][1] == [*([-1] * 24), *([0, 1, 2, 3] * 3)]
    shapes = shapes_after(program, analysis, **{heads.name: [0, 2], keys.name: [1, 2], values.name: [3]})
    assert shapes["w"][1] == 2 * (2 + 2 + 1) and shapes["w2"][0] == 2


def test_fused_qkv_cut_by_reshape_and_gather_keeps_keys_and_values_alike():
    program = attention("gather")
    analysis = channel_groups(program)
    assert [(g.size, g.granularity) for g in analysis.groups] == [(3, 12), (4, 9)]
    heads, dims = analysis.groups
    assert members(analysis, dims.name)["w", 1][1] == [0, 1, 2, 3] * 9
    shapes = shapes_after(program, analysis, **{heads.name: [1], dims.name: [0, 3]})
    assert shapes["w"][1] == 3 * 1 * 2


def test_grouped_query_attention_removes_a_key_head_with_all_its_queries():
    program = attention("grouped-query")
    analysis = channel_groups(program)
    assert [(g.size, g.granularity) for g in analysis.groups] == [(3, 8), (4, 6), (4, 3)]
    heads = members(analysis, analysis.groups[0].name)
    assert heads["w", 1] == ("producer", np.repeat([0, 1, 2], 8).tolist())
    assert heads["w2", 1] == heads["w3", 1] == ("producer", np.repeat([0, 1, 2], 4).tolist())
    assert heads["w4", 0] == ("consumer", np.repeat([0, 1, 2], 8).tolist())
    shapes = shapes_after(program, analysis, **{analysis.groups[0].name: [0, 2]})
    assert shapes["w"][1] == 16 and shapes["w2"][1] == 8


def test_a_weight_used_twice_ties_all_its_sides():
    net = Net(4, 4, 4)
    w = net.weight(4, 4, 1, 1, name="shared")
    y = net.conv(net.conv("x", 4, 1), 4, 1, w=w)
    program = net.program(net.conv(net.conv(net.relu(y), 4, 1, w=w), 2))
    analysis = channel_groups(program)
    (group,) = analysis.groups
    assert group.size == 4
    assert {(m.initializer, m.axis) for m in group.members} == {
        ("w", 0),
        ("shared", 0),
        ("shared", 1),
        ("w2", 1),
    }
    assert shapes_after(program, analysis, **{group.name: [1, 2]})["shared"][:2] == (2, 2)


def test_padded_shortcut_keeps_a_channel_of_what_is_padded():
    net = Net(3, 4, 4)
    narrow = net.conv("x", 4, 1)
    wide = net.conv(net.relu(narrow), 8, 1)
    y = net.op("Add", net.op("Pad", narrow, net.constant([0, 0, 0, 0, 0, 4, 0, 0])), wide)
    program = net.program(net.conv(net.relu(y), 2))
    analysis = channel_groups(program)
    (group,) = analysis.groups
    assert group.size == 8 and [f.tolist() for f in group.floors] == [[0, 1, 2, 3]]
    shapes = shapes_after(program, analysis, **{group.name: [1, 2, 6]})
    assert shapes["w"][0] == 2 and shapes["w2"][:2] == (3, 2)
    plan = Plan(program.source.sha256, {group.name: GroupPlan(8, (4, 5, 6, 7))})
    with pytest.raises(PlanError):
        analysis.alive_atoms(plan)


def test_an_axis_that_sees_two_groups_in_part_cannot_become_empty():
    net = Net(3, 4, 4)
    y = net.op("Concat", net.conv("x", 4), net.conv("x", 4), axis=1)
    middle = net.conv(net.slice(y, 2, 6, 1), 2)
    program = net.program(middle, net.conv(y, 2))
    analysis = channel_groups(program)
    assert sorted(f.tolist() for g in analysis.groups for f in g.floors) in ([[2, 3]], [[0, 1]])


def test_an_axis_that_sees_one_group_whole_needs_no_floor():
    net = Net(3, 4, 4)
    y = net.op("Concat", net.conv("x", 4), net.conv("x", 4), axis=1)
    analysis = channel_groups(net.program(net.conv(net.slice(y, 2, 8, 1), 2), net.conv(y, 2)))
    assert [g.floors for g in analysis.groups] == [(), ()]


def test_an_axis_on_the_diagonal_of_two_directions_pins_a_unit_of_each():
    """Channels 0 and 3 of two groups of two: losing one group and the other's first channel leaves none."""
    net = Net(3, 4, 4)
    y = net.conv("x", 4, 1)
    z = net.op("Gather", y, net.constant([0, 3]), axis=1)
    program = net.program(net.conv(z, 2), net.conv(net.conv(y, 4, 3, groups=2), 2))
    analysis = channel_groups(program)
    rows, columns = analysis.groups[:2]
    assert [f.tolist() for f in rows.floors] == [[0]] and [f.tolist() for f in columns.floors] == [[0]]


def test_gemm_with_transposed_operands():
    net = Net(6, 7, fixed_batch=True)
    net.shapes["x"] = net.inputs["x"] = (6, 7)
    y = net.relu(net.op("Gemm", "x", net.weight(5, 7), net.shift(5), transB=1))
    y = net.op("Transpose", net.op("Gemm", y, net.weight(5, 9)), perm=[1, 0])
    program = net.program(net.op("Gemm", net.relu(y), net.weight(9, 2), transA=1))
    analysis = channel_groups(program)
    assert summary(analysis) == [("w", 5, 1), ("w2", 9, 1)]
    assert set(members(analysis, "w")) == {("w", 0), ("b", 0), ("w2", 0)}
    assert set(members(analysis, "w2")) == {("w2", 1), ("w3", 0)}
    shapes_after(program, analysis, w=[0, 4], w2=[1, 2, 8])


def test_matmul_with_a_constant_on_the_left():
    net = Net(6, 7)
    y = net.op("MatMul", net.weight(8, 6), "x")
    program = net.program(net.op("MatMul", net.weight(2, 8), net.relu(y)))
    analysis = channel_groups(program)
    assert summary(analysis) == [("w", 8, 1)]
    assert members(analysis, "w")["w2", 1][0] == "consumer"
    shapes_after(program, analysis, w=[0, 5, 6])


@pytest.mark.parametrize("space", [(9,), (4, 4, 4)])
def test_convolutions_over_one_and_three_axes(space):
    net = Net(3, *space)
    program = net.program(net.conv(net.relu(net.batch_norm(net.conv("x", 6, 3))), 2))
    analysis = channel_groups(program)
    assert summary(analysis) == [("w", 6, 1)] and len(analysis.groups[0].members) == 6
    shapes_after(program, analysis, w=[1, 4])


@pytest.mark.parametrize("groups, expected", [(1, []), (3, [(3, 2)]), (6, [(6, 1)])])
def test_group_normalization_blocks_within_its_groups(groups, expected):
    net = Net(3, 4, 4, fixed_batch=True)
    y = net.conv("x", 6, 3)
    net.shapes["y"] = net.shape(y)
    net.nodes.append(
        helper.make_node(
            "GroupNormalization", [y, net.scale(6), net.shift(6)], ["y"], "norm", num_groups=groups
        )
    )
    z = net.conv("y", 2)
    # ONNX infers no shape for GroupNormalization-21: its shapes are given by hand
    shapes = {**net.shapes, **{k: v.shape for k, v in net.arrays.items()}}
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, net.inputs["x"])
    out = helper.make_tensor_value_info(z, TensorProto.FLOAT, shapes[z])
    constants = [onnx.numpy_helper.from_array(v, k) for k, v in net.arrays.items()]
    graph = helper.make_graph(net.nodes, "main", [info], [out], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    plain = build([], {"x": net.inputs["x"]}, ["x"], {})
    program = Program(ir.from_proto(model), source=plain.source, input_shapes=net.inputs)
    program._shapes, program._types = shapes, dict.fromkeys(shapes, ir.DataType.FLOAT)
    analysis = channel_groups(program)
    assert [(g.size, g.granularity) for g in analysis.groups] == expected
    if not expected:
        assert analysis.blocked[0].reason == "GroupNormalization mixes values along this axis without weights"
        assert analysis.blocked[0].source == "'norm' (GroupNormalization)"


# ---- what blocks, and how it says so ---------------------------------------------------------


def only_reason(net: Net, *outputs: str, value: str = "w") -> tuple[str, str]:
    analysis = channel_groups(net.program(*outputs))
    (entry,) = (b for b in analysis.blocked if b.value == value)
    assert not any(
        m.initializer == value and m.axis == entry.axis for g in analysis.groups for m in g.members
    )
    return entry.reason, entry.source


@pytest.mark.parametrize(
    "op_type, inputs, attributes",
    [
        ("LRN", (), {"size": 3}),
        ("Softmax", (), {"axis": 1}),
        ("ReduceMax", ([1],), {}),
        ("ReduceMean", ([1, 2],), {"keepdims": 0}),
        ("CumSum", (1,), {}),
        ("ArgMax", (), {"axis": 1}),
    ],
)
def test_operators_that_mix_channels_say_so(op_type, inputs, attributes):
    net = Net(3, 4, 4)
    y = net.op(op_type, net.conv("x", 6), *(net.constant(i) for i in inputs), name="mix", **attributes)
    reason, source = only_reason(net, y)
    assert reason == f"{op_type} mixes values along this axis without weights"
    assert source == f"'node_mix' ({op_type})"


def test_layer_normalization_blocks_features_and_says_so():
    net = Net(5, 6)
    y = net.op("LayerNormalization", net.linear("x", 8), net.scale(8), net.shift(8), axis=-1, name="norm")
    reason, source = only_reason(net, net.linear(y, 2))
    assert reason.startswith("LayerNormalization mixes") and source == "'node_norm' (LayerNormalization)"


def test_outputs_block_and_say_so():
    net = Net(3, 4, 4)
    reason, source = only_reason(net, net.conv("x", 6, name="out"))
    assert reason.startswith("reaches the graph output") and source.endswith("(Conv)")


def test_meeting_an_axis_without_channels_blocks():
    net = Net(6, 4, 4)
    reason, source = only_reason(net, net.conv(net.op("Add", net.conv("x", 6), "x", name="meet"), 2))
    assert (
        reason == "meets values that no weight makes, such as a graph input" and source == "'node_meet' (Add)"
    )


def test_an_operator_without_a_rule_blocks_by_name():
    net = Net(3, 4, 4)
    reason, source = only_reason(net, net.op("Det", net.conv("x", 6), name="unknown"))
    assert reason == "operator 'Det' has no channel rule" and source == "'node_unknown' (Det)"


def test_an_operator_without_a_rule_blocks_a_weight_that_is_used_again_later():
    net = Net(4, 4, 4)
    w = net.weight(4, 4, 1, 1, name="shared")
    unknown = net.op("Det", w)
    y = net.conv(net.relu(net.conv("x", 4, 1, w=w)), 2)
    analysis = channel_groups(net.program(net.op("Add", y, unknown)))
    assert not any(m.initializer == "shared" for g in analysis.groups for m in g.members)
    assert {b.reason for b in analysis.blocked if b.value == "shared"} == {
        "operator 'Det' has no channel rule"
    }


def test_a_branch_that_is_not_canonical_blocks_what_it_captures():
    net = Net(3, 4, 4)
    y, kept = net.conv("x", 6, name="read"), net.conv("x", 5, name="beside")
    info = helper.make_tensor_value_info("inner", TensorProto.FLOAT, net.shape(y))
    branches = {
        f"{which}_branch": helper.make_graph(
            [helper.make_node(op, [y], ["inner"], f"{op}_in")], which, [], [info]
        )
        for which, op in (("then", "Relu"), ("else", "Neg"))
    }
    net.arrays["condition"] = np.array(True)
    net.nodes.append(helper.make_node("If", ["condition"], ["chosen"], "branch", **branches))
    net.shapes["chosen"] = net.shape(y)
    program = net.program(net.conv("chosen", 2), net.conv(kept, 2))
    analysis = channel_groups(program)
    assert [g.members[0].initializer for g in analysis.groups] == ["w2"]
    reasons = {b.value: (b.reason, b.source) for b in analysis.blocked}
    assert reasons["w"] == (
        "If with constants in its branches, or names that they share",
        "'branch' (If)",
    )


def test_keep_protects_parameters_nodes_and_modules():
    program = models.captured("resnet")
    every = {g.name for g in channel_groups(program).groups}
    cases = {  # a protected parameter keeps both axes, a protected node or module its outputs
        "layer1.0.conv1.*": {"layer1.0.conv1", "stem.0"},
        "layer2.1.conv1": {"layer2.1.conv1"},
        "node_conv2d_1": {"layer1.0.conv1"},
    }
    for pattern, protected in cases.items():
        analysis = channel_groups(program, keep=[pattern])
        assert every - {g.name for g in analysis.groups} == protected
        reasons = {b.reason for b in analysis.blocked if b.value.removesuffix(".weight") in protected}
        assert reasons == {f"protected by --keep '{pattern}'"}
    with pytest.raises(UsageError, match="nothing_like_it"):
        channel_groups(program, keep=["nothing_like_it*"])


def test_unknown_group_is_a_plan_error():
    analysis = channel_groups(models.captured("vgg"))
    with pytest.raises(PlanError, match="no channel group 'nowhere'"):
        analysis.group("nowhere")


# ---- rules that only matter beside others ----------------------------------------------------


def test_concat_where_another_part_shares_other_axes():
    """Concat along heads of a part labelled (heads, dims) and a part labelled (tokens, dims)."""
    net = Net(4, 6)
    first = net.heads(net.linear("x", 6, bias=False), 3, 2)
    mean = net.op("ReduceMean", "x", net.constant([1]), keepdims=0)
    second = net.reshape(net.op("MatMul", mean, net.weight(6, 8)), 0, 1, 4, 2)
    second = net.op("Expand", second, net.constant([1, 2, 4, 2]))
    y = net.op("Transpose", net.op("Concat", first, second, axis=1), perm=[0, 2, 1, 3])
    program = net.program(net.linear(net.reshape(y, 0, 4, 10), 2))
    analysis = channel_groups(program)
    for group in analysis.groups:
        for member in group.members:
            if member.initializer == "w2":
                tokens = member.index_map.reshape(4, 2)
                assert (tokens == tokens[:1]).all(), "tokens of one part cannot go without the others"
    dims = next(g for g in analysis.groups if any(m.initializer == "w2" for m in g.members))
    assert (dims.size, len(dims.members)) == (2, 3)
    shapes_after(program, analysis, **{dims.name: [1]})


def test_scales_of_quantized_weights_are_narrowed_with_them():
    net = Net(3, 4, 4)
    net.arrays["w8"] = np.arange(6 * 3, dtype=np.int8).reshape(6, 3, 1, 1)
    net.arrays["zero"] = np.zeros(6, np.int8)
    w = net.op("DequantizeLinear", "w8", net.scale(6, name="step"), "zero", axis=0)
    y = net.op("Conv", "x", w)
    analysis = channel_groups(net.program(net.conv(net.relu(y), 2)))
    (group,) = analysis.groups
    assert {(m.initializer, m.axis) for m in group.members} == {("w8", 0), ("step", 0), ("zero", 0), ("w", 1)}


def test_einsum_of_three_activations_zeroes_an_axis_that_the_first_does_not_have():
    net = Net(5, 6)
    a, b, c = (net.linear("x", width) for width in (4, 4, 3))
    y = net.op("Einsum", c, a, net.op("Softplus", b), equation="nsj,nti,nsi->ntj")
    program = net.program(net.linear(y, 2))
    analysis = channel_groups(program)
    assert sorted((g.size, len(g.members)) for g in analysis.groups) == [(3, 3), (4, 4)]
    shapes_after(program, analysis, **{g.name: [0, 2] for g in analysis.groups})


def test_statistics_of_layer_normalization_keep_the_other_axes():
    net = Net(5, 6)
    q = net.heads(net.linear("x", 12), 3, 4)
    y, mean, _ = net.op("LayerNormalization", q, net.scale(4), net.shift(4), axis=-1, outputs=3)
    y = net.op("Add", net.op("Transpose", net.op("Add", y, mean), perm=[0, 2, 1, 3]), net.shift(1, 1, 1, 1))
    program = net.program(net.linear(net.reshape(y, 0, 5, 12), 2))
    analysis = channel_groups(program)
    assert [(g.size, g.granularity) for g in analysis.groups] == [(3, 4)]
    shapes = shapes_after(program, analysis, **{analysis.groups[0].name: [0, 2]})
    assert shapes["w2"][0] == 8


# ---- the generated table ---------------------------------------------------------------------


def test_document_does_not_drift():
    assert DOCUMENT.read_text(encoding="utf-8") == docs.markdown(docs.EFFECTS), (
        "docs/channels.md differs from the rules; run: python -m sartor.ir.channels.docs docs/channels.md"
    )


def test_document_joins_operators_of_one_effect():
    text = docs.markdown({"B": "one | two", "A": "one | two", "C": "three"})
    assert "| `A` `B` | one \\| two |\n| `C` | three |\n" in text


def test_document_is_written_atomically(tmp_path, capsys):
    assert docs.main([str(tmp_path / "channels.md")]) == 0
    assert docs.main([]) == 0
    assert capsys.readouterr().out == (tmp_path / "channels.md").read_text(encoding="utf-8")
