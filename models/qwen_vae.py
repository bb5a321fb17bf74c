"""
The autoencoder of Qwen-Image for single pictures; VOSR-1.4B works on its latents.

Papers:  Qwen-Image Technical Report, 2508.02324 (the autoencoder, trained further from that of Wan); Wan, 2503.20314 (its architecture, for video).
Weights: Qwen-Image-vae-2d/diffusion_pytorch_model.safetensors of VOSR; or vae/diffusion_pytorch_model.safetensors of Qwen-Image itself, the video
         form, which load_state_dict takes as it is: load hooks cut it down. Parameter names are the public ones.
Left out: everything about time (a picture is a video's first frame, and that one sees no other), training losses;
         attn_scales of the public configurations, always empty (the official class cannot run with any);
         tiles: large pictures are computed exactly, in strips (strips.py).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support.precision import Exact
from models.support.strips import attention, in_strips, norm_silu_conv
from models.support.winograd import conv2d

# Of each latent channel over natural pictures; diffusion happens on (latent - mean) / std. There is no common scale as in Stable Diffusion.
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass
class QwenVAEConfig:
    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple = (1, 2, 4, 4)  # widths over base_dim; n levels make a factor of 2^(n-1)
    num_res_blocks: int = 2
    latents_mean: tuple = LATENTS_MEAN  # trap: a config.json may lack these two, and the official caller, which reads it there, then gets None
    latents_std: tuple = LATENTS_STD


# -----------------------------------------------------------------------------
# layers, each with the hook that reads its video form

def take_last_slice(module, state_dict, prefix, *_):
    """Load hook: (c_out, c_in, time, height, width) -> (c_out, c_in, height, width).

    Video convolutions are causal: before the first frame come zeros, so only the last slice in time ever meets that frame.
    """
    weight = state_dict.get(f"{prefix}weight")
    if weight is not None and weight.ndim == 5:
        state_dict[f"{prefix}weight"] = weight[:, :, -1]


class Conv(nn.Conv2d):
    def __init__(self, c_in, c_out, size=3, **options):
        super().__init__(c_in, c_out, size, **{"padding": size // 2, **options})
        self.register_load_state_dict_pre_hook(take_last_slice)

    def forward(self, x):
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)


class ExactConv(Exact, Conv):
    """Conv at the ends of a network, in float32 always: see precision.py."""


def drop_time_axis(module, state_dict, prefix, *_):
    """Load hook: (C, 1, 1, 1) -> (C, 1, 1)."""
    gamma = state_dict.get(f"{prefix}gamma")
    if gamma is not None and gamma.ndim == 4:
        state_dict[f"{prefix}gamma"] = gamma.flatten(2)


class Norm(nn.Module):
    """RMS norm of every pixel over its channels, with a gain and no bias.  (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))
        self.register_load_state_dict_pre_hook(drop_time_axis)

    def forward(self, x):
        x = F.normalize(x.float(), dim=1).type_as(x)  # float32: squares overflow in float16, and the floor 1e-12 is 0 there
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
    """x + self-attention over all pixels with one head of full width.  (B, C, H, W) -> (B, C, H, W)"""

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
    """Resnet, attention, resnet at the lowest resolution.  (B, C, h, w) -> (B, C, h, w)"""

    def __init__(self, channels):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def drop_time_conv(module, state_dict, prefix, *_):
    """Load hook: forget the convolution that changes the frame rate; the first frame passes it by."""
    for kind in ("weight", "bias"):
        state_dict.pop(f"{prefix}time_conv.{kind}", None)


class Resample(nn.Module):
    """A step in resolution: what changes the size, and a convolution, under the public names resample.0 and resample.1."""

    def __init__(self, rate, *layers):
        super().__init__()
        self.rate = rate
        self.resample = nn.Sequential(*layers)
        self.register_load_state_dict_pre_hook(drop_time_conv)

    def forward(self, x):
        return in_strips(self.resample, x, rate=self.rate)


def downsample(channels):
    """(B, C, H, W) -> (B, C, H/2, W/2)"""
    return Resample(0.5, nn.ZeroPad2d((0, 1, 0, 1)), Conv(channels, channels, stride=2, padding=0))  # trap: zeros right and below only


def upsample(channels):
    """(B, C, H, W) -> (B, C/2, 2H, 2W)"""
    return Resample(2, nn.Upsample(scale_factor=2, mode="nearest"), Conv(channels, channels // 2))  # trap: half the channels


class UpBlock(nn.Module):
    """All resnets of one resolution, then the step to the next one (absent at the last level).

    A list without a forward, which would hold on to its input while every layer but the first is done with it.
    (B, c_in, H, W) -> (B, c_out/2, 2H, 2W), or (B, c_out, H, W) without the step
    """

    def __init__(self, c_in, c_out, layers, last):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(layers)])
        self.upsamplers = nn.ModuleList([] if last else [upsample(c_out)])

    def __iter__(self):
        return iter((*self.resnets, *self.upsamplers))


# -----------------------------------------------------------------------------
# the two halves

class Encoder(nn.Module):
    """Picture to latent statistics.  (B, 3, H, W) -> (B, c_out, H/8, W/8) with four widths"""

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
        self.down_blocks = nn.ModuleList(blocks)  # of all levels in one flat list: the public names count through
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = ExactConv(widths[-1], c_out)

    def forward(self, x):
        x = in_strips(self.conv_in, x)
        for layer in self.down_blocks:
            x = layer(x)
        return norm_silu_conv(self.norm_out, self.conv_out, self.mid_block(x))


class Decoder(nn.Module):
    """Latent to picture, with one more resnet per level than the encoder.  (B, c_in, h, w) unscaled -> (B, 3, 8h, 8w) with four widths"""

    def __init__(self, c_in, widths, layers):
        super().__init__()
        widths = widths[::-1]  # deepest first
        arriving = [widths[0], *(width // 2 for width in widths)]  # every step up has halved the channels
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


# -----------------------------------------------------------------------------
# the model

class QwenVAE(nn.Module):
    """Qwen-Image's autoencoder, with the interface of models/vae.py's VAE.

    Pictures are (B, 3, H, W) in [-1, 1]; latents (B, 16, H/8, W/8), scaled to about zero mean and unit variance per channel outside this class.
    H and W should be multiples of 8: the encoder drops what is left over.
    """

    def __init__(self, config=None):
        super().__init__()
        self.config = c = config or QwenVAEConfig()
        if not c.z_dim == len(c.latents_mean) == len(c.latents_std):
            raise ValueError(f"{c.z_dim} latent channels, but {len(c.latents_mean)} means and {len(c.latents_std)} deviations of them")
        widths = [c.base_dim * m for m in c.dim_mult]
        self.factor = 2 ** (len(widths) - 1)  # pixels per latent cell side
        self.encoder = Encoder(2 * c.z_dim, widths, c.num_res_blocks)
        self.decoder = Decoder(c.z_dim, widths, c.num_res_blocks)
        self.quant_conv = ExactConv(2 * c.z_dim, 2 * c.z_dim, 1)
        self.post_quant_conv = ExactConv(c.z_dim, c.z_dim, 1)

    def statistics(self, z):
        """Mean and standard deviation of the latent channels, two of (C, 1, 1), on z's device and in its dtype."""
        return (torch.tensor(numbers).to(z, non_blocking=True).view(-1, 1, 1) for numbers in (self.config.latents_mean, self.config.latents_std))

    def moments(self, x):
        """Mean and standard deviation of the posterior q(z | x).

        x: (B, 3, H, W) in [-1, 1] -> two of (B, 16, h, w), unscaled
        """
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    def encode(self, x, generator=None):
        """Latent of a picture: the posterior's mode, or a sample of it when a generator is given.

        x: (B, 3, H, W) in [-1, 1] -> (B, 16, h, w) scaled latent
        """
        z, std = self.moments(x)
        if generator is not None:  # drawn where the generator lives, in float32: one seed, one noise on any device and dtype
            z = z + std * torch.randn(z.shape, generator=generator, device=generator.device).to(z, non_blocking=True)
        channel_mean, channel_std = self.statistics(z)
        return (z - channel_mean) / channel_std

    def decode(self, z):
        """Picture of a latent.  z: (B, 16, h, w) scaled latent -> (B, 3, 8h, 8w) in about [-1, 1], not clamped (the official class clamps here)"""
        channel_mean, channel_std = self.statistics(z)
        return self.decoder(self.post_quant_conv(z * channel_std + channel_mean))
