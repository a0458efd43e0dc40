"""Small programs for the backend tests; every weight and statistic is random, variance preserving."""

from __future__ import annotations

import numpy as np
from builders import node, program_from_nodes

from sartor.ir.program import Program


def small_cnn(width: int = 32, size: int = 16, seed: int = 0) -> Program:
    """conv-bn-relu, conv, residual add, relu, global pool, flatten, linear; `N` symbolic."""
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        return (generator.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], "conv0", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c0", "gamma", "beta", "mean", "var"], ["n0"], "norm0"),
        node("Relu", ["n0"], ["r0"], "relu0"),
        node("Conv", ["r0", "w1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        node("Add", ["c1", "r0"], ["a1"], "add1"),
        node("Relu", ["a1"], ["r1"], "relu1"),
        node("GlobalAveragePool", ["r1"], ["p"], "pool"),
        node("Flatten", ["p"], ["f"], "flatten", axis=1),
        node("Gemm", ["f", "w2", "b2"], ["y"], "linear", transB=1),
    ]
    weights = {
        "w0": draw(width, 3, 3, 3),
        "b0": 0.3 * draw(width),
        "gamma": generator.uniform(0.6, 1.4, width).astype(np.float32),
        "beta": 0.3 * draw(width),
        "mean": 0.3 * draw(width),
        "var": generator.uniform(0.6, 1.4, width).astype(np.float32),
        "w1": draw(width, width, 3, 3),
        "w2": draw(10, width),
        "b2": 0.3 * draw(10),
    }
    return program_from_nodes(nodes, {"x": ("N", 3, size, size)}, ["y"], weights)
