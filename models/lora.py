"""Low-rank adaptation: a layer gets a narrow detour beside its weight; S3Diff's degradation scores steer the detour.

Papers:  LoRA, arXiv 2106.09685: y = W x + s B A x with narrow A and B, the only trained ones; S3Diff, 2409.17058:
         y = W x + s B C A x with a small matrix C that depends on the image.
Weights: the adapters inside s3diff.pkl (S3Diff) and model_12501.pkl, lora_weights_dino_53001.safetensors (GramSR).
Left out: dropout, biases of adapters, rank-stabilised scaling.

But for the time embedding's, all layers of unet.py and vae.py are this file's Linear and Conv2d: torch's layers, plus
any number of adapters, each with a name. Every forward has an argument `adapters`. It says which of them are on, and
what stands between their A and B, a matrix C or the number 1, which is the identity:

    adapters of a layer      {name: C (B or 1, r, r), or 1}
    adapters of a network    {name: C (B or 1, blocks, r, r), or 1}; each block takes its own by `of_block`

An adapter that is not named is off. In equations vectors are columns: W x, C h. In shapes B is the batch size; in
equations it is LoRA's second matrix.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support import fast_lora, winograd
from models.support.precision import Exact

ALPHA = 8  # trap: peft's default, on which both papers' files rely; so s is 8 / r (GramSR's texture: 1)
NO_ADAPTERS = {}  # all are off


def of_block(adapters, i):
    """Take what block i of a network needs.  adapters of a network -> adapters of a layer"""
    return {name: C[:, i] if torch.is_tensor(C) else C for name, C in adapters.items()}


def repeated(adapters, n):
    """Repeat a network's adapters as its batch is repeated n times; a C for all images stays one."""
    def repeat(C):
        one_per_image = torch.is_tensor(C) and len(C) > 1
        return C.repeat(n, 1, 1, 1) if one_per_image else C

    return {name: repeat(C) for name, C in adapters.items()}


def of_image(adapters, b):
    """A network's adapters for image b of a batch alone."""
    def pick(C):
        one_per_image = torch.is_tensor(C) and len(C) > 1
        return C[b : b + 1] if one_per_image else C

    return {name: pick(C) for name, C in adapters.items()}


# ---- layers


class LoRA:
    """Adds adapters to a layer of torch; a mixin, which stands before nn.Linear or nn.Conv2d among the base classes.

    What differs between the two layers is in new_pair, base and apply_C.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()  # for the public names lora_A.<adapter>.weight
        self.s = {}  # name of an adapter: its scale

    def add_adapter(self, name, r, alpha=ALPHA):
        """Add a new adapter of rank r. Its B is 0, so it changes nothing yet."""
        self.lora_A[name], self.lora_B[name] = self.new_pair(r)
        self.s[name] = alpha / r
        nn.init.normal_(self.lora_A[name].weight, std=1 / r)  # as peft's "gaussian" start
        nn.init.zeros_(self.lora_B[name].weight)

    def active(self, adapters):
        """List the names of this layer's adapters that are on."""
        return [name for name in self.lora_A if name in adapters]

    def forward(self, x, adapters=NO_ADAPTERS):
        """Compute W x, plus a detour s B C A x for each adapter that is on.

        x: (B, ...) as the base layer takes it; adapters: of a layer, see above -> (B, ...) as the base layer
        """
        # Fast: (W + s B C A) x, with the matrices multiplied first, is the same; in use it often takes fewer products.
        if fast_lora.folding_pays(self, x, adapters):
            return self.base(x, fast_lora.fold(self, adapters))

        y = self.base(x, self.weight)
        for name in self.active(adapters):
            A, B, s, C = self.lora_A[name], self.lora_B[name], self.s[name], adapters[name]
            if torch.is_tensor(C):
                y = y + s * B(self.apply_C(C, A(x)))  # Eq. S3Diff (3)
            else:  # 1, the identity
                y = y + s * B(A(x))  # Eq. S3Diff (1)
        return y


class Linear(LoRA, nn.Linear):
    """Maps tokens as torch.nn.Linear does, with adapters.  (B, N, in) -> (B, N, out)"""

    def new_pair(self, r):
        """Make A and B of a new adapter."""
        return nn.Linear(self.in_features, r, bias=False), nn.Linear(r, self.out_features, bias=False)

    def base(self, x, W):
        """Compute W x plus the bias."""
        return F.linear(x, W, self.bias)

    def apply_C(self, C, h):
        """Multiply each token by C.  C: (B or 1, r, r); h: (B, N, r) -> like h"""
        # Tokens are the rows of h, while C multiplies columns. As (C h)^T = h^T C^T, rows are multiplied by C^T.
        return h @ C.mT.to(h)


class Conv2d(LoRA, nn.Conv2d):
    """Convolves as torch.nn.Conv2d, with adapters: A has its kernel, B is 1x1.  (B, in, H, W) -> (B, out, H', W')"""

    def new_pair(self, r):
        """Make A and B of a new adapter."""
        A = nn.Conv2d(self.in_channels, r, self.kernel_size, self.stride, self.padding, bias=False)
        return A, nn.Conv2d(r, self.out_channels, 1, bias=False)

    def base(self, x, W):
        """Compute W x plus the bias, W as a convolution."""
        return winograd.conv2d(x, W, self.bias, self.stride, self.padding)  # F.conv2d, or the same faster

    def apply_C(self, C, h):
        """Multiply each pixel by C.  C: (B or 1, r, r); h: (B, r, H', W') -> like h"""
        pixels = h.flatten(2)  # (B, r, H'*W'): each is a column
        return (C.to(h) @ pixels).view_as(h)


class ExactConv2d(Exact, Conv2d):
    """Convolves at the ends of a network, and stays in float32: see precision.py."""


def add_lora(network, targets, name, r, alpha=ALPHA):
    """Give a new adapter to those layers of network that peft would choose.

    targets: a regular expression for whole names, or a list of last parts of names
    """
    def is_chosen(layer):
        if isinstance(targets, str):
            return re.fullmatch(targets, layer)
        # the dots keep parts whole: "conv" chooses "conv" and "down.conv", but not "my_conv"
        return any(f".{layer}".endswith(f".{target}") for target in targets)

    for layer, module in list(network.named_modules()):     # a list, as new modules are added on the way
        if isinstance(module, LoRA) and is_chosen(layer):
            module.add_adapter(name, r, alpha)


def adapted_layers(network, name):
    """List the names of the layers that have the adapter of that name."""
    return [layer for layer, m in network.named_modules() if isinstance(m, LoRA) and name in m.lora_A]


# ---- S3Diff: the degradation decides


def almost_zero(c_in, c_out):
    """Make a Linear with results of about 1e-5, so that C, made by two in a row, starts at about 1e-10.

    Trap: this starts near a saddle. The detour is a product of three, B C A, and the gradient of each factor contains
    the two others. B starts at 0, so A and C get no gradient at first, and B one of about 1e-10. They leave the saddle
    because Adam divides a gradient by its size plus 1e-8; then B and C feed each other. In float16, whose smallest
    number is 6e-8, these first gradients would round to 0.
    """
    layer = nn.Linear(c_in, c_out)
    nn.init.kaiming_normal_(layer.weight)
    layer.weight.data.mul_(1e-5)
    nn.init.zeros_(layer.bias)
    return layer


class Modulation(nn.Module):
    """Makes, of two degradation scores, a matrix C for every block of the VAE's encoder and of the UNet.

    vae_blocks: four levels, the middle, both ends; unet_blocks: four down, the middle, four up, the last layer
    fourier: F, frequencies of `w`; D: width of a block's vector

    Each of the two networks has layers of its own, in attributes with the public names vae_de_mlp, unet_de_mlp, ...
    """

    def __init__(self, r_vae=16, r_unet=32, vae_blocks=6, unet_blocks=10, fourier=64, D=64):
        super().__init__()
        self.w = nn.Parameter(torch.randn(fourier), requires_grad=False)  # drawn once, kept in the file
        F4 = 4 * fourier  # a sine and a cosine of each frequency, for each of two scores
        for network, r, blocks in (("vae", r_vae, vae_blocks), ("unet", r_unet, unet_blocks)):
            layers = {
                "de_mlp": nn.Sequential(almost_zero(F4, F4), nn.ReLU()),    # of the scores
                "block_mlp": nn.Sequential(almost_zero(D, D), nn.ReLU()),   # of a block's vector
                "fuse_mlp": almost_zero(F4 + D, r * r),                     # joins both
                "block": nn.Embedding(blocks, D),                           # the vectors
            }
            for name, layer in layers.items():
                self.add_module(f"{network}_{name}", layer)

    def matrices(self, network, scores):
        """Make the matrix C_i of every block i.

        network: vae or unet; scores: (B, 2) in [0, 1] -> (B, blocks, r, r)
        """
        names = ("de_mlp", "block_mlp", "fuse_mlp", "block")
        de_mlp, block_mlp, fuse_mlp, block = [getattr(self, f"{network}_{name}") for name in names]
        B, blocks = len(scores), len(block.weight)

        angle = 2 * math.pi * scores[:, :, None] * self.w  # (B, 2, F)
        fourier = torch.cat([angle.sin(), angle.cos()], dim=-1)  # Eq. S3Diff (2)

        d = de_mlp(fourier.flatten(1))  # (B, 4F)
        e = block_mlp(block.weight)  # (blocks, D)
        d, e = d[:, None].expand(B, blocks, -1), e.expand(B, blocks, -1)
        entries = fuse_mlp(torch.cat([d, e], dim=-1))  # Eq. S3Diff (4)
        r = math.isqrt(entries.shape[-1])
        # trap: the public weights are for vectors that are rows, h M. For columns, C h, the matrix is C = M^T.
        M = entries.unflatten(-1, (r, r))
        return M.mT
