"""Plants the bugs that pruning tools really have into a correctly pruned network, and shows what catches each.

Every bug is planted alone, behind the pass, in weights randomised as the oracle does it. It counts as
caught when the verifier rejects the program or the oracle's verdict is `failed`. The row without a bug is
the control: the same two checks must let it pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn import functional

from sartor import oracle
from sartor.errors import VerificationError
from sartor.ir.capture import capture
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.ir.verify import verify_program
from sartor.passes.masked import masked
from sartor.passes.prune import apply_plan
from sartor.passes.prune_channels import PruneChannels
from sartor.passes.rewriter import Rewriter

TOKENS = 9


class Everything(nn.Module):
    """One of each: bias, BatchNorm, depthwise, concat, residual block, attention with separate q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.left = nn.Conv2d(8, 6, 1)
        self.right = nn.Conv2d(8, 6, 1)
        self.mix = nn.Conv2d(12, 16, 3, 4)
        self.body1 = nn.Conv2d(16, 10, 3, padding=1)
        self.body2 = nn.Conv2d(10, 16, 3, padding=1)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.depthwise(functional.relu(self.norm(self.stem(x)))))
        x = self.mix(torch.cat([torch.tanh(self.left(x)), functional.relu(self.right(x))], 1))
        x = x + self.body2(functional.relu(self.body1(x)))
        x = x.flatten(2).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = (
            layer(x).reshape(n, t, 4, 4).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, c))
        return self.head(x.mean(1)).softmax(-1)


@dataclasses.dataclass
class Case:
    """A network before and after pruning, and its MASKED form; a bug changes `pruned` or `mask` in place."""

    original: Program
    pruned: Program
    mask: Program
    plan: Plan
    analysis: ChannelAnalysis

    def keep(self, group: str) -> np.ndarray:
        return np.asarray(self.plan.groups[group].keep)

    def write(self, name: str, array: np.ndarray, program: Program | None = None) -> None:
        """Set an initializer of the pruned program (or another one), whatever its shape was."""
        value = (program or self.pruned).initializers[name]
        assert value.const_value is not None
        old = value.const_value.numpy()
        value.const_value = ir.tensor(np.ascontiguousarray(array, dtype=old.dtype), name=name)
        value.shape = ir.Shape(array.shape)


def prepare(seed: int = 0, blocks: tuple[str, ...] = ()) -> Case:
    """`Everything`, half of every group removed at random, with the oracle's weights."""
    torch.manual_seed(0)
    program = capture(Everything().eval(), (torch.zeros(1, 3, 12, 12),))
    analysis = channel_groups(program)
    plan = PruneChannels(ratio=0.5, seed=seed).run(program).plan
    plan = dataclasses.replace(plan, blocks=blocks)
    original = oracle.randomise(program, analysis, seed)
    mask, _ = masked(original, plan, analysis)
    pruned = apply_plan(original, plan, analysis)
    return Case(*(oracle.before_softmax(p) for p in (original, pruned, mask)), plan, analysis)


# ---- the bugs --------------------------------------------------------------------------------


def bias_not_narrowed(case: Case) -> None:
    case.write("body1.bias", case.original.initializer_array("body1.bias"))


def bias_of_wrong_channels(case: Case) -> None:
    old = case.original.initializer_array("body1.bias")
    case.write("body1.bias", old[: len(case.keep("body1"))])


def bias_of_removed_block(case: Case) -> None:
    kept = case.original.initializer_array("body2.bias")[case.keep("mix")]
    case.write("mix.bias", case.pruned.initializer_array("mix.bias") + kept)


def bias_left_in_mask(case: Case) -> None:
    case.write("query.bias", case.original.initializer_array("query.bias"), case.mask)


def index_map_off_by_one(case: Case) -> None:
    old = case.original.initializer_array("body2.weight")
    shifted = (case.keep("body1") + 1) % old.shape[1]
    case.write("body2.weight", old[case.keep("mix")][:, shifted])


def concat_halves_swapped(case: Case) -> None:
    new, half = case.pruned.initializer_array("mix.weight"), len(case.keep("left"))
    case.write("mix.weight", np.concatenate([new[:, half:], new[:, :half]], 1))


def concat_offset_stale(case: Case) -> None:
    """The right half's indices start where the left half ended after pruning, not before."""
    old = case.original.initializer_array("mix.weight")[case.keep("mix")]
    left, right = case.keep("left"), case.keep("right")
    case.write("mix.weight", np.concatenate([old[:, left], old[:, len(left) + right]], 1))


def depthwise_left_unpruned(case: Case) -> None:
    for name in ("depthwise.weight", "depthwise.bias"):
        case.write(name, case.original.initializer_array(name))
    _depthwise_groups(case, 8)


def depthwise_groups_stale(case: Case) -> None:
    _depthwise_groups(case, 8)


def depthwise_of_wrong_channels(case: Case) -> None:
    old = case.original.initializer_array("depthwise.weight")
    case.write("depthwise.weight", old[: len(case.keep("stem"))])


def _depthwise_groups(case: Case, count: int) -> None:
    node = next(n for n in case.pruned.nodes() if any(v and v.name == "depthwise.weight" for v in n.inputs))
    Rewriter(case.pruned, "planted").set_attribute(node, "group", count)


def reshape_stale(case: Case) -> None:
    for name, array in _reshapes(case.original):
        case.write(name, array)


def reshape_heads_stale(case: Case) -> None:
    """Heads and their size change places: every shape still fits, and attention mixes other features."""
    for name, array in _reshapes(case.pruned):
        entries = array.tolist()
        if entries[1:2] == [TOKENS] and len(entries) == 4:
            entries[2:] = [1, entries[2] * entries[3]]
        elif entries[-1:] == [TOKENS] and len(entries) == 4:
            entries[1:3] = [1, entries[1] * entries[2]]
        elif len(entries) == 3 and entries[0] == -1:
            entries[2] = len(case.keep("query[4x4]")) * entries[2]
        case.write(name, np.asarray(entries))


def _reshapes(program: Program) -> list[tuple[str, np.ndarray]]:
    names = {n.inputs[1].name or "" for n in program.nodes() if n.op_type == "Reshape" and n.inputs[1]}
    return [(name, program.initializer_array(name)) for name in sorted(names)]


def batch_norm_slice_wrong(case: Case) -> None:
    old = case.original.initializer_array("norm.running_mean")
    case.write("norm.running_mean", old[: len(case.keep("stem"))])


def batch_norm_variance_reversed(case: Case) -> None:
    case.write("norm.running_var", case.pruned.initializer_array("norm.running_var")[::-1])


def kept_channel_perturbed(case: Case) -> None:
    new = case.pruned.initializer_array("left.weight").copy()
    new[0] *= 1.1
    case.write("left.weight", new)


def weight_not_finite(case: Case) -> None:
    new = case.pruned.initializer_array("body1.bias").copy()
    new[0] = np.nan
    case.write("body1.bias", new)


BUGS: dict[str, Callable[[Case], None]] = {
    "bias left behind: not narrowed": bias_not_narrowed,
    "bias left behind: of other channels": bias_of_wrong_channels,
    "bias left behind: of a removed block": bias_of_removed_block,
    "bias left behind: of a query, in MASKED": bias_left_in_mask,
    "index map off by one": index_map_off_by_one,
    "concat halves swapped": concat_halves_swapped,
    "concat offset from after pruning": concat_offset_stale,
    "depthwise group left unpruned": depthwise_left_unpruned,
    "depthwise group attribute stale": depthwise_groups_stale,
    "depthwise weights of other channels": depthwise_of_wrong_channels,
    "reshape constant stale": reshape_stale,
    "reshape constant stale, shapes fit": reshape_heads_stale,
    "BatchNorm slice of other channels": batch_norm_slice_wrong,
    "BatchNorm variance reversed": batch_norm_variance_reversed,
    "kept channel perturbed by 10 %": kept_channel_perturbed,
    "weight not finite": weight_not_finite,
}
"""Planted bugs by name."""
BLOCKS = {"bias left behind: of a removed block": ("node_add",)}
"""Blocks that a bug's plan removes beside the channels."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What caught a bug: `verifier`, `oracle` or `nothing`; the oracle's error, infinite without one."""

    by: str
    error: float
    message: str


def look(case: Case, seed: int = 0) -> Found:
    """Verify, then compare."""
    try:
        verify_program(case.pruned)
    except VerificationError as error:
        return Found("verifier", math.inf, str(error))
    result = oracle.compare(
        case.original, case.pruned, case.mask, case.plan, analysis=case.analysis, seed=seed
    )
    by = "oracle" if result.verdict == "failed" else "nothing"
    return Found(by, result.max_rel_error, f"verdict {result.verdict}")


def plant(name: str | None, seed: int = 0) -> Found:
    """Plant the bug called `name` (None: no bug) and look."""
    case = prepare(seed, BLOCKS.get(name or "", ()))
    if name is not None:
        BUGS[name](case)
        case.pruned.invalidate()
        case.mask.invalidate()
    return look(case, seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import record

    rows: list[dict] = []
    for name in (None, *BUGS):
        found = plant(name, options.seed)
        row = {"bug": name or "none (control)", "caught_by": found.by, "message": found.message}
        if math.isfinite(found.error):
            row["max_rel_error"] = found.error
        rows.append(row)
        error = f"{found.error:.2e}" if math.isfinite(found.error) else found.message[:60]
        print(f"{row['bug']:42s} {found.by:10s} {error}", flush=True)
    planted = rows[1:]
    summary = {
        "planted": len(planted),
        "caught": sum(row["caught_by"] != "nothing" for row in planted),
        "control_passed": rows[0]["message"] == "verdict passed",
    }
    record.write(
        options.json, "planted_bugs", rows, summary, network="benchmarks/planted_bugs.py:Everything",
        seed=options.seed, tolerance=oracle.TOLERANCE_F64,
    )  # fmt: skip
    print(json.dumps(summary, indent=1))
    return 0 if summary["caught"] == summary["planted"] and summary["control_passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
