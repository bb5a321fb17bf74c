"""Large latents in tiles: a network that sees one at a time, and results that fade into one another.

Every tile has the size a network was trained at. Neighbours overlap, and where they do, each counts by a Gaussian
window that is largest in its middle.
"""

import torch

AT_ONCE = 4     # tiles of a batch
SIGMA = 0.1     # standard deviation of the window, in tiles


def tile_starts(length, tile, overlap):
    """First positions of tiles that cover `length` and share `overlap` or more; the last one ends flush.

    overlap: less than tile; if not, tiles move on by 1
    """
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


def tile_weight(height, width, window_down=0.0):
    """Gaussian window that fades a tile towards its edges, largest in the middle.

    window_down: rows by which the window's centre is lower than the tile's -> (1, 1, height, width)
    """
    def window(n, centre):
        from_centre = (torch.arange(n, device="cpu") - centre) / n
        return torch.exp(-(from_centre**2) / (2 * SIGMA**2))

    rows, columns = window(height, (height - 1) / 2 + window_down), window(width, (width - 1) / 2)
    return (rows[:, None] * columns)[None, None]


def crop(x, box, factor=1):
    """The part of a map under a tile: a view, so what is added to it is added to x.

    x: (B, C, k H, k W) where boxes are of H x W; factor: k -> (B, C, k th, k tw)
    """
    row, col = box
    return x[..., factor * row.start : factor * row.stop, factor * col.start : factor * col.stop]


def tiled(function, boxes, z, *others, window_down=0.0):
    """function(z, *others), a few tiles at a time, blended by `tile_weight` where they overlap.

    function: gets tiles (n, C, th, tw) and their parts of others, n at most AT_ONCE -> like the tiles
    boxes: of `tile_boxes`; if there is one, the function is called with everything
    z: (B, C, h, w)
    others: each a map (B, any, k h, k w), of which a tile gets the part under it (k = 8: an image over its latent);
    or one entry for each tile, (tiles * B, any, any), the first tile of all images first, of which a tile gets its own
    window_down: see `tile_weight` -> like z
    """
    if len(boxes) == 1:
        return function(z, *others)
    if (B := len(z)) > 1:       # one image after the other
        images = [tiled(function, boxes, z[b : b + 1], *(x[b::B] for x in others), window_down=window_down)
                  for b in range(B)]
        return torch.cat(images)

    # float32: in float16 the window is 0 in the corners, where the image would become 0 / 0
    total = torch.zeros_like(z, dtype=torch.float32)
    weights = torch.zeros_like(z[:, :1], dtype=torch.float32)
    weight = tile_weight(*crop(z, boxes[0]).shape[-2:], window_down).to(z.device, non_blocking=True)

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
