"""The table of claims: what the three papers say, measured at the size of the tiny lab, several seeds each.

    python tests/lab.py --data PHOTOS --niqe niqe_pris_params.npz --out runs/lab [--only fig9 table5] [--seeds 3] [--jobs 2]
    python tests/lab.py ... --only weak visual invents --steps 1300 --jobs 9        # on a GPU six minutes, 2,600 steps each

The variants of a claim differ in one thing and see as many photos; those of "systems" learn 2.6 to 2.8 million numbers each, in about the same time.
They are measured on photos held out, under s3diff's degradation, or on the pairs of two folders: PSNR-Y, SSIM-Y, NIQE, and two distances of random
features, which need no classifier (models/tiny_losses.py): RFD, that of LPIPS, and Gram, that of their Gram matrices. A claim is "seen" where
all that should be better is, by more than two standard errors of the differences seed by seed, "refuted" where any of it is worse by as much, else
"undecided". Claims named digits-... need no photos: they are of cells with a digit each, which can be read (tests/letters.py). Runs and figures that
are there stay: started again, it goes on. Curves of the runs: OUT/<claim>.png; pictures of the first seed: OUT/<claim>-sheet.png.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import letters  # noqa: E402
from baseline import Baseline  # noqa: E402
from degrade import RECIPES, degrade  # noqa: E402
from models.gram import loss_gram  # noqa: E402
from models.support.charts import loss_curves  # noqa: E402
from models.support.evaluation import METRICS, find_metrics  # noqa: E402
from models.support.files import find_pictures  # noqa: E402
from models.support.imaging import contact_sheet, read_picture, resize, save_png  # noqa: E402
from models.tiny_losses import RandomLPIPS  # noqa: E402
from sample import find_system  # noqa: E402
from training import choose_device, choose_dtype, generator, photos_for  # noqa: E402

STEPS = 200
CROP, HELD_OUT = 224, 8         # pixels of a held-out photo, which fits in four tiles of VOSR's; photos
DIGITS = ("read", "distance", "psnr")       # as `letters.measure` has them
BETTER = {"psnr_y": 1, "ssim_y": 1, "niqe": -1, "rfd": -1, "gram": -1, "read": 1, "distance": -1, "psnr": 1}    # larger, smaller
SHOWN = {m: (METRICS[m][0], f".{METRICS[m][1]}f") for m in ("psnr_y", "ssim_y", "niqe")} | {"rfd": ("RFD", ".4f"), "gram": ("Gram", ".2e")}
SHOWN |= {"read": ("read", ".3f"), "distance": ("distance", ".4f"), "psnr": ("PSNR", ".2f")}


# ---- what is trained


@dataclass
class Training:
    flags: str                  # of the script
    share: float = 1.0          # of --steps
    after: str = ""             # name of the training it goes on from
    script: str = "train_s3diff.py --preset tiny --stage adapters"
    instead: str = ""           # Python that changes the script's module, called `script`, before it runs
    data: str = ""              # "digits"; else --data


def gramsr(stage, after="", share=1.0, flags="", instead=""):
    return Training(f"--stage {stage} {flags}", share, after, "train_gramsr.py --preset tiny", instead)


def vosr(stage, flags="", after="", share=1.0, instead=""):
    return Training(f"--stage {stage} {flags}", share, after, "train_vosr.py --preset tiny", instead)


def digits(script, stage, after="", flags="", instead=""):
    """A training of --preset letters."""
    return Training(f"--stage {stage} {flags}", 1.0, after, f"train_{script}.py --preset letters", instead, "digits")


# the good prompt takes the place of the picture's own tokens
TEXT = "script.TinyGramSR.tokens = lambda self, x: self.prompts[:1].expand(len(x), -1, -1) + 0 * self.adapter[2].bias"
NARROW = "cfg = script.PRESETS['tiny'][0]\ncfg.dit = script.replace(cfg.dit, hidden_size=128)"
TRAININGS = {
    "s3diff": Training(""),
    "no prior": Training("--init none"),
    "unet": Training("--lora unet"),
    "unet+decoder": Training("--lora unet+decoder"),
    "all": Training("--lora unet+encoder+decoder"),
    "plain": Training("--modulation none"),
    "shared": Training("--modulation shared"),
    "no negatives": Training("--neg-prob 0"),
    "rank 4": Training("--rank-unet 4 --rank-vae 1"),
    "rank 16": Training("--rank-unet 16 --rank-vae 4"),
    "rank 64": Training("--rank-unet 64 --rank-vae 16"),
    "t 500": Training("--start-step 500"),
    "t 999": Training("--start-step 999"),
    "pixel": gramsr("pixel"),
    "semantic": gramsr("semantic", "pixel", 0.5),
    "texture": gramsr("texture", "semantic", 0.5),
    "text": gramsr("pixel", instead=TEXT),
    "flow": vosr("flow", "--init vosr-tiny", share=2),
    "flow, no tokens": vosr("flow", "--init vosr-tiny --ablate tokens", share=2),
    "flow, no weak condition": vosr("flow", "--init vosr-tiny --ablate weak", share=2),
    "RCGM": vosr("distill", "--distill rcgm", "flow", 1 / 26),        # 50 of 1,300
    "shortcut": vosr("distill", "--distill shortcut", "flow", 1 / 26),
    # as large and as long as "s3diff"
    "control group": Training("--width 106", 0.55, script="tests/baseline.py"),
    "small pixel": gramsr("pixel", share=0.7, flags="--rank 11"),
    "small semantic": gramsr("semantic", "small pixel", 0.15, "--rank 11"),
    "small gramsr": gramsr("texture", "small semantic", 0.15, "--rank 11"),
    "small flow": vosr("flow", "--init vosr-tiny", "", 0.75, NARROW),
    "small vosr": vosr("distill", "", "small flow", 0.08, NARROW),

    "digits regression": digits("vosr", "flow", instead="import letters\nletters.ask_for_the_mean(script)"),
    "digits flow": digits("vosr", "flow"),
    "digits flow, no tokens": digits("vosr", "flow", flags="--ablate tokens"),
    "digits flow, no weak condition": digits("vosr", "flow", flags="--ablate weak"),
    "digits RCGM": digits("vosr", "distill", "digits flow"),
    "digits shortcut": digits("vosr", "distill", "digits flow", "--distill shortcut"),
    "digits prior": digits("s3diff", "prior"),
    "digits estimator": digits("s3diff", "estimator", "digits prior"),
    "digits s3diff": digits("s3diff", "adapters", "digits estimator"),
    "digits unet": digits("s3diff", "adapters", "digits estimator", "--lora unet"),
    "digits unet+decoder": digits("s3diff", "adapters", "digits estimator", "--lora unet+decoder"),
    "digits plain": digits("s3diff", "adapters", "digits estimator", "--modulation none"),
    "digits shared": digits("s3diff", "adapters", "digits estimator", "--modulation shared"),
    "digits no negatives": digits("s3diff", "adapters", "digits estimator", "--neg-prob 0"),
    "digits rank 4": digits("s3diff", "adapters", "digits estimator", "--rank-unet 4 --rank-vae 1"),
    "digits rank 64": digits("s3diff", "adapters", "digits estimator", "--rank-unet 64 --rank-vae 16"),
    "digits pixel": digits("gramsr", "pixel", "digits prior"),
    "digits semantic": digits("gramsr", "semantic", "digits pixel"),
    "digits texture": digits("gramsr", "texture", "digits semantic"),
    "digits text": digits("gramsr", "pixel", "digits prior", instead=TEXT),
}


# ---- what is claimed


@dataclass
class Claim:
    paper: str
    words: str
    variants: dict              # name: (training, knobs of `upscale`)
    better: list                # (metric, variant, than variant)
    like: list = field(default_factory=list)        # (metric, variant, variant): no difference is claimed
    world: str = "photos"       # or "digits", which need no --data


def trained(*names, **knobs):
    return {name: (name, knobs) for name in names}


def told(score):
    return {f"scores {score:g}": ("s3diff", {"blur": score, "noise": score})}


def guided(name, *guidances):
    return {f"{name}, guidance {g:g}": (name, {"guidance": g}) for g in guidances}


def many(name, guidance=1.0):
    return {f"{name}, guidance {guidance:g}": (name, {"guidance": guidance, "steps": 10})}


CLAIMS = {
    "fig9": Claim("S3Diff, Figure 9", "a prior makes training faster and better", trained("s3diff", "no prior"),
                  [(m, "s3diff", "no prior") for m in ("psnr_y", "rfd")]),
    "table4": Claim("S3Diff, Table 4", "adapters in the encoder help, in the decoder they cost realism",
                    trained("s3diff", "unet", "unet+decoder", "all"),
                    [("rfd", "s3diff", "unet"), ("niqe", "s3diff", "all"), ("niqe", "unet", "unet+decoder")]),
    "table5": Claim("S3Diff, Table 5", "modulated LoRA beats plain, a C for each block beats one for all",
                    trained("s3diff", "shared", "plain"),
                    [(m, "s3diff", other) for m in ("psnr_y", "rfd") for other in ("plain", "shared")]),
    "table6": Claim("S3Diff, Table 6", "negatives in training make guidance useful",
                    guided("s3diff", 1, 1.2) | guided("no negatives", 1, 1.2),
                    [("niqe", "s3diff, guidance 1.2", "s3diff, guidance 1"),
                     ("niqe", "s3diff, guidance 1.2", "no negatives, guidance 1.2")]),
    "table7": Claim("S3Diff, Table 7", "low ranks cost fidelity, high ones gain nothing more",
                    trained("rank 4", "rank 16", "s3diff", "rank 64"),
                    [("psnr_y", "s3diff", "rank 4")], [("psnr_y", "s3diff", "rank 64")]),
    "table8": Claim("S3Diff, Table 8", "a later time at the start trades fidelity for invention",
                    trained("s3diff", "t 500", "t 999"),
                    [("psnr_y", "s3diff", "t 500"), ("psnr_y", "t 500", "t 999"), ("niqe", "t 999", "s3diff")]),
    "scores": Claim("S3Diff, 4.4", "estimated scores are the best ones",
                    trained("s3diff") | told(0) | told(0.25) | told(0.5) | told(1),
                    [("psnr_y", "s3diff", f"scores {score:g}") for score in (0, 0.5, 1)]),
    "sets": Claim("GramSR", "each LoRA set adds what its loss asks for", trained("pixel", "semantic", "texture"),
                  [("psnr_y", "pixel", "texture"), ("rfd", "semantic", "pixel"), ("gram", "texture", "semantic")]),
    "tokens": Claim("GramSR", "visual tokens beat a text", trained("pixel", "text"),
                    [(m, "pixel", "text") for m in ("psnr_y", "rfd")]),
    "weak": Claim("VOSR", "guidance from a weak condition beats guidance from none",
                  many("flow", 0.5) | many("flow, no weak condition", 0.5),
                  [(m, "flow, guidance 0.5", "flow, no weak condition, guidance 0.5") for m in ("psnr_y", "rfd")]),
    "visual": Claim("VOSR", "visual tokens help", many("flow") | many("flow, no tokens"),
                    [(m, "flow, guidance 1", "flow, no tokens, guidance 1") for m in ("psnr_y", "rfd")]),
    "invents": Claim("VOSR", "less guidance invents more", many("flow", 0.5) | many("flow", 1),
                     [("niqe", "flow, guidance 0.5", "flow, guidance 1"), ("psnr_y", "flow, guidance 1", "flow, guidance 0.5")]),
    "distill": Claim("VOSR", "RCGM beats shortcut", trained("RCGM", "shortcut"), [("rfd", "RCGM", "shortcut"), ("niqe", "RCGM", "shortcut")]),
    "systems": Claim("all three", "a diffusion prior looks better than regression", trained("s3diff", "small gramsr", "small vosr", "control group"),
                     [(m, name, "control group") for name in ("s3diff", "small gramsr", "small vosr") for m in ("niqe", "rfd")]),
}


def in_digits(name, **knobs):
    return {f"{name}{''.join(f', {k} {v:g}' for k, v in knobs.items())}": (f"digits {name}", knobs)}


def of_digits(paper, words, variants, better, like=()):
    return Claim(paper, words, variants, better, list(like), "digits")


CLAIMS |= {     # the same and more where digits can be read: read, distance from the nearest digit, PSNR
    "digits-steps": of_digits(
        "all flows", "a sample costs fidelity, up to twice the least error", in_digits("flow", steps=1, temperature=0)
        | in_digits("flow", steps=4) | in_digits("flow", steps=16),
        [("psnr", "flow, steps 1, temperature 0", "flow, steps 16"), ("read", "flow, steps 1, temperature 0", "flow, steps 16")]),
    "digits-ghosts": of_digits(
        "all three", "a diffusion model's digits are whole where regression paints ghosts", in_digits("regression")
        | in_digits("RCGM") | in_digits("flow", steps=16) | in_digits("s3diff") | in_digits("texture"),
        [("distance", name, "regression") for name in ("RCGM", "flow, steps 16", "s3diff", "texture")]),
    "digits-distill": of_digits(
        "VOSR", "one step paints ghosts before distillation, and a digit after it",
        in_digits("flow", steps=1) | in_digits("RCGM"), [("distance", "RCGM", "flow, steps 1")]),
    "digits-rcgm": of_digits(
        "VOSR", "RCGM beats shortcut", in_digits("RCGM") | in_digits("shortcut"),
        [(m, "RCGM", "shortcut") for m in ("read", "distance")]),
    "digits-guidance": of_digits(
        "VOSR", "less guidance invents more", in_digits("flow", guidance=0) | in_digits("flow", guidance=0.5)
        | in_digits("flow"), [("read", "flow", "flow, guidance 0.5"), ("read", "flow, guidance 0.5", "flow, guidance 0")]),
    "digits-weak": of_digits(
        "VOSR", "guidance from a weak condition beats guidance from none", in_digits("flow", guidance=0.5)
        | in_digits("flow, no weak condition", guidance=0.5, weak=0),
        [(m, "flow, guidance 0.5", "flow, no weak condition, guidance 0.5, weak 0") for m in ("read", "distance")]),
    "digits-visual": of_digits(
        "VOSR", "visual tokens help", in_digits("flow") | in_digits("flow, no tokens"),
        [(m, "flow", "flow, no tokens") for m in ("read", "psnr")]),
    "digits-table4": of_digits(
        "S3Diff, Table 4", "adapters in the encoder help, in the decoder they do not", in_digits("s3diff") | in_digits("unet")
        | in_digits("unet+decoder"), [("read", "s3diff", "unet"), ("read", "s3diff", "unet+decoder")]),
    "digits-table5": of_digits(
        "S3Diff, Table 5", "modulated LoRA beats plain, a C for each block beats one for all",
        in_digits("s3diff") | in_digits("shared") | in_digits("plain"),
        [("read", "s3diff", other) for other in ("plain", "shared")]),
    "digits-table6": of_digits(
        "S3Diff, Table 6", "negatives in training make guidance useful", in_digits("s3diff", guidance=1)
        | in_digits("s3diff", guidance=1.3) | in_digits("no negatives", guidance=1.3),
        [("distance", "s3diff, guidance 1.3", other) for other in ("s3diff, guidance 1", "no negatives, guidance 1.3")]),
    "digits-table7": of_digits(
        "S3Diff, Table 7", "low ranks cost fidelity, high ones gain nothing more",
        in_digits("rank 4") | in_digits("s3diff") | in_digits("rank 64"),
        [("psnr", "s3diff", "rank 4")], [("psnr", "s3diff", "rank 64")]),
    "digits-scores": of_digits(
        "S3Diff, 4.4", "estimated scores are the best ones", in_digits("s3diff") | in_digits("s3diff", blur=0, noise=0)
        | in_digits("s3diff", blur=0.5, noise=0.5) | in_digits("s3diff", blur=1, noise=1),
        [("read", "s3diff", f"s3diff, blur {x:g}, noise {x:g}") for x in (0, 0.5, 1)]),
    "digits-sets": of_digits(
        "GramSR", "semantic and texture sharpen what pixel blurs", in_digits("pixel") | in_digits("semantic")
        | in_digits("texture"), [("psnr", "pixel", "texture"), ("distance", "texture", "pixel")]),
    "digits-tokens": of_digits(
        "GramSR", "visual tokens beat a text", in_digits("pixel") | in_digits("text"),
        [(m, "pixel", "text") for m in ("read", "psnr")]),
}


# ---- training


def run(name, seed, args):
    """One training on one core, to its end or from where it was; its `after` must be there -> its folder"""
    what, out = TRAININGS[name], folder(name, seed, args)
    init = ["--init", folder(what.after, seed, args)] if what.after else []
    script, *flags = f"{what.script} {what.flags}".split()
    module = Path(script).stem
    code = f"import {module} as script\n{what.instead}\nwith script.training.one_line_errors('{module}'):\n    script.main()"
    words = [*flags, *init, "--data", what.data or args.data.resolve(), "--out", out, "--seed", seed, "--keep", 1]
    if steps := steps_of(name, args):
        words += ["--steps", steps, "--save-every", max(steps // 6, 1)]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "train.txt", "a") as log:
        subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True, stdout=log, stderr=log, cwd=ROOT,
                       env=os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))})
    return out


def folder(name, seed, args):
    return (args.out / f"{name.replace(' ', '_').replace(',', '')}-{seed}").resolve()


def steps_of(name, args):
    """How many steps a training has, None = as its preset has it: of digits, unless --steps is given."""
    what = TRAININGS[name]
    if what.data == "digits" and not args.steps:
        return None
    return round(what.share * (args.steps or STEPS))


def is_done(name, seed, args):
    """Whether its last step is done."""
    steps, at = steps_of(name, args), folder(name, seed, args)
    if steps is None:
        return letters.is_over(at)
    log = at / "log.csv"
    return log.exists() and log.read_text().rpartition("\n")[0].rpartition("\n")[2].split(",")[0] == str(steps)


def train_all(names, args):
    """What the claims need and what that goes on from, the earlier stages first."""
    rounds = [set(names)]
    while after := {TRAININGS[name].after for name in rounds[0]} - {""}:
        rounds.insert(0, after)
    for names in rounds:
        todo = [(seed, name) for seed in range(args.seeds) for name in sorted(names) if not is_done(name, seed, args)]
        with ThreadPoolExecutor(args.jobs) as pool:
            for (seed, name), job in [(t, pool.submit(run, t[1], t[0], args)) for t in todo]:
                print(f"trained {job.result()}", flush=True)


# ---- measuring


def distances():
    """-> {metric: f(x, hq)}: those of random features"""
    random = RandomLPIPS().eval()

    @torch.no_grad()
    def gram(x, hq):
        pairs = zip(random.unit_features(2 * x - 1), random.unit_features(2 * hq - 1))
        return float(sum(loss_gram(a.flatten(2).mT, b.flatten(2).mT, channels=True, normalise=False) for a, b in pairs))

    return {"rfd": lambda x, hq: random(2 * x - 1, 2 * hq - 1).item(), "gram": gram}


class Bicubic:
    def upscale(self, lq, seed=0):
        return resize(lq, 4)


def measured(model, knobs, pairs, metrics):
    """-> {metric: mean over pairs}; pairs: of `pairs_of`"""
    if isinstance(pairs, letters.HeldOut):
        return dict(zip(DIGITS, letters.measure(letters.restored(model, pairs.lq, **knobs), pairs.hq, pairs.cells)))
    results = [(model.upscale(lq, seed=i, **knobs).cpu(), hq) for i, (hq, lq) in enumerate(pairs)]
    return {name: fmean(metric(x, hq) for x, hq in results) for name, metric in metrics.items()}


def key_of(variant, knobs, seed, args):
    """Of figures.json."""
    return f"{variant} {knobs} {seed} {args.steps or STEPS}"


def pairs_of(world, args):
    """What is measured on.  -> [(hq, lq)], or for digits a letters.HeldOut"""
    if world == "digits":
        return letters.held_out()
    if args.pairs:
        lq, hq = args.pairs
        return [(read_picture(path)[0], read_picture(lq / path.name)[0]) for path in find_pictures(hq)]
    crops = photos_for(args.data, CROP, 0)[1][: 2 * HELD_OUT : 2]
    lq, _ = degrade(crops, replace(RECIPES["s3diff"], branches_per="image"), generator(0))
    return list(zip(crops.split(1), lq.split(1)))


def load(at):
    """The system, or the control group, that a training has left in a folder."""
    device = choose_device("auto")
    if (at / "baseline.pt").exists():
        return Baseline.from_pretrained(at).to(device)
    return find_system(at).from_pretrained(at, device=device)


def measure_all(claims, world, pairs, args):
    """-> bicubic's {metric: value}, {variant: {metric: [value of each seed]}}, kept in figures.json, or that of the pairs"""
    of_pairs = [folder.name for folder in args.pairs or []] if world == "photos" else [world]
    path = args.out / ("-".join(["figures", *of_pairs]) + ".json")
    known = json.loads(path.read_text()) if path.exists() else {}
    metrics = DIGITS if world == "digits" else find_metrics(True, 4, args.niqe)[0] | distances()
    if "bicubic" not in known:
        known["bicubic"] = measured(Bicubic(), {}, pairs, metrics)
    for claim in claims:
        for variant, (name, knobs) in claim.variants.items():
            for seed in range(args.seeds):
                if (key := key_of(variant, knobs, seed, args)) not in known:
                    known[key] = measured(load(folder(name, seed, args)), knobs, pairs, metrics)
                    path.write_text(json.dumps(known, indent=1))

    return known["bicubic"], {variant: {m: [known[key_of(variant, knobs, seed, args)][m] for seed in range(args.seeds)] for m in metrics}
                              for claim in claims for variant, (_, knobs) in claim.variants.items()}


# ---- the table


def compare(metric, a, b):
    """1 where figures a are better than b, -1 where worse, 0 where that is open: within two standard errors, or there are none.

    a, b: a figure for each seed, compared seed by seed, since data and first weights are the same
    """
    if not a or not b:
        return 0
    gaps = [BETTER[metric] * (x - y) for x, y in zip(a, b)]
    standard_error = stdev(gaps) / len(gaps) ** 0.5
    if abs(fmean(gaps)) <= 2 * standard_error:
        return 0
    return 1 if fmean(gaps) > 0 else -1


def verdict(claim, figures):
    found = [compare(m, figures[a].get(m), figures[b].get(m)) for m, a, b in claim.better]
    found += [1 - 2 * abs(compare(m, figures[a].get(m), figures[b].get(m))) for m, a, b in claim.like]
    if min(found) < 0:
        return "refuted"
    return "seen" if min(found) > 0 else "undecided"


def draw(key, claim, args):
    """How fast the first seed's runs learn: PSNR of the held-out photos, or VOSR's held-out loss."""
    curves = {}
    for name in dict.fromkeys(name for name, _ in claim.variants.values()):
        with open(folder(name, 0, args) / "log.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["held_out"]]
        curves[name] = [(int(row["step"]), float(row.get("psnr") or row["held_out"])) for row in rows]
    loss_curves(curves, args.out / f"{key}.png", title=claim.words)


def show(key, claim, pairs, args):
    """Two of the pictures, of digits eight, by the first seed's variants, with the seconds of each."""
    if isinstance(pairs, letters.HeldOut):
        pairs = list(zip(pairs.hq[:8].split(1), pairs.lq[:8].split(1)))
        pairs = [(torch.cat([hq for hq, _ in pairs], dim=3), torch.cat([lq for _, lq in pairs], dim=3))]
    rows = [[lq, resize(lq, 4)] for _, lq in pairs[:2]]
    captions = [["low quality", "bicubic"] for _ in rows]
    for variant, (name, knobs) in claim.variants.items():
        model = load(folder(name, 0, args))
        for (_, lq), row, said in zip(pairs, rows, captions):
            start = time.perf_counter()
            row.append(model.upscale(lq, **knobs).cpu())
            said.append(f"{variant}, {time.perf_counter() - start:.2f} s")
    for (hq, _), row, said in zip(pairs, rows, captions):
        row.append(hq)
        said.append("original")
    save_png(contact_sheet(rows, captions), args.out / f"{key}-sheet.png")


def report(claims, bicubic, figures, pairs, args):
    shown = {metric: SHOWN[metric] for metric in bicubic}
    print("| paper | claim | here | variant |", " | ".join(name for name, _ in shown.values()), "|\n|---|---|---|---|" + "---|" * len(shown))
    print("| | | | bicubic |", " | ".join(f"{bicubic[m]:{form}}" for m, (_, form) in shown.items()), "|")
    for key, claim in claims.items():
        first = f"| {claim.paper} | {claim.words} | {verdict(claim, figures)} "
        for variant in claim.variants:
            cells = (f"{fmean(figures[variant][m]):{form}} ± {stdev(figures[variant][m]):{form}}" for m, (_, form) in shown.items())
            print(first + f"| {variant} |", " | ".join(cells), "|", flush=True)
            first = "| | | "
        draw(key, claim, args)
        show(key, claim, pairs, args)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="photos; claims of digits need none")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--niqe", type=Path, help="niqe_pris_params.npz; without it NIQE is left out, and claims about it are undecided")
    p.add_argument("--pairs", nargs=2, type=Path, metavar=("LQ", "HQ"), help="measure on these two folders' pictures of the same names")
    p.add_argument("--only", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="some claims")
    p.add_argument("--seeds", type=int, default=3, help="2 or more")
    p.add_argument("--steps", type=int, help=f"of S3Diff's adapters (default {STEPS}, four minutes of a core); the other trainings have a share of it. "
                   "Those of digits have it all, by default their presets' steps")
    p.add_argument("--jobs", type=int, default=2, help="trainings at the same time, one core each")
    args = p.parse_args()
    claims = {key: CLAIMS[key] for key in args.only}
    if args.data is None and any(claim.world == "photos" for claim in claims.values()):
        p.error("--data is needed for all claims but those of digits, such as --only digits-steps")
    train_all({name for claim in claims.values() for name, _ in claim.variants.values()}, args)
    choose_dtype("float32", choose_device("auto"))     # figures are of that, not of TF32
    for world in ("photos", "digits"):
        of_world = {key: claim for key, claim in claims.items() if claim.world == world}
        if of_world:
            pairs = pairs_of(world, args)
            report(of_world, *measure_all(of_world.values(), world, pairs, args), pairs, args)


if __name__ == "__main__":
    main()
