"""Ours, and no paper's: what the tiny systems (tiny.py) learn from, where the papers' losses need large downloads.

    ours                  in place of                        because
    PatchDiscriminator    heads on DINO (discriminator.py)   DINO is a download of 343 MB
    RandomLPIPS           LPIPS on VGG16 (lpips.py)          VGG16 is a download of 553 MB

Both are called as what they stand in for; only, PatchDiscriminator always needs its plan.
"""

from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import spectral_norm

from models.discriminator import multilevel_loss
from models.lpips import imagenet_scaled, unit

FAINT = 0.3     # added to the length that a feature vector is divided by, so vectors shorter than this count less


class PatchDiscriminator(nn.Module):
    """Tells results from photographs, patch by patch, each beside the enlarged LQ image that it belongs to.

    Four convolutions; the last three have a head each, which gives every place a logit: patches of three sizes.

    Trap: three strides of 2 leave a lattice of 8 pixels in a discriminator's gradient. The autoencoder's cells are as
    large, and a generator wove the lattice into every image: there its spectrum was up to 31 times that around it. So
    images are rolled, by new offsets each time, and kernels are 4x4, which meet every pixel equally often.
    """

    def __init__(self, width=32):
        super().__init__()
        widths = (6, width, 2 * width, 4 * width)   # 6: RGB of both images
        self.layers = nn.ModuleList()
        for c_in, c_out in pairwise(widths):
            self.layers.append(spectral_norm(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1)))
        self.layers.append(spectral_norm(nn.Conv2d(widths[-1], widths[-1], 3, padding=1)))
        # of all layers but the first; not normalised: logits may be large
        self.heads = nn.ModuleList([nn.Conv2d(c, 1, 1) for c in (*widths[2:], widths[-1])])

    def draw(self, x, x_src, generator):
        """What `forward` gets beside x: the enlarged LQ images x_src (B, 3, H, W), and offsets to roll both by."""
        offsets = torch.randint(8, (len(x_src), 2), generator=generator, device=generator.device)
        return x_src, offsets.tolist()

    def forward(self, x, target, plan):
        """Loss of x: (B, 3, H, W) in [-1, 1]; target: see `Discriminator.forward`; plan: of `draw` -> (B, 1)"""
        x_src, offsets = plan
        both = torch.cat([x, x_src], dim=1)
        h = torch.stack([image.roll(offset, (1, 2)) for image, offset in zip(both, offsets)])
        features = []
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
            features.append(h)      # (B, C, H/2, W/2), H/4, H/8, H/8
        logits = [head(h) for head, h in zip(self.heads, features[1:])]
        return multilevel_loss(logits, target)


class RandomLPIPS(nn.Module):
    """LPIPS's formula on features of random filters, all weighted alike; 2103.10571 found that they train as well.

    Three convolutions, each at half the size of the one before, of 16, 32, 64 filters, the same for everybody. Filters
    start orthogonal; then their means are taken out, so each sums to zero, and brightness is not seen: L2 beside it
    answers for that.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.convs = nn.ModuleList()
        for c_in, c_out in ((3, 16), (16, 32), (32, 64)):
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, padding_mode="reflect", bias=False, device="cpu")
            nn.init.orthogonal_(conv.weight, gain=2**0.5, generator=generator)
            conv.weight.data -= conv.weight.data.mean((2, 3), keepdim=True)
            self.convs.append(conv)

    def unit_features(self, x):
        """(B, 3, H, W) in [-1, 1] -> (B, 16, H, W), (B, 32, H/2, W/2), (B, 64, H/4, W/4), of length one or below"""
        x = imagenet_scaled(x)
        for conv in self.convs:
            if conv is not self.convs[0]:
                x = F.avg_pool2d(x, 2)
            x = F.leaky_relu(conv(x), 0.2)
            yield unit(x, FAINT)

    def forward(self, x, y):
        """x, y: (B, 3, H, W) in [-1, 1], sides of at least 8 pixels -> (B,), larger is worse"""
        pairs = zip(self.unit_features(x), self.unit_features(y))
        distances = [(f - g).square().mean((2, 3)).sum(1) for f, g in pairs]
        return torch.stack(distances, dim=1).sum(1)
