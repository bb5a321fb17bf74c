"""Weight files: the table of public ones, fetching them, strict reading, safe writing.

A public file has one name, in code and below our cache folder ($NANOSR_CACHE or ~/.cache/nanosr), where it can also be
put by hand. VOSR's are the paths of the authors' own release folder.
"""

import json
import mmap
import os
import re
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_parameter_registration_hook

from models.support.download import WeightError, address, download
from models.support.files import whole_file

WRAPPERS = {"module", "_orig_mod", "ema_model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
COUNTERS = {"n_averaged", "step_count", "decay", "initted", "step", "num_updates"}
MOST, LARGEST = 5_000, 1_000_000    # tensors of a network (ours have up to 2,700), a number in a config
MODELS = Path(__file__).parents[1]
PRIOR = MODELS / "prior_tiny.safetensors"       # around which the tiny S3Diff and GramSR learn
EMBEDDED = {f"{name}-tiny": MODELS / f"{name}_tiny.safetensors" for name in ("vosr", "s3diff", "gramsr")}


# ---- the public files


@dataclass(frozen=True)
class PublicFile:
    """A row of assets/weights.json."""

    name: str                   # also its path below our cache folder
    sources: tuple              # in this order: "owner/repository:path" at Hugging Face, or URLs
    users: str
    licence: str                # of the weights, as their authors state it
    size: int | None = None
    sha256: str | None = None
    gated: bool = False         # the hub wants an account that has accepted the licence
    note: str = ""              # where to look for what has no source


TABLE = MODELS.parent / "assets" / "weights.json"
FILES = {row["name"]: PublicFile(**row) for row in json.loads(TABLE.read_text(encoding="utf-8"))}


def cache_folder():
    return Path(os.environ.get("NANOSR_CACHE") or "~/.cache/nanosr").expanduser().absolute()


def hub_folder():
    """Where huggingface_hub keeps what it downloaded."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser().absolute()


def locate(name):
    """A public file on this disk -> Path or None. What has another size is not it."""
    file, paths = FILES[name], []
    for repository, _, path in (source.partition(":") for source in file.sources if "://" not in source):
        folder = hub_folder() / f"models--{repository.replace('/', '--')}"
        with suppress(OSError):
            paths.append(folder / "snapshots" / (folder / "refs" / "main").read_text().strip() / path)
    paths.append(cache_folder() / name)
    return next((path for path in paths if path.is_file() and file.size in (None, path.stat().st_size)), None)


def list_weights():
    """Print the table: where each file is, or would come from."""
    found = {name: locate(name) for name in FILES}
    for name, file in FILES.items():
        mark, size = "x" if found[name] else " ", f"{file.size:,} bytes" if file.size else ""
        print(f"[{mark}] {name:66} {size:>19}  {file.users:22} {file.licence}{', gated' * file.gated}")
        print(f"    {found[name] or next(map(address, file.sources), f'by hand only: {file.note}')}")
    print(f"{sum(map(bool, found.values()))} of {len(FILES)} present in {hub_folder()} or {cache_folder()}; "
          "vosr-tiny needs none of them")


def fetch(name, sleep=time.sleep):
    """A public file, from this disk or else downloaded -> Path. Raises WeightError: where to put it by hand."""
    if path := locate(name):
        return path
    file, target, failures = FILES[name], cache_folder() / name, []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(cache_folder() / ".lock", "w") as lock:
            with suppress(ImportError, OSError):    # Windows, or a file system without locks
                import fcntl
                fcntl.flock(lock, fcntl.LOCK_EX)    # of the ranks of a run one downloads, the others wait
            if path := locate(name):
                return path
            if target.exists():
                raise WeightError(f"{target}: is not the public file, which has {file.size} bytes; delete it")
            for source in file.sources:
                try:
                    return download(source, target, file, sleep)
                except WeightError as e:
                    failures.append(f"{address(source)}: {e}")
    except OSError as e:
        raise WeightError(f"{name}: cannot be stored: {e}; make room, or name another folder in NANOSR_CACHE") from None
    why = "; ".join(failures) or f"by hand only: {file.note}"
    raise WeightError(f"{name}: cannot be downloaded ({why}); put it at {target} yourself")


def nearby(name, folder):
    """A public file from folder (or None), where it has the same name, or else by `fetch`."""
    path = folder and folder / name
    return path if path and path.is_file() else fetch(name)


# ---- files of any origin

noted = []      # every weight file that was read; sample.py names them in its tables


def read_json(path):
    """Settings by name -> dict. Raises WeightError."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise WeightError(f"{path}: cannot be read as JSON ({e}); get it again") from None
    if not isinstance(settings, dict):
        raise WeightError(f"{path}: holds a {type(settings).__name__}, not settings by name; get it again")
    return settings


def is_plain(x):
    """Whether no tensor in x is expanded from a few numbers, or sparse."""
    if isinstance(x, torch.Tensor):
        dense = x.layout == torch.strided and not x.is_meta
        return dense and x.numel() * x.element_size() <= x.untyped_storage().nbytes()
    return all(map(is_plain, x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()))


def read_pickle(path):
    """torch.load, which runs no code of the file, without its ways for a small file to fill the memory."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as file:
        sound = file.find(b"bytearray") < 0     # torch would make one as long as the pickle says; a GB takes a second
    if zipfile.is_zipfile(path):                # torch.save does not compress
        sound &= sum(entry.file_size for entry in zipfile.ZipFile(path).infolist()) <= os.path.getsize(path)
    if not sound or not is_plain(content := torch.load(path, map_location="cpu", weights_only=True)):
        raise ValueError
    return content


def read_file(path):
    """A .safetensors file, or a pickle of torch that would run no code -> dict. Raises WeightError."""
    if not os.path.isfile(path):
        raise WeightError(f"{path}: no such file")
    noted.append(path)
    try:
        tensors = load_file(path) if Path(path).suffix == ".safetensors" else read_pickle(path)
    except Exception as e:      # torch raises nearly anything at a wrong file
        raise WeightError(f"{path}: is broken, or holds more than tensors and may run code ({type(e).__name__}); "
                          "get it again") from None
    if not isinstance(tensors, dict):
        raise WeightError(f"{path}: holds a {type(tensors).__name__}, not a dict of tensors")
    return tensors


def read_tensors(path):
    """`read_file` less what DDP, compile and averaging add to the bare model, which a line says."""
    left_out = set()

    def unwrapped(tensors):
        found = {}
        for name, x in tensors.items():
            *parts, last = str(name).split(".")
            single = isinstance(x, (int, float)) or torch.is_tensor(x) and x.numel() == 1
            if last in COUNTERS and single or "online_model" in parts:      # of which ema_model is the average
                left_out.add("online_model." if "online_model" in parts else last)
                continue
            left_out.update(f"{part}." for part in WRAPPERS.intersection(parts))
            bare = ".".join([part for part in parts if part not in WRAPPERS] + [last])
            if bare in found:
                raise WeightError(f"{path}: holds {bare:.200} twice, with a prefix and without; leave one of them")
            found[bare] = unwrapped(x) if isinstance(x, dict) else x
        return found

    tensors = unwrapped(read_file(path))
    if left_out:
        print(f"{path}: {', '.join(sorted(left_out))} left out, of how the model was trained and not of the model")
    return tensors


def find_weights(path):
    """The .safetensors file that a file or folder means, in VOSR's official order -> Path or None"""
    if path.is_file():
        return path
    likely = [path / folder / f"{name}.safetensors" for folder in ("clean_weights", "checkpoints", ".")
              for name in ("ema_model", "model")]
    return next(filter(Path.is_file, likely + sorted(path.rglob("*.safetensors"))), None)


def find_args(path):
    """VOSR's args.json in the folder path (or of the file path) or one of the four above it -> Path or None"""
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    return next(filter(Path.is_file, (f / "args.json" for f in (folder, *folder.parents[:4]))), None)


# ---- our own models


def save_model(path, cfg, tensors, note=""):
    """Write a model's tensors in float16 with its cfg (a dataclass) and a note."""
    # not the rotary tables: they follow from the config, and float16 would spoil them
    tensors = {k: v.half().contiguous() for k, v in tensors.items() if "freqs_" not in k}
    with whole_file(path, f"{path}.part") as part:
        save_file(tensors, part, metadata={"config": json.dumps(asdict(cfg)), "note": note})


def save_release(folder, tensors, settings):
    """Write a transformer's tensors, in float32, and args.json as VOSR's authors do."""
    target = Path(folder, "checkpoints", "ema_model.safetensors")
    with whole_file(Path(folder, "args.json")) as part:
        part.write_text(json.dumps(settings, indent=2))
    with whole_file(target, f"{target}.part") as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part)


def read_config(path):
    """The config that `save_model` wrote into a file -> dict, {} of any other file"""
    with suppress(OSError, SafetensorError, ValueError, RecursionError):
        if path.is_file():
            with safe_open(path, framework="pt") as f:
                config = json.loads((f.metadata() or {}).get("config", "{}"))
            return config if isinstance(config, dict) else {}
    return {}


def find_ours(name):
    """An embedded model by its name, a .safetensors file, or model.safetensors in a folder -> Path or None"""
    path = EMBEDDED.get(str(name)) or Path(name)
    path = path / "model.safetensors" if path.is_dir() else path
    return path if path.suffix == ".safetensors" and path.is_file() else None


def read_foundation():
    """What the tiny S3Diff and GramSR learned around: the prior, and the autoencoder, which VOSR's file holds."""
    vae = {k: v for k, v in read_tensors(EMBEDDED["vosr-tiny"]).items() if k.startswith("vae.")}
    return vae | read_tensors(PRIOR)


def load_ours(system, settings, path):
    """The system (a class) that `save_model` wrote. settings: class of its config. Raises WeightError."""
    config, tensors = read_config(path), read_tensors(path)
    if path in (EMBEDDED["s3diff-tiny"], EMBEDDED["gramsr-tiny"]):
        tensors = read_foundation() | tensors
    with on_paper(path, system.__name__):
        model = system(checked(settings.from_dict(config)))
    load_strictly(model, tensors, path, may_miss=("freqs_cos", "freqs_sin"))
    return model


def load_public(system, cfg, networks, folder, source):
    """The system (a class) around public networks; what learns around them has no numbers, on the meta device.

    networks: {attribute: public file, in folder or else fetched}; source: the file cfg is from. Raises WeightError.
    """
    with on_paper(source, system.__name__):     # before gigabytes are fetched
        model = system(checked(cfg))
    for name, file in networks.items():
        network, path = getattr(model, name), nearby(file, folder)
        load_strictly(network, read_tensors(path), path, [k for k in network.state_dict() if "lora_" in k])
    return model


@contextmanager
def laid_out_as(name, path):
    """In here a file's dict is taken apart as the public one of that name. Raises WeightError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        wrong = f"{type(e).__name__}: {e}"
        raise WeightError(f"{path}: is not laid out as {name} ({wrong}); get it again") from None


class Unfilled(torch.overrides.TorchFunctionMode):
    """In here tensors stay as they are: torch imports its compiler, for seconds, to fill one that has no numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.nn.init.normal_, torch.Tensor.normal_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@contextmanager
def on_paper(path, system):
    """In here networks are built as a file says, without numbers and with MOST parameters. Raises WeightError.

    So a layer of 10^9 channels costs nothing, and fits no tensors afterwards; 10^9 layers would take days.
    """
    made = count(1)

    def limit(*_):
        if next(made) > MOST:
            raise ValueError(f"it asks for more than {MOST} parameters")

    hook = register_module_parameter_registration_hook(limit)
    try:
        with torch.device("meta"), Unfilled():
            yield
    except Exception as e:
        reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        raise WeightError(f"{path}: its config is not one of {system} ({reason}); get it again") from None
    finally:
        hook.remove()


def checked(cfg):
    """A config (a dataclass), if its values have their fields' types and sane sizes. Raises ValueError."""
    for f in fields(cfg):
        value, kind = getattr(cfg, f.name), {float: float | int, tuple: tuple | list}.get(f.type, f.type)
        if not isinstance(value, kind) or isinstance(value, (str, list, tuple, dict)) and len(value) > 1000:
            raise ValueError(f"{f.name} is {value!r:.60}")
        value = checked(value) if is_dataclass(value) else [*value.values()] if isinstance(value, dict) else value
        for x in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(x, (int, float)) and not (0 if isinstance(x, int) else -LARGEST) <= x <= LARGEST:
                raise ValueError(f"{f.name} is {x:.6g}")
    return cfg


def load_strictly(module, tensors, path, may_miss=()):
    """Make tensors the module's own, as they are (dtype, device), through its load hooks.

    may_miss: endings of names that the file need not hold. Raises WeightError: what is missing, unexpected, mis-shaped.
    """
    own = module.state_dict()
    if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()):
        raise WeightError(f"{path}: holds other things than tensors by name; get it again")
    for name, wanted in own.items():
        if (real := wanted.is_floating_point()) != tensors.get(name, wanted).is_floating_point():
            raise WeightError(f"{path}: {name} holds no {'real' if real else 'whole'} numbers; get it again")
    given = {k: v for k, v in own.items() if k.endswith(tuple(may_miss))} | tensors
    try:
        module.load_state_dict(given, assign=True)
    except RuntimeError as e:
        text = str(e)       # one line for all missing names, one for the unexpected ones, one a tensor for shapes
        shapes = re.findall(r"size mismatch for (\S+): .*?\[(.*?)\].*?\[(.*?)\]", text)
        found = {kind.lower(): re.findall('"(.+?)"', "".join(re.findall(f".*{kind} key.*", text)))
                 for kind in ("Missing", "Unexpected")}
        found["mis-shaped"] = [f"{name} is ({theirs}), not ({ours})" for name, theirs, ours in shapes]
        faults = "; ".join(f"{kind} {names[0]:.200} ({len(names)} in all)" for kind, names in found.items() if names)
        raise WeightError(f"{path}: does not fit this network: {faults or text.splitlines()[-1].strip()}") from None
