"""Train S3Diff: adapters on a frozen SD-Turbo, from pairs of good photos and bad copies.

    python train_s3diff.py --data PHOTOS --out runs/s3diff
    torchrun --nproc_per_node=4 train_s3diff.py --data photos.txt --out runs/s3diff --micro-batch 4 --checkpointing

A step has four parts, each with its own backward and its own step of an optimizer:
    1. reconstruct   the target by L2 and LPIPS; one picture in twenty has the bad prompt, and the bad picture itself for a target
    2. adversary     all pictures with the good prompt: make the discriminator D take them for photos
    3. real          D is to know photos
    4. fake          D is to know the pictures of part 2
Apart, because 1 and 2 want different prompts; the same Adam for both, so that its moments see both gradients, as officially.

A tiny S3Diff has a tiny Stable Diffusion, trained here too, and its own estimator of the degradation; each stage goes on from the last:

    python train_s3diff.py --preset tiny --stage prior     --data PHOTOS --out runs/prior
    python train_s3diff.py --preset tiny --stage estimator --data PHOTOS --out runs/estimator --init runs/prior
    python train_s3diff.py --preset tiny --stage adapters  --data PHOTOS --out runs/s3diff    --init runs/estimator

The same command again goes on where it stopped, exactly. Ctrl-C and SIGTERM save first. What may change then: --steps, --lr, --micro-batch,
--keep, --save-every and all that names the machine; anything else is refused. --out holds s3diff.pkl, laid out as the public file, for
sample.py --model (with --preset tiny: model.safetensors), checkpoint-*.pt, log.csv, loss.png, sheet.png (of held-out photos).
"""

import argparse
import copy
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import training
from degrade import RECIPES, apply, degrade, draw_plan, severity
from models.clip import text_features
from models.discriminator import Discriminator, PatchDiscriminator, draw_augment
from models.lpips import LPIPS
from models.s3diff import GOOD_PAPER, PRIOR, VAE_TARGETS, S3Diff, S3DiffConfig, is_prior, is_trained
from models.unet import UNetConfig, alphas_cumprod
from models.vae import TinyVAEConfig
from models.vit import PRESETS as VITS
from models.vit import ViT
from models.support.arguments import SEED, between, positive
from models.support.precision import in_half
from models.support.weights import fetch, load_strictly, read_model, read_tensors, save_model
from models.vosr import VOSR


@dataclass
class Recipe:
    """What the paper fixes; --steps, --batch-size, --lr and --save-every override it."""

    steps: int = 30_000                 # of the paper; the code counts 50 epochs
    batch_size: int = 64                # of all processes together; officially 4 GPUs x 4 photos x 4 parts
    lr: float = 2e-5                    # for the generator and for D
    crop: int = 512                     # pixels, cut out, never shrunk
    lambda_l2: float = 2.0
    lambda_lpips: float = 5.0
    lambda_gan: float = 0.5
    looks_from: int = 0                 # step with which LPIPS and D begin; L2 alone is three times as fast
    schedule: str = "constant"          # or "cosine"
    warmup: int = 0                     # steps
    ema: float = 0.0                    # decay of the average that is saved; 0 = what is trained itself
    recipes: tuple = ("s3diff",)        # of degrade.py, by turns
    branches_per: str = "batch"         # of each recipe; "image" draws directions, scales and kinds of noise anew for every picture
    save_every: int = 500               # steps


PUBLIC_PARAMETERS = 34_475_120          # trained ones, with S3DiffConfig() as it is
TINY = S3DiffConfig(
    unet=UNetConfig(64, 64, widths=(96, 128, 192), num_heads=(0, 2, 3), layers_per_block=1, context_dim=64, norm_groups=16),
    vae=TinyVAEConfig(), r_unet=8, r_vae=4, vae_targets="encoder", denet_widths=(16, 16, 32, 32), tokens=8,
    t=250, start_noise=0.0, guidance=1.0, enlarge="bicubic", tile=1024,    # at 999 every error of eps would count 14.6 times
)
PRESETS = {"sd-turbo": (S3DiffConfig(), {"adapters": Recipe()}), "tiny": (TINY, {
    "prior": Recipe(6000, 16, 6e-4, crop=128, schedule="cosine", warmup=300, ema=0.999, recipes=("s3diff", "vosr", "s3diff")),
    "estimator": Recipe(5000, 8, 1e-3, crop=128, schedule="cosine", warmup=100, ema=0.99, recipes=("s3diff", "vosr")),
    "adapters": Recipe(6000, 8, 5e-4, crop=128, lambda_lpips=0.02, lambda_gan=0.3, looks_from=4000, schedule="cosine", warmup=100,
                       branches_per="image"),
})}
PLACES = {      # of the adapters, for --lora: names of the VAE's layers, SD-Turbo's and the tiny one's
    "unet": ("", "(?!)"), "unet+encoder": (VAE_TARGETS, "encoder"),
    "unet+decoder": (VAE_TARGETS.replace("encoder", "decoder", 1), r"finish\..*"),
    "unet+encoder+decoder": (VAE_TARGETS.replace("encoder", "(encoder|decoder)", 1), r"encoder|finish\..*"),
}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="sd-turbo", choices=PRESETS, help="sd-turbo (default), or tiny: everything trained here")
    p.add_argument("--stage", default="adapters", choices=PRESETS["tiny"][1], help="adapters (default); tiny only: prior, estimator")
    p.add_argument("--data", required=True, help="good photos: a folder, searched recursively, a .tar of them, or a .txt list of such sources")
    p.add_argument("--moved", action="store_true", help="go on although --data or --init lies elsewhere by now")
    p.add_argument("--out", required=True, help="folder for everything this run writes")
    p.add_argument("--init", help="model to start from: s3diff, an s3diff.pkl, another run's --out, or with --preset tiny the earlier stage's "
                   "(default: new adapters on SD-Turbo, or on the embedded tiny prior; none: random numbers, the paper's Figure 9)")  # fmt: skip
    # the paper's ablations
    p.add_argument("--lora", default="unet+encoder", choices=PLACES, help="what gets adapters (Table 4; default unet+encoder)")
    p.add_argument("--modulation", default="blocks", choices=("blocks", "shared", "none"),
                   help="a matrix for each block (default), one for all blocks, or plain LoRA (Table 5)")  # fmt: skip
    p.add_argument("--neg-prob", type=between(0, 1), default=0.05,
                   help="how often a photo has the bad prompt; 0 = no negative prompting (Table 6)")  # fmt: skip
    p.add_argument("--rank-unet", type=between(1, 1024, whole=True),
                   help="rank of the UNet's adapters (Table 7; default 32, tiny 8)")  # fmt: skip
    p.add_argument("--rank-vae", type=between(1, 1024, whole=True),
                   help="rank of the VAE's adapters (Table 7; default 16, tiny 4)")  # fmt: skip
    p.add_argument("--start-step", type=between(1, 999, whole=True),
                   help="t of the one step; below 999 with that time's noise (Table 8: 250, 500; default 999)")  # fmt: skip
    p.add_argument("--paper", action="store_true", help="the good prompt as the paper prints it, not as the released code has it")
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
    if args.stage not in PRESETS[args.preset][1]:
        p.error(f"--stage {args.stage} is for --preset tiny; {args.preset} has public weights")
    own = args.rank_unet or args.rank_vae or args.lora != "unet+encoder" or args.modulation != "blocks"
    if args.preset != "tiny" and args.init and own:
        p.error("--init brings its own --lora, --modulation, --rank-unet and --rank-vae")
    return args


def is_known(stage, name):
    """Whether a tiny stage's file holds the tensor of that name: what it, or a stage before it, has learned."""
    return is_prior(name) or stage != "prior" and name.startswith("denet.") or stage == "adapters"


def take_over(model, init, wanted=lambda name: True):
    """Give a model the wanted tensors of a tiny one, in folder init or else of the embedded prior.  -> a line on their origin

    Raises Quit, WeightError.
    """
    path = Path(init, "model.safetensors") if init else PRIOR
    if not path.exists():
        raise training.Quit(f"{path}: is not there; give --init: the --out of train_s3diff.py --preset tiny --stage prior, or none")
    tensors = {k: v for k, v in read_model(path)[1].items() if wanted(k)}
    load_strictly(model, tensors, path, [k for k in model.state_dict() if k not in tensors])
    return f"from {path}"


def build_tiny(args, cfg):
    """The tiny networks: the autoencoder of all tiny models, what args.init has, the rest new -> as `build`"""
    model, origin = S3Diff(cfg), "FROM SCRATCH"
    model.prompts = torch.nn.Parameter(torch.randn_like(model.prompts))      # learned, where SD has a text encoder
    for conv in model.denet.conv_first:     # blind for brightness, so that grain and edges are what it sees first
        conv.weight.data = 8 * (conv.weight.data - conv.weight.data.mean((2, 3), keepdim=True))
    if isinstance(cfg.vae, TinyVAEConfig):
        autoencoder = VOSR.from_pretrained("vosr-tiny").vae.state_dict()
        model.vae.load_state_dict({k: v for k, v in autoencoder.items() if "finish" not in k}, strict=False)
    if args.init != "none" and (args.init or args.stage != "prior"):
        origin = take_over(model, args.init)
    return model.float(), LPIPS("random").requires_grad_(False), PatchDiscriminator(), origin


def build(args, cfg):
    """Networks -> S3Diff to train, LPIPS and discriminator for its losses, a line on their origin."""
    tiny = args.preset == "tiny"
    cfg = replace(cfg, r_unet=args.rank_unet or cfg.r_unet, r_vae=args.rank_vae or cfg.r_vae, vae_targets=PLACES[args.lora][tiny],
                  modulation=args.modulation, t=args.start_step or cfg.t)
    if tiny:
        return build_tiny(args, cfg)
    if args.init:
        model, origin = S3Diff.from_pretrained(args.init), f"from {args.init}"
        model.cfg.t = cfg.t
    else:
        model, origin = S3Diff.with_prior(cfg), "SD-Turbo with new adapters"
        model.adapt()           # now with numbers
    if args.paper:
        model.prompts[0] = text_features([GOOD_PAPER])[0]
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


def draw(stage, model, hq, recipe, g):
    """What the losses of a stage take.  hq: (B, 3, H, W) photos in [0, 1]; recipe: of degrade.py; g: generator of all draws"""
    if stage == "prior":
        good = len(hq) // 2         # the others become bad
        return 2 * torch.cat([hq[:good], degrade(hq[good:], recipe, g)[1]]) - 1, (torch.arange(len(hq)) >= good).long(), g
    if stage == "estimator":
        quads = hq.split(4)         # four pictures share directions, scales and modes; kernels and strengths are each picture's own
        plans = [draw_plan(recipe, len(quad), g) for quad in quads]
        lq = [apply(plan, quad)[0] for plan, quad in zip(plans, quads)]
        return torch.cat(lq), torch.cat([severity(*each) for each in zip(plans, quads, lq)])
    lq, lq_up = degrade(hq, recipe, g)
    return 2 * lq_up - 1, 2 * hq - 1, model.estimate(lq), torch.rand(len(hq), generator=g), g


def denoise(model, x, bad, g):
    """Stage prior: Stable Diffusion's own training, on photos and on bad pictures; each has its prompt, one in ten has none.

    x: (B, 3, H, W) in [-1, 1]; bad: (B,) 1 where x is bad, 0 where it is a photo; g: of times, noise and the untold -> {name: loss}
    """
    z, T = model.vae.encode(x), 1000
    t = (torch.rand(len(z), generator=g) * T).long()
    ends = torch.rand(len(z), generator=g)                      # S3Diff and GramSR work near the ends: one in ten each there
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


# ---- the losses: x_src, x_tgt (B, 3, H, W) in [-1, 1] are the enlarged LQ picture and the photo; scores (B, 2) the estimated degradation


def reconstruct(model, lpips, recipe, neg_prob, x_src, x_tgt, scores, u, g=None):
    """Part 1, without LPIPS where that is None.

    u: (B,) uniform draws, below neg_prob: the bad prompt, and its picture; g: of the posterior's samples -> {name: loss}, y
    """
    negative = (u < neg_prob).to(x_src.device)
    y = model(x_src, scores, model.prompts[negative.long()], g)
    target = torch.where(negative.view(-1, 1, 1, 1), x_src, x_tgt)      # online negative prompting: this is what the bad prompt means
    terms = {"l2": recipe.lambda_l2 * F.mse_loss(y, target)}
    if lpips:
        terms["lpips"] = recipe.lambda_lpips * lpips(y, target).mean()
    return terms, y     # Eq. S3Diff (6)


def beside(D, x, x_src, g):
    """What D gets beside a picture x like x_src: how to augment it, or what it was made from."""
    return draw_augment(x, g) if isinstance(D, Discriminator) else x_src


def adversary(model, D, recipe, x_src, scores, g=None, plan=None):
    """Part 2. plan: of `beside`, None = Discriminator sees y as it is -> {name: loss}, y"""
    # official: all photos, each with the good prompt; the paper: only those that have it in part 1
    y = model(x_src, scores, model.prompts[:1].expand(len(x_src), -1, -1), g)
    return {"gan": recipe.lambda_gan * D(y, "generator", plan).mean()}, y.detach()  # Eq. S3Diff (6)


def generator_losses(model, lpips, D, recipe, neg_prob, part, x_src, x_tgt, scores, u, g):
    """Parts 1 and 2 as one function of the model, which DDP can wrap."""
    if part != "adversary":
        lpips = lpips if part == "reconstruct" else None
        return reconstruct(model, lpips, recipe, neg_prob, x_src, x_tgt, scores, u, g)
    return adversary(model, D, recipe, x_src, scores, g, beside(D, x_src, x_src, g))


def discriminator_loss(D, recipe, x, target, plan=None):
    """Parts 3 and 4. x: (B, 3, H, W) in [-1, 1]; target: real or fake -> {name: loss}"""
    return ({f"d_{target}": recipe.lambda_gan * D(x, target, plan).mean()},)


@torch.no_grad()
def evaluate(stage, model, objective, test, held_out):
    """Held-out loss with fixed draws, and what there is to see.

    test: inputs of the losses; held_out: (16, 3, crop, crop) photos in [-1, 1] -> columns of the log, columns of the sheet
    """
    if stage == "adapters":         # the good prompt, no guidance
        parts = [objective("reconstruct", *(x[i : i + 1] for x in test[:3]), torch.ones(1), None) for i in range(len(held_out))]
        y, x = torch.cat([y for _, y in parts]).float(), test[0]
        loss = sum(float(sum(terms.values())) for terms, _ in parts) / len(parts)
    else:
        loss = float(sum(objective(*test[:2], *([training.generator(1)] if stage == "prior" else []))[0].values()))
        if stage == "estimator":
            ranks = torch.stack([model.denet(test[0]), test[1]]).argsort(1).argsort(1).float()      # (2, B, 2)
            rank_blur, rank_noise = (float(torch.corrcoef(pair)[0, 1]) for pair in ranks.unbind(2))
            return {"held_out": loss, "rank_blur": rank_blur, "rank_noise": rank_noise}, {}
        a, z = alphas_cumprod()[300].item(), model.vae.encode(held_out)
        z_t = a**0.5 * z + (1 - a) ** 0.5 * torch.randn(z.shape, generator=training.generator(2)).to(z)
        eps = model.unet(z_t, 300, model.prompts[:1].expand(len(z), -1, -1))
        x, y = model.vae.decode(z_t / a**0.5), model.vae.decode(model.clean(z_t, eps, 300)).float()
    psnr = -10 * ((y.clamp(-1, 1) - held_out) / 2).square().mean((1, 2, 3)).log10().mean()
    return {"held_out": loss, "psnr": float(psnr)}, {"noisy" if stage == "prior" else "LQ": x, "result": y, "HQ": held_out}


def main():
    args = parse_args()
    cfg, recipe = PRESETS[args.preset][0], PRESETS[args.preset][1][args.stage]
    given = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "save_every": args.save_every}
    recipe = replace(recipe, **{k: v for k, v in given.items() if v is not None})
    device, dtype = args.device, training.choose_dtype(args.dtype, args.device)
    rank, world = training.join(device)
    share, micro, parts = training.divide(recipe.batch_size, args.micro_batch, world)   # photos of a step: mine, at once, how often
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)                # the initial weights; everything later has generators of its own
    model, lpips, D, origin = build(args, cfg)
    params = training.freeze_all_but(model, [p for k, p in model.named_parameters() if learns(args.stage, k)])
    if model.cfg == S3DiffConfig():
        assert training.count(params) == PUBLIC_PARAMETERS, f"{training.count(params):,} parameters would be trained, not {PUBLIC_PARAMETERS:,}"
    if dtype != torch.float32 and args.preset != "tiny":
        in_half(model.unet, dtype, adapters=False)      # frozen weights need no float32; official: they have it
    model, lpips, D = model.to(device), lpips.to(device), D.to(device)
    ema = copy.deepcopy(model).eval() if recipe.ema else model
    optimizers = {name: torch.optim.AdamW(p, lr=recipe.lr, weight_decay=1e-2, fused=True) for name, p in (("G", params), ("D", list(D.parameters())))}
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    fixed = ("preset", "stage", "lora", "modulation", "neg_prob", "rank_unet", "rank_vae", "start_step", "paper", "data", "init", "seed")
    settings = {name: getattr(args, name) for name in fixed} | {"batch_size": recipe.batch_size}
    step, names_of_photos = 0, None
    checkpoint = training.load_checkpoint(out, settings, args.moved)
    if checkpoint:
        step, names_of_photos, origin = checkpoint["step"], checkpoint["photos"], f"resumed from {out} at step {checkpoint['step']}"
        training.load_tensors(model, checkpoint["model"])
        training.load_tensors(ema, checkpoint["ema"])
        training.load_tensors(D, checkpoint["D"])
        for name, optimizer in optimizers.items():
            training.load_optimizer(optimizer, checkpoint["optimizers"][name])
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())      # {} of a run in another type
    print(f"train_s3diff: {args.preset} {args.stage}, {origin}, on {device} in {dtype}, {world} process{'es' * (world > 1)}".replace("torch.", ""))
    print(f"{training.count(params):,} trained of {training.count(model.parameters()):,} parameters, discriminator's heads "
          f"{training.count(D.parameters()):,}; batch {recipe.batch_size} = {world} x {parts} x {micro}; {recipe}")
    for part in (model.unet, *model.vae.children()):
        part.checkpointing = args.checkpointing
    if args.compile:
        training.compile_all(model.unet.blocks[:-1], device)

    def objective_of(model):
        if args.stage == "adapters":
            return partial(generator_losses, model, lpips, D, recipe, args.neg_prob)
        return partial({"prior": denoise, "estimator": tell}[args.stage], model)

    generate, judge = objective_of(model), partial(discriminator_loss, D, recipe)
    if world > 1:
        generate, judge = training.replicate(model, generate, device), training.replicate(D, judge, device)

    photos, held_out, names_of_photos = training.photos_for(args.data, recipe.crop, args.seed, names_of_photos, flip=True)
    recipes, held_out = [replace(RECIPES[name], branches_per=recipe.branches_per) for name in recipe.recipes], held_out.to(device)
    test = draw(args.stage, model, held_out, replace(recipes[0], branches_per="image"), training.generator(0))
    test, held_out = [x.to(device) if torch.is_tensor(x) else x for x in test], 2 * held_out - 1

    def save():
        """The first process writes; all have the same."""
        if rank > 0:
            return
        trained, averaged = ({k: v for k, v in m.state_dict().items() if learns(args.stage, k)} for m in (model, ema))
        if args.preset == "tiny":       # the checkpoint last: if it says that the run is over, all is there
            tensors = {k: v for k, v in ema.state_dict().items() if is_known(args.stage, k)}
            save_model(out / "model.safetensors", model.cfg, tensors, note=f"{args.preset} {args.stage}, step {step}")
        else:
            training.write(out / "s3diff.pkl", model.release())
        training.save_checkpoint(out, step, args.keep, settings=settings, photos=names_of_photos, model=trained, ema=averaged, D=D.state_dict(),
                                 optimizers={k: v.state_dict() for k, v in optimizers.items()}, scaler=scaler.state_dict())

    def backward(compute, *inputs):
        """One part of the batch -> what compute returns beside its losses"""
        with training.autocast(device, dtype):
            terms, *others = compute(*inputs)
        scaler.scale(sum(terms.values()) / parts).backward()
        for name, loss in terms.items():
            sums[name] += loss.detach() / parts
        return others

    loader = training.batches(photos, range(step, recipe.steps), recipe.batch_size, rank, share, micro, args.workers, device)
    names = {"prior": ["eps"], "estimator": ["blur", "noise"]}.get(args.stage, ["l2", "lpips", "gan", "d_real", "d_fake"])
    columns = ["step", *names, "grad_norm", "seconds", "held_out", *(["rank_blur", "rank_noise"] if args.stage == "estimator" else ["psnr"])]
    log = training.Log(out / "log.csv", columns, step or -1) if rank == 0 else None
    stop, health = training.Stop(), training.Health()
    bar = tqdm(total=recipe.steps, initial=step, unit="step", dynamic_ncols=True, disable=rank > 0)
    sums, since, seconds = dict.fromkeys(names, 0.0), 0, time.time()
    model.train()
    while step < recipe.steps and not training.mean_of_all(bool(stop), device):
        lr = training.learning_rate(step, recipe.steps, recipe.lr, recipe.schedule, recipe.warmup)
        for group in [group for optimizer in optimizers.values() for group in optimizer.param_groups]:
            group["lr"] = lr

        # ---------------------------------------------------------------- the step
        batch = []
        for i in range(parts):
            g = training.generator(args.seed, step, rank * parts + i)       # the same numbers, whoever computes this part of the batch
            hq = next(loader).to(device, non_blocking=True)
            batch.append(draw(args.stage, model, hq, recipes[step % len(recipes)], g))

        looks = step >= recipe.looks_from
        part = ["reconstruct" if looks else "regress"] if args.stage == "adapters" else []
        for inputs in batch:
            backward(generate, *part, *inputs)
        grad_norm = health.step(optimizers["G"], scaler)

        if args.stage == "adapters" and looks:
            fakes = []
            D.requires_grad_(False)     # official: D keeps what this backward leaves in it, and learns a little to be deceived
            for inputs in batch:
                fakes += backward(generate, "adversary", *inputs)
            D.requires_grad_(True)
            health.step(optimizers["G"], scaler)

            for x_src, x_tgt, _, _, g in batch:
                backward(judge, x_tgt, "real", beside(D, x_tgt, x_src, g))
            health.step(optimizers["D"], scaler)
            for y, (x_src, _, _, _, g) in zip(fakes, batch):
                backward(judge, y, "fake", beside(D, y, x_src, g))
            health.step(optimizers["D"], scaler)
        if recipe.ema:
            training.ema_update(ema, model, min(recipe.ema, (1 + step) / (10 + step)))
        step, since = step + 1, since + 1
        # ------------------------------------------------------------------------

        bar.update()
        bar.set_postfix({k: f"{v / since:.3f}" for k, v in sums.items()}, refresh=False)
        due = step % recipe.save_every == 0 or step == recipe.steps
        if due or step % 50 == 0:                           # once in a while: log
            row = {"step": step, **{k: training.mean_of_all(v / since, device) for k, v in sums.items()}, "grad_norm": grad_norm,
                   "seconds": time.time() - seconds}
            sums, since, seconds = dict.fromkeys(names, 0.0), 0, time.time()
            if due:                                         # once in a longer while: evaluate, save, draw
                with training.autocast(device, dtype):
                    seen, pictures = evaluate(args.stage, ema, objective_of(ema), test, held_out)
                save()
                row |= seen
            if rank == 0:
                log.write(**row)
            if rank == 0 and due:
                if pictures:
                    training.save_sheet(out / "sheet.png", {title: x[:6] for title, x in pictures.items()})
                tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in seen.items()))
                log.draw(out / "loss.png", [*names, "held_out"], f"S3Diff {args.preset}, stage {args.stage}")
    bar.close()
    if step < recipe.steps:
        save()
        print(f"\nstopped at step {step} and saved; the same command goes on from here")
    training.leave()


if __name__ == "__main__":
    with training.one_line_errors("train_s3diff"):
        main()
