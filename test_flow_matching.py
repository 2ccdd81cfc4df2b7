"""What flow_matching.py claims, each claim tested from another side than the code computes it."""

import argparse
import ast
import contextlib
import functools
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
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torchgen
import torchvision
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import flow_matching as fm

SCRIPT, CPU = Path(fm.__file__), torch.device("cpu")
ALL_PATHS = pytest.mark.parametrize("name", list(fm.PATHS))
TINY = ("train --size 8 --width 8 --mults 1,2 --blocks 1 --attention 4 --dropout 0.2 --batch 8 "
        "--lr 0.01 --warmup 3 --ema 0.9 --flip --steps 24 --log-every 3 --save-every 24 "
        "--optimizer muon --time logit-normal --device cpu")
RESUME = "train --resume --device cpu --out"
close, approx = torch.testing.assert_close, pytest.approx


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def field(path, means, tau):
    """The exact marginal field: v(x, t)."""
    return functools.partial(fm.marginal_velocity, path, means=means, tau=tau)


def config(**more):
    """What a checkpoint keeps of a run: all flags of train, and what was found in the data."""
    return argparse.Namespace(**fm.TRAIN | dict(channels=1, names=[], data_rms=0.5) | more)


def run(command, *more):
    """A command line, and more arguments as they are: what it printed."""
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
    assert re.match(rf"flow_matching.py( {command.split()[0]})?: error: ", error), error
    return error


def pngs(folder):
    """The images that sample left in a folder, by name: int, (H, W)."""
    files = sorted(folder.glob("[0-9]*.png"))
    return {f.stem: np.asarray(Image.open(f)).astype(int) for f in files}


def load(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def averaged(out):
    """The velocity of a run, with averaged weights."""
    velocity = fm.Velocity(argparse.Namespace(**load(out)["config"])).eval().requires_grad_(False)
    velocity.load_state_dict(load(out)["ema"])
    return velocity


def rows(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def losses(out):
    return [(row["step"], row["loss"]) for row in rows(out / "log.jsonl")]


def same(a, b):
    """Whether two runs ended with the same bits."""
    a, b = load(a), load(b)
    return all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])


def write_folder(root, n=24, classes=2, mode="L"):
    """n random smooth PNGs of 8 x 8, none like its mirror image, in class subfolders."""
    rng = np.random.default_rng(0)
    for i in range(n):
        file = root / f"class{i % classes}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        bands = [np.add.outer(*np.sort(rng.integers(0, 128, (2, 8)))) for _ in mode]
        Image.fromarray(np.stack(bands, 2).astype(np.uint8).squeeze()).save(file)
    return root


def at_loss(monkeypatch, actions):
    """The n-th loss of a training becomes actions[n](loss)."""
    numbers, original = itertools.count(1), fm.cfm_loss
    monkeypatch.setattr(fm, "cfm_loss", lambda *args, **weight: actions.get(
        next(numbers), lambda loss: loss)(original(*args, **weight)))


class Stop(BaseException):
    """An end that no handler of the program sees, as a kill."""


def kill(*_):
    raise Stop


@contextlib.contextmanager
def limit(name, value):
    """A limit of the system on this process."""
    resource = pytest.importorskip("resource")
    kind = getattr(resource, name)
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The command of a tiny run on a folder of images, and that run, finished without a break."""
    root = tmp_path_factory.mktemp("tiny")
    command = f"{TINY} --data {write_folder(root / 'set')} --data-dir {root / 'cache'}"
    run(command, "--out", root / "whole")
    return command, root / "whole"


# §1  Probability paths --------------------------------------------------------------------------


def log_density(path, x, t, means, tau):
    """log p_t(x), Eq. 6, straight from its definition as a mixture: (B,)."""
    alpha, sigma = path(t)[:2]
    std = ((alpha * tau) ** 2 + sigma**2).sqrt()[:, None, None]
    each = torch.distributions.Normal(alpha[:, None, None] * means, std).log_prob(x[:, None])
    return each.sum(-1).logsumexp(1) - math.log(len(means))


@ALL_PATHS
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_theorem_1_the_marginal_field_is_eq_8_and_satisfies_the_continuity_equation(name, tau):
    """d/dt log p + u . grad log p + div u = 0, by automatic differentiation in float64.

    Eq. 8 is u = α' E[x_1 | x] + σ' E[x_0 | x], where by Tweedie E[x_0 | x] = −σ grad log p.
    """
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
    # The terms cancel: what is left is rounding of the largest of them.
    assert (terms.sum(0).abs() <= 1e-9 * terms.abs().amax(0)).all()


def test_theorem_2_gradients_are_equal_while_the_losses_differ():
    """Both expectations by quadrature: Gauss-Hermite for CFM's x_0, a fine grid for FM's x."""
    torch.manual_seed(0)
    inner, outer = nn.Linear(2, 16).double(), nn.Linear(16, 1).double()
    parameters, means = [*inner.parameters(), *outer.parameters()], times(-1.0, 0.5, 2.0)[:, None]
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(80))
    grid = torch.linspace(-16, 16, 40_001, dtype=torch.float64)
    k, i, j = (c.flatten() for c in torch.meshgrid(*map(torch.arange, (3, 3, 80)), indexing="ij"))

    def v(x, t):  # entire: fast quadrature
        return outer(inner(torch.cat([x, t[:, None]], 1)).sin())

    # ve begins at σ = 50: here with a scale that the grid resolves
    for path in (fm.ot_path, fm.vp_path, functools.partial(fm.ve_path, sigma_min=0.1, sigma_max=2)):
        cfm = fm.cfm_loss(v, path, means[k], nodes[j, None], times(0.1, 0.4, 0.7)[i],
                          weights[j] / weights.sum() * 80)
        x, t = grid.repeat(3)[:, None], times(0.1, 0.4, 0.7).repeat_interleave(len(grid))
        density = log_density(path, x, t, means, 0.0).exp()
        error = (v(x, t) - fm.marginal_velocity(path, x, t, means)).square()[:, 0]
        loss = (density * error).sum() * (grid[1] - grid[0]) / 3
        g_cfm, g_fm = (torch.autograd.grad(each, parameters) for each in (cfm, loss))
        for a, b in zip(g_cfm, g_fm, strict=True):
            assert (a - b).norm() < 1e-6 * b.norm()  # both quadratures converge beyond this
        assert cfm > 1.01 * loss


def schedule(name, t):
    """α and σ as the paper has them."""
    T = 0.1 * (1 - t) + 9.95 * (1 - t) ** 2
    return {"ot": (t, 1 - (1 - 1e-4) * t), "vp": ((-T / 2).exp(), (1 - (-T).exp()).sqrt()),
            "ve": (1 + 0 * t, 0.01 * 5000 ** (1 - t))}[name]


def slopes(name, t):
    """Their derivatives in time, by automatic differentiation."""
    t = t.detach().requires_grad_()
    return [torch.autograd.grad(part.sum(), t, retain_graph=True)[0] for part in schedule(name, t)]


@ALL_PATHS
def test_theorem_3_is_the_time_derivative_of_psi_and_equations_17_19_and_21(name):
    path, t = fm.PATHS[name], torch.linspace(0, 0.999, 100, dtype=torch.float64)
    for mine, expected in zip(path(t), (*schedule(name, t), *slopes(name, t)), strict=True):
        close(mine, expected, rtol=1e-9, atol=1e-12)
    x, x_1, s = double(100, 3), double(100, 3, seed=1), 1 - t[:, None]
    T, sigma = 0.1 * s + 0.5 * 19.9 * s**2, 0.01 * 5000**s
    expected = {
        "ve": -(math.log(5000) * sigma) / sigma * (x - x_1),
        "vp": -(0.1 + 19.9 * s) / 2 * ((-T).exp() * x - (-T / 2).exp() * x_1) / (1 - (-T).exp()),
        "ot": (x_1 - (1 - 1e-4) * x) / (1 - (1 - 1e-4) * t[:, None])}[name]
    close(fm.conditional_velocity(path, x, x_1, t), expected, rtol=1e-9, atol=1e-9)
    alpha, sigma, d_alpha, d_sigma = fm.coefficients(path, t, x)
    u = fm.conditional_velocity(path, alpha * x_1 + sigma * x, x_1, t)
    close(u, d_alpha * x_1 + d_sigma * x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, start, end", [
    ("ot", 1, 1e-4), ("vp", math.sqrt(1 - math.exp(-10.05)), 0.0010004974), ("ve", 50, 0.01)])
def test_each_path_runs_from_its_prior_to_the_data(name, start, end):
    alpha, sigma = fm.PATHS[name](times(0, 1))[:2]
    np.testing.assert_allclose(sigma, (start, end), rtol=1e-4)
    assert abs(alpha[0] - {"ot": 0, "vp": math.exp(-10.05 / 2), "ve": 1}[name]) < 1e-9
    assert abs(alpha[1] - 1) < 1e-4
    x, _ = fm.sample(lambda x, t: 0 * x, double(4, 2), fm.PATHS[name], steps=1)
    close(x, start * double(4, 2))  # the prior that sampling starts from


def test_ot_conditional_lines_are_straight_at_constant_speed_and_vp_are_not():
    t, x_0, x_1 = torch.linspace(0, 0.99, 100, dtype=torch.float64), double(2), double(2, seed=1)
    for path, straight in ((fm.ot_path, True), (fm.vp_path, False)):
        alpha, sigma, d_alpha, d_sigma = (c[:, None] for c in path(t))
        x, u = alpha * x_1 + sigma * x_0, d_alpha * x_1 + d_sigma * x_0
        chord = (x[-1] - x[0]) / (x[-1] - x[0]).norm()
        bow = ((x - x[0]) - ((x - x[0]) @ chord)[:, None] * chord).norm(dim=1).max()
        change = (u - u[0]).norm(dim=1).max()
        assert max(change, bow) < 1e-12 if straight else min(change, bow) > 0.1


@ALL_PATHS
def test_float32_is_safe_at_both_ends_of_time(name):
    """rand() draws multiples of 2^-24 in [0, 1), and a sigmoid may round to 1."""
    t = torch.tensor([0.0, 2**-24, 1e-5, 0.5, 1 - 1e-5, 1 - 2**-24, 1.0])
    for mine, exact in zip(fm.PATHS[name](t), fm.PATHS[name](t.double()), strict=True):
        close(mine.double(), exact, rtol=2e-5, atol=1e-7)
    velocity = fm.Velocity(config(path=name, size=8, width=8))
    assert (velocity.scales(t)[2] ** -2).isfinite().all()  # the weight of the loss
    assert velocity(torch.ones(7, 1, 8, 8), t).isfinite().all()


@ALL_PATHS
def test_the_flow_moves_with_the_marginal_field(name):
    """Central differences in time of the solution phi_t(x_0), Eq. 1."""
    path, h = fm.PATHS[name], 1e-4
    v, x_0 = field(path, 2 * double(4, 2, seed=3), 0.3), path(times(0))[1] * double(8, 2)
    for t in (0.3, 0.7):
        before, now, after = (fm.odeint(v, x_0, 0.0, t + d, "dopri5", tolerance=1e-11)[0]
                              for d in (-h, 0, h))
        u = v(now, torch.full((8,), t).double())
        close((after - before) / (2 * h), u, rtol=1e-4, atol=1e-4)


# §2  Loss ---------------------------------------------------------------------------------------


def test_ot_loss_is_eq_23():
    x_0, x_1, t = double(8, 1, 4, 4), double(8, 1, 4, 4, seed=1), double(8, seed=2).sigmoid()
    s = t[:, None, None, None]
    psi = (1 - (1 - 1e-4) * s) * x_0 + s * x_1
    expected = ((psi.sin() + s - (x_1 - (1 - 1e-4) * x_0)) ** 2).mean()
    close(fm.cfm_loss(lambda x, t: x.sin() + s, fm.ot_path, x_1, x_0, t), expected)
    velocity = fm.Velocity(config())
    assert (velocity.scales(t)[2] == 1).all()  # training by --path ot is unweighted
    nn.init.normal_(velocity.net.out.weight)
    x, t = x_1.float().repeat(1, 1, 4, 4), t.float()
    assert torch.equal(velocity(x, t), velocity.net(x, t))


def test_times_are_drawn_in_float32_uniformly():
    torch.manual_seed(0)
    seen, x_1 = [], torch.zeros(20_000, 1, dtype=torch.bfloat16)
    fm.cfm_loss(lambda x, t: seen.append(t) or x, fm.ot_path, x_1)
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
        alpha, sigma, d_alpha, d_sigma = path(times(moment))
        x, u = alpha * x_1 + sigma * x_0, d_alpha * x_1 + d_sigma * x_0
        slope = (u * x).mean() / (x * x).mean()
        expected = [(x * x).mean() ** -0.5, slope, (u - slope * x).square().mean() ** 0.5]
        close(torch.cat(velocity.scales(times(moment))), torch.stack(expected), rtol=5e-3,
              atol=5e-3)
        t = torch.full((1600,), moment)
        data, noise = (part[:102_400].float().view(1600, 1, 8, 8) for part in (x_1, x_0))
        loss = fm.cfm_loss(velocity, path, data, noise, t, velocity.scales(t)[2] ** -2)
        assert abs(loss - 1) < 0.03  # 5 standard errors of a squared normal


def test_a_network_trained_by_cfm_converges_to_the_exact_marginal_field():
    torch.manual_seed(0)
    means = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer, errors = torch.optim.Adam(net.parameters(), 3e-3), []

    def v(x, t):
        return net(torch.cat([x, t[:, None]], 1))

    t = 0.9 * torch.rand(2000)
    alpha, sigma = (c[:, None] for c in fm.ot_path(t)[:2])
    x = alpha * (means[torch.arange(2000) % 3] + 0.2 * torch.randn(2000, 2))
    x = x + sigma * torch.randn(2000, 2)
    u = fm.marginal_velocity(fm.ot_path, x, t, means, 0.2)
    for step in range(2001):
        if step in (0, 200, 2000):
            errors.append(((v(x, t) - u).square().mean() / u.square().mean()).item())
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 2001)
        x_1 = means[torch.randint(3, (512,))] + 0.2 * torch.randn(512, 2)
        optimizer.zero_grad()
        fm.cfm_loss(v, fm.ot_path, x_1, t=0.95 * torch.rand(512)).backward()
        optimizer.step()
    # What is left is the small network's own error; a wrong target leaves more than 30%.
    assert errors[0] > 0.5 and errors[2] < errors[1] / 2 and errors[2] < 0.05, errors


# §3  ODE solvers, on dx/dt = x cos t, x = x_0 exp(sin t) ----------------------------------------

X_0 = double(3, 2)


def swing(x, t):
    return x * t.cos()[:, None]


def swing_error(t_0=0.0, t_1=2.0, **solver):
    x, nfe = fm.odeint(swing, X_0 * math.exp(math.sin(t_0)), t_0, t_1, **solver)
    return (x - X_0 * math.exp(math.sin(t_1))).abs().max().item(), nfe


@pytest.mark.parametrize("ends", [{}, dict(t_0=2.0, t_1=0.0)])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_solver_order_by_slope_forward_and_backward(solver, order, ends):
    steps = [32, 64, 128, 256]
    errors = [swing_error(solver=solver, steps=n, **ends)[0] for n in steps]
    assert abs(-np.polyfit(np.log(steps), np.log(errors), 1)[0] - order) < 0.1


def test_adaptive_error_follows_its_tolerance():
    tolerances = np.array([1e-3, 1e-5, 1e-7, 1e-9])
    each = [swing_error(solver="dopri5", tolerance=t) for t in tolerances]
    errors, nfes = zip(*each, strict=True)
    slope = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert 0.7 < slope < 1.3 and (errors < 30 * tolerances).all()
    assert list(nfes) == sorted(nfes) and nfes[0] < nfes[-1]


@pytest.mark.parametrize("solver, calls", dict(euler=1, midpoint=2, rk4=4, dopri5=0).items())
def test_a_solver_counts_its_calls_keeps_the_type_and_takes_no_time_no_samples_and_gradients(
        solver, calls):
    seen = []
    _, nfe = fm.odeint(lambda x, t: seen.append(t) or swing(x, t), X_0, solver=solver, steps=7)
    assert nfe == len(seen) == (7 * calls or nfe) > 6
    assert all(t.shape == (3,) and 0 <= t.min() and t.max() <= 1 for t in seen)
    assert torch.equal(fm.odeint(swing, X_0, 0.5, 0.5, solver)[0], X_0)
    assert fm.odeint(swing, X_0[:0], solver=solver)[0].shape == (0, 2)
    assert fm.odeint(swing, X_0.float(), solver=solver)[0].dtype == torch.float32
    x = X_0.clone().requires_grad_()
    end, _ = fm.odeint(swing, x, solver=solver, steps=40)
    assert end.requires_grad == (solver != "dopri5")
    if end.requires_grad:  # of a linear flow
        close(torch.autograd.grad(end.sum(), x)[0], end.detach() / X_0)


# §4  Sampling and likelihood --------------------------------------------------------------------


@ALL_PATHS
def test_the_exact_field_moves_each_prior_onto_the_data_and_back(name):
    """Mean, covariance and share of particles within 3 tau, of two Gaussians; then the noise."""
    path, tau, means = fm.PATHS[name], 0.1, torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    noise = double(4000, 2)
    x, _ = fm.sample(field(path, means, tau), noise.float(), path, solver="rk4", steps=200)
    distance, nearest = torch.cdist(x, means).min(1)
    assert (distance < 3 * tau).float().mean() > 0.98  # 98.9% of a 2-D Gaussian lie within 3 tau
    assert abs(nearest.float().mean() - 0.5) < 0.04  # 5 standard errors
    assert ((x - means[nearest]).std(0) - tau).abs().max() < 0.01
    v, precise = field(path, torch.eye(2), 0.3), dict(solver="dopri5", tolerance=1e-9)
    x_1, _ = fm.sample(v, noise[:9], path, **precise)
    close(fm.invert(v, x_1, path, **precise)[0], noise[:9], rtol=1e-4, atol=1e-4)
    assert (x_1 - noise[:9]).abs().max() > 0.1


@ALL_PATHS
def test_likelihood_of_gaussian_data_is_its_closed_form(name):
    """One Gaussian N(m, τ²): the flow is affine, x_1 = α m + (s_1/s_0)(x_0 − α_0 m), s = std at t.

    So N(0, σ_0²) is pushed to another Gaussian, for vp and ve not quite onto the data's.
    """
    path, tau, m, last = fm.PATHS[name], 0.3, double(1, 1, 2, 2, seed=1), 1e-5
    alpha, sigma, d_alpha, d_sigma = path(times(0, 1 - last))
    (a_0, a_1), (s_0, s_1) = alpha, ((alpha * tau) ** 2 + sigma**2).sqrt()
    law = torch.distributions.Normal(a_1 * m - s_1 / s_0 * a_0 * m, s_1 / s_0 * sigma[0])

    def v(x, t):
        return fm.marginal_velocity(path, x.flatten(1), t, m.flatten(1), tau).view(x.shape)

    x_1 = m + tau * double(5, 1, 2, 2)
    x = x_1 - last * v(x_1, torch.ones(5).double())  # there vp stands still: exact to last²
    expected = law.log_prob(x).flatten(1).sum(1)
    expected -= last * 4 * ((alpha * d_alpha * tau**2 + sigma * d_sigma)[1] / s_1**2)
    with torch.inference_mode():
        log_p, nfe = fm.log_likelihood(v, x_1, path, solver="dopri5", tolerance=1e-10)
    close(log_p, expected, rtol=1e-6, atol=1e-6)
    assert log_p.shape == (5,) and log_p.dtype == torch.float64 and nfe > 20


def test_a_field_that_does_not_look_at_x_moves_the_prior():
    x_1 = double(4, 3)
    log_p, _ = fm.log_likelihood(lambda x, t: t[:, None].expand(4, 3), x_1, steps=3)
    close(log_p, torch.distributions.Normal(0.5, torch.ones(3).double()).log_prob(x_1).sum(1))


def test_hutchinson_is_unbiased():
    """The mean over all 16 sign vectors is the exact trace, while no two estimates need agree."""
    means, fixed = double(3, 4, seed=2), dict(solver="rk4", steps=10)
    v, x_1 = field(fm.ot_path, means, 0.3), means + 0.1 * double(3, 4)
    exact, _ = fm.log_likelihood(v, x_1, **fixed)
    signs = [times(*s).expand(3, 4) for s in itertools.product((-1, 1), repeat=4)]
    each = torch.stack([fm.log_likelihood(v, x_1, probes=[s], **fixed)[0] for s in signs])
    close(each.mean(0), exact, rtol=1e-10, atol=1e-10)
    assert (each.std(0) > 1e-3).all()


@ALL_PATHS
def test_the_density_of_a_model_in_the_plane_integrates_to_1(name):
    """By a sum over a grid, exact for smooth densities.  The model is any smooth field."""
    start, cells = fm.PATHS[name](times(0))[1].item(), 201 if name == "ve" else 101
    axis = torch.linspace(-1, 1, cells, dtype=torch.float64) * (6 * start + 2)
    log_p, _ = fm.log_likelihood(
        lambda x, t: torch.stack([(x[:, 1] + t).sin(), (2 * x[:, 0]).cos() - x[:, 1] * t], 1),
        torch.cartesian_prod(axis, axis), fm.PATHS[name], solver="rk4", steps=60)
    total = log_p.exp().sum() * (axis[1] - axis[0]) ** 2
    # the cells of ve's grid, 3 wide, see the field's wiggles of that width only on average
    assert total.item() == approx(1, abs=2e-3 if name == "ve" else 1e-6)


def test_bits_per_dim_of_known_densities():
    """Uniform over [-1, 1]^D: each of 256 levels is as likely: 8 bits.  K draws: a mean inside."""
    D, log_p = 12, double(5, 7)
    close(fm.bits_per_dim(torch.full((3, 1), -D * math.log(2)), D), torch.full((3,), 8.0))
    close(fm.bits_per_dim(log_p, D), -(log_p.exp().mean(1) * 128.0**-D).log2() / D)
    one = torch.stack([fm.bits_per_dim(log_p[:, [k]], D) for k in range(7)])
    assert (fm.bits_per_dim(log_p, D) < one.mean(0)).all()


# §5  Coupling, guidance, noise ------------------------------------------------------------------


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


def test_guidance_is_the_paper_s_line_through_both_fields():
    x, y, calls = double(3, 2), torch.tensor([2.0, 3.0, 4.0]), []

    def v(x, t, y):
        calls.append(y)
        return x * (1.0 if y is None else y[:, None])

    for scale, expected in ((0, x), (1, x * y[:, None]), (2.5, x + 2.5 * x * (y - 1)[:, None])):
        close(fm.guided(v, y, scale)(x, None), expected)
    assert len(calls) == 5  # scale 1 evaluates once


def test_noise_is_normal_and_depends_on_seed_and_index_alone():
    a = fm.draw_noise(3, range(10), (1, 4, 4))
    assert torch.equal(a[4:7], fm.draw_noise(3, range(4, 7), (1, 4, 4)))
    many = torch.cat([fm.draw_noise(seed, range(700), (20,)) for seed in (0, 1, 2, 3, 4096, 2**20)])
    assert len(torch.unique(many, dim=0)) == 4200  # no (seed, i) has another's noise
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.015
    assert (torch.corrcoef(many.T) - torch.eye(20)).abs().max() < 0.08
    assert scipy.stats.kstest(many.flatten().numpy(), "norm").pvalue > 1e-3  # one fixed draw


# §6  Network ------------------------------------------------------------------------------------


def randomise(net, std=0.3):
    """Every parameter random, those that start at zero or one too."""
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    return net.eval()


def silu(x):
    return x / (1 + (-x).exp())


def normed(h, layer):
    """GroupNorm by hand: groups of at least 4 channels, at most 32 of them."""
    parts = h.reshape(len(h), min(32, h.shape[1] // 4), -1)
    parts = (parts - parts.mean(2, True)) / (parts.var(2, False, True) + 1e-5).sqrt()
    return parts.view_as(h) * layer.weight[:, None, None] + layer.bias[:, None, None]


@pytest.mark.parametrize("c_in, c_out", [(8, 8), (8, 16), (256, 16)])
def test_a_residual_block_by_hand_and_the_identity_that_it_starts_as(c_in, c_out):
    h, emb = double(2, c_in, 6, 4), double(2, 10, seed=1)
    block = fm.ResBlock(c_in, c_out, 10, 0.5, attention=True).double().eval()
    assert torch.equal(block(h, emb), block.skip(h))
    assert c_in != c_out or torch.equal(block.skip(h), h)
    randomise(block)
    scale, shift = block.scale_shift(emb)[:, :, None, None].split(c_out, 1)
    r = silu(normed(block.conv1(silu(normed(h, block.norm1))), block.norm2) * (1 + scale) + shift)
    close(block(h, emb), block.attention(block.skip(h) + block.conv2(r)))
    assert not torch.allclose(block.train()(h, emb), block.eval()(h, emb))  # dropout


def test_attention_equals_softmax_by_hand():
    h, layer = double(2, 128, 3, 4), fm.Attention(128).double()
    assert torch.equal(layer(h), h)  # the identity at the start
    randomise(layer)
    q, k, v = layer.qkv(normed(h, layer.norm)).flatten(2).reshape(2, 3, 2, 64, 12).unbind(1)
    weights = (torch.einsum("bhci,bhcj->bhij", q, k) / 8).softmax(-1)  # 8 = sqrt(64)
    a = torch.einsum("bhij,bhcj->bhci", weights, v).reshape(2, 128, 3, 4)
    close(layer(h), h + layer.out(a))


@pytest.mark.parametrize("mults, blocks, size", [((1, 2), 1, (8, 12)), ((1, 3, 2), 2, (16, 8))])
def test_a_u_net_by_hand_and_the_zero_that_it_starts_as(mults, blocks, size):
    net = fm.UNet(2, size[0], 8, mults, blocks, (4,), 0.5, classes=2).double().eval()
    x, t, y = double(3, 2, *size), times(0, 0.3, 1), torch.tensor([0, 1, 2])
    assert (net(x, t, y) == 0).all()
    randomise(net)
    angles = t[:, None] * 1000 * 10_000.0 ** (-torch.arange(4).double() / 4)
    emb = net.time[2](silu(net.time[0](torch.cat([angles.cos(), angles.sin()], 1))))
    emb, h, skips = silu(emb + net.label.weight[y]), x, []
    for i, level in enumerate(net.down):
        stride = 2 if i else 1
        h = nn.functional.conv2d(h, net.enter[i].weight, net.enter[i].bias, stride, padding=1)
        skips.append(h)
        for block in level:
            h = block(h, emb)
            skips.append(h)
    h = net.middle2(net.middle1(h, emb), emb)
    for i in reversed(range(len(mults))):
        assert len(net.down[i]) == blocks and len(net.up[i]) == blocks + 1
        for block in net.up[i]:
            h = block(torch.cat([h, skips.pop()], 1), emb)
        h = net.leave[i][1](h.repeat_interleave(2, 2).repeat_interleave(2, 3)) if i else h
    expected = net.out(silu(normed(h, net.out_norm)))
    close(net(x, t, y), expected, rtol=1e-4, atol=1e-5)  # the sinusoids are float32
    assert torch.equal(net(x, t)[2], net(x, t, y)[2]) and (net(x, t) != net(x, t, y))[:2].all()
    attends = {n.rsplit(".", 2)[0] for n, m in net.named_modules() if isinstance(m, fm.Attention)}
    assert attends == {f"{way}.{size[0].bit_length() - 3}" for way in ("down", "up")} | {"middle1"}


def test_the_cifar10_net_has_the_usual_parameter_count():
    with torch.device("meta"):
        net = fm.Velocity(config(**fm.RECIPES["cifar10"] | dict(channels=3)))
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - 35.7) < 0.3


# §1-§7: every section runs when it is pasted with the imports and the sections that it names ----

PASTED = {  # on T: (2,), X: (2, 1, 8, 8), labels Y: (2,), five IMAGES of 2 x 2
    1: "conditional_velocity(vp_path, X, X, T), marginal_velocity(ve_path, X[:, 0, 0], T, X[0, 0])",
    2: "cfm_loss(lambda x, t: x, ot_path, X)",
    3: "[odeint(lambda x, t: x, X, solver=solver) for solver in SOLVERS]",
    4: "invert(lambda x, t: x, sample(lambda x, t: x, X)[0]), bits_per_dim(T[:, None], 64), "
       "log_likelihood(lambda x, t: x, X, probes=[X.sign()])",
    5: "guided(lambda x, t, y: x, Y, 2.0)(ot_coupling(X, X, Y), T), draw_noise(0, range(3), (2,))",
    6: "Velocity(argparse.Namespace(path='vp', channels=1, size=8, width=8, mults=[1], blocks=1, "
       "attention=[8], dropout=0.1, names=['a', 'b'], data_rms=0.5))(X, T, Y)",
    7: "frechet_distance(*fit_gaussian([IMAGES], pixels), np.zeros(4), np.eye(4)), "
       "resize_as_tensorflow_1(X), INCEPTION_SHA256"}


def test_every_section_of_the_paper_and_the_network_runs_when_it_is_pasted():
    source = SCRIPT.read_text(encoding="utf-8").split('"""', 2)[2]
    imports, *parts = re.split(r"^(?=# §\d+  )", source, flags=re.M)
    sections = {int(re.match(r"# §(\d+)", part)[1]): part for part in parts}
    assert list(sections) == list(range(1, 12)) and "needs §1 and §3" in sections[4][:99]
    for number, call in PASTED.items():
        needs = re.search(r"needs (.*?)[);]", sections[number].split("\n")[0])
        needs = [int(n) for n in re.findall(r"§(\d+)", needs[1])] if needs else []
        text = [imports, *(sections[n] for n in [*needs, number]), call]
        given = dict(T=torch.rand(2), X=double(2, 1, 8, 8).float(), Y=torch.arange(2),
                     IMAGES=torch.arange(20).byte().view(5, 1, 2, 2))
        exec(compile("\n".join(text), f"§{number}", "exec"), given)


# §7  Fréchet distance ---------------------------------------------------------------------------


def spd(D, seed):
    """A random covariance: (D, D) numpy."""
    A = double(D, D, seed=seed).numpy()
    return A @ A.T / D


def test_frechet_distance_of_known_gaussians():
    m, S, d = double(8).numpy(), spd(8, 1), double(8, seed=2).numpy()
    assert 0 <= fm.frechet_distance(m, S, m, S) < 1e-10
    assert fm.frechet_distance(m, S, m + d, S) == approx(d @ d)
    Q = np.linalg.qr(double(8, 8, seed=3).numpy())[0]  # commuting: the same axes
    a, b = np.arange(8.0), np.arange(8.0)[::-1] ** 2  # singular, both
    distance = fm.frechet_distance(m, Q * a @ Q.T, m, Q * b @ Q.T)
    assert distance == approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-7)
    A, B = spd(2, 4), spd(2, 5)  # not commuting: tr √(AB) = √(tr AB + 2 √det AB) for 2 × 2
    root = math.sqrt(np.trace(A @ B) + 2 * math.sqrt(np.linalg.det(A @ B)))
    expected = np.trace(A) + np.trace(B) - 2 * root
    assert fm.frechet_distance(m[:2], A, m[:2], B) == approx(expected)
    C_1, C_2 = double(30, 10, seed=1).numpy(), double(30, 10, seed=2).numpy()  # general, n < D
    root = np.linalg.svd(C_1.T @ C_2, compute_uv=False).sum()
    S, T, zero = C_1 @ C_1.T, C_2 @ C_2.T, np.zeros(30)
    expected = approx(np.trace(S) + np.trace(T) - 2 * root, rel=1e-7)  # √ of rounded zeros
    assert fm.frechet_distance(zero, S, zero, T) == expected
    assert fm.frechet_distance(zero, T, zero, S) == expected
    assert all(fm.frechet_distance(m[:6], C, m[:6], C) >= 0  # rounding takes none below zero
               for C in (spd(6, seed) for seed in range(20)))


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


def test_resizing_is_tensorflow_1_s():
    """Pixel i comes from i·in/299: ramps stay ramps up to the last pixel; 299 is left alone."""
    ramp, i = 2 * torch.arange(32.0)[:, None] + 10 * torch.arange(16.0), torch.arange(299)
    expected = 2 * (i * 32 / 299).clamp(max=31)[:, None] + 10 * (i * 16 / 299).clamp(max=15)
    close(fm.resize_as_tensorflow_1(ramp[None, None])[0, 0], expected, rtol=1e-5, atol=1e-4)
    x = double(1, 2, 299, 299).float()
    assert torch.equal(fm.resize_as_tensorflow_1(x), x)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights under the names and shapes of the published file, of that hash."""
    rng, weights = np.random.default_rng(0), {}
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for k, p in net.state_dict().items():
        if p.dim() == 4:
            w = rng.normal(size=p.shape) * np.sqrt(2 / np.prod(p.shape[1:]))
        elif "var" in k or k.endswith("bn.weight"):
            w = rng.uniform(*(0.5, 1.5) if "var" in k else (0.8, 1.2), p.shape)
        elif "num_batches" not in k:
            w = rng.normal(size=p.shape) * 0.1
        else:
            continue
        weights[k] = torch.from_numpy(w.astype(np.float32))
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fm, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
        yield file


def test_inception_features_are_torch_fidelity_s(inception_file):
    """Against `inception-v3-compat` of torch-fidelity 0.4.0 with the same weights and image."""
    features = fm.inception(inception_file)
    x = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (1, 3, 40, 40), dtype=np.uint8))
    expected = [0.9111799001693726, 5.1490044593811035, 7.382638454437256, 0.3674629330635071,
                7.333246231079102, 3.3332443237304688]
    np.testing.assert_allclose(features(x)[0, ::400], expected, rtol=1e-4)
    close(features(x[:, :1]), features(x[:, :1].expand(-1, 3, -1, -1)))  # grey
    assert features(x).shape == (1, 2048)


# §8  Data ---------------------------------------------------------------------------------------


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
    centroids = torch.stack([images[labels == k].flatten(1).float().mean(0) for k in range(10)])
    accuracy = torch.cdist(test.flatten(1).float(), centroids).argmin(1) == test_labels
    assert 0.7 < accuracy.float().mean() < 1  # readable, and not ten fixed pictures


def test_a_folder_of_any_sizes_and_modes_becomes_one_array(tmp_path):
    root, cache = tmp_path / "photos", tmp_path / "cache"
    for folder in ("a/deep", "b", ".hidden"):
        (root / folder).mkdir(parents=True)
    ramp = np.arange(16, dtype=np.uint8)[None, :].repeat(8, 0) * 16  # 8 high, 16 wide
    grey, colour = Image.fromarray(ramp), np.stack([ramp, 255 - ramp, ramp // 2], 2)
    picture, exif = Image.fromarray(colour), Image.Exif()
    for file in ("7.png", "a/0.png", ".hidden/8.png"):  # 7 is beside the classes
        picture.save(root / file)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(root / "a" / "1.png")  # 16 bits
    grey.convert("P").save(root / "a" / "deep" / "2.gif")
    picture.convert("CMYK").save(root / "b" / "3.tiff")
    Image.fromarray(np.dstack([colour, 0 * ramp])).save(root / "b" / "4.png")  # transparent: white
    exif[0x0112] = 6  # stored a quarter turn to the left
    Image.fromarray(np.rot90(colour)).save(root / "b" / "5.png", exif=exif)
    (root / "b" / "6.png").symlink_to(root / "a" / "0.png")
    for name in ("notes.txt", "film.MOV"):
        (root / "b" / name).write_text("not an image")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        images, labels, names = fm.load_folder(str(root), str(cache), 8)
    left = [line for line in said.getvalue().splitlines() if "left out" in line]
    assert len(left) == 1 and "1 .MOV" in left[0] and "1 .txt" in left[0]
    assert names == ["a", "b"] and labels.tolist() == [2, 0, 0, 0, 1, 1, 1, 1]  # of 7, 0, ... 6
    centre = torch.from_numpy(ramp[:, 4:12]).int()
    coloured = torch.stack([centre, 255 - centre, centre // 2])
    expected = [coloured, coloured, centre, centre, coloured, 255 + 0 * centre, coloured, coloured]
    expected = torch.stack([image.expand(3, 8, 8) for image in expected])
    images = images.clone()  # not the file, which is damaged below
    assert images.dtype == torch.uint8 and (images - expected).abs().max() <= 1

    (npy,), again = cache.iterdir(), functools.partial(fm.load_folder, str(root), str(cache), 8)
    before = npy.stat().st_mtime_ns
    assert torch.equal(again()[0], images) and npy.stat().st_mtime_ns == before
    for damage in (b"", npy.read_bytes()[:-100]):
        npy.write_bytes(damage)
        assert torch.equal(again()[0], images)
    Image.fromarray(255 - colour).save(root / "a" / "0.png")
    os.utime(root / "a" / "0.png", (1, 1))
    assert not torch.equal(again()[0], images)  # a changed file is seen


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
    bad, white = tmp_path / "bad", Image.new("L", (64, 64), "white")
    bad.mkdir()
    (tmp_path / "used").mkdir()
    Image.new("L", (1, 1), "white").save(tmp_path / "used" / "dot.png")
    white.save(tmp_path / "used" / "film.gif", save_all=True,
               append_images=[Image.new("L", (64, 64), "black")])
    assert (fm.load_folder(str(tmp_path / "used"), str(tmp_path), 8)[0] == 255).all()
    white.save(bad / "bomb.png")
    whole = (bad / "bomb.png").read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16)  # 64 × 64 is a decompression bomb
    for name, content in (("empty", b""), ("cut", whole[: len(whole) // 2]), ("odd", b"<html>")):
        (bad / f"{name}.png").write_bytes(content)
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(bad / "float.tiff")
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(bad / "long.tiff")
    with pytest.raises(ValueError) as refusal:
        fm.load_folder(str(bad), str(tmp_path), 8)
    assert all(str(file) in str(refusal.value) for file in bad.iterdir())
    assert len(list(tmp_path.glob("*.npy"))) == 1 and not list(tmp_path.glob("tmp-*"))


@pytest.mark.parametrize("link, says", [("nowhere.png", "x.png"), ("..", "x.png"), ("", "train")])
def test_broken_links_circles_and_splits_are_refused(link, says, tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / "set" / split)
    if link:
        (tmp_path / "set" / "train" / "x.png").symlink_to(link)
    with pytest.raises(ValueError, match=says):
        fm.load_folder(str(tmp_path / "set"), str(tmp_path), 8)


def test_a_grey_flat_folder_has_one_channel_and_no_labels(tmp_path):
    for i in range(3):
        Image.new("L", (5, 9), 40 * i).save(tmp_path / f"{i}.png")
    old, new = (tmp_path / f"cache/tmp-{age}-{tmp_path.name}-4-x.npy" for age in ("old", "new"))
    old.parent.mkdir()
    for file, age in ((old, 2e5), (new, 0)):
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    images, labels, names = fm.load_folder(str(tmp_path), str(tmp_path / "cache"), 4)
    assert images.shape == (3, 1, 4, 4) and names == [] and labels.tolist() == [0, 0, 0]
    assert images[:, 0, 0, 0].tolist() == [0, 40, 80]
    assert new.exists() and not old.exists()  # of a killed process; the new one may be writing


def write_mnist(raw, prefix, n):
    rng = np.random.default_rng(n)
    raw.mkdir(parents=True, exist_ok=True)
    for kind, shape, high in (("images-idx3", (n, 28, 28), 256), ("labels-idx1", (n,), 10)):
        header = np.array([0x800 + len(shape), *shape], ">u4").tobytes()
        yield (data := rng.integers(0, high, shape, np.uint8))
        (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + data.tobytes())


def test_torchvision_sets_load_from_files_in_their_own_format(tmp_path, monkeypatch):
    for name, kind in (("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")):
        written = [[*write_mnist(tmp_path / kind / "raw", prefix, n)]
                   for prefix, n in (("train", 2100), ("t10k", 7))]
        for test, (images, labels) in enumerate(written):
            mine, y, names = fm.load_data(name, str(tmp_path), 28, bool(test))
            assert np.array_equal(mine[:, 0], images) and y.tolist() == labels.tolist()
        assert len(names) == 10 and fm.load_data(name, str(tmp_path), 32)[0].shape[2:] == (32, 32)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), np.uint8)
    for i, batch in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / batch).write_bytes(pickle.dumps({"data": pixels[i], "labels": [3, i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    mine, y, names = fm.load_data("cifar10", str(tmp_path), 32)
    assert y.tolist() == [3, 0, 3, 1, 3, 2, 3, 3, 3, 4] and names[3] == "d"
    assert np.array_equal(mine.flatten(1), pixels[:5].reshape(10, -1))
    assert np.array_equal(fm.load_data("cifar10", str(tmp_path), 32, True)[0].flatten(1), pixels[5])


# §1-§8: what the functions refuse ---------------------------------------------------------------


def half(x, t):
    return x[:, :1]


def fit(images):
    return fm.fit_gaussian(images, lambda part: 1 / (part.flatten(1).float() - 8))


@pytest.mark.parametrize("call, error, says", [
    (lambda: fm.odeint(lambda x, t: x / 0, X_0, solver="dopri5"), FloatingPointError, "not finite"),
    (lambda: fm.odeint(lambda x, t: x * math.nan, X_0), FloatingPointError, "not finite"),
    (lambda: fm.odeint(lambda x, t: x**2, times(1)[None], 0, 2, "dopri5"),  # leaves at t = 1
     FloatingPointError, "dopri5 failed"),
    (lambda: fm.odeint(swing, X_0, steps=0), ValueError, "steps"),
    (lambda: fm.odeint(swing, X_0, solver="heun"), ValueError, "heun"),
    (lambda: fm.odeint(swing, X_0.long()), ValueError, "int64"),
    (lambda: fm.odeint(swing, X_0 + 0j), ValueError, "complex"),
    (lambda: fm.odeint(half, X_0), ValueError, r"\(3, 1\).*\(3, 2\)"),
    (lambda: fm.odeint(half, X_0, solver="dopri5"), ValueError, r"\(3, 1\).*\(3, 2\)"),
    (lambda: fm.cfm_loss(half, fm.ot_path, X_0), ValueError, "velocity"),
    (lambda: fm.log_likelihood(half, X_0), ValueError, "velocity"),
    (lambda: fm.ot_coupling(X_0, X_0[:2]), ValueError, "shape"),
    (lambda: fm.UNet(1, 18, 8, (1, 1, 1)), ValueError, "multiples of 4"),
    (lambda: fm.UNet(1, 8, 8, (1, 1, 1))(torch.ones(1, 1, 10, 8), torch.ones(1)), ValueError,
     "10 x 8.*multiples of 4"),
    (lambda: fm.frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2) * np.nan),
     ValueError, None), (lambda: fm.frechet_distance(np.zeros(2) * np.nan, np.eye(2), np.zeros(2),
                                                   np.eye(2)), ValueError, None),
    (lambda: fit([]), ValueError, "two images"), (lambda: fit([numbers(1)]), ValueError, "two im"),
    (lambda: fit([numbers(4), numbers(9)]), ValueError, "not finite"),
    (lambda: fit([numbers(4).float()]), ValueError, "float32"),
    (lambda: fit([numbers(4)[0]]), ValueError, r"\(1, 1, 1\)")])
def test_a_wrong_call_and_a_solve_that_fails_say_so(call, error, says):
    with pytest.raises(error, match=says):
        call()


# §9  Training -----------------------------------------------------------------------------------

ARROWS = (torch.arange(50).view(50, 1, 1, 1) * torch.tensor([[4, 1], [3, 0]])).byte()


def draw(step=1, **more):
    """A batch of ARROWS, none but the first like its mirror image, of classes a, b, a, b..."""
    c = config(**dict(names=list("ab"), label_drop=0.0) | more)
    return fm.draw_batch(ARROWS, torch.arange(50) % 2, c, step, CPU)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    assert all(map(torch.equal, draw(5, seed=3), draw(5, seed=3)))
    others = [draw(step, seed=seed) for seed, step in (
        (3, 5), (3, 6), (4, 5), (4, 4), (2, 6), (5, 3), (4099, 5), (3, 4101))]
    assert all(len({batch[part].flatten()[0].item() for batch in others}) == 8 for part in (2, 3))


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_has_every_image_with_its_label_mirrored_only_if_asked(flip):
    x_1, y, _, _ = draw(batch=4000, flip=flip)
    which = (fm.to_uint8(x_1).flatten(1).amax(1) / 4).long()
    assert torch.equal(which % 2, y)
    assert (torch.bincount(which, minlength=50) - 80).abs().max() < 45  # 5 standard errors
    plain, mirrored = ((fm.to_uint8(x_1) == images[which]).flatten(1).all(1)
                       for images in (ARROWS, ARROWS.flip(3)))
    assert (plain | mirrored).all() and (plain.all() or flip)
    assert not flip or abs(plain[which > 0].float().mean() - 0.5) < 0.04  # 5 standard errors


def test_a_batch_couples_within_classes_and_drops_labels_sample_by_sample():
    apart, coupled = (draw(batch=60, coupling=coupling) for coupling in ("independent", "ot"))
    assert torch.equal(apart[2].sort(0)[0], coupled[2].sort(0)[0])
    for (x_1, y, x_0, _), best in ((apart, False), (coupled, True)):
        assert torch.equal(fm.ot_coupling(x_0, x_1, y), x_0) == best
        assert not torch.equal(fm.ot_coupling(x_0, x_1), x_0)
    shares = torch.bincount(draw(batch=2000, label_drop=0.2)[1], minlength=3) / 2000
    assert (shares - torch.tensor([0.4, 0.4, 0.2])).abs().max() < 0.05  # 4 standard errors


@pytest.mark.parametrize("time_, cdf", [("uniform", scipy.stats.uniform.cdf), (
    "logit-normal", lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t))))])
def test_the_density_of_the_times(time_, cdf):
    t = draw(time=time_, batch=20_000)[3]
    assert t.min() >= 0 and t.max() <= 1
    assert scipy.stats.kstest(t.double().numpy(), cdf).pvalue > 1e-3  # one fixed draw


def muon(kernels, lr=0.01):
    shapes = {p.shape: [q for q in kernels if q.shape == p.shape] for p in kernels}
    return fm.Muon([dict(params=group) for group in shapes.values()], dict(lr=lr))


def is_hidden(p):
    return p.dim() == 4 and min(p.shape[:2]) >= 16


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three steps on the digits by each path, with every choice that a step has: the folders."""
    out = {name: tmp_path_factory.mktemp("models") / name for name in fm.PATHS}
    for name in out:
        run(f"train --path {name} --optimizer {'muon' if name == 'ot' else 'adamw'} --classes"
            " --flip --coupling ot --label-drop 0.3 --seed 70003 --size 8 --width 8 --mults 1,2"
            " --lr 0.1 --attention none --steps 3 --warmup 2 --clip 0.2 --batch 32 --ema 0.22"
            " --device cpu --out", out[name])
    return out


@ALL_PATHS
def test_the_steps_of_train_are_the_gradient_steps_of_eq_14_written_out_by_hand(models, name):
    checkpoint, (images, labels, names) = load(models[name]), fm.draw_digits(20_000, 8)
    c = argparse.Namespace(**checkpoint["config"])
    assert c.data_rms == approx(fm.to_float(images).square().mean().sqrt().item(), rel=0.01)
    assert (c.path, c.coupling, c.flip, c.names) == (name, "ot", True, names)
    torch.manual_seed(70003)
    velocity, rms = fm.Velocity(c), c.data_rms
    average = [p.detach().clone() for p in velocity.parameters()]
    turned = [p for p in velocity.parameters() if name == "ot" and is_hidden(p)]
    others = [p for p in velocity.parameters() if not (name == "ot" and is_hidden(p))]
    optimizers = [torch.optim.AdamW(others, weight_decay=0), *([muon(turned)] if turned else [])]
    for step, rate in ((1, 0.1 / 2), (2, 0.1 * 2 / 3), (3, 0.1 / 3)):  # up, then down to 0
        x_1, y, x_0, t = fm.draw_batch(images, labels, c, step, CPU)
        alpha, sigma, d_alpha, d_sigma = (part[:, None, None, None] for part in (
            *schedule(name, t.double()), *slopes(name, t.double())))
        x, u = alpha * x_1 + sigma * x_0, d_alpha * x_1 + d_sigma * x_0
        c_in, skip, left = 1, 0, torch.ones(())
        if name != "ot":  # the best linear predictor of u from x, and the variance that it leaves
            power = (alpha * rms) ** 2 + sigma**2
            c_in, skip = power**-0.5, (alpha * d_alpha * rms**2 + sigma * d_sigma) / power
            left = (d_alpha * rms) ** 2 + d_sigma**2 - skip**2 * power
        v = skip * x + left**0.5 * velocity.net((c_in * x).float(), t, y)
        velocity.zero_grad()
        ((v - u) ** 2 / left).mean().backward()
        assert nn.utils.clip_grad_norm_(velocity.parameters(), 0.2) > 0.2
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        d = min(0.22, (1 + step) / (10 + step))
        for mean, p in zip(average, velocity.parameters(), strict=True):
            mean.mul_(d).add_(p.detach(), alpha=1 - d)
    for part, expected in (("model", velocity.parameters()), ("ema", average)):
        expected = torch.cat([p.detach().flatten() for p in expected])
        got = torch.cat([p.flatten() for p in checkpoint[part].values()])
        off = ~torch.isclose(got, expected, rtol=1e-4, atol=1e-6)
        # where a gradient's sum cancels, AdamW divides what is left, rounding, by its own size
        assert off.float().mean() < 2e-3


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
    for gradients in (spectral, double(3, *shape, seed=5)):
        momenta = 0.9 * momenta + 0.1 * gradients
        before = [W.detach().clone() for W in kernels]
        for W, gradient in zip(kernels, gradients, strict=True):
            W.grad = gradient.clone()
        optimizer.step()
        for W, old, g in zip(kernels, before, 0.9 * momenta + 0.1 * gradients, strict=True):
            step, s = orthogonal_by_svd(g.flatten(1))
            step = step.view(shape) * 0.2 * max(g.flatten(1).shape) ** 0.5
            close(old - W.detach(), 0.01 * step, rtol=1e-7, atol=1e-10)
            assert gradients is not spectral or 0.68 < s.min() and s.max() < 1.21
            assert gradients is spectral or shape[2] == 1 or (
                step.square().mean().sqrt() == approx(0.2, rel=0.2))
    still = W.detach().clone()
    W.grad.zero_()
    muon([W]).step()
    assert torch.equal(W, still)  # and not NaN


def test_training_lowers_the_loss_and_leaves_pictures(tiny):
    first, *_, a, b, c = [loss for _, loss in losses(tiny[1])]
    assert [step for step, _ in losses(tiny[1])] == [*range(3, 25, 3)]
    assert np.mean([a, b, c]) < 0.9 * first
    files = ["checkpoint.pt", "log.jsonl", "step-000024.png"]
    assert sorted(f.name for f in tiny[1].iterdir()) == files
    with Image.open(tiny[1] / files[2]) as picture:
        assert picture.width == picture.height >= 512


def test_a_killed_run_resumes_to_bit_identical_weights_with_each_step_once(
        tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        at_loss(patch, {20: kill})
        run(tiny[0], "--save-every", 12, "--out", tmp_path)
    assert load(tmp_path)["step"] == 12 and losses(tmp_path)[-1][0] == 18
    run(RESUME, tmp_path)
    assert same(tiny[1], tmp_path) and losses(tmp_path) == losses(tiny[1])
    assert not list(tmp_path.glob("tmp-*"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on_and_a_second_one_stops_at_once(
        tiny, tmp_path, monkeypatch, capsys, name):
    number = getattr(signal, name)
    before = signal.signal(number, kill)
    try:
        for count, error in ((1, SystemExit), (2, Stop)):
            with monkeypatch.context() as patch, pytest.raises(error) as stop:
                at_loss(patch, {20: lambda loss, count=count: [
                    signal.raise_signal(number) for _ in range(count)] and loss})
                run(tiny[0], "--out", tmp_path / str(count))
            assert signal.getsignal(number) == kill  # is put back
            assert count == 2 or stop.value.code == 128 + number
    finally:
        signal.signal(number, before)
    assert load(tmp_path / "1")["step"] == 20 and not (tmp_path / "2" / "checkpoint.pt").exists()
    assert f"train --resume --out {tmp_path / '1'}" in capsys.readouterr().out
    run(RESUME, tmp_path / "1")
    assert same(tiny[1], tmp_path / "1")


DRIVER = f"""
import os, signal, sys
sys.path[:0] = {str(SCRIPT.parent)!r}, {str(Path(__file__).parent)!r}
import pytest, flow_matching as fm
from {Path(__file__).stem} import at_loss
last = int(sys.argv.pop(1))
at_loss(pytest.MonkeyPatch(), {{last: lambda loss: os.kill(os.getpid(), signal.SIGKILL)}})
fm.main()
"""


def test_two_ranks_that_are_killed_go_on_bit_by_bit_and_on_one_rank_to_rounding(tiny, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)

    def torchrun(last, *more):
        """Two ranks, which kill themselves at their loss number `last`: status and output."""
        flags = "-m torch.distributed.run --standalone --nproc-per-node=2"
        command = [sys.executable, *flags.split(), tmp_path / "driver.py", last, *more]
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT, timeout=300)
        return done.returncode, done.stdout

    command = [*tiny[0].split(), "--dropout", 0, "--save-every", 12]  # its masks differ by rank
    whole, killed, moved, one = (tmp_path / name for name in ("whole", "killed", "moved", "one"))
    status, said = torchrun(0, *command, "--out", whole)
    assert status == 0 and said.count("step 24/24") == 1, said  # rank 0 speaks
    assert torchrun(20, *command, "--out", killed)[0] != 0 and load(killed)["step"] == 12
    shutil.copytree(killed, moved)
    status, said = torchrun(0, *RESUME.split(), killed)
    assert status == 0 and same(whole, killed), said
    assert losses(killed) == losses(whole) and len(losses(whole)) == 8
    run(RESUME, moved)
    run(tiny[0], "--dropout", 0, "--out", one)
    for out in (moved, one):
        # float32 sums in another order differ by 1e-7; 24 steps at a high rate amplify that.
        np.testing.assert_allclose(losses(out), losses(whole), rtol=1e-4)


@pytest.fixture
def become(monkeypatch):
    """become(rank) makes this process a rank of two, alone: a list of what it waits for."""
    def become(rank):
        waits = []
        for key in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(key, str(rank))
        for name, value in dict(init_process_group=None, get_rank=rank, get_world_size=2,
                                all_reduce=None, destroy_process_group=None).items():
            monkeypatch.setattr(torch.distributed, name, lambda *_, value=value, **__: value)
        monkeypatch.setattr(torch.distributed, "barrier", lambda: waits.append("barrier"))
        monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **_: model)
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # which a rank closes
        return waits

    return become


def test_dropout_differs_between_ranks_and_steps(tiny, tmp_path, monkeypatch, become):
    """The same samples at all steps and ranks, and weights that stand still: only masks differ."""
    checkpoint, seen, first = load(tiny[1]), [], fm.draw_batch
    checkpoint["config"] |= dict(lr=1e-12, steps=27)
    monkeypatch.setattr(fm, "draw_batch", lambda images, labels, c, step, device: [
        torch.cat([part[:4]] * 2) for part in first(images, labels, c, 1, device)])
    at_loss(monkeypatch, {n: lambda loss: seen.append(loss.item()) or loss for n in range(1, 7)})
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        torch.save(checkpoint, tmp_path / str(rank) / "checkpoint.pt")
        become(rank)
        fm.main([*RESUME.split(), str(tmp_path / str(rank))])
    assert len(seen) == len(set(seen)) == 6


@pytest.mark.parametrize("rank, order", [(0, ["data", "barrier"]), (1, ["barrier", "data"])])
def test_the_first_rank_decodes_while_the_others_wait_and_a_batch_must_divide(
        rank, order, tiny, tmp_path, monkeypatch, become):
    waits, load_data = become(rank), fm.load_data
    monkeypatch.setattr(fm, "load_data", lambda *args: waits.append("data") or load_data(*args))
    assert "2 ranks" in refuse(tiny[0], "--batch", 7, "--out", tmp_path) and waits == order


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA"))])
def test_amp_trains_with_float32_weights(tiny, tmp_path, amp, device):
    run(tiny[0], "--amp", amp, "--device", device, "--no-compile", "--out", tmp_path)
    checkpoint, (first, *_, last) = load(tmp_path), [loss for _, loss in losses(tmp_path)]
    assert last < 0.9 * first and abs(first / losses(tiny[1])[0][1] - 1) < 0.1
    assert losses(tmp_path) != losses(tiny[1])  # matrix work was done in amp
    assert {p.dtype for k in ("model", "ema") for p in checkpoint[k].values()} == {torch.float32}
    assert bool(checkpoint["scaler"]) == (amp == "fp16")


def test_fp16_gradients_are_clipped_at_their_true_norm(tiny, tmp_path, monkeypatch):
    """The norm that is clipped is float32's to fp16 rounding, not 65536 times it."""
    norms, clip = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_",
                        lambda *args: norms.append(clip(*args)) or norms[-1])
    for amp in ("off", "fp16"):
        run(f"{tiny[0]} --steps 1 --clip 1000 --amp {amp} --out", tmp_path / amp)
    assert norms[1] == approx(norms[0].item(), rel=0.02) and norms[0] != norms[1]


def test_an_fp16_overflow_is_skipped_and_its_scale_is_resumed(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_loss(patch, {5: lambda loss: loss * math.inf})
        run(tiny[0], "--amp", "fp16", "--steps", 6, "--out", tmp_path)
    first = load(tmp_path)
    assert all(p.isfinite().all() for p in first["ema"].values())
    assert first["scaler"]["scale"] < 65536  # the initial scale, halved once or more
    run(RESUME, tmp_path, "--steps", 7)
    grown = first["scaler"] | {"_growth_tracker": first["scaler"]["_growth_tracker"] + 1}
    assert load(tmp_path)["scaler"] == grown


@pytest.mark.parametrize("bad, amp, says, kept", [
    ([8], "off", "step 8 is not finite", 6), ([11], "", "not finite", 6),
    (range(7, 25), "fp16", "step 22 is not finite", 18)])  # 65536 halved 16 times is 1
def test_what_is_not_finite_names_the_step_and_keeps_the_checkpoint(
        bad, amp, says, kept, tiny, tmp_path, monkeypatch):
    """A gradient; weights gone bad under finite gradients; fp16 that overflows at any scale."""
    def spoil(loss):
        if amp:
            return loss * math.nan
        monkeypatch.setattr(fm.Muon, "step", lambda self: [
            p.data.fill_(math.nan) for group in self.param_groups for p in group["params"]])
        return loss

    at_loss(monkeypatch, dict.fromkeys(bad, spoil))
    assert says in refuse(tiny[0], "--save-every", 6, "--amp", amp or "off", "--out", tmp_path)
    assert load(tmp_path)["step"] == kept
    assert all(p.isfinite().all() for p in load(tmp_path)["ema"].values())


def test_a_checkpoint_is_flushed_beside_the_old_one_and_then_renamed(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny[1], tmp_path, dirs_exist_ok=True)
    file, flushed, fsync = tmp_path / "checkpoint.pt", {}, os.fsync
    os.link(file, tmp_path / "old")
    before = file.read_bytes()

    def watch(descriptor):
        assert file.read_bytes() == before  # the old one is there, whole, until the end
        flushed[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    run(RESUME, tmp_path, "--steps", 25)
    assert flushed[file.stat().st_ino] == file.stat().st_size and load(tmp_path)["step"] == 25
    assert (tmp_path / "old").read_bytes() == before and not list(tmp_path.glob("tmp-*"))


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tiny, tmp_path):
    """A limit on the size of files stands in for it: the second checkpoint does not fit."""
    out = shutil.copytree(tiny[1], tmp_path / "run")
    before = (out / "checkpoint.pt").read_bytes()
    with limit("RLIMIT_FSIZE", len(before) // 2):
        error = refuse(RESUME, out, "--steps", 25)
    assert "disk" in error and str(out) in error
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob("tmp-*"))


def test_out_of_memory_names_the_flags_to_lower(tiny, tmp_path):
    """A batch of 32 million images of 32 x 32 wants 34 GB for their bytes alone."""
    with limit("RLIMIT_DATA", 30 * 2**30):
        error = refuse(tiny[0], "--batch", 2**25, "--size", 32, "--out", tmp_path)
    assert "out of memory: lower --batch" in error


def test_rates_and_the_time_left_are_of_this_run_also_after_a_resume(tiny, tmp_path, monkeypatch):
    """By a clock that each step moves by two seconds."""
    clock = [0.0]

    def advance(seconds=1e-6):
        clock[0] += seconds
        return clock[0]

    monkeypatch.setattr(time, "perf_counter", advance)
    at_loss(monkeypatch, dict.fromkeys(range(99), lambda loss: advance(2) and loss))
    said = run(tiny[0], "--steps", 9, "--out", tmp_path) + run(RESUME, tmp_path, "--steps", 27)
    for step, left in (("3/9", "0:00:12"), ("9/9", "0:00:00"), ("12/27", "0:00:30")):
        assert re.search(rf"step {step}  4 images/s  {left} left  loss", said), said
    rates = [row["images_per_second"] for row in rows(tmp_path / "log.jsonl")]
    assert rates == approx([4] * 9, rel=1e-4)


# §10  The theory, drawn -------------------------------------------------------------------------


def test_ot_needs_60_percent_of_vp_evaluations_under_the_paper_s_conditions():
    """Fig. 7 on the exact field: eight Gaussians by Euler; bands are the spread over particles.

    On a checkerboard other solvers see it: with 1,000 particles Euler 239%, midpoint 59%, rk4 45%.
    """
    angles, side = torch.arange(8) * math.pi / 4, torch.arange(16) * 0.25 - 1.875
    table = fm.measure_paths(2 * torch.stack([angles.cos(), angles.sin()], 1), 0.1, particles=400)
    assert 0.52 < fm.evaluations_ratio(table) < 0.68
    assert all(error < table["vp", solver, nfe][1] for (name, solver, nfe), (_, error)
               in table.items() if (name, solver) == ("ot", "euler"))
    finest = [landed for (_, _, nfe), (landed, _) in table.items() if nfe == 100]
    # 98.9% of a 2-D Gaussian lie within 3 tau; 400 particles: 0.5% standard error
    assert len(finest) == 9 and all(abs(landed - 0.989) < 0.02 for landed in finest)
    points = torch.cartesian_prod(side, side)
    table = fm.measure_paths(points[(points + 2).floor().sum(1) % 2 == 1], 0.1, particles=200)
    for solver, low, high in (("euler", 1.9, 2.9), ("midpoint", 0.4, 0.7), ("rk4", 0.38, 0.5)):
        assert low < fm.evaluations_ratio(table, solver) < high, solver
    known = {(name, "euler", n): (1.0, (scale * n) ** -2.0)
             for name, scale in (("ot", 2), ("vp", 1)) for n in (8, 16, 32, 64)}
    assert fm.evaluations_ratio(known) == approx(0.5)


def test_paths_draws_the_data_where_it_is_and_prints_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fm, "measure_paths", functools.partial(fm.measure_paths, particles=50))
    row = r"^(euler|midpoint|rk4) +\d+( +\d+\.\d%  \d\.\de.\d\d){3}$"
    assert len(re.findall(row, run("paths"), re.M)) == 18
    height, width = np.asarray(Image.open("paths.png")).shape[:2]
    assert height > 900 and width > 1500 and "--overwrite" in refuse("paths --out paths.png")
    picture = np.asarray(fm.draw_paths(torch.tensor([[2.0, 1.0]]), 0.1).convert("L"))
    ot = picture[30 : height // 3]  # without its title, at t = 0 and at t = 1
    (y, x), (y_0, x_0) = (np.argwhere(panel < 60).mean(0) / panel.shape
                          for panel in (ot[:, -(width // 5) :], ot[:, : width // 5]))
    assert x > 0.6 and y < 0.4 and abs(x_0 - 0.5) < 0.05 and abs(y_0 - 0.45) < 0.1


# §11  Command line ------------------------------------------------------------------------------


@ALL_PATHS
def test_sample_is_midpoint_from_the_prior_by_hand_with_classes_and_guidance(
        models, name, tmp_path):
    v, n, images = averaged(models[name]), 12, {}
    sigma_0 = {"ot": 1, "vp": math.sqrt(1 - math.exp(-10.05)), "ve": 50}[name]
    for label, scale in (("", 1), ("", 2.5), ("7", 2.5), ("7", 0)):
        x, y = sigma_0 * fm.draw_noise(5, range(n), (1, 8, 8)), torch.arange(n) % 10
        y = torch.full((n,), int(label)) if label else y

        def u(x, t, y=y, scale=scale):
            return v(x, t, None) + scale * (v(x, t, y) - v(x, t, None))

        for i in range(20):
            t, h = torch.full((n,), i / 20), 1 / 20
            x = x + h * u(x + h / 2 * u(x, t), t + h / 2)
        expected = ((x.clamp(-1, 1) + 1) * 127.5).round()[:, 0].numpy()
        said = run(f"sample --n 12 --seed 5 --steps 20 --ckpt {models[name] / 'checkpoint.pt'}",
                   *(["--label", label] if label else []), "--guidance", scale,
                   "--out", tmp_path / f"{label}-{scale}")
        made = pngs(tmp_path / f"{label}-{scale}")
        assert list(made) == [f"{i:06d}-{y[i]}" for i in range(n)]
        images[label, scale] = np.stack([*made.values()])
        assert np.abs(images[label, scale] - expected).max() <= 1 and expected.std() > 10
        assert f"NFE {40 if scale == 1 else 80}," in said
    assert all(np.abs(images["", 2.5] - images[key]).max() > 2 for key in (("", 1), ("7", 2.5)))


@ALL_PATHS
def test_nll_is_the_likelihood_by_hand_of_images_of_its_split(models, name, tmp_path, monkeypatch):
    """The draws of an image share their signs: else log mean exp takes their noise for density.

    On trained digits at K = 5: exact 1.487 bits/dim, signs shared 1.480 ± 0.013, own 1.398 ± 0.006.
    """
    seen, original, file = [], fm.log_likelihood, tmp_path / "rows"
    monkeypatch.setattr(fm, "log_likelihood", lambda v, x, path, probes, **solver: (
        seen.append((x, probes[0])) or original(v, x, path, probes, **solver)))
    command = f"nll --n 3 --k 4 --solver rk4 --steps 5 --ckpt {models[name] / 'checkpoint.pt'}"
    run(command, "--batch", 5, "--results", file)
    x, signs = (torch.cat(part) for part in zip(*seen, strict=True))
    log_p, nfe = original(averaged(models[name]), x, fm.PATHS[name], [signs], solver="rk4", steps=5)
    bits = 7 - (log_p.reshape(3, 4).double().logsumexp(1) - math.log(4)) / (64 * math.log(2))
    run(command, "--results", file)  # in one batch
    for row in rows(file):
        assert row["bits_per_dim"] == approx(bits.mean().item(), rel=1e-5)
        assert row["standard_error"] == approx(bits.std().item() / 3**0.5, rel=1e-3)
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
    checkpoint, folder = load(models[name]), write_folder(tmp_path / "set")
    for part in ("weight", "bias"):
        checkpoint["ema"][f"net.out.{part}"].zero_()
    torch.save(checkpoint, tmp_path / "still.pt")
    alpha, sigma = schedule(name, times(0, 1 - 1e-5))
    power = ((alpha * checkpoint["config"]["data_rms"]) ** 2 + sigma**2).sqrt()
    s = 1 if name == "ot" else (sigma[0] * power[1] / power[0]).item()
    command = f"nll --ckpt {tmp_path / 'still.pt'} --n 999 --data-dir {tmp_path} --solver rk4"
    run(command, "--steps", 2 if name == "ot" else 60, "--reference", folder)
    for more in ([], ["--exact", "--batch", 3]):  # as isotropic, Hutchinson's estimate is exact
        run(command, "--steps", 1, "--reference", write_folder(tmp_path / "four", n=4), *more)
    row, hutchinson, exact = rows(tmp_path / "results.jsonl")
    k = fm.load_folder(str(folder), str(tmp_path), 8)[0].double().flatten(1)
    second = ((k + 0.5) / 128 - 1).square().mean(1) + 1 / (12 * 128**2)
    each = 7 + second / (2 * s**2 * math.log(2)) + 0.5 * math.log2(2 * math.pi * s**2)
    assert row["bits_per_dim"] == approx(each.mean().item(), abs=2e-4)
    assert row["standard_error"] == approx(each.std().item() / 24**0.5, rel=1e-2)
    assert row["n"] == 24 and exact["bits_per_dim"] == approx(hutchinson["bits_per_dim"], abs=1e-4)


@ALL_PATHS
def test_fid_is_the_distance_of_the_images_that_sample_writes(models, name, tmp_path, monkeypatch):
    """tr √(S_1 S_2) by the eigenvalues of the product; the reference is kept until it changes."""
    model = f"--ckpt {models[name] / 'checkpoint.pt'} --n 9 --seed 3 --solver euler --guidance 2"
    calls, pixels, folder = [], fm.pixels, write_folder(tmp_path / "set", n=30)
    monkeypatch.setattr(fm, "pixels", lambda part: calls.append(len(part)) or pixels(part))
    fid = f"fid --features pixels {model} --results {tmp_path / 'rows'} --data-dir {tmp_path}"
    for reference, count in (("train", 20_009), ("test", 20_009), (folder, 39), (folder, 9)):
        calls.clear()
        said = run(fid, "--batch", 4, "--steps", 3, "--reference", reference)
        assert sum(calls) == count and "not comparable" in said and "covariance is singular" in said
    Image.new("L", (8, 8), 7).save(folder / "class0" / "000.png")
    run(fid, "--steps", "2,3", "--reference", folder)
    run(f"sample {model} --batch 4 --steps 3 --out", tmp_path / "made")
    made = torch.from_numpy(np.stack([*pngs(tmp_path / "made").values()]))
    expected = []
    for real in (*(fm.draw_digits(20_000, 8, seed)[0] for seed in (0, 1)),
                 fm.load_folder(str(folder), str(tmp_path), 8)[0]):
        a, b = (x.flatten(1).double() / 127.5 - 1 for x in (made, real))
        A, B, shift = torch.cov(a.T), torch.cov(b.T), a.mean(0) - b.mean(0)
        root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
        expected.append((shift @ shift + (A + B).trace() - 2 * root).item())
    got = [row["frechet_distance"] for row in rows(tmp_path / "rows")]
    assert [got[0], got[1], got[5]] == approx(expected, abs=3e-5)
    assert abs(got[0] - got[1]) > 1e-4 and got[2] == got[3] != got[5] != got[4]
    assert [row["nfe"] for row in rows(tmp_path / "rows")] == [6, 6, 6, 6, 4, 6]
    assert [row["n_reference"] for row in rows(tmp_path / "rows")] == [20_000] * 2 + [30] * 4


def test_fid_with_inception_says_what_it_compared(models, inception_file, tmp_path):
    """By factors: tr √(S_1 S_2) is the sum of the singular values of C_1ᵀ C_2, here 4 × 4."""
    folder = write_folder(tmp_path / "set", n=4)
    model = f"--ckpt {models['ot'] / 'checkpoint.pt'} --n 4 --steps 2"
    run(f"sample {model} --out", tmp_path / "made")
    said = run(f"fid {model} --data-dir {tmp_path} --results {tmp_path / 'rows'}", "--inception",
               inception_file, "--reference", folder)
    made = torch.from_numpy(np.stack([*pngs(tmp_path / "made").values()])).byte()[:, None]
    f = [fm.inception(inception_file)(images).double()
         for images in (made, fm.load_folder(str(folder), str(tmp_path), 8)[0])]
    C = [(x - x.mean(0)) / 3**0.5 for x in f]
    expected = (f[0].mean(0) - f[1].mean(0)).square().sum() + sum(c.square().sum() for c in C)
    expected -= 2 * torch.linalg.svdvals(C[0] @ C[1].T).sum()
    distance = rows(tmp_path / "rows")[0]["frechet_distance"]
    assert distance == approx(expected.item(), rel=1e-3)
    assert f"FID {distance:.4f}" in said and "not comparable" in said and "singular" in said
    assert "4 made, 4 of" in said


@pytest.mark.parametrize("kind, n, columns", [("tiny", 9, 3), ("ot", 20, 10)])
def test_a_grid_has_the_images_in_order_for_any_batch_size(
        tiny, models, kind, n, columns, tmp_path):
    out = models.get(kind, tiny[1])
    common = f"sample --ckpt {out / 'checkpoint.pt'} --n {n} --seed 5 --steps 3 --out"
    run(common, tmp_path / "folder")
    run(common, tmp_path / "grid.png", "--batch", 4)
    images = np.stack([*pngs(tmp_path / "folder").values()])
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L")).astype(int)
    scale = grid.shape[1] // (9 * columns + 1)  # of a pixel; a line of one between images of 8
    grid = grid[scale // 2 :: scale, scale // 2 :: scale]
    assert grid.shape == (9 * n // columns + 1, 9 * columns + 1)
    for i, image in enumerate(images):
        y, x = 9 * (i // columns) + 1, 9 * (i % columns) + 1
        assert np.abs(grid[y : y + 8, x : x + 8] - image).max() <= 1
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
        assert re.search(rf"NFE {nfe}, amp {amp}\b", said), said


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


def test_nothing_already_written_is_overwritten_unless_asked(tiny, tmp_path, monkeypatch):
    base = f"sample --ckpt {tiny[1] / 'checkpoint.pt'} --n 1 --steps 1 --out"
    folder = tmp_path / "folder"
    for out in (tmp_path / "x.png", folder):
        run(base, out)
        assert "--overwrite" in refuse(base, out)
    for name in ("2026-holiday.png", "000007.png"):  # somebody's, and one of an earlier run
        (folder / name).write_text("mine")
    for out in (tmp_path / "x.png", folder):
        run(base, out, "--overwrite")
    assert sorted(f.name for f in folder.iterdir()) == ["000000.png", "2026-holiday.png"]
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text("somebody's\n")
    assert "--overwrite" in refuse(tiny[0], "--out", out)
    assert (out / "log.jsonl").read_text() == "somebody's\n"
    shutil.copytree(tiny[1], out, dirs_exist_ok=True)
    with monkeypatch.context() as patch, pytest.raises(Stop):  # a killed one does not go on with
        at_loss(patch, {1: kill})  # the old run
        run(tiny[0], "--out", out, "--overwrite")
    assert "no checkpoint" in refuse(RESUME, out, "--steps", 99)
    shutil.copytree(tiny[1], out, dirs_exist_ok=True)
    run(tiny[0], "--out", out, "--overwrite", "--steps", 3)
    assert load(out)["step"] == 3
    assert {f.name for f in out.iterdir()} == {"checkpoint.pt", "log.jsonl", "step-000003.png"}


@pytest.mark.parametrize("change", [dict(classes=3), dict(mode="RGB")])
def test_a_run_whose_data_changed_is_not_resumed(change, tmp_path):
    folder, out = write_folder(tmp_path / "set"), tmp_path / "run"
    run(TINY, "--data", folder, "--data-dir", tmp_path, "--classes", "--steps", 1, "--out", out)
    write_folder(folder, **change)
    assert "channels or classes" in refuse(RESUME, out, "--steps", 2)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


@pytest.fixture(scope="module")
def bad(tiny, models, tmp_path_factory):
    """A directory of what is bad: NAME.pt are checkpoints, folders hold images."""
    root, whole = tmp_path_factory.mktemp("bad"), (tiny[1] / "checkpoint.pt").read_bytes()
    for folder in ("empty", "flat", "images"):
        (root / folder).mkdir()
    write_folder(root / "one", n=1)
    (write_folder(root / "broken") / "0.png").write_bytes(b"not a png")
    Image.new("RGB", (8, 8)).save(write_folder(root / "colour") / "0.tiff")
    Image.new("L", (8, 8)).save(root / "flat" / "0.png")
    shutil.copytree(tiny[1], root / "run")
    checkpoint, digits = load(tiny[1]), load(models["ot"])
    middle = whole.index(next(iter(checkpoint["ema"].values())).numpy().tobytes())
    flipped = bytes([whole[middle] ^ 1])  # one bit of one weight
    for name, content in {
            "images/000000.png": b"old", "other.pth": b"other", "empty.pt": b"",
            "text.pt": b"hello", "truncated.pt": whole[: len(whole) // 2],
            "damaged.pt": whole[:middle] + flipped + whole[middle + 1 :]}.items():
        (root / name).write_bytes(content)
    for name, content in {
            "pickle.pth": {"model": Payload()}, "pickle.pt": {"model": Payload()},
            "list.pt": [1, 2], "foreign.pt": {"state_dict": {}},
            "config.pt": checkpoint | {"config": {"path": "ot"}},
            "shapes.pt": checkpoint | {"ema": {k: p[:1] for k, p in checkpoint["ema"].items()}},
            "nan.pt": checkpoint | {"ema": {k: p * math.nan for k, p in checkpoint["ema"].items()}},
            "lr.pt": checkpoint | {"config": checkpoint["config"] | {"lr": "fast"}},
            "stepless.pt": checkpoint | {"step": None}, "tiny.pt": checkpoint, "classy.pt": digits,
            "undropped.pt": digits | {"config": digits["config"] | {"label_drop": 0.0}}}.items():
        torch.save(content, root / name)
    return root


REFUSED = {
    "train": {
        "--path xy": "'xy'", "--data nowhere": "nowhere", "--bogus": "--bogus", "--amp fp8": "fp8",
        "--steps 0": "--steps", "--steps x": "--steps", "--lr -1": "--lr", "--lr nan": "--lr",
        "--lr inf": "--lr", "--batch -4": "--batch", "--dropout 1.5": "--dropout",
        "--mults 1,,2": "--mults", "--size 18": "multiples of 4", "--width 6": "multiple of 4",
        "--device cuda": "cpu", "--data empty": "with images", "--data broken": "broken/0.png",
        "--data mnist": "--data digits", "--data fashion-mnist": "--data-dir",
        "--data cifar10": "--data-dir", "--data flat --classes": "class subfolders",
        "--data flat --out flat/run": "inside", "--out run": "--resume", "--resume": "runs",
        "--resume --out nowhere": "nowhere", "--resume --out run": "more --steps",
        "--resume --out run --steps 30 --width 16": "--width cannot change",
        "--overwrite --out run --data nowhere": "nowhere",
        "--overwrite --out run --data flat --classes": "class subfolders"},
    "sample": {"": "runs", "--ckpt nowhere.pt": "nowhere.pt", "--ckpt empty": "empty",
               "--n -1": "--n", "--steps 0": "--steps", "--solver heun": "heun",
               "--device cuda": "cpu", "--tolerance 0": "--tolerance", **{
                   f"--ckpt {name}.pt": f"{name}.pt" for name in (
                       "empty", "truncated", "text", "pickle", "foreign", "list", "shapes",
                       "config", "lr", "damaged", "nan", "stepless")}},
    "sample --ckpt classy.pt": {"--label cat": "cat", "--label 10": "10", "--guidance -1": "--g"},
    "sample --ckpt tiny.pt": {
        "--label 0": "--classes", "--guidance 2 --out images --overwrite": "--classes"},
    "sample --ckpt undropped.pt": {"--guidance 2": "--label-drop"},
    "fid --ckpt undropped.pt": {"--guidance 2 --features pixels": "--label-drop"},
    "nll --ckpt undropped.pt": {"": "--label-drop"},
    "nll --ckpt tiny.pt": {"--reference colour": "3 channels"},
    "paths": {"--data moons": "moons", "--seed -1": "--seed"},
    "fid": {"--n 0": "--n", "--steps 5,0": "--steps", "--steps none": "--steps"},
    "fid --ckpt tiny.pt": {
        "--inception other.pth": "another SHA-256", "--inception nowhere.pth": "nowhere.pth",
        "--inception pickle.pth": "another SHA-256", "": "--inception FILE"},
    "fid --ckpt tiny.pt --features pixels": {
        "--n 1": "two images", "--inception other.pth": "--inception", "--guidance 2": "--classes",
        "--reference nowhere": "nowhere", "--reference test": "no test split",
        "--reference one": "two images", "--reference colour": "3 channels",
        "--solver dopri5 --steps 5": "dopri5 chooses"},
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
    device = "" if "cuda" in command or "paths" in command else " --device cpu"
    size = " --size 8" if command.startswith("train --data") else ""
    assert says in refuse(command + size + device)
    after = {f: f.stat().st_mtime_ns for f in bad.rglob("*") if f.is_file()}
    new = {f for f in {*after} - {*before} if f.suffix != ".npy" and f.stat().st_size > 0}
    assert not new and before.items() <= after.items()  # decoded data may be kept
    assert not (bad / "payload-ran").exists() and not (bad / "runs").exists()


@pytest.mark.parametrize("problem, says", [
    (ValueError("a\nb"), "a b"), (OSError("disk"), "disk"), (FloatingPointError("nan"), "nan"),
    (MemoryError(), "--batch"), (torch.OutOfMemoryError("CUDA out of memory."), "--batch"),
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
    flags = [flag.replace("_", "-") for flag in fm.COMMANDS[command][1]]
    assert not [flag for flag in flags if "default" not in entries.get(flag, "")]


def test_the_script_metadata_names_what_is_imported():
    source = SCRIPT.read_text(encoding="utf-8")
    imported = {(n.names[0].name if isinstance(n, ast.Import) else n.module).split(".")[0]
                for n in ast.parse(source).body if isinstance(n, (ast.Import, ast.ImportFrom))}
    third_party = imported - {*sys.stdlib_module_names, "PIL"}
    assert set(re.findall(r'"([a-z]+)>=[^"]+"', source[: source.index('"""')])) == third_party


# ------------------------------------------------------------------------------------------------
# A pretend accelerator: what CUDA and MPS would say to every command
# ------------------------------------------------------------------------------------------------

SMALL = "--size 8 --width 16 --mults 1,2 --batch 4 --overwrite --steps"
A = f"train --out a --classes --coupling ot --flip --attention 4 --dropout 0.1 {SMALL}"  # by Muon
B = f"train --out b --path vp --optimizer adamw --time uniform {SMALL}"
COMMANDS = [f"{A} 2", f"{A} 3", f"{B} 2", f"{B} 3", "train --out a --resume --steps 4",
            "sample --ckpt a/checkpoint.pt --n 10 --guidance 2 --steps 1",
            "sample --ckpt b/checkpoint.pt --n 2 --solver dopri5 --tolerance 0.5",
            "fid --ckpt b/checkpoint.pt --n 4 --features pixels --steps 1",
            "nll --ckpt a/checkpoint.pt --n 2 --solver euler --steps 1"]
MOVES = {"_to_copy", "copy_", "index.Tensor", "index_put_"}  # may take tensors of two devices
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # item, nonzero, ...


@functools.cache
def has_kernel(operator, backend):
    """Whether PyTorch's own table has one, or makes the operator of others, on any device."""
    table = Path(torchgen.__file__).with_name("packaged") / "ATen/native/native_functions.yaml"
    entry = re.search(rf"^- func: {re.escape(operator)}\(.*\n(  .*\n)*", table.read_text(), re.M)
    if not entry or (operator, backend) == ("native_group_norm_backward", "MPS"):
        return bool(entry)  # that one torch 2.6 registers in torch.backends.mps
    delegates = re.findall(r"structured_delegate: (\S+)", entry[0])
    keys = " ".join(re.findall(r"^    ([\w, ]+):", entry[0], re.M))
    own = re.search(rf"\b({backend}|Composite\w+Autograd(NonFunctional)?)\b", keys)
    composite = not keys and not delegates
    return bool(own or composite) or any(has_kernel(other, backend) for other in delegates)


class OnDevice(torch.Tensor):
    """Claims to be on "meta", the one device that needs no driver; its numbers are on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__, is_meta = None, False  # PretendDevice is asked first

    def __new__(cls, x):
        self = torch.Tensor._make_wrapper_subclass(
            cls, x.shape, x.stride(), x.storage_offset(), dtype=x.dtype, device="meta")
        self.numbers = x
        return self

    def __format__(self, spec):
        return format(self.item(), spec)

    def __reduce_ex__(self, protocol):  # for torch.save
        return self.numbers.__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()


class PretendDevice(TorchDispatchMode):
    """Computes on the CPU and counts what an accelerator would say to each operator."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, kwargs = operator.name().removeprefix("aten::"), kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        host = [x for x in tensors if not isinstance(x, OnDevice)]
        to = str(kwargs.get("device") or "")
        if len(host) == len(tensors) and to != "meta":
            return operator(*args, **kwargs)
        inputs, named = tree_map_only(OnDevice, lambda x: x.numbers, (args, kwargs))
        result = operator(*inputs, **named | (dict(device="cpu") if to else {}))
        if to != "cpu":
            came = {id(getattr(x, "numbers", x)): x for x in tensors}  # and goes, if in place
            result = tree_map_only(
                torch.Tensor, lambda x: came[id(x)] if id(x) in came else OnDevice(x), result)
        made = [x.dtype for x in tree_leaves(result) if isinstance(x, OnDevice)]
        waits = (name in MOVES | {"where.self"} and (host or to == "cpu")
                 or "index" in name and torch.bool in [x.dtype for x in tensors[1:]]
                 or name not in MOVES and WAITING & {*operator.tags})
        found = {"operator": True, "wait": waits, "float64": torch.float64 in made,
                 "two devices": name not in MOVES and any(x.dim() for x in host),
                 "no CUDA kernel": not has_kernel(name, "CUDA|Generic"),
                 "no MPS kernel": not has_kernel(name, "MPS")}
        frame = sys._getframe()
        while frame.f_code.co_filename != fm.__file__:
            frame = frame.f_back
        for kind in filter(found.get, found):
            self.seen[kind][f"{name} in {frame.f_code.co_name}, line {frame.f_lineno}"] += 1
        return result


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """{command: what was seen as it ran: {kind: {operator and place: how often}}}."""
    runs, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny, and threads that wait for each other slow
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pretended"))
        patch.setattr(argparse.ArgumentParser, "_check_value", lambda *_: None)  # of --device
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        fused = "_get_fused_kernels_supported_devices"
        patch.setattr(sys.modules["torch.optim.optimizer"], fused, lambda: ["meta"])
        for command in COMMANDS:
            with PretendDevice() as device:
                device.seen = runs[command] = defaultdict(Counter)
                fm.main([*command.split(), "--device", "meta"])
    torch.set_num_threads(threads)
    return runs


@pytest.mark.parametrize("kind", ["no CUDA kernel", "no MPS kernel", "two devices", "float64"])
def test_an_accelerator_could_run_every_command(pretended, kind):
    for command, seen in pretended.items():
        assert seen["operator"] and not seen[kind], f"{kind}: {[*seen[kind]]} of {command}"


@pytest.mark.parametrize("train", [A, B])
def test_no_training_step_waits_for_the_device(pretended, train):
    """One step more is no wait more, but for coupling, solved on the host: there and back."""
    more = pretended[f"{train} 3"]["wait"] - pretended[f"{train} 2"]["wait"]
    coupling = [wait for wait in more if "in ot_coupling" in wait][:2]
    assert [*more.elements()] == coupling, f"waits of one step: {more}"
