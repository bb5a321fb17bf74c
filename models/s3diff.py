"""S3Diff: one step of SD-Turbo, bent towards super-resolution by LoRA, and the LoRA by how bad the picture is.

Paper:   S3Diff, arXiv 2409.17058.
Weights: s3diff.pkl (adapters, modulation, conv_in) and de_net.pth of zhangap/S3Diff; unet, vae, text_encoder, tokenizer
         of stabilityai/sd-turbo.
Left out: the skip connections and the modulation by cross-attention of the paper's ablations.

Two scores say how blurred and how noisy the picture is (denet.py); they become a matrix C for every block, between A
and B of each adapter (lora.py). Picture -> latent -> UNet at t = 999, as if the latent were pure noise -> clean latent
-> picture. One prompt of what we want, one of what we do not; guidance is the difference they make.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.clip import text_features
from models.denet import DegradationEstimator
from models.lora import Modulation, add_lora
from models.support.authors import read_s3diff, s3diff_layout
from models.support.imaging import check_image, color_fix, pad_to_multiple
from models.support.precision import in_half
from models.support.tiles import tile_boxes, tiled
from models.support.weights import (WeightError, fetch, find_ours, laid_out_as, load_ours, load_public, load_strictly,
                                    read_tensors)
from models.unet import UNet, UNetConfig, alphas_cumprod
from models.vae import VAE, VAEConfig

GOOD = "A high-resolution, 8K, ultra-realistic image with sharp focus, vibrant colors, and natural lighting."
GOOD_PAPER = "a high-resolution image full of vivid details, showcasing a rich blend of colors and clear textures"
BAD = "oil painting, cartoon, blur, dirty, messy, low quality, deformation, low resolution, oversmooth"
UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_shortcut", "conv_out", "proj_in",
                "proj_out", "ff.net.2", "ff.net.0.proj")
VAE_TARGETS = r"^encoder\..*(conv1|conv2|conv_in|conv_shortcut|conv|conv_out|to_k|to_q|to_v|to_out\.0)$"
ADAPTER = {"unet": "default", "vae": "vae_skip"}  # names in s3diff.pkl
SD_TURBO = {network: f"sd-turbo/{network}/diffusion_pytorch_model.safetensors" for network in ADAPTER}


def is_trained(name):
    """Whether s3diff.pkl holds the parameter of that name."""
    return "lora_" in name or name.startswith(("unet.conv_in.", "modulation."))


@dataclass
class S3DiffConfig:
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    r_unet: int = 32
    r_vae: int = 16
    unet_targets: tuple = UNET_TARGETS
    vae_targets: str = VAE_TARGETS      # the paper's Table 4 puts adapters elsewhere
    modulation: str = "blocks"          # a C for each block; Table 5: "shared", one for all; "none", plain LoRA
    denet_widths: tuple = (64, 64, 64, 128)     # of the estimator
    t: int = 999                        # where the one step starts
    guidance: float = 1.07              # trap: the paper says 1.1
    enlarge: str = "bilinear"           # official: in inference; bicubic in training
    tile: int = 768                     # pixels a side, up to whose area the UNet sees all at once
    overlap: int = 256                  # pixels that tiles share

    @classmethod
    def from_dict(cls, d):
        return cls(**d | {"unet": UNetConfig(**d["unet"]), "vae": VAEConfig(**d["vae"])})


class S3Diff(nn.Module):
    Config = S3DiffConfig
    tokens = 77         # of a prompt
    start_noise = 1.0   # share of time t's noise that is added, where t < 999
    SWEEP = [[{"noise": n / 4, "blur": b / 4} for b in range(5)] for n in range(5)]  # of sample.py: rows, columns

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.folder, self.dtype = cfg, None, torch.float32     # where texts are read, and how
        self.unet, self.denet = UNet(cfg.unet), DegradationEstimator(num_feats=cfg.denet_widths)
        self.vae = self.autoencoder(cfg.vae)
        self.blocks = {"unet": len(self.unet.blocks), "vae": self.vae.blocks}
        self.adapt()
        self.register_buffer("prompts", torch.zeros(2, self.tokens, cfg.unet.context_dim))   # features: good, bad

    def autoencoder(self, cfg):
        return VAE(cfg)

    def adapt(self):
        """What is trained beside unet.conv_in, new: adapters and their modulation, which change nothing yet."""
        cfg, self.modulation = self.cfg, None
        if cfg.modulation != "none":
            ids = self.blocks if cfg.modulation == "blocks" else {"unet": 1, "vae": 1}
            self.modulation = Modulation(cfg.r_vae, cfg.r_unet, ids["vae"], ids["unet"])
        add_lora(self.unet, cfg.unet_targets, ADAPTER["unet"], cfg.r_unet)
        add_lora(self.vae, cfg.vae_targets, ADAPTER["vae"], cfg.r_vae)

    def matrices(self, network, scores):
        """C of "unet" or "vae".  scores: (B, 2) -> for each block {adapter: (B, r, r)}; None without modulation"""
        if self.modulation is None:
            return None
        C = self.modulation.matrices(network, scores.float()).expand(-1, self.blocks[network], -1, -1)
        return [{ADAPTER[network]: M} for M in C.unbind(1)]

    def start(self, z, t, generator=None):
        """What the UNet gets: at 999 z itself, else what that time makes of it.  z: (B, 4, h, w) LQ latent -> like z"""
        if t == 999:
            return z
        a = alphas_cumprod()[t].item()      # the paper's Table 8; the released code has 999 alone
        eps = self.start_noise * torch.randn(z.shape, generator=generator).to(z, non_blocking=True)
        return a**0.5 * z + (1 - a) ** 0.5 * eps

    def clean(self, z_t, eps, t):
        """The latent less its noise.  z_t, eps: (B, 4, h, w) -> the same, scaled latent"""
        a = alphas_cumprod()[t].item()      # 0.0047 at 999: errors of eps count 14.6 times, so no half precision here
        return ((z_t.float() - (1 - a) ** 0.5 * eps.float()) / a**0.5).to(z_t)      # Eq. S3Diff (5)

    def forward(self, x, scores, context, generator=None):
        """What training sees: one pass, no guidance.

        x: (B, 3, H, W) enlarged LQ in [-1, 1]; scores: (B, 2); context: (B, 77, D)
        generator: of the posterior's sample, None = its mode -> like x; saturated pixels have no gradient
        """
        z = self.start(self.vae.encode(x, generator, self.matrices("vae", scores)), self.cfg.t, generator)
        eps = self.unet(z, self.cfg.t, context, self.matrices("unet", scores))
        return self.vae.decode(self.clean(z, eps, self.cfg.t)).clamp(-1, 1)

    # ---- in use

    def guided(self, z, t, prompts, C, guidance):
        """Noise by both prompts, in one batch.  z: (B, 4, h, w); prompts: (2, 77, D) good, bad -> like z"""
        if guidance == 1:
            return self.unet(z, t, prompts[:1].expand(len(z), -1, -1), C)
        # one C for all stays one, which lora.py can fold
        twice = C and [{name: M if len(M) == 1 else M.repeat(2, 1, 1) for name, M in block.items()} for block in C]
        good, bad = self.unet(z.repeat(2, 1, 1, 1), t, prompts.repeat_interleave(len(z), dim=0), twice).chunk(2)
        return bad + guidance * (good - bad)        # Eq. S3Diff (5)

    def predict(self, z, t, prompts, C, guidance, tile, overlap):
        """`guided`, in tiles where z has more cells than one; then B is 1.  tile, overlap: pixels -> like z"""
        f, (h, w) = self.vae.factor, z.shape[-2:]
        side = min(max(tile // f, 8), h, w)         # the UNet halves it three times
        if h * w <= (tile // f) ** 2:
            side = 0
        boxes = tile_boxes(h, w, side, min(overlap // f, side - 1))
        # official: the window's centre lies half a cell too low
        return tiled(lambda z: self.guided(z, t, prompts, C, guidance), boxes, z, down=0.5)

    @torch.no_grad()
    def estimate(self, lq):
        """How blurred and how noisy pictures are.  lq: (B, 3, H, W) in [0, 1], not enlarged -> (B, 2) in [0, 1]"""
        return self.denet(lq.to(next(self.denet.parameters()), non_blocking=True))

    @torch.no_grad()
    def upscale(self, lq, scale=4, seed=0, noise=None, blur=None, guidance=None, prompt=None, negative_prompt=None,
                start_step=None, tile=0, overlap=0, color="wavelet", paper=False):
        """Super-resolution of one picture, or of several of one size that fit in a tile.

        lq: (B, 3, H, W) in [0, 1]; scale: 1 to 8; noise, blur: in [0, 1], None = estimated, each picture its own
        prompt, negative_prompt: texts instead of GOOD, BAD; start_step: below 999 noise is added (by seed)
        tile, overlap: pixels; color: wavelet, adain or none
        paper: the paper's guidance, prompt and enlargement
        None and 0: the checkpoint's -> (B, 3, round(H * scale), round(W * scale)) in [0, 1]. Raises WeightError.
        """
        check_image(lq)
        H, W = (round(side * scale) for side in lq.shape[-2:])
        lq = lq.to(self.unet.conv_in.weight.device, non_blocking=True)
        t = self.cfg.t if start_step is None else start_step
        if guidance is None:
            guidance = 1.1 if paper else self.cfg.guidance
        scores = self.estimate(lq) if None in (blur, noise) else torch.empty(len(lq), 2, device=lq.device)
        for i, score in enumerate((blur, noise)):
            if score is not None:
                scores[:, i] = score
        prompts = self.prompts.clone()
        for i, text in enumerate((prompt or (GOOD_PAPER if paper else None), negative_prompt)):
            if text:
                prompts[i] = self.describe(text)

        # official: the bicubic of the first release overshot
        lq_up = F.interpolate(lq, (H, W), mode="bicubic" if paper else self.cfg.enlarge).clamp(0, 1)
        multiple = self.vae.factor << len(self.cfg.unet.widths) - 1     # pixels, of VAE and UNet
        # official: a sample of the posterior; here its mode
        z = self.vae.encode(pad_to_multiple(2 * lq_up - 1, multiple), C=self.matrices("vae", scores))
        z = self.start(z, t, torch.Generator().manual_seed(seed))
        C = self.matrices("unet", scores)
        eps = self.predict(z, t, prompts.to(z), C, guidance, tile or self.cfg.tile, overlap or self.cfg.overlap)
        sr = self.vae.decode(self.clean(z, eps, t)).float().clamp(-1, 1) / 2 + 0.5
        return color_fix(sr[..., :H, :W], lq_up, color, stablesr=True)

    def describe(self, text):
        """Features of a text.  -> (77, D). Raises WeightError."""
        return text_features([text], self.folder, self.dtype)[0]

    # ---- files: plumbing

    @classmethod
    def from_pretrained(cls, name="s3diff", device="cpu", dtype=torch.float32):
        """A model by its name (s3diff, which is fetched), an s3diff.pkl, or a folder with it or ours.

        Raises FileNotFoundError or ValueError, one line.
        """
        path = Path(name)
        pkl = path / "s3diff.pkl" if path.is_dir() else path
        if name == "s3diff":
            model = cls.from_release(fetch("s3diff.pkl"), dtype=dtype)
        elif weights := find_ours(name):
            model = load_ours(cls, cls.Config, weights)
        elif pkl.is_file():
            model = cls.from_release(pkl, pkl.parent, dtype)
        else:
            raise FileNotFoundError(f"{path}: no such model; name s3diff, an s3diff.pkl, "
                                    "or a folder with it or with model.safetensors")
        model.float()
        for network in (model.unet, model.vae):     # the others are small, and decide
            in_half(network, dtype)
        return model.to(device).eval()

    @classmethod
    def with_prior(cls, cfg, folder=None, source="S3DiffConfig", dtype=torch.float32):
        """`load_public`: SD-Turbo and the estimator around a config of file source. Raises WeightError."""
        model = load_public(cls, cfg, SD_TURBO | {"denet": "de_net.pth"}, folder, source, dtype)
        model.folder, model.dtype, model.prompts = folder, dtype, text_features([GOOD, BAD], folder, dtype)
        return model

    @classmethod
    def from_release(cls, pkl, folder=None, dtype=torch.float32):
        """The authors' file or ours; public networks from folder or fetched (dtype: see `load_public`).

        Raises WeightError.
        """
        file = read_tensors(pkl)
        with laid_out_as("s3diff.pkl", pkl):
            settings, trained = read_s3diff(file)
            cfg = S3DiffConfig(**settings)
        model = cls.with_prior(cfg, folder, pkl, dtype)
        load_strictly(model, {k: v for k, v in model.state_dict().items() if not is_trained(k)} | trained, pkl)
        return model

    def release(self):
        """What is trained, laid out as s3diff.pkl."""
        return s3diff_layout(self.cfg, {k: v.detach().cpu() for k, v in self.state_dict().items() if is_trained(k)})
