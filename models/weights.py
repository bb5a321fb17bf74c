"""Weight files: strict reading and safe writing, one line of explanation when something is wrong.

Only our own layout so far: one .safetensors file, the model's config as JSON in its metadata.
"""

import json
import os
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


def save_model(path, model, note=""):
    """Write model's tensors in float16 with its cfg (a dataclass) and a note as metadata.

    Written under a temporary name, then renamed. The rotary tables are left out: they follow from the config, and float16 would spoil them.
    """
    tensors = {k: v.half().contiguous().cpu() for k, v in model.state_dict().items() if "freqs_" not in k}
    part = f"{path}.part"
    save_file(tensors, part, metadata={"config": json.dumps(asdict(model.cfg)), "note": note})
    os.replace(part, path)


def read_model(path):
    """What `save_model` wrote -> config as a dict, tensors by name. Raises FileNotFoundError or ValueError, one line each."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model; name vosr-tiny, or the --out folder of train_vosr.py")
    try:
        with safe_open(path, framework="pt") as f:
            return json.loads(f.metadata()["config"]), load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise ValueError(f"{path}: is not a model that train_vosr.py wrote ({reason}); copy or train it again") from None


def load_strictly(module, tensors, path, may_miss=()):
    """Copy tensors into module; names the first missing, unexpected and mis-shaped one in a ValueError.

    may_miss: endings of names that the file need not hold.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in tensors and not k.endswith(tuple(may_miss))]
    unexpected = [k for k in tensors if k not in own]
    shapes = [f"{k} is {tuple(tensors[k].shape)}, not {tuple(own[k].shape)}" for k in own if k in tensors and tensors[k].shape != own[k].shape]
    faults = [f"{what} {found[0]} ({len(found)} in all)"
              for what, found in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes)) if found]
    if faults:
        raise ValueError(f"{path}: does not fit this network: {'; '.join(faults)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
