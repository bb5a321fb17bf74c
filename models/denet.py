"""The degradation estimator of S3Diff: two small ResNets look at the low-quality picture, each says with one number how bad it is.

Papers:  MM-RealSR 2205.05065, where it comes from (DEResNet); S3Diff 2409.17058, which keeps it frozen and lets its scores steer LoRA.
Weights: de_net.pth of zhangap/S3Diff, a plain state dict. Parameter names are the public ones; their first number is the branch.
Left out: how it was trained.

        lq -> 3x3 conv -> blocks at width 64 -> 3x3 conv, stride 2 -> blocks at 128 -> mean over pixels -> MLP -> sigmoid     twice

What the numbers mean: the authors' code lists them as blur, noise; that order is not checked here, and there is no unit. They were learned by
comparing (metric learning: the same picture made worse should score higher), so they rank pictures; 0.6 is not twice 0.3.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class ResidualBlock(nn.Module):
    """x + conv, ReLU, conv, without norm: a norm would take away what is to be measured.  (B, C, H, W) -> same shape"""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


def stages(num_feats, num_blocks, downscales):
    """Blocks width by width; a plain convolution stands between two stages only where the resolution or the width changes."""
    layers = []
    for width, blocks, stride, following in zip(num_feats, num_blocks, downscales, (*num_feats[1:], num_feats[-1])):
        layers += [ResidualBlock(width) for _ in range(blocks)]
        if stride > 1 or following != width:
            layers.append(nn.Conv2d(width, following, 3, stride, padding=1))
    return nn.Sequential(*layers)


class DegradationEstimator(nn.Module):
    """One score in (0, 1) per kind of degradation; the branches share nothing.

    lq: (B, 3, H, W) in [0, 1], as it was read, before any enlarging -> (B, num_degradation)
    Any size will do. Keep it in float32 whatever the rest runs in: it is small, and S3Diff's sines of 2 pi w score magnify an error.
    """

    def __init__(self, num_in_ch=3, num_degradation=2, num_feats=(64, 64, 64, 128), num_blocks=(2, 2, 2, 2), downscales=(1, 1, 2, 1)):
        super().__init__()
        branches = range(num_degradation)
        self.conv_first = nn.ModuleList([nn.Conv2d(num_in_ch, num_feats[0], 3, padding=1) for _ in branches])
        self.body = nn.ModuleList([stages(num_feats, num_blocks, downscales) for _ in branches])
        self.fc_degree = nn.ModuleList([nn.Sequential(nn.Linear(num_feats[-1], 512), nn.ReLU(), nn.Linear(512, 1), nn.Sigmoid())
                                        for _ in branches])

    def forward(self, lq):
        branches = zip(self.conv_first, self.body, self.fc_degree)
        return torch.cat([degree(body(first(lq)).mean((2, 3))) for first, body, degree in branches], dim=1)
