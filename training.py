"""What the training scripts share. Each has its networks, losses and its `step`; `fit` is the loop around it."""

import argparse
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from models.support.arguments import SEED, Stop, between, make_lenient, no_memory, positive
from models.support.charts import Log, save_sheet
from models.support.download import sha256_of
from models.support.files import whole_file
from models.support.photos import batches, photos_for  # noqa: F401: scripts say training.batches


class Quit(Exception):
    """An error of the user's, in one line."""


@contextmanager
def one_line_errors(name):
    """Errors that a user can cause become one line on stderr and exit status 1."""
    make_lenient()
    try:
        yield
    except (Quit, OSError, ValueError, SafetensorError) as e:
        sys.exit(f"{name}: {str(e).strip().splitlines()[-1]}")     # a loader's worker wraps its error in a traceback
    except RuntimeError as e:
        if no_memory(e):
            sys.exit(f"{name}: not enough memory; lower --micro-batch, or add --checkpointing")
        lost = "connection closed", "connection reset", "timed out", "nccl"
        if not (several() and any(words in str(e).lower() for words in lost)):
            raise
        sys.exit(f"{name}: another process of this run is gone ({str(e).splitlines()[0][:100]}); "
                 "the same command goes on from the last checkpoint")


# ---- set-up


def add_arguments(p):
    """The flags that all three scripts have."""
    p.add_argument("--data", required=True, help="good photos: a folder, searched recursively, or a .txt list")
    p.add_argument("--moved", action="store_true", help="go on although --data or --init lies elsewhere by now")
    p.add_argument("--out", required=True, help="folder for everything this run writes")
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
        torch.zeros(1, device=(device := choose_device(name)))      # it may have a name and not be there
        return device
    except (RuntimeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(f"{name} cannot be used here ({str(e).splitlines()[0]})") from None


def choose_dtype(name, device, best="bfloat16"):
    """'auto' is `best` on CUDA and float32 elsewhere; tf32 is float32 whose products a GPU rounds -> torch.dtype"""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"    # cudnn does it unasked
    if name == "auto":
        name = best if device.type == "cuda" else "float32"
    return torch.float32 if name == "tf32" else getattr(torch, name)


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


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


def several():
    """Whether torchrun started this; some builds of torch have no distributed at all."""
    return dist.is_available() and dist.is_initialized()


def mean_of_all(x, device):
    """The mean of a number over the processes."""
    if not several():
        return x
    x = torch.tensor(float(x), device=device)
    dist.all_reduce(x)
    return x.item() / dist.get_world_size()


def replicate(model, function, device):
    """function, whose backward now also averages the gradients of model over the processes (DDP)."""
    module = torch.nn.Module()      # DDP takes a module, and calls its forward
    module.model, module.forward = model, function
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


# ---- seeds, parameters, schedules


def generator(*numbers):
    """A CPU generator seeded by numbers, e.g. (seed, rank, step)."""
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


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(step, steps, lr, schedule="constant", warmup=0):
    """Learning rate of a step: warm-up for an eighth of them at most, then constant or a cosine to 2 % of lr."""
    warmup = min(warmup, steps // 8)
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = 0 if schedule == "constant" else min((step - warmup) / max(steps - warmup, 1), 1)
    return lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Health:
    """Steps of optimizers, left out where a gradient is no number; `most` of those in a row end the run."""

    def __init__(self, most=25):
        self.most, self.skipped, self.in_a_row = most, 0, 0

    def step(self, optimizer, scaler):
        """Clip the gradients to norm 1, step, forget them -> their norm before. Raises Quit."""
        scaler.unscale_(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        if math.isfinite(norm):
            self.in_a_row = 0
            scaler.step(optimizer)
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            print(f"a step was left out, its gradient is {norm} ({self.skipped} so far)", file=sys.stderr)
        if self.in_a_row == self.most:
            raise Quit(f"{self.most} steps in a row had no finite gradient; "
                       "go on from the last checkpoint with a lower --lr, or --dtype float32")
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, of what learns; buffers are copied."""
    averaged, learned = zip(*((e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad))
    torch._foreach_lerp_(averaged, learned, 1 - decay)
    for e, b in zip(ema.buffers(), model.buffers()):
        e.copy_(b)


# ---- checkpoints


def checkpoints(folder):
    """The checkpoints in a folder, newest first."""
    return sorted(Path(folder).glob("checkpoint-*.pt"), reverse=True)


def write(path, state):
    """torch.save; what was there survives any interruption. Raises Quit."""
    try:
        with whole_file(path, f"{path}.part") as part:      # of one name, or killed runs would leave many
            torch.save(state, part)
            with open(part, "rb+") as f:        # Windows syncs only what may be written
                os.fsync(f.fileno())
    except OSError as e:
        raise Quit(f"{e}; then the same command goes on from the last checkpoint") from None


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
    must_hold: names of what a whole one holds beside step and settings. Raises Quit.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            if sha256_of(path)[:16] != path.stem.rpartition("-")[2]:
                raise ValueError("it is not what was written")
            state = torch.load(path, map_location="cpu", weights_only=True)
            if lacking := {"step", "settings", *must_hold} - state.keys():
                raise ValueError(f"it holds no {min(lacking)}")
            break
        except Exception as e:      # a damaged file makes torch raise nearly anything
            print(f"{path}: skipped, damaged ({str(e).splitlines()[0]})", file=sys.stderr)
    else:
        if found:
            raise Quit(f"{folder}: no checkpoint is whole; move them away to begin anew")
        return None
    for name, value in must_match.items():
        was, hint = state["settings"].get(name), ""
        if name in ("data", "init") and was and value:      # paths, unless --init is a public name
            old, hint = os.path.join(state.get("cwd", ""), was), ", or --moved if it is the same in another place"
            if moved or os.path.exists(old) and os.path.exists(value) and os.path.samefile(old, value):
                continue
            was = old if os.path.exists(old) else was       # the same words may mean another place by now
        if was != value:
            flag = f"--{name.replace('_', '-')}"
            raise Quit(f"{flag}: {path} was written with {was}, not {value}; use that or another --out{hint}")
    return state


# ---- a run


def begin(args, recipe):
    """What a run's parts share: arguments, the recipe with what they override, device, type, processes, folder."""
    recipe = replace(recipe, **{k: v for k, v in vars(args).items() if v is not None and hasattr(recipe, k)})
    run = SimpleNamespace(args=args, recipe=recipe, out=Path(args.out), step=0, over=False, photos=None)
    run.device, run.dtype = args.device, choose_dtype(args.dtype, args.device)
    run.rank, run.world = join(run.device)
    run.share = recipe.batch_size // run.world              # photos of a step for each process, in parts of micro
    run.micro = args.micro_batch or max(run.share, 1)
    run.parts = run.share // run.micro
    if run.parts * run.micro * run.world != recipe.batch_size:
        raise Quit(f"--batch-size {recipe.batch_size} is not {run.world} processes x a whole number of "
                   f"--micro-batch {run.micro}")
    run.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    run.health = Health()
    run.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)        # the initial weights; everything later has generators of its own
    return run


def resume(run, settings):
    """Go on where the newest checkpoint in --out stopped, if there is one; say what is trained, where and how.

    settings: names of arguments that must then be the same; run.state: {name: module, optimizer or scaler} to be kept
    """
    run.settings = {k: getattr(run.args, k) for k in settings} | {"batch_size": run.recipe.batch_size}
    checkpoint = load_checkpoint(run.out, run.settings, run.args.moved, ["photos", *run.state])
    if checkpoint:
        run.step, run.photos = checkpoint["step"], checkpoint["photos"]
        run.origin = f"resumed from {run.out} at step {run.step}"
        for name, part in run.state.items():
            if isinstance(part, torch.nn.Module):       # of which only what learns was saved
                part.load_state_dict(checkpoint[name], strict=False)
            elif checkpoint[name]:                      # a scaler's is {} in another type
                part.load_state_dict(checkpoint[name])
    print(f"{run.origin}, on {run.device} in {str(run.dtype)[6:]}, {run.world} process{'es' * (run.world > 1)}")
    batch = f"batch {run.recipe.batch_size} = {run.world} x {run.parts} x {run.micro}"
    print(f"{count(run.params):,} parameters learn; {batch}; {run.recipe}")
    return checkpoint


def save_state(run, **more):
    """The first process writes a checkpoint: run.state, of models what learns."""
    if run.rank > 0:
        return
    state = {name: part.state_dict() for name, part in run.state.items()}
    for name in {"model", "ema"} & state.keys():
        state[name] = {k: v for k, v in state[name].items() if run.learns(k)}
    save_checkpoint(run.out, run.step, run.args.keep, settings=run.settings, photos=run.photos, **state, **more)


def backward(run, compute, *inputs):
    """One part of the batch, its losses added to run.sums -> what compute returns beside {name: loss}"""
    with autocast(run.device, run.dtype):
        terms, *others = compute(*inputs)
    run.scaler.scale(sum(terms.values()) / run.parts).backward()
    for name, loss in terms.items():
        run.sums[name] += loss.detach() / run.parts
    return others


def psnr(x, hq):
    """Mean PSNR over RGB in dB.  x, hq: (B, 3, H, W) in [-1, 1] -> float"""
    return float(-10 * ((x - hq) / 2).square().mean((1, 2, 3)).log10().mean())


def fit(run, terms, step, evaluate, save, title):
    """Steps until the end or a stop; a row of log.csv every 50, where it is due also evaluate, save and draw.

    terms: names of the losses, which step(run) adds to run.sums; evaluate(run) -> {column: value}, {title: pictures}
    """
    recipe, columns = run.recipe, ["step", *terms, "grad_norm", "lr", "seconds", "held_out", "psnr", *run.columns]
    table = Log(run.out / "log.csv", columns, run.step or -1) if run.rank == 0 else None
    if run.step == 0:
        with autocast(run.device, run.dtype):
            seen, _ = evaluate(run)
        if run.rank == 0:
            table.write(step=0, **seen)
    stop, clock, since = Stop(), time.time(), 0
    run.sums = dict.fromkeys(terms, 0.0)
    bar = tqdm(total=recipe.steps, initial=run.step, unit="step", dynamic_ncols=True, disable=run.rank > 0)
    run.model.train()
    while run.step < recipe.steps and not mean_of_all(bool(stop) or run.over, run.device):
        run.lr = learning_rate(run.step, recipe.steps, recipe.lr, recipe.schedule, recipe.warmup)
        step(run)
        run.step, since = run.step + 1, since + 1
        bar.update()
        bar.set_postfix({name: f"{x / since:.3f}" for name, x in run.sums.items()}, refresh=False)
        due = run.step % recipe.save_every == 0 or run.step == recipe.steps
        if not due and run.step % 50:
            continue
        row = {"step": run.step, "grad_norm": run.grad_norm, "lr": run.lr, "seconds": time.time() - clock}
        row |= {name: mean_of_all(x / since, run.device) for name, x in run.sums.items()}
        run.sums, since, clock = dict.fromkeys(terms, 0.0), 0, time.time()
        if due:
            with autocast(run.device, run.dtype):
                run.seen, pictures = evaluate(run)
            save(run)
            row |= run.seen
        if run.rank == 0:
            table.write(**row)
        if run.rank == 0 and due:
            tqdm.write(f"step {run.step}: " + ", ".join(f"{name} {x:.4f}" for name, x in run.seen.items()))
            table.draw(run.out / "loss.png", [*terms, "held_out"], title)
            if pictures:
                save_sheet(run.out / "sheet.png", {name: x[:6] for name, x in pictures.items()})
    bar.close()
    if run.step < recipe.steps and not run.over:
        run.seen = None
        save(run)
        print(f"\nstopped at step {run.step} and saved; the same command goes on from here")
    if several():
        dist.destroy_process_group()
