"""Parameterized models: convolutional networks generated over depth, width, resolution and kernel size.

    image [1, 3, r, r] → Conv k×k 3→w, ReLU → (d − 1) × (Conv k×k w→w, ReLU) → global average → linear w→10

with stride 1 and borders padded, so that

    MACs = r² k² (3 w + (d − 1) w²) + 10 w
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sartor.ir.program import Program

DEPTHS = (1, 2, 4, 8, 16)
WIDTHS = (8, 16, 32, 64, 128, 256)
RESOLUTIONS = (8, 16, 32, 64, 128)
KERNELS = (1, 3, 5)
SMALLEST_FLOP = 3e4
LARGEST_FLOP = (1e8, 2e10)
"""Bounds of the largest member, which otherwise is `BEYOND` times the largest real model."""
BEYOND = 4.0
MOST = 72
_BINS_PER_DECADE = 3
_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Member:
    """One network of the family.

    Attributes:
        depth: convolutions.
        width: their channels.
        resolution: pixels on a side.
        kernel: size of the convolutions.
    """

    depth: int
    width: int
    resolution: int
    kernel: int

    @property
    def name(self) -> str:
        """Such as `d4-w64-r32-k3`."""
        return f"d{self.depth}-w{self.width}-r{self.resolution}-k{self.kernel}"

    @property
    def flop(self) -> int:
        """Floating-point operations of one inference, 2 per MAC."""
        per_pixel = 3 * self.width + (self.depth - 1) * self.width**2
        return 2 * (self.resolution**2 * self.kernel**2 * per_pixel + _CLASSES * self.width)

    def build(self, seed: int = 0) -> Program:
        """The network with random weights that keep activations of order one."""
        from onnx import TensorProto, helper, numpy_helper, save

        from sartor.ir.load import load
        from sartor.ir.program import CANONICAL_IR_VERSION, CANONICAL_OPSET

        draw = np.random.default_rng(seed).standard_normal
        constants, nodes, value, inputs = [], [], "x", 3
        pads = [self.kernel // 2] * 4
        for index in range(self.depth):
            shape = (self.width, inputs, self.kernel, self.kernel)
            scale = math.sqrt(2 / math.prod(shape[1:]))
            constants += [
                numpy_helper.from_array((draw(shape) * scale).astype(np.float32), f"w{index}"),
                numpy_helper.from_array((0.1 * draw(self.width)).astype(np.float32), f"b{index}"),
            ]
            operands = [value, f"w{index}", f"b{index}"]
            nodes += [
                helper.make_node("Conv", operands, [f"c{index}"], name=f"conv{index}", pads=pads),
                helper.make_node("Relu", [f"c{index}"], [f"r{index}"], name=f"relu{index}"),
            ]
            value, inputs = f"r{index}", self.width
        weight = (draw((_CLASSES, self.width)) / math.sqrt(self.width)).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, "head"))
        nodes += [
            helper.make_node("GlobalAveragePool", [value], ["pooled"], name="pool"),
            helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten", axis=1),
            helper.make_node("Gemm", ["flat", "head"], ["y"], name="linear", transB=1),
        ]
        graph = helper.make_graph(
            nodes,
            self.name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, self.resolution, self.resolution])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, _CLASSES])],
            constants,
        )
        opset = [helper.make_opsetid("", CANONICAL_OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=CANONICAL_IR_VERSION)
        with tempfile.TemporaryDirectory(prefix="sartor-bench-") as folder:
            path = Path(folder) / f"{self.name}.onnx"
            save(model, path)
            return load(path)


def ladder(largest_real_flop: float, seed: int = 0) -> list[Member]:
    """Members in the order in which they are measured, as far as the time goes.

    First one per decade of size, from the cheapest to the dearest, so that little time still sees the whole range;
    then the sizes in between; then other shapes of the same sizes, again the cheapest first. The first of each size
    is the widest, which uses most devices best.

    Args:
        largest_real_flop: of the real models; the family goes beyond it.
        seed: of the order of shapes within a size.
    """
    largest = min(max(BEYOND * largest_real_flop, LARGEST_FLOP[0]), LARGEST_FLOP[1])
    bins: dict[int, list[Member]] = {}
    for shape in itertools.product(DEPTHS, WIDTHS, RESOLUTIONS, KERNELS):
        member = Member(*shape)
        if SMALLEST_FLOP <= member.flop <= largest:
            bins.setdefault(math.floor(_BINS_PER_DECADE * math.log10(member.flop)), []).append(member)
    generator = random.Random(seed)
    for members in bins.values():
        members.sort(key=lambda m: (m.depth > 1, m.width, m.resolution, m.depth))  # at depth 1: 3 inputs
        widest = members.pop()
        generator.shuffle(members)
        members.insert(0, widest)
    sizes = sorted(bins)
    coarse = sizes[(len(sizes) - 1) % _BINS_PER_DECADE :: _BINS_PER_DECADE]  # the largest is one of them
    first = [bins[size].pop(0) for size in coarse]
    between = [bins[size].pop(0) for size in sizes if size not in coarse]
    passes = itertools.zip_longest(*(bins[size] for size in sizes))
    others = [member for level in passes for member in level if member is not None]
    return [*first, *between, *others][:MOST]
