"""One file over HTTP: a cut download is resumed, and what came is checked before it is kept."""

import hashlib
import json
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import requests
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from models.support.files import printable

TRIES = 4               # of one source, without a byte gained
TIMEOUT = 10, 60        # seconds to connect, and between two chunks
LONGEST_WAIT = 60       # seconds, whatever Retry-After says
BUSY = 408, 429, 500, 502, 503, 504
HUB = "https://huggingface.co"


class WeightError(ValueError):
    """A weight file that cannot be had or read; the message is one line."""


# ---- the Hugging Face hub, configured as huggingface_hub is


def hub_address():
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def hub_home():
    """The folder where huggingface_hub keeps its token and its downloads."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser().absolute()


def hub_token():
    """The user's token -> str, "" if there is none"""
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    with suppress(OSError, UnicodeError):       # `hf auth login` writes it there
        return Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser().read_text().strip()
    return ""


def address(source):
    """A source of the table -> URL."""
    repository, _, path = source.partition(":")
    return source if "://" in source else f"{hub_address()}/{repository}/resolve/main/{path}"


def refusal(source, answer, token):
    """What an answer of 401 or 403 asks of the user."""
    said = printable(answer.headers.get("X-Error-Message") or answer.reason)
    if "://" in source:
        return f"{answer.status_code} {said}"
    page = f"{hub_address()}/{source.partition(':')[0]}"
    sent = "with your token" if token else "without a token"
    return (f"{answer.status_code} {said}, asked {sent}: if {page} is still there, log in and accept its licence, "
            f"make a token at {hub_address()}/settings/tokens, and set HF_TOKEN to it or run `hf auth login`")


# ---- one file


def without_links(path, flags):
    """Opener of files in the cache: a link that somebody put there is not followed."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def download(source, target, file, sleep):
    """One source of file (a PublicFile) -> target, whole and checked.  -> its SHA-256. Raises WeightError, OSError.

    target.part keeps what came before a cut, target.part.of the ETag or date of its file, by which the server sends the
    rest, or everything if its file is another one by now.
    """
    part, tag = (target.with_name(target.name + end) for end in (".part", ".part.of"))
    token = "" if "://" in source else hub_token()
    best, tries = size_of(part), 0
    while True:
        have, wait, advice = size_of(part) if size_of(tag) else 0, 2**tries, ""
        headers = {"Accept-Encoding": "identity"}       # gzip would change the length
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
        if token:
            headers["Authorization"] = f"Bearer {token}"        # requests drops it where the hub names another host
        try:
            with requests.get(address(source), headers=headers, stream=True, timeout=TIMEOUT) as answer:
                code = answer.status_code
                if code in (200, 206, 416):
                    sha256 = receive(answer, part, tag, have, file)
                    os.replace(part, target)
                    tag.unlink(missing_ok=True)
                    return sha256
                if code in (401, 403):
                    raise WeightError(refusal(source, answer, token))
                reason = f"{code} {answer.reason}"
                if code not in BUSY:
                    raise WeightError(reason)
                if asked := re.fullmatch(r"[0-9]{1,9}", answer.headers.get("Retry-After", "")):
                    wait = min(int(asked[0]), LONGEST_WAIT)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as e:
            reason = f"no connection, or it was cut ({type(e).__name__})"
            if "://" not in source:
                advice = "; HF_ENDPOINT can name a mirror of the hub"
        except (requests.RequestException, UnicodeError) as e:      # whose message may hold the token
            raise WeightError(f"{type(e).__name__}; look at HF_ENDPOINT and HF_TOKEN") from None
        best, tries = (size_of(part), 0) if size_of(part) > best else (best, tries + 1)
        if tries == TRIES:
            raise WeightError(f"{reason}, {TRIES} times{advice}")
        sleep(wait)


def receive(answer, part, tag, have, file):
    """Add an answer's body to the `have` bytes of part, or begin part anew, and check the whole.  -> its SHA-256

    Raises WeightError where it is not the public file, ConnectionError where another request may help.
    """
    start, total = 0, content_length(answer)
    if answer.status_code != 200:
        span = re.fullmatch(r"bytes (?:(\d{1,15})-\d+|\*)/(\d{1,15})", answer.headers.get("Content-Range", ""))
        start, total = have, int(span[2]) if span else None
        if not span or int(span[1] or total) != have:   # 416 says * for the start: good if nothing is missing
            tag.unlink(missing_ok=True)                 # so that the next request asks for everything
            raise requests.ConnectionError("not the range that was asked for")
    etags = [r.headers.get("X-Linked-Etag", "").strip('"') for r in (*answer.history, answer)]
    linked = next((etag for etag in etags if re.fullmatch("[0-9a-f]{64}", etag)), None)     # of the hub's large files
    length, wanted = file.size or total, file.sha256 or linked
    if total not in (None, length) or linked not in (None, wanted):
        raise WeightError(f"the file there is another one, of {total} bytes")
    if answer.status_code != 416:
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise WeightError(f"a web page came instead of the file: {page_title(answer)}")
        if not (length or wanted or "chunked" in answer.headers.get("Transfer-Encoding", "")):
            raise WeightError("the server does not say how long the file is, so a cut would not be noticed")
        save_body(answer, part, tag, start, length, file.name)
    if length not in (None, size_of(part)):
        raise requests.ConnectionError("cut")
    sha256 = sha256_of(part)
    if wanted not in (None, sha256):
        wrong = f"what came has another SHA-256 than {wanted}"
    elif not wanted and not is_whole(part, Path(file.name).suffix):
        wrong = f"what came is no {Path(file.name).suffix} file"
    else:
        return sha256
    part.unlink(), tag.unlink(missing_ok=True)
    raise requests.ConnectionError(wrong) if have else WeightError(wrong)


def save_body(answer, part, tag, start, length, title):
    """Write an answer's body to part from byte `start` on, and to tag what its file is known by."""
    etag = answer.headers.get("ETag", "W/")             # If-Range takes no weak one
    with open(tag, "w", opener=without_links) as f:
        f.write(answer.headers.get("Last-Modified", "") if etag.startswith("W/") else etag)
    answer.raw.enforce_content_length = False           # else the last chunk before a cut is lost; `receive` counts
    bar = tqdm(total=length, initial=start, unit="B", unit_scale=True, desc=title, disable=None)
    with open(part, "ab" if start else "wb", opener=without_links) as f, bar:
        for chunk in answer.iter_content(1 << 14):
            bar.update(f.write(chunk))


def content_length(answer):
    """-> bytes, None where the header is missing or no number; "7, 7" is 7 (a proxy doubled it)"""
    number = re.fullmatch(r"([0-9]{1,15})(, *\1)*", answer.headers.get("Content-Length", "").strip())
    return int(number[1]) if number else None


def page_title(answer):
    """What a web page is called, such as "Google Drive - Quota exceeded"."""
    text = next(answer.iter_content(1 << 16), b"").decode(errors="replace")
    title = re.search(r"<title[^>]*>(.*?)</title>", text, re.DOTALL | re.IGNORECASE)
    return printable(" ".join(title[1].split()))[:100] if title else "without a title"


def is_whole(path, suffix):
    """Whether a file without a published hash is what its suffix says, from beginning to end where that can be seen."""
    with suppress(SafetensorError, ValueError, RecursionError):
        if suffix == ".safetensors":
            with safe_open(path, framework="pt"):       # compares the length with the header
                return True
        if suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return isinstance(content, dict) and not {"Code", "Message"} <= content.keys()      # ModelScope's refusal
        if suffix in (".pkl", ".pth", ".npz"):
            with open(path, "rb") as f:
                return zipfile.is_zipfile(path) or f.read(1) == b"\x80"     # the latter: a pickle
        return True
    return False


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
