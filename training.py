"""What the training scripts share: a stage, a run of it, the step, the loop around the step.

A script has its networks (`prepare`), its data (`draw`) and its losses, and hands them over in a `Run`. To be read from
here on: `Stage` and `Run`, what learns, learning rate and average; `step` (forward, backward, update); `fit`, the loop.

What a training needs besides is imported, and scripts find it here under the same names: flags and errors
(models/support/launch.py), devices and processes (machine.py), checkpoint files (saving.py), photos (photos.py), steps
that do not fit in memory (memory.py), the bar and the log (progress.py).
"""

import argparse
import copy
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import torch

from degrade import RECIPES, degrade, resize
from models.support.arguments import Stop, UserError
from models.support.launch import add_arguments, alone_in, one_line_errors, parser, start      # noqa: F401
from models.support.machine import (autocast, choose_device, choose_dtype, compile_all, gradients_stay_here, leave,
                                    mean_over_processes, on_device, replicate, usable_device)      # noqa: F401
from models.support.memory import check_memory, step_that_fits     # noqa: F401
from models.support.photos import open_loader, photos_for, reading
from models.support.precision import in_half
from models.support.progress import Progress
from models.support.saving import checkpoints, resume, save_state, write      # noqa: F401

MAX_SKIPPED = 25    # steps in a row without a finite gradient, after which a run ends; float16 starts with up to 16,
                    # until its scaler has found a scale at which nothing overflows
FEW_PHOTOS = 60     # below, held-out crops come from one or two photos

# first numbers of `generator` for what is drawn on held-out images, the same at every evaluation of every run
HELD_OUT_IMAGES, HELD_OUT_LOSS, HELD_OUT_NOISE = 0, 1, 2

# of stages at full size, so that a step fits in 24 GB: the gradient of a batch is the mean of its images' gradients, so
# one image after the other gives the same, and what is not kept is computed again. It takes longer. What is drawn is
# drawn for each part of a step anew, so other parts see other noise
ONE_CARD = {"micro_batch": 1, "checkpointing": True}

# of tiny stages on photos: two papers' recipes by turns, every image with damage of its own, and one step in five on
# nearly clean images, or these would be changed in use, too
TINY_DAMAGE = {"recipes": ("s3diff", "vosr", "s3diff", "vosr", "clean"), "branches_per": "image"}


# ---- a stage of a training, and a run of it


@dataclass
class Stage:
    """Hyper-parameters of a stage. A flag that is named like a field overrides it, such as --steps or --lr."""

    steps: int                          # of the optimizer
    batch_size: int                     # images per step, of all processes together
    lr: float                           # learning rate at its peak
    schedule: str = "constant"          # of the learning rate, or "cosine"
    warmup: int = 0                     # steps in which the learning rate rises
    betas: tuple = (0.9, 0.999)         # of AdamW
    weight_decay: float = 0.01          # of all parameters that learn
    ema: float = 0.0                    # decay of the averaged weights, which are saved; 0 = no average
    ema_warmup: bool = False            # a smaller decay at first, or the average would long remember its beginning
    crop: int = 512                     # side of a training image in pixels, cut out of a photo
    shrink: bool = False                # shrink the photo first, so that its shorter side has as many pixels
    flip: bool = True                   # mirror an image, or not, at random
    recipes: tuple = ()                 # how images are degraded: of degrade.py, one a step, by turns
    branches_per: str | int = "batch"   # draw a recipe's kinds of damage for each "batch", "image", or so many images
    save_every: int = 500               # steps between checkpoints, each with an evaluation
    micro_batch: int = 0                # images that a process computes at once; 0 = its share of the batch
    checkpointing: bool = False         # keep less for backward, and compute it again there
    before: int = 0                     # steps of the stages before this one: images and seeds go on from there, or it
                                        # would see the first stage's images in the same order again


@dataclass
class Run:
    """What the parts of a training share. Each script adds its own fields: what it learns from, beside the model."""

    args: argparse.Namespace            # the flags
    stage: Stage                        # hyper-parameters, which flags have overridden

    # by `start`: where it is computed
    out: Path = None                    # --out, where all files go
    device: torch.device = None
    dtype: torch.dtype = None           # of autocast; the weights that are trained stay float32
    scaler: torch.amp.GradScaler = None     # of the loss in float16; does nothing in other types
    rank: int = 0                       # number of this process
    world: int = 1                      # number of processes
    micro_batch: int = 0                # images that a process computes at once
    micro_batches: int = 0              # parts of a step that a process computes one after the other

    # by `prepare` of the script and `set_model`: what is trained, and how
    title: str = ""                     # for the user: system, preset, stage
    origin: str = ""                    # for the user: what the training starts from
    terms: tuple = ()                   # names of the losses, columns of the log
    columns: tuple = ()                 # more columns of the log, from evaluate
    draw: Callable = None               # (run, hq, recipe, generator) -> a tuple of tensors, a row for each image; of
                                        # own pairs `recipe` is their LQ images
    losses: Callable = None             # (*what `draw` returned, generator) -> {name: scalar}, summed up; a `replicate`
    model: torch.nn.Module = None       # the system, of which a part is trained
    ema: torch.nn.Module = None         # the system with averaged weights, which is evaluated and saved; or the model
    learns: Callable = None             # name of a tensor of the model -> does it learn? Checkpoints hold what does
    trained: list = None                # the parameters that learn
    optimizer: torch.optim.Optimizer = None
    state: dict = None                  # {name: module, optimizer or scaler}: what checkpoints hold, by these names

    # by `resume` and `open_data`: what it learns from
    settings: dict = None               # flags that may not change when the run is resumed
    photos: list = None                 # names of the files when the run began
    loader: Any = None                  # DataLoader or photos.OnDevice, of HQ (micro_batch, 3, crop, crop) in [0, 1];
                                        # with --lq a DataLoader of [HQ, LQ]
    batches: Any = None                 # its iterator, in `fit`
    recipes: list = None                # degrade.Recipe, one a step, by turns
    held_out_hq: torch.Tensor = None    # (16, 3, crop, crop) in [-1, 1], crops of photos that are held out
    held_out: list = None               # for each of them what `draw` made of it, each tensor with one row

    # changes from step to step
    step: int = 0                       # steps done
    lr: float = 0.0                     # learning rate of this step
    grad_norm: Any = 0.0                # before clipping; it and these sums and counts are tensors, read with the log
    sums: dict = None                   # {loss: its sum over the steps since the last row of the log}
    updates: int = 0                    # of all optimizers, begun
    began: int = None                   # step at which this command began
    halved: bool = False                # fewer images at once than it began with, since memory was short
    metrics: dict = None                # of the newest evaluation; None where a run is saved without one
    skipped: Any = 0                    # updates without a finite gradient
    skipped_in_a_row: Any = 0           # steps with such an update
    skipped_said: int = 0               # updates without a finite gradient, of which the user knows
    stopped_early: bool = False         # it is over before its last step, by its own measure


# ---- the model: what learns, and its average


def count(parameters):
    """Count the numbers in parameters."""
    return sum(p.numel() for p in parameters)


def freeze_all_but(model, learns, order=()):
    """Let parameters of model learn, and nothing else; what a network itself keeps fixed stays so.

    learns: function of a parameter's name; order: beginnings of names, in which order they come, others last: an
    optimizer counts its parameters, and those of older checkpoints are counted so -> list of the parameters
    """
    trained = {}
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and learns(name))
        if p.requires_grad:
            trained[name] = p

    def position(name):
        return next((i for i, beginning in enumerate(order) if name.startswith(beginning)), len(order))

    return [trained[name] for name in sorted(trained, key=position)]


def adamw(params, stage):
    """Make the optimizer; weight decay shrinks all parameters alike, biases and norms, too."""
    return torch.optim.AdamW(params, stage.lr, stage.betas, weight_decay=stage.weight_decay, fused=True)


def store_in_half(run, *networks):
    """Store frozen weights of full-size networks in autocast's type; what learns, and adapters, stay float32.

    Autocast rounds them to that type for every product anyway: results stay the same, and memory is half. Tiny networks
    gain nothing. Networks that are used outside of autocast, such as S3Diff's estimator, stay as they are.
    """
    if not run.args.tiny:
        for network in networks:
            in_half(network, run.dtype, adapters=False)


def set_model(run, model, learns, order=(), optimizer_name="optimizer"):
    """Make model the one that the run trains, with its average, its optimizer, and what checkpoints hold.

    learns, order: of `freeze_all_but`; learns: of buffers, too, which checkpoints then hold
    optimizer_name: of the optimizer in checkpoints
    """
    run.learns = learns
    run.trained = freeze_all_but(model, learns, order)
    run.model = run.ema = model.to(run.device)
    run.optimizer = adamw(run.trained, run.stage)
    run.state = {"model": run.model, optimizer_name: run.optimizer, "scaler": run.scaler}
    if run.stage.ema:
        run.state["ema"] = run.ema = copy_what_learns(model).eval()


def copy_what_learns(model):
    """Copy a model, whose frozen parameters, nearly all of a large network, model and copy share.  -> the copy"""
    # deepcopy notes what it has copied, {id of the original: copy}, and copies nothing twice. In a memo that says of
    # each frozen parameter that it is its own copy, they are copied already
    memo = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, memo)


@torch.no_grad()
def ema_update(ema, model, decay):
    """Move averaged weights towards the model's: ema <- decay * ema + (1 - decay) * model; buffers are copied."""
    if ema is model:        # there is no average
        return
    averaged, learned = [], []
    for e, p in zip(ema.parameters(), model.parameters()):
        if p.requires_grad:
            averaged.append(e)
            learned.append(p)
    torch._foreach_lerp_(averaged, learned, 1 - decay)      # e.lerp_(p, 1 - decay) for all of them in a few kernels
    for e, b in zip(ema.buffers(), model.buffers()):
        e.copy_(b)


def ema_decay(run):
    """Choose the decay of the step: the stage's, or a smaller one in the first steps."""
    if run.stage.ema_warmup:
        return min(run.stage.ema, (1 + run.step) / (10 + run.step))
    return run.stage.ema


# ---- seeds, learning rate


def generator(*numbers):
    """Make a CPU generator for a place in the training, e.g. (seed, step, micro-batch).

    Draws are a function of the place alone: a run that was resumed draws the same, and so does one with more processes
    and micro-batches of the same size. Noise on a GPU comes from a generator there, of the same seed: other numbers.
    The numbers are mixed like digits of a huge base, so that neighbouring places share no seed.
    """
    seed = 0
    for n in numbers:
        seed = (seed * 1_000_003 + n + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def set_lr(optimizer, lr):
    """Set the learning rate of an optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(step, steps, lr, schedule="constant", warmup=0):
    """Compute the learning rate of a step: warm-up, then constant or a cosine to 2 % of lr."""
    warmup = min(warmup, steps // 8)        # a short try with --steps would be all warm-up
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    progress = min((step - warmup) / max(steps - warmup, 1), 1)
    return lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


# ---- data


def open_data(run):
    """Set what the run learns from, and run.held_out, what it is measured on. Raises DataError.

    Held-out crops are degraded by the stage's first recipe, each by a plan of its own, and kept one by one: so an
    evaluation needs no more memory than one image, and measures the same whatever the batch size.
    """
    hq, recipe = open_photos(run)
    if recipe is None and run.recipes:
        recipe = replace(run.recipes[0], branches_per="image")
    drawn = run.draw(run, hq, recipe, generator(HELD_OUT_IMAGES))
    run.held_out_hq = 2 * hq - 1
    run.held_out = list(zip(*(x.split(1) for x in drawn)))


def open_photos(run):
    """Set run.loader and run.recipes.  -> `hq_and_lq` of the 16 held-out crops. Raises DataError."""
    args, stage = run.args, run.stage
    photos, crops, run.photos = photos_for(args.data, stage.crop, args.seed, run.photos, lq=args.lq, flip=stage.flip,
                                           shrink=stage.shrink)
    hq, lq = hq_and_lq(run, crops)
    if photos.files:        # not of --data digits or letters
        found = len(set(run.photos))
        held_out = found - len(set(photos.files))
        print(f"{found} photos found in {args.data}, {held_out} of them held out")
        if found < FEW_PHOTOS:
            print(f"these are few: the {len(hq)} crops that are evaluated come from the {held_out} held out; "
                  "figures of more photos say more")
    open_loader(run, photos)
    run.recipes = [replace(RECIPES[name], branches_per=stage.branches_per) for name in stage.recipes]
    return hq, lq


def hq_and_lq(run, images):
    """Bring photos to the run's device.  -> hq (B, 3, crop, crop) in [0, 1], lq (B, 3, crop/4, crop/4) or None

    images: hq, or with --lq a list of hq and lq, own pairs
    """
    if not run.args.lq:
        return images.to(run.device, non_blocking=True), None
    hq, lq = (x.to(run.device, non_blocking=True) for x in images)
    return hq, lq


def recipe_of_step(run):
    """Say how this step's images are degraded: by each recipe in its turn, None without any."""
    if not run.recipes:
        return None
    return run.recipes[run.step % len(run.recipes)]


def low_quality(hq, recipe, g):
    """Degrade photos; of own pairs, take their LQ images and enlarge them.

    hq: (B, 3, H, W) in [0, 1]; recipe: of degrade.py, or those LQ images, (B, 3, H/4, W/4) in [0, 1]; g: generator
    -> lq (B, 3, H/4, W/4), lq_up (B, 3, H, W), both in [0, 1]
    """
    if torch.is_tensor(recipe):
        return recipe, resize(recipe, "bicubic", hq.shape[2:]).clamp(0, 1)
    return degrade(hq, recipe, g)


# ---- a step: forward, backward, update


def step(run):
    """Do one step of the optimizer; gradients of the micro-batches are added up."""
    set_lr(run.optimizer, run.lr)
    for i, (hq, recipe, g) in enumerate(micro_batches(run)):
        drawn = run.draw(run, hq, recipe, g)
        with micro_batch_context(run, run.losses, i):
            terms = run.losses(*drawn, on_device(g, run.device))
        backward(run, terms)
    run.grad_norm = update(run, run.optimizer)
    ema_update(run.ema, run.model, ema_decay(run))


def micro_batches(run):
    """Yield what this process computes of a step, part after part: hq, recipe, generator.

    hq: (micro_batch, 3, crop, crop) in [0, 1]; recipe: the step's, or the LQ images of own pairs, see `low_quality`
    generator: of all that is random there, the same whoever computes it
    """
    for i in range(run.micro_batches):
        hq, lq = hq_and_lq(run, next(run.batches))
        g = generator(run.args.seed, run.stage.before + run.step, run.rank * run.micro_batches + i)
        recipe = recipe_of_step(run) if lq is None else lq
        yield hq, recipe, g


@contextmanager
def micro_batch_context(run, function, i):
    """In here the forward pass of micro-batch i is computed: in autocast's precision, by function, of `replicate`.

    With several processes backward averages gradients over them. Once a step is enough: with the last micro-batch, when
    all have been added up.
    """
    if i == run.micro_batches - 1:
        with autocast(run.device, run.dtype):
            yield
    else:
        with gradients_stay_here(function), autocast(run.device, run.dtype):
            yield


def backward(run, terms):
    """Add a micro-batch's gradients to those before, and its losses to run.sums.  terms: {name: scalar}, summed up"""
    run.scaler.scale(sum(terms.values()) / run.micro_batches).backward()
    for name, loss in terms.items():
        run.sums[name] += loss.detach() / run.micro_batches


def update(run, optimizer):
    """Clip the gradients to norm 1, update the parameters, forget the gradients -> their norm before clipping, a tensor

    Where it is not finite the update is left out and counted in run.skipped, by the device: the host does not ask.
    optimizer: of `adamw`
    """
    run.updates += 1
    run.scaler.unscale_(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    infinite = ~norm.isfinite()
    if run.scaler.is_enabled():
        run.scaler.step(optimizer)      # has found that by itself
    else:
        optimizer.found_inf = infinite.float()      # what a scaler tells a fused optimizer: 1 = leave it out
        optimizer.step()
        del optimizer.found_inf
    run.scaler.update()
    run.skipped = run.skipped + infinite.long()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_skipped(run):
    """Say what was left out since the last call; MAX_SKIPPED steps in a row end the run. Raises UserError."""
    skipped = int(run.skipped)
    if skipped > run.skipped_said:
        print(f"an update was left out, its gradient is not finite ({skipped} so far)", file=sys.stderr)
        run.skipped_said = skipped
    if run.skipped_in_a_row >= MAX_SKIPPED:
        raise UserError(f"{MAX_SKIPPED} steps in a row had no finite gradient; "
                        "go on from the last checkpoint with a lower --lr, or --dtype float32")


# ---- the loop


def fit(run, step, evaluate, save):
    """Train until the last step, or until Ctrl-C, SIGTERM or early stopping.

    step(run): one step of the optimizers; evaluate(run) -> {column of the log: value}, {title: images (B, 3, H, W)};
    save(run): the model and a checkpoint -> exit status: 0, or 130 if it was stopped before its last step
    """
    stage, progress = run.stage, Progress(run)
    if run.step == 0:
        metrics, _ = evaluated(run, evaluate)
        progress.write({"step": 0} | metrics)
    run.model.train()
    progress.begin()
    said = "stopping after this step, then saving; again: at once, unsaved"
    with Stop(said) as stop, reading(run):
        while run.step < stage.steps and not is_stopped(run, stop):
            run.lr = learning_rate(run.step, stage.steps, stage.lr, stage.schedule, stage.warmup)
            skipped_before = run.skipped
            step_that_fits(run, step)
            run.skipped_in_a_row = (run.skipped_in_a_row + 1) * (run.skipped > skipped_before)
            run.step += 1
            progress.bar.update()
            saves = run.step % stage.save_every == 0 or run.step == stage.steps
            logs = run.step % run.args.log_every == 0
            if saves or logs or run.device.type == "cpu":       # a GPU would wait to be read
                check_skipped(run)
            if saves:
                row = progress.finish_row()
                run.metrics, images = evaluated(run, evaluate)
                with stop.shield():
                    save(run)
                progress.write(row | run.metrics)       # what the log says is saved
                progress.draw(run.metrics, images)
            elif logs:
                progress.write(progress.finish_row())
        progress.bar.close()
        stopped = run.step < stage.steps and not run.stopped_early
        if stopped:
            run.metrics = None
            with stop.shield():
                save(run)
            print(f"\nstopped at step {run.step} and saved; the same command goes on from here")
    leave()
    return 130 if stopped else 0


def is_stopped(run, stop):
    """Tell whether any process was asked to stop, or the run has stopped early."""
    return mean_over_processes(bool(stop) or run.stopped_early, run.device) > 0


def evaluated(run, evaluate):
    """Evaluate in autocast's precision. Every process measures all the crops, so that all decide the same.

    -> what evaluate(run) returns
    """
    with autocast(run.device, run.dtype):
        return evaluate(run)


# ---- what evaluations share


def held_out_loss(run, losses):
    """Average the stage's loss over the held-out crops, by the averaged weights, with the same draws every time.

    losses: (run, model, *what `draw` returned, generator) -> {name: scalar}
    """
    values = []
    for i, crop in enumerate(run.held_out):
        terms = losses(run, run.ema, *crop, generator(HELD_OUT_LOSS, i))
        values.append(float(sum(terms.values())))
    return sum(values) / len(values)


def fixed_noise(z, i):
    """Draw standard normal noise for held-out crop i, the same every time, like z."""
    return torch.randn(z.shape, generator=generator(HELD_OUT_NOISE, i), device="cpu").to(z)


def psnr(x, hq):
    """Compute the mean PSNR over RGB in dB.  x, hq: (B, 3, H, W) in [-1, 1] -> float"""
    mse = ((x - hq) / 2).square().mean((1, 2, 3))
    return float((-10 * mse.log10()).mean())
