"""VOSR's diffusion transformer: predicts the velocity of an image's latent, given the low-quality image.

Paper:   VOSR, arXiv 2604.03225; the backbone is LightningDiT (arXiv 2501.01423) with cross-attention added.
Weights: checkpoints/ema_model.safetensors in the folders VOSR_{0.5B,1.4B}_{ms,os} and VOSR2 of CSWRY/VOSR.
Left out: options that no public checkpoint uses. Ours: any rectangle.

What a token meets in a block: self-attention (where things are: rotary positions), cross-attention to the visual tokens
of the low-quality image (what it shows), an MLP. The time scales, shifts and gates the first and the last.

Letters: B images, N tokens of width D, M visual tokens, nh heads of hd = D / nh channels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support.precision import ExactConv2d, ExactLinear
from models.support.checkpointing import Checkpointing
from models.vit import MLP, PatchEmbed


@dataclass
class DiTConfig:
    input_size: int = 64        # latent cells per side the model is trained on (64 = 512 pixels at f8)
    patch_size: int = 2         # latent cells per token side
    in_channels: int = 8        # LQ latent and noisy latent, concatenated
    out_channels: int = 4
    hidden_size: int = 1024     # D
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    z_dims: int = 768           # width of the visual tokens
    encdim_ratio: int = 3       # inner width of the context MLP, in units of D
    auxiliary_time_cond: bool = False   # second time r: the one-step models
    rope_rescale: bool = True   # scale positions so that the longer side spans the trained range

    def __post_init__(self):
        # of a head's channels one half turns with the row, one with the column, each by pairs
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of 4 * num_heads = {4 * self.num_heads}")


def modulate(x, shift, scale):
    """Shift and scale as the time says; scale 0 changes nothing.  x: (B, N, D); shift, scale: (B, D) -> (B, N, D)"""
    return x * (1 + scale[:, None]) + shift[:, None]


def timestep_embedding(t, dim=256):
    """Sinusoids of t: (B,), here in [0, 1], in unet.py up to 999 -> (B, dim), cosines first.

    Trap: VOSR does not multiply t by 1000, as others do before the same sinusoids.
    """
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    args = t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


def rope_table(rows, cols, head_dim):
    """Rotary tables for tokens at positions rows: (h,) and cols: (w,) -> cos, sin, each (h*w, head_dim).

    The first half of a head's channels turns with the row, the second with the column, by adjacent pairs (2k, 2k+1).
    Both of a pair turn by one angle, so every entry stands twice, as in the public files; `DiT.rope` takes each once.
    DINOv3 has a rope_table of its own (vit.py), with other pairs and frequencies.
    """
    d = head_dim // 2
    freqs = 10000 ** (-torch.arange(0, d, 2, device=rows.device).float() / d)  # (d/2,)
    row_angle = (rows[:, None] * freqs).repeat_interleave(2, dim=1)  # (h, d)
    col_angle = (cols[:, None] * freqs).repeat_interleave(2, dim=1)  # (w, d)
    h, w = len(rows), len(cols)
    angle = torch.cat([row_angle[:, None].expand(h, w, d), col_angle[None].expand(h, w, d)], dim=-1)
    angle = angle.flatten(0, 1)  # (h*w, head_dim)
    return angle.cos(), angle.sin()


def rotate(x, turns):
    """Turn channel pairs (a, b) of x: (B, nh, N, hd), as complex numbers a + ib, by turns: (N, hd/2) -> float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, nh, N, hd/2)
    return torch.view_as_real(pairs * turns).flatten(-2)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, counted in float32."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return y.to(torch.promote_types(x.dtype, self.weight.dtype))


class TimeEmbedder(nn.Module):
    """(B,) time in [0, 1] -> (B, D)"""

    def __init__(self, D):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t):
        return self.mlp(timestep_embedding(t).to(self.mlp[0].weight.dtype))


class SelfAttention(nn.Module):
    """Tokens look at one another; rotary positions and normalised q and k.  (B, N, D) -> same shape"""

    def __init__(self, D, nh):
        super().__init__()
        self.nh = nh
        self.qkv = nn.Linear(D, 3 * D)
        self.q_norm = RMSNorm(D // nh)
        self.k_norm = RMSNorm(D // nh)
        self.proj = nn.Linear(D, D)

    def forward(self, x, rope):
        """x: (B, N, D); rope: (N, hd/2) turns -> (B, N, D)"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.nh, -1)).permute(2, 0, 3, 1, 4)  # each (B, nh, N, hd)
        q = rotate(self.q_norm(q), rope).type_as(v)
        k = rotate(self.k_norm(k), rope).type_as(v)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Tokens look at the visual ones, which have no positions here.

    In two methods, since keys and values of visual tokens that stay can be kept: see support/tokens.py.
    """

    def __init__(self, D, nh):
        super().__init__()
        self.nh = nh
        self.q_linear = nn.Linear(D, D)
        self.k_linear = nn.Linear(D, D)
        self.v_linear = nn.Linear(D, D)
        self.q_norm = RMSNorm(D // nh)
        self.k_norm = RMSNorm(D // nh)
        self.proj = nn.Linear(D, D)

    def heads(self, x):
        return x.unflatten(-1, (self.nh, -1)).transpose(1, 2)  # (B, N, D) -> (B, nh, N, hd)

    def keys_values(self, ctx):
        """ctx: (B, M, D) -> k, v, each (B, nh, M, hd)"""
        v = self.heads(self.v_linear(ctx))
        k = self.k_norm(self.heads(self.k_linear(ctx))).type_as(v)
        return k, v

    def attend(self, x, k, v):
        """x: (B, N, D); k, v: of `keys_values` -> (B, N, D)"""
        q = self.q_norm(self.heads(self.q_linear(x))).type_as(v)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x, ctx):
        """x: (B, N, D); ctx: (B, M, D) -> (B, N, D)"""
        k, v = self.keys_values(ctx)
        return self.attend(x, k, v)


class SwiGLU(nn.Module):
    """An MLP whose inner values are gated: W3 (SiLU(W1 x) * W2 x), W1 and W2 in one matrix.  (..., D) -> same shape"""

    def __init__(self, D, inner):
        super().__init__()
        self.w12 = nn.Linear(D, 2 * inner)
        self.w3 = nn.Linear(inner, D)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Self-attention, cross-attention, MLP, each added to x; modulated by adaLN-single (PixArt-alpha, 2310.00426).

    The time becomes six vectors once, for all blocks; a block adds only a table of its own.
    """

    def __init__(self, cfg):
        super().__init__()
        D, nh = cfg.hidden_size, cfg.num_heads
        self.norm1 = RMSNorm(D)
        self.attn = SelfAttention(D, nh)
        self.cross_attn = CrossAttention(D, nh)
        self.norm2 = RMSNorm(D)
        # 2/3: with its three matrices as many parameters as an MLP's two of full width
        self.mlp = SwiGLU(D, int(2 / 3 * int(D * cfg.mlp_ratio)))
        self.scale_shift_table = nn.Parameter(torch.empty(6, D))

    def forward(self, x, ctx, modulation, rope):
        """x: (B, N, D); ctx: (B, M, D); modulation: (B, 6, D), the same for all blocks; rope: (N, hd/2) -> (B, N, D)"""
        modulation = self.scale_shift_table + modulation
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)  # each (B, D)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a), rope)
        x = x + self.cross_attn(x, ctx)  # official: no norm before it, no gate after it
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens to the values of their cells, modulated by the time.  x: (B, N, D); c: (B, D) -> (B, N, out)"""

    def __init__(self, D, out):
        super().__init__()
        self.norm_final = RMSNorm(D)
        self.linear = ExactLinear(D, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Rope(nn.Module):
    """Rotary tables of the trained size, as in the public files."""

    def __init__(self, side, head_dim):
        super().__init__()
        positions = torch.arange(side, device="cpu").float()  # real even where all else is on the meta device
        cos, sin = rope_table(positions, positions, head_dim)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)


class DiT(Checkpointing, nn.Module):
    """The transformer.  self.run(block, ...) is block(...), in training in less memory if wanted (Checkpointing)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D = cfg.hidden_size
        self.side = cfg.input_size // cfg.patch_size  # tokens
        self.x_embedder = PatchEmbed(cfg.patch_size, D, cfg.in_channels, ExactConv2d)
        self.t_embedder = TimeEmbedder(D)
        self.r_embedder = TimeEmbedder(D) if cfg.auxiliary_time_cond else None
        self.feat_rope = Rope(self.side, D // cfg.num_heads)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.layer_norm = nn.LayerNorm(cfg.z_dims)  # of visual tokens
        self.mlp_ca = MLP(cfg.z_dims, cfg.encdim_ratio * D, D, gelu="tanh")
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(D, cfg.patch_size**2 * cfg.out_channels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Xavier; normal(0.02) in the time path; zero for the output: the first velocity is 0."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))  # a view, so the weight; a convolution's as a matrix
                nn.init.zeros_(m.bias)
        time = [self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1]]
        if self.r_embedder:
            time += [self.r_embedder.mlp[0], self.r_embedder.mlp[2]]
        for linear in time:
            nn.init.normal_(linear.weight, std=0.02)
        for block in self.blocks:
            block.scale_shift_table.normal_(std=self.cfg.hidden_size**-0.5)
        for linear in (self.final_layer.linear, self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(linear.weight)

    def rope(self, h, w, device):
        """Turns of h x w tokens, a complex number of length 1 for each channel pair -> (h*w, hd/2)."""
        cos, sin = self.feat_rope.freqs_cos, self.feat_rope.freqs_sin
        trained_size = h == w == self.side
        # computed anew at other sizes, and where .to(bfloat16) has rounded the tables
        if not trained_size or cos.dtype != torch.float32:
            # official: squares only; one factor for both axes keeps a rectangle's aspect
            scale = self.side / max(h, w) if self.cfg.rope_rescale else 1.0
            rows = torch.arange(h, device=device).float() * scale
            cols = torch.arange(w, device=device).float() * scale
            cos, sin = rope_table(rows, cols, self.cfg.hidden_size // self.cfg.num_heads)
        return torch.complex(cos[:, ::2], sin[:, ::2])  # one of each pair

    def unpatchify(self, x, h, w):
        """(B, h*w, p*p*C) -> (B, C, h*p, w*p); a token holds (row, column, channel)."""
        p = self.cfg.patch_size
        x = x.unflatten(1, (h, w)).unflatten(-1, (p, p, -1))  # (B, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(self, z_t, z_lq, feat, t, r=None):
        """Velocity of the flow at t, or with auxiliary_time_cond its average from t down to r.

        z_t, z_lq: (B, C, h, w) noisy latent and LQ latent; h, w multiples of the patch size p
        feat: (B, M, z_dims) visual tokens of the LQ image, zeros for none
        t, r: (B,) in [0, 1], 1 = noise, 0 = clean
        -> (B, C, h, w) velocity eps - z_hq
        """
        p = self.cfg.patch_size
        h, w = z_t.shape[-2] // p, z_t.shape[-1] // p  # tokens

        x = self.x_embedder(torch.cat([z_lq, z_t], dim=1))  # (B, h*w, D), LQ first
        ctx = self.mlp_ca(self.layer_norm(feat))  # (B, M, D)
        c = self.t_embedder(t)  # (B, D)
        if self.r_embedder:
            # times t - r, so that where r = t the time is exactly that of a model of many steps
            c = c + (t - r)[:, None].to(c.dtype) * self.r_embedder(r)
        modulation = self.t_block(c).unflatten(-1, (6, -1))  # (B, 6, D)
        rope = self.rope(h, w, x.device)

        for block in self.blocks:
            x = self.run(block, x, ctx, modulation, rope)
        return self.unpatchify(self.final_layer(x, c), h, w)
