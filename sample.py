"""Upscale pictures, and measure the results where a reference or NIQE's parameter file is at hand.

    python sample.py                                 the example picture, with the embedded model
    python sample.py photo.jpg holiday/ --out big    files and folders
    python sample.py lq/ --ref hq/                   PSNR and SSIM against pictures of the same names
    python sample.py --list-weights                  which public weight files exist, and which are here

Writes OUT/<name>.png for every picture, OUT/sheet.png to compare by eye, and OUT/metrics.csv if something was measured.
"""

import argparse
import csv
import math
import os
import sys
import time
from pathlib import Path
from statistics import fmean

import torch

from models.imaging import PictureError, contact_sheet, list_pictures, read_picture, resize, round8, save_png, write_picture
from models.metrics import load_niqe, niqe, psnr_y, ssim_y
from models.vosr import VOSR
from models.weights import list_weights, locate
from training import choose_device, choose_dtype

ROOT = Path(__file__).resolve().parent
NIQE_FILE = "niqe_pris_params.npz"
METRICS = {"psnr_y": ("PSNR-Y", 2), "ssim_y": ("SSIM-Y", 4), "niqe": ("NIQE", 2)}  # column: name, digits to print
SHEET_ROWS, SHEET_CROP = 8, 512  # the sheet shows the middle of the first pictures, pixel by pixel


def scale_factor(text):
    value = float(text)
    if not 1 <= value <= 8:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 8")
    return int(value) if value.is_integer() else value


def parse_args(argv):
    p = argparse.ArgumentParser(description="Upscale pictures with diffusion super-resolution.")
    p.add_argument("pictures", nargs="*", type=Path, metavar="PICTURE", default=[ROOT / "assets" / "example.png"],
                   help="pictures and folders of pictures (default: the example)")  # fmt: skip
    p.add_argument("--out", type=Path, default="out", metavar="DIR", help="folder for the results (default out)")
    # model
    p.add_argument("--model", default="vosr-tiny", help="vosr-tiny (default), vosr-{0.5b,1.4b}[-1step], or a file or folder with weights")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto (default): cuda, else mps, else cpu")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="auto: bfloat16 on cuda, else float32")
    # sampling; what is not given is the model's own setting
    p.add_argument("--scale", type=scale_factor, default=4, help="enlargement, 1 to 8 (default 4, what the models are trained for)")
    p.add_argument("--seed", type=int, default=0, help="of the noise; the same for every picture (default 0)")
    p.add_argument("--steps", type=int, help="steps of the sampler, from 1 on")
    p.add_argument("--guidance", type=float, help="1: conditional only; smaller: more invented detail; larger: more faithful")
    p.add_argument("--weak", type=float, help="strength of the weak condition that guidance starts from, 0 to 1")
    p.add_argument("--tile", type=int, default=0, metavar="PX", help="side of the tiles in output pixels (default 0: the model's choice)")
    p.add_argument("--overlap", type=int, default=0, metavar="PX", help="pixels that tiles share (default 0: the model's choice), at least 1/8 tile")
    p.add_argument("--color", default="adain", choices=["adain", "wavelet", "none"], help="how to restore the input's colours (default adain)")
    # measuring
    p.add_argument("--ref", type=Path, metavar="DIR", help="references: a folder with the same names, or one picture")
    p.add_argument("--niqe", type=Path, metavar="FILE", help=f"{NIQE_FILE} (default: looked for in the weights cache)")
    p.add_argument("--list-weights", action="store_true", help="print the table of public weight files and end")
    args = p.parse_args(argv)

    for option, path in (("--ref", args.ref), ("--niqe", args.niqe)):
        if path is not None and not path.exists():
            p.error(f"argument {option}: {path} does not exist")
    for option, value, least in (("--seed", args.seed, 0), ("--tile", args.tile, 0), ("--overlap", args.overlap, 0), ("--steps", args.steps, 1)):
        if value is not None and not least <= value < 2**63:
            p.error(f"argument {option}: {value} is out of range; give {least} or more")
    try:
        args.device = choose_device(args.device)
        torch.zeros(1, device=args.device)  # a device may have a name and not be there
    except (RuntimeError, AssertionError) as e:
        p.error(f"argument --device: {args.device} cannot be used here ({str(e).splitlines()[0]})")
    args.dtype = choose_dtype(args.dtype, args.device)
    return args


def output_paths(pictures, out):
    """One PNG per picture in `out`; equal stems get -2, -3, ..., and the sheet keeps its name.  -> list of Path"""
    taken, paths = {"sheet"}, []
    for path in pictures:
        stem, n = path.stem, 1
        while stem.lower() in taken:  # lower: some file systems do not tell a.png from A.png
            n += 1
            stem = f"{path.stem}-{n}"
        if n > 1:
            print(f"{path}: the name {path.stem}.png is taken, so the result is {stem}.png")
        taken.add(stem.lower())
        paths.append(out / f"{stem}.png")
    return paths


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


def measure(sr, bicubic, hq, args):
    """What can be measured of our result and of bicubic's.

    sr, bicubic: (1, 3, H, W) in [0, 1]; hq: the same or None -> {metric: (ours, bicubic's)}
    """
    tasks = {}
    if hq is not None:  # the border that is cut is the usual one of BasicSR's test settings
        tasks = {"psnr_y": (psnr_y, hq, round(args.scale)), "ssim_y": (ssim_y, hq, round(args.scale))}
    if args.niqe is not None:
        tasks["niqe"] = (niqe, args.niqe)
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


def upscale(model, path, target, ref, args):
    """Upscale one file, write it, measure it.

    -> ({column: value} for metrics.csv, [bicubic, ours, reference if any] of (1, 3, h, w) in [0, 1] for the sheet)
    Raises PictureError, and RuntimeError when memory runs out.
    """
    lq, alpha = read_picture(path)
    start = time.perf_counter()
    sr = model.upscale(lq, scale=args.scale, seed=args.seed, steps=args.steps, guidance=args.guidance, weak=args.weak,
                       tile=args.tile, overlap=args.overlap, color=args.color).float().cpu()  # fmt: skip
    seconds = time.perf_counter() - start
    if not sr.isfinite().all():
        raise PictureError(f"{path}: the result is not a number; try --dtype float32")
    H, W = sr.shape[-2:]
    write_picture(target, sr, None if alpha is None else resize(alpha, (H, W)))
    print(f"{path}: {lq.shape[3]}x{lq.shape[2]} -> {target}: {W}x{H}, {seconds:.2f} s")

    sr, bicubic = round8(sr), resize(lq, (H, W))  # measured is what the file holds
    hq = read_reference(path, ref, (H, W)) if args.ref else None
    found = measure(sr, bicubic, hq, args)
    if found:
        print(f"  {report(found)}")
    row = {"picture": target.name, "width": W, "height": H, "seconds": round(seconds, 3)}
    for name, (ours, theirs) in found.items():
        row |= {name: ours, f"{name}_bicubic": theirs}
    middle = [slice(max(side - SHEET_CROP, 0) // 2, (side + SHEET_CROP) // 2) for side in (H, W)]
    return row, [x[:, :, middle[0], middle[1]] for x in (bicubic, sr, hq) if x is not None]


def summarise(rows, sheet, originals, args):
    """Write the sheet and metrics.csv; print averages and how they were measured.  Raises PictureError."""
    path = args.out / "sheet.png"
    if path.resolve() in originals:
        raise PictureError(f"{path}: is an input, so no sheet and no metrics are written; choose another --out")
    captions = [[f"{row['picture']}: bicubic", args.model, "reference"] for row in rows]
    save_png(contact_sheet(sheet, captions), path)
    print(f"before and after: {path}")

    columns = {m: (m, f"{m}_bicubic") for m in METRICS if any(m in row for row in rows)}
    if not columns:
        return
    part = args.out / "metrics.csv.part"
    with open(part, "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, ["picture", "width", "height", "seconds", *sum(columns.values(), ())])
        table.writeheader()
        table.writerows(rows)
    os.replace(part, args.out / "metrics.csv")
    averages = {m: [fmean(row[c] for row in rows if c in row) for c in pair] for m, pair in columns.items()}
    print(f"average  {report(averages)}")
    print(f"protocol: pictures {len(rows)}, references {sum('psnr_y' in row for row in rows)}, seed {args.seed}; 8-bit RGB; bicubic (Pillow) "
          f"in brackets; PSNR, SSIM on Y as BasicSR, {round(args.scale)} px border cut; NIQE {'as BasicSR' if args.niqe else f'needs {NIQE_FILE}'}")


def main(argv=None):
    args = parse_args(argv)
    if args.list_weights:
        return list_weights()
    rows, sheet, pictures, failures = [], [], [], []

    def fail(message):
        failures.append(message)
        print(message, file=sys.stderr)

    for path in args.pictures:
        try:
            pictures += list_pictures([path])
        except PictureError as e:
            fail(str(e))
    try:
        args.niqe = find_niqe(args.niqe)
        references = find_references(pictures, args.ref)
        model = VOSR.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    except (OSError, ValueError) as e:
        sys.exit(f"sample.py: {e}")
    print(f"model {args.model}, device {args.device}, dtype {args.dtype}, scale {args.scale}, seed {args.seed}, color {args.color}")

    originals = {path.resolve() for path in pictures + references if path}
    for path, target, ref in zip(pictures, output_paths(pictures, args.out), references):
        try:
            if target.resolve() in originals:
                raise PictureError(f"{path}: its result {target} would overwrite an input; choose another --out")
            row, shown = upscale(model, path, target, ref, args)
            rows.append(row)
            sheet = [*sheet, shown][:SHEET_ROWS]
        except PictureError as e:
            fail(str(e))
        except RuntimeError as e:  # torch.OutOfMemoryError on CUDA; CPU and MPS have no class of their own
            if not any(words in str(e) for words in ("out of memory", "not enough memory", "allocate memory")):
                raise
            fail(f"{path}: not enough memory; try --tile 256")
    try:
        if rows:
            summarise(rows, sheet, originals, args)
    except (PictureError, OSError) as e:
        fail(str(e))
    if failures:
        print(f"done {len(rows)}, failed {len(failures)}:", *failures, sep="\n  ", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
