"""Training on several processes, here two on one CPU with gloo: the same numbers as one process.

Run: python -m pytest tests/test_distributed.py
"""

import csv
import sys

import pytest
import runs
import torch
from safetensors.torch import load_file
from test_train import SMALL, STAGES, launch, photos  # noqa: F401 (photos is a fixture)

import train_vosr
import training
from models.support import launch as launch_module

def train_here(photos, out, words, stop_at):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_vosr.PRESETS, "tiny", (SMALL, STAGES))
        launch(patch, photos, out, *words, stop_at=stop_at)


LOSSES = {"all", "first_k", "flow", "v", "u"}      # columns of the log


def run(photos, out, world, *words, stop_at=None):  # noqa: F811
    """Train on `world` processes, 0 = without torchrun -> weights of the EMA, figures of the log."""
    if world:
        runs.together(world, train_here, photos, out, words, stop_at)
    else:
        train_here(photos, out, words, stop_at)
    with open(out / "log.csv", newline="") as f:
        losses = {(row["step"], name): float(row[name]) for row in csv.DictReader(f)
                  for name in LOSSES & row.keys() | {"held_out", "grad_norm"} if row[name]}
    return load_file(out / "model.safetensors"), losses


def same(a, b, resumed=False):
    """Equal up to the order of additions; weights are stored in float16. A log's loss is a mean since its run began."""
    assert a[0].keys() == b[0].keys()
    for name, tensor in a[0].items():
        torch.testing.assert_close(tensor, b[0][name], atol=2e-3, rtol=2e-3, msg=name)
    x, y = ({key: loss for key, loss in losses.items() if not (resumed and key[1] in LOSSES)} for _, losses in (a, b))
    assert len(x) > 2 and x == pytest.approx(y, rel=1e-4)


@pytest.fixture(scope="module")
def start(photos, tmp_path_factory):  # noqa: F811
    """An autoencoder and a flow trained by one process."""
    folder = tmp_path_factory.mktemp("start")
    run(photos, folder / "ae", 0, "autoencoder")
    run(photos, folder / "flow", 0, "flow", "--init", folder / "ae")
    return {"flow": folder / "ae", "distill": folder / "flow"}


@pytest.mark.parametrize("stage", ["flow", "distill"])
def test_two_processes_equal_one(photos, start, tmp_path, stage):  # noqa: F811
    """The same global batch in the same parts: by one process, by two copies (DDP)."""
    words = [stage, "--init", start[stage], "--batch-size", 4, "--micro-batch", 1]
    one = run(photos, tmp_path / "one", 0, *words)
    assert one[1]["0", "held_out"] != one[1]["4", "held_out"], "nothing was learned"
    same(one, run(photos, tmp_path / "ddp", 2, *words))


@pytest.fixture(scope="module")
def straight(photos, start, tmp_path_factory):  # noqa: F811
    return run(photos, tmp_path_factory.mktemp("straight"), 0, "flow", "--init", start["flow"], "--batch-size", 4,
               "--micro-batch", 2)


@pytest.mark.parametrize("before, after", [(2, 0), (0, 2)])
def test_resume_on_another_number_of_processes(photos, start, straight, tmp_path, before, after):  # noqa: F811
    words = ["flow", "--init", start["flow"], "--batch-size", 4, "--micro-batch", 2]
    half = run(photos, tmp_path / "parts", before, *words, stop_at=2)
    rest = run(photos, tmp_path / "parts", after, *words)
    same(straight, rest, resumed=True)
    assert not torch.equal(half[0]["dit.blocks.0.mlp.w3.weight"], rest[0]["dit.blocks.0.mlp.w3.weight"])


def test_each_process_needs_its_photos(photos, tmp_path, monkeypatch):  # noqa: F811
    """Three photos cannot be shared by two."""
    monkeypatch.setattr(sys, "argv", ["train_vosr.py", "--stage", "autoencoder", "--data", str(photos),
                                      "--out", str(tmp_path), "--batch-size", "3"])
    monkeypatch.setattr(launch_module, "join", lambda device: (0, 2))
    with pytest.raises(training.UserError, match="--batch-size 3 is not 2 processes x"):
        train_vosr.main()
