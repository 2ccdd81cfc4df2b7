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
    fonts = [ImageFont.load_default(big * s) for s in np.linspace(0.9, 1.15, 6)]
    for image, label in zip(images, labels):
        canvas = Image.new("L", (big, big))
        font, stroke = fonts[rng.integers(len(fonts))], int(rng.integers(1 + big // 32))
        middle = (big / 2, big / 2)
        ImageDraw.Draw(canvas).text(middle, str(label), 255, font, anchor="mm", stroke_width=stroke)
        angle, slant = rng.normal(0, 0.12), rng.normal(0, 0.15)
        a, b, c, d = math.cos(angle), math.sin(angle) + slant, -math.sin(angle), math.cos(angle)
        x, y = middle + rng.normal(0, 0.03 * big, 2)
        matrix = (a, b, big / 2 - a * x - b * y, c, d, big / 2 - c * x - d * y)
        canvas = canvas.transform((big, big), Image.Transform.AFFINE, matrix, Image.BILINEAR)
        image[0] = canvas.resize((size, size), Image.BOX)
    return torch.from_numpy(images), torch.from_numpy(labels), list("0123456789")


def load_torchvision(name, data_dir, size):
    """mnist, fashion-mnist or cifar10 from data_dir, downloaded into it if they are not there."""
    kind = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}[name]
    try:
        data = getattr(torchvision.datasets, kind)(data_dir, train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{kind} is not in {data_dir} and could not be downloaded ({error}): name "
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
    load = load_torchvision if name in RECIPES else load_folder
    return load(name, data_dir, size)


def to_float(images):
    """uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1], clipped, to uint8: the inverse of to_float for all 256 levels."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def save_grid(images, file, columns=None):
    """uint8 (N, C, H, W) as one picture, square unless columns is given, small pixels enlarged."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    grid = torchvision.utils.make_grid(images, columns, padding=1, pad_value=128)
    zoom = max(1, 768 // grid.shape[-1])
    save_image(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2), file)


def save_image(image, file):
    """uint8 (C, H, W), C = 1 or 3, as a PNG."""
    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
    write_atomically(file, picture.save)


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
                   batch=48, lr=2e-3, warmup=50, steps=1000, ema=0.995, flip=False),
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
    net = UNet(**{k: config[k] for k in keys})
    plain = config["path"] == "ot"  # Eq. 23 needs no help; the diffusion paths do
    return Velocity(net, None if plain else PATHS[config["path"]], config["data_rms"])


def draw_batch(images, labels, config, step, device, rank=0, world=1):
    """This rank's part of the global batch of a step: x_1, y, x_0, t.

    A pure function of (seed, step): a resumed run, or one on another number of ranks, draws the
    same.  Every rank draws all random numbers and keeps its share of the images.
    """
    torch.manual_seed(seed_from(config["seed"], step))
    B, where = config["batch"], images.device
    index = torch.randint(len(images), (B,), device=where)
    flip = torch.rand(B, device=where) < 0.5
    x_0 = torch.randn(B, *images.shape[1:], device=device)
    t = T_END[config["path"]] * torch.rand(B, device=device)
    mine = slice(rank * B // world, (rank + 1) * B // world)
    index, flip = index[mine], flip[mine]
    x_1 = images[index]
    if config["flip"]:
        x_1 = torch.where(flip[:, None, None, None], x_1.flip(3), x_1)
    x_1 = to_float(x_1.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(seed_from(config["seed"], step, rank))  # dropout differs between ranks
    return x_1, labels[index].to(device, non_blocking=True), x_0[mine], t[mine]


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
    """The dict that train() saved.  weights_only: a hostile file cannot run code."""
    if not Path(file).is_file():
        raise ValueError(f"there is no checkpoint {file}: train first, or name one with --ckpt")
    try:
        checkpoint = torch.load(file, map_location=device, weights_only=True)
        missing = {"model", "ema", "optimizer", "scaler", "step", "config"} - set(checkpoint)
    except Exception as error:  # torch raises half a dozen kinds
        reason = str(error).strip().split("\n")[0][:120]
        raise ValueError(f"{file} is not a whole checkpoint: {reason}") from None
    if missing:
        raise ValueError(f"{file} is not a checkpoint of this program: no {', '.join(missing)}")
    return checkpoint


def load_velocity(file, device):
    """The model of a checkpoint with its EMA weights, its config and its step."""
    checkpoint = load_checkpoint(file, device)
    config = checkpoint["config"]
    try:
        velocity = build_velocity(config)
        velocity.load_state_dict(checkpoint["ema"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise ValueError(f"{file} does not fit its own config: {reason}") from None
    velocity = velocity.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return velocity, config, checkpoint["step"]


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
    config = config | dict(channels=images.shape[1], data_rms=some.square().mean().sqrt().item())

    torch.manual_seed(config["seed"])
    velocity = build_velocity(config).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(velocity).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(velocity.parameters(), lr=config["lr"], fused=True,
                                  weight_decay=config["weight_decay"])
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
        x_1, _, x_0, t = draw_batch(images, labels, config, step, device, rank, world)
        with autocast(device, amp):
            loss = cfm_loss(model, path, x_1, x_0, t, velocity.weight(t))
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
            save_grid(to_uint8(x).cpu(), out / f"step-{step:06d}.png")
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
# §8  Command line
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


COMMON_FLAGS = {  # flag: (default, type or choices, help)
    "device": (None, ["cuda", "mps", "cpu"], "default: the fastest here"),
    "amp": (None, ["bf16", "fp16", "off"], "mixed precision; default: on CUDA bf16, or fp16 where "
            "it is not native; elsewhere off"),
    "out": (None, str, "what to write; default: runs/DATA-PATH for train, samples.png beside the "
            "checkpoint for sample"),
    "overwrite": (False, bool, "replace what --out names"),
}
TRAIN_FLAGS = {
    "data": ("digits", str, f"{', '.join(list(RECIPES)[:-1])}, or a folder of images"),
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
    "decay": ("linear", ["linear", "none"], "fall of the learning rate to 0"),
    "weight_decay": (0.0, number(float, 0), "of AdamW"),
    "clip": (1.0, POSITIVE, "largest norm of the gradient"),
    "seed": (0, WHOLE, "of everything random"),
    "log_every": (50, COUNT, "steps between log lines"),
    "sample_every": (300, COUNT, "steps between sample grids"),
    "save_every": (300, COUNT, "steps between checkpoints"),
    "compile": (None, bool, "torch.compile; default: on CUDA only"),
    "resume": (False, bool, "go on with the run in --out; default: the newest in runs/"),
}
SAMPLE_FLAGS = {
    "ckpt": (None, str, "checkpoint file; default: the newest runs/*/checkpoint.pt"),
    "n": (64, COUNT, "number of images"),
    "solver": ("midpoint", list(SOLVERS), "euler, midpoint and rk4 evaluate the network 1, 2 and 4 "
               "times a step; dopri5 adapts"),
    "steps": (20, COUNT, "steps of the solver"),
    "tolerance": (1e-5, number(float, 1e-12, 1), "of dopri5, relative and absolute"),
    "seed": (0, WHOLE, "of the noise"),
    "batch": (None, COUNT, "images at a time; default: by size"),
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
    given = {k: v for k, v in given.items() if k not in ("out", "device", "compile", "resume",
                                                         "overwrite")}
    defaults = {k: v[0] for k, v in TRAIN_FLAGS.items() if k not in ("compile", "resume")}
    config = defaults | recipe | dict(amp=pick_amp(args.amp, device)) | given
    out = Path(args.out or f"runs/{Path(args.data).resolve().name}-{args.path}")
    resume = None
    if args.resume:
        if not (args.out or "data" in given or "path" in given):
            out = newest_checkpoint().parent
        resume = load_checkpoint(out / "checkpoint.pt")
        free = ("steps", "data_dir", "amp", "log_every", "sample_every", "save_every")
        for k, v in given.items():
            if k not in free and resume["config"][k] != v:
                raise ValueError(f"{out} was begun with --{k.replace('_', '-')} "
                                 f"{resume['config'][k]}, which --resume cannot change")
        config = resume["config"] | given
    elif (out / "checkpoint.pt").exists() and not args.overwrite:
        raise ValueError(f"{out} already holds a run: go on with --resume, replace it with "
                         "--overwrite, or name another --out")
    if config["data"] not in RECIPES and not Path(config["data"]).is_dir():
        known = ", ".join(list(RECIPES)[:-1])
        raise ValueError(f"--data {config['data']} is neither a folder nor one of {known}")
    with torch.device("meta"):  # refuses a bad shape before any work
        build_velocity(dict(channels=1, data_rms=1.0) | config)

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
    """The sample command: a grid, or one PNG per image."""
    device = pick_device(args.device)
    file = Path(args.ckpt or newest_checkpoint())
    velocity, config, step = load_velocity(file, device)
    out = Path(args.out or file.parent / "samples.png")
    grid = out.suffix.lower() == ".png"
    if args.out and not args.overwrite and (out.is_file() or out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} already exists: replace it with --overwrite, or name another")
    print(f"{file}: step {step:,}, EMA weights (decay {config['ema']}), path {config['path']}")
    shape = (config["channels"], config["size"], config["size"])
    batch = args.batch or max(1, min(512, 2**25 // (config["width"] * shape[1] * shape[2])))
    progress, amp, nfe_sum, images = Progress(args.n, "images"), pick_amp(args.amp, device), 0, []
    with ThreadPoolExecutor(2) as pool:  # writes PNGs while the next batch is made
        for i in range(0, args.n, batch):
            numbers = range(i, min(i + batch, args.n))
            with autocast(device, amp):
                x, nfe = sample(velocity, draw_noise(args.seed, numbers, shape).to(device),
                                PATHS[config["path"]], T_END[config["path"]], solver=args.solver,
                                steps=args.steps, tolerance=args.tolerance)
            part = to_uint8(x).cpu()
            if grid:
                images.append(part)
            else:
                files = [out / f"{j:06d}.png" for j in numbers]
                written = pool.map(save_image, part, files)
            nfe_sum += nfe * len(part)
            print(f"\r{progress.line(numbers.stop)} ", end="", flush=True)
    if grid:
        save_grid(torch.cat(images), out)
    else:
        list(written)  # raises what a writer raised
    print(f"\n{out}: {args.n:,} images, {args.solver}, NFE {nfe_sum / args.n:g}, amp {amp}, "
          f"{time.perf_counter() - progress.start:.1f} s")


COMMANDS = {
    "train": (run_train, TRAIN_FLAGS, "Learn to make images from noise.",
              "flow_matching.py train --path ot\n"
              "flow_matching.py train --data photos/ --size 64 --out runs/photos"),
    "sample": (run_sample, SAMPLE_FLAGS, "Make images from the EMA weights of a checkpoint.",
               "flow_matching.py sample --steps 20\n"
               "flow_matching.py sample --n 10000 --out images/"),
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
        p.set_defaults(run=run, error=p.error, flags=flags | COMMON_FLAGS)
        for flag, (default, kind, text) in (flags | COMMON_FLAGS).items():
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
