"""Third-party telemetry, switched off before the vendor's import.

* `import onnxruntime` on Linux and macOS (since the 2026 releases) writes a device identifier and an
  event cache below `~/.cache` and uploads natively, unless an environment variable is set before the
  library is loaded; `disable_telemetry_events()` afterwards comes too late for both.
* `import openvino` looks up an analytics host and writes an identifier into the home folder unless its
  telemetry package cannot be imported, in which case it uses its own stub. nncf shares that package.

* litert-torch imports transformers and with it huggingface_hub, whose requests carry usage data unless told not to.
* A Ray cluster reports its usage unless told not to before it is started; the workers of one inherit that.

Reference: ONNX Runtime pull requests 27379 and 29843; `openvino/tools/ovc/telemetry_stub.py`.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

from sartor.errors import UsageError

_STUBBED = ("openvino_telemetry",)
# The released library reads the first name; its development branch has also used the second.
_OPT_OUTS = {
    "ORT_DISABLE_TELEMETRY": "1",
    "ORT_TELEMETRY_DISABLED": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def disable() -> None:
    """Opt out of telemetry for the rest of this process and for its children."""
    os.environ.update(_OPT_OUTS)
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
    if switch_off is not None:  # ONNX Runtime on Windows has no variable
        switch_off()
    return loaded
