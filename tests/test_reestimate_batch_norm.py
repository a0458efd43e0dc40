"""Statistics are those of the data, by hand; what keeps its own says why; data are asked for before anything runs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import models
import numpy as np
import onnx_ir as ir
import pytest
import torch
from builders import node, program_from_nodes
from onnx import TensorProto, helper

from sartor.calibration import batches
from sartor.cli import main
from sartor.errors import UsageError
from sartor.ir.fx import run_twin
from sartor.ir.program import Batch
from sartor.ir.verify import verify_program
from sartor.passes.base import Context, Pass, Semantics
from sartor.passes.fold_batch_norm import FoldBatchNorm
from sartor.passes.pipeline import Pipeline, Repeat
from sartor.passes.reestimate_batch_norm import ReestimateBatchNorm
from sartor.recovery.twins import predictor

PARAMETERS = {
    "w": (6, 3, 3, 3),
    **{f"n{i}.{part}": (6,) for i in (1, 2) for part in ("scale", "bias", "mean", "var")},
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def net(names=None, shape=("N", 3, 6, 6), **attributes):
    """Conv, norm, Relu, norm; `names` replaces names of parameters by others."""
    arrays = {name: np.abs(normal(*size, seed=i)) + 0.1 for i, (name, size) in enumerate(PARAMETERS.items())}
    arrays["w"] = normal(6, 3, 3, 3)

    def norm(i, x, y):
        parts = [f"n{i}.{part}" for part in ("scale", "bias", "mean", "var")]
        return node(
            "BatchNormalization", [x, *((names or {}).get(p, p) for p in parts)], [y], f"n{i}", **attributes
        )

    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        norm(1, "c", "a"),
        node("Relu", ["a"], ["r"]),
        norm(2, "r", "y"),
    ]
    used = {name for one in nodes for name in one.input}
    return program_from_nodes(nodes, {"x": shape}, ["y"], {k: v for k, v in arrays.items() if k in used})


def context_of(*arrays, split="calibration", **more):
    return Context(data={split: [({"x": array}, None) for array in arrays]}, **more)


def statistics(program):
    return {k: program.initializer_array(k) for k in program.initializers if k.endswith(("mean", "var"))}


def by_hand(program, parts):
    """Each norm on what the one before it makes with the statistics of the batch."""
    found = []
    for x in parts:
        value = torch.nn.functional.conv2d(torch.from_numpy(x), torch.tensor(program.initializer_array("w")))
        row = {}
        for i in (1, 2):
            row[f"n{i}.mean"], row[f"n{i}.var"] = value.mean((0, 2, 3)), value.var((0, 2, 3))
            plain = (value - row[f"n{i}.mean"][:, None, None]) / torch.sqrt(
                value.var((0, 2, 3), unbiased=False)[:, None, None] + 1e-5
            )
            scale, bias = (
                torch.tensor(program.initializer_array(f"n{i}.{p}"))[:, None, None] for p in ("scale", "bias")
            )
            value = torch.relu(plain * scale + bias)
        found.append(row)
    return {name: torch.stack([row[name] for row in found]).mean(0).numpy() for name in found[0]}


def close(actual, expected):
    return all(np.allclose(actual[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)


def test_statistics_by_hand():
    program = net()
    data = normal(20, 3, 6, 6, seed=5) * 2 + 1
    result = ReestimateBatchNorm(samples=20, batch=8).run(program, context_of(data))
    parts = [data[:8], data[8:16]]  # the last four would count as much as eight
    assert close(statistics(result.program), by_hand(program, parts))
    assert not close(statistics(result.program), by_hand(program, [data]))
    assert result.counts["statistics_reestimated"] == 4 and not result.refusals
    for name in set(program.initializers) - set(statistics(program)):
        assert (result.program.initializer_array(name) == program.initializer_array(name)).all()
    verify_program(result.program)
    replayed = ReestimateBatchNorm().replay(program, result.plan)
    assert replayed.program.to_bytes() == result.program.to_bytes()


def test_options_and_how_samples_are_joined():
    program = net()
    data = normal(12, 3, 6, 6, seed=6)
    small = [data[:5], data[5:7], data[7:]]
    found = ReestimateBatchNorm(samples=8, batch=4).run(program, context_of(*small))
    assert close(statistics(found.program), by_hand(program, [data[:4], data[4:8]]))
    one = ReestimateBatchNorm(samples=3, batch=4).run(program, context_of(*small, split="evaluate"))
    assert close(statistics(one.program), by_hand(program, [data[:3]]))  # there is no whole one


def test_in_eval_mode_each_norm_makes_its_own_mean_and_scale():
    """With one batch; the second one sees what the first makes with its new statistics."""
    program = net()
    data = normal(64, 3, 6, 6, seed=7) * 3 - 1
    result = ReestimateBatchNorm().run(program, context_of(data)).program
    after = run_twin(result, {"x": data})["y"]
    np.testing.assert_allclose(after.mean((0, 2, 3)), program.initializer_array("n2.bias"), atol=1e-3)
    np.testing.assert_allclose(after.std((0, 2, 3)), program.initializer_array("n2.scale"), rtol=1e-3)
    assert abs(run_twin(program, {"x": data})["y"].mean() - after.mean()) > 0.1


def test_after_pruning_it_wins_back_what_the_cut_cost():
    program = models.captured("resnet")
    x = normal(256, 3, 16, 16, seed=8)
    (name,) = program.input_shapes
    context = Context(data={"calibration": [({name: x[:192]}, None)]})
    first = ReestimateBatchNorm().run(program, context).program  # so that its own statistics are right
    plain = Pipeline.parse("prune-channels{ratio=0.5,criterion=l1}").run(first, context).program
    again = Pipeline.parse("prune-channels{ratio=0.5,criterion=l1},reestimate-batch-norm").run(first, context)
    want, cut, repaired = (
        next(iter(predictor(p)({name: x[192:]}).values())) for p in (first, plain, again.program)
    )
    assert np.linalg.norm(repaired - want) < np.linalg.norm(cut - want)


@pytest.mark.parametrize("name", sorted(models.ALL))
def test_networks_of_every_family(name):
    program = models.captured(name)
    data = {k: normal(8, *shape[1:], seed=9) for k, shape in program.input_shapes.items()}
    result = ReestimateBatchNorm().run(program, Context(data={"calibration": [(data, None)]}))
    verify_program(result.program)
    norms = [n for n in program.nodes() if n.op_type == "BatchNormalization"]
    assert result.modified == bool(norms) and len(result.refusals) == (0 if norms else 1)


# ---- what keeps its statistics -------------------------------------------------------------------
def reasons(result):
    return {refusal.node: refusal.reason for refusal in result.refusals}


def test_a_shared_statistic_stays():
    program = net({"n2.mean": "n1.mean"})
    data = normal(8, 3, 6, 6)
    result = ReestimateBatchNorm().run(program, context_of(data))
    assert not result.modified
    assert reasons(result) == {
        "n1": "its statistic 'n1.mean' is shared with node 'n2'",
        "n2": "its statistic 'n1.mean' is shared with node 'n1'",
    }


def test_what_is_kept_stays_and_normalises_by_what_it_has():
    program = net()
    data = normal(8, 3, 6, 6)
    for keep, kept in (("n1", "n1"), ("n1.var", "n1.var")):
        result = ReestimateBatchNorm().run(program, context_of(data, keep=(keep,)))
        assert reasons(result) == {"n1": f"'{kept}' is kept"}
        before, after = statistics(program), statistics(result.program)
        assert (after["n1.mean"] == before["n1.mean"]).all() and (after["n1.var"] == before["n1.var"]).all()
        seen = run_twin(program, {"x": data}, taps=["r"])["r"]
        np.testing.assert_allclose(after["n2.mean"], seen.mean((0, 2, 3)), rtol=1e-4)


def test_a_single_value_per_channel_is_no_statistic():
    single = net(shape=("N", 3, 3, 3))
    result = ReestimateBatchNorm().run(single, context_of(normal(1, 3, 3, 3)))
    assert not result.modified
    assert set(reasons(result).values()) == {"a batch gives it 1 value per channel, expected 2 or more"}
    assert ReestimateBatchNorm().run(single, context_of(normal(2, 3, 3, 3))).modified


def test_bodies_stay():
    parts = {
        f"n1.{part}": np.abs(normal(3, seed=i)) + 0.1
        for i, part in enumerate(("scale", "bias", "mean", "var"))
    }
    inside = [node("BatchNormalization", ["x", *parts], ["then"], "inner")]
    out = helper.make_tensor_value_info("then", TensorProto.FLOAT, None)
    other = helper.make_tensor_value_info("else", TensorProto.FLOAT, None)
    then = helper.make_graph(inside, "then", [], [out])
    otherwise = helper.make_graph([node("Relu", ["x"], ["else"], "other")], "else", [], [other])
    nodes = [
        node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Greater", ["s", "zero"], ["flag"]),
        node("If", ["flag"], ["y"], "choice", then_branch=then, else_branch=otherwise),
    ]
    program = program_from_nodes(
        nodes, {"x": (4, 3, 2, 2)}, ["y"], {**parts, "zero": np.zeros((), np.float32)}
    )
    result = ReestimateBatchNorm().run(program, context_of(normal(4, 3, 2, 2)))
    assert not result.modified and reasons(result) == {"inner": "it lies in a body of If"}


def test_training_mode_stays():
    parts = {
        f"n.{part}": np.abs(normal(3, seed=i)) + 0.1
        for i, part in enumerate(("scale", "bias", "mean", "var"))
    }
    nodes = [node("BatchNormalization", ["x", *parts], ["y", "m", "v"], "n", training_mode=1)]
    program = program_from_nodes(nodes, {"x": (4, 3, 2, 2)}, ["y"], parts)
    result = ReestimateBatchNorm().run(program, context_of(normal(4, 3, 2, 2)))
    assert reasons(result) == {"n": "it normalises by the statistics of each batch"}


def test_a_computed_statistic_stays():
    parts = {
        f"n.{part}": np.abs(normal(3, seed=i)) + 0.1
        for i, part in enumerate(("scale", "bias", "mean", "var"))
    }
    nodes = [
        node("Abs", ["n.var"], ["positive"]),
        node("BatchNormalization", ["x", "n.scale", "n.bias", "n.mean", "positive"], ["y"], "n"),
    ]
    program = program_from_nodes(nodes, {"x": (4, 3, 2, 2)}, ["y"], parts)
    result = ReestimateBatchNorm().run(program, context_of(normal(4, 3, 2, 2)))
    assert reasons(result) == {"n": "its statistic 'positive' is not a constant initializer"}


def test_what_nothing_depends_on_stays():
    program = net()
    arrays = {k: program.initializer_array(k) for k in program.initializers}
    nodes = [
        node("Conv", ["x", "w"], ["y"]),
        node(
            "BatchNormalization", ["y", *(f"n1.{p}" for p in ("scale", "bias", "mean", "var"))], ["a"], "n1"
        ),
    ]
    dead = program_from_nodes(
        nodes, {"x": ("N", 3, 6, 6)}, ["y"], {k: v for k, v in arrays.items() if not k.startswith("n2")}
    )
    result = ReestimateBatchNorm().run(dead, context_of(normal(4, 3, 6, 6)))
    assert reasons(result) == {"n1": "no result depends on it"}


def test_without_norms():
    program = FoldBatchNorm().run(models.captured("unet")).program
    data = {k: normal(4, *shape[1:]) for k, shape in program.input_shapes.items()}
    result = ReestimateBatchNorm().run(program, Context(data={"calibration": [(data, None)]}))
    assert not result.modified and "before 'fold-batch-norm'" in result.refusals[0].reason


def test_overflow_is_said():
    program = net()
    weight = ir.Tensor(np.full((6, 3, 3, 3), 3e38, np.float32), name="w")
    program.graph.initializers["w"].const_value = weight
    with pytest.raises(UsageError, match=r"statistic 'n\d\.(mean|var)' is not finite"):
        ReestimateBatchNorm().run(program, context_of(normal(4, 3, 6, 6)))


# ---- data ------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Fails(Pass):
    """A pass that must not run."""

    name: ClassVar[str] = "test-fails"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def plan(self, program, context):
        raise AssertionError("it ran")

    def apply(self, program, plan, rewriter):
        raise AssertionError("it ran")


@pytest.mark.parametrize("wrap", [lambda item: item, lambda item: Repeat((item,), 2)])
def test_missing_data_are_said_before_anything_runs(wrap):
    pipeline = Pipeline([Fails(), wrap(ReestimateBatchNorm())])
    message = (
        r"There is no calibration data: pass 'reestimate-batch-norm' runs the network on real inputs "
        r"\('x' \[1, 3, 6, 6\]\)\. Give --data"
    )
    with pytest.raises(UsageError, match=message):
        pipeline.run(net())
    with pytest.raises(UsageError, match=message):
        ReestimateBatchNorm().run(net())
    with pytest.raises(AssertionError, match="it ran"):
        pipeline.run(net(), context_of(normal(4, 3, 6, 6)))


def test_supplies_may_be_given():
    seen = []

    def supply(program, context, *, samples, batch):
        seen.append((samples, batch))
        return {"n1.mean": np.arange(6, dtype=np.float32)}, [("n2", "because")]

    context = Context(data={"evaluate": []}, extras={"statistics": supply})
    result = ReestimateBatchNorm(samples=7, batch=3).run(net(), context)
    assert seen == [(7, 3)] and reasons(result) == {"n2": "because"}
    assert (result.program.initializer_array("n1.mean") == np.arange(6)).all()


def test_batches_of_a_program_of_fixed_batch_size_stay_whole():
    program = net(shape=(4, 3, 6, 6))
    data = [normal(4, 3, 6, 6, seed=i) for i in range(3)]
    found = list(batches(program, context_of(*data), samples=5, batch=2))
    assert len(found) == 2 and all((a["x"] == b).all() for a, b in zip(found, data, strict=False))


def test_inputs_without_samples_separate_batches():
    arrays = {"w": normal(3)}
    nodes = [node("Mul", ["x", "s"], ["m"]), node("Mul", ["m", "w"], ["y"])]
    program = program_from_nodes(nodes, {"x": ("N", 3), "s": (1,)}, ["y"], arrays)
    program.batch = Batch(True, ("x",))
    x = normal(10, 3)
    split = [
        ({"x": x[:3], "s": np.ones(1, np.float32)}, None),
        ({"x": x[3:], "s": np.zeros(1, np.float32)}, None),
    ]
    found = list(batches(program, Context(data={"calibration": split}), samples=100, batch=4))
    assert [(len(one["x"]), float(one["s"][0])) for one in found] == [(3, 1.0), (4, 0.0), (3, 0.0)]
    assert (np.concatenate([one["x"] for one in found]) == x).all()


def test_from_the_command_line(tmp_path, capsys):
    program = models.captured("mobilenet")
    model, data, out = tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "o.onnx"
    program.save(model)
    (name,) = program.input_shapes
    np.savez(data, **{name: normal(40, 3, 32, 32)})
    text = ["run", str(model), "--passes", "prune-channels{ratio=0.5},reestimate-batch-norm", "-o", str(out)]
    assert main(text) == 2 and "There is no calibration data" in capsys.readouterr().err and not out.exists()
    assert main([*text[:1], str(tmp_path / "missing.onnx"), *text[2:]]) == 2
    assert "There is no calibration data" in capsys.readouterr().err  # said before a model is opened
    assert main([*text, "--data", str(data)]) == 0
    assert "statistics_reestimated" in capsys.readouterr().out and out.exists()
