"""Train GramSR: three LoRA sets on a frozen Stable Diffusion 2.1, one after the other, each with losses of its own.

    python train_gramsr.py --stage pixel    --data PHOTOS --out runs/pixel
    python train_gramsr.py --stage semantic --data PHOTOS --out runs/semantic --init runs/pixel
    python train_gramsr.py --stage texture  --data PHOTOS --out runs/texture  --init runs/semantic

    torchrun --nproc_per_node=4 train_gramsr.py --stage pixel --data photos.txt --out runs/pixel --micro-batch 2

    pixel       L2                  right on average, hence smooth
    semantic    + LPIPS + CSD       what a classifier and the diffusion model itself would rather see
    texture     + Gram              which patches resemble which

A stage adds its own set and freezes those before it; the token adapter learns in all three.

Nobody has published code of this training. What is inferred is marked so below; what is known, tests/RESULTS.md lists.

The same command again goes on where it stopped, exactly; Ctrl-C and SIGTERM save first. --out holds the model, laid out
as the public files, for sample.py --model and the next stage's --init (with --preset tiny: model.safetensors, too),
checkpoint-*.pt, log.csv, loss.png and sheet.png (LQ | result | HQ of held-out photos). With --patience the model is
the best so far, not the last.
"""

import argparse
import copy
import json
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F

import training
from degrade import degrade
from models.gram import CSD_TIMES, features, loss_csd, loss_gram
from models.gramsr import SETS, GramSR, GramSRConfig, token_adapter
from models.lpips import LPIPS
from models.support.arguments import between
from models.support.evaluation import find_niqe
from models.support.imaging import round8
from models.support.metrics import BLOCK, niqe
from models.support.precision import in_half
from models.support.weights import fetch, load_strictly, read_tensors, save_model
from models.tiny import GRAMSR_STAGES, RandomLPIPS, TinyGramSR, TinyGramSRConfig, load_prior
from models.vit import PRESETS as VITS, DINOv3


@dataclass
class Stage(training.Stage):
    """Hyper-parameters of a stage of GramSR. --rank and --patience override them, too."""

    batch_size: int = 16
    lr: float = 5e-5                    # inferred: constant, for the token adapter too
    crop: int = 512                     # inferred: PiSA-SR's
    recipes: tuple = ("gramsr",)
    branches_per: str = "image"
    rank: int = 4                       # of the new LoRA set
    lambda_l2: float = 1.0              # of a term that is 0 nothing is computed
    lambda_lpips: float = 0.0
    lambda_csd: float = 0.0
    lambda_gram: float = 0.0
    guidance: float = 7.5               # of CSD; inferred: PiSA-SR's
    patience: int = 0                   # evaluations without a better one after which the stage is over; 0 = none
    learn_vit: bool = False             # ours, tiny: no DINO is so small, it learns with the first set


@dataclass
class Run(training.Run):
    """What a run of GramSR has beside the model."""

    lpips: torch.nn.Module = None
    vit: torch.nn.Module = None         # DINOv3 of the Gram loss
    niqe: object = None                 # NIQE's parameters, where they are on this disk
    judge: str = "held_out"             # the metric of early stopping, smaller is better
    best: dict = field(default_factory=dict)    # {judge: its smallest value so far}
    waited: int = 0                     # evaluations since then
    written: list = field(default_factory=list)     # names of the model's files


# ---- the stages


PAPER = {   # inferred: the files' names end at 12,501 and 53,001, PiSA-SR has 4000 of pixel
    "pixel": Stage(steps=4000),
    "semantic": Stage(steps=8501, before=4000, lambda_lpips=2.0, lambda_csd=1.0),
    # inferred: LPIPS and CSD stay; that it is stopped early by NIQE is known, not when
    "texture": Stage(steps=40_500, before=12_501, lr=5e-6, lambda_lpips=2.0, lambda_csd=1.0, lambda_gram=500.0,
                     patience=10),
}
TINY = {name: Stage(**settings) for name, settings in GRAMSR_STAGES.items()}
PRESETS = {     # name: config of the model, its stages
    "sd-2.1": (GramSRConfig(ranks={}), PAPER),
    "tiny": (TinyGramSRConfig(), TINY),
}
SETTINGS = ("stage", "preset", "data", "init", "seed", "gram", "rank")      # flags that stay when a run is resumed


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", required=True, choices=PAPER)
    p.add_argument("--preset", default="sd-2.1", choices=PRESETS, help="sd-2.1 (default); tiny: on S3Diff's prior")
    p.add_argument("--init", type=training.path,
                   help="model to start from: the earlier stage's --out; stage pixel, tiny: --out of "
                   "train_s3diff.py --stage prior (default: the embedded one; none: random numbers)")
    # what the paper leaves open
    p.add_argument("--gram", choices=("patches", "channels"),
                   help="the matrix of stage texture: of patches (default) or channels")
    p.add_argument("--patience", type=between(0, 10**6, whole=True),
                   help="stop after so many evaluations without a better NIQE of the held-out images (or loss, "
                        "without its file), and keep the best model; 0 = never (default 10 in stage texture, else 0)")
    p.add_argument("--rank", type=between(1, 1024, whole=True), help="rank of the new LoRA set (default 4)")
    training.add_arguments(p)
    args = p.parse_args(argv)
    _, stages = PRESETS[args.preset]
    args.tiny = args.preset == "tiny"
    if args.stage == "pixel" and args.init and not args.tiny:
        p.error("--stage pixel comes first: --init is for the later ones")
    if args.stage != "pixel" and not args.init:
        p.error(f"--stage {args.stage} needs --init, the --out folder of the stage before it")
    if args.gram and args.stage != "texture":
        p.error(f"--gram is not read by --stage {args.stage}")
    args.gram = args.gram or "patches"
    args.rank = args.rank or stages[args.stage].rank
    return args


# ---- build: the networks, and which of them learn


def build(args, cfg, stage):
    """-> GramSR with its new LoRA set, LPIPS and DINOv3 for its losses (None if not needed), a line on their origin."""
    earlier = list(SETS)[: list(SETS).index(args.stage)]
    if earlier:
        model, origin = build_later(args, cfg, earlier)
    else:
        model, origin = build_first(args, cfg)
    model.add_set(args.stage, stage.rank)
    lpips, vit = None, None
    if stage.lambda_lpips:
        lpips = RandomLPIPS() if args.tiny else LPIPS.from_pretrained("vgg")
        lpips.requires_grad_(False)
    if stage.lambda_gram:
        vit = copy.deepcopy(model.vit) if args.tiny else small_dino()
        vit.requires_grad_(False)
    return model, lpips, vit, f"{origin}, new LoRA set {args.stage}"


def build_first(args, cfg):
    """-> GramSR without a LoRA set, around its prior, with a new token adapter; a line on its origin"""
    if args.tiny:
        model, origin = TinyGramSR(cfg), "FROM SCRATCH"
        if args.init != "none":
            origin = f"from {load_prior(model, args.init)}"
    else:
        model, origin = GramSR.with_prior(cfg), "SD 2.1 and DINOv3, new adapter"
    # now with numbers
    model.adapter = token_adapter(cfg.vit.embed_dim, cfg.unet.context_dim, cfg.unet.context_dim)
    return model, origin


def build_later(args, cfg, earlier):
    """-> GramSR of --init, which must have the LoRA sets `earlier`; a line on its origin. Raises UserError."""
    system = TinyGramSR if args.tiny else GramSR
    model = system.from_pretrained(args.init)
    if list(model.cfg.ranks) != earlier:
        have, want = " and ".join(model.cfg.ranks), " and ".join(earlier)
        raise training.UserError(f"{args.init}: has LoRA set {have}; --stage {args.stage} starts from {want}")
    # as JSON, in which files have them: a tuple becomes a list
    if json.dumps(asdict(replace(model.cfg, ranks={}))) != json.dumps(asdict(cfg)):
        raise training.UserError(f"{args.init}: its networks are not those of --preset {args.preset}")
    return model, f"from {args.init}"


def small_dino():
    """DINOv3 of the Gram loss, which is not the one that makes the tokens."""
    path = fetch("dinov3-vits16plus-pretrain-lvd1689m/model.safetensors")
    with torch.device("meta"):
        vit = DINOv3(VITS["dinov3_vits16plus"])
    load_strictly(vit, read_tensors(path), path)
    return vit


def is_learned(name, learn_vit=False):
    """Whether a parameter is of a LoRA set or the token adapter: all that is not in public files."""
    return "lora_" in name or name.startswith("adapter.") or learn_vit and name.startswith("vit.")


def prepare(args):
    """Networks, what is to be learned, optimizer.  -> Run"""
    cfg, stages = PRESETS[args.preset]
    run = Run(args, stages[args.stage])
    training.start(run)
    run.title = f"GramSR {args.preset}, stage {args.stage}"
    run.terms = tuple(name for name in TERMS if getattr(run.stage, f"lambda_{name}"))
    run.columns = ("niqe",)
    torch.manual_seed(args.seed + list(SETS).index(args.stage))     # or all sets would begin alike
    model, lpips, vit, run.origin = build(args, cfg, run.stage)
    run.is_saved = partial(is_learned, learn_vit=run.stage.learn_vit)
    # inferred: the adapter learns in each stage; the authors release a new one with each set
    trained = [*model.lora(args.stage).values(), *model.adapter.parameters()]
    if run.stage.learn_vit:
        trained += model.vit.parameters()
    run.trained = training.freeze_all_but(model, trained)
    if run.dtype != torch.float32 and not args.tiny:
        in_half(model.unet, run.dtype, adapters=False)      # earlier LoRA sets go into the files as they came
    run.model = model.to(run.device)
    run.ema = run.model     # no average
    run.lpips, run.vit = lpips and lpips.to(run.device), vit and vit.to(run.device)
    # a new one a stage: PiSA-SR's would go on moving what is frozen
    run.optimizer = training.adamw(run.trained, run.stage)
    run.state = {"model": run.model, "optimizer": run.optimizer, "scaler": run.scaler}
    if run.stage.crop >= 2 * BLOCK:
        run.niqe = find_niqe(None)      # None where it is not on this disk
        run.judge = "niqe" if run.niqe else "held_out"
    return run


# ---- data: photos, and what a stage draws from them


def open_data(run):
    """Photos to learn from; held-out ones with their LQ images."""
    hq = training.open_photos(run)
    lq_up = degrade(hq, run.recipes[0], training.generator(0))[1]
    run.held_out = 2 * hq - 1, 2 * lq_up - 1


def draw(run, hq, g):
    """Degrade photos.  hq: (B, 3, H, W) in [0, 1]; g: generator

    -> hq, lq_up (B, 3, H, W) in [-1, 1], g for the losses
    """
    lq_up = degrade(hq, training.recipe(run), g)[1]
    return 2 * hq - 1, 2 * lq_up - 1, g


# ---- the losses: one function, since each stage has those of the stages before


def losses(model, lpips, vit, stage, gram, hq, lq_up, g):
    """hq, lq_up: (B, 3, H, W) in [-1, 1]; gram: patches or channels; g: generator of all draws

    -> {name: scalar}, summed up
    """
    sr, z, context = model(lq_up)
    sr = sr.float()
    terms = {"l2": stage.lambda_l2 * F.mse_loss(sr, hq)}
    if stage.lambda_lpips:
        terms["lpips"] = stage.lambda_lpips * lpips(sr, hq).mean()
    if stage.lambda_csd:
        t = torch.randint(*CSD_TIMES, (len(z),), generator=g, device=g.device).to(z.device)
        noise = torch.randn(z.shape, generator=g, device=g.device).to(z.device)
        good, bad = model.csd_conditions(context.detach())
        terms["csd"] = stage.lambda_csd * loss_csd(model.prior, z, t, noise, good, bad, stage.guidance)
    if stage.lambda_gram:
        with torch.autocast(sr.device.type, enabled=False):     # small differences of large sums
            difference = loss_gram(features(vit, sr), features(vit, hq), channels=gram == "channels")
        terms["gram"] = stage.lambda_gram * difference
    return terms        # Eq. GramSR (6)


TERMS = ("l2", "lpips", "csd", "gram")


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
    training.ema_update(run.ema, run.model, run.stage.ema)


@torch.no_grad()
def evaluate(run):
    """On held-out photos: loss with fixed draws, PSNR over RGB, NIQE (nan without its file, or of flat images).

    -> {column of the log: value}, {column of the sheet: images in [-1, 1]}
    """
    hq, lq_up = run.held_out
    results, values = [], []
    for i, pair in enumerate(zip(hq.split(1), lq_up.split(1))):
        terms = losses(run.model, run.lpips, run.vit, run.stage, run.args.gram, *pair, training.generator(1, i))
        values.append(float(sum(terms.values())))
        results.append(run.model(pair[1])[0].float())
    sr = torch.cat(results)
    naturalness = [niqe(round8(x / 2 + 0.5), run.niqe) if run.niqe else math.nan for x in sr.split(1)]
    metrics = {"held_out": sum(values) / len(values), "psnr": training.psnr(sr, hq),
               "niqe": float(torch.tensor(naturalness, device="cpu").nanmean())}
    return metrics, {"LQ": lq_up, f"result, step {run.step}": sr, "HQ": hq}


def is_best(run):
    """Early stopping: count evaluations without a better one -> whether the newest is the best so far"""
    if run.metrics is None:     # interrupted between two evaluations
        return False
    better = run.metrics[run.judge] < run.best.get(run.judge, math.inf)
    if better:
        run.best, run.waited = {run.judge: run.metrics[run.judge]}, 0
    else:
        run.waited += 1
    run.over = 0 < run.stage.patience <= run.waited
    return better


def save(run):
    """The model's files, with --patience only where it got better, then the checkpoint: if that says that the run is
    over, all is there."""
    better = is_best(run)
    if run.rank == 0 and (better or not run.stage.patience or not run.written):
        names = run.model.save_release(run.out, run.stage.before + run.step)
        for name in set(run.written) - set(names):
            (run.out / name).unlink(missing_ok=True)
        run.written = names
        if run.args.tiny:
            note = f"{run.title}, step {run.step}"
            save_model(run.out / "model.safetensors", run.model.cfg, run.model.state_dict(), note=note)
    training.save_state(run, best=run.best, waited=run.waited, written=run.written)


def main(argv=None):
    args = parse_args(argv)
    with training.alone_in(args.out):
        run = prepare(args)
        checkpoint = training.resume(run, SETTINGS)
        if checkpoint:
            run.best, run.waited, run.written = checkpoint["best"], checkpoint["waited"], checkpoint["written"]
            run.over = 0 < run.stage.patience <= run.waited
        for part in (run.model.unet, *run.model.vae.children()):
            part.checkpointing = args.checkpointing
        if args.compile:
            training.compile_all(run.model.unet.blocks[:-1], run.device)
        terms = partial(losses, run.model, run.lpips, run.vit, run.stage, args.gram)
        run.losses = training.replicate(run, run.model, terms)
        open_data(run)
        status = training.fit(run, step, evaluate, save)
        if run.over:
            print(f"stopped early at step {run.step}: {run.judge} was no better {run.waited} times; "
                  f"the model is the best so far, {' '.join(run.written)}")
        return status


if __name__ == "__main__":
    with training.one_line_errors("train_gramsr"):
        sys.exit(main())
