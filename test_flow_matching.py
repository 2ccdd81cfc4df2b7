"""What flow_matching.py claims, each claim tested from another side than the code computes it."""

import argparse
import ast
import builtins
import contextlib
import copy
import dis
import functools
import io
import itertools
import json
import math
import operator
import os
import pickle
import re
import shutil
import signal
import sys
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed.run
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import flow_matching as fm

SCRIPT, CPU = Path(fm.__file__), torch.device("cpu")
ALL_PATHS = pytest.mark.parametrize("name", list(fm.PATHS))
TINY = ("train --size 8 --width 8 --mults 1,2 --blocks 1 --attention 4 --dropout 0.2 --batch 8 "
        "--lr 0.01 --warmup 3 --flip --steps 24 --log-every 3 --save-every 24 "
        "--device cpu")
RESUME = "train --resume --device cpu --out"
close, approx = torch.testing.assert_close, pytest.approx
kill = unittest.mock.Mock(side_effect=GeneratorExit)  # which no handler of the program sees


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def config(**more):
    """What a network and a batch need of a run: flags of train, and what was found in the data."""
    return argparse.Namespace(**dict(
        path="ot", channels=1, names=[], data_rms=0.5, size=16, width=32, mults=[1, 2, 2], blocks=1,
        attention=[], dropout=0.0, batch=32, seed=0, flip=False, coupling="independent",
        time="uniform") | more)


def run(command, *more):
    """A command line, and more arguments as they are: what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        fm.main([*command.split(), *map(str, more)])
    return said.getvalue()


def refuse(command, *more):
    """A command line that must be refused: status 2 and one line of error, which is returned."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as stop:
        run(command, *more)
    error = re.sub("^Downloading: .*\n", "", said.getvalue())  # torch.hub says what it begins
    assert stop.value.code == 2 and error.count("\n") == 1 and error.endswith("\n"), error
    assert error.startswith(f"flow_matching.py {command.split()[0]}: error: "), error
    return error


def pngs(folder):
    """The images that sample left in a folder, by name: int, (H, W)."""
    files = sorted(Path(folder).glob("[0-9]*.png"))
    return {f.stem: np.asarray(Image.open(f)).astype(int) for f in files}


def load(out):
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)


def rows(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def losses(out):
    return [(row["step"], row["loss"]) for row in rows(Path(out, "log.jsonl"))]


def same(a, b):
    a, b = load(a), load(b)
    return all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])


def write_folder(root, n=24):
    """n random smooth PNGs of 8 x 8, none like its mirror image, in two class subfolders."""
    rng = np.random.default_rng(0)
    for i in range(n):
        file = Path(root, f"class{i % 2}", f"{i:03d}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.add.outer(*np.sort(rng.integers(0, 128, (2, 8))))
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


def at_loss(monkeypatch, actions):
    """The n-th loss of a training becomes actions[n](loss)."""
    numbers, original = itertools.count(1), fm.cfm_loss
    monkeypatch.setattr(fm, "cfm_loss", lambda *args, **weight: actions.get(
        next(numbers), lambda loss: loss)(original(*args, **weight)))


@pytest.fixture(autouse=True)
def an_empty_directory_and_quick_grids(tmp_path, monkeypatch):
    """The grids that a training leaves behind are of one step, but for those of fixtures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fm.odeint, "__defaults__", (0.0, 1.0, "midpoint", 1, 1e-5))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The command of a tiny run on a folder of images, and that run, finished without a break."""
    root = tmp_path_factory.mktemp("tiny")
    command = f"{TINY} --data {write_folder(root / 'set')} --data-dir {root / 'cache'}"
    run(command, "--out", root / "whole")
    return command, root / "whole"


# §1  Probability paths --------------------------------------------------------------------------
def paper(name, t):
    """α and σ as the paper has them, and α' and σ' by automatic differentiation."""
    t = t.detach().double().requires_grad_()
    T = 0.1 * (1 - t) + 9.95 * (1 - t) ** 2
    parts = {"ot": (t, 1 - (1 - 1e-4) * t), "vp": ((-T / 2).exp(), (1 - (-T).exp()).sqrt()),
             "ve": (1 + 0 * t, 0.01 * 5000 ** (1 - t))}[name]
    slopes = [torch.autograd.grad(part.sum(), t, retain_graph=True)[0] for part in parts]
    return [*(part.detach() for part in parts), *slopes]


@ALL_PATHS
def test_a_path_is_the_paper_s_and_theorem_3_is_psi_s_derivative_and_eqs_17_19_21(name):
    path, t = fm.PATHS[name], torch.linspace(0, 0.999, 100, dtype=torch.float64)
    for mine, expected in zip(path(t), paper(name, t), strict=True):
        close(mine, expected, rtol=1e-9, atol=1e-12)
    last = {"ot": 1e-4, "vp": 0.0010004974, "ve": 0.01}[name]
    close(torch.cat(path(times(1))[:2]), times(1, last), rtol=1e-6, atol=0)
    x, x_1, s = double(100, 3), double(100, 3, seed=1), 1 - t[:, None]
    T, sigma = 0.1 * s + 0.5 * 19.9 * s**2, 0.01 * 5000**s
    expected = {
        "ve": -(math.log(5000) * sigma) / sigma * (x - x_1),
        "vp": -(0.1 + 19.9 * s) / 2 * ((-T).exp() * x - (-T / 2).exp() * x_1) / (1 - (-T).exp()),
        "ot": (x_1 - (1 - 1e-4) * x) / (1 - (1 - 1e-4) * t[:, None])}[name]
    close(fm.conditional_velocity(path, x, x_1, t), expected, rtol=1e-9, atol=1e-9)
    alpha, sigma, d_alpha, d_sigma = (fm.expand(c, x) for c in path(t))
    u = fm.conditional_velocity(path, alpha * x_1 + sigma * x, x_1, t)
    close(u, d_alpha * x_1 + d_sigma * x, rtol=1e-9, atol=1e-9)


@ALL_PATHS
def test_float32_is_safe_at_both_ends_of_time(name):
    """rand() draws multiples of 2^-24 in [0, 1), and a sigmoid may round to 1."""
    t = torch.tensor([0.0, 2**-24, 1e-5, 0.5, 1 - 1e-5, 1 - 2**-24, 1.0])
    for mine, exact in zip(fm.PATHS[name](t), fm.PATHS[name](t.double()), strict=True):
        close(mine.double(), exact, rtol=2e-5, atol=1e-12)
    velocity = fm.Velocity(fm.UNet(1, 8, 8, (1,), 1, ()), fm.PATHS[name], 0.5)
    assert velocity.weight(t).isfinite().all()  # of the loss
    assert velocity(torch.ones(7, 1, 8, 8), t).isfinite().all()


def log_density(path, x, t, means, tau):
    """log p_t(x), Eq. 6, straight from its definition as a mixture: (B,)."""
    alpha, sigma = path(t)[:2]
    std = ((alpha * tau) ** 2 + sigma**2).sqrt()[:, None, None]
    each = torch.distributions.Normal(alpha[:, None, None] * means, std).log_prob(x[:, None])
    return each.sum(-1).logsumexp(1) - math.log(len(means))


@ALL_PATHS
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_theorem_1_the_marginal_field_is_eq_8_and_satisfies_the_continuity_equation(name, tau):
    """d/dt log p + u · grad log p + div u = 0; Eq. 8 by Tweedie: E[x_0 | x] = −σ grad log p."""
    path, means = fm.PATHS[name], double(5, 2, seed=1)
    t = torch.linspace(0.02, 0.97, 200, dtype=torch.float64).requires_grad_()
    alpha, sigma, d_alpha, d_sigma = (c.detach()[:, None] for c in path(t))
    x = (alpha * means[torch.arange(200) % 5] + sigma * double(200, 2)).requires_grad_()
    u = fm.marginal_velocity(path, x, t, means, tau)
    p_t, p_x = torch.autograd.grad(log_density(path, x, t, means, tau).sum(), (t, x))
    expected = d_alpha / alpha * (x + sigma**2 * p_x) - d_sigma * sigma * p_x
    close(u, expected, rtol=1e-9, atol=1e-9 * u.abs().max().item())
    div = sum(torch.autograd.grad(u[:, i].sum(), x, retain_graph=True)[0][:, i] for i in (0, 1))
    terms = torch.stack([p_t, (u * p_x).sum(1), div])
    assert (terms.sum(0).abs() <= 1e-9 * terms.abs().amax(0)).all()  # but for rounding


# §2  Loss ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [
    fm.ot_path, fm.vp_path, functools.partial(fm.ve_path, sigma_min=0.1, sigma_max=2)])
def test_theorem_2_gradients_are_equal_while_the_losses_differ(path):
    """By quadrature: Gauss-Hermite for CFM's x_0; for FM's x a grid, which σ = 50 would leave."""
    w, means = double(4).requires_grad_(), times(-1.0, 0.5, 2.0)[:, None]
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(80))
    grid, moments = torch.linspace(-16, 16, 40_001, dtype=torch.float64), times(0.1, 0.4, 0.7)
    k, i, j = torch.cartesian_prod(*map(torch.arange, (3, 3, 80))).T

    def v(x, t):  # entire: fast quadrature
        return torch.cat([x, x.sin(), (2 * x).cos(), t[:, None]], 1) @ w[:, None]

    weights = weights[j] / weights.mean()
    cfm = fm.cfm_loss(v, path, means[k], nodes[j, None], moments[i], weights)
    x, t = grid.repeat(3)[:, None], moments.repeat_interleave(len(grid))
    error = (v(x, t) - fm.marginal_velocity(path, x, t, means)).square()[:, 0]
    loss = (log_density(path, x, t, means, 0.0).exp() * error).sum() * (grid[1] - grid[0]) / 3
    g_cfm, g_fm = (torch.autograd.grad(each, w)[0] for each in (cfm, loss))
    assert (g_cfm - g_fm).norm() < 1e-6 * g_fm.norm()  # both quadratures converge beyond this
    assert cfm > 1.01 * loss


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_draws_uniform_times_of_at_least_float32_and_normal_noise(kind):
    torch.manual_seed(0)
    seen, x_1 = [], torch.zeros(20_000, 1, dtype=kind)
    fm.cfm_loss(lambda x, t: seen.append((x[:, 0], t)) or x, fm.ot_path, x_1)
    x, t = seen[0]
    assert t.dtype == torch.promote_types(kind, torch.float32) and x.dtype == kind
    assert 0 <= t.min() and t.max() < 1
    assert scipy.stats.kstest(t.numpy(), "uniform").pvalue > 1e-3  # one fixed draw
    assert scipy.stats.kstest((x / fm.ot_path(t)[1]).numpy(), "norm").pvalue > 1e-3


# §3  ODE solvers, on dx/dt = x cos t, x = x_0 exp(sin t) ----------------------------------------

X_0 = double(3, 2)


def swing(x, t):
    return x * t.cos()[:, None]


@pytest.mark.parametrize("t_0, t_1", [(0.0, 2.0), (2.0, 0.0)])
@pytest.mark.parametrize("solver, slope", dict(euler=-1, midpoint=-2, rk4=-4, dopri5=1).items())
def test_the_error_follows_the_order_or_the_tolerance_both_ways(solver, slope, t_0, t_1):
    adaptive = solver == "dopri5"
    flag, margin = ("tolerance", 0.3) if adaptive else ("steps", 0.1)
    values = np.array([1e-3, 1e-5, 1e-7, 1e-9] if adaptive else [32, 64, 128, 256])
    start, end = (X_0 * math.exp(math.sin(t)) for t in (t_0, t_1))
    each = [fm.odeint(swing, start, t_0, t_1, solver, **{flag: value}) for value in values]
    errors = np.array([(x - end).abs().max().item() for x, _ in each])
    assert abs(np.polyfit(np.log(values), np.log(errors), 1)[0] - slope) < margin
    nfes = [nfe for _, nfe in each]
    assert nfes == sorted({*nfes}) and (not adaptive or (errors < 30 * values).all())


@pytest.mark.parametrize("solver, calls", dict(euler=1, midpoint=2, rk4=4, dopri5=0).items())
def test_a_solver_counts_calls_keeps_types_and_gradients_and_takes_no_samples(solver, calls):
    seen = []
    _, nfe = fm.odeint(lambda x, t: seen.append(t) or swing(x, t), X_0, solver=solver, steps=7)
    assert nfe == len(seen) == (7 * calls or nfe) > 6
    assert all(t.shape == (3,) and 0 <= t.min() and t.max() <= 1 for t in seen)
    assert torch.equal(fm.odeint(swing, X_0, 0.5, 0.5, solver)[0], X_0)
    assert fm.odeint(swing, X_0[:0], solver=solver)[0].shape == (0, 2)
    assert fm.odeint(swing, X_0.float(), solver=solver)[0].dtype == torch.float32
    x = X_0.clone().requires_grad_()
    if solver != "dopri5":
        end, _ = fm.odeint(swing, x, solver=solver, steps=40)
        close(torch.autograd.grad(end.sum(), x)[0], end.detach() / X_0)  # of a linear flow
        return
    weight = torch.ones(2).requires_grad_()
    for v, start in ((swing, x), (lambda x, t: x * weight, X_0)):
        with pytest.raises(ValueError, match="rk4"):  # not a result without its gradient
            fm.odeint(v, start, solver="dopri5")
        with torch.no_grad():
            assert fm.odeint(v, start, solver="dopri5")[1] > 6


def test_a_bfloat16_state_gets_float32_times_and_float32_stays_as_it_is():
    seen = []
    for kind in (torch.bfloat16, torch.float32, torch.float64):
        x, _ = fm.odeint(lambda x, t: seen.append(t) or -x, X_0.to(kind), solver="euler", steps=3)
        assert x.dtype == kind and seen[-1].dtype == torch.promote_types(kind, torch.float32)
        assert seen[-1][0].item() == pytest.approx(2 / 3, rel=1e-6)


@pytest.mark.parametrize("v, solver, says", [
    (lambda x, t: x / 0, "dopri5", "velocity is not finite"),
    (lambda x, t: x * math.nan, "midpoint", "solution is not finite"),
    (lambda x, t: x / 0, "euler", "solution is not finite"),
    (lambda x, t: x**2, "dopri5", "dopri5 failed")])  # leaves at t = 1
def test_a_solve_that_fails_says_so(v, solver, says):
    with pytest.raises(FloatingPointError, match=says):
        fm.odeint(v, times(1)[None], 0, 2, solver)


# §4  Sampling and likelihood --------------------------------------------------------------------
def stir(x, t):
    t = t.view(-1, *[1] * (x.dim() - 2))
    u = x[..., 0] / 2 + (x[..., 1] + t).sin(), (2 * x[..., 0]).cos() - x[..., 1] * t
    return torch.stack(u, -1)


@ALL_PATHS
def test_likelihood_is_by_the_jacobian_of_sampling_and_hutchinson_is_unbiased(name):
    """log p_1(x_1) = log N(x_0; 0, I) − log |det ∂x_1/∂x_0|.

    The mean over all sign vectors is exact, while no two estimates need agree; invert goes back.
    """
    v = stir
    path, fixed, x_0 = fm.PATHS[name], dict(solver="rk4", steps=100), double(3, 1, 1, 2)
    start = path(times(0))[1]
    J = torch.stack([torch.autograd.functional.jacobian(
        lambda z: fm.odeint(v, start * z[None], **fixed)[0].flatten(), z) for z in x_0])
    expected = torch.distributions.Normal(0, 1).log_prob(x_0).sum((1, 2, 3))
    expected -= J.view(3, 2, 2).det().abs().log()
    x_1, _ = fm.sample(v, x_0, path, **fixed)
    with torch.inference_mode():
        log_p, nfe = fm.log_likelihood(v, x_1, path, **fixed)
    close(log_p, expected, rtol=1e-6, atol=1e-6)
    assert log_p.dtype == torch.float64 and nfe == 400
    signs = [times(1, k).expand_as(x_1) for k in (-1, 1)]  # E and −E estimate the same
    each = torch.stack([fm.log_likelihood(v, x_1, path, [s], **fixed)[0] for s in signs])
    close(each.mean(0), log_p, rtol=1e-10, atol=1e-10)
    assert (each.std(0) > 1e-3).all()
    close(fm.invert(v, x_1, path, **fixed)[0], x_0, rtol=1e-6, atol=1e-6)
    assert (x_1 - x_0).abs().min() > 0.01


def test_the_graph_of_a_likelihood_is_released_with_its_last_probe(monkeypatch):
    """A compiled network with one probe relies on that; x may also be of shape (B,)."""
    kept, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, retain_graph: (
        kept.append(retain_graph) or grad(*args, retain_graph=retain_graph)))
    fm.log_likelihood(stir, double(3, 2), solver="euler", steps=2)
    assert kept == [True, False] * 2
    flat, _ = fm.log_likelihood(lambda x, t: -x, X_0[:, 0], solver="rk4")
    close(flat, fm.log_likelihood(lambda x, t: -x, X_0[:, :1], solver="rk4")[0])


# §5  Coupling, guidance, noise ------------------------------------------------------------------
def test_guidance_hands_over_what_a_network_takes_for_no_label():
    def v(x, t, y):
        return x * y[:, None]

    x, y = torch.ones(2, 1), torch.tensor([3.0, 4.0])
    guided = fm.guided(v, y, 2.0, null=torch.ones(2))
    assert guided(x, None).tolist() == [[5], [7]]  # 1 + 2 (y - 1)
    assert fm.guided(v, y)(x, None).tolist() == [[3], [4]]


def test_ot_coupling_is_the_best_permutation_and_with_labels_within_each_class():
    x_0, x_1 = double(6, 1, 2, 2), double(6, 1, 2, 2, seed=1)
    best = min(itertools.permutations(range(6)),
               key=lambda order: (x_0[list(order)] - x_1).square().sum().item())
    assert torch.equal(fm.ot_coupling(x_0, x_1), x_0[list(best)]) and best != tuple(range(6))
    x_0, x_1, y = double(30, 3), double(30, 3, seed=1), torch.arange(30) % 3
    coupled = fm.ot_coupling(x_0, x_1 + 10 * y[:, None], y)
    for k in range(3):
        assert torch.equal(coupled[y == k].sort(0)[0], x_0[y == k].sort(0)[0])
        assert torch.equal(coupled[y == k], fm.ot_coupling(x_0[y == k], x_1[y == k]))
    assert not torch.equal(coupled, x_0)
    assert torch.equal(fm.ot_coupling(x_0, x_1 + 10 * y[:, None], y[:, None]), coupled)
    x_0, x_1 = x_0.bfloat16(), x_1.bfloat16()  # the distances are float32
    assert torch.equal(fm.ot_coupling(x_0, x_1).float(), fm.ot_coupling(x_0.float(), x_1.float()))


def test_noise_is_normal_and_depends_on_seed_and_index_alone():
    a = fm.draw_noise(3, range(10), (1, 4, 4))
    assert torch.equal(a[4:7], fm.draw_noise(3, range(4, 7), (1, 4, 4)))
    many = torch.cat([fm.draw_noise(seed, range(700), (20,)) for seed in (0, 1, 2, 3, 4096, 2**20)])
    assert len(torch.unique(many, dim=0)) == 4200  # no (seed, i) has another's noise
    assert (torch.corrcoef(many.T) - torch.eye(20)).abs().max() < 0.08
    assert scipy.stats.kstest(many.flatten().numpy(), "norm").pvalue > 1e-3  # one fixed draw


# §6  Network ------------------------------------------------------------------------------------
def randomise(net, std=0.3):
    """Every parameter random, those that start at zero or one too."""
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    return net.eval()


def normed(h, layer):
    """Groups of at least 4 channels, at most 32 of them."""
    return F.group_norm(h, min(32, h.shape[1] // 4), layer.weight, layer.bias)


@pytest.mark.parametrize("c_in, c_out", [(8, 8), (8, 16), (256, 16)])
def test_a_residual_block_by_hand_and_the_identity_that_it_starts_as(c_in, c_out):
    h, emb = double(2, c_in, 6, 4), double(2, 10, seed=1)
    block = fm.ResBlock(c_in, c_out, 10, 0.5, attention=True).double().eval()
    assert torch.equal(block(h, emb), block.skip(h))
    assert c_in != c_out or torch.equal(block.skip(h), h)
    randomise(block)
    scale, shift = block.scale_shift(emb)[:, :, None, None].split(c_out, 1)
    r = normed(block.conv1(F.silu(normed(h, block.norm1))), block.norm2) * (1 + scale) + shift
    close(block(h, emb), block.attention(block.skip(h) + block.conv2(F.silu(r))))
    assert not torch.allclose(block.train()(h, emb), block.eval()(h, emb))
    block.train().dropout.p = 1.0  # all that the second convolution sees
    bias = block.conv2.bias[:, None, None]
    close(block(h, emb), block.attention(block.skip(h) + bias))


def test_attention_equals_softmax_by_hand():
    h, layer = double(2, 128, 3, 4), fm.Attention(128).double()
    assert torch.equal(layer(h), h)  # the identity at the start
    randomise(layer)
    q, k, v = layer.qkv(normed(h, layer.norm)).flatten(2).reshape(2, 3, 2, 64, 12).unbind(1)
    weights = (torch.einsum("bhci,bhcj->bhij", q, k) / 8).softmax(-1)  # 8 = sqrt(64)
    a = torch.einsum("bhij,bhcj->bhci", weights, v).reshape(2, 128, 3, 4)
    close(layer(h), h + layer.out(a))


@pytest.mark.parametrize("mults, blocks, size, attend, level", [
    ((1, 2), 1, (8, 12), 4, 1), ((1, 3, 2), 2, (16, 8), 4, 2), ((1, 1, 2), 1, (9, 5), 5, 1)])
def test_a_u_net_by_hand_and_the_zero_that_it_starts_as(mults, blocks, size, attend, level):
    net = fm.UNet(2, size[0], 8, mults, blocks, (attend,), 0.5, classes=2).double().eval()
    x, t, y = double(3, 2, *size), times(0, 0.3, 1), torch.tensor([0, 1, 2])
    assert (net(x, t, y) == 0).all()
    randomise(net)
    angles = t[:, None] * 1000 * 10_000.0 ** (-torch.arange(8).double() / 8)
    emb = net.time[2](F.silu(net.time[0](torch.cat([angles.cos(), angles.sin()], 1))))
    emb, h = F.silu(emb + net.label.weight[y]), F.conv2d(x, net.first.weight, net.first.bias, 1, 1)
    down, up, skips, attends = iter(net.down), iter(net.up), [h], [net.middle1]
    for i in range(len(mults)):
        if i:
            layer = next(down)
            h = F.conv2d(h, layer.weight, layer.bias, 2, padding=1)
            skips.append(h)
        for _ in range(blocks):
            block = next(down)
            attends += [block] if i == level else []
            h = block(h, emb)
            assert h.shape[1] == 8 * mults[i]
            skips.append(h)
    h = net.middle2(net.middle1(h, emb), emb)
    for i in reversed(range(len(mults))):
        if i < len(mults) - 1:
            rows, columns = (torch.arange(n) * m // n  # pixel k of n comes from pixel ⌊k m/n⌋ of m
                             for m, n in zip(h.shape[2:], skips[-1].shape[2:], strict=True))
            layer = next(up)
            h = F.conv2d(h[:, :, rows][:, :, :, columns], layer.weight, layer.bias, 1, padding=1)
        for _ in range(blocks + 1):
            block = next(up)
            attends += [block] if i == level else []
            h = block(torch.cat([h, skips.pop()], 1), emb)
    assert not skips and not [*down, *up]
    expected = net.out(F.silu(normed(h, net.out_norm)))
    close(net(x, t, y), expected, rtol=1e-4, atol=1e-5)  # the sinusoids are float32
    assert torch.equal(net(x, t)[2], net(x, t, y)[2]) and (net(x, t) != net(x, t, y))[:2].all()
    found = [m for m in net.modules() if isinstance(getattr(m, "attention", None), fm.Attention)]
    assert {*found} == {*attends}


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@ALL_PATHS
def test_a_network_of_another_type_trains_samples_and_has_a_likelihood(name, kind):
    net = randomise(fm.UNet(1, 8, 8, (1,), 1, ()), 0.05).to(kind)
    x, path, few = double(2, 1, 8, 8).to(kind), fm.PATHS[name], dict(solver="euler", steps=2)
    v = fm.Velocity(net, path, 0.5)
    fm.cfm_loss(v, path, x, weight=v.weight(torch.ones(2))).backward()
    assert net.out.weight.grad.dtype == fm.sample(v, x, path, **few)[0].dtype == kind
    assert fm.log_likelihood(v, x, path, [x.sign()], **few)[0].isfinite().all()


@pytest.mark.parametrize("width", [1, 6, 36, 44])
def test_a_network_of_any_width_works_and_a_height_without_a_map_is_refused(width):
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    assert fm.UNet(3, 8, width, (1, 3), 1, (4,))(x, t).shape == x.shape
    assert not any(isinstance(m, fm.Attention) for m in fm.UNet(3, 8, width, (1,), 1, ()).modules())
    with pytest.raises(ValueError, match=r"heights \[8, 4\]"):
        fm.UNet(3, 8, width, (1, 3), 1, (3,))


def test_the_cifar10_net_has_the_usual_parameter_count():
    with torch.device("meta"):
        net = fm.UNet(**{flag: fm.RECIPES["cifar10"][flag] for flag in (
            "size", "width", "mults", "blocks", "attention")})
        assert str(net) == str(fm.UNet())  # its defaults are this recipe
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - 35.7) < 0.3


# §1-§7: every section runs when it is pasted with the imports and the sections that it names ----

def codes(code):  # and those inside it
    return [code, *itertools.chain(*(codes(c) for c in code.co_consts if hasattr(c, "co_code")))]


@pytest.mark.parametrize("number", range(1, 8))
def test_a_section_pasted_with_what_its_title_names_runs_and_has_every_name_that_it_uses(number):
    header, *parts = re.split(r"^(?=# §\d+  )", SCRIPT.read_text(encoding="utf-8"), flags=re.M)
    assert [re.match(r"# §(\d+)", part)[1] for part in parts] == [str(n) for n in range(1, 12)]
    lines = {}  # of the header, by the name that each binds
    for node in (n for n in ast.parse(header).body if isinstance(n, ast.Import | ast.ImportFrom)):
        for one in node.names:
            alone = copy.copy(node)
            alone.names = [one]
            lines[one.asname or one.name] = ast.unparse(alone)

    def needed(number):  # what its title names: sections, then imports
        names = re.search(r"needs (.*?)\)", parts[number - 1].split("\n")[0])[1].split(", ")
        return [int(n[1:]) for n in names if n[0] == "§"], [n for n in names if n[0] != "§"]

    sections, names = needed(number)
    names = dict.fromkeys([*names, *(name for n in sections for name in needed(n)[1])])
    text = "\n".join([*(lines[name] for name in names), *(parts[n - 1] for n in sections)])
    space, text = {}, f"{text}\n{parts[number - 1]}"
    exec(code := compile(text, f"§{number}", "exec"), space)
    used = {i.argval for c in codes(code) for i in dis.get_instructions(c)
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    assert used <= {*space, *dir(builtins), "__module__", "__name__", "__qualname__"}
    own = ast.parse(parts[number - 1])
    said = {n.id for n in ast.walk(own) if isinstance(n, ast.Name)}
    assert {name.split(".")[0] for name in needed(number)[1]} <= said  # none is named in vain


# §7  Fréchet distance ---------------------------------------------------------------------------
def frechet(f, g):
    """Between features (n, D): of S = C Cᵀ, tr √(S_1 S_2) sums the singular values of C_1ᵀ C_2."""
    C = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (f, g)]
    squares = (f.mean(0) - g.mean(0)).square().sum() + sum(c.square().sum() for c in C)
    return (squares - 2 * torch.linalg.svdvals(C[0] @ C[1].T).sum()).item()


def test_frechet_distance_of_known_gaussians():
    f, g = double(9, 30), 2 * double(9, 30, seed=1) + 1  # singular covariances
    m, S, n, T = (part(x.numpy().T) for x in (f, g) for part in (lambda x: x.mean(1), np.cov))
    assert fm.frechet_distance(m, S, n, T) == approx(frechet(f, g), rel=1e-7)
    assert fm.frechet_distance(n, T, m, S) == approx(frechet(f, g), rel=1e-7)
    a, b = np.arange(8.0), np.arange(8.0)[::-1] ** 2  # commuting
    expected = approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-7)
    assert fm.frechet_distance(a, np.diag(a), a, np.diag(b)) == expected
    for seed in range(20):  # rounding takes none below zero
        A, m = double(20, 10, seed=seed).numpy(), np.zeros(20)
        assert 0 <= fm.frechet_distance(m, A @ A.T / 20, m, A @ A.T / 20) < 1e-10


def numbers(n):
    return torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_streamed_statistics_equal_numpy_s(batch):
    """Even where the mean is a million standard deviations from zero."""
    x = double(100, 5) * torch.tensor([1, 2, 3, 4, 5]) + 1e6
    mean, cov = fm.fit_gaussian(iter(x.split(batch)))
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.numpy().T), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights under the names and shapes of the published file."""
    rng, weights = np.random.default_rng(0), {}
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for k, p in net.state_dict().items():
        if p.dim() == 4:
            weights[k] = rng.normal(size=p.shape) * np.sqrt(2 / np.prod(p.shape[1:]))
        elif "var" in k or k.endswith("bn.weight"):
            weights[k] = rng.uniform(*(0.5, 1.5) if "var" in k else (0.8, 1.2), p.shape)
        elif "num_batches" not in k:
            weights[k] = rng.normal(size=p.shape) * 0.1
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({k: torch.from_numpy(w).float() for k, w in weights.items()}, file)
    return file


def test_inception_features_are_torch_fidelity_s(inception_file):
    """Against `inception-v3-compat` of torch-fidelity 0.4.0 with the same weights and image."""
    features = fm.inception(inception_file)
    x = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (1, 3, 40, 40), dtype=np.uint8))
    expected = [0.9111799001693726, 5.1490044593811035, 7.382638454437256, 0.3674629330635071,
                7.333246231079102, 3.3332443237304688]
    np.testing.assert_allclose(features(x)[0, ::400], expected, rtol=1e-4)
    close(features(x[:, :1]), features(x[:, :1].expand(-1, 3, -1, -1)))  # grey
    assert features(x).shape == (1, 2048)
    many = torch.cat([x, 255 - x, x // 2])
    close(features(many), torch.cat([features(one) for one in many.split(1)]), rtol=1e-4, atol=1e-4)


def test_inception_downloads_the_published_file_and_checks_its_hash(inception_file, monkeypatch):
    """torch.hub names the file by its URL and compares the hash that is in that name."""
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **how: (
        asked.append((url, how)) or torch.load(inception_file, weights_only=True)))
    many = torch.zeros(51, 3, 9, 9, dtype=torch.uint8)
    assert fm.inception(device="meta")(many).shape == (51, 2048)  # computed are shapes alone
    assert asked == [(fm.INCEPTION_URL, dict(map_location="cpu", check_hash=True,
                                             weights_only=True))]
    assert re.search("-([0-9a-f]{8})[.]pth$", fm.INCEPTION_URL)[1] == "6726825d"


# §8  Data ---------------------------------------------------------------------------------------
def test_every_level_is_the_nearest_one_and_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    for off in (-0.49, 0, 0.49):
        assert torch.equal(fm.to_uint8((levels.double() + off) / 127.5 - 1), levels)
    assert fm.to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]
    assert fm.to_float(levels).aminmax() == (-1, 1)


def test_drawn_digits_can_be_told_apart():
    """A nearest-centroid classifier reads them; two calls draw the same, two splits do not."""
    assert len(fm.draw_digits(3, 16)[0]) == 3
    images, labels, names = fm.load_data("digits", "", 16)
    again = fm.draw_digits(len(images), 16)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert images.shape == (20_000, 1, 16, 16) and images.dtype == torch.uint8
    assert names == list("0123456789") and torch.bincount(labels).min() > 1800
    test, test_labels, _ = fm.load_data("digits", "", 16, test=True)
    assert len(torch.unique(torch.cat([images, test]), dim=0)) > 0.99 * (len(images) + len(test))
    centroids = torch.stack([images[labels == k].flatten(1).float().mean(0) for k in range(10)])
    accuracy = torch.cdist(test.flatten(1).float(), centroids).argmin(1) == test_labels
    assert 0.7 < accuracy.float().mean() < 1  # readable, and not ten fixed pictures


def test_a_folder_of_any_sizes_and_modes_becomes_one_array_and_the_rest_is_named(capsys):
    ramp = np.arange(16, dtype=np.uint8)[None, :].repeat(8, 0) * 16  # 8 high, 16 wide
    colour = np.stack([ramp, 255 - ramp, ramp // 2], 2)
    picture, exif = Image.fromarray(colour), Image.Exif()
    grey, centre, white = ramp[:, 4:12, None], colour[:, 4:12], np.full((8, 8, 1), 255)
    steep = np.linspace(0, 65535, 8).astype(np.uint16)[None].repeat(8, 0)  # black to white
    exif[0x0112] = 6  # stored a quarter turn to the left
    files = {  # what is written, and what is read; 7 is beside the classes
        "7.png": (picture, centre), "a/0.png": (picture, centre), ".hidden/9.png": (picture, None),
        "a/1.png": (Image.fromarray(steep), steep[..., None] / 257),
        "a/2.gif": (Image.fromarray(ramp).convert("P"), grey),  # a film, which begins so
        "a/deep/3.png": (Image.new("L", (1, 1), "white"), white),
        "\u00e9/4.tiff": (picture.convert("CMYK"), centre),
        "\u00e9/5.png": (Image.fromarray(np.dstack([colour, 0 * ramp])), white),  # transparent
        "\u00e9/6.png": (Image.fromarray(np.rot90(colour)), centre)}
    options = {"a/2.gif": dict(save_all=True, append_images=[picture]),
               "\u00e9/6.png": dict(exif=exif)}
    for name, (image, _) in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        image.save(name, **options.get(name, {}))
    Path("\u00e9/8.png").symlink_to(Path("a/0.png").resolve())
    os.mkfifo("a/pipe")
    for name in ("a/notes.txt", "a/film.MOV"):
        Path(name).write_text("not an image")
    images, labels, names = fm.load_folder(".", ".cache", 8)
    left, = (line for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert all(f"1 {what}" in left for what in (".MOV", ".txt", "a/pipe"))
    assert names == ["a", "\u00e9"] and labels.tolist() == [2, 0, 0, 0, 0, 1, 1, 1, 1]
    expected = [read for _, read in files.values() if read is not None] + [centre]
    expected = torch.from_numpy(np.stack([np.broadcast_to(e, (8, 8, 3)) for e in expected]))
    assert images.dtype == torch.uint8
    assert (images - expected.permute(0, 3, 1, 2)).abs().max() <= 1


def test_decoded_images_are_kept_and_made_again_if_damaged_or_if_a_file_changed():
    again = functools.partial(fm.load_folder, write_folder("set", n=3), "cache", 8)
    images, (raw,) = again()[0].clone(), Path("cache").iterdir()
    before, whole = raw.stat().st_mtime_ns, raw.read_bytes()
    assert torch.equal(again()[0], images) and raw.stat().st_mtime_ns == before
    for damage in (b"", whole[:-100], whole + b"more"):
        raw.write_bytes(damage)
        assert torch.equal(again()[0], images) and raw.read_bytes() == whole
    held, maps = again()[0], Path("/proc/self/maps")
    if maps.exists():  # shared: what is private is refused above memory and swap
        kinds = {line.split()[1] for line in maps.read_text().splitlines() if raw.name in line}
        assert kinds == {"r--s"} and torch.equal(held, images)
    raw.chmod(0o444)
    file, kept = Path("set/class0/000.png"), Path("set/class0/000.png").read_bytes()
    file.write_bytes(Path("set/class0/002.png").read_bytes())
    assert not torch.equal(again()[0], images)
    Image.new("L", (8, 8)).save("x.png")  # now an edit of equal size, and of the same mtime
    edited = Path("x.png").read_bytes()
    file.write_bytes(edited + bytes(len(kept) - len(edited)) if len(edited) < len(kept) else edited)
    first = again()[0].clone()
    stamp = file.stat()
    file.write_bytes(kept.ljust(stamp.st_size, b"\0"))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert not torch.equal(again()[0], first) and torch.equal(again()[0], images)


def test_every_image_of_a_large_folder_is_there_in_its_place():
    i = torch.arange(1100)  # the first 1,000 are grey
    colours = torch.where(i[:, None] < 1000, i[:, None] % 251, torch.stack([i, 3 * i, -i], 1) % 256)
    for n, colour in enumerate(colours.tolist()):
        Path(f"{n // 200}").mkdir(exist_ok=True)
        Image.new("RGB", (3, 2), tuple(colour)).save(f"{n // 200}/{n:04d}.png")
    images, labels, names = fm.load_folder(".", ".cache", 2)
    assert torch.equal(images, colours.byte()[:, :, None, None].expand(-1, 3, 2, 2))
    assert torch.equal(labels, i // 200) and names == list("012345")


def write_idx(file, *shape):
    """Random bytes in the format of MNIST, which are returned."""
    data = np.random.default_rng(shape[0]).integers(0, 10, shape, np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(np.array([0x800 + len(shape), *shape], ">u4").tobytes() + data.tobytes())
    return data


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_sets_load_from_files_in_their_own_format(name, kind):
    written, raw = [], Path(kind, "raw")
    for prefix, n in (("train", 2100), ("t10k", 7)):
        written.append([write_idx(raw / f"{prefix}-images-idx3-ubyte", n, 28, 28),
                        write_idx(raw / f"{prefix}-labels-idx1-ubyte", n)])
    for test, (images, labels) in enumerate(written):
        mine, y, names = fm.load_data(name, "", 28, bool(test))
        assert np.array_equal(mine[:, 0], images) and y.tolist() == labels.tolist()
    assert len(names) == 10
    half = F.interpolate(torch.from_numpy(images)[:, None].float(), 14, mode="area")
    assert (fm.load_data(name, "", 14, test=True)[0] - half).abs().mean() < 1  # of all the pixels


def test_cifar10_loads_from_files_in_its_own_format(monkeypatch):
    folder = Path("cifar-10-batches-py")
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), np.uint8)
    for i, batch in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / batch).write_bytes(pickle.dumps({"data": pixels[i], "labels": [3, i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    mine, y, names = fm.load_data("cifar10", "", 32)
    assert y.tolist() == [3, 0, 3, 1, 3, 2, 3, 3, 3, 4] and names[3] == "d"
    assert np.array_equal(mine.flatten(1), pixels[:5].reshape(10, -1))
    assert np.array_equal(fm.load_data("cifar10", "", 32, True)[0].flatten(1), pixels[5])


# §1-§8: what the functions refuse ---------------------------------------------------------------
@pytest.mark.parametrize("call, says", [
    (lambda: fm.odeint(swing, X_0.long()), "int64"),
    (lambda: fm.odeint(swing, X_0 + 0j), "complex"),
    (lambda: fm.odeint(lambda x, t: x * 1j, X_0), "complex"),
    (lambda: fm.odeint(lambda x, t: x.long(), X_0), "int64"),
    (lambda: fm.odeint(lambda x, t: x[:, :1], X_0), r"\(3, 1\).*\(3, 2\)"),
    (lambda: fm.cfm_loss(lambda x, t: x[:, :1], fm.ot_path, X_0), r"velocity \(3, 1\)"),
    (lambda: fm.cfm_loss(swing, fm.ot_path, X_0, X_0[:, :1]), r"x_0 \(3, 1\)"),
    (lambda: fm.cfm_loss(swing, fm.ot_path, X_0[:0]), "B > 0"),
    (lambda: fm.cfm_loss(swing, fm.ot_path, X_0, t=times(0.5)), r"must be \(3,\)"),
    (lambda: fm.cfm_loss(swing, lambda t: (t, 1 - t, 1.0, -1.0), X_0), r"must be \(3,\), not 1.0"),
    (lambda: fm.cfm_loss(swing, fm.ot_path, X_0, weight=torch.ones(3, 1)), r"must be \(3,\)"),
    (lambda: fm.log_likelihood(lambda x, t: x[:, :1], X_0), r"grad|\(3, 1\)"),
    (lambda: fm.log_likelihood(torch.no_grad()(swing), X_0), "does not require grad"),
    (lambda: fm.ot_coupling(X_0, X_0[:2]), "shape"),
    (lambda: fm.frechet_distance(np.zeros(2), np.eye(2), np.ones(2) * np.nan, np.eye(2)), "NaN"),
    (lambda: fm.frechet_distance(np.zeros(2), np.eye(2), np.ones(2), np.eye(2) * np.nan), "NaN"),
    (lambda: fm.frechet_distance(np.zeros(2), np.eye(2), np.ones(1), np.eye(1)), "mismatch"),
    (lambda: fm.fit_gaussian([]), "two samples"), (lambda: fm.fit_gaussian([X_0[:1]]), "two sam"),
    (lambda: fm.fit_gaussian([X_0, X_0 / 0]), "not all are finite"),
    (lambda: fm.pixels(X_0.float()), "float32")])
def test_a_wrong_call_says_what_is_wrong(call, says):
    with pytest.raises((ValueError, RuntimeError), match=says):
        call()


# §9  Training -----------------------------------------------------------------------------------

ARROWS = (torch.arange(50).view(50, 1, 1, 1) * torch.tensor([[4, 1], [3, 0]])).byte()


def draw(step=1, **more):
    """A batch of ARROWS, none but the first like its mirror image, of classes a, b, a, b..."""
    c = config(**dict(names=list("ab")) | more)
    return fm.draw_batch(ARROWS, torch.arange(50) % 2, c, step, CPU)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    assert all(map(torch.equal, draw(5, seed=3), draw(5, seed=3)))
    others = [draw(step, seed=seed) for seed, step in (
        (3, 5), (3, 6), (4, 5), (4, 4), (2, 6), (5, 3), (4099, 5), (3, 4101))]
    assert all(len({batch[part].flatten()[0].item() for batch in others}) == 8 for part in (2, 3))


@pytest.mark.parametrize("flip, plain_share, margin", [(False, 1, 0), (True, 0.5, 0.04)])
def test_a_batch_has_every_image_with_its_label_mirrored_only_if_asked(flip, plain_share, margin):
    x_1, y, _, _ = draw(batch=4000, flip=flip)
    which = (fm.to_uint8(x_1).flatten(1).amax(1) / 4).long()
    assert torch.equal((which % 2)[y < 2], y[y < 2])
    assert (torch.bincount(which, minlength=50) - 80).abs().max() < 45  # 5 standard errors
    many = fm.draw_batch(torch.zeros(3000, 1, 1, 1).byte(), torch.arange(3000),
                         config(batch=90_000), 1, CPU)[1]
    assert torch.bincount(many, minlength=3000).min() > 0  # each 30 times on average
    plain, mirrored = ((fm.to_uint8(x_1) == images[which]).flatten(1).all(1)
                       for images in (ARROWS, ARROWS.flip(3)))
    assert (plain | mirrored).all()
    assert abs(plain[which > 0].float().mean() - plain_share) <= margin  # 5 standard errors


def test_a_batch_couples_within_classes_and_drops_labels_sample_by_sample():
    apart, coupled = (draw(batch=60, coupling=coupling) for coupling in ("independent", "ot"))
    assert torch.equal(apart[2].sort(0)[0], coupled[2].sort(0)[0])
    for (x_1, y, x_0, _), best in ((apart, False), (coupled, True)):
        y = (fm.to_uint8(x_1).flatten(1).amax(1) / 4).long() % 2  # of all, also of the dropped
        assert torch.equal(fm.ot_coupling(x_0, x_1, y), x_0) == best
        assert not torch.equal(fm.ot_coupling(x_0, x_1), x_0)
    shares = torch.bincount(draw(batch=4000)[1], minlength=3) / 4000
    assert (shares - torch.tensor([0.45, 0.45, 0.1])).abs().max() < 0.03  # 4 standard errors


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_the_shares_of_ranks_are_the_batch_and_only_a_coupling_reads_more_than_its_own(coupling):
    class Images:  # counts what is read
        shape, device, read = ARROWS.shape, CPU, 0

        def __len__(self):
            return len(ARROWS)

        def __getitem__(self, index):
            self.read += len(index)
            return ARROWS[index]

    c, y, images = config(names=list("ab"), coupling=coupling, flip=True), torch.arange(50) % 2, {}
    whole = fm.draw_batch(ARROWS, y, c, 7, CPU)
    shares = []
    for rank in range(4):
        images[rank] = Images()
        shares.append(fm.draw_batch(images[rank], y, c, 7, CPU, rank, 4))
        assert images[rank].read == (32 if coupling == "ot" else 8)
    assert all(torch.equal(torch.cat(parts), part)
               for parts, part in zip(zip(*shares, strict=True), whole, strict=True))


@pytest.mark.parametrize("time_, cdf", [("uniform", scipy.stats.uniform.cdf), (
    "logit-normal", lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t))))])
def test_the_density_of_the_times(time_, cdf):
    t = draw(time=time_, batch=20_000)[3]
    assert t.min() >= 0 and t.max() <= 1
    assert scipy.stats.kstest(t.double().numpy(), cdf).pvalue > 1e-3  # one fixed draw


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three steps on the digits by each path, with every choice that a step has: checkpoints."""
    out = {name: tmp_path_factory.mktemp(name) for name in fm.PATHS}
    for name in out:
        run(f"train --path {name} --classes --flip --coupling ot --seed 70003 --size 8 --width 8"
            " --mults 1,2"
            " --lr 0.1 --attention none --steps 3 --warmup 2 --clip 0.2 --batch 32"
            " --device cpu --out", out[name])
    return {name: folder / "checkpoint.pt" for name, folder in out.items()}


@ALL_PATHS
def test_the_steps_of_train_are_the_gradient_steps_of_eq_14_written_out_by_hand(models, name):
    """For vp and ve F learns, at unit scale, what the best linear predictor of u from x misses."""
    checkpoint, (images, labels, names) = load(models[name].parent), fm.draw_digits(20_000, 8)
    c = argparse.Namespace(**checkpoint["config"])
    assert c.data_rms == approx(fm.to_float(images).square().mean().sqrt().item(), rel=0.01)
    assert (c.path, c.coupling, c.flip, c.names) == (name, "ot", True, names)
    torch.manual_seed(70003)
    velocity, rms, seen, past = fm.build(c), c.data_rms, [], []
    adam = torch.optim.Adam(velocity.parameters())
    for step, rate in ((1, 0.1 / 2), (2, 0.1 * 2 / 3), (3, 0.1 / 3)):  # up, then down to 0
        x_1, y, x_0, t = fm.draw_batch(images, labels, c, step, CPU)
        alpha, sigma, d_alpha, d_sigma = (part[:, None, None, None] for part in paper(name, t))
        x, u = alpha * x_1 + sigma * x_0, d_alpha * x_1 + d_sigma * x_0
        net, c_in, skip, left = velocity, 1, 0, torch.ones(())
        if name != "ot":  # `left` is the variance that the predictor, skip x, leaves
            power = (alpha * rms) ** 2 + sigma**2
            net, c_in = velocity.net, power**-0.5
            skip = (alpha * d_alpha * rms**2 + sigma * d_sigma) / power
            left = (d_alpha * rms) ** 2 + d_sigma**2 - skip**2 * power
        v = skip * x + left**0.5 * net((c_in * x).float(), t, y)
        adam.zero_grad()
        loss = ((v - u) ** 2 / left).mean()
        loss.backward()
        seen.append(loss.item())
        assert nn.utils.clip_grad_norm_(velocity.parameters(), 0.2) > 0.2
        adam.param_groups[0]["lr"] = rate
        adam.step()
        past.append([p.detach().clone() for p in velocity.parameters()])
    share = [(n / 3) ** 13 - ((n - 1) / 3) ** 13 for n in (1, 2, 3)]  # of each step's weights
    average = [sum(map(operator.mul, share, each)) for each in zip(*past, strict=True)]
    assert losses(models[name].parent) == [(3, approx(np.mean(seen), rel=1e-4))]
    for part, expected in (("model", velocity.parameters()), ("ema", average)):
        expected = torch.cat([p.detach().flatten() for p in expected])
        got = torch.cat([p.flatten() for p in checkpoint[part].values()])
        off = ~torch.isclose(got, expected, rtol=1e-4, atol=1e-6)
        # where a gradient's sum cancels, Adam divides what is left, rounding, by its own size
        assert off.float().mean() < 2e-3


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_leaves_a_checkpoint_and_a_second_stops(tiny, monkeypatch, capsys, name):
    number, before = getattr(signal, name), {n: signal.getsignal(n) for n in (2, 15)}
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            at_loss(patch, {20: lambda loss: signal.raise_signal(number) or loss})
            run(tiny[0], "--out", "run")
        assert stop.value.code == 128 + number and load("run")["step"] == 20
        assert signal.getsignal(number) == signal.SIG_DFL  # the next one ends the process
        assert not Path("run/step-000020.png").exists()  # it leaves soon
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)
    run(f"{RESUME} run")
    assert same(tiny[1], "run")


def test_two_ranks_stopped_and_killed_go_on_bit_by_bit_and_on_one_rank_to_rounding(
        tiny, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def torchrun(end, command):
        """Two ranks, which end as said below `__main__`: status and output."""
        try:
            torch.distributed.run.main(["--standalone", "--nproc-per-node=2", __file__, end,
                                        *command.split()])
            status = 0
        except torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
            status = 1
        for number, handler in before.items():
            signal.signal(number, handler)
        return status, "".join(capfd.readouterr())

    command = f"{tiny[0]} --dropout 0 --save-every 12 --out"  # its masks differ by rank
    status, said = torchrun("0:SIGKILL", f"{command} whole")
    assert status == 0 and said.count("step 24/24") == 1, said  # rank 0 speaks
    status, said = torchrun("15:SIGTERM", f"{command} killed")  # both leave at one step
    assert status != 0 and load("killed")["step"] == 15, said
    assert "torchrun --nproc_per_node=2 flow_matching.py train --resume --out killed" in said
    status, said = torchrun("5:SIGKILL", f"{RESUME} killed")
    assert status != 0 and load("killed")["step"] == 15 and losses("killed")[-1][0] == 18, said
    shutil.copytree("killed", "moved")
    status, said = torchrun("0:SIGKILL", f"{RESUME} killed")
    assert status == 0 and same("whole", "killed"), said
    assert losses("killed") == losses("whole")  # each step once
    files = ["checkpoint.pt", "log.jsonl", "step-000012.png", "step-000024.png"]
    assert sorted(os.listdir("killed")) == sorted(os.listdir("whole")) == files
    run(f"{RESUME} moved")
    # float32 sums in another order differ by 1e-7; 9 steps at a high rate amplify that.
    np.testing.assert_allclose(losses("moved"), losses("whole"), rtol=1e-4)


def test_a_run_of_several_ranks_names_torchrun_and_a_launcher_may_leave_out_the_local_rank(
        monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(fm, "train", lambda args, checkpoint: signal.SIGTERM)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
        fm.main(["train", "--out", "my run"])
    assert "torchrun --nproc_per_node=2 flow_matching.py train --resume --out 'my run'" in (
        said.getvalue()) and stop.value.code == 128 + signal.SIGTERM
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    ranks = unittest.mock.Mock(**{"get_rank.return_value": 0, "get_world_size.return_value": 3})
    monkeypatch.setattr(fm, "dist", ranks)
    assert fm.start_ranks(CPU) == (0, 3, 0)


def test_the_grid_is_of_the_average_without_dropout_in_batches_of_the_run(tiny, monkeypatch):
    run(f"sample --ckpt {tiny[1]} --out made")
    grid, made = tiles(tiny[1] / "step-000024.png", 64, 8), np.stack([*pngs("made").values()])
    assert np.abs(grid - made).max() <= 1
    sizes, sample = [], fm.sample
    monkeypatch.setattr(fm, "sample", lambda v, noise, *path, **solver: (
        sizes.append(len(noise)) or sample(v, noise, *path, **solver)))
    run(f"{tiny[0]} --steps 1 --batch 24 --warmup 0 --out run")
    assert sizes == [24, 24, 16]


@pytest.mark.parametrize("terminal, lines", [(True, 8), (False, 1)])
def test_progress_is_in_place_at_a_terminal_and_a_line_a_minute_in_a_file(
        terminal, lines, monkeypatch):
    said = io.StringIO()
    said.isatty = lambda: terminal
    with contextlib.redirect_stdout(said):
        assert [*itertools.chain(*fm.in_batches(15, 2, "images"))] == [*range(15)]
        assert said.getvalue().count(" left") == lines
        assert said.getvalue().count("\n") == 1 and "15/15" in said.getvalue()
        clock = itertools.count(0, 25)  # a batch: 25 seconds
        monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
        for _ in fm.in_batches(15, 2, "slow"):
            pass
    assert said.getvalue().count("slow") == (8 if terminal else 3)


def test_drawn_digits_beside_a_folder_of_that_name(monkeypatch):
    monkeypatch.setattr(fm, "train", lambda args, checkpoint: 0)
    write_folder("digits", n=2)
    run("train --data digits --out digits/run")
    assert "inside" in refuse("train --data ./digits --out digits/run")


def become(monkeypatch, rank, local):
    """This process is a rank of two, alone; returned is what stands for the other."""
    other = unittest.mock.Mock()
    monkeypatch.setattr(fm, "dist", other)
    monkeypatch.setattr(fm, "start_ranks", lambda device: (rank, 2, local))
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model: model)
    return other


def test_dropout_differs_between_ranks_and_steps(tiny, monkeypatch):
    """The same samples at all steps and ranks, and weights that stand still: only masks differ."""
    checkpoint, seen, first = load(tiny[1]), [], fm.draw_batch
    checkpoint["config"] |= dict(lr=1e-12, steps=27)
    monkeypatch.setattr(fm, "draw_batch", lambda images, labels, c, step, device, rank, world: [
        part[:4] for part in first(images, labels, c, 1, device)])
    at_loss(monkeypatch, {n: lambda loss: seen.append(loss.item()) or loss for n in range(1, 7)})
    for rank in (0, 1):
        become(monkeypatch, rank, rank)
        torch.save(checkpoint, "checkpoint.pt")
        run(f"{RESUME} .")
    assert len(seen) == len(set(seen)) == 6


@pytest.mark.parametrize("rank, local, order", [
    (0, 0, ["data", "barrier"]), (1, 1, ["barrier", "data"]), (1, 0, ["data", "barrier"])])
def test_ranks_wait_for_their_machine_s_first_and_a_batch_must_divide(
        rank, local, order, tiny, monkeypatch):
    seen, load_data = [], fm.load_data
    become(monkeypatch, rank, local).barrier = lambda: seen.append("barrier")
    monkeypatch.setattr(fm, "load_data", lambda *args, **more: (
        seen.append("data") or load_data(*args, **more)))
    run(f"{tiny[0]} --steps 1 --out run")
    assert seen[:2] == order
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "divisible" in refuse(f"{tiny[0]} --batch 7 --out other") and len(seen) == 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA"))])
def test_amp_has_float32_weights_and_gradients_but_for_rounding(device, tiny, monkeypatch):
    """The norm that is clipped in fp16 is not 65536 times the true one."""
    norms, found, clip = [], {}, nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_",
                        lambda *args: norms.append(clip(*args)) or norms[-1])
    for amp in ("off", "bf16", "fp16"):
        run(f"{tiny[0]} --steps 1 --clip 1000 --amp {amp} --device {device}"
            f" --out {amp}")
        checkpoint = load(amp)
        weights = [*checkpoint["model"].values(), *checkpoint["ema"].values()]
        assert {p.dtype for p in weights} == {torch.float32}
        assert bool(checkpoint["scaler"]) == (amp == "fp16")
        found[amp] = np.array([losses(amp)[0][1], norms[-1].item()])
    for amp in ("bf16", "fp16"):
        np.testing.assert_allclose(found[amp], found["off"], rtol=0.02)
        assert found[amp][1] != found["off"][1]  # matrix work was done in amp
    assert not torch.backends.cudnn.allow_tf32  # "off" is float32: torch's default has 10 bits


def test_an_fp16_overflow_is_skipped_and_its_scale_is_resumed(tiny, monkeypatch):
    at_loss(monkeypatch, {5: lambda loss: loss * 1e34})  # times the scale, 65536: above float32
    run(f"{tiny[0]} --amp fp16 --steps 6 --out run")
    first = load("run")
    assert all(p.isfinite().all() for p in first["ema"].values())
    assert first["scaler"]["scale"] < 65536  # the initial scale, halved once or more
    assert all(math.isfinite(loss) for _, loss in losses("run"))
    run(f"{RESUME} run --steps 7")
    grown = first["scaler"] | {"_growth_tracker": first["scaler"]["_growth_tracker"] + 1}
    assert load("run")["scaler"] == grown


@pytest.mark.parametrize("bad, what, says", [
    (8, "loss", "loss of steps 7 to 9 is not finite"), (8, "weights", "loss of steps 7 to 9 is"),
    (12, "weights", "weights of step 12 are not finite")])
def test_what_is_not_finite_stops_before_it_is_saved(bad, what, says, tiny, monkeypatch):
    """A loss; weights gone bad under finite gradients, also at the step that is saved."""
    step = torch.optim.Adam.step

    def spoil(loss):
        if what == "weights":
            monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: [
                p.data.fill_(math.nan) for group in self.param_groups for p in group["params"]])
            return loss
        return loss * math.nan

    at_loss(monkeypatch, {bad: spoil})
    assert says in refuse(f"{tiny[0]} --save-every 6 --out run")
    assert load("run")["step"] == 6
    assert all(p.isfinite().all() for p in load("run")["ema"].values())
    monkeypatch.setattr(torch.optim.Adam, "step", step)


@pytest.mark.parametrize("kind", [ValueError, OSError, RuntimeError])
def test_a_fault_of_somebody_s_network_keeps_its_traceback(kind, tiny, models, monkeypatch):
    """When it is built, trained, sampled and measured; also in what training draws as it saves."""
    commands = [f"{tiny[0]} --out run", f"sample --ckpt {tiny[1]} --n 2 --out made",
                f"sample --ckpt {tiny[1]} --n 2 --out made.png",
                f"fid --ckpt {tiny[1]} --features pixels --n 2",
                f"nll --ckpt {tiny[1]} --reference train --n 2"]
    for method in ("__init__", "forward"):
        with monkeypatch.context() as patch:
            fault = unittest.mock.Mock(side_effect=kind("somebody's"))
            patch.setattr(fm.UNet, method, fault)
            for command in commands:
                with pytest.raises(kind, match="somebody's") as raised:
                    run(command)
                assert not isinstance(raised.value, fm.UserError)
            shutil.rmtree("run", ignore_errors=True)
    with monkeypatch.context() as patch, pytest.raises(kind, match="somebody's"):
        patch.setattr(fm, "sample", fault)
        run(f"{tiny[0]} --out run")
    assert load("run")["step"] == 24  # it was saved before it was shown


def test_a_checkpoint_is_flushed_beside_the_old_one_and_then_renamed(tiny, monkeypatch):
    file, flushed, fsync = Path(shutil.copytree(tiny[1], "run"), "checkpoint.pt"), {}, os.fsync
    os.link(file, "old")
    before = file.read_bytes()

    def watch(descriptor):
        if not flushed:  # the checkpoint, before the grid: the old one is there until the end
            assert file.read_bytes() == before
        flushed[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    run(f"{RESUME} run --steps 25")
    assert flushed[file.stat().st_ino] == file.stat().st_size and load("run")["step"] == 25
    assert Path("old").read_bytes() == before and not [*Path("run").glob("*.fm-tmp")]


@pytest.mark.parametrize("kind, most, command, says", [
    ("RLIMIT_FSIZE", 2**17, RESUME + " run --steps 25", "disk"),
    ("RLIMIT_DATA", 30 * 2**30, "{} --batch 33554432 --size 32 --attention 16", "--batch, ")])
def test_a_full_disk_or_memory_is_named_and_the_checkpoint_stays(kind, most, command, says, tiny):
    """By limits of the system; 33,554,432 images of 32 x 32 want 34 GB for their bytes alone."""
    resource = pytest.importorskip("resource")
    file, kind = Path(shutil.copytree(tiny[1], "run"), "checkpoint.pt"), getattr(resource, kind)
    before, limits = file.read_bytes(), resource.getrlimit(kind)
    resource.setrlimit(kind, (most, limits[1]))
    try:
        assert says in refuse(command.format(tiny[0]))
    finally:
        resource.setrlimit(kind, limits)
    assert file.read_bytes() == before and not [*Path("run").glob("*.fm-tmp")]


def test_rates_and_the_time_left_are_of_this_run_also_after_a_resume(tiny, monkeypatch):
    """By a clock that each step moves by two seconds, and each look at it by next to nothing."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock.append(clock[-1] + 1e-6) or clock[-1])
    at_loss(monkeypatch, {n: lambda loss: clock.append(clock[-1] + 2) or loss for n in range(99)})
    said = run(f"{tiny[0]} --steps 9 --save-every 4 --out run")
    said += run(f"{RESUME} run --steps 27 --save-every 99")
    for step, left in (("3/9", "0:00:12"), ("9/9", "0:00:00"), ("12/27", "0:00:30")):
        assert re.search(rf"step {step}  4 images/s  {left} left  loss", said), said
    rates = [row["images_per_second"] for row in rows("run/log.jsonl")]
    assert rates == approx([4] * 11, rel=1e-4)  # also of a line that a checkpoint made early


# §10  The theory, drawn -------------------------------------------------------------------------
def measure_paths(means, tau, particles=1000, seed=0):
    """How well few evaluations follow the exact field: {(path, solver, NFE): (landed, error)}.

    landed: share of particles within 3τ of a mean; error: mean squared, against 300 rk4 steps.
    """
    noise, table = fm.draw_noise(seed, range(particles), (2,)), {}
    for name, path in fm.PATHS.items():
        v = functools.partial(fm.marginal_velocity, path, means=means, tau=tau)
        exact, _ = fm.sample(v, noise, path, solver="rk4", steps=300)
        for solver, calls in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
            for nfe in (8, 12, 20, 40, 60, 100):
                x, _ = fm.sample(v, noise, path, solver=solver, steps=nfe // calls)
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


def test_ot_needs_60_percent_of_vp_evaluations_under_the_paper_s_conditions():
    """Fig. 7 on the exact field: eight Gaussians by Euler; on a checkerboard by other solvers.

    There 1,000 particles give Euler 239%, midpoint 59%, rk4 45%; bands are the spread over them.
    """
    angles, side = torch.arange(8) * math.pi / 4, torch.arange(16) * 0.25 - 1.875
    table = measure_paths(2 * torch.stack([angles.cos(), angles.sin()], 1), 0.1, particles=400)
    assert 0.52 < evaluations_ratio(table) < 0.68
    assert all(error < table["vp", solver, nfe][1] for (name, solver, nfe), (_, error)
               in table.items() if (name, solver) == ("ot", "euler"))
    finest = [landed for (_, _, nfe), (landed, _) in table.items() if nfe == 100]
    # 98.9% of a 2-D Gaussian lie within 3 tau; 400 particles: 0.5% standard error
    assert len(finest) == 9 and all(abs(landed - 0.989) < 0.02 for landed in finest)
    points = torch.cartesian_prod(side, side)
    table = measure_paths(points[(points + 2).floor().sum(1) % 2 == 1], 0.1, particles=200)
    for solver, low, high in (("euler", 1.9, 2.9), ("midpoint", 0.4, 0.7), ("rk4", 0.38, 0.5)):
        assert low < evaluations_ratio(table, solver) < high, solver
    known = {(name, "euler", n): (1.0, (scale * n) ** -2.0)
             for name, scale in (("ot", 2), ("vp", 1)) for n in (8, 16, 32, 64)}
    assert evaluations_ratio(known) == approx(0.5)


def test_paths_draws_the_data_where_it_is():
    assert "paths.png" in run("paths") and "--overwrite" in refuse("paths --out paths.png")
    first = np.asarray(Image.open("paths.png"))
    assert first.shape[0] > 900 and first.shape[1] > 1500
    run("paths --overwrite --seed 1")
    assert not np.array_equal(first, np.asarray(Image.open("paths.png")))
    panels = fm.draw_paths(torch.tensor([[2.0, 1.0]]), 0.1).float().mean(1)[:, 30:]  # untitled
    (y_0, x_0), (y, x) = (np.argwhere(panels[i].numpy() < 60).mean(0) / (270, 300) for i in (0, 4))
    assert x > 0.6 and y < 0.4 and abs(x_0 - 0.5) < 0.05 and abs(y_0 - 0.45) < 0.1
    assert all((panels[i] < 60).sum() > 2000 for i in (0, 5, 10))  # all 400 are inside
    spreads = [np.argwhere(panels[i].numpy() < 60).std(0) for i in (4, 9, 14)]
    assert np.ptp(spreads) < 0.2 * np.mean(spreads) and np.mean(spreads) > 4  # pixels: tau is 5


# §11  Command line ------------------------------------------------------------------------------
def tiles(file, n, columns):
    """The first n images of 8 x 8 of a grid, row by row: int (n, 8, 8)."""
    grid = np.asarray(Image.open(file).convert("L")).astype(int)
    scale = grid.shape[1] // (9 * columns + 1)  # of a pixel; a line of one between images
    assert grid.shape[1] >= 512
    grid = grid[scale // 2 :: scale, scale // 2 :: scale]
    assert grid.shape == (9 * math.ceil(n / columns) + 1, 9 * columns + 1)
    corners = [(9 * (i // columns) + 1, 9 * (i % columns) + 1) for i in range(n)]
    return np.stack([grid[y : y + 8, x : x + 8] for y, x in corners])


@ALL_PATHS
def test_sample_is_midpoint_by_hand_with_classes_and_guidance(models, name, monkeypatch):
    """In a folder and in a grid, a class a column, in order for any size of the batch."""
    v, n, images = fm.load(models[name]), 12, {}
    sigma_0 = {"ot": 1, "vp": math.sqrt(1 - math.exp(-10.05)), "ve": 50}[name]
    calls, forward = [], fm.UNet.forward
    monkeypatch.setattr(fm.UNet, "forward", lambda *args: calls.append(1) or forward(*args))
    for label, scale in (("", 1), ("", 2.5), ("7", 2.5), ("7", 0)):
        x, y = sigma_0 * fm.draw_noise(5, range(n), (1, 8, 8)), torch.arange(n) % 10
        y = torch.full((n,), int(label)) if label else y

        def u(x, t, y=y, scale=scale):
            return v(x, t, None) + scale * (v(x, t, y) - v(x, t, None))

        for i in range(20):
            t, h = torch.full((n,), i / 20), 1 / 20
            x = x + h * u(x + h / 2 * u(x, t), t + h / 2)
        expected = ((x.clamp(-1, 1) + 1) * 127.5).round()[:, 0].numpy()
        command = f"sample --n {n} --seed 5 --steps 20 --ckpt {models[name]} --guidance {scale}"
        command += f" --label {label}" if label else ""
        calls.clear()
        said = run(f"{command} --out {label}-{scale}")
        assert f"NFE {len(calls)}," in said and len(calls) == (40 if scale == 1 else 80)
        made = pngs(f"{label}-{scale}")
        assert list(made) == [f"{i:06d}" for i in range(n)]
        assert (f"of {label}," if label else "of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 in turn") in said
        images[label, scale] = np.stack([*made.values()])
        assert np.abs(images[label, scale] - expected).max() <= 1 and expected.std() > 10
        run(f"{command} --batch 5 --overwrite --out grid.PNG")
        grid = tiles("grid.PNG", n, 3 if label else 10)
        assert np.abs(grid - images[label, scale]).max() <= 1
    assert all(np.abs(images["", 2.5] - images[key]).max() > 2 for key in (("", 1), ("7", 2.5)))
    run(f"sample --ckpt {models[name]} --out last")
    grid = tiles(models[name].with_name("step-000003.png"), 64, 8)  # which training left
    assert np.abs(grid - np.stack([*pngs("last").values()])).max() <= 1


@ALL_PATHS
def test_nll_is_the_likelihood_by_hand_of_images_of_its_split(models, name, monkeypatch):
    """The draws of an image share their signs: else log mean exp takes their noise for density."""
    seen, original = [], fm.log_likelihood
    monkeypatch.setattr(fm, "log_likelihood", lambda v, x, path, probes, **solver: (
        seen.append((x, probes and probes[0])) or original(v, x, path, probes, **solver)))
    file = Path(shutil.copytree(models[name].parent, "run"), "results.jsonl")
    command = "nll --n 3 --k 2 --solver rk4 --steps 2 --ckpt run"
    run(f"{command} --batch 2")
    x, signs = [torch.cat(part) for part in zip(*seen, strict=True)]
    order = [0, 2, 1, 3, 4, 5]  # by image, then by draw
    x, signs = x[order], signs[order]
    run(command)  # in one batch
    run(f"{command} --exact")
    for row, probes in zip(rows(file), ([signs], [signs], None), strict=True):
        v, path = fm.load(models[name]), fm.PATHS[name]
        log_p, nfe = original(v, x, path, probes, solver="rk4", steps=2)
        bits = 7 - (log_p.view(3, 2).double().exp().mean(1)).log2() / 64
        assert row["bits_per_dim"] == approx(bits.mean().item(), rel=1e-5)
        assert row["standard_error"] == approx(bits.std().item() / 3**0.5, rel=1e-3)
        assert (row["n"], row["nfe"], row["k"], row["seed"]) == (3, nfe, 2, 0)
        assert (row["solver"], row["steps"], row["reference"]) == ("rk4", 2, "test")
    # uniform over [-1, 1]^64: each of 256 levels is as likely; of densities 1 and 3 the mean is 2
    assert fm.bits_per_dim(torch.full((1, 1), -64 * math.log(2)), 64).item() == approx(8)
    assert fm.bits_per_dim(times(1, 3).log()[None], 2).item() == approx(7 - 1 / 2)
    x, signs = x.reshape(3, 2, 64), signs.reshape(3, 2, 64)
    assert torch.equal(signs, signs[:, :1].expand(3, 2, 64)) and (signs.abs() == 1).all()
    assert len(torch.unique(signs[:, 0], dim=0)) == 3
    assert len(torch.unique(x.flatten(0, 1), dim=0)) == 6
    levels = (128 * (x + 1)).floor().long()  # the same image under two dequantisations
    assert torch.equal(levels, levels[:, :1].expand(3, 2, 64))
    test = fm.draw_digits(20_000, 8, seed=1)[0].flatten(1).long()  # kept from training
    places = [(test == image).all(1).nonzero() for image in levels[:, 0]]
    assert all(len(place) for place in places) and max(map(torch.max, places)) > 1000
    write_folder("set", n=4)
    run(f"{command} --n 999 --reference set")  # all that there are
    assert rows(file)[3]["n"] == 4


@ALL_PATHS
def test_fid_is_the_distance_of_the_images_that_sample_writes(models, name):
    model = f"--ckpt {models[name]} --n 9 --seed 3 --solver euler --guidance 2"
    file = models[name].with_name("results.jsonl")
    file.unlink(missing_ok=True)
    write_folder("set", n=30)
    for reference in ("train", "test", "set"):
        said = run(f"fid --features pixels {model} --batch 4 --steps 3 --reference {reference}")
        assert "not comparable" in said and "covariance is singular" in said
    run(f"sample {model} --batch 4 --steps 3 --out made")
    made = torch.from_numpy(np.stack([*pngs("made").values()]))
    reals = [*(fm.draw_digits(20_000, 8, seed)[0] for seed in (0, 1)),
             fm.load_folder("set", "data", 8)[0]]
    made, *reals = (x.flatten(1).double() / 127.5 - 1 for x in (made, *reals))
    got = [row["frechet_distance"] for row in rows(file)]
    assert got == approx([frechet(made, real) for real in reals], abs=3e-5)
    assert len({f"{distance:.4f}" for distance in got}) == 3
    assert [(row["steps"], row["nfe"]) for row in rows(file)] == [(3, 6)] * 3
    assert [row["n_reference"] for row in rows(file)] == [20_000, 20_000, 30]


@pytest.mark.parametrize("command", ["sample", "fid --features pixels", "nll"])
def test_the_tolerance_decides_how_often_dopri5_evaluates_an_image(command, models, monkeypatch):
    seen, forward, nfes = [], fm.UNet.forward, []
    monkeypatch.setattr(fm.UNet, "forward", lambda net, x, *more: (
        seen.append(len(x)) or forward(net, x, *more)))
    for tolerance in (0.1, 1e-5):
        seen.clear()
        said = run(f"{command} --ckpt {models['ot']} --n 3 --batch 2 --solver dopri5 --tolerance",
                   tolerance)
        nfes.append(float(re.search(r"NFE ([\d.]+)", said)[1]))
        assert nfes[-1] == approx(sum(seen) / 3, rel=1e-4) and len({*seen}) == 2
    assert nfes[0] < 0.7 * nfes[1]


def test_fid_with_inception_says_what_it_compared(models, inception_file):
    write_folder("set", n=3)
    model = f"--ckpt {models['ot']} --n 2 --steps 2"
    run(f"sample {model} --out made")
    said = run(f"fid {model} --inception {inception_file} --reference set")
    made = torch.from_numpy(np.stack([*pngs("made").values()])).byte()[:, None]
    real = fm.load_folder("set", "data", 8)[0]
    expected = frechet(*(fm.inception(inception_file)(x).double() for x in (made, real)))
    distance = rows(models["ot"].with_name("results.jsonl"))[-1]["frechet_distance"]
    assert distance == approx(expected, rel=1e-3)
    assert all(part in said for part in (f"FID {distance:.4f}", "2 made, 3 of", "singular"))


def test_sample_takes_the_newest_run_s_ema_and_for_dopri5_float32(tiny, monkeypatch):
    """bf16 rounds by 4e-3, which the error control at 1e-5 would chase with ever smaller steps."""
    choose_device, checkpoint = fm.choose_device, load(tiny[1])
    seen, forward = [], fm.UNet.forward
    monkeypatch.setattr(fm.UNet, "forward", lambda *args: seen.append(forward(*args)) or seen[-1])

    def pretend(args):  # what is chosen on a GPU
        args.amp = args.amp or ("off" if args.solver == "dopri5" else "bf16")
        choose_device(args)

    monkeypatch.setattr(fm, "choose_device", pretend)
    checkpoint["model"] = {k: math.nan * p for k, p in checkpoint["model"].items()}
    for name, age in (("old", 100), ("new", 0), ("older", 200)):
        file = Path("runs", name, "checkpoint.pt")
        file.parent.mkdir(parents=True)
        torch.save(checkpoint, file)
        os.utime(file, (time.time() - age,) * 2)
    for more, amp, nfe in (("euler --steps 2", "bf16", 2), ("midpoint --steps 2", "bf16", 4),
                           ("rk4 --steps 2 --amp off", "off", 8), ("dopri5", "off", r"\d+"),
                           ("dopri5 --amp bf16 --tolerance 1", "bf16", r"\d+")):
        said = run(f"sample --n 1 --solver {more}")
        assert re.search(rf"runs/new/samples.png: .* NFE {nfe}, amp {amp}\b", said), said
        assert seen[-1].dtype == fm.AMP.get(amp, torch.float32)
    run("sample --n 2 --steps 1 --out made")
    assert list(pngs("made")) == ["000000", "000001"]


def test_overwriting_replaces_what_was_made_and_nothing_else(tiny, models, monkeypatch):
    sample = f"sample --ckpt {models['ot']} --n 2 --steps 1 --out"
    for out in ("x.png", "made"):
        run(f"{sample} {out}")
    for name in ("2026-holiday.png", "000007.png"):  # somebody's, and one of an earlier run
        Path("made", name).write_text("mine")
    for out in ("x.png", "made"):
        assert "--overwrite" in refuse(f"{sample} {out}")
        run(f"{sample} {out} --overwrite --label 3")
    assert sorted(os.listdir("made")) == ["000000.png", "000001.png", "2026-holiday.png"]
    shutil.copytree(tiny[1], "run")
    with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
        at_loss(patch, {1: kill})  # it does not go on with the old run
        run(f"{tiny[0]} --overwrite --out run")
    assert "no checkpoint" in refuse(f"{RESUME} run --steps 99")
    shutil.copytree(tiny[1], "run", dirs_exist_ok=True)
    Path("run/mine.png").touch()
    run(f"{tiny[0]} --overwrite --out run --steps 3")
    assert load("run")["step"] == 3
    files = ["checkpoint.pt", "log.jsonl", "mine.png", "step-000003.png"]
    assert sorted(os.listdir("run")) == files


@pytest.mark.parametrize("out", ["pipe", "pipe.png", "link.png", "/dev/null"])
def test_a_device_a_pipe_and_a_link_to_nothing_are_never_replaced(out, tiny):
    os.mkfifo("pipe")
    os.mkfifo("pipe.png")
    os.symlink("nowhere", "link.png")
    for command in ("paths", f"sample --ckpt {tiny[1]} --n 1 --steps 1"):
        assert "another place" in refuse(f"{command} --overwrite --out {out}")
    assert not Path(out).is_file() and os.path.lexists(out)


def test_a_run_stopped_before_its_first_checkpoint_can_start_anew_and_another_is_not_taken(tiny):
    shutil.copytree(tiny[1], "runs/old")
    Path("runs/new").mkdir()
    Path("runs/new/log.jsonl").touch()
    assert "runs/new" in refuse("train --resume --steps 99")  # and not runs/old
    run(f"{tiny[0]} --steps 1 --out runs/new")
    assert load("runs/new")["step"] == 1


def test_resume_takes_what_was_typed_and_refuses_what_would_be_another_training(tiny):
    """The newest run, or the one of --data and --path; its flags but for those that are typed."""
    command = f"{tiny[0]} --steps 2 --seed 7"
    run(f"{command} --path vp")  # into runs/set-vp
    run(command)
    os.utime("runs/set-vp/log.jsonl", (0, 0))
    run("train --resume --steps 3 --device cpu")
    assert (load("runs/set-ot")["step"], load("runs/set-vp")["step"]) == (3, 2)
    data = Path(command.split("--data ")[1].split()[0])
    run(f"train --resume --path vp --data {data} --steps 3 --lr 0.002 --batch 4 --device cpu")
    kept = load("runs/set-vp")["config"]
    assert (kept["lr"], kept["batch"], kept["seed"], kept["warmup"]) == (0.002, 4, 7, 3)
    for flag in ("--path ve", "--width 16", "--mults 1,1", "--blocks 2", "--attention 8",
                 "--size 16", "--classes"):
        name = flag.split()[0]
        assert name in refuse(f"{RESUME} runs/set-ot --steps 9 {flag}")
    run(f"{command} --steps 1 --overwrite --path vp --out over")  # is not what a resumed run does
    Path("over/step-000001.png").rename("over/step-000000.png")
    run(f"{RESUME} over --steps 2")
    run(f"{RESUME} over --steps 3 --overwrite")
    assert len([*Path("over").glob("step-*.png")]) == 3
    rms = load("runs/set-vp")["config"]["data_rms"]
    write_folder("other", n=4)
    run(f"{RESUME} runs/set-vp --steps 4 --data other")
    assert load("runs/set-vp")["config"]["data_rms"] == rms  # its scale does not change


def test_a_folder_s_levels_go_down_to_maps_of_about_8_and_attention_is_there(monkeypatch):
    seen = []
    monkeypatch.setattr(fm, "train", lambda args, checkpoint: seen.append(args))
    write_folder("folder", n=2)  # no name of a folder means anything else
    for size, levels, coarsest in ((8, 1, 8), (64, 4, 8), (50, 4, 7), (256, 6, 8)):
        run(f"train --data folder --size {size}")
        assert seen[-1].mults == [1, 2, 2, 2, 2, 2][:levels] and seen[-1].attention == [coarsest]
        assert seen[-1].size == size and seen[-1].out == "runs/folder-ot"


def test_the_recipes(monkeypatch):
    """cifar10: torchcfm's train_cifar10.py, but for the average; a slip here ruins days."""
    seen, usual = [], dict(width=16, mults=[1, 2, 4], blocks=1, attention=[], dropout=0.0, batch=32,
                           lr=2e-3, warmup=50, clip=1.0, time="uniform", coupling="independent")
    monkeypatch.setattr(fm, "train", lambda args, checkpoint: seen.append(args))
    for data, own in {
            "digits": dict(size=16, steps=2000, flip=False),
            "mnist": dict(size=28, steps=4000, flip=False),
            "fashion-mnist": dict(size=28, steps=4000, flip=True),
            "cifar10": dict(size=32, width=128, mults=[1, 2, 2, 2], blocks=2, attention=[16],
                            dropout=0.1, batch=128, lr=2e-4, warmup=5000, steps=400_000, flip=True),
            "photos": dict(size=32, width=64, mults=[1, 2, 2], blocks=2, attention=[8], batch=64,
                           lr=1e-3, warmup=200, steps=20_000, flip=False)}.items():
        run(f"train --data {data}")
        assert (usual | own).items() <= vars(seen[-1]).items(), data


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


@pytest.fixture(scope="module")
def bad(tiny, models, tmp_path_factory):
    """A directory of what is bad: NAME.pt are checkpoints, folders hold images or a run."""
    root, whole = tmp_path_factory.mktemp("bad"), (tiny[1] / "checkpoint.pt").read_bytes()
    for folder in ("one", "two", "broken", "colour", "loose", "splits/train", "splits/val",
                   "Splits/Train", "Splits/Valid", "deep/test"):
        write_folder(root / folder, n=1 if folder == "one" else 2)
    (root / "loose" / "class0" / "x.png").symlink_to("nowhere.png")
    for name in ("empty", "empty.png", "flat", "images", "x.png"):
        (root / name).mkdir()
    for name, image in {
            "flat/0.png": Image.new("L", (8, 8)), "colour/0.tiff": Image.new("RGB", (8, 8), "red"),
            "broken/bomb.png": Image.new("L", (64, 64)),
            "broken/float.tiff": Image.fromarray(np.full((8, 8), np.nan, np.float32)),
            "broken/long.tiff": Image.fromarray(np.full((8, 8), 70_000, np.int32))}.items():
        image.save(root / name)
    shutil.copytree(tiny[1], root / "run")
    shutil.copytree(models["ot"].parent, root / "ten")
    (root / "odd").mkdir()
    bomb, checkpoint = (root / "broken/bomb.png").read_bytes(), load(tiny[1])
    optimizer = copy.deepcopy(checkpoint["optimizer"])
    optimizer["state"][0]["exp_avg"] = torch.ones(2)  # Adam would write beyond its end
    turned = copy.deepcopy(checkpoint["optimizer"])
    turned["param_groups"][0]["params"].reverse()  # of the right shapes, for other weights
    flags, weights, digits = checkpoint["config"], checkpoint["ema"], torch.load(models["ot"])
    odd = checkpoint | {"ema": {k: p[:1] for k, p in weights.items()}}
    middle = whole.index(next(iter(weights.values())).numpy().tobytes())
    flipped = bytes([whole[middle] ^ 1])  # one bit of one weight
    for name, content in {
            "broken/empty.png": b"", "broken/cut.png": bomb[: len(bomb) // 2],
            "broken/page.png": b"<html>", "images/000000.png": b"old", "other.pth": b"other",
            "empty.pt": b"", "truncated.pt": whole[: len(whole) // 2],
            "damaged.pt": whole[:middle] + flipped + whole[middle + 1 :]}.items():
        (root / name).write_bytes(content)
    for name, content in {
            "pickle.pt": {"model": Payload()}, "foreign.pt": {"state_dict": {}},
            "config.pt": checkpoint | {"config": {"path": "ot"}}, "list.pt": [1, 2],
            "shapes.pt": odd, "odd/checkpoint.pt": odd,
            "more.pt": checkpoint | {"ema": weights | {"more": torch.ones(1)}},
            "moments.pt": checkpoint | {"optimizer": optimizer},
            "turned.pt": checkpoint | {"optimizer": turned},
            "fresh.pt": checkpoint | {"optimizer": {}},
            "nan.pt": checkpoint | {"ema": {k: p * math.nan for k, p in weights.items()}},
            "gone.pt": checkpoint | {"config": flags | {"data": "gone"}},
            "tiny.pt": checkpoint, "classy.pt": digits}.items():
        torch.save(content, root / name)
    return root


REFUSED = {
    "train": {
        "--path xy": "'xy'", "--data nowhere": "nowhere", "--bogus": "--bogus", "--amp fp8": "fp8",
        "--coupling o": "'o'", "--time normal": "'normal'", "--lr nan": "nan",
        "--mults 1,,2": "--mults", "--mults 1,0": "--mults", "--attention 3": "[3] [16, 8, 4]",
        "--device cuda": "cpu",
        "--device cuda:1": "cuda:1 cpu", "--device gpu": "gpu", "--width 4000000000": "4096",
        "--data empty": "with images", "--data splits": "name one train",
        "--data flat --data-dir other.pth": "other.pth",
        "--data broken": "bomb.png cut.png empty.png page.png float.tiff long.tiff",
        "--data Splits": "name one Train", "--data loose": "x.png", "--data mnist": "--data digits",
        "--data fashion-mnist": "--data-dir", "--data cifar10 --attention none": "--data-dir",
        "--data flat --classes": "two subfolders", "--data deep --classes": "['test']",
        "--data flat --out flat/run": "inside", "--out images": "--overwrite",
        "--out other.pth": "other.pth is no folder", "--out other.pth --overwrite": "no folder",
        "--out other.pth/run": "other.pth is no folder"},
    "train --out run": {
        "": "--resume", "--overwrite --data nowhere": "nowhere",
        "--overwrite --data flat --classes": "two subfolders"},
    "train --resume": {
        "": "runs", "--out nowhere": "nowhere", "--out run": "more --steps",
        "--out run --steps 30 --width 16": "--width cannot change",
        "--out run --steps 30 --data colour": "other channels or classes",
        "--out run --steps 30 --data gone": "gone is no folder",
        "--out odd --steps 30": "odd/checkpoint.pt",
        "--out ten --steps 30 --data two": "other channels or classes"},
    "sample": {"": "runs", "--ckpt nowhere.pt": "nowhere.pt", "--ckpt empty": "empty",
               "--solver heun": "heun", "--device cuda": "cpu", "--amp half": "half", **{
                   f"--ckpt {name}.pt": f"{name}.pt" for name in (
                       "empty", "truncated", "pickle", "foreign", "shapes", "config", "damaged",
                       "nan", "list", "more", "moments", "turned", "fresh")}},
    "sample --ckpt classy.pt": {
        "--label cat": "cat", "--label 10": "10", "--label bad --out new": "bad",
        "--guidance -1": "--g", "--out other.pth/made": "other.pth is no folder"},
    "sample --ckpt tiny.pt": {
        "--out x.png": "x.png is no file", "--out empty.png": "is no file",
        "--label 0": "--classes", "--solver dopri5 --steps 3": "leave out",
        "--tolerance 0": "--tolerance", "--guidance 2 --out images --overwrite": "--classes"},
    "": {"nll --ckpt tiny.pt --n 1 --reference train": "two", "paths --x y": "--x",
         "nll --ckpt tiny.pt --reference colour": "3 channels",
         "paths --out other.pth/x.png": "other.pth is no folder", "paths --out / --overwrite": "/",
         "paths --out images --overwrite": "is no file", "paths --out .": "is no file",
         "nll --ckpt tiny.pt --amp bf16": "--amp",
         "paths --seed -1": "--seed", "fid --n 0": "--n", "fid --steps 0": "--steps",
         "nll --ckpt tiny.pt --k 0": "--k"},
    "fid --ckpt tiny.pt": {
        "--inception other.pth": "--inception FILE", "--inception nowhere.pth": "nowhere.pth",
        "--inception pickle.pt": "--inception FILE", "": "--inception FILE",
        "--inception tiny.pt": "--inception FILE", "--features pixel": "'pixel'"},
    "fid --ckpt tiny.pt --features pixels": {
        "--n 1": "two images", "--inception other.pth": "--inception", "--guidance 2": "--classes",
        "--reference nowhere": "nowhere", "--reference test": "no test split",
        "--reference one": "two images", "--reference colour": "3 channels",
        "--solver dopri5 --steps 5": "dopri5 chooses"},
    "fid --ckpt gone.pt --features pixels": {"": "gone is no folder --reference"},
}


@pytest.mark.parametrize("command, says", [
    (f"{start} {more}", says) for start, table in REFUSED.items() for more, says in table.items()])
def test_bad_input_gets_one_line_and_changes_nothing(command, says, bad, monkeypatch):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(bad)
    monkeypatch.setenv("TORCH_HOME", str(bad))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: open("no route to host"))
    before = {f: f.stat().st_mtime_ns for f in bad.rglob("*") if f.is_file()}
    device = "" if "--device" in command or "paths" in command else " --device cpu"
    size = " --size 8 --steps 1" if command.startswith("train --data") else ""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40)  # so that 64 x 64 is a bomb
    error = refuse(command + size + device)
    assert all(word in error for word in says.split()), error
    after = {f: f.stat().st_mtime_ns for f in bad.rglob("*") if f.is_file()}
    assert {f.suffix for f in {*after} - {*before}} <= {".raw"}  # decoded data may be kept
    assert before.items() <= after.items()
    assert not any((bad / name).exists() for name in ("payload-ran", "runs", "new"))


@pytest.mark.parametrize("problem, says", [
    (fm.UserError("a\nb"), "a b"), (MemoryError, "--batch"), (torch.OutOfMemoryError, "--batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--batch"),
    (FloatingPointError("not finite"), "not finite"), (ValueError("a value"), None),
    (RuntimeError("shapes cannot be multiplied"), None), (TypeError("an argument"), None),
    (OSError("a socket"), None)])
def test_what_a_user_can_cause_is_one_line_and_other_faults_are_raised(problem, says, monkeypatch):
    monkeypatch.setattr(fm, "draw_paths", unittest.mock.Mock(side_effect=problem))
    if says:
        assert says in refuse("paths")
    else:
        with pytest.raises(type(problem), match=str(problem)):
            run("paths")


def test_ctrl_c_ends_a_command_with_its_status(monkeypatch):
    monkeypatch.setattr(fm, "draw_paths", unittest.mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        run("paths")
    assert stop.value.code == 128 + signal.SIGINT


@pytest.mark.parametrize("command", list(fm.COMMANDS))
def test_help_names_every_flag_of_its_command_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        fm.main([command, "--help"])
    text = capsys.readouterr().out
    entries = dict(re.findall(r"^  --([\w-]+)(.*?)(?=^  --|\Z)", text, re.M | re.S))
    assert stop.value.code == 0 and {f"--{flag}" for flag in entries} == {*fm.COMMANDS[command][1]}
    for flag, row in fm.COMMANDS[command][1].items():
        shown = " ".join(entries[flag[2:]].split())
        assert "default" in shown or row.get("action") == "store_true", flag
        if "default" in row and command != "fid":
            assert f"(default: {row['default']})" in shown or command == "nll"


def test_help_of_train_shows_the_defaults_of_its_data_and_no_command_prints_them_all(capsys):
    with pytest.raises(SystemExit):
        fm.main(["train", "--data", "cifar10", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "before warm-up and decay (default: 0.0002)" in text and "(default: 400000)" in text
    with pytest.raises(SystemExit) as stop:
        fm.main([])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"    {name} " in said for name in fm.COMMANDS)
    with pytest.raises(SystemExit) as stop:
        fm.main(["trian"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "invalid choice: 'trian'" in error


@pytest.mark.parametrize("command", list(fm.COMMANDS))
def test_each_end_of_each_flag_s_range(command, capsys):
    """What is below and above is refused by name; what is at the end passes."""
    for flag, row in fm.COMMANDS[command][1].items():
        if "type" not in row or row["type"] is fm.integers:
            continue
        low, high, kind = (cell.cell_contents for cell in (
            dict(zip(row["type"].__code__.co_freevars, row["type"].__closure__, strict=True))[name]
            for name in ("low", "high", "kind")))
        for value in (low, high):
            assert row["type"](str(value)) == value
        for value in (low - 1, high + 1, math.nan, "x", ""):
            assert flag in refuse(command, flag, value)


def test_the_script_metadata_names_what_is_imported():
    source = SCRIPT.read_text(encoding="utf-8")
    imported = {*re.findall(r"^(?:import|from) (\w+)", source, re.M)}
    third_party = imported - {*sys.stdlib_module_names, "PIL"}
    assert {*re.findall(r'"([a-z]+)>=[^"]+"', source[: source.index('"""')])} == third_party


if __name__ == "__main__":  # a rank: at its loss NUMBER:SIGNAL both are killed, or one is stopped
    number, name = sys.argv.pop(1).split(":")
    if name == "SIGKILL" or os.environ["RANK"] == "1":
        at_loss(pytest.MonkeyPatch(), {
            int(number): lambda loss: os.kill(os.getpid(), getattr(signal, name)) or loss})
    fm.main()
