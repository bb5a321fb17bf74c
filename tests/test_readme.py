"""README's first command in a subprocess, as a new user runs it. Its second command is what .ci/run runs.

Run: python -m pytest tests/test_readme.py
"""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import runs
import torch
from PIL import Image

from models.support.imaging import read_picture
from models.support.metrics import psnr_y
from models.vosr import VOSR

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands(*starts):
    """Shell lines of README's code blocks that begin with one of these words."""
    lines = [line.split("#")[0].strip() for block in re.findall(r"```\w*\n(.*?)```", README, re.S)
             for line in block.splitlines()]
    return [line for line in lines if line.startswith(starts)]


def test_first_command(tmp_path):
    """Offline, from any folder: the picture, the sheet, one line per step of the way."""
    assert "pip install -r requirements.txt && python sample.py" in README
    done = subprocess.run([sys.executable, str(ROOT / "sample.py")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vosr-tiny" in done.stdout and "128x100" in done.stdout
    assert Image.open(tmp_path / "out" / "example.png").size == (512, 400)
    assert (tmp_path / "out" / "sheet.png").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_embedded_model_beats_bicubic_on_the_example():
    model = VOSR.from_pretrained()
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
