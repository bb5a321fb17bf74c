"""Inside a training step the host never waits for a GPU, as far as a CPU can show it. Run: python -m pytest tests/test_waits.py

A host waits where it asks a GPU for a value, and where it sends or fetches a tensor without non_blocking. Here all tensors lie on the CPU, so what
would lie on the GPU is marked: networks, optimizers, photos, what is drawn there, and what is computed of any of these.
"""

import traceback
from contextlib import ExitStack
from pathlib import Path

import pytest
import test_train
import test_train_gramsr
import test_train_s3diff
import torch
from test_train import photos  # noqa: F401
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gramsr
import train_vosr
import training
from degrade import jpeg_tables

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
FETCH = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.item}
ASK = {aten._local_scalar_dense.default, aten.nonzero.default, aten.repeat_interleave.Tensor}
INDEX = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


def tensors(tree):
    return [x for x in tree_leaves(tree) if torch.is_tensor(x)]


class Marks:
    """Which storages would lie on the GPU; `hosts`: seeds of generators that would not; `waits`: what waits, or fails there."""

    def __init__(self):
        self.storages, self.hosts, self.waits = {}, set(), []

    def wait(self, what):
        places = [frame for frame in traceback.extract_stack() if "test_waits" not in frame.filename and str(ROOT) in frame.filename]
        self.waits.append(f"{what}: {places[-1].line}" if places else what)

    def add(self, tree):
        for x in tensors(tree):
            storage = x.untyped_storage()
            self.storages[storage._cdata] = StorageWeakRef(storage)

    def __contains__(self, x):
        ref = self.storages.get(x.untyped_storage()._cdata)
        return ref is not None and not ref.expired()

    def are_drawn(self, kwargs):
        """By a generator that would be on the GPU?"""
        return kwargs.get("generator") is not None and kwargs["generator"].initial_seed() not in self.hosts


class Operations(TorchDispatchMode):
    """Marks what is computed of what is marked."""

    def __init__(self, marks):
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        marked = [x for x in given if x in self.marks]
        if marked and f in ASK:
            self.marks.wait(f"{f} asks for a value")
        if marked and f in INDEX and any(x.dtype == torch.bool and x in self.marks for x in tensors(args[1])):
            self.marks.wait(f"{f} asks how many are true")
        if marked and any(x.ndim and x not in self.marks for x in given):
            self.marks.wait(f"{f} of a tensor there and one here")
        result = f(*args, **kwargs)
        if marked or self.marks.are_drawn(kwargs):
            self.marks.add(result)
        return result


class Functions(TorchFunctionMode):
    """Marks what is sent and what is made there."""

    def __init__(self, marks):
        super().__init__()
        self.marks = marks

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f in FETCH and args[0] in self.marks or f is torch.Tensor.new_tensor and args[0] in self.marks:
            self.marks.wait(f"{f.__name__}")
        to_device = f is torch.Tensor.to and args[0] not in self.marks and self.means_device((*args[1:], *kwargs.values()))
        if to_device and not kwargs.get("non_blocking"):
            self.marks.wait("a tensor is sent without non_blocking")
        made = isinstance(kwargs.get("device"), torch.device)
        if made and f in (torch.tensor, torch.as_tensor):
            self.marks.wait("a list is sent")
        result = f(*args, **kwargs)
        if to_device:
            result = result.clone()     # on a CPU it may be what was sent
        if to_device or made and ("generator" not in kwargs or self.marks.are_drawn(kwargs)):
            self.marks.add(result)
        return result

    def means_device(self, targets):
        return any(isinstance(x, torch.device) or torch.is_tensor(x) and x in self.marks for x in targets)


@pytest.fixture
def waits(monkeypatch):
    """What the second step of a run does that waits."""
    marks = Marks()
    fit_step, generator, hq_and_lq = training.step_that_fits, training.generator, training.hq_and_lq

    def host_generator(*numbers):
        g = generator(*numbers)
        marks.hosts.add(g.initial_seed())
        return g

    def photos_there(run, images):
        hq, lq = hq_and_lq(run, images)
        hq = hq.clone()
        marks.add(hq)
        return hq, lq

    def watched(run, step):
        with ExitStack() as stack:
            if run.step == 1:
                modules = [x for x in vars(run).values() if isinstance(x, torch.nn.Module)]
                marks.add([[*m.parameters(), *m.buffers()] for m in modules])
                marks.add([[*x.state.values()] for x in vars(run).values() if isinstance(x, torch.optim.Optimizer)])
                marks.add([run.sums, run.skipped, run.skipped_in_a_row, jpeg_tables(run.device, torch.float32)])
                stack.enter_context(Functions(marks))
                stack.enter_context(Operations(marks))
            fit_step(run, step)

    monkeypatch.setattr(training, "generator", host_generator)
    monkeypatch.setattr(training, "hq_and_lq", photos_there)
    monkeypatch.setattr(training, "on_device", lambda g, device: torch.Generator().manual_seed(g.initial_seed() + 1))
    monkeypatch.setattr(training, "step_that_fits", watched)
    return marks.waits


def test_vosr(monkeypatch, photos, tmp_path, waits):  # noqa: F811
    monkeypatch.setitem(train_vosr.PRESETS, "tiny", (test_train.SMALL, test_train.STAGES))
    before = []
    for stage in ("autoencoder", "flow", "distill", "decoder"):
        test_train.launch(monkeypatch, photos, tmp_path / stage, stage, *before, "--steps", 2)
        before = ["--init", tmp_path / stage]
        assert not waits, stage


@pytest.mark.parametrize("stage", ["prior", "estimator", "adapters", "adapters, L2"])
def test_s3diff(monkeypatch, photos, tmp_path, waits, stage):  # noqa: F811
    stage, _, l2 = stage.partition(",")
    test_train_s3diff.shrink(monkeypatch, l2_share=float(bool(l2)))
    test_train_s3diff.launch(monkeypatch, photos, tmp_path, "--stage", stage, "--steps", 2)
    assert not waits


def test_gramsr(monkeypatch, photos, tmp_path, waits):  # noqa: F811
    test_train_gramsr.shrink(monkeypatch)
    before = []
    for stage in train_gramsr.ORDER:
        test_train_gramsr.launch(monkeypatch, photos, tmp_path / stage, stage, *before, "--steps", 2)
        before = ["--init", tmp_path / stage]
        assert not waits, stage


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.zeros(3), lambda x: torch.zeros(3).to(x),
                                  lambda x: x.new_tensor([1.0]), lambda x: x[torch.tensor([1])]])
def test_waits_are_seen(wait):
    marks, x = Marks(), torch.ones(3)
    marks.add(x)
    with Functions(marks), Operations(marks):
        x * 2 + torch.zeros(3).to(x, non_blocking=True) + torch.ones(())
        assert not marks.waits
        wait(x)
    assert marks.waits
