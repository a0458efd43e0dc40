"""What a profile samples, and the networks that it generates: legal, as networks have them, near the steps."""

from __future__ import annotations

import collections
import itertools
import math
import random

import numpy as np
import onnx
import onnxruntime
import pytest
from cost_networks import make_program
from test_kernel_table import parts_of, runs

from sartor.cost_models.profile import ROLES
from sartor.cost_models.samples import nearest_sizes, sample_model
from sartor.cost_models.signatures import signature_of, variable_names
from sartor.cost_models.work import work_of_spec
from sartor.errors import UsageError
from sartor.ir.fusion_rules import GENERIC, FusionRules
from sartor.ir.workload import build_workload
from sartor.profiling import networks
from sartor.profiling.design import HELD_OUT, MOST_MACS, Design, Novelty, Point, width
from sartor.profiling.inside_samples import describe
from sartor.profiling.network_builder import Net

FUSES = {
    "Conv": ("BatchNormalization", "Bias", "Add", "Relu", "Clip", "HardSwish", "Silu"),
    "Gemm": ("Relu",),
    "MatMul": ("Bias", "Gelu"),
}


@pytest.fixture(scope="module")
def points():
    return Design(FUSES, seed=3).batch(0, 192)


def test_all_families_are_drawn_and_affordable(points):
    found = collections.Counter(p.family for p in points)
    assert set(found) == {"conv", "depthwise", "gemm", "matmul", "pool", "elementwise", "norm", "other"}
    assert found["conv"] > found["depthwise"] > found["gemm"]
    assert len({p.key for p in points}) == len(points)
    for point in points:
        assert len(point.at) == len(variable_names(point.spec))
        assert point.at == nearest_sizes(point.spec, point.at)
        assert float(work_of_spec(point.spec, point.at).macs) <= MOST_MACS


def test_draws_are_the_same_for_a_seed_and_others_for_another(points):
    assert [p.key for p in Design(FUSES, seed=3).batch(0, 192)] == [p.key for p in points]
    assert [p.key for p in Design(FUSES, seed=4).batch(0, 192)] != [p.key for p in points]
    assert not {p.key for p in Design(FUSES, seed=3).batch(1, 64)} & {p.key for p in points}


def test_a_sample_is_the_kernel_that_its_spec_says(points):
    """What the design writes is what `signature_of` writes of the sample: a network's kernel finds it."""
    rules = FusionRules.of(FUSES)
    seen = collections.Counter()
    for point in points:
        if "inputs" in point.spec or seen[point.family] >= 12:
            continue
        seen[point.family] += 1
        parts = parts_of(sample_model(point.spec, point.at))
        workload = build_workload(make_program(**parts), rules=rules)
        (kernel,) = workload.kernels
        signature = signature_of(kernel)
        spec = point.spec
        if "*" in spec.values() and spec["op"] == "MatMul":  # nothing varies in the sample itself
            names = dict(zip(variable_names(spec), map(int, point.at), strict=True))
            spec = {key: names.get(key, value) for key, value in spec.items()}
        assert signature.spec == spec
        assert signature.family == point.family
        assert [round(v.full) for v in signature.variables] == (
            [int(a) for a in point.at] if spec is point.spec else []
        )
    assert min(seen.values()) >= 3


def test_samples_run(points):
    for point in points[::6]:
        runs(sample_model(point.spec, point.at))


def test_widths_lie_on_multiples_of_8_and_next_to_steps():
    rng = random.Random(0)
    drawn = [width(rng, 4, 2048) for _ in range(4000)]
    assert min(drawn) >= 4 and max(drawn) <= 2048
    large = [c for c in drawn if c > 32]
    assert 0.4 < sum(c % 8 == 0 for c in large) / len(large) < 0.8
    assert sum(c % 8 in (1, 7) for c in large) / len(large) > 0.1
    octaves = collections.Counter(int(math.log2(c)) for c in drawn)
    assert min(octaves[o] for o in range(3, 10)) > 0.5 * max(octaves[o] for o in range(3, 10))


def test_around_a_step_are_neighbours_of_one_kernel(points):
    by_signature = collections.defaultdict(list)
    for point in points:
        by_signature[point.key[0]].append(point.at)
    around = [at for at in by_signature.values() if len(at) >= 4]
    assert around
    near = 0
    for sizes in around:
        varying = [axis for axis in zip(*sizes, strict=True) if len(set(axis)) > 1]
        near += any(max(axis) - min(axis) <= 32 for axis in varying)
    assert near > 0.5 * len(around)


def test_a_fifth_is_held_out(points):
    many = [*points, *Design(FUSES, seed=9).batch(0, 400)]
    assert abs(sum(p.heldout for p in many) / len(many) - HELD_OUT) < 0.08


def test_refinement_takes_what_is_unsure(points):
    design = Design(FUSES, seed=3)

    def unsure(signature, sizes):
        wanted = signature.spec["op"] == "MatMul"
        return np.where(wanted, np.log(np.asarray(sizes[0], float)), 0.01)

    chosen = design.refine(0, 24, unsure, [p.key for p in points])
    assert len(chosen) == 24 and not {p.key for p in chosen} & {p.key for p in points}
    assert sum(p.spec["op"] == "MatMul" for p in chosen) >= 8
    assert max(collections.Counter(p.key[0] for p in chosen).values()) <= 4


def test_novelty_is_zero_where_something_was_sampled(points):
    novelty = Novelty(points)
    point = next(p for p in points if p.spec["op"] == "Conv" and p.family == "conv")
    at = [np.array([a, 4 * a]) for a in point.at]
    near, far = novelty(point.signature, at)
    assert near == 0.0 < far
    unknown = Point({**point.spec, "op": "ConvTranspose"}, point.at, "conv")
    assert math.isinf(float(novelty(unknown.signature, [np.array([a]) for a in point.at])[0]))


# ---- networks ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", networks.KINDS)
def test_networks_run_and_are_described(kind):
    name = f"{kind}-0-0"
    blob = networks.network(name)
    assert networks.network(name) == blob
    session = onnxruntime.InferenceSession(blob, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feed = {i.name: rng.standard_normal(i.shape).astype(np.float32) for i in session.get_inputs()}
    (out,) = session.run(None, feed)
    assert np.isfinite(out).all() and out.std() > 0
    described = describe(blob, (), GENERIC)
    ops = {s.spec["op"] for s, _, _ in described.kernels}
    assert OF_A_KIND[kind] <= ops
    assert described.observed == () and described.rows == 0


OF_A_KIND = {
    "plain": {"Conv", "Gemm"},
    "residual": {"Conv", "Gemm"},
    "inverted": {"Conv", "Gemm"},
    "grouped": {"Conv", "Gemm"},
    "dense": {"Concat", "BatchNormalization"},
    "vit": {"LayerNormalization", "Softmax", "MatMul"},
    "branches": {"Conv", "Concat"},
    "windows": {"LayerNormalization", "MatMul", "Transpose"},
    "shuffled": {"Slice", "Concat", "Transpose"},
    "heavy": {"Gemm", "MaxPool"},
    "broad": {"Conv", "Gemm"},
    "narrow": {"Conv", "Concat"},
}


def test_kinds_have_what_they_are_named_for():
    """Windows of one row, large depthwise windows, weights that no cache holds."""
    convolutions = {}
    for kind in ("branches", "windows", "broad", "heavy"):
        found = [describe(networks.network(f"{kind}-0-{n}"), (), GENERIC) for n in range(2)]
        kernels = [(s.spec, at) for one in found for s, at, _ in one.kernels if s.spec["op"] == "Conv"]
        convolutions[kind] = kernels
        if kind in ("broad", "heavy"):
            stored = [
                sum(n * float(work_of_spec(s.spec, at).weight_bytes) for s, at, n in one.kernels)
                for one in found
            ]
            assert max(stored) > 8e6
    windows = {tuple(spec["attributes"]["kernel_shape"]) for spec, _ in convolutions["branches"]}
    assert {(1, 7), (7, 1)} & windows
    deep = [spec for spec, _ in convolutions["windows"] if "multiplier" in spec]
    assert deep and all(spec["attributes"]["kernel_shape"][0] >= 5 for spec in deep)
    assert max(max(at) for _, at in convolutions["broad"]) > 512


def test_of_every_kind_a_fifth_is_held_out():
    count = 10
    names = list(itertools.islice(networks.names(0), count * len(networks.KINDS)))
    assert len(set(names)) == len(names)
    for kind in networks.KINDS:
        roles = [networks.role_of(n) for n in names if n.startswith(f"{kind}-")]
        assert collections.Counter(roles) == {"fit": 8, "heldout": 2}
    for start in range(
        0, len(names), len(networks.KINDS)
    ):  # at any time of a run there are networks of every role
        assert {networks.role_of(n) for n in names[start : start + len(networks.KINDS)]} == set(ROLES)


def test_half_of_the_networks_have_widths_as_designers_choose_them():
    """Others have those of pruned networks; which is which does not depend on how means and gates are spelled."""
    designed, pruned = ([w for n in numbers for w in _widths(f"plain-0-{n}")] for numbers in ((2, 3), (0, 1)))
    assert all(w % 8 == 0 for w in designed) and not all(w % 8 == 0 for w in pruned)
    net = Net(random.Random(0), 64, designed=True)
    drawn = [net.width(1, 2000) for _ in range(500)]
    assert min(drawn) < 8
    for least, step in ((8, 8), (65, 32), (257, 64)):
        assert {w % step for w in drawn if w >= least} == {0}


def _widths(name):
    weights = onnx.load_from_string(networks.network(name)).graph.initializer
    return [w.dims[0] for w in weights if len(w.dims) == 4]


def test_there_are_no_networks_of_other_names():
    with pytest.raises(UsageError, match="no network 'resnet50'"):
        networks.network("resnet50")
