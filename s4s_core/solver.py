"""A solver is a table of numbers, and one loop reads any table (Eq. 5, Tables 1 and 7, App. C).

In y = x / alpha and s = sigma / alpha the step from point i-1 to point i of Eq. 5 is

    noise form   y <- y + (s_i - s_{i-1}) * sum_j b_ij eps_{i-j}
    data form    y <- q y + (1 - q) * sum_j b_ij D_{i-j},      q = s_i / s_{i-1}

where j = 1 is the newest of the evaluations kept. Published solvers are the tables below;
learning one is `requires_grad` on the table. A single-step solver is the same kind of table on a
finer grid, so that the loop knows one kind only.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .base import UsageError, one_of, write_atomically
from .grid import TimeGrid
from .schedule import EDM, NoiseSchedule, VPLinear, schedule_from_dict

PREDICTIONS = ("noise", "data")


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The coefficients phi of a k-step linear multistep solver over N steps.

    b  (N, k) float64: row i weighs the evaluations at points i, i-1, ..., newest first; the
       first rows have no more than i + 1 of them, so b[i, j] = 0 for j > i
    c  (N, k+1) float64 or None: the corrector. Row i repeats step i once its end point has been
       evaluated, that evaluation first; the last row is never used, so N steps cost N calls
    prediction  "noise" (b weighs eps, Table 1) or "data" (b weighs D, Table 7)

    Beyond Eq. 5, and absent (None) in most solvers:

    a  (N, m): weighs the states y at points i, i-1, ..., newest first, where Eq. 5 takes the
       newest as it is; with m = 1 a coefficient of x per step (Shaul et al. 2024b), with m = N
       all of the past (Oganov et al. 2025)
    l  (N,): an evaluation is eps - l_i y / s_i instead of eps, in noise form only, and
    d  (N, 2): is added to y, column 0 by the step and 1 by its corrector (Zheng et al. 2023)

    Any table may have the shape of a sample behind these, to treat each pixel on its own.
    Raises UsageError for other shapes, numbers that are not finite, or weights on evaluations or
    states that do not exist.
    """

    b: Tensor
    c: Tensor | None = None
    prediction: str = "noise"
    a: Tensor | None = None
    l: Tensor | None = None  # noqa: E741  the symbol of Zheng et al.
    d: Tensor | None = None

    def __post_init__(self):
        one_of("prediction form", self.prediction, PREDICTIONS)
        if self.b.ndim < 2:
            raise UsageError(f"b must have shape (N, k), not {tuple(self.b.shape)}")
        N, k = self.b.shape[:2]
        if not 1 <= k <= N:
            raise UsageError(f"order {k} needs at least {k} steps, not {N}: lower the order to {N}")
        m = 1 if self.a is None or self.a.ndim < 2 else min(max(self.a.shape[1], 1), N)
        shapes = {"b": (N, k), "c": (N, k + 1), "a": (N, m), "l": (N,), "d": (N, 2)}
        for name, shape in shapes.items():
            table = getattr(self, name)
            if table is None:
                continue
            if table.shape[: len(shape)] != shape:
                raise UsageError(f"{name} must have shape {shape} here, not {tuple(table.shape)}")
            _check_finite(name, table)
            if name in ("l", "d"):
                continue
            future = torch.ones(shape, dtype=torch.bool).triu(2 if name == "c" else 1)
            if table.detach()[future].any():
                what = "states" if name == "a" else "evaluations"
                raise UsageError(f"{name} weighs {what} that do not exist yet")
        if self.l is not None and self.prediction == "data":
            raise UsageError('l needs prediction form "noise", not "data"')

    @property
    def order(self) -> int:
        """k, the number of evaluations a step may use."""
        return self.b.shape[1]

    @property
    def nfe(self) -> int:
        """Network calls a sample: N."""
        return len(self.b)

    def unroll(self, grid: TimeGrid) -> tuple["Coefficients", TimeGrid]:
        """The table and the grid that the loop reads: these."""
        return self, grid

    def widen(self, order: int, states: int = 0) -> "Coefficients":
        """The same solver with room for `order` evaluations and `states` states, the new weights
        zero.
        """

        def wider(table: Tensor, columns: int) -> Tensor:
            extra = columns - table.shape[1]
            return torch.cat([table, table.new_zeros(len(table), extra, *table.shape[2:])], 1)

        a = self.a
        if states and a is None:
            a = torch.ones(self.nfe, 1, dtype=torch.float64)
        return replace(
            self,
            b=wider(self.b, order),
            c=None if self.c is None else wider(self.c, order + 1),
            a=None if a is None else wider(a, max(states, a.shape[1])),
        )


@dataclass(frozen=True, eq=False)
class SingleStepCoefficients:
    """The coefficients phi = {b, a, c} of an explicit k-stage single-step solver over N steps.

    b  (N, k) float64: weighs the step's evaluations, in the order of the stages, at its end
    a  (N, k, k): row j weighs the evaluations before stage j; strictly lower triangular
    c  (N, k): stage j is evaluated at lam_{i-1} + c_j h; 0 = c_1 < c_2 < ... < 1

    with weights that act as b does in Eq. 5, over the part of the step that lies before the
    stage (App. C; Table 1 leaves out the factor alpha that this needs). k calls a step.
    Raises UsageError for other shapes, numbers that are not finite, or stages out of order.
    """

    b: Tensor
    a: Tensor
    c: Tensor
    prediction: str = "noise"

    def __post_init__(self):
        one_of("prediction form", self.prediction, PREDICTIONS)
        if self.b.ndim != 2:
            raise UsageError(f"b must have shape (N, k), not {tuple(self.b.shape)}")
        N, k = self.b.shape
        for name, shape in (("b", (N, k)), ("a", (N, k, k)), ("c", (N, k))):
            table = getattr(self, name)
            if table.shape != shape:
                raise UsageError(f"{name} must have shape {shape} here, not {tuple(table.shape)}")
            _check_finite(name, table)
        if self.a.detach().triu().any():
            raise UsageError("a weighs evaluations that do not exist yet")
        c = self.c.detach()
        if c[:, 0].any() or not (c.diff(dim=1) > 0).all() or not (c < 1).all():
            raise UsageError(f"c must rise from 0 and stay below 1 in each row, not {c.tolist()}")

    @property
    def order(self) -> int:
        """k, the number of stages."""
        return self.b.shape[1]

    @property
    def nfe(self) -> int:
        """Network calls a sample: k N."""
        return self.b.numel()

    def unroll(self, grid: TimeGrid) -> tuple[Coefficients, TimeGrid]:
        """The same solver as a multistep table of k N rows, on the grid of all stages.

        The state of a stage differs from that of the stage before by evaluations of this step
        only, so k - 1 of the past suffice. Differentiable in b, a, c and the grid.
        """
        N, k = self.b.shape
        schedule, h = grid.schedule, grid.lam.diff()[:, None]
        inner = schedule.t_of_lam(grid.lam[:-1, None] + self.c[:, 1:] * h)
        t, t_model = (
            torch.cat([torch.cat([u[:-1, None], inner], 1).flatten(), u[-1:]])
            for u in (grid.t, grid.t_model)
        )
        fine = TimeGrid(schedule, t, t_model)
        s = fine.s.unfold(0, k + 1, k)  # (N, k+1), each row one step with both its ends
        noise_form = self.prediction == "noise"
        # amount[:, j] y's share of the evaluations at stage j, of the whole step for j = k
        reach = s - s[:, :1] if noise_form else 1 - s / s[:, :1]
        amount = reach[:, :, None] * torch.cat([self.a.tril(-1), self.b[:, None]], 1)
        keep = torch.ones_like(s[:, 1:]) if noise_form else s[:, 1:] / s[:, :-1]
        gain = s.diff() if noise_form else 1 - keep
        weights = (amount[:, 1:] - keep[..., None] * amount[:, :-1]) / gain[..., None]
        newest_first = [weights[:, j, : j + 1].flip(1) for j in range(k)]
        rows = [torch.nn.functional.pad(row, (0, k - row.shape[1])) for row in newest_first]
        return Coefficients(torch.stack(rows, 1).flatten(0, 1), None, self.prediction), fine


def count_parameters(
    coefficients: Coefficients | SingleStepCoefficients,
    time_dependent: bool = True,
    as_printed: bool = False,
) -> int:
    """Learnable numbers in the table (Table 1): k (2N + 1 - k) / 2 for a predictor.

    A corrector counts as Table 1 does, as much again; m states as b with k = m. With
    time_dependent=False (the "Glob." rows of Table 9) the rows with full memory share one set:
    k (k + 1) / 2. A single-step solver has (k^2 + 3k - 2) / 2 a step, since an explicit method has
    k (k - 1) / 2 weights a; `as_printed` gives Table 1's k^2 + k - 1.
    """
    if isinstance(coefficients, SingleStepCoefficients):
        (N, k), rows = coefficients.b.shape, len(coefficients.b) if time_dependent else 1
        return rows * (k * k + k - 1 if as_printed else (k * k + 3 * k - 2) // 2)
    N, k = coefficients.b.shape[:2]

    def banded(k: int) -> int:
        return k * (2 * N + 1 - k) // 2 if time_dependent else k * (k + 1) // 2

    correctors = 1 if coefficients.c is None else 2
    states = 0 if coefficients.a is None else banded(coefficients.a.shape[1])
    return correctors * banded(k) * coefficients.b[0, 0].numel() + states


def consistent(coefficients):
    """The same solver with rows of b that sum to 1, each weight moved alike (App. H.2.4)."""
    b = coefficients.b
    exists = torch.ones_like(b)
    if isinstance(coefficients, Coefficients):
        exists = exists.tril()
    excess = ((b * exists).sum(1, keepdim=True) - 1) / exists.sum(1, keepdim=True)
    return replace(coefficients, b=b - excess * exists)


# --- Published solvers as tables ------------------------------------------------------------


def _check_finite(name: str, table: Tensor) -> None:
    wrong = (~table.isfinite()).nonzero().tolist()
    if wrong:
        raise UsageError(f"{name} must be finite, not {table[tuple(wrong[0])]} at {wrong[0]}")


def _table(rows: list[list], order: int) -> Tensor:
    """Stack rows of unequal length, padded with zeros to (N, order)."""
    padded = [[torch.as_tensor(w, dtype=torch.float64) for w in row] for row in rows]
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([torch.stack(row + [zero] * (order - len(row))) for row in padded])


def _orders(grid: TimeGrid, order: int, highest: int | None, lower_order_final: bool) -> list[int]:
    """The order of each step: 1, 2, .., k, and with lower_order_final back down to 1 at the end."""
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise UsageError(f"order must be a whole number of at least 1, not {order!r}")
    if highest is not None and order > highest:
        raise UsageError(f"this solver is published up to order {highest}, not {order}")
    if order > grid.nfe:
        raise UsageError(
            f"order {order} needs at least {order} steps: raise nfe from {grid.nfe} or lower order"
        )
    last = [grid.nfe - i if lower_order_final else order for i in range(grid.nfe)]
    return [min(i + 1, order, last[i]) for i in range(grid.nfe)]


def ddim(grid: TimeGrid, order: int = 1, prediction: str = "noise") -> Coefficients:
    """DDIM, i.e. Euler in s (Song et al. 2021a); the same in both forms. Order 1 only."""
    return Coefficients(_table([[1.0]] * len(_orders(grid, order, 1, False)), 1), None, prediction)


# Adams-Bashforth weights for equal steps, newest evaluation first.
_ADAMS_BASHFORTH = {
    1: [1.0],
    2: [3 / 2, -1 / 2],
    3: [23 / 12, -16 / 12, 5 / 12],
    4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
}


def ipndm(grid: TimeGrid, order: int = 3) -> Coefficients:
    """iPNDM of order 1-4 (Zhang & Chen 2023): constant weights, as if all steps were equal."""
    orders = _orders(grid, order, max(_ADAMS_BASHFORTH), False)
    return Coefficients(_table([_ADAMS_BASHFORTH[p] for p in orders], order))


def _phi(count: int, z: Tensor) -> list[Tensor]:
    """phi_0(z) .. phi_count(z): phi_0 = e^z, phi_{k+1}(z) = (phi_k(z) - 1/k!) / z (App. B.1)."""
    if abs(z) < 1:  # the recurrence cancels here, the series does not
        return [
            sum(z**n * (1.0 / math.factorial(n + k)) for n in range(22)) for k in range(count + 1)
        ]
    values = [z.exp()]
    for k in range(count):
        values.append((values[-1] - 1 / math.factorial(k)) / z)
    return values


def _steps(
    grid: TimeGrid, order: int, highest: int | None, lower_order_final: bool, prediction: str
) -> Iterator[tuple[int, int, Tensor]]:
    """Each step's index, order and z: +h in noise form, -h in data form, which turns one set of
    formulas into both.
    """
    one_of("prediction form", prediction, PREDICTIONS)
    orders = _orders(grid, order, highest, lower_order_final)
    z = grid.lam.diff() * (1 if prediction == "noise" else -1)
    return zip(range(grid.nfe), orders, z, strict=True)


def dpm_solver_pp(grid: TimeGrid, order: int = 3, prediction: str = "data") -> Coefficients:
    """Multistep DPM-Solver++ of order 1-3 (Lu et al. 2022b); "noise" gives DPM-Solver (2022a).

    As every public implementation ships it: the order falls towards the last step, and the
    second-difference term of order 3 lacks a factor 2, so that its true order is 2.
    `exponential_adams` is the exact row.
    """
    h, rows = grid.lam.diff(), []
    for i, p, z in _steps(grid, order, 3, True, prediction):
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
    """Weights of the evaluations at `nodes` (in units of h, the base point 0 left out).

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
    """Exponential Adams-Bashforth in lam, exact for polynomials of degree order - 1.

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
    """Weights whose sum is the mean over a step, in s, of the polynomial in u through evaluations.

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
    """DEIS (Zhang & Chen 2023): eps as a polynomial in `variable`, integrated exactly.

    "log_rho" is exponential Adams-Bashforth in noise form; "rho" (rhoAB) is Adams-Bashforth in
    s for uneven steps; "t" (tAB) takes the model's time, for EDM that of a model with betas.
    """
    one_of("DEIS variable", variable, ("log_rho", "rho", "t"))
    if variable == "log_rho":
        return exponential_adams(grid, order, "noise", lower_order_final)
    clock, s = _vp_time(grid.schedule), grid.s
    u, s_of_u = (s, lambda u: u) if variable == "rho" else (clock.t_of_s(s), clock.s)
    rows = []
    for i, p in enumerate(_orders(grid, order, None, lower_order_final)):
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
    """UniPC (Zhao et al. 2023): predictor UniP and, with `corrector`, UniC at no extra call.

    `variant` is B(h): "bh1" = h (pixel models), "bh2" = e^h - 1 (latent models). The two differ
    only where the authors set a weight to 1/2 by decree: predictor order 2, corrector order 1.
    """
    one_of("UniPC variant", variant, ("bh1", "bh2"))
    lam, predictor, correctors = grid.lam, [], []
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
    """Standard normal weights: the solver-free start of App. H.2.1 (Table 10)."""
    _orders(grid, order, None, False)
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(grid.nfe, order, generator=generator, dtype=torch.float64)
    return Coefficients(b.tril(), None, prediction)


def dpm_solver(grid: TimeGrid, order: int = 2, prediction: str = "noise") -> SingleStepCoefficients:
    """Single-step DPM-Solver-2 and -3 (Lu et al. 2022a); "data" gives DPM-Solver++(2S), (3S).

    `grid` holds the ends of the steps; each takes `order` calls, at 1/2 or 1/3 and 2/3 of h.
    """
    one_of("prediction form", prediction, PREDICTIONS)
    if order not in (2, 3) or isinstance(order, bool):
        raise UsageError(
            f"order must be a whole number, 2 or 3 for single-step DPM-Solver, not {order!r}"
        )
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    a, b, c = [], [], [0.0, 1 / 2] if order == 2 else [0.0, 1 / 3, 2 / 3]
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
    c = torch.tensor([c], dtype=torch.float64).repeat(grid.nfe, 1)
    a = torch.stack([_table(rows, order) for rows in a])
    return SingleStepCoefficients(_table(b, order), a, c, prediction)


SOLVERS: dict[str, Callable[..., Coefficients | SingleStepCoefficients]] = {
    "ddim": ddim,
    "ipndm": ipndm,
    "dpm_solver_pp": dpm_solver_pp,
    "exponential_adams": exponential_adams,
    "deis": deis,
    "deis_rho": partial(deis, variable="rho"),
    "deis_t": partial(deis, variable="t"),
    "unipc": unipc,
    "dpm_solver": dpm_solver,
    "gaussian": gaussian,
}
# The highest order published, where there is one: a learned solver of a higher order starts
# there, with zeros for the evaluations further back.
HIGHEST_ORDER = {"ddim": 1, "ipndm": 4, "dpm_solver_pp": 3}
SINGLE_STEP = ("dpm_solver",)


def count_steps(solver: str, order: int, nfe: int) -> int:
    """Steps that a solver in SOLVERS makes of `nfe` network calls: nfe, or nfe / order.

    Raises UsageError where a single-step solver cannot spend exactly nfe calls.
    """
    if solver not in SINGLE_STEP:
        return nfe
    if nfe % order:
        raise UsageError(
            f"{solver} takes {order} calls a step at order {order}, so nfe must be a multiple of "
            f"{order}, not {nfe}"
        )
    return nfe // order


# --- The loop -------------------------------------------------------------------------------


def trajectory(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    x_T: Tensor,
    coefficients: Coefficients | SingleStepCoefficients,
    grid: TimeGrid,
) -> Generator[Tensor, Tensor | None, None]:
    """Yield x at t_0 = T, t_1, .., t_N (before any correction), each like x_T, (B, ...).

    One call denoiser(x, t) -> x_0 estimate a step, t a float64 scalar tensor. Differentiable in
    x_T, the coefficients and the grid. Where `send` takes the place of `next`, the solver goes on
    from the point that it is sent instead of its own.
    """
    coefficients, grid = coefficients.unroll(grid)
    schedule, s = grid.schedule, grid.s
    alpha = schedule.alpha(grid.t)
    # Decoupled times are also those of the conversion from D to eps (Tong et al. 2024).
    alpha_model, sigma_model = schedule.alpha(grid.t_model), schedule.sigma(grid.t_model)
    noise_form = coefficients.prediction == "noise"
    keep = torch.ones_like(s[1:]) if noise_form else s[1:] / s[:-1]
    gain = s.diff() if noise_form else 1 - keep

    def scaled(factor: Tensor, table: Tensor) -> Tensor:
        return (factor.view(-1, *[1] * (table.ndim - 1)) * table).to(x_T)

    a = keep[:, None] if coefficients.a is None else scaled(keep, coefficients.a)
    b = scaled(gain, coefficients.b)
    c = None if coefficients.c is None else scaled(gain, coefficients.c)
    d = None if coefficients.d is None else coefficients.d.to(x_T)
    of_x, of_D = 1 / sigma_model[:-1], -(alpha_model / sigma_model)[:-1]
    if coefficients.l is not None:
        of_x = scaled(of_x, 1 - coefficients.l)

    def step(i: int, weights: Tensor, correcting: int) -> Tensor:
        terms = [*zip(a[i], states, strict=False), *zip(weights[i], evaluations, strict=False)]
        y = terms[0][0] * terms[0][1]
        for weight, term in terms[1:]:
            y = y + weight * term
        return y if d is None else y + d[i, correcting]

    states: list[Tensor] = []  # newest first, as are the evaluations
    evaluations: list[Tensor] = []
    x, y = x_T, x_T / alpha[0]
    sent = yield x
    for i in range(grid.nfe):
        if sent is not None:
            x, y = sent, sent / alpha[i]
        evaluation = denoiser(x, grid.t_model[i])
        if evaluation.shape != x.shape:
            raise UsageError(
                f"the denoiser returned shape {tuple(evaluation.shape)} for input "
                f"{tuple(x.shape)}; it must return an estimate of x_0 of the same shape"
            )
        if noise_form:
            evaluation = of_x[i] * x + of_D[i] * evaluation
        evaluations = [evaluation, *evaluations]
        if i > 0 and c is not None:
            y = step(i - 1, c, 1)
        states = [y, *states][: a.shape[1]]
        evaluations = evaluations[: coefficients.order]
        y = step(i, b, 0)
        x = alpha[i + 1] * y
        sent = yield x


def solve(denoiser, x_T: Tensor, coefficients: Coefficients, grid: TimeGrid) -> Tensor:
    """Psi(x_T): the last point of `trajectory`, and as differentiable."""
    return deque(trajectory(denoiser, x_T, coefficients, grid), maxlen=1).pop()


@torch.no_grad()
def local_errors(solver: "Solver", denoiser, exact: Tensor) -> Tensor:
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
    grid: TimeGrid, denoiser, exact: Tensor, order: int = 3, prediction: str = "noise"
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


@dataclass(frozen=True, eq=False)
class Solver:
    """Coefficients on a grid: all that sampling needs, and a small JSON file.

    `provenance` says how it was made (dataset, checkpoint, teacher, settings, metrics); solvers
    that differ in nothing else are equal.
    Raises UsageError if the table and the grid have different numbers of steps.
    """

    coefficients: Coefficients | SingleStepCoefficients
    grid: TimeGrid
    provenance: dict = field(default_factory=dict)

    def __post_init__(self):
        rows, steps = len(self.coefficients.b), self.grid.nfe
        if rows != steps:
            raise UsageError(f"the table has {rows} rows but the grid has {steps} steps")

    def __eq__(self, other) -> bool:
        if not isinstance(other, Solver):
            return NotImplemented
        return self.to_dict() | {"provenance": 0} == other.to_dict() | {"provenance": 0}

    @property
    def nfe(self) -> int:
        """Network calls a sample: N, or k N for a single-step solver of k stages."""
        return self.coefficients.nfe

    def trajectory(self, denoiser, x_T: Tensor) -> Generator[Tensor, Tensor | None, None]:
        """Yield x at t_0 .. t_N; see the function of the same name."""
        schedule = getattr(denoiser, "schedule", self.grid.schedule)
        if schedule != self.grid.schedule:
            raise UsageError(
                f"this solver was made for {self.grid.schedule}, but the denoiser has {schedule}: "
                "learn or build one on the denoiser's own schedule"
            )
        return trajectory(denoiser, x_T, self.coefficients, self.grid)

    @torch.no_grad()
    def sample(self, denoiser, x_T: Tensor) -> Tensor:
        """x_0 of shape and dtype of x_T, (B, ...), from noise x_T of standard deviation sigma(T).

        Exactly `nfe` calls of denoiser(x, t). Raises UsageError if the denoiser has another
        noise schedule, returns another shape, or if the sample is not finite.
        """
        x = deque(self.trajectory(denoiser, x_T), maxlen=1).pop()
        if not x.isfinite().all():
            points = enumerate(self.trajectory(denoiser, x_T))
            step = next((i for i, x in points if not x.isfinite().all()), self.nfe)
            cause = "x_T itself is" if step == 0 else f"at step {step} of {self.nfe} x became"
            raise UsageError(
                f"{cause} NaN or infinite; check that denoiser(x, t) is finite there "
                "and that the coefficients are moderate"
            )
        return x

    def to_dict(self) -> dict:
        """The file's contents as plain numbers, lists and strings."""
        kind = next(k for k, made in KINDS.items() if type(self.coefficients) is made)
        tables = {n: getattr(self.coefficients, n) for n in _tables(kind)}
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": kind,
            "prediction": self.coefficients.prediction,
            "schedule": self.grid.schedule.to_dict(),
            "t": self.grid.t.tolist(),
            "t_model": self.grid.t_model.tolist(),
            **{n: None if table is None else table.tolist() for n, table in tables.items()},
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, entries: dict) -> "Solver":
        """The inverse of `to_dict`; UsageError for anything that is not such a solver."""
        if not isinstance(entries, dict) or entries.get("format") != FORMAT:
            raise UsageError(f"not a solver: it must be a JSON object with format {FORMAT!r}")
        if entries.get("version") == 1:
            entries = {"kind": "multistep", "a": None, "l": None, "d": None, **entries}
        elif entries.get("version") != VERSION:
            raise UsageError(
                f"solver of version {entries.get('version')!r}, but this package reads versions "
                f"1 and {VERSION}: save it again with the package that is installed here"
            )
        kind = entries.get("kind")
        one_of("kind of solver", kind, KINDS)
        needed = {"prediction", "schedule", "t", "t_model", "provenance", *_tables(kind)}
        missing = needed - set(entries)
        if missing:
            raise UsageError(f"the solver lacks {', '.join(sorted(missing))}")
        if not isinstance(entries["provenance"], dict):
            raise UsageError(f"provenance must be an object, not {entries['provenance']!r}")
        optional = {f.name for f in fields(KINDS[kind]) if f.default is None}
        tables = {
            n: None if n in optional and entries[n] is None else _numbers(n, entries[n])
            for n in _tables(kind)
        }
        coefficients = KINDS[kind](**tables, prediction=entries["prediction"])
        grid = TimeGrid(
            schedule_from_dict(entries["schedule"]),
            _numbers("t", entries["t"]),
            _numbers("t_model", entries["t_model"]),
        )
        return cls(coefficients, grid, entries["provenance"])

    def save(self, path) -> None:
        """Write the solver as a readable JSON file, whole or not at all."""
        write_atomically(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path) -> "Solver":
        """Read a file that `save` wrote; samples with it are bit-identical.

        Raises UsageError, naming the file, if it is missing, truncated, of another version, or
        does not hold a valid solver. The file is data: nothing in it is executed.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text("utf-8")))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
            raise UsageError(f"{path} is not a readable solver file ({error})") from None


FORMAT, VERSION = "s4s-solver", 2
KINDS = {"multistep": Coefficients, "single_step": SingleStepCoefficients}


def _tables(kind: str) -> list[str]:
    return [f.name for f in fields(KINDS[kind]) if f.name != "prediction"]


def _numbers(name: str, values) -> Tensor:
    """A float64 tensor from nested lists of JSON numbers."""
    try:
        return torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UsageError(f"{name} must be a rectangular list of numbers") from None
