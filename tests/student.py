"""Exercises 7 to 9: write three functions yourself. This file checks them:    python tests/student.py [NAME ...]

Put your code where `raise NotImplementedError` stands. Answers: tests/ANSWERS.md. Nothing here is used elsewhere.
"""

import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import degrade  # noqa: E402
from models import flow, gram  # noqa: E402


# ---- write these


def guided(dit, z_t, z_lq, feat, t, r, guidance=1.0, weak=0.15):
    """Exercise 7. VOSR's guidance, as section 5 says it: v_weak + guidance (v_cond - v_weak).

    dit: a function (z_t, z_lq, feat, t, r) -> velocity (B, C, h, w); z_t, z_lq: (B, C, h, w); feat: (B, M, D)
    t, r: numbers, of which dit wants one for each image, (B,); guidance 1 shall call dit for B images, others for 2B
    weak: the factor on z_lq in the weak condition, which has no tokens (zeros) -> like z_t
    """
    raise NotImplementedError


def loss_gram(sr, hq):
    """Exercise 8. GramSR's last loss: tokens to length 1, both Gram matrices, the mean of their squared difference.

    sr, hq: (B, N, D) tokens of the result and of the photo -> scalar
    """
    raise NotImplementedError


def motion(kernel):
    """Exercise 9. Weights of a blur by motion: 1 on a line of length 4 sigma_x and of width 1 pixel, else 0; sum 1.

    The line goes through the centre, at the angle theta. `degrade.kernel_weights` shows how positions are laid out,
    `degrade.squared_distance` how they are turned; with an angle of 0 the line is horizontal.
    kernel: degrade.Kernel, for its size, sigma_x and theta -> (size, size) float64
    """
    raise NotImplementedError


# ---- the checks: each takes the function that it checks, and raises AssertionError with what is wrong


def near(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def check_guided(f):
    g = torch.Generator().manual_seed(0)
    z_t, z_lq = torch.randn(2, 3, 4, 5, 6, generator=g)
    feat, seen = torch.randn(3, 2, 7, generator=g), []

    def dit(z_t, z_lq, feat, t, r):
        assert t.shape == r.shape == (len(z_t),), "dit wants t and r of shape (B,), one for each image"
        seen.append(len(z_t))
        return z_t * t.view(-1, 1, 1, 1) + z_lq.square() + feat.mean((1, 2)).view(-1, 1, 1, 1) + r.view(-1, 1, 1, 1)

    for guidance, weak in ((1, 0.15), (0, 0.15), (0.5, 0.15), (-1, 0.4)):
        expected = flow.guided(dit, z_t, z_lq, feat, 0.7, 0.2, guidance, weak)
        seen.clear()
        found = f(dit, z_t, z_lq, feat, 0.7, 0.2, guidance, weak)
        assert near(found, expected), f"wrong for guidance {guidance}, weak {weak}"
        images = 3 if guidance == 1 else 6
        assert sum(seen) == images, f"guidance {guidance}: dit was run for {sum(seen)} images, {images} suffice"


def check_loss_gram(f):
    g = torch.Generator().manual_seed(0)
    sr, hq = torch.randn(2, 2, 10, 6, generator=g)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    assert near(f(sr, sr @ turn), torch.tensor(0.0)), "all tokens turned alike: the loss shall be 0"
    assert near(f(sr, 3 * sr), torch.tensor(0.0)), "tokens shall be normalised: three times as long, the loss shall be 0"
    assert f(sr, sr.flip(1)) > 0.01, "tokens in another order: the loss shall not be 0"
    assert near(f(sr, hq), gram.loss_gram(sr, hq)), "another value than models/gram.py"


def check_motion(f):
    def weights(sigma_x, theta, size=21):
        w = f(degrade.Kernel("motion", size, sigma_x=sigma_x, sigma_y=0.0, theta=theta))
        assert w.shape == (size, size) and w.dtype == torch.float64, "shall be (size, size), float64"
        assert abs(w.sum() - 1) < 1e-9, "weights shall add up to 1"
        return w

    w = weights(2.0, 0.0)
    assert (w > 0).sum() == 9 and (w[10, 6:15] > 0).all(), "sigma_x 2, theta 0: nine pixels in the middle row"
    assert torch.allclose(weights(2.0, math.pi / 2), w.T), "theta 90 degrees: a vertical line"
    w = weights(2.0, math.pi / 4)
    assert (w.diagonal() > 0).sum() == 5, "theta 45 degrees: from upper left to lower right"
    assert torch.allclose(w, w.flip(0, 1)), "the line shall go through the centre"


CHECKS = {"guided": check_guided, "loss_gram": check_loss_gram, "motion": check_motion}


def main(names):
    failed = 0
    for name in names or CHECKS:
        try:
            CHECKS[name](globals()[name])
            print(f"{name}: right")
        except NotImplementedError:
            failed += 1
            print(f"{name}: not written yet")
        except AssertionError as wrong:
            failed += 1
            print(f"{name}: {wrong}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
