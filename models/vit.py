"""DINO's vision transformer: the eyes of VOSR (and later the discriminator of S3Diff, the tokens of GramSR).

Paper:   DINOv2, arXiv 2304.07193.
Weights: dinov2_vitb14_pretrain.pth, dinov2_vitl14_pretrain.pth of facebookresearch/dinov2; parameter names are theirs.
Left out: registers, SwiGLU (the giant model), stochastic depth, training heads.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class ViTConfig:
    img_size: int = 518         # pixels per side the position table was trained on
    patch_size: int = 14
    embed_dim: int = 768        # D
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0


class Attention(nn.Module):
    def __init__(self, D, nh):
        super().__init__()
        self.nh = nh
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.nh, -1)).permute(2, 0, 3, 1, 4)     # each (B, nh, N, hd)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, D, inner):
        super().__init__()
        self.fc1 = nn.Linear(D, inner)
        self.fc2 = nn.Linear(inner, D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D = cfg.embed_dim
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, cfg.num_heads)
        self.ls1 = LayerScale(D)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = MLP(D, int(D * cfg.mlp_ratio))
        self.ls2 = LayerScale(D)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch, D):
        super().__init__()
        self.proj = nn.Conv2d(3, D, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)          # (B, 3, H, W) -> (B, N, D), row-major


class ViT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D, side = cfg.embed_dim, cfg.img_size // cfg.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, D))
        self.mask_token = nn.Parameter(torch.zeros(1, D), requires_grad=False)           # in the files, never used here
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
        """Position table for h x w tokens -> (1, 1 + h*w, D), the class token's first."""
        side = self.cfg.img_size // self.cfg.patch_size
        if h == w == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        # official: DINOv2 passes the scale factor with 0.1 added, which moves the sampling points; the size would not.
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        grid = grid.flatten(2).transpose(1, 2).type_as(self.pos_embed)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    def forward(self, x, layer=None):
        """Patch tokens, the class token dropped.

        x: (B, 3, H, W) normalised by ImageNet's mean and deviation, sides multiples of the patch size
        layer: tokens after this block, without the final norm; None = last block and final norm
        -> (B, H/p * W/p, D)
        """
        p = self.cfg.patch_size
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        tokens = tokens + self.positions(x.shape[-2] // p, x.shape[-1] // p)
        last = len(self.blocks) - 1 if layer is None else layer
        for block in self.blocks[: last + 1]:
            tokens = block(tokens)
        if layer is None:
            tokens = self.norm(tokens)
        return tokens[:, 1:]
