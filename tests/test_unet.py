"""Stable Diffusion's UNet against its manifest, against diffusers, and its block ids. Run: python -m pytest tests/test_unet.py"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from models.lora import LoRA, adapted_layers, add_lora
from models.s3diff import UNET_TARGETS, VAE_TARGETS
from models.unet import UNet, UNetConfig, alphas_cumprod
from models.vae import VAE, VAEConfig

MANIFESTS = Path(__file__).resolve().parents[2] / "shared" / "manifests"
REFERENCE = "diffusers is a reference for this test only"
TINY = UNetConfig(widths=(8, 16, 16), num_heads=(1, 2, 4), layers_per_block=2, context_dim=6, norm_groups=4)
TINY_VAE = VAEConfig(widths=(8, 16, 32, 32), layers_per_block=2, norm_groups=4)


def tiny(cfg=TINY):
    """Every number counts: the norms, which start as 1 and 0, get others."""
    torch.manual_seed(0)
    model = UNet(cfg).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)
    return model


def inputs(B=2, h=8, w=8, cfg=TINY):
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, cfg.in_channels, h, w, generator=g), torch.randn(B, 5, cfg.context_dim, generator=g)


def test_names_and_shapes_equal_the_public_file():
    """Both ways, at full size: a name too many would be refused by strict loading as one too few would."""
    path = MANIFESTS / "sd_turbo_unet.json"
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    with torch.device("meta"):
        model = UNet()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == json.loads(path.read_text())["tensors"]
    assert sum(p.numel() for p in model.parameters()) == 865_910_724


# -----------------------------------------------------------------------------
# diffusers

def diffusers_twin(model):
    diffusers = pytest.importorskip("diffusers", reason=REFERENCE)
    cfg, n = model.cfg, len(model.cfg.widths) - 1
    reference = diffusers.UNet2DConditionModel(
        in_channels=cfg.in_channels, out_channels=cfg.out_channels, block_out_channels=cfg.widths, layers_per_block=cfg.layers_per_block,
        down_block_types=["CrossAttnDownBlock2D"] * n + ["DownBlock2D"], up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * n,
        attention_head_dim=cfg.num_heads, cross_attention_dim=cfg.context_dim, norm_num_groups=cfg.norm_groups, use_linear_projection=True).eval()
    reference.load_state_dict(model.state_dict())       # strict
    return reference


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(8, 8), (4, 4), (12, 8), (4, 20)])
def test_equals_diffusers(h, w):
    """Squares and rectangles, down to one cell at the lowest resolution."""
    model = tiny()
    reference = diffusers_twin(model)
    z, context = inputs(h=h, w=w)
    results = []
    for t in (0, 1, 250, 999, torch.tensor([999, 3])):
        y = model(z, t, context)
        torch.testing.assert_close(y, reference(z, t, context).sample, atol=2e-5, rtol=1e-4)
        results.append(y)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(results, results[1:])), "t matters"


@torch.no_grad()
@pytest.mark.parametrize("cfg", [
    UNetConfig(3, 5, (8, 16), (2, 4), 1, 6, 4),                                     # other channels, as GramSR's or an ablation's
    UNetConfig(widths=(32, 32, 64, 64), num_heads=(1, 2, 4, 8), layers_per_block=1, context_dim=4),    # four levels and 32 groups, as in SD
])
def test_other_sizes_equal_diffusers(cfg):
    model = tiny(cfg)
    z, context = inputs(1, 16, 8, cfg)
    torch.testing.assert_close(model(z, 500, context), diffusers_twin(model)(z, 500, context).sample, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_each_picture_has_its_own_time():
    model, (z, context) = tiny(), inputs()
    both = model(z, torch.tensor([999, 3]), context)
    for i, t in enumerate((999, 3)):
        torch.testing.assert_close(both[i : i + 1], model(z[i : i + 1], t, context[i : i + 1]), atol=1e-5, rtol=1e-4)


def test_noise_schedule_equals_diffusers():
    """S3Diff divides by its last root, 0.068: an error there counts 14.6 times."""
    a = alphas_cumprod()
    assert a.shape == (1000,) and a[999].item() == pytest.approx(0.0046601, abs=2e-7)       # of the specification
    diffusers = pytest.importorskip("diffusers", reason=REFERENCE)
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    torch.testing.assert_close(a, scheduler.alphas_cumprod, atol=0, rtol=1e-6)


# -----------------------------------------------------------------------------
# blocks, and which layers are adapted

def block_of(name):
    """Block id of a layer with an adapter, as the specification lists them."""
    if name.startswith("mid_block"):
        return 4
    if name == "conv_out":
        return 9
    kind, i = name.split(".")[:2]
    return {"down_blocks": 0, "up_blocks": 5}[kind] + int(i)


def kinds(layers):
    """to_q, proj_in and so on: how many of each."""
    return Counter(".".join(part for part in name.split(".") if not part.isdigit()).removesuffix(".").split(".")[-1] for name in layers)


def test_what_s3diff_adapts_in_the_unet():
    with torch.device("meta"):
        model = UNet()
        add_lora(model, UNET_TARGETS, "default", 32)
    layers = adapted_layers(model, "default")
    assert len(layers) == 257
    assert kinds(layers) == {"to_q": 32, "to_k": 32, "to_v": 32, "to_out": 32, "proj": 16, "net": 16, "proj_in": 16, "proj_out": 16,
                             "conv1": 22, "conv2": 22, "conv_shortcut": 14, "conv": 6, "conv_out": 1}
    assert sum("downsamplers" in name for name in layers) == sum("upsamplers" in name for name in layers) == 3
    assert not any(part in name for name in layers for part in ("conv_in", "time_emb", "norm"))
    blocks = {id(m): i for i, block in enumerate(model.blocks) for m in block.modules()}
    assert len(model.blocks) == 10 and all(blocks[id(model.get_submodule(name))] == block_of(name) for name in layers)


def test_what_s3diff_adapts_in_the_vae():
    with torch.device("meta"):
        model = VAE()
        add_lora(model, VAE_TARGETS, "vae_skip", 16)
    layers = adapted_layers(model, "vae_skip")
    assert len(layers) == 31 and all(name.startswith("encoder.") for name in layers)
    assert kinds(layers) == {"conv_in": 1, "conv1": 10, "conv2": 10, "conv_shortcut": 2, "conv": 3, "to_q": 1, "to_k": 1, "to_v": 1, "to_out": 1,
                             "conv_out": 1}


def received(network, run):
    """Which adapters every layer that can have some is given while run() -> {name: adapters}"""
    got = {}

    def note(name):
        return lambda module, args, kwargs: got.update({name: kwargs.get("adapters", args[1] if len(args) > 1 else None)})

    hooks = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in network.named_modules() if isinstance(m, LoRA)]
    run()
    for hook in hooks:
        hook.remove()
    return got


@torch.no_grad()
def test_every_layer_gets_the_matrix_of_its_block():
    """Seen at the layers, not at the list: a block that passed its neighbour's C on would still run."""
    cfg = UNetConfig(widths=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), context_dim=6, norm_groups=4)
    model, (z, context) = tiny(cfg), inputs(1)
    add_lora(model, UNET_TARGETS, "default", 2)
    layers = adapted_layers(model, "default")
    C = torch.randn(1, 10, 2, 2)
    got = received(model, lambda: model(z, 1, context, {"default": C}))
    assert len(layers) == 16 * 12 + 44 + 6 + 1 + sum("conv_shortcut" in name for name in layers)
    assert all(torch.equal(got[name]["default"], C[:, block_of(name)]) for name in layers)
    assert torch.equal(got["conv_in"]["default"], C[:, 0])

    vae = VAE(TINY_VAE).eval()
    add_lora(vae, VAE_TARGETS, "vae_skip", 2)
    layers = adapted_layers(vae, "vae_skip")
    C = torch.randn(1, 6, 2, 2)
    got = received(vae, lambda: vae.encode(torch.rand(1, 3, 16, 16), adapters={"vae_skip": C}))
    for name in layers:
        expected = 4 if "mid_block" in name else 5 if name in ("encoder.conv_in", "encoder.conv_out") else int(name.split(".")[2])
        assert torch.equal(got[name]["vae_skip"], C[:, expected]), name
    assert len(layers) == 31
    got = received(vae, lambda: vae.decode(torch.rand(1, 4, 2, 2), {"vae_skip": 1}))      # where Table 4 has adapters, too
    inside = {name for name, m in vae.named_modules() if isinstance(m, LoRA) and name.startswith("decoder.")}
    assert inside and all(got[name] == {"vae_skip": 1} for name in inside)


# -----------------------------------------------------------------------------
# training

def test_gradient_checkpointing_changes_nothing():
    """With adapters and their matrices, whose gradients must come through the recomputation too."""
    model, (z, context) = tiny(), inputs(1, 4, 8)
    g = torch.Generator().manual_seed(2)
    add_lora(model, UNET_TARGETS, "default", 2)
    for name in adapted_layers(model, "default"):
        torch.nn.init.normal_(model.get_submodule(name).lora_B["default"].weight, std=0.1, generator=g)
    C = torch.randn(1, 8, 2, 2, generator=g).requires_grad_()
    grads, calls = [], []
    model.mid_block.register_forward_pre_hook(lambda *_: calls.append(1))
    for model.checkpointing in (False, True):
        model(z, 7, context, {"default": C}).square().mean().backward()
        grads.append({"C": C.grad, **{name: p.grad for name, p in model.named_parameters()}})
        model.zero_grad(), setattr(C, "grad", None)
    assert len(calls) == 3, "nothing is computed a second time"
    assert all(grads[0][name].any() for name in ("C", "conv_in.weight", "mid_block.resnets.0.conv1.lora_A.default.weight"))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)
    with torch.no_grad():
        model(z, 7, context)
    assert len(calls) == 4, "without gradients there is nothing to save"


@torch.no_grad()
def test_half_precision():
    model, (z, context) = tiny(), inputs()
    y, half = model(z, 999, context), model.bfloat16()(z.bfloat16(), 999, context.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - y).abs().max() < 0.1 * y.abs().max()
