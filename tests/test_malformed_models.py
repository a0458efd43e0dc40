"""A corpus of malformed models: each is refused by one class of error, in one line that names what is wrong.

Truncated files, damaged bytes, external data that climbs out and limits are in `test_load.py`; mutations of
valid files in `test_fuzz_load.py`.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import save, tensor, weights

from sartor.errors import ModelError, UnsupportedOperatorError
from sartor.ir.channels import channel_groups
from sartor.ir.load import DEFAULT_LIMITS, load

node = helper.make_node
IMAGE = [1, 3, 4, 4]


def i64(name: str, *values: int) -> TensorProto:
    return tensor(name, np.array(values, np.int64))


def body(name: str, nodes: list, outputs: list[str], inputs: list | tuple = ()) -> onnx.GraphProto:
    return helper.make_graph(
        nodes, name, list(inputs), [helper.make_empty_tensor_value_info(o) for o in outputs]
    )


def branches(then: onnx.GraphProto, otherwise: onnx.GraphProto | None = None) -> list:
    otherwise = otherwise or body("e", [node("Neg", ["x"], ["b"])], ["b"])
    return [node("If", ["c"], ["y"], name="choice", then_branch=then, else_branch=otherwise)]


TRUE = tensor("c", np.array(True))
RELU = node("Relu", ["x"], ["a"], name="relu")
LOOP = [
    helper.make_tensor_value_info("i", TensorProto.INT64, []),
    helper.make_tensor_value_info("go", TensorProto.BOOL, []),
    helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
]
FOREVER = body("b", [node("Relu", ["s"], ["t"]), node("Identity", ["go"], ["on"])], ["on", "t"], LOOP)

# Kind: (nodes, initializers, shape of x, what the message says).
CORPUS: dict[str, tuple[list, list, list, str]] = {
    # ---- cycles
    "cycle of two": (
        [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"], ["y"])],
        [],
        [1, 3],
        "cycle",
    ),
    "cycle of one": ([node("Add", ["x", "y"], ["y"], name="own")], [], [1, 3], "cycle"),
    "cycle in a body": (
        branches(body("t", [node("Relu", ["q"], ["a"]), node("Relu", ["a"], ["q"])], ["a"])),
        [TRUE],
        [1, 3],
        "cycle",
    ),
    # ---- shapes that do not fit
    "channels": ([node("Conv", ["x", "w"], ["y"], name="n")], [weights("w", 4, 5, 3, 3)], IMAGE, "'n'"),
    "rank of a weight": ([node("Conv", ["x", "w"], ["y"], name="n")], [weights("w", 5, 3)], IMAGE, "weight"),
    "groups": (
        [node("Conv", ["x", "w"], ["y"], name="n", group=2**40)],
        [weights("w", 4, 3, 1, 1)],
        IMAGE,
        "'n'.*1099511627776 groups",
    ),
    "matrices": ([node("MatMul", ["x", "w"], ["y"], name="n")], [weights("w", 5, 4)], [1, 3], "Incompatible"),
    "statistics": (
        [node("BatchNormalization", ["x", "w", "w", "w", "w"], ["y"], name="n")],
        [weights("w", 5)],
        IMAGE,
        "between 5 and 3",
    ),
    "broadcast": ([node("Add", ["x", "w"], ["y"], name="n")], [weights("w", 5)], [1, 3], "Incompatible"),
    "reshape": (
        [node("Reshape", ["x", "t"], ["y"], name="n")],
        [i64("t", 2, 7)],
        [1, 3],
        r"'n'.*3 elements; its target \[2, 7\] does not fit",
    ),
    "split": (
        [node("Split", ["x", "t"], ["y", "z"], name="n", axis=1)],
        [i64("t", 1, 1)],
        [1, 3],
        "sum of 'split'",
    ),
    "permutation": ([node("Transpose", ["x"], ["y"], name="n", perm=[0, 0])], [], [1, 3], "repeated value"),
    "axis": ([node("Softmax", ["x"], ["y"], name="n", axis=7)], [], [1, 3], "actual value is: 7"),
    "index": (
        [node("Gather", ["x", "t"], ["y"], name="n", axis=1)],
        [i64("t", 9)],
        [1, 3],
        "'n'.*indices reach from 9 to 9",
    ),
    # ---- what is missing, or of a wrong kind
    "initializer": ([node("Add", ["x", "w"], ["y"], name="n")], [], [1, 3], "'n'.*reads value 'w'"),
    "initializer of a body": (
        branches(body("t", [node("Add", ["x", "w"], ["a"], name="n")], ["a"])),
        [TRUE],
        [1, 3],
        "'n'.*reads value 'w'",
    ),
    "input": ([node("Add", ["x"], ["y"], name="n")], [], [1, 3], "Input 1"),
    "one input too many": ([node("Relu", ["x", "x"], ["y"], name="n")], [], [1, 3], "'n'.*has 2 inputs"),
    "attribute": ([node("MaxPool", ["x"], ["y"], name="n")], [], IMAGE, "kernel_shape"),
    "kind of attribute": (
        [node("Softmax", ["x"], ["y"], name="n", axis="one")],
        [],
        [1, 3],
        "'axis' of node 'n' .* is of type STRING; the operator takes INT",
    ),
    "kind of attribute that is never used": (
        [node("LayerNormalization", ["x", "w"], ["y"], name="n", epsilon=1)],
        [weights("w", 3)],
        [1, 3],
        "'epsilon' of node 'n' .* is of type INT; the operator takes FLOAT",
    ),
    # ---- absurd sizes
    "input of 2^40": ([node("Relu", ["x"], ["y"])], [], [1, 2**40], "more than the limit"),
    "target of 2^62": ([node("Reshape", ["x", "t"], ["y"])], [i64("t", -1, 2**62)], [1, 3], "incompatible"),
    "expanded": ([node("Expand", ["x", "t"], ["y"])], [i64("t", 2**20, 2**20, 3)], [1, 3], "than the limit"),
    "tiled": ([node("Tile", ["x", "t"], ["y"])], [i64("t", 2**20, 2**30)], [1, 3], "more than the limit"),
    "padded": ([node("Pad", ["x", "t"], ["y"])], [i64("t", 0, 2**40, 0, 0)], [1, 3], "more than the limit"),
    "enlarged": (
        [node("Resize", ["x", "", "t"], ["y"])],
        [tensor("t", np.array([1, 1, 1e9, 1e9], np.float32))],
        IMAGE,
        "more than the limit",
    ),
    "no stride": (
        [node("Conv", ["x", "w"], ["y"], strides=[0, 0])],
        [weights("w", 4, 3, 1, 1)],
        IMAGE,
        "strides must only contain positive",
    ),
    # ---- nothing in a tensor
    "empty input": ([node("Relu", ["x"], ["y"], name="n")], [], [1, 0], "'n'.* is empty"),
    "empty batch": ([node("Relu", ["x"], ["y"], name="n")], [], [0, 3], "'n'.* is empty"),
    "empty weight": (
        [node("Conv", ["x", "w"], ["y"], name="n")],
        [tensor("w", np.zeros((0, 3, 1, 1), np.float32))],
        IMAGE,
        "'n'.* is empty",
    ),
    "empty slice": (
        [node("Slice", ["x", "t", "t", "one"], ["s"], name="n"), node("MatMul", ["s", "w"], ["y"])],
        [i64("t", 2), i64("one", 1), tensor("w", np.zeros((0, 4), np.float32))],
        [1, 3],
        "'n'.* is empty",
    ),
    # ---- bodies
    "no else branch": (
        [node("If", ["c"], ["y"], name="n", then_branch=body("t", [RELU], ["a"]))],
        [TRUE],
        [1, 3],
        "else_branch",
    ),
    "branches of different lengths": (
        branches(body("t", [RELU], ["a"]), body("e", [node("Neg", ["x"], ["b"])], ["b", "b"])),
        [TRUE],
        [1, 3],
        "different number of outputs",
    ),
}
UNSUPPORTED: dict[str, tuple[list, list, list, str]] = {
    "loop": (
        [node("Loop", ["count", "c", "x"], ["y"], name="n", body=FOREVER)],
        [TRUE, tensor("count", np.array(2**62))],
        [1, 3],
        "'n' .*Loop.*unrolled",
    ),
    "loop in a branch": (
        branches(body("t", [node("Loop", ["count", "c", "x"], ["a"], name="n", body=FOREVER)], ["a"])),
        [TRUE, tensor("count", np.array(2**62))],
        [1, 3],
        "'n' .*Loop",
    ),
    "unknown operator": ([node("Nonsense", ["x"], ["y"], name="n")], [], [1, 3], "'n'.*'Nonsense'"),
    "unknown domain": (
        [node("Relu", ["x"], ["y"], name="n", domain="com.acme")],
        [],
        [1, 3],
        "'n'.*domain 'com.acme'",
    ),
    "unknown domain in a branch": (
        branches(body("t", [node("Relu", ["x"], ["a"], name="n", domain="com.acme")], ["a"])),
        [TRUE],
        [1, 3],
        "'n'.*domain 'com.acme'",
    ),
}


@pytest.mark.parametrize("kind", [*CORPUS, *UNSUPPORTED])
def test_one_clear_error(tmp_path: Path, kind: str) -> None:
    nodes, initializers, shape, message = (CORPUS | UNSUPPORTED)[kind]
    path = save(
        tmp_path / "m.onnx",
        nodes,
        {"x": shape},
        {"y": None},
        initializers,
        domains=["com.acme"] if "domain" in kind else (),
        check=False,
    )
    start = time.perf_counter()
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert isinstance(caught.value, UnsupportedOperatorError) == (kind in UNSUPPORTED)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.perf_counter() - start < 5
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_the_same_without_the_fault_loads(tmp_path: Path) -> None:
    """The corpus is refused for its faults, not for how it is written."""
    good = {
        "conv": ([node("Conv", ["x", "w"], ["y"])], [weights("w", 4, 3, 1, 1)], IMAGE),
        "slice": (
            [node("Slice", ["x", "a", "b", "b"], ["s"]), node("MatMul", ["s", "w"], ["y"])],
            [i64("a", 0), i64("b", 1), weights("w", 1, 4)],
            [1, 3],
        ),
        "branches": (branches(body("t", [RELU], ["a"])), [TRUE], [1, 3]),
        "norm": (
            [node("LayerNormalization", ["x", "w"], ["y"], epsilon=1e-5)],
            [weights("w", 3)],
            [1, 3],
        ),
        "nothing appended": (
            [node("Concat", ["x", "w"], ["c"], axis=1), node("Relu", ["c"], ["y"])],
            [tensor("w", np.zeros((1, 0), np.float32))],
            [1, 3],
        ),
    }
    for nodes, initializers, shape in good.values():
        program = load(save(tmp_path / "m.onnx", nodes, {"x": shape}, {"y": None}, initializers, check=False))
        channel_groups(program)
        program.save(tmp_path / "saved.onnx")


def functions_that_double(levels: int) -> onnx.ModelProto:
    """`F0` calls `F1` twice, which calls `F2` twice, and so on."""
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("d", 1)]
    functions = []
    for level in range(levels):
        nodes = [node("Relu", ["x"], ["y"])]
        if level < levels - 1:
            called = f"F{level + 1}"
            nodes = [
                helper.make_node(called, ["x"], ["t"], domain="d"),
                helper.make_node(called, ["t"], ["y"], domain="d"),
            ]
        functions.append(helper.make_function("d", f"F{level}", ["x"], ["y"], nodes, imports))
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 4]) for n in "xy")
    graph = helper.make_graph([helper.make_node("F0", ["x"], ["y"], domain="d")], "g", [x], [y])
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)


def test_functions_that_grow_exponentially(tmp_path: Path) -> None:
    onnx.save(functions_that_double(5), tmp_path / "small.onnx")
    assert len(list(load(tmp_path / "small.onnx").nodes())) == 2**4
    onnx.save(functions_that_double(40), tmp_path / "large.onnx")
    with pytest.raises(ModelError, match="Inlining its functions"):
        load(tmp_path / "large.onnx")


def test_depth_is_limited_in_functions_too(tmp_path: Path) -> None:
    inner = leaf = body("t", [RELU], ["a"])
    for _ in range(DEFAULT_LIMITS.depth):
        inner = body("t", branches(inner, leaf), ["y"])
    model = functions_that_double(1)
    del model.functions[0].node[:]
    model.functions[0].node.extend(branches(inner, leaf))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="nest deeper"):
        load(tmp_path / "m.onnx")
