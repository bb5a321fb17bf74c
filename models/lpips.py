"""LPIPS, a perceptual distance: how far apart are a classifier's features of two images, weighted as people judge?

Paper:   "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 1801.03924; version 0.1.
Weights: a trunk and five small heads: vgg16-397923af.pth, lpips_vgg.pth, or alexnet-owt-7be5be79.pth, lpips_alex.pth.
         VGG is what S3Diff and GramSR train with, AlexNet what papers report.
Left out: SqueezeNet, maps instead of one value an image, training the heads, version 0.0.

    x, y -> trunk -> features of five layers, unit length at each pixel -> squared difference
         -> mean over pixels -> weighted sum over channels -> sum over layers
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support.weights import fetch, load_strictly, read_tensors

SHIFT = (-0.030, -0.088, -0.188)    # ImageNet's mean and standard deviation, for [-1, 1]
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10                         # added to the length of a feature vector


# ---- trunks: torchvision's `features`, up to the last ReLU that is compared

def vgg():
    layers, c_in = [], 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(convolutions):
            layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU(inplace=True)]
            c_in = width
    return layers


def alex():
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True),
    ]


NETS = {    # trunk, {layer whose output is compared: its channels}, smallest side in pixels, files of trunk and heads
    "vgg": (vgg, {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}, 16, ("vgg16-397923af.pth", "lpips_vgg.pth")),
    "alex": (alex, {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}, 31, ("alexnet-owt-7be5be79.pth", "lpips_alex.pth")),
}


# ---- the distance

def imagenet_scaled(x):
    """(B, 3, H, W) in [-1, 1] -> the same, normalised as the trunks were trained"""
    return (x - x.new_tensor(SHIFT).view(3, 1, 1)) / x.new_tensor(SCALE).view(3, 1, 1)


def unit(f, eps=EPS):
    """Feature vectors of length one, in float32 at least: half precision has no 1e-10.  (B, C, h, w) -> same shape"""
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    length = torch.linalg.vector_norm(f, dim=1, keepdim=True)  # official: a square root, gradient NaN at 0
    return f / (length + eps)


class LPIPS(nn.Module):
    """x, y: (B, 3, H, W) in [-1, 1], sides of at least 16 (vgg) or 31 (alex) pixels -> (B,), larger is worse"""

    def __init__(self, net="vgg"):
        super().__init__()
        trunk, self.compared, self.smallest, _ = NETS[net]
        self.features = nn.Sequential(*trunk())
        for i, channels in enumerate(self.compared.values()):
            # named lin0.model.1.weight in public: number 0 was a dropout when the heads were trained
            head = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{i}", nn.ModuleDict({"model": head}))

    @classmethod
    def from_pretrained(cls, net="vgg", device="cpu"):
        """The public weights, frozen. Raises WeightError."""
        with torch.device("meta"):
            model = cls(net)
        *_, files = NETS[net]
        trunk, heads = (fetch(name) for name in files)
        tensors = {k: v for k, v in read_tensors(trunk).items() if k.startswith("features.")}
        load_strictly(model, tensors | read_tensors(heads), f"{trunk} with {heads}")
        return model.requires_grad_(False).eval().to(device)

    def unit_features(self, x):
        """What is compared, layer by layer.  (B, 3, H, W) in [-1, 1] -> five of (B, C, h, w), of length one"""
        x = imagenet_scaled(x)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.compared:
                yield unit(x)

    def layer_distances(self, x, y):
        """What each of the five layers adds.  -> (B, 5). Raises ValueError."""
        if x.shape != y.shape or min(x.shape[-2:]) < self.smallest:
            raise ValueError(f"LPIPS wants two images of one size, at least {self.smallest} px a side, "
                             f"got {tuple(x.shape)} and {tuple(y.shape)}")
        out = []
        for i, (f, g) in enumerate(zip(self.unit_features(x), self.unit_features(y))):
            weight = self.get_submodule(f"lin{i}.model.1").weight.flatten()     # (C,)
            out.append(((f - g).square().mean((2, 3)) * weight).sum(1))
        return torch.stack(out, dim=1)

    def forward(self, x, y):
        return self.layer_distances(x, y).sum(1)
