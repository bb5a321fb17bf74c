"""GramSR: names of the public files, the guided combination, tiles, files. Run: python -m pytest tests/test_gramsr.py"""

import copy
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import gramsr
from models.support import weights
from models.support.precision import in_half
from models.gram import CSD_TIMES, features, gram, loss_csd, loss_gram
from models.gramsr import PRIOR, SETS, GramSR, GramSRConfig
from models.lora import adapted_layers
from models.unet import UNet, UNetConfig
from models.vae import VAEConfig
from models.vit import PRESETS, DINOv3, DINOv3Config
from models.support.weights import WeightError, read_tensors, save_model

MANIFESTS = Path(__file__).resolve().parents[2] / "shared" / "manifests"
SMALL = GramSRConfig(
    unet=UNetConfig(widths=(16, 32), num_heads=(1, 2), layers_per_block=1, context_dim=24, norm_groups=8),
    vae=VAEConfig(widths=(8, 8, 16), layers_per_block=1, norm_groups=4), vit=DINOv3Config(patch_size=8, embed_dim=16, depth=1, num_heads=2),
    ranks={"pixel": 2, "semantic": 3, "texture": 4}, tile=64, overlap=16,
)


def make(**ranks):
    """A small system whose LoRA sets do something."""
    torch.manual_seed(0)
    model = GramSR(replace(SMALL, ranks=ranks or SMALL.ranks))
    with torch.no_grad():
        for p in model.parameters_of(*SETS).values():
            p.normal_(std=0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return make()


def inputs(model, B=1, h=8, w=6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 4, h, w, generator=g), torch.randn(B, 7, model.cfg.unet.context_dim, generator=g)


def picture(H, W):
    return torch.rand(1, 3, H, W, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calls(model):
    """Batch sizes with which the UNet is called."""
    sizes = []
    hook = model.unet.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


# -----------------------------------------------------------------------------
# names


@pytest.fixture(scope="module")
def full_size():
    if not MANIFESTS.exists():
        pytest.skip("needs ../shared/manifests")
    with torch.device("meta"):
        return GramSR(GramSRConfig())


def manifest(name):
    return json.loads((MANIFESTS / f"{name}.json").read_text())


def shapes(tensors):
    return {k: list(v.shape) for k, v in tensors.items()}


def test_the_three_files_equal_the_public_ones(full_size):
    public = manifest("gramsr_model_pkl")
    assert all(len(full_size.parameters_of(name)) == 2 * 258 for name in SETS)
    assert shapes(full_size.parameters_of("pixel", "semantic")) == public["tensors"]
    texture = {k.replace(f".{gramsr.TEXTURE}", ""): v for k, v in full_size.parameters_of("texture").items()}
    assert shapes(texture) == manifest("gramsr_lora_dino")["tensors"]
    assert shapes(full_size.adapter.state_dict()) == manifest("gramsr_adapter")["tensors"]
    for place, layers in public["module_lists"].items():
        for short in ("pix", "sem"):
            assert set(adapted_layers(full_size.unet, f"default_{place}_{short}")) == set(layers)
    assert sum(p.numel() for p in full_size.parameters_of("pixel", "semantic").values()) == 8_111_424


def test_base_names_equal_the_public_ones(full_size):
    base = {k: v for k, v in full_size.unet.state_dict().items() if "lora" not in k}
    assert shapes(base) == manifest("sd_turbo_unet")["tensors"]
    assert shapes(full_size.vit.state_dict()) == manifest("dinov3_vitb16")["tensors"]
    assert shapes(full_size.vae.state_dict()) == manifest("sd_vae")["tensors"]
    with torch.device("meta"):
        assert shapes(DINOv3(PRESETS["dinov3_vits16plus"]).state_dict()) == manifest("dinov3_vits16plus")["tensors"]


def test_scales_are_two_two_and_one(full_size):
    assert full_size.unet.conv_in.s == {"default_encoder_pix": 2, "default_encoder_sem": 2, "default_unet_dino": 1}
    assert "default_others_pix" in full_size.unet.mid_block.resnets[0].conv1.s and "default_decoder_sem" in full_size.unet.conv_out.s


# -----------------------------------------------------------------------------
# guidance


def separate(model, z, context):
    """e with the first one, two, three LoRA sets on."""
    for n in range(1, len(model.cfg.ranks) + 1):
        yield model.residual(z, context, *list(SETS)[:n])


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("scales, passes", [((1, 1, 1), 1), ((1, 1, 0), 1), ((2, 0, 0), 1), ((0.5, 0.5, 0.5), 1), ((1, 0.8, 1.2), 3),
                                            ((1.5, 1.5, 0.3), 2), ((0, 0, 1), 2), ((0, 0, 0), 0)])
def test_guided_sum_equals_separate_passes(model, calls, scales, passes, B):
    """In float64, where regrouping the equation rounds nothing that counts; what has a factor of 0 takes no pass."""
    model = copy.deepcopy(model).double()
    z, context = (x.double() for x in inputs(model, B))
    guided = model.predict(z, context, scales)
    assert calls == [B] * passes
    pixel, semantic, texture = separate(model, z, context)
    expected = scales[0] * pixel + scales[1] * (semantic - pixel) + scales[2] * (texture - semantic)
    torch.testing.assert_close(guided, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(pixel, semantic, atol=1e-3) and not torch.allclose(semantic, texture, atol=1e-3)


@torch.no_grad()
def test_all_ones_are_one_pass_with_all_sets(model, calls):
    z, context = inputs(model, 2)
    assert torch.equal(model.predict(z, context), model.residual(z, context, *SETS))
    assert not torch.equal(model.predict(z, context), model.unet(z, 1, context))
    lq = picture(16, 12)
    calls.clear()
    assert torch.equal(model.upscale(lq), model.upscale(lq, pixel=1.0, semantic=1.0, texture=1.0)) and calls == [1, 1]
    assert not torch.equal(model.upscale(lq), model.upscale(lq, texture=0.2)) and calls == [1, 1, 1, 1, 1]


def test_our_files_mean_the_same_to_peft():
    """diffusers' UNet with adapters as the official script makes them, from what `release` says: ranks, layers, numbers."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    unet = UNetConfig(widths=(64, 64, 64, 64), num_heads=(1, 1, 1, 1), context_dim=24, layers_per_block=1)
    model = GramSR(replace(SMALL, unet=unet)).eval().requires_grad_(False)
    for p in model.parameters_of(*SETS).values():
        p.normal_(std=0.1)
    theirs = diffusers.UNet2DConditionModel(block_out_channels=unet.widths, attention_head_dim=unet.num_heads, layers_per_block=1,
                                            cross_attention_dim=24, use_linear_projection=True).eval()
    theirs.load_state_dict({k: v for k, v in model.unet.state_dict().items() if "lora" not in k})
    file, texture, _ = model.release().values()
    for short in ("pix", "sem"):
        for place in gramsr.PLACES:
            config = peft.LoraConfig(r=file[f"lora_rank_unet_{short}"], target_modules=file[f"unet_lora_{place}_modules_{short}"])
            theirs.add_adapter(config, adapter_name=f"default_{place}_{short}")
    layers = [k.removesuffix(".lora_A.weight") for k in texture if "lora_A" in k]
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=layers), adapter_name=gramsr.TEXTURE)
    tensors = file["state_dict_unet"] | {k.replace(".weight", f".{gramsr.TEXTURE}.weight"): v for k, v in texture.items()}
    lora = {k: p for k, p in theirs.named_parameters() if "lora" in k}
    assert lora.keys() == tensors.keys()
    z, context = inputs(model, 2, 8, 8)
    with torch.no_grad():
        for k, p in lora.items():
            p.copy_(tensors[k])
        for n, scales in enumerate([(1, 0, 0), (1, 1, 0), (1, 1, 1)], 1):
            theirs.set_adapters([adapter for name in list(SETS)[:n] for adapter in SETS[name]])
            torch.testing.assert_close(model.predict(z, context, scales), theirs(z, 1, context).sample, rtol=1e-3, atol=1e-4)


def test_missing_sets_are_passed_over():
    model = make(pixel=2)
    z, context = inputs(model)
    plain = model.predict(z, context)
    assert torch.equal(model.predict(z, context, (1, 3, 5)), plain)
    torch.testing.assert_close(model.predict(z, context, (0.5, 3, 5)), plain / 2)
    assert torch.equal(model.predict(z, context, (0, 1, 1)), torch.zeros_like(z))


def test_merged_sets_change_nothing():
    model = make()
    z, context = inputs(model)
    plain, picture_before = model.predict(z, context), model.upscale(picture(12, 9))
    model.merge()
    torch.testing.assert_close(model.predict(z, context), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.upscale(picture(12, 9)), picture_before, rtol=0, atol=1e-4)
    assert not any("lora" in k for k in model.state_dict()) and model.cfg.ranks == {} and SMALL.ranks
    half = make()
    for m in (half, twin := copy.deepcopy(half)):
        in_half(m, torch.bfloat16)
    twin.merge()
    assert {k: p.dtype for k, p in half.state_dict().items() if "lora" not in k} == {k: p.dtype for k, p in twin.state_dict().items()}


def test_a_new_set_changes_nothing():
    model = make(pixel=2)
    z, context = inputs(model)
    before, prior = model.predict(z, context), model.prior(z, 1, context)
    for name in ("semantic", "texture"):
        model.add_set(name, 3)
        torch.testing.assert_close(model.predict(z, context), before, rtol=0, atol=1e-6)
    assert model.cfg.ranks == {"pixel": 2, "semantic": 3, "texture": 3}
    assert torch.equal(model.prior(z, 1, context), prior) and not torch.allclose(prior, before, atol=1e-3)
    bare = UNet(SMALL.unet)
    bare.load_state_dict({k: v for k, v in model.unet.state_dict().items() if "lora" not in k})
    torch.testing.assert_close(bare(z, 1, context), prior)


def test_config_of_the_caller_stays_as_it_was():
    cfg = replace(SMALL, ranks={"pixel": 2})
    GramSR(cfg).add_set("semantic")
    assert cfg.ranks == {"pixel": 2}


# -----------------------------------------------------------------------------
# pictures


@pytest.mark.parametrize("H, W", [(9, 22), (16, 16), (1, 5), (23, 7)])
def test_any_rectangle(model, H, W):
    sr = model.upscale(picture(H, W))
    assert sr.shape == (1, 3, 4 * H, 4 * W) and sr.isfinite().all() and 0 <= sr.min() and sr.max() <= 1
    assert torch.equal(sr, model.upscale(picture(H, W), seed=3))        # nothing is drawn


@pytest.mark.parametrize("scale, size", [(1, (20, 13)), (1.5, (30, 20)), (8, (160, 104))])
def test_any_scale(model, scale, size):
    assert model.upscale(picture(20, 13), scale=scale).shape[-2:] == size


def test_all_tokens_become_context(model):
    assert model.tokens(torch.zeros(2, 3, 24, 40)).shape == (2, 1 + 4 + 3 * 5, 24)


def test_tiles_take_their_own_tokens(model, calls):
    lq = picture(20, 28)                                # 80 x 112 px
    whole = model.upscale(lq, tile=112)
    assert calls == [1]
    tiled = model.upscale(lq, tile=64, overlap=16)      # starts 0 16 and 0 48: four tiles in one batch
    assert calls == [1, 4] and tiled.shape == whole.shape and not torch.equal(whole, tiled)
    x, seen = 2 * picture(80, 112) - 1, []
    model.tokens, tokens = lambda crops: seen.append(crops) or tokens(crops), model.tokens
    try:
        model.restore(model.vae.encode(x), x, (1, 1, 1), 64, 16)
    finally:
        del model.tokens
    assert seen[0].shape == (4, 3, 64, 64) and torch.equal(seen[0][3], x[0, :, -64:, -64:])


def test_tiles_of_a_constant_residual_equal_the_whole(model, monkeypatch):
    monkeypatch.setattr(model, "predict", lambda z, context, scales: 0.1 * z)
    x = 2 * picture(96, 128) - 1
    z = model.vae.encode(x)
    torch.testing.assert_close(model.restore(z, x, (1, 1, 1), 64, 16), 0.9 * z)


def test_half_precision_is_close(model):
    lq = picture(16, 12)
    whole = model.upscale(lq, texture=0.5, color="none")
    half = make().to(torch.bfloat16).upscale(lq, texture=0.5, color="none")
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().mean() < 0.02


# -----------------------------------------------------------------------------
# losses


def test_training_forward_and_gradients():
    """One set learns and the token adapter with it; everything else stays without a gradient."""
    model = make()
    learning = [*model.parameters_of("semantic").values(), *model.adapter.parameters()]
    for p in learning:
        p.requires_grad_()
    x = 2 * torch.rand(2, 3, 32, 48) - 1
    sr, z, context = model(x)
    assert sr.shape == x.shape and z.shape == (2, 4, 8, 12) and sr.min() >= -1 and sr.max() <= 1
    vit = DINOv3(DINOv3Config(patch_size=8, embed_dim=12, depth=1, num_heads=3, gated_mlp=True)).requires_grad_(False)
    t, noise = torch.randint(*CSD_TIMES, (2,)), torch.randn(z.shape)
    loss = loss_csd(model.prior, z, t, noise, context.detach(), torch.zeros_like(context)) + loss_gram(features(vit, sr), features(vit, x))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in learning}


def test_csd_is_silent_without_guidance():
    """With guidance 1, or contexts that say the same, there is nothing to distil; and its gradient is 2 g / numel."""
    model = make()
    z, context = inputs(model, 2)
    args = (torch.tensor([137, 431]), torch.randn(z.shape))
    assert loss_csd(model.prior, z, *args, context, context) < 1e-10
    once = loss_csd(model.prior, z, *args, context, 0 * context, guidance=2)
    assert once > 0 and loss_csd(model.prior, z, *args, context, 0 * context, guidance=0) == 0
    z.requires_grad_()
    loss = loss_csd(model.prior, z, *args, context, 0 * context)
    g = torch.autograd.grad(loss, z)[0] * z.numel() / 2
    torch.testing.assert_close(g.square().mean(), loss.detach())


def test_gram_forgets_rotations():
    x, y = torch.randn(2, 2, 10, 6)
    Q = torch.linalg.qr(torch.randn(6, 6))[0]
    assert loss_gram(x @ Q, x) < 1e-10 and loss_gram(x, y) > 1e-2
    assert loss_gram(x * torch.rand(2, 10, 1), x) < 1e-10                               # and lengths,
    assert loss_gram(x * torch.rand(2, 10, 1), x, normalise=False) > 1e-2               # if told to
    assert loss_gram(x[:, torch.randperm(10)], x, channels=True) < 1e-10                # channels x channels forgets places
    assert gram(x).shape == (2, 10, 10) and gram(x, channels=True).shape == (2, 6, 6) and gram(x, positive=True).min() == 0


# -----------------------------------------------------------------------------
# files


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A folder with the public networks at tiny size and what a small model writes for step 7. -> (folder, model)"""
    monkeypatch.setattr(gramsr, "GramSRConfig", partial(GramSRConfig, unet=SMALL.unet, vae=SMALL.vae, vit=SMALL.vit, tile=64, overlap=16))
    model = make()
    for network, name in PRIOR.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        tensors = getattr(model, network).state_dict()
        save_file({k: v for k, v in tensors.items() if "lora" not in k}, tmp_path / name)
    model.save_release(tmp_path, 7)
    return tmp_path, model


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_public_files_round_trip(release):
    folder, model = release
    assert {p.name for p in folder.iterdir() if p.is_file()} == {"model_7.pkl", "lora_weights_dino_7.safetensors", "adapter_7.pth"}
    loaded = GramSR.from_pretrained(folder)
    assert loaded.cfg.ranks == SMALL.ranks and same(loaded, model)
    torch.testing.assert_close(loaded.upscale(picture(9, 14)), model.upscale(picture(9, 14)), rtol=0, atol=1e-5)
    layout = {f"unet_lora_{place}_modules_{s}" for place in ("encoder", "decoder", "others") for s in ("pix", "sem")}
    assert read_tensors(folder / "model_7.pkl").keys() == layout | {"lora_rank_unet_pix", "lora_rank_unet_sem", "state_dict_unet"}
    assert "conv_in.lora_A.weight" in read_tensors(folder / "lora_weights_dino_7.safetensors")


def test_the_name_gramsr_fetches(release, monkeypatch, tmp_path_factory):
    folder, model = release

    def fetch(name):
        return folder / name.replace("12501", "7").replace("53001", "7")

    monkeypatch.setattr(gramsr, "fetch", fetch)
    monkeypatch.setattr(weights, "fetch", fetch)
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    assert same(GramSR.from_pretrained(), model)


def test_the_last_step_counts_and_strangers_in_the_pkl_do_not(release):
    folder, model = release
    later = make()
    with torch.no_grad():
        later.adapter[0].bias += 1
    later.save_release(folder, 12501)
    (folder / "model_12501.pkl").unlink()
    file = read_tensors(folder / "model_7.pkl")
    file["state_dict_unet"] |= {"conv_in.lora_A.default_unet_dino.weight": torch.zeros(9), "conv_in.bias": torch.zeros(9)}
    torch.save(file, folder / "model_7.pkl")
    assert same(GramSR.from_pretrained(folder), later) and not same(later, model)


@pytest.mark.parametrize("sets", [["pixel"], ["pixel", "semantic"]])
def test_unfinished_training_round_trip(release, sets):
    folder, _ = release
    model = make(**{name: 2 for name in sets})
    model.save_release(folder, 8)
    assert not (folder / "lora_weights_dino_8.safetensors").exists()
    loaded = GramSR.from_pretrained(folder)         # the texture set of step 7 is not this model's
    assert list(loaded.cfg.ranks) == sets and same(loaded, model)


def test_our_file_round_trip(tmp_path):
    model = make(pixel=2, semantic=2)
    save_model(tmp_path / "model.safetensors", model.cfg, model.state_dict())
    for name in (tmp_path, tmp_path / "model.safetensors"):
        loaded = GramSR.from_pretrained(name)
        assert json.dumps(asdict(loaded.cfg)) == json.dumps(asdict(model.cfg))
        torch.testing.assert_close(loaded.upscale(picture(8, 8)), model.upscale(picture(8, 8)), rtol=0, atol=0.02)      # the file is float16


def spoil(path, edit):
    tensors = read_tensors(path)
    edit(tensors)
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)


@pytest.mark.parametrize("file, edit, message", [
    ("model_7.pkl", lambda d: d.pop("state_dict_unet"), r"model_7.pkl: is not laid out as model_12501.pkl \(KeyError"),
    ("model_7.pkl", lambda d: d["state_dict_unet"].pop("conv_in.lora_B.default_encoder_sem.weight"), r"missing conv_in.lora_B.default_encoder_sem"),
    ("model_7.pkl", lambda d: d.update(lora_rank_unet_pix=3), r"mis-shaped conv_in.lora_A.default_encoder_pix.weight is \(2, 4, 3, 3\), not \(3, 4"),
    ("lora_weights_dino_7.safetensors", lambda d: d.pop("conv_out.lora_A.weight"), r"dino_7.safetensors.*missing conv_out.lora_A.default_unet_dino"),
    ("lora_weights_dino_7.safetensors", lambda d: d.update(odd=torch.zeros(1)), r"unexpected odd"),
    ("adapter_7.pth", lambda d: d.update({"2.bias": torch.zeros(3)}), r"adapter_7.pth.*mis-shaped 2.bias is \(3\), not \(24\)"),
])
def test_damaged_files_are_told_in_one_line(release, file, edit, message):
    folder, _ = release
    spoil(folder / file, edit)
    with pytest.raises(WeightError, match=message) as e:
        GramSR.from_pretrained(folder)
    assert "\n" not in str(e.value)


def test_missing_files_are_told_in_one_line(release):
    folder, _ = release
    (folder / "lora_weights_dino_7.safetensors").unlink()
    with pytest.raises(WeightError, match="model_7.pkl: needs lora_weights_dino_53001.safetensors"):
        GramSR.from_pretrained(folder)
    (folder / "model_7.pkl").unlink()
    for name in (folder, "gram-sr"):
        with pytest.raises(FileNotFoundError, match="no such model; name gramsr"):
            GramSR.from_pretrained(name)


def test_a_model_of_another_system_is_told_in_one_line(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"config": '{"dit": {}}'})
    for name in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match="its config is not one of GramSR"):
            GramSR.from_pretrained(name)
