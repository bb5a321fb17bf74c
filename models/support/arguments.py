"""What the commands share: types of arguments, which argparse refuses by name; how a script prints, stops and ends."""

import argparse
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

from models.support.files import OTHERS, SUFFIXES


# ---- types of arguments


def between(low, high, whole=False):
    """Make a type of argument: a number from low to high, with `whole` an integer.

    -> a function of the text, for argparse: it gives an int where the number has no fraction, else a float
    """
    kind = "whole number" if whole else "number"

    def number(text):
        refusal = argparse.ArgumentTypeError(f"{text} is no {kind} from {low} to {high}")
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            raise refusal from None
        if not low <= value <= high:    # nan is not, either
            raise refusal
        if value == int(value):
            return int(value)
        return value

    return number


COUNT = between(1, 2**31 - 1, whole=True)
SEED = between(0, 2**63 - 1, whole=True)


def path_argument(text):
    """Make a path of an argument: ~ is the home folder, which shells leave as it is in --out=~/x.  -> str"""
    return os.path.expanduser(text)


def file_or_folder(text):
    """Make a path of an argument, of something that is there or not.  -> Path"""
    return Path(path_argument(text))


def folder(text):
    """Make a path of an argument that says where results go, never the name of one image.  -> Path"""
    folder = file_or_folder(text)
    if folder.suffix.lower() in SUFFIXES | OTHERS.keys() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is the name of a file; give a folder")
    return folder


def existing(text):
    """Make a path of an argument, of a file or folder that is there.  -> Path"""
    found = file_or_folder(text)
    if not os.path.exists(found):       # Path.exists fails at names that are too long
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return found


# ---- how a script prints


class SafeStream:
    """A text stream to which no print fails, so that a message never costs the work it reports.

    Users' reports asked for it. On Windows, or into a file there, Python's streams have a code page such as cp1252, and
    a print of a folder named in Japanese raised UnicodeEncodeError: what a code page lacks is escaped here. Where the
    reader of a pipe has ended (`python sample.py | head`), a print raised BrokenPipeError: here such lines are lost.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        encoding = self.stream.encoding or "utf-8"
        with suppress(OSError, ValueError):     # a broken pipe, a closed file
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        """Be the stream itself in all else: fileno, isatty, encoding, ..."""
        return getattr(self.stream, name)


def make_streams_safe():
    """Let no print fail (SafeStream), and every line come at once, also where output goes into a file."""
    if sys.stdout is None or sys.stderr is None:        # Windows' pythonw has none
        return
    with suppress(AttributeError, ValueError):          # notebooks have another kind of stream
        sys.stdout.reconfigure(line_buffering=True)
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)


# ---- how it stops and ends

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stop:
    """True once Ctrl-C, SIGTERM or SIGHUP came: the loop that asks ends after the turn at hand.

        with Stop("stopping after this step") as stop:
            while not stop:
                ...                         # finished, whatever signal comes; but a second Ctrl-C raises at once
                with stop.droppable():      # a signal in here raises KeyboardInterrupt
                    ...
                with stop.shield():         # no signal interrupts this
                    ...

    said: printed at once when the first signal comes. SIGHUP stays ignored where it was, under nohup. Handlers are put
    back at the end. In a thread, as some notebooks run cells, Python allows no handlers: there nothing stops early.
    """

    def __init__(self, said=""):
        self.said = said
        self.asked = False
        self.dropping = False       # in `droppable`
        self.shielded = False       # in `shield`
        self.before = {}            # signal: its handler outside

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                ignored = number not in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(number) != signal.SIG_DFL
                if not ignored:
                    self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            if handler is None:     # it was not set by Python, which cannot put it back
                handler = signal.SIG_DFL
            signal.signal(number, handler)

    def __bool__(self):
        return self.asked

    def handle(self, number, _):
        """Be called by Python when a signal comes."""
        first = not self.asked
        self.asked = True
        if self.shielded:
            print("saving, one moment", file=sys.stderr, flush=True)
        elif self.dropping:
            raise KeyboardInterrupt
        elif number == signal.SIGINT and not first:     # who presses Ctrl-C twice does not want to wait
            raise KeyboardInterrupt
        elif first and self.said:
            print(f"\n{self.said}", file=sys.stderr, flush=True)

    @contextmanager
    def droppable(self):
        """Let a signal in here raise KeyboardInterrupt."""
        self.dropping = True
        try:
            yield
        finally:
            self.dropping = False

    @contextmanager
    def shield(self):
        """Let no signal interrupt what is in here."""
        self.shielded = True
        try:
            yield
        finally:
            self.shielded = False


class UserError(Exception):
    """Something that the user can mend, said in one line."""


@contextmanager
def as_script(said="stopped"):
    """In here a script does its work: no print ends it; Ctrl-C and SIGTERM end it with line `said` and status 130."""
    make_streams_safe()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)      # which raises KeyboardInterrupt
    try:
        yield
    except KeyboardInterrupt:
        print(said, file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def command(main):
    """Run a script's main, which says itself what went wrong, and end with its status."""
    with as_script():
        sys.exit(main())


def no_memory(error):
    """Tell whether a RuntimeError says that memory is short; CPU and MPS have no class of their own, as CUDA has."""
    return any(words in str(error).lower() for words in ("out of memory", "not enough memory", "allocate memory"))
