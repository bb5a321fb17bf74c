"""The judge of S3Diff, in training only: is this picture real or made?  A frozen DINO looks, three small heads decide.

Papers:  Vision-aided GAN 2112.09130, DiffAugment 2006.10738, spectral normalisation 1802.05957.
Weights: dino_vitbase16_pretrain.pth for the backbone. The heads, named as in vision_aided_loss 0.1.0, have none.
Left out: its other backbones and losses, class conditions.

    picture -> augment -> 224 px -> DINO --- block 4 of 12, patches 14 x 14 --> map head -> 3 x 3 logits
                                         |-- block 8, patches ----------------> map head -> 3 x 3 logits
                                         `-- block 11, class token -----------> Linear   -> 1 logit

    D = Discriminator(vit)
    loss = D(x, "generator", D.draw(x, x_src, generator))       # or "real", "fake"; x_src: what x was made from
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import spectral_norm

from models.vit import IMAGENET_STD

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
TARGETS = {"real": 0.8, "fake": 0.0, "generator": 0.8}  # official: "generator" is smoothed, too


# ---- augmentation: else D learns the few real pictures by heart; differentiable, since G learns through it

@dataclass
class AugmentPlan:
    """What was drawn, an entry a picture."""
    brightness: list    # in [0, 1), as the next two; 0.5 changes nothing
    saturation: list
    contrast: list
    translation: list   # (rows, columns): pixel (i, j) comes from (i + rows, j + columns)
    cutout: list        # (row, column) of the hole's centre


def draw_augment(x, generator):
    """A plan for pictures x (B, 3, H, W)."""
    (B, _, H, W), options = x.shape, {"generator": generator, "device": generator.device}

    def integers(low, high):
        return torch.randint(low, high, (B,), **options).tolist()

    colours = torch.rand(3, B, **options).tolist()
    translation = zip(*[integers(-share(side, 1 / 8), share(side, 1 / 8) + 1) for side in (H, W)])
    cutout = zip(*[integers(0, side + 1 - share(side, 1 / 2) % 2) for side in (H, W)])
    return AugmentPlan(*colours, list(translation), list(cutout))


def share(side, part):
    return int(side * part + 0.5)


def augment(x, plan, steps=None):
    """Colour, translation and a hole of half the picture's sides.  x: (B, 3, H, W) in [-1, 1] -> like x, not clamped

    steps: a list that receives every (name, intermediate picture)
    """
    (H, W), steps = x.shape[2:], [] if steps is None else steps

    def step(name, x):
        steps.append((name, x))
        return x

    def column(draws):
        return x.new_tensor(draws).view(-1, 1, 1, 1)

    x = step("brightness", x + column(plan.brightness) - 0.5)
    gray = x.mean(1, keepdim=True)
    x = step("saturation", gray + 2 * column(plan.saturation) * (x - gray))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = step("contrast", mean + (column(plan.contrast) + 0.5) * (x - mean))
    moved = [F.pad(one, (-cols, cols, -rows, rows)) for one, (rows, cols) in zip(x, plan.translation)]  # zeros follow
    x = step("translation", torch.stack(moved))
    whole, h, w = torch.ones(len(x), 1, H, W), share(H, 1 / 2), share(W, 1 / 2)
    for one, (row, col) in zip(whole, plan.cutout):
        top, left = row - h // 2, col - w // 2
        one[:, max(top, 0) : max(top + h, 0), max(left, 0) : max(left + w, 0)] = 0
    return step("cutout", x * whole.to(x))


# ---- heads

class Blur(nn.Module):
    """The filter (1, 3, 3, 1) / 8 along rows and columns, before each stride.  side -> side + 2 * padding - 3"""

    def __init__(self, channels, padding):
        super().__init__()
        tap = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.padding = padding
        self.register_buffer("filt", torch.outer(tap, tap).repeat(channels, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.filt, padding=self.padding, groups=len(self.filt))


def map_head(D, width):
    """(B, D, 14, 14) -> (B, 1, 3, 3).  Sides on the way: 15, 7, 6, 3."""
    return nn.Sequential(
        Blur(D, padding=2), spectral_norm(nn.Conv2d(D, width, 3, stride=2)), nn.LeakyReLU(0.2),
        Blur(width, padding=1), spectral_norm(nn.Conv2d(width, 1, 1, stride=2)))


class Heads(nn.Module):
    """Spectral norm divides a weight by its largest singular value: no layer can stretch a difference.

    It is estimated by power iteration, one step of weight_u, weight_v at every forward in training mode.
    """

    def __init__(self, D, width):
        super().__init__()
        token_head = nn.Sequential(spectral_norm(nn.Linear(D, width)), nn.LeakyReLU(0.2))
        self.decoder = nn.ModuleList([map_head(D, width), map_head(D, width), token_head])
        self.out = spectral_norm(nn.Linear(width, 1))

    def forward(self, early, late, token):
        """-> logits (B, 3, 3), (B, 3, 3), (B, 1)"""
        first, second, third = self.decoder
        return [first(early).squeeze(1), second(late).squeeze(1), self.out(third(token))]


# ---- the discriminator

def multilevel_loss(logits, target):
    """Cross entropy with logits (B, ...), mean within a level, SUM over levels -> (B, 1)."""
    losses = [F.binary_cross_entropy_with_logits(level, torch.full_like(level, TARGETS[target]), reduction="none")
              for level in logits]
    return sum(loss.flatten(1).mean(1, keepdim=True) for loss in losses)  # Eq. S3Diff (7)


class Discriminator(nn.Module):
    """vit: DINO (vit.py, version 1) of 8 blocks or more; it is frozen here.

    It is no submodule: 343 MB that never change stay out of state_dict and parameters(). But through _apply it
    follows .to(device) and .to(dtype).
    """

    def __init__(self, vit, head_width=128):
        super().__init__()
        self.__dict__["vit"] = vit.requires_grad_(False).eval()  # past nn.Module's register
        self.blocks = [vit.cfg.depth - back for back in (8, 4, 1)]  # 4, 8, 11 of the public model
        # A list, since the package can ask several backbones.
        self.decoder = nn.ModuleList([Heads(vit.cfg.embed_dim, head_width)])

    def _apply(self, fn, recurse=True):
        # official: a plain list hides the backbone from .to() as well
        self.vit._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def draw(self, x, x_src, generator):
        """What `forward` gets beside x: how to augment it."""
        return draw_augment(x, generator)

    def features(self, x):
        """What DINO sees in x (B, 3, H, W) in [-1, 1] -> two maps (B, D, 14, 14), class token (B, D)"""
        side = self.vit.cfg.img_size
        x = F.interpolate(x * 0.5 + 0.5, (side, side), mode="area")
        # official: the mean is CLIP's, the deviation ImageNet's
        mean, std = (x.new_tensor(c).view(3, 1, 1) for c in (CLIP_MEAN, IMAGENET_STD))
        outputs = enumerate(self.vit.layers((x - mean) / std))
        early, late, last = (self.vit.norm(tokens) for i, tokens in outputs if i in self.blocks)
        side //= self.vit.cfg.patch_size
        early, late = (tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for tokens in (early, late))
        return early, late, last[:, 0]

    def forward(self, x, target, plan=None):
        """Loss of x: (B, 3, H, W) in [-1, 1].

        target: real, fake, or generator (a fake to pass as real); plan: of `draw`, None = x as it is -> (B, 1)
        """
        x = x if plan is None else augment(x, plan)
        return multilevel_loss(self.decoder[0](*self.features(x)), target)
