"""Training at the public sizes' code path, tiny and with random files: from scratch, warm, distilled.

Run: python -m pytest tests/test_train_public.py
"""

import csv
import json
from dataclasses import replace

import pytest
import torch
from test_release import TINY, hub, release  # noqa: F401 (fixtures)
from test_train import STAGE, photos, train  # noqa: F401

import train_vosr
import training
from models.vosr import PUBLIC, VOSR

FLOW = replace(STAGE, lr=1e-3, recipes=("vosr",))


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    for size, cfg in TINY.items():
        stages = {"flow256": replace(FLOW, shrink=True), "flow": FLOW, "distill": FLOW}
        monkeypatch.setitem(train_vosr.PRESETS, size, (replace(cfg, light_decoder=cfg.light_decoder and {}), stages))


@pytest.fixture
def run(monkeypatch, photos, tmp_path):  # noqa: F811
    """run("0.5b", "flow", ...) trains four steps -> the --out folder, tensors of its transformer."""
    def run(size, stage, *more, out=None, stop_at=None):
        out = tmp_path / (out or stage)
        return out, train(monkeypatch, photos, out, stage, *more, stop_at=stop_at, preset=size)
    return run


@pytest.mark.parametrize("size", TINY)
def test_from_scratch_to_one_step(run, size, capsys):
    """Flow at the paper's first size and the second, distilled; every result is a model in the authors' layout."""
    first, a = run(size, "flow256")
    assert "transformer FROM SCRATCH" in capsys.readouterr().out
    second, b = run(size, "flow", "--init", first, "--checkpointing")
    third, c = run(size, "distill", "--init", second)
    assert f"from {second}" in capsys.readouterr().out
    assert a.keys() == b.keys() and c.keys() - b.keys() == {k for k in c if k.startswith("r_embedder")} != set()
    assert all(tensor.dtype == torch.float32 for tensor in c.values())
    name = "blocks.0.attn.qkv.weight"
    for before, after in ((a, b), (b, c)):
        assert 0 < abs(before[name] - after[name]).max() < 0.02, "each goes on from the one before"
    public = VOSR.from_pretrained(next(n for n in PUBLIC if n == f"vosr-{size}"))
    for out, steps in ((second, 25), (third, 1)):
        model = VOSR.from_pretrained(out)
        assert model.cfg.steps == steps and model.cfg.weak == pytest.approx(0.15)
        assert model.upscale(torch.rand(1, 3, 9, 14), steps=min(steps, 2)).shape == (1, 3, 36, 56)
        # the frozen networks are the public ones, to the bit
        for part in ("vae", "vit"):
            ours, theirs = getattr(model, part).state_dict(), getattr(public, part).state_dict()
            assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert json.loads((third / "args.json").read_text())["stage"] == "distill"
    assert not (third / "model.safetensors").exists()


def test_warm_start_from_a_public_name(run, capsys):
    out, tensors = run("0.5b", "flow", "--init", "vosr-0.5b", "--lr", 1e-6)
    assert "from vosr-0.5b, on cpu" in capsys.readouterr().out
    public = VOSR.from_pretrained("vosr-0.5b").dit.state_dict()
    assert all(torch.allclose(tensors[k], public[k], atol=1e-4) for k in public)
    assert not torch.equal(tensors["t_block.1.weight"], public["t_block.1.weight"])


def test_resumed_equals_uninterrupted(run):
    _, whole = run("0.5b", "flow", out="whole")
    _, half = run("0.5b", "flow", out="parts", stop_at=2)
    _, parts = run("0.5b", "flow", out="parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert not torch.equal(half["t_block.1.weight"], parts["t_block.1.weight"])


@pytest.mark.parametrize("size, stage, init", [("1.4b", "flow", "vosr-0.5b"), ("0.5b", "flow", "vosr-0.5b-1step"),
                                               ("0.5b", "distill", "vosr-0.5b-1step")])
def test_a_start_that_does_not_fit(run, size, stage, init):
    with pytest.raises(training.UserError, match=f"{init}: is no many-step model of preset {size}, from which stage {stage} starts"):
        run(size, stage, "--init", init)


def test_bfloat16_is_close(run):
    """Autocast of the transformer, frozen networks in bfloat16; the weights that learn stay float32."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        out, tensors = run("0.5b", "flow", "--init", "vosr-0.5b", "--dtype", dtype, out=dtype)
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        with open(out / "log.csv", newline="") as f:
            losses.append([float(row["held_out"]) for row in csv.DictReader(f)])
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
