"""Train S3Diff: adapters on a frozen SD-Turbo, from pairs of good photos and bad copies.

    python train_s3diff.py --data PHOTOS --out runs/s3diff
    python train_s3diff.py --data PHOTOS --out runs/tiny --preset tiny
    torchrun --nproc_per_node=4 train_s3diff.py --data photos.txt --out runs/s3diff --micro-batch 4 --checkpointing

A step has four parts, each with its own backward and its own step of an optimizer:
    1. reconstruct   the target by L2 and LPIPS; one picture in twenty has the bad prompt, and the bad picture itself for a target
    2. adversary     all pictures with the good prompt: make the discriminator D take them for photos
    3. real          D is to know photos
    4. fake          D is to know the pictures of part 2
Apart, because 1 and 2 want different prompts; the same Adam for both, so that its moments see both gradients, as officially.

The same command again goes on where it stopped, exactly. Ctrl-C and SIGTERM save first. What may change then: --steps, --lr, --micro-batch,
--keep, --save-every and all that names the machine; anything else is refused. --out holds s3diff.pkl, laid out as the public file, for
sample.py --model (with --preset tiny: model.safetensors), checkpoint-*.pt, log.csv, loss.png, sheet.png (LQ | result | HQ of held-out photos).
"""

import argparse
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import training
from degrade import RECIPES, degrade
from models.clip import text_features
from models.discriminator import Discriminator, draw_augment
from models.lpips import LPIPS
from models.s3diff import GOOD_PAPER, VAE_TARGETS, S3Diff, S3DiffConfig, is_trained
from models.unet import UNetConfig
from models.vae import VAEConfig
from models.vit import PRESETS as VITS
from models.vit import ViT, ViTConfig
from models.support.arguments import SEED, between, positive
from models.support.weights import fetch, load_strictly, read_tensors, save_model


@dataclass
class Recipe:
    """What the paper fixes; --steps, --batch-size, --lr and --save-every override it."""

    steps: int = 30_000                 # of the paper; the code counts 50 epochs
    batch_size: int = 64                # of all processes together; officially 4 GPUs x 4 photos x 4 parts
    lr: float = 2e-5                    # constant, for the generator and for D
    crop: int = 512                     # pixels, cut out, never shrunk
    lambda_l2: float = 2.0
    lambda_lpips: float = 5.0
    lambda_gan: float = 0.5
    save_every: int = 500               # steps


PUBLIC_PARAMETERS = 34_475_120          # trained ones, with S3DiffConfig() as it is
TINY = S3DiffConfig(
    unet=UNetConfig(widths=(32, 64, 64, 64), num_heads=(1, 1, 1, 1), context_dim=32), vae=VAEConfig(widths=(32, 32, 32, 32), layers_per_block=1),
    r_unet=8, r_vae=4,
)
PRESETS = {"sd-turbo": (S3DiffConfig(), Recipe()), "tiny": (TINY, Recipe(300, 2, 1e-3, crop=128, save_every=50))}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="sd-turbo", choices=PRESETS, help="sd-turbo (default), or tiny: random weights, to watch the loop, not to use")
    p.add_argument("--data", required=True, help="good photos: a folder, searched recursively, a .tar of them, or a .txt list of such sources")
    p.add_argument("--moved", action="store_true", help="go on although --data or --init lies elsewhere by now")
    p.add_argument("--out", required=True, help="folder for everything this run writes")
    p.add_argument("--init", help="go on from the adapters of a model: s3diff, an s3diff.pkl, or another run's --out (default: new adapters)")
    # the paper's ablations
    p.add_argument("--lora", default="unet+encoder", choices=("unet", "unet+encoder", "unet+decoder", "unet+encoder+decoder"),
                   help="what gets adapters (Table 4; default unet+encoder)")  # fmt: skip
    p.add_argument("--modulation", default="blocks", choices=("blocks", "shared", "none"),
                   help="a matrix for each block (default), one for all blocks, or plain LoRA (Table 5)")  # fmt: skip
    p.add_argument("--neg-prob", type=between(0, 1), default=0.05,
                   help="how often a photo has the bad prompt; 0 = no negative prompting (Table 6)")  # fmt: skip
    p.add_argument("--rank-unet", type=between(1, 1024, whole=True),
                   help="rank of the UNet's adapters (Table 7; default 32, tiny 8)")  # fmt: skip
    p.add_argument("--rank-vae", type=between(1, 1024, whole=True),
                   help="rank of the VAE's adapters (Table 7; default 16, tiny 4)")  # fmt: skip
    p.add_argument("--start-step", type=between(1, 999, whole=True), default=999,
                   help="t of the one step; below 999 with that time's noise (Table 8: 250, 500)")  # fmt: skip
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
    if args.init and (args.rank_unet or args.rank_vae or args.lora != "unet+encoder" or args.modulation != "blocks"):
        p.error("--init brings its own --lora, --modulation, --rank-unet and --rank-vae")
    return args


def build(args, cfg):
    """Networks -> S3Diff to train, LPIPS and discriminator for its losses, a line on their origin."""
    vae = {"unet": "", "unet+encoder": VAE_TARGETS, "unet+decoder": VAE_TARGETS.replace("encoder", "decoder", 1),
           "unet+encoder+decoder": VAE_TARGETS.replace("encoder", "(encoder|decoder)", 1)}[args.lora]  # fmt: skip
    cfg = replace(cfg, r_unet=args.rank_unet or cfg.r_unet, r_vae=args.rank_vae or cfg.r_vae, vae_targets=vae, modulation=args.modulation,
                  t=args.start_step)
    if args.preset == "tiny":
        model = S3Diff.from_pretrained(args.init) if args.init else S3Diff(cfg)
        if not args.init:
            torch.nn.init.normal_(model.prompts)
        lpips, vit = LPIPS(), ViT(ViTConfig(img_size=224, patch_size=16, embed_dim=48, num_heads=3, version=1))
        for i in range(len(lpips.taps)):    # positive, as the public ones are
            torch.nn.init.constant_(lpips.get_submodule(f"lin{i}.model.1").weight, 1.0)
        return model, lpips.requires_grad_(False), Discriminator(vit, head_width=16), f"from {args.init}" if args.init else "all FROM SCRATCH"
    if args.init:
        model, origin = S3Diff.from_pretrained(args.init), f"from {args.init}"
        model.cfg.t = args.start_step
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


# ---- the losses: x_src, x_tgt (B, 3, H, W) in [-1, 1] are the enlarged LQ picture and the photo; scores (B, 2) the estimated degradation


def reconstruct(model, lpips, recipe, neg_prob, x_src, x_tgt, scores, u, g=None):
    """Part 1. u: (B,) uniform draws, below neg_prob: the bad prompt, and its picture; g: of the posterior's samples -> {name: loss}, y"""
    negative = (u < neg_prob).to(x_src.device)
    y = model(x_src, scores, model.prompts[negative.long()], g)
    target = torch.where(negative.view(-1, 1, 1, 1), x_src, x_tgt)      # online negative prompting: this is what the bad prompt means
    return {"l2": recipe.lambda_l2 * F.mse_loss(y, target), "lpips": recipe.lambda_lpips * lpips(y, target).mean()}, y  # Eq. S3Diff (7)


def adversary(model, D, recipe, x_src, scores, g=None, plan=None):
    """Part 2. plan: of draw_augment, None = D sees y as it is -> {name: loss}, y"""
    # official: all photos, each with the good prompt; the paper: only those that have it in part 1
    y = model(x_src, scores, model.prompts[:1].expand(len(x_src), -1, -1), g)
    return {"gan": recipe.lambda_gan * D(y, "generator", plan).mean()}, y.detach()


def generator_losses(model, lpips, D, recipe, neg_prob, part, x_src, x_tgt, scores, u, g):
    """Parts 1 and 2 as one function of the model, which DDP can wrap."""
    if part == "reconstruct":
        return reconstruct(model, lpips, recipe, neg_prob, x_src, x_tgt, scores, u, g)
    return adversary(model, D, recipe, x_src, scores, g, draw_augment(x_src, g))


def discriminator_loss(D, recipe, x, target, plan=None):
    """Parts 3 and 4. x: (B, 3, H, W) in [-1, 1]; target: real or fake -> {name: loss}"""
    return ({f"d_{target}": recipe.lambda_gan * D(x, target, plan).mean()},)


@torch.no_grad()
def evaluate(model, lpips, recipe, test):
    """Held-out loss with the good prompt and without guidance.  -> loss, PSNR in dB over RGB, pictures (16, 3, crop, crop) in [-1, 1]"""
    parts = [reconstruct(model, lpips, recipe, 0.0, *(x[i : i + 1] for x in test), u=torch.ones(1)) for i in range(len(test[0]))]
    y = torch.cat([y for _, y in parts]).float()
    psnr = -10 * ((y - test[1]) / 2).square().mean((1, 2, 3)).log10().mean()
    return sum(float(sum(terms.values())) for terms, _ in parts) / len(parts), float(psnr), y


def main():
    args = parse_args()
    cfg, recipe = PRESETS[args.preset]
    given = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "save_every": args.save_every}
    recipe = replace(recipe, **{k: v for k, v in given.items() if v is not None})
    device, dtype = args.device, training.choose_dtype(args.dtype, args.device)
    rank, world = training.join(device)
    share, micro, parts = training.divide(recipe.batch_size, args.micro_batch, world)   # photos of a step: mine, at once, how often
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)                # the initial weights; everything later has generators of its own
    model, lpips, D, origin = build(args, cfg)
    params = training.freeze_all_but(model, [p for k, p in model.named_parameters() if is_trained(k) and k != "modulation.w"])
    if model.cfg == S3DiffConfig():
        assert training.count(params) == PUBLIC_PARAMETERS, f"{training.count(params):,} parameters would be trained, not {PUBLIC_PARAMETERS:,}"
    if dtype != torch.float32 and args.preset != "tiny":
        for p in model.unet.parameters():       # frozen weights need no float32; official: they have it
            p.data = p.data if p.requires_grad else p.data.to(dtype)
    model, lpips, D = model.to(device), lpips.to(device), D.to(device)
    optimizers = {name: torch.optim.AdamW(p, lr=recipe.lr, weight_decay=1e-2, fused=True) for name, p in (("G", params), ("D", list(D.parameters())))}
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    settings = {name: getattr(args, name) for name in ("preset", "lora", "modulation", "neg_prob", "rank_unet", "rank_vae", "start_step", "paper",
                                                       "data", "init", "seed")} | {"batch_size": recipe.batch_size}  # fmt: skip
    step, names_of_photos = 0, None
    checkpoint = training.load_checkpoint(out, settings, args.moved)
    if checkpoint:
        step, names_of_photos, origin = checkpoint["step"], checkpoint["photos"], f"resumed from {out} at step {checkpoint['step']}"
        training.load_tensors(model, checkpoint["model"])
        training.load_tensors(D, checkpoint["D"])
        for name, optimizer in optimizers.items():
            training.load_optimizer(optimizer, checkpoint["optimizers"][name])
        scaler.load_state_dict(checkpoint["scaler"])
    print(f"train_s3diff: {args.preset}, {origin}, on {device} in {dtype}, {world} process{'es' * (world > 1)}".replace("torch.", ""))
    print(f"{training.count(params):,} trained of {training.count(model.parameters()):,} parameters, discriminator's heads "
          f"{training.count(D.parameters()):,}; batch {recipe.batch_size} = {world} x {parts} x {micro}; {recipe}")
    model.unet.checkpointing = model.vae.encoder.checkpointing = model.vae.decoder.checkpointing = args.checkpointing
    if args.compile:
        training.compile_all(model.unet.blocks[:-1], device)
    generate, judge = partial(generator_losses, model, lpips, D, recipe, args.neg_prob), partial(discriminator_loss, D, recipe)
    if world > 1:
        generate, judge = training.replicate(model, generate, device), training.replicate(D, judge, device)

    photos, test_hq, names_of_photos = training.photos_for(args.data, recipe.crop, args.seed, names_of_photos, flip=True)
    test_lq, test_up = degrade(test_hq, replace(RECIPES["s3diff"], branches_per="image"), training.generator(0))
    test = [x.to(device) for x in (2 * test_up - 1, 2 * test_hq - 1)] + [model.estimate(test_lq.to(device))]

    def save():
        """The first process writes; all have the same."""
        if rank > 0:
            return
        learned = {k: v for k, v in model.state_dict().items() if is_trained(k)}
        training.write(out / "s3diff.pkl", model.release())     # the checkpoint last: if it says that the run is over, all is there
        if args.preset == "tiny":
            save_model(out / "model.safetensors", model.cfg, model.state_dict(), note=f"random prior, step {step}")
        training.save_checkpoint(out, step, args.keep, settings=settings, photos=names_of_photos, model=learned, D=D.state_dict(),
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
    names = ["l2", "lpips", "gan", "d_real", "d_fake"]
    log = training.Log(out / "log.csv", ["step", *names, "grad_norm", "seconds", "held_out", "psnr"], step or -1) if rank == 0 else None
    stop, health = training.Stop(), training.Health()
    bar = tqdm(total=recipe.steps, initial=step, unit="step", dynamic_ncols=True, disable=rank > 0)
    sums, since, seconds = dict.fromkeys(names, 0.0), 0, time.time()
    model.train()
    while step < recipe.steps and not training.mean_of_all(bool(stop), device):
        # ---------------------------------------------------------------- the step
        batch = []
        for i in range(parts):
            g = training.generator(args.seed, step, rank * parts + i)       # the same numbers, whoever computes this part of the batch
            hq = next(loader).to(device, non_blocking=True)
            lq, lq_up = degrade(hq, RECIPES["s3diff"], g)
            batch.append((2 * lq_up - 1, 2 * hq - 1, model.estimate(lq), torch.rand(micro, generator=g), g))

        for x_src, x_tgt, scores, u, g in batch:
            backward(generate, "reconstruct", x_src, x_tgt, scores, u, g)
        grad_norm = health.step(optimizers["G"], scaler)

        fakes = []
        D.requires_grad_(False)     # official: D keeps what this backward leaves in it, and learns a little to be deceived
        for x_src, x_tgt, scores, u, g in batch:
            fakes += backward(generate, "adversary", x_src, x_tgt, scores, u, g)
        D.requires_grad_(True)
        health.step(optimizers["G"], scaler)

        for _, x_tgt, _, _, g in batch:
            backward(judge, x_tgt, "real", draw_augment(x_tgt, g))
        health.step(optimizers["D"], scaler)
        for y, (_, _, _, _, g) in zip(fakes, batch):
            backward(judge, y, "fake", draw_augment(y, g))
        health.step(optimizers["D"], scaler)
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
                    row["held_out"], row["psnr"], y = evaluate(model, lpips, recipe, test)
                save()
            if rank == 0:
                log.write(**row)
            if rank == 0 and due:
                training.save_sheet(out / "sheet.png", {"LQ": test[0][:6], f"result, step {step}": y[:6], "HQ": test[1][:6]})
                tqdm.write(f"step {step}: held-out loss {row['held_out']:.4f}, PSNR {row['psnr']:.2f} dB")
                log.draw(out / "loss.png", [*names, "held_out"], f"S3Diff {args.preset}")
    bar.close()
    if step < recipe.steps:
        save()
        print(f"\nstopped at step {step} and saved; the same command goes on from here")
    training.leave()


if __name__ == "__main__":
    with training.one_line_errors("train_s3diff"):
        main()
