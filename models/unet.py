"""The UNet of Stable Diffusion 2.1 and SD-Turbo: predicts the noise in a latent, conditioned on tokens.

Papers:  Latent Diffusion, 2112.10752; SD-Turbo, 2311.17042.
Weights: unet/diffusion_pytorch_model.safetensors of sd-turbo (S3Diff) or stable-diffusion-2-1-base (GramSR).
Left out: SD 1.x's convolutional projections, class and size conditions, more than one transformer layer a block.

Feature maps are halved on the way down and doubled on the way up, where each resnet also gets the map that the way down
had at its resolution (a skip). C, in every forward: which adapters are on, and their matrices (lora.py).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.dit import timestep_embedding
from models.lora import NO_ADAPTERS, Conv2d, ExactConv2d, Linear, of_block
from models.support.strips import Checkpointing


@dataclass
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    widths: tuple = (320, 640, 1280, 1280)      # of the resolutions
    num_heads: tuple = (5, 10, 20, 20)          # trap: diffusers calls these attention_head_dim
    layers_per_block: int = 2
    context_dim: int = 1024                     # width of the tokens it is conditioned on
    norm_groups: int = 32


def alphas_cumprod():
    """SD's noise schedule: a_t of z_t = sqrt(a_t) z + sqrt(1 - a_t) eps, for t = 0 .. 999.  -> (1000,)"""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device="cpu") ** 2
    return (1 - betas).cumprod(0)


class TimeEmbedding(nn.Module):
    """An MLP on the sinusoids of t.  (B, D) -> (B, inner)"""

    def __init__(self, D, inner):
        super().__init__()
        self.linear_1 = nn.Linear(D, inner)
        self.linear_2 = nn.Linear(inner, inner)

    def forward(self, t):
        return self.linear_2(F.silu(self.linear_1(t)))


class ResnetBlock(nn.Module):
    """x + two rounds of norm, SiLU, convolution; the time is added between.  (B, c_in, h, w) -> (B, c_out, h, w)"""

    def __init__(self, cfg, c_in, c_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(cfg.norm_groups, c_in, eps=1e-5)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * cfg.widths[0], c_out)
        self.norm2 = nn.GroupNorm(cfg.norm_groups, c_out, eps=1e-5)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = None if c_in == c_out else Conv2d(c_in, c_out, 1)

    def forward(self, x, temb, C):
        h = self.conv1(F.silu(self.norm1(x)), C)
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)), C)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, C)
        return h + shortcut


class Attention(nn.Module):
    """Tokens attend to the context, or to each other.  x: (B, N, D); context: (B, M, D') -> (B, N, D)"""

    def __init__(self, D, context_dim, nh):
        super().__init__()
        self.nh = nh
        self.to_q = Linear(D, D, bias=False)
        self.to_k = Linear(context_dim, D, bias=False)
        self.to_v = Linear(context_dim, D, bias=False)
        self.to_out = nn.ModuleList([Linear(D, D)])

    def forward(self, x, context, C):
        def in_heads(y):
            return y.unflatten(-1, (self.nh, -1)).transpose(1, 2)  # (B, nh, N, hd)

        q = in_heads(self.to_q(x, C))
        k = in_heads(self.to_k(context, C))
        v = in_heads(self.to_v(context, C))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2), C)


class GEGLU(nn.Module):
    """Values times the GELU of gates, both linear in x.  (B, N, D) -> (B, N, inner)"""

    def __init__(self, D, inner):
        super().__init__()
        self.proj = Linear(D, 2 * inner)

    def forward(self, x, C):
        value, gate = self.proj(x, C).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, N, D) -> same shape"""

    def __init__(self, D):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(D, 4 * D), nn.Identity(), Linear(4 * D, D)])  # the public net.1 is dropout

    def forward(self, x, C):
        return self.net[2](self.net[0](x, C), C)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, MLP, each after a norm and added to x.  (B, N, D) -> same shape"""

    def __init__(self, D, context_dim, nh):
        super().__init__()
        self.norm1 = nn.LayerNorm(D)
        self.attn1 = Attention(D, D, nh)
        self.norm2 = nn.LayerNorm(D)
        self.attn2 = Attention(D, context_dim, nh)
        self.norm3 = nn.LayerNorm(D)
        self.ff = FeedForward(D)

    def forward(self, x, context, C):
        y = self.norm1(x)
        x = x + self.attn1(y, y, C)
        x = x + self.attn2(self.norm2(x), context, C)
        return x + self.ff(self.norm3(x), C)


class SpatialTransformer(nn.Module):
    """x + a transformer whose tokens are the cells of the map.  (B, D, h, w) -> same shape"""

    def __init__(self, cfg, D, nh):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.norm_groups, D, eps=1e-6)  # trap: not the 1e-5 of the resnets
        self.proj_in = Linear(D, D)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(D, cfg.context_dim, nh)])
        self.proj_out = Linear(D, D)

    def forward(self, x, context, C):
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = self.proj_in(tokens, C).type_as(x)
        tokens = self.transformer_blocks[0](tokens, context, C)
        tokens = self.proj_out(tokens, C)
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """(B, c, h, w) -> (B, c, h/2, w/2), odd sides rounded up"""

    def __init__(self, c):
        super().__init__()
        self.conv = Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x, C):
        return self.conv(x, C)


class Upsample(nn.Module):
    """(B, c, h, w) -> (B, c, *size), which is twice as large, or one less where the way down had rounded up"""

    def __init__(self, c):
        super().__init__()
        self.conv = Conv2d(c, c, 3, padding=1)

    def forward(self, x, size, C):
        return self.conv(F.interpolate(x, size=size, mode="nearest"), C)


class DownBlock(nn.Module):
    """Resnets of one resolution, a transformer after each unless nh is 0, then (but at the end) half the resolution."""

    def __init__(self, cfg, c_in, c_out, nh, downsample):
        super().__init__()
        widths = [c_in] + [c_out] * (cfg.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResnetBlock(cfg, width, c_out) for width in widths)
        self.attentions = nn.ModuleList(SpatialTransformer(cfg, c_out, nh) for _ in self.resnets if nh)
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])

    def forward(self, x, temb, context, C):
        """(B, c_in, h, w) -> (B, c_out, h/2, w/2), list of all maps on the way to it"""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb, C)
            if self.attentions:
                x = self.attentions[i](x, context, C)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x, C)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Resnet, transformer, resnet at the lowest resolution.  (B, c, h, w) -> same shape"""

    def __init__(self, cfg, c, nh):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(cfg, c, c) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(cfg, c, nh)])

    def forward(self, x, temb, context, C):
        x = self.resnets[0](x, temb, C)
        x = self.attentions[0](x, context, C)
        return self.resnets[1](x, temb, C)


class UpBlock(nn.Module):
    """As DownBlock, but each resnet also gets a skip, and (but in the last block) the resolution doubles."""

    def __init__(self, cfg, c_in, c_out, c_skips, nh, upsample):
        super().__init__()
        widths = [c_in] + [c_out] * (len(c_skips) - 1)
        self.resnets = nn.ModuleList(ResnetBlock(cfg, c + c_skip, c_out) for c, c_skip in zip(widths, c_skips))
        self.attentions = nn.ModuleList(SpatialTransformer(cfg, c_out, nh) for _ in self.resnets if nh)
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x, skips, size, temb, context, C):
        """x: (B, c_in, h, w); skips: a map for each resnet; size: (h', w') of the next block's maps, or None

        -> (B, c_out, h', w')
        """
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips)):
            x = resnet(torch.cat([x, skip], dim=1), temb, C)
            if self.attentions:
                x = self.attentions[i](x, context, C)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, size, C)
        return x


class UNet(Checkpointing, nn.Module):
    def __init__(self, cfg=UNetConfig()):
        super().__init__()
        self.cfg = cfg
        w, nh, last = cfg.widths, cfg.num_heads, len(cfg.widths) - 1
        self.conv_in = ExactConv2d(cfg.in_channels, w[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(w[0], 4 * w[0])

        # SD at a latent of 64 x 64:            channels  heads  resolution
        #   down_blocks.0                     320 ->  320    5   64 -> 32
        #   down_blocks.1                     320 ->  640   10   32 -> 16
        #   down_blocks.2                     640 -> 1280   20   16 -> 8
        #   down_blocks.3, mid_block         1280 -> 1280  -, 20    8
        #   up_blocks.0 + 1280 1280 1280     1280 -> 1280    -    8 -> 16   + skips
        #   up_blocks.1 + 1280 1280  640     1280 -> 1280   20   16 -> 32
        #   up_blocks.2 +  640  640  320     1280 ->  640   10   32 -> 64
        #   up_blocks.3 +  320  320  320      640 ->  320    5   64
        self.down_blocks, skips = nn.ModuleList(), [w[0]]
        nh_outer = [*nh[:last], 0]
        for i in range(last + 1):
            self.down_blocks.append(DownBlock(cfg, w[max(i - 1, 0)], w[i], nh_outer[i], downsample=i < last))
            skips += [w[i]] * (cfg.layers_per_block + (i < last))
        self.mid_block = MidBlock(cfg, w[-1], nh[-1])
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(last + 1)):
            c_skips = [skips.pop() for _ in range(cfg.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(cfg, w[min(i + 1, last)], w[i], c_skips, nh_outer[i], upsample=i > 0))
        self.conv_norm_out = nn.GroupNorm(cfg.norm_groups, w[0], eps=1e-5)
        self.conv_out = ExactConv2d(w[0], cfg.out_channels, 3, padding=1)

    @property
    def blocks(self):
        """Modules by their block id; conv_in goes with the first."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks, self.conv_out]

    def forward(self, z, t, context, C=NO_ADAPTERS):
        """The noise in a latent.

        z: (B, in_channels, h, w) noisy latent; t: integer or (B,); context: (B, N, context_dim)
        C: {adapter: (B or 1, blocks, r, r) or 1}, see lora.py; without it all adapters are off
        -> (B, out_channels, h, w)
        """
        n = len(self.down_blocks)
        C_of = [of_block(C, i) for i in range(len(self.blocks))]

        if not torch.is_tensor(t):
            t = torch.full((1,), t, device=z.device)
        temb = timestep_embedding(t.expand(len(z)), self.cfg.widths[0])
        temb = self.time_embedding(temb.to(self.time_embedding.linear_1.weight.dtype))

        x = self.conv_in(z, C_of[0])
        skips = [x]
        for block, C_block in zip(self.down_blocks, C_of[:n]):
            x, maps = self.run(block, x, temb, context, C_block)
            skips += maps
        x = self.run(self.mid_block, x, temb, context, C_of[n])
        for block, C_block in zip(self.up_blocks, C_of[n + 1 :]):
            of_this_block = [skips.pop() for _ in block.resnets]
            size = skips[-1].shape[2:] if skips else None
            x = self.run(block, x, of_this_block, size, temb, context, C_block)
        return self.conv_out(F.silu(self.conv_norm_out(x)), C_of[-1])
