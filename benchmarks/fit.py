"""Does the main job meet its budget? `sartor fit` to a share of the latency, on pairs of model and target.

Needs the trained example (`make demo` leaves it behind) and trains the MobileNetV2 of
`mobilenet_digits.py` once, into the folder given with `--work`. A ResNet-18 with random weights is only cut.

Told of every case: the measured ratio with its 95 % interval, how far it is below the budget (a fit lands if that is
3 % at most, and the interval not above it), and in how many iterations how many networks were measured on the way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import record

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
NEAR = 0.03


@dataclasses.dataclass(frozen=True)
class Case:
    """One fit; without data, weights decide what goes, and nothing is trained."""

    model: Path
    target: str
    data: str | None = None


def cases(work: Path) -> dict[str, Case]:
    """By name."""
    digits = ROOT / "examples/digits"
    resnet, resnet_data = digits / "model.onnx", f"{digits}/data.py:digits"
    mobile, mobile_data = work / "mobilenet.onnx", f"{FOLDER}/mobilenet_digits.py:digits_64"
    large = work / "resnet18.onnx"
    return {
        "digits-onnxruntime": Case(resnet, "onnxruntime", resnet_data),
        "digits-openvino": Case(resnet, "openvino", resnet_data),
        "mobilenet-onnxruntime": Case(mobile, "onnxruntime", mobile_data),
        "resnet18-onnxruntime": Case(large, "onnxruntime"),
        "resnet18-openvino": Case(large, "openvino"),
    }


def make(model: Path) -> None:
    """The models of `--work` that are not there yet."""
    if model.exists():
        return
    if model.name == "mobilenet.onnx":
        subprocess.run([sys.executable, str(FOLDER / "mobilenet_digits.py"), str(model)], check=True)
    elif model.name == "resnet18.onnx":
        import torch
        import zoo_models

        from sartor.ir.capture import capture

        torch.manual_seed(0)
        network, _ = zoo_models.build("torchvision/resnet18")
        capture(network, torch.zeros(1, 3, 224, 224), name="resnet18").save(model)
    else:
        raise SystemExit(f"'{os.path.relpath(model)}' is missing; run 'make demo' first.")


def landed(report: dict, budget: str) -> dict[str, object]:
    """What a report says of one latency budget, as a share."""
    wanted = float(budget.partition("latency=")[2].split(",")[0].rstrip("x"))
    ratio, (low, high) = report["ratio"]["latency"], report["ratio"]["latency_ci95"]
    return {
        "ratio": ratio,
        "ratio_ci95": [low, high],
        "below_budget": 1.0 - ratio / wanted,
        "landed": high <= wanted and ratio >= (1.0 - NEAR) * wanted,
        "measured": len(report["history"]),
        "iterations": max(entry["iteration"] for entry in report["history"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench")
    parser.add_argument("--minutes", type=float, default=1.0, help="of recovery")
    parser.add_argument("--budget", action="append", help="latency=0.6x; several are several fits")
    parser.add_argument("--only", action="append", help="names of cases; all by default")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="TARGET=FILE",
        help="device profiles to predict with",
    )
    options = parser.parse_args()

    options.work.mkdir(parents=True, exist_ok=True)
    profiles = dict(entry.split("=", 1) for entry in options.profile)
    budgets = options.budget or ["latency=0.5x"]
    rows = []
    for name, case in cases(options.work).items():
        if options.only and name not in options.only:
            continue
        make(case.model)
        for budget in budgets:
            command = [*(sys.executable, "-m", "sartor", "fit", str(case.model), "--target", case.target)]
            if case.data is None:
                command += ["--recovery", "none"]
            else:
                command += [
                    "--data",
                    case.data,
                    "--recovery",
                    f"minutes={options.minutes:g}",
                    "--max-drop",
                    "1",
                ]
            if case.target in profiles:
                command += ["--profile", profiles[case.target]]
            folder = options.work / f"{name}-{budget.replace('=', '-')}"
            command += ["--budget", budget, "--out", str(folder), "--json"]
            start = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
            row = {"case": name, "budget": budget, "exit_code": done.returncode}
            row |= {"profile": case.target in profiles, "wall_s": time.perf_counter() - start}
            if done.returncode in (0, 3, 4):
                report = json.loads(done.stdout)
                baseline_s = report["baseline"]["latency_s"]["median"]
                row |= {
                    "status": report["status"],
                    **landed(report, budget),
                    "predicted_ratio": report["predicted"]["latency_s"] / baseline_s,
                    "score_before": report["baseline"].get("score"),
                    "score_after": report["result"].get("score"),
                    "oracle": report["oracle"]["verdict"],
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    summary = {
        "met": sum(row["exit_code"] == 0 for row in rows),
        "landed": sum(bool(row.get("landed")) for row in rows),
        "most_measured": max((row.get("measured", 0) for row in rows), default=0),
        "most_iterations": max((row.get("iterations", 0) for row in rows), default=0),
        "cases": len(rows),
        "wall_s": sum(row["wall_s"] for row in rows),
    }
    record.write(options.json, "fit", rows, summary, budgets=budgets, recovery_minutes=options.minutes)
    print(json.dumps(summary, indent=1))
    return 0 if summary["met"] == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
