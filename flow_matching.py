# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "scipy>=1.11"]
# ///
"""Flow Matching for Generative Modeling (Lipman et al., arXiv 2210.02747) in one file.

A probability path x_t = α(t) x_1 + σ(t) x_0 leads from noise x_0 at t = 0 to an image x_1 at
t = 1.  Along it every pair (x_0, x_1) moves with the velocity u = α'(t) x_1 + σ'(t) x_0.  A
network v(x, t) learns u by plain regression at random (x_t, t): Eq. 14.  The loss is least at
the mean velocity of all pairs that meet at x (Eq. 8), and following that mean moves the noise
distribution onto the data (Theorem 1).  So new images are the solutions of dx/dt = v(x, t).

    §1 probability paths        ot_path, vp_path, ve_path, Theorem 3, the exact marginal field
    §2 loss                     cfm_loss
    §3 ODE solvers              euler, midpoint, rk4, odeint (with adaptive Dormand-Prince)
    §4 sampling and likelihood  sample, invert, log_likelihood, bits_per_dim
    -- the paper ends here, the engineering begins --
    beyond the paper            ot_coupling, guided, slerp, draw_noise
    §5 network                  UNet
    §6 Fréchet distance         the Inception network of FID, streamed statistics
    §7 data                     digits drawn on the spot, torchvision's sets, folders of images
    §8 training                 recipes, preconditioning, checkpoints, the loop
    §9 the theory, drawn        the exact field in the plane: a picture and a table
    §10 command line            train, sample, fid, nll, paths

Notation: B, C, H, W are batch, channels, height and width; images are in [-1, 1]; t is in [0, 1].
A definition in §1-§6 that needs another one says so ("Needs: ..."); pasted with it, it runs.

    python flow_matching.py train --path ot
    python flow_matching.py sample --steps 20      (then fid, nll, paths: --help has examples)
    torchrun --nproc_per_node=8 flow_matching.py train --data cifar10
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.integrate import solve_ivp
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

# §1  Probability paths  (paper: Sections 3 and 4) -----------------------------------------------
# A path is a function of time: alpha, sigma, d_alpha, d_sigma = path(t).  It means
#     p_t(x | x_1) = N(x; α x_1, σ² I)         x_t = ψ_t(x_0) = α x_1 + σ x_0,  x_0 ~ N(0, I).


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
    T(s) = β_min s + ½ (β_max − β_min) s²:  α = exp(−½ T), σ² = 1 − α².
    Returns α, σ, α', σ'.
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

    x, x_1: (B, ...), t: (B,).  Eqs. 17, 19, 21 are this for ve, vp, ot.  Needs: coefficients.
    """
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t, x)
    return d_sigma / sigma * (x - alpha * x_1) + d_alpha * x_1


def marginal_velocity(path, x, t, means, tau=0.0):
    """The exact marginal field, Eq. 8, where the data is a mixture of K equal Gaussians.

    x: (B, D), t: (B,), means: (K, D), tau: standard deviation of each Gaussian, 0 for plain
    points.  Component k at t is N(α m_k, (α²τ² + σ²) I) and moves by Theorem 3; the field is
    the mean of these velocities, weighted by the posterior p(k | x, t).  Returns (B, D).
    """
    alpha, sigma, d_alpha, d_sigma = (c[:, None, None] for c in path(t))
    offset = x[:, None] - alpha * means  # (B, K, D)
    variance = (alpha * tau) ** 2 + sigma**2
    growth = (alpha * d_alpha * tau**2 + sigma * d_sigma) / variance  # s'/s of s² = variance
    posterior = (-offset.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)  # (B, K, 1)
    return (posterior * (growth * offset + d_alpha * means)).sum(1)


# §2  Loss  (paper: Theorem 2) -------------------------------------------------------------------


def cfm_loss(v, path, x_1, x_0=None, t=None, weight=1.0, t_end=1.0):
    """Conditional flow matching, Eq. 14: mean ‖v(x_t, t) − u_t(x_t | x_1)‖² per element.

    v: callable (x, t) -> velocity, x_1: (B, ...) data.  x_0 ~ N(0, I) and t ~ U[0, t_end] are
    drawn unless given; t_end is the path's T_END.  weight: (B,), 1 in the paper and for ot; vp and
    ve train with Velocity.weight (§8).  By Eq. 13, u is the time derivative of ψ_t(x_0): it never
    divides by σ.  Needs: coefficients.
    """
    x_0 = torch.randn_like(x_1) if x_0 is None else x_0
    if t is None:  # float32 always: rounded to bf16 it is exactly 1.0 once in 500
        t = t_end * torch.rand(len(x_1), device=x_1.device)
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t, x_1)
    x_t = alpha * x_1 + sigma * x_0
    u = d_alpha * x_1 + d_sigma * x_0
    return (weight * (v(x_t, t) - u).square().flatten(1).mean(1)).mean()


# §3  ODE solvers: dx/dt = f(x, t) ---------------------------------------------------------------


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
        frames = torch.tensor(result.y.T, dtype=x.dtype).to(x.device).reshape(-1, *x.shape)
    else:
        frames, h = [x], (t_1 - t_0) / steps
        for i in range(steps):
            x = SOLVERS[solver](f, x, t_0 + i * h, h)
            frames = (frames if keep else []) + [x]
        frames = torch.stack(frames)
    if not frames[-1].isfinite().all():
        raise FloatingPointError("the solution is not finite")
    return (frames if keep else frames[-1]), nfe


# §4  Sampling and likelihood  (paper: Section 2, Appendix C) ------------------------------------


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


@torch.no_grad()
def log_likelihood(v, x_1, path=ot_path, t_end=1.0, probes=None, **solver):
    """log p_1(x_1) in nats, (B,), and the NFE: the change of variables along the flow.

    d log p_t(x_t)/dt = −div v(x_t, t), solved with the ODE backward from data to noise, where
    p_0 = N(0, σ(0)² I).  x_1: (B, ...), D numbers each.  probes: list of E: (B, ...); div v is
    taken as the sum of Eᵀ (∂v/∂x) E.  One draw of random signs, held through the solve, is
    Hutchinson's unbiased estimate; None is every unit vector: exact, at D gradients an evaluation.
    v must not mix the samples of a batch.  Needs: ot_path, odeint.
    """
    if probes is None:
        units = torch.eye(x_1[0].numel(), dtype=x_1.dtype, device=x_1.device)
        probes = units.reshape(-1, 1, *x_1.shape[1:]).expand(-1, *x_1.shape)

    def f(state, t):  # x and ∫ div v dt, as one state: (B, D + 1)
        with torch.enable_grad():
            x = state[:, :-1].reshape(x_1.shape).requires_grad_()
            u = v(x, t)
            div = sum(torch.autograd.grad(u, x, E, retain_graph=True)[0] * E for E in probes)
        return torch.cat([u.detach().flatten(1), div.flatten(1).sum(1, keepdim=True)], 1)

    state, nfe = odeint(f, F.pad(x_1.flatten(1), (0, 1)), t_end, 0.0, **solver)
    variance = path(torch.zeros(1, device=x_1.device))[1] ** 2
    log_p_0 = -0.5 * (state[:, :-1].square() / variance + (2 * math.pi * variance).log()).sum(1)
    return log_p_0 + state[:, -1], nfe  # backward in time: state[:, -1] = −∫ div v dt


def bits_per_dim(log_p, D):
    """−log2 P(image) / D of images of 256 levels: (B,).

    log_p: (B, K), nats, log p_1 of K draws of x = (k + u)/128 − 1 for levels k and u ~ U[0, 1).
    Its mean is an upper bound that K tightens.  A level is 1/128 wide in x: 7 = log2 128 bits.
    """
    return 7 - (log_p.logsumexp(1) - math.log(log_p.shape[1])) / (D * math.log(2))


# The paper ends here, the engineering begins. ===================================================
# Beyond the paper, for any callable v: coupling, guidance, noise that a seed decides ------------


def ot_coupling(x_0, x_1, y=None):
    """Minibatch optimal transport (Tong et al., arXiv 2302.00482; Pooladian et al., 2304.14772).

    x_0, x_1: (B, ...).  Returns x_0 in the order in which the sum of ‖x_0 − x_1‖² is least.
    y: (B,) labels: noise then changes places only within a class: p(x_0 | y) stays N(0, I).
    """
    y = torch.zeros(len(x_0)) if y is None else y
    coupled = x_0.clone()
    for label in y.unique():
        rows = (y == label).nonzero()[:, 0].to(x_0.device)
        cost = torch.cdist(x_1[rows].flatten(1), x_0[rows].flatten(1)).square()
        coupled[rows] = x_0[rows[linear_sum_assignment(cost.cpu())[1]]]
    return coupled


def guided(v, y, scale=1.0):
    """Classifier-free guidance of scale s (arXiv 2207.12598): v(∅) + s (v(y) − v(∅)).

    v: callable (x, t, y), y: (B,) labels; y = None is ∅.  Returns a callable (x, t).  s = 1 is
    plain conditional sampling and evaluates v once; any other scale evaluates it twice.
    """
    if scale == 1:
        return lambda x, t: v(x, t, y)
    return lambda x, t: torch.lerp(v(x, t, None), v(x, t, y), scale)


def slerp(a, b, s):
    """From noise a at s = 0 to noise b at s = 1, on the sphere: as long in between as noise is."""
    angle = torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))
    return (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)


def draw_noise(seed, indices, shape):
    """x_0 ~ N(0, I) for the images with these indices: (len(indices), *shape), on the CPU.

    Image i depends on (seed, i) alone, not on batch size or device.  Needs: generator.
    """
    return torch.stack([torch.randn(shape, generator=generator(seed, i)) for i in indices])


def generator(*keys):
    """A torch.Generator on the CPU, seeded by several non-negative integers.  Needs: seed_from."""
    return torch.Generator().manual_seed(seed_from(*keys))


def seed_from(*keys):
    """One well-mixed 63-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


# §5  Network: the U-Net of DDPM and its successors (Ho et al. 2020, Dhariwal & Nichol 2021) -----


def time_embedding(t, dim):
    """Sinusoids of time: (B,) in [0, 1] to (B, dim), dim even; periods from 2π/1000 up to 20π."""
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
    """Self-attention, heads of ~64 channels: (B, C, H, W) -> same.  Needs: group_norm, zero_."""

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
    128 × (1, 2, 2, 2), 2 blocks, attention at 16 is the usual CIFAR-10 net: 35.5M parameters.
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
        c, skips = width, [width]  # channels now, and of every output that the way up sees again
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
            raise ValueError(f"images of {H} x {W}: this U-Net needs multiples of {self.divisor}")

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
            is_block = isinstance(module, ResBlock)
            h = module(torch.cat([h, skips.pop()], 1), emb) if is_block else module(h)
        return F.pixel_shuffle(self.out(F.silu(self.out_norm(h))), self.patch)


# §6  Fréchet inception distance  (Heusel et al., arXiv 1706.08500) ------------------------------
# Features are any callable: uint8 images (B, C, H, W) -> (B, D).

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def pixels(images):
    """The pixels as features, in [-1, 1]: uint8 (B, C, H, W) -> (B, CHW).  Needs: to_float."""
    return to_float(images).flatten(1)


def resize_as_tensorflow_1(x, size=299):
    """Bilinear (B, C, H, W) -> (B, C, size, size): pixel i from i H/size, and no antialiasing."""
    x = F.pad(x, (0, 1, 0, 1), "replicate")  # now pixel H goes to pixel size: corner to corner
    x = F.interpolate(x, (size + 1, size + 1), mode="bilinear", align_corners=True)
    return x[..., :size, :size]


def inception(file=None, device="cpu"):
    """The features on which published FIDs rest: of TensorFlow's Inception network of 2015.

    file: its weights as pytorch-fid ported them; None downloads them (96 MB) to torch's hub cache.
    Returns a callable: uint8 (B, C, H, W), C = 1 or 3, on any device -> float32 (B, 2048).
    Raises ValueError for other weights, and if they cannot be downloaded.
    Needs: INCEPTION_URL, INCEPTION_SHA256, resize_as_tensorflow_1.
    """
    name = Path(INCEPTION_URL).name
    cached = Path(torch.hub.get_dir(), "checkpoints", name)
    if not file and not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, cached, INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{INCEPTION_URL} was not downloaded ({error}): fetch it elsewhere "
                             "and name it with --inception FILE, or --features pixels") from None
    file = Path(file or cached)
    if hashlib.sha256(file.read_bytes()).hexdigest() != INCEPTION_SHA256:
        raise ValueError(f"{file} is not {name} (another SHA-256): fetch {INCEPTION_URL}")
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    net.fc = nn.Identity()
    net = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def pool_by(pool, block):  # torchvision pools by a plain function: catch what went into it
        seen = []
        block.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        block.branch_pool.register_forward_pre_hook(lambda _, x: (pool(seen.pop()),))

    for block in (net.Mixed_5b, net.Mixed_5c, net.Mixed_5d, net.Mixed_6b, net.Mixed_6c,
                  net.Mixed_6d, net.Mixed_6e, net.Mixed_7b):
        pool_by(nn.AvgPool2d(3, 1, 1, count_include_pad=False), block)
    pool_by(nn.MaxPool2d(3, 1, 1), net.Mixed_7c)

    def features(images):
        x = resize_as_tensorflow_1(images.to(device).float()).expand(-1, 3, -1, -1)
        return net(((x - 128) / 128).contiguous(memory_format=torch.channels_last))

    return lambda images: torch.cat([features(part) for part in images.split(50)])  # 1 GB at a time


def fit_gaussian(batches, features):
    """Mean (D,) and covariance (D, D) of the features of many images: numpy, float64.

    batches: iterable of uint8 (B, C, H, W), of any sizes; one is in memory at a time.
    Raises ValueError for fewer than two images and for features that are not finite.
    """
    n = total = squares = origin = 0
    for images in batches:
        f = features(images).cpu().double()
        origin = origin if n else f[0]  # sums about one sample: a large mean would cancel digits
        f = f - origin
        n, total, squares = n + len(f), total + f.sum(0), squares + f.T @ f
    if n < 2 or not torch.isfinite(total).all():
        raise ValueError("at least two images are needed" if n < 2 else "features are not finite")
    covariance = (squares - torch.outer(total, total) / n) / (n - 1)
    return (origin + total / n).numpy(), covariance.numpy()


def frechet_distance(mean_1, cov_1, mean_2, cov_2):
    """‖m_1 − m_2‖² + tr(S_1 + S_2 − 2 (S_1 S_2)^½): float, 0 for equal Gaussians.

    means (D,), covariances (D, D), float64.  With S_1 = A Aᵀ, S_1 S_2 has the eigenvalues of the
    symmetric Aᵀ S_2 A: real, never negative, so that singular covariances need no special care.
    Raises ValueError for what is not finite.
    """
    values, vectors = scipy.linalg.eigh(cov_1)
    A = vectors * np.sqrt(values.clip(0))
    root = np.sqrt(scipy.linalg.eigvalsh(A.T @ cov_2 @ A).clip(0))
    shift = np.asarray_chkfinite(mean_1 - mean_2)
    return float(shift @ shift + np.trace(cov_1 + cov_2) - 2 * root.sum())


# §7  Data: a uint8 tensor (N, C, H, W), an int64 tensor (N,) of labels, and the labels' names ---


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


def load_torchvision(name, data_dir, size, test=False):
    """mnist, fashion-mnist or cifar10 from data_dir, downloaded into it if they are not there."""
    try:
        load = getattr(torchvision.datasets, TORCHVISION[name])
        data = load(data_dir, train=not test, download=True)
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"{name} is not whole in {data_dir} nor downloaded ({error}): name "
                         "its folder with --data-dir, or use --data digits") from None
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    parts = [resize(part, [size, size]) for part in images.split(1000)]  # bounded memory
    return torch.cat(parts).contiguous(), labels, data.classes


def decode(file, size, mode):
    """One image file, upright, its central square at size x size, or whole (None): uint8 CHW."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in "FI" and not np.isfinite(image).all():
                raise ValueError("pixels are not finite")
            if image.mode.startswith("I"):  # 16 bits: Pillow would clip them, not scale
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert(mode)
            image = ImageOps.fit(image, (size, size), Image.LANCZOS) if size else image
            return np.atleast_3d(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow raises a dozen kinds
        raise ValueError(f"{file} does not decode as an image: {error}") from None


def is_grey(file):
    with contextlib.suppress(Exception), Image.open(file) as image:
        return Image.getmodebase(image.mode) == "L"
    return True  # decode will say what is wrong


def load_folder(folder, data_dir, size):
    """All images below a folder, grey if all are; a first-level subfolder is a label.

    They are decoded once, into a memory-mapped array in data_dir that need not fit in memory.
    size None: as they are, which must be square and of one size.
    """
    root = Path(folder)
    endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in endings and f.is_file())
    for f in files:
        if f.is_symlink() and not f.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{f} is a link to outside the folder: put the image itself there")
    if not files:
        raise ValueError(f"{folder} is no folder with images, nor digits, {', '.join(TORCHVISION)}")
    flat = any(f.parent == root for f in files)  # then there are no labels
    tops = ["" if flat else f.relative_to(root).parts[0] for f in files]
    names, labels = np.unique(tops, return_inverse=True)
    labels, names = torch.from_numpy(labels), [] if flat else names.tolist()

    stamps = [(f.relative_to(root), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    crop, size = size, size or decode(files[0], None, "L").shape[1]
    key = hashlib.sha256(repr((crop, stamps)).encode()).hexdigest()[:16]
    cache = Path(data_dir) / f"{root.resolve().name}-{size}-{key}.npy"

    def fill(temporary):
        mode = "L" if all(map(is_grey, files)) else "RGB"  # stops at the first file in colour
        shape = (len(files), {"L": 1, "RGB": 3}[mode], size, size)
        if math.prod(shape) > shutil.disk_usage(temporary.parent).free:  # a bus error, else
            raise OSError(f"no room in {data_dir} for {math.prod(shape):,} bytes of images")
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        with ThreadPoolExecutor() as pool:
            for part in in_batches(len(files), 256, "decoding "):
                for i, image in zip(part, pool.map(lambda i: decode(files[i], crop, mode), part)):
                    if image.shape != shape[1:]:
                        raise ValueError(
                            f"{files[i]} has {image.shape[2]} x {image.shape[1]} pixels, not "
                            f"{size} x {size}: all must be square and of one size")
                    array[i] = image

    if not cache.exists():
        write_atomically(cache, fill)
    with warnings.catch_warnings(record=True):  # silent: torch would rather have a writable array
        return torch.from_numpy(np.load(cache, mmap_mode="r")), labels, names


def load_data(name, data_dir, size, test=False):
    """The images, labels and names of a --data argument; test: those kept from training."""
    if name == "digits":
        return draw_digits(20_000, size, seed=int(test))
    if name in TORCHVISION:
        return load_torchvision(name, data_dir, size, test)
    if test:
        raise ValueError(f"the folder {name} has no test split: name a folder instead")
    return load_folder(name, data_dir, size)


def progress(done, total, since, begun=0):
    """A line of progress, since the clock read `since` and `begun` things were done."""
    rate = max(1, done - begun) / (time.perf_counter() - since)
    left = timedelta(seconds=int((total - done) / rate))
    return f"{done:,}/{total:,}  {rate:,.1f}/s  {left} left"


def in_batches(n, batch, what=""):
    """0..n − 1 in ranges of `batch`, with a line of progress after each."""
    since = time.perf_counter()
    for i in range(0, n, batch):
        yield range(i, min(i + batch, n))
        print(f"\r{what}{progress(min(i + batch, n), n, since)} ", end="", flush=True)
    print()


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
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"tmp-{os.getpid()}-{file.name}")  # another run may write it too
    for old in file.parent.glob(f"tmp-*-{file.name}"):
        with contextlib.suppress(FileNotFoundError):  # its own run may finish meanwhile
            if time.time() - old.stat().st_mtime > 3600:  # of a run that was killed
                old.unlink()
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"{file} could not be written, is the disk full? ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


# §8  Training -----------------------------------------------------------------------------------

RECIPES = {  # what differs from the defaults of CONFIG_FLAGS; every value is also a flag
    "digits": dict(size=16),
    "mnist": dict(size=28, steps=2000),
    "fashion-mnist": dict(size=28, steps=2000, flip=True),
    "cifar10": dict(size=32, width=128, mults=[1, 2, 2, 2], blocks=2, attention=[16], dropout=0.1,
                    time="uniform", optimizer="adamw", batch=128, lr=2e-4, warmup=5000,
                    steps=400_000, ema=0.9999, flip=True, save_every=5000),
    "folder": dict(size=32, width=64, blocks=2, attention=[8], time="uniform", optimizer="adamw",
                   batch=64, lr=1e-3, warmup=200, steps=20_000, ema=0.999, save_every=1000),
}


class Velocity(nn.Module):
    """The velocity v(x, t) that a network F represents.

    precondition None: v = F, as in the paper.  A path: F learns only what the best linear
    predictor misses, at unit scale (Karras et al., arXiv 2206.00364, §5, for any path):
        v = c_skip x + c_out F(c_in x, t),   loss weight 1/c_out².
    The diffusion paths need it: ve's inputs span 1 to 50 and its targets 0.085 to 426.
    net: callable (x, t, y) -> (B, C, H, W); data_rms: root mean square of the data.
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


def build_velocity(config):
    """The velocity model that a config describes, its U-Net newly initialised."""
    keys = ("channels", "size", "width", "mults", "blocks", "attention", "dropout", "patch")
    net = UNet(**{k: config[k] for k in keys}, classes=len(config["names"]))
    plain = config["path"] == "ot"  # Eq. 23 needs no help; the diffusion paths do
    return Velocity(net, None if plain else PATHS[config["path"]], config["data_rms"])


def to_device(x, device):
    """x on the device; out of pinned memory CUDA copies it without a wait for the step before."""
    pinned = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if pinned else x.to(device)


def draw_batch(images, labels, config, step, device, rank=0, world=1):
    """This rank's part of the global batch of a step: x_1, y (None without classes), x_0, t.

    A pure function of (seed, step): a resumed run, or one on another number of ranks, draws the
    same.  Every rank draws all random numbers and keeps its share of the images.
    """
    torch.manual_seed(seed_from(config["seed"], step))
    B = config["batch"]
    index = to_device(torch.randint(len(images), (B,)), images.device)
    flip = torch.rand(B, device=device) < 0.5
    dropped = torch.rand(B, device=device) < config["label_drop"]
    x_0 = torch.randn(B, *images.shape[1:], device=device)
    t = torch.rand(B, device=device)
    if config["time"] == "logit-normal":  # fewer at both ends, where there is less to learn
        t = torch.special.ndtri(t).sigmoid()
    t = T_END[config["path"]] * t
    mine = slice(rank * B // world, (rank + 1) * B // world)
    part = slice(B) if config["coupling"] == "ot" else mine  # coupling needs the whole batch
    x_1 = to_device(images[index[part]], device)
    if config["flip"]:
        x_1 = torch.where(flip[part, None, None, None], x_1.flip(3), x_1)
    x_1 = to_float(x_1).contiguous(memory_format=torch.channels_last)
    y = to_device(labels[index], device) if config["names"] else None
    if config["coupling"] == "ot":
        x_0[mine], x_1 = ot_coupling(x_0, x_1, y)[mine], x_1[mine]
    if y is not None:
        y = torch.where(dropped, len(config["names"]), y)[mine]
    torch.manual_seed(seed_from(config["seed"], step, rank + 1))  # dropout differs between ranks
    return x_1, y, x_0[mine], t[mine]


class Muon(torch.optim.AdamW):
    """AdamW, except that hidden convolutions step by their momentum made orthogonal.

    The momentum of a k x k kernel is a matrix (c_out, k² c_in) = U S Vᵀ, S singular values; the
    step keeps U Vᵀ, so that weak directions are learnt as fast as strong ones (K. Jordan et al.
    2024, kellerjordan.github.io/posts/muon).  It is scaled to the size of AdamW's steps, RMS 0.2
    (arXiv 2502.16982), and so shares their learning rate.
    """

    def __init__(self, parameters, **settings):
        super().__init__(parameters, **settings)
        self._step_supports_amp_scaling = False  # in fp16 the scaler skips overflows, for both

    @staticmethod
    def is_hidden(p):
        """Whether p is such a kernel: 16 channels or more in and out, as an image has not."""
        return p.dim() == 4 and min(p.shape[:2]) >= 16

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if self.is_hidden(p) and p.grad is not None:
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
                state["step"] += 1  # AdamW.load_state_dict expects it
                m = state["exp_avg"].lerp_(p.grad, 0.1)
                G = p.grad.lerp(m, 0.9).flatten(1)  # Nesterov's look ahead
                size = 0.2 * max(G.shape) ** 0.5
                p.sub_(self.param_groups[0]["lr"] * size * orthogonal(G).view_as(p))
                p.grad = None  # AdamW skips what has no gradient
        super().step()


def orthogonal(G):
    """About U Vᵀ of G = U S Vᵀ: (m, n) -> (m, n), zero for zero.

    A Newton-Schulz iteration maps every singular value by an odd polynomial, steep at 0: after
    three, those above 2% of the norm of G are between 0.68 and 1.21.
    """
    X = G / (G.norm() + 1e-12)
    for _ in range(3):
        A = X @ X.T
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X


def learning_rate(config, step):
    """Linear warm-up, then constant or falling linearly: 0 would be the step after the last."""
    fall = 1 - (step - 1) / config["steps"] if config["decay"] == "linear" else 1.0
    return config["lr"] * min(1.0, step / max(1, config["warmup"])) * fall


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- d ema + (1 − d) model, with d = min(decay, (1 + n)/(10 + n)) to forget the start."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def check_config(config):
    """Raises ValueError unless a config has every flag, of the right type."""
    more = dict(amp=("off", DEVICE_FLAGS["amp"][1], ""), data_rms=(1.0, float, ""))
    for flag, (default, kind, _) in (CONFIG_FLAGS | more).items():
        value = config[flag]
        if type(value) is not type(default) or isinstance(kind, list) and value not in kind:
            raise ValueError(f"config {flag} = {value!r}")
    if not all(isinstance(name, str) for name in config["names"]):
        raise ValueError(f"config names = {config['names']!r}")


def load_checkpoint(file, device="cpu"):
    """What train() saved, as a dict, and its velocity model with the EMA weights, on the device.

    weights_only: a hostile file cannot run code.  Raises ValueError for a damaged or other file.
    """
    if not Path(file).is_file():
        raise ValueError(f"there is no checkpoint {file}: train first, or name another")
    try:
        with open(file, "rb") as f, warnings.catch_warnings(record=True):
            if damaged := zipfile.ZipFile(f).testzip():  # torch.load does not check the sums
                raise ValueError(f"damaged at {damaged}")
            f.seek(0)
            checkpoint = torch.load(f, map_location="cpu", weights_only=True)
        step, scaler = checkpoint["step"], checkpoint["scaler"].values()
        if type(step) is not int or step < 1 or not all(math.isfinite(x) for x in scaler):
            raise ValueError("step or scaler")
        check_config(checkpoint["config"])
        with torch.device("meta"):  # no memory for a wrong shape, no time for random weights
            velocity = build_velocity(checkpoint["config"])
        for part in ("model", "ema"):
            velocity.load_state_dict(checkpoint[part], assign=True)
        state = dict(checkpoint["optimizer"]["state"])  # empty if fp16 has skipped every step
        checkpoint["optimizer"] = dict(state=state)  # settings are the code's, not the file's
        muon = checkpoint["config"]["optimizer"] == "muon"
        for i, p in enumerate(velocity.parameters()):
            shapes = dict(step=(), exp_avg=p.shape)
            shapes |= {} if muon and Muon.is_hidden(p) else dict(exp_avg_sq=p.shape)
            kept = [(p, p.shape)] + [(state[i][k], shapes[k]) for k in shapes if state]
            if not all(x.shape == shape and x.isfinite().all() for x, shape in kept):
                raise ValueError("weights not finite, or moments of another shape")
    except Exception as error:  # torch, and a foreign dict, raise a dozen kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise ValueError(f"{file} is not a whole checkpoint of this program ({reason})") from None
    velocity = velocity.float().to(device, memory_format=torch.channels_last)
    return checkpoint, velocity.eval().requires_grad_(False)


def autocast(device, amp):
    """Mixed precision: matrix work in amp ("bf16" or "fp16"), or everything in float32 ("off")."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "off")


def generate(velocity, config, noise, y=None, guidance=1.0, amp="off", **solver):
    """sample() for the velocity of a checkpoint, y: list of labels; images, and network calls."""
    path, y = config["path"], torch.tensor(y, device=noise.device) if y else None
    with autocast(noise.device, amp):
        x, nfe = sample(guided(velocity, y, guidance), noise, PATHS[path], T_END[path], **solver)
    return x, nfe * (1 if guidance == 1 else 2)


def start_ranks(device):
    """rank, world size and device; under torchrun each process drives one GPU (or CPU share)."""
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    parent = os.getppid()

    def watch():  # ranks outlive a torchrun that was killed, and would write beside a resumed run
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # others wait for a long decode
    return dist.get_rank(), dist.get_world_size(), device


def tidy(out, log, step):
    """Make a run's folder; remove what is half-written, logged after a step or, at step 0, old."""
    for kind in ("checkpoint.pt", "step-*.png", "log.jsonl"):
        for old in [*out.glob(f"tmp-*-{kind}"), *([] if step else out.glob(kind))]:
            old.unlink()
    lines = log.read_text().splitlines(True) if step and log.exists() else []
    kept = (x for x in lines if x.endswith("}\n") and json.loads(x)["step"] <= step)
    write_atomically(log, lambda temporary: temporary.write_text("".join(kept)))


def train(config, out, device, compiled=False, resume=None, stop=lambda: False):
    """Train by config (all of CONFIG_FLAGS, and amp), leaving checkpoint.pt, log.jsonl and grids.

    resume: a checkpoint dict to go on from, bit by bit on a CPU.  stop: asked after every step;
    once true, a checkpoint is written and the run ends.  Returns the last step.
    Raises FloatingPointError, and saves nothing, once a gradient is not finite (in fp16: at any
    loss scale); ValueError for data without classes, or changed since resume, and a batch that the
    ranks cannot share.
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
    kind = Muon if config["optimizer"] == "muon" else torch.optim.AdamW
    optimizer = kind(velocity.parameters(), weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    state = dict(model=velocity, ema=ema, optimizer=optimizer, scaler=scaler)
    start = resume["step"] if resume else 0
    for name, part in state.items():
        if resume and resume[name]:  # the scaler's is empty unless the run was in fp16
            part.load_state_dict(part.state_dict() | resume[name])
    model = velocity  # the bare module is what is saved and averaged: no "_orig_mod." in the names
    if world > 1:
        model = nn.parallel.DistributedDataParallel(velocity)
    if compiled:
        model = torch.compile(model)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        images, labels = images.to(device), labels.to(device)

    out, log = Path(out), Path(out, "log.jsonl")
    if rank == 0:
        tidy(out, log, start)
        millions = sum(p.numel() for p in ema.parameters()) / 1e6
        print(f"{config['data']}: {len(images):,} images of {tuple(images.shape[1:])}; path "
              f"{config['path']}; {millions:.2f}M parameters; {world} x {device}, amp {amp}, "
              f"compile {compiled}\n{steps:,} steps x batch {B} = {steps * B / len(images):,.1f} "
              f"epochs; EMA decay {config['ema']}; writing {out}/")
    begun, since, history = start, time.perf_counter(), []
    for step in range(start + 1, steps + 1):  # between log lines nothing waits for the device
        optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        x_1, y, x_0, t = draw_batch(images, labels, config, step, device, rank, world)
        with autocast(device, amp):
            v = functools.partial(model, y=y)
            loss = cfm_loss(v, PATHS[config["path"]], x_1, x_0, t, velocity.weight(t))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # before clipping
        norm = nn.utils.clip_grad_norm_(velocity.parameters(), config["clip"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        update_ema(ema, velocity, step, config["ema"])
        history.append(torch.stack([loss.detach().float(), norm]))

        stopping = stop()
        if world > 1:  # ranks must leave together: they agree, on GPUs at every tenth step only
            ask = step % 10 == 0 or device.type == "cpu"
            flag = torch.tensor(float(stopping), device=device) if ask else None
            stopping = ask and (dist.all_reduce(flag) or flag.item() > 0)
        saving = stopping or step % config["save_every"] == 0 or step == steps
        if not saving and step % config["log_every"]:
            continue
        losses, norms = torch.stack(history).T
        bad = (~norms.isfinite()).nonzero()
        if len(bad) and not scaler.get_scale() > 1:  # above 1, fp16's scaler skips an overflow
            raise FloatingPointError(f"the gradient of step {begun + 1 + bad[0].item()} is not "
                                     "finite; the last checkpoint is kept: try a lower --lr")
        loss = losses.mean() / world
        if world > 1:
            dist.all_reduce(loss)
        if rank == 0:
            rate = B * (step - begun) / (time.perf_counter() - since)
            memory = (f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
                      if device.type == "cuda" else "")
            print(f"step {progress(step, steps, since, begun)}  {rate:,.0f} images/s  "
                  f"loss {loss:.4f}{memory}", flush=True)
            append_line(log, dict(step=step, loss=loss.item(), images_per_second=rate))
        if rank == 0 and saving and not stopping:  # first: what is not finite stops here, unsaved
            noise = draw_noise(0, range(64), images.shape[1:]).to(device)
            parts = noise.split(4 * B // world)  # without gradients four times as many fit
            x = torch.cat([generate(ema, config, part)[0] for part in parts])  # of no class
            grid = picture_grid(to_uint8(x).cpu(), 8)
            write_atomically(out / f"step-{step:06d}.png", grid.save)
        if rank == 0 and saving:
            whole = {k: p.state_dict() for k, p in state.items()} | dict(step=step, config=config)
            write_atomically(out / "checkpoint.pt", functools.partial(torch.save, whole))
        if stopping:
            break
        begun, since, history = step, time.perf_counter(), []
    if dist.is_initialized():
        dist.barrier()  # destroyed in the middle of an all-reduce, gloo can wait for ever
        dist.destroy_process_group()
    return step


# §9  The theory, drawn: the exact marginal field of Eq. 8 in the plane, without a network -------


def toy_data(name):
    """Means (K, 2) and standard deviation τ of a mixture in the plane, about 2 in radius."""
    if name == "gaussians":  # eight, on a circle
        angles = torch.arange(8) * math.pi / 4
        return 2 * torch.stack([angles.cos(), angles.sin()], 1), 0.1
    side = torch.arange(16) * 0.25 - 1.875  # the black fields of a 4 x 4 board, 16 points each
    points = torch.cartesian_prod(side, side)
    return points[(points + 2).floor().sum(1) % 2 == 1], 0.1


def measure_paths(means, tau, particles=1000, seed=0):
    """How well few evaluations follow the exact field: path -> list of dicts, one per solve.

    landed: share of particles within 3τ of a mean; mse: per coordinate, against 1000 rk4 steps.
    """
    table, noise = {name: [] for name in PATHS}, draw_noise(seed, range(particles), (2,))
    for name, path in PATHS.items():
        v = functools.partial(marginal_velocity, path, means=means, tau=tau)
        exact, _ = sample(v, noise, path, T_END[name], solver="rk4", steps=1000)
        for solver, stages in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
            for steps in (n // stages for n in (8, 12, 20, 40, 60, 100)):
                x, nfe = sample(v, noise, path, T_END[name], solver=solver, steps=steps)
                landed = (torch.cdist(x, means).amin(1) < 3 * tau).float().mean().item()
                mse = (x - exact).square().mean().item()
                table[name].append(dict(solver=solver, nfe=nfe, landed=landed, mse=mse))
    return table


def evaluations_ratio(table):
    """Evaluations that ot needs over those of vp at equal error: geometric mean, log-log."""
    ot, vp = (np.log([(r["mse"], r["nfe"]) for r in table[name] if r["solver"] == "euler"])[::-1]
              for name in ("ot", "vp"))  # backwards: np.interp wants a rising error
    vp = vp[(vp[:, 0] >= ot[0, 0]) & (vp[:, 0] <= ot[-1, 0])]  # no extrapolation
    return np.exp(np.mean(np.interp(vp[:, 0], *ot.T) - vp[:, 1]))


def draw_paths(means, tau, seed=0):
    """A picture.  Rows: paths.  Columns: p_t with particles on the field; lines to one x_1."""
    noise, flip = draw_noise(seed, range(400), (2,)), torch.tensor([1, -1])  # y grows upwards
    font, boards = ImageFont.load_default(34), []  # drawn at twice the size, then averaged down
    for name, path in PATHS.items():
        v = functools.partial(marginal_velocity, path, means=means, tau=tau)
        x, _ = sample(v, noise, path, T_END[name], solver="rk4", steps=100, keep=True)
        t = torch.linspace(0, T_END[name], 101)
        alpha, sigma = (c[:, None, None] for c in path(t)[:2])
        lines = alpha * means[1] + sigma * noise[:16]  # ψ_t(x_0) for one x_1
        panels = [(f"t = {i / 100:g}", i, x[: i + 1, :24], x[i]) for i in (0, 25, 50, 75, 100)]
        panels.append(("lines to one x_1", 0, lines, lines[::10].flatten(0, 1)))  # spacing: speed
        for title, i, ways, dots in panels:
            half = max(3.0, 2 * alpha[i].item() + 3 * sigma[i].item())  # axes from −half to half
            axis = torch.linspace(-half, half, 150)
            grid = torch.stack(torch.meshgrid(axis, -axis, indexing="xy"), -1).reshape(-1, 1, 2)
            variance = (alpha[i] * tau) ** 2 + sigma[i] ** 2
            p = (-(grid - alpha[i] * means).square().sum(2) / (2 * variance)).exp().sum(1)
            shade = 255 - (p / p.max()).sqrt().reshape(150, 150, 1) * torch.tensor([165, 105, 35])
            board = Image.fromarray(shade.byte().numpy()).resize((600, 600), Image.BILINEAR)
            draw, zoom = ImageDraw.Draw(board), 300 / half
            for way in ((ways * flip + half) * zoom).transpose(0, 1):
                draw.line(way.flatten().tolist(), "#d35400", 2)
            for dot in ((dots * flip + half) * zoom).tolist():
                draw.circle(dot, 3, "#202020")
            draw.text((12, 8), f"{name}, {title}", "black", font)
            draw.text((588, 8), f"axes ±{half:.3g}", "grey", font, "ra")
            boards.append(pil_to_tensor(board.reduce(2)))
    return picture_grid(torch.stack(boards), 6)


# §10  Command line ------------------------------------------------------------------------------


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
    """An argparse type: "1,2,2" as [1, 2, 2]."""
    return [COUNT(part) for part in text.split(",")]


def counts_or_none(text):
    """An argparse type: counts, or "none" as []."""
    return [] if text == "none" else counts(text)


COUNT, WHOLE, POSITIVE = number(int, 1), number(int, 0), number(float, 1e-12)
FRACTION = number(float, 0, 1)
OUT_FLAGS = {  # flag: (default, type or choices, help)
    "out": (None, str, "default: runs/DATA-PATH, samples.png beside the checkpoint, or paths.png"),
    "overwrite": (False, bool, "replace what --out names"),
}
DEVICE = {"device": (None, ["cuda", "mps", "cpu"], "default: the fastest here")}
DEVICE_FLAGS = DEVICE | {
    "amp": (None, ["bf16", "fp16", "off"], "mixed precision; default: CUDA's native one of these; "
            "off elsewhere, and with dopri5, which would count the rounding as its error"),
}
CONFIG_FLAGS = {  # a run is a function of these and --amp; they are kept in its checkpoint
    "data": ("digits", str, f"digits, {', '.join(TORCHVISION)}, or a folder of images"),
    "path": ("ot", list(PATHS), "probability path"),
    "classes": (False, bool, "learn to make images of a given class"),
    "coupling": ("independent", ["independent", "ot"], "of noise; ot: minibatch optimal transport"),
    "time": ("logit-normal", ["logit-normal", "uniform"], "density of t; the paper's: uniform"),
    "data_dir": ("data", str, "where downloads and decoded folders are kept"),
    "size": (16, COUNT, "height and width of the images, pixels"),
    "width": (32, COUNT, "channels at full resolution, a multiple of 4"),
    "mults": ([1, 2, 2], counts, "multiples of the width, one per level"),
    "blocks": (1, COUNT, "residual blocks per level"),
    "attention": ([], counts_or_none, "heights of maps at which to attend, as 16,8; or none"),
    "patch": (1, COUNT, "fold PATCH x PATCH pixels into channels: faster"),
    "dropout": (0.0, FRACTION, "share of activations dropped in residual blocks"),
    "label_drop": (0.1, FRACTION, "share of samples trained without their label, for guidance"),
    "batch": (32, COUNT, "images per step, over all ranks"),
    "optimizer": ("muon", ["muon", "adamw"], "muon: AdamW, but orthogonal steps of hidden kernels"),
    "lr": (5e-3, POSITIVE, "peak learning rate"),
    "warmup": (50, WHOLE, "steps of linear warm-up"),
    "decay": ("linear", ["linear", "none"], "fall of the learning rate to 0"),
    "steps": (1000, COUNT, "training steps"),
    "ema": (0.995, FRACTION, "decay per step of the averaged weights"),
    "flip": (False, bool, "mirror images at random"),
    "clip": (1.0, POSITIVE, "largest norm of the gradient"),
    "seed": (0, WHOLE, "of everything random"),
    "log_every": (50, COUNT, "steps between log lines"),
    "save_every": (500, COUNT, "steps between checkpoints, each with a grid of samples"),
}
TRAIN_FLAGS = CONFIG_FLAGS | DEVICE_FLAGS | OUT_FLAGS | {
    "compile": (None, bool, "torch.compile; default: on CUDA, where it can"),
    "resume": (False, bool, "go on with the run in --out; default: the newest in runs/"),
}
MODEL_FLAGS = {
    "ckpt": (None, str, "checkpoint file; default: the newest runs/*/checkpoint.pt"),
    "solver": ("midpoint", list(SOLVERS), "of 1, 2 and 4 network calls a step; dopri5 adapts"),
    "steps": (20, COUNT, "steps of the solver"),
    "tolerance": (1e-5, number(float, 1e-12, 1), "of dopri5, relative and absolute"),
    "seed": (0, WHOLE, "of everything random"),
    "batch": (None, COUNT, "images at a time; default: by size"),
}
SAMPLE_FLAGS = MODEL_FLAGS | DEVICE_FLAGS | OUT_FLAGS | {
    "n": (None, COUNT, "number of images; default: 64, or 8 of each class"),
    "label": (None, str, "class to make, name or number; default: one row of each class"),
    "guidance": (1.0, number(float, 0), "scale of classifier-free guidance, 1 for none"),
    "trajectory": (False, bool, "show the way from noise to image, left to right, in a .png"),
    "interpolate": (None, number(int, 2), "images per row, from noise to noise; default: none"),
}
REFERENCE_FLAGS = {
    "reference": (None, str, "train or test (a split of the checkpoint's data), another data set, "
                  "or a folder; default: train for fid, for nll test where there is one"),
    "data_dir": (None, str, "where downloads and caches are kept; default: as in training"),
    "results": (None, str, "JSON lines; default: results.jsonl beside the checkpoint, or here"),
}
FID_FLAGS = MODEL_FLAGS | DEVICE_FLAGS | REFERENCE_FLAGS | {
    "n": (50_000, number(int, 2), "number of images to make; papers use 50000"),
    "steps": ([20], counts, "steps of the solver; several, as in 5,10,20, give a curve"),
    "guidance": (1.0, number(float, 0), "scale of classifier-free guidance, 1 for none"),
    "images": (None, str, "judge a folder of equal squares; needs --reference; default: none"),
    "features": ("inception", ["inception", "pixels"], "of the distance; FID is inception's"),
    "inception": (None, str, "file of the Inception weights; default: downloaded"),
}
NLL_FLAGS = MODEL_FLAGS | DEVICE | REFERENCE_FLAGS | {
    "n": (128, number(int, 2), "number of images, chosen at random"),
    "k": (1, COUNT, "draws of dequantisation noise per image, for a tighter bound; the paper: 50"),
    "exact": (False, bool, "exact divergence, a gradient per number of an image; not Hutchinson's"),
    "solver": ("dopri5", *MODEL_FLAGS["solver"][1:]),
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


def pick_amp(device):
    """bf16 where the GPU has it, else fp16; float32 on a CPU, where bf16 is mostly slower."""
    if device.type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def newest_checkpoint():
    """Without any, the pattern itself: load_checkpoint says that it is not there."""
    files = Path("runs").glob("*/checkpoint.pt")
    return max(files, key=lambda f: f.stat().st_mtime, default=Path("runs/*/checkpoint.pt"))


def open_checkpoint(args, given):
    """The config, step and EMA velocity of --ckpt, and --device; fills in paths left open."""
    if args.solver == "dopri5" and "steps" in given and "reference" in args:  # sample: for films
        raise ValueError("dopri5 chooses its own steps: leave out --steps, or take --solver rk4")
    device = pick_device(args.device)
    file = Path(args.ckpt or newest_checkpoint())
    checkpoint, velocity = load_checkpoint(file, device)
    config, step = checkpoint["config"], checkpoint["step"]
    if not config["names"] and given.keys() & {"label", "guidance"}:
        raise ValueError("--label and --guidance need a model trained with --classes")
    if config["names"] and not config["label_drop"] and getattr(args, "guidance", None) != 1:
        raise ValueError("this model, trained with --label-drop 0, has no velocity without a class")
    print(f"{file}: step {step:,}, path {config['path']}, EMA weights (decay {config['ema']})")
    numbers = 2**20 if device.type == "cpu" else 2**25  # in a feature map: 4 MiB (cache), 128 MiB
    vars(args).update(dict(
        ckpt=str(file), data_dir=config["data_dir"], device=device.type,
        amp="off" if args.solver == "dopri5" else pick_amp(device),
        batch=max(1, min(512, numbers // (config["width"] * config["size"] ** 2))),
        results=str(file.with_name("results.jsonl"))) | given)
    return config, step, velocity, device


def append_line(file, row):
    """Add a row to a file of JSON lines."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as f:
        f.write(json.dumps(row) + "\n")


def check_free(out, args):
    """Raises ValueError if out, unless None, is a file or a filled folder, and no --overwrite."""
    out = Path(out) if out and not args.overwrite else None
    if out and (out.is_file() or out.is_dir() and any(out.iterdir())):
        ways = "go on with --resume, replace" if "resume" in args else "replace"
        raise ValueError(f"{out} already exists: {ways} it with --overwrite, or name another --out")


def run_train(args, given):
    """Learn to make images from noise.

    examples:
      flow_matching.py train --path ot
      flow_matching.py train --data photos/ --size 64 --out runs/photos
      flow_matching.py train --resume
    """
    device = pick_device(args.device)
    given = {k: v for k, v in given.items() if k in CONFIG_FLAGS or k == "amp"}
    config = {k: v[0] for k, v in CONFIG_FLAGS.items()} | dict(amp=pick_amp(device))
    config |= RECIPES.get(args.data, RECIPES["folder"]) | given
    out, resume = Path(args.out or f"runs/{Path(args.data).resolve().name}-{args.path}"), None
    if args.resume:
        if not (args.out or given.keys() & {"data", "path"}):
            out = newest_checkpoint().parent
        resume, _ = load_checkpoint(out / "checkpoint.pt")
        config = resume["config"] | given
        if resume["step"] >= config["steps"]:
            raise ValueError(f"{out} has done its {config['steps']} steps: go on with more --steps")
        for k in given.keys() - {"steps", "data_dir", "amp", "log_every", "save_every"}:
            if given[k] != resume["config"][k]:
                raise ValueError(f"{out} was begun with --{k.replace('_', '-')} "
                                 f"{resume['config'][k]}, which --resume cannot change")
    else:
        check_free(out, args)
    with torch.device("meta"):  # refuses a bad shape before any work
        build_velocity(dict(channels=1, data_rms=1.0, names=[]) | config)

    caught = []  # the first signal asks for a checkpoint, a second one stops at once

    def note(n, _):
        caught.append(n)
        signal.signal(n, signal.SIG_DFL)
        os.write(2, b"stopping after this step; once more stops at once\n")  # print could be busy

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    compiled = able and bool(find_spec("triton")) if args.compile is None else args.compile
    step = train(config, out, device, compiled, resume, stop=lambda: bool(caught))
    if step < config["steps"]:
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
    config, _, velocity, device = open_checkpoint(args, given)
    names, amp = config["names"], args.amp
    out = Path(args.out or Path(args.ckpt).with_name("samples.png"))
    kind = out.suffix.lower()
    check_free(args.out, args)
    if kind not in ("", ".png", ".gif") or kind != ".png" and args.trajectory:
        raise ValueError("--out is NAME.png (--trajectory needs it), NAME.gif or a directory")
    known = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    if args.label is not None and args.label not in known:
        raise ValueError(f"--label {args.label}: this model knows {', '.join(names)}")

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

    parts, nfe_sum, since = [], 0, time.perf_counter()
    if not kind:
        for old in out.glob("[0-9]" * 6 + ".png"):  # --overwrite: no mixture of two runs
            old.unlink()
        out.mkdir(parents=True, exist_ok=True)
    for numbers in in_batches(n, args.batch):
        y = [known[args.label] if args.label else i // columns % rows for i in numbers if names]
        x_0 = torch.stack([noise(i) for i in numbers]).to(device)
        x, nfe = generate(velocity, config, x_0, y, args.guidance, amp, **solver)
        nfe_sum += nfe * len(numbers)
        if film:  # the noise of ve, to 150, is scaled down to be seen
            times = torch.linspace(0, T_END[config["path"]], len(x), device=device)
            x = x / PATHS[config["path"]](times)[1].clamp(min=1).reshape(-1, 1, 1, 1, 1)
        frames = to_uint8(x if film else x[None]).cpu()  # (F, b, C, H, W): the last is the images
        if kind:
            parts.append(frames)
        else:
            for j, image in zip(numbers, frames[-1]):
                to_pil_image(image).save(out / f"{j:06d}.png")
    if kind:
        frames = torch.cat(parts, 1)
        if args.trajectory:  # a row for each image, time from left to right
            at = torch.linspace(0, args.steps, min(args.steps, 10) + 1).round().long()
            frames, columns = frames[at].transpose(0, 1).flatten(0, 1)[None], len(at)
        grids = [picture_grid(f, columns) for f in frames]
        more = {} if kind == ".png" else dict(
            save_all=True, append_images=grids[1:] + grids[-1:] * 20, duration=60, loop=0)
        write_atomically(out, lambda temporary: grids[0].save(temporary, **more))
    print(f"{out}: {n:,} images, {args.solver}, NFE {nfe_sum / n:g}, amp {amp}, "
          f"{time.perf_counter() - since:.1f} s")


def load_reference(args, config, default):
    """The images that --reference names, at the size of the model's, and what to call them."""
    what = args.reference or default
    data = config["data"] if what in ("train", "test") else what
    images, _, _ = load_data(data, args.data_dir, config["size"], what == "test")
    return images, data if data == what else f"{data}, {what} split"


def fit_reference(images, features, name, batch, data_dir):
    """fit_gaussian of a reference set, kept in data_dir under all that decides it."""
    key = hashlib.sha256(repr(images.shape).encode())
    key.update(images.flatten().numpy())
    cache = Path(data_dir) / f"{name}-{key.hexdigest()[:16]}.npy"
    if not cache.exists():
        parts = in_batches(len(images), batch, "reference ")
        mean, cov = fit_gaussian((images[part] for part in parts), features)
        write_atomically(cache, lambda temporary: np.save(temporary, np.vstack([mean, cov])))
    table = np.load(cache)
    return table[0], table[1:]


def open_images(args, given):
    """What fid judges: made(steps, nfes), its uint8 batches; config, training step, device."""
    others = sorted(given.keys() & (MODEL_FLAGS.keys() - {"batch"} | {"n", "guidance", "amp"}))
    if args.images and (others or args.reference in (None, "", "train", "test")):
        raise ValueError("--images needs --reference, a data set or a folder" +
                         "".join(f", and no --{other}" for other in others))
    if args.images:
        device, args.data_dir = pick_device(args.device), args.data_dir or "data"
        images, _, _ = load_folder(args.images, args.data_dir, None)
        args.n, args.steps, args.results = len(images), [None], args.results or "results.jsonl"
        args.batch = args.batch or 100
        made = lambda steps, nfes: (images[part] for part in in_batches(args.n, args.batch))
        return made, dict(channels=images.shape[1], size=images.shape[2]), None, device

    config, step, velocity, device = open_checkpoint(args, given)
    shape, names = (config["channels"], config["size"], config["size"]), config["names"]

    def made(steps, nfes):
        for part in in_batches(args.n, args.batch):
            noise = draw_noise(args.seed, part, shape).to(device)
            y = [i % len(names) for i in part if names]
            x, nfe = generate(velocity, config, noise, y, args.guidance, args.amp,
                              solver=args.solver, steps=steps, tolerance=args.tolerance)
            nfes.append(nfe * len(part))
            yield to_uint8(x)

    return made, config, step, device


def run_fid(args, given):
    """Fréchet distance between made images (a checkpoint's, or --images) and real ones.

    A model trained with --classes makes as many images of each.

    examples:
      flow_matching.py fid
      flow_matching.py fid --n 2000 --features pixels
      flow_matching.py fid --solver euler --steps 5,10,20,50 --reference test
      flow_matching.py fid --images made/ --reference photos/
    """
    if args.inception and args.features == "pixels":
        raise ValueError("--features pixels needs no --inception")
    made, config, step, device = open_images(args, given)
    features = pixels if args.features == "pixels" else inception(args.inception, device)
    reference, args.reference = load_reference(args, config, "train")
    C = config["channels"]
    if features is pixels and reference.shape[1] != C:
        raise ValueError(f"{args.reference} has {reference.shape[1]} channels, the images have {C}")
    if features is pixels and C * config["size"] ** 2 > 4096:
        raise ValueError("--features pixels is for images up to 64 x 64 grey or 32 x 32 RGB")
    gaussian = fit_reference(reference, features, args.features, args.batch, args.data_dir)

    title = dict(inception="FID", pixels="Fréchet distance of pixels")[args.features]
    n, D = min(args.n, len(reference)), len(gaussian[0])
    remarks = ["under 50,000 images: not comparable with papers"] if args.n < 50_000 else []
    remarks += [f"{n:,} images for {D:,} features: a covariance is singular"] if n <= D else []
    for steps in args.steps if args.solver != "dopri5" else [1]:
        nfes, since = [], time.perf_counter()
        distance = frechet_distance(*fit_gaussian(made(steps, nfes), features), *gaussian)
        seconds, nfe = time.perf_counter() - since, sum(nfes) / args.n
        how = "" if args.images else f" by {args.solver}, NFE {nfe:g}"
        print(f"{title} {distance:.4f}: {args.n:,} images{how}, against {len(reference):,} of "
              f"{args.reference}, {seconds:.1f} s", *remarks, sep="\n  ")
        append_line(args.results, dict(frechet_distance=distance) | vars(args) | dict(
            steps=steps, nfe=nfe, n_reference=len(reference), step=step, seconds=seconds))
    print(f"appended to {args.results}")


def run_nll(args, given):
    """Bits per dimension of images: -log2 p(image) / numbers in an image, by the checkpoint.

    A model trained with --classes is asked for its density without a class.

    examples:
      flow_matching.py nll
      flow_matching.py nll --n 1000 --k 50 --reference train
    """
    config, step, velocity, device = open_checkpoint(args, given)
    named = config["data"] == "digits" or config["data"] in TORCHVISION
    images, args.reference = load_reference(args, config, "test" if named else "train")
    if images.shape[1] != config["channels"] or len(images) < 2:
        raise ValueError(f"{args.reference}: {len(images)} images of {images.shape[1]} channels, "
                         f"where at least two of {config['channels']} are needed")
    n, K, shape = min(args.n, len(images)), args.k, images.shape[1:]

    seeded = functools.partial(generator, args.seed)
    chosen = torch.randperm(len(images), generator=seeded(0, 0, 2))[:n]
    parts, nfe_sum, since = [], 0, time.perf_counter()
    for part in in_batches(n * K, given.get("batch", max(1, args.batch // 4))):
        u = torch.stack([torch.rand(shape, generator=seeded(*divmod(j, K))) for j in part])
        # the same signs for all K: their errors would otherwise bias the mean over draws upwards
        coins = torch.stack([torch.randint(2, shape, generator=seeded(j // K, 0, 1)) for j in part])
        x = (images[chosen[torch.tensor(part) // K]] + u) / 128 - 1
        log_p, nfe = log_likelihood(
            velocity, x.to(device), PATHS[config["path"]], T_END[config["path"]],
            None if args.exact else [2.0 * coins.to(device) - 1],
            solver=args.solver, steps=args.steps, tolerance=args.tolerance)
        parts.append(log_p.cpu().double())
        nfe_sum += nfe * len(part)
    bits = bits_per_dim(torch.cat(parts).reshape(n, K), math.prod(shape))
    mean, error = bits.mean().item(), bits.std().item() / n**0.5
    nfe, seconds = nfe_sum / (n * K), time.perf_counter() - since
    divergence = "exact" if args.exact else "Hutchinson's"
    print(f"{mean:.4f} ± {error:.4f} bits/dim: {n:,} images of {args.reference}, K = {K}, "
          f"{divergence} divergence, {args.solver}, NFE {nfe:g}, {seconds:.1f} s")
    append_line(args.results, dict(bits_per_dim=mean, standard_error=error) | vars(args) | dict(
        n=n, nfe=nfe, step=step, seconds=seconds, amp="off"))
    print(f"appended to {args.results}")


def run_paths(args, given):
    """Draw the theory: the exact field of Eq. 8, as a picture and a table, without a network.

    examples:
      flow_matching.py paths
      flow_matching.py paths --data checkerboard --out board.png
    """
    out = Path(args.out or "paths.png")
    check_free(args.out, args)
    if out.suffix.lower() != ".png":
        raise ValueError("--out is NAME.png")
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
            "fid": (run_fid, FID_FLAGS), "nll": (run_nll, NLL_FLAGS),
            "paths": (run_paths, PATHS_FLAGS)}


def main(argv=None):
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
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.error(f"unrecognized arguments: {' '.join(unknown)}")
    given = {k: v for k, v in vars(args).items() if k in args.flags and v is not None}
    defaults = {k: v[0] for k, v in args.flags.items()}
    torch.backends.cudnn.allow_tf32 = False  # float32 to its last digit; speed is bf16's
    try:
        args.run(argparse.Namespace(**defaults | given), given)
    except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        short = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if short or "allocate memory" in str(error):  # torch's on a CPU is a RuntimeError
            error = "out of memory: lower --batch, --size or --width"
        args.error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
