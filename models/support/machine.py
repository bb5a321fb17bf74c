"""Where a model is computed: device, precision, compiler, several processes."""

import argparse
import os
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


# ---- device and precision


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

    name: 'auto' is `best` on CUDA, but float16 in place of bfloat16 on cards that only emulate that, such as T4, V100
    and RTX 20, and float32 elsewhere; 'tf32' (of sample.py) is float32 whose products a GPU rounds to 10 bits. Trap:
    cudnn rounds them unasked, so for trainings, too, this is switched off -> torch.dtype
    """
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    if name == "auto":
        name = best if device.type == "cuda" else "float32"
        if name == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = "float16"
    return torch.float32 if name == "tf32" else getattr(torch, name)


def autocast(device, dtype):
    """In here large products are computed in dtype."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


# ---- compiler


def on_device(g, device):
    """Say where noise is drawn: by g on a CPU; on a GPU there, from the same seed, or each draw would be sent."""
    if device.type == "cpu":
        return g
    return torch.Generator(device).manual_seed(g.initial_seed())


def compile_all(networks, device):
    """Let torch.compile compile networks; where nothing can be compiled, a line says so instead."""
    reason = why_not_compile(device)
    if reason:
        print(f"--compile is left out, it cannot be done here ({reason})", file=sys.stderr)
        return
    for network in networks:
        network.compile()


def why_not_compile(device):
    """Say why torch.compile does not work here, "" if it does.

    Whether there is a compiler shows only when something is compiled, and torch keeps what it has compiled on the disk,
    from where it comes without a compiler. So a small function is compiled for a size that surely nobody had before.
    """
    new_size = 2 + time.time_ns() % 10_007
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(new_size, device=device))
    except Exception as e:      # without a compiler, without Triton, on a card or a Python that it does not know
        return (str(e).strip() or type(e).__name__).splitlines()[0][:200]
    return ""


# ---- several processes, each with a copy of the model: torchrun, DDP


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


def leave():
    """End what `join` began, if it did."""
    if is_distributed():
        dist.destroy_process_group()


def is_distributed():
    """Tell whether torchrun started this; some builds of torch have no distributed at all."""
    return dist.is_available() and dist.is_initialized()


def mean_over_processes(x, device):
    """Average a number over the processes -> number"""
    if not is_distributed():
        return x
    total = torch.tensor(float(x), device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


class Forward(torch.nn.Module):
    """A function of a model, made the forward of a module: DDP wraps modules, and calls nothing but their forward."""

    def __init__(self, model, function):
        super().__init__()
        self.model = model          # whose parameters DDP finds here
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def replicate(run, model, function):
    """Make a function of model one whose backward also averages model's gradients over the processes, by DDP.

    One process needs no average: it gets the function as it is.
    """
    if run.world == 1:
        return function
    on_cuda = run.device.type == "cuda"
    return DistributedDataParallel(Forward(model, function), device_ids=[run.device.index] if on_cuda else None)


def gradients_stay_here(function):
    """In here backward after a function of `replicate` averages no gradients: DDP decides so in the forward pass."""
    if isinstance(function, DistributedDataParallel):
        return function.no_sync()
    return nullcontext()
