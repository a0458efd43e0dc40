"""Backends: legality, lowering, running and measuring on a named target.

A backend is found by its entry point in group `sartor.backends`. Vendor packages are imported inside
functions, with their telemetry off first (see `telemetry`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sartor.errors import UsageError
from sartor.plugins import Registry

if TYPE_CHECKING:
    from sartor.backends.protocol import Backend

REGISTRY = Registry(
    "sartor.backends",
    "backend",
    {
        "onnxruntime": "sartor.backends.onnxruntime:OnnxRuntimeBackend",
        "openvino": "sartor.backends.openvino:OpenVinoBackend",
        "reference": "sartor.backends.reference:ReferenceBackend",
        "tensorrt": "sartor.backends.tensorrt:TensorRTBackend",
        "tflite": "sartor.backends.tflite:TfliteBackend",
        "tflite-channel-last": "sartor.backends.tflite:ChannelLastTfliteBackend",
        "tflite-micro": "sartor.backends.tflite_micro:TfliteMicroBackend",
    },
)

_METHODS = (
    "capabilities",
    "channel_grid",
    "rules",
    "legality",
    "legalize",
    "lower",
    "load",
    "compile",
    "profile",
)


def available() -> tuple[str, ...]:
    """Names of all registered backends; nothing is imported.

    A registered backend whose vendor package is not installed says so when it is used.
    """
    return REGISTRY.names()


def get(name: str) -> Backend:
    """The backend registered as `name`.

    Raises:
        UsageError: unknown name, two owners, a plugin that fails to import, or one without the
            methods of `protocol.Backend`.
    """
    factory = REGISTRY.load(name)
    backend = factory() if isinstance(factory, type) else factory
    missing = [method for method in _METHODS if not callable(getattr(backend, method, None))]
    if missing:
        raise UsageError(
            f"The backend '{name}' ({factory!r}) lacks {', '.join(f'{m}()' for m in missing)}; "
            "a backend implements every method of sartor.backends.protocol.Backend."
        )
    return backend
