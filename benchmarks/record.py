"""The document of every benchmark, schema `sartor.bench/1`."""

from __future__ import annotations

import json
import os
import subprocess
from importlib import metadata
from typing import Any

PACKAGES = (
    "sartor",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "ai-edge-litert",
    "litert-torch",
    "tensorrt-rtx",
    "torch-pruning",
)


def commit() -> str | None:
    """The version of the sources, with `-dirty` if they were changed; None outside of a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def conditions(**more: Any) -> dict[str, Any]:
    from sartor.backends import host

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    load = [round(value, 2) for value in os.getloadavg()]
    return {
        **host.conditions(),
        "commit": commit(),
        "load": load,
        "versions": versions,
        **more,
    }


def write(
    path: str | None, name: str, rows: list[dict], summary: dict[str, Any], **more: Any
) -> dict[str, Any]:
    document = {
        "schema": "sartor.bench/1",
        "name": name,
        "conditions": conditions(**more),
        "rows": rows,
        "summary": summary,
    }
    if path is not None:
        from sartor.ir.files import write_atomic

        write_atomic(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    return document
