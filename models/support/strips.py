"""Large feature maps in horizontal strips: the same numbers in a fraction of the memory.

An autoencoder run on tiles forgets what lies beyond a tile's edge and normalises each tile by itself: seams. Here every
layer is cut instead. A 3x3 convolution needs one more row above and below its strip; a group norm takes its statistics
from the whole map first; attention, which sees every cell, is cut by queries. So the result is that of the whole
image up to rounding, with two feature maps in memory at a time.

vae.py and qwen_vae.py choose strips by `InStrips.run`, layer by layer: for maps beyond 512x512 pixels, on a GPU beyond
1024x1024, and never where gradients are recorded.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LIMIT = 512 * 512   # pixels of a map that is computed whole, four times that on a GPU; a strip has a quarter of them
QUERIES = 4096      # up to which attention is computed at once, and then at a time


# ---- where strips are chosen

def plain(pixels, cuda=False):
    """Whether a map of so many pixels is computed whole."""
    return pixels <= LIMIT * (4 if cuda else 1) or torch.is_grad_enabled()


def needed(x, rate=1):
    """Whether a layer with map x: (B, C, H, W) is computed in strips; rate: rows of its result per row of x."""
    pixels = x.shape[2] * x.shape[3]
    return not plain(pixels * max(1, rate**2), x.is_cuda)


class Checkpointing:
    """For training: what network.run(part, ...) found is computed again in backward, if `checkpointing`."""

    checkpointing = False

    def run(self, part, *args):
        again = self.checkpointing and torch.is_grad_enabled()
        return checkpoint(part, *args, use_reentrant=False) if again else part(*args)


class InStrips(Checkpointing):
    """For autoencoders: self.run(layer, x, C) is layer(x, C), in strips where the map is large.

    layer: a resnet with norm1, conv1, norm2, conv2 and shortcut, or a convolution, that may change the size by `rate`
    Trap: the map that a network has in hand while it runs a layer must be that layer's input and no older one, or three
    maps are in memory. Hence one loop over all layers, and no forward of a whole level.
    """

    def run(self, layer, x, *C):
        rate = getattr(layer, "rate", 1)
        if not needed(x, rate):
            return super().run(layer, x, *C)
        if hasattr(layer, "norm1"):
            return resnet_block(layer, x, *C)
        return in_strips(lambda strip: layer(strip, *C), x, rate=rate)


# ---- layers in strips

def rows_at_a_time(width, cuda=False):
    return max(1, LIMIT // (1 if cuda else 4) // width)


def in_strips(f, *maps, rate=1, into=None):
    """f(*maps), a strip at a time.

    f: where a row of the result depends on the row of the maps at its height and the next ones above and below; it
       pads at its borders by itself
    maps: (B, C, H, W), C may differ; rate: rows of the result per row of the maps: 1, 2, 0.5
    into: a map to write the result in, if it has its type; may be one of maps that nobody needs afterwards
    -> (B, C', H * rate, W * rate)
    """
    H, W = maps[0].shape[2:]
    height = int(H * rate)
    rows = rows_at_a_time(int(W * max(rate, 1 / rate)), maps[0].is_cuda)    # of the result, in a strip
    halo = 2 if rate == 0.5 else 1      # rows of the maps around a strip's; two, so that strides of two start even
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        top, bottom = max(int(start / rate) - halo, 0), min(int(stop / rate) + halo, H)
        strip = f(*(x[:, :, top:bottom] for x in maps))
        if start == 0:
            fits = into is not None and into.dtype == strip.dtype   # not half where a float32 stream goes on
            out = into if fits else strip.new_empty(*strip.shape[:2], height, strip.shape[3])
        else:
            # written only now: this strip has read, as its halo, rows that the one before overwrites
            out[:, :, start - rows : start] = finished
        finished = strip[:, :, int(start - top * rate) : int(stop - top * rate)]    # less the halo
    out[:, :, start:] = finished
    return out


def statistics(x, groups):
    """Mean and biased variance of each group of channels over a map, in float32.  (B, C, H, W) -> two of (B, groups)"""
    parts = x.split(rows_at_a_time(x.shape[3], x.is_cuda), dim=2)
    shares = torch.tensor([len(y[0, 0]) / len(x[0, 0]) for y in parts], device="cpu")
    shares = shares.view(-1, 1, 1).to(x.device, non_blocking=True)
    found = (torch.var_mean(y.float().unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0) for y in parts)
    variances, means = map(torch.stack, zip(*found))    # (strips, B, groups)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(0)    # mean of variances plus variance of means


def norm_of_strips(norm, x):
    """norm as a function of strips of x: a group norm has the statistics of all of x; any other sees single pixels."""
    if not isinstance(norm, nn.GroupNorm):
        return norm
    mean, variance = statistics(x, norm.num_groups)
    size = len(norm.weight) // norm.num_groups
    mean, variance = mean.repeat_interleave(size, dim=1), variance.repeat_interleave(size, dim=1)   # (B, C)
    scale = norm.weight.float() * (variance + norm.eps).rsqrt()
    shift = norm.bias.float() - mean * scale
    return lambda strip: (strip * scale[..., None, None] + shift[..., None, None]).to(strip.dtype)


def norm_silu_conv(norm, conv, x, *C, into=None):
    """conv(silu(norm(x)), C) in strips.  (B, C, H, W) -> (B, C', H, W)"""
    norm = norm_of_strips(norm, x)
    return in_strips(lambda strip: conv(F.silu(norm(strip)), *C), x, into=into)


def resnet_block(block, x, *C):
    """block(x, C) in strips, with two maps in memory, x and h.  (B, c_in, H, W) -> (B, c_out, H, W)"""
    h = norm_silu_conv(block.norm1, block.conv1, x, *C)
    h = norm_silu_conv(block.norm2, block.conv2, h, *C, into=h)
    return in_strips(lambda h, x: h + block.shortcut(x, *C), h, x, into=h)


# ---- attention by queries

def attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v, without the matrix of all pairs at once.  Three of (B, N, D) -> (B, N, D)"""
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))       # one head
    if q.shape[2] <= QUERIES and not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)
    q, k, v = (x.contiguous() for x in (q, k, v))       # PyTorch's frugal kernels take no other layout
    parts = [F.scaled_dot_product_attention(some, k, v) for some in q.split(QUERIES, dim=2)]
    return torch.cat(parts, dim=2).squeeze(1)
