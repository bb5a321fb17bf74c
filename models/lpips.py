"""LPIPS, a perceptual distance: how far apart are a classifier's features of two images, weighted as people judge?

Paper:   "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 1801.03924; version 0.1.
Weights: a trunk and five small heads: vgg16-397923af.pth, lpips_vgg.pth, or alexnet-owt-7be5be79.pth, lpips_alex.pth.
         VGG is what S3Diff and GramSR train with, AlexNet what papers report.
Left out: SqueezeNet, maps instead of one value an image, training the heads, version 0.0.

    x, y -> trunk -> features of five layers, unit length at each pixel -> squared difference
         -> mean over pixels -> weighted sum over channels, which is the head -> sum over layers

The paper has head and mean the other way round; both are linear, so the result is the same, with fewer products.
"""

from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support.imaging import like
from models.support.weights import fetch, load_strictly, read_tensors

SHIFT = (-0.030, -0.088, -0.188)    # ImageNet's mean and standard deviation, for [-1, 1]
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10                         # added to the length of a feature vector, which may be 0


# ---- trunks: torchvision's `features`, up to the last ReLU that is compared

def vgg():
    """Make the layers of VGG-16: pairs and triples of 3x3 convolutions, with a pooling in between."""
    layers, c_in = [], 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(convolutions):
            layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU(inplace=True)]
            c_in = width
    return layers


def alex():
    """Make the layers of AlexNet."""
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True),
    ]


@dataclass
class Net:
    trunk: Callable     # () -> list of layers
    compared: dict      # {layer whose output is compared: its channels}
    smallest: int       # side of an image in pixels
    trunk_file: str
    heads_file: str


NETS = {
    "vgg": Net(vgg, {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}, 16, "vgg16-397923af.pth", "lpips_vgg.pth"),
    "alex": Net(alex, {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}, 31, "alexnet-owt-7be5be79.pth", "lpips_alex.pth"),
}


# ---- the distance

def imagenet_scaled(x):
    """Normalise images as the trunks were trained.  (B, 3, H, W) in [-1, 1] -> same shape"""
    return (x - like(x, SHIFT).view(3, 1, 1)) / like(x, SCALE).view(3, 1, 1)


def unit(f, eps=EPS):
    """Scale the feature vector of each pixel to length one.  (B, c, h, w) -> same shape, in float32 or float64"""
    f = f.to(torch.promote_types(f.dtype, torch.float32))  # float16 has no 1e-10, and would divide by 0
    # official: the root of a sum, whose gradient is NaN where it is 0; here not
    length = torch.linalg.vector_norm(f, dim=1, keepdim=True)
    return f / (length + eps)


class LPIPS(nn.Module):
    """Measures how different images look.

    x, y: (B, 3, H, W) in [-1, 1], sides of at least 16 (vgg) or 31 (alex) pixels -> (B,), 0 = equal
    """

    def __init__(self, net="vgg"):
        super().__init__()
        self.net = NETS[net]
        self.features = nn.Sequential(*self.net.trunk())
        for i, channels in enumerate(self.net.compared.values()):
            # the public name is lin0.model.1.weight: number 0 was a dropout, while the heads were trained
            head = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{i}", nn.ModuleDict({"model": head}))

    @classmethod
    def from_pretrained(cls, net="vgg", device="cpu"):
        """Load the public weights, frozen. Raises WeightError."""
        with torch.device("meta"):
            model = cls(net)
        trunk, heads = fetch(model.net.trunk_file), fetch(model.net.heads_file)
        tensors = {k: v for k, v in read_tensors(trunk).items() if k.startswith("features.")}
        load_strictly(model, tensors | read_tensors(heads), f"{trunk} with {heads}")
        return model.requires_grad_(False).eval().to(device)

    def unit_features(self, x):
        """Yield what is compared, layer by layer.  (B, 3, H, W) in [-1, 1] -> five of (B, c, h, w), of length one"""
        x = imagenet_scaled(x)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.net.compared:
                yield unit(x)

    def layer_distances(self, x, y):
        """Measure the distance in each of the five layers.  x, y: of `forward` -> (B, 5). Raises ValueError."""
        if x.shape != y.shape or min(x.shape[-2:]) < self.net.smallest:
            raise ValueError(f"LPIPS wants two images of one size, at least {self.net.smallest} px a side, "
                             f"got {tuple(x.shape)} and {tuple(y.shape)}")
        out = []
        for i, (f, g) in enumerate(zip(self.unit_features(x), self.unit_features(y))):
            weight = self.get_submodule(f"lin{i}.model.1").weight.flatten()     # (c,)
            out.append(((f - g).square().mean((2, 3)) * weight).sum(1))
        return torch.stack(out, dim=1)

    def forward(self, x, y):
        """Sum the distances of the layers.  x, y: (B, 3, H, W) in [-1, 1] -> (B,)"""
        return self.layer_distances(x, y).sum(1)
