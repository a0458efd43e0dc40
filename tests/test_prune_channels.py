"""prune-channels and apply_plan: before and expected, options, refusals, replay, and what a plan must not do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from builders import node, program_from_nodes, random_inputs, relative_error, structure_of
from models import captured

from sartor.errors import PlanError, UsageError
from sartor.ir.channels import channel_groups
from sartor.ir.fx import run_twin
from sartor.ir.load import load
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.verify import verify_program
from sartor.passes.base import Context
from sartor.passes.masked import masked
from sartor.passes.pipeline import Pipeline
from sartor.passes.prune import apply_plan
from sartor.passes.prune_channels import PruneChannels
from sartor.strategies.supply import importance

FAMILIES = ("mobilenet", "densenet", "vit", "vgg")
SUPPLIED = Context(extras={"importance": importance})


def arrays(keep=None):
    """Parameters of `tiny`; with `keep`, what should be left of them."""
    generator = np.random.default_rng(0)
    conv = generator.standard_normal((6, 3, 3, 3)) * np.asarray([1, 0.1, 2, 0.2, 3, 0.3]).reshape(6, 1, 1, 1)
    result = {
        "conv.weight": conv,
        "conv.bias": generator.standard_normal(6),
        "norm.weight": generator.uniform(0.5, 1.5, 6),
        "norm.bias": generator.standard_normal(6),
        "norm.mean": generator.standard_normal(6),
        "norm.variance": generator.uniform(0.5, 1.5, 6),
        "fc.weight": generator.standard_normal((5, 24)),
        "fc.bias": generator.standard_normal(5),
    }
    if keep is not None:
        flat = np.asarray([[4 * k + i for i in range(4)] for k in keep]).ravel()
        for name in result:
            if name == "fc.weight":
                result[name] = result[name][:, flat]
            elif name != "fc.bias":
                result[name] = result[name][list(keep)]
    return {name: array.astype(np.float32) for name, array in result.items()}


def tiny(keep=None):
    """Conv, BatchNorm, Relu, pool to 2 x 2, flatten by a constant, Gemm; `keep` writes the expected result."""
    width = 4 * (6 if keep is None else len(keep))
    return program_from_nodes(
        [
            node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], pads=[1, 1, 1, 1]),
            node("BatchNormalization", ["c", *(f"norm.{p}" for p in ("weight", "bias", "mean", "variance"))], ["n"]),
            node("Relu", ["n"], ["r"]),
            node("MaxPool", ["r"], ["p"], kernel_shape=[3, 3], strides=[3, 3]),
            node("Reshape", ["p", "shape"], ["f"]),
            node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1),
        ],
        {"x": ["N", 3, 6, 6]},
        ["y"],
        {**arrays(keep), "shape": np.asarray([-1, width])},
    )  # fmt: skip


def plan_of(program, **groups):
    sizes = {g.name: g.size for g in channel_groups(program).groups}
    return Plan(program.source.sha256, {k: GroupPlan(sizes[k], tuple(v)) for k, v in groups.items()})


def widths(plan):
    return {name: (entry.size, len(entry.keep)) for name, entry in plan.groups.items()}


# ---- before and expected ---------------------------------------------------------------------


@pytest.mark.parametrize("keep", [(0, 2, 4), (5,), (1, 2, 3, 4, 5)])
def test_before_and_expected(keep):
    before, expected = tiny(), tiny(keep)
    untouched = before.sha256()
    after = apply_plan(before, plan_of(before, conv=keep))
    verify_program(after)
    assert structure_of(after) == structure_of(expected) != structure_of(before)
    for name in expected.initializers:
        assert np.array_equal(after.initializer_array(name), expected.initializer_array(name)), name
    assert after.to_bytes() == expected.to_bytes()
    assert before.sha256() == untouched


def test_the_pass_does_what_its_plan_replays():
    program = tiny()
    result = PruneChannels(ratio=0.5, criterion="l2").run(program, SUPPLIED)
    assert result.plan.groups["conv"].keep == (0, 2, 4)  # the rows that are scaled up
    assert result.modified and result.counts["parameters_resized"] == 7
    assert (
        result.program.to_bytes() == apply_plan(program, result.plan).to_bytes() == tiny((0, 2, 4)).to_bytes()
    )
    assert result.program.source == program.source
    assert result.program.applied == ("prune-channels{ratio=0.5,criterion=l2}",)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_families_verify_and_keep_a_symbolic_batch(family):
    program = captured(family)
    untouched = program.sha256()
    pruned = PruneChannels(ratio=0.5, seed=1).run(program).program
    verify_program(pruned)
    assert program.sha256() == untouched
    assert pruned.batch.symbolic and pruned.batch == program.batch
    assert [str(v.shape) for v in pruned.graph.inputs] == [str(v.shape) for v in program.graph.inputs]
    assert [str(v.shape) for v in pruned.graph.outputs] == [str(v.shape) for v in program.graph.outputs]
    samples = [random_inputs(pruned, seed) for seed in range(3)]
    together = {k: np.concatenate([s[k] for s in samples]) for k in samples[0]}
    apart = [run_twin(pruned, sample) for sample in samples]
    expected = {k: np.concatenate([a[k] for a in apart]) for k in apart[0]}
    assert relative_error(expected, run_twin(pruned, together)) < 1e-12
    smaller = sum(pruned.initializer_array(n).size for n in pruned.initializers)
    assert smaller < 0.75 * sum(program.initializer_array(n).size for n in program.initializers)


def test_a_pruned_program_can_be_pruned_again():
    once = PruneChannels(ratio=0.5, seed=1).run(captured("resnet"))
    twice = PruneChannels(ratio=0.5, seed=2).run(once.program)
    verify_program(twice.program)
    for name, (size, kept) in widths(twice.plan).items():
        assert size == len(once.plan.groups[name].keep) and kept == size - size // 2


# ---- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 6), (0.1, 6), (0.2, 5), (0.5, 3), (0.84, 1), (0.99, 1)])
def test_option_ratio_is_rounded_down_and_keeps_a_unit(ratio, kept):
    program = tiny()
    result = PruneChannels(ratio=ratio).run(program)
    assert result.program.initializer_array("conv.weight").shape[0] == kept
    assert result.modified == (kept < 6)
    refused = [r for r in result.refusals if r.node == "conv"]
    assert bool(refused) == (ratio == 0.1)
    if refused:
        assert refused[0].reason == "6 units cannot lose 10%"


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_option_ratio_out_of_range(ratio):
    with pytest.raises(UsageError, match="ratio"):
        PruneChannels(ratio=ratio)


def test_ratio_counts_slices_of_their_granularity():
    """A head is one unit of several channels; two of three heads stay at one half."""
    program = captured("vit")
    plan = PruneChannels(ratio=0.5).run(program).plan
    assert widths(plan)["blocks.0.attn.qkv[3x24]"] == (3, 2)
    assert widths(plan)["blocks.0.attn.qkv[8x9]"] == (8, 4)
    pruned = apply_plan(program, plan)
    assert pruned.initializer_array("blocks.0.attn.qkv.weight").shape == (3 * 2 * 4, 24)


def test_option_seed_and_criterion_random():
    program = captured("mobilenet")
    plans = {seed: PruneChannels(ratio=0.5, seed=seed).run(program).plan for seed in (0, 1)}
    again = PruneChannels(ratio=0.5, seed=0, criterion="random").run(program).plan
    assert plans[0].groups == again.groups
    differing = [k for k in plans[0].groups if plans[0].groups[k] != plans[1].groups[k]]
    assert len(differing) >= 4
    assert widths(plans[0]) == widths(plans[1])


def test_random_is_drawn_per_group():
    """Protecting one group does not change what is removed of the others."""
    program = captured("mobilenet")
    free = PruneChannels(ratio=0.5).run(program).plan
    kept = PruneChannels(ratio=0.5).run(program, Context(keep=("features.5.0.weight",))).plan
    assert set(free.groups) - set(kept.groups) == {"features.5.0", "features.3.conv.4.0"}  # both its axes
    assert all(free.groups[name] == entry for name, entry in kept.groups.items())


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn-gamma"])
def test_option_criterion(criterion):
    program = tiny()
    keep = PruneChannels(ratio=0.5, criterion=criterion).run(program, SUPPLIED).plan.groups["conv"].keep
    scores = (
        np.abs(program.initializer_array("norm.weight"))
        if criterion == "bn-gamma"
        else np.abs(program.initializer_array("conv.weight")).sum(axis=(1, 2, 3))
    )
    assert set(keep) == set(np.argsort(-scores)[:3].tolist())


def test_option_criterion_taylor_reads_the_calibration_data():
    program = tiny()
    batches = [({"x": random_inputs(program, seed)["x"]}, np.asarray([seed % 5])) for seed in range(4)]
    context = Context(data={"calibration": batches}, extras={"importance": importance})
    keep = PruneChannels(ratio=0.5, criterion="taylor").run(program, context).plan.groups["conv"].keep
    expected = importance("taylor", program, channel_groups(program), (), context).groups["conv"]
    assert set(keep) == set(np.argsort(-expected)[:3].tolist())
    with pytest.raises(UsageError, match="needs data"):
        PruneChannels(ratio=0.5, criterion="taylor").run(program, SUPPLIED)


def test_criterion_without_supplier_or_unknown():
    own = PruneChannels(ratio=0.5, criterion="l1").run(tiny())
    assert own.plan == PruneChannels(ratio=0.5, criterion="l1").run(tiny(), SUPPLIED).plan
    with pytest.raises(
        UsageError,
        match="Unknown criterion 'best'; expected one of activation, bn-gamma, fisher, fpgm, hrank, l1, l2",
    ):
        PruneChannels(ratio=0.5, criterion="best").run(tiny(), SUPPLIED)


@pytest.mark.parametrize(
    ("grid", "kept"),
    [
        (1, {"stem.0": 4, "layer2.0.conv1": 7, "layer2.0.conv2": 7}),
        (4, {"stem.0": 4, "layer2.0.conv1": 8, "layer2.0.conv2": 8}),
        (8, {"stem.0": 4, "layer2.0.conv1": 8, "layer2.0.conv2": 8}),
        (5, {"stem.0": 5, "layer2.0.conv1": 10, "layer2.0.conv2": 10}),
        (32, {"stem.0": 4, "layer2.0.conv1": 7, "layer2.0.conv2": 7}),
    ],
)
def test_option_grid_rounds_what_is_kept_up(grid, kept):
    plan = PruneChannels(ratio=0.6, grid=grid).run(captured("resnet")).plan
    assert {name: len(plan.groups[name].keep) for name in kept} == kept


def test_grid_counts_parameter_indices_not_units():
    """A unit of `vit`'s second group is 9 indices, so a grid of 9 is met by every count."""
    program = captured("vit")
    for grid, kept in ((9, 4), (18, 4), (27, 6)):
        plan = PruneChannels(ratio=0.5, grid=grid).run(program).plan
        assert len(plan.groups["blocks.0.attn.qkv[8x9]"].keep) == kept, grid


@pytest.mark.parametrize("glob", ["conv1*", "*.norm1.weight", "layer1.0.conv1.weight", "node_conv2d_1"])
def test_keep_globs(glob):
    program = captured("resnet")
    context = Context(keep=(glob,))
    if glob in ("conv1*", "*.norm1.weight"):
        with pytest.raises(UsageError, match="matches no parameter, node or module"):
            PruneChannels(ratio=0.5).run(program, context)
        return
    result = PruneChannels(ratio=0.5).run(program, context)
    assert "layer1.0.conv1" not in result.plan.groups and "layer2.0.conv1" in result.plan.groups
    assert result.program.initializer_array("layer1.0.conv1.weight").shape[0] == 8
    assert any(r.node == "layer1.0.conv1.weight" and f"--keep '{glob}'" in r.reason for r in result.refusals)


def test_keep_protects_the_whole_group():
    """A kept parameter keeps both its axes: its own channels, and those of the layer before."""
    program = captured("vgg")
    result = PruneChannels(ratio=0.5).run(program, Context(keep=("features.3.weight",)))
    assert set(result.plan.groups) == {"classifier.0"}


# ---- refusals --------------------------------------------------------------------------------


def test_blocked_axes_are_told():
    """The classifier's outputs are the graph's; they stay, and the result says so."""
    program = tiny()
    result = PruneChannels(ratio=0.5).run(program)
    told = {r.node: r.reason for r in result.refusals}
    assert set(told) == {"fc.weight", "fc.bias"} or set(told) == {"fc.weight"}
    assert "output" in told["fc.weight"]
    assert result.program.initializer_array("fc.weight").shape[0] == 5


def test_nothing_to_do():
    program = program_from_nodes(
        [node("Gemm", ["x", "w"], ["y"])], {"x": ["N", 4]}, ["y"], {"w": np.ones((4, 3), np.float32)}
    )
    result = PruneChannels(ratio=0.5).run(program)
    assert not result.modified and result.program is program
    assert result.refusals and result.plan.groups == {}


def two_sided():
    """Two convolutions side by side, added to a third: one group whose halves must both keep a channel."""
    draw = np.random.default_rng(0).standard_normal
    return program_from_nodes(
        [
            node("Conv", ["x", "left"], ["l"]),
            node("Conv", ["x", "right"], ["r"]),
            node("Concat", ["l", "r"], ["lr"], axis=1),
            node("Conv", ["x", "both"], ["b"]),
            node("Add", ["lr", "b"], ["s"]),
            node("Conv", ["s", "last"], ["y"]),
        ],
        {"x": ["N", 3, 4, 4]},
        ["y"],
        {
            name: draw((*shape, 1, 1)).astype(np.float32)
            for name, shape in {"left": (4, 3), "right": (6, 3), "both": (10, 3), "last": (2, 10)}.items()
        },
    )


def test_both_halves_of_a_concat_keep_a_channel():
    program = two_sided()
    (group,) = channel_groups(program).groups
    assert group.size == 10 and len(group.floors) == 2
    scores = np.arange(10.0)  # the right half matters more
    assert group.keep_best(scores, 3) == (3, 8, 9)  # three stay: the floor's takes the place of 7
    assert group.keep_best(scores, 0) == (3, 9)
    for seed in range(8):
        pruned = PruneChannels(ratio=0.9, seed=seed).run(program).program
        verify_program(pruned)
        assert pruned.initializer_array("left").shape[0] >= 1 <= pruned.initializer_array("right").shape[0]
    name = group.name
    with pytest.raises(PlanError, match="removes every channel of one input of a Concat or Split"):
        apply_plan(program, Plan(program.source.sha256, {name: GroupPlan(10, (4, 5, 6))}))


# ---- plans -----------------------------------------------------------------------------------


def test_plan_round_trip():
    program = captured("densenet")
    plan = PruneChannels(ratio=0.5, seed=3).run(program).plan
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again.groups == plan.groups and again.source_sha256 == plan.source_sha256
    assert again.to_json() == text
    document = json.loads(text)
    assert document["schema"] == "sartor.plan/1" and document["notes"] == {
        "pass": "prune-channels{ratio=0.5,seed=3}"
    }
    assert all(document[name] == {} for name in ("exits", "gates", "tiles", "precision"))
    assert apply_plan(program, again).to_bytes() == apply_plan(program, plan).to_bytes()


def test_pipeline_text_round_trip():
    text = "prune-channels{ratio=0.5,criterion=l1,seed=3,grid=8}"
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text
    assert pipeline.run(captured("resnet"), SUPPLIED).program.applied == (text,)


def test_apply_is_byte_identical_here_and_in_fresh_processes(tmp_path):
    source, plan_file = tmp_path / "model.onnx", tmp_path / "plan.json"
    captured("mobilenet").save(source)
    program = load(source)
    plan = PruneChannels(ratio=0.5, seed=3).run(program).plan
    plan_file.write_text(plan.to_json())
    expected = apply_plan(program, plan).to_bytes()
    assert apply_plan(program, plan).to_bytes() == expected
    mask = masked(program, plan)[0].to_bytes()
    for number in ("1", "2"):
        out, masked_out = tmp_path / f"{number}.onnx", tmp_path / f"{number}.masked.onnx"
        command = [sys.executable, "-m", "sartor", "apply", source, plan_file, "-o", out]
        done = subprocess.run(
            [*map(str, command), "--masked", str(masked_out), "--json"],
            env={**os.environ, "PYTHONHASHSEED": number},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == expected
        assert masked_out.read_bytes() == mask
        document = json.loads(done.stdout)
        assert document["zeroed"] and set(document["zeroed"][0]) == {"initializer", "axis", "indices"}
        assert hashlib.sha256(expected).hexdigest() in {entry["sha256"] for entry in document["files"]}


def test_another_source_is_refused():
    plan = PruneChannels(ratio=0.5).run(tiny()).plan
    for make in (apply_plan, masked):
        with pytest.raises(PlanError, match=r"The plan was made for a model with SHA-256 [0-9a-f]{16}…"):
            make(captured("vgg"), plan)
    other = tiny()
    other.source = dataclasses.replace(other.source, sha256="0" * 64)
    with pytest.raises(PlanError, match="Make a new plan for this model"):
        apply_plan(other, plan)


@pytest.mark.parametrize(
    ("name", "size", "keep", "message"),
    [
        ("nothing", 6, (0,), "There is no channel group 'nothing'"),
        ("conv", 7, (0, 6), "Group 'conv' has 6 units, the plan was made for 7"),
        ("conv", 5, (0, 1), "Group 'conv' has 6 units, the plan was made for 5"),
    ],
)
def test_illegal_plans_are_refused(name, size, keep, message):
    program = tiny()
    plan = Plan(program.source.sha256, {name: GroupPlan(size, keep)})
    for make in (apply_plan, masked):
        with pytest.raises(PlanError, match=message):
            make(program, plan)


@pytest.mark.parametrize("keep", [(), (1, 0), (0, 0), (-1, 2), (5, 6)])
def test_illegal_indices_are_refused(keep):
    with pytest.raises(PlanError):
        GroupPlan(6, keep)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="sartor.plan/2"), "Expected a plan of schema"),
        (lambda d: d.update(surprise={}), r"unknown sections \['surprise'\]"),
        (lambda d: d.update(exits={"a": 1}), r"uses sections \['exits'\]"),
        (lambda d: d["groups"]["conv"].pop("keep"), "malformed: KeyError"),
        (lambda d: d["groups"]["conv"].update(keep="all"), "malformed: ValueError"),
        (lambda d: d["groups"]["conv"].update(keep=[]), "keeps no unit"),
        (lambda d: d.pop("source"), "malformed: KeyError"),
    ],
)
def test_malformed_documents_are_refused(change, message):
    document = json.loads(PruneChannels(ratio=0.5).run(tiny()).plan.to_json())
    change(document)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(document))


# ---- on the command line ---------------------------------------------------------------------


def test_command_line_supplies_criteria(tmp_path, capsys):
    from sartor.cli import main

    source = tmp_path / "model.onnx"
    tiny().save(source)
    kept = {}
    for passes in ("prune-channels{ratio=0.5,criterion=l2}", "prune-channels{ratio=0.5,criterion=bn-gamma}"):
        plan, out = tmp_path / "plan.json", tmp_path / "out.onnx"
        assert main(["run", str(source), "--passes", passes, "-o", str(out), "--plan-out", str(plan)]) == 0
        kept[passes] = Plan.load(plan).groups["conv"].keep
        assert apply_plan(load(source), Plan.load(plan)).to_bytes() == out.read_bytes()
    assert kept["prune-channels{ratio=0.5,criterion=l2}"] == (0, 2, 4)
    assert len(set(kept.values())) == 2
    capsys.readouterr()
