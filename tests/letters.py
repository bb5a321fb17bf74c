"""Digits and letters, read: how many characters a restored image still shows, and whether they are whole.

    python tests/letters.py --train runs/regression             # a network of VOSR's size that is asked for the mean
    python tests/letters.py runs/regression runs/flow runs/distill

Models are those of --preset letters. 500 held-out cells (models/support/glyphs.py) are degraded by the recipe
`letters`, restored, and read by the nearest drawing. Printed for each model and some of its knobs:

    read        share of cells of which the right character is the nearest
    distance    to the nearest character, root mean square over pixels in [0, 1]: small where strokes are whole and
                the colours are right, whichever character it is
    PSNR        over RGB, dB
"""

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_vosr  # noqa: E402
import training  # noqa: E402
from degrade import RECIPES, degrade  # noqa: E402
from models.support import glyphs  # noqa: E402
from models.support.imaging import resize  # noqa: E402
from sample import find_system  # noqa: E402


class HeldOut(NamedTuple):
    """Cells to measure on."""

    hq: torch.Tensor            # (n, 3, 32, 32) in [0, 1]
    lq: torch.Tensor            # (n, 3, 8, 8) in [0, 1]
    cells: list                 # of glyphs.Cell, what is drawn in them


def held_out(world="digits", n=500):
    """Draw n cells to measure on, and degrade them, each by a plan of its own.  -> HeldOut"""
    hq, cells = glyphs.held_out(world, n)
    recipe = replace(RECIPES["letters"], branches_per="image")
    lq, _ = degrade(hq, recipe, training.generator(training.HELD_OUT_IMAGES, n))
    return HeldOut(hq, lq, cells)


def restored(model, lq, at_once=100, **knobs):
    """What a model makes of LQ cells, each from noise of its own.  lq: (n, 3, 8, 8) -> (n, 3, 32, 32)"""
    parts = [model.upscale(part, seed=i, **knobs).cpu() for i, part in enumerate(lq.split(at_once))]
    return torch.cat(parts)


def measure(x, hq, cells, world="digits"):
    """-> read, distance, PSNR of images x: (n, 3, 32, 32)"""
    share, distances = glyphs.read(world, x, cells)
    return share, float(distances.mean()), training.psnr(2 * x - 1, 2 * hq - 1)


def read_by_correlation(lq, cells, world="digits"):
    """The share of LQ cells that can be read without restoring them: by correlation with shrunken drawings.

    lq: (n, 3, 8, 8); about what can be known where blur and noise are not
    """
    drawn = glyphs.templates(world, cells)      # (n, characters, 3, 32, 32)
    shrunken = F.avg_pool2d(drawn.flatten(1, 2), 4).unflatten(1, drawn.shape[1:3]).flatten(2)
    seen = lq.flatten(1)[:, None]
    shrunken, seen = (x - x.mean(2, keepdim=True) for x in (shrunken, seen))
    number = F.cosine_similarity(shrunken, seen, dim=2).argmax(1)
    characters, _ = glyphs.WORLDS[world]
    return sum(characters[k] == cell.character for k, cell in zip(number.tolist(), cells)) / len(cells)


def knobs_of(model):
    """What to show of a model: {words: knobs of `upscale`}"""
    if not hasattr(model, "dit"):
        return {"": {}}
    if model.dit.r_embedder:        # of one step
        return {f"one step, temperature {T:g}": {"temperature": T} for T in (0, 0.5, 1)} | {"2 steps": {"steps": 2}}
    rows = {"one step, temperature 0": {"steps": 1, "temperature": 0.0}}
    rows |= {f"{n} steps": {"steps": n} for n in (1, 4, 16)}
    return rows | {f"16 steps, guidance {g:g}": {"steps": 16, "guidance": g} for g in (0, 0.5, 1.5)}


# ---- regression: the same network, asked for the least squared error


def regression_losses(run, model, hq, lq_up, g):
    """Compute the squared error of a network that sees no noise, and whose velocity leads from 0 to the latent."""
    z_hq, z_lq, feat = train_vosr.encode(model, hq, lq_up, g)
    v = model.dit(torch.zeros_like(z_lq), z_lq, feat, torch.ones(len(z_lq), device=z_lq.device))
    return {"flow": F.mse_loss(v.float(), -z_hq)}


def ask_for_the_mean(script):
    """Change train_vosr.py's module so that stage flow is regression, whose answer is one step at temperature 0."""
    script.LOSSES["flow"] = regression_losses
    cfg, stages = script.PRESETS["letters"]
    script.PRESETS["letters"] = replace(cfg, steps=1), stages
    script.new_transformers = lambda cfg, ablation: script.TinyVOSR(replace(cfg, temperature=0.0))


def train_regression(out, more):
    """Train it.  more: further flags of train_vosr.py -> exit status"""
    ask_for_the_mean(train_vosr)
    flags = ["--preset", "letters", "--stage", "flow", "--out", out, *more]
    if "--data" not in more:
        flags += ["--data", "digits"]
    with training.one_line_errors("train_vosr"):
        return train_vosr.main(flags)


# ---- the trainings that a figure or a claim needs


def trained(world="digits", folder=ROOT / "runs" / "letters", seed=0, names=("flow", "distill")):
    """Train what is not there yet, one after the other.  -> {name: folder}; `distill` goes on from `flow`"""
    folders = {name: Path(folder, f"{world}-{seed}", name) for name in names}
    for name, out in folders.items():
        if is_over(out):
            continue
        if name == "regression":
            words = ["tests/letters.py", "--train", out]
        else:
            words = ["train_vosr.py", "--preset", "letters", "--stage", name, "--out", out]
        if name == "distill":
            words += ["--init", folders["flow"]]
        command = [sys.executable, *words, "--data", world, "--seed", seed]
        subprocess.run([str(word) for word in command], check=True, cwd=ROOT)
    return folders


def is_over(out):
    """Tell whether the training in a folder has done its last step."""
    found = training.checkpoints(out)
    return bool(found) and torch.load(found[0], map_location="cpu", weights_only=True)["over"]


# ---- the command


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*", help="--out folders of trainings")
    p.add_argument("--world", choices=glyphs.WORLDS, default="digits")
    p.add_argument("--train", metavar="OUT", help="train a regression; further flags are train_vosr.py's")
    args, more = p.parse_known_args()
    if args.train:
        sys.exit(train_regression(args.train, more))
    hq, lq, cells = held_out(args.world)
    print(f"{len(cells)} cells of {args.world}; read from LQ by correlation: "
          f"{read_by_correlation(lq, cells, args.world):.3f}")
    print("| model | | read | distance | PSNR | seconds |\n|---|---|---|---|---|---|")
    share, distance, psnr = measure(resize(lq, 4), hq, cells, args.world)
    print(f"| bicubic | | {share:.3f} | {distance:.4f} | {psnr:.2f} | |")
    for path in args.models:
        model = find_system(path).from_pretrained(path)
        knobs = {"": {}} if "regression" in Path(path).name else knobs_of(model)
        for words, chosen in knobs.items():
            start = time.process_time()
            x = restored(model, lq, **chosen)
            seconds = time.process_time() - start
            share, distance, psnr = measure(x, hq, cells, args.world)
            print(f"| {Path(path).name} | {words} | {share:.3f} | {distance:.4f} | {psnr:.2f} | {seconds:.1f} |",
                  flush=True)


if __name__ == "__main__":
    main()
