"""What a GPU does otherwise: the same results by fewer kernels, and in fewer passes over large maps.

A GPU waits for launches where maps are small, and for its memory where they are large. So what many layers take is cast
once, and the VAE's norms read a map as it comes, hand it out as the next convolution takes it, and leave its layout as
convolutions want it. `tune` gives a model all of it. For use alone: no gradients.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

LARGE = 2**21   # numbers in a map from which on PyTorch's norm is slower, since it has one block of threads a group


def tune(model):
    """Let a model's UNet and autoencoder, which are on a GPU, take the ways of this file; all else stays."""
    for name, network in model.named_children():
        if name == "unet":
            cast_once(network)
        elif any(isinstance(m, nn.GroupNorm) for m in network.modules()):
            cast_once(network)
            change_norms(network)
            network.to(memory_format=torch.channels_last)


def cast_once(network):
    """Cast what several layers take before the first of them: contexts, S3Diff's matrices, results of layer norms."""
    dtype = dtype_of_products(network)
    with_adapters = getattr(network, "encoder", network)
    with_adapters.register_forward_pre_hook(partial(cast_arguments, dtype))
    for layer in network.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.register_forward_hook(partial(cast_result, dtype))


def change_norms(network):
    """Put a GroupNorm of this file in place of each of PyTorch's."""
    dtype = dtype_of_products(network)
    for name, norm in [*network.named_modules()]:
        if isinstance(norm, nn.GroupNorm):
            last = name.endswith("conv_norm_out")       # the product that follows is in float32
            network.set_submodule(name, GroupNorm(norm, torch.float32 if last else dtype))


def dtype_of_products(network):
    """Say in which type large products are computed: that of weights which precision.py has cast."""
    return next((p.dtype for p in network.parameters() if p.dtype != torch.float32), torch.float32)


def cast_result(dtype, layer, args, result):
    """Hook after a layer norm's forward: q, k and v share one cast."""
    return result.to(dtype)


def cast_arguments(dtype, network, args):
    """Hook before a network's forward: its context and S3Diff's matrices, not the map, which is the first of args."""
    x, *others = args
    return x, *tree_map_only(torch.Tensor, lambda y: y.to(dtype) if y.is_floating_point() else y, others)


class GroupNorm(nn.GroupNorm):
    """A group norm that takes maps of any precision and layout, and hands them out in dtype."""

    def __init__(self, norm, dtype):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        self.weight, self.bias, self.dtype = norm.weight, norm.bias, dtype

    def forward(self, x):
        """(B, c, H, W) -> same shape and layout, in dtype"""
        if x[0].numel() < LARGE:
            return super().forward(x.float()).to(self.dtype)
        mean, variance = statistics(x, self.num_groups)
        scale = self.weight.view(self.num_groups, -1) * (variance + self.eps).rsqrt()       # (B, groups, c / groups)
        shift = torch.addcmul(self.bias.view_as(scale[0]), mean, scale, value=-1)
        scale, shift = (y.view(*x.shape[:2], 1, 1) for y in (scale, shift))
        if torch.compiler.is_compiling():       # which makes one kernel of it, and of what follows
            return torch.addcmul(shift, x, scale).to(self.dtype)
        return torch.addcmul(shift, x, scale, out=torch.empty_like(x, dtype=self.dtype))


def statistics(x, groups):
    """Take mean and biased variance of each group, in float32, all channels at once.  -> two of (B, groups, 1)

    Half precision as sums of numbers and of squares, which need no copy in float32. What squares lose where a mean is
    large beside the deviation, a map in half has lost before.
    """
    if x.dtype == torch.float32:
        variances, means = torch.var_mean(x, dim=(2, 3), correction=0)
        spread, mean = torch.var_mean(means.unflatten(1, (groups, -1)), dim=2, correction=0, keepdim=True)
        return mean, variances.unflatten(1, (groups, -1)).mean(2, keepdim=True) + spread
    numbers = x[0].numel() // groups
    sums, roots = x.sum((2, 3), dtype=torch.float32), torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.float32)
    mean = sums.unflatten(1, (groups, -1)).sum(2, keepdim=True) / numbers
    squares = roots.square().unflatten(1, (groups, -1)).sum(2, keepdim=True) / numbers
    return mean, (squares - mean**2).clamp(min=0)
