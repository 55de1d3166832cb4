"""Time grids: the published formulas, and the parametrisation that can stand at any of them."""

import math

import diffusers
import numpy as np
import pytest
import torch

from s4s_core import (
    EDM,
    GRIDS,
    LearnedGrid,
    RectifiedFlow,
    TimeGrid,
    VPDiscrete,
    VPLinear,
    time_edm,
    time_edm_t,
    time_logsnr,
    time_quadratic,
    time_uniform,
)

SCHEDULES = [EDM(), VPLinear(), VPDiscrete(), VPDiscrete.ldm(), RectifiedFlow()]
every_schedule = pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=["EDM", "VP", "SD", "LDM", "RF"]
)
# Those that any schedule has; the others are lists for Stable Diffusion (test_grid_search.py).
FORMULAS = ["uniform", "quadratic", "edm", "edm_t", "logsnr"]
every_grid = pytest.mark.parametrize("name", FORMULAS)
every_variable = pytest.mark.parametrize("variable", ["lam", "t"])


def random_grid(schedule, nfe: int, seed: int, offsets: bool = False) -> TimeGrid:
    """A grid with gaps of very different sizes, in lam or in t; maybe with decoupled times."""
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.randn(nfe, generator=generator, dtype=torch.float64).mul(1.5).exp()
    u = torch.cat([torch.zeros(1, dtype=torch.float64), gaps.cumsum(0) / gaps.sum()])
    if seed % 2:
        lam = schedule.lam(torch.tensor([schedule.T, schedule.t_min], dtype=torch.float64))
        t = schedule.t_of_lam(lam[0] + u * lam.diff())
    else:
        t = schedule.T + u * (schedule.t_min - schedule.T)
    t[0], t[-1] = schedule.T, schedule.t_min
    if not offsets:
        return TimeGrid(schedule, t)
    xi_c = torch.randn(nfe + 1, generator=generator, dtype=torch.float64) * 1e-3
    return LearnedGrid(schedule, torch.zeros_like(t), xi_c).grid()


@every_schedule
@every_grid
@pytest.mark.parametrize("nfe", [1, 2, 3, 5, 10, 50])
def test_grids_fall_strictly_from_T_to_t_min_exactly(schedule, name, nfe):
    grid = GRIDS[name](schedule, nfe)
    assert grid.nfe == nfe and len(grid.t) == nfe + 1 and grid.t.dtype == torch.float64
    assert grid.t[0].item() == schedule.T and grid.t[-1].item() == schedule.t_min
    assert (grid.t.diff() < 0).all() and (grid.s.diff() < 0).all() and (grid.lam.diff() > 0).all()
    assert torch.equal(grid.t_model, grid.t)


@every_schedule
def test_a_refined_grid_cuts_every_step_into_equal_ones(schedule):
    grid = random_grid(schedule, 4, seed=1)
    fine = grid.refine(5)
    torch.testing.assert_close(fine.t[::5], grid.t, rtol=1e-9, atol=0)
    h = fine.lam.diff().reshape(4, 5)
    torch.testing.assert_close(h, grid.lam.diff()[:, None].expand(4, 5) / 5, rtol=1e-6, atol=1e-9)
    assert torch.equal(grid.refine(1).t, grid.t)


@every_schedule
@pytest.mark.parametrize("nfe", [3, 8])
def test_grids_follow_their_published_formulas(schedule, nfe):
    n = np.arange(nfe + 1) / nfe
    T, end = schedule.T, schedule.t_min
    s = schedule.s(torch.tensor([T, end], dtype=torch.float64)).numpy()
    expected = {
        "uniform": T + n * (end - T),
        "quadratic": end + (T - end) * (1 - n) ** 2,
        "edm": (s[0] ** (1 / 7) + n * (s[1] ** (1 / 7) - s[0] ** (1 / 7))) ** 7,
        "edm_t": (T ** (1 / 7) + n * (end ** (1 / 7) - T ** (1 / 7))) ** 7,
        "logsnr": -np.log(s[0]) + n * (np.log(s[0]) - np.log(s[1])),
    }
    coordinates = dict(uniform="t", quadratic="t", edm="s", edm_t="t", logsnr="lam")
    assert set(coordinates) == set(FORMULAS)
    for name, coordinate in coordinates.items():
        values = getattr(GRIDS[name](schedule, nfe), coordinate).numpy()
        np.testing.assert_allclose(values, expected[name], rtol=1e-9, atol=1e-12)


def test_edm_grid_has_its_reference_values():
    expected = [80, 24.408342, 5.838948, 0.965417, 0.085087, 0.002]
    assert time_edm(EDM(), 5).t.tolist() == pytest.approx(expected, abs=5e-7)


def test_for_edm_the_rule_for_t_is_the_rule_for_s():
    torch.testing.assert_close(time_edm_t(EDM(), 9).t, time_edm(EDM(), 9).t, rtol=1e-12, atol=0)
    assert (time_edm_t(VPDiscrete(), 9).t[1:-1] < time_edm(VPDiscrete(), 9).t[1:-1]).all()


def test_edm_and_logsnr_grids_equal_those_of_diffusers():
    # diffusers' lists stop at its last network call; ours end where the last step lands.
    oracle = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80)
    for schedule_name, grid in (("karras", time_edm), ("exponential", time_logsnr)):
        oracle.register_to_config(sigma_schedule=schedule_name)
        oracle.set_timesteps(8)
        sigmas = oracle.sigmas[:-1].double()
        torch.testing.assert_close(grid(EDM(), 7).s, sigmas, rtol=1e-5, atol=0)


def test_quadratic_grid_is_dense_near_the_data():
    gaps = -time_quadratic(EDM(), 10).t.diff()
    assert (gaps.diff() < 0).all() and gaps[0] > 15 * gaps[-1]
    assert torch.allclose(time_uniform(EDM(), 10).t.diff(), gaps.new_tensor(-7.9998))


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_rho_of_the_edm_grid_is_a_choice(rho):
    root = time_edm(EDM(), 6, rho=rho).s ** (1 / rho)
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(6), rtol=1e-9, atol=0)


@every_grid
@pytest.mark.parametrize("nfe", [0, -3, 2.0, "5", None, True])
def test_a_number_of_steps_that_is_none_is_refused_in_one_sentence(one_sentence, name, nfe):
    with one_sentence("nfe", "whole number", repr(nfe)):
        GRIDS[name](EDM(), nfe)


@pytest.mark.parametrize(
    ("t", "words"),
    [
        ([80.0, 1.0, 1.0, 0.002], ["fall strictly"]),
        ([80.0, 1.0, 2.0, 0.002], ["fall strictly"]),
        ([0.002, 1.0, 80.0], ["fall strictly"]),
        ([80.0, math.nan, 0.002], ["finite"]),
        ([math.inf, 1.0, 0.002], ["finite"]),
        ([80.0, 1.0, -0.5], ["positive", "-0.5"]),
        ([70.0, 1.0, 0.002], ["T = 80.0", "70.0"]),
        ([80.0, 1.0, 0.003], ["t_min = 0.002", "0.003"]),
        ([80.0], ["N + 1"]),
        ([[80.0, 0.002]], ["shapes"]),
    ],
)
def test_times_that_are_no_grid_are_refused_in_one_sentence(one_sentence, t, words):
    with one_sentence(*words):
        TimeGrid(EDM(), torch.tensor(t, dtype=torch.float64))


def test_model_times_must_match_the_grid(one_sentence):
    t = time_edm(EDM(), 3).t
    with one_sentence("t_model", "shapes"):
        TimeGrid(EDM(), t, t[:-1])
    with one_sentence("finite"):
        TimeGrid(EDM(), t, torch.full_like(t, math.nan))
    with one_sentence("positive"):
        TimeGrid(EDM(), t, -t)
    with one_sentence("fall strictly") as info:
        TimeGrid(EDM(), [1.0] * 10**5)
    assert len(str(info.value)) < 300


@every_schedule
@every_variable
@pytest.mark.parametrize("seed", range(6))
def test_learned_grid_starts_exactly_at_any_grid(schedule, variable, seed):
    grid = random_grid(schedule, 2 + seed, seed)
    again = LearnedGrid.start_at(grid, variable).grid()
    scale = grid.t if variable == "lam" else schedule.T  # rounding is relative to the variable
    assert ((again.t - grid.t).abs() <= 1e-12 * scale).all()
    assert ((again.t_model - grid.t_model).abs() <= 1e-12 * scale).all()


@every_variable
@pytest.mark.parametrize("name", FORMULAS)
def test_learned_grid_starts_exactly_at_every_published_grid(variable, name):
    for schedule in SCHEDULES:
        grid = GRIDS[name](schedule, 7)
        again = LearnedGrid.start_at(grid, variable).grid()
        torch.testing.assert_close(again.t, grid.t, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_learned_grid_starts_at_decoupled_times_too(seed):
    grid = random_grid(EDM(), 5, seed, offsets=True)
    assert not torch.equal(grid.t_model, grid.t)
    again = LearnedGrid.start_at(grid).grid()
    torch.testing.assert_close(again.t_model, grid.t_model, rtol=1e-12, atol=0)


def test_zeros_are_the_uniform_grid():
    zeros = torch.zeros(6, dtype=torch.float64)
    for variable, uniform in (("lam", time_logsnr), ("t", time_uniform)):
        grid = LearnedGrid(EDM(), zeros, zeros, variable).grid()
        torch.testing.assert_close(grid.t, uniform(EDM(), 5).t, rtol=1e-12, atol=1e-12)
        start = LearnedGrid.start_at(uniform(EDM(), 5), variable)
        torch.testing.assert_close(start.xi, zeros, rtol=0, atol=1e-10)


@every_schedule
@every_variable
@pytest.mark.parametrize("seed", range(5))
def test_any_parameters_give_a_grid_with_fixed_ends_and_bounded_offsets(
    noise, schedule, variable, seed
):
    nfe = 2 + 2 * seed
    xi, xi_c = 3 * noise(seed, nfe + 1), 10 * noise(seed + 100, nfe + 1)
    grid = LearnedGrid(schedule, xi, xi_c, variable, offset_fraction=0.5).grid()
    assert (grid.t.diff() < 0).all()
    ends = torch.tensor([schedule.T, schedule.t_min], dtype=torch.float64)
    for t in (grid.t, grid.t_model):
        assert torch.equal(t[[0, -1]], ends)
    u, u_model = (
        schedule.lam(t) if variable == "lam" else t.clone() for t in (grid.t, grid.t_model)
    )
    bound = 0.5 * u.diff().abs().min()
    assert ((u_model - u).abs() <= bound * (1 + 1e-9) + 1e-12).all()
    # Offsets of at most half the smallest gap keep the network's times in order.
    assert (grid.t_model.diff() <= 0).all()


def test_offset_fraction_zero_couples_the_times(noise):
    grid = LearnedGrid(EDM(), noise(0, 6), noise(1, 6), "lam", offset_fraction=0.0).grid()
    assert torch.equal(grid.t_model, grid.t)


@every_variable
@pytest.mark.parametrize("schedule", [EDM(), VPDiscrete()], ids=["EDM", "SD"])
def test_derivatives_of_the_learned_grid_equal_finite_differences(noise, schedule, variable):
    xi = (0.3 * noise(0, 6)).requires_grad_()
    # Inside the bound: at the bound the clamp has no derivative.
    xi_c = (1e-3 * noise(1, 6)).requires_grad_()

    def times(xi, xi_c):
        grid = LearnedGrid(schedule, xi, xi_c, variable).grid()
        return grid.t, grid.t_model

    assert torch.autograd.gradcheck(times, (xi, xi_c), eps=1e-7, atol=1e-5, rtol=1e-5)


def test_learned_grid_knows_two_variables(one_sentence):
    with one_sentence("grid variable", "'sigma'", "lam", "t"):
        LearnedGrid.start_at(time_edm(EDM(), 3), "sigma")
