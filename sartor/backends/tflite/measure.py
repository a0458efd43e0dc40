"""Kernel times."""

from __future__ import annotations

from sartor.backends.protocol import Artifact, KernelTime, TargetOptions


def profile(artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
    """Median time per kernel over `runs` inferences, in execution order."""
    raise NotImplementedError
