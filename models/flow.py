"""VOSR's mathematics: the guided velocity, the sampler and the losses.

Paper:   VOSR, arXiv 2604.03225; flow matching after 2209.03003, shortcut models 2410.12557.
Left out: the official code's cosine time schedule, which nothing uses.

Letters: z_t = (1 - t) z_hq + t eps is the state, t = 1 noise, t = 0 clean; v its velocity eps - z_hq at t; u the
average velocity from t down to r; z_weak = w z_lq the weak condition. Everything random is an argument.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


# ---- the velocity and the sampler


def two_branches(dit, z_t, z_lq, z_weak, feat, t, r=None, cache=None):
    """Velocities under z_lq with feat and under z_weak without, in one batch -> v_cond, v_weak"""
    z_t, t, r = z_t.repeat(2, 1, 1, 1), t.repeat(2), r if r is None else r.repeat(2)
    return dit(z_t, torch.cat([z_lq, z_weak]), feat, t, r, cache).chunk(2)


def guided(dit, z_t, z_lq, feat, t, r, guidance=1.0, weak=0.15, interval=(0.0, 1.0), cache=None):
    """Restoration-oriented guidance: the reference is a WEAK condition, not an absent one.

    z_t, z_lq: (B, C, h, w); feat: (B, M, z_dims); t, r: numbers in [0, 1], r is read by one-step models only
    guidance: 1 = conditional only, one pass; 0 = weak only. Against habit smaller is more generative, larger more
    faithful; weak: w; interval: of t where guidance counts; cache: DiT's -> (B, C, h, w) velocity
    """
    if not interval[0] <= t <= interval[1]:
        guidance = 1
    t, r = (torch.full((len(z_t),), float(x), device=z_t.device) for x in (t, r))
    if guidance == 1:
        return dit(z_t, z_lq, feat, t, r, cache)
    v_cond, v_weak = two_branches(dit, z_t, z_lq, weak * z_lq, feat, t, r, cache)
    return v_weak + guidance * (v_cond - v_weak)  # Eq. guidance


def sample(velocity, eps, steps):
    """Euler's method from noise at t = 1 to the clean latent at t = 0.

    velocity: function (z_t, t, r); eps: (B, C, h, w) standard normal -> like eps
    """
    z = eps.float()  # many small steps would be lost in half precision
    times = [1 - k / steps for k in range(steps + 1)]
    for t, r in zip(times, times[1:]):
        z = z - (t - r) * velocity(z.to(eps.dtype), t, r)  # Eq. Euler
    return z.to(eps.dtype)


# ---- losses


@dataclass
class Draws:
    """Everything random in a loss, as drawn."""

    t: torch.Tensor         # (B,) uniform; distillation: (B, 2), t is the larger
    n: torch.Tensor         # (B,) standard normal: strength of the LQ condition
    eps: torch.Tensor       # (B, C, h, w) standard normal: the flow's noise
    m: torch.Tensor         # (B,) uniform: the condition is dropped where m < cfg_ratio
    xi: torch.Tensor        # (B, C, h, w) standard normal: noise of the LQ condition
    w: torch.Tensor         # () strength of the weak condition, one number for the batch
    g: torch.Tensor | None = None   # (B,) Beta(1, 1), which is uniform: r = t (1 - g), distillation only

    @classmethod
    def flow(cls, z, generator, lognorm=None, weak=(0.05, 0.25)):
        """For `loss_flow`. lognorm: mu, sigma of t = sigmoid(sigma N + mu), None = uniform; weak: range of w."""
        t, n, eps, m, xi, u = draw(z, generator)
        t = t[:, 0]
        if lognorm is not None:
            mu, sigma = lognorm
            t = torch.sigmoid(sigma * torch.special.ndtri(t) + mu)
        return cls(t, n, eps, m, xi, weak[0] + (weak[1] - weak[0]) * u[0])

    @classmethod
    def distill(cls, z, generator, weak=0.1):
        """For `loss_distill`."""
        t, n, eps, m, xi, g = draw(z, generator)
        return cls(t, n, eps, m, xi, torch.tensor(weak, device=z.device), g)


def draw(z, generator):
    """The numbers behind both kinds of Draws, for latents z: (B, C, h, w)."""
    B = len(z)
    draws = ((torch.rand, (B, 2)), (torch.randn, (B,)), (torch.randn, z.shape),
             (torch.rand, (B,)), (torch.randn, z.shape), (torch.rand, (B,)))
    return [function(shape, generator=generator).to(z.device) for function, shape in draws]


def column(x):
    """(B,) -> (B, 1, 1, 1)."""
    return x[:, None, None, None]


def conditions(z_lq, feat, d, cfg_ratio, strength):
    """The LQ condition noised, weak, and mixed: the weak one and no visual tokens where it is dropped.

    z_lq: (B, C, h, w); feat: (B, M, z_dims) -> noised, z_weak, mixed like z_lq, mixed_feat like feat
    """
    mu, sigma = strength
    a = column(torch.sigmoid(sigma * d.n + mu))  # about 0.993
    noised = a * z_lq + (1 - a**2).sqrt() * d.xi  # Eq. noised condition
    z_weak = d.w * z_lq  # Eq. weak condition
    dropped = d.m < cfg_ratio
    mixed = torch.where(column(dropped), z_weak, noised)
    return noised, z_weak, mixed, torch.where(dropped[:, None, None], 0.0, feat)


def loss_flow(dit, z_hq, z_lq, feat, generator, cfg_ratio=0.1, strength=(5.0, 1.0), lognorm=None, weak=(0.05, 0.25)):
    """Flow matching under the mixed condition: mean of (v(z_t, t) - (eps - z_hq))^2.

    z_hq, z_lq: (B, C, h, w) scaled latents; feat: (B, M, z_dims); generator: of `Draws`, or Draws -> scalar
    """
    d = generator if isinstance(generator, Draws) else Draws.flow(z_hq, generator, lognorm, weak)
    _, _, mixed, feat = conditions(z_lq, feat, d, cfg_ratio, strength)
    t = column(d.t)
    z_t = (1 - t) * z_hq + t * d.eps
    return F.mse_loss(dit(z_t, mixed, feat, d.t).float(), d.eps - z_hq)  # Eq. flow


def teach(teacher, z_t, noised, z_weak, feat, t, omega, interval=(0.0, 1.0)):
    """The frozen multi-step teacher's guided velocity; outside the interval of t: (B,) omega is 1."""
    v_cond, v_weak = (v.float() for v in two_branches(teacher, z_t, noised, z_weak, feat, t))
    omega = column(torch.where((interval[0] <= t) & (t <= interval[1]), omega, 1.0))
    return v_weak + omega * (v_cond - v_weak)  # Eq. teacher


def target_shortcut(u, z_t, t, r):
    """Two half steps make a whole one: the mean of u on [t, s] and [s, r]."""
    s = (t + r) / 2
    u1 = u(z_t, t, s)
    u2 = u(z_t - column((t - r) / 2) * u1, s, r)
    return (u1 + u2) / 2  # Eq. shortcut


def correction_rcgm(u, z_t, t, r, u_t, v, delta=0.01, N=2):
    """Recursive consistency: go a short way delta along the teacher's v, the rest along the student, compare with u_t.

    u: the student, (z_t, t, r) -> velocity; z_t, u_t, v: (B, C, h, w) state, u(z_t, t, r), the teacher's velocity at t
    t, r: (B,) -> like u_t: what it has too much, over delta; 0 when it is the average velocity of the teacher's flow
    """
    t_m = torch.maximum(t - delta, r)
    z = z_t - column(t - t_m) * v
    step = (t_m - r) / N
    way = torch.zeros_like(z)  # F: the way from t_m to r
    for k in range(N):
        u_k = u(z, t_m - k * step, t_m - (k + 1) * step)
        z, way = z - column(step) * u_k, way + column(step) * u_k
    d = column((t - r).clamp(min=1e-6))
    near = column(t < r + delta + 1e-6)  # then t_m = r and F = 0: u_t shall be v
    return torch.where(near, u_t - way / d, (u_t * d - way) / delta) - v  # Eq. RCGM


def loss_distill(student, teacher, z_hq, z_lq, feat, generator, kind="rcgm", omega=0.5, cfg_ratio=0.1,
                 strength=(5.0, 1.0), interval=(0.0, 1.0), weak=0.1, **rcgm):
    """One-step distillation: learn the teacher's guided velocity where r = t, be consistent with oneself where r < t.

    student, teacher: DiT with and without second time; kind: "rcgm" or "shortcut"; omega: the guidance that is
    distilled in; the others as for `loss_flow` -> {"v": scalar, "u": scalar}; their sum is the loss
    """
    d = generator if isinstance(generator, Draws) else Draws.distill(z_hq, generator, weak)
    t = d.t.amax(1)
    r = t * (1 - d.g)
    noised, z_weak, mixed, mixed_feat = conditions(z_lq, feat, d, cfg_ratio, strength)
    z_t = (1 - column(t)) * z_hq + column(t) * d.eps

    def u(z, t, r):
        return student(z, mixed, mixed_feat, t, r).float()

    u_t = u(z_t, t, r)
    with torch.no_grad():
        # official: v_cond sees the noised condition and all visual tokens, for dropped samples too
        v = teach(teacher, z_t, noised, z_weak, feat, t, omega, interval)
        if kind == "shortcut":
            target = target_shortcut(u, z_t, t, r)
        else:  # the clamp is a trust region, at first always hit
            target = u_t - correction_rcgm(u, z_t, t, r, u_t, v, **rcgm).clamp(-1, 1)
    return {"v": F.mse_loss(u(z_t, t, t), v), "u": F.mse_loss(u_t, target)}
