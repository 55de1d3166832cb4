"""Rivals that learn coefficients and times at once, in our loop and with our optimisers."""

from collections.abc import Iterator
from typing import Any

from ..errors import UsageError
from ..grid import TimeGrid
from ..learn import Epoch, learn_jointly
from ..published import Scheme
from ..setup import Setup
from ..solver import Coefficients, Solver
from ..teacher import TeacherSet


def learn_bns(
    solver: Solver, setup: Setup, teacher: TeacherSet, seed: int = 0, **settings: Any
) -> Iterator[Epoch]:
    """Learn a Bespoke non-stationary solver (Shaul et al. 2024b); see learn_jointly.

    Full memory of the evaluations and a coefficient of x in each step, learned jointly with the
    times for the best PSNR at x_T itself (r = 0). Starts at a multistep `solver`.
    """
    table = _multistep(solver.coefficients).pad(solver.nfe, states=1)
    settings = {"distance": "psnr", "gamma": 0.0, **settings}
    yield from learn_jointly(Solver(table, solver.grid), setup, teacher, seed, **settings)


def learn_generalised(
    solver: Solver,
    setup: Setup,
    teacher: TeacherSet,
    seed: int = 0,
    scheme: Scheme | None = None,
    **settings: Any,
) -> Iterator[Epoch]:
    """Learn the generalised solver of Oganov et al. 2025 (GAS without its discriminator).

    Corrections to `scheme` on the current times, with full memory of evaluations and states,
    learned jointly with the times, at x_T itself (r = 0). Starts at a multistep `solver`.
    """

    def padded(grid: TimeGrid) -> Coefficients:
        published = solver.coefficients if scheme is None else scheme(grid)
        return _multistep(published).pad(grid.nfe, states=grid.nfe)

    start = Solver(padded(solver.grid), solver.grid)
    yield from learn_jointly(start, setup, teacher, seed, padded, **{"gamma": 0.0, **settings})


def _multistep(table: object) -> Coefficients:
    if not isinstance(table, Coefficients):
        raise UsageError("this rival starts at a multistep solver, not at a single-step one")
    return table
