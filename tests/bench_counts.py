"""Kernels and bytes of a picture, for bench.py: what PyTorch starts on a GPU, counted without one.

    python tests/bench.py counts [--side 128] [--batch 1]

Networks of full size lie on the meta device, in float16, where operations have shapes and no numbers. An operation that is no view counts as a
kernel, a group norm as three. Bytes are those of its tensors, each read or written once, a group norm's map read twice. A convolution in half is
computed in channels_last: where its map lies otherwise, cudnn moves map, weight and result, which counts as three kernels more. What a launch costs,
and what a kernel does with the GPU's cache, is left out: milliseconds are for a GPU to say.
"""

from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.gramsr import SETS, GramSR, GramSRConfig
from models.s3diff import S3Diff, S3DiffConfig
from models.support import fast_lora, gpu
from models.support.precision import in_half
from models.vosr import SIZES, VOSR

NO_KERNEL = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view"}


def nbytes(x):
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())      # an expanded one is small


class Counts(TorchDispatchMode):
    """In here operations on the meta device are counted: `kernels`, of which `casts`, and `bytes`."""

    def __init__(self):
        super().__init__()
        self.kernels = self.casts = self.bytes = 0

    def add(self, kernels, *tensors):
        self.kernels += kernels
        self.bytes += sum(map(nbytes, tensors))

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = f(*args, **kwargs), f.overloadpacket.__name__
        if f.is_view or name in NO_KERNEL:
            return result
        read = [x for x in tree_leaves((args, {**kwargs, "out": None})) if torch.is_tensor(x)]
        self.add(1, *read, *(x for x in tree_leaves(result) if torch.is_tensor(x)))
        self.casts += name == "_to_copy"
        if name == "native_group_norm":
            self.add(2, args[0])
        if name == "convolution":
            return self.convolved(*args[:2], result)
        return result

    def convolved(self, x, weight, y):
        """y, in the layout that CUDA gives it."""
        layout = torch.channels_last
        if x.is_contiguous(memory_format=layout) or weight.is_contiguous(memory_format=layout) and not weight.is_contiguous():
            return torch.empty_like(y, memory_format=layout)
        if x.dtype != torch.float32:
            self.add(3, *(x, weight, y) * 2)
        return y


class Attention(TorchFunctionMode):
    """In here attention is one kernel, as on a GPU; on the meta device it would be its formula's operations."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f is not F.scaled_dot_product_attention:
            return f(*args, **(kwargs or {}))
        result = torch.empty_like(args[0])
        self.counts.add(1, *args[:3], result)
        return result


def count(function):
    """-> Counts of a call"""
    folds = mock.patch.object(fast_lora, "folding_pays", lambda layer, x, adapters: bool(layer.active(adapters)))   # as on a GPU
    no_autocast = mock.patch("torch.autocast", lambda *_, **__: nullcontext())      # which the meta device has not
    counts = Counts()
    with torch.no_grad(), folds, no_autocast, Attention(counts), counts:
        function()
    return counts


def channels_last(network):
    network.to(memory_format=torch.channels_last)


CHANGES = {     # parts of gpu.tune: networks, what is done to each
    "as it was": ((), None),
    "casts once": (("unet", "vae", "light_decoder"), gpu.cast_once),
    "norms": (("vae", "light_decoder"), gpu.change_norms),
    "channels_last": (("vae", "light_decoder"), channels_last),
}


def s3diff(side, batch):
    """-> model, {part: function of one picture}"""
    model = S3Diff(S3DiffConfig())
    x, z, prompts = torch.empty(batch, 3, side, side), torch.empty(batch, 4, side // 8, side // 8), torch.empty(2, 77, 1024)
    C_vae, C_unet = (model.matrices(name, torch.empty(batch, 2)) for name in ("vae", "unet"))
    return model, {"encode": lambda: model.vae.encode(x, adapters=C_vae), "UNet, two prompts": lambda: model.guided(z, 999, prompts, C_unet, 1.07),
                   "decode": lambda: model.vae.decode(z)}


def gramsr(side, batch):
    model = GramSR(GramSRConfig(ranks=dict.fromkeys(SETS, 4)))
    model.merge()
    x, z, context = torch.empty(batch, 3, side, side), torch.empty(batch, 4, side // 8, side // 8), torch.empty(batch, 1029, 1024)
    return model, {"encode": lambda: model.vae.encode(x), "UNet, merged": lambda: model.predict(z, context), "decode": lambda: model.vae.decode(z)}


def vosr(side, batch):
    model = VOSR(SIZES["0.5b"])
    x, z = torch.empty(batch, 3, side, side), torch.empty(batch, 4, side // 8, side // 8)
    return model, {"encode": lambda: model.vae.encode(x), "decode, light": lambda: model.decode(z)}


def bench_counts(args):
    print(f"{'':8} {'':18} {'':15} {'kernels':>8} {'casts':>6} {'MB':>7}")
    for system in (s3diff, gramsr, vosr):
        with torch.device("meta"):
            model, parts = system(4 * args.side, args.batch or 1)
        in_half(model, torch.float16)
        for change, (names, apply) in CHANGES.items():
            for name, network in model.named_children():
                if name in names:
                    apply(network)
            for part, function in parts.items():
                counts = count(function)
                print(f"{system.__name__:8} {part:18} {change:15} {counts.kernels:8} {counts.casts:6} {counts.bytes / 1e6:7.0f}", flush=True)
