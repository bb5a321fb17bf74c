"""How fast: milliseconds, pictures a second, TFLOP/s and memory of a system's parts and of whole pictures, and of training steps.

    python tests/bench.py [tiny|0.5b|0.5b-1step|1.4b|1.4b-1step|s3diff|gramsr|train|counts] [--device auto] [--dtype auto] [--side 128] [--batch 1]
                          [--steps N] [--compile] [--graphs] [--repeat 7] [--json FILE] [--tiny] [--data PHOTOS --workers 8]

tiny (the default) is the embedded model; vosr, which is 0.5b-1step, and the others have their full size and random weights, so no file is
needed. train: one step of all three scripts, without and with gradient checkpointing; with --data also how many photos a second are read.
counts: kernels and bytes of a picture on a GPU, counted without one (bench_counts.py).

First every fast way is checked against the plain one in float32, on a small picture: adapters folded into the weights or beside them, guidance
with what is kept or the long way, ours or the reference (diffusers, peft, transformers, where these are installed: tests/reference.py). Then
the ways of a row are measured in turn, so that a busy machine is busy for all: median and spread, after a first call that counts floating
point operations and the MB which a call adds to what was there. "of peak" is against a large matrix product, measured in the same run.
--tiny: small widths, to see in seconds whether all this works.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from models.clip import TextConfig, TextEncoder  # noqa: E402
from models.flow import guided  # noqa: E402
from models.gramsr import SETS, GramSR, GramSRConfig  # noqa: E402
from models.support import fast_lora  # noqa: E402
from models.s3diff import S3Diff, S3DiffConfig  # noqa: E402
from models.support.gpu import tune  # noqa: E402
from models.support.graphs import replay  # noqa: E402
from models.support.tokens import FixedTokens  # noqa: E402
from models.support.precision import in_half  # noqa: E402
from models.tiny import TinyVOSR  # noqa: E402
from models.unet import UNetConfig  # noqa: E402
from models.vae import VAEConfig  # noqa: E402
from models.vit import DINOv3Config  # noqa: E402
from models.vosr import SIZES, VOSR  # noqa: E402
from release import numbers  # noqa: E402
from sample import to_compile  # noqa: E402
from training import choose_device, choose_dtype  # noqa: E402

UNET, VAE = UNetConfig(widths=(64, 64, 64, 64), num_heads=(1, 1, 1, 1), layers_per_block=1, context_dim=64), \
    VAEConfig(widths=(32, 32, 32, 32), layers_per_block=1)      # of --tiny
REFERENCE = ("diffusers", "peft", "transformers")
aten = torch.ops.aten
ON_CPU = {      # which torch does not count
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


# ---- measuring ------------------------------------------------------------------------------------------------------


def seconds(functions, repeat, device):
    """Time functions in turn -> for each: sorted seconds of `repeat` calls"""
    times = [[] for _ in functions]
    start = time.perf_counter()
    while device.type == "cuda" and time.perf_counter() < start + 1:    # clocks rise, libraries choose their kernels
        for function in functions:
            function()
        torch.cuda.synchronize()
    for _ in range(repeat):
        for function, mine in zip(functions, times):
            if device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                function()
                end.record()
                end.synchronize()
                mine.append(start.elapsed_time(end) / 1e3)
            else:
                start = time.perf_counter()
                function()
                mine.append(time.perf_counter() - start)
    return [sorted(mine) for mine in times]


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


def first_call(function, device):
    """-> floating point operations of a call; MB that it needs beyond what was there before it; MB that the process holds on a GPU"""
    with suppress(OSError, AttributeError):     # glibc keeps what was freed, and would use it unseen
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak_memory(device)                   # to what is there now
    before = peak_memory(device)
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        function()
    return counter.get_total_flops(), peak_memory(device) - before, torch.cuda.max_memory_reserved() / 2**20 if device.type == "cuda" else 0


def matmul_peak(device, dtype):
    """TFLOP/s of a large matrix product, what this machine can do at best."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    a @ a
    return 2 * n**3 / seconds([lambda: a @ a], 20 if device.type == "cuda" else 5, device)[0][0] / 1e12


class Table:
    """Rows as they are measured: to the screen at once, and kept for --json."""

    def __init__(self, args, device, dtype):
        self.args, self.device, self.rows, self.batch = args, device, [], args.batch or 1
        self.about = {"model": args.model, "batch": args.batch, "side": args.side, "device": str(device), "dtype": str(dtype).removeprefix("torch."),
                      "tf32": torch.backends.cudnn.allow_tf32, "compile": args.compile, "graphs": args.graphs,
                      "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
                      "peak_tflops": matmul_peak(device, dtype)}
        print(*(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.about.items()), sep=", ")
        print(f"{'':27} {'':13} {'ms':>9}   {'from, to':18} {'pictures/s':>10} {'TFLOP/s':>8} {'of peak':>7} {'MB':>6} {'held':>6}  ours is faster", flush=True)

    def measure(self, rows, compile=(), graphs=None):
        """rows: {name: {"ours" or another way: function}}; compile: networks, graphs: a model, after what can be counted only before"""
        if self.args.graphs:        # shapes alone tell graphs apart
            rows = {name: {who: f for who, f in ways.items() if who != "beside"} for name, ways in rows.items()}
        counted = {}
        for name, ways in rows.items():
            with self.surviving(name):
                counted[name] = {who: first_call(function, self.device) for who, function in ways.items()}
        for network in compile if self.args.compile else ():
            network.compile()
        if self.args.graphs and graphs:
            replay(graphs)
        for name in counted:
            with self.surviving(name):
                self.measure_row(name, rows[name], counted[name])

    @contextmanager
    def surviving(self, name):
        """A row that needs too much memory is said to, and the next one's turn comes."""
        try:
            yield
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.print({"row": name, "who": "ours", "failed": "out of memory"})

    def measure_row(self, name, ways, counted):
        if self.args.compile:
            for function in ways.values():
                function(), function()
        measured = seconds([*ways.values()], self.args.repeat, self.device)
        ours = statistics.median(measured[0])
        for who, times in zip(ways, measured):
            (flops, MB, held), median = counted[who], statistics.median(times)
            row = {"row": name, "who": who, "ms": 1e3 * median, "from": 1e3 * times[0], "to": 1e3 * times[-1],
                   "pictures_per_s": self.batch / median, "tflops": flops / median / 1e12, "MB": MB, "held_MB": held}
            row["of_peak"] = row["tflops"] / self.about["peak_tflops"]
            if who != "ours":
                row["ours_is_faster"] = median / ours
            self.print(row)

    def print(self, row):
        """To the screen and to --json at once: what was measured outlives whatever comes next."""
        self.rows.append(row)
        if self.args.json:
            self.args.json.write_text(json.dumps(self.about | {"rows": self.rows}, indent=1))
        if "failed" in row:
            return print(f"{row['row']:27} {row['who']:13} {row['failed']}", flush=True)
        print(f"{row['row']:27} {row['who']:13} {row['ms']:9.1f}   {row['from']:<8.1f} {row['to']:<9.1f} {row['pictures_per_s']:10.2f} "
              f"{row['tflops']:8.3g} {row['of_peak']:7.0%} {row['MB']:6.0f} {row['held_MB']:6.0f}"
              + (f" {row['ours_is_faster']:8.2f}x" if "ours_is_faster" in row else ""), flush=True)


# ---- what is measured: each has rows(lq) -> {row: {"ours" or another way: function}}, parts first, then the whole picture


class Vosr:
    """name: tiny, or a size with or without -1step"""

    def __init__(self, name, args, device):
        self.args = args
        if name == "tiny":
            self.model = TinyVOSR.from_pretrained("vosr-tiny", device=device)
        else:
            size, _, one_step = name.partition("-")
            cfg = SIZES[size]
            if one_step:
                cfg = replace(cfg, dit=replace(cfg.dit, auxiliary_time_cond=True), steps=1, guidance=1.0)
            with torch.device(device):
                self.model = VOSR(cfg).to(device).eval()
            torch.nn.init.normal_(self.model.dit.final_layer.linear.weight, std=0.02)   # or every result would be 0 in every way
        self.reference = None

    def to(self, dtype):
        in_half(self.model, dtype)

    def rows(self, lq):
        model, dit, like = self.model, self.model.dit, self.model.dit.x_embedder.proj.weight
        x = F.interpolate(2 * lq.to(like) - 1, scale_factor=4)
        z_lq, feat, t, r = model.vae.encode(x), model.tokens(x), torch.ones(len(lq), device=x.device), torch.zeros(len(lq), device=x.device)
        tile = z_lq[..., : dit.cfg.input_size, : dit.cfg.input_size]
        z = torch.randn_like(tile)
        rows = {"encode": {"ours": lambda: model.vae.encode(x)}, "decode": {"ours": lambda: model.decode(z_lq)},
                "tokens of one tile": {"ours": lambda: model.tokens(x)}, "DiT on one tile": {"ours": lambda: dit(z, tile, feat, t, r)}}
        if dit.r_embedder is None:
            fixed, zero = FixedTokens(dit), torch.zeros_like(feat)

            def ours():
                return guided(fixed.dit_with(feat), z, tile, feat, 1.0, 0.0, 0.5)

            def long():
                good, weak = dit(torch.cat([z, z]), torch.cat([tile, 0.15 * tile]), torch.cat([feat, zero]), t.repeat(2)).chunk(2)
                return weak + 0.5 * (good - weak)

            rows["guided step"] = {"ours": ours, "the long way": long}
        return rows | {"whole picture": {"ours": lambda: model.upscale(lq, steps=self.args.steps)}}


def with_numbers(network, generator, device):
    """A network from the meta device, with random numbers in which no part does nothing."""
    network.load_state_dict({k: numbers(k, x.shape, generator).to(device) for k, x in network.state_dict().items()}, assign=True)
    return network.eval()


@contextmanager
def beside():
    """In here, or in a function that is wrapped with it, no adapter is folded into its layer's weight."""
    rule, fast_lora.folding_pays = fast_lora.folding_pays, lambda *_: False
    try:
        yield
    finally:
        fast_lora.folding_pays = rule


class S3:
    def __init__(self, args, device):
        cfg = S3DiffConfig(UNET, VAE, r_unet=8, r_vae=4) if args.tiny else S3DiffConfig()
        text = TextConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, vocab_size=999) if args.tiny else TextConfig()
        with torch.device("meta"):
            self.model, self.encoder = S3Diff(cfg), TextEncoder(text)
        generator = torch.Generator(device).manual_seed(0)
        with_numbers(self.model, generator, device), with_numbers(self.encoder, generator, device)
        self.ids = torch.randint(self.encoder.cfg.vocab_size, (2, 77), generator=generator, device=device)
        self.model.prompts = self.encoder(self.ids)
        self.reference = None

    def to(self, dtype):
        in_half(self.model.unet, dtype), in_half(self.model.vae, dtype), self.encoder.to(dtype)

    def refer(self):
        from reference import S3DiffReference

        self.reference = S3DiffReference(self.model, self.encoder, self.ids)

    def rows(self, lq):
        ours, theirs, cfg = self.model, self.reference, self.model.cfg
        scores, like = ours.estimate(lq), ours.unet.conv_in.weight
        x = F.interpolate(2 * lq.to(like) - 1, scale_factor=4, mode="bilinear")
        C_vae, C_unet = ours.matrices("vae", scores), ours.matrices("unet", scores)
        z, prompts = ours.vae.encode(x, adapters=C_vae), ours.prompts.to(like)
        encode, eps = lambda: ours.vae.encode(x, adapters=C_vae), lambda: ours.guided(z, cfg.t, prompts, C_unet, cfg.guidance)
        rows = {"estimator": {"ours": lambda: ours.estimate(lq)}, "encode": {"ours": encode}, "UNet, two prompts": {"ours": eps},
                "decode": {"ours": lambda: ours.vae.decode(z)}, "whole picture": {"ours": lambda: ours.upscale(lq)}}
        if len(lq) == 1:                    # several pictures are never folded
            rows["encode"]["beside"], rows["UNet, two prompts"]["beside"] = beside()(encode), beside()(eps)
        if theirs:
            theirs.modulate(scores)
            contexts, x_t, z_t = [row[None].to(theirs.like) for row in prompts], x.to(theirs.like), z.to(theirs.like)
            rows["encode"]["reference"] = lambda: theirs.encode(x_t)
            rows["UNet, two prompts"]["reference"] = lambda: theirs.guided(z_t, cfg.t, contexts, cfg.guidance)
            rows["decode"]["reference"] = lambda: theirs.decode(z_t)
            rows["whole picture"]["reference"] = lambda: theirs.upscale(lq)     # reads its two texts anew, as officially
        return rows


class Gram:
    def __init__(self, args, device):
        ranks = dict.fromkeys(SETS, 4)
        cfg = GramSRConfig(UNET, VAE, DINOv3Config(embed_dim=48, depth=2, num_heads=3), ranks) if args.tiny else GramSRConfig(ranks=ranks)
        with torch.device("meta"):
            self.model = GramSR(cfg)
        with_numbers(self.model, torch.Generator(device).manual_seed(0), device)
        self.reference = None

    def to(self, dtype):
        in_half(self.model, dtype)

    def refer(self):
        from reference import GramSRReference

        self.reference = GramSRReference(self.model)

    def rows(self, lq):
        ours, theirs = self.model, self.reference
        x = F.interpolate(2 * lq.to(ours.unet.conv_in.weight) - 1, scale_factor=4, mode="bilinear")
        z, context = ours.vae.encode(x), ours.tokens(x)

        def e():
            return ours.predict(z, context)

        rows = {"tokens": {"ours": lambda: ours.tokens(x)}, "encode": {"ours": lambda: ours.vae.encode(x)},
                "UNet at (1, 1, 1)": {"ours": e, "beside": beside()(e)},
                "UNet, (1, .5, .2)": {"ours": lambda: ours.predict(z, context, (1, 0.5, 0.2))},
                "decode": {"ours": lambda: ours.vae.decode(z)}, "whole picture": {"ours": lambda: ours.upscale(lq)}}
        if theirs:
            x_t, z_t, context_t = (tensor.to(theirs.like) for tensor in (x, z, context))
            for name, function in {"tokens": lambda: theirs.tokens(x_t), "encode": lambda: theirs.encode(x_t), "decode": lambda: theirs.decode(z_t),
                                   "UNet at (1, 1, 1)": lambda: theirs.predict(z_t, context_t), "whole picture": lambda: theirs.upscale(lq)}.items():
                rows[name]["reference"] = function
        return rows


def check(system, device):
    """Whether all ways of a row give the same numbers, on a smaller picture; float32."""
    for row, ways in system.rows(torch.rand(1, 3, 32, 32)).items():
        results = {who: function() for who, function in ways.items()}
        for who in results.keys() - {"ours"}:
            error = ((results[who] - results["ours"]).abs().max() / results["ours"].abs().max()).item()
            print(f"{row}: {who} is {error:.1e} off, of the largest number", flush=True)
            if not error < 1e-3:
                sys.exit(f"bench.py: {row}: {who} computes something else")


@torch.no_grad()
def bench(args, device, dtype):
    system = {"s3diff": S3, "gramsr": Gram}[args.model](args, device) if args.model in ("s3diff", "gramsr") else Vosr(args.model, args, device)
    reference = hasattr(system, "refer") and args.only != "ours" and all(map(find_spec, REFERENCE))
    if not args.only and not args.trace:
        if reference:
            system.refer()
        check(system, device)
    system.reference = None
    system.to(dtype)
    if reference:
        system.refer(), system.reference.to(dtype)          # what is cast already is shared
    if device.type == "cuda":
        system.model = deepcopy(system.model)               # the reference keeps its layouts
        tune(system.model)
    lq = torch.rand(args.batch or 1, 3, args.side, args.side)          # from the CPU, as sample.py has it
    if args.trace:
        system.model.upscale(lq)
        with torch.profiler.profile() as profiler:
            system.model.upscale(lq)
        print(profiler.key_averages().table(sort_by="self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total", row_limit=40))
        return profiler.export_chrome_trace(str(args.trace))
    if args.only:
        model = system.model if args.only == "ours" else system.reference
        system.encoder = None
        reset_peak_memory(device)
        model.upscale(lq)
        return print(peak_memory(device))
    table = Table(args, device, dtype)
    table.measure(system.rows(lq), to_compile(system.model), system.model)
    if hasattr(system.model, "merge"):      # as sample.py has it at scales of 1
        system.model.merge()
        anew = [system.model.unet, system.model.vit]
        for network in anew:
            network._compiled_call_impl = None      # graphs read weights where they were
        rows = system.rows(lq)
        table.measure({f"{row}, merged": {"ours": rows[row]["ours"]} for row in ("UNet at (1, 1, 1)", "whole picture")}, anew, system.model)
    if not hasattr(system, "refer"):
        return table
    for who in ["ours", "reference"] if reference else ["ours"]:
        flags = [f"--{name}={getattr(args, name)}" for name in ("device", "dtype", "side")] + [f"--batch={table.batch}"] + ["--tiny"] * args.tiny
        done = subprocess.run([sys.executable, __file__, args.model, "--only", who, *flags], stdout=subprocess.PIPE, text=True, check=True)
        table.rows.append({"row": "process", "who": who, "MB": float(done.stdout.split()[-1])})
        print(f"a process with {who} alone, at its peak while it upscales: {table.rows[-1]['MB']:.0f} MB", flush=True)
    return table


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", default="tiny", choices=["tiny", "vosr", "0.5b", "0.5b-1step", "1.4b", "1.4b-1step", "s3diff", "gramsr", "train", "counts"])
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--side", type=int, default=128, help="pixels per side of the input, enlarged 4 times; train: crops of 4 times this")
    p.add_argument("--batch", type=int, help="pictures at once (default 1; train: 8 for VOSR, 4 for the others)")
    p.add_argument("--steps", type=int, help="of VOSR's whole picture (default: the model's own)")
    p.add_argument("--compile", action="store_true", help="torch.compile ours")
    p.add_argument("--graphs", action="store_true", help="CUDA graphs: one launch for all kernels of a network; also with --compile")
    p.add_argument("--trace", type=Path, metavar="FILE", help="write a profiler's trace of one whole picture there, and nothing else")
    p.add_argument("--repeat", type=int, default=7)
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    p.add_argument("--tiny", action="store_true", help="s3diff, gramsr, train: small widths")
    p.add_argument("--data", help="train: also read photos from here")
    p.add_argument("--workers", type=int, default=8, help="train: processes that read them")
    p.add_argument("--only", choices=["ours", "reference"], help=argparse.SUPPRESS)     # one call, for its memory
    args = p.parse_args()
    args.model = {"vosr": "0.5b-1step"}.get(args.model, args.model)
    if args.model == "counts":
        from bench_counts import bench_counts

        return bench_counts(args)
    device = choose_device(args.device)
    if args.graphs and device.type != "cuda":
        return print(f"--graphs needs CUDA, and this is {device}: nothing is measured")
    dtype = choose_dtype(args.dtype, device, "bfloat16" if args.model == "train" else "float16")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.model == "train":
        from bench_train import bench_train

        table = bench_train(args, Table(args, device, dtype), device, dtype)
    else:
        table = bench(args, device, dtype)
    if args.json and table:
        args.json.write_text(json.dumps(table.about | {"rows": table.rows}, indent=1))


if __name__ == "__main__":
    main()
