"""Real-ESRGAN's degradation (2107.10833): makes low-quality (LQ) images of high-quality (HQ) ones, as training pairs.

    generator = torch.Generator().manual_seed(0)
    lq, lq_up = degrade(hq, RECIPES["vosr"], generator)

    hq (B, 3, H, W), RGB in [0, 1]; lq (B, 3, H/4, W/4); lq_up (B, 3, H, W), lq enlarged

An image from the internet has often been resized and saved more than once. So the paper degrades twice, its
second-order model (section 3.2), and adds the ringing of sharpened or compressed images by a sinc filter (section 3.3):

    first stage     blur, resize, noise, JPEG
    second stage    blur (sometimes), resize, noise
    at the end      JPEG, resize to LQ's size, sinc filter    or    resize to LQ's size, sinc filter, JPEG

A recipe says what may happen, a plan what does happen. `draw_plan` draws a plan from a recipe; a plan can be printed,
changed, or written by hand. `apply` does what the plan says: the same plan makes the same LQ image.

To add a degradation, say WebP: its ranges go into Recipe or Ranges, what was drawn into Plan or StagePlan, the draw
itself to the end of `draw_plan`, and the line that does it into `degrade_twice`. To add a kind of blur, say motion:
one more shape in `kernel_weights`, and its probability in the kernels of a recipe.

As a command it makes test sets, OUT_DIR/lq/*.png and OUT_DIR/hq/*.png:

    python degrade.py HR_DIR OUT_DIR --recipe vosr --seed 0

Left out, as no released setting uses them: sharpening, colour jitter, gray images.
"""

import argparse
import hashlib
import math
import random
import sys
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from models.support import imaging, many_kernels
from models.support.arguments import SEED, between, command, file_or_folder, folder
from models.support.files import PictureError, check_writable, find_pictures, printable
from models.support.pairs import write_pairs

# ---- recipes: what may happen

MODES = ("area", "bilinear", "bicubic")     # kinds of resize, each as likely as the others
KERNEL_SIZES = range(7, 22, 2)              # 7, 9, ... 21 pixels, each as likely as the others
REAL_ESRGAN_KERNELS = {                     # (shape, symmetry) of a blur kernel: its probability
    ("gaussian", "isotropic"): 0.45,
    ("gaussian", "anisotropic"): 0.25,
    ("generalized", "isotropic"): 0.12,
    ("generalized", "anisotropic"): 0.03,
    ("plateau", "isotropic"): 0.12,
    ("plateau", "anisotropic"): 0.03,
}


@dataclass(frozen=True)
class Ranges:
    """Says what one stage is drawn from. Pairs are (lowest, highest) of a uniform draw."""
    blur_probability: float
    blur_sigma: tuple           # width of the blur kernel, pixels
    up_probability: float       # the resize enlarges ...
    down_probability: float     # ... or shrinks ...
    keep_probability: float     # ... or does nothing; the three add up to 1
    scale: tuple                # the resize's factor per side: up draws from 1 to highest, down from lowest to 1
    gaussian_sigma: tuple       # deviation of Gaussian noise, levels of 255
    poisson_scale: tuple        # factor on Poisson noise
    jpeg_quality: tuple         # above 0, at most 100


@dataclass(frozen=True)
class Recipe:
    """Says what a plan is drawn from. The defaults are Real-ESRGAN's, which lacks what is called ours."""
    first: Ranges
    second: Ranges
    kernels: dict               # such as REAL_ESRGAN_KERNELS
    generalized_beta: tuple     # exponent of generalized Gaussian kernels
    plateau_beta: tuple         # exponent of plateau-shaped kernels
    sinc_probability: float = 0.1           # to have a sinc kernel instead of a blur kernel
    final_sinc_probability: float = 0.8     # to have the sinc filter at the end
    gaussian_probability: float = 0.5       # to have Gaussian noise; else it is Poisson noise
    gray_noise_probability: float = 0.4     # to have noise that is the same in red, green and blue
    # A batch of images is degraded at once. Noise strength, gray noise and JPEG quality are always drawn per image.
    # The branches are the other draws: whether to blur, the resizes, which noise, the order at the end. "batch": all
    # images take the same branches; "image": each is degraded by itself, so everything is drawn per image; a number:
    # so many images share them, which on a GPU is faster than one by one.
    # Where images share branches, kernels_per says whether each has blur kernels of its own, or the "batch" one.
    branches_per: str | int = "batch"
    kernels_per: str = "image"
    enlarge_modes: tuple = MODES            # for the resize from lq to lq_up
    eight_bit: bool = True                  # lq_up: enlarged, clamped and rounded to 8 bits; else clamped and enlarged
    keep_hq_probability: float = 0.0        # S3Diff: lq_up is hq itself, an image that needs no restoring
    exact_resize: bool = False              # ours: the first resize by size, so nothing shifts; see `first_resize`
    antialias: bool = False                 # ours: the second stage's resize, which shrinks the most, does not alias
    only_shrink_probability: float = 0.0    # ours: hq is shrunk, antialiased, and that is all


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

VOSR = Recipe(      # Real-ESRGAN's own numbers
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

WIDE = Recipe(      # ours: mostly one degradation, from none to much of it, to train degradation estimators
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

WEAK_RANGES = Ranges(
    blur_probability=0.5, blur_sigma=(0.2, 0.7),
    up_probability=0.3, down_probability=0.3, keep_probability=0.4, scale=(0.92, 1.08),
    gaussian_sigma=(0, 4), poisson_scale=(0.0, 0.15), jpeg_quality=(85, 100))
CLEAN = Recipe(     # ours: half of the images are only shrunk, the others weakly degraded, as good photos are
    first=WEAK_RANGES, second=WEAK_RANGES,
    kernels={("gaussian", "isotropic"): 1.0}, generalized_beta=(1, 1), plateau_beta=(1, 1),
    sinc_probability=0.0, final_sinc_probability=0.0, branches_per="image",
    exact_resize=True, antialias=True, only_shrink_probability=0.5)

LETTERS = replace(   # ours: S3Diff's for images of 32 pixels, of which it would leave too little to read
    S3DIFF,
    first=replace(S3DIFF.first, scale=(0.5, 1.5)),
    second=replace(S3DIFF.second, blur_probability=0.2, up_probability=0.1, down_probability=0.2, keep_probability=0.7,
                   scale=(0.8, 1.2)),
    final_sinc_probability=0.65, keep_hq_probability=0.0, exact_resize=True)

RECIPES = {"vosr": VOSR, "s3diff": S3DIFF, "gramsr": GRAMSR, "wide": WIDE, "clean": CLEAN, "letters": LETTERS}


# ---- plans: what does happen

@dataclass(frozen=True)
class Kernel:
    """Describes a blur kernel of size x size pixels; what its shape does not need may be left out."""
    shape: str              # "gaussian", "generalized", "plateau", "sinc", or "identity", which changes nothing
    size: int               # odd
    sigma_x: float = None   # widths along the kernel's two axes, pixels; isotropic: both are equal
    sigma_y: float = None
    theta: float = 0.0      # angle between the kernel's axes and the image's, radians
    beta: float = 1.0       # exponent of "generalized" and "plateau"
    cutoff: float = None    # for "sinc": the highest frequency that passes, radians per pixel


IDENTITY = Kernel("identity", 1)


@dataclass
class StagePlan:
    """Says what happens in one stage. Lists have one element per image."""
    blur: bool              # whether to blur at all
    kernels: list           # Kernels; a single one is for all images
    resize_scale: float     # per side, from HQ's size in the first stage and from LQ's in the second
    resize_mode: str        # one of MODES
    noise_type: str         # "gaussian" or "poisson"
    noise_strength: list    # sigma in levels of 255, or factor on Poisson noise
    noise_gray: list        # True: the same in red, green and blue
    jpeg_quality: list      # above 0, at most 100
    noise_seed: int = 0


@dataclass
class Plan:
    """Says all that happens to a batch of images."""
    first: StagePlan
    second: StagePlan
    sinc_kernels: list      # Kernels, "sinc" or "identity"; a single one is for all images
    jpeg_before_sinc: bool  # the second stage's JPEG: before the last resize and the sinc filter, or after them
    final_mode: str         # for the resize to LQ's size
    enlarge_mode: str       # for the resize from lq to lq_up
    eight_bit: bool         # these five: see Recipe
    keep_hq: bool = False
    exact_resize: bool = False
    antialias: bool = False
    only_shrink: bool = False
    device: torch.device = torch.device("cpu")      # where noise is drawn; on a GPU the same seed gives other noise


# A seed gives the same images as long as the draws below keep their order; new ones go to the end of `draw_plan`. Some
# are made although the plan will not use them, as kernels without a blur: so a decision does not shift what follows.

def draw_kernel(rng, recipe, sigma):
    """Draw a Kernel for one of the stages.  sigma: (lowest, highest), pixels"""
    kinds, probabilities = list(recipe.kernels.keys()), list(recipe.kernels.values())
    shape, symmetry = rng.choices(kinds, probabilities)[0]
    size = rng.choice(KERNEL_SIZES)
    if rng.random() < recipe.sinc_probability:
        lowest_cutoff = math.pi / 3 if size < 13 else math.pi / 5
        return Kernel("sinc", size, cutoff=rng.uniform(lowest_cutoff, math.pi))

    sigma_x = rng.uniform(*sigma)
    if symmetry == "isotropic":
        sigma_y, theta = sigma_x, 0.0
    else:
        sigma_y, theta = rng.uniform(*sigma), rng.uniform(-math.pi, math.pi)

    beta = 1.0
    beta_ranges = {"generalized": recipe.generalized_beta, "plateau": recipe.plateau_beta}
    if shape in beta_ranges:
        lowest, highest = beta_ranges[shape]
        if rng.random() < 0.5:
            beta = rng.uniform(lowest, 1)   # "plateau" starts at 1, so half of these kernels have exactly 1
        else:
            beta = rng.uniform(1, highest)
    return Kernel(shape, size, sigma_x, sigma_y, theta, beta)


def draw_stage(rng, recipe, ranges, n):
    """Draw a StagePlan for n images."""
    probabilities = [ranges.up_probability, ranges.down_probability, ranges.keep_probability]
    direction = rng.choices(["up", "down", "keep"], probabilities)[0]
    noise_type = "gaussian" if rng.random() < recipe.gaussian_probability else "poisson"
    strength = ranges.gaussian_sigma if noise_type == "gaussian" else ranges.poisson_scale
    has_blur = rng.random() < ranges.blur_probability
    n_kernels = n if recipe.kernels_per == "image" else 1
    kernels = [draw_kernel(rng, recipe, ranges.blur_sigma) for _ in range(n_kernels)]
    lowest, highest = ranges.scale
    scales = {"up": rng.uniform(1, highest), "down": rng.uniform(lowest, 1), "keep": 1.0}
    return StagePlan(
        blur=has_blur,
        kernels=kernels,
        resize_scale=scales[direction],
        resize_mode=rng.choice(MODES),
        noise_type=noise_type,
        noise_strength=[rng.uniform(*strength) for _ in range(n)],
        noise_gray=[rng.random() < recipe.gray_noise_probability for _ in range(n)],
        jpeg_quality=[rng.uniform(*ranges.jpeg_quality) for _ in range(n)],
        noise_seed=rng.getrandbits(63))


def draw_plan(recipe, n, generator):
    """Draw a Plan for n images, by one number of the generator.

    Noise will be drawn on the generator's device; `plan_for` sets a GPU instead where the images are on one.
    """
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
        antialias=recipe.antialias,
        only_shrink=rng.random() < recipe.only_shrink_probability,
        device=generator.device)


# ---- blur

def kernel_weights(kernel):
    """Compute the weights of a Kernel, sections 3.1 and 3.3 -> (size, size) float64, sum 1. Raises ValueError."""
    offset = torch.arange(kernel.size, dtype=torch.float64, device="cpu") - kernel.size // 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")    # how far below and right of the centre each weight is
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
    """Measure how far each weight is from the centre, along the kernel's axes, in sigmas, squared.

    In section 3.1 it is C^T Sigma^-1 C, where C is a position, no matrix.
    """
    cos, sin = math.cos(kernel.theta), math.sin(kernel.theta)
    along_x = (cos * x + sin * y) / kernel.sigma_x
    along_y = (cos * y - sin * x) / kernel.sigma_y
    return along_x**2 + along_y**2


def sinc(r, cutoff):
    """Make a low-pass filter with a sharp cutoff, which rings: J1(r)/r, the round form of sin(r)/r.

    r: distance of each weight from the centre, pixels; cutoff: radians per pixel -> like r
    """
    weights = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)
    limit = cutoff**2 / (4 * math.pi)   # at the centre, where the line above is 0 / 0
    return weights.masked_fill(r == 0, limit)


def stack_kernels(kernels):
    """Stack weights of Kernels, padded with zeros to the largest.  -> (n, size, size) float32. Raises ValueError."""
    if len(kernels) > many_kernels.FEW and many_kernels.know(kernels):
        return many_kernels.stack(kernels)      # fast: the same up to rounding
    size = max(kernel.size for kernel in kernels)
    padded = [F.pad(kernel_weights(kernel), [(size - kernel.size) // 2] * 4) for kernel in kernels]
    return torch.stack(padded).float()


def blur(x, kernels):
    """Filter each image, mirrored at its edges. The result may leave [0, 1], as sinc kernels have negative weights.

    x: (B, 3, H, W); kernels: (B or 1, size, size) -> like x
    """
    B, c, H, W = x.shape
    margin = kernels.shape[-1] // 2
    if min(H, W) > margin:
        padded = F.pad(x, [margin] * 4, mode="reflect")
    else:
        # official: fails on such small images; here not
        padded = imaging.mirror_pad(x, margin, margin, margin, margin)
    # one convolution for all images: each channel is a group of its own
    channels = padded.reshape(1, B * c, *padded.shape[2:])
    kernels = kernels.to(x, non_blocking=True).expand(B, -1, -1)
    weight = kernels.repeat_interleave(c, 0)[:, None]       # (B*c, 1, size, size)
    return F.conv2d(channels, weight, groups=B * c).view(B, c, H, W)


# ---- resize

def resize(x, mode, size=None, scale=None, antialias=False):
    """Resize to a size (height, width) or by a factor. The result of "bicubic" may leave [0, 1].

    x: (B, 3, H, W); mode: one of MODES; antialias: with a filter as wide as the shrinking, like Pillow
    """
    if mode == "area":      # the mean of all pixels that a new one covers, so it cannot alias
        return F.interpolate(x, size=size, scale_factor=scale, mode=mode)
    return F.interpolate(x, size=size, scale_factor=scale, mode=mode, align_corners=False, antialias=antialias)


def first_resize(x, plan):
    """Resize as the authors do it in the first stage or, with exact_resize, without their shift.

    They resize by a factor. The new size is rounded down, but bilinear and bicubic samples still lie exactly 1/scale
    apart, so the last ones do not reach the right and lower edge. The next resize stretches this cropped image to the
    full size, which moves all content right and down. Resized by size, the samples span the whole image.
    """
    first = plan.first
    if plan.exact_resize:
        return resize(x, first.resize_mode, size=scaled(x.shape[2:], first.resize_scale))
    return resize(x, first.resize_mode, scale=first.resize_scale)


def scaled(size, scale):
    """Multiply (height, width) by a factor, and round down to whole pixels."""
    return [max(1, int(side * scale)) for side in size]


# ---- noise

class NoiseSource:
    """Draws the random numbers of noise from a seed. Drawn on the CPU, they are the same for images on any device."""

    def __init__(self, seed, device="cpu"):
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def poisson(self, rate):
        return torch.poisson(rate.to(self.generator.device), generator=self.generator)


def gaussian_noise(x, gray, source):
    """Make Gaussian noise of sigma 1/255.

    x: (B, 3, H, W); gray: the same in all channels -> like x; if gray (H, W), which counts for all channels and images
    """
    # official: one (H, W) field serves all gray images of a batch; here too
    shape = x.shape[2:] if gray else x.shape
    return source.normal(shape).to(x) / 255


def poisson_noise(x, gray, source):
    """Make the noise of a camera that counts photons. It has mean 0, and is stronger in brighter places.

    The fewer photons a white pixel has, the stronger the noise. As in Real-ESRGAN's code, it has as many as the image
    has different 8-bit values, rounded up to a power of 2.
    x: (B, 3, H, W) in [0, 1]; gray: the same in all channels -> like x, if gray (B, 1, H, W)
    """
    if gray:
        luma = imaging.like(x, [0.2989, 0.587, 0.114]).view(3, 1, 1)
        x = (x * luma).sum(1, keepdim=True)
    x = imaging.round8(x)
    values = (x * 255).round().long().flatten(1)
    occurs = torch.zeros(len(x), 256, device=x.device).scatter_(1, values, 1.0)
    # official: 1 photon for an image of one value, which is very strong noise; here too
    photons = torch.exp2(torch.ceil(torch.log2(occurs.sum(1)))).view(-1, 1, 1, 1)
    return source.poisson(x * photons).to(x) / photons - x


NOISES = {"gaussian": gaussian_noise, "poisson": poisson_noise}


def unit_noise(x, noise_type, gray, source):
    """Make noise of strength 1, for some images gray and for others coloured. Raises ValueError.

    x: (B, 3, H, W) in [0, 1]; noise_type: one of NOISES; gray: (B,) bools; source: a NoiseSource -> like x
    """
    if noise_type not in NOISES:
        raise ValueError(f"unknown noise {noise_type!r}; choose from {', '.join(NOISES)}")
    noise = NOISES[noise_type]
    if not any(gray):
        return noise(x, False, source)
    gray_noise = noise(x, True, source)
    colour_noise = noise(x, False, source)
    is_gray = imaging.like(x, gray).view(-1, 1, 1, 1)
    return torch.where(is_gray, gray_noise, colour_noise)


def add_noise(x, noise_type, strength, gray, source):
    """Add noise and clamp.

    x: (B, 3, H, W); noise_type, gray, source: of `unit_noise`; strength: (B,), see StagePlan -> like x, in [0, 1]
    """
    strength = imaging.like(x, strength).view(-1, 1, 1, 1)
    return (x + strength * unit_noise(x, noise_type, gray, source)).clamp(0, 1)


# ---- JPEG, as computed by DiffJPEG (github.com/mlomnitz/DiffJPEG), which Real-ESRGAN uses: there is no file

cpu_tensor = partial(torch.tensor, device="cpu")
RGB_TO_YCBCR = cpu_tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
YCBCR_TO_RGB = cpu_tensor([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])
LUMA_STEPS = cpu_tensor([     # official: the transpose of the standard's; here too
    [16, 12, 14, 14, 18, 24, 49, 72], [11, 12, 13, 17, 22, 35, 64, 92], [10, 14, 16, 22, 37, 55, 78, 95],
    [16, 19, 24, 29, 56, 64, 87, 98], [24, 26, 40, 51, 68, 81, 103, 112], [40, 58, 57, 87, 109, 104, 121, 100],
    [51, 60, 69, 80, 103, 113, 120, 103], [61, 55, 56, 62, 77, 92, 101, 99]])
CHROMA_STEPS = cpu_tensor(99).repeat(8, 8)
CHROMA_STEPS[:4, :4] = cpu_tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]])
# the cosine transform of 8 pixels, (frequency, pixel); its transpose is its inverse
DCT = torch.cos(math.pi / 8 * torch.outer(cpu_tensor(range(8)), cpu_tensor(range(8)) + 0.5)) / 2
DCT[0] /= math.sqrt(2)


@cache
def jpeg_tables(device, dtype):
    """Send the five tables above to a device, once: the result is cached."""
    return [table.to(device, dtype) for table in (RGB_TO_YCBCR, YCBCR_TO_RGB, LUMA_STEPS, CHROMA_STEPS, DCT)]


def quantise(x, table, factor, dct):
    """Round the frequencies of each block of 8 x 8 pixels to multiples of table * factor: here JPEG loses detail.

    x: (B, c, H, W), H and W multiples of 8; table: (8, 8), for quality 50; factor: (B,); dct: (8, 8) -> like x

    The transform of a block X is dct X dct^T, and the way back is dct^T F dct. All blocks are transformed at once:
    first their columns, for which x is cut into bands of 8 rows, then their rows, for which bands are cut into blocks.
    """
    B, c, H, W = x.shape
    bands = dct @ x.reshape(B, c, H // 8, 8, W)             # columns of 8 pixels -> 8 vertical frequencies
    blocks = bands.view(B, c, H // 8, 8, W // 8, 8)         # (B, c, band, vertical frequency, block, pixel of a row)
    frequencies = blocks @ dct.T                            # rows of 8 pixels -> 8 horizontal frequencies

    steps = table * factor.view(B, 1, 1)                    # (B, 8, 8): vertical and horizontal frequency
    steps = steps.view(B, 1, 1, 8, 1, 8)                    # the same for all channels, bands and blocks
    frequencies = (frequencies / steps).round() * steps

    blocks = frequencies @ dct                              # the way back: rows,
    bands = blocks.view(B, c, H // 8, 8, W)
    return (dct.T @ bands).view(B, c, H, W)                 # then columns


def jpeg(x, quality):
    """Compress and decompress.  x: (B, 3, H, W) in [0, 1]; quality: (B,), in (0, 100] -> like x, not 8-bit"""
    H, W = x.shape[2:]
    to_ycbcr, to_rgb, luma_table, chroma_table, dct = jpeg_tables(x.device, x.dtype)
    quality = torch.as_tensor(quality, device="cpu").to(x, non_blocking=True)
    factor = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100
    # official: steps are neither rounded nor held in 1..255; here too. At quality 100 they are officially 0, so that
    # the division fails; here they are tiny.
    factor = factor.clamp(min=1e-5)

    # official: black padding, which darkens the last blocks; here too
    padded = F.pad(x * 255, (0, -W % 16, 0, -H % 16))
    ycbcr = (to_ycbcr @ padded.flatten(2)).view_as(padded)      # chroma around 0, not 128
    luma = quantise(ycbcr[:, :1] - 128, luma_table, factor, dct) + 128
    halved = F.avg_pool2d(ycbcr[:, 1:], 2)                      # 4:2:0, a chroma value for 2 x 2 pixels
    chroma = F.interpolate(quantise(halved, chroma_table, factor, dct), scale_factor=2)
    ycbcr = torch.cat([luma, chroma], dim=1)
    rgb = (to_rgb @ ycbcr.flatten(2)).view_as(padded).clamp(0, 255) / 255
    return rgb[..., :H, :W].contiguous()


# ---- the whole

def degrade_twice(plan, hq, scale, step, noise_source=None):
    """Degrade by the second-order model, section 3.2.  step(name, x) records x and returns it; the rest as in `apply`

    -> (B, 3, H/scale, W/scale), not clamped
    """
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

    # second stage: blur, resize to about LQ's size, noise
    if second.blur:
        x = step("blur", blur(x, stack_kernels(second.kernels)))
    size = scaled((H / scale, W / scale), second.resize_scale)
    x = step("resize", resize(x, second.resize_mode, size, antialias=plan.antialias))
    x = step("noise", noisy(x, second))

    # at the end: resize to LQ's size and sinc filter, with JPEG before or after
    lq_size = (H // scale, W // scale)
    if plan.jpeg_before_sinc:
        x = step("jpeg", jpeg(x, second.jpeg_quality))
        x = step("resize", resize(x, plan.final_mode, lq_size))
        x = step("blur", blur(x, stack_kernels(plan.sinc_kernels)))
    else:
        x = step("resize", resize(x, plan.final_mode, lq_size))
        x = step("blur", blur(x, stack_kernels(plan.sinc_kernels)))
        x = step("jpeg", jpeg(x.clamp(0, 1), second.jpeg_quality))
    return x


def apply(plan, hq, scale=4, noise_source=None, steps=None):
    """Degrade images as a plan says. Raises ValueError for an unknown kernel or noise.

    hq: (B, 3, H, W) in [0, 1]; scale: how many times smaller LQ is per side
    noise_source: draws all noise, None = a NoiseSource of each stage's seed; tests give the official draws by it
    steps: a list that receives (name, result) of every operation
    -> lq (B, 3, H/scale, W/scale) and lq_up (B, 3, H, W), both in [0, 1]
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
    # official: S3Diff clamps before it enlarges, the others after; here too
    if plan.eight_bit:
        lq_up = imaging.round8(step("resize", resize(x, plan.enlarge_mode, (H, W))))
    else:
        lq_up = step("resize", resize(lq, plan.enlarge_mode, (H, W))).clamp(0, 1)
    if plan.keep_hq:        # official: beside this lq_up, S3Diff's estimator sees the degraded lq; here too
        lq_up = hq
    return lq, lq_up


@torch.no_grad()
def degrade(hq, recipe, generator, scale=4):
    """Draw a plan and apply it.  hq: (B, 3, H, W) in [0, 1] -> lq (B, 3, H/scale, W/scale), lq_up (B, 3, H, W)"""
    together = {"batch": len(hq), "image": 1}.get(recipe.branches_per, recipe.branches_per)
    if len(hq) > together:
        pairs = [degrade(some, recipe, generator, scale) for some in hq.split(together)]
        lq, lq_up = zip(*pairs)
        return torch.cat(lq), torch.cat(lq_up)
    return apply(plan_for(hq, recipe, generator), hq, scale)


def plan_for(hq, recipe, generator):
    """Draw a Plan for images hq: (B, 3, H, W), whose noise is drawn where they are."""
    plan = draw_plan(recipe, len(hq), generator)
    if hq.is_cuda:
        plan.device = hq.device     # to draw noise on the CPU and send it takes longer than a training step
    return plan


# ---- how severe it was

@torch.no_grad()
def severity(plan, hq, lq):
    """Measure how blurred and how noisy a plan has made lq, which a degradation estimator learns to say. Ours.

    hq: (B, 3, H, W) in [0, 1]; lq: (B, 3, h, w), which `apply` made of it -> (B, 2) in [0, 1]: blur, noise

    The plan is known, so both can be measured: apply it again, with something left out.
    Noise: apply it without noise. The score is the standard deviation of the difference to lq, divided by 0.1.
    Blur: apply it to a texture, without noise and JPEG, and measure how much contrast is left. Shrinking alone takes
    some of it, too, which is no blur. So that counts as all of the contrast which is left if the texture is averaged
    over scale x scale pixels: shrinking without blur. The score is 0 if no more than that is lost, and 1 if all is.
    """
    B, scale = len(hq), hq.shape[2] // lq.shape[2]
    quiet = change_both_stages(plan, noise_strength=[0.0] * B)
    quiet_lq, _ = apply(quiet, hq, scale)
    noise_score = (lq - quiet_lq).std((1, 2, 3)) / 0.1

    # Random values of 16 x 16 pixels of lq, enlarged to hq's size: details as fine as lq can show. Finer ones would
    # alias when they are shrunk, and aliasing is contrast, but no sharpness.
    texture = torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(0), device="cpu")
    texture = texture.to(hq, non_blocking=True)
    texture = 0.5 + 0.1 * resize(texture, "bicubic", scale=scale)
    only_blur = change_both_stages(quiet, jpeg_quality=[100.0] * B)     # whose steps are so small that nothing is lost
    degraded, _ = apply(only_blur, texture, scale)
    contrast_left = degraded.std((1, 2, 3)) / F.avg_pool2d(texture, scale).std((1, 2, 3))
    blur_score = 1 - contrast_left
    return torch.stack([blur_score, noise_score], dim=1).clamp(0, 1)


def change_both_stages(plan, **changes):
    """Copy the plan, with these fields changed in both of its stages."""
    return replace(plan, first=replace(plan.first, **changes), second=replace(plan.second, **changes))


# ---- the command

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Degrade a folder of images to pairs, OUT_DIR/lq and OUT_DIR/hq.")
    parser.add_argument("hr_dir", type=file_or_folder, metavar="HR_DIR", help="high-quality images: a folder, or one")
    parser.add_argument("out_dir", type=folder, metavar="OUT_DIR", help="where lq/ and hq/ go")
    parser.add_argument("--recipe", choices=RECIPES, default="vosr", help="whose settings (default vosr)")
    parser.add_argument("--scale", type=between(1, 16, whole=True), default=4, help="lq is so much smaller (4)")
    parser.add_argument("--seed", type=SEED, default=0, help="the same seed gives the same bytes (default 0)")
    parser.add_argument("--skip-existing", action="store_true", help="keep pairs that are there: go on after a stop")
    return parser.parse_args(argv)


def pair(path, name, args):
    """Read an image and degrade it -> lq, hq (1, 3, H, W) in [0, 1]. Raises PictureError.

    name: of the results; it and --seed make the image's own seed, so its pair does not depend on other files
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


def main(argv=None):
    args = parse_args(argv)
    try:
        names = find_pictures(args.hr_dir, print)
        check_writable(args.out_dir)
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
