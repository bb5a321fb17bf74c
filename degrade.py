"""Real-ESRGAN's second-order degradation (2107.10833), as S3Diff, GramSR and VOSR train with it.

    lq, lq_up = degrade(hq, VOSR, torch.Generator().manual_seed(0))

A clean picture is blurred, resized, made noisy and JPEG-compressed, twice, with a sinc filter (ringing) near the end.
`draw_plan` draws every choice into a plan that can be printed, kept, or written by hand; `apply` degrades pictures as a
plan says. A command makes test sets:

    python degrade.py HR_DIR OUT_DIR --recipe vosr --seed 0      ->  OUT_DIR/lq/*.png and OUT_DIR/hq/*.png

Left out, as no released setting reaches them: sharpening, colour jitter, gray pictures.
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

# ---- recipes: what may be drawn
MODES = ("area", "bilinear", "bicubic")  # of a resize, each as likely as the others
KINDS = {"iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03,
         "plateau_iso": 0.12, "plateau_aniso": 0.03}  # of a blur kernel
SIZES = range(7, 22, 2)  # of a kernel, pixels
PULSE = {"type": "pulse", "size": 1}  # the kernel that changes nothing
# odds of a sinc for a blur, a sinc at the end, Gaussian noise (else Poisson), gray noise
SINC, FINAL_SINC, GAUSSIAN, GRAY = 0.1, 0.8, 0.5, 0.4


@dataclass(frozen=True)
class Ranges:
    """What a StagePlan is drawn from."""
    sigma: tuple  # blur kernel's width, pixels
    resize: tuple  # odds of up, down, keep
    scale: tuple  # (lo, hi): down draws from lo .. 1, up from 1 .. hi
    noise: tuple  # Gaussian noise's sigma, of 255
    poisson: tuple  # factor on Poisson noise
    jpeg: tuple  # quality
    blur: float = 1.0  # probability


@dataclass(frozen=True)
class Recipe:
    first: Ranges
    second: Ranges
    generalized_beta: tuple
    plateau_beta: tuple
    kernels_per: str = "image"  # or "batch"
    branches_per: str = "batch"  # or "image": directions, scales, kinds of noise, coins anew for each
    enlarge: tuple = MODES  # how lq_up is made from lq
    eight_bit: bool = True  # lq_up is rounded to 8 bit
    clean: float = 0.0  # probability that lq_up is hq


S3DIFF = Recipe(
    Ranges((0.2, 1.5), (0.2, 0.7, 0.1), (0.3, 1.5), (1, 15), (0.05, 2.0), (60, 95)),
    Ranges((0.2, 1.0), (0.3, 0.4, 0.3), (0.6, 1.2), (1, 12), (0.05, 1.0), (60, 100), blur=0.5),
    generalized_beta=(0.5, 2.0), plateau_beta=(1, 1.5), enlarge=("bicubic",), eight_bit=False, clean=0.01)
GRAMSR = Recipe(
    Ranges((0.2, 3.0), (0.2, 0.7, 0.1), (0.3, 1.5), (1, 15), (0.05, 2.0), (60, 95)),
    Ranges((0.2, 1.5), (0.3, 0.4, 0.3), (0.6, 1.2), (1, 12), (0.05, 1.0), (60, 100), blur=0.5),
    generalized_beta=(0.5, 4.0), plateau_beta=(1, 2), branches_per="image")
VOSR = Recipe(
    Ranges((0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3.0), (30, 95)),
    Ranges((0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95), blur=0.8),
    generalized_beta=(0.5, 4.0), plateau_beta=(1, 2), kernels_per="batch")
WIDE = Recipe(      # ours: mostly one damage, from none to much, for those who shall tell how much
    Ranges((0.2, 8.0), (0.1, 0.2, 0.7), (0.5, 1.5), (0, 60), (0.0, 5.0), (70, 100), blur=0.8),
    Ranges((0.2, 2.0), (0.1, 0.2, 0.7), (0.7, 1.2), (0, 15), (0.0, 1.0), (80, 100), blur=0.2),
    generalized_beta=(0.5, 4.0), plateau_beta=(1, 2), branches_per="image")
RECIPES = {"vosr": VOSR, "s3diff": S3DIFF, "gramsr": GRAMSR, "wide": WIDE}

# ---- plans: what was drawn

@dataclass
class StagePlan:
    """One round of blur, resize, noise, JPEG."""
    blur: bool
    kernels: list  # arguments of `kernel`, per picture or one for all
    scale: float
    mode: str
    noise: str  # "gaussian" or "poisson"
    strength: list  # per picture: sigma of 255, or Poisson factor
    gray: list  # per picture
    jpeg: list  # quality, per picture
    seed: int = 0  # of the noise fields


@dataclass
class Plan:
    first: StagePlan
    second: StagePlan
    sinc: list  # kernels, like those of a stage
    jpeg_first: bool  # second JPEG before the last resize and sinc, else after them
    mode: str  # of the last resize
    enlarge: str  # mode
    eight_bit: bool
    clean: bool = False
    device: str = "cpu"  # where noise fields are drawn


def draw_kernel(rng, recipe, sigma):
    """-> arguments of `kernel`"""
    type, size = rng.choices([*KINDS], KINDS.values())[0], rng.choice(SIZES)
    if rng.random() < SINC:
        return {"type": "sinc", "size": size, "cutoff": rng.uniform(math.pi / (3 if size < 13 else 5), math.pi)}
    k = {"type": type, "size": size, "sigma_x": rng.uniform(*sigma)}
    if "aniso" in type:
        k |= {"sigma_y": rng.uniform(*sigma), "theta": rng.uniform(-math.pi, math.pi)}
    if "_" in type:
        lo, hi = recipe.generalized_beta if "generalized" in type else recipe.plateau_beta
        k["beta"] = rng.uniform(lo, 1) if rng.random() < 0.5 else rng.uniform(1, hi)  # plateau: half are exactly 1
    return k


def draw_stage(rng, recipe, ranges, n):
    (lo, hi), direction = ranges.scale, rng.choices(("up", "down", "keep"), ranges.resize)[0]
    type, span = ("gaussian", ranges.noise) if rng.random() < GAUSSIAN else ("poisson", ranges.poisson)
    return StagePlan(
        blur=rng.random() < ranges.blur,
        kernels=[draw_kernel(rng, recipe, ranges.sigma) for _ in range(n if recipe.kernels_per == "image" else 1)],
        scale={"up": rng.uniform(1, hi), "down": rng.uniform(lo, 1), "keep": 1.0}[direction], mode=rng.choice(MODES),
        noise=type, strength=[rng.uniform(*span) for _ in range(n)], gray=[rng.random() < GRAY for _ in range(n)],
        jpeg=[rng.uniform(*ranges.jpeg) for _ in range(n)], seed=rng.getrandbits(63))


def draw_plan(recipe, n, generator):
    """A plan for n pictures, from one number of the generator, on whose device noise will be drawn."""
    rng = random.Random(torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item())
    first, second = (draw_stage(rng, recipe, ranges, n) for ranges in (recipe.first, recipe.second))
    sincs = [{"type": "sinc", "size": rng.choice(SIZES), "cutoff": rng.uniform(math.pi / 3, math.pi)}
             for _ in first.kernels]
    return Plan(
        first, second, sinc=[k if rng.random() < FINAL_SINC else PULSE for k in sincs],
        jpeg_first=rng.random() >= 0.5, mode=rng.choice(MODES), enlarge=rng.choice(recipe.enlarge),
        eight_bit=recipe.eight_bit, clean=rng.random() < recipe.clean, device=generator.device)


# ---- what is done

def kernel(type, size, sigma_x=1.0, sigma_y=1.0, theta=0.0, beta=1.0, cutoff=math.pi):
    """One blur kernel -> (size, size) float64, sum 1. Raises ValueError.

    type: pulse, sinc or one of KINDS; sigmas in pixels; x runs along columns, y along rows; cutoff in radians per pixel
    """
    if type not in ("pulse", "sinc", *KINDS):
        raise ValueError(f"unknown blur kernel {type!r}; choose from pulse, sinc, {', '.join(KINDS)}")
    if type == "pulse":
        return F.pad(torch.ones(1, 1, dtype=torch.float64), (size // 2,) * 4)
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    if type == "sinc":
        r = torch.hypot(x, y)
        w = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)
        w[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
        return w / w.sum()
    if "aniso" not in type:
        sigma_y, theta = sigma_x, 0.0
    cos, sin = math.cos(theta), math.sin(theta)
    q = ((cos * x + sin * y) / sigma_x) ** 2 + ((cos * y - sin * x) / sigma_y) ** 2  # in the ellipse's own axes
    w = 1 / (1 + q**beta) if "plateau" in type else torch.exp(-0.5 * (q**beta if "generalized" in type else q))
    return w / w.sum()


def stack_kernels(kernels):
    """Kernels -> (n, size, size) float32, padded with zeros to the size of the largest."""
    size = max(k["size"] for k in kernels)
    return torch.stack([F.pad(kernel(**k), ((size - k["size"]) // 2,) * 4) for k in kernels]).float()


def blur(x, kernels):
    """Filter x (B, 3, H, W), mirrored at the edges, with kernels (B or 1, k, k), which are not flipped. No clamp."""
    (B, C, H, W), n = x.shape, kernels.shape[-1] // 2
    # official: fails on sides of 10 or fewer
    x = F.pad(x, (n,) * 4, mode="reflect") if min(H, W) > n else imaging.mirror_pad(x, n, n, n, n)
    weight = kernels.to(x).expand(B, -1, -1).repeat_interleave(C, 0)[:, None]  # (B*C, 1, k, k)
    return F.conv2d(x.reshape(1, B * C, *x.shape[2:]), weight, groups=B * C).view(B, C, H, W)


def resize(x, mode, scale=None, size=None):
    """With a scale, bilinear and bicubic step by exactly 1/scale, with a size by in/out. No clamp."""
    return F.interpolate(x, size=size, scale_factor=scale, mode=mode, align_corners=None if mode == "area" else False)


class Fields:
    """Noise fields from a seed, the same for any device if drawn on the CPU."""
    def __init__(self, seed, device="cpu"):
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def poisson(self, rate):
        return torch.poisson(rate.to(self.generator.device), generator=self.generator)


def poisson_field(x, fields):
    """x (B, C, H, W) in [0, 1] -> Poisson noise of mean 0; how many 8-bit values a picture has scales its photons."""
    x = imaging.round8(x)
    seen = torch.zeros(len(x), 256, device=x.device).scatter_(1, (x * 255).round().long().flatten(1), 1.0).sum(1)
    vals = torch.exp2(torch.ceil(torch.log2(seen))).view(-1, 1, 1, 1)  # official: 1 for a flat picture: strong noise
    return fields.poisson(x * vals).to(x) / vals - x


def noise_field(x, type, gray, fields):
    """Noise of strength 1 for x (B, 3, H, W): gaussian (sigma 1/255) or poisson; gray (B,): alike in all channels."""
    if type not in ("gaussian", "poisson"):
        raise ValueError(f"unknown noise {type!r}; choose from gaussian, poisson")

    def field(gray):
        if type == "gaussian":  # official: one (H, W) field serves all gray pictures of a batch
            return fields.normal(x.shape[2:] if gray else x.shape).to(x) / 255
        luma = x.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)
        return poisson_field((x * luma).sum(1, keepdim=True) if gray else x, fields)

    gray_field = field(True) if any(gray) else x.new_zeros(())
    return torch.where(torch.as_tensor(gray, device=x.device).view(-1, 1, 1, 1), gray_field, field(False))


def add_noise(x, type, strength, gray, fields):
    """x (B, 3, H, W), of any range -> in [0, 1]. strength (B,): sigma of 255, or factor on Poisson noise."""
    return (x + x.new_tensor(strength).view(-1, 1, 1, 1) * noise_field(x, type, gray, fields)).clamp(0, 1)


YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
RGB = torch.tensor([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])
LUMA_STEPS = torch.tensor([  # official: the transpose of the standard's table
    [16, 12, 14, 14, 18, 24, 49, 72], [11, 12, 13, 17, 22, 35, 64, 92], [10, 14, 16, 22, 37, 55, 78, 95],
    [16, 19, 24, 29, 56, 64, 87, 98], [24, 26, 40, 51, 68, 81, 103, 112], [40, 58, 57, 87, 109, 104, 121, 100],
    [51, 60, 69, 80, 103, 113, 120, 103], [61, 55, 56, 62, 77, 92, 101, 99]])
CHROMA_STEPS = torch.full((8, 8), 99)
CHROMA_STEPS[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]])
DCT = torch.cos(math.pi / 8 * torch.outer(torch.arange(8.0), torch.arange(8) + 0.5)) / 2  # (frequency, pixel)
DCT[0] /= math.sqrt(2)


@cache
def tables(device, dtype):
    """The constants of JPEG on a device, where each is sent once."""
    return [table.to(device, dtype) for table in (YCBCR, RGB, LUMA_STEPS, CHROMA_STEPS, DCT)]


def quantise(x, table, factor, D):
    """DCT D of every 8 x 8 block of x (B, C, H, W), rounded to steps table * factor (B,), and back."""
    B, C, H, W = x.shape
    step = table[:, None] * factor.view(B, 1, 1, 1, 1, 1)
    f = (D @ x.reshape(B, C, H // 8, 8, W)).view(B, C, H // 8, 8, W // 8, 8) @ D.T
    f = (f / step).round() * step
    return (D.T @ (f @ D).view(B, C, H // 8, 8, W)).view(B, C, H, W)


def jpeg(x, quality):
    """JPEG without the file: x (B, 3, H, W) in [0, 1], quality (B,), real in (0, 100] -> [0, 1], not rounded."""
    H, W = x.shape[2:]
    ycbcr, rgb, luma_steps, chroma_steps, D = tables(x.device, x.dtype)
    q = torch.as_tensor(quality, device=x.device).to(x)
    # official: steps are neither rounded nor held in 1..255; at quality 100 they vanish and the division fails
    factor = (torch.where(q < 50, 5000 / q, 200 - 2 * q) / 100).clamp(min=1e-5)
    x = F.pad(x * 255, (0, -W % 16, 0, -H % 16))  # official: black padding, which darkens the last blocks
    ycc = (ycbcr @ x.flatten(2)).view_as(x)
    luma = quantise(ycc[:, :1] - 128, luma_steps, factor, D) + 128
    chroma = quantise(F.avg_pool2d(ycc[:, 1:], 2), chroma_steps, factor, D)  # 4:2:0, around 0 as it is
    ycc = torch.cat([luma, F.interpolate(chroma, scale_factor=2)], 1)
    return ((rgb @ ycc.flatten(2)).view_as(x).clamp(0, 255) / 255)[..., :H, :W].contiguous()


def apply(plan, hq, scale=4, fields=None, steps=None):
    """Degrade hq (B, 3, H, W) in [0, 1] as the plan says -> lq (B, 3, H/scale, W/scale), lq_up like hq.

    fields: source of noise, by default the plan's seeds; steps: a list that receives every (name, intermediate picture)
    """
    (H, W), first, second, steps = hq.shape[2:], plan.first, plan.second, [] if steps is None else steps

    def step(name, x):
        steps.append((name, x))
        return x

    def noisy(x, stage):
        return add_noise(x, stage.noise, stage.strength, stage.gray, fields or Fields(stage.seed, plan.device))

    x = step("blur", blur(hq, stack_kernels(first.kernels)))
    x = step("resize", resize(x, first.mode, scale=first.scale))
    x = step("noise", noisy(x, first))
    x = step("jpeg", jpeg(x, first.jpeg))
    if second.blur:
        x = step("blur", blur(x, stack_kernels(second.kernels)))
    x = step("resize", resize(x, second.mode, size=[max(1, int(side / scale * second.scale)) for side in (H, W)]))
    x = step("noise", noisy(x, second))
    if plan.jpeg_first:
        x = step("jpeg", jpeg(x, second.jpeg))
    x = step("resize", resize(x, plan.mode, size=(H // scale, W // scale)))
    x = step("blur", blur(x, stack_kernels(plan.sinc)))
    if not plan.jpeg_first:
        x = step("jpeg", jpeg(x.clamp(0, 1), second.jpeg))

    lq = x.clamp(0, 1)
    # official: S3Diff clamps before, the others after
    lq_up = step("resize", resize(x if plan.eight_bit else lq, plan.enlarge, size=(H, W)))
    lq_up = imaging.round8(lq_up) if plan.eight_bit else lq_up.clamp(0, 1)
    return lq, hq if plan.clean else lq_up  # official: beside a clean lq_up, S3Diff's estimator sees the degraded lq


@torch.no_grad()
def severity(plan, hq, lq):
    """How much a plan blurs and how noisy it is, as far as lq shows it: what a degradation estimator is to say.

    hq: (B, 3, H, W) in [0, 1]; lq: (B, 3, h, w), what `apply` made of it -> (B, 2) in [0, 1]
    blur: the contrast that grain as fine as lq can show loses, beyond shrinking; noise: the deviation in lq over 0.1
    """
    n, scale = len(hq), hq.shape[2] // lq.shape[2]

    def made(x, **changes):
        first, second = (replace(stage, strength=[0.0] * n, **changes) for stage in (plan.first, plan.second))
        return apply(replace(plan, first=first, second=second), x, scale)[0]

    noise = (lq - made(hq)).std((1, 2, 3)) / 0.1
    grain = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(hq)
    grain = 0.5 + 0.1 * resize(grain, "bicubic", scale=scale)     # finer grain would tell of aliasing, not of blur
    kept = made(grain, jpeg=[100.0] * n).std((1, 2, 3)) / F.avg_pool2d(grain, scale).std((1, 2, 3))
    return torch.stack([1 - kept, noise], dim=1).clamp(0, 1)


@torch.no_grad()
def degrade(hq, recipe, generator, scale=4):
    """Draw a plan and apply it: hq (B, 3, H, W) in [0, 1] -> lq (B, 3, H/scale, W/scale), lq_up like hq."""
    if recipe.branches_per == "image" and len(hq) > 1:
        lq, lq_up = zip(*(degrade(one, recipe, generator, scale) for one in hq.split(1)))
        return torch.cat(lq), torch.cat(lq_up)
    plan = draw_plan(recipe, len(hq), generator)
    plan.device = hq.device if hq.is_cuda else plan.device  # noise drawn elsewhere takes longer than a step
    return apply(plan, hq, scale)


# ---- the command

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Degrade a folder of pictures to pairs, OUT_DIR/lq and OUT_DIR/hq.")
    parser.add_argument("hr_dir", type=Path, metavar="HR_DIR", help="clean pictures: a folder, or one")
    parser.add_argument("out_dir", type=folder, metavar="OUT_DIR", help="where lq/ and hq/ go")
    parser.add_argument("--recipe", choices=RECIPES, default="vosr", help="whose settings (default vosr)")
    parser.add_argument("--scale", type=between(1, 16, whole=True), default=4, help="lq is so much smaller (4)")
    parser.add_argument("--seed", type=SEED, default=0, help="the same seed gives the same bytes (default 0)")
    parser.add_argument("--skip-existing", action="store_true", help="keep pairs that are there: go on after a stop")
    return parser.parse_args(argv)


def pair(path, name, args):
    """lq, hq (1, 3, H, W) in [0, 1] of a picture; its name gives the seed. Raises PictureError."""
    scale = args.scale
    hq, _ = imaging.read_picture(path, note=tqdm.write)
    H, W = hq.shape[2:]
    if min(H, W) < 8 * scale:
        raise PictureError(f"{path}: {W} x {H} pixels are too few, both sides need {8 * scale}; remove or replace it")
    hq = hq[..., : H // scale * scale, : W // scale * scale]
    digest = hashlib.sha256(f"{args.seed} {name.as_posix()}".encode(errors="surrogateescape")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return degrade(hq, RECIPES[args.recipe], generator, scale)[0], hq


def main():
    args = parse_args()
    try:
        names = find_pictures(args.hr_dir, print)
    except PictureError as error:
        sys.exit(f"degrade.py: {error}")
    if args.hr_dir.resolve() in (args.out_dir / "lq").resolve().parents:
        sys.exit(printable(f"degrade.py: {args.out_dir}: lies inside {args.hr_dir}, so the next run would degrade it; "
                           "choose a folder outside"))
    sys.exit(write_pairs("degrade.py", names, args.out_dir, args.skip_existing,
                         lambda path, name: pair(path, name, args)))


if __name__ == "__main__":
    command(main)
