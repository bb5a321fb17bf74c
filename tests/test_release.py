"""The public models, tiny and random: fetched, loaded, upscaling, all their knobs, broken files.

Run: python -m pytest tests/test_release.py
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file
from test_qwen_vae import video_form

import sample
from models.clip import TextConfig
from models.dit import DiTConfig
from models.support.imaging import pad_to_multiple, resize, wavelet, write_picture
from models.support.tiles import AT_ONCE, tile_boxes, tile_weight
from models.qwen_vae import QwenVAEConfig
from models.s3diff import S3Diff, S3DiffConfig
from models.unet import UNetConfig
from models.vae import VAEConfig
from models.vit import ViTConfig
from models.vosr import SIZES, VOSR, VOSRConfig
from models.support.weights import FILES, WeightError, fetch
from release import (ARGS, CLIP, DINO_B, DINO_L, FOLDERS, LIGHT, QWEN_VAE, SD_TURBO, SD_VAE, Hub, contents, rows,
                     write_release)

TINY = {
    "0.5b": VOSRConfig(
        dit=DiTConfig(hidden_size=64, depth=2, num_heads=2, z_dims=32),
        vit=ViTConfig(img_size=70, embed_dim=32, depth=3, num_heads=2),
        vae=VAEConfig(widths=(32, 32, 64, 64), layers_per_block=1),
        light_decoder={"block_out_channels": [32, 32, 32, 64], "layers_per_block": 1},
        vit_input=56, vit_layer=1, tile=512),
    "1.4b": VOSRConfig(
        dit=DiTConfig(in_channels=32, out_channels=16, hidden_size=96, depth=3, num_heads=3, z_dims=48),
        vit=ViTConfig(img_size=70, embed_dim=48, depth=4, num_heads=3), vae=QwenVAEConfig(base_dim=8), vit_input=56,
        vit_layer=2, tile=512),
}
DIT = {model: f"{folder}/checkpoints/ema_model.safetensors" for model, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The authors' folder with all four models."""
    root = tmp_path_factory.mktemp("release")
    with pytest.MonkeyPatch.context() as patch:
        for size, cfg in TINY.items():
            patch.setitem(SIZES, size, cfg)
        write_release(root, *FOLDERS)
    return root


@pytest.fixture(autouse=True)
def hub(release, tmp_path, monkeypatch):
    """A hub with that release, empty caches, and a table and sizes that fit it."""
    for size, cfg in TINY.items():
        # as the public one: the file knows better
        monkeypatch.setitem(SIZES, size, replace(cfg, light_decoder=cfg.light_decoder and {}))
    for name, row in rows().items():
        monkeypatch.setitem(FILES, name, row)
    hub = Hub(release)
    for name, value in hub.environment(tmp_path / "caches").items():
        monkeypatch.setenv(name, value)
    yield hub
    hub.shutdown(), hub.server_close()


@pytest.fixture
def own(release, tmp_path):
    """A copy of the release on the user's disk, to change."""
    yield Path(shutil.copytree(release, tmp_path / "own"))
    shutil.rmtree(tmp_path / "own")     # pytest would keep a hundred of them


def picture(height=40, width=37):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def change(path, **new):
    """Tensors of a .safetensors file replaced, added, or (None) removed."""
    tensors = load_file(path) | {name.replace("__", "."): x for name, x in new.items()}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)


# -----------------------------------------------------------------------------
# by name, from the hub


@pytest.mark.parametrize("name", FOLDERS)
def test_by_name(hub, name):
    """Every file that is needed comes once; the pictures have the right size and depend on the seed alone."""
    model = VOSR.from_pretrained(name)
    assert sorted(hub.seen) == sorted([*contents(name), f"{FOLDERS[name]}/args.json"])
    assert (model.cfg.steps, model.cfg.guidance, model.cfg.weak) == ((1, 1.0, 0.15) if name.endswith(("1step", "2"))
                                                                     else (25, 0.5, 0.15))
    assert not model.training and not any(x.is_meta for x in model.state_dict().values())
    del hub.seen[:]
    again, steps = VOSR.from_pretrained(name), min(model.cfg.steps, 3)
    assert hub.seen == []
    for H, W in ((96, 40), (37, 53)):
        lq = picture(H, W)
        whole, tiled = (model.upscale(lq, steps=steps, tile=tile) for tile in (0, 128))
        assert all(sr.shape == (1, 3, 4 * H, 4 * W) and sr.isfinite().all() and 0 <= sr.min() and sr.max() <= 1
                   for sr in (whole, tiled))
        assert whole.std() > 0.1 and (whole - tiled).abs().mean() > 1e-3
    assert torch.equal(whole, again.upscale(lq, steps=steps))
    assert (whole - again.upscale(lq, steps=steps, seed=1)).abs().mean() > 1e-3


@pytest.mark.parametrize("name", ["vosr-0.5b", "vosr-1.4b-1step"])
def test_numbers_are_those_of_the_files(release, name):
    """All of them, but for Stable Diffusion's own decoder, under the names that they have today."""
    model, parts = VOSR.from_pretrained(name), contents(name)
    found = {network: module.state_dict() for network, module in model.named_children()}
    published = {"dit": load_file(release / DIT[name]),
                 "vit": torch.load(release / (DINO_B if SD_VAE in parts else DINO_L))}
    assert all(torch.equal(found[network][key], x) for network, tensors in published.items() for key,
               x in tensors.items())
    if SD_VAE in parts:
        light, vae = torch.load(release / LIGHT), load_file(release / SD_VAE)
        attention = "encoder.mid_block.attentions.0."
        assert all(torch.equal(found["light_decoder"][key], x) for key, x in light["model_state_dict"].items())
        assert not any(key.startswith(("decoder.", "post_quant_conv.")) for key in found["vae"])
        assert "decoder.conv_in.weight" in vae
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            assert torch.equal(found["vae"][f"{attention}{new}.weight"], vae[f"{attention}{old}.weight"])
    else:
        assert all(torch.equal(found["vae"][key], x) for key, x in load_file(release / QWEN_VAE).items())


def test_interrupted_download_goes_on(hub, release, tmp_path):
    name, whole = DIT["vosr-0.5b"], release / DIT["vosr-0.5b"]
    part = tmp_path / "caches" / "nanosr" / f"{name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(whole.read_bytes()[:500_000])
    Path(f"{part}.of").write_text(f'"{whole.stat().st_mtime_ns:x}"')
    assert fetch(name).read_bytes() == whole.read_bytes() and hub.sent == whole.stat().st_size - 500_000


def test_other_network_under_a_public_name(hub, release):
    """A cached file that is no public model is named; one-step or not is decided by its tensors."""
    VOSR.from_pretrained("vosr-0.5b")
    cached = Path(os.environ["NANOSR_CACHE"]) / DIT["vosr-0.5b"]
    shutil.copy(release / DIT["vosr-0.5b-1step"], cached)
    assert VOSR.from_pretrained("vosr-0.5b").cfg.steps == 1
    shutil.copy(release / DIT["vosr-1.4b"], cached)
    assert "does not fit this network" in refused("vosr-0.5b", cached)


# -----------------------------------------------------------------------------
# from folders in the authors' layout


def refused(model, path, *words):
    """The error of a model that cannot be loaded, one line that begins with the file's path and has these words."""
    with pytest.raises((OSError, ValueError)) as e:
        VOSR.from_pretrained(str(model))
    text = str(e.value)
    assert "\n" not in text and text.startswith(f"{path}: ") and all(word in text for word in words), text
    return text


@pytest.mark.parametrize("weights, model", [
    ("checkpoints/ema_model.safetensors", "."),                             # as published
    ("checkpoints/ema_model.safetensors", "checkpoints"),
    ("checkpoints/ema_model.safetensors", "checkpoints/ema_model.safetensors"),
    ("ema_model.safetensors", "."),
    ("model.safetensors", "."),
    # as their training leaves it
    ("checkpoints/checkpoint-00005000/clean_weights/model.safetensors", "checkpoints/checkpoint-00005000"),
    ("checkpoints/checkpoint-00005000/clean_weights/model.safetensors",
     "checkpoints/checkpoint-00005000/clean_weights"),
    ("checkpoints/checkpoint-00005000/clean_weights/model.safetensors", "."),
    ("a/b/c/d/ema_model.safetensors", "a/b/c/d"),                           # args.json four folders above
    ("a/b/c/d/ema_model.safetensors", "a/b/c/d/ema_model.safetensors"),
    ("a/b/c/d/e/ema_model.safetensors", "a/b/c/d"),                         # the only .safetensors below the folder
])  # fmt: skip
def test_folders(hub, own, weights, model):
    """Wherever the weights lie: args.json is found above them and the frozen networks beside it, without a request."""
    folder = own / "VOSR_0.5B_os"
    (folder / weights).parent.mkdir(parents=True, exist_ok=True)
    (own / DIT["vosr-0.5b-1step"]).rename(folder / weights)
    (folder / "args.json").write_text(json.dumps(ARGS | {"weak_cond_strength_aelq_list": [0.1, 0.3]}))
    assert VOSR.from_pretrained(str(folder / model)).cfg.weak == pytest.approx(0.2) and hub.seen == []


def test_args_five_folders_above_are_not_found(hub, own):
    """Then nothing says where the release is, and the frozen networks come from the hub."""
    deep = own / "VOSR_0.5B_ms" / "a/b/c/d/e"
    deep.mkdir(parents=True)
    (own / DIT["vosr-0.5b"]).rename(deep / "model.safetensors")
    (own / "VOSR_0.5B_ms" / "args.json").write_text(json.dumps(ARGS | {"weak_cond_strength_aelq_list": [0.1, 0.3]}))
    assert VOSR.from_pretrained(str(deep)).cfg.weak == 0.15 and sorted(hub.seen) == sorted([SD_VAE, LIGHT, DINO_B])


def test_order_of_the_official_loader(own):
    """clean_weights, checkpoints, the folder; in each, the average before the last step; then what else is there."""
    order = [f"{place}{file}.safetensors" for place in ("clean_weights/", "checkpoints/", "")
             for file in ("ema_model", "model")]
    folder, order = own / "VOSR_0.5B_ms", [*order, "elsewhere/x.safetensors"]
    for n, name in enumerate(order):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(own / DIT["vosr-0.5b-1step"], folder / name)
        change(folder / name, final_layer__linear__bias=torch.full((16,), float(n)))
    for n, name in enumerate(order):
        assert VOSR.from_pretrained(str(folder)).dit.final_layer.linear.bias[0] == n, name
        (folder / name).unlink()
    assert "no such model" in refused(folder, folder)


def test_frozen_networks_of_the_release_are_used(hub, own, release):
    """Not those of the caches, which may be another version."""
    VOSR.from_pretrained("vosr-0.5b")
    del hub.seen[:]
    change(own / SD_VAE, quant_conv__bias=torch.zeros(8))
    (own / DINO_B).unlink()
    assert not VOSR.from_pretrained(str(own / "VOSR_0.5B_ms")).vae.quant_conv.bias.any()
    assert VOSR.from_pretrained(str(release / "VOSR_0.5B_ms")).vae.quant_conv.bias.all() and hub.seen == []


@pytest.mark.parametrize("name", FOLDERS)
def test_rotary_tables_need_not_be_there(own, release, name):
    change(own / DIT[name], feat_rope__freqs_cos=None, feat_rope__freqs_sin=None)
    lq = picture(16, 16)
    with_tables, without = (VOSR.from_pretrained(str(root / FOLDERS[name])).upscale(lq, scale=8, steps=1, color="none")
                            for root in (release, own))
    assert torch.allclose(with_tables, without, atol=1e-5)     # not equal: the tensors begin at other addresses


@pytest.mark.parametrize("name, steps, guidance", [("vosr-0.5b", 25, 0.5), ("vosr-0.5b-1step", 1, 1.0)])
def test_second_time_is_decided_by_the_tensors(own, name, steps, guidance):
    """Whatever the folder is called and args.json says of it."""
    folder = own / ("VOSR_0.5B_os" if name == "vosr-0.5b" else "VOSR_0.5B_ms")
    shutil.copy(own / DIT[name], folder / "checkpoints/ema_model.safetensors")
    (folder / "args.json").write_text(json.dumps(ARGS | {"auxiliary_time_cond": name == "vosr-0.5b"}))
    model = VOSR.from_pretrained(str(folder))
    assert (model.cfg.steps, model.cfg.guidance, model.dit.r_embedder is None) == (steps, guidance, name == "vosr-0.5b")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("model", ["vosr-2", "VOSR2"])
def test_vosr_2(own, monkeypatch, model, wrapped):
    """The multi-step 1.4B's tensors, by name or in others' copy: the picture is decoded from z - v(z, 1)."""
    if wrapped:
        tensors = {f"module._orig_mod.{k}": v for k, v in load_file(own / DIT["vosr-2"]).items()}
        save_file(tensors | {"n_averaged": torch.tensor(7)}, own / DIT["vosr-2"])
    monkeypatch.setenv("NANOSR_CACHE", str(own))
    model, lq = VOSR.from_pretrained(str(own / model) if model == "VOSR2" else model), picture(24, 18)
    assert (model.cfg.steps, model.cfg.guidance, model.dit.r_embedder, model.cfg.tile) == (1, 1.0, None, 512)
    with torch.no_grad():
        lq_up = resize(lq, (96, 72))
        x = pad_to_multiple(2 * lq_up - 1, 16)
        z_lq = model.vae.encode(x)          # the mode, no number is drawn for it
        z = torch.randn(z_lq.shape, generator=torch.Generator().manual_seed(5))
        v = model.dit(z, z_lq, model.tokens(x), torch.ones(1))
        plain = wavelet((model.vae.decode(z - v).clamp(-1, 1) / 2 + 0.5)[..., :96, :72], lq_up)
    assert v.std() > 0.1
    torch.testing.assert_close(model.upscale(lq, seed=5), plain, rtol=0, atol=1e-5)
    for knob in ({"guidance": 0.5}, {"weak": 0.2}, {"guidance": 1}):
        with pytest.raises(WeightError, match="no effect on VOSR 2.0.*leave them out"):
            model.upscale(lq, **knob)
    assert all(not {"guidance", "weak"} & set(turned) for row in model.SWEEP for turned in row)


@pytest.mark.parametrize("name", ["vosr-0.5b-1step", "vosr-1.4b"])
def test_defaults_of_today(name):
    """The posterior's mode, Pillow's bicubic on 8 bits, wavelet colours, for all public models."""
    model, lq = VOSR.from_pretrained(name), picture(24, 24)
    seen = []
    model.vae.encode = lambda x, *generator: seen.append((x, generator)) or type(model.vae).encode(model.vae, x)
    sr = model.upscale(lq, steps=1, guidance=1)
    (x, generator), = seen
    assert generator == () and torch.equal(x, 2 * resize(lq, (96, 96)) - 1)
    assert torch.equal(sr, model.upscale(lq, steps=1, guidance=1, color="wavelet"))
    assert not torch.equal(sr, model.upscale(lq, steps=1, guidance=1, color="adain"))


def test_args_are_believed(own):
    """Settings of somebody's own training; what they say of the networks beside the tensors is not in those."""
    path = own / "VOSR_0.5B_ms" / "args.json"
    said = {"dinov2_size": 28, "layer_dinov2b_list": [0], "resolution": 512, "infer_steps": 7, "cfg_scale": -0.5,
            "use_rope": True}
    path.write_text(json.dumps(ARGS | said))
    model = VOSR.from_pretrained(str(path.parent))
    cfg = model.cfg
    assert (cfg.vit_input, cfg.vit_layer, cfg.tile, cfg.steps, cfg.guidance) == (28, 0, 512, 7, -0.5)
    assert model.tokens(2 * picture(32, 32) - 1).shape[1] == 4
    change(own / DIT["vosr-0.5b"], feat_rope__freqs_cos=None, feat_rope__freqs_sin=None)
    path.write_text(json.dumps(ARGS | said | {"resolution": 256, "layer_dinov2b_list": [-1, 1]}))
    cfg = VOSR.from_pretrained(str(path.parent)).cfg
    assert (cfg.dit.input_size, cfg.tile, cfg.vit_layer) == (32, 256, None)     # -1: the last block's, with the norm


@pytest.mark.parametrize("name, value", [
    ("use_qknorm", False), ("use_swiglu", False), ("use_rope", False), ("use_rmsnorm", False), ("wo_shift", True),
    ("mlp_ratio", 3), ("resolution", 256)])
def test_args_that_cannot_be_followed(own, name, value):
    path = own / "VOSR_0.5B_ms" / "args.json"
    path.write_text(json.dumps(ARGS | {name: value}))
    refused(path.parent, path, f"{name} is {value!r}, which cannot be followed here")


@pytest.mark.parametrize("name, value", [("dinov2_size", "a"), ("layer_dinov2b_list", []), ("layer_dinov2b_list", 1),
                                         ("infer_steps", None), ("cfg_scale", "a")])
def test_args_that_are_no_numbers(own, name, value):
    path = own / "VOSR_0.5B_ms" / "args.json"
    path.write_text(json.dumps(ARGS | {name: value}))
    refused(path.parent, path, "is not laid out as args.json")


@pytest.mark.parametrize("setting, weak", [([0.05, 0.25], 0.15), ([0.1, 0.3], 0.2), ([0.4], 0.4), ([], 0.15),
                                           (None, 0.15)])
def test_weak_strength_of_args(own, setting, weak):
    (own / "VOSR_1.4B_ms" / "args.json").write_text(json.dumps({"weak_cond_strength_aelq_list": setting}))
    assert VOSR.from_pretrained(str(own / "VOSR_1.4B_ms")).cfg.weak == pytest.approx(weak)


def test_video_autoencoder_of_qwen(own, release):
    """The file of Qwen-Image itself in place of the authors' copy."""
    torch.manual_seed(0)
    video = video_form(load_file(release / QWEN_VAE))
    assert any(x.ndim == 5 for x in video.values()) and any("time_conv" in name for name in video)
    save_file({name: x.contiguous() for name, x in video.items()}, own / QWEN_VAE)
    ours, theirs = (VOSR.from_pretrained(str(root / "VOSR_1.4B_os")).upscale(picture(16, 20))
                    for root in (release, own))
    assert torch.equal(ours, theirs)


# -----------------------------------------------------------------------------
# broken files


def rewrite(path, edit):
    """Change the tensors of any weight file of the release by edit(dict of tensors), in place."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        edit(tensors)
        return save_file(tensors, path)
    content = torch.load(path)
    edit(content.get("model_state_dict", content))
    torch.save(content, path)


def missing(tensors, name):
    del tensors[name]


def unexpected(tensors, name):
    tensors[f"{name}.odd"] = torch.zeros(1)


def misshaped(tensors, name):
    tensors[name] = torch.zeros(99)


@pytest.mark.parametrize("fault", [missing, unexpected, misshaped])
@pytest.mark.parametrize("model, file, tensor", [
    ("VOSR_0.5B_ms", DIT["vosr-0.5b"], "blocks.1.cross_attn.k_norm.weight"), ("VOSR_1.4B_os", DIT["vosr-1.4b-1step"],
                                                                              "r_embedder.mlp.2.bias"),
    ("VOSR_0.5B_ms", SD_VAE, "encoder.mid_block.attentions.0.query.bias"),
    ("VOSR_0.5B_ms", SD_VAE, "quant_conv.weight"),
    ("VOSR_0.5B_ms", LIGHT, "up_blocks.3.resnets.0.conv1.weight"), ("VOSR_0.5B_ms", DINO_B, "mask_token"),
    ("VOSR_1.4B_os", QWEN_VAE, "decoder.up_blocks.1.upsamplers.0.resample.1.bias"),
    ("VOSR_1.4B_os", DINO_L, "blocks.3.ls2.gamma"),
])  # fmt: skip
def test_tensor_that_does_not_fit(own, model, file, tensor, fault):
    rewrite(own / file, lambda tensors: fault(tensors, tensor))
    kind = {"missing": "missing", "unexpected": "unexpected", "misshaped": "mis-shaped"}[fault.__name__]
    today = tensor.replace("query", "to_q")
    refused(own / model, own / file, f"{kind} {today}" if fault is not unexpected else f"{kind} {tensor}.odd")


@pytest.mark.parametrize("tensor", ["x_embedder.proj.weight", "layer_norm.weight", "mlp_ca.fc1.weight",
                                    "blocks.0.attn.q_norm.weight",
                                    "r_embedder.mlp.0.weight", "final_layer.linear.weight"])
@pytest.mark.parametrize("model", [".", "by name"])
def test_sizes_cannot_be_read_off(own, release, monkeypatch, tensor, model):
    """Tensors that sizes are read off: without one there are no sizes, a mis-shaped one makes another network."""
    path = own / DIT["vosr-0.5b-1step"]
    if model == "by name":
        monkeypatch.setenv("NANOSR_CACHE", str(own))
    for fault in (missing, misshaped):
        shutil.copy(release / DIT["vosr-0.5b-1step"], path)
        rewrite(path, lambda tensors: fault(tensors, tensor))
        refused(path if model == "." else "vosr-0.5b-1step", path)


PICKLES = (
    ["a", 1], {1: torch.zeros(1)}, {"epoch": 3, "model": {"cls_token": torch.zeros(1)}}, {"model_state_dict": [1, 2]},
    {"model_state_dict": {"conv_in.weight": "x"}}, {"config": 3}, {"config": {"in_channels": "four"}},
    {"config": {"block_out_channels": [48]}},
)  # fmt: skip


@pytest.mark.parametrize("model, file", [("VOSR_0.5B_ms", DIT["vosr-0.5b"]), ("VOSR_0.5B_ms", SD_VAE),
                                         ("VOSR_0.5B_ms", LIGHT),
                                         ("VOSR_0.5B_ms", DINO_B), ("VOSR_1.4B_os", QWEN_VAE)])
def test_wrong_file(own, model, file):
    """Nothing at all, the pointer that git leaves in place of a large file, half a file, and pickles of all sorts."""
    data = (own / file).read_bytes()
    for wrong in (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", data[: len(data) // 2]):
        (own / file).write_bytes(wrong)
        refused(own / model, own / file)
    for wrong in PICKLES if file.endswith(".pth") else PICKLES[:1]:
        torch.save(wrong, own / file)
        refused(own / model, own / file)


@pytest.mark.parametrize("model, file, other", [
    ("VOSR_0.5B_ms", DIT["vosr-0.5b"], SD_VAE), ("VOSR_0.5B_ms", SD_VAE, DIT["vosr-0.5b"]),
    ("VOSR_0.5B_ms", SD_VAE, QWEN_VAE),
    ("VOSR_0.5B_ms", LIGHT, DINO_B), ("VOSR_0.5B_ms", DINO_B, LIGHT), ("VOSR_0.5B_ms", DINO_B, DINO_L),
    ("VOSR_1.4B_ms", QWEN_VAE, SD_VAE),
    ("VOSR_1.4B_ms", DINO_L, DINO_B),
])  # fmt: skip
def test_files_mixed_up(own, release, model, file, other):
    shutil.copy(release / other, own / file)
    refused(own / model, own / file)


def test_broken_args(own):
    path = own / "VOSR_0.5B_ms" / "args.json"
    no_numbers = (b'{"weak_cond_strength_aelq_list": %s}' % value for value in (b"0.15", b'["a"]', b"[null]", b'"ab"'))
    for text in (b"", b"{", b"\xff", b"[1, 2]", b"3", b'"x"', *no_numbers):
        path.write_bytes(text)
        refused(own / "VOSR_0.5B_ms", path)


def test_light_decoder_has_the_sizes_of_its_file(own):
    """Of which only the four that the official code reads count."""
    light = torch.load(own / LIGHT)
    torch.save(light | {"config": light["config"] | {"norm_num_groups": 32, "learning_rate": 1e-4}, "step": 100},
               own / LIGHT)
    assert len(VOSR.from_pretrained(str(own / "VOSR_0.5B_ms")).light_decoder.up_blocks[0].resnets) == 2
    torch.save(light | {"config": light["config"] | {"layers_per_block": 2}}, own / LIGHT)
    refused(own / "VOSR_0.5B_ms", own / LIGHT, "missing up_blocks.0.resnets.2")


def test_command(own, tmp_path, monkeypatch, capsys):
    """sample.py with a folder: the picture and status 0, or one line and status 1."""
    monkeypatch.chdir(tmp_path)
    write_picture("lq.png", picture(16, 20))
    command = ["lq.png", "--device", "cpu", "--model", str(own / "VOSR_0.5B_os")]
    assert sample.main(command) == 0 and Path("out/lq.png").exists() and capsys.readouterr().err == ""
    (own / LIGHT).write_text("no")
    with pytest.raises(SystemExit) as e:
        sample.main(command)
    assert isinstance(e.value.code, str), "Python prints it and ends with status 1"
    assert e.value.code.startswith(f"sample.py: {own / LIGHT}: ") and "\n" not in e.value.code


# -----------------------------------------------------------------------------
# what the knobs do, and what the cache may not do


@pytest.mark.parametrize("size", ["0.5b", "1.4b"])
def test_knobs(size):
    """Each changes a multi-step result, but for the weak strength where guidance does not use it."""
    model, lq = VOSR.from_pretrained(f"vosr-{size}"), picture()
    base = dict(steps=3, guidance=0.5, weak=0.15, tile=96, overlap=0, color="none")
    first = model.upscale(lq, **base)
    assert torch.equal(first, model.upscale(lq, **base))
    for knob in ({"steps": 4}, {"guidance": 0.4}, {"guidance": -0.5}, {"weak": 0.3}, {"temperature": 0.5},
                 {"tile": 112}, {"tile": 0},
                 {"overlap": 64}):  # fmt: skip
        assert (model.upscale(lq, **base | knob) - first).abs().mean() > 1e-3, knob
    assert torch.equal(model.upscale(lq, **base | {"guidance": 1, "weak": 0.3}),
                       model.upscale(lq, **base | {"guidance": 1}))
    # the checkpoint's own
    assert torch.equal(model.upscale(lq, steps=25), model.upscale(lq, guidance=0.5, weak=0.15, tile=512))


def plain_restore(model, z_lq, x, eps, steps, guidance, weak, tile=0, overlap=0):
    """VOSR.restore without its short cuts: no cache, tokens of zero in place of a blind branch, one tile at a time."""
    dit, f = model.dit, model.vae.factor
    h, w = z_lq.shape[-2:]
    boxes = tile_boxes(h, w, tile // f, max(overlap // f, tile // f // 8))
    feats = [model.tokens(x[..., f * row.start : f * row.stop, f * col.start : f * col.stop]) for row, col in boxes]
    z = eps
    for step in range(steps):
        total, weights = torch.zeros_like(z), torch.zeros_like(z)
        for (row, col), feat in zip(boxes, feats):
            tile_z, tile_lq, t = z[..., row, col], z_lq[..., row, col], torch.full((2,), 1 - step / steps)
            v_cond, v_weak = dit(torch.cat([tile_z, tile_z]), torch.cat([tile_lq, weak * tile_lq]),
                                 torch.cat([feat, 0 * feat]), t).chunk(2)
            window = tile_weight(*tile_z.shape[-2:])
            total[..., row, col] += window * (v_weak + guidance * (v_cond - v_weak))
            weights[..., row, col] += window
        z = z - total / weights / steps
    return z


@pytest.mark.parametrize("size", ["0.5b", "1.4b"])
@pytest.mark.parametrize("tile, tiles", [(512, 1), (96, 4), (64, 9)])
def test_cache_and_blind_branch_change_nothing(monkeypatch, size, tile, tiles):
    """And the keys of a picture or of a few tiles are computed once, those of many tiles in every step."""
    model, lq, calls = VOSR.from_pretrained(f"vosr-{size}"), picture(), []
    knobs = dict(steps=5, guidance=0.3, tile=tile)
    for block in model.dit.blocks:
        block.cross_attn.k_linear.register_forward_hook(lambda *_: calls.append(1))
    sr = model.upscale(lq, **knobs)
    batches = -(-tiles // AT_ONCE)
    assert len(calls) == len(model.dit.blocks) * (1 if batches == 1 else 5 * batches)
    del calls[:]
    monkeypatch.setattr(model, "restore", lambda *arguments: plain_restore(model, *arguments))
    assert torch.allclose(sr, model.upscale(lq, **knobs), atol=1e-5) and len(calls) == len(model.dit.blocks) * 5 * tiles


# -----------------------------------------------------------------------------
# S3Diff, whose parts lie at two places


@pytest.mark.skipif(not CLIP.exists(), reason="needs ../shared/clip")
def test_s3diff_by_name(tmp_path, monkeypatch, hub):
    """Every file comes once; a second model reads no text encoder and gives the same picture, as does the folder."""
    unet = UNetConfig(widths=(64, 64, 64, 64), num_heads=(1, 1, 1, 1), layers_per_block=1, context_dim=32)
    small = partial(S3DiffConfig, unet=unet, vae=VAEConfig(widths=(32, 32, 32, 32), layers_per_block=1))
    monkeypatch.setattr("models.s3diff.S3DiffConfig", small)
    monkeypatch.setattr("models.clip.TextConfig", partial(TextConfig, hidden_size=32, layers=2, heads=2,
                                                          intermediate_size=64))
    write_release(tmp_path / "s3diff", "s3diff")
    hub.root = tmp_path / "s3diff"
    first, lq = S3Diff.from_pretrained("s3diff"), picture(16, 20)
    assert sorted(hub.seen) == sorted(contents("s3diff"))
    published = torch.load(hub.root / "s3diff.pkl")["state_dict_unet"]
    assert all(torch.equal(first.unet.state_dict()[k], x) for k, x in published.items())
    assert all(x.any() for k, x in published.items() if "lora_B" in k)
    del hub.seen[:]
    (Path(os.environ["NANOSR_CACHE"]) / SD_TURBO["text_encoder"]).unlink()
    second, third = S3Diff.from_pretrained("s3diff"), S3Diff.from_pretrained(str(hub.root))
    assert hub.seen == [] and first.prompts.std() > 0.1 and torch.equal(first.prompts, second.prompts)
    sr = first.upscale(lq)
    assert sr.shape == (1, 3, 64, 80) and sr.isfinite().all() and sr.std() > 0.01
    assert torch.equal(sr, second.upscale(lq)) and torch.equal(sr, third.upscale(lq))


def run_here(command, **_):
    """subprocess.run of a Python script, without the process."""
    status, out, err = runs.here(*command[1:])
    assert status == 0, err
    return subprocess.CompletedProcess(command, status, out, err)


@pytest.mark.slow
@pytest.mark.parametrize("model, unet", [("s3diff", "UNet, two prompts"), ("gramsr", "UNet at (1, 1, 1)")])
def test_bench(monkeypatch, tmp_path, model, unet):
    """The tiny ones, whose checks end with an error where ours and the reference differ."""
    pytest.importorskip("diffusers"), pytest.importorskip("peft"), pytest.importorskip("transformers")
    command = [model, "--tiny", "--side", "16", "--repeat", "1", "--device", "cpu",
               "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(subprocess, "run", run_here)
    run_here([sys.executable, Path(__file__).with_name("bench.py"), *command])
    rows = {(row["row"], row["who"]): row for row in json.loads((tmp_path / "figures.json").read_text())["rows"]}
    for row in (("whole picture", "reference"), (unet, "beside"), (unet, "reference")):
        assert rows[row]["ms"] > 0 and rows[row]["ours_is_faster"] > 0 and 0 < rows[row]["tflops"]
    # what is done is not more than the reference does: two passes there, one batch here
    ours, theirs = (rows[unet, who]["tflops"] * rows[unet, who]["ms"] for who in ("ours", "reference"))
    assert ours < 1.3 * theirs


@pytest.mark.slow
def test_bench_train(tmp_path):
    command = ["train", "--tiny", "--side", "16", "--repeat", "1", "--device", "cpu",
               "--json", str(tmp_path / "figures.json")]
    run_here([sys.executable, Path(__file__).with_name("bench.py"), *command])
    rows = {row["row"] for row in json.loads((tmp_path / "figures.json").read_text())["rows"]}
    assert {"VOSR flow step", "VOSR distill step", "S3Diff step", "GramSR texture step",
            "GramSR texture checkpointing"} <= rows
