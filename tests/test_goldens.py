"""Every stored golden case, one test each.    python -m pytest tests/test_goldens.py"""

import json
from pathlib import Path

import golden
import pytest

FILES = sorted((Path(__file__).parent / "golden").glob("*.json"))
CASES = [(path.stem, name) for path in FILES for name in json.loads(path.read_text())["cases"]]


@pytest.mark.parametrize("stem, name", CASES, ids=["/".join(pair) for pair in CASES])
def test_golden(stem, name):
    case = json.loads((Path(__file__).parent / "golden" / f"{stem}.json").read_text())["cases"][name]
    faults = golden.check(stem, name, case)
    if "neither in ../shared/clip nor in the weights cache" in str(faults):
        pytest.skip("CLIP's vocabulary, a public file, is not on this machine")
    assert faults == []


def test_runner_tells_failures(tmp_path, capsys):
    """A changed figure, an unknown case and a file that is none are all reported, and the exit status is 1."""
    data = json.loads((Path(__file__).parent / "golden" / "degrade.json").read_text())
    case = data["cases"]["resize"]
    case["outputs"]["area_size_13x17"]["values"][0] += 0.1
    (tmp_path / "degrade.json").write_text(json.dumps({"cases": {"resize": case, "filter2d": data["cases"]["filter2d"], "novelty": case}}))
    (tmp_path / "unheard_of.json").write_text(json.dumps({"cases": {"resize": case}}))
    assert golden.main([tmp_path / "degrade.json", tmp_path / "unheard_of.json", tmp_path / "missing.json"]) == 1
    out = capsys.readouterr().out
    assert "FAIL degrade/resize\n     area_size_13x17: largest difference 0.1, got/expected 0.3408" in out
    assert "ok   degrade/filter2d" in out and "FAIL degrade/novelty\n     unknown case" in out
    assert "FAIL unheard_of/resize\n     unknown case" in out and "missing.json: not a golden file" in out
    assert out.endswith("1 passed, 4 failed\n")
