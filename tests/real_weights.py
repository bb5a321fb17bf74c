"""The public weights against results that their authors' code made: the whole way, for whoever has the weights.

    python tests/real_weights.py                            gramsr, then vosr-2
    python tests/real_weights.py gramsr --dtype float32     one of them; --device and --dtype as sample.py has them

Fetches what the model needs (gramsr 4.2 GB, vosr-2 7.0 GB; nothing if it is here), and pictures of which such a result
is public, upscales them as sample.py does, and prints how near both results are: PSNR over RGB in decibels, with what
to expect. Status 1 where one is farther away.

gramsr   Nothing in it is random. What remains: their results are truncated to 8 bits before and after the colour fix,
         the LQ image too, which alone leaves 50 to 52 dB (measured on eight results of gramsr-tiny); float16; other
         kernels. Which strengths made the public results is not written anywhere; all at 1 is what the authors' script
         does.
vosr-2   One step from noise, and the noise of their results is not known. So theirs can be no nearer to ours than two
         of our own seeds are to each other: that is what to expect.

No result of vosr-0.5b, vosr-1.4b or s3diff on a known picture is public; their averages are in tests/RESULTS.md.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from models.support import weights  # noqa: E402
from models.support.arguments import command  # noqa: E402
from models.support.imaging import read_picture, resize, round8  # noqa: E402
from models.support.metrics import psnr  # noqa: E402
from sample import load  # noqa: E402
from training import choose_dtype, usable_device  # noqa: E402

GITHUB = "https://raw.githubusercontent.com"
LEAST = 40          # dB, of gramsr
SLACK = 2           # dB below what two seeds differ by


class Case(NamedTuple):
    """A picture with a public result.  name: to print; lq, theirs: names in FILES"""

    name: str
    lq: str
    theirs: str


# set of GramSR's results: pictures; the LQ images lie in OSEDiff's repository
GRAMSR = {"realsr": ("Nikon_024_LR4", "Nikon_050_LR4", "Canon_001_LR4"), "drealsr": ("Canon_10_x1", "sony_100_x1")}
VOSR_2 = "building", "landscape", "tiny_face", "tiny_text_english", "tiny_text_chinese"


def cases():
    """-> {model: list of Case}, {name in FILES: PublicFile} of their pictures"""
    found, files = {"gramsr": [], "vosr-2": []}, {}

    def file(repository, path):
        name = f"pictures/{repository}/{path}"
        files[name] = weights.PublicFile(name, (f"{GITHUB}/{repository}/HEAD/{path}",), (), "its authors'")
        return name

    for folder, names in GRAMSR.items():
        for name in names:
            lq = file("cswry/OSEDiff", f"preset/datasets/benchmark_{folder}/test_LR/{name}.png")
            found["gramsr"].append(Case(name, lq, file("aimagelab/GramSR", f"imgs/results/{folder}/{name}.png")))
    for name in VOSR_2:
        files_of_it = (file("ylchen333/ComfyUI-VOSR2", f"VOSR_cases/{name}/{kind}.png") for kind in ("lr", "vosr_2_0"))
        found["vosr-2"].append(Case(name, *files_of_it))
    return found, files


def compare(nano, case, seeds):
    """Upscale a picture, and compare the result with the public one, with bicubic and with our own other seed.

    nano: of `load`; seeds: ours -> PSNR in dB: ours against theirs, bicubic against theirs, ours against ours (or None)
    """
    lq, theirs = (read_picture(weights.fetch(name))[0] for name in (case.lq, case.theirs))
    size = theirs.shape[-2:]
    scale = size[1] / lq.shape[-1]
    ours = [round8(nano(lq, scale=scale, seed=seed)).cpu() for seed in seeds]
    if ours[0].shape[-2:] != size:
        raise weights.WeightError(f"{case.theirs}: is {size[1]}x{size[0]}, no enlargement of {case.lq}")
    between = psnr(*ours) if len(ours) > 1 else None
    return psnr(ours[0], theirs), psnr(resize(lq, size), theirs), between


def check(model, its_cases, device, precision):
    """Print a line for each picture.  precision: of --dtype -> whether all are as near as expected

    Raises OSError, ValueError.
    """
    dtype = choose_dtype(precision, device, "float16")
    if weights.fetch_all(model, dtype):
        return False
    nano, good = load(model, str(device), precision), True
    print(f"{model}, {device}, {dtype}: dB over RGB, against the result of the authors' code")
    print(f"{'picture':20} {'ours':>6} {'bicubic':>8}   expected")
    for case in its_cases:
        near, bicubic, between = compare(nano, case, (0, 1) if model == "vosr-2" else (0,))
        least = LEAST if between is None else between - SLACK
        expected = f"{LEAST} or more" if between is None else f"about {between:.2f}, as two seeds of ours"
        far = "" if near >= least else "  FARTHER AWAY"
        good = good and not far
        print(f"{case.name:20} {near:6.2f} {bicubic:8.2f}   {expected}{far}", flush=True)
    return good


def main(argv=None):
    found, files = cases()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(found)} (default both)")
    p.add_argument("--device", type=usable_device, default="auto", help="cpu, cuda, cuda:1, mps; auto: the best here")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "tf32", "bfloat16", "float16"],
                   help="auto: float16 on cuda, else float32")
    args = p.parse_args(argv)
    if unknown := set(args.models) - found.keys():
        p.error(f"{min(unknown)} is none of {', '.join(found)}")
    for name, row in files.items():
        weights.FILES.setdefault(name, row)
    good = True
    for model in args.models or found:
        try:
            good = check(model, found[model], args.device, args.dtype) and good
        except (OSError, ValueError) as e:
            print(f"real_weights.py: {e}", file=sys.stderr)
            good = False
    return 0 if good else 1


if __name__ == "__main__":
    command(main)
