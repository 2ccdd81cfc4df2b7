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
    §4 sampling                 sample, invert, guided, slerp, draw_noise
    -- the paper ends here, the engineering begins --
    §5 network                  UNet
    §6 data                     digits drawn on the spot, torchvision's sets, folders of images
    §7 training                 recipes, checkpoints, the loop
    §8 the theory, drawn        the exact field in the plane: a picture and a table
    §9 command line             train, sample, paths

Notation: B, C, H, W are batch, channels, height and width; images are in [-1, 1]; t is in [0, 1].
A definition in §1-§5 that needs another one says so ("Needs: ..."); pasted with it, it runs.

    python flow_matching.py train --path ot
    python flow_matching.py sample --steps 20
    python flow_matching.py paths
    torchrun --nproc_per_node=8 flow_matching.py train --data cifar10
"""

import argparse
import copy
import functools
import hashlib
import inspect
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
from torchvision.transforms.functional import resize, to_pil_image

# ------------------------------------------------------------------------------------------------
# §1  Probability paths  (paper: Sections 3 and 4)
#
# A path is a function of time: alpha, sigma, d_alpha, d_sigma = path(t).  It means
#     p_t(x | x_1) = N(x; α x_1, σ² I)         x_t = ψ_t(x_0) = α x_1 + σ x_0,  x_0 ~ N(0, I).
# ------------------------------------------------------------------------------------------------


def ot_path(t, sigma_min=1e-4):
    """Optimal-transport path, Eq. 20: the straight line from x_0 to x_1 at constant speed.

    t: (B,) in [0, 1].  Returns α = t, σ = 1 − (1 − σ_min) t, α', σ', each (B,).
    The paper gives σ_min no value; 1e-4 is far below one grey level (2/255).
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


def cfm_loss(v, path, x_1, x_0=None, t=None, weight=1.0, t_end=1.0):
    """Conditional flow matching, Eq. 14: the mean of ‖v(x_t, t) − u_t(x_t | x_1)‖² per element.

    v: callable (x, t) -> velocity, x_1: (B, ...) data.  x_0 ~ N(0, I) and t ~ U[0, t_end] are
    drawn unless given.  weight: (B,) per-sample weights, 1 in the paper.
    By Eq. 13, u is the time derivative of ψ_t(x_0): no division by σ.  Needs: coefficients.
    """
    if x_0 is None:
        x_0 = torch.randn_like(x_1)
    if t is None:  # float32 always: a bf16 draw is exactly 1.0 once in 500
        t = t_end * torch.rand(len(x_1), device=x_1.device)
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t, x_1)
    x_t = alpha * x_1 + sigma * x_0
    u = d_alpha * x_1 + d_sigma * x_0
    return (weight * (v(x_t, t) - u).square().flatten(1).mean(1)).mean()


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

    precondition None: v = F, as in the paper.  A path: F learns only what the best linear
    predictor misses, at unit scale (Karras et al., arXiv 2206.00364, §5, for any path):
        v = c_skip x + c_out F(c_in x, t),   loss weight 1/c_out².
    The diffusion paths need it: ve's inputs span 1 to 50 and its targets 0.085 to 426.
    net: callable (x, t, y) -> (B, C, H, W); data_rms: root mean square of the data.
    Needs: coefficients.
    """

    def __init__(self, net, precondition=None, data_rms=1.0):
        super().__init__()
        self.net, self.path, self.data_rms = net, precondition, data_rms

    def scales(self, x, t):
        """c_in, c_skip, c_out, each shaped to multiply x."""
        if self.path is None:
            return 1.0, 0.0, 1.0
        alpha, sigma, d_alpha, d_sigma = coefficients(self.path, t, x)
        s = self.data_rms
        c_in = (alpha**2 * s**2 + sigma**2) ** -0.5
        c_skip = (alpha * d_alpha * s**2 + sigma * d_sigma) * c_in**2
        c_out = s * (alpha * d_sigma - sigma * d_alpha).abs() * c_in
        return c_in, c_skip, c_out

    def weight(self, t):
        """The loss weight of each sample: (B,), or 1 for the paper's loss."""
        return self.scales(t, t)[2] ** -2

    def forward(self, x, t, y=None):
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


def odeint(v, x, t_0=0.0, t_1=1.0, solver="midpoint", steps=20, tolerance=1e-5, keep=False):
    """Solve dx/dt = v(x, t) from t_0 to t_1, forward or backward in time.

    v: callable (x, t) -> velocity with t: (B,); x: (B, ...).  euler, midpoint and rk4 take `steps`
    equal steps; dopri5 (scipy's RK45, relative and absolute tolerance as given) chooses its own,
    the same for the whole batch.  Returns x at t_1, or with keep at the steps + 1 equal times,
    (steps + 1, B, ...), and the number of evaluations of v (NFE).
    Raises ValueError for steps < 1 or an unknown solver, FloatingPointError if the solution is not
    finite, RuntimeError with scipy's words if dopri5 fails.  Needs: SOLVERS, euler, midpoint, rk4.
    """
    if steps < 1 or solver not in SOLVERS:
        raise ValueError(f"no solver {solver!r} with {steps} steps: at least 1, {list(SOLVERS)}")
    nfe = 0

    def f(x, t):
        nonlocal nfe
        nfe += 1
        return v(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))

    def f_flat(t, flat):  # as scipy wants it: one float64 vector
        u = f(torch.from_numpy(flat).to(x.dtype).to(x.device).reshape(x.shape), t)
        if not u.isfinite().all():  # scipy would loop for ever
            raise FloatingPointError(f"the velocity is not finite at t = {t:.6g}")
        return u.flatten().cpu().double().numpy()

    if solver == "dopri5":
        times = np.linspace(t_0, t_1, steps + 1) if keep else [t_1]
        result = solve_ivp(f_flat, (t_0, t_1), x.flatten().cpu().double().numpy(), "RK45", times,
                           rtol=tolerance, atol=tolerance)
        if not result.success:
            raise RuntimeError(f"dopri5 failed: {result.message}")
        frames = torch.from_numpy(result.y.T.copy()).to(x.dtype).to(x.device)
        frames = frames.reshape(-1, *x.shape)
    else:
        frames, h = [x], (t_1 - t_0) / steps
        for i in range(steps):
            x = SOLVERS[solver](f, x, t_0 + i * h, h)
            frames = (frames if keep else []) + [x]
        frames = torch.stack(frames)
    if not frames[-1].isfinite().all():
        raise FloatingPointError("the solution is not finite")
    return (frames if keep else frames[-1]), nfe


# ------------------------------------------------------------------------------------------------
# §4  Sampling
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(v, noise, path=ot_path, t_end=1.0, **solver):
    """Noise to data: p_0 = N(0, σ(0)² I) is pushed along v to t_end.

    v: callable (x, t), noise: (B, ...) from N(0, I), solver: as for odeint.
    Returns x_1: (B, ...), or with keep=True the whole way, and the NFE.  Needs: ot_path, odeint.
    """
    sigma_0 = path(torch.zeros(1, device=noise.device))[1]
    return odeint(v, sigma_0 * noise, 0.0, t_end, **solver)


@torch.no_grad()
def invert(v, x_1, path=ot_path, t_end=1.0, **solver):
    """Data to noise, the inverse of sample: the same ODE backward in time.

    Returns the noise that becomes x_1: (B, ...), and the NFE.  Needs: ot_path, odeint.
    """
    x, nfe = odeint(v, x_1, t_end, 0.0, **solver)
    return x / path(torch.zeros(1, device=x.device))[1], nfe


def guided(v, y, scale=1.0):
    """Classifier-free guidance (arXiv 2207.12598): v(x, t, ∅) + scale (v(x, t, y) − v(x, t, ∅)).

    v: callable (x, t, y), y: (B,) labels; y = None is ∅.  Returns a callable (x, t).  scale 1 is
    plain conditional sampling and evaluates v once; any other scale evaluates it twice.
    """

    def v_guided(x, t):
        conditional = v(x, t, y)
        return conditional if scale == 1 else torch.lerp(v(x, t, None), conditional, scale)

    return v_guided


def slerp(a, b, s):
    """From a at s = 0 to b at s = 1 on the sphere: each point is as likely a noise as a and b are.

    a, b: one noise each, of any shape; s: float.
    """
    angle = torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))
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
#
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


class UNet(nn.Module):
    """F(x, t, y): (B, C, H, W), (B,), labels (B,) or None -> (B, C, H, W).

    channels: of the image; size: height of the images that `attention` speaks of; width: channels
    at full resolution, divisible by 4; mults: of the width, per level; blocks: per level;
    attention: heights of the feature maps (size/patch/2^level) at which to attend, if any then in
    the middle too; classes: number of labels, 0 for none, label `classes` (also y = None) meaning
    "no label"; patch: fold p × p pixels into channels.
    128 × (1, 2, 2, 2), 2 blocks, attention at 16 is the usual CIFAR-10 net: 35.7M parameters.
    Raises ValueError if height or width is not divisible by patch · 2^(levels − 1).
    Needs: time_embedding, group_norm, zero_, ResBlock.
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
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle1, self.middle2 = block(c, c, attention=any(attention)), block(c, c)
        for i, m in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), m * width, attention=level_attends[i]))
                c = m * width
            if i > 0:
                double = nn.Upsample(scale_factor=2.0), nn.Conv2d(c, c, 3, padding=1)
                self.up.append(nn.Sequential(*double))
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
            h = module(h, emb) if isinstance(module, ResBlock) else module(h)
            skips.append(h)
        h = self.middle2(self.middle1(h, emb), emb)
        for module in self.up:
            if isinstance(module, ResBlock):
                h = module(torch.cat([h, skips.pop()], 1), emb)
            else:
                h = module(h)
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
        parts = [resize(part, [size, size]) for part in images.split(1000)]  # bounded memory
        images = torch.cat(parts)
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
    root = Path(folder)
    endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in endings and f.is_file())
    if not files:
        raise ValueError(f"{folder} is no folder with images (.png, .jpg, ...) and no data set "
                         f"(digits, {', '.join(TORCHVISION)})")
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
        since = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            for i in range(0, len(files), 1024):  # by chunks: bounded memory
                part = files[i : i + 1024]
                array[i : i + 1024] = list(pool.map(lambda f: decode(f, size, mode), part))
                line = progress(i + len(part), len(files), since)
                print(f"\rdecoding {line} ", end="", flush=True)
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


def progress(done, total, since, begun=0):
    """A line of progress, since the clock read `since` and `begun` things were done."""
    rate = max(1, done - begun) / (time.perf_counter() - since)
    left = timedelta(seconds=int((total - done) / rate))
    return f"{done:,}/{total:,}  {rate:,.1f}/s  {left} left"


def to_float(images):
    """uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1], clipped, to uint8: the inverse of to_float for all 256 levels."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def picture_grid(images, columns):
    """uint8 (N, C, H, W) as one Pillow image, small pixels enlarged."""
    grid = to_pil_image(torchvision.utils.make_grid(images, columns, padding=1, pad_value=128))
    return ImageOps.scale(grid, max(1, 768 // grid.width), Image.NEAREST)


def write_atomically(file, write):
    """Let write(temporary) make a file, flush it to the disk and rename it: whole or untouched."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"tmp-{os.getpid()}-{file.name}")  # another run may write it too
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

RECIPES = {  # what differs from the defaults of CONFIG_FLAGS; every value is also a flag
    "digits": dict(size=16),
    "mnist": dict(size=28, steps=2000),
    "fashion-mnist": dict(size=28, steps=2000, flip=True),
    "cifar10": dict(size=32, width=128, mults=[1, 2, 2, 2], blocks=2, attention=[16], dropout=0.1,
                    batch=128, lr=2e-4, warmup=5000, steps=400_000, ema=0.9999, flip=True,
                    save_every=5000),
    "folder": dict(size=32, width=64, mults=[1, 2, 2], blocks=2, attention=[8], batch=64, lr=1e-3,
                   warmup=200, steps=20_000, ema=0.999, save_every=1000),
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
    B = config["batch"]
    index = torch.randint(len(images), (B,)).to(images.device)
    flip, dropped = torch.rand(B) < 0.5, torch.rand(B) < config["label_drop"]  # by sample
    x_0 = torch.randn(B, *images.shape[1:], device=device)
    t = T_END[config["path"]] * torch.rand(B, device=device)
    mine = slice(rank * B // world, (rank + 1) * B // world)
    part = slice(B) if config["coupling"] == "ot" else mine  # coupling needs the whole batch
    x_1 = images[index[part]].to(device, non_blocking=True)
    if config["flip"]:
        x_1 = torch.where(flip[part, None, None, None].to(device), x_1.flip(3), x_1)
    x_1 = to_float(x_1).contiguous(memory_format=torch.channels_last)
    y = labels[index].to(device, non_blocking=True) if config["names"] else None
    if config["coupling"] == "ot":
        x_0[mine], x_1 = ot_coupling(x_0, x_1, y)[mine], x_1[mine]
    if y is not None:
        y = torch.where(dropped.to(device), len(config["names"]), y)[mine]
    torch.manual_seed(seed_from(config["seed"], step, rank + 1))  # dropout differs between ranks
    return x_1, y, x_0[mine], t[mine]


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
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
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


def train(config, out, device, compiled=False, resume=None, stop=lambda: False):
    """Train by config (all of CONFIG_FLAGS, and amp), leaving checkpoint.pt, log.jsonl and grids.

    resume: a checkpoint dict to go on from, to the same bits on a CPU.  stop: asked after every
    step; once true, a checkpoint is written and the run ends.  Raises FloatingPointError, and
    saves nothing, once a gradient is not finite (in fp16: at any loss scale); ValueError for a
    batch that does not divide by the ranks, data without classes, or data changed since resume.
    """
    rank, world, device = start_ranks(device)
    B, steps, amp = config["batch"], config["steps"], config["amp"]
    if B % world:
        raise ValueError(f"--batch {B} is not divisible by {world} ranks")
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # it downloads or decodes, the others wait
    if not first:
        dist.barrier()
    images, labels, names = load_data(config["data"], config["data_dir"], config["size"])
    if first and world > 1:
        dist.barrier()
    if config["classes"] and len(names) < 2:
        raise ValueError(f"--classes: {config['data']} has no class subfolders")
    squares = [to_float(x).square().mean() for x in images[:: max(1, len(images) // 10_000)]]
    found = dict(channels=images.shape[1], names=names if config["classes"] else [],
                 data_rms=torch.stack(squares).mean().sqrt().item())
    config = found | config  # a resumed run keeps what it was begun with
    if config["channels"] != found["channels"] or config["names"] != found["names"]:
        raise ValueError(f"{config['data']} has changed since this run was begun")

    torch.manual_seed(config["seed"])
    velocity = build_velocity(config).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(velocity).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(velocity.parameters(), weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    state = dict(model=velocity, ema=ema, optimizer=optimizer, scaler=scaler)
    start = resume["step"] if resume else 0
    for name, part in state.items():
        if resume and resume[name]:  # the scaler's is empty unless the run was in fp16
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
        for debris in out.glob("tmp-*"):  # of a killed run
            debris.unlink()
        lines = log.read_text().splitlines(True) if resume and log.exists() else []
        whole = (x for x in lines if x.endswith("}\n"))
        log.write_text("".join(x for x in whole if json.loads(x)["step"] <= start))
        millions = sum(p.numel() for p in ema.parameters()) / 1e6
        print(f"{config['data']}: {len(images):,} images of {tuple(images.shape[1:])}; path "
              f"{config['path']}; {millions:.2f}M parameters; {world} x {device}, amp {amp}, "
              f"compile {compiled}\n{steps:,} steps x batch {B} = {steps * B / len(images):,.1f} "
              f"epochs; EMA decay {config['ema']}; writing {out}/")
    path, t_end = PATHS[config["path"]], T_END[config["path"]]
    loss_sum, bad_step = torch.zeros(2, device=device), torch.full((), -1, device=device)
    begun, since = start, time.perf_counter()
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
        if world > 1:  # ranks must leave together: they agree at every tenth step
            flag = torch.tensor(float(stopping), device=device) if step % 10 == 0 else None
            stopping = flag is not None and (dist.all_reduce(flag) or flag.item() > 0)
        saving = stopping or step % config["save_every"] == 0 or step == steps
        if not saving and step % config["log_every"]:
            continue
        bad = step if scaler.is_enabled() and scaler.get_scale() < 1 else bad_step.item()
        if bad >= 0:
            raise FloatingPointError(f"the gradient of step {bad} is not finite; the last "
                                     "checkpoint is kept: try a lower --lr")
        if world > 1:
            dist.all_reduce(loss_sum)
        loss = (loss_sum[0] / loss_sum[1]).item()
        loss_sum.zero_()
        if rank == 0:
            rate = B * (step - begun) / (time.perf_counter() - since)
            memory = (f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
                      if device.type == "cuda" else "")
            print(f"step {progress(step, steps, since, begun)}  {rate:,.0f} images/s  "
                  f"loss {loss:.4f}{memory}", flush=True)
            with open(log, "a") as f:
                f.write(json.dumps(dict(step=step, loss=loss, images_per_second=rate)) + "\n")
        if rank == 0 and saving:
            parts = {name: part.state_dict() for name, part in state.items()}
            parts |= dict(step=step, config=config)
            write_atomically(out / "checkpoint.pt", functools.partial(torch.save, parts))
            noise = draw_noise(0, range(64), images.shape[1:]).to(device)
            with autocast(device, amp):  # with classes too, of no class
                x, _ = sample(functools.partial(ema, y=None), noise, path, t_end, steps=10)
            grid = picture_grid(to_uint8(x).cpu(), 8)
            write_atomically(out / f"step-{step:06d}.png", grid.save)
        if stopping:
            break
        begun, since = step, time.perf_counter()
    if dist.is_initialized():
        dist.destroy_process_group()


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
    """How well few evaluations follow the exact field: path -> list of dicts, one per solve.

    landed: share of particles within 3τ of a mean; mse: mean squared distance, per coordinate, of
    their ends from those of 1000 steps of rk4.
    """
    table, noise = {}, draw_noise(seed, range(particles), (2,))
    for name, path in PATHS.items():
        v = functools.partial(marginal_velocity, path, means=means, tau=tau)
        exact, _ = sample(v, noise, path, T_END[name], solver="rk4", steps=1000)
        table[name] = []
        for solver, stages in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
            for steps in (n // stages for n in (8, 12, 20, 40, 60, 100)):
                x, nfe = sample(v, noise, path, T_END[name], solver=solver, steps=steps)
                landed = (torch.cdist(x, means).amin(1) < 3 * tau).float().mean().item()
                mse = (x - exact).square().mean().item()
                table[name].append(dict(solver=solver, nfe=nfe, landed=landed, mse=mse))
    return table


def evaluations_ratio(table, solver="euler"):
    """Evaluations that ot needs over those of vp at equal error: geometric mean, log-log."""
    curves = {name: np.log([[row["mse"], row["nfe"]] for row in rows if row["solver"] == solver])
              for name, rows in table.items()}
    ot, vp = curves["ot"][::-1], curves["vp"][::-1]  # np.interp wants a rising error
    vp = vp[(vp[:, 0] >= ot[0, 0]) & (vp[:, 0] <= ot[-1, 0])]  # no extrapolation
    return np.exp(np.mean(np.interp(vp[:, 0], *ot.T) - vp[:, 1]))


def draw_paths(means, tau, particles=400, seed=0, size=300):
    """A picture.  Rows: paths.  Columns: p_t with particles on the field; lines to one x_1."""
    scale = 2  # drawn at twice the size, then averaged down
    pad, top, panel = 12 * scale, 40 * scale, size * scale
    width, height = pad + 6 * (panel + pad), 3 * (panel + top) + pad
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(17 * scale)
    noise = draw_noise(seed, range(particles), (2,))
    for row, (name, path) in enumerate(PATHS.items()):
        v = functools.partial(marginal_velocity, path, means=means, tau=tau)
        x, _ = sample(v, noise, path, T_END[name], solver="rk4", steps=100, keep=True)
        t = torch.linspace(0, T_END[name], 101)
        alpha, sigma = (c[:, None, None] for c in path(t)[:2])
        lines = alpha * means[1] + sigma * noise[:16]  # ψ_t(x_0) for one x_1
        panels = [(f"t = {i / 100:g}", i, x[: i + 1, :24], x[i]) for i in (0, 25, 50, 75, 100)]
        panels.append(("lines to one x_1", 0, lines, lines[::10].flatten(0, 1)))  # spacing: speed
        for column, (title, i, ways, dots) in enumerate(panels):
            half = max(3.0, 2 * alpha[i].item() + 3 * sigma[i].item())  # axes from −half to half
            axis = torch.linspace(-half, half, 150)
            grid = torch.stack(torch.meshgrid(axis, -axis, indexing="xy"), -1).reshape(-1, 1, 2)
            variance = (alpha[i] * tau) ** 2 + sigma[i] ** 2
            p = (-(grid - alpha[i] * means).square().sum(2) / (2 * variance)).exp().sum(1)
            shade = 255 - (p / p.max()).sqrt().reshape(150, 150, 1) * torch.tensor([165, 105, 35])
            board = Image.fromarray(shade.byte().numpy()).resize((panel, panel), Image.BILINEAR)
            draw, zoom = ImageDraw.Draw(board), panel / (2 * half)
            for way in ((ways * torch.tensor([1, -1]) + half) * zoom).transpose(0, 1):
                draw.line(way.flatten().tolist(), "#d35400", scale)
            for dot in ((dots * torch.tensor([1, -1]) + half) * zoom).tolist():
                draw.circle(dot, 1.5 * scale, "#202020")
            left, upper = pad + column * (panel + pad), top + row * (panel + top)
            canvas.paste(board, (left, upper))
            pen.rectangle((left, upper, left + panel, upper + panel), None, "#808080", scale)
            pen.text((left, upper - 30 * scale), f"{name}, {title}", "black", font)
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

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def counts(text):
    """An argparse type: "1,2,2" as [1, 2, 2], "none" as []."""
    return [] if text == "none" else [COUNT(part) for part in text.split(",")]


COUNT, WHOLE, POSITIVE = number(int, 1), number(int, 0), number(float, 1e-12)
FRACTION = number(float, 0, 1)
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
CONFIG_FLAGS = {  # a run is a function of these and --amp; they are kept in its checkpoint
    "data": ("digits", str, f"digits, {', '.join(TORCHVISION)}, or a folder of images"),
    "path": ("ot", list(PATHS), "probability path"),
    "classes": (False, bool, "learn to make images of a given class"),
    "coupling": ("independent", ["independent", "ot"], "of noise and images in a batch: as in the "
                 "paper, or minibatch optimal transport"),
    "data_dir": ("data", str, "where downloads and decoded folders are kept"),
    "size": (16, COUNT, "height and width of the images, pixels"),
    "width": (32, COUNT, "channels at full resolution, a multiple of 4"),
    "mults": ([1, 2, 2], counts, "multiples of the width, one per level"),
    "blocks": (1, COUNT, "residual blocks per level"),
    "attention": ([], counts, "heights of feature maps at which to attend, such as 16,8; or none"),
    "patch": (1, COUNT, "fold PATCH x PATCH pixels into channels: faster"),
    "dropout": (0.0, FRACTION, "share of activations dropped in residual blocks"),
    "label_drop": (0.1, FRACTION, "share of samples trained without their label, for guidance"),
    "batch": (32, COUNT, "images per step, over all ranks"),
    "lr": (2e-3, POSITIVE, "peak learning rate of AdamW"),
    "warmup": (50, WHOLE, "steps of linear warm-up"),
    "decay": ("linear", ["linear", "none"], "fall of the learning rate to 0"),
    "steps": (1250, COUNT, "training steps"),
    "ema": (0.995, FRACTION, "decay per step of the averaged weights"),
    "flip": (False, bool, "mirror images at random"),
    "clip": (1.0, POSITIVE, "largest norm of the gradient"),
    "seed": (0, WHOLE, "of everything random"),
    "log_every": (50, COUNT, "steps between log lines"),
    "save_every": (500, COUNT, "steps between checkpoints, each with a grid of samples"),
}
FREE_ON_RESUME = {"steps", "data_dir", "amp", "log_every", "save_every"}
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


def check_free(out, args):
    """Raises ValueError if --out names a file or a filled directory, without --overwrite."""
    if args.out and not args.overwrite and (out.is_file() or out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} already exists: replace it with --overwrite, or name another")


def run_train(args, given):
    """Learn to make images from noise.

    examples:
      flow_matching.py train --path ot
      flow_matching.py train --data photos/ --size 64 --out runs/photos
      flow_matching.py train --resume
    """
    device = pick_device(args.device)
    given = {k: v for k, v in given.items() if k in CONFIG_FLAGS or k == "amp"}
    config = {k: v[0] for k, v in CONFIG_FLAGS.items()} | dict(amp=pick_amp(args.amp, device))
    config |= RECIPES.get(args.data, RECIPES["folder"]) | given
    out, resume = Path(args.out or f"runs/{Path(args.data).resolve().name}-{args.path}"), None
    if args.resume:
        if not (args.out or given.keys() & {"data", "path"}):
            out = newest_checkpoint().parent
        resume, _ = load_checkpoint(out / "checkpoint.pt")
        config = resume["config"] | given
        if resume["step"] >= config["steps"]:
            raise ValueError(f"{out} has done its {config['steps']} steps: go on with more --steps")
        for k in given.keys() - FREE_ON_RESUME:
            if given[k] != resume["config"][k]:
                raise ValueError(f"{out} was begun with --{k.replace('_', '-')} "
                                 f"{resume['config'][k]}, which --resume cannot change")
    elif (out / "checkpoint.pt").exists() and not args.overwrite:
        raise ValueError(f"{out} already holds a run: go on with --resume, replace it with "
                         "--overwrite, or name another --out")
    with torch.device("meta"):  # refuses a bad shape before any work
        build_velocity(dict(channels=1, data_rms=1.0, names=[]) | config)

    caught = []  # the first signal asks for a checkpoint, a second one stops at once
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda n, _: (caught.append(n), signal.signal(n, signal.SIG_DFL)))
    compiled = device.type == "cuda" if args.compile is None else args.compile
    train(config, out, device, compiled, resume, stop=lambda: bool(caught))
    if caught:
        print(f"stopped; go on with: python flow_matching.py train --resume --out {out}")
        sys.exit(128 + caught[0])


def run_sample(args, given):
    """Make images from the EMA weights of a checkpoint: a grid, a film, or one PNG per image.

    examples:
      flow_matching.py sample --steps 20
      flow_matching.py sample --n 10000 --out images/
      flow_matching.py sample --out film.gif
      flow_matching.py sample --label 3 --guidance 2      (after train --classes)
    """
    device = pick_device(args.device)
    file, amp = Path(args.ckpt or newest_checkpoint()), pick_amp(args.amp, device)
    checkpoint, velocity = load_checkpoint(file, device)
    config = checkpoint["config"]
    names, path, t_end = config["names"], PATHS[config["path"]], T_END[config["path"]]
    out = Path(args.out or file.parent / "samples.png")
    kind = out.suffix.lower()
    check_free(out, args)
    if kind not in ("", ".png", ".gif") or kind != ".png" and args.trajectory:
        raise ValueError("--out is NAME.png (--trajectory needs it), NAME.gif or a directory")
    if not names and given.keys() & {"label", "guidance"}:
        raise ValueError("--label and --guidance need a model trained with --classes")
    known = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    if args.label is not None and args.label not in known:
        raise ValueError(f"--label {args.label}: this model knows {', '.join(names)}")
    print(f"{file}: step {checkpoint['step']:,}, path {config['path']}, EMA weights (decay "
          f"{config['ema']})")

    rows = len(names) if args.label is None else 0  # a row for each class, unless one was named
    n = args.n or (8 * max(1, rows) if rows or args.trajectory else 64)
    columns = args.interpolate or (max(1, n // rows) if rows else math.ceil(math.sqrt(n)))
    n = max(1, n // columns) * columns if args.interpolate else n
    shape = (config["channels"], config["size"], config["size"])
    film = args.trajectory or kind == ".gif"
    solver = dict(solver=args.solver, steps=args.steps, tolerance=args.tolerance, keep=film)

    def noise(i):
        if not args.interpolate:
            return draw_noise(args.seed, [i], shape)[0]
        row, column = divmod(i, columns)
        ends = draw_noise(args.seed, [2 * row, 2 * row + 1], shape)
        return slerp(*ends, column / (columns - 1))

    def make(numbers):  # uint8 frames (F, b, C, H, W), of which the last is the images; NFE
        y = [known[args.label] if args.label else i // columns % rows for i in numbers if names]
        y = torch.tensor(y, device=device) if names else None
        with autocast(device, amp):
            x, nfe = sample(guided(velocity, y, args.guidance),
                            torch.stack([noise(i) for i in numbers]).to(device), path, t_end,
                            **solver)
        if film:  # the noise of ve, to 150, is scaled down to be seen
            sigma = path(torch.linspace(0, t_end, len(x), device=device))[1]
            x = x / sigma.clamp(min=1).reshape(-1, 1, 1, 1, 1)
        return to_uint8(x if film else x[None]).cpu(), nfe * (1 if args.guidance == 1 else 2)

    parts, nfe_sum, since = [], 0, time.perf_counter()
    batch = args.batch or max(1, min(512, 2**25 // (config["width"] * shape[1] * shape[2])))
    if not kind:
        for old in out.glob("[0-9]*.png"):  # --overwrite: no mixture of two runs
            old.unlink()
        out.mkdir(parents=True, exist_ok=True)
    for i in range(0, n, batch):
        numbers = range(i, min(i + batch, n))
        frames, nfe = make(numbers)
        nfe_sum += nfe * len(numbers)
        if kind:
            parts.append(frames)
        else:
            for j, image in zip(numbers, frames[-1]):
                to_pil_image(image).save(out / f"{j:06d}.png")
        print(f"\r{progress(numbers.stop, n, since)} ", end="", flush=True)
    if kind:
        frames = torch.cat(parts, 1)
        if args.trajectory:  # a row for each image, time from left to right
            at = torch.linspace(0, args.steps, min(args.steps, 10) + 1).round().long()
            frames, columns = frames[at].transpose(0, 1).flatten(0, 1)[None], len(at)
        grids = [picture_grid(f, columns) for f in frames]
        more = {} if kind == ".png" else dict(
            save_all=True, append_images=grids[1:] + grids[-1:] * 20, duration=60, loop=0)
        write_atomically(out, lambda temporary: grids[0].save(temporary, **more))
    print(f"\n{out}: {n:,} images, {args.solver}, NFE {nfe_sum / n:g}, amp {amp}, "
          f"{time.perf_counter() - since:.1f} s")


def run_paths(args, given):
    """Draw the theory: the exact field of Eq. 8, as a picture and a table, without a network.

    examples:
      flow_matching.py paths
      flow_matching.py paths --data checkerboard --out board.png
    """
    out = Path(args.out or "paths.png")
    check_free(out, args)
    means, tau = toy_data(args.data)
    table = measure_paths(means, tau, seed=args.seed)
    print("landed: share of particles within 3 tau; error: mean squared, against 1000 rk4 steps\n"
          "solver    NFE" + "".join(f"   {name} landed  error  " for name in PATHS))
    for rows in zip(*table.values()):
        print(f"{rows[0]['solver']:9}{rows[0]['nfe']:4}" +
              "".join(f"    {row['landed']:7.1%}  {row['mse']:.1e}" for row in rows))
    print(f"at equal error, ot needs {evaluations_ratio(table):.0%} of vp's evaluations (euler)")
    write_atomically(out, draw_paths(means, tau, seed=args.seed).save)
    print(f"wrote {out}")


COMMANDS = {"train": (run_train, TRAIN_FLAGS), "sample": (run_sample, SAMPLE_FLAGS),
            "paths": (run_paths, PATHS_FLAGS)}


def build_parser():
    parser = Parser(prog="flow_matching.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, flags) in COMMANDS.items():
        text = inspect.cleandoc(run.__doc__)
        if run is run_train:
            text += "\n\nrecipes, by --data, replace the defaults below (folder: any folder):\n"
            text += "\n".join(f"  {k}: {v}" for k, v in RECIPES.items())
        p = commands.add_parser(name, help=text.split("\n")[0], description=text,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        p.set_defaults(run=run, error=p.error, flags=flags)
        for flag, (default, kind, what) in flags.items():
            what += f" (default: {default})" if default is not None else ""
            how = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
                   dict(choices=kind) if isinstance(kind, list) else
                   dict(type=kind, metavar=flag.upper()))
            p.add_argument("--" + flag.replace("_", "-"), help=what, **how)
    return parser


def main(argv=None):
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.error(f"unrecognized arguments: {' '.join(unknown)}")
    given = {k: v for k, v in vars(args).items() if k in args.flags and v is not None}
    defaults = {k: v[0] for k, v in args.flags.items()}
    try:
        args.run(argparse.Namespace(**defaults | given), given)
    except (torch.OutOfMemoryError, MemoryError):
        args.error("out of memory: lower --batch or --size")
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        args.error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
