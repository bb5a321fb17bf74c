"""Golden cases of VOSR: how each case of golden/vosr.json is computed with our code.

Each function takes the case as stored and `get(name)`, which builds an input by its recipe, and returns {output name: array}.
"""

import re
from dataclasses import fields

import fill
import numpy as np
import torch
from PIL import Image

from models.dit import DiT, DiTConfig, rope_table
from models.flow import Draws, column, conditions, correction_rcgm, guided, loss_distill, loss_flow, sample, teach
from models.support.imaging import adain, from_uint8, resize, to_pil, wavelet
from models.support.tiles import tile_starts, tile_weight
from models.qwen_vae import QwenVAE, QwenVAEConfig
from models.vae import LightDecoder, VAEConfig
from models.vit import ViT, ViTConfig
from models.vosr import VOSR, VOSRConfig


def fill_module(module, salt=""):
    """Give every parameter the golden numbers of its name; buffers (rotary tables) stay as computed.  -> module in eval mode"""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(fill.weight(name, tuple(parameter.shape), salt)))
    return module.eval()


@torch.no_grad()
def light_decoder(case, get):
    decoder = fill_module(LightDecoder(**case["config"]), case["fill"]["salt"])
    return {"image": decoder(torch.from_numpy(get("z"))).numpy(),
            "norm_small": decoder.conv_norm_out(0.001 * torch.from_numpy(get("small"))).numpy()}


def color(case, get):
    def picture(name):
        return from_uint8(np.floor(get(name)).astype(np.uint8))

    def rows(x):  # (1, 3, H, W) -> (H, W, 3)
        return x[0].permute(1, 2, 0).numpy()

    def truncated(x):  # official: to 8 bits by truncation
        return np.floor(rows(x * 255))

    target, source, small = picture("target"), picture("source"), picture("source_small")
    resized = from_uint8(to_pil(small[0]).resize(target.shape[:1:-1], Image.Resampling.LANCZOS))
    return {"adain_float": rows(adain(target, source)),
            "adain": truncated(adain(target, source)),
            "wavelet": truncated(wavelet(target, source)),
            "wavelet_source_resized": truncated(wavelet(target, resized))}


def starts(case, get):
    return {"starts": np.array([start for triple in get("triples") for start in tile_starts(*map(int, triple))])}


def known(cls, config):
    """Dataclass from a published configuration, whose other entries choose what we left out."""
    return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})


def tensors(get, *names):
    return [torch.as_tensor(get(name), dtype=torch.float32) for name in names]


def make_dit(config, salt=""):
    return fill_module(DiT(known(DiTConfig, config)), salt)


@torch.no_grad()
def dit(case, get):
    model = make_dit(case["config"], case["fill"]["salt"])
    x, t, z = tensors(get, "x", "t", "z")
    z_lq, z_t = x.split([x.shape[1] - model.cfg.out_channels, model.cfg.out_channels], dim=1)
    out = {"velocity": model(z_t, z_lq, z, t, *(tensors(get, "r") if "r" in case["inputs"] else []))}
    if "small" in case["inputs"]:
        small, side = tensors(get, "small")[0], torch.arange(model.side).float()
        cos, sin = rope_table(side, side, model.cfg.hidden_size // model.cfg.num_heads)
        out |= {"context": model.mlp_ca(model.layer_norm(z)), "context_small": model.mlp_ca(model.layer_norm(0.003 * z)), "time": model.t_embedder(t),
                "norm_small": model.blocks[0].norm1(0.001 * small), "rope_cos": cos, "rope_sin": sin}
    return out


@torch.no_grad()
def sample_multistep(case, get):
    c = case["config"]
    model = make_dit(c["dit"], case["fill"]["salt"])
    lq, z, eps = tensors(get, "lq", "z", "eps")
    weak = float(np.mean(c["weak_cond_strength_aelq_list"]))
    out = {}
    for name in case["outputs"]:                                    # latent_cfg_<scale>, with an interval only the notes give
        interval = (c["t_start"], c["t_end"])
        if name.endswith("_interval"):
            interval = tuple(float(x) for x in re.search(r"t_start ([\d.]*\d) and t_end ([\d.]*\d)", case["notes"]).groups())
        scale = float(re.match(r"latent_cfg_(-?[\d.]+)", name)[1])
        out[name] = sample(lambda x, t, r: guided(model, x, lq, z, t, r, scale, weak, interval), eps, c["n_steps"])
    return out


@torch.no_grad()
def sample_onestep(case, get):
    model = make_dit(case["config"]["dit"], case["fill"]["salt"])
    lq, z, eps = tensors(get, "lq", "z", "eps")
    return {f"latent_{n}_steps": sample(lambda x, t, r: guided(model, x, lq, z, t, r), eps, n) for n in case["config"]["n_steps"]}


def gradients(case, model):
    """Outputs named 'grad_x<factor> <parameter>'."""
    parameters = dict(model.named_parameters())
    named = [(name, re.match(r"grad_x(\d+) (.+)", name)) for name in case["outputs"] if name.startswith("grad_")]
    return {name: float(m[1]) * parameters[m[2]].grad for name, m in named}


def draws(get, t, g):
    n, eps, m, xi = tensors(get, "strength_normal", "eps", "drop_uniform", "cond_noise")
    return Draws(torch.as_tensor(t, dtype=torch.float32), n, eps, m, xi, torch.as_tensor(g, dtype=torch.float32))


def flow(case, get):
    c = case["config"]
    model = make_dit(c["model"], case["fill"]["salt"])
    t, w = np.array(get("t_uniform")), float(get("weak_strength"))
    d = draws(get, np.stack([t, t], axis=1), 0 * t)
    loss = loss_flow(model, *tensors(get, "hq", "lq", "z"), None, c["cfg_ratio"], c["cond_strength_aelq_list"],
                     weak=(w, w), draws=d)
    loss.backward()
    return {"loss": loss[None], **gradients(case, model)}


def distill(case, get):
    c = case["config"]
    salt = re.search(r"[Tt]eacher[^.]*salt '([^']*)'", case["fill"]["keys"])[1]     # only the prose tells the teacher's
    student, teacher = make_dit(c["student"], case["fill"]["salt"]), make_dit(c["teacher"], salt)
    hq, lq, z = tensors(get, "hq", "lq", "z")
    d, weak = draws(get, get("t_uniform"), get("beta")), c["weak_cond_strength_aelq"]
    interval, strength = (c["t_start"], c["t_end"]), c["cond_strength_aelq_list"]
    rcgm = {"delta": c["rcgm_delta_t"], "N": c["rcgm_n_steps"]} if "rcgm_delta_t" in c else {}
    terms = loss_distill(student, teacher, hq, lq, z, None, "rcgm" if rcgm else "shortcut", c["cfg_scale"],
                         c["cfg_ratio"], strength, interval, weak, draws=d, **rcgm)
    loss = terms["v"] + c["u_weight"] * terms["u"]
    loss.backward()
    out = {"loss": loss[None], "v_loss": terms["v"][None], "u_loss": terms["u"][None], **gradients(case, student)}
    if rcgm:
        with torch.no_grad():
            t = d.t.amax(1)
            r = t * (1 - d.g)
            noised, z_weak, mixed, mixed_z = conditions(lq, z, d, weak, c["cfg_ratio"], strength)
            z_t = (1 - column(t)) * hq + column(t) * d.eps
            v = teach(teacher, z_t, noised, z_weak, z, t, c["cfg_scale"], interval)
            u = student(z_t, mixed, mixed_z, t, r)
            out["correction_before_clamp"] = correction_rcgm(lambda x, t, r: student(x, mixed, mixed_z, t, r),
                                                             z_t, t, r, u, v, **rcgm)
    return out


@torch.no_grad()
def dinov2(case, get):
    model = fill_module(ViT(known(ViTConfig, case["config"])), case["fill"]["salt"])
    x, small = tensors(get, "x", "small")
    h, w = (side // model.cfg.patch_size for side in x.shape[-2:])
    mlp_in = []
    model.blocks[0].mlp.register_forward_hook(lambda module, args, output: mlp_in.append(output))
    layers = {name: model(x, int(name.removeprefix("layer_"))) for name in case["outputs"] if name.startswith("layer_")}
    return {**layers, "norm_patch_tokens": model(x), "pos_embed_x256": 256 * model.positions(h, w)[:, 1:],
            "block0_mlp_x16": 16 * mlp_in[0], "norm_small": model.norm(0.001 * small)}


class Echo(torch.nn.Module):
    """Stands where the vision encoder does and hands back what it is given."""

    pos_embed = torch.zeros(1)

    def forward(self, x, layer):
        return x


def venc_preprocess(case, get):
    model = VOSR.__new__(VOSR)
    torch.nn.Module.__init__(model)
    model.cfg, model.vit = VOSRConfig(vit_input=case["config"]["dinov2_size"]), Echo()
    return {"encoder_input": model.tokens(*tensors(get, "x"))}


def make_vosr(c, salt):
    """The whole system of a pipeline case; its four networks are filled by their own names, without a prefix."""
    vae, light = c["vae"], c["light_decoder"]
    cfg = VOSRConfig(
        dit=known(DiTConfig, c["dit"]), vit=known(ViTConfig, c["dinov2"]),
        vae=VAEConfig(vae["latent_channels"], tuple(vae["block_out_channels"]),
                      vae["layers_per_block"], vae["norm_num_groups"], vae["scaling_factor"]),
        light_decoder=light, vit_input=c["dinov2"]["input"], vit_layer=c["dinov2"]["layer"],
    )
    model = VOSR(cfg)
    for network in (model.vae, model.light_decoder, model.vit, model.dit):
        fill_module(network, salt)
    return model


@torch.no_grad()
def qwen_vae_2d(case, get):
    vae = fill_module(QwenVAE(known(QwenVAEConfig, case["config"])), case["fill"]["salt"])
    x, z = tensors(get, "x", "z")
    mean, std = vae.moments(x)
    raw = vae.decoder(vae.post_quant_conv(z))                       # z as it leaves the encoder; decode() takes it scaled
    return {"mode": mean, "posterior_std": std, "mode_normalised": vae.encode(x), "decoded_before_clamp": raw,
            "decoded": raw.clamp(-1, 1), "decoded_from_normalised": vae.decode(z).clamp(-1, 1)}


@torch.no_grad()
def pipeline(case, get):
    c = case["config"]
    model = make_vosr(c, case["fill"].get("salt", ""))
    lq_up = resize(from_uint8(np.floor(get("lr")).astype(np.uint8)), c["upscale"])
    x = 2 * lq_up - 1
    z_lq = model.vae.encode(x)
    z = model.restore(z_lq, x, *tensors(get, "eps"), c["n_steps"], 1.0, 0.15, c.get("tile_size", 0), c.get("tile_overlap", 0))
    sr = model.decode(z)
    side = c.get("tile_size", 0) // model.vae.factor
    return {"lq_uint8": (lq_up[0] * 255).permute(1, 2, 0), "lq_latent": z_lq, "posterior_std": model.vae.moments(x)[1],
            "context_tokens": model.tokens(x), "sr_latent": z, "decoded_before_clamp": sr, "sr": sr.clamp(-1, 1) / 2 + 0.5,
            "tile_weight": tile_weight(side, side) if side else None}


CASES = {
    "dit_ms": dit, "dit_os": dit, "dit_flexible": dit, "sample_multistep": sample_multistep, "sample_onestep": sample_onestep,
    "loss_flow": flow, "loss_shortcut": distill, "loss_rcgm": distill, "loss_rcgm_coarse": distill, "dinov2": dinov2,
    "qwen_vae_2d": qwen_vae_2d, "venc_preprocess": venc_preprocess, "light_decoder": light_decoder, "color": color, "tile_starts": starts,
    "pipeline": pipeline, "pipeline_tiled": pipeline,
}
