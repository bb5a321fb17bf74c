"""The degradation estimator of S3Diff: two small ResNets, each says with one number how bad a low-quality picture is.

Papers:  MM-RealSR 2205.05065, where it comes from (DEResNet); S3Diff 2409.17058, which keeps it frozen.
Weights: de_net.pth of zhangap/S3Diff; the first number in a parameter's name is the branch.
Left out: how it was trained.

        lq -> conv -> blocks at width 64 -> conv, stride 2 -> blocks at 128 -> mean over pixels -> MLP -> sigmoid

The authors' code lists the numbers as blur, noise; that order is not checked here. They were learned by comparing (a
picture made worse should score higher), so they rank pictures; 0.6 is not twice 0.3.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class ResidualBlock(nn.Module):
    """x + conv, ReLU, conv; a norm would take away what is to be measured.  (B, C, H, W) -> same shape"""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


def stages(num_feats, num_blocks, downscales):
    """Blocks width by width, a convolution between two where the resolution or the width changes."""
    layers, next_feats = [], (*num_feats[1:], num_feats[-1])
    for width, blocks, stride, following in zip(num_feats, num_blocks, downscales, next_feats):
        layers += [ResidualBlock(width) for _ in range(blocks)]
        if stride > 1 or following != width:
            layers.append(nn.Conv2d(width, following, 3, stride, padding=1))
    return nn.Sequential(*layers)


class DegradationEstimator(nn.Module):
    """One score in (0, 1) per kind of degradation; the branches share nothing.

    lq: (B, 3, H, W) in [0, 1], not enlarged -> (B, num_degradation)
    Keep it in float32 whatever the rest runs in: S3Diff's sines of 2 pi w score magnify an error.
    """

    def __init__(self, num_in_ch=3, num_degradation=2, num_feats=(64, 64, 64, 128), num_blocks=(2, 2, 2, 2),
                 downscales=(1, 1, 2, 1)):
        super().__init__()
        branches = range(num_degradation)
        self.conv_first = nn.ModuleList([nn.Conv2d(num_in_ch, num_feats[0], 3, padding=1) for _ in branches])
        self.body = nn.ModuleList([stages(num_feats, num_blocks, downscales) for _ in branches])
        self.fc_degree = nn.ModuleList([
            nn.Sequential(nn.Linear(num_feats[-1], 512), nn.ReLU(), nn.Linear(512, 1), nn.Sigmoid()) for _ in branches])

    def forward(self, lq):
        branches = zip(self.conv_first, self.body, self.fc_degree)
        return torch.cat([degree(body(first(lq)).mean((2, 3))) for first, body, degree in branches], dim=1)
