"""OSEDiff, a fourth system in one file: the example that README's "Add your own" walks through.

    python tests/osediff.py --data PHOTOS --out runs/osediff        # trains
    python sample.py photo.jpg --model runs/osediff                 # with SYSTEMS["osediff"] = OSEDiff in sample.py

Paper:   OSEDiff, 2406.08177; names of equations are ours. `# official:` marks where github.com/cswry/OSEDiff differs.
Left out: the public weights, and the network that describes each photo in words: here all have one learned prompt.

    LQ image, enlarged -> VAE's encoder -> one step of the UNet -> clean latent -> VAE's decoder -> HQ image

Adapters (LoRA) in the encoder and in the UNet are the generator. It learns from

    data    the photo, by L2 and LPIPS
    VSD     variational score distillation. Noise is put on the generator's latent, and two denoise it: the frozen UNet,
            which knows photos, and the regulariser, a second set of adapters, which learns what the generator makes.
            Where they disagree, the latent is moved to what the frozen one says

So one UNet has three roles, and adapters, an argument of its forward (models/lora.py), say which.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training  # noqa: E402
from models.lora import NO_ADAPTERS, add_lora  # noqa: E402
from models.s3diff import ADAPTER, UNET_TARGETS  # noqa: E402
from models.support.arguments import path_argument  # noqa: E402
from models.support.weights import save_model  # noqa: E402
from models.tiny import TinyS3Diff, TinyS3DiffConfig, TinyVAE, load_prior  # noqa: E402
from models.tiny_losses import RandomLPIPS  # noqa: E402
from models.unet import UNet, alphas_cumprod  # noqa: E402

FROZEN, GENERATOR, REGULARISER = NO_ADAPTERS, {ADAPTER["unet"]: 1}, {"regulariser": 1}      # roles of the UNet: its adapters


# ---- the model, of which sample.py needs from_pretrained, here inherited, and upscale


@dataclass
class OSEDiffConfig(TinyS3DiffConfig):
    """As TinyS3DiffConfig. The class's name names the system in model files: osediff."""

    # official: conv_in itself learns; with an adapter instead the frozen UNet stays as it was
    unet_targets: tuple = (*UNET_TARGETS, "conv_in")
    r_unet: int = 16                    # official: 4, as in the encoder
    modulation: str = "none"            # plain LoRA
    guidance: float = 1.0               # one pass, with the good prompt


class OSEDiff(TinyS3Diff):
    """The tiny S3Diff without scores of degradation, hence without estimator and modulation."""

    Config = OSEDiffConfig
    SWEEP = []          # no knobs for sample.py --sweep

    def networks(self, cfg):
        return UNet(cfg.unet), None, TinyVAE(cfg.vae)

    def scores(self, lq, blur=None, noise=None):
        return None

    def add_regulariser(self):
        """For training alone; it changes nothing yet."""
        add_lora(self.unet, self.cfg.unet_targets, "regulariser", self.cfg.r_unet)

    def predict_noise(self, adapters, z_t, t, bad=False):
        """The UNet in one of its roles.

        z_t: (B, c, h, w); t: integer or (B,); bad: by the prompt of degraded images, not by that of photos -> like z_t
        """
        context = self.prompts[int(bad)].expand(len(z_t), -1, -1)
        return self.unet(z_t, t, context, adapters)

    def forward(self, x):
        """What training sees.  x: (B, 3, H, W) enlarged LQ in [-1, 1] -> image like x, its latent (B, c, h, w)"""
        t = self.cfg.t
        z_t = self.start(self.encode(x, None), t)
        z = self.clean(z_t, self.predict_noise(GENERATOR, z_t, t), t)       # Eq. OSEDiff one step
        return self.decode(z), z

    def upscale(self, lq, scale=4, seed=0, tile=0, overlap=0, color="wavelet"):
        """As `S3Diff.upscale`. Its arguments are the flags that sample.py lets this system have."""
        return super().upscale(lq, scale, seed, tile=tile, overlap=overlap, color=color)


# ---- the stage, of which other systems have several


@dataclass
class Stage(training.Stage):
    """Hyper-parameters; defaults are official."""

    lambda_l2: float = 1.0
    lambda_lpips: float = 2.0
    lambda_vsd: float = 1.0
    guidance: float = 7.5               # of the frozen UNet in VSD


@dataclass
class Run(training.Run):
    """What a run of OSEDiff has beside the model."""

    generate: Callable = None           # the model's forward, lq_up -> sr, z
    regularise: Callable = None         # the regulariser, (z_t, t) -> eps
    lpips: torch.nn.Module = None
    optimizer_R: torch.optim.Optimizer = None       # the regulariser's


# ours: by gradients VSD is a tenth of L2, LPIPS half of it
TINY = Stage(steps=400, batch_size=8, lr=1e-3, schedule="cosine", warmup=50, crop=128,
             recipes=("s3diff", "s3diff", "vosr"), branches_per="image", save_every=100, lambda_lpips=0.015, lambda_vsd=0.02, guidance=1.5)
SETTINGS = ("data", "init", "seed")     # flags that stay when a run is resumed


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--init", type=path_argument,
                   help="--out of train_s3diff.py --stage prior (default: the embedded prior)")
    training.add_arguments(p)
    return p.parse_args(argv)


# ---- build: the networks, and which of them learn


def build(args):
    """-> OSEDiff around the tiny prior, LPIPS for its loss, a line on their origin"""
    model = OSEDiff(OSEDiffConfig())
    path = load_prior(model, args.init)
    model.add_regulariser()
    return model, RandomLPIPS().requires_grad_(False), f"from {path}, new adapters"


def learns(name):
    """Tell whether a parameter is an adapter's; the rest is the prior's."""
    return "lora_" in name


def is_regulariser(name):
    return ".regulariser." in name


def prepare(args):
    """Networks, what is to be learned, optimizers.  -> Run"""
    run = Run(args, TINY)
    training.start(run)
    run.title, run.terms, run.draw = "OSEDiff tiny", TERMS, draw
    model, lpips, run.origin = build(args)
    run.lpips = lpips.to(run.device)
    training.set_model(run, model, learns)
    # an optimizer each
    learned = {name: p for name, p in model.named_parameters() if learns(name)}
    generator = [p for name, p in learned.items() if not is_regulariser(name)]
    regulariser = [p for name, p in learned.items() if is_regulariser(name)]
    run.optimizer = training.adamw(generator, run.stage)
    run.optimizer_R = training.adamw(regulariser, run.stage)
    run.state |= {"optimizer": run.optimizer, "optimizer_R": run.optimizer_R}
    # several processes average the gradients of what each of the two trains
    run.generate = training.replicate(run, torch.nn.ParameterList(generator), model.forward)
    run.regularise = training.replicate(run, torch.nn.ParameterList(regulariser),
                                        partial(model.predict_noise, REGULARISER))
    return run


# ---- data: what a step draws from photos


def draw(run, hq, recipe, g):
    """Degrade photos.  hq: (B, 3, H, W) in [0, 1]; g: generator -> hq, lq_up (B, 3, H, W) in [-1, 1]"""
    _, lq_up = training.low_quality(hq, recipe, g)
    return 2 * hq - 1, 2 * lq_up - 1


# ---- the losses
# g: generator of all draws -> {name: scalar}, summed up


def data_losses(sr, hq, lpips, stage):
    """How far results are from photos.  sr, hq: (B, 3, H, W) in [-1, 1]"""
    sr = sr.float()
    terms = {"l2": stage.lambda_l2 * F.mse_loss(sr, hq), "lpips": stage.lambda_lpips * lpips(sr, hq).mean()}
    return terms        # Eq. OSEDiff data


def add_noise(z, times, g):
    """Noise of a random time for each latent.

    z: (B, c, h, w); times: first and last + 1 -> z_t, eps like z; t (B,); a (B, 1, 1, 1), the schedule's product at t
    """
    t = torch.randint(*times, (len(z),), generator=g)
    eps = torch.randn(z.shape, generator=g).to(z.device)
    a = alphas_cumprod()[t].view(-1, 1, 1, 1).to(z.device)
    return a.sqrt() * z + (1 - a).sqrt() * eps, eps, t.to(z.device), a


def vsd_losses(model, z, stage, g):
    """Move latents to where the frozen UNet and the regulariser agree; the value of the loss means little.

    z: (B, c, h, w), of the generator
    """
    z = z.float()
    with torch.no_grad():
        z_t, _, t, a = add_noise(z, (20, 980), g)
        eps_good = model.predict_noise(FROZEN, z_t, t).float()
        eps_bad = model.predict_noise(FROZEN, z_t, t, bad=True).float()
        eps_frozen = eps_bad + stage.guidance * (eps_good - eps_bad)
        eps_regulariser = model.predict_noise(REGULARISER, z_t, t).float()
        z_frozen = (z_t - (1 - a).sqrt() * eps_frozen) / a.sqrt()
        # the paper leaves w open; officially clean latents are compared, over the mean distance to the frozen one's
        w = ((1 - a) / a).sqrt() / (z - z_frozen).abs().mean((1, 2, 3), keepdim=True)
        target = z - w * (eps_frozen - eps_regulariser)
    return {"vsd": stage.lambda_vsd * F.mse_loss(z, target)}        # Eq. OSEDiff VSD


def regulariser_losses(regularise, z, g):
    """Stable Diffusion's own training, on what the generator makes.  z: (B, c, h, w), without gradient"""
    z_t, eps, t, _ = add_noise(z.float(), (0, 1000), g)
    return {"regulariser": F.mse_loss(regularise(z_t, t).float(), eps)}     # Eq. OSEDiff diffusion


TERMS = ("l2", "lpips", "vsd", "regulariser")


# ---- step, evaluate, save


def step(run):
    """A step of the generator, then one of the regulariser; gradients of the micro-batches are added up in each."""
    training.set_lr(run.optimizer, run.lr)
    training.set_lr(run.optimizer_R, run.lr)
    made = []

    # ---- 1. generator
    for i, (hq, recipe, g) in enumerate(training.micro_batches(run)):
        hq, lq_up = run.draw(run, hq, recipe, g)
        with training.micro_batch_context(run, run.generate, i):
            sr, z = run.generate(lq_up)
            terms = data_losses(sr, hq, run.lpips, run.stage) | vsd_losses(run.model, z, run.stage, g)
        training.backward(run, terms)
        made.append((z.detach(), g))
    run.grad_norm = training.update(run, run.optimizer)

    # ---- 2. regulariser
    for i, (z, g) in enumerate(made):
        with training.micro_batch_context(run, run.regularise, i):
            terms = regulariser_losses(run.regularise, z, g)
        training.backward(run, terms)
    training.update(run, run.optimizer_R)


@torch.no_grad()
def evaluate(run):
    """Loss on held-out photos, without VSD, and PSNR over RGB.

    -> {column of the log: value}, {column of the sheet: images in [-1, 1]}
    """
    hq, lq_up = run.held_out_hq, torch.cat([lq_up for _, lq_up in run.held_out])
    sr = torch.cat([run.model(one)[0].float() for one in lq_up.split(1)])
    loss = float(sum(data_losses(sr, hq, run.lpips, run.stage).values()))
    return {"held_out": loss, "psnr": training.psnr(sr, hq)}, {"LQ": lq_up, f"result, step {run.step}": sr, "HQ": hq}


def save(run):
    """The model's file, without the regulariser, then the checkpoint, with it."""
    if run.rank == 0:
        tensors = {name: x for name, x in run.model.state_dict().items() if not is_regulariser(name)}
        save_model(run.out / "model.safetensors", run.model.cfg, tensors, note=f"{run.title}, step {run.step}")
    training.save_state(run)


def main(argv=None):
    args = parse_args(argv)
    with training.alone_in(args.out):
        run = prepare(args)
        training.resume(run, SETTINGS)
        run.model.unet.checkpointing = run.stage.checkpointing
        if args.compile:
            training.compile_all(run.model.unet.blocks[:-1], run.device)
        training.open_data(run)
        return training.fit(run, step, evaluate, save)


if __name__ == "__main__":
    with training.one_line_errors("osediff"):
        sys.exit(main())
