"""VOSR: super-resolution by a diffusion transformer that never saw a text prompt.

Paper:   VOSR, arXiv 2604.03225.
Weights: vosr_tiny.safetensors beside this file: ours, trained by train_vosr.py.
Left out: several layers of visual tokens at once, which the official code collects and does not use.

A system is wiring. Low-quality picture -> latent z_lq (VAE) and visual tokens feat (ViT); a flow from noise to the
clean latent, conditioned on both (DiT, and flow.py for the mathematics); clean latent -> picture (VAE).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.dit import DiT, DiTConfig
from models.flow import guided, sample
from models.imaging import blend_tiles, color_fix, pad_to_multiple, resize, tile_boxes
from models.vae import LightDecoder, TinyVAE, TinyVAEConfig, VAE, VAEConfig
from models.vit import IMAGENET_MEAN, IMAGENET_STD, ViT, ViTConfig
from models.weights import load_strictly, read_model

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
    temperature: float = 1.0        # deviation of the starting noise; below 1 a one-step result is smoother and more faithful
    torch_bicubic: bool = False     # enlarge the LQ picture as degrade.py does in training, not as the official scripts do (Pillow)
    tile: int = 0                   # pixels per tile side, 0 = the whole picture at once
    overlap: int = 0                # pixels that tiles share, at least 1/8 of a tile

    @staticmethod
    def from_dict(d):
        vae = (TinyVAEConfig if "whitening" in d["vae"] else VAEConfig)(**d["vae"])
        return VOSRConfig(**{**d, "dit": DiTConfig(**d["dit"]), "vit": ViTConfig(**d["vit"]), "vae": vae})


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

        boxes = tile_boxes(h, w, side, max(overlap // f, side // 8))
        z_lqs = torch.cat([z_lq[..., row, col] for row, col in boxes])
        crops = [x[..., row.start * f : row.stop * f, col.start * f : col.stop * f] for row, col in boxes]
        feats = torch.cat([self.tokens(crop) for crop in crops])    # every tile has its own visual tokens

        def velocity(z, t, r):
            return blend_tiles(lambda tiles, n: guided(self.dit, tiles, z_lqs[n], feats[n], t, r, guidance, weak), z, boxes)

        return sample(velocity, eps, steps)

    @torch.no_grad()
    def upscale(self, lq, scale=4, seed=0, steps=None, guidance=None, weak=None, temperature=None, tile=0, overlap=0,
                color="adain"):
        """Super-resolution of one picture.

        lq: (1, 3, H, W) in [0, 1]; scale: 1 to 8; steps, guidance, weak, temperature: None = the checkpoint's own
        tile, overlap: pixels of the output, 0 = the checkpoint's own choice; color: adain, wavelet or none
        -> (1, 3, round(H * scale), round(W * scale)) in [0, 1]
        """
        def own(name, value):
            return getattr(self.cfg, name) if value is None else value

        H, W = (round(side * scale) for side in lq.shape[-2:])
        lq_up = F.interpolate(lq, (H, W), mode="bicubic").clamp(0, 1) if self.cfg.torch_bicubic else resize(lq, (H, W))
        generator = torch.Generator().manual_seed(seed)             # of this picture alone: order and device do not matter
        x = pad_to_multiple(2 * lq_up - 1, self.vae.factor * self.cfg.dit.patch_size).to(self.dit.t_block[1].weight)
        z_lq = self.vae.encode(x, generator)
        eps = own("temperature", temperature) * torch.randn(z_lq.shape, generator=generator).to(z_lq)
        z = self.restore(z_lq, x, eps, own("steps", steps), own("guidance", guidance), own("weak", weak),
                         tile or self.cfg.tile, overlap or self.cfg.overlap)
        sr = (self.decode(z).float().clamp(-1, 1) / 2 + 0.5)[..., :H, :W]
        return color_fix(sr, lq_up.to(sr), color)

    @classmethod
    def from_pretrained(cls, name="vosr-tiny", device="cpu", dtype=torch.float32):
        """The embedded model by its name, or a .safetensors file of ours, or the --out folder of train_vosr.py.

        Raises FileNotFoundError or ValueError, one line with the remedy.
        """
        path = TINY if name == "vosr-tiny" else Path(name)
        path = path / "model.safetensors" if path.is_dir() else path
        config, tensors = read_model(path)
        try:
            model = cls(VOSRConfig.from_dict(config))
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}: its config is not one of VOSR ({e})") from None
        load_strictly(model, tensors, path, may_miss=("freqs_cos", "freqs_sin"))
        return model.to(device=device, dtype=dtype).eval()
