"""VOSR: super-resolution by a diffusion transformer that never saw a text prompt.

Paper:   VOSR, arXiv 2604.03225.
Weights: vosr_tiny.safetensors beside this file: ours, trained by train_vosr.py.
Left out: the cosine time schedule and the multi-layer visual tokens of the official code, which no checkpoint uses.

A system is wiring. Low-quality picture -> latent z_lq (VAE) and visual tokens feat (ViT); a flow from noise to the
clean latent, conditioned on both (DiT); clean latent -> picture (VAE). Below: the two conditions and how they are
weakened, the guided velocity, the Euler sampler, the three losses, and the class that holds the networks.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from models.dit import DiT, DiTConfig
from models.imaging import color_fix, pad_to_multiple, resize, tile_starts, tile_weight
from models.vae import LightDecoder, TinyVAE, TinyVAEConfig, VAE, VAEConfig
from models.vit import IMAGENET_MEAN, IMAGENET_STD, ViT, ViTConfig

TINY = Path(__file__).with_name("vosr_tiny.safetensors")


@dataclass
class VOSRConfig:
    dit: DiTConfig = field(default_factory=DiTConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    vae: VAEConfig | TinyVAEConfig = field(default_factory=VAEConfig)
    light_decoder: dict | None = None   # LightDecoder's arguments, where it stands in for the VAE's own
    vit_input: int = 448            # pixels per side of what the vision encoder sees, whatever the picture's shape
    vit_layer: int | None = 8       # its tokens after this block; None = after the last block and the final norm
    steps: int = 25                 # Euler steps of the sampler
    guidance: float = 0.5           # 1 = conditional only; LESS is more generative: see `guided`
    weak: float = 0.15              # strength of the weak condition in sampling
    tile: int = 0                   # pixels per tile side, 0 = the whole picture at once
    overlap: int = 0                # pixels that tiles share, at least 1/8 of a tile

    @staticmethod
    def from_dict(d):
        vae = (TinyVAEConfig if "whitening" in d["vae"] else VAEConfig)(**d["vae"])
        return VOSRConfig(**{**d, "dit": DiTConfig(**d["dit"]), "vit": ViTConfig(**d["vit"]), "vae": vae})


# ---- the velocity and the sampler -----------------------------------------------------------------------------------


def guided(dit, z_t, z_lq, feat, t, r, guidance=1.0, weak=0.15, interval=(0.0, 1.0)):
    """Restoration-oriented guidance: the reference is a WEAK condition, not an absent one.

    z_t, z_lq: (B, C, h, w); feat: (B, M, z_dims); t, r: numbers in [0, 1], r is read by one-step models only
    guidance: 1 = conditional only, one pass; 0 = weak only; negative goes past it. Against habit, smaller is more
              generative and larger more faithful: the weak branch knows less of the picture and invents more.
    interval: guidance counts for t inside it -> (B, C, h, w) velocity
    """
    if not interval[0] <= t <= interval[1]:
        guidance = 1
    t, r = (torch.full((len(z_t),), float(x), device=z_t.device) for x in (t, r))
    if guidance == 1:
        return dit(z_t, z_lq, feat, t, r)
    both = dit(z_t.repeat(2, 1, 1, 1), torch.cat([z_lq, weak * z_lq]), torch.cat([feat, torch.zeros_like(feat)]), t.repeat(2), r.repeat(2))
    v_cond, v_weak = both.chunk(2)
    return v_weak + guidance * (v_cond - v_weak)


def sample(velocity, eps, steps):
    """Euler's method from noise at t = 1 to the clean latent at t = 0.

    velocity: function (z_t, t, r) -> velocity from t towards r;  eps: (B, C, h, w) standard normal -> (B, C, h, w)
    """
    z = eps
    times = torch.linspace(1, 0, steps + 1).tolist()
    for t, r in zip(times, times[1:]):
        z = z - (t - r) * velocity(z, t, r)
    return z


def in_tiles(velocity, z, boxes, at_once=8):
    """Velocity of a large latent from overlapping tiles of one size, blended with Gaussian weights.

    velocity: function (tiles (n, C, th, tw), slice of their numbers) -> like tiles;  z: (1, C, h, w)
    boxes: (rows, columns) slices of each tile -> (1, C, h, w)
    """
    total, weights = torch.zeros_like(z), torch.zeros_like(z[:, :1])
    for i in range(0, len(boxes), at_once):
        some = boxes[i : i + at_once]
        v = velocity(torch.cat([z[..., rows, cols] for rows, cols in some]), slice(i, i + at_once))
        weight = tile_weight(*v.shape[-2:]).to(v)
        for (rows, cols), v_tile in zip(some, v.split(1)):
            total[..., rows, cols] += weight * v_tile
            weights[..., rows, cols] += weight
    return total / weights


# ---- losses ---------------------------------------------------------------------------------------------------------


@dataclass
class Draws:
    """Everything random in a loss, as drawn. Beta(1, 1) of the paper's r is uniform."""

    t: torch.Tensor             # (B,) uniform (flow), (B, 2) uniform (distillation: t is the larger)
    n: torch.Tensor             # (B,) standard normal: strength of the LQ condition
    eps: torch.Tensor           # (B, C, h, w) standard normal: the flow's noise
    m: torch.Tensor             # (B,) uniform: condition dropped where m < cfg_ratio
    xi: torch.Tensor            # (B, C, h, w) standard normal: noise in the LQ condition
    w: torch.Tensor             # () weak condition's strength, one number for the batch
    g: torch.Tensor | None = None   # (B,) Beta(1, 1): r = t (1 - g), distillation only

    @staticmethod
    def flow(z, generator, lognorm=None, weak=(0.05, 0.25)):
        """Draws for `loss_flow`; lognorm: (mu, sigma) of t = sigmoid(sigma N + mu) instead of a uniform t."""
        B, g = len(z), generator
        t = torch.rand(B, generator=g) if lognorm is None else torch.sigmoid(lognorm[1] * torch.randn(B, generator=g) + lognorm[0])
        n, eps, m = torch.randn(B, generator=g), torch.randn(z.shape, generator=g), torch.rand(B, generator=g)
        w = weak[0] + (weak[1] - weak[0]) * torch.rand((), generator=g)
        return Draws(t, n, eps, m, torch.randn(z.shape, generator=g), w).to(z.device)

    @staticmethod
    def distill(z, generator, weak=0.1):
        """Draws for `loss_distill`; the weak strength is a constant."""
        B, g = len(z), generator
        t, beta = torch.rand(B, 2, generator=g), torch.rand(B, generator=g)
        n, eps, m = torch.randn(B, generator=g), torch.randn(z.shape, generator=g), torch.rand(B, generator=g)
        return Draws(t, n, eps, m, torch.randn(z.shape, generator=g), torch.tensor(weak), beta).to(z.device)

    def to(self, device):
        return Draws(**{k: v if v is None else v.to(device) for k, v in vars(self).items()})


def column(x):
    """(B,) -> (B, 1, 1, 1)."""
    return x[:, None, None, None]


def conditions(z_lq, feat, d, cfg_ratio, strength):
    """The LQ condition three times: noised, weak, and mixed (weak where dropped) with its visual tokens.

    z_lq: (B, C, h, w); feat: (B, M, z_dims), never noised -> noised, weak, mixed like z_lq, mixed_feat like feat
    """
    mu, sigma = strength
    a = column(torch.sigmoid(sigma * d.n + mu))                 # about 0.993
    noised = a * z_lq + (1 - a**2).sqrt() * d.xi
    weak = d.w * z_lq
    dropped = d.m < cfg_ratio
    mixed = torch.where(column(dropped), weak, noised)
    return noised, weak, mixed, torch.where(dropped[:, None, None], 0.0, feat)


def loss_flow(dit, z_hq, z_lq, feat, d, cfg_ratio=0.1, strength=(5.0, 1.0)):
    """Flow matching under the mixed condition: mean of (v(z_t, t) - (eps - z_hq))^2.

    z_hq, z_lq: (B, C, h, w) scaled latents; feat: (B, M, z_dims); d: Draws.flow(...) -> scalar
    """
    _, _, mixed, feat = conditions(z_lq, feat, d, cfg_ratio, strength)
    t = column(d.t)
    z_t = (1 - t) * z_hq + t * d.eps
    return F.mse_loss(dit(z_t, mixed, feat, d.t).float(), d.eps - z_hq)


def teach(teacher, z_t, noised, weak, feat, t, omega, interval=(0.0, 1.0)):
    """The frozen multi-step teacher's guided velocity; omega counts only for t inside the interval, else 1."""
    both = teacher(z_t.repeat(2, 1, 1, 1), torch.cat([noised, weak]), torch.cat([feat, torch.zeros_like(feat)]), t.repeat(2))
    v_cond, v_weak = both.float().chunk(2)
    omega = column(torch.where((interval[0] <= t) & (t <= interval[1]), omega, 1.0))
    return v_weak + omega * (v_cond - v_weak)


def target_shortcut(student, z_t, t, r):
    """Two half steps make a whole one: the mean of the student's velocities on [t, s] and [s, r]. Shortcut models, 2410.12557."""
    s = (t + r) / 2
    v1 = student(z_t, t, s)
    v2 = student(z_t - column((t - r) / 2) * v1, s, r)
    return (v1 + v2) / 2


def correction_rcgm(student, z_t, t, r, u, v, delta=0.01, N=2):
    """Recursive consistency: go a short way delta along the teacher's v, the rest along the student itself, compare with u.

    z_t, u, v: (B, C, h, w) state, the student's average velocity on [t, r], the teacher's velocity at t; t, r: (B,)
    -> (B, C, h, w) what u has too much, scaled by 1/delta; 0 when u is the average velocity of the teacher's flow
    """
    t_m = torch.maximum(t - delta, r)
    z = z_t - column(t - t_m) * v
    step = (t_m - r) / N
    way = torch.zeros_like(z)                                   # F: the way from t_m to r
    for k in range(N):
        v_k = student(z, t_m - k * step, t_m - (k + 1) * step)
        z, way = z - column(step) * v_k, way + column(step) * v_k
    d = column((t - r).clamp(min=1e-6))
    near = column(t < r + delta + 1e-6)                         # then t_m = r and F = 0: u shall be v
    return torch.where(near, u - way / d, (u * d - way) / delta) - v


def loss_distill(student, teacher, z_hq, z_lq, feat, d, kind="rcgm", omega=0.5, cfg_ratio=0.1, strength=(5.0, 1.0),
                 u_weight=1.0, interval=(0.0, 1.0), **rcgm):
    """One-step distillation: learn the teacher's guided velocity where r = t, and to be consistent with itself where r < t.

    student, teacher: DiT with and without second time; z_hq, z_lq: (B, C, h, w); feat: (B, M, z_dims); d: Draws.distill(...)
    kind: "rcgm" or "shortcut"; omega: the teacher's guidance, distilled in -> v_loss, u_loss; the loss is v_loss + u_weight * u_loss
    """
    t = d.t.amax(1)
    r = t * (1 - d.g)
    noised, weak, mixed, mixed_feat = conditions(z_lq, feat, d, cfg_ratio, strength)
    z_t = (1 - column(t)) * z_hq + column(t) * d.eps

    def S(z, t, r):
        return student(z, mixed, mixed_feat, t, r).float()

    u = S(z_t, t, r)
    with torch.no_grad():
        # official: v_cond sees the noised condition and all visual tokens, for dropped samples too
        v = teach(teacher, z_t, noised, weak, feat, t, omega, interval)
        if kind == "shortcut":
            target = target_shortcut(S, z_t, t, r)
        else:                                                   # the clamp is a trust region: at first every value sits at it
            target = u - correction_rcgm(S, z_t, t, r, u, v, **rcgm).clamp(-1, 1)
    return F.mse_loss(S(z_t, t, t), v), F.mse_loss(u, target)


# ---- the system -----------------------------------------------------------------------------------------------------


class VOSR(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vae = TinyVAE(cfg.vae) if isinstance(cfg.vae, TinyVAEConfig) else VAE(cfg.vae)
        self.light_decoder = LightDecoder(**cfg.light_decoder) if cfg.light_decoder else None
        self.vit, self.dit = ViT(cfg.vit), DiT(cfg.dit)

    def decode(self, z):
        """(B, C, h, w) scaled latent -> (B, 3, H, W) in about [-1, 1]."""
        return (self.light_decoder or self.vae).decode(z)

    def tokens(self, x):
        """What the vision encoder makes of x: (B, 3, H, W) in [-1, 1], the enlarged LQ picture -> (B, M, z_dims)."""
        side = (self.cfg.vit_input, self.cfg.vit_input)         # official: whatever the aspect, the picture is squeezed
        x = F.interpolate(0.5 * x + 0.5, size=side, mode="bicubic").clamp(0, 1)
        mean, std = (torch.tensor(c, device=x.device).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
        return self.vit(((x - mean) / std).to(self.vit.pos_embed.dtype), self.cfg.vit_layer)

    @torch.no_grad()
    def restore(self, z_lq, x, eps, steps, guidance, weak, tile=0, overlap=0):
        """Sample the clean latent, in tiles where it is larger than one.

        z_lq, eps: (B, C, h, w); x: (B, 3, H, W) enlarged LQ in [-1, 1]; tile, overlap: pixels, tile 0 = off, which B > 1 needs
        -> (B, C, h, w)
        """
        (h, w), f, p = z_lq.shape[-2:], self.vae.factor, self.cfg.dit.patch_size
        side = tile // f // p * p
        if side == 0 or (h <= side and w <= side):
            feat = self.tokens(x)
            return sample(lambda z, t, r: guided(self.dit, z, z_lq, feat, t, r, guidance, weak), eps, steps)

        overlap = max(overlap // f, side // 8)
        rows = [slice(i, i + min(side, h)) for i in tile_starts(h, side, overlap)]
        cols = [slice(j, j + min(side, w)) for j in tile_starts(w, side, overlap)]
        boxes = [(row, col) for row in rows for col in cols]
        z_lqs = torch.cat([z_lq[..., row, col] for row, col in boxes])
        crops = [x[..., row.start * f : row.stop * f, col.start * f : col.stop * f] for row, col in boxes]
        feats = torch.cat([self.tokens(crop) for crop in crops])    # every tile has its own visual tokens

        def velocity(z, t, r):
            return in_tiles(lambda z, n: guided(self.dit, z, z_lqs[n], feats[n], t, r, guidance, weak), z, boxes)

        return sample(velocity, eps, steps)

    @torch.no_grad()
    def upscale(self, lq, scale=4, seed=0, steps=None, guidance=None, weak=None, tile=0, overlap=0, color="adain"):
        """Super-resolution of one picture.

        lq: (1, 3, H, W) in [0, 1]; scale: 1 to 8; steps, guidance, weak: None = the checkpoint's own
        tile, overlap: pixels of the output, 0 = the checkpoint's own choice; color: adain, wavelet or none
        -> (1, 3, round(H * scale), round(W * scale)) in [0, 1]
        """
        def own(name, value):
            return getattr(self.cfg, name) if value is None else value

        H, W = (round(side * scale) for side in lq.shape[-2:])
        lq_up = resize(lq, (H, W))
        generator = torch.Generator().manual_seed(seed)             # of this picture alone: order and device do not matter
        x = pad_to_multiple(2 * lq_up - 1, self.vae.factor * self.cfg.dit.patch_size).to(self.dit.t_block[1].weight)
        z_lq = self.vae.encode(x, generator)
        eps = torch.randn(z_lq.shape, generator=generator).to(z_lq)
        z = self.restore(z_lq, x, eps, own("steps", steps), own("guidance", guidance), own("weak", weak),
                         tile or self.cfg.tile, overlap or self.cfg.overlap)
        sr = (self.decode(z).float().clamp(-1, 1) / 2 + 0.5)[..., :H, :W]
        return color_fix(sr, lq_up.to(sr), color)

    def save(self, path, note=""):
        """Write all networks in float16, config and note in the metadata. The rotary tables are recomputed on loading."""
        tensors = {k: v.half().contiguous().cpu() for k, v in self.state_dict().items() if "freqs_" not in k}
        part = f"{path}.part"
        save_file(tensors, part, metadata={"config": json.dumps(asdict(self.cfg)), "note": note})
        os.replace(part, path)

    @classmethod
    def from_pretrained(cls, name="vosr-tiny", device="cpu", dtype=torch.float32):
        """The embedded model by its name, or a .safetensors file of `save`, or a folder with model.safetensors.

        Raises FileNotFoundError or ValueError, one line with the remedy.
        """
        path = TINY if name == "vosr-tiny" else Path(name)
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such model; use vosr-tiny, or a file or --out folder of train_vosr.py")
        try:
            with safe_open(path, framework="pt") as f:
                model = cls(VOSRConfig.from_dict(json.loads(f.metadata()["config"])))
            tensors = load_file(path)
        except (SafetensorError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}: not a model that train_vosr.py wrote ({type(e).__name__}: {e})".splitlines()[0]) from None
        tensors |= {k: v for k, v in model.state_dict().items() if "freqs_" in k}
        model.load_state_dict(tensors)
        return model.to(device=device, dtype=dtype).eval()
