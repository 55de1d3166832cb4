"""Published solvers as tables: the starts that learning improves on (Tables 1 and 7, App. C)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError, choose, require_whole, shown
from .grid import TimeGrid
from .schedule import EDM, NoiseSchedule, VPLinear
from .solver import PREDICTIONS, Coefficients, SingleStepCoefficients


def _table(rows: list[list], order: int) -> Tensor:
    """Stack rows of unequal length, padded with zeros to (N, order)."""
    padded = [[torch.as_tensor(w, dtype=torch.float64) for w in row] for row in rows]
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([torch.stack(row + [zero] * (order - len(row))) for row in padded])


def step_orders(
    grid: TimeGrid, order: int, highest: int | None, lower_order_final: bool
) -> list[int]:
    """Return the order of each step: 1, 2, .., k, with lower_order_final back to 1 at the end."""
    require_whole("order", order, 1)
    if highest is not None and order > highest:
        raise UsageError(f"this solver is published up to order {highest}, not {order}")
    if order > grid.nfe:
        raise UsageError(
            f"order {order} needs at least {order} steps: raise nfe from {grid.nfe} or lower order"
        )
    last = [grid.nfe - i if lower_order_final else order for i in range(grid.nfe)]
    return [min(i + 1, order, last[i]) for i in range(grid.nfe)]


def ddim(grid: TimeGrid, order: int = 1, prediction: str = "noise") -> Coefficients:
    """Return DDIM, i.e. Euler in s (Song et al. 2021a): the same in both forms, of order 1."""
    return Coefficients(
        _table([[1.0]] * len(step_orders(grid, order, 1, False)), 1), None, prediction
    )


# Adams-Bashforth weights for equal steps, newest evaluation first.
_ADAMS_BASHFORTH = {
    1: [1.0],
    2: [3 / 2, -1 / 2],
    3: [23 / 12, -16 / 12, 5 / 12],
    4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
}


def ipndm(grid: TimeGrid, order: int = 3) -> Coefficients:
    """Return iPNDM of order 1-4 (Zhang & Chen 2023): the weights of equal steps, on any grid."""
    orders = step_orders(grid, order, max(_ADAMS_BASHFORTH), False)
    return Coefficients(_table([_ADAMS_BASHFORTH[p] for p in orders], order))


def _phi(count: int, z: Tensor) -> list[Tensor]:
    """phi_0(z) .. phi_count(z): phi_0 = e^z, phi_{k+1}(z) = (phi_k(z) - 1/k!) / z (App. B.1)."""
    if abs(z) < 1:  # the recurrence cancels here, the series does not
        return [
            sum(
                (z**n * (1.0 / math.factorial(n + k)) for n in range(22)), start=torch.zeros_like(z)
            )
            for k in range(count + 1)
        ]
    values = [z.exp()]
    for k in range(count):
        values.append((values[-1] - 1 / math.factorial(k)) / z)
    return values


def _steps(
    grid: TimeGrid, order: int, highest: int | None, lower_order_final: bool, prediction: str
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (step, order, z), z = +h in noise form and -h in data form: so one set of formulas
    serves both.
    """
    choose("prediction form", prediction, PREDICTIONS)
    orders = step_orders(grid, order, highest, lower_order_final)
    z = grid.lam.diff() * (1 if prediction == "noise" else -1)
    return zip(range(grid.nfe), orders, z, strict=True)


def dpm_solver_pp(
    grid: TimeGrid,
    order: int = 3,
    prediction: str = "data",
    lower_order_final: bool | None = None,
) -> Coefficients:
    """Return multistep DPM-Solver++ of order 1-3 (Lu et al. 2022b); "noise": DPM-Solver (2022a).

    The order falls towards the last step where `lower_order_final` says so. By default that is
    below 10 steps, as in the authors' code; diffusers' limit is 15. As in both, the
    second-difference term of order 3 lacks a factor 2, so that its true order is 2:
    `exponential_adams` is the exact row.
    """
    lower = grid.nfe < 10 if lower_order_final is None else lower_order_final
    h = grid.lam.diff()
    rows: list[list[Any]] = []
    for i, p, z in _steps(grid, order, 3, lower, prediction):
        if p == 1:
            rows.append([1.0])
            continue
        r_0 = h[i - 1] / h[i]
        if p == 2:
            rows.append([1 + 1 / (2 * r_0), -1 / (2 * r_0)])
            continue
        r_1 = h[i - 2] / h[i]
        _, phi_1, phi_2, phi_3 = _phi(3, z)
        first, second = phi_2 / phi_1, phi_3 / phi_1 / (r_0 + r_1)
        u = first * (1 + r_0 / (r_0 + r_1)) + second
        v = -first * r_0 / (r_0 + r_1) - second
        rows.append([1 + u / r_0, -u / r_0 + v / r_1, -v / r_1])
    return Coefficients(_table(rows, order), None, prediction)


def _exponential_row(nodes: list[Tensor], z: Tensor, B: Tensor, weights=None) -> list[Tensor]:
    """The weights of the evaluations at `nodes` (in units of h, the base point 0 left out).

    They integrate exactly, against the exponential kernel, the polynomial through the nodes and
    the base point (Zhao et al. 2023, Eq. 5-9); `weights` replaces the solution of the system.
    """
    m = len(nodes)
    if m and weights is None:
        phi = _phi(m + 1, z)
        rho = torch.stack(nodes)
        vandermonde = torch.stack([rho**power for power in range(m)])
        right = [math.factorial(n) * z * phi[n + 1] / B for n in range(1, m + 1)]
        weights = torch.linalg.solve(vandermonde, torch.stack(right))
    scale = B / torch.expm1(z)
    return [scale * weights[n] / node for n, node in enumerate(nodes)]


def exponential_adams(
    grid: TimeGrid, order: int = 3, prediction: str = "data", lower_order_final: bool = True
) -> Coefficients:
    """Return exponential Adams-Bashforth in lam, exact for polynomials of degree order - 1.

    Any order up to nfe. Order 3 is what DPM-Solver++(3M) approximates (Lu et al. 2022b, App. B).
    """
    lam, rows = grid.lam, []
    for i, p, z in _steps(grid, order, None, lower_order_final, prediction):
        nodes = [(lam[i - n] - lam[i]) / z.abs() for n in range(1, p)]
        old = _exponential_row(nodes, z, z)
        rows.append([1 - sum(old), *old])
    return Coefficients(_table(rows, order), None, prediction)


def _vp_time(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule whose t DEIS interpolates in: itself, or for EDM one with betas.

    That one has EDM's noise levels from 80 to 0.002 at t from 1 to 1e-3 (Zhang & Chen 2023).
    """
    if not isinstance(schedule, EDM):
        return schedule
    first, last = math.log1p(80**2), math.log1p(0.002**2)  # -2 ln alpha = ln(1 + s^2)
    slope = 2 * (first - last / 1e-3) / (1 - 1e-3)
    return VPLinear(beta_0=first - slope / 2, beta_1=first + slope / 2)


@cache
def _gauss_legendre() -> tuple[Tensor, Tensor]:
    """Nodes on [0, 1] and weights; so many that s(t) of EDM's last step is exact to 1e-12."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    return torch.from_numpy(nodes + 1) / 2, torch.from_numpy(weights) / 2


def _interpolating_row(u: Tensor, s: Tensor, s_of_u: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights that average, over a step in s, the polynomial in u through the evaluations.

    u and s belong to the end of the step, its beginning, where the newest evaluation is, and the
    older evaluations.
    """
    x = (u[1:] - u[1]) / (u[0] - u[1])  # 0 where the step begins, 1 where it ends
    nodes, weights = _gauss_legendre()
    inside = s_of_u(u[1] + nodes * (u[0] - u[1]))
    # The integrals of x^k ds by parts, which need no derivative of s(u).
    moments = [s[0] - s[1]]
    moments += [s[0] - k * (weights * nodes ** (k - 1) * inside).sum() for k in range(1, len(x))]
    vandermonde = torch.stack([x**k for k in range(len(x))])
    return torch.linalg.solve(vandermonde, torch.stack(moments)) / (s[0] - s[1])


def deis(
    grid: TimeGrid, order: int = 3, lower_order_final: bool = True, variable: str = "log_rho"
) -> Coefficients:
    """Return DEIS (Zhang & Chen 2023): eps as a polynomial in `variable`, integrated exactly.

    "log_rho" is exponential Adams-Bashforth in noise form; "rho" (rhoAB) is Adams-Bashforth in
    s for uneven steps; "t" (tAB) takes the model's time, for EDM that of a model with betas.
    """
    choose("DEIS variable", variable, ("log_rho", "rho", "t"))
    if variable == "log_rho":
        return exponential_adams(grid, order, "noise", lower_order_final)
    clock, s = _vp_time(grid.schedule), grid.s
    u, s_of_u = (s, lambda u: u) if variable == "rho" else (clock.t_of_s(s), clock.s)
    rows = []
    for i, p in enumerate(step_orders(grid, order, None, lower_order_final)):
        points = [i + 1, *range(i, i - p, -1)]
        rows.append(list(_interpolating_row(u[points], s[points], s_of_u)))
    return Coefficients(_table(rows, order))


def unipc(
    grid: TimeGrid,
    order: int = 3,
    variant: str = "bh2",
    prediction: str = "data",
    corrector: bool = True,
) -> Coefficients:
    """Return UniPC (Zhao et al. 2023): predictor UniP and, with `corrector`, UniC at no extra call.

    `variant` is B(h): "bh1" = h (pixel models), "bh2" = e^h - 1 (latent models). The two differ
    only where the authors set a weight to 1/2 by decree: predictor order 2, corrector order 1.
    """
    choose("UniPC variant", variant, ("bh1", "bh2"))
    lam = grid.lam
    predictor: list[list[Any]] = []
    correctors: list[list[Any]] = []
    half = torch.tensor([0.5], dtype=torch.float64)
    for i, p, z in _steps(grid, order, None, True, prediction):
        B = z if variant == "bh1" else torch.expm1(z)
        nodes = [(lam[i - n] - lam[i]) / z.abs() for n in range(1, p)]
        old = _exponential_row(nodes, z, B, half if p == 2 else None)
        predictor.append([1 - sum(old), *old])
        *old, new = _exponential_row([*nodes, torch.ones_like(z)], z, B, half if p == 1 else None)
        correctors.append([new, 1 - new - sum(old), *old])
    correctors[-1] = [0.0]  # the end point is never evaluated
    c = _table(correctors, order + 1) if corrector else None
    return Coefficients(_table(predictor, order), c, prediction)


def gaussian(
    grid: TimeGrid, order: int = 3, seed: int = 0, prediction: str = "noise"
) -> Coefficients:
    """Draw standard normal weights: the solver-free start of App. H.2.1 (Table 10)."""
    step_orders(grid, order, None, False)
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(grid.nfe, order, generator=generator, dtype=torch.float64)
    return Coefficients(b.tril(), None, prediction)


def dpm_solver(grid: TimeGrid, order: int = 2, prediction: str = "noise") -> SingleStepCoefficients:
    """Return single-step DPM-Solver-2 or -3 (Lu et al. 2022a); "data": DPM-Solver++(2S), (3S).

    `grid` holds the ends of the steps; each takes `order` calls, at 1/2 or 1/3 and 2/3 of h.
    Raises UsageError for another order and another form.
    """
    choose("prediction form", prediction, PREDICTIONS)
    if order not in (2, 3) or isinstance(order, bool):
        raise UsageError(
            "order must be a whole number, 2 or 3 for single-step DPM-Solver, not " + shown(order)
        )
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    c = [0.0, 1 / 2] if order == 2 else [0.0, 1 / 3, 2 / 3]
    a: list[list[list[Tensor]]] = []
    b: list[list[Tensor]] = []
    for z in grid.lam.diff() * (1 if prediction == "noise" else -1):
        if order == 2:
            a.append([[zero, zero], [one, zero]])
            b.append([zero, one])
            continue
        _, phi_1, phi_2 = _phi(2, c[2] * z)
        inner = c[2] / c[1] * phi_2 / phi_1
        _, phi_1, phi_2 = _phi(2, z)
        last = phi_2 / phi_1 / c[2]
        a.append([[zero, zero, zero], [one, zero, zero], [1 - inner, inner, zero]])
        b.append([1 - last, zero, last])
    stages = torch.tensor([c], dtype=torch.float64).repeat(grid.nfe, 1)
    weights = torch.stack([_table(rows, order) for rows in a])
    return SingleStepCoefficients(_table(b, order), weights, stages, prediction)


Table = Coefficients | SingleStepCoefficients
# A solver's coefficients on any grid.
Scheme = Callable[[TimeGrid], Table]


@dataclass(frozen=True)
class PublishedSolver:
    """A published solver: called with a grid and an order, and options, it gives its table.

    make         the function that makes the table
    max_order    the highest order published, if there is one: a learned solver of a higher order
                 starts there, with zeros for the evaluations further back
    single_step  whether a step takes as many calls as the order says, and then forgets them
    """

    make: Callable[..., Table]
    max_order: int | None = None
    single_step: bool = False

    def __call__(self, grid: TimeGrid, order: int, **options: Any) -> Table:
        return self.make(grid, order, **options)

    def highest(self, order: int) -> int:
        """Return the order, or the highest one published if that is lower."""
        return order if self.max_order is None else min(order, self.max_order)


SOLVERS: dict[str, PublishedSolver] = {
    "ddim": PublishedSolver(ddim, max_order=1),
    "ipndm": PublishedSolver(ipndm, max_order=4),
    "dpm_solver_pp": PublishedSolver(dpm_solver_pp, max_order=3),
    "exponential_adams": PublishedSolver(exponential_adams),
    "deis": PublishedSolver(deis),
    "deis_rho": PublishedSolver(partial(deis, variable="rho")),
    "deis_t": PublishedSolver(partial(deis, variable="t")),
    "unipc": PublishedSolver(unipc),
    "dpm_solver": PublishedSolver(dpm_solver, max_order=3, single_step=True),
    "gaussian": PublishedSolver(gaussian),
}


def table_by_name(
    name: str, grid: TimeGrid, order: int, unipc_variant: str = "bh2", seed: int = 0
) -> Table:
    """Return the table of a solver in SOLVERS; `seed` draws the weights of "gaussian".

    Raises UsageError for another name, or an order that the solver or the grid does not have.
    """
    options: dict[str, dict[str, Any]] = {
        "unipc": {"variant": unipc_variant},
        "gaussian": {"seed": seed},
    }
    return choose("solver", name, SOLVERS)(grid, order, **options.get(name, {}))


def count_steps(solver: str, order: int, nfe: int) -> int:
    """Return the steps that a solver in SOLVERS makes of `nfe` network calls: nfe, or nfe / order.

    Raises UsageError where a single-step solver cannot spend exactly nfe calls.
    """
    if solver not in SOLVERS or not SOLVERS[solver].single_step:
        return nfe
    if nfe % order:
        raise UsageError(
            f"{solver} takes {order} calls a step at order {order}, so nfe must be a multiple of "
            f"{order}, not {nfe}"
        )
    return nfe // order
