"""Large feature maps in horizontal strips: the same numbers in a fraction of the memory.

An autoencoder run on tiles forgets what lies beyond a tile's edge and normalises each tile by itself: seams. Here the
picture stays whole and every layer is cut instead. A 3x3 convolution needs one more row above and below its strip; a
group norm takes its statistics from the whole map first; attention, which sees every cell, is cut by queries. So the
result is that of the whole picture up to rounding, with two feature maps in memory at a time.

Plain, as if this file did not exist: maps of up to 512x512 pixels, on a GPU 1024x1024; and whatever records gradients.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LIMIT = 512 * 512   # pixels of a map that is computed whole, four times that on a GPU; a strip has a quarter of them
QUERIES = 4096      # up to which attention is computed at once, and then at a time


def limit(cuda):
    return LIMIT * (4 if cuda else 1)


def plain(pixels, cuda=False):
    return pixels <= limit(cuda) or torch.is_grad_enabled()


def rows_at_a_time(width, cuda=False):
    return max(1, limit(cuda) // 4 // width)


class Checkpointing:
    """For training: what network.run(part, ...) found is computed again in backward, where `checkpointing` is on."""

    checkpointing = False

    def run(self, part, *args):
        again = self.checkpointing and torch.is_grad_enabled()
        return checkpoint(part, *args, use_reentrant=False) if again else part(*args)


def in_strips(f, *maps, rate=1, into=None):
    """f(*maps), a strip at a time if that is large; for each tile where maps are lists of tiles.

    f: where a row of the result depends on the row of the maps at its height and the next ones above and below; it
       pads at its borders by itself
    maps: (B, C, H, W), C may differ; rate: rows of the result per row of the maps: 1, 2, 0.5
    into: a map to write the result in, if it has its type; may be one of maps that nobody needs afterwards
    -> (B, C', H * rate, W * rate)
    """
    if isinstance(maps[0], list):
        return [f(*tiles) for tiles in zip(*maps)]
    H, W = maps[0].shape[2:]
    if plain(H * W * max(1, rate**2), maps[0].is_cuda):
        return f(*maps)
    height, rows = int(H * rate), rows_at_a_time(int(W * max(rate, 1 / rate)), maps[0].is_cuda)
    halo = max(1, int(1 / rate))    # rows of the maps around a strip's; even where every second one is a centre
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
    if not isinstance(norm, nn.GroupNorm) or not isinstance(x, list) and plain(x.shape[2] * x.shape[3], x.is_cuda):
        return norm
    found = (tiles_statistics if isinstance(x, list) else statistics)(x, norm.num_groups)
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
    if q.shape[2] <= QUERIES:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (x.contiguous() for x in (q, k, v))       # PyTorch's frugal kernels take no other layout
    return torch.cat([F.scaled_dot_product_attention(some, k, v) for some in q.split(QUERIES, dim=2)], dim=2)


# -----------------------------------------------------------------------------
# S3Diff's released tiles, for who wants its numbers: in_strips and norm_silu_conv also take a list of tiles


def tiles_statistics(tiles, groups):
    """What S3Diff takes for the statistics of a picture that is cut into overlapping tiles -> two of (B, groups)"""
    shares = torch.tensor([tile[0, 0].numel() for tile in tiles], device=tiles[0].device)
    shares = (shares / shares.sum()).view(-1, 1, 1)
    # official: what tiles share counts several times, and the variance of their means, see `statistics`, is left out
    return tuple((shares * torch.stack(s)).sum(0) for s in zip(*(statistics(tile, groups) for tile in tiles)))


def tile_spans(size, tile, pad):
    """One axis as S3Diff cuts it, all but the outer `pad`, in equal lengths that powers of two divide.

    -> for each part (start, stop) of what is read, and of what is written: up to the border if that is within the pad
    """
    n = max(1, math.ceil((size - 2 * pad) / tile))
    length = math.ceil((size - 2 * pad) / n)
    longer = (math.ceil(length / k) * k for k in (32, 16, 8, 4, 2))
    length = next((x for x in longer if x <= tile), length)
    parts = [(pad + k * length, min(pad + (k + 1) * length, size)) for k in range(n)]
    return [((max(start - pad, 0), min(stop + pad, size)),
             (start if start > pad else 0, stop if stop < size - pad else size)) for start, stop in parts]


def in_tiles(network, x, tile, pad, rate):
    """network on tiles of x that keep step with each other at every group norm; mid-block attention sees its own tile.

    network: made of in_strips and norm_silu_conv; x: (B, C, H, W), whole where it is not larger than tile + 2 pad
    tile, pad: cells of x; rate: cells of the result per cell of x: 8 or 1/8 -> (B, C', H * rate, W * rate)
    """
    H, W = x.shape[2:]
    if max(H, W) <= tile + 2 * pad:
        return network(x)
    boxes = [(row, col) for row in tile_spans(H, tile, pad) for col in tile_spans(W, tile, pad)]
    results = network([x[:, :, slice(*row), slice(*col)] for (row, _), (col, _) in boxes])
    out = results[0].new_zeros(*results[0].shape[:2], int(H * rate), int(W * rate))

    def place(read, write):     # of a part in the result of its tile, and in the whole
        start, stop, origin = (int(i * rate) for i in (*write, read[0]))
        return slice(start - origin, stop - origin), slice(start, stop)

    for result, (row, col) in zip(results, boxes):
        (rows, rows_out), (cols, cols_out) = place(*row), place(*col)
        out[:, :, rows_out, cols_out] = result[:, :, rows, cols]
    return out
