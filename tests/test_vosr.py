"""Properties of VOSR's networks, guidance, tiles and files. Run: python -m pytest tests/test_vosr.py"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_release import TINY

from models.dit import DiT, DiTConfig
from models.flow import Draws, conditions, guided, loss_distill, loss_flow, sample
from models.support.imaging import blend_tiles, tile_boxes
from models.support.download import WeightError
from models.support.strips import plain
from models.tiny import TinyVAE, TinyVAEConfig, TinyVOSR, TinyVOSRConfig
from models.vit import ViT, ViTConfig
from models.vosr import VOSR, VOSRConfig
from models.support.weights import load_strictly, save_model

MANIFESTS = Path(__file__).resolve().parents[2] / "shared" / "manifests"
SMALL = VOSRConfig(
    dit=DiTConfig(input_size=8, patch_size=2, in_channels=16, out_channels=8, hidden_size=32, depth=2, num_heads=2, z_dims=16),
    vit=ViTConfig(img_size=28, embed_dim=16, depth=1, num_heads=2),
    vae=TinyVAEConfig(latent_channels=8), vit_input=28, vit_layer=None, steps=2, guidance=1.0,
)


def awake(model):
    """The zero-initialised output layers hide everything: give them numbers."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


def make(**dit):
    torch.manual_seed(0)
    return awake(VOSR(replace(SMALL, dit=replace(SMALL.dit, **dit))))


def inputs(B=2, h=8, w=8):
    g = torch.Generator().manual_seed(2)
    z_t, z_lq = torch.randn(2, B, 8, h, w, generator=g)
    return z_t, z_lq, torch.randn(B, 4, 16, generator=g)


@pytest.mark.parametrize("name, config", [
    ("vosr_0.5b_ms", {}), ("vosr_0.5b_os", {"auxiliary_time_cond": True}),
    ("vosr_1.4b_ms", {"in_channels": 32, "out_channels": 16, "hidden_size": 1536, "depth": 36, "num_heads": 24, "z_dims": 1024}),
    ("vosr_1.4b_os", {"in_channels": 32, "out_channels": 16, "hidden_size": 1536, "depth": 36, "num_heads": 24, "z_dims": 1024,
                      "auxiliary_time_cond": True}),
    ("dinov2_vitb14", None), ("dinov2_vitl14", {"embed_dim": 1024, "depth": 24, "num_heads": 16}),
])
def test_names_and_shapes_equal_the_public_files(name, config):
    if not MANIFESTS.exists():
        pytest.skip("needs ../shared/manifests")
    with torch.device("meta"):
        model = DiT(DiTConfig(**config)) if name.startswith("vosr") else ViT(ViTConfig(**config or {}))
    tensors = json.loads((MANIFESTS / f"{name}.json").read_text())["tensors"]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == tensors


def test_unpatchify_undoes_patches():
    dit = make().dit
    z = inputs(1, 4, 6)[0]
    tokens = z.unflatten(2, (2, 2)).unflatten(4, (3, 2)).permute(0, 2, 4, 3, 5, 1).reshape(1, 6, -1)     # (row, column, channel)
    assert torch.equal(dit.unpatchify(tokens, 2, 3), z)


def test_first_velocity_is_zero():
    z_t, z_lq, feat = inputs()
    assert not DiT(SMALL.dit)(z_t, z_lq, feat, torch.ones(2)).any()


def test_preconditioning_is_right_for_a_gaussian():
    """Without a network: one step from noise is z_lq; at t = 0 the latent is known; and no other linear guess has a smaller loss."""
    z_t, z_lq, feat = inputs()
    dit = DiT(replace(SMALL.dit, precondition=True))
    assert torch.allclose(z_t - dit(z_t, z_lq, feat, torch.ones(2)), z_lq, atol=1e-6)
    assert torch.allclose(dit(z_t, z_lq, feat, torch.zeros(2)), -z_t, atol=1e-6)
    z_hq, eps = z_lq + torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8)
    for t in (0.2, 0.6):
        z_t = (1 - t) * z_hq + t * eps
        error = (dit(z_t, z_lq, feat, torch.full((2,), t)) - (eps - z_hq)).flatten()
        assert abs(torch.corrcoef(torch.stack([error, (z_t - (1 - t) * z_lq).flatten()]))[0, 1]) < 0.1


def test_guidance_one_is_no_guidance():
    dit = make().dit
    z_t, z_lq, feat = inputs()
    calls = []
    dit.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    plain = dit(z_t, z_lq, feat, torch.full((2,), 0.7))
    assert torch.equal(guided(dit, z_t, z_lq, feat, 0.7, 0.5, 1.0), plain)
    assert torch.allclose(guided(dit, z_t, z_lq, feat, 0.7, 0.5, 1 + 1e-9), plain, atol=1e-5)
    assert torch.allclose(guided(dit, z_t, z_lq, feat, 0.7, 0.5, 0.0, weak=0.3),
                          dit(z_t, 0.3 * z_lq, 0 * feat, torch.full((2,), 0.7)), atol=1e-5)
    assert calls == [2, 2, 4, 4, 2]


def test_second_time_is_silent_where_r_is_t():
    one_step = make(auxiliary_time_cond=True).dit
    multi_step = DiT(SMALL.dit).eval()
    load_strictly(multi_step, {k: v for k, v in one_step.state_dict().items() if not k.startswith("r_embedder")}, "test")
    z_t, z_lq, feat = inputs()
    t = torch.tensor([0.2, 0.9])
    assert torch.equal(one_step(z_t, z_lq, feat, t, t), multi_step(z_t, z_lq, feat, t))
    assert not torch.allclose(one_step(z_t, z_lq, feat, t, 0 * t), multi_step(z_t, z_lq, feat, t))


def test_euler_is_exact_on_a_straight_flow():
    z_hq, eps = inputs()[:2]
    for steps in (1, 7):
        assert torch.allclose(sample(lambda z, t, r: eps - z_hq, eps, steps), z_hq, atol=1e-5)


def test_dropped_condition_is_weak_and_blind():
    _, z_lq, feat = inputs()
    d = Draws.flow(z_lq, torch.Generator().manual_seed(0))
    d.m = torch.tensor([0.05, 0.5])
    noised, weak, mixed, mixed_feat = conditions(z_lq, feat, d, 0.1, (5.0, 1.0))
    assert torch.equal(mixed[0], d.w * z_lq[0]) and not mixed_feat[0].any()
    assert torch.equal(mixed[1], noised[1]) and torch.equal(mixed_feat[1], feat[1])


def test_draws_are_reproducible_and_in_range():
    z = inputs(64)[0]
    for make_draws in (Draws.flow, Draws.distill, lambda z, g: Draws.flow(z, g, lognorm=(0.8, 0.8))):
        a, b = (make_draws(z, torch.Generator().manual_seed(3)) for _ in range(2))
        assert all(v is None or torch.equal(v, vars(b)[k]) for k, v in vars(a).items())
        assert 0 <= a.t.min() and a.t.max() <= 1 and a.t.std() > 0.1
    assert abs(a.t.median() - torch.sigmoid(torch.tensor(0.8))) < 0.1


@pytest.mark.parametrize("kind", ["shortcut", "rcgm"])
def test_distillation_reaches_only_the_student(kind):
    student, teacher = make(auxiliary_time_cond=True).dit, make().dit.requires_grad_(False)
    z_hq, z_lq, feat = inputs()
    v_loss, u_loss = loss_distill(student, teacher, z_hq, z_lq, feat, Draws.distill(z_hq, torch.Generator().manual_seed(0)), kind)
    (v_loss + u_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_gradient_checkpointing_changes_nothing():
    dit = make().dit
    z_hq, z_lq, feat = inputs()
    grads = []
    for dit.checkpointing in (False, True):
        dit.zero_grad()
        loss_flow(dit, z_hq, z_lq, feat, Draws.flow(z_hq, torch.Generator().manual_seed(0))).backward()
        grads.append([p.grad.clone() for p in dit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_blended_tiles_of_a_pointwise_function_equal_the_whole():
    x = torch.randn(1, 3, 21, 34)
    y = blend_tiles(lambda tiles, n: tiles.sin(), x, tile_boxes(21, 34, 8, 2), at_once=3)
    assert torch.allclose(y, x.sin(), atol=1e-5)


def test_a_tile_as_large_as_the_picture_is_the_whole_picture():
    model = make()
    lq = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.upscale(lq, tile=64), model.upscale(lq))
    assert not torch.equal(model.upscale(lq, tile=32), model.upscale(lq))


@pytest.mark.parametrize("H, W", [(96, 40), (37, 53), (1, 9), (24, 24)])
@pytest.mark.parametrize("second_time", [False, True])
def test_any_rectangle(H, W, second_time):
    model = make(auxiliary_time_cond=second_time)
    lq = torch.rand(1, 3, H, W, generator=torch.Generator().manual_seed(0))
    sr = model.upscale(lq, seed=3)
    assert sr.shape == (1, 3, 4 * H, 4 * W) and 0 <= sr.min() and sr.max() <= 1 and sr.isfinite().all()
    assert torch.equal(sr, model.upscale(lq, seed=3))                       # the seed is all
    assert not torch.equal(sr, model.upscale(lq, seed=4))
    assert model.upscale(lq, tile=64).shape == sr.shape


@pytest.mark.parametrize("size", ["tiny", *TINY])
@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_is_close(size, dtype, error):
    torch.manual_seed(0)
    model = make() if size == "tiny" else awake(VOSR(TINY[size]))
    lq = torch.rand(1, 3, 24, 17, generator=torch.Generator().manual_seed(0))
    whole = model.upscale(lq, steps=2, guidance=0.5, color="none")
    half = model.to(dtype).upscale(lq, steps=2, guidance=0.5, color="none")
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().mean() < error


@pytest.mark.parametrize("scale, size", [(1, (20, 13)), (1.5, (30, 20)), (8, (160, 104))])
def test_any_scale(scale, size):
    assert make().upscale(torch.rand(1, 3, 20, 13), scale=scale).shape[-2:] == size


def test_tiny_vae_inverts_when_its_basis_is_orthonormal():
    """Windows that do not overlap and an orthonormal basis: encode, decode gives the picture back."""
    vae = TinyVAE(TinyVAEConfig(latent_channels=192))
    basis = torch.zeros(192, 3, 16, 16)
    basis[:, :, 4:12, 4:12] = torch.linalg.qr(torch.randn(192, 192))[0].view(192, 3, 8, 8)
    with torch.no_grad():
        vae.encoder.weight.copy_(basis)
    vae.std.uniform_(0.5, 2)
    x = torch.rand(1, 3, 24, 40) * 2 - 1
    z = vae.encode(x)
    assert z.shape == (1, 192, 3, 5)
    assert torch.allclose(vae.decode(z), x, atol=1e-4)


def test_save_and_load(tmp_path):
    model = make()
    save_model(tmp_path / "model.safetensors", model.cfg, model.state_dict(), note="test")
    loaded = VOSR.from_pretrained(tmp_path)
    assert loaded.cfg == model.cfg
    lq = torch.rand(1, 3, 8, 8)
    assert torch.allclose(model.upscale(lq), loaded.upscale(lq), atol=0.02)     # the file is float16
    assert torch.equal(loaded.dit.feat_rope.freqs_cos, model.dit.feat_rope.freqs_cos)


def test_loading_fails_in_one_line(tmp_path):
    model = make()
    with pytest.raises(FileNotFoundError, match="no such model"):
        VOSR.from_pretrained(tmp_path / "nothing")
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="model.safetensors") as e:
        VOSR.from_pretrained(tmp_path)
    assert "\n" not in str(e.value)
    tensors = model.dit.state_dict()
    tensors["odd"] = tensors.pop("t_block.1.bias")
    tensors["x_embedder.proj.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"missing t_block.1.bias .*unexpected odd .*mis-shaped x_embedder.proj.bias is \(3\), not \(32\)"):
        load_strictly(model.dit, tensors, "file")
