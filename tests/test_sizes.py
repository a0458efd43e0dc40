"""Input size and batch as variables of a workload, against workloads of programs made at that size and batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cost_networks import residual, residual_blocks
from fusion_networks import NETWORKS, Builder

import sartor
from sartor.errors import ModelError, PlanError
from sartor.ir.channels import channel_groups
from sartor.ir.fusion_rules import FusionRules
from sartor.ir.program import Batch
from sartor.ir.workload import build_workload

METRICS = ("macs", "parameters", "weight_bytes", "bytes_read", "bytes_written")
GROUPS = {"a": 16, "b": 24, "e": 40, "m0": 16, "m1": 24, "m2": 24}
RULES = FusionRules.of(
    {
        "Conv": ("BatchNormalization", "BlockedAdd", "Relu", "HardSwish"),
        "MatMul": ("Bias",),
        "Sigmoid": ("Silu",),
    }
)


def at_sizes(name, batch):
    """The network's two sizes and how it is made at one of them."""
    sizes = (49, 64) if name == "transformer" else (32, 45)
    axis = "tokens" if name == "transformer" else "side"
    shape = (lambda n: (batch, n, 128)) if name == "transformer" else (lambda n: (batch, 3, n, n))
    return [{"x": shape(n)} for n in sizes], lambda index, samples: NETWORKS[name](
        **{axis: sizes[index], "batch": samples}
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_a_population_of_sizes_and_batches(name):
    sizes, made = at_sizes(name, 2)
    workload = build_workload(made(0, 1), rules=RULES, sizes=sizes)
    size, batch = np.array([0, 1, 0, 1, 1]), np.array([1, 1, 3, 7, 2])
    priced = workload.evaluate(size=size, batch=batch)
    peaks = workload.peak_activation_bytes(size=size, batch=batch)
    for index, (one, samples) in enumerate(zip(size, batch, strict=True)):
        real = build_workload(made(one, samples), rules=RULES)
        for metric in METRICS:
            assert getattr(priced, metric)[index] == float(getattr(real.evaluate(), metric)), metric
        assert peaks[index] == real.liveness.peak().bytes
    assert len({*priced.macs}) == 5
    assert workload.evaluate(size=1).macs == priced.macs[4]  # the batch of the declared size


def test_sizes_mix_with_pruning_and_removed_blocks():
    net = residual(shape=(1, 3, 16, 16))
    program = net.program(("logits",))
    program.batch = Batch(symbolic=True, inputs=("x",))
    declared = [{"x": (1, 3, 16, 16)}, {"x": (1, 3, 21, 33)}]
    workload = build_workload(program, net.extents, residual_blocks(), sizes=declared)
    rng = np.random.default_rng(1)
    widths = [{g: int(rng.integers(1, n + 1)) for g, n in GROUPS.items()} for _ in range(6)]
    size, batch = rng.integers(0, 2, 6), rng.integers(1, 9, 6)
    gone = rng.random((2, 6)) < 0.5
    fractions = {g: np.array([w[g] / n for w in widths]) for g, n in GROUPS.items()}
    removed = {"block0": gone[0], "block2": gone[1]}
    priced = workload.evaluate(fractions, removed, size=size, batch=batch)
    peaks = workload.peak_activation_bytes(fractions, removed, size=size, batch=batch)
    for index, kept in enumerate(widths):
        skipped = tuple(b for b, flags in zip((0, 2), gone, strict=True) if flags[index])
        shape = (int(batch[index]), *declared[size[index]]["x"][1:])
        real = build_workload(residual(kept, skipped, shape).program(("logits",)))
        for metric in METRICS:
            assert getattr(priced, metric)[index] == float(getattr(real.evaluate(), metric)), metric
        assert peaks[index] == real.liveness.peak().bytes
        fixed = workload.at(int(size[index]), int(batch[index]))
        plan = {g: f[index] for g, f in fractions.items()}
        flags = {name: bool(f[index]) for name, f in removed.items()}
        assert fixed.evaluate(plan, flags).macs == priced.macs[index]
        assert fixed.peak_activation_bytes(plan, flags) == peaks[index]


def test_a_workload_at_a_size_is_that_of_the_program_there():
    sizes, made = at_sizes("squeezed", 1)
    fixed = build_workload(made(0, 1), rules=RULES, sizes=sizes).at(1, 4)
    real = build_workload(made(1, 4), rules=RULES)
    for ours, theirs in zip(fixed.kernels, real.kernels, strict=True):
        assert [[e.full for e in o.dims] for o in ours.inputs if o] == [
            [e.full for e in o.dims] for o in theirs.inputs if o
        ]
        assert ours.macs.full == theirs.macs.full and ours.bytes_read.full == theirs.bytes_read.full
    with pytest.raises(PlanError, match="declare sizes"):
        fixed.evaluate(size=0)


@pytest.mark.slow  # two captures
def test_a_captured_model():
    import torch

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.deep = torch.nn.Conv2d(8, 16, 3, groups=4)
            self.head = torch.nn.Linear(16, 5)

        def forward(self, x):
            x = torch.nn.functional.max_pool2d(torch.relu(self.stem(x)), 2)
            x = torch.nn.functional.silu(self.deep(x))
            return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))

    torch.manual_seed(0)
    module = Small().eval()
    program = sartor.capture(module, (torch.randn(1, 3, 32, 32),))
    declared = [{"x": (1, 3, 32, 32)}, {"x": (1, 3, 50, 41)}]
    workload = build_workload(program, channel_groups(program).extents, sizes=declared)
    priced = workload.evaluate(size=np.array([0, 1]), batch=np.array([1, 5]))
    other = sartor.capture(module, (torch.randn(5, 3, 50, 41),))
    samples = other.input_shapes["x"][0]
    at_five = float(build_workload(other).evaluate().macs) * 5 / samples
    assert priced.macs.tolist() == [float(build_workload(program).evaluate().macs), at_five]


def test_a_size_at_which_the_model_is_not_valid_is_refused():
    b = Builder((1, 3, 8, 8))
    b.op("Flatten", b.conv("x", 3, 4, name="c"), name="flat")
    b.op("Gemm", "flat", b.weight("w", 256, 10), name="fc")
    program = b.program()
    build_workload(program, sizes=[{"x": (1, 3, 8, 8)}, {"x": (1, 3, 4, 16)}])
    with pytest.raises(ModelError, match=r"not valid at input size 'x' \[1, 3, 9, 8\].*256 and 288"):
        build_workload(program, sizes=[{"x": (1, 3, 8, 8)}, {"x": (1, 3, 9, 8)}])
    b = Builder((1, 16, 12))
    b.constant("table", np.zeros((1, 16, 12), np.float32))
    b.op("Add", "x", "table", name="position")
    with pytest.raises(ModelError, match=r"not valid at input size 'x' \[1, 9, 12\]"):
        build_workload(b.program(), sizes=[{"x": (1, 9, 12)}])
    b = Builder((1, 4, 6))
    b.constant("target", np.array([0, 24]))
    b.op("Reshape", "x", "target", name="flat")
    with pytest.raises(ModelError, match=r"'flat' \(Reshape\) makes \[1, 24\] of \[1, 4, 7\]"):
        build_workload(b.program(), sizes=[{"x": (1, 4, 7)}])


def test_what_a_workload_does_not_have_is_refused():
    sizes, made = at_sizes("residual", 1)
    program = made(0, 1)
    workload = build_workload(program, sizes=sizes)
    for bad in (2, -1, 0.5):
        with pytest.raises(PlanError, match="is not declared; there are 2"):
            workload.evaluate(size=np.array([0, bad]))
    for bad in (0, 1.5):
        with pytest.raises(PlanError, match="whole number, at least 1"):
            workload.evaluate(batch=bad)
    with pytest.raises(PlanError, match=r"\['y'\], which are no inputs"):
        build_workload(program, sizes=[{"y": (1, 3, 32, 32)}])
    with pytest.raises(PlanError, match="cannot have size"):
        build_workload(program, sizes=[{"x": (3, 32, 32)}])
    with pytest.raises(PlanError, match="at least one"):
        build_workload(program, sizes=[])
    program.batch = dataclasses.replace(program.batch, symbolic=False, reason="node 'r' fixes it")
    fixed = build_workload(program, sizes=sizes)
    assert fixed.evaluate(size=1, batch=1).macs == workload.evaluate(size=1).macs
    with pytest.raises(PlanError, match="batch of this program is fixed: node 'r' fixes it"):
        fixed.evaluate(size=1, batch=2)
