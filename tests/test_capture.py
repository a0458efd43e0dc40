"""Capture: equal to the module, all parameter names kept, batch symbolic, no trace of the machine."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from models import ALL, captured, randomise, tiny_resnet
from torch import nn

from sartor.errors import ModelError, UnsupportedOperatorError, UsageError
from sartor.ir.batch import check_batch, relative_error
from sartor.ir.capture import capture, open_model
from sartor.ir.program import Program
from sartor.ir.verify import verify_program


def run(program: Program, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.to_bytes(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


@pytest.mark.parametrize("family", ALL)
def test_equals_the_module_at_batches_1_and_3(family: str) -> None:
    module, example = ALL[family]()
    program = captured(family)
    for batch in (1, 3):
        x = torch.randn(batch, *example[0].shape[1:], generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = module(x).numpy()
        (found,) = run(program, {program.graph.inputs[0].name: x.numpy()})
        assert relative_error(expected, found) < 1e-5


@pytest.mark.parametrize("family", ALL)
def test_keeps_every_parameter_and_its_contents(family: str) -> None:
    module, _ = ALL[family]()
    program = captured(family)
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        np.testing.assert_array_equal(program.initializer_array(name), tensor.numpy())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    assert sum(n.op_type == "BatchNormalization" for n in program.nodes()) == norms


@pytest.mark.parametrize("family", ALL)
def test_batch_is_symbolic_and_nothing_of_the_exporter_is_left(family: str) -> None:
    program = captured(family)
    assert program.batch.symbolic, program.batch.reason
    assert check_batch(program, size=5, seed=1) == ""
    verify_program(program)
    assert [str(v.shape[0]) for v in [*program.graph.inputs, *program.graph.outputs]] == ["N", "N"]
    assert program.input_shapes["x"][0] == 1
    operators = {n.op_type for n in program.nodes()}
    assert not operators & {"Constant", "Identity", "CastLike", "Cast", "Dropout", "Sqrt"}
    assert not [n for n, v in program.initializers.items() if 29 in v.shape]


def test_the_comparison_can_fail() -> None:
    program = captured("resnet").clone()
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    (before,) = run(program, {"x": x})
    weight = program.initializers["layer1.0.bn1.running_mean"]
    changed = weight.const_value.numpy().copy()
    changed[3] += 0.1
    weight.const_value = type(weight.const_value)(changed, name=weight.name)
    (after,) = run(program, {"x": x})
    assert relative_error(before, after) > 1e-3


def test_capture_is_deterministic_and_shared_with_nothing() -> None:
    module, example = tiny_resnet()
    first = capture(module, example)
    second = capture(module, example)
    assert first.to_bytes() == second.to_bytes()
    assert first.source.sha256 == first.sha256()
    randomise(module, 99)
    assert first.sha256() == first.source.sha256  # training the module on must not change the program


def test_training_mode_is_restored() -> None:
    module, example = tiny_resnet()
    module.train()
    module.layer1.eval()
    capture(module, example)
    assert module.training and module.layer2.training and not module.layer1[0].bn1.training


def test_float64_keeps_its_type() -> None:
    module, example = tiny_resnet()
    program = capture(module.double(), example[0].double())
    assert program.graph.inputs[0].dtype.name == "DOUBLE"
    assert program.initializer_array("fc.weight").dtype == np.float64


def test_provenance_stays_out_of_the_bytes() -> None:
    program = captured("resnet")
    record = next(r for r in program.provenance.values() if r.module == "layer2.0.conv1")
    assert (record.module_class, record.location.split(":")[0]) == ("Conv2d", "models.py")
    assert "layer2.0.conv1" in program.where(next(n for n in program.nodes() if n.name == "node_conv2d_5"))
    data = program.to_bytes()
    for secret in (os.getcwd(), os.path.expanduser("~"), "models.py", "forward"):
        assert secret.encode() not in data


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.a(left) + self.b(right)
            return y, y.softmax(-1)

    program = capture(
        Two().eval(), (torch.randn(2, 4), torch.randn(2, 3)), shapes={"left": (1, 4), "right": (1, 3)}
    )
    assert program.batch.inputs == ("left", "right")
    assert program.input_shapes == {"left": (1, 4), "right": (1, 3)}
    assert len(program.graph.outputs) == 2


def test_shape_replaces_the_example() -> None:
    module, example = tiny_resnet()
    program = capture(module, example, shapes={"x": (2, 3, 24, 20)})
    assert program.input_shapes == {"x": (2, 3, 24, 20)}
    assert [str(d) for d in program.graph.inputs[0].shape] == ["N", "3", "24", "20"]
    with pytest.raises(UsageError, match="names input 'y'"):
        capture(module, example, shapes={"y": (2, 3, 24, 20)})
    with pytest.raises(UsageError, match="does not fit"):
        capture(module, example, shapes={"x": (0, 3, 16, 16)})


def test_an_input_without_the_batch_is_left_alone() -> None:
    class Table(nn.Module):
        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return x @ table

    program = capture(Table(), (torch.randn(1, 4), torch.randn(4, 5)))
    assert program.batch.inputs == ("x",)
    assert list(program.graph.inputs[1].shape) == [4, 5]


def test_a_module_that_cannot_be_generalised_is_captured_as_it_is() -> None:
    class Mix(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0, keepdim=True)

    program = capture(Mix(), torch.randn(4, 5))
    assert not program.batch.symbolic
    assert "ReduceMean" in program.batch.reason and "test_capture.py" in program.batch.reason
    assert list(program.graph.inputs[0].shape) == [4, 5]
    verify_program(program)
    with pytest.raises(UsageError, match="batch is fixed because"):
        capture(Mix(), torch.randn(4, 5), shapes={"x": (2, 5)})


def test_a_module_that_bakes_its_batch_falls_back() -> None:
    class Baked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 3, 4).transpose(1, 2)

    program = capture(Baked(), torch.randn(2, 12))
    assert not program.batch.symbolic
    assert "export at batch" in program.batch.reason


def test_unsupported_operator_names_the_source_line() -> None:
    class Inverse(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(x)

    with pytest.raises(UnsupportedOperatorError, match=r"'Det'.*outside the canonical table") as caught:
        capture(Inverse(), torch.randn(1, 3, 3))
    assert "test_capture.py:" in str(caught.value)


def test_data_dependent_control_flow_is_refused_with_its_line() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(ModelError, match=r"'Branch' cannot be exported.*test_capture.py:\d+"):
        capture(Branch(), torch.randn(1, 3))


@pytest.mark.parametrize("bad", [(), ("text",), (1.0,)])
def test_bad_examples(bad: tuple) -> None:
    with pytest.raises(UsageError, match="Example inputs must be"):
        capture(nn.ReLU(), bad)


def write(path: Path, text: str) -> str:
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_open_model_runs_a_python_file(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text("WIDTH = 7\n")
    path = write(
        tmp_path / "net.py",
        """
        import torch
        from parts import WIDTH

        def make():
            return torch.nn.Linear(4, WIDTH), torch.zeros(1, 4)
        """,
    )
    program = open_model(f"{path}:make", shapes={"input": (2, 4)})
    assert program.source.name == "net.py:make"
    assert program.input_shapes == {"input": (2, 4)}
    assert list(program.initializers) == ["bias", "weight"]


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        ("def make(:\n", "make", r"net.py:1.*SyntaxError"),
        ("\nraise ValueError('boom')\n", "make", r"net.py:2.*ValueError: boom"),
        ("x = 1\n", "make", r"no function 'make'"),
        ("def make():\n    return 3\n", "make", r"must return \(module, example_inputs\)"),
        ("def make():\n    return {}['k']\n", "make", r"net.py:2.*KeyError"),
    ],
)
def test_open_model_errors_name_file_and_line(tmp_path: Path, text: str, function: str, message: str) -> None:
    path = tmp_path / "net.py"
    path.write_text(text)
    with pytest.raises(ModelError, match=message):
        open_model(f"{path}:{function}")


def test_open_model_without_file_or_function(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        open_model(str(tmp_path / "no.py") + ":make")
    with pytest.raises(UsageError, match="names no function"):
        open_model(str(tmp_path / "no.py"))
    with pytest.raises(ModelError, match="does not exist"):
        open_model(str(tmp_path / "no.onnx"))


def test_capture_is_silent(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    capture(nn.Linear(3, 2), torch.zeros(1, 3))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not recwarn.list


class Grouped(nn.Module):
    """Attention of five axes in which two query heads share a key head, after a pool over channels-last data."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 5)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, w, n, _ = x.shape
        q = self.q(x).reshape(b, w, n, 4, 8).transpose(2, 3)
        k, v = self.kv(x).reshape(b, w, n, 2, 2, 8).permute(3, 0, 1, 4, 2, 5).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        y = y.transpose(2, 3).reshape(b, w, n, 32).permute(0, 3, 1, 2)
        return self.out(self.pool(y).flatten(1))


def test_attention_of_any_rank_and_grouped_queries() -> None:
    torch.manual_seed(0)
    module = Grouped().eval()
    program = capture(module, torch.randn(1, 3, 6, 16))
    assert program.batch.symbolic, program.batch.reason
    x = torch.randn(4, 3, 6, 16)
    with torch.no_grad():
        expected = module(x).numpy()
    assert relative_error(expected, run(program, {"x": x.numpy()})[0]) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_decomposed_attention_is_torch_s(causal: bool, mask: str | None) -> None:
    from sartor.ir.capture_attention import attention

    if causal and mask:
        return  # torch allows one of them
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 3, 4, 6, 8), torch.randn(2, 3, 2, 6, 8), torch.randn(2, 3, 2, 6, 5)
    given = {None: None, "boolean": torch.rand(6, 6) > 0.3, "additive": torch.randn(6, 6)}[mask]
    for scale in (None, 0.3):
        options = {"attn_mask": given, "is_causal": causal, "scale": scale, "enable_gqa": True}
        expected = nn.functional.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(attention(q, k, v, **options), expected)


def test_bfloat16_is_captured_with_a_free_batch() -> None:
    module, example = tiny_resnet()
    program = capture(module.to(torch.bfloat16), example[0].to(torch.bfloat16))
    assert program.batch.symbolic, program.batch.reason
    assert program.graph.inputs[0].dtype.name == program.graph.outputs[0].dtype.name == "BFLOAT16"


@pytest.mark.parametrize("family", ALL)
def test_a_captured_file_is_captured_as_it_is(family: str, tmp_path: Path) -> None:
    path = captured(family).save(tmp_path / "canon.onnx")
    assert open_model(str(path)).to_bytes() == path.read_bytes()
