"""Hostile and odd input: pictures for sample.py, degrade.py and training, weights for all three systems.

Whatever comes is processed rightly or named in one line, the rest of the batch is done, nothing outside --out changes.
Run: python -m pytest tests/test_hostile.py
"""

import copy
import functools
import hashlib
import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import PIL
import pytest
import runs
import torch
from PIL import Image, ImageCms
from safetensors.torch import save_file
from test_gramsr import SMALL as GRAMSR
from test_sample import ROOT, run  # noqa: F401 (run is a fixture)
from test_train_s3diff import SMALL as S3DIFF

import degrade
from models.dit import DiTConfig
from models.gramsr import GramSR
from models.support.imaging import PictureError, contact_sheet, printable, read_picture, to_uint8, write_picture
from models.support.photos import Photos, list_photos
from models.s3diff import S3Diff
from models.tiny import TinyVAEConfig, TinyVOSR, TinyVOSRConfig
from models.vit import ViTConfig
from models.vosr import VOSR
from models.support.weights import read_tensors, save_model

GB = 2**30
KINDS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif"}
noise = np.random.default_rng(0)
RGB = noise.integers(0, 256, (18, 24, 3), dtype=np.uint8)
GREY = RGB[..., 0].copy()
ANY, REFUSED = "any", "refused"


# ---- pictures

def encoded(img, kind, **options):
    buffer = io.BytesIO()
    img.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, *extra):
    """A PNG written by hand. rows: bytes without the filter bytes."""
    size = len(rows) // height if rows else 0
    lines = b"".join(b"\0" + rows[i : i + size] for i in range(0, len(rows), size)) if size else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def bombs():
    """Small files of huge pictures.  -> {name: bytes}"""
    tiff = encoded(Image.new("L", (8, 8)), "TIFF")
    for short in (256, 257):        # the tags of width and height
        tiff = tiff.replace(struct.pack("<HHII", short, 4, 1, 8), struct.pack("<HHII", short, 4, 1, 20000))
        tiff = tiff.replace(struct.pack("<HHIHH", short, 3, 1, 8, 0), struct.pack("<HHIHH", short, 3, 1, 20000, 0))
    jpeg, gif, bmp = (encoded(Image.new(mode, (8, 8)), kind)
                      for mode, kind in (("L", "JPEG"), ("P", "GIF"), ("RGB", "BMP")))
    at, text = jpeg.index(b"\xff\xc0") + 5, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 * 10**8)))
    return {"bomb.png": png(20000, 20000, 8, 2, b""), "whole.png": encoded(Image.new("1", (10000, 10000)), "PNG"),
            "bomb.gif": gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:],
            "bomb.bmp": bmp[:18] + struct.pack("<ii", 20000, 20000) + bmp[26:], "bomb.tif": tiff,
            "bomb.jpg": jpeg[:at] + struct.pack(">HH", 60000, 60000) + jpeg[at + 4 :],
            "bomb.ppm": b"P6 20000 20000 255\n" + bytes(100),
            "thin.png": png(2**31 - 1, 1, 1, 0, b""), "chunk.png": png(1, 1, 8, 0, b"\0", text)}


def odd_pictures():
    """-> {name: (content, expected)}; expected: (H, W, 3) uint8 array, size (W, H), ANY = right or refused, REFUSED"""
    rgb, files, dice = Image.fromarray(RGB), {}, random.Random(0)
    wholes = {kind: encoded(rgb, kind, **{"lossless": True} if kind == "WEBP" else {}) for kind in KINDS}
    for kind, data in wholes.items():
        for n in [*range(1, 9), *(len(data) * i // 10 for i in range(1, 10)), len(data) - 1]:
            files[f"cut{n}{KINDS[kind]}"] = data[:n], REFUSED if n <= 8 else ANY
        for i in range(20):
            flipped = bytearray(data)
            at = dice.randrange(len(data) if i > 9 else min(60, len(data)))
            flipped[at] ^= 1 << dice.randrange(8)
            files[f"flip{i}{KINDS[kind]}"] = bytes(flipped), ANY
        for suffix in KINDS.values():
            files[f"{kind}-as{suffix}"] = data, RGB if kind in ("PNG", "WEBP", "BMP", "TIFF") else (24, 18)
    for suffix in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"):
        files |= {f"empty{suffix}": (b"", REFUSED), f"text{suffix}": (b"hello, I am a text\n" * 9, REFUSED)}
    for name, data in {"eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(rm) run\n",
                       "svg": b"<svg/>", "pdf": b"%PDF-1.7",
                       "html": b"<html>404", "zip": b"PK\3\4" + bytes(99), "zeros": bytes(4096),
                       "noise": noise.bytes(4096)}.items():
        files[f"{name}.png"] = data, REFUSED
    for width, height in ((1, 1), (1, 5000), (5000, 1), (2, 3)):
        for kind in ("PNG", "JPEG", "TIFF"):
            red = encoded(Image.new("RGB", (width, height), "red"), kind)
            files[f"{width}x{height}{KINDS[kind]}"] = red, (width, height)
    files["0x0.png"] = png(0, 0, 8, 2, b""), REFUSED

    wide = noise.integers(0, 65536, (18, 24, 3), dtype=np.uint16)
    g16 = Image.fromarray(wide[..., 0].copy())
    grey, g16_shown = GREY[..., None].repeat(3, 2), (wide[..., :1] / 257).round().astype(np.uint8).repeat(3, 2)
    alpha = Image.fromarray(noise.integers(0, 256, (18, 24), dtype=np.uint8))
    la, rgba = Image.merge("LA", [Image.fromarray(GREY), alpha]), Image.merge("RGBA", [*rgb.split(), alpha])
    palette = rgb.quantize(200)
    colours = np.asarray(palette.convert("RGB"))
    floats = (GREY / 255).astype(np.float32)
    spoilt = floats.copy()
    spoilt[0, :3] = np.nan, np.inf, -np.inf
    spoilt_shown = grey.copy()
    spoilt_shown[0, :3] = [[0], [255], [0]]
    white = Image.new("RGB", (24, 18), "white")
    files |= {
        "grey16.png": (encoded(g16, "PNG"), g16_shown), "grey16.tif": (encoded(g16, "TIFF"), g16_shown),
        "rgb16.png": (png(24, 18, 16, 2, wide.astype(">u2").tobytes()), (wide / 257).round().astype(np.uint8)),
        "rgba16.png": (png(24, 18, 16, 6, np.dstack([wide, wide[..., 0]]).astype(">u2").tobytes()),
                       (wide / 257).round().astype(np.uint8)),
        "la16.png": (png(24, 18, 16, 4, wide[..., :2].astype(">u2").tobytes()), g16_shown),
        "la.png": (encoded(la, "PNG"), grey), "la.tif": (encoded(la, "TIFF"), grey),
        "rgba.png": (encoded(rgba, "PNG"), RGB),
        "rgba.tif": (encoded(rgba, "TIFF"), RGB), "rgba.webp": (encoded(rgba, "WEBP", lossless=True, exact=True), RGB),
        "1bit.png": (encoded(Image.fromarray(GREY > 127), "PNG"),
                     (GREY > 127)[..., None].repeat(3, 2).astype(np.uint8) * 255),
        "1bit.tif": (encoded(Image.fromarray(GREY > 127), "TIFF", compression="group4"), (24, 18)),
        "palette.png": (encoded(palette, "PNG"), colours),
        "clear.png": (encoded(palette, "PNG", transparency=3), colours),
        "clear.gif": (encoded(palette, "GIF", transparency=3), (24, 18)),
        "clears.png": (encoded(palette, "PNG", transparency=bytes(range(200))), colours),
        "key.png": (encoded(rgb, "PNG", transparency=tuple(map(int, RGB[0, 0]))), RGB),
        "cmyk.jpg": (encoded(rgb.convert("CMYK"), "JPEG"), (24, 18)),
        "cmyk.tif": (encoded(rgb.convert("CMYK"), "TIFF"), np.asarray(rgb.convert("CMYK").convert("RGB"))),
        "ycck.jpg": (encoded(rgb.convert("CMYK"), "JPEG").replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2"),
                     (24, 18)),
        "lab.tif": (encoded(Image.new("LAB", (24, 18)), "TIFF"), ANY),
        "ycbcr.tif": (encoded(rgb.convert("YCbCr"), "TIFF"), (24, 18)),
        "float.tif": (encoded(Image.fromarray(floats), "TIFF"), grey),
        "spoilt.tif": (encoded(Image.fromarray(spoilt), "TIFF"), spoilt_shown),
        "nan.tif": (encoded(Image.fromarray(floats * np.float32("nan")), "TIFF"), 0 * RGB),
        "grey.jpg": (encoded(rgb.convert("L"), "JPEG"), (24, 18)),
        "progressive.jpg": (encoded(rgb, "JPEG", progressive=True), (24, 18)),
        "deflate.tif": (encoded(rgb, "TIFF", compression="tiff_adobe_deflate"), RGB),
        "jpeg.tif": (encoded(rgb, "TIFF", compression="jpeg"), (24, 18)),
        **{f"moves{KINDS[kind]}": (encoded(rgb, kind, save_all=True, append_images=[white], **{"lossless": True}
                                           if kind == "WEBP" else {}),
                                   (24, 18) if kind == "GIF" else RGB) for kind in ("PNG", "WEBP", "GIF", "TIFF")},
    }
    for turn in range(10):      # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[0x0112] = turn
        turned = [RGB, RGB, RGB[:, ::-1], RGB[::-1, ::-1], RGB[::-1], RGB.transpose(1, 0, 2), np.rot90(RGB, -1),
                  RGB[::-1, ::-1].transpose(1, 0, 2),
                  np.rot90(RGB), RGB][turn]
        for kind in ("PNG", "JPEG", "WEBP"):
            options = {"lossless": True} if kind == "WEBP" else {}
            shown = turned if kind != "JPEG" else turned.shape[1::-1]
            files[f"turned{turn}{KINDS[kind]}"] = encoded(rgb, kind, exif=exif, **options), shown
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for name, profile in {"text": b"no profile", "cut": srgb[:200], "lab": lab, "zeros": bytes(500),
                          "long": srgb + bytes(10**5),
                          "srgb": srgb, "flipped": srgb[:132] + bytes(b ^ 255 for b in srgb[132:])}.items():
        files |= {f"icc-{name}.png": (encoded(rgb, "PNG", icc_profile=profile), RGB),
                  f"icc-{name}.jpg": (encoded(rgb, "JPEG", icc_profile=profile), (24, 18)),
                  f"icc-{name}-la.png": (encoded(la, "PNG", icc_profile=profile), grey)}
    for name, exif in {"junk": b"Exif\0\0junk", "cut": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
                       "loop": b"Exif\0\0MM\0*\0\0\0\x08\0\1\x87\x69\0\4\0\0\0\1\0\0\0\x08\0\0\0\0"}.items():
        files |= {f"exif-{name}{KINDS[kind]}": (encoded(rgb, kind, exif=exif), RGB if kind == "PNG" else (24, 18))
                  for kind in ("PNG", "JPEG")}
    files |= {name: (data, REFUSED) for name, data in bombs().items()}
    if int(PIL.__version__.split(".")[0]) < 13:     # which misses 48 bytes of such a TIFF, also of one it wrote itself
        del files["ycbcr.tif"]
    return files


def strange_names():
    return ["-rf.png", "--out.png", "a b.png", "new\nline.png", "tab\t.png", "esc\x1b[31m.png",
            "über 東京 \U0001f600.png", "e\u0301.png",
            "\u202egnp.png",
            "x" * 251 + ".png", "東" * 83 + ".png", b"\xff\xfe.png".decode(errors="surrogateescape"),
            "%s{}$HOME`id`;&.png", "sheet.png",
            "metrics.png",
            "dots...png", " .png", "CON.png", "'\".png", "\u0085.png", "<b>.png"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """-> a folder with all of them, and with a folder and a link to one under names of pictures; {name: expected}"""
    folder, expected = tmp_path_factory.mktemp("hostile") / "in", {}
    folder.mkdir()
    for n, (name, (data, shown)) in enumerate(odd_pictures().items()):      # numbered: no two stems are equal
        (folder / (name := f"{n:03}-{name}")).write_bytes(data)
        expected[name] = shown
    for name in strange_names():
        (folder / name).write_bytes(encoded(Image.fromarray(RGB), "PNG"))
        expected[name] = RGB
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    for name, target in {"loop.png": "loop.png", "loop-a.png": "loop-b.png", "loop-b.png": "loop-a.png",
                         "dangling.png": "nowhere",
                         "null.png": "/dev/null",
                         "tree.png": ".", "link.png": "a b.png"}.items():
        (folder / name).symlink_to(target)
    (folder / "round").symlink_to(".")
    expected |= dict.fromkeys(("pipe.png", "loop.png", "loop-a.png", "loop-b.png", "dangling.png", "null.png"), REFUSED)
    expected["link.png"] = RGB
    yield folder, expected
    subprocess.run(["rm", "-rf", folder])


def tree(folder):
    """Everything below a folder: what it is and what is in it."""
    def content(path):
        whole = path.is_file() and not path.is_symlink()
        return hashlib.sha256(path.read_bytes()).hexdigest() if whole else os.lstat(path).st_mode

    return {str(path): content(path) for path in folder.rglob("*")}


def line_of(lines, path):
    found = [line for line in lines if line.startswith((f"{printable(path)}: ", f"degrade.py: {printable(path)}: "))]
    assert len(found) < 2, found
    return found[0] if found else None


def test_enough_was_tried(pictures):
    assert len(pictures[1]) >= 400


def test_pixels(pictures):
    folder, expected = pictures
    for name, shown in expected.items():
        try:
            x, alpha = read_picture(folder / name)
        except PictureError as e:
            assert isinstance(shown, str), f"{name}: {e}"
            assert str(e).isprintable() and str(e).startswith(f"{printable(folder / name)}: ") and "; " in str(e)
            continue
        assert shown is not REFUSED, name
        assert x.isfinite().all() and 0 <= x.min() and x.max() <= 1
        assert alpha is None or alpha.shape[2:] == x.shape[2:]
        if not isinstance(shown, str):
            assert x.shape[:1:-1] == (shown if isinstance(shown, tuple) else shown.shape[1::-1]), name
        if isinstance(shown, np.ndarray):
            seen = np.ones(shown.shape[:2], bool) if alpha is None else to_uint8(alpha[0])[..., 0] > 2
            assert abs(to_uint8(x[0]).astype(int) - shown)[seen].max() <= 1, name


def test_sample(run, pictures, tmp_path):  # noqa: F811
    """All in one batch; a picture that is named, too, counts once."""
    folder, expected = pictures
    before, others = tree(folder), sorted(path for path in folder.iterdir() if path.suffix in (".gif", ".ppm"))
    status, out, err = run("--scale", 2, "--out", tmp_path / "out", folder, *others, "no such.png", "y" * 300)
    assert status == 1 and tree(folder) == before and not list((tmp_path / "out").glob(".*"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    end = next((n for n, line in enumerate(err) if line.startswith("done ")), None)
    assert end is not None, done.stderr[-1500:]
    first, done = err[:end], [line.removeprefix("  ") for line in err[end + 1 :]]
    assert sorted(first) == sorted(done) and len(first) == int(err[end].split()[-1][:-1])
    assert line_of(first, "no such.png") and line_of(first, "y" * 300)
    made = set(os.listdir(tmp_path / "out"))
    for name, shown in expected.items():
        line, stem = line_of(first, folder / name), Path(name).stem
        target = tmp_path / "out" / ("sheet-2.png" if name == "sheet.png" else f"{stem}.png")
        assert (target.name in made) == (line is None), name
        if line is None and shown is not ANY:
            with Image.open(target) as img:
                assert img.size == tuple(2 * side for side in (shown if isinstance(shown, tuple)
                                                               else shown.shape[1::-1]))
        made.discard(target.name)
        assert (shown is REFUSED) <= (line is not None) and isinstance(shown, str) >= (line is not None), name
    assert made == {"sheet.png"}


def run_degrade(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["degrade.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        degrade.main()
    out, err = capsys.readouterr()
    if isinstance(stop.value.code, str):        # a line, which Python prints at the end, with status 1
        return 1, out.splitlines(), [*err.splitlines(), stop.value.code]
    return stop.value.code, out.splitlines(), err.splitlines()


def test_degrade(pictures, tmp_path, monkeypatch, capsys):
    folder, expected = pictures
    monkeypatch.chdir(tmp_path)
    before = tree(folder)
    status, out, err = run_degrade(monkeypatch, capsys, folder, tmp_path / "out", "--scale", 1)
    assert status == 1 and tree(folder) == before and "2 x link to a folder" in out[0]
    assert all("only the first" in line or "is taken" in line for line in out[1:-1])
    made = {kind: {p.name for p in (tmp_path / "out" / kind).iterdir()} for kind in ("lq", "hq")}
    assert made["lq"] == made["hq"]
    for name, shown in expected.items():
        line, told = line_of(err, folder / name), isinstance(shown, str)
        small = not told and min(shown if isinstance(shown, tuple) else shown.shape[:2]) < 8
        assert (f"{Path(name).stem}.png" in made["lq"]) == (line is None)
        assert (shown is REFUSED or small) <= (line is not None) and (told or small) >= (line is not None), name
    assert len(err) == sum(line_of(err, folder / name) is not None for name in expected)


def test_degrade_never_overwrites_an_input(tmp_path, monkeypatch, capsys):
    """OUT_DIR/hq or OUT_DIR/lq as HR_DIR, and links."""
    for kind in ("hq", "lq"):
        write_picture(tmp_path / kind / "a.png", torch.rand(1, 3, 35, 35), software="nanoSR degrade.py")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(tmp_path / "hq" / "a.png")
    before = tree(tmp_path)
    for source in ("hq", "lq", "links"):
        status, _, err = run_degrade(monkeypatch, capsys, tmp_path / source, tmp_path)
        assert status == 1 and len(err) == 1 and "would overwrite an input" in err[0] and tree(tmp_path) == before


@pytest.mark.parametrize("out", ["/proc/nothing", "file/out", "file", "z" * 300, "dangling/out"])
def test_out_that_cannot_be_written(run, tmp_path, monkeypatch, capsys, out):  # noqa: F811
    for name in ("a.png", "b.png"):
        write_picture(Path("in", name), torch.rand(1, 3, 40, 40), software="camera")
    Path("file").write_text("mine")
    Path("dangling").symlink_to("/proc/nowhere")
    before = tree(tmp_path)
    status, _, err = run("in", "--out", out)
    assert status == 1 and sum("cannot be written" in line for line in err) == 1 and tree(tmp_path) == before
    status, _, err = run_degrade(monkeypatch, capsys, "in", out)
    assert status == 1 and sum("cannot be written" in line for line in err) == 1 == len(err)
    assert tree(tmp_path) == before


def test_photos(pictures, capsys, tmp_path):
    folder, expected = pictures
    photos = Photos(folder, 16)
    for file in photos.files:
        x = photos.pixels(file)
        assert (x is None) == (file in photos.skipped) and (x is None or min(x.shape[:2]) >= 16)
    assert all(photos[i].shape == (3, 16, 16) for i in range(2 * len(photos)))
    err = capsys.readouterr().err.splitlines()
    assert len(err) == len(photos.skipped) and all(line_of(err, file) for file in photos.skipped)
    for file in photos.files:
        small = not isinstance(expected[file.name], (str, np.ndarray)) and min(expected[file.name]) < 8
        bad, shown = file in photos.skipped, expected[file.name]
        assert bad >= (shown is REFUSED or small) and bad <= (isinstance(shown, str) or small), file


@pytest.mark.parametrize("text, words", [("pipe.png", "is a pipe"), ("loop.png", "no such"),
                                         ("a b.png, 9", "no such"), ("nul\0.png", "no such"),
                                         ("/dev/zero", "is a pipe")])
def test_lists(pictures, text, words):
    source = pictures[0].parent / "list.txt"
    source.write_text(f"in/{text}" if text[0] != "/" else text)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        list_photos(source)


def test_captions_of_strange_names():
    assert contact_sheet([[torch.rand(1, 3, 9, 900)]] * len(strange_names()),
                         [[name] for name in strange_names()]).width == 916


def limited(arguments, folder, limit=6 * GB):
    """A command with at most `limit` bytes of address space -> CompletedProcess"""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True,
                          errors="replace",
                          env={**os.environ, "OMP_NUM_THREADS": "1"},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))


def test_real_command(pictures, tmp_path):
    """As users run it, with the embedded model and little memory: only our lines on stderr, libtiff's neither."""
    folder, expected = pictures
    chosen = [name for name in expected if "bomb" in name or "whole" in name or "cut" in name and name.endswith("f")]
    chosen += ["new\nline.png", b"\xff\xfe.png".decode(errors="surrogateescape"), "pipe.png", "loop.png", "folder.png"]
    words = "1x1.png", "cmyk.tif", "icc-flipped.png", "rgb16.png"
    chosen += [name for name in expected if any(word in name for word in words)]
    named = [folder / name for name in chosen if name != "folder.png"]
    done = limited([ROOT / "sample.py", "--device", "cpu", "--scale", "1", "--", *named, "-a.png"], tmp_path)
    err = done.stderr.splitlines()
    end = next((n for n, line in enumerate(err) if line.startswith("done ")), None)
    assert end is not None, done.stderr[-1500:]
    assert done.returncode == 1 and 2 * end + 1 == len(err) and "Traceback" not in done.stderr, done.stderr
    made = os.listdir(tmp_path / "out")
    assert {"new\nline.png", "\udcff\udcfe.png", "sheet.png"} <= set(made) and len(made) - 1 + end == len(chosen)
    assert sum("million pixels" in line for line in err[:end]) >= 6


# ---- weights

SYSTEMS = {
    "vosr": (TinyVOSR, TinyVOSRConfig(
        dit=DiTConfig(input_size=8, patch_size=1, in_channels=16, out_channels=8, hidden_size=32, depth=2, num_heads=2,
                      z_dims=16),
        vit=ViTConfig(img_size=28, embed_dim=16, depth=1, num_heads=1), vae=TinyVAEConfig(latent_channels=8),
        vit_input=28, vit_layer=None, steps=1)),
    "s3diff": (S3Diff, S3DIFF), "gramsr": (GramSR, replace(GRAMSR, ranks={"pixel": 2, "semantic": 2, "texture": 2}))}


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request):
    """-> class, config as a dict, tensors"""
    cls, cfg = SYSTEMS[request.param]
    tensors = {k: v.clone().half() for k, v in cls(cfg).state_dict().items() if "freqs_" not in k}
    return cls, json.loads(json.dumps(asdict(cfg))), tensors


def refusal(load, path):
    """The one line that a file is refused with, before much memory is taken for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        load(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    assert str(path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600, str(e.value)
    return str(e.value)


def write(path, config, tensors):
    save_file(tensors, path, metadata={"config": config if isinstance(config, str) else json.dumps(config)})
    return path


def settings(d, path=()):
    for k, v in d.items():
        yield (*path, k)
        yield from settings(v, (*path, k)) if isinstance(v, dict) else ()


def changed(config, path, value):
    config = d = copy.deepcopy(config)
    for k in path[:-1]:
        d = d[k]
    d[path[-1]] = value
    return config


def test_nonsensical_configs(system, tmp_path):
    """Each setting alone, then what is no config at all."""
    cls, config, tensors = system
    for path in settings(config):
        value = 3 if isinstance(functools.reduce(dict.get, path, config), str) else "x"
        refusal(cls.from_pretrained, write(tmp_path / "a.safetensors", changed(config, path, value), tensors))
    for text in ("[1]", "3", "null", "{", "[" * 10**5, '"r_unet"', '{"r_unet": 4}', '{"ranks": 1}', "9" * 5000,
                 '{"unet": 1, "vae": 2, "dit": 3}'):
        refusal(cls.from_pretrained, write(tmp_path / "a.safetensors", text, tensors))


def test_tensors_that_do_not_fit(system, tmp_path):
    cls, config, tensors = system
    name = max(tensors, key=lambda k: tensors[k].numel())
    for spoilt in ({name: tensors[name][:1].contiguous()}, {name: None}, {"more": torch.ones(3)},
                   {name: tensors[name].int()},
                   {"e" * 5000 + "\n": torch.ones(1)}, {k: torch.zeros(0) for k in tensors},
                   {name: torch.zeros(10**9, 0)}):
        refusal(cls.from_pretrained, write(tmp_path / "a.safetensors", config,
                                           {k: v for k, v in (tensors | spoilt).items() if v is not None}))


def test_weights_that_are_no_numbers(monkeypatch, tmp_path):
    """They are not looked for in loading, which would read gigabytes of them, but named when a result is none."""
    cls, cfg = SYSTEMS["vosr"]
    tensors = cls(cfg).state_dict()
    save_model(tmp_path / "a.safetensors", cfg,
               tensors | {"dit.blocks.1.attn.qkv.weight": tensors["dit.blocks.1.attn.qkv.weight"] * float("nan")})
    write_picture(tmp_path / "a.png", torch.rand(1, 3, 16, 16))
    monkeypatch.chdir(tmp_path)
    status, _, err = runs.here(ROOT / "sample.py", "--device", "cpu", "--model", tmp_path / "a.safetensors",
                               tmp_path / "a.png")
    err = err.splitlines()
    assert status == 1 and len(err) == 3 and "has none in dit.blocks.1.attn.qkv.weight" in err[0]
    assert not (tmp_path / "out").exists()


def lying_headers():
    good = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers = {
        "far": {"a": {**entry, "data_offsets": [0, 10**12]}}, "huge": {"a": {**entry, "shape": [10**9, 10**9]}},
        "overflow": {"a": {**entry, "shape": [2**62, 4]}},
        "overlap": {"a": entry, "b": {**entry, "data_offsets": [4, 12]}},
        "backwards": {"a": {**entry, "data_offsets": [8, 0]}},
        "hole": {"a": entry, "b": {**entry, "data_offsets": [16, 24]}}, "negative": {"a": {**entry, "shape": [-2]}},
        "dtype": {"a": {**entry, "dtype": "X"}}, "list": [1], "none": {"a": None},
        "short": {"a": {**entry, "shape": [3]}}, "trailing": good}
    for name, header in headers.items():
        text = json.dumps(header).encode()
        size = {"trailing": 24, "hole": 24, "overlap": 12}.get(name, 8)
        yield name, struct.pack("<Q", len(text)) + text + bytes(size)
    text = json.dumps(good).encode()
    for length in (0, 1, len(text) - 1, len(text) + 1, 10**6, 10**8, 2**40, 2**63, 2**64 - 1):
        yield f"length{length}", struct.pack("<Q", length) + text + bytes(8)
    yield "nested", struct.pack("<Q", 10**6) + b"[" * 10**6
    yield "latin", struct.pack("<Q", 10) + b"\xff" * 10
    yield "twice", struct.pack("<Q", 2 * len(text) - 1) + text[:-1] + b"," + text[1:] + bytes(8)


def test_lying_headers(tmp_path):
    for name, data in lying_headers():
        (path := tmp_path / "a.safetensors").write_bytes(data)
        # of two entries of one name the last counts
        assert name == "twice" or "is broken" in refusal(read_tensors, path), name
        for cls, _ in SYSTEMS.values():
            refusal(cls.from_pretrained, path)
    cls, cfg = SYSTEMS["vosr"]
    save_model(path, cfg, cls(cfg).state_dict())
    whole, dice, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(100):        # a bit of a real header: it still fits, or it is refused
        data = bytearray(whole)
        data[dice.randrange(struct.unpack("<Q", whole[:8])[0])] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        try:
            VOSR.from_pretrained(str(path))
        except ValueError as e:
            refused += str(path) in str(e) and str(e).isprintable()
    assert refused > 50


class Call:
    """Pickled, a call."""
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def bad_pickles(folder):
    """-> {name: function that writes such a file to a path}"""
    crater = str(folder / "crater")
    names = "rank_unet", "rank_vae", "state_dict_unet", "state_dict_vae", "lora_rank_unet_pix", "a"
    objects = {     # what runs
        "os": Call(os.mkdir, crater), "eval": Call(eval, f"__import__('os').mkdir({crater!r})"),
        "exec": Call(exec, f"open({crater!r}, 'w')"),
        "system": Call(os.system, f"touch {crater}"), "popen": Call(subprocess.Popen, ["touch", crater]),}
    for name, thing in objects.items():
        yield name, lambda path, thing=thing: torch.save(dict.fromkeys(names, thing), path)
        yield f"{name}, deep", lambda path, thing=thing: torch.save({"nanosr": {"x": [thing]}}, path)
        plain = pickle.dumps(dict.fromkeys(names, thing), 2)
        yield f"{name}, plain", lambda path, plain=plain: path.write_bytes(plain)
        old = {"_use_new_zipfile_serialization": False}
        yield f"{name}, old", lambda path, thing=thing, old=old: torch.save({"a": thing}, path, **old)
    yield "empty", lambda path: path.write_bytes(b"")
    yield "text", lambda path: path.write_text("hello")
    yield "zip", lambda path: zipfile.ZipFile(path, "w").writestr("a/data.pkl", b"x")
    yield "deep", lambda path: path.write_bytes(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".")


def test_bad_pickles(tmp_path):
    """Nothing runs; for read_tensors and by all three systems."""
    for name, put in bad_pickles(tmp_path):
        for file, load in (("a.pth", read_tensors), ("s3diff.pkl", S3Diff.from_pretrained), ("model_1.pkl", None)):
            put(path := tmp_path / file)
            line = refusal(load or (lambda path: GramSR.from_pretrained(str(Path(path).parent))), path)
            assert "may run code" in line, name
            assert sorted(os.listdir(tmp_path)) == [file], f"{name}: it ran"
            path.unlink()


def test_public_layouts_that_lie(tmp_path, monkeypatch):
    """Sizes in the authors' own layouts; nothing is fetched before they are refused."""
    monkeypatch.setattr("models.support.weights.download", lambda *_: pytest.fail("it would download"))
    monkeypatch.setenv("NANOSR_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    good = {"rank_unet": 4, "rank_vae": 4, "unet_lora_target_modules": ["to_q"], "vae_lora_target_modules": "x",
            "state_dict_unet": {},
            "state_dict_vae": {},
            "nanosr": {"modulation": "none"}}
    for change in ({"rank_unet": 0}, {"rank_vae": "x"}, {"nanosr": {"unet": 3}}, {"nanosr": 3},
                   {"nanosr": {"modulation": "none", "prior": "../x"}}, {"nanosr": {"modulation": "none", "prior": []}},
                   {"vae_lora_target_modules": "("}, {"unet_lora_target_modules": 5}, {"state_dict_unet": 5},
                   {"rank_unet": torch.ones(3)}):
        torch.save(good | change, tmp_path / "s3diff.pkl")
        refusal(S3Diff.from_pretrained, tmp_path / "s3diff.pkl")
    for name in ("lora_weights_dino_1.safetensors", "adapter_1.pth"):
        (save_file if name[0] == "l" else torch.save)({"a.lora_A.weight": torch.ones(4, 1)}, tmp_path / name)
    good = {"lora_rank_unet_pix": 4, "lora_rank_unet_sem": 4, "state_dict_unet": {}}
    for change in ({"lora_rank_unet_pix": 0}, {"lora_rank_unet_pix": -1},
                   {"lora_rank_unet_sem": "x"},
                   {"state_dict_unet": 3},
                   {"nanosr": {"sets": 3}}, {"nanosr": {"sets": ["pixies"]}}, {"nanosr": 3}):
        torch.save(good | change, tmp_path / "model_1.pkl")
        refusal(lambda path: GramSR.from_pretrained(str(Path(path).parent)), tmp_path / "model_1.pkl")
    (tmp_path / "args.json").write_text("{}")
    base = {"x_embedder.proj.weight": torch.zeros(64, 8, 2, 2), "final_layer.linear.weight": torch.zeros(16, 64),
            "blocks.0.attn.q_norm.weight": torch.zeros(16),
            "layer_norm.weight": torch.zeros(768), "mlp_ca.fc1.weight": torch.zeros(192, 64)}
    for change in ({"layer_norm.weight": torch.zeros(())}, {"mlp_ca.fc1.weight": torch.zeros(())},
                   {"x_embedder.proj.weight": torch.zeros(64)}):
        save_file(base | change, tmp_path / "ema_model.safetensors")
        refusal(VOSR.from_pretrained, tmp_path / "ema_model.safetensors")
    for text in ("{", "[" * 10**5, "3", "", '{"weak_cond_strength_aelq_list": 10000000000}',
                 '{"weak_cond_strength_aelq_list": ["x"]}'):
        save_file(base, tmp_path / "ema_model.safetensors")
        (tmp_path / "args.json").write_text(text)
        with pytest.raises(ValueError) as e:
            VOSR.from_pretrained(str(tmp_path / "ema_model.safetensors"))
        assert "args.json" in str(e.value) and "\n" not in str(e.value)


def test_model_that_is_no_file(run, tmp_path):  # noqa: F811
    write_picture("a.png", torch.rand(1, 3, 16, 16))
    os.mkfifo("pipe.safetensors"), os.mkfifo("pipe.pkl"), Path("loop").symlink_to("loop")
    for name in ("pipe.safetensors", "pipe.pkl", "loop", "w" * 300, "/dev/zero", "new\nline"):
        status, _, err = run("a.png", "--model", name)
        assert status == 1 and len(err) == 1, (name, err)
    for cls, _ in SYSTEMS.values():
        for name in ("pipe.safetensors", "pipe.pkl"):
            refusal(cls.from_pretrained, name)
