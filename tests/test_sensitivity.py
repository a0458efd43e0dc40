"""`sartor sensitivity`: scores by hand, the same score as MASKED, order, time limit, resuming, refusals, page."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from builders import node, program_from_nodes
from models import captured
from test_report import Page

from sartor.cli import main
from sartor.cost_models.static import static_cost
from sartor.data import Data, Split, load_data
from sartor.errors import UsageError
from sartor.ir.blocks import residual_blocks
from sartor.ir.channels import channel_groups
from sartor.ir.fx import to_fx, to_tensor, twin_info
from sartor.passes.masked import masked
from sartor.passes.prune import apply_plan
from sartor.recovery.twins import predictor, reestimate_statistics
from sartor.report.sensitivity_page import render
from sartor.report.sensitivity_table import summary
from sartor.scoring import score
from sartor.sensitivity import StudyOptions, study
from sartor.sensitivity.cuts import Cuts, by_halving
from sartor.sensitivity.trial import HeldSamples, Trial, reestimated
from sartor.strategies.criteria import criterion
from sartor.strategies.importance import Subject

COUNTS = (1, 2, 3, 4)
SOURCE = """
import numpy as np
rows = np.repeat(np.arange(4), (1, 2, 3, 4))
x = np.eye(5, dtype="float32")[rows]

def split(labels):
    return [({"x": x[i : i + 5]}, None if labels is None else labels[i : i + 5]) for i in (0, 5)]

def ones(): return {"evaluate": split(np.ones(10, int))}
def unlabelled(): return {"evaluate": split(None)}
def misfit(): return {"evaluate": split(np.full(10, 7))}
def strict():
    def metric(outputs, labels):
        right = float((outputs["y"].argmax(1) == labels).mean())
        return right if right > 0.5 else 2.0
    return {"evaluate": split(np.ones(10, int)), "metric": metric}
"""


def network():
    """`y = (x + relu(x v1) v2) c`: hidden unit i says class 1 where feature i is set, the shortcut says class 0.

    Sample i is lost with unit i, and all are lost with the block. MACs: 5*4 + 4*5 + 5*2 = 50.
    """
    v1 = np.zeros((5, 4), np.float32)
    v1[range(4), range(4)] = (1, 2, 3, 4)  # unit 0 has the smallest norm
    v2, c = np.zeros((4, 5), np.float32), np.zeros((5, 2), np.float32)
    v2[:, 4], c[:4, 0], c[4, 1] = 10.0, 1.0, 1.0
    nodes = [
        node("MatMul", ["x", "v1"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "v2"], ["f"]),
        node("Add", ["x", "f"], ["s"], name="block"),
        node("MatMul", ["s", "c"], ["y"]),
    ]
    return program_from_nodes(nodes, {"x": ["N", 5]}, ["y"], {"v1": v1, "v2": v2, "c": c})


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data.py").write_text(SOURCE)
    return lambda name="ones": load_data(f"{tmp_path}/data.py:{name}", ["x"], program=network())


def scores(document):
    return {point["ratio"]: point.get("score") for point in document["groups"][0]["points"]}


def left_after(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- numbers ---------------------------------------------------------------------------------------
def test_scores_and_savings_by_hand(data, tmp_path):
    document = study(network(), StudyOptions(), data(), tmp_path / "out")
    assert document["schema"] == "sartor.sensitivity/1" and document["complete"]
    assert document["baseline"] == {
        "score": 1.0, "samples": 10, "macs": 50, "parameters": 50, "weight_bytes": 200,
    }  # fmt: skip
    (group,) = document["groups"]
    assert (group["name"], group["size"], group["granularity"]) == ("v1", 4, 1)
    for point, units in zip(group["points"], (1, 2, 3), strict=True):
        lost = sum(COUNTS[:units]) / 10  # the least important units are the first
        assert point["ratio"] == units / 4 and point["units_removed"] == units
        assert point["score"] == pytest.approx(1 - lost) and point["drop"] == pytest.approx(lost)
        assert point["macs_saved"] == 10 * units and point["macs_share"] == pytest.approx(units / 5)
        assert point["parameters_saved"] == 10 * units and point["weight_bytes_saved"] == 40 * units
    (block,) = document["blocks"]
    assert block["name"] == "block" and block["weights"] == ["v1", "v2"]
    assert block["drop"] == 1.0 and block["macs_saved"] == 40 and block["macs_share"] == 0.8
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text()) == document
    assert left_after(tmp_path / "out") == ["manifest.json", "sensitivity.html", "sensitivity.json"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no journal stays"


def test_without_labels_the_score_is_agreement_with_the_original(data, tmp_path):
    document = study(network(), StudyOptions(ratios=(0.5,)), data("unlabelled"), tmp_path / "out")
    assert document["baseline"]["score"] == 1.0 and scores(document) == {0.5: pytest.approx(0.7)}


def resnet_data(program):
    """Floating labels: their score shows every change, where classes of random weights hardly do."""
    rng = np.random.default_rng(0)
    (name,) = program.input_shapes
    shape = (12, 3, 16, 16)
    batches = [
        ({name: rng.standard_normal(shape).astype(np.float32)}, rng.standard_normal((12, 10))) for _ in "ab"
    ]
    split = Split("evaluate", batches, [name])
    return Data(split, None, split, split, source="random")


@pytest.mark.parametrize("reestimate", [False, True])
def test_every_score_is_that_of_masked_in_the_twin(tmp_path, reestimate):
    """The cut program runs in ONNX Runtime, the original with zeros in torch: all they share is the plan."""
    program = captured("resnet")
    data = resnet_data(program)
    document = study(program, StudyOptions(ratios=(0.5,), reestimate=reestimate), data, tmp_path / "out")
    analysis, blocks = channel_groups(program), [b for b in residual_blocks(program) if b.removable]
    importance = criterion("l2").unit_importance(Subject(program, analysis))
    cuts = {(cut.kind, cut.name): cut for cut in Cuts(program, analysis, blocks, importance.groups, (0.5,))}
    found = {("group", g["name"]): p for g in document["groups"] for p in g["points"]}
    found |= {("block", b["name"]): b for b in document["blocks"]}
    assert cuts.keys() == found.keys() and len(found) >= 8
    for key, cut in cuts.items():
        twin = to_fx(masked(program, cut.plan, analysis)[0], dtype=torch.float32)
        if reestimate:
            info = twin_info(twin)
            reestimate_statistics(twin, [[to_tensor(x[n]) for n in info.inputs] for x, _ in data.evaluate])
        expected, _ = score(predictor(twin), data.evaluate)
        assert found[key]["score"] == pytest.approx(expected, rel=1e-4), key
        pruned = static_cost(apply_plan(program, cut.plan, analysis))
        assert document["baseline"]["macs"] - found[key]["macs_saved"] == pruned.macs
        assert document["baseline"]["parameters"] - found[key]["parameters_saved"] == pruned.parameters
    apart = np.diff(sorted(point["score"] for point in found.values()))
    assert (apart > 1e-3 * document["baseline"]["score"]).sum() > 5, "equal scores would show nothing"
    assert ("reestimated_score" in document["baseline"]) is reestimate


def test_reestimating_changes_scores_and_needs_batch_normalization(tmp_path, data):
    program = captured("resnet")
    samples = resnet_data(program)
    runs = [
        study(program, StudyOptions(ratios=(0.5,), reestimate=on), samples, tmp_path / str(on))
        for on in (False, True)
    ]
    assert [r["reestimate"] for r in runs] == [False, True]
    assert [p["score"] for g in runs[0]["groups"] for p in g["points"]] != [
        p["score"] for g in runs[1]["groups"] for p in g["points"]
    ]
    assert "--reestimate takes them anew" in summary(runs[0])
    assert "with statistics taken anew and nothing cut" in summary(runs[1])
    with pytest.raises(UsageError, match="no BatchNormalization"):
        study(network(), StudyOptions(reestimate=True), data(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_last_batch_of_one_sample_has_no_variance_and_is_left_out():
    program = captured("resnet")
    (name,) = program.input_shapes
    x = np.random.default_rng(0).standard_normal((9, 3, 16, 16)).astype(np.float32)
    ragged = [({name: x[:8]}, None), ({name: x[8:]}, None)]
    even = reestimated(program, HeldSamples(ragged[:1], 100))
    assert reestimated(program, HeldSamples(ragged, 100)).sha256() == even.sha256()
    assert even.sha256() != program.sha256()


# ---- order, options --------------------------------------------------------------------------------
def test_the_middle_comes_first_and_what_saves_most():
    assert by_halving([0.25, 0.5, 0.75]) == [0.5, 0.25, 0.75]
    assert by_halving([1, 2, 3, 4, 5, 6, 7]) == [4, 2, 6, 1, 3, 5, 7]
    program = captured("resnet")
    analysis, blocks = channel_groups(program), [b for b in residual_blocks(program) if b.removable]
    importance = criterion("l1").unit_importance(Subject(program, analysis)).groups
    cuts = Cuts(program, analysis, blocks, importance, (0.25, 0.5, 0.75))
    assert [{c.ratio for c in members if c.kind == "group"} for members in cuts.rounds] == [
        {0.5},
        {0.25},
        {0.75},
    ]
    assert {c.name for c in cuts.rounds[0]} == {g.name for g in analysis.groups} | {b.name for b in blocks}
    for members in cuts.rounds:
        saved = [c.saved["macs"] for c in members]
        assert saved == sorted(saved, reverse=True)


def test_ratios_that_remove_nothing_are_named(data, tmp_path):
    document = study(network(), StudyOptions(ratios=(0.1, 0.5, 0.5)), data(), tmp_path / "out")
    assert document["ratios"] == [0.1, 0.5] and list(scores(document)) == [0.5] and document["complete"]
    assert document["uncut"] == [{"name": "v1", "ratio": 0.1, "reason": "4 units cannot lose 10 %"}]
    assert "Too small to cut: 'v1' at 10 %." in summary(document)


def test_options_are_seen(data, tmp_path):
    def run(name, **options):
        return study(network(), StudyOptions(**{"ratios": (0.25,), **options}), data(), tmp_path / name)

    drawn = {scores(run(f"r{seed}", criterion="random", seed=seed))[0.25] for seed in range(6)}
    assert len(drawn) > 1 and scores(run("l2")) == {0.25: pytest.approx(0.9)}
    first = run("few", samples=3)  # samples 0, 1, 1
    assert first["baseline"]["samples"] == 3 and scores(first)[0.25] == pytest.approx(2 / 3)
    kept = run("keep", keep=("block",))  # the Add
    assert kept["blocks"] == [] and kept["keep"] == ["block"] and scores(kept)


def test_a_cut_without_a_score_says_why_and_does_not_end_the_study(data, tmp_path):
    document = study(network(), StudyOptions(), data("strict"), tmp_path / "out")
    assert scores(document) == {0.25: pytest.approx(0.9), 0.5: pytest.approx(0.7), 0.75: None}
    assert "returned 2.0" in document["groups"][0]["points"][2]["reason"]
    assert document["complete"], "it was tried"
    text = summary(document)
    assert "No score: 'v1' at 75 %" in text and "No score: 'block'" in text
    assert "No score: 'v1' at 75 %" in " ".join(Page(render(document)).texts).replace("&#x27;", "'")


# ---- samples ---------------------------------------------------------------------------------------
def test_samples_are_held_shortened_and_counted(monkeypatch):
    passes = []

    class Source:
        def __iter__(self):
            passes.append(None)
            for start in (0, 4, 8):
                yield {"x": np.arange(start, start + 4.0), "scale": np.ones(1)}, np.arange(start, start + 4)

    held = HeldSamples(Source(), 6, ["x"])
    for _ in range(2):
        batches = list(held)
        assert [len(x["x"]) for x, _ in batches] == [4, 2] and [len(y) for _, y in batches] == [4, 2]
        assert batches[1][0]["scale"].shape == (1,) and held.samples == 6
    assert len(passes) == 1 and held.short_of == ""
    assert sum(len(y) for _, y in HeldSamples(Source(), 6)) == 8, "which axis holds samples is not known"
    slow = HeldSamples(Source(), 100, ["x"], seconds=0.0)
    assert len(list(slow)) == 1 and slow.short_of == "time"
    pieces = HeldSamples(Source(), 11, ["x"], piece=3)
    assert [y.tolist() for _, y in pieces] == [[0, 1, 2], [3], [4, 5, 6], [7], [8, 9, 10]]
    assert np.concatenate([x["x"] for x, _ in pieces]).tolist() == list(range(11))
    monkeypatch.setattr("sartor.sensitivity.trial.HELD_BYTES", 40)
    full = HeldSamples(Source(), 100, ["x"])
    assert len(list(full)) == 2 and full.short_of == "memory"


# ---- time limit and interruption -------------------------------------------------------------------
def test_a_time_limit_gives_what_there_is_and_names_the_rest(data, tmp_path):
    document = study(network(), StudyOptions(seconds=1e-6), data(), tmp_path / "out")
    assert document["baseline"]["samples"] == 5 and document["data"]["short_of"] == "time"
    assert [b["name"] for b in document["blocks"]] == ["block"], "what saves most comes first"
    assert not document["complete"] and document["missing"] == [
        {"kind": "group", "name": "v1", "ratio": ratio} for ratio in (0.5, 0.25, 0.75)
    ]
    text = summary(document)
    assert "3 of 4 cuts were not scored within 1e-06 s: 'v1' at 50 %" in text and "time limit" in text
    page = " ".join(Page(render(document)).texts)
    assert "1 of 4" in page and "'v1' at 75 %" in page
    assert left_after(tmp_path / "out") == ["manifest.json", "sensitivity.html", "sensitivity.json"]
    longer = study(network(), StudyOptions(seconds=600), data(), tmp_path / "out")
    assert longer["complete"] and longer["baseline"]["samples"] == 10 and longer["time_limit_s"] == 600


def test_an_interrupted_study_resumes_and_ends_alike(data, tmp_path, monkeypatch):
    whole = study(network(), StudyOptions(), data(), tmp_path / "whole")
    scored, real = [], Trial.score

    def interrupted(trial, predict):
        scored.append(None)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return real(trial, predict)

    monkeypatch.setattr(Trial, "score", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        study(network(), StudyOptions(), data(), tmp_path / "new" / "out")
    journal = tmp_path / "new" / ".out.journal.jsonl"
    assert left_after(tmp_path / "new") == [journal.name] and str(journal) in caught.value.__notes__[0]
    scored[:] = [None] * 10  # counts on without interrupting
    resumed = study(network(), StudyOptions(), data(), tmp_path / "new" / "out")
    assert len(scored) - 10 == 1 + 2, "the original again, and the two cuts that were missing"
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    assert left_after(tmp_path / "new") == ["out"]


def test_interrupted_under_a_time_limit_it_resumes_on_the_same_samples(data, tmp_path, monkeypatch):
    def render_fails(document):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("sartor.report.sensitivity_page.render", render_fails)
        study(network(), StudyOptions(seconds=1e-6), data(), tmp_path / "out")
    document = study(network(), StudyOptions(), data(), tmp_path / "out")  # without a limit now
    assert document["complete"] and document["baseline"]["samples"] == 5, "one set of samples in one study"
    assert document["data"]["short_of"] == "time"
    other = study(network(), StudyOptions(seed=1), data(), tmp_path / "out")
    assert other["baseline"]["samples"] == 10, "another study starts afresh"


# ---- refusals --------------------------------------------------------------------------------------
def test_refusals_come_before_any_work_and_write_nothing(data, tmp_path):
    def refused(match, source=None, program=None, **options):
        with pytest.raises(UsageError, match=match):
            study(program or network(), StudyOptions(**options), source or data(), tmp_path / "deep" / "out")
        assert not (tmp_path / "deep").exists()

    refused("The labels go up to 7", data("misfit"))
    refused("A ratio of units to remove is 1;", ratios=(0.5, 1.0))
    refused("A ratio of units to remove is none", ratios=())
    refused("Unknown criterion 'weight'", criterion="weight")
    refused("needs a BatchNormalization in every group", criterion="bn-gamma")
    refused("must be above 0", seconds=0.0)
    refused("at least one", samples=0)
    refused("matches no parameter", keep=("nothing",))
    refused("no removable residual block besides what --keep protects", keep=("v1",))
    plain = program_from_nodes([node("Relu", ["x"], ["y"])], {"x": ["N", 5]}, ["y"])
    refused("Nothing of 'test.onnx' can be removed", program=plain)


def test_a_foreign_folder_is_left_alone(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=re.escape("thesis.tex")):
        study(network(), StudyOptions(), data(), tmp_path / "out")
    assert left_after(tmp_path / "out") == ["thesis.tex"]


# ---- page, text, command ---------------------------------------------------------------------------
def test_the_page_is_well_formed_escaped_and_complete(data, tmp_path):
    document = study(network(), StudyOptions(), data(), tmp_path / "out")
    document["groups"][0]["name"] = "<b>evil</b>"
    document["source"]["name"] = "<script>alert(1)</script>"
    page = Page(render(document))
    assert page.open == [] and not {"script", "b", "link", "img"} & set(page.tags)
    assert not {"src", "href", "onload"} & {key for key, _ in page.attributes}
    text = " ".join(page.texts)
    for expected in (
        "<b>evil</b>",
        "100.0 %",
        "4 of 4",
        "30.00",
        "80.0 %",
        "1.25",
        "Curves",
        "Conditions",
        "'l2'",
    ):
        assert expected in text, expected
    heats = [value for key, value in page.attributes if key == "style"]
    assert heats == ["--heat: 12%", "--heat: 38%", "--heat: 75%"], "10, 30 and 60 points"
    assert page.tags.count("polyline") == 2, "one in the chart of all, one of its own"


def test_a_large_study_names_both_ends_and_folds_the_middle(data, tmp_path):
    document = study(network(), StudyOptions(), data(), tmp_path / "out")
    group = document["groups"][0]
    document["groups"] = [
        {**group, "name": f"g{i:02}", "points": [{**p, "drop": i / 100} for p in group["points"]]}
        for i in range(60)
    ]
    lines = summary(document).splitlines()
    rows = [line.split()[-1] for line in lines if line.endswith(tuple("0123456789")) and "g" in line]
    assert rows == [f"g{i}" for i in range(59, 50, -1)] + [f"g{i:02}" for i in range(9, -1, -1)]
    assert "… 41 in between (--all shows them)" in lines
    assert summary(document, everything=True).count("\n") == len(lines) - 1 + 40
    assert "12 more" in " ".join(Page(render(document)).texts)


def test_the_command(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")
    data()
    network().save(tmp_path / "net.onnx")
    command = ["sensitivity", f"{tmp_path}/net.onnx", "--data", f"{tmp_path}/data.py:ones"]
    assert main([*command, "--ratios", "0.5,0.25", "--out", f"{tmp_path}/out", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert document["ratios"] == [0.25, 0.5]
    assert main([*command, "--ratios", "0.5", "--out", f"{tmp_path}/out"]) == 0
    out = capsys.readouterr().out
    assert "score 100.0 % on 10 samples of 'evaluate'" in out
    table = [line.split() for line in out.splitlines() if line.endswith((" v1", "v1 … v2"))]
    assert table == [
        ["100.00", "80.0", "%", "1.25", "block", "block:", "v1", "…", "v2"],
        ["30.00", "40.0", "%", "0.75", "4", "v1"],
    ]
    for ratios in ("0", "1", "0.5,x", "", "nan"):
        assert main([*command, "--ratios", ratios, "--out", f"{tmp_path}/no"]) == 2
        assert "above 0 and below 1" in capsys.readouterr().err
    assert main([*command[:2], "--out", f"{tmp_path}/no"]) == 2 and "--data" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
