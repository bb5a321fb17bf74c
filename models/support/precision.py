"""Half precision where it is safe: in the large products, and nowhere else.

A product in half precision takes half the memory and a fraction of the time, and rounds its result once. What is added
to again and again must not be rounded each time: residual streams, what norms and softmax count, latents, the schedule,
tiles. (Steps of bfloat16 are 1/128 of a number's size: a stream at 100 would not feel a block's 0.3 any more.)

So a layer computes in the precision of its own weight: `in_half` stores those of large products in half, and `Exact`
layers, at the ends of the networks, are none of them. Sums with a float32 number are float32 by themselves. Training
uses torch.autocast, which finds the same products; Exact layers resist it too.
"""

import torch
import torch.nn as nn


class Exact:
    """Mixin: a layer that begins a residual stream, or whose result counts many times; autocast does not change it."""

    def forward(self, x, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype), *args, **kwargs)


class ExactLinear(Exact, nn.Linear):
    pass


class ExactConv2d(Exact, nn.Conv2d):
    pass


def as_weight(layer, args):
    """Forward hook: a layer's input in the precision of its weight."""
    return args[0].to(layer.weight.dtype), *args[1:]


def in_half(network, dtype, adapters=True):
    """Store the weights of large products in dtype; everything else keeps its own.  -> network

    adapters: LoRA's too, which training keeps as they are
    """
    for name, layer in network.named_children() if dtype != torch.float32 else ():
        if isinstance(layer, Exact) or name.startswith("lora_") and not adapters:
            continue
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            for p in layer.parameters(recurse=False):
                p.data = p.data.to(dtype)
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)):
            layer.register_forward_pre_hook(as_weight)
        in_half(layer, dtype, adapters)
    return network
