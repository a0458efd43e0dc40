"""The builder of profiles on a synthetic machine whose law is known; interruptions; the check."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics

import pytest
from profile_machine import BYTES, CALL, MACS, REFERENCE_S, Clock, Machine, law

from sartor.backends.protocol import TargetOptions
from sartor.cost_models.profile import DeviceProfile
from sartor.cost_models.samples import weight_bytes
from sartor.cost_models.work import work_of_spec
from sartor.errors import UsageError
from sartor.profiling import build, networks
from sartor.profiling.build import build_profile, journal_path
from sartor.profiling.check import check_profile


class Stages:
    def __init__(self):
        self.seen, self.steps = [], 0

    def stage(self, text, total=0):
        self.seen.append(text)

    def advance(self, steps=1):
        self.steps += steps


def built(folder, minutes=0.2, machine=None, progress=None, **options):
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


@pytest.fixture(autouse=True, scope="module")
def described_once():
    """The analysis of each generated network, made once for all tests."""
    known, describe = {}, networks.described

    def described(model, rules):
        key = hashlib.sha256(model).digest()
        if key not in known:
            known[key] = describe(model, rules)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "described", described)
        patch.setattr(networks, "network", functools.cache(networks.network))
        yield


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return built(tmp_path_factory.mktemp("profile"))


def true_s(sample) -> float:
    """What the machine's law says of a convolution, without call and layout."""
    work = work_of_spec(sample.spec, sample.at)
    c_out = float(work.groups * work.columns)
    padded = float(work.macs) / c_out * (-(-c_out // 8) * 8)
    moved = float(work.read + work.written)
    return REFERENCE_S * law("Conv", padded, moved, c_out % 4 != 0)


def test_the_law_of_the_machine_is_recovered_without_call_and_layout(profile):
    plain = [s for s in profile.samples if s.spec["op"] == "Conv" and not s.spec["epilogue"]]
    large = [s for s in plain if s.warm_s > 20 * CALL * REFERENCE_S]
    errors = [abs(s.warm_s / true_s(s) - 1) for s in large]
    assert len(errors) > 8
    assert statistics.median(errors) < 0.01
    assert max(errors) < 0.1
    assert profile.call_s == pytest.approx((CALL + 0.002) * REFERENCE_S, rel=0.02)


def test_cold_weights_cost_what_they_weigh(profile):
    cold = [s for s in profile.samples if s.cold_s is not None and weight_bytes(s.spec, s.at) > 2e6]
    assert len(cold) > 5
    for sample in cold:
        extra = (sample.cold_s - sample.warm_s) / REFERENCE_S
        noise = 0.02 * sample.cold_s / REFERENCE_S
        assert extra == pytest.approx(weight_bytes(sample.spec, sample.at) / 2.5e6, abs=noise)
    assert all(s.cold_s is None for s in profile.samples if "inputs" in s.spec)


def test_a_fifth_of_kernels_and_half_of_networks_are_held_out(profile):
    roles = [s.role for s in profile.samples]
    assert 0.1 < roles.count("heldout") / len(roles) < 0.3
    assert {n.role for n in profile.networks} == {"fit", "heldout"}
    for network in profile.networks:
        assert (network.role == "heldout") == networks.is_heldout(network.name)
        assert network.kernels and network.weight_bytes > 0
        assert network.ci95[0] <= network.latency_s <= network.ci95[1]


def test_kernels_next_to_each_other_share_their_role(profile):
    """Or the held-out error would be that of a kernel whose neighbour was fitted."""
    found = {}
    for sample in profile.samples:
        key = (json.dumps(sample.spec, sort_keys=True), tuple(s // 64 for s in sample.at))
        found.setdefault(key, set()).add(sample.role)
    assert max(map(len, found.values())) <= 2
    assert sum(len(roles) == 2 for roles in found.values()) < 0.1 * len(found)


def test_the_file_is_read_back_and_the_journal_is_gone(tmp_path):
    profile = built(tmp_path, minutes=0.1)
    assert [p.name for p in tmp_path.iterdir()] == ["device.json"]
    again = DeviceProfile.load(tmp_path / "device.json")
    assert again.to_json() == profile.to_json()
    assert again.target["name"] == "onnxruntime" and again.target["settings"]["fusion_sha256"]
    assert again.device["cpu"] and again.device["caches"] and again.protocol["reference_s"] == REFERENCE_S


def test_a_run_that_is_cut_off_goes_on(tmp_path):
    whole = built(tmp_path, minutes=0.1)
    (tmp_path / "device.json").unlink()
    for after in (4, 2, 3):
        machine = Machine(noise=0.003, interrupt_after=after)
        with pytest.raises(KeyboardInterrupt) as raised:
            built(tmp_path, minutes=0.1, machine=machine)
        assert "goes on from there" in raised.value.__notes__[0]
        assert not (tmp_path / "device.json").exists() and journal_path(tmp_path / "device.json").exists()
    profile = built(tmp_path, minutes=0.1)
    keys = [(json.dumps(s.spec), s.at) for s in profile.samples]
    assert len(keys) == len(set(keys))
    assert abs(len(profile.samples) - len(whole.samples)) <= 64
    assert not journal_path(tmp_path / "device.json").exists()


def test_a_torn_record_is_measured_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, machine=Machine(interrupt_after=6))
    path = journal_path(tmp_path / "device.json")
    path.write_bytes(path.read_bytes()[:-40])
    assert built(tmp_path, minutes=0.1).samples


def test_another_version_starts_afresh(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, machine=Machine(interrupt_after=6))
    facts = build._facts
    monkeypatch.setattr(build, "_facts", lambda *a: {**facts(*a), "version": "0.0"})
    clock = Clock()
    machine = Machine(clock=clock)
    profile = built(tmp_path, minutes=0.1, machine=machine)
    assert profile.target["version"] == "0.0"
    assert machine.batches > 6  # the probes, too, were timed again


def test_an_operator_that_fails_is_named_and_the_rest_goes_on(tmp_path):
    profile = built(tmp_path, minutes=0.15, machine=Machine(broken=("MaxPool",)))
    assert {f["spec"]["op"] for f in profile.failures} == {"MaxPool"}
    assert all("planted" in f["reason"] for f in profile.failures)
    assert profile.samples and not any(s.spec["op"] == "MaxPool" for s in profile.samples)


def test_progress_tells_the_stages(tmp_path):
    stages = Stages()
    profile = built(tmp_path, minutes=0.1, progress=stages)
    assert stages.seen[0] == "layout and calls" and stages.seen[-1] == "fitting"
    assert stages.steps == len(profile.samples) + len(profile.networks)


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
    found = check_profile(profile, Machine(noise=0.003, speed={"MatMul": 1.8}))
    assert not found.holds
    assert [c for c in found.changes if "'matmul'" in c and "longer" in c]
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


def test_a_profile_without_samples_cannot_be_checked(profile):
    with pytest.raises(UsageError, match="no samples"):
        check_profile(dataclasses.replace(profile, samples=()), Machine())


def test_the_synthetic_machine_computes_as_its_constants_say():
    assert law("Conv", MACS, 0, False) == pytest.approx(1.002)
    assert law("Conv", 0, 2 * BYTES, True) == pytest.approx(2.502)
