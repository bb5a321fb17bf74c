"""Train S3Diff: adapters on a frozen SD-Turbo, from pairs of good photos and bad copies.

    python train_s3diff.py --data PHOTOS --out runs/s3diff
    torchrun --nproc_per_node=4 train_s3diff.py --data photos.txt --out runs/s3diff --micro-batch 4 --checkpointing

A step has four parts, each with its own backward and its own step of an optimizer:
    1. reconstruct   the target by L2 and LPIPS; one picture in twenty has the bad prompt, and the bad picture as target
    2. adversary     all pictures with the good prompt: make the discriminator D take them for photos
    3. real          D is to know photos
    4. fake          D is to know the pictures of part 2
Apart, because 1 and 2 want different prompts; the same Adam for both, so that its moments see both gradients.

A tiny S3Diff (--preset tiny) has a tiny Stable Diffusion, trained here too (--stage prior), and its own estimator of
the degradation (--stage estimator); each stage, adapters being the last, goes on from the --init that the one before
has left.

The same command again goes on where it stopped, exactly; Ctrl-C and SIGTERM save first. --out holds s3diff.pkl, laid
out as the public file, for sample.py --model (with --preset tiny: model.safetensors), checkpoint-*.pt, log.csv,
loss.png, sheet.png (of held-out photos).
"""

import argparse
import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import training
from degrade import RECIPES, apply, degrade, draw_plan, severity
from models.discriminator import Discriminator
from models.lpips import LPIPS
from models.s3diff import VAE_TARGETS, S3Diff, S3DiffConfig, is_trained
from models.tiny import (S3DIFF_STAGES, PatchDiscriminator, RandomLPIPS, TinyS3Diff, TinyS3DiffConfig, TinyVOSR,
                         is_prior)
from models.unet import alphas_cumprod
from models.vit import PRESETS as VITS, ViT
from models.support.arguments import between
from models.support.precision import in_half
from models.support.weights import (EMBEDDED, PRIOR, fetch, load_strictly, read_foundation, read_tensors,
                                    save_model)


@dataclass
class Recipe:
    """What the paper fixes; --steps, --batch-size, --lr and --save-every override it."""

    steps: int = 30_000                 # of the paper; the code counts 50 epochs
    batch_size: int = 64                # of all processes together; officially 4 GPUs x 4 photos x 4 parts
    lr: float = 2e-5                    # for the generator
    lr_D: float = 0.0                   # for D, constant; 0 = as the generator's
    crop: int = 512                     # pixels, cut out, never shrunk
    lambda_l2: float = 2.0
    lambda_lpips: float = 5.0
    lambda_gan: float = 0.5
    looks_from: float = 0.0             # share of the steps with L2 alone and the true scores, three times as fast
    schedule: str = "constant"          # or "cosine"
    warmup: int = 0                     # steps
    ema: float = 0.0                    # decay of the average that is saved; 0 = what is trained itself
    recipes: tuple = ("s3diff",)        # of degrade.py, by turns
    branches_per: str = "batch"         # of each recipe; "image": all that a batch shares, anew for each picture
    save_every: int = 500               # steps


TINY = TinyS3DiffConfig()
TINY_RECIPES = {name: Recipe(**settings) for name, settings in S3DIFF_STAGES.items()}
PRESETS = {"sd-turbo": (S3DiffConfig(), {"adapters": Recipe()}), "tiny": (TINY, TINY_RECIPES)}
PLACES = {      # of the adapters, for --lora: names of the VAE's layers, SD-Turbo's and the tiny one's
    "unet": ("", "(?!)"), "unet+encoder": (VAE_TARGETS, "encoder"),
    "unet+decoder": (VAE_TARGETS.replace("encoder", "decoder", 1), r"finish\..*"),
    "unet+encoder+decoder": (VAE_TARGETS.replace("encoder", "(encoder|decoder)", 1), r"encoder|finish\..*"),
}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="sd-turbo", choices=PRESETS, help="sd-turbo (default); tiny: all trained here")
    p.add_argument("--stage", default="adapters", choices=TINY_RECIPES, help="adapters (default); others: tiny only")
    p.add_argument("--init", help="model to start from: s3diff, an s3diff.pkl, another run's --out (default: new "
                   "adapters on SD-Turbo, or on the embedded tiny prior; none: random numbers, the paper's Figure 9)")
    # the paper's ablations
    p.add_argument("--lora", default="unet+encoder", choices=PLACES, help="what gets adapters (Table 4; unet+encoder)")
    p.add_argument("--modulation", default="blocks", choices=("blocks", "shared", "none"),
                   help="a matrix for each block (default), one for all blocks, or plain LoRA (Table 5)")
    p.add_argument("--neg-prob", type=between(0, 1), default=0.05,
                   help="how often a photo has the bad prompt; 0 = no negative prompting (Table 6)")
    p.add_argument("--rank-unet", type=between(1, 1024, whole=True), help="of the UNet's adapters (Table 7; 32)")
    p.add_argument("--rank-vae", type=between(1, 1024, whole=True), help="of the VAE's (Table 7; 16, tiny 8)")
    p.add_argument("--start-step", type=between(1, 999, whole=True),
                   help="t of the one step; below 999 with that time's noise (Table 8; default 999)")
    training.add_arguments(p)
    args = p.parse_args()
    if args.stage not in PRESETS[args.preset][1]:
        p.error(f"--stage {args.stage} is for --preset tiny; {args.preset} has public weights")
    own = args.rank_unet or args.rank_vae or args.lora != "unet+encoder" or args.modulation != "blocks"
    if args.preset != "tiny" and args.init and own:
        p.error("--init brings its own --lora, --modulation, --rank-unet and --rank-vae")
    return args


# ---- networks


def is_known(stage, name):
    """Whether a tiny stage's file holds the tensor of that name: what it, or a stage before it, has learned."""
    return is_prior(name) or stage != "prior" and name.startswith("denet.") or stage == "adapters"


def take_over(model, init, wanted):
    """Give a model the wanted tensors of a tiny one, in folder init or else of what is embedded.

    -> a line on their origin. Raises WeightError.
    """
    path = Path(init, "model.safetensors") if init else PRIOR
    if init:
        tensors = read_tensors(path)
    else:       # the prior, and the estimator, which is in S3Diff's file
        known = read_tensors(EMBEDDED["s3diff-tiny"])
        tensors = read_foundation() | {k: v for k, v in known.items() if k.startswith("denet.")}
    tensors = {k: v for k, v in tensors.items() if wanted(k)}
    load_strictly(model, tensors, path, [k for k in model.state_dict() if k not in tensors])
    model.float()       # the file has float16
    return f"from {path}"


def build_tiny(args, cfg):
    """The tiny networks: the autoencoder of all tiny models, what args.init has, the rest new -> as `build`"""
    model, origin = TinyS3Diff(cfg), "FROM SCRATCH"
    model.prompts = torch.nn.Parameter(torch.randn_like(model.prompts))      # learned, where SD has a text encoder
    for conv in model.denet.conv_first:     # blind for brightness, so that grain and edges are what it sees first
        conv.weight.data = 8 * (conv.weight.data - conv.weight.data.mean((2, 3), keepdim=True))
    if cfg.vae == TINY.vae:     # tests have smaller ones
        # with its finish: straight from the linear decoder, an adversary's textures become a weave
        model.vae.load_state_dict(TinyVOSR.from_pretrained("vosr-tiny").vae.state_dict(), strict=False)
    if args.init != "none" and (args.init or args.stage != "prior"):
        origin = take_over(model, args.init, is_prior if args.stage == "estimator" else lambda name: True)
    return model, RandomLPIPS().requires_grad_(False), PatchDiscriminator(), origin


def build(args, cfg):
    """Networks -> S3Diff to train, LPIPS and discriminator for its losses, a line on their origin."""
    tiny = args.preset == "tiny"
    cfg = replace(cfg, r_unet=args.rank_unet or cfg.r_unet, r_vae=args.rank_vae or cfg.r_vae,
                  vae_targets=PLACES[args.lora][tiny], modulation=args.modulation, t=args.start_step or cfg.t)
    if tiny:
        return build_tiny(args, cfg)
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


# ---- what a stage learns, and from what


def learns(stage, name):
    """Whether a stage trains the parameter of that name."""
    if stage == "prior":
        return is_prior(name) and not name.startswith("vae.")
    return name.startswith("denet.") if stage == "estimator" else is_trained(name) and name != "modulation.w"


def draw(stage, model, hq, recipe, g, told=False):
    """What the losses of a stage take: arguments of `denoise`, `tell`, or `reconstruct` (from x_src on).

    hq: (B, 3, H, W) photos in [0, 1]; recipe: of degrade.py; g: generator of all draws; told: scores as the plans say
    """
    if stage == "prior":
        good = len(hq) // 2         # the others become bad
        x = torch.cat([hq[:good], degrade(hq[good:], recipe, g)[1]])
        return 2 * x - 1, (torch.arange(len(hq)) >= good).long(), g
    if told or stage == "estimator":
        lq, lq_up, scores = degrade_and_tell(hq, recipe, g)
    else:
        lq, lq_up = degrade(hq, recipe, g)
        scores = model.estimate(lq)
    if stage == "estimator":
        return lq, scores
    return 2 * lq_up - 1, 2 * hq - 1, scores, torch.rand(len(hq), generator=g), g


def degrade_and_tell(hq, recipe, g):
    """Degrade each photo by a plan of its own, and say how badly.  -> lq, lq_up, (B, 2) of `severity`"""
    parts = []
    for one in hq.split(1):
        plan = draw_plan(recipe, 1, g)
        lq, lq_up = apply(plan, one)
        parts.append((lq, lq_up, severity(plan, one, lq)))
    return [torch.cat(x) for x in zip(*parts)]


def denoise(model, x, bad, g):
    """Stage prior: Stable Diffusion's own training, on photos and bad pictures; each has its prompt, one in ten none.

    x: (B, 3, H, W) in [-1, 1]; bad: (B,) 1 where x is bad, 0 where it is a photo; g: of times, noise and the untold
    -> {name: loss}
    """
    z, T = model.vae.encode(x), 1000
    t = (torch.rand(len(z), generator=g) * T).long()
    ends = torch.rand(len(z), generator=g)      # S3Diff and GramSR work near the ends: one in ten each there
    t = torch.where(ends < 0.1, t % 100 + 900, torch.where(ends < 0.2, t % 10, t))
    eps, told = torch.randn(z.shape, generator=g).to(z), (torch.rand(len(z), 1, 1, generator=g) > 0.1).to(z)
    a = alphas_cumprod()[t].view(-1, 1, 1, 1).to(z)
    z_t = a.sqrt() * z + (1 - a).sqrt() * eps
    error = (model.unet(z_t, t.to(z.device), told * model.prompts[bad]) - eps).float().square().mean((1, 2, 3))
    snr = (a / (1 - a)).flatten()
    return ({"eps": (error * snr.clamp(max=5) / snr).mean()},)      # min-SNR weights, 2303.09556


def tell(model, lq, scores):
    """Stage estimator.  lq: (B, 3, h, w) in [0, 1]; scores: (B, 2), what `severity` says -> {name: loss}"""
    blur, noise = (model.denet(lq) - scores).abs().mean(0)
    return ({"blur": blur, "noise": noise},)


# ---- the losses
# x_src, x_tgt: (B, 3, H, W) in [-1, 1], the enlarged LQ picture and the photo; scores: (B, 2), of the estimator


def reconstruct(model, lpips, recipe, neg_prob, x_src, x_tgt, scores, u, g=None):
    """Part 1, without LPIPS where that is None.

    u: (B,) uniform draws, below neg_prob: the bad prompt, and its picture; g: of the posterior's samples
    -> {name: loss}, y
    """
    negative = (u < neg_prob).to(x_src.device)
    y = model(x_src, scores, model.prompts[negative.long()], g)
    # online negative prompting: this is what the bad prompt means
    target = torch.where(negative.view(-1, 1, 1, 1), x_src, x_tgt)
    terms = {"l2": recipe.lambda_l2 * F.mse_loss(y, target)}
    if lpips:
        terms["lpips"] = recipe.lambda_lpips * lpips(y, target).mean()
    return terms, y     # Eq. S3Diff (6)


def adversary(model, D, recipe, x_src, scores, g=None, plan=None):
    """Part 2. plan: of `D.draw`, None = Discriminator sees y as it is -> {name: loss}, y"""
    # official: all photos, each with the good prompt; the paper: only those that have it in part 1
    y = model(x_src, scores, model.prompts[:1].expand(len(x_src), -1, -1), g)
    return {"gan": recipe.lambda_gan * D(y, "generator", plan).mean()}, y.detach()  # Eq. S3Diff (6)


def generator_losses(model, lpips, D, recipe, neg_prob, part, x_src, x_tgt, scores, u, g):
    """Parts 1 and 2 as one function, which DDP can wrap.  part: reconstruct, regress (without LPIPS), adversary"""
    if part != "adversary":
        lpips = lpips if part == "reconstruct" else None
        return reconstruct(model, lpips, recipe, neg_prob, x_src, x_tgt, scores, u, g)
    return adversary(model, D, recipe, x_src, scores, g, D.draw(x_src, x_src, g))


def discriminator_loss(D, recipe, x, target, plan=None):
    """Parts 3 and 4. x: (B, 3, H, W) in [-1, 1]; target: real or fake -> {name: loss}"""
    return ({f"d_{target}": recipe.lambda_gan * D(x, target, plan).mean()},)


# ---- what is measured on held-out photos


@torch.no_grad()
def look_adapters(run):
    """-> held-out loss, columns of the sheet; the good prompt, no guidance, the mode of the posterior"""
    x_src, x_tgt, scores = run.test[:3]
    pairs = zip(x_src.split(1), x_tgt.split(1), scores.split(1))
    parts = [reconstruct(run.ema, run.lpips, run.recipe, 0.0, *pair, torch.ones(1)) for pair in pairs]
    loss = sum(float(sum(terms.values())) for terms, _ in parts) / len(parts)
    return loss, {"LQ": x_src, f"result, step {run.step}": torch.cat([y for _, y in parts]).float(), "HQ": x_tgt}


@torch.no_grad()
def look_prior(run):
    """-> held-out loss, columns of the sheet: photos with the noise of t = 300, and denoised with the good prompt"""
    model, hq, t = run.ema, run.held_out, 300
    loss = float(denoise(model, *run.test[:2], training.generator(1))[0]["eps"])
    a, z = alphas_cumprod()[t].item(), model.vae.encode(hq)
    z_t = a**0.5 * z + (1 - a) ** 0.5 * torch.randn(z.shape, generator=training.generator(2)).to(z)
    eps = model.unet(z_t, t, model.prompts[:1].expand(len(z), -1, -1))
    denoised = model.vae.decode(model.clean(z_t, eps, t)).float()
    return loss, {"noisy": model.vae.decode(z_t / a**0.5), f"denoised, step {run.step}": denoised, "HQ": hq}


@torch.no_grad()
def look_estimator(run):
    """-> columns of the log: held-out loss, rank correlation of each score with what the plan did"""
    lq, scores = run.test
    ranks = torch.stack([run.ema.denet(lq), scores]).argsort(1).argsort(1).float()      # (2, B, 2)
    blur, noise = (float(torch.corrcoef(pair)[0, 1]) for pair in ranks.unbind(2))
    return {"held_out": float(sum(tell(run.ema, lq, scores)[0].values())), "rank_blur": blur, "rank_noise": noise}


def evaluate(run):
    """The averaged weights.  -> {column of the log: value}, {column of the sheet: pictures}"""
    if run.args.stage == "estimator":
        return look_estimator(run), {}
    loss, sheet = (look_prior if run.args.stage == "prior" else look_adapters)(run)
    _, y, hq = sheet.values()
    return {"held_out": loss, "psnr": training.psnr(y.clamp(-1, 1), hq)}, sheet


# ---- a run, part by part; `run` holds what the parts share


def prepare(args):
    """Networks, what is to be learned, optimizers.  -> run"""
    cfg, recipes = PRESETS[args.preset]
    run = training.begin(args, recipes[args.stage])
    model, lpips, D, origin = build(args, cfg)
    run.origin = f"train_s3diff: {args.preset} {args.stage}, {origin}"
    run.learns = partial(learns, args.stage)
    run.params = training.freeze_all_but(model, [p for k, p in model.named_parameters() if run.learns(k)])
    if run.dtype != torch.float32 and args.preset != "tiny":
        in_half(model.unet, run.dtype, adapters=False)      # frozen weights need no float32; official: they have it
    run.model, run.lpips, run.D = model.to(run.device), lpips.to(run.device), D.to(run.device)
    run.ema = copy.deepcopy(run.model).eval() if run.recipe.ema else run.model
    run.G_optimizer, run.D_optimizer = (torch.optim.AdamW(params, run.recipe.lr, weight_decay=1e-2, fused=True)
                                        for params in (run.params, list(run.D.parameters())))
    run.columns = ["rank_blur", "rank_noise"] if args.stage == "estimator" else []
    run.state = {name: getattr(run, name) for name in ("model", "ema", "D", "G_optimizer", "D_optimizer", "scaler")}
    return run


def open_data(run):
    """Photos to learn from and held-out ones, and their degradation."""
    args, recipe = run.args, run.recipe
    photos, hq, run.photos = training.photos_for(args.data, recipe.crop, args.seed, run.photos, flip=True)
    run.recipes = [replace(RECIPES[name], branches_per=recipe.branches_per) for name in recipe.recipes]
    hq, one_by_one = hq.to(run.device), replace(run.recipes[0], branches_per="image")
    test = draw(args.stage, run.model, hq, one_by_one, training.generator(0), told=recipe.looks_from > 0)
    run.test = [x.to(run.device) if torch.is_tensor(x) else x for x in test]
    run.held_out = 2 * hq - 1
    run.batches = training.batches(photos, range(run.step, recipe.steps), recipe.batch_size, run.rank, run.share,
                                   run.micro, args.workers, run.device)


def step(run):
    """One step of each optimizer that the stage has."""
    training.set_lr(run.G_optimizer, run.lr)
    training.set_lr(run.D_optimizer, run.recipe.lr_D or run.lr)
    batch, recipe = [], run.recipes[run.step % len(run.recipes)]
    looks = run.step / run.recipe.steps >= run.recipe.looks_from
    for i in range(run.parts):
        # the same draws, whoever computes this part
        g = training.generator(run.args.seed, run.step, run.rank * run.parts + i)
        hq = next(run.batches).to(run.device, non_blocking=True)
        batch.append(draw(run.args.stage, run.model, hq, recipe, g, told=not looks))

    part = [] if run.args.stage != "adapters" else ["reconstruct" if looks else "regress"]
    for inputs in batch:
        training.backward(run, run.generate, *part, *inputs)
    run.grad_norm = run.health.step(run.G_optimizer, run.scaler)
    if part and looks:
        compete(run, batch)
    if run.recipe.ema:
        training.ema_update(run.ema, run.model, min(run.recipe.ema, (1 + run.step) / (10 + run.step)))


def compete(run, batch):
    """Parts 2 to 4: generator against discriminator."""
    fakes = []
    # official: D is not frozen here, so what this leaves in its gradients teaches it a little to be deceived
    run.D.requires_grad_(False)
    for inputs in batch:
        fakes += training.backward(run, run.generate, "adversary", *inputs)
    run.D.requires_grad_(True)
    run.health.step(run.G_optimizer, run.scaler)

    for x_src, x_tgt, _, _, g in batch:
        training.backward(run, run.judge, x_tgt, "real", run.D.draw(x_tgt, x_src, g))
    run.health.step(run.D_optimizer, run.scaler)
    for y, (x_src, _, _, _, g) in zip(fakes, batch):
        training.backward(run, run.judge, y, "fake", run.D.draw(y, x_src, g))
    run.health.step(run.D_optimizer, run.scaler)


def save(run):
    """The model's file, then the checkpoint: if that says that the run is over, all is there."""
    if run.rank == 0 and run.args.preset == "tiny":
        tensors = {k: v for k, v in run.ema.state_dict().items() if is_known(run.args.stage, k)}
        note = f"tiny {run.args.stage}, step {run.step}"
        save_model(run.out / "model.safetensors", run.model.cfg, tensors, note)
    elif run.rank == 0:
        training.write(run.out / "s3diff.pkl", run.model.release())
    training.save_state(run)


def main():
    args = parse_args()
    run = prepare(args)
    training.resume(run, ("preset", "stage", "lora", "modulation", "neg_prob", "rank_unet", "rank_vae", "start_step",
                          "data", "init", "seed"))
    for part in (run.model.unet, *run.model.vae.children()):
        part.checkpointing = args.checkpointing
    if args.compile:
        training.compile_all(run.model.unet.blocks[:-1], run.device)
    run.generate = partial({"prior": denoise, "estimator": tell}.get(args.stage, generator_losses), run.model)
    if args.stage == "adapters":
        run.generate = partial(run.generate, run.lpips, run.D, run.recipe, args.neg_prob)
    run.judge = partial(discriminator_loss, run.D, run.recipe)
    if run.world > 1:
        run.generate = training.replicate(run.model, run.generate, run.device)
        run.judge = training.replicate(run.D, run.judge, run.device)
    open_data(run)
    terms = {"prior": ["eps"], "estimator": ["blur", "noise"], "adapters": ["l2", "lpips", "gan", "d_real", "d_fake"]}
    training.fit(run, terms[args.stage], step, evaluate, save, f"S3Diff {args.preset}, stage {args.stage}")


if __name__ == "__main__":
    with training.one_line_errors("train_s3diff"):
        main()
