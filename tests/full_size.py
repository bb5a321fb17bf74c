"""A public model at its full size, as a new user meets it: downloaded, loaded, one picture upscaled. Only the numbers in the files are random.

    python tests/full_size.py [--model vosr-0.5b-1step] [--side 100x75] [--steps N] [--tile PX] [--device auto] [--dtype auto] [--keep DIR]

Writes the model's files into a temporary folder (0.5B: 2.7 GB, 1.4B: 7 GB; twice that with what is downloaded), serves them on this machine,
runs sample.py against that server in a process of its own, whose peak memory is therefore its own, and removes everything.
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

import models.vosr  # noqa: E402
import sample  # noqa: E402
from bench import peak_memory  # noqa: E402
from models.imaging import write_picture  # noqa: E402
from models.vosr import PUBLIC, VOSR  # noqa: E402
from models.weights import FILES  # noqa: E402
from release import Hub, contents, rows, write_release  # noqa: E402


def user(arguments):
    """What runs in a process of its own: sample.py with a clock on its three parts; the last line is the figures as JSON."""
    FILES.update(rows())
    seconds = {}

    def timed(name, function):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        return wrapper

    models.vosr.fetch = timed("download", models.vosr.fetch)
    VOSR.from_pretrained = timed("from_pretrained", VOSR.from_pretrained)
    VOSR.upscale = timed("upscale", VOSR.upscale)
    status = sample.main(arguments)
    print(json.dumps(seconds | {"memory": peak_memory(torch.device("cpu")), "threads": torch.get_num_threads()}))
    return status


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="vosr-0.5b-1step", choices=PUBLIC)
    p.add_argument("--side", default="100x75", help="width x height of the input, enlarged 4 times")
    p.add_argument("--keep", type=Path, metavar="DIR", help="folder for the files of the release")
    args, others = p.parse_known_args()     # the others are sample.py's: --steps, --tile, --device, ...
    needed = {"0.5b": 6e9, "1.4b": 16e9}[PUBLIC[args.model][0]]
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
        command = [sys.executable, __file__, "as user", str(folder / "lq.png"), "--out", str(folder / "out"), "--model", args.model, *others]
        done = subprocess.run(command, env=os.environ | hub.environment(folder / "caches"), stdout=subprocess.PIPE, text=True)
        hub.shutdown()
    *lines, last = done.stdout.splitlines() or [""]
    print(*lines, sep="\n")
    if done.returncode == 0:
        s = json.loads(last)
        print(f"downloaded {hub.sent:,} bytes in {s['download']:.1f} s, loaded in {s['from_pretrained'] - s['download']:.1f} s, "
              f"upscaled in {s['upscale']:.1f} s with {s['threads']} threads, peak memory {s['memory']:.0f} MB")
    print(f"exit status {done.returncode}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(user(sys.argv[2:]) if sys.argv[1:2] == ["as user"] else main())
