"""docs/backends is generated and must not drift; what capabilities declare, the runtimes and the cost model show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import node, program_from_nodes

from sartor import backends
from sartor.backends import docs, host, legality
from sartor.backends.legality import NodeRule, Rules, opset_at_most
from sartor.backends.protocol import Capabilities, TargetOptions
from sartor.errors import UsageError
from sartor.ir.canonicalize import CANONICAL_OPS
from sartor.ir.cleanup import constants_to_initializers
from sartor.ir.fusion import partition
from sartor.ir.fusion_rules import CONTRACTIONS, VOCABULARY, FusionRules

FOLDER = Path(__file__).parents[1] / "docs" / "backends"
COMMAND = "run: python -m sartor.backends.docs docs/backends"


def document(name):
    try:
        return docs.markdown(name)
    except UsageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", docs.builtin())
def test_no_drift(name):
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == document(name), COMMAND


def test_the_index_names_every_target_and_generic_rule():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert text == docs.index(docs.builtin()), COMMAND
    assert all(f"[`{name}`]({name}.md)" in text for name in docs.builtin())
    assert "`opset_at_most`" in text and "`missing_types`" in text and "`merged`" not in text
    assert {p.name for p in FOLDER.iterdir()} == {"README.md", *(f"{name}.md" for name in docs.builtin())}


@pytest.mark.parametrize("name", docs.builtin())
def test_every_operator_is_in_the_table_once(name):
    text = document(name)
    rules = backends.get(name).rules().operators
    plain = text.split("have no rule of their own: ")[1].split("\n")[0]
    told = {part.strip("`. ") for part in plain.split(",")}
    assert told.isdisjoint(rules) and told | set(rules) >= CANONICAL_OPS


def test_documents_do_not_depend_on_the_machine(monkeypatch):
    before = {name: docs.markdown(name) for name in ("onnxruntime", "openvino", "reference")}
    monkeypatch.setattr(host, "vector_floats", lambda: host._ASSUMED.get() or 4)
    capabilities = backends.get("openvino").capabilities()
    assert capabilities.channel_grid[("Conv", "f32")] == 4
    assert {name: docs.markdown(name) for name in before} == before
    with host.assuming(8):
        assert backends.get("openvino").channel_grid("Conv") == 8


class Tiny:
    """Describes itself."""

    name = "tiny"

    def capabilities(self):
        grid = {("Conv", "f32"): 4}
        return Capabilities("tiny", "1", ("f32",), grid, False, 5, fuses={"Conv": ("Relu", "Bias")})

    def channel_grid(self, op_type, precision="f32", attributes=None):
        return 4 if op_type == "Conv" else host.vector_floats()

    def rules(self):
        rule = NodeRule("never", "There is | no Tanh.", lambda program, n: (False, ""))
        return Rules((opset_at_most(7),), (legality.no_functions(),), {"Tanh": (rule,)})


def test_everything_that_is_declared_is_told():
    text = docs.markdown("tiny", Tiny())
    assert text.startswith("# tiny\n") and "- Precisions: `f32`." in text and "at most 5 axes" in text
    assert "(`If`, `Loop`, `Scan`): none." in text
    assert "| `opset-version` | The opset is between 1 and 7. |" in text and "| `no-functions` |" in text
    assert "| `Tanh` | `never` | There is \\| no Tanh. |" in text and "`Tanh`," not in text
    assert "| `Conv` | 4 |" in text and "| `Gemm` | 16 (8 with AVX2 alone) |" in text
    assert "| `Conv` | `Relu`, `Bias` |" in text


def test_main_writes_the_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(docs, "builtin", lambda: ("reference",))
    assert docs.main([str(tmp_path)]) == 0
    assert (tmp_path / "reference.md").read_text(encoding="utf-8") == docs.markdown("reference")
    assert docs.main([]) == 0 and "# reference\n" in capsys.readouterr().out


# ---- channel grids -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", docs.builtin())
def test_grids_agree_with_capabilities(name):
    backend = backends.get(name)
    try:
        capabilities = backend.capabilities()
    except UsageError as error:
        pytest.skip(str(error))
    for op in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Softmax"):
        for precision in capabilities.precisions:
            step = backend.channel_grid(op, precision)
            assert step == capabilities.channel_grid.get((op, precision), 1), (op, precision)
            assert step > 0 and step & (step - 1) == 0, "a power of two: steps of two readers have a multiple"


@pytest.mark.parametrize("name", docs.builtin())
def test_every_target_says_what_fuses(name):
    text = document(name).split("## Fusion")[1]
    fuses = backends.get(name).capabilities().fuses
    assert ("None is declared" in text) == (not fuses) == (name == "reference")
    assert all(f"| `{op}` |" in text for op in fuses)


def test_the_microcontroller_runs_what_tflite_fused():
    try:
        found = backends.get("tflite-micro").capabilities()
    except UsageError as error:
        pytest.skip(str(error))
    assert found.fuses == backends.get("tflite").capabilities().fuses


# ---- fusion --------------------------------------------------------------------------------------
RNG = np.random.default_rng(0)


def drawn(*shape):
    return (RNG.standard_normal(shape) * 0.1).astype(np.float32)


def lead(op):
    """One contraction of 32 channels from `x` to `h`."""
    if op in ("Conv", "ConvTranspose"):
        nodes = [node(op, ["x", "w", "b"], ["h"], "lead", pads=[1, 1, 1, 1])]
        return nodes, {"w": drawn(32, 32, 3, 3), "b": drawn(32)}, [1, 32, 48, 48]
    if op == "Gemm":
        return [node(op, ["x", "w", "b"], ["h"], "lead")], {"w": drawn(32, 32), "b": drawn(32)}, [2048, 32]
    return [node(op, ["x", "w"], ["h"], "lead")], {"w": drawn(32, 32)}, [2, 1024, 32]


def follower(name, shape):
    """Nodes from `h` to `y`, and their constants."""
    if name == "BatchNormalization":
        names = ["gamma", "beta", "mean", "var"]
        return [node(name, ["h", *names], ["y"], "f")], {n: np.abs(drawn(32)) + 0.5 for n in names}
    if name == "Bias":
        return [node("Add", ["h", "bias"], ["y"], "f")], {
            "bias": drawn(1, 32, 1, 1) if len(shape) == 4 else drawn(32)
        }
    if name == "Scale":
        return [node("Mul", ["h", "scale"], ["y"], "f")], {"scale": np.asarray(0.7, np.float32)}
    if name == "Silu":
        return [node("Sigmoid", ["h"], ["g"], "g"), node("Mul", ["h", "g"], ["y"], "f")], {}
    if name == "Clip":
        scalars = [
            onnx.helper.make_node("Constant", [], [bound], name=bound, value_float=value)
            for bound, value in (("low", 0.0), ("high", 6.0))
        ]
        return [*scalars, node(name, ["h", "low", "high"], ["y"], "f")], {}
    return [node(name, ["h"], ["y"], "f")], {}


def residual(other):
    """Convolution, Relu, convolution, Add of an earlier activation, Relu."""
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", ["x", "w"], ["c"], "first", **pads),
        node("Relu", ["c"], ["r"], "act"),
        node("Conv", ["r", "v"], ["h"], "lead", **pads),
        node("Add", ["h", other], ["s"], "sum"),
        node("Relu", ["s"], ["y"], "f"),
    ]
    return program_from_nodes(
        nodes, {"x": [1, 32, 48, 48]}, ["y"], {"w": drawn(32, 32, 3, 3), "v": drawn(32, 32, 3, 3)}
    )


def declared():
    """Pairs of a contraction and one operation behind it; what needs more of a network is in test_fusion.py."""
    for name in ("onnxruntime", "openvino"):
        for op, followers in backends.get(name).capabilities().fuses.items():
            if op in CONTRACTIONS:
                simple = [f for f in followers if f not in VOCABULARY or f in ("Bias", "Silu", "Scale")]
                yield from ((name, op, follower) for follower in simple)


def chained(op, name):
    nodes, constants, shape = lead(op)
    more, others = follower(name, shape)
    return program_from_nodes([*nodes, *more], {"x": shape}, ["y"], constants | others)


def kernels(name, program, folder):
    """Executed kernels, without the copies to and from a runtime's own layout.

    The shapes are so large that no kernel takes less than the microsecond below which OpenVINO does not list it.
    """
    backend = backends.get(name)
    found = backend.profile(backend.lower(program, folder / "a", TargetOptions()), TargetOptions(), 3)
    copies = ("Reorder", "Parameter", "Result", "Input", "Output", "Const", "Transpose", "Reshape")
    return [k.op_type for k in found if not k.op_type.startswith(copies)]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_what_is_declared_to_fuse_is_one_kernel(name, tmp_path):
    # ONNX Runtime leaves a HardSwish that makes an output of the graph outside, as it would be here.
    pairs = [(op, f) for target, op, f in declared() if target == name and f != "HardSwish"]
    seen = {pair: kernels(name, chained(*pair), tmp_path / "-".join(pair)) for pair in pairs}
    assert {pair: found for pair, found in seen.items() if len(found) != 1} == {}
    assert len(pairs) > 15


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_what_is_not_declared_is_not_one_kernel(name, tmp_path):
    """The check above can fail."""
    assert len(kernels(name, chained("ConvTranspose", "Relu"), tmp_path)) == 2
    assert "Relu" not in backends.get(name).capabilities().fuses["ConvTranspose"]


@pytest.mark.parametrize(("name", "other"), [("onnxruntime", "r"), ("openvino", "x")])
def test_residual_sums_run_inside_the_convolution(name, other, tmp_path):
    """ONNX Runtime wants the other operand in its own layout, OpenVINO one that nobody reads afterwards."""
    kind = {"onnxruntime": "BlockedAdd", "openvino": "InPlaceAdd"}[name]
    assert kind in backends.get(name).capabilities().fuses["Conv"]
    found = kernels(name, residual(other), tmp_path)
    assert not {"Add", "Sum", "Eltwise"} & set(found), found


@pytest.mark.slow  # one conversion
def test_what_tflite_fuses_is_one_operator_of_the_flatbuffer(tmp_path):
    """One conversion for all: a convolution of the same input for every follower, and one that is not declared."""
    backend = backends.get("tflite")
    try:
        fuses = backend.capabilities().fuses["Conv"]
    except UsageError as error:
        pytest.skip(str(error))
    nodes, constants, outputs = [], {}, []
    for name in (*fuses, "LeakyRelu"):
        first, weights, shape = lead("Conv")
        more, others = follower(name, shape)
        mine = {value: f"{name}.{value}" for part in (*first, *more) for value in (*part.input, *part.output)}
        mine["x"] = "x"
        for part in (*first, *more):
            part.name = f"{name}.{part.name}"
            part.input[:] = [mine[value] for value in part.input]
            part.output[:] = [mine[value] for value in part.output]
            nodes.append(part)
        constants |= {mine[value]: array for value, array in (weights | others).items()}
        outputs.append(mine["y"])
    program = program_from_nodes(nodes, {"x": shape}, outputs, constants)
    constants_to_initializers(program.graph)
    program.invalidate()
    artifact = backend.lower(program, tmp_path / "a", TargetOptions())
    found = [entry["op_type"] for entry in artifact.metadata["operators"]]
    assert "LeakyRelu" not in fuses
    assert sorted(set(found)) == ["CONV_2D", "LEAKY_RELU", "TRANSPOSE"]
    assert found.count("CONV_2D") == len(fuses) + 1 and found.count("LEAKY_RELU") == 1


def test_the_cost_model_groups_what_the_runtimes_fuse():
    """A kernel that is priced is what is declared, and so what runs."""
    for target, op, name in declared():
        if name == "Clip":  # its bounds are nodes here
            continue
        rules = FusionRules.of(backends.get(target).capabilities().fuses)
        assert len(partition(chained(op, name), rules=rules)) == 1, (target, op, name)
    for target, other in (("onnxruntime", "r"), ("openvino", "x")):
        rules = FusionRules.of(backends.get(target).capabilities().fuses)
        assert len(partition(residual(other), rules=rules)) == 2
    assert len(partition(residual("r"))) == 2
