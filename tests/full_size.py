"""A public model at its full size, as a new user meets it: downloaded, loaded, one picture upscaled. Only the numbers in the files are random.

    python tests/full_size.py [--model vosr-0.5b-1step] [--side 100x75] [--steps N] [--tile PX] [--device auto] [--dtype auto] [--keep DIR]

Writes the model's files into a temporary folder (0.5B: 2.7 GB, 1.4B: 7 GB, s3diff: 5.3 GB; twice that with what is downloaded), serves them on
this machine, runs sample.py against that server in a process of its own, whose peak memory is therefore its own, and removes everything.
s3diff runs a second time, without its text encoder: the features of its two prompts are kept. gramsr (4.2 GB), of whose files one has no address,
is run from the folder.
--keep DIR: leave the files there, and use them the next time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import models.gramsr  # noqa: E402
import models.s3diff  # noqa: E402
import models.vosr  # noqa: E402
import models.support.weights  # noqa: E402
import sample  # noqa: E402
from bench import peak_memory  # noqa: E402
from models.support.imaging import write_picture  # noqa: E402
from models.vosr import PUBLIC  # noqa: E402
from models.support.weights import FILES, cache_folder  # noqa: E402
from release import SD_TURBO, Hub, contents, rows, write_release  # noqa: E402


def user(arguments):
    """What runs in a process of its own: sample.py with a clock on its parts, each without those inside it; the last line is the figures as JSON."""
    FILES.update(rows())
    seconds = {"download": 0.0, "text": 0.0, "load": 0.0, "upscale": 0.0}

    def timed(name, function):
        def wrapper(*args, **kwargs):
            start, before = time.perf_counter(), sum(seconds.values())
            try:
                return function(*args, **kwargs)
            finally:
                inside = sum(seconds.values()) - before
                seconds[name] += time.perf_counter() - start - inside
        return wrapper

    for module in (models.support.weights, models.vosr, models.s3diff):
        module.fetch = timed("download", module.fetch)
    models.s3diff.text_features = timed("text", models.s3diff.text_features)
    for system in (models.vosr.VOSR, models.s3diff.S3Diff, models.gramsr.GramSR):
        system.from_pretrained = timed("load", system.from_pretrained)
        system.upscale = timed("upscale", system.upscale)
    status = sample.main(arguments)
    print(json.dumps(seconds | {"memory": peak_memory(torch.device("cpu")), "threads": torch.get_num_threads()}))
    return status


def run_user(arguments, hub, caches):
    """sample.py as a user of that hub, and a line of figures -> exit status"""
    sent = hub.sent
    command = [sys.executable, __file__, "as user", *arguments]
    done = subprocess.run(command, env=os.environ | hub.environment(caches), stdout=subprocess.PIPE, text=True)
    *lines, last = done.stdout.splitlines() or [""]
    print(*lines, sep="\n")
    if done.returncode == 0:
        s = json.loads(last)
        text = f"features of texts in {s['text']:.1f} s, " if s["text"] else ""
        print(f"downloaded {hub.sent - sent:,} bytes in {s['download']:.1f} s, loaded in {s['load']:.1f} s, {text}"
              f"upscaled in {s['upscale']:.1f} s with {s['threads']} threads, peak memory {s['memory']:.0f} MB", flush=True)
    return done.returncode


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="vosr-0.5b-1step", choices=[*PUBLIC, "s3diff", "gramsr"])
    p.add_argument("--side", default="100x75", help="width x height of the input, enlarged 4 times")
    p.add_argument("--keep", type=Path, metavar="DIR", help="folder for the files of the release")
    args, others = p.parse_known_args()     # the others are sample.py's: --steps, --tile, --device, ...
    needed = {"0.5b": 6e9, "1.4b": 16e9, "s3diff": 12e9, "gramsr": 5e9}[PUBLIC.get(args.model, [args.model])[0]]
    if shutil.disk_usage(tempfile.gettempdir()).free < needed:
        sys.exit(f"full_size.py: {tempfile.gettempdir()} has less than {needed / 1e9:.0f} GB left; name another folder in TMPDIR")

    with tempfile.TemporaryDirectory(prefix="nanosr-") as folder:
        folder = Path(folder)
        root = args.keep or folder / "release"
        start = time.perf_counter()
        write_release(root, args.model)
        hub, files = Hub(root), [root / name for name in contents(args.model)]
        for file in files:
            hub.digest(file)    # the real hub has them at hand
        print(f"{args.model}: {len(files)} files, {sum(f.stat().st_size for f in files):,} bytes, made in {time.perf_counter() - start:.0f} s", flush=True)

        width, height = map(int, args.side.split("x"))
        write_picture(folder / "lq.png", torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)))
        model, caches = str(root) if args.model == "gramsr" else args.model, folder / "caches"
        command = [str(folder / "lq.png"), "--out", str(folder / "out"), "--model", model, *others]
        status = run_user(command, hub, caches)
        if status == 0 and args.model == "s3diff":
            os.environ.update(hub.environment(caches))
            (cache_folder() / SD_TURBO["text_encoder"]).unlink()
            asked = len(hub.seen)
            status = run_user(command, hub, caches) or len(hub.seen) - asked        # a request is a failure
        hub.shutdown()
    print(f"exit status {status}")
    return status


if __name__ == "__main__":
    sys.exit(user(sys.argv[2:]) if sys.argv[1:2] == ["as user"] else main())
