"""Seconds and peak memory of a VOSR on this machine.

    python tests/bench.py [tiny|0.5b|0.5b-1step|1.4b|1.4b-1step] [--device auto] [--dtype auto] [--side 128] [--steps N] [--repeat 7]

Parts first, then the whole picture: median and spread after one warm-up. tiny is the embedded model; the others have their full size and
random weights, so no file is needed. Multi-step models also run one guided step the long way, which the cache and the blind branch avoid.
"""

import argparse
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.flow import guided  # noqa: E402
from models.vosr import SIZES, VOSR  # noqa: E402
from training import choose_device, choose_dtype  # noqa: E402


def build(name):
    """-> VOSR on the CPU"""
    if name == "tiny":
        return VOSR.from_pretrained()
    size, _, one_step = name.partition("-")
    cfg = SIZES[size]
    if one_step:
        cfg = replace(cfg, dit=replace(cfg.dit, auxiliary_time_cond=True), steps=1, guidance=1.0)
    return VOSR(cfg).eval()


def seconds(functions, repeat, device):
    """Time functions in turn, so that a busy machine is busy for all of them -> for each: sorted seconds of `repeat` calls after one warm-up"""
    times = []
    for _ in range(repeat + 1):
        for function in functions:
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    n = len(functions)
    return [sorted(times[n + i :: n]) for i in range(n)]


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):             # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """MB allocated on the GPU, or resident on the CPU, at most since `reset_peak_memory` (which only Linux knows on the CPU)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(OSError):             # not getrusage: that also counts what the parent process had
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 2**10
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", default="tiny", choices=["tiny", "0.5b", "0.5b-1step", "1.4b", "1.4b-1step"])
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--side", type=int, default=128, help="pixels per side of the input, enlarged 4 times")
    p.add_argument("--steps", type=int, help="of the whole picture (default: the model's own)")
    p.add_argument("--repeat", type=int, default=7)
    args = p.parse_args()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model = build(args.model).to(device=device, dtype=dtype)
    dit, vae, side = model.dit, model.vae, 4 * args.side
    lq = torch.rand(1, 3, args.side, args.side, device=device)
    x = torch.rand(1, 3, side, side, device=device, dtype=dtype)
    z_lq, feat, t, r = vae.encode(x), model.tokens(x), torch.ones(1, device=device), torch.zeros(1, device=device)
    z, tile_lq = torch.randn(2, 1, dit.cfg.out_channels, dit.cfg.input_size, dit.cfg.input_size, device=device, dtype=dtype)
    print(f"vosr-{args.model}, {device}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    peaks = []

    def report(*parts):
        """Measure (name, function) pairs in turn and print a line for each -> their medians"""
        reset_peak_memory(device)
        measured = seconds([function for _, function in parts], args.repeat, device)
        peaks.append(peak_memory(device))
        for (name, _), times in zip(parts, measured):
            spread = f"({times[0] * 1e3:.1f} to {times[-1] * 1e3:.1f})"
            print(f"{name:28} {statistics.median(times) * 1e3:9.1f} ms  {spread:24} {peaks[-1]:7.0f} MB", flush=True)
        return [statistics.median(times) for times in measured]

    report(("encode", lambda: vae.encode(x)))
    report(("decode", lambda: model.decode(z_lq)))
    report(("tokens of one tile", lambda: model.tokens(x)))
    report(("DiT on one tile", lambda: dit(z, tile_lq, feat, t, r)))
    if dit.r_embedder is None:
        twice, lqs, feats, cache = torch.cat([z, z]), torch.cat([tile_lq, 0.15 * tile_lq]), torch.cat([feat, 0 * feat]), {}
        long, short = report(("guided step, the long way", lambda: dit(twice, lqs, feats, t.repeat(2))),
                             ("guided step", lambda: guided(dit, z, tile_lq, feat, 1.0, 0.0, 0.5, cache=cache)))
        print(f"{'':28} {long / short:9.2f} times as fast")
    report((f"whole picture {args.side} -> {side}", lambda: model.upscale(lq, steps=args.steps)))
    print(f"peak memory {max(peaks):.0f} MB")


if __name__ == "__main__":
    main()
