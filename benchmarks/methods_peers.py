"""What strategies are compared with: Torch-Pruning's own recipes, and the architecture shrunk and trained anew.

Each is made smaller until its measured latency is within the budget, by bisection, and then trained by the same
recovery for the same minutes.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEERS = ("torch-pruning-uniform", "torch-pruning-taylor", "from-scratch")
LEARNING_RATES = {"from-scratch": 3e-3}
"""Fresh weights take larger steps than weights that are repaired."""
_BISECTIONS = 7
_MEASURE_S = 6.0
_INSIDE = 0.995


def made(dataset: Any, program: Any, data: Any, budget: float, peer: str, folder: Path) -> dict[str, Any]:
    """What a peer leaves of a network, in `folder`, and what it took."""
    import torch

    import sartor
    from sartor.budget import parse_budget
    from sartor.workbench import Workbench, static_costs

    torch.manual_seed(0)
    options = sartor.FitOptions("onnxruntime", parse_budget(f"latency={budget}x"))
    network, examples = getattr(_module(dataset), dataset.network)()
    makers: dict[str, Callable[[float], Any]] = {
        "torch-pruning-uniform": lambda ratio: _pruned(network, examples, data, ratio, taylor=False),
        "torch-pruning-taylor": lambda ratio: _pruned(network, examples, data, ratio, taylor=True),
        "from-scratch": lambda ratio: _module(dataset).scaled(1.0 - ratio).eval(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        bench = Workbench(program, options, data, Path(scratch))
        with contextlib.closing(bench):
            start = time.perf_counter()
            best = _within(makers[peer], examples, bench, budget)
            search_s = time.perf_counter() - start
            if best is None:
                return {"refused": "no ratio is within the budget"}
            artifact = bench.lower(best, Path(scratch) / "final")
            measured = bench.measure([bench.baseline, artifact], 30.0, seed=1).ratios[0]
    best.save(folder / "network.onnx")
    return {
        "latency_ratio": measured.latency,
        "met": measured.latency_ci95[1] <= budget,
        "macs": static_costs(best)["macs"],
        "search_s": search_s,
    }


def _within(made: Callable[[float], Any], examples: Any, bench: Any, budget: float) -> Any:
    """The least pruned program whose measured latency is within the budget."""
    import sartor

    low, high, best = 0.0, 0.95, None
    for step in range(_BISECTIONS):
        ratio = (low + high) / 2
        program = sartor.capture(made(ratio), examples, name="peer")
        artifact = bench.lower(program, bench.folder / f"peer{step}")
        upper = bench.measure([bench.baseline, artifact], _MEASURE_S).ratios[0].latency_ci95[1]
        if upper <= budget * _INSIDE:
            best, high = program, ratio
        else:
            low = ratio
    return best


def _module(dataset: Any) -> Any:
    """The example's `model.py`, under a name of its own."""
    name = f"methods_{dataset.folder.name}_model"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, dataset.folder / "model.py")
        assert spec is not None and spec.loader is not None
        sys.path.insert(0, str(dataset.folder))
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.path.remove(str(dataset.folder))
    return sys.modules[name]


def _pruned(network: Any, examples: Any, data: Any, ratio: float, *, taylor: bool) -> Any:
    """As Torch-Pruning's examples do it: one share for all layers by magnitude, or global by gradients."""
    import torch
    import torch_pruning

    module = copy.deepcopy(network).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    last = [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1]
    importance = (
        torch_pruning.importance.GroupTaylorImportance()
        if taylor
        else torch_pruning.importance.GroupMagnitudeImportance(p=2)
    )
    pruner = torch_pruning.pruner.BasePruner(
        module,
        examples,
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=taylor,
        ignored_layers=[last],
    )
    if taylor:
        for inputs, labels in data.calibration:
            images = torch.from_numpy(next(iter(inputs.values())))
            torch.nn.functional.cross_entropy(module(images), torch.from_numpy(labels)).backward()
    pruner.step()
    module.zero_grad()
    return module.eval()
