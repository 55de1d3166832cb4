"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) eps, from t = T (noise) down to t = t_min (data).

Everything else in the package asks a schedule for alpha, sigma and two derived coordinates:

    lam = ln(alpha / sigma)   half the log signal-to-noise ratio, rising from T to t_min
    s   = sigma / alpha       the noise level of y = x / alpha, falling from T to t_min

In (y, s) the probability-flow ODE (Eq. 2) is dy/ds = eps for every schedule.
"""

from dataclasses import asdict, dataclass, field, fields
from functools import cached_property

import torch
from torch import Tensor

from .errors import UsageError, choose, shown


def _tensor(t: Tensor | float) -> Tensor:
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


@dataclass(frozen=True)
class NoiseSchedule:
    """Base of the schedules; a subclass gives `alpha`, `sigma` and `t_of_lam`.

    All methods take times (or lam) as a float or a tensor of any shape, return a tensor of that
    shape (float64 for a float), and are differentiable.
    """

    T: float
    t_min: float

    def alpha(self, t: Tensor | float) -> Tensor:
        """Return the signal scale at time t."""
        raise NotImplementedError

    def sigma(self, t: Tensor | float) -> Tensor:
        """Return the noise standard deviation at time t."""
        raise NotImplementedError

    def t_of_lam(self, lam: Tensor | float) -> Tensor:
        """Return the time of lam, the inverse of `lam`."""
        raise NotImplementedError

    def lam(self, t: Tensor | float) -> Tensor:
        """Return ln(alpha / sigma) at time t (Lu et al. 2022a; Sec. 2.1)."""
        return self.alpha(t).log() - self.sigma(t).log()

    def s(self, t: Tensor | float) -> Tensor:
        """Return sigma / alpha at time t, kappa of App. G.1.1."""
        return self.sigma(t) / self.alpha(t)

    def t_of_s(self, s: Tensor | float) -> Tensor:
        """Return the time of s, the inverse of `s`."""
        return self.t_of_lam(-_tensor(s).log())

    def network_time(self, t: Tensor | float) -> Tensor:
        """Return what published networks of this schedule are told at time t, which may be t."""
        return _tensor(t)

    def to_dict(self) -> dict:
        """Return the name and the constants, for JSON."""
        return {"name": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """Variance exploding with sigma(t) = t (Karras et al. 2022)."""

    T: float = 80.0
    t_min: float = 0.002

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(_tensor(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return _tensor(t)

    def t_of_lam(self, lam: Tensor | float) -> Tensor:
        return (-_tensor(lam)).exp()


class _VariancePreserving(NoiseSchedule):
    """alpha^2 + sigma^2 = 1; a subclass gives ln alpha and its inverse."""

    def log_alpha(self, t: Tensor | float) -> Tensor:
        raise NotImplementedError

    def t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor | float) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor | float) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def t_of_lam(self, lam: Tensor | float) -> Tensor:
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

    def log_alpha(self, t: Tensor | float) -> Tensor:
        t = _tensor(t)
        return -(t**2) * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2

    def t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        # The root of the quadratic above in the form that does not cancel for small t.
        slope = self.beta_1 - self.beta_0
        root = (self.beta_0**2 - 4 * slope * log_alpha).sqrt()
        return -4 * log_alpha / (root + self.beta_0)


class _Discrete(_VariancePreserving):
    """ln alpha piecewise linear in t between N noise levels; a subclass gives `_log_alphas`, (N,).

    Level n sits at t = (n + 1) / N, so the network's own time is N t - 1
    (interpolation of Lu et al. 2022a).
    """

    def _log_alphas(self) -> Tensor:
        raise NotImplementedError

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        values = self._log_alphas()
        return torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values), values

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return _interpolate(_tensor(t), *self._table)

    def t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        t, table = self._table
        return _interpolate(log_alpha, table.flip(0), t.flip(0))

    def network_time(self, t: Tensor | float) -> Tensor:
        return len(self._table[0]) * _tensor(t) - 1


@dataclass(frozen=True)
class VPDiscrete(_Discrete):
    """Latent-diffusion betas, whose square roots are equally spaced (Rombach et al. 2022).

    Defaults: Stable Diffusion; `ldm()` gives the constants of the LSUN and ImageNet models.
    """

    T: float = 1.0
    t_min: float = 1e-3
    beta_start: float = 0.00085
    beta_end: float = 0.012
    levels: int = 1000

    def __post_init__(self):
        if type(self.levels) is not int or not 2 <= self.levels <= 10**6:
            raise UsageError(
                f"levels must be a whole number from 2 to 1000000, not {shown(self.levels)}"
            )

    @classmethod
    def ldm(cls) -> "VPDiscrete":
        """Return the latent-diffusion constants for LSUN-Bedroom and ImageNet-256."""
        return cls(beta_start=0.0015, beta_end=0.0195)

    def _log_alphas(self) -> Tensor:
        first, last = self.beta_start**0.5, self.beta_end**0.5
        betas = torch.linspace(first, last, self.levels, dtype=torch.float64) ** 2
        return 0.5 * torch.log1p(-betas).cumsum(0)


@dataclass(frozen=True)
class VPTable(_Discrete):
    """Noise levels given one by one: alphas_cumprod[n] = alpha^2 of level n, falling from near 1.

    T < 1 leaves out the noisiest levels, t_min > 1 / N the cleanest.
    """

    T: float = 1.0
    t_min: float = 1e-3
    alphas_cumprod: tuple[float, ...] = field(default=(), repr=False)

    def _log_alphas(self) -> Tensor:
        return 0.5 * torch.tensor(self.alphas_cumprod, dtype=torch.float64).log()


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), knots ascending, end segments extended."""
    right = torch.searchsorted(knots, x.detach().contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (knots[right] - knots[left])
    return values[left] + (x - knots[left]) * slope


@dataclass(frozen=True)
class RectifiedFlow(NoiseSchedule):
    """x_t = (1 - sigma) x_0 + sigma eps, sigma = t (Liu et al. 2023).

    With a `shift` sigma = shift t / (1 + (shift - 1) t), which spends more of t on noise (Esser et
    al. 2024). T stays below 1, where alpha = 0 and y = x / alpha would not exist.
    """

    T: float = 0.999
    t_min: float = 1e-3
    shift: float = 1.0

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        t = _tensor(t)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def t_of_lam(self, lam: Tensor | float) -> Tensor:
        sigma = torch.sigmoid(-_tensor(lam))
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def network_time(self, t: Tensor | float) -> Tensor:
        return 1000 * self.sigma(t)


SCHEDULES = {cls.__name__: cls for cls in (EDM, VPLinear, VPDiscrete, VPTable, RectifiedFlow)}

# What `schedule` in params/<dataset>.yaml may name.
NAMED_SCHEDULES = {
    "EDM": EDM(),
    "VPLinear": VPLinear(),
    "LDM": VPDiscrete.ldm(),
    "StableDiffusion": VPDiscrete(),
    "RectifiedFlow": RectifiedFlow(),
}


def check_begins_in_noise(schedule: NoiseSchedule) -> None:
    """Raise UsageError if signal is left at T, where samples cannot begin with noise alone."""
    if (s := schedule.s(schedule.T).item()) < 5:  # Stable Diffusion, the lowest in use, has 14.6
        raise UsageError(
            f"at the end of {schedule} there is signal left (sigma / alpha = {s:.3g}), so that "
            "noise alone is no sample of x_T: give Solver.sample images with noise, or raise T"
        )


def schedule_from_dict(entries: dict) -> NoiseSchedule:
    """Return the schedule that `NoiseSchedule.to_dict` wrote; UsageError for anything else."""
    if not isinstance(entries, dict):
        raise UsageError(f"a noise schedule is a mapping with a name, not {shown(entries)}")
    constants = dict(entries)
    cls = choose("noise schedule", constants.pop("name", None), SCHEDULES)
    for key, value in constants.items():
        choose(f"constant of {cls.__name__}", key, {f.name for f in fields(cls)})
        values = constants[key] = tuple(value) if isinstance(value, list) else value
        for number in values if isinstance(values, tuple) else [values]:
            plain = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not (plain and abs(number) < 1e100):  # larger whole numbers are no floats
                raise UsageError(
                    f"{cls.__name__}.{key} must be a number of moderate size, not {shown(number)}"
                )
    schedule = cls(**constants)
    try:
        lam = schedule.lam(torch.linspace(schedule.T, schedule.t_min, 100, dtype=torch.float64))
        valid = schedule.T > schedule.t_min > 0 and lam.isfinite().all() and (lam.diff() > 0).all()
    except (TypeError, ValueError, IndexError, RuntimeError):
        valid = False
    if not valid:
        raise UsageError(f"{schedule} must have T > t_min > 0 and a lam that rises from T to t_min")
    # Older files have no shift, for 1.
    if missing := {f.name for f in fields(cls)} - {*constants, "shift"}:
        raise UsageError(f"the noise schedule lacks {', '.join(sorted(missing))}")
    return schedule
