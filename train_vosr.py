"""Train VOSR: a flow from noise to clean latents, and its distillation to one step.

    python train_vosr.py --stage autoencoder --data PHOTOS --out runs/ae
    python train_vosr.py --stage flow        --data PHOTOS --out runs/flow    --init runs/ae

and so on from stage to stage: refine, distill, decoder. Full size, on several GPUs:

    torchrun --nproc_per_node=4 train_vosr.py --preset 0.5b --stage flow --data PHOTOS --out runs/flow --init vosr-0.5b

The same command again goes on where it stopped, exactly; Ctrl-C and SIGTERM save first. --out holds the model for
sample.py (EMA weights: model.safetensors, or args.json and checkpoints/ as the authors have them), checkpoint-*.pt,
log.csv, loss.png and sheet.png (LQ | result | HQ of held-out photos; of an autoencoder HQ | HQ decoded).
"""

import argparse
import copy
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import training
from degrade import RECIPES, degrade
from models.dit import DiT, DiTConfig
from models.flow import Draws, guided, loss_distill, loss_flow, sample
from models.support.precision import in_half
from models.support.weights import save_model, save_release
from models.tiny import VOSR_STAGES, TinyDiT, TinyVOSR, TinyVOSRConfig
from models.vosr import SIZES, VOSR


@dataclass
class Stage:
    """What a stage's paper fixes; --steps, --batch-size, --lr, --save-every and --distill override it."""

    steps: int
    batch_size: int                     # of all processes together
    lr: float
    crop: int = 512                     # pixels
    shrink: bool = False                # photos to the crop's size first
    flip: bool = False
    recipes: tuple = ("vosr",)          # of degrade.py, by turns
    branches_per: str = "batch"         # of each recipe, see degrade.Recipe
    betas: tuple = (0.9, 0.95)
    weight_decay: float = 0.01
    ema: float = 0.9999
    schedule: str = "constant"          # or "cosine"
    warmup: int = 0                     # steps
    strength: tuple = (5.0, 1.0)        # mu, sigma of the LQ condition's strength
    lognorm: tuple | None = None        # mu, sigma of the flow's times; None = uniform
    distill: str = "rcgm"               # or "shortcut": the loss of stage distill
    omega: float = 0.5                  # the teacher's guidance there
    save_every: int = 500               # steps


AUTHORS = {     # of the authors' code
    "flow": Stage(400_001, 8, 5e-5, save_every=10_000),
    "distill": Stage(100_001, 32, 2e-5, save_every=5_000),
}
PAPER = {       # of the paper, as far as known: for 100 million pictures, and the machines for them
    "flow256": Stage(400_000, 1024, 1e-4, crop=256, shrink=True, save_every=10_000),
    "flow": Stage(400_000, 256, 5e-5, save_every=10_000),
    "distill": Stage(50_000, 32, 2e-5, save_every=5_000),
}
TINY_STAGES = {name: Stage(**settings) for name, settings in VOSR_STAGES.items()}
TERMS = {"autoencoder": ("all", "first_k"), "distill": ("v", "u"), "decoder": ("L1",)}    # of the loss; elsewhere "flow"
FINISH = 96         # channels of what stage decoder adds to TinyVAE
ABLATIONS = {"tokens": {"blind": True}, "weak": {"weak": 0.0}}      # no visual tokens; usual guidance: no condition
PRESETS = {"tiny": (TinyVOSRConfig(), TINY_STAGES), "0.5b": (SIZES["0.5b"], AUTHORS), "1.4b": (SIZES["1.4b"], AUTHORS),
           "0.5b-paper": (SIZES["0.5b"], PAPER), "1.4b-paper": (SIZES["1.4b"], PAPER)}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", required=True, choices=sorted({*TINY_STAGES, *PAPER}))
    p.add_argument("--preset", default="tiny", choices=PRESETS, help="sizes and hyper-parameters (default tiny)")
    p.add_argument("--init", help="start from the earlier stage's --out, or anything that sample.py --model takes")
    p.add_argument("--ablate", choices=ABLATIONS, help="stage flow without visual tokens, or with no weak condition")
    p.add_argument("--distill", choices=("rcgm", "shortcut"), help="loss of stage distill (default rcgm)")
    training.add_arguments(p)
    args = p.parse_args()
    cfg, stages = PRESETS[args.preset]
    args.tiny = isinstance(cfg, TinyVOSRConfig)
    if args.stage not in stages:
        p.error(f"preset {args.preset} has no --stage {args.stage}, only {', '.join(stages)}")
    if args.distill and args.stage != "distill":
        p.error(f"--distill is not read by --stage {args.stage}")
    if args.ablate and not (args.stage == "flow" and args.tiny):
        p.error("--ablate is for --stage flow of --preset tiny; later stages go on with what they find")
    if args.init and args.stage == "autoencoder":
        p.error("--init is not read by --stage autoencoder")
    if not args.init and (args.stage == "distill" or args.tiny and args.stage != "autoencoder"):
        p.error(f"--stage {args.stage} needs --init, the --out folder of the stage before it")
    return args


# ---- what a stage learns, and from what


def networks(args, cfg):
    """-> VOSR to train, its frozen teacher (DiT) or None, names of the modules that learn, a line on their origin."""
    name = args.stage
    if name == "autoencoder":
        return TinyVOSR(cfg), None, ["vae"], "FROM SCRATCH"
    if not args.init:
        model = VOSR.with_frozen(cfg)
        model.dit = DiT(cfg.dit)
        return model, None, ["dit"], "transformer FROM SCRATCH"
    system, transformer = (TinyVOSR, TinyDiT) if args.tiny else (VOSR, DiT)
    start, origin = system.from_pretrained(args.init).train(), f"from {args.init}"
    if name == "flow" and args.tiny:
        model = TinyVOSR(replace(cfg, temperature=1.0))     # many steps need all of the noise they were trained on
        model.vae.load_state_dict(start.vae.state_dict(), strict=False)
        return model, None, ["dit", "vit"], f"autoencoder {origin}, transformers FROM SCRATCH"
    if start.cfg.dit != replace(cfg.dit, auxiliary_time_cond=name == "decoder"):
        kind = f"{'one' if name == 'decoder' else 'many'}-step model of preset {args.preset}"
        raise training.Quit(f"{args.init}: is no {kind}, from which stage {name} starts: {start.cfg.dit}")
    if name == "decoder":
        model = TinyVOSR(replace(start.cfg, vae=replace(start.cfg.vae, finish=FINISH)))
        model.load_state_dict(start.state_dict(), strict=False)     # all but the decoder
        return model, None, ["vae.finish"], origin
    if name != "distill":
        return start, None, ["dit", "vit"] if name == "refine" else ["dit"], origin
    teacher, start.dit = start.dit.requires_grad_(False), transformer(replace(cfg.dit, auxiliary_time_cond=True))
    start.dit.load_state_dict(teacher.state_dict(), strict=False)       # all but the embedding of r
    kept = {k: getattr(start.cfg, k) for k in ("light_decoder", "weak", *["blind"] * args.tiny)}
    start.cfg = replace(cfg, dit=start.dit.cfg, steps=1, guidance=1.0, **kept)
    return start, teacher, ["dit"], origin


def losses(name, stage, model, teacher, hq, lq, g):
    """Terms of the loss, which is their sum.

    name, stage: a key of TINY_STAGES or AUTHORS and its Stage; teacher: DiT, in stage distill only
    hq, lq: (B, 3, H, W) in [-1, 1]; g: generator of all draws -> {name: scalar}
    """
    if name == "autoencoder":
        return dict(zip(TERMS[name], model.vae.loss(hq, g)))
    if name == "decoder":
        z_lq = model.vae.encode(lq).float()
        T = 0.25 + 0.75 * torch.rand(len(hq), 1, 1, 1, generator=g)     # all temperatures that are of use
        eps = (T * torch.randn(z_lq.shape, generator=g)).to(z_lq)
        return {"L1": F.l1_loss(model.decode(model.restore(z_lq, lq, eps, 1, 1.0, model.cfg.weak)), hq)}
    with torch.no_grad():
        z_hq, z_lq = model.vae.encode(hq, g).float(), model.vae.encode(lq, g).float()
    feat = model.tokens(lq)
    d = Draws.distill(z_hq, g) if name == "distill" else Draws.flow(z_hq, g, stage.lognorm)
    if model.cfg.weak == 0:
        d.w = torch.zeros_like(d.w)
    if name != "distill":
        return {"flow": loss_flow(model.dit, z_hq, z_lq, feat, d, strength=stage.strength)}
    terms = loss_distill(model.dit, teacher, z_hq, z_lq, feat, d, stage.distill, stage.omega, strength=stage.strength)
    return dict(zip(TERMS[name], terms))


@torch.no_grad()
def evaluate(run):
    """Of the averaged weights: held-out loss with fixed draws, PSNR over RGB of what their own sampler makes.

    Distillation has a moving target: there the loss is the distance from the student's one step to the teacher's 25.
    -> {column of the log: value}, {column of the sheet: pictures}
    """
    name, model, (hq, lq) = run.args.stage, run.ema, run.test
    if name == "autoencoder":
        sr = model.vae.decode(model.vae.encode(hq))
    else:
        cfg, z_lq, feat = model.cfg, model.vae.encode(lq).float(), model.tokens(lq)
        eps = torch.randn(z_lq.shape, generator=training.generator(2)).to(z_lq)
        z = model.restore(z_lq, lq, cfg.temperature * eps, cfg.steps, cfg.guidance, cfg.weak)
        sr = model.decode(z)
    if name == "distill":
        one = sample(lambda z, t, r: guided(model.dit, z, z_lq, feat, t, r), eps, 1)
        many = sample(lambda z, t, r: guided(run.teacher, z, z_lq, feat, t, r, run.recipe.omega), eps, 25)
        loss = (one - many).square().mean()
    else:
        terms = losses(name, run.recipe, model, run.teacher, hq, lq, training.generator(1))
        loss = sum(terms.values())
    sr = sr.float().clamp(-1, 1)
    sheet = {"LQ": lq, f"result, step {run.step}": sr, "HQ": hq}
    if name == "autoencoder":
        sheet = {"HQ": hq, f"HQ decoded, step {run.step}": sr}
    return {"held_out": float(loss), "psnr": training.psnr(sr, hq)}, sheet


# ---- a run, part by part; `run` holds what the parts share


def prepare(args):
    """Networks, what is to be learned, optimizer.  -> run"""
    cfg, stages = PRESETS[args.preset]
    run = training.begin(args, stages[args.stage])
    stage = run.recipe
    model, teacher, names, origin = networks(args, cfg)
    run.origin = f"train_vosr: {args.preset} {args.stage}, {origin}"
    model.cfg = replace(model.cfg, **ABLATIONS.get(args.ablate, {}))
    frozen = {k: m for k, m in model.named_children() if k not in {name.split(".")[0] for name in names}}
    if run.dtype == torch.bfloat16 and "vae" in frozen and not args.tiny:
        for m in frozen.values():               # official: the autoencoder stays in float32
            in_half(m, run.dtype)
    run.model, run.teacher = model.to(run.device), teacher and teacher.to(run.device)
    run.ema = copy.deepcopy(model, {id(m): m for m in frozen.values()}).eval()      # what is frozen exists once
    learning = [model.get_submodule(name) for name in names]
    run.params = [p for m in learning for k, p in m.named_parameters() if k != "mask_token"]
    training.freeze_all_but(model, run.params)
    run.optimizer = torch.optim.AdamW(run.params, stage.lr, stage.betas, weight_decay=stage.weight_decay, fused=True)
    run.state = {name: getattr(run, name) for name in ("model", "ema", "optimizer", "scaler")}
    run.learns, run.columns = lambda name: name.startswith(tuple(f"{module}." for module in names)), []
    return run


def open_data(run):
    """Photos to learn from and held-out ones, and their degradation."""
    args, stage = run.args, run.recipe
    photos, hq, run.photos = training.photos_for(args.data, stage.crop, args.seed, run.photos, flip=stage.flip,
                                                 shrink=stage.shrink)
    run.recipes = [replace(RECIPES[k], branches_per=stage.branches_per) for k in stage.recipes]
    hq = hq.to(run.device)
    lq = torch.cat([degrade(some, replace(recipe, branches_per="image"), training.generator(0))[1]
                    for some, recipe in zip(hq.chunk(len(run.recipes)), run.recipes)])
    run.test = 2 * hq - 1, 2 * lq - 1
    run.batches = training.batches(photos, range(run.step, stage.steps), stage.batch_size, run.rank, run.share,
                                   run.micro, args.workers, run.device)


def step(run):
    """One optimizer step; parts of a batch are computed one after another."""
    training.set_lr(run.optimizer, run.lr)
    for i in range(run.parts):
        hq = next(run.batches).to(run.device, non_blocking=True)
        # the same draws, whoever computes this part
        g = training.generator(run.args.seed, run.step, run.rank * run.parts + i)
        lq = hq if run.args.stage == "autoencoder" else degrade(hq, run.recipes[run.step % len(run.recipes)], g)[1]
        alone = run.world > 1 and i < run.parts - 1     # gradients are averaged with the last part
        hq, lq = 2 * hq - 1, 2 * lq - 1
        with run.losses.no_sync() if alone else nullcontext():
            training.backward(run, lambda: (run.losses(hq, lq, g),))
    run.grad_norm = run.health.step(run.optimizer, run.scaler)
    training.ema_update(run.ema, run.model, run.recipe.ema)


def save(run):
    """The model's file, then the checkpoint: if that says that the run is over, all is there."""
    if run.rank == 0 and run.args.tiny:
        note = f"{run.args.preset} {run.args.stage}, step {run.step}"
        save_model(run.out / "model.safetensors", run.model.cfg, run.ema.state_dict(), note=note)
    elif run.rank == 0:
        settings = {"stage": run.args.stage, "steps": run.step, "weak_cond_strength_aelq_list": [0.05, 0.25]}
        save_release(run.out, run.ema.dit.state_dict(), asdict(run.model.cfg.dit) | settings)
    training.save_state(run)


def main():
    args = parse_args()
    run = prepare(args)
    training.resume(run, ("stage", "preset", "ablate", "distill", "data", "init", "seed"))
    run.model.dit.checkpointing = args.checkpointing
    if args.compile:
        training.compile_all(run.model.dit.blocks, run.device)      # all alike: one is compiled, the others follow
    run.losses = partial(losses, args.stage, run.recipe, run.model, run.teacher)
    if run.world > 1:
        run.losses = training.replicate(run.model, run.losses, run.device)
    open_data(run)
    training.fit(run, TERMS.get(args.stage, ["flow"]), step, evaluate, save, f"VOSR {args.preset}, stage {args.stage}")


if __name__ == "__main__":
    with training.one_line_errors("train_vosr"):
        main()
