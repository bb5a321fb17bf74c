"""Losses of GramSR's later LoRA sets: a diffusion model's guidance (CSD), and Gram matrices of visual tokens.

Papers:  GramSR, 2604.25457; CSD, 2310.19415, as in PiSA-SR, 2412.03017; Gram matrices as in DINOv3, 2508.10104.
Left out: CSD in half precision throughout, as PiSA-SR computes it.

CSD is that of PiSA-SR, which GramSR extends; the Gram loss is a reading of a figure.
"""

import torch
import torch.nn.functional as F

from models.unet import alphas_cumprod
from models.vit import standardised

CSD_TIMES = 20, 500     # t is drawn from 20 .. 499, as by PiSA-SR's script


def loss_csd(prior, z, t, noise, context, negative, guidance=7.5):
    """Classifier score distillation: where guidance would move a latent, the latent is moved.

    Noise is added, and a frozen UNet removes it twice: with the negative context, which gives `fake`, and with guidance
    away from that, which gives `real`: a poor and a good clean latent, in the prior's eyes. The gradient that z gets is
    2 g / numel, with g along fake - real; descending it moves z from fake towards real. The value of the loss means
    little. g is divided by the mean distance of z to real, one number an image, so that its size hangs less on t: the
    noisier z_t, the further both are from z.

    prior: a function (z_t, t, context) -> eps
    z: (B, C, h, w) clean scaled latent; t: (B,) of CSD_TIMES; noise: like z, standard normal
    context: (B, N, D) of the LQ image; negative: like it, zeros in GramSR, a negative prompt in PiSA-SR
    -> scalar
    """
    with torch.no_grad():
        a = alphas_cumprod().to(z.device, non_blocking=True)[t].view(-1, 1, 1, 1)
        z_t = a.sqrt() * z + (1 - a).sqrt() * noise
        eps = prior(z_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([negative, context])).float()
        eps_neg, eps_cond = eps.chunk(2)
        eps_guided = eps_neg + guidance * (eps_cond - eps_neg)
        # clean latents, z_t without the estimated noise
        fake = (z_t - (1 - a).sqrt() * eps_neg) / a.sqrt()
        real = (z_t - (1 - a).sqrt() * eps_guided) / a.sqrt()
        g = (fake - real) / (z - real).abs().mean((1, 2, 3), keepdim=True)  # Eq. GramSR (4)
        target = z - g
    return F.mse_loss(z, target)


def normalised(x):
    """(B, 3, H, W) in [-1, 1] -> with ImageNet's mean and deviation removed, as DINO expects"""
    return standardised(0.5 * x + 0.5)


def features(vit, x):
    """What the Gram loss compares, DINOv3's patches.  x: (B, 3, H, W) in [-1, 1] -> (B, N, D)"""
    return vit(normalised(x).to(vit.norm.weight.dtype))[:, vit.front :].float()


def gram(x, channels=False, normalise=True, positive=False):
    """Gram matrices: all dot products. They keep which tokens are similar, and forget any rotation of the features.

    The paper's figure says |G(hq) - G(sr)|^2 / N^2, not what N counts, nor whether rows are normalised. The defaults
    are DINOv3's; its loss weight of 500 fits them: without normalisation the loss is thousands of times larger.
    x: (B, N, D); channels: style transfer's matrix, the mean over positions, which forgets where things are
    normalise: tokens to length 1; positive: negative similarities are set to 0 -> (B, N, N), or (B, D, D)
    """
    if normalise:
        x = F.normalize(x, dim=-1)
    G = x.mT @ x / x.shape[1] if channels else x @ x.mT
    return G.relu() if positive else G


def loss_gram(sr, hq, **kind):
    """Mean squared difference of Gram matrices of features (B, N, D); kind: options of `gram` -> scalar"""
    return F.mse_loss(gram(sr, **kind), gram(hq, **kind))  # Eq. GramSR (5)
