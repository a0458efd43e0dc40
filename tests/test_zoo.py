"""A sample of the zoo benchmark: other people's architectures are captured, cut to half and proven."""

from __future__ import annotations

import sys

import pytest
import zoo
import zoo_models

# Few seconds each, and every way of cutting once: channel shuffle, windows with position tables, squeeze and
# excite, fused qkv, gated units, dense and cross-stage connections, layer scale, re-parametrised branches.
SAMPLE = {
    "timm/test_byobnet": 0.7,
    "timm/test_convnext": 0.35,
    "timm/test_efficientnet": 0.6,
    "timm/test_mambaout": 0.3,
    "timm/test_vit": 0.5,
    "timm/test_vit_relpos": 0.4,
    "timm/ghostnet_050": 0.5,
    "timm/tiny_vit_5m_224": 0.4,
    "torchvision/shufflenet_v2_x0_5": 0.6,
    "torchvision/squeezenet1_1": 0.6,
}


@pytest.mark.parametrize("name", SAMPLE)
def test_half_of_every_group_goes_and_nothing_else_changes(name: str) -> None:
    row = zoo.examine(name, threads=1)
    assert row["captured"], row
    assert row["verdict"] == "passed" and row["max_rel_error"] < 1e-12
    assert row["macs_removed"] > SAMPLE[name]


def test_lists() -> None:
    assert len(zoo_models.TIMM) == 86 and len(zoo_models.TORCHVISION) == 85
    assert len(set(zoo_models.NAMES)) == 171


def test_a_crash_and_a_hang_are_rows_with_a_reason() -> None:
    crash = zoo.spawn([sys.executable, "-c", "raise SystemExit(7)"], 30, "crash")
    hang = zoo.spawn([sys.executable, "-c", "import time; time.sleep(60)"], 1, "hang")
    assert not crash["captured"] and "ended with 7" in crash["reason"]
    assert not hang["captured"] and "more than 1 s" in hang["reason"]
    summary = zoo.summarise(
        [crash, hang, {"captured": True, "macs_removed": 0.5, "seconds": 2, "verdict": "passed"}]
    )
    assert summary["total"] == 3 and summary["captured"] == summary["prunable"] == summary["exact"] == 1
