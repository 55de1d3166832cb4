"""Gauss-Newton: its Jacobian against autograd, its price in calls, and that it ends lower."""

import math
from dataclasses import replace

import pytest
import torch

import s4s_core as s4s
from s4s_core import (
    LearningDivergedError,
    Solver,
    TeacherSet,
    learn_gauss_newton,
    make_teacher_set,
    time_edm,
    time_logsnr,
)
from s4s_core.gauss_newton import PATIENCE, Problem, Run, Student
from s4s_core.objective import (
    feature_embedding,
    l2,
    lpips_distance,
    lpips_embedding,
    pixel_embedding,
)
from s4s_core.solver import solve


@pytest.fixture
def problem(mixture):
    """`problem(**settings)`: the setup of the mixture and a teacher set for it."""

    def make(**settings):
        setup = mixture(n_train=160, n_valid=40, newton_batch_size=32, **settings)
        return setup, make_teacher_set(setup)

    return make


def kinds(schedule) -> dict[str, Solver]:
    """A solver of each kind that can be learned, on four or five calls."""
    grid = time_edm(schedule, 4)
    moved = s4s.TimeGrid(schedule, grid.t, grid.t * torch.tensor([1, 0.9, 1.1, 0.95, 1]).double())
    tables = {
        "noise": s4s.ipndm(grid, 3),
        "data": s4s.dpm_solver_pp(grid, 3),
        "corrector": s4s.unipc(grid, 3),
        "states": s4s.dpm_solver_pp(grid, 3).pad(4, 2),
    }
    solvers = {name: Solver(table, grid) for name, table in tables.items()}
    solvers["decoupled"] = Solver(s4s.ipndm(grid, 3), moved)
    coarse = time_edm(schedule, 2)
    return solvers | {"single step": Solver(s4s.dpm_solver(coarse, 2), coarse)}


@pytest.mark.parametrize("schedule", [s4s.EDM(), s4s.VPLinear()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", kinds(s4s.EDM()))
def test_normal_equations_are_those_of_autograd(problem, kind, schedule):
    setup, teacher = problem()
    mixture = s4s.GaussianMixture([1.0, 2.0], [[1.0, 0.0], [-0.5, 0.8]], [0.3, 0.5], schedule)
    setup = replace(setup, denoiser=mixture, schedule=schedule)
    start = kinds(schedule)[kind]
    blocks = ("phi", "xi", "first") if kind in ("data", "states") else ("phi", "xi")
    student = Student(start, setup.params, blocks, None)
    x_T = schedule.sigma(schedule.T).item() * torch.randn(
        6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    pairs = TeacherSet(x_T, 0.1 * x_T / x_T.norm(dim=1, keepdim=True), 6)
    theta = 0.02 * torch.randn(
        student.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def residual(theta):
        return pixel_embedding(solve(mixture, x_T, *student.table_and_grid(theta)) - pairs.x_0)

    J = torch.autograd.functional.jacobian(residual, theta).flatten(0, 1)
    r = residual(theta).flatten()
    small = Problem(student, setup, pairs, setup.params)
    small.step = 1e-5
    loss, g, G = small.normal_equations(theta, torch.arange(6))
    assert loss == pytest.approx(r.square().sum().item() / 6)
    scale = J.norm(dim=0)
    torch.testing.assert_close(g / scale, J.T @ r / 6 / scale, rtol=0, atol=1e-3 * r.norm().item())
    expected = J.T @ J / 6 / torch.outer(scale, scale)
    torch.testing.assert_close(G / torch.outer(scale, scale), expected, rtol=0, atol=1e-3)


class Counting:
    """Rows that the network is called with; nothing of it can be differentiated."""

    def __init__(self, denoiser):
        self.denoiser, self.schedule, self.rows = denoiser, denoiser.schedule, 0

    def __call__(self, x, t):
        self.rows += len(x)
        with torch.no_grad():
            return self.denoiser(x, t)


@pytest.mark.parametrize(("blocks", "calls"), [(("phi",), 19), (("phi", "xi"), 19 + 6 + 4)])
def test_a_weight_costs_the_calls_after_it(problem, blocks, calls):
    """N - 1 - i for each of row i, the last row none; as many for a time, and one for its slope."""
    setup, teacher = problem()
    counting = Counting(setup.denoiser)
    grid = time_edm(setup.schedule, 5)
    student = Student(Solver(s4s.ipndm(grid, 3), grid), setup.params, blocks, None)
    problem = Problem(student, replace(setup, denoiser=counting), teacher, setup.params)
    counting.rows = 0
    problem.normal_equations(torch.zeros(student.size, dtype=torch.float64), torch.arange(10))
    assert counting.rows == 10 * (5 + calls)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [50, 5])  # 5 are fewer than the derivatives of one pair
def test_no_call_has_more_rows_than_the_setting_allows(problem, rows):
    setup, teacher = problem(sample_batch_size=rows, n_train_alt=40)
    grid, seen = time_edm(setup.schedule, 4), []

    def denoiser(x, t):
        seen.append(len(x))
        return setup.denoiser(x, t)

    start = Solver(s4s.ipndm(grid, 3), grid)
    list(learn_gauss_newton(start, replace(setup, denoiser=denoiser), teacher, epochs=1))
    assert max(seen[20:]) <= rows  # before these it looks for its step at 8 pairs


def test_what_does_not_fit_into_memory_is_computed_in_smaller_parts(problem, capsys):
    setup, teacher = problem(sample_batch_size=64)
    grid = time_edm(setup.schedule, 4)
    start, found = Solver(s4s.ipndm(grid, 3), grid), []
    student = Student(start, setup.params, ("phi", "xi"), None)

    def small(x, t):
        if len(x) > 20:
            raise torch.OutOfMemoryError(f"{len(x)} samples")
        return setup.denoiser(x, t)

    for denoiser in (setup.denoiser, small):
        problem = Problem(student, replace(setup, denoiser=denoiser), teacher, setup.params)
        problem.step = 1e-6  # of the size of x in a part, which so makes no difference
        theta, pairs = torch.zeros(student.size, dtype=torch.float64), torch.arange(32)
        loss, g, G = problem.normal_equations(theta, pairs)
        found.append([torch.tensor([loss, problem.loss(theta, pairs)]), g, G])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5 * whole.abs().max().item())
    assert "learning: a batch of 64 does not fit into memory" in capsys.readouterr().err


def test_learning_by_calls_alone_lowers_the_loss_of_unseen_noises(problem):
    setup, teacher = problem()
    grid = time_logsnr(setup.schedule, 4)
    start = Solver(s4s.ipndm(grid, 3), grid)
    counting = Counting(setup.denoiser)
    network = replace(setup, denoiser=counting)
    first, *epochs = learn_gauss_newton(start, network, teacher, epochs=1)
    assert [e.index for e in epochs] == [1, 2, 3, 4, 5] and first.solver.coefficients.nfe == 4
    found = min(e.valid_loss for e in epochs)
    assert found < 0.3 * first.valid_loss
    x_T, x_0 = teacher.valid
    assert l2(epochs[-1].best.sample(setup.denoiser, x_T), x_0).mean().item() == pytest.approx(
        found
    )


def in_numpy(network):
    """A session of another runtime: arrays in, arrays out, one type, and no gradient anywhere."""

    def call(x, t):
        answer = network(torch.from_numpy(x.numpy().copy()).float(), torch.tensor(float(t)))
        return torch.from_numpy(answer.numpy().copy()).to(x.dtype)

    return call


def quantised(network):
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.zero_()
    eight_bits = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, torch.qint8)
    return lambda x, t: network(eight_bits(x.float()).double(), t)


NETWORKS = {
    "numpy": in_numpy,
    "compiled": lambda network: torch.compile(network, backend="eager"),
    "quantised": quantised,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_network_that_cannot_be_differentiated_is_learned_for(problem, kind):
    setup, _ = problem()
    setup = replace(setup, denoiser=NETWORKS[kind](s4s.load("mixture").denoiser))
    with torch.no_grad():
        teacher = make_teacher_set(setup)
        grid = time_logsnr(setup.schedule, 4)
        start = Solver(s4s.ipndm(grid, 3), grid)
        first, *_, last = learn_gauss_newton(start, setup, teacher)
    x_T, x_0 = teacher.valid
    assert l2(last.best.sample(setup.denoiser, x_T), x_0).mean() < 0.5 * first.valid_loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the answers of mixture.s network are noisy")
@pytest.mark.parametrize("jacobian", ["auto", "differences"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_network_of_half_precision_is_learned_for(problem, precision, jacobian):
    setup, _ = problem(precision=precision, jacobian=jacobian)
    exact, half = setup.denoiser, getattr(torch, precision)

    def rounded(x, t):
        return exact(x.to(half).double(), t).to(half).double()

    setup = replace(setup, denoiser=rounded)
    teacher, grid = make_teacher_set(setup), time_logsnr(setup.schedule, 4)
    start = Solver(s4s.ipndm(grid, 3), grid)
    first, *_, last = learn_gauss_newton(start, setup, teacher)
    x_T, x_0 = teacher.valid
    assert l2(last.best.sample(rounded, x_T), x_0).mean() < 0.5 * first.valid_loss


def test_on_a_linear_denoiser_the_flow_is_met_by_every_number_of_calls(problem):
    setup, _ = problem()
    gaussian = s4s.GaussianMixture([1.0], [[0.0, 0.0]], [1.0], setup.schedule)
    setup = replace(setup, denoiser=gaussian)
    x_T = make_teacher_set(setup).x_T
    teacher = TeacherSet(x_T, x_T / (1 + setup.schedule.sigma(setup.schedule.T) ** 2) ** 0.5, 160)
    for nfe in (1, 3):  # the columns of all weights are multiples of x_T: the rank is one
        grid = time_edm(setup.schedule, nfe)
        *_, last = learn_gauss_newton(Solver(s4s.ipndm(grid, nfe), grid), setup, teacher)
        assert l2(last.best.sample(gaussian, teacher.valid[0]), teacher.valid[1]).max() < 1e-8
        assert last.best.coefficients.b.isfinite().all() and last.best.grid.t.isfinite().all()


def test_forward_mode_and_differences_agree_and_cost_what_they_cost(problem):
    setup, teacher = problem()
    network, found = Counting(setup.denoiser), {}
    student = Student(kinds(setup.schedule)["noise"], setup.params, ("phi", "xi"), None)
    for jacobian in ("differences", "jvp", "auto"):
        params = setup.params.override(jacobian=jacobian)
        problem = Problem(student, replace(setup, denoiser=network), teacher, params)
        network.rows, theta = 0, torch.zeros(student.size, dtype=torch.float64)
        found[jacobian] = (*problem.normal_equations(theta, torch.arange(32)), network.rows)
    for a, b in zip(found["differences"][:3], found["jvp"], strict=False):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.01 * torch.as_tensor(b).abs().max())
    assert found["jvp"][3] == 4 * 32 < found["differences"][3] == found["auto"][3]


def test_forward_mode_is_refused_where_there_is_none(problem, one_sentence):
    setup, teacher = problem()
    setup = replace(setup, denoiser=in_numpy(setup.denoiser))
    with one_sentence("the network of mixture has no forward derivative", "differences"):
        next(learn_gauss_newton(kinds(setup.schedule)["noise"], setup, teacher, jacobian="jvp"))


def test_noise_in_the_answers_is_found_and_said(problem, one_sentence):
    setup, teacher = problem()
    start, generator = kinds(setup.schedule)["noise"], torch.Generator().manual_seed(0)

    def with_noise(size):
        def denoiser(x, t):
            D = setup.denoiser(x, t)
            return D + size * torch.randn(D.shape, generator=generator, dtype=D.dtype)

        return replace(setup, denoiser=denoiser)

    with pytest.warns(UserWarning, match="network are noisy.*differences over .* instead of 0.3%"):
        first, *_, last = learn_gauss_newton(start, with_noise(5e-4), teacher)
    x_T, x_0 = teacher.valid
    assert l2(last.best.sample(setup.denoiser, x_T), x_0).mean() < 0.5 * first.valid_loss
    with one_sentence("too noisy to be differentiated", "choose jacobian jvp"):
        next(learn_gauss_newton(start, with_noise(1.0), teacher))


def test_of_several_starts_the_best_goes_on(problem):
    setup, teacher = problem()
    grid = time_logsnr(setup.schedule, 4)
    good, table = Solver(s4s.ipndm(grid, 3), grid), s4s.ipndm(grid, 3)
    bad = Solver(replace(table, b=table.b * 0), grid)
    *alone, last = learn_gauss_newton(good, setup, teacher, blocks=["xi"])
    *both, end = learn_gauss_newton(bad, setup, teacher, blocks=["xi"], starts=[good])
    assert end.best == last.best and len(both) == len(alone) + 4
    assert [e.index for e in [*both, end]] == list(range(len(both) + 1))


@pytest.mark.slow
def test_it_ends_where_the_validation_loss_no_longer_falls(problem):
    setup, teacher = problem()
    start = kinds(setup.schedule)["noise"]
    long = list(learn_gauss_newton(start, setup, teacher, epochs=10_000))
    lowest = [min(e.valid_loss for e in long[: i + 1]) for i in range(len(long))]
    assert lowest[-1] > 0.96 * lowest[-5] and len(long) < 200
    one = list(learn_gauss_newton(start, setup, teacher, epochs=1))
    assert len(one) == 1 + 16 / 4 + 1  # 16 batches of 8 pairs, one of 32


class Regression:
    """Noisy linear regression: its least squares of all pairs is known, a batch's is by chance."""

    size = 6

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.A = torch.randn(2000, self.size, dtype=torch.float64, generator=generator)
        self.y = self.A.sum(1) + 3 * torch.randn(2000, dtype=torch.float64, generator=generator)

    def solver(self, theta):
        return theta

    def loss(self, theta, pairs):
        return (self.A[pairs] @ theta - self.y[pairs]).square().mean().item()

    def normal_equations(self, theta, pairs):
        A, r = self.A[pairs], self.A[pairs] @ theta - self.y[pairs]
        return r.square().mean().item(), A.T @ r / len(A), A.T @ A / len(A)


def test_the_mean_of_the_steps_is_nearer_to_the_optimum_than_the_last(problem):
    params, pairs = problem()[0].params, torch.zeros(2000, 1)
    last, mean = [], []
    for seed in range(20):
        of = Regression(seed)
        run = Run(of, TeacherSet(pairs, pairs, 1600), params, seed)
        for _ in range(12):
            run.advance()
        optimum = torch.linalg.lstsq(of.A[:1600], of.y[:1600, None]).solution[:, 0]
        last.append((run.path[-1] - optimum).norm())
        mean.append((run.judged - optimum).norm())
    assert sum(mean) < 0.8 * sum(last)


def test_no_stop_is_made_of_the_small_batches(problem):
    class Flat(Regression):
        def loss(self, theta, pairs):
            return 1.0

    params, pairs = problem()[0].params, torch.zeros(2000, 1)
    run, looks = Run(Flat(0), TeacherSet(pairs, pairs, 1600), params, 0), 0
    while not run.done:
        run.advance()
        looks += 1
    assert looks == 16 / 4 + 1 + PATIENCE  # the first one after them sets the level


def test_luck_in_the_small_batches_stops_nothing_later(problem):
    params, pairs = problem()[0].params, torch.zeros(2000, 1)
    of = Regression(0)
    run = Run(of, TeacherSet(pairs, pairs, 1600), params, 0)
    of.loss = lambda theta, pairs: 0.98 ** len(run.path) if run.settled else 0.1
    for _ in range(16 // 4 + 2 * PATIENCE):
        assert not run.done
        run.advance()


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds(s4s.EDM()))
def test_every_kind_of_solver_is_learned(problem, kind):
    setup, teacher = problem()
    first, *_, last = learn_gauss_newton(kinds(setup.schedule)[kind], setup, teacher)
    x_T, x_0 = teacher.valid
    assert l2(last.best.sample(setup.denoiser, x_T), x_0).mean() < 0.8 * first.valid_loss
    assert Solver.from_dict(last.best.to_dict()) == last.best


def test_blocks_that_are_not_named_stay(problem):
    setup, teacher = problem()
    start = kinds(setup.schedule)["data"]
    *_, phi = learn_gauss_newton(start, setup, teacher, blocks=["phi"])
    assert torch.equal(phi.solver.grid.t, start.grid.t)
    assert not torch.equal(phi.solver.coefficients.b, start.coefficients.b)
    *_, xi = learn_gauss_newton(start, setup, teacher, blocks=["xi"])
    assert torch.equal(xi.solver.coefficients.b, start.coefficients.b)
    assert not torch.equal(xi.solver.grid.t, start.grid.t)
    *_, first = learn_gauss_newton(start, setup, teacher, blocks=["first"])
    torch.testing.assert_close(first.solver.grid.t, start.grid.t)
    assert first.solver.grid.t_model[0] < start.grid.t_model[0]
    torch.testing.assert_close(first.solver.grid.t_model[1:], start.grid.t_model[1:])


def test_each_pair_meets_its_own_condition(mixture):
    """A solver as good as the teacher has no loss, and nothing to learn, only then."""
    exact = s4s.load("mixture")

    def shifted(x, t, c):
        return exact.denoiser(x - c, t) + c

    setup = mixture(teacher_nfe=6, n_train=40, n_valid=10, newton_batch_size=8)
    setup = replace(
        setup,
        denoiser=shifted,
        condition=lambda seeds: torch.tensor([[s % 7, s % 3] for s in seeds]).double(),
    )
    teacher = make_teacher_set(setup)
    first, *_, last = learn_gauss_newton(setup.teacher, setup, teacher)
    assert first.valid_loss < 1e-20 and last.train_loss < 1e-12
    mixed = replace(teacher, seeds=teacher.seeds + 1)
    assert next(learn_gauss_newton(setup.teacher, setup, mixed)).valid_loss > 1e-3


def test_fewer_pairs_than_numbers_and_pairs_twice_over_end_without_harm(problem):
    setup, teacher = problem()
    start = kinds(setup.schedule)["states"]
    two = TeacherSet(teacher.x_T[:2].repeat(4, 1), teacher.x_0[:2].repeat(4, 1), 4)
    for last in learn_gauss_newton(start, setup, two):
        assert all(v.isfinite().all() for v in (last.solver.coefficients.b, last.solver.grid.t))
    assert last.best.sample(setup.denoiser, teacher.x_T).isfinite().all()


@pytest.mark.parametrize("nfe", [1, 2])
def test_one_and_two_calls_can_be_learned(problem, nfe):
    setup, teacher = problem()
    grid = time_edm(setup.schedule, nfe)
    start = Solver(s4s.dpm_solver_pp(grid, 1).pad(nfe, 1), grid)
    first, *_, last = learn_gauss_newton(start, setup, teacher, blocks=("phi", "xi", "first"))
    x_T, x_0 = teacher.valid
    assert l2(last.best.sample(setup.denoiser, x_T), x_0).mean() < first.valid_loss


def test_answers_that_are_not_finite_end_with_the_best_so_far(problem):
    setup, teacher = problem()
    start, calls = kinds(setup.schedule)["noise"], []

    def failing(x, t):
        calls.append(len(x))
        return setup.denoiser(x, t) * (math.nan if len(calls) > 60 else 1.0)

    with pytest.raises(LearningDivergedError, match="not finite") as info:
        list(learn_gauss_newton(start, replace(setup, denoiser=failing), teacher))
    assert info.value.best.sample(setup.denoiser, teacher.x_T).isfinite().all()


def test_what_it_does_not_read_or_cannot_lower_is_refused_in_one_sentence(problem, one_sentence):
    setup, teacher = problem()
    start = kinds(setup.schedule)["noise"]
    for name in ("rounds", "batch_size", "lr_phi", "gamma", "n_train"):
        with one_sentence(f"learn_gauss_newton does not read {name} ("):
            next(learn_gauss_newton(start, setup, teacher, **{name: getattr(setup.params, name)}))
    with one_sentence("psnr", "sum of squares", "l2"):
        next(learn_gauss_newton(start, setup, teacher, distance="psnr"))
    with one_sentence("unknown block 'psi'", "first, phi, xi"):
        next(learn_gauss_newton(start, setup, teacher, blocks=["psi"]))


# --- Distances as sums of squares ---------------------------------------------------------------


def test_embeddings_are_distances(noise):
    def layers(x):
        return [x, torch.tanh(x[:, :2, ::2] * 3)]

    x, y = noise(0, 4, 3, 6, 6), noise(1, 4, 3, 6, 6)
    for embed, distance in (
        (pixel_embedding, l2),
        (feature_embedding(layers), s4s.feature_distance(layers)),
    ):
        squares = (embed(x) - embed(y)).square().sum(1)
        torch.testing.assert_close(squares, distance(x, y), rtol=1e-10, atol=0)


@pytest.mark.filterwarnings("ignore:::torchvision")
def test_the_embedding_of_lpips_is_lpips(squeeze, noise):
    squeeze()  # or a reason why not
    x, y = noise(0, 2, 3, 32, 32).clamp(-1, 1), noise(1, 2, 3, 32, 32).clamp(-1, 1)
    for resize in (0, 40):
        embed, distance = lpips_embedding("squeeze", resize), lpips_distance("squeeze", resize)
        squares = (embed(x) - embed(y)).square().sum(1)
        torch.testing.assert_close(squares, distance(x, y), rtol=1e-4, atol=1e-6)


# --- The level of the first call ------------------------------------------------------------------


def test_the_first_call_sees_x_in_the_scale_of_its_own_level():
    schedule, seen = s4s.EDM(), []
    grid = time_edm(schedule, 3)
    learned = s4s.LearnedGrid.start_at(grid)
    first = replace(learned, first=torch.tensor(math.log(3.0), dtype=torch.float64)).grid()
    level = 80 ** (1 / 4) * first.t[1].item() ** (3 / 4)  # three quarters of the way, in lam
    assert torch.equal(first.t, learned.grid().t)
    assert first.t_model[0].item() == pytest.approx(level)
    ratio = math.sqrt((1 + level**2) / (1 + 80**2))
    assert first.scale.tolist() == pytest.approx([ratio, 1, 1])
    again = s4s.LearnedGrid.start_at(first).grid()
    torch.testing.assert_close(again.t_model, first.t_model)
    torch.testing.assert_close(again.scale, first.scale)

    def denoiser(x, t):
        seen.append((x.item(), t.item()))
        return x / (1 + t**2)  # exact for a standard normal

    x_T = torch.full((1, 1), 80.0, dtype=torch.float64)
    table = s4s.dpm_solver_pp(first, 1)
    Solver(table, first).sample(denoiser, x_T)
    assert seen[0] == (pytest.approx(80 * ratio), pytest.approx(level))
    # By hand, in data form: y <- q y + (1 - q) D(scale y).
    y = 80.0
    for i in range(3):
        s, s_next = first.t[i].item(), first.t[i + 1].item()
        u = y * first.scale[i].item()
        D = u / (1 + first.t_model[i].item() ** 2)
        y = s_next / s * y + (1 - s_next / s) * D
    assert Solver(table, first).sample(denoiser, x_T).item() == pytest.approx(y)


def test_scales_are_kept_in_files_of_version_3_and_older_files_have_none(one_sentence):
    grid = time_edm(s4s.EDM(), 3)
    scaled = s4s.TimeGrid(grid.schedule, grid.t, grid.t, torch.tensor([0.1, 1, 1]).double())
    solver = Solver(s4s.dpm_solver_pp(scaled, 2), scaled)
    entries = solver.to_dict()
    assert entries["version"] == 3 and Solver.from_dict(entries) == solver
    older = {k: v for k, v in entries.items() if k != "scale"} | {"version": 2}
    assert torch.equal(Solver.from_dict(older).grid.scale, torch.ones(3).double())
    for wrong in ([1, 1], [0.0, 1, 1], [1, 1, -1], [1, math.nan, 1]):
        with one_sentence("scale must be 3 finite numbers above 0"):
            Solver.from_dict(entries | {"scale": wrong})
