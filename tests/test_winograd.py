"""The fast 3x3 convolution is a convolution, and is used where it pays.    python -m pytest tests/test_winograd.py"""

import pytest
import torch
import torch.nn.functional as F

from models.support import winograd
from models.lora import Conv2d
from models.qwen_vae import Conv
from models.vae import Upsample
from models.support.winograd import conv3x3, conv3x3_pays


def parts(B, C, K, H, W):
    torch.manual_seed(0)
    return torch.randn(B, C, H, W), torch.randn(K, C, 3, 3) / (3 * C**0.5), torch.randn(K)


def bound(expected, channels):
    """How far float32 may round: a sum of n numbers by about eps sqrt(n) of its size, the transforms take one digit more."""
    return 10 * torch.finfo(torch.float32).eps * (9 * channels) ** 0.5 * expected.abs().max()


@pytest.mark.parametrize("at_once", [1, 20_000, 2**22])     # a row of tiles at a time, some, all
@pytest.mark.parametrize("B, C, K, H, W", [(1, 8, 8, 12, 16), (2, 5, 7, 13, 18), (1, 3, 4, 1, 1), (3, 4, 2, 7, 5), (1, 16, 8, 3, 33),
                                           (1, 512, 256, 20, 24)])
def test_it_is_the_convolution(B, C, K, H, W, at_once, monkeypatch):
    monkeypatch.setattr(winograd, "AT_ONCE", at_once)
    x, weight, bias = parts(B, C, K, H, W)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert (conv3x3(x, weight, bias) - expected).abs().max() < bound(expected, C)
    coarse = F.conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), padding=1)
    assert (coarse - expected).abs().max() > 10 * bound(expected, C), "the bound would notice fewer digits"


@torch.no_grad()
def test_where_it_pays():
    x, weight = torch.randn(1, 128, 64, 64), torch.randn(128, 128, 3, 3)
    assert conv3x3_pays(x, weight)
    assert not conv3x3_pays(x[..., :16, :16], weight)
    assert not conv3x3_pays(x, weight[:64]) and not conv3x3_pays(x[:, :64], weight[:, :64])
    assert not conv3x3_pays(x.bfloat16(), weight.bfloat16())
    assert not conv3x3_pays(x, weight[..., :1, :1])
    assert not conv3x3_pays(x.to("meta"), weight)
    with torch.enable_grad():
        assert not conv3x3_pays(x, weight)


@pytest.mark.parametrize("make", [lambda: Conv2d(128, 128, 3, padding=1), lambda: Conv(128, 128), lambda: Upsample(128)])
def test_layers_take_it(make, monkeypatch):
    torch.manual_seed(0)
    layer, x, calls = make(), torch.randn(1, 128, 48, 48), []
    expected = layer(x)             # with gradients: torch's own
    monkeypatch.setattr(winograd, "conv3x3", lambda *args: calls.append(1) or conv3x3(*args))
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-4)
    assert calls


@torch.no_grad()
def test_other_layers_do_not(monkeypatch):
    monkeypatch.setattr(winograd, "conv3x3", None)
    x = torch.randn(1, 128, 64, 64)
    for layer in (Conv2d(128, 128, 3, stride=2, padding=1), Conv2d(128, 128, 3, stride=2), Conv2d(128, 128, 1), Conv(128, 128, 1)):
        layer(x)
