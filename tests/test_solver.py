"""Solvers: the loop and its tables against golden numbers, diffusers and exact flows."""

import json
import math
import os
from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from scipy import integrate

import s4s_core as s4s
from s4s_core import (
    EDM,
    GRIDS,
    SOLVERS,
    CallCounter,
    Coefficients,
    LearnedGrid,
    Solver,
    TimeGrid,
    VPDiscrete,
    VPLinear,
    count_parameters,
    ddim,
    deis,
    dpm_solver_pp,
    exponential_adams,
    gaussian,
    initial_noise,
    ipndm,
    time_edm,
    time_logsnr,
    time_uniform,
    trajectory,
    unipc,
)
from s4s_core.denoiser import of_model
from s4s_core.solver import solve

SD = VPDiscrete()
quiet_oracle = pytest.mark.filterwarnings("ignore:::diffusers")


def logsnr(nfe: int, first: float, last: float) -> TimeGrid:
    """Uniform in lam from `first` to `last`, variance exploding."""
    return time_logsnr(EDM(T=math.exp(-first), t_min=math.exp(-last)), nfe)


def uneven(nfe: int, span: float, middle: float = 0.0) -> TimeGrid:
    """nfe steps of sizes in fixed, unequal proportions, `span` long in lam."""
    sizes = torch.tensor([1.0, 1.6, 0.7, 1.3, 0.9, 1.5, 0.6, 1.2], dtype=torch.float64)[:nfe]
    u = torch.cat([torch.zeros(1, dtype=torch.float64), sizes.cumsum(0) / sizes.sum()])
    t = (-(middle + span * (u - 0.5))).exp()
    return TimeGrid(EDM(T=t[0].item(), t_min=t[-1].item()), t)


def random_coefficients(noise, nfe: int, order: int, prediction: str, corrector: bool):
    """Weights near 1 / order, row sums not 1, as learning makes them."""
    b = (1 / order + 0.3 * noise(1, nfe, order)).tril()
    c = (1 / order + 0.3 * noise(2, nfe, order + 1)).tril(1) if corrector else None
    return Coefficients(b, c, prediction)


def tables(grid: TimeGrid) -> dict[str, Coefficients]:
    """Every published solver in every form and order that fits the grid."""
    found = {}
    for order in range(1, min(4, grid.nfe) + 1):
        found[f"ipndm-{order}"] = ipndm(grid, order)
        found[f"deis-{order}"] = deis(grid, order)
        found[f"deis_rho-{order}"] = deis(grid, order, variable="rho")
        for form in ("noise", "data"):
            found[f"exponential_adams-{order}-{form}"] = exponential_adams(grid, order, form)
            found[f"exponential_adams-{order}-{form}-full"] = exponential_adams(
                grid, order, form, lower_order_final=False
            )
            for variant in ("bh1", "bh2"):
                for corrector in (True, False):
                    found[f"unipc-{order}-{variant}-{form}-{corrector}"] = unipc(
                        grid, order, variant, form, corrector
                    )
            if order <= 3:
                found[f"dpm_solver_pp-{order}-{form}"] = dpm_solver_pp(grid, order, form)
            if order == 1:
                found[f"ddim-{form}"] = ddim(grid, 1, form)
    return found


# --- Golden numbers: data N(0, 1), x_T = 1, EDM's rho-7 grid of 5 steps ------------------------

GOLDEN = {
    "DDIM": (lambda g: ddim(g), 0.007720911635),
    "iPNDM-2": (lambda g: ipndm(g, 2), 0.010514701521),
    "iPNDM-3": (lambda g: ipndm(g, 3), 0.012376340349),
    "iPNDM-4": (lambda g: ipndm(g, 4), 0.013674976444),
    "DPM++(2M)": (lambda g: dpm_solver_pp(g, 2), 0.011583136306),
    "DPM++(3M)": (lambda g: dpm_solver_pp(g, 3), 0.012338515077),
    "DPM-Solver(3M)": (lambda g: dpm_solver_pp(g, 3, "noise"), 0.011092311949),
    "UniPC-3 bh1": (lambda g: unipc(g, 3, "bh1"), 0.018841931188),
    "UniPC-3 bh2": (lambda g: unipc(g, 3, "bh2"), 0.012662732261),
    "UniPC-2 bh1": (lambda g: unipc(g, 2, "bh1"), 0.018708501657),
    "UniPC-2 bh2": (lambda g: unipc(g, 2, "bh2"), 0.011812707712),
    "DEIS-3": (lambda g: deis(g, 3, lower_order_final=False), 0.011846557998),
    "DEIS-3 rho": (lambda g: deis(g, 3, False, "rho"), 0.008376651757),
    "DEIS-3 t": (lambda g: deis(g, 3, False, "t"), 0.010817147719),
}


def standard_normal(x, t):
    """The exact denoiser of N(0, 1) data, variance exploding."""
    return x / (1 + t**2)


@pytest.mark.parametrize("name", GOLDEN)
def test_solver_gives_its_golden_number(name):
    make, expected = GOLDEN[name]
    grid = time_edm(EDM(), 5)
    x_0 = solve(standard_normal, torch.ones(1, 1, dtype=torch.float64), make(grid), grid)
    assert x_0.item() == pytest.approx(expected, abs=1e-12)


def literally(denoiser, x_T, table, grid):
    """Every table of `Coefficients` applied as its docstring says, without any shortcut."""
    schedule, N = grid.schedule, grid.nfe
    alpha, s, data = schedule.alpha(grid.t), grid.s, table.prediction == "data"
    states, evaluations = [x_T / alpha[0]], []

    def step(i, weights, role, new=()):
        keep, gain = (s[i + 1] / s[i], 1 - s[i + 1] / s[i]) if data else (1, s[i + 1] - s[i])
        a = table.a[i] if table.a is not None else [1.0]
        past = evaluations[: i + 1][::-1]
        y = sum(keep * w * y for w, y in zip(a, states[: i + 1][::-1], strict=False))
        y = y + sum(gain * w * e for w, e in zip(weights[i], [*new, *past], strict=False))
        return y if table.d is None else y + table.d[i, role]

    y = states[0]
    for i in range(N):
        evaluation = denoiser(alpha[i] * y, grid.t[i])
        if not data:
            evaluation = (y - evaluation) / s[i]
            if table.l is not None:
                evaluation = evaluation - table.l[i] * y / s[i]
        if i > 0:
            if table.c is not None:
                y = step(i - 1, table.c, 1, [evaluation])
            states.append(y)
        evaluations.append(evaluation)
        y = step(i, table.b, 0)
    return alpha[N] * y


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["scalars", "pixels"])
@pytest.mark.parametrize("schedule", [EDM(), SD], ids=["EDM", "SD"])
def test_every_table_acts_as_it_says(toy, noise, schedule, shape, corrector, prediction):
    nfe, order, states = 5, 3, 2
    lower = torch.ones(nfe, order + 1).tril(1).view(nfe, order + 1, *[1] * len(shape))
    table = Coefficients(
        (1 / order + 0.3 * noise(1, nfe, order, *shape)) * lower[:, 1:],
        (1 / order + 0.3 * noise(2, nfe, order + 1, *shape)) * lower if corrector else None,
        prediction,
        a=(0.5 + 0.1 * noise(3, nfe, states, *shape)) * lower[:, 1:][:, :states],
        l=0.3 * noise(4, nfe, *shape) if prediction == "noise" else None,
        d=0.1 * noise(5, nfe, 2, *shape),
    )
    grid, x_T = time_logsnr(schedule, nfe), noise(6, 4, 3)
    found = solve(toy(schedule), x_T, table, grid)
    expected = literally(toy(schedule), x_T, table, grid)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    single = solve(lambda x, t: toy(schedule)(x.double(), t).float(), x_T.float(), table, grid)
    assert single.dtype == torch.float32  # as x_T, whatever the tables are
    torch.testing.assert_close(single.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_data_form_solver_is_a_noise_form_one_with_a_coefficient_of_x(toy, noise):
    # y_i = a_i y_{i-1} + ... with full memory holds rows that do not sum to 1 (Shaul et al. 2024b).
    nfe, s = 4, (grid := time_logsnr(SD, 4)).s
    data = random_coefficients(noise, nfe, 2, "data", False)
    # y_i = A_i y_0 + sum_l C_il eps_l, unrolled with D = y - s eps.
    states, shares = [torch.eye(nfe + 1, dtype=torch.float64)[0]], []
    for i in range(nfe):
        shares.insert(0, states[-1] - s[i] * torch.eye(nfe + 1, dtype=torch.float64)[i + 1])
        q = s[i + 1] / s[i]
        new = sum(w * share for w, share in zip(data.b[i], shares, strict=False))
        states.append(q * states[-1] + (1 - q) * new)
    a, b = torch.zeros(nfe, 1, dtype=torch.float64), torch.zeros(nfe, nfe, dtype=torch.float64)
    for i in range(nfe):
        a[i, 0] = states[i + 1][0] / states[i][0]
        rest = (states[i + 1] - a[i, 0] * states[i])[1:] / (s[i + 1] - s[i])
        b[i, : i + 1] = rest[: i + 1].flip(0)
    x_T = noise(6, 4, 3)
    found = solve(toy(SD), x_T, Coefficients(b, None, "noise", a=a), grid)
    torch.testing.assert_close(found, solve(toy(SD), x_T, data, grid), rtol=1e-10, atol=1e-11)


def test_rows_have_their_golden_values():
    grid = time_edm(EDM(), 5)
    shipped = dpm_solver_pp(grid, 3).b
    assert shipped[1].tolist() == pytest.approx([1.602465, -0.602465, 0], abs=6e-7)
    assert shipped[2].tolist() == pytest.approx([2.459543, -2.244166, 0.784624], abs=6e-7)
    assert shipped[3].tolist() == pytest.approx([1.674785, -0.674785, 0], abs=6e-7)
    exact = [2.668973, -2.705945, 1.036972]
    assert exponential_adams(grid, 3).b[2].tolist() == pytest.approx(exact, abs=6e-7)
    assert unipc(grid, 3, "bh1").b[2].tolist() == pytest.approx(exact, abs=6e-7)
    rows = {
        "t": [
            [1.53975, -0.53975, 0],
            [2.226803, -2.200576, 0.973773],
            [1.589124, -1.055893, 0.466769],
            [1.081746, -0.098473, 0.016727],
        ],
        "rho": [
            [1.167016, -0.167016, 0],
            [1.169832, -0.182727, 0.012896],
            [1.111355, -0.116876, 0.005521],
            [1.054865, -0.056252, 0.001386],
        ],
    }
    for variable, expected in rows.items():
        found = deis(grid, 3, False, variable).b[1:]
        torch.testing.assert_close(found, found.new_tensor(expected), rtol=0, atol=6e-7)


def test_ipndm_rows_are_adams_bashforth():
    b = ipndm(time_edm(EDM(), 5), 4).b
    rows = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
    rows += [[55 / 24, -59 / 24, 37 / 24, -9 / 24]] * 2
    for row, weights in zip(b, rows, strict=True):
        assert row.tolist() == weights + [0] * (4 - len(weights))


# --- diffusers ---------------------------------------------------------------------------------


def diffusers_solution(scheduler, denoiser, x, grid):
    """Run a diffusers scheduler over our noise levels, without its rounding of times."""
    scheduler.set_timesteps(grid.nfe)
    scheduler.sigmas = grid.s
    scheduler.timesteps = torch.arange(grid.nfe, 0, -1)
    scheduler.set_begin_index(0)
    for i in range(grid.nfe):
        x = scheduler.step(denoiser(x, grid.t[i]), scheduler.timesteps[i], x).prev_sample
    return x


GRIDS_FOR_DIFFUSERS = [(SD, "logsnr"), (SD, "uniform"), (VPLinear(), "edm")]
on_diffusers_grids = pytest.mark.parametrize(
    ("schedule", "name"), GRIDS_FOR_DIFFUSERS, ids=["SD-logsnr", "SD-uniform", "VP-edm"]
)
COMMON = {"prediction_type": "sample", "final_sigmas_type": "sigma_min"}


@quiet_oracle
@on_diffusers_grids
@pytest.mark.parametrize("nfe", [4, 5, 8, 12])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_unipc_equals_diffusers(toy, noise, schedule, name, nfe, order, variant, prediction):
    grid, x_T = GRIDS[name](schedule, nfe), noise(nfe, 2, 3, 2, 2)
    oracle = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, predict_x0=prediction == "data", **COMMON
    )
    expected = diffusers_solution(oracle, toy(schedule), x_T, grid)
    x_0 = solve(toy(schedule), x_T, unipc(grid, order, variant, prediction), grid)
    torch.testing.assert_close(x_0, expected, rtol=1e-10, atol=1e-10)


@quiet_oracle
@on_diffusers_grids
@pytest.mark.parametrize("nfe", [4, 7, 12, 15])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_dpm_solver_equals_diffusers(toy, noise, schedule, name, nfe, order, prediction):
    grid, x_T = GRIDS[name](schedule, nfe), noise(nfe, 2, 3, 2, 2)
    oracle = diffusers.DPMSolverMultistepScheduler(
        solver_order=order,
        algorithm_type="dpmsolver++" if prediction == "data" else "dpmsolver",
        **COMMON,
    )
    expected = diffusers_solution(oracle, toy(schedule), x_T, grid)
    table = dpm_solver_pp(grid, order, prediction, lower_order_final=nfe < 15)
    x_0 = solve(toy(schedule), x_T, table, grid)
    # diffusers computes each step in float32.
    torch.testing.assert_close(x_0, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("nfe", "last"), [(3, 1), (9, 1), (10, 3), (20, 3)])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_dpm_solver_lowers_its_order_below_ten_steps_as_its_authors_do(nfe, last, prediction):
    used = dpm_solver_pp(time_logsnr(SD, nfe), 3, prediction).b.ne(0).sum(1).tolist()
    assert used == [min(1 + i, 3, last + nfe - 1 - i) for i in range(nfe)]


@quiet_oracle
@on_diffusers_grids
@pytest.mark.parametrize("nfe", [4, 7, 12])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_equals_diffusers(toy, noise, schedule, name, nfe, order):
    grid, x_T = GRIDS[name](schedule, nfe), noise(nfe, 2, 3, 2, 2)
    oracle = diffusers.DEISMultistepScheduler(solver_order=order, prediction_type="sample")
    expected = diffusers_solution(oracle, toy(schedule), x_T, grid)
    x_0 = solve(toy(schedule), x_T, deis(grid, order), grid)
    torch.testing.assert_close(x_0, expected, rtol=1e-9, atol=1e-9)


def test_the_toy_model_tells_solvers_apart(toy, noise):
    """Otherwise agreement on it would prove nothing."""
    grid, x_T = time_logsnr(SD, 6), noise(0, 2, 3, 2, 2)
    found = [ddim(grid), ipndm(grid, 3), dpm_solver_pp(grid, 3), unipc(grid, 3), deis(grid, 3)]
    samples = [solve(toy(SD), x_T, c, grid) for c in found]
    for i, a in enumerate(samples):
        for b in samples[:i]:
            assert (a - b).abs().max() > 1e-3


# --- Forms and coordinates ---------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [EDM(), SD, VPLinear()], ids=["EDM", "SD", "VP"])
def test_ddim_is_the_same_in_both_forms(toy, noise, schedule):
    grid, x_T = time_logsnr(schedule, 7), schedule.sigma(schedule.T) * noise(0, 4, 3)
    x_0 = [solve(toy(schedule), x_T, ddim(grid, 1, form), grid) for form in ("noise", "data")]
    torch.testing.assert_close(*x_0, rtol=1e-11, atol=1e-11)


def in_noise_form(coefficients: Coefficients, grid: TimeGrid) -> Coefficients:
    """The noise-form table of full memory that a data-form table with row sums 1 equals.

    y_i = y_0 + sum_l weights_i[l] eps_l by induction, since D_l = y_l - s_l eps_l.
    """
    s, N = grid.s, grid.nfe
    weights = [torch.zeros(N, dtype=torch.float64)]
    b = torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):
        q = s[i + 1] / s[i]
        new = q * weights[i]
        for j in range(min(i + 1, coefficients.order)):
            denoised = weights[i - j].clone()
            denoised[i - j] -= s[i - j]
            new = new + (1 - q) * coefficients.b[i, j] * denoised
        weights.append(new)
        row = (new - weights[i]) / (s[i + 1] - s[i])
        b[i, : i + 1] = row[: i + 1].flip(0)
    return Coefficients(b, None, "noise")


@pytest.mark.parametrize("nfe", [3, 5, 8])
@pytest.mark.parametrize("schedule", [EDM(), SD], ids=["EDM", "SD"])
def test_data_form_with_row_sums_one_is_a_full_memory_noise_form(toy, noise, schedule, nfe):
    grid, x_T = time_edm(schedule, nfe), schedule.sigma(schedule.T) * noise(0, 4, 3)
    for order in (1, 2, 3):
        b = (0.3 * noise(order, nfe, order)).tril()
        b[:, 0] += 1 - b.sum(1)
        table = Coefficients(b, None, "data")
        converted = in_noise_form(table, grid)
        torch.testing.assert_close(converted.b.sum(1), b.new_ones(nfe), rtol=1e-10, atol=1e-10)
        x_0 = solve(toy(schedule), x_T, table, grid)
        torch.testing.assert_close(
            solve(toy(schedule), x_T, converted, grid), x_0, rtol=1e-9, atol=1e-9
        )


def test_unipc_without_its_corrector_has_that_noise_form_too(toy, noise):
    grid, x_T = time_edm(EDM(), 6), 80 * noise(0, 4, 3)
    table = unipc(grid, 3, "bh1", corrector=False)
    x_0 = solve(toy(EDM()), x_T, table, grid)
    again = solve(toy(EDM()), x_T, in_noise_form(table, grid), grid)
    torch.testing.assert_close(again, x_0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [SD, VPLinear()], ids=["SD", "VP"])
def test_samples_do_not_depend_on_how_the_data_are_scaled(toy, noise, schedule):
    """x -> x / alpha turns every schedule into the variance exploding one of the same s."""
    vp = time_logsnr(schedule, 6)
    ve = TimeGrid(EDM(T=vp.s[0].item(), t_min=vp.s[-1].item()), vp.s)
    y_T, alpha = ve.s[0] * noise(0, 4, 3), schedule.alpha(vp.t)
    again = tables(ve)
    for name, table in tables(vp).items():
        torch.testing.assert_close(again[name].b, table.b, rtol=1e-8, atol=1e-8)
        y_0 = solve(toy(ve.schedule), y_T, table, ve)
        x_0 = solve(toy(schedule), alpha[0] * y_T, table, vp)
        torch.testing.assert_close(x_0 / alpha[-1], y_0, rtol=1e-10, atol=1e-10)


def test_a_corrector_that_repeats_the_predictor_changes_nothing(toy, noise):
    """The loop corrects from the point before the step, not from the predicted one."""
    grid, x_T = time_edm(EDM(), 5), 80 * noise(0, 4, 3)
    b = ipndm(grid, 3).b
    repeat = torch.cat([torch.zeros(5, 1, dtype=torch.float64), b], 1)
    x_0 = solve(toy(EDM()), x_T, Coefficients(b), grid)
    again = solve(toy(EDM()), x_T, Coefficients(b, repeat), grid)
    torch.testing.assert_close(again, x_0, rtol=1e-12, atol=1e-12)


def test_the_last_corrector_row_is_never_used(toy, noise):
    grid, x_T = time_edm(EDM(), 5), 80 * noise(0, 4, 3)
    table = unipc(grid, 3)
    changed = table.c.clone()
    changed[-1] = 7.0
    a = solve(toy(EDM()), x_T, table, grid)
    assert torch.equal(solve(toy(EDM()), x_T, replace(table, c=changed), grid), a)


def test_decoupled_times_reach_the_network_and_its_conversion_only(noise):
    grid = time_edm(EDM(), 4)
    moved = TimeGrid(EDM(), grid.t, grid.t * torch.tensor([1, 0.9, 1.1, 0.95, 1]))
    seen = []

    def denoiser(x, t):
        seen.append(t.item())
        return x / (1 + t**2)

    x_T = noise(0, 3, 2)
    x_0 = solve(denoiser, x_T, ddim(moved), moved)
    assert seen == moved.t_model[:-1].tolist()
    y = x_T
    for i in range(4):
        eps = (y - y / (1 + moved.t_model[i] ** 2)) / moved.t_model[i]
        y = y + (grid.t[i + 1] - grid.t[i]) * eps
    torch.testing.assert_close(x_0, y, rtol=1e-12, atol=1e-12)


# --- Order of convergence ----------------------------------------------------------------------


def slope(errors: list[float]) -> float:
    """How often the error halves when the step does, from the last two of errors at h, h/2, .."""
    return math.log2(errors[-2] / errors[-1])


def bump(nfe: int, table) -> float:
    """Largest relative error on dy/dlam = -(1 - g) y, i.e. D = g y, with g a narrow bump.

    Its flow is exact; where g is zero the rows of any order are exact, so the order falling at
    both ends costs nothing and the slope is that of the inner rows.
    """
    width, half = 0.5, 4.0
    grid = logsnr(nfe, -half, half)

    def denoiser(x, t):
        return x * (-0.5 * (-t.log() / width) ** 2).exp()

    y_0 = torch.ones(1, 1, dtype=torch.float64)
    y = torch.cat(list(trajectory(denoiser, y_0, table(grid), grid)))[:, 0]
    scale = width * math.sqrt(math.pi / 2)
    below = torch.erf(torch.tensor([-half / width / math.sqrt(2)], dtype=torch.float64))
    integral = scale * (torch.erf(grid.lam / width / math.sqrt(2)) - below)
    # The largest, since the error at the end may vanish by symmetry.
    return ((y / (integral - grid.lam - half).exp()) - 1).abs().max().item()


GLOBAL_ORDERS = [
    *[(f"exponential_adams-{k}-{form}", k) for k in (1, 2, 3, 4) for form in ("data", "noise")],
    *[(f"unipc-{k}-{variant}-data-False", k) for k in (1, 2, 3) for variant in ("bh1", "bh2")],
    *[(f"unipc-{k}-{variant}-data-True", k + 1) for k in (1, 2, 3) for variant in ("bh1", "bh2")],
    *[(f"deis_{variable}-{k}", k) for k in (1, 2, 3, 4) for variable in ("rho", "t")],
    ("dpm_solver_pp-2-data", 2),
    ("dpm_solver_pp-2-noise", 2),
    ("dpm_solver_pp-3-data", 2),  # as shipped: a factor 2 is missing, exponential_adams has it
    ("ipndm-2", 2),
    ("ipndm-3", 2),  # its weights are those of equal steps in s, which these are not
    ("ipndm-4", 2),
]


@pytest.mark.parametrize(("name", "order"), GLOBAL_ORDERS)
def test_solver_converges_with_its_order(name, order):
    # Where an order is lost, only small steps show it: the lost term has a small constant. And
    # steps equal in lam are small in s at one end only.
    late = name.startswith(("ipndm", "dpm_solver_pp-3", "deis_rho"))
    steps = (256, 512) if late else (64, 128)
    errors = [bump(nfe, lambda grid: table_named(name, grid)) for nfe in steps]
    assert errors[-1] < 0.1
    assert order - 0.25 < slope(errors) < order + (0.5 if late else 0.25), errors


def table_named(name: str, grid: TimeGrid) -> Coefficients:
    """One entry of `tables`, without building the others."""
    solver, order, *rest = name.split("-")
    if solver == "unipc":
        variant, form, corrector = rest
        return unipc(grid, int(order), variant, form, corrector == "True")
    return SOLVERS[solver].make(grid, int(order), *rest)


def local_errors(make, steps: int) -> list[float]:
    """Error of one last row on the exact flow of N(0, 1) data, with exact history, uneven steps."""
    errors = []
    for halving in range(4, 7):
        grid = uneven(steps, 2.0**-halving)
        s = grid.s
        y = (1 + s**2).sqrt()  # the flow through y = sqrt(1 + s^2)
        D = y / (1 + s**2)
        table = make(grid)
        i = steps - 1
        evaluations = ((y - D) / s if table.prediction == "noise" else D)[: i + 1].flip(0)
        gain = s[i + 1] - s[i] if table.prediction == "noise" else 1 - s[i + 1] / s[i]
        keep = 1 if table.prediction == "noise" else s[i + 1] / s[i]
        step = keep * y[i] + gain * (table.b[i] * evaluations[: table.order]).sum()
        errors.append(abs((step - y[i + 1]).item()))
    return errors


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda g: ddim(g), 1),
        (lambda g: ipndm(g, 2), 1),
        (lambda g: ipndm(g, 3), 1),
        (lambda g: ipndm(g, 4), 1),
        (lambda g: exponential_adams(g, 2, lower_order_final=False), 2),
        (lambda g: exponential_adams(g, 3, lower_order_final=False), 3),
        (lambda g: exponential_adams(g, 4, lower_order_final=False), 4),
        (lambda g: deis(g, 2, lower_order_final=False), 2),
        (lambda g: deis(g, 3, lower_order_final=False), 3),
        (lambda g: deis(g, 2, False, "rho"), 2),
        (lambda g: deis(g, 3, False, "rho"), 3),
        (lambda g: deis(g, 2, False, "t"), 2),
    ],
    ids="ddim ipndm2 ipndm3 ipndm4 adams2 adams3 adams4 deis2 deis3 rho2 rho3 t2".split(),
)
def test_one_step_has_its_order_on_uneven_steps(make, order):
    errors = local_errors(make, 5)
    assert slope(errors) == pytest.approx(order + 1, abs=0.3), errors


@pytest.mark.parametrize("schedule", [EDM(), SD], ids=["EDM", "SD"])
def test_every_published_solver_finds_the_exact_flow_in_the_end(schedule):
    """Gaussian data: y_N = y_0 sqrt((1 + s_N^2) / (1 + s_0^2))."""
    mixture = s4s.GaussianMixture([1.0], [[0.0]], [1.0], schedule)
    x_T = torch.ones(1, 1, dtype=torch.float64)
    for nfe, tolerance in ((20, 0.25), (80, 0.05)):
        grid = time_logsnr(schedule, nfe)
        s, alpha = grid.s, schedule.alpha(grid.t)
        exact = (alpha[-1] / alpha[0] * ((1 + s[-1] ** 2) / (1 + s[0] ** 2)).sqrt()).item()
        for name, make in SOLVERS.items():
            if name != "gaussian":
                order = {"ddim": 1, "ipndm": 4}.get(name, 3)
                x_0 = solve(mixture, x_T, make(grid, order), grid).item()
                assert x_0 == pytest.approx(exact, rel=tolerance), name


def lagrange_integrals(points, u_of_s, first: float, last: float) -> list[float]:
    """Means over s from `first` to `last` of the Lagrange polynomials in u through `points`."""
    nodes = u_of_s(torch.tensor(points, dtype=torch.float64)).tolist()

    def basis(j: int):
        others = [x for n, x in enumerate(nodes) if n != j]
        return lambda v: math.prod(
            (u_of_s(torch.tensor(v, dtype=torch.float64)).item() - x) / (nodes[j] - x)
            for x in others
        )

    means = [integrate.quad(basis(j), first, last, epsabs=1e-12)[0] for j in range(len(nodes))]
    return [mean / (last - first) for mean in means]


@pytest.mark.parametrize("schedule", [EDM(), VPLinear()], ids=["EDM", "VP"])
@pytest.mark.parametrize("variable", ["rho", "t", "log_rho"])
def test_deis_rows_are_integrals_of_lagrange_polynomials(schedule, variable):
    """Over s itself, by an adaptive rule; ours goes over the variable and by parts."""
    grid = time_edm(schedule, 5)
    first, last = math.log1p(80**2), math.log1p(0.002**2)
    slope = 2 * (last / 1e-3 - first) / (1e-3 - 1)
    beta = first - slope / 2

    def vp_time(s):
        return ((beta**2 + 2 * slope * torch.log1p(s**2)).sqrt() - beta) / slope

    time = vp_time if isinstance(schedule, EDM) else schedule.t_of_s
    u_of_s = {"rho": lambda s: s, "log_rho": torch.log, "t": time}[variable]
    b, s = deis(grid, 3, False, variable).b, grid.s.tolist()
    for i, p in ((1, 2), (2, 3), (3, 3), (4, 3)):
        points = [s[i - j] for j in range(p)]
        expected = lagrange_integrals(points, u_of_s, s[i], s[i + 1])
        assert b[i, :p].tolist() == pytest.approx(expected, abs=1e-8)


def test_deis_knows_three_variables(one_sentence):
    with one_sentence("DEIS variable", "'sigma'", "log_rho", "rho", "t"):
        deis(time_edm(EDM(), 3), 2, variable="sigma")


# --- What a table is ---------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 3, 5, 8])
def test_published_tables_weigh_what_exists_and_sum_to_one(nfe):
    for name, table in tables(time_logsnr(SD, nfe)).items():
        assert table.b.shape[0] == nfe and table.b.dtype == torch.float64
        assert not table.b.triu(1).any(), name
        torch.testing.assert_close(table.b.sum(1), table.b.new_ones(nfe), rtol=0, atol=1e-9)
        if table.c is not None:
            assert not table.c.triu(2).any() and not table.c[-1].any(), name
            torch.testing.assert_close(table.c[:-1].sum(1), table.c.new_ones(nfe - 1))


def quadrature_row(lam, i: int, p: int, sign: int):
    """Weights that integrate the polynomial through the last p points against e^(sign lam)."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    h = lam[i + 1] - lam[i]
    u = (nodes + 1) / 2  # from lam[i] to lam[i + 1]
    kernel = weights * np.exp(sign * h * u)
    points = [(lam[i - j] - lam[i]) / h for j in range(p)]
    row = []
    for j, own in enumerate(points):
        others = [x for n, x in enumerate(points) if n != j]
        basis = np.prod([(u - x) / (own - x) for x in others], axis=0)
        row.append((kernel * basis).sum() / kernel.sum())
    return row


@pytest.mark.parametrize("span", [1e-4, 0.1, 1.0, 5.0, 20.0])
@pytest.mark.parametrize(("form", "sign"), [("data", 1), ("noise", -1)])
def test_exponential_rows_are_exact_integrals_for_small_and_large_steps(span, form, sign):
    """Of D in data form and of eps in noise form, whose kernels are e^lam and e^-lam."""
    grid = uneven(6, span)
    table = exponential_adams(grid, 4, form, lower_order_final=False)
    lam = grid.lam.numpy()
    for i, p in enumerate([1, 2, 3, 4, 4, 4]):
        # Rounding of lam is relative to the step.
        tolerance = 1e-11 + 1e-13 / span
        expected = quadrature_row(lam, i, p, sign)
        assert table.b[i, :p].tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_bh1_and_bh2_differ_only_where_a_half_is_decreed():
    grid = time_logsnr(SD, 8)
    a, b = unipc(grid, 3, "bh1"), unipc(grid, 3, "bh2")
    differ = (a.b - b.b).abs().amax(1) > 1e-12
    assert differ.tolist() == [False, True, False, False, False, False, True, False]
    differ = (a.c - b.c).abs().amax(1) > 1e-12
    assert differ.tolist() == [True, False, False, False, False, False, False, False]
    # bh2's second-order predictor is DPM-Solver++(2M).
    torch.testing.assert_close(b.b[1], dpm_solver_pp(grid, 3).b[1], rtol=1e-12, atol=0)


def test_gaussian_start_depends_on_its_seed_alone():
    grid = time_logsnr(SD, 4)
    assert torch.equal(gaussian(grid, 3, seed=1).b, gaussian(grid, 3, seed=1).b)
    assert not torch.equal(gaussian(grid, 3, seed=1).b, gaussian(grid, 3, seed=2).b)


@pytest.mark.parametrize("nfe", [1, 3, 5, 10])
def test_parameters_are_counted_as_in_table_1(nfe):
    grid = time_logsnr(SD, nfe)
    for order in range(1, nfe + 1):
        table = exponential_adams(grid, order)
        assert count_parameters(table) == order * (2 * nfe + 1 - order) // 2
        # The count is that of the numbers that a sample can depend on.
        ones = torch.ones(nfe, order).tril()
        assert count_parameters(table) == int(ones.sum())
        assert count_parameters(unipc(grid, order)) == order * (2 * nfe + 1 - order)
        assert count_parameters(table, time_dependent=False) == order * (order + 1) // 2


def test_three_steps_of_order_three_have_six_parameters():
    assert count_parameters(ipndm(time_logsnr(SD, 3), 3)) == 6


def test_widening_a_table_leaves_the_solver_as_it_was(toy, noise):
    grid, x_T = time_edm(EDM(), 6), 80 * noise(0, 4, 3)
    for table in (ipndm(grid, 2), unipc(grid, 2)):
        wide = table.pad(5)
        assert wide.order == 5
        a = solve(toy(EDM()), x_T, table, grid)
        assert torch.equal(solve(toy(EDM()), x_T, wide, grid), a)
        deep = table.pad(5, states=6)
        assert deep.a.shape == (6, 6)
        assert count_parameters(deep) == count_parameters(wide) + 21
        torch.testing.assert_close(solve(toy(EDM()), x_T, deep, grid), a, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("b", "c", "prediction", "words"),
    [
        (torch.ones(3), None, "noise", ["b must have shape"]),
        (torch.ones(2, 3).tril(), None, "noise", ["order 3", "2"]),
        (torch.ones(3, 2), None, "noise", ["b weighs", "not exist"]),
        (torch.full((3, 2), math.nan).tril(), None, "noise", ["b must be finite"]),
        (torch.ones(3, 2).tril(), torch.ones(3, 2).tril(), "data", ["c must have shape", "(3, 3)"]),
        (torch.ones(3, 2).tril(), torch.ones(3, 3), "data", ["c weighs", "not exist"]),
        (torch.ones(3, 2).tril(), None, "velocity", ["velocity", "noise", "data"]),
    ],
)
def test_numbers_that_are_no_table_are_refused_in_one_sentence(
    one_sentence, b, c, prediction, words
):
    with one_sentence(*words):
        Coefficients(b.double(), c, prediction)


@pytest.mark.parametrize("name", SOLVERS)
def test_an_impossible_order_is_refused_in_one_sentence(one_sentence, name):
    make = SOLVERS[name]
    grid = time_logsnr(SD, 3)
    for order in (0, -1, 1.0, "2", True):
        with one_sentence("order", "whole number"):
            make(grid, order)
    with one_sentence("order"):
        make(grid, 7)
    if make.max_order is None:
        with one_sentence("order 4", "4 steps", "raise nfe"):
            make(grid, 4)


def test_orders_beyond_the_published_are_refused_in_one_sentence(one_sentence):
    grid = time_logsnr(SD, 8)
    highest_orders = {name: s.max_order for name, s in SOLVERS.items() if s.max_order}
    assert highest_orders == {"ddim": 1, "ipndm": 4, "dpm_solver_pp": 3, "dpm_solver": 3}
    for make, highest in ((ddim, 1), (ipndm, 4), (dpm_solver_pp, 3)):
        make(grid, highest)
        with one_sentence(f"up to order {highest}"):
            make(grid, highest + 1)


def test_odd_tables_of_states_and_pixels_are_refused_in_one_sentence(one_sentence):
    b = torch.ones(3, 2, dtype=torch.float64).tril()
    with one_sentence("a weighs states", "not exist"):
        Coefficients(b, a=torch.ones(3, 2))
    with one_sentence("a must have shape (3, 3)"):
        Coefficients(b, a=torch.ones(3, 4).tril())
    with one_sentence("d must have shape (3, 2)"):
        Coefficients(b, d=torch.ones(3))
    with one_sentence("l must be finite"):
        Coefficients(b, l=torch.full((3,), math.inf))
    with one_sentence("l needs", "noise"):
        Coefficients(b, None, "data", l=torch.ones(3))


def test_unknown_variants_and_forms_are_refused_in_one_sentence(one_sentence):
    grid = time_logsnr(SD, 4)
    with one_sentence("UniPC variant", "'bh3'", "bh1", "bh2"):
        unipc(grid, 2, "bh3")
    for make in (dpm_solver_pp, exponential_adams):
        with one_sentence("prediction form", "'x0'", "noise", "data"):
            make(grid, 2, "x0")


# --- The loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 2, 5, 9])
def test_a_sample_costs_exactly_N_calls(toy, noise, nfe):
    grid = time_edm(EDM(), nfe)
    for table in tables(grid).values():
        counted = CallCounter(toy(EDM()))
        Solver(table, grid).sample(counted, 80 * noise(0, 2, 2))
        assert counted.calls == nfe == Solver(table, grid).nfe


def test_trajectory_runs_from_the_noise_to_the_sample(toy, noise):
    grid, x_T = time_edm(EDM(), 5), 80 * noise(0, 4, 3)
    solver = Solver(unipc(grid, 3), grid)
    points = list(solver.trajectory(toy(EDM()), x_T))
    assert len(points) == 6 and all(x.shape == x_T.shape for x in points)
    assert torch.equal(points[0], x_T)
    assert torch.equal(points[-1], solver.sample(toy(EDM()), x_T))


@pytest.mark.parametrize("corrector", [False, True])
def test_a_trajectory_goes_on_from_what_it_is_sent(toy, noise, corrector):
    grid, x_T = time_edm(EDM(), 5), 80 * noise(0, 4, 3)
    solver = Solver(unipc(grid, 3, corrector=corrector), grid)
    own = list(solver.trajectory(toy(EDM()), x_T))
    points = solver.trajectory(toy(EDM()), x_T)
    again = [next(points), *[points.send(x) for x in own[:-1]]]
    torch.testing.assert_close(again, own, rtol=1e-12, atol=1e-12)
    points = solver.trajectory(toy(EDM()), x_T)
    other = [next(points), next(points), points.send(own[1] + 1), next(points)]
    assert torch.equal(other[1], own[1]) and not torch.allclose(other[2], own[2])


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_local_errors_are_those_of_steps_from_exact_points(toy, noise, one_sentence, prediction):
    nfe, schedule = 5, VPLinear()
    grid = time_logsnr(schedule, nfe)
    solver = Solver(random_coefficients(noise, nfe, 3, prediction, False), grid)
    exact, alpha, s = noise(1, nfe + 1, 4, 3), schedule.alpha(grid.t), grid.s
    y = exact / alpha[:, None, None]
    D = [toy(schedule)(x, t) for x, t in zip(exact, grid.t, strict=True)]
    found = s4s.local_errors(solver, toy(schedule), exact)
    for i in range(nfe):
        b = solver.coefficients.b[i]
        if prediction == "noise":
            eps = [(y[n] - D[n]) / s[n] for n in range(i, max(i - 3, -1), -1)]
            end = y[i] + (s[i + 1] - s[i]) * sum(w * e for w, e in zip(b, eps, strict=False))
        else:
            q, recent = s[i + 1] / s[i], D[i::-1]
            end = q * y[i] + (1 - q) * sum(w * e for w, e in zip(b, recent, strict=False))
        torch.testing.assert_close(found[i], alpha[i + 1] * end - exact[i + 1])
    with one_sentence("5 network calls", "6 points", "not 5"):
        s4s.local_errors(solver, toy(schedule), exact[:-1])


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_no_other_table_has_smaller_local_errors(mixture, noise, prediction):
    setup, grid = mixture(), time_logsnr(EDM(), 5)
    _, exact = s4s.exact_path(setup, range(40), grid)

    def squares(table):
        return s4s.local_errors(Solver(table, grid), setup.denoiser, exact).square().sum((1, 2))

    best = s4s.locally_optimal(grid, setup.denoiser, exact, 3, prediction)
    assert best.prediction == prediction
    assert (squares(best) <= squares(ipndm(grid, 3))).all()
    for seed in range(5):
        other = replace(best, b=best.b + 1e-3 * noise(seed, 5, 3).tril())
        assert (squares(other) > squares(best)).all()
    # Where one table makes no error at all, it is found.
    table = random_coefficients(noise, 5, 3, prediction, False)
    own = torch.stack(list(Solver(table, grid).trajectory(setup.denoiser, exact[0])))
    found = s4s.locally_optimal(grid, setup.denoiser, own, 3, prediction)
    torch.testing.assert_close(found.b, table.b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("corrector", [False, True])
def test_derivatives_of_the_solution_equal_finite_differences(toy, noise, prediction, corrector):
    nfe, order = 4, 3
    table = random_coefficients(noise, nfe, order, prediction, corrector)
    schedule = EDM(T=3.0, t_min=0.1)
    start = LearnedGrid.start_at(time_edm(schedule, nfe))
    xi_c = 1e-2 * noise(3, nfe + 1)
    mask_b, mask_c = torch.ones(nfe, order).tril(), torch.ones(nfe, order + 1).tril(1)

    def solution(x_T, xi, xi_c, b, *c):
        grid = LearnedGrid(schedule, xi, xi_c).grid()
        coefficients = Coefficients(mask_b * b, mask_c * c[0] if c else None, prediction)
        return torch.stack(list(trajectory(toy(schedule), x_T, coefficients, grid)))

    inputs = [3 * noise(4, 2, 2), start.xi, xi_c, table.b] + ([table.c] if corrector else [])
    inputs = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(solution, inputs, atol=1e-6, rtol=1e-5)


def test_tables_follow_a_moving_grid_differentiably():
    """Published coefficients are functions of the times; their derivatives are exact too."""
    xi = torch.tensor([0.1, -0.2, 0.3, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(xi)

    def rows(xi):
        grid = LearnedGrid(SD, xi, zero).grid()
        return dpm_solver_pp(grid, 3).b, unipc(grid, 3).b, unipc(grid, 3).c, deis(grid, 3).b

    assert torch.autograd.gradcheck(rows, (xi,), atol=1e-6, rtol=1e-5)


def test_sampling_is_deterministic_and_keeps_the_dtype(toy, noise):
    grid = time_edm(EDM(), 5)
    solver, x_T = Solver(unipc(grid, 3), grid), 80 * noise(0, 4, 3)
    x_0 = solver.sample(toy(EDM()), x_T)
    assert torch.equal(solver.sample(toy(EDM()), x_T), x_0) and x_0.dtype == torch.float64
    single = solver.sample(toy(EDM()), x_T.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), x_0, rtol=1e-4, atol=1e-4)


def test_sampling_needs_no_gradient_and_leaves_the_noise_alone(toy, noise):
    grid, x_T = time_edm(EDM(), 4), (80 * noise(0, 4, 3)).requires_grad_()
    table = ipndm(grid, 2)
    before = x_T.detach().clone()
    x_0 = Solver(replace(table, b=table.b.requires_grad_()), grid).sample(toy(EDM()), x_T)
    assert not x_0.requires_grad and torch.equal(x_T, before)


def test_a_sample_does_not_depend_on_its_batch(toy, noise):
    grid, x_T = time_edm(EDM(), 5), 80 * noise(0, 6, 3)
    solver = Solver(unipc(grid, 3), grid)
    together = solver.sample(toy(EDM()), x_T)
    apart = torch.cat([solver.sample(toy(EDM()), x) for x in x_T.split(1)])
    torch.testing.assert_close(apart, together, rtol=1e-13, atol=1e-13)


def test_a_seed_gives_the_same_noise_in_any_batch(mixture, one_sentence):
    setup = mixture()
    x_T = initial_noise(setup, range(10))
    assert x_T.shape == (10, 2) and x_T.dtype == torch.float64
    assert torch.equal(x_T[[7, 3]], initial_noise(setup, [7, 3]))
    many = initial_noise(setup, range(2000))
    assert many.std().item() == pytest.approx(80, rel=0.03)
    assert many.mean().item() == pytest.approx(0, abs=4)
    with one_sentence("at least one seed"):
        initial_noise(setup, [])


# --- What goes wrong, and the file -------------------------------------------------------------


def test_table_and_grid_must_have_the_same_steps(one_sentence):
    with one_sentence("4 rows", "5 steps"):
        Solver(ddim(time_uniform(SD, 4)), time_uniform(SD, 5))


def test_a_denoiser_of_another_schedule_is_refused_in_one_sentence(one_sentence, toy, noise):
    grid = time_edm(EDM(), 4)
    with one_sentence("EDM", "VPDiscrete", "schedule"):
        Solver(ddim(grid), grid).sample(toy(SD), noise(0, 2, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x[:, :1],
        lambda x: x[0],
        lambda x: x[..., None],
        lambda x: (x,),
        lambda x: {"sample": x},
        lambda x: None,
        lambda x: x.numpy(),
    ],
)
def test_a_denoiser_of_another_shape_is_refused_in_one_sentence(one_sentence, noise, wrong):
    grid = time_edm(EDM(), 4)
    with one_sentence("the denoiser returned", "shape", "(2, 3)"):
        Solver(ddim(grid), grid).sample(lambda x, t: wrong(x), noise(0, 2, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_names_its_step(one_sentence, noise, value):
    grid, x_T = time_edm(EDM(), 4), noise(0, 2, 3)
    solver = Solver(ddim(grid), grid)

    def broken(x, t):
        return x * value if t <= grid.t[2] else x / 2

    with one_sentence("step 3 of 4", "NaN"):
        solver.sample(broken, x_T)
    with one_sentence("x_T itself"):
        solver.sample(lambda x, t: x, x_T * value)


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("schedule", [EDM(), SD, VPLinear()], ids=["EDM", "SD", "VP"])
def test_a_saved_solver_samples_bit_identically(
    toy, noise, tmp_path, schedule, prediction, corrector
):
    grid = LearnedGrid(schedule, noise(5, 6), noise(6, 6)).grid()
    table = random_coefficients(noise, 5, 3, prediction, corrector)
    solver = Solver(table, grid, {"note": "a \N{GREEK SMALL LETTER LAMDA}", "n": [1, 2.5, None]})
    path = tmp_path / "solver.json"
    solver.save(path)
    again = Solver.load(path)
    assert again.to_dict() == solver.to_dict() and again.provenance == solver.provenance
    x_T = noise(7, 4, 3)
    assert torch.equal(again.sample(toy(schedule), x_T), solver.sample(toy(schedule), x_T))
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_solvers_are_equal_by_their_numbers(tmp_path):
    grid = time_edm(EDM(), 5)
    Solver(ipndm(grid, 3), grid, {"note": "saved"}).save(tmp_path / "solver.json")
    assert Solver(ipndm(grid, 3), grid) == Solver.load(tmp_path / "solver.json")
    assert Solver(ipndm(grid, 3), grid) != Solver(ipndm(grid, 2), grid)
    assert Solver(unipc(grid, 3), grid) != Solver(unipc(grid, 3, corrector=False), grid)
    other = time_logsnr(EDM(), 5)
    assert Solver(ipndm(grid, 3), grid) != Solver(ipndm(other, 3), other)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch, one_sentence):
    grid = time_edm(EDM(), 5)
    path = tmp_path / "deep" / "solver.json"
    Solver(ipndm(grid, 3), grid).save(path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full_disk)
            with one_sentence("solver.json", "no space", "choose another place"):
                Solver(ddim(grid), grid).save(path)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["solver.json"]


@pytest.fixture
def saved(tmp_path):
    """The entries of a good file, and a function that writes changed ones."""
    grid = time_edm(EDM(), 4)
    path = tmp_path / "solver.json"
    Solver(unipc(grid, 2), grid).save(path)

    def write(content: str | bytes | dict):
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return json.loads(path.read_text()), write


def test_a_good_file_loads(saved):
    entries, write = saved
    assert Solver.load(write(entries)).to_dict() == entries


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format", "another", ["format", "s4s-solver"]),
        ("format", None, ["format", "s4s-solver"]),
        ("version", 4, ["version 4", "versions 1 to 3"]),
        ("kind", None, ["kind of solver", "multistep"]),
        ("kind", "magic", ["magic", "multistep", "single_step"]),
        ("version", None, ["version"]),
        ("version", [3], ["version [3]"]),
        ("version", True, ["version True"]),
        ("prediction", "x0", ["prediction form", "x0", "noise"]),
        ("prediction", 3, ["prediction form"]),
        ("schedule", {"name": "Cosine"}, ["Cosine", "EDM"]),
        ("schedule", "EDM", ["mapping"]),
        ("schedule", {"name": "VPLinear"}, ["lacks", "beta_0"]),
        ("schedule", VPLinear().to_dict(), ["VPLinear", "T = 1.0"]),
        ("t", [80.0, 10.0, True, 0.5, 0.002], ["t must be", "numbers"]),
        ("b", [[True, 0.0]] * 4, ["b must be", "numbers"]),
        ("b", [[[], 0.0]] * 4, ["b must be", "numbers"]),
        ("t", [80.0, 10.0, 20.0, 1.0, 0.002], ["fall strictly"]),
        ("t", [80.0, 10.0, math.nan, 1.0, 0.002], ["finite"]),
        ("t", [80.0, 10.0, 1.0, 0.002], ["t_model", "shapes"]),
        ("t", 80.0, ["shapes"]),
        ("t", None, ["t must be", "numbers"]),
        ("t", ["80", "1"], ["t must be", "numbers"]),
        ("t", [10**400, 1], ["t must be", "numbers"]),
        ("t_model", {"0": 80}, ["t_model must be", "numbers"]),
        ("b", [[1.0], [1.0, 0.5]], ["b must be", "rectangular"]),
        ("b", [[1.0, 0.5]] * 4, ["b weighs", "not exist"]),
        ("b", [[math.inf, 0.0]] * 4, ["b must be finite"]),
        ("b", [1.0, 2.0], ["b must have shape"]),
        ("b", [[1.0]] * 3, ["c must have shape"]),
        ("b", "[[1.0]]", ["b must be", "numbers"]),
        ("c", [[1.0]] * 4, ["c must have shape"]),
        ("provenance", "mine", ["provenance"]),
        ("provenance", {"note": "x" * 10**6}, ["provenance", "1,000,000"]),
        ("version", "3" * 10**5, ["version", "versions 1 to 3"]),
        ("kind", ["multistep"] * 10**4, ["kind of solver", "multistep"]),
        ("t_moel", [80.0], ["'t_moel'", "t_model"]),  # a slip beside the right entry
        ("schedule", {"name": "EDM", "T": 10**400}, ["EDM.T", "moderate"]),
        ("schedule", {"name": "EDM", "t_min": -(10**400)}, ["EDM.t_min", "moderate"]),
        ("schedule", {"name": "VPDiscrete", "levels": 3 * 10**9}, ["levels", "3000000000"]),
        ("schedule", {"name": "VPDiscrete", "levels": 10**40}, ["levels", "1000000"]),
        ("schedule", {"name": "E" * 10**5}, ["noise schedule", "EDM"]),
        ("t", [[[[0.0]] * 10] * 10] * 10, ["shapes"]),
        ("t", [80.0, *[1.0] * 10**4, 0.002], ["t_model", "shapes"]),
        ("scale", [[1.0]] * 4, ["scale"]),
        ("scale", [1.0, 1.0, -1.0, 1.0], ["scale", "above 0"]),
        ("scale", "ones", ["scale must be", "numbers"]),
        ("t_model", [0.002, 0.1, 1.0, 20.0, 80.0], ["t_model[0] = 0.002", "between"]),
        ("t_model", [80.0, 1e9, 1.0, 0.1, 0.002], ["t_model[1] = 1000000000.0", "between"]),
        ("t_model", [80.0, 20.0, 1.0, 0.1, 0.0], ["positive"]),
        ("t_model", [80.0, -1.0, 1.0, 0.1, 0.002], ["positive"]),
        ("t_model", [80.0, 0.1, 1.0, 20.0, 0.002], ["t_model[1] = 0.1", "between"]),
        ("t_model", [80.0, math.inf, 1.0, 0.1, 0.002], ["finite"]),
    ],
)
def test_a_file_with_a_wrong_entry_is_refused_in_one_sentence(
    one_sentence, saved, key, value, words
):
    entries, write = saved
    with one_sentence("solver.json", *words) as info:
        Solver.load(write({**entries, key: value}))
    assert len(str(info.value)) < 1000


@pytest.mark.parametrize("key", "prediction schedule t t_model b c a l d provenance".split())
def test_a_file_without_an_entry_is_refused_in_one_sentence(one_sentence, saved, key):
    entries, write = saved
    del entries[key]
    with one_sentence("solver.json", "lacks", key):
        Solver.load(write(entries))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2]",
        b"null",
        b"not JSON\nat all",
        b"\x80\x04\x95pickle",
        b"\xff\xfe" + bytes(range(256)),
        b"PK\x03\x04zip",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"format": ' + b"1" * 5000 + b"}",
    ],
    ids="empty list null text pickle binary zip nested deep digits".split(),
)
def test_a_file_that_is_something_else_is_refused_in_one_sentence(one_sentence, saved, content):
    _, write = saved
    with one_sentence("solver.json") as info:
        Solver.load(write(content))
    assert len(str(info.value)) < 500 and "set_int_max" not in str(info.value)


def test_what_a_file_says_twice_is_refused_in_one_sentence(one_sentence, saved):
    entries, write = saved
    text = json.dumps(entries)
    for twice in (text[:-1] + ', "b": [[1.0]]}', text.replace('"T": ', '"T": 3.0, "T": ')):
        with one_sentence("solver.json", "here twice"):
            Solver.load(write(twice))


def test_a_truncated_file_is_refused_in_one_sentence(one_sentence, saved):
    entries, write = saved
    text = json.dumps(entries, indent=1)
    for length in range(0, len(text) - 1, 97):
        with one_sentence("solver.json"):
            Solver.load(write(text[:length]))


def test_what_is_no_file_is_refused_in_one_sentence(one_sentence, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")  # nobody writes to it: reading would wait for ever
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("nowhere.json", "pipe.json", "zero.json", "."):
        with one_sentence(str(tmp_path / name)):
            Solver.load(tmp_path / name)
    (tmp_path / "large.json").write_bytes(b" " * 1001)
    monkeypatch.setattr("s4s_core.errors.LARGEST_JSON", 1000)
    with one_sentence("large.json", "1,000 bytes"):
        Solver.load(tmp_path / "large.json")


@pytest.mark.parametrize("made_by", [object(), {1, 2}, {"deep": []}, "x" * 10**6])
def test_what_could_not_be_loaded_is_not_saved(one_sentence, tmp_path, made_by):
    grid = time_edm(EDM(), 4)
    if isinstance(made_by, dict):
        made_by["deep"].append(made_by)
    with one_sentence("provenance"):
        Solver(ddim(grid), grid, {"made_by": made_by}).save(tmp_path / "solver.json")
    assert not (tmp_path / "solver.json").exists()


def test_lists_and_arrays_are_tables_grids_and_noise(toy, one_sentence):
    grid = time_edm(EDM(), 3)
    solver = Solver(ipndm(grid, 2), grid)
    listed = Solver(
        Coefficients(ipndm(grid, 2).b.tolist()), TimeGrid(EDM(), grid.t.numpy(), grid.t.tolist())
    )
    assert listed == solver and listed.grid.t.dtype == torch.float64
    x_T = [[80.0, -40.0]]
    expected = solver.sample(toy(EDM()), torch.tensor(x_T).double())
    for given in (x_T, np.array(x_T), np.array(x_T, np.float32)):
        assert torch.equal(listed.sample(toy(EDM()), given), expected)
    for wrong in (None, "80", [[1.0], [2.0, 3.0]], [None], {0: 80.0}):
        for take in (Coefficients, partial(TimeGrid, EDM()), partial(solver.sample, toy(EDM()))):
            with one_sentence("must be a rectangular list of numbers"):
                take(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [EDM(), SD, VPLinear()], ids=["EDM", "SD", "VP"])
@pytest.mark.parametrize("seed", range(4))
def test_learned_times_that_pass_each_other_are_solvers(noise, tmp_path, schedule, seed):
    """Offsets of half a gap let two calls meet, and a free first call may be after the second."""
    offsets = 100 * noise(seed, 5)
    for variable, fraction in (("lam", 0.5), ("t", 0.5), ("lam", 1.0), ("t", 1.0)):
        for first in (None, torch.tensor(8.0).double(), torch.tensor(-8.0).double()):
            learned = LearnedGrid(schedule, noise(9, 5), offsets, variable, fraction, first)
            grid = learned.grid()
            for table in (ipndm(grid, 2), s4s.dpm_solver(grid, 2), s4s.dpm_solver(grid, 3)):
                solver = Solver(table, grid)
                solver.save(tmp_path / "solver.json")
                assert Solver.load(tmp_path / "solver.json") == solver
                assert solver.sample(lambda x, t: x / 2, noise(1, 2, 2)).isfinite().all()


def test_a_file_of_version_1_still_loads(saved):
    entries, write = saved
    newer = ("kind", "a", "l", "d", "scale")
    old = {k: v for k, v in entries.items() if k not in newer} | {"version": 1}
    assert Solver.load(write(old)).to_dict() == entries


def test_loading_executes_nothing(saved):
    """A file from a stranger is data: a pickle that would create a file does not."""
    _, write = saved
    path = write(b"cos\nmkdir\n(S'owned'\ntR.")
    with pytest.raises(s4s.UsageError):
        Solver.load(path)
    assert not (path.parent / "owned").exists() and not os.path.exists("owned")


@pytest.mark.parametrize(("schedule", "of"), [(EDM(), 1.0), (VPLinear(), 80.0), (EDM(), 8000.0)])
def test_noise_of_another_scale_is_refused(noise, one_sentence, schedule, of):
    grid = time_logsnr(schedule, 3)
    solver, x = Solver(ddim(grid), grid), noise(0, 8, 1, 8, 8)
    sigma = schedule.sigma(schedule.T).item()
    solver.sample(lambda x, t: 0 * x, sigma * x)
    with one_sentence("root mean square", f"{sigma:.3g}", "initial_noise"):
        solver.sample(lambda x, t: 0 * x, of * x)


def test_a_noisy_image_is_a_start_where_signal_is_left(noise):
    grid = time_logsnr(EDM(T=1.0), 3)
    image = 0.5 + 0.1 * noise(0, 4, 1, 8, 8)
    x = Solver(ddim(grid), grid).sample(lambda x, t: image, image + noise(1, 4, 1, 8, 8))
    torch.testing.assert_close(x, image, rtol=0, atol=0.02)


def test_a_solver_of_another_model_warns_and_names_both(noise):
    grid = time_logsnr(EDM(), 3)
    one, other = ({"name": n, "guidance": 1.0, "weights": {}} for n in ("digits", "ecg"))
    solver, denoiser = Solver(ddim(grid), grid).learned_for(one), lambda x, t: 0 * x
    for model in (one, None):  # in silence: warnings are errors
        solver.sample(of_model(denoiser, model), 80 * noise(0, 2, 3))
    with pytest.warns(UserWarning, match="digits.*not for .*ecg"):
        Solver.from_dict(solver.to_dict()).sample(of_model(denoiser, other), 80 * noise(0, 2, 3))


@pytest.mark.parametrize("name", ["digits", "ecg"])
def test_a_state_in_single_precision_changes_nothing_that_matters(name):
    setup = s4s.load(name)
    x_T, D = s4s.initial_noise(setup, range(16)), setup.denoiser_for(range(16))
    grid = s4s.time_logsnr(setup.schedule, 5)
    for solver in (setup.teacher, s4s.Solver(s4s.ipndm(grid, 3), grid)):
        double, single = solver.sample(D, x_T), solver.sample(D, x_T.float())
        assert single.dtype == torch.float32
        assert (double - single).norm() < 1e-5 * double.norm()
