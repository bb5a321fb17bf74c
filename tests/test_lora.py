"""Layers with adapters: against peft, and against the formula. Run: python -m pytest tests/test_lora.py"""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.lora import Conv2d, Linear, Modulation, adapted_layers, add_lora, of_block, repeated
from models.s3diff import UNET_TARGETS, VAE_TARGETS
from models.unet import UNet, UNetConfig
from models.support.fast_lora import merge
from models.vae import VAE, VAEConfig

REFERENCE = "a reference for this test only"
KINDS = {"linear": (lambda: Linear(6, 5), (40, 6)), "no bias": (lambda: Linear(6, 5, bias=False), (40, 6)),
         "conv": (lambda: Conv2d(6, 5, 3, padding=1), (6, 9, 7)), "stride": (lambda: Conv2d(6, 5, 3, stride=2), (6, 11, 9)),
         "oblong": (lambda: Conv2d(6, 5, (1, 3), padding=(0, 1)), (6, 5, 8)), "1x1": (lambda: Conv2d(6, 5, 1), (6, 9, 7))}


def make(kind, r=3, names=("default",), B=2):
    """-> a layer whose adapters do something, x of B pictures"""
    torch.manual_seed(0)
    layer, shape = KINDS[kind][0](), KINDS[kind][1]
    for name in names:
        layer.add_adapter(name, r)
        nn.init.normal_(layer.lora_B[name].weight)
    return layer, torch.randn(B, *shape)


def on(layer):
    """All adapters of a layer, without a matrix."""
    return dict.fromkeys(layer.lora_A, 1)


def beside(layer, x, C):
    """The layer as training computes it, with every adapter beside the base weight."""
    with torch.enable_grad():
        return layer(x, C).detach()


def delta(layer, name, C=None):
    """s B C A as a change of the weight, by loops over what the formula says; C: (r, r)"""
    A, B = layer.lora_A[name].weight.flatten(1), layer.lora_B[name].weight.flatten(1)
    C = torch.eye(len(A)).to(A) if C is None else C
    return (8 / len(A) * torch.einsum("or,rk,ki->oi", B, C, A)).view_as(layer.weight)


def with_weight(layer, x, W):
    return F.linear(x, W, layer.bias) if isinstance(layer, nn.Linear) else F.conv2d(x, W, layer.bias, layer.stride, layer.padding)


# -----------------------------------------------------------------------------
# peft

class Net(nn.Module):
    def __init__(self, linear, conv):
        super().__init__()
        self.conv = conv(3, 8, 3, stride=2, padding=1)
        self.fc = linear(8, 5)

    def forward(self, x, *C):
        return self.fc(self.conv(x, *C).flatten(2).mT, *C)


def peft_twin(ours, r):
    peft = pytest.importorskip("peft", reason=REFERENCE)
    config = peft.LoraConfig(r=r, init_lora_weights="gaussian", target_modules=["conv", "fc"])
    theirs = peft.inject_adapter_in_model(config, Net(nn.Linear, nn.Conv2d))
    tensors = {k if "lora_" in k else ".".join([k.split(".")[0], "base_layer", k.split(".")[1]]): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(tensors)         # strict: the names are peft's
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("r", [1, 4, 16])
def test_equals_peft(r):
    """The default alpha included: with s = 1 in place of 8 / r the public adapters would bend the layers twice or four times too much."""
    torch.manual_seed(0)
    ours = Net(Linear, Conv2d)
    add_lora(ours, ["conv", "fc"], "default", r)
    for name in ("conv", "fc"):
        nn.init.normal_(ours.get_submodule(name).lora_B["default"].weight, std=0.1)
    theirs, x, C = peft_twin(ours, r), torch.randn(2, 3, 9, 6), {"default": 1}
    torch.testing.assert_close(ours(x, C), theirs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(beside(ours.conv, x, C), theirs.conv(x))
    for name in ("conv", "fc"):
        layer = theirs.get_submodule(name)
        layer.merge()
        assert not torch.equal(layer.base_layer.weight, ours.get_submodule(name).weight)
    merge(ours)
    assert not any("lora" in name for name in ours.state_dict())
    for name in ("conv", "fc"):
        torch.testing.assert_close(ours.get_submodule(name).weight, theirs.get_submodule(name).base_layer.weight)


def test_starts_as_peft_does():
    """A of deviation 1 / r, B zero."""
    torch.manual_seed(0)
    layer = Linear(4000, 7)
    layer.add_adapter("default", 4)
    assert layer.lora_A["default"].weight.std().item() == pytest.approx(0.25, rel=0.05) and not layer.lora_B["default"].weight.any()
    peft = pytest.importorskip("peft", reason=REFERENCE)
    config = peft.LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(4000, 7)))[0]
    assert theirs.lora_A["default"].weight.std().item() == pytest.approx(0.25, rel=0.05) and theirs.scaling == layer.s


def tiny_networks():
    diffusers = pytest.importorskip("diffusers", reason=REFERENCE)
    unet = UNetConfig(widths=(8, 16), num_heads=(1, 2), layers_per_block=1, context_dim=6, norm_groups=4)
    vae = VAEConfig(widths=(8, 16), layers_per_block=1, norm_groups=4)
    their_unet = diffusers.UNet2DConditionModel(
        block_out_channels=unet.widths, attention_head_dim=unet.num_heads, layers_per_block=1, cross_attention_dim=6, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), use_linear_projection=True)
    their_vae = diffusers.AutoencoderKL(block_out_channels=vae.widths, layers_per_block=1, norm_num_groups=4, latent_channels=4,
                                        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    return {"unet": (UNet(unet), their_unet), "vae": (VAE(vae), their_vae)}


@pytest.mark.parametrize("network, targets", [
    ("unet", UNET_TARGETS), ("vae", VAE_TARGETS), ("unet", ("to_q",)), ("unet", ("conv",)), ("unet", ("0.proj", "conv_in")),
    ("unet", r".*attn1\.to_[qk]"), ("unet", r"down_blocks.*conv"), ("vae", r"encoder\.mid_block\..*to_(q|out\.0)"), ("unet", ("to_q", "shortcut")),
    ("unet", ("down_blocks.0.resnets.0.conv1",)),
    ("vae", VAE_TARGETS.replace("encoder", "(encoder|decoder)", 1)),        # of the paper's Table 4, as train_s3diff.py writes it
])
def test_chooses_the_layers_that_peft_chooses(network, targets):
    """A regular expression must match the whole name, an entry of a list its end, at a dot: conv is neither conv1 nor time_conv."""
    peft = pytest.importorskip("peft", reason=REFERENCE)
    ours, theirs = tiny_networks()[network]
    wanted = targets if isinstance(targets, str) else list(targets)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=wanted), theirs)
    expected = [name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    add_lora(ours, targets, "default", 2)
    chosen = adapted_layers(ours, "default")
    assert chosen and sorted(chosen) == sorted(expected) and adapted_layers(ours, "other") == []
    assert {k for k in ours.state_dict() if "lora_" in k} == {k for k in theirs.state_dict() if "lora_" in k}


def test_nothing_matches():
    vae = VAE(VAEConfig(widths=(8,), layers_per_block=1, norm_groups=4))
    add_lora(vae, "", "default", 2), add_lora(vae, (), "default", 2)
    assert not any("lora_" in k for k in vae.state_dict())


# -----------------------------------------------------------------------------
# one layer

@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_each_image_has_its_own_matrix(kind):
    layer, x = make(kind)
    C = torch.randn(2, 3, 3)
    y = layer(x, {"default": C})
    for i in range(2):
        torch.testing.assert_close(y[i : i + 1], layer(x[i : i + 1], {"default": C[i : i + 1]}), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(y[i : i + 1], with_weight(layer, x[i : i + 1], layer.weight + delta(layer, "default", C[i])), atol=1e-4, rtol=1e-5)
    assert not torch.allclose(y, layer(x, {"default": C.mT}), atol=1e-2), "its columns meet A"
    torch.testing.assert_close(layer(x, {"default": torch.eye(3)[None]}), layer(x, {"default": 1}), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_off_unless_named_and_new_ones_change_nothing(kind):
    layer, x = make(kind)
    plain = with_weight(layer, x, layer.weight)
    assert not torch.allclose(layer(x, {"default": 1}), plain, atol=1e-2)
    assert torch.equal(layer(x), plain) and torch.equal(layer(x, {"other": 1}), plain) and torch.equal(beside(layer, x, {}), plain)
    for run in (layer, lambda x, C: beside(layer, x, C)):
        torch.testing.assert_close(run(x, {"default": torch.zeros(1, 3, 3)}), plain)
    layer.add_adapter("default", 3)         # anew: B is zero
    for C in (1, 1e3 * torch.randn(2, 3, 3)):
        torch.testing.assert_close(layer(x, {"default": C}), plain)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_add_up(kind):
    layer, x = make(kind, names=("a", "b"))
    layer.add_adapter("c", 2, alpha=2)      # another rank and scale
    nn.init.normal_(layer.lora_B["c"].weight)
    change = {"a": delta(layer, "a"), "b": delta(layer, "b"), "c": delta(layer, "c") / 4}
    C_a, C_b = torch.randn(2, 1, 3, 3)
    for names in ("abc", "b", "ca"):
        expected = with_weight(layer, x, layer.weight + sum(change[name] for name in names))
        C = dict.fromkeys(names, 1)
        torch.testing.assert_close(layer(x, C), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(beside(layer, x, C), expected, atol=1e-4, rtol=1e-5)
    C = {"a": C_a, "b": C_b.expand(2, -1, -1), "c": 1}      # of one image, of each, and none
    expected = with_weight(layer, x, layer.weight + delta(layer, "a", C_a[0]) + delta(layer, "b", C_b[0]) + change["c"])
    torch.testing.assert_close(layer(x, C), expected, atol=1e-4, rtol=1e-5)


def test_a_networks_matrices():
    """A block takes its own; a batch twice as long takes each image's again, and what holds for all stays one."""
    C = {"each": torch.randn(2, 5, 3, 3), "all": torch.randn(1, 5, 3, 3), "plain": 1}
    assert [getattr(of_block(C, 3)[name], "shape", None) for name in C] == [(2, 3, 3), (1, 3, 3), None]
    assert torch.equal(of_block(C, 3)["each"], C["each"][:, 3]) and of_block(C, 3)["plain"] == 1 and of_block({}, 0) == {}
    twice = repeated(C, 2)
    assert torch.equal(twice["each"], torch.cat([C["each"]] * 2)) and twice["all"] is C["all"] and twice["plain"] == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pictures", [1, 2])
def test_gradients(kind, pictures):
    """Of x, A, B and C, by finite differences and by the dense formula; the frozen weight gets none."""
    layer, x = make(kind)
    layer.double()
    x = x.double()[:, :4] if isinstance(layer, nn.Linear) else x.double()[..., :5, :5]
    x = x.clone().requires_grad_()
    C = torch.randn(pictures, 3, 3, dtype=torch.double, requires_grad=True)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for p in (layer.weight, layer.bias):
        if p is not None:
            p.requires_grad_(False)

    def run(x, A, B, C):
        return torch.func.functional_call(layer, {"lora_A.default.weight": A, "lora_B.default.weight": B}, (x, {"default": C}))

    assert torch.autograd.gradcheck(run, (x, A, B, C), fast_mode=True)
    weigh = torch.randn_like(layer(x, {"default": C}))
    ours = torch.autograd.grad((layer(x, {"default": C}) * weigh).sum(), (x, A, B, C))
    dense = torch.cat([with_weight(layer, x[i : i + 1], layer.weight + delta(layer, "default", C[i % pictures])) for i in range(2)])
    for grad, expected in zip(ours, torch.autograd.grad((dense * weigh).sum(), (x, A, B, C))):
        assert expected.any()
        torch.testing.assert_close(grad, expected)
    layer(x, {"default": C}).sum().backward()
    assert layer.weight.grad is None and A.grad.any() and B.grad.any() and C.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pictures", [1, 2])
def test_half_precision(kind, pictures):
    """C comes in float32, whatever the networks run in."""
    layer, x = make(kind)
    C = {"default": torch.randn(pictures, 3, 3)}
    y = layer(x, C)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        auto = layer(x, C).detach()
    half = layer.bfloat16()(x.bfloat16(), C)
    for low in (half, auto, beside(layer, x.bfloat16(), C)):
        assert low.dtype == torch.bfloat16 and (low.float() - y).abs().max() < 0.05 * y.abs().max()


@torch.no_grad()
def test_names_and_copies():
    layer, x = make("conv", names=("default", "vae_skip"))
    assert set(layer.state_dict()) == {"weight", "bias", *(f"lora_{x}.{name}.weight" for x in "AB" for name in ("default", "vae_skip"))}
    twin, C = copy.deepcopy(layer), on(layer)
    assert torch.equal(twin(x, C), layer(x, C)) and twin.s == layer.s and twin.s is not layer.s
    twin.lora_B["default"].weight.zero_()
    twin.add_adapter("more", 2)
    assert not torch.equal(twin(x, C), layer(x, C)) and "more" not in layer.lora_A
    other = make("conv", names=("default", "vae_skip"))[0]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, C), layer(x, C))


# -----------------------------------------------------------------------------
# the modulation

@torch.no_grad()
def test_modulation_starts_at_almost_nothing():
    """About 1e-10, not 0: exact zeros in two of B C A's three factors would leave no way out of the saddle."""
    torch.manual_seed(0)
    C = Modulation().matrices("unet", torch.rand(3, 2))
    assert C.shape == (3, 10, 32, 32) and Modulation().matrices("vae", torch.rand(1, 2)).shape == (1, 6, 16, 16)
    assert 0 < C.abs().max() < 1e-8 and C.abs().mean() > 1e-12


@torch.no_grad()
def test_modulation_depends_on_scores_and_block():
    torch.manual_seed(0)
    m = Modulation(2, 3)
    for name, p in m.named_parameters():
        if "mlp" in name:
            nn.init.normal_(p, std=0.3)
    scores = torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.1, 0.9]])
    C = m.matrices("unet", scores)
    for i in range(3):      # each picture by itself, not its neighbours
        torch.testing.assert_close(C[i : i + 1], m.matrices("unet", scores[i : i + 1]))
    apart = [(C[0] - C[1]).abs().max(), (C[0] - C[2]).abs().max(), *((C[0, i] - C[0, i + 1]).abs().max() for i in range(9))]
    assert min(apart) > 0.05, "blur and noise are not interchangeable, and each block has its own"
    angle = 2 * torch.pi * scores.double()[:, :, None] * m.w.double()       # the formula, once more
    d = torch.cat([angle[:, 0].sin(), angle[:, 0].cos(), angle[:, 1].sin(), angle[:, 1].cos()], dim=1).float()
    d, e = m.unet_de_mlp(d), m.unet_block_mlp(m.unet_block.weight[7])
    expected = m.unet_fuse_mlp(torch.cat([d, e.expand(3, -1)], dim=1)).view(3, 3, 3)
    torch.testing.assert_close(C[:, 7], expected.mT, atol=1e-4, rtol=1e-4)      # in the file rows and columns are the other way round
