"""The campaign's dry run. Run: python -m pytest -m slow tests/test_campaign.py"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"flow", "distill", "decoder", "prior", "estimator", "adapters", "pixel", "semantic", "texture"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_dry_run(tmp_path):
    """All stages, each from those before it; the same command again does only what is missing."""
    (photos := tmp_path / "photos").mkdir()
    for i in range(4):
        Image.effect_noise((160, 140), 60).convert("RGB").save(photos / f"{i}.png")
    command = ["bash", ROOT / "tests" / "campaign.sh", tmp_path / "out", photos, "--device", "cpu", "--dry"]
    env = os.environ | {"PYTHON": f"{sys.executable} {ROOT / 'tests' / 'shrunk.py'}", "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    said = (tmp_path / "out" / "stages.txt").read_text()
    assert all(f"{stage}: " in said for stage in STAGES) and said.count("crops a second") == len(STAGES) and said.count("PSNR") == 3
    (tmp_path / "out" / "texture" / "done").unlink()
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("crops a second") == 1 and "texture: " in again.stdout
