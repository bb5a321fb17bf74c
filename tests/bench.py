"""Seconds and peak memory of a VOSR or of S3Diff on this machine.

    python tests/bench.py [tiny|0.5b|0.5b-1step|1.4b|1.4b-1step] [--device auto] [--dtype auto] [--side 128] [--steps N] [--repeat 7]
    python tests/bench.py s3diff [--device auto] [--dtype auto] [--side 128] [--batch 1] [--repeat 7] [--json FILE] [--tiny]

Parts first, then the whole picture: median and spread after one warm-up. tiny is the embedded model; the others have their full size and
random weights, so no file is needed. Multi-step models also run one guided step the long way, which the cache and the blind branch avoid.

s3diff is compared with reference.py (diffusers, peft, transformers) where these are installed: first whether both, and adapters folded into
the weights and beside them, give the same numbers in float32; then seconds, measured in turn; then the peak memory of a process that has
only one of the two. Memory of a row is what one call adds to what was there. --tiny: small widths, to see in seconds whether all this works.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from models.clip import TextConfig, TextEncoder  # noqa: E402
from models.flow import guided  # noqa: E402
from models.lora import LoRA  # noqa: E402
from models.s3diff import S3Diff, S3DiffConfig  # noqa: E402
from models.unet import UNetConfig  # noqa: E402
from models.vae import VAEConfig  # noqa: E402
from models.vosr import SIZES, VOSR  # noqa: E402
from release import numbers  # noqa: E402
from training import choose_device, choose_dtype  # noqa: E402

TINY = S3DiffConfig(UNetConfig(widths=(64, 64, 64, 64), num_heads=(1, 1, 1, 1), layers_per_block=1, context_dim=64),
                    VAEConfig(widths=(32, 32, 32, 32), layers_per_block=1), r_unet=8, r_vae=4)
TINY_TEXT = TextConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, vocab_size=999)


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


def bench_vosr(args, device, dtype):
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


def build_s3diff(tiny, device):
    """-> S3Diff with random weights, no part of which does nothing; the text encoder; (2, 77) ids of its two prompts"""
    with torch.device("meta"):
        model, encoder = S3Diff(TINY if tiny else S3DiffConfig()), TextEncoder(TINY_TEXT if tiny else None)
    generator = torch.Generator().manual_seed(0)
    for network in (model, encoder):
        tensors = {k: numbers(k, x.shape, generator).to(device) for k, x in network.state_dict().items()}
        network.load_state_dict(tensors, assign=True)
        network.eval()
    ids = torch.randint(encoder.cfg.vocab_size, (2, 77), generator=generator).to(device)
    model.prompts = encoder(ids)
    return model, encoder, ids


@contextmanager
def beside():
    """In here, or in a function that is wrapped with it, no adapter is folded into its layer's weight."""
    rule, LoRA.folding_pays = LoRA.folding_pays, lambda *_: False
    try:
        yield
    finally:
        LoRA.folding_pays = rule


def added_memory(function, device):
    """MB that one call needs beyond what is there before it."""
    with suppress(OSError, AttributeError):     # glibc keeps what was freed, and would use it unseen
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak_memory(device)                   # to what is there now
    before = peak_memory(device)
    function()
    return peak_memory(device) - before


def parts_of(ours, theirs, lq):
    """What is measured -> {row: {"ours", "ours, beside" or "reference": function}}; theirs: a Reference or None"""
    cfg, like, scores = ours.cfg, ours.unet.conv_in.weight, ours.estimate(lq)
    x = torch.nn.functional.interpolate(2 * lq - 1, scale_factor=4, mode="bilinear").to(like)
    C_vae, C_unet = ours.matrices("vae", scores), ours.matrices("unet", scores)
    z, prompts = ours.vae.encode(x, C=C_vae), ours.prompts.to(like)
    encode, eps = lambda: ours.vae.encode(x, C=C_vae), lambda: ours.guided(z, cfg.t, prompts, C_unet, cfg.guidance)
    rows = {"estimator": {"ours": lambda: ours.estimate(lq)}, "two texts": {}, "encode": {"ours": encode}, "UNet, two prompts": {"ours": eps},
            "decode": {"ours": lambda: ours.vae.decode(z)}, "whole picture": {"ours": lambda: ours.upscale(lq)}}
    if len(lq) == 1:                    # several pictures are never folded
        rows["encode"]["ours, beside"], rows["UNet, two prompts"]["ours, beside"] = beside()(encode), beside()(eps)
    if theirs:
        theirs.modulate(scores)
        contexts = [row[None] for row in prompts]
        same = (theirs.describe, lambda: theirs.encode(x), lambda: theirs.guided(z, cfg.t, contexts, cfg.guidance),
                lambda: theirs.decode(z), lambda: theirs.upscale(lq))
        for row, function in zip(list(rows)[1:], same):
            rows[row]["reference"] = function
    return rows


def check_s3diff(ours, theirs, device):
    """Whether all ways give the same numbers, on a smaller picture; float32."""
    lq = torch.rand(1, 3, 32, 32, device=device)
    for row, ways in parts_of(ours, theirs, lq).items():
        results = {who: function() for who, function in ways.items() if row != "two texts"}
        for who in results.keys() - {"ours"}:
            error = ((results[who] - results["ours"]).abs().max() / results["ours"].abs().max()).item()
            print(f"{row}: {who} is {error:.1e} off, of the largest number", flush=True)
            if not error < 1e-3:
                sys.exit(f"bench.py: {row}: {who} computes something else")


def bench_s3diff(args, device, dtype):
    reference = args.only != "ours" and all(map(find_spec, ("diffusers", "peft", "transformers")))
    model, encoder, ids = build_s3diff(args.tiny, device)
    lq = torch.rand(args.batch, 3, args.side, args.side, device=device)
    if reference:
        from reference import Reference
    else:
        Reference = lambda *_: None  # noqa: E731
    if args.only is None:
        check_s3diff(model, Reference(model, encoder, ids), device)
    model.unet.to(dtype), model.vae.to(dtype), encoder.to(dtype)
    theirs = Reference(model, encoder, ids)
    del encoder
    if args.only:
        reset_peak_memory(device)
        (model if args.only == "ours" else theirs).upscale(lq)
        return print(peak_memory(device))

    print(f"s3diff, {args.batch} of {args.side} -> {4 * args.side}, {device}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = []
    for row, ways in parts_of(model, theirs, lq).items():
        memory = [added_memory(function, device) for function in ways.values()]
        measured = dict(zip(ways, seconds([*ways.values()], args.repeat, device)))
        for (who, times), extra in zip(measured.items(), memory):
            ms, ratio = 1e3 * statistics.median(times), ""
            rows.append({"row": row, "who": who, "ms": ms, "from": times[0] * 1e3, "to": times[-1] * 1e3, "MB": extra})
            if "reference" in ways and len(ways) > 1:
                rows[-1]["times_reference"] = 1e3 * statistics.median(measured["reference"]) / ms
                ratio = f"{rows[-1]['times_reference']:6.2f}x"
            spread = f"({times[0] * 1e3:.1f} to {times[-1] * 1e3:.1f})"
            print(f"{row:18} {who:13} {ms:9.1f} ms  {spread:24} {extra:7.0f} MB {ratio}", flush=True)
    del model, theirs, ways
    for who in ["ours", "reference"] if reference else ["ours"]:
        flags = [f"--{name}={getattr(args, name)}" for name in ("device", "dtype", "side", "batch")] + ["--tiny"] * args.tiny
        done = subprocess.run([sys.executable, __file__, "s3diff", "--only", who, *flags], stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"row": "process", "who": who, "MB": float(done.stdout.split()[-1])})
        print(f"a process with {who} alone, at its peak while it upscales: {rows[-1]['MB']:.0f} MB", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"device": str(device), "dtype": str(dtype), "threads": torch.get_num_threads(), "side": args.side,
                                         "batch": args.batch, "tiny": args.tiny, "torch": torch.__version__, "rows": rows}, indent=1))


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", default="tiny", choices=["tiny", "0.5b", "0.5b-1step", "1.4b", "1.4b-1step", "s3diff"])
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--side", type=int, default=128, help="pixels per side of the input, enlarged 4 times")
    p.add_argument("--steps", type=int, help="of the whole picture (default: the model's own)")
    p.add_argument("--repeat", type=int, default=7)
    p.add_argument("--batch", type=int, default=1, help="s3diff: pictures at once")
    p.add_argument("--json", type=Path, metavar="FILE", help="s3diff: also write the figures there")
    p.add_argument("--tiny", action="store_true", help="s3diff: small widths")
    p.add_argument("--only", choices=["ours", "reference"], help=argparse.SUPPRESS)     # one call, for its memory
    args = p.parse_args()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    (bench_s3diff if args.model == "s3diff" else bench_vosr)(args, device, dtype)


if __name__ == "__main__":
    main()
