"""Tasks on a Ray cluster whose nodes offer devices as custom resources: a shelf of boards is a measuring farm.

A node that is started with `--resources '{"sartor:NAME": 1}'` offers the device NAME. A task that takes time takes
the whole of it, any other task a small share, and each as many processors as the target has threads: so nothing
runs beside a measurement. A task whose worker or node is lost is begun again by Ray on another node that offers the
device; when there is none any more, that is an error.

The cluster is trusted: whoever can reach it runs code on its nodes, and what they answer is unpickled here, by Ray.
So only the cluster that the user names is ever joined: `RAY_ADDRESS` is not read, nothing is looked for, none is
started. No code goes out (`sartor` is imported on the nodes, and must be the same there), and no folder of this
machine does.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sartor.errors import BackendError, SartorError, UsageError
from sartor.tasks import remote
from sartor.tasks.task import ALONE, Result, Task, error_from_dict

PREFIX = "sartor:"
_EXTRA = "sartor[ray]"
_SETTINGS = {
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a call after the connection is lost would start or join some other cluster
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # below `uv run` it would send the working folder to the nodes
}
_NOT_READ = ("RAY_ADDRESS", "RAY_NAMESPACE", "RAY_RUNTIME_ENV", "RAY_RUNTIME_ENV_HOOK")
_REACH_S = 5.0
_LOOK_S = 1.0
_JOINS, _NOT_STARTED = 3, "Initialization failure from server"
_MOST_RETRIES = 2
_SHARE = 0.01
"""Of a device, for a task that may run beside its like: many of them together, but none beside a measurement."""
_KEPT_BYTES = 1 << 30
"""Of file contents that stay in the cluster for later tasks."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """Where tasks go: `ray://HOST:PORT[/DEVICE]`; an empty device is the only one that the cluster offers."""

    host: str
    port: int
    device: str = ""

    @property
    def address(self) -> str:
        """What Ray is given."""
        return f"ray://{self.host}:{self.port}"


def parse_workers(text: str) -> Workers:
    """Read the value of `--workers`.

    Raises:
        UsageError: it does not name one cluster.
    """
    match = re.fullmatch(
        r"ray://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})(?:/([A-Za-z0-9._-]+)?)?", text
    )
    if match is None or not 0 < int(match[2]) < 65536:
        raise UsageError(
            f"'--workers {text}' names no cluster; expected local, or ray://HOST:PORT or ray://HOST:PORT/DEVICE with "
            "the address of a Ray client server. A cluster is never looked for, and RAY_ADDRESS is not read."
        )
    return Workers(match[1], int(match[2]), match[3] or "")


class RayRunner:
    """Runs tasks on the devices of one name of one cluster.

    Args:
        workers: the cluster and the device.
        target: backend that the tasks use.
        threads: of the target; processors that one task takes.
        patience_s: how long a task waits for a device when no node offers one any more.

    Raises:
        UsageError: `ray` is not installed, the cluster cannot be reached, offers no such device, or is of other
            versions than this process.
    """

    chunk_bytes = 32 << 20

    def __init__(self, workers: Workers, target: str, threads: int = 1, *, patience_s: float = 60.0):
        self._workers, self._threads, self._patience_s = workers, threads, patience_s
        self._kept: collections.OrderedDict[str, tuple[Any, int]] = collections.OrderedDict()
        self._versions = remote.versions(target)
        self.device = workers.device
        self._ray = _connect(workers)
        try:
            self.device = self.device or self._only_device()
            self._require_devices()
            self._function = self._ray.remote(max_retries=_MOST_RETRIES, retry_exceptions=False)(
                remote.run_task
            )
            self._compare(target)
        except BaseException:
            self.close()
            raise

    def run_all(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """See `Runner`; as many tasks are under way as there are devices, and one that waits."""
        under_way: collections.deque[Any] = collections.deque()
        waiting = iter(tasks)
        try:
            while True:
                room = 1 + max(1, len(self._nodes())) - len(under_way)
                for _, task in zip(range(room), waiting, strict=False):
                    under_way.append(self._submit(task))
                if not under_way:
                    return
                yield self._result(under_way.popleft())
        finally:
            for reference in under_way:
                with contextlib.suppress(Exception):  # the connection may be what was lost
                    self._ray.cancel(reference, force=True)

    def run(self, task: Task) -> Result:
        """The result of one task."""
        (result,) = self.run_all([task])
        return result

    def close(self) -> None:
        """Leave the cluster; it ends what still runs of ours."""
        self._kept.clear()
        with contextlib.suppress(Exception):
            self._ray.shutdown()

    # ---- devices -------------------------------------------------------------------------------
    def _nodes(self) -> list[dict[str, Any]]:
        """Nodes that are there and offer the device."""
        resource = PREFIX + self.device
        return [node for node in self._alive() if node["Resources"].get(resource, 0) > 0]

    def _alive(self) -> list[dict[str, Any]]:
        with self._lost():
            return [node for node in self._ray.nodes() if node["Alive"]]

    def _only_device(self) -> str:
        names = sorted({name for node in self._alive() for name in _devices(node)})
        if len(names) != 1:
            found = f"the devices {', '.join(map(repr, names))}" if names else "no device"
            raise UsageError(
                f"The cluster {self._workers.address} offers {found}; "
                + (f"name one of them: {self._workers.address}/{names[0]}." if names else _HOW_TO_OFFER)
            )
        return names[0]

    def _require_devices(self) -> None:
        nodes = self._nodes()
        if not nodes:
            raise UsageError(
                f"The cluster {self._workers.address} offers no device '{self.device}'. {_HOW_TO_OFFER}"
            )
        for node in nodes:
            if sum(_devices(node).values()) > 1:
                raise UsageError(
                    f"The node '{node['NodeName']}' offers {_devices(node)}: more than one measurement at a time, and "
                    "they would slow each other down. Offer one device per node, and 1 of it."
                )
        if all(node["Resources"].get("CPU", 0) < self._threads for node in nodes):
            raise UsageError(
                f"Every node with a device '{self.device}' has fewer than {self._threads} processors for Ray; use "
                "fewer --threads, or start the nodes with --num-cpus."
            )

    def _compare(self, target: str) -> None:
        """Ask one node for its versions; a node that joins later is compared with each task."""
        describe = self._ray.remote(max_retries=_MOST_RETRIES)(remote.describe)
        answer = self._wait(self._options(describe, _SHARE).remote(target))
        if "error" in answer:
            error = error_from_dict(answer["error"])
            raise type(error)(f"The node '{answer['node']}' cannot run '{target}': {error}")
        remote.require_versions(self._versions, answer["versions"], answer["node"])

    # ---- tasks ---------------------------------------------------------------------------------
    def _submit(self, task: Task) -> Any:
        places = {
            sha256: task.roots[label] / name
            for label, names in task.files.items()
            for name, sha256 in names.items()
        }
        request = {
            "task": task.to_dict(),
            "versions": self._versions,
            "device": self.device,
            "contents": list(places),
        }
        contents = [self._put(sha256, path) for sha256, path in places.items()]
        with self._lost():
            function = self._options(self._function, 1 if task.kind in ALONE else _SHARE)
            return function.remote(json.dumps(request), *contents)

    def _options(self, function: Any, share: float) -> Any:
        return function.options(num_cpus=self._threads, resources={PREFIX + self.device: share})

    def _put(self, sha256: str, path: Path) -> Any:
        """The content in the cluster's object store: the baseline and the samples go out once, not per candidate."""
        known = self._kept.pop(sha256, None)
        if known is None:
            content = path.read_bytes()
            with self._lost():
                known = self._ray.put(content), len(content)
        self._kept[sha256] = known
        while sum(size for _, size in self._kept.values()) > _KEPT_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return known[0]

    def _result(self, reference: Any) -> Result:
        answer = self._wait(reference)
        if "error" in answer:
            raise error_from_dict(answer["error"])
        return Result(answer["value"], answer["files"])

    def _wait(self, reference: Any) -> dict[str, Any]:
        """What a task answers; a task that no node can take any more would wait for ever."""
        missing_since: float | None = None
        while True:
            with self._lost():
                done, _ = self._ray.wait([reference], timeout=_LOOK_S)
                if done:
                    answer: dict[str, Any] = self._ray.get(done[0])
                    return answer
            if self._nodes():
                missing_since = None
                continue
            missing_since = missing_since or time.monotonic()
            if time.monotonic() - missing_since > self._patience_s:
                raise BackendError(
                    f"No node of {self._workers.address} offers the device '{self.device}' any more, for "
                    f"{self._patience_s:g} s; it was lost. Start its node again and repeat the command: it resumes."
                )

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """Whatever Ray raises is about the cluster, a node or a worker: ours comes back as data."""
        try:
            yield
        except SartorError:
            raise
        except ConnectionError as error:
            raise BackendError(f"The connection to {self._workers.address} was lost: {error}.") from error
        except Exception as error:
            text = str(error).strip()
            if "No module named 'sartor" in text:
                raise UsageError(
                    f"A node of {self._workers.address} cannot import this version of sartor; install it on the head "
                    f"and on every node with a device: pip install '{_EXTRA}'."
                ) from error
            lost = BackendError(
                f"A task on the device '{self.device or '?'}' of {self._workers.address} was lost "
                f"({type(error).__name__}), and {_MOST_RETRIES} more attempts did not help. See the log of its node; "
                "repeating the command resumes."
            )
            lost.add_note(text)
            raise lost from error


_HOW_TO_OFFER = (
    "Start its node with: ray start --address=HEAD:6379 --num-cpus=N --resources='{\"sartor:NAME\": 1}'"
)


def _devices(node: dict[str, Any]) -> dict[str, float]:
    """Devices of a node and how many of each it offers."""
    return {
        name.removeprefix(PREFIX): count
        for name, count in node["Resources"].items()
        if name.startswith(PREFIX)
    }


def _connect(workers: Workers) -> Any:
    """The module `ray`, connected."""
    from sartor.backends.telemetry import import_vendor

    os.environ.update(_SETTINGS)
    ray = import_vendor("ray", _EXTRA)
    import_vendor("grpc", _EXTRA)
    if ray.is_initialized():
        raise UsageError(
            "This process is connected to a Ray cluster already, and tasks go only to the one named by '--workers'. "
            "Call ray.shutdown() first."
        )
    try:
        socket.create_connection((workers.host.strip("[]"), workers.port), _REACH_S).close()
    except OSError as error:
        raise UsageError(
            f"Nothing answers at {workers.address} ({error}). Start the head with 'ray start --head "
            "--ray-client-server-port=PORT', and give its host and that port."
        ) from error
    with _environment_unread(), _signals_kept():
        _join(ray, workers.address)
    return ray


def _join(ray: Any, address: str) -> None:
    """A busy head may fail to start the process that serves a client; it starts another for whoever asks again."""
    for attempt in range(1, _JOINS + 1):
        try:
            ray.init(address, logging_level="ERROR", log_to_driver=False)
            return
        except Exception as error:
            if attempt == _JOINS or _NOT_STARTED not in str(error):
                lines = str(error).strip().splitlines() or [type(error).__name__]
                # Between what failed and its cause there is the head's traceback.
                text = " ".join(dict.fromkeys([lines[0].strip(), lines[-1].strip()]))
                raise UsageError(f"The cluster {address} cannot be joined: {text[:400]}") from error
        with contextlib.suppress(Exception):  # of what was half joined
            ray.shutdown()
        time.sleep(_LOOK_S)


@contextlib.contextmanager
def _environment_unread() -> Iterator[None]:
    """Variables by which Ray would go elsewhere than it is told are not there meanwhile."""
    kept = {name: os.environ.pop(name) for name in _NOT_READ if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM over; the way out of a command cleans up behind itself and stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
