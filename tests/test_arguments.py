"""What the commands share.    python -m pytest tests/test_arguments.py"""

import argparse
import io
import os
import signal
import threading

import pytest

from models.support.arguments import SIGNALS, SEED, SafeStream, Stop, between, folder, COUNT


def test_what_is_a_number_of_that_range():
    assert [between(0, 8)(text) for text in ("0", "2.5", "8", "4.0", "1e0")] == [0, 2.5, 8, 4, 1]
    assert type(between(0, 8)("4.0")) is int and COUNT("1") == 1 and SEED(str(2**63 - 1)) == 2**63 - 1


@pytest.mark.parametrize("kind, text", [(between(0, 8), "nan"), (between(0, 8), "inf"), (between(0, 8), "8.01"), (between(0, 8), "x"),
                                        (between(0, 8), ""), (COUNT, "0"), (COUNT, "-2"), (COUNT, "2.5"), (COUNT, "nan"),
                                        (COUNT, "1e3"), (COUNT, "9" * 5000), (SEED, "-1"), (SEED, str(2**63))])
def test_anything_else_is_refused(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="number from"):
        kind(text)


def test_a_folder_is_no_picture(tmp_path):
    for name in ("big.png", "big.JPG", "a/b.avif"):
        with pytest.raises(argparse.ArgumentTypeError, match="name of a file; give a folder"):
            folder(name)
    (tmp_path / "x.png").mkdir()
    assert folder(str(tmp_path / "x.png")) == tmp_path / "x.png" and folder("v1.5").name == "v1.5"


@pytest.mark.parametrize("coding, shown", [("cp1252", "\\u6771 \\udcff é"), ("utf-8", "東 \\udcff é"), ("ascii", "\\u6771 \\udcff \\xe9")])
def test_printing_never_fails(coding, shown):
    buffer = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(buffer, encoding=coding))
    print("東 \udcff é", file=stream, flush=True)
    assert buffer.getvalue().decode(coding) == shown + os.linesep and stream.encoding == coding


@pytest.mark.skipif(os.name == "nt", reason="needs a pipe that says it is closed")
def test_nobody_reads():
    read, write = os.pipe()
    os.close(read)
    stream = SafeStream(open(write, "w"))
    for _ in range(2):
        print("x" * 10**5, file=stream, flush=True)
    stream.stream.buffer.raw.close()


def test_stop(capsys):
    """What is droppable is dropped, all else finished; the first signal is answered at once, a second Ctrl-C does not wait."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop("stopping soon") as stop:
        assert not stop
        with pytest.raises(KeyboardInterrupt), stop.droppable():
            signal.raise_signal(signal.SIGTERM)
        assert stop
    with Stop("stopping soon") as stop:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop and capsys.readouterr().err.count("stopping soon") == 1
        with stop.shield():
            signal.raise_signal(signal.SIGINT)      # nothing is lost in here
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == [signal.getsignal(number) for number in SIGNALS]


def test_stop_leaves_nohup_and_threads_alone():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
        found = []
        thread = threading.Thread(target=lambda: found.append(Stop().__enter__().before))
        thread.start(), thread.join()
        assert found == [{}]
    finally:
        signal.signal(signal.SIGHUP, before)
