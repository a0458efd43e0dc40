"""Training in bfloat16 beside float32: same weights' type, nearly the same result, the same bytes again."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from test_recovery import network, normal, samples, steps
from test_recovery_features import data_for
from test_recovery_sizes import SMALL, at

from sartor.errors import UsageError
from sartor.recovery import RecoveryOptions, distill
from sartor.recovery.checkpoint import load_checkpoint
from sartor.recovery.student import Student
from sartor.recovery.training import Training


def run(precision, **more):
    options = steps(60, learning_rate=1e-2, precision=precision)
    return distill(network(noise=0.3), network(), samples(), minutes=1, seed=0, options=options, **more)


def test_it_trains_as_float32_does_and_repeats():
    full, mixed = run("f32"), run("bf16")
    assert mixed.steps == 60 and mixed.notes == ()
    best = [min(entry["distance"] for entry in result.history) for result in (full, mixed)]
    assert best[1] < 0.3 * mixed.history[0]["distance"]
    assert best[1] == pytest.approx(best[0], rel=0.5)
    assert full.history[0]["distance"] == mixed.history[0]["distance"], "judged in float32"
    program = mixed.program
    assert {program.initializer_array(name).dtype.name for name in program.initializers} <= {
        "float32",
        "int64",
    }
    for name in ("conv.weight", "head.weight"):
        ours, theirs = program.initializer_array(name), full.program.initializer_array(name)
        assert not np.array_equal(ours, theirs)
        np.testing.assert_allclose(ours, theirs, atol=0.1)
    assert run("bf16").program.to_bytes() == program.to_bytes()


def test_layers_compute_in_bfloat16_and_nothing_else_does(monkeypatch, tmp_path):
    student = Student(network(), network(), RecoveryOptions(precision="bf16"))
    x = torch.from_numpy(normal(8, 3, 6, 6))
    found = student.learn([x], 0.0, frozen=True)["y"]
    exact = student.view([x])["y"]
    assert found.dtype == exact.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.1)
    found.square().mean().backward()
    assert (
        {p.grad.dtype for p in student.gm.parameters()}
        == {p.dtype for p in student.gm.parameters()}
        == {torch.float32}
    )
    kept = {}
    save = Training._save
    monkeypatch.setattr(
        Training, "_save", lambda self, phase: (kept.update(self.identity), save(self, phase))[1]
    )
    run("bf16", checkpoint_dir=tmp_path)
    checkpoint = load_checkpoint(tmp_path, kept)
    assert {t.dtype for name, t in checkpoint.tensors.items() if "weight" in name} == {torch.float32}
    assert kept["precision"] == "bf16"


def test_images_are_resized_in_float32():
    small, x = at(network(), *SMALL), torch.from_numpy(normal(4, 3, 6, 6))
    student = Student(small, network(), RecoveryOptions(precision="bf16"))
    given = []
    student.gm.register_forward_pre_hook(lambda module, inputs: given.extend(inputs))
    student.learn([x], 0.0, frozen=True)
    assert given[0].dtype == torch.float32
    torch.testing.assert_close(given[0], student.view.given([x])[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mobilenet", "se", "vit"])
def test_networks_train_in_bfloat16(name):
    program = models.captured(name)
    result = distill(
        program, program, data_for(program, 16), minutes=1, seed=0, options=steps(2, precision="bf16")
    )
    assert result.steps == 2 and result.notes == ()


def test_a_network_that_does_not_compute_in_bfloat16_learns_in_float32(monkeypatch):
    def fails(self, inputs, *, mixed=False):
        if mixed:
            raise RuntimeError("\"something\" not implemented for 'BFloat16'\nat a place")
        return call(self, inputs)

    from sartor.recovery.view import View

    call = View.__call__
    monkeypatch.setattr(View, "__call__", fails)
    result = run("bf16")
    assert result.notes == (
        "bfloat16 was not used, the network does not compute in it: \"something\" not implemented for 'BFloat16'",
    )
    monkeypatch.undo()
    assert result.program.to_bytes() == run("f32").program.to_bytes()


def test_other_precisions_are_refused():
    with pytest.raises(UsageError, match="'precision' is 'f16'; it must be one of f32, bf16"):
        RecoveryOptions(precision="f16")
