"""A subprocess with loaded artifacts of one target, from the side that asks."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor import backends
from sartor.backends import process
from sartor.backends.artifact import open_artifact
from sartor.backends.legality import require_legal
from sartor.backends.protocol import Artifact, TargetOptions
from sartor.bench.protocol import FEWEST_RUNS

if TYPE_CHECKING:
    from sartor.ir.program import Program

_LOAD_S = 300.0  # importing the vendor, loading and compiling, and one inference
_SLOWEST_RUNS = 4  # the limit of a request, in units of the time that its runs may take


@dataclasses.dataclass(frozen=True)
class Runs:
    """Timed runs.

    Attributes:
        samples_s: seconds of each run.
        warm_up_runs: runs before them that were not timed.
    """

    samples_s: tuple[float, ...]
    warm_up_runs: int


class Device:
    """One subprocess; a vendor's crash ends it and nothing else.

    Args:
        backend: registered name.
        options: threads and precision; denormals are flushed, as random weights make them.
        memory_limit_bytes: of its address space.
        seed: of random inputs.
    """

    def __init__(
        self, backend: str, options: TargetOptions, *, memory_limit_bytes: int | None = None, seed: int = 0
    ):
        self.backend, self.seed = backend, seed
        self.options = dataclasses.replace(options, flush_denormals=True)
        self._start: Callable[[], process.Worker] = lambda: process.Worker(
            threads=options.threads, memory_limit_bytes=memory_limit_bytes, module="sartor.bench.process"
        )
        self._worker = self._start()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def restart(self) -> None:
        """A fresh subprocess, after a failure; nothing is loaded in it."""
        self._worker.close()
        self._worker = self._start()

    def lower(self, program: Program, folder: Path, *, time_limit_s: float) -> Artifact:
        """As `isolation.lower`, without the start of a subprocess; for many small models.

        Raises:
            BackendError: not legal, or the compiler failed; the device needs a restart then.
        """
        from sartor.ir import transport

        options = dataclasses.replace(self.options, flush_denormals=False)
        require_legal(self.backend, backends.get(self.backend).legality(program, options))
        with tempfile.TemporaryDirectory(prefix="sartor-bench-") as sent:
            transport.write(program, Path(sent))
            request = {"command": "lower", "program": sent, "folder": str(folder.resolve())}
            self._ask({**request, "options": options.to_dict()}, time_limit_s)
        return open_artifact(folder)

    def load(
        self, key: str, artifact: Artifact, shapes: dict[str, tuple[int, ...]] | None = None
    ) -> dict[str, str]:
        """Load an artifact; returns the runtime's settings.

        Raises:
            UsageError: options that the backend refuses.
            BackendError: it failed, crashed or did not finish.
        """
        options = dataclasses.replace(self.options, shapes=shapes or {})
        request = {
            "command": "load",
            "key": key,
            "artifact": artifact.to_dict(),
            "folder": str(artifact.folder.resolve()),
            "options": options.to_dict(),
            "seed": self.seed,
        }
        settings: dict[str, str] = self._ask(request, _LOAD_S)["settings"]
        return settings

    def unload(self, key: str) -> None:
        """Forget an artifact."""
        self._ask({"command": "unload", "key": key}, _LOAD_S)

    def runs(
        self, key: str, *, warm_up_runs: int, runs: int, limit_s: float, fewest: int = FEWEST_RUNS
    ) -> Runs:
        """Time runs of a loaded artifact: `runs` of them, or at least `fewest` when the time is over.

        Raises:
            BackendError: it failed, crashed or did not finish.
        """
        request = {
            "command": "runs",
            "key": key,
            "warm_up_runs": warm_up_runs,
            "runs": runs,
            "runs_limit_s": limit_s,
            "fewest": fewest,
        }
        answer = self._ask(request, _SLOWEST_RUNS * limit_s + _LOAD_S)
        return Runs(tuple(answer["samples"]), answer["warm_up_runs"])

    def _ask(self, request: dict[str, Any], time_limit_s: float) -> dict[str, Any]:
        return self._worker.ask({**request, "backend": self.backend}, time_limit_s=time_limit_s)
