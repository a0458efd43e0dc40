"""How the recovery of a fit begins: least squares, in time, and only where the score is better."""

from __future__ import annotations

import numpy as np
import pytest
from models import captured

from sartor import fit_recovery
from sartor.data import Data, Split
from sartor.passes.base import Context
from sartor.passes.prune_channels import PruneChannels
from sartor.recovery.twins import predictor


@pytest.fixture(scope="module")
def case():
    """A network, half of it, and data whose labels are what the network says."""
    program = captured("resnet")
    ((name, shape),) = program.input_shapes.items()
    images = np.random.default_rng(0).standard_normal((96, *shape[1:])).astype(np.float32)
    labels = next(iter(predictor(program)({name: images}).values())).argmax(1)
    split = [({name: images[i : i + 32]}, labels[i : i + 32]) for i in (0, 32, 64)]
    parts = [Split(part, split, [name]) for part in ("evaluate", "calibration", "test")]
    data = Data(evaluate=parts[0], train=None, calibration=parts[1], test=parts[2])
    pruned = PruneChannels(ratio=0.3, criterion="l2").run(program, Context()).program

    def evaluate(predict):
        return float((next(iter(predict({name: images}).values())).argmax(1) == labels).mean())

    return program, pruned, data, evaluate


def test_a_repaired_network_is_where_training_begins(case):
    program, pruned, data, evaluate = case
    found, said = fit_recovery.repaired(pruned, program, data, 600.0, 0, evaluate)
    before, after = evaluate(predictor(pruned)), evaluate(predictor(found))
    assert after > before + 0.05 and said == (
        f"least squares on 256 samples take the score on 'evaluate' from {before:.1%} to {after:.1%}"
    )


def test_without_time_and_without_gain_the_pruned_network_stays(case):
    program, pruned, data, evaluate = case
    found, said = fit_recovery.repaired(pruned, program, data, 1e-6, 0, evaluate)
    assert found is pruned and "were not repaired by least squares: 8 samples take" in said
    scores = iter((0.9, 0.8))
    found, said = fit_recovery.repaired(pruned, program, data, 600.0, 0, lambda _: next(scores))
    assert found is pruned and said.endswith("from 90.0% to 80.0%: not taken")
    assert fit_recovery.repaired(program, program, data, 600.0, 0, evaluate) == (program, "")
