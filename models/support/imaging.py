"""Image files, sizes, colour fixes, contact sheets.

Only here are images uint8; elsewhere they are float tensors (B, C, H, W) in RGB, here in [0, 1].
Left out: animations (the first frame is read), metadata other than orientation and colour profile.
"""

import os
import threading
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from models.support.files import OTHERS, PictureError, first_bytes, printable, whole_file
from models.support.profiles import scale_key, to_srgb

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # Pillow would hand some others to programs
MOST_PIXELS = 2**30 // 12   # a gigabyte as float32 RGB; of an image of unknown origin
# Pillow's limits of 1 and 64 MB are for servers; texts of Photoshop and profiles of scanners are larger
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28
SIGNATURES = {b"avif": "AVIF", b"avis": "AVIF", b"ftyphe": "HEIC", b"ftypmif1": "HEIC"}    # near a file's start
HDR = {b"\x10": "PQ", b"\x12": "HLG"}   # transfer functions in PNG's cICP chunk
GREY = 1.5 / 255    # less chroma than this is rounding
MADE = "Settings"   # key of the text in a PNG that says how a result was made

# ---- between tensors and bytes

def to_uint8(x):
    """Float image to bytes, rounded.  x: (C, H, W) in [0, 1] -> (H, W, C) uint8 array"""
    return (x.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def from_uint8(a):
    """Bytes to float image.  a: (H, W, C) or (H, W) uint8 array or Pillow image -> (1, C, H, W) in [0, 1]"""
    return torch.from_numpy(np.array(np.atleast_3d(a))).permute(2, 0, 1)[None] / 255


def like(x, numbers):
    """Turn a list into a tensor of x's type, or of bools, where x is; the host does not wait for a GPU."""
    dtype = torch.bool if isinstance(numbers[0], bool) else x.dtype
    return torch.tensor(numbers, dtype=dtype, device="cpu").to(x.device, non_blocking=True)


def round8(x):
    """What a file of 8 bits per channel would hold.  x: any shape in [0, 1] -> like x, multiples of 1/255"""
    return (x.clamp(0, 1) * 255).round() / 255


def to_pil(x):
    """x: (C, H, W) in [0, 1], C one of 1 to 4 -> Pillow image in mode L, LA, RGB or RGBA"""
    a = to_uint8(x)
    return Image.fromarray(a[:, :, 0] if a.shape[2] == 1 else a)


# ---- files

ONE_AT_A_TIME = threading.RLock()   # what is done about warnings and limits holds for all threads


@contextmanager
def open_image(path, most=MOST_PIXELS):
    """Pillow's image of a file, so far only its header; most: pixels. Raises PictureError and what Pillow raises."""
    if not (os.path.isfile(path) and os.path.getsize(path)):
        wrong = ("no such file; check the spelling" if not os.path.exists(path)
                 else "is a folder; name an image in it" if os.path.isdir(path)
                 else "is empty (0 bytes); copy or download it again" if os.path.isfile(path)
                 else "is a pipe or a device; name a file")     # which would keep us waiting for ever
        raise PictureError(f"{path}: {wrong}")
    with ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")                                 # chatter about odd metadata ...
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # ... but a huge image is an error at once
        Image.MAX_IMAGE_PIXELS = most
        with Image.open(path, formats=FORMATS) as img:
            yield img


def read_picture(path, note=lambda line: None, size=(0, 0)):
    """Any image file as sRGB and alpha, turned as its EXIF orientation says; note: gets a line on what is not read.

    size: (H, W) that it should have, and may have however large that is
    -> (rgb (1, 3, H, W) in [0, 1], alpha (1, 1, H, W) in [0, 1] or None). Raises PictureError.
    """
    most = max(MOST_PIXELS, size[0] * size[1])
    try:
        with open_image(path, most) as img:
            if getattr(img, "is_animated", False):
                note(printable(f"{path}: holds several images, only the first is read"))
            transfer = first_bytes(path, 2**16).partition(b"IDAT")[0].partition(b"\0\0\0\4cICP")[2][1:2]
            if img.format == "PNG" and transfer in HDR:
                note(printable(f"{path}: is HDR ({HDR[transfer]}), read as sRGB; convert it if colours look wrong"))
            return load_pixels(img)
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        wrong = f"has more than {most / 1e6:.0f} million pixels; crop or shrink it first"
    except UnidentifiedImageError:
        kinds = [kind for signature, kind in SIGNATURES.items() if signature in first_bytes(path, 64)]
        kinds.append(OTHERS.get(Path(path).suffix.lower(), "not an image of a kind that is read here"))
        wrong = f"is {kinds[0]}; convert it to PNG"
    except PermissionError:
        wrong = "may not be read (permission denied); change its permissions"
    except Exception as e:                  # on broken files Pillow's decoders raise anything
        wrong = f"cannot be decoded ({' '.join(str(e).split()) or type(e).__name__}); copy or download it again"
    raise PictureError(f"{path}: {wrong}")


def load_pixels(img):
    """`decode` of an image as Pillow has opened it, turned as its EXIF orientation says."""
    scale_key(img)
    img.load()
    with suppress(Exception):       # broken EXIF says nothing
        img = ImageOps.exif_transpose(img)
    return decode(img)


def decode(img):
    """Pixels of an open Pillow image of any mode.  -> (rgb (1, 3, H, W), alpha (1, 1, H, W) or None), in [0, 1]"""
    if min(img.size) == 0:
        raise ValueError("it has no pixels")
    if img.mode[0] not in "IF":
        x = from_uint8(to_srgb(img))
        rgb, alpha = x[:, :3], x[:, 3:] if x.shape[1] == 4 else None
    else:           # I, I;16, I;16B: grey integers, F: grey floats; Pillow's own conversion would clip at 255
        a, key = np.asarray(img).astype(np.float64), img.info.get("transparency")
        most = a[np.isfinite(a)].max(initial=0)
        if img.mode == "F":         # the file does not say which white it means
            white = 1 if most <= 1.5 else 255 if most <= 255 else 65535
        else:                       # older Pillow also opens 16-bit PNG in the 32-bit mode I
            white = 65535 if most <= 65535 else 2**31 - 1
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])    # profiles are for 8 bits
        ramp.info["icc_profile"] = img.info.get("icc_profile")
        a = np.interp(np.nan_to_num(a / white) * 255, np.arange(256), np.asarray(to_srgb(ramp))[0, :, 1]) / 255
        rgb = torch.from_numpy(a).float().expand(1, 3, -1, -1)
        alpha = torch.from_numpy(np.asarray(img) != key).float()[None, None] if isinstance(key, int) else None
    return (rgb.contiguous(), None) if alpha is None else (bleed(rgb * alpha, alpha, rgb), alpha)


def bleed(x, alpha, rgb):
    """Colours where alpha is below 1 %, which resizing would blend in, from the visible ones around.

    x: (1, 3, H, W) colours times alpha; alpha: (1, 1, H, W); rgb: (1, 3, H, W), kept where visible -> like rgb
    """
    visible, size = alpha >= 0.01, alpha.shape[-2:]
    if visible.all() or max(size) == 1:
        return rgb
    small, less = (F.avg_pool2d(y, 2, ceil_mode=True) for y in (x, alpha))
    around = bleed(small, less, small / less.clamp(min=1e-6))
    return torch.where(visible, rgb, F.interpolate(around, size, mode="bilinear"))


def png_text(software="nanoSR", made=""):
    """The text chunks of a PNG, see `save_png`."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Software", software)
    if made:
        texts.add_text(MADE, made)
    return texts


def save_png(img, path, software="nanoSR", made=""):
    """Write a Pillow image.

    software: by it a later run knows what it may overwrite, and that a result is no input; made: how, for `read_made`
    Raises WriteError, a PictureError.
    """
    if Path(path).suffix.lower() != ".png":
        raise PictureError(f"{path}: results are PNG; give it the suffix .png")
    with whole_file(path) as part:
        img.save(part, format="PNG", pnginfo=png_text(software, made))


def write_picture(path, rgb, alpha=None, software="nanoSR", made=""):
    """Write a PNG.  rgb: (1, 3, H, W) in [0, 1]; alpha: (1, 1, H, W) in [0, 1] or None; the rest as in `save_png`.

    Raises WriteError.
    """
    save_png(to_pil(rgb[0] if alpha is None else torch.cat([rgb, alpha.to(rgb)], dim=1)[0]), path, software, made)


def read_made(path):
    """How a result was made, as `write_picture` was told; "" where nothing says so. Raises PictureError."""
    try:
        with open_image(path, most=2**40) as img:       # our own file, however large
            return img.info.get(MADE, "")
    except Exception as e:
        raise PictureError(f"{path}: cannot be read ({e})") from None


# ---- in notebooks

def check_image(lq):
    """lq in float32, if it is what `upscale` takes: a float tensor (B, 3, H, W) in [0, 1]. Raises ValueError."""
    wanted = "a float tensor (B, 3, H, W), RGB in [0, 1]"
    if not isinstance(lq, torch.Tensor):
        raise ValueError(f"upscale takes {wanted}, not {type(lq).__name__}; sample.load(name) takes other kinds, too")
    if lq.ndim != 4 or lq.shape[1] != 3 or min(lq.shape) == 0:
        raise ValueError(f"upscale takes {wanted}, not one of shape {tuple(lq.shape)}")
    if not lq.is_floating_point():
        raise ValueError(f"upscale takes {wanted}, not {lq.dtype}; divide by 255")
    if lq.device.type != "cpu":     # to ask for its values would make a GPU wait
        return lq.float()
    low, high = lq.min().item(), lq.max().item()
    if not (-0.01 <= low and high <= 1.01):     # NaN is not, either; a resize may overshoot a little
        raise ValueError(f"upscale takes {wanted}, not one from {low:.3g} to {high:.3g}")
    return lq.float()


def as_input(image):
    """A path, a Pillow image, an array (H, W, 3) or (H, W) uint8, or a tensor, which stays as it is.

    -> rgb (1, 3, H, W) in [0, 1], alpha (1, 1, H, W) in [0, 1] or None. Raises PictureError, ValueError.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_picture(os.path.expanduser(image))
    if isinstance(image, Image.Image):
        return load_pixels(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)):
            raise ValueError(f"an array must be (H, W, 3) or (H, W) uint8, not {image.shape} {image.dtype}")
        return from_uint8(image).expand(1, 3, -1, -1).contiguous(), None
    return image, None


def as_output(sr, alpha, image):
    """sr: (B, 3, H, W) in [0, 1]; alpha: of `as_input` -> the same in the kind of `image`, of which sr was made."""
    if isinstance(image, torch.Tensor):
        return sr.to(image)
    if isinstance(image, np.ndarray):
        a = to_uint8(sr[0])
        return a[:, :, 0] if image.ndim == 2 else a[:, :, : image.shape[2]]
    if isinstance(image, Image.Image) and Image.getmodebase(image.mode) == "L":     # grey, whatever its depth
        sr = sr[:, :1]
    if alpha is not None:
        sr = torch.cat([sr.cpu(), resize(alpha, sr.shape[-2:])], dim=1)
    return to_pil(sr[0])


# ---- sizes

def resize(x, size_or_scale):
    """Resize as the official scripts do, with Pillow's bicubic filter on 8-bit pictures.

    x: (B, 1 or 3, H, W) in [0, 1]; size_or_scale: (h, w) or a factor -> (B, C, h, w), multiples of 1/255
    """
    if isinstance(size_or_scale, (int, float)):
        size_or_scale = [max(round(side * size_or_scale), 1) for side in x.shape[-2:]]
    h, w = size_or_scale
    resized = [to_pil(picture).resize((w, h), Image.Resampling.BICUBIC) for picture in x]
    return torch.cat([from_uint8(picture) for picture in resized]).to(x)


def mirror_pad(x, left, right, top, bottom):
    """Reflection, also where the picture is smaller than the pad, which F.pad refuses."""
    def mirror(length, before, after):
        period = max(2 * (length - 1), 1)
        i = torch.arange(-before, length + after, device=x.device) % period
        return torch.minimum(i, period - i)

    return x[..., mirror(x.shape[2], top, bottom)[:, None], mirror(x.shape[3], left, right)]


def pad_to_multiple(x, multiple):
    """Pad right and bottom by reflection to whole multiples; crop results with y[..., :H, :W]."""
    H, W = x.shape[-2:]
    return mirror_pad(x, 0, -W % multiple, 0, -H % multiple)


# ---- colour fixes: give the result x the colours of the enlarged input ref
# official: both are truncated to 8 bits before and the result after; here all stays float until write_picture rounds

def adain(x, ref, stablesr=False):
    """Per channel, give x the mean and standard deviation of ref.

    x: (B, 3, H, W) in [0, 1]; ref: (B, 3, any, any); stablesr: see `color_fix` -> like x
    """
    def stats(x):
        more = x.shape[2] * x.shape[3] > 1      # a single pixel has no n - 1
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=int(more), keepdim=True)
        return mean, (variance + 1e-5).sqrt() if stablesr else variance.sqrt() + 1e-5

    (mean_x, std_x), (mean_ref, std_ref) = stats(x), stats(ref)
    return ((x - mean_x) / std_x * std_ref + mean_ref).clamp(0, 1)


def blur(x, sigma=5.0, radius=20):
    """Gaussian low-pass with mirrored borders.  x: (B, C, H, W) -> same shape"""
    g = torch.exp(-torch.arange(-radius, radius + 1, device=x.device) ** 2 / (2 * sigma**2))
    g = (g / g.sum()).to(x).expand(x.shape[1], 1, 1, -1)
    x = mirror_pad(x, radius, radius, radius, radius)
    return F.conv2d(F.conv2d(x, g, groups=x.shape[1]), g.transpose(2, 3), groups=x.shape[1])


def wavelet(x, ref):
    """Replace the low frequencies of x by those of ref (called wavelet officially, but it is one Gaussian).

    x, ref: (B, 3, H, W) in [0, 1] -> like x
    """
    return (x + blur(ref - x)).clamp(0, 1)      # = blur(ref) + (x - blur(x))


def low_frequencies(x, levels=5):
    """x after blurs, each twice as wide as the one before (StableSR's wavelets).  x: (B, C, H, W) -> same shape"""
    k = torch.tensor([1.0, 2.0, 1.0], device="cpu").to(x, non_blocking=True) / 4
    kernel = (k[:, None] * k).expand(x.shape[1], 1, 3, 3)
    for step in (2**level for level in range(levels)):
        x = F.conv2d(F.pad(x, [step] * 4, mode="replicate"), kernel, groups=x.shape[1], dilation=step)
    return x


def chroma(x):
    """How far from grey the most colourful pixel is.  x: (B, 3, H, W) -> (B, 1, 1, 1)"""
    return (x - x[:, 1:2]).abs().amax((1, 2, 3), keepdim=True)


def in_blocks(mask):
    """True in all squares of 8 pixels throughout which mask is.  mask: (B, C, H, W) bool -> same shape"""
    def widest(x):
        return F.max_pool2d(F.max_pool2d(x, (8, 1), 1), (1, 8), 1)
    if min(mask.shape[2:]) < 8:
        return torch.zeros_like(mask)
    return widest(F.pad(1 - widest(1 - mask.float()), [7] * 4)) > 0


def color_fix(x, ref, kind, stablesr=False):
    """The colour fix of that name: adain, wavelet or none. What is grey in ref stays grey, black and white areas too.

    x, ref: (B, 3, H, W) in [0, 1]; stablesr: as StableSR (S3Diff, GramSR), else as VOSR -> like x. Raises ValueError.
    """
    if kind == "adain":
        y = adain(x, ref, stablesr)
    elif kind == "wavelet":
        y = (x + low_frequencies(ref - x)).clamp(0, 1) if stablesr else wavelet(x, ref)
    elif kind == "none":
        y = x
    else:
        raise ValueError(f"unknown colour fix {kind!r}; choose from adain, wavelet, none")
    if kind != "none":
        black, white = (in_blocks(mask.all(1, keepdim=True)) for mask in (ref < 0.5 / 255, ref > 254.5 / 255))
        y = y.masked_fill(black, 0).masked_fill(white, 1)
    return torch.where(chroma(ref) < GREY, y.mean(1, keepdim=True), y)


# ---- to look at

def middle(x, side):
    """(1, 3, H, W) -> at most side pixels of its middle either way"""
    row, col = (slice(max(n - side, 0) // 2, (n + side) // 2) for n in x.shape[-2:])
    return x[:, :, row, col]


def contact_sheet(rows, labels=(), gap=8, font_size=14):
    """Pictures in rows and columns on white; smaller ones are enlarged to the height of their row.

    rows: list of lists of (1, 3, H, W) in [0, 1]; labels: captions, nested as rows are, maybe fewer -> Pillow image
    """
    font, cells = ImageFont.load_default(font_size), []
    for row in rows:
        height = max(x.shape[-2] for x in row)
        sizes = [(round(x.shape[-1] * height / x.shape[-2]), height) for x in row]
        cells.append([to_pil(x[0]).resize(size, Image.Resampling.NEAREST) for x, size in zip(row, sizes)])
    widths = [max(row[c].width for row in cells if c < len(row)) for c in range(max(map(len, cells)))]
    captions = [font_size + gap if r < len(labels) else 0 for r in range(len(cells))]   # their heights
    height = sum(row[0].height + caption + gap for row, caption in zip(cells, captions)) + gap
    sheet = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), height), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for r, row in enumerate(cells):
        x = gap
        for c, img in enumerate(row):
            if r < len(labels) and c < len(labels[r]):
                text = printable(labels[r][c])
                while font.getlength(text) > widths[c] and len(text) > 1:
                    text = text[:-2] + "…"
                draw.text((x, y), text, fill="black", font=font)
            sheet.paste(img, (x, y + captions[r]))
            x += widths[c] + gap
        y += row[0].height + captions[r] + gap
    return sheet
