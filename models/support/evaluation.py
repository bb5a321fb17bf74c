"""Measuring results: which reference belongs to which image, what can be measured, the tables and the protocol.

Nothing is downloaded for it unasked; what cannot be measured is named, with the reason.

Left out: metrics with networks of their own (DISTS, MUSIQ, MANIQA, CLIPIQA, FID), which papers take from pyiqa.
"""

import csv
import io
import json
import math
import platform
import subprocess
import sys
from collections import namedtuple
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
import PIL
import torch

from models.support.download import sha256_of
from models.support.files import PictureError, find_pictures, printable, whole_file, writing
from models.support.imaging import read_picture
from models.support.metrics import load_niqe, niqe, psnr_y, ssim_y
from models.support.pairs import find_partners
from models.support.weights import cache_folder, locate

NIQE_FILE = "niqe_pris_params.npz"
LPIPS_FILES = "alexnet-owt-7be5be79.pth", "lpips_alex.pth"      # papers report AlexNet, whatever they train with
# column: name, digits to print, which is better
METRICS = {"psnr_y": ("PSNR-Y", 2, "higher"), "ssim_y": ("SSIM-Y", 4, "higher"), "lpips": ("LPIPS", 4, "lower"),
           "niqe": ("NIQE", 2, "lower")}
COLUMNS = [m + end for m in METRICS for end in ("", "_bicubic")]
NEED_REFERENCE = "psnr_y", "ssim_y", "lpips"
# functions: {metric: f(x, hq) of images (1, 3, H, W) in [0, 1] -> float}; absent: {metric: why it is not measured};
# files: that were read for it
Metrics = namedtuple("Metrics", "functions absent files")


def find_references(names, ref, scale=4):
    """For each image `ref`, or in that folder the file of its name, maybe of another suffix, or without DIV2K's x4.

    names: paths relative to the folder of images; scale: the number after that x
    -> list of tuples of Path: one if all is well, none, several. Raises PictureError if none has a reference.
    """
    if ref is None or ref.is_file():
        return [(ref,) if ref else ()] * len(names)
    found = find_partners(names, find_pictures(ref, print, results=True), scale)
    if found and not any(found):
        raise PictureError(f"{ref}: has no reference for any of {len(found)} images; one of {next(iter(names))} "
                           "would have the same name")
    return found


def find_niqe(path):
    """NIQE's parameters from `path`, or else from the weights cache; None if they are not there."""
    path = path or locate(NIQE_FILE)
    return path and load_niqe(path)


def find_metrics(compare, border, niqe_file=None, device="cpu", lpips=None):
    """What can be measured with the files that are here.

    compare: are there references?; border: pixels cut off before PSNR and SSIM
    lpips: LPIPS.from_pretrained, whose network is no matter of this file
    -> Metrics. Raises ValueError at a broken file.
    """
    metrics, absent, files = {}, {}, []
    lacking = [name for name in LPIPS_FILES if not locate(name)]
    if compare:
        metrics = {"psnr_y": lambda x, hq: psnr_y(x, hq, border), "ssim_y": lambda x, hq: ssim_y(x, hq, border)}
    else:
        absent = dict.fromkeys(NEED_REFERENCE, "needs --ref")
    if compare and lacking:
        absent["lpips"] = f"needs {' and '.join(lacking)} in {cache_folder()}"
    elif compare:
        network = lpips("alex", device)
        metrics["lpips"] = lambda x, hq: network(2 * x.to(device) - 1, 2 * hq.to(device) - 1).item()
        files += map(locate, LPIPS_FILES)
    if (parameters := find_niqe(niqe_file)) is None:
        absent["niqe"] = f"needs {NIQE_FILE} in {cache_folder()}"
    else:
        metrics["niqe"] = lambda x, hq: niqe(x, parameters)
        files.append(niqe_file or locate(NIQE_FILE))
    return Metrics(metrics, absent, files)


def read_reference(path, references, size):
    """The reference of image `path`, of `find_references`.  -> (1, 3, *size) in [0, 1], "", or None, why not"""
    try:
        if not references:
            raise PictureError(f"no reference named {path.with_suffix('')}")
        if len(references) > 1:
            raise PictureError(f"{' and '.join(map(str, references))} have its name; keep the one that is meant")
        hq, _ = read_picture(references[0], note=print, size=size)
        if hq.shape[-2:] != size:
            raise PictureError(f"reference {references[0]} is {hq.shape[3]}x{hq.shape[2]}, not {size[1]}x{size[0]}")
        return hq, ""
    except PictureError as e:
        print(f"{printable(path)}: {e}; not compared", file=sys.stderr)
        return None, str(e)


def measure(images, bicubic, hq, metrics, why="", name="image"):
    """Our versions of an image, and bicubic's, by the metrics of `find_metrics`.

    images: list of (1, 3, H, W) in [0, 1]; bicubic: the same; hq: the same, or None, and why; name: of all of them
    -> for each of images {metric: ours, metric_bicubic: its}, {metric: why not}
    """
    found, failed = [{} for _ in images], {}
    for m, metric in metrics.items():
        if hq is None and m in NEED_REFERENCE:
            failed[m] = why
            continue
        try:
            theirs, *ours = (metric(x, hq) for x in (bicubic, *images))
            if math.isnan(sum(ours, theirs)):
                raise ValueError(f"{METRICS[m][0]} needs more pixels or more detail")
            for figures, figure in zip(found, ours):
                figures |= {m: figure, f"{m}_bicubic": theirs}
        except (ValueError, torch.OutOfMemoryError) as e:
            failed[m] = str(e) if isinstance(e, ValueError) else "not enough memory"
            print(f"{printable(name)}: not measured: {failed[m]}", file=sys.stderr)
    return found, failed


def report(figures):
    """{metric: ours, metric_bicubic: its} as text, bicubic's in brackets."""
    return "  ".join(f"{name} {figures[m]:.{n}f} ({figures[f'{m}_bicubic']:.{n}f})"
                     for m, (name, n, _) in METRICS.items() if m in figures)


def row_of(name, size, seconds, figures, missing):
    """The line of an image.  size: (H, W); seconds: None = made earlier; figures, missing: of `measure` -> dict"""
    return {"picture": printable(name), "width": size[1], "height": size[0], "seconds": seconds and round(seconds, 3),
            **figures, "not_measured": missing}


def average(rows):
    """-> {column: its mean over the images where it was measured}"""
    measured = {column: [row[column] for row in rows if column in row] for column in COLUMNS}
    return {column: fmean(figures) for column, figures in measured.items() if figures}


def protocol(rows, seed, scale, border, absent):
    """How it was measured, in one line."""
    how = {"psnr_y": ("PSNR, SSIM", f"on Y (BT.601) as BasicSR, {border} px border cut"),
           "lpips": ("LPIPS", f"0.1 AlexNet ({', '.join(LPIPS_FILES)}) on RGB, no border cut"),
           "niqe": ("NIQE", "on Y as BasicSR, no border cut")}
    metrics = "; ".join(f"{name} {absent.get(m, text)}" for m, (name, text) in how.items())
    return (f"pictures {len(rows)}, references {sum('psnr_y' in row for row in rows)}, scale {scale:g}, seed {seed}; "
            f"whole pictures, no crop, 8-bit RGB; bicubic (Pillow) in brackets; {metrics}")


# ---- what a later reader needs in order to trust the figures

hash_of = cache(sha256_of)      # of weights, which do not change meanwhile


@cache
def versions():
    """What ran. nanosr: the commit, with -dirty where files were changed; None outside a clone"""
    root, commit = Path(__file__).resolve().parents[2], None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.TimeoutExpired):      # no git
        if (root / ".git").exists():
            commit = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    return {"nanosr": commit, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "pillow": PIL.__version__}


def record_of(rows, command, flags, absent, files):
    """All of a run that metrics.json keeps.  flags: {name: value}; files: weights that were used -> dict"""
    means = average(rows)
    return {
        "command": command, "protocol": protocol(rows, flags["seed"], flags["scale"], flags["border"], absent),
        "seed": flags["seed"],
        "flags": flags,
        "metrics": {m: {"name": name, "better": better} for m, (name, _, better) in METRICS.items()},
        "average": {m: {"ours": means[m], "bicubic": means[f"{m}_bicubic"], "pictures": sum(m in row for row in rows)}
                    for m in METRICS if m in means},
        "not_measured": {m: absent.get(m, "not of any image") for m in METRICS if m not in means},
        "pictures": rows,
        "weights": {printable(path): hash_of(path) for path in dict.fromkeys(files)},
        "versions": versions(),
    }


def write_text(path, text):
    """A whole file in UTF-8; bytes that are none, of names, as JSON writes them."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


COLUMNS_OF_TABLE = ["picture", "width", "height", "seconds", *COLUMNS, "not_measured"]


def in_table(row):
    """A row of `row_of` as metrics.csv has it."""
    return row | {"not_measured": "; ".join(f"{METRICS[m][0]}: {why}" for m, why in row["not_measured"].items())}


def append_row(folder, row, first):
    """Add the row of an image to metrics.csv as soon as it is there; the first one begins the file.

    Raises WriteError.
    """
    path, mode = folder / "metrics.csv", "w" if first else "a"
    folder.mkdir(parents=True, exist_ok=True)
    with writing(path), open(path, mode, encoding="utf-8", errors="backslashreplace", newline="") as f:
        table = csv.DictWriter(f, COLUMNS_OF_TABLE)
        if first:
            table.writeheader()
        table.writerow(in_table(row))


def write_metrics(record, folder):
    """metrics.json, and metrics.csv with a line for every image."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS_OF_TABLE)
    table.writeheader()
    table.writerows(map(in_table, record["pictures"]))
    write_text(folder / "metrics.csv", text.getvalue())
    plain = json.dumps(record, default=printable)       # a path, a dtype becomes text, and so does PSNR's infinity
    record = json.loads(plain, parse_constant=lambda x: str(float(x)))
    write_text(folder / "metrics.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
