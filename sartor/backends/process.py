"""Calls of a backend in a subprocess, with limits on time and memory.

A request is one JSON line on the worker's standard input; the answer is JSON lines on its standard output:
any number of events, then one `result` or one `error`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import sartor.errors
from sartor.backends import memory, telemetry
from sartor.errors import BackendError, SartorError

_LOG_LINES = 30
_GRACE_S = 5.0  # the worker ends itself at the limit, with a stack trace; the parent kills it after this
_LOOK_S = 1.0  # how soon the end of a worker is seen whose answer a child of it could still write
_CHUNK = 1 << 16
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def call(
    request: Mapping[str, Any],
    *,
    threads: int,
    time_limit_s: float,
    memory_limit_bytes: int | None = None,
    variables: Mapping[str, str] | None = None,
    on_event: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run one request in a fresh worker.

    Args:
        request: for `worker.COMMANDS`.
        threads: fixed for every thread pool of the worker by environment variables.
        time_limit_s: after it the worker is ended.
        memory_limit_bytes: limit of the worker's address space; default: see `default_memory_limit`.
        variables: environment variables of the worker, beside those of this process.
        on_event: called for each event line, in this thread.

    Raises:
        SartorError: what the worker raised, with its class.
        BackendError: the worker crashed, was killed, or ran out of time; its last log lines are notes.
    """
    with Worker(threads=threads, memory_limit_bytes=memory_limit_bytes, variables=variables) as worker:
        return worker.ask(request, time_limit_s=time_limit_s, on_event=on_event)


class Worker:
    """A fresh subprocess that answers requests until it is closed, or does not survive one.

    Args:
        threads: as for `call`.
        memory_limit_bytes: as for `call`.
        variables: as for `call`.
        module: what runs in it; answers as `serving.serve` does.
    """

    def __init__(
        self,
        *,
        threads: int,
        memory_limit_bytes: int | None = None,
        variables: Mapping[str, str] | None = None,
        module: str = "sartor.backends.worker",
    ):
        self._given_limit = memory_limit_bytes
        self._memory = default_memory_limit(threads) if memory_limit_bytes is None else memory_limit_bytes
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**_environment(threads), **(variables or {})},
            start_new_session=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the subprocess and its children."""
        _kill(self._process)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def ask(
        self,
        request: Mapping[str, Any],
        *,
        time_limit_s: float,
        on_event: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Send one request and wait for its answer. Arguments and errors are those of `call`."""
        document = {
            **request,
            "time_limit_s": time_limit_s,
            "memory_limit_bytes": self._memory,
            "memory_limit_given": self._given_limit is not None,
        }
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _kill(self._process)

        timer = threading.Timer(time_limit_s + _GRACE_S, expire)
        timer.daemon = True
        timer.start()
        try:
            answer = _talk(self._process, document, on_event)
        except (
            BaseException
        ):  # an interrupt, or the caller's own `on_event`: nobody reads the answer any more
            self.close()
            raise
        finally:
            timer.cancel()
        if answer is not None:
            return _unwrap(answer)
        _kill(self._process)
        raise _died(self._process.wait(), expired.is_set(), time_limit_s, self._given_limit, self._log)


def default_memory_limit(threads: int) -> int:
    """Memory that is there, plus what threads reserve without using: 8 GiB and 256 MiB per thread.

    It is not set for a backend with the attribute `reserves_address_space`; see `protocol.Backend`.
    """
    return memory.available_bytes() + (8 << 30) + threads * (256 << 20)


def _environment(threads: int) -> dict[str, str]:
    telemetry.disable()
    environment = dict(os.environ)
    environment.update({name: str(threads) for name in _THREAD_VARIABLES})
    # Plugins that this process can import must be importable in the worker, from the same places.
    paths = [path or os.getcwd() for path in sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return environment


def _talk(
    process: subprocess.Popen[bytes],
    document: Mapping[str, Any],
    on_event: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at start; the exit code tells
        process.stdin.write(json.dumps(document).encode() + b"\n")
        process.stdin.flush()
    for line in _lines(process):
        try:
            message = json.loads(line)
        except ValueError:  # the last line of a worker that was killed while writing
            continue
        if message["event"] in ("result", "error"):
            return dict(message)
        on_event(message)
    return None


def _lines(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """What the worker writes, until it ends.

    The end of the pipe alone would not do: a child that the worker forked holds it open, and would be waited for.
    """
    assert process.stdout is not None
    output = process.stdout.fileno()
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # asked first: what it wrote before that is in the pipe
            if not selector.select(0 if ended else _LOOK_S):
                if ended:
                    return
                continue
            chunk = os.read(output, _CHUNK)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines


def _unwrap(answer: dict[str, Any]) -> dict[str, Any]:
    if answer["event"] == "result":
        result: dict[str, Any] = answer["value"]
        return result
    kind = getattr(sartor.errors, answer["kind"], BackendError)
    if not (isinstance(kind, type) and issubclass(kind, SartorError)):
        kind = BackendError
    failure = kind(answer["message"])
    for note in answer["notes"]:
        failure.add_note(note)
    raise failure


def _died(
    code: int, expired: bool, time_limit_s: float, memory_limit: int | None, log: IO[bytes]
) -> BackendError:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    if expired or any(line.startswith("Timeout (") for line in lines):
        what = (
            f"did not finish within {time_limit_s:g} s and was stopped. Raise its time limit ('time_limit_s', "
            "'sartor lower --time-limit')"
        )
    elif code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        what = f"was ended by {name}. {_memory_text(memory_limit)}; see its log below"
    else:
        what = f"exited with code {code} without an answer; see its log below"
    failure = BackendError(f"The backend's subprocess {what}.")
    if lines:
        failure.add_note("Last lines of its log:\n" + "\n".join(lines[-_LOG_LINES:]))
    return failure


def _memory_text(limit: int | None) -> str:
    if limit is None:
        return f"It could use the {memory.available_bytes() / 2**30:.1f} GiB of memory that are here"
    return (
        f"Its memory limit was {limit / 2**30:.1f} GiB ('memory_limit_bytes', 'sartor lower --memory-limit')"
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    # The whole group: a vendor's compiler may have children of its own.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
