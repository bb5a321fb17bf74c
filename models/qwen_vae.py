"""The autoencoder of Qwen-Image for single images; VOSR-1.4B works on its latents.

Papers:  Qwen-Image, 2508.02324; Wan, 2503.20314 (the architecture, for video).
Weights: Qwen-Image-vae-2d/diffusion_pytorch_model.safetensors of VOSR; or Qwen-Image's own, the video form, which a
         load hook cuts down.
Left out: time (an image is a video's first frame, which sees no other), training losses, attn_scales.

As vae.py, but for: RMS norms instead of group norms; widths that grow with the resnets and shrink with the step up; 16
latent channels, each normalised by constants. `self.run(layer, x)` is layer(x), see support/strips.py.
"""

from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support import strips
from models.support.precision import Exact
from models.support.winograd import conv2d
from models.vae import mean_and_std, mode_or_sample

# Of each latent channel over natural images; diffusion happens on (latent - mean) / std.
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass
class QwenVAEConfig:
    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple = (1, 2, 4, 4)  # width of each level over base_dim
    num_res_blocks: int = 2
    latents_mean: tuple = LATENTS_MEAN  # trap: a config.json may lack these two
    latents_std: tuple = LATENTS_STD


# ---- layers

class Conv(nn.Conv2d):
    """nn.Conv2d that keeps the size unless told otherwise, on CPUs in fewer products (winograd.py)."""

    def __init__(self, c_in, c_out, size=3, stride=1, padding=None):
        super().__init__(c_in, c_out, size, stride, size // 2 if padding is None else padding)

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
        self.conv_shortcut = None if c_in == c_out else Conv(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(x)

    def shortcut(self, x):
        return x if self.conv_shortcut is None else self.conv_shortcut(x)


class Attention(nn.Module):
    """x + self-attention over all pixels, one head of full width: softmax(q k^T / sqrt(C)) v.

    (B, C, H, W) -> same shape
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = Norm(channels)
        self.to_qkv = Conv(channels, 3 * channels, 1)
        self.proj = Conv(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # each (B, H*W, C)
        h = strips.attention(q, k, v)
        return x + self.proj(h.transpose(1, 2).reshape(x.shape))


class MidBlock(nn.Module):
    """Resnet, attention, resnet, at the lowest resolution.  (B, C, h, w) -> same shape"""

    def __init__(self, channels):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels) for _ in range(2)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2)"""

    rate = 0.5  # rows of the result per row of x; support/strips.py asks for it

    def __init__(self, channels):
        super().__init__()
        pad = nn.ZeroPad2d((0, 1, 0, 1))  # trap: right and below only
        self.resample = nn.Sequential(pad, Conv(channels, channels, stride=2, padding=0))

    def forward(self, x):
        return self.resample(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C/2, 2H, 2W)"""

    rate = 2    # as Downsample's

    def __init__(self, channels):
        super().__init__()
        enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.resample = nn.Sequential(enlarge, Conv(channels, channels // 2))

    def forward(self, x):
        return self.resample(x)


# ---- the two halves

class Encoder(strips.InStrips, nn.Module):
    """Image to latent statistics.  (B, 3, H, W) in [-1, 1] -> (B, c_out, H/8, W/8)"""

    def __init__(self, c_out, widths, layers):
        super().__init__()
        self.conv_in = ExactConv(3, widths[0])
        self.down_blocks = nn.ModuleList()  # one flat list: the public names count through
        c_in = widths[0]
        for level, width in enumerate(widths):
            for _ in range(layers):
                self.down_blocks.append(ResnetBlock(c_in, width))
                c_in = width
            if level < len(widths) - 1:
                self.down_blocks.append(Downsample(width))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = ExactConv(widths[-1], c_out)

    def forward(self, x):
        x = self.run(self.conv_in, x)
        for layer in self.down_blocks:
            x = self.run(layer, x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(strips.InStrips, nn.Module):
    """Latent to image, with one more resnet a level.  (B, c_in, h, w) unscaled -> (B, 3, 8h, 8w)"""

    def __init__(self, c_in, widths, layers):
        super().__init__()
        widths = widths[::-1]  # deepest first
        self.conv_in = ExactConv(c_in, widths[0])
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()  # a level each; dicts, whose keys give the public names
        c_in = widths[0]
        for level, width in enumerate(widths):
            resnets = [ResnetBlock(c_in, width), *(ResnetBlock(width, width) for _ in range(layers))]
            self.up_blocks.append(nn.ModuleDict({"resnets": nn.ModuleList(resnets)}))
            if level < len(widths) - 1:
                self.up_blocks[-1]["upsamplers"] = nn.ModuleList([Upsample(width)])
                c_in = width // 2  # trap: every step up halves the channels
        self.norm_out = Norm(widths[-1])
        self.conv_out = ExactConv(widths[-1], 3)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            for layer in chain(*level.values()):
                x = self.run(layer, x)
        if strips.needed(x):    # fast, as self.run: both layers at once, as in vae.py
            return strips.norm_silu_conv(self.norm_out, self.conv_out, x)
        return self.conv_out(F.silu(self.norm_out(x)))


# ---- the model

def take_first_frame(module, state_dict, prefix, *_):
    """Load hook: the video form, less what an image, the first frame, never meets.

    Convolutions are causal: before the first frame there are zeros, so only the last slice in time counts.
    """
    own_names = [name for name in state_dict if name.startswith(prefix)]
    for name in own_names:
        tensor = state_dict[name]
        if "time_conv." in name:
            # it changes the frame rate, beside a step up or down; a name that is beside none is left to be reported
            step = name.partition("time_conv.")[0]
            if f"{step}resample.1.weight" in state_dict:
                del state_dict[name]
                continue
        if tensor.ndim == 5:  # a convolution's weight (out, in, time, height, width)
            state_dict[name] = tensor[:, :, -1]
        elif name.endswith("gamma") and tensor.ndim == 4:  # a norm's gain (C, 1, 1, 1)
            state_dict[name] = tensor.flatten(2)


class QwenVAE(nn.Module):
    """Qwen-Image's autoencoder, with the interface of vae.VAE; latents are (B, 16, H/8, W/8)."""

    def __init__(self, cfg=QwenVAEConfig()):
        super().__init__()
        self.cfg = cfg
        c, means, deviations = cfg.z_dim, len(cfg.latents_mean), len(cfg.latents_std)
        if not c == means == deviations:
            raise ValueError(f"{c} latent channels, but {means} means and {deviations} deviations")
        widths = [cfg.base_dim * m for m in cfg.dim_mult]
        self.factor = 2 ** (len(widths) - 1)  # pixels per latent cell side
        self.encoder = Encoder(2 * c, widths, cfg.num_res_blocks)   # 2: mean and log variance
        self.decoder = Decoder(c, widths, cfg.num_res_blocks)
        self.quant_conv = ExactConv(2 * c, 2 * c, 1)
        self.post_quant_conv = ExactConv(c, c, 1)
        self.register_load_state_dict_pre_hook(take_first_frame)

    def channel_statistics(self, z):
        """Mean and standard deviation of the latent channels -> (2, C, 1, 1), dtype and device of z"""
        of_channels = torch.tensor([self.cfg.latents_mean, self.cfg.latents_std], device="cpu")
        return of_channels.to(z, non_blocking=True)[:, :, None, None]

    def moments(self, x):
        """Mean and standard deviation of q(z | x).  x: (B, 3, H, W) -> two of (B, 16, h, w), not normalised"""
        return mean_and_std(self.quant_conv(self.encoder(x)))

    def encode(self, x, generator=None):
        """q's mode, or a sample of it if there is a generator.  (B, 3, H, W) -> (B, 16, h, w) normalised latent"""
        mean, std = self.moments(x)
        channel_mean, channel_std = self.channel_statistics(mean)
        return (mode_or_sample(mean, std, generator) - channel_mean) / channel_std

    def decode(self, z):
        """(B, 16, h, w) normalised latent -> (B, 3, 8h, 8w) in about [-1, 1], not clamped"""
        channel_mean, channel_std = self.channel_statistics(z)
        return self.decoder(self.post_quant_conv(z * channel_std + channel_mean))
