"""Tasks on this machine, one after the other: what is measured here shares it with nothing of ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sartor.tasks.task import Result, Task

_CHUNK_BYTES = 256 << 20
"""Every piece loads the artifact anew, in a subprocess: a second or two, which large pieces make small."""


class LocalRunner:
    """Runs tasks in subprocesses of this process, on their files where they lie."""

    device = ""
    chunk_bytes = _CHUNK_BYTES

    def run_all(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """See `Runner`; a task is begun when its result is asked for."""
        for task in tasks:
            yield self.run(task)

    def run(self, task: Task) -> Result:
        """The result of one task."""
        from sartor.tasks.perform import perform

        return perform(task.kind, task.payload, task.roots)

    def close(self) -> None:
        """Nothing is held."""
