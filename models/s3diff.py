"""S3Diff: one step of SD-Turbo, bent towards super-resolution by LoRA, and the LoRA by how bad the picture is.

Paper:   S3Diff, arXiv 2409.17058.
Weights: s3diff.pkl (adapters, modulation, conv_in) and de_net.pth of zhangap/S3Diff; unet, vae, text_encoder, tokenizer of stabilityai/sd-turbo.
Left out: the skip connections and the modulation by cross-attention of the paper's ablations.

A system is wiring. Two scores say how blurred and how noisy the picture is (denet.py); they become a matrix C for every block, which
stands between A and B of each adapter (lora.py). Picture -> latent -> UNet at t = 999, as if the latent were pure noise -> clean latent
-> picture. Two prompts, one of what we want and one of what we do not; the difference of their predictions is the guidance.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.clip import text_features
from models.denet import DegradationEstimator
from models.support.imaging import blend_tiles, color_fix, pad_to_multiple, tile_boxes
from models.support.precision import in_half
from models.lora import Modulation, add_lora
from models.unet import UNet, UNetConfig, alphas_cumprod
from models.vae import TinyVAEConfig, VAEConfig, autoencoder, autoencoder_config
from models.support.weights import (WeightError, checked, fetch, find_ours, load_ours, load_strictly, nearby, on_paper,
                                    read_tensors)

GOOD = "A high-resolution, 8K, ultra-realistic image with sharp focus, vibrant colors, and natural lighting."
GOOD_PAPER = "a high-resolution image full of vivid details, showcasing a rich blend of colors and clear textures"
BAD = "oil painting, cartoon, blur, dirty, messy, low quality, deformation, low resolution, oversmooth"
UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_shortcut", "conv_out", "proj_in", "proj_out",
                "ff.net.2", "ff.net.0.proj")
VAE_TARGETS = r"^encoder\..*(conv1|conv2|conv_in|conv_shortcut|conv|conv_out|to_k|to_q|to_v|to_out\.0)$"
ADAPTER = {"unet": "default", "vae": "vae_skip"}  # names in s3diff.pkl
TABLES = ["vae_block", "unet_block"]  # of the modulation, the block ids among all its parts
PARTS = TABLES + [f"{network}_{part}_mlp" for network in ("vae", "unet") for part in ("de", "block", "fuse")]
TILES_AT_ONCE = 4
PRIOR = Path(__file__).with_name("prior_tiny.safetensors")      # embedded; load_ours adds what learned around it


def is_trained(name):
    """Whether s3diff.pkl holds the parameter of that name."""
    return "lora_" in name or name.startswith(("unet.conv_in.", "modulation."))


def is_prior(name):
    """Whether prior_tiny.safetensors holds the parameter of that name: the UNet before any adapter, the autoencoder, the prompts."""
    return name.startswith(("unet.", "vae.", "prompts")) and "lora_" not in name


@dataclass
class S3DiffConfig:
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig | TinyVAEConfig = field(default_factory=VAEConfig)
    r_unet: int = 32
    r_vae: int = 16
    unet_targets: tuple = UNET_TARGETS
    vae_targets: str = VAE_TARGETS      # the paper's Table 4 puts adapters elsewhere
    modulation: str = "blocks"          # a matrix for each block; the paper's Table 5: "shared" = one for all; "none" = plain LoRA
    denet_widths: tuple = (64, 64, 64, 128)     # of the estimator
    tokens: int = 77                    # of a prompt
    t: int = 999                        # where the one step starts
    start_noise: float = 1.0            # how much of the noise of time t is added to the LQ latent, where t is below 999
    guidance: float = 1.07              # trap: the paper says 1.1
    enlarge: str = "bilinear"           # official: in inference; bicubic in training
    tile: int = 768                     # pixels a side, 96 latent cells, up to whose area the UNet sees the whole picture
    overlap: int = 256                  # pixels that tiles share

    @staticmethod
    def from_dict(d):
        return S3DiffConfig(**d | {"unet": UNetConfig(**d["unet"]), "vae": autoencoder_config(d["vae"])})


def each(function, C):
    """function of every matrix in C, what UNet and Encoder take: a list of {adapter: (B, r, r)}, or None."""
    return C and [{name: function(M) for name, M in block.items()} for block in C]


class S3Diff(nn.Module):
    SWEEP = [[{"noise": n / 4, "blur": b / 4} for b in range(5)] for n in range(5)]     # of sample.py --sweep: rows, columns

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.folder = cfg, None
        self.unet, self.denet = UNet(cfg.unet), DegradationEstimator(num_feats=cfg.denet_widths)
        self.vae = autoencoder(cfg.vae)
        self.blocks = {"unet": len(self.unet.blocks), "vae": self.vae.blocks}
        self.adapt()
        # features of the good text and of the bad one
        self.register_buffer("prompts", torch.zeros(2, cfg.tokens, cfg.unet.context_dim))

    def adapt(self):
        """What is trained beside unet.conv_in: new adapters and their modulation, which change nothing yet."""
        cfg, ids = self.cfg, self.blocks if self.cfg.modulation == "blocks" else {"unet": 1, "vae": 1}
        self.modulation = Modulation(cfg.r_vae, cfg.r_unet, ids["vae"], ids["unet"]) if cfg.modulation != "none" else None
        add_lora(self.unet, cfg.unet_targets, ADAPTER["unet"], cfg.r_unet)
        add_lora(self.vae, cfg.vae_targets, ADAPTER["vae"], cfg.r_vae)

    def matrices(self, network, scores):
        """C for network "unet" or "vae".  scores: (B, 2) -> for each block {adapter: (B, r, r)}; None without modulation"""
        if self.modulation is None:
            return None
        C = self.modulation.matrices(network, scores.float()).expand(-1, self.blocks[network], -1, -1)
        return [{ADAPTER[network]: M} for M in C.unbind(1)]

    def start(self, z, t, generator=None):
        """The LQ latent as the UNet gets it, for a noisy latent of time t.  z: (B, 4, h, w); generator: of the noise -> like z"""
        if t == 999:
            return z        # as it is: the point of S3Diff
        a = alphas_cumprod()[t].item()      # Table 8; official: only the released t = 999 is in the code
        noise = self.cfg.start_noise * torch.randn(z.shape, generator=generator)
        return a**0.5 * z + (1 - a) ** 0.5 * noise.to(z, non_blocking=True)

    def clean(self, z_t, eps, t):
        """The latent less its noise.  z_t, eps: (B, 4, h, w) -> the same, scaled latent"""
        a = alphas_cumprod()[t].item()                  # 0.0047 at 999, so that an error of eps counts 14.6 times: no half precision here
        return ((z_t.float() - (1 - a) ** 0.5 * eps.float()) / a**0.5).to(z_t)      # Eq. S3Diff (5)

    def forward(self, x, scores, context, generator=None):
        """What training sees: one pass, no guidance.

        x: (B, 3, H, W) enlarged LQ in [-1, 1]; scores: (B, 2); context: (B, 77, D); generator: of the posterior's sample, None = its mode
        -> (B, 3, H, W) in [-1, 1]; saturated pixels have no gradient
        """
        z = self.start(self.vae.encode(x, generator, self.matrices("vae", scores)), self.cfg.t, generator)
        eps = self.unet(z, self.cfg.t, context, self.matrices("unet", scores))
        return self.vae.decode(self.clean(z, eps, self.cfg.t)).clamp(-1, 1)

    def guided(self, z, t, prompts, C, guidance):
        """Noise by both prompts, in one batch.  z: (B, 4, h, w); prompts: (2, 77, D) good, bad; C: of 1 or B pictures -> like z"""
        if guidance == 1:
            return self.unet(z, t, prompts[:1].expand(len(z), -1, -1), C)
        twice = each(lambda M: M if len(M) == 1 else M.repeat(2, 1, 1), C)      # one for all can be folded into the weights
        good, bad = self.unet(z.repeat(2, 1, 1, 1), t, prompts.repeat_interleave(len(z), dim=0), twice).chunk(2)
        return bad + guidance * (good - bad)            # Eq. S3Diff (5)

    def predict(self, z, t, prompts, C, guidance, tile, overlap):
        """`guided`, picture by picture in square tiles where z has more cells than one.  tile, overlap: pixels -> like z"""
        f, (h, w) = self.vae.factor, z.shape[-2:]
        if h * w <= (tile // f) ** 2:
            return self.guided(z, t, prompts, C, guidance)
        side = min(max(tile // f, 8), h, w)             # the UNet halves it three times
        boxes = tile_boxes(h, w, side, min(overlap // f, side - 1))

        def on_tiles(i):
            mine = each(lambda M: M[i : i + 1] if len(M) > 1 else M, C)
            # official: the window's centre lies half a cell too low
            return blend_tiles(lambda tiles, _: self.guided(tiles, t, prompts, mine, guidance), z[i : i + 1], boxes, TILES_AT_ONCE, down=0.5)

        return torch.cat([on_tiles(i) for i in range(len(z))])

    @torch.no_grad()
    def estimate(self, lq):
        """How blurred and how noisy pictures are.  lq: (B, 3, H, W) in [0, 1], not enlarged -> (B, 2) in [0, 1]"""
        return self.denet(lq.to(next(self.denet.parameters()), non_blocking=True))

    @torch.no_grad()
    def upscale(self, lq, scale=4, seed=0, noise=None, blur=None, guidance=None, prompt=None, negative_prompt=None, start_step=None,
                tile=0, overlap=0, color="wavelet", paper=False):
        """Super-resolution of one picture, or of several of one size.

        lq: (B, 3, H, W) in [0, 1]; scale: 1 to 8; noise, blur: scores in [0, 1], None = estimated, each picture its own
        guidance: None = the checkpoint's; prompt, negative_prompt: texts in place of GOOD and BAD
        start_step: below 999 that time's noise is added (by seed), None = the checkpoint's; tile, overlap: pixels, 0 = the checkpoint's
        color: wavelet, adain or none; paper: the paper's guidance, prompt and enlargement instead of the released code's
        -> (B, 3, round(H * scale), round(W * scale)) in [0, 1]. Raises WeightError.
        """
        H, W = (round(side * scale) for side in lq.shape[-2:])
        lq = lq.to(self.unet.conv_in.weight.device, non_blocking=True)
        t = self.cfg.t if start_step is None else start_step
        guidance = guidance if guidance is not None else 1.1 if paper else self.cfg.guidance
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
        C_vae, C_unet = self.matrices("vae", scores), self.matrices("unet", scores)
        # official: a sample of the posterior, another one in every run; here its mode
        multiple = self.vae.factor << len(self.cfg.unet.widths) - 1     # pixels; every map of the UNet is half the one above
        z = self.vae.encode(pad_to_multiple(2 * lq_up - 1, multiple), C=C_vae)
        z = self.start(z, t, torch.Generator().manual_seed(seed))
        eps = self.predict(z, t, prompts.to(z), C_unet, guidance, tile or self.cfg.tile, overlap or self.cfg.overlap)
        sr = self.vae.decode(self.clean(z, eps, t)).float().clamp(-1, 1) / 2 + 0.5
        return color_fix(sr[..., :H, :W], lq_up, color, stablesr=True)

    def describe(self, text):
        """Features of a text.  -> (77, D). Raises WeightError."""
        if self.cfg.unet.context_dim != UNetConfig.context_dim:
            raise WeightError("this model never saw a text, so its prompts cannot be changed")
        return text_features([text], self.folder)[0]

    @classmethod
    def from_pretrained(cls, name="s3diff", device="cpu", dtype=torch.float32):
        """A model by its name (s3diff, whose files are fetched; s3diff-tiny), from an s3diff.pkl or a folder with one, or from
        train_s3diff.py's --out.

        SD-Turbo (a folder sd-turbo) and de_net.pth are looked for beside the .pkl. Raises FileNotFoundError or ValueError, one line.
        """
        path = Path(name)
        pkl = path / "s3diff.pkl" if path.is_dir() else path
        if name == "s3diff":
            model = cls.from_release(fetch("s3diff.pkl"))
        elif weights := find_ours(name):
            model = load_ours(cls, S3DiffConfig, weights)
        elif pkl.is_file():
            model = cls.from_release(pkl, pkl.parent)
        else:
            raise FileNotFoundError(f"{path}: no such model; name s3diff, an s3diff.pkl, "
                                    "or a folder with it or with model.safetensors")
        model.float()
        for network in (model.unet, model.vae):                     # the others are small, and what they say counts
            in_half(network, dtype)
        return model.to(device).eval()

    @classmethod
    def with_prior(cls, cfg, folder=None, source="S3DiffConfig"):
        """SD-Turbo and the estimator from their public files, what is trained without numbers, on the meta device. Raises WeightError.

        source: the file that cfg comes from, for messages
        """
        with on_paper(source, "S3Diff"):        # before gigabytes are fetched
            model = cls(checked(cfg))
        model.folder = folder
        for network in ("unet", "vae"):
            path = nearby(f"sd-turbo/{network}/diffusion_pytorch_model.safetensors", folder)
            load_strictly(getattr(model, network), read_tensors(path), path, [f"lora_{x}.{ADAPTER[network]}.weight" for x in "AB"])
        path = nearby("de_net.pth", folder)
        load_strictly(model.denet, read_tensors(path), path)
        model.prompts = text_features([GOOD, BAD], folder)
        return model

    @classmethod
    def from_release(cls, pkl, folder=None):
        """The authors' file, which may be ours, around the public networks that lie in folder or are fetched. Raises WeightError."""
        file = read_tensors(pkl)
        try:
            cfg = S3DiffConfig(r_unet=file["rank_unet"], r_vae=file["rank_vae"], unet_targets=tuple(file["unet_lora_target_modules"]),
                               vae_targets=file["vae_lora_target_modules"], **file.get("nanosr", {}))
            found = {"unet": file["state_dict_unet"], "vae": file["state_dict_vae"]}
            if cfg.modulation != "none":
                found |= {f"modulation.{part}": (file["state_embeddings"] if part in TABLES else file)[f"state_dict_{part}"] for part in PARTS}
                found["modulation"] = {"w": file["w"]}
            trained = {f"{part}.{name}": x for part, tensors in found.items() for name, x in tensors.items()}
        except (AttributeError, KeyError, TypeError) as e:
            raise WeightError(f"{pkl}: is not laid out as s3diff.pkl ({type(e).__name__}: {e}); get it again") from None
        model = cls.with_prior(cfg, folder, pkl)
        load_strictly(model, {k: v for k, v in model.state_dict().items() if not is_trained(k)} | trained, pkl)
        return model

    def release(self):
        """What is trained, laid out as s3diff.pkl."""
        trained = {k: v.detach().cpu() for k, v in self.state_dict().items() if is_trained(k)}

        def part(prefix):
            return {k.removeprefix(prefix): v for k, v in trained.items() if k.startswith(prefix)}

        file = {"rank_unet": self.cfg.r_unet, "rank_vae": self.cfg.r_vae, "unet_lora_target_modules": list(self.cfg.unet_targets),
                "vae_lora_target_modules": self.cfg.vae_targets, "state_dict_unet": part("unet."), "state_dict_vae": part("vae.")}
        if self.modulation is not None:
            tables = {f"state_dict_{name}": part(f"modulation.{name}.") for name in PARTS}
            file |= {"state_embeddings": {f"state_dict_{name}": tables.pop(f"state_dict_{name}") for name in TABLES}, **tables}
            file["w"] = trained["modulation.w"]
        if (self.cfg.t, self.cfg.modulation) != (999, "blocks"):
            file["nanosr"] = {"t": self.cfg.t, "modulation": self.cfg.modulation}      # the authors' layout has no word for these
        return file
