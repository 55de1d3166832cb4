"""Any network becomes a denoiser: D(x, t) -> an estimate of x_0, like x.

t is a float64 scalar tensor on the CPU (its gradient reaches the decoupled times). A denoiser may
carry its `schedule`; a solver made for another schedule then refuses it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .errors import UsageError
from .schedule import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
# What a network is to this package: called with x (B, ...), t (B,) and perhaps a condition.
Network = Callable[..., Tensor]


class _Denoiser:
    """A function with the noise schedule that it belongs to."""

    def __init__(self, function: Callable[..., Tensor], schedule: NoiseSchedule | None):
        self.function = function
        if schedule is not None:
            self.schedule = schedule

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _times(t: Tensor, x: Tensor) -> Tensor:
    """(B,) copies of t, as networks expect them."""
    return torch.as_tensor(t).to(x.device, non_blocking=True).expand(len(x))


def from_denoiser(network: Network, schedule: NoiseSchedule) -> Denoiser:
    """Return a denoiser made of network(x, t (B,)) -> x_0.

    What follows x and t, a condition, is passed on to the network; so it is by the functions below.
    """
    return _Denoiser(lambda x, t, *condition: network(x, _times(t, x), *condition), schedule)


def from_noise_prediction(network: Network, schedule: NoiseSchedule) -> Denoiser:
    """Return a denoiser made of network(x, t (B,)) -> eps: D = (x - sigma eps) / alpha."""

    def denoise(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        eps = network(x, _times(t, x), *condition)
        return (x - schedule.sigma(t) * eps) / schedule.alpha(t)

    return _Denoiser(denoise, schedule)


def from_velocity(network: Network, schedule: NoiseSchedule) -> Denoiser:
    """Return a denoiser made of network(x, t (B,)) -> v = alpha eps - sigma x_0.

    D = (alpha x - sigma v) / (alpha^2 + sigma^2) (Salimans & Ho 2022). What flow matching calls
    velocity is another quantity: `from_flow`.
    """

    def denoise(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        v = network(x, _times(t, x), *condition)
        return (alpha * x - sigma * v) / (alpha**2 + sigma**2)

    return _Denoiser(denoise, schedule)


def from_flow(network: Network, schedule: NoiseSchedule) -> Denoiser:
    """Return a denoiser made of network(x, t (B,)) -> eps - x_0.

    On RectifiedFlow that is the velocity dx/dsigma. D = (x - sigma (eps - x_0)) / (alpha + sigma).
    Where time runs from noise to data (Lipman et al. 2023), give the network 1 - t and turn the
    sign of its answer.
    """

    def denoise(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (x - sigma * network(x, _times(t, x), *condition)) / (alpha + sigma)

    return _Denoiser(denoise, schedule)


def guided(
    network: Network, conditional: dict[str, Tensor], unconditional: dict[str, Tensor], scale: float
) -> Network:
    """Return u + scale (c - u), classifier-free guidance (Ho & Salimans 2021), as a network.

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
        # A time that all samples share stays one, which a network need embed only once.
        times = t[:1].expand(2 * n) if t.stride(0) == 0 else torch.cat([t, t])
        u, c = network(torch.cat([x, x]), times, **both).chunk(2)
        return u + scale * (c - u)

    return predict


def conditioned(denoiser: Callable[..., Tensor], condition: Tensor) -> Denoiser:
    """Return D(x, t) = denoiser(x, t, condition) for x (B, ...), condition (B, ...)."""
    return _Denoiser(lambda x, t: denoiser(x, t, condition), getattr(denoiser, "schedule", None))


def rescheduled(denoiser: Callable[..., Tensor], schedule: NoiseSchedule) -> Denoiser:
    """Return the same denoiser on another noise schedule: D depends on y = x / alpha and s alone.

    Raises UsageError for a denoiser that does not carry its own schedule.
    """
    own = getattr(denoiser, "schedule", None)
    if own is None:
        raise UsageError(
            "this denoiser does not say which noise schedule it has: make it with from_denoiser, "
            "from_noise_prediction, from_velocity or from_flow"
        )

    def denoise(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        own_t = own.t_of_s(schedule.s(t))
        return denoiser(own.alpha(own_t) / schedule.alpha(t) * x, own_t, *condition)

    return _Denoiser(denoise, schedule)


def rematerialized(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the same denoiser or decoder, which computes its activations again going backward.

    Memory then holds one call's activations and the states, whatever N is, for one more forward
    pass in each backward (App. F.2).
    """
    return _Denoiser(
        lambda *inputs: checkpoint(function, *inputs, use_reentrant=False),
        getattr(function, "schedule", None),
    )


def in_precision(denoiser: Callable[..., Tensor], dtype: torch.dtype) -> Denoiser:
    """Return the same denoiser, its convolutions and matrix products in `dtype`.

    x and D stay as they are. Weights stay float32, and what must not be rounded (norms, the
    solver's own state) is not.
    """

    def denoise(x: Tensor, *inputs: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return denoiser(x, *inputs).to(x.dtype)

    return _Denoiser(denoise, getattr(denoiser, "schedule", None))


class CallCounter(_Denoiser):
    """A denoiser that counts its calls in `.calls`, and what they cost.

    evaluations  samples that the network saw, the sum of all batches; and of these
    backward     those whose answers were differentiated, which costs about two more
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__(denoiser, getattr(denoiser, "schedule", None))
        self.calls = self.evaluations = self.backward = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        D = super().__call__(*inputs)
        self.calls, self.evaluations = self.calls + 1, self.evaluations + len(D)
        self.backward += len(D) * D.requires_grad
        return D
