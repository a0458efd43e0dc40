"""Plans priced per second, in batches of 4,096 on ResNet-50 and MobileNetV2, beside Torch-Pruning's prune-and-count.

A plan is drawn at random: kept units of every channel group, on the grid of 8, and a few removed blocks. Timed is
all from `Plan` objects to latencies, the conversion to arrays included; `from_arrays` is the same without it, and
`ladder` the evaluation that the tables replace. Torch-Pruning has no cost model of latency: what its users do for
each candidate is to copy the module, prune it and count operations, and that is timed.

Without `--profile`, kernel times are those of the published description of a desktop CPU: `ladder` and the time to
make the tables (`bind_s`) then say nothing about measured profiles, whose samples are hundreds a kernel. Looking
tables up costs the same either way.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import record

GOAL = 50_000
BATCH = 4096


def described_profile(workload: Any, device: str = "i7-9750h") -> Any:
    """A profile of the workload's own kernels at a few widths, by the roofline of a published device."""
    from sartor.cost_models.profile import DeviceProfile, Sample
    from sartor.cost_models.roofline import Roofline
    from sartor.cost_models.signatures import signature_of

    roofline = Roofline(device, "f32")
    samples = {}
    for kernel in workload.kernels:
        signature = signature_of(kernel)
        if signature is None:
            continue
        axes = [
            [v.full, max(1.0, v.full // 4)] if v.groups and v.full > 1 else [v.full]
            for v in signature.variables
        ]
        for at in itertools.product(*axes):
            seconds = float(roofline.predict(signature, [np.asarray(s) for s in at])[0])
            samples[signature.key, at] = Sample(signature.spec, at, kernel.family, seconds)
    return DeviceProfile(
        {"name": device, "channel_grid": {"Conv": 8, "Gemm": 8, "MatMul": 8}},
        {"caches": {"l3": 12e6}},
        {},
        5e-6,
        tuple(samples.values()),
    )


def random_plans(analysis: Any, blocks: Any, count: int, seed: int) -> list[Any]:
    from sartor.ir.plan import GroupPlan, Plan

    rng = np.random.default_rng(seed)
    plans = []
    known: dict[tuple[int, int], GroupPlan] = {}
    for _ in range(count):
        groups = {}
        for group in analysis.groups:
            kept = int(min(group.size, max(1, round(rng.uniform(0.1, 1.0) * group.size / 8) * 8)))
            if (group.size, kept) not in known:
                known[group.size, kept] = GroupPlan(group.size, tuple(range(kept)))
            groups[group.name] = known[group.size, kept]
        removed = tuple(b.name for b in blocks if rng.random() < 0.05)
        plans.append(Plan("0" * 64, groups, removed))
    return plans


def fastest(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of several runs: everything else on the machine can only add."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def ours(name: str, profile_path: str | None, rounds: int) -> dict[str, Any]:
    import models

    from sartor.cost_models.ladder import Ladder
    from sartor.cost_models.pricer import Pricer
    from sartor.cost_models.profile import DeviceProfile
    from sartor.ir.blocks import residual_blocks
    from sartor.ir.capture import capture
    from sartor.ir.channels import channel_groups
    from sartor.ir.workload import build_workload

    program = capture(*getattr(models, name)())
    analysis = channel_groups(program)
    blocks = [b for b in residual_blocks(program) if b.removable]
    workload = build_workload(program, analysis.extents, blocks)
    profile = DeviceProfile.load(profile_path) if profile_path else described_profile(workload)
    start = time.perf_counter()
    ladder = Ladder(profile)
    pricer = Pricer(ladder, workload, {g.name: g.size for g in analysis.groups})
    bind_s = time.perf_counter() - start
    plans = random_plans(analysis, blocks, BATCH, seed=1)
    batch = pricer.batch(plans)
    fractions = {g: batch.kept[:, i] / pricer.sizes[g] for i, g in enumerate(pricer.groups)}
    removed = {b: batch.removed[:, i] for i, b in enumerate(workload.blocks)}
    fast, slow = pricer.estimate_batch(plans), ladder.estimate_batch(workload, fractions, removed)
    difference = float(np.abs(fast / slow - 1.0).max())
    if difference > 1e-9:
        raise SystemExit(f"{name}: the tables differ from the ladder by {difference:.2e}; nothing was timed.")
    seconds = {
        "plans_per_s": fastest(lambda: pricer.estimate_batch(plans), rounds),
        "from_arrays_plans_per_s": fastest(lambda: pricer.estimate_batch(batch), rounds),
        "ladder_plans_per_s": fastest(lambda: ladder.estimate_batch(workload, fractions, removed), rounds),
    }
    return {
        "model": name,
        "groups": len(analysis.groups),
        "blocks": len(blocks),
        "kernels": len(workload.kernels),
        "items": len(ladder.items(workload)),
        "bind_s": bind_s,
        "largest_difference": difference,
        **{key: BATCH / value for key, value in seconds.items()},
    }


def torch_pruning(name: str, plans: int) -> dict[str, float]:
    """Plans per second of copy, prune and count; a plan is one ratio, as its high-level pruner takes it."""
    import models
    import torch
    import torch_pruning as tp

    torch.set_num_threads(1)
    module, inputs = getattr(models, name)()
    seconds = []
    for number in range(plans):
        start = time.perf_counter()
        candidate = copy.deepcopy(module)
        pruner = tp.pruner.MagnitudePruner(
            candidate,
            inputs,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.1 + 0.8 * number / max(plans - 1, 1),
            ignored_layers=[candidate.classifier],
            round_to=8,
        )
        pruner.step()
        tp.utils.count_ops_and_params(candidate, inputs)
        seconds.append(time.perf_counter() - start)
    return {"torch_pruning_plans_per_s": 1.0 / statistics.median(seconds)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--profile", metavar="FILE", help="a device profile instead of a described device")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch-pruning-plans", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for name in ("resnet50", "mobilenet_v2"):
        row = ours(name, options.profile, options.rounds)
        if options.torch_pruning_plans:
            row |= torch_pruning(name, options.torch_pruning_plans)
        rows.append(row)
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
            flush=True,
        )
    summary: dict[str, Any] = {"goal_plans_per_s": GOAL}
    for key in ("plans_per_s", "from_arrays_plans_per_s", "ladder_plans_per_s", "torch_pruning_plans_per_s"):
        values = [row[key] for row in rows if key in row]
        if values:
            summary[key] = min(values)  # of the slower network
            summary |= {f"{key}.{row['model']}": row[key] for row in rows}
    record.write(
        options.json, "plan_throughput", rows, summary, batch=BATCH, rounds=options.rounds,
        statistic="fastest round of the slower network",
        profile=os.path.basename(options.profile or "described: i7-9750h"),
    )  # fmt: skip
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
