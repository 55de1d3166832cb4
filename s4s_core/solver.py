"""A solver is a table of numbers, and one loop reads any table (Eq. 5, Tables 1 and 7, App. C).

In y = x / alpha and s = sigma / alpha the step from point i-1 to point i of Eq. 5 is

    noise form   y <- y + (s_i - s_{i-1}) * sum_j b_ij eps_{i-j}
    data form    y <- q y + (1 - q) * sum_j b_ij D_{i-j},      q = s_i / s_{i-1}

where j = 1 is the newest of the evaluations kept. Published solvers are the tables below;
learning one is `requires_grad` on the table.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .base import UsageError, one_of, write_atomically
from .grid import TimeGrid
from .schedule import schedule_from_dict

PREDICTIONS = ("noise", "data")


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The coefficients phi of a k-step linear multistep solver over N steps.

    b  (N, k) float64: row i weighs the evaluations at points i, i-1, ..., newest first; the
       first rows have no more than i + 1 of them, so b[i, j] = 0 for j > i
    c  (N, k+1) float64 or None: the corrector. Row i repeats step i once its end point has been
       evaluated, that evaluation first; the last row is never used, so N steps cost N calls
    prediction  "noise" (b weighs eps, Table 1) or "data" (b weighs D, Table 7)
    a  (N, m) float64 or None: weights of the m newest states y, corrected ones; None is (1, 0, ..)
    l  (N,) or None: evaluation i is eps - l_i y / s_i instead of eps (noise form only)
    d  (N, 2) or None: added to y in every step, [i, 0] by the predictor, [i, 1] by the corrector

    Every table may go on with the shape of one sample, (N, k, *shape), for weights per entry.
    Raises UsageError for other shapes, numbers that are not finite, or weights on evaluations
    that do not exist.
    """

    b: Tensor
    c: Tensor | None = None
    prediction: str = "noise"
    a: Tensor | None = None
    l: Tensor | None = None  # noqa: E741
    d: Tensor | None = None

    def __post_init__(self):
        one_of("prediction form", self.prediction, PREDICTIONS)
        if self.b.ndim < 2:
            raise UsageError(f"b must have shape (N, k), not {tuple(self.b.shape)}")
        N, k = self.b.shape[:2]
        if not 1 <= k <= N:
            raise UsageError(f"order {k} needs at least {k} steps, not {N}: lower the order to {N}")
        if self.c is not None and self.c.shape[:2] != (N, k + 1):
            raise UsageError(f"c must have shape {(N, k + 1)} here, not {tuple(self.c.shape)}")
        if self.l is not None and self.prediction != "noise":
            raise UsageError("l belongs to the noise form: set prediction to noise")
        for name in ("b", "c", "a", "l", "d"):
            table = getattr(self, name)
            if table is None:
                continue
            if not table.isfinite().all():
                raise UsageError(f"{name} must be finite, not {table.tolist()}")
            if name in ("l", "d"):
                continue
            rows = table.detach().flatten(2).movedim(-1, 0) if table.ndim > 2 else table.detach()
            if rows.triu(2 if name == "c" else 1).any():
                raise UsageError(f"{name} weighs evaluations that do not exist yet")

    @property
    def order(self) -> int:
        """k, the number of evaluations a step may use."""
        return self.b.shape[1]

    def widen(self, order: int) -> "Coefficients":
        """The same solver with room for `order` evaluations, the new weights zero."""
        pad = (*[0, 0] * (self.b.ndim - 2), 0, order - self.order)
        b = torch.nn.functional.pad(self.b, pad)
        c = None if self.c is None else torch.nn.functional.pad(self.c, pad)
        return replace(self, b=b, c=c)


def count_parameters(coefficients: Coefficients, time_dependent: bool = True) -> int:
    """Learnable numbers in the table (Table 1): k (2N + 1 - k) / 2 for a predictor.

    A corrector counts as Table 1 does, as much again. With time_dependent=False (the "Glob."
    rows of Table 9) the rows with full memory share one set: k (k + 1) / 2.
    """
    N, k = coefficients.b.shape
    rows = k * (2 * N + 1 - k) // 2 if time_dependent else k * (k + 1) // 2
    return rows if coefficients.c is None else 2 * rows


# --- Published solvers as tables ------------------------------------------------------------


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


def deis(grid: TimeGrid, order: int = 3, lower_order_final: bool = True) -> Coefficients:
    """DEIS in log rho (Zhang & Chen 2023): exponential Adams-Bashforth in noise form."""
    return exponential_adams(grid, order, "noise", lower_order_final)


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


SOLVERS: dict[str, Callable[..., Coefficients]] = {
    "ddim": ddim,
    "ipndm": ipndm,
    "dpm_solver_pp": dpm_solver_pp,
    "exponential_adams": exponential_adams,
    "deis": deis,
    "unipc": unipc,
    "gaussian": gaussian,
}
# The highest order published, where there is one: a learned solver of a higher order starts
# there, with zeros for the evaluations further back.
HIGHEST_ORDER = {"ddim": 1, "ipndm": 4, "dpm_solver_pp": 3}


# --- The loop -------------------------------------------------------------------------------


def trajectory(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    x_T: Tensor,
    coefficients: Coefficients,
    grid: TimeGrid,
) -> Iterator[Tensor]:
    """Yield x at t_0 = T, t_1, .., t_N (before any correction), each like x_T, (B, ...).

    One call denoiser(x, t) -> x_0 estimate a step, t a float64 scalar tensor. Differentiable in
    x_T, the coefficients and the grid.
    """
    schedule, s = grid.schedule, grid.s
    alpha = schedule.alpha(grid.t)
    # Decoupled times are also those of the conversion from D to eps (Tong et al. 2024).
    alpha_model, sigma_model = schedule.alpha(grid.t_model), schedule.sigma(grid.t_model)
    noise_form = coefficients.prediction == "noise"
    keep = torch.ones_like(s[1:]) if noise_form else s[1:] / s[:-1]
    gain = s.diff() if noise_form else 1 - keep

    def scaled(factor: Tensor, table: Tensor) -> Tensor:
        return factor.view(-1, *[1] * (table.ndim - 1)) * table

    b = scaled(gain, coefficients.b)
    c = None if coefficients.c is None else scaled(gain, coefficients.c)
    a = torch.ones_like(keep)[:, None] if coefficients.a is None else coefficients.a
    a = scaled(keep, a)
    s_model = sigma_model / alpha_model

    def step(i: int, states: list[Tensor], weights: Tensor, corrector: int) -> Tensor:
        y = 0 if coefficients.d is None else coefficients.d[i, corrector].to(x.device)
        for weight, state in zip(a[i], states, strict=False):
            y = y + weight.to(x.device) * state
        for weight, evaluation in zip(weights[i], evaluations, strict=False):
            y = y + weight.to(x.device) * evaluation
        return y

    evaluations: list[Tensor] = []  # newest first, as are the states
    x, y = x_T, x_T / alpha[0]
    states: list[Tensor] = []
    yield x
    for i in range(grid.nfe):
        evaluation = denoiser(x, grid.t_model[i])
        if evaluation.shape != x.shape:
            raise UsageError(
                f"the denoiser returned shape {tuple(evaluation.shape)} for input "
                f"{tuple(x.shape)}; it must return an estimate of x_0 of the same shape"
            )
        if noise_form:
            evaluation = (x - alpha_model[i] * evaluation) / sigma_model[i]
        if coefficients.l is not None:
            evaluation = evaluation - coefficients.l[i].to(x.device) * y / s_model[i]
        evaluations = [evaluation, *evaluations]
        if c is not None and i > 0:
            y = step(i - 1, states, c, 1)
        evaluations = evaluations[: coefficients.order]
        states = [y, *states][: a.shape[1]]
        y = step(i, states, b, 0)
        x = alpha[i + 1] * y
        yield x


def solve(denoiser, x_T: Tensor, coefficients: Coefficients, grid: TimeGrid) -> Tensor:
    """Psi(x_T): the last point of `trajectory`, and as differentiable."""
    return deque(trajectory(denoiser, x_T, coefficients, grid), maxlen=1).pop()


@dataclass(frozen=True, eq=False)
class Solver:
    """Coefficients on a grid: all that sampling needs, and a small JSON file.

    `provenance` says how it was made (dataset, checkpoint, teacher, settings, metrics); solvers
    that differ in nothing else are equal.
    Raises UsageError if the table and the grid have different numbers of steps.
    """

    coefficients: Coefficients
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
        """Network calls a sample: N."""
        return self.grid.nfe

    def trajectory(self, denoiser, x_T: Tensor) -> Iterator[Tensor]:
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
        c = self.coefficients.c
        return {
            "format": FORMAT,
            "version": VERSION,
            "prediction": self.coefficients.prediction,
            "schedule": self.grid.schedule.to_dict(),
            "t": self.grid.t.tolist(),
            "t_model": self.grid.t_model.tolist(),
            "b": self.coefficients.b.tolist(),
            "c": None if c is None else c.tolist(),
            **{n: v.tolist() for n in "ald" if (v := getattr(self.coefficients, n)) is not None},
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, entries: dict) -> "Solver":
        """The inverse of `to_dict`; UsageError for anything that is not such a solver."""
        if not isinstance(entries, dict) or entries.get("format") != FORMAT:
            raise UsageError(f"not a solver: it must be a JSON object with format {FORMAT!r}")
        if entries.get("version") != VERSION:
            raise UsageError(
                f"solver of version {entries.get('version')!r}, but this package reads version "
                f"{VERSION}: save it again with the package that is installed here"
            )
        missing = {"prediction", "schedule", "t", "t_model", "b", "c", "provenance"} - set(entries)
        if missing:
            raise UsageError(f"the solver lacks {', '.join(sorted(missing))}")
        if not isinstance(entries["provenance"], dict):
            raise UsageError(f"provenance must be an object, not {entries['provenance']!r}")
        coefficients = Coefficients(
            _numbers("b", entries["b"]),
            None if entries["c"] is None else _numbers("c", entries["c"]),
            entries["prediction"],
            **{n: _numbers(n, entries[n]) for n in "ald" if n in entries},
        )
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


FORMAT, VERSION = "s4s-solver", 1


def _numbers(name: str, values) -> Tensor:
    """A float64 tensor from nested lists of JSON numbers."""
    try:
        return torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UsageError(f"{name} must be a rectangular list of numbers") from None
