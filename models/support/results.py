"""What sample.py does with images that a model has made: files, measures, a sheet, a page.

`Results` collects them while a folder is upscaled. Two images at a time are held in memory: while one is computed the
one before it is written. Of the finished ones there stay their rows of metrics.csv, the crops of the first eight, and
on disk the figures of the page.
"""

import sys
import tempfile
import time
from collections import namedtuple
from contextlib import contextmanager, suppress
from ctypes import CDLL
from os import environ
from os.path import realpath

from models.support.arguments import no_memory
from models.support.evaluation import (append_row, average, measure, read_reference, record_of, report, row_of,
                                       write_metrics, write_text)
from models.support.files import PictureError, claim, disk_full_or_read_only, output_paths, printable, writing
from models.support.imaging import GREY, chroma, contact_sheet, middle, resize, round8, save_png, write_picture
from models.support.page import figure_of, page_of
from models.support.weights import WeightError

SHEET_ROWS, SHEET_CROP = 8, 512     # the sheet shows the middle of the first images, pixel by pixel

# path: of the image; name: its path below the folder that was given; targets: of its results, one for each model;
# references: of `find_references`
Job = namedtuple("Job", "path name targets references")

# a model's result of an image: sr (1, 3, H, W) in [0, 1]; seconds: None = it was there already
Made = namedtuple("Made", "sr seconds")


def plan(names, references, models, with_sweeps):
    """Say which files the results of each image will be.

    names: of `find_pictures`; references: of `find_references`; models: with the folder of each
    -> list of Job
    """
    taken = ["sheet"]
    if with_sweeps:
        taken += [f"sweep/{name.with_suffix('')}".lower() for name in names.values()]
    targets = zip(*(output_paths(names, model.folder, taken) for model in models))
    return [Job(*job) for job in zip(names, names.values(), targets, references)]


class Failures(list):
    """What went wrong, a line each, printed when it happens."""

    no_room = False         # whether the disk is full or read-only, so that other results cannot be written, either

    @contextmanager
    def at(self, path):
        """In here, what a user may meet becomes a line, and the next image's turn comes."""
        try:
            yield
            return
        except (PictureError, WeightError, OSError) as e:
            self.append(printable(e))
            self.no_room = self.no_room or disk_full_or_read_only(e)
        except RuntimeError as e:
            if not no_memory(e):
                raise
            self.append(printable(f"{path}: not enough memory; try --tile 256"))
        print(self[-1], file=sys.stderr)


class Results:
    """All that is written, measured and shown of a run of sample.py."""

    def __init__(self, args, models, weights, metrics, jobs, failures):
        """args: flags; models, weights: of `load_models`; metrics: Metrics; jobs: list of Job; failures: Failures"""
        self.args, self.models, self.metrics, self.jobs, self.failures = args, models, metrics, jobs, failures
        self.files = [*weights, *metrics.files]     # whose hashes metrics.json tells
        self.names = ["bicubic", *(model.label for model in models), *["reference"] * bool(args.ref)]
        self.inputs = set()     # which no result may overwrite
        for job in jobs:
            self.inputs.update(map(realpath, (job.path, *job.references)))      # Path.resolve fails at loops of links
        self.measuring = bool(args.ref or metrics.functions)
        self.tables = [model.folder for model in models if self.measuring and self.is_ours(model.folder)]
        self.rows = []          # of finished images, each a list of rows, one for each model
        self.crops = []         # of the sheet
        if args.page:           # beside the results, since it may be as large as they are
            args.out.mkdir(parents=True, exist_ok=True)
            self.figures = tempfile.TemporaryFile("w+", encoding="utf-8", dir=args.out)
        self.start, self.computed, self.failed_before = time.monotonic(), 0, len(failures)

    def claim(self, target, source=None):
        """Raise PictureError where target, the result of source, would overwrite what is not ours."""
        claim(target, source or self.args.out, self.inputs)

    def is_ours(self, folder):
        """Tell whether metrics.csv may be written there; if not, `summarise` will say why."""
        with suppress(PictureError):
            self.claim(folder / "metrics.csv")
            return True
        return False

    # ---- one image

    def finish(self, job, lq, alpha, made, on_sheet):
        """Write an image's results, unless they were there, and measure them. Raises PictureError.

        job: Job; lq: (1, 3, H, W) in [0, 1]; alpha: (1, 1, H, W) or None; made: list of Made, of each model;
        on_sheet: whether the sheet shows it -> what `add` takes
        """
        size, name = made[0].sr.shape[-2:], printable(job.path)
        bicubic = resize(lq, size)
        alpha = None if alpha is None else resize(alpha, size)
        is_grey = chroma(lq) < GREY
        images = [round8(sr) for sr, _ in made]     # what the files will hold is measured and shown
        for model, target, sr, (_, seconds) in zip(self.models, job.targets, images, made):
            if seconds is not None:
                write_picture(target, sr[:, :1] if is_grey else sr, alpha, made=model.settings)

        hq, why_not = None, ""
        if self.args.ref:
            hq, why_not = read_reference(job.name, job.references, size)
        figures, failed = measure(images, bicubic, hq, self.metrics.functions, why_not, job.path)
        rows, lines = [], []
        for model, target, (_, seconds), of_model in zip(self.models, job.targets, made, figures):
            if seconds is None:
                lines.append(f"{name}: {printable(target)} is kept")
            else:
                lines.append(f"{name}: {lq.shape[3]}x{lq.shape[2]} -> {printable(target)}: {size[1]}x{size[0]}, "
                             f"{seconds:.2f} s")
            if of_model:
                lines.append(f"{name}: {report(of_model)}")
            file = target.relative_to(model.folder).as_posix()
            rows.append(row_of(file, size, seconds, of_model, self.metrics.absent | failed))

        versions = [x for x in (bicubic, *images, hq) if x is not None]
        figure = None
        if self.args.page:
            figure = figure_of(rows, versions, self.names, len(self.jobs) * len(self.names))
        crops = None
        if on_sheet:        # copies, or the whole images would stay in memory
            crops = [middle(lq, round(SHEET_CROP / self.args.scale)).clone()]
            crops += [middle(x, SHEET_CROP).clone() for x in versions]
        return rows, crops, figure, lines

    def add(self, rows, crops, figure, lines):
        """Take in what `finish` returned. Its rows go into metrics.csv at once. Raises WriteError."""
        for model, row in zip(self.models, rows):
            if model.folder in self.tables:
                append_row(model.folder, row, first=not self.rows)
        self.rows.append(rows)
        if crops:
            self.crops.append(crops)
        if figure:
            with writing(self.args.out / "page.html"):
                self.figures.write(figure)
        if any(row["seconds"] is not None for row in rows):
            self.computed += 1
        if len(self.jobs) > 1:
            lines[-1] += f"  [{self.progress()}]"
        print(*lines, sep="\n")

    def progress(self):
        """3 of 300, about 12 min left; what was there counts no time as long as something is computed"""
        done = len(self.rows) + len(self.failures) - self.failed_before
        if done == len(self.jobs):
            return f"{done} of {done}"
        left = (time.monotonic() - self.start) / (self.computed or done) * (len(self.jobs) - done)
        said = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
        return f"{done} of {len(self.jobs)}, about {said} left"

    # ---- the end

    def summarise(self):
        """Write the sheet, the metrics and the page; print averages and how they were measured."""
        with self.failures.at(path := self.args.out / "sheet.png"):
            self.claim(path)
            save_png(contact_sheet(self.crops, self.captions()), path)
            print(printable(f"before and after: {path}"))
        if not self.measuring and not self.args.page:
            return
        args, metrics = self.args, self.metrics
        records = [record_of(list(rows), args.command, args.flags, metrics.absent, self.files)
                   for rows in zip(*self.rows)]     # of each model
        if self.measuring:
            for model, record in zip(self.models, records):
                with self.failures.at(model.folder):
                    self.write_metrics(model, record)
            print(f"protocol: {records[0]['protocol']}")
        with self.failures.at(path := args.out / "page.html"):
            if args.page:
                self.claim(path)
                self.figures.seek(0)
                write_text(path, page_of(self.figures.read(), len(self.rows), self.names, records))
                print(printable(f"to look at: {path}"))

    def captions(self):
        """Name the columns of the sheet, in each row with the seconds that its images took."""
        captions = []
        for rows in self.rows[: len(self.crops)]:
            seconds = ["" if row["seconds"] is None else f", {row['seconds']:.1f} s" for row in rows]
            models = [model.label + said for model, said in zip(self.models, seconds)]
            captions.append(["low quality", "bicubic", *models, "original"])
        return captions

    def write_metrics(self, model, record):
        """Print a model's averages, and write them beside its results."""
        name = f"{model.label}  " if len(self.models) > 1 else ""
        print(f"average  {name}{report(average(record['pictures'])) or 'of nothing'}")
        for file in ("metrics.csv", "metrics.json"):
            self.claim(model.folder / file)
        write_metrics(record, model.folder)


def return_memory():
    """Return freed memory to the system. glibc keeps it in pieces, which in a folder of images become more and more.

    Not where the user told glibc what to keep (tests/RESULTS.md), and there is nothing to do in other C libraries.
    """
    if "MALLOC_TRIM_THRESHOLD_" not in environ:
        with suppress(OSError, AttributeError):
            CDLL("libc.so.6").malloc_trim(0)
