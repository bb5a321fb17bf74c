"""Which files are pictures, where results go.    python -m pytest tests/test_files.py"""

import os
from pathlib import Path

import pytest

from models.support.evaluation import find_references, read_reference
from models.support.files import PictureError, claim, find_pictures, output_paths


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_folders_in_folders(tmp_path):
    touch(tmp_path, "b.PNG", "a/c.jpg", "a/a/d.jfif", "e.mpo", "f.gif", "g.ppm", ".hidden.png", ".hidden/h.png", "i.avif", "a/j.AVIF", "k.txt", "l")
    os.symlink("a", tmp_path / "link")
    lines = []
    names = find_pictures(tmp_path, lines.append)
    assert [name.as_posix() for name in names.values()] == ["a/a/d.jfif", "a/c.jpg", "b.PNG", "e.mpo", "f.gif", "g.ppm"]
    assert all(path == tmp_path / name for path, name in names.items())
    assert lines == [f"{tmp_path}: left out 2 x .avif (AVIF), 1 x .txt, 1 x link to a folder, 1 x without suffix"]
    assert find_pictures(tmp_path / "a" / "c.jpg", print) == {tmp_path / "a" / "c.jpg": Path("c.jpg")}
    touch(tmp_path / "none", "a.heic")
    with pytest.raises(PictureError, match=r"no pictures in this folder, only 1 x \.heic \(HEIC\)"):
        find_pictures(tmp_path / "none")


def test_names_of_results():
    names = {Path(f"in/{name}"): Path(name) for name in ("a.png", "A.jpg", "s/a.png", "s/a.tif", "sheet.png", "s/sheet.png")}
    lines = []
    assert [path.as_posix() for path in output_paths(names, Path("out"), note=lines.append)] == [
        "out/a.png", "out/A-2.png", "out/s/a.png", "out/s/a-2.png", "out/sheet-2.png", "out/s/sheet.png"]
    assert len(lines) == 3 and all("is taken" in line for line in lines)


def test_nothing_foreign_is_overwritten(tmp_path):
    ours = {"a.png": b"\x89PNG....tEXtSoftware\0nanoSR", "m.csv": b"picture,width,height,seconds,psnr_y", "m.json": b'{\n  "command": "python sample.py a'}
    for name, head in {**ours, "photo.png": b"\x89PNG", "mine.csv": b"my,own", "empty": b""}.items():
        (tmp_path / name).write_bytes(head)
    for name in (*ours, "new.png"):
        claim(tmp_path / name, "in.png", set())
    for name in ("photo.png", "mine.csv", "empty"):
        with pytest.raises(PictureError, match="in.png: its result .* would overwrite a file that nanoSR did not write"):
            claim(tmp_path / name, "in.png", set())
    with pytest.raises(PictureError, match="would overwrite an input"):
        claim(tmp_path / "a.png", "in.png", {os.path.realpath(tmp_path / "a.png")})


def test_references(tmp_path):
    touch(tmp_path, "a.png", "a.webp", "s/a.png", "b.png", "b.webp", "c.tif", "a.png.jpg")
    names = [Path(name) for name in ("a.png", "a.webp", "s/a.jpg", "b.jpg", "c.png", "d.png", "t/a.png", "a.png.png")]
    found = find_references(names, tmp_path)
    assert [[path.relative_to(tmp_path).as_posix() for path in paths] for paths in found] == [
        ["a.png"], ["a.webp"], ["s/a.png"], ["b.png", "b.webp"], ["c.tif"], [], [], ["a.png.jpg"]]
    assert "b.png and" in read_reference(names[3], found[3], (1, 1))[1] and "named" in read_reference(names[5], (), (1, 1))[1]
    assert find_references(names, tmp_path / "a.png") == [(tmp_path / "a.png",)] * len(names)
