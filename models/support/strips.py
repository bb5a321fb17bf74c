"""Large feature maps in horizontal strips: the same numbers in a fraction of the memory.

An autoencoder that is run on tiles of an image does not know what lies beyond a tile's edge and normalises each tile by
itself; that shows as seams. Here every layer is cut instead. A 3x3 convolution pads with zeros at the borders of what
it gets. That is right at the image's borders, but inside the image it makes a strip's outer rows wrong. So each strip
is computed with halo rows more above and below, and the result's wrong rows are cut off. A group norm takes its
statistics from the whole map first; attention, in which every pixel sees all others, is cut by queries. So the result
is that of the whole image up to rounding, with two feature maps in memory at a time.

vae.py and qwen_vae.py choose strips by `InStrips.run`, layer by layer: for maps beyond 512x512 pixels, on a GPU beyond
1024x1024, and never where gradients are recorded. In shapes here c counts channels.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support.checkpointing import Checkpointing

LIMIT = 512 * 512   # pixels of the largest map that is computed whole on a CPU
QUERIES = 4096      # attention is computed at once up to so many queries, and beyond in parts of so many


# ---- where strips are chosen

def limit(cuda):
    """Say how many pixels the largest map has that is computed whole.  cuda: is it on a GPU?"""
    return 4 * LIMIT if cuda else LIMIT


def needed(x, rate=1):
    """Decide whether a layer computes map x: (B, c, H, W) in strips; rate: rows of its result per row of x."""
    if torch.is_grad_enabled():
        return False
    pixels = x.shape[2] * x.shape[3] * max(1, rate**2)      # x's or the result's, whichever has more
    return pixels > limit(x.is_cuda)


class InStrips(Checkpointing):
    """Lets an autoencoder run its layers in strips; a mixin. self.run(layer, x, adapters) is layer(x, adapters).

    layer: a resnet with norm1, conv1, norm2, conv2 and shortcut, or a convolution, which may change the size by `rate`
    adapters: of lora.py, None where layers take none

    Trap: a map stays in memory as long as a variable refers to it. While a layer runs there are its input and its
    result; if the network still held an older map, that would be a third one. Hence one loop over all layers with one
    variable x, and no method for a whole level, whose caller would hold the level's input until it returns.
    """

    def run(self, layer, x, adapters=None):
        rate = getattr(layer, "rate", 1)
        if not needed(x, rate):
            return super().run(with_adapters(layer, adapters), x)
        if hasattr(layer, "norm1"):
            return resnet_block(layer, x, adapters)
        return in_strips(with_adapters(layer, adapters), x, rate=rate)


def with_adapters(layer, adapters):
    """Make a function of the map alone.  adapters: of lora.py, None where the layer takes none"""
    return layer if adapters is None else partial(layer, adapters=adapters)


# ---- layers in strips

def rows_at_a_time(width, cuda):
    """Say how high a strip of a map is: a quarter of LIMIT's pixels, on a GPU all of them."""
    pixels = LIMIT if cuda else LIMIT // 4
    return max(1, pixels // width)


def in_strips(f, *maps, rate=1, into=None):
    """Compute f(*maps), a strip at a time.

    f: a function of maps that pads at their borders by itself; a row of its result depends on the maps' row at that
       height, and on the next ones above and below
    maps: (B, c, H, W), of one H and W; rate: rows of the result per row of the maps: 1, 2, 0.5
    into: a map to write the result in, if it has its type; may be one of maps that nobody needs afterwards
    -> (B, c', H * rate, W * rate)
    """
    H, W = maps[0].shape[2:]
    height = int(H * rate)
    rows = rows_at_a_time(int(W * max(rate, 1 / rate)), maps[0].is_cuda)    # the result's, in a strip
    halo = 2 if rate == 0.5 else 1      # rows of the maps around a strip's; two, so that strides of two start even
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        top, bottom = max(int(start / rate) - halo, 0), min(int(stop / rate) + halo, H)
        strip = f(*(x[:, :, top:bottom] for x in maps))
        if start == 0:
            fits = into is not None and into.dtype == strip.dtype   # not half where a float32 stream goes on
            out = into if fits else strip.new_empty(*strip.shape[:2], height, strip.shape[3])
        else:
            # `out` may be one of maps, and this strip's halo has the last rows of the strip before. So those are
            # written one strip late, when nobody reads them any more.
            out[:, :, start - rows : start] = finished
        finished = strip[:, :, int(start - top * rate) : int(stop - top * rate)]    # without the halo
    out[:, :, start:] = finished
    return out


def statistics(x, groups):
    """Take mean and biased variance of each group of channels, in float32.  (B, c, H, W) -> two of (B, groups)"""
    parts = x.split(rows_at_a_time(x.shape[3], x.is_cuda), dim=2)
    shares = torch.tensor([len(y[0, 0]) / len(x[0, 0]) for y in parts], device="cpu")
    shares = shares.view(-1, 1, 1).to(x.device, non_blocking=True)
    found = (torch.var_mean(y.float().unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0) for y in parts)
    variances, means = map(torch.stack, zip(*found))    # (strips, B, groups)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(0)    # mean of variances plus variance of means


def norm_of_strips(norm, x):
    """Make of a norm a function of strips of x: a group norm has the statistics of all of x, any other sees pixels."""
    if not isinstance(norm, nn.GroupNorm):
        return norm
    mean, variance = statistics(x, norm.num_groups)
    size = len(norm.weight) // norm.num_groups
    mean, variance = mean.repeat_interleave(size, dim=1), variance.repeat_interleave(size, dim=1)   # (B, c)
    scale = norm.weight.float() * (variance + norm.eps).rsqrt()
    shift = norm.bias.float() - mean * scale
    return lambda strip: (strip * scale[..., None, None] + shift[..., None, None]).to(strip.dtype)


def norm_silu_conv(norm, conv, x, adapters=None, into=None):
    """Compute conv(silu(norm(x)), adapters) in strips.  (B, c, H, W) -> (B, c', H, W)"""
    norm, conv = norm_of_strips(norm, x), with_adapters(conv, adapters)
    return in_strips(lambda strip: conv(F.silu(norm(strip))), x, into=into)


def resnet_block(block, x, adapters=None):
    """Compute block(x, adapters) in strips, with two maps in memory, x and h.  (B, c_in, H, W) -> (B, c_out, H, W)"""
    shortcut = with_adapters(block.shortcut, adapters)
    h = norm_silu_conv(block.norm1, block.conv1, x, adapters)
    h = norm_silu_conv(block.norm2, block.conv2, h, adapters, into=h)
    return in_strips(lambda strip_h, strip_x: strip_h + shortcut(strip_x), h, x, into=h)


# ---- attention by queries

def attention(q, k, v):
    """Compute softmax(q k^T / sqrt(D)) v without the matrix of all pairs at once.  Three of (B, N, D) -> (B, N, D)"""
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))       # one head
    if q.shape[2] <= QUERIES and not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)
    q, k, v = (x.contiguous() for x in (q, k, v))       # PyTorch's kernels that save memory take no other layout
    parts = [F.scaled_dot_product_attention(some, k, v) for some in q.split(QUERIES, dim=2)]
    return torch.cat(parts, dim=2).squeeze(1)
