"""What strategies are compared with: Torch-Pruning's own recipes, and the architecture shrunk and trained anew.

Each is made smaller until its measured latency is within the budget, by bisection, and then trained by the same
recovery for the same minutes.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEERS = ("torch-pruning-uniform", "torch-pruning-taylor", "from-scratch")
_BISECTIONS = 7
_MEASURE_S = 6.0
_INSIDE = 0.995


def row(dataset: Any, budget: float, peer: str, seed: int) -> dict[str, Any]:
    """One peer on one data set."""
    import torch

    import sartor
    from sartor.budget import parse_budget
    from sartor.data import load_data
    from sartor.workbench import Workbench, static_costs

    torch.manual_seed(seed)
    program = sartor.load(dataset.folder / "model.onnx")
    data = load_data(
        f"{dataset.folder / 'data.py'}:{dataset.data}", list(program.input_shapes), seed, program=program
    )
    options = sartor.FitOptions("onnxruntime", parse_budget(f"latency={budget}x"), seed=seed)
    network, examples = _network(dataset)
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(program, options, data, Path(folder))
        try:
            start = time.perf_counter()
            made: Callable[[float], Any] = {
                "torch-pruning-uniform": lambda ratio: _pruned(network, examples, data, ratio, taylor=False),
                "torch-pruning-taylor": lambda ratio: _pruned(network, examples, data, ratio, taylor=True),
                "from-scratch": lambda ratio: _smaller(dataset, 1.0 - ratio),
            }[peer]
            best = _within(made, examples, bench, budget)
            search_s = time.perf_counter() - start
            if best is None:
                return {"refused": "no ratio is within the budget"}
            recovered = _recovered(best, program, data, dataset.minutes, seed, scratch=peer == "from-scratch")
            artifact = bench.lower(recovered, Path(folder) / "final")
            measured = bench.measure([bench.baseline, artifact], 30.0, seed=seed + 1).ratios[0]
            score, before = bench.score(artifact, "test")[0], bench.score(bench.exact, "test")[0]
        finally:
            bench.close()
    return {
        "score": score,
        "score_before": before,
        "latency_ratio": measured.latency,
        "met": measured.latency_ci95[1] <= budget,
        "macs": static_costs(recovered)["macs"],
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


def _network(dataset: Any) -> tuple[Any, Any]:
    return getattr(_module(dataset), dataset.network)()


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


def _smaller(dataset: Any, width: float) -> Any:
    """The same architecture with every width scaled, and fresh weights."""
    return _module(dataset).scaled(width).eval()


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


def _recovered(program: Any, original: Any, data: Any, minutes: float, seed: int, *, scratch: bool) -> Any:
    from sartor.recovery.distillation import distill
    from sartor.scoring import score

    return distill(
        program,
        original,
        data.train,
        minutes=minutes,
        seed=seed,
        learning_rate=_SCRATCH_RATE if scratch else None,
        evaluate=lambda predict: score(predict, data.evaluate, data.metric)[0],
    ).program


_SCRATCH_RATE = 3e-3
"""Fresh weights take larger steps than weights that are repaired."""
