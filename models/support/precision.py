"""Half precision (float16, bfloat16) where it is safe: in the large matrix products, and nowhere else.

A product in half precision takes half the memory and a fraction of the time, and rounds its result once. What is added
to again and again must not be rounded each time: residual streams, the sums in norms and softmax, latents, the noise
schedule, tiles. (Steps of bfloat16 are 1/128 of a number's size: added to 100, a block's 0.3 would vanish.)

So a layer computes in the precision of its own weight:
    `in_half(network, dtype)`   stores the weights of all Linear and Conv2d layers in dtype
    `Exact` layers              are left out: those at the ends of a network, where streams begin and results leave
Everything else stays float32, and so does float32 plus half. Training uses torch.autocast, which chooses the same
products; Exact layers switch it off for themselves.
"""

import torch
import torch.nn as nn


class Exact:
    """Mixin: a layer that begins a residual stream, or whose result counts many times; autocast does not change it."""

    def forward(self, x, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype), *args, **kwargs)


class ExactLinear(Exact, nn.Linear):
    """nn.Linear in float32 always."""


class ExactConv2d(Exact, nn.Conv2d):
    """nn.Conv2d in float32 always."""


def input_as_weight(layer, args):
    """Hook before a layer's forward: its input x, the first of args, in the precision of its weight."""
    x, *others = args
    return x.to(layer.weight.dtype), *others


def in_half(network, dtype, adapters=True):
    """Store the weights of large products in dtype; everything else keeps its own.  -> network

    dtype: float16, bfloat16, or float32, which changes nothing; adapters: LoRA's too, which training keeps as they are
    """
    if dtype == torch.float32:
        return network
    for name, layer in network.named_children():
        if isinstance(layer, Exact) or (name.startswith("lora_") and not adapters):
            continue
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            for parameter in layer.parameters(recurse=False):       # its own, not its adapters'
                parameter.data = parameter.data.to(dtype)
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)):
            layer.register_forward_pre_hook(input_as_weight)
        in_half(layer, dtype, adapters)
    return network
