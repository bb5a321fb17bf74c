"""Stable Diffusion's autoencoder and VOSR's light decoder.    python -m pytest tests/test_vae.py"""

import json
from pathlib import Path

import pytest
import torch

from models.vae import SD_VAE_SCALE, VAE, LightDecoder, VAEConfig

MANIFESTS = Path(__file__).resolve().parents[2] / "shared" / "manifests"
TINY = VAEConfig(widths=(32, 64), layers_per_block=1)  # two levels: a factor of 2


def tiny(seed=0):
    torch.manual_seed(seed)
    return VAE(TINY).eval()


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
