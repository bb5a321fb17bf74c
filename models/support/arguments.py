"""What the commands share: types of arguments, which argparse refuses by name, how a command prints and ends."""

import argparse
import math
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

from models.support.files import OTHERS, SUFFIXES


def between(low, high, whole=False):
    """A type of argument: a number from low to high, an int where it is whole (and it must be, with `whole`)."""
    def number(text):
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is no {'whole ' * whole}number from {low} to {high}")
        return int(value) if value == int(value) else value
    return number


positive = between(1, 2**31 - 1, whole=True)
SEED = between(0, 2**63 - 1, whole=True)


def path(text):
    """A type of argument: ~ is the home folder; shells leave it in --out=~/x."""
    return os.path.expanduser(text)


def file_or_folder(text):
    """A type of argument: a path, of something that is there or not."""
    return Path(path(text))


def folder(text):
    """A type of argument: where results go, which is never the name of one picture."""
    folder = file_or_folder(text)
    if folder.suffix.lower() in SUFFIXES | OTHERS.keys() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is the name of a file; give a folder")
    return folder


def existing(text):
    """A type of argument: a file or folder that is there."""
    found = file_or_folder(text)
    if not os.path.exists(found):       # Path.exists fails at names that are too long
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return found


def no_memory(error):
    """Whether a RuntimeError says so; CPU and MPS have no class of their own for it, as CUDA has."""
    return any(words in str(error).lower() for words in ("out of memory", "not enough memory", "allocate memory"))


class Lenient:
    """A stream to which no print fails: what its code page lacks is escaped; a closed pipe loses lines only."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        coding = self.stream.encoding or "utf-8"
        with suppress(OSError, ValueError):
            self.stream.write(text.encode(coding, "backslashreplace").decode(coding))
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def make_lenient():
    """Prints that never fail; lines that come at once, also where output goes into a file."""
    if sys.stdout and sys.stderr:       # none under Windows' pythonw
        with suppress(AttributeError, ValueError):      # another kind of stream, as in notebooks
            sys.stdout.reconfigure(line_buffering=True)
        sys.stdout, sys.stderr = Lenient(sys.stdout), Lenient(sys.stderr)


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stop:
    """True once Ctrl-C, SIGTERM or SIGHUP came; what is under way is finished, but for what is `droppable`.

        with Stop("stopping after this step") as stop:
            while not stop:
                ...

    said: printed at once when the first signal comes. Handlers are put back at the end; a thread, as in notebooks,
    has none, and SIGHUP stays ignored under nohup.
    """

    def __init__(self, said=""):
        self.said, self.asked, self.dropping, self.shielded, self.before = said, False, False, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) == signal.SIG_DFL:
                    self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)   # None: not set by Python

    def __bool__(self):
        return self.asked

    def ask(self, number, _):
        again, self.asked = self.asked, True
        if self.shielded:
            print("saving, one moment", file=sys.stderr, flush=True)
        elif self.dropping or again and number == signal.SIGINT:        # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        elif self.said and not again:
            print(f"\n{self.said}", file=sys.stderr, flush=True)

    @contextmanager
    def droppable(self):
        """A signal in here raises KeyboardInterrupt."""
        self.dropping = True
        try:
            yield
        finally:
            self.dropping = False

    @contextmanager
    def shield(self):
        """No signal interrupts what is in here."""
        self.shielded = True
        try:
            yield
        finally:
            self.shielded = False


def command(main):
    """Run a script's main and end with its status. Nothing printed ends it; SIGTERM is Ctrl-C, whose status is 130."""
    make_lenient()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    finally:        # a notebook that %runs it goes on
        signal.signal(signal.SIGTERM, before)
