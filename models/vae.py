"""The autoencoder of Stable Diffusion, and VOSR's light decoder for it.

Papers:  Latent Diffusion, 2112.10752 (the KL autoencoder, f = 8); VOSR, 2604.03225 (a small decoder for its latents).
Weights: vae/diffusion_pytorch_model.safetensors of any Stable Diffusion; sd21_lwdecoder.pth of VOSR.
Left out: training losses, LDM's own key names.

    image (B, 3, H, W) -> Encoder: 2 resnets a level, halved three times; attention -> mean, std (B, 4, H/8, W/8) -> z
    z -> Decoder: attention; 3 resnets a level, doubled three times -> image

All layers have an argument `adapters`: which of theirs are on, {name: matrix or 1}, see lora.py.

`self.run(layer, x, adapters)` is layer(x, adapters). For large images it computes the same in less memory, see
support/strips.py. Maps of a latent's size are never so large, so the middle's layers are called directly.
"""

from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.lora import NO_ADAPTERS, Conv2d, ExactConv2d, Linear, of_block
from models.support import strips

SD_VAE_SCALE = 0.18215  # 1 / standard deviation of SD's latents; diffusion happens on latents times this


@dataclass
class VAEConfig:
    latent_channels: int = 4
    widths: tuple = (128, 256, 512, 512)  # channels of each level; n levels make a factor of 2^(n-1)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = SD_VAE_SCALE


# ---- layers

def group_norm(groups, channels):
    return nn.GroupNorm(groups, channels, eps=1e-6)  # trap: PyTorch's 1e-5 shows in flat regions


class ResnetBlock(nn.Module):
    """x + two rounds of norm, SiLU, convolution.  (B, c_in, H, W) -> (B, c_out, H, W)"""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = group_norm(groups, c_in)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(groups, c_out)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = None if c_in == c_out else Conv2d(c_in, c_out, 1)

    def forward(self, x, adapters=NO_ADAPTERS):
        h = self.conv1(F.silu(self.norm1(x)), adapters)
        h = self.conv2(F.silu(self.norm2(h)), adapters)
        return h + self.shortcut(x, adapters)

    def shortcut(self, x, adapters=NO_ADAPTERS):
        return x if self.conv_shortcut is None else self.conv_shortcut(x, adapters)


def rename_old_attention(module, state_dict, prefix, *_):
    """Load hook: names and shapes of older files."""
    for old, new in [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")]:
        for kind in ("weight", "bias"):
            if f"{prefix}{old}.{kind}" in state_dict:
                tensor = state_dict.pop(f"{prefix}{old}.{kind}")
                state_dict[f"{prefix}{new}.{kind}"] = tensor.flatten(1) if kind == "weight" else tensor


class Attention(nn.Module):
    """x + self-attention over all pixels, one head of full width: softmax(q k^T / sqrt(c)) v.

    (B, c, H, W) -> same shape
    """

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = group_norm(groups, channels)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])  # a list of one: its public name is to_out.0
        self.register_load_state_dict_pre_hook(rename_old_attention)

    def forward(self, x, adapters=NO_ADAPTERS):
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, c)
        q, k, v = self.to_q(h, adapters), self.to_k(h, adapters), self.to_v(h, adapters)
        h = self.to_out[0](strips.attention(q, k, v), adapters)
        return x + h.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """Resnet, attention, resnet, at the lowest resolution.  (B, c, h, w) -> same shape"""

    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x, adapters=NO_ADAPTERS):
        x = self.resnets[0](x, adapters)
        x = self.attentions[0](x, adapters)
        return self.resnets[1](x, adapters)


class Downsample(nn.Module):
    """(B, c, H, W) -> (B, c, H/2, W/2)"""

    rate = 0.5  # rows of the result per row of x; support/strips.py asks for it

    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x, adapters=NO_ADAPTERS):
        return self.conv(F.pad(x, (0, 1, 0, 1)), adapters)  # trap: padded at the right and bottom only


class Upsample(nn.Module):
    """(B, c, H, W) -> (B, c, 2H, 2W)"""

    rate = 2    # as Downsample's

    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, adapters=NO_ADAPTERS):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"), adapters)


def resnets(c_in, c_out, layers, groups):
    """The resnets of one level, of which the first changes the width."""
    return nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])


# ---- the two halves

class Encoder(strips.InStrips, nn.Module):
    """Image to latent statistics.  (B, in_channels, H, W) in [-1, 1] -> (B, out_channels, H/8, W/8)

    adapters: {name: (B or 1, blocks, r, r) or 1}; the blocks are the levels, the middle, conv_in with conv_out
    """

    def __init__(self, in_channels, out_channels, widths, layers, groups):
        super().__init__()
        self.conv_in = ExactConv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()  # a level each; dicts, whose keys give the public names
        c_in = widths[0]
        for i, c_out in enumerate(widths):
            level = nn.ModuleDict({"resnets": resnets(c_in, c_out, layers, groups)})
            if i < len(widths) - 1:     # all but the lowest resolution
                level["downsamplers"] = nn.ModuleList([Downsample(c_out)])
            self.down_blocks.append(level)
            c_in = c_out
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = group_norm(groups, widths[-1])
        self.conv_out = ExactConv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x, adapters=NO_ADAPTERS):
        levels = len(self.down_blocks)
        of_levels = [of_block(adapters, i) for i in range(levels)]
        of_mid, of_ends = of_block(adapters, levels), of_block(adapters, levels + 1)

        x = self.run(self.conv_in, x, of_ends)
        for level, of_level in zip(self.down_blocks, of_levels):
            for layer in chain(*level.values()):    # its resnets, then its downsampler
                x = self.run(layer, x, of_level)
        x = self.mid_block(x, of_mid)
        return self.conv_out(F.silu(self.conv_norm_out(x)), of_ends)


class Decoder(strips.InStrips, nn.Module):
    """The encoder backwards, one more resnet a level.  (B, in_channels, h, w) unscaled -> (B, out_channels, 8h, 8w)

    adapters: {name: 1}, the same for all layers: no matrices here
    """

    def __init__(self, in_channels, out_channels, widths, layers, groups):
        super().__init__()
        widths = widths[::-1]  # deepest first
        self.conv_in = ExactConv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        c_in = widths[0]
        for i, c_out in enumerate(widths):
            level = nn.ModuleDict({"resnets": resnets(c_in, c_out, layers + 1, groups)})
            if i < len(widths) - 1:     # all but the image's own resolution
                level["upsamplers"] = nn.ModuleList([Upsample(c_out)])
            self.up_blocks.append(level)
            c_in = c_out
        self.conv_norm_out = group_norm(groups, widths[-1])
        self.conv_out = ExactConv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z, adapters=NO_ADAPTERS):
        x = self.mid_block(self.conv_in(z, adapters), adapters)
        for level in self.up_blocks:
            for layer in chain(*level.values()):    # its resnets, then its upsampler
                x = self.run(layer, x, adapters)
        if strips.needed(x):    # fast, as self.run: two layers at once, since the norm needs the statistics of all of x
            return strips.norm_silu_conv(self.conv_norm_out, self.conv_out, x, adapters)
        return self.conv_out(F.silu(self.conv_norm_out(x)), adapters)


# ---- the models

def mean_and_std(h):
    """Split what an encoder returns, mean and log variance.  (B, 2c, h, w) -> mean, std, each (B, c, h, w)"""
    mean, logvar = h.chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


def mode_or_sample(mean, std, generator=None):
    """The mean, or with a generator a sample.  mean, std: (B, c, h, w) -> like mean

    Noise comes from the generator's device in float32: one seed, one noise everywhere.
    """
    if generator is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator, device=generator.device)
    return mean + std * noise.to(mean, non_blocking=True)


class VAE(nn.Module):
    """Images are (B, 3, H, W) in [-1, 1], sides multiples of 8; latents (B, 4, H/8, W/8), of about unit variance."""

    def __init__(self, cfg=VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.factor = 2 ** (len(cfg.widths) - 1)  # pixels per latent cell side
        self.blocks = len(cfg.widths) + 2  # of the encoder, each with a C of its own
        c, layers, groups = cfg.latent_channels, cfg.layers_per_block, cfg.norm_groups
        self.encoder = Encoder(3, 2 * c, cfg.widths, layers, groups)  # 2: mean and log variance
        self.decoder = Decoder(c, 3, cfg.widths, layers, groups)
        self.quant_conv = ExactConv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = ExactConv2d(c, c, 1)

    def moments(self, x, adapters=NO_ADAPTERS):
        """Mean and standard deviation of q(z | x).  (B, 3, H, W) -> two of (B, 4, h, w), unscaled"""
        return mean_and_std(self.quant_conv(self.encoder(x, adapters)))

    def encode(self, x, generator=None, adapters=NO_ADAPTERS):
        """q's mode, or a sample of it if there is a generator.  (B, 3, H, W) -> (B, 4, h, w) scaled latent"""
        mean, std = self.moments(x, adapters)
        return mode_or_sample(mean, std, generator) * self.cfg.scaling_factor

    def decode(self, z, adapters=NO_ADAPTERS):
        """(B, 4, h, w) scaled latent -> (B, 3, 8h, 8w) in about [-1, 1], not clamped; adapters: of Decoder"""
        return self.decoder(self.post_quant_conv(z / self.cfg.scaling_factor), adapters)


class LightDecoder(Decoder):
    """VOSR's decoder for Stable Diffusion's latents, half as wide and without post_quant_conv."""

    def __init__(self, in_channels=4, out_channels=3, block_out_channels=(64, 128, 256, 256), layers_per_block=2):
        super().__init__(in_channels, out_channels, block_out_channels, layers_per_block, groups=32)

    def decode(self, z):
        """(B, 4, h, w) scaled latent -> (B, 3, 8h, 8w) in about [-1, 1], not clamped"""
        return self(z / SD_VAE_SCALE)
