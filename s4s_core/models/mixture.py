"""A model without a network: the denoiser of a Gaussian mixture in closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UsageError
from ..schedule import NoiseSchedule


class GaussianMixture:
    """The mixture sum_k weights[k] N(means[k], stds[k]^2 I), with exact denoiser and density.

    weights (K,), means (K, d), stds (K,). x_t is a mixture too, with the variances
    alpha^2 stds^2 + sigma^2, so D(x, t) = E[x_0 | x_t] has a closed form. The weights are
    normalised to sum to 1. Raises UsageError for other shapes, and for what is not finite, or
    negative.
    """

    def __init__(
        self,
        weights: Tensor | Sequence[float],
        means: Tensor | Sequence[Sequence[float]],
        stds: Tensor | Sequence[float],
        schedule: NoiseSchedule,
    ):
        self.weights, self.means, self.stds = (
            torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, stds)
        )
        K, given = len(self.weights.flatten()), (self.weights, self.means, self.stds)
        fits = [tuple(v.shape) for v in given] == [(K,), (K, *self.means.shape[-1:]), (K,)]
        if not fits or not all(v.isfinite().all() for v in given):
            shapes = ", ".join(str(tuple(v.shape)) for v in given)
            raise UsageError(
                f"weights (K,), means (K, d) and stds (K,) must be finite numbers, not {shapes}"
            )
        if (self.weights < 0).any() or (self.stds < 0).any() or self.weights.sum() == 0:
            raise UsageError("weights and stds must be at least 0, and not all weights 0")
        self.weights = self.weights / self.weights.sum()
        self.schedule = schedule

    def _log_joint(self, y: Tensor, s: Tensor) -> Tensor:
        """ln weights[k] + ln N(y; means[k], (stds[k]^2 + s^2) I) in y = x / alpha: (B, K)."""
        variance = self.stds**2 + s**2
        d = self.means.shape[1]
        squared = (y[:, None] - self.means).square().sum(-1)
        log_normal = -squared / (2 * variance) - d / 2 * (2 * torch.pi * variance).log()
        return self.weights.log() + log_normal

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return E[x_0 | x_t = x], (B, d), for x (B, d)."""
        y, s = x / self.schedule.alpha(t), self.schedule.s(t)
        posterior = self._log_joint(y, s).softmax(1)[..., None]
        shrink = (self.stds**2 / (self.stds**2 + s**2))[:, None]
        return (posterior * (self.means + shrink * (y[:, None] - self.means))).sum(1)

    def log_prob(self, x: Tensor, t: Tensor | float | None = None) -> Tensor:
        """Return ln density of x_t at x, (B, d) -> (B,), or that of the data if t is None."""
        if t is None:
            return self._log_joint(x, torch.zeros((), dtype=x.dtype)).logsumexp(1)
        alpha = self.schedule.alpha(t)
        return (
            self._log_joint(x / alpha, self.schedule.s(t)).logsumexp(1) - x.shape[1] * alpha.log()
        )

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return n draws of the data, (n, d) float64."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * z
