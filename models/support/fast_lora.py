"""What adapters compute, in fewer products: folded into the weights, for one call or for good.

All of it is for use alone: training takes the plain way (lora.py), which gives the same up to rounding.
"""

import math

import torch


def folding_pays(layer, x, adapters):
    """Decide whether (W + s B C A) x costs less than W x + s B C A x.  layer, x, adapters: of lora.LoRA.forward"""
    names = layer.active(adapters)
    if not names or torch.is_grad_enabled():
        return False
    for name in names:
        if torch.is_tensor(adapters[name]) and len(adapters[name]) > 1:
            return False        # each image has its own C, so each would need its own weight
    if x.is_cuda or torch.compiler.is_compiling():
        return True             # a GPU waits for launches, not for products; compiled, a size must not decide
    c_out, c_in = layer.weight.flatten(1).shape         # a convolution's c_in counts the kernel's pixels, too
    r = sum(len(layer.lora_A[name].weight) for name in names)
    detour = positions(layer, x) * r * (c_in + c_out)   # products of A and B with every vector
    folding = c_in * r * c_out                          # products of B with A
    return detour > folding


def positions(layer, x):
    """Count the vectors that W is applied to: tokens, or pixels of the result.

    x: (B, N, in), or (B, in, H, W) with a padding that keeps H and W, but for the stride
    """
    if layer.weight.ndim == 2:
        return x.numel() // x.shape[-1]
    rows, columns = (math.ceil(side / stride) for side, stride in zip(x.shape[2:], layer.stride))
    return len(x) * rows * columns


def fold(layer, adapters):
    """Add to W the s B C A of every adapter that is on.  adapters: with a C for all images -> a weight like W"""
    W = rows(layer.weight)                              # (out, in), of a convolution with the kernel's pixels
    for name in layer.active(adapters):
        A = rows(layer.lora_A[name].weight)             # (r, in)
        B = layer.lora_B[name].weight.flatten(1)        # (out, r)
        C = adapters[name]                              # (1, r, r), or 1
        CA = C[0].to(A) @ A if torch.is_tensor(C) else A
        W = torch.addmm(W, B, CA, alpha=layer.s[name])  # W + s B C A, of Eq. S3Diff (1) and (3)
    return W.as_strided(layer.weight.shape, layer.weight.stride())


def rows(weight):
    """View a weight as a matrix of its outputs' rows; a convolution's may be channels_last, as a GPU has it."""
    if weight.is_contiguous():
        return weight.flatten(1)
    return weight.movedim(1, -1).flatten(1)


@torch.no_grad()
def merge(network):
    """Fold all adapters of a network into its weights for good, each with C = 1, and remove them."""
    for layer in network.modules():
        if hasattr(layer, "lora_A"):
            layer.weight.data = fold(layer, dict.fromkeys(layer.lora_A, 1))
            layer.lora_A.clear()
            layer.lora_B.clear()
