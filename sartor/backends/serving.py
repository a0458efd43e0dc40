"""The loop of a subprocess that answers requests of `process.Worker`; what it can be asked is its caller's."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from sartor import backends
from sartor.backends import telemetry
from sartor.errors import BackendError, SartorError

Send = Callable[[dict[str, Any]], None]
Command = Callable[[Mapping[str, Any], Send], dict[str, Any]]

_CHUNK = 1 << 16


def serve(commands: Mapping[str, Command]) -> NoReturn:
    """Answer requests until the process that sends them is gone, and end then.

    Args:
        commands: what can be asked, by name.
    """
    telemetry.disable()  # before any plugin is imported: it may import a vendor's package by itself
    _offer_to_the_kernel()
    # Vendors print to standard output; the answer has a channel of its own, and prints go to the log.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        channel.write(_line(message))

    requests = _requests()
    while True:
        answer = _answer(json.loads(requests.get()), commands, send)
        faulthandler.cancel_dump_traceback_later()
        channel.write(answer)


def _requests() -> queue.SimpleQueue[bytes]:
    """Lines of standard input. Its end is the end of this process and of its children, whatever runs then.

    The caller keeps it open for as long as it lives, and a kill leaves it no time to end this process, whose answer
    nobody would read. (The signal that Linux has for it, PR_SET_PDEATHSIG, comes when the *thread* ends that
    started this process.)
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        rest = b""
        # Not `sys.stdin`: a child that is forked meanwhile would inherit its lock and wait for it when it closes it.
        while chunk := os.read(0, _CHUNK):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                lines.put(line)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _answer(request: Mapping[str, Any], commands: Mapping[str, Command], send: Send) -> str:
    """The last line for a request."""
    try:
        _limit(request)
        return _line({"event": "result", "value": commands[request["command"]](request, send)})
    except SartorError as error:
        notes = [str(note) for note in getattr(error, "__notes__", ())]
        kind, message = type(error).__name__, str(error)
    except (Exception, SystemExit) as error:
        kind = "BackendError"
        message = f"The backend '{request.get('backend')}' failed: {type(error).__name__}: {error}."
        notes = ["".join(traceback.format_exception(error))]
    return _line({"event": "error", "kind": kind, "message": message, "notes": notes})


def _line(message: Mapping[str, Any]) -> str:
    """The message as JSON.

    Raises:
        BackendError: a value in it is no plain data; says where.
    """
    try:
        return json.dumps(message, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        where = _not_plain(message.get("value", message), "answer")
        raise BackendError(
            "The backend gave a value that is not plain data, that is text, finite numbers, true, false, null, "
            f"lists and objects of these: {where or error}. Convert it in the backend."
        ) from error


def _not_plain(value: object, place: str) -> str:
    """Where the first value is that JSON cannot hold, and what it is; empty if there is none."""
    if isinstance(value, Mapping):
        inside = [(f"{place}.{key}", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        inside = [(f"{place}[{index}]", item) for index, item in enumerate(value)]
    else:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            return f"'{place}' is {value!r:.100} of type {type(value).__name__}"
        return ""
    return next(filter(None, (_not_plain(item, name) for name, item in inside)), "")


def _limit(request: Mapping[str, Any]) -> None:
    # Of the thread that crashed: what the others did would push a vendor's last words out of the error.
    faulthandler.enable(all_threads=False)
    # Ends a hang with a stack trace in the log, even when the parent is gone.
    faulthandler.dump_traceback_later(request["time_limit_s"], exit=True)
    if not request["memory_limit_given"] and _reserves_address_space(request.get("backend")):
        return
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this platform
        import resource

        limit = request["memory_limit_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _reserves_address_space(name: str | None) -> bool:
    with contextlib.suppress(SartorError):  # the command itself will say what is wrong with that name
        return name is not None and bool(getattr(backends.get(name), "reserves_address_space", False))
    return False


def _offer_to_the_kernel() -> None:
    """Where memory runs out, this process is the one to end, and not its parent or a stranger."""
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
