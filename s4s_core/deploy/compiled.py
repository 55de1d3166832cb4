"""A solver as a triangle of numbers, which runs without its schedule, its formulas or this package.

What a network answers (eps, v, x_0 or eps - x_0) enters every solver here linearly. With x_0 = x_T
and out_i = network(scale_i x_i, timesteps_i), N calls are

    x_{i+1} = A_i x_T + sum_{j <= i} B_ij out_j

whatever the coefficients, correctors, states and times are: N times and N (N + 3) / 2 numbers, in
which all linear solvers can be compared. `CompiledSolver.sample` is all that any language needs.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import UsageError, choose, read_json, require, shown, write_atomically
from ..models.diffusers_pipeline import PREDICTION_TYPES
from ..schedule import NoiseSchedule
from ..solver import Solver

FORMAT, VERSION = "s4s-compiled", 1


@dataclass(frozen=True)
class CompiledSolver:
    """A solver for networks of one prediction type, as numbers alone.

    prediction_type   what the network answers: "epsilon", "v_prediction", "sample" (x_0) or
                      "flow_prediction" (eps - x_0)
    init_noise_sigma  the standard deviation of x_T
    timesteps         (N,) what the network is told: `NoiseSchedule.network_time`
    scale             (N,) what x is multiplied by before each call; ones in most solvers
    table             N rows: A_i, B_i0, .., B_ii
    provenance        as the solver's; not compared

    Raises UsageError for other lengths, and for what is no finite number.
    """

    prediction_type: str
    init_noise_sigma: float
    timesteps: tuple[float, ...]
    scale: tuple[float, ...]
    table: tuple[tuple[float, ...], ...]
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        choose("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if not isinstance(self.provenance, dict):
            raise UsageError(f"provenance must be an object, not {shown(self.provenance)}")
        _check_numbers("init_noise_sigma", [self.init_noise_sigma], 1)
        if self.init_noise_sigma <= 0:
            raise UsageError(f"init_noise_sigma must be above 0, not {self.init_noise_sigma}")
        for name in ("timesteps", "scale", "table"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise UsageError(f"{name} must be a list, not {shown(getattr(self, name))}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.timesteps:
            raise UsageError("timesteps must have at least one entry, not none")
        _check_numbers("timesteps", self.timesteps, self.nfe)
        _check_numbers("scale", self.scale, self.nfe)
        if len(self.table) != self.nfe:
            raise UsageError(
                f"the table must have {self.nfe} rows, one a timestep, not {len(self.table)}"
            )
        for i, row in enumerate(self.table):
            _check_numbers(f"row {i} of the table", row, i + 2)
        object.__setattr__(self, "table", tuple(map(tuple, self.table)))

    @property
    def nfe(self) -> int:
        """Network calls a sample: N."""
        return len(self.timesteps)

    def sample(self, network: Callable[[Any, float], Any], x_T: Any) -> Any:
        """Return x_0, like x_T (B, ...), from noise of standard deviation `init_noise_sigma`.

        `nfe` calls of network(x, timestep). Arrays of numpy, tensors and all else that can be added
        and multiplied by a float will do. Raises UsageError for an answer of another shape.

        >>> euler = CompiledSolver("sample", 1.0, (999.0,), (1.0,), ((0.25, 0.75),))
        >>> euler.sample(lambda x, timestep: 2.0, 1.0)  # a number is the smallest array
        1.75
        """
        x, outs = x_T, []
        for timestep, scale, (a, *b) in zip(self.timesteps, self.scale, self.table, strict=True):
            outs.append(_like(x_T, network(scale * x, timestep)))
            x = a * x_T + sum(weight * out for weight, out in zip(b, outs, strict=True))
        return x

    def to_dict(self) -> dict[str, Any]:
        """Return the file's contents as plain numbers, lists and strings."""
        return json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "CompiledSolver":
        """Return what `to_dict` wrote; UsageError for anything that is no compiled solver."""
        if not isinstance(entries, dict) or entries.get("format") != FORMAT:
            raise UsageError(f"not a compiled solver: a JSON object of format {FORMAT!r} is one")
        version = entries.get("version")
        if type(version) is not int or version != VERSION:
            raise UsageError(
                f"compiled solver of version {shown(version)}, but this package "
                f"reads version {VERSION}: compile it again with the package that is installed here"
            )
        values = {name: v for name, v in entries.items() if name not in ("format", "version")}
        names = {f.name for f in fields(cls)}
        for name in values:
            choose("entry of a compiled solver", name, names)
        if missing := names - set(values):
            raise UsageError(f"the compiled solver lacks {', '.join(sorted(missing))}")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the numbers as a JSON file, whole or not at all."""
        write_atomically(path, (json.dumps(self.to_dict()) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "CompiledSolver":
        """Read a file that `save` wrote; UsageError, naming the file, for any other."""
        return read_json(path, "compiled solver", cls.from_dict)


def _like(x: Any, answer: Any) -> Any:
    """The answer, unless it has not the shape of x, to which it may be broadcast unseen."""
    shape, found = (getattr(value, "shape", ()) for value in (x, answer))
    if tuple(shape) != tuple(found):
        raise UsageError(
            f"the network answered {tuple(found)} for samples {tuple(shape)}: it must answer with "
            "their shape (a learned variance split off)"
        )
    return answer


def _check_numbers(name: str, values: Any, count: int) -> None:
    if not isinstance(values, (list, tuple)) or len(values) != count:
        found = len(values) if isinstance(values, (list, tuple)) else shown(values)
        raise UsageError(f"{name} must have length {count} here, not {found}")
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and abs(value) < 1e100):  # larger whole numbers are no floats
            raise UsageError(f"{name} must be finite numbers of moderate size, not {shown(value)}")


@torch.no_grad()
def compile_solver(solver: Solver, prediction: str = "epsilon") -> CompiledSolver:
    """Return the solver as numbers for a network that predicts `prediction`.

    prediction  "epsilon", "v_prediction", "sample" (x_0) or "flow_prediction" (eps - x_0)

    Equal to `Solver.sample` but for rounding. Raises UsageError for a solver with a number for each
    pixel, or with constants, as DPM-Solver-v3 has them.
    """
    require("solver", solver, Solver)
    check_linear(solver)
    x_T, *answers = torch.eye(solver.nfe + 1, dtype=torch.float64)
    schedule = solver.grid.schedule
    _, *points = solver.trajectory(answering(answers, prediction, schedule), x_T)
    _, grid = solver.coefficients.as_multistep(solver.grid)
    return CompiledSolver(
        prediction,
        schedule.sigma(schedule.T).item(),
        tuple(schedule.network_time(grid.t_model[:-1]).tolist()),
        tuple(grid.scale.tolist()),
        tuple(tuple(x[: i + 2].tolist()) for i, x in enumerate(points)),
        solver.provenance,
    )


def answering(answers: Iterable[Tensor], prediction: str, schedule: NoiseSchedule) -> Denoiser:
    """Return the denoiser whose network gives these answers, one a call, whatever it is asked.

    With unit vectors for answers the loop gives the coefficients of its own result.
    """
    given = iter(answers)
    return choose("prediction", prediction, PREDICTION_TYPES)(lambda x, t: next(given), schedule)


def check_linear(solver: Solver) -> None:
    """Raise UsageError, naming the tables, unless the network's answers alone are weighed."""
    table, _ = solver.coefficients.as_multistep(solver.grid)
    axes = {"b": 2, "c": 2, "a": 2, "l": 1, "d": 0}
    tables = {name: getattr(table, name) for name in axes}
    own = [n for n, w in tables.items() if w is not None and w.ndim > axes[n]]
    if own:
        raise UsageError(
            f"a solver with constants, or with a number for each pixel ({', '.join(own)}, as "
            "DPM-Solver-v3 has them), is no table of weights: compile another solver"
        )
