"""What only a CUDA device can show. Run: python -m pytest -o addopts=-q -n 8 tests/test_gpu.py -k "not compiled", then -k compiled, which takes minutes

Small networks with random weights, but for the embedded model.
"""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import test_train_s3diff
import torch
from bench import S3, Gram, Vosr
from PIL import Image
from test_train import photos  # noqa: F401

import sample
import training
from models.support import gpu
from models.support.graphs import Graphs, replay
from training import choose_dtype

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ARGS = Namespace(tiny=True, steps=None)
SYSTEMS = {"vosr": lambda device: Vosr("tiny", ARGS, device), "s3diff": lambda device: S3(ARGS, device), "gramsr": lambda device: Gram(ARGS, device)}


@pytest.fixture(params=SYSTEMS)
def system(request):
    choose_dtype("float32", torch.device("cuda"))       # cudnn would take TF32 unasked
    return SYSTEMS[request.param](torch.device("cuda"))


@pytest.fixture
def lq():
    return torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_host_never_waits_inside_a_picture(system, lq):
    system.to(torch.bfloat16)
    gpu.tune(system.model)
    system.model.upscale(lq)        # what is done once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sr = system.model.upscale(lq)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sr.is_cuda and sr.isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("words", [["prior"], ["estimator"], ["adapters"]], ids=str)
def test_the_host_never_waits_inside_a_training_step(monkeypatch, tmp_path, photos, words, dtype):      # noqa: F811
    step_that_fits = training.step_that_fits

    def watched(run, step):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if run.step == 2 else "default")     # the first ones do what is done once
        try:
            step_that_fits(run, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(training, "step_that_fits", watched)
    test_train_s3diff.shrink(monkeypatch)
    test_train_s3diff.launch(monkeypatch, photos, tmp_path, "--stage", *words, "--steps", 3, "--device", "cuda", "--dtype", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(system, lq, dtype):
    whole = system.model.upscale(lq).float()
    system.to(dtype)
    error = (system.model.upscale(lq).float() - whole).square().mean().sqrt().item()
    assert error < 0.02, f"{-20 * torch.tensor(error).log10():.1f} dB"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tuned_equals_plain(monkeypatch, system, lq, dtype):
    monkeypatch.setattr(gpu, "LARGE", 0)
    plain = system.model.upscale(lq)
    system.to(dtype)
    gpu.tune(system.model)
    torch.testing.assert_close(system.model.upscale(lq), plain, atol=2e-3 if dtype == torch.float32 else 3e-2, rtol=0)


@torch.no_grad()
def test_compiled_equals_plain(system, lq):
    plain = system.model.upscale(lq)
    for network in sample.to_compile(system.model):
        network.compile()
    torch.testing.assert_close(system.model.upscale(lq), plain, atol=2e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_graphs_equal_plain(system, lq, compiled):
    """Sizes in turn, tiles and knobs that change in between; results are compared at the end, when later calls have been."""
    options = {"VOSR": {"steps": 3, "guidance": 0.5}, "S3Diff": {"noise": 0.1, "blur": 0.9}, "GramSR": {"pixel": 0.5, "texture": 0.2}}
    sizes = (lq,) if compiled else (lq, lq[..., :24, :24])      # each is compiled anew
    calls = [(x, more) for x in sizes for more in ({}, {"tile": 64, "overlap": 16}, options[type(system.model).__name__])] * 3
    system.to(torch.float16)
    gpu.tune(system.model)
    plain = [system.model.upscale(x, **more) for x, more in calls]
    for network in sample.to_compile(system.model) if compiled else ():
        network.compile()
    replay(system.model)
    for x, y in zip([system.model.upscale(x, **more) for x, more in calls], plain):
        torch.testing.assert_close(x, y, atol=2e-2 if compiled else 2e-3, rtol=0)
    recorded = [m for m in system.model.modules() if isinstance(m._compiled_call_impl, Graphs)]
    assert recorded and all(any(m._compiled_call_impl.graphs.values()) for m in recorded)


@pytest.mark.parametrize("script", ["train_vosr.py --stage autoencoder", "train_s3diff.py --preset tiny --init none", "train_gramsr.py --preset tiny --stage pixel --init none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_training(tmp_path, script, dtype):
    for i in range(3):
        Image.effect_noise((140, 140), 60).convert("RGB").save(tmp_path / f"{i}.png")
    command = [sys.executable, *script.split(), "--data", tmp_path, "--out", tmp_path / "out", "--steps", "3", "--batch-size", "2", "--dtype", dtype]
    subprocess.run([*map(str, command), "--device", "cuda"], cwd=ROOT, check=True)
    assert (tmp_path / "out" / "sheet.png").exists()
