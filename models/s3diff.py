"""S3Diff: one step of SD-Turbo, adapted to super-resolution by LoRA that depends on the image's degradation.

Paper:   S3Diff, arXiv 2409.17058.
Weights: s3diff.pkl (adapters, modulation, conv_in) and de_net.pth of zhangap/S3Diff; unet, vae, text_encoder, tokenizer
         of stabilityai/sd-turbo.
Left out: the skip connections and the modulation by cross-attention of the paper's ablations.

    LQ image  -> two scores, how blurred and how noisy it is (denet.py) -> a matrix C for every block (lora.py)
    enlarged  -> latent -> UNet at t = 999, as if the latent were pure noise -> clean latent -> HQ image

The VAE's encoder and the UNet have adapters, modulated by C. The UNet is asked twice, with a positive prompt of what we
want and a negative one of what we do not; guidance goes on along their difference.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.clip import text_features
from models.denet import DegradationEstimator
from models.lora import Modulation, add_lora, of_image, repeated
from models.support.authors import read_s3diff, s3diff_layout
from models.support.imaging import check_image, color_fix, pad_to_multiple
from models.support.precision import in_half
from models.support.tiles import tile_boxes, tiled
from models.support.weights import fetch, find_ours, laid_out_as, load_ours, load_public, load_strictly, read_tensors
from models.unet import UNet, UNetConfig, alphas_cumprod
from models.vae import VAE, VAEConfig

POSITIVE = "A high-resolution, 8K, ultra-realistic image with sharp focus, vibrant colors, and natural lighting."
POSITIVE_PAPER = "a high-resolution image full of vivid details, showcasing a rich blend of colors and clear textures"
NEGATIVE = "oil painting, cartoon, blur, dirty, messy, low quality, deformation, low resolution, oversmooth"
# endings of layers' names; conv_in, which is not among them, has no adapter and is trained whole
UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_shortcut", "conv_out", "proj_in",
                "proj_out", "ff.net.2", "ff.net.0.proj")
VAE_TARGETS = r"^encoder\..*(conv1|conv2|conv_in|conv_shortcut|conv|conv_out|to_k|to_q|to_v|to_out\.0)$"
ADAPTER = {"unet": "default", "vae": "vae_skip"}  # names of the adapters in s3diff.pkl
# of UNet and VAE, by the names of --prior: folders of their public files. The text encoder is one: its float16
# file has one SHA-256 in SD-Turbo and in others made of SD 2, such as Marigold
PRIORS = {"sd-turbo": "sd-turbo", "sd-2.1": "stable-diffusion-2-1-base"}


def is_in_release(name):
    """Tell whether s3diff.pkl holds the parameter of that name: what is trained, and the frequencies modulation.w."""
    return "lora_" in name or name.startswith(("unet.conv_in.", "modulation."))


@dataclass
class S3DiffConfig:
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    r_unet: int = 32
    r_vae: int = 16
    unet_targets: tuple = UNET_TARGETS
    vae_targets: str = VAE_TARGETS      # regular expression of layers; the paper's Table 4 puts adapters elsewhere, too
    modulation: str = "blocks"          # a C for each block; Table 5: "shared", one for all; "none", plain LoRA
    prior: str = "sd-turbo"             # of PRIORS; Figure 9 also starts from SD 2.1
    t: int = 999                        # where the one step starts
    guidance: float = 1.07              # trap: the paper says 1.1
    enlarge: str = "bilinear"           # official: bilinear in inference, bicubic in training; here too
    tile: int = 768                     # side in pixels; an image of no larger area goes through the UNet whole
    overlap: int = 256                  # pixels that neighbouring tiles share

    @classmethod
    def from_dict(cls, d):
        parts = {"unet": UNetConfig(**d["unet"]), "vae": VAEConfig(**d["vae"])}
        return cls(**(d | parts))


class S3Diff(nn.Module):
    """The system: `vae` and `unet` with adapters, `modulation`, which makes their C of `denet`'s scores, `prompts`.

    Adapters, modulation and the UNet's conv_in are trained, all else is frozen.
    """

    Config = S3DiffConfig
    # knobs of each image on sample.py's sheet, row by row
    SWEEP = [[{"noise": n / 4, "blur": b / 4} for b in range(5)] for n in range(5)]

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.folder = None              # where SD-Turbo's files lie, for `describe`; None = the cache
        self.dtype = torch.float32      # float16: `describe` may fetch the text encoder in float16
        self.unet, self.denet, self.vae = self.networks(cfg)
        # what the sides of x must be a multiple of: the VAE halves its maps, then the UNet halves its own
        self.multiple = self.vae.factor * 2 ** (len(cfg.unet.widths) - 1)
        self.new_adapters()
        self.register_buffer("prompts", torch.zeros(2, 77, cfg.unet.context_dim))   # features: positive, negative

    def networks(self, cfg):
        """Make UNet, degradation estimator and VAE."""
        return UNet(cfg.unet), DegradationEstimator(), VAE(cfg.vae)

    def new_adapters(self):
        """Make adapters and their modulation anew; they change nothing yet.

        A training calls it once more, for a model of `with_prior`: that was made on the meta device, where tensors have
        no values, and then got those of the public networks only.
        """
        cfg = self.cfg
        self.modulation = None
        if cfg.modulation == "blocks":
            self.modulation = Modulation(cfg.r_vae, cfg.r_unet, self.vae.blocks, len(self.unet.blocks))
        elif cfg.modulation == "shared":
            self.modulation = Modulation(cfg.r_vae, cfg.r_unet, 1, 1)
        add_lora(self.unet, cfg.unet_targets, ADAPTER["unet"], cfg.r_unet)
        add_lora(self.vae, cfg.vae_targets, ADAPTER["vae"], cfg.r_vae)

    # ---- one step

    def matrices(self, network, scores):
        """Make the adapters that the scores ask for: the argument of a network's forward (lora.py).

        network: "vae" or "unet"; scores: (B, 2) in [0, 1] -> {name: C (B, blocks, r, r), or 1 without modulation}
        """
        name = ADAPTER[network]
        if self.modulation is None:
            return {name: 1}
        blocks = self.vae.blocks if network == "vae" else len(self.unet.blocks)
        C = self.modulation.matrices(network, scores.float())
        return {name: C.expand(-1, blocks, -1, -1)}     # "shared" has made one matrix, which all blocks take

    def encode(self, x, scores, generator=None):
        """Encode with the VAE's adapters on.

        x: (B, 3, H, W) enlarged LQ in [-1, 1]; generator: of the posterior's sample, None = its mode
        -> (B, 4, h, w) scaled latent
        """
        return self.vae.encode(x, generator, self.matrices("vae", scores))

    def start(self, z, t, generator=None):
        """Make the UNet's z_t: at 999 the LQ latent z itself, else z with the noise of t.  (B, 4, h, w) -> like z"""
        if t == 999:
            return z
        a = alphas_cumprod()[t].item()      # the paper's Table 8 varies t; the released code has 999 alone
        return a**0.5 * z + (1 - a) ** 0.5 * self.noise(z, generator)

    def noise(self, z, generator=None):
        """Draw standard normal noise like z, on the generator's device, else on the CPU."""
        device = generator.device if generator else "cpu"
        return torch.randn(z.shape, generator=generator, device=device).to(z, non_blocking=True)

    def clean(self, z_t, eps, t):
        """Take the noise out of a latent.  z_t, eps: (B, 4, h, w) -> the same, scaled latent"""
        a = alphas_cumprod()[t].item()      # 0.0047 at 999, so errors of eps count 14.6 times: no half precision here
        return ((z_t.float() - (1 - a) ** 0.5 * eps.float()) / a**0.5).to(z_t)      # Eq. S3Diff (5)

    def decode(self, z):
        """Decode; its adapters (Table 4) are not modulated.  (B, 4, h, w) scaled latent -> (B, 3, H, W) in [-1, 1]"""
        return self.vae.decode(z, {ADAPTER["vae"]: 1}).clamp(-1, 1)

    def forward(self, x, scores, context, generator=None):
        """Do what training does: one pass, no guidance.

        x: (B, 3, H, W) enlarged LQ in [-1, 1]; scores: (B, 2); context: (B, 77, D)
        generator: of the posterior's sample, None = its mode -> like x; saturated pixels have no gradient
        """
        t = self.cfg.t
        z_t = self.start(self.encode(x, scores, generator), t, generator)
        eps = self.unet(z_t, t, context, self.matrices("unet", scores))
        return self.decode(self.clean(z_t, eps, t))

    # ---- in use

    def guided(self, z_t, t, prompts, adapters, guidance):
        """Predict the noise by both prompts, in one batch.

        z_t: (B, 4, h, w); prompts: (2, 77, D) positive, negative; adapters: of the UNet
        guidance: 1 = the positive prompt alone -> like z_t
        """
        B = len(z_t)
        if guidance == 1:
            return self.unet(z_t, t, prompts[:1].expand(B, -1, -1), adapters)
        contexts = prompts.repeat_interleave(B, dim=0)      # (2B, 77, D)
        eps = self.unet(z_t.repeat(2, 1, 1, 1), t, contexts, repeated(adapters, 2))
        eps_pos, eps_neg = eps.chunk(2)
        return eps_neg + guidance * (eps_pos - eps_neg)     # Eq. S3Diff (5)

    def predict(self, z_t, t, prompts, adapters, guidance, tile, overlap):
        """Predict the noise as `guided`, in tiles if the latent has more cells than one tile.

        tile, overlap: pixels; a tile's side is rounded down to a multiple of self.multiple; the rest: of `guided`
        -> like z_t
        """
        f = self.vae.factor
        h, w = z_t.shape[-2:]
        if h * w <= (tile // f) ** 2:
            return self.guided(z_t, t, prompts, adapters, guidance)

        if len(z_t) > 1:        # one image after the other, each with its own C
            images = [self.predict(z, t, prompts, of_image(adapters, b), guidance, tile, overlap)
                      for b, z in enumerate(z_t.split(1))]
            return torch.cat(images)

        def guided_tiles(tiles):
            return self.guided(tiles, t, prompts, adapters, guidance)

        pixels = max(tile // self.multiple, 1) * self.multiple      # of a tile's side: the UNet halves its maps
        side = min(pixels // f, h, w)       # cells
        boxes = tile_boxes(h, w, side, min(overlap // f, side - 1))
        # official: the window by which tiles are blended has its centre half a cell below a tile's centre; here too
        return tiled(guided_tiles, boxes, z_t, window_down=0.5)

    @torch.no_grad()
    def estimate(self, lq):
        """Estimate how blurred and how noisy images are.  (B, 3, H, W) in [0, 1], not enlarged -> (B, 2) in [0, 1]"""
        weight = self.denet.conv_first[0].weight
        return self.denet(lq.to(weight.device, weight.dtype, non_blocking=True))

    def scores(self, lq, blur=None, noise=None):
        """Take the scores that are given, and estimate the others.

        lq: (B, 3, H, W) in [0, 1]; blur, noise: in [0, 1], None = estimated -> (B, 2)
        """
        if blur is not None and noise is not None:
            return torch.tensor([[blur, noise]], dtype=torch.float32, device=lq.device).repeat(len(lq), 1)
        scores = self.estimate(lq)
        if blur is not None:
            scores[:, 0] = blur
        if noise is not None:
            scores[:, 1] = noise
        return scores

    def describe(self, text):
        """Look up or compute the features of a text.  -> (77, D). Raises WeightError."""
        return text_features([text], self.folder, self.dtype)[0]

    def with_texts(self, positive, negative):
        """Take the model's two prompts, or texts that are given instead.  -> (2, 77, D). Raises WeightError."""
        prompts = self.prompts.clone()
        if positive:
            prompts[0] = self.describe(positive)
        if negative:
            prompts[1] = self.describe(negative)
        return prompts

    @torch.no_grad()
    def upscale(self, lq, scale=4, seed=0, noise=None, blur=None, guidance=None, prompt=None, negative_prompt=None,
                start_step=None, tile=0, overlap=0, color="wavelet", paper=False):
        """Enlarge images of one size and restore them.

        lq: (B, 3, H, W) in [0, 1]; scale: 1 to 8; noise, blur: in [0, 1], None = estimated, each image its own
        prompt, negative_prompt: texts in place of POSITIVE, NEGATIVE
        start_step: the UNet's t, below 999 with noise by seed
        tile, overlap: pixels; color: wavelet, adain or none
        paper: the paper's guidance, prompt and enlargement
        None and 0: the checkpoint's, but an overlap of half a smaller tile at most
        -> (B, 3, round(H * scale), round(W * scale)) in [0, 1]. Raises ValueError, WeightError.
        """
        lq = check_image(lq)
        cfg = self.cfg
        t = cfg.t if start_step is None else start_step
        enlarge = cfg.enlarge
        if paper:
            # official: bicubic, which overshoots at edges, in the first release, bilinear later; here both, too
            enlarge, prompt = "bicubic", prompt or POSITIVE_PAPER
        if guidance is None:
            guidance = 1.1 if paper else cfg.guidance

        # 1. estimate the degradation; enlarge, and pad the sides
        H, W = (round(side * scale) for side in lq.shape[-2:])
        lq = lq.to(self.unet.conv_in.weight.device, non_blocking=True)
        scores = self.scores(lq, blur, noise)
        lq_up = F.interpolate(lq, (H, W), mode=enlarge).clamp(0, 1)
        x = pad_to_multiple(2 * lq_up - 1, self.multiple)

        # 2. encode
        # official: a sample of the posterior; here its mode
        z = self.encode(x, scores)
        z_t = self.start(z, t, torch.Generator().manual_seed(seed))

        # 3. one step, under both prompts
        prompts = self.with_texts(prompt, negative_prompt).to(z)
        adapters = self.matrices("unet", scores)
        tile = tile or cfg.tile
        eps = self.predict(z_t, t, prompts, adapters, guidance, tile, overlap or min(cfg.overlap, tile // 2))
        z = self.clean(z_t, eps, t)

        # 4. decode, and give back the colours
        sr = self.decode(z)[..., :H, :W].float() / 2 + 0.5
        return color_fix(sr, lq_up, color, stablesr=True)

    # ---- files: plumbing

    @classmethod
    def from_pretrained(cls, name="s3diff", device="cpu", dtype=torch.float32):
        """Load a model: s3diff, which is fetched, or an s3diff.pkl, or from a folder with it or ours.

        Raises FileNotFoundError or ValueError, one line.
        """
        path, ours = Path(name), find_ours(name)
        pkl = path / "s3diff.pkl" if path.is_dir() else path
        if name == "s3diff":
            model = cls.from_release(fetch("s3diff.pkl"), dtype=dtype)
        elif ours:
            model = load_ours(cls, cls.Config, ours)
        elif pkl.is_file():
            model = cls.from_release(pkl, pkl.parent, dtype)
        else:
            raise FileNotFoundError(f"{path}: no such model; name s3diff, an s3diff.pkl, "
                                    "or a folder with it or with model.safetensors")
        model.float()
        for network in (model.unet, model.vae):     # estimator and modulation are small, and an error in them spreads
            in_half(network, dtype)
        return model.to(device).eval()

    @classmethod
    def with_prior(cls, cfg, folder=None, source="S3DiffConfig", dtype=torch.float32):
        """Load the prior and the estimator into a new model, whose adapters have no values yet: see `new_adapters`.

        cfg: from file source; folder: where the public files lie, None = the cache; dtype: float16 may fetch files in
        float16. Raises WeightError.
        """
        files = {network: f"{PRIORS[cfg.prior]}/{network}/diffusion_pytorch_model.safetensors" for network in ADAPTER}
        model = load_public(cls, cfg, files | {"denet": "de_net.pth"}, folder, source, dtype)
        model.folder, model.dtype = folder, dtype
        model.prompts = text_features([POSITIVE, NEGATIVE], folder, dtype)
        return model

    @classmethod
    def from_release(cls, pkl, folder=None, dtype=torch.float32):
        """Load the authors' file or ours, pkl, into a model of `with_prior`, which see. Raises WeightError."""
        file = read_tensors(pkl)
        with laid_out_as("s3diff.pkl", pkl):
            settings, trained = read_s3diff(file)
            cfg = S3DiffConfig(**settings)
            PRIORS[cfg.prior]       # a KeyError says which prior is none
        model = cls.with_prior(cfg, folder, pkl, dtype)
        already_loaded = [name for name in model.state_dict() if not is_in_release(name)]
        load_strictly(model, trained, pkl, may_miss=already_loaded)
        return model

    def release(self):
        """Lay out what is trained as s3diff.pkl."""
        trained = {k: v.detach().cpu() for k, v in self.state_dict().items() if is_in_release(k)}
        return s3diff_layout(self.cfg, trained)
