"""A family learned in one run: its model of the loss, what it spans, and that it ends lower."""

from dataclasses import replace

import pytest
import torch

import s4s_core as s4s
from s4s_core.deploy.learn_family import _Family, _rows
from s4s_core.gauss_newton import Student

BLOCKS = ("phi", "xi", "first")


def scheme(grid):
    return s4s.dpm_solver_pp(grid, min(3, grid.nfe)).pad(min(3, grid.nfe), 1)


@pytest.fixture
def given(mixture):
    """The setup of the mixture, a teacher set, and the solver of N calls to begin at."""
    setup = mixture(n_train=96, n_valid=40, newton_batch_size=32, epochs=3, distance="l2")

    def start(N):
        grid = s4s.time_edm(setup.schedule, N)
        return s4s.Solver(scheme(grid), grid)

    return setup, s4s.make_teacher_set(setup), start


def made(given, blocks):
    """The family as numbers phi, seen at 3 and 4."""
    setup, teacher, start = given
    starts = {N: start(N) for N in (3, 4, 5)}
    return _Family(starts, setup, teacher, setup.params, (3, 4), (3, 4, 5), blocks, scheme)


@pytest.fixture
def family(given):
    return made(given, BLOCKS)


def numbers(solver) -> torch.Tensor:
    """All numbers of a solver in a row."""
    table, grid = solver.coefficients, solver.grid
    return torch.cat([v.flatten() for v in (table.b, table.a, grid.t, grid.t_model, grid.scale)])


def test_it_begins_at_the_starts(given):
    start, family = given[2], made(given, ("phi", "xi"))
    begun = family.solver(torch.zeros(family.size, dtype=torch.float64))
    assert begun.nfes == [3, 4, 5]
    for N in begun.nfes:
        torch.testing.assert_close(numbers(begun[N]), numbers(start(N)))


def test_normal_equations_give_the_gradient_of_the_loss(family):
    generator = torch.Generator().manual_seed(0)
    phi, way = 0.02 * torch.randn(2, family.size, generator=generator, dtype=torch.float64)
    pairs = torch.arange(8)
    loss, g, G = family.normal_equations(phi, pairs)
    assert loss == pytest.approx(family.loss(phi, pairs))
    h = 1e-4
    slope = (family.loss(phi + h * way, pairs) - family.loss(phi - h * way, pairs)) / (2 * h)
    assert (2 * g @ way).item() == pytest.approx(slope, rel=2e-2)  # differences of the network
    torch.testing.assert_close(G, G.T)
    assert torch.linalg.eigvalsh(G).min() > 0  # the prior holds what no pair says


def test_cubics_in_the_place_and_lines_in_one_over_n_are_in_it(family):
    """In every column, at seen and unseen N, by least squares over all of phi."""
    wanted = []
    for N, student in family.students.items():
        steps = {"xi": range(N), "xi_c": range(1, N), "first": [0.0]}
        steps |= {name: places[0].tolist() for name, places in student.places.items()}
        for name in student.sizes:
            u = (torch.tensor([*steps[name]], dtype=torch.float64) + 0.5) / N
            if name == "first":
                wanted.append((2 - 3 / N) * torch.ones_like(u))
            else:
                wanted.append(u**3 - u + 0.3 + (u**2 - 0.5) / N)
    M, theta = torch.cat([family.maps[N] for N in family.students]), torch.cat(wanted)
    seen = torch.cat([family.maps[N] for N in (3, 4)])
    assert M.shape[1] == seen.shape[1]
    phi = torch.linalg.lstsq(M, theta, driver="gelsd").solution
    torch.testing.assert_close(M @ phi, theta, atol=1e-8, rtol=0)


def test_each_entry_of_theta_has_a_row(given):
    setup, _, start = given
    for N in (2, 3, 7):
        student = Student(start(N), setup.params, BLOCKS, scheme)
        rows = _rows(student)
        assert len(rows) == student.size and all(any(row.values()) for row in rows)


@pytest.mark.slow
def test_it_comes_nearer_at_numbers_of_calls_that_it_never_saw(given):
    setup, teacher, start = given
    counter = s4s.CallCounter(setup.denoiser)
    counted = setup.variant(denoiser=counter)
    *_, end = s4s.learn_family(
        start, counted, teacher, seen=(4, 6), nfes=(4, 5, 6), blocks=BLOCKS, scheme=scheme
    )
    assert counter.backward == 0
    x_T = s4s.initial_noise(setup, range(500))
    exact = setup.teacher.sample(setup.denoiser, x_T)
    for N in (4, 5, 6):
        before, after = (
            (solver.sample(setup.denoiser, x_T) - exact).square().mean()
            for solver in (start(N), end.best[N])
        )
        assert after < 0.7 * before, N


def test_it_is_one_file_that_says_for_which_model(given, tmp_path):
    setup, teacher, start = given
    first = next(s4s.learn_family(start, setup, teacher, seen=(3,), nfes=(3, 4)))
    first.best.save(tmp_path / "family.json")
    read = s4s.SolverFamily.load(tmp_path / "family.json")
    assert read.nfes == [3, 4]
    for N in read.nfes:
        assert torch.equal(numbers(read[N]), numbers(first.best[N]))
        assert read[N].provenance["model"] == setup.model


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seen": ()}, "at one number of network calls at least"),
        ({"seen": (4.5,)}, "number of calls"),
        ({"nfes": (1, 4)}, "number of calls"),
        ({"nfes": (4, 4)}, "one solver for 4 network calls"),
        ({"lr_phi": 0.1}, "does not read lr_phi"),
        ({"blocks": ("psi",)}, "block"),
    ],
)
def test_what_is_no_family_is_refused(given, settings, said):
    setup, teacher, start = given
    with pytest.raises(s4s.UsageError, match=said):
        next(s4s.learn_family(start, setup, teacher, **settings))


def test_a_start_of_another_number_of_calls_is_refused(given):
    setup, teacher, start = given
    with pytest.raises(s4s.UsageError, match=r"start\(5\) is a solver of 4 calls"):
        next(s4s.learn_family(lambda N: start(min(N, 4)), setup, teacher, seen=(4,), nfes=(4, 5)))


def test_a_start_that_is_no_solver_is_refused(given):
    setup, teacher, _ = given
    with pytest.raises(s4s.UsageError, match="solver must be"):
        next(s4s.learn_family(lambda N: None, setup, teacher))


def test_answers_that_are_not_finite_leave_the_best(given):
    setup, teacher, start = given
    calls = []

    def breaks(x, t):
        calls.append(1)
        return setup.denoiser(x, t) * (float("nan") if len(calls) > 400 else 1)

    broken = setup.variant(denoiser=breaks)
    with pytest.raises(s4s.LearningDivergedError) as caught:
        for _ in s4s.learn_family(start, broken, teacher, seen=(3, 4), nfes=(3, 4)):
            pass
    assert isinstance(caught.value.best, s4s.SolverFamily)


@pytest.mark.parametrize("first", [None, 0.3], ids=["first call at T", "free first call"])
def test_stretched_to_its_own_number_of_calls_a_solver_is_the_same(given, first):
    _, _, start = given
    grid = s4s.LearnedGrid.start_at(start(5).grid)
    first = None if first is None else torch.tensor(first, dtype=torch.float64)
    grid = replace(grid, xi_c=torch.tensor([0, 0.05, -0.02, 0.01, 0.03, 0]).double(), first=first)
    table = scheme(grid.grid())
    moved = replace(
        table, b=table.b + 0.1 * torch.arange(15).double().sin().view(5, 3).tril(), a=table.a * 1.1
    )
    solver = s4s.Solver(moved, grid.grid())
    torch.testing.assert_close(numbers(s4s.stretch(solver, 5, scheme)), numbers(solver))


@pytest.mark.parametrize("nfe", [3, 6, 11])
def test_a_published_solver_on_even_steps_stretches_to_itself(given, nfe):
    """Without corrections there is nothing to read, and equal steps stay equal."""
    setup, _, _ = given
    short, long = (s4s.time_logsnr(setup.schedule, n) for n in (4, nfe))
    stretched = s4s.stretch(s4s.Solver(scheme(short), short), nfe, scheme)
    torch.testing.assert_close(numbers(stretched), numbers(s4s.Solver(scheme(long), long)))


def test_a_single_step_solver_does_not_stretch(given):
    setup, _, _ = given
    grid = s4s.time_logsnr(setup.schedule, 2)
    with pytest.raises(s4s.UsageError, match="coefficients to stretch"):
        s4s.stretch(s4s.Solver(s4s.dpm_solver(grid, 2), grid), 3, scheme)
