"""Fetching public files from servers on this machine that do what servers do. Run: python -m pytest tests/test_download.py"""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save, save_file
from test_release import TINY, picture

import models.gramsr
import models.s3diff
import sample
from models.clip import TextConfig
from models.gramsr import GramSR, GramSRConfig
from models.s3diff import S3Diff, S3DiffConfig
from models.support import weights
from models.support.download import hub_token
from models.support.weights import (FILES, PublicFile, WeightError, cache_folder, fetch, locate,
                                    read_record)
from models.unet import UNetConfig
from models.vit import DINOv3Config
from models.vosr import PUBLIC, SIZES, VOSR
from release import CLIP, FOLDERS, write_release
from server import PAGE, Scripted, World, fetch_log, stand_ins

DATA = bytes(range(256)) * 1500     # 384,000 bytes: several chunks
HASH = hashlib.sha256(DATA).hexdigest()
ONE = "owner/repo:sub/file.bin"     # a source on the hub
PATH = "/owner/repo/resolve/main/sub/file.bin"


def running():
    server = Scripted(DATA)
    yield server
    server.close()


server, other = pytest.fixture(running, name="server"), pytest.fixture(running, name="other")     # the hub, and another host


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch, server):
    """Caches of this test alone, `server` as the hub, no proxy and no token of the user's."""
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HF_HOME": tmp_path / "hf", "NANOSR_CACHE": tmp_path / "cache", "HF_ENDPOINT": server.url, "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def get(monkeypatch):
    """get(source, ..., size=1) fetches model/file.bin by a row like that -> its path; get.waits: seconds it would have slept."""

    def get(*sources, **facts):
        monkeypatch.setitem(FILES, "model/file.bin", PublicFile("model/file.bin", sources or (ONE,), ("tests",), "none", **facts))
        return fetch("model/file.bin", sleep=get.waits.append)

    get.waits = []
    return get


def left():
    """Names of all files below our cache folder, less the lock and what is recorded of a file."""
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file() and path.name != ".lock" and path.suffix != ".checked")


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
    ({"headers": {"Content-Type": "text/html; charset=utf-8"}, "body": PAGE}, "a web page came instead of the file: Google Drive - Virus scan warning"),
    ({"headers": {"Content-Type": "text/html"}, "body": b"<html>"}, "a web page came instead of the file: without a title"),
    ({"headers": {"Content-Length": ["7", "8"]}}, "InvalidHeader"), ({"headers": {"Content-Length": "many"}}, "how long"),
    ({"headers": {"Content-Length": "9" * 5000}}, "how long"), ({"headers": {"Content-Length": "-5"}}, "how long"),
    ({"headers": {"Content-Length": None}}, "how long"),
])  # fmt: skip
def test_refusals(server, get, do, words):
    """One request each, no waiting."""
    server.script = 40 * [do]
    text = message(get)
    assert words in text and server.url in text and str(cache_folder() / "model/file.bin") in text and get.waits == [] and left() == []


@pytest.mark.parametrize("token, sent", [("", "without a token"), ("hf_mine", "with your token")], ids=["without", "with"])
@pytest.mark.parametrize("code", [401, 403])
def test_gated(server, other, get, monkeypatch, code, token, sent):
    """Any row: where to accept what, the token and how to give it, and the mirror that was tried; a server that is no hub has no gate."""
    monkeypatch.setenv("HF_TOKEN", token)
    server.script, other.script = [{"code": code, "headers": {"X-Error-Message": "Access is restricted."}}], [{"code": 403}]
    text = message(get, ONE, f"{other.url}/mirror")
    assert f"{server.url}{PATH}: {code} Access is restricted., asked {sent}: if {server.url}/owner/repo is still there, log in" in text
    assert all(words in text for words in ("accept its licence", f"{server.url}/settings/tokens", "HF_TOKEN", "hf auth login"))
    assert f"{other.url}/mirror: 403 Forbidden)" in text and "hf_mine" not in text


def test_token_as_the_hub_finds_it(monkeypatch, tmp_path):
    """HF_TOKEN, then the file HF_TOKEN_PATH, then $HF_HOME/token, where HF_HOME is in XDG_CACHE_HOME: as huggingface_hub's own documentation says."""
    assert hub_token() == ""
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for folder, token in (("xdg/huggingface", "hf_xdg"), ("home", "hf_home"), ("path", "hf_path")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "token").write_text(f"{token}\n")
    assert hub_token() == "hf_xdg"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hub_token() == "hf_home"
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "path/token"))
    assert hub_token() == "hf_path"
    monkeypatch.setenv("HF_TOKEN", " hf_variable\n")
    assert hub_token() == "hf_variable"
    for name, value in (("HF_TOKEN", " "), ("HF_TOKEN_PATH", tmp_path)):
        monkeypatch.setenv(name, str(value))
    assert hub_token() == "", "a folder"


def test_token_of_a_file_is_sent_to_the_hub_alone(server, other, get, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text("hf_secret\n")
    server.script = [{"code": 302, "headers": {"Location": "/renamed"}}, {"code": 302, "headers": {"Location": f"{other.url}/blob"}}]
    get()
    assert [headers.get("Authorization") for _, headers in (*server.seen, *other.seen)] == ["Bearer hf_secret"] * 2 + [None]


def test_a_token_that_is_none_is_not_printed(get, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\nhf_other")
    text = message(get)
    assert "look at HF_ENDPOINT and HF_TOKEN" in text and "secret" not in text and "other" not in text


@pytest.mark.parametrize("length", [f"{len(DATA)}, {len(DATA)}", [len(DATA), len(DATA)]])
def test_doubled_length(server, get, length):
    server.script = [{"headers": {"Content-Length": length}}]
    assert get().read_bytes() == DATA and len(server.seen) == 1


@pytest.mark.parametrize("length", ["many", "9" * 5000, None])
def test_length_that_is_no_number(server, get, length):
    """As if the server said none: a published hash or size tells whether all came."""
    server.script = [{"headers": {"Content-Length": length}}]
    assert get(sha256=HASH).read_bytes() == DATA and len(server.seen) == 1


def test_always_cut_early(server, get):
    """Before the first chunk is full: every request gains what it brought."""
    server.script = 100 * [{"cut": 5_000}]
    assert get(sha256=HASH).read_bytes() == DATA and len(server.seen) == -(-len(DATA) // 5_000)
    assert ranges(server)[:3] == [None, "bytes=5000-", "bytes=10000-"]


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
    assert "no connection" in (text := message(get)) and "HF_ENDPOINT can name a mirror of the hub" in text and get.waits == [1, 2, 4]
    assert "no connection" in (text := message(get, f"{server.url}/file")) and "HF_ENDPOINT" not in text
    monkeypatch.setenv("HF_ENDPOINT", "127.0.0.1")
    assert "MissingSchema; look at HF_ENDPOINT" in message(get)


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
    assert get("another/repo:file", ONE) == file and server.seen == [] and left() == []
    assert get(ONE, size=len(DATA)) != file and len(server.seen) == 1


def test_several_at_once_download_once(server, get):
    with ThreadPoolExecutor(4) as pool:
        assert {path.read_bytes() for path in pool.map(get, 4 * [ONE])} == {DATA}
    assert len(server.seen) == 1




# ---- what is kept

WHOLE = {".safetensors": save({"a": torch.ones(3)}), ".json": b'{"resolution": 512}'}
for suffix in (".pkl", ".pth", ".npz"):
    WHOLE[suffix] = next(data for name, data in stand_ins().items() if name.endswith(suffix))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("suffix", WHOLE)
def test_only_what_the_suffix_says_is_kept(server, monkeypatch, suffix, tmp_path):
    """With status 200 and no published hash: a page that says it is a file, git's pointer, ModelScope's refusal, half a file."""
    monkeypatch.setitem(FILES, f"a{suffix}", PublicFile(f"a{suffix}", (f"{server.url}/a",), ("tests",), "none"))
    refused = b'{"Code": 10010205001, "Message": "not found", "Success": false}'
    for wrong in (PAGE, refused if suffix == ".json" else PAGE, POINTER, WHOLE[suffix][:-9]):
        server.script = [{"body": wrong, "headers": {"Content-Type": "application/octet-stream"}}]
        with pytest.raises(WeightError, match=f"what came is no {suffix} file.*put it at"):
            fetch(f"a{suffix}")
        assert left() == []
    server.script = [{"body": WHOLE[suffix]}]
    assert fetch(f"a{suffix}").read_bytes() == WHOLE[suffix]


def test_old_pickle(server, monkeypatch, tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    monkeypatch.setitem(FILES, "a.pth", PublicFile("a.pth", (f"{server.url}/a",), ("tests",), "none"))
    server.data = (tmp_path / "a.pth").read_bytes()
    assert fetch("a.pth").read_bytes() == server.data


@pytest.mark.parametrize("name", [".lock", "model/file.bin.part", "model/file.bin.part.of", "model/file.bin.checked"])
def test_planted_links_are_not_followed(server, get, tmp_path, name):
    """In a folder that others can write: what they link to keeps what it holds."""
    (victim := tmp_path / "victim").write_bytes(b"mine")
    path = cache_folder() / name
    path.parent.mkdir(parents=True)
    path.symlink_to(victim)
    assert f"cannot be stored: [Errno 40] Too many levels of symbolic links: '{path}'" in message_of(get)
    assert victim.read_bytes() == b"mine"


def message_of(get):
    with pytest.raises(WeightError) as e:
        get()
    return str(e.value)


# ---- what lies in the cache


def hashes(monkeypatch):
    """Paths that are hashed from now on."""
    found = []
    whole = weights.sha256_of
    monkeypatch.setattr(weights, "sha256_of", lambda path: found.append(path) or whole(path))
    return found


def test_hashed_once(server, get, monkeypatch):
    """After the download; then size and time tell that it is the same file."""
    path, again = get(sha256=HASH), hashes(monkeypatch)
    record = read_record("model/file.bin")
    assert record == {"path": str(path), "size": len(DATA), "mtime_ns": path.stat().st_mtime_ns, "sha256": HASH}
    assert get(sha256=HASH) == path and again == []
    os.utime(path)
    assert get(sha256=HASH) == path == get(sha256=HASH) and again == [path]


def test_changed_file_with_a_published_hash(server, get, capsys):
    """Of the same size: it is named, and not overwritten."""
    path = get(size=len(DATA), sha256=HASH)
    path.write_bytes(DATA[::-1])
    for _ in range(2):
        with pytest.raises(WeightError, match=f"file.bin: is not the public file, whose SHA-256 is {HASH}, not .*; delete it"):
            get(size=len(DATA), sha256=HASH)
    assert path.read_bytes() == DATA[::-1] and len(server.seen) == 1


def test_changed_file_without_a_published_hash(server, get, capsys):
    """The first that came is recorded; a line says that it is another one now, here or after another download."""
    path = get()
    assert f"{len(DATA):,} bytes from {server.url}{PATH}; licence: none" in capsys.readouterr().out
    path.write_bytes(DATA[::-1])
    other = hashlib.sha256(DATA[::-1]).hexdigest()
    assert get() == path and f"another file than the one that was here before (SHA-256 {other}, then {HASH})" in capsys.readouterr().out
    assert get() == path and capsys.readouterr().out == ""
    path.unlink()
    assert get() == path and f"(SHA-256 {HASH}, then {other})" in capsys.readouterr().out


def test_hash_published_later(server, get):
    get()
    with pytest.raises(WeightError, match="delete it"):
        get(sha256="0" * 64)


def test_put_there_by_hand(server, get, monkeypatch):
    path, again = cache_folder() / "model/file.bin", hashes(monkeypatch)
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    assert get(size=len(DATA), sha256=HASH) == path == get(size=len(DATA), sha256=HASH) and again == [path] and server.seen == []


def test_cache_that_others_filled(server, get, tmp_path):
    """On a shared disk where nothing can be recorded, files are used by their size. (A folder in the lock's place: permissions do not hold root back.)"""
    path = cache_folder() / "model/file.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    (cache_folder() / ".lock").mkdir()
    assert get(size=len(DATA)) == path and server.seen == []


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff", '{"size": 1}', "[" * 10**5])
def test_record_that_is_none(server, get, text):
    get()
    (cache_folder() / "model/file.bin.checked").write_text(text, encoding="latin-1")
    assert get().read_bytes() == DATA and len(server.seen) == 1 and read_record("model/file.bin")["sha256"] == HASH


# ---- every host of the table


@pytest.fixture
def world(monkeypatch, tmp_path):
    """world(contents) -> World with them (or stand-ins) in place of the public files, for a user whose caches are empty"""
    worlds = []

    def start(found=None):
        worlds.append(world := World(stand_ins() | (found or {})))
        for name, row in world.rows().items():
            monkeypatch.setitem(FILES, name, row)
        for name, value in world.environment(tmp_path / "caches").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(weights, "fetch", partial(fetch, sleep=lambda seconds: None))
        return world

    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    yield start
    for one in worlds:
        one.close()


def test_models_of_the_table():
    """All that --model takes and no other name, the scripts that train, and what measures."""
    users = {user for file in FILES.values() for user in file.users}
    assert users == {*PUBLIC, "s3diff", "gramsr", "train_vosr", "train_s3diff", "train_gramsr", "metrics"}
    halves = [name for name in FILES if ".fp16." in name]
    assert len(halves) == 2 and all(FILES[name.replace(".fp16.", ".")].users == [*FILES[name].users, "train_s3diff"] for name in halves)


def test_fetch_of_every_model(world, capsys):
    """The second time without a request; no token leaves the hub; nothing is fetched that another name needs."""
    world = world()
    (cache_folder().parent / "token").parent.mkdir(parents=True)
    (cache_folder().parent / "token").write_text("hf_good")
    for user in (*PUBLIC, "s3diff", "gramsr", "train_vosr", "train_s3diff", "train_gramsr", "metrics"):
        shutil.rmtree(cache_folder(), ignore_errors=True)
        status, log = fetch_log(world, user)
        wanted = [name for name, file in FILES.items() if user in file.users and ".fp16." not in name]
        assert status == 0 and [name for name, _, _ in log] == wanted
        asked = len(world.seen)
        assert fetch_log(world, user) == (0, []) and len(world.seen) == asked
    sent = {path.partition("/")[0] for path, headers in world.seen if "Authorization" in headers}
    assert sent == {"huggingface.co"} and not any("Authorization" in headers for _, headers in world.store.seen)


def test_fetch_where_much_is_gone(world, capsys):
    """Without a token, GitHub or the hub: what has a second source comes from there, the rest is named."""
    world = world()
    status, log = fetch_log(world, "gramsr")
    assert status == 0 and [source.partition("/")[0] for _, _, source in log] == [
        *2 * ["huggingface.co"], "modelscope.cn", "drive.usercontent.google.com", *2 * ["raw.githubusercontent.com"]]
    shutil.rmtree(cache_folder())
    world.closed = {"huggingface.co", "drive.usercontent.google.com"}
    status, log = fetch_log(world, "gramsr")
    assert status == 1 and "model_12501.pkl: cannot be downloaded" in capsys.readouterr().err
    assert [source.partition("/")[0] for _, _, source in log] == [*3 * ["modelscope.cn"], *2 * ["raw.githubusercontent.com"]]
    with pytest.raises(WeightError, match="Virus scan warning.*by hand from https://drive.google.com/file/d/"):
        fetch("model_12501.pkl")


def test_fetch_command(world, capsys, tmp_path, monkeypatch):
    """As users run it: a line for each file and their sum, status 0; what cannot be had is a line of its own, status 1; a usage error."""
    monkeypatch.chdir(tmp_path)     # README's first command leaves a folder out/ where it runs
    world = world()
    assert sample.main(["--model", "gramsr", "--fetch", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    last, checked = lines[-1], {line.partition(":")[0]: line for line in lines if line.startswith(str(cache_folder()))}
    assert len(checked) == 6 and last.startswith("gramsr: 6 of 6 files are here, ")
    assert checked[str(locate("dinov3-vitb16-pretrain-lvd1689m/model.safetensors"))].endswith("SHA-256 as published")
    assert checked[str(locate("adapter_53001.pth"))].endswith("none is published")
    files = [path for path in cache_folder().rglob("*") if path.is_file() and path.suffix != ".checked" and path.name != ".lock"]
    assert last.endswith(f"{sum(path.stat().st_size for path in files):,} bytes")
    (cache_folder() / "adapter_53001.pth").unlink()
    world.closed = {"raw.githubusercontent.com"}
    assert sample.main(["--model", "gramsr", "--fetch", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "adapter_53001.pth: cannot be downloaded" in said.err and "5 of 6 files are here" in said.out
    with pytest.raises(SystemExit, match="sample.py: --fetch: vosr-tiny needs no public file, or is none of gramsr, metrics"):
        sample.main(["--model", "vosr-tiny", "--fetch"])
    assert not Path("out").exists()


# ---- the whole way, at tiny size


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """-> {public file: bytes} of all public models at tiny size, which the code expects from here on"""
    root, vae = tmp_path_factory.mktemp("release"), TINY["0.5b"].vae
    unet = UNetConfig(widths=(64, 64, 64, 64), num_heads=(1, 1, 1, 1), layers_per_block=1, context_dim=32)
    vit = DINOv3Config(embed_dim=32, depth=1, num_heads=2)
    with pytest.MonkeyPatch.context() as patch:
        for size, cfg in TINY.items():
            patch.setitem(SIZES, size, cfg)
        patch.setattr(models.gramsr, "GramSRConfig", partial(GramSRConfig, unet=unet, vae=vae, vit=vit))
        patch.setattr(models.s3diff, "S3DiffConfig", partial(S3DiffConfig, unet=unet, vae=vae))
        patch.setattr("models.clip.TextConfig", partial(TextConfig, hidden_size=32, layers=2, heads=2, intermediate_size=64))
        write_release(root, *FOLDERS, "s3diff", "gramsr")
        for name in (name for name in FILES if ".fp16." in name):
            save_file({k: v.half() for k, v in load_file(root / name.replace(".fp16.", ".")).items()}, root / name)
        yield {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def load(name, dtype=torch.float32):
    cls = {"s3diff": S3Diff, "gramsr": GramSR}.get(name, VOSR)
    return cls.from_pretrained(name, dtype=dtype)


@pytest.mark.skipif(not CLIP.exists(), reason="needs ../shared/clip")
@pytest.mark.parametrize("name", [*PUBLIC, "s3diff", "gramsr"])
def test_first_run(world, small, name):
    """A model by its name fetches what it needs without a hand, and --fetch gets exactly that."""
    world = world(small)
    assert fetch_log(world, name)[0] == 0
    fetched = {path for path in cache_folder().rglob("*") if path.is_file()}
    asked = len(world.seen)
    sr = load(name).upscale(picture(16, 20))
    assert len(world.seen) == asked and sr.shape == (1, 3, 64, 80) and sr.isfinite().all() and sr.std() > 0.01
    shutil.rmtree(cache_folder())
    assert torch.allclose(load(name).upscale(picture(16, 20)), sr, atol=1e-5)
    again = {path for path in cache_folder().rglob("*") if path.is_file()}
    assert {path for path in fetched ^ again if path.name != "text_features.safetensors"} == set()


@pytest.mark.skipif(not CLIP.exists(), reason="needs ../shared/clip")
def test_half_of_s3diff(world, small):
    """float16 fetches the files in float16, unless the full ones are here; float32 never uses them."""
    world, half = world(small), torch.float16
    status, log = fetch_log(world, "s3diff", half)
    assert status == 0 and sorted(name for name, *_ in log if ".fp16." in name) == sorted(name for name in FILES if ".fp16." in name)
    asked = len(world.seen)
    model = load("s3diff", half)
    assert len(world.seen) == asked and model.dtype == half
    assert (cache_folder() / "sd-turbo/text_features.fp16.safetensors").exists()
    full = load("s3diff")
    new = [path.partition("resolve/main/")[2] for path, _ in world.seen[asked:]]
    assert new == ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    asked = len(world.seen)
    assert fetch_log(world, "s3diff", half)[1] == [] and len(world.seen) == asked
    published = load_tensors(small["sd-turbo/unet/diffusion_pytorch_model.safetensors"])["mid_block.resnets.0.conv1.weight"]
    assert torch.equal(full.unet.mid_block.resnets[0].conv1.weight, published) and not torch.equal(published.half().float(), published)
    x, y, z = (m.float().upscale(picture(16, 20)) for m in (model, load("s3diff", half), full))
    assert (x - y).abs().max() < 0.01 and (y - z).abs().max() < 0.01 and not torch.equal(x, z)
