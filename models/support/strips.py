"""Large feature maps in horizontal strips: the same numbers in a fraction of the memory.

An autoencoder run on tiles forgets what lies beyond a tile's edge and normalises each tile by itself: seams. Here every
layer is cut instead. A 3x3 convolution needs one more row above and below its strip; a group norm takes its statistics
from the whole map first; attention, which sees every cell, is cut by queries. So the result is that of the whole
picture up to rounding, with two feature maps in memory at a time.

Plain, as if this file did not exist: maps of up to 512x512 pixels, on a GPU 1024x1024; and whatever records gradients.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LIMIT = 512 * 512   # pixels of a map that is computed whole, four times that on a GPU; a strip has a quarter of them
QUERIES = 4096      # up to which attention is computed at once, and then at a time


def plain(pixels, cuda=False):
    return pixels <= LIMIT * (4 if cuda else 1) or torch.is_grad_enabled()


def rows_at_a_time(width, cuda=False):
    return max(1, LIMIT // (1 if cuda else 4) // width)


class Checkpointing:
    """For training: what network.run(part, ...) found is computed again in backward, if `checkpointing`."""

    checkpointing = False

    def run(self, part, *args):
        again = self.checkpointing and torch.is_grad_enabled()
        return checkpoint(part, *args, use_reentrant=False) if again else part(*args)


def in_strips(f, *maps, rate=1, halo=0, into=None):
    """f(*maps), a strip at a time if that is large.

    f: where a row of the result depends on the row of the maps at its height and the next ones above and below, or
       `halo` of them (then strips begin at multiples of it); it pads at its borders by itself
    maps: (B, C, H, W), C may differ; rate: rows of the result per row of the maps: 1, 2, 0.5
    into: a map to write the result in, if it has its type; may be one of maps that nobody needs afterwards
    -> (B, C', H * rate, W * rate)
    """
    H, W = maps[0].shape[2:]
    if plain(H * W * max(1, rate**2), maps[0].is_cuda):
        return f(*maps)
    height, rows = int(H * rate), rows_at_a_time(int(W * max(rate, 1 / rate)), maps[0].is_cuda)
    rows = max(rows // halo, 1) * halo if halo else rows
    halo = halo or max(1, int(1 / rate))    # rows of the maps around a strip's; even where every second one is a centre
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        top, bottom = max(int(start / rate) - halo, 0), min(int(stop / rate) + halo, H)
        strip = f(*(x[:, :, top:bottom] for x in maps))
        if start == 0:
            fits = into is not None and into.dtype == strip.dtype   # not half where a float32 stream goes on
            out = into if fits else strip.new_empty(*strip.shape[:2], height, strip.shape[3])
        else:
            out[:, :, start - rows : start] = finished      # its successor has seen what it may overwrite
        finished = strip[:, :, int(start - top * rate) : int(stop - top * rate)]    # less the halo
    out[:, :, start:] = finished
    return out


def statistics(x, groups):
    """Mean and biased variance of each group of channels over a map, in float32.  (B, C, H, W) -> two of (B, groups)"""
    strips = x.split(rows_at_a_time(x.shape[3], x.is_cuda), dim=2)
    shares = torch.tensor([len(y[0, 0]) / len(x[0, 0]) for y in strips]).view(-1, 1, 1).to(x.device, non_blocking=True)
    found = (torch.var_mean(y.float().unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0) for y in strips)
    variances, means = map(torch.stack, zip(*found))
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(0)    # mean of variances plus variance of means


def fixed(norm, x):
    """norm as a function of strips of x: a group norm has the statistics of all of x; any other sees single pixels."""
    if not isinstance(norm, nn.GroupNorm) or plain(x.shape[2] * x.shape[3], x.is_cuda):
        return norm
    found = statistics(x, norm.num_groups)
    mean, variance = (s.repeat_interleave(len(norm.weight) // norm.num_groups, dim=1) for s in found)
    scale = norm.weight.float() * (variance + norm.eps).rsqrt()
    shift = norm.bias.float() - mean * scale
    return lambda strip: (strip * scale[..., None, None] + shift[..., None, None]).to(strip.dtype)


def norm_silu_conv(norm, conv, x, into=None):
    """conv(silu(norm(x))), the step these networks are made of.  (B, C, H, W) -> (B, C', H, W)"""
    norm = fixed(norm, x)
    return in_strips(lambda strip: conv(F.silu(norm(strip))), x, into=into)


def attention(q, k, v):
    """Attention of all tokens to all, which never holds all their pairs.  Three of (B, nh, N, hd) -> (B, nh, N, hd)"""
    if q.shape[2] <= QUERIES and not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (x.contiguous() for x in (q, k, v))       # PyTorch's frugal kernels take no other layout
    return torch.cat([F.scaled_dot_product_attention(some, k, v) for some in q.split(QUERIES, dim=2)], dim=2)
