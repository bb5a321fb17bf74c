"""tests/lab.py: that every claim names what is there, what a verdict is, and one claim from training to table."""

import subprocess
import sys
from pathlib import Path

import lab
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("key", lab.CLAIMS)
def test_names(key):
    claim = lab.CLAIMS[key]
    assert all(training in lab.TRAININGS for training, _ in claim.variants.values())
    for metric, a, b in claim.better + claim.like:
        assert metric in lab.SHOWN and {a, b} <= claim.variants.keys() and a != b
    assert claim.better


def test_trainings_go_on_from_others():
    assert all(not what.after or what.after in lab.TRAININGS for what in lab.TRAININGS.values())
    assert {name for claim in lab.CLAIMS.values() for name, _ in claim.variants.values()} <= lab.TRAININGS.keys()


@pytest.mark.parametrize("metric, a, b, expected", [
    ("psnr_y", [24.0, 24.2], [23.0, 23.2], 1), ("niqe", [24.0, 24.2], [23.0, 23.2], -1), ("psnr_y", [24.0, 23.0], [23.4, 23.6], 0),
    ("rfd", [0.1, 0.1], [0.2, 0.2], 1), ("psnr_y", [1.0, 1.0], [1.0, 1.0], 0)])
def test_compare(metric, a, b, expected):
    assert lab.compare(metric, a, b) == expected and lab.compare(metric, b, a) == -expected


def test_verdicts():
    far, near, wide = [20.0, 20.1], [24.0, 24.1], [20.0, 24.0]
    claim = lab.Claim("", "", {}, [("psnr_y", "a", "b"), ("psnr_y", "a", "c")])
    figures = {name: {"psnr_y": x} for name, x in {"near": near, "far": far, "wide": wide}.items()}

    def said(a, b, c, **changes):
        vars(claim).update(like=[], **changes)
        return lab.verdict(claim, {"a": figures[a], "b": figures[b], "c": figures[c]})

    assert said("near", "far", "far") == "seen"
    assert said("near", "far", "wide") == "undecided"
    assert said("far", "far", "near") == "refuted"
    claim.like = [("psnr_y", "a", "c")]
    claim.better = [("psnr_y", "a", "b")]
    same = {"a": figures["near"], "b": figures["far"], "c": figures["near"]}
    assert lab.verdict(claim, same) == "seen" and lab.verdict(claim, same | {"c": figures["far"]}) == "refuted"


@pytest.mark.slow
def test_a_claim_of_digits(tmp_path):
    words = ["--out", tmp_path, "--only", "digits-distill", "--seeds", "2", "--steps", "1"]
    words = [sys.executable, ROOT / "tests" / "lab.py", *words]
    first, again = (subprocess.run(words, capture_output=True, text=True, cwd=tmp_path) for _ in range(2))
    assert first.returncode == 0, first.stderr
    table = [line for line in first.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 5 and "read | distance" in table[0]
    assert first.stdout.count("trained ") == 4 and again.stdout.splitlines() == table
    assert Image.open(tmp_path / "digits-distill-sheet.png").height > 64


@pytest.mark.slow
def test_one_claim(tmp_path):
    """Two variants, two seeds, two steps: a table with figures; a second call trains and measures nothing again."""
    for i in range(4):
        small = np.random.RandomState(i).randint(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(small).resize((300, 240), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    words = ["--data", tmp_path, "--out", tmp_path / "lab", "--only", "fig9", "--seeds", "2", "--steps", "2"]
    words = [sys.executable, ROOT / "tests" / "lab.py", *words]
    first, again = (subprocess.run(words, capture_output=True, text=True, cwd=tmp_path) for _ in range(2))
    assert first.returncode == 0, first.stderr
    table = [line for line in first.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 5 and all(line.count("|") == table[0].count("|") for line in table) and "±" in table[-1]
    assert first.stdout.count("trained ") == 4 and again.stdout.splitlines() == table
    assert (tmp_path / "lab" / "fig9.png").is_file() and Image.open(tmp_path / "lab" / "fig9-sheet.png").width > 1000
