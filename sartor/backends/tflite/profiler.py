"""LiteRT's own profiler, which only its C interface reaches.

The interpreter of the Python package cannot be profiled. The same package carries `libLiteRt.so`, whose compiled
models record every operator, those inside of XNNPACK included.

Reference: LiteRT, `litert/c/litert_compiled_model.h`, `litert/c/litert_profiler.h`, `litert_profiler_event.h`.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor.backends import telemetry
from sartor.backends.tflite.convert import REQUIREMENT
from sartor.errors import BackendError

_CPU = 1  # kLiteRtHwAcceleratorCpu
_WRITE = 1  # kLiteRtTensorBufferLockModeWrite
_OPERATOR, _DELEGATED = 1 << 1, (1 << 2, 1 << 3)  # event types
_EVENT_TYPES = frozenset(1 << bit for bit in range(9))
_LONGEST_US = 3_600_000_000

_Handle = ctypes.c_void_p


class _Event(ctypes.Structure):
    """`ProfiledEventData` of LiteRT 2.3."""

    _fields_ = (
        ("tag", ctypes.c_char_p),
        ("event_type", ctypes.c_int32),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("memory_before", ctypes.c_int64 * 3),
        ("memory_after", ctypes.c_int64 * 3),
        ("node", ctypes.c_uint64),
        ("detail", ctypes.c_uint64),
        ("source", ctypes.c_int32),
    )


class _TensorType(ctypes.Structure):
    """`LiteRtRankedTensorType`, whose size the header asserts: 72 bytes."""

    _fields_ = (("bytes", ctypes.c_uint8 * 72),)


@dataclasses.dataclass(frozen=True)
class Event:
    """One operator that was executed.

    Attributes:
        name: of the kernel in XNNPACK, or of the operator type in LiteRT.
        seconds: elapsed, in whole microseconds.
        operator: index in the flatbuffer; -1 for a kernel of XNNPACK, which does not know it.
    """

    name: str
    seconds: float
    operator: int


def record(
    path: Path, inputs: Mapping[str, np.ndarray], threads: int, warm_up_runs: int, runs: int
) -> list[list[Event]]:
    """Operators of each of `runs` inferences, in execution order.

    Args:
        path: a flatbuffer.
        inputs: arrays by signature name, as the file takes them.
        threads: of XNNPACK.
        warm_up_runs: inferences that are not recorded.
        runs: inferences that are.

    Raises:
        UsageError: ai-edge-litert is not installed.
        BackendError: a call fails, or the events are not laid out as expected.
    """
    library = _Library()
    try:
        run = _prepared(library, path, inputs, threads)
        profiler = library.made("CompiledModelGetProfiler", library.handles["CompiledModel"])
        for _ in range(warm_up_runs):
            run()
        recorded = []
        for _ in range(runs):
            library.call("ResetProfiler", profiler)
            library.call("StartProfiler", profiler)
            run()
            library.call("StopProfiler", profiler)
            recorded.append(_events(library, profiler))
        return recorded
    finally:
        library.close()


class _Library:
    """The C interface, with statuses checked and objects destroyed in reverse."""

    def __init__(self) -> None:
        package = telemetry.import_vendor("ai_edge_litert", REQUIREMENT)
        path = Path(str(package.__file__)).with_name("libLiteRt.so")
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(
                f"LiteRT's profiler needs 'libLiteRt.so', which cannot be loaded: {error}. Install ai-edge-litert "
                "for this platform."
            ) from error
        self.handles: dict[str, Any] = {}

    def call(self, name: str, *arguments: Any) -> None:
        """Call `LiteRt<name>`. Raises BackendError unless its status is zero."""
        try:
            status = getattr(self._library, f"LiteRt{name}")(*arguments)
        except AttributeError as error:
            raise BackendError(
                f"This version of LiteRT has no 'LiteRt{name}', which profiling needs. Install ai-edge-litert 2.3."
            ) from error
        if status:
            raise BackendError(
                f"LiteRT could not profile the model: 'LiteRt{name}' returned status {status}."
            )

    def made(self, name: str, *arguments: Any) -> Any:
        """The handle that a call gives through its last argument."""
        handle = _Handle()
        self.call(name, *arguments, ctypes.byref(handle))
        return handle

    def keep(self, kind: str, name: str, *arguments: Any) -> Any:
        """A handle that `close` destroys with `LiteRtDestroy<kind>`."""
        self.handles[kind] = self.made(name, *arguments)
        return self.handles[kind]

    def close(self) -> None:
        """Destroy what was made, the last first."""
        for kind, handle in reversed(self.handles.items()):
            getattr(self._library, f"LiteRtDestroy{kind.partition(':')[0]}")(handle)
        self.handles.clear()


def _prepared(library: _Library, path: Path, inputs: Mapping[str, np.ndarray], threads: int) -> Any:
    """A function that runs the model once on these inputs."""
    size = ctypes.c_size_t
    environment = library.keep("Environment", "CreateEnvironment", 0, None)
    model = library.keep("Model", "CreateModelFromFile", environment, str(path).encode())
    options = library.keep("Options", "CreateOptions")
    library.call("SetOptionsHardwareAccelerators", options, _CPU)
    _add(library, options, b"runtime_options_string", b"enable_profiling = true\n")
    _add(library, options, b"xnnpack", f"num_threads = {threads}\n".encode())
    compiled = library.keep("CompiledModel", "CreateCompiledModel", environment, model, options)
    signature = library.made("GetModelSignature", model, size(0))

    def buffers(kind: str) -> list[Any]:
        count = size()
        library.call(f"GetNumSignature{kind}s", signature, ctypes.byref(count))
        made = []
        for index in range(count.value):
            tensor = library.made(f"GetSignature{kind}TensorByIndex", signature, size(index))
            described = _TensorType()
            library.call("GetRankedTensorType", tensor, ctypes.byref(described))
            needed = library.made(f"GetCompiledModel{kind}BufferRequirements", compiled, size(0), size(index))
            arguments = (environment, ctypes.byref(described), needed)
            made.append(
                library.keep(
                    f"TensorBuffer:{kind}{index}", "CreateManagedTensorBufferFromRequirements", *arguments
                )
            )
        return made

    given, taken = buffers("Input"), buffers("Output")
    for index, buffer in enumerate(given):
        name = ctypes.c_char_p()
        library.call("GetSignatureInputName", signature, size(index), ctypes.byref(name))
        _fill(library, buffer, inputs[(name.value or b"").decode()])
    sources = (_Handle * len(given))(*given)
    results = (_Handle * len(taken))(*taken)
    arguments = (compiled, size(0), size(len(given)), sources, size(len(taken)), results)
    return lambda: library.call("RunCompiledModel", *arguments)


def _add(library: _Library, options: Any, name: bytes, text: bytes) -> None:
    """Add options that LiteRT reads as TOML text, which it frees."""
    system = ctypes.CDLL(None)
    system.strdup.restype = _Handle
    release = ctypes.cast(system.free, _Handle)
    made = library.made("CreateOpaqueOptions", name, _Handle(system.strdup(text)), release)
    library.call("AddOpaqueOptions", options, made)


def _fill(library: _Library, buffer: Any, array: np.ndarray) -> None:
    address = _Handle()
    library.call("LockTensorBuffer", buffer, ctypes.byref(address), _WRITE)
    ctypes.memmove(address, array.tobytes(), array.nbytes)
    library.call("UnlockTensorBuffer", buffer)


def _events(library: _Library, profiler: Any) -> list[Event]:
    count = ctypes.c_int()
    library.call("GetNumProfilerEvents", profiler, ctypes.byref(count))
    # Twice the room: should a later version's events be larger, the check below sees it, and nothing is overwritten.
    raw = (_Event * (2 * max(count.value, 1)))()
    library.call("GetProfilerEvents", profiler, count.value, raw)
    events = list(raw[: count.value])
    executed = [e for e in events if e.event_type == _OPERATOR or e.event_type in _DELEGATED]
    if any(e.event_type not in _EVENT_TYPES for e in events) or any(
        e.elapsed_us > _LONGEST_US for e in executed
    ):
        raise BackendError(
            "The profiler of this version of LiteRT lays its events out in another way than that of 2.3. Install "
            "ai-edge-litert 2.3 to profile."
        )
    return [
        Event(
            (event.tag or b"").decode(errors="replace"),
            event.elapsed_us * 1e-6,
            int(event.node) if event.event_type == _OPERATOR else -1,
        )
        for event in executed
    ]
