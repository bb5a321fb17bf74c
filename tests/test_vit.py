"""Properties of the three DINOs. Run: python -m pytest tests/test_vit.py"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from cases_vosr import fill_module

from models.vit import PRESETS, DINOv3, DINOv3Config, ViT, ViTConfig, rope_table, rotate
from models.support.weights import load_strictly

MANIFESTS = Path(__file__).resolve().parents[2] / "shared" / "manifests"
OLD = ViTConfig(img_size=28, embed_dim=16, depth=3, num_heads=2)
NEW = DINOv3Config(embed_dim=48, depth=3, num_heads=3, mlp_ratio=2)
SIZES = {"dino": replace(OLD, version=1), "dinov2": OLD, "dinov3": NEW, "gated": replace(NEW, gated_mlp=True)}


def build(cfg):
    return (DINOv3 if isinstance(cfg, DINOv3Config) else ViT)(cfg)


def picture(model, h=2, w=3, B=2):
    p = model.cfg.patch_size
    return torch.randn(B, 3, h * p, w * p, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PRESETS)
def test_names_and_shapes_equal_the_public_files(name):
    if not MANIFESTS.exists():
        pytest.skip("needs ../shared/manifests")
    with torch.device("meta"):
        model = build(PRESETS[name])
    tensors = json.loads((MANIFESTS / f"{name}.json").read_text())["tensors"]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == tensors


def test_configs_of_before_mean_dinov2():
    saved = {"img_size": 518, "patch_size": 14, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    assert ViTConfig(**saved) == ViTConfig(**asdict(PRESETS["dinov2_vitb14"])) and ViTConfig(**saved).version == 2


@pytest.mark.parametrize("cfg", SIZES.values(), ids=SIZES)
def test_built_without_numbers_it_works_once_loaded(cfg):
    whole = fill_module(build(cfg))
    with torch.device("meta"):
        empty = build(cfg).eval()
    load_strictly(empty, whole.state_dict(), "test")
    assert torch.equal(empty(picture(whole)), whole(picture(whole)))


@pytest.mark.parametrize("cfg", SIZES.values(), ids=SIZES)
def test_outputs_of_blocks(cfg):
    model, old = fill_module(build(cfg)), isinstance(cfg, ViTConfig)
    x = picture(model)
    outputs = list(model.layers(x))
    assert len(outputs) == cfg.depth and not torch.equal(outputs[0], outputs[1])
    assert torch.equal(model(x), model.norm(outputs[-1])[:, old:])      # ViT drops its class token
    if not old:
        return
    for layer, tokens in enumerate(outputs):
        assert torch.equal(model(x, layer), tokens[:, 1:])
    ran = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    model(x, 1)
    assert len(ran) == 2                                        # what is not asked for is not computed


@pytest.mark.parametrize("cfg", SIZES.values(), ids=SIZES)
def test_half_precision_is_close(cfg):
    model = fill_module(build(cfg))
    x = picture(model)
    whole = model(x)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and 0 < (half - whole).abs().mean() < 0.03


def test_only_the_mask_token_does_not_learn():
    for cfg in SIZES.values():
        model = build(cfg)
        model(picture(model)).square().sum().backward()
        idle = {name for name, p in model.named_parameters() if p.grad is None}
        assert idle == {name for name, p in model.named_parameters() if not p.requires_grad}
        assert all(name.endswith("mask_token") for name in idle)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_equals_transformers(gated):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' DINOv3ViTModel")
    reference = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        patch_size=16, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, num_register_tokens=4,
        use_gated_mlp=gated, hidden_act="silu" if gated else "gelu")).eval()
    model = fill_module(DINOv3(replace(NEW, gated_mlp=gated)), "hf")
    tensors = {name: model.state_dict()[name.removeprefix("model.")] for name in reference.state_dict()}    # version 5 has a prefix
    reference.load_state_dict(tensors)
    assert len(tensors) == len(model.state_dict())
    for h, w, B in ((4, 4, 2), (2, 7, 1), (9, 3, 1), (1, 1, 1), (14, 14, 1)):
        x = picture(model, h, w, B)
        with torch.no_grad():
            tokens = model(x)
            assert torch.allclose(tokens, reference(x).last_hidden_state, atol=2e-5)
            assert model.front == 5 and tokens.shape == (B, 5 + h * w, 48)


def test_rotation_knows_only_the_way_between_two_patches():
    """Scores of equal queries and keys depend on the difference of places alone, and tokens in front are not turned."""
    h, w, hd = 4, 6, 16
    q, k = torch.randn(2, hd, generator=torch.Generator().manual_seed(0))
    rope = rope_table(h, w, hd)
    assert all(table.dtype == torch.float32 and table.shape == (h * w, hd // 2) for table in rope)
    q, k = (rotate(x.expand(1, 1, h * w, hd), *rope) for x in (q, k))
    scores = (q @ k.mT).view(h, w, h, w)
    assert torch.allclose(scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2], atol=1e-5)
    assert scores.std() > 0.1
    cos, sin = DINOv3(NEW).rope(h, w)
    assert (cos[:5] == 1).all() and not sin[:5].any() and cos.shape == (5 + h * w, 8)


def test_rows_and_columns_are_not_mixed_up():
    """A picture turned on its side, with weights turned alike, gives other tokens only by the swap of row and column frequencies."""
    cos, sin = rope_table(3, 5, 16)
    turned = rope_table(5, 3, 16)
    swap = torch.arange(15).view(3, 5).T.flatten()
    for table, other in zip((cos, sin), turned):
        row, col = table[swap].chunk(2, dim=-1)
        assert torch.allclose(torch.cat([col, row], dim=-1), other, atol=1e-6)
    assert (cos.view(3, 5, 8)[:, :, :4].std(1) < 1e-6).all() and (cos.view(3, 5, 8)[:, :, 4:].std(0) < 1e-6).all()
