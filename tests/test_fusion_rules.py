"""What the words of a fusion table mean, and that a plan is priced under any table as the smaller network is."""

from __future__ import annotations

import numpy as np
import pytest
from cost_networks import residual, residual_blocks
from fusion_networks import NETWORKS, Builder

from sartor import backends
from sartor.cost_models.signatures import signature_of
from sartor.cost_models.work import work_of_spec
from sartor.ir.fusion import partition
from sartor.ir.fusion_layout import blocked_values, layout_changes
from sartor.ir.fusion_rules import ACTIVATIONS, GATED, GENERIC, VOCABULARY, FusionRules
from sartor.ir.layout import FAMILY as LAYOUT
from sartor.ir.population import Population
from sartor.ir.workload import build_workload

METRICS = ("macs", "parameters", "weight_bytes", "bytes_read", "bytes_written")


def groups(program, **fuses):
    """Node names per kernel under a table, one node per kernel left out."""
    rules = FusionRules.of({name.replace("_", " "): words for name, words in fuses.items()})
    return [tuple(n.name for n in g.nodes) for g in partition(program, rules=rules) if len(g.nodes) > 1]


def conv_then(*ops, shape=(1, 16, 8, 8)):
    b = Builder(shape)
    b.conv("x", shape[1], shape[1], name="c")
    for op in ops:
        b.op(op, name=op.lower())
    b.op("Neg", name="end")
    return b.program()


def test_only_what_the_table_names_is_taken_in():
    program = conv_then("Relu", "Tanh")
    assert groups(program) == []
    assert groups(program, Conv=("Relu",)) == groups(program, Conv=("Relu", "Tanh")) == [("c", "relu")]
    assert groups(program, Conv=("Relu", "Tanh", "Chain")) == [("c", "relu", "tanh")]
    assert groups(program, Elementwise=("Relu", "Tanh", "Neg")) == [("relu", "tanh", "end")]
    assert groups(program, Conv=("Relu",), Elementwise=("Relu", "Tanh", "Neg")) == [
        ("c", "relu"),
        ("tanh", "end"),
    ]


def test_a_bias_and_a_scale_are_constants_of_one_number_or_one_per_channel():
    for shape, taken in (
        ((), True),
        ((16, 1, 1), True),
        ((1, 16, 1, 1), True),
        ((16, 8, 8), False),
        ((8,), False),
    ):
        for op, word in (("Add", "Bias"), ("Mul", "Scale")):
            b = Builder((1, 16, 8, 8))
            b.conv("x", 16, 16, name="c")
            b.op(op, "c", b.constant("k", np.ones(shape, np.float32)), name="f")
            assert bool(groups(b.program(), Conv=(word,))) == taken, (shape, word)
            assert not groups(b.program(), Conv=("Relu",))


def sums(second):
    """Two convolutions of `x` and their sum; `second` names the operand that comes second."""
    b = Builder((1, 16, 8, 8))
    r = b.op("Relu", b.conv("x", 16, 16, name="stem"), name="r")
    b.conv(r, 16, 16, name="early"), b.conv(r, 16, 16, name="late")
    first = "late" if second == "early" else "early"
    b.op("Add", first, second, name="sum")
    b.op("Neg", name="end")
    return b.program()


@pytest.mark.parametrize("second", ["early", "late"])
def test_a_sum_goes_to_its_first_operand_or_to_the_last_that_runs(second):
    first = "late" if second == "early" else "early"
    assert (first, "sum") in groups(sums(second), Conv=("Add",))
    (generic,) = [
        tuple(n.name for n in g.nodes) for g in partition(sums(second)) if g.nodes[-1].name == "sum"
    ]
    assert generic == ("late", "sum")


def test_a_blocked_sum_needs_the_layout_on_both_sides_and_a_plain_one_nothing():
    def program(channels, other):
        b = Builder((1, channels, 8, 8))
        x = b.op("Relu", b.conv("x", channels, channels, name="a"), name="r")
        other = b.op("Softmax", x, name="s", axis=1) if other == "plain" else x
        b.op("Add", b.conv(x, channels, channels, name="b"), other, name="sum")
        b.op("Neg", name="end")
        return b.program()

    taken = [("b", "sum")]
    assert groups(program(16, "blocked"), Conv=("BlockedAdd",)) == taken
    assert groups(program(16, "plain"), Conv=("BlockedAdd",)) == []
    for other in ("blocked", "plain"):  # 18 is no multiple of 4: the convolution is in the plain layout
        assert groups(program(18, other), Conv=("BlockedAdd",)) == taken
        assert groups(program(18, other), Conv=("Add",)) == taken
    b = Builder((1, 18, 8, 8))
    b.op("Relu", b.op("Add", b.conv("x", 18, 18, name="b"), "x", name="sum"), name="r")
    assert groups(b.program(), Conv=("BlockedAdd", "Relu")) == [("b", "sum", "r")]
    assert {"a", "r", "b"} <= blocked_values(program(16, "plain"))


@pytest.mark.parametrize(
    ("activation", "blocked", "plain"),
    [
        ("Relu", "inside", "inside"),
        ("Sigmoid", "inside", "inside"),
        ("Clip", "apart", "inside"),  # fused before layouts are chosen, and unknown afterwards
        ("LeakyRelu", "apart", "inside"),
        ("HardSwish", "inside", "apart"),  # the plain kernel does not have it
        ("Gelu", "inside", "apart"),
    ],
)
def test_which_activations_a_convolution_computes_behind_its_sum(activation, blocked, plain):
    for channels, expected in ((16, blocked), (18, plain)):
        net = sum_then(activation, channels)
        taken = groups(net, Conv=("BlockedAdd", activation))
        assert taken[-1] == (("b", "sum", "act") if expected == "inside" else ("b", "sum"))
        stays = "act" in blocked_values(net)
        assert stays == (channels == 16 and expected == "inside")


def sum_then(activation, channels):
    """A convolution, its sum with what it reads, an activation, and another convolution."""
    b = Builder((1, channels, 8, 8))
    x = b.conv("x", channels, channels, name="a")
    y = b.op("Add", b.conv(x, channels, channels, name="b"), x, name="sum")
    bounds = [b.constant(n, np.asarray(v, np.float32)) for n, v in (("low", 0.0), ("high", 6.0))]
    y = b.op(activation, y, *(bounds if activation == "Clip" else ()), name="act")
    b.conv(y, channels, channels, name="end")
    return b.program()


def test_an_activation_right_behind_a_convolution():
    """Without a sum, Clip is inside in both layouts; HardSwish only in the blocked one, which groups may lack."""

    def program(activation, group, channels=32):
        b = Builder((1, channels, 8, 8))
        x = b.conv("x", channels, channels, name="c", group=group)
        bounds = [b.constant(n, np.asarray(v, np.float32)) for n, v in (("low", 0.0), ("high", 6.0))]
        b.op(activation, x, *(bounds if activation == "Clip" else ()), name="act")
        b.op("Neg", name="end")
        return b.program()

    rules = ("BlockedAdd", "Clip", "HardSwish")
    assert groups(program("Clip", 1), Conv=rules) == groups(program("Clip", 4), Conv=rules) == [("c", "act")]
    assert groups(program("HardSwish", 1), Conv=rules) == [("c", "act")]
    assert groups(program("HardSwish", 2), Conv=rules) == [("c", "act")]  # two groups of whole blocks
    assert groups(program("HardSwish", 4), Conv=rules) == []  # groups of half a block
    assert groups(program("HardSwish", 4), Conv=("Add", "HardSwish")) == [("c", "act")]  # no such layouts


def test_poolings_need_whole_blocks_and_take_those_of_others():
    def program(channels, before):
        b = Builder((1, channels, 8, 8))
        x = b.op("Softmax", b.conv("x", channels, channels, name="c"), name="s", axis=1)
        x = b.op("MaxPool", x if before == "plain" else "c", name="pool", kernel_shape=[2, 2], strides=[2, 2])
        b.conv(x, channels, channels, name="end")
        return b.program()

    for before in ("plain", "blocked"):
        assert "pool" in blocked_values(program(32, before))
        assert "pool" not in blocked_values(program(24, before))
    assert layout_changes(program(32, "blocked")) == ({"x"}, {"c", "end"})  # the Softmax reads the first
    assert layout_changes(program(24, "blocked")) == ({"x", "pool"}, {"c", "end"})
    assert layout_changes(program(32, "plain")) == ({"x", "s"}, {"c", "end"})


def test_a_change_of_layout_does_a_transpose_beside_it():
    def kernels(perm):
        b = Builder((1, 16, 8, 8))
        b.op(
            "Softmax",
            b.op("Transpose", b.conv("x", 16, 16, name="a"), name="t", perm=perm),
            name="end",
            axis=-1,
        )
        return copies(b.program())

    assert kernels([0, 2, 3, 1]) == {("ReorderInput", "x"): 2 * 4 * 16 * 64}
    assert kernels([0, 1, 3, 2]) == {
        ("ReorderInput", "x"): 2 * 4 * 16 * 64,
        ("ReorderOutput", "a"): 2 * 4 * 16 * 64,
    }


def copies(program, fractions=None, extents=None):
    """Bytes moved by each copy that exists."""
    rules = FusionRules.of({"Conv": ("BlockedAdd",)})
    layout = build_workload(program, extents, rules=rules).layout
    plans = Population(fractions or {}, {})
    found = [kernel for kernel, count in layout.kernels(plans) if kernel.family == LAYOUT and np.all(count)]
    return {(k.op_type, k.inputs[0].name): 2 * plans.quantity(k.bytes_read) for k in found}


def test_no_copies_where_a_runtime_has_no_layout_of_its_own():
    assert not list(
        build_workload(conv_then("Relu"), rules=FusionRules.of({})).layout.kernels(Population({}, {}))
    )


@pytest.mark.parametrize("seed", range(4))
def test_copies_under_a_plan_are_those_of_the_smaller_network(seed):
    """Widths off the grid leave the layout, and come back to it; one population has them all."""
    sizes = {"a": 16, "b": 24, "e": 40, "m0": 16, "m1": 24, "m2": 24}
    net = residual()
    rng = np.random.default_rng(seed)
    plans = [{g: int(rng.integers(2, n + 1)) for g, n in sizes.items()} for _ in range(8)]
    layout = build_workload(
        net.program(("logits",)), net.extents, rules=FusionRules.of({"Conv": ("BlockedAdd",)})
    ).layout
    fractions = {g: np.array([kept[g] / n for kept in plans]) for g, n in sizes.items()}
    population = Population(fractions, {})
    found = [
        (kernel, np.broadcast_to(count, len(plans)), population.quantity(kernel.bytes_read))
        for kernel, count in layout.kernels(population)
        if kernel.family == LAYOUT
    ]
    assert len({tuple(count) for _, count, _ in found}) > 1  # plans differ in what they copy
    for number, kept in enumerate(plans):
        mine = {
            (kernel.op_type, kernel.inputs[0].name): 2 * float(np.broadcast_to(read, len(plans))[number])
            for kernel, count, read in found
            if count[number]
        }
        assert mine == copies(residual(kept).program(("logits",)))


def test_a_sum_in_place_needs_an_operand_that_nobody_reads_afterwards():
    def program(late):
        b = Builder((1, 16, 8, 8))
        x = b.op("Relu", b.conv("x", 16, 16, name="a"), name="r")
        y = b.op("Add", b.conv(x, 16, 16, name="b"), x, name="sum")
        b.op("Concat", y, x if late else y, name="end", axis=1)
        return b.program()

    assert groups(program(False), Conv=("InPlaceAdd",)) == [("b", "sum")]
    assert groups(program(True), Conv=("InPlaceAdd",)) == []
    assert groups(program(True), Conv=("Add",)) == [("b", "sum")]


def test_x_times_its_gate_is_one_kernel_with_or_without_a_convolution():
    b = Builder((1, 16, 8, 8))
    c = b.conv("x", 16, 16, name="c")
    b.op("Mul", c, b.op("Sigmoid", c, name="gate"), name="silu")
    program = b.program()
    assert groups(program, Conv=("Silu",)) == [("c", "gate", "silu")]
    assert groups(program, Conv=("Sigmoid",), Sigmoid=("Silu",)) == [("gate", "silu")]
    assert groups(program, Conv=("Sigmoid",)) == []


def test_constants_are_computed_when_the_model_is_loaded():
    b = Builder((4, 6))
    turned = b.op("Transpose", b.weight("w", 8, 6), name="turned", perm=[1, 0])
    b.op("MatMul", "x", turned, name="product")
    program = b.program()
    names = [k.name for k in build_workload(program, rules=FusionRules.of({})).kernels]
    assert names == ["product"]
    assert [k.name for k in build_workload(program).kernels] == ["turned", "product"]
    priced = build_workload(program, rules=FusionRules.of({})).evaluate()
    assert float(priced.weight_bytes) == 8 * 6 * 4 and float(priced.bytes_read) == 4 * (4 * 6 + 8 * 6)


def test_parts_of_one_value_are_one_split():
    def program(*stretches):
        b = Builder((1, 12, 5))
        for i, (start, end) in enumerate(stretches):
            ends = [b.constant(f"{w}{i}", np.array([v])) for w, v in (("s", start), ("e", end), ("a", 1))]
            b.op("Neg", b.op("Slice", "x", *ends, name=f"part{i}"), name=f"n{i}")
        b.op("Concat", *(f"n{i}" for i in range(len(stretches))), name="end", axis=1)
        return b.program()

    assert groups(program((0, 4), (4, 12)), Slice=("Siblings",)) == [("part0", "part1")]
    assert groups(program((4, 12), (0, 4)), Slice=("Siblings",)) == [("part0", "part1")]
    assert groups(program((0, 4), (5, 12)), Slice=("Siblings",)) == []
    assert groups(program((0, 4), (4, 11)), Slice=("Siblings",)) == []
    kernel = build_workload(program((0, 4), (4, 12)), rules=FusionRules.of({"Slice": ("Siblings",)})).kernels[
        0
    ]
    assert kernel.op_type == "Split" and kernel.attributes == {"axis": 1} and len(kernel.outputs) == 2
    assert kernel.inputs[1].value == [4, 8] and kernel.bytes_written.full == 12 * 5 * 4


def test_views_are_no_kernels():
    b = Builder((1, 12, 5, 5))
    ends = [b.constant(name, np.array([v])) for name, v in (("s", 0), ("m", 4), ("e", 12), ("a", 1))]
    b.op("Slice", "x", ends[0], ends[1], ends[3], name="first")
    b.op("Slice", "x", ends[1], ends[2], ends[3], name="second")
    b.op(
        "Transpose", b.op("Concat", "second", "first", name="rolled", axis=1), name="last", perm=[0, 2, 3, 1]
    )
    b.op("Neg", b.op("Transpose", b.op("Neg", "last", name="n"), name="back", perm=[0, 3, 1, 2]), name="end")
    program = b.program()

    def names(**fuses):
        return [k.name for k in build_workload(program, rules=FusionRules.of(fuses)).kernels]

    everything = ["first", "second", "rolled", "last", "n", "back", "end"]
    assert names() == everything
    assert names(Slice=("Views",)) == everything[2:]
    assert names(Transpose=("Views",)) == [n for n in everything if n != "back"]


def test_products_take_in_what_scales_and_turns_their_operands():
    b = Builder((2, 6, 8))
    b.constant("half", np.asarray(0.5, np.float32))
    scaled = b.op("Mul", "x", "half", name="scaled")
    turned = b.op("Transpose", "x", name="turned", perm=[0, 2, 1])
    b.op("Softmax", b.op("MatMul", scaled, turned, name="scores"), name="soft", axis=-1)
    b.op("MatMul", "soft", "x", name="mix")
    program = b.program()
    both = ("Scale before", "Transpose before")
    assert groups(program, MatMul=both) == [("scaled", "turned", "scores")]
    assert groups(program, MatMul=both[:1]) == [("scaled", "scores")]
    (group,) = [g for g in partition(program, rules=FusionRules.of({"MatMul": both})) if g.before]
    assert [f.op_type for f in group.before] == ["Scale", "Transpose"] and group.lead.name == "scores"
    assert groups(program, MatMul=("Attention",)) == [("turned", "scores", "soft", "mix")]
    kernel = build_workload(program, rules=FusionRules.of({"MatMul": ("Attention",)})).kernels[1]
    assert kernel.name == "scores"
    assert kernel.macs.full == 2 * (2 * 6 * 6 * 8) and kernel.bytes_written.full == 2 * 6 * 8 * 4
    assert [f.op_type for f in kernel.prologue] == ["Transpose"]


def test_attention_whose_result_is_turned_has_as_many_products_as_heads():
    b = Builder((1, 3, 7, 4))  # heads, tokens, channels
    b.op("MatMul", "x", b.op("Transpose", "x", name="turned", perm=[0, 1, 3, 2]), name="scores")
    b.op("Softmax", "scores", name="soft", axis=-1)
    b.op("Transpose", b.op("MatMul", "soft", "x", name="mix"), name="end", perm=[0, 2, 1, 3])
    workload = build_workload(b.program(), rules=FusionRules.of({"MatMul": ("Attention",)}))
    kernel = next(k for k in workload.kernels if k.name == "scores")
    assert [f.op_type for f in kernel.epilogue] == ["Softmax", "MatMul", "Transpose"]
    signature = signature_of(kernel)
    assert [signature.spec[name] for name in ("batch", "m", "k", "n")] == [3, 7, 4, 7]
    work = work_of_spec(signature.spec, ())
    assert work.macs == 3 * 7 * 7 * 4


def test_a_product_takes_in_one_number_that_scales_its_result():
    def program(shape, operands=("x", "y")):
        b = Builder((2, 6, 6))
        b.op("Tanh", "x", name="y")
        b.op("MatMul", *operands, name="product")
        b.op("Mul", "product", b.constant("k", np.full(shape, 0.5, np.float32)), name="scaled")
        b.op("Softmax", name="end", axis=-1)
        return b.program()

    behind = ("Scale behind",)
    assert (
        groups(program(()), MatMul=behind) == groups(program((1,)), MatMul=behind) == [("product", "scaled")]
    )
    assert groups(program((6,)), MatMul=behind) == []  # a number per column
    assert groups(program(()), MatMul=("Scale before",)) == []
    kernel = build_workload(program(()), rules=FusionRules.of({"MatMul": behind})).kernels[1]
    assert [f.op_type for f in kernel.epilogue] == ["Scale"]


def test_a_sum_in_front_of_a_normalization():
    b = Builder((1, 7, 8))
    total = b.op("Add", "x", b.op("Tanh", "x", name="t"), name="sum")
    b.op("LayerNormalization", total, b.weight("g", 8), b.weight("b", 8), name="norm", axis=-1)
    assert groups(b.program(), LayerNormalization=("Add before",)) == [("sum", "norm")]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_plans_are_priced_as_smaller_networks_under_the_rules_of_a_target(target):
    """Widths stay multiples of 4: beyond them ONNX Runtime leaves its layout, and what it fuses changes.

    What remains behind a removed block is priced as a kernel of its own, where OpenVINO puts the second Relu into the
    convolution in front of the block: bytes are then an upper bound.
    """
    rules = FusionRules.of(backends.get(target).capabilities().fuses)
    sizes = {"a": 16, "b": 24, "e": 40, "m0": 16, "m1": 24, "m2": 24}
    net = residual()
    workload = build_workload(net.program(("logits",)), net.extents, residual_blocks(), rules)
    rng = np.random.default_rng(0)
    for skip in ((), (0,), (2,), (0, 2)):
        kept = {g: 4 * int(rng.integers(1, n // 4 + 1)) for g, n in sizes.items()}
        real = build_workload(residual(kept, skip).program(("logits",)), rules=rules).evaluate()
        plan = {g: kept[g] / n for g, n in sizes.items()}
        priced = workload.evaluate(plan, {f"block{i}": True for i in skip})
        for metric in METRICS:
            ours, theirs = float(getattr(priced, metric)), float(getattr(real, metric))
            bound = bool(skip) and target == "openvino" and metric.startswith("bytes")
            assert ours == theirs or (bound and theirs < ours < 1.6 * theirs), (skip, metric)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tflite"])
def test_tables_use_the_vocabulary(target):
    from onnx import defs

    module = backends.get(target).capabilities
    try:
        fuses = module().fuses
    except Exception as error:  # the vendor's package is not installed
        pytest.skip(str(error))
    words = {word for row in fuses.values() for word in row}
    assert all(word in VOCABULARY | ACTIVATIONS | set(GATED.values()) or defs.has(word) for word in words)
    rules = FusionRules.of(fuses)
    assert rules.sha256 != GENERIC.sha256 and rules == FusionRules.of(dict(reversed(fuses.items())))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_node_is_in_one_kernel_under_any_rules(name):
    program = NETWORKS[name]()
    for rules in (
        GENERIC,
        *(FusionRules.of(backends.get(t).capabilities().fuses) for t in ("onnxruntime", "openvino")),
    ):
        found = [n.name for g in partition(program, rules=rules) for n in g.nodes]
        assert len(found) == len(set(found)) and set(found) == {n.name for n in program.nodes()}
