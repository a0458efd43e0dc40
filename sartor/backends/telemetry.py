"""Third-party telemetry, switched off before the vendor's import.

`import openvino` looks up an analytics host and writes an identifier into the home folder unless its
telemetry package cannot be imported, in which case it uses its own stub. nncf shares that package.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from sartor.errors import UsageError

_STUBBED = ("openvino_telemetry",)


def disable() -> None:
    """Make telemetry packages unimportable for the rest of this process."""
    for name in _STUBBED:
        sys.modules[name] = None  # type: ignore[assignment]  # documented: makes `import name` raise


def import_vendor(module: str, requirement: str) -> ModuleType:
    """Import a vendor package with telemetry off.

    Args:
        module: module to import.
        requirement: what to install when it is missing, such as `sartor[openvino]`.

    Raises:
        UsageError: the package is missing or broken.
    """
    disable()
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"The package '{module}' could not be imported: {error}. "
            f"Install it with: pip install '{requirement}'"
        ) from error
    switch_off = getattr(loaded, "disable_telemetry_events", None)
    if switch_off is not None:  # ONNX Runtime; it reports events on some platforms only
        switch_off()
    return loaded
