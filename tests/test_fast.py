"""Every fast way equals what it stands in for. Run: python -m pytest tests/test_fast.py

Each function below builds one case: -> the plain result, and the fast one, which must agree.
"""

from unittest import mock

import pytest
import test_gramsr
import torch
import torch.nn.functional as F
from test_lora import KINDS, make as make_layer
from test_vosr import inputs, make, make_dit

from models.flow import guided
from models.gramsr import SETS
from models.lora import Conv2d, Linear, add_lora
from models.qwen_vae import QwenVAE, QwenVAEConfig
from models.support import fast_lora, gpu, strips, winograd
from models.support.precision import in_half
from models.support.tokens import FixedTokens
from models.unet import UNet
from models.vae import VAE, VAEConfig


def fixed_tokens():
    """Keys and values kept for several times, under guidance and without."""
    (z_t, z_lq, feat), dit = inputs(), make_dit()
    fixed, times, strengths = FixedTokens(dit), (1.0, 0.6, 0.2), (1.0, 0.5, 0.0)
    plain = [guided(dit, z_t, z_lq, feat, t, 0, g) for t, g in zip(times, strengths)]
    fast = []
    for t, g in zip(times, strengths):
        fast.append(guided(fixed.dit_with(feat), z_t, z_lq, feat, t, 0, g))
    return torch.stack(plain), torch.stack(fast)


def fixed_tokens_of_others():
    """Tokens that change from call to call, as tiles do, and come again."""
    (z_t, z_lq, feat), dit = inputs(4), make_dit()
    fixed, parts = FixedTokens(dit), [slice(0, 2), slice(2, 4), slice(0, 2), slice(3, 4), slice(3, 4)]
    plain = [guided(dit, z_t[n], z_lq[n], feat[n], 0.7, 0, 0.3) for n in parts]
    fast = []
    for n in parts:
        fast.append(guided(fixed.dit_with(feat[n]), z_t[n], z_lq[n], feat[n], 0.7, 0, 0.3))
    return torch.cat(plain), torch.cat(fast)


def fixed_tokens_of_a_preconditioned_transformer():
    (z_t, z_lq, feat), dit = inputs(), make().dit
    fast = guided(FixedTokens(dit).dit_with(feat), z_t, z_lq, feat, 0.4, 0, 0.5)
    return guided(dit, z_t, z_lq, feat, 0.4, 0, 0.5), fast


@torch.enable_grad()
def with_gradients(function, *args):
    """What training computes: the plain way."""
    return function(*args).detach()


def folded_adapters():
    """Adapters folded into the weight, as far as C turns them on."""
    plain, fast = [], []
    for kind in KINDS:
        layer, x = make_layer(kind, names=("a", "b"))
        for C in ({"a": 1}, {"a": 1, "b": torch.randn(1, 3, 3)}, {"b": torch.randn(1, 3, 3), "other": 1}):
            plain.append(with_gradients(layer, x, C).flatten())
            fast.append(layer(x, C).flatten())
    return torch.cat(plain), torch.cat(fast)


def merged_sets():
    """GramSR's sets folded into the weights for good."""
    model = test_gramsr.make()
    z, context = test_gramsr.inputs(model, 2)
    plain = with_gradients(model.residual, z, context, *SETS)
    model.merge()
    return plain, model.predict(z, context)


def winograd_convolution():
    torch.manual_seed(0)
    layer, x = Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 48, 48)
    return with_gradients(layer, x), layer(x)


def tuned_for_a_gpu():
    """An autoencoder's and a UNet's norms, casts and layouts, small maps by PyTorch's norm and all by ours."""
    torch.manual_seed(0)
    vae, unet = VAE(VAEConfig(widths=(32, 32, 64), layers_per_block=1)), UNet(test_gramsr.make().unet.cfg)
    add_lora(vae, ["conv1", "conv2", "to_q"], "a", 4), add_lora(unet, ["conv1", "to_q", "proj_in"], "a", 4)
    for name, p in [*vae.named_parameters(), *unet.named_parameters()]:
        if "lora_B" in name or "norm" in name:
            p.data.normal_(0.5, 0.1)
    x, z, context = torch.rand(2, 3, 32, 24), torch.randn(2, 4, 16, 24), torch.randn(2, 5, unet.cfg.context_dim)
    C = {"a": torch.randn(1, len(unet.blocks), 4, 4)}

    def results():
        return [vae.encode(x, adapters={"a": C["a"][:, : vae.blocks]}).flatten(), vae.decode(z).flatten(), unet(z, 3, context, C).flatten()]

    plain = results()
    gpu.tune(torch.nn.ModuleDict({"vae": vae, "unet": unet}))
    small = results()
    with mock.patch.object(gpu, "LARGE", 0):
        large = results()
    return torch.cat(plain + plain), torch.cat(small + large)


FAST = [tuned_for_a_gpu, fixed_tokens, fixed_tokens_of_others, fixed_tokens_of_a_preconditioned_transformer, folded_adapters, merged_sets,
        winograd_convolution]


@torch.no_grad()
@pytest.mark.parametrize("way", FAST, ids=lambda way: way.__name__)
def test_fast_equals_plain(way):
    plain, fast = way()
    assert plain.std() > 0.01
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_fixed_tokens_are_looked_up_once_and_leave_no_trace():
    (z_t, z_lq, feat), dit, looked_up = inputs(), make_dit(), []
    for block in dit.blocks:
        block.cross_attn.k_linear.register_forward_hook(lambda *_: looked_up.append(1))
    names, fixed = list(dit.state_dict()), FixedTokens(dit)
    for t in (1.0, 0.5, 0.2):
        guided(fixed.dit_with(feat), z_t, z_lq, feat, t, 0, 0.5)
    assert len(looked_up) == len(dit.blocks) and list(dit.state_dict()) == names
    with pytest.raises(RuntimeError):
        fixed.dit_with(feat)(z_t, z_lq[..., 1:], feat, torch.ones(2))   # another size: also after an error
    assert list(dit.state_dict()) == names


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_folded_where_it_pays(kind, monkeypatch):
    """For this call only: the base weight keeps its bits."""
    folds, original = [], fast_lora.fold
    monkeypatch.setattr(fast_lora, "fold", lambda *args: folds.append(1) or original(*args))
    layer, x = make_layer(kind)
    before, C = {k: v.clone() for k, v in layer.state_dict().items()}, {"default": torch.randn(1, 3, 3)}
    layer(x, {"default": 1}), layer(x, C)
    assert len(folds) == 2
    layer(x), layer(x, {"other": 1}), layer(x, {"default": torch.randn(2, 3, 3)}), with_gradients(layer, x, C)
    assert len(folds) == 2, "nothing to fold, a matrix for each image, gradients"
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@torch.no_grad()
def test_folding_pays_where_the_weight_is_small_beside_the_image():
    """A matrix as large as the weight for a single pixel would cost more than the two narrow ones."""
    linear, conv, C = Linear(64, 64), Conv2d(64, 64, 3, padding=1), {"default": 1}
    linear.add_adapter("default", 4), conv.add_adapter("default", 4)
    assert not fast_lora.folding_pays(linear, torch.zeros(1, 1, 64), C)
    assert fast_lora.folding_pays(linear, torch.zeros(1, 100, 64), C)
    assert not fast_lora.folding_pays(conv, torch.zeros(1, 64, 4, 8), C)
    assert fast_lora.folding_pays(conv, torch.zeros(1, 64, 8, 8), C)
    strided = Conv2d(3, 4, 3, stride=2, padding=1)
    assert fast_lora.positions(strided, torch.zeros(2, 3, 9, 6)) == 2 * 5 * 3 and fast_lora.positions(linear, torch.zeros(2, 7, 64)) == 14


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tuned_in_half(monkeypatch, dtype):
    """In half the tuned way is as close to float32 as the plain one; streams, and what leaves a network, are float32."""
    monkeypatch.setattr(gpu, "LARGE", 0)
    torch.manual_seed(0)
    vae, x = VAE(VAEConfig(widths=(32, 32, 64), layers_per_block=1)), torch.rand(1, 3, 64, 48)
    exact = vae.decode(vae.encode(x))
    in_half(vae, dtype)
    error = (vae.decode(vae.encode(x)) - exact).std()
    gpu.tune(torch.nn.ModuleDict({"vae": vae}))
    tuned = vae.decode(vae.encode(x))
    assert tuned.dtype == torch.float32 and (tuned - exact).std() < 1.5 * error


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_of_norms(dtype):
    """Also where the mean is large beside the deviation, and in both layouts."""
    torch.manual_seed(0)
    x = (20 + torch.randn(2, 8, 23, 10) + torch.arange(8.0).view(-1, 1, 1)).to(dtype)
    groups = x.double().view(2, 4, -1)
    for layout in (torch.contiguous_format, torch.channels_last):
        mean, variance = gpu.statistics(x.to(memory_format=layout), 4)
        torch.testing.assert_close(mean[..., 0].double(), groups.mean(-1), rtol=1e-5, atol=0)
        torch.testing.assert_close(variance[..., 0].double(), groups.var(-1, correction=0), rtol=1e-3, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("H, W", [(12, 16), (13, 18)])
def test_winograd(H, W):
    """3x3 convolutions with a quarter of the multiplications."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, H, W), torch.randn(6, 8, 3, 3) / 9, torch.randn(6)
    torch.testing.assert_close(winograd.conv3x3(x, weight, bias), F.conv2d(x, weight, bias, padding=1), rtol=0, atol=5e-5)
