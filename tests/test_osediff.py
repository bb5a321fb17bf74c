"""The worked example of README's "Add your own", tests/osediff.py. Run: python -m pytest tests/test_osediff.py"""

import csv
from dataclasses import replace

import osediff
import pytest
import runs
import torch
from osediff import OSEDiff, is_regulariser
from PIL import Image
from safetensors.torch import load_file
from test_train import newest, photos, same  # noqa: F401 (photos is a fixture)
from test_train_s3diff import flat

import sample
import training


@pytest.fixture(autouse=True)
def small_crops(monkeypatch):
    shrink(monkeypatch)


def shrink(patch):
    patch.setattr(osediff, "TINY", replace(osediff.TINY, steps=3, batch_size=2, crop=64, warmup=0))


def launch(patch, photos, out, *more, stop_at=None):  # noqa: F811
    """Run in this process; stop_at: steps after which Ctrl-C comes -> checkpoint"""
    runs.watch_less(patch), runs.stop_after(patch, stop_at)
    status = osediff.main(["--data", str(photos), "--out", str(out), "--device", "cpu", *map(str, more)])
    assert status == (0 if stop_at is None else 130)
    return newest(out) if training.checkpoints(out) else None


@pytest.fixture(scope="module")
def model():
    """As training begins."""
    torch.manual_seed(0)
    model, _, _ = osediff.build(osediff.parse_args(["--data", "x", "--out", "x"]))
    return model


def test_it_trains_and_sample_finds_it(monkeypatch, model, photos, tmp_path, capsys):  # noqa: F811
    checkpoint = launch(monkeypatch, photos, tmp_path / "run")
    for name in ("log.csv", "loss.png", "sheet.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    with open(tmp_path / "run" / "log.csv", newline="") as f:
        row = list(csv.DictReader(f))[-1]
    assert row["step"] == "3"
    assert all(float(row[name]) > 0 for name in ("l2", "lpips", "vsd", "regulariser", "grad_norm", "held_out", "psnr"))

    tensors = load_file(tmp_path / "run" / "model.safetensors")
    assert not any(map(is_regulariser, tensors)) and any(map(is_regulariser, checkpoint["model"]))
    begun = model.state_dict()
    assert all(torch.equal(x, begun[name].half()) for name, x in tensors.items() if "lora_" not in name), "as the prior"
    moved = {name: x.any() for name, x in checkpoint["model"].items() if "lora_B" in name}      # they start at 0
    assert all(moved.values()) and {name.split(".")[0] for name in moved} == {"unet", "vae"}

    Image.new("RGB", (9, 7), "teal").save(tmp_path / "teal.png")
    words = [str(tmp_path / "teal.png"), "--model", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="is a model of osediff, which sample.py does not know"):
        sample.main(words)
    monkeypatch.setitem(sample.SYSTEMS, "osediff", OSEDiff)
    assert sample.main(words) == 0 and Image.open(tmp_path / "out" / "teal.png").size == (36, 28)
    for flag, why in ((["--blur", "0.5"], "--blur is no knob"), (["--sweep"], "has no knobs to turn")):
        with pytest.raises(SystemExit, match=why):
            sample.main(words + flag)
    nano = sample.load(tmp_path / "run")
    assert nano(Image.open(tmp_path / "teal.png")).size == (36, 28)
    capsys.readouterr()


def test_resumed_equals_uninterrupted(monkeypatch, photos, tmp_path):  # noqa: F811
    whole = launch(monkeypatch, photos, tmp_path / "whole", "--micro-batch", 1)
    half = launch(monkeypatch, photos, tmp_path / "parts", "--micro-batch", 1, stop_at=2)
    parts = launch(monkeypatch, photos, tmp_path / "parts", "--micro-batch", 1)
    assert half["step"] == 2 and parts["step"] == 3
    assert same(flat(whole), flat(parts)) and not same(flat(half), flat(parts))     # both optimizers included


def test_in_use_as_in_training(model):
    """`upscale` makes the image that training saw; the regulariser has no part in it."""
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
        sr = model(2 * x - 1)[0] / 2 + 0.5
        torch.testing.assert_close(sr, model.upscale(x, scale=1, color="none"))
        for name, p in model.named_parameters():
            if is_regulariser(name) and "lora_B" in name:
                p.zero_()
        torch.testing.assert_close(sr, model(2 * x - 1)[0] / 2 + 0.5, atol=0, rtol=0)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()


def gradient(model, z, **changes):
    """Of VSD, by z, at draws that are always the same; without the factor 2 / numel of a mean of squares"""
    z = z.clone().requires_grad_()
    stage = replace(osediff.TINY, lambda_vsd=1.0, **changes)
    osediff.vsd_losses(model, z, stage, training.generator(1))["vsd"].backward()
    return z.grad * z.numel() / 2


def test_vsd_is_zero_where_both_agree(model):
    """At first the regulariser is the frozen UNet, and guidance the only difference."""
    z = torch.randn(2, 64, 8, 8, generator=training.generator(0))
    assert gradient(model, z, guidance=1.0).abs().max() < 1e-5
    assert gradient(model, z, guidance=1.5).abs().max() > 1e-3


def test_vsd_goes_from_the_regulariser_to_the_frozen(model, monkeypatch):
    """A frozen UNet that knows that all latents are 1, a regulariser that says 0: z is to grow, everywhere alike."""
    z = torch.zeros(2, 64, 8, 8)
    a_of = osediff.alphas_cumprod()

    def predict_noise(C, z_t, t, bad=False):
        clean, a = float(C == osediff.FROZEN), a_of[t].view(-1, 1, 1, 1)
        return (z_t - a.sqrt() * clean) / (1 - a).sqrt()

    monkeypatch.setattr(model, "predict_noise", predict_noise)
    # z0_regulariser - z0_frozen = -1, over the mean distance from z to z0_frozen, 1
    torch.testing.assert_close(gradient(model, z), -torch.ones_like(z), atol=1e-3, rtol=0)


def test_each_learns_from_its_own_loss(model):
    """VSD asks the regulariser and does not teach it; its own loss does not reach the generator."""
    sr, z = model(torch.rand(1, 3, 64, 64) - 0.5)
    learned = {name: p for name, p in model.named_parameters() if osediff.learns(name)}
    osediff.vsd_losses(model, z, osediff.TINY, training.generator(1))["vsd"].backward()
    taught = {is_regulariser(name) for name, p in learned.items() if p.grad is not None}
    assert taught == {False}
    model.zero_grad()
    regularise = osediff.partial(model.predict_noise, osediff.REGULARISER)
    osediff.regulariser_losses(regularise, z.detach(), training.generator(1))["regulariser"].backward()
    taught = {is_regulariser(name) for name, p in learned.items() if p.grad is not None}
    assert taught == {True}
    model.zero_grad()


def work(photos, out):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        launch(patch, photos, out, "--steps", 2, "--micro-batch", 1)


def test_two_processes_equal_one(monkeypatch, photos, tmp_path):  # noqa: F811
    """DDP: the same batch in the same parts gives the same losses, up to the order of additions."""
    launch(monkeypatch, photos, tmp_path / "one", "--steps", 2, "--micro-batch", 1)
    runs.together(2, work, photos, tmp_path / "two")
    logs = [list(csv.DictReader(open(tmp_path / run / "log.csv", newline="")))[-1] for run in ("one", "two")]
    for name in ("l2", "lpips", "vsd", "regulariser", "held_out"):
        assert float(logs[0][name]) == pytest.approx(float(logs[1][name]), rel=1e-3), name
