"""Parts of the tiny systems; and the embedded ones on the example: better than bicubic, every knob as its paper says.

Run: python -m pytest tests/test_tiny.py
"""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from models.dit import DiT, DiTConfig, SwiGLU
from models.gram import features, loss_gram
from models.support.imaging import read_picture, resize
from models.support.metrics import psnr_y
from models.support.weights import EMBEDDED, PRIOR, read_config
from models.tiny import ConvSwiGLU, TinyDiT, TinyGramSR, TinyVAE, TinyVAEConfig, TinyVOSR, TinyVOSRConfig
from models.tiny_losses import RandomLPIPS
from models.vit import ViTConfig
from sample import find_system

ROOT = Path(__file__).resolve().parents[1]
MOST = {"vosr-tiny": 24e6, "s3diff-tiny": 8e6, "gramsr-tiny": 8e6}      # bytes


SMALL_DIT = DiTConfig(input_size=4, patch_size=1, in_channels=8, out_channels=4, hidden_size=32, depth=2, num_heads=2,
                      z_dims=8, rope_rescale=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -----------------------------------------------------------------------------
# parts


def test_sharing_weights_makes_a_lapped_transform():
    """Orthonormal filters, here the Walsh functions of a cell, give back every image that they span; gain is undone."""
    vae = TinyVAE(TinyVAEConfig(latent_channels=3))
    vae.encoder.weight.data.zero_()
    for color in range(3):          # the mean of a cell, in each colour
        vae.encoder.weight.data[color, color, 4:12, 4:12] = 1 / 8
    vae.std.copy_(torch.tensor([4.0, 1.0, 0.25]))
    x = torch.rand(2, 3, 4, 5, generator=generator()).repeat_interleave(8, 2).repeat_interleave(8, 3)
    z = vae.encode(x)
    assert z.shape == (2, 3, 4, 5)
    torch.testing.assert_close(z, 8 * x[..., ::8, ::8] * 2 / torch.tensor([2, 1, 0.5]).view(3, 1, 1))
    torch.testing.assert_close(vae.decode(z), x)


def test_nested_dropout_sorts_channels():
    """After training, the first of four channels carries more than the last; by the loss on all channels alone it need not."""
    torch.manual_seed(0)
    vae, g = TinyVAE(TinyVAEConfig(latent_channels=4)).train(), generator()
    optimizer = torch.optim.Adam(vae.encoder.parameters(), 3e-3)
    for _ in range(150):
        x = F.interpolate(2 * torch.rand(4, 3, 4, 4, generator=g) - 1, (32, 32), mode="bicubic")
        everything, first = vae.loss(x, g)
        optimizer.zero_grad(), (everything + first).backward(), optimizer.step()
    assert first > everything and vae.std[0] > 1.5 * vae.std[3]


def test_residual_adds_nothing_at_first():
    torch.manual_seed(0)
    vae, z = TinyVAE(TinyVAEConfig(latent_channels=4, residual=(8, 8, 4))), torch.randn(1, 4, 3, 2)
    assert torch.equal(vae.decode(z), vae.synthesis(z / vae.gain()))
    torch.nn.init.normal_(vae.residual.conv_out.weight)
    assert vae.decode(z).shape == (1, 3, 24, 16) and not torch.equal(vae.decode(z), vae.synthesis(z / vae.gain()))


@torch.no_grad()
def test_untrained_transformer_is_the_best_linear_estimate():
    """Of the velocity eps - hq, where hq is normal around z_lq: no other factor of d does better. One step gives z_lq."""
    torch.manual_seed(0)
    dit, z_lq = TinyDiT(SMALL_DIT), torch.randn(64, 4, 4, 4)
    hq, eps, feat = z_lq + torch.randn(64, 4, 4, 4), torch.randn(64, 4, 4, 4), torch.randn(64, 1, 8)
    for t in (0.2, 0.5, 0.9):
        z_t = (1 - t) * hq + t * eps
        v = dit(z_t, z_lq, feat, torch.full((64,), t))
        d = z_t - (1 - t) * z_lq
        error = (eps - hq - v).square().mean()
        assert error.item() == pytest.approx(1 / ((1 - t) ** 2 + t**2), rel=0.1)
        assert all((eps - hq - v - step * d).square().mean() > error for step in (-0.2, 0.2))
    torch.testing.assert_close(eps - dit(eps, z_lq, feat, torch.ones(64)), z_lq)


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(4, 4), (3, 5), (6, 2), (1, 7)])
def test_local_mlp_on_any_rectangle(h, w):
    """At first the plain MLP to the bit; then each token sees the eight around it, with zeros beyond the border."""
    torch.manual_seed(0)
    mlp, plain, x = ConvSwiGLU(8, 12), SwiGLU(8, 12), torch.randn(2, h * w, 8)
    plain.load_state_dict({k: v for k, v in mlp.state_dict().items() if not k.startswith("dw.")})
    mlp.grid = h, w
    assert torch.equal(mlp(x), plain(x))
    torch.nn.init.normal_(mlp.dw.weight), torch.nn.init.normal_(mlp.dw.bias)
    gate, value = mlp.w12(x).chunk(2, dim=-1)
    around = F.pad(value.view(2, h, w, 12), (0, 0, 1, 1, 1, 1))
    kernel = mlp.dw.weight[:, 0]
    dw = sum(kernel[:, i, j] * around[:, i : i + h, j : j + w] for i in range(3) for j in range(3)) + mlp.dw.bias
    torch.testing.assert_close(mlp(x), mlp.w3(F.silu(gate) * (value + dw.flatten(1, 2))), atol=1e-5, rtol=1e-5)


def test_a_transformer_goes_on_with_local_mlps():
    """Rectangles and patches of two; the state_dict has only dw beside that of the plain one; dw learns."""
    torch.manual_seed(0)
    cfg = replace(SMALL_DIT, patch_size=2)
    plain, local = TinyDiT(cfg), TinyDiT(cfg, local=True)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    missing, unexpected = local.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == {f"blocks.{i}.mlp.dw.{kind}" for i in (0, 1) for kind in ("weight", "bias")} and not unexpected
    for h, w in ((8, 8), (4, 10), (6, 2)):
        inputs = torch.randn(3, 4, h, w), torch.randn(3, 4, h, w), torch.randn(3, 5, 8), torch.rand(3)
        assert torch.equal(local(*inputs), plain(*inputs))
    local(*inputs).square().mean().backward()
    assert all(block.mlp.dw.weight.grad.any() for block in local.blocks)
    block = TinyDiT(replace(cfg, depth=1), local=True).blocks[0]
    assert block.mlp.w12.bias.eq(0).all(), "initialised as DiT initialises"
    assert all(type(block.mlp) is SwiGLU for block in plain.blocks) and isinstance(plain, DiT)


def test_local_is_a_field_of_the_config():
    cfg = TinyVOSRConfig(dit=SMALL_DIT, vit=ViTConfig(img_size=28, embed_dim=8, depth=1, num_heads=1),
                         vae=TinyVAEConfig(latent_channels=4), vit_input=28)
    assert not cfg.local and not any(".dw." in name for name in TinyVOSR(cfg).state_dict())
    local = TinyVOSRConfig.from_dict(asdict(replace(cfg, local=True)))
    assert local.local and sum(".dw." in name for name in TinyVOSR(local).state_dict()) == 4
    assert TinyVOSR(local).upscale(torch.rand(1, 3, 8, 12)).shape == (1, 3, 32, 48)


def test_older_files_are_read(tmp_path):
    """Settings of their configs and tensors that are gone; what was never there is still refused."""
    vosr, path = asdict(TinyVOSRConfig()), tmp_path / "model.safetensors"

    def read(config):
        save_file({"a": torch.zeros(1)}, path, {"config": json.dumps(config)})
        return TinyVOSRConfig.from_dict(read_config(path))

    old = {**vosr, "dit": {**vosr["dit"], "precondition": True}, "vae": {**vosr["vae"], "crisp": 0.5},
           "torch_bicubic": True, "stablesr": True, "start_noise": 0.0}
    assert read(old) == TinyVOSRConfig()
    with pytest.raises(TypeError, match="crips"):
        read({**vosr, "crips": 0.5})
    vae = TinyVAE()
    vae.load_state_dict({**vae.state_dict(), "crisp.conv_in.weight": torch.zeros(1)})
    outer = torch.nn.ModuleDict({"vae": vae})
    outer.load_state_dict({**outer.state_dict(), "vae.crisp.conv_in.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        vae.load_state_dict({**vae.state_dict(), "crips.weight": torch.zeros(1)})


def test_random_features():
    """The same for everybody; blind for an image's brightness, not for a lost edge or a new grain; a gradient everywhere, at equal images too."""
    a, b = RandomLPIPS(), RandomLPIPS()
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    x = torch.zeros(1, 3, 32, 32)
    x[..., 16:] = 0.5
    soft = F.avg_pool2d(F.pad(x, (4,) * 4, mode="replicate"), 9, stride=1)
    grain = x + 0.1 * torch.randn(x.shape, generator=generator())
    with torch.no_grad():
        assert a(x, x) == 0 and a(x, x + 0.2) < 1e-6 < 0.01 < min(a(x, soft), a(x, grain))
        assert [tuple(f.shape) for f in a.unit_features(x)] == [(1, 16, 32, 32), (1, 32, 16, 16), (1, 64, 8, 8)]
        assert all(f.square().sum(1).max() < 1 for f in a.unit_features(x))
    y = x.clone().requires_grad_()
    a(y, x).sum().backward()
    assert y.grad.isfinite().all()


# -----------------------------------------------------------------------------
# the embedded systems


@cache
def model(name):
    return find_system(name).from_pretrained(name)


@cache
def example():
    """A part of the example: lq (1, 3, 64, 64), hq (1, 3, 256, 256)."""
    lq, hq = (read_picture(ROOT / "assets" / file)[0] for file in ("example.png", "example_hq.png"))
    return lq[..., 8:72, 24:88], hq[..., 32:288, 96:352]


def results(name, knob, values):
    lq, _ = example()
    return [model(name).upscale(lq, **{knob: value}) for value in values]


def detail(x):
    """Mean difference of neighbours, of 255."""
    return 127.5 * float(x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean())


def rising(values):
    return all(a < b for a, b in zip(values, values[1:]))


def test_sizes():
    assert PRIOR.stat().st_size <= 20e6 and EMBEDDED.keys() == MOST.keys()
    for name, most in MOST.items():
        assert EMBEDDED[name].stat().st_size <= most


@pytest.mark.parametrize("name", MOST)
def test_better_than_bicubic(name):
    lq, hq = example()
    sr = model(name).upscale(lq)
    assert psnr_y(sr, hq, 4) > psnr_y(resize(lq, 4), hq, 4) + 0.2
    assert (sr.mean((2, 3)) - lq.mean((2, 3))).abs().max() < 2 / 255, "a colour shift"


@pytest.mark.parametrize("name", MOST)
def test_no_lattice(name):
    """The autoencoder's cells, 8 pixels, stand out of a result's spectrum (5 and 8 times; a photo: 1), but no more than that."""
    power = torch.fft.fft2(model(name).upscale(example()[0]).mean(1)).abs().square()[0]
    around = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(power[None], (4, 4, 4, 4), mode="circular"), 9, 1)[0]
    cells = (power / around)[::32, ::32]        # 256 / 8 periods
    assert cells.flatten()[1:].median() < 10


def test_scores_steer():
    """S3Diff, 4.4: said to be noisier, a picture comes out smoother; said to be more blurred, it comes out with more detail."""
    smoother = results("s3diff-tiny", "noise", (0, 0.1, 0.2, 0.3, 0.4))
    sharper = results("s3diff-tiny", "blur", (0.3, 0.4, 0.5, 0.6, 0.7))
    assert rising([-detail(x) for x in smoother]) and rising([detail(x) for x in sharper])
    for row in (smoother, sharper):
        assert (row[0] - row[-1]).abs().mean() > 2 / 255


def test_guidance_adds_detail():
    """The bad prompt alone is nearer to the bad picture; the further from it, the more detail."""
    bad, *row = results("s3diff-tiny", "guidance", (0, 0.8, 1, 1.2, 1.5))
    assert rising([detail(x) for x in row])
    assert psnr_y(bad, example()[1], 4) < psnr_y(row[1], example()[1], 4) - 0.2


def test_each_set_does_what_its_loss_asks():
    """GramSR, from 0 to 1.5: pixel brings the original nearer, semantic its features, texture its tokens' Gram matrix."""
    (lq, hq), random, gramsr = example(), RandomLPIPS(), TinyGramSR.from_pretrained("gramsr-tiny")
    vit = gramsr.vit
    with torch.no_grad():
        true = features(vit, 2 * hq - 1)
        far = {"pixel": lambda x: -psnr_y(x, hq, 4), "semantic": lambda x: float(random(2 * x - 1, 2 * hq - 1)),
               "texture": lambda x: float(loss_gram(features(vit, 2 * x - 1), true))}
        for name, distance in far.items():
            row = [gramsr.upscale(lq, **{name: scale}) for scale in (0, 0.5, 1, 1.5)]
            assert rising([-distance(x) for x in row]), name
