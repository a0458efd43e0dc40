"""TensorFlow Lite in int8: the file has the quantization of the program, all of it and nothing else."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx_ir as ir
import pytest
from backend_programs import mixed_cnn, quantized
from builders import node, program_from_nodes

from sartor import backends, lowered
from sartor.backends.protocol import TargetOptions
from sartor.backends.tflite import parity
from sartor.backends.tflite.flatbuffer import Flatbuffer
from sartor.errors import BackendError

INT8 = TargetOptions(precision="int8")


pytestmark = pytest.mark.usefixtures("cache_of_its_own")


@pytest.fixture(scope="module")
def program():
    return quantized(mixed_cnn())


@pytest.fixture(scope="module")
def compared():
    """What lowering compared: a program, the flatbuffer with the converter's names, and its operators."""
    return []


@pytest.fixture(scope="module")
def artifact(program, compared, tmp_path_factory):
    require_same = parity.require_same
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "require_same", lambda *given: compared.append(given) or require_same(*given))
        return backends.get("tflite").lower(program, tmp_path_factory.mktemp("int8") / "artifact", INT8)


@pytest.fixture
def whole(artifact, compared):
    """The same, which passes."""
    assert parity.require_same(*compared[0]) == artifact.metadata["quantized_tensors"]
    return compared[0]


def values(flatbuffer):
    """Indices of quantized tensors that operators write or read, and no constants."""
    return [
        index
        for index, tensor in enumerate(flatbuffer.graph.tensors)
        if tensor.quantization is not None
        and tensor.quantization.scale is not None
        and flatbuffer.model.buffers[tensor.buffer].data is None
    ]


def name_of(flatbuffer, index):
    name = flatbuffer.graph.tensors[index].name
    return name.decode() if isinstance(name, bytes) else name


@contextlib.contextmanager
def planted(owner, attribute, value):
    """An attribute with another value for a while."""
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


def seen(given):
    try:
        parity.require_same(*given)
    except BackendError:
        return True
    return False


def test_every_scale_and_zero_point_is_the_program_s(program, artifact, whole):
    """Read off the file itself: activations, weights per channel with their integers, biases in int32."""
    flatbuffer = Flatbuffer(artifact.main_file.read_bytes())
    tensors = flatbuffer.quantization(flatbuffer.operators())
    stored = {name: v.const_value.numpy() for name, v in program.initializers.items()}
    of_values = {
        (float(stored[f"{n}/scale"]), int(stored[f"{n}/zero_point"]))
        for n in (name.removesuffix("/scale") for name in stored if name.endswith("/scale"))
        if stored[f"{n}/scale"].ndim == 0
    }
    found = [t for t in tensors.values() if t.numbers is None]
    assert len(found) > 12 and all((t.scales[0], t.zero_points[0]) in of_values for t in found)
    # A value that is only concatenated is written in the scale of the whole; no other is left out.
    joined = {(float(stored[f"{n}/scale"]), int(stored[f"{n}/zero_point"])) for n in ("s", "m")}
    assert of_values - {(t.scales[0], t.zero_points[0]) for t in found} <= joined
    weights = [t for t in tensors.values() if t.numbers is not None and t.dtype == "INT8"]
    biases = [t for t in tensors.values() if t.numbers is not None and t.dtype == "INT32"]
    assert len(weights) == len(biases) == 3
    for kind, constants in (("w", weights), ("b", biases)):
        for number in range(3):
            scale, integers = stored[f"{kind}{number}/scale"], stored[f"{kind}{number}/quantized"]
            alike = [t for t in constants if len(t.scales) == len(scale)]
            same = [t for t in alike if np.allclose(t.scales, scale, rtol=1e-6, atol=0)]
            assert len(same) == 1 and not any(same[0].zero_points)
            assert np.array_equal(np.sort(same[0].numbers), np.sort(integers, axis=None))
            assert len(same[0].scales) == len(scale) > 1
    assert artifact.metadata["quantized_tensors"] == len(tensors)


def test_another_program_is_seen(program, whole):
    changes = {"r0/scale": 1e-3, "w1/scale": 1e-5, "b0/quantized": 1, "c1/zero_point": 1, "g/scale": 1e-6}
    for name, change in changes.items():
        other = program.clone()
        array = other.initializers[name].const_value.numpy()
        other.initializers[name].const_value = ir.Tensor((array + change).astype(array.dtype), name=name)
        assert seen((other, *whole[1:])), f"a change of {name} was not seen"


def test_scales_of_two_neighbours_swapped_are_seen(whole):
    """Between what an operator reads and what it writes."""
    flatbuffer = whole[1]
    swapped = 0
    for item in flatbuffer.graph.operators:
        one, other = (flatbuffer.graph.tensors[index] for index in (item.inputs[0], item.outputs[0]))
        inner = values(flatbuffer)
        if not {int(item.inputs[0]), int(item.outputs[0])} <= set(inner):
            continue
        if np.array_equal(one.quantization.scale, other.quantization.scale):
            continue
        first, second = one.quantization, other.quantization
        with planted(one, "quantization", second), planted(other, "quantization", first):
            assert seen(whole), (name_of(flatbuffer, item.inputs[0]), name_of(flatbuffer, item.outputs[0]))
        swapped += 1
    assert swapped >= 6


def test_a_tensor_that_lost_its_quantization_is_seen(whole):
    """It would be float32 then; or bytes without a scale."""
    flatbuffer = whole[1]
    lost = set()
    for index in values(flatbuffer):
        tensor = flatbuffer.graph.tensors[index]
        with planted(tensor, "quantization", None):
            assert seen(whole), name_of(flatbuffer, index)
            with planted(tensor, "type", flatbuffer.schema.TensorType.FLOAT32):
                if not seen(whole):
                    lost.add(name_of(flatbuffer, index))
    # The input is quantized twice in the file, in both layouts; two values are only concatenated.
    assert lost <= {"x/int8", "x/QuantizeLinear/value", "pool/value:1", "swish/value"}


def test_permuted_weights_are_seen(whole):
    """Channels of a filter, its rows and columns, and the order of a bias."""
    flatbuffer = whole[1]
    permuted = 0
    for tensor in flatbuffer.graph.tensors:
        buffer = flatbuffer.model.buffers[tensor.buffer]
        if tensor.quantization is None or tensor.quantization.scale is None or buffer.data is None:
            continue
        kind = flatbuffer._types[tensor.type].lower()
        integers = np.frombuffer(bytes(buffer.data), kind).reshape([int(n) for n in tensor.shape])
        for axis in range(integers.ndim):
            if integers.shape[axis] > 1:
                changed = np.roll(integers, 1, axis)
                with planted(buffer, "data", np.frombuffer(changed.tobytes(), np.uint8)):
                    assert seen(whole), (tensor.name, axis)
                permuted += 1
    assert permuted >= 9


def test_one_number_is_compared_too(tmp_path, compared):
    """A constant of one element is the program's, and another one of that size is not."""
    count = len(compared)
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], "qx"),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], "dx"),
        node("DequantizeLinear", ["k", "ks", "xz0"], ["kd"], "dk"),
        node("Add", ["xd", "kd"], ["h"], "shift"),
        node("QuantizeLinear", ["h", "hs", "xz"], ["hq"], "qh"),
        node("DequantizeLinear", ["hq", "hs", "xz"], ["y"], "dh"),
    ]
    constants = {
        **{"xs": np.float32(0.02), "xz": np.int8(3), "xz0": np.int8(0)},
        **{"k": np.array([77], np.int8), "ks": np.float32(0.01), "hs": np.float32(0.05)},
    }
    program = program_from_nodes(nodes, {"x": (4, 12)}, ["y"], constants)
    require_same = parity.require_same
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "require_same", lambda *given: compared.append(given) or require_same(*given))
        backends.get("tflite").lower(program, tmp_path / "out", INT8)
    given = compared.pop()
    assert len(compared) == count and not seen(given)
    (buffer,) = [
        given[1].model.buffers[t.buffer]
        for t in given[1].graph.tensors
        if t.quantization is not None
        and t.quantization.scale is not None
        and given[1].model.buffers[t.buffer].data is not None
    ]
    with planted(buffer, "data", np.array([78], np.int8).view(np.uint8)):
        assert seen(given)


def test_a_constant_that_is_quantized_like_an_activation(tmp_path):
    """A learned token that is repeated for each sample: at the shapes of a flatbuffer it is stored."""
    scales = {"s": np.array(0.01, np.float32), "z": np.array(3, np.int8)}
    arrays = {"token": np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 4), "axis": np.array([0])}
    arrays |= {"first": np.array([0]), "one": np.array([1]), "rest": np.array([3, 4])}
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("Shape", ["xd"], ["size"]),
        node("Slice", ["size", "first", "one"], ["count"]),
        node("Concat", ["count", "rest"], ["wanted"], axis=0),
        node("Expand", ["token", "wanted"], ["tokens"]),
        node("QuantizeLinear", ["tokens", "s", "z"], ["tq"]),
        node("DequantizeLinear", ["tq", "s", "z"], ["td"]),
        node("Concat", ["td", "xd"], ["joined"], axis=1),
        node("QuantizeLinear", ["joined", "s", "z"], ["yq"]),
        node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    program = program_from_nodes(nodes, {"x": ["N", 5, 4]}, ["y"], {**scales, **arrays}, reference={"N": 2})
    artifact = backends.get("tflite").lower(program, tmp_path / "artifact", INT8)
    assert artifact.metadata["quantized_tensors"] >= 2
    result = lowered.verify(program, artifact, INT8)
    assert result.passed and result.max_rel_error < 1e-6


def test_a_value_of_which_only_another_shape_is_kept(tmp_path):
    """The mean of an image and its flat form are one operator, and one tensor."""
    draw = np.random.default_rng(0).standard_normal
    weights = {"w": draw((4, 3)).astype(np.float32), "axes": np.array([2, 3]), "flat": np.array([0, 3])}
    nodes = [
        node("HardSwish", ["x"], ["h"], "act"),
        node("ReduceMean", ["h", "axes"], ["mean"], "pool", keepdims=1),
        node("Reshape", ["mean", "flat"], ["row"], "view"),
        node("Gemm", ["row", "w"], ["y"], "head", transB=1),
    ]
    program = quantized(program_from_nodes(nodes, {"x": ["N", 3, 6, 6]}, ["y"], weights))
    assert {"mean", "row"} <= {n.inputs[0].name for n in program.nodes() if n.op_type == "QuantizeLinear"}
    artifact = backends.get("tflite").lower(program, tmp_path / "artifact", INT8)
    assert lowered.verify(program, artifact, INT8).passed


def test_weights_that_are_called_as_the_steps_of_a_conversion(tmp_path):
    arrays = {f"n0.{k}": np.linspace(0.5, 1.5, 3, dtype=np.float32) for k in ("gamma", "beta", "mean", "var")}
    nodes = [
        node("BatchNormalization", ["x", *arrays], ["b"], "n0"),
        node("AveragePool", ["b"], ["p"], "n1", kernel_shape=[2, 2], strides=[2, 2]),  # without pads
        node("Relu", ["p"], ["y"], "n7"),
    ]
    program = program_from_nodes(nodes, {"x": ["N", 3, 8, 8]}, ["y"], arrays)
    artifact = backends.get("tflite").lower(program, tmp_path / "artifact", TargetOptions())
    named = {name for operator in artifact.metadata["operators"] for name in operator["nodes"]}
    assert named == {"n0", "n1", "n7"}
    assert lowered.verify(program, artifact, TargetOptions()).passed
