"""Photos as training data: folders, lists.    python -m pytest tests/test_photos.py"""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_degrade import save_photos
from torch.utils.data import DataLoader

from models.support import photos as module
from models.support.imaging import write_picture
from models.support.photos import OnDevice, Photos, list_photos, photos_for


def test_photos_are_a_function_of_seed_and_index(tmp_path):
    folder = save_photos(tmp_path, [(40, 50), (64, 32), (90, 40)])
    photos, again = Photos(folder, 32, seed=3, flip=True), Photos(folder, 32, seed=3, flip=True, cache_mb=0)
    assert len(photos) == 3
    drawn = [photos[i] for i in range(12)]
    for i in (11, 0, 7, 3):  # any order, with or without the cache
        assert torch.equal(again[i], drawn[i])
    assert all(x.shape == (3, 32, 32) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1 for x in drawn)
    assert photos.cache and not again.cache
    epochs = [sorted(photos.files[photos.order[j]].name for j in range(3)) for _ in [photos[0], photos[300]]]
    assert epochs == [["0.png", "1.png", "2.png"]] * 2
    a, b = ([tuple(p.order) for i in range(0, 30, 3) if p[i] is not None] for p in (photos, Photos(folder, 32, seed=4)))
    assert a != b  # another seed: another order ...
    a, b = (Photos(folder, 32, seed=seed, files=photos.files[:1]) for seed in (3, 4))
    assert not torch.equal(a[0], b[0])  # ... and other crops


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"flip": True, "shrink": True}])
def test_photos_on_a_device(tmp_path, options):
    """The same crops as a loader's, and a damaged photo is passed over as there."""
    folder = save_photos(tmp_path, [(40, 50), (64, 32), (90, 40), (20, 24), (70, 70)])
    path = folder / "4.png"
    path.write_bytes(path.read_bytes()[:600])
    numbers, device = [*range(5, 29)], torch.device("cpu")
    loader = DataLoader(Photos(folder, 32, 3, **options), batch_size=4, sampler=numbers)
    for x, y in zip(loader, OnDevice(Photos(folder, 32, 3, **options), iter(numbers), 4, device), strict=True):
        assert torch.equal(x, y)


def test_photos_skip_and_name_what_is_no_good(tmp_path, capsys):
    folder = save_photos(tmp_path / "a", [(64, 64), (40, 20), (20, 12)])  # good, to be enlarged, below half of the crop
    (folder / "text.png").write_text("no picture")
    cut = save_photos(tmp_path / "b", [(99, 99)]) / "0.png"
    (folder / "cut.png").write_bytes(cut.read_bytes()[:9000])
    (folder / "._0.png").write_text("a shadow that macOS leaves")
    photos = Photos(folder, 32)
    assert {path.name for path in photos.skipped} == {"2.png", "text.png"}  # by their headers
    assert all(photos[i].shape == (3, 32, 32) for i in range(10))
    assert {path.name for path in photos.skipped} == {"2.png", "text.png", "cut.png"}
    err = capsys.readouterr().err
    assert all(err.count(f"{name}:") == 1 for name in ("2.png", "text.png", "cut.png")) and "3 of 5 files" in err
    with pytest.raises(ValueError, match="none of its 5 images"):
        Photos(folder, 1000)


@pytest.mark.parametrize("bad", [["0"], ["0", "1"], ["0", "3"], ["2"], list("012")])
@pytest.mark.parametrize("damage", [b"no picture", None])
def test_bad_photos_that_sort_first(tmp_path, capsys, bad, damage):
    """One of every 30 that are good is held out; a header may be good and the rest not."""
    folder = save_photos(tmp_path, [(64, 64)] * 5)
    for name in bad:
        path = folder / f"{name}.png"
        path.write_bytes(damage or path.read_bytes()[:600])
    photos, crops, names = photos_for(folder, 32, 0)
    good = sorted({"0", "1", "2", "3", "4"} - set(bad))
    assert crops.shape == (16, 3, 32, 32) and names == [f"{i}.png" for i in range(5)]
    held_out = set(folder.iterdir()) - set(photos.files)
    assert [path.stem for path in held_out] == good[:1]
    assert all(photos[i].shape == (3, 32, 32) for i in range(12)) and {path.stem for path in photos.skipped} == set(bad)
    assert all(capsys.readouterr().err.count(f"{name}.png:") == 1 for name in bad[:1])
    again = photos_for(folder, 32, 0, names)
    assert again[0].files == photos.files and torch.equal(again[1], crops)


def test_held_out_are_one_of_thirty(tmp_path):
    """As they are where all photos are good; a bad one moves no other."""
    folder = save_photos(tmp_path, [(16, 16)] * 65)
    names = [p.name for p in list_photos(folder)]
    held_out = set(names) - {p.name for p in photos_for(folder, 16, 0)[0].files}
    assert held_out == set(names[::30])
    (folder / names[30]).write_text("no picture")
    assert set(names) - {p.name for p in photos_for(folder, 16, 0)[0].files} == held_out - {names[30]} | {names[31]}


def test_too_few_good_photos(tmp_path):
    folder = save_photos(tmp_path, [(64, 64)] * 2)
    (folder / "0.png").write_text("no picture")
    with pytest.raises(ValueError, match="one good photo only, if any; every 30th is held out"):
        photos_for(folder, 32, 0)


def test_names_are_seen_from_their_source(tmp_path, monkeypatch):
    """However it is spelled, of a folder and a list."""
    save_photos(tmp_path / "a" / "deep", [(16, 16)] * 2)
    (tmp_path / "list.txt").write_text("a/deep/0.png\na/deep/1.png\na/deep/1.png\n")
    monkeypatch.chdir(tmp_path)
    for here, names in (("a", ["deep/0.png", "deep/1.png"]), ("list.txt", ["a/deep/0.png", "a/deep/1.png", "a/deep/1.png"])):
        for data in (here, f"./{here}", f"../{tmp_path.name}/{here}", tmp_path / here):
            assert [name.replace(os.sep, "/") for name in photos_for(data, 16, 0)[2]] == names


def test_photos_honour_orientation_and_modes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)).save(tmp_path / "grey.png", exif=exif)
    assert Photos(tmp_path, 40).pixels(tmp_path / "grey.png").shape == (60, 40, 3)


def test_list_photos(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_photos(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images"):
        list_photos(tmp_path)
    save_photos(tmp_path / "deep" / "er", [(8, 8)], ".JPG")
    save_photos(tmp_path, [(8, 8)])
    assert [path.name for path in list_photos(tmp_path)] == ["0.png", "0.JPG"]
    assert list_photos(tmp_path / "0.png") == [tmp_path / "0.png"]


def test_what_is_left_out_is_printed(tmp_path, capsys):
    """As sample.py prints it: linked folders, other kinds of files, what we wrote ourselves; and how many photos are used."""
    folder = save_photos(tmp_path / "a", [(40, 40)] * 5)
    (folder / "b.heic").touch(), (folder / "link").symlink_to(tmp_path), (folder / "cut.png").write_bytes(b"cut")
    write_picture(folder / "out" / "sheet.png", torch.rand(1, 3, 40, 40))
    photos_for(folder, 16, 0)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{folder}: left out 1 x .heic (HEIC), 1 x link to a folder, 1 x result of nanoSR (taken only if named itself)",
                    f"{folder}: 4 photos to train on, 1 held out"]
    (tmp_path / "links").mkdir(), (tmp_path / "links" / "a").symlink_to(folder)
    with pytest.raises(ValueError, match="no images in this folder, only 1 x link to a folder"):
        list_photos(tmp_path / "links")
    assert list_photos(folder / "out" / "sheet.png") == [folder / "out" / "sheet.png"], "named, it is a photo"


def test_lists(tmp_path, capsys):
    """Paths are relative to their list; a line may stand several times; lists may name lists."""
    a, b = save_photos(tmp_path / "a", [(8, 8), (6, 6)]), save_photos(tmp_path / "b, 2019", [(8, 8)])
    (tmp_path / "inner.txt").write_text("a/1.png\n\n# a comment\nb, 2019\n")
    (tmp_path / "list.txt").write_text(3 * f"{a}\n" + 2 * "inner.txt\n" + "b, 2019/0.png\n", encoding="utf-8-sig")
    names = [path.relative_to(tmp_path).as_posix() for path in list_photos(tmp_path / "list.txt")]
    assert names == ["a/0.png", "a/1.png"] * 3 + ["a/1.png", "b, 2019/0.png"] * 2 + ["b, 2019/0.png"]
    photos = Photos(tmp_path / "list.txt", 16)
    epoch = [photos.files[photos.order[j]] for _ in [photos[0]] for j in range(len(photos))]
    assert capsys.readouterr().err.count("a/1.png: its 6 x 6 pixels") == 1  # though it is named three times
    assert len(photos) == 11 and sum(path == a / "0.png" for path in epoch) == 3 and sum(path == b / "0.png" for path in epoch) == 3


@pytest.mark.parametrize("text, words", [
    ("# x\na, 2", r"a, 2: no such .*list.txt, line 2\)"), ("\nnowhere", r"nowhere: no such .*list.txt, line 2\)"), ("", "no images"),
    ("list.txt", r"leads back to itself .*list.txt, line 1\)"), ("other.txt", r"leads back to itself .*other.txt, line 1\)"),
    ("notes.md", r"no source of photos .*list.txt, line 1\)"), ("caf\xe9", "list.txt: is no text in UTF-8"),
])
def test_wrong_lists(tmp_path, text, words):
    save_photos(tmp_path / "a", [(8, 8)])
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "other.txt").write_text("list.txt")
    (tmp_path / "list.txt").write_text(text, encoding="latin-1")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as e:
        list_photos(tmp_path / "list.txt")
    assert "\n" not in str(e.value)


def test_workers_and_processes_share_the_samples(tmp_path):
    """Any division of the numbers i gives what one process reads."""
    folder = save_photos(tmp_path, [(40, 50), (64, 32), (90, 40)])
    one = torch.stack([photo for photo, _ in zip(Photos(folder, 32, seed=5), range(8))])
    for workers in (0, 2):
        ranks = []
        for mine in ([0, 1, 4, 5], [2, 3, 6, 7]):  # steps of 4 samples, 2 on each rank
            ranks.append(list(DataLoader(Photos(folder, 32, seed=5), batch_size=2, sampler=mine, num_workers=workers)))
        assert torch.equal(one, torch.cat([batch for step in zip(*ranks) for batch in step]))


@pytest.mark.parametrize("device, given, started", [("cpu", None, 0), ("cuda", None, 4), ("cuda", 0, 0), ("cpu", 2, 2)])
def test_workers_by_default(monkeypatch, device, given, started):
    options = {}
    monkeypatch.setattr(module, "DataLoader", lambda photos, **more: options.update(more) or [])
    module.batches([], range(1), 1, 0, 1, 1, given, torch.device(device))
    assert options["num_workers"] == started and options["pin_memory"] == (device == "cuda")


def test_shrink_fits_the_shorter_side(tmp_path):
    folder = save_photos(tmp_path, [(120, 60), (50, 100)])
    photos = Photos(folder, 20, shrink=True)
    assert [photos.pixels(path).shape for path in photos.files] == [(20, 40, 3), (40, 20, 3)]
    crop = (photos[0] * 255).round().byte().permute(1, 2, 0).numpy()
    whole = photos.pixels(photos.files[photos.order[0]])
    places = [(y, x) for y in range(whole.shape[0] - 19) for x in range(whole.shape[1] - 19)]
    assert any(np.array_equal(whole[y : y + 20, x : x + 20], crop) for y, x in places)
    assert not torch.equal(photos[0], Photos(folder, 20)[0])
