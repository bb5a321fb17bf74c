"""Good photos as training data: folders and text lists; random crops without end.

Shuffling, resuming and sharing between processes need no state: sample i is a function of (seed, i).
"""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from models.support import glyphs, imaging
from models.support.arguments import SIGNALS
from models.support.files import SUFFIXES, PictureError, find_pictures, is_picture, printable
from models.support.pairs import find_partners

KINDS = " ".join(sorted(SUFFIXES))
SCALE = 4       # of own pairs, as of degrade.py's
ON_DEVICE = 2 * 2**30   # bytes of photos that may lie on a GPU


class DataError(ValueError):
    """No photos to train on; the message is one line for the user."""


def list_photos(source):
    """All photos of a folder, an image, or a .txt list of such, a line each -> list of Path, each as often as named

    Prints what else a folder holds. Raises FileNotFoundError, DataError.
    """
    photos = list(expand(Path(source)))
    if not photos:
        raise DataError(f"{source}: no images in it; put some there ({KINDS})")
    return photos


def expand(source, lists=(), where=""):
    """Yield the photos of a source; lists: the text lists it was reached through; where: the line that names it."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder, list or file{where}; check the spelling")
    if source.is_dir():
        yield from find_pictures(source, print)
    elif not source.is_file():      # to open a pipe would wait for ever
        raise DataError(f"{source}: is a pipe or a device{where}; give a file or a folder")
    elif is_picture(source):
        yield source
    elif source.suffix.lower() != ".txt":
        raise DataError(f"{source}: is no source of photos{where}; give a folder, a .txt list or an image ({KINDS})")
    elif source.resolve() in lists:
        raise DataError(f"{source}: this list leads back to itself{where}; remove that line")
    else:
        try:
            lines = source.read_text(encoding="utf-8-sig").splitlines()     # sig: Windows' editors begin it with a mark
        except UnicodeDecodeError:
            raise DataError(f"{source}: is no text in UTF-8; save it as such") from None
        for number, line in enumerate(map(str.strip, lines), 1):
            if line and line[0] != "#":
                where = f" (named in {source}, line {number})"
                yield from expand(source.parent / os.path.expanduser(line), (*lists, source.resolve()), where)


class Photos(torch.utils.data.Dataset):
    """Random crops of photos, without end: photos[i] is a function of (seed, i) alone -> (3, crop, crop) in [0, 1].

    Each epoch takes the files in a new order. An image smaller than the crop is enlarged; one smaller than half of it,
    or broken, is skipped: the next good file takes its place, and `skipped` says why.

    files: None = list_photos(source); flip: mirror every other one; shrink: bring large images, too, to the crop's
    size, by their shorter side; cache_mb: of pixels
    """

    def __init__(self, source, crop, seed=0, flip=False, shrink=False, files=None, cache_mb=1024):
        self.files = list(files) if files is not None else list_photos(source)
        self.crop, self.seed, self.flip, self.shrink, self.cache_left = crop, seed, flip, shrink, cache_mb * 2**20
        self.skipped, self.cache, self.epoch = {}, {}, None
        self.nbytes = 0     # of all images, as their headers say
        for file in dict.fromkeys(self.files):      # headers only; damage further in shows when a file's turn comes
            try:
                with imaging.open_image(file) as img:
                    self.check_size(file, img.size)
            except DataError:
                raise
            except Exception:
                self.pixels(file)   # says what is wrong
        if all(file in self.skipped for file in self.files):
            raise DataError(f"{source}: none of its {len(self)} images can be used for crops of {crop}; give others")

    def __len__(self):
        return len(self.files)

    def check_size(self, file, size):
        """Skip a file that is too small.  size: (width, height)"""
        width, height = size
        self.nbytes += 3 * width * height
        if 2 * min(size) < self.crop:
            self.skip(file, f"{file}: its {width} x {height} pixels are less than half of {self.crop}")

    def skip(self, file, reason):
        self.skipped[file] = str(reason)
        print(f"{printable(reason)}; skipped ({len(self.skipped)} of {len(self)} files so far)", file=sys.stderr)

    def pixels(self, file):
        """What `read` makes of a file, kept where there is room, or None if the file is no good."""
        if file in self.skipped or file in self.cache:
            return self.cache.get(file)
        try:
            pixels = self.read(file)
        except PictureError as error:
            return self.skip(file, error)
        if pixels.nbytes <= self.cache_left:
            self.cache[file], self.cache_left = pixels, self.cache_left - pixels.nbytes
        return pixels

    def read(self, file):
        """Decode an image.  -> (H, W, 3) uint8 with both sides >= crop. Raises PictureError."""
        x, _ = imaging.read_picture(file)
        factor = self.crop / min(x.shape[2:])
        if factor > 1 or self.shrink:    # official: VOSR enlarges however small an image is
            x = imaging.resize(x, [round(side * factor) for side in x.shape[2:]])
        return imaging.to_uint8(x[0])

    def __getitem__(self, i):
        file, rng = self.choose(i, lambda file: self.pixels(file) is not None)
        return self.cut(self.pixels(file), rng)

    def choose(self, i, is_good):
        """Choose the photo of sample i.  is_good: can a file be read? -> file, generator of its crop

        Raises DataError.
        """
        epoch, n = i // len(self), len(self)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(n)
        turn = (self.files[self.order[(i + j) % n]] for j in range(n))
        file = next(filter(is_good, turn), None)
        if file is None:
            raise DataError(f"{self.files[0]}: neither this nor the other {n - 1} images can be read; see above")
        return file, np.random.default_rng((self.seed, 1, i))

    def cut(self, array, rng):
        """Cut out a crop at a random place, maybe mirrored.  array: of `read` -> (3, crop, crop) in [0, 1]"""
        y, x, mirrored = self.draw_crop(array.shape, rng)
        return self.as_tensor(array[y : y + self.crop, x : x + self.crop], mirrored)

    def draw_crop(self, shape, rng):
        """Draw where a crop is.  shape: (H, W, ...) of the image -> its first row and column, whether it is mirrored"""
        y, x = (int(rng.integers(side - self.crop + 1)) for side in shape[:2])
        return y, x, self.flip and rng.random() < 0.5

    def as_tensor(self, array, mirrored):
        """-> (3, h, w) in [0, 1] of an array (h, w, 3) uint8"""
        return imaging.from_uint8(array[:, ::-1] if mirrored else array)[0]


class Pair(NamedTuple):
    """Decoded images of a pair."""

    hq: np.ndarray      # (H, W, 3) uint8
    lq: np.ndarray      # (H/4, W/4, 3) uint8

    @property
    def nbytes(self):
        return self.hq.nbytes + self.lq.nbytes


class PhotoPairs(Photos):
    """Random crops of own pairs, both at the same place -> hq (3, crop, crop), lq (3, crop/4, crop/4) in [0, 1].

    partners: {HQ file: its LQ file}, a quarter as large a side. A pair of another proportion is a DataError; one that
    is smaller than the crop is skipped.
    """

    def __init__(self, source, crop, partners, **options):
        self.partners = partners
        super().__init__(source, crop, **options)

    def check_size(self, file, size):
        """Skip a pair that is too small or has lost its LQ image. Raises DataError where it is not one to four."""
        if file not in self.partners:
            return self.skip(file, f"{file}: its LQ image is gone")
        with imaging.open_image(self.partners[file]) as img:
            self.check_proportion(file, size, img.size)
        if min(size) < self.crop:
            self.skip(file, f"{file}: its {size[0]} x {size[1]} pixels are less than the crop of {self.crop}")

    def check_proportion(self, file, hq, lq):
        """Raise DataError unless HQ is as large as LQ times SCALE.  hq, lq: (width, height)"""
        if (lq[0] * SCALE, lq[1] * SCALE) != tuple(hq):
            raise DataError(f"{self.partners[file]}: its {lq[0]} x {lq[1]} pixels are not a quarter a side of the "
                            f"{hq[0]} x {hq[1]} of {file}; pairs are to be x{SCALE}")

    def read(self, file):
        """Decode a pair.  -> Pair. Raises PictureError, DataError."""
        if file not in self.partners:
            raise PictureError(f"{file}: its LQ image is gone")
        hq, lq = (imaging.to_uint8(imaging.read_picture(path)[0][0]) for path in (file, self.partners[file]))
        self.check_proportion(file, hq.shape[1::-1], lq.shape[1::-1])       # again: a header does not know EXIF's turns
        return Pair(hq, lq)

    def cut(self, pair, rng):
        """Cut out the same crop of both, maybe mirrored.  -> hq, lq"""
        hq, lq = pair
        small = self.crop // SCALE
        y, x = (rng.integers(side - small + 1) for side in lq.shape[:2])
        lq = lq[y : y + small, x : x + small]
        hq = hq[SCALE * y : SCALE * (y + small), SCALE * x : SCALE * (x + small)]
        mirrored = self.flip and rng.random() < 0.5
        return self.as_tensor(hq, mirrored), self.as_tensor(lq, mirrored)


def find_pairs(data, files, lq):
    """Find for each photo of a folder the LQ image of its name, or its name and x4, in folder lq.

    Prints what has no partner -> {HQ file: LQ file}. Raises PictureError, DataError.
    """
    if not Path(data).is_dir():
        raise DataError(f"{data}: with --lq it must be a folder, since names below both folders are compared")
    if not Path(lq).is_dir():
        raise DataError(f"{lq}: no such folder; check the spelling")
    root, pairs, alone = Path(data), {}, []
    lq_names = find_pictures(Path(lq), print)
    references = find_partners(lq_names.values(), {file: file.relative_to(root) for file in files}, SCALE)
    for path, found in zip(lq_names, references):
        if len(found) > 1:
            raise DataError(f"{path}: {' and '.join(map(str, found))} have its name; keep the one that is meant")
        if found:
            pairs[found[0]] = path
        else:
            alone.append(path)
    alone += [file for file in files if file not in pairs]
    if not pairs:
        raise DataError(f"{lq}: none of its images has the name of one of {data}, as {files[0].name} would")
    if alone:
        print(printable(f"{len(alone)} images of {data} and {lq} have no partner and are left out, such as {alone[0]}"))
    return pairs


def photos_for(data, crop, seed, names=None, lq=None, **options):
    """Photos to train on, and crops (16, 3, crop, crop) in [0, 1] of the good ones that are held out, one of every 30.

    names: of the files when the run began, seen from the source, so that a resumed run is the same run and what came
    later is not seen; None = it begins now; lq: folder of their LQ images, then photos are PhotoPairs, and crops a list
    of HQ ones and LQ ones -> Photos, crops, names. Raises DataError.
    """
    if str(data) in glyphs.WORLDS:
        return glyphs_for(str(data), crop, seed, lq)
    root, files, kind = Path(data) if Path(data).is_dir() else Path(data).parent, list_photos(data), Photos
    if lq:
        partners = find_pairs(data, files, lq)
        files, kind = [file for file in files if file in partners], partial(PhotoPairs, partners=partners)
    found = {str(f).removeprefix(f"{root}{os.sep}"): f for f in files}
    if names is None:
        names = [str(f).removeprefix(f"{root}{os.sep}") for f in files]
    else:
        new = found.keys() - set(names)
        if len(new) == len(found):
            raise DataError(f"{data}: has none of the photos of this run's beginning, as {names[0]}; "
                             "put them or a link there, or begin another --out")
        if new:
            print(f"{data}: {len(new)} photos came after this run began and are left out", file=sys.stderr)
    files = [found.get(name, root / name) for name in names]        # what is gone will be named and skipped

    photos = kind(data, crop, seed=seed, files=files, **options)
    room = photos.cache_left
    unique, held_out = list(dict.fromkeys(files)), set()            # of photos that a list repeats, all copies
    for i in range(0, len(unique), 30):
        good = (f for f in unique[i : i + 30] if f not in photos.skipped)
        if i < 16 * 30:             # a header may be good and the rest not
            good = (f for f in good if photos.pixels(f) is not None)
        held_out.update(islice(good, 1))
    photos.files = [f for f in files if f not in held_out]
    photos.cache, photos.cache_left = {}, room
    if photos.skipped.keys() >= set(photos.files):
        raise DataError(f"{data}: one good photo only, if any; every 30th is held out, so at least two are needed")
    test = kind(data, crop, shrink=photos.shrink, files=[f for f in unique if f in held_out])
    good = len(set(photos.files) - photos.skipped.keys())
    print(printable(f"{data}: {good} photos to train on, {len(held_out)} held out"))
    return photos, default_collate([test[i] for i in range(16)]), names


def glyphs_for(world, crop, seed, lq):
    """Drawn cells instead of photos.  -> as `photos_for`. Raises DataError."""
    if lq:
        raise DataError(f"--data {world}: is drawn, so there are no LQ images of it; leave out --lq, or give a folder")
    if crop % glyphs.CELL:
        raise DataError(f"--data {world}: its cells of {glyphs.CELL} pixels do not fill crops of {crop}; "
                        "take another --preset, or photos")
    crops, _ = glyphs.held_out(world, 16, crop)
    return glyphs.Glyphs(world, crop, seed), crops, [world]


def ignore_signals(_):
    """A loader's worker lives as long as its training, which stops after a step, although Ctrl-C reaches both."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def samples(steps, batch_size, rank, share):
    """Number this process's samples of the steps in a range, one after the other."""
    return (step * batch_size + rank * share + i for step in steps for i in range(share))


def batches(photos, steps, batch_size, rank, share, micro, workers, device):
    """This process's photos of the steps in a range -> DataLoader of (micro, 3, crop, crop), computed at once"""
    cuda = device.type == "cuda"
    mine = samples(steps, batch_size, rank, share)
    return DataLoader(photos, batch_size=micro, sampler=mine, pin_memory=cuda, worker_init_fn=ignore_signals,
                      num_workers=4 * cuda if workers is None else workers)


class OnDevice:
    """Photos whose bytes lie on a GPU; cut out there by one gather. The same crops as of a DataLoader, without workers.

    numbers: of the samples, micro of them at a time -> (micro, 3, crop, crop) in [0, 1] on device
    """

    def __init__(self, photos, numbers, micro, device):
        self.dataset, self.numbers, self.micro, self.device = photos, numbers, micro, device
        self.shapes, self.starts, flat, start = {}, {}, [], 0
        files = list(dict.fromkeys(photos.files))
        with ThreadPoolExecutor() as pool:      # Pillow decodes without Python's lock
            for file, pixels in zip(files, pool.map(photos.pixels, files)):
                if pixels is not None:
                    self.shapes[file], self.starts[file] = pixels.shape, start
                    flat.append(torch.from_numpy(pixels).flatten())
                    start += pixels.size
        photos.cache = {}
        self.bytes = torch.cat(flat).to(device)

    def __iter__(self):
        numbers = iter(self.numbers)
        while some := list(islice(numbers, self.micro)):
            yield self.gather([self.place(i) for i in some])

    def place(self, i):
        """Say where sample i lies: its first byte, from there on bytes to the next row, and to the next column."""
        file, rng = self.dataset.choose(i, self.shapes.__contains__)
        y, x, mirrored = self.dataset.draw_crop(self.shapes[file], rng)
        width = self.shapes[file][1]
        if mirrored:
            return self.starts[file] + 3 * (y * width + x + self.dataset.crop - 1), 3 * width, -3
        return self.starts[file] + 3 * (y * width + x), 3 * width, 3

    def gather(self, places):
        """Cut out crops.  places: list of three numbers -> (B, 3, crop, crop) in [0, 1]"""
        places = torch.tensor(places, device="cpu")
        if self.device.type == "cuda":
            places = places.pin_memory()
        first, row, column = places.to(self.device, non_blocking=True).view(-1, 3, 1, 1, 1).unbind(1)
        side = torch.arange(self.dataset.crop, device=self.device)
        channel = torch.arange(3, device=self.device).view(3, 1, 1)
        return self.bytes[first + channel + row * side[:, None] + column * side].float() / 255


def open_loader(run, photos):
    """Set run.loader: what this process computes of the steps that are left, a micro-batch at a time."""
    stage = run.stage
    if run.device.type == "cuda" and type(photos) is Photos and photos.nbytes < ON_DEVICE and run.args.workers is None:
        steps, share = range(stage.before + run.step, stage.before + stage.steps), run.micro_batches * run.micro_batch
        numbers = samples(steps, stage.batch_size, run.rank, share)
        run.loader = OnDevice(photos, numbers, run.micro_batch, run.device)
        return
    run.loader = batches(photos, steps=range(stage.before + run.step, stage.before + stage.steps),
                         batch_size=stage.batch_size, rank=run.rank, share=run.micro_batches * run.micro_batch,
                         micro=run.micro_batch, workers=run.args.workers, device=run.device)


@contextmanager
def reading(run):
    """In here run.batches is an iterator of run.loader; its workers end with it, whatever happens."""
    run.batches = iter(run.loader)
    try:
        yield
    finally:
        end_workers(run.batches)


def end_workers(batches):
    """End the workers of a DataLoader's iterator, if it has any.

    Else Python, at its own end, would send SIGTERM, which they ignore, and wait for them for ever.
    """
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
