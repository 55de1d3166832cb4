"""Rivals as settings of the one loop: theory of the current times, BNS, the generalised solver."""

import math

import pytest
import torch

import s4s_core as s4s
from s4s_core import (
    Solver,
    dpm_solver_pp,
    ipndm,
    learn_bns,
    learn_coefficients,
    learn_generalised,
    learn_jointly,
    learn_times,
    make_teacher_set,
    time_logsnr,
    unipc,
)


@pytest.fixture
def problem(mixture):
    def make(table=ipndm, **settings):
        setup = mixture(**{"n_train": 40, "n_train_alt": 40, **settings})
        grid = time_logsnr(setup.schedule, 4)
        return Solver(table(grid), grid), setup, make_teacher_set(setup)

    return make


def error(solver, setup, seed: int = 7) -> float:
    """Mean square difference to the teacher on noise that no learning saw."""
    fresh = make_teacher_set(setup, seed=seed)
    return (solver.sample(setup.denoiser, fresh.x_T) - fresh.x_0).square().mean().item()


@pytest.mark.parametrize("table", [dpm_solver_pp, unipc], ids=["dpm_solver_pp", "unipc"])
def test_learned_times_carry_the_theory_with_them(problem, table):
    solver, setup, teacher = problem(table)
    epochs = list(learn_times(solver, setup, teacher, scheme=table))
    assert not torch.equal(epochs[-1].solver.grid.t, solver.grid.t)
    for epoch in epochs:
        expected = table(epoch.solver.grid)
        torch.testing.assert_close(epoch.solver.coefficients.b, expected.b, rtol=1e-12, atol=1e-12)
        if expected.c is not None:
            found = epoch.solver.coefficients.c
            torch.testing.assert_close(found, expected.c, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_times_passes_through_the_theory(problem):
    # One step from the same start, with and without: the moves differ, so both paths are there.
    moved = []
    for theory in (None, dpm_solver_pp):
        solver, setup, teacher = problem(dpm_solver_pp, n_train=20, n_train_alt=20, epochs=1)
        moved.append(list(learn_times(solver, setup, teacher, scheme=theory))[-1].solver.grid.t)
    assert (moved[0] - moved[1]).abs().max() > 1e-6


def test_bns_learns_full_memory_states_and_times_without_relaxation(problem):
    solver, setup, teacher = problem(rounds=4)
    epochs = list(learn_bns(solver, setup, teacher))
    assert epochs[-1].index == 2 * setup.params.rounds * setup.params.phase_epochs
    learned = epochs[-1].best.coefficients
    assert learned.b.shape == (4, 4) and learned.a.shape == (4, 1)
    assert not torch.equal(learned.a, torch.ones_like(learned.a))
    assert learned.b[3, 3] != 0
    assert not torch.equal(epochs[-1].best.grid.t, solver.grid.t)
    assert all(epoch.accepted == 0 for epoch in epochs)
    # At the start it is the published solver, and its loss is the PSNR of that.
    square = (solver.sample(setup.denoiser, teacher.valid[0]) - teacher.valid[1]).square().mean(1)
    psnr = (10 * (4 / square).log10()).mean().item()
    assert epochs[0].valid_loss == pytest.approx(-psnr, rel=1e-10)
    assert error(epochs[-1].best, setup) < error(solver, setup)


def test_negative_psnr_is_bounded_and_falls_with_the_error():
    x = torch.zeros(3, 2, dtype=torch.float64)
    target = torch.tensor([[0.0, 0.0], [0.02, 0.02], [2.0, 2.0]], dtype=torch.float64)
    assert s4s.negative_psnr(x, target).tolist() == pytest.approx([-120, -40, 0])


@pytest.mark.slow
@pytest.mark.parametrize("table", [ipndm, dpm_solver_pp, unipc])
def test_the_generalised_solver_begins_at_its_theory_and_improves(problem, table):
    solver, setup, teacher = problem(table, rounds=4)
    epochs = list(learn_generalised(solver, setup, teacher, scheme=table))
    start = error(solver, setup)
    assert error(epochs[0].solver, setup) == pytest.approx(start, rel=1e-9)
    learned = epochs[-1].best.coefficients
    assert learned.b.shape == learned.a.shape == (4, 4)
    assert learned.a[3, 3] != 0 and learned.b[3, 3] != 0
    assert error(epochs[-1].best, setup) < start


def test_the_generalised_solver_adds_what_it_learned_to_the_current_theory(problem):
    # With a rate of (almost) zero for the corrections, the tables follow the moving times.
    solver, setup, teacher = problem(dpm_solver_pp, lr_phi=1e-12)
    last = list(learn_generalised(solver, setup, teacher, scheme=dpm_solver_pp))[-1].solver
    assert not torch.equal(last.grid.t, solver.grid.t)
    expected = dpm_solver_pp(last.grid).pad(4, states=4)
    torch.testing.assert_close(last.coefficients.b, expected.b, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(last.coefficients.a, expected.a, rtol=1e-8, atol=1e-8)


def test_settings_given_by_name_still_win(problem):
    solver, setup, teacher = problem()
    epochs = list(learn_bns(solver, setup, teacher, distance="l2", gamma=1.0))
    assert epochs[0].valid_loss > 0 and epochs[-1].accepted > 0


def test_coefficients_of_x_are_learned_where_a_table_has_them(problem):
    solver, setup, teacher = problem()
    wide = Solver(solver.coefficients.pad(3, states=1), solver.grid)
    learned = list(learn_coefficients(wide, setup, teacher))[-1].solver.coefficients
    assert (learned.a != 1).all()


@pytest.mark.parametrize("learn", ["bns", "generalised"])
@pytest.mark.parametrize("name", ["ipndm", "dpm_solver_pp", "unipc"])
def test_experiments_run_the_rivals_by_name(tmp_path, monkeypatch, learn, name):
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path))
    settings = {"n_train_alt": 40, "n_valid_alt": 20, "rounds": 1, "fid_samples": 200}
    experiment = s4s.Experiment("mixture", solver=name, nfe=4, learn=learn, settings=settings)
    result = s4s.run(experiment)
    assert result.solver.coefficients.order == 4
    assert math.isfinite(result.frechet)
    assert s4s.run(experiment).solver == result.solver


def test_experiments_switch_coefficients_of_x_and_consistency_on_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path))
    settings = {"n_train": 40, "n_valid": 20, "epochs": 1, "fid_samples": 200}
    settings["learner"] = "first_order"
    learned = {}
    for name in ("states", "consistent"):
        chosen = {**settings, name: 1 if name == "states" else True}
        experiment = s4s.Experiment("mixture", nfe=4, learn="coefficients", settings=chosen)
        learned[name] = s4s.run(experiment).solver.coefficients
    assert learned["states"].a.shape == (4, 1) and learned["consistent"].a is None
    assert (learned["consistent"].b.sum(1) - 1).abs().max() < 1e-12


def test_joint_learning_takes_a_theory_too(problem):
    solver, setup, teacher = problem(dpm_solver_pp)
    epochs = list(learn_jointly(solver, setup, teacher, scheme=dpm_solver_pp))
    assert error(epochs[-1].best, setup) < error(solver, setup)
