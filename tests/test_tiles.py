"""Tiles. Run: python -m pytest tests/test_tiles.py"""

import pytest
import torch

from models.support import tiles
from models.support.tiles import crop, tile_boxes, tile_starts, tile_weight, tiled


def test_tiles_cover_everything():
    for length in (1, 7, 8, 9, 40, 65):
        for overlap in (0, 3, 7, 8):
            starts = tile_starts(length, 8, overlap)
            covered = {p for s in starts for p in range(s, s + min(8, length))}
            assert starts[0] == 0 and covered == set(range(length)) and len(set(starts)) == len(starts)


def test_window():
    w = tile_weight(6, 8)
    assert w.shape == (1, 1, 6, 8) and torch.equal(w, w.flip(2, 3)) and w.argmax() == 2 * 8 + 3
    low = tile_weight(6, 8, window_down=0.5)    # its centre on row 3, between two columns
    assert low.argmax() == 3 * 8 + 3 and torch.equal(low, low.flip(3)) and torch.equal(low[0, 0, 2], low[0, 0, 4])


def test_one_box_is_everything():
    x = torch.randn(5, 3, 9, 4)
    for boxes in (tile_boxes(9, 4, 0, 0), tile_boxes(9, 4, 9, 2), tile_boxes(9, 4, 64, 16)):
        calls = []
        y = tiled(lambda x, other: calls.append((x, other)) or x.sin(), boxes, x, "anything")
        assert calls == [(x, "anything")] and torch.equal(y, x.sin()) and torch.equal(crop(x, boxes[0]), x)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_tiles_of_a_pointwise_function_equal_the_whole(monkeypatch, at_once):
    """With a finer map and rows beside them, which belong to the same tiles."""
    monkeypatch.setattr(tiles, "AT_ONCE", at_once)
    z, x, boxes = torch.randn(1, 3, 21, 34), torch.randn(1, 2, 42, 68), tile_boxes(21, 34, 8, 2)
    numbers = torch.arange(len(boxes)).float().view(-1, 1, 1)
    seen = []

    def function(z, x, rows):
        assert len(z) == len(x) == len(rows) <= at_once and z.shape[2:] == (8, 8) and x.shape[2:] == (16, 16)
        seen.extend(int(n) for n in rows)
        for tile, n in zip(x, rows):
            row, col = boxes[int(n)]
            assert torch.equal(tile, x_whole[0, :, 2 * row.start : 2 * row.stop, 2 * col.start : 2 * col.stop])
        return z.sin() + x[:, :1, ::2, ::2]

    x_whole = x
    y = tiled(function, boxes, z, x, numbers)
    assert seen == list(range(len(boxes)))
    torch.testing.assert_close(y, z.sin() + x[:, :1, ::2, ::2], atol=1e-5, rtol=0)


def test_overlap_is_a_weighted_mean():
    """Two tiles of constants 0 and 1: where they overlap the result is the second's share of both windows."""
    boxes, count = tile_boxes(4, 6, 4, 2), iter((0.0, 1.0))
    y = tiled(lambda z: torch.stack([torch.full_like(tile, next(count)) for tile in z]), boxes, torch.zeros(1, 1, 4, 6))
    w = tile_weight(4, 4)[0, 0, 0]
    torch.testing.assert_close(y[0, 0, 0], torch.cat([torch.zeros(2), w[:2] / (w[:2] + w[2:]), torch.ones(2)]))
