"""The exact flow, and how far a solver is from it: for models whose calls cost next to nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import UsageError, progress
from ..grid import TimeGrid, time_logsnr
from ..published import exponential_adams
from ..setup import Setup
from ..solver import Coefficients, Solver, trajectory
from ..teacher import initial_noise


@torch.no_grad()
def sample_path(setup: Setup, solver: Solver, seeds: Sequence[int]) -> tuple[TimeGrid, Tensor]:
    """The solver's way from the noises of these seeds: the times of its network calls, and x there.

    x (nfe + 1, len(seeds), *setup.shape) float64, the sample last.
    """
    _, grid = solver.coefficients.as_multistep(solver.grid)
    x = solver.trajectory(setup.denoiser_for(seeds), initial_noise(setup, seeds))
    return grid, torch.stack(list(x))


@torch.no_grad()
def exact_path(
    setup: Setup, seeds: Sequence[int], grid: TimeGrid | None = None, calls: int = 500
) -> tuple[TimeGrid, Tensor]:
    """The exact flow from the noises of these seeds: `grid` (by default a fine one), and x there.

    x (N+1, len(seeds), *setup.shape) float64, by exponential Adams-Bashforth of order 4 with at
    least `calls` network calls, equally many in each step of the grid. On the mixture 500 leave
    an error of 1e-5, and 4000 one of 1e-8.
    """
    grid = grid or time_logsnr(setup.schedule, 200)
    parts = -(-calls // grid.nfe)
    fine = grid.refine(parts)
    table = exponential_adams(fine, min(4, fine.nfe), lower_order_final=False)
    points = trajectory(setup.denoiser_for(seeds), initial_noise(setup, seeds), table, fine)
    points = progress(points, total=fine.nfe + 1, desc="exact flow")
    return grid, torch.stack(list(points)[::parts])


def global_error(
    setup: Setup, solver: Solver, seeds: Sequence[int], x_0: Tensor | None = None
) -> Tensor:
    """|Psi(x_T) - x_0| of the noises of these seeds, (len(seeds),) (Sec. 2.2).

    x_0  the ends of the exact flow, where they are known already
    """
    if x_0 is None:
        x_0 = exact_path(setup, seeds)[1][-1]
    x = solver.sample(setup.denoiser_for(seeds), initial_noise(setup, seeds))
    return (x - x_0).flatten(1).norm(dim=1)


@torch.no_grad()
def local_errors(solver: Solver, denoiser: Denoiser, exact: Tensor) -> Tensor:
    """What each step misses by when all before it were exact: x - exact, (N, B, ...).

    exact (N+1, B, ...) is the exact flow at the times of the steps; the past evaluations that a
    multistep solver uses are made there, too (the local truncation error of Sec. 2.2). Raises
    UsageError unless there is one point for each network call, and the last.
    """
    if len(exact) != solver.nfe + 1:
        raise UsageError(
            f"{solver.nfe} network calls lie between {solver.nfe + 1} points of the exact flow, "
            f"not {len(exact)}: give it at the times of the solver's grid"
        )
    points = solver.trajectory(denoiser, exact[0])
    next(points)
    return torch.stack([points.send(x) for x in exact[:-1]]) - exact[1:]


def locally_optimal(
    grid: TimeGrid, denoiser: Denoiser, exact: Tensor, order: int = 3, prediction: str = "noise"
) -> Coefficients:
    """The multistep table of the smallest local errors: each row a problem of least squares.

    exact (N+1, B, ...) is the exact flow at the grid's times, to which it is fitted: the aim of
    methods that match the teacher's whole trajectory (App. B.3).
    """

    def errors(b: Tensor) -> Tensor:
        solver = Solver(Coefficients(b, None, prediction), grid)
        return local_errors(solver, denoiser, exact).flatten(1).double()

    b = torch.zeros(grid.nfe, order, dtype=torch.float64)
    without = errors(b)  # each weight adds to it in proportion
    units = torch.eye(order, dtype=torch.float64)
    added = torch.stack([errors((b + unit).tril()) - without for unit in units], -1)
    for i in range(grid.nfe):
        k = min(i + 1, order)
        b[i, :k] = torch.linalg.lstsq(added[i, :, :k], -without[i]).solution
    return Coefficients(b, None, prediction)
