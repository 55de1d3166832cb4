"""A solver is a table of numbers, and one loop reads any table (Eq. 5, Tables 1 and 7, App. C).

In y = x / alpha and s = sigma / alpha the step from point i-1 to point i of Eq. 5 is

    noise form   y <- y + (s_i - s_{i-1}) * sum_j b_ij eps_{i-j}
    data form    y <- q y + (1 - q) * sum_j b_ij D_{i-j},      q = s_i / s_{i-1}

where j = 1 is the newest of the evaluations kept. Published solvers are the tables below;
learning one is `requires_grad` on the table. A single-step solver is the same kind of table on a
finer grid, so that the loop knows one kind only.
"""

import hashlib
import json
import math
import warnings
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import (
    LARGEST_JSON,
    UsageError,
    choose,
    read_json,
    require,
    shown,
    write_atomically,
)
from .grid import TimeGrid, as_numbers
from .schedule import NoiseSchedule, schedule_from_dict

PREDICTIONS = ("noise", "data")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that samples may have
AnyTable = TypeVar("AnyTable", bound="Coefficients | SingleStepCoefficients")


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The coefficients phi of a k-step linear multistep solver over N steps.

    b  (N, k) float64: row i weighs the evaluations at points i, i-1, ..., newest first; the
       first rows have no more than i + 1 of them, so b[i, j] = 0 for j > i
    c  (N, k+1) float64 or None: the corrector. Row i repeats step i once its end point has been
       evaluated, that evaluation first; the last row is never used, so N steps cost N calls
    prediction  "noise" (b weighs eps, Table 1) or "data" (b weighs D, Table 7)

    iPNDM(3M) in four calls, and the place of a corrector beside it; "." is always zero:

        step   b  newest  -1      -2      c  at the end  newest  -1    -2
        1         1       .       .          c_1,0       c_1,1   .     .      repeats step 1
        2         3/2     -1/2    .          c_2,0       c_2,1   c_2,2  .     repeats step 2
        3         23/12   -16/12  5/12       c_3,0       c_3,1   c_3,2  c_3,3
        4         23/12   -16/12  5/12       never used: the end point is not evaluated

    Beyond Eq. 5, and absent (None) in most solvers:

    a  (N, m): weighs the states y at points i, i-1, ..., newest first, where Eq. 5 takes the
       newest as it is; with m = 1 a coefficient of x per step (Shaul et al. 2024b), with m = N
       all of the past (Oganov et al. 2025)
    l  (N,): an evaluation is eps - l_i y / s_i instead of eps, in noise form only, and
    d  (N, 2): is added to y, column 0 by the step and 1 by its corrector (Zheng et al. 2023)

    l and d serve one rival, DPM-Solver-v3. They stay in the table since the loop cannot take them
    from outside: d is added after the sum, and l needs the state y of the evaluation.

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
        choose("prediction form", self.prediction, PREDICTIONS)
        _convert(self, "multistep")
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
        """The number of evaluations a step may use, k."""
        return self.b.shape[1]

    @property
    def nfe(self) -> int:
        """Network calls a sample: N."""
        return len(self.b)

    def as_multistep(self, grid: TimeGrid) -> tuple["Coefficients", TimeGrid]:
        """Return (self, grid): a multistep table is already in the form that `trajectory` reads."""
        return self, grid

    def pad(self, order: int, states: int = 0) -> "Coefficients":
        """Return the same solver with room for `order` evaluations and `states` states.

        The new weights are zero.
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
        choose("prediction form", self.prediction, PREDICTIONS)
        _convert(self, "single_step")
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
            raise UsageError(
                f"c must rise from 0 and stay below 1 in each row, not {shown(c.tolist())}"
            )

    @property
    def order(self) -> int:
        """The number of stages, k."""
        return self.b.shape[1]

    @property
    def nfe(self) -> int:
        """Network calls a sample: k N."""
        return self.b.numel()

    def as_multistep(self, grid: TimeGrid) -> tuple[Coefficients, TimeGrid]:
        """Return the same solver as a multistep table of k N rows, on the grid of all stages.

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
        # A scale belongs to the first call of its step; the other stages have none.
        scale = torch.cat([grid.scale[:, None], torch.ones_like(inner)], 1).flatten()
        fine = TimeGrid(schedule, t, t_model, scale)
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
    """Count the learnable numbers in the table (Table 1): k (2N + 1 - k) / 2 for a predictor.

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


def consistent(coefficients: AnyTable) -> AnyTable:
    """Shift every weight of a row of b by the same amount so that the row sums to 1 (H.2.4)."""
    b = coefficients.b
    exists = torch.ones_like(b)
    if isinstance(coefficients, Coefficients):
        exists = exists.tril()
    excess = ((b * exists).sum(1, keepdim=True) - 1) / exists.sum(1, keepdim=True)
    return replace(coefficients, b=b - excess * exists)


def _convert(coefficients: Coefficients | SingleStepCoefficients, kind: str) -> None:
    """Make float64 tensors of all tables that are there."""
    optional = {f.name for f in fields(KINDS[kind]) if f.default is None}
    for name in _tables(kind):
        if (given := getattr(coefficients, name)) is not None or name not in optional:
            object.__setattr__(coefficients, name, as_numbers(name, given))


def _check_finite(name: str, table: Tensor) -> None:
    wrong = (~table.isfinite()).nonzero().tolist()
    if wrong:
        raise UsageError(f"{name} must be finite, not {table[tuple(wrong[0])]} at {wrong[0]}")


# --- The loop -------------------------------------------------------------------------------


class LoopTable(NamedTuple):
    """All that the loop multiplies with, the grid worked into the table of a solver.

    a        (N, m), b (N, k), c (N, k+1) or None, d (N, 2) or None: weights of the states y and of
             the evaluations, whose lengths of step and decay are in them
    l        (N,) or None, as in `Coefficients`
    t_model  (N,) times passed to the network, whose input is scale_i x; scale (N,)
    alpha    (N+1,) at the times of the steps
    noise_form  whether an evaluation is eps or D
    """

    schedule: NoiseSchedule
    noise_form: bool
    a: Tensor
    b: Tensor
    c: Tensor | None
    d: Tensor | None
    l: Tensor | None  # noqa: E741
    t_model: Tensor
    scale: Tensor
    alpha: Tensor


def loop_table(coefficients: Coefficients | SingleStepCoefficients, grid: TimeGrid) -> LoopTable:
    """Return what the loop reads; differentiable in the coefficients and the grid."""
    coefficients, grid = coefficients.as_multistep(grid)
    s, noise_form = grid.s, coefficients.prediction == "noise"
    keep = torch.ones_like(s[1:]) if noise_form else s[1:] / s[:-1]
    gain = s.diff() if noise_form else 1 - keep

    def scaled(factor: Tensor, table: Tensor) -> Tensor:
        return factor.view(-1, *[1] * (table.ndim - 1)) * table

    return LoopTable(
        grid.schedule,
        noise_form,
        keep[:, None] if coefficients.a is None else scaled(keep, coefficients.a),
        scaled(gain, coefficients.b),
        None if coefficients.c is None else scaled(gain, coefficients.c),
        coefficients.d,
        coefficients.l,
        grid.t_model[:-1],
        grid.scale,
        grid.schedule.alpha(grid.t),
    )


def trajectory(
    denoiser: Denoiser,
    x_T: Tensor,
    coefficients: Coefficients | SingleStepCoefficients,
    grid: TimeGrid,
) -> Generator[Tensor, Tensor | None, None]:
    """Yield x at t_0 = T, t_1, .., t_N (before any correction), each like x_T, (B, ...).

    One call denoiser(x, t) -> x_0 estimate a step, t a float64 scalar tensor. Differentiable in
    x_T, the coefficients and the grid. Where `send` takes the place of `next`, the solver goes on
    from the point that it is sent instead of its own: so each step can restart from the exact flow.
    """
    return run_loop(denoiser, x_T, loop_table(coefficients, grid))


def run_loop(
    denoiser: Denoiser, x_T: Tensor, table: LoopTable
) -> Generator[Tensor, Tensor | None, None]:
    """Yield what `trajectory` yields, from the numbers that it reads; differentiable in them."""
    schedule, noise_form, a, b, c, d, l, t_model, scale, alpha = table  # noqa: E741
    a, b = a.to(x_T), b.to(x_T)
    c, d = (None if w is None else w.to(x_T) for w in (c, d))
    # Decoupled times are also those of the conversion from D to eps (Tong et al. 2024).
    sigma_model = schedule.sigma(t_model)
    x_to_eps, D_to_eps = 1 / sigma_model, -schedule.alpha(t_model) / sigma_model
    if l is not None:
        x_to_eps = (x_to_eps.view(-1, *[1] * (l.ndim - 1)) * (1 - l)).to(x_T)

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
    for i in range(len(b)):
        if sent is not None:
            x, y = sent, sent / alpha[i]
        seen = scale[i] * x
        evaluation = denoiser(seen, t_model[i])
        check_estimate(evaluation, x)
        if noise_form:
            evaluation = x_to_eps[i] * seen + D_to_eps[i] * evaluation
        evaluations = [evaluation, *evaluations]
        if i > 0 and c is not None:
            y = step(i - 1, c, 1)
        states = [y, *states][: a.shape[1]]
        evaluations = evaluations[: b.shape[1]]
        y = step(i, b, 0)
        x = alpha[i + 1] * y
        sent = yield x


def check_estimate(D: Any, x: Tensor) -> None:
    """Raise UsageError unless D can be an estimate of x_0 for the input x."""
    shape = getattr(D, "shape", None)
    if not isinstance(D, Tensor) or shape != x.shape:
        found = type(D).__name__ if shape is None else f"shape {tuple(shape)}"
    elif not D.is_floating_point() or D.device != x.device:
        found = f"{D.dtype} on {D.device}"
    else:
        return
    raise UsageError(
        f"the denoiser returned {found} for input {tuple(x.shape)}; it must return an "
        "estimate of x_0, a tensor of floats of the same shape and on the same device"
    )


def solve(
    denoiser: Denoiser,
    x_T: Tensor,
    coefficients: Coefficients | SingleStepCoefficients,
    grid: TimeGrid,
) -> Tensor:
    """Return Psi(x_T): the last point of `trajectory`, and as differentiable."""
    return deque(trajectory(denoiser, x_T, coefficients, grid), maxlen=1).pop()


@dataclass(frozen=True, eq=False)
class Solver:
    """Coefficients on a grid: all that sampling needs, and a small JSON file.

    `provenance` says how it was made (dataset, checkpoint, teacher, settings, metrics); solvers
    that differ in nothing else are equal.
    Raises UsageError if the table and the grid have different numbers of steps.
    """

    coefficients: Coefficients | SingleStepCoefficients
    grid: TimeGrid
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        require("coefficients", self.coefficients, Coefficients, SingleStepCoefficients)
        require("grid", self.grid, TimeGrid)
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

    def learned_for(self, model: dict[str, Any]) -> "Solver":
        """Return the same solver, whose provenance says for which model it was learned."""
        return replace(self, provenance=self.provenance | {"model": model})

    def trajectory(self, denoiser: Denoiser, x_T: Tensor) -> Generator[Tensor, Tensor | None, None]:
        """Yield x at t_0 .. t_N; see the function of the same name."""
        if not callable(denoiser):
            raise UsageError(f"the denoiser must be a function D(x, t), not {shown(denoiser)}")
        schedule = getattr(denoiser, "schedule", self.grid.schedule)
        if schedule != self.grid.schedule:
            raise UsageError(
                f"this solver was made for {self.grid.schedule}, but the denoiser has {schedule}: "
                "learn or build one on the denoiser's own schedule"
            )
        return trajectory(denoiser, x_T, self.coefficients, self.grid)

    @torch.no_grad()
    def sample(self, denoiser: Denoiser, x_T: Tensor) -> Tensor:
        """Return x_0, like x_T (B, ...), from noise x_T of standard deviation sigma(T).

        Exactly `nfe` calls of denoiser(x, t). Raises UsageError if the denoiser has another
        noise schedule, returns another shape, if x_T has the spread of another noise, or if the
        sample is not finite. Warns if the solver was learned for another model or guidance.
        """
        x_T = x_T if isinstance(x_T, Tensor) else as_numbers("x_T", x_T)
        check_noise(x_T, self.grid.schedule)
        learned_for, model = self.provenance.get("model"), getattr(denoiser, "model", None)
        if isinstance(learned_for, dict) and model and learned_for != model:
            message = f"this solver was learned for {_told(learned_for)}, not for {_told(model)}"
            warnings.warn(message + ": a published one may draw better there", stacklevel=3)
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

    def to_dict(self) -> dict[str, Any]:
        """Return the file's contents as plain numbers, lists and strings."""
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
            "scale": self.grid.scale.tolist(),
            **{n: None if table is None else table.tolist() for n, table in tables.items()},
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "Solver":
        """Return the solver that `to_dict` wrote; UsageError for anything that is no solver."""
        if not isinstance(entries, dict) or entries.get("format") != FORMAT:
            raise UsageError(f"not a solver: it must be a JSON object with format {FORMAT!r}")
        version = entries.get("version")
        if type(version) is not int or version not in NEWER:
            raise UsageError(
                f"solver of version {shown(version)}, but this package reads versions 1 to "
                f"{VERSION}: save it again with the package that is installed here"
            )
        entries = NEWER[version] | entries
        kind: Any = entries.get("kind")
        made = choose("kind of solver", kind, KINDS)
        needed = {"format", "version", "kind", "prediction", "schedule", "t", "t_model", "scale"}
        needed |= {"provenance", *_tables(kind)}
        if missing := needed - set(entries):
            raise UsageError(f"the solver lacks {', '.join(sorted(missing))}")
        for name in entries:
            choose("entry of a solver", name, needed)
        _check_provenance(entries["provenance"])
        tables = {name: entries[name] for name in _tables(kind)}
        schedule = schedule_from_dict(entries["schedule"])
        grid = TimeGrid(schedule, entries["t"], entries["t_model"], entries["scale"])
        _check_calls(grid)
        coefficients = made(**tables, prediction=entries["prediction"])
        return cls(coefficients, grid, entries["provenance"])

    def save(self, path: str | Path) -> None:
        """Write the solver as a readable JSON file, whole or not at all.

        Raises UsageError where it cannot be written, or if `load` would not read it.
        """
        _check_provenance(self.provenance)
        content = (json.dumps(self.to_dict(), indent=1) + "\n").encode()
        if len(content) > LARGEST_JSON:
            raise UsageError(
                f"{path}: a solver file of more than {LARGEST_JSON:,} bytes is not read"
            )
        write_atomically(path, content)

    @classmethod
    def load(cls, path: str | Path) -> "Solver":
        """Read a file that `save` wrote; samples with it are bit-identical.

        Raises UsageError, naming the file, if it is missing, truncated, of another version, or
        does not hold a valid solver. The file is data: nothing in it is executed.
        """
        return read_json(path, "solver file", cls.from_dict)


def _check_calls(grid: TimeGrid) -> None:
    """Raise UsageError unless each call is told a time between the steps before and after.

    Learned times may stand anywhere there and need not fall: neighbours are learned apart, and may
    meet or pass.
    """
    before, after = torch.cat([grid.t[:1], grid.t[:-1]]), torch.cat([grid.t[1:], grid.t[-1:]])
    wrong = (grid.t_model > before * (1 + 1e-9)) | (grid.t_model < after * (1 - 1e-9))
    for i in wrong.nonzero()[:1, 0].tolist():
        raise UsageError(
            f"the network's time t_model[{i}] = {grid.t_model[i].item()} must lie between the "
            f"steps around it, at {before[i].item()} and {after[i].item()}"
        )


def check_noise(x_T: Tensor, schedule: NoiseSchedule) -> None:
    """Raise UsageError unless the spread of x_T can be that of alpha(T) x_0 + sigma(T) eps."""
    if x_T.dtype not in FLOATS or x_T.layout is not torch.strided or x_T.is_meta or not x_T.numel():
        raise UsageError(
            "x_T must hold at least one sample, in float64, float32, bfloat16 or float16, not "
            f"{x_T.dtype} of shape {tuple(x_T.shape)}, {x_T.layout}, on {x_T.device}"
        )
    sigma, alpha = schedule.sigma(schedule.T).item(), schedule.alpha(schedule.T).item()
    rms, room = x_T.double().square().mean().sqrt().item(), 4 / math.sqrt(x_T.numel())
    # No tighter than chance and data of root mean square 10 allow.
    least, most = (0.8 - room) * sigma, (1.25 + room) * (sigma + 10 * alpha)
    if x_T.isfinite().all() and not least <= rms <= most:
        raise UsageError(
            f"x_T has the root mean square {rms:.3g}, but noise of {schedule} begins with sigma(T) "
            f"= {sigma:.3g}: multiply standard normal noise by that, as initial_noise does"
        )


def _told(model: dict[str, Any]) -> str:
    """A model in a few words."""
    digest = hashlib.sha256(json.dumps(model.get("weights"), sort_keys=True).encode()).hexdigest()
    known = f"guidance {shown(model.get('guidance'))}, weights {digest[:8]}"
    return f"{shown(model.get('name'))} ({known})"


FORMAT, VERSION = "s4s-solver", 3
# What files of each version lack.
NEWER: dict[int, dict[str, Any]] = {
    1: {"kind": "multistep", "a": None, "l": None, "d": None, "scale": None},
    2: {"scale": None},
    VERSION: {},
}
LARGEST_PROVENANCE = 10**6  # characters
KINDS = {"multistep": Coefficients, "single_step": SingleStepCoefficients}


def _tables(kind: str) -> list[str]:
    return [f.name for f in fields(KINDS[kind]) if f.name != "prediction"]


def _check_provenance(provenance: Any) -> None:
    """Raise UsageError unless this is a JSON object of moderate size."""
    if not isinstance(provenance, dict):
        raise UsageError(f"provenance must be an object, not {shown(provenance)}")
    try:
        size = len(json.dumps(provenance))
    except (TypeError, ValueError, RecursionError):
        raise UsageError(
            "provenance must consist of what JSON has: objects, lists, text, numbers, true, false "
            "and null"
        ) from None
    if size > LARGEST_PROVENANCE:
        raise UsageError(f"provenance has {size:,} characters, more than {LARGEST_PROVENANCE:,}")
