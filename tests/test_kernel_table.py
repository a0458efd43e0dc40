"""A profile of one network's own kernels against targets whose truth is known, and the sample models themselves."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
from cost_networks import FakeBlock, Net, make_program, residual, residual_blocks
from onnx import TensorProto, helper

from sartor.cost_models.boundary import probe_models, probes
from sartor.cost_models.descriptions import describe_target, described_targets
from sartor.cost_models.ladder import Ladder
from sartor.cost_models.protocol import CostModel
from sartor.cost_models.samples import nearest_sizes, sample_model
from sartor.cost_models.sampling import sample_kernels
from sartor.cost_models.signatures import key_of, signature_of
from sartor.cost_models.surface import monotone
from sartor.errors import MetricUnavailableError, PlanError, UsageError
from sartor.ir.workload import build_workload

GROUPS = {"a": 16, "b": 24, "e": 40, "m0": 16, "m1": 24, "m2": 24}
STEP = 8
SCALE = 4  # of all widths, so that there are several steps


def wide(kept=None, skip=()):
    """`residual` with all widths × SCALE; `kept` in those units."""
    full = {g: s * SCALE for g, s in GROUPS.items()}
    return residual({**full, **(kept or {})}, skip)


def wide_workload():
    """The wide network with extents and blocks; groups carry the widened sizes."""
    from sartor.ir.extents import Extent

    net = wide()
    extents = {
        name: tuple(Extent(tuple((c * (SCALE if g else 1), g) for c, g in e.terms)) for e in dims)
        for name, dims in net.extents.items()
    }
    return build_workload(net.program(("logits",)), extents, residual_blocks())


class Target:
    """A target with a staircase: time of a model from its graph, with call and layout costs around it."""

    def __init__(self, call=5e-6, layout=2e-11, noise=0.0, seed=0, scale=1.0, broken=()):
        self.call, self.layout, self.noise, self.scale, self.broken = call, layout, noise, scale, broken
        self.rng = np.random.default_rng(seed)
        self.models = 0
        self.calls: list[int] = []

    def kernels_s(self, model: onnx.ModelProto) -> float:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        infos = [*graph.input, *graph.value_info, *graph.output]
        shape = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in infos}
        shape.update({w.name: list(w.dims) for w in graph.initializer})
        total = 0.0
        for node in graph.node:
            out, x = shape[node.output[0]], shape[node.input[0]]
            moved = 4 * (math.prod(out) + math.prod(x))
            if node.op_type in ("Conv", "Gemm"):
                w = shape[node.input[1]]
                steps = math.ceil(w[0] / STEP) * STEP
                macs = math.prod(out) / w[0] * steps * math.prod(w[1:])
                total += macs / 40e9 + moved / 20e9 + 1e-6
            elif node.op_type in ("MaxPool", "GlobalAveragePool"):
                total += moved / 10e9 + 0.5e-6
        return total

    def network_s(self, program) -> float:
        return self.scale * (self.kernels_s(program.to_proto()) + self.call)

    def __call__(self, models: list[bytes]) -> list[float]:
        self.calls.append(len(models))
        self.models += len(models)
        seconds = []
        for blob in models:
            model = onnx.load_from_string(blob)
            ops = {n.op_type for n in model.graph.node}
            t = self.call + self.kernels_s(model)
            if "Conv" in ops:
                ends = [model.graph.input[0], model.graph.output[0]]
                ends += [i for i in model.graph.input if i.name == "residual"]
                dims = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in ends]
                t += self.layout * 4 * sum(map(math.prod, dims))
            t *= 1 + self.noise * self.rng.standard_normal()
            seconds.append(math.nan if ops & set(self.broken) else t)
        return seconds


def build(target, workload=None, **options):
    workload = workload or wide_workload()
    options = {"seconds": 1e9, **options}
    profile = sample_kernels(
        workload, target, target={"name": "fake"}, device={}, channel_grid=lambda _: STEP, **options
    )
    return workload, Ladder(profile)


def random_plans(count, seed=1, step=STEP):
    rng = np.random.default_rng(seed)
    full = {g: s * SCALE for g, s in GROUPS.items()}
    return [
        {g: int(min(s, max(step, round(rng.uniform(0.1, 1) * s / step) * step))) for g, s in full.items()}
        for _ in range(count)
    ]


def as_fractions(plans):
    return {g: np.array([p[g] / (s * SCALE) for p in plans]) for g, s in GROUPS.items()}


# ---- truth recovered -----------------------------------------------------------------------------
def test_a_staircase_target_is_recovered():
    target = Target()
    workload, table = build(target)
    plans = random_plans(12)
    predicted = table.estimate_batch(workload, as_fractions(plans))
    truth = [target.network_s(wide(p).program(("logits",))) for p in plans]
    np.testing.assert_allclose(predicted, truth, rtol=0.05)
    baseline = float(table.estimate_batch(workload))
    assert baseline == pytest.approx(target.network_s(wide().program(("logits",))), rel=0.03)
    assert table.failures == {}
    assert isinstance(table, CostModel)


def test_output_widths_between_two_steps_cost_as_the_upper_one():
    net = Net((1, 3, 16, 16))
    x = net.conv("x", ("c", 64), 3, "c1")
    workload = build_workload(net.program((x,)), net.extents)
    _, table = build(Target(), workload)
    at = table.estimate_batch(workload, {"c": np.array([40, 41, 45, 48, 49]) / 64})
    assert at[0] < at[1] == pytest.approx(at[2]) == pytest.approx(at[3]) and at[3] < at[4]


def test_removed_blocks_are_recovered():
    target = Target()
    workload, table = build(target)
    removed = {"block0": np.array([False, True, True]), "block2": np.array([False, False, True])}
    predicted = table.estimate_batch(workload, {}, removed)
    truth = [target.network_s(wide(None, skip).program(("logits",))) for skip in ((), (0,), (0, 2))]
    np.testing.assert_allclose(predicted, truth, rtol=0.05)
    assert (np.diff(predicted) < 0).all()


def test_equal_kernels_in_different_blocks_go_one_by_one():
    net = Net((1, 16, 8, 8))
    first = net.conv("x", 16, 3, "c1")
    second = net.conv(first, 16, 3, "c2")
    last = net.conv(second, 16, 1, "c3")
    blocks = (FakeBlock("p", ("n_c1",), ("x",), (first,)), FakeBlock("q", ("n_c2",), (first,), (second,)))
    workload = build_workload(net.program((last,)), net.extents, blocks)
    _, table = build(Target(), workload)
    removed = {"p": np.array([0, 1, 0, 1], bool), "q": np.array([0, 0, 1, 1], bool)}
    none, p, q, both = table.estimate_batch(workload, {}, removed)
    assert none > p == q > both
    assert none - p == pytest.approx(p - both)


def test_layout_and_call_are_not_charged_to_kernels():
    dear = Target(call=200e-6, layout=5e-10)
    workload, table = build(dear)
    kernels = table.estimate(workload)
    truth = dear.network_s(wide().program(("logits",)))
    assert kernels.latency_s == pytest.approx(truth, rel=0.1)
    assert table.profile.call_s == pytest.approx(200e-6, rel=0.02)


def test_more_channels_are_never_cheaper_even_with_noise():
    """On the target's grid; between, some widths cost more than the next multiple."""
    workload, table = build(Target(noise=0.2))
    for group, size in GROUPS.items():
        steps = np.arange(STEP, size * SCALE + 1, STEP) / (size * SCALE)
        assert (np.diff(table.estimate_batch(workload, {group: steps})) >= -1e-15).all()
    for block in workload.blocks:
        assert table.estimate_batch(workload, {}, {block: True}) < table.estimate_batch(workload)


def test_a_population_is_priced_as_its_plans_one_by_one():
    workload, table = build(Target())
    table.calibrate(workload, 3e-3)
    plans = random_plans(40, step=1)
    together = table.estimate_batch(workload, as_fractions(plans))
    for plan, seconds in zip(plans, together, strict=True):
        alone = table.estimate(workload, {g: plan[g] / (s * SCALE) for g, s in GROUPS.items()})
        assert alone.latency_s == pytest.approx(seconds, rel=1e-12)
        parts = sum(k.latency_s for k in alone.kernels) + table.constant_s
        assert parts == pytest.approx(seconds, rel=1e-12)
    assert table.estimate_batch(workload, {g: np.full(20_000, 0.5) for g in GROUPS}).shape == (20_000,)


# ---- calibration ---------------------------------------------------------------------------------
def test_calibration_recovers_a_slower_network_and_tells_its_error():
    target = Target(scale=1.7)
    workload, table = build(target)
    table.calibrate(workload, target.network_s(wide().program(("logits",))))
    with pytest.raises(MetricUnavailableError, match="at least two"):
        _ = table.estimate(workload).interval
    plans = random_plans(6)
    for plan in plans[:4]:
        fractions = {g: plan[g] / (s * SCALE) for g, s in GROUPS.items()}
        table.calibrate(workload, target.network_s(wide(plan).program(("logits",))), fractions)
    for plan in plans[4:]:
        fractions = {g: plan[g] / (s * SCALE) for g, s in GROUPS.items()}
        estimate, truth = (
            table.estimate(workload, fractions),
            target.network_s(wide(plan).program(("logits",))),
        )
        assert estimate.latency_s == pytest.approx(truth, rel=0.04)
        low, high = estimate.interval
        assert low < estimate.latency_s < high and low <= truth <= high
        assert high / low < 1.4


# ---- what is sampled -----------------------------------------------------------------------------
def test_kernels_that_differ_only_in_channels_share_samples():
    net = Net((1, 16, 8, 8))
    x = "x"
    for i, c in enumerate((16, 32, 24)):
        x = net.unary("Relu", net.conv(x, (f"g{i}", c), 3, f"c{i}"), f"r{i}")
    x = net.conv(x, ("g0", 16), 3, "last")  # no activation behind it: another kernel
    workload = build_workload(net.program((x,)), net.extents)
    keys = [signature_of(k).key for k in workload.kernels]
    assert len(set(keys[:3])) == 1 and keys[3] != keys[0]


def test_batch_norm_folds_into_the_same_signature():
    plain, normed = Net((1, 3, 8, 8)), Net((1, 3, 8, 8))
    plain.unary("Relu", plain.conv("x", 8, 3, "c"), "y")
    normed.unary("Relu", normed.bn(normed.conv("x", 8, 3, "c"), "n"), "y")
    keys = [signature_of(build_workload(n.program(("y",))).kernels[0]).key for n in (plain, normed)]
    assert keys[0] == keys[1]


def test_signatures_do_not_depend_on_names_or_node_order():
    net = wide()
    program = net.program(("logits",))
    proto = program.to_proto()
    keys = sorted(signature_of(k).key for k in build_workload(program).kernels)
    # `b1.down` may run before or after the other branch of its block
    names = [n.name for n in proto.graph.node]
    moved = [n for n in proto.graph.node if n.name in ("n_b1.down", "n_b1.downbn")]
    rest = [n for n in proto.graph.node if n not in moved]
    at = names.index("n_b1.c1")
    reordered = [*rest[:at], *moved, *rest[at:]]
    renamed = []
    for node in reordered:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = "renamed_" + node.name
        renamed.append(copy)
    assert [n.name for n in renamed] != ["renamed_" + n for n in names]
    other = make_program(renamed, {"x": (2, 3, 16, 16)}, ["logits"], net.weights)
    others = sorted(signature_of(k).key for k in build_workload(other).kernels)

    # the residual Add moves from the one convolution to the other; everything else is equal
    def plain(found):
        return sorted(k.replace('["Add",{}],', "").replace('["Relu",{}]', "") for k in found)

    assert plain(keys) == plain(others)


def test_the_dearest_kernels_come_first_and_the_rest_is_named():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock, target = Clock(), Target()

    def slow(models):
        clock.now += len(models) * 1.0
        return target(models)

    workload = wide_workload()
    _, full = build(Target(), workload)
    _, table = build(slow, workload, seconds=target_budget(workload), clock=clock)
    assert table.failures and len({key_of(x.spec) for x in table.profile.samples}) >= 2
    cost = {signature_of(k).key: k.macs.full for k in workload.kernels if signature_of(k)}
    dearest = max(cost, key=cost.get)
    assert dearest in {key_of(x.spec) for x in table.profile.samples}
    estimate = table.estimate(workload)
    named = [u for u in estimate.unmodelled if "time limit" in u]
    assert len(named) == sum(k.method == "roofline" for k in estimate.kernels) > 0
    # the roofline of the sampled kernels is a guess, not nonsense
    assert 0.3 < estimate.latency_s / full.estimate(workload).latency_s < 3


def target_budget(workload):
    """Enough for the boundary probes and about a dozen samples at one second each."""
    counter = Target()
    build(counter, workload)
    return counter.calls[0] + 12.0


def test_an_operator_that_cannot_be_timed_is_named_and_priced_by_the_roofline():
    workload, table = build(Target(broken=("MaxPool",)))
    estimate = table.estimate(workload)
    assert [u.split(" (")[0] for u in estimate.unmodelled] == ["n_pool"]
    (pool,) = (k for k in estimate.kernels if k.name == "n_pool")
    assert pool.method == "roofline" and pool.latency_s > 0


def test_nothing_timed_at_all_is_an_error():
    with pytest.raises(MetricUnavailableError, match="could be timed"):
        build(Target(broken=("Conv", "Gemm", "MaxPool", "GlobalAveragePool")))


def test_a_timer_that_raises_for_one_model_is_heard():
    class Times(list):
        def __getitem__(self, index):
            if math.isnan(value := super().__getitem__(index)):
                raise MetricUnavailableError("no time")
            return value

    workload, table = build(lambda models: Times(Target(broken=("MaxPool",))(models)))
    assert len(table.failures) == 1
    assert math.isfinite(float(table.estimate_batch(workload)))


def test_an_unknown_block_is_refused():
    workload, table = build(Target())
    with pytest.raises(PlanError, match="'nope'"):
        table.estimate_batch(workload, {}, {"nope": np.array([True])})


# ---- interpolation -------------------------------------------------------------------------------
def test_noise_is_smoothed_and_clean_samples_are_kept():
    clean = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(monotone(clean), clean)
    noisy = np.array([1.0, 3.0, 2.0, 4.0])
    np.testing.assert_array_equal(monotone(noisy), [1.0, 2.5, 2.5, 4.0])


# ---- sample models -------------------------------------------------------------------------------
def runs(blob: bytes) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": bool}
    feed = {i.name: np.ones(i.shape, kinds[i.type]) for i in session.get_inputs()}
    assert all(np.isfinite(o).all() for o in session.run(None, feed))


def variety():
    """Nodes of many kinds on `x` [1, 8, 6, 6] and `s` [2, 5, 8], one kernel each."""
    w = {
        "wt": np.ones((8, 4, 2, 2), np.float32),
        "wg": np.ones((12, 4, 3, 3), np.float32),
        "wd": np.ones((16, 1, 3, 3), np.float32),
        "sizes": np.array([1, 8, 12, 12]),
        "roi": np.zeros(0, np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "split": np.array([3, 5]),
        "k": np.ones((8, 7), np.float32),
        "bias": np.ones(7, np.float32),
        "wl": np.ones((1, 12, 8), np.float32),
        "rl": np.ones((1, 12, 3), np.float32),
        "ln": np.ones(8, np.float32),
        "axes": np.array([1]),
        "idx": np.array([0, 2, 4]),
        "table": np.ones((9, 6), np.float32),
        "low": np.asarray(0, np.float32),
        "high": np.asarray(6, np.float32),
        "gate": np.ones((1, 8, 1, 1), np.float32),
    }
    n = helper.make_node
    nodes = [
        n("ConvTranspose", ["x", "wt"], ["y0"], name="0", strides=[2, 2], group=2),
        n("Conv", ["x", "wg"], ["y1a"], name="1", group=2, auto_pad="SAME_UPPER"),
        n("Clip", ["y1a", "low", "high"], ["y1"], name="1c"),
        n("Conv", ["x", "wd"], ["y2a"], name="2", group=8),
        n("HardSigmoid", ["y2a"], ["y2b"], name="2h", alpha=1 / 6),
        n("Mul", ["y2a", "y2b"], ["y2"], name="2m"),
        n("Resize", ["x", "", "", "sizes"], ["y3"], name="3", mode="nearest"),
        n("Resize", ["x", "", "scales"], ["y4"], name="4", mode="linear"),
        n("Split", ["x", "split"], ["y5", "y5b"], name="5", axis=1),
        n("MatMul", ["s", "k"], ["y6a"], name="6"),
        n("Add", ["y6a", "bias"], ["y6b"], name="6b"),
        n("Gelu", ["y6b"], ["y6"], name="6g"),
        n("Transpose", ["s"], ["t"], name="t", perm=[0, 2, 1]),
        n("MatMul", ["s", "t"], ["y7"], name="7"),
        n("Softmax", ["y7"], ["y8"], name="8", axis=-1),
        n("LSTM", ["s", "wl", "rl"], ["y9"], name="9", hidden_size=3),
        n("LayerNormalization", ["s", "ln", "ln"], ["y10"], name="10", axis=-1),
        n("Concat", ["x", "x"], ["y11"], name="11", axis=1),
        n("ReduceMean", ["x", "axes"], ["y12"], name="12"),
        n("AveragePool", ["x"], ["y13"], name="13", kernel_shape=[2, 2], strides=[2, 2]),
        n("Gather", ["table", "idx"], ["y14"], name="14"),
        n("Mul", ["x", "gate"], ["y15"], name="15"),
    ]
    outputs = [f"y{i}" for i in range(16)] + ["y5b"]
    return make_program(nodes, {"x": (1, 8, 6, 6), "s": (2, 5, 8)}, outputs, w)


def test_every_kind_of_kernel_has_a_sample_model_that_runs():
    workload = build_workload(variety())
    assert {k.op_type for k in workload.kernels} >= {"LSTM", "ConvTranspose", "Resize", "Split", "MatMul"}
    for kernel in workload.kernels:
        signature = signature_of(kernel)
        assert signature is not None, kernel.name
        if signature.kind == "contraction":
            full = [round(v.full) for v in signature.variables]
            runs(sample_model(signature.spec, full))
            if full:
                runs(sample_model(signature.spec, [2 * v for v in full]))
        else:
            moved = signature.variables[0].full
            runs(sample_model(signature.spec, [moved]))
            assert nearest_sizes(signature.spec, [moved]) == (moved,), kernel.name


def test_sample_models_of_a_narrowed_network_run_and_count_like_it():
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents)
    for kernel in workload.kernels:
        signature = signature_of(kernel)
        if signature.kind == "contraction":
            sizes = [max(1, round(v.full / 2)) for v in signature.variables]
            blob = sample_model(signature.spec, sizes)
            program = make_program(**parts_of(blob))
            half = {g: 0.5 for g in GROUPS}
            got = build_workload(program).evaluate().macs
            if all(any(f for _, f in v.terms) for v in signature.variables):
                assert float(got) == float(kernel.macs.evaluate(half)), kernel.name
        else:
            blob = sample_model(signature.spec, [signature.variables[0].full / 2])
        runs(blob)


def parts_of(blob: bytes) -> dict:
    graph = onnx.load_from_string(blob).graph
    inputs = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in graph.input}
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in graph.initializer}
    return {
        "nodes": graph.node,
        "inputs": inputs,
        "outputs": [o.name for o in graph.output],
        "weights": weights,
    }


def test_boundary_probes_run_and_stay_few():
    wanted = [((1, h, h), c) for h in (4, 8, 16) for c in range(3, 200)]
    chosen = probes(wanted)
    assert len(chosen) <= 40
    assert {where for where, _ in chosen} == {(1, h, h) for h in (4, 8, 16)}
    for blob in probe_models(chosen[:3]):
        runs(blob)


def test_control_flow_has_no_sample_and_says_so():
    out = helper.make_tensor_value_info
    bodies = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["x"], [f"{name}_y"], name=name)],
            name,
            [],
            [out(f"{name}_y", TensorProto.FLOAT, None)],
        )
        for name, op in (("then", "Relu"), ("else", "Neg"))
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], name="h", pads=[1] * 4),
        helper.make_node("If", ["c"], ["y"], name="choice", **bodies),
    ]
    weights = {"w": np.ones((8, 8, 3, 3), np.float32), "c": np.asarray(True)}
    workload = build_workload(make_program(nodes, {"x": (1, 8, 6, 6)}, ["y", "h"], weights))
    _, table = build(Target(), workload)
    assert table.estimate(workload).unmodelled == ("choice (If): no sample model exists for it",)


def test_targets_are_described():
    assert described_targets() == ("onnxruntime", "openvino")
    for name in described_targets():
        assert describe_target(name).name == name and describe_target(name).kind == "cpu"
    with pytest.raises(UsageError, match=r"'abacus'.*onnxruntime"):
        describe_target("abacus")
