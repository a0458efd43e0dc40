"""Verdicts of `benchmarks/claims.py` on made-up rows, rows that are gone on with, and plots; nothing is measured."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import types
import xml.etree.ElementTree as ElementTree

import claims
import claims_dimensions
import claims_granularity
import claims_imprint
import claims_quality
import pytest
from claims_record import PANEL, Claim, Panel, Rows, figure
from models import captured

from sartor.report import charts


def row(kind="filters", macs=50, ratio=0.6, half=0.01, number=0, **more):
    """A measured row of a network of 100 MACs that takes 0.2 s."""
    known = {"network": "net", "target": "onnxruntime", "kind": kind, "number": number}
    times = {"ratio": ratio, "ci95": [ratio - half, ratio + half], "baseline_s": 0.2}
    return known | {"macs": macs, "baseline_macs": 100} | times | more


# ---- rows ----------------------------------------------------------------------------------------
def made(measure=lambda rows, options: None):
    return Claim(
        "made",
        "Two is more than one.",
        ("number",),
        measure,
        lambda rows: {"count": len(rows), "holds": len(rows) > 1},
        lambda rows, summary: figure("Made", str(summary["count"]), [Panel("p", "<svg ></svg>")], []),
        lambda options: {"quick": options.quick},
    )


def test_rows_are_on_disk_at_once_and_not_measured_again(tmp_path, capsys):
    rows = Rows(made(), tmp_path / "out", {"quick": False})
    rows.note("tensorrt is not measured")
    rows.add({"number": 1, "value": 0.5})
    document = json.loads((tmp_path / "out/claim-made.json").read_text())
    assert document["schema"] == "sartor.bench/1" and document["name"] == "claim-made"
    assert document["summary"] == {"claim": "Two is more than one.", "count": 1, "holds": False}
    assert document["conditions"]["notes"] == ["tensorrt is not measured"]
    assert "commit" in document["rows"][0] and '"value": 0.5' in capsys.readouterr().out

    again = Rows(made(), tmp_path / "out", {"quick": False})
    assert again.missing([{"number": 1}, {"number": 2}]) == [{"number": 2}]
    again.add({"number": 2, "value": 0.7})
    assert [r["value"] for r in json.loads(again.path.read_text())["rows"]] == [0.5, 0.7]
    assert Rows(made(), tmp_path / "out", {"quick": False}, again=True).rows == []


def test_rows_of_other_settings_are_not_mixed(tmp_path):
    Rows(made(), tmp_path, {"quick": False}).add({"number": 1})
    with pytest.raises(SystemExit, match=r'"quick": false.*not.*"quick": true.*--again'):
        Rows(made(), tmp_path, {"quick": True})


def test_one_claim_that_fails_does_not_stop_the_others_and_what_it_had_is_kept(monkeypatch, tmp_path, capsys):
    def fails(rows, options):
        rows.add(*rows.missing([{"number": 1}]))
        raise ValueError("planted")

    def works(rows, options):
        rows.add(*rows.missing([{"number": 1}, {"number": 2}]))

    monkeypatch.setattr(claims, "CLAIMS", {"first": made(fails), "second": made(works)})
    monkeypatch.setattr(sys, "argv", ["claims.py", "all", "--out", str(tmp_path)])
    assert claims.main() == 1
    err = capsys.readouterr().err
    assert "planted" in err and "failed: first;" in err
    document = json.loads((tmp_path / "claim-made.json").read_text())
    assert [r["number"] for r in document["rows"]] == [1, 2] and document["summary"]["holds"]
    assert (tmp_path / "claim-made.svg").exists()


def test_a_target_that_does_not_run_here_is_a_note(monkeypatch, tmp_path):
    from sartor import backends
    from sartor.errors import UsageError

    def get(name):
        if name == "absent":
            raise UsageError("not installed")
        reason = "no GPU" if name == "tensorrt" else ""
        return types.SimpleNamespace(capabilities=lambda: types.SimpleNamespace(not_run_here=reason))

    monkeypatch.setattr(backends, "get", get)
    rows = Rows(made(), tmp_path, {})
    assert list(claims_granularity.targets_here(rows, ("onnxruntime", "tensorrt", "absent"))) == [
        "onnxruntime"
    ]
    assert rows.notes == ["tensorrt is not measured: no GPU", "absent is not measured: not installed"]


def test_only_missing_networks_are_measured_some_at_a_time_each_with_the_base(monkeypatch, tmp_path):
    calls = []

    def measured(target, base, programs, work, seed):
        calls.append((target, base, list(programs)))
        return [{"ratio": p / base, "ci95": [0, 1], "baseline_s": 1.0} for p in programs]

    monkeypatch.setattr(claims_granularity, "measured", measured)
    monkeypatch.setattr(claims_granularity, "macs_of", lambda program: program)
    monkeypatch.setattr(claims_granularity, "_AT_ONCE", 2)
    claim = claims_granularity.GRANULARITY
    rows = Rows(claim, tmp_path, {})
    rows.rows = [row(number=1)]
    keys = [{"network": "net", "kind": "filters", "number": number} for number in range(4)]
    claims_granularity.add_measured(rows, "onnxruntime", 100, keys, lambda key: 10 + key["number"], tmp_path)
    assert calls == [("onnxruntime", 100, [10, 12]), ("onnxruntime", 100, [13])]
    assert [(r["number"], r["macs"], r["ratio"]) for r in rows.rows[1:]] == [
        (0, 10, 0.1),
        (2, 12, 0.12),
        (3, 13, 0.13),
    ]


# ---- granularity ---------------------------------------------------------------------------------
def test_signatures_are_integers_within_their_shares_and_the_first_ones_stay():
    sizes, blocks = {"a": 64, "b": 40}, ["x", "y", "z"]
    filters = claims_granularity.signatures("filters", sizes, blocks, 60)
    few = claims_granularity.signatures("few filters", sizes, blocks, 60)
    assert filters[:7] == claims_granularity.signatures("filters", sizes, blocks, 7)
    widths = [one["kept"].get("a", 64) for one in filters]
    assert min(widths) >= 64 - 57 and max(widths) <= 64
    assert min(widths) < 20 and len({w % 16 for w in widths}) > 8  # no grid
    assert min(one["kept"].get("a", 64) for one in few) >= 32
    assert all(count < sizes[name] for one in few for name, count in one["kept"].items())
    assert all(one["kept"] for one in few)  # something goes
    subsets = claims_granularity.signatures("blocks", sizes, blocks, 60)
    assert len(subsets) == 7  # each once
    assert {tuple(one["blocks"]) for one in subsets} == {
        each for n in (1, 2, 3) for each in itertools.combinations(blocks, n)
    }


def test_slower_and_little_are_so_over_the_whole_interval():
    rows = [
        row(ratio=1.05, number=0),  # slower
        row(ratio=1.015, number=1),  # perhaps, and surely little
        row(ratio=0.96, half=0.005, number=2),  # 4 % for 50 % of the MACs
        row(ratio=0.96, half=0.02, number=3),  # perhaps 6 %
    ]
    blocks = [row("blocks", 50, 0.5), row("blocks", 90, 0.9, number=1)]
    found = claims_granularity.summarize_granularity([*rows, *blocks])
    assert found["filters"]["share_slower"] == 0.25
    assert found["filters"]["share_slower_or_little"] == 0.75
    assert found["filters"]["slowest_ratio"] == 1.05
    assert found["few filters"] == {"count": 0} and found["blocks"]["share_slower_or_little"] == 0.0
    assert found["holds"] is True
    cell = found["cells"]["net on onnxruntime"]
    (one,) = cell["equal_macs"]  # the medians of -5, -1.5, 4 and 4 %, and of the block that saves half
    assert one == {"macs": [0.4, 0.5], "filters": pytest.approx(0.0125), "blocks": pytest.approx(0.5)}
    assert cell["blocks_over_filters"] == pytest.approx(40.0)

    useless = row("blocks", 50, 0.97, number=2)
    assert not claims_granularity.summarize_granularity([*rows, *blocks, useless])["holds"]
    assert not claims_granularity.summarize_granularity([*rows[1:], *blocks])["holds"]
    assert not claims_granularity.summarize_granularity(rows)["holds"]
    assert not claims_granularity.summarize_granularity([])["holds"]


def test_reductions_at_equal_macs_are_medians_of_slices_with_both():
    rows = [
        *(row(macs=45, ratio=ratio, number=n) for n, ratio in enumerate((0.9, 0.8, 0.7))),
        row("few filters", 85, 1.1),
        row("blocks", 50, 0.6),
        row("blocks", 25, 0.3, number=1),
        row("blocks", 81, 0.8, number=2),
    ]
    cell = claims_granularity.summarize_granularity(rows)["cells"]["net on onnxruntime"]
    assert [one["macs"] for one in cell["equal_macs"]] == [[0.4, 0.5], [0.8, 0.9]]
    assert [one["filters"] for one in cell["equal_macs"]] == pytest.approx([0.2, -0.1])
    assert [one["blocks"] for one in cell["equal_macs"]] == pytest.approx([0.4, 0.2])
    assert cell["blocks_over_filters"] == pytest.approx(
        2.0
    )  # where filters save nothing there is no quotient


# ---- dimensions and utilisation ------------------------------------------------------------------
def series(dimension, slope, bend=0.0):
    """Networks whose latency is a line over MACs through the original's, or bent."""
    return [
        row("", macs, 1 - slope * (1 - macs / 100) + bend * (-1) ** i, dimension=dimension, value=macs)
        for i, macs in enumerate((90, 70, 50, 30))
    ]


def test_a_line_per_dimension_in_seconds_per_mac():
    line = claims_dimensions.line_of(series("depth", 0.8))
    assert (line["slope"], line["intercept"], line["r2"]) == pytest.approx((0.8, 0.2, 1.0))
    assert line["slope_ci95"] == pytest.approx([0.8, 0.8]) and line["count"] == 5
    assert line["seconds_per_gmac"] == pytest.approx(0.8 * 0.2 / 100 * 1e9)
    assert claims_dimensions.line_of(series("depth", 0.8)[:2]) is None
    assert claims_dimensions.line_of(series("depth", 0.8, bend=0.2))["r2"] < 0.9


def test_dimensions_hold_where_lines_are_straight_and_slopes_differ():
    rows = [*series("depth", 1.0), *series("width", 0.6), *series("resolution", 0.6)]
    found = claims_dimensions.summarize_dimensions(rows)
    (cell,) = found["cells"].values()
    assert found["holds"] and cell["slopes_differ"] == [["depth", "width"], ["depth", "resolution"]]
    assert cell["steepest_over_flattest"] == pytest.approx(1 / 0.6)
    same = [*series("depth", 0.8, 0.01), *series("width", 0.81, 0.01), *series("resolution", 0.8, 0.01)]
    assert not claims_dimensions.summarize_dimensions(same)["holds"]
    bent = [*series("depth", 1.0), *series("width", 0.6), *series("resolution", 0.6, bend=0.2)]
    assert not claims_dimensions.summarize_dimensions(bent)["holds"]
    other = [r | {"target": "openvino"} for r in same]
    assert not claims_dimensions.summarize_dimensions([*rows, *other])["holds"]
    assert not claims_dimensions.summarize_dimensions(rows[:8])["holds"]
    assert not claims_dimensions.summarize_dimensions([])["holds"]


def test_blocks_are_spread_over_the_network():
    assert claims_dimensions.spread("abcdef", 2) == ["b", "e"]
    assert claims_dimensions.spread("abcdef", 3) == ["b", "d", "f"]
    assert claims_dimensions.spread("abcde", 5) == list("abcde")


def growth(dimension, *ratios):
    return [
        row("", 100 * factor, ratio, dimension=dimension, factor=factor)
        for factor, ratio in zip((2, 4, 8), ratios, strict=True)
    ]


def test_achieved_flops_are_two_for_a_multiplication():
    (first, *_) = growth("width", 1.6, 2.5, 4.0)
    assert claims_dimensions.gflops(first) == pytest.approx(2 * 200 / (1.6 * 0.2) / 1e9)
    assert claims_dimensions.gain_of(first) == (pytest.approx(1.25), pytest.approx((2 / 1.61, 2 / 1.59)))


def test_utilisation_holds_where_width_and_resolution_raise_it_and_depth_does_not():
    rows = [*growth("width", 1.6, 2.5, 4.0), *growth("resolution", 1.9, 3.5, 6.0)]
    flat = growth("depth", 2.0, 4.0, 8.0)
    found = claims_dimensions.summarize_utilisation([*rows, *flat])
    (cell,) = found["cells"].values()
    assert found["holds"] and cell["width"]["gain"] == pytest.approx(2.0) and cell["width"]["factor"] == 8
    assert cell["depth"]["raises"] is False and cell["base_gflops"] == pytest.approx(2 * 100 / 0.2 / 1e9)
    risen = [r | {"network": "small"} for r in (*rows, *growth("depth", 1.7, 3.0, 5.0))]
    found = claims_dimensions.summarize_utilisation([*rows, *flat, *risen])
    assert not found["holds"] and found["holds_in"] == ["net on onnxruntime"]
    assert not claims_dimensions.summarize_utilisation([*rows[:3], *flat])["holds"]
    assert not claims_dimensions.summarize_utilisation([])["holds"]


@pytest.mark.parametrize(("dimension", "most"), [("depth", 1.05), ("width", 1.7), ("resolution", 1.1)])
def test_networks_grow_to_the_macs_that_are_asked_for(dimension, most):
    program = captured("resnet")
    for factor in (2, 4):
        grown = claims_dimensions.grown(program, dimension, factor)
        ratio = claims_granularity.macs_of(grown) / claims_granularity.macs_of(program)
        assert 0.9 * factor <= ratio <= most * factor  # widths of 8 to 32 channels are rounded up by eights


# ---- searches and training -----------------------------------------------------------------------
def search(name, budget, judged, seconds, *scores):
    known = {"search": name, "budget": budget, "judged": judged, "seconds": seconds, "loss": 0.1}
    return known | {"scores": list(scores), "plan": "3 groups narrowed"}


def test_ines_holds_where_it_is_cheap_and_as_good():
    rows = [
        search("INES+ITES", 0.5, 10, 5.0, 0.96, 0.98),
        search("ITES only", 0.5, 40, 25.0, 0.97, 0.975),
    ]
    found = claims_quality.summarize_ines(rows)
    assert found["holds"] and found["budgets"]["0.5x"] == {
        "judged_ratio": 0.25,
        "seconds_ratio": 0.2,
        "loss_difference": 0.0,
        "score_difference_points": pytest.approx(-0.25),
        "holds": True,
    }
    worse = search("INES+ITES", 0.5, 10, 5.0, 0.96, 0.96)
    dearer = search("INES+ITES", 0.5, 11, 5.0, 0.98, 0.98)
    slower = search("INES+ITES", 0.5, 10, 6.5, 0.98, 0.98)
    assert not any(claims_quality.summarize_ines([one, rows[1]])["holds"] for one in (worse, dearer, slower))
    missed = [search("INES+ITES", 0.35, 10, 5.0, 0.90), search("ITES only", 0.35, 90, 50.0, 0.95)]
    assert not claims_quality.summarize_ines([*rows, *missed])["holds"]
    assert not claims_quality.summarize_ines(rows[:1])["holds"]


def way(name, seed, score, flops=600e6, steps=180, seconds=50.0):
    return {
        "way": name,
        "seed": seed,
        "score": score,
        "training_flops": flops,
        "steps": steps,
        "seconds": seconds,
    }


def test_rat_holds_where_it_saves_enough_at_the_same_score():
    full = [way("full size", seed, score) for seed, score in enumerate((0.97, 0.98, 0.96))]
    rat = [way("RAT", seed, score, 360e6, seconds=35.0) for seed, score in enumerate((0.965, 0.97, 0.96))]
    found = claims_quality.summarize_rat([*full, *rat])
    assert found["holds"] and found["flops_saved"] == pytest.approx(0.4)
    assert found["seconds_saved"] == pytest.approx(0.3)
    assert found["score_difference_points"] == pytest.approx(-0.5)
    assert found["RAT"]["score_sd"] == pytest.approx(0.5) and found["full size"]["count"] == 3
    dear = [r | {"training_flops": 430e6} for r in rat]
    worse = [r | {"score": 0.955} for r in rat]
    fewer = [r | {"steps": 170} for r in rat]
    assert not any(claims_quality.summarize_rat([*full, *one])["holds"] for one in (dear, worse, fewer, []))


# ---- imprinting ----------------------------------------------------------------------------------
def test_iterative_removal_scores_what_is_left_and_compares_with_one_shot(monkeypatch):
    scores = {
        (): {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4},
        ("a",): {"b": 0.5, "c": 0.3, "d": 0.4},
        ("a", "c"): {"b": 0.1, "d": 0.4},
        ("a", "c", "b"): {"d": 0.4},
    }
    monkeypatch.setattr(claims_imprint, "scores_of", lambda program, criterion, digits: scores[program])
    digits = types.SimpleNamespace(score=lambda program, original: 1.0 - len(program) / 10)
    found = claims_imprint.compared((), "imprint", digits, lambda order: order, None)
    assert found["one_shot"] == ["a", "b", "c", "d"] and found["iterative"] == ["a", "c", "b", "d"]
    assert found["spearman"] == pytest.approx(0.8)  # 1 - 6 (0 + 1 + 1 + 0) / (4 * 15)
    assert found["spearman_scored_again"] == [pytest.approx(-0.5), None, None]
    assert found["scores"] == pytest.approx([0.9, 0.8, 0.7])
    assert claims_imprint.compared((), "imprint", digits, lambda order: order, 1)["iterative"] == [
        "a",
        "c",
        "d",
        "b",
    ]


def ranking(network, criterion, spearman, iterative="abcd"):
    return {
        "network": network,
        "criterion": criterion,
        "one_shot": list("abcd"),
        "iterative": list(iterative),
        "spearman": spearman,
        "spearman_scored_again": [1.0, 1.0, None],
        "scores": [0.9, 0.8, 0.7],
    }


def test_imprint_holds_where_it_agrees_in_every_network():
    digits, deep = (ranking(name, "imprint", 0.95) for name in claims_imprint.NETWORKS)
    other = ranking("digits", "l2", 0.2, "dcba")
    found = claims_imprint.summarize_imprint([digits, deep, other])
    assert found["holds"] and found["networks"]["digits"]["blocks"] == 4
    assert found["networks"]["digits"]["l2"]["first_removed_is_the_same"] is False
    assert not claims_imprint.summarize_imprint([digits, other])["holds"]
    assert not claims_imprint.summarize_imprint([digits, ranking("deep digits", "imprint", 0.8)])["holds"]
    assert not claims_imprint.summarize_imprint([digits, ranking("deep digits", "imprint", None)])["holds"]


# ---- plots ---------------------------------------------------------------------------------------
def test_a_figure_is_one_file_for_light_and_dark():
    chart = charts.scatter(
        [charts.Point(1.0, 2.0, title="a < b", kind="one"), charts.Point(2.0, 3.0, kind="two")],
        x_title="MACs (%)",
        y_title="latency (%)",
        x_format=str,
        y_format=str,
        size=PANEL,
    )
    panels = [Panel(f"panel {i}", chart, ("a note",) * i) for i in range(3)]
    text = figure("Title & more", "word " * 60, panels, [("one", "first"), ("even", "same")])
    root = ElementTree.fromstring(text)
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    shown = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    for expected in ("Title & more", "panel 2", "a note", "first", "same", "MACs (%)", "latency (%)"):
        assert expected in shown
    assert "prefers-color-scheme: dark" in text and "href" not in text and "url(" not in text
    inner = [each for each in root if each.tag.endswith("svg")]
    assert [(each.get("x"), each.get("width")) for each in inner] == [
        ("24", "520"),
        ("544", "520"),
        ("24", "520"),
    ]
    bottoms = [float(each.get("y")) + float(each.get("height")) for each in inner]
    assert bottoms[0] < float(inner[2].get("y")) and bottoms[2] < float(root.get("height"))
    assert bottoms[0] == bottoms[1]


MADE_UP = {
    "granularity": [row(), row("few filters", 80, 1.1), row("blocks", 50, 0.5)],
    "dimensions": [*series("depth", 1.0), *series("width", 0.6), *series("resolution", 0.6)],
    "ines": [search("INES+ITES", 0.5, 10, 5.0, 0.96, 0.98), search("ITES only", 0.5, 40, 25.0, 0.97)],
    "utilisation": [*growth("width", 1.6, 2.5, 4.0), *growth("depth", 2.0, 4.0, 8.0)],
    "rat": [way("full size", 0, 0.97), way("RAT", 0, 0.96, 360e6)],
    "imprint": [ranking("digits", "imprint", 1.0), ranking("digits", "l2", None, "dcba")],
}
SHOWN = {
    "granularity": (3, "latency that is saved (%)", "blocks: random subsets go", "filters: 0 % slower"),
    "dimensions": (13, "latency (% of the original)", "resolution", "depth 1.00 (R² 1.000)"),
    "ines": (4, "test score after recovery (%)", "ITES only", "0.25 times as many networks"),
    "utilisation": (7, "achieved FLOPS (times)", "depth", "the base achieves 0.0 GFLOPS"),
    "rat": (4, "training FLOPs of a sample in a step (10⁶)", "RAT", "save 40 % of the FLOPs at -1.0 points"),
    "imprint": (8, "place in iterative removal", "taylor-weight", "Spearman: imprint 1.00, l2 none"),
}


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_every_plot_has_its_rows_axes_legend_and_verdict(name, tmp_path, monkeypatch, capsys):
    (tmp_path / f"claim-{name}.json").write_text(
        json.dumps({"rows": MADE_UP[name], "conditions": {"settings": settings(name)}})
    )
    monkeypatch.setattr(sys, "argv", ["claims.py", name, "--plot-only", "--out", str(tmp_path)])
    assert claims.main() == 0 and '"holds"' in capsys.readouterr().out
    root = ElementTree.fromstring((tmp_path / f"claim-{name}.svg").read_text())
    dots, axis, legend, said = SHOWN[name]
    panels = [each for each in root if each.tag.endswith("svg")]
    circles = [c for panel in panels for c in panel.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles) == dots
    shown = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert axis in shown and legend in shown
    assert said in " ".join(shown)


def settings(name):
    return claims.CLAIMS[name].settings(argparse.Namespace(quick=False, seeds=3))
