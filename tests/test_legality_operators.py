"""Rules by operator against the runtimes themselves: what a rule refuses does not work, and what none refuses does."""

from __future__ import annotations

import collections
import functools

import backend_node_cases as node_cases
import numpy as np
import onnx
import pytest
from builders import node, program_from_nodes
from onnx import TensorProto, defs, helper

from sartor import backends
from sartor.backends import node_rules, telemetry
from sartor.backends.legality import NodeRule, Rules, check_rules
from sartor.backends.protocol import TargetOptions
from sartor.errors import BackendError
from sartor.ir.canonicalize import CANONICAL_OPS

EVERY = 13
OPSET = 21
KNOWN = {
    # float64 is computed in float32, where these infinities become the largest number: values, not nodes.
    "openvino": {"test_cast_FLOAT_to_DOUBLE", "test_cast_FLOAT16_to_DOUBLE", "test_cast_DOUBLE_to_FLOAT"},
}


@functools.cache
def sample(name):
    """Every thirteenth case, and the first two of every operator that the backend has rules for."""
    rules = backends.get(name).rules().operators
    seen = collections.Counter()
    chosen = {}
    for position, case in enumerate(node_cases.cases()):
        seen[case.op_type] += 1
        if position % EVERY == 0 or (case.op_type in rules and seen[case.op_type] <= 1):
            chosen[case.name] = case
    for item in RULED[name]:
        chosen[item] = next(case for case in node_cases.cases() if case.name == item)
    return tuple(chosen.values())


RULED = {
    "onnxruntime": (
        *(
            "test_convinteger_with_padding",
            "test_gru_batchwise",
            "test_lstm_batchwise",
            "test_simple_rnn_batchwise",
        ),
        *("test_maxunpool_export_with_output_shape", "test_mod_float32_mixed_sign_fmod_0", "test_max_int16"),
        *("test_resize_downsample_scales_linear_align_corners", "test_top_k_uint64"),
    ),
    "openvino": (
        *(
            "test_gru_batchwise",
            "test_lstm_batchwise",
            "test_simple_rnn_batchwise",
            "test_lstm_with_peepholes",
        ),
        *("test_mod_float32_mixed_sign_fmod_0", "test_resize_downsample_scales_linear_align_corners"),
        *("test_resize_downsample_sizes_linear_antialias", "test_resize_tf_crop_and_resize"),
        *(
            "test_resize_upsample_sizes_nearest_not_larger",
            "test_constant_pad",
            "test_wrap_pad",
            "test_col2im_5d",
        ),
        *(
            "test_resize_upsample_scales_cubic_A_n0p5_exclude_outside",
            "test_roialign_mode_max",
            "test_dft_rfft",
        ),
        *(
            "test_maxpool_2d_ceil_output_size_reduce_by_one",
            "test_maxpool_2d_ceil",
            "test_dft_axis",
            "test_dft",
        ),
        *("test_quantizelinear_uint16", "test_quantizelinear_blocked_symmetric", "test_max_one_input"),
        *("test_quantizelinear_blocked_asymmetric", "test_gridsample_volumetric_nearest_align_corners_0"),
    ),
}
"""Cases that show a rule, or the border of one."""


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_rules_say_what_the_runtime_does(name, capfd):
    backend = backends.get(name)
    counts = collections.Counter()
    wrong = []
    for case in sample(name):
        for item in node_cases.prepared(case):
            if case.name in KNOWN.get(name, ()):
                continue
            said, seen = node_cases.refusals(item, backend), node_cases.observed(item, backend)
            counts[bool(said)] += 1
            if bool(said) != bool(seen):
                wrong.append(
                    f"{item}: {' '.join(map(str, said)) or 'no rule'}; observed: {seen or 'all is well'}"
                )
    assert not wrong, "\n".join(wrong)
    assert counts[False] > 100 and counts[True] >= 12


def test_the_border_of_a_rule_is_in_the_sample():
    """A rule that refused everything of its operator would be found: some case of each is taken."""
    backend = backends.get("openvino")
    for operator in ("Resize", "MaxPool", "DFT", "Pad", "GridSample", "QuantizeLinear"):
        said = {
            bool(node_cases.refusals(item, backend))
            for case in sample("openvino")
            if case.op_type == operator
            for item in node_cases.prepared(case)
        }
        assert said == {True, False}, operator


@pytest.mark.parametrize(
    ("operator", "rule"),
    [
        ("Sigmoid", node_rules.not_converted("There is no Sigmoid.")),
        ("MaxPool", None),
    ],
)
def test_planted_rules_are_caught(monkeypatch, operator, rule):
    """A rule that claims too much and a missing one both show on the suite."""
    backend = backends.get("openvino")
    table = {k: v for k, v in backend.rules().operators.items() if k != operator}
    planted = Rules(operators=table | ({operator: (rule,)} if rule else {}))
    monkeypatch.setattr(backend, "rules", lambda: planted)
    wrong = [
        item.case.op_type
        for case in node_cases.cases()
        if case.op_type == operator and ("reduce_by_one" in case.name or operator != "MaxPool")
        for item in node_cases.prepared(case)
        if bool(node_cases.refusals(item, backend)) != bool(node_cases.observed(item, backend))
    ]
    assert set(wrong) == {operator}


# ---- element types of ONNX Runtime: the whole table against the registry of its kernels ------------
def kernels():
    """Element types by operator and type parameter, over all kernels at the canonical opset."""
    telemetry.disable()
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def

    found = collections.defaultdict(set)
    for kernel in get_all_opkernel_def():
        first, last = kernel.version_range
        if kernel.domain in ("", "ai.onnx") and first <= OPSET <= last:
            for parameter, types in kernel.type_constraints.items():
                found[kernel.op_name, parameter].update(types)
    return found


def refused_types(operator, parameter):
    """Types that the rules refuse in that parameter, each asked with a node whose other operands have none."""
    schema = defs.get_schema(operator, OPSET)
    rules = [
        r for r in backends.get("onnxruntime").rules().operators.get(operator, ()) if r.id == "element-type"
    ]
    found = set()
    formal = [p for p in [*schema.inputs, *schema.outputs] if p.type_str == parameter]
    for constraint in schema.type_constraints:
        if constraint.type_param_str != parameter:
            continue
        for kind in constraint.allowed_type_strs:
            name = kind.removeprefix("tensor(").removesuffix(")").upper()
            known = kind.startswith("tensor(") and hasattr(TensorProto, name) and formal
            if known and any(not rule.check(*typed(operator, parameter, name))[0] for rule in rules):
                found.add(kind)
    return found


def typed(operator, parameter, kind):
    """A program of one node whose operands of a type parameter are of one type, and others of none."""
    import onnx_ir as ir

    class Types:
        def types(self):
            return known

    schema = defs.get_schema(operator, OPSET)
    known = {p.name: ir.DataType[kind] for p in [*schema.inputs, *schema.outputs] if p.type_str == parameter}
    inputs = [ir.Value(name=p.name) for p in schema.inputs]
    made = ir.Node("", operator, inputs, num_outputs=len(schema.outputs), name="n")
    for value, formal in zip(made.outputs, schema.outputs, strict=True):
        value.name = formal.name
    return Types(), made


FUNCTIONS = {"GroupNormalization", "HardSwish", "Mish"}
"""Operators without a kernel of their own: the runtime expands them."""


def test_no_type_is_refused_that_has_a_kernel():
    table = kernels()
    checked = 0
    for operator in sorted(CANONICAL_OPS - FUNCTIONS):
        for parameter in {c.type_param_str for c in defs.get_schema(operator, OPSET).type_constraints}:
            refused = refused_types(operator, parameter)
            checked += len(refused)
            if (operator, parameter) in table:
                assert not refused & table[operator, parameter], (operator, parameter)
    assert checked > 200


UNTESTED = {
    ("LayerNormalization", "U"),  # its statistics, which are no operand
    ("MeanVarianceNormalization", "T"),  # ONNX infers no shape for it: no program has it in these types
}
PLAIN = "float double bfloat16 bool int8 uint8 int16 uint16 int32 uint32 int64 uint64"


def test_every_type_without_a_kernel_is_refused():
    """float16 excepted: the runtime computes it in float32."""
    table, plain = kernels(), {f"tensor({name})" for name in PLAIN.split()}
    rules = backends.get("onnxruntime").rules().operators
    for operator in sorted(CANONICAL_OPS - FUNCTIONS):
        if any(rule.id == "type-combination" for rule in rules.get(operator, ())):
            continue
        for constraint in defs.get_schema(operator, OPSET).type_constraints:
            key = operator, constraint.type_param_str
            if key in table and key not in UNTESTED:
                missing = (set(constraint.allowed_type_strs) & plain) - table[key]
                assert missing <= refused_types(*key), key


@pytest.mark.parametrize(
    ("operator", "kind", "taken"),
    [
        ("Conv", "DOUBLE", False),
        ("Conv", "FLOAT16", True),
        ("Elu", "DOUBLE", False),
        ("Gelu", "DOUBLE", False),
        ("Gelu", "FLOAT", True),
        ("Where", "BOOL", False),
        ("Where", "INT64", True),
        ("Trilu", "INT8", False),
        ("Relu", "INT64", False),
        ("Relu", "INT32", True),
    ],
)
def test_element_types_by_example(operator, kind, taken):
    dtype = TensorProto.DataType.Value(kind)
    shape = {"Conv": [1, 2, 5, 5], "Where": [3]}.get(operator, [2, 3])
    inputs = {"x": shape}
    constants = {}
    operands = ["x"]
    if operator == "Conv":
        constants["w"] = np.ones((2, 2, 3, 3), helper.tensor_dtype_to_np_dtype(dtype))
        operands = ["x", "w"]
    if operator == "Where":
        constants["c"] = np.array([True, False, True])
        operands = ["c", "x", "x"]
    program = program_from_nodes([node(operator, operands, ["y"])], inputs, ["y"], constants, dtype=dtype)
    backend = backends.get("onnxruntime")
    said = [
        f
        for f in check_rules(program, TargetOptions(), backend.rules()).violations
        if f.rule == "element-type"
    ]
    assert bool(said) != taken
    if taken:
        backend.compile(program.to_bytes(), TargetOptions())
    else:
        with pytest.raises(BackendError):
            backend.compile(program.to_bytes(), TargetOptions())


# ---- the pieces of which rules are made ------------------------------------------------------------
def check(rule: NodeRule, *nodes, inputs=None, initializers=None):
    outputs = [nodes[-1].output[0]]
    program = program_from_nodes(list(nodes), inputs or {"x": [1, 2, 8, 8]}, outputs, initializers)
    return rule.check(program, list(program.nodes())[-1])


def test_attributes_with_their_default():
    rule = node_rules.attribute("ceil_mode", (0,), 0, "'ceil_mode' is 0.")
    assert rule.id == "ceil-mode"
    assert check(rule, node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2])) == (True, "ceil_mode=0")
    assert check(rule, node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], ceil_mode=1)) == (
        False,
        "ceil_mode=1",
    )


def test_constants_and_absent_inputs():
    pads, value = np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.float32(2.0)
    rule = node_rules.constant(2, "constant_value", "It is a constant.")
    stored = node("Pad", ["x", "p", "v"], ["y"])
    assert check(rule, stored, initializers={"p": pads, "v": value})[0]
    assert check(rule, node("Pad", ["x", "p"], ["y"]), initializers={"p": pads})[0]
    computed = node("ReduceMax", ["x"], ["v"], keepdims=0)
    assert check(rule, computed, stored, initializers={"p": pads}) == (False, "'v' is computed")
    gone = node_rules.absent(2, "constant_value", "There is none.")
    assert not check(gone, stored, initializers={"p": pads, "v": value})[0]
    assert check(gone, node("Pad", ["x", "p"], ["y"]), initializers={"p": pads})[0]


def test_texts_name_the_operands():
    table = node_rules.missing_types({"BOOL": "Where.T", "INT16": "Where.T Relu"})
    assert [r.text for r in table["Where"]] == ["'X' and 'Y' and 'output' are not of type bool or int16."]
    assert table["Relu"][0].text == "'X' and 'Y' are not of type int16."


def test_boundary_types(tmp_path):
    program = program_from_nodes(
        [node("Cast", ["x"], ["h"], to=TensorProto.FLOAT), node("Relu", ["h"], ["y"])],
        {"x": [2]},
        ["y"],
        dtype=TensorProto.BFLOAT16,
    )
    for name in ("onnxruntime", "openvino"):
        report = check_rules(program, TargetOptions(), backends.get(name).rules())
        assert ("boundary-types", "'x' is bfloat16") in [(f.rule, f.observed) for f in report.violations]


def test_an_output_that_is_passed_on_keeps_its_name(tmp_path):
    """OpenVINO leaves one port with the names of both values."""
    program = program_from_nodes(
        [node("Relu", ["x"], ["y"]), node("Max", ["y"], ["z"]), node("Identity", ["x"], ["a"])],
        {"x": [2]},
        ["z", "a", "y"],
    )
    backend = backends.get("openvino")
    x = np.array([-1, 2], np.float32)
    artifact = backend.lower(program, tmp_path / "out", TargetOptions())
    for session in (
        backend.load(artifact, TargetOptions()),
        backend.compile(program.to_bytes(), TargetOptions()),
    ):
        found = session.run({"x": x})
        assert list(found) == ["z", "a", "y"]
        np.testing.assert_array_equal(found["a"], x)
        np.testing.assert_array_equal(found["z"], found["y"])
    assert onnx.checker.check_model(program.to_proto()) is None
