"""Ours, and no paper's: what makes the three systems small enough to be trained on a laptop.

Weights: vosr_tiny, s3diff_tiny, gramsr_tiny, prior_tiny.safetensors beside this file, trained by the three scripts.

The systems are those of vosr.py, s3diff.py and gramsr.py with other parts: a linear autoencoder in place of Stable
Diffusion's; a prior that learned two prompts instead of a language; random features where LPIPS has a classifier's; a
discriminator of four convolutions; and for VOSR a transformer that starts from the best linear estimate.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import spectral_norm

from models.discriminator import multilevel_loss
from models.dit import DiT, DiTConfig
from models.gramsr import GramSR, GramSRConfig
from models.lora import Conv2d, ExactConv2d
from models.lpips import LPIPS
from models.s3diff import S3Diff, S3DiffConfig
from models.support.weights import EMBEDDED, PRIOR, WeightError, load_strictly, read_foundation, read_tensors
from models.unet import UNetConfig
from models.vit import DINOv3, DINOv3Config, ViT, ViTConfig
from models.vosr import VOSR, VOSRConfig

# ---- the autoencoder

@dataclass
class TinyVAEConfig:
    latent_channels: int = 64  # of 192 numbers in 8x8x3 pixels
    whitening: float = 0.5  # latents over std^whitening: 0 weighs errors as pixels do, 1 all channels alike
    scale: float = 2.0  # of the latents, whose noise has 1
    finish: int = 0  # channels of the convolutions after the linear decoder; 0 = none


class ResBlock(nn.Module):
    """x + two convolutions; no norm: contrast is information."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(x)))


class Finish(nn.Module):
    """What to add to a linearly decoded picture: convolutions at an eighth and half of its size."""

    def __init__(self, latent_channels, wide, narrow=32):
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, wide, 3, padding=1)
        self.deep = nn.Sequential(*(ResBlock(wide) for _ in range(4)))
        self.up = nn.Conv2d(wide, 16 * narrow, 1)
        self.conv_x = nn.Conv2d(12, narrow, 3, padding=1)
        self.fine = nn.Sequential(*(ResBlock(narrow) for _ in range(2)))
        self.conv_out = nn.Conv2d(narrow, 12, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, z, x):
        """z: (B, c, h, w) scaled latent; x: (B, 3, 8h, 8w) -> like x"""
        h = F.pixel_shuffle(self.up(self.deep(self.conv_in(z))), 4) + self.conv_x(F.pixel_unshuffle(x, 2))
        return F.pixel_shuffle(self.conv_out(self.fine(h)), 2)


def without_crisp(module, state_dict, prefix, *_):
    """Load hook: older files hold a network that is gone."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}crisp.")]:
        del state_dict[name]


class TinyVAE(nn.Module):
    """A learned lapped transform: one strided convolution, and its transpose back.

    Like PCA it is linear, and tied weights make it nearly orthonormal; its 16x16 windows overlap by half. A
    transformer's errors, one token each, still show as a faint grid, which `finish` takes away.
    """

    factor = 8
    blocks = 1  # that adapters tell apart

    def __init__(self, cfg=TinyVAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.encoder = ExactConv2d(3, cfg.latent_channels, 16, stride=8, bias=False)  # also the decoder's weight
        nn.init.normal_(self.encoder.weight, std=768**-0.5)
        self.register_buffer("std", torch.ones(cfg.latent_channels))  # of each channel, measured in training
        self.finish = Finish(cfg.latent_channels, cfg.finish) if cfg.finish else None
        self.register_load_state_dict_pre_hook(without_crisp)

    def gain(self):
        return (self.cfg.scale * self.std**-self.cfg.whitening).view(1, -1, 1, 1)

    def analyse(self, x, C=None):
        return self.encoder(F.pad(x, (4,) * 4, mode="reflect"), C)

    def synthesise(self, y):
        return F.conv_transpose2d(F.pad(y, (1,) * 4, mode="replicate"), self.encoder.weight, stride=8, padding=12)

    def encode(self, x, generator=None, C=None):
        """(B, 3, H, W) in [-1, 1] -> (B, c, H/8, W/8) scaled latent; nothing is random here."""
        return self.analyse(x, C and C[0]) * self.gain()

    def decode(self, z):
        """(B, c, h, w) scaled latent -> (B, 3, 8h, 8w), about [-1, 1]"""
        x = self.synthesise(z / self.gain())
        return x if self.finish is None else x + self.finish(z, x)

    def loss(self, x, generator):
        """Nested dropout (1402.0915): any first k channels must do, which sorts them by importance as PCA does.

        x: (B, 3, H, W) in [-1, 1]; generator draws k for each picture -> squared errors with all channels and with k
        """
        y = self.analyse(x)
        if self.training:
            with torch.no_grad():
                self.std.lerp_(y.std((0, 2, 3)).float(), 0.02)
        B, c = y.shape[:2]
        k = torch.randint(1, c + 1, (B, 1, 1, 1), generator=generator).to(x.device)
        first = torch.arange(c, device=x.device).view(1, c, 1, 1) < k
        return F.mse_loss(self.synthesise(y), x), F.mse_loss(self.synthesise(y * first), x)

# ---- VOSR's transformer


class TinyDiT(DiT):
    """A DiT around the best linear estimate, as EDM (2206.00364) does for denoisers.

    Were z_hq normal around z_lq with variance 1, then z_t would be normal around (1 - t) z_lq with variance
    (1 - t)^2 + t^2, and E[z_hq | z_t] = z_lq + (1 - t) / variance (z_t - (1 - t) z_lq). The network sees the second
    term, and says by how much the velocity differs from that of this mean.
    """

    def forward(self, z_t, z_lq, feat, t, r=None, cache=None):
        """As `DiT.forward`."""
        time = t[:, None, None, None]
        variance = (1 - time) ** 2 + time**2
        gain = (1 - time) / variance
        gain = gain.clamp(min=0.1)      # or at t = 1 no noise came in, and in one step all seeds gave one image
        linear = ((2 * time - 1) * z_t - time * z_lq) / variance
        return linear - super().forward(gain * (z_t - (1 - time) * z_lq), z_lq, feat, t, r, cache) / variance.sqrt()


# ---- S3Diff's discriminator

class PatchDiscriminator(nn.Module):
    """Ours, for tiny presets: four convolutions, logits of the last three; it also sees what was to be restored.

    Trap: three strides of 2 leave a lattice of 8 pixels in its gradient. So large are the tiny autoencoder's cells,
    too, and a generator would weave the lattice into every picture; so pictures are rolled, by new offsets each time.
    """

    def __init__(self, width=32):
        super().__init__()
        widths = (6, width, 2 * width, 4 * width)
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1)) for c_in, c_out in pairwise(widths))
        self.layers.append(spectral_norm(nn.Conv2d(widths[-1], widths[-1], 3, padding=1)))
        # not normalised: logits may be large
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in (*widths[2:], widths[-1]))

    def draw(self, x, x_src, generator):
        """What `forward` gets beside x: the enlarged LQ pictures x_src (B, 3, H, W), and offsets to roll both by."""
        return x_src, torch.randint(8, (len(x_src), 2), generator=generator, device=generator.device).tolist()

    def forward(self, x, target, plan):
        """x: (B, 3, H, W) in [-1, 1]; plan: of `draw` -> (B, 1)"""
        x_src, offsets = plan
        h, logits = torch.cat([x, x_src], dim=1), []
        h = torch.stack([one.roll(offset, (1, 2)) for one, offset in zip(h, offsets)])
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
            logits.append(h)
        return multilevel_loss([head(h) for head, h in zip(self.heads, logits[1:])], target)

# ---- a perceptual distance without a classifier

FAINT = 0.3     # added to the length of a feature vector: what is fainter counts less


class RandomLPIPS(LPIPS):
    """LPIPS on features of random orthogonal filters (2103.10571), which do not see brightness, all weighted alike."""

    def __init__(self):
        nn.Module.__init__(self)
        g, layers = torch.Generator().manual_seed(0), []
        for c_in, width in ((3, 16), (16, 32), (32, 64)):
            conv = nn.Conv2d(c_in, width, 3, padding=1, padding_mode="reflect", bias=False)
            nn.init.orthogonal_(conv.weight, gain=2**0.5, generator=g)
            conv.weight.data -= conv.weight.data.mean((2, 3), keepdim=True)
            layers += [conv, nn.LeakyReLU(0.2), nn.AvgPool2d(2)]
        self.build(layers[:-1], taps={1: 16, 4: 32, 7: 64}, smallest=8, eps=FAINT)


# ---- the three systems


def old_vae(d):
    """TinyVAEConfig of a file's config; older ones name a network that is gone."""
    return TinyVAEConfig(**{k: v for k, v in d.items() if k != "crisp"})


@dataclass
class TinyVOSRConfig(VOSRConfig):
    dit: DiTConfig = field(default_factory=lambda: DiTConfig(
        input_size=16, patch_size=1, in_channels=128, out_channels=64, hidden_size=256, depth=6, num_heads=4,
        z_dims=128, rope_rescale=False))
    vit: ViTConfig = field(default_factory=lambda: ViTConfig(img_size=112, embed_dim=128, depth=4, num_heads=2))
    vae: TinyVAEConfig = field(default_factory=TinyVAEConfig)
    vit_input: int = 112
    vit_layer: int | None = None
    guidance: float = 1.0
    temperature: float = 0.25
    color: str = "wavelet"
    tile: int = 128
    overlap: int = 32
    blind: bool = False         # no visual tokens: the paper's ablation

    @classmethod
    def from_dict(cls, d):
        dit = {k: v for k, v in d["dit"].items() if k != "precondition"}    # of older files, always true
        known = {k: v for k, v in d.items() if k not in ("torch_bicubic", "stablesr")}
        return cls(**known | {"dit": DiTConfig(**dit), "vit": ViTConfig(**d["vit"]), "vae": old_vae(d["vae"])})


class TinyVOSR(VOSR):
    Config = TinyVOSRConfig
    stablesr = True     # its wavelet brings back fewer blotches of JPEG

    def networks(self, cfg):
        return TinyVAE(cfg.vae), ViT(cfg.vit), TinyDiT(cfg.dit)

    def tokens(self, x):
        if self.cfg.blind:
            return x.new_zeros(len(x), 1, self.cfg.vit.embed_dim)
        return super().tokens(x)

    def enlarge(self, lq, size):
        """As degrade.py does, so by torch."""
        return F.interpolate(lq, size, mode="bicubic").clamp(0, 1)


UNET = UNetConfig(64, 64, widths=(96, 128, 192), num_heads=(0, 2, 3), layers_per_block=1, context_dim=64,
                  norm_groups=16)
PROMPT_TOKENS = 8       # of each of the two prompts that the prior learned


@dataclass
class TinyS3DiffConfig(S3DiffConfig):
    unet: UNetConfig = field(default_factory=lambda: replace(UNET))
    vae: TinyVAEConfig = field(default_factory=lambda: TinyVAEConfig(finish=96))
    r_vae: int = 8
    vae_targets: str = "encoder"
    denet_widths: tuple = (16, 16, 32, 32)
    t: int = 250                # at 999 errors of eps would count 14.6 times
    guidance: float = 1.1
    enlarge: str = "bicubic"
    tile: int = 1024
    tokens: int = PROMPT_TOKENS

    @classmethod
    def from_dict(cls, d):
        known = {k: v for k, v in d.items() if k != "start_noise"}
        return cls(**known | {"unet": UNetConfig(**d["unet"]), "vae": old_vae(d["vae"])})


class TinyS3Diff(S3Diff):
    """S3Diff around the tiny prior: no text encoder, so prompts are parameters; nothing is added to the LQ latent."""

    Config = TinyS3DiffConfig
    start_noise = 0.0

    def __init__(self, cfg):
        self.tokens = cfg.tokens
        super().__init__(cfg)

    def autoencoder(self, cfg):
        return TinyVAE(cfg)

    def describe(self, text):
        raise WeightError("this model never saw a text, so its prompts cannot be changed")


def is_prior(name):
    """Whether prior_tiny.safetensors holds the parameter of that name."""
    return name.startswith(("unet.", "vae.", "prompts")) and "lora_" not in name


def load_prior(model, init=None, wanted=is_prior):
    """Load the tiny prior, around which a TinyS3Diff or a TinyGramSR learns; the rest of the model stays as it is.

    init: --out of train_s3diff.py, None = the embedded prior and degradation estimator
    wanted: function of a tensor's name: load it, too -> path of the file. Raises WeightError.
    """
    if init:
        path = Path(init, "model.safetensors")
        tensors = read_tensors(path)
    else:
        path = PRIOR
        estimator = {k: v for k, v in read_tensors(EMBEDDED["s3diff-tiny"]).items() if k.startswith("denet.")}
        tensors = read_foundation() | estimator
    tensors = {k: v for k, v in tensors.items() if wanted(k)}
    load_strictly(model, tensors, path, may_miss=[k for k in model.state_dict() if k not in tensors])
    model.float()       # files have float16
    return path


def load_autoencoder(model):
    """Load the embedded autoencoder, which all tiny models share; adapters in it stay as they are."""
    model.vae.load_state_dict(TinyVOSR.from_pretrained("vosr-tiny").vae.state_dict(), strict=False)


@dataclass
class TinyGramSRConfig(GramSRConfig):
    unet: UNetConfig = field(default_factory=lambda: replace(UNET))
    vae: TinyVAEConfig = field(default_factory=lambda: TinyVAEConfig(finish=96))
    vit: DINOv3Config = field(default_factory=lambda: DINOv3Config(embed_dim=96, depth=3, num_heads=3))
    ranks: dict = field(default_factory=dict)
    tile: int = 1024
    prompt_tokens: int = PROMPT_TOKENS

    @classmethod
    def from_dict(cls, d):
        vit = DINOv3Config(**d["vit"])
        return cls(**d | {"unet": UNetConfig(**d["unet"]), "vae": old_vae(d["vae"]), "vit": vit})


class TinyGramSR(GramSR):
    """GramSR around the tiny prior, whose two prompts are what CSD compares."""

    Config = TinyGramSRConfig

    def __init__(self, cfg):
        super().__init__(cfg)
        self.register_buffer("prompts", torch.zeros(2, cfg.prompt_tokens, cfg.unet.context_dim))    # good, bad

    def autoencoder(self, cfg):
        return TinyVAE(cfg)

    def csd_conditions(self, context):
        good, bad = (prompt.expand(len(context), -1, -1) for prompt in self.prompts.split(1))
        return good, bad


# ---- how they are trained: fields of each trainer's Stage

COMMON = dict(crop=128, schedule="cosine")
BOTH = dict(recipes=("s3diff", "vosr"), branches_per="image")
FLOW = dict(**COMMON, batch_size=8, flip=True, strength=(7.0, 1.0), warmup=100, ema=0.998)
VOSR_STAGES = {
    "autoencoder": dict(**COMMON, batch_size=16, flip=True, steps=3000, lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0,
                        ema=0.99, recipes=()),
    "flow": dict(**FLOW, steps=2600, lr=8e-4, lognorm=(1.0, 1.2), recipes=("s3diff",)),
    "refine": dict(**FLOW, **BOTH, steps=3600, lr=5e-4, lognorm=(1.5, 1.2)),
    "distill": dict(**FLOW | BOTH | dict(steps=40, lr=5e-5, warmup=5, ema=0.8, omega=1.0)),
    "decoder": dict(**COMMON, **BOTH, batch_size=8, flip=True, steps=1500, lr=1e-3, warmup=50, betas=(0.9, 0.99),
                    weight_decay=0.0, ema=0.99),
}
HARSHER = ("s3diff", "s3diff", "vosr")      # two steps in three as the papers degrade, one harsher
S3DIFF_STAGES = {
    "prior": dict(**COMMON, batch_size=16, steps=6000, lr=6e-4, warmup=300, ema=0.999,
                  recipes=("s3diff", "vosr", "s3diff")),
    "estimator": dict(**COMMON | dict(crop=256), batch_size=4, steps=1500, lr=1e-3, warmup=100, ema=0.99,
                      recipes=("wide", "s3diff", "wide", "vosr")),
    "adapters": dict(**COMMON, batch_size=8, steps=4000, lr=1e-3, warmup=100, ema=0.999, recipes=HARSHER,
                     branches_per="image", lambda_lpips=0.02, lambda_gan=0.1, lr_D=5e-4, l2_alone=0.75),
}
GRAMSR = dict(**COMMON, batch_size=8, rank=16, recipes=HARSHER)
# by gradients at the end of stage pixel: LPIPS half of L2's, Gram ten times, CSD 3 %; at 30 % the tiny prior, which
# hardly knows its prompts, weaves a lattice
PERCEPTUAL = dict(**GRAMSR, steps=250, lr=5e-4, lambda_lpips=0.015, lambda_csd=0.003, guidance=3.0)
GRAMSR_STAGES = {
    "pixel": dict(**GRAMSR, steps=5000, lr=1e-3, warmup=50, learn_vit=True),
    "semantic": dict(**PERCEPTUAL, before=5000),
    "texture": dict(**PERCEPTUAL, before=5250, lambda_gram=0.4),
}
