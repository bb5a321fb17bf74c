"""The control group: what plain regression reaches on the same photos, crops and damages, without any diffusion.

    python tests/baseline.py --data PHOTOS --out runs/baseline --steps 2000

Residual blocks where the bad picture's own pixels are learn what to add to a linear guess: the bicubic enlargement and a 9x9 filter for each of a
pixel's 16 new ones, fitted in closed form. L1, AdamW, EMA. It is embedded nowhere; tests/lab.py measures it beside the three systems.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training  # noqa: E402
from models.support.imaging import round8  # noqa: E402
from models.tiny import ResBlock  # noqa: E402


# photos, crops and degradations are those of the tiny S3Diff and GramSR
STAGE = training.Stage(steps=2000, batch_size=8, lr=4e-4, schedule="cosine", warmup=200, betas=(0.9, 0.99), weight_decay=0.0, ema=0.999, crop=128,
                       recipes=("s3diff", "s3diff", "vosr"), branches_per="image", save_every=250)


class Baseline(nn.Module):
    """(B, 3, h, w) LQ in [0, 1] -> (B, 3, 4h, 4w), about [0, 1]"""

    def __init__(self, width=64, blocks=13, k=9):
        super().__init__()
        self.wiener = nn.Conv2d(1, 16, k, padding=k // 2, padding_mode="reflect", bias=False)
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(ResBlock(width) for _ in range(blocks)))
        self.tail = nn.Conv2d(width, 48, 3, padding=1)
        for weight in (self.wiener.weight, self.tail.weight, self.tail.bias):
            nn.init.zeros_(weight)

    @classmethod
    def from_pretrained(cls, folder):
        """What a run has written."""
        tensors = torch.load(Path(folder, "baseline.pt"), weights_only=True)
        model = cls(len(tensors["head.bias"]))
        model.load_state_dict(tensors)
        return model.eval()

    def linear(self, lq):
        return F.pixel_shuffle(self.wiener(lq.flatten(0, 1)[:, None]), 4).view(len(lq), 3, 4 * lq.shape[2], 4 * lq.shape[3])

    def forward(self, lq):
        up = F.interpolate(lq, scale_factor=4, mode="bicubic") + self.linear(lq)
        return up + F.pixel_shuffle(self.tail(self.body(self.head(2 * lq - 1))), 4)

    @torch.no_grad()
    def upscale(self, lq, **knobs):
        """As the systems' `upscale`; a regression has no knobs.  -> (B, 3, 4h, 4w) in [0, 1]"""
        return self(lq.to(self.head.weight.device)).clamp(0, 1)

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


def prepare(args):
    """Network, optimizer.  -> training.Run"""
    run = training.Run(args, STAGE)
    training.start(run)
    run.origin = "baseline: FROM SCRATCH"
    model = Baseline(args.width)
    model.wiener.weight.requires_grad_(False)       # `fit` computes it
    training.set_model(run, model, lambda name: True)
    run.terms, run.title = ("l1",), "control group"
    return run


def small(hq, recipe, g):
    """-> LQ (B, 3, h, w) in [0, 1]"""
    return round8(training.low_quality(hq, recipe, g)[0])


def open_data(run):
    """Photos to learn from and held-out ones, their degradation; the linear guess, if the run begins."""
    hq, _ = training.open_photos(run)
    run.held_out = hq, small(hq, run.recipes[0], training.generator(0))
    if run.step == 0:
        first, last = [], min(run.stage.steps, 40)
        with training.reading(run):
            for run.step in range(last):
                first += [(hq, small(hq, recipe, g)) for hq, recipe, g in training.micro_batches(run)]
        run.model.fit(first)
        run.ema.load_state_dict(run.model.state_dict())
        run.step = 0
        training.open_photos(run)       # from the first one again


def step(run):
    """One step of the optimizer; gradients of the micro-batches are added up."""
    training.set_lr(run.optimizer, run.lr)
    for i, (hq, recipe, g) in enumerate(training.micro_batches(run)):
        lq = small(hq, recipe, g)
        with training.micro_batch_context(run, run.model, i):
            terms = {"l1": F.l1_loss(run.model(lq), hq)}
        training.backward(run, terms)
    run.grad_norm = training.update(run, run.optimizer)
    training.ema_update(run.ema, run.model, min(run.stage.ema, (1 + run.step) / (10 + run.step)))


@torch.no_grad()
def evaluate(run):
    """The averaged weights.  -> {column of the log: value}, {column of the sheet: images}"""
    hq, lq = run.held_out
    sr = run.ema(lq)
    sheet = {"LQ": F.interpolate(lq, scale_factor=4), f"result, step {run.step}": sr, "HQ": hq}
    sheet = {title: 2 * x - 1 for title, x in sheet.items()}
    return {"held_out": float(F.l1_loss(sr, hq)), "psnr": training.psnr(2 * sr.clamp(0, 1) - 1, 2 * hq - 1)}, sheet


def save(run):
    training.write(run.out / "baseline.pt", run.ema.state_dict())
    training.save_state(run)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--width", type=int, default=64, help="channels (default 64: 1 million numbers)")
    training.add_arguments(p)
    p.set_defaults(init=None)       # there is nothing to start from
    args = p.parse_args()
    with training.alone_in(args.out):
        run = prepare(args)
        training.resume(run, ("width", "data", "seed"))
        open_data(run)
        training.fit(run, step, evaluate, save)


if __name__ == "__main__":
    with training.one_line_errors("baseline"):
        main()
