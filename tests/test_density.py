"""Densities of samples: against closed forms, finite differences, round trips and integrals."""

import math

import pytest
import torch

from s4s_core import (
    EDM,
    Coefficients,
    GaussianMixture,
    Solver,
    TimeGrid,
    VPLinear,
    compare_densities,
    ddim,
    dpm_solver_pp,
    initial_noise,
    invert,
    ipndm,
    jacobian,
    log_abs_det,
    time_edm,
    time_logsnr,
    unipc,
)

every_schedule = pytest.mark.parametrize("schedule", [EDM(), VPLinear()], ids=["EDM", "VPLinear"])


def normal(schedule):
    """Gaussian data in three dimensions, whose denoiser is linear in x: so is every solver."""
    return GaussianMixture([1.0], [[0.3, -1.2, 0.5]], [0.4], schedule)


def solvers(schedule):
    """A student and a teacher on different grids."""
    coarse, fine = time_edm(schedule, 4), time_logsnr(schedule, 30)
    return Solver(ipndm(coarse, 3), coarse), Solver(unipc(fine, 3), fine)


def noise_of(schedule, z):
    return z * schedule.sigma(schedule.T)


def line(solver, denoiser, d=3):
    """Intercept and slope of a map that treats every entry alike: x_0 = c + g x_T."""
    zero, one = torch.zeros(1, d).double(), torch.ones(1, d).double()
    c = solver.sample(denoiser, zero)
    return c, (solver.sample(denoiser, one) - c).mean()


@every_schedule
def test_the_jacobian_is_that_of_finite_differences(toy, noise, schedule):
    denoiser, (student, _) = toy(schedule), solvers(schedule)
    x_T = noise_of(schedule, noise(0, 5, 2, 2))
    x_0, J = jacobian(student, denoiser, x_T)
    assert torch.equal(x_0, student.sample(denoiser, x_T))
    step = 1e-5 * schedule.sigma(schedule.T)
    for j, shift in enumerate(step * torch.eye(4).double().view(4, 1, 2, 2)):
        change = student.sample(denoiser, x_T + shift) - student.sample(denoiser, x_T - shift)
        slope = (change / (2 * step)).flatten(1)
        torch.testing.assert_close(J[:, :, j], slope, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(log_abs_det(student, denoiser, x_T), J.det().abs().log())


@every_schedule
def test_gaussian_data_give_the_divergence_of_two_gaussians(noise, schedule):
    denoiser, (student, teacher) = normal(schedule), solvers(schedule)
    x_T = noise_of(schedule, noise(1, 4000, 3))
    (c_p, g_p), (c_q, g_q) = line(student, denoiser), line(teacher, denoiser)
    sigma = schedule.sigma(schedule.T)
    x_0 = teacher.sample(denoiser, x_T)
    p, q = (torch.distributions.Normal(c, g * sigma) for c, g in ((c_p, g_p), (c_q, g_q)))
    found = compare_densities(student, teacher, denoiser, x_T)
    exact = (q.log_prob(x_0) - p.log_prob(x_0)).sum(1)
    torch.testing.assert_close(found.log_ratio, exact, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.determinants, (g_q / g_p).log().mul(3).expand(4000))
    assert found.found == 1
    kl = torch.distributions.kl_divergence(q, p).sum().item()
    assert abs(found.kl - kl) < 4 * found.standard_error < kl


def test_a_solver_does_not_differ_from_itself(mixture):
    setup = mixture()
    student = Solver(dpm_solver_pp(time_edm(EDM(), 8), 2), time_edm(EDM(), 8))
    found = compare_densities(student, student, setup.denoiser, initial_noise(setup, range(50)))
    assert (found.kl, found.radius, found.bound(0.0), found.found) == (0, 0, 0, 1)


@every_schedule
def test_inverting_returns_to_the_noise(noise, schedule):
    plane = GaussianMixture([1.0, 2.0], [[-1.0, 0.0], [0.5, 0.8]], [0.3, 0.5], schedule)
    _, teacher = solvers(schedule)
    x_T = noise_of(schedule, noise(2, 200, 2))
    a, found = invert(teacher, plane, teacher.sample(plane, x_T), torch.zeros_like(x_T))
    assert found.all()
    torch.testing.assert_close(a, x_T, rtol=1e-6, atol=1e-6 * schedule.T)


@pytest.mark.slow
def test_the_density_integrates_to_one_and_that_of_the_teacher_is_the_data_density():
    plane = GaussianMixture([1.0, 2.0], [[-1.0, 0.0], [0.5, 0.8]], [0.3, 0.5], EDM())
    x = torch.linspace(-3.5, 3.5, 41, dtype=torch.float64)
    x_0, cell = torch.cartesian_prod(x, x), (x[1] - x[0]) ** 2
    fine = time_logsnr(EDM(), 100)
    for solver in (solvers(EDM())[0], Solver(unipc(fine, 3), fine)):
        x_T, found = invert(solver, plane, x_0, 80 * x_0)
        assert found.all()
        log_normal = -x_T.square().sum(1) / (2 * 80**2) - math.log(2 * math.pi * 80**2)
        log_det = log_abs_det(solver, plane, x_T)
        assert (log_normal - log_det).exp().sum().mul(cell).item() == pytest.approx(1, abs=2e-3)
    # The exact flow takes the mixture at T, which is not quite Gaussian, to the mixture at t_min.
    T, t_min = torch.tensor([EDM().T, EDM().t_min], dtype=torch.float64)
    first, last = plane.log_prob(x_T, T), plane.log_prob(x_0, t_min)
    torch.testing.assert_close(first - log_det, last, rtol=0, atol=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_holds_at_the_radius_that_the_noises_need(mixture, noise, seed):
    setup = mixture()
    grid = time_logsnr(setup.schedule, 8)
    b = ipndm(grid, 2).b * (1 + 0.03 * noise(seed, 8, 2))
    student = Solver(Coefficients(b), grid)
    found = compare_densities(
        student, setup.teacher, setup.denoiser, initial_noise(setup, range(300))
    )
    assert found.found > 0.9 and found.radius > 0
    # Step by step: the Gaussian part alone, then all of it.
    gaussian = (found.log_ratio + found.determinants).mean().item()
    assert gaussian <= found.radius**2 / 2 + found.radius * found.b.norm(dim=1).mean().item()
    assert found.kl < found.bound(found.radius)
    assert found.bound(0.0) == found.determinants.abs().mean().item()
    assert found.bound(1.0) == pytest.approx(found.bound(0.0) + 0.5 + math.sqrt(3))


class Fold:
    """D(x, t) = x^2: one DDIM step takes x_T and -x_T to nearly the same place, never below 0."""

    def __call__(self, x, t):
        return x**2


def test_where_the_map_folds_a_noise_may_not_be_found(one_sentence):
    schedule = EDM(T=1.0, t_min=1e-3)
    grid = TimeGrid(schedule, torch.tensor([1.0, 1e-3], dtype=torch.float64))
    student = Solver(ddim(grid), grid)
    x_0 = torch.tensor([[0.5], [-0.5], [2.0]], dtype=torch.float64)
    a, found = invert(student, Fold(), x_0, torch.full_like(x_0, 0.3))
    assert found.tolist() == [True, False, True]
    torch.testing.assert_close(student.sample(Fold(), a)[found], x_0[found])
    shrink = Solver(Coefficients(torch.zeros(1, 1).double(), None, "data"), grid)
    with one_sentence("inverted"):
        compare_densities(student, shrink, Fold(), torch.full_like(x_0, -0.3))
