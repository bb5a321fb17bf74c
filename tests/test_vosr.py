"""Properties of VOSR's networks, guidance, tiles and files. Run: python -m pytest tests/test_vosr.py"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_release import TINY

from models.dit import DiT, DiTConfig
from models.flow import conditions, correction_rcgm, draw, guided, loss_distill, loss_flow, sample
from models.support.download import WeightError
from models.tiny import TinyDiT, TinyVAE, TinyVAEConfig, TinyVOSR, TinyVOSRConfig
from models.vit import ViT, ViTConfig
from models.vosr import VOSR
from models.support.weights import load_strictly, save_model

MANIFESTS = Path(__file__).resolve().parents[2] / "shared" / "manifests"
SMALL = TinyVOSRConfig(
    dit=DiTConfig(input_size=8, patch_size=2, in_channels=16, out_channels=8, hidden_size=32, depth=2, num_heads=2, z_dims=16),
    vit=ViTConfig(img_size=28, embed_dim=16, depth=1, num_heads=2),
    vae=TinyVAEConfig(latent_channels=8), vit_input=28, vit_layer=None, steps=2, temperature=1.0, color="adain", tile=0,
    overlap=0,
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
    """A system with another transformer; the DiTs of the tests beside it are plain ones."""
    torch.manual_seed(0)
    return awake(TinyVOSR(replace(SMALL, dit=replace(SMALL.dit, **dit))))


def make_dit(**dit):
    torch.manual_seed(0)
    return awake(DiT(replace(SMALL.dit, **dit)))


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
    dit = make_dit()
    z = inputs(1, 4, 6)[0]
    tokens = z.unflatten(2, (2, 2)).unflatten(4, (3, 2)).permute(0, 2, 4, 3, 5, 1).reshape(1, 6, -1)     # (row, column, channel)
    assert torch.equal(dit.unpatchify(tokens, 2, 3), z)


def test_first_velocity_is_zero():
    z_t, z_lq, feat = inputs()
    assert not DiT(SMALL.dit)(z_t, z_lq, feat, torch.ones(2)).any()


def test_preconditioning_is_right_for_a_gaussian():
    """Without a network: one step from noise is z_lq; at t = 0 the latent is known; and no other linear guess has a smaller loss."""
    z_t, z_lq, feat = inputs()
    dit = TinyDiT(SMALL.dit)
    assert torch.allclose(z_t - dit(z_t, z_lq, feat, torch.ones(2)), z_lq, atol=1e-6)
    assert torch.allclose(dit(z_t, z_lq, feat, torch.zeros(2)), -z_t, atol=1e-6)
    z_hq, eps = z_lq + torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8)
    for t in (0.2, 0.6):
        z_t = (1 - t) * z_hq + t * eps
        error = (dit(z_t, z_lq, feat, torch.full((2,), t)) - (eps - z_hq)).flatten()
        assert abs(torch.corrcoef(torch.stack([error, (z_t - (1 - t) * z_lq).flatten()]))[0, 1]) < 0.1


def test_guidance_one_is_no_guidance():
    dit = make_dit()
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
    one_step = make_dit(auxiliary_time_cond=True)
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
    d = draw(z_lq, torch.Generator().manual_seed(0))
    d.m = torch.tensor([0.05, 0.5])
    noised, weak, mixed, mixed_feat = conditions(z_lq, feat, d, 0.2, 0.1, (5.0, 1.0))
    assert torch.equal(mixed[0], 0.2 * z_lq[0]) and not mixed_feat[0].any()
    assert torch.equal(mixed[1], noised[1]) and torch.equal(mixed_feat[1], feat[1])


class Seen(torch.nn.Module):
    """A network that notes at which times it is called, under how much of the condition, and says 0."""

    def __init__(self):
        super().__init__()
        self.t, self.z_lq = [], []

    def forward(self, z_t, z_lq, feat, t, r=None):
        self.t.append(t), self.z_lq.append(z_lq)
        return 0 * z_t


def test_losses_draw_by_themselves():
    """Alike for equal seeds; t, r and w lie where they should, and a loss with given draws draws nothing."""
    z_hq = inputs(64)[0]
    z_lq, feat = torch.ones_like(z_hq), torch.ones(64, 4, 16)

    def seen(loss, *networks, **options):
        networks = [network() for network in networks]
        loss(*networks, z_hq, z_lq, feat, **{"generator": torch.Generator().manual_seed(3), **options})
        return networks[0]

    uniform, again = seen(loss_flow, Seen, cfg_ratio=1), seen(loss_flow, Seen, cfg_ratio=1)
    assert torch.equal(uniform.t[0], again.t[0]) and 0 < uniform.t[0].min() and uniform.t[0].max() < 1
    w = uniform.z_lq[0].unique()
    assert len(w) == 1 and 0.05 < w < 0.25          # dropped everywhere: one weak condition for the batch
    assert not seen(loss_flow, Seen, cfg_ratio=1, weak=(0, 0)).z_lq[0].any()
    lognorm = seen(loss_flow, Seen, lognorm=(0.8, 0.8)).t[0]
    assert abs(lognorm.median() - torch.sigmoid(torch.tensor(0.8))) < 0.1
    d = draw(z_hq, torch.Generator().manual_seed(3))
    assert torch.equal(seen(loss_flow, Seen, generator=None, draws=d).t[0], uniform.t[0])
    t, t_m, half = seen(loss_distill, Seen, Seen, delta=0.1).t[:3]
    assert torch.equal(t, d.t.amax(1)) and (t_m <= t).all() and (t - t_m).max() <= 0.1 + 1e-6 and (half <= t_m).all()


@pytest.mark.parametrize("N", [1, 4])
def test_rcgm_is_zero_for_the_average_velocity(N):
    """Of a flow with constant acceleration: z' = v0 + a t, whose average from t to r is v0 + a (t + r) / 2."""
    v0, a = inputs(6)[:2]
    t, r = torch.tensor([[1.0, 0.9, 0.5, 0.3, 0.302, 0.4], [0.0, 0.2, 0.1, 0.295, 0.3, 0.4]])[:, :, None, None, None]

    def u(z, t, r):
        return v0 + a * (t + r)[:, None, None, None] / 2

    z_t, t, r = torch.zeros_like(v0), t.flatten(), r.flatten()
    u_t, v = u(z_t, t, r), u(z_t, t, t)
    correction = correction_rcgm(u, z_t, t, r, u_t, v, N=N)
    assert correction.abs().max() < 0.01 * a.abs().max()        # the velocity changes by delta a on the short step
    wrong = correction_rcgm(u, z_t, t, r, u_t + 0.1, v, N=N)
    length = (t - r)[:, None, None, None]
    far = length > 0.01
    torch.testing.assert_close(wrong - correction, torch.where(far, 10 * length, 0.1).expand_as(wrong), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["shortcut", "rcgm"])
def test_distillation_reaches_only_the_student(kind):
    student, teacher = make_dit(auxiliary_time_cond=True), make_dit().requires_grad_(False)
    terms = loss_distill(student, teacher, *inputs(), torch.Generator().manual_seed(0), kind)
    assert list(terms) == ["v", "u"]
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_gradient_checkpointing_changes_nothing():
    dit = make_dit()
    grads = []
    for dit.checkpointing in (False, True):
        dit.zero_grad()
        loss_flow(dit, *inputs(), torch.Generator().manual_seed(0)).backward()
        grads.append([p.grad.clone() for p in dit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


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
    loaded = TinyVOSR.from_pretrained(tmp_path)
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
