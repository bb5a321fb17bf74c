"""Ours, and no paper's: the three systems with parts small enough to be trained on a laptop.

Weights: vosr_tiny, s3diff_tiny, gramsr_tiny, prior_tiny.safetensors beside this file, trained by the three scripts.

Each system is the paper's (vosr.py, s3diff.py, gramsr.py) with other parts:

    ours                     in place of                      because
    TinyVAE                  Stable Diffusion's autoencoder   49 thousand parameters do, not 84 million
    Residual                 nothing                          TinyVAE's decoder shows a transformer's errors
    PixelVAE (digits)        the autoencoder                  on cells of 32 pixels none is needed
    TinyDiT                  VOSR's DiT                       it starts from the best linear estimate
    ConvSwiGLU (optional)    the MLP of a DiT's block         six layers learn slowly what is local
    two learned prompts      a text encoder                   a tiny prior never saw a text

Below, the autoencoder comes first, which all three have, then VOSR, then S3Diff and GramSR with the UNet that both are
built on. What they learn from instead of DINO and VGG16 is in tiny_losses.py.

How each is trained stands in the scripts, TINY in train_vosr.py, train_s3diff.py, train_gramsr.py. What was tried
beside them is in tests/RESULTS.md.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.denet import DegradationEstimator
from models.dit import DiT, DiTConfig, SwiGLU
from models.gramsr import GramSR, GramSRConfig
from models.lora import NO_ADAPTERS, Conv2d, ExactConv2d, of_block
from models.s3diff import S3Diff, S3DiffConfig
from models.support.tiles import tile_boxes
from models.support.weights import EMBEDDED, PRIOR, WeightError, load_strictly, read_foundation, read_tensors
from models.unet import UNet, UNetConfig
from models.vit import DINOv3, DINOv3Config, ViT, ViTConfig
from models.vosr import VOSR, VOSRConfig


# ---- the autoencoder: a linear transform, and a residual network behind its decoder

RESIDUAL = (160, 48, 16)        # channels of the `Residual` that the embedded models share


@dataclass
class TinyVAEConfig:
    latent_channels: int = 64   # c; an image has 192 values in the 8x8x3 pixels of a latent's cell
    whitening: float = 0.5      # exponent w of `TinyVAE.gain`
    # what all channels are multiplied by; since a flow's noise has deviation 1, the larger, the less it hides
    scale: float = 2.0
    residual: tuple = ()        # channels of `Residual` at an eighth, half and all of the image's size; () = none

    def __post_init__(self):
        self.residual = tuple(self.residual)    # JSON has lists


class ResBlock(nn.Module):
    """x + two 3x3 convolutions, without a norm, which would lose contrast.  (B, channels, H, W) -> same shape"""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)       # at first a block is the identity
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, adapters=NO_ADAPTERS):
        return x + self.conv2(F.silu(self.conv1(x, adapters)), adapters)


class Residual(nn.Module):
    """The decoder's residual network: what to add to a linearly decoded image. All three tiny systems share it.

    It learned on latents of photos, to which little has to be added, and on latents that the three systems made, whose
    errors, one token or cell each, would show as a faint grid of 8 pixels. Maps are enlarged bilinearly: a transposed
    convolution, or pixel_shuffle, would weave a lattice of its own into the image.
    """

    def __init__(self, latent_channels, eighth, half, full):
        super().__init__()
        # at an eighth of the image's size, on the latent
        self.conv_z = nn.Conv2d(latent_channels, eighth, 3, padding=1)
        self.blocks_eighth = nn.ModuleList(ResBlock(eighth) for _ in range(3))
        # at half of it, also on the image, 2x2 pixels of RGB as 12 channels
        self.to_half = nn.Conv2d(eighth, half, 1)
        self.conv_half = nn.Conv2d(12, half, 3, padding=1)
        self.blocks_half = nn.ModuleList(ResBlock(half) for _ in range(4))
        # at its full size
        self.to_full = nn.Conv2d(half, full, 1)
        self.conv_full = nn.Conv2d(3, full, 3, padding=1)
        self.block_full = ResBlock(full)
        self.conv_out = nn.Conv2d(full, 3, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)    # at first nothing is added
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, z, x, adapters=NO_ADAPTERS):
        """z: (B, c, h, w) scaled latent; x: (B, 3, 8h, 8w) linearly decoded -> like x, to be added to it"""
        z = z.contiguous(memory_format=torch.channels_last)     # faster on CPUs
        x = x.contiguous(memory_format=torch.channels_last)
        h = self.conv_z(z)
        for block in self.blocks_eighth:
            h = block(h, adapters)
        h = F.interpolate(self.to_half(h), scale_factor=4, mode="bilinear")     # (B, half, 4h, 4w)
        h = h + self.conv_half(F.pixel_unshuffle(x, 2))
        for block in self.blocks_half:
            h = block(h, adapters)
        h = F.interpolate(self.to_full(h), scale_factor=2, mode="bilinear")     # (B, full, 8h, 8w)
        h = self.block_full(h + self.conv_full(x), adapters)
        return self.conv_out(h)


def drop_old_tensors(module, state_dict, prefix, *_):
    """Load hook of TinyVAE: files of earlier versions hold `crisp`, which drew edges, and another `finish`."""
    for name in [name for name in state_dict if name.startswith((f"{prefix}crisp.", f"{prefix}finish."))]:
        del state_dict[name]


class TinyVAE(nn.Module):
    """A learned lapped transform: analysis is one convolution, synthesis its transpose, both by the same weights.

    Every cell of 8x8 pixels becomes c channels, each the dot product of a 16x16 window around it with one filter.
    Windows overlap by half, so cells leave no visible edges, unlike JPEG's blocks. Synthesis adds every filter, times
    its channel, back into the image. Since the weights are shared, training for the least squared error makes the
    filters nearly orthonormal: as in PCA, errors of the coefficients are about as large as those of the image.

    The transform keeps 64 numbers of 192. It is linear, and nothing in it is random; what may follow it in the decoder,
    `Residual`, is not linear.
    """

    factor = 8      # pixels per latent cell side
    blocks = 1      # that adapters tell apart: the one convolution

    def __init__(self, cfg=TinyVAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.encoder = ExactConv2d(3, cfg.latent_channels, 16, stride=8, bias=False)    # the decoder's weight, too
        nn.init.normal_(self.encoder.weight, std=768**-0.5)     # 768 = 3 * 16 * 16: filters of about unit length
        self.register_buffer("std", torch.ones(cfg.latent_channels))    # of each channel, measured in training
        self.residual = Residual(cfg.latent_channels, *cfg.residual) if cfg.residual else None
        self.register_load_state_dict_pre_hook(drop_old_tensors)

    def analysis(self, x, adapters=NO_ADAPTERS):
        """(B, 3, H, W) in [-1, 1] -> (B, c, H/8, W/8) transform coefficients"""
        x = F.pad(x, (4,) * 4, mode="reflect")      # a 16x16 window reaches 4 pixels beyond its 8x8 cell
        return self.encoder(x, adapters)

    def synthesis(self, y):
        """(B, c, h, w) transform coefficients -> (B, 3, 8h, 8w), about [-1, 1]"""
        y = F.pad(y, (1,) * 4, mode="replicate")    # so that pixels at the border lie under as many windows as others
        # padding 12 cuts off, on each side, that cell's 8 pixels and the 4 by which a window reaches beyond its cell
        return F.conv_transpose2d(y, self.encoder.weight, stride=8, padding=12)

    def gain(self):
        """From coefficients to latents: scale / std^w for each channel.  -> (1, c, 1, 1)

        The first channels are coarse and large, the last fine and small. w = 0 leaves them so, and a squared error of
        latents is one of pixels; w = 1 gives all the same deviation, and faint details count as much as brightness.
        """
        return (self.cfg.scale * self.std**-self.cfg.whitening).view(1, -1, 1, 1)

    def encode(self, x, generator=None, adapters=NO_ADAPTERS):
        """(B, 3, H, W) in [-1, 1] -> (B, c, H/8, W/8) scaled latent

        generator: of no use, since nothing is random here; adapters: {name: (B or 1, 1, r, r) or 1}
        """
        return self.analysis(x, of_block(adapters, 0)) * self.gain()

    def decode(self, z, adapters=NO_ADAPTERS):
        """(B, c, h, w) scaled latent -> (B, 3, 8h, 8w), about [-1, 1]"""
        x = self.synthesis(z / self.gain())
        return x if self.residual is None else x + self.residual(z, x, adapters)

    def loss(self, x, generator):
        """Nested dropout (1402.0915), which sorts the channels by importance.

        Squared error alone finds the c directions that matter together, but any rotation of them decodes as well. So
        each image is also decoded from its first k channels, k drawn anew: channel 1 is always there and must take what
        explains most, channel 2 most of what is left, and so on, as PCA's components do. Then `std` says how much a
        channel carries, which `gain` needs.

        x: (B, 3, H, W) in [-1, 1]; generator draws k for each image -> squared errors with all channels and with k
        """
        y = self.analysis(x)
        if self.training:
            with torch.no_grad():
                self.std.lerp_(y.std((0, 2, 3)).float(), 0.02)      # a moving average
        B, c = y.shape[:2]
        k = torch.randint(1, c + 1, (B, 1, 1, 1), generator=generator, device=generator.device).to(x.device)
        first = torch.arange(c, device=x.device).view(1, c, 1, 1) < k
        return F.mse_loss(self.synthesis(y), x), F.mse_loss(self.synthesis(y * first), x)


@dataclass
class PixelVAEConfig:
    cell: int = 4           # pixels a side that become one latent cell
    brightness: float = 0.75        # what pixels in [-1, 1] are multiplied by; see TinyVAEConfig.scale

    def __post_init__(self):
        if self.cell not in (1, 2, 4, 8, 16) or self.brightness <= 0:
            raise ValueError(f"cell is {self.cell}, brightness {self.brightness}")


class PixelVAE(nn.Module):
    """No autoencoder at all: a latent cell's channels are its pixels, dimmed: nothing to train or to lose.

    Of digits and letters. Encoder and decoder are convolutions that change nothing, for adapters to stand beside.
    """

    blocks = 1      # that adapters tell apart

    def __init__(self, cfg=PixelVAEConfig()):
        super().__init__()
        self.cfg, self.factor = cfg, cfg.cell
        channels = 3 * cfg.cell**2
        self.encoder = ExactConv2d(channels, channels, 3, padding=1, bias=False)
        self.decoder = ExactConv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.dirac_(self.encoder.weight)
        nn.init.dirac_(self.decoder.weight)

    def encode(self, x, generator=None, adapters=NO_ADAPTERS):
        """(B, 3, H, W) in [-1, 1] -> (B, 3 cell^2, H/cell, W/cell); nothing is random"""
        z = self.cfg.brightness * F.pixel_unshuffle(x, self.cfg.cell)
        return self.encoder(z, of_block(adapters, 0))

    def decode(self, z, adapters=NO_ADAPTERS):
        """(B, 3 cell^2, h, w) -> (B, 3, H, W), about [-1, 1]"""
        return F.pixel_shuffle(self.decoder(z, of_block(adapters, 0)) / self.cfg.brightness, self.cfg.cell)


AUTOENCODERS = {TinyVAEConfig: TinyVAE, PixelVAEConfig: PixelVAE}


def autoencoder_config(values):
    """Make the config whose fields a file holds.  values: dict -> TinyVAEConfig or PixelVAEConfig"""
    kind = PixelVAEConfig if "cell" in values else TinyVAEConfig
    return kind(**values)


# ---- VOSR: the transformer, the config, the system

class ConvSwiGLU(SwiGLU):
    """SwiGLU whose values also see their eight neighbours: value + dw(value), a depthwise 3x3 convolution.

    Few attention layers learn slowly what a convolution has by nature: that a pixel goes with the ones beside it. On
    digits, after five minutes of training, the loss was .146 instead of .180, at 1 % more time a step.
    dw starts at zero, so that a transformer trained without it can go on with it.
    """

    def __init__(self, D, inner):
        super().__init__(D, inner)
        self.dw = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        nn.init.zeros_(self.dw.weight)
        nn.init.zeros_(self.dw.bias)
        self.grid = None    # (rows, columns) of the tokens that come next; `TinyDiT.forward` sets it

    def forward(self, x):
        """x: (B, rows * columns, D) -> same shape"""
        gate, value = self.w12(x).chunk(2, dim=-1)
        grid = value.transpose(1, 2).unflatten(2, self.grid)        # (B, inner, rows, columns)
        grid = grid.contiguous(memory_format=torch.channels_last)   # faster
        value = value + self.dw(grid).flatten(2).transpose(1, 2)
        return self.w3(F.silu(gate) * value)


class TinyDiT(DiT):
    """A DiT that adds to the best linear estimate of the velocity, as EDM (2206.00364) does for denoisers.

    A flow mixes z_t = (1 - t) z_hq + t eps and asks for v = eps - z_hq. Were z_hq normal around z_lq with variance 1:
        d = z_t - (1 - t) z_lq is normal around 0 with variance s^2 = (1 - t)^2 + t^2,
        E[z_hq | z_t] = z_lq + (1 - t) / s^2 d,    E[eps | z_t] = t / s^2 d,
        so E[v | z_t] = ((2 t - 1) z_t - t z_lq) / s^2, and v lies around it with variance 1 / s^2.

    Output: the network gives (E[v | z_t] - v) s, at every t of deviation 1. The minus sign: v = eps - z_hq, so what is
    missing in z_hq has the other sign in v, and the network adds to the image. Untrained it gives 0, and one step makes
    the LQ latent. Without this, one step after 600 training steps was 2.8 dB below bicubic.

    Input: the network gets d times a gain. (1 - t) / s^2 d is what z_t tells of z_hq beyond z_lq. Near t = 1 that gain
    would fall to 0, and with it the noise that a single step starts from; all seeds would give one image. Hence it is
    0.1 at least. Whatever the gain, what is said of the output holds.

    A second time r goes to the network only; the linear estimate is that of v at t, for the average velocity, too.
    local: whether MLPs are ConvSwiGLU
    """

    def __init__(self, cfg, local=False):
        super().__init__(cfg)
        self.local = local
        if local:
            for block in self.blocks:
                mlp = ConvSwiGLU(cfg.hidden_size, block.mlp.w3.in_features)
                mlp.w12, mlp.w3 = block.mlp.w12, block.mlp.w3       # as DiT has initialised them
                block.mlp = mlp

    def forward(self, z_t, z_lq, feat, t, r=None):
        """As `DiT.forward`."""
        if self.local:
            for block in self.blocks:
                block.mlp.grid = [side // self.cfg.patch_size for side in z_t.shape[-2:]]
        time = t[:, None, None, None]
        s2 = (1 - time) ** 2 + time**2
        d = z_t - (1 - time) * z_lq
        gain = ((1 - time) / s2).clamp(min=0.1)
        output = super().forward(gain * d, z_lq, feat, t, r)
        mean_v = ((2 * time - 1) * z_t - time * z_lq) / s2
        return mean_v - output / s2.sqrt()


@dataclass
class TinyVOSRConfig(VOSRConfig):
    """As VOSRConfig, for 128x128 pixels; what the tiny model has beside it comes last."""
    dit: DiTConfig = field(default_factory=lambda: DiTConfig(
        input_size=16, patch_size=1, in_channels=128, out_channels=64, hidden_size=256, depth=6, num_heads=4,
        z_dims=128, rope_rescale=False))
    vit: ViTConfig = field(default_factory=lambda: ViTConfig(img_size=112, embed_dim=128, depth=4, num_heads=2))
    vae: TinyVAEConfig | PixelVAEConfig = field(default_factory=TinyVAEConfig)
    vit_input: int = 112
    vit_layer: int | None = None
    guidance: float = 1.0
    temperature: float = 0.25
    color: str = "wavelet"
    tile: int = 128
    overlap: int = 32
    blind: bool = False         # no visual tokens: the paper's ablation
    local: bool = False         # convolutions in the transformer's MLPs, see ConvSwiGLU

    @classmethod
    def from_dict(cls, d):
        parts = {"dit": DiTConfig(**d["dit"]), "vit": ViTConfig(**d["vit"]), "vae": autoencoder_config(d["vae"])}
        return cls(**(d | parts))


# between the tiny model and the published ones, for one card: 59 million parameters on the same autoencoder, of which
# 5 million are the vision transformer's
SMALL = TinyVOSRConfig(
    dit=DiTConfig(input_size=32, patch_size=1, in_channels=128, out_channels=64, hidden_size=512, depth=12, num_heads=8,
                  z_dims=256, rope_rescale=False),
    vit=ViTConfig(img_size=224, embed_dim=256, depth=6, num_heads=4),
    vit_input=224, tile=256, overlap=64, local=True)


class TinyVOSR(VOSR):
    """VOSR with a vision transformer that learned beside the flow, since nobody has pretrained one so small."""

    Config = TinyVOSRConfig
    stablesr = True     # its wavelet brings back fewer blotches of JPEG

    def networks(self, cfg):
        return AUTOENCODERS[type(cfg.vae)](cfg.vae), ViT(cfg.vit), TinyDiT(cfg.dit, cfg.local)

    def tokens(self, x):
        """As `VOSR.tokens`; a blind model has one token of zeros."""
        if self.cfg.blind:
            return x.new_zeros(len(x), 1, self.cfg.vit.embed_dim)
        return super().tokens(x)

    def boxes(self, z, tile, overlap):
        """As `VOSR.boxes`; of digits and letters a tile is a cell, and cells do not overlap."""
        if isinstance(self.vae, PixelVAE):
            return tile_boxes(*z.shape[-2:], tile // self.vae.factor, 0)
        return super().boxes(z, tile, overlap)

    def enlarge(self, lq, size):
        """As degrade.py does, so by torch."""
        return F.interpolate(lq, size, mode="bicubic").clamp(0, 1)


# ---- the prior, a Stable Diffusion of 9.4 million parameters, and the two systems around it

# num_heads 0: no transformer at that level
UNET = UNetConfig(64, 64, widths=(96, 128, 192), num_heads=(0, 2, 3), layers_per_block=1, context_dim=64,
                  norm_groups=16)
PROMPT_TOKENS = 8       # of each of the two prompts that the prior learned: photos, and degraded images


def is_prior(name):
    """Whether a tensor is of the prior: of the UNet without adapters, of its prompts, or of the autoencoder around it.

    prior_tiny.safetensors lacks the autoencoder, which vosr_tiny.safetensors holds; see `read_foundation`.
    """
    return name.startswith(("unet.", "vae.", "prompts")) and "lora_" not in name


@dataclass
class TinyS3DiffConfig(S3DiffConfig):
    unet: UNetConfig = field(default_factory=lambda: replace(UNET))     # a copy: each config has its own
    vae: TinyVAEConfig | PixelVAEConfig = field(default_factory=lambda: TinyVAEConfig(residual=RESIDUAL))
    r_vae: int = 8
    vae_targets: str = "encoder"        # TinyVAE's one convolution
    denet_widths: tuple = (16, 16, 32, 32)
    prior: str = "tiny"
    t: int = 250                # at 999 errors of eps would count 14.6 times
    guidance: float = 1.1
    enlarge: str = "bicubic"
    tile: int = 1024
    tokens: int = PROMPT_TOKENS

    @classmethod
    def from_dict(cls, d):
        parts = {"unet": UNetConfig(**d["unet"]), "vae": autoencoder_config(d["vae"])}
        return cls(**(d | parts))


class TinyS3Diff(S3Diff):
    """S3Diff around the tiny prior: no text encoder, nothing is added to the LQ latent.

    So the two prompts are tensors of the model. Stage prior trains them; later they are fixed.
    """

    Config = TinyS3DiffConfig

    def __init__(self, cfg):
        super().__init__(cfg)
        self.register_buffer("prompts", torch.zeros(2, cfg.tokens, cfg.unet.context_dim))   # positive, negative

    def networks(self, cfg):
        vae = AUTOENCODERS[type(cfg.vae)](cfg.vae)
        return UNet(cfg.unet), DegradationEstimator(num_feats=cfg.denet_widths), vae

    def noise(self, z, generator=None):
        return torch.zeros_like(z)

    def describe(self, text):
        raise WeightError("this model never saw a text, so its prompts cannot be changed")


def load_prior(model, init=None, wanted=is_prior):
    """Load the tiny prior, around which a TinyS3Diff or a TinyGramSR learns; the rest of the model stays as it is.

    init: --out of train_s3diff.py, None = the embedded prior and degradation estimator
    wanted: function of a tensor's name -> whether to load it; by default the prior only (`is_prior`), others load the
    degradation estimator, too
    -> path of the file. Raises WeightError.
    """
    if init:
        path = Path(init, "model.safetensors")
        tensors = read_tensors(path)
    else:
        path = PRIOR
        estimator = {k: v for k, v in read_tensors(EMBEDDED["s3diff-tiny"]).items() if k.startswith("denet.")}
        tensors = read_foundation() | estimator
    tensors = {k: v for k, v in tensors.items() if wanted(k)}
    # The model has more than the file, adapters for one. So nothing is missed; but no tensor of the file is left over.
    may_miss = [k for k in model.state_dict() if k not in tensors]
    load_strictly(model, tensors, path, may_miss=may_miss)
    model.float()       # files have float16
    return path


def load_autoencoder(model):
    """Load the embedded autoencoder, which all tiny models share; adapters in it stay as they are."""
    model.vae.load_state_dict(TinyVOSR.from_pretrained("vosr-tiny").vae.state_dict(), strict=False)


@dataclass
class TinyGramSRConfig(GramSRConfig):
    unet: UNetConfig = field(default_factory=lambda: replace(UNET))
    vae: TinyVAEConfig | PixelVAEConfig = field(default_factory=lambda: TinyVAEConfig(residual=RESIDUAL))
    vit: DINOv3Config = field(default_factory=lambda: DINOv3Config(embed_dim=96, depth=3, num_heads=3))
    ranks: dict = field(default_factory=dict)
    tile: int = 1024
    prompt_tokens: int = PROMPT_TOKENS

    @classmethod
    def from_dict(cls, d):
        parts = {"unet": UNetConfig(**d["unet"]), "vae": autoencoder_config(d["vae"]), "vit": DINOv3Config(**d["vit"])}
        return cls(**(d | parts))


class TinyGramSR(GramSR):
    """GramSR around the tiny prior, whose two prompts are what CSD compares; its vision transformer learns, too."""

    Config = TinyGramSRConfig

    def __init__(self, cfg):
        super().__init__(cfg)
        self.register_buffer("prompts", torch.zeros(2, cfg.prompt_tokens, cfg.unet.context_dim))    # good, bad

    def networks(self, cfg):
        return UNet(cfg.unet), AUTOENCODERS[type(cfg.vae)](cfg.vae), DINOv3(cfg.vit)

    def csd_conditions(self, context):
        """What CSD compares: the prior's good and bad prompt for each image -> two of (B, 8, D)"""
        good, bad = self.prompts
        return good.expand(len(context), -1, -1), bad.expand(len(context), -1, -1)


# ---- the preset `letters`: digits and letters, which support/glyphs.py draws, in cells of 32 pixels

# 48 channels: the RGB of 4x4 pixels
LETTERS_UNET = UNetConfig(48, 48, widths=(64, 96, 128), num_heads=(0, 2, 2), layers_per_block=1, context_dim=64,
                          norm_groups=16)
LETTERS_VOSR = TinyVOSRConfig(
    dit=DiTConfig(input_size=8, patch_size=1, in_channels=96, out_channels=48, hidden_size=128, depth=4, num_heads=4,
                  z_dims=64, rope_rescale=False),
    vit=ViTConfig(img_size=56, embed_dim=64, depth=2, num_heads=2), vae=PixelVAEConfig(), vit_input=56, steps=16,
    temperature=1.0, color="none", tile=32, overlap=0, local=True)
LETTERS_S3DIFF = TinyS3DiffConfig(unet=LETTERS_UNET, vae=PixelVAEConfig())
LETTERS_GRAMSR = TinyGramSRConfig(unet=replace(LETTERS_UNET), vae=PixelVAEConfig(),
                                  vit=DINOv3Config(patch_size=8, embed_dim=64, depth=2, num_heads=2))
