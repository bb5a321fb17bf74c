"""Golden cases of GramSR: how each case of golden/gramsr.json is computed with our code.

Each function takes the case as stored and `get(name)`, which builds an input by its recipe, and returns {output name: array}.
"""

import re

import fill
import numpy as np
import torch
from cases_vosr import fill_module, tensors

from models.gram import features, gram, loss_csd, loss_gram, normalised
from models.gramsr import ALL, SETS, TEXTURE, GramSR, GramSRConfig, token_adapter
from models.support.imaging import adain, from_uint8, low_frequencies, resize
from models.unet import UNet, UNetConfig
from models.vae import VAEConfig
from models.vit import DINOv3, DINOv3Config

# What a case means by "as in the case NAME": that case's config, if it ran before in this process, or else the stored file's.
CONFIGS = {
    "dinov3": {"patch_size": 16, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96,
               "num_register_tokens": 4, "use_gated_mlp": False},
    "adapter": {"in": 48, "hidden": 64, "out": 64},
    "three_branch": {"in_channels": 4, "out_channels": 4, "block_out_channels": [64, 128, 128, 128], "layers_per_block": 2,
                     "cross_attention_dim": 64, "attention_head_dim": [1, 2, 2, 2], "norm_num_groups": 32, "ranks": [4, 4, 4]},
}


def config(entry):
    """An entry of a case's config -> dict"""
    if isinstance(entry, dict):
        return entry
    named = re.search(r"case (\w+)", entry)
    return CONFIGS[named[1]] if named else dict(zip(("in", "hidden", "out"), map(int, re.search(r"(\d+) -> (\d+).* -> (\d+)", entry).groups())))


def remembered(name, build):
    """A builder that also notes its case's config for later cases."""
    def function(case, get):
        CONFIGS[name] = case["config"]
        return build(case, get)
    return function


def dinov3_config(entry):
    c = config(entry)
    return DINOv3Config(c["patch_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
                        c["intermediate_size"] / c["hidden_size"], c["use_gated_mlp"], c["num_register_tokens"])


def unet_config(entry):
    c = config(entry)
    return UNetConfig(c["in_channels"], c["out_channels"], tuple(c["block_out_channels"]), tuple(c["attention_head_dim"]), c["layers_per_block"],
                      c["cross_attention_dim"], c["norm_num_groups"])


def make_adapter(entry, salt):
    c = config(entry)
    return fill_module(token_adapter(c["in"], c["hidden"], c["out"]), salt)


def make_gramsr(c, salt):
    """The system of a case; networks it does not have are small and not filled by the case's rule."""
    unet = config(c["unet"])
    vae = c.get("vae", {"block_out_channels": [8] * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4, "scaling_factor": 1})
    model = GramSR(GramSRConfig(
        unet=unet_config(unet), vit=dinov3_config(c.get("dinov3", "as in the case dinov3")), ranks=dict(zip(SETS, unet["ranks"])),
        vae=VAEConfig(latent_channels=vae["latent_channels"], widths=tuple(vae["block_out_channels"]), layers_per_block=vae["layers_per_block"],
                      norm_groups=vae["norm_num_groups"], scaling_factor=vae["scaling_factor"])))
    fill_module(model.vae, salt), fill_module(model.vit, salt)
    if "adapter" in c:
        model.adapter = make_adapter(c["adapter"], salt)
    with torch.no_grad():
        for name, p in model.unet.named_parameters():
            p.copy_(torch.from_numpy(fill.weight(name.replace(f".{TEXTURE}", ""), tuple(p.shape), salt)))
    return model.eval()


@torch.no_grad()
def dinov3(case, get):
    model, out = fill_module(DINOv3(dinov3_config(case["config"])), case["fill"]["salt"]), {}
    for name in case["inputs"]:
        x, = tensors(get, name)
        h, w = (side // model.cfg.patch_size for side in x.shape[2:])
        cos, sin = (table[model.front :].repeat(1, 2) for table in model.rope(h, w))
        out |= {f"{name}_embeddings": model.embeddings(x), f"{name}_rope_cos": cos, f"{name}_rope_sin": sin,
                **{f"{name}_after_layer_{i}": tokens for i, tokens in enumerate(model.layers(x))}, f"{name}_last_hidden_state": model(x)}
    return out


@torch.no_grad()
def adapter(case, get):
    return {"context": make_adapter(case["config"], case["fill"]["salt"])(*tensors(get, "tokens"))}


@torch.no_grad()
def embedder(case, get):
    c, salt = case["config"], case["fill"]["salt"]
    vit = fill_module(DINOv3(dinov3_config(c["dinov3"])), salt)
    return {"context": make_adapter(c["adapter"], salt)(vit(normalised(*tensors(get, "image"))))}


def three_branch(case, get):
    """In float64, since three passes' errors add up. `predict` regroups the equation; it must equal the equation as it stands, too."""
    c = case["config"]
    model = make_gramsr({"unet": c}, case["fill"]["salt"]).requires_grad_(False)
    model.cfg.t, = get("timestep")
    model.double()
    z, context = (x.double() for x in tensors(get, "latent", "context"))
    scale = dict(zip(("pixel", "semantic", "texture"), (1, 1, 1))) | c["scale"]
    layer = model.unet.conv_in.s
    assert all(layer[adapter] == scale[name] for name in SETS for adapter in SETS[name] if adapter in layer)
    e_p, e_ps, e_all = (model.residual(z, context, *ALL[:n]) for n in (1, 2, 3))

    def guided(l1, l2, l3):
        e = l1 * e_p + l2 * (e_ps - e_p) + l3 * (e_all - e_ps)
        torch.testing.assert_close(model.predict(z, context, (l1, l2, l3)), e, rtol=1e-9, atol=1e-12)
        return e

    return {"eps_base": model.prior(z, model.cfg.t, context), "eps_pix": guided(1, 0, 0), "eps_pix_sem": guided(1, 1, 0), "eps_pix_sem_tex": guided(1, 1, 1),
            "eps_sem_alone": model.residual(z, context, "semantic"), "eps_tex_alone": model.residual(z, context, "texture"),
            **{f"eps_guided_{'_'.join(map(str, scales))}": guided(*scales) for scales in get("guidance")}}


def official_uint8(x):
    """(1, 3, H, W) in [0, 1] -> (H, W, 3); official: by truncation, here only to compare"""
    return (x[0].float() * 255).byte().permute(1, 2, 0).numpy()


@torch.no_grad()
def pipeline(case, get):
    c = case["config"]
    model = make_gramsr(c, case["fill"]["salt"])
    model.cfg.t = c["timestep"]
    lq = torch.from_numpy(np.minimum(np.floor(256 * get("lr_uint8")), 255)).float() / 255
    size = (c["process_size"],) * 2
    x = 2 * resize(lq, size) - 1
    z, context = model.vae.encode(x), model.tokens(x)
    source = official_uint8(x * 0.5 + 0.5)
    out = {"input": x, "latent": z, "context": context, "fix_source_uint8_hwc": source}
    for prefix, scales in [("", (1, 1, 1)), *((f"guided_{'_'.join(map(str, scales))}_", scales) for scales in c["guidance"])]:
        z0 = model.clean(z, model.predict(z, context, scales))
        image = model.vae.decode(z0).clamp(-1, 1)
        before = official_uint8(image * 0.5 + 0.5)
        final = official_uint8(adain(from_uint8(before), from_uint8(source), stablesr=True))
        out |= {f"{prefix}latent_out": z0, f"{prefix}image": image, f"{prefix}before_fix_uint8_hwc": before, f"{prefix}final_uint8_hwc": final}
        if lq.shape[2] == lq.shape[3]:      # the same through the front door
            sr = model.upscale(lq, size[0] / lq.shape[2], 0, *scales, tile=size[0], color="none")
            torch.testing.assert_close(sr, image / 2 + 0.5, rtol=0, atol=1e-4)
    return out


def csd(case, get):
    c = case["config"]
    unet = fill_module(UNet(unet_config(c["unet"])), case["fill"]["salt"]).requires_grad_(False)
    z, positive, noise = tensors(get, "latents", "positive", "noise")
    negative = get("negative")
    negative = torch.zeros_like(positive) if isinstance(negative, str) else torch.as_tensor(negative)
    loss = loss_csd(unet, z.requires_grad_(), torch.tensor(get("timestep")), noise, positive, negative, c["cfg"])
    grad, = torch.autograd.grad(loss, z)
    return {"loss": loss.item(), "loss_summary": loss.detach()[None], "grad_times_numel": grad * z.numel()}


def gram_loss(case, get):
    x, target = tensors(get, "output_features", "target_features")
    loss = loss_gram(x.requires_grad_(), target)
    grad, = torch.autograd.grad(loss, x)
    B, N = x.shape[:2]
    variants = {"without_normalisation": loss_gram(x, target, normalise=False), "with_negative_entries_zeroed": loss_gram(x, target, positive=True)}
    return {"loss": loss.item(), "loss_summary": loss.detach()[None], "gram_target": gram(target),
            "grad_times_tokens_squared_times_batch": grad * N**2 * B,
            **{f"loss_{name}": value.item() for name, value in variants.items()},
            "loss_channel_gram": loss_gram(x, target, channels=True, normalise=False).item(),
            "loss_channel_gram_of_normalised_rows": loss_gram(x, target, channels=True).item()}


def gram_loss_image(case, get):
    vit = fill_module(DINOv3(dinov3_config(case["config"]["dinov3"])), case["fill"]["salt"])
    output, target = tensors(get, "output_image", "target_image")
    loss = loss_gram(features(vit, output.requires_grad_()), features(vit, target))
    return {"loss": loss.item(), "loss_summary": loss.detach()[None], "grad_times_10000": 1e4 * torch.autograd.grad(loss, output)[0]}


def colour_fix(case, get):
    def picture(name):
        x = np.minimum(np.floor(256 * get(name)), 255)
        return from_uint8((x // 2 + 30 if name == "source" else x).astype(np.uint8))    # as the input's 'then' says

    target, source = picture("target"), picture("source")
    fixed = {"adain": adain(target, source, stablesr=True),
             "wavelet": target + low_frequencies(source - target, case["config"]["levels"])}
    return {**{f"{name}_float_nchw": x for name, x in fixed.items()},
            **{f"{name}_uint8_hwc": official_uint8(x.clamp(0, 1)) for name, x in fixed.items()}}


CASES = {
    "dinov3": remembered("dinov3", dinov3), "dinov3_gated": dinov3, "adapter": remembered("adapter", adapter), "embedder": embedder,
    "three_branch": remembered("three_branch", three_branch), "pipeline": pipeline, "csd_loss": csd, "csd_loss_text": csd,
    "gram_loss": gram_loss, "gram_loss_image": gram_loss_image, "colour_fix": colour_fix,
}
