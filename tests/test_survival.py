"""Training that survives: killed, stopped, out of disk, damaged checkpoints, changed networks, moving photos, two in
one folder, gradients that are no numbers.

Run: python -m pytest tests/test_survival.py
"""

import errno
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import test_train
import test_train_gramsr
import test_train_s3diff
import torch
from PIL import Image
from test_train import newest, photos, same  # noqa: F401 (photos is a fixture)
from test_train_s3diff import flat
from torch.utils.data import get_worker_info

import models.tiny
import train_gramsr
import train_s3diff
import train_vosr
import training
from models.support import saving
from models.support.arguments import SIGNALS
from models.support.download import sha256_of
from models.support.photos import Photos

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY = 15, 3


def vosr(patch, photos, out, **more):  # noqa: F811
    stages = {"autoencoder": replace(test_train.STAGES["autoencoder"], steps=STEPS, save_every=SAVE_EVERY)}
    patch.setitem(train_vosr.PRESETS, "tiny", (test_train.SMALL, stages))
    test_train.launch(patch, photos, out, "autoencoder", *more.pop("more", ()), **more)


def s3diff(patch, photos, out, **more):  # noqa: F811
    test_train_s3diff.shrink(patch)
    patch.setitem(train_s3diff.PRESETS, "tiny", (test_train_s3diff.SMALL_TINY,
                                                 {"adapters": replace(test_train_s3diff.STAGE, steps=6, save_every=2,
                                                                      crop=32)}))
    test_train_s3diff.launch(patch, photos, out, *more.pop("more", ()), **more)


def gramsr(patch, photos, out, **more):  # noqa: F811
    test_train_gramsr.shrink(patch)
    stages = {"pixel": replace(test_train_gramsr.SMALL_STAGES["pixel"], steps=6, save_every=2)}
    patch.setitem(train_gramsr.PRESETS, "tiny", (test_train_gramsr.SMALL_TINY, stages))
    test_train_gramsr.launch(patch, photos, out, "pixel", *more.pop("more", ()), **more)


SCRIPTS = {"vosr": vosr, "s3diff": s3diff, "gramsr": gramsr}


def work(name, *args):
    """A run in a process of its own, silent."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    with pytest.MonkeyPatch.context() as patch:
        SCRIPTS[name](patch, *args)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("moments", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_many_moments(name, moments, photos, tmp_path):  # noqa: F811
    """Wherever SIGKILL strikes, the end is that of an undisturbed run, to the last bit, optimizers and all."""
    runs.fork(int).join()       # the server has begun
    began, process = time.time(), runs.fork(work, name, photos, tmp_path / "whole")
    process.join()
    seconds, luck, kills, tries = time.time() - began, random.Random(0), 0, 0
    assert process.exitcode == 0
    whole = flat(newest(tmp_path / "whole"))
    while kills < moments:
        tries, out, patience = tries + 1, tmp_path / f"run{tries}", seconds
        while (process := runs.fork(work, name, photos, out)).join(luck.uniform(0, patience)) or process.is_alive():
            process.kill()
            process.join()
            kills, patience = kills + 1, 1.2 * patience     # however busy the machine is by now, it comes to an end
        assert process.exitcode == 0 and same(whole, flat(newest(out)))
        assert len(training.checkpoints(out)) == 2, "older ones are cleared away"
        assert not [path for path in out.rglob("*") if path.suffix in (".part", ".new")], "and half files"
        with open(out / "log.csv") as f:
            assert f.read().count("\n") == len(set(open(out / "log.csv"))), "no line twice"


@pytest.fixture
def half(monkeypatch, photos, tmp_path):  # noqa: F811
    """A run of train_vosr.py that was stopped at step 7: checkpoints of steps 6 and 7."""
    vosr(monkeypatch, photos, tmp_path / "half", stop_at=7)
    assert [int(path.name.split("-")[1]) for path in training.checkpoints(tmp_path / "half")] == [7, 6]
    return tmp_path / "half"


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        vosr(patch, photos, out)
    return flat(newest(out))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_passed_over(monkeypatch, photos, half, straight, capsys, damage):  # noqa: F811
    bad = training.checkpoints(half)[0]
    damage(bad)
    vosr(monkeypatch, photos, half)
    said = capsys.readouterr()
    assert f"{bad}: skipped, damaged" in said.err and "resumed from" in said.out and "at step 6" in said.out
    assert same(straight, flat(newest(half)))


@pytest.mark.parametrize("content", [{}, {"step": 7, "settings": {}, "photos": None}, [7]])
def test_a_checkpoint_without_its_parts_is_passed_over(monkeypatch, photos, half, capsys, content):  # noqa: F811
    """Made by hand, with a name that fits it."""
    bad = training.checkpoints(half)[0]
    torch.save(content, bad)
    bad = bad.rename(bad.with_name(f"checkpoint-00000007-{sha256_of(bad)[:16]}.pt"))
    vosr(monkeypatch, photos, half)
    said = capsys.readouterr()
    assert f"{bad}: skipped, damaged" in said.err and "at step 6" in said.out


def test_all_checkpoints_damaged(monkeypatch, photos, half):  # noqa: F811
    """Nothing is begun anew over what a user may still rescue."""
    for path in training.checkpoints(half):
        truncate(path)
    with pytest.raises(training.UserError, match="no checkpoint is whole; move them away"):
        vosr(monkeypatch, photos, half)


def test_disk_full(monkeypatch, photos, half, straight):  # noqa: F811
    """One sentence, no half-written file, and the checkpoints that were there."""
    before, save = training.checkpoints(half), torch.save

    def full(state, path):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(training.UserError, match="cannot be written .*No space left.*the same command goes on"):
        vosr(monkeypatch, photos, half)
    assert training.checkpoints(half) == before and not list(half.glob("*.part"))
    monkeypatch.setattr(torch, "save", save)
    vosr(monkeypatch, photos, half)
    assert same(straight, flat(newest(half)))


def test_half_a_line_in_the_log(monkeypatch, photos, half, straight):  # noqa: F811
    with open(half / "log.csv", "a") as f:
        f.write("9,0.5")
    vosr(monkeypatch, photos, half)
    assert same(straight, flat(newest(half)))


def test_photos_that_come_and_go(monkeypatch, photos, straight, tmp_path, capsys):  # noqa: F811
    """A new photo waits for the next run; one that is gone is named, and the run goes on."""
    folder = tmp_path / "moving"
    shutil.copytree(photos, folder)
    vosr(monkeypatch, folder, tmp_path / "out", stop_at=4)
    Image.new("RGB", (64, 64), "teal").save(folder / "0a.png")
    vosr(monkeypatch, folder, tmp_path / "out", stop_at=4)
    assert "1 photos came after this run began" in capsys.readouterr().err
    (folder / "3.png").unlink()
    vosr(monkeypatch, folder, tmp_path / "out")
    said = capsys.readouterr().err
    assert "3.png" in said and "skipped" in said
    assert newest(tmp_path / "out")["step"] == STEPS and not same(straight, flat(newest(tmp_path / "out")))


@pytest.mark.parametrize("name", SCRIPTS)
def test_photos_that_moved_as_a_whole(monkeypatch, photos, tmp_path, capsys, name):  # noqa: F811
    """A line says what to add; with it the run ends as if they had stayed."""
    SCRIPTS[name](monkeypatch, photos, tmp_path / "stayed")
    shutil.copytree(photos, tmp_path / "here")
    SCRIPTS[name](monkeypatch, tmp_path / "here", tmp_path / "out", stop_at=2)
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(training.UserError,
                       match="--data: .* was written with .*here, not .*there; .* or --moved if it is the same"):
        SCRIPTS[name](monkeypatch, tmp_path / "there", tmp_path / "out")
    capsys.readouterr()
    SCRIPTS[name](monkeypatch, tmp_path / "there", tmp_path / "out", more=["--moved"])
    assert "skipped" not in (err := capsys.readouterr().err) and "came after" not in err
    assert same(flat(newest(tmp_path / "stayed")), flat(newest(tmp_path / "out")))
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "empty" / "another.png")
    with pytest.raises(ValueError,
                       match="has none of the photos of this run's beginning, as 0.png; put them or a link there"):
        SCRIPTS[name](monkeypatch, tmp_path / "empty", tmp_path / "out", more=["--moved"])


@pytest.mark.parametrize("flag, value", [("--seed", 1), ("--batch-size", 4), ("--data", "elsewhere")])
def test_flags_that_matter(monkeypatch, photos, half, flag, value):  # noqa: F811
    if flag == "--data":
        photos, flag, value = shutil.copytree(photos, half.parent / value), "--steps", STEPS
    with pytest.raises(training.UserError, match=r"--(seed|batch-size|data): .* was written with"):
        test_train.launch(monkeypatch, photos, half, "autoencoder", flag, value)


def test_flags_that_may_change(monkeypatch, photos, half):  # noqa: F811
    test_train.launch(monkeypatch, photos, half, "autoencoder", "--steps", 9, "--micro-batch", 1, "--workers", 1,
                      "--keep", 1, "--lr", 1e-4)
    assert newest(half)["step"] == 9 and len(training.checkpoints(half)) == 1


class Spoiled(torch.nn.Module):
    """y = w x, whose gradient is no number on some of its calls."""

    def __init__(self, when):
        super().__init__()
        self.w, self.calls, self.when = torch.nn.Parameter(torch.ones(3)), 0, when

    def forward(self, x):
        self.calls += 1
        return (self.w * x * (float("nan") if self.calls in self.when else 1.0)).sum()


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_that_are_no_numbers(capsys, scaled):
    """Such a step is left out, counted and said; the others are as if it had not been."""
    weights = []
    for when in ((), (2, 4)):
        model, scaler = Spoiled(when), torch.amp.GradScaler("cpu", enabled=scaled)
        run, optimizer = training.Run(None, None, scaler=scaler), torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        for _ in range(3 + len(when)):
            scaler.scale(model(torch.tensor([1.0, 2.0, 3.0]))).backward()
            norm = training.update(run, optimizer)
            assert bool(norm != norm) == (model.calls in when) and model.w.grad is None
        weights.append(model.w.detach())
        training.check_skipped(run)
        assert run.skipped == len(when)
    assert torch.equal(*weights) and "an update was left out, its gradient is not finite (2 so far)" in capsys.readouterr().err


def test_too_many_of_them_end_the_run(monkeypatch, photos, half):  # noqa: F811
    """With a sentence; what the checkpoints hold is what was learned before."""
    before = newest(half)["model"]
    monkeypatch.setattr(training, "MAX_SKIPPED", 5)
    monkeypatch.setitem(train_vosr.LOSSES, "autoencoder", lambda run, model, *_: {"all": model.vae.encoder.weight.sum() * float("inf")})
    with pytest.raises(training.UserError, match="5 steps in a row had no finite gradient"):
        vosr(monkeypatch, photos, half)
    assert all(torch.equal(x, before[k]) for k, x in newest(half)["model"].items() if k != "vae.std")     # a buffer


# ---- signals as they come: to a trainer and its loader's workers alike, with the handlers that a shell leaves

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
MANY = ["--steps", 999, "--save-every", 999, "--batch-size", 2]
SMALL_TRAINERS = {      # script: its config in models/tiny.py, what stands there instead, its words
    "vosr": ("TinyVOSRConfig", test_train.SMALL, ["--stage", "autoencoder"]),
    "s3diff": ("TinyS3DiffConfig", test_train_s3diff.SMALL_TINY, ["--preset", "tiny", "--init", "none"]),
    "gramsr": ("TinyGramSRConfig", test_train_gramsr.SMALL_TINY,
               ["--preset", "tiny", "--stage", "pixel", "--init", "none"]),
}
STOPPING = "stopping after this step, then saving; again: at once, unsaved"


def be_trainer(name, words, folder, slow_photos, slow_disk, ignored, terminal):
    """train_NAME.py, small, as the first of a session of its own; see `Group`."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)        # of its workers, as where a user starts it
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if ignored:
        signal.signal(ignored, signal.SIG_IGN)
    sys.stdout, sys.stderr = open(folder / "stdout", "w"), open(folder / "stderr", "w")
    if terminal:        # the first one that a session opens to read and write is its own
        sys.stderr = os.fdopen(os.open(terminal, os.O_RDWR), "w")
    patch, read, write = pytest.MonkeyPatch(), Photos.__getitem__, saving.write
    runs.watch_less(patch), torch.set_num_threads(1)

    def read_slowly(photos, i):
        time.sleep(slow_photos if get_worker_info() else 0)
        return read(photos, i)

    def write_slowly(path, state):
        print("writing")
        time.sleep(slow_disk)
        write(path, state)

    patch.setattr(Photos, "__getitem__", read_slowly), patch.setattr(saving, "write", write_slowly)
    found, small, _ = SMALL_TRAINERS[name]
    patch.setattr(models.tiny, found, lambda **_: small)
    sys.argv = [f"train_{name}.py", *map(str, words)]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


class Group(runs.Script):
    """A trainer with two workers, two micro-batches a step, in a process group that gets signals as a whole."""

    def __init__(self, name, photos, out, *more, slow_photos=0, slow_disk=0, ignored=None, terminal=None):  # noqa: F811
        self.folder, self.log = out.with_name(f"{out.name}, said"), out / "log.csv"
        self.folder.mkdir()
        words = [*SMALL_TRAINERS[name][2], *MANY, "--data", photos, "--out", out, "--device", "cpu", "--workers", 2,
                 "--micro-batch", 1, "--log-every", 1, *more]
        self.process = runs.fork(be_trainer, name, words, self.folder, slow_photos, slow_disk, ignored, terminal)

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def wait_for(self, words, where):
        """Until it has said so -> seconds"""
        start = time.time()
        while words not in self.said(where):
            assert self.process.is_alive() and time.time() < start + 60, self.said("stderr")
            time.sleep(0.01)
        return time.time() - start

    def end(self):
        """Wait for it and all its workers -> exit status, what stands on stdout and stderr"""
        self.process.join(60)
        for _ in range(1000):
            with suppress(ProcessLookupError):
                time.sleep(0.02), os.killpg(self.process.pid, 0)
                continue
            break
        else:
            raise AssertionError("workers are left")
        return self.process.exitcode, self.said("stdout"), self.said("stderr").splitlines()


@posix
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_signal_to_the_whole_group(name, number, photos, tmp_path):  # noqa: F811
    """Workers get it, too, and yet the step at hand ends and is saved; the status is no success."""
    run = Group(name, photos, tmp_path / "out")
    run.wait_for_a_step()
    run.signal(number)
    status, said, errors = run.end()
    assert status == 130 and [line for line in errors if line] == [STOPPING]
    step = newest(tmp_path / "out")["step"]
    assert step > 0 and f"stopped at step {step} and saved; the same command goes on from here" in said


@posix
@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_again_while_it_is_saved(name, photos, tmp_path):  # noqa: F811
    """Photos and checkpoints on a slow disk: the first Ctrl-C is answered at once, more of them lose nothing."""
    run = Group(name, photos, tmp_path / "out", slow_photos=0.3, slow_disk=1)
    run.wait_for_a_step()
    run.signal(signal.SIGINT)
    assert run.wait_for(STOPPING, "stderr") < 0.3
    run.wait_for("writing", "stdout")
    run.signal(signal.SIGINT)
    run.wait_for("saving, one moment", "stderr")
    run.signal(signal.SIGTERM)
    status, said, errors = run.end()
    assert status == 130 and "goes on from here" in said
    assert [line for line in errors if line] == [STOPPING, "saving, one moment", "saving, one moment"]
    assert newest(tmp_path / "out")["step"] > 0


@posix
def test_ctrl_c_again_before_it_is_saved(photos, tmp_path):  # noqa: F811
    """Then it ends as soon as workers have read what they had begun, and says that nothing was saved."""
    run = Group("vosr", photos, tmp_path / "out", slow_photos=1)
    run.wait_for_a_step()
    run.signal(signal.SIGINT)
    run.wait_for(STOPPING, "stderr")
    run.signal(signal.SIGINT)
    assert run.wait_for("train_vosr: stopped, nothing saved", "stderr") < 4
    status, said, errors = run.end()
    assert status == 130 and "Traceback" not in "".join(errors) and not training.checkpoints(tmp_path / "out")


@posix
def test_nohup(photos, tmp_path):  # noqa: F811
    """A terminal that is closed does not stop what was started to go on without it."""
    run = Group("vosr", photos, tmp_path / "out", ignored=signal.SIGHUP)
    run.wait_for_a_step()
    run.signal(signal.SIGHUP)
    rows = run.log.read_text().count("\n")
    runs.wait_for_row(run.log, rows + 3, run.process)
    assert run.process.is_alive() and not run.said("stderr")
    run.signal(signal.SIGTERM)
    status, said, errors = run.end()
    assert status == 130 and newest(tmp_path / "out")["step"] >= rows + 3


@posix
def test_a_closed_terminal(photos, tmp_path):  # noqa: F811
    """Its end is SIGHUP for all processes in it, and what they print fails."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    run = Group("vosr", photos, tmp_path / "out", terminal=os.ttyname(theirs))
    run.wait_for_a_step()
    os.close(theirs), os.close(ours)
    status, said, _ = run.end()
    assert status == 130 and "goes on from here" in said and newest(tmp_path / "out")["step"] > 0


@posix
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_next_stage_does_not_begin(photos, tmp_path):  # noqa: F811
    """stage1 && stage2 in a shell, real from the first import on; Ctrl-C reaches both."""
    words = ["--stage", "autoencoder", "--data", photos, "--out", tmp_path / "out", "--device", "cpu", "--batch-size", "2",
             "--workers", "2", "--log-every", "1"]
    with open(tmp_path / "said", "w") as said:
        shell = subprocess.Popen(["bash", "-c", '"$@" && echo stage 2 begins', "bash", sys.executable,
                                  ROOT / "train_vosr.py", *words], stdout=said, stderr=said, start_new_session=True)
    while not (tmp_path / "out" / "log.csv").exists() or (tmp_path / "out" / "log.csv").read_text().count("\n") < 3:
        assert shell.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    os.killpg(shell.pid, signal.SIGINT)
    assert shell.wait(60) == 130
    said = (tmp_path / "said").read_text()
    assert STOPPING in said and "goes on from here" in said and "stage 2" not in said and "Traceback" not in said


@posix
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_ends_it(photos, tmp_path, workers):  # noqa: F811
    """Workers, deaf to SIGTERM, are not waited for."""
    (tmp_path / "out" / "loss.png").mkdir(parents=True)        # so the chart cannot be written
    run = Group("vosr", photos, tmp_path / "out", "--save-every", 2, "--workers", workers)
    status, _, errors = run.end()
    assert status == 1 and len(errors) == 1 and "loss.png: cannot be written (Is a directory)" in errors[0]


# ---- what a stop leaves behind

@pytest.mark.parametrize("name, stage, earlier", [
    ("vosr", "flow", "autoencoder"), ("s3diff", "adapters", "prior"), ("gramsr", "semantic", "pixel")])
def test_init_that_is_not_over(monkeypatch, photos, tmp_path, capsys, name, stage, earlier):  # noqa: F811
    """A line says so, as long as its own command does not end it; a damaged checkpoint is passed over, as there."""
    def launch(stage, out, *more, **stop):
        if name == "s3diff":
            return test_train_s3diff.launch(monkeypatch, photos, tmp_path / out, "--stage", stage, *more, **stop)
        script = test_train if name == "vosr" else test_train_gramsr
        return script.launch(monkeypatch, photos, tmp_path / out, stage, *more, **stop)

    monkeypatch.setitem(train_vosr.PRESETS, "tiny", (test_train.SMALL, test_train.STAGES))
    test_train_s3diff.shrink(monkeypatch, crop=32), test_train_gramsr.shrink(monkeypatch)
    launch(earlier, "before", stop_at=2)
    launch(stage, "one", "--init", tmp_path / "before", "--steps", 1)
    line = f"--init {tmp_path / 'before'}: that training stopped at step 2 of 4; its own command goes on with it"
    assert capsys.readouterr().err.splitlines() == [line]
    launch(earlier, "before")
    launch(stage, "two", "--init", tmp_path / "before", "--steps", 1)
    assert capsys.readouterr().err == ""
    truncate(training.checkpoints(tmp_path / "before")[0])
    launch(stage, "three", "--init", tmp_path / "before", "--steps", 1)
    assert capsys.readouterr().err.splitlines() == [line]


def test_init_that_stopped_early_is_over(monkeypatch, photos, tmp_path, capsys):  # noqa: F811
    test_train_gramsr.shrink(monkeypatch)
    test_train_gramsr.launch(monkeypatch, photos, tmp_path / "pixel", "pixel", "--patience", 1, "--lr", 1, "--save-every", 1)
    assert "stopped early" in capsys.readouterr().out and newest(tmp_path / "pixel")["step"] < 4
    test_train_gramsr.launch(monkeypatch, photos, tmp_path / "semantic", "semantic", "--init", tmp_path / "pixel")
    assert capsys.readouterr().err == ""


# ---- a network whose code has changed

def change(out, part, function):
    """The newest checkpoint, as another network would have written it."""
    path = training.checkpoints(out)[0]
    state = torch.load(path, weights_only=True)
    state[part] = function(state[part])
    path.unlink()
    saving.save_checkpoint(out, state.pop("step"), 2, **{k: v for k, v in state.items() if k != "cwd"})


def renamed(tensors):
    name = max(tensors)
    return {f"{name}s" if k == name else k: x for k, x in tensors.items()}


def reshaped(tensors):
    name = max(tensors)
    return tensors | {name: tensors[name][None]}


@pytest.mark.parametrize("changed", [renamed, reshaped])
@pytest.mark.parametrize("name, part", [("vosr", "model"), ("vosr", "ema"), ("s3diff", "model"), ("s3diff", "D"), ("gramsr", "model")])
def test_a_changed_network(monkeypatch, photos, tmp_path, name, part, changed):  # noqa: F811
    """It does not go on from what happens to fit: one line names what does not; with the old code it goes on."""
    SCRIPTS[name](monkeypatch, photos, tmp_path / "out", stop_at=2)
    path = training.checkpoints(tmp_path / "out")[0]
    saved, tensor = path.read_bytes(), max(newest(tmp_path / "out")[part])
    change(tmp_path / "out", part, changed)
    with pytest.raises(training.UserError) as e:
        SCRIPTS[name](monkeypatch, photos, tmp_path / "out")
    assert str(e.value) == (f"{tmp_path / 'out'}: its checkpoint does not fit this network ({tensor}), whose code has "
                            "changed since; begin another --out, or take the change back")
    training.checkpoints(tmp_path / "out")[0].unlink()
    path.write_bytes(saved)
    SCRIPTS[name](monkeypatch, photos, tmp_path / "out", stop_at=1)
    assert newest(tmp_path / "out")["step"] == 3


def test_a_network_of_another_width(monkeypatch, photos, half):  # noqa: F811
    """The same by a change of the preset."""
    small = replace(test_train.SMALL, vae=replace(test_train.SMALL.vae, latent_channels=6))
    monkeypatch.setattr(test_train, "SMALL", small)
    with pytest.raises(training.UserError, match=r"does not fit this network \(vae.encoder.weight\), whose code has changed"):
        vosr(monkeypatch, photos, half)


# ---- two in one folder

@posix
def test_two_trainings_in_one_folder(monkeypatch, photos, tmp_path):  # noqa: F811
    """The second is refused and harms nothing; as soon as the first is gone, by SIGKILL, with workers left, it begins."""
    run = Group("vosr", photos, tmp_path / "out")
    run.wait_for_a_step()
    with pytest.raises(training.UserError, match="out: another training is writing there; choose another folder"):
        vosr(monkeypatch, photos, tmp_path / "out")
    run.process.kill(), run.process.join()
    os.killpg(run.process.pid, 0)       # workers live on until they miss it
    vosr(monkeypatch, photos, tmp_path / "out", more=["--steps", 2])
    assert newest(tmp_path / "out")["step"] == 2
    run.signal(signal.SIGKILL)


def test_a_failure_leaves_the_folder_free(monkeypatch, photos, tmp_path):  # noqa: F811
    """In a notebook, where the error keeps what it came from."""
    with pytest.raises(FileNotFoundError) as kept:
        vosr(monkeypatch, tmp_path / "nowhere", tmp_path / "out")
    vosr(monkeypatch, photos, tmp_path / "out", stop_at=1)
    vosr(monkeypatch, photos, tmp_path / "out", stop_at=1)
    assert kept.value and newest(tmp_path / "out")["step"] == 2


# ---- photos and results in one place

@pytest.mark.parametrize("name", SCRIPTS)
def test_out_below_data(monkeypatch, photos, tmp_path, capsys, name):  # noqa: F811
    """What the training draws there is no photo, when it goes on and when another begins."""
    folder = shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".*"))
    SCRIPTS[name](monkeypatch, folder, folder / "out")
    names = newest(folder / "out")["photos"]
    assert {"sheet.png", "loss.png"} <= {path.name for path in (folder / "out").iterdir()} and "left out" not in capsys.readouterr().out
    SCRIPTS[name](monkeypatch, folder, folder / "out", more=["--steps", STEPS + 1])
    SCRIPTS[name](monkeypatch, folder, folder / "two", stop_at=1)
    said = capsys.readouterr()
    assert said.out.count("2 x result of nanoSR (taken only if named itself)") == 2 and "came after" not in said.err
    assert names == newest(folder / "out")["photos"] == newest(folder / "two")["photos"] == [f"{i}.png" for i in range(5)]


# ---- a disk that is full, or may not be written

def test_a_full_disk(monkeypatch, photos, straight, small_disk, tmp_path):  # noqa: F811
    """As soon as there is room the same command ends as if there had always been."""
    def fill():
        with suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as f:
            while True:
                f.write(bytes(4096))

    fill()
    with pytest.raises(OSError, match="out: cannot be written .No space left on device.; make room, or choose another folder"):
        vosr(monkeypatch, photos, small_disk / "out")
    assert not (small_disk / "out").exists(), "before anything was computed"
    (small_disk / "filler").unlink()
    vosr(monkeypatch, photos, small_disk / "out", stop_at=7)
    fill()
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - 2**17)
    before = training.checkpoints(small_disk / "out")
    with pytest.raises((training.UserError, OSError), match="out/[a-z.]*: cannot be written .No space left on device.; make room"):
        vosr(monkeypatch, photos, small_disk / "out")
    assert training.checkpoints(small_disk / "out") == before and not [*(small_disk / "out").rglob("*.part")]
    (small_disk / "filler").unlink()
    vosr(monkeypatch, photos, small_disk / "out")
    assert same(straight, flat(newest(small_disk / "out")))


@pytest.mark.parametrize("name", SCRIPTS)
def test_out_that_cannot_be_written(monkeypatch, photos, tmp_path, name):  # noqa: F811
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/out: cannot be written .Not a directory.; choose another folder"):
        SCRIPTS[name](monkeypatch, photos, tmp_path / "file" / "out")
