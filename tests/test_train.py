"""train_vosr.py on networks of a few thousand parameters. Run: python -m pytest tests/test_train.py"""

import csv
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from safetensors.torch import load_file

import models.support.photos
import sample
import train_vosr
import training
from models.dit import DiTConfig
from models.flow import loss_flow
from models.support import saving
from models.support.photos import DataError
from models.tiny import TinyVAEConfig, TinyVOSR, TinyVOSRConfig
from models.vit import ViTConfig

SMALL = TinyVOSRConfig(
    dit=DiTConfig(input_size=8, patch_size=2, in_channels=16, out_channels=8, hidden_size=32, depth=2, num_heads=2, z_dims=16,
                  rope_rescale=False),
    vit=ViTConfig(img_size=28, embed_dim=16, depth=1, num_heads=2),
    vae=TinyVAEConfig(latent_channels=8), vit_input=28, steps=2, temperature=1.0, tile=64, overlap=0)
ROOT = Path(__file__).resolve().parents[1]
STAGE = train_vosr.Stage(4, 2, 1e-3, crop=64, recipes=("s3diff", "vosr"), ema=0.5, schedule="cosine", warmup=2)
STAGES = {"autoencoder": replace(STAGE, crop=32, recipes=()), "flow": STAGE,
          "distill": STAGE, "decoder": STAGE}


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(train_vosr.PRESETS, "tiny", (SMALL, STAGES))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five smooth random pictures."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        small = np.random.RandomState(i).randint(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(small).resize((120, 90), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def launch(monkeypatch, photos, out, stage, *more, stop_at=None, preset="tiny"):
    """Run a stage in this process; stop_at: steps after which Ctrl-C comes."""
    runs.watch_less(monkeypatch), runs.stop_after(monkeypatch, stop_at)
    monkeypatch.setattr(sys, "argv", ["train_vosr.py", "--preset", preset, "--stage", stage, "--data", str(photos),
                                      "--out", str(out),
                                      "--device", "cpu", *map(str, more)])
    train_vosr.main()


def train(monkeypatch, photos, out, stage, *more, preset="tiny", **kwargs):
    """`launch` -> the tensors it wrote."""
    launch(monkeypatch, photos, out, stage, *more, preset=preset, **kwargs)
    return load_file(out / ("model.safetensors" if preset == "tiny" else "checkpoints/ema_model.safetensors"))


def newest(out):
    """What the newest checkpoint in a folder holds."""
    return torch.load(training.checkpoints(out)[0], weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def autoencoder(monkeypatch, photos, tmp_path):
    train(monkeypatch, photos, tmp_path / "ae", "autoencoder")
    return tmp_path / "ae"


def test_stages_and_a_picture(monkeypatch, photos, autoencoder, tmp_path, capsys):
    flow = train(monkeypatch, photos, tmp_path / "flow", "flow", "--init", autoencoder)
    ae = load_file(autoencoder / "model.safetensors")
    assert all(torch.equal(ae[k], flow[k]) for k in ae if k.startswith("vae."))
    for kind in ("rcgm", "shortcut"):
        train(monkeypatch, photos, tmp_path / kind, "distill", "--init", tmp_path / "flow", "--distill", kind,
              "--micro-batch", 1)
        model = TinyVOSR.from_pretrained(tmp_path / kind)
        assert model.cfg.dit.auxiliary_time_cond and model.cfg.steps == 1
    a, b = flow, load_file(tmp_path / "rcgm" / "model.safetensors")
    # distillation trains the DiT alone
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith(("vae.", "vit.")))
    for name in ("log.csv", "loss.png", "sheet.png"):
        assert (tmp_path / "rcgm" / name).stat().st_size > 0
    said = capsys.readouterr().out
    assert "VOSR tiny, stage distill: from" in said and "float32" in said and "batch 2 = 1 x 2 x 1" in said
    Image.new("RGB", (9, 7), "teal").save(tmp_path / "teal.png")
    assert sample.main([str(tmp_path / "teal.png"), "--model", str(tmp_path / "rcgm"),
                        "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "teal.png").size == (36, 28)


def test_decoder_learns_alone(monkeypatch, photos, autoencoder, tmp_path):
    """At first the picture is the one without it; then only it has changed, and distilled models only are taken."""
    train(monkeypatch, photos, tmp_path / "flow", "flow", "--init", autoencoder)
    with pytest.raises(training.UserError, match="is no one-step model of preset tiny, from which stage decoder starts"):
        launch(monkeypatch, photos, tmp_path / "no", "decoder", "--init", tmp_path / "flow")
    before = train(monkeypatch, photos, tmp_path / "one", "distill", "--init", tmp_path / "flow")
    after = train(monkeypatch, photos, tmp_path / "decoder", "decoder", "--init", tmp_path / "one", "--lr", 1e-2)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert {k.split(".")[1] for k in after.keys() - before.keys()} == {"residual"}
    model, z = TinyVOSR.from_pretrained(tmp_path / "decoder"), torch.randn(1, 8, 3, 4)
    assert model.cfg.steps == 1 and model.decode(z).shape == (1, 3, 24, 32)
    assert not torch.equal(model.decode(z), TinyVOSR.from_pretrained(tmp_path / "one").decode(z))
    torch.nn.init.zeros_(model.vae.residual.conv_out.weight), torch.nn.init.zeros_(model.vae.residual.conv_out.bias)
    assert torch.equal(model.decode(z), TinyVOSR.from_pretrained(tmp_path / "one").decode(z))


@pytest.mark.parametrize("ablation", train_vosr.ABLATIONS)
def test_ablations_last(monkeypatch, photos, autoencoder, tmp_path, ablation):
    """What a flow has learned without, its one-step student does without."""
    runs = {}
    for stage, init, *more in (("flow", autoencoder, "--ablate", ablation), ("distill", tmp_path / "flow")):
        steps = 12 if stage == "flow" else 1        # the condition is dropped for one picture in ten
        runs[stage] = train(monkeypatch, photos, tmp_path / stage, stage, "--init", init, *more, "--steps", steps)
        cfg = TinyVOSR.from_pretrained(tmp_path / stage).cfg
        assert (cfg.blind, cfg.weak) == ((True, 0.15) if ablation == "tokens" else (False, 0.0))
    usual = train(monkeypatch, photos, tmp_path / "usual", "flow", "--init", autoencoder, "--steps", 12)
    assert any(not torch.equal(usual[k], runs["flow"][k]) for k in usual if k.startswith("dit."))
    if ablation == "tokens":
        a = TinyVOSR.from_pretrained(tmp_path / "distill")
        x = torch.rand(2, 3, 64, 64)
        assert not a.tokens(x).any() and a.upscale(x[:1, :, :16, :16]).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("stage", ["autoencoder", "flow", "distill", "decoder"])
def test_resumed_equals_uninterrupted(monkeypatch, photos, autoencoder, tmp_path, stage):
    more = [] if stage == "autoencoder" else ["--init", autoencoder]
    if stage in ("distill", "decoder"):
        train(monkeypatch, photos, tmp_path / "flow", "flow", *more)
        more = ["--init", tmp_path / "flow"]
    if stage == "decoder":
        train(monkeypatch, photos, tmp_path / "one", "distill", *more)
        more = ["--init", tmp_path / "one"]
    whole = train(monkeypatch, photos, tmp_path / "whole", stage, *more)
    half = train(monkeypatch, photos, tmp_path / "parts", stage, *more, stop_at=2)
    parts = train(monkeypatch, photos, tmp_path / "parts", stage, *more)
    assert same(whole, parts) and not same(half, parts)
    states = [newest(tmp_path / run) for run in ("whole", "parts")]
    assert states[0]["step"] == states[1]["step"] == 4
    # float32, to the last bit
    for part in ("model", "ema"):
        assert same(states[0][part], states[1][part])


def test_workers_and_order_of_files_change_nothing(monkeypatch, photos, autoencoder, tmp_path):
    runs = [train(monkeypatch, photos, tmp_path / str(n), "flow", "--init", autoencoder, "--workers", n)
            for n in (0, 2)]
    assert same(*runs)


def test_held_out_photos_are_never_trained_on(monkeypatch, photos, tmp_path):
    """Also those that a list shows several times."""
    seen = []

    class Spy(models.support.photos.Photos):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(self)

    monkeypatch.setattr(models.support.photos, "Photos", Spy)
    (tmp_path / "list.txt").write_text(13 * f"{photos}\n")
    train(monkeypatch, tmp_path / "list.txt", tmp_path / "ae", "autoencoder", "--steps", 1)
    trained, held_out = (set(photos.files) for photos in seen)
    assert len(trained) == 4 and len(held_out) == 1 and not trained & held_out


def test_overfits_one_picture():
    """Flow loss on one latent pair falls to a fraction within fifty steps."""
    torch.manual_seed(0)
    model = TinyVOSR(SMALL).train()
    g = torch.Generator().manual_seed(0)
    z_hq, z_lq = (torch.randn(1, 8, 8, 8, generator=g).repeat(8, 1, 1, 1) for _ in range(2))
    lq = torch.rand(1, 3, 64, 64, generator=g).repeat(8, 1, 1, 1)
    optimizer = torch.optim.AdamW([*model.dit.parameters(), *model.vit.parameters()], lr=1e-2)
    losses = []
    for step in range(60):
        loss = loss_flow(model.dit, z_hq, z_lq, model.tokens(lq), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:5])
    assert model.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0                             # the vision encoder learns too


def test_settings_that_matter_may_not_change(monkeypatch, photos, autoencoder):
    with pytest.raises(training.UserError, match="--batch-size: .* was written with 2, not 4"):
        train(monkeypatch, photos, autoencoder, "autoencoder", "--batch-size", 4)


@pytest.mark.parametrize("words, why", [
    (["--stage", "flow"], "needs --init"),
    (["--stage", "flow", "--init", "x", "--distill", "rcgm"], "--distill is not read"),
    (["--stage", "autoencoder", "--init", "x"], "--init is not read"),
    (["--stage", "flow", "--init", "x", "--color", "none"], "unrecognized"),
])
def test_flags_that_nothing_reads_are_errors(monkeypatch, photos, tmp_path, capsys, words, why):
    monkeypatch.setattr(sys, "argv", ["train_vosr.py", "--data", str(photos), "--out", str(tmp_path), *words])
    with pytest.raises(SystemExit) as e:
        train_vosr.main()
    assert e.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.parametrize("steps, first", [(1, 1.0), (8, 1.0), (16, 0.5), (400, 0.5)])
def test_a_short_run_warms_up_shortly(steps, first):
    """Two steps, but at most an eighth of the run, whichever the schedule."""
    for schedule in ("constant", "cosine"):
        assert training.learning_rate(0, steps, 1.0, schedule, warmup=2) == pytest.approx(first)


def test_learning_rate_and_ema():
    rates = [training.learning_rate(s, 16, 1.0, "cosine", warmup=2) for s in range(16)]
    assert rates[0] == 0.5 and max(rates) == 1.0 and rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] > 0.02
    assert training.learning_rate(7, 10, 1.0) == 1.0
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = a.weight.clone()
    training.ema_update(a, b, 0.9)
    assert torch.allclose(a.weight, 0.9 * before + 0.1 * b.weight)


@pytest.mark.parametrize("number, line", [(5, "5 photos found in"), (65, "65 photos found in")])
def test_how_many_photos(monkeypatch, photos, tmp_path, capsys, number, line):
    """Every run says how many there are and how many are held out; a line says where those are few."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(number):
        os.link(photos / f"{i % 5}.png", folder / f"{i}.png")
    train(monkeypatch, folder, tmp_path / "out", "autoencoder", "--steps", 1)
    said = capsys.readouterr().out
    assert f"{number} photos found in {folder}, {-(-number // 30)} of them held out" in said
    assert ("these are few: the 2 crops that are evaluated come from the 1 held out" in said) == (number < 60)


def test_log_every(monkeypatch, photos, tmp_path):
    """A row as often as asked, and where an evaluation is due; losses are means over the steps between."""
    logs = {}
    for every in (1, 2, 3):
        train(monkeypatch, photos, tmp_path / str(every), "autoencoder", "--steps", 4, "--log-every", every)
        with open(tmp_path / str(every) / "log.csv", newline="") as f:
            logs[every] = {int(row["step"]): row["all"] and float(row["all"]) for row in csv.DictReader(f)}
    assert [list(log) for log in logs.values()] == [[0, 1, 2, 3, 4], [0, 2, 4], [0, 3, 4]]
    assert logs[2][4] == pytest.approx((logs[1][3] + logs[1][4]) / 2, rel=1e-4) and logs[3][4] == pytest.approx(logs[1][4], rel=1e-4)


def test_groups_freeze_the_rest():
    model = TinyVOSR(SMALL)
    params = training.freeze_all_but(model, lambda name: name.startswith("dit."))
    assert len(params) == len(list(model.dit.parameters()))
    assert not any(p.requires_grad for p in [*model.vae.parameters(), *model.vit.parameters()])


def test_errors_of_users_are_one_line_those_of_code_show_where(capsys):
    """A loader's worker wraps an error in a traceback, of which the last line is said."""
    for error, said in ((training.UserError("no such flag"), "no such flag"), (OSError("no room"), "no room"),
                        (DataError("Traceback:\n ...\nmodels.support.photos.DataError: x: no images"), "x: no images")):
        with pytest.raises(SystemExit, match=f"^train: {said}$"), training.one_line_errors("train"):
            raise error
    for kind in (ValueError, RuntimeError, KeyError):
        with pytest.raises(kind, match="my change"), training.one_line_errors("train"):
            raise kind("my change")


def test_unfinished_or_over(monkeypatch, photos, autoencoder, tmp_path, capsys):
    """--init says whether its training is over: by its last step, early, or not; damaged checkpoints are passed over."""
    def said(init):
        saving.warn_of_unfinished(init)
        return capsys.readouterr().err

    capsys.readouterr()
    assert not said(None) and not said(tmp_path / "none") and not said(autoencoder)
    launch(monkeypatch, photos, tmp_path / "half", "autoencoder", stop_at=2)
    capsys.readouterr()
    assert "that training stopped at step 2 of 4; its own command goes on with it" in said(tmp_path / "half")
    (tmp_path / "half" / "checkpoint-00000003-0000.pt").write_bytes(b"damaged")
    torch.save([7], tmp_path / "half" / "checkpoint-00000004-0000.pt")
    assert "that training stopped at step 2 of 4" in said(tmp_path / "half")
    saving.save_checkpoint(tmp_path / "early", 2, 2, steps=4, over=True)
    assert not said(tmp_path / "early")
    saving.save_checkpoint(tmp_path / "old", 2, 2, steps=4)
    assert "step 2 of 4" in said(tmp_path / "old"), "earlier versions do not say whether it is over"


def test_one_step_is_measured_against_the_teacher_that_it_learned_from(monkeypatch, photos, autoencoder, tmp_path):
    """The weak condition is as strong in the measure as in the loss."""
    seen, guided = set(), train_vosr.guided
    monkeypatch.setattr(train_vosr, "guided", lambda dit, *args: seen.add(args[5:]) or guided(dit, *args))
    train(monkeypatch, photos, tmp_path / "flow", "flow", "--init", autoencoder, "--steps", 1)
    train(monkeypatch, photos, tmp_path / "one", "distill", "--init", tmp_path / "flow", "--steps", 1)
    assert seen == {(), (0.5, train_vosr.WEAK_DISTILL)}


def script(tmp_path, *words):
    return runs.Script(tmp_path / "said", ROOT / "train_vosr.py", "--stage", "autoencoder", "--out", tmp_path / "out",
                       *words)


def test_user_errors_are_one_line(tmp_path):
    status, _, errors = script(tmp_path, "--data", tmp_path / "none").end()
    assert status == 1 and len(errors.strip().splitlines()) == 1 and "no such folder" in errors


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_preemption_save_and_say_how_to_go_on(photos, tmp_path, number):
    run = script(tmp_path, "--data", photos, "--batch-size", 2)
    run.wait_for_a_step()
    status, said, errors = run.end(number)
    assert status == 130 and "goes on from here" in said and "Traceback" not in errors
    assert newest(tmp_path / "out")["step"] > 0


def test_the_preset_for_one_card(photos, tmp_path):
    """About 60 million parameters, on the embedded autoencoder; what stays in memory with a micro-batch fits in 24 GB."""
    words = ["--preset", "small", "--stage", "flow", "--init", "vosr-tiny", "--data", str(photos), "--out", str(tmp_path), "--device", "cpu"]
    run = train_vosr.prepare(train_vosr.parse_args(words))
    parameters = training.count(run.model.parameters())
    assert 55e6 < parameters < 65e6 and training.count(run.trained) > 0.99 * parameters
    assert run.micro_batches * run.micro_batch == run.stage.batch_size == 64
    assert 20 * parameters + run.micro_batch * 0.7e9 < 16e9
    assert torch.equal(run.model.vae.encoder.weight, TinyVOSR.from_pretrained("vosr-tiny").vae.encoder.weight)


def test_lattice_is_what_repeats():
    """A pattern in every cell counts in full, a shift of all pixels not at all, noise little."""
    pattern = torch.randn(2, 3, 8, 8)
    everywhere = pattern.repeat(1, 1, 4, 6)
    own = pattern - pattern.mean((2, 3), keepdim=True)
    torch.testing.assert_close(train_vosr.lattice(everywhere + 5, 8), own.square().mean())
    assert train_vosr.lattice(torch.randn(2, 3, 128, 128), 8) < 0.01
