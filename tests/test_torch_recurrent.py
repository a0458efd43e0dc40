"""RNN, GRU and LSTM of the FX twin against torch's own modules, and against a loop written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sartor.errors import UnsupportedOperatorError
from sartor.ir.torch_ops.recurrent import gru, lstm, rnn

T, N, I, H = 5, 3, 4, 6  # noqa: E741 - the names of ONNX's shapes
ORDER = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2], "RNN": [0]}  # gates of torch in the order of ONNX
FUNCTIONS = {"LSTM": lstm, "GRU": gru, "RNN": rnn}


def weights(module: torch.nn.Module, kind: str, directions: int) -> tuple[torch.Tensor, ...]:
    """W, R, B in ONNX's gate order from a torch module."""

    def stacked(name: str) -> torch.Tensor:
        parts = []
        for suffix in ("", "_reverse")[:directions]:
            gates = getattr(module, f"{name}_l0{suffix}").detach().chunk(len(ORDER[kind]))
            parts.append(torch.cat([gates[i] for i in ORDER[kind]]))
        return torch.stack(parts)

    return stacked("weight_ih"), stacked("weight_hh"), torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1)


def made(kind: str, directions: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(torch.nn, kind)(I, H, bidirectional=directions == 2).double()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layout", [0, 1])
def test_against_torch(kind: str, directions: int, layout: int) -> None:
    module = made(kind, directions)
    w, r, b = weights(module, kind, directions)
    x, h, c = (
        torch.randn(T, N, I).double(),
        torch.randn(directions, N, H).double(),
        torch.randn(directions, N, H).double(),
    )
    states = (h, c) if kind == "LSTM" else h
    want, last = module(x, states)
    swap = (lambda t: t.transpose(0, 1)) if layout else (lambda t: t)
    extra = (swap(c),) if kind == "LSTM" else ()
    options = {"linear_before_reset": 1} if kind == "GRU" else {}
    y, *finals = FUNCTIONS[kind](
        swap(x),
        w,
        r,
        b,
        None,
        swap(h),
        *extra,
        direction="bidirectional" if directions == 2 else "forward",
        hidden_size=H,
        layout=layout,
        outputs=3 if kind == "LSTM" else 2,
        **options,
    )
    got = (y.permute(1, 0, 2, 3) if layout else y.transpose(1, 2)).reshape(T, N, directions * H)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for mine, torchs in zip(finals, last if kind == "LSTM" else (last,), strict=True):
        torch.testing.assert_close(swap(mine), torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_lengths_against_packed_sequences(kind: str) -> None:
    module = made(kind, 2)
    w, r, b = weights(module, kind, 2)
    lengths = torch.tensor([2, 5, 3])
    x = torch.randn(T, N, I).double()
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, last = module(packed)
    want, _ = torch.nn.utils.rnn.pad_packed_sequence(output, total_length=T)
    options = {"linear_before_reset": 1} if kind == "GRU" else {}
    y, final = FUNCTIONS[kind](
        x, w, r, b, lengths.int(), direction="bidirectional", hidden_size=H, outputs=2, **options
    )[:2]
    torch.testing.assert_close(y.transpose(1, 2).reshape(T, N, 2 * H), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, last[0] if kind == "LSTM" else last, rtol=1e-12, atol=1e-12)


def test_reset_before_the_product() -> None:
    """ONNX's default form of the GRU, which torch does not have."""
    generator = np.random.default_rng(0)
    x, w, r = (
        generator.standard_normal((2, 1, I)),
        generator.standard_normal((1, 3 * H, I)),
        generator.standard_normal((1, 3 * H, H)),
    )
    b = generator.standard_normal((1, 6 * H))
    h = np.zeros((1, H))
    gates = [slice(i * H, (i + 1) * H) for i in range(3)]
    wb, rb = b[0, : 3 * H], b[0, 3 * H :]

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-v))

    for t in range(2):
        z, reset = (sigmoid(x[t] @ w[0, g].T + wb[g] + h @ r[0, g].T + rb[g]) for g in gates[:2])
        new = np.tanh(x[t] @ w[0, gates[2]].T + wb[gates[2]] + (reset * h) @ r[0, gates[2]].T + rb[gates[2]])
        h = (1 - z) * new + z * h
    _, final = gru(*map(torch.from_numpy, (x, w, r, b)), hidden_size=H, outputs=2)
    np.testing.assert_allclose(final[0].numpy(), h, rtol=1e-12)


def test_options_change_the_result() -> None:
    """Each one is visible; the values of peepholes and the defaults are in ONNX's own cases."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, w, r, p = draw(T, N, I), draw(1, 4 * H, I), draw(1, 4 * H, H), draw(1, 3 * H)
    plain = lstm(x, w, r, hidden_size=H, outputs=1)[0]
    variants = {
        "clip": lstm(x, w, r, hidden_size=H, clip=0.5, outputs=1)[0],
        "input_forget": lstm(x, w, r, hidden_size=H, input_forget=1, outputs=1)[0],
        "peepholes": lstm(x, w, r, None, None, None, None, p, hidden_size=H, outputs=1)[0],
        "activations": lstm(
            x, w, r, hidden_size=H, activations=("HardSigmoid", "Affine", "LeakyRelu"),
            activation_alpha=(0.3, 2.0, 0.1), activation_beta=(0.4, 0.1), outputs=1,
        )[0],
    }  # fmt: skip
    for name, result in variants.items():
        assert not torch.allclose(plain, result), name


def test_settings_are_dealt_out_in_order() -> None:
    """The second activation takes the second alpha, and one without an alpha takes none."""
    x, w, r = torch.ones(1, 1, 1).double(), torch.ones(1, 3, 1).double(), torch.zeros(1, 3, 1).double()
    y = gru(
        x, w, r, hidden_size=1, activations=("HardSigmoid", "Affine"), activation_alpha=(0.1, 3.0),
        activation_beta=(0.2, 4.0), outputs=1,
    )[0]  # fmt: skip
    z = 0.1 * 1 + 0.2
    assert float(y) == pytest.approx((1 - z) * (3.0 * 1 + 4.0))


def test_unknown_activation() -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"activation 'Swish'.*expected one of"):
        rnn(torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1), activations=("Swish",), outputs=1)


def test_gradients() -> None:
    torch.manual_seed(1)
    x, w, r = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 2), (1, 12, 2), (1, 12, 3))
    )
    assert torch.autograd.gradcheck(lambda *a: lstm(*a, hidden_size=3, outputs=3), (x, w, r))
