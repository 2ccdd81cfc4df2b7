"""What flow_matching.py claims, each claim tested from another side than the code computes it."""

import ast
import functools
import hashlib
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
from PIL import Image
from torch import nn

import flow_matching as fm

SCRIPT = Path(fm.__file__)
ALL_PATHS = pytest.mark.parametrize("name", list(fm.PATHS))
torch.set_num_threads(2)


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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
    inner, outer = nn.Linear(2, 16).double(), nn.Linear(16, 1).double()
    v = lambda x, t: outer(inner(torch.cat([x, t[:, None]], 1)).sin())  # entire: fast quadrature
    parameters = [*inner.parameters(), *outer.parameters()]
    means, tau = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64), 0.0
    times = torch.tensor([0.1, 0.4, 0.7], dtype=torch.float64)
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(80))
    grid = torch.linspace(-16, 16, 40_001, dtype=torch.float64)
    for path in fm.PATHS.values():
        if path is fm.ve_path:  # σ from 50: a grid and a scale that resolve it
            path = lambda t: fm.ve_path(t, 0.1, 2.0)
        k, i, j = torch.meshgrid(*map(torch.arange, (3, 3, 80)), indexing="ij")
        k, i, j = k.flatten(), i.flatten(), j.flatten()
        weight = weights[j] / weights.sum() * 80
        cfm = fm.cfm_loss(v, path, means[k], nodes[j, None], times[i], weight)
        x, t = grid.repeat(3)[:, None], times.repeat_interleave(len(grid))
        density = log_density(path, x, t, means, tau).exp()
        error = (v(x, t) - fm.marginal_velocity(path, x, t, means, tau)).square()[:, 0]
        loss = (density * error).sum() * (grid[1] - grid[0]) / 3
        g_cfm, g_fm = (torch.autograd.grad(l, parameters) for l in (cfm, loss))
        for a, b in zip(g_cfm, g_fm):
            assert (a - b).norm() < 1e-6 * b.norm()  # both quadratures converge beyond this
        assert cfm > 1.01 * loss


@ALL_PATHS
def test_theorem_3_is_the_time_derivative_of_psi(name):
    path, h = fm.PATHS[name], 1e-6
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    x_0, x_1 = double(99, 3), double(99, 3, seed=1)
    psi = lambda t: sum(c * x for c, x in zip(fm.coefficients(path, t, x_1), (x_1, x_0)))
    difference = (psi(t + h) - psi(t - h)) / (2 * h)
    u = fm.conditional_velocity(path, psi(t), x_1, t)
    torch.testing.assert_close(u, difference, rtol=1e-6, atol=1e-6)  # central difference: h²


def test_equations_17_19_and_21_are_theorem_3():
    t = torch.linspace(0, 0.999, 100, dtype=torch.float64)[:, None]
    x, x_1 = double(100, 3), double(100, 3, seed=1)
    sigma = lambda s: 0.01 * 5000**s
    eq17 = -(math.log(5000) * sigma(1 - t)) / sigma(1 - t) * (x - x_1)
    T = lambda s: 0.1 * s + 0.5 * 19.9 * s**2
    eq19 = -(0.1 + 19.9 * (1 - t)) / 2 * (
        (torch.exp(-T(1 - t)) * x - torch.exp(-T(1 - t) / 2) * x_1) / (1 - torch.exp(-T(1 - t))))
    eq21 = (x_1 - (1 - 1e-4) * x) / (1 - (1 - 1e-4) * t)
    for path, expected in ((fm.ve_path, eq17), (fm.vp_path, eq19), (fm.ot_path, eq21)):
        u = fm.conditional_velocity(path, x, x_1, t[:, 0])
        torch.testing.assert_close(u, expected, rtol=1e-9, atol=1e-9)


@ALL_PATHS
def test_each_path_runs_from_its_prior_to_the_data(name):
    path = fm.PATHS[name]
    alpha, sigma = torch.stack(path(torch.tensor([0.0, fm.T_END[name]]).double())[:2]).numpy()
    start = {"ot": (0, 1), "vp": (math.exp(-10.05 / 2), math.sqrt(1 - math.exp(-10.05))),
             "ve": (1, 50)}[name]
    end = {"ot": (1, 1e-4), "vp": (1, 0.0010012), "ve": (1, 0.01)}[name]
    np.testing.assert_allclose((alpha[0], sigma[0]), start, rtol=1e-9)
    np.testing.assert_allclose((alpha[1], sigma[1]), end, rtol=1e-4)
    noise = torch.randn(4, 1, 2, 2)
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
    """rand() draws multiples of 2^-24 in [0, 1): the worst are 0 and 1 - 2^-24."""
    t = torch.tensor([0.0, 2**-24, 1e-5, 0.5, 1 - 1e-5, 1 - 2**-24])
    t = torch.cat([t, t * fm.T_END[name]])
    for mine, exact in zip(fm.PATHS[name](t), fm.PATHS[name](t.double())):
        torch.testing.assert_close(mine.double(), exact, rtol=2e-5, atol=1e-7)
    velocity = fm.Velocity(lambda x, t, y: x, fm.PATHS[name], 0.5)
    assert velocity.weight(t).isfinite().all()
    assert velocity(torch.ones(12, 1, 1, 1), t).isfinite().all()


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
        expected = sum(a * b for a, b in zip(p, u)) / sum(p)
        probe = torch.tensor(x)[None], torch.tensor([t]).double(), torch.tensor(means)
        mine = fm.marginal_velocity(path, *probe, tau)
        np.testing.assert_allclose(mine[0], expected, rtol=1e-9, atol=1e-12)


@ALL_PATHS
def test_the_flow_moves_with_the_marginal_field(name):
    """Central differences in time of the solution phi_t(x_0), Eq. 1."""
    path, means, h = fm.PATHS[name], double(4, 2, seed=3), 1e-4
    v = lambda x, t: fm.marginal_velocity(path, x, t, means, 0.3)
    x_0 = path(torch.zeros(1).double())[1] * double(8, 2)
    phi = lambda t: fm.odeint(v, x_0, 0.0, t, "dopri5", tolerance=1e-11)[0]
    for t in (0.3, 0.7):
        u = v(phi(t), torch.full((8,), t).double())
        torch.testing.assert_close((phi(t + h) - phi(t - h)) / (2 * h), u, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def table():
    return fm.measure_paths(*fm.toy_data("gaussians"), particles=400)


def test_ot_needs_60_percent_of_vp_evaluations(table):
    """The paper's Fig. 7 claim, on the exact field; 8% is the spread over particles' seeds."""
    assert 0.52 < fm.evaluations_ratio(table) < 0.68
    ot, vp = ([r for r in table[name] if r["solver"] == "euler"] for name in ("ot", "vp"))
    assert all(a["mse"] < b["mse"] and a["nfe"] == b["nfe"] for a, b in zip(ot, vp))


def test_particles_land_where_the_data_is(table):
    finest = [r["landed"] for rows in table.values() for r in rows if r["nfe"] == 100]
    # 98.9% of a 2-D Gaussian lie within 3 tau; 400 particles: 0.5% standard error
    assert len(finest) == 9 and all(abs(landed - 0.989) < 0.02 for landed in finest)


def test_evaluations_ratio_of_known_curves():
    rows = lambda c: [dict(solver="euler", nfe=n, mse=(c * n) ** -2.0) for n in (8, 16, 32, 64)]
    assert fm.evaluations_ratio(dict(ot=rows(2), vp=rows(1))) == pytest.approx(0.5)


def test_the_checkerboard_has_half_its_fields_filled():
    means, tau = fm.toy_data("checkerboard")
    fields = {(math.floor(a), math.floor(b)) for a, b in means.tolist()}
    assert len(means) == 128 and len(fields) == 8 and means.abs().max() < 2
    assert {(a + b) % 2 for a, b in fields} == {1}


# ------------------------------------------------------------------------------------------------
# §2  Loss
# ------------------------------------------------------------------------------------------------


def defaults(**more):
    return {k: v[0] for k, v in fm.CONFIG_FLAGS.items()} | more


def test_ot_loss_is_eq_23():
    x_0, x_1, t = double(8, 1, 4, 4), double(8, 1, 4, 4, seed=1), torch.rand(8).double()
    v = lambda x, t: x.sin() + t[:, None, None, None]
    s = t[:, None, None, None]
    psi = (1 - (1 - 1e-4) * s) * x_0 + s * x_1
    expected = ((v(psi, t) - (x_1 - (1 - 1e-4) * x_0)) ** 2).mean()
    torch.testing.assert_close(fm.cfm_loss(v, fm.ot_path, x_1, x_0, t), expected)
    config = defaults(channels=1, data_rms=0.5, names=[])
    velocity = fm.build_velocity(config)
    assert velocity.weight(t) == 1  # training by --path ot is unweighted
    nn.init.normal_(velocity.net.out.weight)
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(velocity(x, t[:2].float()), velocity.net(x, t[:2].float()))


def test_times_are_drawn_in_float32_uniformly_below_t_end():
    seen = []
    v = lambda x, t: seen.append(t) or x
    fm.cfm_loss(v, fm.ot_path, torch.zeros(20_000, 1, dtype=torch.bfloat16), t_end=0.5)
    assert seen[0].dtype == torch.float32 and seen[0].max() < 0.5
    assert abs(seen[0].mean() - 0.25) < 5 * 0.5 / math.sqrt(12 * 20_000)  # five standard errors


@ALL_PATHS
def test_preconditioning_is_the_best_linear_predictor(name):
    """c_skip = E[u x]/E[x²], c_out² = the variance left, c_in² = 1/E[x²], from 1e6 draws."""
    path, s = fm.PATHS[name], 0.7
    velocity = fm.Velocity(None, path, s)
    x_1, x_0 = s * double(10**6), double(10**6, seed=1)
    for t in (0.05, 0.5, 0.95):
        alpha, sigma, d_alpha, d_sigma = path(torch.tensor(t).double())
        x, u = alpha * x_1 + sigma * x_0, d_alpha * x_1 + d_sigma * x_0
        slope = (u * x).mean() / (x * x).mean()
        expected = [(x * x).mean() ** -0.5, slope, (u - slope * x).square().mean() ** 0.5]
        scales = velocity.scales(x[:1], torch.tensor([t]).double())
        torch.testing.assert_close(torch.cat(scales), torch.stack(expected), rtol=5e-3, atol=5e-3)


@ALL_PATHS
def test_weighted_diffusion_losses_have_unit_scale_at_every_time(name):
    """A network that has learned nothing yet (F = 0) has a weighted loss of 1, for any t."""
    velocity = fm.Velocity(lambda x, t, y: 0 * x, fm.PATHS[name], 0.7)
    x_1 = 0.7 * double(100_000, 1)
    for moment in (0.05, 0.5, 0.95):
        t = torch.full((100_000,), moment).double()
        loss = fm.cfm_loss(velocity, fm.PATHS[name], x_1, double(100_000, 1, seed=1), t,
                           velocity.weight(t))
        assert abs(loss - 1) < 0.03  # 5 standard errors of a squared normal


def test_a_network_trained_by_cfm_converges_to_the_exact_marginal_field():
    torch.manual_seed(0)
    means = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    v = lambda x, t: net(torch.cat([x, t[:, None]], 1))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
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
        fm.cfm_loss(v, fm.ot_path, x_1, t_end=0.95).backward()
        optimizer.step()
    # What is left is the small network's own error; a wrong target leaves more than 30%.
    assert errors[0] > 0.5 and errors[2] < errors[1] / 2 and errors[2] < 0.05, errors


def test_ot_coupling_is_the_best_permutation():
    x_0, x_1 = double(6, 1, 2, 2), double(6, 1, 2, 2, seed=1)
    cost = lambda order: (x_0[list(order)] - x_1).square().sum().item()
    best = min(itertools.permutations(range(6)), key=cost)
    assert torch.equal(fm.ot_coupling(x_0, x_1), x_0[list(best)]) and best != tuple(range(6))


def test_ot_coupling_with_labels_keeps_noise_within_its_class():
    x_0, x_1, y = double(30, 3), double(30, 3, seed=1), torch.arange(30) % 3
    coupled = fm.ot_coupling(x_0, x_1 + 10 * y[:, None], y)
    for k in range(3):
        assert torch.equal(coupled[y == k].sort(0)[0], x_0[y == k].sort(0)[0])
        assert torch.equal(coupled[y == k], fm.ot_coupling(x_0[y == k], x_1[y == k]))
    assert not torch.equal(coupled, x_0)


# ------------------------------------------------------------------------------------------------
# §3  ODE solvers, on dx/dt = x cos t, x = x_0 exp(sin t)
# ------------------------------------------------------------------------------------------------

SWING = lambda x, t: x * t.cos()[:, None]
X_0 = double(3, 2)


def swing_error(t_0=0.0, t_1=2.0, **solver):
    x, nfe = fm.odeint(SWING, X_0 * math.exp(math.sin(t_0)), t_0, t_1, **solver)
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
    errors, nfes = zip(*[swing_error(solver="dopri5", tolerance=t) for t in tolerances])
    slope = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert 0.7 < slope < 1.3 and (errors < 30 * tolerances).all()
    assert list(nfes) == sorted(nfes) and nfes[0] < nfes[-1]


def test_nfe_is_the_number_of_calls():
    calls = []
    v = lambda x, t: calls.append(t) or SWING(x, t)
    for solver, stages in (("euler", 1), ("midpoint", 2), ("rk4", 4), ("dopri5", None)):
        calls.clear()
        _, nfe = fm.odeint(v, X_0, solver=solver, steps=7)
        assert nfe == len(calls) == (7 * stages if stages else nfe) > 6
        assert all(t.shape == (3,) and 0 <= t.min() and t.max() <= 1 for t in calls)


@ALL_PATHS
def test_forward_then_backward_returns_to_the_noise(name):
    path, means = fm.PATHS[name], 2 * double(4, 2, seed=3)
    v = lambda x, t: fm.marginal_velocity(path, x, t, means, 0.3)
    x_0 = fm.PATHS[name](torch.zeros(1).double())[1] * double(16, 2)
    x_1, _ = fm.odeint(v, x_0, 0, fm.T_END[name], "dopri5", tolerance=1e-8)
    back, _ = fm.odeint(v, x_1, fm.T_END[name], 0, "dopri5", tolerance=1e-8)
    assert (back - x_0).abs().max() < 1e-4 * x_0.abs().max()
    assert (x_1 - x_0).abs().max() > 0.1


def test_a_solve_that_fails_says_so():
    with pytest.raises(FloatingPointError, match="not finite"):
        fm.odeint(lambda x, t: x / 0, X_0, solver="dopri5")
    with pytest.raises(FloatingPointError, match="not finite"):
        fm.odeint(lambda x, t: x * math.nan, X_0, solver="euler")
    with pytest.raises(RuntimeError, match="dopri5 failed"):  # x' = x² leaves for ever at t = 1
        fm.odeint(lambda x, t: x**2, torch.ones(1, 1).double(), 0, 2, "dopri5")
    with pytest.raises(ValueError, match="steps"):
        fm.odeint(SWING, X_0, steps=0)


# ------------------------------------------------------------------------------------------------
# §4  Sampling
# ------------------------------------------------------------------------------------------------


@ALL_PATHS
def test_the_exact_field_moves_each_prior_onto_the_data(name):
    """Mean, covariance and share of particles within 3 tau, of two Gaussians."""
    path, tau = fm.PATHS[name], 0.1
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    v = lambda x, t: fm.marginal_velocity(path, x, t, means, tau)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    x, _ = fm.sample(v, noise, path, fm.T_END[name], solver="rk4", steps=200)
    distance, nearest = torch.cdist(x, means).min(1)
    assert (distance < 3 * tau).float().mean() > 0.98  # 98.9% of a 2-D Gaussian lie within 3 tau
    assert abs(nearest.float().mean() - 0.5) < 0.04  # 5 standard errors
    spread = (x - means[nearest]).std(0)
    assert (spread - tau).abs().max() < 0.01, spread


@ALL_PATHS
@pytest.mark.parametrize("solver", list(fm.SOLVERS))
def test_a_kept_way_starts_at_the_prior_and_ends_at_the_sample(name, solver):
    path, means = fm.PATHS[name], torch.tensor([[-1.0, 0.0], [1.0, 1.0]])
    v = lambda x, t: fm.marginal_velocity(path, x, t, means, 0.2)
    noise, more = fm.draw_noise(0, range(5), (2,)), dict(solver=solver, steps=9)
    x, nfe = fm.sample(v, noise, path, fm.T_END[name], **more)
    way, nfe_way = fm.sample(v, noise, path, fm.T_END[name], keep=True, **more)
    assert way.shape == (10, 5, 2) and nfe_way == nfe
    torch.testing.assert_close(way[-1], x)
    torch.testing.assert_close(way[0], path(torch.zeros(1))[1] * noise)
    if solver == "dopri5":  # the moments between are on the solution too
        t = 4 * fm.T_END[name] / 9
        middle, _ = fm.sample(v, noise, path, t, solver="dopri5", tolerance=1e-8)
        torch.testing.assert_close(way[4], middle, rtol=2e-3, atol=2e-3)  # scipy interpolates


@ALL_PATHS
def test_invert_recovers_the_noise_of_an_image(name):
    path, t_end = fm.PATHS[name], fm.T_END[name]
    v = lambda x, t: fm.marginal_velocity(path, x, t, torch.eye(2), 0.3)
    noise = fm.draw_noise(0, range(9), (2,)).double()
    x_1, _ = fm.sample(v, noise, path, t_end, solver="dopri5", tolerance=1e-9)
    x_0, nfe = fm.invert(v, x_1, path, t_end, solver="dopri5", tolerance=1e-9)
    torch.testing.assert_close(x_0, noise, rtol=1e-4, atol=1e-4)


@ALL_PATHS
def test_likelihood_of_gaussian_data_is_its_closed_form(name):
    """One Gaussian N(m, τ²): the flow is affine, x_1 = α m + (s_1/s_0)(x_0 − α_0 m), s = std at t.

    So N(0, σ_0²) is pushed to another Gaussian, for vp and ve not quite onto the data's.
    """
    path, t_end, tau = fm.PATHS[name], fm.T_END[name], 0.3
    m = double(1, 1, 2, 2, seed=1)
    v = lambda x, t: fm.marginal_velocity(path, x.flatten(1), t, m.flatten(1), tau).reshape(x.shape)
    ends = path(torch.tensor([0.0, t_end], dtype=torch.float64))
    (a_0, a_1), (s_0, s_1) = ends[0], ((ends[0] * tau) ** 2 + ends[1] ** 2).sqrt()
    law = torch.distributions.Normal(a_1 * m - s_1 / s_0 * a_0 * m, s_1 / s_0 * ends[1][0])
    x_1 = m + tau * double(5, 1, 2, 2)
    log_p, nfe = fm.log_likelihood(v, x_1, path, t_end, solver="dopri5", tolerance=1e-10)
    torch.testing.assert_close(log_p, law.log_prob(x_1).flatten(1).sum(1), rtol=1e-6, atol=1e-6)
    assert log_p.shape == (5,) and nfe > 20


def test_hutchinson_is_unbiased():
    """The mean over all 16 sign vectors is the exact trace, while no two estimates need agree."""
    means, fixed = double(3, 4, seed=2), dict(solver="rk4", steps=10)
    v = lambda x, t: fm.marginal_velocity(fm.ot_path, x, t, means, 0.3)
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
    v = lambda x, t: torch.stack([(x[:, 1] + t).sin(), (2 * x[:, 0]).cos() - x[:, 1] * t], 1)
    axis = torch.linspace(-1, 1, 201, dtype=torch.float64) * (6 * start + 2)
    x = torch.cartesian_prod(axis, axis)
    log_p, _ = fm.log_likelihood(v, x, fm.PATHS[name], solver="rk4", steps=60)
    total = log_p.exp().sum() * (axis[1] - axis[0]) ** 2
    # the cells of ve's grid, 3 wide, see the field's wiggles of that width only on average
    assert total.item() == pytest.approx(1, abs=2e-3 if name == "ve" else 1e-6)


def test_bits_per_dim_of_known_densities():
    """Uniform over [-1, 1]^D: each of 256 levels is as likely: 8 bits.  K draws: a mean inside."""
    D = 12
    torch.testing.assert_close(fm.bits_per_dim(torch.full((3, 1), -D * math.log(2)), D),
                               torch.full((3,), 8.0))
    log_p = double(5, 7)
    by_hand = -(log_p.exp().mean(1) * 128.0**-D).log2() / D
    torch.testing.assert_close(fm.bits_per_dim(log_p, D), by_hand)
    one = torch.stack([fm.bits_per_dim(log_p[:, [k]], D) for k in range(7)])
    assert (fm.bits_per_dim(log_p, D) < one.mean(0)).all()


def test_guidance_is_the_paper_s_line_through_both_fields():
    v = lambda x, t, y: calls.append(y) or x * (1.0 if y is None else y[:, None])
    x, y, calls = double(3, 2), torch.tensor([2.0, 3.0, 4.0]), []
    for scale, expected in ((0, x), (1, x * y[:, None]), (2.5, x + 2.5 * x * (y - 1)[:, None])):
        torch.testing.assert_close(fm.guided(v, y, scale)(x, None), expected)
    assert len(calls) == 5  # scale 1 evaluates once


def test_slerp_stays_on_the_sphere_between_its_ends():
    a, b = double(1, 8, 8), double(1, 8, 8, seed=1)
    b = b * a.norm() / b.norm()
    torch.testing.assert_close(torch.stack([fm.slerp(a, b, 0.0), fm.slerp(a, b, 1.0)]),
                               torch.stack([a, b]))
    angle = lambda p, q: torch.acos((p * q).sum() / (p.norm() * q.norm()))
    for s in (0.25, 0.5, 0.9):
        c = fm.slerp(a, b, s)
        assert c.norm() == pytest.approx(a.norm().item())
        assert angle(a, c) == pytest.approx(s * angle(a, b).item())


def test_noise_depends_on_seed_and_index_alone():
    a = fm.draw_noise(3, range(10), (1, 4, 4))
    assert torch.equal(a[4:7], fm.draw_noise(3, range(4, 7), (1, 4, 4)))
    assert not torch.equal(a, fm.draw_noise(4, range(10), (1, 4, 4)))
    many = fm.draw_noise(0, range(2000), (10,))
    assert abs(many.mean()) < 0.04 and abs(many.std() - 1) < 0.03
    assert (torch.corrcoef(many.T) - torch.eye(10)).abs().max() < 0.12


# ------------------------------------------------------------------------------------------------
# §5  Network
# ------------------------------------------------------------------------------------------------


def test_the_cifar10_net_has_the_usual_parameter_count():
    r = fm.RECIPES["cifar10"]
    with torch.device("meta"):
        net = fm.build_velocity(defaults(**r, channels=3, names=[], data_rms=1.0))
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - 35.7) < 0.3


def active(net):
    """The net with its zero-initialised layers made random, so that every part matters."""
    for p in net.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.1)
    return net.eval()


@pytest.mark.parametrize("options, size", [
    (dict(width=8, mults=(1, 2), blocks=1, attention=()), (8, 12)),
    (dict(width=12, mults=(1, 3, 2), blocks=2, attention=(4,), size=16, classes=3), (16, 8)),
    (dict(width=200, mults=(1,), blocks=1, attention=(5,), size=5, dropout=0.5), (5, 5)),
    (dict(width=8, mults=(1, 2), blocks=1, attention=(4,), size=16, patch=2), (16, 16)),
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


def test_attention_equals_softmax_by_hand():
    torch.manual_seed(0)
    layer = active(fm.Attention(128))
    h = torch.randn(2, 128, 3, 4)
    q, k, v = layer.qkv(layer.norm(h)).flatten(2).reshape(2, 3, 2, 64, 12).unbind(1)
    weights = (torch.einsum("bhci,bhcj->bhij", q, k) / 8).softmax(-1)  # 8 = sqrt(64)
    a = torch.einsum("bhij,bhcj->bhci", weights, v).reshape(2, 128, 3, 4)
    torch.testing.assert_close(layer(h), h + layer.out(a), rtol=1e-4, atol=1e-5)


def test_most_time_frequencies_move_over_the_unit_interval():
    phase = torch.stack([fm.time_embedding(torch.tensor([t]), 128)[0] for t in (0.0, 0.01)])
    assert ((phase[0] - phase[1]).abs() > 1e-3).float().mean() > 0.6  # 27% without the scale
    assert torch.equal(phase[0], torch.cat([torch.ones(64), torch.zeros(64)]))


# ------------------------------------------------------------------------------------------------
# §1-§6: every definition runs when it is pasted alone
# ------------------------------------------------------------------------------------------------

T, X = "torch.rand(2)", "torch.randn(2, 1, 8, 8)"
UNET = "UNet(1, 8, 8, (1, 2), 1, (4,))"
PASTED = {
    "ot_path": f"ot_path({T})", "vp_path": f"vp_path({T})", "ve_path": f"ve_path({T})",
    "coefficients": f"coefficients(lambda t: (t, t, t, t), {T}, {X})",
    "conditional_velocity": f"conditional_velocity(lambda t: (t, t, t, t), {X}, {X}, {T})",
    "marginal_velocity": "marginal_velocity(lambda t: (t, t, t, t), torch.randn(2, 3), "
                         f"{T}, torch.randn(4, 3))",
    "cfm_loss": f"cfm_loss(lambda x, t: x, lambda t: (t, 1 - t, t, t), {X})",
    "euler": "euler(lambda x, t: x, torch.ones(1), 0.0, 0.1)",
    "midpoint": "midpoint(lambda x, t: x, torch.ones(1), 0.0, 0.1)",
    "rk4": "rk4(lambda x, t: x, torch.ones(1), 0.0, 0.1)",
    "odeint": f"[odeint(lambda x, t: x, {X}, solver=s) for s in SOLVERS]",
    "sample": f"sample(lambda x, t: x, {X})",
    "invert": f"invert(lambda x, t: x, {X})", "slerp": f"slerp({X}, {X}, 0.3)",
    "guided": f"guided(lambda x, t, y: x, {T}, 2.0)({X}, {T})",
    "ot_coupling": f"ot_coupling({X}, {X}), ot_coupling({X}, {X}, torch.arange(2))",
    "draw_noise": "draw_noise(0, range(3), (1, 2, 2))", "seed_from": "seed_from(1, 2)",
    "generator": "torch.rand(2, generator=generator(1, 2))",
    "time_embedding": f"time_embedding({T}, 8)",
    "group_norm": "group_norm(8)(torch.randn(2, 8, 4, 4))",
    "zero_": "zero_(nn.Linear(2, 2))", "Attention": "Attention(8)(torch.randn(2, 8, 4, 4))",
    "ResBlock": "ResBlock(8, 12, 4, 0.1, True)(torch.randn(2, 8, 4, 4), torch.randn(2, 4))",
    "UNet": f"{UNET}({X}, {T})",
    "log_likelihood": f"log_likelihood(lambda x, t: x, {X}, probes=[{X}.sign()])",
    "bits_per_dim": "bits_per_dim(torch.randn(2, 3), 10)", "pixels": f"pixels({X})",
    "resize_as_tensorflow_1": f"resize_as_tensorflow_1({X})", "inception": "INCEPTION_SHA256",
    "fit_gaussian": f"fit_gaussian([{X}], lambda x: x.flatten(1))",
    "frechet_distance": "frechet_distance(np.zeros(2), np.eye(2), np.ones(2), np.eye(2))",
}


def test_every_definition_of_the_paper_and_the_network_runs_when_pasted_alone():
    source = SCRIPT.read_text()
    body = ast.parse(source).body
    first, last = (source[: source.index(mark)].count("\n") for mark in ("# §1 ", "# §7 "))
    imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
    used = "math|functools|hashlib|torch|numpy|scipy|pathlib"
    imports = [n for n in imports if re.search(used, ast.unparse(n))]
    named = {n.name if hasattr(n, "name") else ast.unparse(n.targets[0]): n for n in body
             if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Assign))}
    definitions = [k for k, n in named.items() if first < n.lineno < last
                   and not isinstance(n, ast.Assign)]
    assert set(definitions) == set(PASTED)

    def paste(name, done):
        node = named[name]
        doc = "" if isinstance(node, ast.Assign) else ast.get_docstring(node) or ""
        needs = re.search(r"Needs: ([\w, \n]+)\.", doc)
        for need in re.split(r",\s+", needs[1]) if needs else []:
            if not isinstance(named[need], ast.Assign):
                paste(need, done)
        done[name] = ast.get_source_segment(source, node)
        for need in re.split(r",\s+", needs[1]) if needs else []:
            if isinstance(named[need], ast.Assign) and need not in done:  # a table of the others
                done[need] = ast.get_source_segment(source, named[need])

    for name, call in PASTED.items():
        done = {}
        paste(name, done)
        exec("\n\n".join([ast.unparse(n) for n in imports] + list(done.values()) + [call]), {})


# ------------------------------------------------------------------------------------------------
# §6  Fréchet distance
# ------------------------------------------------------------------------------------------------


def spd(D, seed):
    """A random covariance: (D, D) numpy."""
    A = double(D, D, seed=seed).numpy()
    return A @ A.T / D


def test_frechet_distance_of_known_gaussians():
    m, S, d = double(8).numpy(), spd(8, 1), double(8, seed=2).numpy()
    assert fm.frechet_distance(m, S, m, S) == pytest.approx(0, abs=1e-10)
    assert fm.frechet_distance(m, S, m + d, S) == pytest.approx(d @ d)
    Q = np.linalg.qr(double(8, 8, seed=3).numpy())[0]  # commuting: the same axes
    a, b = np.arange(8.0), np.arange(8.0)[::-1] ** 2  # singular, both
    distance = fm.frechet_distance(m, Q * a @ Q.T, m, Q * b @ Q.T)
    assert distance == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-7)
    A, B = spd(2, 4), spd(2, 5)  # not commuting: tr √(AB) = √(tr AB + 2 √det AB) for 2 × 2
    root = math.sqrt(np.trace(A @ B) + 2 * math.sqrt(np.linalg.det(A @ B)))
    expected = np.trace(A) + np.trace(B) - 2 * root
    assert fm.frechet_distance(m[:2], A, m[:2], B) == pytest.approx(expected)


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


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_streamed_statistics_equal_numpy_s(batch):
    """Even where the mean is a million standard deviations from zero."""
    x = double(100, 5) * torch.tensor([1, 2, 3, 4, 5]) + 1e6
    mean, cov = fm.fit_gaussian(x.split(batch), lambda part: part)
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.numpy().T), rtol=1e-9, atol=1e-9)


def test_statistics_of_too_few_or_broken_features_are_refused():
    for x, says in (([], "two images"), ([torch.ones(1, 3)], "two images"),
                    ([torch.ones(4, 3), torch.full((2, 3), math.nan)], "not finite")):
        with pytest.raises(ValueError, match=says):
            fm.fit_gaussian(x, lambda part: part)


def test_resizing_is_tensorflow_1_s():
    """Pixel i comes from i·in/299: ramps stay ramps up to the last pixel; 299 is left alone."""
    ramp = torch.arange(32.0)[:, None] * torch.tensor([2.0]) + 10 * torch.arange(16.0)
    i = torch.arange(299)
    expected = 2 * (i * 32 / 299).clamp(max=31)[:, None] + 10 * (i * 16 / 299).clamp(max=15)
    torch.testing.assert_close(fm.resize_as_tensorflow_1(ramp[None, None])[0, 0], expected,
                               rtol=1e-5, atol=1e-4)
    x = torch.rand(1, 2, 299, 299)
    assert torch.equal(fm.resize_as_tensorflow_1(x), x)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights under the names and shapes of the published file."""
    rng, weights = np.random.default_rng(0), {}
    net = fm.torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
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
# §7  Data
# ------------------------------------------------------------------------------------------------


def test_all_256_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(fm.to_uint8(fm.to_float(levels)), levels)
    assert fm.to_float(levels).aminmax() == (-1, 1)
    assert fm.to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_drawn_digits_can_be_told_apart():
    """A nearest-centroid classifier reads them; two calls draw the same."""
    images, labels, names = fm.draw_digits(1500, 16)
    again = fm.draw_digits(1500, 16)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert images.shape == (1500, 1, 16, 16) and images.dtype == torch.uint8
    x = images.flatten(1).float()
    centroids = torch.stack([x[:1000][labels[:1000] == k].mean(0) for k in range(10)])
    accuracy = (torch.cdist(x[1000:], centroids).argmin(1) == labels[1000:]).float().mean()
    assert 0.7 < accuracy < 1  # readable, and not ten fixed pictures
    assert len(torch.unique(images, dim=0)) > 1490


def write_folder(root, n=24, size=8, classes=2, seed=0):
    """n random grey PNGs in class subfolders."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        file = root / f"class{i % classes}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        smooth = np.add.outer(rng.integers(0, 128, size), rng.integers(0, 128, size))
        Image.fromarray(smooth.astype(np.uint8)).save(file)
    return root


def test_a_folder_of_any_sizes_and_modes_becomes_one_array(tmp_path):
    root, cache = tmp_path / "photos", tmp_path / "cache"
    (root / "b").mkdir(parents=True)
    (root / "a" / "deep").mkdir(parents=True)
    ramp = np.arange(16, dtype=np.uint8)[None, :].repeat(8, 0) * 16  # 8 high, 16 wide
    Image.fromarray(ramp).convert("RGB").save(root / "a" / "0.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(root / "a" / "1.png")  # 16 bits
    Image.fromarray(ramp).convert("P").save(root / "a" / "deep" / "2.gif")
    Image.fromarray(ramp).convert("RGB").convert("CMYK").save(root / "b" / "3.tiff")
    alpha = np.stack([ramp, ramp, ramp, 0 * ramp], 2)
    Image.fromarray(alpha).save(root / "b" / "4.png")  # transparent: white
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    Image.fromarray(np.rot90(ramp)).convert("RGB").save(root / "b" / "5.png", exif=exif)
    (root / "b" / "notes.txt").write_text("not an image")
    images, labels, names = fm.load_folder(root, cache, 8)
    assert images.shape == (6, 3, 8, 8) and images.dtype == torch.uint8
    assert names == ["a", "b"] and labels.tolist() == [0, 0, 0, 1, 1, 1]
    centre = torch.from_numpy(ramp[:, 4:12]).int()
    for i in (0, 1, 2, 3, 5):
        assert (images[i].int() - centre).abs().max() <= 1, i
    assert (images[4] == 255).all()

    before = {f: f.stat().st_mtime_ns for f in cache.iterdir()}
    again = fm.load_folder(root, cache, 8)[0]
    assert {f: f.stat().st_mtime_ns for f in cache.iterdir()} == before and len(before) == 1
    assert torch.equal(again, images)
    Image.fromarray(255 - ramp).convert("RGB").save(root / "a" / "0.png")
    os.utime(root / "a" / "0.png", (1, 1))
    assert not torch.equal(fm.load_folder(root, cache, 8)[0], images)  # a changed file is seen


def test_odd_image_files_are_used_or_named_and_refused(tmp_path, monkeypatch):
    """1 × 1 and animated files are images; empty, cut, huge and foreign ones stop with a name."""
    white = Image.new("L", (64, 64), "white")
    (tmp_path / "used").mkdir()
    Image.new("L", (1, 1), "white").save(tmp_path / "used" / "dot.png")
    white.save(tmp_path / "used" / "film.gif", save_all=True,
               append_images=[Image.new("L", (64, 64), "black")])
    assert (fm.load_folder(tmp_path / "used", tmp_path, 8)[0] == 255).all()
    white.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16)  # 64 × 64 is a decompression bomb
    for name, content in (("empty", b""), ("cut", whole[: len(whole) // 2]), ("bomb", whole),
                          ("foreign", b"<html>")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}/x.png does not decode as an image"):
            fm.load_folder(tmp_path / name, tmp_path, 8)
    assert len(list(tmp_path.glob("*.npy"))) == 1 and not list(tmp_path.glob("tmp-*"))


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder, outside = write_folder(tmp_path / "set"), write_folder(tmp_path / "outside")
    (folder / "class0" / "inside.png").symlink_to(folder / "class1" / "001.png")
    assert len(fm.load_folder(folder, tmp_path, 8)[0]) == 25
    (folder / "class0" / "out.png").symlink_to(outside / "class1" / "001.png")
    with pytest.raises(ValueError, match="out.png is a link to outside"):
        fm.load_folder(folder, tmp_path, 8)


def test_a_grey_flat_folder_has_one_channel_and_no_labels(tmp_path):
    for i in range(3):
        Image.new("L", (5, 9), 40 * i).save(tmp_path / f"{i}.png")
    images, labels, names = fm.load_folder(tmp_path, tmp_path / "cache", 4)
    assert images.shape == (3, 1, 4, 4) and names == [] and labels.tolist() == [0, 0, 0]
    assert images[:, 0, 0, 0].tolist() == [0, 40, 80]


def write_mnist(root, kind):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)
    raw = root / kind / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, 5, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, 5) + labels.tobytes())
    return images, labels


def test_torchvision_sets_load_from_files_in_their_own_format(tmp_path, monkeypatch):
    for name, kind in (("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")):
        images, labels = write_mnist(tmp_path, kind)
        mine, y, names = fm.load_data(name, str(tmp_path), 28)
        assert np.array_equal(mine[:, 0], images) and y.tolist() == labels.tolist()
        assert len(names) == 10 and fm.load_data(name, str(tmp_path), 32)[0].shape[2:] == (32, 32)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    for batch in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"):
        (folder / batch).write_bytes(pickle.dumps({"data": rows, "labels": [3, 7]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    import torchvision
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    mine, y, names = fm.load_data("cifar10", str(tmp_path), 32)
    assert mine.shape == (10, 3, 32, 32) and y.tolist() == [3, 7] * 5 and names[3] == "d"
    assert np.array_equal(mine[:2].flatten(1), rows)


# ------------------------------------------------------------------------------------------------
# §8  Training
# ------------------------------------------------------------------------------------------------

TINY = ("--size 8 --width 8 --mults 1,2 --blocks 1 --attention 4 --dropout 0.2 --batch 8 --lr 0.01 "
        "--warmup 3 --ema 0.9 --flip --steps 24 --log-every 3 --save-every 6 --optimizer muon "
        "--time logit-normal --device cpu").split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of images, the flags of a tiny run on it, and the run finished without a break."""
    root = tmp_path_factory.mktemp("tiny")
    flags = ["train", "--data", str(write_folder(root / "set")), "--data-dir", str(root / "cache")]
    fm.main(flags + TINY + ["--out", str(root / "whole")])
    return root, flags + TINY


def load(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def same(a, b):
    return all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])


def start(arguments, ranks=1):
    python = [sys.executable]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1" if ranks > 1 else "2"}
    return subprocess.Popen(python + [str(SCRIPT)] + arguments, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def kill_after(process, file, step):
    """SIGKILL the process and its ranks once its log has reached a step."""
    for _ in range(1200):
        if file.exists() and f'"step": {step}' in file.read_text():
            break
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_resumes_to_bit_identical_weights(tiny, tmp_path, ranks):
    root, flags = tiny
    flags = flags + ["--steps", "60", "--save-every", "15"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(flags + ["--out", str(whole)], ranks)
    assert process.wait() == 0, process.stdout.read()
    kill_after(start(flags + ["--out", str(killed)], ranks), killed / "log.jsonl", 18)
    assert load(killed)["step"] < 60
    process = start(flags + ["--out", str(killed), "--resume"], ranks)
    assert process.wait() == 0, process.stdout.read()
    assert same(load(whole), load(killed))
    losses = [[(line["step"], line["loss"]) for line in log(run)] for run in (whole, killed)]
    assert losses[0] == losses[1] and len(losses[0]) == 20
    assert sorted(f.name for f in whole.iterdir()) == sorted(f.name for f in killed.iterdir())


def test_a_run_moved_from_two_ranks_to_one_follows_the_same_losses_to_rounding(tiny, tmp_path):
    root, flags = tiny
    flags = flags + ["--steps", "36", "--save-every", "12"]
    flags += ["--dropout", "0"]  # its masks differ between ranks
    one, moved = tmp_path / "one", tmp_path / "moved"
    fm.main(flags + ["--out", str(one)])
    kill_after(start(flags + ["--out", str(moved)], ranks=2), moved / "log.jsonl", 15)
    fm.main(flags + ["--out", str(moved), "--resume"])
    losses = [[line["loss"] for line in log(run)] for run in (one, moved)]
    assert len(losses[0]) == 12
    # float32 sums in another order differ by 1e-7; 36 steps at a high rate amplify that.
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_ranks_stop_when_torchrun_is_killed(tiny, tmp_path):
    """They are not its process group: left alone they would go on beside a resumed run."""
    file = tmp_path / "log.jsonl"
    flags = ["--steps", "100000", "--decay", "none", "--save-every", "100000"]
    process = start(tiny[1] + flags + ["--out", str(tmp_path)], ranks=2)
    kill_after(process, file, 9)
    time.sleep(5)  # a step takes some 20 ms
    before = file.read_text()
    time.sleep(2)
    assert file.read_text() == before
    process.stdout.close()  # not earlier: a broken pipe would stop them too


def test_training_lowers_the_loss_and_leaves_pictures(tiny):
    root, _ = tiny
    run = root / "whole"
    losses = [line["loss"] for line in log(run)]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    assert sorted(f.name for f in run.iterdir()) == [
        "checkpoint.pt", "log.jsonl", *(f"step-{n:06d}.png" for n in (6, 12, 18, 24))]
    with Image.open(run / "step-000024.png") as picture:
        assert picture.width == picture.height >= 512


def orthogonal_by_svd(G):
    """What fm.orthogonal does, from another side: the polynomial on the singular values alone."""
    U, s, V = torch.linalg.svd(G.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s) @ V, s


@pytest.mark.parametrize("shape", [(16, 144), (40, 24), (16, 16)])
def test_the_orthogonal_part_of_a_matrix(shape):
    """The singular vectors stay; values above 2% of the norm end in 0.68..1.21, as a scan shows."""
    U, _, V = torch.linalg.svd(double(*shape), full_matrices=False)
    for low in (1.0, 0.1):  # down to 0.1/√16 = 2.5% of the norm
        G = 7 * (U * torch.linspace(low, 1, min(shape), dtype=torch.double)) @ V
        expected, s = orthogonal_by_svd(G)
        torch.testing.assert_close(fm.orthogonal(G), expected, rtol=1e-9, atol=1e-9)
        assert 0.68 < s.min() and s.max() < 1.21
    assert fm.orthogonal(torch.zeros(shape)).count_nonzero() == 0  # and not NaN


def test_one_step_is_the_gradient_step_of_eq_14(tiny, tmp_path):
    """One step of train() against one written out by hand with a plain AdamW."""
    root, flags = tiny
    fm.main(flags + ["--steps", "1", "--clip", "0.5", "--dropout", "0", "--optimizer", "adamw",
                     "--out", str(tmp_path)])
    checkpoint = load(tmp_path)
    config = checkpoint["config"]
    images, labels, _ = fm.load_data(config["data"], config["data_dir"], 8)
    torch.manual_seed(config["seed"])
    velocity = fm.build_velocity(config)
    first = {k: p.clone() for k, p in velocity.named_parameters()}
    x_1, _, x_0, t = fm.draw_batch(images, labels, config, 1, torch.device("cpu"))
    t_ = t[:, None, None, None]
    error = velocity((1 - (1 - 1e-4) * t_) * x_0 + t_ * x_1, t) - (x_1 - (1 - 1e-4) * x_0)
    (error**2).mean().backward()
    torch.nn.utils.clip_grad_norm_(velocity.parameters(), 0.5)
    torch.optim.AdamW(velocity.parameters(), lr=0.01 / 3, weight_decay=0).step()  # warm-up: 1/3
    for k, p in velocity.named_parameters():
        torch.testing.assert_close(checkpoint["model"][k], p.detach(), rtol=1e-4, atol=1e-6)
        d = 2 / 11  # (1 + n)/(10 + n) at n = 1
        expected = d * first[k] + (1 - d) * checkpoint["model"][k]
        torch.testing.assert_close(checkpoint["ema"][k], expected, rtol=1e-5, atol=1e-7)


def test_muon_makes_hidden_kernels_alone_orthogonal(tiny):
    checkpoint = load(tiny[0] / "whole")
    velocity = fm.build_velocity(checkpoint["config"])
    state = checkpoint["optimizer"]["state"]
    turned = {k for i, (k, _) in enumerate(velocity.named_parameters())
              if "exp_avg_sq" not in state[i]}
    assert turned == {k for k, p in velocity.named_parameters() if p.dim() == 4
                      and k not in ("net.stem.weight", "net.out.weight") and p.shape[0] >= 16
                      and p.shape[1] >= 16}
    assert len(turned) > 9


def test_muon_s_momentum_and_its_size():
    """Two steps: momentum 0.9 and Nesterov's look ahead by hand; the step's RMS is near 0.2 lr."""
    W, b = nn.Parameter(double(32, 16, 3, 3)), nn.Parameter(double(32))
    optimizer, m = fm.Muon([W, b], lr=0.01), torch.zeros_like(W)
    for g in double(2, 32, 16, 3, 3, seed=1):
        before = W.detach().clone()
        W.grad, b.grad = g.clone(), None
        optimizer.step()
        m = 0.9 * m + 0.1 * g
        step = orthogonal_by_svd((0.9 * m + 0.1 * g).flatten(1))[0].view_as(W) * 0.2 * 144**0.5
        torch.testing.assert_close(before - W.detach(), 0.01 * step, rtol=1e-7, atol=1e-10)
        assert step.square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_the_density_of_the_times():
    """Kolmogorov-Smirnov, and both stay below T_END, where vp's σ' is still finite."""
    images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4)
    for time_, cdf in (("uniform", scipy.stats.uniform.cdf),
                       ("logit-normal", lambda t: scipy.stats.norm.cdf(scipy.special.logit(t)))):
        config = defaults(path="vp", time=time_, batch=20_000, names=[])
        t = fm.draw_batch(images, labels, config, 1, torch.device("cpu"))[3]
        assert t.min() >= 0 and t.max() <= fm.T_END["vp"]
        assert scipy.stats.kstest(t.double().numpy(), cdf).pvalue > 1e-3  # one fixed draw


def test_learning_rate_warms_up_and_falls_to_zero():
    config = defaults(lr=2.0, warmup=10, steps=100)
    rates = [fm.learning_rate(config, step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) < 2 and rates[-1] == pytest.approx(0.02)
    assert rates[49] == pytest.approx(2 * 0.51)
    assert fm.learning_rate(config | dict(decay="none"), 90) == 2


def test_ema_is_the_weighted_mean_of_the_weights_it_saw():
    model, ema = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    values, expected = [3.0, -1.0, 5.0, 2.0], ema.weight.item()
    for n, value in enumerate(values, 1):
        nn.init.constant_(model.weight, value)
        fm.update_ema(ema, model, n, decay=0.25)
        d = min(0.25, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
        assert ema.weight.item() == pytest.approx(expected, rel=1e-6)


def test_a_batch_is_a_function_of_seed_and_step_whatever_the_ranks():
    images = torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1).expand(50, 1, 4, 4)
    config = defaults(seed=3, batch=6, flip=True, path="vp", names=list("ab"), label_drop=0.0)
    for coupling in ("independent", "ot"):
        config["coupling"] = coupling
        draw = lambda step, *ranks: fm.draw_batch(
            images, torch.arange(50), config, step, torch.device("cpu"), *ranks)
        whole, halves = draw(5), [draw(5, rank, 2) for rank in (0, 1)]
        for a, b, c in zip(whole, *halves):
            assert torch.equal(a, torch.cat([b, c]))
        assert not torch.equal(whole[2], draw(6)[2])
        assert torch.equal(fm.to_uint8(whole[0])[:, 0, 0, 0].long(), whole[1])  # label and image
        assert (draw(5)[3] < fm.T_END["vp"]).all()


def test_labels_are_dropped_sample_by_sample():
    images, labels = torch.zeros(50, 1, 4, 4, dtype=torch.uint8), torch.arange(50) % 2
    config = defaults(seed=3, batch=2000, names=list("ab"), label_drop=0.2)
    _, y, _, _ = fm.draw_batch(images, labels, config, 1, torch.device("cpu"))
    shares = torch.bincount(y, minlength=3) / 2000
    assert (shares - torch.tensor([0.4, 0.4, 0.2])).abs().max() < 0.05  # 4 standard errors


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA"))])
def test_amp_trains_with_float32_weights(tiny, tmp_path, amp, device):
    root, flags = tiny
    fm.main(flags + ["--amp", amp, "--device", device, "--no-compile", "--out", str(tmp_path)])
    checkpoint, losses = load(tmp_path), [line["loss"] for line in log(tmp_path)]
    float32_losses = [line["loss"] for line in log(root / "whole")]
    assert losses[-1] < 0.9 * losses[0] and abs(losses[0] / float32_losses[0] - 1) < 0.1
    assert losses != float32_losses  # matrix work was done in amp
    assert {p.dtype for k in ("model", "ema") for p in checkpoint[k].values()} == {torch.float32}
    assert bool(checkpoint["scaler"]) == (amp == "fp16")


def test_fp16_gradients_are_clipped_at_their_true_norm(tiny, tmp_path, monkeypatch):
    """The norm that is clipped is float32's to fp16 rounding, not 65536 times it."""
    norms, clip = [], nn.utils.clip_grad_norm_
    watch = lambda *args: norms.append(clip(*args)) or norms[-1]
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watch)
    for amp in ("off", "fp16"):
        flags = tiny[1] + ["--steps", "1", "--amp", amp, "--out", str(tmp_path / amp)]
        fm.main(flags + ["--clip", "1000"])
    assert norms[1] == pytest.approx(norms[0].item(), rel=0.02) and norms[0] != norms[1]


def test_an_fp16_overflow_is_skipped_and_training_goes_on(tiny, tmp_path, monkeypatch):
    root, flags = tiny
    calls, original = [], fm.cfm_loss
    monkeypatch.setattr(fm, "cfm_loss", lambda *args: (
        calls.append(1) or original(*args) * (math.inf if len(calls) == 5 else 1)))
    fm.main(flags + ["--amp", "fp16", "--out", str(tmp_path)])
    checkpoint = load(tmp_path)
    assert all(p.isfinite().all() for p in checkpoint["ema"].values())
    assert checkpoint["scaler"]["scale"] < 65536  # the initial scale, halved once or more


def test_a_non_finite_gradient_names_the_step_and_keeps_the_checkpoint(
        tiny, tmp_path, monkeypatch, capsys):
    root, flags = tiny
    calls, original = [], fm.cfm_loss
    monkeypatch.setattr(fm, "cfm_loss", lambda *args: (
        calls.append(1) or original(*args) * (math.nan if len(calls) == 8 else 1)))
    assert "step 8 is not finite" in refuse(flags + ["--out", str(tmp_path)], capsys)
    assert load(tmp_path)["step"] == 6
    assert all(p.isfinite().all() for p in load(tmp_path)["ema"].values())


def test_weights_gone_bad_under_finite_gradients_are_not_saved(tiny, tmp_path, monkeypatch, capsys):
    original = fm.update_ema
    monkeypatch.setattr(fm, "update_ema", lambda ema, model, step, decay: original(
        ema, model, step, math.nan if step == 11 else decay))
    assert "not finite" in refuse(tiny[1] + ["--out", str(tmp_path)], capsys)
    assert load(tmp_path)["step"] == 6
    assert all(p.isfinite().all() for p in load(tmp_path)["ema"].values())


def test_a_write_that_fails_leaves_the_old_file_and_no_debris(tmp_path):
    file = tmp_path / "checkpoint.pt"
    fm.write_atomically(file, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        fm.write_atomically(file, fail)
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"] and file.read_text() == "old"


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tiny, tmp_path, capsys):
    """A limit on the size of files stands in for it: the second checkpoint does not fit."""
    resource = pytest.importorskip("resource")
    run = tmp_path / "run"
    shutil.copytree(tiny[0] / "whole", run)
    before = (run / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        error = refuse(["train", "--resume", "--steps", "30", "--out", str(run)], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "disk full" in error and "checkpoint.pt" in error
    assert (run / "checkpoint.pt").read_bytes() == before and not list(run.glob("tmp-*"))


def test_debris_of_a_killed_write_is_swept_up_later(tmp_path):
    """Not at once: another process, on another machine perhaps, may be writing it."""
    old, new, other = (tmp_path / f"tmp-{i}.pt" for i in ("1-a", "2-a", "3-b"))
    for file in (old, new, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (time.time() - 7200,) * 2)
    fm.write_atomically(tmp_path / "a.pt", lambda temporary: temporary.write_text("whole"))
    assert not old.exists() and new.exists() and other.exists()
    assert (tmp_path / "a.pt").read_text() == "whole"


def test_out_of_memory_names_the_flags_to_lower(tmp_path, capsys):
    """A batch of 8 million images of 32 x 32 wants 34 GB for the noise alone."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (30 * 2**30, limits[1]))
    try:
        flags = "--batch 8388608 --size 32 --width 8 --steps 1 --device cpu".split()
        error = refuse(["train", "--data", str(write_folder(tmp_path / "set")), *flags,
                        "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert "out of memory: lower --batch" in error


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(tiny, tmp_path):
    root, flags = tiny
    flags = flags + ["--steps", "100000", "--save-every", "100000"]
    process = start(flags + ["--out", str(tmp_path)])
    while not ((tmp_path / "log.jsonl").exists() and (tmp_path / "log.jsonl").read_text()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert f"--resume --out {tmp_path}" in output and load(tmp_path)["step"] > 0


# ------------------------------------------------------------------------------------------------
# §10  Command line
# ------------------------------------------------------------------------------------------------


def refuse(arguments, capsys):
    """Run a command that must be refused: status 2, one line on stderr, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fm.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.endswith("\n"), error
    assert error.startswith(f"flow_matching.py {arguments[0]}: error: "), error
    return error


def test_sample_is_the_same_for_any_batch_size_and_solver_counts(tiny, tmp_path, capsys):
    root, _ = tiny
    base = ["sample", "--ckpt", str(root / "whole" / "checkpoint.pt"), "--n", "7", "--seed", "5"]
    for out, batch in (("a", "7"), ("b", "2")):
        fm.main(base + ["--batch", batch, "--steps", "3", "--out", str(tmp_path / out)])
    assert "NFE 6," in capsys.readouterr().out
    read = lambda out, i: np.asarray(Image.open(tmp_path / out / f"{i:06d}.png")).astype(int)
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [f"{i:06d}.png" for i in range(7)]
    images = [(read("a", i), read("b", i)) for i in range(7)]
    assert all(np.abs(a - b).max() <= 1 for a, b in images)
    assert np.abs(images[0][0] - images[1][0]).max() > 1
    for solver in fm.SOLVERS:
        out = tmp_path / f"{solver}.png"
        fm.main(base + ["--solver", solver, "--steps", "2", "--out", str(out)])
        with Image.open(out) as picture:
            assert picture.size[0] == picture.size[1] > 500


def test_interpolation_ends_equal_the_plain_samples(tiny, tmp_path):
    base = ["sample", "--ckpt", str(tiny[0] / "whole" / "checkpoint.pt"), "--steps", "3"]
    fm.main(base + ["--n", "4", "--out", str(tmp_path / "plain")])
    fm.main(base + ["--n", "10", "--interpolate", "5", "--out", str(tmp_path / "between")])
    read = lambda out, i: np.asarray(Image.open(tmp_path / out / f"{i:06d}.png")).astype(int)
    for plain, between in ((0, 0), (1, 4), (2, 5), (3, 9)):
        assert np.abs(read("plain", plain) - read("between", between)).max() <= 1
    assert np.abs(read("plain", 0) - read("between", 2)).max() > 1


def test_films_and_trajectories_end_at_the_samples(tiny, tmp_path):
    checkpoint = str(tiny[0] / "whole" / "checkpoint.pt")
    base = ["sample", "--ckpt", checkpoint, "--n", "4", "--steps", "5"]
    for out in (["grid.png"], ["film.gif"], ["way.png", "--trajectory"]):
        fm.main(base + ["--out", str(tmp_path / out[0]), *out[1:]])
    grid = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames >= 6
    film.seek(film.n_frames - 1)
    assert np.abs(np.asarray(film.convert("RGB")).astype(int) - grid).max() <= 2
    way = Image.open(tmp_path / "way.png")
    assert way.width / way.height == pytest.approx(6 / 4, rel=0.05)  # 4 rows of 6 moments


@pytest.fixture(scope="module")
def classy(tiny, tmp_path_factory):
    """A tiny model trained with classes, coupled by optimal transport within them."""
    out = tmp_path_factory.mktemp("classy")
    fm.main(tiny[1] + ["--classes", "--coupling", "ot", "--steps", "60", "--save-every", "60",
                       "--out", str(out)])
    return out


def test_classes_and_guidance_change_the_images(classy, tmp_path):
    assert load(classy)["config"]["names"] == ["class0", "class1"]
    base = ["sample", "--ckpt", str(classy / "checkpoint.pt"), "--steps", "2"]
    images = {}
    for out, more in {"0": ["--label", "0"], "class0": ["--label", "class0"], "1": ["--label", "1"],
                      "guided": ["--label", "1", "--guidance", "3"], "both": []}.items():
        fm.main(base + ["--n", "4", "--out", str(tmp_path / out)] + more)
        images[out] = np.stack([np.asarray(Image.open(f)).astype(int)
                                for f in sorted((tmp_path / out).iterdir())])
    assert np.array_equal(images["0"], images["class0"])
    assert np.abs(images["0"] - images["1"]).max() > 2
    assert np.abs(images["guided"] - images["1"]).max() > 2
    # without a label: a row for each class, here two images of the first, then two of the second
    assert np.abs(images["both"] - np.concatenate([images["0"][:2], images["1"][2:]])).max() <= 1
    fm.main(base + ["--out", str(tmp_path / "rows.png")])
    with Image.open(tmp_path / "rows.png") as rows:
        assert rows.width / rows.height == pytest.approx(8 / 2, rel=0.05)


@pytest.mark.parametrize("more, says", [
    ("--label 2", "class0, class1"), ("--label cat", "class0, class1"),
    ("--guidance -1", "--guidance"), ("--interpolate 1", "--interpolate"),
    ("--trajectory --out x.gif", "--trajectory"), ("--out x.jpg", "NAME.png"),
])
def test_bad_controls_get_one_line(classy, more, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--ckpt", str(classy / "checkpoint.pt")] + more.split()
    assert says in refuse(command, capsys)
    assert not list(tmp_path.iterdir())


def test_classes_that_are_not_there_are_refused(tiny, tmp_path, capsys):
    root, flags = tiny
    base = ["sample", "--ckpt", str(root / "whole" / "checkpoint.pt")]
    assert "--classes" in refuse(base + ["--label", "0"], capsys)
    assert "--classes" in refuse(base + ["--guidance", "2"], capsys)
    Image.new("L", (8, 8)).save(tmp_path / "flat.png")
    flags = ["train", "--data", str(tmp_path), "--data-dir", str(tmp_path / "cache"), "--classes"]
    assert "class subfolders" in refuse(flags + TINY + ["--out", str(tmp_path / "run")], capsys)


def test_without_a_class_only_a_model_that_learnt_that_is_asked(tiny, tmp_path, capsys):
    out, ckpt = str(tmp_path / "run"), ["--ckpt", str(tmp_path / "run" / "checkpoint.pt")]
    fm.main(tiny[1] + ["--classes", "--label-drop", "0", "--steps", "1", "--out", out])
    assert "--label-drop" in refuse(["sample", "--guidance", "2"] + ckpt, capsys)
    assert "--label-drop" in refuse(["fid", "--guidance", "2"] + ckpt, capsys)
    assert "--label-drop" in refuse(["nll"] + ckpt, capsys)
    fm.main(["sample", "--steps", "1"] + ckpt)


def test_dopri5_is_solved_in_float32_unless_told_otherwise(tiny, tmp_path, monkeypatch, capsys):
    """bf16 rounds by 4e-3, which the error control at 1e-5 would chase with ever smaller steps."""
    monkeypatch.setattr(fm, "pick_amp", lambda device: "bf16")
    base = ["sample", "--ckpt", str(tiny[0] / "whole" / "checkpoint.pt"), "--n", "1"]
    for more, amp in ((["--solver", "euler"], "bf16"), (["--solver", "dopri5"], "off"),
                      (["--solver", "dopri5", "--amp", "bf16", "--tolerance", "1"], "bf16")):
        fm.main(base + more + ["--out", str(tmp_path / "x.png"), "--overwrite"])
        assert f"amp {amp}," in capsys.readouterr().out


def rows(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_fid_of_a_checkpoint_is_fid_of_the_images_that_sample_writes(tiny, tmp_path, capsys):
    root, _ = tiny
    model = ["--ckpt", str(root / "whole" / "checkpoint.pt"), "--n", "9", "--seed", "3"]
    file, made = str(tmp_path / "results.jsonl"), str(tmp_path / "made")
    fid = ["fid", "--features", "pixels", "--results", file, "--data-dir", str(tmp_path)]
    fm.main(fid + model + ["--steps", "2,3", "--solver", "euler", "--batch", "4"])
    fm.main(["sample", *model, "--steps", "3", "--solver", "euler", "--out", made])
    fm.main(fid + ["--images", made, "--reference", str(root / "set")])
    fm.main(fid + ["--images", str(root / "set"), "--reference", str(root / "set")])
    two, three, again, itself = rows(file)
    name = "frechet_distance"
    assert (two["nfe"], three["nfe"], three["n"], three["n_reference"]) == (2, 3, 9, 24)
    assert three[name] != pytest.approx(two[name], rel=1e-3)
    assert again[name] == pytest.approx(three[name], rel=1e-3)  # a level may round the other way
    assert itself[name] == pytest.approx(0, abs=1e-5)
    said = capsys.readouterr().out
    assert "FID" not in said and "not comparable" in said and "covariance is singular" in said


def test_fid_with_inception_says_what_it_compared(tiny, trusted, tmp_path, capsys):
    folder, file = str(tiny[0] / "set"), tmp_path / "rows"
    fid = ["fid", "--images", folder, "--reference", folder, "--data-dir", str(tmp_path)]
    fm.main(fid + ["--inception", str(trusted), "--results", str(file)])
    assert rows(file)[0]["frechet_distance"] == pytest.approx(0, abs=1e-3)
    said = capsys.readouterr().out
    assert "FID 0.000" in said or "FID -0.000" in said
    assert "24 images" in said and "not comparable" in said and "singular" in said


def test_reference_statistics_are_kept_until_anything_changes(tmp_path, capsys):
    images = torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8)
    calls = []
    features = lambda part: calls.append(len(part)) or fm.pixels(part)
    first = fm.fit_reference(images, features, "a", 8, tmp_path)
    again = fm.fit_reference(images, features, "a", 8, tmp_path)
    assert sum(calls) == 20 and all(np.array_equal(a, b) for a, b in zip(first, again))
    np.testing.assert_allclose(first[1], np.cov(fm.pixels(images).T), rtol=1e-6, atol=1e-9)
    fm.fit_reference(images, features, "b", 8, tmp_path)
    images[3, 0, 2, 1] += 1
    fm.fit_reference(images, features, "a", 8, tmp_path)
    assert sum(calls) == 60


def test_nll_of_a_model_that_stands_still_is_its_prior_s(tiny, tmp_path):
    """With v = 0, p_1 = N(0, 1): bits/dim = 7 + E[x²]/(2 ln 2) + ½ log2 2π, by hand.

    E over u of x = (k + u)/128 − 1 is exact; the draws of 24 × 64 u leave less than 1e-4.
    """
    root, _ = tiny
    checkpoint = load(root / "whole")
    ema = {k: 0 * p if k.startswith("net.out.") else p for k, p in checkpoint["ema"].items()}
    torch.save(checkpoint | {"ema": ema}, tmp_path / "still.pt")
    nll = ["nll", "--ckpt", str(tmp_path / "still.pt"), "--solver", "rk4", "--steps", "2", "--n",
           "999", "--reference", str(root / "set"), "--data-dir", str(tmp_path)]
    fm.main(nll)
    fm.main(nll + ["--exact", "--batch", "5"])
    k = fm.load_folder(root / "set", tmp_path, 8)[0].double()
    second_moment = ((k + 0.5) / 128 - 1).square().mean() + 1 / (12 * 128**2)
    expected = 7 + second_moment / (2 * math.log(2)) + 0.5 * math.log2(2 * math.pi)
    for row in rows(tmp_path / "results.jsonl"):
        assert row["bits_per_dim"] == pytest.approx(expected.item(), abs=2e-4)
        assert row["n"] == 24 and row["nfe"] == 8
        each = (((k + 0.5) / 128 - 1).square().flatten(1).mean(1)) / (2 * math.log(2))
        assert row["standard_error"] == pytest.approx((each.std() / 24**0.5).item(), rel=1e-2)


def bits_of(tiny, file, *arguments):
    """Bits per dimension of the tiny model for each of some command lines."""
    for more in arguments:
        fm.main(["nll", "--ckpt", str(tiny[0] / "whole" / "checkpoint.pt"), "--solver", "midpoint",
                 "--steps", "8", "--n", "12", "--results", str(file)] + more.split())
    return [row["bits_per_dim"] for row in rows(file)]


def test_nll_is_the_same_for_any_batch(tiny, tmp_path):
    one, other = bits_of(tiny, tmp_path / "rows", "--k 8", "--k 8 --batch 7")
    assert other == pytest.approx(one, rel=1e-5)


def test_more_draws_tighten_the_bound_of_nll(tiny, tmp_path, monkeypatch):
    """A density so steep that log p varies by 70 nats between draws: 8 of them gain 98 ± 21."""
    monkeypatch.setattr(fm, "log_likelihood", lambda v, x, *_, **__: (
        -2000 * x.flatten(1).square().sum(1), 1))
    one, eight = bits_of(tiny, tmp_path / "rows", "--k 1", "--k 8")
    assert eight < one


def test_the_k_draws_of_an_image_share_their_hutchinson_signs(tiny, tmp_path, monkeypatch):
    """Else the logarithm of the mean takes the estimate's own noise for probability.

    On trained digits at K = 5: exact 1.487 bits/dim, signs shared 1.480 ± 0.013, own 1.398 ± 0.006.
    """
    seen = []

    def watch(v, x, path, t_end, probes, **solver):
        seen.append((x, probes[0]))
        return torch.zeros(len(x)), 1

    monkeypatch.setattr(fm, "log_likelihood", watch)
    fm.main(["nll", "--ckpt", str(tiny[0] / "whole" / "checkpoint.pt"), "--n", "3", "--k", "4",
             "--batch", "5", "--results", str(tmp_path / "rows")])
    x, signs = (torch.cat(part).reshape(3, 4, 64) for part in zip(*seen))
    assert torch.equal(signs, signs[:, :1].expand(3, 4, 64)) and (signs.abs() == 1).all()
    assert len(torch.unique(signs[:, 0], dim=0)) == 3
    assert len(torch.unique(x.flatten(0, 1), dim=0)) == 12
    levels = (128 * (x + 1)).floor()  # the same image under four dequantisations
    assert torch.equal(levels, levels[:, :1].expand(3, 4, 64))


@pytest.mark.parametrize("more, says", [
    ("--inception other.pth", "another SHA-256"), ("--inception nowhere.pth", "nowhere.pth"),
    ("--inception pickle.pth", "another SHA-256"), ("", "--inception FILE"),
    ("--features pixels --inception other.pth", "--inception"),
    ("--features pixels --reference nowhere", "nowhere"),
    ("--features pixels --reference test", "no test split"),
    ("--features pixels --images set", "--reference"), ("--n 1", "--n"), ("--steps 5,0", "--steps"),
    ("--features pixels --images set --reference set --n 5", "no --n"),
    ("--features pixels --images one --reference set", "at least two"),
    ("--features pixels --images sizes --reference set", "8 x 8: all must be square"),
    ("--features pixels --images oblong --reference set", "must be square"),
    ("--features pixels --images empty --reference set", "no folder with images"),
    ("--features pixels --images nan --reference set", "not finite"),
    ("--features pixels --reference colour", "3 channels"), ("--guidance 2", "--classes"),
    ("--features pixels --images set --reference=", "--reference"), ("--steps none", "--steps"),
    ("--features pixels --solver dopri5 --steps 5", "dopri5 chooses"),
])
def test_fid_refuses_with_one_line(more, says, tiny, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    torch.save({"model": Payload()}, "pickle.pth")
    Path("other.pth").write_bytes(b"other")
    write_folder(tmp_path / "set")
    write_folder(tmp_path / "one", n=1)
    Image.new("L", (9, 9)).save(write_folder(tmp_path / "sizes") / "z.png")
    for name, picture in (("oblong", Image.new("L", (8, 9))), ("colour", Image.new("RGB", (8, 8))),
                          ("nan", Image.fromarray(np.full((8, 8), np.nan, np.float32)))):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "0.tiff")
    (tmp_path / "empty").mkdir()
    images = "--images" in more
    model = [] if images else ["--ckpt", str(tiny[0] / "whole" / "checkpoint.pt")]
    assert says in refuse(["fid", *model, "--data-dir", "cache", *more.split()], capsys)
    assert not Path("payload-ran").exists() and not Path("results.jsonl").exists()


def test_nll_refuses_images_that_the_model_was_not_made_for(tiny, tmp_path, capsys):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "0.png")
    error = refuse(["nll", "--ckpt", str(tiny[0] / "whole" / "checkpoint.pt"), "--reference",
                    str(tmp_path), "--data-dir", str(tmp_path / "cache")], capsys)
    assert "3 channels" in error


def test_paths_draws_its_picture_and_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    measured = fm.measure_paths
    monkeypatch.setattr(fm, "measure_paths", functools.partial(measured, particles=50))
    fm.main(["paths", "--data", "checkerboard"])
    out = capsys.readouterr().out
    row = r"^(euler|midpoint|rk4) +\d+( +\d+\.\d%  \d\.\de.\d\d){3}$"
    assert len(re.findall(row, out, re.M)) == 18
    picture = np.asarray(Image.open("paths.png"))
    assert picture.shape[0] > 900 and picture.shape[1] > 1800 and picture.std() > 10
    assert "--overwrite" in refuse(["paths", "--out", "paths.png"], capsys)


def test_sample_uses_the_ema_weights(tiny, tmp_path):
    checkpoint = load(tiny[0] / "whole")
    checkpoint["model"] = {k: math.nan * p for k, p in checkpoint["model"].items()}
    torch.save(checkpoint, tmp_path / "x.pt")
    x = str(tmp_path / "x")
    fm.main(["sample", "--ckpt", x + ".pt", "--n", "2", "--out", x + ".png"])


def test_sample_finds_the_newest_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, age in (("old", 100), ("new", 0), ("older", 200)):
        file = tmp_path / "runs" / name / "checkpoint.pt"
        file.parent.mkdir(parents=True)
        file.write_bytes((tiny[0] / "whole" / "checkpoint.pt").read_bytes())
        os.utime(file, (time.time() - age,) * 2)
    fm.main(["sample", "--n", "1", "--steps", "1"])
    assert "runs/new/samples.png" in capsys.readouterr().out


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def bad_checkpoints(root):
    """name -> file, each wrong in its own way."""
    whole = (root / "whole" / "checkpoint.pt").read_bytes()
    files = {name: root / f"{name}.pt" for name in
             ("empty", "truncated", "text", "pickle", "foreign", "list", "shapes", "config", "lr",
              "damaged", "nan", "moments", "stepless", "scale", "unscaled")}
    files["empty"].write_bytes(b"")
    files["truncated"].write_bytes(whole[: len(whole) // 2])
    files["text"].write_text("hello")
    torch.save({"model": Payload()}, files["pickle"])
    torch.save({"state_dict": {}}, files["foreign"])
    torch.save([1, 2], files["list"])
    checkpoint = load(root / "whole")
    short = {k: p[:1] for k, p in checkpoint["ema"].items()}
    torch.save(checkpoint | {"ema": short}, files["shapes"])
    torch.save(checkpoint | {"config": {"path": "ot"}}, files["config"])
    torch.save(checkpoint | {"config": checkpoint["config"] | {"lr": "fast"}}, files["lr"])
    middle = whole.index(checkpoint["ema"]["net.stem.weight"].numpy().tobytes())
    flipped = bytes([whole[middle] ^ 1])  # one bit of one weight
    files["damaged"].write_bytes(whole[:middle] + flipped + whole[middle + 1 :])
    nan = {k: p * math.nan for k, p in checkpoint["ema"].items()}
    torch.save(checkpoint | {"ema": nan}, files["nan"])
    moments = checkpoint["optimizer"]["state"]
    wrong = {i: m | {"exp_avg": torch.zeros(3)} for i, m in moments.items()}
    torch.save(checkpoint | {"optimizer": {"state": wrong}}, files["moments"])
    torch.save(checkpoint | {"step": None}, files["stepless"])
    torch.save(checkpoint | {"scaler": {"scale": "x"}}, files["scale"])
    torch.save(checkpoint | {"scaler": {"scale": math.nan}}, files["unscaled"])
    return files


def test_bad_checkpoints_are_refused_and_run_no_code(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, file in bad_checkpoints(tiny[0]).items():
        error = refuse(["sample", "--ckpt", str(file), "--out", "x.png"], capsys)
        assert str(file) in error, name
    assert list(tmp_path.iterdir()) == []  # the payload did not run, nothing was written


@pytest.mark.parametrize("arguments, says", [
    ("train --path xy", "'xy'"), ("train --data nowhere", "nowhere"), ("train --bogus", "--bogus"),
    ("train --steps 0", "--steps"), ("train --steps x", "--steps"), ("train --lr -1", "--lr"),
    ("train --lr nan", "--lr"), ("train --lr inf", "--lr"), ("train --batch -4", "--batch"),
    ("train --dropout 1.5", "--dropout"), ("train --mults 1,,2", "--mults"),
    ("train --size 18", "multiples of 4"), ("train --width 6", "multiple of 4"),
    ("train --device cuda", "cpu"), ("train --resume", "runs"),
    ("train --resume --out nowhere", "nowhere"), ("train --data empty", "with images"),
    ("train --data broken --size 8", "broken/0.png"), ("train --amp fp8", "fp8"),
    ("sample", "runs"), ("sample --ckpt nowhere.pt", "nowhere.pt"), ("sample --steps 0", "--steps"),
    ("sample --n -1", "--n"), ("sample --solver heun", "heun"), ("sample --device cuda", "cpu"),
    ("sample --tolerance 0", "--tolerance"), ("sample --ckpt empty", "empty"),
    ("paths --data moons", "moons"), ("paths --seed -1", "--seed"),
])
def test_bad_input_gets_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "broken")
    (tmp_path / "broken" / "0.png").write_bytes(b"not a png")
    assert says in refuse(arguments.split(), capsys)
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("data/*"))


def test_a_download_that_fails_names_the_way_out(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    for name in ("mnist", "fashion-mnist", "cifar10"):
        error = refuse(["train", "--data", name, "--data-dir", str(tmp_path)], capsys)
        assert "--data-dir" in error and "--data digits" in error


def test_nothing_already_written_is_overwritten(tiny, tmp_path, capsys):
    root, flags = tiny
    before = {f: f.read_bytes() for f in (root / "whole").iterdir()}
    assert "--resume" in refuse(flags + ["--out", str(root / "whole")], capsys)
    more = ["--out", str(root / "whole"), "--resume", "--steps", "30", "--width", "16"]
    error = refuse(flags + more, capsys)
    assert "--width 8" in error
    assert "more --steps" in refuse(flags + ["--out", str(root / "whole"), "--resume"], capsys)
    assert {f: f.read_bytes() for f in (root / "whole").iterdir()} == before
    base = ["sample", "--ckpt", str(root / "whole" / "checkpoint.pt"), "--n", "1", "--steps", "1"]
    for out in ("x.png", "folder"):
        fm.main(base + ["--out", str(tmp_path / out)])
        assert "--overwrite" in refuse(base + ["--out", str(tmp_path / out)], capsys)
    (tmp_path / "folder" / "2026-holiday.png").write_text("mine")
    (tmp_path / "folder" / "000007.png").write_text("of an earlier run")
    for out in ("x.png", "folder"):
        fm.main(base + ["--out", str(tmp_path / out), "--overwrite"])
    left = sorted(f.name for f in (tmp_path / "folder").iterdir())
    assert left == ["000000.png", "2026-holiday.png"]


def test_training_over_a_folder_needs_overwrite_and_then_leaves_nothing_old(tiny, tmp_path, capsys):
    root, flags = tiny
    flags = flags + ["--out", str(tmp_path)]
    (tmp_path / "log.jsonl").write_text("somebody's\n")
    assert "--overwrite" in refuse(flags, capsys)
    assert (tmp_path / "log.jsonl").read_text() == "somebody's\n"
    for file in ("checkpoint.pt", "step-000012.png"):
        shutil.copy(root / "whole" / file, tmp_path)
    fm.main(flags + ["--overwrite", "--steps", "3"])
    assert load(tmp_path)["step"] == 3
    files = {f.name for f in tmp_path.iterdir()}
    assert files == {"checkpoint.pt", "log.jsonl", "step-000003.png"}


def test_a_killed_overwrite_does_not_resume_the_old_run(tiny, tmp_path, monkeypatch, capsys):
    root, flags = tiny
    shutil.copytree(root / "whole", tmp_path, dirs_exist_ok=True)
    flags = flags + ["--out", str(tmp_path)]

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(fm, "cfm_loss", kill)
        fm.main(flags + ["--overwrite"])
    assert "no checkpoint" in refuse(flags + ["--resume", "--steps", "99"], capsys)


def test_a_run_whose_data_changed_is_not_resumed(tiny, tmp_path, capsys):
    flags = ["train", "--data", str(tmp_path / "set"), "--data-dir", str(tmp_path / "cache")]
    flags += TINY + ["--classes", "--out", str(tmp_path / "run")]
    write_folder(tmp_path / "set")
    fm.main(flags)
    write_folder(tmp_path / "set", classes=3)
    assert "has changed" in refuse(flags + ["--resume", "--steps", "30"], capsys)


def test_fp16_that_overflows_at_any_scale_is_stopped(tiny, tmp_path, monkeypatch, capsys):
    root, flags = tiny
    original = fm.cfm_loss
    monkeypatch.setattr(fm, "cfm_loss", lambda *args: original(*args) * math.nan)
    error = refuse(flags + ["--amp", "fp16", "--out", str(tmp_path)], capsys)
    assert "step 16 is not finite" in error  # 65536 halved 16 times is 1, seen at step 18's line
    assert all(p.isfinite().all() for p in load(tmp_path)["ema"].values())


@pytest.mark.parametrize("command", list(fm.COMMANDS))
def test_help_names_every_flag_with_its_default_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        fm.main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"flow_matching.py {command}" in text.split("examples:")[1]
    assert text.count("default") >= len(fm.COMMANDS[command][1])


def test_the_script_metadata_names_what_is_imported():
    source = SCRIPT.read_text()
    metadata = source[: source.index('"""')]
    imported = {(n.names[0].name if isinstance(n, ast.Import) else n.module).split(".")[0]
                for n in ast.parse(source).body if isinstance(n, (ast.Import, ast.ImportFrom))}
    third_party = {m for m in imported if m not in sys.stdlib_module_names} - {"PIL"}
    assert set(re.findall(r'"([a-z]+)>=[^"]+"', metadata)) == third_party
