"""DINO's vision transformers: features of images, learned without labels.

S3Diff's discriminator judges by DINO's, VOSR is conditioned on DINOv2's, GramSR on DINOv3's.

Papers:  DINO 2104.14294, DINOv2 2304.07193, DINOv3 2508.10104.
Weights: dino_vitbase16_pretrain.pth, dinov2_vit{b,l}14_pretrain.pth of facebookresearch; model.safetensors of
         facebook/dinov3-vitb16-pretrain-lvd1689m and -vits16plus-.
Left out: DINOv2 with registers, the giant DINOv2, DINO at other sizes than 224 px, what training DINO needs.

Each patch of an image becomes a token; a class token (and in DINOv3 four registers, scratch space) goes in front:

            where is a patch?                   residual branches     q, k, v
    DINO    learned table, added once           as they are           one matrix
    DINOv2  the same, resampled to other sizes  scaled (layer scale)  one matrix
    DINOv3  q and k turned by angles (RoPE)     scaled                three, k without bias
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def standardised(x):
    """(B, 3, H, W) in [0, 1] -> with the mean and deviation of ImageNet's images taken out, as all of these read it"""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device="cpu").to(x.device, non_blocking=True)
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@dataclass
class ViTConfig:
    img_size: int = 518         # pixels per side of the position table
    patch_size: int = 14
    embed_dim: int = 768        # D
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    version: int = 2            # of DINO; 1 has no layer scale and no mask token


@dataclass
class DINOv3Config:
    patch_size: int = 16
    embed_dim: int = 768        # D
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    gated_mlp: bool = False     # SiLU gates instead of GELU, as in S+
    registers: int = 4


PRESETS = {
    "dino_vitb16": ViTConfig(img_size=224, patch_size=16, version=1),
    "dinov2_vitb14": ViTConfig(),
    "dinov2_vitl14": ViTConfig(embed_dim=1024, depth=24, num_heads=16),
    "dinov3_vitb16": DINOv3Config(),
    "dinov3_vits16plus": DINOv3Config(embed_dim=384, num_heads=6, gated_mlp=True),
}


# ---- DINO and DINOv2

class Attention(nn.Module):
    """Self-attention of nh heads of hd = D / nh channels.  (B, N, D) -> same shape"""

    def __init__(self, D, nh):
        super().__init__()
        self.nh = nh
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.nh, -1)).permute(2, 0, 3, 1, 4)  # each (B, nh, N, hd)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers, GELU between them.  (..., D) -> (..., out), out = D unless it is given"""

    def __init__(self, D, inner, out=None, gelu="none"):
        super().__init__()
        self.fc1 = nn.Linear(D, inner)
        self.fc2 = nn.Linear(inner, out or D)
        self.gelu = gelu  # or "tanh", an approximation

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class LayerScale(nn.Module):
    """A learned factor for each channel.  (B, N, D) -> same shape"""

    def __init__(self, D, name="gamma"):  # lambda1 in DINOv3
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.ones(D)))

    def forward(self, x):
        return x * getattr(self, self.name)


class Block(nn.Module):
    """x + attention, then + MLP, each behind a norm.  (B, N, D) -> same shape"""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.embed_dim
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, cfg.num_heads)
        self.ls1 = LayerScale(D) if cfg.version > 1 else nn.Identity()
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = MLP(D, int(D * cfg.mlp_ratio))
        self.ls2 = LayerScale(D) if cfg.version > 1 else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Every patch of patch x patch pixels to a token.  (B, channels, H, W) -> (B, N, D)"""

    def __init__(self, patch, D, channels=3, conv=nn.Conv2d):
        super().__init__()
        self.proj = conv(channels, D, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D), row by row


class ViT(nn.Module):
    """DINO's and DINOv2's transformer; see `forward`."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D = cfg.embed_dim
        side = cfg.img_size // cfg.patch_size  # patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, D))
        if cfg.version > 1:
            self.mask_token = nn.Parameter(torch.zeros(1, D), requires_grad=False)  # in the files only
        self.patch_embed = PatchEmbed(cfg.patch_size, D)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def positions(self, h, w):
        """Position table for h x w tokens -> (1, 1 + h*w, D)"""
        side = self.cfg.img_size // self.cfg.patch_size
        if h == w == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        # official: the scale factor with 0.1 added, which moves the sampling points; the size would not
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        grid = grid.flatten(2).transpose(1, 2).type_as(self.pos_embed)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    def layers(self, x):
        """What the blocks put out, without the final norm.

        x: (B, 3, H, W) standardised, sides multiples of p -> yields (B, 1 + N, D): class token, N patches row by row
        """
        p = self.cfg.patch_size
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        tokens = tokens + self.positions(x.shape[-2] // p, x.shape[-1] // p)
        for block in self.blocks:
            tokens = block(tokens)
            yield tokens

    def forward(self, x, layer=None):
        """Patch tokens.  x as in `layers`; layer: after this block, None = last and final norm -> (B, N, D)"""
        for i, tokens in enumerate(self.layers(x)):
            if i == layer:
                return tokens[:, 1:]
        return self.norm(tokens)[:, 1:]


# ---- DINOv3

def rope_table(h, w, head_dim, device=None):
    """Cosines and sines for h x w patches, with centres in (-1, 1): two (h*w, hd/2), first of rows, then of columns.

    Not dit.py's rope_table and rotate, which have other pairs, frequencies and positions: DINOv3's span (-1, 1) at any
    size, VOSR's count tokens.
    """
    row = (2 * torch.arange(h, dtype=torch.float32, device=device) + 1) / h - 1  # (h,) centres
    col = (2 * torch.arange(w, dtype=torch.float32, device=device) + 1) / w - 1
    frequency = 100 ** (-torch.arange(0, head_dim, 4, dtype=torch.float32, device=device) / head_dim)  # (hd/4,)
    centre = torch.stack(torch.meshgrid(row, col, indexing="ij"), dim=-1)  # (h, w, 2)
    angle = 2 * math.pi * centre.view(h * w, 2, 1) * frequency  # (h*w, 2, hd/4)
    angle = angle.flatten(1)  # (h*w, hd/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn channel pairs (d, d + hd/2) of x: (B, nh, N, hd), in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class DINOv3Attention(nn.Module):
    """As `Attention`, with rotary positions; rope: of `DINOv3.rope`.  (B, N, D) -> same shape"""

    def __init__(self, D, nh):
        super().__init__()
        self.nh = nh
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D, bias=False)  # a bias of k would, without rotation, cancel in the softmax
        self.v_proj = nn.Linear(D, D)
        self.o_proj = nn.Linear(D, D)

    def forward(self, x, rope):
        cos, sin = rope
        q = rotate(self.heads(self.q_proj(x)), cos, sin)
        k = rotate(self.heads(self.k_proj(x)), cos, sin)
        y = F.scaled_dot_product_attention(q, k, self.heads(self.v_proj(x)))
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def heads(self, x):
        return x.unflatten(-1, (self.nh, -1)).transpose(1, 2)  # (B, N, D) -> (B, nh, N, hd)


class DINOv3MLP(nn.Module):
    """Two linear layers, GELU between them, or SiLU gates.  (B, N, D) -> same shape"""

    def __init__(self, D, inner, gated):
        super().__init__()
        self.gate_proj = nn.Linear(D, inner) if gated else None
        self.up_proj = nn.Linear(D, inner)
        self.down_proj = nn.Linear(inner, D)

    def forward(self, x):
        up = self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(F.gelu(up))
        return self.down_proj(F.silu(self.gate_proj(x)) * up)


class DINOv3Block(nn.Module):
    """As `Block`; rope: of `DINOv3.rope`.  (B, N, D) -> same shape"""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.embed_dim
        self.norm1 = nn.LayerNorm(D)  # eps 1e-5 here, 1e-6 in the older ones
        self.attention = DINOv3Attention(D, cfg.num_heads)
        self.layer_scale1 = LayerScale(D, "lambda1")
        self.norm2 = nn.LayerNorm(D)
        self.mlp = DINOv3MLP(D, round(D * cfg.mlp_ratio), cfg.gated_mlp)
        self.layer_scale2 = LayerScale(D, "lambda1")

    def forward(self, x, rope):
        x = x + self.layer_scale1(self.attention(self.norm1(x), rope))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Embeddings(nn.Module):
    """Image to tokens: class, registers, patches.  (B, 3, H, W) -> (B, 1 + registers + N, D)"""

    def __init__(self, cfg):
        super().__init__()
        D, p = cfg.embed_dim, cfg.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D), requires_grad=False)  # in the files only
        # Zeros, which public files replace. The tiny GramSR's vision transformer learns from these zeros: its five
        # front tokens are alike at first, get the same gradients, and so stay equal.
        self.register_tokens = nn.Parameter(torch.zeros(1, cfg.registers, D))
        self.patch_embeddings = nn.Conv2d(3, D, kernel_size=p, stride=p)

    def forward(self, x):
        front = torch.cat([self.cls_token, self.register_tokens], dim=1).expand(len(x), -1, -1)
        return torch.cat([front, self.patch_embeddings(x).flatten(2).transpose(1, 2)], dim=1)


class DINOv3(nn.Module):
    """DINOv3's transformer; see `forward`."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.front = 1 + cfg.registers  # tokens before the patches
        self.embeddings = Embeddings(cfg)
        self.layer = nn.ModuleList(DINOv3Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.embed_dim)

    def rope(self, h, w, device=None):
        """Tables (front + h*w, hd/2); tokens in front are nowhere: turned by the angle 0."""
        cos, sin = rope_table(h, w, self.cfg.embed_dim // self.cfg.num_heads, device)
        return F.pad(cos, (0, 0, self.front, 0), value=1.0), F.pad(sin, (0, 0, self.front, 0))

    def layers(self, x):
        """As ViT's -> yields (B, 1 + registers + N, D): class, registers, patches"""
        p = self.cfg.patch_size
        tokens, rope = self.embeddings(x), self.rope(x.shape[-2] // p, x.shape[-1] // p, x.device)
        for block in self.layer:
            tokens = block(tokens, rope)
            yield tokens

    def forward(self, x):
        """All tokens after the final norm; x as in `layers` -> (B, 1 + registers + N, D)"""
        for tokens in self.layers(x):
            pass    # only the last block's
        return self.norm(tokens)
