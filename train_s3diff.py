"""Train S3Diff: adapters on a frozen SD-Turbo, from pairs of photos and their degraded copies.

    python train_s3diff.py --data PHOTOS --out runs/s3diff
    torchrun --nproc_per_node=4 train_s3diff.py --data photos.txt --out runs/s3diff --micro-batch 4 --checkpointing

A step has four parts, each with its own backward and its own step of an optimizer:

    1. reconstruct   the target by L2 and LPIPS; one image in twenty has the bad prompt, and its LQ image as target
    2. adversary     all images with the good prompt: make the discriminator D take them for photos
    3. real          D is to know photos
    4. fake          D is to know the images of part 2

Apart, because 1 and 2 want different prompts; the same Adam for both, so that its moments see both gradients.

    adapters    the above
    and, ours, with --preset tiny, before it:
    prior       a tiny Stable Diffusion, in place of SD-Turbo
    estimator   of the degradation, in place of the authors'

The same command again goes on where it stopped, exactly; Ctrl-C and SIGTERM save first. --out holds s3diff.pkl, laid
out as the public file, for sample.py --model (with --preset tiny: model.safetensors), checkpoint-*.pt, log.csv,
loss.png and sheet.png (LQ | result | HQ of held-out photos; of a prior noisy | denoised | HQ; of an estimator none).
"""

import argparse
import copy
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F

import training
from degrade import apply, degrade, draw_plan, severity
from models.discriminator import Discriminator
from models.lpips import LPIPS
from models.s3diff import VAE_TARGETS, S3Diff, S3DiffConfig, is_trained
from models.support.arguments import between
from models.support.precision import in_half
from models.support.weights import fetch, load_strictly, read_tensors, save_model
from models.tiny import (S3DIFF_STAGES, PatchDiscriminator, RandomLPIPS, TinyS3Diff, TinyS3DiffConfig, is_prior,
                         load_autoencoder, load_prior)
from models.unet import alphas_cumprod
from models.vit import PRESETS as VITS, ViT


@dataclass
class Stage(training.Stage):
    """Hyper-parameters of a stage of S3Diff."""

    recipes: tuple = ("s3diff",)
    lr_D: float = 0.0                   # learning rate of D, constant; 0 = as the generator's
    lambda_l2: float = 2.0
    lambda_lpips: float = 5.0
    lambda_gan: float = 0.5
    l2_alone: float = 0.0               # ours: share of the steps, the first, with L2 alone and true scores: faster


@dataclass
class Run(training.Run):
    """What a run of S3Diff has beside the model."""

    generate: Callable = None           # the model's forward, (lq_up, scores, context, generator) -> sr
    discriminate: Callable = None       # D's forward, (image, "real" or "fake", plan) -> (B, 1)
    lpips: torch.nn.Module = None
    D: torch.nn.Module = None           # the discriminator
    optimizer_D: torch.optim.Optimizer = None
    l2_alone: bool = False              # this step has L2 alone, and true scores


@dataclass
class Pairs:
    """What stage adapters draws for a micro-batch of B images."""

    lq_up: torch.Tensor                 # (B, 3, H, W) in [-1, 1], enlarged
    hq: torch.Tensor                    # (B, 3, H, W) in [-1, 1]
    scores: torch.Tensor                # (B, 2) in [0, 1], blur and noise of the LQ image
    negative: torch.Tensor              # (B,) bool: part 1 has the bad prompt, and the LQ image as target
    generator: torch.Generator          # of the posterior's samples and D's augmentations


# ---- the stages


# the paper's steps, the code counts 50 epochs; officially 4 GPUs x 4 photos x 4 parts
PAPER = {"adapters": Stage(steps=30_000, batch_size=64, lr=2e-5)}
TINY = {name: Stage(**settings) for name, settings in S3DIFF_STAGES.items()}
PRESETS = {     # name: config of the model, its stages
    "sd-turbo": (S3DiffConfig(), PAPER),
    "tiny": (TinyS3DiffConfig(), TINY),
}
PLACES = {      # of adapters, for --lora: names of the VAE's layers; the UNet always has some
    "unet": "", "unet+encoder": VAE_TARGETS, "unet+decoder": VAE_TARGETS.replace("encoder", "decoder", 1),
    "unet+encoder+decoder": VAE_TARGETS.replace("encoder", "(encoder|decoder)", 1),
}
TINY_PLACES = {     # of the tiny VAE's layers
    "unet": "", "unet+encoder": "encoder", "unet+decoder": r"finish\..*", "unet+encoder+decoder": r"encoder|finish\..*",
}
SETTINGS = ("preset", "stage", "lora", "modulation", "neg_prob", "rank_unet", "rank_vae", "start_step", "data", "init",
            "seed")     # flags that stay when a run is resumed


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", default="adapters", choices=TINY, help="adapters (default); others: tiny only")
    p.add_argument("--preset", default="sd-turbo", choices=PRESETS, help="sd-turbo (default); tiny: all trained here")
    p.add_argument("--init", type=training.path,
                   help="model to start from: s3diff, an s3diff.pkl, another run's --out (default: new adapters"
                   " on SD-Turbo, or on the embedded tiny prior; none: on random weights, ours)")
    # the paper's ablations
    p.add_argument("--lora", default="unet+encoder", choices=PLACES, help="what gets adapters (Table 4; unet+encoder)")
    p.add_argument("--modulation", default="blocks", choices=("blocks", "shared", "none"),
                   help="a matrix for each block (default), one for all blocks, or plain LoRA (Table 5)")
    p.add_argument("--neg-prob", type=between(0, 1), default=0.05,
                   help="how often a photo has the bad prompt; 0 = no negative prompting (Table 6)")
    p.add_argument("--rank-unet", type=between(1, 1024, whole=True), help="of the UNet's adapters (Table 7; 32)")
    p.add_argument("--rank-vae", type=between(1, 1024, whole=True), help="of the VAE's (Table 7; 16, tiny 8)")
    p.add_argument("--start-step", type=between(1, 999, whole=True),
                   help="t of the one step (Table 8; default 999, tiny 250); below 999 with its noise, but tiny")
    training.add_arguments(p)
    args = p.parse_args(argv)
    _, stages = PRESETS[args.preset]
    args.tiny = args.preset == "tiny"
    if args.stage not in stages:
        p.error(f"--stage {args.stage} is for --preset tiny; {args.preset} has public weights")
    own = args.rank_unet or args.rank_vae or args.lora != "unet+encoder" or args.modulation != "blocks"
    if args.init and own and not args.tiny:
        p.error("--init brings its own --lora, --modulation, --rank-unet and --rank-vae")
    return args


# ---- build: the networks, and which of them learn


def build(args, cfg):
    """-> S3Diff to train, LPIPS and discriminator for its losses, a line on their origin."""
    places = TINY_PLACES if args.tiny else PLACES
    cfg = replace(cfg, r_unet=args.rank_unet or cfg.r_unet, r_vae=args.rank_vae or cfg.r_vae,
                  vae_targets=places[args.lora], modulation=args.modulation, t=args.start_step or cfg.t)
    if args.tiny:
        model, origin = build_tiny(args, cfg)
        return model, RandomLPIPS().requires_grad_(False), PatchDiscriminator(), origin
    if args.init:
        model, origin = S3Diff.from_pretrained(args.init), f"from {args.init}"
        model.cfg.t = cfg.t
    else:
        model, origin = S3Diff.with_prior(cfg), "SD-Turbo with new adapters"
        model.adapt()           # now with numbers
    path = fetch("dino_vitbase16_pretrain.pth")
    with torch.device("meta"):
        vit = ViT(VITS["dino_vitb16"])
    load_strictly(vit, read_tensors(path), path)
    return model, LPIPS.from_pretrained("vgg"), Discriminator(vit), origin


def build_tiny(args, cfg):
    """-> TinyS3Diff with the autoencoder of all tiny models, what --init has, the rest new; a line on its origin"""
    model, origin = TinyS3Diff(cfg), "FROM SCRATCH"
    model.prompts = torch.nn.Parameter(torch.randn_like(model.prompts))      # learned, where SD has a text encoder
    for conv in model.denet.conv_first:     # blind for brightness, so that grain and edges are what it sees first
        conv.weight.data = 8 * (conv.weight.data - conv.weight.data.mean((2, 3), keepdim=True))
    # with its convolutions: straight from the linear decoder, an adversary's textures become a weave
    load_autoencoder(model)
    if args.init == "none" or args.stage == "prior" and not args.init:
        return model, origin
    everything = args.stage != "estimator"      # which begins anew
    path = load_prior(model, args.init, wanted=lambda name: everything or is_prior(name))
    return model, f"from {path}"


def learns(stage, name):
    """Whether a stage trains the parameter of that name."""
    if stage == "prior":
        return is_prior(name) and not name.startswith("vae.")
    if stage == "estimator":
        return name.startswith("denet.")
    return is_trained(name) and name != "modulation.w"


def is_known(stage, name):
    """Whether a tiny stage's file holds the tensor of that name: what it, or a stage before it, has learned."""
    return stage == "adapters" or is_prior(name) or stage == "estimator" and name.startswith("denet.")


def prepare(args):
    """Networks, what is to be learned, optimizers.  -> Run"""
    cfg, stages = PRESETS[args.preset]
    run = Run(args, stages[args.stage])
    training.start(run)
    run.title, run.terms = f"S3Diff {args.preset}, stage {args.stage}", TERMS[args.stage]
    run.columns = ("rank_blur", "rank_noise") if args.stage == "estimator" else ()
    model, lpips, D, run.origin = build(args, cfg)
    run.is_saved = partial(learns, args.stage)
    trained = [p for name, p in model.named_parameters() if run.is_saved(name)]
    run.trained = training.freeze_all_but(model, trained)
    if run.dtype != torch.float32 and not args.tiny:
        in_half(model.unet, run.dtype, adapters=False)      # frozen weights need no float32; official: they have it
    run.model = model.to(run.device)
    run.ema = copy.deepcopy(run.model).eval() if run.stage.ema else run.model
    run.lpips, run.D = lpips.to(run.device), D.to(run.device)
    run.optimizer = training.adamw(run.trained, run.stage)
    run.optimizer_D = training.adamw(list(D.parameters()), run.stage)
    run.state = {"model": run.model, "ema": run.ema, "D": run.D, "G_optimizer": run.optimizer,
                 "D_optimizer": run.optimizer_D, "scaler": run.scaler}
    return run


# ---- data: photos, and what a stage draws from them


def open_data(run):
    """Photos to learn from; held-out ones, and what is drawn from them."""
    hq = training.open_photos(run)
    run.l2_alone = run.stage.l2_alone > 0       # held-out photos have true scores, too
    recipe = replace(run.recipes[0], branches_per="image")
    drawn = DRAW[run.args.stage](run, hq, training.generator(0), recipe)
    run.held_out = 2 * hq - 1, drawn


def draw(run, hq, g):
    """What the stage's function below draws from photos.  hq: (B, 3, H, W) in [0, 1]; g: generator"""
    return DRAW[run.args.stage](run, hq, g, training.recipe(run))


def draw_prior(run, hq, g, recipe):
    """Photos and degraded ones, half of each.

    -> x (B, 3, H, W) in [-1, 1], bad (B,) 1 where x is degraded, else 0, g for the losses
    """
    good = len(hq) // 2
    x = torch.cat([hq[:good], degrade(hq[good:], recipe, g)[1]])
    bad = (torch.arange(len(hq), device="cpu") >= good).long()
    return 2 * x - 1, bad, g


def draw_estimator(run, hq, g, recipe):
    """-> lq (B, 3, h, w) in [0, 1], true scores (B, 2)"""
    lq, _, scores = degrade_and_score(hq, recipe, g)
    return lq, scores


def draw_adapters(run, hq, g, recipe):
    """-> Pairs"""
    if run.l2_alone:
        lq, lq_up, scores = degrade_and_score(hq, recipe, g)
    else:
        lq, lq_up = degrade(hq, recipe, g)
        scores = run.model.estimate(lq)
    drawn = torch.rand(len(hq), generator=g, device=g.device)
    negative = (drawn < run.args.neg_prob).to(hq.device)    # online negative prompting
    return Pairs(2 * lq_up - 1, 2 * hq - 1, scores, negative, g)


def degrade_and_score(hq, recipe, g):
    """Degrade each photo by a plan of its own, and say how badly.  -> lq, lq_up, (B, 2) of `severity`"""
    lqs, lqs_up, scores = [], [], []
    for one in hq.split(1):
        plan = draw_plan(recipe, 1, g)
        lq, lq_up = apply(plan, one)
        lqs.append(lq)
        lqs_up.append(lq_up)
        scores.append(severity(plan, one, lq))
    return torch.cat(lqs), torch.cat(lqs_up), torch.cat(scores)


DRAW = {"prior": draw_prior, "estimator": draw_estimator, "adapters": draw_adapters}


# ---- the losses, of which a stage has one, and stage adapters four
# -> {name: scalar}, summed up


def prior_losses(model, x, bad, g):
    """Stable Diffusion's own training: the noise that was added, with the prompt of good or bad images, or with none.

    x: (B, 3, H, W) in [-1, 1]; bad: (B,) 1 where x is degraded, 0 where it is a photo; g: generator of all draws
    """
    z, T = model.vae.encode(x), 1000
    t = (torch.rand(len(z), generator=g, device=g.device) * T).long()
    # S3Diff and GramSR work near the ends: one in ten each there
    ends = torch.rand(len(z), generator=g, device=g.device)
    t = torch.where(ends < 0.1, t % 100 + 900, torch.where(ends < 0.2, t % 10, t))
    eps = torch.randn(z.shape, generator=g, device=g.device).to(z)
    prompted = (torch.rand(len(z), 1, 1, generator=g, device=g.device) > 0.1).to(z)     # one in ten has no prompt
    a = alphas_cumprod()[t].view(-1, 1, 1, 1).to(z)
    z_t = a.sqrt() * z + (1 - a).sqrt() * eps
    predicted = model.unet(z_t, t.to(z.device), prompted * model.prompts[bad])
    error = (predicted - eps).float().square().mean((1, 2, 3))
    snr = (a / (1 - a)).flatten()
    return {"eps": (error * snr.clamp(max=5) / snr).mean()}     # min-SNR weights, 2303.09556


def estimator_losses(model, lq, scores):
    """How far estimates are from true scores.  lq: (B, 3, h, w) in [0, 1]; scores: (B, 2)"""
    blur, noise = (model.denet(lq) - scores).abs().mean(0)
    return {"blur": blur, "noise": noise}


def reconstruct(sr, target, lpips, stage):
    """Part 1. sr, target: (B, 3, H, W) in [-1, 1]; lpips: None = L2 alone"""
    terms = {"l2": stage.lambda_l2 * F.mse_loss(sr, target)}
    if lpips:
        terms["lpips"] = stage.lambda_lpips * lpips(sr, target).mean()
    return terms        # Eq. S3Diff (6)


def adversary(sr, D, stage, plan=None):
    """Part 2. sr: (B, 3, H, W) in [-1, 1]; plan: of `D.draw`, None = D sees sr as it is"""
    return {"gan": stage.lambda_gan * D(sr, "generator", plan).mean()}      # Eq. S3Diff (6)


def real(hq, D, stage, plan=None):
    """Part 3. hq: (B, 3, H, W) in [-1, 1]; D: the discriminator or its replica"""
    return {"d_real": stage.lambda_gan * D(hq, "real", plan).mean()}


def fake(sr, D, stage, plan=None):
    """Part 4. sr: (B, 3, H, W) in [-1, 1], without gradient"""
    return {"d_fake": stage.lambda_gan * D(sr, "fake", plan).mean()}


LOSSES = {"prior": prior_losses, "estimator": estimator_losses}
TERMS = {"prior": ("eps",), "estimator": ("blur", "noise"), "adapters": ("l2", "lpips", "gan", "d_real", "d_fake")}


# ---- step, evaluate, save


def step(run):
    """One step of the optimizer; gradients of the micro-batches are added up."""
    training.set_lr(run.optimizer, run.lr)
    for i, (hq, g) in enumerate(training.micro_batches(run)):
        inputs = draw(run, hq, g)
        with training.forward(run, run.losses, i):
            terms = run.losses(*inputs)
        training.backward(run, terms)
    run.grad_norm = training.update(run, run.optimizer)
    training.ema_update(run.ema, run.model, ema_decay(run))


def ema_decay(run):
    """Smaller at first, or the average would long remember the initial weights."""
    return min(run.stage.ema, (1 + run.step) / (10 + run.step))


def step_adapters(run):
    """Stage adapters: the four parts, or the first alone; gradients of the micro-batches are added up in each."""
    training.set_lr(run.optimizer, run.lr)
    training.set_lr(run.optimizer_D, run.stage.lr_D or run.lr)
    run.l2_alone = run.step / run.stage.steps < run.stage.l2_alone
    batch = [draw(run, hq, g) for hq, g in training.micro_batches(run)]

    # ---- 1. reconstruct
    for i, pairs in enumerate(batch):
        with training.forward(run, run.generate, i):
            context, target = prompts_and_targets(run.model, pairs)
            sr = run.generate(pairs.lq_up, pairs.scores, context, pairs.generator)
            terms = reconstruct(sr, target, None if run.l2_alone else run.lpips, run.stage)
        training.backward(run, terms)
    run.grad_norm = training.update(run, run.optimizer)

    if not run.l2_alone:
        compete(run, batch)
    training.ema_update(run.ema, run.model, ema_decay(run))


def compete(run, batch):
    """Parts 2 to 4: generator against discriminator.  batch: list of Pairs, a micro-batch each"""
    stage, good = run.stage, run.model.prompts[:1]

    # ---- 2. adversary
    # official: D is not frozen here, so what this leaves in its gradients teaches it a little to be deceived
    run.D.requires_grad_(False)
    results = []
    for i, pairs in enumerate(batch):
        with training.forward(run, run.generate, i):
            plan = run.D.draw(pairs.lq_up, pairs.lq_up, pairs.generator)
            # official: all photos, each with the good prompt; the paper: only those that have it in part 1
            sr = run.generate(pairs.lq_up, pairs.scores, good.expand(len(pairs.lq_up), -1, -1), pairs.generator)
            terms = adversary(sr, run.D, stage, plan)
        training.backward(run, terms)
        results.append(sr.detach())
    run.D.requires_grad_(True)
    training.update(run, run.optimizer)

    # ---- 3. real
    for i, pairs in enumerate(batch):
        plan = run.D.draw(pairs.hq, pairs.lq_up, pairs.generator)
        with training.forward(run, run.discriminate, i):
            terms = real(pairs.hq, run.discriminate, stage, plan)
        training.backward(run, terms)
    training.update(run, run.optimizer_D)

    # ---- 4. fake
    for i, (pairs, sr) in enumerate(zip(batch, results)):
        plan = run.D.draw(sr, pairs.lq_up, pairs.generator)
        with training.forward(run, run.discriminate, i):
            terms = fake(sr, run.discriminate, stage, plan)
        training.backward(run, terms)
    training.update(run, run.optimizer_D)


def prompts_and_targets(model, pairs):
    """Online negative prompting: this is what the bad prompt means.

    -> features of each image's prompt (B, 77, D), target (B, 3, H, W): the photo, with the bad prompt the LQ image
    """
    context = model.prompts[pairs.negative.long()]
    return context, torch.where(pairs.negative[:, None, None, None], pairs.lq_up, pairs.hq)


@torch.no_grad()
def evaluate(run):
    """The averaged weights on held-out photos, as the stage's function below says.

    -> {column of the log: value}, {column of the sheet: images in [-1, 1]}
    """
    hq, drawn = run.held_out
    return EVALUATE[run.args.stage](run, hq, drawn)


def evaluate_adapters(run, hq, pairs):
    """Loss of part 1 and PSNR over RGB, with the good prompt, no guidance, the mode of the posterior."""
    good, results, losses = run.ema.prompts[:1], [], []
    for lq_up, target, scores in zip(pairs.lq_up.split(1), hq.split(1), pairs.scores.split(1)):
        results.append(run.ema(lq_up, scores, good))
        losses.append(float(sum(reconstruct(results[-1], target, run.lpips, run.stage).values())))
    sr = torch.cat(results).float()
    metrics = {"held_out": sum(losses) / len(losses), "psnr": training.psnr(sr.clamp(-1, 1), hq)}
    return metrics, {"LQ": pairs.lq_up, f"result, step {run.step}": sr, "HQ": hq}


def evaluate_prior(run, hq, drawn):
    """Loss with fixed draws, and PSNR of photos with the noise of t = 300, denoised with the good prompt."""
    model, (x, bad, _), t = run.ema, drawn, 300
    loss = prior_losses(model, x, bad, training.generator(1))["eps"]
    a, z = alphas_cumprod()[t].item(), model.vae.encode(hq)
    noise = torch.randn(z.shape, generator=training.generator(2), device="cpu").to(z)
    z_t = a**0.5 * z + (1 - a) ** 0.5 * noise
    eps = model.unet(z_t, t, model.prompts[:1].expand(len(z), -1, -1))
    denoised = model.vae.decode(model.clean(z_t, eps, t)).float()
    metrics = {"held_out": float(loss), "psnr": training.psnr(denoised.clamp(-1, 1), hq)}
    return metrics, {"noisy": model.vae.decode(z_t / a**0.5), f"denoised, step {run.step}": denoised, "HQ": hq}


def evaluate_estimator(run, hq, drawn):
    """Loss, and rank correlation of each estimated score with the true one; no images."""
    lq, scores = drawn
    ranks = torch.stack([run.ema.denet(lq), scores]).argsort(1).argsort(1).float()      # (2, B, 2)
    blur, noise = (float(torch.corrcoef(pair)[0, 1]) for pair in ranks.unbind(2))
    loss = float(sum(estimator_losses(run.ema, lq, scores).values()))
    return {"held_out": loss, "rank_blur": blur, "rank_noise": noise}, {}


EVALUATE = {"prior": evaluate_prior, "estimator": evaluate_estimator, "adapters": evaluate_adapters}


def save(run):
    """The model's file, then the checkpoint: if that says that the run is over, all is there."""
    if run.rank == 0 and run.args.tiny:
        note = f"{run.title}, step {run.step}"
        tensors = {name: x for name, x in run.ema.state_dict().items() if is_known(run.args.stage, name)}
        save_model(run.out / "model.safetensors", run.model.cfg, tensors, note=note)
    elif run.rank == 0:
        training.write(run.out / "s3diff.pkl", run.model.release())
    training.save_state(run)


def main(argv=None):
    args = parse_args(argv)
    with training.alone_in(args.out):
        run = prepare(args)
        training.resume(run, SETTINGS)
        for part in (run.model.unet, *run.model.vae.children()):
            part.checkpointing = args.checkpointing
        if args.compile:
            training.compile_all(run.model.unet.blocks[:-1], run.device)
        if args.stage == "adapters":
            run.generate = training.replicate(run, run.model, run.model.forward)
            run.discriminate = training.replicate(run, run.D, run.D.forward)
        else:
            run.losses = training.replicate(run, run.model, partial(LOSSES[args.stage], run.model))
        open_data(run)
        return training.fit(run, step_adapters if args.stage == "adapters" else step, evaluate, save)


if __name__ == "__main__":
    with training.one_line_errors("train_s3diff"):
        sys.exit(main())
