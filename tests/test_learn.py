"""Learning: what each algorithm moves, what it leaves alone, and that it helps on unseen noise."""

import math
import re
from dataclasses import replace

import pytest
import torch

import s4s_core as s4s
import s4s_core.learn as learn_module
from s4s_core import (
    EDM,
    Coefficients,
    LearnedGrid,
    LearningDivergedError,
    Solver,
    TeacherSet,
    TimeGrid,
    VPLinear,
    feature_distance,
    initial_noise,
    ipndm,
    learn_alternating,
    learn_coefficients,
    learn_jointly,
    learn_times,
    make_teacher_set,
    radius,
    relaxed_loss,
    time_edm,
    time_logsnr,
    unipc,
)

ALGORITHMS = [learn_coefficients, learn_times, learn_alternating, learn_jointly]
every_algorithm = pytest.mark.parametrize("learn", ALGORITHMS, ids=lambda f: f.__name__)


@pytest.fixture
def problem(mixture):
    """`problem(nfe=4, order=3, **settings)`: an iPNDM solver, a setup and its teacher set."""

    def make(nfe: int = 4, order: int = 3, **settings):
        setup = mixture(**settings)
        grid = time_logsnr(setup.schedule, nfe)
        return Solver(ipndm(grid, order), grid), setup, make_teacher_set(setup)

    return make


def loss_of(solver: Solver, setup, pairs) -> float:
    """Eq. 6 over pairs."""
    return relaxed_loss(setup.denoiser, solver.coefficients, solver.grid, *pairs).mean().item()


class Recorder:
    """A denoiser that keeps the x'_T at which gradients are taken, in order."""

    def __init__(self, denoiser):
        self.denoiser, self.schedule, self.starts = denoiser, denoiser.schedule, []

    def __call__(self, x, t):
        if t > 0.999 * self.schedule.T and torch.is_grad_enabled():
            self.starts.append(x.detach().clone())
        return self.denoiser(x, t)


def recorded(setup):
    return replace(setup, denoiser=Recorder(setup.denoiser))


def distances_to_nearest(x, candidates):
    return (x[:, None] - candidates).norm(dim=2).min(1).values


# --- The data ----------------------------------------------------------------------------------


def test_teacher_set_pairs_noise_with_the_teachers_samples(mixture):
    setup = mixture(n_train=5, n_valid=3)
    teacher = make_teacher_set(setup)
    assert teacher.x_T.shape == teacher.x_0.shape == (8, 2)
    assert [len(x) for x in (*teacher.train, *teacher.valid)] == [5, 5, 3, 3]
    assert torch.equal(torch.cat([teacher.train[0], teacher.valid[0]]), teacher.x_T)
    assert torch.equal(setup.teacher.sample(setup.denoiser, teacher.x_T), teacher.x_0)
    # An accurate solver lands on the data: no farther from a mean than five deviations.
    assert distances_to_nearest(teacher.x_0, setup.denoiser.means).max() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [s4s.EDM(), s4s.VPLinear(), s4s.RectifiedFlow()])
def test_the_exact_path_of_one_gaussian_is_known(mixture, schedule):
    gaussian = s4s.GaussianMixture([1.0], [[0.3, -0.7]], [0.5], schedule)
    setup = replace(mixture(), denoiser=gaussian, schedule=schedule)
    grid, x = s4s.exact_path(setup, [3, 4], s4s.time_logsnr(schedule, 4), calls=800)
    y, spread = x / schedule.alpha(grid.t)[:, None, None], (0.25 + grid.s**2).sqrt()
    offset = (y - gaussian.means) / spread[:, None, None]
    torch.testing.assert_close(offset, offset[:1].expand_as(offset), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x[0], s4s.initial_noise(setup, [3, 4]))
    fine, _ = s4s.exact_path(setup, [3])
    assert fine.nfe == 200


def test_a_sample_path_ends_at_the_sample_and_has_a_state_for_each_call(mixture):
    setup, seeds = mixture(), [5, 6]
    steps = s4s.time_logsnr(setup.schedule, 3)
    for solver in (s4s.ddim(steps), s4s.dpm_solver(steps, 2)):
        solver = s4s.Solver(solver, steps)
        grid, x = s4s.sample_path(setup, solver, seeds)
        assert len(x) == len(grid.t) == solver.nfe + 1
        x_T = s4s.initial_noise(setup, seeds)
        assert torch.equal(x[-1], solver.sample(setup.denoiser, x_T)) and torch.equal(x[0], x_T)


def test_the_global_error_is_the_distance_between_the_ends(mixture):
    setup, seeds = mixture(), range(4)
    grid = s4s.time_logsnr(setup.schedule, 5)
    solver = s4s.Solver(s4s.ddim(grid), grid)
    ends = [
        path[1][-1]
        for path in (s4s.sample_path(setup, solver, seeds), s4s.exact_path(setup, seeds))
    ]
    error = s4s.global_error(setup, solver, seeds)
    torch.testing.assert_close(error, (ends[0] - ends[1]).norm(dim=1))
    assert torch.equal(s4s.global_error(setup, solver, seeds, ends[0]), torch.zeros(4).double())


def test_teacher_sets_share_no_noise_with_each_other_or_with_evaluation(mixture):
    setup = mixture(teacher_nfe=3)
    sets = [make_teacher_set(setup, 4, 4, seed).x_T for seed in range(3)]
    noise = torch.cat([*sets, initial_noise(setup, range(100))])
    assert len(noise.unique(dim=0)) == len(noise)
    assert torch.equal(make_teacher_set(setup, 4, 4, 1).x_T, sets[1])


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((0, 4), ["n_train", "not 0"]),
        ((4, 0), ["n_valid", "not 0"]),
        ((600_000, 600_000), ["n_train and n_valid", "1000000", "600000"]),
    ],
)
def test_impossible_sizes_of_a_teacher_set_are_refused_in_one_sentence(
    mixture, one_sentence, sizes, words
):
    with one_sentence(*words):
        make_teacher_set(mixture(), *sizes)


@pytest.mark.parametrize(("seed", "allowed"), [(-1, "0 to 999"), (1000, "0 to 999")])
def test_impossible_seeds_of_a_teacher_set_are_refused_in_one_sentence(
    mixture, one_sentence, seed, allowed
):
    with one_sentence("seed", allowed, str(seed)):
        make_teacher_set(mixture(), seed=seed)


# --- What every algorithm has in common --------------------------------------------------------


@every_algorithm
def test_epoch_zero_is_the_untouched_solver(problem, learn):
    solver, setup, teacher = problem()
    first = next(learn(solver, setup, teacher))
    assert first.index == 0 and first.phase == "start" and first.accepted == 0
    assert first.solver == solver and first.best == solver
    assert first.train_loss == pytest.approx(loss_of(solver, setup, teacher.train), rel=1e-12)
    assert first.valid_loss == pytest.approx(loss_of(solver, setup, teacher.valid), rel=1e-12)


@every_algorithm
def test_validation_is_at_the_noise_that_sampling_uses(problem, learn):
    solver, setup, teacher = problem(gamma=1.0)
    for epoch in learn(solver, setup, teacher):
        expected = loss_of(epoch.solver, setup, teacher.valid)
        assert epoch.valid_loss == pytest.approx(expected, rel=1e-10)


@every_algorithm
def test_best_is_the_solver_of_the_smallest_validation_loss(problem, learn):
    # A rate so large that some epochs are worse than the start.
    solver, setup, teacher = problem(lr_phi=0.3, lr_xi=0.05, epochs=5)
    epochs = []
    for epoch in learn(solver, setup, teacher):
        epochs.append(epoch)
        champion = min(epochs, key=lambda e: e.valid_loss)
        assert epoch.best == champion.solver
    losses = [e.valid_loss for e in epochs]
    assert loss_of(epochs[-1].best, setup, teacher.valid) <= losses[0]
    assert any(b > a for a, b in zip(losses, losses[1:], strict=False))


@every_algorithm
def test_learning_is_deterministic_in_its_seed(problem, learn):
    solver, setup, teacher = problem()
    a, b, c = ([e for e in learn(solver, setup, teacher, seed=s)] for s in (1, 1, 2))
    assert [e.train_loss for e in a] == [e.train_loss for e in b]
    assert [e.accepted for e in a] == [e.accepted for e in b]
    assert a[-1].solver == b[-1].solver
    assert a[-1].solver != c[-1].solver


@every_algorithm
def test_learning_changes_neither_its_solver_nor_its_data(problem, learn):
    solver, setup, teacher = problem(gamma=1.0)
    before = solver.to_dict(), teacher.x_T.clone(), teacher.x_0.clone()
    *_, last = learn(solver, setup, teacher)
    assert last.solver != solver
    assert solver.to_dict() == before[0] and not solver.coefficients.b.requires_grad
    assert torch.equal(teacher.x_T, before[1]) and torch.equal(teacher.x_0, before[2])
    assert not last.best.coefficients.b.requires_grad and not last.best.grid.t.requires_grad


@every_algorithm
def test_learned_solvers_are_valid_and_survive_a_file(problem, learn, tmp_path, noise):
    solver, setup, teacher = problem()
    *_, last = learn(solver, setup, teacher)
    assert not last.best.coefficients.b.triu(1).any()
    last.best.save(tmp_path / "solver.json")
    x_T = 80 * noise(0, 5, 2)
    again = Solver.load(tmp_path / "solver.json")
    assert torch.equal(again.sample(setup.denoiser, x_T), last.best.sample(setup.denoiser, x_T))


@every_algorithm
def test_rematerialization_learns_the_same_numbers(problem, learn):
    solver, setup, teacher = problem()
    *_, plain = learn(solver, setup, teacher, rematerialize=False)
    *_, again = learn(solver, setup, teacher, rematerialize=True)
    for a, b in zip(values(plain.solver), values(again.solver), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def values(solver: Solver):
    return solver.coefficients.b, solver.grid.t, solver.grid.t_model


# --- Which block moves when --------------------------------------------------------------------


def test_coefficients_are_learned_on_a_grid_that_stays_to_the_last_bit(problem):
    solver, setup, teacher = problem()
    # Offsets larger than learned times would be allowed.
    scale = torch.tensor([1, 1.9, 0.4, 1.3, 1], dtype=torch.float64)
    grid = TimeGrid(setup.schedule, solver.grid.t, solver.grid.t * scale)
    *_, last = learn_coefficients(Solver(solver.coefficients, grid), setup, teacher)
    assert torch.equal(last.solver.grid.t, grid.t)
    assert torch.equal(last.solver.grid.t_model, grid.t_model)
    assert (last.solver.coefficients.b != solver.coefficients.b)[solver.coefficients.b != 0].all()


@pytest.mark.parametrize("variable", ["lam", "t"])
def test_times_are_learned_with_coefficients_that_stay_to_the_last_bit(problem, variable):
    solver, setup, teacher = problem(grid_variable=variable)
    *_, last = learn_times(solver, setup, teacher)
    assert torch.equal(last.solver.coefficients.b, solver.coefficients.b)
    grid = last.solver.grid
    assert (grid.t[1:-1] != solver.grid.t[1:-1]).all()
    assert (grid.t_model[1:-1] != grid.t[1:-1]).all()
    ends = torch.tensor([setup.schedule.T, setup.schedule.t_min], dtype=torch.float64)
    assert torch.equal(grid.t[[0, -1]], ends)


def test_without_offsets_the_networks_times_are_the_grids(problem):
    solver, setup, teacher = problem(lr_xi_c=0.0)
    *_, last = learn_times(solver, setup, teacher)
    assert torch.equal(last.solver.grid.t_model, last.solver.grid.t)


@pytest.mark.parametrize("first", ["phi", "xi"])
def test_alternation_runs_its_phases_in_order(problem, first):
    solver, setup, teacher = problem(rounds=3, phase_epochs=2, first_phase=first)
    epochs = list(learn_alternating(solver, setup, teacher))
    second = {"phi": "xi", "xi": "phi"}[first]
    assert [e.phase for e in epochs] == ["start"] + [first, first, second, second] * 3
    assert [e.index for e in epochs] == list(range(13))


@pytest.mark.parametrize("first", ["phi", "xi"])
def test_a_phase_moves_its_own_block_only_from_the_best_so_far(problem, first):
    solver, setup, teacher = problem(rounds=3, phase_epochs=2, first_phase=first)
    before, moved = None, set()
    previous = None
    for epoch in learn_alternating(solver, setup, teacher):
        if previous is not None and epoch.phase != previous.phase:
            before = previous.best
        if epoch.phase == "phi":
            for a, b in zip(values(epoch.solver)[1:], values(before)[1:], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        if epoch.phase == "xi":
            assert torch.equal(epoch.solver.coefficients.b, before.coefficients.b)
        if previous is not None and epoch.solver != previous.solver:
            moved.add(epoch.phase)
        previous = epoch
    assert moved == {"phi", "xi"}


def test_joint_learning_moves_both_blocks_for_as_many_passes_as_alternating(problem):
    solver, setup, teacher = problem(rounds=3, phase_epochs=2)
    epochs = list(learn_jointly(solver, setup, teacher))
    assert [e.phase for e in epochs] == ["start"] + ["phi+xi"] * 12
    assert all(
        (a != b).any() for a, b in zip(values(epochs[1].solver), values(solver), strict=True)
    )


def test_corrector_rows_are_learned_too(problem):
    solver, setup, teacher = problem()
    table = unipc(solver.grid, 3, "bh2")
    *_, last = learn_coefficients(Solver(table, solver.grid), setup, teacher)
    learned = last.solver.coefficients
    assert learned.prediction == "data"
    used = torch.ones_like(table.c, dtype=torch.bool).tril(1)
    used[-1] = False
    assert (learned.c != table.c)[used].all()
    assert torch.equal(learned.c[~used], table.c[~used])
    assert (learned.b != table.b)[torch.ones_like(table.b, dtype=torch.bool).tril()].all()


@pytest.mark.parametrize("corrector", [False, True])
def test_shared_rows_stay_equal(problem, corrector):
    solver, setup, teacher = problem(nfe=6, time_dependent=False)
    table = unipc(solver.grid, 2, corrector=corrector)
    for epoch in learn_coefficients(Solver(table, solver.grid), setup, teacher):
        learned = epoch.solver.coefficients
        assert (learned.b[1:] == learned.b[1]).all()
        if corrector:
            assert (learned.c[1:] == learned.c[1]).all()
    start = next(learn_coefficients(Solver(table, solver.grid), setup, teacher)).solver
    expected = table.b[1:].mean(0)
    torch.testing.assert_close(start.coefficients.b[1], expected, rtol=1e-12, atol=1e-12)
    if corrector:  # its last row is never used and says nothing about the others
        expected = table.c[1:-1].mean(0)
        torch.testing.assert_close(start.coefficients.c[1], expected, rtol=1e-12, atol=1e-12)


def test_shared_rows_of_a_constant_table_start_at_the_table(problem):
    solver, setup, teacher = problem(nfe=6, time_dependent=False)
    first = next(learn_coefficients(solver, setup, teacher))
    assert first.valid_loss == pytest.approx(loss_of(solver, setup, teacher.valid), rel=1e-9)


def test_room_for_a_higher_order_starts_exactly_at_the_published_solver(problem):
    solver, setup, teacher = problem(nfe=5, order=2)
    wide = Solver(solver.coefficients.pad(4), solver.grid)
    narrow_epoch, wide_epoch = (next(learn_coefficients(s, setup, teacher)) for s in (solver, wide))
    assert wide_epoch.valid_loss == narrow_epoch.valid_loss
    assert wide_epoch.train_loss == narrow_epoch.train_loss
    *_, last = learn_coefficients(wide, setup, teacher)
    assert (last.solver.coefficients.b[3:, 2:] != 0).all()


# --- The relaxed objective ---------------------------------------------------------------------


@every_algorithm
def test_radius_zero_is_equation_six(problem, learn):
    solver, setup, teacher = problem(gamma=0.0)
    setup = recorded(setup)
    epochs = list(learn(solver, setup, teacher))
    assert all(e.accepted == 0 for e in epochs)
    starts = torch.cat(setup.denoiser.starts)
    assert len(starts) == 24 * (len(epochs) - 1)
    # Not one x'_T ever leaves its x_T, to the last bit.
    assert len(torch.cat([starts, teacher.train[0]]).unique(dim=0)) == 24


@every_algorithm
@pytest.mark.parametrize("accept", [False, True])
def test_relaxed_starts_stay_in_their_ball(problem, learn, accept):
    solver, setup, teacher = problem(epochs=4, accept_if_better=accept, lr_x=60.0)
    setup = recorded(setup)
    epochs = list(learn(solver, setup, teacher))
    r = radius(setup.params.gamma, d=2, m=3 * 4 - 3) * setup.schedule.T
    away = distances_to_nearest(torch.cat(setup.denoiser.starts), teacher.train[0])
    assert away.max() <= r * (1 + 1e-9)
    assert away.max() > 0.9 * r  # the bound is one that is met
    last = (epochs[-1].x_T_relaxed - teacher.train[0]).norm(dim=1)
    assert 0 < last.max() <= r * (1 + 1e-9)
    assert all(0 <= e.accepted <= 1 for e in epochs) and epochs[1].accepted > 0


@pytest.mark.parametrize(
    ("learn", "m"),
    [(learn_coefficients, 9), (learn_times, 6), (learn_alternating, 15), (learn_jointly, 15)],
)
def test_the_radius_may_count_all_that_is_learned(problem, learn, m):
    """App. G.2's m at N = 4, k = 3: 9 coefficients, 3 inner times, and 3 of the network's."""
    solver, setup, teacher = problem(m_counts="learned", accept_if_better=False, lr_x=1e4)
    *_, last = learn(solver, setup, teacher)
    away = (last.x_T_relaxed - teacher.train[0]).norm(dim=1).max().item()
    assert away == pytest.approx(radius(setup.params.gamma, 2, m) * setup.schedule.T, rel=1e-6)


def test_relaxed_starts_are_kept_from_epoch_to_epoch_and_phase_to_phase(problem):
    solver, setup, teacher = problem(lr_x=0.01, gamma=10.0, rounds=2)
    setup = recorded(setup)
    list(learn_alternating(solver, setup, teacher))
    passes = torch.cat(setup.denoiser.starts).split(24)
    away = [distances_to_nearest(x, teacher.train[0]).mean().item() for x in passes]
    assert away[0] == 0 and all(b > a for a, b in zip(away, away[1:], strict=False))


def test_relaxation_makes_the_objective_easier(problem):
    """With the solver held still, moving x'_T only lowers its loss, and accepted moves never
    raise it."""
    solver, setup, teacher = problem(lr_phi=1e-9, epochs=6, gamma=0.1)
    losses = [e.train_loss for e in learn_coefficients(solver, setup, teacher)]
    assert losses[-1] < 0.999 * losses[0]
    careful = list(
        learn_coefficients(solver, setup, teacher, accept_if_better=True, lr_x=10.0, gamma=100.0)
    )
    losses = [e.train_loss for e in careful]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(losses[1:], losses[2:], strict=False))
    assert losses[-1] < 0.8 * losses[0] and 0 < careful[-1].accepted < 1


# --- The gradient step -------------------------------------------------------------------------


def finite_difference(f, x, h: float = 1e-6):
    """Central differences of a scalar function at every entry of x."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        moved = torch.zeros_like(x).view(-1)
        moved[i] = h
        moved = moved.view_as(x)
        gradient.view(-1)[i] = (f(x + moved) - f(x - moved)) / (2 * h)
    return gradient


def test_one_step_follows_the_gradient_of_every_block(problem, monkeypatch):
    solver, setup, teacher = problem(batch_size_alt=24, grad_clip=1e9, gamma=0.0)
    solver = Solver(unipc(solver.grid, 2), solver.grid)
    seen = []

    def remember(optimiser, *_):
        seen.extend(p.grad.clone() for group in optimiser.param_groups for p in group["params"])

    for optimiser in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.SGD):
        monkeypatch.setattr(optimiser, "step", remember)
    epochs = learn_jointly(solver, setup, teacher)
    next(epochs), next(epochs), next(epochs)
    for gradient, again in zip(seen[:4], seen[4:], strict=True):
        torch.testing.assert_close(again, gradient)  # each step starts from zero
    table, start = solver.coefficients, LearnedGrid.start_at(solver.grid)
    mask_b = torch.ones_like(table.b).tril()
    mask_c = torch.ones_like(table.c).tril(1)
    mask_c[-1] = 0

    def loss(b=table.b, c=table.c, xi=start.xi, xi_c=start.xi_c) -> float:
        c = torch.where(mask_c.bool(), c, table.c)
        moved = Coefficients(mask_b * b, c, table.prediction)
        grid = LearnedGrid(setup.schedule, xi, xi_c).grid()
        return loss_of(Solver(moved, grid), setup, teacher.train)

    expected = [
        finite_difference(lambda b: loss(b=b), table.b),
        finite_difference(lambda c: loss(c=c), table.c),
        finite_difference(lambda xi: loss(xi=xi), start.xi),
        finite_difference(lambda xi_c: loss(xi_c=xi_c), start.xi_c),
    ]
    for gradient, difference in zip(seen[:4], expected, strict=True):
        assert difference.abs().max() > 0
        torch.testing.assert_close(gradient, difference, rtol=1e-5, atol=1e-8)


@pytest.fixture
def steps(monkeypatch):
    """(optimiser, rate, norm of its block's gradient) of every step, in order."""
    seen = []

    def spy(optimiser):
        step = optimiser.step

        def remember(self, *arguments):
            (group,) = self.param_groups
            norm = math.hypot(*[p.grad.norm().item() for p in group["params"]])
            seen.append((optimiser.__name__, group["lr"], norm))
            return step(self, *arguments)

        monkeypatch.setattr(optimiser, "step", remember)

    for optimiser in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.SGD):
        spy(optimiser)
    return seen


def test_rates_fall_as_a_cosine_in_each_phase_and_from_round_to_round(problem, steps):
    solver, setup, teacher = problem(
        rounds=3, phase_epochs=1, lr_phi=0.01, lr_xi=0.005, lr_xi_c=0.1, peak_decay=0.8
    )
    list(learn_alternating(solver, setup, teacher))
    fall = [0.01 + 0.99 * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    expected = [0.8**n * cosine for n in range(3) for cosine in fall]
    for name, peak in (("Adam", 0.01), ("RMSprop", 0.005), ("SGD", 0.1 / 4)):
        rates = [rate for who, rate, _ in steps if who == name]
        assert rates == pytest.approx([peak * x for x in expected], rel=1e-12)


def test_patience_that_ends_slows_down_and_stops(problem, steps, monkeypatch):
    """Where no step helps: two steps at each rate until 1 % is left, and five times two there."""
    solver, setup, teacher = problem(lr_xi=0.005, patience=2, epochs=30)
    monkeypatch.setattr(learn_module._Best, "look", lambda best: best.loss)
    *_, last = learn_times(solver, setup, teacher)
    rates = [rate for who, rate, _ in steps if who == "RMSprop"]
    shares = [0.8**n for n in range(21)] + 5 * [0.01]
    assert rates == pytest.approx([0.005 * share for share in shares for _ in range(2)])
    assert last.index == math.ceil(len(rates) / 3) and last.best == solver
    start = LearnedGrid.start_at(solver.grid).grid()  # where the last end of patience leads back
    torch.testing.assert_close(last.solver.grid.t, start.t)


def test_with_patience_every_step_may_be_the_best(problem, monkeypatch):
    solver, setup, teacher = problem(lr_xi=0.05, patience=2, epochs=4)
    seen, of = [], learn_module._Losses.of

    def look(losses, pairs):
        if len(pairs) == 16:  # those that validate
            seen.append(of(losses, pairs))
        return seen[-1]

    monkeypatch.setattr(learn_module._Losses, "of", look)
    *_, last = learn_times(solver, setup, teacher)
    assert len(seen) == 1 + 4 * (3 + 1)  # at first, after each step, after each pass
    assert loss_of(last.best, setup, teacher.valid) == pytest.approx(min(seen), rel=1e-12)
    assert min(seen) < seen[0]


def test_gradients_are_clipped_block_by_block(problem, steps):
    solver, setup, teacher = problem(grad_clip=1e-4)
    list(learn_jointly(solver, setup, teacher))
    norms = [norm for _, _, norm in steps]
    assert max(norms) == pytest.approx(1e-4, rel=1e-2) and max(norms) <= 1e-4 * (1 + 1e-9)
    assert {who for who, _, _ in steps} == {"Adam", "RMSprop", "SGD"}


@pytest.mark.parametrize("batch_size", [24, 8])
def test_one_step_moves_each_start_down_its_own_gradient(problem, batch_size):
    """By lr_x / N in unit noise, whatever the batch size is."""
    solver, setup, teacher = problem(
        gamma=1e3, lr_x=1e-3, lr_phi=1e-12, epochs=2, batch_size=batch_size
    )
    setup = recorded(setup)
    list(learn_coefficients(solver, setup, teacher))
    after = torch.cat(setup.denoiser.starts)[24:]
    x_T, x_0 = teacher.train

    def total(x) -> float:
        return relaxed_loss(setup.denoiser, solver.coefficients, solver.grid, x, x_0).sum().item()

    with torch.no_grad():
        gradient = finite_difference(total, x_T, h=1e-4)
    expected = x_T - 1e-3 / 4 * 80**2 * gradient
    largest = (expected - x_T).norm(dim=1).max()
    assert largest > 1e-4 and distances_to_nearest(after, expected).max() < 1e-5 * largest


def test_a_learned_solver_is_better_on_noise_it_has_not_seen(problem):
    for nfe in (3, 4, 5):
        solver, setup, teacher = problem(nfe=nfe, n_train=100, n_valid=50, epochs=6)
        unseen = make_teacher_set(setup, 200, 1, seed=7).train
        *_, last = learn_coefficients(solver, setup, teacher)
        assert loss_of(last.best, setup, unseen) < 0.8 * loss_of(solver, setup, unseen)


@every_algorithm
def test_every_algorithm_improves_on_noise_it_has_not_seen(problem, learn):
    solver, setup, teacher = problem(
        nfe=4, n_train=60, n_train_alt=60, epochs=6, rounds=3, gamma=0.0
    )
    unseen = make_teacher_set(setup, 200, 1, seed=7).train
    *_, last = learn(solver, setup, teacher)
    assert loss_of(last.best, setup, unseen) < 0.95 * loss_of(solver, setup, unseen)


# --- What goes wrong ---------------------------------------------------------------------------


class Failing:
    """A denoiser that turns NaN, in its value or in its gradient only, at a certain call."""

    def __init__(self, denoiser, at: int, gradient_only: bool):
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.at, self.gradient_only, self.calls = at, gradient_only, 0

    def __call__(self, x, t):
        self.calls += 1
        D = self.denoiser(x, t)
        if self.calls < self.at:
            return D
        # d sqrt(0) = inf and 0 * inf = NaN, while the value is zero.
        return D + (x * 0).abs().sqrt() if self.gradient_only else D * math.nan


@every_algorithm
@pytest.mark.parametrize("gradient_only", [False, True])
def test_divergence_hands_over_the_best_solver_so_far(problem, learn, gradient_only, noise):
    solver, setup, teacher = problem(epochs=4)
    # 16 calls for epoch 0 and 20 an epoch: within the third pass.
    broken = replace(setup, denoiser=Failing(setup.denoiser, 50, gradient_only))
    epochs = []
    with pytest.raises(LearningDivergedError) as info:
        for epoch in learn(solver, broken, teacher):
            epochs.append(epoch)
    assert "\n" not in str(info.value) and "lr_phi" in str(info.value)
    assert len(epochs) >= 2 and info.value.best == epochs[-1].best
    x_0 = info.value.best.sample(setup.denoiser, 80 * noise(0, 5, 2))
    assert x_0.isfinite().all()


def test_divergence_at_the_start_hands_back_the_start(problem):
    solver, setup, teacher = problem()
    broken = replace(setup, denoiser=Failing(setup.denoiser, 1, False))
    with pytest.raises(LearningDivergedError, match="'start'") as info:
        next(learn_coefficients(solver, broken, teacher))
    assert info.value.best == solver


@pytest.mark.parametrize("learn", ALGORITHMS[1:], ids=lambda f: f.__name__)
def test_collapsing_times_are_a_divergence(problem, learn):
    """Two times may grow equal to the last bit: no grid, but no reason to lose the best solver."""
    solver, setup, teacher = problem(lr_xi=3.0, epochs=5)
    with pytest.raises(LearningDivergedError, match="lr_xi") as info:
        list(learn(solver, setup, teacher))
    assert loss_of(info.value.best, setup, teacher.valid) <= loss_of(solver, setup, teacher.valid)


@every_algorithm
def test_an_unknown_setting_is_refused_in_one_sentence(problem, one_sentence, learn):
    solver, setup, teacher = problem()
    with one_sentence("unknown setting", "'lr_b'", "lr_phi"):
        next(learn(solver, setup, teacher, lr_b=1e-2))
    with one_sentence("grad_clip", "float", "'no'"):
        next(learn(solver, setup, teacher, grad_clip="no"))
    with one_sentence("grad_clip", "above 0", "-1.0"):
        next(learn(solver, setup, teacher, grad_clip=-1.0))


NOT_READ = {
    learn_coefficients: ["batch_size_alt", "rounds", "lr_xi", "grid_variable", "peak_decay"]
    + ["m_counts", "patience"],
    learn_times: ["batch_size", "lr_phi", "rounds", "phase_epochs", "first_phase"],
    learn_alternating: ["epochs", "batch_size", "patience"],
    learn_jointly: ["epochs", "batch_size", "first_phase", "peak_decay", "patience"],
}
ELSEWHERE = ["schedule", "shape", "checkpoint", "guidance", "n_train", "states", "fid_samples"]


@every_algorithm
def test_a_setting_that_is_not_read_is_refused_by_name(problem, one_sentence, learn):
    """Else learn_times(batch_size=3) would learn with batches of batch_size_alt, and not say so."""
    solver, setup, teacher = problem()
    for name in NOT_READ[learn] + ELSEWHERE:
        value = getattr(setup.params, name)
        with one_sentence(f"{learn.__name__} does not read {name} ("):
            next(learn(solver, setup, teacher, **{name: value}))


OTHER_VALUES = {"batch_size": 3, "batch_size_alt": 3, "epochs": 7, "rounds": 5, "phase_epochs": 3}
OTHER_VALUES |= {"first_phase": "xi", "lr_phi": 0.03, "lr_xi": 0.02, "grid_variable": "t"}
OTHER_VALUES |= {"peak_decay": 0.1, "m_counts": "learned", "patience": 1}


@every_algorithm
def test_what_is_refused_would_change_nothing(problem, learn):
    """The lists of settings beside the code are right: in the setup's params these are ignored."""
    solver, setup, teacher = problem()
    expected = list(learn(solver, setup, teacher))[-1]
    changed = {name: OTHER_VALUES[name] for name in NOT_READ[learn]}
    params = setup.params.override(**changed)
    found = list(learn(solver, replace(setup, params=params), teacher))[-1]
    assert found.solver == expected.solver and found.valid_loss == expected.valid_loss


@pytest.mark.slow
@every_algorithm
def test_what_is_read_changes_what_is_learned(problem, one_sentence, learn):
    solver, setup, teacher = problem(gamma=0.3, accept_if_better=False)
    with one_sentence("it reads") as info:
        next(learn(solver, setup, teacher, fid_samples=1))
    reads = set(re.search("it reads (.*)", str(info.value))[1].split(", "))
    others = OTHER_VALUES | {"gamma": 0.0, "lr_x": 0.1, "grad_clip": 1e-4, "distance": "psnr"}
    others |= {"accept_if_better": True, "consistent": True, "time_dependent": False}
    others |= {"lr_xi_c": 3.0, "offset_fraction": 0.0}
    expected = list(learn(solver, setup, teacher))[-1]
    # LPIPS needs pictures; the others change memory, not numbers.
    for name in reads - {"lpips_net", "lpips_resize", "rematerialize", "sample_batch_size"}:
        found = list(learn(solver, setup, teacher, **{name: others[name]}))[-1]
        same = found.solver == expected.solver and found.train_loss == expected.train_loss
        assert not same, name


def test_a_distance_that_the_model_lacks_is_refused_in_one_sentence(problem, one_sentence):
    solver, setup, teacher = problem(distance="features")
    with one_sentence("mixture", "features", "l2", "lpips"):
        next(learn_coefficients(solver, setup, teacher))


def test_learning_uses_the_distance_that_is_set(problem):
    solver, setup, teacher = problem(distance="features")
    layers = [torch.tensor([[1.0, 0.3], [-0.5, 2.0]], dtype=torch.float64)]
    setup = replace(setup, activations=lambda x: [(x @ w)[..., None, None] for w in layers])
    epochs = list(learn_coefficients(solver, setup, teacher))
    distance = feature_distance(setup.activations)
    table, grid = solver.coefficients, solver.grid
    loss = relaxed_loss(setup.denoiser, table, grid, *teacher.valid, distance)
    assert epochs[0].valid_loss == pytest.approx(loss.mean().item(), rel=1e-12)
    assert epochs[-1].solver != solver


def test_a_setting_of_none_leaves_the_one_in_params(problem):
    solver, setup, teacher = problem(epochs=3)
    assert len(list(learn_coefficients(solver, setup, teacher, epochs=None))) == 4
    assert len(list(learn_coefficients(solver, setup, teacher, epochs=1))) == 2


@every_algorithm
def test_a_solver_of_another_schedule_is_refused_in_one_sentence(problem, one_sentence, learn):
    _, setup, teacher = problem()
    grid = time_edm(VPLinear(), 4)
    with one_sentence("VPLinear", "EDM", "schedule"):
        next(learn(Solver(ipndm(grid, 3), grid), setup, teacher))
    grid = time_edm(EDM(T=40.0), 4)
    with one_sentence("T=40.0", "T=80.0"):
        next(learn(Solver(ipndm(grid, 3), grid), setup, teacher))


@every_algorithm
def test_a_teacher_set_of_another_shape_is_refused_in_one_sentence(
    problem, one_sentence, learn, noise
):
    solver, setup, _ = problem()
    wrong = TeacherSet(noise(0, 10, 3), noise(1, 10, 3), 6)
    with one_sentence("teacher set", "(3,)", "(2,)"):
        next(learn(solver, setup, wrong))


def test_a_model_of_ones_own_needs_no_more_than_a_callable_a_schedule_and_settings():
    def denoise(x, t):  # data ~ N(0, I)
        return x / (1 + t**2)

    params = s4s.Params(schedule="EDM", shape=[3], distance="l2", n_train=40, n_valid=20, epochs=2)
    setup = s4s.Setup("mine", denoise, s4s.EDM(), (3,), params)
    grid = s4s.time_edm(setup.schedule, 4)
    solver = s4s.Solver(s4s.ipndm(grid, 3), grid)
    *_, last = s4s.learn_coefficients(solver, setup, s4s.make_teacher_set(setup))
    x_T = s4s.initial_noise(setup, range(500))
    exact = setup.teacher.sample(denoise, x_T)
    errors = [(s.sample(denoise, x_T) - exact).square().mean() for s in (solver, last.best)]
    assert errors[1] < errors[0]
    with pytest.raises(s4s.UsageError, match="mine has no features or no data"):
        setup.reference  # noqa: B018


# --- Conditions --------------------------------------------------------------------------------


@pytest.fixture
def conditional(mixture):
    """The mixture, moved by what each sample's seed says: its condition."""

    def make(**settings):
        setup = mixture(**settings)

        def denoiser(x, t, shift):
            assert len(shift) == len(x)
            return setup.denoiser(x - shift, t) + shift

        denoiser.schedule = setup.schedule
        return replace(
            setup,
            denoiser=denoiser,
            condition=lambda seeds: torch.tensor([[s % 7 - 3.0, s % 5] for s in seeds]).double(),
        )

    return make


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_seed_has_the_same_sample_whatever_its_batch(conditional, size):
    setup, seeds = conditional(sample_batch_size=size), range(3, 12)
    grid = time_logsnr(setup.schedule, 4)
    x_0 = torch.cat(list(s4s.sample_batches(Solver(ipndm(grid, 3), grid), setup, seeds)))
    for seed, x in zip(seeds, x_0, strict=True):
        alone = Solver(ipndm(grid, 3), grid).sample(
            setup.denoiser_for([seed]), initial_noise(setup, [seed])
        )
        torch.testing.assert_close(x, alone[0], rtol=1e-12, atol=1e-12)
    unmoved = replace(setup, condition=lambda seeds: torch.zeros(len(seeds), 2).double())
    assert not torch.allclose(
        torch.cat(list(s4s.sample_batches(setup.teacher, unmoved, seeds))), x_0
    )


@every_algorithm
@pytest.mark.parametrize("settings", [{}, {"accept_if_better": True, "rematerialize": True}])
def test_every_pair_is_learned_with_its_own_condition(conditional, learn, settings):
    """A solver as good as the teacher has no loss, only if each sample meets its condition."""
    slow = {"lr_phi": 1e-6, "lr_xi": 1e-6, "lr_xi_c": 0.0}
    setup = conditional(**settings, **slow, teacher_nfe=6, gamma=0.0)
    teacher = make_teacher_set(setup)
    start = setup.teacher
    first, *_, last = learn(start, setup, teacher)
    assert first.train_loss < 1e-20 and first.valid_loss < 1e-20
    assert last.train_loss < 1e-6
    mixed = replace(teacher, seeds=teacher.seeds + 1)
    assert next(learn(start, setup, mixed)).valid_loss > 0.1


def test_conditions_need_the_seeds_of_the_pairs(conditional, one_sentence):
    setup = conditional()
    teacher = replace(make_teacher_set(setup), seeds=None)
    with one_sentence("mixture", "seeds", "make_teacher_set"):
        next(learn_coefficients(setup.teacher, setup, teacher))


# --- Latents -----------------------------------------------------------------------------------


@pytest.fixture
def latent(mixture):
    """The mixture as if its points were latents of three numbers that are looked at."""

    def make(**settings):
        torch.manual_seed(0)
        decoder = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh())
        return replace(mixture(**settings), decode=decoder.double().requires_grad_(False))

    return make


@every_algorithm
def test_what_is_learned_is_the_distance_of_decoded_samples(latent, learn):
    setup = latent(epochs=4)
    teacher, grid = make_teacher_set(setup), time_logsnr(setup.schedule, 4)
    first, *_, last = learn(Solver(ipndm(grid, 3), grid), setup, teacher)
    assert last.best is not first.solver

    def images(solver):
        return setup.decode(solver.sample(setup.denoiser, teacher.valid[0]))

    for solver, loss in ((first.solver, first.valid_loss), (last.solver, last.valid_loss)):
        expected = (images(solver) - setup.decode(teacher.valid[1])).square().mean()
        assert loss == pytest.approx(expected.item())


@every_algorithm
def test_decoding_again_in_the_backward_pass_changes_nothing(latent, learn):
    results = []
    for rematerialize in (False, True):
        setup = latent(rematerialize=rematerialize)
        teacher, grid = make_teacher_set(setup), time_logsnr(setup.schedule, 4)
        *_, last = learn(Solver(ipndm(grid, 3), grid), setup, teacher)
        results.append((last.train_loss, last.valid_loss, last.solver.to_dict()))
    assert results[0] == results[1]


class Small:
    """A denoiser on a device that holds `most` samples at a time."""

    def __init__(self, denoiser, most: int):
        self.denoiser, self.schedule, self.most, self.sizes = denoiser, denoiser.schedule, most, []

    def __call__(self, x, t):
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"{len(x)} samples")
        self.sizes.append(len(x))
        return self.denoiser(x, t)


@every_algorithm
def test_batches_that_do_not_fit_are_learned_in_parts(problem, capsys, learn):
    solver, setup, teacher = problem(batch_size=20, batch_size_alt=20, sample_batch_size=20)
    small = Small(setup.denoiser, 6)
    found = list(learn(solver, replace(setup, denoiser=small), teacher))[-1]
    expected = list(learn(solver, setup, teacher))[-1]
    assert max(small.sizes) == 5  # 20 halved twice
    assert found.valid_loss == pytest.approx(expected.valid_loss, rel=1e-9)
    assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-9)
    told = capsys.readouterr().err
    assert "learning: a batch of 20 does not fit into memory, trying 10" in told


def test_samples_do_not_depend_on_the_memory_there_is(mixture, capsys):
    setup = mixture(sample_batch_size=50)
    expected = torch.cat(list(s4s.sample_batches(setup.teacher, setup, range(70))))
    small = replace(setup, denoiser=Small(setup.denoiser, 15))
    parts = list(s4s.sample_batches(setup.teacher, small, range(70)))
    assert [len(x) for x in parts] == [12, 12, 12, 12, 12, 10]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-13, atol=1e-13)
    assert "a batch of 50 does not fit into memory, trying 25" in capsys.readouterr().err


def test_a_model_too_large_for_one_sample_is_told_in_one_sentence(mixture, one_sentence):
    setup = mixture()
    with one_sentence("sampling", "one sample", "rematerialize"):
        list(
            s4s.sample_batches(
                setup.teacher, replace(setup, denoiser=Small(setup.denoiser, 0)), [0]
            )
        )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda D: D.detach(), ["gradient", "learn_gauss_newton"]),
        (lambda D: torch.nn.functional.dropout(D, 0.5), ["eval()"]),
    ],
)
def test_a_model_that_cannot_be_learned_from_is_told(problem, one_sentence, spoil, words):
    solver, setup, teacher = problem(4)
    silent = setup.variant(denoiser=lambda x, t: spoil(setup.denoiser(x, t)))
    with one_sentence(*words):
        next(learn_coefficients(solver, silent, teacher))


def test_learning_turns_gradients_on_for_itself(problem):
    solver, setup, teacher = problem(4)
    usual = [e.valid_loss for e in learn_coefficients(solver, setup, teacher)]
    with torch.no_grad():
        assert usual == [e.valid_loss for e in learn_coefficients(solver, setup, teacher)]


def test_inference_mode_is_refused(problem, one_sentence):
    solver, setup, teacher = problem(4)
    with torch.inference_mode(), one_sentence("inference_mode"):
        next(learn_coefficients(solver, setup, teacher))


def test_what_was_learned_says_for_which_model(problem):
    solver, setup, teacher = problem(4)
    *_, last = learn_coefficients(solver, setup, teacher)
    assert last.best.provenance["model"] == setup.model == last.solver.provenance["model"]


def drawn(setup, batch: int):
    """Noise and samples of 21 seeds, in batches."""
    parts = [range(i, min(i + batch, 21)) for i in range(0, 21, batch)]
    grid = time_logsnr(setup.schedule, 4)
    solver = Solver(ipndm(grid, 3), grid)
    noise = [initial_noise(setup, part) for part in parts]
    told = zip(parts, noise, strict=True)
    return torch.cat(noise), torch.cat([solver.sample(setup.denoiser_for(p), x) for p, x in told])


@pytest.fixture
def threads():
    usual = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(usual)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rounding"), [("mixture", 0), ("digits", 0), ("ecg", 1e-5), ("cifar10_tiny", 1e-5)]
)
def test_batches_and_threads_change_samples_as_the_readme_says(threads, name, rounding):
    setup = s4s.load(name, "cpu")
    threads(1)
    noise, x = drawn(setup, 21)
    for count, batch in [(1, 21), (1, 1), (1, 8), (2, 21)]:
        threads(count)
        again = drawn(setup, batch)
        assert torch.equal(again[0], noise)
        torch.testing.assert_close(again[1], x, rtol=0, atol=rounding)
    threads(1)
    assert torch.equal(drawn(setup, 21)[1], x)


@pytest.mark.slow
@pytest.mark.parametrize("learn", [learn_coefficients, s4s.learn_gauss_newton])
def test_threads_change_what_is_learned_as_the_readme_says(threads, learn):
    settings = dict(n_train=32, n_valid=16, epochs=1, distance="l2")
    setup = s4s.load("digits", "cpu", **settings)
    grid, teacher, found = time_logsnr(setup.schedule, 3), make_teacher_set(setup), []
    for count in (1, 1, 2):
        threads(count)
        *_, last = learn(Solver(ipndm(grid, 2), grid), setup, teacher)
        found.append(last.best.coefficients.b)
    assert torch.equal(found[0], found[1])
    exact = learn is learn_coefficients
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0 if exact else 1e-3)
