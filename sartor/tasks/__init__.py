"""Measuring and scoring as tasks: plain data that run on this machine, or on a Ray cluster that the user names."""

from __future__ import annotations

from sartor.tasks.local import LocalRunner
from sartor.tasks.task import Result, Runner, Task

__all__ = ["LocalRunner", "Result", "Runner", "Task", "open_runner"]


def open_runner(workers: str | None, target: str, threads: int = 1) -> Runner:
    """The runner of `--workers`.

    Args:
        workers: None or `local` for this machine, or `ray://HOST:PORT[/DEVICE]`.
        target: backend that the tasks use, for the comparison of versions.
        threads: of the target; processors that one task takes.

    Raises:
        UsageError: `workers` names nothing that tasks can run on, or what it names does not fit this installation.
    """
    if workers is None or workers == "local":
        return LocalRunner()
    from sartor.tasks.ray import RayRunner, parse_workers

    return RayRunner(parse_workers(workers), target, threads)
