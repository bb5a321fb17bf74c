"""The ablations of VOSR's paper at the size of the embedded model, several seeds each: train, measure, print README's table.

    python tests/ablations.py --data PHOTOS --init runs/ae --refined runs/refine --niqe niqe_pris_params.npz --out runs/ablations
        [--seeds 3] [--steps 400] [--batch-size 4] [--jobs 2]

Flows are trained from scratch: as VOSR is, without visual tokens, and with a guidance whose reference sees nothing. --refined is distilled by
both losses, by the stage's own numbers. Measured on photos held out, s3diff's degradation. Started again, it goes on; what is finished stays.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from degrade import RECIPES, degrade  # noqa: E402
from models.lpips import LPIPS  # noqa: E402
from models.support.evaluation import METRICS, find_metrics  # noqa: E402
from models.vosr import VOSR  # noqa: E402
from training import generator, photos_for  # noqa: E402

CROP = 224      # pixels: four tiles of 128 that share 32
FLOWS = {"as VOSR": (), "no visual tokens": ("--ablate", "tokens"), "reference without any condition": ("--ablate", "weak")}
DISTILLED = {"RCGM": ("--distill", "rcgm"), "shortcut": ("--distill", "shortcut")}
SAMPLERS = {"conditional only": {"guidance": 1, "steps": 10}, "guidance 0.5": {"guidance": 0.5, "steps": 10}}
ONE_STEP = {"one step, temperature 1": {"temperature": 1}}


def train(out, *flags):
    """train_vosr.py on one core, to the end or from where it was -> out"""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "train.txt", "a") as log:
        subprocess.run([sys.executable, ROOT / "train_vosr.py", "--out", out, *map(str, flags)], check=True, stdout=log, stderr=log,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
    return out


def measure(folder, knobs, pairs, metrics):
    """-> the average of each metric over pairs of pictures (hq, lq), each (1, 3, H, W) in [0, 1]"""
    model = VOSR.from_pretrained(folder)
    sr = [model.upscale(lq, seed=i, **knobs) for i, (_, lq) in enumerate(pairs)]
    return [fmean(metric(x, hq) for x, (hq, _) in zip(sr, pairs)) for metric in metrics.values()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--data", "--init", "--refined", "--niqe", "--out"):
        p.add_argument(flag, required=True, type=Path)
    p.add_argument("--seeds", type=int, default=3, help="2 or more")
    p.add_argument("--steps", type=int, default=400, help="of each flow")
    p.add_argument("--batch-size", type=int, default=4, help="of each flow")
    p.add_argument("--jobs", type=int, default=2, help="trainings at the same time, one core each")
    args = p.parse_args()

    runs = {}       # name of the row: its trainings, one a seed
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in range(args.seeds):
            for stage, init, rows, size in (("flow", args.init, FLOWS, ("--steps", args.steps, "--batch-size", args.batch_size)),
                                            ("distill", args.refined, DISTILLED, ())):
                for name, flags in rows.items():
                    out = args.out / f"{name.replace(' ', '_')}_{seed}"
                    job = pool.submit(train, out, "--stage", stage, "--data", args.data, "--init", init, "--seed", seed, *size, *flags)
                    runs.setdefault(name, []).append(job)

    crops = photos_for(args.data, CROP, 0)[1][::2]                 # 8 of the 16
    recipe = replace(RECIPES["s3diff"], branches_per="image")
    lq, _ = degrade(crops, recipe, generator(0))
    pairs, metrics = list(zip(crops.split(1), lq.split(1))), find_metrics(True, 4, args.niqe, lpips=LPIPS.from_pretrained)[0]
    names, digits, _ = zip(*(METRICS[m] for m in metrics))
    print("| trained | sampled |", " | ".join(names), "|\n|---|---|" + "---|" * len(names))
    for name, jobs in runs.items():
        for how, knobs in (ONE_STEP if name in DISTILLED else SAMPLERS).items():
            figures = zip(*(measure(job.result(), knobs, pairs, metrics) for job in jobs))
            print(f"| {name} | {how} |", " | ".join(f"{fmean(x):.{n}f} ± {stdev(x):.{n}f}" for x, n in zip(figures, digits)), "|", flush=True)


if __name__ == "__main__":
    main()
