"""What is measured, how it is said, and what a later reader finds in metrics.json.    python -m pytest tests/test_evaluation.py

Figures of NIQE are in golden/degrade.json, of LPIPS in test_lpips.py.
"""

import csv
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import requests
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cases_vosr import fill_module  # noqa: E402
from models.support import weights  # noqa: E402
from models.support.evaluation import (LPIPS_FILES, METRICS, NIQE_FILE, average, find_metrics, measure, protocol,  # noqa: E402
                               read_reference, record_of, report, row_of, write_metrics)
from models.support.imaging import read_picture, resize, round8, write_picture  # noqa: E402
from models.lpips import LPIPS  # noqa: E402
from models.support.download import sha256_of  # noqa: E402

PUBLIC = ROOT.parent / "shared" / "public"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no way to download."""
    folder = tmp_path / "cache"
    for name in ("NANOSR_CACHE", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setattr(requests, "get", lambda *_, **__: pytest.fail("a download"))
    folder.mkdir()
    return folder


@pytest.fixture
def lpips(cache, monkeypatch):
    """AlexNet with random numbers, and heads, under their public names in the cache -> the model they make"""
    model = fill_module(LPIPS("alex")).requires_grad_(False)
    trunk, heads = LPIPS_FILES
    for i in range(5):
        weight = model.get_submodule(f"lin{i}.model.1").weight
        weight.data = weight.abs()
    tensors = model.state_dict()
    torch.save({k: v for k, v in tensors.items() if k.startswith("features")} | {"classifier.1.weight": torch.zeros(2)}, cache / trunk)
    torch.save({k: v for k, v in tensors.items() if k.startswith("lin")}, cache / heads)
    for name in LPIPS_FILES:        # these have another size than the public ones
        monkeypatch.setitem(weights.FILES, name, dataclasses.replace(weights.FILES[name], size=None, sha256=None))
    return model


def example():
    """-> ours, bicubic's, reference (1, 3, 400, 512)"""
    lq, hq = (read_picture(ROOT / "assets" / file)[0] for file in ("example.png", "example_hq.png"))
    bicubic = resize(lq, hq.shape[-2:])
    return round8(0.5 * bicubic + 0.5 * hq), bicubic, hq


# -----------------------------------------------------------------------------
# figures

@pytest.mark.parametrize("border", [4, 0])
def test_equals_scikit_image_on_the_example(cache, border):
    """The whole way, border included, on a real picture; scikit-image's own luma and similarity."""
    reference = pytest.importorskip("skimage.metrics", reason="scikit-image is a reference for this test only")
    from skimage.color import rgb2ycbcr
    sr, bicubic, hq = example()
    (found,), failed = measure([sr], bicubic, hq, find_metrics(True, border, lpips=LPIPS.from_pretrained)[0])
    assert list(found) == ["psnr_y", "psnr_y_bicubic", "ssim_y", "ssim_y_bicubic"] and failed == {}
    y = [rgb2ycbcr(x[0].permute(1, 2, 0).double().numpy())[border : 400 - border, border : 512 - border, 0] for x in (sr, bicubic, hq)]
    for end, x in zip(("", "_bicubic"), y):
        assert found["psnr_y" + end] == pytest.approx(reference.peak_signal_noise_ratio(y[2], x, data_range=255), abs=1e-4)
        _, whole = reference.structural_similarity(y[2], x, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)
        assert found["ssim_y" + end] == pytest.approx(whole[5:-5, 5:-5].mean(), abs=1e-5)


def test_lpips_from_the_cache(cache, lpips):
    sr, bicubic, hq = example()
    metrics, absent, files = find_metrics(True, 4, lpips=LPIPS.from_pretrained)
    assert list(absent) == ["niqe"] and [path.name for path in files] == list(LPIPS_FILES)
    (found,), _ = measure([sr], bicubic, hq, metrics)
    ours, theirs = (lpips(2 * x - 1, 2 * hq - 1).item() for x in (sr, bicubic))
    assert (found["lpips"], found["lpips_bicubic"]) == (ours, theirs) and 0 < ours < theirs
    assert "LPIPS" in report(found)
    small = [x[..., :20, :20] for x in (sr, bicubic, hq)]
    (found,), failed = measure(small[:1], *small[1:], metrics)
    assert "lpips" not in found and "31 px" in failed["lpips"], "too small for AlexNet"


def test_files_that_are_not_there_are_named(cache, lpips):
    (cache / LPIPS_FILES[0]).unlink()
    metrics, absent, files = find_metrics(True, 4, lpips=LPIPS.from_pretrained)
    assert list(metrics) == ["psnr_y", "ssim_y"] and files == []
    assert absent["lpips"] == f"needs {LPIPS_FILES[0]} in {cache}" and absent["niqe"] == f"needs {NIQE_FILE} in {cache}"
    metrics, absent, _ = find_metrics(False, 4, lpips=LPIPS.from_pretrained)
    assert metrics == {} and absent["psnr_y"] == absent["lpips"] == "needs --ref"


def test_broken_files_are_one_line(cache, lpips):
    (cache / LPIPS_FILES[1]).write_bytes(b"no heads")
    with pytest.raises(ValueError, match=LPIPS_FILES[1]) as e:
        find_metrics(True, 4, lpips=LPIPS.from_pretrained)
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not PUBLIC.exists(), reason=f"{PUBLIC} is not there")
def test_niqe_and_public_heads(cache):
    shutil.copy(PUBLIC / NIQE_FILE, cache), shutil.copy(PUBLIC / LPIPS_FILES[1], cache)
    metrics, absent, files = find_metrics(False, 4, lpips=LPIPS.from_pretrained)
    assert list(metrics) == ["niqe"] and files == [cache / NIQE_FILE]
    sr, bicubic, _ = example()
    (found,), failed = measure([sr], bicubic, None, metrics)
    assert found["niqe"] < found["niqe_bicubic"] and failed == {}
    _, failed = measure([sr[..., :50, :50]], bicubic[..., :50, :50], None, metrics)
    assert failed == {"niqe": "NIQE needs more pixels or more detail"}
    assert find_metrics(True, 4, lpips=LPIPS.from_pretrained)[1] == {"lpips": f"needs {LPIPS_FILES[0]} in {cache}"}
    assert find_metrics(False, 4, PUBLIC / NIQE_FILE, lpips=LPIPS.from_pretrained)[2] == [PUBLIC / NIQE_FILE]


def test_references_that_do_not_fit(tmp_path, capsys):
    write_picture(tmp_path / "hq.png", torch.zeros(1, 3, 8, 8))
    (tmp_path / "text.png").write_text("no")
    for ref, words in (((), "no reference named a"), ((tmp_path / "hq.png",), "is 8x8, not 16x12"), ((tmp_path / "text.png",), "is not an image")):
        hq, why = read_reference(Path("a.png"), ref, (12, 16))
        assert hq is None and words in why and words in capsys.readouterr().err
    assert read_reference(Path("a.png"), [tmp_path / "hq.png"], (8, 8))[1] == ""


# -----------------------------------------------------------------------------
# the record

def rows():
    """Two pictures, of which the second could not be compared."""
    figures = {"psnr_y": 30.0, "psnr_y_bicubic": 20.0, "ssim_y": 0.9, "ssim_y_bicubic": 0.8, "niqe": 4.0, "niqe_bicubic": 5.0}
    return [row_of("a.png", (8, 9), 0.5, figures, {"lpips": "needs x"}),
            row_of('b "\udcff".png', (8, 9), 0.5, {"niqe": 6.0, "niqe_bicubic": 5.0}, dict.fromkeys(("psnr_y", "ssim_y", "lpips"), "no reference named b"))]


def test_average_and_protocol():
    assert average(rows()) == {"psnr_y": 30, "psnr_y_bicubic": 20, "ssim_y": 0.9, "ssim_y_bicubic": 0.8, "niqe": 5, "niqe_bicubic": 5}
    line = protocol(rows(), 7, 2.5, 2, {"lpips": "needs x"})
    for words in ("pictures 2, references 1, scale 2.5, seed 7", "no crop", "RGB", "on Y", "2 px border cut", "LPIPS needs x", "NIQE on Y"):
        assert words in line
    assert "\n" not in line and all(name in protocol(rows(), 0, 4, 0, {}) for name in ("AlexNet", *LPIPS_FILES))


def test_metrics_json_and_csv(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"numbers")
    flags = {"pictures": [Path("a.png")], "seed": 7, "scale": 4, "border": 4, "dtype": torch.float32, "tile": None, "prompt": "é \udcff"}
    record = record_of(rows(), "python sample.py a.png", flags, {"lpips": "needs x"}, [tmp_path / "w.pth"] * 2)
    write_metrics(record, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv", "metrics.json", "w.pth"], "nothing temporary is left"
    found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert list(found) == ["command", "protocol", "seed", "flags", "metrics", "average", "not_measured", "pictures", "weights", "versions"]
    assert found["flags"] == {"pictures": ["a.png"], "seed": 7, "scale": 4, "border": 4, "dtype": "torch.float32", "tile": None, "prompt": "é \udcff"}
    assert found["average"]["psnr_y"] == {"ours": 30, "bicubic": 20, "pictures": 1} and found["average"]["niqe"]["pictures"] == 2
    assert found["weights"] == {str(tmp_path / "w.pth"): sha256_of(tmp_path / "w.pth")}
    assert set(found["versions"]) == {"nanosr", "python", "torch", "numpy", "pillow"} and found["versions"]["torch"] == torch.__version__
    for row in found["pictures"]:       # each metric has a figure or a reason, everywhere
        assert all((m in row and f"{m}_bicubic" in row) != (m in row["not_measured"]) for m in METRICS)
    assert all((m in found["average"]) != (m in found["not_measured"]) for m in METRICS)
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as f:
        table = list(csv.DictReader(f))
    assert [float(row["niqe"]) for row in table] == [4, 6] and table[1]["psnr_y"] == "" and "PSNR-Y: no reference" in table[1]["not_measured"]


def test_equal_pictures_make_valid_json(tmp_path):
    row = row_of("a.png", (8, 8), 0.1, {"psnr_y": math.inf, "psnr_y_bicubic": 20.0}, {})
    write_metrics(record_of([row], "", {"seed": 0, "scale": 4, "border": 4}, {}, []), tmp_path)
    text = (tmp_path / "metrics.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["average"]["psnr_y"]["ours"] == "inf" and found["not_measured"]["lpips"] == "not of any image"


def test_weights_that_are_read_are_noted(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    weights.save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    weights.files_read.clear()
    weights.read_tensors(tmp_path / "a.pth"), weights.read_tensors(tmp_path / "b.safetensors")
    assert weights.files_read == [tmp_path / "a.pth", tmp_path / "b.safetensors"]
