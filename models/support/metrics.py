"""PSNR, SSIM and NIQE as the super-resolution papers report them (LPIPS lives in lpips.py).

psnr_y and ssim_y follow BasicSR: luma unrounded, float64, a border cut off; what pyiqa does otherwise are arguments.
NIQE (Mittal et al. 2013) needs no reference: it measures how far an image's statistics are from those of pristine
photographs, by BasicSR's niqe_pris_params.npz (a mean, a covariance, a window).

An image is a tensor (3, H, W) or (1, 3, H, W), RGB, float in [0, 1] or uint8. Results are Python floats.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from models.support.download import WeightError

YCBCR = (65.481, 128.553, 24.966, 16)               # luma of BT.601 on 16 .. 235: weights of R, G, B in [0, 1], offset
YIQ = (255 * 0.299, 255 * 0.587, 255 * 0.114, 0)  # official: pyiqa's default; GramSR's script asks for YCBCR


def to_255(x, border=0):
    """An image -> (3, H, W) float64 in [0, 255], `border` pixels cut from every side."""
    x = x[0] if x.ndim == 4 and len(x) == 1 else x
    if x.ndim != 3 or len(x) != 3:
        raise ValueError(f"expected one image (3, H, W), got {tuple(x.shape)}")
    x = x.double() if x.dtype == torch.uint8 else x.double() * 255
    return x[:, border : x.shape[1] - border, border : x.shape[2] - border]


def to_y(x, border=0, luma=YCBCR):
    """An image -> (H, W) float64, luma in [0, 255], not rounded."""
    return (to_255(x, border) * x.new_tensor(luma[:3], dtype=torch.float64).view(3, 1, 1)).sum(0) / 255 + luma[3]


def _psnr(x, y, pyiqa=False):
    mse = ((x - y) / 255).square().mean().item()
    if pyiqa:
        mse += 1e-8  # official: so 80 dB is pyiqa's best
    return -10 * math.log10(mse) if mse else math.inf


def psnr(x, y, border=0):
    """Peak signal-to-noise ratio over RGB, dB."""
    return _psnr(to_255(x, border), to_255(y, border))


def psnr_y(x, y, border=0, luma=YCBCR, pyiqa=False):
    """Peak signal-to-noise ratio of the luma, dB; infinite for equal images."""
    return _psnr(to_y(x, border, luma), to_y(y, border, luma), pyiqa)


def correlate(x, window):
    """Correlation where the window fits.  x: (H, W), window: (h, w) -> (H - h + 1, W - w + 1)"""
    return F.conv2d(x[None, None], window.to(x)[None, None])[0, 0]


def ssim_y(x, y, border=0, luma=YCBCR, pyiqa=False):
    """Structural similarity of the luma: mean over all places where an 11 x 11 Gaussian (sigma 1.5) fits."""
    x, y = to_y(x, border, luma), to_y(y, border, luma)
    if min(x.shape) < 11:
        raise ValueError(f"SSIM needs 11 x 11 pixels, got {tuple(x.shape)} after cutting the border of {border}")
    if pyiqa:
        x, y = x.round(), y.round()
    g = torch.exp(-((torch.arange(11, dtype=torch.float64, device="cpu") - 5) ** 2) / (2 * 1.5**2))
    g = g / g.sum()
    # the window is separable, outer(g, g): columns, then rows take 22 products a pixel instead of 121
    mx, my, xx, yy, xy = (correlate(correlate(z, g[:, None]), g[None]) for z in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    contrast = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    if pyiqa:
        contrast = contrast.clamp(min=0)
    return ((2 * mx * my + c1) / (mx * mx + my * my + c1) * contrast).mean().item()


# ---- NIQE

BLOCK = 96  # pixels; half of it at the second scale


def load_niqe(path):
    """niqe_pris_params.npz -> (mean (36,), covariance (36, 36), window (7, 7)), float64. Raises WeightError."""
    try:
        with np.load(path) as file:
            found = [file[key] for key in ("mu_pris_param", "cov_pris_param", "gaussian_window")]
        mean, covariance, window = (torch.from_numpy(x).double() for x in found)
        return mean.view(36), covariance.view(36, 36), window.view(7, 7)
    except Exception as error:      # numpy raises nearly anything at a wrong file
        reason = " ".join(str(error).split())
        raise WeightError(f"{path}: not NIQE's parameter file ({reason}); "
                          "get niqe_pris_params.npz of BasicSR") from None


def normalise(y, window):
    """Each pixel less its surroundings' mean, over their deviation plus 1.  y: (H, W) in [0, 255] -> (H, W)"""
    n = len(window) // 2
    y_pad = F.pad(y[None], (n,) * 4, mode="replicate")[0]
    mean = correlate(y_pad, window)
    return (y - mean) / ((correlate(y_pad**2, window) - mean**2).abs().sqrt() + 1)


def half(y):
    """MATLAB's imresize(y, 0.5): bicubic, stretched to 8 taps against aliasing, edges mirrored.  y: (H, W), even"""
    taps = torch.tensor([-3, -9, 29, 111, 111, 29, -9, -3], device="cpu").double() / 256
    for _ in range(2):      # columns, then rows
        y = torch.cat([y[:, :3].flip(1), y, y[:, -3:].flip(1)], 1)
        y = F.conv1d(y[:, None], taps.to(y.device)[None, None], stride=2)[:, 0].T
    return y


@cache
def shape_table():
    """Shapes alpha of a generalised Gaussian, and Gamma(2/alpha)^2 / (Gamma(1/alpha) Gamma(3/alpha)) of each."""
    alpha = torch.from_numpy(np.arange(0.2, 10.001, 0.001))
    return alpha, torch.exp(2 * torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha))


def fit(x):
    """Fit an asymmetric generalised Gaussian to each row by its moments: (n, pixels) -> shape, left and right scale"""

    def rms(x, where):  # nan where a row has no such pixel
        return (torch.where(where, x * x, 0).sum(1) / where.sum(1)).sqrt()

    left, right = rms(x, x < 0), rms(x, x > 0)
    g = left / right
    r = x.abs().mean(1) ** 2 / (x * x).mean(1) * (g**3 + 1) * (g + 1) / (g * g + 1) ** 2
    alphas, table = (t.to(x.device) for t in shape_table())
    alpha = alphas[(table - r[:, None]).square().argmin(1)]
    scale = torch.exp((torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)) / 2)
    return alpha, left * scale, right * scale


def features(blocks):
    """18 numbers that describe each block of normalised pixels: (n, k, k) -> (n, 18)"""
    alpha, left, right = fit(blocks.flatten(1))
    found = [alpha, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):  # products of neighbours; a block wraps around at its edges
        alpha, left, right = fit((blocks * blocks.roll(shift, (1, 2))).flatten(1))
        mean = (right - left) * torch.exp(torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha))
        found += [alpha, mean, left, right]
    return torch.stack(found, 1)


@torch.no_grad()
def niqe(x, params):
    """Naturalness of an image as BasicSR computes it, lower is better.

    params: of `load_niqe` -> float; nan when fewer than two blocks of 96 x 96 pixels fit, or nearly all is flat
    """
    mean, covariance, window = params
    y = to_y(x.cpu()).round()  # official: rounded here, unlike in PSNR and SSIM
    rows, columns = y.shape[0] // BLOCK, y.shape[1] // BLOCK
    y = y[: rows * BLOCK, : columns * BLOCK]
    if rows * columns < 2:
        return math.nan
    found = []
    for size in (BLOCK, BLOCK // 2):
        blocks = normalise(y, window).view(rows, size, columns, size).transpose(1, 2).reshape(-1, size, size)
        found.append(features(blocks))
        y = half(y)
    found = torch.cat(found, 1)  # (blocks, 36)
    whole = found[~found.isnan().any(1)]
    if len(whole) < 2:
        return math.nan
    # official: blocks with a nan count for the mean with the features they have, but not for the covariance
    difference = mean - found.nanmean(0)
    distance = difference @ torch.linalg.pinv((covariance + whole.T.cov()) / 2) @ difference
    return distance.sqrt().item()
