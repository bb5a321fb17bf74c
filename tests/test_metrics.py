"""PSNR, SSIM, NIQE. The golden figures of the first two run in test_goldens.py.    python -m pytest tests/test_metrics.py"""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.support.metrics import YIQ, half, load_niqe, niqe, psnr, psnr_y, ssim_y, to_y  # noqa: E402

PARAMS = ROOT.parent / "shared" / "public" / "niqe_pris_params.npz"


def textured(height=200, width=300, seed=0):
    """Noise summed over octaves, as numpy's frozen stream gives it; nowhere flat, where NIQE would count rounding errors.

    -> (3, height, width) uint8
    """
    rng, x = np.random.RandomState(seed), 0
    for k in (2, 4, 8, 16, 32, 64):
        coarse = torch.from_numpy(rng.standard_normal((1, 3, height // k + 2, width // k + 2)))
        x = x + k**0.7 * F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
    return (127 + 2 * x).clamp(0, 255).round().byte()


def test_equal_pictures():
    x = textured()
    assert psnr_y(x, x) == psnr(x, x) == math.inf and ssim_y(x, x) == 1
    assert psnr_y(x, x, pyiqa=True) == pytest.approx(80)


def test_known_difference():
    x = torch.full((1, 3, 20, 20), 0.5)
    assert psnr(x, x + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr_y(x, x + 0.1) == pytest.approx(20 + 20 * math.log10(255 / 219), abs=1e-4)  # luma spans 219 of 255 levels
    assert psnr_y(x, x + 0.1, luma=YIQ) == pytest.approx(20, abs=1e-4)


def test_bytes_floats_and_border():
    x, y = textured(), textured(seed=1)
    for metric in (psnr, psnr_y, ssim_y):
        assert metric(x, y) == pytest.approx(metric(x[None] / 255, y[None] / 255), rel=1e-6)
        assert metric(x, y, border=7) == metric(x[:, 7:-7, 7:-7], y[:, 7:-7, 7:-7])
    with pytest.raises(ValueError, match="one image"):
        psnr_y(torch.zeros(2, 3, 20, 20), torch.zeros(2, 3, 20, 20))
    with pytest.raises(ValueError, match="11 x 11"):
        ssim_y(x[:, :20, :20], y[:, :20, :20], border=5)


def test_half_is_matlabs():
    """A constant stays one, edges included; an impulse shows the cubic at 1.75, .75, .25 and 1.25 result pixels, halved."""
    assert torch.allclose(half(torch.full((8, 6), 3.0).double()), torch.tensor(3.0).double())
    impulse = torch.zeros(4, 16).double()
    impulse[:, 8] = 1
    taps = torch.tensor([0, 0, -0.01171875, 0.11328125, 0.43359375, -0.03515625, 0, 0]).double()
    assert torch.allclose(half(impulse), taps.expand(2, -1))


needs_params = pytest.mark.skipif(not PARAMS.exists(), reason=f"{PARAMS} is not there")


@needs_params
def test_niqe():
    """The figure comes from an independent, block-by-block implementation with scipy."""
    params, x = load_niqe(PARAMS), textured()
    assert niqe(x, params) == pytest.approx(8.395597, abs=1e-5)
    assert niqe(x, params) == niqe(x[None] / 255, params)
    blurred = F.avg_pool2d(x.float()[None], 5, 1, 2) / 255
    assert niqe(blurred, params) > niqe(x, params)


@needs_params
def test_niqe_of_too_little():
    params = load_niqe(PARAMS)
    assert math.isnan(niqe(textured(100, 150), params)) and math.isnan(niqe(torch.full((3, 200, 200), 0.5), params))


def test_niqe_parameters_that_are_none(tmp_path):
    (tmp_path / "text.npz").write_text("no parameters")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("missing.npz", "text.npz", "other.npz"):
        with pytest.raises(ValueError, match=name) as error:
            load_niqe(tmp_path / name)
        assert "\n" not in str(error.value)


def test_equals_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is a reference for this test only")
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 40, 52, generator=g)
    y = (x + 0.1 * torch.randn(3, 40, 52, generator=g)).clamp(0, 1)
    a, b = (to_y(z).numpy() for z in (x, y))
    assert psnr_y(x, y) == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=255), abs=1e-6)
    ssim = metrics.structural_similarity(a, b, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert ssim_y(x, y) == pytest.approx(ssim, abs=1e-6)
