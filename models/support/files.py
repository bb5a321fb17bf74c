"""Which files are images, what a folder holds, where results go. What is not ours is never overwritten."""

import errno
import os
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from safetensors import SafetensorError

SUFFIXES = set(".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm".split())
OTHERS = {".avif": "AVIF", ".heic": "HEIC", ".heif": "HEIC", ".jp2": "JPEG 2000", ".jxl": "JPEG XL", ".tga": "Targa",
          ".psd": "Photoshop", ".svg": "SVG", ".dng": "camera raw"}     # what is not read, by name
MARKS = b"nanoSR", b"picture,width,height,seconds,", b'"command": "python sample.py'    # how all that we write begins
RESULT = b"\0\0\0\x0ftEXtSoftware\0nanoSR"     # the text chunk of a PNG that is a result, a sheet or a chart


def printable(text):
    """Text as one plain line: a name may hold newlines, escape sequences, bytes of no encoding."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def first_bytes(path, number=1024):
    """How a regular file begins; b"" of anything else, and of what may not be read."""
    with suppress(OSError):
        if os.path.isfile(path):        # to open a pipe would wait for ever
            with open(path, "rb") as f:
                return f.read(number)
    return b""


class PictureError(ValueError):
    """An image file that cannot be read or written; the message is one line for the user."""

    def __init__(self, message):
        super().__init__(printable(message))


class WriteError(OSError, PictureError):
    """A file that cannot be written; the message is one line for the user, errno None where nobody knows it."""


# ---- writing

NO_ROOM = errno.ENOSPC, errno.EDQUOT

STARTED = [time.time()]     # of this process


def note_start():
    STARTED[0] = time.time()


if hasattr(os, "register_at_fork"):     # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=note_start)


def disk_full_or_read_only(error):
    """Whether an error of writing means that no other file can be written either."""
    return getattr(error, "errno", None) in (*NO_ROOM, errno.EROFS)


@contextmanager
def writing(path):
    """In here what the disk refuses becomes a WriteError that names path, the reason and a remedy."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:       # Python's, torch's, safetensors' writers
        number = getattr(e, "errno", None)
        if found := re.search(r"os error (\d+)|Os { code: (\d+)", str(e)):      # the latter: safetensors 0.4
            number = int(found[1] or found[2])
        elif number is None and shutil.disk_usage(Path(path).parent).free < 2**20:
            number = errno.ENOSPC       # torch does not say so
        reason = os.strerror(number) if number else str(e).partition("\n")[0]
        remedy = "make room, or choose another folder" if number in NO_ROOM else "choose another folder"
        error = WriteError(printable(f"{path}: cannot be written ({reason}); {remedy}"))
        error.errno = number
        raise error from None


def check_writable(folder):
    """Raise WriteError unless files can be written to a folder; where it does not exist yet, it will not afterwards."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as f:
                f.write(bytes(2**16))       # on a full disk a file can be made, but stays empty
    finally:
        with suppress(OSError):
            for path in missing:
                path.rmdir()


@cache      # once a folder
def remove_parts(folder):
    """Remove what killed runs left of `whole_file` in a folder: all parts not written to since this run began."""
    for path in folder.glob(".*.part"):
        with suppress(OSError):     # Windows does not remove what is open
            if re.fullmatch(r"\.\d+-\d+\.part", path.name) and path.lstat().st_mtime < STARTED[0]:
                path.unlink()


@contextmanager
def whole_file(path, part=None):
    """A temporary path to write, `part`, which then gets the name `path`, so that this never holds half a file.

    Raises WriteError.
    """
    path = Path(path)
    short = f".{os.getpid()}-{threading.get_ident()}.part"      # names may be as long as can be
    part = Path(part or path.with_name(short))
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_parts(path.parent)
            yield part
            os.replace(part, path)
        finally:
            with suppress(OSError):
                part.unlink()


# ---- folders

def is_picture(path):
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."


def walk(top):
    """All files below a folder, sorted; hidden ones and what links lead to are left out. Raises PictureError.

    -> list of Path, Counter of what could not be seen
    """
    paths, unseen = [], Counter()

    def failed(e):
        if e.filename == os.fspath(top):
            raise PictureError(f"{top}: cannot be listed ({e.strerror}); change its permissions")
        unseen[f"folder that cannot be listed ({e.filename})"] += 1

    for folder, folders, files in os.walk(top, onerror=failed):
        unseen["link to a folder"] += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        folders[:] = [name for name in folders if name[0] != "."]
        paths += [Path(folder, name) for name in files if name[0] != "."]
    return sorted(paths), unseen


def find_pictures(top, note=lambda line: None, results=False):
    """An image as it is, a folder replaced by the images anywhere below it; note: gets a line on what else it holds.

    results: also take what nanoSR made, which otherwise is an input only if it is named itself
    -> {path: its name, relative to the given folder}. Raises PictureError for a folder without images.
    """
    if not os.path.isdir(top):      # Path.is_dir fails at names that are too long
        return {top: Path(top.name)}
    files, others = walk(top)
    pictures = []
    for path in files:
        kind = path.suffix.lower()
        if not is_picture(path):
            others[f"{kind} ({OTHERS[kind]})" if kind in OTHERS else kind or "without suffix"] += 1
        elif not results and kind == ".png" and RESULT in first_bytes(path):
            others["result of nanoSR (taken only if named itself)"] += 1
        else:
            pictures.append(path)
    left_out = ", ".join(f"{n} x {kind}" for kind, n in sorted(others.items()) if n)
    if not pictures:
        only = f", only {left_out}" if left_out else ""
        raise PictureError(f"{top}: no images in this folder{only}; expected {' '.join(sorted(SUFFIXES))}")
    if left_out:
        note(printable(f"{top}: left out {left_out}"))
    return {path: path.relative_to(top) for path in pictures}


def output_paths(names, out, taken=("sheet",), note=print):
    """One PNG in `out` per image of `find_pictures`; where a name is taken, -2, -3, ... is added.  -> list of Path"""
    taken, paths = set(taken), []
    for path, name in names.items():
        stem, n = name.stem, 1
        while str(name.parent / stem).lower() in taken:     # lower: some file systems do not tell a.png from A.png
            n += 1
            stem = f"{name.stem}-{n}"
        if n > 1:
            note(printable(f"{path}: the name {name.stem}.png is taken, so the result is {stem}.png"))
        taken.add(str(name.parent / stem).lower())
        paths.append(out / name.parent / f"{stem}.png")
    return paths


def claim(target, source, inputs):
    """Raise PictureError where the result of `source`, `target`, is not ours to write. inputs: realpaths"""
    owner = ""
    if os.path.realpath(target) in inputs:
        owner = "an input"
    elif os.path.isfile(target) and not any(mark in first_bytes(target) for mark in MARKS):
        owner = "a file that nanoSR did not write"
    if owner:
        raise PictureError(f"{source}: its result {target} would overwrite {owner}; choose another folder for results")
