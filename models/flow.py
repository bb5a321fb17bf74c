"""VOSR's mathematics: the guided velocity, the sampler and the losses.

Paper:   VOSR, arXiv 2604.03225; flow matching after 2209.03003, shortcut models 2410.12557.
Left out: the official code's cosine time schedule, which nothing uses.

Letters:
    z_hq, z_lq  latents of the high-quality and of the enlarged low-quality image; feat: visual tokens of the latter
    eps         standard normal noise
    z_t         the state (1 - t) z_hq + t eps: noise at t = 1, clean at t = 0
    v           velocity at t, the derivative of the state: eps - z_hq, of which a network learns the mean
    u           average velocity from t down to r, so that z_r = z_t - (t - r) u; v where r = t
    z_weak      w z_lq, the weak condition; the branch that sees it has no visual tokens
    omega       strength of guidance, in `guided` called guidance
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


# ---- the velocity and the sampler


def two_branches(dit, z_t, z_lq, z_weak, feat, t, r=None):
    """Velocities under z_lq with visual tokens and under z_weak without, in one batch of twice the size.

    z_t, z_lq, z_weak: (B, C, h, w); feat: (B, M, z_dims); t, r: (B,), r for one-step models only
    -> v_cond, v_weak, each (B, C, h, w)
    """
    z_t, t = z_t.repeat(2, 1, 1, 1), t.repeat(2)
    if r is not None:
        r = r.repeat(2)
    no_tokens = torch.zeros_like(feat)
    return dit(z_t, torch.cat([z_lq, z_weak]), torch.cat([feat, no_tokens]), t, r).chunk(2)


def guided(dit, z_t, z_lq, feat, t, r, guidance=1.0, weak=0.15, interval=(0.0, 1.0)):
    """Restoration-oriented guidance: the reference is a WEAK condition, not an absent one.

    z_t, z_lq: (B, C, h, w); feat: (B, M, z_dims); t, r: numbers in [0, 1], r is read by one-step models only
    guidance: 1 = conditional only, one pass; 0 = weak only. Unlike text-to-image guidance, a smaller value invents
    more, a larger one is more faithful
    weak: w; interval: of t where guidance counts, an official option that no public model uses
    -> (B, C, h, w) velocity
    """
    if not interval[0] <= t <= interval[1]:
        guidance = 1
    t = torch.full((len(z_t),), float(t), device=z_t.device)
    r = torch.full((len(z_t),), float(r), device=z_t.device)
    if guidance == 1:
        return dit(z_t, z_lq, feat, t, r)
    v_cond, v_weak = two_branches(dit, z_t, z_lq, weak * z_lq, feat, t, r)
    return v_weak + guidance * (v_cond - v_weak)  # Eq. guidance


def sample(velocity, eps, steps):
    """Euler's method from noise at t = 1 to the clean latent at t = 0.

    velocity: function (z_t, t, r); eps: (B, C, h, w) noise, the state at t = 1; steps: how many -> like eps
    """
    z = eps.float()  # many small steps would be lost in half precision
    times = [1 - k / steps for k in range(steps + 1)]
    for t, r in zip(times, times[1:]):
        z = z - (t - r) * velocity(z.to(eps.dtype), t, r)  # Eq. Euler
    return z.to(eps.dtype)


# ---- what is drawn, and the conditions


@dataclass
class Draws:
    """Everything random in a loss of B latents. The names are the official code's.

    Distillation has t, the larger of two uniform numbers, and r = t (1 - g): so (t, r) is uniform on r < t.
    """

    t: torch.Tensor     # (B, 2) uniform, the time: flow matching takes the first, distillation the larger
    n: torch.Tensor     # (B,) standard normal: how much noise the LQ condition gets
    eps: torch.Tensor   # (B, C, h, w) standard normal: the noise in the state z_t
    m: torch.Tensor     # (B,) uniform: which images see the weak condition, those with m < cfg_ratio
    xi: torch.Tensor    # (B, C, h, w) standard normal: the noise in the LQ condition
    g: torch.Tensor     # (B,) uniform: in distillation how far r is below t; in flow matching the first decides on w


def draw(z, generator):
    """Draws for latents z: (B, C, h, w)."""
    def uniform(*shape):
        return torch.rand(shape, generator=generator, device=generator.device).to(z.device)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=generator.device).to(z.device)

    B = len(z)
    return Draws(t=uniform(B, 2), n=normal(B), eps=normal(*z.shape), m=uniform(B), xi=normal(*z.shape), g=uniform(B))


def column(x):
    """(B,) -> (B, 1, 1, 1): one number for each latent."""
    return x[:, None, None, None]


def conditions(z_lq, feat, d, w, cfg_ratio, strength):
    """The conditions that a loss needs.

    noised: z_lq with a little noise; z_weak: z_lq times w
    mixed, mixed_feat: what the network is shown: noised with its visual tokens, or for a share cfg_ratio of the images
    z_weak without tokens (zeros)
    z_lq: (B, C, h, w); feat: (B, M, z_dims); d: Draws; w: number; strength: mean and deviation of a's logit
    -> noised, z_weak, mixed like z_lq, mixed_feat like feat
    """
    mean, deviation = strength
    a = column(torch.sigmoid(deviation * d.n + mean))  # its median is sigmoid(5) = .993
    # sqrt(1 - a^2): what has unit variance, as scaled latents about do, keeps it
    noised = a * z_lq + (1 - a**2).sqrt() * d.xi  # Eq. noised condition
    z_weak = w * z_lq  # Eq. weak condition
    is_weak = d.m < cfg_ratio
    mixed = torch.where(column(is_weak), z_weak, noised)
    mixed_feat = torch.where(is_weak[:, None, None], 0.0, feat)
    return noised, z_weak, mixed, mixed_feat


# ---- flow matching: a model of many steps


def loss_flow(dit, z_hq, z_lq, feat, generator, cfg_ratio=0.1, strength=(5.0, 1.0), lognorm=None, weak=(0.05, 0.25),
              draws=None):
    """Flow matching under the mixed condition: mean of (v(z_t, t) - (eps - z_hq))^2.

    z_hq, z_lq: (B, C, h, w) scaled latents; feat: (B, M, z_dims); generator: of all that is drawn
    cfg_ratio: share of the images that see the weak condition, and no tokens; strength: see `conditions`
    lognorm: mu, sigma of t = sigmoid(sigma N + mu), N standard normal; None = t is uniform
    weak: range of w, one number for the whole batch as in the official code
    draws: Draws, instead of the generator's -> scalar
    """
    d = draws or draw(z_hq, generator)
    t = d.t[:, 0]
    if lognorm is not None:
        mu, sigma = lognorm
        t = torch.sigmoid(sigma * torch.special.ndtri(t) + mu)  # ndtri, Phi^-1, makes a uniform number normal
    w = weak[0] + (weak[1] - weak[0]) * d.g[0]
    _, _, mixed, mixed_feat = conditions(z_lq, feat, d, w, cfg_ratio, strength)

    z_t = (1 - column(t)) * z_hq + column(t) * d.eps
    v = dit(z_t, mixed, mixed_feat, t).float()
    return F.mse_loss(v, d.eps - z_hq)  # Eq. flow


# ---- distillation: a model of one step


@torch.no_grad()
def teach(teacher, z_t, noised, z_weak, feat, t, omega, interval=(0.0, 1.0)):
    """The frozen multi-step teacher's guided velocity; outside the interval of t: (B,) omega is 1 -> like z_t"""
    v_cond, v_weak = two_branches(teacher, z_t, noised, z_weak, feat, t)
    v_cond, v_weak = v_cond.float(), v_weak.float()
    inside = (interval[0] <= t) & (t <= interval[1])
    omega = column(torch.where(inside, omega, 1.0))
    return v_weak + omega * (v_cond - v_weak)  # Eq. teacher


@torch.no_grad()
def target_shortcut(u, z_t, t, r):
    """Two half steps make a whole one: the mean of u on [t, s] and [s, r], s half way.

    u: the student, (z_t, t, r) -> average velocity; z_t: (B, C, h, w); t, r: (B,) -> like z_t
    """
    s = (t + r) / 2
    u1 = u(z_t, t, s)
    z_s = z_t - column((t - r) / 2) * u1
    u2 = u(z_s, s, r)
    return (u1 + u2) / 2  # Eq. shortcut


@torch.no_grad()
def correction_rcgm(u, z_t, t, r, u_t, v, delta=0.01, N=2):
    """Recursive consistency: how far u is from what its own definition demands.

    By definition (t - r) u(z_t, t, r) is the way that the flow goes from t to r, the integral of its velocity. Cut it
    at t_m = t - delta, a short step below t. On the short part the velocity hardly changes, and the teacher knows it:
    delta v. The long part, from t_m to r, the student goes by itself in N steps: `way`. So of the true average velocity

        (t - r) u(z_t, t, r) = delta v + way,     or     ((t - r) u(z_t, t, r) - way) / delta - v = 0,

    and for any other u the left side is the correction: the velocity that u implies on the short step, less the
    teacher's. Its limit for delta -> 0 is zero where MeanFlow's identity holds (2505.13447): u = v - (t - r) du/dt.
    Nothing is learned from `way` itself (no gradient), only that u agrees with it.

    u: the student, a function (z_t, t, r) -> average velocity
    z_t: (B, C, h, w) state at t
    t, r: (B,) times, r <= t
    u_t: (B, C, h, w), u(z_t, t, r)
    v: (B, C, h, w), the teacher's velocity at t
    delta: length of the short step, in time
    N: steps of the long part
    -> like u_t, not clamped (see `loss_distill`)
    """
    # the short step, by the teacher; not beyond r
    t_m = torch.maximum(t - delta, r)
    z = z_t - column(t - t_m) * v

    # the long part, by the student
    step = (t_m - r) / N
    way = torch.zeros_like(z)
    for k in range(N):
        u_k = u(z, t_m - k * step, t_m - (k + 1) * step)
        z = z - column(step) * u_k
        way = way + column(step) * u_k

    # the velocity that u implies on the short step
    length = column((t - r).clamp(min=1e-6))  # not 0, by which it is divided
    implied_far = (u_t * length - way) / delta
    # Where r is nearer than delta, the short step is all there is (way = 0): u_t itself shall be v. Divided by delta,
    # its error would count the less the nearer r is.
    implied_near = u_t - way / length
    near = column(t < r + delta + 1e-6)
    implied = torch.where(near, implied_near, implied_far)
    return implied - v  # Eq. RCGM


def loss_distill(student, teacher, z_hq, z_lq, feat, generator, kind="rcgm", omega=0.5, cfg_ratio=0.1,
                 strength=(5.0, 1.0), interval=(0.0, 1.0), weak=0.1, delta=0.01, N=2, draws=None):
    """One-step distillation: learn the teacher's guided velocity where r = t, be consistent with oneself where r < t.

    student, teacher: DiT with and without second time; z_hq, z_lq: (B, C, h, w) scaled latents; feat: (B, M, z_dims)
    kind: "rcgm", with its delta and N, or "shortcut"; omega: the guidance that is distilled in
    interval: of t, outside of which omega is 1; an official option that no public model uses
    weak: w; the others as for `loss_flow` -> {"v": scalar, "u": scalar}, whose sum is the loss
    """
    d = draws or draw(z_hq, generator)
    t = d.t.amax(1)
    r = t * (1 - d.g)
    noised, z_weak, mixed, mixed_feat = conditions(z_lq, feat, d, weak, cfg_ratio, strength)
    z_t = (1 - column(t)) * z_hq + column(t) * d.eps

    def u(z, t, r):
        return student(z, mixed, mixed_feat, t, r).float()

    # 1. the teacher's velocity at t
    # official: v_cond sees the noised condition and all visual tokens, for weak samples too: the guided velocity
    # is what is distilled, whatever the student is shown
    v = teach(teacher, z_t, noised, z_weak, feat, t, omega, interval)

    # 2. what the student's average velocity from t to r should be, judged by the student's other predictions
    u_t = u(z_t, t, r)
    if kind == "shortcut":
        target = target_shortcut(u, z_t, t, r)
    else:
        # The clamp keeps steps small: an untrained student's corrections are huge, since an error of u is divided by
        # delta, and they hold only near where they were measured. At first nearly all of them are clamped.
        target = u_t.detach() - correction_rcgm(u, z_t, t, r, u_t, v, delta, N).clamp(-1, 1)

    # 3. both errors
    return {"v": F.mse_loss(u(z_t, t, t), v), "u": F.mse_loss(u_t, target)}
