"""The roofline by hand, its metamorphic laws, fitting back known constants, energy, and what it does not know."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from cost_networks import make_program, mobilenet_v2, residual, residual_blocks, resnet50
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from sartor.cost_models.descriptions import describe_target, described_devices, parse_description
from sartor.cost_models.energy import EnergyModel
from sartor.cost_models.profile import Sample
from sartor.cost_models.protocol import CostModel, KernelModel
from sartor.cost_models.roofline import Roofline
from sartor.cost_models.roofline_law import UNFITTED_LOG_SD, Level, RooflineConstants
from sartor.cost_models.signatures import signature_of
from sartor.cost_models.work import work_of_spec
from sartor.errors import MetricUnavailableError, PlanError, UsageError
from sartor.ir.program import Batch
from sartor.ir.workload import build_workload

PLAIN = RooflineConstants(macs_per_s=1e9, bytes_per_s=1e8, launch_s=1e-6)
CPU = dataclasses.replace(
    PLAIN,
    units=4,
    tile_rows=8,
    tile_columns=16,
    grid_out=8,
    grid_in=4,
    depthwise_macs_per_s=2e8,
    levels=(Level(2e4, 1e10), Level(4e5, 1e9)),
)
GROUPS = {"a": 16, "b": 24, "e": 40, "m0": 16, "m1": 24, "m2": 24}


def conv(c_in, c_out, size=8, k=3, dtype="FLOAT", group=1):
    """Spec and sizes of a convolution that keeps its size."""
    spec = {
        "op": "Conv",
        "dtype": dtype,
        "batch": 1,
        "spatial": [size, size],
        "out": [size, size],
        "attributes": {"kernel_shape": [k, k]},
        "epilogue": [],
    }
    if group == 1:
        return {**spec, "group": 1}, (c_in, c_out)
    if group == c_in == c_out:
        return {**spec, "multiplier": 1}, (c_in,)
    return {**spec, "group": "*"}, (group, c_in // group, c_out // group)


def seconds(constants, spec, sizes, **options):
    return float(Roofline(constants, **options).terms(spec, work_of_spec(spec, sizes)).seconds)


def workload_of(net=None):
    net = net or residual()
    return build_workload(
        net.program(("logits",)), net.extents, residual_blocks() if net.shape[0] == 2 else ()
    )


# ---- by hand -----------------------------------------------------------------------------------
def test_compute_bound_bandwidth_bound_and_launch_by_hand():
    spec, sizes = conv(16, 32, 16)
    macs, moved = 256 * 16 * 32 * 9, 4 * (256 * 16 + 256 * 32 + 16 * 32 * 9 + 32)
    assert seconds(PLAIN, spec, sizes) == pytest.approx(1e-6 + max(macs / 1e9, moved / 1e8))
    assert moved / 1e8 < macs / 1e9
    slow = dataclasses.replace(PLAIN, bytes_per_s=1e7)
    assert seconds(slow, spec, sizes) == pytest.approx(1e-6 + moved / 1e7)
    terms = Roofline(slow).terms(spec, work_of_spec(spec, sizes))
    assert terms.bound() == "bandwidth"
    assert Roofline(PLAIN).terms(spec, work_of_spec(spec, sizes)).bound() == "compute"
    late = dataclasses.replace(PLAIN, launch_s=1.0)
    assert Roofline(late).terms(spec, work_of_spec(spec, sizes)).bound() == "launch"


def test_channels_are_rounded_up_to_the_grid_on_either_side():
    grid = RooflineConstants(1e9, 1e15, grid_out=16, grid_in=4)
    assert seconds(grid, *conv(4, 17)) == pytest.approx(64 * 4 * 32 * 9 / 1e9)
    assert seconds(grid, *conv(4, 32)) == seconds(grid, *conv(3, 31)) < seconds(grid, *conv(4, 33))
    depthwise = dataclasses.replace(grid, depthwise_macs_per_s=1e8)
    assert seconds(depthwise, *conv(17, 17, group=17)) == pytest.approx(64 * 32 * 9 / 1e8)


def test_waves_of_tiles_leave_units_idle():
    many = RooflineConstants(4e9, 1e15, units=4, tile_rows=64, tile_columns=8)
    one_tile, wave, next_wave = (seconds(many, *conv(4, c)) for c in (8, 32, 33))
    assert one_tile == wave == pytest.approx(64 * 8 * 4 * 9 / 1e9)  # one unit has a quarter of the rate
    assert next_wave == pytest.approx(2 * wave)


def test_groups_are_priced_as_groups():
    wide = RooflineConstants(1e9, 1e15)
    dense, grouped = seconds(wide, *conv(128, 128)), seconds(wide, *conv(128, 128, group=32))
    assert dense == pytest.approx(32 * grouped)


def test_activations_are_served_by_the_innermost_level_that_holds_them():
    levels = RooflineConstants(1e15, 1e6, levels=(Level(2048, 1e9), Level(8192, 1e8)))
    spec = {"op": "Relu", "inputs": [{"slot": 0, "dims": ["*"], "dtype": "FLOAT", "stored": False}]}
    spec |= {"outputs": [["*"]], "output_dtypes": ["FLOAT"], "epilogue": []}
    assert [seconds(levels, spec, [n]) * 1e6 for n in (2048, 2049, 8193)] == pytest.approx(
        [2.048, 20.49, 8193]
    )
    weights_only = dataclasses.replace(levels, levels=(Level(2048, 1e9, "weights"),))
    assert seconds(weights_only, spec, [2048]) == pytest.approx(2048e-6)


def test_weights_stream_from_memory_for_the_share_that_does_not_fit():
    edge = RooflineConstants(1e15, 1e6, levels=(Level(8e6, 1e9),))
    spec, sizes = conv(64, 64)
    found = work_of_spec(spec, sizes)
    weights, moved = float(found.weight_bytes), float(found.read + found.written)
    fits, half = (float(Roofline(edge).terms(spec, found, n).seconds) for n in (8e6, 16e6))
    assert fits == pytest.approx((weights + moved) / 1e9)
    assert half == pytest.approx(weights * (0.5 / 1e9 + 0.5 / 1e6) + moved / 1e9)


def test_a_sequence_cannot_run_its_steps_side_by_side():
    kernel = {
        "op": "GRU",
        "dtype": "FLOAT",
        "steps": 6,
        "batch": 1,
        "directions": 1,
        "gates": 3,
        "epilogue": [],
    }
    constants = RooflineConstants(4e9, 1e15, units=4)
    assert seconds(constants, kernel, (5, 1)) == pytest.approx(6 * math.ceil(3 / 4) * 6 / 1e9)


# ---- metamorphic -------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([PLAIN, CPU]),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from([1, 7, 28]),
    st.sampled_from([1, 3]),
)
def test_more_channels_are_never_cheaper(constants, c_in, c_out, more_in, more_out, size, k):
    small = seconds(constants, *conv(c_in, c_out, size, k))
    assert seconds(constants, *conv(c_in + more_in, c_out + more_out, size, k)) >= small * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from(["macs_per_s", "bytes_per_s", "depthwise_macs_per_s", "levels", "launch_s"]),
    st.sampled_from([1, 0]),
)
def test_a_better_device_is_never_slower(c_in, c_out, what, depthwise):
    spec, sizes = conv(c_in, c_in, group=c_in) if depthwise and c_in > 1 else conv(c_in, c_out)
    if what == "levels":
        better = dataclasses.replace(
            CPU, levels=tuple(Level(2 * lv.bytes, lv.bytes_per_s) for lv in CPU.levels)
        )
    else:
        factor = 0.5 if what == "launch_s" else 2.0
        better = dataclasses.replace(CPU, **{what: factor * getattr(CPU, what)})
    assert seconds(better, spec, sizes) <= seconds(CPU, spec, sizes) * (1 + 1e-12)


kept = st.fixed_dictionaries({g: st.integers(1, size) for g, size in GROUPS.items()})


@settings(max_examples=15, deadline=None)
@given(kept, st.sampled_from(sorted(GROUPS)))
def test_networks_too_and_every_device(widths, wider):
    workload = workload_of()
    more = {**widths, wider: GROUPS[wider]}
    for name in described_devices():
        model = Roofline(name, describe_target(name).precisions[-1])
        one, two = (
            model.estimate(workload, {g: n / GROUPS[g] for g, n in w.items()}).latency_s
            for w in (widths, more)
        )
        assert one <= two * (1 + 1e-12), name


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(kept, st.booleans()), min_size=1, max_size=4))
def test_population_is_its_plans_one_by_one_and_parts_sum_to_the_whole(plans):
    workload, model = workload_of(), Roofline(dataclasses.replace(CPU, call_s=3e-5))
    fractions = {g: np.array([w[g] / size for w, _ in plans]) for g, size in GROUPS.items()}
    removed = {"block0": np.array([gone for _, gone in plans])}
    together = model.estimate_batch(workload, fractions, removed)
    assert together.shape == (len(plans),)
    for i, (widths, gone) in enumerate(plans):
        alone = model.estimate(workload, {g: n / GROUPS[g] for g, n in widths.items()}, {"block0": gone})
        assert alone.latency_s == pytest.approx(together[i], rel=1e-9)
        assert sum(k.latency_s for k in alone.kernels) + 3e-5 == pytest.approx(alone.latency_s)


def test_sizes_and_batches_are_those_of_programs_made_at_them():
    net = residual(shape=(1, 3, 16, 16))
    program = net.program(("logits",))
    program.batch = Batch(symbolic=True, inputs=("x",))
    declared = [{"x": (1, 3, 16, 16)}, {"x": (1, 3, 21, 33)}]
    workload = build_workload(program, net.extents, residual_blocks(), sizes=declared)
    model = Roofline(CPU)
    rng = np.random.default_rng(5)
    size, batch = rng.integers(0, 2, 7), rng.integers(1, 4, 7)
    fractions = {"a": rng.integers(1, 17, 7) / 16, "m1": rng.integers(1, 25, 7) / 24}
    removed = {"block0": rng.random(7) < 0.5}
    together = model.estimate_batch(workload, fractions, removed, size=size, batch=batch)
    for i in range(7):
        shape = (int(batch[i]), *declared[size[i]]["x"][1:])
        real = residual(shape=shape)
        alone = build_workload(real.program(("logits",)), real.extents, residual_blocks())
        plan = {g: v[i] for g, v in fractions.items()}, {"block0": bool(removed["block0"][i])}
        assert together[i] == pytest.approx(model.estimate(alone, *plan).latency_s)
        one = model.estimate(workload, *plan, size=int(size[i]), batch=int(batch[i]))
        assert together[i] == pytest.approx(one.latency_s)
    assert model.estimate_batch(workload, fractions).shape == (7,)
    assert model.estimate_batch(workload, size=1) > model.estimate_batch(workload)
    with pytest.raises(PlanError, match="not declared"):
        model.estimate_batch(workload, size=2)


# ---- networks, metrics, what is not known ------------------------------------------------------
def test_a_network_on_a_device_with_breakdown_and_absent_metrics():
    workload = workload_of(mobilenet_v2())
    estimate = Roofline("jetson-nano", "f16").estimate(workload)
    assert isinstance(Roofline("jetson-nano", "f16"), CostModel)
    assert isinstance(Roofline(PLAIN), KernelModel)
    assert 1e-3 < estimate.latency_s < 1e-2  # 300 MMAC at 236 GMAC/s, 52 launches, depthwise at 25.6 GB/s
    assert {k.bound for k in estimate.kernels} == {"launch", "bandwidth", "compute"}
    assert estimate.read("macs") == pytest.approx(300.8e6, rel=2e-4)
    assert all(k.method == "roofline" for k in estimate.kernels)
    assert "jetson-nano" in estimate.method and "published constants" in estimate.method
    assert "clocks below their maximum" in estimate.unmodelled
    for absent in (lambda: estimate.interval, lambda: estimate.read("energy_j")):
        with pytest.raises(MetricUnavailableError):
            absent()


def test_weights_beyond_the_cache_are_what_makes_the_edge_tpu_slow():
    """ResNet-50 in int8 has 25.5 MB of weights on a chip that keeps 8: 17.5 MB cross a link of 0.5 GB/s."""
    workload = workload_of(resnet50())
    estimate = Roofline("edge-tpu", "int8").estimate(workload)
    assert 0.030 < estimate.latency_s < 0.045
    small = Roofline("edge-tpu", "int8").estimate(workload_of(mobilenet_v2()))
    assert small.latency_s < 0.004


def test_what_does_not_fit_a_microcontroller_is_said():
    estimate = Roofline("stm32f746", "int8").estimate(workload_of(mobilenet_v2()))
    said = [line for line in estimate.unmodelled if "does not fit" in line]
    assert len(said) == 2 and "bytes of weights, 1,048,576 bytes of flash" in said[0]
    assert (
        "1,505,280 bytes of activations of one kernel, 327,680 bytes of SRAM" in said[1]
    )  # b2.dw: 96 channels
    small = Roofline("stm32f746", "int8").estimate(workload_of())
    assert not any("fit" in line for line in small.unmodelled)


def test_precision_changes_rates_and_bytes():
    workload = workload_of(resnet50())
    f32, f16, int8 = (Roofline("jetson-agx-xavier", p).estimate(workload) for p in ("f32", "f16", "int8"))
    assert f32.read("traffic_bytes") == pytest.approx(2 * f16.read("traffic_bytes"), rel=1e-6)
    assert f32.read("traffic_bytes") == pytest.approx(4 * int8.read("traffic_bytes"), rel=1e-6)
    assert f32.latency_s > 2 * f16.latency_s > 2 * int8.latency_s


def test_control_flow_is_priced_and_named():
    def body(name):
        out = helper.make_tensor_value_info("r_" + name, 1, None)
        return helper.make_graph([helper.make_node("Relu", ["h"], ["r_" + name])], name, [], [out])

    branches = {"then_branch": body("then"), "else_branch": body("else")}
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], name="h"),
        helper.make_node("If", ["c"], ["y"], name="choice", **branches),
    ]
    program = make_program(nodes, {"x": (1, 8, 6, 6)}, ["y", "h"], {"c": np.asarray(True)})
    estimate = Roofline(PLAIN).estimate(build_workload(program))
    assert any("choice (If)" in line for line in estimate.unmodelled)
    assert len(estimate.kernels) == 2 and all(k.latency_s > 1e-6 for k in estimate.kernels)


def test_refusals():
    with pytest.raises(UsageError, match=r"no rate for precision 'int8'.*\['f32', 'f16'\]"):
        Roofline("jetson-nano", "int8")
    with pytest.raises(UsageError, match="needs a precision"):
        Roofline("jetson-nano")
    with pytest.raises(UsageError, match=r"'int3' is not one of"):
        Roofline(PLAIN, "int3")
    with pytest.raises(UsageError, match="no published constants"):
        Roofline("onnxruntime", "f32")
    with pytest.raises(UsageError, match="'macs_per_s' is 0"):
        RooflineConstants(0, 1)
    with pytest.raises(UsageError, match="no samples"):
        Roofline.fitted([])
    with pytest.raises(UsageError, match="kind 'roofline/1'"):
        Roofline.load({"kind": "table"})
    with pytest.raises(UsageError, match="malformed"):
        Roofline.load({"kind": "roofline/1", "constants": {}})


# ---- energy ------------------------------------------------------------------------------------
def test_energy_by_hand_and_only_where_the_file_has_it():
    from test_descriptions import GOOD

    board = parse_description(GOOD, "board")
    model = EnergyModel.of(board, "int8")
    assert model.energy_j(1e9, 1e8, 2.0) == pytest.approx(0.5 * 2 + 2e-12 * 1e9 + 10e-12 * 1e8)
    estimate = Roofline(board, "int8").estimate(workload_of())
    assert estimate.read("energy_j") == pytest.approx(
        model.energy_j(estimate.read("macs"), estimate.read("traffic_bytes"), estimate.latency_s)
    )
    plans = {"a": np.array([1.0, 0.5])}
    together = Roofline(board, "int8").evaluate(workload_of(), plans)
    for i, kept in enumerate(plans["a"]):
        alone = Roofline(board, "int8").estimate(workload_of(), {"a": kept})
        assert {name: values[i] for name, values in together.items()} == pytest.approx(dict(alone.metrics))
    assert "energy_j" not in Roofline("jetson-nano", "f16").evaluate(workload_of())
    assert EnergyModel.of(describe_target("jetson-nano"), "f16") is None
    assert EnergyModel.of(board, "f32") is None


# ---- fitting -----------------------------------------------------------------------------------
TRUE = RooflineConstants(
    macs_per_s=4e10,
    bytes_per_s=2e9,
    launch_s=3e-6,
    depthwise_macs_per_s=5e9,
    grid_out=16,
    levels=(Level(math.inf, 2e10),),
)


def drawn(count=160, noise=0.03, outliers=0.0, seed=0):
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        c_in, c_out = (int(2 ** rng.uniform(2, 9)) for _ in range(2))
        depthwise = rng.random() < 0.3
        k, size = int(rng.choice([1, 3])), int(rng.choice([7, 14, 28, 56]))
        spec, sizes = conv(c_in, c_in, size, 3, group=c_in) if depthwise else conv(c_in, c_out, size, k)
        warm = seconds(TRUE, spec, sizes) * math.exp(noise * rng.standard_normal())
        if rng.random() < outliers:
            warm *= 20.0
        samples.append(Sample(spec, sizes, "conv", warm))
    return samples


@pytest.mark.parametrize("outliers", [0.0, 0.25])
def test_known_constants_are_found_again_with_noise_and_outliers(outliers):
    found = Roofline.fitted(drawn(outliers=outliers), grid_out=16).constants
    assert found.macs_per_s == pytest.approx(4e10, rel=0.1)
    assert found.depthwise_macs_per_s == pytest.approx(5e9, rel=0.1)
    assert found.bytes_per_s == pytest.approx(2e10, rel=0.3) and not found.levels
    assert found.launch_s == pytest.approx(3e-6, rel=0.25)
    assert found.log_sd < 0.1 and found.samples == 160


def test_a_wrong_grid_is_seen_in_the_error():
    right, wrong = (Roofline.fitted(drawn(), grid_out=g).constants.log_sd for g in (16, 128))
    assert wrong > 1.5 * right


def test_the_grid_is_found():
    assert Roofline.fitted(drawn()).constants.grid_out == 16
    assert Roofline.fitted(drawn(outliers=0.25)).constants.grid_out == 16
    assert Roofline.fitted(drawn(), grid_out=4).constants.grid_out == 4


def test_update_moves_published_constants_towards_samples_and_knows_how_much_it_rests_on():
    first = Roofline(dataclasses.replace(TRUE, macs_per_s=1.6e11, samples=0))
    updated = first.update(drawn())
    assert updated.constants.macs_per_s == pytest.approx(4e10, rel=0.15)
    assert updated.constants.samples == 160 and updated.constants.log_sd < 0.1 < first.constants.log_sd
    assert first.update([]) is first
    firm = Roofline(dataclasses.replace(TRUE, macs_per_s=1.6e11, samples=100_000)).update(drawn(40))
    assert firm.constants.macs_per_s > 1.2e11


def test_saved_is_loaded_the_same():
    for model in (Roofline.fitted(drawn(30)), Roofline("edge-tpu", "int8"), Roofline(TRUE, "f16", name="n")):
        again = Roofline.load(json.loads(json.dumps(model.save(), allow_nan=False)))
        assert again.constants == model.constants and again.method == model.method


def test_prediction_of_one_kernel_has_the_shape_of_its_sizes_and_a_spread():
    signature = next(signature_of(k) for k in workload_of().kernels if k.name == "n_b0.c1")
    model = Roofline(CPU)
    sizes = [np.array([[4, 8], [16, 16]]), np.array([[4, 8], [8, 16]])]
    found, spread = model.predict(signature, sizes)
    assert found.shape == spread.shape == (2, 2) and np.all(spread == UNFITTED_LOG_SD)
    assert model.knows(signature) and model.tier == "roofline"
    assert np.all(np.diff(found.ravel()) >= 0)
