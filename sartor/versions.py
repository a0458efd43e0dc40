"""What a result may depend on, for files that have to say so."""

from __future__ import annotations

import importlib.metadata
import platform

import sartor

_PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxscript", "torch", "lightgbm")


def versions(target: str = "") -> dict[str, str]:
    """Installed versions of everything that can change a result.

    Args:
        target: its package is one of them, where it has the target's name.
    """
    found = {"sartor": sartor.__version__, "python": platform.python_version()}
    for name in filter(None, (*_PACKAGES, target)):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
