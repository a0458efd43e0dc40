"""A generated network while it grows."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

from sartor.cost_models.model_builder import ModelBuilder
from sartor.profiling.design import width

_STEPS = ((256, 64), (64, 32), (8, 8), (0, 1))  # of designed widths, from a width on
ACTIVATIONS = ("Relu", "Relu", "Relu6", "Silu", "HardSwish", "Gelu")


class Net:
    """A network that grows from its input; `shape` is that of `value`.

    Args:
        rng: of what is drawn.
        edge: of the image.
        exported: means of maps and gates are spelled as exporters of training frameworks do.
        designed: widths are those of networks that were not pruned.
    """

    def __init__(self, rng: random.Random, edge: int, *, exported: bool = False, designed: bool = False):
        self.rng, self.exported, self.designed = rng, exported, designed
        self.model = ModelBuilder()
        self.value = self.model.input("image", (1, 3, edge, edge))
        self.shape: tuple[int, ...] = (1, 3, edge, edge)
        self.parameters, self.macs = 0, 0.0
        self._number = 0
        self.activation = rng.choice(ACTIVATIONS)

    def width(self, low: int, high: int) -> int:
        """A channel count; of designed networks a whole number of registers, and of blocks where there are many."""
        drawn = width(self.rng, low, high)
        step = next(step for least, step in _STEPS if drawn >= least) if self.designed else 1
        return max(step, step * round(drawn / step))

    def weight(self, dims: tuple[int, ...], fan_in: int) -> str:
        """Random numbers."""
        self._number += 1
        self.parameters += math.prod(dims)
        return self.model.weight(f"w{self._number}", dims, fan_in)

    def node(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        """Append a node, whose output is the value from now on."""
        self.value = self.model.node(op_type, inputs, attributes)
        return self.value

    def conv(
        self, c_out: int, kernel: int = 3, stride: int = 1, group: int = 1, act: str | None = None
    ) -> str:
        """A padded convolution with its bias, and its activation."""
        return self.conv_of(c_out, (kernel, kernel), stride, group, act)

    def conv_of(
        self, c_out: int, window: tuple[int, int], stride: int = 1, group: int = 1, act: str | None = None
    ) -> str:
        """As `conv`, with a window of two sides."""
        c_in = self.shape[1]
        pads = [0 if side == stride else side // 2 for side in window]
        taps = math.prod(window)
        inputs = [
            self.value,
            self.weight((c_out, c_in // group, *window), c_in // group * taps),
            self.weight((c_out,), 1),
        ]
        self.node("Conv", inputs, strides=[stride] * 2, pads=pads * 2, group=group)
        out = [
            (edge + 2 * pad - side) // stride + 1
            for edge, pad, side in zip(self.shape[2:], pads, window, strict=True)
        ]
        self.shape = (1, c_out, *out)
        self.macs += math.prod(self.shape) * c_in // group * taps
        return self.act(act) if act else self.value

    def act(self, kind: str) -> str:
        """An activation."""
        if kind == "Relu6":
            self._number += 1
            bounds = [
                self.model.constant(f"{b}{self._number}", v, "FLOAT") for b, v in (("a", 0.0), ("b", 6.0))
            ]
            return self.node("Clip", [self.value, *bounds])
        if kind == "Silu":
            source = self.value
            return self.node("Mul", [source, self.node("Sigmoid", [source])])
        return self.node(kind, [self.value])

    def add(self, other: str) -> str:
        """The sum with another value."""
        return self.node("Add", [self.value, other])

    def pool(self, kind: str = "MaxPool") -> str:
        """Halve the map."""
        edge = (self.shape[2] + 2 - 3) // 2 + 1
        self.node(kind, [self.value], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        self.shape = (1, self.shape[1], edge, edge)
        return self.value

    def gate(self, reduced: int) -> str:
        """Squeeze and excitation."""
        source, shape = self.value, self.shape
        self.mean()
        self.shape = (1, shape[1], 1, 1)
        self.conv(reduced, 1, act=self.rng.choice(["Relu", self.activation]))
        self.conv(shape[1], 1, act=self.rng.choice(["Sigmoid", "HardSigmoid"]))
        self.shape = shape
        return self.node("Mul", [self.value, source] if self.exported else [source, self.value])

    def matmul(self, n: int) -> str:
        """A fully connected layer on the last axis."""
        k = self.shape[-1]
        self.node("MatMul", [self.value, self.weight((k, n), k)])
        self.macs += math.prod(self.shape) * n
        self.shape = (*self.shape[:-1], n)
        return self.node("Add", [self.value, self.weight((n,), 1)])

    def norm(self) -> str:
        """Normalise the last axis."""
        c = self.shape[-1]
        return self.node(
            "LayerNormalization", [self.value, self.weight((c,), 1), self.weight((c,), 1)], axis=-1
        )

    def norm_of_channels(self) -> str:
        """Normalise the channels of every place of a map."""
        self.transpose((0, 2, 3, 1))
        self.norm()
        return self.transpose((0, 3, 1, 2))

    def batch_norm(self) -> str:
        """Normalise the channels."""
        c = self.shape[1]
        return self.node("BatchNormalization", [self.value, *(self.weight((c,), 1) for _ in range(4))])

    def mean(self) -> str:
        """Of every map, or of every channel of a sequence."""
        if not self.exported:
            return self.node("GlobalAveragePool", [self.value])
        self._number += 1
        axes = self.model.constant(f"axes{self._number}", list(range(2, len(self.shape))), "INT64")
        return self.node("ReduceMean", [self.value, axes], keepdims=1)

    def head(self) -> None:
        """Global average and classifier."""
        if self.shape[2] > 1:
            self.mean()
        c, classes = self.shape[1], self.rng.choice([10, 100, 1000])
        self.node("Flatten", [self.value], axis=1)
        self.node("Gemm", [self.value, self.weight((classes, c), c), self.weight((classes,), 1)], transB=1)

    def finish(self) -> bytes:
        """The serialized model."""
        return self.model.finish()

    def transpose(self, perm: tuple[int, ...]) -> str:
        """Turn the axes."""
        self.shape = tuple(self.shape[axis] for axis in perm)
        return self.node("Transpose", [self.value], perm=list(perm))

    def reshape(self, dims: tuple[int, ...]) -> str:
        """Another shape of as many numbers."""
        self._number += 1
        self.shape = dims
        return self.node(
            "Reshape", [self.value, self.model.constant(f"shape{self._number}", list(dims), "INT64")]
        )

    def at(self, value: str, shape: tuple[int, ...]) -> None:
        """Go on from another value."""
        self.value, self.shape = value, shape

    def concat(self, parts: list[tuple[str, int]]) -> str:
        """Join along the channels; `(value, channels)` each, of equal maps."""
        self.node("Concat", [value for value, _ in parts], axis=1)
        self.shape = (1, sum(c for _, c in parts), *self.shape[2:])
        return self.value

    def halves(self) -> tuple[str, str]:
        """Either half of the channels; newer exporters write one Split, older ones two Slices."""
        half = self.shape[1] // 2
        if self.exported:
            sizes = self.model.constant(f"halves{self.value}", [half, self.shape[1] - half], "INT64")
            self.model.node("Split", [self.value, sizes], {"axis": 1}, 2)
            first, second = self.model.outputs
            return first, second
        source = self.value
        bounds = [self.model.constant(f"cut{source}{i}", [i * half], "INT64") for i in range(3)]
        axes = self.model.constant(f"axes{source}", [1], "INT64")
        first, second = (
            self.node("Slice", [source, start, end, axes]) for start, end in itertools.pairwise(bounds)
        )
        return first, second

    def dense(self, n: int, act: str | None = None) -> str:
        """A fully connected layer on `[1, channels]`."""
        c = self.shape[-1]
        self.node("Gemm", [self.value, self.weight((n, c), c), self.weight((n,), 1)], transB=1)
        self.shape = (1, n)
        self.macs += c * n
        return self.act(act) if act else self.value
