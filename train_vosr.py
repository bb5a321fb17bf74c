"""Train VOSR: a flow from noise to clean latents, and its distillation to one step.

    python train_vosr.py --stage autoencoder --data PHOTOS --out runs/ae
    python train_vosr.py --stage flow        --data PHOTOS --out runs/flow    --init runs/ae

and so on from stage to stage: refine, distill, decoder. Full size, on several GPUs:

    torchrun --nproc_per_node=4 train_vosr.py --preset 0.5b --stage flow --data PHOTOS --out runs/flow --init vosr-0.5b

    flow256     flow at 256 pixels, the paper's first size
    flow        from noise to the clean latent, under the LQ latent and visual tokens
    distill     one step of a student for 25 of its teacher, which is a flow
    and, ours, with --preset tiny:
    autoencoder pixels to latents and back; full sizes take a public one
    refine      flow again, on harsher degradations
    decoder     convolutions that mend what the one-step model decodes

The same command again goes on where it stopped, exactly; Ctrl-C and SIGTERM save first. --out holds the model for
sample.py (EMA weights: model.safetensors, or args.json and checkpoints/ as the authors have them), checkpoint-*.pt,
log.csv, loss.png and sheet.png (LQ | result | HQ of held-out photos; of an autoencoder HQ | HQ decoded).
"""

import argparse
import copy
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import training
from degrade import degrade
from models.dit import DiT
from models.flow import guided, loss_distill, loss_flow, sample
from models.support.precision import in_half
from models.support.weights import save_model, save_release
from models.tiny import VOSR_STAGES, TinyDiT, TinyVOSR, TinyVOSRConfig
from models.vosr import SIZES, VOSR


@dataclass
class Stage(training.Stage):
    """Hyper-parameters of a stage of VOSR."""

    flip: bool = False
    recipes: tuple = ("vosr",)
    betas: tuple = (0.9, 0.95)
    ema: float = 0.9999
    strength: tuple = (5.0, 1.0)        # mu, sigma of the LQ condition's strength
    lognorm: tuple | None = None        # mu, sigma of the flow's times; None = uniform
    distill: str = "rcgm"               # or "shortcut": the loss of stage distill
    omega: float = 0.5                  # the teacher's guidance there


@dataclass
class Run(training.Run):
    """What a run of VOSR has beside the model."""

    teacher: torch.nn.Module = None     # DiT of many steps, frozen; of stage distill


# ---- the stages


AUTHORS = {     # of the authors' code
    "flow": Stage(steps=400_001, batch_size=8, lr=5e-5, save_every=10_000),
    "distill": Stage(steps=100_001, batch_size=32, lr=2e-5, save_every=5_000),
}
PAPER = {       # of the paper, as far as known: for 100 million photos, and the machines for them
    "flow256": Stage(steps=400_000, batch_size=1024, lr=1e-4, crop=256, shrink=True, save_every=10_000),
    "flow": Stage(steps=400_000, batch_size=256, lr=5e-5, save_every=10_000),
    "distill": Stage(steps=50_000, batch_size=32, lr=2e-5, save_every=5_000),
}
TINY = {name: Stage(**settings) for name, settings in VOSR_STAGES.items()}
PRESETS = {     # name: config of the model, its stages
    "tiny": (TinyVOSRConfig(), TINY),
    "0.5b": (SIZES["0.5b"], AUTHORS), "0.5b-paper": (SIZES["0.5b"], PAPER),
    "1.4b": (SIZES["1.4b"], AUTHORS), "1.4b-paper": (SIZES["1.4b"], PAPER),
}
ABLATIONS = {"tokens": {"blind": True}, "weak": {"weak": 0.0}}      # no visual tokens; usual guidance: no condition
FINISH = 96         # channels of what stage decoder adds to TinyVAE
SETTINGS = ("stage", "preset", "ablate", "distill", "data", "init", "seed")     # flags that stay when a run is resumed


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", required=True, choices=sorted({*TINY, *PAPER}))
    p.add_argument("--preset", default="tiny", choices=PRESETS, help="sizes and hyper-parameters (default tiny)")
    p.add_argument("--init", type=training.path,
                   help="start from the earlier stage's --out, or anything that sample.py --model takes")
    p.add_argument("--ablate", choices=ABLATIONS, help="stage flow without visual tokens, or with no weak condition")
    p.add_argument("--distill", choices=("rcgm", "shortcut"), help="loss of stage distill (default rcgm)")
    training.add_arguments(p)
    args = p.parse_args(argv)
    _, stages = PRESETS[args.preset]
    args.tiny = args.preset == "tiny"
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


# ---- build: the networks, and which of them learn


def build(args, cfg):
    """-> VOSR to train, its frozen teacher (DiT) or None, names of the modules that learn, a line on their origin."""
    if args.stage == "autoencoder":
        return TinyVOSR(cfg), None, ["vae"], "FROM SCRATCH"
    if not args.init:
        model = VOSR.with_frozen(cfg)
        model.dit = DiT(cfg.dit)
        return model, None, ["dit"], "transformer FROM SCRATCH"

    system = TinyVOSR if args.tiny else VOSR
    model, origin = system.from_pretrained(args.init).train(), f"from {args.init}"
    if args.stage == "flow" and args.tiny:
        origin = f"autoencoder {origin}, transformers FROM SCRATCH"
        return new_transformers(model.vae, cfg), None, ["dit", "vit"], origin
    check_init(args, cfg, model)
    if args.stage == "distill":
        student, teacher = new_student(model, cfg, args.tiny)
        return student, teacher, ["dit"], origin
    if args.stage == "decoder":
        return new_decoder(model), None, ["vae.finish"], origin
    if args.stage == "refine":
        return model, None, ["dit", "vit"], origin
    return model, None, ["dit"], origin


def check_init(args, cfg, model):
    """Raise UserError where the model of --init is not one that the stage can start from."""
    one_step = args.stage == "decoder"
    if model.cfg.dit != replace(cfg.dit, auxiliary_time_cond=one_step):
        kind = f"{'one' if one_step else 'many'}-step model of preset {args.preset}"
        raise training.UserError(f"{args.init}: is no {kind}, from which stage {args.stage} starts: {model.cfg.dit}")


def new_transformers(vae, cfg):
    """The tiny model around an autoencoder that is trained already."""
    model = TinyVOSR(replace(cfg, temperature=1.0))     # many steps need all of the noise they were trained on
    model.vae.load_state_dict(vae.state_dict(), strict=False)       # all but the convolutions after the decoder
    return model


def new_student(model, cfg, tiny):
    """-> a model whose transformer begins as that of a many-step model but is told a second time r, the old one"""
    teacher = model.dit.requires_grad_(False)
    transformer = TinyDiT if tiny else DiT
    model.dit = transformer(replace(cfg.dit, auxiliary_time_cond=True))
    model.dit.load_state_dict(teacher.state_dict(), strict=False)       # all but the embedding of r
    kept = {"light_decoder": model.cfg.light_decoder, "weak": model.cfg.weak}
    if tiny:
        kept["blind"] = model.cfg.blind
    model.cfg = replace(cfg, dit=model.dit.cfg, steps=1, guidance=1.0, **kept)
    return model, teacher


def new_decoder(model):
    """The tiny model with new convolutions after its decoder."""
    cfg = replace(model.cfg, vae=replace(model.cfg.vae, finish=FINISH))
    finished = TinyVOSR(cfg)
    finished.load_state_dict(model.state_dict(), strict=False)
    return finished


def prepare(args):
    """Networks, what is to be learned, optimizer.  -> Run"""
    cfg, stages = PRESETS[args.preset]
    run = Run(args, stages[args.stage])
    training.start(run)
    run.title, run.terms = f"VOSR {args.preset}, stage {args.stage}", TERMS[args.stage]
    model, teacher, learning, run.origin = build(args, cfg)
    model.cfg = replace(model.cfg, **ABLATIONS.get(args.ablate, {}))
    frozen = {name: m for name, m in model.named_children() if name not in [path.split(".")[0] for path in learning]}
    if run.dtype == torch.bfloat16 and "vae" in frozen and not args.tiny:
        for m in frozen.values():               # official: the autoencoder stays in float32
            in_half(m, run.dtype)
    run.model = model.to(run.device)
    run.ema = copy.deepcopy(model, {id(m): m for m in frozen.values()}).eval()      # what is frozen exists once
    run.teacher = teacher and teacher.to(run.device)
    run.is_saved = lambda name: name.startswith(tuple(f"{path}." for path in learning))
    trained = [p for path in learning for name, p in model.get_submodule(path).named_parameters()
               if name != "mask_token"]     # which DINOv2 has for its own training
    run.trained = training.freeze_all_but(model, trained)
    run.optimizer = training.adamw(run.trained, run.stage)
    run.state = {"model": run.model, "ema": run.ema, "optimizer": run.optimizer, "scaler": run.scaler}
    return run


# ---- data: photos, and what a stage draws from them


def open_data(run):
    """Photos to learn from; held-out ones with their LQ images, an equal share of them by each recipe."""
    hq = training.open_photos(run)
    lq_up = []
    for recipe, some in zip(run.recipes, hq.chunk(max(len(run.recipes), 1))):
        lq_up.append(degrade(some, replace(recipe, branches_per="image"), training.generator(0))[1])
    run.held_out = 2 * hq - 1, 2 * torch.cat(lq_up or [hq]) - 1


def draw(run, hq, g):
    """Degrade photos, unless the stage has no recipe.  hq: (B, 3, H, W) in [0, 1]; g: generator

    -> hq, lq_up (B, 3, H, W) in [-1, 1], g for the losses
    """
    lq_up = degrade(hq, training.recipe(run), g)[1] if run.recipes else hq
    return 2 * hq - 1, 2 * lq_up - 1, g


# ---- the losses, of which a stage has one
# model: VOSR; teacher: DiT, of stage distill; hq, lq_up: (B, 3, H, W) in [-1, 1]; g: generator of all draws
# -> {name: scalar}, summed up


def autoencoder_losses(model, teacher, stage, hq, lq_up, g):
    """Squared errors of the image from all channels of the latent, and from the first k of them."""
    return dict(zip(("all", "first_k"), model.vae.loss(hq, g)))


def flow_losses(model, teacher, stage, hq, lq_up, g):
    """Flow matching: the velocity from the clean latent to noise."""
    z_hq, z_lq, feat = encode(model, hq, lq_up, g)
    weak = (0.05, 0.25) if model.cfg.weak else (0.0, 0.0)
    loss = loss_flow(model.dit, z_hq, z_lq, feat, g, strength=stage.strength, lognorm=stage.lognorm, weak=weak)
    return {"flow": loss}


def distill_losses(model, teacher, stage, hq, lq_up, g):
    """v: the teacher's velocity where the student's step has no length; u: steps that agree with each other."""
    z_hq, z_lq, feat = encode(model, hq, lq_up, g)
    weak = 0.1 if model.cfg.weak else 0.0
    return loss_distill(model.dit, teacher, z_hq, z_lq, feat, g, kind=stage.distill, omega=stage.omega,
                        strength=stage.strength, weak=weak)


def decoder_losses(model, teacher, stage, hq, lq_up, g):
    """L1 between the photo and the image that the frozen one-step model makes."""
    z_lq = model.vae.encode(lq_up).float()
    T = 0.25 + 0.75 * torch.rand(len(hq), 1, 1, 1, generator=g, device=g.device)    # all temperatures that are of use
    eps = (T * torch.randn(z_lq.shape, generator=g, device=g.device)).to(z_lq)
    z = model.restore(z_lq, lq_up, eps, 1, 1.0, model.cfg.weak)
    return {"L1": F.l1_loss(model.decode(z), hq)}


def encode(model, hq, lq_up, g):
    """-> latents of both, (B, C, h, w) float32, and visual tokens of the LQ image, (B, M, z_dims)"""
    with torch.no_grad():
        z_hq, z_lq = model.vae.encode(hq, g).float(), model.vae.encode(lq_up, g).float()
    return z_hq, z_lq, model.tokens(lq_up)


LOSSES = {"autoencoder": autoencoder_losses, "flow256": flow_losses, "flow": flow_losses, "refine": flow_losses,
          "distill": distill_losses, "decoder": decoder_losses}
TERMS = {"autoencoder": ("all", "first_k"), "flow256": ("flow",), "flow": ("flow",), "refine": ("flow",),
         "distill": ("v", "u"), "decoder": ("L1",)}


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
    """The averaged weights on held-out photos, as the stage's function below says.

    -> {column of the log: value}, {column of the sheet: images in [-1, 1]}
    """
    return EVALUATE[run.args.stage](run, *run.held_out)


def evaluate_autoencoder(run, hq, lq_up):
    """Loss with fixed draws, PSNR over RGB of what is decoded again."""
    decoded = run.ema.vae.decode(run.ema.vae.encode(hq)).float().clamp(-1, 1)
    metrics = {"held_out": held_out_loss(run, hq, lq_up), "psnr": training.psnr(decoded, hq)}
    return metrics, {"HQ": hq, f"HQ decoded, step {run.step}": decoded}


def evaluate_flow(run, hq, lq_up):
    """Loss with fixed draws, PSNR over RGB of what the model's own sampler makes."""
    sr = restore(run.ema, lq_up)
    metrics = {"held_out": held_out_loss(run, hq, lq_up), "psnr": training.psnr(sr, hq)}
    return metrics, {"LQ": lq_up, f"result, step {run.step}": sr, "HQ": hq}


def evaluate_distill(run, hq, lq_up):
    """Squared distance from the student's one step to the teacher's 25, since the losses aim at the student itself."""
    z_lq, feat = run.ema.vae.encode(lq_up).float(), run.ema.tokens(lq_up)
    eps = fixed_noise(z_lq)
    one = sample(lambda z, t, r: guided(run.ema.dit, z, z_lq, feat, t, r), eps, 1)
    many = sample(lambda z, t, r: guided(run.teacher, z, z_lq, feat, t, r, run.stage.omega), eps, 25)
    sr = restore(run.ema, lq_up)
    metrics = {"held_out": float((one - many).square().mean()), "psnr": training.psnr(sr, hq)}
    return metrics, {"LQ": lq_up, f"result, step {run.step}": sr, "HQ": hq}


def held_out_loss(run, hq, lq_up):
    terms = LOSSES[run.args.stage](run.ema, None, run.stage, hq, lq_up, training.generator(1))
    return float(sum(terms.values()))


def restore(model, lq_up):
    """What the model makes of LQ images, always from the same noise.  -> like lq_up"""
    cfg, z_lq = model.cfg, model.vae.encode(lq_up).float()
    eps = cfg.temperature * fixed_noise(z_lq)
    z = model.restore(z_lq, lq_up, eps, cfg.steps, cfg.guidance, cfg.weak)
    return model.decode(z).float().clamp(-1, 1)


def fixed_noise(z):
    return torch.randn(z.shape, generator=training.generator(2), device="cpu").to(z)


EVALUATE = {"autoencoder": evaluate_autoencoder, "flow256": evaluate_flow, "flow": evaluate_flow,
            "refine": evaluate_flow, "distill": evaluate_distill, "decoder": evaluate_flow}


def save(run):
    """The model's file, then the checkpoint: if that says that the run is over, all is there."""
    if run.rank == 0 and run.args.tiny:
        note = f"{run.title}, step {run.step}"
        save_model(run.out / "model.safetensors", run.model.cfg, run.ema.state_dict(), note=note)
    elif run.rank == 0:
        settings = {"stage": run.args.stage, "steps": run.step, "weak_cond_strength_aelq_list": [0.05, 0.25]}
        save_release(run.out, run.ema.dit.state_dict(), asdict(run.model.cfg.dit) | settings)
    training.save_state(run)


def main(argv=None):
    args = parse_args(argv)
    with training.alone_in(args.out):
        run = prepare(args)
        training.resume(run, SETTINGS)
        run.model.dit.checkpointing = args.checkpointing
        if args.compile:
            training.compile_all(run.model.dit.blocks, run.device)      # all alike: one is compiled, the others follow
        terms = partial(LOSSES[args.stage], run.model, run.teacher, run.stage)
        run.losses = training.replicate(run, run.model, terms)
        open_data(run)
        return training.fit(run, step, evaluate, save)


if __name__ == "__main__":
    with training.one_line_errors("train_vosr"):
        sys.exit(main())
