"""LPIPS. Its golden figures run in test_goldens.py.    python -m pytest tests/test_lpips.py"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases_vosr import fill_module

from models import lpips
from models.lpips import EPS, LPIPS, NETS, SCALE, SHIFT, unit
from models.support.weights import FILES, WeightError, read_tensors

SHARED = Path(__file__).resolve().parents[2] / "shared"
ALEXNET = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}  # convolutions of torchvision's
both = pytest.mark.parametrize("net", ("vgg", "alex"))


def heads(net):
    """The public file of small layers, without a download."""
    path = SHARED / "public" / f"lpips_{net}.pth"
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    return read_tensors(path)


def make(net="vgg", positive=True):
    """Random weights; heads are positive, as the public ones are."""
    model = fill_module(LPIPS(net)).requires_grad_(False)
    for i in range(5):
        weight = model.get_submodule(f"lin{i}.model.1").weight
        weight.data = weight.abs() if positive else weight
    return model


def pictures(B=2, H=32, W=48, seed=1):
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shapes(tensors):
    return {k: tuple(v.shape) for k, v in tensors.items()}


# -----------------------------------------------------------------------------
# names and files

def test_names_of_vgg_are_the_public_ones():
    if not (SHARED / "manifests").exists():
        pytest.skip("needs ../shared/manifests")
    trunk, small = (json.loads((SHARED / "manifests" / f"{name}.json").read_text())["tensors"] for name in ("vgg16_torchvision", "lpips_vgg"))
    with torch.device("meta"):
        ours = shapes(LPIPS("vgg").state_dict())
    assert ours == {k: tuple(v) for k, v in (trunk | small).items() if not k.startswith("classifier.")}


def test_names_of_alexnet():
    with torch.device("meta"):
        ours = shapes(LPIPS("alex").state_dict())
    trunk = {f"features.{i}.weight": shape for i, shape in ALEXNET.items()} | {f"features.{i}.bias": shape[:1] for i, shape in ALEXNET.items()}
    assert {k: v for k, v in ours.items() if k.startswith("features")} == trunk
    small = {k: v for k, v in ours.items() if k not in trunk}
    assert small == {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate((64, 192, 384, 256, 256))}


@both
def test_public_heads(net):
    public = heads(net)
    with torch.device("meta"):
        ours = shapes(LPIPS(net).state_dict())
    assert shapes(public) == {k: v for k, v in ours.items() if k.startswith("lin")}
    assert all((w >= 0).all() and w.any() for w in public.values())


def test_every_file_is_in_the_table():
    assert all(name in FILES for net in NETS.values() for name in (net.trunk_file, net.heads_file))


def test_from_pretrained(monkeypatch, tmp_path):
    """torchvision's file holds a classifier too; any other surplus or gap is an error of one line."""
    trunk = {k: v for k, v in make("alex").state_dict().items() if k.startswith("features.")}
    files = dict(zip((NETS["alex"].trunk_file, NETS["alex"].heads_file), (trunk | {"classifier.1.weight": torch.zeros(4, 4)}, heads("alex"))))

    def fetch(name):
        torch.save(files[name], tmp_path / name)
        return tmp_path / name

    monkeypatch.setattr(lpips, "fetch", fetch)
    model = LPIPS.from_pretrained("alex")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, (trunk | heads("alex"))[k]) for k, v in model.state_dict().items())
    assert model(pictures(), pictures(seed=2)).min() > 0
    files["lpips_alex.pth"].pop("lin3.model.1.weight")
    with pytest.raises(WeightError, match=r"does not fit this network: missing lin3\.model\.1\.weight \(1 in all\)$"):
        LPIPS.from_pretrained("alex")


# -----------------------------------------------------------------------------
# the same numbers as others

def plain(model, net, x, y):
    """The paper's formula by functions and names, as the authors order it.  -> (B,)"""
    p, total = model.state_dict(), 0
    pools = {"vgg": (4, 9, 16, 23), "alex": (2, 5)}[net]
    taps = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}[net]
    x, y = ((v - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None] for v in (x, y))
    for i in range(taps[-1] + 1):
        if i in pools:
            x, y = (F.max_pool2d(v, *((2, 2) if net == "vgg" else (3, 2))) for v in (x, y))
        elif f"features.{i}.bias" in p:
            weight, bias = p[f"features.{i}.weight"], p[f"features.{i}.bias"]
            stride, padding = (4, 2) if weight.shape[-1] == 11 else (1, weight.shape[-1] // 2)
            x, y = (F.conv2d(v, weight, bias, stride, padding) for v in (x, y))
        else:
            x, y = x.relu(), y.relu()
        if i in taps:
            f, g = (v / ((v**2).sum(1, keepdim=True).sqrt() + EPS) for v in (x, y))
            total = total + F.conv2d((f - g) ** 2, p[f"lin{taps.index(i)}.model.1.weight"]).mean((1, 2, 3))
    return total


@both
@pytest.mark.parametrize("positive", [True, False])
def test_equals_its_formula(net, positive):
    model, y = make(net, positive), pictures(H=37, W=50, seed=2)
    ours, theirs = (pictures(H=37, W=50).requires_grad_() for _ in range(2))
    a, b = model(ours, y), plain(model, net, theirs, y)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    a.sum().backward(), b.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * theirs.grad.abs().max().item())


@both
@torch.no_grad()
def test_equals_the_authors_package(net):
    """Their heads with a random trunk: the trunk's weights would be half a gigabyte."""
    package = pytest.importorskip("lpips", reason="lpips is a reference for this test only")
    torch.manual_seed(0)
    reference, model = package.LPIPS(net=net, pnet_rand=True, verbose=False), LPIPS(net)
    tensors = {k: v for k, v in reference.state_dict().items() if k.startswith("lin") and not k.startswith("lins")}
    model.load_state_dict(tensors | {f"features.{k.split('.', 2)[2]}": v for k, v in reference.state_dict().items() if k.startswith("net.")})
    x, y = pictures(H=37, W=50), pictures(H=37, W=50, seed=2)
    value, levels = reference(x, y, retPerLayer=True)
    torch.testing.assert_close(model(x, y), value.flatten(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(model.layer_distances(x, y), torch.cat([level.flatten(1) for level in levels], dim=1), rtol=1e-4, atol=1e-7)


# -----------------------------------------------------------------------------
# properties

@both
@torch.no_grad()
def test_is_a_distance(net):
    model, x, y = make(net), pictures(), pictures(seed=2)
    assert model(x, y).shape == (2,) and torch.equal(model(x, x), torch.zeros(2))
    levels = model.layer_distances(x, y)
    assert levels.shape == (2, 5) and (levels > 0).all() and torch.equal(levels.sum(1), model(x, y))
    torch.testing.assert_close(model(x, y), model(y, x))
    torch.testing.assert_close(model(x[1:], y[1:]), model(x, y)[1:])
    smooth = F.interpolate(pictures(1, 4, 6), (48, 64), mode="bicubic")
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))
    worse = torch.cat([model(smooth, smooth + amount * noise) for amount in (0, 0.01, 0.03, 0.1, 0.3)])
    assert worse[0] == 0 and (worse.diff() > 0).all()


@both
def test_gradient_flows_to_the_picture_only(net):
    model, x, y = make(net), pictures().requires_grad_(), pictures(seed=2)
    model(x, y).sum().backward()
    assert x.grad.isfinite().all() and all(g.any() for g in x.grad) and y.grad is None
    assert all(p.grad is None for p in model.parameters())
    x.grad = None
    model(x, x.detach()).sum().backward()
    assert not x.grad.any()


def test_gradient_where_nothing_is_seen():
    """Features of zero: the same values as the plain formula, whose gradient is not a number there."""
    f = torch.tensor([[0.0, 3.0, 1e-12], [0.0, 4.0, 0.0]])[None, :, None].requires_grad_()
    expected = f / ((f**2).sum(1, keepdim=True).sqrt() + EPS)
    assert torch.allclose(unit(f), expected)
    assert torch.autograd.grad(expected.sum(), f)[0].isnan().any()
    assert torch.autograd.grad(unit(f).sum(), f)[0].isfinite().all()
    model = make("alex")
    model.features[0].bias.data.fill_(-100)         # no ReLU opens
    x = pictures().requires_grad_()
    model.features[3].bias.data.fill_(-100)
    assert not model.layer_distances(x, pictures(seed=2))[:, :2].any()
    model(x, pictures(seed=2)).sum().backward()
    assert not x.grad.any()


@both
@torch.no_grad()
def test_training_mode_changes_nothing(net):
    model, x, y = make(net), pictures(), pictures(seed=2)
    assert torch.equal(model.train()(x, y), model.eval()(x, y))


@torch.no_grad()
def test_half_precision():
    model, x, y = make("alex"), pictures(), pictures(seed=2)
    expected = model(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(x, y), expected, rtol=0.05)
    low = model.bfloat16()(x.bfloat16(), y.bfloat16())
    assert low.dtype == torch.float32 and torch.allclose(low, expected, rtol=0.05)
    assert unit(torch.zeros(1, 3, 1, 1).half()).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("net, side", [("vgg", 16), ("alex", 31)])
def test_sizes(net, side):
    model = make(net)
    assert model(pictures(1, side, side + 1), pictures(1, side, side + 1, 2)) > 0
    flat, narrow = (1, 3, side - 1, 64), (1, 3, 64, side - 1)
    for shape, other in ((flat, flat), (narrow, narrow), ((1, 3, 64, 64), (1, 3, 64, 48))):
        with pytest.raises(ValueError, match=rf"^LPIPS wants two images of one size, at least {side} px a side, got \(1, 3, .*\)$"):
            model(torch.zeros(shape), torch.zeros(other))
