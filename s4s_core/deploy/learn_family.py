"""One learning run for all numbers of network calls, beyond the paper, which learns each alone.

What is learned at step i of N, a weight or a time, is a smooth function of the step's place and of
N:

    theta_N[i] = sum_q (4 / N - 3 / 4)^q (sum_d phi_qd T_d(2 u - 1) + ends),    u = (i + 1/2) / N

with Chebyshev's polynomials T_d, and numbers of their own for the first two and the last two
steps. So theta_N = M_N phi with fixed matrices M_N, and a solver of a number of calls that learning
never saw is there as well. Gauss-Newton needs no more than the normal equations of each N.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, require, require_whole
from ..gauss_newton import SETTINGS, Problem, Run, Student, epochs_of
from ..grid import LearnedGrid
from ..learn import check_fit
from ..params import Params
from ..published import Scheme
from ..setup import Setup
from ..solver import Coefficients, Solver
from ..teacher import TeacherSet
from .family import SolverFamily

DEGREE = 3  # of the polynomials in the place of the step
POWERS = 2  # of 4 / N - 3 / 4, from 0
LEAST = 1e-300  # loss that has a logarithm
PRIOR = 1e-3  # of theta_N = 0, summed over all N: it holds the numbers of calls that are not seen


@dataclass(frozen=True)
class FamilyEpoch:
    """The state after a few steps; epoch 0 is the state before the first.

    train_loss, valid_loss  geometric means, over the numbers of calls seen, of the mean distance,
                            times exp of the prior
    family                  as it stands
    best                    that of the smallest valid_loss so far
    """

    index: int
    train_loss: float
    valid_loss: float
    family: SolverFamily
    best: SolverFamily


def learn_family(
    start: Callable[[int], Solver],
    setup: Setup,
    teacher: TeacherSet,
    seed: int = 0,
    seen: Sequence[int] = (4, 6, 8),
    nfes: Sequence[int] = tuple(range(3, 11)),
    blocks: Sequence[str] = ("phi", "xi"),
    scheme: Scheme | None = None,
    **settings: Any,
) -> Iterator[FamilyEpoch]:
    """Learn solvers for all `nfes` in one run that calls the network for those of `seen` alone.

    start    the solver of N calls to begin at, for each N
    blocks, scheme, settings  as in `learn_gauss_newton`; scheme(grid) for grids of any N

    What is lowered is the geometric mean of the distances of all that are seen, so that none of
    them outweighs the others. Stops, keeps and raises as `learn_gauss_newton` does; UsageError too
    for numbers of calls that are none, and for solvers of other numbers than `start` was asked for.
    """
    for N in (*seen, *nfes):
        require_whole("number of calls", N, 2)
    if not seen:
        raise UsageError("a family learns at one number of network calls at least: give some seen")
    params = setup.params.override_for("learn_family", SETTINGS, settings)
    starts = {}
    for N in sorted({*seen, *nfes}):
        solver = start(N)
        check_fit(solver, setup, teacher, seed)
        if solver.nfe != N:
            raise UsageError(f"start({N}) is a solver of {solver.nfe} calls, not of {N}")
        starts[N] = solver.learned_for(setup.model)
    problem = _Family(starts, setup, teacher, params, seen, nfes, blocks, scheme)
    for index, run, best in epochs_of([Run(problem, teacher, params, seed)]):
        yield FamilyEpoch(index, run.train_loss, run.valid_loss, run.solver, best)


def stretch(solver: Solver, nfe: int, scheme: Scheme) -> Solver:
    """Return a solver of `nfe` calls to begin at, whose corrections are read between this one's.

    scheme  the coefficients on a grid, which those of the multistep `solver` are corrections to

    Linear interpolation over the steps, of the corrections, the logarithms of the steps' lengths in
    lam, and the offsets of the network's times. Raises UsageError for single-step solvers.
    """
    require("solver", solver, Solver)
    require("coefficients to stretch", solver.coefficients, Coefficients)
    require_whole("number of calls", nfe, 2)
    times = LearnedGrid.start_at(solver.grid)
    xi = torch.cat([_read(times.xi[:-1], nfe), times.xi[-1:]])
    grid = replace(times, xi=xi, xi_c=_read(times.xi_c, nfe + 1)).grid()
    old, new = scheme(solver.grid), scheme(grid)
    corrected: dict[str, Any] = {}
    for name in ("b", "a", "c"):
        table = getattr(solver.coefficients, name)
        if table is not None:
            own = getattr(new, name)
            moved = _read(table - getattr(old, name), nfe)[:, : own.shape[1]]
            corrected[name] = own + moved.tril(1 if name == "c" else 0)
    return Solver(replace(new, **corrected), grid)


def _read(values: Tensor, n: int) -> Tensor:
    """(m, ...) -> (n, ...), linearly between rows that are evenly spaced, the ends kept."""
    rows = values.reshape(len(values), -1).T[None]
    read = torch.nn.functional.interpolate(rows, n, mode="linear", align_corners=True)
    return read[0].T.reshape(n, *values.shape[1:])


class _Family:
    """phi (size,), zero at the start, as the solvers of all N; what those that are seen cost.

    The loss is the geometric mean of theirs, times exp of the prior.
    """

    def __init__(
        self,
        starts: dict[int, Solver],
        setup: Setup,
        teacher: TeacherSet,
        params: Params,
        seen: Sequence[int],
        nfes: Sequence[int],
        blocks: Sequence[str],
        scheme: Scheme | None,
    ):
        self.nfes = nfes
        self.students = {N: Student(s, params, blocks, scheme) for N, s in starts.items()}
        self.problems = {N: Problem(self.students[N], setup, teacher, params) for N in seen}
        rows = {N: _rows(student) for N, student in self.students.items()}
        # What no number of calls that is seen has stays at its start.
        names = sorted({name for N in seen for row in rows[N] for name in row})
        self.size = len(names)
        self.maps = {
            N: torch.tensor([[row.get(n, 0.0) for n in names] for row in own], dtype=torch.float64)
            for N, own in rows.items()
        }
        weights = torch.tensor([PRIOR * 10.0 ** name[-1] for name in names], dtype=torch.float64)
        self.prior = sum((PRIOR * M.T @ M for M in self.maps.values()), torch.diag(weights))

    def solver(self, phi: Tensor) -> SolverFamily:
        return SolverFamily(self.students[N].solver(self.maps[N] @ phi) for N in self.nfes)

    def loss(self, phi: Tensor, pairs: Tensor) -> float:
        return self._mean(
            [p.loss(self.maps[N] @ phi, pairs) for N, p in self.problems.items()], phi
        )

    def normal_equations(self, phi: Tensor, pairs: Tensor) -> tuple[float, Tensor, Tensor]:
        losses: list[float] = []
        g, G = self.prior @ phi, self.prior
        for N, problem in self.problems.items():
            M = self.maps[N]
            loss, own_g, own_G = problem.normal_equations(M @ phi, pairs)
            losses.append(loss)
            share = 1 / (len(self.problems) * max(loss, LEAST))
            g, G = g + share * M.T @ own_g, G + share * M.T @ own_G @ M
        loss = self._mean(losses, phi)
        return loss, loss * g, loss * G

    def _mean(self, losses: Sequence[float], phi: Tensor) -> float:
        logs = [math.log(max(loss, LEAST)) for loss in losses]
        return math.exp(sum(logs) / len(logs) + (phi @ self.prior @ phi).item())


def _rows(student: Student) -> list[dict[tuple, float]]:
    """The rows of M_N: by the name of a number of phi, what it is multiplied by there."""
    steps = {name: [tuple(p) for p in places.T.tolist()] for name, places in student.places.items()}
    N = student.start.grid.nfe
    steps |= {"xi": [(i,) for i in range(N)], "xi_c": [(i,) for i in range(1, N)], "first": [(0,)]}
    rows = []
    for name in student.sizes:
        columns: dict[tuple, list[int]] = {}
        for i, *column in steps[name]:
            columns.setdefault(tuple(column), []).append(i)
        for i, *column in steps[name]:
            there = columns[tuple(column)]
            at = _at(i, there[0], there[-1], N) if name != "first" else {"always": 1.0}
            rows.append(
                {
                    (name, *column, place, power): value * (4 / N - 0.75) ** power
                    for place, value in at.items()
                    for power in range(POWERS)
                }
            )
    return rows


def _at(i: int, first: int, last: int, N: int) -> dict[str, float]:
    """The functions of the step's place, at step i of N; its column has the rows first to last."""
    angle = math.acos(2 * (i + 0.5) / N - 1)
    smooth = {f"T{d}": math.cos(d * angle) for d in range(DEGREE + 1)}
    ends = {"first": first, "second": first + 1, "last": last, "last but one": last - 1}
    return smooth | {name: 1.0 for name, row in ends.items() if i == row}
