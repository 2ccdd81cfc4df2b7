# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "scipy>=1.11"]
# ///
"""Flow Matching for Generative Modeling (Lipman et al., arXiv 2210.02747) in one file.

A probability path x_t = α(t) x_1 + σ(t) x_0 leads from noise at t = 0 to an image x_1 at t = 1.
Along it every pair (x_0, x_1) moves with the velocity u = α'(t) x_1 + σ'(t) x_0.  A network
v(x, t) learns u by plain regression at random (x_t, t): Eq. 14.  The loss is least at the mean
velocity of all pairs that meet at x (Eq. 8), and following that mean moves the noise distribution
onto the data (Theorem 1).  So new images are where the solutions of dx/dt = v(x, t) end.

    python flow_matching.py train --path ot
    python flow_matching.py sample --steps 20

§1-§4 are the paper.  Each of §1-§7 runs alone, pasted with what its title names.
B, C, H, W are batch, channels, height and width; networks see images in [-1, 1], files are uint8.
"""

import argparse
import contextlib
import copy
import functools
import glob
import hashlib
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from scipy.integrate import solve_ivp
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

# §1  Probability paths  (paper: Sections 3 and 4; needs math, torch) ----------------------------
# A path takes times t: (B,) in [0, 1] and returns α, σ, α', σ', each (B,).  It means
#     p_t(x | x_1) = N(x; α x_1, σ² I),        x_t = ψ_t(x_0) = α x_1 + σ x_0 with x_0 ~ N(0, I).


def ot_path(t, sigma_min=1e-4):
    """Optimal transport, Eq. 20: α = t, σ = 1 − (1 − σ_min) t, straight at constant speed.

    The paper names no σ_min; this one is far below a grey level, 2/255.
    """
    sigma = (1 - t) + sigma_min * t  # written so, no digit cancels as t → 1
    return t, sigma, torch.ones_like(t), torch.full_like(t, sigma_min - 1)


def vp_path(t, beta_min=0.1, beta_max=20.0):
    """Variance-preserving diffusion, Eq. 18: α = exp(−½ T), σ² = 1 − α², T = ∫ β over 0..1 − t."""
    s = (1 - t).clamp(min=1e-5)  # σ' → −∞ as s → 0
    T = beta_min * s + 0.5 * (beta_max - beta_min) * s**2
    beta = beta_min + (beta_max - beta_min) * s
    alpha = torch.exp(-0.5 * T)
    sigma = torch.sqrt(-torch.expm1(-T))  # 1 − exp(−T) would lose every digit as s → 0
    d_alpha = 0.5 * beta * alpha
    return alpha, sigma, d_alpha, -alpha * d_alpha / sigma  # from αα' + σσ' = 0


def ve_path(t, sigma_min=0.01, sigma_max=50.0):
    """Variance-exploding diffusion, Eq. 16: α = 1; here σ goes from σ_max, not 1, to σ_min."""
    log_ratio = math.log(sigma_max / sigma_min)
    sigma = sigma_min * torch.exp(log_ratio * (1 - t))
    return torch.ones_like(t), sigma, torch.zeros_like(t), -log_ratio * sigma


PATHS = {"ot": ot_path, "vp": vp_path, "ve": ve_path}


def expand(c, x):
    """A number for each sample, c: (B,), shaped (B, 1, ...) so that it multiplies x: (B, ...)."""
    if getattr(c, "shape", None) != x.shape[:1]:
        raise ValueError(f"times, weights and what a path returns must be ({len(x)},), not {c}")
    return c.reshape(len(x), *[1] * (x.dim() - 1))


def conditional_velocity(path, x, x_1, t):
    """Theorem 3, Eq. 15: u_t(x | x_1) = (σ'/σ) (x − α x_1) + α' x_1; Eqs. 17, 19, 21 are this."""
    alpha, sigma, d_alpha, d_sigma = (expand(c, x) for c in path(t))
    return d_sigma / sigma * (x - alpha * x_1) + d_alpha * x_1


def marginal_velocity(path, x, t, means, tau=0.0):
    """The exact marginal field, Eq. 8, where the data is K equal Gaussians N(m_k, τ² I).

    x: (B, D), t: (B,), means: (K, D).  At t component k is N(α m_k, s² I), s² = α²τ² + σ², and
    moves by Theorem 3 with s for σ; the field is the mean of these, weighted by p(k | x, t).
    """
    alpha, sigma, d_alpha, d_sigma = (c[:, None, None] for c in path(t))
    offset = x[:, None] - alpha * means  # (B, K, D)
    variance = (alpha * tau) ** 2 + sigma**2
    growth = (alpha * d_alpha * tau**2 + sigma * d_sigma) / variance  # s'/s
    posterior = (-offset.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)  # (B, K, 1)
    return (posterior * (growth * offset + d_alpha * means)).sum(1)


# §2  Loss  (paper: Theorem 2; needs §1, torch) --------------------------------------------------


def cfm_loss(v, path, x_1, x_0=None, t=None, weight=None):
    """Conditional flow matching, Eq. 14: mean ‖v(x_t, t) − dψ_t(x_0)/dt‖² per element.

    v: callable (x, t) -> velocity, x_1: (B, ...) data; x_0 ~ N(0, I) and t ~ U[0, 1] are drawn
    unless given; weight: (B,), none in the paper.  By Eq. 13 the target is α' x_1 + σ' x_0,
    without the σ'/σ of Eq. 15.  Raises ValueError for a velocity of another shape than x_1.
    """
    x_0 = torch.randn_like(x_1) if x_0 is None else x_0
    if t is None:  # at least float32: cast to bf16, a time would be exactly 1 once in 500
        dtype = torch.promote_types(x_1.dtype, torch.float32)
        t = torch.rand(len(x_1), dtype=dtype, device=x_1.device)
    alpha, sigma, d_alpha, d_sigma = (expand(c, x_1) for c in path(t))
    u = d_alpha * x_1 + d_sigma * x_0
    velocity = v((alpha * x_1 + sigma * x_0).to(x_1.dtype), t)
    if not velocity.shape == x_0.shape == x_1.shape or len(x_1) == 0:  # would be broadcast, or NaN
        raise ValueError(f"velocity {tuple(velocity.shape)}, x_0 {tuple(x_0.shape)}, x_1 "
                         f"{tuple(x_1.shape)}: must be of one shape, B > 0")
    error = (velocity - u).square().reshape(len(u), -1).mean(1)
    return (error if weight is None else expand(weight, error) * error).mean()


# §3  ODE solvers: dx/dt = f(x, t)  (needs np, torch, solve_ivp) ---------------------------------
# A step, and dopri5 (a whole solve), take f(x, t) with a number t; odeint's v takes t: (B,).


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


def dopri5(f, x, t_0, t_1, tolerance):
    """Adaptive Dormand-Prince of order 5, scipy's RK45: one step size for the whole batch."""
    if t_0 == t_1:  # where scipy fails
        return x

    def f_flat(t, flat):  # as scipy wants it: one float64 vector
        u = f(torch.from_numpy(flat).to(x.dtype).to(x.device).reshape(x.shape), t)
        if u.requires_grad or (x.requires_grad and torch.is_grad_enabled()):
            raise ValueError("no gradient passes dopri5: take rk4, or torch.no_grad()")
        u = u.flatten().cpu().double().numpy()
        if not np.isfinite(u).all():  # scipy would loop for ever
            raise FloatingPointError(f"the velocity is not finite at t = {t:.6g}")
        return u

    start = x.detach().flatten().cpu().double().numpy()
    result = solve_ivp(f_flat, (t_0, t_1), start, method="RK45", t_eval=[t_1],
                       rtol=tolerance, atol=tolerance)
    if not result.success:
        raise FloatingPointError(f"dopri5 failed: {result.message}")
    return torch.from_numpy(result.y[:, -1]).to(x.dtype).to(x.device).reshape(x.shape)


SOLVERS = {"euler": euler, "midpoint": midpoint, "rk4": rk4, "dopri5": dopri5}


def odeint(v, x, t_0=0.0, t_1=1.0, solver="midpoint", steps=20, tolerance=1e-5):
    """Solve dx/dt = v(x, t) from t_0 to t_1, forward or backward in time.

    v: callable (x, t) -> velocity with t: (B,); x: (B, ...).  euler, midpoint and rk4 take `steps`
    equal steps; dopri5 takes its own, by a relative and absolute tolerance, and refuses gradients.
    Returns x at t_1 and the number of evaluations of v (NFE).  Raises ValueError for a velocity of
    another shape or kind than x, FloatingPointError for a solution that fails or is not finite.
    """
    nfe = 0

    def f(x, t):
        nonlocal nfe
        nfe += 1
        dtype = torch.promote_types(x.dtype, torch.float32)
        u = v(x, torch.full((len(x),), t, dtype=dtype, device=x.device))
        if u.shape != x.shape or not (u.is_floating_point() and x.is_floating_point()):
            raise ValueError(f"velocity {tuple(u.shape)}, {u.dtype} of x {tuple(x.shape)}, "
                             f"{x.dtype}: both must be real floats of one shape")
        return u.to(x.dtype)

    if solver == "dopri5":
        x = dopri5(f, x, t_0, t_1, tolerance)
    else:
        h = (t_1 - t_0) / steps
        for i in range(steps):
            x = SOLVERS[solver](f, x, t_0 + i * h, h)
    if not x.isfinite().all():
        raise FloatingPointError("the solution is not finite")
    return x, nfe


# §4  Sampling and likelihood  (paper: Section 2, Appendix C; needs §1, §3, math, torch, F) ------


@torch.no_grad()
def sample(v, noise, path=ot_path, **solver):
    """Noise (B, ...) from N(0, I) to data: x_1, NFE; solver: odeint's solver, steps, tolerance."""
    sigma_0 = path(noise.new_zeros(1))[1]  # p_0 = N(0, σ(0)² I): nearly exact for vp and ve
    return odeint(v, sigma_0 * noise, 0.0, 1.0, **solver)


@torch.no_grad()
def invert(v, x_1, path=ot_path, **solver):
    """Data to noise, the inverse of sample: the noise that becomes x_1: (B, ...), and the NFE."""
    x, nfe = odeint(v, x_1, 1.0, 0.0, **solver)
    return x / path(x.new_zeros(1))[1], nfe


@torch.inference_mode(False)  # inside inference mode no gradient could be taken
@torch.no_grad()
def log_likelihood(v, x_1, path=ot_path, probes=None, **solver):
    """log p_1(x_1) in nats, (B,), and the NFE: the change of variables along the flow.

    d log p_t(x_t)/dt = −div v(x_t, t), solved backward in time from the data x_1: (B, ...).
    div v is the sum of Eᵀ (∂v/∂x) E over the probes, tensors E: (B, ...).  A single probe of random
    signs is Hutchinson's unbiased estimate (of n, divide each one by √n); None: all D unit vectors,
    exact, D gradients an evaluation.  v must depend on x and not mix samples.
    """
    B, D = len(x_1), math.prod(x_1.shape[1:])
    if probes is None:
        units = torch.eye(D, dtype=x_1.dtype, device=x_1.device)
        probes = units.reshape(D, 1, *x_1.shape[1:]).expand(D, *x_1.shape)

    def augmented(state, t):  # x and ∫ div v dt as one state, (B, D + 1)
        x, div = state[:, :D].reshape(x_1.shape).requires_grad_(), 0
        with torch.enable_grad():
            u = v(x, t)
        for i, E in enumerate(probes, 1):
            E_J, = torch.autograd.grad(u, x, E, retain_graph=i < len(probes))  # Eᵀ (∂v/∂x)
            div = div + (E_J * E).reshape(B, D).sum(1, keepdim=True)
        return torch.cat([u.detach().reshape(B, D), div], 1)

    state, nfe = odeint(augmented, F.pad(x_1.reshape(B, D), (0, 1)), 1.0, 0.0, **solver)
    variance = path(state.new_zeros(1))[1] ** 2
    log_p_0 = -0.5 * (state[:, :D].square() / variance + (2 * math.pi * variance).log()).sum(1)
    return log_p_0 + state[:, D], nfe  # solved from 1 to 0: state[:, D] is −∫ div v dt over 0..1


def bits_per_dim(log_p, D):
    """−log2 P(image) / D of images of 256 levels: (B,).

    log_p: (B, K), nats, log p_1 of K draws of x = (l + u)/128 − 1 for levels l and u ~ U[0, 1).
    In training level l is l/127.5 − 1: in bin l, but 255 on its upper edge.  A bin is 1/128
    wide: 7 = log2 128 bits.  The mean result is an upper bound that K tightens.
    """
    return 7 - (log_p.logsumexp(1) - math.log(log_p.shape[1])) / (D * math.log(2))


# The paper ends here, the engineering begins. ===================================================
# §5  Coupling, guidance, noise, for any v  (needs math, np, torch, linear_sum_assignment) -------


def ot_coupling(x_0, x_1, y=None):
    """Minibatch optimal transport (Tong et al., arXiv 2302.00482; Pooladian et al., 2304.14772).

    x_0, x_1: (B, ...).  Returns x_0 in the order in which the sum of ‖x_0 − x_1‖² is least.
    y: (B,) labels: noise then changes places only within a class: p(x_0 | y) stays N(0, I).
    """
    if x_0.shape != x_1.shape:
        raise ValueError(f"x_0 {tuple(x_0.shape)}, x_1 {tuple(x_1.shape)}: not of the same shape")
    rows, columns = (x.detach().reshape(len(x), -1).float() for x in (x_1, x_0))
    cost = torch.cdist(rows, columns).square()
    if y is not None:
        cost = cost.masked_fill(y.reshape(-1, 1) != y.reshape(1, -1), math.inf)
    order = linear_sum_assignment(cost.cpu())[1]
    return x_0[torch.from_numpy(order).to(x_0.device)]


def guided(v, y, scale=1.0, null=None):
    """Classifier-free guidance of scale s (arXiv 2207.12598): v(∅) + s (v(y) − v(∅)).

    v: callable (x, t, y), y: (B,) labels; null: what v takes for ∅, "no label".  Returns a callable
    (x, t) that evaluates v twice; s = 1 is plain conditional sampling and evaluates it once.
    """
    if scale == 1:
        return lambda x, t: v(x, t, y)
    return lambda x, t: torch.lerp(v(x, t, null), v(x, t, y), scale)


def draw_noise(seed, indices, shape, law="standard_normal"):
    """x_0 ~ N(0, I), or U[0, 1) by the law "random": (len(indices), *shape), on the CPU.

    Noise i depends on (seed, i) alone.  seed: a non-negative integer, or a tuple of them.
    """
    rngs = [np.random.default_rng((seed, i)) for i in indices]  # a tuple in it is flattened
    return torch.from_numpy(np.stack([getattr(rng, law)(shape, np.float32) for rng in rngs]))


# §6  Network: the U-Net of DDPM and its successors  (needs §1, functools, math, torch, F, nn) ---


def time_embedding(t, dim):
    """Sinusoids of time: (B,) in [0, 1] to (B, dim), dim even; periods from 2π/1000 to < 20π."""
    scale = 1000  # the frequencies were made for t in 0..1000: most would hardly move over [0, 1]
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = scale * t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def group_norm(channels):
    """GroupNorm of 32, 16, 8, 4 or 2 groups of a multiple of 4 channels each, else one group."""
    groups = next((n for n in (32, 16, 8, 4, 2) if channels % (4 * n) == 0), 1)
    return nn.GroupNorm(groups, channels)


def zero_(module):
    """Zero the parameters: what a block adds, or the network puts out, starts at 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Attention(nn.Module):
    """Self-attention between all places: (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.heads = channels // 64 if channels % 64 == 0 else 1
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, h):
        B, C, H, W = h.shape
        qkv = self.qkv(self.norm(h)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).contiguous().unbind(1)  # copied, attention is twice as fast
        a = F.scaled_dot_product_attention(q, k, v)  # each (B, heads, HW, C/heads)
        return h + self.out(a.transpose(2, 3).reshape(B, C, H, W))


class ResBlock(nn.Module):
    """Two convolutions, time as scale and shift between: (B, c_in, H, W) -> (B, c_out, H, W)."""

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
    """The network: x (B, C, H, W) of any H and W, t (B,), labels y (B,) or None -> (B, C, H, W).

    width: channels at full resolution; mults: multiples of it, one per level; blocks: residual
    blocks per level, one more on the way up; attention: heights of feature maps at which to
    attend, for images of height `size`; if any is given, the middle attends too; classes: number
    of labels, where label `classes`, or y = None, is "no label"; if 0, y is ignored.
    The defaults are the usual CIFAR-10 net: 35.5M parameters.
    """

    def __init__(self, channels=3, size=32, width=128, mults=(1, 2, 2, 2), blocks=2,
                 attention=(16,), dropout=0.0, classes=0):
        super().__init__()
        self.emb_dim, self.classes = 2 * width, classes
        self.time = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(),
                                  nn.Linear(2 * width, 2 * width))
        self.label = nn.Embedding(classes + 1, 2 * width) if classes else None
        heights = [math.ceil(size / 2**level) for level in range(len(mults))]
        if not {*attention} <= {*heights}:
            raise ValueError(f"attention at {[*attention]}: the maps have heights {heights}")

        block = functools.partial(ResBlock, emb_dim=2 * width, dropout=dropout)
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        self.first = conv(channels, width)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = width, [width]  # channels now, and of what is kept for the way up
        for level, height in enumerate(heights):
            for _ in range(blocks):
                c_in, c = c, mults[level] * width
                self.down.append(block(c_in, c, attention=height in attention))
                skips.append(c)
            if level + 1 < len(mults):
                self.down.append(conv(c, c, stride=2))
                skips.append(c)
        self.middle1, self.middle2 = block(c, c, attention=bool(attention)), block(c, c)
        for level, height in reversed([*enumerate(heights)]):
            for _ in range(blocks + 1):
                c_in, c = c + skips.pop(), mults[level] * width
                self.up.append(block(c_in, c, attention=height in attention))
            if level > 0:
                self.up.append(conv(c, c))
        self.out_norm = group_norm(c)
        self.out = zero_(conv(c, channels))

    def forward(self, x, t, y=None):
        emb = self.time(time_embedding(t, self.emb_dim).to(x.dtype))
        if self.label is not None:
            y = torch.full_like(t, self.classes, dtype=torch.long) if y is None else y
            emb = emb + self.label(y)
        emb, h = F.silu(emb), self.first(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        h = self.middle2(self.middle1(h, emb), emb)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], 1), emb)
            else:
                h = layer(F.interpolate(h, skips[-1].shape[2:]))  # twice the size, or 1 less
        return self.out(F.silu(self.out_norm(h)))


class Velocity(nn.Module):
    """Preconditioning: makes the velocity v(x, t, y) of any path out of any net(x, t, y).

    net learns only what the best linear predictor of u from x misses, at unit scale (Karras et al.,
    arXiv 2206.00364, for any path): v = c_skip x + c_out net(c_in x, t, y); weight() is 1/c_out².
    vp and ve need it (ve's |σ'| goes from 0.085 to 426); data_rms: root mean square of the data.
    """

    def __init__(self, net, path, data_rms):
        super().__init__()
        self.net, self.path, self.data_rms = net, path, data_rms

    def scales(self, t):
        """c_in, c_skip, c_out, each (B,)."""
        alpha, sigma, d_alpha, d_sigma = self.path(t)
        s = self.data_rms
        c_in = (alpha**2 * s**2 + sigma**2) ** -0.5
        c_skip = (alpha * d_alpha * s**2 + sigma * d_sigma) * c_in**2
        c_out = s * (alpha * d_sigma - sigma * d_alpha).abs() * c_in  # the std of u − c_skip x
        return c_in, c_skip, c_out

    def weight(self, t):
        """1/c_out², the weight in the loss at which net's error counts alike at all times."""
        return self.scales(t)[2] ** -2

    def forward(self, x, t, *y):
        c_in, c_skip, c_out = (expand(c, x) for c in self.scales(t))
        return c_skip * x + c_out * self.net((c_in * x).to(x.dtype), t, *y)


# §7  Fréchet inception distance  (needs np, scipy.linalg, torch, torchvision, F, nn) ------------
# Heusel et al., arXiv 1706.08500.  Features: any callable, uint8 images (B, C, H, W) -> (B, D).

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")


def to_float(images):
    """uint8 0..255 to float32 in [-1, 1]; ValueError for another type."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1], clipped, to uint8: the inverse of to_float for all 256 levels."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def pixels(images):
    """The pixels as features, in [-1, 1]: uint8 (B, C, H, W) -> (B, CHW)."""
    return to_float(images).flatten(1)


def inception(file=None, device="cpu"):
    """The features on which published FIDs rest: of TensorFlow's Inception network of 2015.

    file: its weights as pytorch-fid ported them; None downloads them (96 MB) to torch's hub cache.
    Returns a callable: uint8 (B, C, H, W), C = 1 or 3, on any device -> float32 (B, 2048).
    """
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    if file:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    else:
        weights = torch.hub.load_state_dict_from_url(
            INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True)
    net.load_state_dict(weights)
    net.fc = nn.Identity()
    net = torch.fx.symbolic_trace(net.eval().requires_grad_(False).to(device))
    *pools, last = (node for node in net.graph.nodes if node.target is F.avg_pool2d)
    for node in pools:  # TensorFlow's means leave the padding out,
        node.update_kwarg("count_include_pad", False)
    last.target = F.max_pool2d  # and the pool of its last block takes the largest
    net.recompile()

    def tent(n):  # weights (299, n) of TensorFlow 1's bilinear resize: pixel i lies at i n/299
        place = (torch.arange(299, device=device) * n / 299).clamp(max=n - 1)
        return (1 - (place[:, None] - torch.arange(n, device=device)).abs()).clamp(min=0)

    def features(images):
        x = to_float(images.to(device))
        x = tent(x.shape[2]) @ x @ tent(x.shape[3]).T
        return net((127.5 * x.expand(-1, 3, -1, -1) - 0.5) / 128)  # (level − 128)/128

    return features


def fit_gaussian(features):
    """Mean (D,) and covariance (D, D), numpy float64, of features in batches: iterable of (B, D).

    Raises ValueError for fewer than two samples and for features that are not finite.
    """
    n = total = squares = origin = 0
    for f in features:
        f = f.cpu().double()
        origin = f[0] if n == 0 else origin  # moments about it: a large mean would cancel digits
        f = f - origin
        n, total, squares = n + len(f), total + f.sum(0), squares + f.T @ f
    if n < 2 or not torch.isfinite(total).all():
        raise ValueError("at least two samples are needed" if n < 2 else "not all are finite")
    covariance = (squares - torch.outer(total, total) / n) / (n - 1)
    return (origin + total / n).numpy(), covariance.numpy()


def frechet_distance(mean_1, cov_1, mean_2, cov_2):
    """‖m_1 − m_2‖² + tr(S_1 + S_2 − 2 (S_1 S_2)^½), at least 0; ValueError for NaN.

    means (D,), covariances (D, D), float64.  With S_i = A_i A_iᵀ, tr (S_1 S_2)^½ is the sum of
    the singular values of A_1ᵀ A_2, so that singular covariances need no special care.
    """
    (s_1, V_1), (s_2, V_2) = scipy.linalg.eigh(cov_1), scipy.linalg.eigh(cov_2)
    A_1, A_2 = V_1 * np.sqrt(s_1.clip(0)), V_2 * np.sqrt(s_2.clip(0))
    root = scipy.linalg.svdvals(A_1.T @ A_2).sum()
    shift = np.asarray_chkfinite(mean_1 - mean_2)
    return max(0.0, float(shift @ shift + np.trace(cov_1 + cov_2) - 2 * root))  # not −1e-9


# §8  Data: a uint8 tensor (N, C, H, W), an int64 tensor (N,) of labels, and the labels' names ---

TORCHVISION = {"mnist": torchvision.datasets.MNIST, "cifar10": torchvision.datasets.CIFAR10,
               "fashion-mnist": torchvision.datasets.FashionMNIST}
IMAGES = {*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".avif", ".heic", ".heif"}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # image generators store megabytes of text in a PNG


class UserError(ValueError):
    """What the person at the command line can mend: main() prints it as one line."""


@contextlib.contextmanager
def atomic(file):
    """An open file that replaces `file` when the block ends: whole, or not at all."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def in_batches(n, size, what):
    """0..n − 1 in ranges of `size`; shows progress, without a terminal by the minute and last."""
    since = last = time.perf_counter()
    for i in range(0, n, size):
        part = range(n)[i : i + size]
        yield part
        now, at_terminal = time.perf_counter(), sys.stdout.isatty()
        if at_terminal or part.stop == n or now - last > 60:
            rate, last = part.stop / (now - since), now
            left = timedelta(seconds=int((n - part.stop) / rate))
            end = "\r" if at_terminal and part.stop < n else "\n"
            print(f"{what} {part.stop:,}/{n:,}  {rate:,.1f}/s  {left} left", end=end, flush=True)


def draw_digits(n, size, seed=0):
    """n grey digits in Pillow's font, scaled, slanted, rotated, moved and thickened at random."""
    rng, big = np.random.default_rng(seed), 4 * size  # drawn large, then averaged: smooth edges
    labels, strokes = rng.integers(10, size=n), rng.integers(1 + size // 8, size=n)
    angle, slant, x, y = rng.normal(0, [[0.08], [0.1], [0.04], [0.04]], (4, n))
    cos, sin, scale = np.cos(angle), np.sin(angle), rng.uniform(0.9, 1.1, n)
    maps = np.array([[cos, sin + slant, x], [-sin, cos, y]]) / scale  # from a pixel to its source
    maps = torch.from_numpy(maps.transpose(2, 0, 1)).float()  # (n, 2, 3)
    images, font = torch.empty(n, 1, size, size, dtype=torch.uint8), ImageFont.load_default(big)
    for digit, stroke in {*zip(labels.tolist(), strokes.tolist(), strict=True)}:
        canvas = Image.new("L", (big, big))
        ImageDraw.Draw(canvas).text((big / 2, big / 2), str(digit), 255, font, "mm",
                                    stroke_width=stroke)
        glyph = F.avg_pool2d(pil_to_tensor(canvas)[None].float(), 5, stride=1, padding=2)
        mine = np.flatnonzero((labels == digit) & (strokes == stroke))
        grid = F.affine_grid(maps[mine], (len(mine), 1, size, size), align_corners=False)
        glyphs = glyph.expand(len(mine), -1, -1, -1)
        images[mine] = F.grid_sample(glyphs, grid, align_corners=False).round().byte()
    return images, torch.from_numpy(labels), list("0123456789")


def decode(file, size, bad):
    """An image file's central square, upright, as RGB bytes in (3, size, size) order.

    Of a file that does not decode: b"", and what is wrong with it is added to the list `bad`.
    """
    try:
        with Image.open(file) as image:
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                raise ValueError(f"pixels of mode {image.mode} may mean any range of grey")
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip, not scale
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        image = ImageOps.fit(image.convert("RGBA"), (size, size), Image.LANCZOS)
        white = Image.new("RGBA", image.size, "white")
        return pil_to_tensor(Image.alpha_composite(white, image))[:3].numpy().tobytes()
    except Exception as error:  # Pillow raises a dozen kinds
        bad.append(f"{file}: {error}")
        return b""


def load_folder(folder, data_dir, size, classes=False):
    """All images below a folder, decoded once into a file in data_dir that need not fit in memory.

    The subfolders are the K classes, 2 or more if `classes`; images beside them have "no label", K.
    """
    root, found, others, bad = Path(folder).absolute(), {}, Counter(), []
    for name in sorted(glob.glob("**/*", root_dir=root, recursive=True)):
        file = root / name  # glob follows links and skips hidden names
        if not os.access(file, os.R_OK):
            raise UserError(f"{file} is a broken link or not to be read")
        if file.is_file() and file.suffix.lower() in IMAGES:
            found[file] = name.split(os.sep)[0] if os.sep in name else ""
        elif not file.is_dir():
            others[file.suffix or name] += 1
    if others:
        print(folder, "left out:", *(f"{n:,} {end}" for end, n in sorted(others.items())))
    if not found:
        raise UserError(f"--data/--reference {folder} is no folder with images or {[*TORCHVISION]}")
    names = sorted({*found.values()} - {""})
    if len(names) > 1 and {name.lower() for name in names} <= SPLITS:
        raise UserError(f"{folder} holds splits, not classes: name one, as {root / names[0]}")
    if classes and len(names) < 2:
        raise UserError(f"--classes needs two subfolders or more; {folder} has {names}")
    index = {name: i for i, name in enumerate([*names, ""])}
    labels = torch.tensor([index[name] for name in found.values()])

    files, stats = [*found], [file.stat() for file in found]
    content = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
    key = hashlib.sha256(repr([size, files, content]).encode()).hexdigest()[:16]
    cache, shape = Path(data_dir, f"{root.name[:40]}-{key}.raw"), (len(files), 3, size, size)
    if not cache.is_file() or cache.stat().st_size != math.prod(shape):
        with atomic(cache) as f, ThreadPoolExecutor() as pool:
            for part in in_batches(len(files), 256, "decoding"):
                f.writelines(pool.map(lambda i: decode(files[i], size, bad), part))
            if bad:
                raise UserError(f"{len(bad)} images can't be used: {'; '.join(bad)}")
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    images = torch.from_numpy(np.memmap(cache, np.uint8, "r", shape=shape))
    grey = all(torch.equal(part[:, :2], part[:, 1:]) for part in images.split(1000))
    return images[:, :1] if grey else images, labels, names


def load_data(name, data_dir, size, test=False, classes=False):
    """The data of a --data argument, downloaded if need be; test: not the training split."""
    if name == "digits":
        return draw_digits(20_000, size, seed=int(test))
    if name not in TORCHVISION:
        if test:
            raise UserError(f"the folder {name} has no test split: name a folder instead")
        return load_folder(name, data_dir, size, classes)
    try:
        data = TORCHVISION[name](data_dir, train=not test, download=True)
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"{name} is not whole in {data_dir} nor downloaded ({error}): name "
                        "its folder with --data-dir, or use --data digits") from None
    images = torch.as_tensor(data.data)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    images = torch.cat([resize(part, [size, size]) for part in images.split(1000)])
    return images.contiguous(), torch.as_tensor(data.targets), data.classes


def save_grid(images, columns, file):
    """uint8 (N, C, H, W) as one PNG, a small grid enlarged."""
    grid = to_pil_image(torchvision.utils.make_grid(images, columns, padding=1, pad_value=128))
    with atomic(Path(file)) as f:
        ImageOps.scale(grid, max(1, 768 // grid.width), Image.NEAREST).save(f, "PNG")


# §9  Training  (needs all above) ----------------------------------------------------------------

RECIPES = {  # what a data set changes in the defaults of train (TRAIN, §11); the last: a folder
    "digits": {},
    "mnist": dict(size=28, steps=4000),
    "fashion-mnist": dict(size=28, steps=4000, flip=True),
    "cifar10": dict(size=32, width=128, mults=[1, 2, 2, 2], blocks=2, attention=[16], dropout=0.1,
                    batch=128, lr=2e-4, warmup=5000, steps=400_000, flip=True, save_every=5000),
    None: dict(size=32, width=64, mults=None, attention=None, blocks=2, batch=64, lr=1e-3,
               warmup=200, steps=20_000, save_every=1000),  # mults, attention: by size
}
AMP = dict(bf16=torch.bfloat16, fp16=torch.float16)  # mixed precision: the type of matrix work
FIXED = ["path", "classes", "size", "width", "mults", "blocks", "attention"]  # --resume keeps them


def start_ranks(device):
    """Rank, number of ranks, rank on this machine: of torchrun; 0, 1, 0 without it."""
    if "RANK" not in os.environ:
        return 0, 1, 0
    gpu = device if device.type == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", device_id=gpu,
                            timeout=timedelta(hours=2))  # the others wait while one decodes
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks
    return dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0))


def build(config):
    """The untrained network of a config: train's flags, its data's channels, names, data_rms."""
    net = UNet(config.channels, config.size, config.width, config.mults, config.blocks,
               config.attention, config.dropout, len(config.names))  # no names: no --classes
    velocity = net if config.path == "ot" else Velocity(net, PATHS[config.path], config.data_rms)
    velocity.config = config
    return velocity


def draw_batch(images, labels, config, step, device, rank=0, world=1):
    """A rank's share of the batch of a step: x_1, y, x_0, t.

    All is drawn by torch's generators of `device` and of images' device, seeded by (seed, step).
    """
    torch.manual_seed(hash((config.seed, step)))  # of integers: not salted
    B, K = config.batch, len(config.names)
    index = torch.randint(len(images), (B,), device=images.device)
    x_0 = torch.randn(B, *images.shape[1:], device=device)
    mirrored, unlabelled, t = torch.rand(3, B, device=device)
    if config.time == "logit-normal":  # rarer near 0 and 1, where there is less to learn
        t = torch.randn(B, device=device).sigmoid()
    mine = slice(rank * B // world, (rank + 1) * B // world)
    read = slice(B) if config.coupling == "ot" else mine  # a coupling needs all images

    x_1, y = to_float(images[index[read]].to(device)), labels[index[read]].to(device)
    if config.flip:
        x_1 = torch.where(mirrored[read, None, None, None] < 0.5, x_1.flip(3), x_1)
    if config.coupling == "ot":
        x_0 = ot_coupling(x_0, x_1, y if K else None)
        x_1, y = x_1[mine], y[mine]
    if K:  # label K is "no label", for guidance: one in ten
        y = torch.where(unlabelled[mine] < 0.1, K, y)
    return x_1, y, x_0[mine], t[mine]


def read_checkpoint(file):
    """The dict that save() wrote; UserError if it is damaged, foreign or not there."""
    if not file.is_file():
        raise UserError(f"there is no checkpoint {file}: train one, or name another")
    try:
        if damaged := zipfile.ZipFile(file).testzip():  # torch.load does not check the sums
            raise ValueError(f"damaged at {damaged}")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)  # runs no code
        model, ema, adam = (checkpoint[name] for name in ("model", "ema", "optimizer"))  # no buffer
        moments = [adam["state"][i] for i in adam["param_groups"][0]["params"]]
        for p, average, kept in zip(model.values(), ema.values(), moments, strict=True):
            shapes = {p.shape, average.shape, kept["exp_avg"].shape, kept["exp_avg_sq"].shape}
            if len(shapes) > 1 or not average.isfinite().all():
                raise ValueError("weights are not finite, or of another shape than Adam's moments")
        known = {*FIXED, "channels", "data", "data_rms", "dropout", "names"}
        if not known <= checkpoint["config"].keys():
            raise ValueError("flags of another training")
        return checkpoint
    except Exception as error:  # torch, and a foreign dict, raise a dozen kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise UserError(f"{file} is no whole checkpoint of this version ({reason})") from None


def load(file, device="cpu"):
    """The averaged (EMA) network of a checkpoint, with the run's config and step as .config."""
    checkpoint = read_checkpoint(Path(file))
    velocity = build(argparse.Namespace(**checkpoint["config"], step=checkpoint["step"]))
    try:
        velocity.load_state_dict(checkpoint["ema"])
    except RuntimeError as error:
        raise UserError(f"{file} is of another network ({str(error)[:150]})") from None
    return velocity.to(device).eval().requires_grad_(False)


def start_state(velocity, checkpoint=None):
    """The network and what is trained with it, as it begins or as a checkpoint has it."""
    ema, config = copy.deepcopy(velocity).eval().requires_grad_(False), velocity.config
    adam = torch.optim.Adam(velocity.parameters(), fused=True)  # train_step sets its rate
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.amp == "fp16")
    state = dict(model=velocity, ema=ema, optimizer=adam, scaler=scaler)
    for name, part in state.items():
        if checkpoint and checkpoint[name]:  # a scaler that was off saved {}
            part.load_state_dict(checkpoint[name])
    return state


def make_images(velocity, parts, seed=0, amp="off", guidance=1.0, label=None, **solver):
    """Images made of noise i, for i in each range of parts: yields uint8 (B, C, H, W), and the NFE.

    With classes, image i is of `label`, or of class i mod K.  solver: as for odeint.
    """
    config, device = velocity.config, next(velocity.parameters()).device
    names, v = config.names, velocity
    for part in parts:
        noise = draw_noise(seed, part, (config.channels, config.size, config.size))
        if names:
            y = [names.index(label) if label else i % len(names) for i in part]
            v = guided(velocity, torch.tensor(y).to(device), guidance)
        with torch.autocast(device.type, AMP.get(amp), enabled=amp in AMP):
            x, nfe = sample(v, noise.to(device), PATHS[config.path], **solver)
        yield to_uint8(x).cpu(), (nfe if guidance == 1 or not names else 2 * nfe)


def save(state, step, log, grid):
    """Into the run's folder: the checkpoint; if due, a grid of samples of the averaged weights."""
    ema = state["ema"]
    config, out = ema.config, Path(ema.config.out)
    if not all(p.isfinite().all() for p in ema.parameters()):
        raise UserError(f"the weights of step {step} are not finite: try a lower --lr")
    kept = {name: part.state_dict() for name, part in state.items()}
    buffer = io.BytesIO()  # given a file, torch.save would hide that the disk is full
    torch.save(kept | dict(step=step, config=vars(config), log=log), buffer)
    with atomic(out / "checkpoint.pt") as f:
        f.write(buffer.getbuffer())
    if grid:
        parts = [range(64)[i : i + config.batch] for i in range(0, 64, config.batch)]
        images = torch.cat([images for images, _ in make_images(ema, parts, amp=config.amp)])
        save_grid(images, 8, out / f"step-{step:06d}.png")


def train_step(model, state, step, batch):
    """A step of Adam and of the averaged weights; model: state's, or wrapped.  Returns the loss."""
    velocity, ema, optimizer, scaler = (state[k] for k in ("model", "ema", "optimizer", "scaler"))
    config, (x_1, y, x_0, t) = velocity.config, batch
    with torch.autocast(t.device.type, AMP.get(config.amp), enabled=config.amp in AMP):
        weight = velocity.weight(t) if config.path != "ot" else None  # ot: no Velocity
        loss = cfm_loss(lambda x, t: model(x, t, y), PATHS[config.path], x_1, x_0, t, weight)
    warm_up = min(1, step / max(1, config.warmup))
    decay = 1 - (step - 1) / config.steps  # linear; 0 would be the step after the last
    optimizer.param_groups[0]["lr"] = config.lr * warm_up * decay
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # before clipping
    nn.utils.clip_grad_norm_(velocity.parameters(), config.clip)
    scaler.step(optimizer)
    scaler.update()
    keep = (1 - 1 / step) ** 13  # average of about the last 1/13 of the steps so far (2312.02696)
    with torch.no_grad():
        torch._foreach_lerp_([*ema.parameters()], [*velocity.parameters()], 1 - keep)
    return loss.detach()


def note_signals():
    """The list to which SIGINT and SIGTERM will be added; each ends the program when it recurs."""
    noted = []

    def note(number, _):
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return noted


def train(config, checkpoint=None):
    """Train by the flags of train; fills config.out with checkpoint.pt, log.jsonl and grids.

    Resumed with the same flags, a CPU's run ends with the weights of the unbroken one, bit for bit.
    Returns 0 after the last step, else the signal that stopped it, after a checkpoint.
    """
    device, out = torch.device(config.device), Path(config.out)
    rank, world, local = start_ranks(device)
    if local > 0:  # the first rank of a machine downloads or decodes, the others wait
        dist.barrier()
    images, labels, names = load_data(config.data, config.data_dir, config.size,
                                      classes=config.classes)
    if local == 0 and world > 1:  # the same barrier, from the other side
        dist.barrier()
    channels, names = images.shape[1], names if config.classes else []
    if checkpoint and (channels, names) != (config.channels, config.names):  # by run_train
        raise UserError(f"{config.data} has other channels or classes than {out}")
    if not checkpoint:
        rms = to_float(images[:: 1 + len(images) // 1000]).square().mean().sqrt().item()
        vars(config).update(channels=channels, names=names, data_rms=rms)
    if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[1] / 4:
        images, labels = images.to(device), labels.to(device)

    torch.manual_seed(config.seed)
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last  # MPS bugs
    velocity = build(config).to(device, memory_format=layout)
    state = start_state(velocity, checkpoint)
    start, log = (checkpoint["step"], checkpoint["log"]) if checkpoint else (0, [])
    model = nn.parallel.DistributedDataParallel(velocity) if world > 1 else velocity
    model = torch.compile(model) if config.compile else model  # state keeps it uncompiled
    out.mkdir(parents=True, exist_ok=True)
    if config.overwrite and rank == 0 and not checkpoint:
        for file in [*out.glob("step-[0-9]*.png"), *out.glob("checkpoint.pt")]:
            file.unlink()
    logged = open(os.devnull if rank else out / "log.jsonl", "w", buffering=1)
    logged.writelines(json.dumps(row) + "\n" for row in log)  # anew, from the checkpoint
    print(f"{config.data}: {len(images):,} images of {(*images.shape[1:],)}, classes "
          f"{config.names[:5] or 'not used'}\n"
          f"{sum(p.numel() for p in velocity.parameters()):,} parameters, path {config.path}, amp "
          f"{config.amp}, {world} x {device}, {config.steps:,} steps of {config.batch} into {out}/")

    step, stops, since, losses = start, note_signals(), time.perf_counter(), []
    for step in range(start + 1, config.steps + 1):
        batch = draw_batch(images, labels, config, step, device, rank, world)
        torch.manual_seed(hash((config.seed, step, rank)))  # dropout differs between ranks
        losses.append(train_step(model, state, step, batch))
        stopping = torch.tensor(stops[0] if stops else 0)  # the signal
        if world > 1:  # ranks leave together
            dist.all_reduce(stopping, dist.ReduceOp.MAX)
        saving = stopping > 0 or step % config.save_every == 0 or step == config.steps

        if saving or step % config.log_every == 0:
            loss = torch.stack(losses).mean() / world
            if world > 1:
                dist.all_reduce(loss)
            if not loss.isfinite():
                raise UserError(f"the loss of steps {step - len(losses) + 1} to {step} is not "
                                "finite; the last checkpoint is kept: try a lower --lr")
            rate = len(losses) / (time.perf_counter() - since)
            left = timedelta(seconds=int((config.steps - step) / rate))
            log.append(dict(step=step, loss=loss.item(), images_per_second=config.batch * rate))
            print(json.dumps(log[-1]), file=logged)
            print(f"step {step:,}/{config.steps:,}  {config.batch * rate:,.0f} images/s  "
                  f"{left} left  loss {loss:.4f}", flush=True)
            since, losses = time.perf_counter(), []

        if saving and rank == 0:
            save(state, step, log, grid=not stopping)
            since = time.perf_counter()
        if stopping:
            break
    if world > 1:
        dist.barrier()  # destroyed in the middle of an all-reduce, gloo can wait for ever
        dist.destroy_process_group()
    return int(stopping) if step < config.steps else 0


# §10  The theory, drawn: the exact field of Eq. 8 in the plane, without a network  (needs all) ---


def draw_paths(means, tau, seed=0):
    """Panels, 5 a path, from t = 0 to 1: 400 particles, and how 24 of them came there; uint8."""
    noise, font, panels = draw_noise(seed, range(400), (2,)), ImageFont.load_default(34), []
    for name, path in PATHS.items():
        v = functools.partial(marginal_velocity, path, means=means, tau=tau)
        way = [path(noise.new_zeros(1))[1] * noise]
        for i in range(100):
            way.append(odeint(v, way[-1], i / 100, (i + 1) / 100, "rk4", steps=1)[0])
        for i in (0, 25, 50, 75, 100):
            half = max(3.0, way[i].abs().max().item())  # axes from −half to half
            board = Image.new("RGB", (600, 600), "white")  # drawn large, then averaged down
            draw = ImageDraw.Draw(board)
            at = (torch.stack(way[: i + 1]) * torch.tensor([1, -1]) / half + 1) * 300  # y upwards
            for line in at[:, :24].transpose(0, 1):
                draw.line(line.flatten().tolist(), "#d35400", 2)
            for dot in at[-1].tolist():
                draw.circle(dot, 3, "#202020")
            draw.text((12, 8), f"{name}, t = {i / 100:g}, axes to ±{half:.3g}", "black", font)
            panels.append(pil_to_tensor(board.reduce(2)))
    return torch.stack(panels)


# §11  Command line: a flag is a row, the arguments of argparse's add_argument -------------------


def number(kind, low, high=10**9):
    """The type of a flag: an int or a float from low to high."""
    def number(text):  # so named for argparse's "invalid number value"
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not from {low} to {high}")
        return kind(text)
    return number


count, natural, share = number(int, 1), number(int, 0), number(float, 0, 1)
small, positive, fine = number(int, 1, 4096), number(float, 1e-12), number(float, 1e-12, 1)
switch = argparse.BooleanOptionalAction


def integers(text):
    """The type of a flag: "1,2,2" is [1, 2, 2], "none" is []."""
    return [] if text == "none" else [count(part) for part in text.split(",")]


COMMON = {
    "--seed": dict(type=natural, default=0, help="of all randomness but digits, training's grids"),
    "--device": dict(help="cuda, cuda:1, mps or cpu; default: the fastest here")}
MIXED = {"--amp": dict(choices=[*AMP, "off"], help="default: off; CUDA: bf16/fp16, not for dopri5")}
OUT = {
    "--compile": dict(action="store_true", help="torch.compile the network"),
    "--overwrite": dict(action="store_true", help="replace what an earlier one left in --out")}
TRAIN = {
    "--data": dict(help=f"digits (default), {', '.join(TORCHVISION)} or a folder of images; the "
                   "defaults of other flags follow it: train --data cifar10 --help"),
    "--data-dir": dict(default="data", help="of downloads and decoded images"),
    "--path": dict(choices=PATHS, help="probability path; default: ot"),
    "--classes": dict(action="store_true", help="learn to make images of a given class"),
    "--coupling": dict(choices=["independent", "ot"], default="independent",
                       help="ot: minibatch optimal transport over the whole batch"),
    "--time": dict(choices=["uniform", "logit-normal"], default="uniform", help="density of t"),
    "--flip": dict(action=switch, help="mirror images at random; default: %(default)s"),
    "--size": dict(type=small, default=16, help="height and width of the images, pixels"),
    "--width": dict(type=small, default=16, help="channels at full resolution"),
    "--mults": dict(type=integers, default="1,2,4", help="times --width, a level; folder: by size"),
    "--blocks": dict(type=count, default=1, help="residual blocks per level"),
    "--attention": dict(type=integers, default="none", help="at maps of these heights, as 16,8"),
    "--dropout": dict(type=share, default=0.0, help="share of activations dropped"),
    "--batch": dict(type=count, default=32, help="images per step, over all ranks"),
    "--lr": dict(type=positive, default=2e-3, help="learning rate, before warm-up and decay"),
    "--warmup": dict(type=natural, default=50, help="steps in which the rate rises"),
    "--steps": dict(type=count, default=2000, help="of Adam; the rate falls linearly to 0"),
    "--clip": dict(type=positive, default=1.0, help="largest norm of the gradient"),
    "--log-every": dict(type=count, default=50, help="steps between log lines"),
    "--save-every": dict(type=count, default=500, help="steps between checkpoints and grids"),
    "--out": dict(help="folder of the run; default: runs/DATA-PATH"),
    "--resume": dict(action="store_true", help="go on with the run of --out, or of --data and "
                     "--path, or with the newest")}
MODEL = {
    "--ckpt": dict(help="checkpoint, or the folder of its run; default: the newest in runs/"),
    "--n": dict(type=count, default=64, help="images"),
    "--batch": dict(type=count, default=128, help="images at a time"),
    "--solver": dict(choices=SOLVERS, default="midpoint", help="1, 2, 4 calls a step, or adaptive"),
    "--steps": dict(type=count, help="of the solver; default: 20, but dopri5 takes its own"),
    "--tolerance": dict(type=fine, default=1e-5, help="of dopri5, relative and absolute")}
GUIDANCE = {"--guidance": dict(type=number(float, 0), default=1.0, help="scale; 1 is none")}
REFERENCE = {
    "--reference": dict(help="train, test, a data set (its training split) or a folder; default: "
                             "train; for nll, test if there is one"),
    "--data-dir": dict(help="of downloads and decoded images; default: as in training")}
SAMPLE = {
    "--label": dict(help="class to make; default: all in turn"),
    "--out": dict(help="NAME.png or a folder; default: samples.png beside the checkpoint")}
FID = {
    "--features": dict(choices=["inception", "pixels"], default="inception", help="of images"),
    "--inception": dict(help="file of its weights; default: downloaded")}
NLL = {
    "--k": dict(type=count, default=1, help="draws of dequantisation noise; the paper: 50"),
    "--exact": dict(action="store_true", help="exact divergence, not Hutchinson's estimate")}


def check_out(out, overwrite, folder=False, mine=()):
    """UserError unless the file or folder out can be written, and is new or may be overwritten.

    mine, for train alone: patterns of the files that may be in a folder all the same.
    """
    if os.path.lexists(out) and not (out.is_dir() if folder else out.is_file()):
        raise UserError(f"{out} is no {'folder' if folder else 'file'}: name another place")
    there = [*out.iterdir()] if out.is_dir() else [out] if out.is_file() else []
    foreign = [file for file in there if not any(file.match(name) for name in mine)]
    if foreign and not overwrite:
        raise UserError(f"{out} exists: try --overwrite" + (" or train --resume" if mine else ""))
    home = out if folder else out.parent
    while not home.exists():
        home = home.parent
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise UserError(f"{out} can't be written: {home} is no folder to write in")


def newest(name):
    """The newest file of that name in a run of runs/, or the path runs/*/NAME, for an error."""
    return max(Path("runs").glob(f"*/{name}"), key=os.path.getmtime, default=Path("runs/*", name))


def choose_device(args):
    """Fills in args.device, the fastest here unless named, and args.amp, by what that can do."""
    name = args.device or "cpu"
    if not args.device and torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator().type
    if name == "cuda" and "RANK" in os.environ:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.ones(1, device=name)
    except (RuntimeError, AssertionError, ImportError) as error:  # none, or not built for it
        raise UserError(f"no {name} works here ({error}): use --device cpu") from None
    args.device = name
    adaptive = vars(args).get("solver") == "dopri5"  # 16-bit rounding would end in tiny steps
    if args.amp is None and "cuda" in name and not adaptive:
        args.amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    args.amp = args.amp or "off"


def run_train(parser, argv):
    """Learn to make images from noise."""
    args = parser.parse_args([arg for arg in argv if arg not in ("-h", "--help")])  # anew below
    data, path, checkpoint = args.data or "digits", args.path or "ot", None
    out = Path(args.out or f"runs/{Path(data).absolute().name}-{path}")
    if args.resume:  # the run's own flags, and what it found in its data, are the defaults
        if not (args.out or args.data or args.path):
            out = newest("log.jsonl").parent  # the newest run, refused if it has no checkpoint
        checkpoint = read_checkpoint(out / "checkpoint.pt")
        parser.set_defaults(**checkpoint["config"] | dict(device=None, compile=False,
                                                          overwrite=False))  # anew each time
    else:
        parser.set_defaults(data=data, path=path, **RECIPES.get(data, RECIPES[None]))
    args = parser.parse_args(argv)  # what was typed wins over these defaults; --help shows them
    for flag in FIXED:
        if checkpoint and getattr(args, flag) != checkpoint["config"][flag]:
            raise UserError(f"--{flag} cannot change: {out} has {checkpoint['config'][flag]}")
    args.out = str(out)
    choose_device(args)
    if args.mults is None:  # of a folder: levels down to maps of about 8 x 8, attention on these
        args.mults = [1] + [2] * max(0, round(math.log2(args.size / 8)))
    heights = [math.ceil(args.size / 2**level) for level in range(len(args.mults))]
    args.attention = heights[-1:] if args.attention is None else args.attention
    if not {*args.attention} <= {*heights}:
        raise UserError(f"--attention {args.attention}: the maps have the heights {heights}")
    real = [os.path.realpath(path) for path in (out, args.data)]
    if args.data not in RECIPES and os.path.commonpath(real) == real[1]:
        raise UserError(f"--out {out} is inside --data {args.data}")
    if args.batch % int(os.environ.get("WORLD_SIZE", 1)):
        raise UserError(f"--batch {args.batch} is not divisible by the number of ranks")
    if not checkpoint:  # mine: left by a run that stopped before its first checkpoint
        check_out(out, args.overwrite, True, mine=["log.jsonl", "*.tmp"])
    elif checkpoint["step"] >= args.steps:
        raise UserError(f"{out} is at step {checkpoint['step']:,}: ask for more --steps")
    torch.backends.cudnn.benchmark = True  # shapes are fixed
    if stopped_by := train(args, checkpoint):
        ranks = os.environ.get("LOCAL_WORLD_SIZE")
        how = f"torchrun --nproc_per_node={ranks}" if ranks else "python"
        print(f"go on with: {how} flow_matching.py train --resume --out {shlex.quote(args.out)}")
        sys.exit(128 + stopped_by)


def open_model(args):
    """The averaged network of --ckpt; fills in --ckpt, --steps, --device and --amp."""
    if args.solver != "dopri5":
        args.steps = args.steps or 20
    elif args.steps:
        raise UserError("dopri5 chooses its steps: leave out --steps, or take --solver rk4")
    file = Path(args.ckpt or newest("checkpoint.pt"))
    args.ckpt = file / "checkpoint.pt" if file.is_dir() else file
    choose_device(args)
    velocity = load(args.ckpt, args.device)
    config = velocity.config
    print(f"{args.ckpt}: {config.data}, path {config.path}, step {config.step:,}, EMA weights")
    if args.guidance != 1 and not config.names:
        raise UserError("--guidance needs a model of train --classes")
    return velocity


def open_reference(args, config):
    """The images of --reference; UserError also where no result could be kept beside --ckpt."""
    if args.reference is None:  # of nll; fid's default is train
        args.reference = "test" if config.data in RECIPES else "train"
    data = config.data if args.reference in ("train", "test") else args.reference
    images, _, _ = load_data(data, args.data_dir or config.data_dir, config.size,
                             test=args.reference == "test")
    if images.shape[1] != config.channels:
        raise UserError(f"{data} has {images.shape[1]} channels, the model {config.channels}")
    if min(args.n, len(images)) < 2:
        raise UserError("at least two images are needed, of --n and of --reference")
    check_out(args.ckpt.with_name("results.jsonl"), overwrite=True)
    return images


def report(args, text, nfes, since, **row):
    """Adds a row, with all flags, to results.jsonl beside the checkpoint; then prints the text."""
    row |= dict(nfe=np.mean(nfes), seconds=time.perf_counter() - since)
    with open(args.ckpt.with_name("results.jsonl"), "a") as results:
        print(json.dumps(vars(args) | row, default=str), file=results)
    print(f"{text}, {args.solver}, NFE {row['nfe']:g}, {row['seconds']:.1f} s", flush=True)


def run_sample(parser, argv):
    """Make images from the averaged weights of a checkpoint: a grid, or one PNG per image."""
    args = parser.parse_args(argv)
    velocity = open_model(args)
    names, grid, nfes = velocity.config.names, [], []
    if args.label is not None and args.label not in names:
        raise UserError(f"--label {args.label}: the labels are {names or 'for train --classes'}")
    out = Path(args.out or args.ckpt.with_name("samples.png"))
    folder = out.suffix.lower() != ".png"
    check_out(out, args.overwrite or not args.out, folder)
    if folder:
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("[0-9]" * 6 + ".png"):
            old.unlink()
    if args.compile:
        velocity = torch.compile(velocity)  # .config is still there
    made = make_images(velocity, in_batches(args.n, args.batch, "images"), args.seed, args.amp,
                       args.guidance, args.label, solver=args.solver, steps=args.steps,
                       tolerance=args.tolerance)
    for images, nfe in made:
        if not folder:
            grid += images
        else:
            for i, image in enumerate(images, len(nfes)):  # nfes: one for each image before
                to_pil_image(image).save(out / f"{i:06d}.png")
        nfes += [nfe] * len(images)
    if grid:  # with classes, a class a column
        K = 1 if args.label else max(1, len(names))
        save_grid(torch.stack(grid), K * max(1, round(args.n**0.5 / K)), out)
    what = f"images of {args.label or ', '.join(names) + ' in turn'}" if names else "images"
    print(f"{out}: {args.n:,} {what}, {args.solver}, NFE {np.mean(nfes):g}, amp {args.amp}")


def run_fid(parser, argv):
    """Frechet distance between real images and those of a checkpoint, classes in turn."""
    args = parser.parse_args(argv)
    velocity = open_model(args)
    if args.features == "pixels" and args.inception:
        raise UserError("--features pixels takes no --inception")
    images = open_reference(args, velocity.config)
    features, D, title = pixels, images[0].numel(), "Frechet distance of pixels"
    if args.features == "inception":
        try:
            features, D, title = inception(args.inception, args.device), 2048, "FID"
        except Exception as error:  # of a download, or of a file that is something else
            raise UserError(f"Inception can't be had ({str(error)[:150]}): fetch {INCEPTION_URL} "
                            "and name it by --inception FILE, or take --features pixels") from None
    parts = in_batches(len(images), args.batch, "reference")
    real = fit_gaussian(features(images[part]) for part in parts)
    found, nfes, since = [], [], time.perf_counter()
    made = make_images(velocity, in_batches(args.n, args.batch, "images"), args.seed, args.amp,
                       args.guidance, solver=args.solver, steps=args.steps,
                       tolerance=args.tolerance)
    for batch, nfe in made:
        found.append(features(batch))
        nfes += [nfe] * len(batch)
    distance = frechet_distance(*fit_gaussian(found), *real)
    text = f"{title} {distance:.4f}: {args.n:,} made, {len(images):,} of {args.reference}"
    report(args, text, nfes, since, frechet_distance=distance, n_reference=len(images))
    if args.n < 50_000:
        print("under 50,000 images: not comparable with papers")
    if min(args.n, len(images)) <= D:
        print(f"no more images than {D:,} features: a covariance is singular")


def run_nll(parser, argv):
    """Bits per dimension of images, -log2 p(image) / numbers in an image, without a class."""
    args = parser.parse_args(argv)
    velocity = open_model(args)
    images = open_reference(args, velocity.config)
    n, shape = min(args.n, len(images)), images.shape[1:]
    chosen = np.random.default_rng(args.seed).permutation(len(images))[:n]
    log_p, nfes, since = torch.empty(n, args.k, dtype=torch.float64), [], time.perf_counter()
    for part in in_batches(n, args.batch, "images"):
        # The K draws of an image share their signs: independent errors of the estimate would raise
        # the mean over K in bits_per_dim.  The 1 and 2 in the seeds keep u and signs independent.
        signs = draw_noise((args.seed, 2), part, shape).sign().to(args.device)
        for k in range(args.k):
            u = draw_noise((args.seed, 1, k), part, shape, law="random")
            x = (images[chosen[part]] + u).to(args.device) / 128 - 1
            one, nfe = log_likelihood(
                velocity, x, PATHS[velocity.config.path], None if args.exact else [signs],
                solver=args.solver, steps=args.steps, tolerance=args.tolerance)
            log_p[part, k] = one.cpu().double()
            nfes += [nfe] * len(part)
    bits = bits_per_dim(log_p, math.prod(shape))
    mean, error = bits.mean().item(), bits.std().item() / n**0.5
    text = (f"{mean:.4f} +/- {error:.4f} bits/dim: {n:,} images of {args.reference}, K = {args.k}, "
            f"{'exact' if args.exact else 'Hutchinson'} divergence")
    report(args, text, nfes, since, bits_per_dim=mean, standard_error=error, n=n)


def run_paths(parser, argv):
    """Draw the theory: particles on the exact field of Eq. 8, without a network."""
    args = parser.parse_args(argv)
    check_out(Path(args.out), args.overwrite)
    angles = torch.arange(8) * math.pi / 4
    panels = draw_paths(2 * torch.stack([angles.cos(), angles.sin()], 1), 0.1, args.seed)
    save_grid(panels, 5, args.out)
    print(f"wrote {args.out}")


PICTURE = {
    "--seed": COMMON["--seed"],
    "--out": dict(default="paths.png", help="file of the picture"),
    "--overwrite": OUT["--overwrite"]}
COMMANDS = {  # what runs, its flags, more defaults
    # --flip's default is here: in its row, --help of Python before 3.13 would show it twice
    "train": (run_train, COMMON | MIXED | OUT | TRAIN, dict(flip=False)),
    "sample": (run_sample, COMMON | MIXED | OUT | MODEL | GUIDANCE | SAMPLE, {}),
    "fid": (run_fid, COMMON | MIXED | MODEL | GUIDANCE | REFERENCE | FID,
            dict(n=50_000, reference="train")),
    "nll": (run_nll, COMMON | MODEL | REFERENCE | NLL,  # amp and guidance are no flags of it
            dict(n=128, batch=32, solver="dopri5", guidance=1.0, amp="off")),
    "paths": (run_paths, PICTURE, {}),
}


def main(argv=None):
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # it may lack the é of a name
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("flow_matching.py", usage=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands, each with --help", metavar="COMMAND",
                                     prog=parser.prog)
    for name, (run, rows, defaults) in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__,
                                      usage=argparse.SUPPRESS)  # so an error is one line
        for flag, row in rows.items():
            shown = " (default: %(default)s)" if "default" in row else ""
            command.add_argument(flag, **row | dict(help=row["help"] + shown))
        command.set_defaults(**defaults)
    if not argv or argv[0] not in COMMANDS:
        return parser.parse_args(argv or ["--help"])
    run, command = COMMANDS[argv[0]][0], commands.choices[argv[0]]
    torch.backends.cudnn.allow_tf32 = False  # it keeps three digits; whoever wants speed has bf16
    try:
        run(command, argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, FloatingPointError) as error:
        command.error(" ".join(str(error).split()))
    except OSError as error:
        if error.errno is None:  # not the system's: somebody's OSError(text)
            raise
        command.error(f"{error}: is the disk full, or not to be read or written?")
    except (MemoryError, RuntimeError) as error:
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not memory and "allocate memory" not in str(error):
            raise  # a fault of the code keeps its traceback
        command.error("out of memory: lower --batch, or train a smaller network")


if __name__ == "__main__":
    main()
