"""The backend under test: its artifacts and sessions, made once and shared by the checks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sartor import backends
from sartor.backends.protocol import Artifact, Backend, Capabilities, Session, TargetOptions
from sartor.conformance.check import Failed, Skipped, describe
from sartor.conformance.models import Model, models, sample_inputs
from sartor.errors import SartorError

if TYPE_CHECKING:
    from sartor.ir.fx_run import Runner
    from sartor.ir.program import Program


class Subject:
    """One registered backend.

    Args:
        name: registered name.
        scratch: an empty folder for artifacts.
    """

    def __init__(self, name: str, scratch: Path):
        self.name = name
        self.scratch = scratch
        self._artifacts: dict[tuple[str, str], Artifact] = {}
        self._sessions: dict[tuple[str, str], Session] = {}
        self._twins: dict[tuple[str, str], Runner] = {}
        self._references: dict[tuple[str, str, int, int | None], dict[str, np.ndarray]] = {}
        self._folders = 0

    @functools.cached_property
    def backend(self) -> Backend:
        """The backend, or the error with which it cannot be had."""
        return backends.get(self.name)

    @functools.cached_property
    def capabilities(self) -> Capabilities:
        """What it says of itself."""
        return self.backend.capabilities()

    def require_precision(self, precision: str) -> None:
        """Skip a check about a precision that is not claimed."""
        if precision not in self.capabilities.precisions:
            claimed = ", ".join(self.capabilities.precisions)
            raise Skipped(f"The backend does not claim '{precision}'; it claims {claimed}.")

    def options(self, program: Program, precision: str = "f32") -> TargetOptions:
        """One thread, the program's reference shapes."""
        return TargetOptions(precision=precision, shapes=program.input_shapes)

    def folder(self) -> Path:
        """A path in the scratch folder where nothing is yet."""
        self._folders += 1
        return self.scratch / f"{self._folders}" / "artifact"

    def program(self, model: str, precision: str = "f32") -> Program:
        """A program of the kit that the backend's legality accepts; otherwise the check is skipped."""
        self.require_precision(precision)
        entry = models()[model]
        program = entry.program(precision)
        report = self.backend.legality(program, self.options(program, precision))
        if not report.ok:
            raise Skipped(f"Not legal for this target: {report.violations[0]}")
        return program

    def any_program(self, *preferred: str, precision: str = "f32") -> tuple[Model, Program]:
        """The first legal program of `preferred`, or of the whole kit."""
        self.require_precision(precision)
        for name in dict.fromkeys([*preferred, *models()]):
            if precision not in models()[name].precisions:
                continue
            try:
                return models()[name], self.program(name, precision)
            except Skipped:
                continue
        raise Failed(f"No model of the kit is legal in '{precision}', which the backend claims.")

    def artifact(self, model: str, precision: str = "f32") -> Artifact:
        """The model, lowered in this process."""
        key = (model, precision)
        if key not in self._artifacts:
            program = self.program(model, precision)
            try:
                self._artifacts[key] = self.backend.lower(
                    program, self.folder(), self.options(program, precision)
                )
            except SartorError as error:
                raise Failed(
                    f"Legality accepts model '{model}', lower does not: {describe(error)}"
                ) from error
        return self._artifacts[key]

    def session(self, model: str, precision: str = "f32") -> Session:
        """A session on the artifact, at its reference shapes."""
        key = (model, precision)
        if key not in self._sessions:
            artifact = self.artifact(model, precision)
            self.require_runs_here()
            program = models()[model].program(precision)
            self._sessions[key] = self.backend.load(artifact, self.options(program, precision))
        return self._sessions[key]

    def require_runs_here(self) -> None:
        """Skip a check that runs an artifact where the backend says that this machine cannot."""
        if self.capabilities.not_run_here:
            raise Skipped(f"The backend lowers here and does not run here: {self.capabilities.not_run_here}")

    def takes_any_batch(self, model: str, precision: str = "f32") -> bool:
        """The artifact has a symbolic batch."""
        symbolic = models()[model].program(precision).batch.symbolic
        specs = self.artifact(model, precision).inputs
        return symbolic and any(spec.shape and isinstance(spec.shape[0], str) for spec in specs)

    def inputs(
        self, model: str, precision: str = "f32", seed: int = 0, batch: int | None = None
    ) -> dict[str, np.ndarray]:
        """Inputs of the model, at its reference shapes but for the batch."""
        return sample_inputs(models()[model].program(precision), seed, batch)

    def reference(
        self, model: str, precision: str = "f32", seed: int = 0, batch: int | None = None
    ) -> dict[str, np.ndarray]:
        """What the FX twin in float64 computes of `inputs`."""
        import torch

        from sartor.ir.fx import to_array, to_tensor
        from sartor.ir.fx_run import Runner

        key = (model, precision, seed, batch)
        if key not in self._references:
            if (model, precision) not in self._twins:  # building one takes longer than running it
                self._twins[model, precision] = Runner(models()[model].program(precision), torch.float64)
            twin, inputs = self._twins[model, precision], self.inputs(model, precision, seed, batch)
            with torch.no_grad():
                outputs = twin([to_tensor(inputs[name], torch.float64) for name in twin.info.inputs])
            self._references[key] = {name: to_array(tensor) for name, tensor in outputs.items()}
        return self._references[key]
