"""train_s3diff.py on networks of a few thousand parameters. Run: python -m pytest tests/test_train_s3diff.py"""

import csv
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import runs
import torch
import torch.nn as nn
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import newest, photos, same  # noqa: F401 (photos is a fixture)

import models.s3diff
import sample
import train_s3diff
import training
from degrade import RECIPES
from models.discriminator import Discriminator
from models.lpips import LPIPS, NETS
from models.s3diff import PRIORS, S3Diff, S3DiffConfig, is_in_release
from models.support import saving
from models.tiny import RESIDUAL, TinyS3Diff, TinyS3DiffConfig, TinyVAEConfig, is_prior
from models.unet import UNetConfig, alphas_cumprod
from models.vae import VAE, VAEConfig
from models.vit import ViT, ViTConfig
from train_s3diff import Pairs, Stage, adversary, prior_losses, prompts_and_targets, reconstruct

ROOT = Path(__file__).resolve().parents[1]
SMALL = S3DiffConfig(unet=UNetConfig(widths=(16, 16), num_heads=(1, 1), layers_per_block=1, context_dim=8,
                                     norm_groups=4),
                     vae=VAEConfig(widths=(8, 8, 8, 8), layers_per_block=1, norm_groups=4), r_unet=4, r_vae=2)
SMALL_TINY = TinyS3DiffConfig(unet=replace(SMALL.unet, in_channels=64, out_channels=64), vae=TinyVAEConfig(residual=RESIDUAL), r_unet=4,
                              r_vae=2, denet_widths=(8, 8, 8, 8), tokens=4, t=999)
STAGE = Stage(4, 2, 1e-3, crop=64)


def trunk():
    """In place of VGG16."""
    return [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]


def shrink(patch, **changes):
    patch.setitem(train_s3diff.PRESETS, "tiny",
                  (SMALL_TINY, {stage: replace(STAGE, **changes) for stage in ("prior", "estimator", "adapters")}))
    patch.setitem(NETS, "vgg", replace(NETS["vgg"], trunk=trunk, compared={1: 8, 4: 8}, smallest=8))


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    shrink(monkeypatch)


def launch(patch, photos, out, *more, stop_at=None, preset="tiny"):  # noqa: F811
    """Run in this process; stop_at: steps after which Ctrl-C comes -> checkpoint"""
    runs.watch_less(patch), runs.stop_after(patch, stop_at)
    more = [*map(str, more)] + ["--init", "none"] * (preset == "tiny" and "--init" not in more)
    patch.setattr(sys, "argv", ["train_s3diff.py", "--preset", preset, "--data", str(photos), "--out", str(out),
                                "--device", "cpu", *more])
    train_s3diff.main()
    # of several processes only the first one surely sees it
    return newest(out) if training.checkpoints(out) else None


def flat(state, prefix=""):
    """{path: tensor} of nested dicts."""
    out = {}
    for name, x in state.items():
        if isinstance(x, dict):
            out |= flat(x, f"{prefix}{name}.")
        elif torch.is_tensor(x):
            out[f"{prefix}{name}"] = x
    return out


def test_a_run_and_a_picture(monkeypatch, photos, tmp_path, capsys):  # noqa: F811
    checkpoint = launch(monkeypatch, photos, tmp_path, "--micro-batch", 1)
    said = capsys.readouterr().out
    assert "FROM SCRATCH" in said and "batch 2 = 1 x 2 x 1" in said and checkpoint["step"] == 4
    for name in ("log.csv", "loss.png", "sheet.png", "model.safetensors"):
        assert (tmp_path / name).stat().st_size > 0
    with open(tmp_path / "log.csv", newline="") as f:
        row = list(csv.DictReader(f))[-1]
    assert all(float(row[name]) > 0 for name in ("l2", "lpips", "gan", "d_real", "d_fake", "grad_norm", "held_out",
                                                 "psnr"))
    model = TinyS3Diff.from_pretrained(tmp_path)
    # stored in float16
    torch.testing.assert_close(checkpoint["model"]["unet.conv_in.weight"], model.unet.conv_in.weight, atol=1e-3,
                               rtol=1e-3)
    Image.new("RGB", (9, 7), "teal").save(tmp_path / "teal.png")
    assert sample.main([str(tmp_path / "teal.png"), "--model", str(tmp_path), "--out", str(tmp_path / "out"),
                        "--blur", "0.5"]) == 0
    assert "blur 0.500" in capsys.readouterr().out and Image.open(tmp_path / "out" / "teal.png").size == (36, 28)
    assert sample.main([str(tmp_path / "teal.png"), "--model", str(tmp_path), "--out", str(tmp_path / "out"),
                        "--prompt", "a cat"]) == 1


def test_what_learns(monkeypatch, photos, tmp_path):  # noqa: F811
    """Adapters, modulation, conv_in, the discriminator's heads; prior, estimator and w stay to the bit."""
    one = launch(monkeypatch, photos, tmp_path / "one", "--steps", 1)
    four = launch(monkeypatch, photos, tmp_path / "four")
    stays = {k for k in one["model"] if torch.equal(one["model"][k], four["model"][k])}
    assert stays == {"modulation.w"}, "all else moves, though it starts on a saddle"
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "four"))
    assert all(torch.equal(a[k], b[k]) for k in a if not is_in_release(k)) and any("lora_" in k for k in a)
    assert not any(torch.equal(one["D"][k], four["D"][k]) for k in one["D"] if k.endswith(("weight_orig", "bias")))


def test_resumed_equals_uninterrupted(monkeypatch, photos, tmp_path):  # noqa: F811
    whole = launch(monkeypatch, photos, tmp_path / "whole", "--micro-batch", 1)
    half = launch(monkeypatch, photos, tmp_path / "parts", "--micro-batch", 1, stop_at=2)
    parts = launch(monkeypatch, photos, tmp_path / "parts", "--micro-batch", 1)
    assert half["step"] == 2 and parts["step"] == 4
    assert same(flat(whole), flat(parts)) and not same(flat(half), flat(parts))     # both optimizers and D included


def test_checkpointing_changes_nothing(monkeypatch, photos, tmp_path):  # noqa: F811
    plain, again = (launch(monkeypatch, photos, tmp_path / str(len(more)), *more) for more in ([], ["--checkpointing"]))
    for name, x in flat(plain["model"]).items():
        torch.testing.assert_close(x, again["model"][name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("words, check", [
    (["--lora", "unet"], lambda m: not any("lora_" in k for k in m if k.startswith("vae."))),
    (["--lora", "unet+decoder"], lambda m: {k.split(".")[1] for k in m if k.startswith("vae.")} == {"residual"}),
    (["--lora", "unet+encoder+decoder"],
     lambda m: {k.split(".")[1] for k in m if k.startswith("vae.")} == {"encoder", "residual"}),
    (["--modulation", "shared"], lambda m: len(m["modulation.unet_block.weight"]) == 1),
    (["--modulation", "none"], lambda m: not any(k.startswith("modulation") for k in m)),
    (["--rank-unet", 3, "--rank-vae", 5], lambda m: m["unet.conv_out.lora_A.default.weight"].shape[0] == 3),
    (["--start-step", 250, "--neg-prob", 0], lambda m: True),
    (["--dtype", "bfloat16"], lambda m: m["unet.conv_in.weight"].dtype == torch.float32),
])
def test_ablations_train_and_load(monkeypatch, photos, tmp_path, words, check):  # noqa: F811
    checkpoint = launch(monkeypatch, photos, tmp_path, "--steps", 1, *words)
    assert check(checkpoint["model"]) and all(x.isfinite().all() for x in checkpoint["model"].values())
    model = TinyS3Diff.from_pretrained(tmp_path)
    assert model.upscale(torch.rand(1, 3, 8, 8)).shape == (1, 3, 32, 32)
    with pytest.raises(training.UserError, match="use that or another --out"):
        launch(monkeypatch, photos, tmp_path, "--steps", 1, "--seed", 1)


def random_batch(B=2, side=64):
    g = torch.Generator().manual_seed(0)
    small = torch.rand(2, B, 3, 8, 8, generator=g)
    x = [torch.nn.functional.interpolate(2 * s - 1, (side, side), mode="bicubic") for s in small]
    return *x, torch.rand(B, 2, generator=g)


def test_negative_prompting():
    """The bad prompt, and the LQ image is the target; the others as if there were none."""
    torch.manual_seed(0)
    model, lpips = S3Diff(SMALL), LPIPS().requires_grad_(False)
    torch.nn.init.normal_(model.prompts)
    x_src, x_tgt, scores = random_batch()
    with torch.no_grad():
        batch = Pairs(x_src, x_tgt, scores, torch.tensor([True, False]))
        context, target = prompts_and_targets(model, batch)
        y = model(x_src, scores, context)
        terms = reconstruct(y, target, lpips, STAGE)
        bad, good = model(x_src[:1], scores[:1], model.prompts[1:]), model(x_src[1:], scores[1:], model.prompts[:1])
        never = reconstruct(y, prompts_and_targets(model, batch._replace(negative=torch.tensor([False, False])))[1], lpips, STAGE)
    torch.testing.assert_close(y, torch.cat([bad, good]))
    # 2.0 x the mean of two
    torch.testing.assert_close(terms["l2"], (bad - x_src[:1]).square().mean() + (good - x_tgt[1:]).square().mean())
    assert never["l2"] != terms["l2"]


def test_the_discriminator_does_not_learn_to_be_deceived():
    """The generator's part passes through D and leaves nothing: officially it does, and D's next step applies it."""
    torch.manual_seed(0)
    model = S3Diff(SMALL)
    D = Discriminator(ViT(ViTConfig(img_size=224, patch_size=16, embed_dim=48, num_heads=3, version=1)), head_width=8)
    training.freeze_all_but(model, is_in_release)
    x_src, _, scores = random_batch()
    D.requires_grad_(False)
    y = model(x_src, scores, model.prompts[:1].expand(2, -1, -1))
    adversary(y, D, STAGE)["gan"].backward()
    assert model.unet.conv_in.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in [*D.parameters(), *D.vit.parameters()])


def test_the_double_zero():
    """A and the modulation have no gradient before B has moved, and B has hardly one: C starts at about 1e-10."""
    torch.manual_seed(0)
    model = S3Diff(SMALL)
    x_src, x_tgt, scores = random_batch()
    (model(x_src, scores, model.prompts[:1].expand(2, -1, -1)) - x_tgt).square().mean().backward()
    largest = {part: max(float(p.grad.abs().max()) for k, p in model.named_parameters() if part in k
                         and k != "modulation.w" and p.grad is not None)
               for part in ("conv_in", "lora_A", "lora_B", "modulation")}
    assert largest["lora_A"] == largest["modulation"] == 0 < largest["lora_B"] < 1e-6 < largest["conv_in"]


def test_overfits_one_picture():
    """Reconstruction alone, one pair, a latent far from what the decoder needs: the loss falls by half."""
    torch.manual_seed(0)
    model = S3Diff(SMALL).train()
    params = training.freeze_all_but(model, is_in_release)
    optimizer = torch.optim.AdamW(params, lr=3e-3)
    x_src, x_tgt, scores = random_batch(1, 32)
    values = []
    for _ in range(60):
        loss = (model(x_src, scores, model.prompts[:1]) - 0.5 * x_tgt).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]
    assert max(float(p.detach().abs().max()) for k, p in model.named_parameters()
               if "lora_B" in k) > 1e-3, "the adapters left their saddle"


def work(photos, out):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, lambda_gan=1e-10)
        launch(patch, photos, out, "--micro-batch", 1)


def test_two_processes_equal_one(monkeypatch, photos, tmp_path):  # noqa: F811
    """DDP: the same batch in the same parts gives the same losses, up to the order of additions.

    But for D: two parts in one process are two power iterations of its spectral norm a step, in two processes each
    has one. So the generator hardly hears it here.
    """
    shrink(monkeypatch, lambda_gan=1e-10)
    one = launch(monkeypatch, photos, tmp_path / "one", "--micro-batch", 1)
    runs.together(2, work, photos, tmp_path / "two")
    two = newest(tmp_path / "two")
    logs = [list(csv.DictReader(open(tmp_path / run / "log.csv", newline="")))[-1] for run in ("one", "two")]
    for name, rel in (("l2", 1e-4), ("lpips", 1e-4), ("held_out", 1e-4), ("gan", 5e-2), ("d_real", 5e-2),
                      ("d_fake", 5e-2)):
        assert float(logs[0][name]) == pytest.approx(float(logs[1][name]), rel=rel), name
    torch.testing.assert_close(one["model"]["unet.conv_in.weight"], two["model"]["unet.conv_in.weight"], atol=1e-4,
                               rtol=1e-3)


@pytest.mark.parametrize("prior, folder", PRIORS.items())
def test_public_preset_at_tiny_size(monkeypatch, photos, tmp_path, prior, folder):  # noqa: F811
    """The way of --preset sd-turbo: the prior's, DINO's and LPIPS's files, then --init from what came out."""
    torch.manual_seed(0)
    small_dino = ViTConfig(img_size=224, patch_size=16, embed_dim=48, num_heads=3, version=1)
    model = S3Diff(SMALL)
    files = {"dino_vitbase16_pretrain.pth": ViT(small_dino).state_dict(),
             "vgg16-397923af.pth": {k: v for k, v in LPIPS().state_dict().items() if k[0] == "f"},
             "lpips_vgg.pth": {k: v.abs() for k, v in LPIPS().state_dict().items() if k[0] == "l"},
             "de_net.pth": model.denet.state_dict()}
    for name, tensors in files.items():
        torch.save(tensors, tmp_path / name)
    for name, network in (("unet", model.unet), ("vae", VAE(SMALL.vae))):
        path = tmp_path / folder / name / "diffusion_pytorch_model.safetensors"
        path.parent.mkdir(parents=True)
        save_file({k: v for k, v in network.state_dict().items() if "lora_" not in k}, path)
    for module in ("models.s3diff", "models.support.weights", "models.lpips", "train_s3diff"):
        monkeypatch.setattr(f"{module}.fetch", lambda name: tmp_path / name, raising=False)
    monkeypatch.setattr("models.s3diff.text_features",
                        lambda texts, folder, dtype: torch.arange(len(texts)).float().view(-1, 1, 1).expand(-1, 77, 8))
    monkeypatch.setitem(train_s3diff.VITS, "dino_vitb16", small_dino)
    monkeypatch.setattr(models.s3diff, "S3DiffConfig", partial(S3DiffConfig, unet=SMALL.unet, vae=SMALL.vae))
    monkeypatch.setitem(train_s3diff.PRESETS, "sd-turbo", (SMALL, {"adapters": replace(STAGE, steps=2)}))

    launch(monkeypatch, photos, tmp_path / "run", "--prior", prior, preset="sd-turbo")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    launch(monkeypatch, photos, tmp_path / "more", "--init", tmp_path / "run", preset="sd-turbo")
    first, second = (flat(torch.load(tmp_path / run / "s3diff.pkl", weights_only=True)) for run in ("run", "more"))
    assert first.keys() == second.keys() and not same(first, second)
    assert asdict(S3Diff.from_pretrained(tmp_path / "more").cfg) == asdict(replace(SMALL, prior=prior))


def test_a_prior_its_estimator_and_adapters(monkeypatch, photos, tmp_path):  # noqa: F811
    """The tiny preset's chain: each stage trains its own part and keeps those before it, to the last bit of float16."""
    parts = {"prior": ("unet.conv_out.weight", "prompts"), "estimator": ("denet.conv_first.0.weight",),
             "adapters": ("unet.conv_out.lora_B.default.weight",)}
    states, init = {}, []
    for stage in parts:
        launch(monkeypatch, photos, tmp_path / stage, "--stage", stage, *init)
        states[stage], init = load_file(tmp_path / stage / "model.safetensors"), ["--init", tmp_path / stage]
    for stage, own in parts.items():
        for later in list(states)[list(states).index(stage) :]:
            assert all(torch.equal(states[stage][name], states[later][name]) for name in own), (stage, later)
    assert all(map(is_prior, states["prior"]))
    assert {k.split(".")[0] for k in states["estimator"].keys() - states["prior"].keys()} == {"denet"}
    assert states["adapters"]["unet.conv_out.lora_B.default.weight"].any()
    assert all(torch.equal(states["prior"][k], states["adapters"][k]) for k in states["prior"] if "conv_in" not in k)
    with pytest.raises(training.UserError, match="use that or another --out"):
        launch(monkeypatch, photos, tmp_path / "prior", "--stage", "estimator")


def test_photos_of_the_prior():
    """About half of them are degraded, also where they come one by one; the same generator draws the same."""
    hq, recipe, found = torch.rand(1, 3, 32, 32), RECIPES["vosr"], []
    for seed in range(40):
        (x, is_degraded), (again, _) = (train_s3diff.draw_prior(None, hq, recipe, training.generator(seed)) for _ in range(2))
        assert torch.equal(x, again) and torch.equal(x, 2 * hq - 1) != bool(is_degraded)
        found += is_degraded.tolist()
    assert 12 <= sum(found) <= 28


def test_steps_that_end_a_run_are_counted_by_the_step(monkeypatch, photos, tmp_path):  # noqa: F811
    """Of the four updates one is always left out, the others are not: that ends the run, too."""
    monkeypatch.setattr(training, "MAX_SKIPPED", 3)
    monkeypatch.setattr(train_s3diff, "real", lambda hq, D, stage, plan: {"d_real": float("nan") * D(hq, "real", plan).mean()})
    with pytest.raises(training.UserError, match="3 steps in a row had no finite gradient"):
        launch(monkeypatch, photos, tmp_path)


def test_checkpoints_of_earlier_versions(monkeypatch, photos, tmp_path):  # noqa: F811
    """They lack modulation.w, which the seed draws again, and hold a discriminator where none is trained."""
    def rewrite(out, change):
        path, = training.checkpoints(out)[1:]
        training.checkpoints(out)[0].unlink()
        change(state := torch.load(path, weights_only=True))
        path.unlink()
        saving.save_checkpoint(out, state.pop("step"), 2, **state)

    for stage, change in (("adapters", lambda state: state["model"].pop("modulation.w")),
                          ("prior", lambda state: state.update(D={}, D_optimizer={}))):
        whole = launch(monkeypatch, photos, tmp_path / stage, "--stage", stage, "--save-every", 2)
        rewrite(tmp_path / stage, change)
        assert same(flat(whole), flat(launch(monkeypatch, photos, tmp_path / stage, "--stage", stage, "--save-every", 2)))


@torch.no_grad()
def test_what_the_prior_is_asked(monkeypatch):
    """Its own prompt with each picture, none with one in ten; more times at both ends; a perfect answer has no loss."""
    model, seen = TinyS3Diff(SMALL_TINY), []
    model.prompts = nn.Parameter(torch.randn_like(model.prompts))
    x, bad = torch.rand(2000, 3, 8, 8) - 0.5, torch.arange(2000) % 2
    z, a = model.vae.encode(x), alphas_cumprod()

    def perfect(z_t, t, context):
        seen.extend((t, context))
        return (z_t - a[t].sqrt().view(-1, 1, 1, 1) * z) / (1 - a[t]).sqrt().view(-1, 1, 1, 1)

    monkeypatch.setattr(model.unet, "forward", perfect)
    assert prior_losses(None, model, x, bad, training.generator(0))["eps"] < 1e-4
    t, context = seen
    told = context.flatten(1).any(1)
    assert torch.equal(context[told], model.prompts[bad][told]) and 0.08 < 1 - told.float().mean() < 0.12
    shares = [((lo <= t) & (t < hi)).float().mean() for lo, hi in ((0, 10), (10, 900), (900, 1000))]
    assert all(abs(got - wanted) < 0.03 for got, wanted in zip(shares, (0.108, 0.712, 0.18)))


@pytest.mark.parametrize("words, why", [
    (["--init", "x", "--rank-unet", "4"], "--init brings its own"), (["--init", "x", "--prior", "sd-2.1"], "--init brings its own"),
    (["--preset", "tiny", "--prior", "sd-2.1"], "--prior is for --preset sd-turbo"), (["--start-step", "0"], "--start-step: 0 is no"),
    (["--neg-prob", "1.5"], "--neg-prob: 1.5 is no"),
    (["--stage", "flow"], "invalid choice"), (["--stage", "prior"], "is for --preset tiny"),
    (["--preset", "tiny", "--stage", "prior", "--lora", "unet"], "--lora is not read by --stage prior"),
    (["--preset", "tiny", "--stage", "estimator", "--neg-prob", "0"], "--neg-prob is not read by --stage estimator"),
])
def test_usage_errors(monkeypatch, tmp_path, capsys, words, why):
    monkeypatch.setattr(sys, "argv", ["train_s3diff.py", "--data", "x", "--out", str(tmp_path), *words])
    with pytest.raises(SystemExit) as e:
        train_s3diff.main()
    assert e.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_command_line(photos, tmp_path):  # noqa: F811
    """As users run it: an error is one line; Ctrl-C saves and says how to go on."""
    command = [ROOT / "train_s3diff.py", "--preset", "tiny", "--init", "none", "--out", tmp_path / "out",
               "--device", "cpu"]
    runs.error_then_ctrl_c(tmp_path, photos, *command)
    assert newest(tmp_path / "out")["step"] > 0
