"""Single-step solvers: the unrolled table against the method itself, golden numbers and slopes."""

import math

import pytest
import torch

import s4s_core as s4s
from s4s_core import (
    EDM,
    CallCounter,
    SingleStepCoefficients,
    Solver,
    TimeGrid,
    VPDiscrete,
    VPLinear,
    consistent,
    count_parameters,
    dpm_solver,
    learn_alternating,
    learn_coefficients,
    learn_jointly,
    learn_times,
    make_teacher_set,
    time_edm,
    time_logsnr,
)
from s4s_core.solver import solve

SCHEDULES = {"EDM": EDM(), "SD": VPDiscrete(), "VP": VPLinear()}
forms = pytest.mark.parametrize("prediction", ["noise", "data"])
orders = pytest.mark.parametrize("order", [2, 3])


def stage_by_stage(denoiser, x_T, phi, grid):
    """The explicit method as it is defined: every stage starts at the step's own first state."""
    schedule = grid.schedule
    x = x_T
    for i in range(grid.nfe):
        h = grid.lam[i + 1] - grid.lam[i]
        times = [schedule.t_of_lam(grid.lam[i] + c * h) for c in phi.c[i]]
        times[0] = grid.t[i]
        y = x / schedule.alpha(grid.t[i])
        s_0, evaluations = grid.s[i], []

        def reach(t, weights, y=y, s_0=s_0, evaluations=evaluations):
            s = schedule.s(t)
            total = sum((w * e for w, e in zip(weights, evaluations, strict=False)), 0 * y)
            if phi.prediction == "noise":
                return schedule.alpha(t) * (y + (s - s_0) * total)
            return schedule.alpha(t) * (s / s_0 * y + (1 - s / s_0) * total)

        for j, t in enumerate(times):
            at = reach(t, phi.a[i, j])
            t_model = grid.t_model[i] if j == 0 else t
            D = denoiser(at, t_model)
            eps = (at - schedule.alpha(t_model) * D) / schedule.sigma(t_model)
            evaluations.append(eps if phi.prediction == "noise" else D)
        x = reach(grid.t[i + 1], phi.b[i])
    return x


def random_phi(noise, N, k, prediction):
    c = torch.linspace(0, 1, k + 1, dtype=torch.float64)[:-1] + 0.05 * noise(3, N, k).tanh()
    c[:, 0] = 0
    a = (1 / k + 0.3 * noise(2, N, k, k)).tril(-1)
    return SingleStepCoefficients(1 / k + 0.3 * noise(1, N, k), a, c, prediction)


@pytest.mark.parametrize(
    ("order", "expected"), [(2, 0.016418237113), (3, 0.012508731981)], ids=["2S", "3S"]
)
def test_dpm_solver_gives_its_golden_number(order, expected):
    # Data N(0, 1), x_T = 1, five steps of EDM's rho-7 grid.
    grid = time_edm(EDM(), 5)
    x_T = torch.ones(1, 1, dtype=torch.float64)
    x_0 = solve(lambda x, t: x / (1 + t**2), x_T, dpm_solver(grid, order), grid)
    assert x_0.item() == pytest.approx(expected, abs=1e-12)


@forms
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_unrolled_table_is_the_method(toy, noise, schedule, k, prediction):
    phi, x_T = random_phi(noise, 3, k, prediction), noise(0, 4, 3)
    grid = time_logsnr(schedule, 3)
    told = torch.cat([grid.t[:1], grid.t[1:-1] * 1.03, grid.t[-1:]])
    for grid in (TimeGrid(schedule, grid.t, t_model) for t_model in (None, told)):
        found = solve(toy(schedule), x_T, phi, grid)
        expected = stage_by_stage(toy(schedule), x_T, phi, grid)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_a_stage_is_one_call(toy, noise):
    for order in (2, 3):
        grid = time_logsnr(EDM(), 4)
        denoiser = CallCounter(toy(EDM()))
        solver = Solver(dpm_solver(grid, order), grid)
        solver.sample(denoiser, 80 * noise(0, 2, 3))
        assert denoiser.calls == solver.nfe == 4 * order


@forms
@orders
def test_errors_fall_with_the_order(order, prediction):
    # Data N(0, 1) have the exact flow x_t = x_T sqrt(1 + t^2) / sqrt(1 + T^2).
    schedule, errors = EDM(T=4.0, t_min=0.25), []
    x_T = torch.ones(1, 1, dtype=torch.float64)
    exact = math.sqrt((1 + schedule.t_min**2) / (1 + schedule.T**2))
    for N in (20, 40, 80):
        grid = time_logsnr(schedule, N)
        x = solve(lambda x, t: x / (1 + t**2), x_T, dpm_solver(grid, order, prediction), grid)
        errors.append(abs(x.item() - exact))
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


@forms
def test_derivatives_equal_finite_differences(toy, noise, prediction):
    phi, x_T, h = random_phi(noise, 2, 3, prediction), noise(0, 2, 3), 1e-6
    grid = time_logsnr(VPLinear(), 2)

    def value(b, a, c):
        return solve(toy(VPLinear()), x_T, SingleStepCoefficients(b, a, c, prediction), grid).sum()

    tables = [table.clone().requires_grad_() for table in (phi.b, phi.a, phi.c)]
    gradients = torch.autograd.grad(value(*tables), tables)
    for table, gradient, where in zip(tables, gradients, [(1, 2), (1, 2, 0), (0, 1)], strict=True):
        with torch.no_grad():
            table[where] += h
            above = value(*tables).item()
            table[where] -= 2 * h
            below = value(*tables).item()
            table[where] += h
        difference = (above - below) / (2 * h)
        assert gradient[where].item() == pytest.approx(difference, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(("k", "ours", "printed"), [(1, 1, 1), (2, 4, 5), (3, 8, 11)])
def test_both_ways_of_counting_parameters(noise, k, ours, printed):
    phi = random_phi(noise, 5, k, "noise")
    assert count_parameters(phi) == 5 * ours
    assert count_parameters(phi, as_printed=True) == 5 * printed  # (k^2 + k - 1) N, Table 1
    assert count_parameters(phi, time_dependent=False) == ours


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b": torch.ones(2, 2, 2)}, ["b must have shape (N, k)"]),
        ({"a": torch.zeros(2, 2)}, ["a must have shape", "(2, 2, 2)"]),
        ({"a": torch.ones(2, 2, 2)}, ["a weighs", "not exist"]),
        ({"c": torch.tensor([[0.0, 0.5, 0.6]] * 2)}, ["c must have shape (2, 2)"]),
        ({"c": torch.tensor([[0.1, 0.5]] * 2)}, ["c must rise from 0"]),
        ({"c": torch.tensor([[0.0, 1.0]] * 2)}, ["below 1"]),
        ({"b": torch.full((2, 2), math.nan)}, ["b must be finite"]),
        ({"prediction": "v"}, ["prediction form", "v"]),
    ],
)
def test_numbers_that_are_no_single_step_solver_are_refused(one_sentence, change, words):
    good = {
        "b": torch.ones(2, 2) / 2,
        "a": torch.ones(2, 2, 2).tril(-1),
        "c": torch.tensor([[0.0, 0.5]] * 2),
    }
    with one_sentence(*words):
        SingleStepCoefficients(**{**good, **change})


def test_calls_that_do_not_fill_a_step_are_refused(one_sentence):
    with one_sentence("multiple of 3", "not 5"):
        s4s.Experiment(dataset="mixture", solver="dpm_solver", order=3, nfe=5)
    with one_sentence("2 or 3", "not 4"):
        dpm_solver(time_logsnr(EDM(), 3), 4)
    with one_sentence("bns", "multistep", "ipndm"):
        s4s.Experiment(dataset="mixture", solver="dpm_solver", order=2, nfe=6, learn="bns")


def test_a_file_keeps_stages_and_bits(toy, noise, tmp_path):
    grid, x_T = time_logsnr(EDM(), 3), 80 * noise(0, 4, 3)
    solver = Solver(random_phi(noise, 3, 2, "data"), grid)
    solver.save(tmp_path / "solver.json")
    loaded = Solver.load(tmp_path / "solver.json")
    assert loaded == solver and loaded.nfe == 6
    assert torch.equal(loaded.sample(toy(EDM()), x_T), solver.sample(toy(EDM()), x_T))


# --- Learning ---------------------------------------------------------------------------------


@pytest.fixture
def problem(mixture):
    def make(order: int = 2, **settings):
        setup = mixture(**settings)
        grid = time_logsnr(setup.schedule, 3)
        return Solver(dpm_solver(grid, order), grid), setup, make_teacher_set(setup)

    return make


@pytest.mark.parametrize("learn", [learn_coefficients, learn_times, learn_alternating])
@orders
def test_learning_begins_at_the_published_solver_and_improves(problem, learn, order):
    solver, setup, teacher = problem(order, n_train=40, n_train_alt=40)
    epochs = list(learn(solver, setup, teacher))
    assert epochs[0].solver == solver
    assert epochs[-1].best.nfe == 3 * order
    fresh = make_teacher_set(setup, seed=7)
    error = [
        (s.sample(setup.denoiser, fresh.x_T) - fresh.x_0).square().mean().item()
        for s in (solver, epochs[-1].best)
    ]
    assert error[1] < error[0]


@orders
def test_weights_and_stages_are_learned_within_their_bounds(problem, order):
    solver, setup, teacher = problem(order, lr_phi=0.5)  # a rate that drives stages into bounds
    learned = list(learn_coefficients(solver, setup, teacher))[-1].solver.coefficients
    for name in ("b", "a", "c"):
        before, after = getattr(solver.coefficients, name), getattr(learned, name)
        assert not torch.equal(before, after)
    assert torch.equal(learned.a, learned.a.tril(-1))
    assert (learned.c[:, 0] == 0).all()
    gaps = torch.cat([learned.c, torch.ones(3, 1)], 1).diff(dim=1)
    assert (gaps >= 0.01 - 1e-12).all()


def test_shared_coefficients_are_the_same_in_every_step(problem):
    solver, setup, teacher = problem(2, time_dependent=False)
    learned = list(learn_coefficients(solver, setup, teacher))[-1].solver.coefficients
    for table in (learned.b, learned.a, learned.c):
        assert (table == table[:1]).all()


@pytest.mark.parametrize("learn", [learn_coefficients, learn_jointly])
def test_consistency_keeps_rows_that_sum_to_one(problem, learn):
    for free in (False, True):
        solver, setup, teacher = problem(2, consistent=not free)
        b = list(learn(solver, setup, teacher))[-1].solver.coefficients.b
        kept = torch.allclose(b.sum(1), torch.ones(3, dtype=torch.float64), atol=1e-12)
        assert kept != free


def test_consistency_moves_existing_weights_only(noise):
    phi = random_phi(noise, 3, 2, "noise")
    torch.testing.assert_close(consistent(phi).b.sum(1), torch.ones(3, dtype=torch.float64))
    multistep = s4s.gaussian(time_logsnr(EDM(), 4), 3)
    b = consistent(multistep).b
    torch.testing.assert_close(b.sum(1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(b, b.tril())
    published = s4s.ipndm(time_logsnr(EDM(), 4), 3)
    torch.testing.assert_close(consistent(published).b, published.b, rtol=1e-15, atol=1e-15)
