"""Does the main job meet its budget? `sartor fit` to half the latency, on three pairs of model and target.

Needs the trained example (`make demo` leaves it behind) and trains the MobileNetV2 of
`mobilenet_digits.py` once, into the folder given with `--work`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import record

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent


def cases(work: Path) -> dict[str, tuple[Path, str, str]]:
    """Name → (model, target, data)."""
    digits = ROOT / "examples/digits"
    resnet, resnet_data = digits / "model.onnx", f"{digits}/data.py:digits"
    mobile, mobile_data = work / "mobilenet.onnx", f"{FOLDER}/mobilenet_digits.py:digits_64"
    return {
        "digits-onnxruntime": (resnet, "onnxruntime", resnet_data),
        "digits-openvino": (resnet, "openvino", resnet_data),
        "mobilenet-onnxruntime": (mobile, "onnxruntime", mobile_data),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench")
    parser.add_argument("--minutes", type=float, default=1.0, help="of recovery")
    parser.add_argument("--budget", default="latency=0.5x")
    parser.add_argument("--only", action="append", help="names of cases; all by default")
    options = parser.parse_args()

    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (model, target, data) in cases(options.work).items():
        if options.only and name not in options.only:
            continue
        if not model.exists() and model.parent == options.work:
            subprocess.run([sys.executable, str(FOLDER / "mobilenet_digits.py"), str(model)], check=True)
        if not model.exists():
            raise SystemExit(f"'{os.path.relpath(model)}' is missing; run 'make demo' first.")
        command = [
            *(sys.executable, "-m", "sartor", "fit", str(model), "--target", target, "--data", data),
            *("--budget", options.budget, "--recovery", f"minutes={options.minutes:g}", "--max-drop", "1"),
            *("--out", str(options.work / name), "--json"),
        ]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
        row = {"case": name, "exit_code": done.returncode, "wall_s": time.perf_counter() - start}
        if done.returncode in (0, 3, 4):
            report = json.loads(done.stdout)
            baseline_s = report["baseline"]["latency_s"]["median"]
            row |= {
                "status": report["status"],
                "ratio": report["ratio"]["latency"],
                "ratio_ci95": report["ratio"]["latency_ci95"],
                "predicted_ratio": report["predicted"]["latency_s"] / baseline_s,
                "score_before": report["baseline"]["score"],
                "score_after": report["result"]["score"],
                "oracle": report["oracle"]["verdict"],
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    summary = {
        "met": sum(row["exit_code"] == 0 for row in rows),
        "cases": len(rows),
        "wall_s": sum(row["wall_s"] for row in rows),
    }
    record.write(options.json, "fit", rows, summary, budget=options.budget, recovery_minutes=options.minutes)
    print(json.dumps(summary, indent=1))
    return 0 if summary["met"] == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
