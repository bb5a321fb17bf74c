"""Qwen-Image's autoencoder for single pictures.    python -m pytest tests/test_qwen_vae.py"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.support import strips
from models.qwen_vae import LATENTS_MEAN, LATENTS_STD, QwenVAE, QwenVAEConfig, Downsample, Upsample

MANIFEST = Path(__file__).resolve().parents[2] / "shared" / "manifests" / "qwen_image_vae_2d.json"
TINY = QwenVAEConfig(base_dim=8, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, latents_mean=LATENTS_MEAN[:4], latents_std=LATENTS_STD[:4])


def tiny(seed=0):
    """A small model, three levels, whose gains are random too."""
    torch.manual_seed(seed)
    vae = QwenVAE(TINY).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter, 1, 0.1)
    return vae


def video_form(state_dict):
    """The picture's file as a video file: junk where the first frame does not look, and gains and convolutions with a time axis."""
    video = {}
    for key, tensor in state_dict.items():
        if key.endswith("gamma") and "attentions" not in key:
            tensor = tensor.unsqueeze(-1)
        elif key.endswith("weight") and not any(part in key for part in ("resample", "to_qkv", "proj")):  # these are 4-D there too
            tensor = torch.stack([torch.randn_like(tensor)] * (tensor.shape[-1] - 1) + [tensor], dim=2)  # 1x1 has one slice, 3x3 three
        video[key] = tensor
        if key.endswith("resample.1.bias"):
            prefix, C = key.removesuffix("resample.1.bias"), len(tensor)
            video |= {f"{prefix}time_conv.weight": torch.randn(C, C, 3, 1, 1), f"{prefix}time_conv.bias": torch.randn(C)}
    return video


def test_keys_and_shapes_are_the_public_ones():
    if not MANIFEST.exists():
        pytest.skip(f"{MANIFEST} is not at hand")
    with torch.device("meta"):
        ours = {key: list(tensor.shape) for key, tensor in QwenVAE().state_dict().items()}
    assert ours == json.loads(MANIFEST.read_text())["tensors"]


def test_video_file_loads_to_the_same_function():
    vae, other = tiny(0), tiny(1)
    video = video_form(vae.state_dict())
    shapes = {key: tensor.shape for key, tensor in video.items()}
    assert shapes["encoder.conv_in.weight"] == (8, 3, 3, 3, 3) and shapes["quant_conv.weight"] == (8, 8, 1, 1, 1)
    assert shapes["encoder.norm_out.gamma"] == (16, 1, 1, 1) and sum("time_conv" in key for key in shapes) == 8
    other.load_state_dict(video)  # strict
    assert {key: tensor.shape for key, tensor in video.items()} == shapes, "the caller's dict is untouched"
    assert all(torch.equal(tensor, vae.state_dict()[key]) for key, tensor in other.state_dict().items())
    outer = torch.nn.ModuleDict({"vae": tiny(2)})  # inside a system the names have a prefix
    outer.load_state_dict({f"vae.{key}": tensor for key, tensor in video.items()})
    x = torch.rand(1, 3, 16, 12)
    with torch.no_grad():
        assert torch.equal(other.encode(x), vae.encode(x)) and torch.equal(outer["vae"].decode(vae.encode(x)), vae.decode(vae.encode(x)))


@pytest.mark.parametrize("form", [dict, video_form])
def test_wrong_keys_are_refused(form):
    state = form(tiny().state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        tiny().load_state_dict({k: v for k, v in state.items() if "to_qkv" not in k})
    for key in ("decoder.up_blocks.0.resnets.0.conv3.weight", "encoder.down_blocks.0.time_conv.weight", "time_conv.bias"):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            tiny().load_state_dict({**state, key: torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for encoder.conv_in.weight"):
        tiny().load_state_dict({**state, "encoder.conv_in.weight": torch.zeros(8, 4, 3, 3, 3)})


@torch.no_grad()
def test_shapes_and_scale():
    vae, x = tiny(), torch.rand(2, 3, 12, 20) * 2 - 1
    assert vae.factor == 4 and QwenVAEConfig().z_dim == 16
    mean, std = vae.moments(x)
    assert mean.shape == std.shape == (2, 4, 3, 5) and (std > 0).all()
    z = vae.encode(x)
    for c in range(4):
        assert torch.allclose(z[:, c], (mean[:, c] - LATENTS_MEAN[c]) / LATENTS_STD[c])
    assert torch.allclose(vae.decode(z), vae.decoder(vae.post_quant_conv(mean)), atol=1e-5) and vae.decode(z).shape == x.shape
    assert vae.encode(x[..., :11, :19]).shape == (2, 4, 2, 4)  # an odd rest is dropped
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
    scale = torch.tensor(LATENTS_STD[:4]).view(4, 1, 1)
    assert torch.allclose(draw(3) - vae.encode(x), std * noise / scale, atol=1e-5)
    vae.quant_conv.bias[4:] = 1000  # log-variance is clamped before exp
    assert vae.moments(x)[1].max() == pytest.approx(torch.tensor(10.0).exp().item())


def test_norm_of_nothing_and_of_much():
    norm = tiny().encoder.norm_out.half()
    x = torch.zeros(1, 16, 1, 2, dtype=torch.half)
    x[..., 1] = 3e4  # its square is beyond float16
    assert norm(x)[..., 0].eq(0).all() and torch.allclose(norm(x)[0, :, 0, 1], norm.gamma[:, 0, 0], rtol=1e-2)


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
    vae, x, z = tiny(), torch.rand(2, 3, 4 * h + 3, 4 * w + 1) * 2 - 1, torch.randn(2, 4, h, w)
    expected = vae.encode(x), vae.decode(z)
    monkeypatch.setattr(strips, "LIMIT", limit)
    monkeypatch.setattr(strips, "QUERIES", 4)
    x_before, z_before = x.clone(), z.clone()
    for ours, whole in zip((vae.encode(x), vae.decode(z)), expected):
        assert ours.shape == whole.shape
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5 * whole.abs().max().item())
    assert torch.equal(x, x_before) and torch.equal(z, z_before)


@torch.no_grad()
def test_layers_are_their_formulas():
    vae = tiny()
    for block, x in ((vae.encoder.down_blocks[0], torch.randn(2, 8, 12, 10)), (vae.encoder.down_blocks[2], torch.randn(2, 8, 12, 10))):
        h = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
        assert torch.equal(block(x), h + (block.conv_shortcut(x) if block.conv_shortcut else x))
    attention, x = vae.encoder.mid_block.attentions[0], torch.randn(2, 16, 12, 10)
    q, k, v = attention.to_qkv(attention.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
    h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
    assert torch.equal(attention(x), x + attention.proj(h))
    for step in (Downsample(16), Upsample(16)):
        assert torch.equal(step(x), step.resample(x))


def test_gradients_do_not_depend_on_strips(monkeypatch):
    def gradients():
        vae = tiny()
        vae.decode(vae.encode(torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0)))).square().sum().backward()
        return [p.grad for p in vae.parameters()]

    expected = gradients()
    monkeypatch.setattr(strips, "LIMIT", 0)
    assert all(map(torch.equal, gradients(), expected))


def test_constants_must_fit_the_channels():
    with pytest.raises(ValueError, match="8 latent channels, but 16 means and 16 deviations"):
        QwenVAE(QwenVAEConfig(base_dim=8, z_dim=8))


def test_every_parameter_learns():
    vae = tiny()
    vae.decode(vae.encode(torch.rand(1, 3, 16, 16), torch.Generator().manual_seed(0))).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


@torch.no_grad()
def test_equals_diffusers():
    """The original video class on one frame, its weights loaded as they are."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is a reference for this test only")
    torch.manual_seed(0)
    reference = diffusers.AutoencoderKLQwenImage(**{**vars(TINY), "dim_mult": [1, 2, 2]}, temperal_downsample=[False, True]).eval()
    vae = tiny(1)
    vae.load_state_dict(reference.state_dict())
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    posterior = reference.encode(x[:, :, None]).latent_dist
    mean, std = vae.moments(x)
    assert torch.allclose(mean, posterior.mean[:, :, 0], atol=1e-5) and torch.allclose(std, posterior.std[:, :, 0], atol=1e-5)
    assert torch.allclose(vae.decode(vae.encode(x)).clamp(-1, 1), reference.decode(posterior.mode()).sample[:, :, 0], atol=1e-5)
