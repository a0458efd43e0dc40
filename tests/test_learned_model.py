"""Features, trees as arrays, and the learned model of kernel times on a machine whose law is known."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
from cost_networks import Net
from cost_profiles import conv_spec, depthwise_spec, draw_kernel, gemm_spec, grouped_spec, sample, true_s

from sartor.cost_models import learned
from sartor.cost_models.features import alignment, family_of, features, names_of, ways_of
from sartor.cost_models.learned import BoostedResidual, as_signature, signature_at
from sartor.cost_models.profile import Sample
from sartor.cost_models.protocol import KernelModel
from sartor.cost_models.rates import Rates, columns_of, fitted
from sartor.cost_models.samples import moved_bytes
from sartor.cost_models.scores import ranks, spearman, summary
from sartor.cost_models.signatures import key_of, signature_of
from sartor.cost_models.table import Corrections, KernelTable, corrections, predict_samples
from sartor.cost_models.trees import Trees, from_lightgbm
from sartor.cost_models.work import work_of_spec
from sartor.errors import MetricUnavailableError, UsageError
from sartor.ir.workload import build_workload
from sartor.profiling.shapes import activations_product, moving, product


def drawn(count, seed=0, noise=0.02):
    rng = np.random.default_rng(seed)
    return [sample(*draw_kernel(rng), rng, noise) for _ in range(count)]


@pytest.fixture(scope="module")
def samples():
    """A draw, and depthwise convolutions next to multiples of 16."""
    rng = np.random.default_rng(1)
    near = [
        (depthwise_spec(int(rng.choice([7, 14, 28]))), 16 * rng.integers(1, 20) - rng.integers(0, 4))
        for _ in range(70)
    ]
    return drawn(500) + [sample(spec, (float(c),), rng, 0.02) for spec, c in near]


@pytest.fixture(scope="module")
def base(samples):
    return fitted(samples)


@pytest.fixture(scope="module")
def fit(samples, base):
    return learned.fit(samples, base)


def predicted(model, spec, at):
    seconds, _ = model.predict(signature_at(spec, family_of(spec), at), [np.array([float(v)]) for v in at])
    return float(seconds[0])


# ---- features ------------------------------------------------------------------------------------
def test_every_kind_of_kernel_has_its_columns():
    pool = {
        "op": "MaxPool",
        "attributes": {"kernel_shape": [3, 3], "strides": [2, 2]},
        "inputs": [{"slot": 0, "dims": [1, "*", 28, 28], "dtype": "FLOAT", "stored": False}],
        "outputs": [[1, "*", 14, 14]],
        "output_dtypes": ["FLOAT"],
        "output_count": 1,
        "epilogue": [],
    }
    cases = [(conv_spec(14), 2), (depthwise_spec(14), 1), (grouped_spec(14), 3), (gemm_spec(), 2), (pool, 1)]
    for spec, variables in cases:
        rows = features(spec, [np.array([16.0, 32.0, 33.0])] * variables)
        assert rows.shape == (3, len(names_of(spec))) and np.isfinite(rows).all()
        assert (rows[0] != rows[1]).any() and (rows[1] != rows[2]).any()


def test_groups_are_features_of_their_own():
    """Equal work in and out, other groups: another kernel."""
    names = names_of(conv_spec(14))
    dense = dict(zip(names, features(conv_spec(14), [[64.0], [64.0]])[0], strict=True))
    grouped = dict(zip(names, features(grouped_spec(14), [[8.0], [8.0], [8.0]])[0], strict=True))
    deep = dict(zip(names, features(depthwise_spec(14), [[64.0]])[0], strict=True))
    for name in ("log_c_in", "log_c_out", "log_rows", "log_written", "align_out"):
        assert dense[name] == pytest.approx(grouped[name]) == pytest.approx(deep[name])
    assert grouped["log_groups"] == pytest.approx(np.log(8)) and deep["log_groups"] == pytest.approx(
        np.log(64)
    )
    assert dense["log_macs"] - grouped["log_macs"] == pytest.approx(np.log(8))
    assert dense["log_macs"] - deep["log_macs"] == pytest.approx(np.log(64))
    assert grouped["log_channels"] == pytest.approx(np.log(8)) and deep["log_channels"] == 0.0


def test_alignment_counts_powers_of_two_up_to_a_vector():
    np.testing.assert_array_equal(alignment([1, 2, 12, 16, 32, 64, 46, 2.5]), [0, 1, 2, 4, 5, 5, 1, 0])


@pytest.mark.parametrize(
    ("perm", "moved"),
    [
        ([0, 2, 1], 1),
        ([0, 2, 3, 1], 1),
        ([0, 3, 1, 2], 1),
        ([2, 0, 3, 1, 4], 2),
        ([2, 0, 3, 4, 1], 2),
        ([1, 0], 1),
    ],
)
def test_a_transposition_is_told_by_how_many_axes_it_takes_out(perm, moved):
    dims = [1, "*", 8, 6, 4][: len(perm)]
    spec = moving("Transpose", [dims], [[dims[i] for i in perm]], {"perm": perm})
    row = dict(zip(names_of(spec), features(spec, [np.array([4e4])])[0], strict=True))
    assert row["axes_moved"] == moved


def test_a_normalization_behind_a_transposition_is_a_kernel_of_its_own():
    """Some runtimes leave the map in the order that it had, and put it in order inside the normalization."""
    net = Net((1, 24, 10, 10))
    for name in ("scale", "bias"):
        net.weights[name] = np.ones(24, np.float32)
    turned = net.node("Transpose", ["x"], "turned", 24, (10, 10), perm=[0, 2, 3, 1])
    for name, source in (("first", turned), ("second", "added")):
        if name == "second":
            net.node("Add", ["first", turned], "added", 24, (10, 10))
        net.node("LayerNormalization", [source, "scale", "bias"], name, 24, (10, 10), axis=-1)
    workload = build_workload(net.program(("second",)))
    norms = [signature_of(k) for k in workload.kernels if k.op_type == "LayerNormalization"]
    assert [s.spec.get("turned", False) for s in norms] == [True, False] and norms[0].key != norms[1].key
    rows = [dict(zip(names_of(s.spec), features(s.spec, [[2e4]])[0], strict=True)) for s in norms]
    assert [row["turned"] for row in rows] == [1.0, 0.0]
    plain = moving("LayerNormalization", [[1, 8, 8, "*"], ["*"], ["*"]], [[1, 8, 8, "*"]], {"axis": -1})
    rng, samples = np.random.default_rng(0), []
    for _ in range(120):
        for spec, per_byte in (({**plain, "turned": True}, 4e-10), (plain, 6e-11)):
            size = moved_bytes(spec, int(rng.integers(4, 400)))
            samples.append(Sample(spec, (size,), "norm", 1e-6 + per_byte * size, network="n-0"))
    laws = fitted(samples)
    for one in samples[:2]:
        said = laws.predict(as_signature(one), [np.array(one.at)])[0]
        assert float(np.ravel(said)[0]) == pytest.approx(one.seconds, rel=0.05)


def test_kernels_without_a_variable_are_learned_from_too():
    """Products between activations of which no plan changes a dimension."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(60):
        spec = activations_product(int(rng.integers(1, 9)), int(rng.integers(8, 65)), 64, 32)
        for period_s in (1e-4, 1e-3, 1e-2)[: 1 + number % 3]:
            seconds = 2e-6 + float(work_of_spec(spec, ()).macs) / 20e9
            samples.append(Sample(spec, (), "matmul", seconds, period_s=period_s))
    spec = samples[-1].spec
    assert features(spec, [], np.array([1e-4, 1e-3])).shape == (2, len(names_of(spec)))
    laws = fitted(samples)
    model = learned.fit(samples, laws).model
    seconds, _ = model.predict(as_signature(samples[-1]), [], 1e-3)
    assert float(np.ravel(seconds)[0]) == pytest.approx(samples[-1].seconds, rel=0.1)
    said, _ = predict_samples((model, laws), samples)
    np.testing.assert_allclose(said, [s.seconds for s in samples], rtol=0.2)
    table = KernelTable((model, laws), Corrections(samples, (model, laws)))
    several, _ = table.predict(as_signature(samples[-1]), [], np.array([1e-4, 1e-3, 1e-2]))
    np.testing.assert_allclose(several, samples[-1].seconds, rtol=0.1)


def test_a_product_with_a_stored_matrix_is_known_from_those_of_another_operator():
    """Few samples of a MatMul, none of so few rows; of a Gemm there are many, and it is the same to the machine."""
    rng = np.random.default_rng(0)

    def timed(op, rows, at):
        spec = product(op, rows, [])
        macs = float(np.prod(rows)) * at[0] * at[1]
        slower = 1.6 if np.prod(rows) < 64 else 1.0
        return Sample(spec, at, family_of(spec), 3e-6 + slower * macs / 50e9)

    def widths():
        return tuple(float(v) for v in rng.integers(32, 1024, 2))

    samples = [timed("Gemm", (int(rng.choice([16, 36, 50, 64, 100, 256])),), widths()) for _ in range(200)]
    samples += [timed("MatMul", (1, 256), widths()) for _ in range(12)]
    model = learned.fit(samples, fitted(samples)).model
    wanted = timed("MatMul", (1, 50), (768.0, 512.0))
    assert model.knows(as_signature(wanted))
    assert predicted(model, wanted.spec, wanted.at) == pytest.approx(wanted.seconds, rel=0.1)


def test_one_depthwise_channel_is_computed_as_a_block_of_them():
    """It is a convolution of one group; of an image of few channels it has only that."""
    ways = ways_of(depthwise_spec(14), work_of_spec(depthwise_spec(14), [np.array([1.0, 3.0, 16.0])]))
    assert ways[0] == ways[2] == "blocked window" and ways[1] == "unblocked window"


def test_the_softmax_of_attention_is_work():
    """As much as its scores are, whatever the width of a head."""
    heads = activations_product(3, 200, "*", 200)
    fused = {**heads, "epilogue": [["Softmax", {}], ["MatMul", {}]]}
    laws = fitted(
        [
            Sample(spec, (float(d),), "matmul", 1e-6 + 2 * 3 * 200 * 200 * d / 50e9 + extra)
            for d in range(8, 72, 4)
            for spec, extra in ((fused, 3 * 200 * 200 * 1e-9), (heads, 0.0))
        ]
    )
    law = next(law for name, law in laws.laws.items() if name.startswith("matmul/MatMul"))
    assert law.per_element_s == pytest.approx(1e-9, rel=0.05)


# ---- trees ---------------------------------------------------------------------------------------
def test_trees_say_what_lightgbm_says_on_thresholds_too():
    lightgbm = pytest.importorskip("lightgbm")
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 20, (400, 5)).astype(float)  # few values: many rows lie exactly on a threshold
    target = rows[:, 0] * rows[:, 1] + 10 * (rows[:, 2] > 7) + rng.standard_normal(400)
    options = {"num_leaves": 15, "min_data_in_leaf": 3, "verbose": -1, "num_threads": 1}
    booster = lightgbm.train(options, lightgbm.Dataset(rows, target), num_boost_round=30)
    trees = from_lightgbm(booster.dump_model())
    thresholds = trees.number[trees.feature == 0]
    asked = np.vstack([rows, np.tile(thresholds[:, None], (1, 5)), rng.normal(10, 20, (300, 5))])
    np.testing.assert_allclose(trees.predict(asked), booster.predict(asked), rtol=1e-12)
    again = Trees.from_dict(json.loads(json.dumps(trees.to_dict())))
    np.testing.assert_array_equal(again.predict(asked), trees.predict(asked))


def test_many_rows_are_walked_in_chunks(fit, monkeypatch):
    trees = fit.model.families["conv"].folds[0]
    rows = np.random.default_rng(0).normal(3, 3, (100, len(fit.model.families["conv"].names) + 1))
    whole = trees.predict(rows)
    monkeypatch.setattr("sartor.cost_models.trees._CELLS", 7 * len(trees.roots))
    np.testing.assert_allclose(trees.predict(rows), whole, rtol=1e-12)


def test_rows_that_have_something_in_common_are_walked_as_if_they_were_alone(fit):
    """What all of them take alike is passed over before."""
    trees = fit.model.families["conv"].folds[0]
    rows = np.random.default_rng(0).normal(3, 3, (40, len(fit.model.families["conv"].names) + 1))
    rows[:, ::2] = rows[0, ::2]
    alone = [float(trees.predict(row[None, :])[0]) for row in rows]
    np.testing.assert_allclose(trees.predict(rows), alone, rtol=1e-12)
    same = np.tile(rows[0], (3, 1))
    np.testing.assert_allclose(trees.predict(same), alone[0], rtol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"right": [2, 1, 9]},
        {"right": [0, 1, 2]},
        {"number": [1.0]},
        {"roots": [5]},
        {"number": [1, 2, np.inf]},
    ],
)
def test_arrays_that_are_no_trees_are_refused(change):
    good = {"feature": [0, -1, -1], "number": [0.5, 1.0, 2.0], "right": [2, 1, 2], "roots": [0]}
    np.testing.assert_array_equal(Trees.from_dict(good).predict(np.array([[0.5], [0.6]])), [1.0, 2.0])
    with pytest.raises(ValueError, match="trees"):
        Trees.from_dict({**good, **change})


# ---- the learned model ---------------------------------------------------------------------------
def test_unseen_kernels_are_predicted_better_than_by_the_roofline(fit, base):
    unseen = [s for s in drawn(150, seed=9, noise=0.0) if s.family in fit.families]
    truth = [s.seconds for s in unseen]
    scores = {
        name: summary([predicted(model, s.spec, s.at) for s in unseen], truth)
        for name, model in (("learned", fit.model), ("roofline", base))
    }
    assert scores["learned"]["mape"] < 0.05 and scores["learned"]["mape"] < 0.6 * scores["roofline"]["mape"]
    assert scores["learned"]["spearman"] > 0.99 and abs(scores["learned"]["bias"]) < 0.02
    assert isinstance(fit.model, KernelModel) and isinstance(base, KernelModel)


def test_what_it_says_of_its_error_is_what_its_error_is(fit):
    unseen = [s for s in drawn(200, seed=5) if s.family in fit.families]
    scores = []
    for one in unseen:
        seconds, sd = fit.model.predict(as_signature(one), [np.array([v]) for v in one.at])
        scores.append(float(np.log(one.seconds / seconds[0]) / np.hypot(sd[0], 0.02)))
    assert 0.6 < np.sqrt(np.mean(np.square(scores))) < 1.6


def test_grouped_and_wide_convolutions_are_not_taken_for_each_other(fit):
    """ResNeXt-50 32x4d and Wide ResNet-50-2 have equal widths, and a thirty-second of the work in between."""
    resnext, wide = (grouped_spec(14), (32, 8, 8)), (conv_spec(14), (256, 256))
    truth = true_s(*wide) / true_s(*resnext)
    assert truth > 8
    assert predicted(fit.model, *wide) / predicted(fit.model, *resnext) == pytest.approx(truth, rel=0.35)


def test_widths_off_the_grid_are_known_to_be_slow(fit):
    slow, fast = (predicted(fit.model, depthwise_spec(14), (c,)) for c in (126, 128))
    assert slow / fast == pytest.approx(3.0, rel=0.3)


def test_a_sample_says_nothing_to_the_fold_that_judges_it(samples):
    named = [dataclasses.replace(s, network=f"net-{i // 10}") for i, s in enumerate(samples[:200])]
    for of, key in ((samples, lambda s: as_signature(s).key), (named, lambda s: s.network)):
        number = learned._folds(of)
        by_key = {}
        for one, fold in zip(of, number, strict=True):
            by_key.setdefault(key(one), set()).add(int(fold))
            assert fold == learned.fold_of_sample(one)
        assert all(len(folds) == 1 for folds in by_key.values()) and 4 <= len(set(number)) <= learned.FOLDS


def test_fitting_is_deterministic_and_survives_its_file(fit, samples, base):
    few = samples[:200]
    first, second = learned.fit(few, base).model.save(), learned.fit(few, base).model.save()
    assert first == second
    again = BoostedResidual.load(json.loads(json.dumps(fit.model.save())), Rates.load(base.save(), {}))
    at = (conv_spec(28), (48, 80))
    assert predicted(again, *at) == predicted(fit.model, *at)
    with pytest.raises(ValueError, match="kind"):
        BoostedResidual.load({"conv": {**first["conv"], "kind": "other"}}, base)


def test_families_with_few_samples_are_left_to_the_roofline(samples, base):
    few = [s for s in samples if s.family != "gemm"]
    few += [s for s in samples if s.family == "gemm"][: learned.FEWEST - 1]
    model = learned.fit(few, base).model
    gemm = signature_at(gemm_spec(), "gemm", (64.0, 64.0))
    assert not model.knows(gemm) and model.knows(signature_at(conv_spec(14), "conv", (64.0, 64.0)))
    transposed = signature_at({**conv_spec(14), "op": "ConvTranspose"}, "conv", (64.0, 64.0))
    assert not model.knows(transposed)  # of the family, but no sample had this operator


def test_without_the_library_fitting_says_what_to_install_and_predicting_works(
    fit, samples, base, monkeypatch
):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(UsageError, match=r"pip install 'sartor\[profile\]'"):
        learned.fit(samples, base)
    model = BoostedResidual.load(fit.model.save(), base)
    assert predicted(model, conv_spec(28), (48, 80)) > 0


def test_updating_replaces_the_families_of_the_new_samples_only(fit, samples):
    slower = [dataclasses.replace(s, seconds=2 * s.seconds) for s in samples if s.family == "gemm"]
    model = fit.model.update(slower)
    gemm, conv = (gemm_spec(), (512, 512)), (conv_spec(14), (64, 64))
    assert predicted(model, *gemm) / predicted(fit.model, *gemm) == pytest.approx(2.0, rel=0.1)
    assert predicted(model, *conv) == predicted(fit.model, *conv)


# ---- the roofline of kernels ---------------------------------------------------------------------
def law_s(spec, at, launch_s, macs_per_s):
    found = work_of_spec(spec, [np.asarray(float(v)) for v in at])
    costly = sum(op == "Tanh" for op, _ in spec["epilogue"]) * float(found.written) / 4
    return launch_s + float(found.macs) / macs_per_s + float(found.moved) / 10e9 + costly * 1e-9


def test_laws_of_every_way_to_compute_are_recovered():
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(240):
        taps, end = int(rng.choice([1, 3])), ("Relu", "Tanh")[int(rng.integers(2))]
        spec = conv_spec(int(rng.choice([7, 28, 56])), taps, 1, (end,))
        at = tuple(
            float(4 * v + o) for v, o in zip(rng.integers(2, 64, 2), rng.integers(0, 2, 2), strict=True)
        )
        blocked = at[0] % 4 == 0
        seconds = law_s(spec, at, 2e-6 if taps == 1 else 5e-6, 30e9 if blocked else 6e9)
        samples.append(Sample(spec, at, "conv", seconds))
    laws = fitted(samples)
    for name, launch_s, rate in (
        ("blocked window", 5e-6, 30e9),
        ("unblocked window", 5e-6, 6e9),
        ("blocked point", 2e-6, 30e9),
    ):
        law = laws.laws[f"conv/Conv/{name}"]
        assert law.launch_s == pytest.approx(launch_s, rel=1e-3)
        assert 1 / law.per_mac_s == pytest.approx(rate, rel=1e-3)
        assert 1 / law.per_byte_s == pytest.approx(10e9, rel=1e-3)
        assert law.per_element_s == pytest.approx(1e-9, rel=1e-3)
    spec = conv_spec(28)
    seconds, _ = laws.predict(
        signature_at(spec, "conv", (64, 64)), [np.array([64.0, 63.0]), np.full(2, 64.0)]
    )
    np.testing.assert_allclose(
        seconds, [law_s(spec, (64, 64), 5e-6, 30e9), law_s(spec, (63, 64), 5e-6, 6e9)], rtol=1e-3
    )
    for macs, moved, bound in ((1e10, 1e3, "compute"), (0.0, 1e8, "bandwidth"), (0.0, 10.0, "launch")):
        assert laws.bound("conv", "Conv", macs, moved, 0.0, 0.0) == bound
    with pytest.raises(MetricUnavailableError, match="could be timed"):
        fitted([])


def test_windows_that_are_laid_out_cost_as_much_for_two_outputs_as_for_many():
    """Outside the blocked layout; taken for MACs, a few outputs would cost next to nothing."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(200):
        spec, at = (
            conv_spec(int(rng.choice([7, 14, 28]))),
            (float(2 * rng.integers(9, 80) + 1), float(rng.integers(1, 200))),
        )
        found = work_of_spec(spec, at)
        laid_out = 4.0 * float(found.channels * found.taps * found.rows)
        samples.append(Sample(spec, at, "conv", 2e-6 + float(found.macs) / 30e9 + laid_out / 5e9))
    law = fitted(samples).laws["conv/Conv/unblocked window"]
    assert 1 / law.per_window_byte_s == pytest.approx(5e9, rel=1e-3)
    assert 1 / law.per_mac_s == pytest.approx(30e9, rel=1e-3)


@pytest.mark.parametrize("of_networks", [200, 60])
def test_kernels_of_carriers_that_take_longer_do_not_slow_networks_down(of_networks):
    """Seen: a pooling behind what is not in blocks takes three times as long, in every carrier and in no network."""
    networks = [
        dataclasses.replace(s, period_s=1e-3, network=f"net-{i // 10}")
        for i, s in enumerate(drawn(of_networks))
    ]
    carriers = [
        dataclasses.replace(s, seconds=3 * s.seconds, period_s=1e-3, carried=True) for s in drawn(200, seed=1)
    ]
    known, asked = [*networks, *carriers], drawn(100, seed=2)
    laws = fitted(known)
    model = learned.fit(known, laws).model
    true = np.array([true_s(s.spec, s.at) for s in asked])
    for off in (predict_samples((laws,), asked)[0] / true, predict_samples((model, laws), asked)[0] / true):
        assert abs(np.log(np.median(off))) < 0.2
    assert np.median(predict_samples((model, laws), carriers)[0] / [s.seconds for s in carriers]) > 0.9


def test_output_widths_are_rounded_up_to_the_grid():
    laws = fitted(drawn(100), {"Conv": 16})
    at = [np.full(3, 64.0), np.array([33.0, 35.0, 37.0])]
    seconds, _ = laws.predict(signature_at(conv_spec(28), "conv", (64, 64)), at)
    assert seconds[0] == seconds[1] == seconds[2]
    assert fitted(drawn(100)).predict(signature_at(conv_spec(28), "conv", (64, 64)), at)[0].std() > 0
    plain = [np.full(3, 63.0), at[1]]  # in the plain layout they are not
    assert laws.predict(signature_at(conv_spec(28), "conv", (63, 64)), plain)[0].std() > 0


def test_an_operator_with_few_samples_takes_the_law_of_its_family_times_a_factor():
    def moves(op, count, per_byte_s):
        dims = [1, "*", 8, 8]
        spec = {
            "op": op,
            "attributes": {},
            "inputs": [{"slot": 0, "dims": dims, "dtype": "FLOAT", "stored": False}],
            "outputs": [dims],
            "output_dtypes": ["FLOAT"],
            "output_count": 1,
            "epilogue": [],
        }
        sizes = 512.0 * np.arange(8, 8 + count)
        return [Sample(spec, (s,), "elementwise", 1e-6 + s * per_byte_s) for s in sizes]

    laws = fitted([*moves("Relu", 40, 1e-10), *moves("Erf", 4, 6e-10)])
    relu, erf = (laws.laws[f"elementwise/{op}"] for op in ("Relu", "Erf"))
    assert relu.per_byte_s == pytest.approx(1e-10, rel=0.01)
    family = laws.laws["elementwise"]
    assert erf.per_byte_s / family.per_byte_s == pytest.approx(erf.launch_s / family.launch_s)
    (truth,) = moves("Erf", 1, 6e-10)
    assert predicted(laws, truth.spec, truth.at) == pytest.approx(truth.seconds, rel=0.3)
    assert float(family.seconds(columns_of(moved=truth.at[0]))) < 0.7 * truth.seconds


def test_coefficients_are_never_negative():
    rng = np.random.default_rng(1)
    samples = [dataclasses.replace(s, seconds=float(rng.uniform(1e-6, 1e-3))) for s in drawn(200)]
    for rate in fitted(samples).laws.values():
        assert min(rate.coefficients) >= 0


# ---- the measured tier ---------------------------------------------------------------------------
def test_samples_are_reproduced_and_the_error_grows_away_from_them(base):
    spec = conv_spec(28)
    at = [(32.0, 32.0), (32.0, 128.0), (128.0, 64.0)]  # fills no rectangle
    table = KernelTable((base,), Corrections([Sample(spec, p, "conv", true_s(spec, p)) for p in at], (base,)))
    signature = signature_at(spec, "conv", (128.0, 128.0))
    assert table.knows(signature) and not table.knows(signature_at(conv_spec(14), "conv", (8.0, 8.0)))
    seconds, sd = table.predict(signature, [np.array([p[i] for p in at]) for i in (0, 1)])
    np.testing.assert_allclose(seconds, [true_s(spec, p) for p in at], rtol=0.02)
    far, far_sd = table.predict(signature, [np.array([48.0, 1000.0]), np.array([48.0, 1000.0])])
    assert sd.max() < far_sd[0] < far_sd[1]
    roofline = predicted(base, spec, (48, 48))
    assert abs(np.log(far[0] / true_s(spec, (48, 48)))) < abs(np.log(roofline / true_s(spec, (48, 48))))


def test_leaving_one_out_in_closed_form_is_leaving_one_out(base):
    spec = conv_spec(28)
    rng = np.random.default_rng(0)
    points = [sample(spec, tuple(map(float, rng.integers(8, 256, 2))), rng, 0.02) for _ in range(8)]
    (found,) = corrections(points, (base,)).values()
    errors, expected = found.left_out()
    for index, left in enumerate(points):
        rest = points[:index] + points[index + 1 :]
        table = KernelTable((base,), Corrections(rest, (base,)))
        seconds, _ = table.predict(as_signature(left), [np.array([v]) for v in left.at])
        assert errors[index] == pytest.approx(float(np.log(left.seconds / seconds[0])), abs=1e-3)
        assert expected[index] > 0


def test_corrections_are_made_when_they_are_asked_for_and_are_those_of_all_at_once(base):
    rng = np.random.default_rng(0)
    specs = [conv_spec(28), conv_spec(14), gemm_spec()]
    points = [
        sample(s, tuple(map(float, rng.integers(8, 256, 2))), rng, 0.02) for s in specs for _ in range(6)
    ]
    asked = []

    class Counting:
        tier = "roofline"

        def knows(self, signature):
            return True

        def predict(self, signature, *arguments):
            asked.append(signature.key)
            return base.predict(signature, *arguments)

    lazy, bulk = Corrections(points, (Counting(),)), corrections(points, (base,))
    assert not asked and set(lazy) == set(bulk) and len(lazy) == 3
    first = key_of(specs[0])
    assert first in lazy and "another" not in lazy and lazy.get("another") is None and not asked
    for key in (first, first):
        np.testing.assert_array_equal(lazy[key].weights, bulk[key].weights)
    assert asked == [first]
    lazy.make([*bulk, "another"])
    for key, correction in bulk.items():
        np.testing.assert_array_equal(lazy[key].inverse, correction.inverse)
    assert sorted(asked) == sorted(bulk)


def test_a_table_takes_new_samples_of_a_signature_instead_of_the_old(base):
    rng = np.random.default_rng(0)
    old = [sample(s, (64.0, 64.0), rng, 0.0) for s in (conv_spec(28), conv_spec(14))]
    table = KernelTable((base,), Corrections(old, (base,)))
    slower = dataclasses.replace(old[0], seconds=3 * old[0].seconds)
    updated = table.update([slower])
    for one, expected in ((old[0], slower.seconds), (old[1], old[1].seconds)):
        said, _ = updated.predict(as_signature(one), [np.array([v]) for v in one.at])
        assert said[0] == pytest.approx(expected, rel=0.05)


def test_samples_of_other_sizes_than_their_kernel_has_are_refused(base):
    with pytest.raises(ValueError, match="Conv has not 2 sizes"):
        Corrections([Sample(conv_spec(28), (64.0, 64.0, 3.0), "conv", 1e-4)], (base,))


# ---- scores --------------------------------------------------------------------------------------
def test_scores():
    np.testing.assert_array_equal(ranks([3.0, 1.0, 3.0, 2.0]), [2.5, 0.0, 2.5, 1.0])
    assert spearman([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    found = summary([1.0, 2.0, 3.6], [1.0, 2.5, 3.0], [(0.9, 1.1), (1.9, 2.1), (3.0, 3.5)])
    assert found["mape"] == pytest.approx((0 + 0.2 + 0.2) / 3) and found["within_10"] == pytest.approx(1 / 3)
    assert found["coverage_90"] == pytest.approx(2 / 3) and summary([], []) == {"n": 0}


def test_what_is_wrong_at_small_sizes_is_not_carried_to_sizes_far_away(base):
    """Seen: four products of a thousand weights, slow to begin, doubled what one of a million was said to take."""
    small = [
        Sample(gemm_spec(), (k, 24.0), "gemm", 3 * predicted(base, gemm_spec(), (k, 24.0)))
        for k in (47.0, 48.0, 55.0, 56.0)
    ]
    table = KernelTable((base,), Corrections(small, (base,)))

    def off(k, n):
        return predicted(table, gemm_spec(), (k, n)) / predicted(base, gemm_spec(), (k, n))

    assert off(52.0, 24.0) == pytest.approx(3.0, rel=0.1)
    assert off(960.0, 1280.0) < 1.25
