"""Any network becomes a denoiser: D(x, t) -> an estimate of x_0, like x.

t is a float64 scalar tensor on the CPU (its gradient reaches the decoupled times). A denoiser may
carry its `schedule`, and then solvers made for another one refuse it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .base import UsageError
from .schedule import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]


class _Denoiser:
    """A function with the noise schedule that it belongs to."""

    def __init__(self, function: Denoiser, schedule: NoiseSchedule | None):
        self.function = function
        if schedule is not None:
            self.schedule = schedule

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _times(t: Tensor, x: Tensor) -> Tensor:
    """(B,) copies of t, as networks expect them."""
    return torch.as_tensor(t).to(x.device, non_blocking=True).expand(len(x))


def from_denoiser(network, schedule: NoiseSchedule) -> Denoiser:
    """A denoiser from network(x, t (B,)) -> x_0."""
    return _Denoiser(lambda x, t: network(x, _times(t, x)), schedule)


def from_noise_prediction(network, schedule: NoiseSchedule) -> Denoiser:
    """A denoiser from network(x, t (B,)) -> eps: D = (x - sigma eps) / alpha.

    What follows x and t, a condition, is passed on to the network.
    """

    def denoise(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        eps = network(x, _times(t, x), *condition)
        return (x - schedule.sigma(t) * eps) / schedule.alpha(t)

    return _Denoiser(denoise, schedule)


def from_velocity(network, schedule: NoiseSchedule) -> Denoiser:
    """A denoiser from network(x, t (B,)) -> v = alpha eps - sigma x_0 (Salimans & Ho 2022).

    D = (alpha x - sigma v) / (alpha^2 + sigma^2). What flow matching calls velocity is another
    quantity: `from_flow`.
    """

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (alpha * x - sigma * network(x, _times(t, x))) / (alpha**2 + sigma**2)

    return _Denoiser(denoise, schedule)


def from_flow(network, schedule: NoiseSchedule) -> Denoiser:
    """A denoiser from network(x, t (B,)) -> eps - x_0, on RectifiedFlow the velocity dx/dsigma.

    D = (x - sigma (eps - x_0)) / (alpha + sigma). Where time runs from noise to data (Lipman et
    al. 2023), give the network 1 - t and turn the sign of its answer.
    """

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (x - sigma * network(x, _times(t, x))) / (alpha + sigma)

    return _Denoiser(denoise, schedule)


def guided(network, conditional: dict, unconditional: dict, scale: float):
    """Classifier-free guidance (Ho & Salimans 2021): u + scale (c - u), for the functions above.

    network(x (B, ...), t (B,), **condition) with two conditions, dicts of tensors of one row, or of
    one row a sample. Both answers come from one call of 2B rows, the unconditional first, and
    count as one network call (NFE); at scale 1 there is only the conditional one.
    """

    def predict(x: Tensor, t: Tensor) -> Tensor:
        n = len(x)
        rows = [{k: v.expand(n, *v.shape[1:]) for k, v in c.items()}
                for c in (unconditional, conditional)]  # fmt: skip
        if scale == 1:
            return network(x, t, **rows[1])
        both = {k: torch.cat([rows[0][k], rows[1][k]]) for k in conditional}
        u, c = network(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        return u + scale * (c - u)

    return predict


def conditioned(denoiser, condition: Tensor) -> Denoiser:
    """D(x, t) = denoiser(x, t, condition) for x (B, ...), condition (B, ...)."""
    return _Denoiser(lambda x, t: denoiser(x, t, condition), getattr(denoiser, "schedule", None))


def rescheduled(denoiser, schedule: NoiseSchedule) -> Denoiser:
    """The same denoiser on another noise schedule: D is a function of y = x / alpha and s alone.

    Raises UsageError for a denoiser that does not carry its own schedule.
    """
    own = getattr(denoiser, "schedule", None)
    if own is None:
        raise UsageError(
            "this denoiser does not say which noise schedule it has: make it with from_denoiser, "
            "from_noise_prediction, from_velocity or from_flow"
        )

    def denoise(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        told = own.t_of_s(schedule.s(t))
        return denoiser(own.alpha(told) / schedule.alpha(t) * x, told, *condition)

    return _Denoiser(denoise, schedule)


def rematerialized(function):
    """The same denoiser or decoder, whose activations are computed again in the backward pass.

    Memory then holds one call's activations and the states, whatever N is, for one more forward
    pass in each backward (App. F.2).
    """
    return _Denoiser(
        lambda *inputs: checkpoint(function, *inputs, use_reentrant=False),
        getattr(function, "schedule", None),
    )


def in_precision(denoiser, dtype: torch.dtype):
    """The same denoiser, its convolutions and matrix products in `dtype`; x and D stay as they are.

    Weights stay float32, and what must not be rounded (norms, the solver's own state) is not.
    """

    def denoise(x: Tensor, *inputs: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return denoiser(x, *inputs).to(x.dtype)

    return _Denoiser(denoise, getattr(denoiser, "schedule", None))


class count_calls(_Denoiser):
    """The same denoiser, counting its calls in `.calls`."""

    def __init__(self, denoiser: Denoiser):
        super().__init__(denoiser, getattr(denoiser, "schedule", None))
        self.calls = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        return super().__call__(*inputs)


class GaussianMixture:
    """sum_k weights[k] N(means[k], stds[k]^2 I): data whose denoiser and density are exact.

    weights (K,), means (K, d), stds (K,). x_t is a mixture too, of variances
    alpha^2 stds^2 + sigma^2, so D(x, t) = E[x_0 | x_t] has a closed form.
    """

    def __init__(self, weights, means, stds, schedule: NoiseSchedule):
        self.weights, self.means, self.stds = (
            torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, stds)
        )
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
        """E[x_0 | x_t = x] for x (B, d)."""
        y, s = x / self.schedule.alpha(t), self.schedule.s(t)
        posterior = self._log_joint(y, s).softmax(1)[..., None]
        shrink = (self.stds**2 / (self.stds**2 + s**2))[:, None]
        return (posterior * (self.means + shrink * (y[:, None] - self.means))).sum(1)

    def log_prob(self, x: Tensor, t=None) -> Tensor:
        """ln density of x_t at x, (B, d) -> (B,); of the data for t=None."""
        if t is None:
            return self._log_joint(x, torch.zeros((), dtype=x.dtype)).logsumexp(1)
        alpha = self.schedule.alpha(t)
        return (
            self._log_joint(x / alpha, self.schedule.s(t)).logsumexp(1) - x.shape[1] * alpha.log()
        )

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n draws of the data, (n, d) float64."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * z
