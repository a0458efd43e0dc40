"""Inputs for measuring: seeded, of the right type, free of denormals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from sartor.backends.protocol import TensorSpec
from sartor.errors import UsageError


def random_inputs(
    specs: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, np.ndarray]:
    """Standard normal floats; integers in {0, 1}, which are legal indices of any axis of two or more.

    Args:
        specs: the input contract.
        shapes: concrete shapes; an input without one needs a fully concrete contract.
        seed: equal seeds give equal inputs.

    Raises:
        UsageError: an input has no concrete shape, or a type that numbers cannot be drawn for.
    """
    generator = np.random.default_rng(seed)
    made = {}
    for spec in specs:
        shape = shapes.get(spec.name, spec.shape)
        if not all(isinstance(dim, int) for dim in shape):
            raise UsageError(
                f"Input '{spec.name}' has shape {list(shape)}, which is not concrete. Give it with "
                f"--shape {spec.name}=1,3,224,224."
            )
        made[spec.name] = _draw(spec, tuple(int(d) for d in shape), generator)
    return made


def _draw(spec: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    if spec.dtype in ("float32", "float64", "float16"):
        return np.asarray(generator.standard_normal(shape), dtype=spec.dtype)
    if spec.dtype in ("uint8", "int8"):
        info = np.iinfo(spec.dtype)
        return generator.integers(info.min, info.max + 1, shape).astype(spec.dtype)
    if spec.dtype == "bool" or spec.dtype.startswith(("int", "uint")):
        return np.asarray(generator.integers(0, 2, shape)).astype(spec.dtype)
    raise UsageError(f"Input '{spec.name}' has type {spec.dtype}; pass its values explicitly.")
