"""The table of public weight files, and reading and writing weight files. Run: python -m pytest tests/test_weights.py"""

import json
import os
import pickle
import re
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_hostile import SYSTEMS

from models.gramsr import GramSRConfig
from models.s3diff import S3DiffConfig
from models.support.weights import (EMBEDDED, FILES, PRIOR, WeightError, cache_folder, list_weights, locate,
                                    read_config, read_system, read_tensors, save_model, save_release, save_tensors)
from models.vosr import VOSRConfig


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """Caches of this test alone."""
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    for name in ("HF_HOME", "HF_HUB_CACHE", "NANOSR_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))


PREFIXES = {"ddp": "module.", "compiled": "_orig_mod.", "both": "module._orig_mod.", "fsdp": "_fsdp_wrapped_module."}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("kind", PREFIXES)
def test_names_of_wrapped_models(system, kind, tmp_path):
    """What DDP, torch.compile and averaging save is the bare model's."""
    cls, cfg = SYSTEMS[system]
    model = cls(cfg)
    tensors = {PREFIXES[kind] + name: x for name, x in model.state_dict().items()}
    if kind == "ddp":
        tensors["n_averaged"] = torch.tensor(7)
    save_model(tmp_path / "model.safetensors", cfg, tensors)
    loaded = cls.from_pretrained(str(tmp_path)).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.allclose(x, loaded[name].float(), atol=1e-2) for name, x in model.state_dict().items())


def test_names_inside(tmp_path):
    """A part of a model that is wrapped, and dicts in a dict, as s3diff.pkl has them."""
    a = torch.ones(2)
    torch.save({"rank_unet": 3, "unet": {"blocks.0._orig_mod.w": a, "module.n_averaged": 3}}, tmp_path / "a.pkl")
    found = read_tensors(tmp_path / "a.pkl")
    assert found.keys() == {"rank_unet", "unet"} and list(found["unet"]) == ["blocks.0.w"]


# -----------------------------------------------------------------------------
# the table, and reading


def test_table(capsys):
    for name, file in FILES.items():
        assert name == file.name and not os.path.isabs(name) and ".." not in name and file.users and file.licence
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+:[\w./-]+|https://[\w./?=&-]+", source) for source in file.sources), name
        assert file.sources and len(set(file.sources)) == len(file.sources)
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.size or file.about or name.endswith("args.json")
        assert not (file.size and file.about)
    assert all(any("modelscope.cn" in source for source in file.sources) for file in FILES.values() if file.gated)


def test_listing(capsys):
    """Of every file: whether it is here and how far that was checked, its size, who needs it, its licence, all sources."""
    cache_folder().mkdir(parents=True)
    (cache_folder() / "adapter_53001.pth").touch()
    list_weights()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"1 of {len(FILES)} present")
    entries = [line for line in lines if line[0] == "["]
    assert len(entries) == len(FILES) and sum(line.startswith("[x]") for line in entries) == 1
    assert [line.strip().split()[1] for line in lines if line.startswith("      from ")] == [
        source if "://" in source else "https://huggingface.co/" + source.replace(":", "/resolve/main/")
        for file in FILES.values() for source in file.sources]
    at = next(n for n, line in enumerate(lines) if line.startswith("[x]"))
    assert lines[at].startswith("[x] adapter_53001.pth: about 7 MB, for gramsr; licence: none stated")
    assert lines[at + 1].strip() == f"here: {locate('adapter_53001.pth')}, not checked yet"
    at = next(n for n, line in enumerate(lines) if "dinov3-vitb16" in line)
    assert "342,662,192 bytes, for gramsr, train_gramsr; licence: DINOv3 License" in lines[at]
    assert "accepted the licence" in lines[at + 1] and "modelscope.cn" in lines[at + 2] and "accepted" not in lines[at + 2]
    assert any("by hand from https://drive.google.com/file/d/" in line for line in lines)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt"])
def test_pickle_that_runs_code_is_refused(tmp_path, suffix):
    path, crater = tmp_path / f"bomb{suffix}", tmp_path / "crater"
    for write in (lambda: path.write_bytes(pickle.dumps({"a": Bomb(crater)}, 2)), lambda: torch.save({"a": torch.ones(2), "b": Bomb(crater)}, path)):
        write()
        with pytest.raises(WeightError) as e:
            read_tensors(path)
        assert "\n" not in str(e.value) and str(path) in str(e.value) and "run code" in str(e.value) and not crater.exists()


def test_read_tensors(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    save_file({"x": x}, tmp_path / "a.safetensors")
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["x"], x)
    for suffix in (".pth", ".pkl", ".pt"):      # the layout of s3diff.pkl
        torch.save({"rank": 4, "names": ["a"], "w": torch.nn.Parameter(x), "nested": {"x": x}}, tmp_path / f"a{suffix}")
        found = read_tensors(tmp_path / f"a{suffix}")
        assert found["rank"] == 4 and torch.equal(found["nested"]["x"], x) and torch.equal(found["w"], x)
    torch.save([x], tmp_path / "list.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-100])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-4])
    (tmp_path / "text.pkl").write_text("no")
    for name, words in {"list.pth": "a list, not a dict", "cut.pth": "is broken", "cut.safetensors": "is broken", "text.pkl": "is broken",
                        "none.pth": "no such file", "none.safetensors": "no such file"}.items():
        with pytest.raises(WeightError, match=words) as e:
            read_tensors(tmp_path / name)
        assert "\n" not in str(e.value) and name in str(e.value)


# -----------------------------------------------------------------------------
# writing


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_same_bytes_and_the_usual_mode(tmp_path, umask, mode):
    """However often a model is written; the library's own order of metadata is random, its mode 0600."""
    cls, cfg = SYSTEMS["vosr"]
    tensors, note = cls(cfg).state_dict(), 'seen: "é", \u2028, \x7f, \n\x01\\'
    before = os.umask(umask)
    try:
        for n in range(8):
            save_model(tmp_path / f"{n}.safetensors", cfg, tensors, note)
        save_release(tmp_path / "release", tensors, {"a": 1})
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 10 and {stat.S_IMODE(path.stat().st_mode) for path in written} == {mode}
    assert len({(tmp_path / f"{n}.safetensors").read_bytes() for n in range(8)}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as f:
        assert f.metadata()["note"] == note and list(f.keys())
    assert load_file(tmp_path / "0.safetensors").keys() == {k for k in tensors if "freqs_" not in k}


def test_tensors_without_metadata(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    save_file({"a": torch.ones(2)}, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("name, cfg", [("vosr", VOSRConfig()), ("s3diff", S3DiffConfig()), ("gramsr", GramSRConfig())])
def test_a_model_names_its_system(tmp_path, name, cfg):
    """In new files by its metadata, in those from before by their settings."""
    save_model(path := tmp_path / "a.safetensors", cfg, {"a": torch.ones(1)})
    with safe_open(path, "pt") as f:
        assert f.metadata()["system"] == name == read_system(path)
        old = {k: v for k, v in f.metadata().items() if k != "system"}
    save_file({"a": torch.ones(1)}, path, old)
    assert read_system(path) == name and read_config(path) == json.loads(old["config"])


def test_systems_of_other_files(tmp_path):
    """The embedded models'; a system of somebody's own; files that `save_model` did not write."""
    assert {read_system(path) for path in (EMBEDDED["s3diff-tiny"], PRIOR)} == {"tinys3diff"}
    assert [read_system(EMBEDDED[f"{name}-tiny"]) for name in ("vosr", "gramsr")] == ["tinyvosr", "tinygramsr"]
    save_file({"a": torch.ones(1)}, path := tmp_path / "a.safetensors", {"system": "osediff", "config": "{}"})
    assert read_system(path) == "osediff"
    for metadata in (None, {"config": "[1]"}, {"config": "{"}, {"config": '{"a": 1}'}, {"system": ""}):
        save_file({"a": torch.ones(1)}, path, metadata)
        assert read_system(path) is None
    path.write_text("no")
    assert read_system(path) is None and read_system(tmp_path) is None and read_system(tmp_path / "none") is None
