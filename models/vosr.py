"""VOSR: super-resolution by a diffusion transformer that never saw a text prompt.

Paper:   VOSR, arXiv 2604.03225.
Weights: VOSR_{0.5B,1.4B}_{ms,os} and VOSR2 of CSWRY/VOSR with the frozen networks they need.

Low-quality image -> latent z_lq (VAE) and visual tokens feat (ViT); a flow from noise to the clean latent under both
(DiT, and flow.py for the mathematics); clean latent -> image (VAE).

Left out: several layers of visual tokens at once, which the official code collects and does not use.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.dit import DiT, DiTConfig
from models.flow import guided, sample
from models.qwen_vae import QwenVAE, QwenVAEConfig
from models.support.authors import read_light_decoder, release_config
from models.support.imaging import check_image, color_fix, pad_to_multiple, resize
from models.support.precision import in_half
from models.support.tiles import crop, tile_boxes, tiled
from models.support.tokens import FixedTokens
from models.support.weights import (EMBEDDED, WeightError, checked, fetch, find_args, find_or_fetch, find_weights,
                                    load_ours, load_strictly, on_meta_device, read_config, read_tensors)
from models.vae import VAE, LightDecoder, VAEConfig
from models.vit import ViT, ViTConfig, standardised

AUTOENCODERS = {VAEConfig: VAE, QwenVAEConfig: QwenVAE}
FROZEN = {      # public files of the autoencoder and of the vision encoder that goes with it
    VAEConfig: ("stable-diffusion-2-1-base/vae/diffusion_pytorch_model.safetensors",
                "torch_cache/checkpoints/dinov2_vitb14_pretrain.pth"),
    QwenVAEConfig: ("Qwen-Image-vae-2d/diffusion_pytorch_model.safetensors",
                    "torch_cache/checkpoints/dinov2_vitl14_pretrain.pth"),
}


@dataclass
class VOSRConfig:
    dit: DiTConfig = field(default_factory=DiTConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    vae: VAEConfig | QwenVAEConfig = field(default_factory=VAEConfig)
    light_decoder: dict | None = None   # LightDecoder's arguments, where it stands in for the VAE's own decoder
    vit_input: int = 448            # pixels per side of what the vision encoder sees, whatever the image's shape
    vit_layer: int | None = 8       # its tokens after this block; None = after the last block and the final norm
    steps: int = 25                 # of Euler
    guidance: float = 0.5           # 1 = conditional only; LESS is more generative: see `guided`
    weak: float = 0.15              # strength of the weak condition
    temperature: float = 1.0        # deviation of the starting noise; below 1 one step is smoother, more faithful
    color: str = "adain"            # how the LQ image's colours come back, see `color_fix`
    tile: int = 0                   # pixels a side of the output, 0 = the whole image at once
    overlap: int = 0                # pixels that neighbouring tiles share; it is 1/8 of the side at least

    @classmethod
    def from_dict(cls, d):
        """Make a config of what a file holds, a dict with dicts for dit, vit and vae. Raises TypeError, ValueError."""
        vae_config = QwenVAEConfig if "z_dim" in d["vae"] else VAEConfig    # a file does not say which it has
        parts = {"dit": DiTConfig(**d["dit"]), "vit": ViTConfig(**d["vit"]), "vae": vae_config(**d["vae"])}
        return cls(**(d | parts))


SIZES = {   # published: the transformer and what is around it
    "0.5b": VOSRConfig(light_decoder={}, tile=512),
    "1.4b": VOSRConfig(
        dit=DiTConfig(in_channels=32, out_channels=16, hidden_size=1536, depth=36, num_heads=24, z_dims=1024),
        vit=ViTConfig(embed_dim=1024, depth=24, num_heads=16), vit_layer=17, vae=QwenVAEConfig(), tile=512,
    ),
}
PUBLIC = {      # name: size, folder of the release
    "vosr-0.5b": ("0.5b", "VOSR_0.5B_ms"), "vosr-0.5b-1step": ("0.5b", "VOSR_0.5B_os"),
    "vosr-1.4b": ("1.4b", "VOSR_1.4B_ms"), "vosr-1.4b-1step": ("1.4b", "VOSR_1.4B_os"), "vosr-2": ("1.4b", "VOSR2"),
}


class VOSR(nn.Module):
    """The system: autoencoder `vae`, maybe with a `light_decoder`, and vision encoder `vit`, all frozen; `dit`."""

    Config = VOSRConfig
    stablesr = False    # whether colours come back as in StableSR, see `color_fix`
    # what sample.py --sweep shows: a list of rows, each a list of arguments of `upscale`
    SWEEP = [[{"guidance": g} for g in (-0.5, 0.0, 0.5, 1.0, 1.5)]]

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        # VOSR 2.0, which has its guidance distilled in: the only model of a single step that has no second time
        self.unguided = cfg.steps == 1 and not cfg.dit.auxiliary_time_cond
        if self.unguided:
            self.SWEEP = [[{"temperature": T / 4} for T in range(5)]]
        self.vae, self.vit, self.dit = self.networks(cfg)
        self.light_decoder = None
        if cfg.light_decoder is not None:
            self.light_decoder = LightDecoder(**cfg.light_decoder)
            del self.vae.decoder, self.vae.post_quant_conv  # never used beside it: neither loaded nor saved

    def networks(self, cfg):
        """Make autoencoder, vision encoder, transformer; the tiny model (tiny.py) makes others."""
        return AUTOENCODERS[type(cfg.vae)](cfg.vae), ViT(cfg.vit), DiT(cfg.dit)

    def decode(self, z):
        """Decode.  (B, C, h, w) scaled latent -> (B, 3, H, W) in about [-1, 1]"""
        return (self.light_decoder or self.vae).decode(z)

    def tokens(self, x):
        """Make visual tokens.  x: (B, 3, H, W) enlarged LQ in [-1, 1] -> (B, M, z_dims)"""
        side = (self.cfg.vit_input, self.cfg.vit_input)  # official: whatever the aspect, the image is squeezed
        x = F.interpolate(0.5 * x + 0.5, size=side, mode="bicubic").clamp(0, 1)
        return self.vit(standardised(x).to(self.vit.pos_embed.dtype), self.cfg.vit_layer)

    @torch.no_grad()
    def restore(self, z_lq, x, eps, steps, guidance, weak, tile=0, overlap=0):
        """Sample the clean latent, from noise in Euler's steps; the velocity of a large one is computed in tiles.

        z_lq, eps: (B, C, h, w); x: (B, 3, H, W) enlarged LQ in [-1, 1]; tile, overlap: pixels, tile 0 = the whole
        -> like z_lq
        """
        boxes = self.boxes(z_lq, tile, overlap)
        feat = torch.cat([self.tokens(crop(x, box, self.vae.factor)) for box in boxes])  # every tile has its own

        # Fast: the tokens of a tile are the same in all steps, so their keys and values are computed only once, see
        # support/tokens.py. A single pass computes them once anyway.
        fixed_tokens = None
        if steps > 1 or guidance != 1:
            fixed_tokens = FixedTokens(self.dit)

        def velocity_of_tiles(z, z_lq, feat, t, r):
            dit = self.dit
            if fixed_tokens:
                dit = fixed_tokens.dit_with(feat)  # the same function of z_t, z_lq, feat, t, r
            return guided(dit, z, z_lq, feat, t, r, guidance, weak)

        def velocity(z, t, r):
            return tiled(partial(velocity_of_tiles, t=t, r=r), boxes, z, z_lq, feat)

        return sample(velocity, eps, steps)

    def boxes(self, z, tile, overlap):
        """List the tiles of a latent; their sides are whole tokens of the transformer.

        tile, overlap: pixels; tile 0 = one tile, the whole; overlap: an eighth of the tile at least -> as `tile_boxes`
        """
        cell, p = self.vae.factor, self.cfg.dit.patch_size  # pixels a cell, cells a token
        tokens = tile // (cell * p)
        side = tokens * p  # latent cells
        return tile_boxes(*z.shape[-2:], side, max(overlap // cell, side // 8))

    def enlarge(self, lq, size):
        """Enlarge by Pillow, as the official scripts.  lq: (B, 3, H, W) in [0, 1]; size: (height, width) -> like lq"""
        return resize(lq, size)

    def noise(self, z, seed):
        """Draw the starting noise; a seed gives the same whatever came before, and on all devices.  -> like z"""
        eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), device="cpu")
        return eps.to(z, non_blocking=True)

    @torch.no_grad()
    def upscale(self, lq, scale=4, seed=0, steps=None, guidance=None, weak=None, temperature=None, tile=0,
                overlap=0, color=None):
        """Enlarge images of one size and restore them.

        lq: (B, 3, H, W) in [0, 1]; scale: 1 to 8; color: adain, wavelet or none; tile, overlap: pixels of the output
        None, and 0 of tile and overlap: as the checkpoint has it
        -> (B, 3, round(H * scale), round(W * scale)) in [0, 1]. Raises ValueError, WeightError.
        """
        lq = check_image(lq)
        if self.unguided and (guidance, weak) != (None, None):
            raise WeightError("--guidance and --weak have no effect on VOSR 2.0, which has its guidance distilled in; "
                              "leave them out")
        knobs = dict(steps=steps, guidance=guidance, weak=weak, temperature=temperature, color=color,
                     tile=tile or None, overlap=overlap or None)
        cfg = replace(self.cfg, **{name: value for name, value in knobs.items() if value is not None})

        # 1. enlarge the image, and pad it to whole tokens
        H, W = (round(side * scale) for side in lq.shape[-2:])
        lq_up = self.enlarge(lq, (H, W)).to(next(self.dit.parameters()).device, non_blocking=True)
        x = pad_to_multiple(2 * lq_up - 1, self.vae.factor * cfg.dit.patch_size)

        # 2. from noise to the clean latent, under the latent of the enlarged one
        # official: first a sample of the autoencoder's posterior q(z | x), in today's code its mode, as here
        z_lq = self.vae.encode(x)
        eps = cfg.temperature * self.noise(z_lq, seed)
        z = self.restore(z_lq, x, eps, cfg.steps, cfg.guidance, cfg.weak, cfg.tile, cfg.overlap)

        # 3. decode it, and bring back the LQ image's colours
        sr = self.decode(z).float().clamp(-1, 1) / 2 + 0.5
        return color_fix(sr[..., :H, :W], lq_up, cfg.color, self.stablesr)

    # ---- files: plumbing

    @classmethod
    def from_pretrained(cls, name="vosr-0.5b-1step", device="cpu", dtype=torch.float32):
        """Load a model: one of PUBLIC by its name, whose files are fetched, or from a file or folder.

        A folder is the --out of train_vosr.py or has the authors' layout. Raises FileNotFoundError or ValueError.
        """
        if name in PUBLIC:
            size, folder = PUBLIC[name]
            args, weights = fetch(f"{folder}/args.json"), fetch(f"{folder}/checkpoints/ema_model.safetensors")
            model = cls.from_release(weights, args, size)
        else:
            path = EMBEDDED.get(name) or Path(name)
            weights = find_weights(path)
            if weights is None:
                raise FileNotFoundError(f"{path}: no such model; name {', '.join(PUBLIC)}, "
                                        "or a folder with a .safetensors file")
            if read_config(weights):    # ours
                model = load_ours(cls, cls.Config, weights)
            else:
                model = cls.from_release(weights, find_args(path))
        return in_half(model.to(torch.float32), dtype).to(device).eval()

    @classmethod
    def from_release(cls, weights, args, size=None):
        """Load the authors' transformer, in file weights, and the public networks around it.

        args: path of their args.json, or None; size: key of SIZES, None = what the tensors say. Raises ValueError.
        """
        tensors = read_tensors(weights)
        cfg = release_config(SIZES, size, DiTConfig, tensors, weights, args)
        # official: wavelet colours since 2026, adain before; the multi-step script still has adain
        cfg = replace(cfg, color="wavelet")
        with on_meta_device(weights, "VOSR"):
            DiT(checked(cfg.dit))  # a wrong config fails here, before the frozen networks' gigabytes are fetched
        release = args.parent.parent if args else None  # their layout: VOSR_0.5B_ms/args.json in the release's folder
        model = cls.with_frozen(cfg, release)
        load_strictly(model.dit, tensors, weights, may_miss=("freqs_cos", "freqs_sin"))
        return model

    @classmethod
    def with_frozen(cls, cfg, release=None):
        """Load autoencoder and ViT, from folder release or fetched, into a new model, whose DiT has no values yet.

        Raises WeightError.
        """
        vae_file, vit_file = [find_or_fetch(file, release) for file in FROZEN[type(cfg.vae)]]
        vae = read_tensors(vae_file)
        if cfg.light_decoder is not None:
            # in place of the autoencoder's own decoder, which is left out
            vae = {k: v for k, v in vae.items() if not k.startswith(("decoder.", "post_quant_conv."))}
            settings, light, light_file = read_light_decoder(LightDecoder, release)
            cfg = replace(cfg, light_decoder=settings)
        with torch.device("meta"):
            model = cls(cfg)
        load_strictly(model.vae, vae, vae_file)
        load_strictly(model.vit, read_tensors(vit_file), vit_file)
        if cfg.light_decoder is not None:
            load_strictly(model.light_decoder, light, light_file)
        return model
