"""Train VOSR: a flow from noise to clean latents, and its distillation to one step.

    python train_vosr.py --stage autoencoder --data PHOTOS --out runs/ae
    python train_vosr.py --stage flow        --data PHOTOS --out runs/flow    --init runs/ae

and so on from stage to stage. Full size, on several GPUs:

    torchrun --nproc_per_node=4 train_vosr.py --preset 0.5b --stage flow --data PHOTOS --out runs/flow --init vosr-0.5b

The stages, in the order of a run:

    autoencoder pixels to latents and back          ours, with --preset tiny; full sizes take a public one
    flow256     flow at 256 pixels                  the paper's first size, with --preset 0.5b-paper and 1.4b-paper
    flow        from noise to the clean latent, under the LQ latent and visual tokens
    distill     one step of a student for 25 of its teacher, which is a flow
    decoder     convolutions that mend what the one-step model decodes      ours, with --preset tiny and small

The same command again goes on where it stopped, exactly; Ctrl-C and SIGTERM save first. --out holds the model for
sample.py (EMA weights: model.safetensors, or args.json and checkpoints/ as the authors have them), checkpoint-*.pt,
log.csv, loss.png and sheet.png (LQ | result | HQ of held-out photos; of an autoencoder HQ | HQ decoded).
"""

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import training
from models.dit import DiT
from models.flow import guided, loss_distill, loss_flow, sample
from models.support.arguments import path_argument
from models.support.weights import save_model, save_release
from models.tiny import LETTERS_VOSR, RESIDUAL, SMALL, TinyDiT, TinyVOSR, TinyVOSRConfig
from models.vosr import SIZES, VOSR

LATTICE = 200.0             # weight of `lattice`: without it cells stood out 12 times in a spectrum, with it 5
WEAK_FLOW = (0.05, 0.25)    # the weak condition's strength in a flow: drawn from this range, one for a batch
WEAK_DISTILL = 0.1          # in distillation, for teacher and student
NO_CONDITION = 0.0          # of the ablation: guidance compares with none at all, as is usual


@dataclass
class Stage(training.Stage):
    """Hyper-parameters of a stage of VOSR."""

    flip: bool = False
    recipes: tuple = ("vosr",)
    betas: tuple = (0.9, 0.95)
    ema: float = 0.9999
    strength: tuple = (5.0, 1.0)        # mu, sigma of the LQ condition's strength a = sigmoid(sigma N + mu)
    lognorm: tuple | None = None        # mu, sigma of the flow's times t = sigmoid(sigma N + mu); None = uniform
    distill: str = "rcgm"               # or "shortcut": the loss of stage distill
    omega: float = 0.5                  # the teacher's guidance there; 1 = none


@dataclass
class Run(training.Run):
    """What a run of VOSR has beside the model."""

    teacher: torch.nn.Module = None     # DiT of many steps, frozen; of stage distill


# ---- the stages


AUTHORS = {     # of the authors' code; their last step has the number 400,000 or 100,000, counted from 0
    "flow": Stage(steps=400_001, batch_size=8, lr=5e-5, save_every=10_000, **training.ONE_CARD),
    "distill": Stage(steps=100_001, batch_size=32, lr=2e-5, save_every=5_000, **training.ONE_CARD),
}
PAPER = {       # of the paper, as far as known: for 100 million photos, and the machines for them
    "flow256": Stage(
        steps=400_000, batch_size=1024, lr=1e-4, crop=256, shrink=True, save_every=10_000, **training.ONE_CARD),
    "flow": Stage(steps=400_000, batch_size=256, lr=5e-5, save_every=10_000, **training.ONE_CARD),
    "distill": Stage(steps=50_000, batch_size=32, lr=2e-5, save_every=5_000, **training.ONE_CARD),
}
TINY = {        # ours, for a laptop
    "autoencoder": Stage(
        steps=3000, batch_size=16, lr=3e-3, schedule="cosine", betas=(0.9, 0.999), weight_decay=0.0, ema=0.99,
        crop=128, flip=True, recipes=()),
    # strength: the LQ condition's noise has deviation .04, a third of the paper's; not compared with it
    # lognorm: more times near noise, where the one step starts in which all of this ends
    "flow": Stage(
        steps=6000, batch_size=8, lr=8e-4, schedule="cosine", warmup=100, ema=0.998,
        crop=128, flip=True, **training.TINY_DAMAGE, strength=(7.0, 1.0), lognorm=(1.5, 1.2)),
    # steps: few suffice, since the student begins as its teacher; ema: of so few
    # omega: guidance of .5 costs a flow of this size .46 dB (tests/RESULTS.md)
    "distill": Stage(
        steps=40, batch_size=8, lr=5e-5, schedule="cosine", warmup=5, ema=0.8,
        crop=128, flip=True, **training.TINY_DAMAGE, strength=(7.0, 1.0), omega=1.0),
    "decoder": Stage(
        steps=1500, batch_size=8, lr=1e-3, schedule="cosine", warmup=50, betas=(0.9, 0.99), weight_decay=0.0, ema=0.99,
        crop=128, flip=True, **training.TINY_DAMAGE),
}
LETTERS = {     # ours, for --data digits and --data letters: minutes, no autoencoder to train
    # lognorm: which character it is is decided near noise
    "flow": Stage(
        steps=700, batch_size=64, lr=2e-3, schedule="cosine", warmup=50, ema=0.99,
        crop=32, recipes=("letters",), strength=(7.0, 1.0), lognorm=(0.8, 1.2)),
    "distill": Stage(
        steps=160, batch_size=32, lr=1e-3, schedule="cosine", warmup=10, ema=0.97,
        crop=32, recipes=("letters",), strength=(7.0, 1.0), omega=1.0),
}
SMALL_STAGES = {    # ours, for two hours of a card of 24 GB
    # computed, not measured: a crop of the flow takes 404 GFLOP and, in bfloat16, keeps 0.7 GB for backward, beside
    # 1.2 GB for parameters, moments and the average
    "flow": replace(
        TINY["flow"], steps=10_000, batch_size=64, micro_batch=16, lr=4e-4, warmup=500, ema=0.9995,
        crop=256, branches_per=8),
    "distill": replace(
        TINY["distill"], steps=400, batch_size=64, micro_batch=8, warmup=20, ema=0.98, crop=256, branches_per=8),
    "decoder": replace(TINY["decoder"], batch_size=32, crop=256, branches_per=8),
}
PRESETS = {     # name: config of the model, its stages
    "letters": (LETTERS_VOSR, LETTERS),
    "tiny": (TinyVOSRConfig(local=True), TINY),
    "small": (SMALL, SMALL_STAGES),
    "0.5b": (SIZES["0.5b"], AUTHORS), "0.5b-paper": (SIZES["0.5b"], PAPER),
    "1.4b": (SIZES["1.4b"], AUTHORS), "1.4b-paper": (SIZES["1.4b"], PAPER),
}
LEARNS = {      # beginnings of the names of what a stage trains
    "autoencoder": ("vae.",),
    "flow256": ("dit.",), "flow": ("dit.",),
    "distill": ("dit.",),
    "decoder": ("vae.residual.",),
}
LEARNS_TINY = LEARNS | {"flow": ("dit.", "vit.")}       # ours: nobody has pretrained so small a vision transformer
ABLATIONS = {   # fields of the model's config, which later stages find in --init
    "tokens": {"blind": True},          # without visual tokens
    "weak": {"weak": NO_CONDITION},     # with none in place of the weak one
}
SETTINGS = ("stage", "preset", "ablate", "distill", "data", "lq", "init", "seed")   # flags that stay when resumed
NEEDS = """
what full size needs, of one card:
  preset, stage     steps x images     memory      hours, RTX 4090     hours, H200
  0.5b flow         400,001 x 8        10.1 GB     370                 370, or 190 without checkpointing
  0.5b distill      100,001 x 32       12.0 GB     910                 910, or 460 without checkpointing
  1.4b flow         400,001 x 8        28 GB and what one image takes: a card of 32 GB; more hours than 0.5b
  1.4b distill      100,001 x 32       33 GB and what one image takes: a card of 48 GB
  0.5b-paper and 1.4b-paper are for many machines: 400,000 x 1,024, 400,000 x 256, 50,000 x 32
"""


def parse_args(argv=None):
    p = training.parser(__doc__, NEEDS)
    p.add_argument("--stage", required=True, choices=sorted({*TINY, *PAPER}))
    p.add_argument("--preset", default="tiny", choices=PRESETS,
                   help="sizes and hyper-parameters: ours: tiny (default), letters (for --data digits), "
                   "small (for a card of 24 GB, from --init vosr-tiny); the authors' code, the paper")
    p.add_argument("--init", type=path_argument,
                   help="start from the earlier stage's --out, or anything that sample.py --model takes")
    p.add_argument("--ablate", choices=ABLATIONS,
                   help="stage flow without visual tokens, or with no condition in place of the weak one")
    p.add_argument("--distill", choices=("rcgm", "shortcut"), help="loss of stage distill (default rcgm)")
    training.add_arguments(p)
    args = p.parse_args(argv)
    _, stages = PRESETS[args.preset]
    args.tiny = args.preset in ("letters", "tiny", "small")     # of the networks in tiny.py
    if args.stage not in stages:
        p.error(f"--stage {args.stage} is not of --preset {args.preset}, which has {', '.join(stages)}")
    if args.distill and args.stage != "distill":
        p.error(f"--distill is not read by --stage {args.stage}")
    if args.ablate and not (args.stage == "flow" and args.tiny):
        p.error("--ablate is for --stage flow of our presets; later stages go on with what they find")
    if args.init and (args.stage == "autoencoder" or args.preset == "letters" and args.stage == "flow"):
        p.error(f"--init is not read by --stage {args.stage} of --preset {args.preset}")
    if args.lq and args.stage == "autoencoder":
        p.error(f"--lq is not read by --stage {args.stage}")
    first = next(iter(stages))      # ours begin with nothing, others with public weights or nothing
    if not args.init and (args.stage == "distill" or args.tiny and args.stage != first):
        p.error(f"--stage {args.stage} needs --init, the --out folder of the stage before it")
    return args


# ---- build: the networks, and which of them learn


def build(args, cfg):
    """Build the networks.  -> VOSR to train, its frozen teacher (DiT) or None, a line on their origin"""
    if args.stage == "autoencoder":
        return TinyVOSR(cfg), None, "FROM SCRATCH"
    if args.preset == "letters" and args.stage == "flow":
        return new_transformers(cfg, args.ablate), None, "FROM SCRATCH"
    if not args.init:
        model = VOSR.with_frozen(cfg)
        model.dit = DiT(cfg.dit)        # until now without numbers
        return model, None, "transformer FROM SCRATCH"

    system = TinyVOSR if args.tiny else VOSR
    model = system.from_pretrained(args.init).train()
    if args.stage == "flow" and args.tiny:
        vae, model = model.vae, new_transformers(cfg, args.ablate)
        model.vae.load_state_dict(vae.state_dict(), strict=False)       # all but the convolutions after the decoder
        return model, None, f"autoencoder from {args.init}, transformers FROM SCRATCH"
    check_init(args, cfg, model)
    teacher = None
    if args.stage == "distill":
        teacher = model.dit.requires_grad_(False)
        model.dit = new_student(teacher)
        model.cfg = replace(model.cfg, dit=model.dit.cfg, steps=1, guidance=1.0, temperature=cfg.temperature)
    if args.stage == "decoder":
        model = new_decoder(model)
    return model, teacher, f"from {args.init}"


def check_init(args, cfg, model):
    """Raise UserError where the model of --init is not one that the stage can start from."""
    one_step = args.stage == "decoder"
    if model.cfg.dit != replace(cfg.dit, auxiliary_time_cond=one_step):
        kind = "one-step" if one_step else "many-step"
        raise training.UserError(f"{args.init}: is no {kind} model of preset {args.preset}, "
                                 f"from which stage {args.stage} starts; give the --out folder of the stage before it")


def new_transformers(cfg, ablation):
    """Make the tiny model of many steps."""
    cfg = replace(cfg, temperature=1.0)     # many steps need all of the noise they were trained on
    return TinyVOSR(replace(cfg, **ABLATIONS.get(ablation, {})))


def new_student(teacher):
    """Make the transformer of one step, which is told the step's end r, too; it begins as its teacher.  -> DiT"""
    cfg = replace(teacher.cfg, auxiliary_time_cond=True)
    if isinstance(teacher, TinyDiT):
        student = TinyDiT(cfg, teacher.local)
    else:
        student = DiT(cfg)
    student.load_state_dict(teacher.state_dict(), strict=False)       # all but the embedding of r
    return student


def new_decoder(model):
    """Make a tiny model that has new convolutions after its decoder, else model's parameters."""
    finished = TinyVOSR(replace(model.cfg, vae=replace(model.cfg.vae, residual=RESIDUAL)))
    finished.load_state_dict(model.state_dict(), strict=False)
    return finished


def learns(run, name):
    """Tell whether the run's stage trains the tensor of that name."""
    table = LEARNS_TINY if run.args.tiny else LEARNS
    return name.startswith(table[run.args.stage])


def prepare(args):
    """Set up networks, what is to be learned, optimizer.  -> Run"""
    cfg, stages = PRESETS[args.preset]
    run = Run(args, stages[args.stage])
    training.start(run)
    run.title, run.terms = f"VOSR {args.preset}, stage {args.stage}", TERMS[args.stage]
    run.draw = draw
    has_teacher = args.stage == "distill"
    training.check_memory(run, lambda: DiT(cfg.dit), learns=lambda name: True, copies=int(has_teacher))
    model, teacher, run.origin = build(args, cfg)
    frozen = [model.vae, model.vit]     # official: the autoencoder stays in float32
    if model.light_decoder:
        frozen.append(model.light_decoder)
    training.store_in_half(run, *frozen)
    training.set_model(run, model, partial(learns, run), order=["dit."])
    if teacher:
        run.teacher = teacher.to(run.device)
    return run


# ---- data: what a stage draws from photos


def draw(run, hq, recipe, g):
    """Degrade photos, unless the stage has no recipe.  hq: (B, 3, H, W) in [0, 1]; recipe, g: of `low_quality`

    -> hq, lq_up (B, 3, H, W) in [-1, 1]
    """
    if recipe is None:
        return 2 * hq - 1, 2 * hq - 1
    _, lq_up = training.low_quality(hq, recipe, g)
    return 2 * hq - 1, 2 * lq_up - 1


# ---- the losses, of which a stage has one
# run: Run, for its stage and teacher; model: VOSR, while it learns or averaged; hq, lq_up: of `draw`; g: generator of
# all that is random -> {name: scalar}, summed up


def autoencoder_losses(run, model, hq, lq_up, g):
    """Compute squared errors of the image from all channels of the latent, and from the first k of them."""
    all_channels, first_k = model.vae.loss(hq, g)
    return {"all": all_channels, "first_k": first_k}


def flow_losses(run, model, hq, lq_up, g):
    """Match the flow: the velocity from the clean latent to noise."""
    z_hq, z_lq, feat = encode(model, hq, lq_up, g)
    weak = WEAK_FLOW if model.cfg.weak else (NO_CONDITION, NO_CONDITION)
    loss = loss_flow(model.dit, z_hq, z_lq, feat, g, strength=run.stage.strength, lognorm=run.stage.lognorm, weak=weak)
    return {"flow": loss}


def distill_losses(run, model, hq, lq_up, g):
    """Distill: v is the teacher's velocity, where the student's step has no length; u makes its steps agree."""
    z_hq, z_lq, feat = encode(model, hq, lq_up, g)
    return loss_distill(model.dit, run.teacher, z_hq, z_lq, feat, g, kind=run.stage.distill, omega=run.stage.omega,
                        strength=run.stage.strength, weak=weak_in_distillation(model))


def decoder_losses(run, model, hq, lq_up, g):
    """Compute L1 between the photo and the image that the frozen one-step model makes, and the lattice in it."""
    z_lq = model.vae.encode(lq_up).float()
    temperature = 0.25 + 0.75 * torch.rand(len(hq), 1, 1, 1, generator=g, device=g.device)      # all that are of use
    eps = (temperature * torch.randn(z_lq.shape, generator=g, device=g.device)).to(z_lq)
    z = model.restore(z_lq, lq_up, eps, steps=1, guidance=1.0, weak=model.cfg.weak)     # has no gradient
    sr = model.decode(z)
    return {"L1": F.l1_loss(sr, hq), "lattice": LATTICE * lattice(sr - hq, model.vae.factor)}


def lattice(error, side):
    """Measure what repeats from cell to cell, which no photo has: its squared mean over all cells.

    error: (B, 3, H, W); side: of a cell in pixels -> scalar
    """
    cells = error.unflatten(3, (-1, side)).unflatten(2, (-1, side))     # (B, 3, rows, side, columns, side)
    mean = cells.mean((2, 4))                                           # (B, 3, side, side)
    return (mean - mean.mean((2, 3), keepdim=True)).square().mean()     # a shift of all pixels is no lattice


def encode(model, hq, lq_up, g):
    """Encode both images.  -> latents (B, C, h, w) float32, visual tokens of the LQ image (B, M, z_dims)"""
    with torch.no_grad():       # the autoencoder is frozen
        z_hq, z_lq = model.vae.encode(hq, g).float(), model.vae.encode(lq_up, g).float()
    return z_hq, z_lq, model.tokens(lq_up)      # with a gradient, since a tiny vision transformer learns, too


def weak_in_distillation(model):
    """Say how strong the weak condition of a student and its teacher is."""
    return WEAK_DISTILL if model.cfg.weak else NO_CONDITION


LOSSES = {"autoencoder": autoencoder_losses, "flow256": flow_losses, "flow": flow_losses,
          "distill": distill_losses, "decoder": decoder_losses}
TERMS = {"autoencoder": ("all", "first_k"), "flow256": ("flow",), "flow": ("flow",),
         "distill": ("v", "u"), "decoder": ("L1", "lattice")}


# ---- evaluate, save


@torch.no_grad()
def evaluate(run):
    """Measure the averaged weights on held-out crops, one after the other, as the stage's function below says.

    -> {column of the log: value}, {column of the sheet: images in [-1, 1]}
    """
    return EVALUATE[run.args.stage](run)


def evaluate_autoencoder(run):
    """Measure the loss, and PSNR over RGB of what is decoded again."""
    vae, hq = run.ema.vae, run.held_out_hq
    decoded = torch.cat([vae.decode(vae.encode(one)).float().clamp(-1, 1) for one in hq.split(1)])
    metrics = {"held_out": training.held_out_loss(run, autoencoder_losses), "psnr": training.psnr(decoded, hq)}
    return metrics, {"HQ": hq, f"HQ decoded, step {run.step}": decoded}


def evaluate_flow(run):
    """Measure the loss, and PSNR over RGB of what the model's own sampler makes."""
    hq, (lq_up, sr) = run.held_out_hq, restore_held_out(run)
    metrics = {"held_out": training.held_out_loss(run, LOSSES[run.args.stage]), "psnr": training.psnr(sr, hq)}
    return metrics, {"LQ": lq_up, f"result, step {run.step}": sr, "HQ": hq}


def evaluate_distill(run):
    """Measure the squared distance from the student's one step to the teacher's 25, and PSNR over RGB.

    Not the loss, which aims at the student itself and need not fall while it gets better.
    """
    distances, weak = [], weak_in_distillation(run.ema)
    for i, (_, lq_up) in enumerate(run.held_out):
        z_lq, feat = run.ema.vae.encode(lq_up).float(), run.ema.tokens(lq_up)
        eps = training.fixed_noise(z_lq, i)
        one = sample(lambda z, t, r: guided(run.ema.dit, z, z_lq, feat, t, r), eps, 1)
        many = sample(lambda z, t, r: guided(run.teacher, z, z_lq, feat, t, r, run.stage.omega, weak), eps, 25)
        distances.append(float((one - many).square().mean()))
    hq, (lq_up, sr) = run.held_out_hq, restore_held_out(run)
    metrics = {"held_out": sum(distances) / len(distances), "psnr": training.psnr(sr, hq)}
    return metrics, {"LQ": lq_up, f"result, step {run.step}": sr, "HQ": hq}


def restore_held_out(run):
    """Restore the held-out crops, each from noise of its own that is always the same.  -> lq_up, results"""
    model, cfg, results = run.ema, run.ema.cfg, []
    for i, (_, lq_up) in enumerate(run.held_out):
        z_lq = model.vae.encode(lq_up).float()
        eps = cfg.temperature * training.fixed_noise(z_lq, i)
        z = model.restore(z_lq, lq_up, eps, steps=cfg.steps, guidance=cfg.guidance, weak=cfg.weak)
        results.append(model.decode(z).float().clamp(-1, 1))
    return torch.cat([lq_up for _, lq_up in run.held_out]), torch.cat(results)


EVALUATE = {"autoencoder": evaluate_autoencoder, "flow256": evaluate_flow, "flow": evaluate_flow,
            "distill": evaluate_distill, "decoder": evaluate_flow}


def save(run):
    """Write the model's file, then the checkpoint: if that says that the run is over, all is there."""
    if run.rank == 0 and run.args.tiny:
        note = f"{run.title}, step {run.step}"
        save_model(run.out / "model.safetensors", run.model.cfg, run.ema.state_dict(), note=note)
    elif run.rank == 0:
        # as the authors' args.json names the range of the weak condition
        settings = {"stage": run.args.stage, "steps": run.step, "weak_cond_strength_aelq_list": [*WEAK_FLOW]}
        save_release(run.out, run.ema.dit.state_dict(), asdict(run.model.cfg.dit) | settings)
    training.save_state(run)


def main(argv=None):
    args = parse_args(argv)
    with training.alone_in(args.out):
        run = prepare(args)
        training.resume(run, SETTINGS)
        run.model.dit.checkpointing = run.stage.checkpointing
        if args.compile:
            training.compile_all(run.model.dit.blocks, run.device)      # all alike: one is compiled, the others follow
        run.losses = training.replicate(run, run.model, partial(LOSSES[args.stage], run, run.model))
        training.open_data(run)
        return training.fit(run, training.step, evaluate, save)


if __name__ == "__main__":
    with training.one_line_errors("train_vosr"):
        sys.exit(main())
