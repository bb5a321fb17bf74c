"""S3Diff's discriminator, in training only: is this image a photo or a result?  Three small heads on a frozen DINO.

Papers:  Vision-aided GAN 2112.09130, DiffAugment 2006.10738, spectral normalisation 1802.05957.
Weights: dino_vitbase16_pretrain.pth for the backbone. The heads, named as in vision_aided_loss 0.1.0, have none.
Left out: its other backbones and losses, class conditions.

    image -> augment -> 224 px -> DINO --- block 5 of 12, patches 14 x 14 --> map head -> 3 x 3 logits
                                        |-- block 9, patches ----------------> map head -> 3 x 3 logits
                                        `-- block 12, class token -----------> Linear   -> 1 logit

    discriminator = Discriminator(vit)
    plan = discriminator.draw(x, x_src, generator)          # x_src: what x was made from
    loss = discriminator(x, "generator", plan)              # or "real", "fake"

In shapes D is the width of DINO's tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import spectral_norm

from models.support.imaging import like
from models.vit import IMAGENET_STD

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
TARGETS = {"real": 0.8, "fake": 0.0, "generator": 0.8}  # official: "generator" is smoothed, too; here too


# ---- augmentation: without it the discriminator learns the few real images by heart
# It is differentiable, since the generator learns through it.

@dataclass
class AugmentPlan:
    """Holds what was drawn: lists with one entry per image."""
    brightness: list    # in [0, 1), as the next two; 0.5 changes nothing
    saturation: list
    contrast: list
    translation: list   # (rows, columns): pixel (i, j) comes from (i + rows, j + columns)
    cutout: list        # (row, column) of the hole's centre


def rounded_share(side, share):
    """Round a share of a side to whole pixels, halves up."""
    return int(side * share + 0.5)


def draw_augment(x, generator):
    """Draw a plan for images x: (B, 3, H, W). They move by up to 1/8 of a side; a hole may be anywhere."""
    B, _, H, W = x.shape

    def integers(low, high):
        return torch.randint(low, high, (B,), generator=generator, device=generator.device).tolist()

    brightness, saturation, contrast = torch.rand(3, B, generator=generator, device=generator.device).tolist()
    most_rows, most_columns = rounded_share(H, 1 / 8), rounded_share(W, 1 / 8)
    rows, columns = integers(-most_rows, most_rows + 1), integers(-most_columns, most_columns + 1)
    # a hole with an even side has its centre between two pixels, hence one place more
    last_row, last_column = H - rounded_share(H, 1 / 2) % 2, W - rounded_share(W, 1 / 2) % 2
    hole_rows, hole_columns = integers(0, last_row + 1), integers(0, last_column + 1)
    return AugmentPlan(brightness, saturation, contrast, list(zip(rows, columns)), list(zip(hole_rows, hole_columns)))


def per_image(draws, x):
    """Turn a list of B numbers into a tensor (B, 1, 1, 1) like x."""
    return like(x, draws).view(-1, 1, 1, 1)


def brightness(x, draws):
    """Adds up to 0.5 to all values, or takes it away."""
    return x + per_image(draws, x) - 0.5


def saturation(x, draws):
    """Multiplies the distance of each pixel from its grey by 0 to 2."""
    grey = x.mean(1, keepdim=True)
    return grey + 2 * per_image(draws, x) * (x - grey)


def contrast(x, draws):
    """Multiplies the distance from the image's mean by 0.5 to 1.5."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (per_image(draws, x) + 0.5) * (x - mean)


def translation(x, draws):
    """Moves each image, and fills up with zeros. F.pad with a negative width crops that side."""
    return torch.stack([F.pad(image, (-columns, columns, -rows, rows)) for image, (rows, columns) in zip(x, draws)])


def cutout(x, draws):
    """Sets a hole, half as high and wide as the image, to zero; part of it may lie outside."""
    H, W = x.shape[2:]
    h, w = rounded_share(H, 1 / 2), rounded_share(W, 1 / 2)
    mask = torch.ones(len(x), 1, H, W, device="cpu")
    for image_mask, (row, column) in zip(mask, draws):
        top, left = row - h // 2, column - w // 2
        bottom, right = top + h, left + w
        # not below 0: a negative index would count from the end
        image_mask[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = 0
    return x * mask.to(x)


def augment(x, plan):
    """Change colours, move, and cut a hole.  x: (B, 3, H, W) in [-1, 1] -> like x, not clamped"""
    x = brightness(x, plan.brightness)
    x = saturation(x, plan.saturation)
    x = contrast(x, plan.contrast)
    x = translation(x, plan.translation)
    return cutout(x, plan.cutout)


# ---- heads

class Blur(nn.Module):
    """Filters by (1, 3, 3, 1) / 8 along rows and columns, before each stride.  side -> side + 2 * padding - 3"""

    def __init__(self, channels, padding):
        super().__init__()
        tap = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.padding = padding
        self.register_buffer("filt", torch.outer(tap, tap).repeat(channels, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.filt, padding=self.padding, groups=len(self.filt))


def map_head(D, width):
    """Make a head for maps.  (B, D, 14, 14) -> (B, 1, 3, 3); sides on the way: 15, 7, 6, 3"""
    return nn.Sequential(
        Blur(D, padding=2), spectral_norm(nn.Conv2d(D, width, 3, stride=2)), nn.LeakyReLU(0.2),
        Blur(width, padding=1), spectral_norm(nn.Conv2d(width, 1, 1, stride=2)))


class Heads(nn.Module):
    """Turns DINO's features into logits.

    Spectral norm divides a weight by its largest singular value, so that a linear layer cannot enlarge a difference,
    and a convolution, whose weight is taken as a matrix, only a little. The value is estimated by power iteration, one
    step of weight_u and weight_v at every forward in training mode.
    """

    def __init__(self, D, width):
        super().__init__()
        token_head = nn.Sequential(spectral_norm(nn.Linear(D, width)), nn.LeakyReLU(0.2))
        self.decoder = nn.ModuleList([map_head(D, width), map_head(D, width), token_head])
        self.out = spectral_norm(nn.Linear(width, 1))  # the last layer of token_head; its public name is apart

    def forward(self, early, late, token):
        """Run the heads.  early, late: (B, D, 14, 14); token: (B, D) -> logits (B, 3, 3), (B, 3, 3), (B, 1)"""
        early_head, late_head, token_head = self.decoder
        return [early_head(early).squeeze(1), late_head(late).squeeze(1), self.out(token_head(token))]


# ---- the discriminator

def multilevel_loss(logits, target):
    """Take the cross entropy of logits (B, ...) of several levels: mean within a level, SUM over levels -> (B, 1)."""
    losses = [F.binary_cross_entropy_with_logits(level, torch.full_like(level, TARGETS[target]), reduction="none")
              for level in logits]
    return sum(loss.flatten(1).mean(1, keepdim=True) for loss in losses)  # Eq. S3Diff (7)


class Discriminator(nn.Module):
    """Tells photos from results.  vit: DINO (vit.py, version 1) of 8 blocks or more; it is frozen here"""

    def __init__(self, vit, head_width=128):
        super().__init__()
        # nn.Module does not look into lists, so 343 MB that never change stay out of state_dict() and parameters()
        self.backbone = [vit.requires_grad_(False).eval()]
        self.blocks = [vit.cfg.depth - back for back in (8, 4, 1)]  # counted from 0: 4, 8, 11 of the public model
        # a list, for the names: the package can have several backbones
        self.decoder = nn.ModuleList([Heads(vit.cfg.embed_dim, head_width)])

    @property
    def vit(self):
        return self.backbone[0]

    def _apply(self, fn, recurse=True):
        """Do what .to(device), .to(dtype) and the like ask, for the backbone, too."""
        # official: the plain list hides the backbone from .to() as well; here not
        self.vit._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def draw(self, x, x_src, generator):
        """Draw the plan of `forward`.  x: (B, 3, H, W)

        x_src: not used. PatchDiscriminator (tiny_losses.py), which train_s3diff.py calls in the same way, compares x
        with it.
        """
        return draw_augment(x, generator)

    def features(self, x):
        """Take DINO's features of x: (B, 3, H, W) in [-1, 1] -> two maps (B, D, 14, 14), class token (B, D)"""
        side = self.vit.cfg.img_size
        x = F.interpolate(x * 0.5 + 0.5, (side, side), mode="area")  # means of the pixels under a new one: no aliasing
        # official: the mean is CLIP's, the deviation ImageNet's; here too
        mean, std = like(x, CLIP_MEAN).view(3, 1, 1), like(x, IMAGENET_STD).view(3, 1, 1)
        outputs = list(self.vit.layers((x - mean) / std))  # each block's: (B, 1 + 14 * 14, D), the class token first
        early, late, last = (self.vit.norm(outputs[block]) for block in self.blocks)
        side //= self.vit.cfg.patch_size
        early, late = (tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for tokens in (early, late))
        return early, late, last[:, 0]

    def forward(self, x, target, plan=None):
        """Take the loss of x: (B, 3, H, W) in [-1, 1].

        target: real, fake, or generator (a fake that should pass as real); plan: of `draw`, None = x as it is
        -> (B, 1)
        """
        if plan is not None:
            x = augment(x, plan)
        logits = self.decoder[0](*self.features(x))
        return multilevel_loss(logits, target)
