"""The evidence page is generated from stored results, and its benchmark summarises rows by hand."""

from __future__ import annotations

import json
from pathlib import Path

import evidence
import methods

DOCUMENT = Path(__file__).parents[1] / "docs" / "evidence.md"


def row(strategy, seed, score, budget=0.5, met=True):
    return {
        **{
            "dataset": "digits",
            "budget": budget,
            "strategy": strategy,
            "seed": seed,
            "score": score,
            "met": met,
        },
        **{"latency_ratio": 0.49, "macs": 2e7, "search_s": 10.0},
    }


ROWS = [
    *(row("uniform", 0, 0.90), row("uniform", 1, 0.94), row("auto", 0, 0.93), row("from-scratch", 0, 0.91)),
    *(
        row("uniform", 0, 0.80, 0.35),
        row("from-scratch", 0, 0.85, 0.35),
        row("teco", 0, 0.99, 0.35, met=False),
    ),
    {"dataset": "digits", "budget": 0.35, "strategy": "layerprune", "seed": 0, "refused": "no block"},
]


def test_no_drift():
    assert DOCUMENT.read_text(encoding="utf-8") == evidence.page(), (
        "docs/evidence.md differs from the results; run: python benchmarks/evidence.py docs/evidence.md"
    )


def test_wins_losses_and_the_gap_of_auto():
    summary = methods.summary_of(ROWS)
    assert summary["wins"] == ["digits 0.5x"], "0.93 and 0.92 against 0.91"
    assert summary["losses"] == ["digits 0.35x"], "what is over the budget does not count"
    assert summary["auto_gap"] == 0.0
    worse = [*ROWS, row("auto", 1, 0.90)]
    assert abs(methods.summary_of(worse)["auto_gap"] - 0.5) < 1e-9, "0.92 of uniform against 0.915"


def test_the_page_says_what_the_rows_say(tmp_path):
    conditions = {"recovery_minutes": {"digits": 0.15}, "cpu": "some processor", "commit": "abc"}
    document = {"rows": ROWS, "summary": methods.summary_of(ROWS), "conditions": conditions}
    (tmp_path / "methods.json").write_text(json.dumps(document))
    claim = {"summary": {"claim": "Blocks are fast.", "holds": False, "share": 0.123456}, "conditions": {}}
    (tmp_path / "claim-blocks.json").write_text(json.dumps(claim))
    text = evidence.page(tmp_path)
    assert "| uniform | 92.00 ± 2.83 % | 0.490x | 20.0 M | 10 s |" in text
    assert "| layerprune | refused: no block | | | |" in text and "0.490x, over the budget" in text
    assert "**Does not hold here.**" in text and "| share | 0.1235 |" in text
    assert text.index("| auto |") < text.index("| uniform |"), "the best comes first"
    assert methods.table(ROWS).count("\n") == 7, "a header and seven means"
