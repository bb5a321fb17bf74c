"""The command that users run.    python -m pytest tests/test_sample.py

Files, messages and exit statuses are tried with a stand-in for the network; one test runs the real one as users do.
"""

import csv
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import runs
import test_gramsr
import torch
from PIL import Image

import sample
from models import vosr
from models.support import evaluation, imaging
from models.support.arguments import SIGNALS
from models.gramsr import GramSR, GramSRConfig
from models.support.imaging import read_picture, resize, round8, write_picture
from models.s3diff import S3Diff, S3DiffConfig
from models.support.weights import EMBEDDED, save_model

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "models" / "vosr_tiny.safetensors"


class Bicubic:
    """Stands in for VOSR: same calls, no network."""

    @classmethod
    def from_pretrained(cls, name, device, dtype):
        if name not in EMBEDDED:
            raise FileNotFoundError(f"{name}: no such model")
        return cls()

    state_dict = dict       # no weights to blame
    SWEEP = [[{"guidance": 0.0}, {"guidance": 1.0}]]

    def upscale(self, lq, scale, seed, steps=None, guidance=None, weak=None, tile=0, overlap=0, color="adain"):
        if lq.shape[-1] == 13:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if lq.shape[-1] == 14:
            return lq * float("nan")
        return (resize(lq, scale) + 0.02 * torch.rand(1, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("a.png", "--scale", "2") -> exit status, lines on stdout, lines on stderr; inside an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("vosr", "tinyvosr"):
        monkeypatch.setitem(sample.SYSTEMS, name, Bicubic)
    for name in ("NANOSR_CACHE", "HF_HOME", "HF_HUB_CACHE"):    # no public file is at hand
        monkeypatch.setenv(name, str(tmp_path / "cache"))

    def run(*arguments):
        try:
            status = sample.main(["--device", "cpu", *map(str, arguments)])
        except SystemExit as e:
            status, message = (e.code, "") if isinstance(e.code, int) else (1, e.code + "\n")
            sys.stderr.write(message)
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


def picture(path, height=16, width=24, alpha=False):
    x = torch.rand(1, 4, height, width, generator=torch.Generator().manual_seed(height + width))
    write_picture(path, x[:, :3], x[:, 3:] if alpha else None, software="camera")
    return Path(path)


def names(folder):
    return sorted(os.listdir(folder))


def test_files_folders_and_scale(run):
    picture("a.png"), picture("folder/b.png"), picture("folder/c.png", 5, 7)
    status, out, err = run("a.png", "folder", "--scale", "2.5", "--out", "deep/out")
    assert (status, err) == (0, []) and names("deep/out") == ["a.png", "b.png", "c.png", "sheet.png"]
    assert read_picture("deep/out/c.png")[0].shape == (1, 3, round(5 * 2.5), round(7 * 2.5))
    assert any("device cpu" in line and "float32" in line for line in out)
    assert any("24x16 ->" in line and "60x40" in line for line in out)


def test_alpha_is_kept(run):
    picture("a.png", alpha=True)
    assert run("a.png", "--scale", 2)[0] == 0
    _, alpha = read_picture("out/a.png")
    assert torch.equal(alpha, resize(read_picture("a.png")[1], 2))


def test_bad_files_do_not_stop_the_rest(run):
    picture("in/good.png"), Path("in/bad.png").write_text("no"), picture("in/memory.png", 8, 13)
    picture("in/nan.png", 8, 14)
    status, out, err = run("in", "missing.png")
    assert status == 1 and names("out") == ["good.png", "sheet.png"]
    for words in ("in/bad.png: is not an image", "in/memory.png: not enough memory; try --tile 256",
                  "--dtype float32", "missing.png: no such"):
        found = sum(words.replace("/", os.sep) in line for line in err)
        assert found == 2, "once when it happens, once in the list at the end"
    assert err[4] == "done 1, failed 4:"


def test_equal_stems_do_not_collide(run):
    picture("x/a.png"), picture("y/a.png"), picture("y/A-2.png"), picture("y/sheet.png")
    status, out, _ = run("x/a.png", "y/a.png", "y/A-2.png", "y/sheet.png")
    assert status == 0 and names("out") == ["A-2-2.png", "a-2.png", "a.png", "sheet-2.png", "sheet.png"]
    assert sum("is taken" in line for line in out) == 3


def test_no_input_is_overwritten(run):
    picture("a.png"), picture("sheet.png", 8, 8), picture("hq/b.png", 64, 96), picture("b.png")
    before = [Path(p).read_bytes() for p in ("a.png", "sheet.png", "hq/b.png")]
    status, _, err = run("a.png", "sheet.png", "--out", ".")
    assert status == 1 and any("a.png: its result" in line and "overwrite" in line for line in err)
    status, _, err = run("b.png", "--ref", "hq", "--out", "hq")
    assert status == 1 and "overwrite" in err[0]
    assert before == [Path(p).read_bytes() for p in ("a.png", "sheet.png", "hq/b.png")]


def test_foreign_files_are_kept(run):
    """What another program wrote stays; what an earlier run wrote is replaced."""
    picture("photo.jpg.png", 8, 8), Path("mine").mkdir(), os.rename("photo.jpg.png", "a.png")
    for name in ("a.png", "sheet.png", "page.html", "metrics.csv"):
        Path("mine", name).write_bytes(b"of another program")
    before = {name: Path("mine", name).read_bytes() for name in names("mine")}
    status, _, err = run("a.png", "--out", "mine", "--page", "--ref", "a.png")
    assert status == 1 and "a.png: its result" in err[0] and "did not write" in err[0]
    os.rename("a.png", "b.png")
    status, out, err = run("b.png", "--out", "mine", "--page", "--ref", "b.png")
    assert status == 1 and before.items() <= {name: Path("mine", name).read_bytes() for name in names("mine")}.items()
    assert sum("did not write" in line for line in err) == 6 and "b.png" in names("mine")
    for _ in range(2):
        assert run("b.png", "--page", "--ref", "b.png")[0] == 0


def test_folders_in_folders(run):
    for name in ("a.png", "s/a.png", "s/t/b.png", "sweep/a.png"):
        picture(f"lq/{name}"), picture(f"hq/{name}", 64, 96)
    Path("lq/s/c.avif").touch(), Path("hq/notes.txt").touch(), picture("hq/s/t/b.webp.png", 64, 96)
    status, out, err = run("lq", "lq/a.png", "--ref", "hq", "--page", "--sweep")
    assert (status, err) == (0, []) and "lq: left out 1 x .avif (AVIF)" in out and "hq: left out 1 x .txt" in out
    with open("out/metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["picture"] for row in rows] == ["a.png", "s/a.png", "s/t/b.png", "sweep/a-2.png"]
    assert all(row["psnr_y"] for row in rows)
    found = {path.relative_to("out").as_posix() for path in Path("out").rglob("*.png")}
    assert found == {"sheet.png", *(row["picture"] for row in rows), *(f"sweep/{row['picture']}" for row in rows)}
    html = Path("out/page.html").read_text(encoding="utf-8")
    assert "<h2>s/t/b.png</h2>" in html
    assert sum("lq/s/a.png".replace("/", os.sep) in line and "PSNR-Y" in line for line in out) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("during", ["upscale", "sweep"])
def test_stop_and_go_on(run, monkeypatch, number, during):
    """The picture at hand is dropped, the rest is written; --skip-existing ends with what an undisturbed run has."""
    for i in range(6):
        picture(f"in/{i}.png", 16 + i, 16)
    before, upscale, calls = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], Bicubic.upscale, []

    def upscale_or_stop(self, lq, *args, guidance=None, **knobs):
        calls.append(lq.shape[2])
        if lq.shape[2] == 19 and (guidance is None) == (during == "upscale"):
            signal.raise_signal(number)
        return upscale(self, lq, *args, guidance=guidance, **knobs)

    command = ["in", "--ref", "in", "--page", "--sweep", "--scale", 1]
    try:
        monkeypatch.setattr(Bicubic, "upscale", upscale_or_stop)
        status, out, err = run(*command)
        assert status == 130 and err == ["stopped after 3 of 6; add --skip-existing to go on"]
        assert names("out") == ["0.png", "1.png", "2.png", "metrics.csv", "metrics.json", "page.html", "sheet.png",
                                "sweep"]
        assert names("out/sweep") == ["0.png", "1.png", "2.png"]
        assert len(Path("out/metrics.csv").read_text().splitlines()) == 4
        monkeypatch.setattr(Bicubic, "upscale", lambda self, lq, *args, **knobs: calls.append(lq.shape[2])
                            or upscale(self, lq, *args, **knobs))
        calls.clear()
        status, out, err = run(*command, "--skip-existing")
        assert (status, err) == (0, []) and sorted(set(calls)) == [19, 20, 21]
        assert sum("is kept" in line for line in out) == 3
    finally:
        signal.signal(signal.SIGINT, before[0]), signal.signal(signal.SIGTERM, before[1])
    figures = [[row[column] for column in ("picture", "psnr_y", "ssim_y")]
               for row in csv.DictReader(open("out/metrics.csv"))]
    assert run(*command, "--out", "whole")[0] == 0
    assert Path("out/page.html").read_text(encoding="utf-8").count("made earlier") == 3
    assert figures == [[row[column] for column in ("picture", "psnr_y", "ssim_y")]
                       for row in csv.DictReader(open("whole/metrics.csv"))]
    for name in names("out/sweep"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


def test_a_signal_after_the_last_picture_changes_nothing(run, monkeypatch):
    picture("a.png")
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sample.Results, "summarise", lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        assert run("a.png")[::2] == (0, [])
    finally:
        signal.signal(signal.SIGINT, before[0]), signal.signal(signal.SIGTERM, before[1])


def test_existing_results_of_another_size_are_made_anew(run):
    picture("a.png"), run("a.png", "--scale", 2)
    status, out, _ = run("a.png", "--scale", 3, "--skip-existing")
    assert status == 0 and not any("is kept" in line for line in out) and Image.open("out/a.png").size == (72, 48)


def test_large_results_and_references_are_read(run, monkeypatch):
    """The limit of pixels is for files of unknown origin."""
    monkeypatch.setattr(imaging, "MOST_PIXELS", 1000)
    picture("a.png"), picture("hq/a.png", 64, 96)
    for flags in ((), ("--skip-existing",)):
        status, out, err = run("a.png", "--ref", "hq", *flags)
        assert (status, err) == (0, []) and any("is kept" in line for line in out) == bool(flags) and any("PSNR-Y" in line for line in out)


def test_results_are_no_input(run):
    """sample.py . twice does not upscale what it wrote."""
    picture("a.png")
    for again in (False, True):
        status, out, err = run(".", "--ref", ".", "--page", "--sweep", "--scale", 1)
        assert (status, err) == (0, []) and names("out") == ["a.png", "metrics.csv", "metrics.json", "page.html", "sheet.png", "sweep"]
        assert any("3 x result of nanoSR" in line for line in out) == again
    assert run("out/a.png", "--out", "two", "--scale", 1)[0] == 0 and names("two") == ["a.png", "sheet.png"]


def test_no_reference_at_all(run):
    picture("lq/a.png"), picture("hq/b.png")
    status, out, err = run("lq", "--ref", "hq")
    assert status == 1 and len(err) == 1 and "hq: has no reference for any of 1 images" in err[0] and not Path("out").exists()


def test_grey_results_are_grey_files(run):
    x = torch.rand(1, 1, 16, 24).expand(-1, 3, -1, -1)
    write_picture("a.png", x), write_picture("b.png", x, x[:, :1])
    assert run("a.png", "b.png")[0] == 0
    assert [Image.open(f"out/{name}.png").mode for name in "ab"] == ["L", "LA"]


def test_animations_are_named(run):
    first, more = Image.new("RGB", (16, 16), "red"), [Image.new("RGB", (16, 16), "blue")]
    first.save("a.gif", save_all=True, append_images=more), first.save("b.tif", save_all=True, append_images=more)
    status, out, err = run("a.gif", "b.tif")
    assert (status, err) == (0, []) and sum("only the first is read" in line for line in out) == 2


def test_zero_is_a_number_too(run):
    """--temperature 0, --guidance 0 are given, not left out."""
    picture("a.png")
    _, out, _ = run("a.png", "--guidance", 0, "--weak", 0)
    assert any("guidance 0, weak 0" in line for line in out)


def test_lines_of_metrics_name_their_picture(run):
    picture("x/a.png", 16, 24), picture("tiny.png", 2, 2), picture("hq/tiny.png", 8, 8), picture("hq/a.png", 64, 96)
    _, out, err = run("x/a.png", "tiny.png", "--ref", "hq")
    assert all("a.png: " in line for line in out if "PSNR-Y" in line and not line.startswith(("average", "protocol")))
    assert err and all(line.startswith("tiny.png: ") for line in err)


def test_references_and_metrics(run):
    for n, (height, width) in enumerate([(16, 24), (18, 20), (17, 17), (20, 20)]):
        picture(f"lq/{n}.png", height, width)
    picture("hq/0.png", 64, 96), picture("hq/1.png", 72, 80), picture("hq/2.png", 60, 60)
    status, out, err = run("lq", "--ref", "hq")
    assert status == 0 and len(err) == 2 and "is 60x60, not 68x68" in err[0] and "no reference named 3" in err[1]
    assert sum("PSNR-Y" in line for line in out) == 3
    assert any(line.startswith("protocol: pictures 4, references 2") for line in out)
    with open("out/metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["picture"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"] and rows[2]["psnr_y"] == ""
    assert 0 < float(rows[0]["psnr_y"]) < float(rows[0]["psnr_y_bicubic"]) + 3 and -1 < float(rows[1]["ssim_y"]) < 1
    assert "is 60x60" in rows[2]["not_measured"] and "no reference named 3" in rows[3]["not_measured"]
    record = json.loads(Path("out/metrics.json").read_text(encoding="utf-8"))
    assert record["command"].endswith("sample.py --device cpu lq --ref hq")
    assert record["average"]["psnr_y"]["pictures"] == 2
    assert f"protocol: {record['protocol']}" in out and "lpips" in record["not_measured"] and record["weights"] == {}
    run("lq/0.png", "--ref", "hq/0.png", "--out", "one")
    assert "metrics.csv" in names("one")


def test_what_cannot_be_measured_is_named(run):
    picture("a.png"), picture("hq/a.png", 64, 96)
    _, out, _ = run("a.png", "--ref", "hq")
    assert any(all(f in line for f in (*evaluation.LPIPS_FILES, evaluation.NIQE_FILE)) for line in out
               if line.startswith("protocol"))
    picture("hq/a.png", 8, 8)
    status, out, err = run("a.png", "--ref", "hq", "--out", "none")
    assert status == 0 and "average  of nothing" in out and "is 8x8, not 96x64" in err[0]
    assert json.loads(Path("none/metrics.json").read_text())["average"] == {}


def test_page(run):
    picture("a.png"), picture("<b>.png"), picture("hq/a.png", 64, 96)
    status, out, err = run("a.png", "<b>.png", "--ref", "hq", "--page")
    html = Path("out/page.html").read_text(encoding="utf-8")
    assert status == 0 and any("to look at: " in line for line in out) and html.count("<img") == 5
    assert "&lt;b&gt;.png" in html
    assert "sample.py --device cpu a.png &#x27;&lt;b&gt;.png&#x27; --ref hq --page" in html and "vosr-tiny" in html
    run("a.png", "--page", "--out", "plain")        # nothing to measure: nothing is written but said
    assert names("plain") == ["a.png", "page.html", "sheet.png"]
    assert "needs --ref" in Path("plain/page.html").read_text(encoding="utf-8")


def test_seed_is_used(run):
    picture("a.png")
    results = []
    for seed in (0, 0, 1):
        run("a.png", "--seed", seed)
        results.append(Path("out/a.png").read_bytes())
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("arguments", [
    "--scale 9", "--scale x", "--tile -1", "--steps 0", "--ref nowhere", "--niqe nowhere", "--color sepia",
    "--dtype int8", "--seed -1", "--device abacus", "--no-such-flag", "--tile 7", "--tile 64 --overlap 64", "--overlap 0",
    "--temperature nan", "--guidance inf", "--weak 2", "--start-step 1000", "--out big.png"])
def test_usage_errors(run, arguments):
    status, _, err = run(*arguments.split())
    assert status == 2 and "error: " in err[-1] and "Traceback" not in "".join(err)


def test_sweep(run):
    picture("a.png")
    status, out, _ = run("a.png", "--sweep")
    assert status == 0 and Image.open("out/sweep/a.png").width > 2 * 96 and any("turned knobs" in line for line in out)


def test_knobs_of_other_models_are_refused(run):
    picture("a.png")
    for words in (("--noise", 0.5), ("--paper",), ("--negative-prompt", "blur")):
        status, _, err = run("a.png", *words)
        assert status == 1 and err == [f"sample.py: {words[0]} is no knob of vosr-tiny"]


def test_every_knob_is_some_models():
    taken = {knob for system in sample.SYSTEMS.values() for knob in signature(system.upscale).parameters}
    assert {*sample.KNOBS, "paper", "color"} <= taken


def test_unknown_model(run):
    status, _, err = run("--model", "nothing")
    assert status == 1 and err[0].startswith("sample.py: nothing: no such model; name ")


def test_list_weights(run):
    status, out, err = run("--list-weights")
    assert not status and not err and not Path("out").exists()
    assert any("s3diff.pkl" in line for line in out) and "vosr-tiny" in out[-1]


def test_niqe_from_the_weights_cache(tmp_path, monkeypatch):
    """Used when it is there, never downloaded; a file of another size is not it."""
    monkeypatch.setenv("NANOSR_CACHE", str(tmp_path)), monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(evaluation, "load_niqe", lambda path: path)
    assert evaluation.find_niqe(None) is None and evaluation.find_niqe(Path("own.npz")) == Path("own.npz")
    file = tmp_path / evaluation.NIQE_FILE
    file.write_bytes(bytes(100))
    assert evaluation.find_niqe(None) is None
    file.write_bytes(bytes(11850))
    assert evaluation.find_niqe(None) == file


@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"{WEIGHTS} is not there yet; train_vosr.py makes it")
def test_example_with_the_real_model(monkeypatch, tmp_path):
    """From any folder; without a picture it is the example, beside its original."""
    monkeypatch.chdir(tmp_path)
    status, said, err = runs.here(ROOT / "sample.py", "--device", "cpu", "--model", "vosr-tiny")
    assert status == 0, err
    with Image.open(ROOT / "assets" / "example.png") as lq, Image.open(tmp_path / "out" / "example.png") as sr:
        assert sr.size == (lq.width * 4, lq.height * 4)
    assert names(tmp_path / "out") == ["example.png", "metrics.csv", "metrics.json", "sheet.png"] and "PSNR-Y" in said


def test_compile(run, monkeypatch):
    """--compile reaches the networks that do the work, of every system; what it gains only a benchmark shows."""
    names = {}
    with torch.device("meta"):
        for name, system, config in (("vosr", vosr.VOSR, vosr.VOSRConfig()), ("s3diff", S3Diff, S3DiffConfig()),
                                     ("gramsr", GramSR, GramSRConfig())):
            names[name] = {part for part, _ in system(config).named_modules()} & set(sample.COMPILED)
    assert names == {"vosr": {"dit", "vit", "vae.encoder", "vae.decoder"},
                     "s3diff": {"unet", "vae.encoder", "vae.decoder"},
                     "gramsr": {"unet", "vit", "vae.encoder", "vae.decoder"}}
    seen = []

    class Modules(Bicubic, torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dit, self.other = torch.nn.Identity(), torch.nn.Identity()
            self.dit.compile, self.other.compile = lambda: seen.append("dit"), lambda: seen.append("other")

    monkeypatch.setitem(sample.SYSTEMS, "tinyvosr", Modules)
    monkeypatch.setattr(torch, "compile", lambda function: function)       # what the trial compiles
    picture("a.png")
    assert run("a.png")[0] == 0 and seen == []
    assert run("a.png", "--compile")[0] == 0 and seen == ["dit"]


@pytest.mark.parametrize("options, merged", [((), 1), (("--color", "none"), 1), (("--texture", 0.5), 0), (("--pixel", 1), 0), (("--sweep",), 0)])
def test_sets_are_merged_where_scales_stay(run, monkeypatch, options, merged):
    seen = []
    monkeypatch.setattr(GramSR, "merge", lambda self: seen.append(1))
    monkeypatch.setattr(GramSR, "SWEEP", [[{"pixel": 0.5}]])
    model = test_gramsr.make()
    Path("sets").mkdir(), save_model(Path("sets/model.safetensors"), model.cfg, model.state_dict())
    picture("a.png", 8, 8)
    assert run("a.png", "--model", "sets", *options)[0] == 0 and len(seen) == merged


class Dark(Bicubic):
    """Another stand-in, with a knob of its own."""

    def upscale(self, lq, scale, seed, noise=None, **knobs):
        return super().upscale(lq, scale, seed) * (0.5 if noise is None else noise)


def embed(monkeypatch):
    """All three tiny models are there, as stand-ins."""
    monkeypatch.setitem(sample.SYSTEMS, "tinys3diff", Dark), monkeypatch.setitem(sample.SYSTEMS, "tinygramsr", Bicubic)
    monkeypatch.setattr(sample, "EMBEDDED", dict.fromkeys(EMBEDDED, Path(__file__)))


def test_three_models_side_by_side(run, monkeypatch):
    """A folder for each model's results and metrics, one sheet, one page; a knob goes to the models that have it."""
    embed(monkeypatch)
    picture("a.png"), picture("b.png"), picture("hq/a.png", 64, 96)
    status, out, err = run("a.png", "b.png", "--ref", "hq", "--model", "all", "--page", "--noise", 0.25)
    assert status == 0 and len(err) == 1
    assert names("out") == sorted([*EMBEDDED, "page.html", "sheet.png"])
    for name in EMBEDDED:
        assert names(f"out/{name}") == ["a.png", "b.png", "metrics.csv", "metrics.json"]
        assert any(line.startswith(f"average  {name}  PSNR-Y") for line in out)
    means = [read_picture(f"out/{name}/a.png")[0].mean() for name in EMBEDDED]
    assert means[0] == means[2] and 0.2 < means[1] / means[0] < 0.3
    html = Path("out/page.html").read_text(encoding="utf-8")
    assert html.count("<img") == 5 + 4 and html.count('type="radio"') == 10 and "vosr-tiny, s3diff-tiny, gramsr-tiny" in html
    assert Image.open("out/sheet.png").width > 6 * 96 and run("a.png", "--model", "all", "--sweep")[0] == 0
    assert names("out/gramsr-tiny/sweep") == ["a.png"]
    status, _, err = run("a.png", "--model", "all", "--pixel", 1)
    assert status == 1 and err == ["sample.py: --pixel is no knob of all"]


def test_without_arguments(run, monkeypatch):
    """All three on the example, beside its original."""
    embed(monkeypatch)
    status, out, err = run()
    assert (status, err) == (0, []) and sum("average  " in line for line in out) == 3
    lq = Image.open(sample.EXAMPLE)
    assert all(Image.open(f"out/{name}/example.png").width == 4 * lq.width for name in EMBEDDED)


def test_many_pictures_keep_their_order(run):
    """Files are written beside the device's work; lines, tables and sheet are as if they were not."""
    for i in range(9):
        picture(f"in/{i}.png", 8 + i, 12)
    Path("in/4.png").write_text("no picture")
    picture("ref/5.png", 26, 24)
    status, out, err = run("in", "--ref", "ref", "--scale", 2)
    assert status == 1
    assert [line.split(":")[0] for line in out if "->" in line] == [f"in/{i}.png".replace("/", os.sep) for i in range(9)
                                                                    if i != 4]
    with open("out/metrics.csv") as f:
        assert [row["picture"] for row in csv.DictReader(f)] == [f"{i}.png" for i in range(9) if i != 4]
    assert names("out") == [f"{i}.png" for i in range(9) if i != 4] + ["metrics.csv", "metrics.json", "sheet.png"]
    assert sum("in/4.png".replace("/", os.sep) in line for line in err) == 2


# ---- results that are there already

def rows(folder="out"):
    with open(Path(folder, "metrics.csv"), newline="") as f:
        return {row["picture"]: row for row in csv.DictReader(f)}


def test_what_others_made_is_made_anew(run, monkeypatch):
    """--skip-existing keeps what the same model, seed, scale and knobs made; the metrics are of all images."""
    embed(monkeypatch)
    for name in "abc":
        picture(f"in/{name}.png"), picture(f"hq/{name}.png", 64, 96)
    usual = ["in", "--ref", "hq", "--skip-existing"]
    for words, kept in (((), 0), ((), 3), (("--seed", 1), 0), (("--seed", 1), 3), (("--guidance", 0.5), 0), (("--tile", 64), 0),
                        (("--model", "s3diff-tiny"), 0), (("--model", "s3diff-tiny", "--noise", 0.25), 0), ((), 0)):
        status, out, err = run(*usual, *words)
        assert (status, err) == (0, []) and sum("is kept" in line for line in out) == kept, words
    whole = {name: Path("out", name).read_bytes() for name in ("a.png", "b.png", "c.png")}
    assert run("in/b.png", "--seed", 5)[0] == 0 and Path("out/b.png").read_bytes() != whole["b.png"]
    before = rows()
    status, out, _ = run(*usual)
    assert sum("is kept" in line for line in out) == 2 and {name: Path("out", name).read_bytes() for name in whole} == whole
    assert [*rows()] == ["a.png", "b.png", "c.png"] and {name: row["psnr_y"] for name, row in rows().items()} == {
        name: row["psnr_y"] for name, row in before.items()}
    assert json.loads(Path("out/metrics.json").read_text())["average"]["psnr_y"]["pictures"] == 3


def test_what_the_same_folder_made_before_is_made_anew(run):
    """A model that was trained on meanwhile is another one."""
    picture("a.png", 8, 8), Path("mine").mkdir()
    model, found = test_gramsr.make(), []
    for change in (False, False, True):
        if change:
            torch.nn.init.normal_(model.unet.conv_out.bias)
        save_model(Path("mine/model.safetensors"), model.cfg, model.state_dict())
        status, out, _ = run("a.png", "--model", "mine", "--skip-existing")
        assert status == 0
        found.append(any("is kept" in line for line in out))
    assert found == [False, True, False]


# ---- while it runs

def test_metrics_grow_while_images_finish(run, monkeypatch):
    """What a run that is killed has finished is in the table."""
    seen, upscale = [], Bicubic.upscale

    def watch(self, lq, *args, **knobs):
        seen.append(len(rows()) if Path("out/metrics.csv").exists() else 0)
        return upscale(self, lq, *args, **knobs)

    monkeypatch.setattr(Bicubic, "upscale", watch)
    for i in range(8):
        picture(f"in/{i}.png")
    assert run("in", "--ref", "in", "--scale", 1)[0] == 0
    assert seen == [max(i - 1, 0) for i in range(8)] and len(rows()) == 8, "one is written while the next is computed"


def test_how_far_it_is(run):
    for i in range(6):
        picture(f"in/{i}.png", 16 + i, 24)
    Path("in/3.png").write_text("no image")
    for words in ((), ("--skip-existing",)):
        _, out, _ = run("in", *words)
        said = [re.search(r"\[(\d) of 6(, about \d+ s left)?\]", line) for line in out if "[" in line]
        assert [int(found[1]) for found in said][-1] == 6 and len(said) == 5
        assert all(found[2] for found in said[:-1]) and not said[-1][2]
    assert not any("[" in line for line in run("in/0.png")[1])


def be_watched(folder, n, side, found):
    """sample.py on many images in a process of its own; found: gets megabytes in memory before each, now and at most."""
    class Watched(Bicubic):
        def upscale(self, lq, **knobs):
            status = dict(line.split(":") for line in open("/proc/self/status"))
            print(*(int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")), file=file, flush=True)
            return super().upscale(lq, **knobs)

    os.chdir(folder), torch.set_num_threads(1)
    picture("in/0.png", side, side), picture("hq/0.png", 4 * side, 4 * side)
    for i in range(1, n):
        os.link("in/0.png", f"in/{i}.png"), os.link("hq/0.png", f"hq/{i}.png")
    sys.stdout, sample.SYSTEMS["tinyvosr"] = open(os.devnull, "w"), Watched
    with open(found, "w") as file:
        assert sample.main(["in", "--ref", "hq", "--device", "cpu"]) == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("side, most", [(64, 20), pytest.param(256, 50, marks=pytest.mark.slow)])
def test_memory_does_not_grow(tmp_path, side, most):
    """From the tenth of 60 images on it stays as it is: megabytes, less than half of what one result each would add.

    The peak of large ones depends on what the two threads do at one time, so there their usual memory is compared.
    """
    (tmp_path / "work").mkdir()
    process = runs.fork(be_watched, tmp_path / "work", 60, side, tmp_path / "found")
    process.join()
    now, peak = np.loadtxt(tmp_path / "found").T
    assert process.exitcode == 0 and len(now) == 60
    assert np.median(now[40:]) - np.median(now[10:20]) < most
    assert side > 64 or peak[-1] - peak[10] < most


# ---- where results go

def test_out_is_tried_first(run, monkeypatch):
    """One line before a model is loaded."""
    monkeypatch.setattr(Bicubic, "from_pretrained", None)
    picture("a.png"), Path("file").touch()
    for out in ("file", "file/out", "z" * 300):
        status, said, err = run("a.png", "--out", out)
        assert (status, said) == (1, []) and len(err) == 1 and f"{out}: cannot be written (" in err[0] and "choose another folder" in err[0]
    assert names(".") == ["a.png", "file"]


@pytest.mark.parametrize("number, ends", [(errno.ENOSPC, True), (errno.EROFS, True), (errno.EDQUOT, True), (errno.EACCES, False)])
def test_a_disk_that_refuses(run, monkeypatch, number, ends):
    """Where no other result can be written, either, nothing more is computed."""
    save, upscale, calls = Image.Image.save, Bicubic.upscale, []

    def refuse(img, path, **options):
        if len(calls) >= 3:
            raise OSError(number, os.strerror(number))
        save(img, path, **options)

    monkeypatch.setattr(Bicubic, "upscale", lambda self, lq, *args, **knobs: calls.append(1) or upscale(self, lq, *args, **knobs))
    for i in range(9):
        picture(f"in/{i}.png")
    monkeypatch.setattr(Image.Image, "save", refuse)
    status, out, err = run("in", "--ref", "in", "--scale", 1)
    assert status == 1 and f"cannot be written ({os.strerror(number)}); " in err[0] and "0.png" not in err[0]
    if ends:
        assert len(calls) <= 5 and re.fullmatch(r"stopped after [123] of 9; add --skip-existing to go on", err[-1])
    else:
        assert len(calls) == 9 and len(err) > 9


def test_a_full_disk(run, small_disk):
    """A line for each result that was computed by then, each with its name and a remedy; with more room it goes on."""
    for i in range(12):
        picture(f"in/{i:02}.png", 64, 64)
    flags = "in", "--out", small_disk, "--ref", "in/00.png"
    status, out, err = run(*flags)
    written = [name for name in names(small_disk) if name != "metrics.csv"]
    refused = [line for line in err if "cannot be written" in line and line[0] != " "]
    assert status == 1 and 2 < len(written) < 10 and 1 <= len(refused) <= 3
    assert all("(No space left on device); make room, or choose another folder" in line for line in refused)
    assert err[-1] == f"stopped after {len(written)} of 12; add --skip-existing to go on"
    assert all(read_picture(small_disk / name)[0].shape == (1, 3, 256, 256) for name in written)
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    status, out, _ = run(*flags, "--skip-existing")
    assert status == 0 and sum("is kept" in line for line in out) == len(written) and len(names(small_disk)) == 15


def test_a_disk_that_becomes_read_only(run, monkeypatch, small_disk):
    upscale, calls = Bicubic.upscale, []

    def watch(self, lq, *args, **knobs):
        calls.append(1)
        if len(calls) == 3:
            subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        return upscale(self, lq, *args, **knobs)

    monkeypatch.setattr(Bicubic, "upscale", watch)
    for i in range(12):
        picture(f"in/{i:02}.png", 16, 16)
    status, _, err = run("in", "--out", small_disk)
    assert status == 1 and len(calls) <= 5 and "(Read-only file system); choose another folder" in err[0]
    assert "stopped after" in err[-1]
    status, out, err = run("in", "--out", small_disk)
    assert status == 1 and len(err) == 1 and "(Read-only file system)" in err[0] and len(calls) <= 5


def test_the_same_folder_for_photos_and_results(run, monkeypatch):
    """sample.py . again and again: photos alone are enlarged, also by a run that goes on."""
    for name in ("a.png", "trip/b.png", "trip/c.png"):
        picture(name)
    upscale = Bicubic.upscale
    monkeypatch.setattr(Bicubic, "upscale", lambda self, lq, *args, **knobs: signal.raise_signal(signal.SIGINT) if lq.shape[2] == 17
                        else upscale(self, lq, *args, **knobs))
    picture("trip/c.png", 17)
    assert run(".", "--out", ".", "--page")[0] == 1     # a.png itself is in the way
    status, _, err = run(".")
    assert status == 130 and err == ["stopped after 2 of 3; add --skip-existing to go on"]
    monkeypatch.setattr(Bicubic, "upscale", upscale)
    status, out, err = run(".", "--skip-existing")
    assert (status, err) == (0, []) and sum("is kept" in line for line in out) == 2
    for flags in ((), ("--sweep",), ()):
        assert run(".", *flags)[0] == 0
    found = {path.relative_to("out").as_posix() for path in Path("out").rglob("*.png")}
    assert found == {"sheet.png", *(f"{top}{name}" for top in ("", "sweep/") for name in ("a.png", "trip/b.png", "trip/c.png"))}


def test_home_folder(run, monkeypatch):
    """In every path; shells leave ~ in --out=~/x."""
    monkeypatch.setenv("HOME", os.getcwd()), monkeypatch.setenv("USERPROFILE", os.getcwd())
    Path("work").mkdir(), Path("sets").mkdir(), monkeypatch.chdir("work")
    model = test_gramsr.make()
    save_model(Path("../sets/model.safetensors"), model.cfg, model.state_dict())
    picture("../a.png", 8, 8), picture("../hq/a.png", 32, 32), np.savez("../niqe.npz", x=1)
    status, _, err = run("~/a.png", "--out=~/big", "--ref=~/hq", "--model=~/sets")
    assert (status, err) == (0, []) and names("../big") == ["a.png", "metrics.csv", "metrics.json", "sheet.png"]
    status, _, err = run("~/a.png", "--niqe=~/niqe.npz")
    assert status == 1 and "niqe.npz: not NIQE's parameter file" in err[0] and names(".") == []
    assert sample.load("~/sets", "cpu")("~/a.png").size == (32, 32)


# ---- in notebooks

@pytest.fixture(scope="module")
def nano():
    return sample.load("vosr-tiny", "cpu")


def tensor_of(image):
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)[None] / 255


def test_an_image_of_any_kind(nano, tmp_path):
    """And the result is of the same kind, with the same numbers."""
    x = round8(torch.rand(1, 3, 12, 20, generator=torch.Generator().manual_seed(0)))
    wanted, array = nano(x), (x[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert wanted.shape == (1, 3, 48, 80) and wanted.dtype == torch.float32 and 0 <= wanted.min() and wanted.max() <= 1
    image = Image.fromarray(array)
    image.save(tmp_path / "a.png")
    made = nano(array)
    assert made.shape == (48, 80, 3) and made.dtype == np.uint8 and torch.equal(tensor_of(made), round8(wanted))
    for given in (image, str(tmp_path / "a.png"), tmp_path / "a.png"):
        made = nano(given)
        assert isinstance(made, Image.Image) and made.mode == "RGB" and torch.equal(tensor_of(made), round8(wanted))
    assert torch.equal(nano(x.double()), wanted.double()) and nano(x.half()).dtype == torch.float16
    assert torch.equal(nano(x, seed=1, temperature=0.0), nano(x, temperature=0.0)) and not torch.equal(nano(x, seed=1), wanted)
    assert nano(image, scale=2).size == (40, 24) and isinstance(nano.model, torch.nn.Module)
    assert sample.load(dtype=torch.float32, device=torch.device("cpu"))(array).shape == (48, 80, 3)


def test_grey_alpha_palettes_and_orientation(nano):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (10, 14, 4), dtype=np.uint8), "RGBA")
    grey, opaque = image.convert("L"), image.convert("RGB")
    assert nano(grey).mode == "L" and nano(np.asarray(grey)).shape == (40, 56) and nano(np.asarray(grey)[..., None]).shape == (40, 56, 1)
    assert np.array_equal(nano(grey), nano(np.asarray(grey))) and nano(opaque).mode == "RGB"
    assert nano(grey.convert("RGB")).mode == "RGB" and nano(grey.point(lambda x: 257 * x, "I")).mode == "L"
    made = nano(image)
    assert made.mode == "RGBA" and np.array_equal(made.getchannel("A"), image.getchannel("A").resize((56, 40), Image.Resampling.BICUBIC))
    assert nano(image.convert("LA")).mode == "LA" and nano(image.convert("1")).mode == "L" and nano(opaque.convert("CMYK")).mode == "RGB"
    palette = opaque.quantize(8)
    assert palette.mode == "P" and np.array_equal(nano(palette), nano(palette.convert("RGB")))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6        # turned by 90 degrees
    opaque.save(file, "PNG", exif=exif)
    assert nano(Image.open(file)).size == (40, 56)


WRONG = {   # each with words of its message
    "bytes": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "not torch.uint8; divide by 255"),
    "0 to 255": (torch.full((1, 3, 8, 8), 255.0), "not one from 255 to 255"), "-1 to 1": (torch.linspace(-1, 1, 192).view(1, 3, 8, 8), "from -1 to 1"),
    "no number": (torch.full((1, 3, 8, 8), float("nan")), "from nan to nan"), "no batch": (torch.zeros(3, 8, 8), "shape (3, 8, 8)"),
    "channels last": (torch.zeros(1, 8, 8, 3), "shape (1, 8, 8, 3)"), "alpha": (torch.zeros(1, 4, 8, 8), "shape (1, 4, 8, 8)"),
    "empty": (torch.zeros(0, 3, 8, 8), "shape (0, 3, 8, 8)"), "list": ([[0.5]], "not list"), "None": (None, "not NoneType"),
    "array CHW": (np.zeros((3, 8, 8), np.uint8), "must be (H, W, 3) or (H, W) uint8, not (3, 8, 8) uint8"),
    "float array": (np.zeros((8, 8, 3)), "not (8, 8, 3) float64"), "array of a batch": (np.zeros((1, 8, 8, 3), np.uint8), "not (1, 8, 8, 3) uint8"),
    "missing": ("nowhere.png", "nowhere.png: no such file"), "folder": (Path(), "is a folder; name an image in it"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_image_is_one_line(nano, kind):
    image, words = WRONG[kind]
    with pytest.raises(ValueError) as e:
        nano(image)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name, knobs", [("vosr-tiny", {"temperature": 0.0}), ("vosr-tiny", {"temperature": 0.0, "steps": 2, "guidance": 0.5}),
                                         ("s3diff-tiny", {}), ("s3diff-tiny", {"guidance": 1}), ("gramsr-tiny", {}), ("gramsr-tiny", {"pixel": 0.5})])
@pytest.mark.parametrize("tile", [0, 64])
def test_several_images(name, knobs, tile):
    """In one tile or beyond one, each comes out as if it were alone, but for rounding."""
    nano = sample.load(name, "cpu")
    x = torch.rand(2, 3, 20, 36, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([nano(one, tile=tile, **knobs) for one in x.split(1)])
    assert not torch.allclose(*alone, atol=0.1)
    torch.testing.assert_close(nano(x, tile=tile, **knobs), alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name, knobs", [("s3diff-tiny", {"guidance": 1}), ("gramsr-tiny", {})])
def test_small_tiles_are_few(name, knobs):
    """--tile alone, as an error of little memory proposes: tiles share half of themselves, not all but a cell."""
    nano, tiles = sample.load(name, "cpu"), []
    nano.model.unet.register_forward_pre_hook(lambda _, args: tiles.append(len(args[0])))
    nano(torch.rand(1, 3, 40, 40), tile=64, **knobs)
    assert sum(tiles) == 4 * 4


class Notebook(io.TextIOBase):
    """What stands in for stdout there: no file, nothing to configure."""

    encoding = "UTF-8"

    def __init__(self):
        self.said = ""

    def write(self, text):
        self.said += text
        return len(text)


def test_main_in_a_notebook(run, monkeypatch):
    """Twice, with arguments, beside another program's signals, and in a thread, which has none."""
    for i in range(3):
        picture(f"in/{i}.png")
    stream, handlers, status = Notebook(), {number: (lambda *_: None) for number in SIGNALS}, []
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    monkeypatch.setattr(sys, "stdout", stream)
    try:
        for _ in range(2):
            status.append(sample.main(["in", "--device", "cpu", "--ref", "in", "--scale", "1", "--page"]))
        thread = threading.Thread(target=lambda: status.append(sample.main(["in", "--device", "cpu", "--out", "thread"])))
        thread.start(), thread.join()
        assert {number: signal.getsignal(number) for number in SIGNALS} == handlers
    finally:
        [signal.signal(number, handler) for number, handler in before.items()]
    assert status == [0, 0, 0] and stream.said.count("[3 of 3]") == 3 and sys.stdout is stream
    assert json.loads(Path("out/metrics.json").read_text())["command"] == "python sample.py in --device cpu --ref in --scale 1 --page"


def test_another_default_device(nano):
    """A notebook that has begun with torch.set_default_device("cuda"); here all that falls on it is empty."""
    x, nanos = torch.rand(1, 3, 20, 36), [(nano, {}), *((sample.load(name, "cpu"), {}) for name in ("s3diff-tiny", "gramsr-tiny"))]
    for nano, knobs in [*nanos, *((nano, {"tile": 64}) for nano, _ in nanos), (nanos[0][0], {"color": "adain"}), (nanos[1][0], {"start_step": 100})]:
        wanted = nano(x, **knobs)
        try:
            torch.set_default_device("meta")
            found = nano(x, **knobs)
        finally:
            torch.set_default_device(None)
        assert torch.equal(found, wanted), knobs


# ---- output that goes into a file or a pipe

def test_lines_come_one_by_one(tmp_path):
    """And no bars among them."""
    for i in range(40):
        picture(tmp_path / f"in/{i:02}.png", 24, 24)
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", "in", "--device", "cpu"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = []       # results that were there when a line came
    for line in process.stdout:
        assert "\r" not in line and "it/s" not in line
        if "->" in line:
            seen.append(len(names(tmp_path / "out")))
    assert process.wait() == 0 and len(seen) == 40 and seen[0] < 10 and seen == sorted(seen)
