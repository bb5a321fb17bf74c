"""Digits and letters, drawn: images to train on without a folder of images. Ours, and no paper's.

    python train_vosr.py --preset letters --stage flow --data digits --out runs/flow
    python -m models.support.glyphs 31415926 line.png       # one line of text, to degrade and to restore

An image is a grid of cells of 32 x 32 pixels with one character in each, dark on light or light on dark. Pillow draws
them by the font that it contains: nothing is downloaded, and a cell is the same byte by byte with Pillow 10.1 to 13.0.
So there are 20 different cells of digits, and 52 of letters; what has no end are their LQ images.

Restored cells can be read: a result's character is the one whose drawing, in the same colours, is nearest. So "read"
measures fidelity, and a small distance to a wrong character is a hallucination.
"""

import argparse
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.support.arguments import command
from models.support.imaging import from_uint8, to_pil

CELL = 32                       # pixels a side
WORLDS = {                      # name: its characters, size of the font in pixels
    "digits": ("0123456789", 34),
    "letters": ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 28),
}
COLOURS = (                     # (paper, ink), RGB
    ((245, 239, 224), (27, 34, 73)),
    ((39, 43, 58), (245, 217, 138)),
)


class Cell(NamedTuple):
    """What is drawn in a cell."""

    character: str
    colours: int                # index of COLOURS


@cache
def coverage(character, size):
    """How much of each pixel a character covers.  size: of the font -> (CELL, CELL) uint8"""
    image = Image.new("L", (CELL, CELL))
    middle = CELL // 2
    ImageDraw.Draw(image).text((middle, middle), character, 255, ImageFont.load_default(size), "mm")
    return np.asarray(image)


@cache
def draw(cell, size):
    """Draw a cell.  size: of the font -> (CELL, CELL, 3) uint8"""
    paper, ink = np.array(COLOURS[cell.colours], dtype=float)
    covered = coverage(cell.character, size)[..., None] / 255
    return (paper + covered * (ink - paper)).round().astype(np.uint8)


def random_cell(world, rng):
    """Draw a Cell by lot.  world: of WORLDS; rng: of numpy"""
    characters, _ = WORLDS[world]
    return Cell(characters[rng.integers(len(characters))], int(rng.integers(len(COLOURS))))


class Glyphs(torch.utils.data.Dataset):
    """Grids of random cells, without end: glyphs[i] is a function of (seed, i) alone -> (3, crop, crop) in [0, 1].

    crop: pixels a side, a multiple of CELL. Takes the place of photos.Photos; files: none
    """

    def __init__(self, world, crop, seed=0):
        self.world, self.side, self.seed, self.files = world, crop // CELL, seed, []
        self.size = WORLDS[world][1]

    def cells(self, i):
        """-> list of Cell, row by row"""
        rng = np.random.default_rng((self.seed, i))
        return [random_cell(self.world, rng) for _ in range(self.side**2)]

    def __getitem__(self, i):
        drawn = [draw(cell, self.size) for cell in self.cells(i)]
        rows = [np.concatenate(drawn[k : k + self.side], axis=1) for k in range(0, len(drawn), self.side)]
        return from_uint8(np.concatenate(rows))[0]


HELD_OUT_SEED = 10**9           # of cells that are degraded by draws of their own, to measure on


def held_out(world, n, crop=CELL):
    """Images to measure on.  -> (n, 3, crop, crop) in [0, 1], list of their Cells, n of them where crop is CELL"""
    glyphs = Glyphs(world, crop, HELD_OUT_SEED)
    images = torch.stack([glyphs[i] for i in range(n)])
    return images, [cell for i in range(n) for cell in glyphs.cells(i)]


def templates(world, cells):
    """All characters of a world in the colours of n cells.  -> (n, characters, 3, CELL, CELL)"""
    characters, size = WORLDS[world]
    drawn = [[draw(cell._replace(character=c), size) for c in characters] for cell in cells]
    return torch.from_numpy(np.array(drawn)).permute(0, 1, 4, 2, 3) / 255


def read(world, images, cells):
    """Read restored cells.  images: (n, 3, CELL, CELL) in [0, 1]; cells: n of Cell, what they were

    -> share of those whose nearest character is theirs, distances (n,) to it: root mean square over pixels
    """
    distances = (templates(world, cells) - images[:, None]).square().mean((2, 3, 4)).sqrt()     # (n, characters)
    nearest, number = distances.min(1)
    characters, _ = WORLDS[world]
    right = sum(characters[k] == cell.character for k, cell in zip(number.tolist(), cells))
    return right / len(cells), nearest


def text(line, world="digits"):
    """A line of text, a cell for each character; a space leaves one empty.  -> (1, 3, CELL, CELL * characters)"""
    _, size = WORLDS[world]
    return from_uint8(np.concatenate([draw(Cell(c, 0), size) for c in line], axis=1))


def main():
    p = argparse.ArgumentParser(description="Draw a line of text, a cell of 32 x 32 pixels for each character.")
    p.add_argument("line", help="such as 31415926 or NANOSR")
    p.add_argument("file", help="PNG to write")
    args = p.parse_args()
    world = "digits" if args.line.replace(" ", "").isdigit() else "letters"
    to_pil(text(args.line, world)[0]).save(args.file)


if __name__ == "__main__":
    command(main)
