"""int8 against float32, measured interleaved, of networks as they are and with half of their channels removed.

`kept_speedup` is the speed-up by int8 of the pruned network over that of the unpruned one. A ratio is claimed only
where the processor multiplies bytes in one instruction (`claimed`). Every artifact is compared with its own program,
the QDQ program for int8, so that a fast wrong artifact does not count: a row with one has a `reason` and no time.

Speed-ups are of the fastest rounds: on a shared machine whatever else runs only adds, and adds more often to the slower
of two. The median over rounds of the ratio and its quartiles stand beside them.

Where int8 is not faster, or pruning takes more than a fifth of its speed-up, the row has an `explanation` from kernel
profiles: which share of the time each type of kernel takes in float32 and in int8, and what is left in float.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import record
from lowered_networks import Lowered, lower, random_program, written

TARGETS = ("onnxruntime", "openvino")
MODELS = ("resnet50", "mobilenet_v2")
GRID = 16  # both runtimes' kernels work on so many channels at once
FASTER, KEPT = 1.0, 0.8
"""Speed-ups below these are explained."""
_SHOWN = 8
_SMALLEST_SHARE = 0.005
_OF_INTEGERS = {
    # its integer kernels have names of their own
    "onnxruntime": re.compile(r"^(QLinear|QGemm|QAttention|DynamicQuantize|Quantize|Dequantize)|Integer"),
    # the end of its kernel's name says in what it computes
    "openvino": re.compile(r"_[iu]8$", re.IGNORECASE),
}
_MOVES = frozenset(
    "Transpose Reshape Flatten Squeeze Unsqueeze Concat Split Slice Gather Pad MaxPool Identity".split()
)
"""ONNX Runtime's kernels that take integers as they take floats; their names do not say which."""


def explain(target: str, forms: list[str], made: dict[str, Lowered], threads: int) -> dict[str, Any]:
    """Where the time of these forms goes, by their kernel profiles."""
    from sartor.backends.measure import profile
    from sartor.backends.protocol import TargetOptions

    explanation = {}
    for form in forms:
        precision = form.rpartition("/")[2]
        options = TargetOptions(threads=threads, precision=precision)
        kernels = profile(target, made[form].artifact, options)
        explanation[form] = dissected(kernels, target, quantized=precision == "int8")
    kinds = dict.fromkeys(form.rpartition("/")[0] for form in forms)
    explanation["summary"] = [
        sentence(kind, explanation[f"{kind}/f32"], explanation[f"{kind}/int8"]) for kind in kinds
    ]
    return explanation


def sentence(kind: str, f32: dict[str, Any], int8: dict[str, Any]) -> str:
    most, share = next(iter(int8["share_fraction_by_type"].items()), ("nothing", 0.0))
    return (
        f"{kind}: by themselves its kernels take {int8['kernels_s'] / f32['kernels_s']:.2f} of the time of float32; "
        f"{share:.0%} of it is {most} ({f32['share_fraction_by_type'].get(most, 0.0):.0%} in float32), "
        f"{int8['left_in_float_share_fraction']:.1%} is left in float"
    )


def dissected(kernels: list[Any], target: str, *, quantized: bool) -> dict[str, Any]:
    """Time of all kernels, its shares by type, and the kernels of a quantized network that are left in float."""
    total = sum(kernel.median_s for kernel in kernels)
    by_type: collections.Counter[str] = collections.Counter()
    left = []
    for kernel in sorted(kernels, key=lambda k: -k.median_s):
        share = kernel.median_s / total if total else 0.0
        by_type[kernel.op_type] += share
        said = kernel.implementation if target == "openvino" else kernel.op_type
        integers = _OF_INTEGERS[target].search(said) or (target == "onnxruntime" and said in _MOVES)
        if quantized and not integers:
            left.append({"name": kernel.name, "op_type": kernel.op_type, "share_fraction": round(share, 4)})
    found: dict[str, Any] = {
        "kernels_s": total,
        "share_fraction_by_type": {
            name: round(share, 4) for name, share in by_type.most_common() if share >= _SMALLEST_SHARE
        },
    }
    if quantized:
        found["left_in_float"] = left[:_SHOWN]
        found["left_in_float_kernels"] = len(left)
        found["left_in_float_share_fraction"] = round(sum(entry["share_fraction"] for entry in left), 4)
    return found


def to_explain(row: dict[str, Any]) -> list[str]:
    """The forms whose profiles say why int8 gains less than expected."""
    kinds = [kind for kind in ("unpruned", "pruned") if row[f"{kind}_speedup"] < FASTER]
    if row["kept_speedup"] < KEPT:
        kinds = ["unpruned", "pruned"]
    return [f"{kind}/{precision}" for kind in kinds for precision in ("f32", "int8")]


def measured(name: str, target: str, forms: dict[str, Any], seconds: float, threads: int) -> dict[str, Any]:
    """float32 and int8 of the network and of the pruned one, all interleaved."""
    from sartor.backends.measure import measure
    from sartor.backends.protocol import TargetOptions

    row: dict[str, Any] = {"model": name, "target": target}
    with tempfile.TemporaryDirectory(prefix="sartor-int8-") as folder:
        made: dict[str, Lowered] = {}
        for form, program in forms.items():
            at = Path(folder) / form.replace("/", "-")
            made[form] = lower(program, target, form.rpartition("/")[2], at, threads)
        row["rel_error"] = {form: one.found.max_rel_error for form, one in made.items()}
        wrong = [f"{form}: {one.found.summary()}" for form, one in made.items() if not one.found.passed]
        if wrong:
            return {**row, "reason": f"not equal: {wrong[0]}"}
        found = measure(
            target,
            [one.artifact for one in made.values()],
            TargetOptions(threads=threads),
            time_limit_s=seconds,
            target_half_width=0.01,
        )
        row["rounds"] = len(found.rounds)
        row["latency_s"] = {form: one.median for form, one in zip(made, found.latencies, strict=True)}
        row |= speedups({form: [r.seconds(i) for r in found.rounds] for i, form in enumerate(made)})
        wanted = to_explain(row)
        if wanted:
            row["explanation"] = explain(target, wanted, made, threads)
    return row


def speedups(by_round: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios of float32 to int8, from the seconds of every form in every round."""
    row: dict[str, Any] = {}
    for kind in ("unpruned", "pruned"):
        f32, int8 = (by_round[f"{kind}/{precision}"] for precision in ("f32", "int8"))
        ratios = np.divide(f32, int8)
        row[f"{kind}_speedup"] = float(np.min(f32) / np.min(int8))
        row[f"{kind}_speedup_median"] = float(np.median(ratios))
        row[f"{kind}_speedup_iqr"] = [float(q) for q in np.quantile(ratios, (0.25, 0.75))]
    row["kept_speedup"] = row["pruned_speedup"] / row["unpruned_speedup"]
    return row


def summarise(rows: list[dict[str, Any]], claimed: bool) -> dict[str, Any]:
    errors = [error for row in rows for error in row["rel_error"].values()]
    timed = [row for row in rows if "kept_speedup" in row]
    summary: dict[str, Any] = {
        "claimed": claimed,
        "worst_rel_error": None if None in errors else max(errors),
        "unverified": [f"{row['model']} on {row['target']}" for row in rows if "reason" in row],
        "explained": [f"{row['model']} on {row['target']}" for row in rows if "explanation" in row],
    }
    if claimed and timed:
        summary["least_speedup"] = min(row["unpruned_speedup"] for row in timed)
        summary["least_kept_speedup"] = min(row["kept_speedup"] for row in timed)
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--model", action="append", help="repeatable; resnet50 and mobilenet_v2 by default")
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable; both by default")
    parser.add_argument("--seconds", type=float, default=120.0, help="of measuring, per model and target")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    from sartor.backends import host

    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for name in options.model or MODELS:
        program = random_program(name)
        plain = written(program, "fold-batch-norm")
        small = written(program, f"prune-channels{{ratio=0.5,criterion=l1,grid={GRID}}},fold-batch-norm")
        forms = {
            "unpruned/f32": plain,
            "unpruned/int8": written(plain, "quantize"),
            "pruned/f32": small,
            "pruned/int8": written(small, "quantize"),
        }
        for target in options.target or TARGETS:
            rows.append(measured(name, target, forms, options.seconds, options.threads))
            print(json.dumps(rows[-1]), flush=True)
            summary = summarise(rows, host.integer_dot())
            record.write(
                options.json, "int8", rows, summary, threads=options.threads, seconds=options.seconds
            )
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
