"""Measuring results: which reference belongs to which picture, what can be measured, the table and the protocol.

Left out: metrics with networks of their own (DISTS, MUSIQ, MANIQA, CLIPIQA, FID), which papers take from pyiqa.
"""

import csv
import math
import os
import sys
from statistics import fmean

from models.imaging import PictureError, list_pictures, read_picture
from models.metrics import load_niqe, niqe, psnr_y, ssim_y
from models.weights import locate

NIQE_FILE = "niqe_pris_params.npz"
METRICS = {"psnr_y": ("PSNR-Y", 2), "ssim_y": ("SSIM-Y", 4), "niqe": ("NIQE", 2)}  # column: name, digits to print


def find_references(pictures, ref):
    """The reference of each picture: the file of the same stem in folder `ref`, or `ref` itself.  -> list of Path or None"""
    if ref is None or ref.is_file():
        return [ref] * len(pictures)
    by_stem = {path.stem: path for path in list_pictures([ref])}
    return [by_stem.get(path.stem) for path in pictures]


def find_niqe(path):
    """NIQE's parameters from `path`, or else from the weights cache; None if they are not there, since nothing is downloaded unasked."""
    path = path or locate(NIQE_FILE)
    return path and load_niqe(path)


def read_reference(path, ref, size):
    """The reference of picture `path`, or None after a line that says why.  -> (1, 3, *size) in [0, 1] or None"""
    try:
        if ref is None:
            raise PictureError(f"no reference named {path.stem}")
        hq, _ = read_picture(ref)
        if hq.shape[-2:] != size:
            raise PictureError(f"reference {ref} is {hq.shape[3]}x{hq.shape[2]}, not {size[1]}x{size[0]}")
        return hq
    except PictureError as e:
        print(f"{path}: {e}; not compared", file=sys.stderr)


def measure(sr, bicubic, hq, scale, niqe_parameters):
    """What can be measured of our result and of bicubic's.

    sr, bicubic: (1, 3, H, W) in [0, 1]; hq: the same or None; niqe_parameters: of `find_niqe` -> {metric: (ours, bicubic's)}
    """
    tasks = {}
    if hq is not None:  # the border that is cut is the usual one of BasicSR's test settings
        tasks = {"psnr_y": (psnr_y, hq, round(scale)), "ssim_y": (ssim_y, hq, round(scale))}
    if niqe_parameters is not None:
        tasks["niqe"] = (niqe, niqe_parameters)
    found = {}
    for name, (metric, *rest) in tasks.items():
        try:
            pair = metric(sr, *rest), metric(bicubic, *rest)
            if math.isnan(sum(pair)):
                raise ValueError(f"{METRICS[name][0]} needs more pixels or more detail")
            found[name] = pair
        except ValueError as e:
            print(f"  not measured: {e}", file=sys.stderr)
    return found


def report(found):
    """{metric: (ours, bicubic's)} as text, bicubic's in brackets."""
    return "  ".join(f"{name} {found[m][0]:.{n}f} ({found[m][1]:.{n}f})" for m, (name, n) in METRICS.items() if m in found)


def row_of(name, size, seconds, found):
    """A line of metrics.csv.  size: (H, W); found: of `measure` -> {column: value}"""
    row = {"picture": name, "width": size[1], "height": size[0], "seconds": round(seconds, 3)}
    for metric, (ours, bicubic) in found.items():
        row |= {metric: ours, f"{metric}_bicubic": bicubic}
    return row


def write_metrics(rows, path):
    """metrics.csv, if anything was measured -> {metric: (our average, bicubic's)}"""
    columns = {m: (m, f"{m}_bicubic") for m in METRICS if any(m in row for row in rows)}
    if columns:
        part = path.with_name(path.name + ".part")
        with open(part, "w", newline="", encoding="utf-8") as f:
            table = csv.DictWriter(f, ["picture", "width", "height", "seconds", *sum(columns.values(), ())])
            table.writeheader()
            table.writerows(rows)
        os.replace(part, path)
    return {m: tuple(fmean(row[c] for row in rows if c in row) for c in pair) for m, pair in columns.items()}


def protocol(rows, seed, scale, niqe_parameters):
    """How it was measured, in one line."""
    return (f"pictures {len(rows)}, references {sum('psnr_y' in row for row in rows)}, seed {seed}; 8-bit RGB; bicubic (Pillow) in brackets; "
            f"PSNR, SSIM on Y as BasicSR, {round(scale)} px border cut; NIQE {'as BasicSR' if niqe_parameters else f'needs {NIQE_FILE}'}")
