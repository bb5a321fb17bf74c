"""Weight files: the table of public ones, fetching them, strict reading, safe writing.

A public file has one name, in code and below our cache folder ($NANOSR_CACHE or ~/.cache/nanosr), where it can also be
put by hand. VOSR's are the paths of the authors' own release folder. NAME.checked records the hash that NAME had, with
its size and time, so that gigabytes are hashed once.
"""

import json
import os
import re
import stat
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from models.support.download import WeightError, address, download, hub_home, sha256_of, without_links
from models.support.files import whole_file

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}    # in names of wrapped models
MODELS = Path(__file__).parents[1]
PRIOR = MODELS / "prior_tiny.safetensors"       # around which the tiny S3Diff and GramSR learn
OLD_SYSTEMS = {"s3diff": "r_unet", "gramsr": "ranks", "vosr": "dit"}     # and a setting that no other has
# fields of configs in files of ours that are gone since
OLD_SETTINGS = ("crisp", "finish", "precondition", "torch_bicubic", "stablesr", "start_noise")
EMBEDDED = {f"{name}-tiny": MODELS / f"{name}_tiny.safetensors" for name in ("vosr", "s3diff", "gramsr")}


# ---- the public files


@dataclass(frozen=True)
class PublicFile:
    """A row of assets/weights.json."""

    name: str                   # also its path below our cache folder
    sources: tuple              # in this order: "owner/repository:path" at Hugging Face, or URLs
    users: tuple                # names that --model takes, and training scripts
    licence: str                # of the weights, as their authors state it
    size: int | None = None     # bytes
    about: int | None = None    # bytes of its tensors, where nobody published its size
    sha256: str | None = None   # None: nobody published one, and the first file that comes is what later ones should be
    gated: bool = False         # the hub wants an account that has accepted the licence
    note: str = ""


TABLE = MODELS.parent / "assets" / "weights.json"
FILES = {row["name"]: PublicFile(**row) for row in json.loads(TABLE.read_text(encoding="utf-8"))}


def cache_folder():
    return Path(os.environ.get("NANOSR_CACHE") or "~/.cache/nanosr").expanduser().absolute()


def hub_folder():
    """Where huggingface_hub keeps what it downloaded."""
    return Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub").expanduser().absolute()


def locate(name):
    """A public file on this disk, recognised by its size -> Path or None"""
    file, paths = FILES[name], []
    for repository, _, path in (source.partition(":") for source in file.sources if "://" not in source):
        folder = hub_folder() / f"models--{repository.replace('/', '--')}"
        with suppress(OSError):
            paths.append(folder / "snapshots" / (folder / "refs" / "main").read_text().strip() / path)
    paths.append(cache_folder() / name)
    return next((path for path in paths if path.is_file() and file.size in (None, path.stat().st_size)), None)


def state_of(path):
    """What changes with a file's contents, and need not be read from them."""
    return {"path": str(path), "size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}


def read_record(name):
    """What `check` recorded of a public file: its state, sha256 -> dict, {} if nothing"""
    with suppress(WeightError):
        return read_json(cache_folder() / f"{name}.checked")
    return {}


def is_checked(file, path):
    """Whether the hash of this very file is recorded, and right."""
    record = read_record(file.name)
    return state_of(path).items() <= record.items() and file.sha256 in (None, record.get("sha256"))


def check(file, path, sha256):
    """Compare a public file's hash with the published one, or with what was here before, and record it.

    Raises WeightError, OSError.
    """
    if file.sha256 not in (None, sha256):
        raise WeightError(f"{path}: is not the public file, whose SHA-256 is {file.sha256}, not {sha256}; delete it")
    before = read_record(file.name).get("sha256", sha256)
    if before != sha256:
        print(f"{path}: is another file than the one that was here before (SHA-256 {sha256}, then {before})")
    record = cache_folder() / f"{file.name}.checked"
    record.parent.mkdir(parents=True, exist_ok=True)
    with open(record, "w", encoding="utf-8", opener=without_links) as f:
        json.dump(state_of(path) | {"sha256": sha256}, f)


@contextmanager
def locked_cache():
    """Of several processes one is in here, the others wait. Raises OSError."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / ".lock", "a", opener=without_links) as lock:
        with suppress(ImportError, OSError):    # Windows, or a file system without locks
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(name, sleep=time.sleep):
    """A public file, from this disk or else downloaded, checked once -> Path. Raises WeightError: what to do."""
    file, path = FILES[name], locate(name)
    if path and is_checked(file, path):
        return path
    try:
        with locked_cache():
            path = locate(name)
            if not path:
                return download_any(file, cache_folder() / name, sleep)
            if not is_checked(file, path):
                check(file, path, sha256_of(path))
    except OSError as e:
        if not path:
            raise WeightError(f"{name}: cannot be stored: {e}; "
                              "make room, or name another folder in NANOSR_CACHE") from None
    return path     # also where nothing can be recorded: in a cache that others filled


def download_any(file, target, sleep):
    """A public file from the first source that has it -> target. Raises WeightError, OSError."""
    if target.exists():
        raise WeightError(f"{target}: is not the public file, which has {file.size} bytes; delete it")
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for source in file.sources:
        try:
            sha256 = download(source, target, file, sleep)
        except WeightError as e:
            failures.append(f"{address(source)}: {e}")
            continue
        terms = f"{file.licence}, wherever it comes from" if file.gated else file.licence
        print(f"{file.name}: {target.stat().st_size:,} bytes from {address(source)}; licence: {terms}")
        check(file, target, sha256)
        return target
    by_hand = f"put it at {target} yourself"
    if file.note:
        by_hand += f" ({file.note})"
    raise WeightError(f"{file.name}: cannot be downloaded ({'; '.join(failures)}); {by_hand}")


def variant(name, dtype):
    """A public file's name, or that of its float16 variant where dtype is float16 and the full one is not here."""
    half = name.replace(".safetensors", ".fp16.safetensors")
    return half if dtype == torch.float16 and half in FILES and not locate(name) else name


def find_or_fetch(name, folder, dtype=torch.float32):
    """A public file from folder (or None), where it has the same name, or else by `fetch`; dtype: see `variant`."""
    for path in (folder / name, folder / variant(name, dtype)) if folder else ():
        if path.is_file():
            return path
    return fetch(variant(name, dtype))


def list_weights():
    """Print the table: where each file is, and where it comes from."""
    found = {name: locate(name) for name in FILES}
    for name, file in FILES.items():
        mark = "x" if found[name] else " "
        print(f"[{mark}] {name}: {size_in_words(file)}, for {', '.join(file.users)}; licence: {file.licence}")
        if found[name]:
            print(f"      here: {found[name]}, {hash_in_words(file, found[name])}")
        for source in file.sources:
            gate = " (for accounts that have accepted the licence)" if file.gated and "://" not in source else ""
            print(f"      from {address(source)}{gate}")
        if file.note:
            print(f"      {file.note}")
    print(f"{sum(map(bool, found.values()))} of {len(FILES)} present in {hub_folder()} or {cache_folder()}; "
          "vosr-tiny, s3diff-tiny and gramsr-tiny need none")


def size_in_words(file):
    if file.size:
        return f"{file.size:,} bytes"
    return f"about {file.about / 1e6:,.0f} MB" if file.about else "a few kB"


def hash_in_words(file, path):
    """How far the hash of a file that is here was checked."""
    if not is_checked(file, path):
        return "not checked yet"
    return "SHA-256 as published" if file.sha256 else f"SHA-256 {read_record(file.name)['sha256']}, none is published"


def fetch_all(user, dtype=torch.float32):
    """`fetch` what a model or a training script needs, a line for each file -> exit status. Raises WeightError."""
    names = [name for name, file in FILES.items() if user in file.users and ".fp16." not in name]
    if not names:
        users = sorted({user for file in FILES.values() for user in file.users})
        raise WeightError(f"--fetch: {user} needs no public file, or is none of {', '.join(users)}")
    paths = {}
    for name in (variant(name, dtype) for name in names):
        try:
            paths[name] = fetch(name)
        except WeightError as e:
            print(e, file=sys.stderr)
            continue
        print(f"{paths[name]}: {paths[name].stat().st_size:,} bytes, {hash_in_words(FILES[name], paths[name])}")
    total = sum(path.stat().st_size for path in paths.values())
    print(f"{user}: {len(paths)} of {len(names)} files are here, {total:,} bytes")
    return int(len(paths) < len(names))


# ---- files of any origin

files_read = []     # every weight file; sample.py names them in its tables


def read_json(path):
    """Settings by name -> dict. Raises WeightError."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise WeightError(f"{path}: cannot be read as JSON ({e}); get it again") from None
    if not isinstance(settings, dict):
        raise WeightError(f"{path}: holds a {type(settings).__name__}, not settings by name; get it again")
    return settings


def read_file(path):
    """A .safetensors file, or a pickle of torch that would run no code -> dict. Raises WeightError."""
    if not os.path.isfile(path):
        raise WeightError(f"{path}: no such file")
    files_read.append(path)
    try:
        if Path(path).suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:      # torch raises nearly anything at a wrong file
        raise WeightError(f"{path}: is broken, or holds more than tensors and may run code ({type(e).__name__}); "
                          "get it again") from None
    if not isinstance(tensors, dict):
        raise WeightError(f"{path}: holds a {type(tensors).__name__}, not a dict of tensors")
    return tensors


def read_tensors(path):
    """`read_file`, with the names of the bare model: DDP, compile and averaging put WRAPPERS into them."""
    def unwrapped(tensors):
        found = {}
        for name, x in tensors.items():
            parts = [part for part in str(name).split(".") if part not in WRAPPERS]
            if parts[-1:] != ["n_averaged"]:    # which torch's AveragedModel counts
                found[".".join(parts)] = unwrapped(x) if isinstance(x, dict) else x
        return found

    return unwrapped(read_file(path))


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


def save_tensors(path, tensors, metadata=None):
    """A .safetensors file with the mode of any new file, and the same bytes for the same contents."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata)
    path.chmod(mode)        # the library's is 0600
    if not metadata:
        return
    with open(path, "r+b") as f:        # the library's order of metadata is random
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        f.seek(8)
        f.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


def save_model(path, cfg, tensors, note=""):
    """Write a model's tensors in float16 with its cfg (a dataclass), a note, and the name of its system.

    The name is that of cfg's class: VOSRConfig's is vosr.
    """
    # not the rotary tables: they follow from the config, and float16 would spoil them
    tensors = {k: v.half().contiguous() for k, v in tensors.items() if "freqs_" not in k}
    system = type(cfg).__name__.removesuffix("Config").lower()
    metadata = {"system": system, "config": json.dumps(asdict(cfg)), "note": note}
    with whole_file(path, f"{path}.part") as part:
        save_tensors(part, tensors, metadata)


def save_release(folder, tensors, settings):
    """Write a transformer's tensors, in float32, and args.json as VOSR's authors do."""
    target = Path(folder, "checkpoints", "ema_model.safetensors")
    with whole_file(Path(folder, "args.json")) as part:
        part.write_text(json.dumps(settings, indent=2))
    with whole_file(target, f"{target}.part") as part:
        save_tensors(part, {k: v.contiguous() for k, v in tensors.items()})


def read_metadata(path):
    """What `save_model` wrote into a file beside tensors -> dict of str, {} of any other file"""
    with suppress(OSError, SafetensorError):
        if path.is_file():
            with safe_open(path, framework="pt") as f:
                return f.metadata() or {}
    return {}


def read_config(path):
    """The config that `save_model` wrote into a file, without OLD_SETTINGS -> dict, {} of any other file"""
    with suppress(ValueError, RecursionError):
        config = json.loads(read_metadata(path).get("config", "{}"), object_hook=without_old_settings)
        return config if isinstance(config, dict) else {}
    return {}


def without_old_settings(config):
    return {name: value for name, value in config.items() if name not in OLD_SETTINGS}


def read_system(path):
    """The name of the system whose model `save_model` wrote -> vosr, s3diff, gramsr, ...; None of any other file"""
    if system := read_metadata(path).get("system"):
        return system
    settings = read_config(path)        # of files from before the name was written
    system = next((name for name, setting in OLD_SYSTEMS.items() if setting in settings), None)
    is_tiny = "whitening" in settings.get("vae", {})
    return f"tiny{system}" if system and is_tiny else system


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
    with on_meta_device(path, system.__name__):
        model = system(checked(settings.from_dict(config)))
    load_strictly(model, tensors, path, may_miss=("freqs_cos", "freqs_sin"))
    return model


def load_public(system, cfg, networks, folder, source, dtype=torch.float32):
    """The system (a class) around public networks; what learns around them has no values, on the meta device.

    networks: {attribute: public file, in folder or else fetched}; source: the file cfg is from
    dtype: float16 takes files in float16 where that saves a download. Raises WeightError.
    """
    with on_meta_device(source, system.__name__):     # before gigabytes are fetched
        model = system(checked(cfg))
    for name, file in networks.items():
        network, path = getattr(model, name), find_or_fetch(file, folder, dtype)
        load_strictly(network, read_tensors(path), path, [k for k in network.state_dict() if "lora_" in k])
    return model


@contextmanager
def laid_out_as(name, path):
    """In here a file's dict is taken apart as the public one of that name. Raises WeightError."""
    try:
        yield
    except WeightError:
        raise
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        wrong = f"{type(e).__name__}: {e}"
        raise WeightError(f"{path}: is not laid out as {name} ({wrong}); get it again") from None


class SkipInit(torch.overrides.TorchFunctionMode):
    """In here tensors stay as they are: torch imports its compiler, for seconds, to fill one that has no values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.nn.init.normal_, torch.Tensor.normal_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@contextmanager
def on_meta_device(path, system):
    """In here networks are built as a file says, without values. Raises WeightError."""
    try:
        with torch.device("meta"), SkipInit():
            yield
    except Exception as e:
        reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        raise WeightError(f"{path}: its config is not one of {system} ({reason}); get it again") from None


def checked(cfg):
    """A config (a dataclass), if its values have their fields' types. Raises ValueError."""
    also_taken = {float: float | int, tuple: tuple | list}      # JSON has no tuples
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if not isinstance(value, also_taken.get(f.type, f.type)):
            raise ValueError(f"{f.name} is {value!r:.60}")
        if is_dataclass(value):
            checked(value)
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
