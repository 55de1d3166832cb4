"""Searched grids: their objectives against other derivations, their minima against brute force."""

import itertools

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules

import s4s_core as s4s
from s4s_core import (
    EDM,
    CallCounter,
    RectifiedFlow,
    TimeGrid,
    VPDiscrete,
    VPLinear,
    ays,
    cheapest_path,
    dmn,
    dmn_bound,
    gits,
    ipndm,
    time_edm,
    time_logsnr,
    time_uniform,
    trajectory,
)
from s4s_core.baselines.grid_search import jump_costs
from s4s_core.grid import gits_sd15

SD, LDM = VPDiscrete(), VPDiscrete.ldm()

# --- DMN ---------------------------------------------------------------------------------------


def lam_of(schedule, t: list[float]) -> torch.Tensor:
    return schedule.lam(torch.tensor(t, dtype=torch.float64))


# From the authors' optimiser, to the digits printed.
EDM_8 = [80, 26.0168, 1.9667, 0.5775, 0.2484, 0.1027, 0.0501, 0.0198, 0.002]
EDM_10 = [80, 27.6835, 6.8509, 2.7609, 1.0986, 0.388, 0.1251, 0.0456, 0.0204, 0.0082, 0.002]
REFERENCE = [
    (EDM(), "pixel", [80, 1.0727, 0.2369, 0.002]),
    (EDM(), "pixel", [80, 2.4605, 0.6803, 0.0917, 0.002]),
    (EDM(), "pixel", [80, 3.0628, 1.1135, 0.3737, 0.0723, 0.002]),
    (EDM(), "pixel", [80, 4.4559, 1.3025, 0.6462, 0.2176, 0.052, 0.002]),
    (SD, "latent", [1, 0.5774, 0.3143, 0.0994, 0.001]),
    (SD, "latent", [1, 0.6015, 0.3762, 0.2082, 0.0797, 0.001]),
    (LDM, "latent", [1, 0.6789, 0.4639, 0.1565, 0.001]),
    (LDM, "latent", [1, 0.6987, 0.5318, 0.3437, 0.1267, 0.001]),
]
# Where their optimiser stopped on a flat valley: the bound decides, not the digits.
FLAT = [
    (SD, "latent", [1, 0.6648, 0.4382, 0.3116, 0.1787, 0.0621, 0.001]),
    (LDM, "latent", [1, 0.7484, 0.5783, 0.4591, 0.2849, 0.0964, 0.001]),
]


@pytest.mark.parametrize(("schedule", "weighting", "t"), REFERENCE)
def test_dmn_gives_the_reference_grids(schedule, weighting, t):
    found = dmn(schedule, len(t) - 1, weighting).t
    assert found.tolist() == pytest.approx(t, abs=6e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "weighting", "t"), REFERENCE + FLAT)
def test_dmn_is_no_worse_than_the_reference(schedule, weighting, t):
    found = dmn_bound(dmn(schedule, len(t) - 1, weighting).lam, weighting)
    assert found <= dmn_bound(lam_of(schedule, t), weighting) * (1 + 1e-6)


def written_out(lam: np.ndarray, weighting: str, alone: int) -> float:
    """The bound by the integrals as Xue et al. (2024) expand them, step by step."""
    N, e = len(lam) - 1, np.exp(lam)
    h = np.diff(lam)
    H0 = np.exp(h) - 1
    H1 = h * np.exp(h) - H0
    H2 = h**2 * np.exp(h) - 2 * H1
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam))
    w = (sigma if weighting == "pixel" else sigma**2) / alpha
    total, c = 0.0, np.zeros(N)
    for i in range(N):
        if i in (0, N - 1):
            total += abs((e[i + 1] - e[i]) * w[i])
            continue
        if i in (1, N - 2):
            a = h[i - 1]
            J = e[i] / a * np.array([-H1[i], H1[i] + a * H0[i]])
        else:
            a, b = h[i - 2], h[i - 1]
            last = H2[i] + (2 * b + a) * H1[i] + b * (a + b) * H0[i]
            J = e[i] * np.array(
                [
                    (H2[i] + b * H1[i]) / (a * (a + b)),
                    -(H2[i] + (a + b) * H1[i]) / (a * b),
                    last / (b * (a + b)),
                ]
            )
        points = slice(i + 1 - len(J), i + 1)
        if i < alone:
            total += np.linalg.norm(J * w[points])
        else:
            c[points] += J * w[points]
    return total + np.abs(c).sum()


@pytest.mark.parametrize("weighting", ["pixel", "latent"])
@pytest.mark.parametrize("alone", [0, 3])
@pytest.mark.parametrize("nfe", [1, 2, 3, 5, 8, 12])
def test_dmn_bound_is_the_expansion_of_its_authors(noise, nfe, alone, weighting):
    gaps = (0.5 * noise(nfe, nfe)).exp()
    lam = torch.cat(
        [torch.tensor([-4.0], dtype=torch.float64), -4 + 9 * gaps.cumsum(0) / gaps.sum()]
    )
    expected = written_out(lam.numpy(), weighting, alone)
    assert dmn_bound(lam, weighting, alone).item() == pytest.approx(expected, rel=1e-9)


def test_dmn_bound_has_its_reference_values():
    for t, value in ((EDM_8, 18.28), (EDM_10, 20.16)):
        assert dmn_bound(lam_of(EDM(), t), alone=0).item() == pytest.approx(value, abs=0.006)


def test_signed_sums_alone_would_leave_the_middle_of_the_grid_empty():
    """Why three steps count alone at every nfe, also where the authors' code lets none."""
    ends = [80, 57.4479, 0.1888, 0.0374, 0.0109, 0.0054, 0.0039, 0.0028, 0.002]
    bound = {
        alone: [dmn_bound(lam_of(EDM(), t), alone=alone) for t in (ends, EDM_8)] for alone in (0, 3)
    }
    assert bound[0][0] < 0.6 * bound[0][1] and bound[3][0] > 50 * bound[3][1]


@pytest.mark.parametrize("nfe", [4, 8])
def test_no_neighbour_of_the_dmn_grid_is_better(noise, nfe):
    lam = dmn(EDM(), nfe).lam
    best = dmn_bound(lam)
    for seed in range(40):
        step = torch.zeros_like(lam)
        step[1:-1] = 10.0 ** -(1 + seed % 3) * noise(seed, nfe - 1)
        assert dmn_bound(lam + step) > best * (1 - 1e-6)


@pytest.mark.parametrize("schedule", [EDM(), VPLinear(), SD, RectifiedFlow()])
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_dmn_grids_fall_strictly(schedule, nfe):
    grid = dmn(schedule, nfe)
    assert grid.nfe == nfe and (grid.t.diff() < 0).all()


def test_dmn_depends_on_the_ends_of_lam_only():
    vp = dmn(VPLinear(), 4)
    s = vp.s
    ve = dmn(EDM(T=s[0].item(), t_min=s[-1].item()), 4)
    torch.testing.assert_close(ve.s, s, rtol=1e-6, atol=0)


def test_dmn_refuses_what_it_cannot_do_in_one_sentence(one_sentence):
    with one_sentence("weighting", "'video'", "latent", "pixel"):
        dmn(EDM(), 4, "video")
    with one_sentence("nfe", "0"):
        dmn(EDM(), 0)


# --- GITS --------------------------------------------------------------------------------------


def path_cost(cost: torch.Tensor, path, coefficient: float) -> float:
    return sum(
        coefficient**k * cost[i, j].item() for k, (i, j) in enumerate(itertools.pairwise(path))
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("coefficient", [0.8, 1.0, 1.15])
def test_no_subset_of_the_points_is_cheaper(noise, seed, coefficient):
    M = 5 + seed % 4
    cost = noise(seed, M, M)  # of both signs: a jump may end nearer the chord than the teacher
    for steps in range(1, M):
        inner = itertools.combinations(range(1, M - 1), steps - 1)
        best = min(path_cost(cost, (0, *i, M - 1), coefficient) for i in inner)
        path = cheapest_path(cost, steps, coefficient)
        assert path[0] == 0 and path[-1] == M - 1 and len(path) == steps + 1
        assert all(i < j for i, j in itertools.pairwise(path))
        assert path_cost(cost, path, coefficient) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("schedule", [EDM(), SD], ids=["EDM", "SD"])
def test_jump_costs_are_what_they_are_called(toy, noise, schedule):
    """One Euler step from each point to each later one, measured one by one."""
    grid, x_T = time_logsnr(schedule, 7), schedule.sigma(schedule.T) * noise(0, 5, 3, 2)
    cost = jump_costs(toy(schedule), x_T, grid)
    x = torch.stack(list(trajectory(toy(schedule), x_T, ipndm(grid, 4), grid)))
    y, s = x.flatten(2) / schedule.alpha(grid.t)[:, None, None], grid.s
    for sample in range(5):
        chord = y[-1, sample] - y[0, sample]

        def deviation(point, sample=sample, chord=chord):
            v = point - y[0, sample]
            return (v - (v @ chord) / (chord @ chord) * chord).norm()

        for i, j in itertools.combinations(range(8), 2):
            D = toy(schedule)(x[i], grid.t[i]).flatten(1)[sample]
            jump = y[i, sample] + (s[j] - s[i]) * (y[i, sample] - D) / s[i]
            # at the end the teacher is on the chord
            cost[i, j] -= (deviation(jump) - (deviation(y[j, sample]) if j < 7 else 0)) / 5
    assert cost.triu(1).abs().max() < 1e-6


def test_gits_solves_for_the_teacher_once(toy):
    setup = s4s.load("mixture")
    x_T = s4s.initial_noise(setup, range(40))
    counted = CallCounter(setup.denoiser)
    grid = gits(counted, x_T, EDM(), 5, points=20, batch_size=64)
    assert counted.calls == 20
    fine = time_edm(EDM(), 20).t.tolist()
    assert set(grid.t.tolist()) <= set(fine) and grid.nfe == 5
    in_batches = gits(setup.denoiser, x_T, EDM(), 5, points=20, batch_size=7)
    assert torch.equal(in_batches.t, grid.t)


def test_gits_with_all_points_is_the_teachers_grid(toy, noise):
    x_T = noise(0, 3, 2)
    for schedule, fine in ((EDM(), time_edm), (SD, time_uniform)):
        grid = gits(toy(schedule), x_T, schedule, 9, points=9)
        assert torch.equal(grid.t, fine(schedule, 9).t)


def test_gits_refuses_more_steps_than_points_in_one_sentence(one_sentence, toy, noise):
    with one_sentence("GITS", "9 steps", "nfe", "10"):
        gits(toy(EDM()), noise(0, 3, 2), EDM(), 10, points=9)
    for steps in (0, 5):
        with one_sentence("1 to 4 steps", str(steps)):
            cheapest_path(noise(0, 5, 5), steps)


# --- AYS ---------------------------------------------------------------------------------------

OF_DIFFUSERS = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL"}


@pytest.mark.parametrize("model", OF_DIFFUSERS)
def test_ays_grids_are_the_lists_of_diffusers(model):
    grid = ays(SD, 10, model)
    sigmas, timesteps = (
        AysSchedules[OF_DIFFUSERS[model] + kind] for kind in ("Sigmas", "Timesteps")
    )
    # diffusers ends at sigma = 0, where ours ends at the model's last noise level.
    torch.testing.assert_close(grid.s[:-1].tolist(), sigmas[:-1], rtol=1e-4, atol=0)
    assert grid.t[-1] == SD.t_min
    found = 1000 * grid.t[:-1] - 1
    assert (found - torch.tensor(timesteps)).abs().max() < 0.6


@pytest.mark.parametrize("nfe", [1, 3, 5, 20, 27])
def test_other_lengths_of_ays_interpolate_the_logarithms_of_the_noise_levels(nfe):
    ten, grid = ays(SD, 10), ays(SD, nfe)
    expected = np.interp(np.linspace(0, 1, nfe + 1), np.linspace(0, 1, 11), ten.lam)
    np.testing.assert_allclose(grid.lam, expected, rtol=0, atol=1e-9)


def test_ays_refuses_what_has_no_list_in_one_sentence(one_sentence):
    for schedule in (EDM(), LDM, VPLinear(), VPDiscrete(t_min=0.002)):
        with one_sentence("AYS", "Stable Diffusion", type(schedule).__name__):
            ays(schedule, 10)
    with one_sentence("AYS model", "'sd3'", "sd15", "sdxl"):
        ays(SD, 10, "sd3")
    with one_sentence("nfe", "0"):
        ays(SD, 0)


@pytest.mark.parametrize("make", [lambda: dmn(EDM(), 5), lambda: ays(SD, 5)], ids=["dmn", "ays"])
def test_searched_grids_start_learning_too(make):
    grid = make()
    again = s4s.LearnedGrid.start_at(grid).grid()
    assert isinstance(grid, TimeGrid)
    torch.testing.assert_close(again.t, grid.t, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nfe", [3, 4, 5, 6, 8, 10])
def test_the_listed_gits_grid_runs_through_its_noise_levels(nfe):
    grid = gits_sd15(VPDiscrete(), nfe)
    assert grid.nfe == nfe
    assert grid.s[0].item() == pytest.approx(14.6146, abs=1e-3)
    assert grid.s[-1].item() == pytest.approx(0.0292, abs=1e-4)
    rounded = (grid.s[1:-1] * 1e4).round() / 1e4
    torch.testing.assert_close(grid.s[1:-1], rounded, rtol=0, atol=1e-9)


def test_where_gits_lists_nothing_a_sentence_says_so(one_sentence):
    with one_sentence("nfe 7", "3, 4, 5, 6, 8, 10", "gits"):
        gits_sd15(VPDiscrete(), 7)
    with one_sentence("EDM", "search it"):
        gits_sd15(s4s.EDM(), 5)
