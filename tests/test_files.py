"""Which files are images, where results go, and how.    python -m pytest tests/test_files.py"""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image

import training
from models.dit import DiTConfig
from models.support import charts, files
from models.support.evaluation import find_references, read_reference, write_text
from models.support.files import (PictureError, WriteError, check_writable, claim, disk_full_or_read_only,
                                  find_pictures, output_paths, whole_file)
from models.support.imaging import save_png, write_picture
from models.support.weights import save_model, save_release

ROOT = Path(__file__).resolve().parents[1]


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
    with pytest.raises(PictureError, match=r"no images in this folder, only 1 x \.heic \(HEIC\)"):
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


def test_what_we_wrote_is_no_input_unless_named(tmp_path):
    """Results, sheets, charts and the page's images are left out of folders; pairs of degrade.py are for reading."""
    x, lines = torch.rand(1, 3, 8, 8), []
    write_picture(tmp_path / "result.png", x), charts.save_sheet(tmp_path / "sheet.png", {"x": x}), charts.loss_curves({}, tmp_path / "loss.png")
    write_picture(tmp_path / "pair.png", x, software="nanoSR degrade.py"), write_picture(tmp_path / "photo.png", x, software="a camera")
    assert [path.name for path in find_pictures(tmp_path, lines.append)] == ["pair.png", "photo.png"]
    assert lines == [f"{tmp_path}: left out 3 x result of nanoSR (taken only if named itself)"]
    assert find_pictures(tmp_path / "result.png") == {tmp_path / "result.png": Path("result.png")}
    assert len(find_pictures(tmp_path, results=True)) == 5 and find_references([Path("sheet.png")], tmp_path) == [(tmp_path / "sheet.png",)]
    for name in ("pair.png", "photo.png"):
        (tmp_path / name).unlink()
    with pytest.raises(PictureError, match=r"no images in this folder, only 3 x result of nanoSR \(taken only if named"):
        find_pictures(tmp_path)


def test_references(tmp_path):
    touch(tmp_path, "a.png", "a.webp", "s/a.png", "b.png", "b.webp", "c.tif", "a.png.jpg")
    names = [Path(name) for name in ("a.png", "a.webp", "s/a.jpg", "b.jpg", "c.png", "d.png", "t/a.png", "a.png.png")]
    found = find_references(names, tmp_path)
    assert [[path.relative_to(tmp_path).as_posix() for path in paths] for paths in found] == [
        ["a.png"], ["a.webp"], ["s/a.png"], ["b.png", "b.webp"], ["c.tif"], [], [], ["a.png.jpg"]]
    assert "b.png and" in read_reference(names[3], found[3], (1, 1))[1] and "named" in read_reference(names[5], (), (1, 1))[1]
    assert find_references(names, tmp_path / "a.png") == [(tmp_path / "a.png",)] * len(names)


def test_references_of_div2k(tmp_path):
    """0801x4.png has 0801.png, where its own name has none."""
    touch(tmp_path, "0801.png", "0802.png", "0802x4.png", "s/a.png", "x4.png")
    names = [Path(name) for name in ("0801x4.png", "0802x4.png", "s/ax4.jpg", "x4.png", "0801x2.png", "0801.jpg")]
    found = find_references(names, tmp_path, 4)
    assert [[path.relative_to(tmp_path).as_posix() for path in paths] for paths in found] == [
        ["0801.png"], ["0802x4.png"], ["s/a.png"], ["x4.png"], [], ["0801.png"]]
    assert find_references([Path("0801x2.5.png")], tmp_path, 2.5) == [(tmp_path / "0801.png",)]
    with pytest.raises(PictureError, match="has no reference for any of 1 images; one of 0801x2.png would have the same name"):
        find_references(names[4:5], tmp_path, 4)
    assert find_references([], tmp_path) == []


# ---- writing

def killed_while_writing(folder):
    """A process that is killed in the middle of a file -> the part that it leaves"""
    program = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from models.support.files import whole_file\n"
               f"with whole_file({str(folder / 'a.png')!r}) as part:\n    part.write_bytes(b'half'), print(part, flush=True), time.sleep(99)")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    part = Path(process.stdout.readline().strip())
    process.kill(), process.wait()
    return part


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_parts_of_killed_runs_are_removed(tmp_path):
    old, kept = killed_while_writing(tmp_path), [".mine.part", "a.png.part", ".1-2.part.txt"]
    touch(tmp_path, *kept)
    assert old.exists()
    new = killed_while_writing(tmp_path)        # which removes the old one, with its first file in this folder
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, new.name]) and new != old
    write_picture(tmp_path / "b.png", torch.rand(1, 3, 8, 8))
    assert new.exists(), "it was written to after this process began, so its own may be at work"


def part_of(path):
    """The temporary name that this thread gives `whole_file`."""
    return path.with_name(f".{os.getpid()}-{threading.get_ident()}.part")


def log_to_full(path):
    log = charts.Log(path, ["step"], 0)
    path.unlink(), path.symlink_to("/dev/full")
    log.write(step=1)


WRITERS = {
    "png": lambda path: save_png(Image.new("RGB", (300, 300)), path),
    "html": lambda path: write_text(path, "x" * 10**5),
    "csv": log_to_full,
    "json": lambda path: save_release(path.parent, {}, {"x": "x" * 10**5}),
    "pt": lambda path: training.write(path, {"x": torch.rand(10**5)})}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk(tmp_path, kind, monkeypatch):
    """Each writer names its file, the reason and a remedy, and leaves nothing."""
    path = tmp_path / ("args.json" if kind == "json" else f"a.{kind}")
    for name in (part_of(path), Path(f"{path}.part")):
        name.symlink_to("/dev/full")
    if kind == "pt":        # whose writer does not say why
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
    with pytest.raises((WriteError, training.UserError)) as e:
        WRITERS[kind](path)
    assert str(e.value).startswith(f"{path}: cannot be written (No space left on device); make room, or choose another folder")
    assert kind == "pt" or disk_full_or_read_only(e.value) and isinstance(e.value, PictureError)
    assert kind == "csv" or not path.exists() and len(os.listdir(tmp_path)) == 1, "only the other link"


def test_safetensors_that_cannot_be_written(tmp_path):
    """Its writer's error is of another class; it is refused here what a disk of 1000 bytes would refuse."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"a.safetensors: cannot be written \(File too large\); choose another folder") as e:
            save_model(tmp_path / "a.safetensors", DiTConfig(), {"x": torch.rand(10**5)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.value.errno == errno.EFBIG and os.listdir(tmp_path) == []


def test_errors_that_end_a_run():
    for number, ends in ((errno.ENOSPC, True), (errno.EROFS, True), (errno.EDQUOT, True), (errno.EACCES, False)):
        with pytest.raises(WriteError) as e, files.writing("a.png"):
            raise OSError(number, os.strerror(number))
        assert disk_full_or_read_only(e.value) == ends and ("make room" in str(e.value)) == (ends and number != errno.EROFS)
    assert not disk_full_or_read_only(PictureError("x")) and not disk_full_or_read_only(KeyError())


def test_out_is_tried_before_the_first_image(tmp_path):
    (tmp_path / "file").touch(), (tmp_path / "dangling").symlink_to("/proc/nowhere"), (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for good in ("new", "new/deep", "there", "there/new", "."):
        check_writable(tmp_path / good)
    for bad in ("file", "file/out", "/proc/nothing", "z" * 300, "dangling/out"):
        with pytest.raises(WriteError, match=f"{bad}: cannot be written .*; choose another folder"):
            check_writable(tmp_path / bad)
    assert sorted(tmp_path.rglob("*")) == before
