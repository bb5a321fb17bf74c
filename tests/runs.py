"""Runs of scripts and trainings for tests: here, in processes that begin at once, in several that train together.

A new process needs three seconds or more to import torch. It is started where that is the point: README's command,
foreign packages, little memory. Elsewhere a script runs here as __main__, or in a fork of one that has imported all.
"""

import io
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import forkserver

import pytest
import torch
import torch.multiprocessing

import training

photos_for = training.photos_for


def watch_less(patch):
    """Hold out two crops, not 16: what they are measured for is the same, and 16 would be most of a tiny run's work."""
    def fewer(*args, **options):
        photos, crops, names = photos_for(*args, **options)
        return photos, crops[:2], names

    patch.setattr(training, "photos_for", fewer)


def stop_after(patch, steps):
    """Ctrl-C comes after that many steps; None = never."""
    class Stop:
        asked = 0

        def __bool__(self):
            self.asked += 1
            return steps is not None and self.asked > steps

    patch.setattr(training, "Stop", Stop)


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
    assert status == 0 and "goes on from here" in said and "Traceback" not in errors


class Script:
    """A script as users start it, but for the time of imports; its signals, its end and what it says are real."""

    def __init__(self, folder, path, *words):
        folder.mkdir()
        self.folder, self.process = folder, fork(be_script, path, words, folder)

    def said(self, where):
        file = self.folder / where
        return file.read_text() if file.exists() else ""

    def wait_for_a_step(self):
        """Until the bar on stderr counts one; by then a training listens to signals."""
        while not re.search(r" [1-9]\d*/\d+ \[", self.said("stderr")) and self.process.is_alive():
            time.sleep(0.05)

    def end(self, number=None):
        """Wait for it, after a signal if one is given -> exit status, what stands on stdout and stderr"""
        if number is not None:
            os.kill(self.process.pid, number)
        self.process.join()
        return self.process.exitcode, self.said("stdout"), self.said("stderr")
