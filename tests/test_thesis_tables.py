"""The thesis' tables as fixtures agree with themselves; the rank correlation that is reported about them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sartor.cost_models.descriptions import described_devices

FIXTURE = Path(__file__).parent / "fixtures" / "thesis_tables.json"
DOCUMENT = json.loads(FIXTURE.read_text())
ROWS = {t["table"]: [dict(zip(t["columns"], r, strict=True)) for r in t["rows"]] for t in DOCUMENT["tables"]}


def test_every_row_is_there_and_the_table_that_does_not_exist_is_named():
    counts = {"3.2": 4, "3.4": 21, "4.1": 24, "5.3": 8, "5.4": 4, "5.11": 12, "6.3": 6, "6.11": 8, "6.16": 10}
    assert {table: len(rows) for table, rows in ROWS.items()} == counts
    assert set(DOCUMENT["absent"]) == {"3.6"} and "no table 3.6" in DOCUMENT["absent"]["3.6"]
    devices = {r["device"] for t in ("3.4", "4.1") for r in ROWS[t]}
    assert devices <= set(described_devices())


def test_utilisation_and_efficiency_follow_from_the_other_columns():
    for row in ROWS["4.1"]:
        assert row["macs_m"] / row["latency_ms"] == pytest.approx(row["utilization_gmacs"], rel=1e-3)
    off = [
        row["method"]
        for row in ROWS["4.1"]
        if row["utilization_gmacs"] / row["power_w"] != pytest.approx(row["gmac_per_j"], abs=0.011)
    ]
    assert off == ["VGG19", "Dollar"]  # printed as 1.64 and 1.70; their other columns give 1.61 and 1.72


def test_tables_that_repeat_each_other_agree():
    static = [row["nano_ms"] for row in ROWS["6.11"] if row["method"] == "EC-Static"]
    assert static == pytest.approx([row["latency_ms"] for row in ROWS["6.3"][2:]], abs=0.1)
    assert ROWS["5.3"][0]["latency_ms"] == ROWS["6.16"][0]["latency_ms"] == 10.6
    ours = {row["method"]: row for row in ROWS["6.16"]}["TECO-M"]
    assert ours["macs_g"] == pytest.approx(ROWS["5.3"][-1]["macs_g"], abs=0.05)


def test_rank_correlation(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1] / "benchmarks")])
    from thesis_ranking import groups, spearman

    assert spearman([1, 2, 3, 4], [10, 20, 40, 80]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    first, second = np.array([3.0, 1, 4, 1, 5]), np.array([2.0, 7, 1, 8, 2])
    ranks = np.array([3, 1.5, 4, 1.5, 5]), np.array([2.5, 4, 1, 5, 2.5])
    assert spearman(list(first), list(second)) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert spearman([1, 2], [1, 2]) is None and spearman([1, 1, 1], [1, 2, 3]) is None
    found = groups()
    assert len(found) == 14 and all(len(group["entries"]) >= 3 for group in found)
    assert not any("Dynamic" in name or "SSD" in name for g in found for name, *_ in g["entries"])
