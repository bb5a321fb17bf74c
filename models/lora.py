"""Low-rank adaptation: a layer gets a narrow detour beside its weight; S3Diff's degradation scores steer the detour.

Papers:  LoRA, arXiv 2106.09685: y = W x + s B A x with narrow A and B, the only trained ones; S3Diff, 2409.17058:
         y = W x + s B C A x with a small matrix C that depends on the image.
Weights: the adapters inside s3diff.pkl (S3Diff) and model_12501.pkl, lora_weights_dino_53001.safetensors (GramSR).
Left out: dropout, biases of adapters, rank-stabilised scaling.

unet.py and vae.py are made of this file's Linear and Conv2d: torch's layers plus any number of named adapters. C, an
argument of every forward, says which adapters are on and what stands between their A and B:

    of a layer      {adapter: matrices (B or 1, r, r), or the number 1, which is the identity}
    of a network    {adapter: matrices (B or 1, blocks, r, r), or the number 1}; a block takes its own by `of_block`

An adapter that C does not name is off.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support import fast_lora, winograd
from models.support.precision import Exact

ALPHA = 8  # trap: peft's default, on which both papers' files rely: s = 8 / r, not 1
NO_ADAPTERS = {}  # C where none is on


def of_block(C, i):
    """A network's C -> the C of layers in its block i"""
    return {name: C_all[:, i] if torch.is_tensor(C_all) else C_all for name, C_all in C.items()}


def repeated(C, n):
    """A network's C for a batch that is repeated n times; one matrix for all images stays one."""
    def repeat(C_all):
        of_each_image = torch.is_tensor(C_all) and len(C_all) > 1
        return C_all.repeat(n, 1, 1, 1) if of_each_image else C_all

    return {name: repeat(C_all) for name, C_all in C.items()}


# ---- layers


class LoRA:
    """What both layers have in common."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()  # for the public names lora_A.<adapter>.weight
        self.s = {}  # adapter: scale

    def add_adapter(self, name, r, alpha=ALPHA):
        """A new adapter of rank r. B = 0, so it changes nothing yet."""
        self.lora_A[name], self.lora_B[name] = self.pair(r)
        self.s[name] = alpha / r
        nn.init.normal_(self.lora_A[name].weight, std=1 / r)
        nn.init.zeros_(self.lora_B[name].weight)

    def on(self, C):
        """Names of this layer's adapters that C turns on."""
        return [name for name in self.lora_A if name in C]

    def forward(self, x, C=NO_ADAPTERS):
        """y = W x + s B C A x, summed over the adapters that are on.  (B, ...) -> (B, ...) as the base layer"""
        if fast_lora.folding_pays(self, x, C):
            return self.base(x, fast_lora.fold(self, C))
        y = self.base(x, self.weight)
        for name in self.on(C):
            A, B, s, C_i = self.lora_A[name], self.lora_B[name], self.s[name], C[name]
            if torch.is_tensor(C_i):
                y = y + s * B(self.times(C_i, A(x)))  # Eq. S3Diff (3)
            else:
                y = y + s * B(A(x))  # Eq. S3Diff (1)
        return y


class Linear(LoRA, nn.Linear):
    """torch.nn.Linear that takes adapters.  (B, N, in) -> (B, N, out)"""

    def pair(self, r):
        """A and B of a new adapter."""
        return nn.Linear(self.in_features, r, bias=False), nn.Linear(r, self.out_features, bias=False)

    def base(self, x, W):
        """W x and the bias"""
        return F.linear(x, W, self.bias)

    def times(self, C, h):
        """C h for each token.  C: (B or 1, r, r); h: (B, N, r) -> like h"""
        return h @ C.mT.to(h)

    def positions(self, x):
        """To how many vectors W is applied."""
        return x.numel() // x.shape[-1]


class Conv2d(LoRA, nn.Conv2d):
    """torch.nn.Conv2d that takes adapters: A has this layer's kernel, B is 1x1.  (B, in, H, W) -> (B, out, H', W')"""

    def pair(self, r):
        """A and B of a new adapter."""
        A = nn.Conv2d(self.in_channels, r, self.kernel_size, self.stride, self.padding, bias=False)
        return A, nn.Conv2d(r, self.out_channels, 1, bias=False)

    def base(self, x, W):
        """W x and the bias"""
        return winograd.conv2d(x, W, self.bias, self.stride, self.padding)  # F.conv2d, or the same faster

    def times(self, C, h):
        """C h for each pixel.  C: (B or 1, r, r); h: (B, r, H', W') -> like h"""
        return (C.to(h) @ h.flatten(2)).view_as(h)

    def positions(self, x):
        """To how many vectors W is applied; for any padding that keeps H and W, but for the stride."""
        rows, columns = (math.ceil(side / stride) for side, stride in zip(x.shape[2:], self.stride))
        return len(x) * rows * columns


class ExactConv2d(Exact, Conv2d):
    """Conv2d at the ends of a network, in float32 always: see precision.py."""


def add_lora(network, targets, name, r, alpha=ALPHA):
    """Give layers of network a new adapter, chosen as peft does -> their names.

    targets: a regular expression for whole names, or a list of last parts of names
    """
    def is_chosen(layer):
        if isinstance(targets, str):
            return re.fullmatch(targets, layer)
        return any(f".{layer}".endswith(f".{target}") for target in targets)

    chosen = [layer for layer, m in network.named_modules() if isinstance(m, LoRA) and is_chosen(layer)]
    for layer in chosen:
        network.get_submodule(layer).add_adapter(name, r, alpha)
    return chosen


def adapted_layers(network, name):
    """Names of the layers that have the adapter of that name."""
    return [layer for layer, m in network.named_modules() if isinstance(m, LoRA) and name in m.lora_A]


# ---- S3Diff: the degradation decides


def almost_zero(c_in, c_out):
    """A Linear that starts almost at zero, so that C does, about 1e-10 after two of them.

    Trap: B starts at zero, too, and B C A has no gradient where two factors vanish. The adapters leave this saddle
    because Adam divides a gradient by its size plus 1e-8, and B and C then feed each other; half precision would round
    their first gradients away.
    """
    layer = nn.Linear(c_in, c_out)
    nn.init.kaiming_normal_(layer.weight)
    layer.weight.data.mul_(1e-5)
    nn.init.zeros_(layer.bias)
    return layer


class Modulation(nn.Module):
    """From two degradation scores to a matrix C for every block of the VAE's encoder and of the UNet."""

    def __init__(self, r_vae=16, r_unet=32, vae_blocks=6, unet_blocks=10, fourier=64, D=64):
        super().__init__()
        self.w = nn.Parameter(torch.randn(fourier), requires_grad=False)  # frequencies: drawn once, kept in the file
        self.r = {"vae": r_vae, "unet": r_unet}

        def parts(r, blocks):
            """MLPs of scores and of block, the layer that joins them, and a vector for each block id."""
            de_mlp = nn.Sequential(almost_zero(4 * fourier, 4 * fourier), nn.ReLU())
            block_mlp = nn.Sequential(almost_zero(D, D), nn.ReLU())
            return de_mlp, block_mlp, almost_zero(4 * fourier + D, r * r), nn.Embedding(blocks, D)

        self.vae_de_mlp, self.vae_block_mlp, self.vae_fuse_mlp, self.vae_block = parts(r_vae, vae_blocks)
        self.unet_de_mlp, self.unet_block_mlp, self.unet_fuse_mlp, self.unet_block = parts(r_unet, unet_blocks)

    def matrices(self, network, scores):
        """The matrix C_i of every block i.  network: vae or unet; scores: (B, 2) in [0, 1] -> (B, blocks, r, r)"""
        if network == "vae":
            de_mlp, block_mlp, fuse_mlp, block = self.vae_de_mlp, self.vae_block_mlp, self.vae_fuse_mlp, self.vae_block
        else:
            de_mlp, block_mlp, fuse_mlp = self.unet_de_mlp, self.unet_block_mlp, self.unet_fuse_mlp
            block = self.unet_block
        B, blocks, r = len(scores), len(block.weight), self.r[network]

        angle = 2 * math.pi * scores[:, :, None] * self.w  # (B, 2, F), F frequencies
        fourier = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)  # Eq. S3Diff (2)

        d = de_mlp(fourier)[:, None].expand(B, blocks, -1)  # (B, blocks, 4F)
        e = block_mlp(block.weight)[None].expand(B, blocks, -1)  # (B, blocks, D)
        C = fuse_mlp(torch.cat([d, e], dim=-1))  # Eq. S3Diff (4)
        return C.unflatten(-1, (r, r)).mT  # trap: officially rows and columns are the other way round
