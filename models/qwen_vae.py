"""The autoencoder of Qwen-Image for single pictures; VOSR-1.4B works on its latents.

Papers:  Qwen-Image, 2508.02324; Wan, 2503.20314 (the architecture, for video).
Weights: Qwen-Image-vae-2d/diffusion_pytorch_model.safetensors of VOSR; or Qwen-Image's own, the video form, which load
         hooks cut down.
Left out: time (a picture is a video's first frame, which sees no other), training losses, attn_scales.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support.precision import Exact
from models.support.strips import attention, in_strips, norm_silu_conv
from models.support.winograd import conv2d
from models.vae import draw, mean_and_deviation

# Of each latent channel over natural pictures; diffusion happens on (latent - mean) / std.
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass
class QwenVAEConfig:
    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple = (1, 2, 4, 4)  # widths over base_dim
    num_res_blocks: int = 2
    latents_mean: tuple = LATENTS_MEAN  # trap: a config.json may lack these two
    latents_std: tuple = LATENTS_STD


# ---- layers

class Conv(nn.Conv2d):
    def __init__(self, c_in, c_out, size=3, **options):
        super().__init__(c_in, c_out, size, **{"padding": size // 2, **options})

    def forward(self, x):
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)


class ExactConv(Exact, Conv):
    """Conv at the ends of a network, always in float32."""


class Norm(nn.Module):
    """RMS norm of every pixel over its channels, with a gain.  (B, C, H, W) -> same shape"""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        x = F.normalize(x.float(), dim=1).type_as(x)  # squares overflow in float16
        return x * x.shape[1] ** 0.5 * self.gamma


class ResnetBlock(nn.Module):
    """x + two rounds of norm, SiLU, 3x3 convolution.  (B, c_in, H, W) -> (B, c_out, H, W)"""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = Norm(c_in)
        self.conv1 = Conv(c_in, c_out)
        self.norm2 = Norm(c_out)
        self.conv2 = Conv(c_out, c_out)
        self.conv_shortcut = nn.Identity() if c_in == c_out else Conv(c_in, c_out, 1)

    def forward(self, x):
        h = norm_silu_conv(self.norm1, self.conv1, x)
        h = norm_silu_conv(self.norm2, self.conv2, h, into=h)
        return in_strips(lambda h, x: h + self.conv_shortcut(x), h, x, into=h)


class Attention(nn.Module):
    """x + self-attention over all pixels, one head of full width.  (B, C, H, W) -> same shape"""

    def __init__(self, channels):
        super().__init__()
        self.norm = Norm(channels)
        self.to_qkv = Conv(channels, 3 * channels, 1)
        self.proj = Conv(channels, channels, 1)

    def forward(self, x):
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, H*W, 3C)
        h = attention(*qkv.chunk(3, dim=-1))
        return x + self.proj(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class MidBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nn.Module):
    """A step in resolution: what changes the size, and a convolution."""

    def __init__(self, rate, *layers):
        super().__init__()
        self.rate = rate
        self.resample = nn.Sequential(*layers)

    def forward(self, x):
        return in_strips(self.resample, x, rate=self.rate)


def downsample(channels):
    """(B, C, H, W) -> (B, C, H/2, W/2)"""
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # trap: right and below only
    return Resample(0.5, pad, Conv(channels, channels, stride=2, padding=0))


def upsample(channels):
    """(B, C, H, W) -> (B, C/2, 2H, 2W)"""
    return Resample(2, nn.Upsample(scale_factor=2, mode="nearest"), Conv(channels, channels // 2))


class UpBlock(nn.Module):
    """All resnets of one resolution, then the step to the next one; a list without a forward, as vae.Level."""

    def __init__(self, c_in, c_out, layers, last):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(layers)])
        self.upsamplers = nn.ModuleList([] if last else [upsample(c_out)])

    def __iter__(self):
        return iter((*self.resnets, *self.upsamplers))


# ---- the two halves

class Encoder(nn.Module):
    """Picture to latent statistics.  (B, 3, H, W) -> (B, c_out, H/8, W/8)"""

    def __init__(self, c_out, widths, layers):
        super().__init__()
        blocks, c_in = [], widths[0]
        for level, width in enumerate(widths):
            for _ in range(layers):
                blocks.append(ResnetBlock(c_in, width))
                c_in = width
            if level < len(widths) - 1:
                blocks.append(downsample(width))
        self.conv_in = ExactConv(3, widths[0])
        self.down_blocks = nn.ModuleList(blocks)  # one flat list: the public names count through
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = ExactConv(widths[-1], c_out)

    def forward(self, x):
        x = in_strips(self.conv_in, x)
        for layer in self.down_blocks:
            x = layer(x)
        return norm_silu_conv(self.norm_out, self.conv_out, self.mid_block(x))


class Decoder(nn.Module):
    """Latent to picture, with one more resnet a level.  (B, c_in, h, w) unscaled -> (B, 3, 8h, 8w)"""

    def __init__(self, c_in, widths, layers):
        super().__init__()
        widths = widths[::-1]  # deepest first
        arriving = [widths[0], *(width // 2 for width in widths)]  # trap: every step up halves the channels
        self.conv_in = ExactConv(c_in, widths[0])
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList([UpBlock(c, width, layers + 1, last=level == len(widths) - 1)
                                        for level, (c, width) in enumerate(zip(arriving, widths))])
        self.norm_out = Norm(widths[-1])
        self.conv_out = ExactConv(widths[-1], 3)

    def forward(self, z):
        x = self.mid_block(in_strips(self.conv_in, z))
        for block in self.up_blocks:
            for layer in block:
                x = layer(x)
        return norm_silu_conv(self.norm_out, self.conv_out, x)


# ---- the model

def take_first_frame(module, state_dict, prefix, *_):
    """Load hook: the video form, less what a picture, the first frame, never meets.

    Convolutions are causal: of each only the last slice in time counts, and none that changes the frame rate.
    """
    for name in [name for name in state_dict if name.startswith(prefix)]:
        x, (step, of_time, _) = state_dict[name], name.partition("time_conv.")
        if of_time and f"{step}resample.1.weight" in state_dict:
            del state_dict[name]
        elif x.ndim == 5:
            state_dict[name] = x[:, :, -1]
        elif name.endswith("gamma") and x.ndim == 4:
            state_dict[name] = x.flatten(2)


class QwenVAE(nn.Module):
    """Qwen-Image's autoencoder, with the interface of vae.VAE; latents are (B, 16, h, w)."""

    def __init__(self, config=QwenVAEConfig()):
        super().__init__()
        self.config = c = config
        if not c.z_dim == len(c.latents_mean) == len(c.latents_std):
            means, deviations = len(c.latents_mean), len(c.latents_std)
            raise ValueError(f"{c.z_dim} latent channels, but {means} means and {deviations} deviations")
        widths = [c.base_dim * m for m in c.dim_mult]
        self.factor = 2 ** (len(widths) - 1)  # pixels per latent cell side
        self.encoder = Encoder(2 * c.z_dim, widths, c.num_res_blocks)
        self.decoder = Decoder(c.z_dim, widths, c.num_res_blocks)
        self.quant_conv = ExactConv(2 * c.z_dim, 2 * c.z_dim, 1)
        self.post_quant_conv = ExactConv(c.z_dim, c.z_dim, 1)
        self.register_load_state_dict_pre_hook(take_first_frame)

    def statistics(self, z):
        """Mean and deviation of the latent channels -> two of (C, 1, 1), like z"""
        both = self.config.latents_mean, self.config.latents_std
        return (torch.tensor(numbers).to(z, non_blocking=True).view(-1, 1, 1) for numbers in both)

    def moments(self, x):
        return mean_and_deviation(self.quant_conv(self.encoder(x)))

    def encode(self, x, generator=None):
        z = draw(*self.moments(x), generator)
        channel_mean, channel_std = self.statistics(z)
        return (z - channel_mean) / channel_std

    def decode(self, z):
        channel_mean, channel_std = self.statistics(z)
        return self.decoder(self.post_quant_conv(z * channel_std + channel_mean))
