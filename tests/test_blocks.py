"""Residual blocks: what is found, what makes a branch zero, and every reason for refusing."""

from __future__ import annotations

import time

import numpy as np
import pytest
from builders import node, program_from_nodes
from cost_networks import resnet50
from models import captured

from sartor.ir.blocks import masked_block_initializers, residual_blocks

CHANNELS = 4


def weights(seed=0, **shapes):
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def residual(branch, *, tail=(), outputs=("out",), extra=(), shortcut="s", **shapes):
    """`s = Relu(x)`, the nodes of a branch that ends in `b`, `y = Add(b, s)`, `out = Sigmoid(y)`."""
    initializers = weights(w=(CHANNELS, CHANNELS, 1, 1), c=(CHANNELS,), m=(CHANNELS, 1, 1), **shapes)
    nodes = [
        node("Relu", ["x"], ["s"], "entry"),
        *branch,
        node("Add", ["b", shortcut], ["y"], "add"),
        node("Sigmoid", ["y"], ["out"], "after"),
        *tail,
    ]
    used = {name for item in nodes for name in item.input}
    given = {k: v for k, v in {**initializers, **dict(extra)}.items() if k in used}
    return program_from_nodes(nodes, {"x": ("N", CHANNELS, 5, 5)}, outputs, given)


def only(program):
    (block,) = residual_blocks(program)
    return block


def conv(source="s", target="b", name="conv", weight="w", bias="c"):
    return node("Conv", [source, weight, bias], [target], name)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("resnet", ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
        ("mobilenet", ["features.2.conv", "features.4.conv"]),
        ("se", ["block1", "block2"]),
        ("vit", ["blocks.0.attn", "blocks.0.fc2", "blocks.1.attn", "blocks.1.fc2"]),
        ("vit_manual", ["blocks.0.attn", "blocks.0.fc2", "blocks.1.attn", "blocks.1.fc2"]),
        ("densenet", []),
        ("unet", []),
        ("vgg", []),
    ],
)
def test_blocks_of_each_family_in_graph_order(model, names):
    blocks = residual_blocks(captured(model))
    assert [block.name for block in blocks] == names
    refused = {block.name: block.reason for block in blocks if not block.removable}
    if model == "resnet":
        assert set(refused) == {"layer2.0"} and "the shortcut passes through" in refused["layer2.0"]
        assert "(Conv)" in refused["layer2.0"]
    else:
        assert not refused


def test_last_affine_is_where_the_branch_ends():
    def affine(model):
        return {
            b.name: masked_block_initializers(captured(model), b) for b in residual_blocks(captured(model))
        }

    assert affine("resnet")["layer1.0"] == ("layer1.0.bn2.weight", "layer1.0.bn2.bias")
    assert affine("resnet")["layer2.0"] == ()
    assert affine("vit")["blocks.0.attn"] == ("blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias")
    assert affine("vit")["blocks.1.fc2"] == ("blocks.1.fc2.weight", "blocks.1.fc2.bias")


def test_fields_of_a_simple_block():
    block = only(residual([node("Transpose", ["m"], ["t"], "t", perm=[1, 2, 0]), conv()], tail=()))
    assert (block.name, block.add, block.shortcut, block.branch) == ("add", "add", "s", "b")
    assert (block.inputs, block.outputs, block.nodes) == (("s",), ("y",), ("conv", "add"))
    assert block.removable and block.reason == ""
    assert block.last_affine == ("w", "c") and block.last_affine_sites == (("conv", 1), ("conv", 2))


def test_parameter_arithmetic_of_the_branch_alone_belongs_to_it():
    nodes = [
        node("Transpose", ["w"], ["t"], "t", perm=[1, 0, 2, 3]),
        node("Conv", ["s", "t", "c"], ["b"], "conv"),
    ]
    block = only(residual(nodes))
    assert block.nodes == ("t", "conv", "add")
    assert block.last_affine_sites == (("t", 0), ("conv", 2))


def test_shape_arithmetic_is_no_second_entry():
    nodes = [
        conv(target="h"),
        node("Shape", ["x"], ["size"], "shape"),
        node("Reshape", ["h", "size"], ["b"], "reshape"),
    ]
    block = only(residual(nodes))
    assert block.removable and block.nodes == ("conv", "shape", "reshape", "add")


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ([node("Relu", ["h"], ["b"])], ("w", "c")),
        ([node("HardSwish", ["h"], ["b"])], ("w", "c")),
        ([node("Sigmoid", ["h"], ["g"]), node("Mul", ["h", "g"], ["b"])], ("w", "c")),
        ([node("Sigmoid", ["h"], ["g"]), node("Mul", ["g", "h"], ["b"])], ("w", "c")),
        ([node("Mul", ["h", "m"], ["b"])], ("m",)),
        ([node("Mul", ["m", "h"], ["b"])], ("m",)),
        ([node("Mul", ["h", "alpha"], ["b"])], ("w", "c")),
        ([node("Div", ["h", "m"], ["b"])], ("w", "c")),
        ([node("Add", ["h", "m"], ["b"])], ("w", "c", "m")),
        ([node("Clip", ["h", "low", "high"], ["b"])], ("w", "c")),
        ([node("MaxPool", ["h"], ["b"], kernel_shape=[1, 1])], ("w", "c")),
    ],
)
def test_operators_that_keep_zero_are_walked_through(tail, expected):
    extra = {"low": np.float32(-1), "high": np.float32(6), "alpha": np.float32(0.3)}
    block = only(residual([conv(target="h"), *tail], extra=extra))
    assert block.removable, block.reason
    assert block.last_affine == expected


def test_a_shared_weight_is_fine_and_its_sites_are_named():
    program = residual([conv()], tail=[conv("out", "last", "outside")], outputs=("last",))
    block = only(program)
    assert block.removable and block.last_affine_sites == (("conv", 1), ("conv", 2))


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        ([node("Softmax", ["h"], ["b"], "soft", axis=1)], "'soft' (Softmax)"),
        ([node("Exp", ["h"], ["b"], "exp")], "'exp' (Exp)"),
        ([node("Clip", ["h", "one"], ["b"], "clip")], "'clip' (Clip)"),
        ([node("Sub", ["h", "s"], ["b"], "sub")], "'sub' (Sub) of two activations"),
        (
            [
                node("Slice", ["h", "i0", "i2", "i1"], ["p"]),
                node("Slice", ["h", "i2", "i4", "i1"], ["q"]),
                node("Concat", ["q", "p"], ["b"], "cat", axis=1),
            ],
            "'cat' (Concat)",
        ),
        ([node("Mul", ["s", "h"], ["z"]), node("Add", ["z", "s"], ["b"], "sum")], "'sum' (Add) of two"),
    ],
)
def test_branches_that_nothing_makes_zero_are_refused(tail, reason):
    extra = {f"i{k}": np.array([k], np.int64) for k in (0, 1, 2, 4)} | {"one": np.float32(1)}
    blocks = {b.add: b for b in residual_blocks(residual([conv(target="h"), *tail], extra=extra))}
    block = blocks["add"]
    assert not block.removable and block.last_affine == ()
    assert reason in block.reason


def test_downsampled_shortcut_is_refused_and_names_the_layer():
    nodes = [
        conv(target="h"),
        node("Relu", ["h"], ["h2"]),
        conv("h2", "b", "conv2"),
        conv("s", "d", "down"),
    ]
    block = only(residual(nodes, shortcut="d"))
    assert not block.removable
    assert block.reason == "the shortcut passes through 'down' (Conv)"
    assert (block.inputs, block.branch) == (("s",), "b")


def test_branch_used_elsewhere_is_refused():
    nodes = [conv(target="h"), conv("h", "b", "conv2")]
    program = residual(nodes, tail=[node("Mul", ["out", "h"], ["z"], "thief")], outputs=("z",))
    assert "'h' of the branch is also used by 'thief' (Mul)" in only(program).reason


def test_graph_outputs_are_refused():
    assert "the result of 'add' (Add) is a graph output" in only(residual([conv()], outputs=("y",))).reason
    inside = residual([conv(target="h"), conv("h", "b", "conv2")], outputs=("out", "h"))
    assert "'h' of the branch, made by 'conv', is a graph output" in only(inside).reason


def test_broadcast_shortcut_is_refused():
    nodes = [
        node("GlobalAveragePool", ["s"], ["g"]),
        node("Expand", ["g", "size"], ["e"]),
        node("Conv", ["e", "w", "c"], ["b"], "conv"),
    ]
    program = residual(nodes, shortcut="g", extra={"size": np.array([1, 1, 3, 3], np.int64)})
    assert only(program).reason == (
        "'add' (Add) broadcasts its shortcut from shape [1, 4, 1, 1] to [1, 4, 3, 3]"
    )


def test_two_inputs_and_activation_functions_are_no_blocks():
    product = [node("Mul", ["s", "s"], ["q"]), node("Mul", ["q", "alpha"], ["b"])]
    assert residual_blocks(residual(product, extra={"alpha": np.float32(0.044715)})) == ()
    two = program_from_nodes(
        [node("Conv", ["x", "w"], ["h"]), node("Add", ["h", "z"], ["y"])],
        {"x": (1, 4, 3, 3), "z": (1, 4, 3, 3)},
        ["y"],
        weights(w=(4, 4, 1, 1)),
    )
    assert residual_blocks(two) == ()


def test_nested_and_consecutive_blocks_take_the_nearest_shortcut():
    nodes = [
        conv(target="a", name="c1"),
        node("Relu", ["a"], ["r"]),
        conv("r", "i", "c2"),
        node("Add", ["r", "i"], ["n"], "inner"),
        conv("n", "b", "c3"),
    ]
    inner, outer = residual_blocks(residual(nodes))
    assert (inner.add, inner.shortcut, inner.nodes) == ("inner", "r", ("c2", "inner"))
    assert (outer.add, outer.shortcut) == ("add", "s")
    assert set(inner.nodes) < set(outer.nodes) and inner.removable and outer.removable


def test_a_resnet_50_takes_less_than_a_tenth_of_a_second():
    program = resnet50().program(("logits",))
    program.shapes()
    elapsed = []
    for _ in range(3):
        start = time.perf_counter()
        blocks = residual_blocks(program)
        elapsed.append(time.perf_counter() - start)
    assert len(blocks) == 16 and sum(b.removable for b in blocks) == 12
    assert min(elapsed) < 0.1
