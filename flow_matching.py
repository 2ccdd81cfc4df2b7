# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "scipy>=1.11"]
# ///
"""Flow Matching for Generative Modeling (Lipman et al., arXiv 2210.02747) in one file.

A probability path x_t = α(t) x_1 + σ(t) x_0 leads from noise x_0 at t = 0 to an image x_1 at
t = 1.  Along it every pair (x_0, x_1) moves with the velocity u = α'(t) x_1 + σ'(t) x_0.  A
network v(x, t) learns u by plain regression at random (x_t, t): Eq. 14.  The best regression is
the mean velocity of all pairs that meet at x (Eq. 8), and following that mean moves the noise
distribution onto the data (Theorem 1).  So new images are the solutions of dx/dt = v(x, t).

    §1 probability paths        ot_path, vp_path, ve_path, Theorem 3, the exact marginal field
    §2 loss                     cfm_loss, Velocity
    §3 ODE solvers              euler, midpoint, rk4, odeint (with adaptive Dormand-Prince)
    §4 sampling                 sample, draw_noise
    -- the paper ends here, the engineering begins --
    §5 network                  UNet
    §6 data                     digits drawn on the spot, torchvision's sets, folders of images
    §7 training                 recipes, checkpoints, the loop
    §8 command line             train, sample

Notation: B, C, H, W are batch, channels, height and width; images are in [-1, 1]; t is in [0, 1].
A definition in §1-§5 that needs another one says so ("Needs: ..."); pasted with it, it runs.

    python flow_matching.py train --path ot
    python flow_matching.py sample --steps 20
    torchrun --nproc_per_node=8 flow_matching.py train --data cifar10
"""

import argparse
import copy
import functools
import hashlib
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.integrate import solve_ivp
from scipy.optimize import linear_sum_assignment
from torch import nn

# ------------------------------------------------------------------------------------------------
# §1  Probability paths  (paper: Sections 3 and 4)
#
# A path is a function of time: alpha, sigma, d_alpha, d_sigma = path(t).  It means
#     p_t(x | x_1) = N(x; α x_1, σ² I)         x_t = ψ_t(x_0) = α x_1 + σ x_0,  x_0 ~ N(0, I).
# ------------------------------------------------------------------------------------------------


def ot_path(t, sigma_min=1e-4):
    """Optimal-transport path, Eq. 20: the straight line from x_0 to x_1 at constant speed.

    t: (B,) in [0, 1].  Returns α = t, σ = 1 − (1 − σ_min) t, α', σ', each (B,).
    The paper names no σ_min > 0; 1e-4 is far below one grey level (2/255).
    """
    one = torch.ones_like(t)
    return t, 1 - (1 - sigma_min) * t, one, -(1 - sigma_min) * one


def vp_path(t, beta_min=0.1, beta_max=20.0):
    """Variance-preserving diffusion path, Eq. 18, with β rising linearly as data turns to noise.

    t: (B,) in [0, 1 − 1e-5], because σ' → −∞ as t → 1.  With s = 1 − t and
    T(s) = β_min s + ½ (β_max − β_min) s²:  α = exp(−½ T), σ² = 1 − α².  Returns α, σ, α', σ'.
    """
    s = 1 - t
    T = beta_min * s + 0.5 * (beta_max - beta_min) * s**2
    beta = beta_min + (beta_max - beta_min) * s
    alpha = torch.exp(-0.5 * T)
    sigma = torch.sqrt(-torch.expm1(-T))  # 1 − exp(−T) would lose every digit as t → 1
    d_alpha = 0.5 * beta * alpha
    return alpha, sigma, d_alpha, -alpha * d_alpha / sigma  # from αα' + σσ' = 0


def ve_path(t, sigma_min=0.01, sigma_max=50.0):
    """Variance-exploding diffusion path, Eq. 16: noise shrinks geometrically from 50 to 0.01.

    t: (B,) in [0, 1].  Returns α = 1, σ = σ_min (σ_max/σ_min)^(1 − t), α' = 0, σ'.
    At t = 0 the distribution is N(0, σ_max² I), not N(0, I).
    """
    log_ratio = math.log(sigma_max / sigma_min)
    sigma = sigma_min * torch.exp(log_ratio * (1 - t))
    return torch.ones_like(t), sigma, torch.zeros_like(t), -log_ratio * sigma


PATHS = {"ot": ot_path, "vp": vp_path, "ve": ve_path}
T_END = {"ot": 1.0, "vp": 1 - 1e-5, "ve": 1.0}  # training and sampling use [0, T_END]


def coefficients(path, t, x):
    """The coefficients of a path at times t: (B,), shaped (B, 1, ...) to multiply x: (B, ...)."""
    return [c.reshape(-1, *[1] * (x.dim() - 1)) for c in path(t)]


def conditional_velocity(path, x, x_1, t):
    """Theorem 3, Eq. 15: u_t(x | x_1) = (σ'/σ) (x − α x_1) + α' x_1, for any path.

    x, x_1: (B, ...), t: (B,).  Eqs. 17, 19 and 21 are this line for ve, vp and ot.
    Needs: coefficients.
    """
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t, x)
    return d_sigma / sigma * (x - alpha * x_1) + d_alpha * x_1


def marginal_velocity(path, x, t, means, tau=0.0):
    """The exact marginal field, Eq. 8, where the data is a mixture of K equal Gaussians.

    x: (B, D), t: (B,), means: (K, D), tau: standard deviation of each Gaussian, 0 for plain
    points.  Component k at time t is N(α m_k, (α²τ² + σ²) I) and moves by Theorem 3; the field is
    the mean of these velocities, weighted by the posterior p(k | x, t).  Returns (B, D).
    """
    alpha, sigma, d_alpha, d_sigma = (c[:, None, None] for c in path(t))
    offset = x[:, None] - alpha * means  # (B, K, D)
    variance = (alpha * tau) ** 2 + sigma**2
    growth = (alpha * d_alpha * tau**2 + sigma * d_sigma) / variance  # s'/s of s² = variance
    posterior = (-offset.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)  # (B, K, 1)
    return (posterior * (growth * offset + d_alpha * means)).sum(1)


# ------------------------------------------------------------------------------------------------
# §2  Loss  (paper: Theorem 2)
# ------------------------------------------------------------------------------------------------


def cfm_loss(v, path, x_1, x_0=None, t=None, weight=None, t_end=1.0):
    """Conditional flow matching, Eq. 14: the mean of ‖v(x_t, t) − u_t(x_t | x_1)‖² per element.

    v: callable (x, t) -> velocity, x_1: (B, ...) data.  x_0 ~ N(0, I) and t ~ U[0, t_end] are
    drawn unless given.  weight: (B,) per-sample weights, or None for the paper's loss.
    By Eq. 13, u is the time derivative of ψ_t(x_0): no division by σ.  Needs: coefficients.
    """
    if x_0 is None:
        x_0 = torch.randn_like(x_1)
    if t is None:  # float32 always: a bf16 draw is exactly 1.0 once in 500
        t = t_end * torch.rand(len(x_1), device=x_1.device)
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t, x_1)
    x_t = alpha * x_1 + sigma * x_0
    u = d_alpha * x_1 + d_sigma * x_0
    loss = (v(x_t, t) - u).square().flatten(1).mean(1)
    return (loss if weight is None else weight * loss).mean()


def ot_coupling(x_0, x_1, y=None):
    """Minibatch optimal transport (Tong et al., arXiv 2302.00482; Pooladian et al., 2304.14772).

    x_0, x_1: (B, ...).  Returns x_0 reordered so that the sum of ‖x_0 − x_1‖² over the batch is
    least.  y: (B,) labels: noise then changes places only within a class, so that p(x_0 | y)
    stays N(0, I) and the noise does not give the class away.
    """
    y = torch.zeros(len(x_0)) if y is None else y
    coupled = x_0.clone()
    for label in y.unique():
        rows = (y == label).nonzero()[:, 0].to(x_0.device)
        cost = torch.cdist(x_1[rows].flatten(1), x_0[rows].flatten(1)).square()
        coupled[rows] = x_0[rows[linear_sum_assignment(cost.cpu())[1]]]
    return coupled


class Velocity(nn.Module):
    """The velocity v(x, t) that a network F represents.

    path None: v = F, as in the paper.  Otherwise F learns only what the best linear predictor
    misses, at unit scale (Karras et al., arXiv 2206.00364, §5, written for any path):
        v = c_skip x + c_out F(c_in x, t),   loss weight 1/c_out².
    The diffusion paths need it: ve's inputs span 1 to 50 and its targets 0.085 to 426.
    net: callable (x, t, y) -> (B, C, H, W); data_rms: root mean square of the data.
    Needs: coefficients.
    """

    def __init__(self, net, path=None, data_rms=1.0):
        super().__init__()
        self.net, self.path, self.data_rms = net, path, data_rms

    def scales(self, x, t):
        alpha, sigma, d_alpha, d_sigma = coefficients(self.path, t, x)
        s = self.data_rms
        c_in = (alpha**2 * s**2 + sigma**2) ** -0.5
        c_skip = (alpha * d_alpha * s**2 + sigma * d_sigma) * c_in**2
        c_out = s * (alpha * d_sigma - sigma * d_alpha).abs() * c_in
        return c_in, c_skip, c_out

    def weight(self, t):
        """The loss weight of each sample, (B,), or None for the paper's unweighted loss."""
        return None if self.path is None else self.scales(t, t)[2] ** -2

    def forward(self, x, t, y=None):
        if self.path is None:
            return self.net(x, t, y).to(x.dtype)
        c_in, c_skip, c_out = self.scales(x, t)
        return c_skip * x + c_out * self.net(c_in * x, t, y)


# ------------------------------------------------------------------------------------------------
# §3  ODE solvers: dx/dt = f(x, t)
# ------------------------------------------------------------------------------------------------


def euler(f, x, t, h):
    """One Euler step from t to t + h: order 1, one evaluation of f."""
    return x + h * f(x, t)


def midpoint(f, x, t, h):
    """One midpoint step: order 2, two evaluations of f."""
    return x + h * f(x + h / 2 * f(x, t), t + h / 2)


def rk4(f, x, t, h):
    """One classical Runge-Kutta step: order 4, four evaluations of f."""
    k1 = f(x, t)
    k2 = f(x + h / 2 * k1, t + h / 2)
    k3 = f(x + h / 2 * k2, t + h / 2)
    k4 = f(x + h * k3, t + h)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


SOLVERS = {"euler": euler, "midpoint": midpoint, "rk4": rk4, "dopri5": None}


def odeint(v, x, t_0=0.0, t_1=1.0, solver="midpoint", steps=20, tolerance=1e-5):
    """Solve dx/dt = v(x, t) from t_0 to t_1, forward or backward in time.

    v: callable (x, t) -> velocity with t: (B,); x: (B, ...).  euler, midpoint and rk4 take `steps`
    equal steps; dopri5 (scipy's RK45, relative and absolute tolerance as given) chooses its own,
    the same for the whole batch.  Returns x at t_1 and the number of evaluations of v (NFE).
    Raises ValueError for steps < 1, FloatingPointError if the solution is not finite,
    RuntimeError with the solver's words if it fails.  Needs: SOLVERS, euler, midpoint, rk4.
    """
    nfe = 0

    def f(x, t):
        nonlocal nfe
        nfe += 1
        return v(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))

    def f_flat(t, flat):  # as scipy wants it: one float64 vector
        u = f(torch.from_numpy(flat).to(x).reshape(x.shape), t).double().flatten().cpu().numpy()
        if not np.isfinite(u).all():  # scipy would loop for ever
            raise FloatingPointError(f"the velocity is not finite at t = {t:.6g}")
        return u

    if solver == "dopri5":
        flat = x.double().flatten().cpu().numpy()
        result = solve_ivp(f_flat, (t_0, t_1), flat, "RK45", rtol=tolerance, atol=tolerance)
        if not result.success:
            raise RuntimeError(f"dopri5 failed: {result.message}")
        return torch.from_numpy(result.y[:, -1].copy()).to(x).reshape(x.shape), nfe
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    h = (t_1 - t_0) / steps
    for i in range(steps):
        x = SOLVERS[solver](f, x, t_0 + i * h, h)
    if not x.isfinite().all():
        raise FloatingPointError("the solution is not finite")
    return x, nfe


# ------------------------------------------------------------------------------------------------
# §4  Sampling
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(v, noise, path=ot_path, t_end=1.0, **solver):
    """Noise to data: p_0 = N(0, σ(0)² I) is pushed along v to t_end.

    v: callable (x, t), noise: (B, ...) from N(0, I), solver: as for odeint.
    Returns x_1: (B, ...) and the NFE.  Needs: ot_path, odeint.
    """
    sigma_0 = path(torch.zeros(1, device=noise.device))[1]
    return odeint(v, sigma_0 * noise, 0.0, t_end, **solver)


@torch.no_grad()
def trajectory(v, noise, path=ot_path, t_end=1.0, steps=20, **solver):
    """sample() seen on its way: x at steps + 1 equal times, (steps + 1, B, ...), and the NFE.

    Needs: ot_path, odeint.
    """
    frames, nfe = [path(torch.zeros(1, device=noise.device))[1] * noise], 0
    for i in range(steps):
        t, t_next = i * t_end / steps, (i + 1) * t_end / steps
        x, evaluations = odeint(v, frames[-1], t, t_next, steps=1, **solver)
        frames.append(x)
        nfe += evaluations
    return torch.stack(frames), nfe


@torch.no_grad()
def invert(v, x_1, t_end=1.0, **solver):
    """Data to noise: the same ODE backward, from t_end to 0.  Returns x: (B, ...), NFE.

    x is a point of p_0 = N(0, σ(0)² I): divide by σ(0), path(0)[1], for x_0.  Needs: odeint.
    """
    return odeint(v, x_1, t_end, 0.0, **solver)


def guided(v, y, scale=1.0):
    """Classifier-free guidance (arXiv 2207.12598): v(x, t, ∅) + scale (v(x, t, y) − v(x, t, ∅)).

    v: callable (x, t, y), y: (B,) labels; y = None is ∅.  scale 1 is plain conditional sampling,
    with one evaluation of v; otherwise both are evaluated.  Returns a callable (x, t).
    """

    def v_guided(x, t):
        conditional = v(x, t, y)
        if scale == 1:
            return conditional
        unconditional = v(x, t, None)
        return unconditional + scale * (conditional - unconditional)

    return v_guided


def slerp(a, b, s):
    """From a at s = 0 to b at s = 1 on the sphere: each point is as likely a noise as a and b are.

    a, b: one noise each, of any shape; s: float.
    """
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)


def draw_noise(seed, indices, shape):
    """x_0 ~ N(0, I) for the images with these indices: (len(indices), *shape), on the CPU.

    Image i depends on (seed, i) alone, so neither batch size nor device changes it.
    Needs: seed_from.
    """
    generators = (torch.Generator().manual_seed(seed_from(seed, i)) for i in indices)
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def seed_from(*keys):
    """One well-mixed 63-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ================================================================================================
# The paper ends here, the engineering begins.
# ================================================================================================

# ------------------------------------------------------------------------------------------------
# §5  Network: the U-Net of DDPM and its successors (Ho et al. 2020, Dhariwal & Nichol 2021)
# ------------------------------------------------------------------------------------------------


def time_embedding(t, dim):
    """Sinusoids of time: (B,) in [0, 1] to (B, dim), dim even; periods from 2π/1000 to 20π."""
    scale = 1000  # the frequencies were made for t in 0..1000: most would hardly move over [0, 1]
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = scale * t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def group_norm(channels):
    """GroupNorm with at most 32 groups of at least 4 channels; channels divisible by 4."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def zero_(module):
    """Zero the parameters: a residual branch then starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Attention(nn.Module):
    """Self-attention over all pixels, in heads of about 64 channels: (B, C, H, W) -> same.

    Needs: group_norm, zero_.
    """

    def __init__(self, channels):
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // 64))
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, h):
        B, C, H, W = h.shape
        qkv = self.qkv(self.norm(h)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # each (B, heads, HW, C/heads)
        a = F.scaled_dot_product_attention(q, k, v)
        return h + self.out(a.transpose(2, 3).reshape(B, C, H, W))


class ResBlock(nn.Module):
    """Two convolutions, time as scale and shift between them: (B, c_in, H, W) -> (B, c_out, H, W).

    Needs: group_norm, zero_, Attention.
    """

    def __init__(self, c_in, c_out, emb_dim, dropout=0.0, attention=False):
        super().__init__()
        self.norm1, self.norm2 = group_norm(c_in), group_norm(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(emb_dim, 2 * c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, h, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        r = self.conv1(F.silu(self.norm1(h)))
        r = F.silu(self.norm2(r) * (1 + scale) + shift)
        return self.attention(self.skip(h) + self.conv2(self.dropout(r)))


class Downsample(nn.Conv2d):
    """Halve height and width: a convolution of stride 2."""

    def forward(self, h, emb):
        return super().forward(h)


class Upsample(nn.Conv2d):
    """Double height and width: nearest neighbours, then a convolution."""

    def forward(self, h, emb):
        return super().forward(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """F(x, t, y): (B, C, H, W), (B,), labels (B,) or None -> (B, C, H, W).

    channels: of the image; size: height of the images that `attention` speaks of; width: channels
    at full resolution, divisible by 4; mults: of the width, per level; blocks: per level;
    attention: heights (after patching) at which to attend; classes: number of labels, 0 for none,
    label `classes` (also y = None) meaning "no label"; patch: fold p × p pixels into channels.
    128 × (1, 2, 2, 2), 2 blocks, attention at 16 is the usual CIFAR-10 net: 35.7M parameters.
    Raises ValueError if height or width is not divisible by patch · 2^(levels − 1).
    Needs: time_embedding, group_norm, zero_, Attention, ResBlock, Downsample, Upsample.
    """

    def __init__(self, channels=3, size=32, width=128, mults=(1, 2, 2, 2), blocks=2,
                 attention=(16,), dropout=0.0, classes=0, patch=1):
        super().__init__()
        if width % 4 or width < 4 or not mults or min(*mults, blocks, patch, channels) < 1:
            raise ValueError("width must be a multiple of 4; mults, blocks, patch at least 1")
        self.width, self.classes, self.patch = width, classes, patch
        self.divisor = patch * 2 ** (len(mults) - 1)
        self.check_size(size, size)
        emb_dim = 2 * width
        self.time = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.label = nn.Embedding(classes + 1, emb_dim) if classes else None

        block = functools.partial(ResBlock, emb_dim=emb_dim, dropout=dropout)
        level_attends = [size // patch // 2**i in attention for i in range(len(mults))]
        c = width
        skips = [c]  # channels of every output that the way up will see again
        self.stem = nn.Conv2d(channels * patch**2, c, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, m in enumerate(mults):
            for _ in range(blocks):
                self.down.append(block(c, m * width, attention=level_attends[i]))
                c = m * width
                skips.append(c)
            if i < len(mults) - 1:
                self.down.append(Downsample(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle1, self.middle2 = block(c, c, attention=any(attention)), block(c, c)
        for i, m in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), m * width, attention=level_attends[i]))
                c = m * width
            if i > 0:
                self.up.append(Upsample(c, c, 3, padding=1))
        self.out_norm = group_norm(c)
        self.out = zero_(nn.Conv2d(c, channels * patch**2, 3, padding=1))

    def check_size(self, H, W):
        if H % self.divisor or W % self.divisor:
            raise ValueError(f"images of {H} x {W} cannot be halved to the lowest level of this "
                             f"U-Net: height and width must be multiples of {self.divisor}")

    def forward(self, x, t, y=None):
        self.check_size(*x.shape[-2:])
        emb = self.time(time_embedding(t, self.width))
        if self.label is not None:
            y = torch.full_like(t, self.classes, dtype=torch.long) if y is None else y
            emb = emb + self.label(y)
        emb = F.silu(emb)
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for module in self.down:
            h = module(h, emb)
            skips.append(h)
        h = self.middle2(self.middle1(h, emb), emb)
        for module in self.up:
            h = module(h if isinstance(module, Upsample) else torch.cat([h, skips.pop()], 1), emb)
        return F.pixel_shuffle(self.out(F.silu(self.out_norm(h))), self.patch)


# ------------------------------------------------------------------------------------------------
# §6  Data: a uint8 tensor (N, C, H, W), an int64 tensor (N,) of labels, and the labels' names
# ------------------------------------------------------------------------------------------------


def draw_digits(n, size, seed=0):
    """n grey digits in Pillow's own font, each scaled, slanted, rotated, moved and thickened."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=n)
    images = np.empty((n, 1, size, size), np.uint8)
    big = 4 * size  # drawn large, then averaged down: smooth edges
    fonts = [ImageFont.load_default(big * s) for s in np.linspace(0.95, 1.1, 4)]
    for image, label in zip(images, labels):
        canvas = Image.new("L", (big, big))
        font, stroke = fonts[rng.integers(len(fonts))], int(rng.integers(1 + big // 32))
        middle = (big / 2, big / 2)
        ImageDraw.Draw(canvas).text(middle, str(label), 255, font, anchor="mm", stroke_width=stroke)
        angle, slant = rng.normal(0, 0.08), rng.normal(0, 0.1)
        a, b, c, d = math.cos(angle), math.sin(angle) + slant, -math.sin(angle), math.cos(angle)
        x, y = middle + rng.normal(0, 0.02 * big, 2)
        matrix = (a, b, big / 2 - a * x - b * y, c, d, big / 2 - c * x - d * y)
        canvas = canvas.transform((big, big), Image.Transform.AFFINE, matrix, Image.BILINEAR)
        image[0] = canvas.resize((size, size), Image.BOX)
    return torch.from_numpy(images), torch.from_numpy(labels), list("0123456789")


TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}


def load_torchvision(name, data_dir, size):
    """mnist, fashion-mnist or cifar10 from data_dir, downloaded into it if they are not there."""
    try:
        data = getattr(torchvision.datasets, TORCHVISION[name])(data_dir, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} is not in {data_dir} and could not be downloaded ({error}): name "
                         "its folder with --data-dir, or use --data digits") from None
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    if images.shape[-1] != size:
        images = torchvision.transforms.functional.resize(images, [size, size], antialias=True)
    return images.contiguous(), labels, data.classes


def decode(file, size, mode):
    """One image file, upright, its central square at size x size: uint8 (C, size, size)."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits: Pillow would clip them, not scale
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.asarray(ImageOps.fit(image.convert(mode), (size, size), Image.LANCZOS))
    except Exception as error:  # Pillow raises a dozen kinds
        raise ValueError(f"{file} does not decode as an image: {error}") from None
    return pixels.reshape(size, size, -1).transpose(2, 0, 1)


def is_grey(file):
    try:
        with Image.open(file) as image:
            return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    except Exception:
        return True  # decode will say what is wrong


def load_folder(folder, data_dir, size):
    """All images below a folder, grey if all are; a first-level subfolder is a label.

    They are decoded once, into a memory-mapped array in data_dir that need not fit in memory.
    """
    endings, root = Image.registered_extensions(), Path(folder)
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in endings and f.is_file())
    if not files:
        raise ValueError(f"{folder} holds no images (files named .png, .jpg, ...)")
    tops = [f.relative_to(root).parts[0] for f in files]
    names = sorted(set(tops)) if all(f.parent != root for f in files) else []
    numbers = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([numbers.get(top, 0) for top in tops])

    stamps = [(f.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns)
              for f, s in ((f, f.stat()) for f in files)]
    key = hashlib.sha256(repr((size, stamps)).encode()).hexdigest()[:16]
    cache = Path(data_dir) / f"{root.resolve().name}-{size}-{key}.npy"

    def fill(temporary):
        mode = "L" if all(map(is_grey, files)) else "RGB"  # stops at the first file in colour
        shape = (len(files), {"L": 1, "RGB": 3}[mode], size, size)
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        progress = Progress(len(files), "images decoded")
        with ThreadPoolExecutor() as pool:
            for i in range(0, len(files), 1024):  # by chunks: bounded memory
                part = files[i : i + 1024]
                array[i : i + 1024] = list(pool.map(lambda f: decode(f, size, mode), part))
                print(f"\r{progress.line(i + len(part))} ", end="", flush=True)
        print()
        array.flush()

    if not cache.exists():
        write_atomically(cache, fill)
    images = torch.from_numpy(np.load(cache, mmap_mode="c"))  # "c": torch wants a writable array
    return images, labels, names


def load_data(name, data_dir, size):
    """The images, labels and names of a --data argument."""
    if name == "digits":
        return draw_digits(20_000, size)
    load = load_torchvision if name in TORCHVISION else load_folder
    return load(name, data_dir, size)


def to_float(images):
    """uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1], clipped, to uint8: the inverse of to_float for all 256 levels."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def picture(image):
    """uint8 (C, H, W), C = 1 or 3, as a Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())


def picture_grid(images, columns):
    """uint8 (N, C, H, W) as one Pillow image, small pixels enlarged."""
    grid = torchvision.utils.make_grid(images, columns, padding=1, pad_value=128)
    zoom = max(1, 768 // grid.shape[-1])
    return picture(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))


def write_atomically(file, write):
    """Let write(temporary) make a file, flush it to the disk and rename it: whole or untouched."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"tmp-{file.name}")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# §7  Training
# ------------------------------------------------------------------------------------------------

RECIPES = {  # every value is also a flag; a folder of images takes the last row
    "digits": dict(size=16, width=32, mults=[1, 2, 2], blocks=1, attention=[], patch=1, dropout=0.0,
                   batch=32, lr=2e-3, warmup=50, steps=1500, ema=0.995, flip=False),
    "mnist": dict(size=28, width=64, mults=[1, 2], blocks=1, attention=[], patch=2, dropout=0.0,
                  batch=64, lr=2e-3, warmup=100, steps=3000, ema=0.998, flip=False),
    "fashion-mnist": dict(size=28, width=64, mults=[1, 2], blocks=1, attention=[], patch=2,
                          dropout=0.0, batch=64, lr=2e-3, warmup=100, steps=3000, ema=0.998,
                          flip=True),
    "cifar10": dict(size=32, width=128, mults=[1, 2, 2, 2], blocks=2, attention=[16], patch=1,
                    dropout=0.1, batch=128, lr=2e-4, warmup=5000, steps=400_000, ema=0.9999,
                    flip=True),
    "folder": dict(size=32, width=64, mults=[1, 2, 2], blocks=2, attention=[8], patch=1,
                   dropout=0.0, batch=64, lr=1e-3, warmup=200, steps=20_000, ema=0.999, flip=False),
}


def build_velocity(config):
    """The velocity model that a config describes, its U-Net newly initialised."""
    keys = ("channels", "size", "width", "mults", "blocks", "attention", "dropout", "patch")
    net = UNet(**{k: config[k] for k in keys}, classes=len(config["names"]))
    plain = config["path"] == "ot"  # Eq. 23 needs no help; the diffusion paths do
    return Velocity(net, None if plain else PATHS[config["path"]], config["data_rms"])


def draw_batch(images, labels, config, step, device, rank=0, world=1):
    """This rank's part of the global batch of a step: x_1, y (None without classes), x_0, t.

    A pure function of (seed, step): a resumed run, or one on another number of ranks, draws the
    same.  Every rank draws all random numbers and keeps its share of the images.
    """
    torch.manual_seed(seed_from(config["seed"], step))
    B, where = config["batch"], images.device
    index = torch.randint(len(images), (B,), device=where)
    flip = torch.rand(B, device=where) < 0.5
    x_0 = torch.randn(B, *images.shape[1:], device=device)
    t = T_END[config["path"]] * torch.rand(B, device=device)
    dropped = torch.rand(B, device=device) < config["label_drop"]  # sample by sample
    mine = slice(rank * B // world, (rank + 1) * B // world)
    part = slice(B) if config["coupling"] == "ot" else mine  # coupling needs the whole batch
    x_1 = images[index[part]]
    if config["flip"]:
        x_1 = torch.where(flip[part, None, None, None], x_1.flip(3), x_1)
    x_1 = to_float(x_1.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
    y = labels[index].to(device, non_blocking=True) if config["names"] else None
    if config["coupling"] == "ot":
        x_0, x_1 = ot_coupling(x_0, x_1, y)[mine], x_1[mine]
    else:
        x_0 = x_0[mine]
    if y is not None:
        y = torch.where(dropped, len(config["names"]), y)[mine]
    torch.manual_seed(seed_from(config["seed"], step, rank))  # dropout differs between ranks
    return x_1, y, x_0, t[mine]


def learning_rate(config, step):
    """Linear warm-up, then constant or falling linearly to 0 after the last step (of 1, 2, ...)."""
    fall = 1 - (step - 1) / config["steps"] if config["decay"] == "linear" else 1.0
    return config["lr"] * min(1.0, step / max(1, config["warmup"])) * fall


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- d ema + (1 − d) model, with d = min(decay, (1 + n)/(10 + n)) to forget the start."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def load_checkpoint(file, device="cpu"):
    """What train() saved, as a dict, and its velocity model with the EMA weights, on the device.

    weights_only: a hostile file cannot run code.  Raises ValueError for any other file.
    """
    if not Path(file).is_file():
        raise ValueError(f"there is no checkpoint {file}: train first, or name another")
    try:
        checkpoint = torch.load(file, map_location=device, weights_only=True)
        for key in ("model", "optimizer", "scaler", "step"):
            checkpoint[key]
        velocity = build_velocity(checkpoint["config"])
        velocity.load_state_dict(checkpoint["ema"])
    except Exception as error:  # torch, and a foreign dict, raise a dozen kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise ValueError(f"{file} is not a whole checkpoint of this program ({reason})") from None
    velocity = velocity.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return checkpoint, velocity


def autocast(device, amp):
    """Mixed precision: matrix work in amp ("bf16" or "fp16"), or everything in float32 ("off")."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "off")


def start_ranks(device):
    """rank, world size and device; under torchrun each process drives one GPU (or CPU share)."""
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # others wait for a long decode
    return dist.get_rank(), dist.get_world_size(), device


def load_on_each_machine(config, world):
    """load_data by the first process of each machine (it may download or decode), then the rest."""
    for turn in (0, 1):
        if turn == (int(os.environ.get("LOCAL_RANK", 0)) > 0):
            data = load_data(config["data"], config["data_dir"], config["size"])
        if world > 1:
            dist.barrier()
    return data


def train(config, out, device, compiled=False, resume=None, stop=lambda: False):
    """Train by config (DEFAULTS and a recipe), leaving checkpoint.pt, log.jsonl and grids in out.

    resume: a checkpoint dict to go on from, exactly.  stop: asked after every step; once true, a
    checkpoint is written and the run ends.  Raises FloatingPointError, and saves nothing, once a
    gradient is not finite; ValueError if the batch does not divide by the number of ranks.
    """
    rank, world, device = start_ranks(device)
    B, steps, amp = config["batch"], config["steps"], config["amp"]
    if B % world:
        raise ValueError(f"--batch {B} is not divisible by {world} ranks")
    images, labels, names = load_on_each_machine(config, world)
    some = to_float(images[:: max(1, len(images) // 10_000)])
    config = config | dict(channels=images.shape[1], data_rms=some.square().mean().sqrt().item(),
                           names=names if config["classes"] else [])
    if config["classes"] and len(names) < 2:
        raise ValueError(f"--classes: {config['data']} has no class subfolders")

    torch.manual_seed(config["seed"])
    velocity = build_velocity(config).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(velocity).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(velocity.parameters(), weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    state = dict(model=velocity, ema=ema, optimizer=optimizer, scaler=scaler)
    start = resume["step"] if resume else 0
    if resume:
        for name, part in state.items():
            part.load_state_dict(resume[name])
    model = velocity  # the bare module is what is saved and averaged: no "_orig_mod." in the names
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(velocity, device_ids=ids)
    if compiled:
        model = torch.compile(model)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        images = images.to(device)
    labels = labels.to(images.device)

    out, log = Path(out), Path(out, "log.jsonl")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        lines = log.read_text().splitlines(True) if resume and log.exists() else []
        log.write_text("".join(x for x in lines if json.loads(x)["step"] <= start))
        millions = sum(p.numel() for p in ema.parameters()) / 1e6
        print(f"{config['data']}: {len(images):,} images of {tuple(images.shape[1:])}; path "
              f"{config['path']}; {millions:.2f}M parameters; {world} x {device}, amp {amp}, "
              f"compile {compiled}\n{steps:,} steps x batch {B} = {steps * B / len(images):,.1f} "
              f"epochs; EMA decay {config['ema']}; writing {out}/")
    path, t_end = PATHS[config["path"]], T_END[config["path"]]
    loss_sum, bad_step = torch.zeros(2, device=device), torch.full((), -1, device=device)
    progress = Progress(steps, "steps", start)
    for step in range(start + 1, steps + 1):  # between log lines nothing waits for the device
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        x_1, y, x_0, t = draw_batch(images, labels, config, step, device, rank, world)
        with autocast(device, amp):
            v = functools.partial(model, y=y)
            loss = cfm_loss(v, path, x_1, x_0, t, velocity.weight(t))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # before clipping
        norm = nn.utils.clip_grad_norm_(velocity.parameters(), config["clip"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        update_ema(ema, velocity, step, config["ema"])
        loss_sum += torch.stack([loss.detach().float(), torch.ones_like(loss)])
        good = torch.isfinite(norm) | scaler.is_enabled()  # the scaler skips an overflow itself
        bad_step = torch.where(good | (bad_step >= 0), bad_step, step)

        stopping = stop()
        if world > 1:  # ranks must leave together: they agree on it at every tenth step
            flag = torch.tensor(float(stopping), device=device)
            stopping = step % 10 == 0 and (dist.all_reduce(flag), flag.item())[1] > 0
        saving = stopping or step % config["save_every"] == 0 or step == steps
        if saving or step % config["log_every"] == 0:
            if bad_step >= 0:
                raise FloatingPointError(f"the gradient of step {bad_step.item()} is not finite; "
                                         "the last checkpoint is kept: try a lower --lr")
            if world > 1:
                dist.all_reduce(loss_sum)
            line = dict(step=step, loss=(loss_sum[0] / loss_sum[1]).item(),
                        images_per_second=round(B * progress.rate(step), 1))
            loss_sum.zero_()
            if rank == 0:
                print(f"{progress.line(step, B)}  loss {line['loss']:.4f}  "
                      f"peak {peak_memory(device) / 2**30:.2f} GiB", flush=True)
                with open(log, "a") as f:
                    f.write(json.dumps(line) + "\n")
            if rank == 0 and saving:
                parts = {name: part.state_dict() for name, part in state.items()}
                parts |= dict(step=step, config=config)
                write_atomically(out / "checkpoint.pt", functools.partial(torch.save, parts))
            progress.restart(step)
        if rank == 0 and (step % config["sample_every"] == 0 or step == steps):
            noise = draw_noise(0, range(64), images.shape[1:]).to(device)
            with autocast(device, amp):
                x, _ = sample(ema, noise, path, t_end)
            grid = picture_grid(to_uint8(x).cpu(), 8)
            write_atomically(out / f"step-{step:06d}.png", grid.save)
            progress.restart(step)
        if stopping:
            break
    if world > 1:
        dist.destroy_process_group()


def peak_memory(device):
    """Bytes: of the GPU's memory under CUDA, of the process elsewhere (0 where it is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Progress:
    """Rate and time left for `total` things, from those done since the last restart."""

    def __init__(self, total, what, done=0):
        self.total, self.what = total, what
        self.restart(done)

    def restart(self, done):
        self.start, self.done = time.perf_counter(), done

    def rate(self, done):
        return max(1, done - self.done) / (time.perf_counter() - self.start)

    def line(self, done, unit=1):
        left = timedelta(seconds=int((self.total - done) / self.rate(done)))
        return (f"{done:,}/{self.total:,} {self.what}  {unit * self.rate(done):,.1f} images/s  "
                f"{left} left")


# ------------------------------------------------------------------------------------------------
# §8  The theory, drawn: the exact marginal field of Eq. 8 in the plane, without a network
# ------------------------------------------------------------------------------------------------


def toy_data(name):
    """Means (K, 2) and standard deviation τ of a mixture in the plane, about 2 in radius."""
    if name == "gaussians":  # eight, on a circle
        angles = torch.arange(8) * math.pi / 4
        return 2 * torch.stack([angles.cos(), angles.sin()], 1), 0.1
    side = torch.arange(16) * 0.25 - 1.875  # the black fields of a 4 x 4 board, 16 points each
    points = torch.cartesian_prod(side, side)
    field = ((points + 2).floor().sum(1) % 2).bool()
    return points[field], 0.1


def measure_paths(means, tau, particles=1000, seed=0):
    """How well few evaluations follow the exact field: a list of dicts, one per path and solve.

    landed: share of particles within 3τ of a mean; mse: mean squared distance of their end from
    that of 1000 steps of rk4.
    """
    table, noise = [], draw_noise(seed, range(particles), (2,))
    for name, path in PATHS.items():
        v = functools.partial(marginal_velocity, path, means=means, tau=tau)
        exact, _ = sample(v, noise, path, T_END[name], solver="rk4", steps=1000)
        for solver, stages in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
            for evaluations in (8, 12, 20, 40, 60, 100):
                x, nfe = sample(v, noise, path, T_END[name], solver=solver,
                                steps=evaluations // stages)
                landed = (torch.cdist(x, means).amin(1) < 3 * tau).float().mean().item()
                mse = (x - exact).square().mean().item()
                table.append(dict(path=name, solver=solver, nfe=nfe, landed=landed, mse=mse))
    return table


def evaluations_ratio(table, solver="euler"):
    """Evaluations that ot needs over those of vp at equal error: geometric mean, log-log."""
    curves = {}
    for name in ("ot", "vp"):
        rows = [row for row in table if (row["path"], row["solver"]) == (name, solver)]
        curves[name] = np.log([[row["nfe"], row["mse"]] for row in rows])[::-1].T  # mse rising
    nfe, mse = curves["vp"]
    ot_nfe, ot_mse = curves["ot"]
    both = (mse >= ot_mse[0]) & (mse <= ot_mse[-1])  # no extrapolation
    return np.exp(np.mean(np.interp(mse[both], ot_mse, ot_nfe) - nfe[both]))


def draw_paths(means, tau, particles=400, seed=0, size=300):
    """Rows: paths.  Columns: p_t with particles riding the field, and the lines to one x_1."""
    scale, times = 2, [0, 0.25, 0.5, 0.75, 1]  # drawn at twice the size, then averaged down
    pad, top, panel = 12 * scale, 40 * scale, size * scale
    width, height = pad + 6 * (panel + pad), 3 * (panel + top) + pad
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(17 * scale)
    noise = draw_noise(seed, range(particles), (2,))
    for row, (name, path) in enumerate(PATHS.items()):
        v = functools.partial(marginal_velocity, path, means=means, tau=tau)
        x, _ = trajectory(v, noise, path, T_END[name], steps=100, solver="rk4")
        t = torch.linspace(0, T_END[name], 101)
        alpha, sigma = (c[:, None, None] for c in path(t)[:2])
        lines = alpha * means[1] + sigma * noise[:16]  # ψ_t(x_0) for one x_1
        for column, now in enumerate([int(100 * t) for t in times] + [None]):
            left, upper = pad + column * (panel + pad), top + row * (panel + top)
            at = 0 if now is None else now  # the line panel shows all times: the largest scale
            half = max(3.0, 2 * alpha[at].item() + 3 * sigma[at].item())  # axes from −half to half
            board = Image.new("RGB", (panel, panel), "white")
            draw, unit = ImageDraw.Draw(board), panel / (2 * half)
            pixel = lambda p: ((p[..., 0] + half) * unit, (half - p[..., 1]) * unit)
            dots = lambda p, radius, fill: [draw.circle((a.item(), b.item()), radius * scale, fill)
                                            for a, b in zip(*pixel(p))]
            if now is not None:
                axis = torch.linspace(-half, half, 150)
                grid = torch.stack(torch.meshgrid(axis, -axis, indexing="xy"), -1).reshape(-1, 1, 2)
                variance = (alpha[at] * tau) ** 2 + sigma[at] ** 2
                p = (-(grid - alpha[at] * means).square().sum(2) / (2 * variance)).exp().sum(1)
                shade = (p / p.max()).sqrt().reshape(150, 150, 1).numpy()
                shade = (255 - shade * (255 - np.array([90, 150, 220]))).astype(np.uint8)
                board.paste(Image.fromarray(shade).resize((panel, panel), Image.BILINEAR))
            followed = lines if now is None else x[: now + 1, :24]
            for way in followed.transpose(0, 1):
                points = torch.stack(pixel(way), 1).flatten().tolist()
                draw.line(points, "#c0392b" if now is None else "#e08a30", scale)
            if now is None:
                dots(lines[::10].flatten(0, 1), 2, "#c0392b")  # equal times: their spacing is speed
                dots(means[1:2], 5, "black")
            else:
                dots(x[now], 1.5, "#202020")
            canvas.paste(board, (left, upper))
            pen.rectangle((left, upper, left + panel, upper + panel), None, "#808080", scale)
            what = f"{name}, lines to one x_1" if now is None else f"{name}, t = {times[column]:g}"
            pen.text((left, upper - 30 * scale), what, "black", font)
            pen.text((left + panel, upper - 30 * scale), f"axes ±{half:.3g}", "#808080", font, "ra")
    return canvas.resize((width // scale, height // scale), Image.LANCZOS)


# ------------------------------------------------------------------------------------------------
# §9  Command line
# ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def number(kind, low, high=10**12):
    """An argparse type: a finite int or float from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


COUNT, WHOLE, POSITIVE = number(int, 1), number(int, 0), number(float, 1e-12)
FRACTION = number(float, 0, 1)


def counts(text):
    """An argparse type: "1,2,2" as [1, 2, 2], "none" as []."""
    return [] if text == "none" else [COUNT(part) for part in text.split(",")]


OUT_FLAGS = {  # flag: (default, type or choices, help)
    "out": (None, str, "what to write; default: runs/DATA-PATH for train, samples.png beside the "
            "checkpoint for sample, paths.png for paths"),
    "overwrite": (False, bool, "replace what --out names"),
}
DEVICE_FLAGS = {
    "device": (None, ["cuda", "mps", "cpu"], "default: the fastest here"),
    "amp": (None, ["bf16", "fp16", "off"], "mixed precision; default: bf16 or fp16, whichever is "
            "native, on CUDA; off elsewhere"),
}
CONFIG_FLAGS = {  # a run is a function of these (and --amp); they are kept in its checkpoint
    "data": ("digits", str, f"digits, {', '.join(TORCHVISION)}, or a folder of images"),
    "path": ("ot", list(PATHS), "probability path"),
    "data_dir": ("data", str, "where downloads and decoded folders are kept"),
    "size": (None, COUNT, "height and width of the images, pixels"),
    "width": (None, COUNT, "channels at full resolution, a multiple of 4"),
    "mults": (None, counts, "multiples of the width, one per level, such as 1,2,2"),
    "blocks": (None, COUNT, "residual blocks per level"),
    "attention": (None, counts, "heights (after patching) at which to attend, such as 16,8; none"),
    "patch": (None, COUNT, "fold PATCH x PATCH pixels into channels: faster"),
    "dropout": (None, FRACTION, "share of activations dropped in residual blocks"),
    "batch": (None, COUNT, "images per step, over all ranks"),
    "lr": (None, POSITIVE, "peak learning rate of AdamW"),
    "warmup": (None, WHOLE, "steps of linear warm-up"),
    "steps": (None, COUNT, "training steps"),
    "ema": (None, FRACTION, "decay per step of the averaged weights"),
    "flip": (None, bool, "mirror images at random"),
    "classes": (False, bool, "learn to make images of a given class"),
    "label_drop": (0.1, FRACTION, "share of samples trained without their label, for guidance"),
    "coupling": ("independent", ["independent", "ot"], "of noise and images in a batch: as in the "
                 "paper, or minibatch optimal transport (straighter paths)"),
    "decay": ("linear", ["linear", "none"], "fall of the learning rate to 0"),
    "clip": (1.0, POSITIVE, "largest norm of the gradient"),
    "seed": (0, WHOLE, "of everything random"),
    "log_every": (50, COUNT, "steps between log lines"),
    "sample_every": (300, COUNT, "steps between sample grids"),
    "save_every": (300, COUNT, "steps between checkpoints"),
}
FREE_ON_RESUME = {"steps", "data_dir", "amp", "log_every", "sample_every", "save_every"}
TRAIN_FLAGS = CONFIG_FLAGS | DEVICE_FLAGS | OUT_FLAGS | {
    "compile": (None, bool, "torch.compile; default: on CUDA only"),
    "resume": (False, bool, "go on with the run in --out; default: the newest in runs/"),
}
SAMPLE_FLAGS = DEVICE_FLAGS | OUT_FLAGS | {
    "ckpt": (None, str, "checkpoint file; default: the newest runs/*/checkpoint.pt"),
    "n": (None, COUNT, "number of images; default: 64, or 8 of each class"),
    "solver": ("midpoint", list(SOLVERS), "euler, midpoint and rk4 evaluate the network 1, 2 and 4 "
               "times a step; dopri5 adapts"),
    "steps": (20, COUNT, "steps of the solver"),
    "tolerance": (1e-5, number(float, 1e-12, 1), "of dopri5, relative and absolute"),
    "seed": (0, WHOLE, "of the noise"),
    "batch": (None, COUNT, "images at a time; default: by size"),
    "label": (None, str, "class to make, name or number; default: one row of each class"),
    "guidance": (1.0, number(float, 0), "scale of classifier-free guidance, 1 for none"),
    "trajectory": (False, bool, "show the way from noise to image, left to right, in a .png"),
    "interpolate": (None, number(int, 2), "each row: INTERPOLATE images between two noises, on the "
                    "sphere; default: none"),
}
PATHS_FLAGS = OUT_FLAGS | {
    "data": ("gaussians", ["gaussians", "checkerboard"], "distribution in the plane"),
    "seed": (0, WHOLE, "of the noise"),
}


def pick_device(name):
    """The torch.device of a --device argument.  Raises ValueError for one that is not here."""
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = name or next(k for k in here if here[k])
    if not here[name]:
        raise ValueError(f"there is no {name} device here: use --device cpu")
    return torch.device(name)


def pick_amp(name, device):
    """bf16 where the GPU has it, else fp16; float32 on a CPU, where bf16 is mostly slower."""
    if name or device.type != "cuda":
        return name or "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def newest_checkpoint():
    files = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda f: f.stat().st_mtime)
    if not files:
        raise ValueError("there is no runs/*/checkpoint.pt here: train first, or name one")
    return files[-1]


def run_train(args, given):
    """The train command; given: the flags that were named, args: those and the defaults."""
    device = pick_device(args.device)
    recipe = RECIPES.get(args.data, RECIPES["folder"])
    flags = {k: getattr(args, k) for k in CONFIG_FLAGS}
    config = {k: recipe.get(k) if v is None else v for k, v in flags.items()}
    config["amp"] = pick_amp(args.amp, device)
    out = Path(args.out or f"runs/{Path(args.data).resolve().name}-{args.path}")
    resume = None
    if args.resume:
        if not given.keys() & {"out", "data", "path"}:
            out = newest_checkpoint().parent
        resume, _ = load_checkpoint(out / "checkpoint.pt")
        config = resume["config"] | {k: v for k, v in given.items() if k in config}
        for k in config.keys() - FREE_ON_RESUME:
            if config[k] != resume["config"][k]:
                raise ValueError(f"{out} was begun with --{k.replace('_', '-')} "
                                 f"{resume['config'][k]}, which --resume cannot change")
    elif (out / "checkpoint.pt").exists() and not args.overwrite:
        raise ValueError(f"{out} already holds a run: go on with --resume, replace it with "
                         "--overwrite, or name another --out")
    if config["data"] not in ("digits", *TORCHVISION) and not Path(config["data"]).is_dir():
        raise ValueError(f"--data {config['data']} is neither a folder of images nor digits, "
                         + ", ".join(TORCHVISION))
    with torch.device("meta"):  # refuses a bad shape before any work
        build_velocity(dict(channels=1, data_rms=1.0, names=[]) | config)

    signals = []

    def remember(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    train(config, out, device, compiled, resume, stop=lambda: bool(signals))
    if signals:
        print(f"stopped; go on with: python flow_matching.py train --resume --out {out}")
        sys.exit(128 + signals[0])


def run_sample(args, given):
    """The sample command: a grid, a film, or one PNG per image."""
    device = pick_device(args.device)
    file = Path(args.ckpt or newest_checkpoint())
    checkpoint, velocity = load_checkpoint(file, device)
    config = checkpoint["config"]
    names, path, t_end = config["names"], PATHS[config["path"]], T_END[config["path"]]
    out = Path(args.out or file.parent / "samples.png")
    kind, amp = out.suffix.lower(), pick_amp(args.amp, device)
    if args.out and not args.overwrite and (out.is_file() or out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} already exists: replace it with --overwrite, or name another")
    if args.trajectory and kind != ".png" or kind == ".gif" and args.interpolate:
        raise ValueError("--trajectory needs a .png to draw; a .gif shows no --interpolate")
    if not names and given.keys() & {"label", "guidance"}:
        raise ValueError("--label and --guidance need a model trained with --classes")
    label = None
    if args.label is not None:
        known = {**{str(i): i for i in range(len(names))}, **{k: i for i, k in enumerate(names)}}
        if args.label not in known:
            raise ValueError(f"--label {args.label}: this model knows {', '.join(names)}")
        label = known[args.label]

    every = len(names) if label is None else 0  # one row for each class, unless one was named
    n = args.n or (8 * max(1, every) if every or args.trajectory else 64)
    if args.interpolate:
        n = max(1, n // args.interpolate) * args.interpolate
    columns = args.interpolate or math.ceil(n / every if every else math.sqrt(n))
    rows = math.ceil(n / columns)
    print(f"{file}: step {checkpoint['step']:,}, path {config['path']}, EMA weights (decay "
          f"{config['ema']})")
    shape = (config["channels"], config["size"], config["size"])
    solver = dict(solver=args.solver, steps=args.steps, tolerance=args.tolerance)

    def noise(i):
        if not args.interpolate:
            return draw_noise(args.seed, [i], shape)[0]
        row, column = divmod(i, args.interpolate)
        ends = draw_noise(args.seed, [2 * row, 2 * row + 1], shape)
        return slerp(*ends, column / (args.interpolate - 1))

    def make(numbers):  # uint8 frames (F, b, C, H, W), of which the last is the images; NFE
        x_0 = torch.stack([noise(i) for i in numbers]).to(device)
        y = [label if label is not None else i // columns * every // rows for i in numbers]
        y = torch.tensor(y, device=device) if names else None
        v = guided(velocity, y, args.guidance)
        with autocast(device, amp):
            if not (args.trajectory or kind == ".gif"):
                x, nfe = sample(v, x_0, path, t_end, **solver)
                return to_uint8(x)[None].cpu(), nfe
            x, nfe = trajectory(v, x_0, path, t_end, **solver)
        sigma = path(torch.linspace(0, t_end, len(x), device=device))[1]
        return to_uint8(x / sigma.clamp(min=1).reshape(-1, 1, 1, 1, 1)).cpu(), nfe  # ve: fits

    batch = args.batch or max(1, min(512, 2**25 // (config["width"] * shape[1] * shape[2])))
    progress, parts, nfe_sum, written = Progress(n, "images"), [], 0, []
    with ThreadPoolExecutor(2) as pool:  # writes PNGs while the next batch is made
        for i in range(0, n, batch):
            numbers = range(i, min(i + batch, n))
            frames, nfe = make(numbers)
            nfe_sum += nfe * len(numbers)
            if kind in (".png", ".gif"):
                parts.append(frames)
            else:
                files = [out / f"{j:06d}.png" for j in numbers]
                written.append(pool.map(lambda image, file: write_atomically(
                    file, picture(image).save), frames[-1], files))
            print(f"\r{progress.line(numbers.stop)} ", end="", flush=True)
    for results in written:
        list(results)  # raises what a writer raised
    if parts:
        frames = torch.cat(parts, 1)
        if args.trajectory:  # a row for each image, time from left to right
            shown = frames[np.linspace(0, args.steps, min(args.steps, 10) + 1).round().astype(int)]
            grid = picture_grid(shown.transpose(0, 1).flatten(0, 1), len(shown))
            write_atomically(out, grid.save)
        elif kind == ".gif":
            film = [picture_grid(f, columns) for f in frames]
            write_atomically(out, lambda file: film[0].save(
                file, save_all=True, append_images=film[1:] + film[-1:] * 20, duration=60, loop=0))
        else:
            write_atomically(out, picture_grid(frames[-1], columns).save)
    print(f"\n{out}: {n:,} images, {args.solver}, NFE {nfe_sum / n:g}, amp {amp}, "
          f"{time.perf_counter() - progress.start:.1f} s")


def run_paths(args, given):
    """The paths command: a picture and a table."""
    out = Path(args.out or "paths.png")
    if args.out and out.exists() and not args.overwrite:
        raise ValueError(f"{out} already exists: replace it with --overwrite, or name another")
    means, tau = toy_data(args.data)
    table = measure_paths(means, tau, seed=args.seed)
    print("landed: share of particles within 3 tau; error: mean squared, against 1000 rk4 steps\n"
          "solver    NFE" + "".join(f"   {name} landed  error  " for name in PATHS))
    for row in table[: len(table) // len(PATHS)]:
        same = [r for r in table if (r["solver"], r["nfe"]) == (row["solver"], row["nfe"])]
        print(f"{row['solver']:9}{row['nfe']:4}" +
              "".join(f"    {r['landed']:7.1%}  {r['mse']:.1e}" for r in same))
    print(f"at equal error, ot needs {evaluations_ratio(table):.0%} of vp's evaluations (euler)")
    write_atomically(out, draw_paths(means, tau, seed=args.seed).save)
    print(f"wrote {out}")


COMMANDS = {
    "train": (run_train, TRAIN_FLAGS, "Learn to make images from noise.",
              "flow_matching.py train --path ot\n"
              "flow_matching.py train --data photos/ --size 64 --out runs/photos"),
    "sample": (run_sample, SAMPLE_FLAGS, "Make images from the EMA weights of a checkpoint.",
               "flow_matching.py sample --steps 20\n"
               "flow_matching.py sample --n 10000 --out images/\n"
               "flow_matching.py sample --label 3 --guidance 2   (after train --classes)"),
    "paths": (run_paths, PATHS_FLAGS, "Draw the theory: the exact field of Eq. 8, no network.",
              "flow_matching.py paths --data checkerboard"),
}


def build_parser():
    parser = Parser(prog="flow_matching.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, flags, text, examples) in COMMANDS.items():
        if run is run_train:
            examples += "\n\nrecipes (--data: defaults; folder is for any folder of images):\n"
            examples += "\n".join(f"  {k}: {v}" for k, v in RECIPES.items())
        p = commands.add_parser(name, help=text, description=text, epilog="examples:\n" + examples,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        p.set_defaults(run=run, error=p.error, flags=flags)
        for flag, (default, kind, text) in flags.items():
            if default is not None or "default" not in text:
                text += f" (default: {'by recipe' if default is None else default})"
            how = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
                   dict(choices=kind) if isinstance(kind, list) else
                   dict(type=kind, metavar=flag.upper()))
            p.add_argument("--" + flag.replace("_", "-"), help=text, **how)
    return parser


def main(argv=None):
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.error(f"unrecognized arguments: {' '.join(unknown)}")
    given = {k: v for k, v in vars(args).items() if k in args.flags and v is not None}
    defaults = {k: v[0] for k, v in args.flags.items()}
    try:
        args.run(argparse.Namespace(**defaults | given), given)
    except torch.OutOfMemoryError:
        args.error("out of memory: lower --batch")
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        args.error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
