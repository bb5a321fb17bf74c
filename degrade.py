"""Make low-quality (LQ) images of high-quality (HQ) ones: Real-ESRGAN's degradation (Wang et al. 2021, 2107.10833).

    hq                                                        # (B, 3, H, W), RGB in [0, 1]
    generator = torch.Generator().manual_seed(0)
    lq, lq_up = degrade(hq, RECIPES["vosr"], generator)       # (B, 3, H/4, W/4), and enlarged again: (B, 3, H, W)

A photo is damaged twice, since one that was taken, saved, shared and saved again was. That is the paper's second-order
model (its section 3.2); a sinc filter near the end adds the ringing of sharpened or compressed images (section 3.3):

    first stage    blur, resize, noise, JPEG
    second stage   blur (perhaps), resize, noise
    at the end     JPEG, resize to the size of LQ, sinc    or    resize to the size of LQ, sinc, JPEG

A recipe says what may happen, a plan what does. `draw_plan` draws a plan from a recipe; it can be printed, changed, or
written by hand. `apply` does to images what a plan says, and draws nothing but the noise, whose seeds are in the plan.

To add a degradation (motion blur, WebP): its ranges go to Ranges or Recipe, what is drawn to StagePlan or Plan, the draw
to the end of `draw_stage` or `draw_plan`, the deed to `degrade_twice`. A new blur is one more shape in `kernel_weights`.

The command makes test sets, OUT_DIR/lq/*.png and OUT_DIR/hq/*.png:

    python degrade.py HR_DIR OUT_DIR --recipe vosr --seed 0

Left out, as no released setting uses them: sharpening, colour jitter, gray images.
"""

import argparse
import hashlib
import math
import random
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from models.support import imaging
from models.support.arguments import SEED, between, command, folder
from models.support.files import PictureError, find_pictures, printable
from models.support.pairs import write_pairs

# ---- recipes: what may happen
# Numbers in pairs are (lowest, highest) of a uniform draw.

MODES = ("area", "bilinear", "bicubic")     # of a resize, each as likely as the others
KERNEL_SIZES = range(7, 22, 2)              # pixels: 7, 9, ... 21, each as likely as the others
REAL_ESRGAN_KERNELS = {                     # probability of each kind of blur kernel
    ("gaussian", "isotropic"): 0.45,
    ("gaussian", "anisotropic"): 0.25,
    ("generalized", "isotropic"): 0.12,
    ("generalized", "anisotropic"): 0.03,
    ("plateau", "isotropic"): 0.12,
    ("plateau", "anisotropic"): 0.03,
}


@dataclass(frozen=True)
class Ranges:
    """What one stage is drawn from."""
    blur_probability: float
    blur_sigma: tuple           # width of the blur kernel, pixels
    up_probability: float       # that the resize enlarges,
    down_probability: float     # that it shrinks,
    keep_probability: float     # that it does nothing; the three add up to 1
    scale: tuple                # factor per side: shrinking draws from lowest to 1, enlarging from 1 to highest
    gaussian_sigma: tuple       # of Gaussian noise, in levels of 255
    poisson_scale: tuple        # factor on Poisson noise; 1 is the noise of 2^k photons, see `poisson_noise`
    jpeg_quality: tuple         # 0 to 100


@dataclass(frozen=True)
class Recipe:
    """What plans are drawn from. Fields with a default are equal in all three systems, or differ in one of them."""
    first: Ranges
    second: Ranges
    kernels: dict                               # {(shape, symmetry): probability}, as REAL_ESRGAN_KERNELS
    generalized_beta: tuple                     # exponent of generalized Gaussian kernels
    plateau_beta: tuple                         # exponent of plateau-shaped kernels
    sinc_probability: float = 0.1               # that a sinc kernel takes the place of a blur kernel
    final_sinc_probability: float = 0.8         # that the sinc filter at the end is there
    gaussian_probability: float = 0.5           # that noise is Gaussian; else it is Poisson
    gray_noise_probability: float = 0.4         # that noise is alike in red, green and blue
    kernels_per: str = "image"                  # "image": each has kernels of its own; "batch": all share them
    branches_per: str = "batch"                 # "image": each has a plan of its own; "batch": all share one, and differ
                                                # only in kernels, strength and colour of noise, and JPEG quality
    enlarge_modes: tuple = MODES                # how lq_up is made of lq
    eight_bit: bool = True                      # lq_up is rounded to 8 bits, as in a file
    keep_hq_probability: float = 0.0            # that lq_up is hq itself
    exact_resize: bool = False                  # ours: the first resize by size, so nothing shifts; see `first_resize`
    only_shrink_probability: float = 0.0        # ours: that hq is shrunk with antialiasing, and nothing else


S3DIFF = Recipe(
    first=Ranges(
        blur_probability=1.0, blur_sigma=(0.2, 1.5),
        up_probability=0.2, down_probability=0.7, keep_probability=0.1, scale=(0.3, 1.5),
        gaussian_sigma=(1, 15), poisson_scale=(0.05, 2.0), jpeg_quality=(60, 95)),
    second=Ranges(
        blur_probability=0.5, blur_sigma=(0.2, 1.0),
        up_probability=0.3, down_probability=0.4, keep_probability=0.3, scale=(0.6, 1.2),
        gaussian_sigma=(1, 12), poisson_scale=(0.05, 1.0), jpeg_quality=(60, 100)),
    kernels=REAL_ESRGAN_KERNELS, generalized_beta=(0.5, 2.0), plateau_beta=(1, 1.5),
    enlarge_modes=("bicubic",), eight_bit=False, keep_hq_probability=0.01)

GRAMSR = Recipe(
    first=Ranges(
        blur_probability=1.0, blur_sigma=(0.2, 3.0),
        up_probability=0.2, down_probability=0.7, keep_probability=0.1, scale=(0.3, 1.5),
        gaussian_sigma=(1, 15), poisson_scale=(0.05, 2.0), jpeg_quality=(60, 95)),
    second=Ranges(
        blur_probability=0.5, blur_sigma=(0.2, 1.5),
        up_probability=0.3, down_probability=0.4, keep_probability=0.3, scale=(0.6, 1.2),
        gaussian_sigma=(1, 12), poisson_scale=(0.05, 1.0), jpeg_quality=(60, 100)),
    kernels=REAL_ESRGAN_KERNELS, generalized_beta=(0.5, 4.0), plateau_beta=(1, 2),
    branches_per="image")

VOSR = Recipe(              # these are Real-ESRGAN's own numbers
    first=Ranges(
        blur_probability=1.0, blur_sigma=(0.2, 3.0),
        up_probability=0.2, down_probability=0.7, keep_probability=0.1, scale=(0.15, 1.5),
        gaussian_sigma=(1, 30), poisson_scale=(0.05, 3.0), jpeg_quality=(30, 95)),
    second=Ranges(
        blur_probability=0.8, blur_sigma=(0.2, 1.5),
        up_probability=0.3, down_probability=0.4, keep_probability=0.3, scale=(0.3, 1.2),
        gaussian_sigma=(1, 25), poisson_scale=(0.05, 2.5), jpeg_quality=(30, 95)),
    kernels=REAL_ESRGAN_KERNELS, generalized_beta=(0.5, 4.0), plateau_beta=(1, 2),
    kernels_per="batch")

WIDE = Recipe(              # ours: one degradation prevails, from none to much; a degradation estimator learns from it
    first=Ranges(
        blur_probability=1.0, blur_sigma=(0.2, 8.0),
        up_probability=0.1, down_probability=0.2, keep_probability=0.7, scale=(0.5, 1.5),
        gaussian_sigma=(0, 60), poisson_scale=(0.0, 5.0), jpeg_quality=(70, 100)),
    second=Ranges(
        blur_probability=0.2, blur_sigma=(0.2, 2.0),
        up_probability=0.1, down_probability=0.2, keep_probability=0.7, scale=(0.7, 1.2),
        gaussian_sigma=(0, 15), poisson_scale=(0.0, 1.0), jpeg_quality=(80, 100)),
    kernels=REAL_ESRGAN_KERNELS, generalized_beta=(0.5, 4.0), plateau_beta=(1, 2),
    branches_per="image")

WEAK = Ranges(
    blur_probability=0.5, blur_sigma=(0.2, 0.7),
    up_probability=0.3, down_probability=0.3, keep_probability=0.4, scale=(0.92, 1.08),
    gaussian_sigma=(0, 4), poisson_scale=(0.0, 0.15), jpeg_quality=(85, 100))
CLEAN = Recipe(             # ours: half of the images only shrunk, half weakly degraded: what good small images are like
    first=WEAK, second=WEAK,
    kernels={("gaussian", "isotropic"): 1.0}, generalized_beta=(1, 1), plateau_beta=(1, 1),
    sinc_probability=0.0, final_sinc_probability=0.0,
    branches_per="image", exact_resize=True, only_shrink_probability=0.5)

RECIPES = {"vosr": VOSR, "s3diff": S3DIFF, "gramsr": GRAMSR, "wide": WIDE, "clean": CLEAN}


# ---- plans: what does happen

@dataclass(frozen=True)
class Kernel:
    """A blur kernel of size x size pixels. What its shape does not need may be left out."""
    shape: str                  # "gaussian", "generalized", "plateau", "sinc" or "identity", which changes nothing
    size: int                   # odd
    sigma_x: float = None       # widths along its two axes, pixels; equal ones: isotropic
    sigma_y: float = None
    theta: float = 0.0          # by how much the axes are turned, radians
    beta: float = 1.0           # exponent of "generalized" and "plateau"
    cutoff: float = None        # of "sinc": frequencies above it are removed; radians per pixel, at most pi


IDENTITY = Kernel("identity", 1)


@dataclass
class StagePlan:
    """One stage: blur, resize, noise, JPEG. Lists have an element for each image."""
    blur: bool                  # whether there is one
    kernels: list               # of Kernel; a single one serves all images
    resize_scale: float         # factor per side: of HQ's size in the first stage, of LQ's in the second
    resize_mode: str            # one of MODES
    noise_type: str             # "gaussian" or "poisson"
    noise_strength: list        # sigma in levels of 255, or factor on Poisson noise
    noise_gray: list            # True: alike in red, green and blue
    jpeg_quality: list
    noise_seed: int = 0


@dataclass
class Plan:
    """All that `apply` does to a batch of images."""
    first: StagePlan
    second: StagePlan
    sinc_kernels: list          # of Kernel, "sinc" or "identity"; a single one serves all images
    jpeg_before_sinc: bool      # JPEG of the second stage before the last resize and sinc, else after them
    final_mode: str             # of the resize to the size of LQ
    enlarge_mode: str           # of the resize that makes lq_up of lq
    eight_bit: bool             # this and the rest as in Recipe
    keep_hq: bool = False
    exact_resize: bool = False
    only_shrink: bool = False
    device: str = "cpu"         # on which noise is drawn; another one gives another noise


# The draws below come in a fixed order, all of them in any case: so a seed always means the same images. New draws go to
# the end of `draw_plan`.

def draw_kernel(rng, recipe, sigma):
    """A Kernel of a stage.  sigma: (lowest, highest), pixels"""
    kinds, probabilities = list(recipe.kernels), list(recipe.kernels.values())
    shape, symmetry = rng.choices(kinds, probabilities)[0]
    size = rng.choice(KERNEL_SIZES)
    if rng.random() < recipe.sinc_probability:
        lowest = math.pi / 3 if size < 13 else math.pi / 5
        return Kernel("sinc", size, cutoff=rng.uniform(lowest, math.pi))

    sigma_x = sigma_y = rng.uniform(*sigma)
    theta = 0.0
    if symmetry == "anisotropic":
        sigma_y = rng.uniform(*sigma)
        theta = rng.uniform(-math.pi, math.pi)

    beta = 1.0
    if shape != "gaussian":
        lowest, highest = recipe.generalized_beta if shape == "generalized" else recipe.plateau_beta
        if rng.random() < 0.5:
            beta = rng.uniform(lowest, 1)       # plateau: from 1 to 1, so half of these kernels have exactly 1
        else:
            beta = rng.uniform(1, highest)
    return Kernel(shape, size, sigma_x, sigma_y, theta, beta)


def draw_stage(rng, recipe, ranges, n):
    """A StagePlan for n images."""
    direction_odds = ranges.up_probability, ranges.down_probability, ranges.keep_probability
    direction = rng.choices(("up", "down", "keep"), direction_odds)[0]
    noise_type = "gaussian" if rng.random() < recipe.gaussian_probability else "poisson"
    strength = ranges.gaussian_sigma if noise_type == "gaussian" else ranges.poisson_scale
    blur = rng.random() < ranges.blur_probability
    n_kernels = n if recipe.kernels_per == "image" else 1
    kernels = [draw_kernel(rng, recipe, ranges.blur_sigma) for _ in range(n_kernels)]
    lowest, highest = ranges.scale
    scales = {"up": rng.uniform(1, highest), "down": rng.uniform(lowest, 1), "keep": 1.0}
    return StagePlan(
        blur=blur,
        kernels=kernels,
        resize_scale=scales[direction],
        resize_mode=rng.choice(MODES),
        noise_type=noise_type,
        noise_strength=[rng.uniform(*strength) for _ in range(n)],
        noise_gray=[rng.random() < recipe.gray_noise_probability for _ in range(n)],
        jpeg_quality=[rng.uniform(*ranges.jpeg_quality) for _ in range(n)],
        noise_seed=rng.getrandbits(63))


def draw_plan(recipe, n, generator):
    """A Plan for n images. It takes one number of the generator, on whose device noise will be drawn."""
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item()
    rng = random.Random(seed)
    first = draw_stage(rng, recipe, recipe.first, n)
    second = draw_stage(rng, recipe, recipe.second, n)
    sincs = [Kernel("sinc", rng.choice(KERNEL_SIZES), cutoff=rng.uniform(math.pi / 3, math.pi)) for _ in first.kernels]
    return Plan(
        first=first,
        second=second,
        sinc_kernels=[sinc if rng.random() < recipe.final_sinc_probability else IDENTITY for sinc in sincs],
        jpeg_before_sinc=rng.random() >= 0.5,
        final_mode=rng.choice(MODES),
        enlarge_mode=rng.choice(recipe.enlarge_modes),
        eight_bit=recipe.eight_bit,
        keep_hq=rng.random() < recipe.keep_hq_probability,
        exact_resize=recipe.exact_resize,
        only_shrink=rng.random() < recipe.only_shrink_probability,
        device=generator.device)


# ---- blur

def kernel_weights(kernel):
    """What a Kernel is made of (section 3.1, sinc: 3.3) -> (size, size) float64 that adds up to 1. Raises ValueError."""
    offset = torch.arange(kernel.size, dtype=torch.float64) - kernel.size // 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")        # rows, columns
    if kernel.shape == "identity":
        weights = ((x == 0) & (y == 0)).double()
    elif kernel.shape == "sinc":
        weights = sinc(torch.hypot(x, y), kernel.cutoff)
    elif kernel.shape == "gaussian":
        weights = torch.exp(-0.5 * squared_distance(kernel, x, y))
    elif kernel.shape == "generalized":
        weights = torch.exp(-0.5 * squared_distance(kernel, x, y) ** kernel.beta)
    elif kernel.shape == "plateau":
        weights = 1 / (1 + squared_distance(kernel, x, y) ** kernel.beta)
    else:
        raise ValueError(f"unknown blur kernel {kernel.shape!r}; "
                         "choose from gaussian, generalized, plateau, sinc, identity")
    return weights / weights.sum()


def squared_distance(kernel, x, y):
    """Squared distance from the centre, counted in sigmas along the kernel's own axes."""
    cos, sin = math.cos(kernel.theta), math.sin(kernel.theta)
    along_x = (cos * x + sin * y) / kernel.sigma_x
    along_y = (cos * y - sin * x) / kernel.sigma_y
    return along_x**2 + along_y**2


def sinc(r, cutoff):
    """The round low-pass filter, cut off sharply: this rings.  r: distance from the centre, pixels"""
    weights = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)
    limit = cutoff**2 / (4 * math.pi)       # at the centre the line above is 0 / 0
    return weights.masked_fill(r == 0, limit)


def stack_kernels(kernels):
    """Kernels -> (n, size, size) float32, padded with zeros to the size of the largest. Raises ValueError."""
    size = max(kernel.size for kernel in kernels)
    padded = [F.pad(kernel_weights(kernel), [(size - kernel.size) // 2] * 4) for kernel in kernels]
    return torch.stack(padded).float()


def blur(x, kernels):
    """Filter each image with its kernel, mirrored at the edges; not clamped: sinc kernels overshoot.

    x: (B, 3, H, W); kernels: (B or 1, size, size), not flipped -> like x
    """
    B, C, H, W = x.shape
    margin = kernels.shape[-1] // 2
    if min(H, W) > margin:
        padded = F.pad(x, [margin] * 4, mode="reflect")
    else:       # official: fails on such small images
        padded = imaging.mirror_pad(x, margin, margin, margin, margin)
    # each channel of each image is a group of its own, which has its own kernel
    channels = padded.reshape(1, B * C, *padded.shape[2:])
    weight = kernels.to(x).expand(B, -1, -1).repeat_interleave(C, 0)[:, None]       # (B*C, 1, size, size)
    return F.conv2d(channels, weight, groups=B * C).view(B, C, H, W)


# ---- resize

def resize(x, mode, size=None, scale=None, antialias=False):
    """Resize to a size (height, width), or by a factor; bicubic is not clamped and overshoots.  x: (B, 3, H, W)"""
    if mode == "area":          # averages all pixels in any case
        return F.interpolate(x, size=size, scale_factor=scale, mode=mode)
    return F.interpolate(x, size=size, scale_factor=scale, mode=mode, align_corners=False, antialias=antialias)


def first_resize(x, plan):
    """The resize of the first stage.

    The authors resize by a factor. PyTorch then rounds the size down, but takes its samples in steps of exactly 1 / scale
    (bilinear, bicubic), so that less than a pixel on the right and below is cut off. The next resize stretches what is
    left over the whole size: content has moved right and down. By size, samples span the whole image and nothing moves.
    """
    scale, mode = plan.first.resize_scale, plan.first.resize_mode
    if plan.exact_resize:
        return resize(x, mode, size=scaled(x.shape[2:], scale))
    return resize(x, mode, scale=scale)


def scaled(size, scale):
    """(height, width) times a factor, rounded down to whole pixels."""
    return [max(1, int(side * scale)) for side in size]


# ---- noise

class NoiseSource:
    """Random numbers from a seed: the same for images on any device, if they are drawn on the CPU."""
    def __init__(self, seed, device="cpu"):
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def poisson(self, rate):
        return torch.poisson(rate.to(self.generator.device), generator=self.generator)


def gaussian_noise(x, gray, source):
    """Gaussian noise of sigma 1/255 for images x (B, 3, H, W); gray: alike in all channels -> like x, or (H, W)"""
    # official: one (H, W) field serves all gray images of a batch
    shape = x.shape[2:] if gray else x.shape
    return source.normal(shape).to(x) / 255


def poisson_noise(x, gray, source):
    """Noise of counted photons, the stronger the brighter; mean 0.  As `gaussian_noise` -> like x, or (B, 1, H, W)"""
    if gray:
        luma = x.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)
        x = (x * luma).sum(1, keepdim=True)
    x = imaging.round8(x)
    # white is as many photons as the image has different 8-bit values, rounded up to a power of 2
    values = (x * 255).round().long().flatten(1)
    occurs = torch.zeros(len(x), 256, device=x.device).scatter_(1, values, 1.0)
    photons = torch.exp2(torch.ceil(torch.log2(occurs.sum(1)))).view(-1, 1, 1, 1)
    # official: 1 photon for an image of one value: strong noise
    return source.poisson(x * photons).to(x) / photons - x


def unit_noise(x, noise_type, gray, source):
    """Noise for images x (B, 3, H, W) in [0, 1], of sigma 1/255, or of Poisson factor 1.

    noise_type: "gaussian" or "poisson"; gray: (B,) bools -> like x. Raises ValueError.
    """
    if noise_type == "gaussian":
        noise = gaussian_noise
    elif noise_type == "poisson":
        noise = poisson_noise
    else:
        raise ValueError(f"unknown noise {noise_type!r}; choose from gaussian, poisson")
    if not any(gray):
        return noise(x, False, source)
    gray_noise = noise(x, True, source)
    colour_noise = noise(x, False, source)
    gray = torch.tensor(gray, device=x.device).view(-1, 1, 1, 1)
    return torch.where(gray, gray_noise, colour_noise)


def add_noise(x, noise_type, strength, gray, source):
    """x: (B, 3, H, W), clamped only afterwards; strength: (B,) sigmas in levels of 255, or Poisson factors -> in [0, 1]"""
    noise = unit_noise(x, noise_type, gray, source)
    strength = x.new_tensor(strength).view(-1, 1, 1, 1)
    return (x + strength * noise).clamp(0, 1)


# ---- JPEG without the file: what DiffJPEG (github.com/mlomnitz/DiffJPEG) computes, as Real-ESRGAN uses it

RGB_TO_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
YCBCR_TO_RGB = torch.tensor([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])
LUMA_STEPS = torch.tensor([     # official: the transpose of the standard's table
    [16, 12, 14, 14, 18, 24, 49, 72], [11, 12, 13, 17, 22, 35, 64, 92], [10, 14, 16, 22, 37, 55, 78, 95],
    [16, 19, 24, 29, 56, 64, 87, 98], [24, 26, 40, 51, 68, 81, 103, 112], [40, 58, 57, 87, 109, 104, 121, 100],
    [51, 60, 69, 80, 103, 113, 120, 103], [61, 55, 56, 62, 77, 92, 101, 99]])
CHROMA_STEPS = torch.full((8, 8), 99)
CHROMA_STEPS[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]])
# the cosine transform of 8 pixels as a matrix, (frequency, pixel); its transpose is its inverse
DCT = torch.cos(math.pi / 8 * torch.outer(torch.arange(8.0), torch.arange(8) + 0.5)) / 2
DCT[0] /= math.sqrt(2)


@cache
def jpeg_tables(device, dtype):
    """The constants above on a device; cached, so that each is sent there once."""
    return [table.to(device, dtype) for table in (RGB_TO_YCBCR, YCBCR_TO_RGB, LUMA_STEPS, CHROMA_STEPS, DCT)]


def quantise(x, steps, factor, dct):
    """Round the frequencies of each block of 8 x 8 pixels to multiples of steps * factor: this is what JPEG loses.

    x: (B, C, H, W), sides are multiples of 8; steps: (8, 8) for quality 50; factor: (B,); dct: (8, 8) -> like x
    """
    B, C, H, W = x.shape
    step = steps[:, None] * factor.view(B, 1, 1, 1, 1, 1)                           # (B, 1, 1, 8, 1, 8)
    # rows of blocks are transformed first, then columns of blocks
    f = dct @ x.reshape(B, C, H // 8, 8, W)
    f = f.view(B, C, H // 8, 8, W // 8, 8) @ dct.T
    f = (f / step).round() * step
    x = (f @ dct).view(B, C, H // 8, 8, W)
    return (dct.T @ x).view(B, C, H, W)


def jpeg(x, quality):
    """Compress and decompress.  x: (B, 3, H, W) in [0, 1]; quality: (B,), real, 0 < q <= 100 -> in [0, 1], not 8-bit"""
    H, W = x.shape[2:]
    to_ycbcr, to_rgb, luma_steps, chroma_steps, dct = jpeg_tables(x.device, x.dtype)
    quality = torch.as_tensor(quality, device=x.device).to(x)
    factor = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100     # on the steps
    # official: steps are neither rounded nor held in 1..255; at quality 100 they vanish and the division fails
    factor = factor.clamp(min=1e-5)

    # official: black padding, which darkens the last blocks
    x = F.pad(x * 255, (0, -W % 16, 0, -H % 16))
    ycbcr = (to_ycbcr @ x.flatten(2)).view_as(x)
    luma = quantise(ycbcr[:, :1] - 128, luma_steps, factor, dct) + 128
    halved = F.avg_pool2d(ycbcr[:, 1:], 2)          # 4:2:0, colour has half the size; the matrix centres it at 0
    chroma = F.interpolate(quantise(halved, chroma_steps, factor, dct), scale_factor=2)
    ycbcr = torch.cat([luma, chroma], dim=1)
    rgb = (to_rgb @ ycbcr.flatten(2)).view_as(x).clamp(0, 255) / 255
    return rgb[..., :H, :W].contiguous()


# ---- the whole

def degrade_twice(plan, hq, scale, step, noise_source=None):
    """The second-order model.  step: takes the name and the result of each operation -> (B, 3, H/scale, W/scale)"""
    H, W = hq.shape[2:]
    first, second = plan.first, plan.second

    def noisy(x, stage):
        source = noise_source or NoiseSource(stage.noise_seed, plan.device)
        return add_noise(x, stage.noise_type, stage.noise_strength, stage.noise_gray, source)

    # first stage: blur, resize, noise, JPEG
    x = hq
    if first.blur:
        x = step("blur", blur(x, stack_kernels(first.kernels)))
    x = step("resize", first_resize(x, plan))
    x = step("noise", noisy(x, first))
    x = step("jpeg", jpeg(x, first.jpeg_quality))

    # second stage: blur, resize to about the size of LQ, noise
    if second.blur:
        x = step("blur", blur(x, stack_kernels(second.kernels)))
    x = step("resize", resize(x, second.resize_mode, scaled((H / scale, W / scale), second.resize_scale)))
    x = step("noise", noisy(x, second))

    # at the end: resize to the size of LQ and sinc filter, with the second stage's JPEG before or after them
    if plan.jpeg_before_sinc:
        x = step("jpeg", jpeg(x, second.jpeg_quality))
        x = step("resize", resize(x, plan.final_mode, (H // scale, W // scale)))
        x = step("blur", blur(x, stack_kernels(plan.sinc_kernels)))
    else:
        x = step("resize", resize(x, plan.final_mode, (H // scale, W // scale)))
        x = step("blur", blur(x, stack_kernels(plan.sinc_kernels)))
        x = step("jpeg", jpeg(x.clamp(0, 1), second.jpeg_quality))
    return x


def apply(plan, hq, scale=4, noise_source=None, steps=None):
    """Degrade images as a plan says.

    hq: (B, 3, H, W) in [0, 1]; scale: LQ is so much smaller per side; noise_source: a NoiseSource, None: of the plan's
    seeds; steps: a list to which (name, image) of each operation is added -> lq (B, 3, H/scale, W/scale) in [0, 1], and
    lq_up (B, 3, H, W) in [0, 1], which is lq enlarged. Raises ValueError for unknown kernels and noise.
    """
    H, W = hq.shape[2:]

    def step(name, x):
        if steps is not None:
            steps.append((name, x))
        return x

    if plan.only_shrink:
        x = step("resize", resize(hq, plan.final_mode, (H // scale, W // scale), antialias=True))
    else:
        x = degrade_twice(plan, hq, scale, step, noise_source)

    lq = x.clamp(0, 1)
    # official: S3Diff clamps before it enlarges, the others after
    if plan.eight_bit:
        lq_up = imaging.round8(step("resize", resize(x, plan.enlarge_mode, (H, W))))
    else:
        lq_up = step("resize", resize(lq, plan.enlarge_mode, (H, W))).clamp(0, 1)
    if plan.keep_hq:        # official: beside this lq_up, S3Diff's estimator sees the degraded lq
        lq_up = hq
    return lq, lq_up


@torch.no_grad()
def degrade(hq, recipe, generator, scale=4):
    """Draw a plan and apply it.  hq: (B, 3, H, W) in [0, 1] -> lq (B, 3, H/scale, W/scale), lq_up (B, 3, H, W)"""
    if recipe.branches_per == "image" and len(hq) > 1:
        pairs = [degrade(one, recipe, generator, scale) for one in hq.split(1)]
        lq, lq_up = zip(*pairs)
        return torch.cat(lq), torch.cat(lq_up)
    plan = draw_plan(recipe, len(hq), generator)
    if hq.is_cuda:
        plan.device = hq.device     # noise that is drawn on the CPU and sent takes longer than a training step
    return apply(plan, hq, scale)


# ---- how severe it was

@torch.no_grad()
def severity(plan, hq, lq):
    """How blurred and how noisy lq is, which `apply` made of hq: what a degradation estimator learns to see. Ours.

    The plan is known, so no network is needed: it is applied again with something left out.
    Noise: without noise, lq would have been another image. The score is the deviation between both, over 0.1.
    Blur: random texture, as fine as LQ can show it, goes through the plan without noise and JPEG. Blur takes contrast
    from it, and so does shrinking. The score is the part of its contrast that blur takes: 0 where as much is left as
    after averaging scale x scale pixels, 1 where nothing is left.

    hq: (B, 3, H, W) in [0, 1]; lq: (B, 3, h, w) -> (B, 2) in [0, 1]: blur, noise
    """
    B, scale = len(hq), hq.shape[2] // lq.shape[2]
    no_noise = [0.0] * B
    plan = replace(plan, first=replace(plan.first, noise_strength=no_noise),
                   second=replace(plan.second, noise_strength=no_noise))
    lq_without_noise, _ = apply(plan, hq, scale)
    noise = (lq - lq_without_noise).std((1, 2, 3)) / 0.1

    no_loss = [100.0] * B
    plan = replace(plan, first=replace(plan.first, jpeg_quality=no_loss),
                   second=replace(plan.second, jpeg_quality=no_loss))
    texture = torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(hq)
    texture = 0.5 + 0.1 * resize(texture, "bicubic", scale=scale)       # a finer one would alias, which is not blur
    lq_texture, _ = apply(plan, texture, scale)
    contrast = lq_texture.std((1, 2, 3)) / F.avg_pool2d(texture, scale).std((1, 2, 3))
    blur = 1 - contrast
    return torch.stack([blur, noise], dim=1).clamp(0, 1)


# ---- the command

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Degrade a folder of images to pairs, OUT_DIR/lq and OUT_DIR/hq.")
    parser.add_argument("hr_dir", type=Path, metavar="HR_DIR", help="high-quality images: a folder, or one")
    parser.add_argument("out_dir", type=folder, metavar="OUT_DIR", help="where lq/ and hq/ go")
    parser.add_argument("--recipe", choices=RECIPES, default="vosr", help="whose settings (default vosr)")
    parser.add_argument("--scale", type=between(1, 16, whole=True), default=4, help="lq is so much smaller (4)")
    parser.add_argument("--seed", type=SEED, default=0, help="the same seed gives the same bytes (default 0)")
    parser.add_argument("--skip-existing", action="store_true", help="keep pairs that are there: go on after a stop")
    return parser.parse_args(argv)


def pair(path, name, args):
    """Read an image and degrade it -> lq, hq (1, 3, H, W) in [0, 1]. Raises PictureError.

    name: that of the results, from which with --seed the image's own seed is made, so that other files do not matter
    """
    scale = args.scale
    hq, _ = imaging.read_picture(path, note=tqdm.write)
    H, W = hq.shape[2:]
    if min(H, W) < 8 * scale:
        raise PictureError(f"{path}: {W} x {H} pixels are too few, both sides need {8 * scale}; remove or replace it")
    hq = hq[..., : H // scale * scale, : W // scale * scale]
    digest = hashlib.sha256(f"{args.seed} {name.as_posix()}".encode(errors="surrogateescape")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    lq, _ = degrade(hq, RECIPES[args.recipe], generator, scale)
    return lq, hq


def main():
    args = parse_args()
    try:
        names = find_pictures(args.hr_dir, print)
    except PictureError as error:
        sys.exit(f"degrade.py: {error}")
    if args.hr_dir.resolve() in (args.out_dir / "lq").resolve().parents:
        sys.exit(printable(f"degrade.py: {args.out_dir}: lies inside {args.hr_dir}, so the next run would degrade it; "
                           "choose a folder outside"))
    status = write_pairs("degrade.py", names, args.out_dir, args.skip_existing,
                         lambda path, name: pair(path, name, args))
    sys.exit(status)


if __name__ == "__main__":
    command(main)
