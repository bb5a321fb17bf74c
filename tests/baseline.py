"""The control group: what plain regression reaches on the same photos, crops and damages, without any diffusion.

    python tests/baseline.py --data PHOTOS --out runs/baseline --hours 1
    python tests/baseline.py --out runs/baseline --lq val/lq --ref val/hq --niqe niqe_pris_params.npz

A network of 1 M parameters, residual blocks where the bad picture's own pixels are, learns what to add to a linear guess: the bicubic
enlargement and a 9x9 filter for each of a pixel's 16 new ones, fitted in closed form. L1, Adam, EMA. It is embedded nowhere.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training  # noqa: E402
from degrade import RECIPES, degrade  # noqa: E402
from models.lpips import LPIPS  # noqa: E402
from models.support.evaluation import average, find_metrics, measure, report, row_of  # noqa: E402
from models.support.files import find_pictures  # noqa: E402
from models.support.imaging import read_picture, resize, round8, write_picture  # noqa: E402
from models.support.photos import batches, photos_for  # noqa: E402
from models.vae import ResBlock  # noqa: E402

RECIPES_BY_TURNS = "s3diff", "s3diff", "vosr"
BATCH, CROP, LR, WARMUP, EMA = 16, 128, 4e-4, 200, 0.999


class Baseline(nn.Module):
    """(B, 3, h, w) LQ in [0, 1] -> (B, 3, 4h, 4w), about [0, 1]"""

    def __init__(self, width=64, blocks=13, k=9):
        super().__init__()
        self.wiener = nn.Conv2d(1, 16, k, padding=k // 2, padding_mode="reflect", bias=False).requires_grad_(False)
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(ResBlock(width) for _ in range(blocks)))
        self.tail = nn.Conv2d(width, 48, 3, padding=1)
        for weight in (self.wiener.weight, self.tail.weight, self.tail.bias):
            nn.init.zeros_(weight)

    def linear(self, lq):
        return F.pixel_shuffle(self.wiener(lq.flatten(0, 1)[:, None]), 4).view(len(lq), 3, 4 * lq.shape[2], 4 * lq.shape[3])

    def forward(self, lq):
        up = F.interpolate(lq, scale_factor=4, mode="bicubic") + self.linear(lq)
        return up + F.pixel_shuffle(self.tail(self.body(self.head(2 * lq - 1))), 4)

    @torch.no_grad()
    def fit(self, pairs):
        """Least squares for the filter: what bicubic leaves, from the 9x9 LQ pixels around, each channel alike.  pairs: of (hq, lq)"""
        k = self.wiener.kernel_size[0]
        XX, XY = torch.zeros(k * k, k * k, dtype=torch.float64), torch.zeros(k * k, 16, dtype=torch.float64)
        for hq, lq in pairs:
            x = F.unfold(F.pad(lq.flatten(0, 1)[:, None], (k // 2,) * 4, mode="reflect"), k)        # (3B, k k, h w)
            x = (x - x.mean(1, keepdim=True)).transpose(1, 2).flatten(0, 1).double()               # a filter of sum 0 needs no mean
            rest = (hq - F.interpolate(lq, scale_factor=4, mode="bicubic")).flatten(0, 1)[:, None]
            XX, XY = XX + x.T @ x, XY + x.T @ F.pixel_unshuffle(rest, 4).flatten(2).transpose(1, 2).flatten(0, 1).double()
        weight = torch.linalg.solve(XX + 1e-3 * XX.trace() / len(XX) * torch.eye(len(XX), dtype=torch.float64), XY).T
        self.wiener.weight.copy_((weight - weight.mean(1, keepdim=True)).view_as(self.wiener.weight))


def pair(hq, step, i=0):
    recipe = RECIPES_BY_TURNS[step % len(RECIPES_BY_TURNS)]
    return hq, round8(degrade(hq, RECIPES[recipe], training.generator(0, step, i))[0])


def psnr(model, pairs):
    errors = [((model(lq).clamp(0, 1) - hq) ** 2).mean((1, 2, 3)) for hq, lq in pairs]
    return float(-10 * torch.cat(errors).log10().mean())


def train(args):
    """Train for args.hours of this machine, which --out may have had in part already: the log counts them."""
    torch.manual_seed(0)
    model, out = Baseline(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    photos, held_out, _ = photos_for(args.data, CROP, 0, flip=True)
    test = [pair(hq, step, 1) for step, hq in enumerate(held_out.split(1))]
    state, log = {"step": 0, "hours": 0.0}, training.Log(out / "log.csv", ["step", "hours", "l1", "psnr"], 10**9)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR, betas=(0.9, 0.99))
    ema = copy.deepcopy(model)
    if (out / "baseline.pt").exists():
        state = torch.load(out / "baseline.pt", weights_only=True)
        model.load_state_dict(state["model"]), ema.load_state_dict(state["ema"]), optimizer.load_state_dict(state["optimizer"])
    else:
        model.fit(pair(hq, i) for i, hq in enumerate(batches(photos, range(40), BATCH, 0, BATCH, BATCH, 0, torch.device("cpu"))))
        ema.load_state_dict(model.state_dict())
        with torch.no_grad():
            bicubic = psnr(lambda lq: F.interpolate(lq, scale_factor=4, mode="bicubic"), test)
            print(f"bicubic {bicubic:.2f} dB, linear guess {psnr(model, test):.2f} dB", flush=True)
    step, stop, total, start = state["step"], training.Stop(), 0.0, time.time() - 3600 * state["hours"]
    for hq in batches(photos, range(step, 10**9), BATCH, 0, BATCH, BATCH, 0, torch.device("cpu")):
        hours = (time.time() - start) / 3600
        for group in optimizer.param_groups:        # a cosine over the hours, since they are what is compared
            group["lr"] = min(1, (step + 1) / WARMUP) * training.learning_rate(int(1e6 * hours), int(1e6 * args.hours), LR, "cosine")
        hq, lq = pair(hq, step)
        loss = F.l1_loss(model(lq), hq)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        training.ema_update(ema, model, min(EMA, (1 + step) / (10 + step)))
        step, total = step + 1, total + loss.item()
        over = bool(stop) or hours >= args.hours
        if step % 250 == 0 or over:
            with torch.no_grad():
                held = psnr(ema, test)
            log.write(step=step, hours=hours, l1=total / ((step - 1) % 250 + 1), psnr=held)
            print(f"step {step}, {hours:.2f} h: {held:.2f} dB", flush=True)
            training.write(out / "baseline.pt", {"step": step, "hours": hours, "model": model.state_dict(), "ema": ema.state_dict(),
                                                 "optimizer": optimizer.state_dict()})
            total = 0.0
        if over:
            return


@torch.no_grad()
def compare(args):
    """Upscale args.lq into OUT/pictures and print the averages of its metrics, bicubic beside."""
    model, rows = Baseline().eval(), []
    model.load_state_dict(torch.load(Path(args.out, "baseline.pt"), weights_only=True)["ema"])
    metrics, absent, _ = find_metrics(True, 4, args.niqe, torch.device("cpu"), LPIPS.from_pretrained)
    for path in find_pictures(args.lq):
        (lq, _), (hq, _) = read_picture(path), read_picture(args.ref / path.name)
        sr = round8(model(lq).clamp(0, 1))
        write_picture(Path(args.out, "pictures", path.name), sr)
        (found,), failed = measure([sr], resize(lq, sr.shape[-2:]), hq, metrics)
        rows.append(row_of(path.name, sr.shape[-2:], 0.0, found, absent | failed))
    print(report(average(rows)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="good photos")
    p.add_argument("--out", required=True, help="folder for baseline.pt and log.csv, or where they are")
    p.add_argument("--hours", type=float, default=1.0, help="of training, in all (default 1)")
    p.add_argument("--lq", type=Path, help="upscale and measure these instead")
    p.add_argument("--ref", type=Path)
    p.add_argument("--niqe", type=Path)
    args = p.parse_args()
    if args.lq:
        compare(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
