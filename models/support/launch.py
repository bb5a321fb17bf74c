"""How a training script begins and ends: its flags, errors as one line, a folder that is its own."""

import argparse
import os
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from models.support.arguments import COUNT, SEED, UserError, as_script, between, no_memory, path_argument
from models.support.download import WeightError
from models.support.files import PictureError, check_writable
from models.support.machine import choose_dtype, is_distributed, join, usable_device
from models.support.photos import DataError
from models.support.saving import warn_of_unfinished


@contextmanager
def one_line_errors(name):
    """In here script `name` does its work: errors that a user can cause become one line on stderr and exit status 1.

    All others show where they happened, so whoever changes the code sees what is wrong with it.
    """
    with as_script(f"{name}: stopped, nothing saved since the last checkpoint"):
        try:
            yield
        except (UserError, DataError, PictureError, WeightError, OSError, SafetensorError) as e:
            sys.exit(f"{name}: {last_line(e)}")
        except RuntimeError as e:
            if no_memory(e):
                sys.exit(f"{name}: not enough memory; lower --micro-batch, or add --checkpointing")
            lost = "connection closed", "connection reset", "timed out", "nccl"
            if not (is_distributed() and any(words in str(e).lower() for words in lost)):
                raise
            sys.exit(f"{name}: another process of this run is gone ({str(e).splitlines()[0][:100]}); "
                     "the same command goes on from the last checkpoint")


def last_line(error):
    """Pick what an error says. Of one in a loader's worker the message is a traceback, whose last line says it."""
    kind = type(error)
    return str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")


DATA = """
photos to train on:
  S3Diff and GramSR: LSDIR and the first 10,000 images of FFHQ, by name. VOSR: 100 million images that are not public.
  --data takes a folder, which is searched recursively, or a .txt list. A line names a folder, a photo or another list,
  relative to the list's own folder; what stands there twice is shown twice as often:

      # photos.txt
      LSDIR/train
      FFHQ/00000-09999
      FFHQ/00000-09999
      holiday/IMG_0815.jpg
"""
COMPUTED = """
  Computed, not measured, for one image at a time with checkpointing, in bfloat16. memory: the peak of a step, counted
  on torch's fake tensors, without what CUDA itself needs. hours: images x FLOPs at half of a card's peak (82 TFLOPS on
  an RTX 4090, 495 on an H200), or x 8 microseconds for each of a step's operations, whichever is longer. For the flow
  of VOSR 0.5B an H200 took as long (0.42 s an image, measured): its CPU starts kernels no faster. By this count both
  cards take the same hours. A faster CPU, --compile and, on large cards, --no-checkpointing (0.21 s an image there)
  and a larger --micro-batch save some.
"""


def parser(description, needs):
    """Make a script's parser.  needs: what its presets need of a card, a table"""
    return argparse.ArgumentParser(description=description, epilog=needs + COMPUTED + DATA,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_arguments(p):
    """Add the flags that all three scripts have."""
    p.add_argument("--data", type=path_argument, required=True,
                   help="good photos: a folder, searched recursively, or a .txt list; the words digits and letters: "
                   "drawn ones")
    p.add_argument("--lq", type=path_argument, metavar="FOLDER",
                   help="your own LQ images, a quarter as large a side, with the names of the photos in folder --data, "
                   "or with x4 added: pairs to train on, instead of degraded photos")
    p.add_argument("--moved", action="store_true", help="go on although --data, --lq or --init lies elsewhere by now")
    p.add_argument("--out", type=path_argument, required=True, help="folder for everything this run writes")
    # optimisation
    p.add_argument("--steps", type=COUNT, help="steps in all (default: the preset's)")
    p.add_argument("--batch-size", type=COUNT, help="photos per step, of all processes together")
    p.add_argument("--micro-batch", type=COUNT, help="photos that a process computes at once; the gradients of "
                   "a step's parts are added up (default: the preset's, full-size ones 1, tiny its share)")
    p.add_argument("--branches-per", type=batch_image_or_number, metavar="N",
                   help="how many images share a recipe's kinds of damage: image, batch, or a number")
    p.add_argument("--lr", type=between(1e-9, 1), help="peak learning rate")
    p.add_argument("--seed", type=SEED, default=0)
    # machine
    p.add_argument("--device", type=usable_device, default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                   help="of autocast; trained weights stay float32")
    p.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                   help="compute blocks again in backward: less memory, more time (default: full-size presets do)")
    p.add_argument("--compile", action="store_true", help="torch.compile the large network's blocks")
    p.add_argument("--workers", type=between(0, 999, whole=True), help="processes that read photos (default on CUDA: "
                   "none where all photos fit on the card, else 4)")
    # what is written
    p.add_argument("--log-every", type=COUNT, default=50, metavar="N", help="steps between rows of log.csv (50)")
    p.add_argument("--save-every", type=COUNT, help="steps between checkpoints, held-out losses and images")
    p.add_argument("--keep", type=COUNT, default=2, metavar="K", help="newest checkpoints that stay (default 2)")


def batch_image_or_number(word):
    """Be a type of argument: of Recipe.branches_per."""
    return word if word in ("batch", "image") else COUNT(word)


def start(run):
    """Begin a run of which args and stage are known: overrides, device, precision, processes, --out.

    Raises UserError.
    """
    args = run.args
    overrides = {}
    for field in fields(run.stage):
        flag = getattr(args, field.name, None)      # None: there is no such flag, or it was not given
        if flag is not None:
            overrides[field.name] = flag
    run.stage = replace(run.stage, **overrides)
    run.device, run.dtype = args.device, choose_dtype(args.dtype, args.device)
    run.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    run.rank, run.world = join(run.device)
    share = run.stage.batch_size // run.world       # images of a step for each process
    run.micro_batch = run.stage.micro_batch or max(share, 1)
    run.micro_batches = share // run.micro_batch
    if run.micro_batches * run.micro_batch * run.world != run.stage.batch_size:
        raise UserError(f"--batch-size {run.stage.batch_size} is not {run.world} processes x a whole number of "
                        f"--micro-batch {run.micro_batch}")
    run.out = Path(args.out)
    if run.rank == 0:
        warn_of_unfinished(args.init)
    torch.manual_seed(args.seed)        # the initial weights; everything later has generators of its own


@contextmanager
def alone_in(folder):
    """In here no other training writes to this --out, which can be written to. Raises UserError, WriteError."""
    folder = Path(folder)
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        if os.environ.get("RANK", "0") == "0":      # of several processes the first one writes
            lock(file, folder)
        yield


def lock(file, folder):
    """Hold file, in folder, as long as it is open. Raises UserError where another training holds it."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.register_at_fork(after_in_child=file.close)      # a loader's worker outlives kill -9 by seconds
    except BlockingIOError:
        raise UserError(f"--out {folder}: another training is writing there; choose another folder") from None
    except (ImportError, OSError):      # Windows, a file system without locks
        pass
