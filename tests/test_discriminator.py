"""Properties of the discriminator and its augmentation. Run: python -m pytest tests/test_discriminator.py"""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases_vosr import fill_module

from models.discriminator import AugmentPlan, Blur, Discriminator, augment, draw_augment, multilevel_loss
from models.tiny_losses import PatchDiscriminator
from models.vit import PRESETS, ViT, ViTConfig
from models.support.weights import load_strictly

MANIFESTS = Path(__file__).resolve().parents[2] / "shared" / "manifests"
TINY = ViTConfig(img_size=224, patch_size=16, embed_dim=12, depth=12, num_heads=2, version=1)
FAR = (-10**6, -10**6)


def make():
    torch.manual_seed(0)
    return Discriminator(fill_module(ViT(TINY)), head_width=8)


def pictures(B=2, H=40, W=56):
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(1)) * 2 - 1


def neutral(B, **other):
    return AugmentPlan(**{"brightness": [0.5] * B, "saturation": [0.5] * B, "contrast": [0.5] * B, "translation": [(0, 0)] * B, "cutout": [FAR] * B,
                          **other})


def test_names_and_shapes_equal_the_package():
    if not MANIFESTS.exists():
        pytest.skip("needs ../shared/manifests")
    with torch.device("meta"):
        D = Discriminator(ViT(PRESETS["dino_vitb16"]))
    tensors = json.loads((MANIFESTS / "discriminator_heads.json").read_text())["tensors"]
    assert {k: list(v.shape) for k, v in D.state_dict().items()} == tensors
    assert D.blocks == [4, 8, 11]


def test_shapes_and_levels():
    D, x = make(), pictures()
    assert [tuple(f.shape) for f in D.features(x)] == [(2, 12, 14, 14), (2, 12, 14, 14), (2, 12)]
    D.eval()                                                        # else each call is another estimate of the spectral norms
    logits = D.decoder[0](*D.features(x))
    assert [tuple(level.shape) for level in logits] == [(2, 3, 3), (2, 3, 3), (2, 1)]
    for target in ("real", "fake", "generator"):
        loss = D(x, target)
        assert loss.shape == (2, 1) and torch.equal(loss, multilevel_loss(logits, target))
        assert torch.allclose(D(x[1:], target), loss[1:], atol=1e-5)
    with pytest.raises(KeyError):
        D(x, "Real")


def test_loss_is_a_mean_in_and_a_sum_over_levels():
    logits = [torch.tensor([[[1.0, -2.0]]]), torch.tensor([[0.5]])]
    log_sigmoid = [F.logsigmoid(level) for level in logits], [F.logsigmoid(-level) for level in logits]
    fake = -sum(level.mean() for level in log_sigmoid[1])
    real = -sum(0.8 * p.mean() + 0.2 * q.mean() for p, q in zip(*log_sigmoid))
    assert torch.allclose(multilevel_loss(logits, "fake").squeeze(), fake)
    assert torch.allclose(multilevel_loss(logits, "real").squeeze(), real)
    assert torch.equal(multilevel_loss(logits, "real"), multilevel_loss(logits, "generator"))
    at_rest = [torch.full((1, 2, 2), 4.0).log().requires_grad_()]           # sigmoid = 0.8: nothing left to gain
    assert torch.autograd.grad(multilevel_loss(at_rest, "generator").sum(), at_rest)[0].abs().max() < 1e-6


def test_the_generator_gets_a_gradient_and_the_backbone_none():
    D, x = make(), pictures().requires_grad_()
    D.requires_grad_(True)                                          # does not thaw the backbone
    D(x, "generator", draw_augment(x, torch.Generator().manual_seed(0))).mean().backward()
    assert x.grad.isfinite().all() and x.grad.flatten(1).abs().sum(1).min() > 0
    assert all(p.grad is not None and p.grad.any() for p in D.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in D.vit.parameters())
    D.zero_grad(), D.requires_grad_(False)                          # as while the generator learns
    grad, x.grad = x.grad, None
    D(x, "generator", draw_augment(x, torch.Generator().manual_seed(0))).mean().backward()
    assert x.grad.any() and all(p.grad is None for p in D.parameters())


def test_it_learns():
    D = make()
    real, fake = pictures(), pictures().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    optimizer = torch.optim.AdamW(D.parameters(), lr=1e-2)
    before = copy.deepcopy(D.vit.state_dict())
    losses = []
    for _ in range(8):
        loss = (D(real, "real") + D(fake, "fake")).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(v, before[k]) for k, v in D.vit.state_dict().items())


def test_spectral_norm_after_k_forwards():
    D, x, k = make(), pictures(), 3
    layer = D.decoder[0].decoder[0][1]
    W, u = layer.weight_orig.detach().flatten(1), layer.weight_u.clone()
    for _ in range(k):
        D(x, "fake")
        v = F.normalize(W.T @ u, dim=0)
        u = F.normalize(W @ v, dim=0)
    assert torch.allclose(layer.weight_u, u, atol=1e-6) and torch.allclose(layer.weight_v, v, atol=1e-6)
    assert torch.allclose(layer.weight.flatten(1), W / (u @ W @ v), atol=1e-6)
    D.eval()(x, "fake")
    assert torch.allclose(layer.weight_u, u, atol=1e-6)             # evaluation leaves the estimate alone
    D.train()
    for _ in range(300):
        layer(torch.zeros(1, 12, 3, 3))
    assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


def test_backbone_stays_out_of_the_file_but_follows():
    D, x = make(), pictures()
    assert not any("vit" in name for name in [*D.state_dict(), *dict(D.named_parameters()), *dict(D.named_modules())])
    assert len(list(D.parameters())) == 12
    assert D.double() is D and D.vit.norm.weight.dtype == D.decoder[0].out.bias.dtype == torch.float64
    assert D.eval()(x.double(), "real").dtype == torch.float64
    D.float().to("meta")
    assert D.vit.norm.weight.is_meta and D.decoder[0].decoder[0][0].filt.is_meta


def test_save_and_load():
    D, x = make(), pictures()
    D(x, "real")
    with torch.device("meta"):
        other = Discriminator(ViT(TINY), head_width=8)
    load_strictly(other, copy.deepcopy(D.state_dict()), "test")     # a copy, since loading takes the tensors and iteration changes them
    load_strictly(other.vit, D.vit.state_dict(), "test")
    for _ in range(2):
        assert torch.equal(other(x, "fake"), D(x, "fake"))          # goes on where the other stood
    assert torch.equal(other.decoder[0].out.weight_u, D.decoder[0].out.weight_u)


def test_blur_keeps_a_flat_picture_and_the_sum():
    x = torch.ones(1, 2, 8, 9)
    assert torch.allclose(Blur(2, padding=0)(x), torch.ones(1, 2, 5, 6))
    dot = F.pad(torch.ones(1, 2, 1, 1), (4, 4, 4, 4))
    assert torch.allclose(Blur(2, padding=1)(dot).sum((2, 3)), torch.ones(1, 2))


def test_neutral_draws_change_nothing():
    x = pictures()
    assert torch.allclose(augment(x, neutral(2)), x, atol=1e-6)


def test_each_draw_does_its_own():
    x = pictures(1, 16, 24)
    assert torch.allclose(augment(x, neutral(1, brightness=[0.75])), x + 0.25, atol=1e-6)
    assert torch.allclose(augment(x, neutral(1, saturation=[0.0])), x.mean(1, keepdim=True).expand_as(x), atol=1e-6)
    assert augment(x, neutral(1, contrast=[0.0])).std() == pytest.approx(0.5 * x.std().item(), rel=1e-4)
    moved = augment(x, neutral(1, translation=[(2, -3)]))
    assert torch.allclose(moved[..., :-2, 3:], x[..., 2:, :-3], atol=1e-6)
    assert not moved[..., -2:, :].any() and not moved[..., :3].any()
    holed = augment(x, neutral(1, cutout=[(4, 12)]))
    hole = torch.zeros(16, 24, dtype=torch.bool)
    hole[0:8, 6:18] = True
    assert not holed[..., hole].any() and torch.allclose(holed[..., ~hole], x[..., ~hole], atol=1e-6)


@pytest.mark.parametrize("H, W", [(20, 24), (21, 33), (8, 8)])
def test_draws_are_reproducible_and_in_range(H, W):
    x = torch.ones(400, 3, H, W)
    plan, again = (draw_augment(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert plan == again != draw_augment(x, torch.Generator().manual_seed(4))
    for side, moves, centres in zip((H, W), zip(*plan.translation), zip(*plan.cutout)):
        s, hole = int(side / 8 + 0.5), int(side / 2 + 0.5)
        assert set(moves) == set(range(-s, s + 1))
        assert set(centres) <= set(range(side + 1 - hole % 2)) and min(centres) == 0 and max(centres) == side - hole % 2
    for draws in (plan.brightness, plan.saturation, plan.contrast):
        assert 0 <= min(draws) < 0.05 and 0.95 < max(draws) < 1
    assert augment(x, plan).shape == x.shape and x.eq(1).all()


def test_gradient_flows_through_the_augmentation():
    x = pictures(2, 10, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, draw_augment(x, torch.Generator().manual_seed(5))), x)


def test_tiny_discriminator_rolls_pictures():
    """By offsets of their own, both alike; over them the gradient of a flat picture has no lattice left."""
    torch.manual_seed(0)
    D, (x, x_src) = PatchDiscriminator(8).eval(), (pictures(2, 32, 48), pictures(2, 32, 48).flip(0))
    (_, offsets), again = (D.draw(x, x_src, torch.Generator().manual_seed(0)) for _ in range(2))
    assert offsets == again[1] and offsets[0] != offsets[1]
    many = sum(D.draw(None, torch.zeros(400, 3, 8, 8), torch.Generator())[1], [])
    assert set(many) == set(range(8))
    rolled = [torch.stack([p.roll(offset, (1, 2)) for p, offset in zip(batch, offsets)]) for batch in (x, x_src)]
    still = [[0, 0]] * 2
    torch.testing.assert_close(D(x, "real", (x_src, offsets)), D(rolled[0], "real", (rolled[1], still)))

    def gradient(offsets):
        flat = torch.zeros(len(offsets), 3, 64, 64, requires_grad=True)
        D(flat, "generator", (flat.detach(), offsets)).sum().backward()
        return flat.grad.mean(0)[:, 16:-16, 16:-16].std((1, 2)).mean()

    assert gradient([[y, x] for y in range(8) for x in range(8)]) < 0.05 * gradient([[0, 0]])
