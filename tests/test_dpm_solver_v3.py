"""DPM-Solver-v3: its table against its two special cases, its statistics against closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import s4s_core as s4s
from s4s_core import (
    EDM,
    GRIDS,
    Coefficients,
    Experiment,
    GaussianMixture,
    ModelStatistics,
    Solver,
    TimeGrid,
    VPDiscrete,
    VPLinear,
    dpm_solver_v3,
    exponential_adams,
    model_statistics,
    time_logsnr,
    trajectory,
)
from s4s_core.published import _exponential_row
from s4s_core.solver import solve

DATA, NOISE = (1.0, 0.0), (0.0, -1.0)  # l and s of the two predictions


def constant(schedule, l, s, b=0.0, points=120):  # noqa: E741
    """Scalar statistics that do not depend on lam."""
    lam = time_logsnr(schedule, points - 1).lam
    return ModelStatistics(lam, *(torch.full_like(lam, value) for value in (l, s, b)))


def curved(schedule, points=1000):
    """Smooth statistics for samples of 3 entries, different in each."""
    lam = time_logsnr(schedule, points - 1).lam
    u = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    entry = torch.arange(1.0, 4.0, dtype=torch.float64)
    l, s = 0.5 + 0.3 * (3 * u * entry).cos(), -0.5 + 0.4 * (4 * u + entry).sin()  # noqa: E741
    return ModelStatistics(lam, l, s, 0.3 * (5 * u * entry + 1).cos())


@pytest.fixture
def setup_of(mixture):
    """`setup_of(denoiser, *shape)`: a setup of that model."""

    def make(denoiser, *shape, **settings):
        return replace(
            mixture(**settings), denoiser=denoiser, schedule=denoiser.schedule, shape=shape
        )

    return make


# --- The table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", [EDM(), VPLinear(), VPDiscrete()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("grid", ["logsnr", "edm", "uniform"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("form", "statistics"), [("data", DATA), ("noise", NOISE)])
def test_constant_statistics_give_the_exponential_integrators(
    toy, noise, schedule, grid, order, form, statistics
):
    grid, x_T = GRIDS[grid](schedule, 7), schedule.sigma(schedule.T) * noise(order, 4, 3)
    table = dpm_solver_v3(grid, constant(schedule, *statistics), order, corrector="none")
    oracle = exponential_adams(grid, order, form)
    for x, expected in zip(
        trajectory(toy(schedule), x_T, table, grid),
        trajectory(toy(schedule), x_T, oracle, grid),
        strict=True,
    ):
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("form", "statistics"), [("data", DATA), ("noise", NOISE)])
def test_constant_statistics_give_the_corrector_of_unipc(toy, noise, form, statistics):
    grid = GRIDS["edm"](VPLinear(), 7)
    h, sign, rows = grid.lam.diff(), 1 if form == "noise" else -1, []
    for i, p in enumerate([1, 2, 3, 3, 3, 2]):
        z = sign * h[i]
        nodes = [(grid.lam[i - n] - grid.lam[i]) / h[i] for n in range(1, p - 1)]
        if p == 1:  # as many values as the predictor: nothing to correct with
            rows.append([0.0, 1.0, 0.0, 0.0])
            continue
        *old, new = _exponential_row([*nodes, torch.ones_like(z)], z, z)
        rows.append([new, 1 - new - sum(old), *old] + [0.0] * (2 - len(old)))
    c = torch.tensor([*rows, [0.0] * 4], dtype=torch.float64)
    oracle = Coefficients(exponential_adams(grid, 3, form).b, c, form)
    table = dpm_solver_v3(grid, constant(VPLinear(), *statistics), 3, corrector="full")
    x_T = noise(0, 4, 3)
    x_0, expected = (solve(toy(VPLinear()), x_T, t, grid) for t in (table, oracle))
    torch.testing.assert_close(x_0, expected, rtol=1e-9, atol=1e-9)


def divided(lam, values):
    """The divided difference of all `values`, by its recursion."""
    if len(values) == 1:
        return values[0]
    return (divided(lam[1:], values[1:]) - divided(lam[:-1], values[:-1])) / (lam[-1] - lam[0])


@pytest.mark.parametrize("pseudo", [False, True])
def test_a_step_is_the_formula_integrated_on_a_fine_grid(pseudo, noise):
    schedule, i, points = VPLinear(), 3, [3, 4, 2, 1]
    statistics, grid = curved(schedule, 40), time_logsnr(schedule, 6)
    table = dpm_solver_v3(grid, statistics, 3, corrector="pseudo" if pseudo else "full")
    points = points if pseudo else points[:3]
    f, y = [noise(n, 3) for n in points], noise(9, 3)

    lam = torch.linspace(grid.lam[1], grid.lam[5], 40001, dtype=torch.float64)
    lam = torch.cat([lam, grid.lam[1:6]]).unique()
    place = torch.searchsorted(lam, grid.lam)
    start, end = place[i], place[i + 1]

    def integral(values):  # trapezoidal, from grid point i
        pieces = lam.diff()[:, None] * (values[1:] + values[:-1]) / 2
        total = torch.cat([torch.zeros_like(pieces[:1]), pieces.cumsum(0)])
        return total - total[start]

    l, s, b = statistics.at(lam)  # noqa: E741
    L, S = integral(l), integral(s)
    B = integral((-S).exp() * b)
    g = [(-S[place[n]]).exp() * value - B[place[n]] for n, value in zip(points, f, strict=True)]
    x, u = grid.lam[points] - grid.lam[i], (lam - grid.lam[i])[:, None]
    p, basis = torch.zeros_like(L), torch.ones_like(u)
    for n in range(len(points)):
        p = p + basis * divided(x[: n + 1], g[: n + 1])
        basis = basis * (u if pseudo else u - x[n])
    expected = (-L[end]).exp() * (y - integral((L + S).exp() * (p + B))[end])

    evaluations = [value / grid.s[n] for n, value in zip(points, f, strict=True)]
    now, new, *old = evaluations
    found = table.a[i, 0] * y + table.d[i, 1]
    for weight, evaluation in zip(table.c[i], [new, now, *old], strict=False):
        found = found + grid.s.diff()[i] * weight * evaluation
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("predictor", "corrector", "order", "expected"),
    [
        *[("full", "none", 1, 1), ("full", "none", 2, 2), ("full", "none", 3, 3)],
        *[("full", "full", 2, 2), ("full", "full", 3, 3), ("pseudo", "none", 3, 2)],
        *[("full", "pseudo", 1, 2), ("full", "pseudo", 2, 2), ("full", "pseudo", 3, 2)],
    ],
)
def test_order_of_convergence(predictor, corrector, order, expected):
    """On D = g y, g a narrow bump, whose flow is exact; where g is zero so is a step of any order.

    The falling orders at both ends then cost nothing, since the statistics are bumps there too.
    """
    width, half, errors = 0.5, 4.0, []
    schedule = EDM(T=math.exp(half), t_min=math.exp(-half))

    def bump(lam):
        return (-0.5 * (lam / width) ** 2).exp()

    lam = time_logsnr(schedule, 4000).lam
    statistics = ModelStatistics(lam, 1 + 0.4 * bump(lam), -0.5 * bump(lam), 0.3 * bump(lam))
    for nfe in (64, 128):
        grid = time_logsnr(schedule, nfe)
        table = dpm_solver_v3(grid, statistics, order, predictor, corrector)
        x_T = torch.ones(1, 1, dtype=torch.float64)
        y = torch.cat([*trajectory(lambda x, t: x * bump(-t.log()), x_T, table, grid)])[:, 0]
        integral = width * math.sqrt(math.pi / 2) * (1 + torch.erf(grid.lam / width / math.sqrt(2)))
        errors.append((y / (integral - grid.lam - half).exp() - 1).abs().max().item())
    assert math.log2(errors[0] / errors[1]) > expected - 0.3, errors


# --- The statistics -----------------------------------------------------------------------------


def test_one_step_is_exact_on_gaussian_data(setup_of, noise):
    schedule, mean, std = EDM(T=5.0, t_min=0.05), torch.tensor([[0.4, -0.3]]), 0.5
    data = GaussianMixture([1.0], mean, [std], schedule)
    statistics = model_statistics(setup_of(data, 2), data.sample(2), points=100)
    s_2 = (-2 * statistics.lam).exp()[:, None]
    torch.testing.assert_close(statistics.l, (s_2 / (s_2 + std**2)).expand(-1, 2))
    # f = -l mean does not vary, so that b alone follows it.
    assert not statistics.s.any()
    slope = 2 * std**2 * s_2 / (s_2 + std**2) ** 2 * mean
    torch.testing.assert_close(statistics.b, slope, rtol=1e-3, atol=1e-3)
    grid, x_T = time_logsnr(schedule, 1), 5 * noise(0, 6, 2)
    shrink = math.sqrt((std**2 + 0.05**2) / (std**2 + 5.0**2))
    x_0 = solve(data, x_T, dpm_solver_v3(grid, statistics, 1), grid)
    torch.testing.assert_close(x_0, mean + shrink * (x_T - mean), rtol=0, atol=1e-3)
    one_step = solve(data, x_T, exponential_adams(grid, 1), grid)
    assert (one_step - x_0).abs().max() > 0.1


@pytest.mark.slow
def test_statistics_of_a_mixture_agree_with_differences_and_a_regression(setup_of):
    schedule = VPLinear()
    data = GaussianMixture([1, 2], [[-1.0], [0.8]], [0.3, 0.4], schedule)
    x_0 = data.sample(200, seed=1)
    statistics = model_statistics(setup_of(data, 1), x_0, points=100, seed=3)
    noise = torch.randn(200, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def D(y, lam):
        t = schedule.t_of_lam(lam)
        return data(schedule.alpha(t) * y, t)

    def l_at(lam, h=1e-5):  # in one dimension Hutchinson's estimate is exact
        y = x_0 + (-lam).exp() * noise
        return 1 - ((D(y + h, lam) - D(y - h, lam)) / (2 * h)).mean()

    def flow(y, lam, h):  # one midpoint step
        half = y + h / 2 * (D(y, lam) - y)
        return y + h * (D(half, lam + h / 2) - half)

    for i in (5, 27, 47, 67, 99):
        lam, h = statistics.lam[i], 1e-3
        y, f = x_0 + (-lam).exp() * noise, {}
        for step in (-h, 0.0, h):
            moved = flow(y, lam, step)
            f[step] = moved - D(moved, lam + step) - l_at(lam + step) * moved
        rate = (f[h] - f[-h]) / (2 * h)
        s, b = np.polyfit(f[0.0].flatten().numpy(), rate.flatten().numpy(), 1)
        found = [v[i].item() for v in (statistics.l, statistics.s, statistics.b)]
        assert found == pytest.approx([l_at(lam).item(), s, b], rel=2e-2, abs=2e-3)


def test_statistics_do_not_depend_on_the_batch_size(setup_of, toy):
    x_0 = GaussianMixture([1.0], [[0.0] * 3], [0.5], EDM()).sample(10)
    one, other, again = (
        vars(model_statistics(setup_of(toy(EDM()), 3, sample_batch_size=n), x_0, points=6))
        for n in (10, 3, 10)
    )
    for name, table in one.items():
        torch.testing.assert_close(other[name], table, rtol=1e-10, atol=1e-10)
        assert torch.equal(again[name], table)


def test_every_sample_meets_its_own_condition(setup_of, toy, one_sentence):
    """Samples and model moved by the condition: what the Jacobian says stays the same."""
    plain, x_0 = toy(EDM()), GaussianMixture([1.0], [[0.0] * 3], [0.5], EDM()).sample(10)

    def denoise(x, t, c):
        return plain(x - c, t) + c

    denoise.schedule = EDM()
    seeds = torch.arange(10)
    setup = setup_of(denoise, 3, sample_batch_size=4)
    setup = replace(setup, condition=lambda seeds: 3.0 * torch.tensor(seeds)[:, None])
    moved = model_statistics(setup, x_0 + 3.0 * seeds[:, None], points=6, seeds=seeds)
    expected = model_statistics(setup_of(plain, 3), x_0, points=6)
    torch.testing.assert_close(moved.l, expected.l, rtol=1e-9, atol=1e-9)
    with one_sentence("condition", "seeds"):
        model_statistics(setup, x_0, points=6)


# --- Around it ------------------------------------------------------------------------------------


def test_decoupled_times_leave_f_what_the_network_says(toy, noise):
    schedule = EDM()
    grid = time_logsnr(schedule, 4)
    grid = TimeGrid(schedule, grid.t, (grid.t * 1.1).clamp(max=schedule.T))
    table = dpm_solver_v3(grid, constant(schedule, *DATA), 2, corrector="none")
    x_T = schedule.T * noise(0, 3, 2)
    expected = solve(toy(schedule), x_T, exponential_adams(grid, 2), grid)
    found = solve(toy(schedule), x_T, table, grid)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_table_per_entry_survives_its_file(tmp_path, toy, noise):
    grid = time_logsnr(VPLinear(), 5)
    solver = Solver(dpm_solver_v3(grid, curved(VPLinear()), 3), grid)
    solver.save(tmp_path / "v3.json")
    x_T = noise(0, 4, 3)
    read = Solver.load(tmp_path / "v3.json")
    assert torch.equal(read.sample(toy(VPLinear()), x_T), solver.sample(toy(VPLinear()), x_T))


def test_slips_are_told_in_one_sentence(one_sentence, setup_of, toy):
    grid, statistics = time_logsnr(VPLinear(), 5), constant(VPLinear(), *DATA)
    with one_sentence("order", "6"):
        dpm_solver_v3(grid, statistics, 6)
    with one_sentence("corrector", "half", "pseudo"):
        dpm_solver_v3(grid, statistics, corrector="half")
    with one_sentence("lam", "schedule"):
        dpm_solver_v3(time_logsnr(EDM(), 5), statistics)
    with one_sentence("x_0", "(3,)"):
        model_statistics(setup_of(toy(EDM()), 3), torch.zeros(10, 2))
    with one_sentence("denoiser", "no_grad"):
        hidden = s4s.from_denoiser(lambda x, t: x.detach(), EDM())
        model_statistics(setup_of(hidden, 3), torch.zeros(2, 3))
    with one_sentence("finite"):
        constant(EDM(), math.nan, 0.0)
    with one_sentence("overflows", "n_train"):
        dpm_solver_v3(grid, constant(VPLinear(), 0.0, -1e4))
    with one_sentence("one shape"):
        ModelStatistics(statistics.lam, statistics.l, statistics.s, statistics.b[:-1])


def test_an_experiment_runs_on_any_grid_and_keeps_the_statistics(results):
    settings = {"n_train": 40, "n_valid": 8, "teacher_nfe": 20, "fid_samples": 200}
    experiment = Experiment(
        "mixture", grid="edm", solver="dpm_solver_v3", order=3, nfe=6, settings=settings
    )
    result = s4s.run(experiment)
    (kept,) = (results / "mixture").glob("model_statistics_*")
    before = kept.stat().st_mtime_ns
    assert math.isfinite(result.frechet) and 0 < result.distance_to_teacher < 1
    other = s4s.run(replace(experiment, grid="logsnr"))
    assert kept.stat().st_mtime_ns == before
    assert other.seconds == result.seconds > 0  # those of the statistics, which both share
    assert s4s.run(experiment).solver == result.solver


@pytest.mark.parametrize("wrong", [{"learn": "coefficients"}, {"learn": "times"}, {"grid": "ld3"}])
def test_an_experiment_does_not_learn_it(one_sentence, wrong):
    with one_sentence("dpm_solver_v3", "statistics", "learn"):
        Experiment("mixture", solver="dpm_solver_v3", **wrong)
