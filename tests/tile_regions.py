"""Random programs of local operators, of any stride, dilation, padding and odd sizes, for tests of tiles."""

from __future__ import annotations

import numpy as np
from builders import node, program_from_nodes
from hypothesis import strategies as st


class Map:
    """Builds a chain of nodes on one map `[N, C, H, W]`, with random parameters; nodes know their shape."""

    def __init__(self, channels, height, width, seed):
        self.shape = (channels, height, width)
        self.start = self.shape
        self.value, self.nodes, self.arrays = "x", [], {}
        self.generator = np.random.default_rng(seed)

    def add(self, op_type, *others, shape=None, source=None, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(node(op_type, [source or self.value, *others], [name], **attributes))
        self.value = name
        self.shape = shape or self.shape
        return name

    def array(self, values, dtype=np.float32):
        name = f"a{len(self.arrays)}"
        self.arrays[name] = np.asarray(values, dtype)
        return name

    def random(self, *shape, low=None):
        values = self.generator.standard_normal(shape)
        return self.array(values if low is None else low + np.abs(values))

    def program(self):
        return program_from_nodes(self.nodes, {"x": ["N", *self.start]}, [self.value], self.arrays)


def windows(draw, length, *, pads=2, kernels=(1, 2, 3, 5)):
    """Kernel, stride, dilation and pads of one axis that leave something of it; the length behind."""
    kernel = draw(st.sampled_from(kernels))
    stride, dilation = draw(st.sampled_from((1, 1, 2, 3))), draw(st.sampled_from((1, 1, 2)))
    limit = min(pads, kernel - 1)
    before, after = (draw(st.integers(0, limit)) for _ in range(2))
    extent = dilation * (kernel - 1) + 1
    if length + before + after < extent:
        kernel, dilation, extent = 1, 1, 1
        before = after = 0
    return kernel, stride, dilation, before, after, (length + before + after - extent) // stride + 1


def _spatial(draw, one, **more):
    found = [windows(draw, length, **more) for length in one.shape[1:]]
    kernel, stride, dilation, before, after, size = (list(part) for part in zip(*found, strict=True))
    return {"strides": stride, "dilations": dilation, "pads": before + after}, kernel, tuple(size)


def conv(draw, one):
    attributes, kernel, size = _spatial(draw, one, pads=4)
    channels = one.shape[0]
    groups = draw(st.sampled_from((1, channels)))
    made = channels if groups > 1 else draw(st.sampled_from((2, 4, 6)))
    weight = one.random(made, channels // groups, *kernel)
    one.add("Conv", weight, one.random(made), group=groups, shape=(made, *size), **attributes)


def pool(draw, one):
    attributes, kernel, size = _spatial(draw, one)
    op_type = draw(st.sampled_from(("MaxPool", "AveragePool", "LpPool")))
    if op_type == "AveragePool":
        attributes["count_include_pad"] = draw(st.integers(0, 1))
    if op_type == "MaxPool" and draw(st.booleans()):
        attributes["ceil_mode"] = 1
        size = None
    one.add(op_type, kernel_shape=kernel, shape=None if size is None else (one.shape[0], *size), **attributes)
    if size is None:
        one.shape = one.program().shapes()[one.value][1:]


def activation(draw, one):
    one.add(draw(st.sampled_from(("Relu", "HardSwish", "Sigmoid", "Tanh", "Elu"))))


def norm(draw, one):
    channels = one.shape[0]
    one.add(
        "BatchNormalization",
        *(one.random(channels) for _ in range(3)),
        one.random(channels, low=0.5),
    )


def residual(draw, one):
    before, channels = one.value, one.shape[0]
    kernel = draw(st.sampled_from((1, 3)))
    dilation = draw(st.sampled_from((1, 2)))
    one.add(
        "Conv",
        one.random(channels, channels, kernel, kernel),
        pads=[dilation * (kernel // 2)] * 4,
        dilations=[dilation] * 2,
    )
    one.add("Add", before)


def branches(draw, one):
    before, channels = one.value, one.shape[0]
    first = one.add("Conv", one.random(3, channels, 1, 1), source=before)
    second = one.add("MaxPool", source=before, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    one.add("Concat", second, source=first, axis=1, shape=(3 + channels, *one.shape[1:]))


def resize(draw, one):
    factors = [draw(st.sampled_from((1, 2, 3))) for _ in range(2)]
    size = tuple(n * f for n, f in zip(one.shape[1:], factors, strict=True))
    mode = draw(st.sampled_from(("nearest", "linear")))
    where = draw(st.sampled_from(("half_pixel", "asymmetric", "pytorch_half_pixel")))
    attributes = {"mode": mode, "coordinate_transformation_mode": where}
    if mode == "nearest":
        attributes["nearest_mode"] = draw(
            st.sampled_from(("floor", "round_prefer_floor", "round_prefer_ceil"))
        )
    if draw(st.booleans()):
        one.add("Resize", "", one.array([1, 1, *factors]), shape=(one.shape[0], *size), **attributes)
    else:
        sizes = one.array(size, np.int64)
        one.add("Resize", "", "", sizes, axes=[2, 3], shape=(one.shape[0], *size), **attributes)


def pad(draw, one):
    pads = [draw(st.integers(0, 2)) for _ in range(4)]
    mode = draw(st.sampled_from(("constant", "edge")))
    _, height, width = one.shape
    one.add(
        "Pad",
        one.array([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64),
        mode=mode,
        shape=(one.shape[0], height + pads[0] + pads[2], width + pads[1] + pads[3]),
    )


def transposed(draw, one):
    channels = one.shape[0]
    kernel, stride, dilation = (draw(st.integers(1, most)) for most in (4, 3, 2))
    extent = dilation * (kernel - 1) + 1
    crop = draw(st.integers(0, (extent - 1) // 2))
    extra = draw(st.integers(0, max(stride, dilation) - 1))
    one.add(
        "ConvTranspose",
        one.random(channels, 3, kernel, kernel),
        strides=[stride] * 2,
        dilations=[dilation] * 2,
        pads=[crop] * 4,
        output_padding=[extra] * 2,
        shape=(3, *((n - 1) * stride + extra + extent - 2 * crop for n in one.shape[1:])),
    )


def blocks(draw, one):
    channels, height, width = one.shape
    if height % 2 == 0 and width % 2 == 0:
        one.add("SpaceToDepth", blocksize=2, shape=(channels * 4, height // 2, width // 2))
    elif channels % 4 == 0:
        one.add("DepthToSpace", blocksize=2, shape=(channels // 4, height * 2, width * 2))


def crop(draw, one):
    channels, height, width = one.shape
    if min(height, width) < 4:
        return
    start, step = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    bounds = (one.array(part, np.int64) for part in ([start, 1], [height, width - 1], [2, 3], [step, 1]))
    one.add("Slice", *bounds, shape=(channels, len(range(start, height, step)), width - 2))


def channels_last(draw, one):
    channels = one.shape[0]
    one.add("Transpose", perm=[0, 2, 3, 1])
    one.add("LayerNormalization", one.random(channels), one.random(channels), axis=-1)
    one.add("MatMul", one.random(channels, channels))
    one.add("Transpose", perm=[0, 3, 1, 2])


def constants(draw, one):
    channels, height, width = one.shape
    shape = draw(st.sampled_from(((channels, 1, 1), (1, height, width), (width,), (1, 1, height, 1))))
    one.add(draw(st.sampled_from(("Mul", "Add"))), one.random(*shape))


def quantized(draw, one):
    scale, zero = one.array(0.1), one.array(draw(st.integers(-10, 10)), np.int8)
    one.add("QuantizeLinear", scale, zero)
    one.add("DequantizeLinear", scale, zero)


OPERATORS = (
    *(conv, conv, conv, pool, activation, norm, residual, branches, resize, pad, transposed, blocks, crop),
    *(channels_last, constants, quantized),
)


@st.composite
def programs(draw, most=6):
    """A program of one to `most` operators on a map of 3 to 17 positions either way."""
    one = Map(
        draw(st.sampled_from((1, 3, 4))),
        *(draw(st.integers(3, 17)) for _ in range(2)),
        draw(st.integers(0, 99)),
    )
    for _ in range(draw(st.integers(1, most))):
        draw(st.sampled_from(OPERATORS))(draw, one)
        if min(one.shape[1:]) < 1 or max(one.shape[1:]) > 40:
            break
    if not one.nodes:
        one.add("Relu")
    return one.program()
