"""The comparison of the zoo: what another tool prunes is proven or refuted against the original without it."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
import zoo
import zoo_masked
from torch import nn

tool = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
import zoo_torch_pruning  # noqa: E402


class Residual(nn.Module):
    """A stem, a residual block with squeeze and excite, a grouped and a depthwise convolution, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.up, self.up_norm = nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.gate = nn.Conv2d(24, 24, 1)
        self.down = nn.Conv2d(24, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)
        self.num_classes = 10

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.depthwise(self.up_norm(self.up(x)).relu())
        y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        return self.fc((x + self.down(y)).mean((2, 3)))


class Normed(nn.Module):
    """A norm over the axis that is pruned."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 12), norm, nn.Linear(12, 10)
        self.num_classes = 10

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


def pruned(module, *shape):
    module = module.eval()
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(3)),)
    zoo_masked.randomise(module, x, seed=1)
    original = copy.deepcopy(module)
    removed, untracked = zoo_torch_pruning.prune("own/model", module, x, original, {})
    assert not untracked
    return original, module, removed, x


def test_what_is_pruned_right_is_exact():
    original, module, removed, x = pruned(Residual(), 2, 3, 8, 8)
    assert (module.stem.out_channels, module.up.out_channels, module.fc.in_features) == (8, 12, 8)
    assert removed.kept["down", "in", 0].size == removed.kept["depthwise", "out", 0].size == 12
    row = zoo_masked.compare(original, module, removed, x)
    assert row["exact"] is True and row["max_rel_error"] < 1e-13 and row["effect"] > 1e-2


@pytest.mark.parametrize(
    ("layer", "entry"),
    [
        ("down", "weight"),
        ("fc", "weight"),
        ("depthwise", "weight"),
        ("up_norm", "running_mean"),
        ("up", "bias"),
    ],
)
def test_one_wrong_index_is_seen(layer, entry):
    """The layer keeps one unit that should have gone in place of one that should have stayed."""
    original, module, removed, x = pruned(Residual(), 2, 3, 8, 8)
    role = "in" if layer in ("down", "fc") else "out"
    kept = removed.kept[layer, role, 0].copy()
    gone = next(i for i in range(100) if i not in kept)
    kept[0] = gone
    source = getattr(original.get_submodule(layer), entry).data
    wrong = source[:, kept] if role == "in" else source[kept]
    target = getattr(module.get_submodule(layer), entry)
    outputs = removed.kept.get((layer, "out", 0)) if role == "in" else None
    target.data = (wrong if outputs is None else wrong[outputs]).clone()
    row = zoo_masked.compare(original, module, removed, x)
    assert row["exact"] is False and row["max_rel_error"] > 1e-6
    assert row["inexact_reason"] == "computes something else"


@pytest.mark.parametrize("norm", [nn.LayerNorm(12), nn.GroupNorm(3, 12)])
def test_a_norm_over_the_pruned_axis_is_named(norm):
    original, module, removed, x = pruned(Normed(norm), 4, 8)
    row = zoo_masked.compare(original, module, removed, x)
    assert row["exact"] is False and row["inexact_reason"] == "only the statistics of norms differ"
    module.embed.weight.data[0] = 0  # and something else is wrong, too
    row = zoo_masked.compare(original, module, removed, x)
    assert row["inexact_reason"] == "computes something else"


def test_nothing_is_proven_by_what_cannot_be_seen():
    original, module, removed, x = pruned(Residual(), 2, 3, 8, 8)
    for network in (original, module):
        network.fc.weight.data.zero_()
    row = zoo_masked.compare(original, module, removed, x)
    assert row["exact"] is None and "does not reach" in row["inexact_reason"]


def test_an_index_that_is_not_there_cannot_be_tracked():
    removed = zoo_masked.Removed(nn.Sequential(nn.Conv2d(6, 4, 1), nn.Bilinear(2, 3, 4)))
    removed.module("0", "out", [3])
    with pytest.raises(zoo_masked.Untracked, match="'0' loses index 3 of 3"):
        removed.module("0", "out", [0, 3])
    with pytest.raises(zoo_masked.Untracked, match="no rule for Bilinear"):
        removed.module("1", "out", [0])


def test_indices_of_the_moment_become_those_of_the_original():
    removed = zoo_masked.Removed(nn.Sequential(nn.Conv2d(6, 4, 1)))
    removed.module("0", "in", [0, 1])
    removed.module("0", "in", [1])
    assert removed.kept["0", "in", 0].tolist() == [2, 4, 5]
    masked = zoo_masked.masked(nn.Sequential(nn.Conv2d(6, 4, 1)), removed)
    assert (masked[0].weight == 0).all(0).flatten().tolist() == [True, True, False, True, False, False]


@pytest.mark.slow
def test_both_tools_of_the_benchmark(tmp_path, monkeypatch, capsys):
    file = tmp_path / "zoo.json"
    arguments = ["--compare", "torch-pruning", "--models", "test_efficientnet", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["zoo.py", *arguments, "--json", str(file)])
    assert zoo.main() == 0
    document = json.loads(file.read_text())
    row, summary = document["rows"][0], document["summary"]
    assert row["captured"] and row["verdict"] == "passed"
    theirs = row["torch_pruning"]
    assert theirs["captured"] and theirs["runs"] and theirs["exact"] is True and theirs["macs_removed"] > 0.5
    assert {f"torch_pruning_{key}" for key in zoo.summarise([])} <= set(summary)
    assert summary["torch_pruning_exact"] == summary["torch_pruning_prunable"] == 1
    assert "Torch-Pruning: " in capsys.readouterr().out


def test_resume_keeps_what_a_run_has_and_adds_what_it_lacks(tmp_path, monkeypatch):
    spawned = []

    def spawn(command, limit_s, name):
        spawned.append((name, "--compare" in command))
        return {"model": name, "captured": False, "reason": "stopped"}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["zoo.py", "--json", str(file), *arguments])
        assert zoo.main() == 0
        return json.loads(file.read_text())["rows"]

    file = tmp_path / "zoo.json"
    monkeypatch.setattr(zoo, "spawn", spawn)
    monkeypatch.setattr(zoo_torch_pruning, "report", lambda rows: None)
    first = run("--models", "resnet18")
    assert spawned == [("torchvision/resnet18", False)]
    spawned.clear()
    rows = run("--models", "resnet18,alexnet", "--resume", str(file), "--compare", "torch-pruning")
    assert spawned == [
        ("torchvision/alexnet", False),
        ("torchvision/alexnet", True),
        ("torchvision/resnet18", True),
    ]
    assert all("torch_pruning" in row for row in rows) and first[0].items() <= rows[1].items()
