"""The shape of a backend's folder: five modules, and a class that calls them.

    module       functions
    `legality`   `capabilities`, `channel_grid`, `rules`, `check`
    `legalize`   `legalize`
    `lower`      `lower`
    `run`        `load`, `compile_model`
    `measure`    `profile`

A module is imported when one of its functions is called, so that listing targets loads no vendor package.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from sartor.backends.protocol import (
    Artifact,
    Capabilities,
    KernelTime,
    LegalityReport,
    Session,
    TargetOptions,
)

if TYPE_CHECKING:
    from sartor.backends.legality import Rules
    from sartor.ir.program import Program


class LegalityModule(Protocol):
    """`legality`: what the target takes."""

    def capabilities(self) -> Capabilities:
        """See `Backend.capabilities`."""
        ...

    def channel_grid(self, op_type: str, precision: str, attributes: Mapping[str, Any] | None = None) -> int:
        """See `Backend.channel_grid`."""
        ...

    def rules(self) -> Rules:
        """See `Backend.rules`."""
        ...

    def check(self, program: Program, options: TargetOptions) -> LegalityReport:
        """The precision, then the rules, on a legalized program. Raises UsageError for a precision it lacks."""
        ...


class LegalizeModule(Protocol):
    """`legalize`: rewriting for the target."""

    def legalize(self, program: Program) -> Program:
        """See `Backend.legalize`."""
        ...


class LowerModule(Protocol):
    """`lower`: writing artifacts."""

    def lower(self, program: Program, folder: Path, options: TargetOptions) -> Artifact:
        """See `Backend.lower`; legalizes and checks by itself."""
        ...


class RunModule(Protocol):
    """`run`: sessions."""

    def load(self, artifact: Artifact, options: TargetOptions) -> Session:
        """See `Backend.load`."""
        ...

    def compile_model(self, model: bytes, options: TargetOptions) -> Session:
        """See `Backend.compile`."""
        ...


class MeasureModule(Protocol):
    """`measure`: profiles."""

    def profile(self, artifact: Artifact, options: TargetOptions, runs: int) -> list[KernelTime]:
        """See `Backend.profile`."""
        ...


class FolderBackend:
    """A backend that is the modules of its package. See `protocol.Backend` for what each method promises.

    A subclass gives `name` and `package`, and overrides what takes more than the arguments of the method.
    """

    name: str
    package: ClassVar[str]
    """Full name of the package: `__name__` in its `__init__.py`."""

    def capabilities(self) -> Capabilities:
        """Precisions, channel grid, version."""
        return cast(LegalityModule, self._module("legality")).capabilities()

    def channel_grid(
        self, op_type: str, precision: str = "f32", attributes: Mapping[str, Any] | None = None
    ) -> int:
        """Step of the channel count that costs time."""
        return cast(LegalityModule, self._module("legality")).channel_grid(op_type, precision, attributes)

    def rules(self) -> Rules:
        """The table of rules."""
        return cast(LegalityModule, self._module("legality")).rules()

    def legality(self, program: Program, options: TargetOptions) -> LegalityReport:
        """The rules, applied to the legalized program."""
        return cast(LegalityModule, self._module("legality")).check(self.legalize(program), options)

    def legalize(self, program: Program) -> Program:
        """An equal program that the target can run."""
        return cast(LegalizeModule, self._module("legalize")).legalize(program)

    def lower(self, program: Program, folder: Path, options: TargetOptions) -> Artifact:
        """Write the artifact."""
        return cast(LowerModule, self._module("lower")).lower(program, folder, options)

    def load(self, artifact: Artifact, options: TargetOptions) -> Session:
        """A session on an artifact."""
        return cast(RunModule, self._module("run")).load(artifact, options)

    def compile(self, model: bytes, options: TargetOptions) -> Session:
        """A session on a serialized ONNX model."""
        return cast(RunModule, self._module("run")).compile_model(model, options)

    def profile(self, artifact: Artifact, options: TargetOptions, runs: int = 20) -> list[KernelTime]:
        """Time per kernel."""
        return cast(MeasureModule, self._module("measure")).profile(artifact, options, runs)

    def _module(self, name: str) -> object:
        return importlib.import_module(f"{self.package}.{name}")
