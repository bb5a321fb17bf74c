"""What a GPU demands, as far as a CPU can show it: replayed networks, and a host that never waits. Run: python -m pytest tests/test_graphs.py

A tape of torch's operations stands in for CUDA's graph: it repeats them on the tensors they had, and so forgets nothing and learns nothing new.
"""

from contextlib import contextmanager

import pytest
import torch
from bench import S3, Gram, Vosr
from test_gpu import ARGS
from test_vosr import inputs, make_dit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.support import gpu, graphs
from models.support.tokens import FixedTokens
from models.vae import VAE, VAEConfig

SYSTEMS = {"vosr": lambda: Vosr("tiny", ARGS, "cpu"), "s3diff": lambda: S3(ARGS, "cpu"),
           "gramsr": lambda: Gram(ARGS, "cpu")}
OPTIONS = {"vosr": [{"steps": 3, "guidance": 0.5}, {"steps": 1}, {"steps": 2, "guidance": 0.5, "tile": 32}],
           "s3diff": [{}, {"noise": 0.1, "blur": 0.9}, {"guidance": 1.0}],
           "gramsr": [{}, {"pixel": 0.5, "texture": 0.2}]}


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        result = f(*args, **(kwargs or {}))
        self.done.append((f, args, kwargs or {}, result))
        return result

    def replay(self):
        for f, args, kwargs, result in self.done:
            for old, new in zip(tree_leaves(result), tree_leaves(f(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():       # no view, not in place
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Those that are made, in place of CUDA's graphs."""
    made = []

    @contextmanager
    def recording(tape, pool, capture_error_mode):
        made.append(tape)
        with tape:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return made


@torch.no_grad()
@pytest.mark.parametrize("name", SYSTEMS)
def test_replayed_equals_plain(name, tapes):
    """Images of two sizes, new ones each time, and knobs that change between them; tiles, one and several batches of
    them, and a flow that keeps keys and values, which a graph must find where it was recorded."""
    model, g, calls = SYSTEMS[name]().model, torch.Generator().manual_seed(0), []
    for _ in range(3):
        for size in ((16, 16), (16, 24)):
            for options in OPTIONS[name]:
                for tiles in ({}, {"tile": 64, "overlap": 16}):
                    calls.append((torch.rand(1, 3, *size, generator=g), options | tiles))
    gpu.tune(model)     # which rounds otherwise where a group of a norm hardly varies; tests/test_fast.py compares it
    plain = [model.upscale(lq, **options) for lq, options in calls]
    graphs.replay(model)
    results = [model.upscale(lq, **options) for lq, options in calls]
    for x, y in zip(results, plain):        # all at the end: none is overwritten by its successors
        torch.testing.assert_close(x, y, atol=5e-5, rtol=0)
    assert len(tapes) > 1


@torch.no_grad()
def test_only_what_repeats_is_recorded(tapes):
    layer = torch.nn.Linear(3, 2)
    graphs.replay(torch.nn.ModuleDict({"dit": layer, "other": torch.nn.Linear(3, 2)}))
    xs = torch.randn(12, 4, 3)
    for n in (1, 2, 3, 4, 1, 1):
        torch.testing.assert_close(layer(xs[0, :n]), layer._call_impl(xs[0, :n]))
    assert len(tapes) == 1
    for n in range(4, 13):      # more shapes than are kept
        layer(xs[:n])
        assert len(layer._compiled_call_impl.graphs) <= 8
    layer.weight.mul_(2)        # in place: a graph reads where it did
    torch.testing.assert_close(layer(xs[:12]), layer._call_impl(xs[:12]))


@torch.no_grad()
def test_large_maps_are_not_recorded(tapes):
    """Of an autoencoder's halves: both up to the same size of the image."""
    model = VAE(VAEConfig(widths=(32, 32, 32, 32), layers_per_block=0))
    graphs.replay(torch.nn.ModuleDict({"vae": model}))
    assert model.encoder._compiled_call_impl.cells == 512 * 512 and model.decoder._compiled_call_impl.cells == 64 * 64
    model.encoder._compiled_call_impl.cells = 16 * 16
    for side in (24, 24, 24, 16, 16, 16):
        model.encode(torch.rand(1, 3, side, side))
    assert len(tapes) == 1


@torch.no_grad()
def test_fixed_tokens_are_told_apart(tapes):
    """Equal arguments, but tokens of all four latents are fixed, or of two; and each time other ones."""
    dit, (z_t, z_lq, _), t = make_dit(), inputs(4), torch.full((4,), 0.7)
    graphs.replay(torch.nn.ModuleDict({"dit": dit}))
    for n in (4, 2) * 4:
        feat = torch.randn(4, 4, 16)
        feat[n:] = 0
        v = FixedTokens(dit).dit_with(feat[:n])(z_t, z_lq, feat, t)
        torch.testing.assert_close(v, dit._call_impl(z_t, z_lq, feat, t))
    assert len(tapes) == 2


class Waits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.count += f in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return f(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("name, most", [("vosr", 2), ("s3diff", 3), ("gramsr", 2)])
def test_no_value_is_asked_for(name, most):
    """On a GPU the host would wait for it. Two are check_image's, of images on the CPU alone, S3Diff's third is the noise schedule's."""
    model = SYSTEMS[name]().model
    with Waits() as waits:
        model.upscale(torch.rand(1, 3, 16, 24))
    assert waits.count == most
