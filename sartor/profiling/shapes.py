"""Specs of kernels as networks have them: what `signature_of` writes, without a network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

Spec = dict[str, Any]
Dims = list[int | str]

SIDES = (4, 5, 6, 7, 8, 9, 10, 12, 14, 15, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112)
INPUT_SIDES = (64, 96, 112, 128, 160, 192, 224, 256)
TOKENS = (16, 17, 36, 37, 49, 50, 64, 65, 81, 100, 101, 144, 145, 196, 197, 256, 257, 400)
ROWS = (4, 9, 25, *TOKENS, 576, 784, 1024, 1600, 2304, 3136)
"""Of what is computed for every token or every place of a map alike."""
ACTIVATIONS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("Relu", {}, 8),
    ("Clip", {"min": 0.0, "max": 6.0}, 3),
    ("Silu", {}, 2),
    ("HardSwish", {}, 2),
    ("Sigmoid", {}, 1),
    ("HardSigmoid", {"alpha": 1 / 6}, 1),
    ("LeakyRelu", {"alpha": 0.01}, 1),
    ("Gelu", {}, 2),
    ("Tanh", {}, 1),
)
"""Name, attributes, and how often it is drawn beside the others."""


def side(rng: random.Random) -> int:
    """Height and width of a feature map; small ones have most of the layers."""
    return rng.choices(SIDES, [3 if s <= 32 else 2 for s in SIDES])[0]


def tokens(rng: random.Random) -> int:
    """Length of a sequence of which every part reads every other."""
    return rng.choice(TOKENS)


def rows(rng: random.Random) -> int:
    """Length of a sequence, or places of a map whose channels come last."""
    return rng.choice(ROWS)


def convolution(
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: int,
    epilogue: Sequence[Sequence[Any]] = (),
    *,
    depthwise: bool = False,
    grouped: bool = False,
) -> Spec:
    """A convolution; padded to keep its map's size, or not at all where stride and kernel are equal."""
    rank = len(spatial)
    pads = [0 if k == stride else k // 2 for k in kernel]
    out = [(s + 2 * p - k) // stride + 1 for s, p, k in zip(spatial, pads, kernel, strict=True)]
    spec: Spec = {
        "op": "Conv",
        "dtype": "FLOAT",
        "batch": 1,
        "spatial": list(spatial),
        "out": out,
        "attributes": {
            "strides": [stride] * rank,
            "dilations": [1] * rank,
            "pads": pads * 2,
            "kernel_shape": list(kernel),
        },
        "epilogue": [list(entry) for entry in epilogue],
    }
    return {**spec, "multiplier": 1} if depthwise else {**spec, "group": "*" if grouped else 1}


def product(op_type: str, rows: Sequence[int], epilogue: Sequence[Sequence[Any]] = ()) -> Spec:
    """A product with a stored matrix."""
    return {"op": op_type, "dtype": "FLOAT", "rows": list(rows), "epilogue": [list(e) for e in epilogue]}


def activations_product(batch: int, m: int | str, k: int | str, n: int | str) -> Spec:
    """A product of two activations, as in attention."""
    roles = {"batch": batch, "m": m, "k": k, "n": n}
    return {
        "op": "MatMul",
        "dtype": "FLOAT",
        **roles,
        "shared": batch == 1,
        "stored": [False, False],
        "epilogue": [],
    }


def moving(
    op_type: str,
    inputs: Sequence[Sequence[int | str]],
    outputs: Sequence[Sequence[int | str]],
    attributes: dict[str, Any] | None = None,
    stored: Sequence[int] = (),
) -> Spec:
    """A kernel that moves data.

    Args:
        op_type: operator.
        inputs: dims of each; `*` varies.
        outputs: dims of each.
        attributes: of the node.
        stored: which inputs are initializers.
    """
    return {
        "op": op_type,
        "attributes": attributes or {},
        "inputs": [
            {"slot": slot, "dims": list(dims), "dtype": "FLOAT", "stored": slot in stored}
            for slot, dims in enumerate(inputs)
        ],
        "outputs": [list(dims) for dims in outputs],
        "output_dtypes": ["FLOAT"] * len(outputs),
        "output_count": len(outputs),
        "epilogue": [],
    }


def _constant(spec: Spec, value: list[int]) -> Spec:
    """With one more input, which is a stored list of integers."""
    entry = {
        "slot": len(spec["inputs"]),
        "dims": [len(value)],
        "dtype": "INT64",
        "stored": True,
        "value": value,
    }
    return {**spec, "inputs": [*spec["inputs"], entry]}


def _map(rng: random.Random) -> tuple[Dims, int]:
    """A feature map or a sequence of tokens, and its largest width."""
    if rng.random() < 0.3:
        length = rows(rng)
        return [1, length, "*"], min(3072, 1_000_000 // length)
    edge = side(rng)
    return [1, "*", edge, edge], min(2048, 1_500_000 // (edge * edge))


def pool(rng: random.Random) -> tuple[Spec, int]:
    """Max, average and global pooling."""
    edge = side(rng)
    most = min(2048, 1_500_000 // (edge * edge))
    kind = rng.choice(["MaxPool", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean"])
    whole: Dims = [1, "*", edge, edge]
    if kind == "GlobalAveragePool":
        return moving(kind, [whole], [[1, "*", 1, 1]]), most
    if kind == "ReduceMean":
        return _constant(moving(kind, [whole], [[1, "*", 1, 1]], {"keepdims": 1}), [2, 3]), most
    kernel, stride, pad = rng.choice([(3, 2, 1), (2, 2, 0), (3, 1, 1)])
    out = (edge + 2 * pad - kernel) // stride + 1
    attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
    return moving(kind, [whole], [[1, "*", out, out]], attributes), most


def elementwise(rng: random.Random) -> tuple[Spec, int]:
    """Activations, sums and products of two maps, gates of one number per channel."""
    dims, most = _map(rng)
    kind = rng.choice(["unary", "unary", "two", "gate", "bias"])
    if kind == "unary":
        op_type = rng.choice(["Relu", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Tanh", "Erf"])
        return moving(op_type, [dims], [dims]), most
    op_type = rng.choice(["Add", "Mul"])
    if kind == "two":
        return moving(op_type, [dims, dims], [dims]), most
    if kind == "gate":
        one: Dims = [1, "*", 1, 1] if len(dims) == 4 else [1, 1, "*"]
        return moving("Mul", [dims, one], [dims]), most
    row: Dims = ["*", 1, 1] if len(dims) == 4 else ["*"]
    return moving(op_type, [dims, row], [dims], stored=[1]), most


def norm(rng: random.Random) -> tuple[Spec, int]:
    """Normalizations and softmax."""
    length = tokens(rng)
    kind = rng.choice(["LayerNormalization", "LayerNormalization", "Softmax", "BatchNormalization"])
    if kind == "LayerNormalization":
        attributes = {"axis": -1, "epsilon": 1e-6}
        dims: Dims = [1, rows(rng), "*"]
        return moving(kind, [dims, ["*"], ["*"]], [dims], attributes, stored=[1, 2]), 3072
    if kind == "Softmax":
        heads: Dims = [1, "*", length, length]
        return moving(kind, [heads], [heads], {"axis": -1}), 16
    edge = side(rng)
    whole: Dims = [1, "*", edge, edge]
    channel: Dims = ["*"]
    inputs = [whole, channel, channel, channel, channel]
    most = min(2048, 1_500_000 // (edge * edge))
    return moving(kind, inputs, [whole], {"epsilon": 1e-5}, stored=[1, 2, 3, 4]), most


def movement(rng: random.Random) -> tuple[Spec, int]:
    """Joins, transpositions and enlargements."""
    edge, length = side(rng), tokens(rng)
    most = min(1024, 1_000_000 // (edge * edge))
    kind = rng.choice(["Concat", "Concat", "Transpose", "Transpose", "Resize"])
    if kind == "Concat":
        shares = rng.choice([(1, 1), (2, 1), (4, 1), (1, 1, 1), (2, 1, 1, 1)])
        inputs: list[Dims] = [[1, _times(share), edge, edge] for share in shares]
        return moving(kind, inputs, [[1, _times(sum(shares)), edge, edge]], {"axis": 1}), most // sum(shares)
    if kind == "Transpose":
        heads = rng.choice([2, 3, 4, 6, 8])
        options: list[tuple[Dims, list[int]]] = [
            ([1, "*", edge, edge], [0, 2, 3, 1]),
            ([1, "*", edge * edge], [0, 2, 1]),
            ([1, length, "*"], [0, 2, 1]),
            ([1, length, heads, "*"], [0, 2, 1, 3]),
            ([1, heads, length, "*"], [0, 1, 3, 2]),
            ([1, length, 3, heads, "*"], rng.choice([[2, 0, 3, 1, 4], [2, 0, 3, 4, 1]])),
        ]
        dims, perm = rng.choice(options)
        return moving(kind, [dims], [[dims[i] for i in perm]], {"perm": perm}), min(most, 768)
    spec = moving(kind, [[1, "*", edge, edge]], [[1, "*", 2 * edge, 2 * edge]], _NEAREST)
    scales = {"slot": 1, "dims": [4], "dtype": "FLOAT", "stored": True, "value": [1.0, 1.0, 2.0, 2.0]}
    return {**spec, "inputs": [spec["inputs"][0], None, scales]}, most // 4


_NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def _times(share: int) -> str:
    return "*" if share == 1 else f"{share}*"
