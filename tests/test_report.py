import html.parser
import json
import re

import pytest

from sartor.cli.arguments import output_folder
from sartor.errors import InternalError, UsageError
from sartor.report import read_report, summary, write_report
from sartor.report.bundle import Bundle, check_destination, refresh_manifest
from sartor.report.charts import ticks


def report(score=True, status="met"):
    base = 1.8e-3
    document = {
        "schema": "sartor.report/1",
        "status": status,
        "quality": "measured" if score else "unmeasured",
        "source": {"kind": "onnx", "name": "<b>net</b>.onnx", "sha256": "00"},
        "target": {"name": "onnxruntime", "version": "1.0", "threads": 1, "precision": "f32"},
        "budget": {"latency": {"ratio": 0.5}},
        "max_drop": 1.0,
        "baseline": {
            "latency_s": {"median": base, "p10": 1.7e-3, "p90": 2e-3},
            "macs": 1000, "parameters": 500, "weight_bytes": 2000, "peak_activation_bytes": 300,
        },
        "result": {
            "latency_s": {"median": 0.8e-3, "p10": 0.7e-3, "p90": 0.9e-3},
            "macs": 400, "parameters": 200, "weight_bytes": 800, "peak_activation_bytes": 200,
        },
        "ratio": {"latency": 0.45, "latency_ci95": [0.44, 0.47]},
        "predicted": {"latency_s": 0.82e-3},
        "oracle": {"max_rel_error": 2e-7, "tolerance": 1e-4, "verdict": "passed"},
        "history": [
            {"step": 1, "change": "a 8 -> 4", "predicted_latency_s": 1.2e-3},
            {"step": 2, "change": "b 8 -> 4", "predicted_latency_s": 0.8e-3, "measured_ratio": 0.46},
        ],
        "versions": {"sartor": "0.1.0"},
        "widths": [{"name": "conv1", "before": 8, "after": 4}, {"name": "conv2", "before": 8, "after": 8}],
        "blocks_removed": ["layer1.0"],
        "decisions": ["<script>alert('x')</script>", {"decision": "tighten", "ratio": 0.47}],
        "conditions": {"cpu": "a & b"},
    }  # fmt: skip
    if score:
        document["baseline"].update(score=0.99, score_n=400)
        document["result"].update(score=0.985, score_n=400)
        document["history"][1]["score"] = 0.98
    return document


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open, self.attributes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)
        if tag not in ("meta", "circle", "line", "rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page_of(document, folder):
    _, path = write_report(document, folder)
    return Page(path.read_text(encoding="utf-8"))


def test_page_is_well_formed_self_contained_and_escaped(tmp_path):
    page = page_of(report(), tmp_path)
    assert page.open == []
    assert "script" not in page.tags and "b" not in page.tags and "link" not in page.tags
    assert "img" not in page.tags and not {"src", "href", "onload"} & {k for k, _ in page.attributes}
    assert "url(" not in " ".join(page.texts) and "@import" not in " ".join(page.texts)
    text = " ".join(page.texts)
    assert "<script>alert('x')</script>" in text, "shown as text, not run"
    assert "a & b" in text


def test_page_shows_every_section(tmp_path):
    text = " ".join(page_of(report(), tmp_path).texts)
    for expected in (
        "Budget met", "0.450×", "95 % interval 0.440 to 0.470", "98.5 %", "Latency against score",
        "Predicted against measured latency", "8 → 4", "layer1.0", "oracle passed", "2e-07",
        "tighten", "onnxruntime", "Conditions of the measurement",
    ):  # fmt: skip
        assert expected in text, expected


def test_page_without_score_says_unmeasured_and_draws_no_trade_off(tmp_path):
    text = " ".join(page_of(report(score=False), tmp_path).texts)
    assert "unmeasured" in text and "Latency against score" not in text
    assert "Predicted against measured latency" in text


def test_predictions_are_shares_of_the_baseline_that_the_search_measured(tmp_path):
    document = report()
    drifted = document["baseline"]["latency_s"]["median"] / 1.1  # the machine was slower in the final run
    document["predicted"] = {"latency_s": 0.45 * drifted, "baseline_s": drifted}
    assert "predicted 0.450 of the original latency" in " ".join(page_of(document, tmp_path).texts)


def test_missed_budget_is_not_green(tmp_path):
    page = page_of(report(status="budget-missed"), tmp_path)
    assert ("class", "verdict missed") in page.attributes and "Budget missed" in page.texts
    assert ("class", "verdict met") in page_of(report(), tmp_path).attributes


def test_a_long_and_a_minimal_report_render(tmp_path):
    long = report()
    long["history"] = [{"step": i, "change": "x" * 200, "predicted_latency_s": 1e-3} for i in range(1, 400)]
    long["widths"] = [{"name": "n" * 90, "before": 2048, "after": 1}] * 150
    assert page_of(long, tmp_path).open == []
    short = {k: v for k, v in report(score=False).items()}
    for optional in ("widths", "blocks_removed", "decisions", "conditions", "budget", "max_drop", "source"):
        del short[optional]
    short["history"] = []
    short["oracle"] = {"tolerance": 1e-4, "verdict": "inconclusive"}
    assert page_of(short, tmp_path).open == []


def test_json_round_trips_and_bad_reports_are_refused(tmp_path):
    write_report(report(), tmp_path)
    assert read_report(tmp_path) == report()
    bad = report()
    bad["ratio"]["latency"] = float("nan")
    with pytest.raises(InternalError, match="JSON"):
        write_report(bad, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    del bad["oracle"]
    with pytest.raises(InternalError, match="oracle"):
        write_report(bad, tmp_path / "other")
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UsageError, match=re.escape("sartor.report/1")):
        read_report(tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_report(tmp_path / "none")


def test_summary_has_the_numbers():
    text = summary(report())
    for expected in ("1.80 ms", "800 µs", "0.450× [0.440, 0.470]", "-0.50 points", "oracle passed", "0.400×"):
        assert expected in text, expected


def test_a_score_that_selection_saw_is_called_so_everywhere(tmp_path):
    for split, seen in (("test", False), ("evaluate", True)):
        document = report() | {"score_split": split}
        texts = page_of(document, tmp_path).texts
        assert "score taken on split" in texts and f"result, on the {split} split" in " ".join(texts)
        assert ("that selection saw" in " ".join(texts)) is seen
        assert ("that selection saw" in summary(document)) is seen
    assert "score taken on split" not in page_of(report(score=False), tmp_path).texts


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0, 5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.971, 0.989, 5) == pytest.approx([0.975, 0.98, 0.985])
    assert ticks(3.0, 3.0) == [3.0]


# ---- bundle ----------------------------------------------------------------------------------------
def test_bundle_appears_whole_with_its_manifest(tmp_path):
    target = tmp_path / "out" / "digits"
    with Bundle(target) as bundle:
        (bundle.folder / "artifact").mkdir()
        (bundle.folder / "model.onnx").write_bytes(b"abc")
        (bundle.folder / "artifact" / "a.bin").write_bytes(b"")
        assert not target.exists()
        bundle.commit(target={"name": "onnxruntime"})
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["schema"] == "sartor.manifest/1"
    assert [f["file"] for f in manifest["files"]] == ["artifact/a.bin", "model.onnx"]
    assert manifest["files"][1]["bytes"] == 3 and manifest["files"][1]["sha256"].startswith("ba7816bf")
    assert all(manifest[name] == {} for name in ("exits", "gates", "tiles", "precision"))
    assert manifest["target"] == {"name": "onnxruntime"}
    assert [p.name for p in target.parent.iterdir()] == ["digits"], "nothing temporary stays"


def test_a_file_added_later_is_listed(tmp_path):
    with Bundle(tmp_path / "out") as bundle:
        bundle.commit(target={"name": "x"})
    (tmp_path / "out" / "extra.json").write_text("{}")
    refresh_manifest(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [f["file"] for f in manifest["files"]] == ["extra.json"] and manifest["target"] == {"name": "x"}


def test_failure_leaves_the_old_bundle(tmp_path):
    target = tmp_path / "out"
    with Bundle(target) as bundle:
        (bundle.folder / "model.onnx").write_bytes(b"old")
        bundle.commit()
    with pytest.raises(RuntimeError), Bundle(target) as bundle:
        (bundle.folder / "model.onnx").write_bytes(b"new")
        raise RuntimeError
    assert (target / "model.onnx").read_bytes() == b"old"
    with Bundle(target) as bundle:
        (bundle.folder / "other.onnx").write_bytes(b"new")
        bundle.commit()
    assert {p.name for p in target.iterdir()} == {"other.onnx", "manifest.json"}, "replaced as a whole"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_goes_with_the_next_bundle(tmp_path):
    """Killed between the two renames: the earlier bundle lies aside, and nothing is in its place."""
    target = tmp_path / "out"
    for left in (".out.partial", ".out.partial.old"):
        (tmp_path / left).mkdir()
    (tmp_path / ".out.partial" / "half").write_text("")
    (tmp_path / ".out.partial.old" / "report.json").write_text("{}")
    with Bundle(target) as bundle:
        (bundle.folder / "model.onnx").write_bytes(b"new")
        bundle.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in target.iterdir()} == {"manifest.json", "model.onnx"}


@pytest.mark.parametrize(
    ("text", "name"), [(".", "here"), ("sub/..", "here"), ("../here/", "here"), ("out", "out")]
)
def test_output_folder_always_has_a_name(tmp_path, monkeypatch, text, name):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert output_folder(text).name == name


def test_foreign_folders_are_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "final.tex").write_text("x")
    with pytest.raises(UsageError, match=re.escape("final.tex")):
        Bundle(tmp_path / "thesis")
    with pytest.raises(UsageError, match="is a file"):
        Bundle(tmp_path / "thesis" / "final.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_a_foreign_file_beside_a_bundle_is_not_lost(tmp_path):
    out = tmp_path / "out"
    with Bundle(out) as bundle:
        (bundle.folder / "model.onnx").write_bytes(b"1")
        bundle.commit()
    check_destination(out)  # all of it is ours
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 'notes\.txt'"):
        check_destination(out)
    assert (out / "notes.txt").read_text() == "mine"
