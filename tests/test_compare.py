"""`sartor compare`: reports side by side, what must not be compared, damaged folders, the page."""

from __future__ import annotations

import copy
import json

import pytest
from test_report import Page, report

from sartor.cli import main
from sartor.errors import UsageError
from sartor.report import write_report
from sartor.report.compare import CONDITIONS, compare, notes, row, summary
from sartor.report.compare_page import render


def full(**changes):
    """A report with everything that a fit writes today."""
    document = report() | {
        "budget": {"latency": {"value": 0.5, "relative": True, "ratio": 0.5}, "weight_bytes": {"value": 4e6}},
        "strategy": "budgeted-greedy",
        "seed": 3,
        "recovery": {"limit_s": 60.0, "seconds": 58.4, "steps": 120},
        "score_split": "test",
        "data": {"source": "data.py:digits", "fingerprint": "f" * 64},
        "conditions": {
            "cpu": "A72",
            "cores_allowed": 4,
            "platform": "Linux aarch64",
            "governor": "performance",
        },
        "versions": {"sartor": "0.1.0", "torch": "2.11", "onnxruntime": "1.0"},
    }
    document["budget"]["weight_bytes"]["relative"] = False
    return document | changes


@pytest.fixture
def bundles(tmp_path, monkeypatch):
    """Writes reports to folders a, b, …; returns their names."""
    monkeypatch.chdir(tmp_path)

    def write(*reports):
        names = "abcdefgh"[: len(reports)]
        for name, document in zip(names, reports, strict=True):
            write_report(document, tmp_path / name)
        return list(names)

    return write


def changed(path, value):
    """`full()` with one value replaced; the path is dotted."""
    document = copy.deepcopy(full())
    *outer, last = path.split(".")
    place = document
    for key in outer:
        place = place[key]
    place[last] = value
    return document


# ---- the document ----------------------------------------------------------------------------------
def test_everything_stands_side_by_side(bundles):
    second = full(
        status="budget-missed",
        ratio={"latency": 0.6, "latency_ci95": [0.58, 0.62]},
        predicted={"latency_s": 1e-3, "baseline_s": 2e-3},
        blocks_removed=["layer1.0", "layer1.1", "layer2.0"],
        recovery={"limit_s": 0.0, "seconds": 0.0, "steps": 0},
    )
    document = compare(bundles(full(), second))
    assert document["schema"] == "sartor.compare/1"
    assert document["differences"] == [] and document["alike"] == [[0, 1]] and notes(document) == []
    first, second = document["bundles"]
    assert first["folder"] == "a" and first["model"] == {"name": "<b>net</b>.onnx", "sha256": "00"}
    assert first["latency_s"] == {"before": 1.8e-3, "after": 0.8e-3}
    assert first["ratio"] == {"latency": 0.45, "latency_ci95": [0.44, 0.47]}
    assert first["predicted_ratio"] == pytest.approx(0.82 / 1.8) and second["predicted_ratio"] == 0.5
    assert first["macs"] == {"before": 1000, "after": 400}
    assert first["score"] == {
        "before": 0.99, "after": 0.985, "drop": pytest.approx(0.005), "samples": 400, "split": "test",
    }  # fmt: skip
    rows = [dict(row(bundle)) for bundle in (first, second)]
    assert list(rows[0]) == list(rows[1])
    expected = {
        "Target": "onnxruntime 1.0", "Threads, precision": "1, f32", "Processor": "A72",
        "Budget": "latency 0.5×, weights 4.00 MB", "Status": "Budget met", "Latency before": "1.80 ms",
        "Latency after": "800 µs", "Latency ratio": "0.450×", "95 % interval": "[0.440, 0.470]",
        "Predicted ratio": "0.456×", "MACs": "400 (0.400×)", "Weights": "800 B (0.400×)",
        "Peak activations": "200 B (0.667×)", "Score before": "99.0 %", "Score after": "98.5 %",
        "Points lost": "0.50, 1 allowed", "Samples": "400 of 'test'", "Groups narrowed": "1 of 2",
        "Blocks removed": "layer1.0", "Strategy": "budgeted-greedy", "Seed": "3", "Recovery": "58 s, 120 steps",
    }  # fmt: skip
    assert expected.items() <= rows[0].items()
    assert rows[1]["Blocks removed"] == "3 blocks" and rows[1]["Recovery"] == "none"
    assert rows[1]["Status"] == "Budget missed"
    text = summary(document, 200)
    assert all(text.count(label) >= 1 for label in expected) and "Not comparable" not in text


def test_reports_of_earlier_versions_are_taken(bundles):
    """Without strategy, seed, recovery, data, and with little else: what is not known is a dash."""
    old = report(score=False)
    for optional in ("widths", "blocks_removed", "conditions", "budget", "max_drop", "source"):
        del old[optional]
    document = compare(bundles(old, old))
    assert document["differences"] == [] and "score" not in document["bundles"][0]
    rows = dict(row(document["bundles"][0]))
    unknown = [label for label, text in rows.items() if text == "–"]
    assert unknown == [
        "Model", "Processor", "Budget", "Score before", "Score after", "Points lost", "Samples",
        "Groups narrowed", "Blocks removed", "Strategy", "Seed", "Recovery",
    ]  # fmt: skip
    assert Page(render(document)).open == []


# ---- what must not be compared ---------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "value", "forbidden"),
    [
        ("source.sha256", "11", "latency, ratio and score, because of different models: 00 (a); 11 (b)"),
        (
            "target.name",
            "openvino",
            "latency and ratio, because of different targets: onnxruntime (a); openvino (b)",
        ),
        ("target.version", "2.0", "latency and ratio, because of different versions of the target"),
        ("target.threads", 4, "latency and ratio, because of different numbers of threads: 1 (a); 4 (b)"),
        ("conditions.cpu", "A76", "latency and ratio, because of different processors: A72 (a); A76 (b)"),
        ("conditions.cpu", None, "latency and ratio, because of different processors: A72 (a); unknown (b)"),
        ("conditions.cores_allowed", 2, "latency and ratio, because of different numbers of processors"),
        ("conditions.platform", "Linux x86_64", "latency and ratio, because of different platforms"),
        ("conditions.governor", "powersave", "latency and ratio, because of different frequency governors"),
        ("target.precision", "int8", "ratio, because of different precisions: f32 (a); int8 (b)"),
        ("data.fingerprint", "e" * 64, f"score, because of different data: {'f' * 16}… (a); {'e' * 16}… (b)"),
        (
            "score_split",
            "evaluate",
            "score, because of different splits that are scored: test (a); evaluate (b)",
        ),
    ],
)
def test_different_conditions_are_flagged(bundles, path, value, forbidden):
    document = compare(bundles(full(), changed(path, value)))
    (difference,) = [one for one in document["differences"] if one["forbids"]]
    (line,) = [line for line in notes(document) if line.startswith("Not comparable")]
    assert line.startswith(f"Not comparable: {forbidden}")
    words = forbidden.partition(", because")[0].replace(" and ", ", ").split(", ")
    assert difference["forbids"] == words
    assert document["alike"] == ([[0, 1]] if difference["forbids"] == ["ratio"] else [[0], [1]])
    assert line in summary(document) and "Not everything is comparable" in " ".join(
        Page(render(document)).texts
    )


def test_every_condition_is_read_from_a_report():
    document = changed("target.shapes", {"x": [1, 3, 8, 8]})
    assert [condition.key for condition in CONDITIONS if condition.read(document) is None] == []


def test_other_versions_are_told_and_forbid_nothing(bundles):
    document = compare(bundles(full(), changed("versions.torch", "2.12")))
    assert notes(document) == ["Different versions of packages: torch 2.11 (a); torch 2.12 (b)."]
    assert document["alike"] == [[0, 1]]
    assert "Not everything" not in " ".join(Page(render(document)).texts)


# ---- bad folders -----------------------------------------------------------------------------------
def test_bad_folders_are_named(bundles, tmp_path):
    names = bundles(full(), full())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"'empty/report\.json' cannot be read"):
        compare([*names, "empty"])
    with pytest.raises(UsageError, match="1 folder is given"):
        compare(["a"])
    with pytest.raises(UsageError, match=r"'\./a' is given twice|'a' is given twice"):
        compare(["a", "./a"])
    for number, damage in enumerate(
        (
            lambda d: d.update(ratio={}),
            lambda d: d["baseline"].pop("latency_s"),
            lambda d: d.update(target="onnxruntime"),
            lambda d: d["ratio"].update(latency=float("nan")),
            lambda d: d.update(widths=[{"name": "x"}]),
        )
    ):
        folder = tmp_path / f"bad{number}"
        folder.mkdir()
        document = full()
        damage(document)
        (folder / "report.json").write_text(json.dumps(document))
        with pytest.raises(UsageError, match=f"'bad{number}' is damaged"):
            compare(["a", folder.name])


# ---- page, text, command ---------------------------------------------------------------------------
def test_the_page_shows_charts_of_what_is_alike_only(bundles):
    other = changed("conditions.cpu", "A76") | {"blocks_removed": []}
    document = compare(bundles(full(), full(), other))
    page = Page(render(document))
    assert page.open == [] and not {"script", "b", "img", "link"} & set(page.tags)
    assert not {"src", "href", "onload"} & {key for key, _ in page.attributes}
    text = " ".join(page.texts)
    for expected in (
        "Score against latency: a, b",
        "Score against latency: c",
        "<b>net</b>.onnx",
        "8",
        "stays",
    ):
        assert expected in text, expected
    dots = [value for key, value in page.attributes if key == "class" and str(value).startswith("dot ")]
    assert dots.count("dot baseline") == dots.count("dot result") == 3 and page.tags.count("svg") == 2
    assert page.tags.count("svg") == len(document["alike"])
    whole = Page(render(compare(["a", "b"])))
    assert whole.tags.count("svg") == 1 and "Score against latency" in whole.texts


def test_the_text_is_cut_into_tables_that_fit(bundles):
    document = compare(bundles(*[full(budget={"latency": {"ratio": 0.5}}) for _ in range(6)]))
    text = summary(document, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert [line.split() for line in text.splitlines() if line.startswith("     ")] == [
        ["a", "b", "c"],
        ["d", "e", "f"],
    ]
    assert summary(document, 160).count("Latency ratio") == 1


def test_the_command(bundles, tmp_path, capsys):
    bundles(full(), changed("target.threads", 2))
    assert main(["compare", "a", "b", "--html", "page/both.html"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Not comparable: latency and ratio") and "wrote page/both.html" in out
    assert "Fits side by side" in (tmp_path / "page" / "both.html").read_text()
    assert main(["compare", "a", "b", "--html", "page/both.html", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"][0]["file"] == "both.html" and len(document["bundles"]) == 2
    assert main(["compare", "a", "none", "--html", "page/none.html"]) == 2
    assert "'none/report.json'" in capsys.readouterr().err and not (tmp_path / "page" / "none.html").exists()
    assert main(["compare", "a", "b", "--html", "page"]) == 2
