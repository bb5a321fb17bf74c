"""The plane: images of two numbers, a world so small that each idea of the lecture decides something within seconds.

    python tests/plane.py                       # all lessons: about two minutes of one core
    python tests/plane.py flow distill          # some of them, with the trainings that they need

An HQ image is a point of a noisy spiral. Its LQ image keeps the first coordinate, with noise, and loses the second. So
one LQ image has up to four answers, one on each arm of the spiral that it could have come from. Everything else is
what photos are restored with: models/flow.py, lora.py, gram.py and S3Diff's guidance, as they are.

Tensors have the shapes of latents: z_hq, z_lq, z_t (B, 2, 1, 1); feat (B, 1, 1), one token of one number; t, r (B,).

Printed for each result, over 10,000 held-out images (CSD: 3,000), and in brackets what we got:
    error       mean squared error against z_hq: how far from the one image that it was
    distance    energy distance between the pairs (result, LQ) and (HQ, LQ): how far from the images that it could have
                been; 0 if results are distributed as the truth. Of 3,000 images, so that up to .002 is chance
    from LQ     root mean square of what the result's first coordinate differs from the LQ one; .15 in truth
    off         share of results that are no image: farther than .1 from the spiral
"""

import argparse
import copy
import csv
import math
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.flow import correction_rcgm, guided, loss_distill, loss_flow, sample  # noqa: E402
from models.gram import CSD_TIMES, loss_csd  # noqa: E402
from models.lora import NO_ADAPTERS, Linear, Modulation, add_lora, of_block  # noqa: E402
from models.s3diff import S3Diff  # noqa: E402
from models.unet import alphas_cumprod  # noqa: E402
from training import ema_update, generator, learning_rate  # noqa: E402

NOISE = 0.15            # deviation of the LQ coordinate's noise
BATCH = 512
NOT_NOISED = 20.0, 0.0  # `strength` of loss_flow: a = 1. The paper's (5, 1) adds noise of .12, much in a world so small


# ---- the world


class World(NamedTuple):
    """Images with what a network is given of them, and noise to start from."""

    z_hq: torch.Tensor      # (B, 2, 1, 1)
    z_lq: torch.Tensor      # (B, 2, 1, 1): the noisy first coordinate, and 0
    feat: torch.Tensor      # (B, 1, 1): 1, as if it were a visual token; without tokens it is 0
    eps: torch.Tensor       # (B, 2, 1, 1)


def spiral(B, g):
    """B clean images.  -> (B, 2, 1, 1)"""
    clean = on_spiral(torch.rand(B, generator=g))
    return (clean + 0.03 * torch.randn(B, 2, generator=g))[..., None, None]


def on_spiral(x):
    """x: (n,) in [0, 1], from the spiral's inner end to its outer -> points (n, 2)"""
    angle = 3 * math.pi * x.sqrt() + 0.5
    return torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 5


def degrade(z_hq, g, noise=NOISE):
    """The first coordinate with noise, and 0 for the second.  noise: its deviation, or (B,) of them -> like z_hq"""
    x = z_hq[:, 0, 0, 0]
    x = x + noise * torch.randn(len(x), generator=g)
    return torch.stack([x, torch.zeros_like(x)], dim=1)[..., None, None]


def world(B=10_000, noise=NOISE, seed=100):
    """Held-out images."""
    g = generator(seed)
    z_hq = spiral(B, g)
    return World(z_hq, degrade(z_hq, g, noise), torch.ones(B, 1, 1), torch.randn(z_hq.shape, generator=g))


def posterior(w, n=4_000):
    """What the best network could answer: n clean images, weighted by how well they explain each LQ image.

    w: World -> the mean of all answers, one answer drawn; each (B, 2, 1, 1)
    """
    g = generator(7)
    clean = spiral(n, g)
    away = w.z_lq[:, 0, 0] - clean[:, 0, 0].mT      # (B, n)
    weights = (-0.5 * (away / NOISE).square()).softmax(dim=1)
    mean = weights @ clean.flatten(1)
    drawn = torch.multinomial(weights, 1, generator=g)[:, 0]
    return mean.view_as(w.z_hq), clean[drawn]


# ---- the network, and how it is trained and measured


class Net(nn.Module):
    """Four linear layers that take a DiT's arguments; LoRA's Linear, so that they can have adapters."""

    def __init__(self, second_time=False, width=128):
        super().__init__()
        self.second_time = second_time      # a one-step model: read r, too
        widths = [7, width, width, width, 2]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, z_t, z_lq, feat, t, r=None, C=NO_ADAPTERS):
        """z_t, z_lq: (B, 2, 1, 1); feat: (B, 1, 1); t, r: (B,); C: as of a network of four blocks -> like z_t"""
        length = t - r if self.second_time else torch.zeros_like(t)
        x = torch.cat([z_t.flatten(1), z_lq.flatten(1), feat[:, 0], t[:, None], length[:, None]], dim=1)
        x = 3 * x[:, None]  # (B, 1, 7), as adapters expect tokens, here one; times 3, or sharp turns are learned late
        *hidden, last = self.layers
        for i, layer in enumerate(hidden):
            x = F.silu(layer(x, of_block(C, i)))
        return last(x, of_block(C, 3)).view_as(z_t)


def train(title, net, loss, steps, others=()):
    """AdamW with a cosine and an average of the weights; prints the seconds of one core.

    loss: function (net, z_hq, z_lq, feat, generator) -> scalar; others: parameters that learn beside the network's
    -> the averaged network
    """
    began = time.process_time()
    g = generator(0)
    trained = [p for p in [*net.parameters(), *others] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01)
    ema, feat = copy.deepcopy(net), torch.ones(BATCH, 1, 1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 5e-3, "cosine")
        z_hq = spiral(BATCH, g)
        optimizer.zero_grad()
        loss(net, z_hq, degrade(z_hq, g), feat, g).backward()
        optimizer.step()
        ema_update(ema, net, 0.995)
    print(f"  ({title}: {steps:,} steps of {BATCH} images, {time.process_time() - began:.0f} s)", flush=True)
    return ema.requires_grad_(False)


def new(second_time=False):
    torch.manual_seed(0)
    return Net(second_time)


@torch.no_grad()
def walk(dit, w, steps, guidance=1.0, weak=0.15, temperature=1.0):
    """VOSR's sampler on all images of a World.  -> (B, 2, 1, 1)"""
    def velocity(z, t, r):
        return guided(dit, z, w.z_lq, w.feat, t, r, guidance, weak)

    return sample(velocity, temperature * w.eps, steps)


def energy_distance(a, b):
    """How differently two sets of points are distributed, 0 if alike.  a, b: (n, d) -> number"""
    between, within_a, within_b = torch.cdist(a, b).mean(), torch.cdist(a, a).mean(), torch.cdist(b, b).mean()
    return float(2 * between - within_a - within_b)


def measure(z, w, n=3_000):
    """Result z: (B, 2, 1, 1) of a World -> error, distance, from LQ, off; n: images for the distance"""
    error = float(F.mse_loss(z, w.z_hq))
    pairs, truth = (torch.cat([x, w.z_lq], dim=1)[:n].flatten(1) for x in (z, w.z_hq))
    from_lq = float((z - w.z_lq)[:, 0].square().mean().sqrt())
    off = torch.cdist(z.flatten(1), on_spiral(torch.linspace(0, 1, 500))).amin(1) > 0.1
    return error, energy_distance(pairs, truth), from_lq, float(off.float().mean())


# ---- lessons: each yields (name of a result, result, World)


def truth():
    """What can be known: the posterior, computed. A sample of it has twice the least squared error."""
    w = world()
    mean, drawn = posterior(w)
    yield "mean of all answers", mean, w
    yield "one answer drawn", drawn, w


@cache
def regression_net(steps=1_000):
    """A network asked for the least squared error, from nothing but the condition."""
    def loss(net, z_hq, z_lq, feat, g):
        return F.mse_loss(regress(net, z_lq, feat), z_hq)

    return train("regression", new(), loss, steps)


def regress(net, z_lq, feat):
    return net(torch.zeros_like(z_lq), z_lq, feat, torch.ones(len(z_lq)))


def regression():
    """The least squared error: answers lie between the arms of the spiral, where no image is."""
    w = world()
    yield "regression", regress(regression_net(), w.z_lq, w.feat), w


@cache
def flow_net(steps=4_000, weak=(0.05, 0.25)):
    """Flow matching by loss_flow, for one image in ten under the weak condition; weak = 0, 0: under none."""
    def loss(net, z_hq, z_lq, feat, g):
        return loss_flow(net, z_hq, z_lq, feat, g, strength=NOT_NOISED, weak=weak)

    title = "flow" if weak[1] else "flow, for guidance from no condition"
    return train(title, new(), loss, steps)


def flow():
    """More steps decide more: from regression's answer to a sample of the posterior."""
    w = world()
    for steps in (1, 2, 4, 8, 25, 100):
        yield f"flow, steps {steps}", walk(flow_net(), w, steps), w


def guidance():
    """Less guidance leaves the LQ image; from no condition it leaves it faster than from a weak one. 25 steps."""
    w = world()
    for scale in (-0.5, 0, 0.5, 0.75, 1, 1.5):
        yield f"from weak, guidance {scale:g}", walk(flow_net(), w, 25, scale), w
    for scale in (-0.5, 0, 0.5, 0.75, 1, 1.5):
        yield f"from none, guidance {scale:g}", walk(flow_net(weak=(0.0, 0.0)), w, 25, scale, weak=0.0), w


def temperature():
    """Less noise to start from: less is decided, and less is risked. RCGM's single step against 25 of the flow."""
    w = world()
    for T in (0, 0.5, 0.8, 1):
        yield f"RCGM, one step, T {T:g}", walk(one_step_net("rcgm"), w, 1, temperature=T), w
    for T in (0, 0.5, 0.8):
        yield f"flow, steps 25, T {T:g}", walk(flow_net(), w, 25, temperature=T), w


def student(teacher):
    """The flow's network, to be told a second time r. Where r = t it starts as its teacher."""
    net = new(second_time=True)
    net.load_state_dict(teacher.state_dict())
    return net


@cache
def one_step_net(kind, steps=2_000, teacher=None):
    """Distillation of flow_net() by loss_distill; omega = 1 distils no guidance in."""
    teacher = teacher or flow_net()

    def loss(net, z_hq, z_lq, feat, g):
        terms = loss_distill(net, teacher, z_hq, z_lq, feat, g, kind, omega=1.0, strength=NOT_NOISED)
        return terms["v"] + terms["u"]

    title = "RCGM" if kind == "rcgm" else "shortcut"
    return train(title, student(teacher), loss, steps)


@torch.no_grad()
def disagreement(net, teacher, w):
    """How far a student is from RCGM's identity: root mean square of the correction, and the share that is clamped."""
    t = torch.rand(len(w.z_hq), 2, generator=generator(1)).amax(1)
    r = t * torch.rand(len(t), generator=generator(2))
    time_t = t[:, None, None, None]
    z_t = (1 - time_t) * w.z_hq + time_t * w.eps

    def u(z, t, r):
        return net(z, w.z_lq, w.feat, t, r)

    v = teacher(z_t, w.z_lq, w.feat, t)
    correction = correction_rcgm(u, z_t, t, r, u(z_t, t, r), v)
    return float(correction.square().mean().sqrt()), float((correction.abs() > 1).float().mean())


def distill():
    """One step before distillation is regression's answer, after it a sample. Correction: what RCGM makes small."""
    w = world()
    networks = {"before": student(flow_net()), "RCGM": one_step_net("rcgm"), "shortcut": one_step_net("shortcut")}
    for name, net in networks.items():
        correction, clamped = disagreement(net, flow_net(), w)
        print(f"  ({name}: correction {correction:.2f}, {clamped:.0%} of it beyond 1)")
    yield "before, steps 1", walk(flow_net(), w, 1), w
    for name in ("RCGM", "shortcut"):
        for steps in (1, 2, 4):
            yield f"{name}, steps {steps}", walk(networks[name], w, steps), w


# ---- S3Diff and GramSR in the plane


@cache
def adapted(steered, steps=1_000, r=8):
    """The frozen flow, which knows one noise, adapted to LQ images of any noise from 0 to .6.

    steered: C is made from each image's noise, as S3Diff's from its scores; else plain LoRA, C = 1
    -> function (noise of each image as told (B,)) -> network with a DiT's arguments, its weights not averaged
    """
    net = new()
    net.load_state_dict(flow_net().state_dict())
    net.requires_grad_(False)
    add_lora(net, ["0", "1", "2", "3"], "noise", r)
    modulation = Modulation(r_vae=1, r_unet=r, vae_blocks=1, unet_blocks=4, fourier=16, D=16)   # no VAE here

    def told(noise):
        scores = torch.stack([noise, torch.zeros_like(noise)], dim=1)     # (B, 2): noise, blur
        C = {"noise": modulation.matrices("unet", scores) if steered else 1}
        return lambda z_t, z_lq, feat, t, r=None: net(z_t, z_lq, feat, t, r, C)

    def loss(net, z_hq, z_lq, feat, g):
        noise = 0.6 * torch.rand(len(z_hq), generator=g)
        z_lq = degrade(z_hq, g, noise)
        return loss_flow(told(noise), z_hq, z_lq, feat, g, cfg_ratio=0.0, strength=NOT_NOISED)

    train("LoRA with C" if steered else "LoRA", net, loss, steps, modulation.parameters())
    return told


def lora():
    """S3Diff's idea: adapters that are told the noise are right for each; plain ones for a mean. 25 steps."""
    for noise in (0.05, 0.5):
        w = world(noise=noise)
        each = torch.full((len(w.z_hq),), noise)
        yield f"noise {noise:g}, not adapted", walk(flow_net(), w, 25), w
        yield f"noise {noise:g}, LoRA", walk(adapted(False)(each), w, 25), w
        yield f"noise {noise:g}, LoRA with C", walk(adapted(True)(each), w, 25), w
        yield f"noise {noise:g}, C told {0.55 - noise:g}", walk(adapted(True)(0.55 - each), w, 25), w


GOOD, BAD = torch.ones(1, 1, 1), -torch.ones(1, 1, 1)      # prompts: (1, 1, 1)


class OneStep(Net):
    """S3Diff in the plane: one step from the LQ image, under one of two prompts."""

    guided = S3Diff.guided

    def unet(self, z_t, t, context, C):
        """z_t: (B, 2, 1, 1), an LQ image; context: (B, 1, 1), prompts -> like z_t"""
        return self(z_t, z_t, context, t.expand(len(z_t)))

    def restore(self, z_lq, guidance):
        prompts = torch.cat([GOOD, BAD])
        return z_lq - self.guided(z_lq, torch.ones(1), prompts, NO_ADAPTERS, guidance)


@cache
def prompted(share, steps=1_500):
    """Online negative prompting: for that share of the images the prompt is bad and the target is the LQ image."""
    torch.manual_seed(0)

    def loss(net, z_hq, z_lq, feat, g):
        negative = (torch.rand(len(z_hq), generator=g) < share)[:, None, None]
        context = torch.where(negative, BAD, GOOD)
        target = torch.where(negative[..., None], z_lq, z_hq)
        return F.mse_loss(z_lq - net.unet(z_lq, torch.ones(1), context, NO_ADAPTERS), target)

    return train(f"negatives {share:.0%}", OneStep(), loss, steps)


def negatives():
    """S3Diff's prompts: negatives cost nothing; guidance away from them costs error and buys a little distance."""
    w = world()
    for share, words in ((0.0, "no negatives"), (0.05, "negatives")):
        for scale in (0, 1, 1.07, 1.2, 1.5):
            yield f"{words}, guidance {scale:g}", prompted(share).restore(w.z_lq, scale), w


def prior(z_t, t, context):
    """The flow as Stable Diffusion's kind of network: the noise in sqrt(a) z + sqrt(1 - a) eps.

    Both noise a clean latent along the same line, but for a factor and another clock. z_t: (B, 2, 1, 1); t: (B,) of
    0 .. 999; context: (B, 1, 3), z_lq and feat -> like z_t
    """
    a = alphas_cumprod()[t][:, None, None, None]
    scale = a.sqrt() + (1 - a).sqrt()
    z, time_t = z_t / scale, (1 - a).sqrt() / scale     # of the flow: z = (1 - t) z_hq + t eps
    z_lq, feat = context[:, 0, :2, None, None], context[:, :, 2:]
    v = flow_net(weak=(0.0, 0.0))(z, z_lq, feat, time_t.flatten())
    return z + (1 - time_t) * v     # since v = eps - z_hq


def driven(w, pull, steps):
    """Regression's answers, moved by loss_csd, and pulled back by squared error.  pull: its strength -> like z_hq"""
    g = generator(0)
    start = regress(regression_net(), w.z_lq, w.feat)
    context = torch.cat([w.z_lq.flatten(1), w.feat[:, 0]], dim=1)[:, None]
    z = start.clone()
    for _ in range(steps):
        t = torch.randint(*CSD_TIMES, (len(z),), generator=g)
        noise = torch.randn(z.shape, generator=g)
        z.requires_grad_()
        loss = loss_csd(prior, z, t, noise, context, torch.zeros_like(context))
        gradient, = torch.autograd.grad(loss, z)
        z = z.detach() - 0.01 * z.numel() * gradient - pull * (z.detach() - start)
    return z


def csd():
    """GramSR's CSD drives answers to what sets their LQ image apart, and too far, unless squared error holds them."""
    w = world(3_000)
    for pull, words in ((0.0, "alone"), (0.1, "with squared error")):
        for steps in (0, 10, 25, 50):
            yield f"CSD {words}, steps {steps}", driven(w, pull, steps), w


LESSONS = {f.__name__: f for f in (truth, regression, flow, guidance, temperature, distill, lora, negatives, csd)}
DIGITS = 3, 4, 2, 2                            # of error, distance, from LQ, off
OURS = Path(__file__).with_suffix(".csv")      # what we got: a result's name, and these four


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("lessons", nargs="*", metavar="LESSON", help=f"of {', '.join(LESSONS)} (default all)")
    p.add_argument("--save", action="store_true", help=f"what all lessons give becomes {OURS.name}")
    args = p.parse_args()
    chosen = args.lessons or list(LESSONS)
    unknown = [name for name in chosen if name not in LESSONS]
    if unknown:
        p.error(f"no lesson {unknown[0]}, only {', '.join(LESSONS)}")
    if args.save and args.lessons:
        p.error("--save is for all lessons at once")
    torch.set_num_threads(1)    # networks so small only wait for a second thread
    rows = []
    for name in chosen:
        print(f"\n{name}. {LESSONS[name].__doc__}")
        rows += table(LESSONS[name]())
    if args.save:
        with open(OURS, "w", newline="") as file:
            csv.writer(file).writerows(rows)


def ours():
    """-> {name of a result: its four figures, as printed}"""
    with open(OURS, newline="") as file:
        return {name: figures for name, *figures in csv.reader(file)}


def table(results):
    """Print what a lesson yields beside what we got.  -> rows: name, error, distance, from LQ, off"""
    print(f"  {'':34}{'error':14}{'distance':18}{'from LQ':14}off")
    expected, rows = ours(), []
    for name, z, w in results:
        here = [f"{x:.{digits}f}" for x, digits in zip(measure(z, w), DIGITS)]
        there = expected.get(name, ["new"] * 4)
        print(f"  {name:34}{'  '.join(f'{a} ({b})' for a, b in zip(here, there))}", flush=True)
        rows.append([name, *here])
    return rows


if __name__ == "__main__":
    main()
