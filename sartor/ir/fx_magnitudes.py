"""How large the numbers get that each node computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from sartor.ir.fx_run import Runner
from sartor.ir.fx_tensors import to_tensor
from sartor.ir.program import Program


class _Watching(Runner):
    """Keeps the largest magnitude of what every node of the program computes."""

    def __init__(self, program: Program):
        super().__init__(program, torch.float32)
        self.largest: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = n.meta.get("onnx_node")
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if name and isinstance(item, torch.Tensor) and item.is_floating_point() and item.numel():
                found = float(item.abs().max())
                # a comparison with NaN is false: what is no number counts as too large
                self.largest[name] = max(self.largest.get(name, 0.0), found if found == found else np.inf)
        return result


def largest_magnitudes(program: Program, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """max|y| over the results of every node of the main graph, by node name, in float32 on the FX twin.

    NaN counts as infinity. Nodes without floating results, and bodies of `If`, are absent.

    Raises:
        ModelError: a node fails; names it.
    """
    runner = _Watching(program)
    with torch.no_grad():
        for inputs in batches:
            runner([to_tensor(inputs[name], runner.info.dtype) for name in runner.info.inputs])
    return runner.largest
