"""Names of strategies: built-ins and entry points of group `sartor.strategies`, imported on first use."""

from __future__ import annotations

from sartor.plugins import Registry

_HERE = "sartor.strategies"
REGISTRY = Registry(
    "sartor.strategies",
    "strategy",
    {
        "adaptscale": f"{_HERE}.adaptscale:AdaptScale",
        "auto": f"{_HERE}.auto:Auto",
        "budgeted-greedy": f"{_HERE}.budgeted_greedy:BudgetedGreedy",
        "compound-shrink": f"{_HERE}.compound_shrink:CompoundShrink",
        "hacscale": f"{_HERE}.hacscale:HacScale",
        "layerprune": f"{_HERE}.layerprune:LayerPrune",
        "nsga2": f"{_HERE}.nsga2:Nsga2",
        "teco": f"{_HERE}.teco:Teco",
        "tico": f"{_HERE}.tico:Tico",
        "uniform": f"{_HERE}.uniform:Uniform",
    },
)
