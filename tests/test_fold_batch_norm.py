"""fold-batch-norm: before and expected, refusals, and exactness in float64 on random geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import assert_equivalent, node, program_from_nodes, structure_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sartor.passes import fold_batch_norm
from sartor.passes.fold_batch_norm import FoldBatchNorm
from sartor.passes.structure import signature_of

BN = ("gamma", "beta", "mean", "variance")


def batch_norm_parameters(channels, generator, dtype=np.float64, prefix=""):
    return {
        prefix + "gamma": generator.uniform(0.5, 1.5, channels).astype(dtype),
        prefix + "beta": generator.normal(0, 0.3, channels).astype(dtype),
        prefix + "mean": generator.normal(0, 0.3, channels).astype(dtype),
        prefix + "variance": generator.uniform(0.5, 1.5, channels).astype(dtype),
    }


def batch_norm(source, target, name="bn", prefix="", **attributes):
    return node("BatchNormalization", [source, *(prefix + p for p in BN)], [target], name=name, **attributes)


def normal(generator, *shape, dtype=np.float64):
    return generator.standard_normal(shape).astype(dtype)


def conv_program(*, bias=True, dtype=np.float64, extra=(), outputs=("z",), weights=None, **bn_attributes):
    generator = np.random.default_rng(0)
    constants = {"conv.weight": normal(generator, 4, 3, 3, 3, dtype=dtype)}
    constants |= batch_norm_parameters(4, generator, dtype)
    if bias:
        constants["conv.bias"] = normal(generator, 4, dtype=dtype)
    constants |= weights or {}
    inputs = ["x", "conv.weight", *(["conv.bias"] if bias else [])]
    return program_from_nodes(
        [
            node("Conv", inputs, ["y"], name="conv", pads=[1, 1, 1, 1]),
            batch_norm("y", "z", **bn_attributes),
            *extra,
        ],
        {"x": ("N", 3, 6, 5)},
        list(outputs),
        constants,
        dtype=TensorProto.DOUBLE if dtype == np.float64 else TensorProto.FLOAT,
    )


def double_inputs(program, seed=0):
    generator = np.random.default_rng(seed)
    return {k: generator.standard_normal(shape) for k, shape in program.input_shapes.items()}


def check_exact(program, tolerance=1e-12):
    before = program.to_bytes()
    result = FoldBatchNorm().run(program)
    assert result.modified and not result.refusals and result.counts["batch_norms_folded"] == 1
    assert program.to_bytes() == before
    assert "BatchNormalization" not in [n.op_type for n in result.program.nodes()]
    assert signature_of(result.program) == signature_of(program)
    assert_equivalent(program, result.program, tolerance=tolerance, inputs=double_inputs(program))
    return result


def refusal(program):
    result = FoldBatchNorm().run(program)
    assert not result.modified and result.program is program and len(result.refusals) == 1
    assert result.refusals[0].node == "bn"
    return result.refusals[0].reason


class TestBeforeExpected:
    def test_conv_with_bias(self):
        result = check_exact(conv_program(extra=[node("Relu", ["z"], ["out"])], outputs=["out"]))
        assert structure_of(result.program) == [
            "conv.bias: DOUBLE [4]",
            "conv.weight: DOUBLE [4, 3, 3, 3]",
            "y = Conv(x, conv.weight, conv.bias) {pads=(1, 1, 1, 1)}",
            "out = Relu(y)",
        ]

    def test_conv_without_bias_at_a_graph_output(self):
        result = check_exact(conv_program(bias=False))
        assert structure_of(result.program) == [
            "conv.bias: DOUBLE [4]",
            "conv.weight: DOUBLE [4, 3, 3, 3]",
            "z = Conv(x, conv.weight, conv.bias) {pads=(1, 1, 1, 1)}",
        ]

    def test_matmul_gets_an_add(self):
        generator = np.random.default_rng(1)
        program = program_from_nodes(
            [node("MatMul", ["x", "w"], ["y"], name="mm"), batch_norm("y", "z")],
            {"x": ("N", 3)},
            ["z"],
            {"w": normal(generator, 3, 5), **batch_norm_parameters(5, generator)},
            dtype=TensorProto.DOUBLE,
        )
        result = check_exact(program)
        assert structure_of(result.program) == [
            "w: DOUBLE [3, 5]",
            "w_bias: DOUBLE [5]",
            "y = MatMul(x, w)",
            "z = Add(y, w_bias)",
        ]

    @pytest.mark.parametrize("first", [True, False])
    def test_matmul_and_add(self, first):
        generator = np.random.default_rng(1)
        program = program_from_nodes(
            [
                node("MatMul", ["x", "w"], ["y"]),
                node("Add", ["y", "b"] if first else ["b", "y"], ["s"]),
                batch_norm("s", "z"),
            ],
            {"x": ("N", 3)},
            ["z"],
            {"w": normal(generator, 3, 5), "b": normal(generator, 5), **batch_norm_parameters(5, generator)},
            dtype=TensorProto.DOUBLE,
        )
        result = check_exact(program)
        assert len(structure_of(result.program)) == 4

    def test_float32_is_rounded_once(self):
        program = conv_program(dtype=np.float32)
        result = FoldBatchNorm().run(program)
        weight = program.initializer_array("conv.weight").astype(np.float64)
        gamma, variance = (program.initializer_array(n).astype(np.float64) for n in ("gamma", "variance"))
        epsilon = float(np.float32(1e-5))
        expected = (weight * (gamma / np.sqrt(variance + epsilon))[:, None, None, None]).astype(np.float32)
        actual = result.program.initializer_array("conv.weight")
        # the default epsilon is 1e-5 in the operator's definition, float32 only once it is stored
        assert np.abs(actual - expected).max() <= np.spacing(np.abs(expected).max())
        assert_equivalent(program, result.program, tolerance=1e-6)

    def test_two_batch_norms_in_a_row_fold_one_by_one(self):
        generator = np.random.default_rng(5)
        program = conv_program(
            extra=[batch_norm("z", "out", name="bn2", prefix="second.")],
            outputs=["out"],
            weights=batch_norm_parameters(4, generator, prefix="second."),
        )
        once = FoldBatchNorm().run(program)
        assert [r.node for r in once.refusals] == ["bn2"]
        twice = FoldBatchNorm().run(once.program)
        assert_equivalent(program, twice.program, tolerance=1e-12, inputs=double_inputs(program))
        assert not FoldBatchNorm().run(twice.program).modified

    def test_shared_batch_norm_parameters_stay_for_the_other_reader(self):
        generator = np.random.default_rng(6)
        program = conv_program(
            extra=[node("Conv", ["z", "w2"], ["y2"]), batch_norm("y2", "out", name="bn2")],
            outputs=["out"],
            weights={"w2": normal(generator, 4, 4, 1, 1)},
        )
        result = FoldBatchNorm().run(program)
        assert result.counts["batch_norms_folded"] == 2 and "gamma" not in result.program.initializers
        assert_equivalent(program, result.program, tolerance=1e-12, inputs=double_inputs(program))

    def test_inside_a_body_with_weights_outside(self):
        generator = np.random.default_rng(7)
        then = helper.make_graph(
            [
                helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
                helper.make_node("BatchNormalization", ["y", *BN], ["z"], name="bn"),
            ],
            "then",
            [],
            [helper.make_tensor_value_info("z", TensorProto.DOUBLE, None)],
        )
        otherwise = helper.make_graph(
            [helper.make_node("Conv", ["x", "w2"], ["z2"], name="conv2")],
            "else",
            [],
            [helper.make_tensor_value_info("z2", TensorProto.DOUBLE, None)],
        )
        program = program_from_nodes(
            [node("If", ["flag"], ["out"], name="if", then_branch=then, else_branch=otherwise)],
            {"x": (2, 3, 4, 4)},
            ["out"],
            {
                "flag": np.array(True),
                "w": normal(generator, 4, 3, 3, 3),
                "w2": normal(generator, 4, 3, 3, 3),
                **batch_norm_parameters(4, generator),
            },
            dtype=TensorProto.DOUBLE,
        )
        result = FoldBatchNorm().run(program)
        assert result.counts["batch_norms_folded"] == 1
        assert_equivalent(program, result.program, tolerance=1e-12, inputs=double_inputs(program))


class TestRefusals:
    def test_result_used_elsewhere(self):
        program = conv_program(extra=[node("Add", ["z", "y"], ["out"], name="skip")], outputs=["out"])
        assert refusal(program) == "'y' before it is also used by node 'skip'"

    def test_result_is_a_graph_output(self):
        assert refusal(conv_program(outputs=["z", "y"])) == "'y' before it is a graph output"

    def test_shared_weight(self):
        weights = {"conv.weight": np.random.default_rng(0).standard_normal((3, 3, 3, 3))}
        weights |= batch_norm_parameters(3, np.random.default_rng(0)) | {"conv.bias": np.ones(3)}
        program = conv_program(
            extra=[node("Conv", ["z", "conv.weight"], ["out"], name="tied")], outputs=["out"], weights=weights
        )
        assert refusal(program) == "the weight 'conv.weight' is shared with node 'tied'"

    def test_shared_bias(self):
        program = conv_program(
            extra=[
                node("Reshape", ["conv.bias", "column"], ["b"], name="view"),
                node("Add", ["z", "b"], ["out"]),
            ],
            outputs=["out"],
            weights={"column": np.array([4, 1, 1])},
        )
        assert refusal(program) == "the bias 'conv.bias' is shared with node 'view'"

    def test_training_mode(self):
        program = conv_program()
        bn = next(n for n in program.nodes() if n.name == "bn")
        from onnx_ir import AttrInt64

        bn.attributes["training_mode"] = AttrInt64("training_mode", 1)
        assert refusal(program).startswith("training mode")

    def test_after_a_nonlinear_node(self):
        generator = np.random.default_rng(0)
        program = program_from_nodes(
            [node("Relu", ["x"], ["y"]), batch_norm("y", "z")],
            {"x": ("N", 4, 3, 3)},
            ["z"],
            batch_norm_parameters(4, generator),
            dtype=TensorProto.DOUBLE,
        )
        assert refusal(program).startswith("it follows Relu, expected one of Conv")

    def test_at_the_input(self):
        program = program_from_nodes(
            [batch_norm("x", "z")],
            {"x": ("N", 4, 3, 3)},
            ["z"],
            batch_norm_parameters(4, np.random.default_rng(0)),
            dtype=TensorProto.DOUBLE,
        )
        assert refusal(program) == "it follows no node of the graph"

    def test_computed_weight(self):
        generator = np.random.default_rng(0)
        program = program_from_nodes(
            [
                node("Transpose", ["w"], ["t"], perm=[1, 0, 2, 3]),
                node("Conv", ["x", "t"], ["y"], name="conv"),
                batch_norm("y", "z"),
            ],
            {"x": ("N", 4, 3, 3)},
            ["z"],
            {"w": normal(generator, 4, 4, 1, 1), **batch_norm_parameters(4, generator)},
            dtype=TensorProto.DOUBLE,
        )
        assert refusal(program) == "the weight 't' of 'conv' is not a constant initializer"

    def test_matmul_on_three_axes_has_its_features_last(self):
        generator = np.random.default_rng(0)
        program = program_from_nodes(
            [node("MatMul", ["x", "w"], ["y"]), batch_norm("y", "z")],
            {"x": ("N", 5, 3)},
            ["z"],
            {"w": normal(generator, 3, 5), **batch_norm_parameters(5, generator)},
            dtype=TensorProto.DOUBLE,
        )
        assert "not known to have 2 axes" in refusal(program)

    def test_gemm_bias_along_rows(self):
        generator = np.random.default_rng(0)
        program = program_from_nodes(
            [node("Gemm", ["x", "w", "c"], ["y"], name="fc"), batch_norm("y", "z")],
            {"x": (4, 3)},
            ["z"],
            {
                "w": normal(generator, 3, 4),
                "c": normal(generator, 4, 1),
                **batch_norm_parameters(4, generator),
            },
            dtype=TensorProto.DOUBLE,
        )
        assert refusal(program) == "the bias of 'fc' has shape [4, 1], expected [4]"

    @pytest.mark.parametrize("variance", [-1.0, np.nan])
    def test_bad_variance(self, variance):
        program = conv_program(weights={"variance": np.array([1.0, variance, 1.0, 1.0])})
        assert refusal(program) == "the folded weights are not finite in float64"


@st.composite
def conv_cases(draw):
    """A Conv or ConvTranspose of any rank, group, stride, dilation and padding, and a BatchNormalization."""
    transposed = draw(st.booleans())
    rank = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 2, 3]))
    per_in, per_out = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    strides = draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    dilations = draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    # a pad within the kernel's halo keeps the output of ConvTranspose non-empty
    halo = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
    pads = [draw(st.integers(0, h)) for h in halo] + [draw(st.integers(0, h)) for h in halo]
    size = [h + draw(st.integers(2, 5)) for h in halo]
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (group * per_in, per_out, *kernel) if transposed else (group * per_out, per_in, *kernel)
    constants = {"w": normal(generator, *shape), **batch_norm_parameters(group * per_out, generator)}
    inputs = ["x", "w"]
    if draw(st.booleans()):
        constants["b"] = normal(generator, group * per_out)
        inputs.append("b")
    attributes = {"group": group, "strides": strides, "dilations": dilations, "pads": pads}
    epsilon = draw(st.sampled_from([None, 1e-3, 0.1]))
    return program_from_nodes(
        [
            node("ConvTranspose" if transposed else "Conv", inputs, ["y"], name="linear", **attributes),
            batch_norm("y", "z", **({} if epsilon is None else {"epsilon": epsilon})),
        ],
        {"x": (2, group * per_in, *size)},
        ["z"],
        constants,
        dtype=TensorProto.DOUBLE,
    )


def torch_outputs(program):
    """The same program through torch in float64: an executor that shares no code with the evaluator."""
    arrays = {n: torch.from_numpy(np.array(program.initializer_array(n))) for n in program.initializers}
    value = torch.from_numpy(double_inputs(program)["x"])
    for item in program.nodes():
        inputs = [arrays[v.name] for v in item.inputs[1:]]
        attributes = {k: a.value for k, a in item.attributes.items()}
        if item.op_type == "BatchNormalization":
            gamma, beta, mean, variance = inputs
            epsilon = attributes.get("epsilon", 1e-5)
            value = torch.nn.functional.batch_norm(value, mean, variance, gamma, beta, eps=epsilon)
            continue
        rank = len(attributes["strides"])
        pads, group = attributes["pads"], attributes["group"]
        stride, dilation = tuple(attributes["strides"]), tuple(attributes["dilations"])
        bias = inputs[1] if len(inputs) > 1 else None
        if item.op_type == "Conv":
            flat = [p for axis in reversed(range(rank)) for p in (pads[axis], pads[axis + rank])]
            convolve = getattr(torch.nn.functional, f"conv{rank}d")
            padded = torch.nn.functional.pad(value, flat)
            value = convolve(padded, inputs[0], bias, stride=stride, dilation=dilation, groups=group)
        else:
            convolve = getattr(torch.nn.functional, f"conv_transpose{rank}d")
            value = convolve(value, inputs[0], bias, stride=stride, dilation=dilation, groups=group)
            for axis in range(rank):
                length = value.shape[axis + 2] - pads[axis] - pads[axis + rank]
                value = value.narrow(axis + 2, pads[axis], length)
    return value.numpy()


@settings(max_examples=80, deadline=None)
@given(conv_cases())
def test_exact_on_random_geometry(program):
    result = FoldBatchNorm().run(program)
    assert result.modified and result.counts["batch_norms_folded"] == 1
    expected, actual = torch_outputs(program), torch_outputs(result.program)
    assert np.abs(expected - actual).max() <= 1e-12 * np.abs(expected).max()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    trans=st.tuples(st.booleans(), st.booleans()),
    factors=st.tuples(st.sampled_from([1.0, 0.5, -2.0]), st.sampled_from([1.0, 3.0, 0.0])),
    bias=st.sampled_from([None, (), (1,), (5,), (1, 5), (1, 1)]),
)
def test_exact_on_random_gemm(seed, trans, factors, bias):
    generator = np.random.default_rng(seed)
    constants = {
        "w": normal(generator, *((5, 3) if trans[1] else (3, 5))),
        **batch_norm_parameters(5, generator),
    }
    if bias is not None:
        constants["c"] = generator.standard_normal(bias)
    attributes = {"transA": int(trans[0]), "transB": int(trans[1]), "alpha": factors[0], "beta": factors[1]}
    program = program_from_nodes(
        [
            node("Gemm", ["x", "w", *(["c"] if bias is not None else [])], ["y"], **attributes),
            batch_norm("y", "z"),
        ],
        {"x": (3, 4) if trans[0] else (4, 3)},
        ["z"],
        constants,
        dtype=TensorProto.DOUBLE,
    )
    check_exact(program)


class TestPlantedBugs:
    """The comparison sees a wrong fold: otherwise the tests above would prove nothing."""

    def wrong(self, monkeypatch, change):
        right = fold_batch_norm._folded

        def planted(site, scale, shift):
            return change(*right(site, scale, shift), site, scale, shift)

        monkeypatch.setattr(fold_batch_norm, "_folded", planted)
        program = conv_program()
        result = FoldBatchNorm().run(program)
        with pytest.raises(AssertionError, match="relative error"):
            assert_equivalent(program, result.program, tolerance=1e-12, inputs=double_inputs(program))

    def test_mean_left_behind(self, monkeypatch):
        def change(weight, bias, site, scale, shift):
            return weight, bias + scale * site.batch_norm.inputs[3].const_value.numpy()

        self.wrong(monkeypatch, change)

    def test_channels_rotated_by_one(self, monkeypatch):
        self.wrong(monkeypatch, lambda weight, bias, *_: (np.roll(weight, 1, axis=0), bias))

    def test_bias_not_scaled(self, monkeypatch):
        def change(weight, bias, site, scale, shift):
            return weight, site.bias.const_value.numpy() + shift

        self.wrong(monkeypatch, change)

    def test_groups_of_convtranspose_ignored(self, monkeypatch):
        generator = np.random.default_rng(3)
        linear = node(
            "ConvTranspose",
            ["x", "w"],
            ["y"],
            group=2,
            strides=[1, 1],
            dilations=[1, 1],
            pads=[0, 0, 0, 0],
        )
        program = program_from_nodes(
            [linear, batch_norm("y", "z")],
            {"x": (1, 4, 3, 3)},
            ["z"],
            {"w": normal(generator, 4, 3, 2, 2), **batch_norm_parameters(6, generator)},
            dtype=TensorProto.DOUBLE,
        )
        right = FoldBatchNorm().run(program).program
        assert np.allclose(torch_outputs(program), torch_outputs(right), rtol=0, atol=1e-12)

        def planted(site, scale, shift):
            weight = site.weight.const_value.numpy()
            return weight * scale[:3][None, :, None, None], shift  # the scales of the first group for both

        monkeypatch.setattr(fold_batch_norm, "_folded", planted)
        wrong = FoldBatchNorm().run(program).program
        assert not np.allclose(torch_outputs(program), torch_outputs(wrong), rtol=0, atol=1e-3)
