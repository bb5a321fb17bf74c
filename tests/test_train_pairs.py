"""Training on pairs of one's own, --lq beside --data, in all three trainers. Run: python -m pytest tests/test_train_pairs.py"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import test_train
import test_train_gramsr
import test_train_s3diff
import torch
from PIL import Image
from test_train import newest, same
from test_train_s3diff import flat

import degrade
import train_gramsr
import train_s3diff
import train_vosr
import training
from models.support.files import PictureError
from models.support.imaging import from_uint8
from models.support.photos import DataError, PhotoPairs, find_pairs, list_photos, photos_for

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setitem(train_vosr.PRESETS, "tiny", (test_train.SMALL, test_train.STAGES))
    test_train_s3diff.shrink(monkeypatch)
    test_train_gramsr.shrink(monkeypatch)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """What degrade.py makes of five smooth pictures, as anybody would: hq/ of 160 x 136 pixels, lq/ of 40 x 34."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "photos").mkdir()
    for i in range(5):
        small = np.random.RandomState(i).randint(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(small).resize((160, 136), Image.Resampling.BICUBIC).save(folder / "photos" / f"{i}.png")
    with pytest.raises(SystemExit) as e:
        degrade.main([str(folder / "photos"), str(folder)])
    assert not e.value.code
    return folder


@pytest.fixture
def own(pairs, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(pairs, tmp_path / "own", ignore=shutil.ignore_patterns(".*"))


def launch(patch, name, pairs, out, *more, **kwargs):
    words = ["--lq", pairs / "lq", *more]
    if name == "vosr":
        if not (out.parent / "ae").exists():
            test_train.launch(patch, pairs / "hq", out.parent / "ae", "autoencoder", "--steps", 1)
        test_train.launch(patch, pairs / "hq", out, "flow", "--init", out.parent / "ae", *words, **kwargs)
    elif name == "s3diff":
        test_train_s3diff.launch(patch, pairs / "hq", out, *words, **kwargs)
    else:
        test_train_gramsr.launch(patch, pairs / "hq", out, "pixel", *words, **kwargs)


# ---- the images


def coordinates(width, height):
    """An image whose every pixel tells where it is: (x, y, 7 x + 13 y) / 4, which its LQ image has, too."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, (7 * x + 13 * y) % 256], 2).astype(np.uint8)


@pytest.mark.parametrize("flip", [False, True])
def test_crops_at_the_same_place(tmp_path, flip):
    """LQ is every fourth pixel of HQ here: so it is in each crop, mirrored or not."""
    for i, (width, height) in enumerate([(100, 80), (48, 120), (32, 32)]):
        x = coordinates(width, height)
        for kind, pixels in (("hq", x), ("lq", x[::4, ::4])):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    partners = find_pairs(tmp_path / "hq", list_photos(tmp_path / "hq"), tmp_path / "lq")
    data = PhotoPairs(tmp_path / "hq", 32, partners, seed=1, flip=flip)
    mirrored, places = 0, set()
    for i in range(60):
        hq, lq = data[i]
        assert hq.shape == (3, 32, 32) and lq.shape == (3, 8, 8)
        first = hq.flip(2) if hq[0, 0, 0] > hq[0, 0, 1] else hq
        mirrored += hq[0, 0, 0] > hq[0, 0, 1]
        assert torch.equal(hq[:, ::4, ::4] if first is hq else hq[:, ::4, 3::4], lq)
        places.add(tuple((255 * first[:2, 0, 0]).round().int().tolist()))
        x, y = (255 * first[:2, 0, 0]).round().int().tolist()
        assert x % 4 == y % 4 == 0 and torch.equal(first, from_uint8(coordinates(x + 32, y + 32)[y:, x:])[0])
    assert len(places) > 20 and (20 < mirrored < 40 if flip else mirrored == 0)
    assert all(torch.equal(a, b) for i in (7, 3) for a, b in zip(data[i], PhotoPairs(tmp_path / "hq", 32, partners, seed=1, flip=flip)[i]))


def test_partners(pairs, own, capsys):
    """By equal names, of another suffix, with x4; what has none is left out, in one line."""
    (own / "lq" / "0.png").rename(own / "lq" / "0x4.png")
    Image.open(own / "lq" / "1.png").save(own / "lq" / "1.bmp"), (own / "lq" / "1.png").unlink()
    (own / "lq" / "2.png").rename(own / "lq" / "two.png")
    capsys.readouterr()
    photos, crops, names = photos_for(own / "hq", 64, 0, lq=own / "lq")
    said = capsys.readouterr().out
    assert names == ["0.png", "1.png", "3.png", "4.png"] and len(photos.files) == 3
    assert said.count("\n") == 2 and f"2 images of {own / 'hq'} and {own / 'lq'} have no partner and are left out, such as" in said
    hq, lq = crops
    assert hq.shape == (16, 3, 64, 64) and lq.shape == (16, 3, 16, 16)
    again, more, _ = photos_for(own / "hq", 64, 0, names, lq=own / "lq")
    assert again.files == photos.files and all(map(torch.equal, crops, more))


def shrink(own):
    Image.open(own / "lq" / "3.png").resize((40, 33)).save(own / "lq" / "3.png")
    return r"lq/3.png: its 40 x 33 pixels are not a quarter a side of the 160 x 136 of .*hq/3.png; pairs are to be x4"


def turn(own):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(own / "lq" / "0.png").save(own / "lq" / "0.png", exif=exif)
    return r"lq/0.png: its 34 x 40 pixels are not a quarter"


def rename_all(own):
    for path in (own / "lq").iterdir():
        path.rename(path.with_name(f"lq-{path.name}"))
    return r"lq: none of its images has the name of one of .*hq, as 0.png would"


def remove_all(own):
    shutil.rmtree(own / "lq")
    return r"lq: no such folder"


def double(own):
    Image.open(own / "hq" / "0.png").save(own / "hq" / "0.bmp")
    Image.open(own / "lq" / "0.png").save(own / "lq" / "0.webp"), (own / "lq" / "0.png").unlink()
    return r"0.webp: .*0.bmp and .*0.png have its name; keep the one that is meant"


@pytest.mark.parametrize("wrong", [shrink, turn, rename_all, remove_all, double])
def test_wrong_pairs_are_one_line(own, wrong):
    """Through a trainer as users run it, whichever: it names the file and ends."""
    pattern = wrong(own)
    with pytest.raises((DataError, PictureError), match=pattern) as e:
        photos_for(own / "hq", 64, 0, lq=own / "lq")
    assert "\n" not in str(e.value)
    status, _, errors = runs.here(ROOT / "train_gramsr.py", "--preset", "tiny", "--stage", "pixel", "--init", "none", "--device", "cpu",
                                  "--data", own / "hq", "--lq", own / "lq", "--out", own / "out")
    assert status == 1 and len(errors.splitlines()) == 1 and errors.startswith("train_gramsr: ")


def test_bad_and_small_pairs_are_skipped(own, capsys):
    (own / "lq" / "4.png").write_bytes(b"no picture")
    for kind, size in (("hq", (60, 136)), ("lq", (15, 34))):
        Image.open(own / kind / "3.png").resize(size).save(own / kind / "3.png")
    photos, _, _ = photos_for(own / "hq", 64, 0, lq=own / "lq")
    said = capsys.readouterr().err
    assert "3.png: its 60 x 136 pixels are less than the crop of 64; skipped" in said and "4.png" in said
    assert {path.name for path in photos.skipped} == {"3.png", "4.png"} and photos[0] and photos[11]


# ---- the trainers


@pytest.fixture
def seen(monkeypatch):
    """All that trainers draw from images. -> list of (hq, recipe, what `low_quality` gave)"""
    found, low_quality = [], training.low_quality
    monkeypatch.setattr(training, "low_quality", lambda *args: found.append((*args[:2], low_quality(*args))) or found[-1][2])
    return found


def is_in(crop, image, step):
    """Whether an image has that crop, or its mirror image, at a place that the step divides."""
    h, w = crop.shape[1:]
    places = [(y, x) for y in range(0, image.shape[1] - h + 1, step) for x in range(0, image.shape[2] - w + 1, step)]
    return [(y, x, m) for y, x in places for m in (False, True)
            if torch.equal(image[:, y : y + h, x : x + w], crop.flip(2) if m else crop)]


@pytest.mark.parametrize("name", ["vosr", "s3diff", "gramsr"])
def test_trainers_learn_from_the_pairs(monkeypatch, pairs, tmp_path, seen, capsys, name):
    """Held-out crops as well as the steps' show a crop of an HQ file and the same of its LQ file, enlarged, nothing else."""
    images = {kind: [from_uint8(np.array(Image.open(path)))[0] for path in sorted((pairs / kind).iterdir())] for kind in ("hq", "lq")}
    launch(monkeypatch, name, pairs, tmp_path / "out", "--steps", 2, "--micro-batch", 1)
    assert "5 photos found" in capsys.readouterr().out and len(seen) == 5 and not [r for _, r, _ in seen if not torch.is_tensor(r)]
    for hq, given, (lq, lq_up) in seen[1:]:
        assert torch.equal(given, lq) and lq_up.shape == hq.shape and 0 <= lq_up.min() and lq_up.max() <= 1
        matches = [(i, place) for i in range(5) for place in is_in(hq[0], images["hq"][i], 4)]
        assert len(matches) == 1
        i, (y, x, m) = matches[0]
        assert (y // 4, x // 4, m) in is_in(lq[0], images["lq"][i], 1)
        assert (lq_up - torch.nn.functional.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1)).abs().max() < 1e-5
    assert newest(tmp_path / "out")["settings"]["lq"] == str(pairs / "lq")
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["vosr", "s3diff", "gramsr"])
def test_resumed_equals_uninterrupted(monkeypatch, pairs, tmp_path, name):
    launch(monkeypatch, name, pairs, tmp_path / "whole")
    launch(monkeypatch, name, pairs, tmp_path / "parts", stop_at=2)
    half = flat(newest(tmp_path / "parts"))
    launch(monkeypatch, name, pairs, tmp_path / "parts", "--workers", 1)
    assert same(flat(newest(tmp_path / "whole")), flat(newest(tmp_path / "parts"))) and not same(half, flat(newest(tmp_path / "parts")))


def test_lq_stays_when_a_run_goes_on(monkeypatch, pairs, own, tmp_path):
    """Another folder is an error, unless --moved says that it is the same; so are degraded photos from there on."""
    launch(monkeypatch, "gramsr", own, tmp_path / "out", stop_at=2)
    with pytest.raises(training.UserError, match="--lq: .* was written with .*own/lq, not None"):
        test_train_gramsr.launch(monkeypatch, own / "hq", tmp_path / "out", "pixel")
    moved = shutil.copytree(own / "lq", tmp_path / "moved")
    words = ["--lq", moved, "--init", test_train_gramsr.a_prior(own / "hq")]
    with pytest.raises(training.UserError, match="--lq: .* was written with .*own/lq, not .*moved; .*--moved if it is the same"):
        test_train_gramsr.launch(monkeypatch, own / "hq", tmp_path / "out", "pixel", *words)
    test_train_gramsr.launch(monkeypatch, own / "hq", tmp_path / "out", "pixel", *words, "--moved")
    assert newest(tmp_path / "out")["step"] == 4


@pytest.mark.parametrize("l2_share", [0.0, 0.5])
def test_scores_of_own_pairs_are_estimated(monkeypatch, pairs, tmp_path, seen, l2_share):
    """S3Diff asks the estimator about the LQ images as they are, as the authors do; nobody knows true scores of own pairs."""
    test_train_s3diff.shrink(monkeypatch, l2_share=l2_share)
    asked, estimate, scored = [], train_s3diff.TinyS3Diff.estimate, []
    monkeypatch.setattr(train_s3diff.TinyS3Diff, "estimate", lambda model, lq: asked.append(lq) or estimate(model, lq))
    forward = train_s3diff.TinyS3Diff.forward
    monkeypatch.setattr(train_s3diff.TinyS3Diff, "forward", lambda model, lq_up, scores, *rest: scored.append((model, scores)) or forward(model, lq_up, scores, *rest))
    launch(monkeypatch, "s3diff", pairs, tmp_path / "out", "--steps", 2, "--micro-batch", 1)
    assert len(asked) == 5 and all(torch.equal(lq, given) for lq, (_, given, _) in zip(asked, seen))
    model = scored[0][0]
    known = {tuple(x.tolist()) for lq in asked for x in estimate(model, lq)}
    assert {tuple(x.tolist()) for _, scores in scored for x in scores} <= known


@pytest.mark.parametrize("script, words, why", [
    (train_vosr, ["--stage", "autoencoder"], "--lq is not read by --stage autoencoder"),
    (train_s3diff, ["--preset", "tiny", "--stage", "prior"], "--lq is not read by --stage prior"),
    (train_s3diff, ["--preset", "tiny", "--stage", "estimator"], "--lq is not read by --stage estimator"),
])
def test_stages_without_pairs(monkeypatch, tmp_path, capsys, script, words, why):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "x", "--lq", "y", "--out", str(tmp_path), *words])
    with pytest.raises(SystemExit) as e:
        script.main()
    assert e.value.code == 2 and why in capsys.readouterr().err


def test_lists_have_no_names_to_compare(pairs, tmp_path):
    (tmp_path / "list.txt").write_text(f"{pairs / 'hq'}\n")
    with pytest.raises(DataError, match="list.txt: with --lq it must be a folder"):
        photos_for(tmp_path / "list.txt", 64, 0, lq=pairs / "lq")
