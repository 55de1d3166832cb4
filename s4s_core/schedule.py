"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) eps, from t = T (noise) down to t = t_min (data).

Everything else in the package asks a schedule for alpha, sigma and two derived coordinates:

    lam = ln(alpha / sigma)   half the log signal-to-noise ratio, rising from T to t_min
    s   = sigma / alpha       the noise level of y = x / alpha, falling from T to t_min

In (y, s) the probability-flow ODE (Eq. 2) is dy/ds = eps for every schedule.
"""

from dataclasses import asdict, dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from .base import UsageError, one_of


def _tensor(t) -> Tensor:
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


@dataclass(frozen=True)
class NoiseSchedule:
    """Base of the schedules; a subclass gives `alpha`, `sigma` and `t_of_lam`.

    All methods take times (or lam) as a float or a tensor of any shape, return a tensor of that
    shape (float64 for a float), and are differentiable.
    """

    T: float
    t_min: float

    def alpha(self, t) -> Tensor:
        """Signal scale at time t."""
        raise NotImplementedError

    def sigma(self, t) -> Tensor:
        """Noise standard deviation at time t."""
        raise NotImplementedError

    def t_of_lam(self, lam) -> Tensor:
        """The inverse of `lam`."""
        raise NotImplementedError

    def lam(self, t) -> Tensor:
        """ln(alpha / sigma) at time t (Lu et al. 2022a; Sec. 2.1)."""
        return self.alpha(t).log() - self.sigma(t).log()

    def s(self, t) -> Tensor:
        """sigma / alpha at time t, kappa of App. G.1.1."""
        return self.sigma(t) / self.alpha(t)

    def t_of_s(self, s) -> Tensor:
        """The inverse of `s`."""
        return self.t_of_lam(-_tensor(s).log())

    def to_dict(self) -> dict:
        """Name and constants, for JSON."""
        return {"name": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """Variance exploding with sigma(t) = t (Karras et al. 2022)."""

    T: float = 80.0
    t_min: float = 0.002

    def alpha(self, t) -> Tensor:
        return torch.ones_like(_tensor(t))

    def sigma(self, t) -> Tensor:
        return _tensor(t)

    def t_of_lam(self, lam) -> Tensor:
        return (-_tensor(lam)).exp()


class _VariancePreserving(NoiseSchedule):
    """alpha^2 + sigma^2 = 1; a subclass gives ln alpha and its inverse."""

    def log_alpha(self, t) -> Tensor:
        raise NotImplementedError

    def t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def t_of_lam(self, lam) -> Tensor:
        # ln alpha = -ln(1 + e^(-2 lam)) / 2; torch's softplus turns linear at 20 and loses digits.
        x = -2 * _tensor(lam)
        return self.t_of_log_alpha(-0.5 * torch.logaddexp(x, torch.zeros_like(x)))


@dataclass(frozen=True)
class VPLinear(_VariancePreserving):
    """Variance preserving with beta(t) linear in continuous time (Song et al. 2021b)."""

    T: float = 1.0
    t_min: float = 1e-3
    beta_0: float = 0.1
    beta_1: float = 20.0

    def log_alpha(self, t) -> Tensor:
        t = _tensor(t)
        return -(t**2) * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2

    def t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        # The root of the quadratic above in the form that does not cancel for small t.
        slope = self.beta_1 - self.beta_0
        root = (self.beta_0**2 - 4 * slope * log_alpha).sqrt()
        return -4 * log_alpha / (root + self.beta_0)


@dataclass(frozen=True)
class VPDiscrete(_VariancePreserving):
    """Latent-diffusion betas: 1000 noise levels, ln alpha piecewise linear in t between them.

    Level n sits at t = (n + 1) / 1000, so the networks' own time is 1000 t - 1
    (Rombach et al. 2022; interpolation of Lu et al. 2022a). Defaults: Stable Diffusion;
    `ldm()` gives the constants of the LSUN and ImageNet models.
    """

    T: float = 1.0
    t_min: float = 1e-3
    beta_start: float = 0.00085
    beta_end: float = 0.012
    levels: int = 1000

    @classmethod
    def ldm(cls) -> "VPDiscrete":
        """The latent-diffusion constants for LSUN-Bedroom and ImageNet-256."""
        return cls(beta_start=0.0015, beta_end=0.0195)

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        root = [self.beta_start**0.5, self.beta_end**0.5]
        betas = torch.linspace(*root, self.levels, dtype=torch.float64) ** 2
        t = torch.arange(1, self.levels + 1, dtype=torch.float64) / self.levels
        return t, 0.5 * torch.log1p(-betas).cumsum(0)

    def log_alpha(self, t) -> Tensor:
        return _interpolate(_tensor(t), *self._table)

    def t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        t, table = self._table
        return _interpolate(log_alpha, table.flip(0), t.flip(0))


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), knots ascending, end segments extended."""
    right = torch.searchsorted(knots, x.detach().contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (knots[right] - knots[left])
    return values[left] + (x - knots[left]) * slope


@dataclass(frozen=True)
class RectifiedFlow(NoiseSchedule):
    """x_t = (1 - t) x_0 + t eps (Liu et al. 2023).

    T stays below 1, where alpha = 0 and y = x / alpha would not exist.
    """

    T: float = 0.999
    t_min: float = 1e-3

    def alpha(self, t) -> Tensor:
        return 1 - _tensor(t)

    def sigma(self, t) -> Tensor:
        return _tensor(t)

    def t_of_lam(self, lam) -> Tensor:
        return torch.sigmoid(-_tensor(lam))


SCHEDULES = {cls.__name__: cls for cls in (EDM, VPLinear, VPDiscrete, RectifiedFlow)}


def schedule_from_dict(entries: dict) -> NoiseSchedule:
    """The inverse of `NoiseSchedule.to_dict`; raises UsageError for anything but known names."""
    if not isinstance(entries, dict):
        raise UsageError(f"a noise schedule is a mapping with a name, not {entries!r}")
    constants = dict(entries)
    cls = one_of("noise schedule", constants.pop("name", None), SCHEDULES)
    for key, value in constants.items():
        one_of(f"constant of {cls.__name__}", key, {f.name for f in fields(cls)})
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(f"{cls.__name__}.{key} must be a number, not {value!r}")
    schedule = cls(**constants)
    try:
        lam = schedule.lam(torch.linspace(schedule.T, schedule.t_min, 100, dtype=torch.float64))
        valid = schedule.T > schedule.t_min > 0 and lam.isfinite().all() and (lam.diff() > 0).all()
    except (TypeError, ValueError, IndexError, RuntimeError):
        valid = False
    if not valid:
        raise UsageError(f"{schedule} must have T > t_min > 0 and a lam that rises from T to t_min")
    return schedule
