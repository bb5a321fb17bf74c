"""Training that survives: killed, out of disk, damaged checkpoints, moving photos, gradients that are no numbers.

Run: python -m pytest tests/test_survival.py
"""

import errno
import os
import random
import shutil
import sys
import time
from dataclasses import replace

import pytest
import runs
import test_train
import test_train_gramsr
import test_train_s3diff
import torch
from PIL import Image
from test_train import newest, photos, same  # noqa: F401 (photos is a fixture)
from test_train_s3diff import flat

import train_gramsr
import train_s3diff
import train_vosr
import training

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
    bad = bad.rename(bad.with_name(f"checkpoint-00000007-{training.sha256_of(bad)[:16]}.pt"))
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
        run, optimizer = training.Run(None, None, scaler=scaler), torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3 + len(when)):
            scaler.scale(model(torch.tensor([1.0, 2.0, 3.0]))).backward()
            norm = training.update(run, optimizer)
            assert (norm != norm) == (model.calls in when) and model.w.grad is None
        weights.append(model.w.detach())
        assert run.skipped == len(when) and run.skipped_in_a_row == 0
    assert torch.equal(*weights) and "a step was left out, its gradient is nan (2 so far)" in capsys.readouterr().err


def test_too_many_of_them_end_the_run(monkeypatch, photos, half):  # noqa: F811
    """With a sentence; what the checkpoints hold is what was learned before."""
    before = newest(half)["model"]
    monkeypatch.setattr(training, "MAX_SKIPPED", 5)
    monkeypatch.setitem(train_vosr.LOSSES, "autoencoder", lambda run, model, *_: {"all": model.vae.encoder.weight.sum() * float("inf")})
    with pytest.raises(training.UserError, match="5 steps in a row had no finite gradient"):
        vosr(monkeypatch, photos, half)
    assert all(torch.equal(x, before[k]) for k, x in newest(half)["model"].items() if k != "vae.std")     # a buffer
