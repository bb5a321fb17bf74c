"""Golden cases of S3Diff: how each case of golden/s3diff.json is computed with our code.

Each function takes the case as stored and `get(name)`, which builds an input by its recipe, and returns {output name: array}.
"""

import fill
import numpy as np
import torch
from cases_vosr import fill_module, tensors

from models.lora import Conv2d, Linear, Modulation
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig


def unet_config(c):
    return UNetConfig(c.get("in_channels", 4), c.get("out_channels", 4), tuple(c["block_out_channels"]), tuple(c["heads"]), c["layers_per_block"],
                      c["cross_attention_dim"], c.get("norm_groups", 32))


def vae_config(c):
    return VAEConfig(latent_channels=c.get("latent_channels", 4), widths=tuple(c["block_out_channels"]), layers_per_block=c["layers_per_block"],
                     norm_groups=c.get("norm_groups", 32), scaling_factor=c.get("scaling_factor", 0.18215))


def fill_checkpoint(module, prefix, salt, rename=lambda name: name):
    """Parameters that come from s3diff.pkl are filled by their path in that file."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(fill.weight(prefix + rename(name), tuple(parameter.shape), salt)))
    return module


@torch.no_grad()
def unet(case, get):
    model = fill_module(UNet(unet_config(case["config"])), case["fill"]["salt"])
    z, context = tensors(get, "latents", "context")
    return {f"eps_t{t}": model(z, t, context) for t in get("timesteps")}


@torch.no_grad()
def vae(case, get):
    model = fill_module(VAE(vae_config(case["config"])), case["fill"]["salt"])
    image, latent = tensors(get, "image", "latent")
    return {"moments": model.quant_conv(model.encoder(image)), "mode": model.moments(image)[0], "mode_scaled": model.encode(image),
            "decoded": model.decode(latent * model.config.scaling_factor), "mode_of_faint_image": model.moments(0.003 * image)[0]}


def modulation_name(name):
    part, _, rest = name.partition(".")
    return f"state_embeddings.state_dict_{part}.{rest}" if part.endswith("_block") else name if part == "w" else f"state_dict_{name}"


def make_modulation(c, salt):
    model = Modulation(c["rank_vae"], c["rank_unet"], c.get("vae_blocks", 6), c.get("unet_blocks", 10), c.get("fourier", 64),
                       c.get("block_embedding_dim", 64))
    return fill_checkpoint(model, "", salt, modulation_name)


@torch.no_grad()
def degradation_embedding(case, get):
    model = make_modulation(case["config"], case["fill"]["salt"])
    out = {}
    for network in ("vae", "unet"):
        C = out[f"{network}_matrices"] = model.matrices(network, *tensors(get, "scores"))
        out |= {f"{network}_block{i}": C[:, i] for i in range(C.shape[1])}
    return out


@torch.no_grad()
def lora(case, get):
    c = case["config"]
    layer = Conv2d(c["in"], c["out"], c["kernel"], c["stride"], c["padding"]) if "kernel" in c else Linear(c["in"], c["out"])
    layer.add_adapter("default", c["r"], c["lora_alpha"])
    fill_module(torch.nn.ModuleDict({"layer": layer}), case["fill"]["salt"])
    x, C = tensors(get, "x", "C")
    return {"base": layer(x, {}), "y": layer(x, {"default": C})}


CASES = {"unet": unet, "vae": vae, "degradation_embedding": degradation_embedding, "lora_linear": lora, "lora_conv": lora}
