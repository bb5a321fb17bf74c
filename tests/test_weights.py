"""Fetching public files from a server on this machine that does what servers do. Run: python -m pytest tests/test_weights.py"""

import hashlib
import os
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file
from test_hostile import SYSTEMS

import sample
from models.support.weights import (FILES, PublicFile, WeightError, cache_folder, fetch, list_weights, locate, read_tensors,
                                    save_model)

DATA = bytes(range(256)) * 1500     # 384,000 bytes: several chunks
HASH = hashlib.sha256(DATA).hexdigest()
ONE = "owner/repo:sub/file.bin"     # a source on the hub
PATH = "/owner/repo/resolve/main/sub/file.bin"


class Server(ThreadingHTTPServer):
    """`script` holds what to do with the next requests, then it behaves: {"code": 503}, {"cut": 1000}, {"ignore_range": True}, ..."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.data, self.script, self.seen = f"http://127.0.0.1:{self.server_port}", DATA, [], []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, data = self.server, self.server.data
        server.seen.append((self.path, dict(self.headers)))
        do = server.script.pop(0) if server.script else {}
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Connection": "close"} | do.get("headers", {})
        code, body = do.get("code", 200), b"" if "code" in do else data
        asked = self.headers.get("Range")
        if asked and "code" not in do and not do.get("ignore_range") and self.headers["If-Range"] == headers["ETag"]:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            code, body = (206, data[start:]) if start < len(data) else (416, b"")
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}" if body else f"bytes */{len(data)}"
        self.send_response(code)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[: do.get("cut", len(body))])

    def log_message(self, *arguments):
        pass


def running():
    server = Server()
    yield server
    server.shutdown(), server.server_close()


server, other = pytest.fixture(running, name="server"), pytest.fixture(running, name="other")     # the hub, and another host


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch, server):
    """Caches of this test alone, `server` as the hub, no proxy and no token of the user's."""
    for name in ("HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HF_HOME": tmp_path / "hf", "NANOSR_CACHE": tmp_path / "cache", "HF_ENDPOINT": server.url, "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def get(monkeypatch):
    """get(source, ..., size=1) fetches model/file.bin by a row like that -> its path; get.waits: seconds it would have slept."""

    def get(*sources, **facts):
        monkeypatch.setitem(FILES, "model/file.bin", PublicFile("model/file.bin", sources or (ONE,), "tests", "none", **facts))
        return fetch("model/file.bin", sleep=get.waits.append)

    get.waits = []
    return get


def left():
    """Names of all files below our cache folder."""
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file() and path.name != ".lock")


def ranges(server):
    return [headers.get("Range") for _, headers in server.seen]


def message(get, *sources, **facts):
    """The error of a file that cannot be had: one line, with the place for it; nothing lies under its name."""
    with pytest.raises(WeightError) as e:
        get(*sources, **facts)
    text = str(e.value)
    assert "\n" not in text and "model/file.bin" in text and "file.bin" not in left()
    return text


def test_download(server, get):
    path = get(size=len(DATA), sha256=HASH)
    assert path == cache_folder() / "model/file.bin" and path.read_bytes() == DATA and left() == ["file.bin"]
    assert get() == path and [path for path, _ in server.seen] == [PATH], "the second time without a request"


def test_redirect_and_token(server, other, get, monkeypatch):
    """The token goes to the hub, not where the hub sends us, and not to other sources."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    server.script = [{"code": 302, "headers": {"Location": f"{other.url}/blob", "X-Linked-Etag": f'"{HASH}"'}}]
    assert get().read_bytes() == DATA
    assert server.seen[0][1]["Authorization"] == "Bearer hf_secret" and "Authorization" not in other.seen[0][1]
    get().unlink()
    get(f"{other.url}/file")
    assert len(server.seen) == 1 and "Authorization" not in other.seen[1][1]


PREFIXES = {"ddp": "module.", "compiled": "_orig_mod.", "both": "module._orig_mod.", "averaged": "ema_model.", "fsdp": "_fsdp_wrapped_module."}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("kind", PREFIXES)
def test_names_of_wrapped_models(system, kind, tmp_path, capsys):
    """What DDP, torch.compile and averaging save is the bare model's; a line says what was left out."""
    cls, cfg = SYSTEMS[system]
    model = cls(cfg)
    tensors = {PREFIXES[kind] + name: x for name, x in model.state_dict().items()}
    if kind == "averaged":
        tensors |= {"step_count": torch.tensor(5), "decay": torch.tensor(0.5), "online_model.a": torch.ones(3), "initted": torch.tensor([True])}
    elif kind == "ddp":
        tensors["n_averaged"] = torch.tensor(7)
    save_model(tmp_path / "model.safetensors", cfg, tensors)
    loaded = cls.from_pretrained(str(tmp_path)).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.allclose(x, loaded[name].float(), atol=1e-2) for name, x in model.state_dict().items())
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and str(tmp_path) in said[0] and all(f"{part}." in said[0] for part in PREFIXES[kind].split(".")[:-1])
    assert all(name in said[0] for name in tensors.keys() & {"n_averaged", "step_count", "decay"})
    assert isinstance(sample.find_system(str(tmp_path)), type) and capsys.readouterr().out == "", "said once"


def test_names_inside(tmp_path, capsys):
    """A part of a model that is wrapped, and dicts in a dict, as s3diff.pkl has them; but decay may be a tensor's name."""
    a, b = torch.ones(2), torch.zeros(2)
    torch.save({"rank_unet": 3, "unet": {"blocks.0._orig_mod.w": a, "module.n_averaged": 3}, "decay": b}, tmp_path / "a.pkl")
    found = read_tensors(tmp_path / "a.pkl")
    assert found.keys() == {"rank_unet", "unet", "decay"} and list(found["unet"]) == ["blocks.0.w"] and torch.equal(found["decay"], b)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'a.pkl'}: _orig_mod., n_averaged left out")
    save_file({"w": a, "module.w": b}, tmp_path / "b.safetensors")
    with pytest.raises(WeightError, match="b.safetensors: holds w twice, with a prefix and without; leave one of them"):
        read_tensors(tmp_path / "b.safetensors")
    save_file({"w": a}, tmp_path / "c.safetensors")
    assert list(read_tensors(tmp_path / "c.safetensors")) == ["w"] and capsys.readouterr().out == ""


def test_hash_named_by_the_hub(server, other, get):
    server.script = 4 * [{"code": 302, "headers": {"Location": f"{other.url}/blob", "X-Linked-Etag": f'"{HASH}"'}}]
    other.data = DATA[::-1]
    assert "another SHA-256" in message(get) and left() == []
    assert "another one" in message(get, sha256="0" * 64) and len(other.seen) == 2, "known before anything is downloaded"


def test_cut_connection_goes_on(server, get):
    server.script = [{"cut": 200_000}, {"cut": 100_000}]
    assert get(sha256=HASH).read_bytes() == DATA and left() == ["file.bin"]
    first, second, third = ranges(server)
    assert first is None and 100_000 < int(second[6:-1]) <= 200_000 < int(third[6:-1]) <= 300_000


def test_cut_that_only_the_size_tells(server, get):
    """No Content-Length: the connection just ends."""
    server.script = [{"headers": {"Content-Length": None}, "cut": 200_000}]
    assert get(size=len(DATA)).read_bytes() == DATA and ranges(server) == [None, "bytes=200000-"]


def test_interrupted_download_goes_on_in_the_next_run(server, get):
    server.script = [{"cut": 200_000}, {"code": 404}]
    assert "404 Not Found" in message(get) and left() == ["file.bin.part", "file.bin.part.of"]
    have = (cache_folder() / "model/file.bin.part").stat().st_size
    assert get().read_bytes() == DATA and ranges(server)[-1] == f"bytes={have}-" and left() == ["file.bin"]


def test_all_is_there_but_the_name(server, get):
    server.script = [{"cut": 200_000}, {"code": 404}]
    message(get)
    (cache_folder() / "model/file.bin.part").write_bytes(DATA)
    assert get(sha256=HASH).read_bytes() == DATA and ranges(server)[-1] == f"bytes={len(DATA)}-"


@pytest.mark.parametrize("change", ["ignored", "longer", "newer", "damaged"])
def test_what_lies_here_is_no_beginning(server, get, change):
    """Range ignored, a part longer than the file, another file on the server by now, a part that is no beginning of it: all over again."""
    server.script = [{"cut": 200_000}, {"code": 404}]
    message(get)
    data, part = DATA, cache_folder() / "model/file.bin.part"
    if change == "ignored":
        server.script = [{"ignore_range": True}]
    elif change == "longer":
        part.write_bytes(DATA + DATA)
    elif change == "newer":
        server.data = data = DATA[::-1]
    else:
        part.write_bytes(bytes(len(part.read_bytes())))
    assert get(sha256=hashlib.sha256(data).hexdigest()).read_bytes() == data and left() == ["file.bin"]


def test_always_cut_at_the_same_byte(server, get):
    server.script = 20 * [{"cut": 100_000, "ignore_range": True}]
    assert "4 times" in message(get) and len(server.seen) == 5 and get.waits == [1, 1, 2, 4]


@pytest.mark.parametrize("do, words", [
    ({"code": 401}, "401 Unauthorized"), ({"code": 403}, "403 Forbidden"), ({"code": 404}, "404 Not Found"),
    ({"code": 302, "headers": {"Location": PATH}}, "TooManyRedirects"),
    ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "a web page"),
    ({"headers": {"Content-Length": None}}, "how long"),
])  # fmt: skip
def test_refusals(server, get, do, words):
    """One request each, no waiting."""
    server.script = 40 * [do]
    text = message(get)
    assert words in text and server.url in text and str(cache_folder() / "model/file.bin") in text and get.waits == [] and left() == []


@pytest.mark.parametrize("code", [401, 403])
def test_gated(server, get, code):
    server.script = [{"code": code}]
    text = message(get, gated=True)
    assert f"{code}, gated: accept the licence at {server.url}/owner/repo and set HF_TOKEN" in text


def test_busy(server, get):
    """Retry-After is honoured up to a minute; a date there, or none, means our own back-off."""
    waits = ["7", "9999", "Wed, 21 Oct 2099 07:28:00 GMT"]
    server.script = [{"code": code, "headers": {"Retry-After": wait}} for code, wait in zip((429, 503, 429), waits)]
    assert get().read_bytes() == DATA and get.waits == [7, 60, 4]
    get().unlink()
    server.script = 9 * [{"code": 503}]
    assert "503 Service Unavailable, 4 times" in message(get) and len(server.seen) == 8


def test_wrong_length_and_wrong_hash(server, get):
    assert f"another one, of {len(DATA)} bytes" in message(get, size=len(DATA) - 1)
    assert "another SHA-256" in message(get, sha256="0" * 64) and len(server.seen) == 2 and left() == []
    server.script = 9 * [{"headers": {"Content-Length": len(DATA) + 5}, "ignore_range": True}]     # promises more than it sends
    assert "4 times" in message(get) and get.waits == [1, 1, 2, 4]


def test_mirrors(server, other, get):
    server.script = [{"code": 401}, {"cut": 100_000}, *4 * [{"code": 503}]]
    assert get("gone/repo:file", ONE, f"{other.url}/mirror", sha256=HASH).read_bytes() == DATA
    assert [path for path, _ in server.seen][:2] == ["/gone/repo/resolve/main/file", PATH] and len(other.seen) == 1
    get().unlink()
    server.script = other.script = 2 * [{"code": 404}]
    text = message(get, ONE, f"{other.url}/mirror")
    assert f"{server.url}{PATH}: 404 Not Found; {other.url}/mirror: 404 Not Found" in text


def test_offline(server, get, monkeypatch):
    server.shutdown(), server.server_close()
    assert "no connection" in message(get) and get.waits == [1, 2, 4]
    monkeypatch.setenv("HF_ENDPOINT", "127.0.0.1")
    assert "MissingSchema; look at HF_ENDPOINT" in message(get)


def test_by_hand_only(get, monkeypatch):
    monkeypatch.setitem(FILES, "x.pkl", PublicFile("x.pkl", (), "tests", "none", note="ask them"))
    with pytest.raises(WeightError, match=f"by hand only: ask them.*put it at {re.escape(str(cache_folder()))}.x.pkl"):
        fetch("x.pkl")
    (cache_folder() / "x.pkl").write_bytes(b"1")
    assert fetch("x.pkl") == cache_folder() / "x.pkl"


def test_file_of_another_size_is_neither_used_nor_overwritten(server, get):
    path = cache_folder() / "model/file.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(WeightError, match=f"not the public file, which has {len(DATA)} bytes; delete it"):
        get(size=len(DATA))
    assert path.read_bytes() == b"mine" and server.seen == []


def test_folder_that_cannot_be_written(get, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOSR_CACHE", str(tmp_path / "file"))
    assert "cannot be stored" in message(get)


@pytest.mark.parametrize("variable, folder", [("HF_HOME", "hub"), ("HF_HUB_CACHE", ".")])
def test_hub_cache(server, get, monkeypatch, tmp_path, variable, folder):
    """Any of the sources, by the revision that refs/main names; a size that is not right does not count."""
    monkeypatch.setenv(variable, str(tmp_path / "disk"))
    repo = tmp_path / "disk" / folder / "models--owner--repo"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("abc123\n")
    file = repo / "snapshots/abc123/sub/file.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"cached")
    assert get("another/repo:file", ONE) == file and server.seen == [] and not cache_folder().exists()
    assert get(ONE, size=len(DATA)) != file and len(server.seen) == 1


def test_several_at_once_download_once(server, get):
    with ThreadPoolExecutor(4) as pool:
        assert {path.read_bytes() for path in pool.map(get, 4 * [ONE])} == {DATA}
    assert len(server.seen) == 1


# -----------------------------------------------------------------------------
# the table, and reading


def test_table(capsys):
    for name, file in FILES.items():
        assert name == file.name and not os.path.isabs(name) and ".." not in name and (file.sources or file.note)
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+:[\w./-]+|https://[\w./-]+", source) for source in file.sources), name
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.size is None or file.size > 0
    cache_folder().mkdir(parents=True)
    (cache_folder() / "adapter_53001.pth").touch()
    list_weights()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(FILES) + 1 and lines[-1].startswith(f"1 of {len(FILES)} present")
    at = next(n for n, line in enumerate(lines) if line.startswith("[x]"))
    assert "adapter_53001.pth" in lines[at] and lines[at + 1].strip() == str(locate("adapter_53001.pth"))


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
