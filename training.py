"""What the training scripts share: the step, the loop around it, and what both need.

A script has its networks (`prepare`), its data (`draw`) and its losses, and hands them over in a `Run`. Here are `step`
(forward, backward, update) and `fit` (the loop: steps, log, evaluation, checkpoints); before them flags, devices,
processes, seeds; behind them what makes a run resume exactly. Plain functions; what a run knows stands in `Run`.
"""

import argparse
import copy
import math
import os
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from degrade import RECIPES
from models.support.arguments import COUNT, SEED, Stop, as_script, between, no_memory, path_argument
from models.support.charts import Log, save_sheet
from models.support.download import WeightError, sha256_of
from models.support.files import PictureError, check_writable, whole_file
from models.support.photos import DataError, batches, photos_for, reading
from models.support.precision import in_half

MAX_SKIPPED = 25    # steps in a row without a finite gradient, after which a run ends; float16 starts with up to 16,
                    # until its scaler has found a scale at which nothing overflows
FEW_PHOTOS = 60     # below, held-out crops come from one or two photos

UNFIT = ("{}: its checkpoint does not fit this network ({}), whose code has changed since; "
         "begin another --out, or take the change back")

# first numbers of `generator` for what is drawn on held-out images, the same at every evaluation of every run
HELD_OUT_IMAGES, HELD_OUT_LOSS, HELD_OUT_NOISE = 0, 1, 2


class UserError(Exception):
    """Something that the user can mend, said in one line."""


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
    branches_per: str = "batch"         # draw a recipe's kinds of damage for each "batch", or for each "image"
    save_every: int = 500               # steps between checkpoints, each with an evaluation
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
    micro_batches: int = 0              # of a process in each step

    # by `prepare` of the script and `set_model`: what is trained, and how
    title: str = ""                     # for the user: system, preset, stage
    origin: str = ""                    # for the user: what the training starts from
    terms: tuple = ()                   # names of the losses, columns of the log
    columns: tuple = ()                 # more columns of the log, from evaluate
    draw: Callable = None               # (run, hq, recipe, generator) -> a tuple of tensors, a row for each image
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
    loader: Any = None                  # DataLoader of (micro_batch, 3, crop, crop) in [0, 1]
    batches: Any = None                 # its iterator, in `fit`
    recipes: list = None                # degrade.Recipe, one a step, by turns
    held_out_hq: torch.Tensor = None    # (16, 3, crop, crop) in [-1, 1], crops of photos that are held out
    held_out: list = None               # for each of them what `draw` made of it, each tensor with one row

    # changes from step to step
    step: int = 0                       # steps done
    lr: float = 0.0                     # learning rate of this step
    grad_norm: float = 0.0              # before clipping
    sums: dict = None                   # {loss: its sum over the steps since the last row of the log}
    logged: int = 0                     # step of that row
    clock: float = 0.0                  # seconds, time of that row
    metrics: dict = None                # of the newest evaluation; None where a run is saved without one
    skipped: int = 0                    # updates without a finite gradient
    skipped_in_a_row: int = 0           # steps with such an update
    stopped_early: bool = False         # it is over before its last step, by its own measure


# ---- set-up


def add_arguments(p):
    """Add the flags that all three scripts have."""
    p.add_argument("--data", type=path_argument, required=True,
                   help="good photos: a folder, searched recursively, or a .txt list")
    p.add_argument("--moved", action="store_true", help="go on although --data or --init lies elsewhere by now")
    p.add_argument("--out", type=path_argument, required=True, help="folder for everything this run writes")
    # optimisation
    p.add_argument("--steps", type=COUNT, help="steps in all (default: the preset's)")
    p.add_argument("--batch-size", type=COUNT, help="photos per step, of all processes together")
    p.add_argument("--micro-batch", type=COUNT, help="photos that a process computes at once (default: its share)")
    p.add_argument("--lr", type=between(1e-9, 1), help="peak learning rate")
    p.add_argument("--seed", type=SEED, default=0)
    # machine
    p.add_argument("--device", type=usable_device, default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                   help="of autocast; trained weights stay float32")
    p.add_argument("--checkpointing", action="store_true", help="compute blocks again in backward: less memory")
    p.add_argument("--compile", action="store_true", help="torch.compile the large network's blocks")
    p.add_argument("--workers", type=between(0, 999, whole=True), help="processes that read photos (4 on CUDA)")
    # what is written
    p.add_argument("--log-every", type=COUNT, default=50, metavar="N", help="steps between rows of log.csv (50)")
    p.add_argument("--save-every", type=COUNT, help="steps between checkpoints, held-out losses and images")
    p.add_argument("--keep", type=COUNT, default=2, metavar="K", help="newest checkpoints that stay (default 2)")


def choose_device(name):
    """Choose a device by its name; 'auto' is the best one at hand, and each process of torchrun has its own GPU.

    -> torch.device
    """
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(name)


def usable_device(name):
    """Be a type of argument: `choose_device`, refused where it cannot be used."""
    try:
        device = choose_device(name)
        torch.zeros(1, device=device)       # it may have a name and not be there
    except (RuntimeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(f"{name} cannot be used here ({str(e).splitlines()[0]})") from None
    return device


def choose_dtype(name, device, best="bfloat16"):
    """Choose a type by its name, and with it how a GPU multiplies float32.

    name: 'auto' is `best` on CUDA and float32 elsewhere; 'tf32' (of sample.py) is float32 whose products a GPU rounds
    to 10 bits. Trap: cudnn rounds them unasked, so for trainings, too, this is switched off -> torch.dtype
    """
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    if name == "auto":
        name = best if device.type == "cuda" else "float32"
    return torch.float32 if name == "tf32" else getattr(torch, name)


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
    run.micro_batch = args.micro_batch or max(share, 1)
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


# ---- the model: what learns


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


def set_model(run, model, learns, order=()):
    """Make model the one that the run trains, with its average, its optimizer, and what checkpoints hold.

    learns, order: of `freeze_all_but`; learns: of buffers, too, which checkpoints then hold
    """
    run.learns = learns
    run.trained = freeze_all_but(model, learns, order)
    run.model = run.ema = model.to(run.device)
    run.optimizer = adamw(run.trained, run.stage)
    run.state = {"model": run.model, "optimizer": run.optimizer, "scaler": run.scaler}
    if run.stage.ema:
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        run.state["ema"] = run.ema = copy.deepcopy(model, memo=frozen).eval()       # what is frozen exists once


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


def compile_all(networks, device):
    """Let torch.compile compile networks; where nothing can be compiled, a line says so instead."""
    # Whether a compiler works shows when something is compiled, and torch keeps what it has compiled on the disk. So a
    # small function is compiled for a size that surely nobody had before.
    new_size = 2 + time.time_ns() % 10_007
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(new_size, device=device))
    except Exception as e:      # without a compiler, without Triton, on a card or a Python that it does not know
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        print(f"--compile is left out, it cannot be done here ({reason})", file=sys.stderr)
    else:
        for network in networks:
            network.compile()


# ---- data


def open_photos(run):
    """Set run.loader and run.recipes -> held-out crops (16, 3, crop, crop) in [0, 1]. Raises DataError."""
    args, stage = run.args, run.stage
    photos, crops, run.photos = photos_for(args.data, stage.crop, args.seed, run.photos, flip=stage.flip,
                                           shrink=stage.shrink)
    found = len(set(run.photos))
    held_out = found - len(set(photos.files))
    print(f"{found} photos found in {args.data}, {held_out} of them held out")
    if found < FEW_PHOTOS:
        print(f"these are few: the {len(crops)} crops that are evaluated come from the {held_out} held out; "
              "figures of more photos say more")
    run.loader = batches(photos, steps=range(stage.before + run.step, stage.before + stage.steps),
                         batch_size=stage.batch_size, rank=run.rank, share=run.micro_batches * run.micro_batch,
                         micro=run.micro_batch, workers=args.workers, device=run.device)
    run.recipes = [replace(RECIPES[name], branches_per=stage.branches_per) for name in stage.recipes]
    return crops.to(run.device)


def open_data(run):
    """Set what the run learns from, and run.held_out, what it is measured on. Raises DataError.

    Held-out crops are degraded by the stage's first recipe, each by a plan of its own, and kept one by one: so an
    evaluation needs no more memory than one image, and measures the same whatever the batch size.
    """
    hq = open_photos(run)
    recipe = None
    if run.recipes:
        recipe = replace(run.recipes[0], branches_per="image")
    drawn = run.draw(run, hq, recipe, generator(HELD_OUT_IMAGES))
    run.held_out_hq = 2 * hq - 1
    run.held_out = list(zip(*(x.split(1) for x in drawn)))


def recipe(run):
    """Say how this step's images are degraded: by each recipe in its turn, None without any."""
    if not run.recipes:
        return None
    return run.recipes[run.step % len(run.recipes)]


# ---- several processes


def join(device):
    """Join the processes that torchrun started; only the first speaks -> rank, their number (else 0, 1)"""
    if "RANK" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    return dist.get_rank(), dist.get_world_size()


def is_distributed():
    """Tell whether torchrun started this; some builds of torch have no distributed at all."""
    return dist.is_available() and dist.is_initialized()


def mean_over_processes(x, device):
    """Average a number over the processes -> number"""
    if not is_distributed():
        return x
    x = torch.tensor(float(x), device=device)
    dist.all_reduce(x)
    return x.item() / dist.get_world_size()


def replicate(run, model, function):
    """Make a function of model one whose backward also averages model's gradients over the processes (DDP).

    DDP wraps a module and calls its forward. Here one model has several functions (the generator's pass, losses), so a
    module is made around each: model is its only part, which DDP looks after, and function its forward.
    """
    if run.world == 1:
        return function
    module = torch.nn.Module()
    module.model, module.forward = model, function
    return DistributedDataParallel(module, device_ids=[run.device.index] if run.device.type == "cuda" else None)


# ---- seeds and schedules


def generator(*numbers):
    """Make a CPU generator for a place in the training, e.g. (seed, step, micro-batch).

    Draws are a function of the place alone: a run that was resumed, or has other processes, draws the same, and so does
    every device. The numbers are mixed like digits of a huge base, so that neighbouring places share no seed.
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


# ---- a step: forward, backward, update


def step(run):
    """Do one step of the optimizer; gradients of the micro-batches are added up."""
    set_lr(run.optimizer, run.lr)
    for i, (hq, g) in enumerate(micro_batches(run)):
        drawn = run.draw(run, hq, recipe(run), g)
        with micro_batch_context(run, run.losses, i):
            terms = run.losses(*drawn, g)
        backward(run, terms)
    run.grad_norm = update(run, run.optimizer)
    ema_update(run.ema, run.model, ema_decay(run))


def micro_batches(run):
    """Yield what this process computes of a step, part after part: hq, generator.

    hq: (micro_batch, 3, crop, crop) in [0, 1]; generator: of all that is random there, the same whoever computes it
    """
    for i in range(run.micro_batches):
        hq = next(run.batches).to(run.device, non_blocking=True)
        yield hq, generator(run.args.seed, run.stage.before + run.step, run.rank * run.micro_batches + i)


def autocast(device, dtype):
    """In here large products are computed in dtype."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def micro_batch_context(run, function, i):
    """In here the forward pass of micro-batch i is computed: in autocast's precision, by function, of `replicate`.

    With several processes backward averages gradients over them, as DDP decides in the forward pass. Once a step is
    enough, with the last micro-batch, when all have been added up; for those before it this is switched off.
    """
    with ExitStack() as stack:
        if isinstance(function, DistributedDataParallel) and i < run.micro_batches - 1:
            stack.enter_context(function.no_sync())
        stack.enter_context(autocast(run.device, run.dtype))
        yield


def backward(run, terms):
    """Add a micro-batch's gradients to those before, and its losses to run.sums.  terms: {name: scalar}, summed up"""
    run.scaler.scale(sum(terms.values()) / run.micro_batches).backward()
    for name, loss in terms.items():
        run.sums[name] += loss.detach() / run.micro_batches


def update(run, optimizer):
    """Clip the gradients to norm 1, update the parameters, forget the gradients -> their norm before clipping

    Where it is not finite the update is left out and counted in run.skipped.
    """
    run.scaler.unscale_(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
    if math.isfinite(norm):
        run.scaler.step(optimizer)
    else:
        run.skipped += 1
        print(f"a step was left out, its gradient is {norm} ({run.skipped} so far)", file=sys.stderr)
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def count_skipped(run, updates):
    """Count steps in a row that left out updates: so many; MAX_SKIPPED end the run. Raises UserError."""
    if updates == 0:
        run.skipped_in_a_row = 0
        return
    run.skipped_in_a_row += 1
    if run.skipped_in_a_row == MAX_SKIPPED:
        raise UserError(f"{MAX_SKIPPED} steps in a row had no finite gradient; "
                        "go on from the last checkpoint with a lower --lr, or --dtype float32")


# ---- checkpoints: --out/checkpoint-STEP-HASH.pt
#
# Three things that public reports asked for (lost nights, moved disks): a full disk or a kill during a save loses
# nothing, a damaged file is recognised by its hash and the one before it is taken, and a run goes on with photos that
# lie elsewhere by now, if the user says --moved.


def checkpoints(folder):
    """List the checkpoints in a folder, newest first."""
    return sorted(Path(folder).glob("checkpoint-*.pt"), reverse=True)


def write(path, state):
    """Write state by torch.save; what was there survives any interruption. Raises UserError."""
    try:
        with whole_file(path, f"{path}.part") as part:      # of one name, or killed runs would leave many
            torch.save(state, part)
            with open(part, "rb+") as f:        # Windows syncs only what may be written
                os.fsync(f.fileno())
    except OSError as e:
        raise UserError(f"{e}; then the same command goes on from the last checkpoint") from None


def save_checkpoint(folder, step, keep, **state):
    """Write a checkpoint, whose name tells whether it is what was written; the newest `keep` stay. Raises UserError."""
    path = Path(folder, "checkpoint.new")
    write(path, {"step": step, "cwd": os.getcwd(), **state})
    path.replace(path.with_name(f"checkpoint-{step:08d}-{sha256_of(path)[:16]}.pt"))
    for old in checkpoints(folder)[keep:]:
        old.unlink()


def save_state(run, **more):
    """Let the first process write a checkpoint: run.state, of models what learns, and more. Raises UserError."""
    if run.rank > 0:
        return
    state = {name: part.state_dict() for name, part in run.state.items()}
    for name in ("model", "ema"):
        if name in state:
            state[name] = {k: v for k, v in state[name].items() if run.learns(k)}
    over = run.stopped_early or run.step >= run.stage.steps
    save_checkpoint(run.out, run.step, run.args.keep, steps=run.stage.steps, over=over, settings=run.settings,
                    photos=run.photos, **state, **more)


def read_checkpoint(path, must_hold):
    """Read a checkpoint -> dict. Raises ValueError, or nearly anything, where it is damaged or lacks a name."""
    if sha256_of(path)[:16] != path.stem.rpartition("-")[2]:
        raise ValueError("it is not what was written")
    state = torch.load(path, map_location="cpu", weights_only=True)
    lacking = set(must_hold) - state.keys()
    if lacking:
        raise ValueError(f"it holds no {min(lacking)}")
    return state


def load_checkpoint(folder, must_match, moved=False, must_hold=()):
    """Load the newest whole checkpoint of a folder; damaged ones are named and passed over.

    must_match: settings that may not differ from the interrupted run's, except paths if they moved
    must_hold: names of what a whole one holds beside step and settings
    -> dict, None if there is no checkpoint at all. Raises UserError.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            state = read_checkpoint(path, {"step", "settings", *must_hold})
        except Exception as e:      # a damaged file makes torch raise nearly anything
            print(f"{path}: skipped, damaged ({str(e).splitlines()[0]})", file=sys.stderr)
            continue
        check_settings(path, state, must_match, moved)
        return state
    if found:
        raise UserError(f"{folder}: no checkpoint is whole; move them away to begin anew")
    return None


def check_settings(path, state, must_match, moved):
    """Raise UserError where a setting differs from that of state, the checkpoint in file path.

    Two spellings of one folder are no difference, seen from where the run began and from where it goes on.
    """
    for name, now in must_match.items():
        then, hint = state["settings"].get(name), ""
        if name in ("data", "init") and then and now:       # folders, unless --init is a public name
            hint = ", or --moved if it is the same in another place"
            place = os.path.join(state.get("cwd", ""), then)
            if moved or is_same_place(place, now):
                continue
            if os.path.exists(place):       # the same words, seen from another folder, mean another place
                then = place
        if then != now:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: {path} was written with {then}, not {now}; use that or another --out{hint}")


def is_same_place(a, b):
    """Tell whether two paths lead to the same file or folder."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def resume(run, settings):
    """Go on where the newest checkpoint in --out stopped, if there is one; say what is trained, where and how.

    settings: names of flags that must then be the same -> the checkpoint or None. Raises UserError.
    """
    run.settings = {name: getattr(run.args, name) for name in settings} | {"batch_size": run.stage.batch_size}
    checkpoint = load_checkpoint(run.out, run.settings, run.args.moved, ["photos", *run.state])
    if checkpoint:
        run.step, run.photos = checkpoint["step"], checkpoint["photos"]
        run.origin = f"resumed from {run.out} at step {run.step}"
        for name, part in run.state.items():
            if isinstance(part, torch.nn.Module):
                load_saved(part, checkpoint[name], run.out, run.learns if name in ("model", "ema") else None)
            elif checkpoint[name]:                      # a scaler's is {} in another type
                try:
                    part.load_state_dict(checkpoint[name])
                except ValueError:      # an optimizer has other parameters
                    raise UserError(UNFIT.format(run.out, name)) from None
    processes = "1 process" if run.world == 1 else f"{run.world} processes"
    print(f"{run.title}: {run.origin}, on {run.device} in {str(run.dtype).removeprefix('torch.')}, {processes}")
    batch = f"batch {run.stage.batch_size} = {run.world} x {run.micro_batches} x {run.micro_batch}"
    print(f"{count(run.trained):,} parameters learn; {batch}; {run.stage}")
    return checkpoint


def load_saved(module, tensors, folder, learns=None):
    """Load what a checkpoint in folder holds of a module.  learns: of a name, whether it must be there; None = all are

    Raises UserError unless names and shapes fit, as they do not after a change of the network's code.
    """
    own = module.state_dict()
    # of earlier versions: they may lack what a network itself keeps fixed, and hold what a stage does not train
    fixed = {name for name, p in module.named_parameters() if not p.requires_grad}
    needed = {name for name in own.keys() - fixed if learns is None or learns(name)}
    for name in sorted(needed | tensors.keys()):
        if name not in tensors or name not in own or tensors[name].shape != own[name].shape:
            raise UserError(UNFIT.format(folder, name))
    module.load_state_dict(tensors, strict=False)


def warn_of_unfinished(init):
    """Print a line where --init is the folder of a training that is not over."""
    for path in checkpoints(init) if init else ():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)      # without reading tensors
            step, steps = state["step"], state["steps"]
            over = state.get("over", step >= steps)     # earlier versions do not say
        except Exception:       # damaged, which makes torch raise nearly anything, or of an early version
            continue
        if not over:
            print(f"--init {init}: that training stopped at step {step} of {steps}; its own command goes on with it",
                  file=sys.stderr)
        return


# ---- the loop


def fit(run, step, evaluate, save):
    """Train until the last step, or until Ctrl-C, SIGTERM or early stopping.

    step(run): one step of the optimizers; evaluate(run) -> {column of the log: value}, {title: images (B, 3, H, W)};
    save(run): the model and a checkpoint -> exit status: 0, or 130 if it was stopped before its last step
    """
    stage, log = run.stage, open_log(run)
    if run.step == 0:
        metrics, _ = evaluated(run, evaluate)
        write_row(log, {"step": 0} | metrics)
    hidden = True if run.rank > 0 else None     # None: where no terminal shows it
    bar = tqdm(total=stage.steps, initial=run.step, unit="step", dynamic_ncols=True, disable=hidden)
    run.model.train()
    begin_row(run)
    said = "stopping after this step, then saving; again: at once, unsaved"
    with Stop(said) as stop, reading(run.loader) as run.batches:
        while run.step < stage.steps and not is_stopped(run, stop):
            run.lr = learning_rate(run.step, stage.steps, stage.lr, stage.schedule, stage.warmup)
            skipped_before = run.skipped
            step(run)
            count_skipped(run, run.skipped - skipped_before)
            run.step += 1
            bar.update()
            if run.step % stage.save_every == 0 or run.step == stage.steps:
                evaluate_and_save(run, log, bar, stop, evaluate, save)
            elif run.step % run.args.log_every == 0:
                write_row(log, finish_row(run, bar))
        bar.close()
        stopped = run.step < stage.steps and not run.stopped_early
        if stopped:
            run.metrics = None
            with stop.shield():
                save(run)
            print(f"\nstopped at step {run.step} and saved; the same command goes on from here")
    if is_distributed():
        dist.destroy_process_group()
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


def evaluate_and_save(run, log, bar, stop, evaluate, save):
    """Measure the model, save it, and only then let the log say so."""
    row = finish_row(run, bar)
    run.metrics, images = evaluated(run, evaluate)
    with stop.shield():
        save(run)
    write_row(log, row | run.metrics)
    if log:
        draw_log(run, log, images)


def open_log(run):
    """Open log.csv of the first process; rows after the step at which the run is resumed are dropped -> Log or None"""
    if run.rank > 0:
        return None
    columns = ["step", *run.terms, "grad_norm", "lr", "seconds", "held_out", "psnr", *run.columns]
    return Log(run.out / "log.csv", columns, run.step or -1)


def begin_row(run):
    """Begin to sum up losses and to count seconds."""
    run.sums = dict.fromkeys(run.terms, 0.0)
    run.logged, run.clock = run.step, time.time()


def finish_row(run, bar):
    """Finish a row of the log: losses are means over the steps since the row before, and shown beside the bar.

    -> {column: value}
    """
    row = {"step": run.step, "grad_norm": run.grad_norm, "lr": run.lr, "seconds": time.time() - run.clock}
    losses = {}
    for name, total in run.sums.items():
        losses[name] = mean_over_processes(float(total / (run.step - run.logged)), run.device)
    bar.set_postfix({name: f"{x:.3f}" for name, x in losses.items()}, refresh=False)
    begin_row(run)
    return row | losses


def write_row(log, row):
    """Write a row of the log, where this process has one.  row: {column: value}"""
    if log:
        log.write(**row)


def draw_log(run, log, images):
    """Show an evaluation: metrics on the terminal, loss.png, and sheet.png of six of the images in each column."""
    tqdm.write(f"step {run.step}: " + ", ".join(f"{name} {x:.4f}" for name, x in run.metrics.items()))
    log.draw(run.out / "loss.png", [*run.terms, "held_out"], run.title)
    if images:
        save_sheet(run.out / "sheet.png", {title: x[:6] for title, x in images.items()})


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
