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
B, C, H, W are batch, channels, height and width; images are in [-1, 1].  §1-§4 are the paper.
Each of §1-§7, pasted with the imports and the sections that its title needs, runs.

    python flow_matching.py train --path ot
    python flow_matching.py train --data photos/ --size 64 --out runs/photos
    torchrun --nproc_per_node=8 flow_matching.py train --data cifar10 --batch 1024 --lr 6e-4
    python flow_matching.py train --resume
    python flow_matching.py sample --steps 20
    python flow_matching.py sample --n 10000 --out images/
    python flow_matching.py sample --label 3 --guidance 2       (after train --classes)
    python flow_matching.py fid --features pixels --n 2000 --solver euler --steps 5,10,20,50
    python flow_matching.py nll --n 1000 --k 50 --reference train
    python flow_matching.py paths
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
import unicodedata
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

# §1  Probability paths  (paper: Sections 3 and 4) -----------------------------------------------
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
    """Variance-exploding diffusion, Eq. 16: α = 1, σ geometric; at t = 0 it is σ_max, not 1."""
    log_ratio = math.log(sigma_max / sigma_min)
    sigma = sigma_min * torch.exp(log_ratio * (1 - t))
    return torch.ones_like(t), sigma, torch.zeros_like(t), -log_ratio * sigma


PATHS = {"ot": ot_path, "vp": vp_path, "ve": ve_path}


def coefficients(path, t, x):
    """What path(t) returns, each (B,), shaped (B, 1, ...) to multiply x: (B, ...)."""
    return [c.reshape(-1, *[1] * (x.dim() - 1)) for c in path(t)]


def conditional_velocity(path, x, x_1, t):
    """Theorem 3, Eq. 15: u_t(x | x_1) = (σ'/σ) (x − α x_1) + α' x_1; Eqs. 17, 19, 21 are this."""
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t, x)
    return d_sigma / sigma * (x - alpha * x_1) + d_alpha * x_1


def marginal_velocity(path, x, t, means, tau=0.0):
    """The exact marginal field, Eq. 8, where the data is K equal Gaussians N(m_k, τ² I).

    x: (B, D), t: (B,), means: (K, D).  At t component k is N(α m_k, (α²τ² + σ²) I) and moves by
    Theorem 3; the field is the mean of these velocities, weighted by p(k | x, t).
    """
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t, x[:, None])
    offset = x[:, None] - alpha * means  # (B, K, D)
    variance = (alpha * tau) ** 2 + sigma**2
    growth = (alpha * d_alpha * tau**2 + sigma * d_sigma) / variance  # std'/std
    posterior = (-offset.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)  # (B, K, 1)
    return (posterior * (growth * offset + d_alpha * means)).sum(1)


# §2  Loss  (paper: Theorem 2; needs §1) ---------------------------------------------------------


def cfm_loss(v, path, x_1, x_0=None, t=None, weight=1.0):
    """Conditional flow matching, Eq. 14: mean ‖v(x_t, t) − u_t(x_t | x_1)‖² per element.

    v: callable (x, t) -> velocity, x_1: (B, ...) data; x_0 ~ N(0, I) and t ~ U[0, 1] are drawn
    unless given; weight: (B,), 1 in the paper.  u is taken from Eq. 13, the time derivative of
    ψ_t(x_0), which never divides by σ.  Raises ValueError for a velocity of another shape than u.
    """
    x_0 = torch.randn_like(x_1) if x_0 is None else x_0
    if t is None:  # float32 always: cast to bf16, a time would be exactly 1 once in 500
        t = torch.rand(len(x_1), device=x_1.device)
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t, x_1)
    u = d_alpha * x_1 + d_sigma * x_0
    velocity = v(alpha * x_1 + sigma * x_0, t)
    alike = velocity.shape == x_0.shape == x_1.shape and t.shape == x_1.shape[:1]
    if not alike or torch.as_tensor(weight).dim() > 1:
        shapes = [tuple(part.shape) for part in (velocity, x_0, x_1, t)]
        raise ValueError("velocity {}, x_0 {}, x_1 {}, t {}: these would broadcast; and a weight "
                         "must be (B,)".format(*shapes))
    return (weight * (velocity - u).square().reshape(len(u), -1).mean(1)).mean()


# §3  ODE solvers: dx/dt = f(x, t) ---------------------------------------------------------------
# For a step, t is a number; odeint hands it to v as times (B,).


def evaluate(v, x, t):
    """v(x, t).  Raises ValueError unless it is real and of the shape of x: it would broadcast."""
    u = v(x, t)
    if u.shape != x.shape or u.is_complex():
        raise ValueError(f"a velocity {tuple(u.shape)}, {u.dtype} for x {tuple(x.shape)}")
    return u


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
    """Adaptive Dormand-Prince of order 5, scipy's RK45: one step size for all, no gradients."""
    if t_0 == t_1 or x.numel() == 0:  # scipy would divide by 0
        return x

    def f_flat(t, flat):  # as scipy wants it: one float64 vector
        u = f(torch.from_numpy(flat).to(x.dtype).to(x.device).reshape(x.shape), t)
        u = u.detach().flatten().cpu().double().numpy()
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
    equal steps; dopri5 takes its own, by a relative and absolute tolerance.  Returns x at t_1 and
    the number of evaluations of v (NFE).  Raises ValueError for a wrong solver, type or shape,
    FloatingPointError for a solve that fails or is not finite.
    """
    if solver not in SOLVERS or steps < 1 or not tolerance > 0 or not math.isfinite(t_1 - t_0):
        raise ValueError(f"no {solver} with {steps} steps, tolerance {tolerance}, to {t_1}: take "
                         f"one of {[*SOLVERS]}, at least 1 step, a tolerance above 0, finite times")
    if not x.is_floating_point():
        raise ValueError(f"x must be real and floating-point, not {x.dtype}")
    nfe = 0

    def f(x, t):
        nonlocal nfe
        nfe += 1
        t = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        return evaluate(v, x, t).to(x.dtype)

    if solver == "dopri5":
        x = dopri5(f, x, t_0, t_1, tolerance)
    else:
        h = (t_1 - t_0) / steps
        for i in range(steps):
            x = SOLVERS[solver](f, x, t_0 + i * h, h)
    if not x.isfinite().all():
        raise FloatingPointError("the solution is not finite")
    return x, nfe


# §4  Sampling and likelihood  (paper: Section 2, Appendix C; needs §1 and §3) -------------------


@torch.no_grad()
def sample(v, noise, path=ot_path, **solver):
    """Noise (B, ...) from N(0, I) to data: x_1 and the NFE; solver: as for odeint."""
    sigma_0 = path(noise.new_zeros(1))[1]  # p_0 = N(0, σ(0)² I): nearly exact for vp and ve
    return odeint(v, sigma_0 * noise, 0.0, 1.0, **solver)


@torch.no_grad()
def invert(v, x_1, path=ot_path, **solver):
    """Data to noise, the inverse of sample: the noise that becomes x_1: (B, ...), and the NFE."""
    x, nfe = odeint(v, x_1, 1.0, 0.0, **solver)
    return x / path(x.new_zeros(1))[1], nfe


@torch.no_grad()
def log_likelihood(v, x_1, path=ot_path, probes=None, **solver):
    """log p_1(x_1) in nats, (B,), and the NFE: the change of variables along the flow.

    d log p_t(x_t)/dt = −div v(x_t, t), solved backward in time from the data x_1: (B, ...).
    div v is taken as the sum of Eᵀ (∂v/∂x) E over the probes, tensors E: (B, ...).  One draw of
    random signs is Hutchinson's unbiased estimate; None: all unit vectors, exact, at a gradient for
    each number of an x_1.  v must not mix the samples of a batch.  The result has no gradient.
    """
    if probes is None:
        units = torch.eye(math.prod(x_1.shape[1:]), dtype=x_1.dtype, device=x_1.device)
        probes = units.reshape(-1, 1, *x_1.shape[1:]).expand(-1, *x_1.shape)  # (D, B, ...)

    def f(state, t):  # x and ∫ div v dt, as one state: (B, D + 1)
        with torch.inference_mode(False), torch.enable_grad():
            x = state[:, :-1].clone().reshape(x_1.shape).requires_grad_()
            t = t.clone()  # autograd refuses a tensor that inference mode made
            u = evaluate(v, x, t)
            if not u.requires_grad and not torch.equal(u, v(x + 1, t)):  # no graph, but x matters
                raise ValueError("v passes no gradient to x: call it without no_grad or detach")
            u = u + 0 * x  # so that a field which does not look at x has divergence 0
            div = sum(torch.autograd.grad(u, x, E, retain_graph=True)[0] * E for E in probes)
        return torch.cat([u.detach().flatten(1), div.flatten(1).sum(1, keepdim=True)], 1)

    state, nfe = odeint(f, F.pad(x_1.flatten(1), (0, 1)), 1.0, 0.0, **solver)
    variance = path(state.new_zeros(1))[1] ** 2
    log_p_0 = -0.5 * (state[:, :-1].square() / variance + (2 * math.pi * variance).log()).sum(1)
    return log_p_0 + state[:, -1], nfe  # backward in time: state[:, -1] = −∫ div v dt


def bits_per_dim(log_p, D):
    """−log2 P(image) / D of images of 256 levels: (B,).

    log_p: (B, K), nats, log p_1 of K draws of x = (k + u)/128 − 1 for levels k and u ~ U[0, 1),
    the bin that holds the value k/127.5 − 1 of level k in training (of 255: its end).
    The mean result is an upper bound that K tightens.  A level is 1/128 wide: 7 = log2 128 bits.
    """
    return 7 - (log_p.logsumexp(1) - math.log(log_p.shape[1])) / (D * math.log(2))


# The paper ends here, the engineering begins. ===================================================
# §5  Coupling, guidance, noise, for any callable v ----------------------------------------------


def ot_coupling(x_0, x_1, y=None):
    """Minibatch optimal transport (Tong et al., arXiv 2302.00482; Pooladian et al., 2304.14772).

    x_0, x_1: (B, ...).  Returns x_0 in the order in which the sum of ‖x_0 − x_1‖² is least.
    y: (B,) labels: noise then changes places only within a class: p(x_0 | y) stays N(0, I).
    """
    if x_0.shape != x_1.shape:
        raise ValueError(f"x_0 {tuple(x_0.shape)} and x_1 {tuple(x_1.shape)}: not the same shape")
    cost = torch.cdist(x_1.detach().flatten(1), x_0.detach().flatten(1)).square()
    if y is not None:
        cost = cost.masked_fill(y[:, None] != y, math.inf)
    order = linear_sum_assignment(cost.cpu())[1]
    return x_0[torch.from_numpy(order).to(x_0.device)]


def guided(v, y, scale=1.0):
    """Classifier-free guidance of scale s (arXiv 2207.12598): v(∅) + s (v(y) − v(∅)).

    v: callable (x, t, y), y: (B,) labels or None, which is ∅.  Returns a callable (x, t) that
    evaluates v twice; s = 1 is plain conditional sampling and evaluates it once.
    """
    if scale == 1:
        return lambda x, t: v(x, t, y)
    return lambda x, t: torch.lerp(v(x, t, None), v(x, t, y), scale)


def draw_noise(seed, indices, shape):
    """x_0 ~ N(0, I): (len(indices), *shape), on the CPU.  Noise i depends on (seed, i) alone.

    seed: a non-negative integer, or a tuple of them.
    """
    rngs = [np.random.default_rng((seed, i)) for i in indices]
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))


# §6  Network: the U-Net of DDPM and its successors  (needs §1 for preconditioning alone) --------


def time_embedding(t, dim):
    """Sinusoids of time: (B,) in [0, 1] to (B, dim), dim even; periods from 2π/1000 up to 20π."""
    scale = 1000  # the frequencies were made for t in 0..1000: most would hardly move over [0, 1]
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = scale * t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def group_norm(channels):
    """GroupNorm with at most 32 groups of at least 4 channels; channels divisible by 4."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def zero_(module):
    """Zero the parameters: what the module adds to its input, or puts out, starts at 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Attention(nn.Module):
    """Self-attention, heads of 64 channels where 64 divides them: (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // 64))
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, h):
        B, C, H, W = h.shape
        qkv = self.qkv(self.norm(h)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).contiguous().unbind(1)  # each (B, heads, HW, C/heads)
        a = F.scaled_dot_product_attention(q, k, v)
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

    width: channels at full resolution, a multiple of 4; mults: multiples of it, one per level;
    blocks: residual blocks per level, one more on the way up; attention: heights of feature maps
    at which to attend, for images of height `size`; if there is one, the middle attends too;
    classes: number of labels, where label `classes`, or y = None, is "no label".
    The defaults are the usual CIFAR-10 net: 35.5M parameters.
    """

    def __init__(self, channels=3, size=32, width=128, mults=(1, 2, 2, 2), blocks=2,
                 attention=(16,), dropout=0.0, classes=0):
        super().__init__()
        if width % 4 or not mults or min(*mults, width, blocks, channels) < 1:
            raise ValueError("width must be a multiple of 4; mults, blocks, channels at least 1")
        self.width, self.classes = width, classes
        emb_dim, widths = 2 * width, [m * width for m in mults]
        self.time = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.label = nn.Embedding(classes + 1, emb_dim) if classes else None

        block = functools.partial(ResBlock, emb_dim=emb_dim, dropout=dropout)
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        self.before_down, self.down = nn.ModuleList(), nn.ModuleList()  # by level, finest first
        self.before_up, self.up = nn.ModuleList(), nn.ModuleList()  # the same levels
        finer, coarser = [width, *widths], [*widths[1:], widths[-1]]
        for i, (above, c, below) in enumerate(zip(finer, widths, coarser, strict=False)):
            attend = math.ceil(size / 2**i) in attention
            self.before_down.append(conv(above, above, stride=2) if i else conv(channels, width))
            inputs = [above] + [c] * (blocks - 1)
            self.down.append(nn.ModuleList(block(n, c, attention=attend) for n in inputs))
            self.before_up.append(conv(below, below) if i + 1 < len(mults) else nn.Identity())
            inputs = [below + c] + [c + c] * (blocks - 1) + [c + above]  # with skips, last first
            self.up.append(nn.ModuleList(block(n, c, attention=attend) for n in inputs))
        c = widths[-1]
        self.middle1, self.middle2 = block(c, c, attention=any(attention)), block(c, c)
        self.out_norm = group_norm(widths[0])
        self.out = zero_(conv(widths[0], channels))

    def forward(self, x, t, y=None):
        emb = self.time(time_embedding(t, self.width))
        if self.label is not None:
            y = torch.full_like(t, self.classes, dtype=torch.long) if y is None else y
            emb = emb + self.label(y)
        emb, h, skips = F.silu(emb), x, []
        for before, level in zip(self.before_down, self.down, strict=True):
            h = before(h)
            skips.append(h)
            for block in level:
                h = block(h, emb)
                skips.append(h)
        h = self.middle2(self.middle1(h, emb), emb)
        for before, level in reversed([*zip(self.before_up, self.up, strict=True)]):
            h = before(F.interpolate(h, skips[-1].shape[2:]))  # halved, an odd size was rounded up
            for block in level:
                h = block(torch.cat([h, skips.pop()], 1), emb)
        return self.out(F.silu(self.out_norm(h)))


class Velocity(nn.Module):
    """The velocity v(x, t, y) of a config: for ot a plain U-Net F, as in Eq. 23.

    For vp and ve, whose scales vary (ve's |σ'| from 0.085 to 426), F learns only what the best
    linear predictor misses, at unit scale (Karras et al., arXiv 2206.00364, §5, for any path):
    v = c_skip x + c_out F(c_in x, t, y), loss weight 1/c_out².  config: the flags of train with
    what train found in the data: channels, names of classes, data_rms.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.net = UNet(config.channels, config.size, config.width, config.mults, config.blocks,
                        config.attention, config.dropout, len(config.names))

    def scales(self, t):
        """c_in, c_skip, c_out, each (B,); s is the root mean square of the data."""
        if self.config.path == "ot":
            return torch.ones_like(t), torch.zeros_like(t), torch.ones_like(t)
        alpha, sigma, d_alpha, d_sigma = PATHS[self.config.path](t)
        s = self.config.data_rms
        c_in = (alpha**2 * s**2 + sigma**2) ** -0.5
        c_skip = (alpha * d_alpha * s**2 + sigma * d_sigma) * c_in**2
        c_out = s * (alpha * d_sigma - sigma * d_alpha).abs() * c_in  # the std of u − c_skip x
        return c_in, c_skip, c_out

    def forward(self, x, t, y=None):
        c_in, c_skip, c_out = coefficients(self.scales, t, x)
        return c_skip * x + c_out * self.net(c_in * x, t, y)


# §7  Fréchet inception distance  (Heusel et al., arXiv 1706.08500) ------------------------------
# Features are any callable: uint8 images (B, C, H, W) -> (B, D).

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def to_float(images):
    """uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def pixels(images):
    """The pixels as features, in [-1, 1]: uint8 (B, C, H, W) -> (B, CHW)."""
    return to_float(images).flatten(1)


def inception(file="", device="cpu"):
    """The features on which published FIDs rest: of TensorFlow's Inception network of 2015.

    file: its weights as pytorch-fid ported them; "" downloads them (96 MB) to torch's hub cache.
    Returns a callable: uint8 (B, C, H, W), C = 1 or 3, on any device -> float32 (B, 2048).
    Raises ValueError without the right weights.
    """
    cache = Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name)
    try:
        if not file and not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, cache, INCEPTION_SHA256)
        weights = Path(file or cache).read_bytes()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"no Inception weights ({error}): fetch {INCEPTION_URL} elsewhere and "
                         "name it with --inception FILE, or use --features pixels") from None
    if hashlib.sha256(weights).hexdigest() != INCEPTION_SHA256:
        raise ValueError(f"{file or cache} has another SHA-256 than {INCEPTION_URL}")
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    net.load_state_dict(torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True))
    net.fc = nn.Identity()
    net = torch.fx.symbolic_trace(net.eval().requires_grad_(False).to(device))
    *means, last = (node for node in net.graph.nodes if node.target is F.avg_pool2d)
    for node in means:  # TensorFlow's means leave the padding out,
        node.update_kwarg("count_include_pad", False)
    last.target = F.max_pool2d  # and its last pool takes the largest
    net.recompile()

    def features(images):
        parts = []
        for part in images.split(50):  # 1 GB at a time
            # bilinear as in TensorFlow 1, no antialiasing: pixel i of 299 lies at i H/299, so with
            # one pixel more on both sides the grids go from corner to corner
            x = F.pad(part.to(device).float(), (0, 1, 0, 1), "replicate")
            x = F.interpolate(x, (300, 300), mode="bilinear", align_corners=True)[..., :299, :299]
            parts.append(net((x.expand(-1, 3, -1, -1) - 128) / 128))
        return torch.cat(parts)

    return features


def fit_gaussian(batches, features):
    """Mean (D,) and covariance (D, D) of the features of many images: numpy, float64.

    batches: iterable of uint8 (B, C, H, W), of any sizes; one is in memory at a time.
    Raises ValueError for other batches, fewer than two images, features that are not finite.
    """
    n = total = squares = origin = 0
    for images in batches:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"{images.dtype} {tuple(images.shape)} is no uint8 (B, C, H, W)")
        f = features(images).cpu().double()
        if n == 0 and len(f) > 0:
            origin = f[0]  # sums are about one sample: a large mean would cancel digits
        f = f - origin
        n, total, squares = n + len(f), total + f.sum(0), squares + f.T @ f
    if n < 2 or not torch.isfinite(total).all():
        raise ValueError("at least two images are needed" if n < 2 else "features are not finite")
    covariance = (squares - torch.outer(total, total) / n) / (n - 1)
    return (origin + total / n).numpy(), covariance.numpy()


def frechet_distance(mean_1, cov_1, mean_2, cov_2):
    """‖m_1 − m_2‖² + tr(S_1 + S_2 − 2 (S_1 S_2)^½), at least 0; ValueError for NaN.

    means (D,), covariances (D, D), float64.  With S_i = A_i A_iᵀ, tr (S_1 S_2)^½ is the sum of
    the singular values of A_1ᵀ A_2, so that singular covariances need no special care.
    """
    if np.shape(mean_1) != np.shape(mean_2):
        raise ValueError(f"means {np.shape(mean_1)} and {np.shape(mean_2)}: not of one shape")
    (s_1, V_1), (s_2, V_2) = scipy.linalg.eigh(cov_1), scipy.linalg.eigh(cov_2)
    A_1, A_2 = V_1 * np.sqrt(s_1.clip(0)), V_2 * np.sqrt(s_2.clip(0))
    root = scipy.linalg.svdvals(A_1.T @ A_2).sum()
    shift = np.asarray_chkfinite(mean_1 - mean_2)
    return max(0.0, float(shift @ shift + np.trace(cov_1 + cov_2) - 2 * root))  # but for rounding


# §8  Data: a uint8 tensor (N, C, H, W), an int64 tensor (N,) of labels, and the labels' names ---

TORCHVISION = {"mnist": torchvision.datasets.MNIST, "cifar10": torchvision.datasets.CIFAR10,
               "fashion-mnist": torchvision.datasets.FashionMNIST}
IMAGES = {*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".avif", ".heic", ".heif"}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # image generators store megabytes of text in a PNG


def in_batches(n, batch, what):
    """0..n − 1 in ranges of `batch`, with a line of progress after each."""
    since = time.perf_counter()
    for i in range(0, n, batch):
        part = range(n)[i : i + batch]
        yield part
        rate = part.stop / (time.perf_counter() - since)
        left = timedelta(seconds=int((n - part.stop) / rate))
        with contextlib.suppress(OSError):  # of a reader that is gone: the work goes on
            end = "" if part.stop < n else "\n"
            print(f"\r{what} {part.stop:,}/{n:,}  {rate:,.1f}/s  {left} left", end=end, flush=True)


@contextlib.contextmanager
def atomic(file):
    """An open file that replaces `file` when the block ends: whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in file.parent.glob("????????.fm-tmp"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 86400:  # of a process that was killed
                old.unlink()
    temporary = file.with_name(f"{os.urandom(4).hex()}.fm-tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        for seconds in (0.2, 1, 4):  # Windows keeps a file that a viewer has open
            with contextlib.suppress(PermissionError):
                return os.replace(temporary, file)
            time.sleep(seconds)
        os.replace(temporary, file)
    except OSError as error:
        raise OSError(f"{file} was not written, is the disk full? ({error})") from None
    finally:
        with contextlib.suppress(OSError):  # which would hide the error that led here
            temporary.unlink()


def draw_digits(n, size, seed=0):
    """n grey digits in Pillow's own font, each scaled, slanted, rotated, moved and thickened."""
    rng, big = np.random.default_rng(seed), 4 * size  # drawn large, then averaged: smooth edges
    labels, strokes = rng.integers([[10], [1 + size // 8]], size=(2, n))
    angle, slant, x, y = rng.normal(0, [[0.08], [0.1], [0.04], [0.04]], (4, n))
    cos, sin, scale = np.cos(angle), np.sin(angle), rng.uniform(0.9, 1.1, n)
    maps = np.array([[cos, sin + slant, x], [-sin, cos, y]]) / scale  # from a pixel to its source
    images, font = np.empty((n, 1, size, size), np.uint8), ImageFont.load_default(big)
    for digit, stroke in sorted({*zip(labels.tolist(), strokes.tolist(), strict=True)}):
        canvas, middle = Image.new("L", (big, big)), (big / 2, big / 2)
        ImageDraw.Draw(canvas).text(middle, str(digit), 255, font, "mm", stroke_width=stroke)
        glyph = F.avg_pool2d(pil_to_tensor(canvas)[None].float(), 5, stride=1, padding=2)
        mine = np.flatnonzero((labels == digit) & (strokes == stroke))
        theta = torch.tensor(maps[:, :, mine], dtype=torch.float32).permute(2, 0, 1)
        grid = F.affine_grid(theta, (len(mine), 1, size, size), align_corners=False)
        glyphs = glyph.expand(len(mine), -1, -1, -1)
        images[mine] = F.grid_sample(glyphs, grid, align_corners=False).round().byte()
    return torch.from_numpy(images), torch.from_numpy(labels), list("0123456789")


def decode(file, size, bad):
    """An image file's central square, upright, as RGB bytes in (3, size, size) order.

    What does not decode is added to the list `bad`, and has no bytes.
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


def load_folder(folder, data_dir, size):
    """All images below a folder.  Its subfolders are the classes; images beside them have none.

    They are decoded once, into a memory-mapped file in data_dir that need not fit in memory.
    """
    root, classes, others = Path(os.path.realpath(folder)), {}, []
    for name in sorted(glob.glob("**/*", root_dir=root, recursive=True)):
        path = root / name  # glob follows links and skips hidden names
        above = Path(os.path.realpath(path.parent))  # a link to what it lies in is a circle
        if not os.access(path, os.R_OK) or above.is_relative_to(os.path.realpath(path)):
            raise ValueError(f"{path} is a broken link, a link in a circle, or not to be read")
        if path.is_file() and path.suffix.lower() in IMAGES:
            classes[path] = unicodedata.normalize("NFC", os.path.dirname(name)).split(os.sep)[0]
        elif not path.is_dir() or not any(path.iterdir()):  # another file, an empty folder
            others.append(path.suffix or name)
    if others:
        print(folder, "left out:", *(f"{n:,} {end}" for end, n in sorted(Counter(others).items())))
    if not classes:
        raise ValueError(f"{folder} is no folder with images, nor digits, {', '.join(TORCHVISION)}")
    names = sorted({*classes.values()} - {""})
    if {name.lower() for name in names} <= SPLITS and len(names) > 1:
        raise ValueError(f"{folder} holds splits, not classes: name one, as {root / names[0]}")
    index = {name: i for i, name in enumerate([*names, ""])}  # "": label K, no class
    labels = torch.tensor([index[name] for name in classes.values()])
    stats = [(f, f.stat()) for f in classes]
    content = [size, *((str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in stats)]
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    cache, shape = Path(data_dir, f"{root.name[:40]}-{key}.raw"), (len(classes), 3, size, size)
    if not cache.is_file() or cache.stat().st_size != math.prod(shape):
        bad = []
        with atomic(cache) as f, ThreadPoolExecutor() as pool:
            for part in in_batches(len(stats), 256, "decoding"):
                f.writelines(pool.map(lambda i: decode(stats[i][0], size, bad), part))
            if bad:
                raise ValueError(f"{len(bad)} files are no images: {'; '.join(sorted(bad))}")
    images = torch.from_file(str(cache), size=math.prod(shape), dtype=torch.uint8).reshape(shape)
    if all(torch.equal(part[:, :2], part[:, 1:]) for part in images.split(1000)):
        images = images[:, :1]  # all grey
    return images, labels, names


def load_data(name, data_dir, size, test=False):
    """The data of a --data argument, downloaded if need be; test: not the training split."""
    if name == "digits":
        return draw_digits(20_000, size, seed=int(test))
    if name not in TORCHVISION:
        if test:
            raise ValueError(f"the folder {name} has no test split: name a folder instead")
        return load_folder(name, data_dir, size)
    try:
        data = TORCHVISION[name](data_dir, train=not test, download=True)
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"{name} is not whole in {data_dir} nor downloaded ({error}): name "
                         "its folder with --data-dir, or use --data digits") from None
    if len(data.data) != len(data.targets):
        raise ValueError(f"{name} in {data_dir}: {len(data.targets)} labels of {len(data.data)}")
    images = torch.as_tensor(data.data)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    images = torch.cat([resize(part, [size, size]) for part in images.split(1000)])
    return images.contiguous(), torch.as_tensor(data.targets), data.classes


def to_uint8(x):
    """float in [-1, 1], clipped, to uint8: the inverse of to_float for all 256 levels."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def picture_grid(images, columns):
    """uint8 (N, C, H, W) as one Pillow image, small pixels enlarged."""
    grid = to_pil_image(torchvision.utils.make_grid(images, columns, padding=1, pad_value=128))
    return ImageOps.scale(grid, max(1, 768 // grid.width), Image.NEAREST)


# §9  Training  (needs all above) ----------------------------------------------------------------

TRAIN = dict(  # the flags of train, kept in a checkpoint; "": run_train chooses, None: train
    data="digits", path="ot", classes=False, coupling="independent", time="logit-normal",
    data_dir="data", size=16, width=32, mults=[1, 2, 2], blocks=1, attention=[], dropout=0.0,
    label_drop=0.1, batch=32, optimizer="muon", lr=5e-3, warmup=50, steps=1000, ema=0.995,
    flip=False, clip=1.0, seed=0, log_every=50, save_every=500, device="", amp="", compile=None,
    out="", overwrite=False, resume=False)
RECIPES = {  # what a data set changes in them
    "digits": dict(size=16),
    "mnist": dict(size=28, width=16, mults=[1, 2, 4], steps=4000),
    "fashion-mnist": dict(size=28, width=16, mults=[1, 2, 4], steps=4000, flip=True),
    "cifar10": dict(size=32, width=128, mults=[1, 2, 2, 2], blocks=2, attention=[16], dropout=0.1,
                    time="uniform", optimizer="adamw", batch=128, lr=2e-4, warmup=5000,
                    steps=400_000, ema=0.9999, flip=True, save_every=5000),
    "folder": dict(size=32, width=64, blocks=2, attention=[8], time="uniform", optimizer="adamw",
                   batch=64, lr=1e-3, warmup=200, steps=20_000, ema=0.999, save_every=1000),
}
SAMPLE = dict(ckpt="", n=64, guidance=1.0, solver="midpoint", steps=20, tolerance=1e-5, seed=0,
              batch=128, device="", amp="", compile=False)
MAY_BE_0 = ("seed", "dropout", "label_drop", "warmup", "ema", "guidance", "attention")
AT_MOST_1 = ("dropout", "label_drop", "ema", "tolerance")
AMP = dict(bf16=torch.bfloat16, fp16=torch.float16)  # mixed precision: the type of matrix work


def check_flags(flags):
    """ValueError for "" or a number that is not above 0 (MAY_BE_0: or 0) or above 1 (AT_MOST_1)."""
    for flag, value in flags.items():
        low, high = 0 if flag in MAY_BE_0 else 1e-12, 1 if flag in AT_MOST_1 else 1e12
        values = (value or [0]) if isinstance(value, list) else [value]  # "none" counts as 0
        name = flag.replace("_", "-")
        if value == "":
            raise ValueError(f"--{name} is empty")
        if not all(low <= x <= high for x in values if type(x) in (int, float)):
            raise ValueError(f"--{name} {value} is not from {low:g} to {high:g}")


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for convolutions (K. Jordan, kellerjordan.github.io/posts/muon).

    Of the momentum U S Vᵀ of a kernel, as a matrix, it steps by about U Vᵀ: weak directions learn
    as fast as strong ones.  A group holds kernels of one shape, which step together.
    """

    @torch.no_grad()
    def step(self):
        for kernels, lr in ((group["params"], group["lr"]) for group in self.param_groups):
            G = torch.stack([kernel.grad for kernel in kernels]).flatten(2)  # (n, c_out, k² c_in)
            state = self.state[kernels[0]]  # of the whole group
            momentum = state.setdefault("momentum", torch.zeros_like(G))
            X = G.lerp(momentum.lerp_(G, 0.1), 0.9)  # Nesterov's look ahead
            X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-12)
            for _ in range(3):  # Newton-Schulz: singular values above 0.02 come to 0.68..1.21
                A = X @ X.mT
                X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
            X = lr * 0.2 * max(X.shape[1:]) ** 0.5 * X  # AdamW's RMS is 0.2: arXiv 2502.16982
            torch._foreach_sub_(kernels, list(X.view(-1, *kernels[0].shape)))


def draw_batch(images, labels, config, step, device):
    """The batch of a step, over all ranks: x_1, y, x_0, t.  A pure function of (seed, step)."""
    torch.manual_seed(hash((config.seed, step)))
    B, K = config.batch, len(config.names)
    index = torch.randint(len(images), (B,), device=images.device)
    x_1, y = to_float(images[index].to(device)), labels[index].to(device)
    if config.flip:
        x_1 = torch.where(torch.rand(B, 1, 1, 1, device=device) < 0.5, x_1.flip(3), x_1)
    x_0 = torch.randn(x_1.shape, device=device)
    if config.coupling == "ot":
        x_0 = ot_coupling(x_0, x_1, y if K else None)
    if K:  # label K is "no label", for guidance
        y = torch.where(torch.rand(B, device=device) < config.label_drop, K, y)
    t = torch.rand(B, device=device)
    if config.time == "logit-normal":  # rarer near 0 and 1, where there is less to learn
        t = torch.randn(B, device=device).sigmoid()
    return x_1, y, x_0, t


def build(config, device, checkpoint=None):
    """A config's model, ema, optimizers and scaler by name, in the state that a checkpoint kept."""
    torch.manual_seed(config.seed)
    layout = torch.contiguous_format if device == "mps" else torch.channels_last
    model, groups = Velocity(config).to(device, memory_format=layout), {}
    for p in model.parameters():
        hidden = config.optimizer == "muon" and p.dim() == 4 and min(p.shape[:2]) >= 16
        groups.setdefault(p.shape if hidden else "others", []).append(p)
    parts = dict(model=model, ema=copy.deepcopy(model).eval().requires_grad_(False),
                 adamw=torch.optim.AdamW(groups.pop("others"), lr=0.0, weight_decay=0, fused=True),
                 scaler=torch.amp.GradScaler(device, enabled=config.amp == "fp16"))
    if groups:  # train_step sets both rates
        parts["muon"] = Muon([dict(params=group) for group in groups.values()], dict(lr=0.0))
    for name, part in parts.items():
        if checkpoint and (name != "scaler" or checkpoint[name]):  # {} unless the run was in fp16
            part.load_state_dict(checkpoint[name])
    return parts


def load(file, device="cpu"):
    """The dict that save() wrote, and its velocity with EMA weights; ValueError if damaged."""
    if not Path(file).is_file():
        raise ValueError(f"there is no checkpoint {file}: train first, or name another")
    try:
        if damaged := zipfile.ZipFile(file).testzip():  # torch.load does not check the sums
            raise ValueError(f"damaged at {damaged}")
        checkpoint = dict(torch.load(file, map_location="cpu", weights_only=True))  # runs no code
        flags = checkpoint["config"] | dict(steps=checkpoint["step"])  # a step is checked as steps
        check_flags({k: flags[k] for k in TRAIN if flags[k] != ""})
        alike = all(type(flags[k]) is type(v) for k, v in TRAIN.items() if k != "compile")
        if not alike or flags["path"] not in PATHS or type(checkpoint["log"]) is not list:
            raise ValueError("flags, a path or a log of another kind")
        ema = build(argparse.Namespace(**checkpoint["config"]), device, checkpoint)["ema"]
        if not all(p.isfinite().all() for p in ema.parameters()):
            raise ValueError("weights are not finite")
    except Exception as error:  # torch, and a foreign dict, raise a dozen kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise ValueError(f"{file} is no whole checkpoint of this version ({reason})") from None
    return checkpoint, ema


def make_images(velocity, args, nfes, label=""):
    """Images of the noises 0..n − 1 of a seed: yields uint8 batches, adds the NFE of each to nfes.

    args: all of SAMPLE.  With classes, image i is of `label`, or of class i mod K.
    """
    config, names, device = velocity.config, velocity.config.names, args.device
    if label not in ["", *names]:
        raise ValueError(f"--label {label}: this model, of --classes, knows {names}")
    if args.guidance != 1 and not (names and config.label_drop):
        raise ValueError("--guidance needs a model trained with --classes and a --label-drop")
    classes = [names.index(label)] if label else range(len(names))
    if args.compile:
        velocity = compiled(velocity, device)
    for part in in_batches(args.n, args.batch, "images"):
        noise = draw_noise(args.seed, part, (config.channels, config.size, config.size))
        y = torch.tensor([classes[i % len(classes)] for i in part]).to(device) if names else None
        with torch.autocast(device, AMP.get(args.amp), enabled=args.amp in AMP):
            x, nfe = sample(guided(velocity, y, args.guidance), noise.to(device),
                            PATHS[config.path], solver=args.solver, steps=args.steps,
                            tolerance=args.tolerance)
        nfes += [nfe * (1 if args.guidance == 1 else 2)] * len(part)
        yield to_uint8(x).cpu()


def save(config, step, parts, log, grid):
    """In config.out: a grid of samples of the EMA weights, if one is due, then the checkpoint."""
    if grid:  # first: odeint raises for weights that are not finite, and they are not saved
        args = argparse.Namespace(**SAMPLE | dict(device=config.device))
        with contextlib.redirect_stdout(io.StringIO()):
            images = torch.cat([*make_images(parts["ema"], args, [])])
        with atomic(Path(config.out, f"step-{step:06d}.png")) as f:
            picture_grid(images, 8).save(f, "PNG")
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    with atomic(Path(config.out, "checkpoint.pt")) as f:
        try:
            torch.save(checkpoint | dict(step=step, config=vars(config), log=log), f)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(error) from None


def compiled(model, device):
    """The model through torch.compile, if that works here; else as it is, and a line says why."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        return torch.compile(model)
    except Exception as error:  # no compiler, no Python.h, no Triton, ...
        print("not compiled:", " ".join(f"{type(error).__name__}: {error}".split())[:150])
        return model


def start_ranks(device):
    """rank, number of ranks, device; under torchrun a process drives a GPU, or shares the CPU."""
    if "RANK" not in os.environ:
        return 0, 1, torch.device(device)
    backend, gpu = "gloo", None
    if device == "cuda":
        backend, gpu = "cpu:gloo,cuda:nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(gpu)
    dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=gpu)  # one may decode
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks
    return dist.get_rank(), dist.get_world_size(), gpu or torch.device(device)


def train_step(model, parts, step, batch):
    """One step of the optimizers and of the EMA: the loss, the gradient's norm before clipping."""
    velocity, scaler, config = parts["model"], parts["scaler"], parts["model"].config
    x_1, y, x_0, t = batch
    with torch.autocast(t.device.type, AMP.get(config.amp), enabled=config.amp in AMP):
        _, _, c_out = velocity.scales(t)
        v = functools.partial(model, y=y)
        loss = cfm_loss(v, PATHS[config.path], x_1, x_0, t, weight=c_out**-2)
    scaler.scale(loss).backward()
    optimizers = [parts[name] for name in ("adamw", "muon") if name in parts]
    warm_up = min(1, step / max(1, config.warmup))
    decay = 1 - (step - 1) / config.steps  # linear; 0 would be the step after the last
    for optimizer in optimizers:
        scaler.unscale_(optimizer)  # before clipping
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warm_up * decay
    norm = nn.utils.clip_grad_norm_(velocity.parameters(), config.clip)
    if not scaler.is_enabled() or norm.isfinite():  # fp16 skips an overflow
        for optimizer in optimizers:
            optimizer.step()
    scaler.update()
    velocity.zero_grad()
    keep = min(config.ema, (1 + step) / (10 + step))  # soon forgets the initial weights
    with torch.no_grad():
        torch._foreach_lerp_([*parts["ema"].parameters()], [*velocity.parameters()], 1 - keep)
    return torch.stack([loss.detach(), norm])


def train(config, checkpoint, stops):
    """Train by a config, all of TRAIN; fills config.out with checkpoint.pt, log.jsonl and grids.

    Resumed from what load() read, a CPU's run is bit for bit the unbroken one.  stops: a list;
    once a signal is in it, the run ends with a checkpoint.  Returns the last step.
    """
    rank, world, device = start_ranks(config.device)
    first = world == 1 or os.environ["LOCAL_RANK"] == "0"  # of its machine: the others wait
    if not first:
        dist.barrier()
    images, labels, names = load_data(config.data, config.data_dir, config.size)
    if first and world > 1:
        dist.barrier()
    if config.batch % world or config.classes and len(names) < 2:
        raise ValueError(f"--batch must be divisible by the {world} ranks, and --classes needs "
                         f"class subfolders: {config.data} has {len(names)}")
    rms = to_float(images[:: 1 + len(images) // 1000]).square().mean().sqrt().item()
    found = dict(channels=images.shape[1], names=names if config.classes else [])
    config = argparse.Namespace(**found | dict(data_rms=rms) | vars(config))  # a checkpoint's win
    if not found.items() <= vars(config).items():
        raise ValueError(f"{config.data} has other channels or classes than {config.out}")
    if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[1] / 4:
        images, labels = images.to(device), labels.to(device)

    parts = build(config, device.type, checkpoint)
    velocity = parts["model"]  # it is saved and averaged without the wrappers that follow
    model = nn.parallel.DistributedDataParallel(velocity) if world > 1 else velocity
    long = device.type == "cuda" and config.steps >= 5000  # compiling takes a minute
    if config.compile or (config.compile is None and long):
        model = compiled(model, device)
    torch.backends.cudnn.benchmark = True  # shapes are fixed
    start, log = (checkpoint["step"], checkpoint["log"]) if checkpoint else (0, [])
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if config.overwrite and not checkpoint and rank == 0:
        for file in [*out.glob("step-[0-9]*.png"), *out.glob("checkpoint.pt")]:
            file.unlink()
    logged = open(os.devnull if rank else out / "log.jsonl", "w", buffering=1)
    logged.writelines(json.dumps(row) + "\n" for row in log)  # anew, from the checkpoint
    print(f"{config.data}: {len(images):,} images of {(*images.shape[1:],)}, {len(names)} classes",
          *names[:5], f"\n{sum(p.numel() for p in velocity.parameters()):,} parameters, path "
          f"{config.path}, amp {config.amp}, {world} x {device} with {config.batch // world} images"
          f" each; {config.steps:,} steps into {out}/")

    since, seen = time.perf_counter(), []
    for step in range(start + 1, config.steps + 1):  # fp16, coupling and logs wait for the GPU
        batch = draw_batch(images, labels, config, step, device)
        torch.manual_seed(hash((config.seed, step, rank)))  # dropout differs between ranks
        mine = [part.chunk(world)[rank] for part in batch]
        seen.append(train_step(model, parts, step, mine))

        stopping = torch.tensor(len(stops))
        if world > 1:  # ranks leave together
            dist.all_reduce(stopping)
        saving = stopping > 0 or step % config.save_every == 0 or step == config.steps
        if not saving and step % config.log_every:
            continue
        losses, norms = torch.stack(seen, 1)
        finite = norms.isfinite().tolist()
        if not all(finite) and parts["scaler"].get_scale() <= 1:  # 1: off, or often halved
            bad = step - len(seen) + 1 + finite.index(False)
            raise FloatingPointError(f"the gradient of step {bad} is not finite; the last "
                                     "checkpoint is kept: try a lower --lr")
        loss = losses.mean() / world
        if world > 1:
            dist.all_reduce(loss)
        rate = len(seen) / (time.perf_counter() - since)
        left = timedelta(seconds=int((config.steps - step) / rate))
        log.append(dict(step=step, loss=loss.item(), images_per_second=config.batch * rate))
        print(json.dumps(log[-1]), file=logged)
        try:
            print(f"step {step:,}/{config.steps:,}  {config.batch * rate:,.0f} images/s  "
                  f"{left} left  loss {loss:.4f}", flush=True)
        except OSError:  # nobody reads what is printed: stop after the next step
            stops.append(signal.SIGTERM)
        if saving and rank == 0:
            save(config, step, parts, log, grid=not stopping)
        if stopping:
            break
        since, seen = time.perf_counter(), []
    if world > 1:
        dist.barrier()  # destroyed in the middle of an all-reduce, gloo can wait for ever
        dist.destroy_process_group()
    return step


# §10  The theory, drawn: the exact field of Eq. 8 in the plane, without a network  (needs all) ---


def measure_paths(means, tau, particles=1000, seed=0):
    """How well few evaluations follow the exact field: {(path, solver, NFE): (landed, error)}.

    landed: share of particles within 3τ of a mean; error: mean squared, against 1000 rk4 steps.
    """
    noise, table = draw_noise(seed, range(particles), (2,)), {}
    for name, path in PATHS.items():
        v = functools.partial(marginal_velocity, path, means=means, tau=tau)
        exact, _ = sample(v, noise, path, solver="rk4", steps=1000)
        for solver, calls in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
            for nfe in (8, 12, 20, 40, 60, 100):
                x, _ = sample(v, noise, path, solver=solver, steps=nfe // calls)
                landed = (torch.cdist(x, means).amin(1) < 3 * tau).float().mean().item()
                table[name, solver, nfe] = landed, (x - exact).square().mean().item()
    return table


def evaluations_ratio(table, solver="euler"):
    """Evaluations that ot needs over those of vp at equal error: geometric mean, log-log."""
    curves = {path: sorted((math.log(error), math.log(nfe))  # by rising error
                           for (name, by, nfe), (_, error) in table.items()
                           if name == path and by == solver) for path in ("ot", "vp")}
    ot_error, ot_nfe = np.transpose(curves["ot"])
    vp_error, vp_nfe = np.transpose(curves["vp"])
    overlap = (ot_error[0] <= vp_error) & (vp_error <= ot_error[-1])
    return math.exp(np.mean((np.interp(vp_error, ot_error, ot_nfe) - vp_nfe)[overlap]))


def draw_paths(means, tau, seed=0):
    """A picture.  Rows: paths.  Columns: times; 400 particles, and how 24 of them came there."""
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
    return picture_grid(torch.stack(panels), 5)


# §11  Command line ------------------------------------------------------------------------------

# A line a flag: "a | b | text" has the choices a and b; text says what it means.
HELP = f"""
amp        bf16 | fp16 | off | mixed precision; default: by device, off for dopri5
attention  heights of maps to attend at, as 16,8; or none
batch      images at a time; of train: per step, over all ranks
blocks     residual blocks per level
ckpt       checkpoint; default: the newest runs/*/checkpoint.pt
classes    learn to make images of a given class
clip       largest norm of the gradient
compile    torch.compile; default of train: on CUDA from 5000 steps
coupling   independent | ot | ot: minibatch optimal transport
data       digits, {', '.join(TORCHVISION)}, or a folder of images
data_dir   of downloads and decoded images; default of fid, nll: as in training
device     cuda | mps | cpu | default: the fastest here
dropout    share of activations dropped
ema        decay per step of the averaged weights
exact      exact divergence, not Hutchinson's estimate
features   inception | pixels | FID is inception's
flip       mirror images at random
guidance   scale, classifier-free; 1 is none
inception  file of its weights; default: downloaded
k          draws of dequantisation noise per image; the paper: 50
label      class to make; default: all in turn
label_drop share of samples trained without their label
log_every  steps between log lines
lr         peak learning rate
mults      multiples of the width, one per level
n          images; FIDs of papers rest on 50000
optimizer  muon | adamw | muon: for hidden kernels, AdamW elsewhere
out        folder or NAME.png; default: runs/DATA-PATH, samples.png beside --ckpt
overwrite  replace what --out names
path       {' | '.join(PATHS)} | probability path
reference  train or test split, another data set or a folder
results    JSON lines; default: results.jsonl beside --ckpt
resume     go on with --out, or the newest run
save_every steps between checkpoints and grids of samples
seed       of everything random
size       height and width of the images, pixels
solver     {' | '.join(SOLVERS)} | 1, 2, 4 calls a step; dopri5 adapts
steps      of training, or of the solver (fid: as 5,10,20)
time       logit-normal | uniform | density of t; the paper: uniform
tolerance  of dopri5, relative and absolute
warmup     steps of linear warm-up
width      channels at full resolution, a multiple of 4
"""
MAY_CHANGE = {"steps", "data", "data_dir", "log_every", "save_every", "device", "amp", "compile",
              "out", "resume", "overwrite"}  # in a run that goes on


def check_free(out, overwrite):
    """ValueError for a folder NAME.png and, unless overwrite, for what exists and is not empty."""
    if out.suffix.lower() == ".png" and out.is_dir():
        raise ValueError(f"{out} is a folder: name a file")
    if not overwrite and (out.is_file() or any(out.glob("*"))):
        raise ValueError(f"{out} exists: try --overwrite, or train --resume")


def look_around(name):
    """The named or the fastest device, its mixed precision, and the newest checkpoint."""
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name, amp = name or next(k for k in here if here[k]), "off"  # bf16 is mostly slower on a CPU
    try:
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
        torch.ones(1, device=own).add(1).item()
    except (RuntimeError, AssertionError) as error:  # none, or one that torch was not built for
        raise ValueError(f"no {name} works here ({error}): use --device cpu") from None
    if name == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    files = Path("runs").glob("*/checkpoint.pt")  # if there is none, load() says so
    return name, amp, max(files, key=os.path.getmtime, default=Path("runs/*/checkpoint.pt"))


@contextlib.contextmanager
def stop_signals():
    """The list of the stop signals that came.  One that comes again acts as ever."""
    caught, before = [], {}

    def note(number, _):
        caught.append(number)
        signal.signal(number, before[number])
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"stopping after this step; once more stops at once\n")

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) not in (None, signal.SIG_IGN):  # as nohup sets it
            before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_train(defaults, typed):
    """Learn to make images from noise."""
    device, amp, newest = look_around(typed.get("device"))
    data, path = typed.get("data", defaults["data"]), typed.get("path", defaults["path"])
    out = Path(typed.get("out", f"runs/{os.path.basename(os.path.realpath(data))}-{path}"))
    known, checkpoint = RECIPES.get(data, RECIPES["folder"]), None
    if typed.get("resume"):
        out = out if typed.keys() & {"out", "data", "path"} else newest.parent
        checkpoint, _ = load(out / "checkpoint.pt")
        known = checkpoint["config"]
        for flag in typed.keys() - MAY_CHANGE:
            if typed[flag] != known[flag]:
                name = flag.replace("_", "-")
                raise ValueError(f"--{name} cannot change: {out} began with {known[flag]}")
    here = dict(device=device, out=str(out))
    config = argparse.Namespace(**defaults | dict(amp=amp) | known | typed | here)  # the last wins
    if (device, config.amp) == ("mps", "fp16"):
        raise ValueError("--amp fp16: its loss scaling does not work on mps; take bf16 or off")
    if Path(config.data).is_dir() and out.resolve().is_relative_to(Path(config.data).resolve()):
        raise ValueError(f"--out {out} is inside --data {config.data}")
    if not checkpoint:
        check_free(out, config.overwrite)
    elif checkpoint["step"] >= config.steps:
        raise ValueError(f"{out} is at step {checkpoint['step']:,}: ask for more --steps")
    with stop_signals() as caught:
        step = train(config, checkpoint, caught)
    if step < config.steps:
        with contextlib.suppress(OSError):
            print("go on with: python flow_matching.py train --resume --out", shlex.quote(str(out)))
        sys.exit(128 + (caught or [signal.SIGTERM])[0])  # empty: another rank's, or no reader


def open_model(defaults, typed):
    """All flags, the velocity with EMA weights and, for fid and nll, the reference images."""
    device, amp, newest = look_around(typed.get("device"))
    file = Path(typed.get("ckpt", newest))
    checkpoint, velocity = load(file, device)
    config = velocity.config
    if "amp" not in defaults or typed.get("solver", defaults["solver"]) == "dopri5":
        amp = "off"  # nll has no amp; dopri5 would take the rounding for its error
    known = dict(ckpt=str(file), device=device, amp=amp, data_dir=config.data_dir,
                 results=str(file.with_name("results.jsonl")))
    if config.data not in ("digits", *TORCHVISION):
        known["reference"] = "train"  # a folder has no test split
    args = argparse.Namespace(**defaults | known | typed)
    if args.solver == "dopri5" and "steps" in typed:
        raise ValueError("dopri5 chooses its steps: leave out --steps, or take --solver rk4")
    print(f"{file}: {config.data}, path {config.path}, step {checkpoint['step']:,}, EMA weights")
    if "reference" not in defaults:
        return args, velocity
    data = config.data if args.reference in ("train", "test") else args.reference
    images, _, _ = load_data(data, args.data_dir, config.size, args.reference == "test")
    if images.shape[1] != config.channels:
        raise ValueError(f"{data} has {images.shape[1]} channels, the model {config.channels}")
    open(args.results, "a").close()  # what cannot be written is said before the work
    return args, velocity, images


def run_sample(args, velocity):
    """Make images from the EMA weights of a checkpoint: a grid, or one PNG per image."""
    out = Path(args.out or Path(args.ckpt).with_name("samples.png"))
    check_free(out, args.overwrite or not args.out)
    marks = {name: "-" + name.replace("/", "_") for name in velocity.config.names} | {"": ""}
    label = unicodedata.normalize("NFC", args.label)  # as load_folder does
    names, nfes = [label] if label else velocity.config.names or [""], []
    images = (image for part in make_images(velocity, args, nfes, label) for image in part)
    if out.suffix.lower() == ".png":
        columns = len(names) * max(1, round(args.n**0.5 / len(names)))  # about square
        with atomic(out) as f:  # opened first: what can't be written is said before the work
            picture_grid(torch.stack([*images]), columns).save(f, "PNG")
    else:
        out.mkdir(parents=True, exist_ok=True)
        old = {file for mark in marks.values()  # of a run that --overwrite replaces
               for file in out.glob("[0-9]" * 6 + glob.escape(f"{mark}.png"))}
        for i, image in enumerate(images):
            file = out / f"{i:06d}{marks[names[i % len(names)]]}.png"
            to_pil_image(image).save(file)
            old.discard(file)
        for file in old:
            file.unlink()
    print(f"{out}: {args.n:,} images, {args.solver}, NFE {np.mean(nfes):g}, amp {args.amp}")


def report(args, text, since, nfes, **row):
    """Keep a row of results, with all flags; then print it."""
    row |= dict(nfe=np.mean(nfes), seconds=time.perf_counter() - since)
    with open(args.results, "a") as results:
        print(json.dumps(vars(args) | row), file=results)
    print(f"{text}, {args.solver}, NFE {row['nfe']:g}, {row['seconds']:.1f} s", flush=True)


def run_fid(args, velocity, images):
    """Fréchet distance between real images and those of a checkpoint, classes in equal numbers."""
    features, D, title = pixels, images[0].numel(), "Fréchet distance of pixels"
    if args.features == "inception":
        features, D, title = inception(args.inception, args.device), 2048, "FID"
    elif args.inception or D > 4096:
        raise ValueError("pixels take no --inception, and images of at most 4096 numbers")
    parts = (images[part] for part in in_batches(len(images), 1000, "reference"))
    real = fit_gaussian(parts, features)
    for steps in args.steps:
        one = argparse.Namespace(**vars(args) | dict(steps=steps))
        nfes, since = [], time.perf_counter()
        made = fit_gaussian(make_images(velocity, one, nfes), features)
        distance = frechet_distance(*made, *real)
        text = f"{title} {distance:.4f}: {args.n:,} made, {len(images):,} of {args.reference}"
        report(one, text, since, nfes, frechet_distance=distance, n_reference=len(images))
    if args.n < 50_000:
        print("under 50,000 images: not comparable with papers")
    if min(args.n, len(images)) <= D:
        print(f"no more images than {D:,} features: a covariance is singular")


def run_nll(args, velocity, images):
    """Bits per dimension of images, -log2 p(image) / numbers in an image, without a class."""
    config = velocity.config
    if config.names and not config.label_drop:
        raise ValueError("nll needs a model that knows images without a class, by --label-drop")
    n, K, shape = min(args.n, len(images)), args.k, images.shape[1:]
    if n < 2:
        raise ValueError("nll needs at least two images, for its standard error")
    chosen = np.random.default_rng(args.seed).permutation(len(images))
    log_p, nfes, since = [], [], time.perf_counter()
    for part in in_batches(n * K, args.batch, "densities"):
        rows = [j // K for j in part]
        u = torch.special.ndtr(draw_noise((args.seed, 1), part, shape))  # Φ(normal) is uniform
        x = (images[chosen[rows]] + u) / 128 - 1
        # one draw of signs for the K draws of an image: independent errors of the estimate would
        # raise bits_per_dim's mean of exponentials
        signs = draw_noise((args.seed, 2), rows, shape).sign().to(args.device)
        one, nfe = log_likelihood(velocity, x.to(args.device), PATHS[config.path],
                                  None if args.exact else [signs], solver=args.solver,
                                  steps=args.steps, tolerance=args.tolerance)
        log_p.append(one.cpu().double())
        nfes += [nfe] * len(part)
    bits = bits_per_dim(torch.cat(log_p).reshape(n, K), math.prod(shape))
    mean, error = bits.mean().item(), bits.std().item() / n**0.5
    text = (f"{mean:.4f} ± {error:.4f} bits/dim: {n:,} images of {args.reference}, K = {K}, "
            f"{'exact' if args.exact else 'Hutchinson'} divergence")
    report(args, text, since, nfes, bits_per_dim=mean, standard_error=error, n=n)


def run_paths(defaults, typed):
    """Draw the theory: the exact field of Eq. 8, as a picture and a table, without a network."""
    args = argparse.Namespace(**defaults | typed)
    check_free(Path(args.out), args.overwrite)
    angles = torch.arange(8) * math.pi / 4
    means, tau = 2 * torch.stack([angles.cos(), angles.sin()], 1), 0.1
    table = measure_paths(means, tau, seed=args.seed)
    print("landed: within 3 tau of a mean; error: mean squared, against 1000 rk4 steps\n"
          "solver    NFE" + "".join(f"   {name} landed  error " for name in PATHS))
    for solver, nfe in dict.fromkeys(key[1:] for key in table):
        cells = [table[name, solver, nfe] for name in PATHS]
        print(f"{solver:9}{nfe:4}" + "".join(f"    {a:7.1%}  {b:.1e}" for a, b in cells))
    with atomic(Path(args.out)) as f:
        draw_paths(means, tau, args.seed).save(f, "PNG")
    print(f"at equal error, ot needs {evaluations_ratio(table):.0%} of vp's evaluations (euler)\n"
          f"wrote {args.out}")


COMMANDS = {
    "train": (run_train, TRAIN),
    "sample": (run_sample, SAMPLE | dict(label="", out="", overwrite=False)),
    "fid": (run_fid, SAMPLE | dict(n=50_000, steps=[20], features="inception", inception="",
                                   reference="train", data_dir="", results="")),
    "nll": (run_nll, dict(ckpt="", n=128, k=1, exact=False, solver="dopri5", steps=20, batch=32,
                          tolerance=1e-5, seed=0, device="", reference="test", data_dir="",
                          results="")),
    "paths": (run_paths, dict(seed=0, out="paths.png", overwrite=False)),
}


def add_flags(parser, defaults):
    """A flag for each default, of its type, with its line of HELP."""
    texts = dict(line.split(maxsplit=1) for line in HELP.strip().split("\n"))

    def integers(text):  # "1,2,2" is [1, 2, 2], "none" is []
        return [] if text == "none" else [int(part) for part in text.split(",")]

    for flag, default in defaults.items():
        *choices, text = texts[flag].split(" | ")
        how = dict(type=type(default), choices=choices or None)
        if isinstance(default, bool | None):
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(default, list):
            how, default = dict(type=integers), ",".join(map(str, default)) or "none"
        text += "" if default in ("", None) else f" (default: {default})"
        parser.add_argument("--" + flag.replace("_", "-"), help=text, **how)


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # of a terminal without ± or é
    style = dict(argument_default=argparse.SUPPRESS,  # only what was typed
                 usage=argparse.SUPPRESS,  # an error is one line
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    about, *examples = __doc__.split("\n")
    parser = argparse.ArgumentParser("flow_matching.py", description=about, **style)
    commands = parser.add_subparsers(dest="command", required=True, prog=parser.prog)
    for name, (run, defaults) in COMMANDS.items():
        lines = ["examples:", *(line for line in examples if f".py {name}" in line)]
        if defaults is TRAIN:
            lines += [f"changed by --data {data}: {recipe}" for data, recipe in RECIPES.items()]
        add_flags(commands.add_parser(name, help=run.__doc__, description=run.__doc__,
                                      epilog="\n".join(lines), **style), defaults)
    typed, unknown = parser.parse_known_args(argv)
    typed = vars(typed)
    name = typed.pop("command")
    run, defaults = COMMANDS[name]
    refuse = commands.choices[name].error  # prints one line, exits with status 2
    if unknown:
        refuse(f"unrecognized arguments: {' '.join(unknown)}")
    torch.backends.cudnn.allow_tf32 = False  # it keeps three digits; whoever wants speed has bf16
    try:
        check_flags(typed)
        run(*open_model(defaults, typed) if "ckpt" in defaults else (defaults, typed))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as problem:
        text = " ".join(str(problem).split())
        if isinstance(problem, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
            refuse("out of memory: lower --batch, --size or --width")
        if not isinstance(problem, ValueError | OSError | FloatingPointError):
            raise  # a fault of the code keeps its traceback
        refuse(text)


if __name__ == "__main__":
    main()
