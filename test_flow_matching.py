"""What flow_matching.py claims, each claim tested from another side than the code computes it."""

import argparse
import ast
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import flow_matching as fm

SCRIPT = Path(fm.__file__)
CPU = torch.device("cpu")
ALL_PATHS = pytest.mark.parametrize("name", list(fm.PATHS))
TINY = ("train --size 8 --width 8 --mults 1,2 --blocks 1 --attention 4 --dropout 0.2 --batch 8 "
        "--lr 0.01 --warmup 3 --ema 0.9 --flip --steps 24 --log-every 3 --save-every 24 "
        "--optimizer muon --time logit-normal --device cpu")


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def config(**more):
    """What a checkpoint keeps of a run: all flags of train, and what was found in the data."""
    return argparse.Namespace(**fm.TRAIN | dict(channels=1, names=[], data_rms=0.5) | more)


def run(command, *more):
    """A command line, more arguments as they are: what it printed."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            fm.main([*command.split(), *map(str, more)])
    finally:
        print(said.getvalue())
    return said.getvalue()


def refuse(command, *more):
    """A command line that must be refused: status 2 and one line of error, which is returned."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as stop:
        run(command, *more)
    error = said.getvalue()
    assert stop.value.code == 2 and error.count("\n") == 1 and error.endswith("\n"), error
    assert error.startswith(f"flow_matching.py {command.split()[0]}: error: "), error
    return error


def pngs(folder):
    """The images that sample left in a folder, by name."""
    return {f.stem: np.asarray(Image.open(f)).astype(int)
            for f in sorted(folder.glob("[0-9]*.png"))}


def load(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def ema(out):
    """The velocity, with averaged weights, of a run."""
    checkpoint = load(out)
    velocity = fm.Velocity(argparse.Namespace(**checkpoint["config"])).eval()
    velocity.load_state_dict(checkpoint["ema"])
    return velocity.requires_grad_(False)


def rows(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def losses(out):
    return [(row["step"], row["loss"]) for row in rows(out / "log.jsonl")]


def same(a, b):
    """Whether two runs ended with the same bits."""
    a, b = load(a), load(b)
    return all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])


def write_folder(root, n=24, size=8, classes=2, mode="L"):
    """n random smooth PNGs, none like its mirror image, in class subfolders."""
    rng = np.random.default_rng(0)
    for i in range(n):
        file = root / f"class{i % classes}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        bands = [np.add.outer(*np.sort(rng.integers(0, 128, (2, size)))) for _ in mode]
        Image.fromarray(np.stack(bands, 2).astype(np.uint8).squeeze()).save(file)
    return root


def change_losses(monkeypatch, change):
    """The n-th loss of a training becomes change(n, loss)."""
    numbers, original = itertools.count(1), fm.cfm_loss
    monkeypatch.setattr(fm, "cfm_loss", lambda *args, **weight: change(
        next(numbers), original(*args, **weight)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The command of a tiny run on a folder of images, and that run, finished without a break."""
    root = tmp_path_factory.mktemp("tiny")
    command = f"{TINY} --data {write_folder(root / 'set')} --data-dir {root / 'cache'}"
    run(command, "--out", root / "whole")
    return command, root / "whole"


# ------------------------------------------------------------------------------------------------
# §1  Probability paths
# ------------------------------------------------------------------------------------------------


def log_density(path, x, t, means, tau):
    """log p_t(x), Eq. 6, straight from its definition as a mixture: (B,)."""
    alpha, sigma = path(t)[:2]
    std = ((alpha * tau) ** 2 + sigma**2).sqrt()[:, None, None]
    each = torch.distributions.Normal(alpha[:, None, None] * means, std).log_prob(x[:, None])
    return each.sum(-1).logsumexp(1) - math.log(len(means))


@ALL_PATHS
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_theorem_1_the_marginal_field_satisfies_the_continuity_equation(name, tau):
    """d/dt log p + u . grad log p + div u = 0, by automatic differentiation in float64."""
    path, means = fm.PATHS[name], double(5, 2, seed=1)
    t = torch.linspace(0.02, 0.97, 200, dtype=torch.float64).requires_grad_()
    alpha, sigma = path(t.detach())[:2]
    x = (alpha[:, None] * means[torch.arange(200) % 5] + sigma[:, None] * double(200, 2))
    x.requires_grad_()
    u = fm.marginal_velocity(path, x, t, means, tau)
    p_t, p_x = torch.autograd.grad(log_density(path, x, t, means, tau).sum(), (t, x))
    div = sum(torch.autograd.grad(u[:, i].sum(), x, retain_graph=True)[0][:, i] for i in (0, 1))
    terms = torch.stack([p_t, (u * p_x).sum(1), div])
    # The terms cancel: what is left is rounding of the largest of them.
    assert (terms.sum(0).abs() <= 1e-9 * terms.abs().amax(0)).all()


def test_theorem_2_gradients_are_equal_while_the_losses_differ():
    """Both expectations by quadrature: Gauss-Hermite for CFM's x_0, a fine grid for FM's x."""
    torch.manual_seed(0)
    inner, outer = nn.Linear(2, 16).double(), nn.Linear(16, 1).double()

    def v(x, t):  # entire: fast quadrature
        return outer(inner(torch.cat([x, t[:, None]], 1)).sin())

    parameters = [*inner.parameters(), *outer.parameters()]
    means, tau = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64), 0.0
    times = torch.tensor([0.1, 0.4, 0.7], dtype=torch.float64)
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(80))
    grid = torch.linspace(-16, 16, 40_001, dtype=torch.float64)
    # ve begins at σ = 50: here with a scale that the grid resolves
    for path in (fm.ot_path, fm.vp_path, lambda t: fm.ve_path(t, 0.1, 2.0)):
        k, i, j = torch.meshgrid(*map(torch.arange, (3, 3, 80)), indexing="ij")
        k, i, j = k.flatten(), i.flatten(), j.flatten()
        weight = weights[j] / weights.sum() * 80
        cfm = fm.cfm_loss(v, path, means[k], nodes[j, None], times[i], weight)
        x, t = grid.repeat(3)[:, None], times.repeat_interleave(len(grid))
        density = log_density(path, x, t, means, tau).exp()
        error = (v(x, t) - fm.marginal_velocity(path, x, t, means, tau)).square()[:, 0]
        loss = (density * error).sum() * (grid[1] - grid[0]) / 3
        g_cfm, g_fm = (torch.autograd.grad(each, parameters) for each in (cfm, loss))
        for a, b in zip(g_cfm, g_fm, strict=True):
            assert (a - b).norm() < 1e-6 * b.norm()  # both quadratures converge beyond this
        assert cfm > 1.01 * loss


@ALL_PATHS
def test_theorem_3_is_the_time_derivative_of_psi_and_equations_17_19_and_21(name):
    path, h, t = fm.PATHS[name], 1e-6, torch.linspace(0, 0.999, 100, dtype=torch.float64)
    x, x_1, s = double(100, 3), double(100, 3, seed=1), 1 - t[:, None]
    T, sigma = 0.1 * s + 0.5 * 19.9 * s**2, 0.01 * 5000**s
    expected = {
        "ve": -(math.log(5000) * sigma) / sigma * (x - x_1),
        "vp": -(0.1 + 19.9 * s) / 2 * ((-T).exp() * x - (-T / 2).exp() * x_1) / (1 - (-T).exp()),
        "ot": (x_1 - (1 - 1e-4) * x) / (1 - (1 - 1e-4) * t[:, None])}[name]
    u = fm.conditional_velocity(path, x, x_1, t)
    torch.testing.assert_close(u, expected, rtol=1e-9, atol=1e-9)

    def psi(t):
        alpha, sigma, _, _ = fm.coefficients(path, t, x_1)
        return alpha * x_1 + sigma * x

    t = torch.linspace(0.01, 0.99, 100, dtype=torch.float64)
    difference = (psi(t + h) - psi(t - h)) / (2 * h)
    u = fm.conditional_velocity(path, psi(t), x_1, t)
    torch.testing.assert_close(u, difference, rtol=1e-6, atol=1e-6)  # central difference: h²


@ALL_PATHS
def test_each_path_runs_from_its_prior_to_the_data(name):
    path = fm.PATHS[name]
    alpha, sigma = torch.stack(path(torch.tensor([0.0, 1.0]).double())[:2]).numpy()
    start = {"ot": (0, 1), "vp": (math.exp(-10.05 / 2), math.sqrt(1 - math.exp(-10.05))),
             "ve": (1, 50)}[name]
    end = {"ot": (1, 1e-4), "vp": (1, 0.0010004974), "ve": (1, 0.01)}[name]
    np.testing.assert_allclose((alpha[0], sigma[0]), start, rtol=1e-9)
    np.testing.assert_allclose((alpha[1], sigma[1]), end, rtol=1e-4)
    noise = fm.draw_noise(0, range(4), (1, 2, 2))
    x, _ = fm.sample(lambda x, t: 0 * x, noise, path, steps=1)
    torch.testing.assert_close(x, start[1] * noise)  # the prior that sampling starts from


def test_ot_conditional_lines_are_straight_at_constant_speed_and_vp_are_not():
    t = torch.linspace(0, 0.99, 100, dtype=torch.float64)
    x_0, x_1 = double(2), double(2, seed=1)

    def speed_change_and_bow(path):
        alpha, sigma, d_alpha, d_sigma = (c[:, None] for c in path(t))
        x, u = alpha * x_1 + sigma * x_0, d_alpha * x_1 + d_sigma * x_0
        chord = (x[-1] - x[0]) / (x[-1] - x[0]).norm()
        away = (x - x[0]) - ((x - x[0]) @ chord)[:, None] * chord
        return (u - u[0]).norm(dim=1).max(), away.norm(dim=1).max()

    assert max(speed_change_and_bow(fm.ot_path)) < 1e-12
    assert min(speed_change_and_bow(fm.vp_path)) > 0.1


@ALL_PATHS
def test_float32_is_safe_at_both_ends_of_time(name):
    """rand() draws multiples of 2^-24 in [0, 1), and a sigmoid may round to 1."""
    t = torch.tensor([0.0, 2**-24, 1e-5, 0.5, 1 - 1e-5, 1 - 2**-24, 1.0])
    for mine, exact in zip(fm.PATHS[name](t), fm.PATHS[name](t.double()), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=2e-5, atol=1e-7)
    velocity = fm.Velocity(config(path=name, size=8, width=8))
    assert (velocity.scales(t)[2] ** -2).isfinite().all()  # the weight of the loss
    assert velocity(torch.ones(7, 1, 8, 8), t).isfinite().all()


@ALL_PATHS
def test_the_marginal_field_is_the_posterior_weighted_mean_by_brute_force(name):
    """Eq. 8 at probe points, one component at a time with scipy's densities."""
    path, means, tau = fm.PATHS[name], np.array([[1.0, 0.5], [-2.0, 1.0], [0.3, -1.0]]), 0.2
    for t in (0.0, 0.3, 0.8):
        alpha, sigma, d_alpha, d_sigma = (c.item() for c in path(torch.tensor([t]).double()))
        variance = alpha**2 * tau**2 + sigma**2
        x = alpha * np.array([0.2, 0.4]) + sigma * np.array([0.7, -0.5])
        p = [scipy.stats.multivariate_normal.pdf(x, alpha * m, variance) for m in means]
        # the velocity of each Gaussian: its mean's plus its standard deviation's growth
        rate = (alpha * d_alpha * tau**2 + sigma * d_sigma) / variance
        u = [d_alpha * m + rate * (x - alpha * m) for m in means]
        expected = sum(a * b for a, b in zip(p, u, strict=True)) / sum(p)
        probe = torch.tensor(x)[None], torch.tensor([t]).double(), torch.tensor(means)
        mine = fm.marginal_velocity(path, *probe, tau)
        np.testing.assert_allclose(mine[0], expected, rtol=1e-9, atol=1e-12)


@ALL_PATHS
def test_the_flow_moves_with_the_marginal_field_and_back(name):
    """Central differences in time of the solution phi_t(x_0), Eq. 1; then from t = 1 to x_0."""
    path, means, h = fm.PATHS[name], 2 * double(4, 2, seed=3), 1e-4
    x_0 = path(torch.zeros(1).double())[1] * double(8, 2)

    def v(x, t):
        return fm.marginal_velocity(path, x, t, means, 0.3)

    def phi(t):
        return fm.odeint(v, x_0, 0.0, t, "dopri5", tolerance=1e-11)[0]

    for t in (0.3, 0.7):
        u = v(phi(t), torch.full((8,), t).double())
        torch.testing.assert_close((phi(t + h) - phi(t - h)) / (2 * h), u, rtol=1e-4, atol=1e-4)
    x_1, _ = fm.odeint(v, x_0, 0, 1, "dopri5", tolerance=1e-8)
    back, _ = fm.odeint(v, x_1, 1, 0, "dopri5", tolerance=1e-8)
    assert (back - x_0).abs().max() < 1e-4 * x_0.abs().max()
    assert (x_1 - x_0).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------
# §2  Loss
# ------------------------------------------------------------------------------------------------


def test_ot_loss_is_eq_23():
    x_0, x_1 = double(8, 1, 4, 4), double(8, 1, 4, 4, seed=1)
    t = torch.rand(8, generator=torch.Generator().manual_seed(0)).double()
    s = t[:, None, None, None]

    def v(x, t):
        return x.sin() + t[:, None, None, None]

    psi = (1 - (1 - 1e-4) * s) * x_0 + s * x_1
    expected = ((v(psi, t) - (x_1 - (1 - 1e-4) * x_0)) ** 2).mean()
    torch.testing.assert_close(fm.cfm_loss(v, fm.ot_path, x_1, x_0, t), expected)
    velocity = fm.Velocity(config())
    assert (velocity.scales(t)[2] == 1).all()  # training by --path ot is unweighted
    nn.init.normal_(velocity.net.out.weight)
    x, t = x_1.float().repeat(1, 1, 4, 4), t.float()
    assert torch.equal(velocity(x, t), velocity.net(x, t))
    with pytest.raises(ValueError, match="shape|velocity"):
        fm.cfm_loss(lambda x, t: x[:, 0], fm.ot_path, x_1)


def test_times_are_drawn_in_float32_uniformly():
    seen = []
    torch.manual_seed(0)
    fm.cfm_loss(lambda x, t: seen.append(t) or x, fm.ot_path,
                torch.zeros(20_000, 1, dtype=torch.bfloat16))
    assert seen[0].dtype == torch.float32 and 0 <= seen[0].min() and seen[0].max() < 1
    assert scipy.stats.kstest(seen[0].numpy(), "uniform").pvalue > 1e-3  # one fixed draw


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_preconditioning_is_the_best_linear_predictor_and_leaves_unit_scale(name):
    """c_skip = E[u x]/E[x²], c_out² = the variance left, c_in² = 1/E[x²], from 1e6 draws.

    So a network that has learned nothing yet (F = 0) has a weighted loss of 1, for any t.
    """
    path, s = fm.PATHS[name], 0.7
    velocity = fm.Velocity(config(path=name, size=8, width=8, data_rms=s))
    x_1, x_0 = s * double(10**6), double(10**6, seed=1)
    for moment in (0.05, 0.5, 0.95):
        alpha, sigma, d_alpha, d_sigma = path(torch.tensor(moment).double())
        x, u = alpha * x_1 + sigma * x_0, d_alpha * x_1 + d_sigma * x_0
        slope = (u * x).mean() / (x * x).mean()
        expected = [(x * x).mean() ** -0.5, slope, (u - slope * x).square().mean() ** 0.5]
        scales = velocity.scales(torch.tensor([moment]).double())
        torch.testing.assert_close(torch.cat(scales), torch.stack(expected), rtol=5e-3, atol=5e-3)
        t, images = torch.full((1600,), moment), (s * double(1600, 1, 8, 8)).float()
        loss = fm.cfm_loss(velocity, path, images, double(1600, 1, 8, 8, seed=1).float(), t,
                           velocity.scales(t)[2] ** -2)
        assert abs(loss - 1) < 0.03  # 5 standard errors of a squared normal


def test_a_network_trained_by_cfm_converges_to_the_exact_marginal_field():
    torch.manual_seed(0)
    means = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)

    def v(x, t):
        return net(torch.cat([x, t[:, None]], 1))

    t = 0.9 * torch.rand(2000)
    alpha, sigma = (c[:, None] for c in fm.ot_path(t)[:2])
    x = alpha * (means[torch.arange(2000) % 3] + 0.2 * torch.randn(2000, 2))
    x = x + sigma * torch.randn(2000, 2)
    u = fm.marginal_velocity(fm.ot_path, x, t, means, 0.2)
    errors = []
    for step in range(2001):
        if step in (0, 200, 2000):
            errors.append(((v(x, t) - u).square().mean() / u.square().mean()).item())
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 2001)
        x_1 = means[torch.randint(3, (512,))] + 0.2 * torch.randn(512, 2)
        optimizer.zero_grad()
        fm.cfm_loss(v, fm.ot_path, x_1, t=0.95 * torch.rand(512)).backward()
        optimizer.step()
    # What is left is the small network's own error; a wrong target leaves more than 30%.
    assert errors[0] > 0.5 and errors[2] < errors[1] / 2 and errors[2] < 0.05, errors


# ------------------------------------------------------------------------------------------------
# §3  ODE solvers, on dx/dt = x cos t, x = x_0 exp(sin t)
# ------------------------------------------------------------------------------------------------

X_0 = double(3, 2)


def swing(x, t):
    return x * t.cos()[:, None]


def swing_error(t_0=0.0, t_1=2.0, **solver):
    x, nfe = fm.odeint(swing, X_0 * math.exp(math.sin(t_0)), t_0, t_1, **solver)
    return (x - X_0 * math.exp(math.sin(t_1))).abs().max().item(), nfe


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_solver_order_by_slope(solver, order, backward):
    steps = np.array([32, 64, 128, 256])
    ends = dict(t_0=2.0, t_1=0.0) if backward else {}
    errors = [swing_error(solver=solver, steps=int(n), **ends)[0] for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.1


def test_adaptive_error_follows_its_tolerance():
    tolerances = np.array([1e-3, 1e-5, 1e-7, 1e-9])
    each = [swing_error(solver="dopri5", tolerance=t) for t in tolerances]
    errors, nfes = zip(*each, strict=True)
    slope = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert 0.7 < slope < 1.3 and (errors < 30 * tolerances).all()
    assert list(nfes) == sorted(nfes) and nfes[0] < nfes[-1]


def test_nfe_is_the_number_of_calls():
    calls = []
    for solver, stages in (("euler", 1), ("midpoint", 2), ("rk4", 4), ("dopri5", None)):
        calls.clear()
        _, nfe = fm.odeint(lambda x, t: calls.append(t) or swing(x, t), X_0, solver=solver, steps=7)
        assert nfe == len(calls) == (7 * stages if stages else nfe) > 6
        assert all(t.shape == (3,) and 0 <= t.min() and t.max() <= 1 for t in calls)


@pytest.mark.parametrize("solver", list(fm.SOLVERS))
def test_every_solver_keeps_the_type_and_takes_no_time_no_samples_and_gradients(solver):
    assert torch.equal(fm.odeint(swing, X_0, 0.5, 0.5, solver)[0], X_0)
    assert fm.odeint(swing, X_0[:0], solver=solver)[0].shape == (0, 2)
    assert fm.odeint(swing, X_0.float(), solver=solver)[0].dtype == torch.float32
    x = X_0.clone().requires_grad_()
    solution, _ = fm.odeint(swing, x, solver=solver, steps=40)
    assert not solution.requires_grad if solver == "dopri5" else torch.allclose(
        torch.autograd.grad(solution.sum(), x)[0], solution.detach() / X_0)


@pytest.mark.parametrize("v, x, more, error, says", [
    (lambda x, t: x / 0, X_0, dict(solver="dopri5"), FloatingPointError, "not finite"),
    (lambda x, t: x * math.nan, X_0, dict(solver="euler"), FloatingPointError, "not finite"),
    (lambda x, t: x**2, X_0[:1, :1] * 0 + 1, dict(t_1=2, solver="dopri5"),  # for ever at t = 1
     FloatingPointError, "dopri5 failed"),
    (swing, X_0, dict(steps=0), ValueError, "steps"), (swing, X_0, dict(solver="heun"),
                                                       ValueError, "heun"),
    (swing, X_0.long(), {}, ValueError, "int64"), (swing, X_0 + 0j, {}, ValueError, "complex"),
    (lambda x, t: x[:, :1], X_0, {}, ValueError, r"\(3, 1\).*\(3, 2\)"),
    (lambda x, t: x[:, :1], X_0, dict(solver="dopri5"), ValueError, r"\(3, 1\).*\(3, 2\)"),
])
def test_a_solve_that_fails_says_so(v, x, more, error, says):
    with pytest.raises(error, match=says):
        fm.odeint(v, x, **more)


# ------------------------------------------------------------------------------------------------
# §4  Sampling and likelihood
# ------------------------------------------------------------------------------------------------


@ALL_PATHS
def test_the_exact_field_moves_each_prior_onto_the_data_and_back(name):
    """Mean, covariance and share of particles within 3 tau, of two Gaussians; then the noise."""
    path, tau = fm.PATHS[name], 0.1
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))

    def v(x, t):
        return fm.marginal_velocity(path, x, t, means, tau)

    x, _ = fm.sample(v, noise, path, solver="rk4", steps=200)
    distance, nearest = torch.cdist(x, means).min(1)
    assert (distance < 3 * tau).float().mean() > 0.98  # 98.9% of a 2-D Gaussian lie within 3 tau
    assert abs(nearest.float().mean() - 0.5) < 0.04  # 5 standard errors
    spread = (x - means[nearest]).std(0)
    assert (spread - tau).abs().max() < 0.01, spread
    means, tau, noise = torch.eye(2), 0.3, noise[:9].double()
    x_1, _ = fm.sample(v, noise, path, solver="dopri5", tolerance=1e-9)
    x_0, _ = fm.invert(v, x_1, path, solver="dopri5", tolerance=1e-9)
    torch.testing.assert_close(x_0, noise, rtol=1e-4, atol=1e-4)


@ALL_PATHS
def test_likelihood_of_gaussian_data_is_its_closed_form(name):
    """One Gaussian N(m, τ²): the flow is affine, x_1 = α m + (s_1/s_0)(x_0 − α_0 m), s = std at t.

    So N(0, σ_0²) is pushed to another Gaussian, for vp and ve not quite onto the data's.
    """
    path, tau, m = fm.PATHS[name], 0.3, double(1, 1, 2, 2, seed=1)

    def v(x, t):
        return fm.marginal_velocity(path, x.flatten(1), t, m.flatten(1), tau).reshape(x.shape)

    last = 1e-5  # where vp stands still: one Euler step is exact to last²
    alpha, sigma, d_alpha, d_sigma = path(torch.tensor([0.0, 1 - last], dtype=torch.float64))
    (a_0, a_1), (s_0, s_1) = alpha, ((alpha * tau) ** 2 + sigma**2).sqrt()
    law = torch.distributions.Normal(a_1 * m - s_1 / s_0 * a_0 * m, s_1 / s_0 * sigma[0])
    x_1 = m + tau * double(5, 1, 2, 2)
    expected = law.log_prob(x_1 - last * v(x_1, torch.ones(5).double())).flatten(1).sum(1)
    expected -= last * 4 * ((alpha * d_alpha * tau**2 + sigma * d_sigma)[1] / s_1**2)
    with torch.inference_mode():
        log_p, nfe = fm.log_likelihood(v, x_1, path, solver="dopri5", tolerance=1e-10)
    torch.testing.assert_close(log_p, expected, rtol=1e-6, atol=1e-6)
    assert log_p.shape == (5,) and log_p.dtype == torch.float64 and nfe > 20


def test_a_field_that_does_not_look_at_x_moves_the_prior():
    x_1 = double(4, 3)
    log_p, _ = fm.log_likelihood(lambda x, t: t[:, None].expand(4, 3), x_1, steps=3)
    expected = torch.distributions.Normal(0.5, torch.ones(3).double()).log_prob(x_1).sum(1)
    torch.testing.assert_close(log_p, expected)
    with pytest.raises(ValueError, match="velocity"):
        fm.log_likelihood(lambda x, t: x[:, :1], x_1)


def test_hutchinson_is_unbiased():
    """The mean over all 16 sign vectors is the exact trace, while no two estimates need agree."""
    means, fixed = double(3, 4, seed=2), dict(solver="rk4", steps=10)

    def v(x, t):
        return fm.marginal_velocity(fm.ot_path, x, t, means, 0.3)

    x_1 = means + 0.1 * double(3, 4)
    exact, _ = fm.log_likelihood(v, x_1, **fixed)
    signs = [torch.tensor(s).double().expand(3, 4) for s in itertools.product((-1, 1), repeat=4)]
    each = torch.stack([fm.log_likelihood(v, x_1, probes=[s], **fixed)[0] for s in signs])
    torch.testing.assert_close(each.mean(0), exact, rtol=1e-10, atol=1e-10)
    assert (each.std(0) > 1e-3).all()


@ALL_PATHS
def test_the_density_of_a_model_in_the_plane_integrates_to_1(name):
    """By a sum over a grid, exact for smooth densities.  The model is any smooth field."""
    start = fm.PATHS[name](torch.zeros(1).double())[1].item()

    def v(x, t):
        return torch.stack([(x[:, 1] + t).sin(), (2 * x[:, 0]).cos() - x[:, 1] * t], 1)

    cells = 201 if name == "ve" else 101
    axis = torch.linspace(-1, 1, cells, dtype=torch.float64) * (6 * start + 2)
    x = torch.cartesian_prod(axis, axis)
    log_p, _ = fm.log_likelihood(v, x, fm.PATHS[name], solver="rk4", steps=60)
    total = log_p.exp().sum() * (axis[1] - axis[0]) ** 2
    # the cells of ve's grid, 3 wide, see the field's wiggles of that width only on average
    assert total.item() == pytest.approx(1, abs=2e-3 if name == "ve" else 1e-6)


def test_bits_per_dim_of_known_densities():
    """Uniform over [-1, 1]^D: each of 256 levels is as likely: 8 bits.  K draws: a mean inside."""
    D, log_p = 12, double(5, 7)
    uniform = fm.bits_per_dim(torch.full((3, 1), -D * math.log(2)), D)
    torch.testing.assert_close(uniform, torch.full((3,), 8.0))
    by_hand = -(log_p.exp().mean(1) * 128.0**-D).log2() / D
    torch.testing.assert_close(fm.bits_per_dim(log_p, D), by_hand)
    one = torch.stack([fm.bits_per_dim(log_p[:, [k]], D) for k in range(7)])
    assert (fm.bits_per_dim(log_p, D) < one.mean(0)).all()


# ------------------------------------------------------------------------------------------------
# §5  Coupling, guidance, noise
# ------------------------------------------------------------------------------------------------


def test_ot_coupling_is_the_best_permutation():
    x_0, x_1 = double(6, 1, 2, 2), double(6, 1, 2, 2, seed=1)
    best = min(itertools.permutations(range(6)),
               key=lambda order: (x_0[list(order)] - x_1).square().sum().item())
    assert torch.equal(fm.ot_coupling(x_0, x_1), x_0[list(best)]) and best != tuple(range(6))
    with pytest.raises(ValueError, match="shape"):
        fm.ot_coupling(x_0, x_1[:5])


def test_ot_coupling_with_labels_keeps_noise_within_its_class():
    x_0, x_1, y = double(30, 3), double(30, 3, seed=1), torch.arange(30) % 3
    coupled = fm.ot_coupling(x_0, x_1 + 10 * y[:, None], y)
    for k in range(3):
        assert torch.equal(coupled[y == k].sort(0)[0], x_0[y == k].sort(0)[0])
        assert torch.equal(coupled[y == k], fm.ot_coupling(x_0[y == k], x_1[y == k]))
    assert not torch.equal(coupled, x_0)


def test_guidance_is_the_paper_s_line_through_both_fields():
    x, y, calls = double(3, 2), torch.tensor([2.0, 3.0, 4.0]), []

    def v(x, t, y):
        calls.append(y)
        return x * (1.0 if y is None else y[:, None])

    for scale, expected in ((0, x), (1, x * y[:, None]), (2.5, x + 2.5 * x * (y - 1)[:, None])):
        torch.testing.assert_close(fm.guided(v, y, scale)(x, None), expected)
    assert len(calls) == 5  # scale 1 evaluates once


def test_noise_depends_on_seed_and_index_alone():
    a = fm.draw_noise(3, range(10), (1, 4, 4))
    assert torch.equal(a[4:7], fm.draw_noise(3, range(4, 7), (1, 4, 4)))
    many = [fm.draw_noise(seed, range(0, 5000, 100), (20,)) for seed in (0, 1, 4096, 2**20)]
    many = torch.cat([*many, *(fm.draw_noise(seed, range(2000), (20,)) for seed in (2, 3))])
    assert len(torch.unique(many, dim=0)) == 4200  # no (seed, i) has another's noise
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.015
    assert (torch.corrcoef(many.T) - torch.eye(20)).abs().max() < 0.08
    assert scipy.stats.kstest(many.flatten().numpy(), "norm").pvalue > 1e-3  # one fixed draw


# ------------------------------------------------------------------------------------------------
# §6  Network
# ------------------------------------------------------------------------------------------------


def active(net):
    """The net with its zero-initialised layers made random, so that every part matters."""
    for p in net.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.1)
    return net.eval()


def normed(h, layer):
    """GroupNorm by hand: groups of at least 4 channels, at most 32 of them."""
    C = h.shape[1]
    groups = max(g for g in (1, 2, 4, 8, 16, 32) if C % g == 0 and C // g >= 4)
    parts = h.reshape(len(h), groups, -1)
    parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, False, True) + 1e-5).sqrt()
    return parts.view_as(h) * layer.weight[:, None, None] + layer.bias[:, None, None]


def silu(x):
    return x / (1 + (-x).exp())


def randomise(net):
    """Every parameter random, scales and biases too."""
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.eval()


@pytest.mark.parametrize("c_in, c_out", [(8, 8), (8, 16), (256, 16)])
def test_a_residual_block_by_hand_and_the_identity_that_it_starts_as(c_in, c_out):
    h, emb = double(2, c_in, 6, 4), double(2, 10, seed=1)
    block = fm.ResBlock(c_in, c_out, 10, 0.5, attention=True).double().eval()
    assert torch.equal(block(h, emb), block.skip(h))
    assert c_in != c_out or torch.equal(block.skip(h), h)
    randomise(block)
    scale, shift = (emb @ block.scale_shift.weight.T + block.scale_shift.bias).split(c_out, 1)
    r = block.conv1(silu(normed(h, block.norm1)))
    r = silu(normed(r, block.norm2) * (1 + scale[..., None, None]) + shift[..., None, None])
    expected = block.attention(block.skip(h) + block.conv2(r))
    torch.testing.assert_close(block(h, emb), expected)
    dropped = block.train()(h, emb)
    assert not torch.allclose(dropped, block(h, emb))


def test_attention_equals_softmax_by_hand():
    h, layer = double(2, 128, 3, 4), fm.Attention(128).double()
    assert torch.equal(layer(h), h)  # zero at the start
    randomise(layer)
    q, k, v = layer.qkv(normed(h, layer.norm)).flatten(2).reshape(2, 3, 2, 64, 12).unbind(1)
    weights = (torch.einsum("bhci,bhcj->bhij", q, k) / 8).softmax(-1)  # 8 = sqrt(64)
    a = torch.einsum("bhij,bhcj->bhci", weights, v).reshape(2, 128, 3, 4)
    torch.testing.assert_close(layer(h), h + layer.out(a))


def test_a_u_net_of_two_levels_by_hand():
    net = randomise(fm.UNet(1, 8, 8, (1, 2), 1, (4,), classes=2).double())
    x, t, y = double(3, 1, 8, 8), torch.tensor([0.0, 0.3, 1.0]).double(), torch.tensor([0, 1, 2])
    frequencies = 1000 * 10_000.0 ** (-torch.arange(4).double() / 4)
    angles = t[:, None] * frequencies
    emb = net.time[2](silu(net.time[0](torch.cat([angles.cos(), angles.sin()], 1))))
    emb = silu(emb + net.label.weight[y])
    h0 = net.enter[0](x)
    h1 = net.down[0][0](h0, emb)
    h2 = F.conv2d(h1, net.enter[1].weight, net.enter[1].bias, stride=2, padding=1)
    h3 = net.down[1][0](h2, emb)
    h = net.middle2(net.middle1(h3, emb), emb)
    for skip, block in zip((h3, h2), net.up[1], strict=True):
        h = block(torch.cat([h, skip], 1), emb)
    h = net.leave[1][1](h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    for skip, block in zip((h1, h0), net.up[0], strict=True):
        h = block(torch.cat([h, skip], 1), emb)
    torch.testing.assert_close(net(x, t, y), net.out(silu(normed(h, net.out_norm))),
                               rtol=1e-4, atol=1e-5)  # the sinusoids are float32
    attends = [n for n, m in net.named_modules() if isinstance(m, fm.Attention)]
    assert [n.rsplit(".", 1)[0] for n in attends] == ["down.1.0", "up.1.0", "up.1.1", "middle1"]


def test_the_cifar10_net_has_the_usual_parameter_count():
    with torch.device("meta"):
        net = fm.Velocity(config(**fm.RECIPES["cifar10"] | dict(channels=3)))
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - 35.7) < 0.3


@pytest.mark.parametrize("options, size", [
    (dict(width=8, mults=(1, 2), blocks=1, attention=()), (8, 12)),
    (dict(width=12, mults=(1, 3, 2), blocks=2, attention=(4,), size=16, classes=3), (16, 8)),
    (dict(width=200, mults=(1,), blocks=1, attention=(5,), size=5, dropout=0.5), (5, 5)),
])
def test_unet_shapes_zero_start_and_use_of_its_inputs(options, size):
    torch.manual_seed(0)
    net = fm.UNet(channels=2, **{"size": 8} | options).eval()
    x, t = torch.randn(3, 2, *size), torch.rand(3)
    assert net(x, t).shape == x.shape and (net(x, t) == 0).all()
    active(net)
    out = net(x, t)
    each = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(out, each, rtol=1e-3, atol=1e-3)  # samples do not mix
    assert (net(x, t + 0.01) - out).abs().max() > 1e-3  # a hundredth of the time is felt
    if options.get("classes"):
        y = torch.tensor([0, 1, 2])
        assert (net(x, t, y) - out).flatten(1).abs().amax(1).min() > 1e-3
        assert torch.equal(net(x, t, torch.full((3,), 3)), out)  # "no label"
    if options.get("dropout"):
        net.train()
        assert not torch.equal(net(x, t), net(x, t))
    out.sum().backward()
    used = [n for n, p in net.named_parameters() if p.grad is not None]
    assert len(used) == len(list(net.parameters()))


def test_unet_refuses_what_it_cannot_halve():
    with pytest.raises(ValueError, match="multiples of 4"):
        fm.UNet(1, 18, 8, (1, 1, 1), 1, ())
    with pytest.raises(ValueError, match="10 x 8.*multiples of 4"):
        fm.UNet(1, 8, 8, (1, 1, 1), 1, ())(torch.randn(1, 1, 10, 8), torch.rand(1))


def test_most_time_frequencies_move_over_the_unit_interval():
    phase = torch.stack([fm.time_embedding(torch.tensor([t]), 128)[0] for t in (0.0, 0.01)])
    assert ((phase[0] - phase[1]).abs() > 1e-3).float().mean() > 0.6  # 27% without the scale
    assert torch.equal(phase[0], torch.cat([torch.ones(64), torch.zeros(64)]))


# ------------------------------------------------------------------------------------------------
# §1-§7: every section runs when it is pasted with the imports and the sections that it names
# ------------------------------------------------------------------------------------------------

GIVEN = ("T, X, Y = torch.rand(2), torch.randn(2, 1, 8, 8), torch.arange(2)\n"
         "PIXELS = torch.randint(256, (5, 1, 2, 2), dtype=torch.uint8)\n")
PASTED = {
    1: "conditional_velocity(vp_path, X, X, T), marginal_velocity(ve_path, X[:, 0, 0], T, X[0, 0])",
    2: "cfm_loss(lambda x, t: x, ot_path, X)",
    3: "[odeint(lambda x, t: x, X, solver=solver) for solver in SOLVERS]",
    4: "invert(lambda x, t: x, sample(lambda x, t: x, X)[0])\n"
       "bits_per_dim(log_likelihood(lambda x, t: x, X, probes=[X.sign()])[0][:, None], 64)",
    5: "guided(lambda x, t, y: x, Y, 2.0)(ot_coupling(X, X, Y), T), draw_noise(0, range(3), (2,))",
    6: "UNet(1, 8, 8, (1, 2), 1, (4,), classes=2)(X, T, Y)\n"
       "options = dict(path='vp', channels=1, size=8, width=8, mults=[1], blocks=1, attention=[],\n"
       "               dropout=0.1, names=['a', 'b'], data_rms=0.5)\n"
       "Velocity(argparse.Namespace(**options))(X, T, Y)",
    7: "frechet_distance(*fit_gaussian([PIXELS], pixels), np.zeros(4), np.eye(4))\n"
       "resize_as_tensorflow_1(X), INCEPTION_SHA256",
}


def test_every_section_of_the_paper_and_the_network_runs_when_it_is_pasted():
    source = SCRIPT.read_text(encoding="utf-8")
    first = ast.get_docstring(ast.parse(source), clean=False)
    imports, *parts = re.split(r"^(?=# §\d+  )", source.split(first)[1][3:], flags=re.M)
    sections = {int(re.match(r"# §(\d+)", part)[1]): part for part in parts}
    assert list(sections) == list(range(1, 12))
    for number, call in PASTED.items():
        needs = re.search(r"needs (.*?)[);]", sections[number].split("\n")[0])
        needs = [int(n) for n in re.findall(r"§(\d+)", needs[1])] if needs else []
        text = "\n".join([imports, *(sections[n] for n in needs), sections[number], GIVEN, call])
        exec(compile(text, f"§{number}", "exec"), {})
    assert "needs" not in sections[1].split("\n")[0]  # the search above reads what is there
    assert "needs §1 and §3" in sections[4].split("\n")[0]


# ------------------------------------------------------------------------------------------------
# §7  Fréchet distance
# ------------------------------------------------------------------------------------------------


def spd(D, seed):
    """A random covariance: (D, D) numpy."""
    A = double(D, D, seed=seed).numpy()
    return A @ A.T / D


def test_frechet_distance_of_known_gaussians():
    m, S, d = double(8).numpy(), spd(8, 1), double(8, seed=2).numpy()
    assert 0 <= fm.frechet_distance(m, S, m, S) < 1e-10
    assert fm.frechet_distance(m, S, m + d, S) == pytest.approx(d @ d)
    Q = np.linalg.qr(double(8, 8, seed=3).numpy())[0]  # commuting: the same axes
    a, b = np.arange(8.0), np.arange(8.0)[::-1] ** 2  # singular, both
    distance = fm.frechet_distance(m, Q * a @ Q.T, m, Q * b @ Q.T)
    assert distance == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-7)
    A, B = spd(2, 4), spd(2, 5)  # not commuting: tr √(AB) = √(tr AB + 2 √det AB) for 2 × 2
    root = math.sqrt(np.trace(A @ B) + 2 * math.sqrt(np.linalg.det(A @ B)))
    expected = np.trace(A) + np.trace(B) - 2 * root
    assert fm.frechet_distance(m[:2], A, m[:2], B) == pytest.approx(expected)
    assert all(fm.frechet_distance(m[:6], C, m[:6], C) >= 0  # rounding takes no root below zero
               for C in (spd(6, seed) for seed in range(20)))


@pytest.mark.parametrize("rank", [30, 10])
def test_frechet_distance_agrees_with_the_singular_values_of_the_factors(rank):
    """With S = C Cᵀ, tr √(S_1 S_2) is the sum of the singular values of C_1ᵀ C_2; also n < D."""
    C_1, C_2 = (double(30, rank, seed=s).numpy() for s in (1, 2))
    S_1, S_2, zero = C_1 @ C_1.T, C_2 @ C_2.T, np.zeros(30)
    root = np.linalg.svd(C_1.T @ C_2, compute_uv=False).sum()
    expected = np.trace(S_1) + np.trace(S_2) - 2 * root
    # square roots of rounded zeros: 1e-16 becomes 1e-8
    assert fm.frechet_distance(zero, S_1, zero, S_2) == pytest.approx(expected, rel=1e-7)
    assert fm.frechet_distance(zero, S_2, zero, S_1) == pytest.approx(expected, rel=1e-7)
    for nan in ((zero, S_1 * np.nan, zero, S_2), (zero, S_1, zero * np.nan, S_2)):
        with pytest.raises(ValueError):
            fm.frechet_distance(*nan)


def numbers(n):
    """n images of one pixel, the i-th of value i."""
    return torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_streamed_statistics_equal_numpy_s(batch):
    """Even where the mean is a million standard deviations from zero."""
    x = double(100, 5) * torch.tensor([1, 2, 3, 4, 5]) + 1e6
    mean, cov = fm.fit_gaussian(numbers(100).split(batch), lambda part: x[part.flatten().long()])
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.numpy().T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batches, says", [
    ([], "two images"), ([numbers(1)], "two images"), ([numbers(4), numbers(9)], "not finite"),
    ([numbers(4).float()], "float32"), ([numbers(4)[0]], r"\(1, 1, 1\)")])
def test_statistics_of_too_few_or_broken_features_are_refused(batches, says):
    with pytest.raises(ValueError, match=says):
        fm.fit_gaussian(batches, lambda part: 1 / (part.flatten(1).float() - 8))


def test_resizing_is_tensorflow_1_s():
    """Pixel i comes from i·in/299: ramps stay ramps up to the last pixel; 299 is left alone."""
    ramp = torch.arange(32.0)[:, None] * torch.tensor([2.0]) + 10 * torch.arange(16.0)
    i = torch.arange(299)
    expected = 2 * (i * 32 / 299).clamp(max=31)[:, None] + 10 * (i * 16 / 299).clamp(max=15)
    torch.testing.assert_close(fm.resize_as_tensorflow_1(ramp[None, None])[0, 0], expected,
                               rtol=1e-5, atol=1e-4)
    x = double(1, 2, 299, 299).float()
    assert torch.equal(fm.resize_as_tensorflow_1(x), x)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights under the names and shapes of the published file."""
    rng, weights = np.random.default_rng(0), {}
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for k, p in net.state_dict().items():
        if p.dim() == 4:
            w = rng.normal(size=p.shape) * np.sqrt(2 / np.prod(p.shape[1:]))
        elif "var" in k:
            w = rng.uniform(0.5, 1.5, p.shape)
        elif k.endswith("bn.weight"):
            w = rng.uniform(0.8, 1.2, p.shape)
        elif "num_batches" not in k:
            w = rng.normal(size=p.shape) * 0.1
        else:
            continue
        weights[k] = torch.from_numpy(w.astype(np.float32))
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, file)
    return file


@pytest.fixture
def trusted(inception_file, monkeypatch):
    """That file, with its hash in the place of the published one's."""
    sha256 = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    monkeypatch.setattr(fm, "INCEPTION_SHA256", sha256)
    return inception_file


def test_inception_features_are_torch_fidelity_s(trusted):
    """Against `inception-v3-compat` of torch-fidelity 0.4.0 with the same weights and image."""
    features = fm.inception(trusted)
    x = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (1, 3, 40, 40), dtype=np.uint8))
    expected = [0.9111799001693726, 5.1490044593811035, 7.382638454437256, 0.3674629330635071,
                7.333246231079102, 3.3332443237304688]
    np.testing.assert_allclose(features(x)[0, ::400], expected, rtol=1e-4)
    grey = x[:, :1]
    torch.testing.assert_close(features(grey), features(grey.expand(-1, 3, -1, -1)))
    assert features(x).shape == (1, 2048)


# ------------------------------------------------------------------------------------------------
# §8  Data
# ------------------------------------------------------------------------------------------------


def test_every_level_is_the_nearest_one_and_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(fm.to_uint8(fm.to_float(levels)), levels)
    assert fm.to_float(levels).aminmax() == (-1, 1)
    for off in (-0.49, 0.49):
        assert torch.equal(fm.to_uint8((levels.double() + off) / 127.5 - 1), levels)
    assert fm.to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_drawn_digits_can_be_told_apart():
    """A nearest-centroid classifier reads them; two calls draw the same, two splits do not."""
    images, labels, names = fm.load_data("digits", "", 16)
    again = fm.draw_digits(len(images), 16)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert images.shape == (20_000, 1, 16, 16) and images.dtype == torch.uint8
    assert names == list("0123456789") and torch.bincount(labels).min() > 1800
    test, test_labels, _ = fm.load_data("digits", "", 16, test=True)
    assert len(torch.unique(torch.cat([images, test]), dim=0)) > 0.99 * (len(images) + len(test))
    x, test = images.flatten(1).float(), test.flatten(1).float()
    centroids = torch.stack([x[labels == k].mean(0) for k in range(10)])
    accuracy = (torch.cdist(test, centroids).argmin(1) == test_labels).float().mean()
    assert 0.7 < accuracy < 1  # readable, and not ten fixed pictures


def test_a_folder_of_any_sizes_and_modes_becomes_one_array(tmp_path):
    root, cache = tmp_path / "photos", tmp_path / "cache"
    (root / "b").mkdir(parents=True)
    (root / "a" / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    ramp = np.arange(16, dtype=np.uint8)[None, :].repeat(8, 0) * 16  # 8 high, 16 wide
    grey = Image.fromarray(ramp)
    colour = Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], 2))
    colour.save(root / "a" / "0.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(root / "a" / "1.png")  # 16 bits
    grey.convert("P").save(root / "a" / "deep" / "2.gif")
    colour.convert("CMYK").save(root / "b" / "3.tiff")
    alpha = np.stack([ramp, ramp, ramp, 0 * ramp], 2)
    Image.fromarray(alpha).save(root / "b" / "4.png")  # transparent: white
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    Image.fromarray(np.rot90(np.asarray(colour))).save(root / "b" / "5.png", exif=exif)
    (root / "b" / "6.png").symlink_to(root / "a" / "0.png")
    colour.save(root / "7.png")  # beside the classes: without one
    colour.save(root / ".hidden" / "8.png")
    (root / "b" / "notes.txt").write_text("not an image")
    (root / "b" / "film.MOV").write_text("not an image")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        images, labels, names = fm.load_folder(str(root), str(cache), 8)
    images = images.clone()  # not the file, which is damaged below
    assert images.shape == (8, 3, 8, 8) and images.dtype == torch.uint8
    by_file = {file: i for i, file in enumerate("70123456")}
    assert names == ["a", "b"] and labels.tolist() == [2, 0, 0, 0, 1, 1, 1, 1]
    left = [line for line in said.getvalue().splitlines() if "left out" in line]
    assert len(left) == 1 and "1 .MOV" in left[0] and "1 .txt" in left[0]
    centre = torch.from_numpy(ramp[:, 4:12]).int()
    coloured = torch.stack([centre, 255 - centre, centre // 2])
    for file, expected in {"0": coloured, "1": centre, "2": centre, "3": coloured, "5": coloured,
                           "6": coloured, "7": coloured}.items():
        assert (images[by_file[file]].int() - expected).abs().max() <= 1, file
    assert (images[by_file["4"]] == 255).all()

    before = {f: f.stat().st_mtime_ns for f in cache.iterdir()}
    again = fm.load_folder(str(root), str(cache), 8)[0]
    assert {f: f.stat().st_mtime_ns for f in cache.iterdir()} == before and len(before) == 1
    assert torch.equal(again, images)
    for damage in (b"", next(iter(before)).read_bytes()[:-100]):
        next(iter(before)).write_bytes(damage)
        assert torch.equal(fm.load_folder(str(root), str(cache), 8)[0], images)
    Image.fromarray(255 - ramp).convert("RGB").save(root / "a" / "0.png")
    os.utime(root / "a" / "0.png", (1, 1))
    assert not torch.equal(fm.load_folder(str(root), str(cache), 8)[0], images)  # a change is seen


def test_every_image_of_a_large_folder_is_there_in_its_place(tmp_path):
    for i in range(600):
        file = tmp_path / f"{i % 7}" / f"{i:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2), (i % 256, i // 3, 255 - i // 3)).save(file)
    images, labels, names = fm.load_folder(str(tmp_path), str(tmp_path / "cache"), 2)
    i = torch.tensor(sorted(range(600), key=lambda i: (i % 7, i)))
    expected = torch.stack([i % 256, i // 3, 255 - i // 3], 1).byte()
    assert torch.equal(images, expected[:, :, None, None].expand(600, 3, 2, 2))
    assert torch.equal(labels, i % 7) and names == list("0123456")


def test_odd_image_files_are_used_or_all_named_and_refused(tmp_path, monkeypatch):
    """1 × 1 and animated files are images; empty, cut, huge and foreign ones stop with a name."""
    white = Image.new("L", (64, 64), "white")
    (tmp_path / "used").mkdir()
    Image.new("L", (1, 1), "white").save(tmp_path / "used" / "dot.png")
    white.save(tmp_path / "used" / "film.gif", save_all=True,
               append_images=[Image.new("L", (64, 64), "black")])
    assert (fm.load_folder(str(tmp_path / "used"), str(tmp_path), 8)[0] == 255).all()
    bad = tmp_path / "bad"
    bad.mkdir()
    white.save(bad / "bomb.png")
    whole = (bad / "bomb.png").read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16)  # 64 × 64 is a decompression bomb
    for name, content in (("empty", b""), ("cut", whole[: len(whole) // 2]), ("odd", b"<html>")):
        (bad / f"{name}.png").write_bytes(content)
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(bad / "float.tiff")
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(bad / "long.tiff")
    with pytest.raises(ValueError) as refusal:
        fm.load_folder(str(bad), str(tmp_path), 8)
    for name in ("bomb.png", "empty.png", "cut.png", "odd.png", "float.tiff", "long.tiff"):
        assert str(bad / name) in str(refusal.value), name
    assert len(list(tmp_path.glob("*.npy"))) == 1 and not list(tmp_path.glob("tmp-*"))


def test_broken_links_circles_and_splits_are_refused(tmp_path):
    for target, says in (("nowhere.png", "x.png"), (".", "x.png")):
        folder = write_folder(tmp_path / says[0] / target)
        (folder / "class0" / "x.png").symlink_to(folder / target)
        with pytest.raises(ValueError, match=says):
            fm.load_folder(str(folder), str(tmp_path), 8)
    for split in ("train", "val"):
        write_folder(tmp_path / "set" / split)
    with pytest.raises(ValueError, match="set/train"):
        fm.load_folder(str(tmp_path / "set"), str(tmp_path), 8)


def test_a_grey_flat_folder_has_one_channel_and_no_labels(tmp_path):
    for i in range(3):
        Image.new("L", (5, 9), 40 * i).save(tmp_path / f"{i}.png")
    old, new = (tmp_path / "cache" / f"tmp-{age}-x.npy" for age in ("old", "new"))
    old.parent.mkdir()
    old.touch(), new.touch()
    os.utime(old, (time.time() - 2e5,) * 2)
    images, labels, names = fm.load_folder(str(tmp_path), str(tmp_path / "cache"), 4)
    assert images.shape == (3, 1, 4, 4) and names == [] and labels.tolist() == [0, 0, 0]
    assert images[:, 0, 0, 0].tolist() == [0, 40, 80]
    assert new.exists() and not old.exists()  # of a killed process; the new one may be writing


def write_mnist(root, kind, prefix, n):
    rng = np.random.default_rng(n)
    images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
    raw = root / kind / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
        struct.pack(">IIII", 0x803, n, 28, 28) + images.tobytes())
    (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
        struct.pack(">II", 0x801, n) + labels.tobytes())
    return images, labels


def test_torchvision_sets_load_from_files_in_their_own_format(tmp_path, monkeypatch):
    for name, kind in (("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")):
        for test, prefix, n in ((False, "train", 2100), (True, "t10k", 7)):
            images, labels = write_mnist(tmp_path, kind, prefix, n)
            # the other split is not there yet when the first one is read
            write_mnist(tmp_path, kind, "t10k", 7)
            mine, y, names = fm.load_data(name, str(tmp_path), 28, test)
            assert np.array_equal(mine[:, 0], images) and y.tolist() == labels.tolist()
        assert len(names) == 10 and fm.load_data(name, str(tmp_path), 32)[0].shape[2:] == (32, 32)
    folder, written = tmp_path / "cifar-10-batches-py", []
    folder.mkdir()
    for i, batch in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        written.append(np.random.default_rng(i).integers(0, 256, (2, 3072), np.uint8))
        (folder / batch).write_bytes(pickle.dumps({"data": written[-1], "labels": [3, i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    mine, y, names = fm.load_data("cifar10", str(tmp_path), 32)
    assert y.tolist() == [3, 0, 3, 1, 3, 2, 3, 3, 3, 4] and names[3] == "d"
    assert np.array_equal(mine.flatten(1), np.concatenate(written[:5]))
    assert np.array_equal(fm.load_data("cifar10", str(tmp_path), 32, True)[0].flatten(1), written[5])


# ------------------------------------------------------------------------------------------------
# §9  Training
# ------------------------------------------------------------------------------------------------

RANGE = torch.arange(50)
ARROWS = (RANGE[:, None, None, None] * torch.tensor([[4, 1], [3, 0]])).byte()  # none its mirror


def draw(step=1, **more):
    """A batch of ARROWS, which are of the classes a, b, a, b..."""
    return fm.draw_batch(ARROWS, RANGE % 2, config(**more), step, CPU)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    for a, b in zip(draw(5, seed=3), draw(5, seed=3), strict=True):
        assert torch.equal(a, b)
    others = [draw(step, seed=seed) for seed, step in
              ((3, 5), (3, 6), (4, 5), (4, 4), (2, 6), (5, 3), (4099, 5), (3, 4101))]
    assert len({x_0[0, 0, 0, 0].item() for _, _, x_0, _ in others}) == 8
    assert len({t[0].item() for _, _, _, t in others}) == 8


def test_a_batch_has_every_image_with_its_label_mirrored_only_if_asked():
    for flip in (False, True):
        x_1, y, _, _ = draw(batch=4000, flip=flip, names=list("ab"), label_drop=0)
        which = (fm.to_uint8(x_1).flatten(1).amax(1) / 4).long()
        assert torch.equal(which % 2, y)
        assert (torch.bincount(which, minlength=50) - 80).abs().max() < 45  # 5 standard errors
        plain, mirrored = ((fm.to_uint8(x_1) == images[which]).flatten(1).all(1)
                           for images in (ARROWS, ARROWS.flip(3)))
        assert (plain | mirrored).all() and (flip or plain.all())
        assert not flip or abs(plain[which > 0].float().mean() - 0.5) < 0.04  # 5 standard errors


def test_coupling_moves_noise_to_its_nearest_images_within_a_class():
    apart, coupled = (draw(batch=60, names=list("ab"), label_drop=0, coupling=coupling)
                      for coupling in ("independent", "ot"))
    assert torch.equal(apart[2].sort(0)[0], coupled[2].sort(0)[0])
    for (x_1, y, x_0, _), best in ((apart, False), (coupled, True)):
        assert torch.equal(fm.ot_coupling(x_0, x_1, y), x_0) == best
        assert not torch.equal(fm.ot_coupling(x_0, x_1), x_0)


def test_labels_are_dropped_sample_by_sample():
    _, y, _, _ = draw(batch=2000, names=list("ab"), label_drop=0.2)
    shares = torch.bincount(y, minlength=3) / 2000
    assert (shares - torch.tensor([0.4, 0.4, 0.2])).abs().max() < 0.05  # 4 standard errors


@pytest.mark.parametrize("time_, cdf", [
    ("uniform", scipy.stats.uniform.cdf),
    ("logit-normal", lambda t: scipy.stats.norm.cdf(scipy.special.logit(t)))])
def test_the_density_of_the_times(time_, cdf):
    t = draw(time=time_, batch=20_000)[3]
    assert t.min() >= 0 and t.max() <= 1
    assert scipy.stats.kstest(t.double().numpy(), cdf).pvalue > 1e-3  # one fixed draw


SCHEDULES = {  # α and σ as the paper has them, and the optimizer of that run
    "ot": (lambda t: (t, 1 - (1 - 1e-4) * t), "muon"),
    "vp": (lambda t: ((-(0.1 * (1 - t) + 9.95 * (1 - t) ** 2) / 2).exp(),
                      (1 - (-(0.1 * (1 - t) + 9.95 * (1 - t) ** 2)).exp()).sqrt()), "adamw"),
    "ve": (lambda t: (1 + 0 * t, 0.01 * 5000 ** (1 - t)), "adamw"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three steps on the digits by each path, with every choice that a step has: the folders."""
    root = tmp_path_factory.mktemp("models")
    for name, (_, optimizer) in SCHEDULES.items():
        run(f"train --path {name} --optimizer {optimizer} --classes --coupling ot --flip --ema 0.22"
            " --label-drop 0.3 --seed 70003 --size 8 --width 8 --mults 1,2 --attention none --lr 0.1"
            " --steps 3 --warmup 2 --clip 0.2 --batch 32 --device cpu --out", root / name)
    return {name: root / name for name in SCHEDULES}


@ALL_PATHS
def test_the_steps_of_train_are_the_gradient_steps_of_eq_14_written_out_by_hand(models, name):
    checkpoint = load(models[name])
    c = argparse.Namespace(**checkpoint["config"])
    images, labels, names = fm.draw_digits(20_000, 8)
    assert c.data_rms == pytest.approx(fm.to_float(images).square().mean().sqrt().item(), rel=0.01)
    assert (c.path, c.coupling, c.flip, c.names) == (name, "ot", True, names)
    torch.manual_seed(70003)
    velocity = fm.Velocity(c)
    average = [p.detach().clone() for p in velocity.parameters()]
    hidden = [p for p in velocity.parameters() if p.dim() == 4 and min(p.shape[:2]) >= 16]
    turned = hidden if SCHEDULES[name][1] == "muon" else []
    others = [p for p in velocity.parameters() if not any(p is q for q in turned)]
    optimizers = [torch.optim.AdamW(others, weight_decay=0), *([muon(turned)] if turned else [])]
    for step, rate in ((1, 0.1 / 2), (2, 0.1 * 2 / 3), (3, 0.1 / 3)):  # up, then down to 0
        x_1, y, x_0, t = fm.draw_batch(images, labels, c, step, CPU)
        (a, s), (da, ds) = torch.func.jvp(SCHEDULES[name][0], (t.double(),),
                                          (torch.ones_like(t).double(),))
        rms, power = c.data_rms, (a * c.data_rms) ** 2 + s**2  # of the data, of x
        skip = (a * da * rms**2 + s * ds) / power
        left = (da * rms) ** 2 + ds**2 - skip**2 * power
        c_in, skip, left = (1, 0, 1) if name == "ot" else (
            k.float()[:, None, None, None] for k in (power**-0.5, skip, left))
        a, s, da, ds = (k.float()[:, None, None, None] for k in (a, s, da, ds))
        x, u = a * x_1 + s * x_0, da * x_1 + ds * x_0
        v = skip * x + left**0.5 * velocity.net(c_in * x, t, y)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        ((v - u) ** 2 / left).mean().backward()
        assert nn.utils.clip_grad_norm_(velocity.parameters(), 0.2) > 0.2
        for optimizer in optimizers:
            optimizer.step()
        d = min(0.22, (1 + step) / (10 + step))
        average = [d * p + (1 - d) * q.detach()
                   for p, q in zip(average, velocity.parameters(), strict=True)]
    for part, expected in (("model", velocity.parameters()), ("ema", average)):
        expected = torch.cat([p.detach().flatten() for p in expected])
        got = torch.cat([p.flatten() for p in checkpoint[part].values()])
        off = ~torch.isclose(got, expected, rtol=1e-4, atol=1e-6)
        # AdamW divides by its own size also what is left of a sum that cancels: rounding
        assert off.float().mean() < 2e-3, off.float().mean()


def muon(kernels, lr=0.01):
    shapes = {p.shape: [q for q in kernels if q.shape == p.shape] for p in kernels}
    return fm.Muon([dict(params=group) for group in shapes.values()], dict(lr=lr))


def orthogonal_by_svd(G):
    """What three steps of the polynomial make of the singular values alone."""
    U, s, V = torch.linalg.svd(G, full_matrices=False)
    s = s / s.norm()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s) @ V, s


@pytest.mark.parametrize("shape", [(16, 16, 3, 3), (40, 24, 1, 1), (32, 16, 3, 3)])
def test_muon_s_momentum_its_orthogonal_steps_and_their_size(shape):
    """Momentum 0.9 and Nesterov's look ahead by hand, an SVD for the rest; kernels are stacked.

    The singular vectors stay; values above 2% of the norm end in 0.68..1.21, as a scan shows.
    """
    kernels = [nn.Parameter(double(*shape, seed=seed)) for seed in (1, 2, 3)]
    optimizer, momenta = muon(kernels), torch.zeros(3, *shape).double()
    U, _, V = torch.linalg.svd(double(3, *shape, seed=4).flatten(2), full_matrices=False)
    values = torch.linspace(0.1, 1, U.shape[2]).double()  # down to 0.1/√16 = 2.5% of the norm
    spectral = (7 * U * values @ V).view(3, *shape)
    for gradients in (spectral, double(3, *shape, seed=5), torch.zeros(3, *shape).double()):
        momenta = 0.9 * momenta + 0.1 * gradients
        before = [W.detach().clone() for W in kernels]
        for W, gradient in zip(kernels, gradients, strict=True):
            W.grad = gradient.clone()
        optimizer.step()
        for W, old, g in zip(kernels, before, 0.9 * momenta + 0.1 * gradients, strict=True):
            step, s = orthogonal_by_svd(g.flatten(1))
            step = step.view(shape) * 0.2 * max(g.flatten(1).shape) ** 0.5
            torch.testing.assert_close(old - W.detach(), 0.01 * step, rtol=1e-7, atol=1e-10)
            if gradients is spectral:
                assert 0.68 < s.min() and s.max() < 1.21
            elif shape[2] == 3:
                assert step.square().mean().sqrt() == pytest.approx(0.2, rel=0.2)
    still, optimizer = kernels[0].detach().clone(), muon(kernels)
    kernels[0].grad.zero_()
    optimizer.step()
    assert torch.equal(kernels[0], still)  # and not NaN


def test_muon_turns_hidden_kernels_alone(tiny):
    checkpoint = load(tiny[1])
    kernels = [p for k, p in checkpoint["model"].items() if p.dim() == 4 and min(p.shape[:2]) >= 16]
    stacked = [state["momentum"].numel() for state in checkpoint["muon"]["state"].values()]
    assert len(kernels) > 9 and sum(stacked) == sum(p.numel() for p in kernels)
    assert len(checkpoint["adamw"]["state"]) == len(checkpoint["model"]) - len(kernels)
    assert len(stacked) == len({p.shape for p in kernels})


def test_training_lowers_the_loss_and_leaves_pictures(tiny):
    _, out = tiny
    losses_ = [loss for _, loss in losses(out)]
    assert len(losses_) == 8 and np.mean(losses_[-3:]) < 0.9 * losses_[0]
    assert sorted(f.name for f in out.iterdir()) == ["checkpoint.pt", "log.jsonl",
                                                     "step-000024.png"]
    with Image.open(out / "step-000024.png") as picture:
        assert picture.width == picture.height >= 512


class Stop(BaseException):
    """An end that no handler of the program sees."""


def test_a_killed_run_resumes_to_bit_identical_weights_with_each_step_once(
        tiny, tmp_path, monkeypatch):
    command, whole = tiny

    def kill(n, loss):
        if n == 20:
            raise Stop
        return loss

    with monkeypatch.context() as patch, pytest.raises(Stop):
        change_losses(patch, kill)
        run(command, "--save-every", 12, "--out", tmp_path)
    assert load(tmp_path)["step"] == 12 and losses(tmp_path)[-1][0] == 18
    run("train --resume --device cpu --out", tmp_path)
    assert same(whole, tmp_path) and losses(tmp_path) == losses(whole)
    assert not list(tmp_path.glob("tmp-*"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on_and_a_second_one_stops_at_once(
        tiny, tmp_path, monkeypatch, capsys, name):
    (command, whole), number, signals = tiny, getattr(signal, name), [1]

    def mine(*_):
        raise Stop

    def send(n, loss):
        for _ in range(signals[0] if n == 20 else 0):
            signal.raise_signal(number)
        return loss

    before = signal.signal(number, mine)
    try:
        with monkeypatch.context() as patch:
            change_losses(patch, send)
            with pytest.raises(SystemExit) as stop:
                run(command, "--out", tmp_path / "one")
            assert stop.value.code == 128 + number and signal.getsignal(number) == mine
            signals[0] = 2
            change_losses(patch, send)
            with pytest.raises(Stop):
                run(command, "--out", tmp_path / "two")
        assert signal.getsignal(number) == mine
    finally:
        signal.signal(number, before)
    assert load(tmp_path / "one")["step"] == 20 and not (tmp_path / "two/checkpoint.pt").exists()
    assert f"train --resume --out {tmp_path / 'one'}" in capsys.readouterr().out
    if name == "SIGTERM":
        run("train --resume --device cpu --out", tmp_path / "one")
        assert same(whole, tmp_path / "one")


DRIVER = f"""
import itertools, os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import flow_matching as fm
last, original, numbers = int(sys.argv.pop(1)), fm.cfm_loss, itertools.count(1)
def cfm_loss(*args, **weight):
    if next(numbers) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **weight)
fm.cfm_loss = cfm_loss
fm.main()
"""


def test_two_ranks_that_are_killed_go_on_bit_by_bit_and_on_one_rank_to_rounding(tiny, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)

    def torchrun(last, *more):
        """Two ranks, which kill themselves at their loss number `last`: status and output."""
        python = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                  "--nproc-per-node=2", tmp_path / "driver.py", last, *more]
        done = subprocess.run(list(map(str, python)), stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT, timeout=300)
        return done.returncode, done.stdout

    command = [*tiny[0].split(), "--dropout", 0, "--save-every", 12]  # its masks differ by rank
    whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
    status, said = torchrun(0, *command, "--out", whole)
    assert status == 0 and said.count("step 24/24") == 1, said  # rank 0 speaks
    assert torchrun(20, *command, "--out", killed)[0] != 0 and load(killed)["step"] == 12
    shutil.copytree(killed, moved)
    status, said = torchrun(0, "train", "--resume", "--device", "cpu", "--out", killed)
    assert status == 0 and same(whole, killed), said
    assert losses(killed) == losses(whole) and len(losses(whole)) == 8
    run("train --resume --device cpu --out", moved)
    run(tiny[0], "--dropout", 0, "--out", tmp_path / "one")
    for out in (moved, tmp_path / "one"):
        # float32 sums in another order differ by 1e-7; 24 steps at a high rate amplify that.
        np.testing.assert_allclose(losses(out), losses(whole), rtol=1e-4)


@pytest.fixture
def pretend_ranks(monkeypatch):
    """A function that makes this process rank r of two, alone; and the list of what it waits for."""
    events, dist = [], torch.distributed

    def become(rank):
        for key in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(key, str(rank))
        for name, value in dict(init_process_group=None, get_rank=rank, get_world_size=2,
                                all_reduce=None, destroy_process_group=None).items():
            monkeypatch.setattr(dist, name, lambda *_, value=value, **__: value)
        monkeypatch.setattr(dist, "barrier", lambda: events.append("barrier"))
        monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **_: model)
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # which a rank may close
        return events

    return become


def test_dropout_differs_between_ranks_and_steps(tiny, tmp_path, monkeypatch, pretend_ranks):
    """The same samples at all steps and ranks, and weights that stand still: only masks differ."""
    checkpoint = load(tiny[1])
    checkpoint["config"] |= dict(lr=1e-12, steps=27)
    x_1, y, x_0, t = fm.draw_batch(*fm.load_data(*(checkpoint["config"][k] for k in (
        "data", "data_dir", "size")))[:2], argparse.Namespace(**checkpoint["config"]), 1, CPU)
    batch = [torch.cat([part[:4]] * 2) for part in (x_1, y, x_0, t)]
    monkeypatch.setattr(fm, "draw_batch", lambda *_: batch)
    seen = []
    change_losses(monkeypatch, lambda n, loss: seen.append(loss.item()) or loss)
    for rank in (0, 1):
        out = tmp_path / str(rank)
        out.mkdir()
        torch.save(checkpoint, out / "checkpoint.pt")
        pretend_ranks(rank)
        fm.main(["train", "--resume", "--device", "cpu", "--out", str(out)])
    assert len(seen) == len(set(seen)) == 6


def test_the_first_rank_decodes_while_the_others_wait_and_a_batch_must_divide(
        tiny, tmp_path, monkeypatch, pretend_ranks):
    load_data = fm.load_data
    for rank, order in ((0, ["data", "barrier"]), (1, ["barrier", "data"])):
        events = pretend_ranks(rank)
        monkeypatch.setattr(fm, "load_data", lambda *a: events.append("data") or load_data(*a))
        events.clear()
        assert "2 ranks" in refuse(tiny[0], "--batch", 7, "--out", tmp_path)
        assert events == order


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA"))])
def test_amp_trains_with_float32_weights(tiny, tmp_path, amp, device):
    command, whole = tiny
    run(command, "--amp", amp, "--device", device, "--no-compile", "--out", tmp_path)
    checkpoint, (first, *_, last) = load(tmp_path), [loss for _, loss in losses(tmp_path)]
    assert last < 0.9 * first and abs(first / losses(whole)[0][1] - 1) < 0.1
    assert losses(tmp_path) != losses(whole)  # matrix work was done in amp
    assert {p.dtype for k in ("model", "ema") for p in checkpoint[k].values()} == {torch.float32}
    assert bool(checkpoint["scaler"]) == (amp == "fp16")


def test_fp16_gradients_are_clipped_at_their_true_norm(tiny, tmp_path, monkeypatch):
    """The norm that is clipped is float32's to fp16 rounding, not 65536 times it."""
    norms, clip = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_",
                        lambda *args: norms.append(clip(*args)) or norms[-1])
    for amp in ("off", "fp16"):
        run(tiny[0], "--steps", 1, "--clip", 1000,
            "--amp", amp, "--out", tmp_path / amp)
    assert norms[1] == pytest.approx(norms[0].item(), rel=0.02) and norms[0] != norms[1]


def test_an_fp16_overflow_is_skipped_and_its_scale_is_resumed(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        change_losses(patch, lambda n, loss: loss * (math.inf if n == 5 else 1))
        run(tiny[0], "--amp", "fp16", "--steps", 6,
            "--out", tmp_path)
    first = load(tmp_path)
    assert all(p.isfinite().all() for p in first["ema"].values())
    assert first["scaler"]["scale"] < 65536  # the initial scale, halved once or more
    run("train --resume --steps 7 --device cpu --out", tmp_path)
    scaler, before = load(tmp_path)["scaler"], first["scaler"]
    assert scaler["scale"] == before["scale"]
    assert scaler["_growth_tracker"] == before["_growth_tracker"] + 1


def test_fp16_that_overflows_at_any_scale_is_stopped(tiny, tmp_path, monkeypatch):
    change_losses(monkeypatch, lambda n, loss: loss * math.nan)
    error = refuse(tiny[0], "--amp", "fp16", "--out", tmp_path)
    assert "step 16 is not finite" in error  # 65536 halved 16 times is 1, seen at step 18's line
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_non_finite_gradient_names_the_step_and_keeps_the_checkpoint(
        tiny, tmp_path, monkeypatch):
    change_losses(monkeypatch, lambda n, loss: loss * (math.nan if n == 8 else 1))
    assert "step 8 is not finite" in refuse(tiny[0], "--save-every", 6, "--out", tmp_path)
    assert load(tmp_path)["step"] == 6
    assert all(p.isfinite().all() for p in load(tmp_path)["ema"].values())


def test_weights_gone_bad_under_finite_gradients_are_not_saved(tiny, tmp_path, monkeypatch):
    def spoil(n, loss):
        if n == 11:  # of the optimizer that steps next
            monkeypatch.setattr(fm.Muon, "step", lambda self: [
                p.data.fill_(math.nan) for group in self.param_groups for p in group["params"]])
        return loss

    change_losses(monkeypatch, spoil)
    assert "not finite" in refuse(tiny[0], "--save-every", 6, "--steps", 12, "--out", tmp_path)
    assert load(tmp_path)["step"] == 6
    assert all(p.isfinite().all() for p in load(tmp_path)["ema"].values())


def test_a_checkpoint_is_flushed_beside_the_old_one_and_then_renamed(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny[1], tmp_path, dirs_exist_ok=True)
    file, flushed, fsync = tmp_path / "checkpoint.pt", {}, os.fsync
    os.link(file, tmp_path / "old")
    before = file.read_bytes()

    def watch(descriptor):
        assert file.read_bytes() == before  # the old one is there, whole, until the end
        state = os.fstat(descriptor)
        flushed[state.st_ino] = state.st_size
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    run("train --resume --steps 25 --device cpu --out", tmp_path)
    state = file.stat()
    assert flushed[state.st_ino] == state.st_size and load(tmp_path)["step"] == 25
    assert (tmp_path / "old").read_bytes() == before and not list(tmp_path.glob("tmp-*"))


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tiny, tmp_path):
    """A limit on the size of files stands in for it: the second checkpoint does not fit."""
    resource = pytest.importorskip("resource")
    out = shutil.copytree(tiny[1], tmp_path / "run")
    before = (out / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        error = refuse("train --resume --steps 25 --device cpu --out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "disk" in error and str(out) in error
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob("tmp-*"))


def test_out_of_memory_names_the_flags_to_lower(tiny, tmp_path):
    """A batch of 8 million images of 32 x 32 wants 34 GB for the noise alone."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (30 * 2**30, limits[1]))
    try:
        error = refuse(tiny[0], "--batch", 2**23, "--size", 32, "--steps", 1, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert "out of memory: lower --batch" in error


def test_rates_and_the_time_left_are_of_this_run_also_after_a_resume(tiny, tmp_path, monkeypatch):
    """By a clock that each step moves by two seconds."""
    clock = [0.0]

    def advance(seconds, result=None):
        clock[0] += seconds
        return clock[0] if result is None else result

    monkeypatch.setattr(time, "perf_counter", lambda: advance(1e-6))
    change_losses(monkeypatch, lambda n, loss: advance(2, loss))
    said = run(tiny[0], "--steps", 9, "--save-every", 9, "--out", tmp_path)
    said += run("train --resume --steps 27 --device cpu --out", tmp_path)
    for step, steps, left in ((3, 9, "0:00:12"), (9, 9, "0:00:00"), (12, 27, "0:00:30")):
        assert re.search(rf"step {step}/{steps}  4 images/s  {left} left  loss", said), said
    assert [row["images_per_second"] for row in rows(tmp_path / "log.jsonl")] == pytest.approx([4] * 9, rel=1e-4)


# ------------------------------------------------------------------------------------------------
# §10  The theory, drawn
# ------------------------------------------------------------------------------------------------

ANGLES = torch.arange(8) * math.pi / 4
GAUSSIANS = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
SIDE = torch.arange(16) * 0.25 - 1.875
BOARD = torch.cartesian_prod(SIDE, SIDE)
CHECKERBOARD = BOARD[(BOARD + 2).floor().sum(1) % 2 == 1]


def test_ot_needs_60_percent_of_vp_evaluations_under_the_paper_s_conditions():
    """Fig. 7 on the exact field: eight Gaussians by Euler; bands are the spread over particles.

    On a checkerboard it is another solver that sees it: with 1,000 particles 239%, 59%, 45%.
    """
    table = fm.measure_paths(GAUSSIANS, 0.1, particles=400)
    assert 0.52 < fm.evaluations_ratio(table) < 0.68
    errors = {key: error for key, (_, error) in table.items()}
    assert all(error < errors["vp", *key[1:]] for key, error in errors.items()
               if key[:2] == ("ot", "euler"))
    finest = [landed for (_, _, nfe), (landed, _) in table.items() if nfe == 100]
    # 98.9% of a 2-D Gaussian lie within 3 tau; 400 particles: 0.5% standard error
    assert len(finest) == 9 and all(abs(landed - 0.989) < 0.02 for landed in finest)
    table = fm.measure_paths(CHECKERBOARD, 0.1, particles=200)
    for solver, low, high in (("euler", 1.9, 2.9), ("midpoint", 0.4, 0.7), ("rk4", 0.38, 0.5)):
        assert low < fm.evaluations_ratio(table, solver) < high, solver


def test_evaluations_ratio_of_known_curves():
    table = {(name, "euler", n): (1.0, (c * n) ** -2.0)
             for name, c in (("ot", 2), ("vp", 1)) for n in (8, 16, 32, 64)}
    assert fm.evaluations_ratio(table) == pytest.approx(0.5)


def test_paths_draws_the_data_where_it_is_and_prints_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured = fm.measure_paths
    monkeypatch.setattr(fm, "measure_paths", lambda *a, **k: measured(*a, particles=50, **k))
    row = r"^(euler|midpoint|rk4) +\d+( +\d+\.\d%  \d\.\de.\d\d){3}$"
    assert len(re.findall(row, run("paths"), re.M)) == 18
    picture = np.asarray(Image.open("paths.png"))
    assert picture.shape[0] > 900 and picture.shape[1] > 1500
    assert "--overwrite" in refuse("paths --out paths.png")
    picture = np.asarray(fm.draw_paths(torch.tensor([[2.0, 1.0]]), 0.1).convert("L")).astype(int)
    panels = picture[: picture.shape[0] // 3, -(picture.shape[1] // 5):], picture[
        : picture.shape[0] // 3, : picture.shape[1] // 5]  # ot at t = 1 and at t = 0
    (y, x), (y_0, x_0) = (np.argwhere(panel[30:] < 60).mean(0) / panel.shape for panel in panels)
    assert x > 0.6 and y < 0.4 and abs(x_0 - 0.5) < 0.05 and abs(y_0 - 0.45) < 0.05


# ------------------------------------------------------------------------------------------------
# §11  Command line
# ------------------------------------------------------------------------------------------------


def prior(name):
    return {"ot": 1, "vp": math.sqrt(1 - math.exp(-10.05)), "ve": 50}[name]


@ALL_PATHS
def test_sample_is_midpoint_from_the_prior_by_hand_with_classes_and_guidance(
        models, name, tmp_path):
    v, n = ema(models[name]), 12
    common = f"sample --n 12 --steps 20 --seed 5 --ckpt {models[name] / 'checkpoint.pt'} --out"
    images = {}
    for label, scale in (("", 1), ("", 2.5), ("7", 2.5), ("7", 0)):
        x, y = prior(name) * fm.draw_noise(5, range(n), (1, 8, 8)), torch.arange(n) % 10
        y = torch.full((n,), int(label)) if label else y
        for i in range(20):
            t, h = torch.full((n,), i / 20), 1 / 20

            def u(x, t, y=y, scale=scale):
                return v(x, t, None) + scale * (v(x, t, y) - v(x, t, None))

            x = x + h * u(x + h / 2 * u(x, t), t + h / 2)
        expected = ((x.clamp(-1, 1) + 1) * 127.5).round()[:, 0].numpy()
        out = tmp_path / f"{label}at{scale}"
        said = run(common, out, "--label", label, "--guidance", scale)
        made = pngs(out)
        assert list(made) == [f"{i:06d}-{y[i]}" for i in range(n)]
        images[label, scale] = np.stack(list(made.values()))
        assert np.abs(images[label, scale] - expected).max() <= 1
        assert f"NFE {40 if scale == 1 else 80}," in said and expected.std() > 10
    assert np.abs(images["", 1] - images["", 2.5]).max() > 2
    assert np.abs(images["7", 2.5] - images["", 2.5]).max() > 2


@ALL_PATHS
def test_nll_is_the_likelihood_by_hand_of_images_of_its_split(models, name, tmp_path, monkeypatch):
    """The draws of an image share their signs: else log mean exp takes their noise for density.

    On trained digits at K = 5: exact 1.487 bits/dim, signs shared 1.480 ± 0.013, own 1.398 ± 0.006.
    """
    seen, original = [], fm.log_likelihood

    def watch(v, x, path, probes, **solver):
        seen.append((x, probes[0]))
        return original(v, x, path, probes, **solver)

    monkeypatch.setattr(fm, "log_likelihood", watch)
    command = f"nll --n 3 --k 4 --solver rk4 --steps 5 --ckpt {models[name] / 'checkpoint.pt'}"
    run(command, "--batch", 5, "--results", tmp_path / "rows")
    x, signs = (torch.cat(part) for part in zip(*seen, strict=True))
    log_p, nfe = original(ema(models[name]), x, fm.PATHS[name], [signs], solver="rk4", steps=5)
    bits = 7 - ((log_p.reshape(3, 4).double().logsumexp(1) - math.log(4)) / 64) / math.log(2)
    run(command, "--results", tmp_path / "rows")  # in one batch
    for row in rows(tmp_path / "rows"):
        assert row["bits_per_dim"] == pytest.approx(bits.mean().item(), rel=1e-5)
        assert row["standard_error"] == pytest.approx(bits.std().item() / 3**0.5, rel=1e-3)
        assert (row["n"], row["nfe"], row["k"], row["seed"]) == (3, nfe, 4, 0)
    x, signs = x.reshape(3, 4, 64), signs.reshape(3, 4, 64)
    assert torch.equal(signs, signs[:, :1].expand(3, 4, 64)) and (signs.abs() == 1).all()
    assert len(torch.unique(signs[:, 0], dim=0)) == 3
    assert len(torch.unique(x.flatten(0, 1), dim=0)) == 12
    levels = (128 * (x + 1)).floor().long()  # the same image under four dequantisations
    assert torch.equal(levels, levels[:, :1].expand(3, 4, 64))
    test = fm.draw_digits(20_000, 8, seed=1)[0].flatten(1).long()  # kept from training
    places = [(test == image).all(1).nonzero() for image in levels[:, 0]]
    assert all(len(place) for place in places) and max(map(torch.max, places)) > 1000


@ALL_PATHS
def test_nll_of_a_model_that_has_learnt_nothing_is_its_closed_form(models, name, tmp_path):
    """With F = 0, v = c_skip x, so that p_1 = N(0, s²): s = 1 for ot, σ_0 s_1/s_0 for the others.

    bits/dim = 7 + E[x²]/(2 s² ln 2) + ½ log2 2πs², by hand.  E over u of x = (k + u)/128 − 1 is
    exact; the draws of 24 × 64 u leave less than 1e-4.
    """
    checkpoint = load(models[name])
    zero = {k: 0 * p if k.startswith("net.out.") else p for k, p in checkpoint["ema"].items()}
    torch.save(checkpoint | {"ema": zero}, tmp_path / "still.pt")
    folder, solver = write_folder(tmp_path / "set"), "--solver rk4 --steps 400"
    k = fm.load_folder(str(folder), str(tmp_path), 8)[0].double().flatten(1)
    rms, (alpha, sigma, _, _) = checkpoint["config"]["data_rms"], fm.PATHS[name](
        torch.tensor([0.0, 1.0]).double())
    power = ((alpha * rms) ** 2 + sigma**2).sqrt()
    s = 1 if name == "ot" else (sigma[0] * power[1] / power[0]).item()
    solver = "--solver rk4 --steps 2" if name == "ot" else "--solver dopri5 --tolerance 1e-6"
    command = f"nll --ckpt {tmp_path / 'still.pt'} --n 999 --data-dir {tmp_path} {solver}"
    run(command, "--reference", folder)
    four = write_folder(tmp_path / "four", n=4)
    for more in ((), ("--exact", "--batch", 3)):
        run(command, "--reference", four, *more)
    row, hutchinson, exact = rows(tmp_path / "results.jsonl")
    second = ((k + 0.5) / 128 - 1).square().mean(1) + 1 / (12 * 128**2)
    each = 7 + second / (2 * s**2 * math.log(2)) + 0.5 * math.log2(2 * math.pi * s**2)
    assert row["bits_per_dim"] == pytest.approx(each.mean().item(), abs=2e-4 / s**2)
    assert row["n"] == 24 and row["standard_error"] == pytest.approx(each.std().item() / 24**0.5,
                                                                     rel=1e-2)
    assert exact["bits_per_dim"] == pytest.approx(hutchinson["bits_per_dim"], abs=1e-4)


@ALL_PATHS
def test_fid_is_the_distance_of_the_images_that_sample_writes(models, name, tmp_path, monkeypatch):
    """tr √(S_1 S_2) by the eigenvalues of the product; the reference is kept until it changes."""
    model = f"--ckpt {models[name] / 'checkpoint.pt'} --n 9 --seed 3 --solver euler --guidance 2"
    calls, pixels, file = [], fm.pixels, tmp_path / "results.jsonl"
    monkeypatch.setattr(fm, "pixels", lambda part: calls.append(len(part)) or pixels(part))
    folder, distances = write_folder(tmp_path / "set", n=30), []
    for reference, count in (("train", 20_009), ("test", 20_009), (folder, 39), (folder, 9)):
        calls.clear()
        said = run(f"fid --features pixels {model} --steps 3 --results {file} --batch 4",
                   "--reference", reference, "--data-dir", tmp_path)
        assert sum(calls) == count and "not comparable" in said and "covariance is singular" in said
    Image.new("L", (8, 8), 7).save(folder / "class0" / "000.png")
    run(f"fid --features pixels {model} --steps 2,3 --results {file} --reference {folder}",
        "--data-dir", tmp_path)
    run(f"sample {model} --steps 3 --batch 4 --out", tmp_path / "made")
    made = torch.from_numpy(np.stack(list(pngs(tmp_path / "made").values())))
    for seed in (0, 1, None):
        real = (fm.draw_digits(20_000, 8, seed)[0] if seed is not None
                else fm.load_folder(str(folder), str(tmp_path), 8)[0])
        a, b = (x.flatten(1).double() / 127.5 - 1 for x in (made, real))
        A, B = torch.cov(a.T), torch.cov(b.T)
        root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
        distances.append((a.mean(0) - b.mean(0)).square().sum() + (A + B).trace() - 2 * root)
    got = [row["frechet_distance"] for row in rows(file)]
    assert [got[0], got[1], got[5]] == pytest.approx([d.item() for d in distances], rel=2e-6)
    assert got[0] != pytest.approx(got[1], rel=1e-5) and got[2] == got[3] != got[5] != got[4]
    assert [row["nfe"] for row in rows(file)] == [6, 6, 6, 6, 4, 6]
    assert [row["n_reference"] for row in rows(file)] == [20_000] * 2 + [30] * 4


def test_fid_with_inception_says_what_it_compared(models, trusted, tmp_path):
    """By factors: tr √(S_1 S_2) is the sum of the singular values of C_1ᵀ C_2, here 4 × 4."""
    folder, model = write_folder(tmp_path / "set", n=4), f"--ckpt {models['ot'] / 'checkpoint.pt'}"
    run(f"sample {model} --n 4 --steps 2 --out", tmp_path / "made")
    said = run(f"fid {model} --n 4 --steps 2 --data-dir {tmp_path} --results {tmp_path / 'rows'}",
               "--inception", trusted, "--reference", folder)
    made = torch.from_numpy(np.stack(list(pngs(tmp_path / "made").values()))).byte()[:, None]
    f = [fm.inception(trusted)(images).double()
         for images in (made, fm.load_folder(str(folder), str(tmp_path), 8)[0])]
    C = [(x - x.mean(0)) / 3**0.5 for x in f]
    expected = (f[0].mean(0) - f[1].mean(0)).square().sum() + sum(c.square().sum() for c in C)
    expected -= 2 * torch.linalg.svdvals(C[0] @ C[1].T).sum()
    distance = rows(tmp_path / "rows")[0]["frechet_distance"]
    assert distance == pytest.approx(expected.item(), rel=1e-3)
    assert f"FID {distance:.4f}" in said and "not comparable" in said and "singular" in said
    assert "4 made, 4 of" in said


def test_more_draws_tighten_the_bound_of_nll(tiny, tmp_path, monkeypatch):
    """A density so steep that log p varies by 70 nats between draws: 8 of them gain 98 ± 21."""
    monkeypatch.setattr(fm, "log_likelihood", lambda v, x, *_, **__: (
        -2000 * x.flatten(1).square().sum(1), 1))
    for k in (1, 8):
        run(f"nll --n 12 --ckpt {tiny[1] / 'checkpoint.pt'} --results {tmp_path / 'rows'} --k {k}")
    one, eight = (row["bits_per_dim"] for row in rows(tmp_path / "rows"))
    assert eight < one


def cells(picture, columns, n, size=8):
    """The n images of a grid, in order."""
    picture = np.asarray(Image.open(picture).convert("L")).astype(int)
    scale = picture.shape[1] // (columns * (size + 1) + 1)
    corners = [(1 + i // columns * (size + 1), 1 + i % columns * (size + 1)) for i in range(n)]
    small = picture[scale // 2 :: scale, scale // 2 :: scale]
    assert small.shape[1] == columns * (size + 1) + 1
    return np.stack([small[y : y + size, x : x + size] for y, x in corners])


@pytest.mark.parametrize("kind, n, columns", [("tiny", 9, 3), ("classy", 20, 10)])
def test_a_grid_has_the_images_in_order_for_any_batch_size(
        tiny, models, kind, n, columns, tmp_path):
    out = tiny[1] if kind == "tiny" else models["ot"]
    common = f"sample --ckpt {out / 'checkpoint.pt'} --n {n} --seed 5 --steps 3"
    run(common, "--out", tmp_path / "folder")
    run(common, "--batch", 4, "--out", tmp_path / "grid.png")
    images = np.stack(list(pngs(tmp_path / "folder").values()))
    assert np.abs(cells(tmp_path / "grid.png", columns, n) - images).max() <= 1
    assert np.abs(images[0] - images[1]).max() > 1


def test_every_solver_samples_and_dopri5_in_float32_unless_told_otherwise(
        tiny, tmp_path, monkeypatch):
    """bf16 rounds by 4e-3, which the error control at 1e-5 would chase with ever smaller steps."""
    monkeypatch.setattr(fm, "look_around", lambda name: ("cpu", "bf16", Path()))
    for more, amp, nfe in (("euler --steps 2", "bf16", 2), ("midpoint --steps 2", "bf16", 4),
                           ("rk4 --steps 2 --amp off", "off", 8), ("dopri5", "off", r"\d+"),
                           ("dopri5 --amp bf16 --tolerance 1", "bf16", r"\d+")):
        said = run(f"sample --n 1 --ckpt {tiny[1] / 'checkpoint.pt'} --solver {more} --overwrite",
                   "--out", tmp_path / "x.png")
        assert re.search(f"NFE {nfe}, amp {amp},", said), said


def test_sample_takes_the_ema_weights_of_the_newest_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = load(tiny[1])
    checkpoint["model"] = {k: math.nan * p for k, p in checkpoint["model"].items()}
    for name, age in (("old", 100), ("new", 0), ("older", 200)):
        file = tmp_path / "runs" / name / "checkpoint.pt"
        file.parent.mkdir(parents=True)
        torch.save(checkpoint, file)
        os.utime(file, (time.time() - age,) * 2)
    assert "runs/new/samples.png" in run("sample --n 1 --steps 1")


def test_nothing_already_written_is_overwritten_unless_asked(tiny, tmp_path):
    command, whole = tiny
    base = f"sample --ckpt {whole / 'checkpoint.pt'} --n 1 --steps 1 --out"
    for out in (tmp_path / "x.png", tmp_path / "folder"):
        run(base, out)
        assert "--overwrite" in refuse(base, out)
    (tmp_path / "folder" / "2026-holiday.png").write_text("mine")
    (tmp_path / "folder" / "000007.png").write_text("of an earlier run")
    for out in (tmp_path / "x.png", tmp_path / "folder"):
        run(base, out, "--overwrite")
    left = sorted(f.name for f in (tmp_path / "folder").iterdir())
    assert left == ["000000.png", "2026-holiday.png"]
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text("somebody's\n")
    assert "--overwrite" in refuse(command, "--out", out)
    assert (out / "log.jsonl").read_text() == "somebody's\n"
    for file in ("checkpoint.pt", "step-000024.png"):
        shutil.copy(whole / file, out)
    run(command, "--out", out, "--overwrite", "--steps", 3)
    assert load(out)["step"] == 3
    assert {f.name for f in out.iterdir()} == {"checkpoint.pt", "log.jsonl", "step-000003.png"}


def test_a_killed_overwrite_does_not_resume_the_old_run(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny[1], tmp_path, dirs_exist_ok=True)

    def kill(n, loss):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        change_losses(patch, kill)
        run(tiny[0], "--out", tmp_path, "--overwrite")
    assert stop.value.code == 130
    assert "no checkpoint" in refuse("train --resume --steps 99 --device cpu --out", tmp_path)


def test_a_run_whose_data_changed_is_not_resumed(tiny, tmp_path):
    command = tiny[0].split(" --data ")[0] + f" --data-dir {tmp_path / 'cache'} --classes"
    for change in (dict(classes=3), dict(mode="RGB")):
        out = tmp_path / f"run{len(change)}{next(iter(change))}"
        folder = write_folder(tmp_path / f"set-{out.name}")
        run(command, "--data", folder, "--steps", 1, "--out", out)
        write_folder(folder, **change)
        error = refuse("train --resume --device cpu --steps 2 --out", out)
        assert "channels or classes" in error


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


@pytest.fixture(scope="module")
def bad(tiny, models, tmp_path_factory):
    """A directory of what is bad: NAME.pt are checkpoints, folders hold images."""
    root, whole = tmp_path_factory.mktemp("bad"), (tiny[1] / "checkpoint.pt").read_bytes()
    (root / "empty").mkdir()
    write_folder(root / "broken")
    (root / "broken" / "0.png").write_bytes(b"not a png")
    write_folder(root / "one", n=1)
    Image.new("RGB", (8, 8)).save(write_folder(root / "colour") / "0.tiff")
    Image.new("L", (8, 8)).save(write_folder(root / "flat", n=1).parent / "flat" / "0.png")
    shutil.rmtree(root / "flat" / "class0")
    (root / "other.pth").write_bytes(b"other")
    torch.save({"model": Payload()}, root / "pickle.pth")
    shutil.copytree(tiny[1], root / "run")
    (root / "images").mkdir()
    (root / "images" / "000000.png").write_text("old")
    checkpoint, digits = load(tiny[1]), load(models["ot"])
    (root / "empty.pt").write_bytes(b"")
    (root / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (root / "text.pt").write_text("hello")
    middle = whole.index(next(iter(checkpoint["ema"].values())).numpy().tobytes())
    flipped = bytes([whole[middle] ^ 1])  # one bit of one weight
    (root / "damaged.pt").write_bytes(whole[:middle] + flipped + whole[middle + 1 :])
    changes = dict(
        pickle={"model": Payload()}, foreign={"state_dict": {}}, list=[1, 2],
        shapes=checkpoint | {"ema": {k: p[:1] for k, p in checkpoint["ema"].items()}},
        config=checkpoint | {"config": {"path": "ot"}}, stepless=checkpoint | {"step": None},
        lr=checkpoint | {"config": checkpoint["config"] | {"lr": "fast"}},
        nan=checkpoint | {"ema": {k: p * math.nan for k, p in checkpoint["ema"].items()}},
        tiny=checkpoint, classy=digits,
        undropped=digits | {"config": digits["config"] | {"label_drop": 0.0}})
    for name, content in changes.items():
        torch.save(content, root / f"{name}.pt")
    return root


@pytest.mark.parametrize("command, says", [
    ("train --path xy", "'xy'"), ("train --data nowhere", "nowhere"), ("train --bogus", "--bogus"),
    ("train --steps 0", "--steps"), ("train --steps x", "--steps"), ("train --lr -1", "--lr"),
    ("train --lr nan", "--lr"), ("train --lr inf", "--lr"), ("train --batch -4", "--batch"),
    ("train --dropout 1.5", "--dropout"), ("train --mults 1,,2", "--mults"),
    ("train --size 18", "multiples of 4"), ("train --width 6", "multiple of 4"),
    ("train --device cuda", "cpu"), ("train --resume", "runs"),
    ("train --resume --out nowhere", "nowhere"), ("train --data empty", "with images"),
    ("train --data broken --size 8", "broken/0.png"), ("train --amp fp8", "fp8"),
    ("train --data flat --size 8 --classes", "class subfolders"),
    ("train --data flat --size 8 --out flat/run", "inside"),
    ("train --out run", "--resume"), ("train --resume --out run", "more --steps"),
    ("train --resume --out run --steps 30 --width 16", "--width cannot change"),
    ("train --overwrite --out run --data nowhere", "nowhere"),
    ("train --overwrite --out run --data flat --size 8 --classes", "class subfolders"),
    ("sample", "runs"), ("sample --ckpt nowhere.pt", "nowhere.pt"), ("sample --steps 0", "--steps"),
    ("sample --n -1", "--n"), ("sample --solver heun", "heun"), ("sample --device cuda", "cpu"),
    ("sample --tolerance 0", "--tolerance"), ("sample --ckpt empty", "empty"),
    ("sample --ckpt classy.pt --label cat", "cat"), ("sample --ckpt classy.pt --label 10", "10"),
    ("sample --ckpt classy.pt --guidance -1", "--guidance"),
    ("sample --ckpt tiny.pt --label 0", "--classes"),
    ("sample --ckpt tiny.pt --guidance 2 --out images --overwrite", "--classes"),
    ("sample --ckpt undropped.pt --guidance 2", "--label-drop"),
    ("fid --ckpt undropped.pt --guidance 2 --features pixels", "--label-drop"),
    ("nll --ckpt undropped.pt", "--label-drop"), ("nll --ckpt tiny.pt --reference colour", "3 ch"),
    ("paths --data moons", "moons"), ("paths --seed -1", "--seed"),
    ("fid --ckpt tiny.pt --inception other.pth", "another SHA-256"),
    ("fid --ckpt tiny.pt --inception nowhere.pth", "nowhere.pth"),
    ("fid --ckpt tiny.pt --inception pickle.pth", "another SHA-256"),
    ("fid --ckpt tiny.pt", "--inception FILE"), ("fid --n 0", "--n"), ("fid --steps 5,0", "--steps"),
    ("fid --ckpt tiny.pt --features pixels --n 1", "two images"),
    ("fid --ckpt tiny.pt --features pixels --inception other.pth", "--inception"),
    ("fid --ckpt tiny.pt --features pixels --reference nowhere", "nowhere"),
    ("fid --ckpt tiny.pt --features pixels --reference test", "no test split"),
    ("fid --ckpt tiny.pt --features pixels --reference one", "at least two"),
    ("fid --ckpt tiny.pt --features pixels --reference colour", "3 channels"),
    ("fid --ckpt tiny.pt --features pixels --guidance 2", "--classes"),
    ("fid --steps none", "--steps"),
    ("fid --ckpt tiny.pt --features pixels --solver dopri5 --steps 5", "dopri5 chooses"),
    *((f"sample --ckpt {name}.pt", f"{name}.pt") for name in (
        "empty", "truncated", "text", "pickle", "foreign", "list", "shapes", "config", "lr",
        "damaged", "nan", "stepless")),
    *((f"train --data {name}", "--data digits") for name in ("mnist", "fashion-mnist", "cifar10")),
])
def test_bad_input_gets_one_line_and_changes_nothing(command, says, bad, monkeypatch):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.chdir(bad)
    monkeypatch.setenv("TORCH_HOME", str(bad))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    before = {f: f.stat().st_mtime_ns for f in bad.rglob("*") if f.is_file()}
    assert says in refuse(command, *([] if "cuda" in command else ["--device", "cpu"])
                          if not command.startswith("paths") else [])
    after = {f: f.stat().st_mtime_ns for f in bad.rglob("*") if f.is_file()}
    kept = {f for f in {*after} - {*before} if f.suffix == ".npy" or f.stat().st_size == 0}
    assert {f: after[f] for f in {*after} - kept} == before  # nothing but decoded data is new
    assert not (bad / "payload-ran").exists() and not (bad / "runs").exists()


@pytest.mark.parametrize("problem, says", [
    (ValueError("a\nb"), "a b"), (OSError("disk"), "disk"), (FloatingPointError("nan"), "nan"),
    (MemoryError(), "--batch"), (torch.OutOfMemoryError("CUDA"), "--batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--batch"),
    (RuntimeError("shapes cannot be multiplied"), None), (TypeError("an argument"), None)])
def test_what_a_user_can_cause_is_one_line_and_a_fault_of_the_code_keeps_its_traceback(
        problem, says, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise problem

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fm, "measure_paths", fail)
    if says:
        assert says in refuse("paths")
    else:
        with pytest.raises(type(problem), match=str(problem)):
            run("paths")


@pytest.mark.parametrize("command", list(fm.COMMANDS))
def test_help_names_every_flag_with_its_default_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        fm.main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"flow_matching.py {command}" in text.split("examples:")[1]
    entries = dict(re.findall(r"^  --([\w-]+)(.*?)(?=^  --|\Z)", text, re.M | re.S))
    missing = [flag for flag in fm.COMMANDS[command][1]
               if "default" not in entries.get(flag.replace("_", "-"), "")]
    assert not missing


def test_the_script_metadata_names_what_is_imported():
    source = SCRIPT.read_text(encoding="utf-8")
    metadata = source[: source.index('"""')]
    imported = {(n.names[0].name if isinstance(n, ast.Import) else n.module).split(".")[0]
                for n in ast.parse(source).body if isinstance(n, (ast.Import, ast.ImportFrom))}
    third_party = {m for m in imported if m not in sys.stdlib_module_names} - {"PIL"}
    assert set(re.findall(r'"([a-z]+)>=[^"]+"', metadata)) == third_party
