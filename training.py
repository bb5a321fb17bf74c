"""What the three training scripts share: plain functions, nothing that hides a loop.

Set-up and precision, seeds, learning rate, exponential moving average, checkpoints, logs and pictures of progress.
"""

import csv
import math
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from models.imaging import contact_sheet, loss_curves, save_png


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
        sys.exit(f"{name}: out of device memory; lower --batch-size or raise --accumulate")


# ---- set-up ---------------------------------------------------------------------------------------------------------


def choose_device(name):
    """'auto' is the best one at hand -> torch.device."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(name, device):
    """'auto' is bfloat16 on CUDA and float32 elsewhere -> torch.dtype of the autocast region; weights stay float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def generator(*numbers):
    """A CPU generator seeded by numbers, e.g. (seed, rank, step): every step's randomness is a function of its number."""
    seed = 0
    for n in numbers:
        seed = (seed * 1_000_003 + n + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def count(parameters):
    return sum(p.numel() for p in parameters)


def trainable_groups(model, trained):
    """Optimizer's parameters of the trained modules; everything else in model is frozen.

    Raises AssertionError if a parameter is neither or both.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    params = [p for module in trained for name, p in module.named_parameters() if name != "mask_token"]
    for p in params:
        p.requires_grad_(True)
    assert len({id(p) for p in params}) == len(params), "a parameter is trained twice"
    assert count(params) == count(p for p in model.parameters() if p.requires_grad)
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

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt     # a second Ctrl-C does not wait
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


# ---- logs and pictures ----------------------------------------------------------------------------------------------


class Log:
    """log.csv: one row a call; rows of steps after a resumed checkpoint are dropped."""

    def __init__(self, path, columns, step):
        self.path, self.columns = Path(path), columns
        rows = [r for r in self.rows() if int(r["step"]) <= step]
        with open(self.path, "w", newline="") as f:
            csv.DictWriter(f, columns).writeheader()
            csv.DictWriter(f, columns).writerows(rows)

    def rows(self):
        if not self.path.exists():
            return []
        with open(self.path, newline="") as f:
            return list(csv.DictReader(f))

    def write(self, **row):
        with open(self.path, "a", newline="") as f:
            csv.DictWriter(f, self.columns).writerow({k: f"{v:.6g}" for k, v in row.items()})

    def draw(self, path, names, title):
        """Loss curves of the named columns as a PNG."""
        rows = self.rows()
        curves = {n: [(int(r["step"]), float(r[n])) for r in rows if r[n]] for n in names}
        loss_curves({n: tuple(zip(*c)) for n, c in curves.items() if len(c) > 1}, path, log_y=True, title=title)


def save_sheet(path, columns):
    """Contact sheet with one column per entry. columns: {title: (B, 3, H, W) in [-1, 1]}."""
    rows = [[x[i : i + 1].float().cpu().clamp(-1, 1) / 2 + 0.5 for x in columns.values()] for i in range(len(next(iter(columns.values()))))]
    save_png(contact_sheet(rows, list(columns)), path)
