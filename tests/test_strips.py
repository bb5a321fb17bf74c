"""Strips equal the whole, in less memory.    python -m pytest tests/test_strips.py"""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import qwen_vae
from models.qwen_vae import QwenVAE, QwenVAEConfig
from models.support import strips
from models.support.strips import InStrips, attention, in_strips, limit, needed, norm_of_strips, norm_silu_conv, statistics
from models.vae import VAE, Downsample, ResnetBlock, Upsample, VAEConfig

CONV = nn.Conv2d(4, 4, 3, padding=1)
UP = nn.Sequential(nn.Upsample(scale_factor=2), CONV)
DOWN = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 6, 3, stride=2))


class Meter(TorchDispatchMode):
    """`peak`: bytes of all that was in memory at one time, of what operations made or had in hand."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def watched(f):
    """f, and the list of heights of what it is given."""
    heights = []

    def g(*maps):
        heights.append(maps[0].shape[2])
        return f(*maps)

    return g, heights


@pytest.fixture(autouse=True)
def one_thread():
    """For thousands of tiny operations: threads that wait for each other take minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SIZES = [(2, 401), (401, 2), (37, 20), (24, 31)]


@torch.no_grad()
@pytest.mark.parametrize("limit", [0, 100, 333])
@pytest.mark.parametrize("f, rate, H, W", [*((CONV, 1, *size) for size in [(1, 800), (801, 1), *SIZES]),
                                           *((UP, 2, *size) for size in [(1, 800), (401, 1), *SIZES]),
                                           *((DOWN, 0.5, *size) for size in SIZES)])  # fmt: skip
def test_strips_equal_whole(monkeypatch, limit, f, rate, H, W):
    monkeypatch.setattr(strips, "LIMIT", limit)
    x = torch.randn(2, 4, H, W)
    given = x.clone()
    g, heights = watched(f)
    torch.testing.assert_close(in_strips(g, x, rate=rate), f(x), rtol=0, atol=1e-5)
    assert torch.equal(x, given), "its input is untouched"
    assert sum(heights) >= H - H % 2
    if H > 2:
        assert len(heights) > 1 and max(heights) * W <= max(limit / 4, W / min(rate, 1)) + 4 * W  # a strip, and a halo of two rows at most


@torch.no_grad()
def test_written_where_it_was_read(monkeypatch):
    monkeypatch.setattr(strips, "LIMIT", 40)
    h, x = torch.randn(2, 2, 4, 13, 6)
    expected = CONV(h) + F.avg_pool2d(x, 3, 1, 1)
    out = in_strips(lambda h, x: CONV(h) + F.avg_pool2d(x, 3, 1, 1), h, x, into=h)
    assert out is h
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_small_maps_are_not_cut():
    """Of 512x512 images none is, however many there are; where a step enlarges, the result counts."""
    assert limit(cuda=False) == 512 * 512 and limit(cuda=True) == 1024 * 1024
    for shape, rate, cut in [((1, 1, 512, 512), 1, False), ((8, 64, 256, 256), 1, False), ((1, 1, 512, 513), 1, True), ((1, 1, 256, 256), 2, False),
                             ((1, 1, 256, 257), 2, True), ((1, 1, 512, 512), 0.5, False), ((1, 1, 512, 513), 0.5, True)]:  # fmt: skip
        x = torch.zeros(1).expand(shape)
        assert needed(x, rate) == cut
        layer, heights = watched(lambda x: torch.zeros(1, 1, int(x.shape[2] * rate), 1))
        layer.rate = rate
        InStrips().run(layer, x)
        assert (len(heights) > 1) == cut and (cut or heights == [shape[2]])


def test_gradients_take_the_plain_path(monkeypatch):
    monkeypatch.setattr(strips, "LIMIT", 0)
    block, x = ResnetBlock(32, 32, 4), torch.randn(1, 32, 9, 5)
    given = x.clone()
    assert not needed(x) and torch.equal(InStrips().run(block, x), block(x)) and torch.equal(x, given)
    with torch.no_grad():
        assert needed(x) and torch.allclose(InStrips().run(block, x), block(x), atol=1e-5) and torch.equal(x, given)


@pytest.mark.parametrize("limit", [0, 60, 200])
def test_statistics_far_from_zero(monkeypatch, limit):
    """A mean a thousand times the deviation, rows of different brightness, and values whose squares float16 cannot hold."""
    monkeypatch.setattr(strips, "LIMIT", limit)
    x = 1000 + torch.randn(2, 8, 23, 10) + torch.linspace(-3, 3, 23).view(-1, 1)
    for x in (x, x.half()):
        groups = x.double().view(2, 4, -1)
        mean, variance = statistics(x, 4)
        assert mean.dtype == variance.dtype == torch.float32
        assert torch.allclose(mean.double(), groups.mean(-1), rtol=1e-6)
        assert torch.allclose(variance.double(), groups.var(-1, correction=0), rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_group_norm_of_the_whole(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(strips, "LIMIT", 60)
    norm = nn.GroupNorm(4, 8, eps=0.1)  # an epsilon that shows
    norm.weight.normal_(1), norm.bias.normal_()
    norm, x = norm.to(dtype), torch.randn(2, 8, 23, 10).add(torch.linspace(-3, 3, 23).view(-1, 1)).to(dtype)
    out = in_strips(norm_of_strips(norm, x), x)
    assert out.dtype == dtype
    expected = F.group_norm(x.float(), 4, norm.weight.float(), norm.bias.float(), 0.1)
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    assert (norm_of_strips(norm, x[:, :, :12])(x[:, :, :12]) - expected[:, :, :12]).abs().max() > 0.1  # what tiles would do


@torch.no_grad()
def test_attention_by_queries(monkeypatch):
    q, k, v = torch.randn(2, 600, 3 * 16).transpose(1, 2).reshape(3, 2, 16, 600).transpose(2, 3)  # as from a convolution: no contiguous rows
    whole = F.scaled_dot_product_attention(*(x.unsqueeze(1) for x in (q, k, v))).squeeze(1)
    assert torch.equal(attention(q, k, v), whole)

    def pairs():
        with Meter() as meter, sdpa_kernel(SDPBackend.MATH):
            torch.testing.assert_close(attention(q, k, v), whole, rtol=0, atol=1e-5)
        return meter.peak / (2 * 600 * 600 * 4)

    assert pairs() > 1
    monkeypatch.setattr(strips, "QUERIES", 64)
    assert pairs() < 0.5
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # which refuses what is not contiguous
        torch.testing.assert_close(attention(q, k, v), whole, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("net", [VAE, QwenVAE])
@pytest.mark.parametrize("half", ["encode", "decode"])
def test_two_maps_at_a_time(monkeypatch, net, half):
    """A whole model, in units of one map of full size, even where attention builds the matrix of all pairs."""
    model = net({VAE: VAEConfig(widths=(32, 32, 64)), QwenVAE: QwenVAEConfig(base_dim=32, dim_mult=(1, 2, 2))}[net])
    x = torch.rand(1, 3, 128, 128) if half == "encode" else torch.randn(1, 4 if net is VAE else 16, 32, 32)

    def maps():
        with Meter() as meter, sdpa_kernel(SDPBackend.MATH):
            getattr(model, half)(x)
        return meter.peak / (32 * 128 * 128 * 4)

    assert maps() > 3.5
    monkeypatch.setattr(strips, "LIMIT", 32 * 32)
    monkeypatch.setattr(strips, "QUERIES", 64)
    assert 2 <= maps() < 2.4


LAYERS = {"resnet": ResnetBlock(32, 32, 32), "shortcut": ResnetBlock(64, 32, 32), "down": Downsample(32), "up": Upsample(32),
          "qwen_resnet": qwen_vae.ResnetBlock(32, 32), "qwen_shortcut": qwen_vae.ResnetBlock(64, 32),
          "qwen_down": qwen_vae.Downsample(32), "qwen_up": qwen_vae.Upsample(32)}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_reads_and_what_it_writes(monkeypatch, name):
    """No more than these two is in memory, and the first is left as it was: a caller may want it again."""
    layer, x = LAYERS[name], torch.randn(1, 64 if "shortcut" in name else 32, 128, 128)
    expected, before = layer(x), x.clone()

    def excess():
        with Meter() as meter:
            out = InStrips().run(layer, x[:])  # an operation, so that x counts
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        return (meter.peak - x.nbytes - out.nbytes) / max(x.nbytes, out.nbytes)

    assert excess() > 0.9
    monkeypatch.setattr(strips, "LIMIT", 32 * 32)
    assert 0 < excess() < 0.3 and torch.equal(x, before)


@torch.no_grad()
def test_a_float32_stream_is_not_written_into_half(monkeypatch):
    """Strips give a stream the type that whole maps give it."""
    h, x = torch.randn(1, 4, 12, 10).half(), torch.randn(1, 4, 12, 10)
    monkeypatch.setattr(strips, "LIMIT", 40)
    cut = in_strips(lambda h, x: h + x, h, x, into=h)
    assert cut.dtype == torch.float32 and torch.equal(cut, h + x)
