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


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Variance-preserving weights or inputs."""
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
    return (np.random.default_rng(seed).standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)


def mixed_cnn() -> Program:
    """Convolutions (one depthwise), pooling, concatenation, a gate, attention-like softmax, a linear layer."""
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], "conv0", **pads),
        node("Relu", ["c0"], ["r0"], "relu0"),
        node("Conv", ["r0", "w1", "b1"], ["c1"], "depthwise", group=8, **pads),
        node("Add", ["c1", "r0"], ["a1"], "add"),
        node("MaxPool", ["a1"], ["m"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Sigmoid", ["m"], ["g"], "gate"),
        node("Mul", ["m", "g"], ["s"], "swish"),
        node("Concat", ["s", "m"], ["k"], "join", axis=1),
        node("GlobalAveragePool", ["k"], ["p"], "mean"),
        node("Flatten", ["p"], ["f"], "flatten", axis=1),
        node("Softmax", ["f"], ["q"], "softmax", axis=1),
        node("Gemm", ["f", "w2", "b2"], ["y"], "linear", transB=1),
    ]
    weights = {
        **{
            "w0": draw(8, 3, 3, 3),
            "b0": draw(8, seed=1),
            "w1": draw(8, 1, 3, 3, seed=2),
            "b1": draw(8, seed=3),
        },
        **{"w2": draw(5, 16, seed=4), "b2": draw(5, seed=5)},
    }
    return program_from_nodes(nodes, {"x": ("N", 3, 8, 8)}, ["y", "q"], weights)


def quantized(program: Program) -> Program:
    """As `fold-batch-norm,quantize` makes it, on random data."""
    from sartor.passes.base import Context
    from sartor.passes.pipeline import Pipeline
    from sartor.passes.quantize import Quantize

    folded = Pipeline.parse("fold-batch-norm").run(program).program
    shapes = {name: (16, *shape[1:]) for name, shape in folded.input_shapes.items()}
    inputs = {name: draw(*shape, seed=9) for name, shape in shapes.items()}
    return Quantize().run(folded, Context(data={"calibration": [(inputs, None)]})).program
