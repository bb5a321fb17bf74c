"""The degradation estimator of S3Diff: two small ResNets, each scores one kind of degradation of an LQ image.

Papers:  MM-RealSR 2205.05065, where it comes from (DEResNet); S3Diff 2409.17058, which keeps it frozen.
Weights: de_net.pth of zhangap/S3Diff; the first number in a parameter's name is the ResNet, here a branch.
Left out: how it was trained.

        lq -> conv -> blocks at width 64 -> conv, stride 2 -> blocks at 128 -> mean over pixels -> MLP -> sigmoid

The authors' code lists the scores as blur, noise; that order is not checked here. They were learned by comparison (an
image that is degraded more should score higher), so they rank images; 0.6 is not twice 0.3.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class ResidualBlock(nn.Module):
    """x + conv, ReLU, conv; no norm, which would remove what is to be measured.  (B, C, H, W) -> same shape"""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


def stages(num_feats, num_blocks, downscales):
    """Blocks width by width, a convolution where resolution or width changes.

    num_feats: widths; num_blocks: blocks of each; downscales: stride after them
    """
    layers, next_feats = [], (*num_feats[1:], num_feats[-1])
    for width, blocks, stride, next_width in zip(num_feats, num_blocks, downscales, next_feats):
        layers += [ResidualBlock(width) for _ in range(blocks)]
        if stride > 1 or next_width != width:
            layers.append(nn.Conv2d(width, next_width, 3, stride, padding=1))
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
        scores = []
        for conv_first, body, fc_degree in zip(self.conv_first, self.body, self.fc_degree):
            features = body(conv_first(lq)).mean((2, 3))  # (B, 128)
            scores.append(fc_degree(features))
        return torch.cat(scores, dim=1)
