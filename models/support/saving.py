"""Checkpoints of a training: --out/checkpoint-STEP-HASH.pt.

Three things that public reports asked for (lost nights, moved disks): a full disk or a kill during a save loses
nothing, a damaged file is recognised by its hash and the one before it is taken, and a run goes on with photos that
lie elsewhere by now, if the user says --moved.
"""

import os
import sys
from pathlib import Path

import torch

from models.support.arguments import UserError
from models.support.download import sha256_of
from models.support.files import whole_file

UNFIT = ("{}: its checkpoint does not fit this network ({}), whose code has changed since; "
         "begin another --out, or take the change back")


# ---- write


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


# ---- read


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
        if name in ("data", "lq", "init") and then and now:       # folders, unless --init is a public name
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
        load_parts(run.state, checkpoint, run.out, run.learns)
    say_what_is_trained(run)
    return checkpoint


def say_what_is_trained(run):
    """Print what is trained, where and how, for the user."""
    processes = "1 process" if run.world == 1 else f"{run.world} processes"
    print(f"{run.title}: {run.origin}, on {run.device} in {str(run.dtype).removeprefix('torch.')}, {processes}")
    batch = f"batch {run.stage.batch_size} = {run.world} x {run.micro_batches} x {run.micro_batch}"
    if run.micro_batches > 1:
        images = "1 image" if run.micro_batch == 1 else f"{run.micro_batch} images"
        batch += f" (a step has {run.micro_batches} parts of {images} in each process)"
    print(f"{sum(p.numel() for p in run.trained):,} parameters learn; {batch}; {run.stage}")


def load_parts(parts, checkpoint, folder, learns):
    """Load what a checkpoint in folder holds of each part.  parts: {name: module, optimizer or scaler}

    learns: tells by its name whether a tensor of the model learns. Raises UserError where something does not fit.
    """
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            load_module(part, checkpoint[name], folder, learns if name in ("model", "ema") else None)
        elif checkpoint[name]:                      # a scaler's is {} in another type
            try:
                part.load_state_dict(checkpoint[name])
            except ValueError:      # an optimizer has other parameters
                raise UserError(UNFIT.format(folder, name)) from None


def load_module(module, tensors, folder, learns=None):
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
