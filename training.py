"""What the training scripts share.

Each script has its own networks (`build`), data (`draw`), losses and `step`; this file holds the loop around them,
`fit`, and what the loop needs: flags, devices, processes, seeds, checkpoints, the log. Plain functions; what a run
knows stands in one dataclass, `Run`, and is passed to them.
"""

import argparse
import math
import os
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from degrade import RECIPES
from models.support.arguments import SEED, Stop, between, make_lenient, no_memory, path, positive
from models.support.charts import Log, save_sheet
from models.support.download import sha256_of
from models.support.files import check_writable, whole_file
from models.support.photos import batches, photos_for, reading

MAX_SKIPPED = 25    # optimizer steps in a row without a finite gradient, after which a run ends
FEW_PHOTOS = 60     # below, held-out crops come from one or two photos
PARTLY_SAVED = {"model", "ema"}     # in run.state: of them checkpoints hold what learns


class UserError(Exception):
    """Something that the user can mend, said in one line."""


@contextmanager
def one_line_errors(name):
    """Errors that a user can cause become one line on stderr and exit status 1."""
    make_lenient()
    try:
        yield
    except KeyboardInterrupt:       # before the first step, or for the second time
        print(f"{name}: stopped, nothing saved", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, ValueError, SafetensorError) as e:
        sys.exit(f"{name}: {str(e).strip().splitlines()[-1]}")     # a loader's worker wraps its error in a traceback
    except RuntimeError as e:
        if no_memory(e):
            sys.exit(f"{name}: not enough memory; lower --micro-batch, or add --checkpointing")
        lost = "connection closed", "connection reset", "timed out", "nccl"
        if not (is_distributed() and any(words in str(e).lower() for words in lost)):
            raise
        sys.exit(f"{name}: another process of this run is gone ({str(e).splitlines()[0][:100]}); "
                 "the same command goes on from the last checkpoint")


# ---- a stage of a training, and a run of it


@dataclass
class Stage:
    """Hyper-parameters of a stage. Flags of the same names override them: --steps, --batch-size, --lr, --save-every."""

    steps: int                          # of the optimizer
    batch_size: int                     # images per step, of all processes together
    lr: float                           # learning rate at its peak
    schedule: str = "constant"          # of the learning rate, or "cosine"
    warmup: int = 0                     # steps in which the learning rate rises
    betas: tuple = (0.9, 0.999)         # of AdamW
    weight_decay: float = 0.01
    ema: float = 0.0                    # decay of the averaged weights, which are saved; 0 = no average
    crop: int = 512                     # side of a training image in pixels, cut out of a photo
    shrink: bool = False                # shrink the photo first, so that its shorter side has as many pixels
    flip: bool = True                   # mirror every other image
    recipes: tuple = ()                 # how images are degraded: of degrade.py, one a step, by turns
    branches_per: str = "batch"         # draw a recipe's kinds of damage for each "batch", or for each "image"
    save_every: int = 500               # steps between checkpoints, each with an evaluation
    before: int = 0                     # steps of the stages before, if images and seeds go on from there


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

    # by `prepare` of the script: what is trained
    title: str = ""                     # for the user: system, preset, stage
    origin: str = ""                    # for the user: what the training starts from
    terms: tuple = ()                   # names of the losses, columns of the log
    columns: tuple = ()                 # more columns of the log, from evaluate
    model: torch.nn.Module = None       # the system, of which a part is trained
    ema: torch.nn.Module = None         # the system with averaged weights, which is evaluated and saved; or the model
    trained: list = None                # parameters
    optimizer: torch.optim.Optimizer = None
    state: dict = None                  # {name: module, optimizer or scaler} that checkpoints hold
    is_saved: Callable = None           # of name: do checkpoints hold this tensor of the model? The rest is --init's
    losses: Callable = None             # what a step minimises: (*what `draw` returns) -> {name: scalar}; a `replicate`

    # by `resume` and `open_photos`: what it learns from
    settings: dict = None               # flags that may not change when the run is resumed
    photos: list = None                 # names of the files when the run began
    loader: Any = None                  # DataLoader of (micro_batch, 3, crop, crop) in [0, 1]
    batches: Any = None                 # its iterator, in `fit`
    recipes: list = None                # degrade.Recipe, one a step, by turns
    held_out: Any = None                # what evaluate measures on

    # changes from step to step
    step: int = 0                       # steps done
    lr: float = 0.0                     # learning rate of this step
    grad_norm: float = 0.0              # before clipping
    sums: dict = None                   # {loss: its sum over the steps since the last row of the log}
    logged: int = 0                     # step of that row
    clock: float = 0.0                  # seconds, time of that row
    metrics: dict = None                # of the newest evaluation; None where a run is saved without one
    skipped: int = 0                    # steps without a finite gradient
    skipped_in_a_row: int = 0
    over: bool = False                  # stopped early, by its own measure


# ---- set-up


def add_arguments(p):
    """The flags that all three scripts have."""
    p.add_argument("--data", type=path, required=True, help="good photos: a folder with all below it, or a .txt list")
    p.add_argument("--moved", action="store_true", help="go on although --data or --init lies elsewhere by now")
    p.add_argument("--out", type=path, required=True, help="folder for everything this run writes")
    # optimisation
    p.add_argument("--steps", type=positive, help="steps in all (default: the preset's)")
    p.add_argument("--batch-size", type=positive, help="photos per step, of all processes together")
    p.add_argument("--micro-batch", type=positive, help="photos that a process computes at once (default: its share)")
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
    p.add_argument("--log-every", type=positive, default=50, metavar="N", help="steps between rows of log.csv (50)")
    p.add_argument("--save-every", type=positive, help="steps between checkpoints, held-out losses and pictures")
    p.add_argument("--keep", type=positive, default=2, metavar="K", help="newest checkpoints that stay (default 2)")


def choose_device(name):
    """'auto' is the best one at hand -> torch.device"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)     # torchrun's


def usable_device(name):
    """A type of argument: `choose_device`, refused where it cannot be used."""
    try:
        device = choose_device(name)
        torch.zeros(1, device=device)       # it may have a name and not be there
    except (RuntimeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(f"{name} cannot be used here ({str(e).splitlines()[0]})") from None
    return device


def choose_dtype(name, device, best="bfloat16"):
    """'auto' is `best` on CUDA and float32 elsewhere; tf32 is float32 whose products a GPU rounds -> torch.dtype"""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"    # cudnn does it unasked
    if name == "auto":
        name = best if device.type == "cuda" else "float32"
    return torch.float32 if name == "tf32" else getattr(torch, name)


def start(run):
    """Begin a run of which args and stage are known: overrides, device, precision, processes, --out.

    Raises UserError.
    """
    args = run.args
    given = {field.name: getattr(args, field.name, None) for field in fields(run.stage)}
    run.stage = replace(run.stage, **{name: value for name, value in given.items() if value is not None})
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


def open_photos(run):
    """Set run.loader and run.recipes -> held-out crops (16, 3, crop, crop) in [0, 1]. Raises ValueError."""
    args, stage = run.args, run.stage
    photos, crops, run.photos = photos_for(args.data, stage.crop, args.seed, run.photos, flip=stage.flip,
                                           shrink=stage.shrink)
    found = len(set(run.photos))
    held_out = found - len(set(photos.files))
    print(f"{found} photos found in {args.data}, {held_out} of them held out")
    if found < FEW_PHOTOS:
        print(f"these are few: the {len(crops)} crops that are evaluated come from the {held_out} held out; "
              "figures of more photos say more")
    steps = range(stage.before + run.step, stage.before + stage.steps)
    run.loader = batches(photos, steps, stage.batch_size, run.rank, run.micro_batches * run.micro_batch,
                         run.micro_batch, args.workers, run.device)
    run.recipes = [replace(RECIPES[name], branches_per=stage.branches_per) for name in stage.recipes]
    return crops.to(run.device)


def compile_all(networks, device):
    """torch.compile networks; where nothing can be compiled, a line says so instead."""
    try:
        probe = torch.zeros(2 + time.time_ns() % 10_007, device=device)     # of a new size, which no cache knows
        torch.compile(lambda x: x.sin() + 1)(probe)
    except Exception as e:      # without a compiler, without Triton, on a card or a Python that it does not know
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        print(f"--compile is left out, it cannot be done here ({reason})", file=sys.stderr)
    else:
        for network in networks:
            network.compile()


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
    """Whether torchrun started this; some builds of torch have no distributed at all."""
    return dist.is_available() and dist.is_initialized()


def mean_over_processes(x, device):
    """The mean of a number over the processes -> number"""
    if not is_distributed():
        return x
    x = torch.tensor(float(x), device=device)
    dist.all_reduce(x)
    return x.item() / dist.get_world_size()


def replicate(run, model, function):
    """With several processes: function, whose backward also averages the gradients of model over them (DDP)."""
    if run.world == 1:
        return function
    module = torch.nn.Module()      # DDP takes a module, and calls its forward
    module.model, module.forward = model, function
    return DistributedDataParallel(module, device_ids=[run.device.index] if run.device.type == "cuda" else None)


# ---- seeds, parameters, schedules


def generator(*numbers):
    """A CPU generator seeded by numbers, e.g. (seed, step, micro-batch)."""
    seed = 0
    for n in numbers:
        seed = (seed * 1_000_003 + n + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def count(parameters):
    return sum(p.numel() for p in parameters)


def freeze_all_but(model, params):
    """Let params learn and nothing else in model -> params"""
    model.requires_grad_(False)
    for p in params:
        p.requires_grad_(True)
    assert len({id(p) for p in params}) == len(params), "a parameter is trained twice"
    assert count(params) == count(p for p in model.parameters() if p.requires_grad), "a parameter is not the model's"
    return params


def adamw(params, stage):
    return torch.optim.AdamW(params, stage.lr, stage.betas, weight_decay=stage.weight_decay, fused=True)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(step, steps, lr, schedule="constant", warmup=0):
    """Learning rate of a step: warm-up for an eighth of them at most, then constant or a cosine to 2 % of lr."""
    warmup = min(warmup, steps // 8)
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    progress = min((step - warmup) / max(steps - warmup, 1), 1)
    return lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, of what learns; buffers are copied. Nothing to do if they are one."""
    if ema is model:
        return
    averaged, learned = zip(*((e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad))
    torch._foreach_lerp_(averaged, learned, 1 - decay)
    for e, b in zip(ema.buffers(), model.buffers()):
        e.copy_(b)


# ---- a step: forward, backward, update


def micro_batches(run):
    """Yield what this process computes of a step, part after part: hq, generator.

    hq: (micro_batch, 3, crop, crop) in [0, 1]; generator: of all that is random there, the same whoever computes it
    """
    for i in range(run.micro_batches):
        hq = next(run.batches).to(run.device, non_blocking=True)
        yield hq, generator(run.args.seed, run.stage.before + run.step, run.rank * run.micro_batches + i)


def recipe(run):
    """How this step's images are degraded: each recipe in its turn."""
    return run.recipes[run.step % len(run.recipes)]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def forward(run, function, i):
    """In here the losses of micro-batch i are computed, in autocast's precision.

    function: of `replicate`; the processes average their gradients once a step, with the last micro-batch
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
    """Clip the gradients to norm 1, step, forget them -> their norm before.

    A step whose gradient is not finite is skipped; MAX_SKIPPED of those in a row end the run. Raises UserError.
    """
    run.scaler.unscale_(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
    if math.isfinite(norm):
        run.skipped_in_a_row = 0
        run.scaler.step(optimizer)
    else:
        run.skipped += 1
        run.skipped_in_a_row += 1
        print(f"a step was left out, its gradient is {norm} ({run.skipped} so far)", file=sys.stderr)
    if run.skipped_in_a_row == MAX_SKIPPED:
        raise UserError(f"{MAX_SKIPPED} steps in a row had no finite gradient; "
                        "go on from the last checkpoint with a lower --lr, or --dtype float32")
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---- checkpoints


def checkpoints(folder):
    """The checkpoints in a folder, newest first."""
    return sorted(Path(folder).glob("checkpoint-*.pt"), reverse=True)


def write(path, state):
    """torch.save; what was there survives any interruption. Raises UserError."""
    try:
        with whole_file(path, f"{path}.part") as part:      # of one name, or killed runs would leave many
            torch.save(state, part)
            with open(part, "rb+") as f:        # Windows syncs only what may be written
                os.fsync(f.fileno())
    except OSError as e:
        raise UserError(f"{e}; then the same command goes on from the last checkpoint") from None


def save_checkpoint(folder, step, keep, **state):
    """Write checkpoint-STEP-HASH.pt, whose name tells whether it is what was written; the newest `keep` stay."""
    path = Path(folder, "checkpoint.new")
    write(path, {"step": step, "cwd": os.getcwd(), **state})
    path.replace(path.with_name(f"checkpoint-{step:08d}-{sha256_of(path)[:16]}.pt"))
    for old in checkpoints(folder)[keep:]:
        old.unlink()


def load_checkpoint(folder, must_match, moved=False, must_hold=()):
    """The newest whole checkpoint, or None if there is none at all; damaged ones are named and passed over.

    must_match: settings that may not differ from the interrupted run's, except paths if they moved
    must_hold: names of what a whole one holds beside step and settings. Raises UserError.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            if sha256_of(path)[:16] != path.stem.rpartition("-")[2]:
                raise ValueError("it is not what was written")
            state = torch.load(path, map_location="cpu", weights_only=True)
            if lacking := {"step", "settings", *must_hold} - state.keys():
                raise ValueError(f"it holds no {min(lacking)}")
        except Exception as e:      # a damaged file makes torch raise nearly anything
            print(f"{path}: skipped, damaged ({str(e).splitlines()[0]})", file=sys.stderr)
        else:
            check_settings(path, state, must_match, moved)
            return state
    if found:
        raise UserError(f"{folder}: no checkpoint is whole; move them away to begin anew")
    return None


def check_settings(path, state, must_match, moved):
    """Raise UserError where a setting differs from that of state, the checkpoint in file path."""
    for name, value in must_match.items():
        was, hint = state["settings"].get(name), ""
        if name in ("data", "init") and was and value:      # paths, unless --init is a public name
            hint = ", or --moved if it is the same in another place"
            old = os.path.join(state.get("cwd", ""), was)
            if moved or os.path.exists(old) and os.path.exists(value) and os.path.samefile(old, value):
                continue
            if os.path.exists(old):     # the same words may mean another place by now
                was = old
        if was != value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: {path} was written with {was}, not {value}; use that or another --out{hint}")


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
                load_saved(part, checkpoint[name], run.out, run.is_saved if name in PARTLY_SAVED else None)
            elif checkpoint[name]:                      # a scaler's is {} in another type
                part.load_state_dict(checkpoint[name])
    processes = "1 process" if run.world == 1 else f"{run.world} processes"
    print(f"{run.title}: {run.origin}, on {run.device} in {str(run.dtype).removeprefix('torch.')}, {processes}")
    batch = f"batch {run.stage.batch_size} = {run.world} x {run.micro_batches} x {run.micro_batch}"
    print(f"{count(run.trained):,} parameters learn; {batch}; {run.stage}")
    return checkpoint


def load_saved(module, tensors, folder, is_saved=None):
    """Load what a checkpoint in folder holds of a module.  is_saved: of a name, None = of all

    Raises UserError unless names and shapes are the same, as they are not after a change of the network's code.
    """
    wanted = {name: x.shape for name, x in module.state_dict().items() if is_saved is None or is_saved(name)}
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or tensors[name].shape != wanted.get(name):
            raise UserError(f"{folder}: its checkpoint does not fit this network ({name}), whose code has changed "
                            "since; begin another --out, or take the change back")
    module.load_state_dict(tensors, strict=False)


def warn_of_unfinished(init):
    """Print a line where --init is the folder of a training that has not reached its last step."""
    state = {}
    if init and checkpoints(init):
        with suppress(Exception):       # a damaged file makes torch raise nearly anything
            state = torch.load(checkpoints(init)[0], map_location="cpu", weights_only=True, mmap=True)
    if state and state["step"] < state.get("steps", 0):
        print(f"--init {init}: that training stopped at step {state['step']} of {state['steps']}; "
              "its own command goes on with it", file=sys.stderr)


def save_state(run, **more):
    """The first process writes a checkpoint: run.state, of models what learns, and more."""
    if run.rank > 0:
        return
    state = {name: part.state_dict() for name, part in run.state.items()}
    for name in PARTLY_SAVED & state.keys():
        state[name] = {k: v for k, v in state[name].items() if run.is_saved(k)}
    steps = run.step if run.over else run.stage.steps       # at which it is over
    save_checkpoint(run.out, run.step, run.args.keep, steps=steps, settings=run.settings, photos=run.photos, **state,
                    **more)


# ---- the loop


def fit(run, step, evaluate, save):
    """Train until the last step, or until Ctrl-C, SIGTERM or early stopping.

    step(run): one step of the optimizers; evaluate(run) -> {column of the log: value}, {title: images (B, 3, H, W)};
    save(run): the model and a checkpoint -> exit status: 0, or 130 if it was stopped before its last step
    """
    stage, log = run.stage, open_log(run)
    if run.step == 0:
        with autocast(run.device, run.dtype):
            metrics, _ = evaluate(run)
        if log:
            log.write(step=0, **metrics)
    hidden = True if run.rank > 0 else None     # None: where no terminal shows it
    bar = tqdm(total=stage.steps, initial=run.step, unit="step", dynamic_ncols=True, disable=hidden)
    run.model.train()
    begin_row(run)
    said = "stopping after this step, then saving; again: at once, unsaved"
    with Stop(said) as stop, reading(run.loader) as run.batches:
        while run.step < stage.steps and not is_stopped(run, stop):
            run.lr = learning_rate(run.step, stage.steps, stage.lr, stage.schedule, stage.warmup)
            step(run)
            run.step += 1
            show_progress(run, bar)
            due = run.step % stage.save_every == 0 or run.step == stage.steps
            if due or run.step % run.args.log_every == 0:
                row, images = finish_row(run), {}
                if due:
                    with autocast(run.device, run.dtype):
                        run.metrics, images = evaluate(run)
                    with stop.shield():
                        save(run)
                    row |= run.metrics
                if log:
                    log.write(**row)
                if log and due:
                    draw_log(run, log, images)
        bar.close()
        stopped = run.step < stage.steps and not run.over
        if stopped:
            run.metrics = None
            with stop.shield():
                save(run)
            print(f"\nstopped at step {run.step} and saved; the same command goes on from here")
    if is_distributed():
        dist.destroy_process_group()
    return 130 if stopped else 0


def is_stopped(run, stop):
    """Whether any process was asked to stop, or the run has stopped early."""
    return mean_over_processes(bool(stop) or run.over, run.device) > 0


def open_log(run):
    """log.csv of the first process; rows after the step at which the run is resumed are dropped -> Log, else None"""
    if run.rank > 0:
        return None
    columns = ["step", *run.terms, "grad_norm", "lr", "seconds", "held_out", "psnr", *run.columns]
    return Log(run.out / "log.csv", columns, run.step or -1)


def begin_row(run):
    """Losses are summed up and seconds counted from here on."""
    run.sums = dict.fromkeys(run.terms, 0.0)
    run.logged, run.clock = run.step, time.time()


def finish_row(run):
    """A row of the log: losses are means over the steps since the row before -> {column: value}"""
    row = {"step": run.step, "grad_norm": run.grad_norm, "lr": run.lr, "seconds": time.time() - run.clock}
    for name, total in run.sums.items():
        row[name] = mean_over_processes(total / (run.step - run.logged), run.device)
    begin_row(run)
    return row


def show_progress(run, bar):
    """The bar on the terminal, with the mean losses since the last row of the log."""
    means = {name: f"{total / (run.step - run.logged):.3f}" for name, total in run.sums.items()}
    bar.update()
    bar.set_postfix(means, refresh=False)


def draw_log(run, log, images):
    """A line of metrics on the terminal, loss.png, and sheet.png of six of the images in each column."""
    tqdm.write(f"step {run.step}: " + ", ".join(f"{name} {x:.4f}" for name, x in run.metrics.items()))
    log.draw(run.out / "loss.png", [*run.terms, "held_out"], run.title)
    if images:
        save_sheet(run.out / "sheet.png", {title: x[:6] for title, x in images.items()})


def psnr(x, hq):
    """Mean PSNR over RGB in dB.  x, hq: (B, 3, H, W) in [-1, 1] -> float"""
    return float(-10 * ((x - hq) / 2).square().mean((1, 2, 3)).log10().mean())
