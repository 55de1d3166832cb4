"""A part of a solver, for samples that do not begin with noise alone."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UsageError
from ..grid import TimeGrid
from ..published import exponential_adams
from ..solver import Coefficients, Solver

# No published multistep solver goes further by default.
WARM_UP_ORDER = 3


def part_of(solver: Solver, begin: int, end: int) -> Solver:
    """Return the solver of the steps between its points `begin` and `end` alone, 0 <= begin < end.

    Steps that weigh evaluations or states of before `begin` are exponential Adams-Bashforth of the
    order that is possible there, at most 3, instead; from where none is missing they are the
    solver's own. Raises UsageError where that cannot be done: for tables with a sample's shape, and
    the l and d of DPM-Solver-v3.
    """
    table, grid = solver.coefficients.as_multistep(solver.grid)
    t = grid.t[begin : end + 1]
    schedule = replace(grid.schedule, T=t[0].item(), t_min=t[-1].item())
    grid = TimeGrid(schedule, t, grid.t_model[begin : end + 1], grid.scale[begin:end])
    tables = {name: getattr(table, name) for name in ("b", "c", "a", "l", "d")}
    rows = {name: w[begin:end] for name, w in tables.items() if w is not None}
    if begin:
        if {"l", "d"} & set(rows) or any(w.ndim > 2 for w in rows.values()):
            raise UsageError(
                f"this solver has tables for each pixel, or l and d, and cannot begin at level "
                f"{begin} of its own: give it all levels from the first"
            )
        rows = _warmed_up(rows, grid, table.prediction)
    # A table has no more columns than steps.
    for name, most in (("b", grid.nfe), ("c", grid.nfe + 1), ("a", grid.nfe)):
        if name in rows:
            rows[name] = rows[name][:, :most]
    return Solver(Coefficients(**rows, prediction=table.prediction), grid, solver.provenance)


def _warmed_up(rows: dict[str, Tensor], grid: TimeGrid, prediction: str) -> dict[str, Tensor]:
    """Rows of a part, with published ones where they weigh what the part does not have."""
    # Row j finds j + 1 evaluations and states, its corrector one evaluation more.
    missing = [w.triu(2 if name == "c" else 1).any(1) for name, w in rows.items()]
    lost = torch.stack(missing).any(0)[:, None]
    k, n = rows["b"].shape[1], grid.nfe
    order = min(k, n, WARM_UP_ORDER)
    published = pad(exponential_adams(grid, order, prediction, False).b, (0, k - order))
    # A corrector that takes the step again, with the same weights, corrects nothing.
    instead = {"b": published, "c": pad(published, (1, 0))}
    if "a" in rows:
        instead["a"] = torch.eye(1, rows["a"].shape[1]).to(rows["a"]).expand(n, -1)
    return {name: torch.where(lost, instead[name], w) for name, w in rows.items()}
