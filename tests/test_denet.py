"""The degradation estimator. Its golden figures run in test_goldens.py.    python -m pytest tests/test_denet.py"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases_vosr import fill_module

from models.denet import DegradationEstimator
from models.support.weights import WeightError, load_strictly

MANIFEST = Path(__file__).resolve().parents[2] / "shared" / "manifests" / "de_net.json"


def tiny():
    torch.manual_seed(0)
    return DegradationEstimator(num_feats=(8, 8, 12, 12))


def pictures(B=2, H=12, W=17):
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(1))


def test_names_and_shapes_are_the_public_ones():
    if not MANIFEST.exists():
        pytest.skip(f"{MANIFEST} is not at hand")
    with torch.device("meta"):
        model = DegradationEstimator()
    tensors = json.loads(MANIFEST.read_text())["tensors"]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == tensors


def test_size():
    with torch.device("meta"):
        model = DegradationEstimator()
    assert sum(p.numel() for p in model.parameters()) == 2_351_362
    plain = [i for i, layer in enumerate(model.body[0]) if isinstance(layer, torch.nn.Conv2d)]
    assert plain == [6] and model.body[0][6].stride == (2, 2)


def test_a_wrong_file_is_refused():
    state = tiny().state_dict()
    load_strictly(tiny(), state, "f.pth")
    with pytest.raises(WeightError, match=r"^f.pth: does not fit this network: missing body\.1\.0\.conv1\.bias \(1 in all\)$"):
        load_strictly(tiny(), {k: v for k, v in state.items() if k != "body.1.0.conv1.bias"}, "f.pth")


@torch.no_grad()
def test_equals_its_formulas():
    """A branch written out by the names of its tensors, at the public size."""
    model, x = fill_module(DegradationEstimator()), pictures()
    p = model.state_dict()

    def conv(name, x, stride=1):
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], stride, padding=1)

    def linear(name, x):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    for i in range(2):
        h = conv(f"conv_first.{i}", x)
        for j in range(9):
            name = f"body.{i}.{j}"
            h = conv(name, h, 2) if j == 6 else h + conv(f"{name}.conv2", conv(f"{name}.conv1", h).relu())
        score = linear(f"fc_degree.{i}.2", linear(f"fc_degree.{i}.0", F.adaptive_avg_pool2d(h, 1).flatten(1)).relu()).sigmoid()
        assert torch.allclose(model(x)[:, i : i + 1], score, atol=1e-6)


@torch.no_grad()
def test_stages_of_other_widths():
    """A convolution where the width changes, one where the resolution does, and none after the last blocks."""
    model, x = tiny(), pictures()
    kinds = [(layer.stride[0], layer.out_channels) if isinstance(layer, torch.nn.Conv2d) else "block" for layer in model.body[1]]
    assert kinds == ["block"] * 4 + [(1, 12)] + ["block"] * 2 + [(2, 12)] + ["block"] * 2
    assert model.body[0](model.conv_first[0](x)).shape == (2, 12, 6, 9) and model(x).shape == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize("H, W", [(1, 1), (1, 9), (2, 3), (33, 20)])
def test_any_size(H, W):
    model, x = tiny(), pictures(3, H, W)
    scores = model(x)
    assert scores.shape == (3, 2) and (scores > 0).all() and (scores < 1).all()
    assert torch.allclose(model(x[1:2]), scores[1:2], atol=1e-6), "pictures do not see each other"


@pytest.mark.parametrize("i", [0, 1])
def test_branches_share_nothing(i):
    model, x = tiny(), pictures()
    model(x)[:, i].sum().backward()
    for name, p in model.named_parameters():
        own = name.split(".")[1] == str(i)
        assert (p.grad is not None and p.grad.abs().sum() > 0) if own else (p.grad is None or not p.grad.any()), name
    before = model(x).detach()
    with torch.no_grad():
        for module in (model.conv_first, model.body, model.fc_degree):
            for p in module[1 - i].parameters():
                p.add_(0.1)
    assert torch.equal(model(x)[:, i], before[:, i]) and not torch.equal(model(x)[:, 1 - i], before[:, 1 - i])
