"""Runs of scripts and trainings for tests: here, in processes that begin at once, in several that train together.

A new process needs three seconds or more to import torch. It is started where that is the point: README's command,
foreign packages, little memory. Elsewhere a script runs here as __main__, or in a fork of one that has imported all.
"""

import io
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

import training

photos_for, Stop = training.photos_for, training.Stop


def watch_less(patch):
    """Hold out two crops, not 16: what they are measured for is the same, and 16 would be most of a tiny run's work."""
    def photos_and_fewer_crops(*args, **options):
        photos, crops, names = photos_for(*args, **options)
        fewer = crops[:2] if torch.is_tensor(crops) else [x[:2] for x in crops]     # of pairs: HQ and LQ
        return photos, fewer, names

    patch.setattr(training, "photos_for", photos_and_fewer_crops)


def stop_after(patch, steps):
    """Ctrl-C comes after that many steps; None = never."""
    class StopAfter(Stop):
        steps = 0       # begun

        def __bool__(self):
            self.steps += 1
            return steps is not None and self.steps > steps or super().__bool__()

    patch.setattr(training, "Stop", StopAfter)


def here(path, *words):
    """A script as __main__, in this process -> exit status, what it said on stdout and on stderr"""
    out, err, status = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(path), *map(str, words)])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as e:     # as the interpreter takes it
            status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
            err.write(f"{e.code}\n" if isinstance(e.code, str) else "")
        finally:
            [signal.signal(number, handler) for number, handler in handlers.items()]
    return status, out.getvalue(), err.getvalue()


def server():
    """multiprocessing's context, whose server has imported the trainers, their tests, and what optimizers import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_survival", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:     # before Python 3.13 the server does not take over sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def fork(function, *args):
    """A process that has begun with function(*args)."""
    process = server().Process(target=function, args=args)
    process.start()
    return process


def be_one_of(rank, world, port, function, args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    function(*args)


def together(world, function, *args):
    """function(*args) in `world` processes, as torchrun would start them."""
    server()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(be_one_of, (world, port, function, args), world, start_method="forkserver")


def be_script(path, words, folder):
    sys.stdout, sys.stderr = open(folder / "stdout", "w"), open(folder / "stderr", "w")
    sys.argv = [str(path), *map(str, words)]
    watch_less(pytest.MonkeyPatch())
    runpy.run_path(str(path), run_name="__main__")


def error_then_ctrl_c(tmp_path, photos, *command):
    """A trainer as users run it: an error is one line; Ctrl-C after a step saves and says how to go on."""
    status, _, errors = Script(tmp_path / "no", *command, "--data", tmp_path / "none").end()
    assert status == 1 and len(errors.strip().splitlines()) == 1 and "no such folder" in errors
    run = Script(tmp_path / "yes", *command, "--data", photos)
    run.wait_for_a_step()
    status, said, errors = run.end(signal.SIGINT)
    assert status == 130 and "goes on from here" in said and "Traceback" not in errors


def wait_for_row(log, step, process):
    """Until log.csv has the row of a step, or a later one, or the process has ended."""
    while process.is_alive():
        rows = log.read_text().split("\n")[1:-1] if log.exists() else []     # whole ones
        if any(int(row.partition(",")[0]) >= step for row in rows):
            break
        time.sleep(0.02)


class Script:
    """A script as users start it, but for the time of imports; its signals, its end and what it says are real."""

    def __init__(self, folder, path, *words):
        folder.mkdir()
        self.folder, self.process = folder, fork(be_script, path, [*words, "--log-every", 1], folder)
        self.log = Path(words[words.index("--out") + 1], "log.csv")

    def said(self, where):
        file = self.folder / where
        return file.read_text() if file.exists() else ""

    def wait_for_a_step(self):
        """Until the log has a row of one; by then a training listens to signals."""
        wait_for_row(self.log, 1, self.process)

    def end(self, number=None):
        """Wait for it, after a signal if one is given -> exit status, what stands on stdout and stderr"""
        if number is not None:
            os.kill(self.process.pid, number)
        self.process.join()
        return self.process.exitcode, self.said("stdout"), self.said("stderr")
