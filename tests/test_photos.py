"""Photos as training data: folders, lists, tar shards.    python -m pytest tests/test_photos.py"""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_degrade import save_photos
from torch.utils.data import DataLoader

from models.photos import Member, Photos, list_photos


def pack(folder, tar, mode="w"):
    """All files of a folder in a .tar, with what should not be found there."""
    with tarfile.open(tar, mode) as t:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            t.add(path, path.relative_to(folder))
        for name in ("notes.txt", "._0.png"):
            info = tarfile.TarInfo(name)
            info.size = 5
            t.addfile(info, io.BytesIO(b"hello"))
    return tar


def test_photos_are_a_function_of_seed_and_index(tmp_path):
    folder = save_photos(tmp_path, [(40, 50), (64, 32), (90, 40)])
    photos, again = Photos(folder, 32, seed=3, flip=True), Photos(folder, 32, seed=3, flip=True, cache_mb=0)
    assert len(photos) == 3
    drawn = [photos[i] for i in range(12)]
    for i in (11, 0, 7, 3):  # any order, with or without the cache
        assert torch.equal(again[i], drawn[i])
    assert all(x.shape == (3, 32, 32) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1 for x in drawn)
    assert not torch.equal(Photos(folder, 32, seed=4)[0], drawn[0])
    epochs = [sorted(photos.files[photos.order[j]].name for j in range(3)) for _ in [photos[0], photos[300]]]
    assert epochs == [["0.png", "1.png", "2.png"]] * 2


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
    with pytest.raises(ValueError, match="none of its 5 pictures"):
        Photos(folder, 1000)


def test_photos_honour_orientation_and_modes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)).save(tmp_path / "grey.png", exif=exif)
    assert Photos(tmp_path, 40).pixels(tmp_path / "grey.png").shape == (60, 40, 3)


def test_list_photos(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_photos(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no pictures"):
        list_photos(tmp_path)
    save_photos(tmp_path / "deep" / "er", [(8, 8)], ".JPG")
    save_photos(tmp_path, [(8, 8)])
    assert [path.name for path in list_photos(tmp_path)] == ["0.png", "0.JPG"]


def test_lists_with_weights(tmp_path):
    """Paths are relative to their list; a comma may belong to a name; lists may name lists."""
    a, b = save_photos(tmp_path / "a", [(8, 8), (9, 9)]), save_photos(tmp_path / "b, 2019", [(8, 8)])
    (tmp_path / "inner.txt").write_text("a/1.png\n\n# a comment\nb, 2019, 1\n")
    (tmp_path / "list.txt").write_text(f"{a}, 3\ninner.txt,2\nb, 2019/0.png\n")
    names = [path.relative_to(tmp_path).as_posix() for path in list_photos(tmp_path / "list.txt")]
    assert names == ["a/0.png", "a/1.png"] * 3 + ["a/1.png", "b, 2019/0.png"] * 2 + ["b, 2019/0.png"]
    photos = Photos(tmp_path / "list.txt", 8)
    epoch = [photos.files[photos.order[j]] for _ in [photos[0]] for j in range(len(photos))]
    assert len(photos) == 11 and sum(path == a / "0.png" for path in epoch) == 3 and sum(path == b / "0.png" for path in epoch) == 3


@pytest.mark.parametrize("text, words", [
    ("a, 0", "list.txt, line 1: the weight 0"), ("# x\na, -2", "line 2: the weight -2"), ("nowhere", r"nowhere: no such .*named in .*list.txt"),
    ("list.txt", "leads back to itself"), ("other.txt", "leads back to itself"), ("", "no pictures"), ("notes.md", "no source of photos"),
])
def test_wrong_lists(tmp_path, text, words):
    save_photos(tmp_path / "a", [(8, 8)])
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "other.txt").write_text("list.txt")
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as e:
        list_photos(tmp_path / "list.txt")
    assert "\n" not in str(e.value)


def test_tar_equals_folder(tmp_path):
    folder = save_photos(tmp_path / "a", [(40, 50), (64, 32), (90, 40)])
    save_photos(folder / "deep", [(33, 44)], ".JPG")
    shards = tmp_path / "shards"
    shards.mkdir()
    tar = pack(folder, shards / "0.tar")
    found = list_photos(shards)
    assert found == list_photos(tar) and [member.name for member in found] == [p.relative_to(folder).as_posix() for p in list_photos(folder)]
    assert found[0].open().read() == (folder / "0.png").read_bytes() and str(found[0]) == f"{tar}/0.png"
    inside, outside = Photos(tar, 32, seed=1), Photos(folder, 32, seed=1)
    assert all(torch.equal(inside[i], outside[i]) for i in range(9))
    (shards / "1.png").write_bytes((folder / "0.png").read_bytes())
    assert len(list_photos(shards)) == 5


def test_wrong_tars(tmp_path, capsys):
    folder = save_photos(tmp_path / "a", [(64, 64), (64, 64)])
    with pytest.raises(ValueError, match="x.tar: cannot be read as a plain .tar .*unpack it"):
        list_photos(pack(folder, tmp_path / "x.tar", "w:gz"))
    whole = pack(folder, tmp_path / "y.tar")
    members = list_photos(whole)
    data = bytearray(whole.read_bytes())
    data[members[0].offset : members[0].offset + 8] = b"no PNG :"
    whole.write_bytes(data)
    photos = Photos(whole, 32)
    assert photos[0].shape == (3, 32, 32) and list(photos.skipped) == [members[0]]
    assert f"{whole}/0.png: is not a picture" in capsys.readouterr().err
    cut = tmp_path / "z.tar"
    cut.write_bytes(data[: members[1].offset + 1000])
    photos = Photos(cut, 32, files=[members[0], Member(cut, "1.png", members[1].offset, members[1].size), folder / "0.png"])
    assert all(photos[i].shape == (3, 32, 32) for i in range(3)) and len(photos.skipped) == 2


def test_workers_and_processes_share_the_samples(tmp_path):
    """Any division of the numbers i gives what one process reads."""
    tar = pack(save_photos(tmp_path / "a", [(40, 50), (64, 32), (90, 40)]), tmp_path / "0.tar")
    one = torch.stack([photo for photo, _ in zip(Photos(tar, 32, seed=5), range(8))])
    for workers in (0, 2):
        batches = [torch.cat(list(DataLoader(Photos(tar, 32, seed=5), batch_size=2, sampler=[4 * step + 2 * rank + i for step in range(2) for i in range(2)],
                                             num_workers=workers))) for rank in range(2)]
        assert torch.equal(one, torch.cat([batches[0][:2], batches[1][:2], batches[0][2:], batches[1][2:]]))


def test_shrink_fits_the_shorter_side(tmp_path):
    folder = save_photos(tmp_path, [(120, 60), (50, 100)])
    photos = Photos(folder, 20, shrink=True)
    assert [photos.pixels(path).shape for path in photos.files] == [(20, 40, 3), (40, 20, 3)]
    whole = photos.pixels(photos.files[photos.order[0]] if photos[0] is not None else None)
    crop = (photos[0] * 255).round().byte().permute(1, 2, 0).numpy()
    places = [(y, x) for y in range(whole.shape[0] - 19) for x in range(whole.shape[1] - 19)]
    assert any(np.array_equal(whole[y : y + 20, x : x + 20], crop) for y, x in places)
    assert not torch.equal(photos[0], Photos(folder, 20)[0])
