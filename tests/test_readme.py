"""README: its commands have the flags they name, its first one runs, its exercises print what it says.

Run: python -m pytest tests/test_readme.py
"""

import ast
import math
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import runs
import student
import torch
from PIL import Image

from models.support.imaging import read_picture
from models.support.metrics import psnr_y
from models.tiny import TinyVOSR

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ((ROOT / file).read_text() for file in ("README.md", "tests/RESULTS.md"))
CHAPTER = README[README.index("## 12. Exercises") : README.index("## 13.")]
EXERCISES = dict(re.findall(r"^\*\*(\w+)\. (?:(?!^\*\*\w+\. ).)*?```python\n(.*?)```", CHAPTER, re.M | re.S))
EXERCISES["3"] = EXERCISES["2"] + EXERCISES["3"]        # which says so
FIRST = re.search(r"^### In images.*?```python\n(.*?)```", CHAPTER, re.M | re.S)[1]        # what the exercises on photos begin with


def commands(*starts):
    """Shell lines of code blocks that begin with one of these words."""
    blocks = re.findall(r"```\w*\n(.*?)```", README + RESULTS, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(starts)]


def test_first_command(tmp_path):
    """Offline, from any folder: the picture, the sheet, one line per step of the way."""
    assert "pip install -r requirements.txt && python sample.py" in README
    done = subprocess.run([sys.executable, str(ROOT / "sample.py")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model all" in done.stdout and "128x100" in done.stdout and "PSNR-Y" in done.stdout
    for name in ("vosr-tiny", "s3diff-tiny", "gramsr-tiny"):
        assert Image.open(tmp_path / "out" / name / "example.png").size == (512, 400)
    assert (tmp_path / "out" / "sheet.png").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_embedded_model_beats_bicubic_on_the_example():
    model = TinyVOSR.from_pretrained("vosr-tiny")
    assert (ROOT / "models" / "vosr_tiny.safetensors").stat().st_size <= 24e6
    lq, hq = (read_picture(ROOT / "assets" / file)[0] for file in ("example.png", "example_hq.png"))
    sr = model.upscale(lq)
    bicubic = torch.nn.functional.interpolate(lq, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)
    assert psnr_y(sr, hq, 4) > psnr_y(bicubic, hq, 4) + 0.2
    corner = lq[..., :32, :40]
    first, again, other = (model.upscale(corner, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@cache
def usage(script):
    status, said, _ = runs.here(ROOT / script, "--help")
    assert status == 0
    return said


@pytest.mark.parametrize("command", commands("python sample.py", "python degrade.py", "python train_", "torchrun"))
def test_flags_of_every_command_exist(command):
    _, script, command = re.split(r"(\w+\.py)", command, maxsplit=1)
    for flag in re.findall(r"--[\w-]+", command):
        assert re.search(rf"{flag}\b", usage(script)), f"{script} has no {flag}"


def printed(exercise):
    """Run an exercise as a reader would.  -> the numbers of each line it prints"""
    done = subprocess.run([sys.executable, "-c", FIRST + EXERCISES[exercise]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = r"-?\d+\.?\d*(?:e[+-]\d+)?"
    return [[float(x) for x in re.findall(number, line.split(":")[-1])] for line in done.stdout.splitlines()]


def said(exercise):
    """The numbers in what README says about an exercise's outcome, in order; whole ones are words."""
    after = README[README.index(f"**{exercise}. "):].split("```")[2].split("\n\n")[0]
    return [float(x) for x in re.findall(r"-?\d+\.\d+", after)]


@pytest.mark.parametrize("exercise, within", [("1", 0.11), ("2", 0.011), ("3", 0.11), ("5", 0.015), ("6", 0.11)])
def test_exercise_prints_what_readme_says(exercise, within):
    """Another processor rounds differently, so the last digit may be another one."""
    lines, expected = printed(exercise), said(exercise)
    if exercise == "3":
        lines = lines[-4:]
    if exercise == "5":
        lines = [*zip(*lines)]      # README goes matrix by matrix
    numbers = [x for line in lines for x in line]
    assert expected[: len(numbers)] == pytest.approx(numbers, abs=within, rel=0.005)


def test_exercise_with_adapters():
    plain, bent = (lambda rows: (rows[:3], rows[3:]))(printed("4"))
    start, end, better = said("4")[:3]
    assert [plain[0], bent[0]] == [pytest.approx([start, 0], abs=2e-3)] * 2       # B is zero, so A has no gradient
    assert plain[1][1] > 1e-3 and bent[1][1] > 1e-3
    assert plain[2][0] == pytest.approx(end, abs=2e-3) and bent[2][0] == pytest.approx(better, abs=2e-3)


def test_pictures_of_the_lecture():
    """Each of its pictures is drawn by figures.py, and small."""
    pictures = set(re.findall(r"\]\(assets/([^)]+)\)", README))
    drawn = {f.name for f in ast.parse((ROOT / "tests/figures.py").read_text()).body if isinstance(f, ast.FunctionDef)}
    assert pictures and {Path(name).stem for name in pictures} <= drawn
    assert max((ROOT / "assets" / name).stat().st_size for name in pictures) < 150_000


ANSWERS = (ROOT / "tests" / "ANSWERS.md").read_text()
WRITTEN = re.findall(r"```python\n(.*?)```", ANSWERS, re.S)


@pytest.mark.parametrize("code", WRITTEN, ids=lambda code: re.search(r"def (\w+)", code)[1])
def test_answers_pass_the_students_check(code, monkeypatch, capsys):
    """As when the student writes them into tests/student.py; the file as it lies here says that nothing is written."""
    name = re.search(r"def (\w+)", code)[1]
    assert student.main([name]) == 1 and f"{name}: not written yet" in capsys.readouterr().out
    space = {"torch": torch, "math": math}
    exec(code, space)
    monkeypatch.setattr(student, name, space[name])
    assert student.main([name]) == 0 and f"{name}: right" in capsys.readouterr().out


@pytest.mark.parametrize("name, right, wrong", [
    ("guided", "weak * z_lq", "z_lq"), ("guided", "torch.zeros_like(feat)", "feat"), ("guided", "guidance * (", "("),
    ("guided", "if guidance == 1", "if False"), ("loss_gram", "sr @ sr.mT", "2 * sr @ sr.mT"),
    ("loss_gram", "sr = torch.nn.functional.normalize(sr, dim=-1)", "pass"), ("loss_gram", ".mean()", ".sum()"),
    ("motion", "+ math.sin", "- math.sin"), ("motion", "/ weights.sum()", ""), ("motion", "2 * kernel", "kernel")])
def test_students_check_finds_mistakes(name, right, wrong, monkeypatch, capsys):
    code = next(code for code in WRITTEN if f"def {name}(" in code)
    assert right in code
    space = {"torch": torch, "math": math}
    exec(code.replace(right, wrong), space)
    monkeypatch.setattr(student, name, space[name])
    assert student.main([name]) == 1 and f"{name}: right" not in capsys.readouterr().out


def test_every_exercise_is_answered():
    asked = re.findall(r"^\*\*(\w+)\. ", CHAPTER, re.M)
    assert asked and sorted(asked) == sorted(re.findall(r"^\*\*(\w+)\.\*\*", ANSWERS, re.M))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_evening_dry_run(tmp_path):
    """Two steps of all that the lecture trains; the same command again does only what is missing."""
    command = ["bash", ROOT / "tests" / "evening.sh", tmp_path / "out", "--dry"]
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    log = tmp_path / "out" / "evening.log"
    parts = ["plane", *(f"digits-{stage}" for stage in ("flow", "distill", "prior", "estimator", "adapters", "pixel",
                                                          "semantic", "texture")), "read", "line", "line-lq", "line-sr"]
    assert re.findall(r"^([\w-]+): \d+ s$", log.read_text(), re.M) == parts
    (tmp_path / "out" / "line.done").unlink()
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and re.findall(r"^([\w-]+): \d+ s$", again.stdout, re.M) == ["line"]
