"""The table of the kit's models: tiny networks per family of operators, and samples of real ones."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from sartor.conformance.draft import Build, Draft

if TYPE_CHECKING:
    from sartor.ir.program import Program

FLOAT = ("f32",)
HALF = ("f32", "bf16", "f16")
ALL = ("f32", "bf16", "f16", "int8")


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of the kit.

    Attributes:
        name: in check ids.
        family: operators that belong together.
        text: what it is, for reports.
        build: writes it into a draft.
        precisions: precisions that it is compared in, where the backend claims them.
    """

    name: str
    family: str
    text: str
    build: Build
    precisions: tuple[str, ...]

    @property
    def shallow(self) -> bool:
        """Of so few layers that errors do not add up: it is held to closer tolerances."""
        return self.family not in ("block", "network", "control flow")

    def program(self, precision: str) -> Program:
        """The canonical program, at its reference shapes; the same at every call."""
        return _program(self.name, precision).clone()


@functools.cache
def models() -> Mapping[str, Model]:
    """Every model by name, in the order of the suite."""
    from sartor.conformance import blocks, layers, operators, samples

    found = [*layers.MODELS, *operators.MODELS, *blocks.MODELS, *samples.MODELS]
    return {model.name: model for model in found}


def declare(into: list[Model], family: str, precisions: tuple[str, ...] = FLOAT) -> Callable[[Build], Build]:
    """Register a build function: its name and docstring are those of the model."""

    def register(build: Build) -> Build:
        name = build.__name__.replace("_", "-")
        into.append(Model(name, family, (build.__doc__ or "").strip(), build, precisions))
        return build

    return register


def sample_inputs(program: Program, seed: int, batch: int | None = None) -> dict[str, np.ndarray]:
    """Inputs on which a mix-up shows: normal values on a slope along every axis, so that no two places of a
    tensor are alike and no axis can be reversed. A boolean input alternates with the seed.

    Args:
        program: whose inputs.
        seed: of the values.
        batch: size of the batch axis instead of that of the reference shapes.
    """
    names = ",".join(value.name or "" for value in program.graph.inputs)
    generator = np.random.default_rng([seed, zlib.crc32(names.encode())])
    made: dict[str, np.ndarray] = {}
    for value in program.graph.inputs:
        name = value.name or ""
        shape = list(program.input_shapes[name])
        if batch is not None and name in program.batch.inputs:
            shape[0] = batch
        dtype = np.dtype(value.dtype.numpy() if value.dtype is not None else np.float32)
        if dtype == np.bool_:
            made[name] = np.full(shape, seed % 2 == 0)
        elif dtype.kind in "iu":
            made[name] = generator.integers(0, 4, shape).astype(dtype)
        else:
            made[name] = (0.7 * generator.standard_normal(shape) + _slope(shape)).astype(dtype)
    return made


def output_steps(program: Program) -> dict[str, float]:
    """Scale of every output that DequantizeLinear gives: all outputs of the kit's quantized models, no other's."""
    steps = {}
    for value in program.graph.outputs:
        node = value.producer()
        while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        scale = node.inputs[1] if node is not None and node.op_type == "DequantizeLinear" else None
        if scale is not None and scale.const_value is not None:
            steps[value.name or ""] = float(scale.const_value.numpy())
    return steps


def _slope(shape: list[int]) -> np.ndarray:
    total = np.zeros(shape)
    for axis, size in enumerate(shape):
        steepness = 0.5 + 0.25 * axis  # axes differ, or a transposition could not be told
        ramp = np.linspace(-steepness, steepness, size) if size > 1 else np.zeros(size)
        total += ramp.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return total


@functools.cache
def _program(name: str, precision: str) -> Program:
    draft = Draft(precision, zlib.crc32(name.encode()))
    models()[name].build(draft)
    return draft.program()
