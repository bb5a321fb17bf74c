"""Picture files, ranges, sizes, colours, sheets.    python -m pytest tests/test_imaging.py"""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from models.support import charts, imaging
from models.support.files import find_pictures
from models.support.imaging import (PictureError, adain, chroma, color_fix, contact_sheet, pad_to_multiple, read_picture,
                            resize, round8, to_uint8, wavelet, write_picture)

rng = np.random.default_rng(0)
RGB = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY16 = rng.integers(0, 65536, (6, 5), dtype=np.uint16)


def save(img, path, **options):
    img.save(path, **options)
    return path


def bytes_of(x):
    """(1, C, H, W) in [0, 1] -> (H, W, C) uint8"""
    return to_uint8(x[0])


# ---- reading: every mode a file can have

@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp"])
def test_rgb(tmp_path, suffix):
    x, alpha = read_picture(save(Image.fromarray(RGB), tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {})))
    assert x.shape == (1, 3, 6, 5) and x.dtype == torch.float32 and alpha is None
    assert np.array_equal(bytes_of(x), RGB)


def test_jpeg_and_cmyk(tmp_path):
    flat = Image.new("RGB", (16, 8), (200, 100, 50))
    for mode in ("RGB", "CMYK"):
        x, alpha = read_picture(save(flat.convert(mode), tmp_path / f"{mode}.jpg", quality=100))
        assert x.shape == (1, 3, 8, 16) and alpha is None
        assert torch.allclose(x.mean((0, 2, 3)) * 255, torch.tensor([200.0, 100.0, 50.0]), atol=2)


def test_grey_modes(tmp_path):
    x, alpha = read_picture(save(Image.fromarray(RGB[..., 0]), tmp_path / "l.png"))
    assert alpha is None and np.array_equal(bytes_of(x), RGB[..., :1].repeat(3, 2))
    x, alpha = read_picture(save(Image.fromarray(RGB[..., 0] > 127), tmp_path / "1.png"))
    assert alpha is None and np.array_equal(bytes_of(x)[..., 0] == 255, RGB[..., 0] > 127)
    x, alpha = read_picture(save(Image.merge("LA", [Image.fromarray(RGB[..., c].copy()) for c in (0, 1)]), tmp_path / "la.png"))
    assert np.array_equal(bytes_of(alpha), RGB[..., 1:2])
    assert np.array_equal(bytes_of(x)[RGB[..., 1] > 2], RGB[..., :1].repeat(3, 2)[RGB[..., 1] > 2])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    x, alpha = read_picture(save(Image.fromarray(GREY16), tmp_path / f"a{suffix}"))
    assert alpha is None and x.shape == (1, 3, 6, 5)
    assert np.allclose(x[0, 1], GREY16 / 65535, atol=1e-6)


@pytest.mark.parametrize("values, white", [(GREY16.astype(np.int32), 65535), (RGB[..., 0] / np.float32(255), 1), (RGB[..., 0] * np.float32(1), 255)])
def test_32_bit(tmp_path, values, white):
    x, _ = read_picture(save(Image.fromarray(values), tmp_path / "a.tif"))
    assert np.allclose(x[0, 2], values / white, atol=1e-6)


def test_palette_with_transparency(tmp_path):
    img = Image.new("P", (4, 3), 1)
    img.putpalette([255, 0, 0, 0, 128, 0])
    img.putpixel((0, 0), 0)
    x, alpha = read_picture(save(img, tmp_path / "opaque.png"))
    assert alpha is None and bytes_of(x)[0, 1].tolist() == [0, 128, 0]
    x, alpha = read_picture(save(img, tmp_path / "hole.png", transparency=0))
    assert bytes_of(x)[0, 1].tolist() == [0, 128, 0] and alpha[0, 0, 0, 0] == 0 and alpha[0, 0, 1:].min() == 1


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees
    x, _ = read_picture(save(Image.fromarray(RGB), tmp_path / "a.png", exif=exif))
    assert np.array_equal(bytes_of(x), np.rot90(RGB, -1))
    x, _ = read_picture(save(Image.fromarray(GREY16), tmp_path / "b.png", exif=exif))
    assert x.shape == (1, 3, 5, 6)


def test_colour_profiles(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("srgb", srgb), ("broken", b"not a profile")):
        x, _ = read_picture(save(Image.fromarray(RGB), tmp_path / f"{name}.png", icc_profile=profile))
        assert np.array_equal(bytes_of(x), RGB)
    warm = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"s\0R\0G\0B", b"o\0t\0h\0r")
    swapped = warm.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")  # red means blue
    x, _ = read_picture(save(Image.new("RGB", (2, 2), (255, 0, 0)), tmp_path / "swapped.png", icc_profile=swapped))
    assert bytes_of(x)[0, 0].tolist() == [0, 0, 255]


def fixed(x):
    return struct.pack(">i", round(x * 65536))


def icc(space, description, curve, primaries=()):
    """A colour profile of one curve, and of red, green and blue in XYZ."""
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(description) + 1) + description + bytes(79),
            b"wtpt": b"XYZ " + bytes(4) + b"".join(map(fixed, (0.9642, 1, 0.8249)))}
    tags |= {name: curve for name in ((b"rTRC", b"gTRC", b"bTRC") if primaries else (b"kTRC",))}
    tags |= {name: b"XYZ " + bytes(4) + b"".join(map(fixed, xyz)) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)}
    table, data = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(data), b"none", 0x02400000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp" + bytes(28)
    return head.ljust(128, b"\0")[:68] + b"".join(map(fixed, (0.9642, 1, 0.8249))) + bytes(48) + table + data


SRGB_CURVE = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + b"".join(map(fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
P3 = (0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)


@pytest.mark.parametrize("description", [b"DCI-P3 D65 Gamut with sRGB Transfer", b"Display P3", b"sRGB"])
def test_profiles_of_any_name_are_converted(tmp_path, description):
    """P3's numbers of (230, 60, 30) and (60, 200, 90) are (212, 75, 47) and (104, 197, 103), by the matrices of both."""
    for stored, meant in (((212, 75, 47), (230, 60, 30)), ((104, 197, 103), (60, 200, 90)), ((90, 90, 90), (90, 90, 90))):
        for mode in ("RGB", "RGBA", "P"):
            img = Image.new("RGB", (4, 4), stored).convert(mode, palette=Image.Palette.ADAPTIVE)
            x, alpha = read_picture(save(img, tmp_path / "a.png", icc_profile=icc(b"RGB ", description, SRGB_CURVE, P3)))
            assert abs(bytes_of(x)[0, 0].astype(int) - meant).max() <= 2 and (alpha is None) == (mode != "RGBA"), mode


@pytest.mark.parametrize("gamma, meant", [(1.75, 84), (1.8, 81), (1, 137)])
def test_grey_profiles(tmp_path, gamma, meant):
    curve = b"curv" + bytes(4) + (struct.pack(">I", 0) if gamma == 1 else struct.pack(">IH", 1, round(gamma * 256)))
    profile, grey = icc(b"GRAY", b"grey", curve), Image.new("L", (8, 8), 64)
    la = Image.merge("LA", [grey, Image.new("L", (8, 8), 200)])
    for img, name in ((grey, "l.png"), (grey, "l.jpg"), (la, "la.png"), (Image.fromarray(np.full((8, 8), 64 * 257, np.uint16)), "16.png"),
                      (Image.fromarray(np.full((8, 8), 64 * 257, np.uint16)), "16.tif")):
        x, alpha = read_picture(save(img, tmp_path / name, icc_profile=profile))
        assert (bytes_of(x) == meant).all() and (alpha is None or (bytes_of(alpha) == 200).all()) and (alpha is None) == (img is not la), name
    x, _ = read_picture(save(Image.new("RGB", (2, 2), (9, 100, 200)), tmp_path / "rgb.png", icc_profile=profile))
    assert bytes_of(x)[0, 0].tolist() == [9, 100, 200], "a grey profile says nothing of colours"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(depth, colour, row, width, *chunks):
    """A PNG of one row, written by hand."""
    head = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth, colour, row, key", [(1, 0, b"\x40", b"\0\1"), (1, 0, b"\xb0", b"\0\0"), (2, 0, b"\x1b", b"\0\1"), (4, 0, b"\x01\x23", b"\0\1"),
                                                     (8, 0, b"\0\1\2\3", b"\0\1"), (16, 0, b"\1\0\1\1\2\0\3\0", b"\1\1"),
                                                     (16, 2, bytes(6) + b"\1\2\3\4\5\6" + bytes(12), b"\1\2\3\4\5\6")])
def test_transparent_value_of_any_depth(tmp_path, depth, colour, row, key):
    (tmp_path / "a.png").write_bytes(png_of(depth, colour, row, 4, chunk(b"tRNS", key)))
    _, alpha = read_picture(tmp_path / "a.png")
    assert alpha.flatten().tolist() == [1, 0, 1, 1]


def test_large_texts_and_profiles(tmp_path):
    """Pillow refuses more than a megabyte of either; texts are not needed, profiles are."""
    text = chunk(b"zTXt", b"Raw profile type 8bim\0\0" + zlib.compress(bytes(5_000_000)))
    profile = chunk(b"iCCP", b"P3\0\0" + zlib.compress(icc(b"RGB ", b"P3", SRGB_CURVE, P3) + bytes(2_000_000)))
    (tmp_path / "a.png").write_bytes(png_of(8, 2, bytes((212, 75, 47)), 1, profile, text, chunk(b"tEXt", b"XMP\0" + b"x" * 2_000_000)))
    assert abs(bytes_of(read_picture(tmp_path / "a.png")[0])[0, 0].astype(int) - (230, 60, 30)).max() <= 2


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG"), (13, None)])
def test_high_dynamic_range_is_named(tmp_path, transfer, name):
    lines = []
    (tmp_path / "a.png").write_bytes(png_of(16, 2, bytes(6), 1, chunk(b"cICP", bytes((9, transfer, 0, 1)))))
    read_picture(tmp_path / "a.png", lines.append)
    assert lines == ([f"{tmp_path / 'a.png'}: is HDR ({name}), read as sRGB; convert it if colours look wrong"] if name else [])


def test_hidden_colours_do_not_matter(tmp_path):
    """Whatever lies under alpha 0, the visible colours continue there; what is visible is untouched."""
    alpha, found = np.zeros((32, 32), np.uint8), []
    alpha[8:24, 8:20] = 255
    shown = rng.integers(100, 150, (32, 32, 3), dtype=np.uint8)
    for hidden in (0, 255, rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)):
        pixels = np.where(alpha[..., None] > 0, shown, hidden).astype(np.uint8)
        x, _ = read_picture(save(Image.fromarray(np.dstack([pixels, alpha])), tmp_path / "a.png"))
        assert np.array_equal(bytes_of(x)[alpha > 0], shown[alpha > 0]) and 100 <= bytes_of(x).min() and bytes_of(x).max() < 150
        found.append(x)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    x, alpha = read_picture(save(Image.new("RGBA", (5, 3), (9, 9, 9, 0)), tmp_path / "nothing.png"))
    assert x.isfinite().all() and alpha.max() == 0


def test_only_the_first_of_several(tmp_path):
    first, more = Image.new("RGB", (4, 4), "red"), [Image.new("RGB", (4, 4), "blue")]
    for name in ("a.gif", "a.webp", "a.tif", "a.png", "a.mpo"):
        lines = []
        x, _ = read_picture(save(first, tmp_path / name, save_all=True, append_images=more), note=lines.append)
        assert lines == [f"{tmp_path / name}: holds several images, only the first is read"] and bytes_of(x)[0, 0, 0] > 200
    read_picture(save(first, tmp_path / "one.tif"), note=lambda line: pytest.fail(line))


# ---- reading: files that are no pictures

def broken_files(folder):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    (folder / "cut.png").write_bytes(buffer.getvalue()[:3000])
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").write_bytes(b"")
    (folder / "noise.jpg").write_bytes(b"\xff\xd8\xff" + bytes(range(256)))
    (folder / "folder.png").mkdir()
    return [folder / name for name in ("cut.png", "text.png", "empty.png", "noise.jpg", "folder.png", "missing.png")]


def test_bad_files_have_one_line(tmp_path):
    for path in broken_files(tmp_path):
        with pytest.raises(PictureError) as e:
            read_picture(path)
        message = str(e.value)
        assert message.startswith(f"{path}: ") and "; " in message and "\n" not in message


def test_decompression_bomb(tmp_path, monkeypatch):
    path = save(Image.new("L", (20, 20)), tmp_path / "bomb.png")
    for limit in (300, 100):  # Pillow warns above the limit and fails above twice the limit
        monkeypatch.setattr(imaging, "MOST_PIXELS", limit)
        for size in ((0, 0), (20, 19)):
            with pytest.raises(PictureError, match="million pixels"):
                read_picture(path, size=size)
        assert read_picture(path, size=(20, 20))[0].shape == (1, 3, 20, 20), "as large as it should be"


@pytest.mark.parametrize("name, data, words", [
    ("a.jpg", b"\0\0\0\x1cftypavif\0\0\0\0mif1miaf", "is AVIF; convert"), ("a.jpg", b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "is AVIF; convert"),
    ("a.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC; convert"),
    ("a.heic", b"?", "is HEIC; convert"), ("a.jpg", b"?", "is not an image of a kind that is read here; convert")])
def test_what_it_is_by_its_bytes(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PictureError, match=f"{name}: {words}"):
        read_picture(tmp_path / name)


def test_find_pictures(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    assert [p.name for p in find_pictures(tmp_path)] == ["a.jpg", "b.PNG"]
    assert find_pictures(Path("x.txt")) == {Path("x.txt"): Path("x.txt")}
    (tmp_path / "none").mkdir()
    with pytest.raises(PictureError, match="no images"):
        find_pictures(tmp_path / "none")


# ---- writing

def test_write_rounds_and_keeps_alpha(tmp_path):
    x = torch.tensor([0.0, 0.4999, 0.5, 1.7]).div(255 / torch.tensor([1, 1, 3, 255.0])).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    write_picture(tmp_path / "new" / "a.png", x, x[:, :1])
    with Image.open(tmp_path / "new" / "a.png") as img:
        assert img.mode == "RGBA" and [v[0] for v in np.asarray(img).reshape(4, 4)] == [0, 0, 2, 255]
    y, alpha = read_picture(tmp_path / "new" / "a.png")
    assert torch.equal(y[..., 1, 1], round8(x)[..., 1, 1]) and torch.equal(alpha, round8(x[:, :1]))
    for name in ("a.jpg", "a", "a.webp"):       # never a PNG under another name
        with pytest.raises(PictureError, match=r"are PNG; .* suffix \.png"):
            write_picture(tmp_path / name, x)


def test_write_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_picture(path, torch.zeros(1, 3, 4, 4))
    before = path.read_bytes()

    def dies(img, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Image.Image, "save", dies)
    with pytest.raises(PictureError, match="No space left"):
        write_picture(path, torch.ones(1, 3, 4, 4))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


# ---- sizes

def test_resize_is_pillow(tmp_path):
    x = torch.from_numpy(RGB).permute(2, 0, 1)[None] / 255
    assert np.array_equal(bytes_of(resize(x, 4)), np.asarray(Image.fromarray(RGB).resize((20, 24), Image.Resampling.BICUBIC)))
    assert np.array_equal(bytes_of(resize(x[:, :1], (3, 7)))[..., 0], np.asarray(Image.fromarray(RGB[..., 0]).resize((7, 3), 3)))
    assert resize(x.repeat(2, 1, 1, 1), 2.5).shape == (2, 3, 15, 12)  # 12.5 rounds to even
    assert resize(x, 0.01).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("H, W", [(16, 24), (5, 17), (3, 1)])
def test_padding_mirrors_as_numpy_does(H, W):
    x = torch.rand(1, 3, H, W)
    y = pad_to_multiple(x, 16)
    assert y.shape[2] % 16 == y.shape[3] % 16 == 0 and torch.equal(y[..., :H, :W], x)
    assert np.array_equal(y[0], np.pad(x[0], ((0, 0), (0, -H % 16), (0, -W % 16)), mode="reflect"))


# ---- colours

def test_colour_fixes():
    torch.manual_seed(0)
    x, ref = torch.rand(1, 3, 24, 30), 0.2 + 0.4 * torch.rand(1, 3, 24, 30)
    for fix in (adain, wavelet):
        assert torch.allclose(fix(x, x), x, atol=1e-5)
        assert abs(fix(x, ref) - x).max() > 0.1
    y = adain(0.4 + 0.2 * x, ref)  # far from the clamp
    assert torch.allclose(y.mean((2, 3)), ref.mean((2, 3)), atol=1e-4) and torch.allclose(y.std((2, 3)), ref.std((2, 3)), atol=1e-3)
    assert torch.equal(color_fix(x, ref, "none"), x) and torch.equal(color_fix(x, ref, "adain"), adain(x, ref))
    assert adain(x[..., :1, :1], ref).isfinite().all()
    with pytest.raises(ValueError, match="unknown colour fix 'sepia'"):
        color_fix(x, ref, "sepia")


@pytest.mark.parametrize("kind", ["adain", "wavelet", "none"])
@pytest.mark.parametrize("stablesr", [False, True])
def test_grey_stays_grey(kind, stablesr):
    x, ref = torch.rand(2, 3, 24, 30), torch.rand(2, 3, 24, 30)
    ref[0] = ref[0, :1]
    y = color_fix(x, ref, kind, stablesr)
    assert chroma(y)[0] < 1e-6 and chroma(y)[1] > 0.5, "each picture by itself"
    ref[0, 0] += 1 / 255
    assert chroma(color_fix(x, ref, kind, stablesr))[0] < 1e-6, "rounding is no colour"


@pytest.mark.parametrize("kind", ["adain", "wavelet"])
def test_bars_stay(kind):
    torch.manual_seed(0)
    ref = torch.rand(1, 3, 64, 48) * 0.6 + 0.2
    ref[:, :, :12], ref[:, :, -9:] = 0, 1
    ref[:, :, 30, 20] = 0       # a dark pixel is no bar
    x = (ref + 0.02 * torch.randn(ref.shape)).clamp(0.01, 0.99)
    x[:, :, 30, 20] = 0.5
    ref[:, 2, 40:50], x[:, 2, 40:50] = 0, 0.4     # no blue is not black
    y = color_fix(x, ref, kind)
    assert y[:, 2, 42:48].max() > 0
    assert y[:, :, :12].max() == 0 and y[:, :, -9:].min() == 1 and 0 < y[:, :, 30, 20].min()
    narrow = color_fix(x[..., :5], ref[..., :5], kind)
    assert torch.equal(narrow, {"adain": adain, "wavelet": wavelet}[kind](x[..., :5], ref[..., :5])), "less than eight pixels are no area"


# ---- to look at

def test_contact_sheet():
    small, big = torch.rand(1, 3, 8, 10), torch.ones(1, 3, 32, 40)
    sheet = contact_sheet([[small, big], [big]], [["input", "ours"]])
    assert sheet.size == (8 + 40 + 8 + 40 + 8, 22 + 8 + 32 + 8 + 32 + 8)
    shown = np.asarray(sheet)[30:62, 8:48]  # every pixel of the small one is a 4x4 block
    assert np.array_equal(shown[::4, ::4], bytes_of(small)) and np.array_equal(shown[3::4, 3::4], bytes_of(small))
    assert contact_sheet([[small]]).size == (26, 24)
    assert contact_sheet([[small], [small]], [["a"], ["a caption that is much too long for it"]]).size == (26, 8 + 2 * (22 + 8 + 8))


def test_loss_curves(tmp_path):
    steps = range(0, 1000, 10)
    curves = {"flow": [(s, 2.0 ** (-s / 200)) for s in steps], "gaps": [(s, float("nan") if s < 500 else -1.0) for s in steps]}
    for n, some in enumerate([curves, {}, {"one": [(7, 0.0)]}, {"flat": [(1, 3.0), (2, 3.0)]}]):
        charts.loss_curves(some, tmp_path / f"{n}.png", title="loss")
        with Image.open(tmp_path / f"{n}.png") as img:
            assert img.size == (900, 520) and img.mode == "RGB"
    with Image.open(tmp_path / "0.png") as img:
        assert len(img.getcolors(1 << 24)) > 50  # lines, text, antialiasing


def test_ticks_are_round_and_inside():
    assert charts.axis_ticks(0, 1000) == [0, 200, 400, 600, 800, 1000]
    assert charts.axis_ticks(0.01, 1, log=True) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])
    assert all(0.31 <= v <= 0.47 for v in charts.axis_ticks(0.31, 0.47, log=True)) and len(charts.axis_ticks(0.31, 0.47, log=True)) > 2
