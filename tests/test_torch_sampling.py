"""What ONNX's node cases leave open: regions, deformation, placement, Fourier and quantized operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import helper
from test_torch_ops import normal, reference_case

from sartor.errors import UnsupportedOperatorError
from sartor.ir.torch_ops import to_signed, to_unsigned
from sartor.ir.torch_ops.indexing import col2im, max_unpool
from sartor.ir.torch_ops.quantization import dequantize_linear, qlinear_conv, quantize_linear
from sartor.ir.torch_ops.sampling import deform_conv, grid_sample
from sartor.ir.torch_ops.spectral import dft, stft


@pytest.mark.parametrize("ratio", [0, 1, 3])
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "output_half_pixel"])
def test_roi_align(ratio: int, mode: str, coordinates: str) -> None:
    """Regions at the border, beyond it, smaller than a pixel; two images; fewer samples than bins."""
    node = helper.make_node(
        "RoiAlign", ["x", "rois", "images"], ["y"], mode=mode, output_height=3, output_width=2,
        sampling_ratio=ratio, spatial_scale=0.5, coordinate_transformation_mode=coordinates,
    )  # fmt: skip
    rois = np.array([[0, 0, 9, 7], [3.3, 2.1, 15.7, 14.2], [-4, -4, 3, 30], [5, 5, 5.2, 5.1]], np.float64)
    images = np.array([0, 1, 1, 0], dtype=np.int64)
    reference_case(node, {"x": normal(2, 3, 8, 9)}, rois=rois, images=images)


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_deform_conv(groups: tuple[int, int]) -> None:
    """The reference interpolates in float32."""
    group, offset_group = groups
    node = helper.make_node(
        "DeformConv", ["x", "w", "o", "b", "m"], ["y"], group=group, offset_group=offset_group,
        kernel_shape=[3, 2], pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2],
    )  # fmt: skip
    offset, mask = normal(2, offset_group * 12, 4, 5, seed=1), normal(2, offset_group * 6, 4, 5, seed=2)
    arrays = {"w": normal(6, 4 // group, 3, 2, seed=3), "o": offset, "m": mask, "b": normal(6, seed=4)}
    reference_case(node, {"x": normal(2, 4, 7, 6)}, atol=1e-5, **arrays)


def test_deform_conv_without_offsets_is_conv() -> None:
    x, w = torch.from_numpy(normal(2, 4, 6, 6)), torch.from_numpy(normal(3, 2, 3, 3))
    got = deform_conv(x, torch.cat([w, w]), torch.zeros(2, 18, 6, 6).double(), group=2, pads=(1, 1, 1, 1))
    want = torch.nn.functional.conv2d(x, torch.cat([w, w]), padding=1, groups=2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gradients() -> None:
    torch.manual_seed(0)
    x, w, o = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((1, 2, 4, 4), (2, 2, 2, 2), (1, 8, 3, 3))
    )
    assert torch.autograd.gradcheck(deform_conv, (x, w, o))
    grid = (torch.rand(1, 3, 3, 2, dtype=torch.float64) * 1.6 - 0.8).requires_grad_()
    assert torch.autograd.gradcheck(grid_sample, (x, grid))


def test_grid_sample_refuses_what_torch_lacks() -> None:
    with pytest.raises(UnsupportedOperatorError, match="mode 'cubic' on 3 spatial axes"):
        grid_sample(torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 1, 1, 3), mode="cubic")


def test_col2im_is_fold() -> None:
    x = torch.from_numpy(normal(2, 3 * 6, 3 * 7))
    got = col2im(x, (6, 7), (3, 2), dilations=(1, 2), pads=(1, 1, 1, 1), strides=(2, 1))
    want = torch.nn.functional.fold(x, (6, 7), (3, 2), dilation=(1, 2), padding=1, stride=(2, 1))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_max_unpool_inverts_max_pool() -> None:
    x = torch.from_numpy(normal(2, 3, 6, 4))
    pooled, indices = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    want = torch.nn.functional.max_unpool2d(pooled, indices, 2)
    planes = torch.arange(6).reshape(2, 3, 1, 1) * 24  # torch counts within a plane, ONNX within the tensor
    torch.testing.assert_close(
        max_unpool(pooled, indices + planes, kernel_shape=[2, 2], strides=[2, 2]), want
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_fourier_transforms(dtype: torch.dtype) -> None:
    x = torch.from_numpy(normal(2, 12, 3, 1)).to(dtype)
    spectrum = dft(x, axis=(1,), onesided=1)
    assert spectrum.dtype is dtype and spectrum.shape == (2, 7, 3, 2)
    back = dft(spectrum, (12,), (1,), inverse=1, onesided=1)
    torch.testing.assert_close(
        back, x, rtol=1e-2 if dtype is torch.float16 else 1e-5, atol=1e-2 if dtype is torch.float16 else 1e-6
    )
    full = dft(x.double(), axis=(1,))
    torch.testing.assert_close(full[:, :7], dft(x.double(), axis=(1,), onesided=1), rtol=1e-12, atol=1e-12)


def test_stft_is_torchs() -> None:
    x, window = torch.from_numpy(normal(2, 40)), torch.hann_window(8, dtype=torch.float64)
    got = stft(x.unsqueeze(-1), (4,), window, (8,))
    want = torch.stft(x, 8, 4, window=window, center=False, return_complex=True)
    torch.testing.assert_close(torch.view_as_complex(got), want.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_quantization_rounds_half_to_even_and_saturates() -> None:
    x = torch.tensor([-1000.0, -0.5, 0.5, 1.5, 2.5, 1000.0])
    zero = torch.tensor(10, dtype=torch.uint8)
    assert quantize_linear(x, torch.tensor(1.0), zero).tolist() == [0, 10, 10, 12, 12, 255]
    wide = torch.tensor(30000, dtype=torch.uint16)
    assert quantize_linear(x * 1000, torch.tensor(1.0), wide).tolist()[-1] == 65535
    ends = torch.tensor([0, 65535]).to(torch.uint16)
    assert dequantize_linear(ends, torch.tensor(0.5), wide).tolist() == [-15000.0, 17767.5]


def test_quantized_convolution_is_the_float_one_rounded() -> None:
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.integers(0, 256, (1, 4, 5, 5)).astype(np.uint8))
    w = torch.from_numpy(generator.integers(-128, 128, (6, 2, 3, 3)).astype(np.int8))
    bias = torch.from_numpy(generator.integers(-500, 500, 6).astype(np.int32))
    scales = torch.from_numpy(generator.random(6).astype(np.float32) * 0.01)
    x_scale, y_scale, x_zero, y_zero = 0.02, 0.05, 120, 7
    got = qlinear_conv(
        x, torch.tensor(x_scale), torch.tensor(x_zero, dtype=torch.uint8), w, scales,
        torch.zeros(6, dtype=torch.int8), torch.tensor(y_scale), torch.tensor(y_zero, dtype=torch.uint8), bias,
        group=2, pads=(1, 1, 1, 1), strides=(2, 1),
    )  # fmt: skip
    real = torch.nn.functional.conv2d(
        (x.double() - x_zero) * x_scale, w.double() * scales.double().reshape(6, 1, 1, 1),
        bias.double() * x_scale * scales.double(), padding=1, groups=2, stride=(2, 1),
    )  # fmt: skip
    want = torch.clamp(torch.round(real / y_scale) + y_zero, 0, 255)
    assert got.dtype is torch.uint8 and 10 < float(got.double().mean()) < 245
    assert int((got.double() - want).abs().max()) <= 1  # float32 scales: a tie may fall either way
    assert float((got.double() != want).double().mean()) < 0.02


def test_unsigned_integers_travel_as_signed_ones() -> None:
    for dtype, top in ((torch.uint16, 2**16 - 1), (torch.uint32, 2**32 - 1)):
        x = torch.tensor([0, top // 2 + 1, top]).to(dtype)
        assert to_signed(x, exact=True).tolist() == [0, top // 2 + 1, top]
        assert to_unsigned(to_signed(x, exact=True) + 1, dtype).tolist() == [1, top // 2 + 2, 0]
    x = torch.from_numpy(np.array([0, 2**63, 2**64 - 1], dtype=np.uint64))
    assert to_unsigned(to_signed(x, exact=False) + 1, torch.uint64).tolist() == [1, 2**63 + 1, 0]
    with pytest.raises(UnsupportedOperatorError, match="uint64 value of 2\\^63 or more"):
        to_signed(x, exact=True)
