"""Time grids: where the network is called (App. G.1), and the grid that can be learned (App. E).

Published grids are functions of a noise schedule and a number of steps, by name in GRIDS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError, choose, require, require_whole, shown
from .schedule import NoiseSchedule, VPDiscrete


def as_numbers(name: str, values: Any) -> Tensor:
    """Return a tensor, an array or nested lists of numbers as a float64 tensor.

    Raises UsageError, which calls it `name`, for anything else.
    """
    try:
        numbers = torch.as_tensor(values)
        # Of [[], 1.0] torch makes a tensor of no numbers.
        wrong = numbers.dtype == torch.bool or numbers.is_complex() or not numbers.numel()
        if wrong or _has_bool(values):
            raise TypeError
        # Not of the tensor above, whose floats may have been made in single precision.
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UsageError(f"{name} must be a rectangular list of numbers") from None


def _has_bool(values: Any) -> bool:
    """Whether there is a bool in nested lists, where torch takes it for a number."""
    return (
        any(map(_has_bool, values)) if isinstance(values, (list, tuple)) else type(values) is bool
    )


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """N + 1 times from T down to t_min; N network calls, one at each of the first N.

    t        (N+1,) float64, strictly decreasing; sets the step sizes
    t_model  (N+1,) float64, the times passed to the network, t by default (decoupled steps of
             App. E.2 have others)

    scale    (N,) float64, what x is multiplied by before each call: 1 by default. A call at a time
             other than the step's may want x in the scale of that time: so the first call need not
             be wasted on noise (elsewhere "analytic first step")

    Lists and arrays become tensors. Raises UsageError unless t falls strictly from schedule.T to
    schedule.t_min.
    """

    schedule: NoiseSchedule
    t: Tensor
    t_model: Tensor = None  # type: ignore[assignment]  # t by default
    scale: Tensor = None  # type: ignore[assignment]  # ones by default

    def __post_init__(self):
        require("schedule", self.schedule, NoiseSchedule)
        object.__setattr__(self, "t", as_numbers("t", self.t))
        t_model = self.t if self.t_model is None else as_numbers("t_model", self.t_model)
        object.__setattr__(self, "t_model", t_model)
        t, t_model = self.t.detach(), self.t_model.detach()
        if t.ndim != 1 or len(t) < 2 or t.shape != t_model.shape:
            raise UsageError(
                f"a grid needs the same N + 1 >= 2 times in t and t_model, not shapes "
                f"{tuple(t.shape)} and {tuple(t_model.shape)}"
            )
        scale = torch.ones_like(t[:-1]) if self.scale is None else as_numbers("scale", self.scale)
        object.__setattr__(self, "scale", scale)
        scale = scale.detach()
        if scale.shape != t[1:].shape or not (scale.isfinite().all() and (scale > 0).all()):
            raise UsageError(
                f"scale must be {len(t) - 1} finite numbers above 0, not {shown(scale.tolist())}"
            )
        if not (t.isfinite().all() and t_model.isfinite().all() and (t_model > 0).all()):
            raise UsageError(
                f"grid times must be finite and positive, not {shown(t_model.tolist())}"
            )
        if not (t[1:] < t[:-1]).all():
            raise UsageError(f"grid times must fall strictly, not {shown(t.tolist())}")
        T, t_min = self.schedule.T, self.schedule.t_min
        if not torch.allclose(t[[0, -1]], t.new_tensor([T, t_min]), rtol=1e-9):
            raise UsageError(
                f"a grid for {self.schedule} must run from T = {T} to t_min = {t_min}, not from "
                f"{t[0].item()} to {t[-1].item()}"
            )

    @property
    def nfe(self) -> int:
        """Number of steps N."""
        return len(self.t) - 1

    @property
    def lam(self) -> Tensor:
        """(N+1,) log signal-to-noise coordinate at t, rising."""
        return self.schedule.lam(self.t)

    @property
    def s(self) -> Tensor:
        """(N+1,) noise level sigma / alpha at t, falling."""
        return self.schedule.s(self.t)

    def refine(self, parts: int) -> "TimeGrid":
        """Split each step into `parts` steps equal in lam; every parts-th time is an original."""
        start, h = self.lam[:-1, None], self.lam.diff()[:, None]
        inner = self.schedule.t_of_lam(start + h * torch.arange(1, parts, dtype=h.dtype) / parts)
        t = torch.cat([self.t[:-1, None], inner], 1).flatten()
        return TimeGrid(self.schedule, torch.cat([t, self.t[-1:]]))


def grid_at(schedule: NoiseSchedule, nfe: int, times: Callable[[Tensor], Tensor]) -> TimeGrid:
    """Evaluate `times` at n/N, n = 0..N, and pin both ends, which rounding may have moved."""
    require_whole("nfe", nfe, 1)
    t = times(torch.arange(nfe + 1, dtype=torch.float64) / nfe)
    t[0], t[-1] = schedule.T, schedule.t_min
    return TimeGrid(schedule, t)


def time_uniform(schedule: NoiseSchedule, nfe: int) -> TimeGrid:
    """Return the grid uniform in t (App. G.1.1)."""
    return grid_at(schedule, nfe, lambda u: schedule.T + u * (schedule.t_min - schedule.T))


def time_quadratic(schedule: NoiseSchedule, nfe: int) -> TimeGrid:
    """Return the grid quadratic in t and dense near t_min.

    The form that Tong et al. (2024) run; the formula printed in App. G.1.1 is dense near T
    instead and cannot have given the FIDs in its tables.
    """
    return grid_at(
        schedule, nfe, lambda u: schedule.t_min + (schedule.T - schedule.t_min) * (1 - u) ** 2
    )


def time_edm(schedule: NoiseSchedule, nfe: int, rho: float = 7.0) -> TimeGrid:
    """Return the grid uniform in s^(1/rho) (Karras et al. 2022, Eq. 5; App. G.1.1)."""

    def times(u: Tensor) -> Tensor:
        first = schedule.s(schedule.T) ** (1 / rho)
        last = schedule.s(schedule.t_min) ** (1 / rho)
        return schedule.t_of_s((first + u * (last - first)) ** rho)

    return grid_at(schedule, nfe, times)


def time_edm_t(schedule: NoiseSchedule, nfe: int, rho: float = 7.0) -> TimeGrid:
    """Return the grid uniform in t^(1/rho): EDM's rule for t itself.

    Tong et al. (2024) run it on latent models. On EDM, where t is s, it is `time_edm`.
    """

    def times(u: Tensor) -> Tensor:
        first, last = schedule.T ** (1 / rho), schedule.t_min ** (1 / rho)
        return (first + u * (last - first)) ** rho

    return grid_at(schedule, nfe, times)


def time_logsnr(schedule: NoiseSchedule, nfe: int) -> TimeGrid:
    """Return the grid uniform in lam (Lu et al. 2022a; App. G.1.1)."""

    def times(u: Tensor) -> Tensor:
        first, last = schedule.lam(schedule.T), schedule.lam(schedule.t_min)
        return schedule.t_of_lam(first + u * (last - first))

    return grid_at(schedule, nfe, times)


# Noise levels sigma / alpha between the models' own first and last (Sabour et al. 2024).
_AYS = {
    "sd15": [6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152],
    "sdxl": [6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113],
}

# GITS for Stable Diffusion 1.5 at guidance 7.5, as Tong et al. (2024) list it in their code.
_GITS_SD15 = {
    3: [14.6146, 1.7083, 0.532, 0.0292],
    4: [14.6146, 3.1131, 1.0421, 0.3811, 0.0292],
    5: [14.6146, 4.39, 1.5286, 0.6526, 0.2667, 0.0292],
    6: [14.6146, 4.7242, 1.9132, 0.9324, 0.4557, 0.1801, 0.0292],
    8: [14.6146, 6.4477, 2.7391, 1.4467, 0.8319, 0.4936, 0.2667, 0.1258, 0.0292],
    10: [14.6146, 5.9489, 3.3251, 2.0267, 1.2969, 0.8319, 0.5712, 0.3811, 0.2255, 0.1258, 0.0292],
}


def gits_sd15(schedule: NoiseSchedule, nfe: int) -> TimeGrid:
    """Return GITS's grid for iPNDM on Stable Diffusion, as found by its authors.

    UsageError for another schedule, or a number of calls that has no list.
    """
    if schedule != VPDiscrete() or nfe not in _GITS_SD15:
        raise UsageError(
            f"GITS is listed for {VPDiscrete()} and nfe {', '.join(map(str, _GITS_SD15))}, not for "
            f"{schedule} and nfe {nfe}: search it with gits"
        )
    levels = torch.tensor(_GITS_SD15[nfe], dtype=torch.float64)
    return grid_at(schedule, nfe, lambda _: schedule.t_of_s(levels))


def ays(schedule: NoiseSchedule, nfe: int, model: str = "sd15") -> TimeGrid:
    """Return the grid of Sabour et al. (2024) for Stable Diffusion 1.5 ("sd15") or XL ("sdxl").

    Published for 10 steps; any other number interpolates the logarithms of the noise levels
    linearly, as the authors advise. UsageError for a schedule other than Stable Diffusion's.
    """
    levels = choose("AYS model", model, _AYS)
    if schedule != VPDiscrete():
        raise UsageError(
            f"there is no AYS grid for {schedule}, only for Stable Diffusion's {VPDiscrete()}: "
            "choose another grid"
        )
    first, last = time_uniform(schedule, 1).lam.split(1)
    knots = torch.cat([first, -torch.tensor(levels, dtype=torch.float64).log(), last])

    def times(u: Tensor) -> Tensor:
        position = u * (len(knots) - 1)
        left = position.long().clamp(max=len(knots) - 2)
        return schedule.t_of_lam(knots[left] + (position - left) * knots.diff()[left])

    return grid_at(schedule, nfe, times)


# Grids that need no more than a noise schedule and the number of steps.
GRIDS: dict[str, Callable[[NoiseSchedule, int], TimeGrid]] = {
    "uniform": time_uniform,
    "quadratic": time_quadratic,
    "edm": time_edm,
    "edm_t": time_edm_t,
    "logsnr": time_logsnr,
    "ays_sd15": partial(ays, model="sd15"),
    "ays_sdxl": partial(ays, model="sdxl"),
    "gits_sd15": gits_sd15,
}

VARIABLES = ("lam", "t")


@dataclass(frozen=True, eq=False)
class LearnedGrid:
    """The learnable time steps Xi = {xi, xi_c} of App. E.

    xi    (N+1,) float64: softmax of xi, summed from the end and rescaled, gives the grid (E.1)
    xi_c  (N+1,) float64: offsets of the network's times, both ends fixed, the others bounded by
          `offset_fraction` times the smallest gap (E.2)

    first () float64 or None: sigmoid(first) is the share of the way from T to t_1, in lam, at which
          the first call lies, with x_T scaled to it. It is at T without: there is nothing but noise
          to see there, and a call spent on it is nearly wasted

    `variable` is what the rescaling is linear in: "lam" (Tong et al. 2024 for pixel models) or
    "t" (as App. E prints it).
    """

    schedule: NoiseSchedule
    xi: Tensor
    xi_c: Tensor
    variable: str = "lam"
    offset_fraction: float = 0.5
    first: Tensor | None = None

    @classmethod
    def start_at(
        cls, grid: TimeGrid, variable: str = "lam", offset_fraction: float = 0.5
    ) -> "LearnedGrid":
        """Return the parameters whose `grid()` is the given grid; xi = 0 if it is uniform."""
        choose("grid variable", variable, VARIABLES)
        to_variable = grid.schedule.lam if variable == "lam" else (lambda t: t)
        u = to_variable(grid.t)
        gaps = u.diff().abs()
        # The rescaling cancels the last entry of softmax(xi); 0 keeps it out of the way.
        xi = torch.cat([(gaps / gaps.mean()).log(), gaps.new_zeros(1)])
        first = None
        if grid.t_model[0] != grid.t[0]:
            lam_T, lam_1 = grid.lam[:2]
            share = (grid.schedule.lam(grid.t_model[0]) - lam_T) / (lam_1 - lam_T)
            first = share.clamp(0.01, 0.99).logit()
        xi_c = to_variable(grid.t_model) - u
        xi_c[0] = 0.0
        return cls(grid.schedule, xi, xi_c, variable, offset_fraction, first)

    def grid(self) -> TimeGrid:
        """Return the grid, differentiable in xi and xi_c."""
        if self.variable == "lam":
            first, last = self.schedule.lam(self.schedule.T), self.schedule.lam(self.schedule.t_min)
            to_time: Callable[[Tensor], Tensor] = self.schedule.t_of_lam
        else:
            first, last = torch.tensor([self.schedule.T, self.schedule.t_min], dtype=self.xi.dtype)
            to_time = lambda u: u  # noqa: E731
        increments = self.xi.softmax(0)[:-1]
        tau = torch.cat([increments.flip(0).cumsum(0).flip(0), increments.new_zeros(1)])
        u = last + tau / tau[0] * (first - last)
        bound = self.offset_fraction * u.detach().diff().abs().min()
        offset = self.xi_c[1:-1].clamp(-bound, bound)
        ends = u.new_tensor([self.schedule.T, self.schedule.t_min]).split(1)
        t, t_model = (
            torch.cat([ends[0], to_time(inner), ends[1]]) for inner in (u[1:-1], u[1:-1] + offset)
        )
        if self.first is None:
            return TimeGrid(self.schedule, t, t_model)
        lam_T, lam_1 = self.schedule.lam(t[:2])
        t_first = self.schedule.t_of_lam(lam_T + self.first.sigmoid() * (lam_1 - lam_T))
        size = [
            (self.schedule.alpha(at) ** 2 + self.schedule.sigma(at) ** 2).sqrt()
            for at in (t_first, t[0])
        ]
        scale = torch.cat([(size[0] / size[1])[None], torch.ones_like(t[1:-1])])
        return TimeGrid(self.schedule, t, torch.cat([t_first[None], t_model[1:]]), scale)
