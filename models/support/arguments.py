"""What the commands share: types of arguments, which argparse refuses by name, how a command prints and ends."""

import argparse
import math
import os
import signal
import sys
from contextlib import suppress
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


def folder(text):
    """A type of argument: where results go, which is never the name of one picture."""
    if Path(text).suffix.lower() in SUFFIXES | OTHERS.keys() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is the name of a file; give a folder")
    return Path(text)


def existing(text):
    """A type of argument: a file or folder that is there."""
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return Path(text)


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
    if sys.stdout and sys.stderr:       # none under Windows' pythonw
        sys.stdout, sys.stderr = Lenient(sys.stdout), Lenient(sys.stderr)


class Stop:
    """True once Ctrl-C or SIGTERM came; what is in `with stop:` is dropped (KeyboardInterrupt), all else finished."""

    def __init__(self):
        self.asked = self.inside = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, _):
        again, self.asked = self.asked, True
        if self.inside or again and number == signal.SIGINT:    # a second Ctrl-C does not wait
            raise KeyboardInterrupt

    def __bool__(self):
        return self.asked

    def __enter__(self):
        self.inside = True

    def __exit__(self, *_):
        self.inside = False


def command(main):
    """Run a script's main and end with its status. Nothing printed ends it; SIGTERM is Ctrl-C, whose status is 130."""
    make_lenient()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
