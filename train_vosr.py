"""Train VOSR: a flow from noise to clean latents, and its distillation to one step. Tiny only: an autoencoder, a refined flow, a better decoder.

    python train_vosr.py --stage autoencoder --data PHOTOS --out runs/ae
    python train_vosr.py --stage flow        --data PHOTOS --out runs/flow    --init runs/ae
    python train_vosr.py --stage refine      --data PHOTOS --out runs/refine  --init runs/flow
    python train_vosr.py --stage distill     --data PHOTOS --out runs/distill --init runs/refine
    python train_vosr.py --stage decoder     --data PHOTOS --out runs/decoder --init runs/distill

    torchrun --nproc_per_node=4 train_vosr.py --preset 0.5b --stage flow --data PHOTOS --out runs/flow --init vosr-0.5b

The same command again goes on where it stopped, exactly: every step's photos, crops, degradations and noise are functions of (seed, step).
Ctrl-C and SIGTERM save first. What may change then: --steps, --lr, --micro-batch, --keep, --save-every and all that names the machine;
another --stage, --preset, --distill, --data, --init, --seed or --batch-size is refused. --out holds the model for sample.py (the EMA
weights: model.safetensors, or args.json and checkpoints/ as the authors have them), checkpoint-*.pt, log.csv, loss.png and sheet.png
(LQ | result | HQ of held-out photos).
"""

import argparse
import copy
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import training
from degrade import RECIPES, degrade
from models.dit import DiT, DiTConfig
from models.flow import Draws, guided, loss_distill, loss_flow, sample
from models.vae import TinyVAEConfig
from models.vit import ViTConfig
from models.vosr import SIZES, VOSR, VOSRConfig
from models.support.arguments import SEED, between, positive
from models.support.precision import in_half
from models.support.weights import load_strictly, save_model, save_release


@dataclass
class Stage:
    """What a stage's paper fixes; --steps, --batch-size, --lr and --save-every override it."""

    steps: int
    batch_size: int                     # of all processes together
    lr: float
    crop: int = 512                     # pixels
    shrink: bool = False                # photos to the crop's size first, so that a crop shows nearly all of them
    flip: bool = False
    recipes: tuple = ("vosr",)          # of degrade.py, by turns
    branches_per: str = "batch"         # of each recipe; "image" draws directions, scales and kinds of noise anew for every picture
    betas: tuple = (0.9, 0.95)
    weight_decay: float = 0.01
    ema: float = 0.9999
    schedule: str = "constant"          # or "cosine"
    warmup: int = 0                     # steps
    strength: tuple = (5.0, 1.0)        # mu, sigma of the LQ condition's strength
    lognorm: tuple | None = None        # mu, sigma of the flow's times; None = uniform
    omega: float = 0.5                  # the teacher's guidance in distillation
    save_every: int = 500               # steps


TINY = VOSRConfig(
    dit=DiTConfig(input_size=16, patch_size=1, in_channels=128, out_channels=64, hidden_size=256, depth=6, num_heads=4, z_dims=128,
                  precondition=True, rope_rescale=False),
    vit=ViTConfig(img_size=112, embed_dim=128, depth=4, num_heads=2),
    vae=TinyVAEConfig(), vit_input=112, vit_layer=None, guidance=1.0, temperature=0.65, torch_bicubic=True,
    tile=128, overlap=32,
)
AUTHORS = {     # the settings of the authors' code, for both sizes
    "flow": Stage(400_001, 8, 5e-5, save_every=10_000),
    "distill": Stage(100_001, 32, 2e-5, save_every=5_000),
}
PAPER = {       # the paper's, as far as they are known: 100 million pictures of the web, and the machines for it
    "flow256": Stage(400_000, 1024, 1e-4, crop=256, shrink=True, save_every=10_000),
    "flow": Stage(400_000, 256, 5e-5, save_every=10_000),
    "distill": Stage(50_000, 32, 2e-5, save_every=5_000),
}
TINY_STAGES = {
    "autoencoder": Stage(3000, 16, 3e-3, crop=128, flip=True, ema=0.99, schedule="cosine", betas=(0.9, 0.999), weight_decay=0.0),
    "flow": Stage(2600, 8, 8e-4, crop=128, flip=True, recipes=("s3diff",), ema=0.998, schedule="cosine", warmup=100, strength=(7.0, 1.0),
                  lognorm=(1.0, 1.2)),
    "refine": Stage(3600, 8, 5e-4, crop=128, flip=True, recipes=("s3diff", "vosr"), branches_per="image", ema=0.998, schedule="cosine", warmup=100,
                    strength=(7.0, 1.0), lognorm=(1.5, 1.2)),
    "distill": Stage(40, 8, 5e-5, crop=128, flip=True, recipes=("s3diff", "vosr"), branches_per="image", ema=0.8, schedule="cosine", warmup=5,
                     strength=(7.0, 1.0), omega=1.0),
    "decoder": Stage(1500, 8, 1e-3, crop=128, flip=True, recipes=("s3diff", "vosr"), branches_per="image", ema=0.99, schedule="cosine", warmup=50,
                     betas=(0.9, 0.99), weight_decay=0.0),
}
FINISH = 96                             # channels of the convolutions that stage decoder adds
TEMPERATURES = 0.25, 1.0                # of the results they learn from
ABLATIONS = {"tokens": {"blind": True}, "weak": {"weak": 0.0}}     # no visual tokens; classifier-free guidance's usual reference, no condition
PRESETS = {"tiny": (TINY, TINY_STAGES), "0.5b": (SIZES["0.5b"], AUTHORS), "1.4b": (SIZES["1.4b"], AUTHORS),
           "0.5b-paper": (SIZES["0.5b"], PAPER), "1.4b-paper": (SIZES["1.4b"], PAPER)}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", required=True, choices=("autoencoder", "flow256", "flow", "refine", "distill", "decoder"))
    p.add_argument("--preset", default="tiny", choices=PRESETS, help="sizes and hyper-parameters (default tiny)")
    p.add_argument("--data", required=True, help="good photos: a folder, searched recursively, a .tar of them, or a .txt list of such sources")
    p.add_argument("--moved", action="store_true", help="go on although --data or --init lies elsewhere by now")
    p.add_argument("--out", required=True, help="folder for everything this run writes")
    p.add_argument("--init", help="model to start from: the earlier stage's --out, or anything that sample.py --model takes")
    p.add_argument("--ablate", choices=ABLATIONS, help="stage flow without the visual tokens, or with no condition where the weak one stands")
    p.add_argument("--distill", choices=("rcgm", "shortcut"), help="loss of stage distill (default rcgm)")
    # optimisation
    p.add_argument("--steps", type=positive, help="optimizer steps in all (default: the preset's)")
    p.add_argument("--batch-size", type=positive, help="photos per optimizer step, of all processes together")
    p.add_argument("--micro-batch", type=positive, help="photos that one process computes at once (default: its share)")
    p.add_argument("--lr", type=between(1e-9, 1), help="peak learning rate")
    p.add_argument("--seed", type=SEED, default=0)
    # machine
    p.add_argument("--device", type=training.usable_device, default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of autocast; weights stay float32")
    p.add_argument("--checkpointing", action="store_true", help="compute the transformer's blocks a second time in backward: less memory")
    p.add_argument("--fsdp", action="store_true", help="with torchrun: spread the weights over the processes (FSDP2) instead of copying them (DDP)")
    p.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    p.add_argument("--workers", type=between(0, 999, whole=True), default=0, help="more processes, which read photos")
    p.add_argument("--save-every", type=positive, help="steps between checkpoints, held-out losses and pictures")
    p.add_argument("--keep", type=positive, default=2, metavar="K",
                   help="checkpoints that stay, in case the newest is damaged (default 2)")  # fmt: skip
    args = p.parse_args()
    cfg, stages = PRESETS[args.preset]
    if args.stage not in stages:
        p.error(f"preset {args.preset} has no --stage {args.stage}, only {', '.join(stages)}")
    if args.distill and args.stage != "distill":
        p.error(f"--distill is not read by --stage {args.stage}")
    if args.ablate and (args.stage != "flow" or not isinstance(cfg.vae, TinyVAEConfig)):
        p.error("--ablate is for --stage flow of --preset tiny; later stages go on with what they find")
    if args.init and args.stage == "autoencoder":
        p.error("--init is not read by --stage autoencoder")
    if not args.init and (args.stage in ("refine", "distill", "decoder") or args.stage == "flow" and isinstance(cfg.vae, TinyVAEConfig)):
        p.error(f"--stage {args.stage} needs --init, the --out folder of the stage before it")
    if args.fsdp and (args.dtype == "float16" or args.stage in ("autoencoder", "decoder")):
        p.error("--fsdp goes with --stage flow and distill, in bfloat16 or float32")
    return args


def build(args, cfg):
    """Model to train, its frozen teacher, and which networks learn -> VOSR, DiT or None, names of modules, a line on their origin."""
    if args.stage == "autoencoder":
        return VOSR(cfg), None, ["vae"], "FROM SCRATCH"
    if not args.init:
        model = VOSR.with_frozen(cfg)
        model.dit = DiT(cfg.dit)
        return model, None, ["dit"], "transformer FROM SCRATCH"
    start = VOSR.from_pretrained(args.init).train()
    if args.stage == "flow" and isinstance(cfg.vae, TinyVAEConfig):
        model = VOSR(replace(cfg, temperature=1.0))     # less is for one step; many need all of the noise they were trained on
        model.vae.load_state_dict(start.vae.state_dict())
        return model, None, ["dit", "vit"], f"autoencoder from {args.init}, transformers FROM SCRATCH"
    if args.stage == "decoder" and start.cfg.steps > 1:
        raise training.Quit(f"{args.init}: takes {start.cfg.steps} steps; stage decoder learns from a one-step model's results")
    if start.cfg.dit != replace(cfg.dit, auxiliary_time_cond=args.stage == "decoder"):
        raise training.Quit(f"{args.init}: is not what stage {args.stage} of preset {args.preset} starts from: {start.cfg.dit}")
    if args.stage == "decoder":
        model = VOSR(replace(start.cfg, vae=replace(start.cfg.vae, finish=FINISH)))
        load_strictly(model, start.state_dict(), args.init, [k for k in model.state_dict() if k.startswith("vae.finish.")])
        return model, None, ["vae.finish"], f"from {args.init}"
    if args.stage != "distill":
        return start, None, ["dit", "vit"] if args.stage == "refine" else ["dit"], f"from {args.init}"
    teacher, start.dit = start.dit.requires_grad_(False), DiT(replace(cfg.dit, auxiliary_time_cond=True))
    missing, unexpected = start.dit.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and all(k.startswith("r_embedder.") for k in missing), (missing, unexpected)
    kept = {name: getattr(start.cfg, name) for name in ("light_decoder", "weak", "blind")}
    start.cfg = replace(cfg, dit=start.dit.cfg, steps=1, guidance=1.0, **kept)
    return start, teacher, ["dit"], f"from {args.init}"


def losses(args, stage, model, teacher, hq, lq, g):
    """Loss terms of a batch, their sum is the loss. hq, lq: (B, 3, H, W) in [-1, 1] -> {name: scalar}."""
    if args.stage == "autoencoder":
        return dict(zip(("all", "first_k"), model.vae.loss(hq, g)))
    if args.stage == "decoder":
        z_lq = model.vae.encode(lq).float()
        low, high = TEMPERATURES
        T = low + (high - low) * torch.rand(len(hq), 1, 1, 1, generator=g)
        eps = (T * torch.randn(z_lq.shape, generator=g)).to(z_lq)
        return {"L1": F.l1_loss(model.decode(model.restore(z_lq, lq, eps, 1, 1.0, model.cfg.weak)).float(), hq)}
    with torch.no_grad():
        z_hq, z_lq = model.vae.encode(hq, g).float(), model.vae.encode(lq, g).float()
    feat = model.tokens(lq)
    d = Draws.distill(z_hq, g) if args.stage == "distill" else Draws.flow(z_hq, g, stage.lognorm)
    if model.cfg.weak == 0:
        d.w = torch.zeros_like(d.w)
    if args.stage != "distill":
        return {"flow": loss_flow(model.dit, z_hq, z_lq, feat, d, strength=stage.strength)}
    v_loss, u_loss = loss_distill(model.dit, teacher, z_hq, z_lq, feat, d, args.distill or "rcgm", stage.omega, strength=stage.strength)
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
        z_lq, feat = ema.vae.encode(lq).float(), ema.tokens(lq)
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
    given = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "save_every": args.save_every}
    stage = replace(stage, **{k: v for k, v in given.items() if v is not None})
    device, dtype = args.device, training.choose_dtype(args.dtype, args.device)
    rank, world = training.join(device)
    if args.fsdp and not training.several():
        raise training.Quit("--fsdp needs several processes: torchrun --nproc_per_node=N train_vosr.py ...")
    share, micro, parts = training.divide(stage.batch_size, args.micro_batch, world)    # photos of a step: mine, at once, how often
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)                # the initial weights; everything later has generators of its own
    model, teacher, names, origin = build(args, cfg)
    model.cfg = replace(model.cfg, **ABLATIONS.get(args.ablate, {}))
    frozen = {name: m for name, m in model.named_children() if name not in {n.split(".")[0] for n in names}}
    if dtype == torch.bfloat16 and "vae" in frozen and not isinstance(cfg.vae, TinyVAEConfig):
        for m in frozen.values():               # official: the autoencoder stays in float32
            in_half(m, dtype)
    model, teacher = model.to(device), teacher and teacher.to(device)
    ema = copy.deepcopy(model, {id(m): m for m in frozen.values()}).eval()      # what is frozen exists once
    if args.fsdp:
        for m in filter(None, (teacher, *(x.get_submodule(name) for x in (model, ema) for name in names))):
            training.shard(m, device)
    learned = [p for name in names for k, p in model.get_submodule(name).named_parameters() if k != "mask_token"]
    params = training.freeze_all_but(model, learned)
    optimizer = torch.optim.AdamW(params, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    settings = {name: getattr(args, name) for name in ("stage", "preset", "ablate", "distill", "data", "init", "seed")}
    settings["batch_size"] = stage.batch_size
    step, names_of_photos = 0, None
    checkpoint = training.load_checkpoint(out, settings, args.moved)
    if checkpoint:
        step, names_of_photos, origin = checkpoint["step"], checkpoint["photos"], f"resumed from {out} at step {checkpoint['step']}"
        training.load_tensors(model, checkpoint["model"])
        training.load_tensors(ema, checkpoint["ema"])
        training.load_optimizer(optimizer, checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())      # {} of a run in another type
    print(f"train_vosr: {args.preset} {args.stage}, {origin}, on {device} in {dtype}, {world} process{'es' * (world > 1)}".replace("torch.", ""))
    print(f"{training.count(params):,} trained of {training.count(model.parameters()):,} parameters; "
          f"batch {stage.batch_size} = {world} x {parts} x {micro}; {stage}")
    model.dit.checkpointing = args.checkpointing
    if args.compile:
        training.compile_all(model.dit.blocks, device)      # all alike: one is compiled, the others follow at once
    objective = partial(losses, args, stage, model, teacher)
    ddp = world > 1 and not args.fsdp
    if ddp:
        objective = training.replicate(model, objective, device)

    photos, test_hq, names_of_photos = training.photos_for(args.data, stage.crop, args.seed, names_of_photos, flip=stage.flip, shrink=stage.shrink)
    recipes, test_hq = [replace(RECIPES[name], branches_per=stage.branches_per) for name in stage.recipes], test_hq.to(device)
    test_lq = torch.cat([degrade(hq, replace(recipe, branches_per="image"), training.generator(0))[1]
                         for hq, recipe in zip(test_hq.chunk(len(recipes)), recipes)])
    test_hq, test_lq = 2 * test_hq - 1, 2 * test_lq - 1

    def save():
        """Every process helps to gather what is sharded, the first one writes."""
        learned = {k: v for k, v in model.state_dict().items() if k.startswith(tuple(f"{name}." for name in names))}
        averaged = training.gather(ema.state_dict())
        state = training.gather({"model": learned, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
        if rank > 0:
            return
        if isinstance(cfg.vae, TinyVAEConfig):      # the checkpoint last: if it says that the run is over, all is there
            save_model(out / "model.safetensors", model.cfg, averaged, note=f"{args.preset} {args.stage}, step {step}")
        else:
            dit = {k.removeprefix("dit."): v for k, v in averaged.items() if k.startswith("dit.")}
            save_release(out, dit, {**asdict(model.cfg.dit), "stage": args.stage, "steps": step, "weak_cond_strength_aelq_list": [0.05, 0.25]})
        training.save_checkpoint(out, step, args.keep, settings=settings, photos=names_of_photos, ema={k: averaged[k] for k in learned}, **state)

    loader = training.batches(photos, range(step, stage.steps), stage.batch_size, rank, share, micro, args.workers, device)
    log = training.Log(out / "log.csv", ["step", "loss", "grad_norm", "lr", "seconds", "held_out", "psnr"], step or -1) if rank == 0 else None
    if step == 0:
        with training.autocast(device, dtype):
            held = evaluate(args, stage, ema, teacher, test_hq, test_lq)[0]
        if rank == 0:
            log.write(step=0, held_out=held)
    stop, health = training.Stop(), training.Health()
    bar = tqdm(total=stage.steps, initial=step, unit="step", dynamic_ncols=True, disable=rank > 0)
    mean_loss, since, seconds = 0.0, 0, time.time()
    model.train()
    while step < stage.steps and not training.mean_of_all(bool(stop), device):
        lr = training.learning_rate(step, stage.steps, stage.lr, stage.schedule, stage.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ---------------------------------------------------------------- the step
        for i in range(parts):
            hq = next(loader).to(device, non_blocking=True)
            g = training.generator(args.seed, step, rank * parts + i)       # the same numbers, whoever computes this part of the batch
            lq = degrade(hq, recipes[step % len(recipes)], g)[1] if args.stage != "autoencoder" else hq
            with objective.no_sync() if ddp and i < parts - 1 else nullcontext():    # gradients are averaged with the last part
                with training.autocast(device, dtype):
                    terms = objective(2 * hq - 1, 2 * lq - 1, g)
                    loss = sum(terms.values()) / parts
                scaler.scale(loss).backward()
            mean_loss += loss.detach()
        grad_norm = health.step(optimizer, scaler)
        training.ema_update(ema, model, stage.ema)
        step, since = step + 1, since + 1
        # ------------------------------------------------------------------------

        bar.update()
        bar.set_postfix(loss=f"{mean_loss / since:.4f}", img_s=f"{since * stage.batch_size / (time.time() - seconds):.1f}", refresh=False)
        due = step % stage.save_every == 0 or step == stage.steps
        if due or step % 50 == 0:                           # once in a while: log
            row = {"step": step, "loss": training.mean_of_all(mean_loss / since, device), "grad_norm": grad_norm, "lr": lr,
                   "seconds": time.time() - seconds}
            mean_loss, since, seconds = 0.0, 0, time.time()
            if due:                                         # once in a longer while: evaluate, save, draw
                with training.autocast(device, dtype):
                    row["held_out"], row["psnr"], sr = evaluate(args, stage, ema, teacher, test_hq, test_lq)
                save()
            if rank == 0:
                log.write(**row)
            if rank == 0 and due:
                training.save_sheet(out / "sheet.png", {"LQ": test_lq[:6], f"result, step {step}": sr[:6], "HQ": test_hq[:6]})
                tqdm.write(f"step {step}: held-out loss {row['held_out']:.4f}, PSNR {row['psnr']:.2f} dB")
                log.draw(out / "loss.png", ["loss", "held_out"], f"VOSR {args.preset}, stage {args.stage}")
    bar.close()
    if step < stage.steps:
        save()
        print(f"\nstopped at step {step} and saved; the same command goes on from here")
    training.leave()


if __name__ == "__main__":
    with training.one_line_errors("train_vosr"):
        main()
