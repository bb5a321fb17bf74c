"""What GramSR's second and third LoRA set learn from: the opinion of a diffusion model (CSD), and Gram matrices of visual tokens.

Papers:  GramSR, arXiv 2604.25457; CSD from PiSA-SR, 2412.03017, after Classifier Score Distillation, 2310.19415; Gram from DINOv3, 2508.10104.
Left out: CSD in half precision throughout, as PiSA-SR computes it.

GramSR published no training code. CSD here is PiSA-SR's, which it extends; the Gram loss is a reading of the paper's figure, see `gram`.
Everything random is an argument.
"""

import torch
import torch.nn.functional as F

from models.unet import alphas_cumprod
from models.vit import standardised

CSD_TIMES = 20, 500     # t is drawn from 20 .. 499 (PiSA-SR's script; the default of its parser is a leftover)


def loss_csd(prior, z, t, noise, context, negative, guidance=7.5):
    """Classifier score distillation: what guidance would change about a latent, the latent should have changed already.

    Noise is added, and a frozen UNet takes it away twice: with guidance towards the context, and without context. The difference of the
    two clean latents is the gradient that z gets; the loss itself says little.
    prior: (z_t, t, context) -> eps; z: (B, 4, h, w) clean scaled latent; t: (B,) whole numbers, see CSD_TIMES; noise: like z
    context: (B, N, D) of the LQ picture; negative: like it, zeros in GramSR (its released forward says so), the features of a bad
    prompt in PiSA-SR -> scalar
    """
    with torch.no_grad():
        a = alphas_cumprod().to(z.device)[t].view(-1, 1, 1, 1)
        z_t = a.sqrt() * z + (1 - a).sqrt() * noise
        blind, seeing = prior(z_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([negative, context])).float().chunk(2)
        fake, real = ((z_t - (1 - a).sqrt() * eps) / a.sqrt() for eps in (blind, blind + guidance * (seeing - blind)))
        g = (fake - real) / (z - real).abs().mean((1, 2, 3), keepdim=True)      # Eq. GramSR (4)
        target = z - g
    return F.mse_loss(z, target)        # its gradient is 2 g / numel


def normalised(x):
    """(B, 3, H, W) in [-1, 1] -> as DINO wants it"""
    return standardised(0.5 * x + 0.5)


def features(vit, x):
    """What the Gram loss compares: DINOv3's last tokens of the patches.  x: (B, 3, H, W) in [-1, 1] -> (B, N, D)"""
    return vit.patches(normalised(x).to(vit.norm.weight.dtype)).float()


def gram(x, channels=False, normalise=True, positive=False):
    """Gram matrices: all dot products. Who resembles whom stays, what anything is does not: any rotation of the features is forgotten.

    The paper's figure says |G(hq) - G(sr)|^2 / N^2, not what N counts, nor whether the rows are normalised first. The defaults are those
    of DINOv3's own Gram objective. A weight of 500 for the loss fits them: without normalisation it is thousands of times larger.
    x: (B, N, D); channels: style transfer's matrix, the mean over places, which forgets where things are; normalise: every token to
    length 1; positive: negative similarities are set to 0 -> (B, N, N), or (B, D, D)
    """
    x = F.normalize(x, dim=-1) if normalise else x
    G = x.mT @ x / x.shape[1] if channels else x @ x.mT
    return G.relu() if positive else G


def loss_gram(sr, hq, **kind):
    """Mean squared difference of the Gram matrices of features (B, N, D); kind: options of `gram` -> scalar"""
    return F.mse_loss(gram(sr, **kind), gram(hq, **kind))       # Eq. GramSR (5)
