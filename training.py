"""What the three training scripts share: plain functions, nothing that hides a loop.

Set-up and precision, several processes, seeds, learning rate, exponential moving average, checkpoints, logs and pictures of progress.
"""

import math
import os
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from models.charts import Log  # noqa: F401: scripts say training.Log
from models.imaging import contact_sheet, save_png
from models.photos import Photos, list_photos


class Quit(Exception):
    """An error of the user's; its message is one line."""


@contextmanager
def one_line_errors(name):
    """Turn the errors a user can cause into one line on stderr and exit status 1."""
    try:
        yield
    except (Quit, FileNotFoundError, NotADirectoryError, PermissionError, ValueError) as e:
        sys.exit(f"{name}: {str(e).strip().splitlines()[-1]}")     # a loader's worker wraps its error in a traceback
    except torch.OutOfMemoryError:
        sys.exit(f"{name}: out of device memory; lower --micro-batch, or add --checkpointing")


# ---- set-up ---------------------------------------------------------------------------------------------------------


def choose_device(name):
    """'auto' is the best one at hand -> torch.device."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))      # torchrun numbers the processes of a machine
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(name, device):
    """'auto' is bfloat16 on CUDA and float32 elsewhere -> torch.dtype of the autocast region; weights stay float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


# ---- several processes ----------------------------------------------------------------------------------------------


def join(device):
    """Join the processes that torchrun started; all but the first fall silent -> rank, number of processes (0, 1 without torchrun)."""
    if "RANK" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_of_all(x, device):
    """The mean of a number over the processes."""
    if not dist.is_initialized():
        return x
    x = torch.tensor(float(x), device=device)
    dist.all_reduce(x)
    return x.item() / dist.get_world_size()


class Replicate(torch.nn.Module):
    """A function of a model, as the module whose forward DistributedDataParallel wants to be called."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.forward = model, function


def replicate(model, function, device):
    """function, whose backward now also averages the gradients of model over the processes, each of which holds all of it (DDP)."""
    module = Replicate(model, function)
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def shard(module, device):
    """Spread a transformer's weights, gradients and optimizer state over the processes (FSDP2); a block is whole only while it computes."""
    from torch.distributed.fsdp import fully_shard      # torch >= 2.6

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")    # about in-place changes to it, which we do not make
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*module.blocks, module):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)    # the outermost too, or its EMA would stay whole after an evaluation


def whole(x):
    """A tensor with the pieces of all processes, all of which must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gather(state):
    """A state dict with whole tensors on the CPU of the first process; all must call it, and the others get None for tensors."""
    if isinstance(state, dict):
        return {k: gather(v) for k, v in state.items()}
    if not torch.is_tensor(state):
        return state
    x = whole(state)
    return None if dist.is_initialized() and dist.get_rank() > 0 else x.cpu()


def scatter(tensor, like):
    """The opposite of `whole`: this process's piece where `like` is sharded."""
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


# ---- photos ---------------------------------------------------------------------------------------------------------


def divide(batch_size, micro_batch, world):
    """How a step's photos are computed: a share for each process, in parts of micro -> share, micro, parts. Raises Quit."""
    share = batch_size // world
    micro = micro_batch or max(share, 1)
    if share * world != batch_size or share % micro:
        raise Quit(f"--batch-size {batch_size} is not {world} processes x a whole number of --micro-batch {micro}")
    return share, micro, share // micro


def photos_for(data, crop, seed, **options):
    """Photos to train on, and crops (16, 3, crop, crop) in [0, 1] of the every 30th that is held out. Raises Quit."""
    files = list_photos(data)
    held_out = dict.fromkeys(list(dict.fromkeys(files))[::30])      # of photos that a list repeats, all copies
    files = [f for f in files if f not in held_out]
    if not files:
        raise Quit(f"{data}: one photo only; every 30th is held out, so at least two are needed")
    test = Photos(data, crop, shrink=options.get("shrink", False), files=held_out)
    return Photos(data, crop, seed=seed, files=files, **options), torch.stack([photo for photo, _ in zip(test, range(16))])


def batches(photos, steps, batch_size, rank, share, micro, workers, device):
    """This process's photos of the steps in a range, as many at a time as it computes at once -> iterator of (micro, 3, crop, crop)"""
    mine = (step * batch_size + rank * share + i for step in steps for i in range(share))
    return iter(DataLoader(photos, batch_size=micro, sampler=mine, num_workers=workers, pin_memory=device.type == "cuda"))


# ---- seeds, parameters, schedules -----------------------------------------------------------------------------------


def generator(*numbers):
    """A CPU generator seeded by numbers, e.g. (seed, rank, step): every step's randomness is a function of its number."""
    seed = 0
    for n in numbers:
        seed = (seed * 1_000_003 + n + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def count(parameters):
    return sum(p.numel() for p in parameters)


def freeze_all_but(model, params):
    """Let params learn and nothing else in model -> params. Raises AssertionError if one is not in model, or twice in params."""
    model.requires_grad_(False)
    for p in params:
        p.requires_grad_(True)
    assert len({id(p) for p in params}) == len(params), "a parameter is trained twice"
    assert count(params) == count(p for p in model.parameters() if p.requires_grad), "a parameter is not the model's"
    return params


def learning_rate(step, steps, lr, schedule="constant", warmup=0):
    """Learning rate of a step: linear warm-up, then constant or a cosine to 2 % of lr."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    progress = (step - warmup) / max(steps - warmup, 1)
    return lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1))))


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, over the trained parameters; buffers are copied."""
    for e, p in zip(ema.parameters(), model.parameters()):
        if p.requires_grad:
            e.lerp_(p, 1 - decay)
    for e, b in zip(ema.buffers(), model.buffers()):
        e.copy_(b)


class Stop:
    """True once Ctrl-C or SIGTERM came: the loop then finishes its step, saves and says how to go on."""

    def __init__(self):
        self.asked = False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.ask)

    def ask(self, number, _):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt     # a second Ctrl-C does not wait; torchrun follows the first with SIGTERM, which does
        self.asked = True

    def __bool__(self):
        return self.asked


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(path, **state):
    """Write a checkpoint under a temporary name, then rename it: the old one survives any interruption."""
    part = Path(f"{path}.part")
    torch.save(state, part)
    os.replace(part, path)


def load_checkpoint(path, must_match):
    """Read a checkpoint, or None if there is none.

    must_match: settings of this run that may not differ from those of the interrupted one. Raises Quit naming the first that does.
    """
    if not Path(path).exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in must_match.items():
        if state["settings"].get(name) != value:
            raise Quit(f"{path}: was written with {name} {state['settings'].get(name)}, not {value}; use that or another --out")
    return state


def load_tensors(module, tensors):
    """Put a checkpoint's tensors into a module, of which it may hold a part, whatever the number of processes now and then."""
    own = module.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(scatter(tensor, own[name]))


def load_optimizer(optimizer, state):
    """The same for an optimizer."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, tensors in state["state"].items():
        tensors |= {k: scatter(v, params[i]) for k, v in tensors.items() if v.shape == params[i].shape}
    optimizer.load_state_dict(state)


# ---- pictures of progress ---------------------------------------------------------------------------------------------


def save_sheet(path, columns):
    """Contact sheet with one column per entry. columns: {title: (B, 3, H, W) in [-1, 1]}."""
    rows = [[x[i : i + 1].float().cpu().clamp(-1, 1) / 2 + 0.5 for x in columns.values()] for i in range(len(next(iter(columns.values()))))]
    save_png(contact_sheet(rows, list(columns)), path)
