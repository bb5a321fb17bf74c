"""models/support/glyphs.py, --data digits and --preset letters. Run: python -m pytest tests/test_glyphs.py"""

import hashlib
import subprocess
import sys
from pathlib import Path

import letters
import numpy as np
import pytest
import runs
import torch
from PIL import Image

import train_gramsr
import train_s3diff
import train_vosr
from degrade import RECIPES, degrade
from models.support import glyphs
from models.support.photos import DataError, photos_for
from models.tiny import LETTERS_VOSR, PixelVAE, PixelVAEConfig, TinyVOSR
from sample import find_system
from training import generator

ROOT = Path(__file__).resolve().parents[1]


def test_bytes_of_cells():
    """The same with Pillow 10.1, 10.4, 11.0, 11.3, 12.0, 12.1 and 13.0 (FreeType 2.13.2 to 2.14.3)."""
    covered = b"".join(glyphs.coverage(c, 34).tobytes() for c in "0123456789")
    assert hashlib.sha256(covered).hexdigest()[:16] == "1965f8aa8bba0339"
    seven = glyphs.draw(glyphs.Cell("7", 1), 34)
    assert seven.shape == (32, 32, 3) and hashlib.sha256(seven.tobytes()).hexdigest()[:16] == "1410084f6ce2504a"
    assert hashlib.sha256(glyphs.draw(glyphs.Cell("Q", 0), 28).tobytes()).hexdigest()[:16] == "14f578f40415a4d1"


@pytest.mark.parametrize("world", glyphs.WORLDS)
def test_characters_fit_their_cells_and_differ(world):
    characters, size = glyphs.WORLDS[world]
    drawn = [glyphs.coverage(c, size) for c in characters]
    for x in drawn:
        assert x[1:-1, 1:-1].astype(int).sum() == x.astype(int).sum()       # none reaches the edge
    stack = torch.from_numpy(np.stack(drawn)).flatten(1).float()
    distances = torch.cdist(stack, stack) + 1e9 * torch.eye(len(stack))
    assert distances.min() > 500        # E and F are nearest among letters


def test_images_are_functions_of_seed_and_number():
    a, b = glyphs.Glyphs("digits", 64, seed=3), glyphs.Glyphs("digits", 64, seed=3)
    a[5]
    assert torch.equal(a[7], b[7]) and a[7].shape == (3, 64, 64)
    assert not torch.equal(a[7], a[8]) and not torch.equal(a[7], glyphs.Glyphs("digits", 64, seed=4)[7])
    cells = a.cells(7)
    assert len(cells) == 4
    third = torch.from_numpy(glyphs.draw(cells[2], 34)).permute(2, 0, 1) / 255
    assert torch.equal(a[7][:, 32:, :32], third)      # row by row


@pytest.mark.parametrize("world", glyphs.WORLDS)
def test_reading(world):
    hq, cells = glyphs.held_out(world, 200)
    share, distances = glyphs.read(world, hq, cells)
    assert share == 1 and distances.max() == 0
    assert len({cell.character for cell in cells}) == len(glyphs.WORLDS[world][0])
    noisy = hq + 0.1 * torch.randn(hq.shape, generator=generator(0))
    share, distances = glyphs.read(world, noisy, cells)
    assert share == 1 and 0.09 < distances.mean() < 0.11
    share, _ = glyphs.read(world, hq.roll(1, 0), cells)       # neighbours' characters
    assert share < 0.3


def test_held_out_cells_are_degraded_so_that_four_in_five_can_be_read():
    _, lq, cells = letters.held_out(n=500)
    assert lq.shape == (500, 3, 8, 8)
    assert 0.76 < letters.read_by_correlation(lq, cells) < 0.84


def test_photos_for_words_and_its_refusals(tmp_path):
    photos, crops, names = photos_for("letters", 64, 0)
    assert crops.shape == (16, 3, 64, 64) and names == ["letters"] and photos[0].shape == (3, 64, 64)
    with pytest.raises(DataError, match="crops of 48"):
        photos_for("digits", 48, 0)
    with pytest.raises(DataError, match="leave out --lq"):
        photos_for("digits", 32, 0, lq=tmp_path)


def test_pixel_vae():
    vae, x = PixelVAE(PixelVAEConfig(cell=4, brightness=0.5)), torch.rand(2, 3, 16, 24, generator=generator(0))
    z = vae.encode(x)
    assert z.shape == (2, 48, 4, 6) and torch.equal(z[1, 1, 2, 3], 0.5 * x[1, 0, 8, 13])
    torch.testing.assert_close(vae.decode(z), x)
    with pytest.raises(ValueError):
        PixelVAEConfig(cell=0)


def test_config_of_a_file():
    from dataclasses import asdict
    assert TinyVOSR.Config.from_dict(asdict(LETTERS_VOSR)) == LETTERS_VOSR


def test_a_line_of_text(tmp_path):
    subprocess.run([sys.executable, "-m", "models.support.glyphs", "2026", tmp_path / "line.png"], check=True, cwd=ROOT)
    assert Image.open(tmp_path / "line.png").size == (128, 32)
    assert glyphs.text("A B", "letters").shape == (1, 3, 32, 96)


# ---- the preset in all three trainings, a few steps of each


def train(monkeypatch, script, stage, out, *more):
    runs.watch_less(monkeypatch)
    script.main(["--preset", "letters", "--stage", stage, "--data", "digits", "--out", str(out), "--steps", "2",
                 "--batch-size", "2", "--device", "cpu", *map(str, more)])
    return out


def restores_a_line(folder):
    lq, _ = degrade(glyphs.text("314"), RECIPES["letters"], generator(0))
    model = find_system(folder).from_pretrained(folder)
    x = model.upscale(lq)
    assert x.shape == (1, 3, 32, 96) and x.isfinite().all()
    return model


def test_vosr(monkeypatch, tmp_path, capsys):
    flow = train(monkeypatch, train_vosr, "flow", tmp_path / "flow")
    one = train(monkeypatch, train_vosr, "distill", tmp_path / "one", "--init", flow)
    assert restores_a_line(flow).cfg.steps == 16
    model = restores_a_line(one)
    assert model.cfg.steps == 1 and model.dit.local and model.cfg.vae == PixelVAEConfig()
    assert "photos" not in capsys.readouterr().out
    train(monkeypatch, train_vosr, "flow", flow, "--steps", 3)       # the same command again goes on
    assert "resumed from" in capsys.readouterr().out


def test_s3diff_and_gramsr(monkeypatch, tmp_path):
    prior = train(monkeypatch, train_s3diff, "prior", tmp_path / "prior")
    estimator = train(monkeypatch, train_s3diff, "estimator", tmp_path / "estimator", "--init", prior)
    adapters = train(monkeypatch, train_s3diff, "adapters", tmp_path / "adapters", "--init", estimator,
                     "--lora", "unet+encoder+decoder")
    model = restores_a_line(adapters)
    assert "vae_skip" in model.vae.encoder.lora_A and "vae_skip" in model.vae.decoder.lora_A
    at = prior
    for stage in train_gramsr.ORDER:
        at = train(monkeypatch, train_gramsr, stage, tmp_path / stage, "--init", at)
    assert list(restores_a_line(at).cfg.ranks) == train_gramsr.ORDER


@pytest.mark.parametrize("script, stage", [(train_vosr, "distill"), (train_s3diff, "adapters"), (train_gramsr, "pixel")])
def test_what_a_stage_starts_from(script, stage, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--preset", "letters", "--stage", stage, "--data", "digits", "--out", "nowhere"])
    assert stopped.value.code == 2 and "needs --init" in capsys.readouterr().err


def test_regression_trains(monkeypatch, tmp_path):
    runs.watch_less(monkeypatch)
    for name in ("PRESETS", "LOSSES"):      # which train_regression changes
        monkeypatch.setattr(train_vosr, name, dict(getattr(train_vosr, name)))
    monkeypatch.setattr(train_vosr, "new_transformers", train_vosr.new_transformers)
    letters.train_regression(str(tmp_path / "regression"), ["--steps", "2", "--batch-size", "2", "--device", "cpu"])
    model = restores_a_line(tmp_path / "regression")
    assert (model.cfg.steps, model.cfg.temperature) == (1, 0.0)
