"""Large latents in tiles: a network that sees one at a time, and results that fade into one another.

Every tile has the size a network was trained at. Neighbours overlap, and where they do, each counts by a Gaussian
window that is largest in its middle.
"""

import torch

AT_ONCE = 4     # tiles of a batch


def tile_starts(length, tile, overlap):
    """First positions of tiles that cover `length` and share `overlap` or more; the last one ends flush."""
    tile = min(tile, length)
    starts = list(range(0, length - tile + 1, max(tile - overlap, 1)))
    return starts if starts[-1] + tile == length else [*starts, length - tile]


def tile_boxes(height, width, tile, overlap):
    """(rows, columns) slices of tiles that cover height x width; smaller ones only where the whole is.

    tile: cells per side, 0 = one tile, the whole
    """
    tile = tile or max(height, width)
    rows = [slice(i, i + min(tile, height)) for i in tile_starts(height, tile, overlap)]
    cols = [slice(i, i + min(tile, width)) for i in tile_starts(width, tile, overlap)]
    return [(row, col) for row in rows for col in cols]


def tile_weight(height, width, down=0.0):
    """Gaussian window that fades a tile towards its edges, its centre `down` rows too low -> (1, 1, height, width)"""
    def window(n, shift=0.0):
        return torch.exp(-((torch.arange(n, device="cpu") - (n - 1) / 2 - shift) / n) ** 2 / 0.02)
    return (window(height, down)[:, None] * window(width))[None, None]


def crop(x, box, factor=1):
    """The part of a map under a tile.  x: (B, C, k H, k W) where boxes are of H x W; factor: k"""
    row, col = box
    return x[..., factor * row.start : factor * row.stop, factor * col.start : factor * col.stop]


def tiled(function, boxes, z, *others, down=0.0):
    """function(z, *others), a few tiles at a time, blended by `tile_weight` where they overlap.

    function: of tiles (n, C, th, tw) and what lies beside them, n at most AT_ONCE -> like the tiles
    boxes: of `tile_boxes`; if there is one, the function is called with everything
    z: (B, C, h, w); others: maps (B, any, k h, k w), of which a tile gets its part, as crops of the image with k = 8;
    or (tiles * B, any, any), all images of the first tile first, of which it gets its row
    down: see `tile_weight` -> like z
    """
    if len(boxes) == 1:
        return function(z, *others)
    if (B := len(z)) > 1:       # one image after the other
        images = [tiled(function, boxes, z[b : b + 1], *(x[b::B] for x in others), down=down) for b in range(B)]
        return torch.cat(images)

    # float32: in half precision the window's corners are 0
    total = torch.zeros_like(z, dtype=torch.float32)
    weights = torch.zeros_like(z[:, :1], dtype=torch.float32)
    weight = tile_weight(*crop(z, boxes[0]).shape[-2:], down).to(z.device, non_blocking=True)

    def part(x, first):
        if x.ndim == 3:
            return x[first : first + AT_ONCE]
        factor = x.shape[-1] // z.shape[-1]
        return torch.cat([crop(x, box, factor) for box in boxes[first : first + AT_ONCE]])

    for first in range(0, len(boxes), AT_ONCE):
        tiles = function(part(z, first), *(part(x, first) for x in others))
        for box, tile in zip(boxes[first : first + AT_ONCE], tiles.split(1)):
            crop(total, box).add_(weight * tile)
            crop(weights, box).add_(weight)
    return (total / weights).to(z)
