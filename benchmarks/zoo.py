"""Every architecture: capture, channel groups, a random 50 % plan and the oracle on timm's and torchvision's models.

Each model runs in a process of its own under a time limit. `seconds` is what Sartor takes: capture, analysis,
plan, apply and the oracle in float64 on randomised weights; building the model is its library's time. A model
is *prunable* when the plan removes at least 25 % of its MACs, and *exact* when the oracle says `passed`.

`--compare torch-pruning` runs Torch-Pruning beside it on the same models under the same limit. The JSON document is
written after every model; `--resume` takes from an earlier one what it has and runs the rest.

Needs timm and torchvision (`pip install 'sartor[zoo]'`), and torch-pruning to compare (`'sartor[bench]'`).
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record
import zoo_models
import zoo_torch_pruning

PRUNABLE = 0.25
RESULT = "RESULT "


def examine(name: str, threads: int) -> dict[str, Any]:
    """One model, in this process."""
    import torch

    torch.set_num_threads(threads)
    row: dict[str, Any] = {"model": name, "captured": False}
    start = time.perf_counter()
    try:
        module, examples = zoo_models.build(name)
    except Exception as error:
        return {**row, "reason": f"the library cannot build it: {type(error).__name__}: {str(error)[:200]}"}
    row["build_s"] = round(time.perf_counter() - start, 3)
    start = time.perf_counter()
    try:
        for stage, fields in _stages(module, examples):
            row |= fields
            row[f"{stage}_s"] = round(time.perf_counter() - start, 3)
            start = time.perf_counter()
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {str(error)[:300]}"
    row["seconds"] = round(sum(v for k, v in row.items() if k.endswith("_s") and k != "build_s"), 3)
    row["peak_rss_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    return row


def _stages(module: Any, examples: tuple[Any, ...]) -> Any:
    import sartor
    from sartor import oracle
    from sartor.cost_models.static import static_cost
    from sartor.ir.channels import channel_groups
    from sartor.ir.workload import build_workload

    program = sartor.capture(module, examples)
    yield (
        "capture",
        {"captured": True, "nodes": len(list(program.nodes())), "batch": program.batch.reason or "free"},
    )
    analysis = channel_groups(program)
    blocked = collections.Counter(b.reason for b in analysis.blocked)
    yield "analysis", {"groups": len(analysis.groups), "blocked": dict(blocked.most_common())}
    workload = build_workload(program, analysis.extents)
    before = static_cost(program).macs
    none = workload.evaluate({group.name: 0.0 for group in analysis.groups}).macs
    pipeline = sartor.Pipeline.parse("prune-channels{ratio=0.5,criterion=random,seed=1}", instruments=())
    result = pipeline.run(program)
    plan = result.results[0].result.plan
    removed = 1.0 - static_cost(result.program).macs / before
    yield (
        "prune",
        {"macs": before, "macs_in_groups": round(float(1.0 - none / before), 4), "macs_removed": removed},
    )
    verdict = oracle.check(program, plan, analysis=analysis)
    yield (
        "oracle",
        {
            "verdict": verdict.verdict,
            "max_rel_error": verdict.max_rel_error,
            "insensitive": list(verdict.insensitive),
        },
    )


def spawn(command: list[str], limit_s: float, name: str) -> dict[str, Any]:
    """Run one model in a process of its own; a hang or a crash becomes a row with the reason."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit_s, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"model": name, "captured": False, "reason": f"more than {limit_s:.0f} s", "seconds": limit_s}
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not lines:
        last = (done.stderr.strip().splitlines() or [""])[-1][:200]
        return {
            "model": name,
            "captured": False,
            "reason": f"the process ended with {done.returncode}: {last}",
        }
    row: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    captured = [r for r in rows if r["captured"]]
    removed = [r["macs_removed"] for r in captured if "macs_removed" in r]
    seconds = [r["seconds"] for r in captured]
    return {
        "total": len(rows),
        "captured": len(captured),
        "prunable": sum(r >= PRUNABLE for r in removed),
        "exact": sum(r.get("verdict") == "passed" for r in captured),
        "inconclusive": sum(r.get("verdict") == "inconclusive" for r in captured),
        "median_macs_removed": round(statistics.median(removed), 4) if removed else None,
        "median_s": round(statistics.median(seconds), 2) if seconds else None,
        "worst_s": round(max(seconds), 2) if seconds else None,
    }


def show(row: dict[str, Any]) -> str:
    if not row["captured"]:
        return f"{row['model']:<48} not captured: {row['reason'][:110]}"
    parts = [f"{row['model']:<48} {row.get('groups', 0):>4} groups"]
    if "macs_removed" in row:
        parts.append(f"{row['macs_in_groups']:>6.1%} of MACs in groups, {row['macs_removed']:>6.1%} removed")
    if "verdict" in row:
        parts.append(f"{row['verdict']}, error {row['max_rel_error']:.1e}")
    parts.append(f"{row['seconds']:.1f} s")
    if "reason" in row:
        parts.append(row["reason"][:110])
    return ", ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--models", help="comma-separated names, with or without the library in front")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds per model (300)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compare", choices=["torch-pruning"], help="run this beside it on the same models")
    parser.add_argument("--resume", metavar="FILE", help="a document of an earlier run, whose rows are kept")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        tool = zoo_torch_pruning if options.compare else sys.modules[__name__]
        print(RESULT + json.dumps(tool.examine(options.worker, options.threads)))
        return 0
    if options.compare and importlib.util.find_spec("torch_pruning") is None:
        parser.error("torch-pruning is not installed; pip install 'sartor[bench]'")
    names = zoo_models.NAMES
    if options.models:
        wanted = options.models.split(",")
        names = [n for n in names if n in wanted or n.partition("/")[2] in wanted]
        if unknown := [w for w in wanted if not any(w in (n, n.partition("/")[2]) for n in names)]:
            parser.error(f"unknown models: {', '.join(unknown)}")
    earlier = earlier_rows(options.resume) if options.resume else {}
    rows: list[dict[str, Any]] = []
    for name in names:
        command = [sys.executable, __file__, "--worker", name, "--threads", str(options.threads)]
        rows.append(earlier.get(name) or spawn(command, options.limit, name))
        print(show(rows[-1]), flush=True)
        if options.compare:
            if "torch_pruning" not in rows[-1]:
                rows[-1]["torch_pruning"] = spawn(
                    [*command, "--compare", options.compare], options.limit, name
                )
            print(f"{'':>8}Torch-Pruning: {zoo_torch_pruning.show(rows[-1]['torch_pruning'])}", flush=True)
        summary = summarise(rows)
        if options.compare:
            summary |= zoo_torch_pruning.summarise([row["torch_pruning"] for row in rows], PRUNABLE)
        record.write(options.json, "zoo", rows, summary, threads=options.threads, limit_s=options.limit)
    report(rows)
    if options.compare:
        zoo_torch_pruning.report([row["torch_pruning"] for row in rows])
    print()
    for key, value in summary.items():
        print(f"{key:>34}  {value}")
    return 0


def earlier_rows(path: str) -> dict[str, dict[str, Any]]:
    """Rows by model of an earlier document."""
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    return {row["model"]: row for row in document["rows"]}


def report(rows: list[dict[str, Any]]) -> None:
    """Print the reason histograms."""
    print("\nwhy models were not captured")
    for reason, count in collections.Counter(
        r["reason"][:100] for r in rows if not r["captured"]
    ).most_common():
        print(f"{count:>5}  {reason}")
    print("\nwhy axes are blocked, over all models")
    histogram: collections.Counter[str] = collections.Counter()
    for row in rows:
        histogram.update({k: v for k, v in row.get("blocked", {}).items() if not k.startswith("reaches the")})
    for reason, count in histogram.most_common(12):
        print(f"{count:>5}  {reason}")


if __name__ == "__main__":
    raise SystemExit(main())
