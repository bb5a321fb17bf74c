"""Golden cases of VOSR: how each case of golden/vosr.json is computed with our code.

Each function takes the case as stored and `get(name)`, which builds an input by its recipe, and returns {output name: array}.
"""

import fill
import numpy as np
import torch

from models.imaging import adain, from_uint8, tile_starts, wavelet
from models.vae import LightDecoder


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
    return {"adain_float": rows(adain(target, source)),
            "adain": truncated(adain(target, source)),
            "wavelet": truncated(wavelet(target, source)),
            "wavelet_source_resized": truncated(wavelet(target, small))}


def starts(case, get):
    return {"starts": np.array([start for triple in get("triples") for start in tile_starts(*map(int, triple))])}


CASES = {"light_decoder": light_decoder, "color": color, "tile_starts": starts}
