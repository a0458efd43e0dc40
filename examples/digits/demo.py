"""What `make demo` runs: train on the digits once, fit to half the measured latency, show the result."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
MODEL = FOLDER / "model.onnx"
STAMP = FOLDER / ".trained"


def sources() -> str:
    """Hash of everything that decides what is trained."""
    own = (FOLDER / name for name in ("data.py", "model.py", "train.py"))
    shared = (FOLDER.parent / name for name in ("residual.py", "scans.py", "training.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in (*own, *shared))).hexdigest()


def shown(path: Path) -> str:
    return os.path.relpath(path)


def run(*command: str) -> int:
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--budget", default="latency=0.5x")
    parser.add_argument("--minutes", type=float, default=1.0, help="of recovery")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "digits")
    options = parser.parse_args()

    start = time.perf_counter()
    if MODEL.exists() and STAMP.exists() and STAMP.read_text() == sources():
        print(f"{shown(MODEL)} is trained already", flush=True)
    else:
        print("training a residual network on 1,100 scanned digits, about a minute", flush=True)
        if code := run("examples/digits/train.py"):
            return code
        STAMP.write_text(sources())
    command = [
        *("fit", "examples/digits/model.onnx", "--target", options.target, "--budget", options.budget),
        *("--data", "examples/digits/data.py:digits", "--recovery", f"minutes={options.minutes:g}"),
        *("--max-drop", "1", "--out", os.path.relpath(options.out, ROOT)),
    ]
    print(f"\n$ sartor {' '.join(command)}", flush=True)
    code = run("-m", "sartor", *command)
    print(f"\n{time.perf_counter() - start:.0f} s in all; exit code {code}")
    if (options.out / "report.html").exists():
        print(f"report: {shown(options.out / 'report.html')}")
    return code


if __name__ == "__main__":
    sys.exit(main())
