"""The exact flow, and a solver's distance from it, for models whose calls cost next to nothing."""

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
    """Return the times of a solver's network calls, and x at these times, from the seeds' noises.

    x is (nfe + 1, len(seeds), *setup.shape), float64, with the sample last.
    """
    _, grid = solver.coefficients.as_multistep(solver.grid)
    x = solver.trajectory(setup.denoiser_for(seeds), initial_noise(setup, seeds))
    return grid, torch.stack(list(x))


@torch.no_grad()
def exact_path(
    setup: Setup, seeds: Sequence[int], grid: TimeGrid | None = None, calls: int = 500
) -> tuple[TimeGrid, Tensor]:
    """Return `grid` (by default a fine one), and the exact flow x from the seeds' noises on it.

    x is (N+1, len(seeds), *setup.shape), float64. It is computed by exponential Adams-Bashforth of
    order 4 with at least `calls` network calls, equally many in each step of the grid. On the
    mixture 500 calls leave an error of 1e-5, and 4000 calls one of 1e-8.
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
    """Return |Psi(x_T) - x_0|, (len(seeds),), for the noises x_T of these seeds (Sec. 2.2).

    x_0  (len(seeds), *setup.shape) the ends of the exact flow, if they are known already
    """
    if x_0 is None:
        x_0 = exact_path(setup, seeds)[1][-1]
    x = solver.sample(setup.denoiser_for(seeds), initial_noise(setup, seeds))
    return (x - x_0).flatten(1).norm(dim=1)


@torch.no_grad()
def local_errors(solver: Solver, denoiser: Denoiser, exact: Tensor) -> Tensor:
    """Return the error x - exact of each step that begins on the exact flow, (N, B, ...).

    exact (N+1, B, ...) is the exact flow at the times of the steps. The past evaluations that a
    multistep solver uses are also made on it, so this is the local truncation error of Sec. 2.2.
    Raises UsageError unless `exact` has one point for each network call, and one more at the end.
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
    """Return the multistep table with the smallest local errors, by least squares in each row.

    exact (N+1, B, ...) is the exact flow at the grid's times, to which the table is fitted. Methods
    that match the teacher's whole trajectory have the same aim (App. B.3).
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
