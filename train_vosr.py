"""Train VOSR: an autoencoder (tiny only), a flow from noise to clean latents, its distillation to one step.

    python train_vosr.py --stage autoencoder --data PHOTOS --out runs/ae
    python train_vosr.py --stage flow        --data PHOTOS --out runs/flow    --init runs/ae
    python train_vosr.py --stage distill     --data PHOTOS --out runs/distill --init runs/flow

The same command again goes on where it stopped, exactly: every step's photos, crops, degradations and noise are
functions of (seed, step). Ctrl-C saves first. --out holds model.safetensors (the EMA weights, which sample.py
loads), checkpoint.pt, log.csv, loss.png and sheet.png (LQ | result | HQ of held-out photos).
"""

import argparse
import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import training
from degrade import RECIPES, Photos, degrade, list_photos
from models.dit import DiTConfig
from models.flow import Draws, guided, loss_distill, loss_flow, sample
from models.vae import TinyVAEConfig
from models.vit import ViTConfig
from models.vosr import VOSR, VOSRConfig
from models.weights import save_model


@dataclass
class Stage:
    """What a stage's paper fixes; --steps, --batch-size and --lr override it."""

    steps: int
    batch_size: int
    lr: float
    crop: int = 256                     # pixels
    recipe: str = "vosr"                # of degrade.py
    betas: tuple = (0.9, 0.95)
    weight_decay: float = 0.01
    ema: float = 0.9999
    schedule: str = "constant"          # or "cosine"
    warmup: int = 0                     # steps
    strength: tuple = (5.0, 1.0)        # mu, sigma of the LQ condition's strength
    lognorm: tuple | None = None        # mu, sigma of the flow's times; None = uniform
    omega: float = 0.5                  # the teacher's guidance in distillation


TINY = VOSRConfig(
    dit=DiTConfig(input_size=16, patch_size=1, in_channels=128, out_channels=64, hidden_size=256, depth=6, num_heads=4, z_dims=128,
                  precondition=True, rope_rescale=False),
    vit=ViTConfig(img_size=112, embed_dim=128, depth=4, num_heads=2),
    vae=TinyVAEConfig(), vit_input=112, vit_layer=None, guidance=1.0, temperature=0.25, torch_bicubic=True,
    tile=128, overlap=32,
)
PRESETS = {
    "tiny": (TINY, {
        "autoencoder": Stage(3000, 16, 3e-3, crop=128, ema=0.99, schedule="cosine", betas=(0.9, 0.999), weight_decay=0.0),
        "flow": Stage(2600, 8, 8e-4, crop=128, recipe="s3diff", ema=0.998, schedule="cosine", warmup=100, strength=(7.0, 1.0), lognorm=(1.0, 1.2)),
        "distill": Stage(20, 8, 5e-5, crop=128, recipe="s3diff", ema=0.8, schedule="cosine", warmup=5, strength=(7.0, 1.0), omega=1.0),
    }),
}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", required=True, choices=("autoencoder", "flow", "distill"))
    p.add_argument("--preset", default="tiny", choices=PRESETS, help="sizes and hyper-parameters")
    p.add_argument("--data", required=True, help="folder of high-quality photos, searched recursively")
    p.add_argument("--out", required=True, help="folder for everything this run writes")
    p.add_argument("--init", help="model to start from: the earlier stage's --out, or a .safetensors file")
    p.add_argument("--distill", choices=("rcgm", "shortcut"), help="loss of stage distill (default rcgm)")
    # optimisation
    p.add_argument("--steps", type=int, help="optimizer steps in all (default: the preset's)")
    p.add_argument("--batch-size", type=int, help="photos per optimizer step")
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches per step, to save memory")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0)
    # machine
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of autocast; weights stay float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the transformer")
    p.add_argument("--workers", type=int, default=0, help="processes that read photos")
    p.add_argument("--save-every", type=int, default=500, help="steps between checkpoints, held-out losses and pictures")
    args = p.parse_args()
    if args.distill and args.stage != "distill":
        p.error(f"--distill is not read by --stage {args.stage}")
    if args.init and args.stage == "autoencoder":
        p.error("--init is not read by --stage autoencoder")
    if not args.init and args.stage != "autoencoder":
        p.error(f"--stage {args.stage} needs --init, the --out folder of the stage before it")
    return args


def build(args, cfg):
    """Model to train and, for distillation, its frozen teacher -> model, teacher or None, list of trained modules."""
    if args.stage == "autoencoder":
        model = VOSR(cfg)
        return model, None, [model.vae]
    start = VOSR.from_pretrained(args.init)
    if args.stage == "flow":                    # a fresh DiT and ViT on the trained autoencoder
        model = VOSR(cfg)
        model.vae.load_state_dict(start.vae.state_dict())
        return model, None, [model.dit, model.vit]
    model = VOSR(replace(cfg, dit=replace(cfg.dit, auxiliary_time_cond=True), steps=1, guidance=1.0))
    missing, unexpected = model.load_state_dict(start.state_dict(), strict=False)
    assert not unexpected and all(k.startswith("dit.r_embedder.") for k in missing), (missing, unexpected)
    return model, start.dit.requires_grad_(False), [model.dit]


def losses(args, stage, model, teacher, hq, lq, g):
    """Loss terms of a batch, their sum is the loss. hq, lq: (B, 3, H, W) in [-1, 1] -> {name: scalar}."""
    if args.stage == "autoencoder":
        return dict(zip(("all", "first_k"), model.vae.loss(hq, g)))
    with torch.no_grad():
        z_hq, z_lq = model.vae.encode(hq, g), model.vae.encode(lq, g)
    feat = model.tokens(lq)
    if args.stage == "flow":
        return {"flow": loss_flow(model.dit, z_hq, z_lq, feat, Draws.flow(z_hq, g, stage.lognorm), strength=stage.strength)}
    v_loss, u_loss = loss_distill(model.dit, teacher, z_hq, z_lq, feat, Draws.distill(z_hq, g), args.distill or "rcgm",
                                  stage.omega, strength=stage.strength)
    return {"v": v_loss, "u": u_loss}


@torch.no_grad()
def evaluate(args, stage, ema, teacher, hq, lq):
    """Held-out loss with fixed draws, and the pictures the model makes by its own sampler.

    Distillation has a moving target, so its own loss says little; there it is the distance from the student's one step to the teacher's
    25 steps from the same noise. hq, lq: (B, 3, H, W) in [-1, 1] -> loss, PSNR in dB over RGB, pictures like hq
    """
    if args.stage == "autoencoder":
        sr = ema.vae.decode(ema.vae.encode(hq))
    else:
        z_lq, feat = ema.vae.encode(lq), ema.tokens(lq)
        eps = torch.randn(z_lq.shape, generator=training.generator(2)).to(z_lq)
        sr = ema.decode(ema.restore(z_lq, lq, ema.cfg.temperature * eps, ema.cfg.steps, ema.cfg.guidance, ema.cfg.weak))
    if args.stage == "distill":
        one = sample(lambda z, t, r: guided(ema.dit, z, z_lq, feat, t, r), eps, 1)
        many = sample(lambda z, t, r: guided(teacher, z, z_lq, feat, t, r, stage.omega), eps, 25)
        loss = (one - many).square().mean()
    else:
        loss = sum(losses(args, stage, ema, teacher, hq, lq, training.generator(1)).values())
    sr = sr.float().clamp(-1, 1)
    psnr = -10 * ((sr - hq) / 2).square().mean((1, 2, 3)).log10().mean()
    return float(loss), float(psnr), sr


def main():
    args = parse_args()
    cfg, stages = PRESETS[args.preset]
    stage = stages[args.stage]
    stage = replace(stage, steps=args.steps or stage.steps, batch_size=args.batch_size or stage.batch_size, lr=args.lr or stage.lr)
    if stage.batch_size % args.accumulate:
        raise training.Quit(f"--batch-size {stage.batch_size} is no multiple of --accumulate {args.accumulate}")
    device = training.choose_device(args.device)
    dtype = training.choose_dtype(args.dtype, device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)                # the initial weights; everything later has generators of its own
    model, teacher, trained = build(args, cfg)
    model, teacher = model.to(device), teacher and teacher.to(device)
    params = training.trainable_groups(model, trained)
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(params, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    settings = {"stage": args.stage, "preset": args.preset, "distill": args.distill, "seed": args.seed, "batch_size": stage.batch_size}
    step = 0
    checkpoint = training.load_checkpoint(out / "checkpoint.pt", settings)
    if checkpoint:
        step = checkpoint["step"]
        for name, part in (("model", model), ("ema", ema), ("optimizer", optimizer), ("scaler", scaler)):
            part.load_state_dict(checkpoint[name])
    start = f"resumed from {out / 'checkpoint.pt'} at step {step}" if step else f"from {args.init}" if args.init else "FROM SCRATCH"
    print(f"train_vosr: {args.preset} {args.stage}, {start}, on {device} in {dtype}".replace("torch.", ""))
    print(f"{training.count(params):,} trained of {training.count(model.parameters()):,} parameters; "
          f"batch {stage.batch_size} = {args.accumulate} x {stage.batch_size // args.accumulate}; {stage}")
    if args.compile:
        model.dit.compile()

    files = list_photos(args.data)
    held_out, files = files[::30], [f for i, f in enumerate(files) if i % 30]
    if not files:
        raise training.Quit(f"{args.data}: one photo only; every 30th is held out, so at least two are needed")
    photos = Photos(args.data, stage.crop, seed=args.seed, flip=True, files=files)
    recipe = RECIPES[stage.recipe]
    test_hq = torch.stack([photo for photo, _ in zip(Photos(args.data, stage.crop, files=held_out), range(16))]).to(device)
    test_lq = degrade(test_hq, replace(recipe, branches_per="image"), training.generator(0))[1]
    test_hq, test_lq = 2 * test_hq - 1, 2 * test_lq - 1

    def save():
        training.save_checkpoint(out / "checkpoint.pt", step=step, settings=settings, model=model.state_dict(), ema=ema.state_dict(),
                                 optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        save_model(out / "model.safetensors", ema, note=f"{args.preset} {args.stage}, step {step}")

    loader = iter(DataLoader(photos, batch_size=stage.batch_size, sampler=range(step * stage.batch_size, stage.steps * stage.batch_size),
                             num_workers=args.workers, pin_memory=device.type == "cuda"))
    log = training.Log(out / "log.csv", ["step", "loss", "grad_norm", "lr", "seconds", "held_out", "psnr"], step)
    if step == 0:
        with training.autocast(device, dtype):
            log.write(step=0, held_out=evaluate(args, stage, ema, teacher, test_hq, test_lq)[0])
    stop = training.Stop()
    bar = tqdm(total=stage.steps, initial=step, unit="step", dynamic_ncols=True)
    mean_loss, since, seconds = 0.0, 0, time.time()
    model.train()
    while step < stage.steps and not stop:
        lr = training.learning_rate(step, stage.steps, stage.lr, stage.schedule, stage.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ---------------------------------------------------------------- the step
        batch = next(loader).to(device, non_blocking=True)
        for i, hq in enumerate(batch.chunk(args.accumulate)):
            g = training.generator(args.seed, step, i)
            lq = degrade(hq, recipe, g)[1] if args.stage != "autoencoder" else hq
            with training.autocast(device, dtype):
                terms = losses(args, stage, model, teacher, 2 * hq - 1, 2 * lq - 1, g)
                loss = sum(terms.values()) / args.accumulate
            scaler.scale(loss).backward()
            mean_loss += loss.item()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        training.ema_update(ema, model, stage.ema)
        step, since = step + 1, since + 1
        # ------------------------------------------------------------------------

        bar.update()
        bar.set_postfix(loss=f"{mean_loss / since:.4f}", img_s=f"{since * stage.batch_size / (time.time() - seconds):.1f}", refresh=False)
        due = step % args.save_every == 0 or step == stage.steps
        if due or step % 50 == 0:                           # once in a while: log
            row = {"step": step, "loss": mean_loss / since, "grad_norm": grad_norm.item(), "lr": lr, "seconds": time.time() - seconds}
            mean_loss, since, seconds = 0.0, 0, time.time()
            if due:                                         # once in a longer while: evaluate, save, draw
                with training.autocast(device, dtype):
                    row["held_out"], row["psnr"], sr = evaluate(args, stage, ema, teacher, test_hq, test_lq)
                save()
                training.save_sheet(out / "sheet.png", {"LQ": test_lq[:6], f"result, step {step}": sr[:6], "HQ": test_hq[:6]})
                tqdm.write(f"step {step}: held-out loss {row['held_out']:.4f}, PSNR {row['psnr']:.2f} dB")
            log.write(**row)
            if due:
                log.draw(out / "loss.png", ["loss", "held_out"], f"VOSR {args.preset}, stage {args.stage}")
    bar.close()
    if stop:
        save()
        print(f"\nstopped at step {step} and saved; the same command goes on from here")


if __name__ == "__main__":
    with training.one_line_errors("train_vosr"):
        main()
