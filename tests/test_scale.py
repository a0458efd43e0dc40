"""Memory against the model's size, and time against its nodes, on sizes that a test has time for."""

from __future__ import annotations

import pytest
import scale


@pytest.mark.slow
def test_a_model_on_disk_is_cut_in_less_memory_than_it_has() -> None:
    row = scale.measure(blocks=24, channels=1024, external=True, limit_s=120)
    assert row.get("verdict") == "passed", row
    assert row["model_bytes"] > 2e8
    # Read whole, the weights alone are once the model; the goal is 1.3, what is kept is a few tensors.
    assert row["save_peak_bytes"] < 0.5 * row["model_bytes"]
    assert row["oracle_peak_bytes"] < 4 * row["model_bytes"]  # in float64, four programs of it: 8 times


def test_a_process_that_fails_is_a_row_with_the_reason() -> None:
    row = scale.measure(blocks=4, channels=16, external=False, limit_s=0.01)
    assert row["reason"] == "more than 0 s" and "save_s" not in row
