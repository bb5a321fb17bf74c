"""Which files are pictures, what a folder holds, where results go. What is not ours is never overwritten."""

import os
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIXES = set(".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm".split())
OTHERS = {".avif": "AVIF", ".heic": "HEIC", ".heif": "HEIC", ".jp2": "JPEG 2000", ".jxl": "JPEG XL", ".tga": "Targa",
          ".psd": "Photoshop", ".svg": "SVG", ".dng": "camera raw"}     # what is not read, by name
MARKS = b"nanoSR", b"picture,width,height,seconds,", b'"command": "python sample.py'    # how all that we write begins


def printable(text):
    """Text as one plain line: a name may hold newlines, escape sequences, bytes of no encoding."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class PictureError(ValueError):
    """A picture file that cannot be read or written; the message is one line for the user."""

    def __init__(self, message):
        super().__init__(printable(message))


@contextmanager
def whole_file(path, part=None):
    """A temporary path to write, `part`, which then gets the name `path`, so that this never holds half a file."""
    path = Path(path)
    short = f".{os.getpid()}-{threading.get_ident()}.part"      # names may be as long as can be
    part = Path(part or path.with_name(short))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink()


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


def find_pictures(top, note=lambda line: None):
    """A picture as it is, a folder replaced by the pictures anywhere below it; note: is told what else it holds.

    -> {path: its name, relative to the folder that was given}. Raises PictureError for a folder without pictures.
    """
    if not os.path.isdir(top):      # Path.is_dir fails at names that are too long
        return {top: Path(top.name)}
    files, others = walk(top)
    pictures = list(filter(is_picture, files))
    kinds = [path.suffix.lower() for path in files if not is_picture(path)]
    others.update(f"{kind} ({OTHERS[kind]})" if kind in OTHERS else kind or "without suffix" for kind in kinds)
    left_out = ", ".join(f"{n} x {kind}" for kind, n in sorted(others.items()) if n)
    if not pictures:
        only = f", only {left_out}" if left_out else ""
        raise PictureError(f"{top}: no pictures in this folder{only}; expected {' '.join(sorted(SUFFIXES))}")
    if left_out:
        note(printable(f"{top}: left out {left_out}"))
    return {path: path.relative_to(top) for path in pictures}


def output_paths(names, out, taken=("sheet",), note=print):
    """One PNG in `out` per picture of `find_pictures`; where a name is taken, -2, -3, ... is added.  -> list of Path"""
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
    owner = "an input" if os.path.realpath(target) in inputs else ""
    with suppress(OSError):
        if not owner and os.path.isfile(target):
            with open(target, "rb") as f:
                head = f.read(1024)
            owner = "" if any(mark in head for mark in MARKS) else "a file that nanoSR did not write"
    if owner:
        raise PictureError(f"{source}: its result {target} would overwrite {owner}; choose another folder for results")
