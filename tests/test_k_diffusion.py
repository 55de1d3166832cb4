"""A solver as a k-diffusion sampler: the same samples, on its own levels only, also in parts."""

from dataclasses import replace

import pytest
import torch

import s4s_core as s4s
from s4s_core import Coefficients, Solver, TimeGrid, sample_s4s, sigmas_of, snap_to_levels
from s4s_core.deploy.part import part_of

N = 5
SD, FLOW = s4s.VPDiscrete(), s4s.RectifiedFlow(shift=3.0)


def net(x, t):
    """A network of x (B, ...) and t (B,), nonlinear in both."""
    return torch.tanh(x * (1 + t.to(x).view(-1, *[1] * (x.ndim - 1))) + 0.3)


# k-diffusion's wrappers of a network, as its sources state them: model(x, sigma) -> D.
def eps_model(x, sigma, time=SD.t_of_s):
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    return x - s * net(x / (s**2 + 1).sqrt(), time(sigma))


def v_model(x, sigma):
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    v = net(x / (s**2 + 1).sqrt(), SD.t_of_s(sigma))
    return x / (s**2 + 1) - v * s / (s**2 + 1).sqrt()


def flow_model(x, sigma):
    velocity = net(x, FLOW.t_of_s(sigma / (1 - sigma)))
    return x - sigma.view(-1, *[1] * (x.ndim - 1)) * velocity


def edm_model(x, sigma):
    return torch.tanh(x / (1 + sigma.view(-1, *[1] * (x.ndim - 1))))


# The model in both manners: k-diffusion's, and a denoiser of this package on its schedule.
MODELS = {
    "eps": (eps_model, s4s.from_noise_prediction(net, SD)),
    "v": (v_model, s4s.from_velocity(net, SD)),
    "flow": (flow_model, s4s.from_flow(net, FLOW)),
    "edm": (edm_model, s4s.from_denoiser(edm_model, s4s.EDM())),
}


def free_grid(schedule):
    """A grid whose calls have times of their own, the first one its own scale too."""
    t = s4s.time_logsnr(schedule, N).t
    lam = schedule.lam(t)
    t_model = schedule.t_of_lam(lam + 0.1 * lam.diff().min() * torch.tensor([3, 1, -1, 1, -1, 0]))
    return TimeGrid(schedule, t, t_model, torch.tensor([0.9, 1, 1, 1.1, 1], dtype=torch.float64))


def learned(grid, order=3):
    """A table of random weights near a published one, with corrector and states."""
    table = s4s.unipc(grid, order, prediction="noise").pad(order, 2)
    generator = torch.Generator().manual_seed(1)
    exists = {"b": 0, "c": 1, "a": 0}
    moved = {
        n: w + 0.05 * torch.randn(w.shape, generator=generator, dtype=w.dtype).tril(exists[n])
        for n, w in ((n, getattr(table, n)) for n in exists)
    }
    return replace(table, **moved)


TABLES = {
    "ddim": s4s.ddim,
    "ipndm": s4s.ipndm,
    "dpm_solver_pp": s4s.dpm_solver_pp,
    "unipc": s4s.unipc,
    "learned": learned,
    "single_step": s4s.dpm_solver,
}


def solver_of(kind, schedule=SD):
    grid = free_grid(schedule)
    return Solver(TABLES[kind](grid), grid)


def by_k_diffusion(model, solver, x_T, sigmas=None, **options):
    """Solver.sample's input and output, through sample_s4s."""
    alpha = 1.0, 1.0
    if not isinstance(solver.grid.schedule, s4s.RectifiedFlow):
        alpha = solver.grid.schedule.alpha(solver.grid.t[[0, -1]])
    sigmas = sigmas_of(solver) if sigmas is None else sigmas
    return sample_s4s(model, x_T / alpha[0], sigmas, solver=solver, **options) * alpha[1]


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("predicts", MODELS)
def test_samples_are_those_of_the_solver(kind, predicts, noise):
    model, denoiser = MODELS[predicts]
    solver = solver_of(kind, denoiser.schedule)
    x_T = denoiser.schedule.sigma(denoiser.schedule.T) * noise(0, 3, 2, 4)
    expected = solver.sample(denoiser, x_T)
    torch.testing.assert_close(
        by_k_diffusion(model, solver, x_T), expected, rtol=1e-9, atol=1e-9 * expected.std().item()
    )


@pytest.mark.parametrize("kind", ["learned", "single_step"])
def test_each_step_calls_the_model_and_the_callback_once(kind, noise):
    solver, calls, seen = solver_of(kind), [], []

    def model(x, sigma, **extra):
        calls.append((x, sigma, extra))
        return eps_model(x, sigma)

    x, levels = noise(0, 2, 3).float(), sigmas_of(solver).float()
    assert len(levels) == solver.nfe + 1 and (levels.diff() < 0).all()
    out = sample_s4s(model, x, levels, {"cond": 7}, seen.append, True, solver=solver)
    assert out.dtype == x.dtype and out.shape == x.shape
    assert len(calls) == len(seen) == solver.nfe
    for i, ((given, sigma, extra), found) in enumerate(zip(calls, seen, strict=True)):
        assert sigma.shape == (2,) and sigma.dtype == x.dtype and extra == {"cond": 7}
        assert found["i"] == i and found["sigma"] == levels[i]
        assert torch.equal(found["x"], given) and (sigma == found["sigma_hat"].float()).all()
        assert torch.equal(found["denoised"], eps_model(given, sigma))


KARRAS = torch.linspace(14.6146 ** (1 / 7), 0.0292 ** (1 / 7), N + 1, dtype=torch.float64) ** 7


@pytest.mark.parametrize(
    "sigmas",
    [
        KARRAS,
        torch.cat([KARRAS[:-1], torch.zeros(1)]),
        sigmas_of(solver_of("ddim", FLOW)),
        sigmas_of(solver_of("ipndm")) * 1.001,
        sigmas_of(solver_of("ipndm"))[[0, 2, 3]],
        sigmas_of(solver_of("ipndm")).flip(0),
        sigmas_of(solver_of("ipndm"))[:1],
        sigmas_of(solver_of("ipndm"))[None],
        torch.full((N + 1,), float("nan")),
        torch.linspace(80, 0, 1001),
        torch.tensor([]),
    ],
)
def test_other_levels_are_refused_in_one_sentence(sigmas, noise, one_sentence):
    with one_sentence("own 6 noise levels (14.61, ", "sigmas_of(solver)") as info:
        sample_s4s(eps_model, noise(0, 2, 3), sigmas, solver=solver_of("ipndm"))
    assert len(str(info.value)) < 300


def test_a_model_that_answers_nan_is_told_in_one_sentence(noise, one_sentence):
    with one_sentence("NaN", f"of {N}"):
        by_k_diffusion(
            lambda x, sigma: x * float("nan"), solver_of("ipndm"), noise(0, 2, 3), callback=id
        )


# --- Parts: SplitSigmas, denoise < 1 ----------------------------------------------------------


@pytest.mark.parametrize("predicts", MODELS)
def test_a_method_without_memory_samples_in_parts_as_in_one(predicts, noise):
    model, denoiser = MODELS[predicts]
    solver = solver_of("ddim", denoiser.schedule)
    x, levels = noise(0, 2, 3), sigmas_of(solver)
    middle = sample_s4s(model, x, levels[:3], solver=solver)
    torch.testing.assert_close(
        sample_s4s(model, middle, levels[2:], solver=solver),
        sample_s4s(model, x, levels, solver=solver),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("kind", TABLES)
def test_the_first_part_is_where_the_whole_passes(kind, noise):
    solver = solver_of(kind)
    x_T = noise(0, 2, 3)
    points = list(solver.trajectory(MODELS["eps"][1], x_T))
    grid = solver.coefficients.as_multistep(solver.grid)[1]
    for end in range(1, grid.nfe):
        y = sample_s4s(eps_model, x_T / SD.alpha(1.0), sigmas_of(solver)[: end + 1], solver=solver)
        torch.testing.assert_close(SD.alpha(grid.t[end]) * y, points[end], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("begin", range(1, N))
def test_a_part_of_exponential_adams_is_exponential_adams_from_there(begin, prediction):
    grid = s4s.time_logsnr(SD, N)
    part = part_of(Solver(s4s.exponential_adams(grid, 3, prediction, False), grid), begin, N)
    expected = s4s.exponential_adams(part.grid, min(3, N - begin), prediction, False)
    torch.testing.assert_close(part.coefficients.b, expected.b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("begin", range(1, N - 1))
def test_learned_steps_return_once_the_memory_is_full(begin):
    solver = solver_of("learned")
    own, part = solver.coefficients, part_of(solver, begin, N).coefficients
    full = range(2, N - begin)  # three evaluations and two states
    for j in full:
        assert torch.equal(part.b[j], own.b[begin + j]) and torch.equal(part.a[j], own.a[begin + j])
        assert torch.equal(part.c[j], own.c[begin + j])
    for j in set(range(N - begin)) - set(full):
        assert part.a[j].tolist() == [1.0, 0.0][: part.a.shape[1]]
        assert torch.equal(part.c[j], torch.cat([part.b.new_zeros(1), part.b[j]]))  # no correction
        assert part.b[j].count_nonzero() == j + 1 and part.b[j].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("kind", TABLES)
def test_parts_cost_a_call_a_step(kind, noise):
    solver = solver_of(kind)
    levels = sigmas_of(solver)
    for begin in range(len(levels) - 1):
        for end in range(begin + 1, len(levels)):
            seen = []
            part = levels[begin : end + 1].float()
            x = sample_s4s(eps_model, noise(0, 2, 3), part, None, seen.append, solver=solver)
            assert len(seen) == end - begin and x.isfinite().all()


def pixelwise(grid):
    return Coefficients(s4s.ipndm(grid).b[..., None].expand(-1, -1, 3))


@pytest.mark.parametrize(
    "make",
    [
        pixelwise,
        lambda grid: replace(s4s.ipndm(grid), l=torch.full((N,), 0.1, dtype=torch.float64)),
        lambda grid: replace(s4s.ipndm(grid), d=torch.full((N, 2), 0.1, dtype=torch.float64)),
    ],
)
def test_tables_that_cannot_begin_late_are_refused_but_not_whole(make, noise, one_sentence):
    grid = s4s.time_logsnr(SD, N)
    solver, x_T = Solver(make(grid), grid), noise(0, 2, 3)
    expected = solver.sample(MODELS["eps"][1], x_T)
    torch.testing.assert_close(by_k_diffusion(eps_model, solver, x_T), expected)
    with one_sentence("level 2 of its own"):
        sample_s4s(eps_model, x_T, sigmas_of(solver)[2:], solver=solver)


# --- Whole levels --------------------------------------------------------------------------------


def rounding_eps_model(x, sigma):
    """A model of 1000 levels that rounds its time to the nearest, as ComfyUI does."""
    times = torch.arange(1, 1001, dtype=torch.float64) / 1000
    nearest = (SD.s(times).log()[:, None] - sigma.log()).abs().argmin(0)
    return eps_model(x, sigma, lambda _: times[nearest])


@pytest.mark.parametrize("kind", TABLES)
def test_a_snapped_solver_does_not_notice_a_model_that_rounds(kind, noise):
    solver, denoiser, x_T = solver_of(kind), MODELS["eps"][1], noise(0, 2, 3)
    snapped = snap_to_levels(solver)
    torch.testing.assert_close(
        by_k_diffusion(rounding_eps_model, snapped, x_T),
        snapped.sample(denoiser, x_T),
        rtol=1e-9,
        atol=1e-9,
    )
    gap = by_k_diffusion(rounding_eps_model, solver, x_T) - solver.sample(denoiser, x_T)
    assert gap.abs().max() > 1e-5


SCHEDULES = [
    SD,
    s4s.VPDiscrete(levels=20, t_min=1 / 20),
    s4s.VPTable(0.97, 0.01, tuple(torch.linspace(0.99, 0.01, 100, dtype=torch.float64).tolist())),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("nfe", [1, 3, 20])
@pytest.mark.parametrize("make", [s4s.time_uniform, s4s.time_logsnr, s4s.time_quadratic])
def test_snapped_times_are_distinct_whole_levels_near_the_old(schedule, nfe, make):
    grid = make(schedule, nfe)
    solver = Solver(s4s.ddim(grid), grid, {"dataset": "here"})
    snapped = snap_to_levels(solver)
    levels = snapped.provenance["snapped_to_levels"]
    assert snapped.provenance["dataset"] == "here"
    n = levels * snapped.grid.t_model[:-1] - 1
    torch.testing.assert_close(n, n.round(), rtol=0, atol=1e-9)
    assert n.min() > -0.5 and n.max() < levels - 0.5 and (n.diff() < -0.5).all()
    assert torch.equal(snapped.grid.t, grid.t)
    if (grid.t[:-1].diff() < -1.5 / levels).all():  # no two calls of one level
        assert ((snapped.grid.t_model - grid.t).abs() < 0.5001 / levels)[:-1].all()
    again = snap_to_levels(snapped)
    assert torch.equal(again.grid.t_model, snapped.grid.t_model)


@pytest.mark.parametrize("schedule", [FLOW, s4s.EDM(), s4s.VPDiscrete(levels=4, t_min=1 / 4)])
def test_models_without_enough_levels_are_refused(schedule, one_sentence):
    grid = s4s.time_logsnr(schedule, N)
    with one_sentence("whole levels for 5 calls", type(schedule).__name__):
        snap_to_levels(Solver(s4s.ddim(grid), grid))


def test_coefficients_are_learned_again_at_snapped_times(mixture):
    setup = mixture(epochs=2)
    setup = setup.variant(schedule=SD, denoiser=s4s.rescheduled(setup.denoiser, SD))
    grid = s4s.time_logsnr(setup.schedule, 4)
    snapped = snap_to_levels(Solver(s4s.ipndm(grid), grid))
    *_, last = s4s.learn_coefficients(snapped, setup, s4s.make_teacher_set(setup))
    assert torch.equal(last.solver.grid.t_model, snapped.grid.t_model)
    assert not torch.equal(last.solver.coefficients.b, snapped.coefficients.b)
