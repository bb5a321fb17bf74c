"""Servers on this machine that answer as those that hold weights do: one by a script, and one for every host of assets/weights.json.

    python tests/server.py      what --fetch gets for every --model, from such hosts: file, bytes, source
"""

import hashlib
import json
import os
import re
import sys
import tempfile
import threading
from contextlib import redirect_stdout
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors.torch import save

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from models.support import weights  # noqa: E402
from models.support.download import HUB, address  # noqa: E402

PAGE = b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>...</body></html>"


class Local(ThreadingHTTPServer):
    """A server on a free port, in a thread of its own; `seen`: path and headers of every request."""

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.url, self.seen = f"http://127.0.0.1:{self.server_port}", []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.shutdown(), self.server_close()


class Answers(BaseHTTPRequestHandler):
    def answer(self, code, headers, body=b""):
        self.send_response(code)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            for one in value if isinstance(value, list) else [value]:      # a list: the header more than once
                if one is not None:
                    self.send_header(name, str(one))
        self.end_headers()
        self.wfile.write(body)

    def rest(self, data, headers):
        """Code, headers and body of data, or of the range of it that is asked for."""
        asked = self.headers.get("Range")
        if not asked or self.headers["If-Range"] != headers["ETag"]:
            return 200, headers, data
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        if start >= len(data):
            return 416, headers | {"Content-Range": f"bytes */{len(data)}"}, b""
        return 206, headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:]

    def log_message(self, *arguments):
        pass


# ---- by a script


class Scripted(Local):
    """`script` holds what to do with the next requests, then it sends `data`: {"code": 503}, {"cut": 1000}, {"ignore_range": True}, ..."""

    def __init__(self, data):
        super().__init__(ScriptedAnswers)
        self.data, self.script = data, []


class ScriptedAnswers(Answers):
    def do_GET(self):
        server = self.server
        server.seen.append((self.path, dict(self.headers)))
        do = server.script.pop(0) if server.script else {}
        data = do.get("body", server.data)
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Connection": "close"} | do.get("headers", {})
        code, body = do.get("code", 200), b"" if "code" in do else data
        if "code" not in do and not do.get("ignore_range"):
            code, headers, body = self.rest(data, headers)
        self.answer(code, {"Content-Length": len(body)} | headers, body[: do.get("cut", len(body))])


# ---- every host of the table


def files_by_source(files):
    """-> {(host, path): name of a public file}"""
    found = {}
    for name, file in files.items():
        for source in file.sources:
            parts = urlsplit(source if "://" in source else address(source).replace(os.environ.get("HF_ENDPOINT", HUB), HUB))
            found[parts.netloc, f"{parts.path}?{parts.query}".rstrip("?")] = name
    return found


class World(Local):
    """All hosts of the table: URL/host/path is what https://host/path would answer, with stand-ins of a few kB in place of weights.

    contents: {public file: bytes}; closed: hosts or repositories that answer as if they were gone
    """

    def __init__(self, contents):
        super().__init__(WorldAnswers)
        self.table, self.contents, self.closed = files_by_source(weights.FILES), contents, set()
        self.store = Store(contents)     # where the hub and ModelScope send whoever asks for a large file

    def rows(self):
        """The table as it is, with these addresses; where a size or hash is published, it is that of the stand-in."""
        rows = {}
        for name, file in weights.FILES.items():
            data = self.contents[name]
            rows[name] = replace(file, size=file.size and len(data), sha256=file.sha256 and hashlib.sha256(data).hexdigest(),
                                 sources=tuple(source.replace("https://", f"{self.url}/") for source in file.sources))
        return rows

    def environment(self, home):
        """Variables of a user with empty caches in the folder `home`, no token and no proxy."""
        return {"HF_ENDPOINT": f"{self.url}/huggingface.co", "NO_PROXY": "*", "HF_TOKEN": "", "HF_TOKEN_PATH": f"{home}/token",
                "HF_HOME": f"{home}/hf", "HF_HUB_CACHE": f"{home}/hf/hub", "NANOSR_CACHE": f"{home}/nanosr"}

    def close(self):
        self.store.close()
        super().close()


class WorldAnswers(Answers):
    def do_GET(self):
        world = self.server
        _, host, path = self.path.split("/", 2)
        name = world.table.get((host, f"/{path}"))
        world.seen.append((f"{host}/{path}", dict(self.headers)))
        if name is None or any(f"{host}/{path}".startswith(closed) for closed in world.closed):
            return self.missing(host)
        data, small = world.contents[name], name.endswith((".json", ".txt"))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if host == "huggingface.co" and weights.FILES[name].gated and token != "hf_good":
            return self.answer(403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."})
        if host in ("huggingface.co", "modelscope.cn") and not small:
            linked = {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": len(data)}
            return self.answer(302, {"Location": f"{world.store.url}/{name}"} | (linked if host == "huggingface.co" else {}))
        if host == "drive.usercontent.google.com":
            return self.answer(200, {"Content-Type": "application/octet-stream", "ETag": None}, data)
        code, headers, body = self.rest(data, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
        self.answer(code, headers, body)

    def missing(self, host):
        if host == "huggingface.co":
            self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif host == "modelscope.cn":
            self.answer(404, {"Content-Type": "application/json"}, b'{"Code": 10010205001, "Message": "not found", "Success": false}')
        elif host == "drive.usercontent.google.com":
            self.answer(200, {"Content-Type": "text/html; charset=utf-8"}, PAGE)
        else:
            self.answer(404, {})


class Store(Local):
    """Signed addresses of a store: it refuses whoever sends a token besides."""

    def __init__(self, contents):
        super().__init__(StoreAnswers)
        self.contents = contents


class StoreAnswers(Answers):
    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        if "Authorization" in self.headers:
            return self.answer(400, {})
        data = self.server.contents[self.path[1:]]
        self.answer(*self.rest(data, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}))


# ---- the log of a fetch


def stand_ins():
    """A few kB for every public file, which look like what they stand for."""
    contents = {}
    for name in weights.FILES:
        tensor = torch.full((500,), float(len(contents)))
        buffer = StringIO(json.dumps({"name": name}))
        if name.endswith(".safetensors"):
            contents[name] = save({"a": tensor})
        elif name.endswith((".json", ".txt")):
            contents[name] = buffer.getvalue().encode()
        else:
            with tempfile.TemporaryFile() as f:
                torch.save({"a": tensor}, f)
                f.seek(0)
                contents[name] = f.read()
    return contents


def fetch_log(world, model, dtype=torch.float32):
    """`--fetch` of a model in that world -> exit status, [file, bytes, source]"""
    with redirect_stdout(StringIO()) as said:
        status = weights.fetch_all(model, dtype)
    line = re.compile(rf"(\S+): ([\d,]+) bytes from {world.url}/(\S+); licence: ")
    return status, [match.groups() for match in map(line.match, said.getvalue().splitlines()) if match]


def main():
    world = World(stand_ins())
    users = dict.fromkeys(user for file in weights.FILES.values() for user in file.users)
    print("| --model | file | public | stand-in, bytes | source |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as home:
        public, rows = {name: weights.size_in_words(file) for name, file in weights.FILES.items()}, world.rows()
        for dtype in (torch.float32, torch.float16):
            for model in users if dtype == torch.float32 else ["s3diff"]:
                os.environ.update(world.environment(f"{home}/{model}-{dtype}"))
                weights.FILES.update(rows)
                status, log = fetch_log(world, model, dtype)
                assert status == 0, model
                title = f"{model} --dtype float16" if dtype == torch.float16 else model
                for name, size, source in log:
                    print(f"| {title} | {name} | {public[name]} | {size} | {source} |")
    world.close()


if __name__ == "__main__":
    main()
