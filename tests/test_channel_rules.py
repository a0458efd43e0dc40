"""Every data-movement rule against brute force: move integer label tensors as the operator moves the data.

An activation of known atoms is fed to one operator. The ONNX reference evaluator moves the atom numbers of
every position; the rule must put the same number (or a derived atom that stands for it) at the same position,
or block what it no longer labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from builders import node
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from random_graphs import build

from sartor.ir.channels import channel_groups
from sartor.ir.channels.labels import FIXED, Factor, Labels, LabelSpace, Reason, align, simplify
from sartor.ir.channels.propagate import EFFECTS, RULES, Propagation

Nodes = list[onnx.NodeProto]
Arrays = dict[str, np.ndarray]
MARK = -7


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def image(channels: int = 12, height: int = 4, width: int = 2, batch: int = 2) -> tuple[Nodes, dict, Arrays]:
    """`x` of shape [batch, channels, height, width], labelled along axis 1."""
    weights = {"w": np.ones((channels, 3, 1, 1), np.float32)}
    return [node("Conv", ["data", "w"], ["x"])], {"data": (batch, 3, height, width)}, weights


def tokens(heads: int = 3, dims: int = 4, length: int = 5, batch: int = 2) -> tuple[Nodes, dict, Arrays]:
    """`x` of shape [batch, length, heads, dims], one joint factor over the last two axes."""
    weights = {"w": np.ones((6, heads * dims), np.float32), "target": ints(batch, length, heads, dims)}
    nodes = [node("MatMul", ["data", "w"], ["flat"]), node("Reshape", ["flat", "target"], ["x"])]
    return nodes, {"data": (batch, length, 6)}, weights


def vector(channels: int = 12) -> tuple[Nodes, dict, Arrays]:
    """`x` of shape [2, channels], labelled along axis 1 by a Gemm."""
    return (
        [node("Gemm", ["data", "w"], ["x"], transB=1)],
        {"data": (2, 3)},
        {"w": np.ones((channels, 3), np.float32)},
    )


def propagate(
    base: tuple[Nodes, dict, Arrays], nodes: Nodes, arrays: Arrays, outputs: list[str]
) -> Propagation:
    before, inputs, weights = base
    propagation = Propagation(build(before + nodes, inputs, outputs, {**weights, **arrays}, symbolic=False))
    propagation.run()
    return propagation


def full(factor: Factor, shape: tuple[int, ...]) -> np.ndarray:
    """The factor's atoms at every position of the value."""
    dims = [factor.atoms.shape[factor.axes.index(a)] if a in factor.axes else 1 for a in range(len(shape))]
    return np.broadcast_to(factor.atoms.reshape(dims), shape)


def evaluate(nodes: Nodes, arrays: Arrays, x: np.ndarray, outputs: list[str]) -> list[np.ndarray]:
    """Moves integers through the operators with the reference evaluator."""
    constants = [onnx.numpy_helper.from_array(v, k) for k, v in arrays.items()]
    info = helper.make_tensor_value_info("x", TensorProto.INT64, list(x.shape))
    results = [helper.make_tensor_value_info(o, TensorProto.INT64, None) for o in outputs]
    graph = helper.make_graph(nodes, "movement", [info], results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ReferenceEvaluator(model).run(None, {"x": x.astype(np.int64)})


def leaves(propagation: Propagation) -> Mapping[int, frozenset[int]]:
    """The atoms that each derived atom stands for."""
    found: dict[int, frozenset[int]] = {}
    for projection in propagation.space.projections:
        children = projection.children.reshape(projection.slices.size, -1)
        for atom, below in zip(projection.slices.ravel().tolist(), children.tolist(), strict=True):
            found[atom] = frozenset().union(*(found.get(b, frozenset([b])) for b in below))
    return found


def blocked_atoms(propagation: Propagation, text: str = "") -> set[int]:
    """Atoms of `w` that must stay for a reason other than reaching the output (the tests' own outputs do)."""
    below = leaves(propagation)
    made = set(np.concatenate([a.ravel() for a in propagation.produced]).tolist())
    result: set[int] = set()
    for atoms, reason in propagation.space.blocks:
        if not reason.text.startswith("reaches the graph output") and text in reason.text:
            for atom in atoms.tolist():
                result |= below.get(atom, {atom})
    return result & made


def agrees(propagation: Propagation, moved: np.ndarray, value: str) -> int:
    """Fail unless labels and moved integers agree at every position; returns how many were compared."""
    below = leaves(propagation)
    shape = propagation.shapes[value]
    assert moved.shape == shape
    arrays = [full(f, shape).ravel().tolist() for f in propagation.value_labels.get(value, ())]
    stuck = blocked_atoms(propagation)
    constant = np.unique(moved[moved != MARK]).size == 1
    compared = 0
    for position, atom in enumerate(moved.ravel().tolist()):
        found = {a[position] for a in arrays}
        if atom == MARK:
            assert not found & set(moved.ravel().tolist()), f"padding at {position} is labelled {found}"
        elif any(atom in below.get(f, {f}) for f in found):
            compared += 1
        else:
            assert not found - {FIXED}, f"position {position} holds {atom}, labelled {found}"
            assert constant or atom in stuck, f"position {position} lost its label {atom}, nothing blocks it"
    return compared


def check(
    base: tuple[Nodes, dict, Arrays],
    nodes: Nodes,
    arrays: Arrays,
    outputs: list[str],
    moving: Nodes | None = None,
    moving_arrays: Arrays | None = None,
) -> list[int]:
    """Compares labels and brute force for every output; returns how many positions are labelled in each."""
    propagation = propagate(base, nodes, arrays, outputs)
    (factor,) = propagation.value_labels["x"]
    atoms = full(factor, propagation.shapes["x"])
    moved = evaluate(moving or nodes, arrays if moving_arrays is None else moving_arrays, atoms, outputs)
    return [agrees(propagation, m, o) for m, o in zip(moved, outputs, strict=True)]


def one(op_type: str, inputs: list[str], **attributes: object) -> Nodes:
    return [node(op_type, ["x", *inputs], ["y"], **attributes)]


IMAGE_CASES: dict[str, tuple[Nodes, Arrays]] = {
    "reshape-split-channels": (one("Reshape", ["s"]), {"s": ints(2, 3, 4, 4, 2)}),
    "reshape-merge-space": (one("Reshape", ["s"]), {"s": ints(2, 12, 8)}),
    "reshape-merge-channels-space": (one("Reshape", ["s"]), {"s": ints(2, 96)}),
    "reshape-merge-batch-channels": (one("Reshape", ["s"]), {"s": ints(24, 4, 2)}),
    "reshape-split-and-merge": (one("Reshape", ["s"]), {"s": ints(2, 3, 32)}),
    "reshape-across": (one("Reshape", ["s"]), {"s": ints(2, 8, 6, 2)}),
    "reshape-ones": (one("Reshape", ["s"]), {"s": ints(1, 2, 1, 12, 4, 1, 2)}),
    "reshape-minus-one": (one("Reshape", ["s"]), {"s": ints(0, -1, 8)}),
    "flatten-1": (one("Flatten", []), {}),
    "flatten-2": (one("Flatten", [], axis=2), {}),
    "flatten-3": (one("Flatten", [], axis=3), {}),
    "transpose-nhwc": (one("Transpose", [], perm=[0, 2, 3, 1]), {}),
    "transpose-default": (one("Transpose", []), {}),
    "unsqueeze": (one("Unsqueeze", ["a"]), {"a": ints(1, -1)}),
    "squeeze": (
        [node("Unsqueeze", ["x", "a"], ["u"]), node("Squeeze", ["u", "a"], ["y"])],
        {"a": ints(0, 3)},
    ),
    "slice-channels": (one("Slice", ["a", "b", "c"]), {"a": ints(2), "b": ints(9), "c": ints(1)}),
    "slice-negative": (one("Slice", ["a", "b", "c"]), {"a": ints(-5), "b": ints(1 << 60), "c": ints(-3)}),
    "slice-space-and-channels": (
        one("Slice", ["a", "b", "c", "d"]),
        {"a": ints(0, 3), "b": ints(4, 11), "c": ints(2, 1), "d": ints(2, 1)},
    ),
    "slice-without-axes": (one("Slice", ["a", "b"]), {"a": ints(0, 1), "b": ints(2, 6)}),
    "slice-strided": (
        one("Slice", ["a", "b", "c", "d"]),
        {"a": ints(0), "b": ints(12), "c": ints(1), "d": ints(2)},
    ),
    "slice-reversed": (
        one("Slice", ["a", "b", "c", "d"]),
        {"a": ints(-1), "b": ints(-(1 << 60)), "c": ints(1), "d": ints(-1)},
    ),
    "slice-one-channel": (one("Slice", ["a", "b", "c"]), {"a": ints(3), "b": ints(4), "c": ints(1)}),
    "gather-vector": (one("Gather", ["i"], axis=1), {"i": ints(3, 0, 0, -1, 7)}),
    "gather-scalar": (one("Gather", ["i"], axis=1), {"i": np.array(5, np.int64)}),
    "gather-matrix": (one("Gather", ["i"], axis=1), {"i": ints(1, 2, 3, 4).reshape(2, 2)}),
    "gather-space": (one("Gather", ["i"], axis=2), {"i": ints(3, 1)}),
    "gather-space-scalar": (one("Gather", ["i"], axis=2), {"i": np.array(1, np.int64)}),
    "gather-space-matrix": (one("Gather", ["i"], axis=2), {"i": ints(3, 1, 0, 2, 2, 2).reshape(3, 2)}),
    "gather-batch-scalar": (one("Gather", ["i"], axis=0), {"i": np.array(1, np.int64)}),
    "tile": (one("Tile", ["r"]), {"r": ints(1, 3, 2, 1)}),
    "expand-front": (one("Expand", ["s"]), {"s": ints(5, 2, 12, 4, 2)}),
    "expand-ones": (one("Expand", ["s"]), {"s": ints(1, 1, 1, 1)}),
    "expand-new-axis": (
        [node("Unsqueeze", ["x", "a"], ["u"]), node("Expand", ["u", "s"], ["y"])],
        {"a": ints(2), "s": ints(2, 12, 3, 4, 2)},
    ),
    "expand-then-merge": (
        [
            node("Unsqueeze", ["x", "a"], ["u"]),
            node("Expand", ["u", "s"], ["e"]),
            node("Reshape", ["e", "t"], ["y"]),
        ],
        {"a": ints(2), "s": ints(2, 12, 3, 4, 2), "t": ints(2, 36, 4, 2)},
    ),
    "depth-to-space-dcr": (one("DepthToSpace", [], blocksize=2), {}),
    "depth-to-space-crd": (one("DepthToSpace", [], blocksize=2, mode="CRD"), {}),
    "space-to-depth": (one("SpaceToDepth", [], blocksize=2), {}),
    "concat-self": (
        [
            node("Slice", ["x", "a", "b", "c"], ["u"]),
            node("Concat", ["u", "x"], ["y"], axis=1),
        ],
        {"a": ints(4), "b": ints(9), "c": ints(1)},
    ),
    "concat-space": ([node("Concat", ["x", "x"], ["y"], axis=3)], {}),
    "channel-shuffle": (
        [
            node("Reshape", ["x", "s"], ["u"]),
            node("Transpose", ["u"], ["v"], perm=[0, 2, 1, 3, 4]),
            node("Reshape", ["v", "t"], ["y"]),
        ],
        {"s": ints(2, 3, 4, 4, 2), "t": ints(2, 12, 4, 2)},
    ),
    "pixel-shuffle-by-hand": (
        [
            node("Reshape", ["x", "s"], ["u"]),
            node("Transpose", ["u"], ["v"], perm=[0, 1, 4, 2, 5, 3]),
            node("Reshape", ["v", "t"], ["y"]),
        ],
        {"s": ints(2, 3, 2, 2, 4, 2), "t": ints(2, 3, 8, 4)},
    ),
}
UNLABELLED = {
    "slice-strided",
    "slice-reversed",
    "slice-one-channel",
    "gather-scalar",
    "gather-matrix",
}


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_movement_of_one_axis(case):
    nodes, arrays = IMAGE_CASES[case]
    (compared,) = check(image(), nodes, arrays, ["y"])
    assert (compared == 0) == (case in UNLABELLED)


TOKEN_CASES: dict[str, tuple[Nodes, Arrays]] = {
    "merge": (one("Reshape", ["s"]), {"s": ints(2, 5, 12)}),
    "merge-with-free": (
        [node("Transpose", ["x"], ["u"], perm=[0, 2, 1, 3]), node("Reshape", ["u", "s"], ["y"])],
        {"s": ints(2, 15, 4)},
    ),
    "split-dims": (one("Reshape", ["s"]), {"s": ints(2, 5, 3, 2, 2)}),
    "regroup": (one("Reshape", ["s"]), {"s": ints(2, 5, 2, 6)}),
    "transpose-heads": (one("Transpose", [], perm=[0, 2, 1, 3]), {}),
    "transpose-key": (one("Transpose", [], perm=[0, 2, 3, 1]), {}),
    "slice-heads": (one("Slice", ["a", "b", "c"]), {"a": ints(1), "b": ints(3), "c": ints(2)}),
    "slice-dims": (one("Slice", ["a", "b", "c"]), {"a": ints(0), "b": ints(2), "c": ints(3)}),
    "slice-both": (
        one("Slice", ["a", "b", "c"]),
        {"a": ints(0, 1), "b": ints(2, 3), "c": ints(2, -1)},
    ),
    "slice-strided-dims": (
        one("Slice", ["a", "b", "c", "d"]),
        {"a": ints(0), "b": ints(4), "c": ints(3), "d": ints(2)},
    ),
    "gather-head": (one("Gather", ["i"], axis=2), {"i": np.array(1, np.int64)}),
    "gather-dims": (one("Gather", ["i"], axis=3), {"i": ints(3, 2, 2, 0)}),
    "gather-token": (one("Gather", ["i"], axis=1), {"i": np.array(0, np.int64)}),
    "tile": (one("Tile", ["r"]), {"r": ints(1, 1, 2, 3)}),
    "flatten": (one("Flatten", [], axis=2), {}),
    "rotate-half": (
        [
            node("Slice", ["x", "a", "b", "c"], ["u"]),
            node("Slice", ["x", "b", "d", "c"], ["v"]),
            node("Concat", ["v", "u"], ["y"], axis=-1),
        ],
        {"a": ints(0), "b": ints(2), "d": ints(4), "c": ints(3)},
    ),
    "repeat-heads": (
        [
            node("Unsqueeze", ["x", "a"], ["u"]),
            node("Expand", ["u", "s"], ["e"]),
            node("Reshape", ["e", "t"], ["y"]),
        ],
        {"a": ints(3), "s": ints(2, 5, 3, 2, 4), "t": ints(2, 5, 6, 4)},
    ),
    "concat-heads": ([node("Concat", ["x", "x"], ["y"], axis=2)], {}),
    "concat-tokens": ([node("Concat", ["x", "x"], ["y"], axis=1)], {}),
}


@pytest.mark.parametrize("case", TOKEN_CASES)
def test_movement_of_a_joint_factor(case):
    nodes, arrays = TOKEN_CASES[case]
    (compared,) = check(tokens(), nodes, arrays, ["y"])
    assert compared > 0


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("sizes", [(4, 8), (1, 11), (3, 3, 6), (2, 10)])
def test_split(axis, sizes):
    base = image() if axis == 1 else image(height=12)
    outputs = [f"y{i}" for i in range(len(sizes))]
    compared = check(base, [node("Split", ["x", "s"], outputs, axis=axis)], {"s": ints(*sizes)}, outputs)
    assert [c > 0 for c in compared] == [axis == 2 or size > 1 for size in sizes]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_split_by_number(count):
    """With num_outputs the last part is the smaller one."""
    outputs = [f"y{i}" for i in range(count)]
    check(image(), [node("Split", ["x"], outputs, axis=1, num_outputs=count)], {}, outputs)


@pytest.mark.parametrize("axis", [2, 3])
def test_split_of_a_joint_factor(axis):
    outputs = ["y0", "y1"]
    sizes = {2: ints(2, 1), 3: ints(1, 3)}[axis]
    compared = check(tokens(), [node("Split", ["x", "s"], outputs, axis=axis)], {"s": sizes}, outputs)
    assert all(compared), "the other axis of the factor keeps its labels"


@pytest.mark.parametrize(
    "pads, axes",
    [((0, 2, 0, 0, 0, 3, 0, 0), None), ((2, 0), (1,)), ((1, 1, 1, 1), (2, 3)), ((0, 4), (-3,))],
)
def test_pad(pads, axes):
    base = image()
    names = ["x", "p", "v"] + (["a"] if axes else [])
    arrays = {"p": ints(*pads)} | ({"a": ints(*axes)} if axes else {})
    nodes = [node("Pad", names, ["y"])]
    (compared,) = (
        check(
            base,
            nodes,
            {**arrays, "v": np.array(0, np.float32)},
            ["y"],
            moving_arrays={**arrays, "v": np.array(MARK, np.int64)},
        )
        if axes != (2, 3)
        else (1,)
    )
    assert compared > 0
    propagation = propagate(base, nodes, {**arrays, "v": np.array(0, np.float32)}, ["y"])
    assert all(f.atoms.min() > FIXED for f in propagation.value_labels["y"])


@pytest.mark.parametrize("mode", ["edge", "reflect"])
def test_pad_by_copies_blocks_a_labelled_axis_only(mode):
    nodes = [node("Pad", ["x", "p"], ["y"], mode=mode)]
    along = propagate(image(), nodes, {"p": ints(0, 1, 0, 0, 0, 1, 0, 0)}, ["y"])
    assert "y" not in along.value_labels
    assert blocked_atoms(along, "Pad along this axis") == set(along.parameter_atoms["w", 0].tolist())
    beside = propagate(image(), nodes, {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}, ["y"])
    assert not blocked_atoms(beside)
    (factor,) = beside.value_labels["y"]
    np.testing.assert_array_equal(factor.atoms, beside.parameter_atoms["w", 0])


def test_concat_of_two_producers_and_a_part_without_labels():
    nodes, inputs, weights = image(4)
    nodes += [
        node("Conv", ["data", "v"], ["z"]),
        node("Concat", ["z", "data", "x"], ["y"], axis=1),
    ]
    propagation = propagate((nodes, inputs, weights), [], {"v": np.ones((2, 3, 1, 1), np.float32)}, ["y"])
    (factor,) = propagation.value_labels["y"]
    first, second = propagation.parameter_atoms["v", 0], propagation.parameter_atoms["w", 0]
    np.testing.assert_array_equal(factor.atoms, [*first, FIXED, FIXED, FIXED, *second])


STEPS = ("reshape", "transpose", "slice", "gather", "tile", "concat", "unsqueeze", "depth", "space")


@st.composite
def movements(draw) -> tuple[Nodes, Arrays, str]:
    """A chain of data movements from `x` of shape [2, 12, 4, 2]."""
    shape, name = (2, 12, 4, 2), "x"
    nodes: Nodes = []
    arrays: Arrays = {}
    for step in range(draw(st.integers(1, 5))):
        new, constant = f"y{step}", f"c{step}"
        kind = draw(st.sampled_from(STEPS))
        axis = draw(st.integers(0, len(shape) - 1))
        if kind == "reshape":
            factors = [p for d in shape for p in _primes(d)]
            count = draw(st.integers(1, min(5, max(1, len(factors)))))
            cuts = sorted(draw(st.integers(0, len(factors))) for _ in range(count - 1))
            bounds = [0, *cuts, len(factors)]
            target = [int(np.prod(factors[a:b])) for a, b in itertools.pairwise(bounds)]
            arrays[constant] = ints(*target)
            nodes.append(node("Reshape", [name, constant], [new]))
            shape = tuple(target)
        elif kind == "transpose":
            perm = draw(st.permutations(range(len(shape))))
            nodes.append(node("Transpose", [name], [new], perm=list(perm)))
            shape = tuple(shape[p] for p in perm)
        elif kind == "slice":
            start = draw(st.integers(0, shape[axis] - 1))
            stop = draw(st.integers(start + 1, shape[axis]))
            arrays |= {f"{constant}a": ints(start), f"{constant}b": ints(stop), f"{constant}d": ints(axis)}
            nodes.append(node("Slice", [name, f"{constant}a", f"{constant}b", f"{constant}d"], [new]))
            shape = (*shape[:axis], stop - start, *shape[axis + 1 :])
        elif kind == "gather":
            picked = draw(st.lists(st.integers(-shape[axis], shape[axis] - 1), min_size=1, max_size=6))
            arrays[constant] = ints(*picked)
            nodes.append(node("Gather", [name, constant], [new], axis=axis))
            shape = (*shape[:axis], len(picked), *shape[axis + 1 :])
        elif kind == "tile":
            repeats = [draw(st.integers(1, 2)) if a == axis else 1 for a in range(len(shape))]
            arrays[constant] = ints(*repeats)
            nodes.append(node("Tile", [name, constant], [new]))
            shape = tuple(d * r for d, r in zip(shape, repeats, strict=True))
        elif kind == "concat":
            nodes.append(node("Concat", [name, name], [new], axis=axis))
            shape = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
        elif kind == "unsqueeze":
            arrays[constant] = ints(axis)
            nodes.append(node("Unsqueeze", [name, constant], [new]))
            shape = (*shape[:axis], 1, *shape[axis:])
        elif kind == "depth" and len(shape) == 4 and shape[1] % 4 == 0:
            mode = draw(st.sampled_from(["DCR", "CRD"]))
            nodes.append(node("DepthToSpace", [name], [new], blocksize=2, mode=mode))
            shape = (shape[0], shape[1] // 4, 2 * shape[2], 2 * shape[3])
        elif kind == "space" and len(shape) == 4 and shape[2] % 2 == 0 and shape[3] % 2 == 0:
            nodes.append(node("SpaceToDepth", [name], [new], blocksize=2))
            shape = (shape[0], 4 * shape[1], shape[2] // 2, shape[3] // 2)
        else:
            continue
        name = new
        if np.prod(shape) > 2000 or len(shape) > 6:
            break
    return nodes, arrays, name


def _primes(number: int) -> list[int]:
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found


@given(movements())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_chains_of_movements(chain):
    nodes, arrays, output = chain
    if nodes:
        check(image(), nodes, arrays, [output])


# ---- the building blocks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ((2, 12, 4), (2, 3, 4, 4), [([0], [0]), ([1], [1, 2]), ([2], [3])]),
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        ((4, 6), (6, 4), [([0, 1], [0, 1])]),
        ((1, 5, 1), (5,), [([1], [0])]),
        ((1, 1), (1,), []),
        ((2, 0), (0, 5), None),
        ((2, 3), (7,), None),
    ],
)
def test_align(old, new, expected):
    assert align(old, new) == expected


def test_simplify_drops_axes_along_which_nothing_changes():
    atoms = np.arange(5, 9)
    (factor,) = simplify(Factor((1, 2, 4), np.broadcast_to(atoms[None, :, None], (3, 4, 2))))
    assert factor.axes == (2,)
    np.testing.assert_array_equal(factor.atoms, atoms)
    assert simplify(Factor((0, 1), np.zeros((2, 3), np.int64))) == ()


def test_a_blocked_direction_of_a_joint_factor_leaves_the_other():
    space = LabelSpace()
    factor = Factor((1, 2), space.fresh((3, 4)))
    (left,) = space.block_axes((factor,), [2], Reason("test", "n"))
    assert left.axes == (1,)
    rows = {p.slices.size: p for p in space.projections}
    np.testing.assert_array_equal(rows[3].children, factor.atoms)
    ((atoms, reason),) = space.blocks
    assert reason.text == "test" and set(atoms) == set(rows[4].slices)


def test_ties_to_the_fixed_atom_block_instead():
    space = LabelSpace()
    a = space.fresh(3)
    space.tie(a, np.array([FIXED, 7, FIXED]), Reason("meets nothing", "n"))
    assert {int(i) for atoms, _ in space.blocks for i in atoms} == {int(a[0]), int(a[2])}
    ((left, right),) = space.ties
    assert left.tolist() == [int(a[1])] and right.tolist() == [7]


def labels_of(base: tuple[Nodes, dict, Arrays], nodes: Nodes, arrays: Arrays) -> tuple[Propagation, Labels]:
    propagation = propagate(base, nodes, arrays, ["y"])
    return propagation, propagation.value_labels.get("y", ())


@pytest.mark.parametrize(
    "op_type, inputs, arrays, attributes, blocks",
    [
        ("Softmax", [], {}, {"axis": 1}, True),
        ("Softmax", [], {}, {"axis": -1}, False),
        ("LogSoftmax", [], {}, {"axis": 1}, True),
        ("ReduceMean", ["a"], {"a": ints(1)}, {}, True),
        ("ReduceMean", ["a"], {"a": ints(2, 3)}, {"keepdims": 0}, False),
        ("ReduceMax", [], {}, {}, True),
        ("ReduceSum", [], {}, {"noop_with_empty_axes": 1}, False),
        ("LRN", [], {}, {"size": 3}, True),
        ("CumSum", ["a"], {"a": np.array(1, np.int64)}, {}, True),
        ("CumSum", ["a"], {"a": np.array(2, np.int64)}, {}, False),
        ("LpNormalization", [], {}, {"axis": 1}, True),
        ("MeanVarianceNormalization", [], {}, {"axes": [1, 2, 3]}, True),
        ("MeanVarianceNormalization", [], {}, {"axes": [0, 2, 3]}, False),
        ("MaxPool", [], {}, {"kernel_shape": [2, 2]}, False),
        ("GlobalAveragePool", [], {}, {}, False),
        ("Relu", [], {}, {}, False),
    ],
)
def test_operators_that_mix_values(op_type, inputs, arrays, attributes, blocks):
    propagation, labels = labels_of(image(), one(op_type, inputs, **attributes), arrays)
    atoms = propagation.parameter_atoms["w", 0]
    assert blocked_atoms(propagation) == (set(atoms.tolist()) if blocks else set())
    if blocks:
        assert labels == ()
    else:
        (factor,) = labels
        assert factor.axes == (1,)
        np.testing.assert_array_equal(factor.atoms, atoms)


@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_arg_operators_over_space_keep_channel_labels(op_type, keepdims):
    _, labels = labels_of(image(), one(op_type, [], axis=2, keepdims=keepdims), {})
    assert [f.axes for f in labels] == [(1,)]
    _, labels = labels_of(image(), one(op_type, [], axis=0, keepdims=keepdims), {})
    assert [f.axes for f in labels] == [(1,) if keepdims else (0,)]


def test_the_table_describes_every_rule():
    assert set(RULES) == set(EFFECTS)
    assert all(effect == effect.strip() and len(effect) > 10 for effect in EFFECTS.values())


def test_movement_check_can_fail():
    """The helper itself: a rule that forgets to permute is caught."""
    nodes, arrays = IMAGE_CASES["channel-shuffle"]
    propagation = propagate(image(), nodes, arrays, ["y"])
    (factor,) = propagation.value_labels["x"]
    unmoved = full(factor, propagation.shapes["y"])
    with pytest.raises(AssertionError, match="labelled"):
        agrees(propagation, unmoved, "y")


def test_analysis_of_a_program_without_parameters():
    program = build([node("Relu", ["data"], ["y"])], {"data": (1, 3)}, ["y"], {})
    analysis = channel_groups(program)
    assert analysis.groups == () and analysis.blocked == ()
