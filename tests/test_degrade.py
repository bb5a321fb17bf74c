"""The degradation and the command.    python -m pytest tests/test_degrade.py"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import degrade as module  # noqa: E402
from degrade import (CLEAN, GRAMSR, IDENTITY, KERNEL_SIZES, MODES, REAL_ESRGAN_KERNELS, RECIPES, S3DIFF,  # noqa: E402
                     VOSR, WEAK_RANGES, Kernel, NoiseSource, apply, blur, degrade, draw_kernel, draw_plan, jpeg,
                     kernel_weights, resize, severity, stack_kernels, unit_noise)

STORED = json.loads((ROOT / "tests" / "golden" / "degrade.json").read_text())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=2, height=64, width=80, seed=0):
    """Smooth with some detail, like a photograph.  -> (n, 3, height, width) in [0, 1]"""
    g = generator(seed)
    coarse = F.interpolate(torch.rand(n, 3, 6, 8, generator=g), size=(height, width), mode="bilinear",
                           align_corners=False)
    return (0.8 * coarse + 0.2 * torch.rand(n, 3, height, width, generator=g)).clamp(0, 1)


def save_photos(folder, sizes, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, (width, height) in enumerate(sizes):
        x = (pictures(1, height, width, seed=i)[0] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(x).save(folder / f"{i}{suffix}")
    return folder


# -----------------------------------------------------------------------------
# recipes and plans

def test_recipes_are_the_published_settings():
    for name, recipe in (("S3Diff", S3DIFF), ("VOSR", VOSR), ("GramSR", GRAMSR)):
        s = {key: value[name] for key, value in STORED["settings"].items()}
        for word, stage, i in (("first", recipe.first, 1), ("second", recipe.second, 2)):
            odds = [stage.up_probability, stage.down_probability, stage.keep_probability]
            assert odds == s[f"{word} stage: resize up/down/keep"] and sum(odds) == pytest.approx(1)
            assert list(stage.scale) == s[f"{word} stage: resize range"]
            assert list(stage.gaussian_sigma) == s[f"{word} stage: gaussian sigma{' (of 255)' if i == 1 else ''}"]
            assert list(stage.poisson_scale) == s[f"{word} stage: poisson scale"]
            assert list(stage.jpeg_quality) == s[f"{word} stage: JPEG quality"]
            ranges = [list(stage.blur_sigma), list(recipe.generalized_beta), list(recipe.plateau_beta)]
            assert ranges == s[f"kernel {i}: sigma, generalized beta, plateau beta"]
        assert recipe.first.blur_probability == 1
        assert recipe.second.blur_probability == s["second blur probability"]
        assert recipe.keep_hq_probability == s["no-degradation probability"]
        assert list(KERNEL_SIZES) == s["kernel sizes (each of three kernels)"]
        kinds = "kernel types iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso"
        assert list(recipe.kernels.values()) == s[kinds]
        assert recipe.sinc_probability == s["sinc probability, kernels 1 and 2"]
        assert recipe.final_sinc_probability == s["final sinc probability"]
        assert recipe.gaussian_probability == s["first stage: gaussian noise probability"]
        assert recipe.gray_noise_probability == s["gray noise probability (both stages)"]
        ours = recipe.exact_resize, recipe.antialias, recipe.only_shrink_probability
        assert ours == (False, False, 0)
    assert list(REAL_ESRGAN_KERNELS) == [(shape, symmetry) for shape in ("gaussian", "generalized", "plateau")
                                         for symmetry in ("isotropic", "anisotropic")]


def test_plans_stay_in_their_ranges_and_follow_the_odds():
    plans = [draw_plan(VOSR, 3, generator(i)) for i in range(600)]
    for plan in plans:
        first, second = plan.first, plan.second
        assert len(first.kernels) == len(plan.sinc_kernels) == 1 and len(first.jpeg_quality) == 3
        assert all(30 <= q <= 95 for q in first.jpeg_quality + second.jpeg_quality)
        assert 0.15 <= first.resize_scale <= 1.5 and 0.3 <= second.resize_scale <= 1.2
        lo, hi = VOSR.first.gaussian_sigma if first.noise_type == "gaussian" else VOSR.first.poisson_scale
        assert all(lo <= s <= hi for s in first.noise_strength)
    odds = {
        1.0: [plan.first.blur for plan in plans],
        0.8: [plan.second.blur for plan in plans],
        0.7: [plan.first.resize_scale < 1 for plan in plans],
        0.5: [plan.jpeg_before_sinc for plan in plans],
        0.4: [gray for plan in plans for gray in plan.first.noise_gray],
        0.1: [plan.first.kernels[0].shape == "sinc" for plan in plans],
        0.0: [plan.only_shrink or plan.exact_resize or plan.keep_hq for plan in plans],
    }
    for p, draws in odds.items():
        assert abs(np.mean(draws) - p) < (0.08 if 0 < p < 1 else 1e-9)
    assert len(draw_plan(S3DIFF, 3, generator()).first.kernels) == 3


def test_ours_draws_last():
    """What the official recipes draw does not depend on the fields that are ours."""
    ours = replace(VOSR, exact_resize=True, antialias=True, only_shrink_probability=1.0)
    plan, changed = (draw_plan(recipe, 2, generator(7)) for recipe in (VOSR, ours))
    assert changed.only_shrink and changed.exact_resize and changed.antialias
    assert replace(changed, only_shrink=False, exact_resize=False, antialias=False) == plan


def test_kernels_follow_the_odds():
    rng = random.Random(0)
    kernels = [draw_kernel(rng, VOSR, VOSR.first.blur_sigma) for _ in range(4000)]
    blurs = [kernel for kernel in kernels if kernel.shape != "sinc"]
    for (shape, symmetry), p in REAL_ESRGAN_KERNELS.items():
        isotropic = symmetry == "isotropic"
        drawn = [k.shape == shape and (k.sigma_x == k.sigma_y) == isotropic for k in blurs]
        assert abs(np.mean(drawn) - p) < 0.025
    assert all(kernel.beta == 1 for kernel in blurs if kernel.shape == "gaussian")
    assert all(0.5 <= kernel.beta <= 4 for kernel in blurs if kernel.shape == "generalized")
    plateau = [kernel.beta for kernel in blurs if kernel.shape == "plateau"]
    assert max(plateau) <= 2 and abs(np.mean([beta == 1 for beta in plateau]) - 0.5) < 0.08
    assert all(math.pi / (3 if k.size < 13 else 5) <= k.cutoff <= math.pi for k in kernels if k.shape == "sinc")


# -----------------------------------------------------------------------------
# operations

def test_kernels_sum_to_one_and_keep_a_flat_picture():
    rng = random.Random(0)
    kernels = [draw_kernel(rng, VOSR, VOSR.first.blur_sigma) for _ in range(60)] + [IDENTITY]
    assert {k.shape for k in kernels} >= {"gaussian", "generalized", "plateau", "sinc", "identity"}
    for k in kernels:
        w = kernel_weights(k)
        assert w.shape == (k.size, k.size) and abs(w.sum() - 1) < 1e-9 and w.isfinite().all()
        assert torch.allclose(blur(torch.full((1, 3, 30, 24), 0.3), w.float()[None]), torch.tensor(0.3), atol=1e-6)


def test_isotropic_kernels_are_round_and_theta_turns_the_others():
    isotropic = kernel_weights(Kernel("gaussian", 21, 2.0, 2.0))
    assert torch.allclose(isotropic, isotropic.T)
    long_x = kernel_weights(Kernel("gaussian", 21, sigma_x=3.0, sigma_y=1.0))
    assert long_x[10, 14] > 2 * long_x[14, 10]      # [row, column]: x runs along columns
    turned = kernel_weights(Kernel("gaussian", 21, sigma_x=3.0, sigma_y=1.0, theta=math.pi / 2))
    assert torch.allclose(turned, long_x.T)


@pytest.mark.parametrize("shape", ["iso", "Gaussian", "motion", ""])
def test_an_unknown_kernel_is_named(shape):
    """It was a Gaussian once, in silence."""
    message = f"^unknown blur kernel '{shape}'; choose from gaussian, generalized, plateau, sinc, identity$"
    with pytest.raises(ValueError, match=message):
        stack_kernels([IDENTITY, Kernel(shape, 7, 1.0, 1.0)])


def test_unknown_noise_is_an_error():
    with pytest.raises(ValueError, match="^unknown noise 'salt'; choose from gaussian, poisson$"):
        unit_noise(torch.rand(1, 3, 4, 4), "salt", [False], NoiseSource(0))


def test_blur_of_the_true_size_is_the_padded_one():
    k, x = Kernel("gaussian", 7, sigma_x=2.0, sigma_y=0.7, theta=0.5), pictures()
    padded = stack_kernels([k, Kernel("identity", 21)])[:1]
    assert padded.shape == (1, 21, 21) and torch.allclose(blur(x, stack_kernels([k])), blur(x, padded), atol=1e-6)
    assert torch.equal(blur(x, stack_kernels([IDENTITY])), x)


def test_blur_serves_pictures_smaller_than_the_kernel():
    assert blur(pictures(1, 3, 1), stack_kernels([Kernel("gaussian", 21, 2.0, 2.0)])).shape == (1, 3, 3, 1)


@pytest.mark.parametrize("mode", MODES)
def test_shrinking_with_antialiasing_is_pillows(mode):
    x = pictures(1)
    ours = resize(x, mode, size=(16, 20), antialias=True)
    filters = {"area": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    for channel, small in zip(x[0], ours[0]):
        pillow = np.asarray(Image.fromarray(channel.numpy()).resize((20, 16), filters[mode]))
        assert np.abs(small.numpy() - pillow).max() < 1e-5


def test_jpeg_improves_with_quality_and_leaves_flat_pictures():
    x = pictures(1)
    errors = [(jpeg(x, [q]) - x).square().mean().item() for q in (10, 30, 60, 80, 95, 100)]
    assert errors == sorted(errors, reverse=True)
    gray = x[:, :1].expand_as(x)  # the halved chroma of colours is lost even at 100
    assert torch.allclose(jpeg(gray, [100]), gray, atol=1e-4)
    assert (jpeg(torch.full((1, 3, 32, 32), 0.5), [30]) - 0.5).abs().max() < 0.01
    assert torch.equal(jpeg(torch.cat([x, x]), [30, 80])[1:], jpeg(x, [80]))  # each picture by its own quality


def test_noise_has_the_official_statistics():
    ramp = (torch.arange(256.0) / 255).expand(1, 3, 256, 256)
    cases = {
        "gaussian_sigma_25": (ramp, "gaussian", 25, False),
        "poisson_ramp_scale_2": (ramp, "poisson", 2, False),
        "poisson_constant_half_scale_1": (torch.full_like(ramp, 0.5), "poisson", 1, False),
        "poisson_gray_ramp_scale_2": (ramp, "poisson", 2, True),
    }
    for name, expected in STORED["cases"]["noise"]["statistics_of_the_true_samplers"].items():
        x, type, strength, gray = cases[name]
        noise = strength * unit_noise(x, type, [gray], NoiseSource(0))
        assert abs(noise.mean()) < expected["mean_tolerance"]
        assert abs(noise.std() - expected["expected_std"]) < expected["std_tolerance"]
        assert torch.equal(noise[:, :1].expand_as(noise), noise.expand(1, 3, 256, 256)) == gray


# -----------------------------------------------------------------------------
# the whole

@pytest.mark.parametrize("name", RECIPES)
def test_same_seed_same_result_in_range(name):
    hq = pictures(3)
    for seed in range(8):
        lq, lq_up = degrade(hq, RECIPES[name], generator(seed))
        again = degrade(hq, RECIPES[name], generator(seed))
        assert torch.equal(lq, again[0]) and torch.equal(lq_up, again[1])
        assert lq.shape == (3, 3, 16, 20) and lq_up.shape == hq.shape
        for x in (lq, lq_up):
            assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1
        if RECIPES[name].eight_bit:
            assert (lq_up * 255 - (lq_up * 255).round()).abs().max() < 1e-3
    assert not torch.equal(lq, degrade(hq, RECIPES[name], generator(99))[0])


def test_scale_and_odd_sizes():
    lq, lq_up = degrade(pictures(1, 50, 47), VOSR, generator(), scale=3)
    assert lq.shape == (1, 3, 16, 15) and lq_up.shape == (1, 3, 50, 47)


def test_branches_per_image_draw_each_picture_anew():
    hq = pictures(1).expand(4, -1, -1, -1)
    together = degrade(hq, replace(VOSR, branches_per="image"), generator())[0]
    g = generator()
    alone = torch.cat([degrade(one, VOSR, g)[0] for one in hq.split(1)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", RECIPES)
def test_groups_share_branches(name):
    """Four of them at a time are batches of four; each image's draws are distributed as they are one by one."""
    hq, recipe = pictures(6, 32, 32), replace(RECIPES[name], branches_per=4)
    g, batch = generator(), replace(recipe, branches_per="batch")
    expected = [torch.cat(x) for x in zip(*(degrade(some, batch, g) for some in hq.split(4)))]
    for x, y in zip(degrade(hq, recipe, generator()), expected):
        assert torch.equal(x, y)
    g, found = generator(), []
    for n in (1, 4):
        plans = [draw_plan(recipe, n, g) for _ in range(1200)]
        found.append([np.mean([getattr(stage, field) for plan in plans for stage in (plan.first, plan.second)])
                      for field in ("blur", "resize_scale", "noise_gray", "jpeg_quality")])
    assert np.allclose(*found, rtol=0.06)


def test_many_kernels_equal_one_by_one(monkeypatch):
    """All shapes, sizes mixed; of a shape that degrade.py does not have there is an error, or whatever a student writes."""
    rng = random.Random(0)
    kernels = [draw_kernel(rng, RECIPES[name], (0.2, 3.0)) for name in ("vosr", "s3diff", "wide") for _ in range(60)] + [IDENTITY]
    many = stack_kernels(kernels)
    one_by_one = torch.cat([F.pad(stack_kernels([k]), [(many.shape[-1] - k.size) // 2] * 4) for k in kernels])
    assert {k.shape for k in kernels} == {"gaussian", "generalized", "plateau", "sinc", "identity"} and many.dtype == torch.float32
    torch.testing.assert_close(many, one_by_one, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="unknown blur kernel 'motion'"):
        stack_kernels([*kernels, Kernel("motion", 7)])


def test_clean_replacement_leaves_lq_degraded():
    hq = pictures(1)
    plan = draw_plan(replace(S3DIFF, keep_hq_probability=1.0), 1, generator())
    lq, lq_up = apply(plan, hq)
    assert torch.equal(lq_up, hq) and torch.equal(lq, apply(replace(plan, keep_hq=False), hq)[0])
    assert not torch.equal(lq, hq[..., ::4, ::4])


def centroid(x):
    """(B, 3, H, W), 0 outside a blob -> row, column of its centre of mass, of the whole width and height"""
    mass = x.sum((0, 1))
    rows, columns = ((torch.arange(n) + 0.5) / n for n in mass.shape)
    return torch.stack([(mass.sum(1) * rows).sum(), (mass.sum(0) * columns).sum()]) / mass.sum()


def shifts(recipe):
    """How far the centre of a symmetric blob moves right and down, in LQ pixels, for fifty plans without noise."""
    side = 64
    offset = torch.arange(side) - (side - 1) / 2
    blob = torch.exp(-0.5 * (offset[:, None] ** 2 + offset**2) / 6.0**2).expand(1, 3, side, side)
    moved = []
    for seed in range(50):
        plan = draw_plan(recipe, 1, generator(seed))
        plan.first.noise_strength = plan.second.noise_strength = [0.0]
        plan.first.jpeg_quality = plan.second.jpeg_quality = [100.0]
        lq, _ = apply(plan, blob)
        moved.append((centroid(lq) - 0.5) * side / 4)
    return torch.stack(moved)


def test_the_first_resize_shifts_officially_and_not_if_exact():
    assert centroid(torch.ones(1, 3, 6, 8)).tolist() == [0.5, 0.5]
    official, exact = shifts(VOSR), shifts(replace(VOSR, exact_resize=True))
    assert official.mean() > 0.05 and official.max() > 0.2
    assert exact.abs().max() < 0.01


def test_clean_is_half_shrunk_and_half_weak():
    plans = [draw_plan(CLEAN, 1, generator(i)) for i in range(400)]
    assert abs(np.mean([plan.only_shrink for plan in plans]) - 0.5) < 0.08
    assert all(plan.exact_resize and plan.antialias and plan.sinc_kernels == [IDENTITY] for plan in plans)
    for stage in [stage for plan in plans for stage in (plan.first, plan.second)]:
        kernel, = stage.kernels
        assert kernel.shape == "gaussian" and 0.2 <= kernel.sigma_x == kernel.sigma_y <= 0.7
        assert 0.92 <= stage.resize_scale <= 1.08 and 85 <= stage.jpeg_quality[0] <= 100
        assert 0 <= stage.noise_strength[0] <= (4 if stage.noise_type == "gaussian" else 0.15)
    assert {stage.resize_scale == 1 for stage in (plan.first for plan in plans)} == {True, False}
    assert abs(np.mean([plan.first.blur for plan in plans]) - WEAK_RANGES.blur_probability) < 0.08


@pytest.mark.parametrize("mode", MODES)
def test_only_shrink_does_nothing_else(mode):
    hq, steps = pictures(2), []
    plan = replace(draw_plan(CLEAN, 2, generator()), only_shrink=True, final_mode=mode)
    lq, lq_up = apply(plan, hq, steps=steps)
    assert [name for name, _ in steps] == ["resize", "resize"]      # HQ to LQ, LQ to lq_up
    assert torch.equal(lq, resize(hq, mode, size=(16, 20), antialias=True).clamp(0, 1))
    blurred, noisy = severity(plan, hq, lq).T
    assert noisy.max() == 0 and blurred.max() < (0.2 if mode == "bilinear" else 0.05)     # its triangle is wider


def test_clean_degrades_less_than_any_other_recipe():
    hq = pictures(2)
    shrunk = resize(hq, "area", size=(16, 20))

    def error(recipe):
        lq = torch.stack([degrade(hq, recipe, generator(seed))[0] for seed in range(30)])
        return (lq - shrunk).square().mean()

    errors = {name: error(recipe).item() for name, recipe in RECIPES.items()}
    assert errors["clean"] == min(errors.values()) and errors["clean"] < errors["s3diff"] / 2



# -----------------------------------------------------------------------------
# the command

def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_command_makes_pairs_and_names_a_bad_file(tmp_path):
    folder = save_photos(tmp_path / "hr", [(66, 50), (40, 40), (20, 20)])  # the last is too small
    save_photos(folder / "more", [(48, 48)], ".jpg")
    (folder / "bad.png").write_text("no picture")
    status, _, err = runs.here(ROOT / "degrade.py", folder, tmp_path / "out", "--seed", 5)
    assert status == 1 and "Traceback" not in err
    assert len(err.splitlines()) == 2 and "bad.png" in err and "2.png" in err
    made = files(tmp_path / "out")
    assert set(made) == {f"{kind}/{name}" for kind in ("lq", "hq") for name in ("0.png", "1.png", "more/0.png")}
    hq = Image.open(tmp_path / "out" / "hq" / "0.png")
    assert hq.size == (64, 48) and Image.open(tmp_path / "out" / "lq" / "0.png").size == (16, 12)
    assert np.array_equal(np.asarray(hq), np.asarray(Image.open(folder / "0.png"))[:48, :64])

    for name in ("bad.png", "0.png", "2.png"):  # fewer files, the same bytes
        (folder / name).unlink()
    assert runs.here(ROOT / "degrade.py", folder, tmp_path / "fewer", "--seed", 5)[0] == 0
    fewer = files(tmp_path / "fewer")
    assert len(fewer) == 4 and all(made[name] == data for name, data in fewer.items())


def test_command_refuses_in_one_line(tmp_path, monkeypatch):
    folder = save_photos(tmp_path / "hr", [(40, 40)])
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        tar.add(folder / "0.png", "0.png")
    for args, reason in (((folder, folder / "out"), "lies inside"),
                         ((tmp_path / "tars", tmp_path / "out"), "no images in this folder, only 1 x .tar")):
        monkeypatch.setattr(sys, "argv", ["degrade.py", *map(str, args)])
        with pytest.raises(SystemExit, match=reason) as stop:
            module.main()
        assert "\n" not in stop.value.code  # a string: one line on stderr, exit status 1
    assert list(files(folder)) == ["0.png"]


@pytest.mark.parametrize("name, status, words", [("0.png", 0, ""), ("nowhere", 1, "no such file; check the spelling")])
def test_command_on_one_picture(tmp_path, monkeypatch, capsys, name, status, words):
    folder = save_photos(tmp_path / "hr", [(40, 40)])
    monkeypatch.setattr(sys, "argv", ["degrade.py", str(folder / name), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == status and words in capsys.readouterr().err
    assert set(files(tmp_path / "out")) == ({"lq/0.png", "hq/0.png"} if status == 0 else set())


def test_severity_knows_the_plan():
    """More blur: more blur, and nothing else. More noise: more noise. No damage but shrinking: neither."""
    hq, g = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)
    no_resize = {"up_probability": 0, "down_probability": 0, "keep_probability": 1}
    first, second = replace(S3DIFF.first, **no_resize), replace(S3DIFF.second, **no_resize, blur_probability=0)
    plan = draw_plan(replace(S3DIFF, first=first, second=second), 2, g)

    def told(sigma, strength):
        """Two pictures, the second twice as bad as the first."""
        kernels = [Kernel("gaussian", 21, sigma * k, sigma * k) for k in (1, 2)]
        first = replace(plan.first, kernels=kernels, noise_type="gaussian", noise_strength=[strength, 2 * strength],
                        noise_gray=[False] * 2, jpeg_quality=[95] * 2)
        second = replace(plan.second, noise_strength=[0, 0], jpeg_quality=[95] * 2)
        changed = replace(plan, first=first, second=second, sinc_kernels=[IDENTITY] * 2, final_mode="area")
        return severity(changed, hq, apply(changed, hq)[0])

    blurred, noisy, none = told(2.0, 0), told(0.1, 10), told(0.1, 0)
    assert 0.2 < blurred[0, 0] < blurred[1, 0] <= 1 and none[:, 0].max() < 0.1 and none[:, 1].max() == 0
    assert 0.02 < noisy[0, 1] < noisy[1, 1] and abs(noisy[:, 0] - none[:, 0]).max() < 0.02


def test_stop_and_go_on(tmp_path, monkeypatch, capsys):
    folder, whole = save_photos(tmp_path / "hr", [(40, 40)] * 4), tmp_path / "whole"
    handlers, real, calls = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], module.pair, []

    def main(out, *more):
        monkeypatch.setattr(sys, "argv", ["degrade.py", str(folder), str(out), *more])
        with pytest.raises(SystemExit) as stop:
            module.main()
        return stop.value.code

    def pair(path, name, args):
        calls.append(path.name)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(path, name, args)

    try:
        monkeypatch.setattr(module, "pair", pair)
        assert main(tmp_path / "out") == 130 and "stopped after 2 of 4; add --skip-existing" in capsys.readouterr().err
        assert set(files(tmp_path / "out")) == {f"{kind}/{i}.png" for kind in ("lq", "hq") for i in (0, 1)}
        (tmp_path / "out" / "hq" / "1.png").unlink()       # half of a pair is none
        assert main(tmp_path / "out", "--skip-existing") == 0
        assert calls == ["0.png", "1.png", "2.png", "1.png", "2.png", "3.png"]
        assert main(whole) == 0 and files(whole) == files(tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, handlers[0]), signal.signal(signal.SIGTERM, handlers[1])


def test_names_and_files_of_others(tmp_path):
    """In a code page that lacks the name; with results that are not ours, other things, two names that are one PNG."""
    folder = save_photos(tmp_path / "hr", [(40, 40)])
    (folder / "0.png").rename(folder / "東京.png")
    save_photos(folder / "sub", [(40, 40)], ".bmp"), save_photos(folder / "sub", [(40, 40)], ".png")
    save_photos(folder / ".trash", [(40, 40)])
    (folder / "a.heic").touch()
    (tmp_path / "東" / "lq" / "sub").mkdir(parents=True)
    (tmp_path / "東" / "lq" / "sub" / "0.png").write_text("mine")
    done = subprocess.run([sys.executable, ROOT / "degrade.py", folder, tmp_path / "東"], capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"})
    out, err = done.stdout.decode("cp1252"), done.stderr.decode("cp1252")
    assert done.returncode == 1 and "Traceback" not in err and "did not write" in err
    assert "left out 1 x .heic (HEIC)" in out
    assert "2 pictures in" in out and "\\u6771" in out
    assert (tmp_path / "東" / "lq" / "sub" / "0.png").read_text() == "mine"
    assert {"lq/東京.png", "hq/東京.png", "lq/sub/0-2.png", "hq/sub/0-2.png", "lq/sub/0.png"} == set(files(tmp_path / "東"))


@pytest.mark.parametrize("arguments", ["--seed -1", "--scale 0", "--scale 17", "--scale 2.5"])
def test_numbers_are_refused_by_name(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["degrade.py", "in", "out", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2 and f"argument {arguments.split()[0]}: " in capsys.readouterr().err
