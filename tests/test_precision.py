"""Half precision: every system and every tiny training in all three types, close to float32.

Run: python -m pytest tests/test_precision.py
"""

from dataclasses import replace

import pytest
import runs
import test_train
import test_train_s3diff
import torch
import torch.nn as nn
from bench import S3, Gram, Vosr
from PIL import Image
from test_gpu import ARGS

import sample
import train_gramsr
import train_s3diff
import train_vosr
import training
from models.qwen_vae import QwenVAE, QwenVAEConfig
from models.support.imaging import read_picture
from models.support.precision import Exact, in_half
from models.support.tiles import tile_boxes, tiled

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
SYSTEMS = {"vosr": lambda: Vosr("tiny", ARGS, "cpu"), "s3diff": lambda: S3(ARGS, "cpu"),
           "gramsr": lambda: Gram(ARGS, "cpu")}


def difference(x, y):
    """Mean absolute difference in levels of 255."""
    return 255 * (x - y).abs().mean().item()


@HALF
def test_sample_in_half(tmp_path, dtype):
    """The first command of README, as a GPU would run it, on a smaller picture: several tiles, and another shape."""
    Image.effect_noise((48, 40), 60).convert("RGB").save(tmp_path / "lq.png")
    for name in ("float32", str(dtype).removeprefix("torch.")):
        assert sample.main([str(tmp_path / "lq.png"), "--out", str(tmp_path / name), "--dtype", name,
                            "--device", "cpu"]) == 0
    pictures = [read_picture(tmp_path / name / "lq.png")[0] for name in ("float32", str(dtype).removeprefix("torch."))]
    assert 0 < difference(*pictures) < 1


@HALF
@torch.no_grad()
@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_in_half(name, dtype):
    system, lq = SYSTEMS[name](), torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    options = {} if name == "s3diff" else {"tile": 64, "overlap": 16}
    whole = system.model.upscale(lq, **options)
    system.to(dtype)
    half = system.model.upscale(lq, **options)
    # random weights are harsher than trained ones, as those of vosr are
    most = 4 if name != "vosr" and dtype == torch.bfloat16 else 1
    assert half.dtype == torch.float32 and 0 < difference(half, whole) < most


@HALF
@torch.no_grad()
def test_qwen_vae_in_half(dtype):
    vae, x = QwenVAE(QwenVAEConfig(base_dim=16)), torch.rand(1, 3, 32, 40) * 2 - 1
    z = vae.encode(x)
    picture = vae.decode(z)
    in_half(vae, dtype)
    assert vae.encode(x).dtype == vae.decode(z).dtype == torch.float32
    assert 0 < (vae.decode(z) - picture).abs().mean() < 0.05 * picture.std() and (vae.encode(x) - z).abs().mean() < 0.02


def test_what_is_stored_in_half():
    """Large products alone; a layer that is exact keeps its adapters, too."""
    model = S3(ARGS, "cpu").model
    in_half(model.unet, torch.float16), in_half(model.vae, torch.float16)
    stored = {k for k, p in model.named_parameters() if p.dtype == torch.float16}
    exact = tuple(k for k, m in model.named_modules() if isinstance(m, Exact))
    norms = tuple(k for k, m in model.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm)))
    assert exact and norms and not any(k.startswith(exact + norms + ("denet", "modulation")) for k in stored)
    products = {f"{k}.weight" for k, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
                and not k.startswith((*exact, "denet", "modulation"))}
    assert {k for k in stored if k.endswith("weight")} == products
    assert any("lora_" in k for k in stored)
    other = in_half(S3(ARGS, "cpu").model.unet, torch.float16, adapters=False)
    assert not any("lora_" in k for k, p in other.named_parameters() if p.dtype == torch.float16)


@torch.no_grad()
def test_streams_and_results_are_float32():
    """What enters a norm at the start of a block has never been rounded to half since the network began."""
    system = Vosr("tiny", ARGS, "cpu")
    system.to(torch.bfloat16)
    seen, dit = [], system.model.dit
    for block in dit.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    v = dit(*torch.randn(2, 1, 64, 8, 8), torch.randn(1, 4, dit.cfg.z_dims), torch.ones(1), torch.zeros(1))
    assert v.dtype == torch.float32
    assert all(x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float()) for x in seen)


@pytest.mark.parametrize("outside", [torch.bfloat16, torch.float16])
def test_exact_layers_resist_autocast(outside):
    unet = S3(ARGS, "cpu").model.unet
    exact = [m for m in unet.modules() if isinstance(m, Exact)]
    assert len(exact) == 2
    types = []
    for m in exact:
        m.register_forward_hook(lambda _, args, out: types.append(out.dtype))
    with torch.autocast("cpu", outside):
        assert unet(torch.randn(1, 4, 8, 8), 999, torch.randn(1, 77, unet.cfg.context_dim)).dtype == torch.float32
    assert types == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blending_in_half(dtype):
    """The window's corner is 3.7e-12 at 64 cells, which float16 takes for 0."""
    x = torch.randn(1, 4, 64, 80).to(dtype)
    boxes = tile_boxes(64, 80, 64, 16)
    y = tiled(lambda tiles: tiles, boxes, x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, x, rtol=2 * torch.finfo(dtype).eps, atol=0)


TRAININGS = {
    "autoencoder": (train_vosr, "--preset tiny --stage autoencoder"),
    "flow": (train_vosr, "--preset tiny --stage flow --init {autoencoder}"),
    "distill": (train_vosr, "--preset tiny --stage distill --init {flow}"),
    "decoder": (train_vosr, "--preset tiny --stage decoder --init {distill}"),
    "s3diff": (train_s3diff, "--preset tiny --init none"),
    "prior": (train_s3diff, "--preset tiny --stage prior"),
    "estimator": (train_s3diff, "--preset tiny --stage estimator --init none"),
    **{stage: (train_gramsr, f"--preset tiny --stage {stage}" + f" --init {before}")
       for stage, before in (("pixel", "none"), ("semantic", "{pixel}"), ("texture", "{semantic}"))},
}


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """launch(name in TRAININGS, folder, --dtype, --steps) -> the --out folder; networks are small"""
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.effect_noise((90, 90), 60).convert("RGB").save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.setitem(train_vosr.PRESETS, "tiny", (test_train.SMALL, test_train.STAGES))
    small = replace(train_gramsr.PRESETS["tiny"][0], unet=test_train_s3diff.SMALL_TINY.unet, vae=test_train_s3diff.SMALL_TINY.vae)
    monkeypatch.setitem(train_gramsr.PRESETS, "tiny",
                        (small, {k: replace(s, crop=64) for k, s in train_gramsr.TINY.items()}))
    test_train_s3diff.shrink(monkeypatch), runs.watch_less(monkeypatch)
    folders = {}

    def launch(name, folder, dtype, steps):
        script, flags = TRAININGS[name]
        folders[name] = tmp_path / folder
        argv = [*flags.format(**folders).split(), "--data", tmp_path / "photos", "--out", folders[name],
                "--steps", steps, "--batch-size", 2]
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, argv), "--dtype", dtype, "--device", "cpu"])
        script.main()
        return folders[name]
    return launch


@pytest.mark.parametrize("names", [("autoencoder", "flow", "distill", "decoder"), ("prior", "estimator"),
                                   ("s3diff",), ("pixel", "semantic", "texture")], ids=" ".join)
def test_trainings_in_half(launch, names):
    """A step of each stage in all types, one after the other; the loss is that of float32, nearly.

    Of float16's steps the first ones may be left out: so its scaler finds its scale (stage texture: the first 9 of 16).
    """
    for name in names:
        losses = {}
        for dtype in ("float32", "bfloat16", "float16"):
            last = (launch(name, f"{name}-{dtype}", dtype, 1) / "log.csv").read_text().splitlines()[-1]
            losses[dtype] = float(last.split(",")[1])
        plain, *half = losses.values()
        assert half == pytest.approx([plain] * 2, rel=0.03), name


@pytest.mark.parametrize("name", ["autoencoder", "s3diff", "pixel"])
def test_resume_in_another_type(launch, name):
    """A scaler that was off has no state, which one that is on would refuse."""
    for steps, dtype in enumerate(("bfloat16", "float16", "float32"), 1):
        launch(name, "out", dtype, steps)


def test_device_and_type(monkeypatch):
    """A process of torchrun has its own GPU, by whatever name; float32 is float32, and TF32 a choice."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert training.choose_device("cuda") == torch.device("cuda", 3)
    assert training.choose_device("cuda:1") == torch.device("cuda", 1)
    assert training.choose_device("cpu") == torch.device("cpu")
    for name, allowed in (("tf32", True), ("float32", False)):
        assert training.choose_dtype(name, torch.device("cuda")) == torch.float32
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
    assert training.choose_dtype("auto", torch.device("cuda"), "float16") == torch.float16
