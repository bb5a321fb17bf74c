"""Upscale pictures, and measure the results where a reference or NIQE's parameter file is at hand.

    python sample.py                                 the example picture, by all embedded models side by side
    python sample.py photo.jpg holiday/ --out big    files and folders
    python sample.py lq/ --ref hq/ --page            PSNR, SSIM, LPIPS against these; a page to look at
    python sample.py --list-weights                  which public weight files exist, and which are here
    python sample.py --model s3diff --fetch          all files that a model needs, fetched and checked

Writes OUT/<name>.png for every image, OUT/sheet.png to compare the first eight by eye, metrics.csv and metrics.json of
what can be measured. Several models have a folder each in OUT. One image at a time is held in memory.

In a notebook:

    from sample import load
    nano = load("vosr-tiny")
    nano("photo.jpg").save("big.png")       # also takes a Pillow image, an array (H, W, 3) uint8, a tensor in [0, 1]
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from inspect import signature
from os.path import exists, expanduser, realpath
from pathlib import Path

import torch

from models.gramsr import SETS, GramSR
from models.lpips import LPIPS
from models.s3diff import S3Diff
from models.support.arguments import (COUNT, SEED, Stop, between, command, existing, file_or_folder, folder,
                                      no_memory)
from models.support.evaluation import (append_row, average, find_metrics, find_references, measure, read_reference,
                                       hash_of, record_of, row_of, write_metrics, write_text)
from models.support.evaluation import report as as_text
from models.support.files import (PictureError, check_writable, claim, disk_full_or_read_only, find_pictures,
                                  output_paths, printable, writing)
from models.support.gpu import tune
from models.support.graphs import replay
from models.support.imaging import (GREY, as_input, as_output, chroma, contact_sheet, middle, read_made, read_picture,
                                    resize, round8, save_png, write_picture)
from models.support.page import figure_of, page_of
from models.support.strips import limit
from models.support.weights import EMBEDDED, WeightError, fetch_all, files_read, list_weights, read_system
from models.tiny import TinyGramSR, TinyS3Diff, TinyVOSR
from models.vosr import VOSR
from training import choose_dtype, compile_all, usable_device

EXAMPLE = Path(__file__).resolve().parent / "assets" / "example.png"
# by the name that model files carry, the class's in small letters
SYSTEMS = {system.__name__.lower(): system for system in (VOSR, S3Diff, GramSR, TinyVOSR, TinyS3Diff, TinyGramSR)}
STRENGTH = between(-100, 100)
KNOBS = {   # of the models: type, meaning. What is not given is a model's own setting, what it does not have an error
    "guidance": (STRENGTH, "1: one pass, no guidance. VOSR: smaller invents more. S3Diff: larger is sharper"),
    "steps": (COUNT, "VOSR: steps of the sampler, from 1 on"),
    "weak": (between(0, 1), "VOSR: strength of the weak condition that guidance starts from"),
    "temperature": (between(0, 100), "VOSR: deviation of the starting noise; one step: 0 is soft, 1 crisp"),
    "noise": (between(0, 1), "S3Diff: how noisy the picture is, in place of the estimate"),
    "blur": (between(0, 1), "S3Diff: how blurred the picture is, in place of the estimate"),
    "prompt": (str, "S3Diff: what the result should be, in words, in place of its own text"),
    "negative_prompt": (str, "S3Diff: what it should not be"),
    "start_step": (between(1, 999, whole=True), "S3Diff: below 999 the noise of that time is added first"),
    "pixel": (STRENGTH, "GramSR: strength of the pixel LoRA (all at 1: one pass)"),
    "semantic": (STRENGTH, "GramSR: strength of the semantic LoRA"),
    "texture": (STRENGTH, "GramSR: strength of the texture LoRA"),
    "tile": (between(64, 2**16, whole=True), "side of the tiles in output pixels, 64 or more"),
    "overlap": (COUNT, "pixels that tiles share"),
}
# torch 2.5 has none: it compiles for large images too
set_stance = getattr(torch.compiler, "set_stance", lambda stance: None)
COMPILED = "dit", "unet", "vit", "vae.encoder", "vae.decoder", "light_decoder"  # whichever of them a model has
Job = namedtuple("Job", "path name targets references")     # name: below the given folder; targets: one a model
SHEET_ROWS, SHEET_CROP, SWEEP_CROP = 8, 512, 256  # the sheet shows the middle of the first images, pixel by pixel
GONE = "argument --crisp: grain and drawn edges are gone, they cost fidelity and restored nothing; leave it out"


def parse_args(argv):
    p = argparse.ArgumentParser(description="Upscale pictures with diffusion super-resolution.")
    p.add_argument("pictures", nargs="*", type=file_or_folder, metavar="PICTURE",
                   help="pictures and folders of pictures (default: the example, and --model all)")
    p.add_argument("--out", type=folder, default="out", metavar="DIR", help="folder for the results (default out)")
    p.add_argument("--skip-existing", action="store_true", help="keep results that are in DIR: go on after a stop")
    # model
    p.add_argument("--model", type=expanduser, help="vosr-tiny (default), s3diff-tiny, gramsr-tiny, all (these three), "
                   "vosr-{0.5b,1.4b}[-1step], vosr-2, s3diff, gramsr, or a file or folder")
    p.add_argument("--device", type=usable_device, default="auto", help="cpu, cuda, cuda:1, mps; auto: the best here")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "tf32", "bfloat16", "float16"],
                   help="auto: float16 on cuda, else float32; tf32: float32 whose products a GPU rounds")
    p.add_argument("--compile", action="store_true", help="torch.compile: minutes once, then faster")
    p.add_argument("--no-graphs", dest="graphs", action="store_false", help="no CUDA graphs, which make pictures of a "
                   "size that comes again faster, and keep the memory that a network's pass needs")
    p.add_argument("--scale", type=between(1, 8), default=4, help="1 to 8 (4, what the models are trained for)")
    p.add_argument("--seed", type=SEED, default=0, help="of the noise; the same for every picture (default 0)")
    for name, (kind, meaning) in KNOBS.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=kind, help=meaning)
    p.add_argument("--crisp", help=argparse.SUPPRESS)
    p.add_argument("--paper", action="store_true", help="S3Diff: guidance, prompt and enlargement of the paper")
    p.add_argument("--color", choices=["adain", "wavelet", "none"], help="how to restore the input's colours")
    p.add_argument("--sweep", action="store_true", help="also a sheet OUT/sweep/<name>.png with the main knobs turned")
    # measuring and looking
    p.add_argument("--page", action="store_true", help="also OUT/page.html: before and after with a divider")
    p.add_argument("--ref", type=existing, metavar="DIR", help="references: a folder with the same names, or a picture")
    p.add_argument("--niqe", type=existing, metavar="FILE", help="niqe_pris_params.npz (default: in the weights cache)")
    p.add_argument("--list-weights", action="store_true", help="print the table of public weight files and end")
    p.add_argument("--fetch", action="store_true", help="fetch and check all public files that --model needs, and end; "
                   "--model also takes metrics, train_vosr, train_s3diff, train_gramsr here")
    args = p.parse_args(argv)
    if args.crisp is not None:
        p.error(GONE)
    if not args.pictures:
        args.pictures, args.model = [EXAMPLE], args.model or "all"
        args.ref = args.ref or EXAMPLE.with_name("example_hq.png")
    args.model = args.model or "vosr-tiny"
    args.dtype = choose_dtype(args.dtype, args.device, "float16")
    given = {name: getattr(args, name) for name in (*KNOBS, "paper", "color")}
    args.knobs = {name: value for name, value in given.items() if value is not None and value is not False}
    if args.tile and args.overlap and args.overlap >= args.tile:
        p.error(f"argument --overlap: {args.overlap} is not less than the tile's {args.tile}")
    return args


def find_system(name):
    """The system (a class) that --model means, by its name or by its files. Raises ValueError."""
    path = Path(name)
    if name in EMBEDDED:
        return SYSTEMS["tiny" + name.removesuffix("-tiny")]
    if not path.exists():
        return SYSTEMS.get(name.split("-")[0], VOSR)        # who says that there is no such model
    if path.suffix == ".pkl" or (path / "s3diff.pkl").is_file():
        return S3Diff
    if any(path.glob("model_*.pkl")) and not (path / "model.safetensors").is_file():     # which tiny ones have, too
        return GramSR
    system = read_system(path / "model.safetensors" if path.is_dir() else path) or "vosr"
    if system not in SYSTEMS:
        raise ValueError(f"{path}: is a model of {system}, which sample.py does not know; add it to SYSTEMS there")
    return SYSTEMS[system]


def load(name="vosr-tiny", device="auto", dtype="auto"):
    """A model as a function of an image.

    name, device, dtype: as on the command line -> nano(image, scale=4, seed=0, **knobs of the model's `upscale`)
    image: a path, a Pillow image, an array (H, W, 3) or (H, W) uint8, or a tensor (B, 3, H, W) in [0, 1]; the result is
    of the same kind, a Pillow image for a path. Raises OSError, ValueError.
    """
    name, device = expanduser(name), usable_device(device)
    dtype = choose_dtype(str(dtype).removeprefix("torch."), device, "float16")
    model = find_system(name).from_pretrained(name, device=device, dtype=dtype)

    def nano(image, scale=4, seed=0, **knobs):
        lq, alpha = as_input(image)
        return as_output(model.upscale(lq, scale=scale, seed=seed, **knobs), alpha, image)

    nano.model = model
    return nano


def to_compile(model):
    return [network for name, network in model.named_modules() if name in COMPILED]


def knobs_of(model, args):
    """The given knobs that this model has."""
    return {k: v for k, v in args.knobs.items() if k in signature(model.upscale).parameters}


def settings_of(name, model, files, args):
    """What a result depends on beside the image, as text that is kept in it.  files: of the model"""
    settings = {"model": name, "scale": args.scale, "seed": args.seed} | knobs_of(model, args)
    if exists(name):        # whose model may be another by now
        settings["weights"] = [hash_of(file)[:16] for file in files]
    return json.dumps(settings)


def kept_result(target, settings, lq, args):
    """The result of an earlier run with the same settings, where it is to be kept; else None."""
    if not (args.skip_existing and exists(target)):
        return None
    with suppress(PictureError):
        if read_made(target) == settings:
            size = tuple(round(side * args.scale) for side in lq.shape[2:])
            sr, _ = read_picture(target, size=size)
            if sr.shape[2:] == size:
                return sr
    return None


def upscale(name, model, path, lq, args):
    """Upscale one image, with a line on what was estimated.

    lq: (1, 3, H, W) in [0, 1] -> (1, 3, H * scale, W * scale), seconds. Raises PictureError.
    """
    start, knobs = time.perf_counter(), knobs_of(model, args)
    if "blur" in signature(model.upscale).parameters:
        knobs = dict(zip(("blur", "noise"), model.estimate(lq)[0].tolist())) | knobs
        print(f"{printable(path)}: blur {knobs['blur']:.3f}, noise {knobs['noise']:.3f}")
    if args.compile:        # of a map in strips every strip would be compiled anew
        small = lq.shape[2] * lq.shape[3] * args.scale**2 <= limit(args.device.type == "cuda")
        set_stance("default" if small else "force_eager")
    sr = model.upscale(lq, scale=args.scale, seed=args.seed, **knobs)
    if not sr.isfinite().all():
        bad = next((k for k, x in model.state_dict().items() if not x.isfinite().all()), None)      # takes seconds
        remedy = f"{name} has none in {bad}, get it again" if bad else "try --dtype float32"
        raise PictureError(f"{path}: the result is no number; {remedy}")
    return sr.cpu(), time.perf_counter() - start


def finish(job, lq, alpha, results, args, on_sheet):
    """Write the results of one image, unless they were there, and measure them. Raises PictureError.

    lq: (1, 3, H, W) in [0, 1]; alpha: (1, 1, H, W) or None; results: of `upscale`, of each model
    on_sheet: whether the sheet shows it -> rows of metrics.csv, [low quality, bicubic, ours ..., reference if any] or
    None, figure of the page or None, lines to print
    """
    size, name, rows, lines = results[0][0].shape[-2:], printable(job.path), [], []
    bicubic, grey = resize(lq, size), chroma(lq) < GREY
    alpha = None if alpha is None else resize(alpha, size)
    files = [round8(sr) for sr, _ in results]       # what they will hold is measured and shown
    for target, sr, (_, seconds), made in zip(job.targets, files, results, args.settings):
        if seconds is not None:
            write_picture(target, sr[:, :1] if grey else sr, alpha, made=made)
    hq, why = read_reference(job.name, job.references, size) if args.ref else (None, "")
    found, failed = measure(files, bicubic, hq, args.metrics, why, job.path)
    for top, target, figures, (_, seconds) in zip(args.folders, job.targets, found, results):
        made = f"{lq.shape[3]}x{lq.shape[2]} -> {printable(target)}: {size[1]}x{size[0]}"
        lines.append(f"{name}: {printable(target)} is kept" if seconds is None else f"{name}: {made}, {seconds:.2f} s")
        lines += [f"{name}: {as_text(figures)}"] * bool(figures)
        rows.append(row_of(target.relative_to(top).as_posix(), size, seconds, figures, args.absent | failed))
    shown = [x for x in (bicubic, *files, hq) if x is not None]
    figure = figure_of(rows, shown, args.names, args.shown) if args.page else None
    crops = None
    if on_sheet:        # copies, or the whole images would stay in memory
        crops = [middle(lq, round(SHEET_CROP / args.scale)).clone(), *(middle(x, SHEET_CROP).clone() for x in shown)]
    return rows, crops, figure, lines


def sweep(model, lq, job, path, args):
    """The middle of one picture with the model's knobs turned as its SWEEP says, as one sheet."""
    def show(turned):
        sr = model.upscale(lq, scale=args.scale, seed=args.seed, **knobs_of(model, args) | turned)
        return middle(sr.float().cpu(), SWEEP_CROP)

    results = [[show(turned) for turned in row] for row in model.SWEEP]
    captions = [[", ".join(f"{k} {v:g}" for k, v in turned.items()) for turned in row] for row in model.SWEEP]
    claim(path, job.path, args.inputs)
    save_png(contact_sheet(results, captions), path)
    print(printable(f"{job.path}: turned knobs: {path}"))


class Failures(list):
    """What went wrong, a line each, printed when it happens."""

    no_room = False         # whether the disk is full or read-only, so that other results cannot be written, either

    @contextmanager
    def at(self, path):
        """What a user may meet becomes a line, and the next picture's turn comes."""
        try:
            yield
            return
        except (PictureError, WeightError, OSError) as e:
            self.append(printable(e))
            self.no_room = self.no_room or disk_full_or_read_only(e)
        except RuntimeError as e:
            if not no_memory(e):
                raise
            self.append(printable(f"{path}: not enough memory; try --tile 256"))
        print(self[-1], file=sys.stderr)


def load_models(args):
    """The models by their names, and in args what they may be measured with. Raises OSError, ValueError."""
    names = [args.model]
    if args.model == "all":
        names = [name for name, file in EMBEDDED.items() if file.is_file()]
    files_read.clear(), hash_of.cache_clear()       # of the run before, in a notebook
    models = {name: find_system(name).from_pretrained(name, device=args.device, dtype=args.dtype) for name in names}
    files = [*files_read]
    args.metrics, args.absent, more = find_metrics(args.ref is not None, args.scale, args.niqe, args.device,
                                                   LPIPS.from_pretrained)
    args.measuring, args.files = bool(args.ref or args.metrics), [*files, *more]
    if other := set(args.knobs) - {knob for model in models.values() for knob in knobs_of(model, args)}:
        raise ValueError(f"--{min(other).replace('_', '-')} is no knob of {args.model}")
    for model in models.values():
        if args.sweep and not model.SWEEP:
            raise ValueError(f"--sweep: {args.model} has no knobs to turn")
        tile = args.tile or getattr(getattr(model, "cfg", None), "tile", 0)
        if tile and (args.overlap or 0) >= tile:
            raise ValueError(f"--overlap {args.overlap} is not less than the tile's {tile}")
        if isinstance(model, GramSR) and not (args.sweep or args.knobs.keys() & SETS.keys()):
            model.merge()
        if args.device.type == "cuda":
            tune(model)
        if args.compile:
            compile_all(to_compile(model), args.device)
        if args.device.type == "cuda" and args.graphs:
            torch.cuda.set_device(args.device)
            replay(model)
    args.settings = [settings_of(name, model, files, args) for name, model in models.items()]
    args.names = ["bicubic", *(Path(realpath(name)).name for name in names), *["reference"] * bool(args.ref)]
    settings = {name: getattr(args, name) for name in ("device", "dtype", "scale", "seed")} | args.knobs
    print(printable(", ".join([f"model {args.model}", *(f"{name} {value}" for name, value in settings.items())])))
    return models


class Report:
    """What stays of finished images: rows of metrics, the crops of the sheet, and on disk the figures of the page."""

    def __init__(self, args, n, failures):
        self.args, self.n, self.failures, self.failed_before = args, n, failures, len(failures)
        self.start, self.computed, self.rows, self.crops = time.monotonic(), 0, [], []
        self.tables = [top for top in args.folders if args.measuring and self.is_ours(top / "metrics.csv")]
        if args.page:       # beside the results, since it may be as large as they are
            args.out.mkdir(parents=True, exist_ok=True)
            self.figures = tempfile.TemporaryFile("w+", encoding="utf-8", dir=args.out)

    def is_ours(self, path):
        with suppress(PictureError):        # said at the end, in `summarise`
            claim(path, self.args.out, self.args.inputs)
            return True
        return False

    def add(self, rows, crops, figure, lines):
        """What `finish` returned: its rows go into metrics.csv at once. Raises WriteError."""
        for top, row in zip(self.args.folders, rows):
            if top in self.tables:
                append_row(top, row, first=not self.rows)
        self.rows.append(rows)
        if crops:
            self.crops.append(crops)
        if figure:
            with writing(self.args.out / "page.html"):
                self.figures.write(figure)
        if any(row["seconds"] is not None for row in rows):
            self.computed += 1
        if self.n > 1:
            lines[-1] += f"  [{self.progress()}]"
        print(*lines, sep="\n")

    def progress(self):
        """3 of 300, about 12 min left; what was there counts no time as long as something is computed"""
        done = len(self.rows) + len(self.failures) - self.failed_before
        if done == self.n:
            return f"{done} of {self.n}"
        left = (time.monotonic() - self.start) / (self.computed or done) * (self.n - done)
        said = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
        return f"{done} of {self.n}, about {said} left"

    def page(self):
        self.figures.seek(0)
        return self.figures.read()


def results_of(models, job, args):
    """One image by all models.  -> lq (1, 3, H, W), alpha or None, for each result, seconds (None = was there)"""
    lq, alpha = read_picture(job.path, note=print)
    results = []
    for top, target, settings, (name, model) in zip(args.folders, job.targets, args.settings, models.items()):
        kept = kept_result(target, settings, lq, args)
        if kept is not None:
            results.append((kept, None))
            continue
        results.append(upscale(name, model, job.path, lq, args))
        if args.sweep:
            sweep(model, lq, job, top / "sweep" / target.relative_to(top), args)
    return lq, alpha, results


def upscale_all(models, jobs, report, args, failures, stop):
    """Upscale one image after the other; each is written and measured while the next is computed.

    Ends early if the disk is full -> was it stopped by Ctrl-C?
    """
    stopped, waiting = False, []

    def collect():
        path, finished = waiting.pop(0)
        with failures.at(path):
            report.add(*finished.result())

    with ThreadPoolExecutor(1) as writer:
        for job in jobs:
            try:
                if stop:
                    raise KeyboardInterrupt
                with failures.at(job.path):
                    for target in job.targets:
                        claim(target, job.path, args.inputs)
                    with stop.droppable():
                        lq, alpha, results = results_of(models, job, args)
                    on_sheet = len(report.rows) + len(waiting) < SHEET_ROWS
                    waiting.append((job.path, writer.submit(finish, job, lq, alpha, results, args, on_sheet)))
            except KeyboardInterrupt:       # the image at hand is dropped
                stopped = True
                break
            if len(waiting) > 1:
                collect()
            if failures.no_room:
                break
        while waiting:
            collect()
    return stopped


def summarise(report, args, failures):
    """Write the sheet, the metrics and the page; print averages and how they were measured."""
    with failures.at(path := args.out / "sheet.png"):
        claim(path, args.out, args.inputs)
        captions = []
        for of_models in report.rows[: len(report.crops)]:
            seconds = ["" if row["seconds"] is None else f", {row['seconds']:.1f} s" for row in of_models]
            captions.append(["low quality", "bicubic", *(n + s for n, s in zip(args.names[1:], seconds)), "original"])
        save_png(contact_sheet(report.crops, captions), path)
        print(printable(f"before and after: {path}"))
    if not args.measuring and not args.page:
        return
    records = [record_of(list(rows), args.command, args.flags, args.absent, args.files) for rows in zip(*report.rows)]
    for name, top, record in zip(args.names[1:], args.folders, records):
        with failures.at(top):
            if args.measuring:
                said = f"{name}  " if len(records) > 1 else ""
                print(f"average  {said}{as_text(average(record['pictures'])) or 'of nothing'}")
                for file in ("metrics.csv", "metrics.json"):
                    claim(top / file, args.out, args.inputs)
                write_metrics(record, top)
    if args.measuring:
        print(f"protocol: {records[0]['protocol']}")
    with failures.at(path := args.out / "page.html"):
        if args.page:
            claim(path, args.out, args.inputs)
            write_text(path, page_of(report.page(), len(report.rows), args.names, records))
            print(printable(f"to look at: {path}"))


def main(argv=None):
    args = parse_args(argv)
    if args.list_weights:
        return list_weights()
    if args.fetch:
        try:
            return fetch_all(args.model, args.dtype)
        except WeightError as e:
            sys.exit(f"sample.py: {printable(e)}")
    args.flags = {name: value for name, value in vars(args).items() if name != "knobs"}
    args.command = shlex.join(["python", "sample.py", *(sys.argv[1:] if argv is None else argv)])
    failures, names = Failures(), {}
    for top in args.pictures:
        with failures.at(top):
            names |= find_pictures(top, print)
    try:
        check_writable(args.out)
        references = find_references(names.values(), args.ref, args.scale)
        models = load_models(args)
    except (OSError, ValueError) as e:
        sys.exit(f"sample.py: {printable(e)}")
    taken = ["sheet", *(f"sweep/{name.with_suffix('')}".lower() for name in names.values() if args.sweep)]
    args.folders = [args.out / name for name in models] if len(models) > 1 else [args.out]
    targets = zip(*(output_paths(names, top, taken) for top in args.folders))
    jobs = [Job(*job) for job in zip(names, names.values(), targets, references)]
    args.inputs = set(map(realpath, [*names, *sum(references, ())]))     # Path.resolve fails at loops of links
    args.shown = len(jobs) * len(args.names)
    report = Report(args, len(jobs), failures)
    with Stop() as stop:
        stopped = upscale_all(models, jobs, report, args, failures, stop)
        if report.rows and not failures.no_room:
            summarise(report, args, failures)
    if failures:
        print(f"done {len(report.rows)}, failed {len(failures)}:", *failures, sep="\n  ", file=sys.stderr)
    if stopped or failures.no_room:
        print(f"stopped after {len(report.rows)} of {len(jobs)}; add --skip-existing to go on", file=sys.stderr)
    return 130 if stopped else 1 if failures else 0


if __name__ == "__main__":
    command(main)
