"""The autoencoder of Stable Diffusion, and VOSR's light decoder for it.

Papers:  Latent Diffusion, 2112.10752 (the KL autoencoder, f = 8); VOSR, 2604.03225 (a small decoder for its latents).
Weights: vae/diffusion_pytorch_model.safetensors of any Stable Diffusion; sd21_lwdecoder.pth of VOSR.
Left out: training losses, LDM's own key names.

Large pictures are computed exactly, in strips (strips.py). C: which adapters are on, and their matrices (lora.py).
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.lora import OFF, Conv2d, ExactConv2d, Linear, of_block
from models.support import precision
from models.support.strips import Checkpointing, attention, fixed, in_strips, norm_silu_conv

SD_VAE_SCALE = 0.18215  # one over the deviation of SD's latents; diffusion happens on latents times this


@dataclass
class VAEConfig:
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    widths: tuple = (128, 256, 512, 512)  # n levels make a factor of 2^(n-1)
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

    def forward(self, x, C=OFF):
        h = norm_silu_conv(self.norm1, partial(self.conv1, C=C), x)
        h = norm_silu_conv(self.norm2, partial(self.conv2, C=C), h, into=h)
        return in_strips(lambda h, x: h + (self.conv_shortcut(x, C) if self.conv_shortcut else x), h, x, into=h)


def rename_old_attention(module, state_dict, prefix, *_):
    """Load hook: names and shapes of older files."""
    for old, new in [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")]:
        for kind in ("weight", "bias"):
            if f"{prefix}{old}.{kind}" in state_dict:
                tensor = state_dict.pop(f"{prefix}{old}.{kind}")
                state_dict[f"{prefix}{new}.{kind}"] = tensor.flatten(1) if kind == "weight" else tensor


class Attention(nn.Module):
    """x + self-attention over all pixels, one head of full width.  (B, c, H, W) -> same shape"""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = group_norm(groups, channels)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])
        self.register_load_state_dict_pre_hook(rename_old_attention)

    def forward(self, x, C=OFF):
        h = fixed(self.group_norm, x)(x).flatten(2).transpose(1, 2)  # (B, H*W, c)
        q, k, v = (to(h, C).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](attention(q, k, v).squeeze(1), C)
        return x + h.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x, C=OFF):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, C), C), C)


class Downsample(nn.Module):
    """(B, c, H, W) -> (B, c, H/2, W/2)"""

    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x, C=OFF):
        # trap: padded at the right and bottom only
        return in_strips(lambda x: self.conv(F.pad(x, (0, 1, 0, 1)), C), x, rate=0.5)


class Upsample(nn.Module):
    """(B, c, H, W) -> (B, c, 2H, 2W)"""

    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, C=OFF):
        return in_strips(lambda x: self.conv(F.interpolate(x, scale_factor=2, mode="nearest"), C), x, rate=2)


class Level(nn.Module):
    """Resnets of one resolution, then the step to the next one; without a forward, which would hold on to its input."""

    def __init__(self, c_in, c_out, layers, groups, step=None):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])
        if step is Downsample:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        if step is Upsample:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def __iter__(self):
        return (layer for layers in self.children() for layer in layers)


# ---- the two halves

class Encoder(Checkpointing, nn.Module):
    """Picture to latent statistics.  (B, in_channels, H, W) -> (B, out_channels, H/8, W/8)

    C: {adapter: (B or 1, blocks, r, r) or 1}; blocks are the levels, the middle, conv_in with conv_out
    """

    def __init__(self, in_channels, out_channels, widths, layers, groups):
        super().__init__()
        steps = [Downsample] * (len(widths) - 1) + [None]
        self.conv_in = ExactConv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(Level(c_in, c_out, layers, groups, step)
                                         for c_in, c_out, step in zip([widths[0], *widths], widths, steps))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = group_norm(groups, widths[-1])
        self.conv_out = ExactConv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x, C=OFF):
        *C_levels, C_mid, C_ends = (of_block(C, i) for i in range(len(self.down_blocks) + 2))
        x = in_strips(partial(self.conv_in, C=C_ends), x)
        for level, C_level in zip(self.down_blocks, C_levels):
            for layer in level:
                x = self.run(layer, x, C_level)
        return norm_silu_conv(self.conv_norm_out, partial(self.conv_out, C=C_ends), self.mid_block(x, C_mid))


class Decoder(Checkpointing, nn.Module):
    """The encoder backwards, one more resnet a level.  (B, in_channels, h, w) unscaled -> (B, out_channels, 8h, 8w)

    C: {adapter: 1}, the same for all layers
    """

    def __init__(self, in_channels, out_channels, widths, layers, groups):
        super().__init__()
        widths = widths[::-1]  # deepest first
        steps = [Upsample] * (len(widths) - 1) + [None]
        self.conv_in = ExactConv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(Level(c_in, c_out, layers + 1, groups, step)
                                       for c_in, c_out, step in zip([widths[0], *widths], widths, steps))
        self.conv_norm_out = group_norm(groups, widths[-1])
        self.conv_out = ExactConv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z, C=OFF):
        x = self.mid_block(in_strips(partial(self.conv_in, C=C), z), C)
        for level in self.up_blocks:
            for layer in level:
                x = self.run(layer, x, C)
        return norm_silu_conv(self.conv_norm_out, partial(self.conv_out, C=C), x)


# ---- the models

def mean_and_deviation(h):
    mean, logvar = h.chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


def draw(mean, std, generator=None):
    """A sample, or the mean; noise from the generator's device in float32: one seed, one noise everywhere."""
    if generator is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator, device=generator.device)
    return mean + std * noise.to(mean, non_blocking=True)


class VAE(nn.Module):
    """Pictures are (B, 3, H, W) in [-1, 1], sides multiples of 8; latents (B, 4, H/8, W/8), of about unit variance."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = c = config
        self.factor = 2 ** (len(c.widths) - 1)  # pixels per latent cell side
        self.blocks = len(c.widths) + 2  # of the encoder, that adapters tell apart
        self.encoder = Encoder(c.in_channels, 2 * c.latent_channels, c.widths, c.layers_per_block, c.norm_groups)
        self.decoder = Decoder(c.latent_channels, c.out_channels, c.widths, c.layers_per_block, c.norm_groups)
        self.quant_conv = precision.ExactConv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
        self.post_quant_conv = precision.ExactConv2d(c.latent_channels, c.latent_channels, 1)

    def moments(self, x, C=OFF):
        """Mean and deviation of q(z | x).  x: (B, 3, H, W) -> two of (B, 4, h, w), unscaled"""
        return mean_and_deviation(self.quant_conv(self.encoder(x, C=C)))

    def encode(self, x, generator=None, C=OFF):
        """q's mode, or a sample of it if there is a generator.  (B, 3, H, W) -> (B, 4, h, w) scaled latent"""
        return draw(*self.moments(x, C), generator) * self.config.scaling_factor

    def decode(self, z, C=OFF):
        """(B, 4, h, w) scaled latent -> (B, 3, 8h, 8w) in about [-1, 1], not clamped; C: of `Decoder`"""
        return self.decoder(self.post_quant_conv(z / self.config.scaling_factor), C)


class LightDecoder(Decoder):  # VOSR's, for SD's latents
    def __init__(self, in_channels=4, out_channels=3, block_out_channels=(64, 128, 256, 256), layers_per_block=2):
        super().__init__(in_channels, out_channels, block_out_channels, layers_per_block, groups=32)

    def decode(self, z):
        """(B, 4, h, w) scaled latent -> (B, 3, 8h, 8w) in about [-1, 1], not clamped"""
        return self(z / SD_VAE_SCALE)
