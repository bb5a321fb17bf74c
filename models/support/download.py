"""One file over HTTP: what was cut is gone on with, what came is checked."""

import hashlib
import os
import re

import requests
from tqdm import tqdm

TRIES = 4               # of one source, without a byte gained
TIMEOUT = 10, 60        # seconds to connect, and between two chunks
LONGEST_WAIT = 60       # seconds, whatever Retry-After says
BUSY = 408, 429, 500, 502, 503, 504


class WeightError(ValueError):
    """A weight file that cannot be had or read; the message is one line."""


def address(source):
    """A source of the table -> URL."""
    hub, (repository, _, path) = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", source.partition(":")
    return source if "://" in source else f"{hub.rstrip('/')}/{repository}/resolve/main/{path}"


def download(source, target, file, sleep):
    """One source of file -> target, whole and checked. Raises WeightError, OSError.

    target.part keeps what came before a cut, target.part.of the ETag or date of its file, by which the server sends the
    rest, or everything if its file is another one by now.
    """
    part, tag = (target.with_name(target.name + end) for end in (".part", ".part.of"))
    url, best, tries = address(source), size_of(part), 0
    while True:
        have, wait = size_of(part) if size_of(tag) else 0, 2**tries
        headers = {"Accept-Encoding": "identity"}       # gzip would change the length
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
        if "://" not in source and (token := os.environ.get("HF_TOKEN", "").strip()):
            headers["Authorization"] = f"Bearer {token}"        # dropped where the hub redirects to another host
        try:
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
                code = answer.status_code
                if code in (200, 206, 416):
                    receive(answer, part, tag, have, file)
                    os.replace(part, target)
                    tag.unlink(missing_ok=True)
                    return target
                if code in (401, 403) and file.gated:
                    page = url.partition("/resolve/")[0]
                    raise WeightError(f"{code}, gated: accept the licence at {page} and set HF_TOKEN to your token")
                reason, asked = f"{code} {answer.reason}", answer.headers.get("Retry-After", "")
                if code not in BUSY:
                    raise WeightError(reason)
                wait = min(int(asked), LONGEST_WAIT) if asked.isdecimal() else wait
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as e:
            reason = f"no connection, or it was cut: {type(e).__name__}"
        except (requests.RequestException, UnicodeError) as e:
            raise WeightError(f"{type(e).__name__}; look at HF_ENDPOINT and HF_TOKEN") from None
        best, tries = (size_of(part), 0) if size_of(part) > best else (best, tries + 1)
        if tries == TRIES:
            raise WeightError(f"{reason}, {TRIES} times")
        sleep(wait)


def receive(answer, part, tag, have, file):
    """Add an answer's body to the `have` bytes of part, or begin part anew, and check the whole.

    Raises WeightError where it is not the public file, ConnectionError where another request may help.
    """
    start, total = 0, int(answer.headers.get("Content-Length", -1))
    if answer.status_code != 200:
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", answer.headers.get("Content-Range", ""))
        start, total = have, int(span[2]) if span else -1
        if not span or int(span[1] or total) != have:   # 416 says * for the start: good if nothing is missing
            tag.unlink(missing_ok=True)                 # so that the next request asks for everything
            raise requests.ConnectionError("not the range that was asked for")
    named = [r.headers.get("X-Linked-Etag", "").strip('"') for r in (*answer.history, answer)]
    linked = next((hash for hash in named if re.fullmatch("[0-9a-f]{64}", hash)), None)     # of the hub's large files
    length, wanted = file.size or total, file.sha256 or linked          # length -1: nobody says
    if total not in (-1, length) or linked not in (None, wanted):
        raise WeightError(f"the file there is another one, of {total} bytes")
    if answer.status_code != 416:
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise WeightError("a web page came instead of the file")
        if length < 0 and not wanted and "chunked" not in answer.headers.get("Transfer-Encoding", ""):
            raise WeightError("the server does not say how long the file is, so a cut would not be noticed")
        etag = answer.headers.get("ETag", "W/")         # If-Range takes no weak one
        bar = tqdm(total=max(length, 0) or None, initial=start, unit="B", unit_scale=True, desc=file.name, disable=None)
        with open(part, "ab" if start else "wb") as f, bar:
            tag.write_text(answer.headers.get("Last-Modified", "") if etag.startswith("W/") else etag)
            for chunk in answer.iter_content(1 << 16):
                bar.update(f.write(chunk))
    if length not in (-1, size_of(part)):
        raise requests.ConnectionError("cut")
    if wanted and sha256_of(part) != wanted:
        part.unlink(), tag.unlink(missing_ok=True)
        other = f"what came has another SHA-256 than {wanted}"
        raise requests.ConnectionError(other) if have else WeightError(other)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
