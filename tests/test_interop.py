"""Passes written for other tools: what they do, what is refused and why, and that nothing is lost unseen."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import models
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
import torch
from onnxscript.rewriter import RewriteRule, RewriteRuleSet
from torch import nn

import sartor
from sartor import interop
from sartor.errors import PassError, UsageError, VerificationError
from sartor.interop import graphsurgeon, onnx_ir_pass, rewrite_rule, torch_fx
from sartor.ir.batch import random_inputs
from sartor.ir.fx import run_twin
from sartor.oracle import relative_error
from sartor.passes.base import Semantics
from sartor.passes.instruments import ReproducerOnFailure
from sartor.passes.prune_channels import PruneChannels
from sartor.passes.structure import structure_of

gs = pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is not installed")
ROOT = Path(__file__).parents[1]


class Small(nn.Module):
    """Operands that can be swapped, a bias that can be lost, twice the same subexpression."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(torch.relu(self.stem(x)))
        x = torch.sigmoid(self.left(x)) - torch.tanh(self.right(x))
        return self.head(x.flatten(2).mean(2))


@pytest.fixture(scope="module")
def program():
    module = Small().eval()
    with torch.no_grad():
        module.left.bias.zero_()  # as a fresh or a pruned layer has it: dropping it changes nothing yet
    return sartor.capture(module, torch.randn(1, 3, 8, 8))


@pytest.fixture(autouse=True)
def untouched(program):
    """Whatever foreign code does, the program it was given is as it was, weights included."""
    before, digest = structure_of(program), program.sha256()
    yield
    assert program.sha256() == digest and structure_of(program) == before


def run(program, *passes):
    return sartor.Pipeline(passes).run(program)


def operators(program):
    return [node.op_type for node in program.nodes()]


def equal(one, other):
    inputs = random_inputs(one, size=3)
    return relative_error(run_twin(one, inputs), run_twin(other, inputs))


# ---- foreign code that is right ------------------------------------------------------------------


def gs_merge_relus(graph):
    for node in [n for n in graph.nodes if n.op == "Relu"]:
        if node.inputs[0].inputs and node.inputs[0].inputs[0].op == "Relu":
            first = node.inputs[0].inputs[0]
            node.inputs = list(first.inputs)
    graph.cleanup()


def ir_merge_relus(model):
    for node in list(model.graph):
        source = node.inputs[0].producer() if node.op_type == "Relu" else None
        if source is not None and source.op_type == "Relu":
            node.replace_input_with(0, source.inputs[0])
            model.graph.remove(source, safe=True)


def fx_merge_relus(module):
    relus = [n for n in module.graph.nodes if "relu" in str(n.target)]
    for node in relus:
        if node.args[0] in relus:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def rule(pattern, replacement, name="merge-relus"):
    return RewriteRule(pattern, replacement, name=name)


MERGE_RULE = rule(lambda op, x: op.Relu(op.Relu(x)), lambda op, x: op.Relu(x))
MERGERS = {
    "graphsurgeon": lambda: graphsurgeon(gs_merge_relus),
    "onnx_ir": lambda: onnx_ir_pass(ir_merge_relus),
    "onnxscript": lambda: rewrite_rule(MERGE_RULE),
    "torch_fx": lambda: torch_fx(fx_merge_relus),
}


@pytest.fixture(scope="module", params=MERGERS)
def merged(request, program):
    """The kind of foreign pass, and the pipeline of it and one of our own."""
    return request.param, run(program, MERGERS[request.param](), PruneChannels(ratio=0.5))


class TestRight:
    def test_beside_our_own(self, program, merged):
        foreign, pruned = (step.result for step in merged[1].results)
        assert operators(foreign.program).count("Relu") == 1
        assert equal(program, foreign.program) < 1e-12
        assert foreign.counts["nodes_removed"] >= 1
        assert foreign.program.applied[-1].endswith("merge-relus")
        assert pruned.program.initializers["stem.weight"].shape[0] == 3
        assert {"stem.weight", "left.bias", "head.weight"} <= set(foreign.program.initializers)
        assert pruned.program.batch.symbolic and pruned.program.source == program.source

    def test_weights_that_stay_are_shared(self, program, merged):
        result = merged[1].results[0].result.program
        for name in ("stem.weight", "left.bias", "head.weight"):
            assert result.initializers[name].const_value is program.initializers[name].const_value

    def test_provenance(self, merged):
        result = merged[1].results[0].result.program
        records = {result.provenance[n.name].module for n in result.nodes() if n.name in result.provenance}
        assert records >= {"stem", "left", "right", "head"}
        conv = next(n for n in result.nodes() if n.op_type == "Conv")
        assert str(result.provenance[conv.name]).startswith("stem (Conv2d) test_interop.py:")

    def test_is_deterministic(self, program, merged):
        kind, result = merged
        again = run(program, MERGERS[kind]()).program
        assert again.sha256() == result.results[0].result.program.sha256()


def test_the_function_sees_shapes(program):
    seen = {}

    def look(graph):
        seen["gs"] = {n.op: tuple(n.outputs[0].shape) for n in graph.nodes if n.op in ("Conv", "Tanh")}

    def look_ir(model):
        seen["ir"] = {
            n.op_type: tuple(map(str, n.outputs[0].shape)) for n in model.graph if n.op_type == "Tanh"
        }

    run(program, graphsurgeon(look), onnx_ir_pass(look_ir))
    assert seen["gs"]["Tanh"] == ("N", 4, 6, 6) and seen["ir"] == {"Tanh": ("N", "4", "6", "6")}


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_doing_nothing_changes_nothing(name):
    program = models.captured(name)
    passes = [
        graphsurgeon(lambda g: None, name="a"),
        onnx_ir_pass(lambda m: m, name="b"),
        torch_fx(lambda m: m, name="c"),
        onnx_ir_pass(common.RemoveUnusedNodesPass()),
    ]
    result = run(program, *passes)
    assert not result.modified and result.program is program
    assert all(r.result.refusals[0].reason == "the foreign code changed nothing" for r in result.results)
    assert [str(r.step.item) for r in result.results] == ["a", "b", "c", "remove-unused-nodes"]


def test_other_opsets_functions_and_constants_are_made_canonical(program):
    def rewritten(graph):
        graph.opset = 18
        relu = next(n for n in graph.nodes if n.op == "Relu")
        relu.op = "Max"
        relu.inputs.append(gs.Constant("zero", np.zeros((), np.float32)))

    result = run(program, graphsurgeon(rewritten)).program
    assert "Max" in operators(result) and result.model.opset_imports == {"": 21}
    assert equal(program, result) == 0
    as_function = RewriteRule(
        lambda op, x: op.Relu(op.Relu(x)),
        lambda op, x: op.Both(x, _domain="own"),
        name="both",
        as_function=True,
    )
    result = run(program, rewrite_rule(as_function)).program
    assert not result.model.functions and equal(program, result) == 0


def test_passes_of_onnx_ir(program):
    double = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        double[1].weight.copy_(double[0].weight)
    program = sartor.capture(double, torch.randn(1, 4))
    merged = run(
        program, onnx_ir_pass(ir.passes.PassManager([common.DeduplicateInitializersPass()]), name="merge")
    )
    names = [n for n in merged.program.initializers if n.endswith("weight")]
    assert len(names) == 1


def test_new_weights_are_allowed_their_rounding(program):
    def scaled(model):
        weight = model.graph.initializers["head.weight"]
        array = weight.const_value.numpy()
        weight.const_value = ir.tensor(array * np.float32(1 + 1e-7), name=weight.name)

    assert run(program, onnx_ir_pass(scaled)).modified

    def wrong(model):
        weight = model.graph.initializers["head.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.001), name=weight.name)

    with pytest.raises(
        VerificationError, match=r"Pass 'wrong' is declared exact.*differ by 0.00[01]\d+ .*tolerance 1e-05"
    ):
        run(program, onnx_ir_pass(wrong))
    assert run(program, onnx_ir_pass(wrong, semantics=Semantics.NEEDS_TRAINING)).modified


def test_weights_changed_on_the_twin(program):
    def halve(module):
        with torch.no_grad():
            module.head.weight.mul_(0.5)

    result = run(program, torch_fx(halve, semantics=Semantics.NEEDS_TRAINING))
    step = result.results[0].result
    assert step.counts == {"initializers_changed": 1} and len(step.program.provenance) == len(
        program.provenance
    )
    assert np.array_equal(
        step.program.initializer_array("head.weight"), program.initializer_array("head.weight") / 2
    )


# ---- foreign code that is wrong ------------------------------------------------------------------


def gs_swap(graph):
    node = next(n for n in graph.nodes if n.op == "Sub")
    node.inputs = node.inputs[::-1]


def gs_drop_bias(graph):
    node = next(n for n in graph.nodes if n.op == "Conv" and n.inputs[1].name == "left.weight")
    del node.inputs[2]


def gs_rename_output(graph):
    graph.outputs[0].name = "renamed"


def gs_dangle(graph):
    node = next(n for n in graph.nodes if n.op == "Tanh")
    node.inputs[0] = gs.Variable("nowhere", np.float32)


def gs_raise(graph):
    raise IndexError("list index out of range")


def gs_return(graph):
    return [graph]


def gs_fix_batch(graph):
    node = next(n for n in graph.nodes if n.op == "Tanh")
    source = node.inputs[0]
    reshaped = gs.Variable("flat", np.float32)
    graph.nodes.append(
        gs.Node("Reshape", "flatten", {}, [source, gs.Constant("to", np.array([4, 6, 6]))], [reshaped])
    )
    back = gs.Variable("back", np.float32)
    graph.nodes.append(
        gs.Node("Reshape", "restore", {}, [reshaped, gs.Constant("two", np.array([1, 4, 6, 6]))], [back])
    )
    node.inputs[0] = back
    graph.toposort()


def gs_new_output(graph):
    graph.outputs.append(next(n for n in graph.nodes if n.op == "Tanh").outputs[0])


def gs_vendor(graph):
    next(n for n in graph.nodes if n.op == "Tanh").op = "VendorTanh"


def gs_cycle(graph):
    relu = next(n for n in graph.nodes if n.op == "Relu")
    relu.inputs[0] = next(n for n in graph.nodes if n.op == "Tanh").outputs[0]


def ir_find(model, op_type):
    return next(n for n in model.graph if n.op_type == op_type)


def ir_swap(model):
    node = ir_find(model, "Sub")
    a, b = node.inputs
    node.replace_input_with(0, b)
    node.replace_input_with(1, a)


def ir_drop_bias(model):
    node = next(n for n in model.graph if n.op_type == "Conv" and n.inputs[1].name == "left.weight")
    node.replace_input_with(2, None)


def ir_rename_output(model):
    model.graph.outputs[0].name = "renamed"


def ir_dangle(model):
    ir_find(model, "Tanh").replace_input_with(0, ir.Value(name="nowhere"))


def ir_forget_producer(model):
    node = ir_find(model, "Tanh")
    model.graph.remove(node)


def ir_raise(model):
    raise RuntimeError("no such layer")


def ir_return(model):
    return True


def ir_write_in_place(model):
    model.graph.initializers["head.weight"].const_value.numpy()[:] = 0


def ir_wrong_shape(model):
    weight = model.graph.initializers["right.weight"]
    weight.const_value = ir.tensor(np.zeros((4, 5, 1, 1), np.float32), name=weight.name)


def ir_wrong_type(model):
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)


def ir_static_input(model):
    model.graph.inputs[0].shape = ir.Shape([1, 3, 8, 8])


def fx_swap(module):
    node = next(n for n in module.graph.nodes if "sub" in str(n.target))
    node.args = node.args[::-1]


def fx_drop_bias(module):
    for node in module.graph.nodes:
        if "conv" in str(node.target) and "left" in str(node.args[1]):
            node.args = node.args[:2]


def fx_more_outputs(module):
    output = next(n for n in module.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], output.args[0][0]),)


def fx_raise(module):
    raise AttributeError("'Node' object has no attribute 'tragets'")


def fx_return(module):
    return module.graph


def fx_invalid(module):
    module.graph.create_node("call_function", torch.relu, (), name="late")
    nodes = list(module.graph.nodes)
    sub = next(n for n in nodes if "sub" in str(n.target))
    sub.args = (nodes[-1], sub.args[1])


SWAP_RULE = rule(lambda op, x, y: op.Sub(x, op.Tanh(y)), lambda op, x, y: op.Sub(op.Tanh(y), x), "swap")
ENDLESS_RULE = rule(lambda op, x, y: op.Sub(x, y), lambda op, x, y: op.Sub(y, x), "endless")
BIAS_RULE = rule(lambda op, x, w, b: op.Conv(x, w, b), lambda op, x, w, b: op.Conv(x, w), "drop-bias")
VENDOR_RULE = rule(lambda op, x: op.Tanh(x), lambda op, x: op.FusedTanh(x, _domain="com.vendor"), "vendor")

WRONG = [
    (
        graphsurgeon,
        gs_swap,
        VerificationError,
        r"declared exact, but its outputs differ by .*float64, random weights",
    ),
    (
        graphsurgeon,
        gs_drop_bias,
        VerificationError,
        r"declared exact, but its outputs differ by .*random weights",
    ),
    (
        graphsurgeon,
        gs_rename_output,
        VerificationError,
        r"graph outputs are \['renamed'\]; expected \['linear'\]",
    ),
    (graphsurgeon, gs_dangle, VerificationError, r"\(Tanh\) is value 'nowhere', which nothing computes"),
    (graphsurgeon, gs_raise, PassError, r"'gs-raise' failed: IndexError: list index out of range"),
    (graphsurgeon, gs_return, PassError, r"returned 'list'; expected an onnx_graphsurgeon.Graph or None"),
    (graphsurgeon, gs_fix_batch, VerificationError, r"not sound"),
    (graphsurgeon, gs_new_output, VerificationError, r"graph outputs are \['linear', 'tanh'\]; expected"),
    (graphsurgeon, gs_vendor, VerificationError, r"'VendorTanh', which is outside the canonical table"),
    (graphsurgeon, gs_cycle, VerificationError, r"not sound.*cycle"),
    (onnx_ir_pass, ir_swap, VerificationError, r"declared exact, but its outputs differ by"),
    (
        onnx_ir_pass,
        ir_drop_bias,
        VerificationError,
        r"declared exact, but its outputs differ by .*random weights",
    ),
    (onnx_ir_pass, ir_rename_output, VerificationError, r"graph outputs are \['renamed'\]"),
    (onnx_ir_pass, ir_dangle, VerificationError, r"\(Tanh\) is value 'nowhere', which nothing computes"),
    (onnx_ir_pass, ir_forget_producer, VerificationError, r"\(Sub\) is value 'tanh', which nothing computes"),
    (onnx_ir_pass, ir_raise, PassError, r"'ir-raise' failed: RuntimeError: no such layer"),
    (onnx_ir_pass, ir_return, PassError, r"returned 'bool'; expected an onnx_ir.Model"),
    (onnx_ir_pass, ir_write_in_place, PassError, r"failed: ValueError: assignment destination is read-only"),
    (onnx_ir_pass, ir_wrong_shape, VerificationError, r"not sound.*Conv"),
    (onnx_ir_pass, ir_wrong_type, VerificationError, r"Graph input 'x' became FLOAT16; expected FLOAT"),
    (
        onnx_ir_pass,
        ir_static_input,
        VerificationError,
        r"Graph input 'x' became \[1, 3, 8, 8\]; expected \['N', 3",
    ),
    (torch_fx, fx_swap, VerificationError, r"declared exact, but its outputs differ by"),
    (
        torch_fx,
        fx_drop_bias,
        VerificationError,
        r"declared exact, but its outputs differ by .*random weights",
    ),
    (torch_fx, fx_more_outputs, PassError, r"returns a module with 2 outputs; expected 1"),
    (
        torch_fx,
        fx_raise,
        PassError,
        r"'fx-raise' failed: AttributeError: 'Node' object has no attribute 'tragets'",
    ),
    (torch_fx, fx_return, PassError, r"returned 'Graph'; expected a torch.fx.GraphModule or None"),
    (torch_fx, fx_invalid, PassError, r"'fx-invalid' failed: RuntimeError: .*before it has been defined"),
    (rewrite_rule, SWAP_RULE, VerificationError, r"'swap' is declared exact, but its outputs differ by"),
    (rewrite_rule, ENDLESS_RULE, PassError, r"'endless' does not come to an end: its rules were applied 1"),
    (rewrite_rule, BIAS_RULE, VerificationError, r"'drop-bias' is declared exact, but its outputs differ by"),
    (rewrite_rule, VENDOR_RULE, VerificationError, r"'FusedTanh' of domain 'com.vendor', which is outside"),
]


@pytest.mark.parametrize(
    ("adapter", "foreign", "error", "message"), WRONG, ids=lambda v: getattr(v, "__name__", None)
)
def test_refused(program, adapter, foreign, error, message):
    made = adapter(foreign)
    with pytest.raises(error, match=message) as caught:
        run(program, made)
    assert f"'{made.name}'" in str(caught.value)
    assert f"In pass '{made.name}'." in caught.value.__notes__


def test_zero_weights_hide_what_random_ones_show(program):
    """The planted bug is invisible on the program's own weights: without random ones it would pass."""
    result = graphsurgeon(gs_drop_bias, semantics=Semantics.APPROXIMATE).run(program)
    assert result.modified and equal(program, result.program) == 0


def test_a_change_before_softmax_is_seen():
    """Behind a saturated Softmax the outputs agree; before it they do not."""
    module = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)).eval()
    program = sartor.capture(module, torch.randn(1, 4))

    def offset(graph):
        node = next(n for n in graph.nodes if n.op == "Softmax")
        shifted = gs.Variable("shifted", np.float32)
        graph.nodes.append(
            gs.Node(
                "Add",
                "shift",
                {},
                [node.inputs[0], gs.Constant("by", np.full((1,), 3.0, np.float32))],
                [shifted],
            )
        )
        node.inputs[0] = shifted
        graph.toposort()

    with pytest.raises(VerificationError, match="'offset' is declared exact, but its outputs differ"):
        run(program, graphsurgeon(offset))

    def other_axis(graph):
        next(n for n in graph.nodes if n.op == "Softmax").attrs["axis"] = 0

    with pytest.raises(VerificationError, match="'other-axis'"):
        run(program, graphsurgeon(other_axis))


def test_an_output_that_cannot_show_errors_is_inconclusive():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return torch.clamp(torch.relu(torch.relu(self.linear(x))), 7.0, 7.0)

    program = sartor.capture(Constant().eval(), torch.randn(1, 4))
    with pytest.raises(
        VerificationError, match="'ir-merge-relus' cannot be shown to be exact: the outputs hardly"
    ):
        run(program, onnx_ir_pass(ir_merge_relus))
    assert run(program, onnx_ir_pass(ir_merge_relus, semantics=Semantics.APPROXIMATE)).modified


def test_a_reproducer_is_written(program, tmp_path):
    instrument = ReproducerOnFailure(tmp_path)
    with pytest.raises(VerificationError):
        sartor.Pipeline([graphsurgeon(gs_swap)], [instrument]).run(program)
    assert (instrument.written[0] / "pipeline.txt").read_text() == "gs-swap\n"


class TestNames:
    def test_from_what_is_wrapped(self):
        assert graphsurgeon(gs_swap).name == "gs-swap"
        assert str(onnx_ir_pass(common.RemoveUnusedNodesPass())) == "remove-unused-nodes"
        assert rewrite_rule(MERGE_RULE).name == "merge-relus"
        assert torch_fx(lambda m: None).name == "foreign"
        assert graphsurgeon(gs_swap, name="Swap It").name == "swap-it"
        assert graphsurgeon(gs_swap).semantics is Semantics.EXACT

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: graphsurgeon(gs_swap, name="prune-channels"), "'prune-channels' is registered already"),
            (lambda: graphsurgeon(gs_swap, name="3D"), "'3D' cannot be the name of a pass"),
            (
                lambda: graphsurgeon(gs_swap, semantics="exact"),
                "Expected a Semantics member for pass 'gs-swap'",
            ),
            (lambda: graphsurgeon("swap"), "Expected a function or pass, got 'str'"),
            (
                lambda: onnx_ir_pass(common.RemoveUnusedNodesPass),
                r"is a class; give an instance, RemoveUnused.*\(\)",
            ),
            (lambda: torch_fx(dict), "'dict' is a class"),
            (lambda: rewrite_rule(gs_swap), "Expected an onnxscript RewriteRule.*got 'function'"),
            (lambda: rewrite_rule([]), "Expected an onnxscript RewriteRule.*got 'list'"),
            (lambda: rewrite_rule([MERGE_RULE, SWAP_RULE]), "need a name for the pass"),
            (lambda: rewrite_rule(RewriteRuleSet([MERGE_RULE, SWAP_RULE])), "need a name for the pass"),
        ],
    )
    def test_refused(self, make, message):
        with pytest.raises(UsageError, match=message):
            make()


def test_a_class_with_options(program):
    @dataclasses.dataclass(frozen=True)
    class Limited(interop.GraphSurgeonPass):
        """Merge some."""

        name: ClassVar[str] = "limited"
        count: int = 0

        def transform(self, graph):
            if self.count:
                gs_merge_relus(graph)

    assert not run(program, Limited()).modified
    assert run(program, Limited(count=1)).modified
    assert str(Limited(count=1)) == "limited{count=1}"


def test_without_graphsurgeon(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    with pytest.raises(UsageError, match=r"pip install 'sartor\[interop\]'"):
        run(program, graphsurgeon(gs_swap))


# ---- examples and plugins ------------------------------------------------------------------------


EXAMPLES = {
    "with_graphsurgeon.py": "['Conv', 'Add', 'Relu'] became ['Conv', 'Relu']",
    "with_onnx_ir.py": "Conv Sigmoid Conv Conv Add",
    "with_onnxscript.py": "['Gemm', 'Relu', 'Relu', 'Gemm'] became ['Gemm', 'Relu', 'Gemm']",
    "with_torch_fx.py": "['tanh']",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, capsys):
    path = ROOT / "examples" / "interop" / name
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == EXAMPLES[name]


def test_every_example_is_tested():
    assert {p.name for p in (ROOT / "examples" / "interop").glob("*.py")} == set(EXAMPLES)


def subprocess_run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


class TestPluginPackage:
    @pytest.fixture(scope="class")
    @staticmethod
    def folder(tmp_path_factory):
        root = tmp_path_factory.mktemp("plugin")
        source = shutil.copytree(ROOT / "tests" / "plugin_package", root / "source")
        options = (
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--disable-pip-version-check",
        )
        done = subprocess_run("-m", "pip", "install", *options, "--target", root / "installed", source)
        assert done.returncode == 0, done.stderr
        module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ReLU()).eval()
        sartor.capture(module, torch.randn(1, 3, 4, 4)).save(root / "model.onnx")
        return root

    @staticmethod
    def sartor_run(folder, passes):
        command = [
            "-m",
            "sartor",
            "run",
            folder / "model.onnx",
            "--passes",
            passes,
            "-o",
            folder / "out.onnx",
        ]
        return subprocess_run(*command, "--json", PYTHONPATH=str(folder / "installed"))

    @pytest.mark.parametrize(
        ("passes", "left"),
        [
            ("their-pass{limit=1}", ["Conv", "Relu"]),
            ("their-pass,their-ir-pass", ["Conv", "Max"]),
        ],
    )
    def test_runs(self, folder, passes, left):
        done = self.sartor_run(folder, passes)
        assert done.returncode == 0, done.stderr
        steps = json.loads(done.stdout)["steps"]
        assert [s["pass"] for s in steps] == passes.split(",") and all(s["modified"] for s in steps)
        assert operators(sartor.load(folder / "out.onnx")) == left

    @pytest.mark.parametrize(
        ("passes", "message"),
        [
            ("broken-pass", "ModuleNotFoundError: No module named 'a_package_that_nobody_has'"),
            ("exiting-pass", "SystemExit: 0"),
            ("unfinished-pass", "it does not define apply"),
        ],
    )
    def test_a_plugin_that_fails_is_reported(self, folder, passes, message):
        done = self.sartor_run(folder, passes)
        assert done.returncode == 2
        assert (
            message in done.stderr
            and f"'{passes}'" in done.stderr
            and "sartor-sample-plugin 0.3" in done.stderr
        )

    def test_a_plugin_that_fails_is_listed_and_harms_no_other(self, folder):
        done = self.sartor_run(folder, "their-passe")
        assert done.returncode == 2
        assert "Did you mean 'their-pass'?" in done.stderr and "'broken-pass'" in done.stderr
