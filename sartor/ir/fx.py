"""The FX twin: a canonical program as a trainable, float64-capable `torch.fx.GraphModule`.

* Float initializers become parameters under their own names (a dotted name nests modules); running
  statistics of BatchNormalization, integer tensors and one-element arithmetic constants become buffers.
  A name that torch cannot hold gets another one; `twin_info(gm).names` maps every key back.
* Shapes, axes and counts become Python numbers, so the batch size stays free and `torch.export` works.
* `forward` takes the graph inputs in order and returns a *tuple* of the graph outputs in order.
* `gm.train()` / `gm.eval()` choose batch or running statistics in BatchNormalization.
* Functions (domain `sartor` included) are executed by expanding their bodies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from sartor.errors import InternalError, UsageError
from sartor.ir.fx_build import INFO, Builder, TwinInfo
from sartor.ir.fx_run import Runner
from sartor.ir.fx_tensors import to_array, to_tensor
from sartor.ir.program import Program

__all__ = ["TwinInfo", "pull_weights", "run_twin", "to_array", "to_fx", "to_tensor", "twin_info"]


def twin_info(gm: fx.GraphModule) -> TwinInfo:
    """The `TwinInfo` of a module made by `to_fx`.

    Raises:
        UsageError: the module was not made by `to_fx`.
    """
    info = gm.meta.get(INFO)
    if not isinstance(info, TwinInfo):
        raise UsageError("This GraphModule is not an FX twin; make it with sartor.ir.fx.to_fx(program).")
    return info


def to_fx(
    program: Program, *, dtype: torch.dtype | str | None = None, taps: Sequence[str] = ()
) -> fx.GraphModule:
    """Convert the main graph into a GraphModule in eval mode; see the module docstring.

    Args:
        program: a canonical program.
        dtype: replaces every float type, casts included: `torch.float64` gives a reference executor.
        taps: names of further values to return after the graph outputs.

    Raises:
        UnsupportedOperatorError: an operator, attribute or element type has no torch counterpart, or a
            shape depends on data; names the node and its source.
        UsageError: a tap names no value.
    """
    return Builder(program, _torch_dtype(dtype)).build(tuple(taps))


def run_twin(
    program: Program,
    inputs: Mapping[str, np.ndarray],
    dtype: torch.dtype | str | None = "float64",
    taps: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Execute the program on its twin in eval mode.

    Args:
        program: a canonical program.
        inputs: one array per graph input; floats are converted to `dtype`.
        dtype: float type of the whole computation, or None for the stored types.
        taps: names of intermediate values to return as well.

    Returns:
        Arrays by name: every graph output, then every tap.

    Raises:
        UsageError: an input or a tap is missing.
        ModelError: a node fails; names it.
    """
    runner = Runner(program, _torch_dtype(dtype), taps=taps)
    tensors = [to_tensor(_given(inputs, name), runner.info.dtype) for name in runner.info.inputs]
    with torch.no_grad():
        return {name: to_array(result) for name, result in runner(tensors).items()}


def pull_weights(program: Program, gm: fx.GraphModule) -> Program:
    """A clone of `program` with the tensors of its twin written back: parameters and buffers.

    Names, element types and the graph stay; a tensor that has not changed stays shared.

    Raises:
        UsageError: `gm` is a twin of another program.
        InternalError: a tensor changed its shape.
    """
    result = program.clone()
    state = gm.state_dict()
    for key, name in twin_info(gm).names.items():
        value = result.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise UsageError(f"The twin has a tensor for '{name}', which is no initializer of this program.")
        old = value.const_value.numpy()
        new = to_array(state[key]).astype(old.dtype)
        if new.shape != old.shape:
            raise InternalError(f"Initializer '{name}' has shape {old.shape}, its twin has {new.shape}.")
        if not np.array_equal(new, old, equal_nan=new.dtype.kind == "f"):
            value.const_value = ir.Tensor(new, name=name)
    result.invalidate()
    return result


def _given(inputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in inputs:
        raise UsageError(
            f"Graph input '{name}' is missing, given were {sorted(inputs)}. Pass one array per input."
        )
    return inputs[name]


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved is not None and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise UsageError(f"'{dtype}' is no float type of torch; use 'float32' or 'float64'.")
    if isinstance(dtype, str) and resolved is None:
        raise UsageError(f"'{dtype}' is no float type of torch; use 'float32' or 'float64'.")
    return resolved
