"""The UNet of Stable Diffusion 2.1 and SD-Turbo: predicts the noise in a latent, conditioned on tokens.

Papers:  Latent Diffusion, 2112.10752; SD-Turbo, 2311.17042.
Weights: unet/diffusion_pytorch_model.safetensors of sd-turbo (S3Diff) or stable-diffusion-2-1-base (GramSR).
Left out: SD 1.x's convolutional projections, class and size conditions, more than one transformer layer a block.

Feature maps are halved on the way down and doubled on the way up. There each resnet also gets a skip: a map of its
resolution from the way down. Every forward has an argument `adapters`: which of them are on, with their matrices C
(lora.py). In shapes c counts channels.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.dit import timestep_embedding
from models.lora import NO_ADAPTERS, Conv2d, ExactConv2d, Linear, of_block
from models.support.checkpointing import Checkpointing


@dataclass
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    widths: tuple = (320, 640, 1280, 1280)      # channels at each resolution, the highest first
    num_heads: tuple = (5, 10, 20, 20)          # trap: diffusers calls these attention_head_dim; 0 = no attention
    layers_per_block: int = 2
    context_dim: int = 1024                     # width of the tokens it is conditioned on
    norm_groups: int = 32


def alphas_cumprod():
    """Compute SD's noise schedule: a_t of z_t = sqrt(a_t) z + sqrt(1 - a_t) eps, for t = 0 .. 999.  -> (1000,)"""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device="cpu")
    betas = roots**2        # linear in the root, as SD was trained
    return (1 - betas).cumprod(0)


class TimeEmbedding(nn.Module):
    """Embeds the sinusoids of t by an MLP.  (B, D) -> (B, inner)"""

    def __init__(self, D, inner):
        super().__init__()
        self.linear_1 = nn.Linear(D, inner)
        self.linear_2 = nn.Linear(inner, inner)

    def forward(self, sinusoids):
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class ResnetBlock(nn.Module):
    """Adds two rounds of norm, SiLU, convolution to x; the time enters between them.

    x: (B, c_in, h, w); temb: (B, 4 * widths[0]), the embedded time -> (B, c_out, h, w)
    """

    def __init__(self, cfg, c_in, c_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(cfg.norm_groups, c_in, eps=1e-5)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * cfg.widths[0], c_out)
        self.norm2 = nn.GroupNorm(cfg.norm_groups, c_out, eps=1e-5)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = None if c_in == c_out else Conv2d(c_in, c_out, 1)

    def forward(self, x, temb, adapters):
        h = self.conv1(F.silu(self.norm1(x)), adapters)
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)), adapters)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, adapters)
        return h + shortcut


class Attention(nn.Module):
    """Lets tokens attend to the context, or to each other.  x: (B, N, D); context: (B, M, D') -> (B, N, D)"""

    def __init__(self, D, context_dim, nh):
        super().__init__()
        self.nh = nh
        self.to_q = Linear(D, D, bias=False)
        self.to_k = Linear(context_dim, D, bias=False)
        self.to_v = Linear(context_dim, D, bias=False)
        self.to_out = nn.ModuleList([Linear(D, D)])

    def forward(self, x, context, adapters):
        def in_heads(y):
            return y.unflatten(-1, (self.nh, -1)).transpose(1, 2)  # (B, nh, N, hd)

        q = in_heads(self.to_q(x, adapters))
        k = in_heads(self.to_k(context, adapters))
        v = in_heads(self.to_v(context, adapters))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2), adapters)


class GEGLU(nn.Module):
    """Multiplies values by the GELU of gates, both linear in x.  (B, N, D) -> (B, N, inner)"""

    def __init__(self, D, inner):
        super().__init__()
        self.proj = Linear(D, 2 * inner)

    def forward(self, x, adapters):
        value, gate = self.proj(x, adapters).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Runs the MLP of a transformer block.  (B, N, D) -> same shape"""

    def __init__(self, D):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(D, 4 * D), nn.Identity(), Linear(4 * D, D)])  # the public net.1: dropout

    def forward(self, x, adapters):
        return self.net[2](self.net[0](x, adapters), adapters)


class TransformerBlock(nn.Module):
    """Adds self-attention, attention to the context and MLP to x, each after a norm.  (B, N, D) -> same shape"""

    def __init__(self, D, context_dim, nh):
        super().__init__()
        self.norm1 = nn.LayerNorm(D)
        self.attn1 = Attention(D, D, nh)
        self.norm2 = nn.LayerNorm(D)
        self.attn2 = Attention(D, context_dim, nh)
        self.norm3 = nn.LayerNorm(D)
        self.ff = FeedForward(D)

    def forward(self, x, context, adapters):
        y = self.norm1(x)
        x = x + self.attn1(y, y, adapters)
        x = x + self.attn2(self.norm2(x), context, adapters)
        return x + self.ff(self.norm3(x), adapters)


class SpatialTransformer(nn.Module):
    """Adds to x a transformer whose tokens are the cells of the map.  (B, D, h, w) -> same shape"""

    def __init__(self, cfg, D, nh):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.norm_groups, D, eps=1e-6)  # trap: not the 1e-5 of the resnets
        self.proj_in = Linear(D, D)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(D, cfg.context_dim, nh)])
        self.proj_out = Linear(D, D)

    def forward(self, x, context, adapters):
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = self.proj_in(tokens, adapters).type_as(x)  # a residual stream begins: float32, as x, see precision.py
        tokens = self.transformer_blocks[0](tokens, context, adapters)
        tokens = self.proj_out(tokens, adapters)
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halves the resolution.  (B, c, h, w), h and w even -> (B, c, h/2, w/2)"""

    def __init__(self, c):
        super().__init__()
        self.conv = Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x, adapters):
        return self.conv(x, adapters)


class Upsample(nn.Module):
    """Doubles the resolution.  (B, c, h, w) -> (B, c, 2h, 2w)"""

    def __init__(self, c):
        super().__init__()
        self.conv = Conv2d(c, c, 3, padding=1)

    def forward(self, x, adapters):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"), adapters)


def transformers(cfg, c, num_heads, n):
    """Make the n transformers of a block, none if it has no heads."""
    if num_heads == 0:
        return nn.ModuleList()
    return nn.ModuleList(SpatialTransformer(cfg, c, num_heads) for _ in range(n))


class DownBlock(nn.Module):
    """Runs resnets at one resolution, a transformer after each if there are heads, and halves what comes out.

    halve: the last block has nothing below it and keeps the resolution
    """

    def __init__(self, cfg, c_in, c_out, num_heads, halve):
        super().__init__()
        widths = [c_in] + [c_out] * (cfg.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResnetBlock(cfg, width, c_out) for width in widths)
        self.attentions = transformers(cfg, c_out, num_heads, len(widths))
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if halve else [])

    def forward(self, x, temb, context, adapters):
        """Run the block.  (B, c_in, h, w) -> (B, c_out, h/2, w/2), list of the maps it made, which the way up needs"""
        maps = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb, adapters)
            if self.attentions:
                x = self.attentions[i](x, context, adapters)
            maps.append(x)
        for downsample in self.downsamplers:
            x = downsample(x, adapters)
            maps.append(x)
        return x, maps


class MidBlock(nn.Module):
    """Runs resnet, transformer, resnet at the lowest resolution.  (B, c, h, w) -> same shape"""

    def __init__(self, cfg, c, nh):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(cfg, c, c) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(cfg, c, nh)])

    def forward(self, x, temb, context, adapters):
        x = self.resnets[0](x, temb, adapters)
        x = self.attentions[0](x, context, adapters)
        return self.resnets[1](x, temb, adapters)


class UpBlock(nn.Module):
    """Runs resnets at one resolution, each on x beside a skip, transformers as in DownBlock, and doubles.

    c_skips: channels of each resnet's skip; double: the last block is at full resolution and keeps it
    """

    def __init__(self, cfg, c_in, c_out, c_skips, num_heads, double):
        super().__init__()
        widths = [c_in] + [c_out] * (len(c_skips) - 1)
        self.resnets = nn.ModuleList(ResnetBlock(cfg, c + c_skip, c_out) for c, c_skip in zip(widths, c_skips))
        self.attentions = transformers(cfg, c_out, num_heads, len(widths))
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if double else [])

    def forward(self, x, skips, temb, context, adapters):
        """Run the block.  x: (B, c_in, h, w); skips: a map (B, c_skip, h, w) for each resnet -> (B, c_out, 2h, 2w)"""
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips)):
            x = resnet(torch.cat([x, skip], dim=1), temb, adapters)
            if self.attentions:
                x = self.attentions[i](x, context, adapters)
        for upsample in self.upsamplers:
            x = upsample(x, adapters)
        return x


class UNet(Checkpointing, nn.Module):
    """Predicts the noise in a latent.

    `self.run(block, ...)` is block(...); in training it can save memory, see support/checkpointing.py.
    """

    def __init__(self, cfg=UNetConfig()):
        super().__init__()
        self.cfg = cfg
        widths, last = cfg.widths, len(cfg.widths) - 1
        num_heads = [*cfg.num_heads[:last], 0]      # at the lowest resolution only mid_block has a transformer
        self.conv_in = ExactConv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])

        # SD at a latent of 64 x 64:            channels  heads  resolution
        #   down_blocks.0                     320 ->  320    5   64 -> 32
        #   down_blocks.1                     320 ->  640   10   32 -> 16
        #   down_blocks.2                     640 -> 1280   20   16 -> 8
        #   down_blocks.3, mid_block         1280 -> 1280  -, 20    8
        #   up_blocks.0 + 1280 1280 1280     1280 -> 1280    -    8 -> 16   + skips
        #   up_blocks.1 + 1280 1280  640     1280 -> 1280   20   16 -> 32
        #   up_blocks.2 +  640  640  320     1280 ->  640   10   32 -> 64
        #   up_blocks.3 +  320  320  320      640 ->  320    5   64
        c, c_maps = widths[0], [widths[0]]          # channels of x, and of all maps that the way down keeps
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            self.down_blocks.append(DownBlock(cfg, c, width, num_heads[i], halve=i < last))
            c_maps += [width] * cfg.layers_per_block
            if i < last:
                c_maps.append(width)                # the halved map
            c = width
        self.mid_block = MidBlock(cfg, c, cfg.num_heads[last])
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            c_skips = [c_maps.pop() for _ in range(cfg.layers_per_block + 1)]       # the latest first
            self.up_blocks.append(UpBlock(cfg, c, widths[i], c_skips, num_heads[i], double=i > 0))
            c = widths[i]
        self.conv_norm_out = nn.GroupNorm(cfg.norm_groups, widths[0], eps=1e-5)
        self.conv_out = ExactConv2d(widths[0], cfg.out_channels, 3, padding=1)

    @property
    def blocks(self):
        """List the modules that have an S3Diff matrix C each, by block id; conv_in has none of its own."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks, self.conv_out]

    def forward(self, z, t, context, adapters=NO_ADAPTERS):
        """Predict the noise in a latent.

        z: (B, in_channels, h, w) noisy latent; h, w multiples of 2 ** (len(widths) - 1), since maps are halved
        t: integer or (B,), 0 to 999; context: (B, N, context_dim)
        adapters: {name: (B or 1, blocks, r, r) or 1}, see lora.py; without it all are off
        -> (B, out_channels, h, w)
        """
        n = len(self.down_blocks)
        of_blocks = [of_block(adapters, i) for i in range(len(self.blocks))]
        down, mid, up, out = of_blocks[:n], of_blocks[n], of_blocks[n + 1 : -1], of_blocks[-1]

        if not torch.is_tensor(t):
            t = torch.full((1,), t, device=z.device)
        sinusoids = timestep_embedding(t.expand(len(z)), self.cfg.widths[0])
        temb = self.time_embedding(sinusoids.to(self.time_embedding.linear_1.weight.dtype))

        x = self.conv_in(z, down[0])
        maps = [x]
        for block, block_adapters in zip(self.down_blocks, down):
            x, block_maps = self.run(block, x, temb, context, block_adapters)
            maps += block_maps
        x = self.run(self.mid_block, x, temb, context, mid)
        for block, block_adapters in zip(self.up_blocks, up):
            skips = [maps.pop() for _ in block.resnets]     # the latest first
            x = self.run(block, x, skips, temb, context, block_adapters)
        return self.conv_out(F.silu(self.conv_norm_out(x)), out)
