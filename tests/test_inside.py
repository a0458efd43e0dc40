"""Models timed whole and kernel by kernel: crashes cost one model; which kernel of ours each executed one is."""

from __future__ import annotations

import collections

import null_backend
import onnx
import pytest

from sartor import backends
from sartor.backends.protocol import KernelTime
from sartor.cost_models.model_builder import ModelBuilder
from sartor.errors import BackendError, UsageError
from sartor.profiling import build, inside, networks
from sartor.profiling.design import Design, Point
from sartor.profiling.inside import InsideEffort, ModelTimer
from sartor.profiling.inside_samples import (
    UnmadeError,
    carrier_model,
    copies_of,
    describe,
    of_carrier,
)
from sartor.profiling.shapes import moving

QUICK = InsideEffort(visits=2, visit_s=0.002, profile_s=0.01)


def chain(*operators):
    builder = ModelBuilder()
    value = builder.input("x", (1, 4))
    for op_type in operators:
        value = builder.node(op_type, [value], {})
    return builder.finish()


@pytest.fixture
def fragile(tmp_path, monkeypatch):
    """A backend whose process ends with a Tanh, and that fails with a Neg; 0.2 ms for every node, 0.4 profiled."""
    null_backend.install(tmp_path / "site", null_backend.ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    backends.REGISTRY.refresh()
    monkeypatch.setattr(inside, "reference_model", lambda: b"12345")  # 1 ms
    yield "fragile"
    monkeypatch.undo()
    backends.REGISTRY.refresh()


# ---- the subprocess ------------------------------------------------------------------------------
def test_a_model_that_crashes_or_fails_costs_only_itself(fragile):
    models = [chain("Relu"), chain("Relu", "Tanh"), chain("Neg"), chain(*["Relu", "Sigmoid"] * 5)]
    with ModelTimer(fragile) as timer:
        first, crashed, failed, last = timer(models, QUICK)
        assert "SIGABRT" in crashed.reason and crashed.latency is None and crashed.kernels == ()
        assert "ValueError: planted failure" in failed.reason and failed.latency is None
        assert first.latency.ratio < last.latency.ratio  # one node against ten, on a busy machine
        assert [k.op_type for k in last.kernels] == ["Relu", "Sigmoid"] * 5
        for kernel in last.kernels:  # in units of the reference, which spins for 1 ms
            assert kernel.median_s == pytest.approx(0.4e-3 / last.reference_s)
        assert last.reference_s >= 1e-3 and len(timer.conditions["pinned"]) == 1
        (again,) = timer(models[:1], QUICK)
        assert again.latency.ratio > 0


def test_the_subprocess_is_not_started_without_end(fragile, monkeypatch):
    monkeypatch.setattr(inside, "MOST_RESTARTS", 1)
    with ModelTimer(fragile) as timer:
        found = timer([chain("Tanh"), chain("Tanh"), chain("Relu"), chain("Relu")], QUICK)
    assert ["SIGABRT" in one.reason for one in found] == [True, True, False, False]
    assert found[2].reason == found[3].reason == "the subprocess ended too often"


def test_no_model_is_begun_after_the_time_limit(fragile):
    with ModelTimer(fragile, pin=False) as timer:
        (late,) = timer([chain("Relu")], InsideEffort(limit_s=0.0))
        assert late.reason == "the time limit was reached" and timer.conditions["pinned"] == []


@pytest.mark.parametrize(("reference", "says"), [(b"crash", "SIGABRT"), (b"fail", "planted failure")])
def test_a_target_without_a_reference_is_an_error(fragile, monkeypatch, reference, says):
    monkeypatch.setattr(inside, "reference_model", lambda: reference)
    with ModelTimer(fragile) as timer, pytest.raises(BackendError, match=says):
        timer([chain("Relu")], QUICK)


def test_a_target_that_is_not_there_is_refused():
    with ModelTimer("nothing") as timer, pytest.raises(UsageError, match="nothing"):
        timer([chain("Relu")], QUICK)


# ---- carriers ------------------------------------------------------------------------------------
def one_of_each_family():
    fuses = backends.get("onnxruntime").capabilities().fuses
    found = {}
    for point in Design(fuses, seed=1).batch(0, 256):
        found.setdefault((point.family, point.spec["op"]), point)
    return list(found.values())


def test_every_kernel_of_a_carrier_is_told_apart_on_a_real_target():
    points = one_of_each_family()
    hard_swish = Point(
        moving("HardSwish", [[1, "*", 14, 14]], [[1, "*", 14, 14]]), (2.0 * 4 * 64 * 196,), "elementwise"
    )
    points += [hard_swish]
    assert {"conv", "depthwise", "matmul", "pool", "norm", "elementwise", "other"} <= {
        p.family for p in points
    }
    with ModelTimer("onnxruntime") as timer:
        (found,) = timer([carrier_model(points)], QUICK)
    assert found.latency is not None, found.reason
    told = of_carrier(points, found.kernels)
    assert all(one is not None and one[0] > 0 for one in told)
    assert told[-1][1] == 2  # HardSigmoid, and a Mul that no node is named after
    # what is left over are copies between layouts, and what makes inputs and reads outputs
    others = [
        k
        for k in found.kernels
        if k.op_type.startswith(("Reorder", "Reshape"))
        or any(n.startswith(("before", "behind")) for n in k.nodes)
    ]
    assert sum(rows for _, rows in told) == len(found.kernels) - len(others)


def test_an_executed_kernel_belongs_to_the_point_whose_nodes_it_computes():
    def ran(op_type, *nodes, ratio=1.0):
        return KernelTime("", op_type, nodes, ratio, 8)

    points = [Point({}, (), "conv")] * 4
    executed = [
        ran("ReorderInput"),
        ran("Conv", "k1/n0", "k1/n1", ratio=3.0),
        ran("HardSigmoid", "k0/n0", ratio=2.0),
        ran("Mul", ratio=5.0),
        ran("Add", "k2/n0", "k3/n0"),  # of two points at once: of neither
        ran("ReorderOutput"),
        ran("Relu", "k1/n2"),
    ]
    assert of_carrier(points, executed) == [(7.0, 2), (4.0, 2), None, None]
    assert of_carrier(points, [ran("Mul")]) == [None] * 4


def test_a_carrier_is_the_kernels_side_by_side():
    points = one_of_each_family()[:6]
    model = onnx.load_from_string(carrier_model(points))
    onnx.checker.check_model(model, full_check=True)
    owners = {node.name.partition("/")[0] for node in model.graph.node}
    assert {owner for owner in owners if not owner.startswith(("before", "behind"))} == {
        f"k{i}" for i in range(6)
    }
    assert carrier_model(points) == carrier_model(points)
    with pytest.raises(UnmadeError, match="no sample model"):
        carrier_model([*points, Point({"op": "Conv"}, (1.0,), "conv")])


# ---- networks ------------------------------------------------------------------------------------
def test_kernels_of_networks_are_found_on_a_real_target():
    """All of them, and the copies that are expected; what is executed is counted once."""
    rules = build.fusion_rules(backends.get("onnxruntime"))
    models = [networks.network(f"{kind}-0-0") for kind in ("inverted", "vit", "branches")]
    with ModelTimer("onnxruntime") as timer:
        timed = timer(models, QUICK)
    for model, one in zip(models, timed, strict=True):
        described = describe(model, one.kernels, rules)
        expected = collections.Counter()
        for signature, _, count in described.kernels:
            expected[signature.spec["op"]] += count
        observed = collections.Counter(o.signature.spec["op"] for o in described.observed)
        assert observed == expected
        moving = [k for k in one.kernels if k.op_type != "Reshape"]
        assert described.rows == len(moving) >= sum(o.rows for o in described.observed)
        total = sum(o.ratio for o in described.observed)
        assert 0.9 * described.ratio <= total <= described.ratio * (1 + 1e-9)


def hard_swish_net():
    builder = ModelBuilder()
    value = builder.input("x", (1, 8, 6, 6))
    value = builder.node("Softmax", [value], {"axis": 1})
    value = builder.node("HardSwish", [value], {})
    builder.node("MaxPool", [value], {"kernel_shape": [2, 2]})
    return builder.finish()


def test_parts_without_a_name_belong_to_the_operator_before_them():
    rules = build.fusion_rules(backends.get("onnxruntime"))
    names = [n.name for n in onnx.load_from_string(hard_swish_net()).graph.node]

    def ran(op_type, *nodes, written=()):
        return KernelTime("", op_type, nodes, 1.0, 8, written=written)

    executed = [
        ran("ReorderOutput", written=(1, 4, 5, 5)),
        ran("Softmax", names[0]),
        ran("HardSigmoid", names[1]),
        ran("Mul"),
        ran("Reshape"),
        ran("ReorderInput", written=(1, 1, 5, 5)),
        ran("ReorderInput"),  # of which nobody knows the shape
        ran("MaxPool", names[2]),
    ]
    described = describe(hard_swish_net(), executed, rules)
    found = [(o.signature.spec["op"], o.ratio, o.rows) for o in described.observed]
    assert found == [
        ("Softmax", 1.0, 1),
        ("HardSwish", 2.0, 2),
        ("MaxPool", 1.0, 1),
        ("ReorderOutput", 1.0, 1),
        ("ReorderInput", 1.0, 1),
    ]
    assert (described.rows, described.ratio) == (7, 7.0)  # the Reshape moves nothing
    assert [o.sizes for o in described.observed[3:]] == [(800.0,), (200.0,)]
    assert described.observed[3].signature.spec["inputs"][0]["dims"] == [1, "*", 5, 5]
    assert copies_of([ran("Pad", written=(1, 1, 1, 1))]) == []


def test_kernels_that_are_equal_are_one_kernel_more_often():
    builder = ModelBuilder()
    value = builder.input("x", (1, 8))
    for _ in range(3):
        value = builder.node("Erf", [value], {})
    described = describe(builder.finish(), (), build.fusion_rules(backends.get("onnxruntime")))
    ((signature, sizes, count),) = described.kernels
    assert (signature.spec["op"], sizes, count) == ("Erf", (64.0,), 3)
    assert described.observed == () and described.rows == 0
