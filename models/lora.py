"""Low-rank adaptation: layers that are bent without being overwritten, and S3Diff's way to let the degradation bend.

Papers:  LoRA, arXiv 2106.09685: y = W x + s B A x with narrow A and B, the only trained ones; S3Diff, 2409.17058.
Weights: the adapters inside s3diff.pkl (S3Diff) and model_12501.pkl, lora_weights_dino_53001.safetensors (GramSR).
Left out: dropout, biases of adapters, rank-stabilised scaling.

unet.py and vae.py are made of this file's Linear and Conv2d: torch's layers plus adapters. C, an argument of every
forward, is S3Diff's matrix between A and B, for each adapter (B or 1, r, r); None is the identity for all, and an
adapter that C does not name is off. Channels are c wherever there is a C.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support.precision import Exact
from models.support.winograd import conv2d

ALPHA = 8  # trap: peft's default, on which both papers' files rely: s = 8 / r, not 1


class LoRA:
    """What both layers have in common.  C: {adapter: (B or 1, r, r)} or None"""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()  # for the public names lora_A.<adapter>.weight
        self.s = {}  # adapter: scale

    def add_adapter(self, name, r, alpha=ALPHA):
        """A new adapter of rank r. B = 0, so nothing changes yet."""
        self.lora_A[name], self.lora_B[name] = self.pair(r)
        self.s[name] = alpha / r
        nn.init.normal_(self.lora_A[name].weight, std=1 / r)
        nn.init.zeros_(self.lora_B[name].weight)

    def adapters(self, C):
        """-> (A, B, s, the paper's C or None) of every adapter that is on"""
        return [(A, self.lora_B[name], self.s[name], C and C[name].mT)  # kept transposed, as officially
                for name, A in self.lora_A.items() if C is None or name in C]

    def forward(self, x, C=None):
        """y = W x + s B C A x, summed over adapters.  (B, ...) -> (B, ...) as the base layer

        In training as it stands here; in use mostly folded into one weight, which costs less.
        """
        # On a GPU launches cost more than folding; compiled, a size must not decide about the graph.
        always = x.is_cuda or torch.compiler.is_compiling()
        if self.lora_A and self.folding_pays(math.inf if always else self.pixels(x), C):
            return self.base(x, self.fuse(C))
        y = self.base(x, self.weight)
        for A, B, s, C_i in self.adapters(C):
            if C_i is None:
                y = y + s * B(A(x))  # Eq. S3Diff (1)
            else:
                y = y + s * B(self.mix(C_i, A(x)))  # Eq. S3Diff (3)
        return y

    def fuse(self, C=None):
        """The same folded into one weight, W + s B C A, for pictures that share C; a new tensor."""
        W = self.weight.flatten(1)
        for A, B, s, C_i in self.adapters(C):
            A, B = A.weight.flatten(1), B.weight.flatten(1)
            W = torch.addmm(W, B, A if C_i is None else C_i[0].to(A) @ A, alpha=s)
        return W.view_as(self.weight)

    def folding_pays(self, pixels, C):
        """Folding takes r out in k^2 products, the way beside r (in k^2 + out) a pixel; gradients go beside."""
        if torch.is_grad_enabled() or any([len(M) > 1 for M in (C or {}).values()]):
            return False
        return pixels * (self.weight.numel() / len(self.weight) + len(self.weight)) > self.weight.numel()


class Linear(LoRA, nn.Linear):
    """torch.nn.Linear that takes adapters.  (B, N, in) -> (B, N, out)"""

    def pair(self, r):
        return nn.Linear(self.in_features, r, bias=False), nn.Linear(r, self.out_features, bias=False)

    def base(self, x, W):
        return F.linear(x, W, self.bias)

    def pixels(self, x):
        return x.numel() // x.shape[-1]

    def mix(self, C, h):
        return h @ C.mT.to(h)  # C h for each token


class Conv2d(LoRA, nn.Conv2d):
    """torch.nn.Conv2d that takes adapters: A has this layer's kernel, B is 1x1.  (B, in, H, W) -> (B, out, H', W')"""

    def pair(self, r):
        A = nn.Conv2d(self.in_channels, r, self.kernel_size, self.stride, self.padding, bias=False)
        return A, nn.Conv2d(r, self.out_channels, 1, bias=False)

    def base(self, x, W):
        return conv2d(x, W, self.bias, self.stride, self.padding)

    def pixels(self, x):
        return len(x) * math.prod([-(-side // stride) for side, stride in zip(x.shape[2:], self.stride)])

    def mix(self, C, h):
        return (C.to(h) @ h.flatten(2)).view_as(h)  # for each pixel


class ExactConv2d(Exact, Conv2d):
    """Conv2d at the ends of a network, in float32 always: see precision.py."""


def add_lora(network, targets, name, r, alpha=ALPHA):
    """Give layers of network an adapter, chosen as peft does -> their names.

    targets: a regular expression for whole names, or a list of last parts of names
    """
    def chosen(layer):
        if isinstance(targets, str):
            return re.fullmatch(targets, layer)
        return any(f".{layer}".endswith(f".{target}") for target in targets)

    layers = [layer for layer, m in network.named_modules() if isinstance(m, LoRA) and chosen(layer)]
    for layer in layers:
        network.get_submodule(layer).add_adapter(name, r, alpha)
    return layers


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

        def parts(r, blocks):
            """MLPs of scores and of block, the layer that joins them, and a vector e for each block id."""
            de_mlp = nn.Sequential(almost_zero(4 * fourier, 4 * fourier), nn.ReLU())
            block_mlp = nn.Sequential(almost_zero(D, D), nn.ReLU())
            return de_mlp, block_mlp, almost_zero(4 * fourier + D, r * r), nn.Embedding(blocks, D)

        self.vae_de_mlp, self.vae_block_mlp, self.vae_fuse_mlp, self.vae_block = parts(r_vae, vae_blocks)
        self.unet_de_mlp, self.unet_block_mlp, self.unet_fuse_mlp, self.unet_block = parts(r_unet, unet_blocks)

    def matrices(self, network, scores):
        """network: vae or unet; scores: (B, 2) in [0, 1] -> C (B, blocks, r, r)"""
        de_mlp, block_mlp, fuse_mlp, block = (getattr(self, f"{network}_{part}")
                                              for part in ("de_mlp", "block_mlp", "fuse_mlp", "block"))
        angle = 2 * math.pi * scores[..., None] * self.w  # (B, 2, 64)
        d = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)  # Eq. S3Diff (2)
        d, e = de_mlp(d), block_mlp(block.weight)
        d, e = d[:, None].expand(-1, len(e), -1), e.expand(len(d), -1, -1)
        C = fuse_mlp(torch.cat([d, e], dim=-1))  # Eq. S3Diff (4)
        return C.unflatten(-1, (math.isqrt(C.shape[-1]), -1))
