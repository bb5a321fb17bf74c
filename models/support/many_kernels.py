"""Blur kernels of many images at once: the weights that degrade.py computes one after the other, up to rounding."""

import math

import torch

FEW = 16        # so many are computed one by one, as they always were
SHAPES = {"gaussian", "generalized", "plateau", "sinc", "identity"}


def know(kernels):
    """Tell whether all shapes are among those that degrade.py has today."""
    return all(kernel.shape in SHAPES for kernel in kernels)


def stack(kernels):
    """Compute weights of Kernels, padded with zeros to the largest.  -> (n, size, size) float32"""
    def column(name, instead):
        values = [getattr(kernel, name) for kernel in kernels]
        values = [instead if value is None else value for value in values]      # where a shape does not need it
        return torch.tensor(values, dtype=torch.float64, device="cpu").view(-1, 1, 1)

    size = column("size", 1)
    offset = torch.arange(int(size.max()), dtype=torch.float64, device="cpu") - size.max() // 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    cos, sin = column("theta", 0.0).cos(), column("theta", 0.0).sin()
    d2 = ((cos * x + sin * y) / column("sigma_x", 1.0)) ** 2 + ((cos * y - sin * x) / column("sigma_y", 1.0)) ** 2
    d2_beta = d2 ** column("beta", 1.0)
    r, cutoff = torch.hypot(x, y), column("cutoff", 1.0)
    sinc = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)
    weights = {"gaussian": torch.exp(-0.5 * d2), "generalized": torch.exp(-0.5 * d2_beta), "plateau": 1 / (1 + d2_beta),
               "sinc": torch.where(r == 0, cutoff**2 / (4 * math.pi), sinc), "identity": (r == 0).double()}

    stacked = torch.zeros_like(d2)
    for shape, of_shape in weights.items():
        has_shape = torch.tensor([kernel.shape == shape for kernel in kernels], device="cpu").view(-1, 1, 1)
        stacked = torch.where(has_shape, of_shape, stacked)
    inside = (x.abs() <= size // 2) & (y.abs() <= size // 2)
    stacked = stacked * inside
    return (stacked / stacked.sum((1, 2), keepdim=True)).float()
