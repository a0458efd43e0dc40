"""Exits that are never taken change nothing; taken, every form gives what the reference bodies give."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from builders import node, program_from_nodes
from models import captured

from sartor import backends
from sartor.backends.protocol import TargetOptions
from sartor.errors import UsageError
from sartor.ir import exits as ir_exits
from sartor.ir.cuts import cuts
from sartor.ir.dialect import EXITS
from sartor.ir.exits import exits_of, opened, stages, with_choices, without_exits
from sartor.ir.fx import run_twin
from sartor.ir.verify import verify_program
from sartor.passes.base import Context
from sartor.passes.insert_exits import InsertExits, candidates, expected

SAMPLES = 24


def inputs_of(program, count=SAMPLES, seed=0):
    ((name, shape),) = program.input_shapes.items()
    return {name: np.random.default_rng(seed).standard_normal((count, *shape[1:])).astype(np.float32)}


def run(program, inputs):
    session = onnxruntime.InferenceSession(program.to_bytes(), providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in program.graph.outputs], session.run(None, inputs), strict=True))


def with_thresholds(program, values):
    """A copy with these thresholds."""
    clone = program.clone()
    for one, value in zip(exits_of(clone), values, strict=True):
        initializer = clone.graph.initializers[one.threshold]
        initializer.const_value = type(initializer.const_value)(
            np.asarray(value, initializer.const_value.numpy().dtype), name=one.threshold
        )
    clone.invalidate()
    return clone


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def certainty(metric, logits):
    """How the metric of the document reads, by hand."""
    probabilities = np.sort(softmax(logits.astype(np.float64)), axis=1)
    if metric == "probability-difference":
        return probabilities[:, -1] - probabilities[:, -2]
    if metric == "max-probability":
        return probabilities[:, -1]
    return -(probabilities * np.log(probabilities)).sum(axis=1)


@pytest.fixture(scope="module", params=["resnet", "vit", "mobilenet"])
def network(request):
    return captured(request.param)


def taken_by_hand(program, metric, thresholds, inputs):
    """What every sample gets, and which exit gave it; -1: none."""
    parts = run(opened(program), inputs)
    final, *heads = list(parts.values())
    result, which = final.copy(), np.full(len(final), -1)
    for i, (head, threshold) in reversed(list(enumerate(zip(heads, thresholds, strict=True)))):
        found = certainty(metric, head)
        go = found < threshold if metric == "entropy" else found >= threshold
        result[go], which[go] = head[go], i
    return result, which


def middling(program, metric, inputs):
    """Thresholds that about half of the samples meet at each exit."""
    _, *heads = list(run(opened(program), inputs).values())
    return [float(np.median(certainty(metric, head))) + 1e-6 for head in heads]


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_exits_that_are_not_taken_change_nothing(network, head):
    for metric in EXITS:
        result = InsertExits(head=head, metric=metric).run(network)
        assert result.counts["exits"] == 2 and not result.refusals
        verify_program(result.program)
        inputs = inputs_of(network)
        before, after = run_twin(network, inputs), run_twin(result.program, inputs)
        assert all(np.array_equal(before[name], after[name]) for name in before)
        bare = without_exits(result.program)
        verify_program(bare)
        assert not any("exit" in name for name in bare.initializers)
        assert [n.op_type for n in bare.nodes() if n.op_type != "Identity"] == [
            n.op_type for n in network.nodes()
        ]


@pytest.mark.parametrize("metric", list(EXITS))
def test_every_form_gives_what_the_formula_gives(network, metric):
    program = InsertExits(metric=metric, seed=3).run(network).program
    inputs = inputs_of(network)
    thresholds = middling(program, metric, inputs)
    program = with_thresholds(program, thresholds)
    wanted, which = taken_by_hand(program, metric, thresholds, inputs)
    assert len(set(which)) == 3, "every exit is taken by some samples, and none by others"
    reference = next(iter(run(program, inputs).values()))
    assert np.abs(reference - wanted).max() < 1e-5
    assert np.abs(next(iter(run_twin(program, inputs).values())) - wanted).max() < 1e-4
    choices = with_choices(program)
    verify_program(choices)
    assert not exits_of(choices) and sum(n.op_type == "If" for n in choices.nodes()) == 1
    mixed = next(iter(run(choices, inputs).values()))
    assert np.abs(mixed - reference).max() < 1e-5, "calls of which some samples are certain compute both"
    for i in range(SAMPLES):
        alone = {name: array[i : i + 1] for name, array in inputs.items()}
        assert np.abs(next(iter(run(choices, alone).values())) - wanted[i]).max() < 1e-5


def test_an_if_ends_early(network):
    """What is behind an exit that all samples take stands in a branch, and does not run."""
    program = with_thresholds(InsertExits().run(network).program, [-1.0, 2.0])
    choices = with_choices(program)
    weights = {
        value.name
        for branch in ("then_branch", "else_branch")
        for choice in (n for n in choices.nodes() if n.op_type == "If")
        for inner in choice.attributes[branch].as_graph().all_nodes()
        for value in inner.inputs
        if value is not None and value.is_initializer()
    }
    outside = {v.name for n in choices.nodes() for v in n.inputs if v is not None and v.is_initializer()}
    own = {name for name in network.initializers if network.initializer_array(name).dtype.kind == "f"}
    assert own & weights and own & outside and not (own & weights & outside)


def test_stages_compute_everything_once(network):
    program = InsertExits(seed=3).run(network).program
    inputs = inputs_of(network)
    parts = stages(program)
    assert [part.exit for part in parts] == [*exits_of(program), None]
    values = dict(inputs)
    whole = run(opened(program), inputs)
    names = list(whole)
    for number, part in enumerate(parts):
        verify_program(part.program)
        given = {value.name: values[value.name] for value in part.program.graph.inputs}
        found = run(part.program, given)
        expected_here = whole[names[number + 1]] if part.exit else whole[names[0]]
        assert np.abs(found[names[0]] - expected_here).max() < 1e-5
        values.update(found)
    ran = [n.name for part in parts for n in part.program.nodes() if "chosen" not in n.name]
    assert len(ran) == len(set(ran))
    assert {n.name for n in network.nodes()} <= set(ran)


def test_what_follows_the_scores_is_in_every_stage():
    """A network that ends in Softmax: exits stand in front of it."""
    generator = np.random.default_rng(0)
    arrays = {f"w{i}": generator.standard_normal((6, 6)).astype(np.float32) for i in range(4)}
    nodes = [
        node("MatMul", ["x", "w0"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "w1"], ["c"]),
        node("Relu", ["c"], ["d"]),
        node("MatMul", ["d", "w2"], ["e"]),
        node("Softmax", ["e"], ["y"], axis=-1),
    ]
    program = program_from_nodes(nodes, {"x": ("N", 6)}, ["y"], {k: arrays[k] for k in ("w0", "w1", "w2")})
    result = InsertExits(at=("b", "d")).run(program).program
    inputs = inputs_of(program)
    result = with_thresholds(result, middling(result, "probability-difference", inputs))
    reference = run(result, inputs)["y"]
    assert np.allclose(reference.sum(axis=1), 1, atol=1e-5)
    assert np.abs(run(with_choices(result), inputs)["y"] - reference).max() < 1e-6
    for part in stages(result):
        verify_program(part.program)
        assert part.program.graph.outputs[0].name == "y"
        assert part.decides == (part.exit.logits if part.exit else "")


# ---- where -----------------------------------------------------------------------------------------
def test_cuts_are_where_one_value_is_enough():
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Neg", ["a"], ["b"]),
        node("Add", ["a", "b"], ["c"]),
        node("Exp", ["c"], ["y"]),
    ]
    assert [cut.value for cut in cuts(program_from_nodes(nodes, {"x": ("N", 4)}, ["y"]))] == ["a", "c"]


def test_expected_cost_by_hand():
    # a quarter of the network for all, half for the 40 % that the first does not solve, the rest for 10 %
    assert expected([0.25, 0.75], [0.6, 0.9]) == pytest.approx(0.25 + 0.4 * 0.5 + 0.1 * 0.25)
    assert expected([0.5], [0.0]) == 1.0


def test_exits_are_spaced_evenly_without_data_and_chosen_by_expected_cost_with_them():
    program = captured("resnet")
    shares = candidates(program)
    even = InsertExits().run(program).plan["exits"]
    assert [round(shares[one["value"]], 1) for one in even] == pytest.approx([1 / 3, 2 / 3], abs=0.2)
    images = inputs_of(program, 64)
    labels = np.arange(64) % 4
    data = {"calibration": [(images, labels)]}
    solved = dict.fromkeys(shares, 0.2)
    best = list(shares)[1]
    solved[best] = 0.9
    context = Context(data=data, extras={"imprinted": lambda *_: solved})
    chosen = InsertExits(count=1).run(program, context).plan["exits"]
    assert [one["value"] for one in chosen] == [best]
    InsertExits(count=1).run(program, Context(data=data))  # imprints


def test_what_cannot_have_exits_is_refused():
    program = captured("resnet")
    twice = InsertExits().run(InsertExits().run(program).program)
    assert not twice.modified and "already" in twice.refusals[0].reason
    unet = InsertExits().run(captured("unet"))
    assert not unet.modified and "class scores [N, K]" in unet.refusals[0].reason
    with pytest.raises(UsageError, match="There is no value 'nowhere'"):
        InsertExits(at=("nowhere",)).run(program)
    assert ir_exits.stages(program)[0].program is program


# ---- on targets ------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_targets_with_control_flow_end_early(target, tmp_path):
    network = captured("resnet")
    program = InsertExits(seed=3).run(network).program
    inputs = inputs_of(program)
    thresholds = middling(program, "probability-difference", inputs)
    program = with_thresholds(program, thresholds)
    wanted, _ = taken_by_hand(program, "probability-difference", thresholds, inputs)
    backend = backends.get(target)
    options = TargetOptions(precision="f32")
    session = backend.load(backend.lower(program, tmp_path / "all", options), options)
    for i in range(6):
        found = session.run({name: array[i : i + 1] for name, array in inputs.items()})
        assert np.abs(next(iter(found.values())) - wanted[i]).max() < 1e-3
    assert np.abs(next(iter(session.run(inputs).values())) - wanted).max() < 1e-3
