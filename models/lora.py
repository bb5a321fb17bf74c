"""Low-rank adaptation: layers that can be bent without being overwritten, and S3Diff's way to bend them by the degradation.

Papers:  LoRA, arXiv 2106.09685: y = W x + s B A x with a narrow A and B, the only trained ones; S3Diff, arXiv 2409.17058.
Weights: the adapters inside s3diff.pkl (S3Diff) and model_12501.pkl, lora_weights_dino_53001.safetensors (GramSR); names are peft's.
Left out: dropout, biases of adapters, rank-stabilised scaling: nobody here uses them.

The networks of unet.py and vae.py are made of this file's Linear and Conv2d. Without an adapter they are torch's layers; with adapters
every one of them is added. C, an argument of every forward, says how: None, or for each adapter a matrix between its A and its B.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support.precision import Exact
from models.support.winograd import conv2d

ALPHA = 8  # trap: peft's default, which both papers' files silently rely on: s = 8 / r, not 1


class LoRA:
    """What Linear and Conv2d have in common.

    C in the methods: {adapter: (B or 1, r, r)} or None, which is the identity for every adapter; an adapter that C does not name is off.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()  # for the public names lora_A.<adapter>.weight
        self.s = {}  # adapter: scale

    def add_adapter(self, name, r, alpha=ALPHA):
        """A new adapter of rank r: A narrows as this layer does, B widens each number for itself. B = 0, so nothing changes yet."""
        self.lora_A[name], self.lora_B[name] = self.pair(r)
        self.s[name] = alpha / r
        nn.init.normal_(self.lora_A[name].weight, std=1 / r)
        nn.init.zeros_(self.lora_B[name].weight)

    def adapters(self, C):
        """-> (A, B, s, matrix or None) of every adapter that is on"""
        return [(A, self.lora_B[name], self.s[name], C and C[name]) for name, A in self.lora_A.items() if C is None or name in C]

    def fuse(self, C=None):
        """The weight with all adapters folded in, for pictures that share C, each (1, r, r).

        A new tensor: the base weight is not touched, so there is nothing to undo.
        """
        W = self.weight.flatten(1)
        for A, B, s, M in self.adapters(C):
            A, B = A.weight.flatten(1), B.weight.flatten(1)
            W = torch.addmm(W, B, A if M is None else M[0].T.to(A) @ A, alpha=s)
        return W.view_as(self.weight)

    def folding_pays(self, pixels, C):
        """Folding costs out x in x k^2 multiplications for each of r, the way beside it (in x k^2 + out) for each of r and every pixel.

        Gradients go the way beside: through a folded weight they would be as large as that weight.
        """
        if torch.is_grad_enabled() or any([len(M) > 1 for M in (C or {}).values()]):
            return False
        return pixels * (self.weight.numel() / len(self.weight) + len(self.weight)) > self.weight.numel()

    def forward(self, x, C=None):
        """(B, ...) -> (B, ...) as the base layer, plus the adapters."""
        if not self.lora_A:
            return self.base(x, self.weight)
        # On a GPU launches cost more than folding; compiled, a size must not decide about the graph.
        always = x.is_cuda or torch.compiler.is_compiling()
        if self.folding_pays(math.inf if always else self.pixels(x), C):
            return self.base(x, self.fuse(C))
        y = self.base(x, self.weight)
        for A, B, s, M in self.adapters(C):
            h = A(x)
            if M is None:
                y = y + s * B(h)  # Eq. S3Diff (1)
            else:
                y = y + s * B(self.mix(h, M.to(h)))  # Eq. S3Diff (3)
        return y


class Linear(LoRA, nn.Linear):
    """torch.nn.Linear that takes adapters.  (B, N, in) -> (B, N, out)"""

    def pair(self, r):
        return nn.Linear(self.in_features, r, bias=False), nn.Linear(r, self.out_features, bias=False)

    def base(self, x, W):
        return F.linear(x, W, self.bias)

    def pixels(self, x):
        return x.numel() // x.shape[-1]

    def mix(self, h, M):
        return h @ M  # h'_r = sum over k of h_k M_kr, as the official code has it: the FIRST index of M meets A


class Conv2d(LoRA, nn.Conv2d):
    """torch.nn.Conv2d that takes adapters: A has this layer's kernel, stride and padding, B is 1x1.  (B, in, H, W) -> (B, out, H', W')"""

    def pair(self, r):
        A = nn.Conv2d(self.in_channels, r, self.kernel_size, self.stride, self.padding, bias=False)
        return A, nn.Conv2d(r, self.out_channels, 1, bias=False)

    def base(self, x, W):
        return conv2d(x, W, self.bias, self.stride, self.padding)

    def pixels(self, x):
        return len(x) * math.prod([-(-side // stride) for side, stride in zip(x.shape[2:], self.stride)])

    def mix(self, h, M):
        return (M.mT @ h.flatten(2)).view_as(h)


class ExactConv2d(Exact, Conv2d):
    """Conv2d at the ends of a network, in float32 always: see precision.py."""


def add_lora(network, targets, name, r, alpha=ALPHA):
    """Give layers of network an adapter, chosen as peft does -> their names.

    targets: a regular expression for whole names, or a list of last parts of names
    """
    if isinstance(targets, str):
        chosen = re.compile(targets).fullmatch
    else:
        def chosen(layer):
            return any(f".{layer}".endswith(f".{target}") for target in targets)

    layers = [layer for layer, m in network.named_modules() if isinstance(m, LoRA) and chosen(layer)]
    for layer in layers:
        network.get_submodule(layer).add_adapter(name, r, alpha)
    return layers


# ----------------------------------------------------------------------------------------------------------------------------------------
# S3Diff: the degradation decides


def kaiming(c_in, c_out, scale=1e-5):
    """A Linear that starts almost at zero, so that C does, about 1e-10 after two of them.

    Trap: B starts at zero too, and B C A has no gradient where two of its factors vanish. conv_in learns at once; the adapters leave
    this saddle only because Adam divides tiny gradients by their own size, which optimizer states in half precision would round away.
    """
    layer = nn.Linear(c_in, c_out)
    nn.init.kaiming_normal_(layer.weight)
    layer.weight.data.mul_(scale)
    nn.init.zeros_(layer.bias)
    return layer


class Modulation(nn.Module):
    """From two degradation scores to a correction matrix C for every block of the VAE's encoder and of the UNet.

    The names are those of s3diff.pkl, less its prefix state_dict_.
    """

    def __init__(self, r_vae=16, r_unet=32, vae_blocks=6, unet_blocks=10, fourier=64, D=64):
        super().__init__()
        self.r = {"vae": r_vae, "unet": r_unet}
        self.w = nn.Parameter(torch.randn(fourier), requires_grad=False)  # frequencies: drawn once, kept in the file
        for network, blocks in (("vae", vae_blocks), ("unet", unet_blocks)):
            r = self.r[network]
            self.add_module(f"{network}_de_mlp", nn.Sequential(kaiming(4 * fourier, 4 * fourier), nn.ReLU()))
            self.add_module(f"{network}_block_mlp", nn.Sequential(kaiming(D, D), nn.ReLU()))
            self.add_module(f"{network}_fuse_mlp", kaiming(4 * fourier + D, r * r))
            self.add_module(f"{network}_block", nn.Embedding(blocks, D))  # block ids: layers of one depth are bent alike, others otherwise

    def matrices(self, network, scores):
        """network: vae or unet; scores: (B, 2) in [0, 1] -> C (B, blocks, r, r); no identity is added to it"""
        angle = 2 * math.pi * scores[..., None] * self.w  # (B, 2, 64)
        d = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)  # Eq. S3Diff (2)
        d = getattr(self, f"{network}_de_mlp")(d)
        e = getattr(self, f"{network}_block_mlp")(getattr(self, f"{network}_block").weight)
        B, n, r = len(d), len(e), self.r[network]
        both = torch.cat([d[:, None].expand(B, n, -1), e.expand(B, n, -1)], dim=-1)
        return getattr(self, f"{network}_fuse_mlp")(both).view(B, n, r, r)  # Eq. S3Diff (4)
