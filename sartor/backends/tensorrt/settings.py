"""What a user chooses of the target `tensorrt` beyond `TargetOptions`, and the two flavours it chooses from."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sartor.errors import UsageError
from sartor.plugins import Registry

SURGERY = Registry("sartor.tensorrt_surgery", "TensorRT surgery", {})
"""Functions on `onnx_graphsurgeon.Graph` that installed packages apply to every program for this target."""

Surgery = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Flavour:
    """One of the vendor's two packages.

    Attributes:
        module: what is imported.
        requirement: what to install.
        ahead_of_time: engines are built without a GPU, for named compute capabilities.
        compute_capabilities: those it builds for; empty where it is the GPU's own.
    """

    module: str
    requirement: str
    ahead_of_time: bool
    compute_capabilities: tuple[str, ...]


RTX = Flavour("tensorrt_rtx", "sartor[tensorrt]", True, ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"))
STANDARD = Flavour("tensorrt", "tensorrt", False, ())
FLAVOURS = {flavour.module: flavour for flavour in (RTX, STANDARD)}
DEFAULT_CAPABILITIES = ("8.6", "8.9", "12.0")
"""The three generations of consumer GPUs that take all of our precisions; each engine holds all weights again."""


@dataclasses.dataclass(frozen=True)
class TimingCache:
    """A timing cache of the standard flavour, pinned: the same choices of kernels, build after build.

    Attributes:
        path: a file `timing.cache` of an earlier artifact.
        sha256: of its content.
    """

    path: Path
    sha256: str

    def read(self) -> bytes:
        """The content.

        Raises:
            UsageError: no such file, or it is another one.
        """
        try:
            content = Path(self.path).read_bytes()
        except OSError as error:
            raise UsageError(
                f"The timing cache '{self.path}' cannot be read: {error.strerror or error}. Give the file that an "
                "earlier artifact holds as 'timing.cache'."
            ) from error
        observed = hashlib.sha256(content).hexdigest()
        if observed != self.sha256:
            raise UsageError(
                f"The timing cache '{self.path}' is not the pinned one: its SHA-256 is {observed}, expected "
                f"{self.sha256}. Give the pinned file, or pin this one."
            )
        return content


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one target.

    Attributes:
        compute_capabilities: one engine each, such as `8.6`; for the standard flavour it is the GPU's own.
        flavour: `tensorrt_rtx`, `tensorrt`, or `auto`: the standard one where it is installed.
        surgery: functions on the `onnx_graphsurgeon.Graph`, applied last, in order, after those of
            installed packages; each changes the graph in place or returns another. Where they put in a plugin,
            they give its node a domain of its own.
        timing_cache: standard flavour only.
    """

    compute_capabilities: tuple[str, ...] = DEFAULT_CAPABILITIES
    flavour: str = "auto"
    surgery: tuple[Surgery, ...] = ()
    timing_cache: TimingCache | None = None

    def __post_init__(self) -> None:
        if self.flavour != "auto" and self.flavour not in FLAVOURS:
            known = ", ".join(f"'{name}'" for name in ("auto", *FLAVOURS))
            raise UsageError(f"Unknown TensorRT flavour '{self.flavour}'; choose one of {known}.")
        listed = tuple(str(capability) for capability in self.compute_capabilities)
        unknown = [c for c in listed if c not in RTX.compute_capabilities]
        if unknown or not listed or len(set(listed)) < len(listed):
            raise UsageError(
                f"Compute capabilities {list(listed)} cannot be built for; list each once, from "
                f"{', '.join(RTX.compute_capabilities)}."
            )
        if self.timing_cache is not None and self.flavour == RTX.module:
            raise UsageError("Flavour 'tensorrt_rtx' times nothing when it builds; leave 'timing_cache' out.")
        object.__setattr__(self, "compute_capabilities", listed)
        object.__setattr__(self, "surgery", tuple(self.surgery))

    def chosen(self) -> Flavour:
        """The flavour; nothing is imported. Where none is installed, the one that the extra installs."""
        if self.flavour != "auto":
            return FLAVOURS[self.flavour]
        return STANDARD if importlib.util.find_spec(STANDARD.module) is not None else RTX

    def hooks(self) -> tuple[tuple[str, Surgery], ...]:
        """Name and function of every surgery, in the order in which they are applied.

        Raises:
            UsageError: an installed one cannot be imported.
        """
        installed = tuple((name, SURGERY.load(name)) for name in SURGERY.names())
        given = tuple((getattr(hook, "__name__", type(hook).__name__), hook) for hook in self.surgery)
        for name, hook in (*installed, *given):
            if not callable(hook):
                raise UsageError(f"TensorRT surgery '{name}' is no function of an onnx_graphsurgeon.Graph.")
        return (*installed, *given)
