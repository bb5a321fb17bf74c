"""The degradation estimator of S3Diff: two small ResNets, each scores one kind of degradation of an LQ image.

Papers:  MM-RealSR 2205.05065, where it comes from (DEResNet); S3Diff 2409.17058, which keeps it frozen.
Weights: de_net.pth of zhangap/S3Diff; the first number in a parameter's name is the ResNet, here a branch.
Left out: how it was trained.

        lq -> conv -> blocks at width 64 -> conv, stride 2 -> blocks at 128 -> mean over pixels -> MLP -> sigmoid

The authors' code lists the scores as blur, noise; nothing here has checked this order. They were learned by comparison
(of two images, the one that is degraded more should score higher), so they rank images: 0.6 is not twice 0.3.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class ResidualBlock(nn.Module):
    """Adds conv, ReLU, conv to x; a norm would remove what is to be measured.  (B, c, H, W) -> same shape"""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


NUM_BLOCKS = (2, 2, 2, 2)   # at each width
STRIDES = (1, 1, 2, 1)      # after them


def stages(num_feats):
    """Make the blocks of each width in turn, and a convolution where width or resolution changes.  num_feats: widths"""
    layers = []
    next_feats = [*num_feats[1:], num_feats[-1]]    # nothing follows the last one
    for width, next_width, blocks, stride in zip(num_feats, next_feats, NUM_BLOCKS, STRIDES):
        layers += [ResidualBlock(width) for _ in range(blocks)]
        if stride > 1 or next_width != width:
            layers.append(nn.Conv2d(width, next_width, 3, stride, padding=1))
    return nn.Sequential(*layers)


class DegradationEstimator(nn.Module):
    """Gives one score in (0, 1) for each kind of degradation; the branches share nothing.

    lq: (B, 3, H, W) in [0, 1], not enlarged -> (B, 2)
    Keep it in float32 whatever the rest runs in: S3Diff's sines of 2 pi w score magnify an error.
    """

    def __init__(self, num_feats=(64, 64, 64, 128)):
        super().__init__()
        branches = range(2)
        self.conv_first = nn.ModuleList([nn.Conv2d(3, num_feats[0], 3, padding=1) for _ in branches])
        self.body = nn.ModuleList([stages(num_feats) for _ in branches])
        self.fc_degree = nn.ModuleList([
            nn.Sequential(nn.Linear(num_feats[-1], 512), nn.ReLU(), nn.Linear(512, 1), nn.Sigmoid()) for _ in branches])

    def forward(self, lq):
        """Score images.  (B, 3, H, W) -> (B, 2)"""
        scores = []
        for conv_first, body, fc_degree in zip(self.conv_first, self.body, self.fc_degree):
            features = body(conv_first(lq)).mean((2, 3))  # (B, last width)
            scores.append(fc_degree(features))
        return torch.cat(scores, dim=1)
