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
as the public files, for sample.py --model and the next stage's --init (with --preset tiny: model.safetensors),
checkpoint-*.pt, log.csv, loss.png, sheet.png (LQ | result | HQ of held-out photos). With --patience the model is the
best so far, not the last.
"""

import argparse
import copy
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import training
from degrade import RECIPES, degrade
from models.support.evaluation import find_niqe
from models.gram import CSD_TIMES, features, loss_csd, loss_gram
from models.gramsr import SETS, GramSR, GramSRConfig, token_adapter
from models.support.imaging import round8
from models.lpips import LPIPS
from models.support.metrics import BLOCK, niqe
from models.tiny import GRAMSR_STAGES, RandomLPIPS, TinyGramSR, TinyGramSRConfig, is_prior
from models.vit import PRESETS as VITS, DINOv3
from models.support.arguments import between
from models.support.precision import in_half
from models.support.weights import fetch, load_strictly, read_tensors, save_model
from train_s3diff import take_over


@dataclass
class Stage:
    """What is known of a stage, or inferred; flags of the same names override it."""

    # inferred: the files' names end at 12,501 and 53,001, PiSA-SR has 4000 of pixel
    steps: int                          # of this stage
    before: int = 0                     # steps of the stages before it; draws and the files' names go on from there
    batch_size: int = 16                # of all processes together
    rank: int = 4                       # of the new LoRA set
    lr: float = 5e-5                    # inferred: constant, for the token adapter too
    schedule: str = "constant"          # or "cosine"
    warmup: int = 0                     # steps
    crop: int = 512                     # pixels, cut out, never shrunk; inferred: PiSA-SR's
    recipes: tuple = ("gramsr",)        # of degrade.py, by turns
    lambda_l2: float = 1.0
    lambda_lpips: float = 0.0
    lambda_csd: float = 0.0
    lambda_gram: float = 0.0
    guidance: float = 7.5               # of CSD; inferred: PiSA-SR's
    learn_vit: bool = False             # ours, tiny: no DINO is so small, it learns with the first set
    patience: int = 0                   # evaluations without a better one after which the stage is over; 0 = none
    save_every: int = 500               # steps


STAGES = {
    "pixel": Stage(4000),
    "semantic": Stage(8501, before=4000, lambda_lpips=2.0, lambda_csd=1.0),
    # inferred: LPIPS and CSD stay; that it is stopped early by NIQE is known, not when
    "texture": Stage(40_500, before=12_501, lr=5e-6, lambda_lpips=2.0, lambda_csd=1.0, lambda_gram=500.0, patience=10),
}
GRAM = {"patches": {}, "channels": {"channels": True}}     # readings of the paper's figure, see models/gram.py
TINY = TinyGramSRConfig()
TINY_STAGES = {name: Stage(**settings) for name, settings in GRAMSR_STAGES.items()}
PRESETS = {"sd-2.1": (GramSRConfig(ranks={}), STAGES), "tiny": (TINY, TINY_STAGES)}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", required=True, choices=STAGES)
    p.add_argument("--preset", default="sd-2.1", choices=PRESETS, help="sd-2.1 (default); tiny: on S3Diff's prior")
    p.add_argument("--init", help="model to start from: the earlier stage's --out; stage pixel, tiny: --out "
                   "of train_s3diff.py --stage prior (default: the embedded one; none: random numbers)")
    # what the paper leaves open
    p.add_argument("--gram", choices=GRAM, help="the matrix of stage texture: of patches (default) or channels")
    p.add_argument("--patience", type=between(0, 10**6, whole=True),
                   help="stop after so many evaluations without a better NIQE of the held-out pictures (or loss, "
                        "without its file), and keep the best model; 0 = never (default 10 in stage texture, else 0)")
    p.add_argument("--rank", type=between(1, 1024, whole=True), help="rank of the new LoRA set (default 4)")
    training.add_arguments(p)
    args = p.parse_args()
    if args.stage == "pixel" and args.init and args.preset != "tiny":
        p.error("--stage pixel comes first: --init is for the later ones")
    if args.stage != "pixel" and not args.init:
        p.error(f"--stage {args.stage} needs --init, the --out folder of the stage before it")
    if args.gram and args.stage != "texture":
        p.error(f"--gram is not read by --stage {args.stage}")
    return args


def build(args, cfg, stage):
    """Networks -> GramSR with its new LoRA set, LPIPS and DINOv3 for its losses (None if not needed), their origin."""
    tiny, earlier, lpips, vit = args.preset == "tiny", list(SETS)[: list(SETS).index(args.stage)], None, None
    system = TinyGramSR if tiny else GramSR
    if earlier:
        model, origin = system.from_pretrained(args.init), f"from {args.init}"
        if list(model.cfg.ranks) != earlier:
            have, want = " and ".join(model.cfg.ranks), " and ".join(earlier)
            raise training.Quit(f"{args.init}: has LoRA set {have}; --stage {args.stage} starts from {want}")
        if json.dumps(asdict(replace(model.cfg, ranks={}))) != json.dumps(asdict(cfg)):
            raise training.Quit(f"{args.init}: its networks are not those of --preset {args.preset}")
    else:
        model = TinyGramSR(cfg) if tiny else GramSR.with_prior(cfg)
        origin = "FROM SCRATCH" if tiny else "SD 2.1 and DINOv3, new adapter"
        if tiny and args.init != "none":
            origin = take_over(model, args.init, is_prior)
        # now with numbers
        model.adapter = token_adapter(cfg.vit.embed_dim, cfg.unet.context_dim, cfg.unet.context_dim)
    model.add_set(args.stage, stage.rank)
    if stage.lambda_lpips:
        lpips = (RandomLPIPS() if tiny else LPIPS.from_pretrained("vgg")).requires_grad_(False)
    if stage.lambda_gram and tiny:
        vit = copy.deepcopy(model.vit)
    elif stage.lambda_gram:
        path = fetch("dinov3-vits16plus-pretrain-lvd1689m/model.safetensors")       # not the one that makes the tokens
        with torch.device("meta"):
            vit = DINOv3(VITS["dinov3_vits16plus"])
        load_strictly(vit, read_tensors(path), path)
    return model, lpips, vit and vit.requires_grad_(False), f"{origin}, new LoRA set {args.stage}"


def is_learned(name, learn_vit=False):
    """Whether a parameter is of a LoRA set or the token adapter: all that is not in public files."""
    return "lora_" in name or name.startswith("adapter.") or learn_vit and name.startswith("vit.")


def losses(model, lpips, vit, stage, kind, x_lq, x_hq, g):
    """Loss terms of a batch, their sum is the loss.

    x_lq, x_hq: (B, 3, H, W) in [-1, 1], the enlarged LQ picture and the photo
    kind: of Gram matrix, options of `gram`; g: of CSD's times and noise -> {name: loss}, y
    """
    y, z, context = model(x_lq)
    y = y.float()
    terms = {"l2": stage.lambda_l2 * F.mse_loss(y, x_hq)}
    if stage.lambda_lpips:
        terms["lpips"] = stage.lambda_lpips * lpips(y, x_hq).mean()
    if stage.lambda_csd:
        t = torch.randint(*CSD_TIMES, (len(z),), generator=g).to(z.device)
        noise = torch.randn(z.shape, generator=g).to(z.device)
        good, bad = model.csd_conditions(context.detach())
        terms["csd"] = stage.lambda_csd * loss_csd(model.prior, z, t, noise, good, bad, stage.guidance)
    if stage.lambda_gram:
        with torch.autocast(y.device.type, enabled=False):      # small differences of large sums
            terms["gram"] = stage.lambda_gram * loss_gram(features(vit, y), features(vit, x_hq), **kind)
    return terms, y     # Eq. GramSR (6)


# ---- a run, part by part; `run` holds what the parts share


def prepare(args):
    """Networks, what is to be learned, optimizer.  -> run"""
    cfg, stages = PRESETS[args.preset]
    run = training.begin(args, stages[args.stage])
    torch.manual_seed(args.seed + list(SETS).index(args.stage))
    model, lpips, vit, origin = build(args, cfg, run.recipe)
    run.origin = f"train_gramsr: stage {args.stage}, {args.preset}, {origin}"
    eyes = [*model.vit.parameters()] if run.recipe.learn_vit else []
    # inferred: the adapter learns in each stage; the authors release a new one with each set
    learning = [*model.lora(args.stage).values(), *model.adapter.parameters(), *eyes]
    run.params = training.freeze_all_but(model, learning)
    if run.dtype != torch.float32 and args.preset != "tiny":
        in_half(model.unet, run.dtype, adapters=False)      # earlier LoRA sets go into the files as they came
    run.model, run.lpips, run.vit = (network and network.to(run.device) for network in (model, lpips, vit))
    # a new one a stage: PiSA-SR's would go on moving what is frozen
    run.optimizer = torch.optim.AdamW(run.params, run.recipe.lr, weight_decay=1e-2, fused=True)
    run.state = {"model": run.model, "optimizer": run.optimizer, "scaler": run.scaler}
    run.learns = partial(is_learned, learn_vit=run.recipe.learn_vit)
    run.niqe = find_niqe(None) if run.recipe.crop >= 2 * BLOCK else None        # only if it is on this disk
    run.columns, run.judge = ["niqe"], "niqe" if run.niqe else "held_out"
    run.best, run.waited, run.files = {}, 0, []     # {judge: lowest so far}, evaluations since then, of the model
    return run


def open_data(run):
    """Photos to learn from and held-out ones, and their degradation."""
    args, stage = run.args, run.recipe
    photos, hq, run.photos = training.photos_for(args.data, stage.crop, args.seed, run.photos, flip=True)
    run.recipes = [replace(RECIPES[name], branches_per="image") for name in stage.recipes]
    lq_up = degrade(hq, run.recipes[0], training.generator(0))[1]
    run.test = [(2 * x - 1).to(run.device) for x in (lq_up, hq)]
    steps = range(stage.before + run.step, stage.before + stage.steps)
    run.batches = training.batches(photos, steps, stage.batch_size, run.rank, run.share, run.micro, args.workers,
                                   run.device)


def step(run):
    """One optimizer step; parts of a batch are computed one after another."""
    training.set_lr(run.optimizer, run.lr)
    recipe = run.recipes[run.step % len(run.recipes)]
    for i in range(run.parts):
        # the same draws, whoever computes this part
        g = training.generator(run.args.seed, run.recipe.before + run.step, run.rank * run.parts + i)
        hq = next(run.batches).to(run.device, non_blocking=True)
        lq_up = degrade(hq, recipe, g)[1]
        training.backward(run, run.losses, 2 * lq_up - 1, 2 * hq - 1, g)
    run.grad_norm = run.health.step(run.optimizer, run.scaler)


@torch.no_grad()
def evaluate(run):
    """Held-out loss with fixed draws, PSNR over RGB, NIQE (nan without its file).

    -> {column of the log: value}, {column of the sheet: pictures}
    """
    x_lq, hq = run.test
    parts = [run.losses(*(x[i : i + 1] for x in run.test), training.generator(1, i)) for i in range(len(hq))]
    y = torch.cat([y for _, y in parts])
    natural = [niqe(round8(x / 2 + 0.5), run.niqe) if run.niqe else math.nan for x in y.split(1)]
    seen = {"held_out": sum(float(sum(terms.values())) for terms, _ in parts) / len(parts),
            "psnr": training.psnr(y, hq), "niqe": float(torch.tensor(natural).nanmean())}
    return seen, {"LQ": x_lq, f"result, step {run.step}": y, "HQ": hq}


def save(run):
    """The first process writes: what is needed to go on, and the model; with patience only where it got better."""
    better = False
    if run.seen:
        better = run.seen[run.judge] < run.best.get(run.judge, math.inf)
        run.best, run.waited = ({run.judge: run.seen[run.judge]}, 0) if better else (run.best, run.waited + 1)
        run.over = 0 < run.recipe.patience <= run.waited
    if run.rank == 0 and (better or not run.recipe.patience or not run.files):
        names = run.model.save_release(run.out, run.recipe.before + run.step)
        for name in set(run.files) - set(names):
            (run.out / name).unlink(missing_ok=True)
        run.files = names
        if run.args.preset == "tiny":
            note = f"tiny {run.args.stage}, step {run.step}"
            save_model(run.out / "model.safetensors", run.model.cfg, run.model.state_dict(), note=note)
    training.save_state(run, best=run.best, waited=run.waited, written=run.files)


def main():
    args = parse_args()
    run = prepare(args)
    args.gram, args.rank = args.gram or "patches", run.recipe.rank
    checkpoint = training.resume(run, ("stage", "preset", "data", "init", "seed", "gram", "rank"))
    if checkpoint:
        run.best, run.waited, run.files = checkpoint["best"], checkpoint["waited"], checkpoint["written"]
        run.over = 0 < run.recipe.patience <= run.waited
    for part in (run.model.unet, *run.model.vae.children()):
        part.checkpointing = args.checkpointing
    if args.compile:
        training.compile_all(run.model.unet.blocks[:-1], run.device)
    run.losses = partial(losses, run.model, run.lpips, run.vit, run.recipe, GRAM[args.gram])
    if run.world > 1:
        run.losses = training.replicate(run.model, run.losses, run.device)
    open_data(run)
    terms = [name for name in ("l2", "lpips", "csd", "gram") if getattr(run.recipe, f"lambda_{name}")]
    training.fit(run, terms, step, evaluate, save, f"GramSR {args.preset}, stage {args.stage}")
    if run.over:
        print(f"stopped early at step {run.step}: {run.judge} was no better {run.waited} times; "
              f"the model is the best so far, {' '.join(run.files)}")


if __name__ == "__main__":
    with training.one_line_errors("train_gramsr"):
        main()
