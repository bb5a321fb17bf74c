"""The embedded tiny systems, on the example: better than bicubic, and every knob of the papers does what its paper says.

Run: python -m pytest tests/test_tiny.py
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from models.gram import features, loss_gram
from models.support.imaging import read_picture, resize
from models.support.metrics import psnr_y
from models.support.weights import EMBEDDED, PRIOR
from models.tiny import RandomLPIPS, TinyGramSR
from sample import find_system

ROOT = Path(__file__).resolve().parents[1]
MOST = {"vosr-tiny": 24e6, "s3diff-tiny": 8e6, "gramsr-tiny": 8e6}      # bytes


@cache
def model(name):
    return find_system(name).from_pretrained(name)


@cache
def example():
    """A part of the example: lq (1, 3, 64, 64), hq (1, 3, 256, 256)."""
    lq, hq = (read_picture(ROOT / "assets" / file)[0] for file in ("example.png", "example_hq.png"))
    return lq[..., 8:72, 24:88], hq[..., 32:288, 96:352]


def results(name, knob, values):
    lq, _ = example()
    return [model(name).upscale(lq, **{knob: value}) for value in values]


def detail(x):
    """Mean difference of neighbours, of 255."""
    return 127.5 * float(x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean())


def rising(values):
    return all(a < b for a, b in zip(values, values[1:]))


def test_sizes():
    assert PRIOR.stat().st_size <= 20e6 and EMBEDDED.keys() == MOST.keys()
    for name, most in MOST.items():
        assert EMBEDDED[name].stat().st_size <= most


@pytest.mark.parametrize("name", MOST)
def test_better_than_bicubic(name):
    lq, hq = example()
    sr = model(name).upscale(lq)
    assert psnr_y(sr, hq, 4) > psnr_y(resize(lq, 4), hq, 4) + 0.2
    assert (sr.mean((2, 3)) - lq.mean((2, 3))).abs().max() < 2 / 255, "a colour shift"


@pytest.mark.parametrize("name", MOST)
def test_no_lattice(name):
    """The autoencoder's cells, 8 pixels, stand out of a result's spectrum (5 and 8 times; a photo: 1), but no more than that."""
    power = torch.fft.fft2(model(name).upscale(example()[0]).mean(1)).abs().square()[0]
    around = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(power[None], (4, 4, 4, 4), mode="circular"), 9, 1)[0]
    cells = (power / around)[::32, ::32]        # 256 / 8 periods
    assert cells.flatten()[1:].median() < 10


def test_scores_steer():
    """S3Diff, 4.4: said to be noisier, a picture comes out smoother; said to be more blurred, it comes out with more detail."""
    smoother = results("s3diff-tiny", "noise", (0, 0.1, 0.2, 0.3, 0.4))
    sharper = results("s3diff-tiny", "blur", (0.3, 0.4, 0.5, 0.6, 0.7))
    assert rising([-detail(x) for x in smoother]) and rising([detail(x) for x in sharper])
    for row in (smoother, sharper):
        assert (row[0] - row[-1]).abs().mean() > 2 / 255


def test_guidance_adds_detail():
    """The bad prompt alone is nearer to the bad picture; the further from it, the more detail."""
    bad, *row = results("s3diff-tiny", "guidance", (0, 0.8, 1, 1.2, 1.5))
    assert rising([detail(x) for x in row])
    assert psnr_y(bad, example()[1], 4) < psnr_y(row[1], example()[1], 4) - 0.2


def test_each_set_does_what_its_loss_asks():
    """GramSR, from 0 to 1.5: pixel brings the original nearer, semantic its features, texture its tokens' Gram matrix."""
    (lq, hq), random, gramsr = example(), RandomLPIPS(), TinyGramSR.from_pretrained("gramsr-tiny")
    vit = gramsr.vit
    with torch.no_grad():
        true = features(vit, 2 * hq - 1)
        far = {"pixel": lambda x: -psnr_y(x, hq, 4), "semantic": lambda x: float(random(2 * x - 1, 2 * hq - 1)),
               "texture": lambda x: float(loss_gram(features(vit, 2 * x - 1), true))}
        for name, distance in far.items():
            row = [gramsr.upscale(lq, **{name: scale}) for scale in (0, 0.5, 1, 1.5)]
            assert rising([-distance(x) for x in row]), name
