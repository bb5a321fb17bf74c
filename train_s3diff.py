"""Train S3Diff: adapters on a frozen SD-Turbo, from pairs of photos and their degraded copies.

    python train_s3diff.py --data PHOTOS --out runs/s3diff
    torchrun --nproc_per_node=4 train_s3diff.py --data photos.txt --out runs/s3diff --micro-batch 4 --checkpointing

A step of stage adapters has four parts, each with its own backward and its own step of an optimizer:

    1. reconstruct   the target by L2 and LPIPS; one image in twenty has the bad prompt, and its LQ image as target
    2. adversary     all images with the good prompt: make the discriminator D take them for photos
    3. real          D is to know photos
    4. fake          D is to know the images of part 2

Apart, because 1 and 2 want different prompts; the same Adam for both, so that its moments see both gradients.
The stages, in the order of a run:

    prior       a tiny Stable Diffusion, in place of SD-Turbo               ours, with --preset tiny and letters
    estimator   of the degradation, in place of the authors'                ours, with --preset tiny and letters
    adapters    the above

The same command again goes on where it stopped, exactly; Ctrl-C and SIGTERM save first. --out holds s3diff.pkl, laid
out as the public file, for sample.py --model (with --preset tiny: model.safetensors), checkpoint-*.pt, log.csv,
loss.png and sheet.png (LQ | result | HQ of held-out photos; of a prior noisy | denoised | HQ; of an estimator none).
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

import training
from degrade import apply, degrade, plan_for, severity
from models.discriminator import Discriminator
from models.lpips import LPIPS
from models.s3diff import PRIORS, VAE_TARGETS, S3Diff, S3DiffConfig, is_in_release
from models.support.arguments import between, path_argument
from models.support.weights import fetch, load_strictly, read_tensors, save_model
from models.tiny import LETTERS_S3DIFF, TinyS3Diff, TinyS3DiffConfig, is_prior, load_autoencoder, load_prior
from models.tiny_losses import PatchDiscriminator, RandomLPIPS
from models.unet import alphas_cumprod
from models.vit import PRESETS as VITS, ViT


@dataclass
class Stage(training.Stage):
    """Hyper-parameters of a stage of S3Diff."""

    recipes: tuple = ("s3diff",)
    ema_warmup: bool = True
    lr_D: float = 0.0                   # learning rate of D, constant; 0 = as the generator's
    lambda_l2: float = 2.0
    lambda_lpips: float = 5.0
    lambda_gan: float = 0.5
    l2_share: float = 0.0               # ours: share of the steps, the first, with L2 alone and true scores: faster


@dataclass
class Run(training.Run):
    """What a run of S3Diff has beside the model: all of it is of stage adapters."""

    generate: Callable = None           # the model's forward, (lq_up, scores, context, generator) -> sr
    discriminate: Callable = None       # D's forward, (image, "real" or "fake", plan) -> (B, 1)
    lpips: torch.nn.Module = None
    D: torch.nn.Module = None           # the discriminator
    optimizer_D: torch.optim.Optimizer = None


class Pairs(NamedTuple):
    """What stage adapters draws for a micro-batch of B images."""

    lq_up: torch.Tensor                 # (B, 3, H, W) in [-1, 1], enlarged
    hq: torch.Tensor                    # (B, 3, H, W) in [-1, 1]
    scores: torch.Tensor                # (B, 2) in [0, 1], blur and noise of the LQ image
    negative: torch.Tensor              # (B,) bool: part 1 has the bad prompt, and the LQ image as target


# ---- the stages


PAPER = {       # the paper's steps, the code counts 50 epochs; batch: 4 GPUs x 4 photos x 4 accumulated micro-batches
    "adapters": Stage(steps=30_000, batch_size=64, lr=2e-5, **training.ONE_CARD),
}
TINY = {        # ours, for a laptop; recipes go by turns
    "prior": Stage(     # the embedded one was trained with --steps 3500; its loss was still falling
        steps=6000, batch_size=16, lr=6e-4, schedule="cosine", warmup=300, ema=0.999,
        crop=128, recipes=("s3diff", "vosr", "s3diff", "clean")),
    "estimator": Stage(
        steps=1500, batch_size=4, lr=1e-3, schedule="cosine", warmup=100, ema=0.99,
        crop=256, recipes=("wide", "s3diff", "wide", "vosr", "clean")),
    # lambda_lpips: of RandomLPIPS, whose gradient is larger: a third of L2's (measured for GramSR, train_gramsr.py)
    # lambda_gan: at .5 so small a D soon believed everything, and edges got haloes (tests/RESULTS.md)
    "adapters": Stage(
        steps=4000, batch_size=8, lr=1e-3, schedule="cosine", warmup=100, ema=0.999,
        crop=128, **training.TINY_DAMAGE,
        lambda_lpips=0.02, lambda_gan=0.1, lr_D=5e-4, l2_share=0.75),
}
LETTERS = {     # ours, for --data digits and --data letters, not yet tuned; an image is 2 x 2 cells
    "prior": Stage(
        steps=800, batch_size=16, lr=1e-3, schedule="cosine", warmup=50, ema=0.998, crop=64, recipes=("letters",)),
    "estimator": Stage(
        steps=300, batch_size=4, lr=1e-3, schedule="cosine", warmup=30, ema=0.98, crop=128, recipes=("letters",)),
    "adapters": Stage(
        steps=600, batch_size=16, lr=1e-3, schedule="cosine", warmup=50, ema=0.99, crop=64, recipes=("letters",),
        branches_per="image", lambda_lpips=0.02, lambda_gan=0.1, lr_D=5e-4, l2_share=0.5),
}
PRESETS = {     # name: config of the model, its stages
    "sd-turbo": (S3DiffConfig(), PAPER),
    "letters": (LETTERS_S3DIFF, LETTERS), "tiny": (TinyS3DiffConfig(), TINY),
}
PLACES = {      # of adapters, for --lora: names of the VAE's layers, "" = none of them; the UNet always has some
    "unet": "",
    "unet+encoder": VAE_TARGETS,
    "unet+decoder": VAE_TARGETS.replace("encoder", "decoder", 1),
    "unet+encoder+decoder": VAE_TARGETS.replace("encoder", "(encoder|decoder)", 1),
}
TINY_PLACES = {     # of the tiny VAE's layers
    "unet": "",
    "unet+encoder": "encoder",
    "unet+decoder": r"decoder|residual\..*",
    "unet+encoder+decoder": r"encoder|decoder|residual\..*",
}
# flags of stage adapters alone, and their defaults; None: the preset's
ABLATIONS = {"lora": "unet+encoder", "modulation": "blocks", "neg_prob": 0.05, "rank_unet": None, "rank_vae": None,
             "start_step": None, "prior": None}
SETTINGS = ("preset", "stage", "lora", "modulation", "neg_prob", "rank_unet", "rank_vae", "start_step", "prior", "data",
            "lq", "init", "seed")     # flags that stay when a run is resumed
NEEDS = """
what full size needs, of one card:
  stage             steps x images     memory      hours, RTX 4090     hours, H200
  adapters          30,000 x 64        5.0 GB      640                 640
  The author reports 100 minutes for 500 steps on four A100 (400 GPU hours in all), and little gain after 5,000.
"""


def parse_args(argv=None):
    p = training.parser(__doc__, NEEDS)
    p.add_argument("--stage", default="adapters", choices=TINY, help="adapters (default); others: of our presets only")
    p.add_argument("--preset", default="sd-turbo", choices=PRESETS,
                   help="sizes and hyper-parameters: sd-turbo (default); ours: tiny, letters (for --data "
                   "digits), all trained here")
    p.add_argument("--init", type=path_argument,
                   help="model to start from: s3diff, an s3diff.pkl, another run's --out (default: new adapters"
                   " on SD-Turbo, or on the embedded tiny prior; none: on random weights, ours)")
    # the paper's ablations, of stage adapters
    p.add_argument("--lora", choices=PLACES, help="what gets adapters (Table 4; default unet+encoder)")
    p.add_argument("--modulation", choices=("blocks", "shared", "none"),
                   help="a matrix for each block (default blocks), one for all blocks, or plain LoRA (Table 5)")
    p.add_argument("--neg-prob", type=between(0, 1),
                   help="how often a photo has the bad prompt (default 0.05); 0 = no negative prompting (Table 6)")
    p.add_argument("--rank-unet", type=between(1, 1024, whole=True), help="of the UNet's adapters (Table 7; 32)")
    p.add_argument("--rank-vae", type=between(1, 1024, whole=True), help="of the VAE's (Table 7; 16, tiny 8)")
    p.add_argument("--start-step", type=between(1, 999, whole=True),
                   help="t of the one step (Table 8; default 999, tiny 250); below 999 with its noise, but tiny")
    p.add_argument("--prior", choices=PRIORS, help="what is adapted (Figure 9; default sd-turbo)")
    training.add_arguments(p)
    args = p.parse_args(argv)
    _, stages = PRESETS[args.preset]
    args.tiny = args.preset in ("letters", "tiny")
    if args.stage not in stages:
        p.error(f"--stage {args.stage} is for --preset tiny; {args.preset} has public weights")
    if args.preset == "letters" and args.stage != "prior" and not args.init:
        p.error(f"--stage {args.stage} of --preset letters needs --init, the --out folder of the stage before it")
    if args.lq and args.stage != "adapters":
        p.error(f"--lq is not read by --stage {args.stage}")
    given = [name for name in ABLATIONS if getattr(args, name) is not None]
    if given and args.stage != "adapters":
        p.error(f"--{given[0].replace('_', '-')} is not read by --stage {args.stage}")
    if args.prior and args.tiny:
        p.error("--prior is for --preset sd-turbo; tiny has one of its own")
    changes_adapters = {"lora", "modulation", "rank_unet", "rank_vae", "prior"} & set(given)
    if args.init and changes_adapters and not args.tiny:
        p.error("--init brings its own --lora, --modulation, --rank-unet, --rank-vae and --prior")
    for name, default in ABLATIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


# ---- build: the networks, and which of them learn


def build(args, cfg):
    """Build the networks.  -> S3Diff to train, a line on its origin. What loads --init refuses other networks."""
    places = TINY_PLACES if args.tiny else PLACES
    cfg = replace(cfg, r_unet=args.rank_unet or cfg.r_unet, r_vae=args.rank_vae or cfg.r_vae,
                  vae_targets=places[args.lora], modulation=args.modulation, t=args.start_step or cfg.t,
                  prior=args.prior or cfg.prior)
    if args.tiny:
        return build_tiny(args, cfg)
    if args.init:
        model = S3Diff.from_pretrained(args.init)
        model.cfg.t = cfg.t
        return model, f"from {args.init}"
    model = S3Diff.with_prior(cfg)
    model.new_adapters()
    return model, f"{cfg.prior} with new adapters"


def build_tiny(args, cfg):
    """Build TinyS3Diff with the autoencoder of all tiny models, what --init has, the rest new.

    -> the model, a line on its origin
    """
    model, origin = TinyS3Diff(cfg), "FROM SCRATCH"
    # Stable Diffusion's text encoder makes its prompts; here stage prior learns them
    model.prompts = torch.nn.Parameter(torch.randn_like(model.prompts))
    make_blind_for_brightness(model.denet)
    if args.preset == "tiny":
        # with its residual network: on the linear decoder alone, an adversary's textures become a weave of its cells
        load_autoencoder(model)
    if args.init == "none" or args.stage == "prior" and not args.init:
        return model, origin
    everything = args.stage != "estimator"      # which begins anew
    path = load_prior(model, args.init, wanted=lambda name: everything or is_prior(name))
    return model, f"from {path}"


@torch.no_grad()
def make_blind_for_brightness(denet):
    """Change the new estimator's first convolutions, so that differences of pixels, noise and edges, are all they see.

    Ours. Differences are small, pixels are not: what these layers make of assets/example.png is 3 to 8 times as small
    without the mean weight (both layers, four seeds). The factor 8 makes up for it.
    """
    for conv in denet.conv_first:
        mean = conv.weight.mean((2, 3), keepdim=True)       # without it the weights of a channel add up to 0
        conv.weight.copy_(8 * (conv.weight - mean))


def build_adversary(args):
    """Build what judges stage adapters.  -> LPIPS, discriminator"""
    if args.tiny:
        return RandomLPIPS().requires_grad_(False), PatchDiscriminator()
    path = fetch("dino_vitbase16_pretrain.pth")
    with torch.device("meta"):
        vit = ViT(VITS["dino_vitb16"])
    load_strictly(vit, read_tensors(path), path)
    return LPIPS.from_pretrained("vgg"), Discriminator(vit)


def learns(run, name):
    """Tell whether the run's stage trains the tensor of that name."""
    if run.args.stage == "prior":
        return is_prior(name) and not name.startswith("vae.")
    if run.args.stage == "estimator":
        return name.startswith("denet.")
    return is_in_release(name)


def prepare(args):
    """Set up networks, what is to be learned, optimizers.  -> Run"""
    cfg, stages = PRESETS[args.preset]
    run = Run(args, stages[args.stage])
    training.start(run)
    run.title, run.terms = f"S3Diff {args.preset}, stage {args.stage}", TERMS[args.stage]
    if args.stage == "estimator":
        run.columns = ("rank_blur", "rank_noise")
    run.draw = DRAW[args.stage]
    training.check_memory(run, lambda: S3Diff(cfg), partial(learns, run))
    model, run.origin = build(args, cfg)
    training.store_in_half(run, model.unet, model.vae)
    training.set_model(run, model, partial(learns, run), optimizer_name="G_optimizer")     # of G, the generator
    if args.stage == "adapters":
        prepare_adversary(run)
    return run


def prepare_adversary(run):
    """Set up the discriminator D, its optimizer, LPIPS."""
    lpips, D = build_adversary(run.args)
    run.lpips, run.D = lpips.to(run.device), D.to(run.device)
    run.optimizer_D = training.adamw(list(D.parameters()), run.stage)
    run.state |= {"D": run.D, "D_optimizer": run.optimizer_D}
    if run.stage.l2_share > 0 and not run.args.lq:
        run.draw = draw_adapters_and_truth      # held-out photos keep their true scores throughout


# ---- data: what a stage draws from photos
# run: Run; hq: (B, 3, H, W) in [0, 1]; recipe: of degrade.py, or the LQ images of own pairs; g: generator


def draw_prior(run, hq, recipe, g):
    """Degrade every image with a chance of one half.

    -> x (B, 3, H, W) in [-1, 1], is_degraded (B,) 1 where x is, else 0
    """
    is_degraded = torch.rand(len(hq), generator=g, device=g.device) < 0.5
    x = hq.clone()
    if is_degraded.any():
        which = is_degraded.nonzero()[:, 0].to(hq.device, non_blocking=True)
        x[which] = degrade(hq[which], recipe, g)[1]
    return 2 * x - 1, is_degraded.long().to(hq.device, non_blocking=True)


def draw_estimator(run, hq, recipe, g):
    """Degrade photos.  -> lq (B, 3, h, w) in [0, 1], true scores (B, 2)"""
    lq, _, scores = degrade_and_score(hq, recipe, g)
    return lq, scores


def draw_adapters(run, hq, recipe, g):
    """Degrade photos, or take own pairs, and let the estimator say how bad they are, as it will in use.  -> Pairs"""
    lq, lq_up = training.low_quality(hq, recipe, g)
    return make_pairs(run, hq, lq_up, run.model.estimate(lq), g)


def draw_adapters_and_truth(run, hq, recipe, g):
    """Degrade photos, and take the true scores.  -> Pairs"""
    _, lq_up, scores = degrade_and_score(hq, recipe, g)
    return make_pairs(run, hq, lq_up, scores, g)


def make_pairs(run, hq, lq_up, scores, g):
    """Choose by online negative prompting whose target is the LQ image.  -> Pairs"""
    drawn = torch.rand(len(hq), generator=g, device=g.device)
    negative = (drawn < run.args.neg_prob).to(hq.device, non_blocking=True)
    return Pairs(2 * lq_up - 1, 2 * hq - 1, scores, negative)


def degrade_and_score(hq, recipe, g):
    """Degrade each photo, or each group of `branches_per`, by a plan, and say how badly.

    -> lq, lq_up, (B, 2) of `severity`
    """
    lqs, lqs_up, scores = [], [], []
    together = recipe.branches_per if isinstance(recipe.branches_per, int) else 1
    for some in hq.split(together):
        plan = plan_for(some, recipe, g)
        lq, lq_up = apply(plan, some)
        lqs.append(lq)
        lqs_up.append(lq_up)
        scores.append(severity(plan, some, lq))
    return torch.cat(lqs), torch.cat(lqs_up), torch.cat(scores)


DRAW = {"prior": draw_prior, "estimator": draw_estimator, "adapters": draw_adapters}


# ---- the losses: stages prior and estimator have one
# run: Run; model: S3Diff, while it learns or averaged; then what `draw` returned; g: generator of all that is random
# -> {name: scalar}, summed up


def prior_losses(run, model, x, is_degraded, g):
    """Train a Stable Diffusion: predict the noise that was added, with an image's prompt, or with none.

    x: (B, 3, H, W) in [-1, 1]; is_degraded: (B,) 0 or 1, the number of its prompt
    """
    z = model.vae.encode(x)
    t = prior_times(len(z), g)
    eps = torch.randn(z.shape, generator=g, device=g.device).to(z)
    has_prompt = (torch.rand(len(z), 1, 1, generator=g, device=g.device) > 0.1).to(z)        # nine in ten
    a = alphas_cumprod().to(t.device, non_blocking=True)[t].view(-1, 1, 1, 1).to(z)
    z_t = a.sqrt() * z + (1 - a).sqrt() * eps
    predicted = model.unet(z_t, t.to(z.device), has_prompt * model.prompts[is_degraded])
    error = (predicted - eps).float().square().mean((1, 2, 3))
    snr = (a / (1 - a)).flatten()
    return {"eps": (error * snr.clamp(max=5) / snr).mean()}     # min-SNR weights, 2303.09556


def prior_times(B, g):
    """Draw times of 0 .. 999: one image in ten is at the start, one in ten at the end, the others anywhere.

    Ours: there start the one step of GramSR, at t = 1, and of S3Diff, at 999 (of the tiny one with --start-step alone).
    """
    anywhere = torch.randint(1000, (B,), generator=g, device=g.device)
    start = torch.randint(10, (B,), generator=g, device=g.device)
    end = torch.randint(900, 1000, (B,), generator=g, device=g.device)
    where = torch.rand(B, generator=g, device=g.device)
    t = torch.where(where < 0.1, start, anywhere)
    return torch.where(where > 0.9, end, t)


def estimator_losses(run, model, lq, scores, g):
    """Measure how far estimates are from true scores.  lq: (B, 3, h, w) in [0, 1]; scores: (B, 2)"""
    blur, noise = (model.denet(lq) - scores).abs().mean(0)
    return {"blur": blur, "noise": noise}


LOSSES = {"prior": prior_losses, "estimator": estimator_losses}


# ---- the losses of stage adapters, one for each part of its step
# they are given the images, since a step makes them twice; plan: of `D.draw`; without one, Discriminator sees images as
# they are. stage: for its lambdas -> {name: scalar}, summed up


def reconstruct(sr, target, lpips, stage):
    """Compute part 1.  sr, target: (B, 3, H, W) in [-1, 1]; lpips: None = L2 alone"""
    terms = {"l2": stage.lambda_l2 * F.mse_loss(sr, target)}
    if lpips:
        terms["lpips"] = stage.lambda_lpips * lpips(sr, target).mean()
    return terms        # Eq. S3Diff (6)


def adversary(sr, D, stage, plan=None):
    """Compute part 2.  sr: (B, 3, H, W) in [-1, 1]"""
    return {"gan": stage.lambda_gan * D(sr, "generator", plan).mean()}      # Eq. S3Diff (6)


def real(hq, D, stage, plan=None):
    """Compute part 3.  hq: (B, 3, H, W) in [-1, 1]. As officially, lambda_gan weighs D's own losses, too."""
    return {"d_real": stage.lambda_gan * D(hq, "real", plan).mean()}


def fake(sr, D, stage, plan=None):
    """Compute part 4.  sr: (B, 3, H, W) in [-1, 1], without gradient"""
    return {"d_fake": stage.lambda_gan * D(sr, "fake", plan).mean()}


TERMS = {"prior": ("eps",), "estimator": ("blur", "noise"), "adapters": ("l2", "lpips", "gan", "d_real", "d_fake")}


# ---- the step of stage adapters; the others have training.step


def step_adapters(run):
    """Do the four parts, or the first alone; gradients of the micro-batches are added up in each."""
    l2_alone = run.step / run.stage.steps < run.stage.l2_share
    know_truth = l2_alone and not run.args.lq       # nobody knows the scores of own pairs
    draw = draw_adapters_and_truth if know_truth else draw_adapters
    lpips = None if l2_alone else run.lpips
    training.set_lr(run.optimizer, run.lr)
    training.set_lr(run.optimizer_D, run.stage.lr_D or run.lr)
    # kept for all four parts: each looks at the same images; g goes on from part to part
    batch = []
    for hq, recipe, g in training.micro_batches(run):
        batch.append((draw(run, hq, recipe, g), g, training.on_device(g, run.device)))

    # ---- 1. reconstruct
    for i, (pairs, _, noise) in enumerate(batch):
        with training.micro_batch_context(run, run.generate, i):
            context, target = prompts_and_targets(run.model, pairs)
            sr = run.generate(pairs.lq_up, pairs.scores, context, noise)
            terms = reconstruct(sr, target, lpips, run.stage)
        training.backward(run, terms)
    run.grad_norm = training.update(run, run.optimizer)

    if not l2_alone:
        compete(run, batch)
    training.ema_update(run.ema, run.model, training.ema_decay(run))


def compete(run, batch):
    """Do parts 2 to 4: generator against discriminator.

    batch: a micro-batch each, Pairs, generator of plans, generator of noise on the device
    """
    stage, good = run.stage, run.model.prompts[:1]

    # ---- 2. adversary
    # official: D is not frozen here, so what this leaves in its gradients teaches it a little to be deceived
    run.D.requires_grad_(False)
    results = []
    for i, (pairs, g, noise) in enumerate(batch):
        with training.micro_batch_context(run, run.generate, i):
            plan = run.D.draw(pairs.lq_up, pairs.lq_up, g)
            # official: all photos, each with the good prompt; the paper: only those that have it in part 1
            sr = run.generate(pairs.lq_up, pairs.scores, good.expand(len(pairs.lq_up), -1, -1), noise)
            # D itself, not its replica: it learns nothing here, so there are no gradients of it to average
            terms = adversary(sr, run.D, stage, plan)
        training.backward(run, terms)
        results.append(sr.detach())
    run.D.requires_grad_(True)
    training.update(run, run.optimizer)

    # ---- 3. real
    for i, (pairs, g, _) in enumerate(batch):
        plan = run.D.draw(pairs.hq, pairs.lq_up, g)
        with training.micro_batch_context(run, run.discriminate, i):
            terms = real(pairs.hq, run.discriminate, stage, plan)
        training.backward(run, terms)
    training.update(run, run.optimizer_D)

    # ---- 4. fake
    for i, (pairs, g, _) in enumerate(batch):
        sr = results[i]
        plan = run.D.draw(sr, pairs.lq_up, g)
        with training.micro_batch_context(run, run.discriminate, i):
            terms = fake(sr, run.discriminate, stage, plan)
        training.backward(run, terms)
    training.update(run, run.optimizer_D)


def prompts_and_targets(model, pairs):
    """Choose by online negative prompting: the bad prompt means LQ images, so with it the LQ image is the target.

    -> features of each image's prompt (B, 77, D), target (B, 3, H, W)
    """
    context = model.prompts[pairs.negative.long()]
    is_negative = pairs.negative[:, None, None, None]
    return context, torch.where(is_negative, pairs.lq_up, pairs.hq)


# ---- evaluate, save


@torch.no_grad()
def evaluate(run):
    """Measure the averaged weights on held-out crops, one after the other, as the stage's function below says.

    -> {column of the log: value}, {column of the sheet: images in [-1, 1]}
    """
    return EVALUATE[run.args.stage](run)


def evaluate_adapters(run):
    """Measure the loss of part 1, and PSNR over RGB, with the good prompt, no guidance, the mode of the posterior."""
    good, results, losses = run.ema.prompts[:1], [], []
    for lq_up, hq, scores, _ in run.held_out:
        sr = run.ema(lq_up, scores, good)
        terms = reconstruct(sr, hq, run.lpips, run.stage)
        losses.append(float(sum(terms.values())))
        results.append(sr)
    sr, hq = torch.cat(results).float(), run.held_out_hq
    metrics = {"held_out": sum(losses) / len(losses), "psnr": training.psnr(sr.clamp(-1, 1), hq)}
    lq_up = torch.cat([lq_up for lq_up, *_ in run.held_out])
    return metrics, {"LQ": lq_up, f"result, step {run.step}": sr, "HQ": hq}


def evaluate_prior(run):
    """Measure the loss, and PSNR of photos with the noise of t = 300, denoised with the good prompt."""
    model, hq, t, noisy, results = run.ema, run.held_out_hq, 300, [], []
    a = alphas_cumprod()[t].item()
    for i, one in enumerate(hq.split(1)):
        z = model.vae.encode(one)
        z_t = a**0.5 * z + (1 - a) ** 0.5 * training.fixed_noise(z, i)
        eps = model.unet(z_t, t, model.prompts[:1])
        noisy.append(model.vae.decode(z_t / a**0.5))
        results.append(model.vae.decode(model.clean(z_t, eps, t)).float())
    denoised = torch.cat(results)
    metrics = {"held_out": training.held_out_loss(run, prior_losses), "psnr": training.psnr(denoised.clamp(-1, 1), hq)}
    return metrics, {"noisy": torch.cat(noisy), f"denoised, step {run.step}": denoised, "HQ": hq}


def evaluate_estimator(run):
    """Measure the loss, and the rank correlation of each estimated score with the true one; no images."""
    estimates = torch.cat([run.ema.denet(lq) for lq, _ in run.held_out])
    scores = torch.cat([scores for _, scores in run.held_out])
    loss = training.held_out_loss(run, estimator_losses)
    blur, noise = (rank_correlation(estimates[:, i], scores[:, i]) for i in range(2))
    return {"held_out": loss, "rank_blur": blur, "rank_noise": noise}, {}


def rank_correlation(a, b):
    """Compute Spearman's correlation.  a, b: (N,) -> float"""
    # the first argsort lists places by size; the second inverts that: the rank of each place
    ranks = [x.argsort().argsort().float() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


EVALUATE = {"prior": evaluate_prior, "estimator": evaluate_estimator, "adapters": evaluate_adapters}


def is_kept(stage, name):
    """Tell whether a tiny stage's file holds the tensor of that name: what it, or a stage before it, has trained."""
    if stage == "adapters":
        return True
    return is_prior(name) or (stage == "estimator" and name.startswith("denet."))


def save(run):
    """Write the model's file, then the checkpoint: if that says that the run is over, all is there."""
    if run.rank == 0 and run.args.tiny:
        note = f"{run.title}, step {run.step}"
        tensors = {name: x for name, x in run.ema.state_dict().items() if is_kept(run.args.stage, name)}
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
            part.checkpointing = run.stage.checkpointing
        if args.compile:
            training.compile_all(run.model.unet.blocks[:-1], run.device)
        step = training.step
        if args.stage == "adapters":
            step = step_adapters
            run.generate = training.replicate(run, run.model, run.model.forward)
            run.discriminate = training.replicate(run, run.D, run.D.forward)
        else:
            run.losses = training.replicate(run, run.model, partial(LOSSES[args.stage], run, run.model))
        training.open_data(run)
        return training.fit(run, step, evaluate, save)


if __name__ == "__main__":
    with training.one_line_errors("train_s3diff"):
        sys.exit(main())
