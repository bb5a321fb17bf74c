"""README's pictures, made anew from real runs: python tests/figures.py [NAME ...] [--out assets]

Without a name all of them. Photographs become JPEG, drawings PNG of few colours. Every run is of the embedded models
on the example image; `plane` trains its own in a minute, `digits` in 13 of one core (runs/letters). Pillow's own font has only Latin letters, so captions are
ASCII.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import letters  # noqa: E402
import plane as flat  # noqa: E402
from degrade import RECIPES, apply, draw_plan  # noqa: E402
from models.flow import guided, sample  # noqa: E402
from models.gram import gram as gram_matrix  # noqa: E402
from models.gram import features, loss_csd, loss_gram  # noqa: E402
from models.support.imaging import read_picture, resize, round8, to_pil  # noqa: E402
from models.support.metrics import psnr_y  # noqa: E402
from models.tiny import TinyGramSR, TinyS3Diff, TinyVOSR  # noqa: E402
from models.tiny_losses import RandomLPIPS  # noqa: E402
from models.unet import alphas_cumprod  # noqa: E402
from models.support.weights import EMBEDDED  # noqa: E402
from sample import find_system  # noqa: E402

WIDTH, GAP = 1200, 12       # pixels of every picture, and between what it shows
CUP = 16, 30, 32, 32        # a crop of the example: one tile of the embedded model
INK, DIM, PAPER = "#1f2933", "#5f6b7a", "#ffffff"
BLUE, ORANGE, GREEN, GREY, RED = "#d6e6f7", "#fbe3c8", "#d5efdf", "#eceff2", "#c0392b"
DEEP = {BLUE: "#2b6cb0", ORANGE: "#c26a1a", GREEN: "#2f855a", GREY: "#8794a3"}
TINY = {"VOSR": "vosr", "S3Diff": "s3diff", "GramSR": "gramsr"}     # title: system; shown once it has tiny weights


# ---- sheets of photographs ------------------------------------------------------------------------------------------


def font(size):
    return ImageFont.load_default(size)


def shown(x, width, height):
    """(1, 3, H, W) in [0, 1] -> Pillow image of that size; what is enlarged keeps its visible pixels"""
    kind = Image.Resampling.NEAREST if x.shape[-1] < width else Image.Resampling.LANCZOS
    return to_pil(x[0].clamp(0, 1)).resize((width, height), kind)


def sheet(rows, captions, sides=()):
    """Pictures of equal size on white, each with its caption below it.

    rows: lists of (1, 3, H, W) in [0, 1]; captions: nested as rows are, of any lines; sides: words before each row
    """
    left, n, line = 90 if sides else 0, max(map(len, rows)), 22
    width = (WIDTH - left - GAP * (n + 1)) // n
    height = width * rows[0][0].shape[-2] // rows[0][0].shape[-1]
    below = [line * max(c.count("\n") + 1 for c in row) + 8 if any(row) else 0 for row in captions]
    img = Image.new("RGB", (WIDTH, GAP + sum(height + b + GAP for b in below)), PAPER)
    draw, y = ImageDraw.Draw(img), GAP
    start = left + (WIDTH - left - n * width - (n - 1) * GAP) // 2      # what division left over goes to both margins
    for r, (row, words) in enumerate(zip(rows, captions)):
        if sides:
            middle = left // 2 + GAP // 2, y + height // 2
            draw.multiline_text(middle, sides[r], DIM, font(18), anchor="mm", align="center")
        for c, (x, text) in enumerate(zip(row, words)):
            place = start + c * (width + GAP)
            img.paste(shown(x, width, height), (place, y))
            middle = place + width // 2, y + height + 6
            draw.multiline_text(middle, text, INK, font(17), anchor="ma", align="center")
        y += height + below[r] + GAP
    return img


def example(*crop):
    """The example and its original.  crop: top, left, height, width in the small one -> (1, 3, h, w), (1, 3, 4h, 4w)"""
    lq, hq = (read_picture(ROOT / "assets" / file)[0] for file in ("example.png", "example_hq.png"))
    if crop:
        y, x, h, w = crop
        lq, hq = lq[..., y : y + h, x : x + w], hq[..., 4 * y : 4 * (y + h), 4 * x : 4 * (x + w)]
    return lq, hq


def embedded():
    """-> {title: model} of the tiny systems whose weights are in the repository"""
    return {title: find_system(f"{system}-tiny").from_pretrained(f"{system}-tiny") for title, system in TINY.items()
            if EMBEDDED[f"{system}-tiny"].is_file()}


def teaser():
    """The LQ image, bicubic, every tiny system there is, the original: a crop, with PSNR of the whole."""
    lq, hq = example()
    results = {"bicubic": resize(lq, 4)} | {title: round8(model.upscale(lq)) for title, model in embedded().items()}
    crop = (..., slice(16, 384), slice(96, 448))
    pictures = {"128 x 100 pixels": lq[..., 4:96, 24:112]}
    pictures |= {f"{title}, {psnr_y(x, hq, 4):.2f} dB": x[crop] for title, x in results.items()}
    pictures["original"] = hq[crop]
    names, images = [*pictures], [*pictures.values()]
    return sheet([images[:3], images[3:]], [names[:3], names[3:]])      # two rows: large enough to tell apart


def told(plan, stage, name, size):
    """A caption of one step of a plan."""
    kernel = stage.kernels[0]
    kind = kernel.shape
    if kind != "sinc":
        symmetry = "iso" if kernel.sigma_x == kernel.sigma_y else "aniso"
        kind = symmetry if kind == "gaussian" else f"{kind} {symmetry}"
    words = {"blur": f"blur: {kind}", "resize": f"resize: {stage.resize_mode}",
             "noise": f"noise: {stage.noise_type} {stage.noise_strength[0]:.1f}",
             "jpeg": f"JPEG, quality {stage.jpeg_quality[0]:.0f}"}
    return f"{words[name]}\n{size[1]} x {size[0]}"


def degradation(seed=84):
    """One crop through every step of a harsh plan; this seed's shows each of them."""
    hq = example()[1][..., 0:256, 112:368]
    plan, steps = draw_plan(RECIPES["vosr"], 1, torch.Generator().manual_seed(seed)), []
    apply(plan, hq, steps=steps)
    captions, stage = [], plan.first
    for n, (name, x) in enumerate(steps):
        captions.append(told(plan, stage, name, x.shape[-2:]))
        stage = plan.second if name == "jpeg" else stage
    last = len(steps) - 1
    sinc = max(n for n, (name, _) in enumerate(steps) if name == "blur")
    captions[sinc] = f"ringing: sinc filter\n{steps[sinc][1].shape[-1]} x {steps[sinc][1].shape[-2]}"
    captions[sinc - 1] = f"resize: {plan.final_mode}\na quarter, 64 x 64"
    captions[last] = f"enlarged: {plan.enlarge_mode}\nto 256 x 256 again"
    pictures, captions = [hq, *(x for _, x in steps)], ["a good photo\n256 x 256", *captions]
    return sheet([pictures[:6], pictures[6:]], [captions[:6], captions[6:]])


@torch.no_grad()
def trajectory():
    """State and guess of the clean picture along ten steps from noise; the guess is where this velocity would lead."""
    model, (lq, _) = TinyVOSR.from_pretrained("vosr-tiny"), example(*CUP)
    x = 2 * F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1) - 1
    z_lq, feat, seen = model.vae.encode(x), model.tokens(x), []

    def velocity(z, t, r):
        v = guided(model.dit, z, z_lq, feat, t, t)          # r = t: the flow's own velocity, no average of it
        seen.append((t, z, z - t * v))
        return v

    z = sample(velocity, torch.randn(z_lq.shape, generator=torch.Generator().manual_seed(0)), 10)
    picked = [seen[k] for k in (0, 2, 4, 6, 8)] + [(0.0, z, z)]
    rows = [[model.decode(s[k]) / 2 + 0.5 for s in picked] for k in (1, 2)]
    return sheet(rows, [[""] * 6, [f"t = {t:.1f}" for t, *_ in picked]], ["state\nz_t", "estimate\nz_t - t v"])


def weak():
    """What the weak branch alone makes of ever more of the picture."""
    model, (lq, hq) = TinyVOSR.from_pretrained("vosr-tiny"), example(*CUP)
    strengths = 0, 0.05, 0.15, 0.5, 1
    pictures = [model.upscale(lq, guidance=0, weak=w, color="none") for w in strengths]
    captions = [f"weak {w:g}\n{psnr_y(x, hq, 4):.1f} dB" for w, x in zip(strengths, pictures)]
    plain = model.upscale(lq, color="none")
    return sheet([[*pictures, plain]], [[*captions, f"all, and tokens\n{psnr_y(plain, hq, 4):.1f} dB"]])


def guidance():
    """The knob of VOSR, one step."""
    model, (lq, hq) = TinyVOSR.from_pretrained("vosr-tiny"), example(*CUP)
    scales = -1, -0.5, 0, 0.5, 1, 1.5
    pictures = [model.upscale(lq, guidance=s) for s in scales]
    return sheet([pictures], [[f"guidance {s:g}\n{psnr_y(x, hq, 4):.1f} dB" for s, x in zip(scales, pictures)]])


def scores():
    """S3Diff told other scores than it estimates."""
    model, (lq, hq) = TinyS3Diff.from_pretrained("s3diff-tiny"), example(*CUP)
    noises, blurs = (0, 0.3, 0.6), (0, 0.25, 0.5, 0.75, 1)
    rows = [[model.upscale(lq, noise=n, blur=b) for b in blurs] for n in noises]
    captions = [[f"blur {b:g}, {psnr_y(x, hq, 4):.1f} dB" for b, x in zip(blurs, row)] for row in rows]
    blur, noise = model.estimate(lq)[0].tolist()
    estimated = model.upscale(lq)
    rows[0].append(estimated)       # beside the told ones
    captions[0].append(f"as estimated, {psnr_y(estimated, hq, 4):.1f} dB\nblur {blur:.2f}, noise {noise:.2f}")
    return sheet(rows, captions, [f"noise\n{n:g}" for n in noises])


def negatives():
    """S3Diff by its bad prompt alone, by its good one, and further away from the bad one."""
    model, (lq, hq) = TinyS3Diff.from_pretrained("s3diff-tiny"), example(*CUP)
    words = {0: "negative prompt alone", 0.5: "guidance 0.5", 1: "positive prompt alone", 1.5: "guidance 1.5", 2: "guidance 2"}
    pictures = [model.upscale(lq, guidance=g) for g in words]
    return sheet([pictures], [[f"{said}\n{psnr_y(x, hq, 4):.1f} dB" for said, x in zip(words.values(), pictures)]])


@torch.no_grad()
def sets():
    """GramSR's three LoRA sets, one more each time, and the last one too much, with what the later two are trained for."""
    model, lpips, (lq, hq) = TinyGramSR.from_pretrained("gramsr-tiny"), RandomLPIPS(), example(*CUP)

    def caption(said, x):
        far, style = lpips(2 * x - 1, 2 * hq - 1).item(), loss_gram(*(features(model.vit, 2 * y - 1) for y in (x, hq))).item()
        return f"{said}, {psnr_y(x, hq, 4):.2f} dB\nLPIPS {far:.3f}, Gram {style:.4f}"

    words = {(0, 0, 0): "none", (1, 0, 0): "pixel", (1, 1, 0): "+ semantic", (1, 1, 1): "+ texture", (1, 1, 2): "texture twice"}
    pictures = [model.upscale(lq, pixel=p, semantic=s, texture=t) for p, s, t in words]
    return sheet([pictures], [[caption(said, x) for said, x in zip(words.values(), pictures)]])


# ---- diagrams, drawn at twice the size and halved, since Pillow's lines are jagged -----------------------------------


class Board:
    """Boxes and arrows; all coordinates in pixels of the finished picture."""

    def __init__(self, height):
        self.img = Image.new("RGB", (2 * WIDTH, 2 * height), PAPER)
        self.draw = ImageDraw.Draw(self.img)

    def box(self, x, y, w, h, text, fill=GREY, size=19):
        """A box round the centre (x, y)."""
        self.draw.rounded_rectangle([2 * x - w, 2 * y - h, 2 * x + w, 2 * y + h], 20, fill, DEEP[fill], 4)
        self.text(x, y, text, size)

    def text(self, x, y, text, size=17, fill=INK, anchor="mm"):
        self.draw.multiline_text((2 * x, 2 * y), text, fill, font(2 * size), anchor=anchor, align="center", spacing=8)

    def arrow(self, *points, head=True, fill=DIM):
        """A line through the points (x, y), with a head at the last."""
        self.draw.line([2 * v for p in points for v in p], fill, 5, joint="curve")
        (x0, y0), (x, y) = points[-2:]
        if head:
            d = math.hypot(x - x0, y - y0)
            u, v = (x - x0) / d, (y - y0) / d
            back = x - 12 * u, y - 12 * v
            tip = x, y, back[0] - 6 * v, back[1] + 6 * u, back[0] + 6 * v, back[1] - 6 * u
            self.draw.polygon([2 * k for k in tip], fill)

    def plus(self, x, y, sign="+"):
        self.draw.ellipse([2 * x - 32, 2 * y - 32, 2 * x + 32, 2 * y + 32], PAPER, DIM, 5)
        self.text(x, y, sign, 22)

    def photo(self, x, y, picture, side, caption, below=True):
        """A picture (1, 3, H, W) round the centre (x, y)."""
        self.img.paste(shown(picture, 2 * side, 2 * side), (2 * x - side, 2 * y - side))
        self.text(x, y + (side // 2 + 8 if below else -side // 2 - 8), caption, 17, INK, "ma" if below else "md")

    def done(self):
        return self.img.reduce(2)


def vosr():
    """Block diagram, with the model's own pictures in it."""
    model, (lq, _) = TinyVOSR.from_pretrained("vosr-tiny"), example(*CUP)
    sr, b = model.upscale(lq), Board(500)
    noise = 0.5 + 0.2 * torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    b.photo(100, 110, lq, 130, "LQ image, enlarged")
    b.photo(100, 350, noise, 130, "noise: the state at t = 1")
    b.box(340, 66, 170, 64, "vision\ntransformer", BLUE)
    b.box(340, 190, 170, 64, "encoder", GREEN)
    b.box(340, 350, 170, 64, "state z_t", GREY)
    b.box(660, 215, 220, 350, "", ORANGE)
    b.text(660, 70, "diffusion transformer", 19)
    for y, text in ((130, "self-attention, told t"), (215, "cross-attention"), (300, "MLP, told t")):
        b.box(660, y, 176, 54, text, ORANGE, 17)
    b.arrow((660, 157), (660, 187))
    b.arrow((660, 242), (660, 272))
    b.text(660, 356, f"{model.cfg.dit.depth} blocks, one after the other", 15, DIM)
    b.box(900, 215, 150, 84, "a step\nz_t - (t - r) v", GREY)
    b.box(1090, 66, 150, 64, "decoder", GREEN)
    b.photo(1090, 190, sr, 130, "result")
    b.arrow((166, 66), (254, 66))
    b.arrow((166, 150), (210, 150), (210, 190), (254, 190))
    b.arrow((166, 350), (254, 350))
    b.arrow((426, 66), (526, 66), (526, 215), (570, 215))
    b.arrow((426, 190), (480, 190), (480, 270), (549, 270))
    b.arrow((426, 350), (480, 350), (480, 290), (549, 290))
    b.arrow((771, 215), (824, 215))
    b.arrow((900, 172), (900, 66), (1014, 66))
    b.arrow((1090, 99), (1090, 123))
    b.arrow((900, 258), (900, 440), (340, 440), (340, 384))
    b.text(435, 42, "tokens: what", 16, DIM, "lm")
    b.text(435, 170, "z_lq: where", 16, DIM, "lm")
    b.text(797, 200, "v", 18, DIM)
    b.text(660, 462, "again, 25 times; after distillation one step is all", 17, DIM)
    b.text(912, 118, "at t = 0", 16, DIM, "lm")
    return b.done()


def s3diff():
    """One layer of S3Diff: C stands between A and B and is made from what is wrong with the picture."""
    b, (lq, _) = Board(470), example(*CUP)
    b.photo(100, 330, lq, 130, "LQ image")
    b.text(330, 115, "x", 22)
    b.box(690, 52, 300, 60, "W, frozen", BLUE)
    b.box(480, 178, 150, 70, "A\nnarrows to r", ORANGE)
    b.box(690, 178, 150, 70, "C of block i\nr x r", GREEN)
    b.box(900, 178, 150, 70, "B\nwidens again", ORANGE)
    b.plus(1060, 115)
    b.text(1150, 115, "y", 22)
    b.arrow((345, 115), (375, 115), head=False)
    b.arrow((375, 115), (375, 52), (539, 52))
    b.arrow((375, 115), (375, 178), (404, 178))
    b.arrow((556, 178), (614, 178))
    b.arrow((766, 178), (824, 178))
    b.arrow((841, 52), (1060, 52), (1060, 98))
    b.arrow((976, 178), (1060, 178), (1060, 132))
    b.text(1072, 160, "times 8 / r", 16, DIM, "lm")
    b.arrow((1077, 115), (1136, 115))
    b.box(265, 330, 140, 70, "estimator of the\ndegradation", BLUE)
    b.box(500, 330, 150, 70, "sines, cosines,\na small MLP", ORANGE)
    b.box(690, 330, 130, 70, "MLP", ORANGE)
    b.box(900, 330, 170, 70, "embedding of\nthe block's id i", ORANGE)
    b.arrow((166, 330), (194, 330))
    b.arrow((336, 330), (424, 330))
    b.text(376, 313, "noise", 16, DIM)
    b.text(376, 347, "blur", 16, DIM)
    b.arrow((576, 330), (624, 330))
    b.arrow((814, 330), (756, 330))
    b.arrow((690, 294), (690, 214))
    for x, fill, text in ((330, BLUE, "frozen"), (600, ORANGE, "trained"), (870, GREEN, "computed for every image")):
        b.box(x, 436, 24, 24, "", fill)
        b.text(x + 22, 436, text, 17, DIM, "lm")
    return b.done()


def frozen_trained(board, y, *more):
    """What the colours of boxes mean, in a row at y."""
    for x, fill, text in ((300, BLUE, "frozen"), (440, ORANGE, "trained, or with adapters that are"), *more):
        board.box(x, y, 24, 24, "", fill)
        board.text(x + 22, y, text, 17, DIM, "lm")


def s3diff_path():
    """An image's way through S3Diff, with shapes; below it where C comes from and goes to."""
    model, (lq, _) = TinyS3Diff.from_pretrained("s3diff-tiny"), example(*CUP)
    b = Board(500)
    b.photo(84, 120, lq, 110, "LQ, enlarged\n(B, 3, H, W)")
    b.box(278, 120, 150, 84, "encoder\n+ adapters", ORANGE)
    b.box(592, 120, 190, 84, "UNet at t = 999\n+ adapters", ORANGE)
    b.box(836, 120, 140, 84, "clean\n(z - .998 eps)\n/ .068", GREY, 16)
    b.box(1010, 120, 110, 84, "decoder", BLUE)
    b.photo(1136, 120, model.upscale(lq), 110, "result\n(B, 3, H, W)")
    b.arrow((139, 120), (202, 120))
    b.arrow((354, 120), (496, 120))
    b.text(415, 138, "z (B, 4, h, w)", 16, DIM)
    b.arrow((688, 120), (765, 120))
    b.text(726, 100, "eps", 16, DIM)
    b.arrow((907, 120), (954, 120))
    b.text(931, 100, "x0", 16, DIM)
    b.arrow((1066, 120), (1080, 120))
    b.arrow((450, 120), (450, 40), (836, 40), (836, 77))
    b.text(630, 24, "z goes round the UNet, too", 16, DIM)
    b.box(836, 236, 190, 56, "two prompts\n(2, 77, 1024)", BLUE)
    b.arrow((740, 236), (640, 236), (640, 163))
    b.text(836, 284, "both in one batch: eps = eps_neg + g (eps_pos - eps_neg)", 16, DIM)
    b.photo(84, 350, lq, 110, "LQ, not enlarged\n(B, 3, H/4, W/4)")
    b.box(278, 350, 150, 70, "estimator", BLUE)
    b.box(500, 350, 150, 70, "Modulation", ORANGE)
    b.arrow((139, 350), (202, 350))
    b.arrow((354, 350), (424, 350))
    b.text(389, 330, "d (B, 2)", 16, DIM)
    b.arrow((470, 314), (470, 270), (278, 270), (278, 163))
    b.text(374, 253, "C (B, blocks, 16, 16)", 16, DIM)
    b.arrow((545, 314), (545, 163))
    b.text(536, 205, "C (B, blocks, 32, 32)", 16, DIM, "rm")
    b.text(590, 350, "d: blur and noise, in [0, 1]; --blur and --noise stand in its place", 16, DIM, "lm")
    frozen_trained(b, 466, (780, GREY, "a formula"))
    return b.done()


def gramsr_path():
    """An image's way through GramSR, with shapes; at the right what each loss of training compares."""
    model, (lq, _) = TinyGramSR.from_pretrained("gramsr-tiny"), example(*CUP)
    b = Board(520)
    b.photo(84, 250, lq, 110, "LQ, enlarged\n(B, 3, H, W)")
    b.box(278, 90, 150, 70, "DINOv3", BLUE)
    b.box(540, 90, 170, 70, "token adapter,\ntwo layers", ORANGE)
    b.box(278, 250, 150, 70, "encoder", BLUE)
    b.box(592, 250, 250, 96, "UNet at t = 1\n+ pixel, + semantic,\n+ texture", ORANGE)
    b.plus(820, 250, "-")
    b.box(960, 250, 120, 70, "decoder", BLUE)
    b.photo(1110, 250, model.upscale(lq), 110, "result\n(B, 3, H, W)")
    b.arrow((112, 194), (112, 90), (202, 90))
    b.arrow((139, 250), (202, 250))
    b.arrow((354, 90), (454, 90))
    b.text(404, 70, "(B, N, 768)", 16, DIM)
    b.arrow((540, 126), (540, 201))
    b.text(552, 150, "context (B, N, 1024), where a text stood", 16, DIM, "lm")
    b.arrow((354, 250), (466, 250))
    b.text(410, 230, "z (B, 4, h, w)", 16, DIM)
    b.arrow((718, 250), (803, 250))
    b.text(760, 232, "e", 18, DIM)
    b.arrow((410, 250), (410, 340), (820, 340), (820, 268))
    b.text(615, 325, "z", 18, DIM)
    b.arrow((837, 250), (899, 250))
    b.text(868, 228, "z - e = z0", 14, DIM)
    b.arrow((1021, 250), (1054, 250))
    for x, what, loss in ((278, "stage pixel", "squared error\nof images"), (560, "stage semantic", "+ LPIPS of images,\nCSD of z0"),
                          (842, "stage texture", "+ Gram matrices\n(B, N, N) of patches")):
        b.box(x, 424, 220, 84, f"{what}:\n{loss}", GREY, 17)
    b.arrow((389, 424), (449, 424))
    b.arrow((671, 424), (731, 424))
    b.text(968, 424, "each LoRA set learns\non top of the frozen\nearlier ones", 16, DIM, "lm")
    frozen_trained(b, 496, (780, GREY, "what it learns from"))
    return b.done()


def heat(m):
    """Matrix (rows, columns) -> (1, 3, rows, columns): blue below zero, white, red above; the far ends are cut off"""
    m = (m / m.abs().quantile(0.98)).clamp(-1, 1)[None, None]
    red, blue = (torch.tensor(c).view(1, 3, 1, 1) for c in ([0.75, 0.22, 0.17], [0.17, 0.42, 0.69]))
    return 1 - m.clamp(min=0) * (1 - red) - (-m).clamp(min=0) * (1 - blue)


@torch.no_grad()
def gram():
    """Both Gram matrices of the 64 cells of a latent: as they are, features rotated, places shuffled."""
    model, (_, hq), g = TinyVOSR.from_pretrained("vosr-tiny"), example(20, 34, 16, 16), torch.Generator().manual_seed(0)
    X = model.vae.encode(2 * hq - 1).flatten(2).mT                     # (1, 64, 64): 8 x 8 places, 64 features
    X = F.normalize(X - X.mean(1, keepdim=True), dim=-1)                # without their mean, all would be red
    turn, places = torch.linalg.qr(torch.randn(64, 64, generator=g))[0], torch.randperm(64, generator=g)
    shuffled = F.fold(F.unfold(hq, 8, stride=8)[..., places], hq.shape[-2:], 8, stride=8)
    whole = [gram_matrix(X, channels=c) for c in (False, True)]
    rows, captions = [], []
    for picture, x, what in ((hq, X, "64 tokens, 64 features"), (None, X @ turn, "every token turned"),
                             (shuffled, X[:, places], "in another order")):
        grams = [gram_matrix(x, channels=c) for c in (False, True)]
        same = [torch.allclose(G, W, atol=1e-5) for G, W in zip(grams, whole)]
        rows.append([torch.ones_like(hq) if picture is None else picture, heat(x[0]), *(heat(G[0]) for G in grams)])
        captions.append(["", what, *(["changed", "the same"][s] for s in same)])
    captions[0] = ["the picture", captions[0][1], "who resembles whom", "which features go together"]
    return sheet(rows, captions, ["as they\nare", "features\nrotated", "places\nshuffled"])


def toy_prior(means, variance, z_t, t, allowed):
    """The exact noise in z_t (B, 2, 1, 1) of points from Gaussians round means (3, 2), with odds allowed (B, 1, 3)."""
    a = alphas_cumprod()[t].view(-1, 1)
    away = z_t.flatten(1)[:, None] - a.sqrt()[..., None] * means
    spread = a * variance + 1 - a
    belongs = (allowed[:, 0].log() - away.square().sum(-1) / (2 * spread)).softmax(-1)
    return ((1 - a).sqrt() * (belongs[..., None] * away).sum(1) / spread).view_as(z_t)


def csd():
    """Where CSD drives points that shall be of one of three classes: to it, then past it."""
    means = torch.tensor([[0.0, 2.0], [-(3**0.5), -1.0], [3**0.5, -1.0]])
    g = torch.Generator().manual_seed(0)
    z, label = (0.3 * torch.randn(180, 2, 1, 1, generator=g)).requires_grad_(), torch.arange(180) % 3
    wanted, any_class, seen = F.one_hot(label, 3).float()[:, None], torch.ones(180, 1, 3), {}
    for step in range(101):
        seen[step] = z.detach().flatten(1).clone()
        t = torch.randint(20, 500, (180,), generator=g)
        noise = torch.randn(z.shape, generator=g)
        loss_csd(partial(toy_prior, means, 0.1), z, t, noise, wanted, any_class).backward()
        with torch.no_grad():
            z -= 0.05 * z.numel() / 2 * z.grad
            z.grad = None
    b, unit, colors = Board(430), 44, (DEEP[BLUE], DEEP[ORANGE], DEEP[GREEN])
    for panel, step in enumerate((0, 50, 100)):
        cx, cy = 204 + 396 * panel, 224
        for m, fill, color in zip(means.tolist(), (BLUE, ORANGE, GREEN), colors):
            r, x, y = 2 * 0.1**0.5 * unit, cx + unit * m[0], cy - unit * m[1]
            b.draw.ellipse([2 * (x - r), 2 * (y - r), 2 * (x + r), 2 * (y + r)], fill, color, 3)
        for k, (u, v) in zip(label.tolist(), seen[step].tolist()):
            x, y = cx + unit * u, cy - unit * v
            b.draw.ellipse([2 * x - 5, 2 * y - 5, 2 * x + 5, 2 * y + 5], colors[k])
        far = (seen[step] * means[label]).sum(1).mean() / 2
        b.draw.rounded_rectangle([2 * cx - 372, 24, 2 * cx + 372, 764], 20, None, GREY, 4)
        b.text(cx, 406, f"step {step}: {abs(far):.1f} from the middle, the class at 2.0")
    return b.done()


# ---- the plane ------------------------------------------------------------------------------------------------------

ONE_LQ = 0.7        # the LQ coordinate whose answers are orange


class Square:
    """A window of a Board onto the plane, 3.8 wide round (-0.1, 0.3), its left upper corner at (x, y)."""

    def __init__(self, board, x, y, side, caption):
        self.board, self.x, self.y, self.side = board, x, y, side
        board.draw.rounded_rectangle([2 * x, 2 * y, 2 * (x + side), 2 * (y + side)], 14, None, GREY, 4)
        board.text(x + side / 2, y + side + 8, caption, 17, INK, "ma")

    def place(self, point):
        u, v = map(float, point)
        return 2 * (self.x + self.side * (0.5 + (u + 0.1) / 3.8)), 2 * (self.y + self.side * (0.5 - (v - 0.3) / 3.8))

    def dots(self, z, fill, radius):
        """z: (B, 2, 1, 1); what lies outside is not drawn"""
        for point in z.flatten(1)[inside(z)]:
            x, y = self.place(point)
            self.board.draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill)

    def line(self, points, fill, width):
        self.board.draw.line([c for point in points for c in self.place(point)], fill, width, joint="curve")

    def lq_line(self):
        """Where the first coordinate is ONE_LQ, dashed."""
        for k in range(-15, 21, 2):
            self.line([(ONE_LQ, k / 10), (ONE_LQ, (k + 1) / 10)], DIM, 2)


def inside(z):
    """Which of z (B, 2, 1, 1) a Square shows.  -> (B,) bool"""
    return (z.flatten(1) - torch.tensor([-0.1, 0.3])).abs().amax(1) < 1.85


def plane():
    """A world of two numbers: what regression and the flow answer, guidance, distillation, error against distance."""
    b, w = Board(1034), flat.world()
    some, one = answered(w, 0, 1800), answered(w, 1800, 1900, ONE_LQ)
    walk, flow, rcgm = flat.walk, flat.flow_net(), flat.one_step_net("rcgm")
    answers = {     # caption: function of a World
        "what is true": lambda w: flat.posterior(w)[1],
        "regression": lambda w: flat.regress(flat.regression_net(), w.z_lq, w.feat),
        "flow, 1 step": lambda w: walk(flow, w, 1),
        "flow, 4 steps": lambda w: walk(flow, w, 4),
        "flow, 25 steps": lambda w: walk(flow, w, 25),
        "guidance 0": lambda w: walk(flow, w, 25, 0),
        "guidance 0.5": lambda w: walk(flow, w, 25, 0.5),
        "0.5, from no condition": lambda w: walk(flat.flow_net(weak=(0.0, 0.0)), w, 25, 0.5, weak=0.0),
        "guidance 1.5": lambda w: walk(flow, w, 25, 1.5),
        "RCGM, 1 step": lambda w: walk(rcgm, w, 1),
    }
    b.text(18, 20, "Blue: answers to many LQ images. Orange: 100 answers to one of them, whose first coordinate is the "
           "dashed line. Off: farther than 0.1 from the spiral.", 17, DIM, "lm")
    for k, (caption, answer) in enumerate(answers.items()):
        error, _, _, off = flat.measure(answer(w), w)
        x, y = 18 + 236 * (k % 5), 40 + 296 * (k // 5)
        square = Square(b, x, y, 222, f"{caption}\nerror {error:.2f}, {off:.0%} off")
        square.lq_line()
        square.dots(answer(some), "#9db8d6", 2.5)
        square.dots(answer(one), DEEP[ORANGE], 5)
    plane_chart(b, 70, 644, 480, 310, w)
    plane_paths(b, 640, 644, 260, w)
    return b.done()


def answered(w, first, last, lq=None):
    """Some images of a World, all with the same LQ coordinate if it is given."""
    part = flat.World(*(x[first:last].clone() for x in w))
    if lq is not None:
        part.z_lq[:, 0] = lq
    return part


def plane_chart(b, x, y, width, height, w):
    """Error against distance: regression, 1 to 100 steps, 1 after distillation; left upper corner at (x, y)."""
    def place(error, distance):
        return x + width * (error - 0.28) / 0.45, y + height * (-0.7 - math.log10(distance)) / 3.2

    def point(z, fill, words, dx, dy, anchor):
        u, v = place(*flat.measure(z, w)[:2])
        b.draw.ellipse([2 * u - 11, 2 * v - 11, 2 * u + 11, 2 * v + 11], fill)
        b.text(u + dx, v + dy, words, 16, fill, anchor)
        return u, v

    b.draw.rectangle([2 * x, 2 * y, 2 * (x + width), 2 * (y + height)], None, GREY, 4)
    for distance in (0.1, 0.01, 0.001):
        _, at = place(0, distance)
        b.draw.line([2 * x, 2 * at, 2 * (x + width), 2 * at], GREY, 2)
        b.text(x - 8, at, f"{distance:g}", 16, DIM, "rm")
    least = flat.measure(flat.posterior(w)[0], w)[0]
    for error, words in ((least, "the least error"), (2 * least, "twice as much")):
        at, _ = place(error, 1)
        b.draw.line([2 * at, 2 * y, 2 * at, 2 * (y + height)], DEEP[GREEN], 3)
        b.text(at, y + height + 6, f"{words}\n{error:.3f}", 16, DEEP[GREEN], "ma")
    b.text(x + width / 2 + 10, y + height + 16, "error", 17, DIM)
    b.text(x + width - 10, y + 22, "distance", 17, DIM, "rm")

    beside = {2: (12, -10, "lm"), 4: (12, -10, "lm"), 8: (-12, 6, "rm"), 25: (-12, 6, "rm"), 100: (14, 4, "lm")}
    way = [point(flat.walk(flat.flow_net(), w, 1), DEEP[BLUE], "", 0, 0, "lm")]
    for n, where in beside.items():
        way.append(point(flat.walk(flat.flow_net(), w, n), DEEP[BLUE], f"{n} steps", *where))
    b.draw.line([2 * c for p in way for c in p], DEEP[BLUE], 4)
    regression = flat.regress(flat.regression_net(), w.z_lq, w.feat)
    point(regression, RED, "regression, and 1 step of the flow", 14, -8, "lm")
    point(flat.walk(flat.one_step_net("rcgm"), w, 1), DEEP[ORANGE], "RCGM, 1", 18, -8, "lm")
    point(flat.walk(flat.one_step_net("shortcut"), w, 1), DEEP[ORANGE], "shortcut, 1", 18, 8, "lm")


def plane_paths(b, x, y, side, w):
    """The way from a few noises to their answers: 25 steps, and one step before and after distillation."""
    few = answered(w, 1900, 1912, ONE_LQ)
    few = flat.World(*(x[inside(few.eps)] for x in few))
    way = []

    def velocity(z, t, r):
        way.append(z.flatten(1))
        return guided(flat.flow_net(), z, few.z_lq, few.feat, t, r)

    end = sample(velocity, few.eps, 25)
    ways = torch.stack([*way, end.flatten(1)], dim=1)       # (n, 26, 2)
    networks = {"one step before distillation": flat.flow_net(), "one step after it": flat.one_step_net("rcgm")}
    for k, (words, net) in enumerate(networks.items()):
        square = Square(b, x + k * (side + 18), y, side, words)
        square.lq_line()
        square.dots(flat.world(1800).z_hq, "#cfdbe8", 2.5)
        answers = flat.walk(net, few, 1)
        for path, answer in zip(ways, answers.flatten(1)):
            square.line(path, DEEP[BLUE], 3)
            square.line([path[0], answer], DEEP[ORANGE], 3)
        square.dots(few.eps, INK, 5)
        square.dots(end, DEEP[BLUE], 8)
        square.dots(answers, DEEP[ORANGE], 6)
    b.text(x, y + side + 40, "From noise (black) to answers to one LQ image (dashed).\n"
           "Blue: the flow in 25 steps. Orange: one step.", 17, DIM, "la")


# ---- digits


def digits(columns=14):
    """Held-out cells restored: the ghosts of a flow's first step, what sixteen steps and a distilled one decide for."""
    folders = letters.trained()
    hq, lq, cells = letters.held_out(n=500)
    models = {name: find_system(at).from_pretrained(at) for name, at in folders.items()}
    results = {"bicubic": resize(lq, 4)}
    shown_models = {"flow, 1 step without noise": ("flow", {"steps": 1, "temperature": 0.0}),
                    "flow, 16 steps": ("flow", {"steps": 16}), "distilled, 1 step": ("distill", {})}
    for words, (name, knobs) in shown_models.items():
        results[words] = letters.restored(models[name], lq, **knobs)
    rows = {"LQ": F.interpolate(lq, scale_factor=4)} | results | {"original": hq}

    left, side, gap = 268, 64, 2
    img = Image.new("RGB", (WIDTH, len(rows) * (side + gap) + gap), PAPER)
    draw = ImageDraw.Draw(img)
    for r, (words, x) in enumerate(rows.items()):
        y = gap + r * (side + gap)
        caption = words
        if words in results:
            share, distance, _ = letters.measure(x, hq, cells)
            caption += f"\n{share:.0%} read, distance {distance:.2f}"
        draw.multiline_text((left - 12, y + side // 2), caption, INK, font(16), anchor="rm", align="right")
        for c in range(columns):
            cell = to_pil(x[c].clamp(0, 1)).resize((side, side), Image.Resampling.NEAREST)
            img.paste(cell, (left + c * (side + gap), y))
    return img.quantize(48, dither=Image.Dither.NONE).convert("RGB")      # of few colours, so a small file


# ---- files ----------------------------------------------------------------------------------------------------------

PHOTOS = {"teaser": teaser, "degradation": degradation, "trajectory": trajectory, "weak": weak, "guidance": guidance,
          "scores": scores, "negatives": negatives, "sets": sets}
DRAWINGS = {"vosr": vosr, "s3diff": s3diff, "s3diff_path": s3diff_path, "gramsr_path": gramsr_path, "gram": gram, "csd": csd, "plane": plane, "digits": digits}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join([*PHOTOS, *DRAWINGS])}")
    p.add_argument("--out", type=Path, default=ROOT / "assets", help="folder of the pictures (default assets)")
    args = p.parse_args()
    unknown = set(args.names) - {*PHOTOS, *DRAWINGS}
    if unknown:
        p.error(f"no picture {', '.join(unknown)}")
    for name, draw in (PHOTOS | DRAWINGS).items():
        if args.names and name not in args.names:
            continue
        img = draw()
        path = args.out / f"{name}.{'jpg' if name in PHOTOS else 'png'}"
        if name in PHOTOS:
            img.save(path, quality=85, optimize=True)
        else:
            img.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {img.width} x {img.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
