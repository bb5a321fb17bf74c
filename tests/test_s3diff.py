"""The system S3Diff at tiny size: what it computes, and its files. Run: python -m pytest tests/test_s3diff.py"""

import json
import os
import pickle
import shutil
import threading
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_clip import tiny_vocabulary

import models.clip
import models.s3diff
import models.support.weights
from models.clip import TextConfig, TextEncoder, text_features
from models.support import fast_lora
from models.s3diff import NEGATIVE, POSITIVE, POSITIVE_PAPER, PRIORS, VAE_TARGETS, S3Diff, S3DiffConfig, is_in_release
from models.unet import UNet, UNetConfig, alphas_cumprod
from models.vae import VAE, VAEConfig
from models.support.weights import WeightError, save_model

MANIFESTS = Path(__file__).resolve().parents[2] / "shared" / "manifests"
TINY = S3DiffConfig(unet=UNetConfig(widths=(8, 16), num_heads=(1, 2), layers_per_block=1, norm_groups=4),   # context_dim 1024: prompts can be changed
                    vae=VAEConfig(widths=(4, 8, 8, 8), layers_per_block=1, norm_groups=4), r_unet=4, r_vae=2)
ENCODER_AND_DECODER = VAE_TARGETS.replace("encoder", "(encoder|decoder)", 1)
UNET, VAE_FILE = (f"sd-turbo/{network}/diffusion_pytorch_model.safetensors" for network in ("unet", "vae"))
close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-3)


@pytest.fixture(autouse=True)
def nothing_from_elsewhere(monkeypatch, tmp_path):
    """Neither this machine's weights nor the network."""
    def refuse(source, *_):
        raise WeightError("no network in this test")

    monkeypatch.setattr(models.support.weights, "download", refuse)
    for variable in ("NANOSR_CACHE", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / variable))


def make(awake=True, **settings):
    """A model of a few thousand parameters; awake: adapters and modulation do something, and so does the estimator."""
    torch.manual_seed(0)
    model = S3Diff(replace(TINY, **settings))
    nn.init.normal_(model.prompts)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                nn.init.normal_(p, float(name.endswith("weight")), 0.1)
            elif awake and ("lora_B" in name or "_mlp" in name):
                nn.init.normal_(p, std=0.1)
            elif "fc_degree" in name:
                nn.init.normal_(p, std=0.2)
            if "unet.conv_out" in name and "lora_A" not in name:
                p *= 0.05       # 14.6 times its result must not saturate the picture
    return model.eval()


def photo(H, W, B=1, seed=0):
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(seed))


def calls(model):
    """List of the batch sizes that the UNet is going to see."""
    sizes = []
    model.unet.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    return sizes


def apart(a, b):
    return float((a - b).abs().max())


def shapes(tree):
    """Nested dicts of tensors and settings -> the same with shapes in place of tensors."""
    return {k: shapes(v) if isinstance(v, dict) else list(v.shape) if torch.is_tensor(v) else v for k, v in tree.items()}


def test_release_is_laid_out_as_the_public_file(monkeypatch):
    """Names and shapes both ways at full size, so that the authors' code reads our file and we read theirs; the paper's 34.5 M."""
    path = MANIFESTS / "s3diff_pkl.json"
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    with torch.device("meta"):
        model = S3Diff(S3DiffConfig())
        trained = {k: p for k, p in model.named_parameters() if is_in_release(k) and k != "modulation.w"}
        assert sum(p.numel() for p in trained.values()) == 34_475_120
        monkeypatch.setattr(torch.Tensor, "cpu", lambda x: x)       # which a tensor without numbers cannot
        file = model.release()
    assert shapes(file) == json.loads(path.read_text())["tensors"]


# -----------------------------------------------------------------------------
# what it computes

@torch.no_grad()
def test_new_adapters_change_nothing():
    """B = 0: before training the system is its prior, whatever C says."""
    model = make(awake=False)
    for name, p in model.modulation.named_parameters():
        if "_mlp" in name:
            nn.init.normal_(p)
    unet, vae = UNet(TINY.unet).eval(), VAE(TINY.vae).eval()
    for plain, network in ((unet, model.unet), (vae, model.vae)):
        plain.load_state_dict({k: v for k, v in network.state_dict().items() if "lora_" not in k})
    x, scores = 2 * photo(64, 64, 2) - 1, torch.tensor([[0.1, 0.9], [0.7, 0.2]])
    context = model.prompts[:1].expand(2, -1, -1)
    assert model.matrices("unet", scores)["default"].abs().max() > 1
    z = vae.encode(x)
    a = alphas_cumprod()[999]
    expected = vae.decode((z - (1 - a).sqrt() * unet(z, 999, context)) / a.sqrt()).clamp(-1, 1)
    close(model(x, scores, context), expected)
    assert (expected.abs() < 1).float().mean() > 0.9, "a picture, not black and white"
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01)
    assert apart(model(x, scores, context), expected) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 1.07, 3.0])
def test_guidance_is_one_pass_of_both_prompts(guidance):
    model, z = make(), torch.randn(2, 4, 8, 8)
    C = model.matrices("unet", torch.tensor([[0.1, 0.9], [0.7, 0.2]]))
    good, bad = (model.unet(z, 999, model.prompts[i : i + 1].expand(2, -1, -1), C) for i in (0, 1))
    sizes = calls(model)
    y = model.guided(z, 999, model.prompts, C, guidance)
    assert sizes == [4] and apart(good, bad) > 1e-3
    close(y, bad + guidance * (good - bad))
    close(model.guided(z, 999, model.prompts, C, 1), good)
    assert sizes == [4, 2]
    C = model.matrices("unet", torch.tensor([[0.1, 0.9]]))     # one for both pictures
    close(model.guided(z[:1], 999, model.prompts, C, guidance), y[:1])


@torch.no_grad()
def test_guidance_of_upscale():
    """The checkpoint's unless told otherwise; 0 is a value, not "unset"; 1 costs one pass only."""
    model, lq = make(), photo(8, 8, 2)
    sizes = calls(model)
    results = {g: model.upscale(lq, 8, guidance=g, color="none") for g in (None, 1.07, 1, 0, 4)}
    assert sizes == [4, 4, 2, 4, 4] and torch.equal(results[None], results[1.07])
    assert min(apart(results[a], results[b]) for a, b in ((1.07, 1), (1, 0), (0, 4))) > 1e-4


@torch.no_grad()
def test_a_batch_is_its_pictures(monkeypatch):
    """Two images, each degraded in its own way: C beside the weights for both, folded into them for one, the same numbers."""
    model, folds = make(), []
    original = fast_lora.fold
    monkeypatch.setattr(fast_lora, "fold", lambda layer, C: folds.append(layer) or original(layer, C))
    monkeypatch.setattr(model, "estimate", lambda lq: torch.stack([lq.mean((1, 2, 3)), 3 * lq.std((1, 2, 3))], dim=1))
    lq = torch.cat([0.2 * photo(16, 12), photo(16, 12, seed=1)])
    both = model.upscale(lq, color="none")
    assert not folds
    for i in range(2):
        close(model.upscale(lq[i : i + 1], color="none"), both[i : i + 1])
    assert folds
    monkeypatch.setattr(model, "estimate", lambda lq: torch.tensor([[0.2, 0.9], [0.5, 0.1]]))
    assert apart(model.upscale(lq, color="none"), both) > 1e-3, "the scores are seen"


@torch.no_grad()
def test_scores_by_hand():
    """blur comes first, noise second; a score that is given replaces the estimated one, 0.0 too, and the estimator decides the other."""
    model, lq, seen = make(), photo(12, 16), []
    original = model.modulation.matrices
    model.modulation.matrices = lambda network, scores: seen.append(scores.clone()) or original(network, scores)
    estimated = model.estimate(lq)
    assert 0 < estimated.min() and estimated.max() < 1
    by_hand = model.upscale(lq, blur=0.3, noise=0.0)
    one = model.upscale(lq, noise=0.6)
    model.upscale(lq, blur=0.0)
    expected = [[0.3, 0.0], [estimated[0, 0], 0.6], [0.0, estimated[0, 1]]]
    for i, scores in enumerate(expected):
        for got in seen[2 * i : 2 * i + 2]:      # of the VAE and of the UNet
            close(got, torch.tensor([scores]))
    assert len(seen) == 6 and apart(by_hand, one) > 1e-3
    for p in model.denet.parameters():
        nn.init.normal_(p, std=0.3)
    assert torch.equal(model.upscale(lq, blur=0.3, noise=0.0), by_hand) and apart(model.upscale(lq, noise=0.6), one) > 0
    assert apart(model.upscale(lq, blur=0.9, noise=0.0), by_hand) > 1e-3 and apart(model.upscale(lq, blur=0.3, noise=0.9), by_hand) > 1e-3


@torch.no_grad()
def test_start_step():
    """At 999 no noise is added, which is S3Diff's point, so that nothing depends on a seed; before, that time's noise is."""
    model, lq = make(), photo(8, 8)
    run = partial(model.upscale, lq, color="none")
    plain = run()
    assert torch.equal(run(seed=1), plain) and torch.equal(run(start_step=999), plain)
    early = run(start_step=250)
    assert torch.equal(run(start_step=250, seed=0), early) and apart(run(start_step=250, seed=1), early) > 1e-3
    assert apart(run(start_step=500), early) > 1e-3 and apart(early, plain) > 1e-3
    model.cfg = replace(model.cfg, t=250)
    assert torch.equal(run(), early), "a checkpoint trained at 250 starts there"

    z, a = torch.full((1, 4, 64, 64), 3.0), alphas_cumprod()[250]
    noisy = model.start(z, 250, torch.Generator().manual_seed(0))
    eps = (noisy - a.sqrt() * z) / (1 - a).sqrt()
    assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03
    close(model.clean(noisy, eps, 250), z)
    assert torch.equal(model.start(z, 999), z)


@torch.no_grad()
def test_prompts(monkeypatch):
    """A text replaces the good or the bad one. Which texts are read, in which folder, and what the paper's way of writing it is."""
    model, lq, asked = make(), photo(8, 8), []

    def features(texts, folder, dtype=torch.float32):
        asked.extend((text, folder) for text in texts)
        return torch.stack([torch.randn(77, 1024, generator=torch.Generator().manual_seed(zlib.crc32(text.encode()))) for text in texts])

    monkeypatch.setattr(models.s3diff, "text_features", features)
    model.folder, model.prompts = Path("there"), features([POSITIVE, NEGATIVE], None)
    asked.clear()
    run = partial(model.upscale, lq, color="none", guidance=1.5)
    plain = run()
    assert not asked, "the two fixed prompts need no text encoder"
    cat, no_cat, both = run(prompt="a cat"), run(negative_prompt="a cat"), run(prompt="a cat", negative_prompt="a dog")
    assert [text for text, _ in asked] == ["a cat", "a cat", "a cat", "a dog"] and {folder for _, folder in asked} == {Path("there")}
    assert min(apart(a, b) for a, b in ((plain, cat), (plain, no_cat), (cat, both), (no_cat, both), (cat, no_cat))) > 1e-3
    assert torch.equal(run(prompt=POSITIVE, negative_prompt=NEGATIVE), plain) and torch.equal(run(prompt="", negative_prompt=""), plain)
    assert torch.equal(run(), plain), "the model's own prompts are untouched"
    asked.clear()
    paper = model.upscale(lq, color="none", paper=True)
    assert asked == [(POSITIVE_PAPER, Path("there"))] and apart(paper, model.upscale(lq, color="none")) > 1e-3
    asked.clear()
    model.upscale(lq, paper=True, prompt="a cat")
    assert [text for text, _ in asked] == ["a cat"], "the user's word counts more than the paper's"


@torch.no_grad()
def test_paper(monkeypatch):
    """Guidance 1.1 and the bicubic enlargement of training; what is given explicitly still holds."""
    model, lq, seen = make(), photo(9, 8), []
    monkeypatch.setattr(models.s3diff, "text_features", lambda *_: model.prompts[:1])       # so that the prompt is not the difference
    monkeypatch.setattr(model, "guided", lambda z, t, prompts, adapters, guidance: seen.append(guidance) or S3Diff.guided(model, z, t, prompts, adapters, guidance))
    ours, paper = model.upscale(lq, color="none"), model.upscale(lq, color="none", paper=True)
    model.upscale(lq, paper=True, guidance=1.3)
    assert seen == [1.07, 1.1, 1.3] and apart(model.upscale(lq, color="none", guidance=1.1), paper) > 1e-3 and apart(ours, paper) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("H, W, scale", [(24, 10, 4), (37, 53, 2), (5, 7, 4), (9, 8, 2.5), (1, 1, 4), (3, 40, 1), (5, 3, 8)])
def test_sizes(H, W, scale):
    """Sides that are no multiples of 64, smaller than the padding, or of a pixel: the result is as large as promised, finite and in range."""
    model, lq = make(), photo(H, W)
    y = model.upscale(lq, scale)
    assert y.shape == (1, 3, round(H * scale), round(W * scale)) and y.isfinite().all() and 0 <= y.min() and y.max() <= 1
    assert torch.equal(lq, photo(H, W)), "the caller's picture is untouched"


@torch.no_grad()
def test_colors():
    model, lq = make(), 0.3 * photo(16, 16)
    wavelet, adain, none = (model.upscale(lq, color=color) for color in ("wavelet", "adain", "none"))
    assert min(apart(wavelet, adain), apart(wavelet, none), apart(adain, none)) > 1e-3
    assert abs(wavelet.mean() - lq.mean()) < 0.05 < abs(none.mean() - lq.mean())
    assert torch.equal(model.upscale(lq), wavelet)


# -----------------------------------------------------------------------------
# tiles

@torch.no_grad()
def test_a_tile_that_covers_all_is_the_whole():
    """Up to a tile's area the UNet sees the picture at once, as officially: a long one too. Beyond, tiles of both prompts, blended."""
    model, lq = make(), photo(32, 16)       # 16 x 8 cells
    run = partial(model.upscale, lq, color="none")
    sizes = calls(model)
    whole = run(guidance=1)
    assert torch.equal(run(guidance=1, tile=96, overlap=8), whole) and sizes == [1, 1]     # 12 x 12 cells have more than 128
    tiled = run(guidance=1, tile=64, overlap=32)
    assert sizes[2:] == [3] and 1e-5 < apart(tiled, whole) < 0.5
    sizes.clear()
    run(tile=64, overlap=0)     # 0 is the checkpoint's overlap, but half a tile at most: three tiles, both prompts
    assert sizes == [6]


@torch.no_grad()
def test_tiles_of_a_network_that_sees_one_cell():
    """Blending itself adds nothing: weights sum to one everywhere, at the borders too."""
    model, z = make(), torch.randn(1, 4, 11, 9)
    model.guided = lambda tiles, t, prompts, adapters, guidance: 2 * tiles
    for tile, overlap in ((48, 16), (32, 24), (64, 0), (8, 0)):
        close(model.predict(z, 999, model.prompts, {}, 1.0, tile, overlap), 2 * z)


@torch.no_grad()
def test_half_precision():
    """The scores, C and the colours stay in float32; 1 / 0.068 comes after half precision has rounded eps, so some error is left."""
    model, lq = make(), photo(16, 12, 2)
    expected = model.upscale(lq)
    model.unet.bfloat16(), model.vae.bfloat16()
    for some in (slice(0, 2), slice(0, 1)):     # beside the weights, and folded
        y = model.upscale(lq[some])
        assert y.dtype == torch.float32 and y.isfinite().all()
        assert 0 < (y - expected[some]).abs().mean() < 0.02
    tiled = model.upscale(lq, tile=64, overlap=16)
    assert tiled.isfinite().all()


# -----------------------------------------------------------------------------
# the paper's ablations

@pytest.mark.parametrize("settings", [
    {"modulation": "shared"}, {"modulation": "none"}, {"vae_targets": ""}, {"vae_targets": VAE_TARGETS.replace("encoder", "decoder", 1)},
    {"vae_targets": ENCODER_AND_DECODER, "modulation": "none"}, {"t": 250, "r_unet": 3, "r_vae": 5}, {"prior": "sd-2.1", "modulation": "none"},
], ids=str)
def test_ablations(settings, tmp_path):
    """Each runs, learns in all its adapters, and comes back from its file the same."""
    model = make(**settings)
    with torch.no_grad():
        batch = torch.cat([photo(16, 16), photo(16, 16, seed=1)])
        expected = model.upscale(batch, color="none")
        close(model.upscale(batch[:1], color="none"), expected[:1])
    has = {part for part in ("encoder", "decoder") if any("lora_" in k and part in k for k, _ in model.vae.named_parameters())}
    assert has == {part for part in ("encoder", "decoder") if part in settings.get("vae_targets", "encoder")}
    model(2 * photo(64, 64) - 1, torch.rand(1, 2), model.prompts[:1], torch.Generator().manual_seed(0)).square().mean().backward()
    silent = [k for k, p in model.named_parameters() if is_in_release(k) and k != "modulation.w" and not (p.grad is not None and p.grad.any())]
    assert all(k.startswith("modulation.vae") for k in silent) and bool(silent) == (settings.get("vae_targets", "encoder").find("encoder") < 0)

    again = from_folder(layout(model, tmp_path))
    assert all(getattr(again.cfg, name) == getattr(model.cfg, name) for name in ("modulation", "t", "prior", "r_unet", "r_vae", "vae_targets"))
    assert torch.equal(again.upscale(batch, color="none"), expected)
    assert ("nanosr" in model.release()) == bool({"modulation", "t", "prior"} & settings.keys()), "the authors' code gets what it knows"


@torch.no_grad()
def test_shared_means_one_matrix_for_all_blocks():
    scores = torch.rand(2, 2)
    for kind, different in (("blocks", True), ("shared", False)):
        C = make(modulation=kind).matrices("unet", scores)["default"]
        assert C.shape == (2, 6, 4, 4) and (apart(C[:, 0], C[:, 3]) > 1e-3) == different and apart(*C[:, 0]) > 1e-3
    assert make(modulation="none").matrices("unet", scores) == {"default": 1}


# -----------------------------------------------------------------------------
# files

def layout(model, folder, half=False):
    """The public files of a model, as their authors lay them out -> folder"""
    folder.mkdir(exist_ok=True)
    torch.save(model.release(), folder / "s3diff.pkl")
    torch.save(model.denet.state_dict(), folder / "de_net.pth")
    for network in ("unet", "vae"):
        path = folder / PRIORS[model.cfg.prior] / network / "diffusion_pytorch_model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().half() if half else v.detach() for k, v in getattr(model, network).state_dict().items() if "lora_" not in k}
        if network == "unet":       # s3diff.pkl has another one
            tensors |= {k: torch.ones_like(tensors[k]) for k in ("conv_in.weight", "conv_in.bias")}
        save_file(tensors, path)
    (folder / "sd-turbo").mkdir(exist_ok=True)
    save_file(dict(zip((POSITIVE, NEGATIVE), model.prompts)), folder / "sd-turbo" / "text_features.safetensors")
    return folder


def from_folder(folder, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.s3diff, "S3DiffConfig", partial(S3DiffConfig, unet=TINY.unet, vae=TINY.vae))
        return S3Diff.from_pretrained(folder, **kwargs)


@torch.no_grad()
def test_the_authors_files(tmp_path):
    """Bit by bit the same model, from the folder or the file; nothing is left on the meta device; conv_in is the trained one."""
    model, lq = make(), photo(16, 12, 2)
    expected = model.upscale(lq)
    folder = layout(model, tmp_path / "there")
    for name in (folder, folder / "s3diff.pkl", str(folder)):
        again = from_folder(name)
        assert torch.equal(again.upscale(lq), expected) and not again.training
        theirs, ours = model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(v, ours[k]) for k, v in theirs.items())
    half = from_folder(folder, dtype=torch.bfloat16)
    inside = [network.down_blocks[0].resnets[0].conv1.weight.dtype for network in (half.unet, half.vae.encoder)]
    assert inside == [torch.bfloat16] * 2 and half.unet.conv_out.weight.dtype == half.vae.quant_conv.weight.dtype == torch.float32
    assert {p.dtype for part in (half.denet, half.modulation) for p in part.parameters()} == {torch.float32}
    assert (half.upscale(lq) - expected).abs().mean() < 0.02


@torch.no_grad()
def test_priors_as_others_store_them(tmp_path):
    """In float16, and with the VAE's attention under its old names, as 1x1 convolutions."""
    model, lq = make(), photo(16, 12)
    expected = model.upscale(lq)
    folder = layout(model, tmp_path / "half", half=True)
    y = from_folder(folder).upscale(lq)
    assert 0 < apart(y, expected) < 0.05
    tensors = {}
    for name, x in load_file(folder / VAE_FILE).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f"attentions.0.{new}." in name:
                name, x = name.replace(new, old), x[:, :, None, None] if x.ndim == 2 else x
        tensors[name] = x
    assert sum("proj_attn" in name for name in tensors) == 4
    save_file(tensors, folder / VAE_FILE)
    assert torch.equal(from_folder(folder).upscale(lq), y)


class Code:
    def __reduce__(self):
        return os.mkdir, (str(Code.path),)


def damage(folder, name, how):
    """Spoil one file of the layout."""
    path = folder / name
    if how == "absent":
        return path.unlink()
    if how == "broken":
        return path.write_bytes(path.read_bytes()[:-200] if name.endswith("safetensors") else b"not a pickle")
    if how == "code":
        Code.path = folder / "executed"
        return path.write_bytes(pickle.dumps({"w": Code()}, protocol=2))
    if how == "html":
        return path.write_text("<html>404</html>")
    tensors = load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)
    inner = tensors["state_dict_unet"] if name == "s3diff.pkl" else tensors
    first = next(iter(inner))
    if how == "missing":
        del inner[first]
    elif how == "unexpected":
        inner["surplus.weight"] = torch.zeros(1)
    elif how == "mis-shaped":
        inner[first] = torch.zeros(*inner[first].shape, 2)
    elif how == "not tensors":
        inner[first] = "a string"
    elif how == "list":
        tensors = [tensors]
    elif how == "table":
        tensors["state_embeddings"]["state_dict_unet_block"]["weight"] = torch.zeros(3, 64)
    else:       # the name of an entry that is not there, or "entry=value"
        key, _, value = how.partition("=")
        tensors = {k: v for k, v in tensors.items() if k != key} | ({key: json.loads(value)} if value else {})
    (partial(save_file, filename=path) if name.endswith("safetensors") else partial(torch.save, f=path))(tensors)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return layout(make(), tmp_path_factory.mktemp("s3diff"))


FAULTS = [
    *((name, how, words) for name in ("s3diff.pkl", "de_net.pth", UNET, VAE_FILE)
      for how, words in (("missing", "missing"), ("unexpected", "unexpected"), ("mis-shaped", "mis-shaped"), ("broken", "is broken"),
                         ("html", "is broken"))),
    *((name, how, words) for name in ("s3diff.pkl", "de_net.pth")
      for how, words in (("code", "may run code"), ("not tensors", "other things than tensors"), ("list", "holds a list"))),
    ("s3diff.pkl", "table", "mis-shaped modulation.unet_block.weight"),
    *(("s3diff.pkl", how, "not laid out as s3diff.pkl")
      for how in ("rank_unet", "vae_lora_target_modules", "state_embeddings", "state_dict_unet", "state_dict_vae_fuse_mlp", "w", "state_dict_vae=[1]",
                  'nanosr={"u": 1}')),
    *(("s3diff.pkl", how, "") for how in ('rank_unet="32"', "rank_unet=0", "rank_unet=null", "rank_vae=-1", "w=3", "unet_lora_target_modules=5",
                                          'unet_lora_target_modules=[5]', 'vae_lora_target_modules="("', "vae_lora_target_modules=7", "nanosr=5",
                                          'nanosr={"t": "x"}', 'nanosr={"modulation": "other"}', 'rank_unet=5', "state_dict_unet={}")),
    (UNET, "absent", "cannot be downloaded"), ("de_net.pth", "absent", "cannot be downloaded"),
]


@pytest.mark.parametrize("name, how, words", FAULTS)
def test_a_bad_file_is_named_in_one_line(intact, tmp_path, name, how, words):
    folder = tmp_path / "copy"
    for path in intact.rglob("*.*"):
        (folder / path.relative_to(intact)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(intact))
    damage(folder, name, how)
    with pytest.raises(WeightError) as e:
        from_folder(folder)
    message = str(e.value)
    assert message.startswith(name if how == "absent" else f"{folder / name}: ") and words in message and "\n" not in message
    assert not (folder / "executed").exists()


def test_no_such_model(tmp_path):
    for name in (tmp_path, tmp_path / "absent", tmp_path / "s3diff.pkl"):
        with pytest.raises(FileNotFoundError) as e:
            S3Diff.from_pretrained(name)
        assert str(e.value).startswith(f"{name}: no such model") and "\n" not in str(e.value)
    with pytest.raises(WeightError, match="^s3diff.pkl: cannot be downloaded.*no network in this test"):
        S3Diff.from_pretrained()


@torch.no_grad()
def test_a_model_of_our_own(tmp_path):
    """model.safetensors, which --preset tiny writes: everything in one file, in float16; damage is told in one line, too."""
    model, lq = make(vae_targets=ENCODER_AND_DECODER, t=500), photo(16, 12)
    save_model(path := tmp_path / "model.safetensors", model.cfg, model.state_dict())
    again = S3Diff.from_pretrained(tmp_path)
    assert again.cfg.t == 500 and again.cfg.unet.widths == [8, 16] and again.unet.conv_in.weight.dtype == torch.float32
    assert apart(again.upscale(lq), model.upscale(lq)) < 0.02
    assert torch.equal(S3Diff.from_pretrained(path).upscale(lq), again.upscale(lq))
    for cfg, words in ((TINY.unet, "config is not one of S3Diff"), (replace(TINY, r_unet=3), "mis-shaped unet."),
                       (replace(TINY, t=3), "unexpected vae.decoder")):
        save_model(path, cfg, model.state_dict())
        with pytest.raises(ValueError) as e:
            S3Diff.from_pretrained(tmp_path)
        assert str(e.value).startswith(f"{path}: ") and words in str(e.value) and "\n" not in str(e.value)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="config is not one of S3Diff"):
        S3Diff.from_pretrained(tmp_path)


# -----------------------------------------------------------------------------
# features of texts, kept beside the encoder

@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder with SD-Turbo's text encoder, a small one."""
    folder, cfg = tmp_path / "texts", TextConfig(8, 1, 2, 16, 600, 77)
    for part in ("tokenizer", "text_encoder"):
        (folder / "sd-turbo" / part).mkdir(parents=True)
    tiny_vocabulary(folder / "sd-turbo" / "tokenizer")
    torch.manual_seed(0)
    save_file(TextEncoder(cfg).half().state_dict(), folder / "sd-turbo" / "text_encoder" / "model.safetensors")
    monkeypatch.setattr(models.clip, "TextEncoder", partial(TextEncoder, cfg))
    return folder


def without_encoder(folder):
    for part in ("text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        (folder / "sd-turbo" / part).unlink()


def test_features_are_kept(texts):
    """The second time no encoder is needed, in any order and number; a new text needs it, and its absence is told."""
    first = text_features(["art", "tar", "art"], texts)
    assert first.shape == (3, 77, 8) and first.dtype == torch.float32 and torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    third = text_features(["rat"], texts)
    assert [p.name for p in (texts / "sd-turbo").iterdir() if p.is_file()] == ["text_features.safetensors"], "no .part is left"
    without_encoder(texts)
    assert torch.equal(text_features(["rat", "tar", "art"], texts), torch.cat([third, first[1:2], first[:1]]))
    with pytest.raises(WeightError, match="^sd-turbo/tokenizer/vocab.json: cannot be downloaded"):
        text_features(["art", "new"], texts)


@pytest.mark.parametrize("text", ["", "naïve 🐱\n\"quoted\" \\ \x00", "x" * 5000])
def test_features_of_odd_texts_are_kept(texts, text):
    """A text is a key of the file that keeps them, and some texts make poor keys."""
    first = text_features([text], texts)
    assert torch.equal(text_features([text], texts), first) and text_features(["art"], texts).shape == (1, 77, 8)


@pytest.mark.parametrize("error", [PermissionError("read-only"), OSError("full")])
def test_features_that_cannot_be_renamed(texts, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(os, "replace", refuse)
    assert text_features(["art"], texts).shape == (1, 77, 8)


@torch.no_grad()
def test_features_of_a_read_only_folder(texts):
    """As on a shared disk: the features come, and are not kept. (Permissions do not hold root back: the part's path is blocked instead.)"""
    part = texts / "sd-turbo" / f".{os.getpid()}-{threading.get_ident()}.part"
    part.mkdir()
    assert text_features(["art"], texts).shape == (1, 77, 8)
    assert not (texts / "sd-turbo" / "text_features.safetensors").exists()


def test_features_where_our_cache_does_not_exist(texts, monkeypatch):
    """All files lie in huggingface_hub's cache: ours has no folder sd-turbo yet."""
    monkeypatch.setattr(models.clip, "find_or_fetch", lambda name, folder, *dtype: texts / name)
    first = text_features(["art"])
    without_encoder(texts)
    assert torch.equal(text_features(["art"]), first), "kept nowhere"


def test_features_in_a_broken_file(texts):
    """One line that names it."""
    text_features(["art"], texts)
    store = texts / "sd-turbo" / "text_features.safetensors"
    store.write_bytes(store.read_bytes()[:-100])
    with pytest.raises(WeightError) as e:
        text_features(["art"], texts)
    assert str(e.value).startswith(f"{store}: is broken") and "\n" not in str(e.value)


@torch.no_grad()
def test_a_new_prompt_is_computed_in_the_models_folder(texts, monkeypatch):
    """The whole way of --prompt: tokenizer, encoder, features, UNet."""
    monkeypatch.setattr(UNetConfig, "context_dim", 8)
    model, lq = make(unet=replace(TINY.unet, context_dim=8)), photo(8, 8)
    model.folder = texts
    with_cat, with_dog = model.upscale(lq, prompt="a cat", color="none"), model.upscale(lq, prompt="a dog", color="none")
    assert apart(with_cat, with_dog) > 1e-4
    model.prompts[0] = text_features(["a cat"], texts)[0]
    assert torch.equal(model.upscale(lq, color="none"), with_cat)


def test_enlargement_is_torchs():
    """Bilinear, without antialiasing or aligned corners: a flat network shows it through the wavelet colour fix."""
    model, lq = make(), photo(6, 5)
    with torch.no_grad():
        seen = []
        model.vae.encode = lambda x, *args: seen.append(x) or VAE.encode(model.vae, x, *args)
        model.upscale(lq, 4)
    close(seen[0][..., :24, :20], 2 * F.interpolate(lq, (24, 20), mode="bilinear") - 1)
    side = 8 << len(model.cfg.unet.widths) - 1      # 64 for SD-Turbo
    assert [x % side for x in seen[0].shape[2:]] == [0, 0]
