"""Running what ships: a bundle on its target's own runtime, with numpy and nothing else of Sartor's needs.

`load` never imports torch, onnx or any part of the compiler.
"""

from __future__ import annotations

from sartor.runtime.bundle import BundleDocument, Condition, Stage, read_bundle, write_bundle
from sartor.runtime.session import BundleSession, load

__all__ = [
    "BundleDocument",
    "BundleSession",
    "Condition",
    "Stage",
    "load",
    "read_bundle",
    "write_bundle",
]
