"""The builder of profiles on a synthetic machine whose law is known; interruptions; the check."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import math
import statistics

import pytest
from cost_profiles import conv_spec
from profile_machine import (
    BYTES,
    CALL,
    LAUNCH,
    MACS,
    PROFILER,
    REFERENCE_S,
    SLOWED,
    STEP,
    Clock,
    Machine,
    law,
    waiting_units,
)

import sartor
from sartor import backends
from sartor.backends.protocol import TargetOptions
from sartor.cost_models.features import family_of
from sartor.cost_models.fitting import fit_profile
from sartor.cost_models.profile import DeviceProfile
from sartor.cost_models.samples import weight_bytes
from sartor.cost_models.work import work_of_spec
from sartor.errors import BackendError, UsageError
from sartor.journal import Journal
from sartor.profiling import build, check, inside_samples, networks, records
from sartor.profiling.build import build_profile, journal_path
from sartor.profiling.check import check_profile
from sartor.profiling.design import Point


class Stages:
    def __init__(self):
        self.seen, self.steps = [], 0

    def stage(self, text, total=0):
        self.seen.append(text)

    def advance(self, steps=1):
        self.steps += steps


def built(folder, minutes=0.1, machine=None, progress=None, **options):
    machine = machine or Machine(noise=0.003)
    options = {"fit": lambda p: p, **options}
    return build_profile(
        "onnxruntime",
        TargetOptions(),
        folder / "device.json",
        minutes=minutes,
        progress=progress or Stages(),
        timer=machine,
        clock=machine.clock,
        **options,
    )


KINDS = ("plain", "inverted", "grouped", "dense")  # those of the anchors


@pytest.fixture(autouse=True, scope="module")
def few_kinds_of_networks_read_once():
    known, read = {}, inside_samples.workload_of

    def workload_of(model, rules, keep=()):
        key = (model, rules.sha256, tuple(keep))
        if key not in known:
            known[key] = read(model, rules, keep)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "KINDS", {kind: networks.KINDS[kind] for kind in KINDS})
        patch.setattr(build, "_NETWORKS_AT_ONCE", len(KINDS))
        patch.setattr(networks, "network", functools.cache(networks.network))
        patch.setattr(inside_samples, "workload_of", workload_of)
        yield


@pytest.fixture(scope="module")
def machine():
    return Machine(noise=0.003)


@pytest.fixture(scope="module")
def profile(tmp_path_factory, machine):
    return built(tmp_path_factory.mktemp("profile"), minutes=0.45, machine=machine)


def true_s(sample) -> float:
    """What the machine's law says of a kernel with nothing fused, run as often as the sample was."""
    spec = sample.spec
    if "inputs" in spec:
        return REFERENCE_S * law(0.0, sample.at[0])
    work = work_of_spec(spec, sample.at)
    c_out = float(work.groups * work.columns)
    padded = float(work.macs) / c_out * (-(-c_out // STEP) * STEP)
    own = law(padded, float(work.read + work.written), c_out % 4 != 0)
    return REFERENCE_S * own + waiting_s(sample)


def waiting_s(sample) -> float:
    units = waiting_units(weight_bytes(sample.spec, sample.at), sample.period_s / REFERENCE_S)
    return REFERENCE_S * units


def plain_convolutions(profile):
    return [s for s in profile.samples if s.spec["op"] == "Conv" and not s.spec["epilogue"]]


def drawn(profile):
    """Samples of carriers."""
    return [s for s in profile.samples if network_of(s, profile) is None]


def network_of(sample, profile):
    """The network that a sample ran in."""
    return next((n for n in profile.networks if n.name == sample.network), None)


# ---- what is in it -------------------------------------------------------------------------------
def test_the_law_of_the_machine_is_recovered_without_the_call_and_the_profiler(profile):
    large = [s for s in plain_convolutions(profile) if s.seconds > 0.05 * REFERENCE_S]
    errors = [abs(s.seconds / true_s(s) - 1) for s in large]
    assert len(errors) > 20
    assert statistics.median(errors) < 0.006 and max(errors) < 0.03
    assert profile.call_s == pytest.approx((CALL + LAUNCH) * REFERENCE_S, rel=0.02)
    assert profile.protocol["profiler_s"] == pytest.approx(PROFILER * REFERENCE_S, rel=0.05)


def test_a_sample_knows_how_long_ago_its_kernel_last_ran(profile):
    """In carriers and in networks: without it, the time is not the law's."""
    by_source = {True: [], False: []}
    for sample in plain_convolutions(profile):
        waiting = waiting_s(sample)
        if waiting > 0.2 * true_s(sample):
            source = network_of(sample, profile) is None
            by_source[source].append(sample.seconds / (true_s(sample) - waiting))
    for ratios in by_source.values():
        assert ratios and min(ratios) > 1.2


def test_a_sample_knows_how_many_kernels_share_its_code(profile):
    """Those of its family and operator in its network or carrier; a kernel that ran twice is two."""
    several = 0
    for sample in profile.samples:
        network = network_of(sample, profile)
        if network is not None:
            expected = sum(
                count
                for spec, _, count in network.kernels
                if (family_of(spec), spec["op"]) == (sample.family, sample.spec["op"])
            )
            several += expected > 1
        else:
            expected = sum(
                (s.period_s, s.family, s.spec["op"]) == (sample.period_s, sample.family, sample.spec["op"])
                for s in profile.samples
            )
        assert sample.alike == expected
    assert several > 50


def test_a_sample_knows_how_many_kernels_are_the_same(profile):
    """In its network; what stands in a carrier differs, and copies are not counted."""
    several = 0
    for sample in profile.samples:
        network = network_of(sample, profile)
        expected = 1
        if network is not None and sample.family != "layout":
            same = [n for spec, at, n in network.kernels if (spec, at) == (sample.spec, sample.at)]
            (expected,) = same
        assert sample.twins == expected
        several += expected > 1
    assert several > 50


def test_kernels_in_parts_and_copies_are_samples(profile):
    parts = [s for s in profile.samples if s.spec["op"] == "HardSwish"]
    assert parts
    for sample in parts:  # a part without its profiler's own time would be 3 launches off
        expected = true_s(sample) + LAUNCH * REFERENCE_S
        assert sample.seconds == pytest.approx(expected, rel=0.05, abs=0.3 * PROFILER * REFERENCE_S)
    copies = [s for s in profile.samples if s.family == "layout"]
    assert {s.spec["op"] for s in copies} == {"ReorderOutput"}
    for sample in copies:
        assert sample.seconds == pytest.approx(true_s(sample), rel=0.05, abs=0.15 * PROFILER * REFERENCE_S)


def test_kernels_and_networks_are_held_out(profile):
    assert {n.role for n in profile.networks} == {"fit", "heldout"}
    sources = {}
    for sample in profile.samples:
        network = network_of(sample, profile)
        if network is not None:
            sources.setdefault(network.name, set()).add(sample.role)
    for network in profile.networks:
        assert network.role == networks.role_of(network.name)
        assert network.sha256 == hashlib.sha256(networks.network(network.name)).hexdigest()
        assert network.kernels
        assert network.ci95[0] <= network.latency_s <= network.ci95[1]
        assert sources.get(network.name, set()) == {network.role}
    for sample in drawn(profile):
        assert (sample.role == "heldout") == Point(sample.spec, sample.at, sample.family).heldout
    roles = [s.role for s in profile.samples]
    assert 0.1 < roles.count("heldout") / len(roles) < 0.4


def test_kernels_next_to_each_other_share_their_role(profile):
    """Or the held-out error would be that of a kernel whose neighbour was fitted."""
    found = {}
    for sample in drawn(profile):
        key = (json.dumps(sample.spec, sort_keys=True), tuple(s // 64 for s in sample.at))
        found.setdefault(key, set()).add(sample.role)
    assert sum(len(roles) == 2 for roles in found.values()) < 0.1 * len(found)


def test_what_was_built_predicts_the_networks_of_the_machine(profile):
    errors = fit_profile(profile, learned=False).errors
    assert errors["networks"]["n"] == sum(n.role == "heldout" for n in profile.networks) >= 4
    assert errors["networks"]["mape"] < 0.2 and errors["networks"]["spearman"] > 0.7


def test_anchors_are_timed_again_and_known_better(profile, machine):
    known = {n.name: (n.ci95[1] / n.ci95[0]) ** 0.5 - 1 for n in profile.networks}
    anchors = [known.pop(name) for name in networks.anchors(0)]
    rounds = len(profile.networks) // len(KINDS)
    assert machine.unprofiled >= rounds // 3 + 2
    assert all(0.006 < half < 0.012 for half in known.values())  # what one timing says of itself, or two
    assert statistics.fmean(anchors) < 0.006


@pytest.mark.slow
def test_a_network_that_was_disturbed_all_the_time_that_it_was_looked_at_is_looked_at_again(tmp_path):
    """The reference saw nothing of it. All networks are looked at twice, minutes apart, and more often where the looks
    contradict each other; kernels follow.
    """
    quiet = built(tmp_path, minutes=0.65, machine=Machine())
    once = built(tmp_path, minutes=0.65, machine=Machine(busy=(5.0, 12.0)))
    always = built(tmp_path, minutes=0.65, machine=Machine(busy=(5.0, math.inf)))
    expected = {n.name: n.latency_s for n in quiet.networks}
    ratios = {n.name: n.latency_s / expected[n.name] for n in once.networks if n.name in expected}
    assert len(ratios) >= 24 and max(ratios.values()) < 1.01
    slow = [n.latency_s / expected[n.name] for n in always.networks if n.name in expected]
    assert statistics.median(slow) == pytest.approx(SLOWED, rel=0.01)  # it would have been seen
    unsure = sum(n.ci95[1] / n.latency_s > 1.02 for n in once.networks)
    assert (
        unsure <= len(once.networks) // 4
    )  # where looks contradicted each other, a third one told; more than half, else

    def plain(profile):
        found = [s for s in plain_convolutions(profile) if s.seconds > 0.05 * REFERENCE_S]
        return statistics.median(s.seconds / true_s(s) for s in found if network_of(s, profile) is not None)

    assert plain(once) == pytest.approx(plain(quiet), rel=0.01)


def test_later_samples_are_chosen_by_what_is_known_so_far(tmp_path, machine):
    known = []
    built(
        tmp_path,
        minutes=0.1,
        machine=machine,
        uncertainty_of=lambda so_far: known.append(len(so_far.samples)),
    )
    assert known and known[0] > 0 and known == sorted(known)


def test_of_looks_at_a_network_the_lower_quartile_counts():
    def best(*ratios):
        return records.best_look([{"ratio": ratio, "half_width": 0.02} for ratio in ratios])

    assert best(1.0) == {"best": 1.0, "half_width": 0.02}
    assert best(1.2, 1.0)["best"] == 1.0  # what disturbs makes it longer
    assert best(1.2, 1.0)["half_width"] == pytest.approx(math.hypot(0.02, math.log(1.2) / 2))
    assert best(1.0, 1.01, 1.02, 0.99, 1.5)["best"] == 1.0
    assert best(1.0, 1.2, 1.21, 1.22)["best"] == 1.0  # those that were disturbed may agree
    assert best(1.0, 1.0, 1.0)["half_width"] == pytest.approx(0.02 / math.sqrt(3))
    assert best(1.0, 9.0, 90.0)["half_width"] == 1.0
    result = {"name": "plain-0-0", "sha256": "", "kernels": [], "role": "fit", "best": 1.0, "half_width": 0.3}
    network = records._network(result, 2.0)
    assert network.latency_s == 2.0 and network.ci95 == pytest.approx((2 / 1.3, 2 * 1.3))


def test_no_profiler_is_assumed_where_too_few_networks_tell():
    network = {"ratio": 1.0, "sum": 1.5, "rows": 50}
    assert records._overhead([network] * 3, 0.0) == 0.0
    assert records._overhead([network] * 4, 0.0) == pytest.approx(0.01)
    assert records._overhead([network] * 9 + [{**network, "sum": 9.0}], 0.1) == pytest.approx(0.012)
    assert (
        records._overhead([{**network, "sum": 0.5}] * 4, 0.0) == 0.0
    )  # nothing runs faster for being looked at


# ---- runs ----------------------------------------------------------------------------------------
def test_the_file_is_read_back_and_the_journal_is_gone(tmp_path):
    profile = built(tmp_path, minutes=0.1)
    assert [p.name for p in tmp_path.iterdir()] == ["device.json"]
    again = DeviceProfile.load(tmp_path / "device.json")
    assert again.to_json() == profile.to_json()
    assert again.target["name"] == "onnxruntime" and again.target["settings"]["fusion_sha256"]
    assert again.protocol["versions"]["sartor"] == sartor.__version__
    assert again.device["cpu"] and again.device["caches"] and again.protocol["reference_s"] == REFERENCE_S


def test_a_run_that_is_cut_off_goes_on(tmp_path):
    whole = built(tmp_path, minutes=0.1)
    (tmp_path / "device.json").unlink()
    for after in (3, 1, 1):
        machine = Machine(noise=0.003, interrupt_after=after)
        with pytest.raises(KeyboardInterrupt) as raised:
            built(tmp_path, minutes=0.1, machine=machine)
        assert "goes on from there" in raised.value.__notes__[0]
        assert not (tmp_path / "device.json").exists() and journal_path(tmp_path / "device.json").exists()
    profile = built(tmp_path, minutes=0.1)
    keys = [(json.dumps(s.spec), s.at) for s in drawn(profile)]
    assert len(keys) == len(set(keys))
    names = [n.name for n in profile.networks]
    assert len(names) == len(set(names)) and abs(len(names) - len(whole.networks)) <= len(KINDS)
    assert abs(len(keys) - len(drawn(whole))) <= 64
    assert not journal_path(tmp_path / "device.json").exists()


def test_a_torn_record_is_measured_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, machine=Machine(interrupt_after=4))
    path = journal_path(tmp_path / "device.json")
    path.write_bytes(path.read_bytes()[:-40])
    assert built(tmp_path, minutes=0.1).samples


def test_another_version_starts_afresh(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, machine=Machine(interrupt_after=4))
    facts = build._facts
    monkeypatch.setattr(build, "_facts", lambda *a: {**facts(*a), "version": "0.0"})
    clock = Clock()
    machine = Machine(clock=clock)
    profile = built(tmp_path, minutes=0.1, machine=machine)
    assert profile.target["version"] == "0.0"
    assert machine.batches > 4  # the first of them, too, were timed again


def test_an_operator_that_fails_is_named_and_the_rest_goes_on(tmp_path):
    profile = built(tmp_path, minutes=0.2, machine=Machine(broken=("MaxPool",)))
    assert {f["spec"]["op"] for f in profile.failures} == {"MaxPool"}
    assert all("planted" in f["reason"] for f in profile.failures)
    assert drawn(profile) and not any(s.spec["op"] == "MaxPool" for s in profile.samples)


def test_a_kernel_that_fails_spoils_only_itself(tmp_path):
    """Its carrier fails with it; it is found among the others by halving."""
    with Journal(tmp_path / "journal", {}) as journal:
        builder = build._Builder(backends.get("onnxruntime"), journal, Stages(), 1.0, 0, Clock())
        points = builder._design.batch(0, 32)
        behind = {op for p in points for op, _ in p.spec["epilogue"]}  # would spoil more than its own
        own = collections.Counter(p.spec["op"] for p in points if p.spec["op"] not in behind)
        rarest, number = own.most_common()[-1]
        machine, results = Machine(broken=(rarest,)), []
        builder._carried(machine, points, results)
    assert [(r["spec"], tuple(r["at"])) for r in results] == [(p.spec, p.at) for p in points]
    assert [r["spec"]["op"] for r in results if "reason" in r] == [rarest] * number
    assert machine.models <= 1 + 3 * 5 * number  # five halvings each; what can be timed is looked at twice


def test_a_kernel_that_no_model_can_be_made_of_spoils_only_itself(tmp_path, monkeypatch):
    original = inside_samples.sample_model

    def sample_model(spec, at):
        if spec["op"] == "Conv" and "multiplier" in spec:
            raise ValueError("planted")
        return original(spec, at)

    monkeypatch.setattr(inside_samples, "sample_model", sample_model)
    profile = built(tmp_path, minutes=0.05)
    assert profile.failures and all("multiplier" in f["spec"] for f in profile.failures)
    assert all("no sample model: ValueError: planted" in f["reason"] for f in profile.failures)
    carried = [s for s in drawn(profile) if s.spec["op"] == "Conv"]
    assert carried and not any("multiplier" in s.spec for s in carried)


def test_a_target_whose_profiler_tells_nothing_is_an_error(tmp_path):
    class Silent(Machine):
        def _inside(self, model):
            return dataclasses.replace(super()._inside(model), kernels=())

    with pytest.raises(BackendError, match=r"No kernel could be timed inside a model.*no time was told"):
        built(tmp_path, minutes=0.01, machine=Silent())
    assert not (tmp_path / "device.json").exists()


def test_progress_tells_the_stages(tmp_path):
    stages = Stages()
    profile = built(tmp_path, progress=stages)
    assert stages.seen[0] == "sampling kernels" and stages.seen[-1] == "fitting"
    assert stages.steps == len(drawn(profile)) + len(profile.networks)


def test_int8_and_other_targets_are_refused_before_anything_is_written(tmp_path):
    for options, says in ((TargetOptions(precision="int8"), "timed one by one"), (TargetOptions(), "folder")):
        out = tmp_path / "device.json" if options.precision == "int8" else tmp_path / "no" / "device.json"
        with pytest.raises(UsageError, match=says):
            build_profile("onnxruntime", options, out, progress=Stages(), timer=Machine())
    assert list(tmp_path.iterdir()) == []


# ---- does it still hold --------------------------------------------------------------------------
def test_an_unchanged_machine_is_recognised(profile):
    found = check_profile(profile, Machine(noise=0.003, seed=5))
    assert found.changes == () and found.holds
    assert {"conv", "depthwise"} <= set(found.families)


def test_one_family_that_became_slower_is_named(profile):
    found = check_profile(profile, Machine(noise=0.003, speed={"BatchNormalization": 1.8}))
    assert not found.holds
    assert [c for c in found.changes if "'norm'" in c and "longer" in c]
    assert not [c for c in found.changes if "'depthwise'" in c]


def test_another_clock_and_another_version_are_named(profile):
    other = dataclasses.replace(profile, target={**profile.target, "version": "0.0"})
    found = check_profile(other, Machine(scale=1.4))
    assert [c for c in found.changes if "reference kernel takes 40% longer" in c]
    assert [c for c in found.changes if "version" in c]
    assert json.loads(json.dumps(found.to_dict()))["holds"] is False


def test_another_processor_is_named(profile):
    device = {**profile.device, "cpu": "Abacus", "cores": 1000}
    found = check_profile(dataclasses.replace(profile, device=device), Machine())
    assert [c for c in found.changes if "Abacus" in c]
    assert [n for n in found.notes if "cores" in n]


def test_only_networks_that_are_generated_as_they_were_then_are_compared(profile):
    """Another version of the generator makes other networks under the same names."""
    own = dataclasses.replace(profile.networks[0], name="pruning 3")
    others = [dataclasses.replace(network, sha256="0" * 64) for network in profile.networks[2:]]
    few = dataclasses.replace(profile, networks=(own, profile.networks[1], *others))
    with pytest.raises(UsageError, match="networks 1 can be generated again"):
        check_profile(few, Machine())


def test_a_family_in_too_few_networks_is_not_judged(profile):
    convolutions = tuple(network for network in profile.networks if network.name.startswith("plain"))
    found = check_profile(dataclasses.replace(profile, networks=convolutions), Machine(speed={"MatMul": 1.8}))
    assert found.holds and "matmul" not in found.families
    assert [note for note in found.notes if "'matmul'" in note and "nothing is said" in note]


def test_what_is_not_certain_is_a_note(profile, monkeypatch):
    monkeypatch.setattr(
        check, "_again", lambda *_: ({"gemm": [0.9, 1.2, 1.5], "conv": [1.0] * 3}, REFERENCE_S)
    )
    found = check_profile(profile, Machine())
    assert found.holds and [note for note in found.notes if "'gemm' may take 20% longer" in note]


def test_the_synthetic_machine_computes_as_its_constants_say():
    assert law(MACS, 0) == pytest.approx(1.002)
    assert law(0, 2 * BYTES, True) == pytest.approx(2.502)
    assert waiting_units(1e6, 0.5) == 0.0 < waiting_units(1e6, 5.0) == pytest.approx(0.125)
    assert waiting_units(1e6, 50.0) == waiting_units(1e6, 500.0) == pytest.approx(0.25)


TOLD = {
    "spec": conv_spec(14),
    "at": [16, 16],
    "family": "conv",
    "ratio": 1.0,
    "rows": 1,
    "alike": 1,
    "twins": 1,
}
"""What is written down of a kernel."""


def test_how_well_a_model_is_known_is_itself_known_roughly():
    """Of few visits, some lie closely together by chance, and some far apart; neither is all there is to say."""
    from sartor.profiling.records import sample_of

    def half_width(of_model, of_all):
        model = {"ratio": 1.0, "best": 1.0, "half_width": of_model, "sum": 1.0, "rows": 1}
        found = sample_of(TOLD, "fit", 1e-3, model, (0.0, 0.0, of_all))
        return found.half_width

    lucky, typical, apart = (half_width(own, 0.05) for own in (0.002, 0.05, 1.0))
    assert 0.005 < lucky < typical < apart < 0.25
    assert half_width(0.05, 0.5) > typical


def test_kernels_that_were_timed_while_the_machine_was_slower_than_for_their_model_are_no_samples():
    from sartor.profiling.records import sample_of

    def sampled(total):
        model = {"ratio": 10.0, "best": 10.0, "half_width": 0.05, "sum": total, "rows": 5}
        return sample_of(TOLD, "fit", 1e-3, model, (0.0, 0.0, 0.05))

    assert sampled(10.0).seconds == pytest.approx(1e-3) and sampled(11.5).seconds == pytest.approx(
        1e-3 / 1.15
    )
    assert sampled(16.0) is None  # they cannot take more than the whole
    assert sampled(8.0).seconds == pytest.approx(1.25e-3)
