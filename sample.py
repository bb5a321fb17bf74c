"""Upscale pictures, and measure the results where a reference or NIQE's parameter file is at hand.

    python sample.py                                 the example picture, by all embedded models side by side
    python sample.py photo.jpg holiday/ --out big    files and folders
    python sample.py lq/ --ref hq/ --page            PSNR, SSIM, LPIPS against these; a page to look at
    python sample.py --list-weights                  which public weight files exist, and which are here
    python sample.py --model s3diff --fetch          all files that a model needs, fetched and checked

Writes OUT/<name>.png for every image, OUT/sheet.png to compare the first eight by eye, metrics.csv and metrics.json of
what can be measured. Several models have a folder each in OUT. Two images at a time are held in memory.

In a notebook:

    from sample import load
    nano = load("vosr-tiny")
    nano("photo.jpg").save("big.png")       # also takes a Pillow image, an array (H, W, 3) uint8, a tensor in [0, 1]
"""

import argparse
import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from os.path import exists, expanduser, realpath
from pathlib import Path

import torch

from models.gramsr import SETS, GramSR
from models.lpips import LPIPS
from models.s3diff import S3Diff
from models.support.arguments import COUNT, SEED, Stop, between, command, existing, file_or_folder, folder
from models.support.evaluation import find_metrics, find_references, hash_of
from models.support.files import PictureError, check_writable, find_pictures, printable
from models.support.gpu import tune
from models.support.graphs import replay
from models.support.imaging import as_input, as_output, contact_sheet, middle, read_made, read_picture, save_png
from models.support.results import SHEET_ROWS, Failures, Made, Results, plan, return_memory
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
SWEEP_CROP = 256        # --sweep shows the middle of an image, so many pixels
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
    p.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs (default): "
                   "images of a size that comes again are faster, and the memory of a network's pass stays taken")
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
    p.add_argument("--border", type=between(0, 64, whole=True), metavar="PX",
                   help="cut off before PSNR and SSIM (default: the scale, as BasicSR; the papers' tables: 0)")
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
    args.border = round(args.scale) if args.border is None else args.border
    args.dtype = choose_dtype(args.dtype, args.device, "float16")
    if args.tile and args.overlap and args.overlap >= args.tile:
        p.error(f"argument --overlap: {args.overlap} is not less than the tile's {args.tile}")
    args.flags = dict(vars(args))       # these two for metrics.json
    args.command = shlex.join(["python", "sample.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def given_knobs(args):
    """Collect the knobs that were given on the command line.  -> {name: value}"""
    values = {name: getattr(args, name) for name in (*KNOBS, "paper", "color")}
    return {name: value for name, value in values.items() if value is not None and value is not False}


# ---- models


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


@dataclass
class Loaded:
    """A model, and how this run uses it."""
    name: str           # as --model says it
    label: str          # its column on sheet and page
    system: torch.nn.Module     # VOSR, S3Diff, GramSR, or what SYSTEMS has beside them
    knobs: dict         # those given on the command line that it has
    folder: Path        # where its results go
    settings: str       # what a result depends on beside the image: text that is kept in it


def load_models(args):
    """Load the models that --model means, as the flags want them.

    -> list of Loaded, files of weights. Raises OSError, ValueError.
    """
    names = [args.model]
    if args.model == "all":
        names = [name for name, file in EMBEDDED.items() if file.is_file()]
    hash_of.cache_clear()       # of the run before, in a notebook
    models, weights = [], []
    for name in names:
        files_read.clear()
        system = find_system(name).from_pretrained(name, device=args.device, dtype=args.dtype)
        knobs = knobs_of(system, args)
        folder = args.out / name if len(names) > 1 else args.out
        models.append(Loaded(name, Path(realpath(name)).name, system, knobs, folder, settings_of(name, knobs, args)))
        weights += files_read
    check_flags(models, args)
    for model in models:
        make_fast(model.system, args)
    settings = {name: getattr(args, name) for name in ("device", "dtype", "scale", "seed")} | given_knobs(args)
    print(printable(", ".join([f"model {args.model}", *(f"{name} {value}" for name, value in settings.items())])))
    return models, weights


def knobs_of(system, args):
    """Choose from the given knobs those that this system has."""
    return {k: v for k, v in given_knobs(args).items() if k in signature(system.upscale).parameters}


def settings_of(name, knobs, args):
    """Say what a result depends on beside the image, as text.  knobs: that the model has; its files were just read"""
    settings = {"model": name, "scale": args.scale, "seed": args.seed} | knobs
    if exists(name):        # whose model may be another by now
        settings["weights"] = [hash_of(file)[:16] for file in files_read]
    return json.dumps(settings)


def check_flags(models, args):
    """Raise ValueError where a flag means nothing to the models."""
    unknown = given_knobs(args).keys() - {knob for model in models for knob in model.knobs}
    if unknown:
        raise ValueError(f"--{min(unknown).replace('_', '-')} is no knob of {args.model}")
    for model in models:
        if args.sweep and not model.system.SWEEP:
            raise ValueError(f"--sweep: {args.model} has no knobs to turn")
        tile = args.tile or getattr(getattr(model.system, "cfg", None), "tile", 0)
        if tile and (args.overlap or 0) >= tile:
            raise ValueError(f"--overlap {args.overlap} is not less than the tile's {tile}")


def make_fast(system, args):
    """Merge GramSR's adapters unless their strengths are to change; take a GPU's ways; compile, where that is asked."""
    if isinstance(system, GramSR) and not (args.sweep or given_knobs(args).keys() & SETS.keys()):
        system.merge()
    if args.device.type == "cuda":
        tune(system)
    if args.compile:
        compile_all(to_compile(system), args.device)
    if args.graphs and args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        replay(system)


def to_compile(system):
    return [network for name, network in system.named_modules() if name in COMPILED]


# ---- images


def upscale(model, path, lq, args):
    """Upscale one image, with a line on what was estimated.

    model: Loaded; path: of the image; lq: (1, 3, H, W) in [0, 1] -> Made. Raises PictureError.
    """
    start, knobs = time.perf_counter(), model.knobs
    if "blur" in signature(model.system.upscale).parameters:
        blur, noise = model.system.estimate(lq)[0].tolist()
        knobs = {"blur": blur, "noise": noise} | knobs
        print(f"{printable(path)}: blur {knobs['blur']:.3f}, noise {knobs['noise']:.3f}")
    if args.compile:        # of a map in strips every strip would be compiled anew
        is_small = lq.shape[2] * lq.shape[3] * args.scale**2 <= limit(args.device.type == "cuda")
        set_stance("default" if is_small else "force_eager")
    sr = model.system.upscale(lq, scale=args.scale, seed=args.seed, **knobs)
    if not sr.isfinite().all():
        raise PictureError(f"{path}: the result is no number; {remedy_for_nan(model)}")
    return Made(sr.cpu(), time.perf_counter() - start)


def remedy_for_nan(model):
    """Say what a user can do about it; whether it is the file takes seconds to find out."""
    for name, tensor in model.system.state_dict().items():
        if not tensor.isfinite().all():
            return f"{model.name} has none in {name}, get it again"
    return "try --dtype float32"


def kept_result(model, target, lq, args):
    """Read the result of an earlier run with the same settings.  -> Made, or None where there is no such result"""
    if not exists(target):
        return None
    size = tuple(round(side * args.scale) for side in lq.shape[2:])
    with suppress(PictureError):
        if read_made(target) == model.settings:
            sr, _ = read_picture(target, size=size)
            if sr.shape[2:] == size:
                return Made(sr, seconds=None)
    return None


def upscale_by_each(models, job, results, args):
    """Upscale one image by all models.  -> lq (1, 3, H, W), alpha (1, 1, H, W) or None, list of Made"""
    lq, alpha = read_picture(job.path, note=print)
    made = []
    for model, target in zip(models, job.targets):
        kept = kept_result(model, target, lq, args) if args.skip_existing else None
        made.append(kept or upscale(model, job.path, lq, args))
        if args.sweep and not kept:
            path = model.folder / "sweep" / target.relative_to(model.folder)
            results.claim(path, job.path)
            save_png(sweep(model, lq, args), path)
            print(printable(f"{job.path}: turned knobs: {path}"))
    return lq, alpha, made


def sweep(model, lq, args):
    """Show the middle of an image with the model's knobs turned, as its SWEEP says.  -> Pillow image"""
    rows, captions = [], []
    for row in model.system.SWEEP:
        images = []
        for turned in row:
            sr = model.system.upscale(lq, scale=args.scale, seed=args.seed, **model.knobs | turned)
            images.append(middle(sr.float().cpu(), SWEEP_CROP))
        rows.append(images)
        captions.append([", ".join(f"{knob} {value:g}" for knob, value in turned.items()) for turned in row])
    return contact_sheet(rows, captions)


def upscale_all(models, jobs, results, args, stop):
    """Upscale one image after the other; each is written and measured while the next is computed.

    Ends early if the disk is full -> was it stopped by Ctrl-C?
    """
    failures, waiting = results.failures, []

    def collect():
        path, finished = waiting.pop(0)
        with failures.at(path):
            results.add(*finished.result())

    stopped = False
    with ThreadPoolExecutor(1) as writer:
        for job in jobs:
            try:
                if stop:
                    raise KeyboardInterrupt
                with failures.at(job.path):
                    for target in job.targets:
                        results.claim(target, job.path)
                    with stop.droppable():
                        lq, alpha, made = upscale_by_each(models, job, results, args)
                    on_sheet = len(results.rows) + len(waiting) < SHEET_ROWS
                    waiting.append((job.path, writer.submit(results.finish, job, lq, alpha, made, on_sheet)))
            except KeyboardInterrupt:       # the image at hand is dropped
                stopped = True
                break
            if len(waiting) > 1:
                collect()
            return_memory()
            if failures.no_room:
                break
        while waiting:
            collect()
    return stopped


def main(argv=None):
    args = parse_args(argv)
    if args.list_weights:
        return list_weights()
    if args.fetch:
        try:
            return fetch_all(args.model, args.dtype)
        except WeightError as e:
            sys.exit(f"sample.py: {printable(e)}")

    failures, names = Failures(), {}
    for top in args.pictures:
        with failures.at(top):
            names |= find_pictures(top, print)
    try:
        check_writable(args.out)
        references = find_references(names.values(), args.ref, args.scale)
        models, weights = load_models(args)
        metrics = find_metrics(args.ref is not None, args.border, args.niqe, args.device, LPIPS.from_pretrained)
    except (OSError, ValueError) as e:
        sys.exit(f"sample.py: {printable(e)}")

    jobs = plan(names, references, models, args.sweep)
    results = Results(args, models, weights, metrics, jobs, failures)
    with Stop() as stop:
        stopped = upscale_all(models, jobs, results, args, stop)
        if results.rows and not failures.no_room:
            results.summarise()
    if failures:
        print(f"done {len(results.rows)}, failed {len(failures)}:", *failures, sep="\n  ", file=sys.stderr)
    if stopped or failures.no_room:
        print(f"stopped after {len(results.rows)} of {len(jobs)}; add --skip-existing to go on", file=sys.stderr)
    if stopped:
        return 130
    return 1 if failures else 0


if __name__ == "__main__":
    command(main)
