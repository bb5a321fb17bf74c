"""Seconds and peak memory of the embedded model on this machine.

    python tests/bench.py [--device auto] [--dtype auto] [--side 128] [--repeat 7]

Parts first, then the whole picture: median and spread after one warm-up. Other models and reference libraries join here with their issues.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.vosr import VOSR  # noqa: E402
from training import choose_device, choose_dtype  # noqa: E402


def seconds(function, repeat, device):
    """-> sorted seconds of `repeat` calls after one warm-up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])


def peak_memory(device):
    """Peak memory of this process in MB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--side", type=int, default=128, help="pixels per side of the input, enlarged 4 times")
    p.add_argument("--repeat", type=int, default=7)
    args = p.parse_args()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model = VOSR.from_pretrained(device=device, dtype=dtype)
    lq = torch.rand(1, 3, args.side, args.side, device=device)
    cell, side = model.cfg.dit.input_size, 4 * args.side
    z = torch.randn(1, model.cfg.dit.out_channels, cell, cell, device=device, dtype=dtype)
    x = torch.rand(1, 3, side, side, device=device, dtype=dtype)
    feat, t = model.tokens(x), torch.ones(1, device=device)
    r = torch.zeros(1, device=device)
    print(f"vosr-tiny, {device}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, part in (("encode", lambda: model.vae.encode(x)), ("tokens of one tile", lambda: model.tokens(x)),
                       ("DiT on one tile", lambda: model.dit(z, z, feat, t, r)),
                       (f"whole picture {args.side} -> {side}", lambda: model.upscale(lq))):
        times = seconds(part, args.repeat, device)
        print(f"{name:28} {statistics.median(times) * 1e3:9.1f} ms  ({times[0] * 1e3:.1f} to {times[-1] * 1e3:.1f})")
    print(f"peak memory {peak_memory(device):.0f} MB")


if __name__ == "__main__":
    main()
