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
as the public files, for sample.py --model and the next stage's --init (with --preset tiny: model.safetensors, too),
checkpoint-*.pt, log.csv, loss.png and sheet.png (LQ | result | HQ of held-out photos). With --patience the model is
the best so far, not the last.
"""

import copy
import json
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F

import training
from models.gram import CSD_TIMES, features, loss_csd, loss_gram
from models.gramsr import SETS, GramSR, GramSRConfig, token_adapter
from models.lpips import LPIPS
from models.support.arguments import between, path_argument
from models.support.evaluation import find_niqe
from models.support.imaging import round8
from models.support.metrics import BLOCK, niqe
from models.support.weights import fetch, load_strictly, read_tensors, save_model
from models.tiny import LETTERS_GRAMSR, TinyGramSR, TinyGramSRConfig, load_prior
from models.tiny_losses import RandomLPIPS
from models.vit import PRESETS as VITS, DINOv3

NIQE_CROP = 2 * BLOCK       # pixels a side: four blocks, since NIQE compares blocks and is nan of a single one


@dataclass
class Stage(training.Stage):
    """Hyper-parameters of a stage of GramSR. --rank and --patience override them, too."""

    batch_size: int = 16
    lr: float = 5e-5                    # inferred: constant, for the token adapter too
    crop: int = 512                     # inferred: PiSA-SR's
    recipes: tuple = ("gramsr",)
    branches_per: str = "image"
    rank: int = 4                       # of the new LoRA set
    lambda_l2: float = 1.0              # of a term that is 0 nothing is computed
    lambda_lpips: float = 0.0
    lambda_csd: float = 0.0
    lambda_gram: float = 0.0
    guidance: float = 7.5               # of CSD; inferred: PiSA-SR's
    patience: int = 0                   # evaluations without a better one after which the stage is over; 0 = none
    learn_vit: bool = False             # ours, tiny: no DINO is so small, it learns with the first set


@dataclass
class EarlyStopping:
    """Watches a metric, smaller is better, and ends a stage in which it gets no better."""

    patience: int                       # evaluations without a better one after which the stage is over; 0 = none
    judge: str = "held_out"             # the metric
    best: dict = field(default_factory=dict)    # {judge: its smallest value so far}; by name, since a run that is
                                        # resumed may have another judge: values of two do not compare
    waited: int = 0                     # evaluations since then

    def count(self, metrics):
        """Count an evaluation: the best so far, or one more in vain.  -> is it the best?"""
        value = metrics[self.judge]
        if value < self.best.get(self.judge, math.inf):
            self.best, self.waited = {self.judge: value}, 0
            return True
        self.waited += 1
        return False

    def is_over(self):
        """Tell whether so many evaluations in a row were no better that the stage is over."""
        return 0 < self.patience <= self.waited


@dataclass
class Run(training.Run):
    """What a run of GramSR has beside the model."""

    lpips: torch.nn.Module = None
    vit: torch.nn.Module = None         # DINOv3 of the Gram loss
    niqe: object = None                 # NIQE's parameters, where they are on this disk
    stopping: EarlyStopping = None
    written: list = field(default_factory=list)     # names of the model's files


# ---- the stages


PAPER = {   # inferred: the files' names end at 12,501 and 53,001, PiSA-SR has 4000 of pixel
    "pixel": Stage(
        steps=4000, **training.ONE_CARD),
    "semantic": Stage(
        steps=8501, before=4000, lambda_lpips=2.0, lambda_csd=1.0, **training.ONE_CARD),
    # inferred: LPIPS and CSD stay; that it is stopped early by NIQE is known, not when
    "texture": Stage(
        steps=40_500, before=12_501, lr=5e-6, lambda_lpips=2.0, lambda_csd=1.0, lambda_gram=500.0, patience=10,
        **training.ONE_CARD),
}
TINY = {    # ours, for a laptop
    "pixel": Stage(
        steps=5000, batch_size=8, lr=1e-3, schedule="cosine", warmup=50,
        crop=128, **training.TINY_DAMAGE, rank=16, learn_vit=True),
    # lambdas by gradients at the end of stage pixel: LPIPS half of L2's, Gram ten times, CSD 3 %. At 30 % the tiny
    # prior, which hardly knows its prompts, weaves a lattice; its guidance is weaker for the same reason
    "semantic": Stage(
        steps=250, before=5000, batch_size=8, lr=5e-4, schedule="cosine",
        crop=128, **training.TINY_DAMAGE, rank=16,
        lambda_lpips=0.015, lambda_csd=0.003, guidance=3.0),
    "texture": Stage(
        steps=250, before=5250, batch_size=8, lr=5e-4, schedule="cosine",
        crop=128, **training.TINY_DAMAGE, rank=16,
        lambda_lpips=0.015, lambda_csd=0.003, lambda_gram=0.4, guidance=3.0),
}
LETTERS = {     # ours, for --data digits and --data letters, not yet tuned; an image is 2 x 2 cells
    "pixel": Stage(
        steps=700, batch_size=16, lr=1e-3, schedule="cosine", warmup=50,
        crop=64, recipes=("letters",), branches_per="image", rank=16, learn_vit=True),
    "semantic": Stage(
        steps=200, before=700, batch_size=16, lr=5e-4, schedule="cosine",
        crop=64, recipes=("letters",), branches_per="image", rank=16,
        lambda_lpips=0.015, lambda_csd=0.003, guidance=3.0),
    "texture": Stage(
        steps=200, before=900, batch_size=16, lr=5e-4, schedule="cosine",
        crop=64, recipes=("letters",), branches_per="image", rank=16,
        lambda_lpips=0.015, lambda_csd=0.003, lambda_gram=0.4, guidance=3.0),
}
PRESETS = {     # name: config of the model, its stages
    "sd-2.1": (GramSRConfig(ranks={}), PAPER),
    "letters": (LETTERS_GRAMSR, LETTERS), "tiny": (TinyGramSRConfig(), TINY),
}
ORDER = list(SETS)      # of the stages, each with a LoRA set of its name
SETTINGS = ("stage", "preset", "data", "lq", "init", "seed", "gram", "rank")    # flags that stay when it is resumed
NEEDS = """
what full size needs, of one card:
  stage             steps x images     memory      hours, RTX 4090     hours, H200
  pixel             4,000 x 16         4.1 GB      7                   7
  semantic          8,501 x 16         4.1 GB      22                  22
  texture           40,500 x 16        4.4 GB      141, or fewer by --patience, on both
"""


def parse_args(argv=None):
    p = training.parser(__doc__, NEEDS)
    p.add_argument("--stage", required=True, choices=PAPER)
    p.add_argument("--preset", default="sd-2.1", choices=PRESETS,
                   help="sizes and hyper-parameters: sd-2.1 (default); ours: tiny, letters (for --data "
                   "digits), on S3Diff's prior")
    p.add_argument("--init", type=path_argument,
                   help="model to start from: the earlier stage's --out; stage pixel, tiny: --out of "
                   "train_s3diff.py --stage prior (default: the embedded one; none: random numbers)")
    # what the paper leaves open
    p.add_argument("--gram", choices=("patches", "channels"),
                   help="the matrix of stage texture: of patches (default) or channels")
    p.add_argument("--patience", type=between(0, 10**6, whole=True),
                   help="stop after so many evaluations without a better NIQE of the held-out crops, and keep the "
                        "best model; 0 = never (default 10 in stage texture, else 0; tiny 0). Without NIQE's file, or "
                        "with crops below 192 pixels, as the tiny ones of 128, the held-out loss is judged instead")
    p.add_argument("--rank", type=between(1, 1024, whole=True),
                   help="rank of the new LoRA set (default 4; of our presets 16)")
    training.add_arguments(p)
    args = p.parse_args(argv)
    _, stages = PRESETS[args.preset]
    args.tiny = args.preset in ("letters", "tiny")
    if args.stage == "pixel" and args.init and not args.tiny:
        p.error("--stage pixel comes first: --init is for the later ones")
    if args.stage != "pixel" and not args.init:
        p.error(f"--stage {args.stage} needs --init, the --out folder of the stage before it")
    if args.preset == "letters" and not args.init:
        p.error("--stage pixel of --preset letters needs --init, the --out of train_s3diff.py --stage prior")
    if args.gram and args.stage != "texture":
        p.error(f"--gram is not read by --stage {args.stage}")
    args.gram = args.gram or "patches"
    args.rank = args.rank or stages[args.stage].rank
    return args


# ---- build: the networks, and which of them learn


def build(args, cfg, stage):
    """Build GramSR with its new LoRA set.  -> the model, a line on its origin"""
    earlier = ORDER[: ORDER.index(args.stage)]
    if earlier:
        model, origin = build_later(args, cfg, earlier)
    else:
        model, origin = build_first(args, cfg)
    model.add_set(args.stage, stage.rank)
    return model, f"{origin}, new LoRA set {args.stage}"


def build_first(args, cfg):
    """Build GramSR around its prior, with a new token adapter, no LoRA set.  -> the model, a line on its origin"""
    if args.tiny:
        model, origin = TinyGramSR(cfg), "FROM SCRATCH"
        if args.init != "none":
            origin = f"from {load_prior(model, args.init)}"
    else:
        model, origin = GramSR.with_prior(cfg), "SD 2.1 and DINOv3, new adapter"
    # anew: of public networks alone the adapter was on the meta device, without numbers
    model.adapter = token_adapter(cfg.vit.embed_dim, cfg.unet.context_dim, cfg.unet.context_dim)
    return model, origin


def build_later(args, cfg, earlier):
    """Build GramSR of --init, which must have the LoRA sets `earlier`.  -> the model, a line on its origin"""
    system = TinyGramSR if args.tiny else GramSR
    model = system.from_pretrained(args.init)
    check_init(args, cfg, model, earlier)
    return model, f"from {args.init}"


def check_init(args, cfg, model, earlier):
    """Raise UserError where the model of --init is not one that the stage can start from."""
    if list(model.cfg.ranks) != earlier:
        have, want = " and ".join(model.cfg.ranks), " and ".join(earlier)
        raise training.UserError(f"{args.init}: has LoRA set {have}; --stage {args.stage} starts from {want}")
    if as_stored(replace(model.cfg, ranks={})) != as_stored(cfg):
        raise training.UserError(f"{args.init}: its networks are not those of --preset {args.preset}")


def as_stored(cfg):
    """Turn a config into what a model's file gives back of it: JSON has lists for tuples.  -> nested dicts"""
    return json.loads(json.dumps(asdict(cfg)))


def build_judges(args, stage, model):
    """Build what the stage's losses need.  -> LPIPS and DINOv3, each frozen, or None"""
    lpips, vit = None, None
    if stage.lambda_lpips:
        lpips = RandomLPIPS() if args.tiny else LPIPS.from_pretrained("vgg")
        lpips.requires_grad_(False)
    if stage.lambda_gram:
        vit = copy.deepcopy(model.vit) if args.tiny else small_dino()
        vit.requires_grad_(False)
    return lpips, vit


def small_dino():
    """Load DINOv3 of the Gram loss, which is not the one that makes the tokens."""
    path = fetch("dinov3-vits16plus-pretrain-lvd1689m/model.safetensors")
    with torch.device("meta"):
        vit = DINOv3(VITS["dinov3_vits16plus"])
    load_strictly(vit, read_tensors(path), path)
    return vit


def learns(run, name):
    """Tell whether the run's stage trains the tensor of that name: its own LoRA set, the token adapter.

    Inferred: the adapter learns in each stage; the authors release a new one with each set.
    """
    own_set = tuple(f".{adapter}.weight" for adapter in SETS[run.args.stage])
    if name.startswith("vit."):
        return run.stage.learn_vit
    return name.endswith(own_set) or name.startswith("adapter.")


def prepare(args):
    """Set up networks, what is to be learned, optimizer.  -> Run"""
    cfg, stages = PRESETS[args.preset]
    run = Run(args, stages[args.stage])
    training.start(run)
    run.title = f"GramSR {args.preset}, stage {args.stage}"
    run.terms = tuple(name for name in TERMS if getattr(run.stage, f"lambda_{name}"))
    run.columns = ("niqe",)
    run.draw = draw
    training.check_memory(run, lambda: GramSR(cfg), partial(learns, run))
    torch.manual_seed(args.seed + ORDER.index(args.stage))      # or all sets would begin alike
    model, run.origin = build(args, cfg, run.stage)
    lpips, vit = build_judges(args, run.stage, model)
    training.store_in_half(run, model.unet, model.vae, model.vit)       # earlier LoRA sets stay as they came, too
    # a new optimizer a stage: PiSA-SR goes on with one, whose moments would go on moving what is frozen by now
    training.set_model(run, model, partial(learns, run), order=["unet.", "adapter."])
    if lpips:
        run.lpips = lpips.to(run.device)
    if vit:
        run.vit = vit.to(run.device)
    if run.stage.crop >= NIQE_CROP:
        run.niqe = find_niqe(None)      # None where it is not on this disk
    judge = "niqe" if run.niqe else "held_out"
    run.stopping = EarlyStopping(run.stage.patience, judge)
    return run


# ---- data: what a stage draws from photos


def draw(run, hq, recipe, g):
    """Degrade photos.  hq: (B, 3, H, W) in [0, 1]; recipe, g: of `low_quality` -> hq, lq_up (B, 3, H, W) in [-1, 1]"""
    _, lq_up = training.low_quality(hq, recipe, g)
    return 2 * hq - 1, 2 * lq_up - 1


# ---- the losses: one function, since each stage has those of the stages before
# run: Run, for its stage, LPIPS and DINOv3; model: GramSR; hq, lq_up: of `draw`; g: generator of all that is random
# -> {name: scalar}, summed up


def losses(run, model, hq, lq_up, g, result=None):
    """Compare what the model makes of LQ images with HQ ones.  result: what model(lq_up) gave, where it is known"""
    stage = run.stage
    if result is None:
        result = model(lq_up)
    sr, z, context = result     # the image, the latent it was decoded from, visual tokens
    sr = sr.float()
    terms = {"l2": stage.lambda_l2 * F.mse_loss(sr, hq)}
    if stage.lambda_lpips:
        terms["lpips"] = stage.lambda_lpips * run.lpips(sr, hq).mean()
    if stage.lambda_csd:
        t = torch.randint(*CSD_TIMES, (len(z),), generator=g, device=g.device).to(z.device)
        noise = torch.randn(z.shape, generator=g, device=g.device).to(z.device)
        # detached: CSD is to change the latent, not the tokens that it is judged by
        good, bad = model.csd_conditions(context.detach())
        terms["csd"] = stage.lambda_csd * loss_csd(model.prior, z, t, noise, good, bad, stage.guidance)
    if stage.lambda_gram:
        with torch.autocast(sr.device.type, enabled=False):     # small differences of large sums
            tokens_sr, tokens_hq = features(run.vit, sr), features(run.vit, hq)
            difference = loss_gram(tokens_sr, tokens_hq, channels=run.args.gram == "channels")
        terms["gram"] = stage.lambda_gram * difference
    return terms        # Eq. GramSR (6)


TERMS = ("l2", "lpips", "csd", "gram")


# ---- evaluate, save


@torch.no_grad()
def evaluate(run):
    """Measure on held-out crops, one after the other: the loss, PSNR over RGB, NIQE.

    NIQE is nan without its file, and of crops so flat that it says nothing.
    -> {column of the log: value}, {column of the sheet: images in [-1, 1]}
    """
    values, results, naturalness = [], [], []
    for i, (hq, lq_up) in enumerate(run.held_out):
        result = run.model(lq_up)
        terms = losses(run, run.model, hq, lq_up, training.generator(training.HELD_OUT_LOSS, i), result)
        sr = result[0].float()
        values.append(float(sum(terms.values())))
        results.append(sr)
        naturalness.append(niqe(round8(sr / 2 + 0.5), run.niqe) if run.niqe else math.nan)
    sr, hq = torch.cat(results), run.held_out_hq
    metrics = {"held_out": sum(values) / len(values), "psnr": training.psnr(sr, hq),
               "niqe": float(torch.tensor(naturalness, device="cpu").nanmean())}
    return metrics, {"LQ": torch.cat([lq_up for _, lq_up in run.held_out]), f"result, step {run.step}": sr, "HQ": hq}


def save(run):
    """Write the model's files, then the checkpoint: if that says that the run is over, all is there.

    With --patience the files hold the best model so far: they are written when it got better, or never were.
    """
    is_best = False
    if run.metrics:     # none where it was stopped between two evaluations
        is_best = run.stopping.count(run.metrics)
        run.stopped_early = run.stopping.is_over()
    wanted = is_best or run.stage.patience == 0 or not run.written
    if wanted and run.rank == 0:
        write_model(run)
    training.save_state(run, best=run.stopping.best, waited=run.stopping.waited, written=run.written)


def write_model(run):
    """Write the model's files, and remove those of earlier steps."""
    names = run.model.save_release(run.out, run.stage.before + run.step)
    for name in set(run.written) - set(names):
        (run.out / name).unlink(missing_ok=True)
    run.written = names
    if run.args.tiny:
        note = f"{run.title}, step {run.step}"
        save_model(run.out / "model.safetensors", run.model.cfg, run.model.state_dict(), note=note)


def main(argv=None):
    args = parse_args(argv)
    with training.alone_in(args.out):
        run = prepare(args)
        checkpoint = training.resume(run, SETTINGS)
        if checkpoint:
            run.written = checkpoint["written"]
            run.stopping.best, run.stopping.waited = checkpoint["best"], checkpoint["waited"]
            run.stopped_early = run.stopping.is_over()
        for part in (run.model.unet, *run.model.vae.children()):
            part.checkpointing = run.stage.checkpointing
        if args.compile:
            training.compile_all(run.model.unet.blocks[:-1], run.device)
        run.losses = training.replicate(run, run.model, partial(losses, run, run.model))
        training.open_data(run)
        status = training.fit(run, training.step, evaluate, save)
        if run.stopped_early:
            stopping = run.stopping
            print(f"stopped early at step {run.step}: {stopping.judge} was no better {stopping.waited} times; "
                  f"the model is the best so far, {' '.join(run.written)}")
        return status


if __name__ == "__main__":
    with training.one_line_errors("train_gramsr"):
        sys.exit(main())
