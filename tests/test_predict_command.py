"""`sartor predict` from a profile whose machine is known, and from a description."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from cost_networks import Net
from cost_profiles import CALL_S, make_profile, true_s
from test_ladder import sampled

from sartor.backends import host, isolation
from sartor.cli import main
from sartor.cost_models.escalation import Target, estimate
from sartor.cost_models.fitting import fit_profile
from sartor.cost_models.ladder import Ladder
from sartor.cost_models.pricer import Pricer
from sartor.cost_models.roofline import Roofline
from sartor.cost_models.signatures import signature_of
from sartor.cost_models.static import static_cost
from sartor.cost_models.widths import rounded_up, steps
from sartor.errors import UsageError
from sartor.ir.channels import channel_groups
from sartor.ir.load import load
from sartor.ir.plan import GroupPlan, Plan
from sartor.ir.workload import build_workload
from sartor.passes.prune import apply_plan
from sartor.profiling.whole import measuring


def network():
    """Two convolutions and a classifier; the first is 61 wide."""
    net = Net((1, 3, 28, 28))
    x = net.unary("Relu", net.conv("x", 61, 3, "wide"), "r1")
    x = net.unary("Relu", net.conv(x, 64, 3, "next"), "r2")
    net.head(x, 10)
    return net.program(("logits",))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The model, its profile, and a plan for it."""
    import onnxruntime

    folder = tmp_path_factory.mktemp("predict")
    network().save(folder / "model.onnx")
    program = load(folder / "model.onnx")
    analysis = channel_groups(program)
    workload = build_workload(program, analysis.extents)
    timed = sampled(workload, (0.25, 0.5, 0.75, 1.0))
    fitted = fit_profile(make_profile(300, networks=12))
    target = {**fitted.target, "name": "onnxruntime", "version": onnxruntime.__version__}
    device = {**fitted.device, "cpu": host.cpu_model()}
    profile = dataclasses.replace(
        fitted, target=target, device=device, samples=(*fitted.samples, *timed.samples)
    )
    profile.save(folder / "device.json")
    wide, narrow = (next(g.name for g in analysis.groups if g.size == size) for size in (61, 64))
    # With 48 channels to read, the second convolution makes whole blocks.
    kept = {wide: GroupPlan(61, tuple(range(48))), narrow: GroupPlan(64, tuple(range(33)))}
    (folder / "plan.json").write_text(Plan(program.source.sha256, kept).to_json())
    return folder, profile, workload, {g.name: g.size for g in analysis.groups}


def ask(capsys, *arguments, code=0):
    assert main(["predict", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_model_is_priced_with_its_interval_and_kernels(files, capsys):
    folder, _, workload, _ = files
    found = ask(capsys, folder / "model.onnx", "--profile", folder / "device.json")
    signatures = [signature_of(k) for k in workload.kernels]
    truth = CALL_S + sum(true_s(s.spec, [v.full for v in s.variables]) for s in signatures)
    low, high = found["intervals"]["latency_s"]
    assert low < truth < high and found["metrics"]["latency_s"] == pytest.approx(truth, rel=0.15)
    assert found["notes"] == [] and found["baseline"] is None
    assert {k["method"] for k in found["kernels"]} <= {"interpolated", "learned", "roofline", "extrapolated"}
    assert sum(part["kernels"] for part in found["bound"].values()) == len(found["kernels"])
    (wide,) = (g for g in found["groups"] if g["size"] == 61)
    assert wide["rounded"] == 64  # 61 channels run as 64, off the grid at that


@pytest.mark.parametrize("arguments", [["--profile", "device.json"], ["--target", "jetson-nano"]])
def test_what_the_graph_alone_says_is_that_of_the_plan(files, capsys, arguments):
    folder, *_ = files
    arguments = [str(folder / a) if a.endswith(".json") else a for a in arguments]
    program = load(folder / "model.onnx")
    plan = Plan.load(folder / "plan.json")
    for more, made in (([], program), (["--plan", folder / "plan.json"], apply_plan(program, plan))):
        found = ask(capsys, folder / "model.onnx", *arguments, *more)
        cost = static_cost(made)
        assert found["static"] == {
            key: getattr(cost, key) for key in ("macs", "weight_bytes", "peak_activation_bytes")
        }
    assert main(["predict", str(folder / "model.onnx"), *arguments]) == 0
    text = capsys.readouterr().out
    assert "MACs, weights " in text and ("mJ" in text) == ("energy_j" in found["metrics"])


def test_text_names_what_costs_nothing_and_what_saves(files, capsys):
    folder, _, _, _ = files
    arguments = ["predict", folder / "model.onnx", "--profile", folder / "device.json"]
    assert main([*map(str, arguments), "--plan", str(folder / "plan.json"), "--kernels", "1"]) == 0
    text = capsys.readouterr().out
    assert "90 % interval" in text and "without the plan" in text and "and 3 shorter kernels" in text
    # up to 48 the convolution costs the same; what is pooled behind it does not quite
    assert re.search(r": 33 -> (3[4-9]|4[0-8]) units costs nothing", text)
    assert "the next narrower width that is faster is 32 of 33 units" in text
    assert "% of the time is bound by" in text and "networks that were held out" in text


def test_a_profile_of_another_machine_or_version_says_so(files, capsys, tmp_path):
    folder, profile, _, _ = files
    other = dataclasses.replace(
        profile, target={**profile.target, "version": "0.1"}, device={**profile.device, "cpu": "Zilog Z80"}
    )
    other.save(tmp_path / "other.json")
    found = ask(capsys, folder / "model.onnx", "--profile", tmp_path / "other.json")
    assert "another machine (Zilog Z80)" in found["notes"][0]
    assert "'onnxruntime' 0.1; installed here is" in found["notes"][1]
    dataclasses.replace(profile, target={"name": "abacus"}).save(tmp_path / "abacus.json")
    found = ask(capsys, folder / "model.onnx", "--profile", tmp_path / "abacus.json")
    assert "'abacus' is not installed here" in found["notes"][0]


def test_a_described_device_is_priced_by_its_constants(files, capsys):
    folder, _, workload, _ = files
    found = ask(capsys, folder / "model.onnx", "--target", "jetson-nano", "--precision", "f16")
    expected = Roofline("jetson-nano", "f16").estimate(workload).latency_s
    assert found["metrics"]["latency_s"] == pytest.approx(expected)
    assert found["intervals"] == {} and "nothing measured" in found["notes"][0]
    assert main(["predict", str(folder / "model.onnx"), "--target", "jetson-nano"]) == 0
    assert "its error is not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "'--profile FILE' or '--target NAME'"),
        (["--profile", "device.json", "--target", "h200"], "and not both"),
        (["--profile", "device.json", "--precision", "f16"], "one precision"),
        (["--target", "abacus"], "abacus"),
        (["--profile", "model.onnx"], "model.onnx"),
    ],
)
def test_bad_command_lines_are_usage_errors(files, capsys, arguments, said):
    folder = files[0]
    given = [str(folder / a) if a.endswith((".json", ".onnx")) else a for a in arguments]
    assert said in ask(capsys, folder / "model.onnx", *given, code=2)["error"]


def test_a_plan_of_another_model_is_refused(files, capsys, tmp_path):
    folder = files[0]
    (tmp_path / "plan.json").write_text(Plan("0" * 64).to_json())
    arguments = (folder / "model.onnx", "--profile", folder / "device.json", "--plan", tmp_path / "plan.json")
    assert "made for a model with SHA-256" in ask(capsys, *arguments, code=2)["error"]


# ---- widths --------------------------------------------------------------------------------------
def test_steps_of_a_staircase_are_found(files):
    _, profile, workload, sizes = files

    def price(fractions, removed):
        name, values = next((n, np.asarray(v)) for n, v in fractions.items() if np.ndim(v))
        kept = np.rint(values * sizes[name])
        stairs = np.ceil(kept / 16) * 16
        return 1e-3 + 1e-5 * stairs + np.where(kept == 46, 1e-3, 0.0)

    name = next(n for n, s in sizes.items() if s == 64)
    (found,) = (s for s in steps(workload, price, sizes, {name: 45 / 64}) if s.group == name)
    assert (found.kept, found.widest, found.narrower) == (45, 48, 32) and found.dearer is None
    assert found.saved_s == pytest.approx(1.6e-4) and found.is_free
    (found,) = (s for s in steps(workload, price, sizes) if s.group == name)
    assert (found.widest, found.narrower, found.dearer) == (64, 48, 46) and not found.is_free
    ladder = Ladder(profile)
    pricer = Pricer(ladder, workload, sizes)
    real = steps(workload, lambda f, r: pricer.estimate_batch(pricer.fractions(f, r)), sizes)
    assert {s.group for s in real} == set(sizes) & workload.groups
    assert rounded_up(ladder, workload, name, 64) is None


# ---- escalation ----------------------------------------------------------------------------------
def test_the_cheapest_model_that_is_sure_enough_answers(files):
    _, profile, workload, _ = files
    asked = []

    def measure(workload, fractions, removed):
        asked.append(fractions)
        return 2e-3, (1.9e-3, 2.1e-3)

    with pytest.raises(UsageError, match="'nothing'"):
        estimate(workload, Target("nothing"))
    roofline = Roofline("h200", "f16")
    assert estimate(workload, Target("t", roofline)).method.startswith("roofline")
    ladder = Ladder(profile)
    target = Target("t", roofline, ladder, measure)
    assert estimate(workload, target).method == ladder.method and not asked
    low, high = ladder.estimate(workload).interval
    wide = (high - low) / 2 / ladder.estimate(workload).latency_s
    assert estimate(workload, target, half_width=1.01 * wide).method == ladder.method and not asked
    found = estimate(workload, target, {}, {}, half_width=0.5 * wide)
    assert found.method == "measured as a whole" and len(asked) == 1
    assert found.latency_s == 2e-3 and found.interval == (1.9e-3, 2.1e-3)
    assert ladder.estimate(workload).latency_s == pytest.approx(2e-3, rel=0.02)  # it has learned from it
    assert estimate(workload, Target("t", measure=measure)).latency_s == 2e-3


def test_what_is_measured_as_a_whole_is_the_plan(files, monkeypatch):
    """On ONNX Runtime, the kept widths and removed blocks of the estimate."""
    folder, profile, workload, sizes = files
    program = load(folder / "model.onnx")
    analysis = channel_groups(program)
    lowered = []
    original = isolation.lower

    def lower(target, pruned, *rest):
        lowered.append(static_cost(pruned).macs)
        return original(target, pruned, *rest)

    monkeypatch.setattr(isolation, "lower", lower)
    measure = measuring(program, analysis, "onnxruntime", seconds=0.5)
    target = Target("onnxruntime", ladder=Ladder(profile), measure=measure)
    shares = {name: 0.5 for name in sizes}
    found = estimate(workload, target, shares, {}, half_width=1e-9)
    low, high = found.interval
    assert found.method == "measured as a whole" and 0 < low <= found.latency_s <= high
    fractions = {name: round(0.5 * size) / size for name, size in sizes.items()}
    assert lowered == [workload.evaluate(fractions).macs]
    for wrong in ({"nope": 0.5}, {next(iter(sizes)): 0.0}, {next(iter(sizes)): 1.5}):
        with pytest.raises(UsageError, match="a share in"):
            measure(workload, wrong, {})
