"""Programs with further outputs, to look inside of what a target makes of them, and their reference in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from sartor.ir.batch import as_fixed
from sartor.ir.program import Program

if TYPE_CHECKING:
    from sartor.backends.protocol import Artifact, TargetOptions

Inputs = Mapping[str, np.ndarray]
_MOST_TAPS = 2000


class Reference:
    """Values of a program on every sample, on its twin in float64; each sample is computed once.

    Args:
        program: without a tail.
        samples: inputs.
        taps: names of values of the main graph that are wanted beside the outputs.

    Attributes:
        constants: those of them that are initializers.
    """

    def __init__(self, program: Program, samples: Sequence[Inputs], taps: Collection[str] = ()):
        self.program, self.samples = program, samples
        outputs = {value.name for value in program.graph.outputs}
        constants = program.initializers
        self.taps = tuple(n for n in dict.fromkeys(taps) if n not in outputs and n not in constants)
        self.constants = {name: program.initializer_array(name) for name in taps if name in constants}
        self._known: dict[int, dict[str, np.ndarray]] = {}
        self._runner: Any = None

    def names(self) -> set[str]:
        """Values that are given."""
        return {value.name or "" for value in self.program.graph.outputs} | set(self.taps)

    def on(self, index: int) -> dict[str, np.ndarray]:
        """Outputs and taps on one sample, by name."""
        import torch

        from sartor.ir.fx import to_array
        from sartor.ir.fx_run import Runner

        if index not in self._known:
            self._runner = self._runner or Runner(self.program, torch.float64, taps=self.taps)
            found = on_twin(self._runner, self.samples[index])
            computed = {name: to_array(tensor) for name, tensor in found.items()}
            self._known[index] = {**self.constants, **computed}
        return self._known[index]


def on_twin(runner: Any, inputs: Inputs) -> dict[str, Any]:
    """Tensors by name of a `sartor.ir.fx_run.Runner` on these inputs."""
    import torch

    from sartor.ir.fx import to_tensor

    with torch.no_grad():
        found: dict[str, Any] = runner([to_tensor(inputs[n], runner.info.dtype) for n in runner.info.inputs])
    return found


def computed(program: Program) -> set[str]:
    """Names of the values that nodes of the main graph compute."""
    return {value.name or "" for node in program.graph for value in node.outputs}


def lower_like(program: Program, like: Artifact, folder: Path, options: TargetOptions) -> Artifact:
    """Lower `program` to the target of an artifact, in its precision.

    Raises:
        BackendError: the target does not take it.
    """
    from sartor.backends import isolation

    return isolation.lower(
        like.target, program, folder, dataclasses.replace(options, precision=like.precision)
    )


def with_taps(program: Program, names: Collection[str] | None = None) -> tuple[Program, dict[str, str]]:
    """The program with these values of its main graph as outputs; default: every floating-point value.

    Returns:
        That program, and by value, in execution order, the place of the node that makes it.
    """
    shapes, types = program.shapes(), program.types()
    clone = as_fixed(program.clone(), "every value is an output, each with a shape of its own")
    present = {value.name for value in clone.graph.outputs}
    makers: dict[str, str] = {}
    for node in clone.graph:
        for value in node.outputs:
            name = value.name or ""
            wanted = name in shapes and (types[name].is_floating_point() if names is None else name in names)
            if wanted and (names is not None or len(makers) < _MOST_TAPS):
                makers[name] = program.where(node)
                if name not in present:
                    value.shape, value.type = ir.Shape(shapes[name]), ir.TensorType(types[name])
                    clone.graph.outputs.append(value)
    clone.invalidate()
    return clone, makers


def with_entering_values(program: Program) -> Program:
    """The program, its tail included, with the values that enter the tail as further outputs."""
    clone = program.clone()
    if clone.tail is not None:
        clone.tail = dataclasses.replace(clone.tail, added=frozenset())
    return clone
