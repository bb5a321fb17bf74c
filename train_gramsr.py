"""Train GramSR: three LoRA sets on a frozen Stable Diffusion 2.1, one after the other, each with losses of its own.

    python train_gramsr.py --stage pixel    --data PHOTOS --out runs/pixel
    python train_gramsr.py --stage semantic --data PHOTOS --out runs/semantic --init runs/pixel
    python train_gramsr.py --stage texture  --data PHOTOS --out runs/texture  --init runs/semantic

    torchrun --nproc_per_node=4 train_gramsr.py --stage pixel --data photos.txt --out runs/pixel --micro-batch 2 --checkpointing

    pixel       L2                  right on average, hence smooth
    semantic    + LPIPS + CSD       what a classifier and the diffusion model itself would rather see
    texture     + Gram              which patches resemble which

A stage adds its own set and freezes those before it; the token adapter learns in all three.

Nobody has published code of this training. Known: the losses, that the sets are trained in turn, batch 16, rank 4, learning rates, weights of
the losses, early stopping by NIQE. Inferred, and marked so below: PiSA-SR's settings where GramSR extends it (optimizer, CSD, degradation),
step counts (from the names of the released files), that the adapter learns in each stage, that the losses of a stage stay in the next,
that CSD's frozen UNet is told the same tokens, the form of the Gram matrix (--gram).

The same command again goes on where it stopped, exactly. Ctrl-C and SIGTERM save first. What may change then: --steps, --lr, --patience,
--micro-batch, --keep, --save-every and all that names the machine; anything else is refused. --out holds the model, laid out as the public
files, for sample.py --model and the next stage's --init (with --preset tiny: model.safetensors), checkpoint-*.pt, log.csv, loss.png, sheet.png
(LQ | result | HQ of held-out photos). With --patience the model is the best so far, not the last.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import training
from degrade import RECIPES, degrade
from models.support.evaluation import find_niqe
from models.gram import CSD_TIMES, features, loss_csd, loss_gram
from models.gramsr import SETS, GramSR, GramSRConfig, token_adapter
from models.support.imaging import round8
from models.lpips import LPIPS
from models.support.metrics import BLOCK, niqe
from models.s3diff import is_prior
from models.vit import PRESETS as VITS
from models.vit import DINOv3, DINOv3Config
from models.support.arguments import SEED, between, positive
from models.support.precision import in_half
from models.support.weights import fetch, load_strictly, read_tensors, save_model
from train_s3diff import TINY as S3DIFF_TINY
from train_s3diff import take_over


@dataclass
class Stage:
    """What is known of a stage, or inferred; --steps, --batch-size, --lr, --rank, --patience and --save-every override it."""

    steps: int                          # of this stage; inferred: the files' names end at 12,501 and 53,001, PiSA-SR has 4000 of pixel
    before: int = 0                     # steps of the stages before it; draws and the files' names go on from there
    batch_size: int = 16                # of all processes together
    rank: int = 4                       # of the new LoRA set
    lr: float = 5e-5                    # inferred: constant, for the token adapter too; AdamW and clipping are PiSA-SR's
    schedule: str = "constant"          # or "cosine"
    crop: int = 512                     # pixels, cut out, never shrunk; inferred: PiSA-SR's
    lambda_l2: float = 1.0
    lambda_lpips: float = 0.0
    lambda_csd: float = 0.0
    lambda_gram: float = 0.0
    lambda_style: float = 0.0           # ours, tiny: of random features' Gram matrices, those of style transfer
    guidance: float = 7.5               # of CSD; inferred: PiSA-SR's
    learn_vit: bool = False             # ours, tiny: there is no DINO that small, so the tokens' transformer learns with the first set
    patience: int = 0                   # evaluations without a better one after which the stage is over; 0 = none
    save_every: int = 500               # steps


STAGES = {
    "pixel": Stage(4000),
    "semantic": Stage(8501, before=4000, lambda_lpips=2.0, lambda_csd=1.0),
    "texture": Stage(40_500, before=12_501, lr=5e-6, lambda_lpips=2.0, lambda_csd=1.0, lambda_gram=500.0,      # inferred: LPIPS and CSD stay
                     patience=10),      # inferred: that it is stopped early by NIQE is known, not when
}
GRAM = {"patches": {}, "positive": {"positive": True}, "raw": {"normalise": False}, "channels": {"channels": True},
        "style": {"channels": True, "normalise": False}}    # readings of the paper's figure, see models/gram.py
PUBLIC_PARAMETERS = 5_892_768           # trained ones of any stage, with GramSRConfig() as it is: 4,055,712 of the set, the rest the adapter
TINY = GramSRConfig(
    unet=S3DIFF_TINY.unet, vae=S3DIFF_TINY.vae, vit=DINOv3Config(embed_dim=96, depth=3, num_heads=3), prompt_tokens=S3DIFF_TINY.tokens,
    ranks={}, tile=1024,
)
TINY_STAGES = {
    "pixel": Stage(4000, batch_size=8, lr=1e-3, crop=128, schedule="cosine", learn_vit=True),
    "semantic": Stage(2000, before=4000, batch_size=8, lr=5e-4, crop=128, schedule="cosine", lambda_lpips=0.1, lambda_csd=1.0, guidance=3.0),
    "texture": Stage(2000, before=6000, batch_size=8, lr=5e-4, crop=128, schedule="cosine", lambda_lpips=0.1, lambda_csd=1.0, guidance=3.0,
                     lambda_gram=1.0, lambda_style=1.0),
}
PRESETS = {"sd-2.1": (GramSRConfig(ranks={}), STAGES), "tiny": (TINY, TINY_STAGES)}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", required=True, choices=STAGES)
    p.add_argument("--preset", default="sd-2.1", choices=PRESETS, help="sd-2.1 (default), or tiny: around the tiny prior of train_s3diff.py")
    p.add_argument("--data", required=True, help="good photos: a folder, searched recursively, a .tar of them, or a .txt list of such sources")
    p.add_argument("--moved", action="store_true", help="go on although --data or --init lies elsewhere by now")
    p.add_argument("--out", required=True, help="folder for everything this run writes")
    p.add_argument("--init", help="model to start from: the earlier stage's --out; stage pixel of the tiny preset: --out of train_s3diff.py "
                   "--stage prior (default: the embedded one; none: random numbers)")  # fmt: skip
    # what the paper leaves open
    p.add_argument("--gram", choices=GRAM, help="the Gram matrix of stage texture: patches (default: all pairs of patches, normalised), positive "
                   "(negative ones are set to 0), raw (not normalised), channels (pairs of channels), style (those not normalised)")  # fmt: skip
    p.add_argument("--freeze-adapter", action="store_true", help="keep the token adapter as the stage before left it")
    p.add_argument("--patience", type=between(0, 10**6, whole=True),
                   help="stop after this many evaluations without a better NIQE of the held-out pictures (without "
                        "NIQE's parameter file: without a lower loss), and keep the best model; 0 = never "
                        "(default 10 in stage texture, else 0)")  # fmt: skip
    p.add_argument("--rank", type=between(1, 1024, whole=True), help="rank of the new LoRA set (default 4)")
    # optimisation
    p.add_argument("--steps", type=positive, help="steps in all (default: the preset's)")
    p.add_argument("--batch-size", type=positive, help="photos per step, of all processes together")
    p.add_argument("--micro-batch", type=positive, help="photos that one process computes at once (default: its share)")
    p.add_argument("--lr", type=between(1e-9, 1), help="learning rate")
    p.add_argument("--seed", type=SEED, default=0)
    # machine
    p.add_argument("--device", type=training.usable_device, default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of autocast; trained weights stay float32")
    p.add_argument("--checkpointing", action="store_true", help="compute the blocks of UNet and VAE a second time in backward: less memory")
    p.add_argument("--compile", action="store_true", help="torch.compile the UNet's blocks")
    p.add_argument("--workers", type=between(0, 999, whole=True), default=0, help="more processes, which read photos")
    p.add_argument("--save-every", type=positive, help="steps between checkpoints, held-out losses and pictures")
    p.add_argument("--keep", type=positive, default=2, metavar="K",
                   help="checkpoints that stay, in case the newest is damaged (default 2)")  # fmt: skip
    args = p.parse_args()
    if args.stage == "pixel" and (args.init and args.preset != "tiny" or args.freeze_adapter):
        p.error("--stage pixel comes first: --init and --freeze-adapter are for the later ones")
    if args.stage != "pixel" and not args.init:
        p.error(f"--stage {args.stage} needs --init, the --out folder of the stage before it")
    if args.gram and args.stage != "texture":
        p.error(f"--gram is not read by --stage {args.stage}")
    return args


def build_tiny(args, cfg):
    """GramSR before its first set, around a tiny prior.  -> model, its origin"""
    model, origin = GramSR(cfg), "FROM SCRATCH"
    if args.init != "none":
        origin = take_over(model, args.init, is_prior)
    return model.float(), origin


def build(args, cfg, stage):
    """Networks -> GramSR with its new LoRA set, LPIPS and DINOv3 for its losses (None where a stage has no need), a line on their origin."""
    tiny, earlier, lpips, vit = args.preset == "tiny", list(SETS)[: list(SETS).index(args.stage)], None, None
    if earlier:
        model, origin = GramSR.from_pretrained(args.init), f"from {args.init}"
        if list(model.cfg.ranks) != earlier:
            have, want = " and ".join(model.cfg.ranks), " and ".join(earlier)
            raise training.Quit(f"{args.init}: has LoRA set {have}; --stage {args.stage} starts from {want}, the --out of the stage before it")
        if json.dumps(asdict(replace(model.cfg, ranks={}))) != json.dumps(asdict(cfg)):
            raise training.Quit(f"{args.init}: its networks are not those of --preset {args.preset}; use the preset it was trained with")
    else:
        model, origin = build_tiny(args, cfg) if tiny else (GramSR.with_prior(cfg), "SD 2.1 and DINOv3, new adapter")
        model.adapter = token_adapter(cfg.vit.embed_dim, cfg.unet.context_dim, cfg.unet.context_dim)    # now with numbers
    model.add_set(args.stage, stage.rank)
    if stage.lambda_lpips:
        lpips = (LPIPS("random") if tiny else LPIPS.from_pretrained("vgg")).requires_grad_(False)
    if stage.lambda_gram and tiny:
        vit = copy.deepcopy(model.vit)
    elif stage.lambda_gram:
        path = fetch("dinov3-vits16plus-pretrain-lvd1689m/model.safetensors")       # not the one that makes the tokens
        with torch.device("meta"):
            vit = DINOv3(VITS["dinov3_vits16plus"])
        load_strictly(vit, read_tensors(path), path)
    return model, lpips, vit and vit.requires_grad_(False), f"{origin}, new LoRA set {args.stage}"


def is_learned(name):
    """Whether a parameter is of a LoRA set or the token adapter: all that is not in public files."""
    return "lora_" in name or name.startswith("adapter.")


def losses(model, lpips, vit, stage, kind, x_lq, x_hq, g):
    """Loss terms of a batch, their sum is the loss. x_lq, x_hq: (B, 3, H, W) in [-1, 1], the enlarged LQ picture and the photo

    kind: of Gram matrix, options of `gram`; g: of CSD's times and noise -> {name: loss}, y
    """
    y, z, context = model(x_lq)
    y = y.float()
    terms = {"l2": stage.lambda_l2 * F.mse_loss(y, x_hq)}
    if stage.lambda_lpips:
        terms["lpips"] = stage.lambda_lpips * lpips(y, x_hq).mean()
    if stage.lambda_csd:
        t, noise = torch.randint(*CSD_TIMES, (len(z),), generator=g).to(z.device), torch.randn(z.shape, generator=g).to(z.device)
        # inferred: the tokens, which the prior was never taught to read, and zeros for none; PiSA-SR has two prompts, as the tiny prior
        good, bad = context.detach(), torch.zeros_like(context)
        if model.cfg.prompt_tokens:
            good, bad = (prompt.expand(len(z), -1, -1) for prompt in model.prompts.split(1))
        terms["csd"] = stage.lambda_csd * loss_csd(model.prior, z, t, noise, good, bad, stage.guidance)
    if stage.lambda_gram:
        with torch.autocast(y.device.type, enabled=False):      # small differences of large sums
            terms["gram"] = stage.lambda_gram * loss_gram(features(vit, y), features(vit, x_hq), **kind)
            if stage.lambda_style:
                looks = zip(lpips.look(y), lpips.look(x_hq))
                style = sum(loss_gram(*(f.flatten(2).mT for f in pair), channels=True, normalise=False) for pair in looks)
                terms["style"] = stage.lambda_style * style
    return terms, y     # Eq. GramSR (6)


@torch.no_grad()
def evaluate(objective, niqe_parameters, test):
    """Held-out loss with fixed draws.  -> loss, PSNR in dB over RGB, NIQE (nan without parameters), pictures (16, 3, crop, crop) in [-1, 1]"""
    parts = [objective(*(x[i : i + 1] for x in test), training.generator(1, i)) for i in range(len(test[0]))]
    y = torch.cat([y for _, y in parts])
    psnr = -10 * ((y - test[1]) / 2).square().mean((1, 2, 3)).log10().mean()
    natural = [niqe(round8(x / 2 + 0.5), niqe_parameters) if niqe_parameters else math.nan for x in y.split(1)]
    return sum(float(sum(terms.values())) for terms, _ in parts) / len(parts), float(psnr), float(torch.tensor(natural).nanmean()), y


def main():
    args = parse_args()
    cfg, stages = PRESETS[args.preset]
    given = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "rank": args.rank, "patience": args.patience,
             "save_every": args.save_every}
    stage = replace(stages[args.stage], **{k: v for k, v in given.items() if v is not None})
    device, dtype = args.device, training.choose_dtype(args.dtype, args.device)
    rank, world = training.join(device)
    share, micro, parts = training.divide(stage.batch_size, args.micro_batch, world)    # photos of a step: mine, at once, how often
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed + list(SETS).index(args.stage))     # the initial weights; everything later has generators of its own
    model, lpips, vit, origin = build(args, cfg, stage)
    adapter = [] if args.freeze_adapter else [*model.adapter.parameters()]      # inferred: the authors release a new adapter with each set
    eyes = [*model.vit.parameters()] if stage.learn_vit else []
    params = training.freeze_all_but(model, [*model.lora(args.stage).values(), *adapter, *eyes])
    if replace(model.cfg, ranks={}) == GramSRConfig(ranks={}) and stage.rank == 4 and adapter:
        assert training.count(params) == PUBLIC_PARAMETERS, f"{training.count(params):,} parameters would be trained, not {PUBLIC_PARAMETERS:,}"
    if dtype != torch.float32 and args.preset != "tiny":
        in_half(model.unet, dtype, adapters=False)      # earlier LoRA sets go into the files as they came
    model, lpips, vit = (network and network.to(device) for network in (model, lpips, vit))
    # a new one a stage: PiSA-SR's would go on moving what is frozen
    optimizer = torch.optim.AdamW(params, lr=stage.lr, weight_decay=1e-2, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    niqe_parameters = find_niqe(None) if stage.crop >= 2 * BLOCK else None      # only if it is on this disk
    judge = "niqe" if niqe_parameters else "held_out"

    settings = {name: getattr(args, name) for name in ("stage", "preset", "freeze_adapter", "data", "init", "seed")} | {
        "gram": args.gram or "patches", "rank": stage.rank, "batch_size": stage.batch_size}
    step, names_of_photos = 0, None
    best, waited, written = {}, 0, []       # {judge: lowest so far}, evaluations since then, files of the model
    checkpoint = training.load_checkpoint(out, settings, args.moved)
    if checkpoint:
        step, names_of_photos, origin = checkpoint["step"], checkpoint["photos"], f"resumed from {out} at step {checkpoint['step']}"
        best, waited, written = checkpoint["best"], checkpoint["waited"], checkpoint["written"]
        training.load_tensors(model, checkpoint["model"])
        training.load_optimizer(optimizer, checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())      # {} of a run in another type
    where = f"on {device} in {dtype}, {world} process{'es' * (world > 1)}".replace("torch.", "")
    print(f"train_gramsr: stage {args.stage}, {args.preset}, {origin}, {where}")
    print(f"{training.count(params):,} trained of {training.count(model.parameters()):,} parameters; "
          f"batch {stage.batch_size} = {world} x {parts} x {micro}; judged by {judge}; {stage}")
    for part in (model.unet, *model.vae.children()):
        part.checkpointing = args.checkpointing
    if args.compile:
        training.compile_all(model.unet.blocks[:-1], device)
    objective = partial(losses, model, lpips, vit, stage, GRAM[args.gram or "patches"])
    compute = training.replicate(model, objective, device) if world > 1 else objective

    photos, test_hq, names_of_photos = training.photos_for(args.data, stage.crop, args.seed, names_of_photos, flip=True)
    test_up = degrade(test_hq, RECIPES["gramsr"], training.generator(0))[1]
    test = [x.to(device) for x in (2 * test_up - 1, 2 * test_hq - 1)]

    def save(good):
        """The first process writes; all have the same. good: the model too, or else only what is needed to go on"""
        nonlocal written
        if rank > 0:
            return
        if good or not written:
            names = model.save_release(out, stage.before + step)
            for name in set(written) - set(names):
                (out / name).unlink(missing_ok=True)
            written = names
            if args.preset == "tiny":
                save_model(out / "model.safetensors", model.cfg, model.state_dict(), note=f"tiny {args.stage}, step {step}")
        learned = {k: v for k, v in model.state_dict().items() if is_learned(k) or stage.learn_vit and k.startswith("vit.")}
        training.save_checkpoint(out, step, args.keep, settings=settings, photos=names_of_photos, model=learned, optimizer=optimizer.state_dict(),
                                 scaler=scaler.state_dict(), best=best, waited=waited, written=written)

    steps = range(stage.before + step, stage.before + stage.steps)
    loader = training.batches(photos, steps, stage.batch_size, rank, share, micro, args.workers, device)
    names = [name for name in ("l2", "lpips", "csd", "gram", "style") if getattr(stage, f"lambda_{name}")]
    log = training.Log(out / "log.csv", ["step", *names, "grad_norm", "seconds", "held_out", "psnr", "niqe"], step) if rank == 0 else None
    stop, health = training.Stop(), training.Health()
    bar = tqdm(total=stage.steps, initial=step, unit="step", dynamic_ncols=True, disable=rank > 0)
    sums, since, seconds = dict.fromkeys(names, 0.0), 0, time.time()
    model.train()
    while step < stage.steps and not training.mean_of_all(bool(stop) or 0 < stage.patience <= waited, device):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, stage.steps, stage.lr, stage.schedule)

        # ---------------------------------------------------------------- the step
        for i in range(parts):
            g = training.generator(args.seed, stage.before + step, rank * parts + i)    # the same numbers, whoever computes this part
            hq = next(loader).to(device, non_blocking=True)
            lq_up = degrade(hq, RECIPES["gramsr"], g)[1]
            with training.autocast(device, dtype):
                terms, _ = compute(2 * lq_up - 1, 2 * hq - 1, g)
            scaler.scale(sum(terms.values()) / parts).backward()
            for name, loss in terms.items():
                sums[name] += loss.detach() / parts
        grad_norm = health.step(optimizer, scaler)
        step, since = step + 1, since + 1
        # ------------------------------------------------------------------------

        bar.update()
        bar.set_postfix({k: f"{v / since:.3f}" for k, v in sums.items()}, refresh=False)
        due = step % stage.save_every == 0 or step == stage.steps
        if due or step % 50 == 0:                           # once in a while: log
            row = {"step": step, **{k: training.mean_of_all(v / since, device) for k, v in sums.items()}, "grad_norm": grad_norm,
                   "seconds": time.time() - seconds}
            sums, since, seconds = dict.fromkeys(names, 0.0), 0, time.time()
            if due:                                         # once in a longer while: evaluate, save, draw
                with training.autocast(device, dtype):
                    row["held_out"], row["psnr"], row["niqe"], y = evaluate(objective, niqe_parameters, test)
                better = row[judge] < best.get(judge, math.inf)
                best, waited = ({judge: row[judge]}, 0) if better else (best, waited + 1)
                save(better or not stage.patience)
            if rank == 0:
                log.write(**row)
            if rank == 0 and due:
                training.save_sheet(out / "sheet.png", {"LQ": test[0][:6], f"result, step {step}": y[:6], "HQ": test[1][:6]})
                tqdm.write(f"step {step}: held-out loss {row['held_out']:.4f}, PSNR {row['psnr']:.2f} dB"
                           + f", NIQE {row['niqe']:.2f}" * (niqe_parameters is not None))
                log.draw(out / "loss.png", [*names, "held_out"], f"GramSR {args.preset}, stage {args.stage}")
    bar.close()
    if 0 < stage.patience <= waited:
        print(f"\nstopped early at step {step}: {judge} was no better {waited} times; the model is the best so far, {' '.join(written)}")
    elif step < stage.steps:
        save(not stage.patience)
        print(f"\nstopped at step {step} and saved; the same command goes on from here")
    training.leave()


if __name__ == "__main__":
    with training.one_line_errors("train_gramsr"):
        main()
