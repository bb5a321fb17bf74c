"""Machines of others: foreign packages, builds of torch, systems, consoles, paths.    python -m pytest tests/test_surroundings.py"""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_survival import SCRIPTS
from test_train import newest, photos  # noqa: F401 (photos is a fixture)

import train_gramsr
import train_s3diff
import train_vosr
import training

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
        training.save_checkpoint(tmp_path, 3, 2, settings={})
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
    training.save_checkpoint(tmp_path / "a", 1, 2, settings={"data": "tr", "init": None, "seed": 0})
    assert training.load_checkpoint(tmp_path / "a", {"data": "tr", "init": None, "seed": 0})["step"] == 1
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(training.UserError, match="--data: .*a.tr, not tr; use that or another --out, or --moved"):
        training.load_checkpoint(tmp_path / "a", {"data": "tr", "init": None, "seed": 0})
    monkeypatch.chdir(tmp_path)
    os.rename("a", "c")
    monkeypatch.chdir(tmp_path / "c")
    assert training.load_checkpoint(".", {"data": "tr", "init": None, "seed": 0})["step"] == 1
    for settings in ({"data": "x"}, {"init": "x"}, {"data": "tr", "init": "../b"}):
        with pytest.raises(training.UserError):
            training.load_checkpoint(".", settings)
    with pytest.raises(training.UserError, match="--seed"):
        training.load_checkpoint(".", {"data": "x", "seed": 1}, moved=True)
    assert training.load_checkpoint(".", {"data": "x", "seed": 0}, moved=True)


def test_nothing_of_distributed_is_imported_early():
    """Its tensors cost a second, and some builds have none."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import training; print('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
