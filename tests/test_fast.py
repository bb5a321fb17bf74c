"""Each fast way of models/support computes what the plain code does.    python -m pytest tests/test_fast.py

One function a way; what it saves is measured in tests/bench.py, its corner cases have tests of their own.
"""

import pytest
import torch
import torch.nn.functional as F

from models.qwen_vae import QwenVAE, QwenVAEConfig
from models.support import strips, winograd
from models.vae import VAE, VAEConfig

AUTOENCODERS = {"vae": lambda: VAE(VAEConfig(widths=(32, 32, 64), layers_per_block=1)),
                "qwen_vae": lambda: QwenVAE(QwenVAEConfig(base_dim=16, dim_mult=(1, 2, 2), num_res_blocks=1))}


@torch.no_grad()
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_strips(monkeypatch, name):
    """Autoencoders a few rows at a time: encoder and decoder, an image of 68 x 52 pixels."""
    torch.manual_seed(0)
    vae, x = AUTOENCODERS[name](), torch.rand(1, 3, 68, 52) * 2 - 1
    z = vae.encode(x)
    image, cut = vae.decode(z), []
    monkeypatch.setattr(strips, "LIMIT", 32 * 32)
    monkeypatch.setattr(strips, "QUERIES", 64)
    monkeypatch.setattr(strips, "in_strips", lambda *args, f=strips.in_strips, **options: cut.append(1) or f(*args, **options))
    torch.testing.assert_close(vae.encode(x), z, rtol=0, atol=1e-5 * z.abs().max().item())
    encoder_layers = len(cut)
    torch.testing.assert_close(vae.decode(z), image, rtol=0, atol=1e-5 * image.abs().max().item())
    assert 0 < encoder_layers < len(cut), "in both halves layers were cut"


@torch.no_grad()
@pytest.mark.parametrize("H, W", [(12, 16), (13, 18)])
def test_winograd(H, W):
    """3x3 convolutions with a quarter of the multiplications."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, H, W), torch.randn(6, 8, 3, 3) / 9, torch.randn(6)
    torch.testing.assert_close(winograd.conv3x3(x, weight, bias), F.conv2d(x, weight, bias, padding=1), rtol=0, atol=5e-5)
