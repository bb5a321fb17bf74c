"""tests/real_weights.py the whole way, with tiny random models in place of the public ones, from hosts on this machine.

Run: python -m pytest tests/test_real_weights.py
"""

import shutil

import pytest
import real_weights
import torch
from release import CLIP
from test_download import small, world  # noqa: F401 (fixtures)

from models.support.imaging import resize, write_picture
from models.support.weights import FILES, cache_folder
from sample import load


def png(x, folder):
    """Bytes of the file of an image (1, 3, H, W)."""
    path = folder / "picture.png"
    path.unlink(missing_ok=True)
    write_picture(path, x)
    return path.read_bytes()


@pytest.mark.skipif(not CLIP.exists(), reason="needs ../shared/clip")
def test_the_whole_way(world, small, monkeypatch, tmp_path, capsys):  # noqa: F811
    """Results of the same model, of a seed that nobody knows, are near as expected; bicubic in their place is not."""
    world(small)
    found, files = real_weights.cases()
    assert set(found) == {"gramsr", "vosr-2"} and len(files) == 20
    pictures = {}
    for model, its_cases in found.items():
        nano = load(model, "cpu")
        for i, case in enumerate(its_cases):
            lq = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(i))
            pictures |= {case.lq: png(lq, tmp_path), case.theirs: png(nano(lq, seed=7), tmp_path)}
    for name, row in files.items():
        monkeypatch.setitem(FILES, name, row)
    served = world(small | pictures)

    assert real_weights.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count(" inf ") == 5 and said.count("as two seeds of ours") == 5 and "FARTHER" not in said
    asked = len(served.seen)
    assert real_weights.main(["--device", "cpu", "gramsr"]) == 0 and len(served.seen) == asked, "fetched once"

    shutil.rmtree(cache_folder() / "pictures")
    served.contents[found["gramsr"][1].theirs] = png(resize(lq, (96, 128)), tmp_path)
    capsys.readouterr()
    assert real_weights.main(["--device", "cpu", "gramsr"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "40 or more" in line]
    assert ["FARTHER AWAY" in line for line in lines] == [False, True, False, False, False]

    served.contents[found["vosr-2"][0].theirs] = png(lq[..., :20], tmp_path)
    assert real_weights.main(["--device", "cpu", "vosr-2"]) == 1
    assert "no enlargement of pictures/" in capsys.readouterr().err
    served.closed = {"raw.githubusercontent.com"}
    shutil.rmtree(cache_folder())
    assert real_weights.main(["--device", "cpu", "gramsr"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(": cannot be downloaded (" in line for line in lines)
    with pytest.raises(SystemExit) as e:
        real_weights.main(["vosr-3"])
    assert e.value.code == 2
