"""Memory: what a training needs is said before anything is fetched, and a step that does not fit is made smaller.

A step on one image at a time has the same gradient as one on many at once (their gradients are added up), and
checkpointing computes again what it does not keep. Both cost time, and for given images change nothing beyond rounding.
What is drawn, noise and damage, is drawn for each part of a step: parts of another size see other draws.
"""

import gc
import os

import torch
from tqdm import tqdm

from models.support.arguments import UserError, no_memory
from models.support.photos import end_workers, open_loader

FIRST_STEPS = 3     # of a command, in which a step may be made smaller; what does not fit later has another cause
CARDS = {24: "RTX 3090, RTX 4090", 32: "RTX 5090", 48: "RTX A6000, L40S", 80: "A100, H100", 141: "H200"}     # GB: names
BESIDES = 2.0e9     # bytes, an allowance for what is not counted: intermediate results of one image, CUDA itself


# ---- before anything is fetched


def check_memory(run, build, learns, copies=0):
    """Raise UserError, which names the card that is needed, where a training cannot fit on the run's device.

    build: makes the network that is trained, here without numbers; learns: of a parameter's name, whether it does
    copies: frozen copies of all of it beside it, such as a teacher
    """
    if run.args.tiny:
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build()
    need = bytes_needed(run, network, learns, copies)
    have = device_memory(run.device)
    if have is None or need <= have:
        return
    parts = "weights, gradients, AdamW's moments"
    if run.stage.ema:
        parts += ", the average"
    if copies:
        parts += ", the teacher"
    raise UserError(f"{run.title} cannot fit here: {parts} take {need / 1e9:.0f} GB, and {run.device} has "
                    f"{have / 1e9:.0f} GB; {card_for(need + BESIDES)}")


def bytes_needed(run, network, learns, copies=0):
    """Count what a network's parameters need throughout a training.  Arguments as of `check_memory` -> bytes"""
    float32 = 4
    frozen = torch.empty((), dtype=run.dtype).element_size()
    total = 0
    for name, p in network.named_parameters():
        if not learns(name):
            total += p.numel() * frozen
            continue
        kept = 4 + bool(run.stage.ema)      # weight, gradient, two moments; average
        total += p.numel() * float32 * (kept + copies)
    return total


def device_memory(device):
    """Look up how many bytes a device has, None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):       # Windows
        return None


def card_for(need):
    """Name a card with so many bytes, in a sentence's end."""
    for size, names in CARDS.items():
        if need <= 0.98 * size * 2**30:
            return f"it needs a card of {size} GB ({names}) or more"
    return "there is no single card for it"


# ---- in the first steps


def step_that_fits(run, step):
    """Do a step; where memory is short in one of the first, do it again with half as many images at once.

    The images are the same, and so is all that is drawn from then on, as if the command had begun with that
    --micro-batch. It is done once. Raises UserError, which names the flag to add, where it cannot be done or is no use.
    """
    run.began = run.step if run.began is None else run.began
    if run.step >= run.began + FIRST_STEPS:
        step(run)
        return
    before = Before(run)
    try:
        step(run)
        return
    except RuntimeError as e:
        if not no_memory(e):
            raise
    # here, and not above, where the error would keep the step's tensors alive
    smaller = fewer_images(run)
    if before.is_lost(run) or run.halved or run.world > 1 or smaller is None:
        raise UserError(f"not enough memory in step {run.step + 1}; {remedy(run)}")
    before.bring_back(run)
    free_memory(run.device)
    too_many = run.micro_batch
    use_micro_batch(run, smaller)
    tqdm.write(f"not enough memory for {too_many} images at once: from here on {smaller}, as by --micro-batch "
               f"{smaller}; a step of the same images has {run.micro_batches} parts")
    run.halved = True
    step_that_fits(run, step)


class Before:
    """What a step changes before its first update, noted, so that the step can be done again."""

    def __init__(self, run):
        self.updates = run.updates
        self.sums = {name: total + 0 for name, total in run.sums.items()}      # + 0: a copy, tensors are added to
        self.buffers = [(b, b.clone()) for part in modules(run) for b in part.buffers()]

    def is_lost(self, run):
        """Tell whether an update was begun since: it cannot be taken back."""
        return run.updates != self.updates

    def bring_back(self, run):
        """Make everything as it was."""
        run.sums = self.sums
        for buffer, value in self.buffers:
            buffer.copy_(value)
        for part in modules(run):
            part.zero_grad(set_to_none=True)


def modules(run):
    """List the networks that a run trains."""
    return [part for part in run.state.values() if isinstance(part, torch.nn.Module)]


def fewer_images(run):
    """Choose how many images to compute at once instead: half, or what is below and divides.  -> number, or None"""
    share = run.micro_batches * run.micro_batch
    for smaller in range(run.micro_batch // 2, 0, -1):
        if share % smaller == 0:
            return smaller
    return None


def use_micro_batch(run, micro_batch):
    """Compute so many images at once from this step on, the same images in all."""
    run.micro_batches = run.micro_batches * run.micro_batch // micro_batch
    run.micro_batch = micro_batch
    end_workers(run.batches)
    open_loader(run, run.loader.dataset)
    run.batches = iter(run.loader)


def remedy(run):
    """Name the flag that makes a step smaller."""
    smaller = fewer_images(run)
    if smaller:
        return f"add --micro-batch {smaller}"
    if not run.stage.checkpointing:
        return "add --checkpointing"
    return "one image at a time, with --checkpointing, is the least; it needs a card with more memory"


def free_memory(device):
    """Give back what a failed step held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
