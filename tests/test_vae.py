"""Stable Diffusion's autoencoder and VOSR's light decoder.    python -m pytest tests/test_vae.py"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.support import strips
from models.vae import SD_VAE_SCALE, VAE, Attention, Downsample, LightDecoder, ResnetBlock, Upsample, VAEConfig

MANIFESTS = Path(__file__).resolve().parents[2] / "shared" / "manifests"
TINY = VAEConfig(widths=(32, 64), layers_per_block=1)  # two levels: a factor of 2


def random_norms(model):
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.1)
    return model.eval()


def tiny(seed=0, config=TINY):
    torch.manual_seed(seed)
    return random_norms(VAE(config))


@pytest.mark.parametrize("name, make", [("sd_vae", VAE), ("sd21_lwdecoder", LightDecoder)])
def test_keys_and_shapes_are_the_public_ones(name, make):
    path = MANIFESTS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    with torch.device("meta"):
        ours = {key: list(tensor.shape) for key, tensor in make().state_dict().items()}
    assert ours == json.loads(path.read_text())["tensors"]


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_attention_names_load_to_the_same_function(as_convolution):
    vae, other = tiny(0), tiny(1)
    old = {}
    for key, tensor in vae.state_dict().items():
        for new_name, old_name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f"attentions.0.{new_name}." in key:
                key = key.replace(new_name, old_name)
                tensor = tensor[:, :, None, None] if as_convolution and tensor.ndim == 2 else tensor
        old[key] = tensor
    assert set(old) != set(vae.state_dict())
    before = set(old)
    other.load_state_dict(old)  # strict
    assert set(old) == before, "the caller's dict is untouched"
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(other.encode(x), vae.encode(x)) and torch.equal(other.decode(vae.encode(x)), vae.decode(vae.encode(x)))


def test_wrong_keys_are_refused():
    state = tiny().state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        tiny().load_state_dict({k: v for k, v in state.items() if "to_q" not in k})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        tiny().load_state_dict({**state, "encoder.mid_block.attentions.0.to_x.weight": torch.zeros(1)})


@torch.no_grad()
def test_shapes_scale_and_range():
    vae, x = tiny(), torch.rand(2, 3, 12, 20) * 2 - 1
    mean, std = vae.moments(x)
    assert mean.shape == std.shape == (2, 4, 6, 10) and (std > 0).all()
    z = vae.encode(x)
    assert torch.equal(z, mean * SD_VAE_SCALE) and vae.decode(z).shape == x.shape
    assert vae.encode(x[..., :11, :19]).shape == (2, 4, 5, 9)  # an odd rest is dropped
    half = vae.to(torch.bfloat16)
    assert half.decode(half.encode(x.bfloat16())).dtype == torch.bfloat16


@torch.no_grad()
def test_mode_and_sample():
    vae, x = tiny(), torch.rand(1, 3, 12, 20)
    mean, std = vae.moments(x)

    def draw(seed):
        return vae.encode(x, torch.Generator().manual_seed(seed))

    assert torch.equal(vae.encode(x), vae.encode(x)) and torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(draw(3), (mean + std * noise) * SD_VAE_SCALE)
    vae.quant_conv.bias[4:] = 1000  # log-variance is clamped before exp
    assert vae.moments(x)[1].max() == pytest.approx(torch.tensor(10.0).exp().item())


@torch.no_grad()
def test_light_decoder():
    decoder = LightDecoder(in_channels=4, out_channels=3, block_out_channels=[32, 64], layers_per_block=1).eval()
    z = torch.randn(1, 4, 5, 6)
    assert decoder.decode(z).shape == (1, 3, 10, 12)
    assert torch.equal(decoder.decode(z), decoder(z / SD_VAE_SCALE))


@pytest.fixture
def one_thread():
    """For thousands of tiny operations: threads that wait for each other take minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.parametrize("limit", [0, 50, 300])
@pytest.mark.parametrize("h, w", [(1, 23), (13, 1), (5, 7), (8, 5)])
def test_strips_equal_whole(monkeypatch, one_thread, limit, h, w):
    vae = tiny(config=VAEConfig(widths=(32, 64, 64), layers_per_block=1))
    light = random_norms(LightDecoder(block_out_channels=[32, 64, 64], layers_per_block=1))
    x, z = torch.rand(2, 3, 4 * h + 3, 4 * w + 1) * 2 - 1, torch.randn(2, 4, h, w)
    expected = vae.encode(x), vae.decode(z), light.decode(z)
    monkeypatch.setattr(strips, "LIMIT", limit)
    monkeypatch.setattr(strips, "QUERIES", 4)
    x_before, z_before = x.clone(), z.clone()
    for ours, whole in zip((vae.encode(x), vae.decode(z), light.decode(z)), expected):
        assert ours.shape == whole.shape
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5 * whole.abs().max().item())
    assert torch.equal(x, x_before) and torch.equal(z, z_before)


@torch.no_grad()
def test_layers_are_their_formulas():
    x = torch.randn(2, 32, 12, 10)
    for c_out in (32, 64):
        block = random_norms(ResnetBlock(32, c_out, 32))
        h = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
        assert torch.equal(block(x), (block.conv_shortcut(x) if c_out > 32 else x) + h)
    attention = random_norms(Attention(32, 32))
    tokens = attention.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)
    h = attention.to_out[0](F.scaled_dot_product_attention(attention.to_q(tokens), attention.to_k(tokens), attention.to_v(tokens)))
    assert torch.equal(attention(x), x + h.squeeze(1).transpose(1, 2).reshape(x.shape))
    down = Downsample(32)
    assert torch.equal(down(x), down.conv(F.pad(x, (0, 1, 0, 1))))


def test_gradients_do_not_depend_on_strips(monkeypatch):
    def gradients():
        vae = tiny()
        vae.decode(vae.encode(torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0)))).square().sum().backward()
        return [p.grad for p in vae.parameters()]

    expected = gradients()
    monkeypatch.setattr(strips, "LIMIT", 0)
    assert all(map(torch.equal, gradients(), expected))


@torch.no_grad()
@pytest.mark.parametrize("limit", [0, 512 * 512])
def test_half_a_model(monkeypatch, limit):
    """VOSR decodes with its own decoder and deletes this one."""
    monkeypatch.setattr(strips, "LIMIT", limit)
    vae, x = tiny(), torch.rand(1, 3, 12, 20)
    expected = vae.encode(x)
    del vae.decoder, vae.post_quant_conv
    assert torch.equal(vae.encode(x), expected)


def test_every_parameter_learns():
    vae = tiny()
    vae.decode(vae.encode(torch.rand(1, 3, 16, 16), torch.Generator().manual_seed(0))).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


@torch.no_grad()
def test_equals_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is a reference for this test only")
    kinds = [[f"{kind}Block2D"] * 2 for kind in ("DownEncoder", "UpDecoder")]
    reference = diffusers.AutoencoderKL(down_block_types=kinds[0], up_block_types=kinds[1], block_out_channels=TINY.widths,
                                        layers_per_block=TINY.layers_per_block, latent_channels=4).eval()  # fmt: skip
    vae = tiny()
    vae.load_state_dict(reference.state_dict())
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    posterior = reference.encode(x).latent_dist
    assert torch.allclose(vae.moments(x)[0], posterior.mean, atol=1e-5) and torch.allclose(vae.moments(x)[1], posterior.std, atol=1e-5)
    assert torch.allclose(vae.decode(vae.encode(x)), reference.decode(posterior.mode()).sample, atol=1e-5)
