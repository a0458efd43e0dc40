"""Sartor: a network and a budget in; a smaller, verified, measured network out.

Everything public is loaded on first use, so that `import sartor` stays fast: torch and the vendors'
runtimes are imported only by the call that needs them.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it when it is imported; later is too late

if TYPE_CHECKING:
    from sartor import backends as backends
    from sartor.fit import FitOptions as FitOptions
    from sartor.fit import fit as fit
    from sartor.ir.capture import capture as capture
    from sartor.ir.fx import to_fx as to_fx
    from sartor.ir.load import load as load
    from sartor.ir.plan import Plan as Plan
    from sartor.ir.program import Program as Program
    from sartor.passes.pipeline import Pipeline as Pipeline
    from sartor.passes.prune import apply_plan as apply_plan
    from sartor.writeback import apply_to_module as apply_to_module

_EXPORTS = {
    "FitOptions": ("sartor.fit", "FitOptions"),
    "Pipeline": ("sartor.passes.pipeline", "Pipeline"),
    "Plan": ("sartor.ir.plan", "Plan"),
    "Program": ("sartor.ir.program", "Program"),
    "apply_plan": ("sartor.passes.prune", "apply_plan"),
    "apply_to_module": ("sartor.writeback", "apply_to_module"),
    "backends": ("sartor.backends", None),
    "capture": ("sartor.ir.capture", "capture"),
    "fit": ("sartor.fit", "fit"),
    "load": ("sartor.ir.load", "load"),
    "to_fx": ("sartor.ir.fx", "to_fx"),
}

__all__ = [*sorted(_EXPORTS), "__version__"]  # noqa: PLE0604, RUF100


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sartor' has no attribute '{name}'; it exports {', '.join(__all__)}")
    module, attribute = _EXPORTS[name]
    value: Any = importlib.import_module(module)
    if attribute is not None:
        value = getattr(value, attribute)
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps `sartor.fit` the function although `sartor/fit.py` is a module of the same name.

    The import system binds every imported submodule on its package, which would replace the function
    with the module as soon as anything imports `sartor.fit`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        exported = _EXPORTS.get(name, (None, None))[1]
        if exported is not None and isinstance(value, types.ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
