"""Machines of others: foreign packages, builds of torch, systems, consoles, paths.    python -m pytest tests/test_surroundings.py"""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import runs
import test_train
import test_train_gramsr
import test_train_s3diff
import torch
from PIL import Image
from test_sample import Notebook
from test_survival import SCRIPTS, Group, posix
from test_train import newest, photos, same  # noqa: F401 (photos is a fixture)
from test_train_s3diff import flat

import degrade

import train_gramsr
import train_s3diff
import train_vosr
import training
from models.support import saving
from models.support.arguments import SIGNALS
from models.support.photos import list_photos

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = {"vosr": (train_vosr, ["--stage", "autoencoder"]), "s3diff": (train_s3diff, []), "gramsr": (train_gramsr, ["--stage", "pixel"])}


@pytest.mark.parametrize("script", ["sample.py", "train_vosr.py"])
def test_foreign_packages_of_our_names(tmp_path, script):
    for name in ("models", "models/support", "training", "degrade"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a foreign package was imported')")
    done = subprocess.run([sys.executable, ROOT / script, "--help"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("flag, values", [
    ("--steps", ["0", "-1", "1.5", "x"]), ("--batch-size", ["0", "-2"]), ("--micro-batch", ["0", "-1"]), ("--save-every", ["0", "-5"]),
    ("--keep", ["0"]), ("--lr", ["nan", "inf", "0", "-1e-3", ""]), ("--seed", ["-1", "nan", str(2**63)]), ("--workers", ["-1"]),
    ("--device", ["cat", "cuda:99"]),
])
def test_numbers_that_make_no_sense(monkeypatch, tmp_path, capsys, name, flag, values):
    script, words = TRAINERS[name]
    for value in values:
        monkeypatch.setattr(sys, "argv", ["train.py", *words, "--data", "x", "--out", str(tmp_path / "out"), f"{flag}={value}"])
        with pytest.raises(SystemExit) as e:
            script.main()
        assert e.value.code == 2 and f"argument {flag}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["--rank-unet", "--rank-vae"])
def test_ranks(monkeypatch, tmp_path, capsys, name):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "x", "--out", str(tmp_path), name, "0"])
    with pytest.raises(SystemExit):
        train_s3diff.main()
    assert f"argument {name}: 0 is no" in capsys.readouterr().err


def test_windows_syncs_only_what_may_be_written(monkeypatch, tmp_path):
    fcntl, seen = pytest.importorskip("fcntl"), []
    monkeypatch.setattr(os, "fsync", lambda f: seen.append(fcntl.fcntl(f, fcntl.F_GETFL) & os.O_ACCMODE))
    training.write(tmp_path / "a.pt", {"x": torch.ones(2)})
    assert seen and os.O_RDONLY not in seen and torch.load(tmp_path / "a.pt")["x"].sum() == 2


def test_windows_renames_over_nothing(monkeypatch, tmp_path):
    """A run that is stopped at once saves what it found: a checkpoint of the same name, which os.rename refuses there."""
    monkeypatch.setattr(Path, "rename", None)
    for _ in range(2):
        saving.save_checkpoint(tmp_path, 3, 2, settings={})
    assert newest(tmp_path)["step"] == 3 and len(training.checkpoints(tmp_path)) == 1


def test_torch_without_distributed(monkeypatch, photos, tmp_path):  # noqa: F811
    """training.py is imported anew by a process in which torch says what builds without it say, and trains."""
    program = f"""
import sys, torch.distributed as dist
dist.is_available = lambda: False
for name in ("is_initialized", "get_rank", "get_world_size", "all_reduce", "init_process_group"):
    delattr(dist, name)
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pathlib, pytest, test_survival
with pytest.MonkeyPatch.context() as patch:
    test_survival.vosr(patch, pathlib.Path({str(photos)!r}), pathlib.Path({str(tmp_path)!r}), stop_at=2)
    test_survival.vosr(patch, pathlib.Path({str(photos)!r}), pathlib.Path({str(tmp_path)!r}), stop_at=2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert newest(tmp_path)["step"] == 4


@pytest.mark.parametrize("works", [True, False])
def test_compile_where_there_may_be_no_compiler(monkeypatch, capsys, works):
    def no_compiler(function):
        raise RuntimeError("no C++ compiler found\n" + "at great length\n" * 90)

    compiled, networks = [], [torch.nn.Identity(), torch.nn.Identity()]
    monkeypatch.setattr(torch, "compile", (lambda function: function) if works else no_compiler)
    for network in networks:
        network.compile = lambda: compiled.append(network)
    training.compile_all(networks, torch.device("cpu"))
    said = capsys.readouterr().err
    assert len(compiled) == 2 * works and said.count("\n") == (not works) and ("no C++ compiler found" in said) == (not works)


def test_real_compile_without_a_compiler(tmp_path):
    """With everything that an earlier day left in the cache."""
    program = (f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); import training; x = torch.nn.Linear(2, 2); "
               "training.compile_all([x], torch.device('cpu')); print(x(torch.ones(1, 2)).shape)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**os.environ, "CXX": str(tmp_path / "none"), "PATH": str(tmp_path)})
    assert done.returncode == 0 and "[1, 2]" in done.stdout and len(done.stderr.splitlines()) == 1 and "--compile is left out" in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_names_that_a_log_cannot_hold(monkeypatch, photos, tmp_path, name):  # noqa: F811
    """Standard output of Windows, or one that goes to a file: cp1252."""
    out = tmp_path / "東京 \udcff"
    monkeypatch.setattr(sys, "stderr", sys.stderr)      # to be put back
    for _ in range(2):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding="cp1252"))
        with training.one_line_errors("train"):
            SCRIPTS[name](monkeypatch, photos, out, stop_at=1)
        sys.stdout.flush()
    assert b"resumed from" in raw.getvalue() and b"\\u6771\\u4eac" in raw.getvalue() and newest(out)["step"] == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_another_spelling_of_the_same_place(monkeypatch, photos, tmp_path, capsys, name):  # noqa: F811
    (tmp_path / "tr").mkdir()
    os.symlink(photos, tmp_path / "tr" / "good")
    monkeypatch.chdir(tmp_path)
    spellings = ["tr/good", "tr/good/", "./tr/good", "tr/../tr/good", str(tmp_path / "tr" / "good"), str(photos)]
    spellings = spellings if name == "vosr" else spellings[1::4]         # the code is the same
    for spelling in spellings:
        SCRIPTS[name](monkeypatch, spelling, tmp_path / "out", stop_at=1)
        assert "came after" not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "tr")
    SCRIPTS[name](monkeypatch, "good", tmp_path / "out", stop_at=1)
    assert newest(tmp_path / "out")["step"] == len(spellings) + 1


def test_the_same_words_for_another_place(monkeypatch, tmp_path):
    """Seen from another folder; and where both moved together, the words count."""
    for folder in ("a/tr", "b/tr"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    saving.save_checkpoint(tmp_path / "a", 1, 2, settings={"data": "tr", "init": None, "seed": 0})
    assert saving.load_checkpoint(tmp_path / "a", {"data": "tr", "init": None, "seed": 0})["step"] == 1
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(training.UserError, match="--data: .*a.tr, not tr; use that or another --out, or --moved"):
        saving.load_checkpoint(tmp_path / "a", {"data": "tr", "init": None, "seed": 0})
    monkeypatch.chdir(tmp_path)
    os.rename("a", "c")
    monkeypatch.chdir(tmp_path / "c")
    assert saving.load_checkpoint(".", {"data": "tr", "init": None, "seed": 0})["step"] == 1
    for settings in ({"data": "x"}, {"init": "x"}, {"data": "tr", "init": "../b"}):
        with pytest.raises(training.UserError):
            saving.load_checkpoint(".", settings)
    with pytest.raises(training.UserError, match="--seed"):
        saving.load_checkpoint(".", {"data": "x", "seed": 1}, moved=True)
    assert saving.load_checkpoint(".", {"data": "x", "seed": 0}, moved=True)


def test_nothing_of_distributed_is_imported_early():
    """Its tensors cost a second, and some builds have none."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import training; print('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


# ---- notebooks, threads

STAGES = {      # all stages of each script, each with the words that follow from the one before
    "vosr": [("autoencoder", None), ("flow", "autoencoder"), ("distill", "flow"), ("decoder", "distill")],
    "s3diff": [("prior", None), ("estimator", "prior"), ("adapters", "estimator")],
    "gramsr": [("pixel", None), ("semantic", "pixel"), ("texture", "semantic")],
}


def train_all(name, patch, photos, folder):  # noqa: F811
    """One step of each stage -> {stage: all tensors of its checkpoint}"""
    made = {}
    for stage, before in STAGES[name]:
        more = ["--steps", 1, *(["--init", folder / before] if before else [])]
        if name == "s3diff":
            test_train_s3diff.launch(patch, photos, folder / stage, "--stage", stage, *more)
        else:
            {"vosr": test_train, "gramsr": test_train_gramsr}[name].launch(patch, photos, folder / stage, stage, *more)
        made[stage] = flat(newest(folder / stage))
    return made


@pytest.mark.parametrize("name", SCRIPTS)
def test_another_default_device(monkeypatch, photos, tmp_path, name):  # noqa: F811
    """A notebook that has begun with torch.set_default_device("cuda"); here all that falls on it is empty."""
    def elsewhere(function):
        def wrapped(run):
            torch.set_default_device("meta")
            try:
                return function(run)
            finally:
                torch.set_default_device(None)
        return wrapped

    monkeypatch.setitem(train_vosr.PRESETS, "tiny", (test_train.SMALL, test_train.STAGES))
    test_train_s3diff.shrink(monkeypatch, crop=32), test_train_gramsr.shrink(monkeypatch)
    usual, fit = train_all(name, monkeypatch, photos, tmp_path / "usual"), training.fit
    monkeypatch.setattr(training, "fit", lambda run, step, evaluate, save: fit(run, elsewhere(step), elsewhere(evaluate), save))
    found = train_all(name, monkeypatch, photos, tmp_path / "found")
    assert all(same(found[stage], usual[stage]) for stage in usual)


def test_constants_are_on_the_cpu():
    """Also where the default was another one when they were made."""
    program = f"""
import sys, torch
torch.set_default_device("meta")
sys.path.insert(0, {str(ROOT)!r})
import degrade, sample
from models.support import winograd
torch.set_default_device(None)
x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
degrade.degrade(x, degrade.RECIPES["s3diff"], torch.Generator().manual_seed(0))
winograd.conv3x3(torch.rand(1, 4, 9, 9), torch.rand(4, 4, 3, 3), torch.rand(4))
torch.set_default_device("meta")
print(sample.load("vosr-tiny", "cpu")(x[..., :8, :8]).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "[1, 3, 32, 32]" in done.stdout, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_main_in_a_notebook(monkeypatch, photos, tmp_path, name):  # noqa: F811
    """In a thread, then again; stdout is no file; what other programs do about signals stays."""
    handlers = {number: (lambda *_: None) for number in SIGNALS}
    before, stream = {number: signal.signal(number, handler) for number, handler in handlers.items()}, Notebook()
    monkeypatch.setattr(sys, "stdout", stream)
    try:
        thread = threading.Thread(target=SCRIPTS[name], args=(monkeypatch, photos, tmp_path), kwargs={"stop_at": 1})
        thread.start(), thread.join()
        assert newest(tmp_path)["step"] == 1
        SCRIPTS[name](monkeypatch, photos, tmp_path, stop_at=2)
        assert newest(tmp_path)["step"] == 3 and {number: signal.getsignal(number) for number in SIGNALS} == handlers
    finally:
        [signal.signal(number, handler) for number, handler in before.items()]
    assert stream.said.count("the same command goes on from here") == 2 and "resumed from" in stream.said


def test_scripts_leave_signals_as_they_were(tmp_path, monkeypatch):
    """%run in a notebook."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "teal").save("a.png")
    seen, here = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(runs.signal, "signal", lambda *args, signal=signal.signal: seen.append(args) or signal(*args))
    assert runs.here(ROOT / "degrade.py", "a.png", "out")[0] == 0 and signal.getsignal(signal.SIGTERM) == here
    assert seen[0][0] == signal.SIGTERM


# ---- paths, output

def test_home_folder(monkeypatch, photos, tmp_path):  # noqa: F811
    """In every path; shells leave ~ in --out=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "work").mkdir(), monkeypatch.chdir(tmp_path / "work")
    folder = shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "list.txt").write_text("~/photos\n~/photos/0.png\n")
    assert len(list_photos(tmp_path / "list.txt")) == 6
    monkeypatch.setitem(train_vosr.PRESETS, "tiny", (test_train.SMALL, test_train.STAGES))
    test_train.launch(monkeypatch, "~/list.txt", "~/ae", "autoencoder", "--steps", 1)
    test_train.launch(monkeypatch, "~/photos", "~/flow", "flow", "--init=~/ae", "--steps", 1)
    for place in (folder, folder / "0.png"):
        monkeypatch.setattr(sys, "argv", ["degrade.py", str(place).replace(str(tmp_path), "~"), "~/pairs"])
        with pytest.raises(SystemExit) as e:
            degrade.main()
        assert e.value.code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"work", "photos", "list.txt", "ae", "flow", "pairs"}
    assert not [*(tmp_path / "work").iterdir()] and len([*(tmp_path / "pairs" / "lq").iterdir()]) == 5


@posix
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_log_of_what_is_printed(name, photos, tmp_path):  # noqa: F811
    """Lines come at once, also into a file, and no bars are among them."""
    run = Group(name, photos, tmp_path / "out")
    run.wait_for_a_step()
    assert "photos to train on" in run.said("stdout") and "step 0" not in run.said("stdout")
    runs.wait_for_row(run.log, 10, run.process)
    assert run.said("stderr") == ""
    run.signal(signal.SIGTERM)
    _, said, errors = run.end()
    assert "\r" not in said and "it/s" not in said + "".join(errors) and len(errors) == 2


# ---- a disk that refuses, for degrade.py

def test_degrade_ends_on_a_full_disk(monkeypatch, capsys, small_disk, tmp_path):
    (tmp_path / "hr").mkdir()
    for i in range(18):
        Image.effect_noise((256, 256), 200).convert("RGB").save(tmp_path / "hr" / f"{i:02}.png")
    calls, real = [], degrade.pair
    monkeypatch.setattr(degrade, "pair", lambda *args: calls.append(1) or real(*args))

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["degrade.py", str(tmp_path / "hr"), *more])
        with pytest.raises(SystemExit) as e:
            degrade.main()
        out, err = capsys.readouterr()
        return e.value.code, out.splitlines(), err.splitlines()

    status, out, err = run(str(small_disk))
    done = len(calls) - 1
    assert status == 1 and 2 < done < 17 and err[-1] == f"stopped after {done + 1} of 18; add --skip-existing to go on"
    assert "cannot be written (No space left on device); make room, or choose another folder" in err[0] and len(err) == 2
    assert len([*small_disk.rglob("*.png")]) in (2 * done, 2 * done + 1) and not [*small_disk.rglob("*.part")]
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    status, out, err = run(str(small_disk), "--skip-existing")
    assert status == 0 and err == [] and len(calls) == 19 and len([*small_disk.rglob("*.png")]) == 36
    (tmp_path / "file").touch()
    status, out, err = run(str(tmp_path / "file" / "out"))
    assert "file/out: cannot be written (Not a directory); choose another folder" in status and len(calls) == 19
